"""Fused kernels and blocks compute what the plain ones do. On a CPU in Triton's interpreter."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import dcae
from models import flux, kernels, sana

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
runs = kernels.runs_on(torch.device(DEVICE))
needs_triton = pytest.mark.skipif(not runs, reason="needs Triton and a GPU, or its interpreter")


@pytest.fixture(autouse=True)
def exact_products(monkeypatch):
    """On a GPU: fp32 means fp32, also in convolutions, where TF32 is the default."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator("cpu").manual_seed(seed)
    return torch.randn(shape, generator=generator).to(DEVICE, dtype)


def relative(ours: torch.Tensor, truth: torch.Tensor) -> float:
    return ((ours.double() - truth.double()).norm() / truth.double().norm()).item()


# ---- FP8


def test_rows_of_fp8_are_the_matrix_up_to_half_a_step():
    matrix = normal(3, 5, 48) * torch.logspace(-3, 3, 15, device=DEVICE).view(3, 5, 1)
    data, scale = kernels.quantize_rows(matrix)
    assert data.shape == matrix.shape and scale.shape == (3, 5, 1)
    error = (data.float() * scale - matrix).abs() / matrix.abs().amax(-1, keepdim=True)
    assert error.max() <= 16.001 / 448  # the step of e4m3 between 256 and 448 is 32
    assert data.float().abs().amax(-1).eq(448).all()  # every row uses the whole range


@needs_triton
@pytest.mark.parametrize("shape", [(1, 16), (7, 48), (2, 3, 272)])
@pytest.mark.parametrize("margin", [0, 16])
def test_the_kernel_quantizes_as_its_twin(monkeypatch, shape, margin):
    matrix = normal(*shape[:-1], shape[-1] + 2 * margin)  # a slice of columns is read in place
    matrix = matrix[..., margin : margin + shape[-1]]
    matrix[..., 0, :] = 0  # a row of zeros has a scale too
    data, scale = kernels.quantize_rows(matrix)
    monkeypatch.setattr(kernels, "runs_on", lambda device: False)
    expected, expected_scale = kernels.quantize_rows(matrix)
    assert torch.allclose(scale, expected_scale, rtol=1e-6)
    # A quotient that differs in its last bit may fall on the other side of a tie.
    steps = (data.view(torch.uint8).int() - expected.view(torch.uint8).int()).abs()
    assert steps.max() <= 1 and (steps > 0).float().mean() < 0.005
    assert data[..., 0, :].float().abs().max() == 0


@pytest.mark.parametrize("bias", [True, False])
def test_a_linear_layer_in_fp8_is_near_the_exact_one(bias):
    linear = nn.Linear(256, 64, bias=bias).to(DEVICE, torch.bfloat16).requires_grad_(False)
    linear.weight.copy_(0.02 * normal(64, 256, seed=1))
    hidden = normal(2, 33, 256, dtype=torch.bfloat16)
    hidden[:, 5] *= 1000  # an outlier row keeps its own scale
    out = kernels.FP8Linear(linear)(hidden)
    assert out.shape == (2, 33, 64) and out.dtype == torch.bfloat16
    exact = F.linear(hidden.float(), linear.weight.float(), linear.bias.float() if bias else None)
    for row in (5, 6):
        # e4m3 rounds a normal variable by 2.6 % (rms); two operands, hence times sqrt(2)
        assert 0.02 < relative(out[:, row], exact[:, row]) < 0.06
    rows = kernels.quantize_rows(hidden)
    assert torch.equal(kernels.FP8Linear(linear)(rows), out)  # quantized outside: the same


def test_fp8_refuses_widths_that_tensor_cores_do_not_take():
    with pytest.raises(AssertionError, match="multiples of 16"):
        kernels.FP8Linear(nn.Linear(24, 16))


# ---- FLUX: every kernel against the plain arithmetic of the model

D, HEAD_DIM = 48, 16
AXES = [4, 6, 6]


def random_parameters(module: nn.Module) -> nn.Module:
    for i, parameter in enumerate(module.to(DEVICE).parameters()):
        parameter.data = parameter.data + 0.3 * normal(*parameter.shape, seed=i)
    return module.requires_grad_(False).to(memory_format=torch.channels_last).eval()


def rope(length: int) -> torch.Tensor:
    return flux.RopeEmbedder(AXES, 1)(0, (1, length), torch.device(DEVICE))


