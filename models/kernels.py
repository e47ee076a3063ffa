"""Fused kernels: what lies between two matrix products, in one pass over memory. And FP8.

What    Triton kernels, forwards of blocks that call them, and linear layers in FP8.
Why     A matrix product reads each of its inputs a hundred times out of fast memory. A norm,
        an activation or a residual sum reads and writes once, and waits for the DRAM. In plain
        PyTorch `norm(x) * (1 + scale) + shift` makes four passes over x; here it is one.
How     One program owns whole rows (tokens), keeps them in registers in fp32, and rounds once,
        when it stores. `fuse(model)` gives each block a `forward` with the same result as its
        own, which stands in the network's file.
Runs    Where Triton does (NVIDIA, sm_80 and up), and under Triton's interpreter on a CPU
        (TRITON_INTERPRET=1), which is how the tests check the numbers.

Shapes: B batch, N tokens, D width, M rows (all leading dimensions together), K columns.
"""

import math
import os
import re
from collections.abc import Callable
from types import MethodType, SimpleNamespace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.flux import EPS, QKNorm, attend, clip
from models.script import UserError

try:
    import triton
    import triton.language as tl
    from triton.tools.tensor_descriptor import TensorDescriptor
except ImportError:  # macOS, Windows: just enough for Python to read the definitions of kernels
    triton, tl = None, SimpleNamespace(constexpr=bool)

jit = triton.jit if triton else lambda function: function
INTERPRETED = triton is not None and os.environ.get("TRITON_INTERPRET") == "1"
EMULATED = tl.constexpr(INTERPRETED)  # the same flag, for use inside a kernel


def runs_on(device: torch.device) -> bool:
    """Can Triton's kernels work on tensors of this device?"""
    if INTERPRETED:
        return device.type == "cpu"
    if triton is None or device.type != "cuda" or torch.version.hip:
        return False
    return torch.cuda.get_device_capability(device) >= (8, 0)


def fp8_runs(device: torch.device) -> bool:
    """Does this device have tensor cores for e4m3?"""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9)


def describe_tiles(tensor: Tensor, tile: list[int]) -> "TensorDescriptor":
    """A descriptor through which a kernel loads and stores tiles (TMA: strides of 16 bytes)."""
    size = tensor.element_size()
    strides = [n if length > 1 else 16 for n, length in zip(tensor.stride(), tensor.shape)]
    aligned = tensor.data_ptr() % 16 == 0 and all(n * size % 16 == 0 for n in strides[:-1])
    assert tensor.stride(-1) == 1 and aligned, f"strides {tensor.stride()} of {tensor.dtype}"
    return TensorDescriptor(tensor, list(tensor.shape), [*strides[:-1], 1], tile)


# ---- one program for each row, rounded to 16 bits or to FP8

E4M3_MAX = 448.0
TINY = 1e-12  # the least scale: a row of zeros stays zeros


class RowScaledFP8(NamedTuple):
    """A matrix in e4m3 whose row m stands for data[m] * scale[m]."""

    data: Tensor  # (..., K), float8_e4m3fn
    scale: Tensor  # (..., 1), fp32: the largest magnitude of the row is 448


def row_scales(matrix: Tensor) -> Tensor:
    """(..., K) fp32 -> (..., 1): the largest magnitude of a row becomes 448."""
    return (matrix.abs().amax(-1, keepdim=True) / E4M3_MAX).clamp(min=TINY)


