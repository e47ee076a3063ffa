"""Fused kernels: what lies between two matrix products, done in one pass over memory.

What    Triton kernels that a sampler may hand to a model, and linear layers in FP8.
Why     A matrix product reads each of its inputs a hundred times out of fast memory; a norm, an
        activation or a residual sum reads and writes once, and waits for the DRAM. In plain
        PyTorch `norm(x) * (1 + scale) + shift` makes four passes over x; here it is one.
How     One program owns whole rows (tokens), keeps them in registers in fp32, and rounds once, when
        it stores. Every kernel does what its plain-PyTorch twin does.
Runs    Where Triton does (NVIDIA, sm_80 and up), and under its interpreter on a CPU
        (TRITON_INTERPRET=1), which is how the tests check the numbers. Elsewhere: the twins.

Shapes: B batch, N tokens, D width, M rows (all leading dimensions together), K columns.
"""

import math
import os
import re
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.script import UserError

try:
    import triton
    import triton.language as tl
    from triton.tools.tensor_descriptor import TensorDescriptor
except ImportError:  # macOS, Windows: what a definition of a kernel needs, to read past it
    triton, tl = None, SimpleNamespace(constexpr=bool)
try:
    import triton.experimental.gluon.language as gl
    from triton.experimental import gluon
    from triton.experimental.gluon.language.nvidia.hopper import (
        mbarrier,
        tma,
        warpgroup_mma,
        warpgroup_mma_wait,
    )
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor as TiledDescriptor

    # Renamed between Triton 3.6 and 3.9.
    tma_load = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
except (ImportError, AttributeError):  # no Triton, or one whose Gluon is another
    gluon, gl = None, SimpleNamespace(constexpr=bool)

jit = triton.jit if triton else lambda function: function
gluon_jit = gluon.jit if gluon else lambda function: function
INTERPRETED = triton is not None and os.environ.get("TRITON_INTERPRET") == "1"
EMULATED = tl.constexpr(INTERPRETED)  # the same, for kernels to read


def runs_on(device: torch.device) -> bool:
    """Can Triton's kernels work on tensors of this device?"""
    if INTERPRETED:
        return device.type == "cpu"
    if triton is None or device.type != "cuda" or torch.version.hip:
        return False
    return torch.cuda.get_device_capability(device) >= (8, 0)


def fp8_runs(device: torch.device) -> bool:
    """Has this device tensor cores for e4m3?"""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9)


def describe_tiles(tensor: Tensor, tile: list[int]) -> "TensorDescriptor":
    """What a kernel loads and stores tiles through. The TMA engine wants strides of 16 bytes."""
    size = tensor.element_size()
    strides = [n if length > 1 else 16 for n, length in zip(tensor.stride(), tensor.shape)]
    aligned = tensor.data_ptr() % 16 == 0 and all(n * size % 16 == 0 for n in strides[:-1])
    assert tensor.stride(-1) == 1 and aligned, f"strides {tensor.stride()} of {tensor.dtype}"
    return TensorDescriptor(tensor, list(tensor.shape), [*strides[:-1], 1], tile)


# ---- rows

E4M3_MAX = 448.0
TINY = 1e-12  # the least scale: a row of zeros stays zeros


class Rows(NamedTuple):
    """A matrix in e4m3 whose row m stands for data[m] * scale[m]."""

    data: Tensor  # (..., K), float8_e4m3fn
    scale: Tensor  # (..., 1), fp32: the largest magnitude of the row is 448


def row_scales(matrix: Tensor) -> Tensor:
    """(..., K) fp32 -> (..., 1): the largest magnitude of a row becomes 448."""
    return (matrix.abs().amax(-1, keepdim=True) / E4M3_MAX).clamp(min=TINY)