def plain_heads(streams: list, table: torch.Tensor) -> tuple[torch.Tensor, ...]:
    q, k, v = (torch.cat(parts, 1) for parts in zip(*(norm(qkv) for qkv, norm in streams)))
    return flux.rotate(q, table), flux.rotate(k, table), v


def same(ours, plain_one) -> None:
    """Equal in fp32; in FP8 up to the rounding of e4m3."""
    if isinstance(ours, kernels.RowScaledFP8):
        assert relative(ours.data.float() * ours.scale, plain_one) < 0.04
    else:
        assert ours.shape == plain_one.shape and relative(ours, plain_one) < 2e-6


@needs_triton
@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize("batch, conditions", [(1, 1), (2, 2), (2, 1)])
def test_modulation_is_the_models(batch, conditions, fp8):
    hidden = 3 + 5 * normal(batch, 11, D)
    shift, scale, _ = normal(conditions, 3 * D, seed=1)[:, None].chunk(3, dim=-1)  # as in the model
    for part in (hidden, hidden[:, 4:]):  # a slice of tokens is read where it lies
        expected = flux.modulate(part, shift, scale).expand(batch, -1, -1)
        same(kernels.modulate(part, shift, scale, fp8=fp8), expected)


@needs_triton
def test_gated_sum_is_the_models():
    hidden, branch, gate = normal(2, 11, D), normal(2, 11, D, seed=1), normal(2, 1, D, seed=2)
    for x, y in ((hidden, branch), (hidden[:, :4], branch[:, 4:8]), (hidden.mT.clone().mT, branch)):
        same(kernels.add_gated(x, gate, y), x + gate * y)


@needs_triton
@pytest.mark.parametrize("lengths", [(5,), (3, 9)])
def test_heads_are_the_models(lengths):
    norms = [random_parameters(flux.QKNorm(HEAD_DIM)) for _ in lengths]
    # Next to the MLP's, as linear1 gives them.
    parts = [normal(2, n, 7 * D, seed=n)[..., : 3 * D] for n in lengths]
    streams, table = list(zip(parts, norms)), rope(sum(lengths))
    ours = kernels.split_heads(streams, table)
    for fused, plain_one in zip(ours, plain_heads(streams, table)):
        same(fused, plain_one)
    stays = ours[2].data_ptr() == parts[0][..., 2 * D :].data_ptr()
    assert stays == (len(lengths) == 1)  # the values of a single stream are not copied


@needs_triton
@pytest.mark.parametrize("fp8", [False, True])
def test_joined_gelu_is_the_models(fp8):
    attended, mlp = normal(2, 5, D, seed=1), 4 * normal(2, 5, 7 * D)[..., 3 * D :]
    expected = F.gelu(mlp, approximate="tanh")
    same(kernels.join_gelu(attended, mlp, fp8), torch.cat((attended, expected), -1))
    same(kernels.join_gelu(None, mlp, fp8), expected)


@needs_triton
def test_gelu_holds_far_from_zero():
    x = torch.tensor([[-1e4, -90.0, -10.0, 0.0, 10.0, 90.0, 1e4]], device=DEVICE)
    expected = F.gelu(x, approximate="tanh")
    assert torch.allclose(kernels.join_gelu(None, x), expected, rtol=1e-6, atol=1e-30)


# ---- DC-AE and SANA: every kernel against the plain arithmetic of the model


def picture(*shape: int, seed: int = 0) -> torch.Tensor:
    return normal(*shape, seed=seed).contiguous(memory_format=torch.channels_last)


@needs_triton
@pytest.mark.parametrize("act", [F.silu, F.relu])
def test_convolution_and_activation_are_the_models(act):
    conv, hidden = random_parameters(nn.Conv2d(5, 12, 3, padding=1)), picture(2, 5, 6, 7)
    same(kernels.conv_act(conv, act, hidden), act(conv(hidden)))


@needs_triton
@pytest.mark.parametrize("width", [3, 16, 40])
def test_norms_are_the_models(width):
    norm = random_parameters(dcae.RMSNorm(width))
    hidden, branch = picture(2, width, 5, 7), 3 * picture(2, width, 5, 7, seed=1)
    same(kernels.norm_rows(norm, branch), norm(branch))
    for part in (branch, branch.contiguous()):  # not channels_last: copied, not misread
        same(kernels.norm_rows(norm, part, add=hidden), hidden + norm(part))


# ---- blocks and models


