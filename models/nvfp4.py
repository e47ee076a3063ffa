"""NVFP4: numbers of four bits, and the linear layer that multiplies them.

What    The format, written out in PyTorch; `QuantLinear`, which quant.py puts in the place of a
        linear layer; Triton kernels for it; `load`, which opens quant.py's file.
How     16 neighbours along the summed dimension share a scale,
            x = code * scale * tensor_scale, code in E2M1, scale in E4M3, tensor_scale in FP32  (1)
        quant.py splits the weights W of a layer by eq. (2): W / s = L R + E. The layer computes
            y = Q(x * s) Q(E)^T + (x * s) R^T L^T + bias                                       (3)
        s smooths the inputs, L (N, r) and R (r, K) are thin 16-bit matrices. GPUs with FP8 but no
        FP4 tensor cores rebuild the whole weight in FP8 and multiply in FP8:
            y = Q8(x) Q8(Q(E) s + L R s)^T + bias                                              (4)
        s is 1 / lambda of SVDQuant: we store s, which is exact in bf16; 1 / s would not be.
        Shapes: M tokens, K inputs, N outputs, r rank.
Source  NVFP4 and tensor cores: NVIDIA's PTX manual. eq. (3): SVDQuant, arXiv 2411.05007.
"""

import math
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models import kernels, weights
from models.flux import Flux
from models.kernels import E4M3_MAX, EMULATED, RowScaledFP8, jit, tl, to_e4m3, triton
from models.sana import Sana
from models.script import UserError

# ---- format

BLOCK = 16  # neighbours that share a scale
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # codes 0..7; 8..15 are their negatives
E2M1_MAX = 6.0


def round_e2m1(x: Tensor) -> Tensor:
    """To the nearest of +-E2M1, ties to the even code, beyond 6 to 6. Any shape."""
    magnitude = x.abs().clamp(max=E2M1_MAX)
    step = torch.where(magnitude < 2, 0.5, torch.where(magnitude < 4, 1.0, 2.0))
    return torch.copysign((magnitude / step).round() * step, x)  # round() takes ties to even


def into_blocks(x: Tensor) -> Tensor:
    """(..., K) -> (..., ceil(K / 16), 16) in fp32; zeros fill the last block and change nothing."""
    return F.pad(x.float(), (0, -x.shape[-1] % BLOCK)).unflatten(-1, (-1, BLOCK))


def block_scales(blocks: Tensor, tensor_scale: float) -> Tensor:
    """(..., B, 16) -> (..., B) e4m3: the largest magnitude of a block becomes 6."""
    scales = blocks.abs().amax(-1) / (E2M1_MAX * tensor_scale)
    return scales.clamp(max=E4M3_MAX).to(torch.float8_e4m3fn)


def round_blocks(blocks: Tensor, scales: Tensor, tensor_scale: float) -> tuple[Tensor, Tensor]:
    """E2M1 values (..., B, 16) and the numbers they stand for; a scale of 0 makes a block 0."""
    decode = (scales.float() * tensor_scale)[..., None]
    values = round_e2m1(blocks / torch.where(decode == 0, torch.inf, decode))
    return values, values * decode


def round_activations(x: Tensor) -> Tensor:
    """(..., K) -> the same in NVFP4, without a tensor scale: it would cost a pass over x.

    So a block below 2^-10 * 6 becomes zero, and 2688 is the largest magnitude.
    """
    blocks = into_blocks(x)
    _, rounded = round_blocks(blocks, block_scales(blocks, 1.0), 1.0)
    return rounded.flatten(-2)[..., : x.shape[-1]]


def pack(values: Tensor) -> Tensor:
    """E2M1 values (N, K) -> bytes (N, K / 2), even k in the low nibble: torch.float4_e2m1fn_x2."""
    table = torch.tensor(E2M1, device=values.device)
    codes = torch.bucketize(values.abs(), table).to(torch.uint8) | (values.signbit() << 3).byte()
    return codes[:, 0::2] | codes[:, 1::2] << 4


