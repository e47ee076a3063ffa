"""What makes a step fast must not change it: hoisting, fused kernels, FP8, CUDA graphs."""

import pytest
import torch
from torch import nn

import sample
from models import kernels
from models.flux import Flux
from models.sana import Sana

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
needs_cuda = pytest.mark.skipif(DEVICE.type != "cuda", reason="needs a GPU")
STEPS = 3


@pytest.fixture(autouse=True)
def exact_products(monkeypatch):
    """On a GPU: fp32 means fp32, also in convolutions, where TF32 is the default."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator("cpu").manual_seed(seed)).to(DEVICE)


def ready(model: nn.Module) -> nn.Module:
    generator = torch.Generator("cpu").manual_seed(1)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.data = (parameter.data + 0.1 * noise).to(DEVICE)
    return model.to(DEVICE).requires_grad_(False).eval()


def make_flux() -> tuple:
    torch.manual_seed(0)
    model = Flux(
        in_channels=8, num_layers=1, num_single_layers=2, num_attention_heads=2,
        attention_head_dim=16, joint_attention_dim=12, pooled_projection_dim=10,
        axes_dims_rope=(4, 6, 6),
    )  # fmt: skip
    return ready(model), (normal(2, 7, 12), normal(2, 10)), 3.5, None, "euler"


def make_flow_map() -> tuple:
    torch.manual_seed(0)
    model = Flux(
        in_channels=8, num_layers=1, num_single_layers=2, num_attention_heads=2,
        attention_head_dim=16, joint_attention_dim=12, pooled_projection_dim=10,
        axes_dims_rope=(4, 6, 6), gate_value=0.25,
    )  # fmt: skip
    return ready(model), (normal(2, 7, 12), normal(2, 10)), 3.5, None, "euler"


def make_sana(**changes) -> tuple:
    torch.manual_seed(0)  # some random models turn a change of 1e-7 into one of 2e-4
    model = Sana(
        in_channels=8, out_channels=8, num_layers=2, num_attention_heads=2, attention_head_dim=16,
        num_cross_attention_heads=2, cross_attention_head_dim=16, cross_attention_dim=32,
        caption_channels=24, sample_size=4, qk_norm="rms_norm_across_heads", **changes,
    )  # fmt: skip
    lengths = torch.tensor([[3], [7]], device=DEVICE)
    mask = torch.arange(7, device=DEVICE) < lengths
    cond, null = (normal(2, 7, 24), mask), (normal(2, 7, 24, seed=1), ~mask)
    return ready(model), cond, 4.5, null, "dpm"


def make_sana_2k() -> tuple:
    return make_sana(interpolation_scale=1.0)


def run(made: tuple, stepper: sample.Stepper | None, seed: int = 0, steps: int = STEPS):
    model, cond, guidance, null, solver = made
    kind = "flux" if solver == "euler" else "sana-dpm"
    sigmas = sample.timesteps(steps, kind, tokens=16)
    noise = normal(2, 8, 4, 4, seed=seed)
    return sample.sample(model, cond, noise, sigmas, guidance, null, solver, None, stepper)


@pytest.mark.parametrize("make", [make_flux, make_flow_map, make_sana, make_sana_2k])
def test_what_is_computed_before_the_first_step_changes_nothing(make):
    made = make()
    expected, other = run(made, None), run(made, None, seed=1, steps=2)
    stepper = sample.Stepper(made[0], graph=False)
    for _ in range(2):  # the second time the buffers are there
        assert torch.allclose(run(made, stepper), expected, rtol=1e-5, atol=1e-5)
        assert torch.allclose(run(made, stepper, 1, 2), other, rtol=1e-5, atol=1e-5)
    assert torch.equal(run(made, None), expected)  # and leaves no trace
    assert torch.equal(run(made, sample.Stepper(made[0], hoist=False, graph=False)), expected)


@pytest.mark.parametrize("make, kinds", [(make_flux, 2), (make_sana, 1)])
def test_blocks_of_a_kind_are_compiled_once_hoisting_or_not(make, kinds, monkeypatch):
    """By a backend that takes no time: what counts is that no step and no block makes it start."""
    made, compile_block, graphs = make(), nn.Module.compile, []

    def counting(graph, inputs):
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(
        nn.Module, "compile", lambda m, **how: compile_block(m, backend=counting, **how)
    )
    expected = run(made, None)
    sample.speed_up(made[0], compiled=True)
    ours = run(made, sample.Stepper(made[0], graph=False))
    assert torch.allclose(ours, expected, rtol=1e-5, atol=1e-5) and len(graphs) == kinds


@pytest.mark.parametrize("make", [make_flux, make_flow_map, make_sana])
def test_other_words_replace_those_of_the_batch_before(make):
    model, cond, guidance, null, solver = made = make()
    stepper = sample.Stepper(model, graph=False)
    run(made, stepper)
    louder = (model, (2 * cond[0], *cond[1:]), guidance, null, solver)
    ours = run(louder, stepper)
    assert torch.allclose(ours, run(louder, None), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(ours, run(made, None), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("make", [make_flux, make_sana_2k])
def test_the_modules_that_were_hoisted_are_not_run_in_a_step(make):
    made = make()
    stepper, calls = sample.Stepper(made[0], graph=False), []
    run(made, stepper)
    name = "pe_embedder" if make is make_flux else "pos_embedder"  # positions, too
    assert getattr(made[0], name) in stepper.buffers
    heavy = [m for module in stepper.buffers for m in module.modules() if isinstance(m, nn.Linear)]
    assert len(heavy) >= 4
    for module in heavy:
        module.register_forward_pre_hook(lambda m, _: calls.append(m))
    inner = [m for m in heavy if m not in stepper.buffers]  # its owner hands out the result
    stepper(1, normal(2, 8, 4, 4))
    assert not [m for m in calls if m in inner]


@pytest.mark.parametrize("make", [make_flux, make_flow_map, make_sana])
def test_steppers_of_one_model_do_not_meet(make):
    model, cond, guidance, null, solver = made = make()
    louder = (model, (2 * cond[0], *cond[1:]), guidance, null, solver)
    first, second = (sample.Stepper(model, graph=False) for _ in range(2))
    expected, other = run(made, first), run(louder, second)  # neither is closed
    assert torch.equal(run(louder, first), other)
    assert torch.equal(run(made, second), expected)
    noise = normal(2, 8, 4, 4)
    for stepper, given in ((first, cond), (second, louder[1])):
        stepper.start([0.9, 0.5], noise, given, guidance, null)
    alone = second(1, noise).clone()
    first(1, noise)
    assert torch.equal(second(1, noise), alone) and not torch.equal(first(1, noise), alone)
    assert not any("forward" in vars(m) for m in model.modules())


def test_a_step_that_fails_leaves_the_model_as_it_was():
    made = make_flux()
    expected, stepper = run(made, None), sample.Stepper(made[0], graph=False)
    run(made, stepper)
    attention, made[0].attention = made[0].attention, None  # out of memory, say
    with pytest.raises(TypeError):
        stepper(1, normal(2, 8, 4, 4))
    made[0].attention = attention
    assert torch.equal(run(made, None), expected)


@needs_cuda
@pytest.mark.parametrize("make", [make_flux, make_flow_map, make_sana])
def test_a_replayed_graph_is_bit_identical_to_eager(make):
    made = make()
    eager = run(made, sample.Stepper(made[0], graph=False), steps=5)
    stepper = sample.Stepper(made[0])
    for _ in range(2):
        assert torch.equal(run(made, stepper, steps=5), eager)
    assert stepper.recorded is not None


@needs_cuda
def test_a_graph_is_recorded_whole_and_for_one_attention_only():
    made = make_flux()
    stepper, torchs = sample.Stepper(made[0]), made[0].attention

    def failing(*qkv):
        if torch.cuda.is_current_stream_capturing():
            raise MemoryError
        return torchs(*qkv)

    made[0].attention = failing
    with pytest.raises(MemoryError):
        run(made, stepper)
    assert stepper.recorded is None
    made[0].attention = torchs
    expected = run(made, None)
    assert torch.allclose(run(made, stepper), expected, rtol=1e-5, atol=1e-5)
    made[0].attention = lambda q, k, v: torchs(q, k, 2 * v)
    assert torch.allclose(run(made, stepper), run(made, None), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(run(made, stepper), expected, rtol=1e-2, atol=1e-2)


@pytest.mark.skipif(not kernels.runs_on(DEVICE), reason="needs Triton and a GPU or its interpreter")
@pytest.mark.parametrize("make", [make_flux, make_flow_map, make_sana])
def test_all_together_gives_the_plain_picture(make):
    made = make()
    expected = run(made, None, steps=2)
    kernels.fuse(made[0])
    ours = run(made, sample.Stepper(made[0]), steps=2)
    assert torch.allclose(ours, expected, rtol=1e-4, atol=1e-4)