def fused_and_plain(model: nn.Module, *inputs) -> tuple[torch.Tensor, torch.Tensor]:
    expected = model(*inputs)
    kernels.fuse(model)
    fused = model(*inputs)
    for module in model.modules():
        vars(module).pop("forward", None)  # unfused: the network's own forward is untouched
    assert torch.equal(model(*inputs), expected)
    return fused, expected


@needs_triton
@pytest.mark.parametrize(
    "block",
    [
        dcae.ResBlock(12, "rms_norm", "silu"),
        dcae.ResBlock(12, "batch_norm", "relu"),
        dcae.GLUMBConv(12),
        dcae.PerHead(12, 12, 1, groups=3, bias=False),
        dcae.Upsample(12, 6, "pixel_shuffle"),
        dcae.Upsample(12, 3, "pixel_shuffle", shortcut=False),
    ],
    ids=["silu", "relu", "gated", "per head", "upsample", "without shortcut"],
)
def test_a_fused_block_of_an_autoencoder_is_the_plain_one(block):
    ours, expected = fused_and_plain(random_parameters(block), picture(2, 12, 5, 7))
    assert relative(ours, expected) < 5e-6
    assert ours.is_contiguous(memory_format=torch.channels_last)


def small_flux(depth: int = 2) -> flux.Flux:
    torch.manual_seed(0)
    model = flux.Flux(
        in_channels=8, num_layers=depth, num_single_layers=depth, num_attention_heads=3,
        attention_head_dim=16, joint_attention_dim=12, pooled_projection_dim=10,
        axes_dims_rope=AXES,
    )  # fmt: skip
    return model.to(DEVICE).requires_grad_(False).eval()


def flux_inputs(batch: int = 2) -> tuple[torch.Tensor, ...]:
    t = torch.linspace(0.2, 0.9, batch, device=DEVICE)
    shapes = (batch, 8, 3, 5), (batch, 7, 12), (batch, 10)
    latents, text, pooled = (normal(*shape, seed=i) for i, shape in enumerate(shapes))
    return latents, t, text, pooled, torch.full_like(t, 3.5)


def small_sana() -> sana.Sana:
    torch.manual_seed(0)
    model = sana.Sana(
        in_channels=8, out_channels=8, num_layers=2, num_attention_heads=2, attention_head_dim=16,
        num_cross_attention_heads=2, cross_attention_head_dim=16, cross_attention_dim=32,
        caption_channels=24, sample_size=4,
    )  # fmt: skip
    return model.to(DEVICE).requires_grad_(False).eval()


def sana_inputs() -> tuple[torch.Tensor, ...]:
    mask = torch.arange(7, device=DEVICE)[None] < 5
    return normal(1, 8, 3, 5), torch.full((1,), 0.7, device=DEVICE), normal(1, 7, 24), mask


@needs_triton
def test_a_fused_transformer_is_the_plain_one():
    for model, inputs in ((small_flux(), flux_inputs()), (small_sana(), sana_inputs())):
        ours, expected = fused_and_plain(model, *inputs)
        assert 0 < relative(ours, expected) < 1e-5


@needs_triton
def test_a_flux_in_fp8_is_near_and_keeps_what_is_sensitive():
    model, inputs = small_flux(depth=1), flux_inputs(batch=1)
    exact = model(*inputs)
    kernels.to_fp8(model)
    linears = [name for name, m in model.named_modules() if isinstance(m, nn.Linear)]
    assert all("mod" in n or "in" in n.split(".")[0] or "final" in n for n in linears), linears
    # Plain: the layers quantize. Fused: the kernels before them do.
    fused, plain_one = fused_and_plain(model, *inputs)
    assert 1e-3 < relative(fused, exact) < 0.1
    assert relative(fused, plain_one) < 0.05


@needs_triton
def test_a_block_of_mixed_layers_gives_fp8_to_those_that_accept_it():
    model, inputs = small_flux(depth=1), flux_inputs(batch=1)
    exact, block = model(*inputs), model.double_blocks[0]
    block.img_mlp[2] = kernels.FP8Linear(block.img_mlp[2])
    block.txt_attn.qkv = kernels.FP8Linear(block.txt_attn.qkv)
    model.single_blocks[0].linear2 = kernels.FP8Linear(model.single_blocks[0].linear2)
    fused, plain_one = fused_and_plain(model, *inputs)
    assert 1e-4 < relative(fused, exact) < 0.1 and relative(fused, plain_one) < 0.05


