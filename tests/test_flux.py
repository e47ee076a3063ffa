"""Why believe models/flux.py: the reference's numbers and names, and what holds by construction."""

import json
from pathlib import Path

import pytest
import torch
from reference import error, golden, official_shapes, weights_of
from safetensors.torch import save_file
from torch import Tensor, nn

import sample
from models import flux
from models.flux import Flux
from models.script import UserError

CASES = [
    "flux_tiny_bfl",
    "flux_tiny_diffusers",
    "flux_tiny_dcgen_c32_bfl",
    "flux_tiny_dcgen_c32_diffusers",
    "flux_tiny_dcgen_c128_diffusers",
]
TINY = {
    "in_channels": 64,
    "num_layers": 2,
    "num_single_layers": 2,
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "joint_attention_dim": 24,
    "pooled_projection_dim": 20,
    "guidance_embeds": True,
    "axes_dims_rope": [4, 6, 6],
}


def golden_config(name: str, metadata: dict) -> dict:
    """The constructor's keywords, in diffusers' words also for the BFL files."""
    config = json.loads(metadata["config"])
    if metadata["kind"] == "flux_hf":
        return config
    return {
        "in_channels": config["in_channels"],
        "num_layers": config["depth"],
        "num_single_layers": config["depth_single_blocks"],
        "num_attention_heads": config["num_heads"],
        "attention_head_dim": sum(config["axes_dim"]),
        "joint_attention_dim": config["context_in_dim"],
        "pooled_projection_dim": config["vec_in_dim"],
        "guidance_embeds": config["guidance_embed"],
        "axes_dims_rope": config["axes_dim"],
    }


def golden_model(name: str, folder: Path, prefix: str = "") -> tuple[Flux, dict[str, Tensor]]:
    tensors, metadata = golden(name)
    named = {prefix + key: tensor for key, tensor in weights_of(tensors).items()}
    save_file(named, folder / "w.safetensors")
    config = golden_config(name, metadata)
    return Flux.from_pretrained(folder / "w.safetensors", config=config), tensors


def golden_inputs(tensors: dict[str, Tensor], patch: int) -> dict[str, Tensor]:
    """The arguments of our forward, from either reference's packed ones."""

    def first(*names: str) -> Tensor:
        return next(tensors[f"in/{name}"] for name in names if f"in/{name}" in tensors)

    packed, ids = first("hidden_states", "img"), first("img_ids")
    height, width = (int(n) + 1 for n in ids.reshape(-1, 3)[:, 1:].amax(0))
    return {
        "noisy_latents": unpack(packed, height, width, patch),
        "timestep": first("timestep", "timesteps"),
        "text": first("encoder_hidden_states", "txt"),
        "pooled_text": first("pooled_projections", "y"),
        "guidance": first("guidance"),
    }