def rows_of(hidden: Tensor) -> Tensor:
    """(..., K) -> (M, K) with columns side by side: a view wherever it can be."""
    rows = hidden.reshape(-1, hidden.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()


def run_on_rows(
    kernel: Callable, shape: tuple, like: Tensor, fp8: bool, *arguments: Tensor | float
) -> Tensor | RowScaledFP8:
    """A new tensor of `shape`, of which each row is stored by one program of `kernel`."""
    data = like.new_empty(shape, dtype=torch.float8_e4m3fn if fp8 else like.dtype)
    scale = like.new_empty((*shape[:-1], 1), dtype=torch.float32) if fp8 else data
    block = triton.next_power_of_2(shape[-1])
    # A thread holds 32 values, or fewer of a short row: few warps wait less for each other.
    how = dict(BLOCK=block, FP8=fp8, num_warps=min(max(block // 1024, 1), 16))
    kernel[(math.prod(shape[:-1]),)](data, scale, shape[-1], *arguments, **how)
    return RowScaledFP8(data, scale) if fp8 else data


@jit
def load_row(pointer, columns, K):
    return tl.load(pointer + columns, columns < K, 0.0).to(tl.float32)


@jit
def store_row(data, scale, row, columns, K, values, FP8: tl.constexpr):
    """data[row] = values, rounded; with FP8 divided by scale[row] = max |values| / 448"""
    if FP8:
        row_scale = tl.maximum(tl.max(tl.abs(values), 0) / 448.0, 1e-12)
        # One division a row. It may give 448 (1 + 2^-22), which is rounded to 448.
        values = to_e4m3(values * (1.0 / row_scale))
        tl.store(scale + row, row_scale)
    tl.store(data + row * K + columns, values.to(data.dtype.element_ty), columns < K)


@jit
def to_e4m3(values):
    """fp32 within +-464 -> e4m3, to nearest, ties to even"""
    if EMULATED:  # the interpreter forgets to carry into the exponent: round before it does
        bits = values.to(tl.int32, bitcast=True)
        bits = (bits + 0x7FFFF + ((bits >> 20) & 1)) & -0x100000  # three of 23 bits
        rounded = bits.to(tl.float32, bitcast=True)
        near_zero = (values + 24576.0) - 24576.0  # below 2^-6 the step is 2^-9
        values = tl.where(tl.abs(values) < 0.015625, near_zero, rounded)
    return values.to(tl.float8e4nv)


# ---- linear layers in FP8


def quantize_rows(matrix: Tensor) -> RowScaledFP8:
    """(..., K) to e4m3. Each row has its own scale: an outlier costs its own row alone. Lossy."""
    if not runs_on(matrix.device):
        scale = row_scales(matrix.float())
        return RowScaledFP8((matrix.float() / scale).to(torch.float8_e4m3fn), scale)
    rows = rows_of(matrix)
    return run_on_rows(quantize_rows_kernel, matrix.shape, matrix, True, rows, rows.stride(0))


@jit
def quantize_rows_kernel(data, scale, K, x, row_stride, BLOCK: tl.constexpr, FP8: tl.constexpr):
    """data, scale = e4m3 of a row of x"""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    values = load_row(x + row * row_stride, columns, K)
    store_row(data, scale, row, columns, K, values, FP8)


def matmul_rows(
    left: RowScaledFP8, right: RowScaledFP8, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """(..., K) times (N, K) transposed, plus bias (N,): (..., N), summed over K in fp32."""
    if left.data.device.type != "cuda":
        a, b = (rows.data.float() * rows.scale for rows in (left, right))
        return F.linear(a, b, None if bias is None else bias.float()).to(dtype)
    out = torch._scaled_mm(
        left.data.flatten(0, -2),
        right.data.T,
        scale_a=left.scale.flatten(0, -2),
        scale_b=right.scale.T,
        bias=None if bias is None else bias.bfloat16(),
        out_dtype=torch.bfloat16,  # the only one with a scale for each row
        use_fast_accum=True,  # without it, half the speed
    )
    return out.view(*left.data.shape[:-1], len(right.data)).to(dtype)


class FP8Linear(nn.Module):
    """nn.Linear with weights and inputs in e4m3, one scale for each row of both. Lossy."""

    accepts_fp8 = True  # the kernel before may have quantized what it stored

    def __init__(self, linear: nn.Linear):
        super().__init__()
        widths = self.in_features, self.out_features = linear.in_features, linear.out_features
        assert all(n % 16 == 0 for n in widths), f"{linear}: FP8 takes multiples of 16"
        weight = quantize_rows(linear.weight.detach())
        self.dtype = linear.weight.dtype  # of the output
        self.register_buffer("weight", weight.data)  # (N, K)
        self.register_buffer("weight_scale", weight.scale)  # (N, 1)
        self.bias = linear.bias

    def forward(self, hidden: Tensor | RowScaledFP8) -> Tensor:
        rows = hidden if isinstance(hidden, RowScaledFP8) else quantize_rows(hidden)
        weight = RowScaledFP8(self.weight, self.weight_scale)
        return matmul_rows(rows, weight, self.bias, self.dtype)


def accepts_fp8(layer: nn.Module) -> bool:
    """May the input of this layer be a `RowScaledFP8`?"""
    return getattr(layer, "accepts_fp8", False)


def to_fp8(model: nn.Module) -> None:
    """Replace by FP8Linear every linear layer of the blocks that sees tokens.

    The modulations stay: they see one row a picture, and steer all the others. So do SANA's
    convolutions. On a CPU the numbers are those of a GPU, without the speed.
    """
    device = next(model.parameters()).device
    if device.type not in ("cpu", "meta") and not fp8_runs(device):
        raise UserError(f"FP8 on {device}: wanted an NVIDIA GPU from sm_89 on (Ada, Hopper)")
    for name, module in list(model.named_modules()):
        in_block = re.search(r"blocks\.\d+\.", name) and not re.search(r"mod(ulation)?\.lin$", name)
        if in_block and isinstance(module, nn.Linear):
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, FP8Linear(module))


# ---- FLUX, and what SANA's blocks share with it


def modulate(
    hidden: Tensor, shift: Tensor, scale: Tensor, eps: float = EPS, fp8: bool = False
) -> Tensor | RowScaledFP8:
    """LayerNorm(hidden) * (1 + scale) + shift for (B, N, D) and twice (B, 1, D)."""
    batch, length, width = hidden.shape
    shift, scale = (t.expand(batch, 1, width) for t in (shift, scale))
    read = rows_of(hidden), shift, scale
    strides = [tensor.stride(0) for tensor in read]
    return run_on_rows(modulate_kernel, hidden.shape, hidden, fp8, *read, *strides, length, eps)


@jit
def modulate_kernel(
    data, scales, D, hidden, shift, scale, row_stride, shift_stride, scale_stride, length, eps,
    BLOCK: tl.constexpr, FP8: tl.constexpr,
):  # fmt: skip
    """data = (x - mean x) / sqrt(var x + eps) * (1 + scale) + shift, for a row x"""
    row = tl.program_id(0).to(tl.int64)
    batch = row // length
    columns = tl.arange(0, BLOCK)
    x = load_row(hidden + row * row_stride, columns, D)
    centred = tl.where(columns < D, x - tl.sum(x, 0) / D, 0.0)
    normed = centred * tl.math.rsqrt(tl.sum(centred * centred, 0) / D + eps)
    times = 1.0 + load_row(scale + batch * scale_stride, columns, D)
    values = normed * times + load_row(shift + batch * shift_stride, columns, D)
    store_row(data, scales, row, columns, D, values, FP8)


def add_gated(hidden: Tensor, gate: Tensor, branch: Tensor) -> Tensor:
    """hidden + gate * branch for (B, N, D), (B, 1, D), (B, N, D)."""
    batch, length, width = hidden.shape
    read = rows_of(hidden), gate.expand(batch, 1, width), rows_of(branch)
    strides = [tensor.stride(0) for tensor in read]
    return run_on_rows(add_gated_kernel, hidden.shape, hidden, False, *read, *strides, length)


@jit
def add_gated_kernel(
    data, scales, D, hidden, gate, branch, row_stride, gate_stride, branch_stride, length,
    BLOCK: tl.constexpr, FP8: tl.constexpr,
):  # fmt: skip
    """data = hidden + gate * branch, for a row"""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    x = load_row(hidden + row * row_stride, columns, D)
    times = load_row(gate + row // length * gate_stride, columns, D)
    y = load_row(branch + row * branch_stride, columns, D)
    store_row(data, scales, row, columns, D, x + times * y, FP8)


def split_heads(streams: list[tuple[Tensor, QKNorm]], rope: Tensor) -> tuple[Tensor, ...]:
    """[(qkv (B, n, 3D), its norm)] -> q, k, v (B, sum of n, nh, hd), normalised and rotated.

    The kernel joins the streams as it stores them. Of a single stream v stays a view into qkv.
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
            qkv.stride(0), qkv.stride(1), joint.stride(0), joint.stride(1), first, EPS,
            HEADS=heads, TOGETHER=together, HEAD_DIM=head_dim, BLOCK_D=block_d,
            COPY_V=len(streams) > 1, num_warps=max(together * block_d // 256, 1),
        )  # fmt: skip
        first += qkv.shape[1]
    q, k = joint[:2]
    v = joint[2] if len(streams) > 1 else qkv.unflatten(2, (3, heads, -1))[:, :, 2]
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
def rotate_heads(heads, w_a, w_b, cos_a, cos_b, sin_a, sin_b, eps, HEAD_DIM: tl.constexpr):
    """normed * cos + swapped(normed) * sin, for (n, hd)"""
    x = heads.to(tl.float32)
    norm = tl.math.rsqrt(tl.sum(x * x, 1) / HEAD_DIM + eps)[:, None]
    a, b = pairs(x)
    a, b = a * norm * w_a, b * norm * w_b
    out = tl.join(a * cos_a + b * sin_a, b * cos_b + a * sin_b)
    return tl.reshape(out, heads.shape).to(heads.dtype)


@jit
def over_one_plus_exp2(x, power):
    """x / (1 + 2^power). 1 / d is rsqrt(d)^2: a division takes twelve instructions more."""
    root = tl.math.rsqrt(1.0 + tl.exp2(power))
    return x * root * root


def join_gelu(attended: Tensor | None, mlp: Tensor, fp8: bool = False) -> Tensor | RowScaledFP8:
    """(B, N, D), (B, N, 4D) -> (B, N, 5D): attended, then GELU(mlp); or GELU(mlp) alone."""
    right = rows_of(mlp)
    left, width = (right, 0) if attended is None else (rows_of(attended), attended.shape[-1])
    shape = (*mlp.shape[:-1], width + mlp.shape[-1])
    strides = left.stride(0), right.stride(0)
    return run_on_rows(join_gelu_kernel, shape, mlp, fp8, left, right, *strides, width)


@jit
def join_gelu_kernel(
    data, scales, K, left, right, left_stride, right_stride, D,
    BLOCK: tl.constexpr, FP8: tl.constexpr,
):  # fmt: skip
    """data = [left, gelu(right)], for a row"""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    x = load_row(left + row * left_stride, columns, D)
    inside = (columns >= D) & (columns < K)
    y = tl.load(right + row * right_stride + columns - D, inside, 0.0).to(tl.float32)
    # y / 2 (1 + tanh(sqrt(2 / pi) (y + 0.044715 y^3))), the tanh as a sigmoid
    power = y * (-2.302208198 - 0.1029432397 * y * y)  # -2.302208198 = -2 log2(e) sqrt(2 / pi)
    values = tl.where(columns < D, x, over_one_plus_exp2(y, power))
    store_row(data, scales, row, columns, K, values, FP8)


def modulate_into(layer: nn.Module, hidden: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """layer(modulate(hidden, shift, scale)), through FP8 if the layer computes in it."""
    return layer(modulate(hidden, shift, scale, fp8=accepts_fp8(layer)))


def double_block_forward(
    block: nn.Module, img: Tensor, txt: Tensor, condition: Tensor, rope: Tensor, attention: Callable
) -> tuple[Tensor, Tensor]:
    """flux.DoubleStreamBlock"""
    img_mod, txt_mod = block.img_mod(condition), block.txt_mod(condition)
    img_qkv = modulate_into(block.img_attn.qkv, img, *img_mod[:2])  # (B, N, 3D)
    txt_qkv = modulate_into(block.txt_attn.qkv, txt, *txt_mod[:2])  # (B, L, 3D)
    streams = [(txt_qkv, block.txt_attn.norm), (img_qkv, block.img_attn.norm)]
    joint = attend(*split_heads(streams, rope), attention)  # (B, L + N, D)
    txt_out, img_out = joint.split((txt.shape[1], img.shape[1]), dim=1)
    img = after_attention(img, img_out, img_mod, block.img_attn, block.img_mlp)
    txt = after_attention(txt, txt_out, txt_mod, block.txt_attn, block.txt_mlp)
    return img, txt


def after_attention(
    hidden: Tensor, attended: Tensor, mod: tuple, attn: nn.Module, mlp: nn.Sequential
) -> Tensor:
    """flux.DoubleStreamBlock.after"""
    _, _, gate, mlp_shift, mlp_scale, mlp_gate = mod
    first, _, second = mlp
    hidden = add_gated(hidden, gate, attn.proj(attended))
    wide = modulate_into(first, hidden, mlp_shift, mlp_scale)  # (B, n, 4D)
    branch = second(join_gelu(None, wide, accepts_fp8(second)))
    return clip(add_gated(hidden, mlp_gate, branch))


def single_block_forward(
    block: nn.Module, hidden: Tensor, condition: Tensor, rope: Tensor, attention: Callable
) -> Tensor:
    """flux.SingleStreamBlock"""
    shift, scale, gate = block.modulation(condition)
    both = modulate_into(block.linear1, hidden, shift, scale)  # (B, L + N, 7D)
    qkv, mlp = both.split(block.widths, dim=-1)
    attended = attend(*split_heads([(qkv, block.norm)], rope), attention)  # (B, L + N, D)
    branch = block.linear2(join_gelu(attended, mlp, accepts_fp8(block.linear2)))
    return clip(add_gated(hidden, gate, branch))


def sana_block_forward(
    block: nn.Module, hidden: Tensor, text: Tensor, text_bias: Tensor, condition: Tensor,
    grid: tuple[int, int], attention: Callable,
) -> Tensor:  # fmt: skip
    """sana.SanaBlock; in FP8 its layers quantize their own inputs."""
    modulation = (block.scale_shift_table + condition).chunk(6, dim=1)  # (B, 1, D) each
    shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = modulation
    attended = block.attn(modulate(hidden, shift, scale, block.eps))
    hidden = add_gated(hidden, gate, attended)
    hidden = hidden + block.cross_attn(hidden, text, text_bias, attention)
    branch = block.mlp(modulate(hidden, mlp_shift, mlp_scale, block.eps), grid)
    return add_gated(hidden, mlp_gate, branch)


# ---- DC-AE, in channels_last: the channels of a pixel are a row


def pixels_of(hidden: Tensor) -> Tensor:
    """(B, C, h, w) -> (B h w, C): a view of what is channels_last."""
    hidden = hidden.contiguous(memory_format=torch.channels_last)
    return hidden.permute(0, 2, 3, 1).flatten(0, 2)


def bare_conv(conv: nn.Conv2d, hidden: Tensor) -> Tensor:
    """Without the bias, which the next kernel adds: cuDNN makes a pass of its own for it."""
    hidden = hidden.contiguous(memory_format=torch.channels_last)
    out = F.conv2d(hidden, conv.weight, None, conv.stride, conv.padding, groups=conv.groups)
    return out.contiguous(memory_format=torch.channels_last)


def conv_act(conv: nn.Conv2d, act: Callable, hidden: Tensor) -> Tensor:
    """act(conv(hidden)) for SiLU or ReLU; one pass in place adds the bias and activates."""
    out = bare_conv(conv, hidden)
    rows = pixels_of(out)
    block = min(triton.next_power_of_2(rows.shape[1]), 512)
    together = 8192 // block  # pixels of a program
    grid = triton.cdiv(len(rows), together), triton.cdiv(rows.shape[1], block)
    how = dict(SILU=act is F.silu, ROWS=together, BLOCK=block, num_warps=8)
    bias_act_kernel[grid](rows, conv.bias, *rows.shape, **how)
    return out


@jit
def bias_act_kernel(
    x, bias, M, C, SILU: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """x = act(x + bias), for ROWS rows and BLOCK channels"""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[None, :]
    mask = (row < M) & (column < C)
    values = tl.load(x + row * C + column, mask, 0.0).to(tl.float32)
    values += tl.load(bias + column, column < C, 0.0).to(tl.float32)
    if SILU:  # x / (1 + exp(-x))
        values = over_one_plus_exp2(values, values * -1.4426950408889634)  # log2(e)
    else:
        values = tl.maximum(values, 0.0)
    tl.store(x + row * C + column, values.to(x.dtype.element_ty), mask)


def norm_rows(norm: nn.Module, hidden: Tensor, add: Tensor | None = None) -> Tensor:
    """dcae.RMSNorm: norm(hidden), or add + norm(hidden)."""
    rows, out = pixels_of(hidden), torch.empty_like(hidden, memory_format=torch.channels_last)
    other = rows if add is None else pixels_of(add)
    block = triton.next_power_of_2(rows.shape[1])
    together = max(4096 // block, 1)  # pixels of a program
    how = dict(ADD=add is not None, ROWS=together, BLOCK=block, num_warps=8)
    norm_rows_kernel[(triton.cdiv(len(rows), together),)](
        rows, norm.weight, norm.bias, other, pixels_of(out), *rows.shape, norm.eps, **how
    )
    return out


@jit
def norm_rows_kernel(
    hidden, weight, bias, add, out, M, C, eps,
    ADD: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out = [add +] x / sqrt(mean x^2 + eps) * weight + bias, for ROWS rows x"""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, BLOCK)[None, :]
    mask = (row < M) & (column < C)
    x = tl.load(hidden + row * C + column, mask, 0.0).to(tl.float32)
    normed = x * tl.math.rsqrt(tl.sum(x * x, 1) / C + eps)[:, None]
    times = tl.load(weight + column, column < C, 0.0).to(tl.float32)
    values = normed * times + tl.load(bias + column, column < C, 0.0).to(tl.float32)
    if ADD:
        values += tl.load(add + row * C + column, mask, 0.0).to(tl.float32)
    tl.store(out + row * C + column, values.to(out.dtype.element_ty), mask)


def res_block_forward(block: nn.Module, hidden: Tensor) -> Tensor:
    """dcae.ResBlock"""
    branch = block.conv2(conv_act(block.conv1, block.act, hidden))
    if isinstance(block.norm, nn.BatchNorm2d):  # of the oldest decoders
        return hidden + block.norm(branch)
    return norm_rows(block.norm, branch, add=hidden)


def glumb_conv_forward(block: nn.Module, hidden: Tensor) -> Tensor:
    """dcae.GLUMBConv"""
    wide = conv_act(block.conv_inverted, F.silu, hidden)  # (B, 8D, h, w)
    value, gate = block.conv_depth(wide).chunk(2, 1)
    return norm_rows(block.norm, block.conv_point(value * F.silu(gate)), add=hidden)


def per_head_forward(conv: nn.Conv2d, hidden: Tensor) -> Tensor:
    """dcae.PerHead as a batch of products: cuDNN would call kernels for each of the groups."""
    rows = pixels_of(hidden).unflatten(1, (conv.groups, -1))  # (B h w, 3 nh, hd)
    weight = conv.weight.flatten(1).unflatten(0, (conv.groups, -1))  # (3 nh, hd, hd)
    mixed = torch.bmm(rows.transpose(0, 1), weight.mT).transpose(0, 1).flatten(1)
    return mixed.unflatten(0, (len(hidden), *hidden.shape[2:])).permute(0, 3, 1, 2)


def upsample_forward(layer: nn.Conv2d, hidden: Tensor) -> Tensor:
    """dcae.Upsample by pixel_shuffle, which in torch leaves channels_last and comes back to it."""
    if layer.interpolate:
        return type(layer).forward(layer, hidden)
    learned = bare_conv(layer, hidden).permute(0, 2, 3, 1)  # (B, h, w, 4W)
    if layer.shortcut:  # every channel repeated in place
        learned.unflatten(3, (hidden.shape[1], -1)).add_(hidden.permute(0, 2, 3, 1)[..., None])
    parts = learned.unflatten(3, (-1, 2, 2)).permute(0, 1, 4, 2, 5, 3)  # (B, h, 2, w, 2, W)
    bias = layer.bias.unflatten(0, (-1, 2, 2)).permute(1, 2, 0)[:, None]  # (2, 1, 2, W)
    pixels = torch.add(parts, bias, out=hidden.new_empty(parts.shape))
    return pixels.flatten(3, 4).flatten(1, 2).permute(0, 3, 1, 2)  # (B, W, 2h, 2w)


# ---- fuse

# Classes go by module and name: dcae.py imports from models/, and not the other way round.
FUSED = {
    "flux.DoubleStreamBlock": double_block_forward,
    "flux.SingleStreamBlock": single_block_forward,
    "sana.SanaBlock": sana_block_forward,
    "dcae.ResBlock": res_block_forward,
    "dcae.GLUMBConv": glumb_conv_forward,
    "dcae.PerHead": per_head_forward,
    "dcae.RMSNorm": norm_rows,
    "dcae.Upsample": upsample_forward,
}


def fuse(model: nn.Module) -> None:
    """Give the blocks named in FUSED a forward that calls kernels. Kernels have no gradient."""
    for module in model.modules():
        name = f"{type(module).__module__.split('.')[-1]}.{type(module).__name__}"
        if name in FUSED:
            module.forward = MethodType(FUSED[name], module)