def row_block(columns: int) -> tuple[int, int]:
    """(block, warps) for a program that keeps a row in registers: 32 values a thread, 8 and more
    where a row is short. Few warps wait for each other less."""
    block = triton.next_power_of_2(columns)
    return block, min(max(block // 1024, 1), 16)


def rows_of(hidden: Tensor) -> Tensor:
    """(..., K) -> (M, K) with neighbouring columns side by side: a view wherever it can be."""
    rows = hidden.reshape(-1, hidden.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()


def empty_rows(shape: tuple[int, ...], like: Tensor, fp8: bool) -> tuple[Tensor, Tensor]:
    """Where a kernel that ends in `store_row` writes: (data, scale); no scale is read in bf16."""
    data = like.new_empty(shape, dtype=torch.float8_e4m3fn if fp8 else like.dtype)
    return data, like.new_empty((*shape[:-1], 1), dtype=torch.float32) if fp8 else data


@jit
def to_e4m3(values):
    """fp32 within +-464 -> e4m3, to nearest, ties to even."""
    if EMULATED:  # the interpreter forgets to carry into the exponent: leave it nothing to round
        bits = values.to(tl.int32, bitcast=True)
        bits = (bits + 0x7FFFF + ((bits >> 20) & 1)) & -0x100000  # three of 23 bits
        near_zero = (values + 24576.0) - 24576.0  # below 2^-6 the step is 2^-9
        values = tl.where(tl.abs(values) < 0.015625, near_zero, bits.to(tl.float32, bitcast=True))
    return values.to(tl.float8e4nv)


@jit
def store_row(data, scale, row, offsets, mask, values, FP8: tl.constexpr):
    """data[offsets] = values, rounded; with FP8 by scale[row] = max |values| / 448."""
    if FP8:
        row_scale = tl.maximum(tl.max(tl.abs(values), 0) / 448.0, 1e-12)
        # One division a row. 448 (1 + 2^-22), which may come of it, is rounded to 448.
        tl.store(data + offsets, to_e4m3(values * (1.0 / row_scale)), mask)
        tl.store(scale + row, row_scale)
    else:
        tl.store(data + offsets, values.to(data.dtype.element_ty), mask)


# ---- FP8 linear layers


def quantize_rows(matrix: Tensor) -> Rows:
    """(..., K) to e4m3, every row scaled on its own: an outlier costs its own row alone. Lossy."""
    if not runs_on(matrix.device):
        scale = row_scales(matrix.float())
        return Rows((matrix.float() / scale).to(torch.float8_e4m3fn), scale)
    rows = rows_of(matrix)
    data, scale = empty_rows(matrix.shape, matrix, fp8=True)
    block, warps = row_block(rows.shape[1])
    quantize_rows_kernel[(len(rows),)](
        rows, data, scale, rows.stride(0), rows.shape[1], BLOCK=block, num_warps=warps
    )
    return Rows(data, scale)


@jit
def quantize_rows_kernel(matrix, data, scale, row_stride, K, BLOCK: tl.constexpr):
    """data, scale = e4m3 of a row of `matrix`"""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    mask = columns < K
    values = tl.load(matrix + row * row_stride + columns, mask, 0.0).to(tl.float32)
    store_row(data, scale, row, row * K + columns, mask, values, True)


def matmul_rows(left: Rows, right: Rows, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """(..., K) times (N, K) transposed, plus bias (N,): (..., N) in `dtype`.

    On tensor cores from sm_89 on, where the sum over K is kept in fp32 and the result is bf16;
    the plain product of the same values elsewhere.
    """
    shape = (*left.data.shape[:-1], len(right.data))
    if left.data.device.type != "cuda":
        a, b = (rows.data.float() * rows.scale for rows in (left, right))
        return F.linear(a, b, None if bias is None else bias.float()).to(dtype)
    out = torch._scaled_mm(
        left.data.flatten(0, -2),
        right.data.T,
        scale_a=left.scale.flatten(0, -2),
        scale_b=right.scale.T,
        bias=None if bias is None else bias.bfloat16(),
        out_dtype=torch.bfloat16,  # the only one with scales a row
        use_fast_accum=True,  # without, half the speed
    )
    return out.view(shape).to(dtype)


class FP8Linear(nn.Module):
    """nn.Linear with weights and inputs in e4m3, one scale a row of each. Lossy.

    The input may come as `Rows`: then the kernel that made it has quantized it on the way out.
    """

    reads_rows = True

    def __init__(self, linear: nn.Linear):
        super().__init__()
        assert linear.in_features % 16 == 0 and linear.out_features % 16 == 0, (
            f"{linear}: FP8 tensor cores take multiples of 16"
        )
        weight = quantize_rows(linear.weight.detach())
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.dtype = linear.weight.dtype  # of the output
        self.register_buffer("weight", weight.data)  # (N, K)
        self.register_buffer("weight_scale", weight.scale)  # (N, 1)
        self.bias = linear.bias

    def forward(self, hidden: Tensor | Rows) -> Tensor:
        rows = hidden if isinstance(hidden, Rows) else quantize_rows(hidden)
        return matmul_rows(rows, Rows(self.weight, self.weight_scale), self.bias, self.dtype)


def to_fp8(model: nn.Module) -> None:
    """Put FP8Linear in the place of every linear layer of the blocks that sees tokens.

    Not the modulations: they see one row a picture, and steer all the others. On a CPU the numbers
    are those of a GPU, without the speed. UserError: on another device without e4m3.
    """
    device = next(model.parameters()).device
    if device.type not in ("cpu", "meta") and not fp8_runs(device):
        raise UserError(f"FP8 on {device}: wanted an NVIDIA GPU from sm_89 on (Ada, Hopper)")
    for name, module in list(model.named_modules()):
        in_block = re.search(r"blocks\.\d+\.", name) and not re.search(r"mod(ulation)?\.lin$", name)
        if in_block and isinstance(module, nn.Linear):
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, FP8Linear(module))


# ---- between the matrix products of a transformer


def modulate(
    hidden: Tensor, shift: Tensor, scale: Tensor, eps: float = 1e-6, fp8: bool = False
) -> "Tensor | Rows":
    """LayerNorm(hidden) * (1 + scale) + shift for (B, N, D) and twice (B, 1, D)."""
    batch, length, width = hidden.shape
    rows = rows_of(hidden)
    data, scales = empty_rows(hidden.shape, hidden, fp8)
    shift, scale = (t.expand(batch, 1, width) for t in (shift, scale))
    block, warps = row_block(width)
    modulate_kernel[(batch * length,)](
        rows, shift, scale, data, scales, rows.stride(0), shift.stride(0), scale.stride(0),
        length, width, eps, BLOCK=block, FP8=fp8, num_warps=warps,
    )  # fmt: skip
    return Rows(data, scales) if fp8 else data


@jit
def modulate_kernel(
    hidden, shift, scale, data, scales, row_stride, shift_stride, scale_stride,
    length, D, eps, BLOCK: tl.constexpr, FP8: tl.constexpr,
):  # fmt: skip
    """data = (x - mean x) / sqrt(var x + eps) * (1 + scale) + shift, for a row x"""
    row = tl.program_id(0).to(tl.int64)
    batch = row // length
    columns = tl.arange(0, BLOCK)
    mask = columns < D
    x = tl.load(hidden + row * row_stride + columns, mask, 0.0).to(tl.float32)
    centred = tl.where(mask, x - tl.sum(x, 0) / D, 0.0)
    normed = centred * tl.math.rsqrt(tl.sum(centred * centred, 0) / D + eps)
    add = tl.load(shift + batch * shift_stride + columns, mask, 0.0).to(tl.float32)
    times = tl.load(scale + batch * scale_stride + columns, mask, 0.0).to(tl.float32)
    store_row(data, scales, row, row * D + columns, mask, normed * (1.0 + times) + add, FP8)


def add_gated(hidden: Tensor, gate: Tensor, branch: Tensor) -> Tensor:
    """hidden + gate * branch for (B, N, D), (B, 1, D), (B, N, D)."""
    batch, length, width = hidden.shape
    rows, branch = rows_of(hidden), rows_of(branch)
    gate, out = gate.expand(batch, 1, width), torch.empty_like(hidden.contiguous())
    block, warps = row_block(width)
    add_gated_kernel[(batch * length,)](
        rows, gate, branch, out, rows.stride(0), gate.stride(0), branch.stride(0),
        length, width, BLOCK=block, num_warps=warps,
    )  # fmt: skip
    return out


@jit
def add_gated_kernel(
    hidden, gate, branch, out, row_stride, gate_stride, branch_stride,
    length, D, BLOCK: tl.constexpr,
):  # fmt: skip
    """out = hidden + gate * branch, for a row"""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    mask = columns < D
    x = tl.load(hidden + row * row_stride + columns, mask, 0.0).to(tl.float32)
    times = tl.load(gate + row // length * gate_stride + columns, mask, 0.0).to(tl.float32)
    y = tl.load(branch + row * branch_stride + columns, mask, 0.0).to(tl.float32)
    tl.store(out + row * D + columns, (x + times * y).to(out.dtype.element_ty), mask)


def split_heads(streams: list[tuple], rope: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """[(qkv (B, n, 3D), its QKNorm)] -> q, k, v (B, sum of n, nh, hd), normalised and rotated.

    Streams are joined on the way; where there is one, v stays where it is, a view into qkv.
    """
    qkv, norm = streams[0]
    batch, head_dim = len(qkv), norm.query_norm.scale.shape[0]
    heads, total = qkv.shape[2] // (3 * head_dim), sum(part.shape[1] for part, _ in streams)
    joint = qkv.new_empty(3 if len(streams) > 1 else 2, batch, total, heads, head_dim)
    block_d = triton.next_power_of_2(head_dim)
    together = math.gcd(heads, max(1024 // block_d, 1))  # heads at a time: 16 bytes a thread
    first = 0
    for qkv, norm in streams:
        qkv = qkv if qkv.stride(2) == 1 else qkv.contiguous()
        split_heads_kernel[(qkv.shape[1], batch)](
            qkv, norm.query_norm.scale, norm.key_norm.scale, *rope, joint,
            qkv.stride(0), qkv.stride(1), joint.stride(0), joint.stride(1), first, 1e-6,
            HEADS=heads, TOGETHER=together, HEAD_DIM=head_dim, BLOCK_D=block_d,
            COPY_V=len(streams) > 1, num_warps=max(together * block_d // 256, 1),
        )  # fmt: skip
        first += qkv.shape[1]
    q, k = joint[:2]
    v = joint[2] if len(streams) > 1 else qkv[..., -heads * head_dim :].unflatten(2, (heads, -1))
    return q, k, v


@jit
def split_heads_kernel(
    qkv, q_scale, k_scale, cos, sin, joint, qkv_batch, qkv_row, joint_part, joint_batch, first, eps,
    HEADS: tl.constexpr, TOGETHER: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    COPY_V: tl.constexpr,
):  # fmt: skip
    """For a token, TOGETHER heads at a time, and x = q and k:

    normed = x / sqrt(mean x^2 + eps) * scale             a head at a time
    joint[x] = normed * cos + swapped(normed) * sin       swapped: neighbours a, b are b, a

    A thread holds eight neighbours: the pairs are in its registers, and a load is 16 bytes.
    """
    token, batch = tl.program_id(0), tl.program_id(1).to(tl.int64)
    head, column = tl.arange(0, TOGETHER)[:, None], tl.arange(0, BLOCK_D)[None, :]
    inside = column < HEAD_DIM
    mask = (head < HEADS) & inside
    row = (first + token).to(tl.int64)
    qkv += batch * qkv_batch + token.to(tl.int64) * qkv_row
    joint += batch * joint_batch + row * HEADS * HEAD_DIM
    cos_a, cos_b = pairs(tl.load(cos + row * HEAD_DIM + column, inside, 0.0))
    sin_a, sin_b = pairs(tl.load(sin + row * HEAD_DIM + column, inside, 0.0))
    q_a, q_b = pairs(tl.load(q_scale + column, inside, 0.0).to(tl.float32))
    k_a, k_b = pairs(tl.load(k_scale + column, inside, 0.0).to(tl.float32))
    for done in tl.static_range(0, HEADS, TOGETHER):
        place = (done + head) * HEAD_DIM + column
        q = tl.load(qkv + place, mask, 0.0)  # all loads before the first store
        k = tl.load(qkv + HEADS * HEAD_DIM + place, mask, 0.0)
        if COPY_V:
            v = tl.load(qkv + 2 * HEADS * HEAD_DIM + place, mask, 0.0)
            # Not 2 * joint_part: a product of 32 bits, too few from 2^30 values on.
            tl.store(joint + joint_part + joint_part + place, v, mask)
        q = rotate_heads(q, q_a, q_b, cos_a, cos_b, sin_a, sin_b, eps, HEAD_DIM)
        k = rotate_heads(k, k_a, k_b, cos_a, cos_b, sin_a, sin_b, eps, HEAD_DIM)
        tl.store(joint + place, q, mask)
        tl.store(joint + joint_part + place, k, mask)


@jit
def pairs(x):
    """(n, 2m) -> its even columns and its odd ones, (n, m) each"""
    return tl.split(tl.reshape(x, (x.shape[0], x.shape[1] // 2, 2)))


@jit
def rotate_heads(heads, scale_a, scale_b, cos_a, cos_b, sin_a, sin_b, eps, HEAD_DIM: tl.constexpr):
    """As above, for (n, hd)."""
    x = heads.to(tl.float32)
    norm = tl.math.rsqrt(tl.sum(x * x, 1) / HEAD_DIM + eps)[:, None]
    a, b = pairs(x)
    a, b = a * norm * scale_a, b * norm * scale_b
    out = tl.join(a * cos_a + b * sin_a, b * cos_b + a * sin_b)
    return tl.reshape(out, heads.shape).to(heads.dtype)


@jit
def gelu(x):
    """x / 2 (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))), the tanh written as a sigmoid"""
    return over_one_plus_exp2(x, x * (-2.302208198 - 0.1029432397 * x * x))  # -2 log2(e) sqrt(2/pi)


@jit
def over_one_plus_exp2(x, power):
    """x / (1 + 2^power). Twelve instructions less a value than a division and an exponential that
    care for denormals: 1 / d is rsqrt(d)^2, and here d is 1 and more."""
    root = tl.math.rsqrt(1.0 + tl.exp2(power))
    return x * root * root


def join_gelu(attended: Tensor | None, mlp: Tensor, fp8: bool = False) -> "Tensor | Rows":
    """(B, N, D), (B, N, 4D) -> (B, N, 5D): attended, then GELU(mlp); or GELU(mlp) alone."""
    right = rows_of(mlp)
    left, width = (right, 0) if attended is None else (rows_of(attended), attended.shape[-1])
    shape = (*mlp.shape[:-1], width + right.shape[1])
    data, scales = empty_rows(shape, mlp, fp8)
    block, warps = row_block(shape[-1])
    join_gelu_kernel[(len(right),)](
        left, right, data, scales, left.stride(0), right.stride(0), width, shape[-1],
        BLOCK=block, FP8=fp8, num_warps=warps,
    )  # fmt: skip
    return Rows(data, scales) if fp8 else data


@jit
def join_gelu_kernel(
    left, right, data, scales, left_stride, right_stride, D, K,
    BLOCK: tl.constexpr, FP8: tl.constexpr,
):  # fmt: skip
    """data = [left, gelu(right)], for a row"""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    is_left, mask = columns < D, columns < K
    x = tl.load(left + row * left_stride + columns, is_left, 0.0).to(tl.float32)
    y = tl.load(right + row * right_stride + columns - D, mask & (columns >= D), 0.0)
    values = tl.where(is_left, x, gelu(y.to(tl.float32)))
    store_row(data, scales, row, row * K + columns, mask, values, FP8)


def linear_gelu(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """GELU(hidden weight^T + bias), (..., K) -> (..., N): cuBLAS applies it before it stores."""
    if not hidden.is_cuda:
        return F.gelu(F.linear(hidden, weight, bias), approximate="tanh")
    rows = torch._addmm_activation(bias, hidden.flatten(0, -2), weight.T, use_gelu=True)  # tanh's
    return rows.unflatten(0, hidden.shape[:-1])


def apply_mlp(mlp: nn.Sequential, hidden: "Tensor | Rows", fp8: bool = False) -> Tensor:
    """Linear, GELU, Linear."""
    first, _, second = mlp
    if fp8 or type(first) is not nn.Linear:
        return second(join_gelu(None, first(hidden), fp8))
    return second(linear_gelu(hidden, first.weight, first.bias))


def fan_out(block: nn.Module, hidden: "Tensor | Rows") -> tuple[Tensor, Tensor]:
    """The first layer of a single block: qkv (..., 3D), and the MLP (..., 4D) for `fan_in`.

    In 16 bits as two products, the MLP's with its GELU: as many operations, a pass less.
    """
    if not in_16_bits(block):
        return block.linear1(hidden).split(block.widths, dim=-1)
    (qkv, mlp), (qkv_bias, mlp_bias) = (
        p.split(block.widths) for p in (block.linear1.weight, block.linear1.bias)
    )
    return F.linear(hidden, qkv, qkv_bias), linear_gelu(hidden, mlp, mlp_bias)


def fan_in(block: nn.Module, attended: Tensor, mlp: Tensor, fp8: bool = False) -> Tensor:
    """The last layer of a single block, (..., D), (..., 4D) -> (..., D).

    In 16 bits as two products again, the second added to the first: nothing is put side by side.
    """
    if not in_16_bits(block):
        return block.linear2(join_gelu(attended, mlp, fp8))
    widths = attended.shape[-1], mlp.shape[-1]
    left, right = block.linear2.weight.split(widths, dim=1)
    out = F.linear(attended, left, block.linear2.bias)
    out.flatten(0, -2).addmm_(mlp.flatten(0, -2), right.T)
    return out


def in_16_bits(block: nn.Module) -> bool:
    return type(block.linear1) is type(block.linear2) is nn.Linear


# ---- around the convolutions of an autoencoder, in channels_last: a pixel's channels are a row


def pixels_of(hidden: Tensor) -> Tensor:
    """(B, C, h, w) -> (B h w, C): a view of what is channels_last."""
    hidden = hidden.contiguous(memory_format=torch.channels_last)
    return hidden.permute(0, 2, 3, 1).flatten(0, 2)


def bare_conv(conv: nn.Conv2d, hidden: Tensor) -> Tensor:
    """Without its bias, which the next kernel adds: cuDNN would make a pass of its own for it."""
    hidden = hidden.contiguous(memory_format=torch.channels_last)
    out = F.conv2d(hidden, conv.weight, None, conv.stride, conv.padding, groups=conv.groups)
    return out.contiguous(memory_format=torch.channels_last)


ACTS = {F.silu: 1, F.relu: 2, None: 0}


@jit
def activate(x, ACT: tl.constexpr):
    """SiLU (1), ReLU (2) or nothing (0)"""
    if ACT == 1:
        x = over_one_plus_exp2(x, x * -1.4426950408889634)  # log2(e)
    if ACT == 2:
        x = tl.maximum(x, 0.0)
    return x


def conv_act(conv: nn.Conv2d, act: Callable, hidden: Tensor) -> Tensor:
    """act(conv(hidden)); bias and activation in one pass, in place."""
    out = bare_conv(conv, hidden)
    add_bias_act(pixels_of(out), conv.bias, act)
    return out


def add_bias_act(rows: Tensor, bias: Tensor | None, act: Callable) -> None:
    """rows = act(rows + bias), in place, for (M, C) and (C,)."""
    length, width = rows.shape
    block = min(triton.next_power_of_2(width), 512)
    together = 8192 // block
    bias_act_kernel[(triton.cdiv(length, together), triton.cdiv(width, block))](
        rows, rows if bias is None else bias, length, width,
        HAS_BIAS=bias is not None, ACT=ACTS[act], ROWS=together, BLOCK=block, num_warps=8,
    )  # fmt: skip


@jit
def bias_act_kernel(
    x, bias, M, C,
    HAS_BIAS: tl.constexpr, ACT: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """x = act(x + bias), for ROWS rows and BLOCK channels"""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[None, :]
    mask = (row < M) & (column < C)
    values = tl.load(x + row * C + column, mask, 0.0).to(tl.float32)
    if HAS_BIAS:
        values += tl.load(bias + column, column < C, 0.0).to(tl.float32)
    tl.store(x + row * C + column, activate(values, ACT).to(x.dtype.element_ty), mask)


def norm_rows(hidden: Tensor, norm: nn.Module, act: Callable | None, add: Tensor | None) -> Tensor:
    """act(norm(hidden)) or add + norm(hidden), for the RMSNorm of dcae.py."""
    rows, out = pixels_of(hidden), torch.empty_like(hidden, memory_format=torch.channels_last)
    other = rows if add is None else pixels_of(add)
    block = triton.next_power_of_2(rows.shape[1])
    together = max(4096 // block, 1)  # pixels of a program
    norm_rows_kernel[(triton.cdiv(len(rows), together),)](
        rows, norm.weight, norm.bias, other, pixels_of(out), len(rows), rows.shape[1], norm.eps,
        ADD=add is not None, ACT=ACTS[act], ROWS=together, BLOCK=block, num_warps=8,
    )  # fmt: skip
    return out


@jit
def norm_rows_kernel(
    hidden, weight, bias, add, out, M, C, eps,
    ADD: tl.constexpr, ACT: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out = [add +] act(x / sqrt(mean x^2 + eps) * weight + bias), for ROWS rows x"""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, BLOCK)[None, :]
    mask = (row < M) & (column < C)
    x = tl.load(hidden + row * C + column, mask, 0.0).to(tl.float32)
    normed = x * tl.math.rsqrt(tl.sum(x * x, 1) / C + eps)[:, None]
    times = tl.load(weight + column, column < C, 0.0).to(tl.float32)
    values = normed * times + tl.load(bias + column, column < C, 0.0).to(tl.float32)
    values = activate(values, ACT)
    if ADD:
        values += tl.load(add + row * C + column, mask, 0.0).to(tl.float32)
    tl.store(out + row * C + column, values.to(out.dtype.element_ty), mask)


def norm_act(norm: nn.Module, act: Callable | None, hidden: Tensor) -> Tensor:
    if isinstance(norm, nn.GroupNorm):  # of vae.py
        return norm_groups(hidden, norm, act)
    return norm_rows(hidden, norm, act, None)


def norm_groups(hidden: Tensor, norm: nn.GroupNorm, act: Callable | None) -> Tensor:
    """act(norm(hidden)) in channels_last, which torch leaves for a GroupNorm and comes back to."""
    (batch, width), pixels = hidden.shape[:2], hidden.shape[2] * hidden.shape[3]
    rows, out = pixels_of(hidden), torch.empty_like(hidden, memory_format=torch.channels_last)
    block = triton.next_power_of_2(width)
    together = max(4096 // block, 1)
    splits = min(triton.cdiv(pixels, 8 * together), 1024)
    sums = rows.new_empty(batch, splits, 2, width, dtype=torch.float32)
    span = triton.cdiv(triton.cdiv(pixels, splits), together) * together
    sum_squares_kernel[(splits, batch)](
        rows, sums, pixels, width, span, ROWS=together, BLOCK=block, num_warps=8
    )
    # fp64 for a few thousand numbers: the variance is a difference.
    sums = sums.sum(1, dtype=torch.float64).unflatten(2, (norm.num_groups, -1))  # (B, 2, G, C / G)
    mean, square = sums.mean(-1).div_(pixels).unbind(1)  # (B, G)
    deviation = (square - mean.square()).clamp(min=0).add_(norm.eps).sqrt()
    mean, deviation = (t.repeat_interleave(width // norm.num_groups, 1) for t in (mean, deviation))
    times = norm.weight / deviation  # (B, C)
    scale_rows_kernel[(triton.cdiv(pixels, together), batch)](
        rows, times.float(), (norm.bias - mean * times).float(), pixels_of(out), pixels, width,
        ACT=ACTS[act], ROWS=together, BLOCK=block, num_warps=8,
    )  # fmt: skip
    return out


@jit
def sum_squares_kernel(
    hidden, sums, M, C, span, ROWS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """sums = sum of x and of x^2, for every channel, over `span` of the M pixels of a picture"""
    split, batch = tl.program_id(0), tl.program_id(1).to(tl.int64)
    column = tl.arange(0, BLOCK)[None, :]
    first = tl.zeros((ROWS, BLOCK), tl.float32)
    second = tl.zeros((ROWS, BLOCK), tl.float32)
    for start in range(split * span, tl.minimum((split + 1) * span, M), ROWS):
        row = start + tl.arange(0, ROWS)[:, None]
        mask = (row < M) & (column < C)
        x = tl.load(hidden + (batch * M + row) * C + column, mask, 0.0).to(tl.float32)
        first += x
        second += x * x
    sums += (batch * tl.num_programs(0) + split) * 2 * C + tl.arange(0, BLOCK)
    inside = tl.arange(0, BLOCK) < C
    tl.store(sums, tl.sum(first, 0), inside)
    tl.store(sums + C, tl.sum(second, 0), inside)


@jit
def scale_rows_kernel(
    hidden, times, add, out, M, C, ACT: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    """out = act(x times + add), for ROWS of the M pixels of a picture"""
    batch = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, BLOCK)[None, :]
    inside = column < C
    mask = (row < M) & inside
    place = (batch * M + row) * C + column
    values = tl.load(hidden + place, mask, 0.0).to(tl.float32)
    values = values * tl.load(times + batch * C + column, inside, 0.0)
    values = values + tl.load(add + batch * C + column, inside, 0.0)
    tl.store(out + place, activate(values, ACT).to(out.dtype.element_ty), mask)


def add_norm(hidden: Tensor, norm: nn.Module, branch: Tensor) -> Tensor:
    if isinstance(norm, nn.BatchNorm2d):  # of the oldest decoders
        return hidden + norm(branch)
    return norm_rows(branch, norm, None, hidden)


def upsample(layer: nn.Conv2d, hidden: Tensor) -> Tensor:
    """The convolution, its bias, the shuffle of channels into pixels, and what is handed on."""
    new_width, (batch, width, height, breadth) = layer.new_width, hidden.shape
    grown = double_pixels(hidden) if layer.interpolate else hidden
    learned = bare_conv(layer, grown)
    out = hidden.new_empty(batch, 2 * height, 2 * breadth, new_width).permute(0, 3, 1, 2)
    block = min(triton.next_power_of_2(new_width), 512)
    together = max(512 // block, 1)
    pixels = batch * height * breadth
    upsample_kernel[(triton.cdiv(pixels, together), triton.cdiv(new_width, block))](
        pixels_of(learned), layer.bias, pixels_of(hidden), out, pixels, breadth, width, new_width,
        SHUFFLED=not layer.interpolate, REPEATS=layer.shortcut * 4 * new_width // width,
        ROWS=together, BLOCK=block, num_warps=4,
    )  # fmt: skip
    return out


def double_pixels(hidden: Tensor) -> Tensor:
    """F.interpolate, "nearest", of (B, C, h, w) in channels_last: theirs takes ten times a copy."""
    hidden = hidden.contiguous(memory_format=torch.channels_last)
    lines = hidden.permute(0, 2, 3, 1)[:, :, None, :, None].expand(-1, -1, 2, -1, 2, -1)
    return lines.flatten(3, 4).flatten(1, 2).permute(0, 3, 1, 2)


@jit
def upsample_kernel(
    learned, bias, hidden, out, M, w, C, W,
    SHUFFLED: tl.constexpr, REPEATS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """For ROWS of M pixels of C channels, and each i, j in 0, 1:

    part = 4 channel + 2 i + j                            channel of W, part of 4 W
    out[2y + i, 2x + j, channel] = learned[y, x, part] + bias[part] + hidden[y, x, part / REPEATS]

    Not SHUFFLED: learned[2y + i, 2x + j, channel] + bias[channel] instead. REPEATS is 4 W / C, or 0
    without the shortcut. Parts are read side by side, and dealt out in registers.
    """
    pixel = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    part = 4 * tl.program_id(1) * BLOCK + tl.arange(0, 4 * BLOCK)[None, :]
    channel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[None, :]
    mask, here = (pixel < M) & (part < 4 * W), (pixel < M) & (channel < W)
    values = tl.zeros((ROWS, 4 * BLOCK), tl.float32)
    if SHUFFLED:
        values += tl.load(learned + pixel * 4 * W + part, mask, 0.0).to(tl.float32)
        values += tl.load(bias + part, part < 4 * W, 0.0).to(tl.float32)
    if REPEATS > 0:
        repeats: tl.constexpr = REPEATS if REPEATS > 0 else 1
        if repeats & (repeats - 1) == 0 and repeats <= 4 * BLOCK:
            few: tl.constexpr = 4 * BLOCK // repeats
            source = tl.program_id(1) * few + tl.arange(0, few)[None, :]
            once = tl.load(hidden + pixel * C + source, (pixel < M) & (source < C), 0.0)
            once = tl.broadcast_to(once[:, :, None], (ROWS, few, repeats))
            values += tl.reshape(once, (ROWS, 4 * BLOCK)).to(tl.float32)
        else:
            values += tl.load(hidden + pixel * C + part // repeats, mask, 0.0).to(tl.float32)
    lines = tl.split(tl.reshape(values, (ROWS, BLOCK, 2, 2)).permute(0, 1, 3, 2))  # of i
    y, x = pixel // w, pixel % w  # y counts on through the batch
    for i in tl.static_range(2):
        sides = tl.split(lines[i])
        for j in tl.static_range(2):
            side = sides[j]
            target = ((2 * y + i) * 2 * w + 2 * x + j) * W + channel
            if not SHUFFLED:
                side += tl.load(learned + target, here, 0.0).to(tl.float32)
                side += tl.load(bias + channel, channel < W, 0.0).to(tl.float32)
            tl.store(out + target, side.to(out.dtype.element_ty), here)


def gated_conv(conv: nn.Conv2d, hidden: Tensor) -> Tensor:
    """conv(hidden), 3x3 and depthwise, then value * SiLU(gate) of its halves."""
    batch, width, height, breadth = hidden.shape
    half = width // 2
    out = hidden.new_empty(batch, height, breadth, half).permute(0, 3, 1, 2)
    block, together = min(triton.next_power_of_2(half), 128), 4
    grid = (batch * height, triton.cdiv(breadth, together), triton.cdiv(half, block))
    gated_conv_kernel[grid](
        pixels_of(hidden), conv.weight, conv.bias, out, height, breadth, half,
        PIXELS=together, BLOCK=block, num_warps=4,
    )  # fmt: skip
    return out


@jit
def gated_conv_kernel(
    hidden, weight, bias, out, h, w, C, PIXELS: tl.constexpr, BLOCK: tl.constexpr
):
    """For PIXELS of a line: a, b = sum over the nine neighbours of theirs * weight, + bias;
    out = a * SiLU(b). a is of the first C channels, b of the other C."""
    line = tl.program_id(0) + tl.zeros((PIXELS, 1), tl.int64)  # counts on through the batch
    x = tl.program_id(1) * PIXELS + tl.arange(0, PIXELS)[:, None]
    channel = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)[None, :]
    here = channel < C
    y = line % h
    a = tl.zeros((PIXELS, BLOCK), tl.float32) + tl.load(bias + channel, here, 0.0).to(tl.float32)
    b = tl.zeros((PIXELS, BLOCK), tl.float32) + tl.load(bias + C + channel, here, 0.0).to(
        tl.float32
    )
    for i in tl.static_range(3):
        for j in tl.static_range(3):
            inside = (y + i - 1 >= 0) & (y + i - 1 < h) & (x + j - 1 >= 0) & (x + j - 1 < w)
            near = ((line + i - 1) * w + x + j - 1) * 2 * C + channel
            times = tl.load(weight + channel * 9 + 3 * i + j, here, 0.0).to(tl.float32)
            a += times * tl.load(hidden + near, inside & here, 0.0).to(tl.float32)
            times = tl.load(weight + (C + channel) * 9 + 3 * i + j, here, 0.0).to(tl.float32)
            b += times * tl.load(hidden + near + C, inside & here, 0.0).to(tl.float32)
    target = (line * w + x) * C + channel
    tl.store(out + target, (a * activate(b, 1)).to(out.dtype.element_ty), (x < w) & here)


def mix_heads(attn: nn.Module, qkv: Tensor) -> Tensor:
    """dcae.mix_heads: every scale attends where it lies, in the dtype it has, with sums in fp32."""
    batch, _, height, breadth = qkv.shape
    rows = pixels_of(qkv).view(batch, height * breadth, -1, 3, attn.head_dim)  # (B, N, nh, 3, hd)
    scales = [rows, *(pool_heads(scale, qkv) for scale in attn.multiscale)]
    out = qkv.new_empty(batch, height * breadth, len(scales), *rows.shape[2::2])
    for i, heads in enumerate(scales):
        attend_heads(*heads.unbind(3), out[:, :, i])
    return out.flatten(2).unflatten(1, (height, breadth)).permute(0, 3, 1, 2)  # channels_last


def pool_heads(scale: nn.Sequential, qkv: Tensor) -> Tensor:
    """(B, 3 nh hd, h, w) -> (B, N, nh, 3, hd). The grouped 1x1 convolution as a batch of products:
    cuDNN calls a kernel or two for each group."""
    depthwise, grouped = scale
    rows = pixels_of(bare_conv(depthwise, qkv)).unflatten(1, (grouped.groups, -1))  # (B N, 3nh, hd)
    weight = grouped.weight.flatten(1).unflatten(0, (grouped.groups, -1))  # (3 nh, hd, hd)
    out = torch.bmm(rows.transpose(0, 1), weight.mT)  # (3 nh, B N, hd)
    return out.unflatten(1, (len(qkv), -1)).unflatten(0, (-1, 3)).permute(2, 3, 0, 1, 4)


# ---- SANA


def conv_mlp(mlp: nn.Module, hidden: Tensor, grid: tuple[int, int]) -> Tensor:
    """sana.conv_mlp without leaving the layout of tokens."""
    wide = pointwise(mlp.inverted_conv.conv, hidden, grid).contiguous()  # (B, N, 5D)
    add_bias_act(wide.flatten(0, 1), None, F.silu)
    image = wide.unflatten(1, grid).permute(0, 3, 1, 2)  # (B, 5D, h, w), channels_last
    gated = gated_conv(mlp.depth_conv.conv, image).permute(0, 2, 3, 1).flatten(1, 2)
    return pointwise(mlp.point_conv.conv, gated, grid)


def pointwise(conv: nn.Module, hidden: Tensor, grid: tuple[int, int]) -> Tensor:
    """A 1x1 convolution is a linear layer on tokens; one that was quantized is called as it is."""
    if type(conv) is nn.Conv2d:
        return F.linear(hidden, conv.weight.flatten(1), conv.bias)
    return conv(hidden.unflatten(1, grid).permute(0, 3, 1, 2)).flatten(2).transpose(1, 2)


def attend_linear(q: Tensor, k: Tensor, v: Tensor, head_dim: int) -> Tensor:
    """softmax-free attention of sana.py in two passes, for (B, N, D) each -> (B, N, D)."""
    q, k, v = (t.unflatten(2, (-1, head_dim)) for t in (q, k, v))
    out = q.new_empty(q.shape)
    attend_heads(q, k, v, out)
    return out.flatten(2)


def attend_heads(q: Tensor, k: Tensor, v: Tensor, out: Tensor) -> None:
    """The same for (B, N, nh, hd), wherever they lie, into `out`."""
    assert q.dtype == k.dtype == v.dtype, f"q {q.dtype}, k {k.dtype}, v {v.dtype}: wanted one"
    batch, length, heads, head_dim = q.shape
    q, k, v = (t if t.stride(3) == 1 else t.contiguous() for t in (q, k, v))
    splits = min(max(length // 512, 1), 32)  # programs a head, for a GPU has more room than heads
    span = triton.cdiv(triton.cdiv(length, splits), 64) * 64
    block_d = max(triton.next_power_of_2(head_dim), 16)  # what tensor cores take
    context = q.new_empty(splits, batch * heads, block_d, block_d, dtype=torch.float32)
    totals = q.new_empty(splits, batch * heads, block_d, dtype=torch.float32)
    q_strides, k_strides, v_strides, out_strides = (t.stride()[:3] for t in (q, k, v, out))
    sum_keys_kernel[(batch * heads, splits)](
        k, v, context, totals, *k_strides, *v_strides, length, heads, span,
        HEAD_DIM=head_dim, BLOCK_D=block_d, BLOCK=64, num_warps=4,
    )  # fmt: skip
    ask_kernel[(triton.cdiv(length, 64), batch * heads)](
        q, context, totals, out, *q_strides, *out_strides, length, heads, splits,
        HEAD_DIM=head_dim, BLOCK_D=block_d, BLOCK=64, num_warps=4,
    )  # fmt: skip


@jit
def sum_keys_kernel(
    k, v, context, totals, k_batch, k_row, k_head, v_batch, v_row, v_head, length, heads, span,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """context = sum of relu(k)^T v, totals = sum of relu(k), over `span` tokens of a head"""
    unit, split = tl.program_id(0), tl.program_id(1)
    units = tl.num_programs(0)
    batch, head = (unit // heads).to(tl.int64), (unit % heads).to(tl.int64)
    column = tl.arange(0, BLOCK_D)
    inside = column[None, :] < HEAD_DIM
    k += batch * k_batch + head * k_head + column[None, :]
    v += batch * v_batch + head * v_head + column[None, :]
    acc = tl.zeros((BLOCK_D, BLOCK_D), tl.float32)
    total = tl.zeros((BLOCK_D,), tl.float32)
    for first in range(split * span, tl.minimum((split + 1) * span, length), BLOCK):
        token = (first + tl.arange(0, BLOCK)[:, None]).to(tl.int64)
        mask = (token < length) & inside
        keys = tl.load(k + token * k_row, mask, 0.0)
        # Some versions of Triton return fp32 here; bf16 keys are exact in bf16, as the values.
        keys = tl.maximum(keys, 0.0).to(k.dtype.element_ty)
        values = tl.load(v + token * v_row, mask, 0.0)
        acc = tl.dot(keys.T, values, acc, input_precision="tf32x3")
        total += tl.sum(keys.to(tl.float32), 0)
    place = split * units + unit
    square = column[:, None] * BLOCK_D + column[None, :]
    tl.store(context + place * BLOCK_D * BLOCK_D + square, acc)
    tl.store(totals + place * BLOCK_D + column, total)


@jit
def ask_kernel(
    q, context, totals, out, q_batch, q_row, q_head, out_batch, out_row, out_head,
    length, heads, splits,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out = relu(q) context / (relu(q) . totals + eps), for BLOCK tokens of a head"""
    unit, units = tl.program_id(1), tl.num_programs(1)
    batch, head = (unit // heads).to(tl.int64), (unit % heads).to(tl.int64)
    column = tl.arange(0, BLOCK_D)
    square = column[:, None] * BLOCK_D + column[None, :]
    table = tl.zeros((BLOCK_D, BLOCK_D), tl.float32)
    total = tl.zeros((BLOCK_D,), tl.float32)
    for split in range(0, splits):
        place = split * units + unit
        table += tl.load(context + place * BLOCK_D * BLOCK_D + square)
        total += tl.load(totals + place * BLOCK_D + column)
    token = (tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)[:, None]).to(tl.int64)
    mask = (token < length) & (column[None, :] < HEAD_DIM)
    q += batch * q_batch + token * q_row + head * q_head + column[None, :]
    queries = tl.maximum(tl.load(q, mask, 0.0), 0.0).to(tl.float32)
    answer = tl.dot(queries, table, input_precision="tf32x3")  # the table is fp32: three passes
    answer = answer / (tl.sum(queries * total[None, :], 1)[:, None] + 1e-15)
    out += batch * out_batch + token * out_row + head * out_head + column[None, :]
    tl.store(out, answer.to(out.dtype.element_ty), mask)


# ---- attention on Hopper, by hand


def hopper_takes(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Can `hopper_attention` work on these (B, nh, N or L, hd)?"""
    head_dim = q.shape[3]
    capable = gluon and q.is_cuda and torch.cuda.get_device_capability(q.device)[0] == 9
    return bool(
        capable
        and q.dtype in (torch.bfloat16, torch.float16)
        and head_dim in (64, 128)
        and all(in_one_plane(t) for t in (q, k, v))
    )


def in_one_plane(heads: Tensor) -> bool:
    """Is (B, nh, N, hd) a matrix of B N rows, with heads side by side in a row?"""
    batch, _, length, head_dim = heads.shape
    stacked = batch == 1 or heads.stride(0) == length * heads.stride(2)
    aligned = heads.data_ptr() % 16 == 0 and heads.stride(2) % 8 == 0
    return stacked and aligned and heads.stride()[1::2] == (head_dim, 1)


# BLOCK_N, stages, registers at most: 168 for each of 384 threads are all that a multiprocessor has.
HOPPER_TILE = (128, 2, 168)


def hopper_attention(q: Tensor, k: Tensor, v: Tensor, tile: tuple = HOPPER_TILE) -> Tensor:
    """sample.attention without a mask, where `hopper_takes`: at the rate of hand-written CUDA."""
    (batch, heads, queries, head_dim), keys = q.shape, k.shape[2]
    block_n, stages, registers = tile
    out = q.new_empty(batch, queries, heads, head_dim).transpose(1, 2)
    layout = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    planes = [
        TiledDescriptor(
            t, [batch * t.shape[2], heads * head_dim], [t.stride(2), 1], [rows, head_dim], layout
        )
        for t, rows in ((q, 64), (k, block_n), (v, block_n))
    ]
    hopper_attention_kernel[(triton.cdiv(queries, 128), batch * heads)](
        *planes, out, out.stride(0), out.stride(1), out.stride(2), queries, keys, heads,
        1.4426950408889634 * head_dim**-0.5, BLOCK_N=block_n, HEAD_DIM=head_dim, STAGES=stages,
        num_warps=4, maxnreg=registers,
    )  # fmt: skip
    return out


@gluon_jit
def fetch(plane, row, column, arrived, tile):
    """Start a copy by the TMA engine; `arrived` will tell."""
    mbarrier.expect(arrived, plane.block_type.nbytes)
    tma_load(plane, [row, column], arrived, tile)


@gluon_jit
def softmax_block(logits, scale, top, total):
    """As sample.attend_block: (p, top, total, shrink)."""
    new_top = gl.maximum(top, gl.max(logits, 1) * scale)
    p = gl.exp2(logits * scale - new_top[:, None])
    shrink = gl.exp2(top - new_top)
    return p, new_top, total * shrink + gl.sum(p, 1), shrink


@gluon_jit
def hopper_attention_kernel(
    q, k, v, out, out_batch, out_head, out_row, queries, keys, heads, scale,
    BLOCK_N: gl.constexpr, HEAD_DIM: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """sample.attention_kernel by warps with roles: one fetches, two groups of four compute.

    Each group owns 64 queries (`consume`). They meet at no barrier of the block: a tile is `full`
    when the copy has arrived, and `empty` when all groups have read it. What the fetching warp
    leaves of its registers the others get. Roles: FlashAttention-3, arXiv 2407.08608.
    """
    q_tiles = gl.allocate_shared_memory(q.dtype, [2, 64, HEAD_DIM], q.layout)
    k_tiles = gl.allocate_shared_memory(k.dtype, [STAGES, BLOCK_N, HEAD_DIM], k.layout)
    v_tiles = gl.allocate_shared_memory(v.dtype, [STAGES, BLOCK_N, HEAD_DIM], v.layout)
    q_full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(2):
        mbarrier.init(q_full.index(i), count=1)
    for i in gl.static_range(STAGES):
        mbarrier.init(k_full.index(i), count=1)
        mbarrier.init(v_full.index(i), count=1)
        mbarrier.init(k_empty.index(i), count=2)
        mbarrier.init(v_empty.index(i), count=2)

    start = gl.program_id(0) * 128
    batch, head = gl.program_id(1) // heads, gl.program_id(1) % heads
    column, blocks = head * HEAD_DIM, gl.cdiv(keys, BLOCK_N)
    last = batch * keys + (blocks - 1) * BLOCK_N  # row of the last block, the first processed
    out += batch.to(gl.int64) * out_batch + head * out_head
    row = batch * queries + start
    gl.warp_specialize(
        [
            (consume, (
                0, out, q_tiles, k_tiles, v_tiles, q_full, k_full, v_full, k_empty, v_empty,
                out_row, start, queries, keys, blocks, scale, BLOCK_N, HEAD_DIM, STAGES)),
            (consume, (
                1, out, q_tiles, k_tiles, v_tiles, q_full, k_full, v_full, k_empty, v_empty,
                out_row, start, queries, keys, blocks, scale, BLOCK_N, HEAD_DIM, STAGES)),
            (produce, (
                q, k, v, q_tiles, k_tiles, v_tiles, q_full, k_full, v_full, k_empty, v_empty,
                row, last, column, blocks, BLOCK_N, STAGES)),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip


@gluon_jit
def produce(
    q, k, v, q_tiles, k_tiles, v_tiles, q_full, k_full, v_full, k_empty, v_empty,
    q_row, last, column, blocks,
    BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Fetch the queries of every group, then keys and values into whatever is empty."""
    for i in gl.static_range(2):
        fetch(q, q_row + 64 * i, column, q_full.index(i), q_tiles.index(i))
    for j in range(0, blocks):
        slot, turn = j % STAGES, (j // STAGES) & 1
        mbarrier.wait(k_empty.index(slot), turn ^ 1)  # at once in the first turn
        fetch(k, last - j * BLOCK_N, column, k_full.index(slot), k_tiles.index(slot))
        mbarrier.wait(v_empty.index(slot), turn ^ 1)
        fetch(v, last - j * BLOCK_N, column, v_full.index(slot), v_tiles.index(slot))


@gluon_jit
def consume(
    me: gl.constexpr, out, q_tiles, k_tiles, v_tiles, q_full, k_full, v_full, k_empty, v_empty,
    out_row, start, queries, keys, blocks, scale,
    BLOCK_N: gl.constexpr, HEAD_DIM: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """The loop of sample.attention_kernel, with tensor cores and exponentials at the same time:

    logits[0] = q k[0]^T;  p = softmax_block(logits[0])
    for j in 1 .. blocks - 1:
        start  logits[j] = q k[j]^T                       (wgmma runs on its own)
        start  acc += p v[j - 1]
        wait for logits[j];  p' = softmax_block(logits[j])     while acc is still being added to
        wait for acc;  acc *= shrink;  p = p'
    acc += p v[blocks - 1]

    Triton waits for every product at once; Gluon, its lower level, leaves that to us. Blocks go
    from the last key to the first: the first one processed may be ragged, the others need no mask.
    """
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    acc_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HEAD_DIM, 16])
    p_layout: gl.constexpr = gl.DotOperandLayout(0, acc_layout, 2)
    q_tile = q_tiles.index(me)
    zeros = gl.zeros([64, BLOCK_N], gl.float32, s_layout)
    acc = gl.zeros([64, HEAD_DIM], gl.float32, acc_layout)
    top = gl.full([64], float("-inf"), gl.float32, gl.SliceLayout(1, s_layout))
    total = gl.zeros([64], gl.float32, gl.SliceLayout(1, s_layout))

    mbarrier.wait(q_full.index(me), 0)
    mbarrier.wait(k_full.index(0), 0)
    k_tile = k_tiles.index(0).permute((1, 0))
    logits = warpgroup_mma(q_tile, k_tile, zeros, use_acc=False, is_async=True)
    logits = warpgroup_mma_wait(0, deps=[logits])
    mbarrier.arrive(k_empty.index(0), count=1)
    keys_here = (blocks - 1) * BLOCK_N + gl.arange(0, BLOCK_N, gl.SliceLayout(0, s_layout))
    logits = gl.where((keys_here < keys)[None, :], logits, float("-inf"))
    p, top, total, shrink = softmax_block(logits, scale, top, total)
    p = gl.convert_layout(p.to(q_tiles.dtype), p_layout)
    for j in range(1, blocks):
        slot, v_slot = j % STAGES, (j - 1) % STAGES
        mbarrier.wait(k_full.index(slot), (j // STAGES) & 1)
        k_tile = k_tiles.index(slot).permute((1, 0))
        logits_later = warpgroup_mma(q_tile, k_tile, zeros, use_acc=False, is_async=True)
        mbarrier.wait(v_full.index(v_slot), ((j - 1) // STAGES) & 1)
        acc_later = warpgroup_mma(p, v_tiles.index(v_slot), acc, is_async=True)
        logits = warpgroup_mma_wait(1, deps=[logits_later])
        mbarrier.arrive(k_empty.index(slot), count=1)
        next_p, top, total, shrink = softmax_block(logits, scale, top, total)
        acc, p = warpgroup_mma_wait(0, deps=[acc_later, p])
        mbarrier.arrive(v_empty.index(v_slot), count=1)
        acc = acc * gl.convert_layout(shrink, gl.SliceLayout(1, acc_layout))[:, None]
        p = gl.convert_layout(next_p.to(q_tiles.dtype), p_layout)
    v_slot = (blocks - 1) % STAGES
    mbarrier.wait(v_full.index(v_slot), ((blocks - 1) // STAGES) & 1)
    acc = warpgroup_mma(p, v_tiles.index(v_slot), acc, is_async=True)
    acc, p = warpgroup_mma_wait(0, deps=[acc, p])

    acc = acc / gl.convert_layout(total, gl.SliceLayout(1, acc_layout))[:, None]
    rows = start + me * 64 + gl.arange(0, 64, gl.SliceLayout(1, acc_layout))
    columns = gl.arange(0, HEAD_DIM, gl.SliceLayout(0, acc_layout))
    target = out + rows.to(gl.int64)[:, None] * out_row + columns[None, :]
    gl.store(target, acc.to(q_tiles.dtype), (rows < queries)[:, None])


# ---- all of them


def fuse(model: nn.Module) -> None:
    """Every part of a model that has `ops` gets fused ones, for FP8 if its linear layers are."""
    for module in model.modules():
        if hasattr(module, "ops"):
            fp8 = any(getattr(child, "reads_rows", False) for child in module.modules())
            fp8 = fp8 and hasattr(module.ops, "takes_rows")
            module.ops = fused_ops(fp8)


def fused_ops(fp8: bool) -> SimpleNamespace:
    """As PLAIN of flux, sana and dcae. fp8: what a linear layer reads comes as `Rows`."""
    return SimpleNamespace(
        modulate=partial(modulate, fp8=fp8),
        split_heads=split_heads,
        add_gated=add_gated,
        apply_mlp=partial(apply_mlp, fp8=fp8),
        fan_out=fan_out,
        fan_in=partial(fan_in, fp8=fp8),
        takes_rows=True,
        attend_linear=attend_linear,
        conv_mlp=conv_mlp,
        upsample=upsample,
        conv_act=conv_act,
        norm_act=norm_act,
        add_norm=add_norm,
        mix_heads=mix_heads,
        double_pixels=double_pixels,
        gated_conv=gated_conv,
    )
