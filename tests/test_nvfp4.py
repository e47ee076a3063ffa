"""Why believe models/nvfp4.py: the format bit by bit, and kernels that do as their definition."""

import pytest
import torch
import torch.nn.functional as F
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
SHAPES = [(1, 32, 16, 0), (5, 48, 32, 4), (33, 192, 80, 32), (70, 16, 16, 3), (40, 288, 144, 24)]
# Of fp32 in the interpreter; on a GPU TF32 multiplies the branch, and FP8 sums are shorter.
TOLERANCE = 2e-6 if DEVICE.type == "cpu" else 4e-3


def random_layer(k: int, n: int, rank: int) -> QuantLinear:
    """A layer in fp32 whose branch matters as much as its residual."""
    generator = torch.Generator().manual_seed(k + n)
    linear = nn.Linear(k, n).requires_grad_(False)
    linear.weight.copy_(torch.randn(n, k, generator=generator) / k**0.5)
    linear.weight[0] = 0  # blocks of zeros
    inputs = torch.randn(64, k, generator=generator)
    config = Config(grid=2, rounds=0, scales="mse")
    layer, _ = quant.quantize_layer(linear, inputs, rank, config)
    for name, buffer in layer.named_buffers():
        if buffer.dtype == torch.bfloat16:
            setattr(layer, name, buffer.float())
    return layer.to(DEVICE)


def round_fp8(x: torch.Tensor) -> torch.Tensor:
    """(..., K) -> the same in E4M3, a scale a row: what Hopper multiplies."""
    scale = kernels.row_scales(x)
    return (x / scale).clamp(-448, 448).to(torch.float8_e4m3fn).float() * scale


