"""Why believe models/nvfp4.py: the format bit by bit, and kernels that do as their definition."""

import pytest
import torch
import torch.nn.functional as F
from test_quant import tiny_flux
from torch import nn

import quant
from models import kernels, nvfp4
from models.nvfp4 import QuantLinear
from models.script import UserError
from quant import Config

# ---- format


def test_e2m1_rounds_to_nearest_and_ties_to_even():
    ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
    assert nvfp4.round_e2m1(ties).tolist() == [0, 1, 1, 2, 2, 4, 4]
    assert nvfp4.round_e2m1(-ties).tolist() == [0, -1, -1, -2, -2, -4, -4]
    x = torch.linspace(-8, 8, 4001)
    grid = torch.tensor([*nvfp4.E2M1, *(-v for v in nvfp4.E2M1)])
    nearest = (x[:, None] - grid).abs().min(1).values
    assert torch.allclose((nvfp4.round_e2m1(x) - x).abs(), nearest)


def test_packing_is_low_nibble_first_and_comes_back():
    values = torch.tensor([[0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6]])
    packed = nvfp4.pack(values)
    assert packed.tolist() == [[0x10, 0x32, 0x54, 0x76, 0x98, 0xBA, 0xDC, 0xFE]]
    scales = torch.full((1, 1), 0.5).to(torch.float8_e4m3fn)
    assert torch.equal(nvfp4.unpack(packed, scales), 0.5 * values)
    assert packed.view(torch.float4_e2m1fn_x2).shape == packed.shape


def test_a_block_on_the_grid_is_exact():
    x = torch.tensor(nvfp4.E2M1).repeat(3, 4) * torch.tensor([[1.0], [-2.0], [0.25]])  # (3, 32)
    assert torch.equal(nvfp4.round_activations(x), x)


@pytest.mark.parametrize("shape", [(1, 16), (5, 3, 40), (2, 17), (1, 1)])
def test_any_shape_is_rounded_and_keeps_its_shape(shape):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    rounded = nvfp4.round_activations(x)
    assert rounded.shape == x.shape
    # Half a step at the top of E2M1 is 1/6 of the largest, and E4M3 rounds the scale by 1/16.
    assert (rounded - x).abs().max() <= x.abs().max() / 6 * (1 + 1 / 16)


def test_zeros_and_numbers_beyond_the_range_stay_finite():
    assert torch.equal(nvfp4.round_activations(torch.zeros(2, 32)), torch.zeros(2, 32))
    assert nvfp4.round_activations(torch.tensor([[1e30] + [0.0] * 15])).tolist()[0][0] == 2688
    assert nvfp4.round_activations(torch.full((1, 16), 1e-4)).abs().max() == 0  # as documented


# ---- kernels

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
needs_triton = pytest.mark.skipif(
    not kernels.runs_on(DEVICE), reason="needs Triton and a GPU, or its interpreter"
)
SHAPES = [(1, 32, 16, 0), (5, 40, 24, 4), (33, 192, 80, 32), (70, 17, 10, 3), (40, 288, 136, 24)]


def random_layer(
    k: int, n: int, rank: int, bits: int, dtype: torch.dtype = torch.float32
) -> QuantLinear:
    """A layer whose branch matters as much as its residual."""
    generator = torch.Generator().manual_seed(k + n)
    linear = nn.Linear(k, n).requires_grad_(False)
    linear.weight.copy_(torch.randn(n, k, generator=generator) / k**0.5)
    linear.weight[0] = 0  # blocks of zeros
    holder = nn.Module()
    holder.it = linear
    inputs = torch.randn(64, k, generator=generator)
    config = Config(rank=rank, grid=2, rounds=0, scales="mse")
    tensors, notes = quant.quantize_layer("it", holder, bits, 1, inputs, config)
    layer = QuantLinear(linear, notes["rank"], bits, notes["tensor_scale"])
    layer.load_state_dict(tensors | {"bias": linear.bias})
    return as_dtype(layer, dtype).to(DEVICE)


