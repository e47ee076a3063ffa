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

import os
from types import SimpleNamespace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

try:
    import triton
    import triton.language as tl
    from triton.tools.tensor_descriptor import TensorDescriptor
except ImportError:  # macOS, Windows: what a definition of a kernel needs, to read past it
    triton, tl = None, SimpleNamespace(constexpr=bool)

jit = triton.jit if triton else lambda function: function
INTERPRETED = triton is not None and os.environ.get("TRITON_INTERPRET") == "1"
EMULATED = tl.constexpr(INTERPRETED)  # the same, for kernels to read


def runs_on(device: torch.device) -> bool:
    """Can Triton's kernels work on tensors of this device?"""
    if INTERPRETED:
        return device.type == "cpu"
    if triton is None or device.type != "cuda" or torch.version.hip:
        return False
    return torch.cuda.get_device_capability(device) >= (8, 0)


def describe_tiles(tensor: Tensor, tile: list[int]) -> "TensorDescriptor":
    """What a kernel loads and stores tiles through. The TMA engine wants strides of 16 bytes."""
    size = tensor.element_size()
    strides = [n if length > 1 else 16 for n, length in zip(tensor.stride(), tensor.shape)]
    aligned = tensor.data_ptr() % 16 == 0 and all(n * size % 16 == 0 for n in strides[:-1])
    assert tensor.stride(-1) == 1 and aligned, f"strides {tensor.stride()} of {tensor.dtype}"
    return TensorDescriptor(tensor, list(tensor.shape), [*strides[:-1], 1], tile)


# ---- FP8, a scale a row

E4M3_MAX = 448.0
TINY = 1e-12  # the least scale: a row of zeros stays zeros


class Rows(NamedTuple):
    """A matrix in e4m3 whose row m stands for data[m] * scale[m]."""

    data: Tensor  # (..., K), float8_e4m3fn
    scale: Tensor  # (..., 1), fp32: the largest magnitude of the row is 448


def quantize_rows(matrix: Tensor) -> Rows:
    """(..., K) to e4m3, every row scaled on its own: an outlier costs its own row alone. Lossy."""
    if not runs_on(matrix.device):
        scale = (matrix.float().abs().amax(-1, keepdim=True) / E4M3_MAX).clamp(min=TINY)
        return Rows((matrix.float() / scale).to(torch.float8_e4m3fn), scale)
    rows = matrix.reshape(-1, matrix.shape[-1])  # (M, K), a view wherever it can be
    rows = rows if rows.stride(1) == 1 else rows.contiguous()
    data = torch.empty(matrix.shape, dtype=torch.float8_e4m3fn, device=matrix.device)
    scale = torch.empty((*matrix.shape[:-1], 1), dtype=torch.float32, device=matrix.device)
    block, warps = row_block(rows.shape[1])
    quantize_rows_kernel[(len(rows),)](
        rows, data, scale, rows.stride(0), rows.shape[1], BLOCK=block, num_warps=warps
    )
    return Rows(data, scale)


def row_block(columns: int) -> tuple[int, int]:
    """(block, warps) for a program that keeps a whole row in registers: 16 to 32 values a thread."""
    block = triton.next_power_of_2(columns)
    return block, min(max(block // 1024, 1), 16)


@jit
def to_e4m3(values):
    """fp32 within +-448 -> e4m3, to nearest, ties to even."""
    if EMULATED:  # the interpreter forgets to carry into the exponent: leave it nothing to round
        bits = values.to(tl.int32, bitcast=True)
        bits = (bits + 0x7FFFF + ((bits >> 20) & 1)) & -0x100000  # three of 23 bits
        near_zero = (values + 24576.0) - 24576.0  # below 2^-6 the step is 2^-9
        values = tl.where(tl.abs(values) < 0.015625, near_zero, bits.to(tl.float32, bitcast=True))
    return values.to(tl.float8e4nv)


@jit
def store_rows(data, scale, row, offsets, mask, values, BLOCK: tl.constexpr):
    """scale[row] = max |values| / 448;  data[offsets] = values / scale[row]"""
    row_scale = tl.maximum(tl.max(tl.abs(values), 0) / 448.0, 1e-12)
    scaled = tl.minimum(tl.maximum(values / row_scale, -448.0), 448.0)  # 448 (1 + 2^-23) is not
    tl.store(data + offsets, to_e4m3(scaled), mask)
    tl.store(scale + row, row_scale)


@jit
def quantize_rows_kernel(matrix, data, scale, row_stride, K, BLOCK: tl.constexpr):
    """data, scale = e4m3 of a row of `matrix`"""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    mask = columns < K
    values = tl.load(matrix + row * row_stride + columns, mask, 0.0).to(tl.float32)
    store_rows(data, scale, row, row * K + columns, mask, values, BLOCK)


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