@needs_triton
def test_a_sana_in_fp8_quantizes_in_its_layers():
    model, inputs = small_sana(), sana_inputs()
    exact = model(*inputs)
    kernels.to_fp8(model)
    assert isinstance(model.blocks[1].attn.qkv, kernels.FP8Linear)
    assert 1e-4 < relative(fused_and_plain(model, *inputs)[0], exact) < 0.1


@needs_triton
@pytest.mark.parametrize("kind", ["pixel_shuffle", "interpolate"])
def test_a_fused_decoder_is_the_plain_one(kind):
    torch.manual_seed(0)
    blocks = ["ResBlock", "ResBlock", "EfficientViTBlock"]
    model = dcae.DCAE(
        latent_channels=4, attention_head_dim=4, upsample_block_type=kind,
        **dcae.both(block_types=blocks, block_out_channels=[4, 8, 8]),
        **dcae.both(layers_per_block=[0, 1, 1], qkv_multiscales=[[], [], [5]]),
    )  # fmt: skip
    model = random_parameters(model)
    ours, expected = fused_and_plain(model.decoder, picture(1, 4, 3, 2))
    assert 0 < relative(ours, expected) < 5e-6


# ---- for GPUs that are not here


@pytest.fixture
def launches(monkeypatch) -> list:
    """The launches of kernels from here on, on tensors that need not exist."""
    import aot

    jobs = []
    for name, kernel in vars(kernels).copy().items():
        if name.endswith("_kernel"):
            monkeypatch.setattr(kernels, name, aot.Recorder("models.kernels", name, kernel, jobs))
    monkeypatch.setattr(kernels, "runs_on", lambda device: True)
    return jobs


def flux_launches(dtype: torch.dtype, fp8: bool) -> None:
    model = flux.Flux(in_channels=128, num_layers=1, num_single_layers=1).to(dtype)
    if fp8:
        kernels.to_fp8(model)
    kernels.fuse(model)
    t = torch.ones(1)
    model(torch.ones(1, 128, 4, 4), t, torch.ones(1, 512, 4096), torch.ones(1, 768), t)


def sana_launches(dtype: torch.dtype, qk_norm: str | None, fp8: bool) -> None:
    config = sana.PRESETS["sana-1.6b"]["config"] | {"num_layers": 1, "qk_norm": qk_norm}
    model = sana.Sana(**config).to(dtype)
    if fp8:
        kernels.to_fp8(model)
    kernels.fuse(model)
    mask = torch.ones(1, 300, dtype=torch.bool)
    model(torch.ones(1, 32, 8, 8), torch.ones(1), torch.ones(1, 300, 2304), mask)


def decoder_launches(dtype: torch.dtype, preset: str) -> None:
    model = dcae.DCAE(**dcae.PRESETS[preset]["config"]).to(dtype)
    kernels.fuse(model)
    model.decode(torch.ones(1, model.latent_channels, 4, 4))


@pytest.mark.skipif(kernels.triton is None, reason="needs Triton")
def test_what_the_real_models_launch_compiles_for_hopper_and_blackwell(launches, capsys):
    """At full width, with the types that the models themselves hand to the kernels."""
    import aot

    with torch.device("meta"), torch.no_grad():
        for fp8 in (False, True):
            flux_launches(torch.bfloat16, fp8)
            sana_launches(torch.bfloat16, None, fp8)
        sana_launches(torch.float16, sana.QK_NORM, False)
        decoder_launches(torch.bfloat16, "dc-ae-f64c128-1.5")
        decoder_launches(torch.bfloat16, "dc-ae-f32c32-sana-1.1")
        names = {job[1] for job in launches}
        assert names == {n for n in vars(kernels) if n.endswith("_kernel")}
        fast = len(launches)
        sana_launches(torch.float32, sana.QK_NORM, False)
        decoder_launches(torch.float32, "dc-ae-f32c32-in-1.0")
    # fp32 is not for speed; Triton 3.6 gives a product there a stack frame of 8 bytes.
    for jobs, limit, frame in ((launches[:fast], 128, 0), (launches[fast:], 255, 8)):
        one_each = {}  # of each kernel, its types and flags: the last, for the widest pixels
        for job in jobs:
            flags = [v for k, v in job[3].items() if k in ("FP8", "ADD", "SILU", "COPY_V")]
            one_each[str((job[1], sorted(job[2].items()), flags))] = job
        for row in aot.compile_all(list(one_each.values())):
            with capsys.disabled():
                print(f"\n  {row['kernel']} sm_{row['sm']}: {row['registers']} registers", end="")
            assert row["spilled"] <= frame and row["registers"] <= limit