def unpack(packed: Tensor, scales: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """eq. (1) without tensor_scale, (N, K / 2), (N, K / 16) -> (N, K): exact in any 16 bits."""
    values = torch.tensor([*E2M1, *(-v for v in E2M1)], dtype=dtype, device=packed.device)
    pairs = torch.cartesian_prod(values, values).flip(1)  # of every byte: its low nibble first
    values = pairs[packed.int()].view(*scales.shape, BLOCK)
    return (values * scales.to(dtype)[..., None]).flatten(1)


# ---- layer


class QuantLinear(nn.Module):
    """eq. (3) in place of a linear layer or a 1x1 convolution; its inputs in 4 bits, or in 16."""

    accepts_fp8 = False  # may the kernel before this layer hand over its output in FP8?

    def __init__(self, like: nn.Module, rank: int, activations: int, tensor_scale: float):
        super().__init__()
        n, k = like.weight.shape[:2]
        self.in_features, self.out_features, self.is_conv = k, n, like.weight.dim() == 4
        self.rank, self.activations, self.tensor_scale = rank, activations, tensor_scale
        self.rank_tile = max(16, 1 << (rank - 1).bit_length())  # tensor cores want 16, Triton 2^n
        self.bias, self.mode = like.bias, "fake"
        groups = math.ceil(k / BLOCK)
        with like.weight.device:
            buffers = {
                "packed": torch.empty(n, groups * BLOCK // 2, dtype=torch.uint8),
                "scales": torch.empty(n, groups, dtype=torch.float8_e4m3fn),
                "smooth": torch.empty(k) if activations < 16 else None,  # s of eq. (3)
                "down": torch.empty(rank, k) if rank else None,  # R * s: it reads x, not x * s
                "up": torch.empty(n, rank) if rank else None,
            }
        for name, tensor in buffers.items():
            self.register_buffer(name, tensor)

    def forward(self, hidden: Tensor | RowScaledFP8) -> Tensor:
        """(..., K) -> (..., N), or (B, K, h, w) -> (B, N, h, w)."""
        linear = {"fake": fake_linear, "w4a4": w4a4_linear, "w4a8": w4a8_linear}[self.mode]
        if self.is_conv:
            return linear(hidden.movedim(1, -1).contiguous(), self).movedim(-1, 1)
        return linear(hidden, self)


def fake_linear(hidden: Tensor, layer: QuantLinear) -> Tensor:
    """eq. (3), the definition: (..., K) -> (..., N). Numbers are rounded, then multiplied."""
    weight = unpack(layer.packed, layer.scales, hidden.dtype) * layer.tensor_scale
    inputs = hidden
    if layer.activations == 4:
        inputs = round_activations(hidden.float() * layer.smooth.float()).to(hidden.dtype)
    out = F.linear(inputs, weight[:, : layer.in_features], layer.bias)
    return out + F.linear(F.linear(hidden, layer.down), layer.up) if layer.rank else out


def whole_weight(layer: QuantLinear) -> Tensor:
    """(N, K) fp32, the weight of eq. (4): Q(E) s + L R s."""
    weight = unpack(layer.packed, layer.scales)[:, : layer.in_features]
    weight = weight * (layer.tensor_scale * layer.smooth.float())
    return weight.addmm_(layer.up.float(), layer.down.float()) if layer.rank else weight


# ---- kernels
#
# mode   GPU                  inputs                 weights            product
# w4a4   Blackwell            E2M1, a scale for 16   as stored          FP4 x FP4, eq. (3)
# w4a8   Ada, Hopper, later   E4M3, a scale a token  rebuilt in E4M3    FP8 x FP8, eq. (4)
# fake   any                  rounded                rounded            16 x 16 bits: the definition
#
# Modulations are fake everywhere: they are computed once an image. Unpacking codes on their way to
# Hopper's tensor cores was slower than FP8: 0.68 ms and 0.35 (4608 x 15360 x 3072, 7c4c447).


@jit
def e2m1_codes(x):
    """fp32 -> codes 0..15 as int32, to nearest; a tie is on the side of the even code."""
    a = tl.abs(x)
    low = (a > 0.25).to(tl.int32) + (a >= 0.75) + (a > 1.25) + (a >= 1.75)
    return low + (a > 2.5) + (a >= 3.5) + (a > 5.0) + tl.where(x < 0, 8, 0)


@jit
def unpacked(packed, scales, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """bytes (ROWS, COLUMNS / 2), scales (ROWS, COLUMNS / 16) -> code * scale, in order, in fp16.

    Three bits of E2M1 in the place of fp16's exponent and first mantissa bit are 2^-14 of their
    value, and fp16 holds every product exactly: 6 bits, 2^-10 to 2688. Both codes of a byte are
    unpacked at once, in the halves of a word.
    """
    codes = packed.to(tl.int32)
    codes |= codes << 12
    bits = ((codes & 0x70007) << 9) | ((codes & 0x80008) << 12)
    even = bits.to(tl.uint16).to(tl.float16, bitcast=True)
    odd = (bits >> 16).to(tl.uint16).to(tl.float16, bitcast=True)
    values = (tl.join(even, odd) * 16384.0).reshape(ROWS, COLUMNS // 16, 16)
    return (values * scales.to(tl.float16)[:, :, None]).reshape(ROWS, COLUMNS)


@jit
def quantize_kernel(
    hidden, smooth, data, scales, M, K, hidden_stride, groups,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """data, scales = Q(hidden * smooth); a program takes BLOCK_M tokens, BLOCK_K channels."""
    row = (tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M))[:, None].to(tl.int64)
    start = tl.program_id(1) * BLOCK_K
    column = start + tl.arange(0, BLOCK_K)
    in_rows, in_columns = row < M, column < K
    x = tl.load(hidden + row * hidden_stride + column, in_rows & in_columns, 0.0).to(tl.float32)
    x *= tl.load(smooth + column, in_columns, 0.0).to(tl.float32)
    blocks = x.reshape(BLOCK_M, BLOCK_K // 16, 16)
    unit = tl.div_rn(tl.max(tl.abs(blocks), 2), 6.0)  # as PyTorch divides: ties decide
    scale = to_e4m3(tl.minimum(unit, 448.0))
    decode = scale.to(tl.float32)
    decode = tl.where(decode == 0.0, float("inf"), decode)  # a block of zeros
    codes = e2m1_codes(tl.div_rn(blocks, decode[:, :, None]))
    even, odd = tl.split(codes.reshape(BLOCK_M, BLOCK_K // 2, 2))
    byte, group = start // 2 + tl.arange(0, BLOCK_K // 2), start // 16 + tl.arange(0, BLOCK_K // 16)
    tl.store(data + row * (groups * 8) + byte, (even | (odd << 4)).to(tl.uint8), in_rows)
    tl.store(scales + row * groups + group, scale, in_rows)


@jit
def rebuild_kernel(
    packed, scales, smooth, down, up, row_scale, out, tensor_scale, N, K, groups,
    R: tl.constexpr, RANK: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """out (N, K) e4m3 = (code * scale * tensor_scale * smooth + up down) / row_scale"""
    row = (tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N))[:, None]
    start = tl.program_id(1) * BLOCK_K
    byte = start // 2 + tl.arange(0, BLOCK_K // 2)
    group = start // 16 + tl.arange(0, BLOCK_K // 16)
    column = start + tl.arange(0, BLOCK_K)
    in_rows, in_columns = row < N, column < K
    codes = tl.load(packed + row * (groups * 8) + byte, in_rows & (byte < groups * 8), 0)
    scale = tl.load(scales + row * groups + group, in_rows & (group < groups), 0.0)
    values = unpacked(codes, scale, BLOCK_N, BLOCK_K).to(tl.float32)
    values *= tensor_scale * tl.load(smooth + column, in_columns, 0.0).to(tl.float32)[None, :]
    if R > 0:
        r = tl.arange(0, RANK)
        left = tl.load(up + row * R + r, in_rows & (r < R), 0.0)
        right = tl.load(down + r[:, None] * K + column, (r[:, None] < R) & in_columns, 0.0)
        values = tl.dot(left, right, values)
    # No larger than 448 but for the last bit, which is rounded away.
    values = to_e4m3(values * (1.0 / tl.load(row_scale + row, in_rows, 1.0)))
    tl.store(out + row.to(tl.int64) * K + column, values, in_rows & in_columns)


@jit
def product_kernel(
    inputs, input_scales, weight, weight_scales, tensor_scale, branch, up, bias, out, M, N, groups,
    R: tl.constexpr, RANK: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """out (M, N) = Q(x) Q(E)^T * scales + branch up^T + bias.

    A tile is computed transposed, (BLOCK_N, BLOCK_M): sm_100 needs 128 rows in the first operand,
    and a picture may have fewer tokens, but a layer has no fewer outputs.
    """
    start_m, start_n = tl.program_id(0) * BLOCK_M, tl.program_id(1) * BLOCK_N
    n, m = (start_n + tl.arange(0, BLOCK_N))[:, None], (start_m + tl.arange(0, BLOCK_M))[:, None]
    block = tl.arange(0, BLOCK_K // 16)
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for start in range(0, groups * 16, BLOCK_K):
        w, x = weight.load([start_n, start // 2]), inputs.load([start_m, start // 2])  # bytes
        w_scale = tl.load(weight_scales + n * groups + start // 16 + block, n < N, 0.0)
        x_scale = tl.load(input_scales + m * groups + start // 16 + block, m < M, 0.0)
        if EMULATED:  # the interpreter has no idea of E4M3 scales
            left = unpacked(w, w_scale, BLOCK_N, BLOCK_K).to(tl.float32)
            right = unpacked(x, x_scale, BLOCK_M, BLOCK_K).to(tl.float32)
            acc = tl.dot(left, tl.trans(right), acc)
        else:
            acc = tl.dot_scaled(w, w_scale, "e2m1", tl.trans(x), x_scale, "e2m1", acc)
    acc *= tensor_scale
    if R > 0:
        r = tl.arange(0, RANK)
        left = tl.load(up + n * R + r, (n < N) & (r < R), 0.0)
        right = tl.load(branch + m * R + r, (m < M) & (r < R), 0.0)
        acc = tl.dot(left, tl.trans(right), acc)
    if bias is not None:
        acc += tl.load(bias + n, n < N, 0.0).to(tl.float32)
    place = out + tl.trans(m).to(tl.int64) * N + n
    tl.store(place, acc.to(out.dtype.element_ty), (n < N) & (tl.trans(m) < M))


INPUT_TILE = (32, 128, 4)  # (BLOCK_M, BLOCK_K, warps)
REBUILD_TILE = (128, 64, 4)  # (BLOCK_N, BLOCK_K, warps for a rank up to 128)
PRODUCT_TILE = (128, 128, 128, 8, 4)  # (BLOCK_M, BLOCK_N, BLOCK_K, warps, stages)
WHOLE = 256  # channels: a multiple of every BLOCK_K, and scales begin at whole 16 bytes
MOST_RANK = 256  # beyond it the branch does not fit into the shared memory of sm_89 and sm_120


def w4a8_linear(hidden: Tensor | RowScaledFP8, layer: QuantLinear) -> Tensor:
    """eq. (4), (..., K) -> (..., N)."""
    rows = hidden if isinstance(hidden, RowScaledFP8) else kernels.quantize_rows(hidden)
    weight = RowScaledFP8(rebuild(layer), layer.weight_scale)
    return kernels.matmul_rows(rows, weight, layer.bias, layer.smooth.dtype)


def rebuild(layer: QuantLinear) -> Tensor:
    """`whole_weight` / weight_scale, (N, K) e4m3: to keep all would take the memory of 8 bits."""
    (n, groups), k = layer.scales.shape, layer.in_features
    out = torch.empty((n, k), dtype=torch.float8_e4m3fn, device=layer.packed.device)
    block_n, block_k, warps = REBUILD_TILE
    rebuild_kernel[(triton.cdiv(n, block_n), triton.cdiv(k, block_k))](
        layer.packed, layer.scales, layer.smooth, layer.down, layer.up, layer.weight_scale, out,
        layer.tensor_scale, n, k, groups, R=layer.rank, RANK=layer.rank_tile,
        BLOCK_N=block_n, BLOCK_K=block_k, num_warps=warps * max(layer.rank_tile // 128, 1),
    )  # fmt: skip
    return out


def w4a4_linear(hidden: Tensor, layer: QuantLinear) -> Tensor:
    """eq. (3), (..., K) -> (..., N): up to rounding what `fake_linear` gives."""
    branch = F.linear(hidden, layer.down) if layer.rank else None  # (..., r)
    data, scales = quantize_inputs(hidden, layer)
    m, n = len(data), layer.out_features
    out = hidden.new_empty(*hidden.shape[:-1], n)
    block_m, block_n, block_k, warps, stages = PRODUCT_TILE
    product_kernel[(triton.cdiv(m, block_m), triton.cdiv(n, block_n))](
        kernels.describe_tiles(data, [block_m, block_k // 2]), scales,
        kernels.describe_tiles(layer.packed, [block_n, block_k // 2]), layer.scales,
        layer.tensor_scale, branch, layer.up, layer.bias, out, m, n, layer.scales.shape[1],
        R=layer.rank, RANK=layer.rank_tile, BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_K=block_k,
        num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return out


def quantize_inputs(hidden: Tensor, layer: QuantLinear) -> tuple[Tensor, Tensor]:
    """(..., K) -> Q(x * s) of eq. (3): bytes (M, K / 2) and scales (M, K / 16)."""
    rows, groups = kernels.rows_of(hidden), layer.scales.shape[1]
    m, k = rows.shape
    data = hidden.new_empty((m, groups * BLOCK // 2), dtype=torch.uint8)
    scales = hidden.new_empty((m, groups), dtype=torch.float8_e4m3fn)
    block_m, block_k, warps = INPUT_TILE
    quantize_kernel[(triton.cdiv(m, block_m), groups * BLOCK // block_k)](
        rows, layer.smooth, data, scales, m, k, rows.stride(0), groups,
        BLOCK_M=block_m, BLOCK_K=block_k, num_warps=warps,
    )  # fmt: skip
    return data, scales


# ---- model


def pick_mode(mode: str, device: torch.device) -> str:
    """fake | w4a4 | w4a8; "": the best of this device."""
    possible, remark = ["fake"], ""
    if kernels.runs_on(device) and kernels.fp8_runs(device):
        capability = torch.cuda.get_device_capability(device)
        possible = ["w4a4"] * (capability[0] in (10, 12)) + ["w4a8", "fake"]  # the best first
        if capability == (12, 1) and tuple(map(int, triton.__version__.split(".")[:2])) < (3, 8):
            possible, remark = possible[1:], ", or Triton 3.8 for w4a4 on sm_121"
    if mode and mode not in possible:
        raise UserError(f"--mode {mode} does not run here: wanted {' or '.join(possible)}{remark}")
    return mode or possible[0]


def use(model: nn.Module, mode: str = "") -> str:
    """Let the QuantLinears of a model compute in a mode, the best of this device unless given."""
    mode = pick_mode(mode, next(model.parameters()).device)
    for layer in model.modules():
        if mode != "fake" and isinstance(layer, QuantLinear) and layer.activations == 4:
            fits = layer.in_features % 16 == layer.out_features % 16 == 0
            if fits and layer.rank <= MOST_RANK:
                make_real(layer, mode)
    return mode


def make_real(layer: QuantLinear, mode: str) -> None:
    """Prepare a layer for the kernels, once. W4A4 gives it other shapes than its file has."""
    layer.mode, layer.accepts_fp8 = mode, mode == "w4a8" and not layer.is_conv
    if mode == "w4a8":
        scale = kernels.row_scales(whole_weight(layer))  # (N, 1)
        layer.register_buffer("weight_scale", scale, persistent=False)
    else:  # whole tiles of K: zeros fill the last one (SANA: 2240 -> 2304)
        missing = -layer.scales.shape[1] % (WHOLE // BLOCK)
        scales = layer.scales.view(torch.uint8)  # F.pad knows no e4m3
        layer.packed = F.pad(layer.packed, (0, missing * BLOCK // 2))
        layer.scales = F.pad(scales, (0, missing)).view(torch.float8_e4m3fn)


def load(
    path: str | Path, device: str | torch.device, dtype: torch.dtype, mode: str = ""
) -> nn.Module:
    """The quantized model of a quant.safetensors: a Flux or a Sana with other linear layers."""
    checkpoint = weights.open_checkpoint(Path(path))
    header, where = checkpoint.metadata, f"the header of {path}"
    if torch.device(device).type == "mps":
        raise UserError(f"{path} holds E4M3 numbers, which mps lacks: --device cpu")
    try:
        cls = {"Flux": Flux, "Sana": Sana}[header["class"]]
        model = weights.build(cls, checkpoint.config, checkpoint.path).to(dtype)
        for name, row in weights.parse_json(header["layers"], where).items():
            facts = (row["rank"], row["activations"], row["tensor_scale"])
            model.set_submodule(name, QuantLinear(model.get_submodule(name), *facts))
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{where} is not quant.py's ({error!r})") from None
    rows = {name: ((name,), None) for name in model.state_dict()}
    scales = [name for name in rows if name.endswith(".scales")]  # e4m3
    weights.assign(model, rows, checkpoint, device=device, dtype=dtype, as_stored=scales)
    if torch.device(device).type != "meta":
        print(f"computed as {use(model, mode)}", file=sys.stderr)
    return model.eval()