@needs_triton
@pytest.mark.parametrize("m, k, n, rank", SHAPES)
@pytest.mark.parametrize("mode", ["w4a4", "w4a8"])
def test_kernels_agree_with_the_definition(m, k, n, rank, mode):
    """fp32 in the interpreter, so that only the order of sums and E4M3's last bit differ."""
    if DEVICE.type == "cuda" and mode == "w4a4" and torch.cuda.get_device_capability() < (10, 0):
        pytest.skip("needs FP4 tensor cores")
    layer = random_layer(k, n, rank)
    hidden = torch.randn(m, k, generator=torch.Generator().manual_seed(m)).to(DEVICE)
    hidden[0, : k // 2] = 0
    wanted = nvfp4.fake_linear(hidden, layer)
    if mode == "w4a8":
        wanted = F.linear(round_fp8(hidden), round_fp8(nvfp4.whole_weight(layer)), layer.bias)
    nvfp4.make_real(layer, mode)
    ours = layer(hidden)
    error = quant.relative(ours.float(), wanted.float())
    print(f"{mode} {m} x {k} x {n}, rank {rank}: {error:.1e}")
    assert ours.shape == (m, n) and error < TOLERANCE


@needs_triton
@pytest.mark.parametrize("k, n, rank", [(192, 80, 32), (48, 32, 0), (16, 16, 3), (2240, 48, 16)])
def test_weights_rebuilt_in_eight_bits_are_those_of_the_definition(k, n, rank):
    """Numbers next to a tie may fall to either side of it: sums have another order."""
    layer = random_layer(k, n, rank)
    wanted = round_fp8(nvfp4.whole_weight(layer))
    nvfp4.make_real(layer, "w4a8")
    ours = nvfp4.rebuild(layer).float() * layer.weight_scale
    assert (ours != wanted).float().mean() < 1e-3
    assert quant.relative(ours, wanted) < 1e-3


@needs_triton
def test_a_layer_takes_inputs_that_another_kernel_has_quantized():
    layer = random_layer(192, 80, 32)
    assert not layer.accepts_fp8
    nvfp4.make_real(layer, "w4a8")
    assert layer.accepts_fp8
    hidden = torch.randn(2, 33, 192, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    ours = layer(hidden)
    assert ours.isfinite().all() and torch.equal(layer(kernels.quantize_rows(hidden)), ours)


@needs_triton
@pytest.mark.parametrize("k", [32, 288])  # 288: more than one program a row, the last in part
def test_the_kernels_codes_are_those_of_the_definition(k):
    values = torch.cat([torch.linspace(-8, 8, 1024), torch.tensor([0.25, 0.75, 2.5, -3.5, 5, -5])])
    hidden = F.pad(values, (0, -len(values) % k)).view(-1, k).to(DEVICE)
    layer = random_layer(k, 16, 0)
    layer.smooth = torch.ones(k, device=DEVICE)
    nvfp4.make_real(layer, "w4a4")
    data, scales = nvfp4.quantize_inputs(hidden, layer)
    assert torch.equal(nvfp4.unpack(data, scales)[:, :k], nvfp4.round_activations(hidden))


# Compiled for GPUs that are not here. What they do is then only known as far as above.


RANKS = [0, 16, 32, 64, 128, nvfp4.MOST_RANK]


@pytest.fixture
def compiled(monkeypatch):
    """(mode, capabilities) -> what a FLUX layer launches there, of every rank, compiled."""
    import aot

    def compile_layer(mode: str, capabilities: tuple[int, ...]) -> list[dict]:
        jobs = []
        for name in ("quantize_kernel", "product_kernel", "rebuild_kernel"):
            recorder = aot.Recorder("models.nvfp4", name, getattr(nvfp4, name), jobs)
            monkeypatch.setattr(nvfp4, name, recorder)
        with torch.device("meta"):
            linear, hidden = nn.Linear(3072, 3072).bfloat16(), torch.ones(4608, 3072).bfloat16()
            for rank in RANKS:
                layer = QuantLinear(linear, rank, 4, 1.0).bfloat16()
                layer.scales = layer.scales.to(torch.float8_e4m3fn)
                layer.weight_scale = torch.empty(3072, 1)
                nvfp4.rebuild(layer) if mode == "w4a8" else nvfp4.w4a4_linear(hidden, layer)
        rows = aot.compile_all(jobs, capabilities)
        for row in rows:
            print("sm{sm} {kernel}: {registers} registers, {spilled} bytes spilled".format(**row))
            assert row["registers"] <= 255 and row["spilled"] <= 16
        return rows

    return compile_layer


needs_compiler = pytest.mark.skipif(kernels.triton is None, reason="needs Triton")


@needs_compiler
def test_blackwell_multiplies_four_bits_by_four_bits(compiled):
    rows = [row for row in compiled("w4a4", (100, 120)) if row["kernel"] == "product_kernel"]
    assert len(rows) == 2 * len(RANKS)
    for row in rows:
        assert any("kind::mxf4nvf4.block_scale" in name for name in row["mma"]), row


@needs_compiler
def test_fp8_tensor_cores_get_weights_that_are_rebuilt_in_registers(compiled):
    rows = compiled("w4a8", (89, 90, 100, 120))
    assert len(rows) == 4 * len(RANKS)
    # The branch is a product of tensor cores too.
    assert sum(bool(row["mma"]) for row in rows) == 4 * len(RANKS[1:])


ALL = ["w4a4", "w4a8", "fake"]


@pytest.mark.parametrize(
    "capability, modes", [((8, 6), ALL[2:]), ((9, 0), ALL[1:]), ((10, 0), ALL), ((12, 0), ALL)]
)
def test_a_gpu_computes_in_the_best_mode_of_its_tensor_cores(capability, modes, monkeypatch):
    monkeypatch.setattr(kernels, "runs_on", lambda device: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    gpu = torch.device("cuda")
    assert nvfp4.pick_mode("", gpu) == modes[0]
    assert [nvfp4.pick_mode(mode, gpu) for mode in modes] == modes
    for mode in {*ALL, "int4"} - set(modes):
        with pytest.raises(UserError, match=f"--mode {mode} does not run here: wanted"):
            nvfp4.pick_mode(mode, gpu)


def test_sm_121_is_told_which_triton_it_needs(monkeypatch):
    monkeypatch.setattr(kernels, "runs_on", lambda device: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (12, 1))
    gpu = torch.device("cuda")
    for version, best in (("3.8.0", "w4a4"), ("3.7.0", "w4a8"), ("3.10.0", "w4a4")):
        monkeypatch.setattr(nvfp4.triton, "__version__", version)
        assert nvfp4.pick_mode("", gpu) == best
    monkeypatch.setattr(nvfp4.triton, "__version__", "3.6.0")
    with pytest.raises(UserError, match="wanted w4a8 or fake, or Triton 3.8 for w4a4 on sm_121"):
        nvfp4.pick_mode("w4a4", gpu)


def test_only_what_fits_goes_to_tensor_cores(monkeypatch):
    layers = [random_layer(40, 24, 3), random_layer(48, 32, 3), random_layer(48, 32, 3)]
    layers[2].rank = nvfp4.MOST_RANK + 1
    model = nn.Sequential(*layers, nn.Linear(1, 1).to(DEVICE))
    assert nvfp4.use(model, "fake") == "fake" and {layer.mode for layer in layers} == {"fake"}
    monkeypatch.setattr(nvfp4, "pick_mode", lambda mode, device: mode)
    nvfp4.use(model, "w4a8")
    assert [layer.mode for layer in layers] == ["fake", "w4a8", "fake"]
