"""NVFP4: numbers of four bits, and the linear layer that multiplies them.

What    The format, written out in PyTorch; `QuantLinear`, a linear layer whose weights are packed
        in it, with a 16-bit branch beside; Triton kernels for it; `load`, which opens what quant.py
        writes.
Why     Four bits hold a weight in 2/7 of the memory of sixteen, scales included, and Blackwell's
        tensor cores multiply them at four times the rate.
How     16 neighbours along the summed dimension share a scale,
            x = code * scale * tensor_scale, code in E2M1, scale in E4M3, tensor_scale in FP32  (1)
        and a layer whose weights W quant.py has split into L R + E computes
            y = Q(x * s) Q(E)^T + (x R^T) L^T + bias                                           (2)
        s smooths the inputs (W was divided by it), L (N, r) and R (r, K) are thin 16-bit matrices.
        What has no 4-bit tensor cores but 8-bit ones multiplies the same matrix in eight bits,
            y = Q8(x) Q8(Q(E) s + L R s)^T + bias                                              (3)
Runs    "fake" anywhere: numbers are rounded as they would be, then multiplied as usual; this is the
        definition. "w4a4", eq. (2), on Blackwell; "w4a8", eq. (3), on Hopper: the same up to
        rounding, fast.
Source  NVFP4 and tensor cores: NVIDIA's PTX manual. eq. (2): SVDQuant, arXiv 2411.05007.

Shapes: M tokens, K inputs, N outputs, r rank.
"""

import math
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models import kernels, weights
from models.flux import Flux
from models.kernels import E4M3_MAX, EMULATED, Rows, jit, tl, to_e4m3, triton
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
    """(..., K) -> the same in NVFP4. No tensor scale: it would cost a pass over x, and gain 1e-4.

    So a block below 2^-10 * 6 becomes zero, and 2688 is the largest magnitude.
    """
    blocks = into_blocks(x)
    _, rounded = round_blocks(blocks, block_scales(blocks, 1.0), 1.0)
    return rounded.flatten(-2)[..., : x.shape[-1]]


def round_fp8(x: Tensor) -> Tensor:
    """(..., K) -> the same in E4M3, a scale a row: what Hopper multiplies."""
    scale = kernels.row_scales(x)
    return (x / scale).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn).float() * scale


def pack(values: Tensor) -> Tensor:
    """E2M1 values (N, K) -> bytes (N, K / 2), even k in the low nibble: torch.float4_e2m1fn_x2."""
    table = torch.tensor(E2M1, device=values.device)
    codes = torch.bucketize(values.abs(), table).to(torch.uint8) | (values.signbit() << 3).byte()
    return codes[:, 0::2] | codes[:, 1::2] << 4


def unpack(packed: Tensor, scales: Tensor) -> Tensor:
    """eq. (1) but for tensor_scale: bytes (N, K / 2) and scales (N, K / 16) -> (N, K) fp32."""
    table = torch.tensor([*E2M1, *(-v for v in E2M1)], device=packed.device)
    values = table[torch.stack((packed & 15, packed >> 4), dim=-1).flatten(1).int()]
    return (values.unflatten(1, (-1, BLOCK)) * scales.float()[..., None]).flatten(1)


# ---- layer