def real(hidden: torch.Tensor, layer: QuantLinear) -> torch.Tensor:
    nvfp4.make_real(layer)
    return nvfp4.real_linear(hidden, layer)


def as_dtype(layer: QuantLinear, dtype: torch.dtype) -> QuantLinear:
    """As `nvfp4.load` does: all but the packed numbers."""
    for name, buffer in layer.named_buffers():
        if name not in ("packed", "scales"):
            setattr(layer, name, buffer.to(dtype))
    layer.bias.data = layer.bias.data.to(dtype)
    return layer


@needs_triton
@pytest.mark.parametrize("m, k, n, rank", SHAPES)
@pytest.mark.parametrize("bits", [4, 8, 16])
def test_real_layers_agree_with_fake_ones(m, k, n, rank, bits):
    """fp32 in the interpreter, so that only the order of sums and E4M3's last bit differ."""
    if DEVICE.type == "cuda" and bits == 4 and torch.cuda.get_device_capability() < (10, 0):
        pytest.skip("needs FP4 tensor cores")
    layer = random_layer(k, n, rank, bits)
    generator = torch.Generator().manual_seed(m)
    hidden = torch.randn(m, k, generator=generator).to(DEVICE)
    hidden[0, : k // 2] = 0
    wanted, ours = nvfp4.fake_linear(hidden, layer), real(hidden, layer)
    error = quant.relative(ours.float(), wanted.float())
    print(f"W4A{bits} {m} x {k} x {n}, rank {rank}: {error:.1e}")
    assert ours.shape == (m, n) and error < TOLERANCE


# Of fp32 in the interpreter; on a GPU TF32 multiplies the branch, and FP8 sums are shorter.
TOLERANCE = 2e-6 if DEVICE.type == "cpu" else 4e-3


@needs_triton
def test_a_layer_made_in_place_is_real_too():
    linear = nn.Linear(64, 48).requires_grad_(False).to(DEVICE)
    split = quant.split(linear.weight.float(), torch.ones(64, device=DEVICE), 8, "amax")
    layer = quant.as_linear(linear, split, 8)
    hidden = torch.randn(20, 64, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    assert quant.relative(real(hidden, layer), nvfp4.fake_linear(hidden, layer)) < TOLERANCE


@needs_triton
@pytest.mark.parametrize("k, n, rank", [(192, 80, 32), (40, 24, 0), (17, 10, 3), (2240, 48, 16)])
def test_weights_rebuilt_in_eight_bits_are_those_of_the_definition(k, n, rank):
    """Numbers next to a tie may fall to either side of it: sums have another order."""
    layer = random_layer(k, n, rank, 8)
    wanted = nvfp4.round_fp8(nvfp4.whole_weight(layer))
    nvfp4.make_real(layer)
    data, scale = nvfp4.rebuilt(layer)
    assert data.shape[0] % 16 == data.shape[1] % 16 == 0 and len(scale) == len(data)
    ours = (data.float() * scale)[:n, :k]
    assert (ours != wanted).float().mean() < 1e-3
    assert quant.relative(ours, wanted) < 1e-3
    assert not data[:n, k:].float().any()


@needs_triton
def test_a_layer_takes_inputs_that_another_kernel_has_quantized():
    layer = random_layer(192, 80, 32, 8)
    assert not layer.reads_rows
    nvfp4.make_real(layer)
    assert layer.reads_rows
    hidden = torch.randn(2, 33, 192, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    ours = layer(hidden)
    assert ours.isfinite().all() and torch.equal(layer(kernels.quantize_rows(hidden)), ours)


@needs_triton
def test_the_kernels_codes_are_those_of_the_definition():
    values = torch.cat([torch.linspace(-8, 8, 1024), torch.tensor([0.25, 0.75, 2.5, -3.5, 5, -5])])
    hidden = F.pad(values, (0, -len(values) % 32)).view(-1, 32).to(DEVICE)
    layer = random_layer(32, 16, 0, 4)
    layer.smooth = torch.ones(32, device=DEVICE)
    nvfp4.make_real(layer)
    data, scales, _ = nvfp4.quantized_inputs(hidden, layer)
    decoded = nvfp4.unpack(data, scales)[:, :32]
    assert torch.equal(decoded, nvfp4.round_activations(hidden))


# Compiled for GPUs that are not here. What they do is then only known as far as above.


def product_job(rank: int) -> list:
    block_m, block_n, block_k, warps, stages = nvfp4.TILES[4]
    signature = {
        "inputs": f"tensordesc<u8[{block_m}, {block_k // 2}]>", "input_scales": "*fp8e4nv",
        "weight": f"tensordesc<u8[{block_n}, {block_k // 2}]>",
        "weight_scales": "*fp8e4nv", "tensor_scale": "fp32", "branch": "*bf16", "up": "*bf16",
        "bias": "*bf16", "out": "*bf16", "M": "i32", "N": "i32", "groups": "i32",
    }  # fmt: skip
    constants = dict(
        INPUT_BITS=4, R=rank, RANK=rank,
        BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_K=block_k, GROUP=8,
    )  # fmt: skip
    options = dict(num_warps=warps, num_stages=stages)
    return ["models.nvfp4", "product_kernel", signature, constants, options]


def quantize_job() -> list:
    signature = dict.fromkeys(("hidden", "smooth", "down", "branch"), "*bf16")
    signature |= {"data": "*u8", "scales": "*fp8e4nv"}
    signature |= dict.fromkeys(("M", "K", "hidden_stride", "groups"), "i32")
    block_m, block_k, warps, stages = nvfp4.INPUT_TILE
    constants = dict(R=64, RANK=64, BLOCK_M=block_m, BLOCK_K=block_k)
    options = dict(num_warps=warps, num_stages=stages)
    return ["models.nvfp4", "quantize_kernel", signature, constants, options]


def rebuild_job(rank: int) -> list:
    signature = {"packed": "*u8", "scales": "*fp8e4nv", "row_scale": "*fp32", "out": "*fp8e4nv"}
    signature |= dict.fromkeys(("smooth", "down", "up"), "*bf16") | {"tensor_scale": "fp32"}
    signature |= dict.fromkeys(("N", "K", "groups"), "i32")
    block_n, block_k, warps = nvfp4.REBUILD_TILE
    constants = dict(R=rank, RANK=max(rank, 16), BLOCK_N=block_n, BLOCK_K=block_k)
    return ["models.nvfp4", "rebuild_kernel", signature, constants, dict(num_warps=warps)]


def compiled(jobs: list[list], *capabilities: int) -> list[dict]:
    import aot  # which switches the interpreter off: after all kernels are defined

    rows = aot.compile_all(jobs, capabilities)
    for row in rows:
        print("sm{sm} {kernel}: {registers} registers, {spilled} bytes spilled".format(**row))
        assert row["registers"] <= 255 and row["spilled"] <= 16
    return rows


needs_compiler = pytest.mark.skipif(kernels.triton is None, reason="needs Triton")


@needs_compiler
def test_blackwell_multiplies_four_bits_by_four_bits():
    for row in compiled([product_job(32), product_job(64)], 100, 120):
        assert any("kind::mxf4nvf4.block_scale" in name for name in row["mma"]), row
    compiled([quantize_job()], 100, 120)


@needs_compiler
def test_hopper_rebuilds_weights_in_registers():
    for row in compiled([rebuild_job(32), rebuild_job(64)], 90):
        assert row["mma"], row  # the branch is a product of tensor cores too
    assert nvfp4.NATIVE[9] == "w4a8"  # 4-bit products do not even compile there on Triton 3.6


def test_a_mode_that_the_device_lacks_is_refused_with_what_to_use():
    model = tiny_flux()
    nvfp4.use(model, "fake")
    if DEVICE.type == "cpu":
        assert nvfp4.use(model) == "fake"
        for mode in ("w4a4", "w4a8"):
            with pytest.raises(UserError, match=f"{mode} needs .* found cpu: use --mode fake"):
                nvfp4.use(model, mode)
    with pytest.raises(UserError, match="wanted fake, w4a4, w4a8"):
        nvfp4.use(model, "int4")