def unpack(tokens: Tensor, height: int, width: int, patch: int) -> Tensor:
    """(B, h' w', C p p) -> (B, C, h' p, w' p), written out, to be sure of the model's own."""
    batch, _, channels = tokens.shape
    out = tokens.new_zeros(batch, channels // patch**2, height * patch, width * patch)
    for row in range(height):
        for col in range(width):
            token = tokens[:, row * width + col].reshape(batch, -1, patch, patch)
            top, left = row * patch, col * patch
            out[:, :, top : top + patch, left : left + patch] = token
    return out


def golden_error(model: Flux, tensors: dict[str, Tensor]) -> float:
    inputs = golden_inputs(tensors, model.patch_size)
    height, width = (n // model.patch_size for n in inputs["noisy_latents"].shape[2:])
    with torch.no_grad():
        ours = model(**inputs)
    return error(ours, unpack(tensors["out/sample"], height, width, model.patch_size))


def flow_map(folder: Path, bare: bool = False) -> tuple[Flux, dict[str, Tensor], tuple]:
    """(model, tensors, arguments) of the golden AnyFlow; bare: from a config without its gate."""
    tensors, metadata = golden("flux_tiny_anyflow_c32_diffusers")
    config = json.loads(metadata["config"])
    if bare:
        del config["gate_value"]
    save_file(weights_of(tensors), folder / "w.safetensors")
    model = Flux.from_pretrained(folder / "w.safetensors", config=config)
    names = ("latents_bchw", "timestep", "encoder_hidden_states", "pooled_projections", "guidance")
    return model, tensors, tuple(tensors[f"in/{name}"] for name in names)


def random_inputs(config: dict, batch: int = 2, grid: tuple = (5, 7), length: int = 6) -> dict:
    patch = 2 if config["in_channels"] == 64 else 1
    channels = config["in_channels"] // patch**2
    draw = torch.Generator().manual_seed(1)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=draw)

    inputs = {
        "noisy_latents": normal(batch, channels, grid[0] * patch, grid[1] * patch),
        "timestep": torch.rand(batch, generator=draw),
        "text": normal(batch, length, config["joint_attention_dim"]),
        "pooled_text": normal(batch, config["pooled_projection_dim"]),
    }
    if config["guidance_embeds"]:
        inputs["guidance"] = 1 + 4 * torch.rand(batch, generator=draw)
    return inputs


def tiny(**changes) -> Flux:
    torch.manual_seed(0)
    return Flux(**{**TINY, **changes})


# ---- parity: the reference's numbers


@pytest.mark.parametrize("name", CASES)
def test_golden_cases_agree_inside_and_at_the_end(name, tmp_path):
    model, tensors = golden_model(name, tmp_path)
    seen = {}
    parts = {
        "img_in": model.embedder,
        "double_block0": model.blocks[0],
        "single_block0": model.single_blocks[0],
    }
    for label, part in parts.items():
        part.register_forward_hook(lambda *call, label=label: seen.update({label: call[2]}))
    relative = golden_error(model, tensors)
    print(f"{name}: {relative:.1e}")
    assert relative < 1e-5
    out = {key.removeprefix("out/"): t for key, t in tensors.items() if key.startswith("out/")}
    assert error(seen["img_in"], out.get("img_in", out.get("x_embedder"))) < 1e-5
    img, txt = seen["double_block0"]
    assert error(img, out["double_block0.img"]) < 1e-5
    assert error(txt, out["double_block0.txt"]) < 1e-5
    theirs = out.get("single_block0")
    if theirs is None:  # diffusers keeps the streams apart
        theirs = torch.cat((out["single_block0.txt"], out["single_block0.img"]), dim=1)
    assert error(seen["single_block0"], theirs) < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("bare", [False, True])
def test_a_flow_map_agrees_in_one_call_and_after_four_steps(tmp_path, bare):
    model, tensors, arguments = flow_map(tmp_path, bare)
    ours = model(*arguments, tensors["in/next_timestep"])
    assert error(ours, tensors["out/sample_bchw"]) < 1e-5
    assert error(model(*arguments), tensors["out/sample_bchw"]) > 1e-2  # r stays t
    sigmas = sample.timesteps(4, "anyflow")
    assert error(sigmas, tensors["out/sigmas_4"]) < 1e-6
    noise, _, *cond, guidance = arguments
    for stepper in (None, sample.Stepper(model)):
        rows = [  # each with a guidance of its own
            sample.sample(
                model, tuple(c[i : i + 1] for c in cond), noise[i : i + 1], sigmas, scale,
                stepper=stepper,
            )
            for i, scale in enumerate(guidance.tolist())
        ]  # fmt: skip
        assert error(torch.cat(rows), tensors["out/latents_after_4_steps_bchw"]) < 1e-4
    with pytest.raises(UserError, match="solver dpm on a flow map"):
        sample.sample(model, tuple(cond), noise, sigmas, 3.5, solver="dpm")


@torch.no_grad()
def test_the_two_times_of_a_flow_map_are_mixed_by_its_gate():
    model, plain = tiny(gate_value=0.25), tiny()
    plain.load_state_dict({k: v for k, v in model.state_dict().items() if "next_time" not in k})
    inputs = random_inputs(TINY)
    inputs["guidance"] = torch.full((2,), 3.5)
    model.next_time_in.load_state_dict(model.time_in.state_dict())
    assert error(model(**inputs), plain(**inputs)) < 1e-6  # r is t: nothing is new
    t, r = torch.tensor([0.9]), torch.tensor([0.4])
    pooled, zero = torch.zeros(1, TINY["pooled_projection_dim"]), torch.zeros(1)
    embed = model.time_in
    times = 0.75 * embed(flux.sinusoid(t)) + 0.25 * embed(flux.sinusoid(r))
    rest = model.vector_in(pooled) + model.guidance_in(flux.sinusoid(zero))
    ours = model.condition(t, zero, pooled, r)
    torch.testing.assert_close(ours, torch.nn.functional.silu(times + rest))


@pytest.mark.parametrize("name", ["flux_tiny_diffusers", "flux_tiny_dcgen_c32_diffusers"])
def test_rotary_table_is_the_references(name):
    tensors, metadata = golden(name)
    axes = json.loads(metadata["config"])["axes_dims_rope"]
    grid = tuple(int(n) + 1 for n in tensors["in/img_ids"][:, 1:].amax(0))
    length = tensors["in/txt_ids"].shape[0]
    cos, sin = flux.RopeEmbedder(axes, 1)(length, grid, torch.device("cpu"))
    assert error(cos[:, 0], tensors["out/rope.cos"]) < 1e-6
    signs = torch.tensor([-1.0, 1.0]).repeat(sum(axes) // 2)
    assert error(sin[:, 0] * signs, tensors["out/rope.sin"]) < 1e-6


@pytest.mark.parametrize(
    ("changes", "grid", "length", "batch"),
    [
        ({}, (1, 1), 1, 1),
        ({}, (3, 11), 9, 2),
        ({"guidance_embeds": False}, (7, 4), 5, 3),
        ({"in_channels": 32}, (9, 5), 4, 2),
        ({"in_channels": 128, "axes_dims_rope": [8, 2, 6]}, (2, 13), 3, 2),
        ({"num_layers": 3, "num_single_layers": 1, "num_attention_heads": 5}, (4, 4), 8, 2),
        ({"num_layers": 1, "num_single_layers": 0}, (4, 4), 8, 1),
    ],
)
def test_any_size_agrees_with_diffusers(changes, grid, length, batch, tmp_path):
    reference, config = diffusers_model(**changes)
    reference.save_pretrained(tmp_path)
    model = Flux.from_pretrained(tmp_path)
    inputs = random_inputs(config, batch, grid, length)
    relative = error(run(model, inputs), run_diffusers(reference, inputs))
    print(f"{relative:.1e}")
    assert relative < 1e-5


def diffusers_model(**changes):
    diffusers = pytest.importorskip("diffusers", reason="diffusers is the reference here")
    config = {**TINY, **changes}
    torch.manual_seed(0)
    reference = diffusers.FluxTransformer2DModel(**config).eval()
    with torch.no_grad():
        for weight in reference.parameters():
            weight += 0.05 * torch.randn_like(weight)  # norms away from 1, biases from 0
    return reference, config


def run(model: Flux, inputs: dict) -> Tensor:
    with torch.no_grad():
        return model(**inputs)


def run_diffusers(reference, inputs: dict) -> Tensor:
    latents = inputs["noisy_latents"]
    patch = 2 if reference.config.in_channels == 64 else 1
    height, width = (n // patch for n in latents.shape[2:])
    patches = latents.unfold(2, patch, patch).unfold(3, patch, patch)  # (B, C, h', w', p, p)
    tokens = patches.permute(0, 2, 3, 1, 4, 5).reshape(latents.shape[0], height * width, -1)
    ids = torch.tensor([(0.0, row, col) for row in range(height) for col in range(width)])
    with torch.no_grad():
        out = reference(
            hidden_states=tokens,
            encoder_hidden_states=inputs["text"],
            pooled_projections=inputs["pooled_text"],
            timestep=inputs["timestep"],
            guidance=inputs.get("guidance"),
            img_ids=ids,
            txt_ids=torch.zeros(inputs["text"].shape[1], 3),
        ).sample
    return unpack(out, height, width, patch)


# ---- parity would notice


def swap(owner: nn.Module, one: str, other: str) -> None:
    first, second = getattr(owner, one), getattr(owner, other)
    setattr(owner, one, second), setattr(owner, other, first)


def reorder(linear: nn.Linear, parts: int, order: list[int]) -> None:
    """Its outputs, cut into `parts`, in another order."""
    for tensor in (linear.weight, linear.bias):
        tensor.data = torch.cat([tensor.data.chunk(parts)[i] for i in order])


MUTATIONS = {
    "double blocks": lambda m: swap(m.double_blocks, "0", "1"),
    "single blocks": lambda m: swap(m.single_blocks, "0", "1"),
    "last shift and scale": lambda m: reorder(m.head.adaLN_modulation[1], 2, [1, 0]),
    "shift and scale": lambda m: reorder(m.single_blocks[0].modulation.lin, 3, [1, 0, 2]),
    "rotary axes": lambda m: m.pe_embedder.axes.reverse(),
    "streams": lambda m: swap(m.double_blocks[0], "img_attn", "txt_attn"),
    "norms of q and k": lambda m: swap(m.single_blocks[0].norm, "query_norm", "key_norm"),
}


@pytest.mark.parametrize("swapped", MUTATIONS)
def test_a_mutation_is_caught(swapped, tmp_path):
    model, tensors = golden_model("flux_tiny_diffusers", tmp_path)
    MUTATIONS[swapped](model)
    relative = golden_error(model, tensors)
    print(f"{swapped}: {relative:.1e}")
    assert relative > 1e-4


@pytest.mark.parametrize("norm", ["layer_norm", "rms_norm"])
def test_a_wrong_norm_eps_is_caught(norm, tmp_path, monkeypatch):
    """An eps shows on small activations: the layers in front of the norms are shrunk."""
    reference, config = diffusers_model()
    layers = [reference.x_embedder, reference.context_embedder]
    for block in reference.single_transformer_blocks:
        layers += [block.attn.to_q, block.attn.to_k]
    with torch.no_grad():
        for layer in layers:
            layer.weight *= 1e-3
            layer.bias *= 1e-3
    reference.save_pretrained(tmp_path)
    model, inputs = Flux.from_pretrained(tmp_path), random_inputs(config)
    theirs = run_diffusers(reference, inputs)
    assert error(run(model, inputs), theirs) < 1e-5
    right = getattr(flux.F, norm)
    monkeypatch.setattr(flux.F, norm, lambda *call, eps=1e-6: right(*call[:3], eps=1e-5))
    relative = error(run(model, inputs), theirs)
    print(f"{norm}: {relative:.1e}")
    assert relative > 1e-4


# ---- names: what official files hold is what the full-size models have


@pytest.mark.parametrize(
    ("preset", "keys"),
    [
        *((f"flux-{name}", "flux1-dev-bfl") for name in ("dev", "krea", "schnell")),
        *((f"flux-{name}", "flux1-dev-diffusers") for name in ("dev", "krea", "schnell")),
        ("dc-gen-flux-1k", "dcgen-flux-1k-diffusers"),
        ("dc-gen-flux-4k", "dcgen-flux-4k-diffusers"),
        ("dc-gen-flux-anyflow", "dcgen-flux-1k-diffusers"),
    ],
)
def test_preset_has_the_official_names_and_shapes(preset, keys):
    official = official_shapes(keys)
    if preset == "flux-schnell":  # dev without its guidance embedding
        official = {name: shape for name, shape in official.items() if "guidance" not in name}
    if preset == "dc-gen-flux-anyflow":  # 1K's, and a second embedder of time
        time = "time_text_embed.timestep_embedder."
        for name in [name for name in official if name.startswith(time)]:
            official[name.replace("timestep_embedder", "delta_embedder")] = official[name]
    config = flux.PRESETS[preset]["config"]
    assert config == flux.config_from_shapes(official)
    with torch.device("meta"):
        ours = Flux(**config).state_dict()
    used = []
    for name, (theirs, join) in flux.name_rows(ours, official).items():
        parts = [torch.empty(official[their], device="meta") for their in theirs]
        assert (join(*parts) if join else parts[0]).shape == ours[name].shape, name
        used += theirs
    assert sorted(used) == sorted(official)


def test_a_repacked_file_with_prefix_loads(tmp_path):
    model, tensors = golden_model("flux_tiny_bfl", tmp_path, prefix="model.diffusion_model.")
    assert golden_error(model, tensors) < 1e-5


def test_a_file_of_ours_carries_its_config(tmp_path):
    model = tiny(in_channels=32, position_stride=2)
    header = {"config": json.dumps(model.config)}
    save_file(model.state_dict(), tmp_path / "ours.safetensors", header)
    loaded = Flux.from_pretrained(tmp_path / "ours.safetensors")
    assert loaded.config == model.config
    inputs = random_inputs(model.config)
    assert torch.equal(run(loaded, inputs), run(model, inputs))


@pytest.mark.parametrize(
    "change",
    [
        {"out_channels": 16},
        {"patch_size": 2},
        {"axes_dims_rope": [4, 6, 8]},
        {"axes_dims_rope": [5, 5, 6]},
        {"depth": 3},
        {"in_channels": 32},
        {"num_layers": 3},
    ],
)
def test_a_config_that_does_not_fit_is_refused(change, tmp_path):
    save_file(tiny().state_dict(), tmp_path / "w.safetensors")
    with pytest.raises(UserError):
        Flux.from_pretrained(tmp_path / "w.safetensors", config={**TINY, **change})


# ---- identities


def test_patches_go_out_as_they_came_in():
    model, latents = tiny(), torch.randn(2, 16, 6, 10)
    model.img_in = nn.Identity()
    tokens = model.embed(latents)
    assert torch.equal(unpack(tokens, 3, 5, patch=2), latents)
    assert torch.equal(model.unpatchify(tokens, 6, 10), latents)


def test_tokens_of_a_coarser_grid_sit_between_those_they_replace():
    def rows(grid: tuple, stride: int) -> Tensor:
        cos, sin = flux.RopeEmbedder([2, 2, 2], stride)(0, grid, torch.device("cpu"))
        return torch.atan2(sin, cos)[:, 0, 3].reshape(grid)[:, 0]  # first frequency is 1: the id

    fine, coarse = rows((4, 4), 1), rows((2, 2), 2)
    assert fine.tolist() == pytest.approx([0, 1, 2, 3], abs=1e-6)
    assert coarse.tolist() == pytest.approx([0.5, 2.5], abs=1e-6)


def test_attention_is_a_function_the_model_is_given():
    model, inputs = tiny(), random_inputs(TINY)
    usual = run(model, inputs)
    shapes = []

    def softmax_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        shapes.append(tuple(q.shape))
        return (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1) @ v

    model.attention = softmax_attention
    assert error(run(model, inputs), usual) < 1e-5
    assert shapes == [(2, 2, 6 + 35, 16)] * 4  # (B, nh, L + N, hd), once a block


def test_bf16_is_near_fp32_and_keeps_the_dtype_of_its_input():
    model, inputs = tiny(), random_inputs(TINY)
    exact = run(model, inputs)
    rough = run(model.to(torch.bfloat16), inputs)
    assert rough.dtype == torch.float32 and error(rough, exact) < 0.05
    inputs["noisy_latents"] = inputs["noisy_latents"].bfloat16()
    assert run(model, inputs).dtype == torch.bfloat16


def test_autocast_trains():
    model, inputs = tiny(), random_inputs(TINY)
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(**inputs).float().square().mean()
    loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


def test_fp16_streams_are_clipped():
    wide = torch.tensor([1e5, -1e5]).half()
    assert flux.clip(wide).tolist() == [65504, -65504]


def test_a_call_that_cannot_work_is_refused():
    model, inputs = tiny(), random_inputs(TINY)
    with pytest.raises(AssertionError, match="guidance"):
        model(**{**inputs, "guidance": None})
    with pytest.raises(AssertionError, match="patches"):
        model(**{**inputs, "noisy_latents": torch.randn(2, 16, 5, 6)})