class QuantLinear(nn.Module):
    """eq. (2) in place of a linear layer, or of a 1x1 convolution.

    activations: bits of the inputs: 4 (NVFP4), 8 (FP8: eq. (3)) or 16 (as they come).
    """

    def __init__(self, like: nn.Module, rank: int, activations: int, tensor_scale: float):
        super().__init__()
        (n, k), device = like.weight.shape[:2], like.weight.device
        self.in_features, self.out_features, self.is_conv = k, n, like.weight.dim() == 4
        self.rank, self.activations, self.tensor_scale = rank, activations, tensor_scale
        blocks = math.ceil(k / BLOCK)
        empty = {
            "packed": torch.empty(n, blocks * BLOCK // 2, dtype=torch.uint8, device=device),
            "scales": torch.empty(n, blocks, dtype=torch.float8_e4m3fn, device=device),
        }
        if activations < 16:
            empty["smooth"] = torch.empty(k, device=device)  # s of eq. (2): 1 / the paper's lambda
        if rank:
            empty["down"] = torch.empty(rank, k, device=device)  # R * s: it reads x, not x'
            empty["up"] = torch.empty(n, rank, device=device)
        for name, tensor in empty.items():
            self.register_buffer(name, tensor)
        self.bias, self.real = like.bias, False

    @property
    def reads_rows(self) -> bool:
        """May the input come as kernels.Rows, in FP8 already?"""
        return self.real and self.activations == 8 and not self.is_conv

    def forward(self, hidden: "Tensor | Rows") -> Tensor:  # (..., K) -> (..., N), or (B, K, h, w)
        if isinstance(hidden, Rows):
            return fp8_product(hidden, self, self.smooth.dtype)
        rows = hidden.movedim(1, -1) if self.is_conv else hidden
        shape = (*rows.shape[:-1], self.out_features)
        linear = real_linear if self.real else fake_linear
        out = linear(rows.reshape(-1, self.in_features), self).view(shape)
        return out.movedim(-1, 1) if self.is_conv else out

    def extra_repr(self) -> str:
        path = "real" if self.real else "fake"
        about = f"W4A{self.activations} {path}, rank={self.rank}"
        return f"{self.in_features}, {self.out_features}, {about}"


def fake_linear(hidden: Tensor, layer: QuantLinear) -> Tensor:
    """eq. (2) or (3), the definition: (M, K) -> (M, N). Rounded as below, then multiplied."""
    k, dtype = layer.in_features, hidden.dtype
    if layer.activations == 8:
        inputs, weight = (round_fp8(x).to(dtype) for x in (hidden.float(), whole_weight(layer)))
        return F.linear(inputs, weight, layer.bias)
    weight = (unpack(layer.packed, layer.scales)[:, :k] * layer.tensor_scale).to(dtype)
    if layer.activations == 16:
        return F.linear(hidden, weight, layer.bias)
    smoothed = round_activations(hidden.float() * layer.smooth.float())  # (M, K)
    out = F.linear(smoothed.to(dtype), weight, layer.bias)
    if layer.rank:
        out = out + F.linear(F.linear(hidden, layer.down), layer.up)
    return out


def whole_weight(layer: QuantLinear) -> Tensor:
    """(N, K) fp32, what eq. (2) multiplies inputs by: Q(E) s + L R s."""
    weight = unpack(layer.packed, layer.scales)[:, : layer.in_features]
    weight = weight * (layer.tensor_scale * layer.smooth.float())
    return weight.addmm_(layer.up.float(), layer.down.float()) if layer.rank else weight


# ---- kernels: eq. (2) on tensor cores
#
#          inputs                     weights                          products
# sm_100,  E2M1, a scale for 16       as stored                        FP4 x FP4, scaled by the
# sm_120                                                               tensor core itself: W4A4
# sm_90    E4M3, a scale a token      rebuilt in memory: E4M3, a       FP8 x FP8 by cuBLAS: W4A8
#                                     scale a row, the branch inside
# any      16 bits (modulations)      code * scale, exact              16 x 16 bits: W4A16
#
# On Hopper a product that unpacks codes on their way to the tensor cores was slower: 0.68 ms with
# the best tile where FP8 takes 0.35 (4608 x 15360 x 3072, one H200, Triton 3.6, commit 7c4c447).
# With eight bits an outlier of the inputs costs little: no smoothing, no branch, and what comes
# before a layer is as in FP8. The detour costs the same for one token as for thousands.
#
# W4A16 keeps even and odd channels apart: a byte holds one of each, the inputs are put in that
# order, and a sum does not mind it.


@jit
def e2m1_codes(x):
    """fp32 -> codes 0..15 as int32, to nearest; a tie is on the side of the even code."""
    a = tl.abs(x)
    low = (a > 0.25).to(tl.int32) + (a >= 0.75) + (a > 1.25) + (a >= 1.75)
    return low + (a > 2.5) + (a >= 3.5) + (a > 5.0) + tl.where(x < 0, 8, 0)


@jit
def decoded(codes, scales, ROWS: tl.constexpr, HALF: tl.constexpr):
    """codes (ROWS, HALF) of every other channel, scales (ROWS, HALF / 8) -> code * scale in fp16.

    Three bits of E2M1 in the place of fp16's exponent and first mantissa bit are 2^-14 of their
    value, the subnormal 0.5 included. fp16 holds every product exactly: 6 bits, 2^-10 to 2688.
    """
    codes = codes.to(tl.int32)
    bits = (((codes & 7) << 9) | ((codes & 8) << 12)).to(tl.uint16)
    values = (bits.to(tl.float16, bitcast=True) * 16384.0).reshape(ROWS, HALF // 8, 8)
    return (values * scales.to(tl.float16)[:, :, None]).reshape(ROWS, HALF)


@jit
def unpacked(packed, scales, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """bytes (ROWS, COLUMNS / 2), scales (ROWS, COLUMNS / 16) -> code * scale, in order, in fp16.

    As `decoded`, both codes of a byte at once in the halves of a word: a third fewer instructions.
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
    hidden, smooth, down, data, scales, branch, M, K, hidden_stride, groups,
    R: tl.constexpr, RANK: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """data, scales = Q(hidden * smooth);  branch = hidden @ down^T: one pass over `hidden`."""
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    in_rows, row64 = row[:, None] < M, row[:, None].to(tl.int64)
    thin = tl.arange(0, RANK)
    through = tl.zeros((BLOCK_M, RANK), tl.float32)
    pair, block = tl.arange(0, BLOCK_K // 2), tl.arange(0, BLOCK_K // 16)
    for start in range(0, groups * 16, BLOCK_K):
        column = start + tl.arange(0, BLOCK_K)
        inside = in_rows & (column < K)
        x = tl.load(hidden + row64 * hidden_stride + column, inside, 0.0)  # (BLOCK_M, BLOCK_K)
        if R > 0:
            is_down = (thin[:, None] < R) & (column < K)
            r = tl.load(down + thin[:, None] * K + column, is_down, 0.0)  # (RANK, BLOCK_K)
            through = tl.dot(x, tl.trans(r), through)
        x = x.to(tl.float32) * tl.load(smooth + column, column < K, 0.0).to(tl.float32)
        blocks = x.reshape(BLOCK_M, BLOCK_K // 16, 16)
        unit = tl.div_rn(tl.max(tl.abs(blocks), 2), 6.0)  # as PyTorch divides: ties decide
        scale = to_e4m3(tl.minimum(unit, 448.0))
        decode = scale.to(tl.float32)
        decode = tl.where(decode == 0.0, float("inf"), decode)  # a block of zeros
        codes = e2m1_codes(tl.div_rn(blocks, decode[:, :, None]))
        even, odd = tl.split(codes.reshape(BLOCK_M, BLOCK_K // 2, 2))
        packed = (even | (odd << 4)).to(tl.uint8)
        tl.store(data + row64 * (groups * 8) + start // 2 + pair, packed, in_rows)
        tl.store(scales + row64 * groups + start // 16 + block, scale, in_rows)
    if R > 0:
        through = through.to(branch.dtype.element_ty)
        tl.store(branch + row64 * R + thin, through, in_rows & (thin < R))


@jit
def rebuild_kernel(
    packed, scales, smooth, down, up, row_scale, out, tensor_scale, N, K, groups,
    R: tl.constexpr, RANK: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """out (N, 16 groups) e4m3 = (code * scale * tensor_scale * smooth + up down) / row_scale."""
    row = (tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N))[:, None]
    start, width = tl.program_id(1) * BLOCK_K, groups * 16
    byte = start // 2 + tl.arange(0, BLOCK_K // 2)
    group = start // 16 + tl.arange(0, BLOCK_K // 16)
    column = start + tl.arange(0, BLOCK_K)
    in_rows, in_columns = row < N, column < K
    inverse = 1.0 / tl.load(row_scale + row, in_rows, 1.0)
    codes = tl.load(packed + row * (groups * 8) + byte, in_rows & (byte < groups * 8), 0)
    scale = tl.load(scales + row * groups + group, in_rows & (group < groups), 0.0)
    values = unpacked(codes, scale, BLOCK_N, BLOCK_K).to(tl.float32)
    values *= tl.load(smooth + column, in_columns, 0.0).to(tl.float32)[None, :] * tensor_scale
    if R > 0:
        thin = tl.arange(0, RANK)
        left = tl.load(up + row * R + thin, in_rows & (thin < R), 0.0)
        is_down = (thin[:, None] < R) & in_columns
        right = tl.load(down + thin[:, None] * K + column, is_down, 0.0)
        values = tl.dot(left, right, values)
    # No larger than 448 but for the last bit, which is rounded away.
    place = out + row.to(tl.int64) * width + column
    tl.store(place, to_e4m3(values * inverse), in_rows & (column < width))


@jit
def product_kernel(
    inputs, input_scales, weight, weight_scales, tensor_scale, branch, up, bias, out, M, N, groups,
    INPUT_BITS: tl.constexpr, R: tl.constexpr, RANK: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """out (M, N) = Q(x) Q(E)^T * scales + branch up^T + bias.

    A tile is computed transposed, (BLOCK_N, BLOCK_M): weights that are unpacked on the way are then
    the operand that tensor cores take from registers, and a tile of few tokens is no waste.
    """
    # Neighbouring programs share weights and inputs in the cache: GROUP tiles of rows at a time.
    tiles_m, tiles_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    first = tl.program_id(0) // (GROUP * tiles_m) * GROUP
    group = tl.minimum(tiles_n - first, GROUP)
    rest = tl.program_id(0) % (GROUP * tiles_m)
    start_n, start_m = (first + rest % group) * BLOCK_N, rest // group * BLOCK_M
    n, m = start_n + tl.arange(0, BLOCK_N), start_m + tl.arange(0, BLOCK_M)
    HALF: tl.constexpr = BLOCK_K // 2
    block = tl.arange(0, BLOCK_K // 16)
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for start in range(0, groups * 16, BLOCK_K):
        w = weight.load([start_n, start // 2])  # (BLOCK_N, HALF) bytes
        place = weight_scales + n[:, None] * groups + start // 16 + block
        w_scale = tl.load(place, n[:, None] < N, 0.0)
        if INPUT_BITS == 4:
            x = inputs.load([start_m, start // 2])
            place = input_scales + m[:, None] * groups + start // 16 + block
            x_scale = tl.load(place, m[:, None] < M, 0.0)
            if EMULATED:  # the interpreter has no idea of E4M3 scales
                for shift in tl.static_range(0, 8, 4):
                    left = decoded((w >> shift) & 15, w_scale, BLOCK_N, HALF).to(tl.float32)
                    right = decoded((x >> shift) & 15, x_scale, BLOCK_M, HALF).to(tl.float32)
                    acc = tl.dot(left, tl.trans(right), acc)
            else:
                acc = tl.dot_scaled(w, w_scale, "e2m1", tl.trans(x), x_scale, "e2m1", acc)
        else:
            for half in tl.static_range(2):
                left = decoded((w >> (4 * half)) & 15, w_scale, BLOCK_N, HALF)
                x = inputs.load([start_m, half * groups * 8 + start // 2])  # (BLOCK_M, HALF)
                acc = tl.dot(left.to(x.dtype), tl.trans(x), acc)
    acc *= tensor_scale
    thin = tl.arange(0, RANK)
    if R > 0:
        left = tl.load(up + n[:, None] * R + thin, (n[:, None] < N) & (thin < R), 0.0)
        right = tl.load(branch + m[:, None] * R + thin, (m[:, None] < M) & (thin < R), 0.0)
        acc = tl.dot(left, tl.trans(right), acc)
    if bias is not None:
        acc += tl.load(bias + n, n < N, 0.0).to(tl.float32)[:, None]
    place = out + m[None, :].to(tl.int64) * N + n[:, None]
    tl.store(place, acc.to(out.dtype.element_ty), (n[:, None] < N) & (m[None, :] < M))


def real_linear(hidden: Tensor, layer: QuantLinear) -> Tensor:
    """eq. (2) or (3) by the kernels, (M, K) -> (M, N); up to rounding what `fake_linear` gives."""
    if layer.activations == 8:
        padding = -layer.in_features % BLOCK
        rows = kernels.quantize_rows(F.pad(hidden, (0, padding)) if padding else hidden)
        return fp8_product(rows, layer, hidden.dtype)
    if layer.activations == 4:
        return product(*quantized_inputs(hidden, layer), layer, hidden.dtype)
    padding = 2 * layer.packed.shape[1] - layer.in_features
    halves = F.pad(hidden, (0, padding)).unflatten(1, (-1, 2)).mT.flatten(1)  # even, then odd
    return product(halves, None, None, layer, hidden.dtype)


def fp8_product(rows: Rows, layer: QuantLinear, dtype: torch.dtype) -> Tensor:
    """eq. (3), (..., K) -> (..., N)."""
    extra, bias = -layer.out_features % BLOCK, layer.bias
    if extra and bias is not None:  # tensor cores take multiples of 16
        bias = F.pad(bias, (0, extra))
    out = kernels.matmul_rows(rows, rebuilt(layer), bias, dtype)
    return out[..., : layer.out_features] if extra else out


def rebuilt(layer: QuantLinear) -> Rows:
    """Q8 of eq. (3): `whole_weight` as (N, K) e4m3, both up to a multiple of 16. For one product:
    kept for all layers it would be the memory of 8 bits."""
    n, k, rank = layer.out_features, layer.in_features, layer.rank
    groups = layer.scales.shape[1]
    data = layer.packed.new_empty((n + -n % BLOCK, groups * BLOCK), dtype=torch.float8_e4m3fn)
    block_n, block_k, warps = REBUILD_TILE
    rebuild_kernel[(triton.cdiv(n, block_n), triton.cdiv(groups * BLOCK, block_k))](
        layer.packed, layer.scales, layer.smooth, layer.down if rank else None,
        layer.up if rank else None, layer.weight_scale, data, layer.tensor_scale, n, k, groups,
        R=rank, RANK=thin(rank), BLOCK_N=block_n, BLOCK_K=block_k, num_warps=warps,
    )  # fmt: skip
    return Rows(data, layer.weight_scale)


def quantized_inputs(hidden: Tensor, layer: QuantLinear) -> tuple[Tensor, Tensor, Tensor]:
    """(M, K) -> Q(x') in bytes, its scales, and x' R^T of eq. (2) as (M, r)."""
    (m, k), padded, rank = hidden.shape, 2 * layer.packed.shape[1], layer.rank
    data = hidden.new_empty((m, padded // 2), dtype=torch.uint8)
    scales = hidden.new_empty((m, padded // BLOCK), dtype=torch.float8_e4m3fn)
    branch = hidden.new_empty((m, rank))
    hidden = kernels.rows_of(hidden)
    block_m, block_k, warps, stages = INPUT_TILE
    quantize_kernel[(triton.cdiv(m, block_m),)](
        hidden, layer.smooth, layer.down if rank else None, data, scales, branch,
        m, k, hidden.stride(0), padded // BLOCK,
        R=rank, RANK=thin(rank), BLOCK_M=block_m, BLOCK_K=block_k,
        num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return data, scales, branch


def thin(rank: int) -> int:
    """The columns of a tile that holds `rank` of them."""
    return max(16, triton.next_power_of_2(rank))


INPUT_TILE = (32, 128, 8, 4)  # (BLOCK_M, BLOCK_K, warps, stages): every program reads all of R
REBUILD_TILE = (128, 64, 4)  # (BLOCK_N, BLOCK_K, warps)
WHOLE = 256  # channels: a multiple of every BLOCK_K, and scales begin at whole 16 bytes
# (BLOCK_M, BLOCK_N, BLOCK_K, warps, stages) by the bits of inputs.
TILES = {4: (128, 128, 128, 8, 4), 16: (16, 64, 256, 4, 3)}


def product(
    data: Tensor,
    scales: Tensor | None,
    branch: Tensor | None,
    layer: QuantLinear,
    dtype: torch.dtype,
) -> Tensor:
    """The rest of eq. (2), (M, N), from quantized inputs."""
    m, n, rank, bits = len(data), layer.out_features, layer.rank, layer.activations
    padded = 2 * layer.packed.shape[1]
    block_m, block_n, block_k, warps, stages = TILES[bits]
    block_m = min(block_m, max(16, triton.next_power_of_2(m)))
    out = data.new_empty((m, n), dtype=dtype)
    product_kernel[(triton.cdiv(m, block_m) * triton.cdiv(n, block_n),)](
        kernels.describe_tiles(data, [block_m, block_k // 2]), scales,
        kernels.describe_tiles(layer.packed, [block_n, block_k // 2]), layer.scales,
        layer.tensor_scale, branch, layer.up if rank else None, layer.bias, out,
        m, n, padded // BLOCK,
        INPUT_BITS=bits, R=rank, RANK=thin(rank),
        BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_K=block_k, GROUP=8,
        num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return out


NATIVE = {9: "w4a8", 10: "w4a4", 12: "w4a4"}  # by the first digit of the compute capability


def pick_mode(mode: str, device: torch.device) -> str:
    """fake | w4a4 | w4a8; "": the tensor cores of this GPU, or fake."""
    found, native = str(device), "fake"
    if device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        found = "{} (sm{}{})".format(torch.cuda.get_device_name(device), *capability)
        native = NATIVE.get(capability[0], "fake") if kernels.runs_on(device) else "fake"
    needed = {"fake": found, "w4a4": "FP4 tensor cores (sm100, sm120)", "w4a8": "Hopper (sm90)"}
    if mode and mode not in needed:
        raise UserError(f"--mode {mode!r}: wanted {', '.join(needed)}")
    if mode not in ("", "fake", native):
        raise UserError(
            f"--mode {mode} needs {needed[mode]}, found {found}: use --mode {native} here"
            + ", the same values up to rounding without the speed" * (native == "fake")
        )
    return mode or native


def use(model: nn.Module, mode: str = "") -> str:
    """Have the QuantLinears of a model compute in a mode; once real, they stay."""
    mode = pick_mode(mode, next(model.parameters()).device)
    for layer in (m for m in model.modules() if isinstance(m, QuantLinear)):
        if layer.activations < 16:
            layer.activations = 8 if mode == "w4a8" else 4
        if mode != "fake":
            make_real(layer)
    return mode


def make_real(layer: QuantLinear) -> None:
    """Ready for the kernels, which are told apart by the bits of the inputs."""
    layer.real = True
    if layer.activations == 8:
        scale = kernels.row_scales(whole_weight(layer))  # (N, 1)
        scale = F.pad(scale, (0, 0, 0, -layer.out_features % BLOCK), value=1.0)
        layer.register_buffer("weight_scale", scale, persistent=False)
        return
    # Whole tiles of K: zeros fill the last one (2240 -> 2304; FLUX's are whole).
    missing = -2 * layer.packed.shape[1] % WHOLE
    scales = layer.scales.view(torch.uint8)  # F.pad knows no e4m3
    layer.packed = F.pad(layer.packed, (0, missing // 2))
    layer.scales = F.pad(scales, (0, missing // BLOCK)).view(torch.float8_e4m3fn)


def put(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


# ---- open what quant.py wrote


def load(
    path: str | Path,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    mode: str = "",
) -> nn.Module:
    """The quantized model of a quant.safetensors: a Flux or a Sana with other linear layers."""
    checkpoint = weights.open_checkpoint(Path(path))
    if checkpoint.metadata.get("stage") != "quant":
        raise UserError(f"{path} is no file of quant.py: sample.load_pipeline reads others")
    return assemble(checkpoint, device, dtype, mode)


def assemble(
    checkpoint: weights.Checkpoint, device: torch.device, dtype: torch.dtype, mode: str = ""
) -> nn.Module:
    told, where = checkpoint.metadata, f"the header of {checkpoint.path}"
    if torch.device(device).type == "mps":
        raise UserError(f"{checkpoint.path} holds E4M3 numbers, which mps lacks: --device cpu")
    try:
        cls = {"Flux": Flux, "Sana": Sana}[told["class"]]
        model = weights.build(cls, checkpoint.config, checkpoint.path)
        for name, row in weights.parse_json(told["layers"], where).items():
            facts = (row["rank"], row["activations"], row["tensor_scale"])
            put(model, name, QuantLinear(model.get_submodule(name), *facts))
        if told["format"] == "fp8":
            kernels.to_fp8(model)
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{where} is not of this program ({error!r})") from None
    rows = {name: ((name,), None) for name in model.state_dict()}
    as_stored = [name for name in rows if name.endswith((".scales", ".weight_scale"))]
    for name, module in model.named_modules():
        if isinstance(module, kernels.FP8Linear):
            module.dtype = dtype
            as_stored.append(f"{name}.weight")
    weights.assign(model, rows, checkpoint, device=device, dtype=dtype, as_stored=as_stored)
    if torch.device(device).type != "meta" and told["format"] == "nvfp4":
        print(f"computed as {use(model, mode)}", file=sys.stderr)
    return model.eval()
