"""Why believe models/sana.py: the reference's numbers and names, and what holds by construction."""

import inspect
import json
from pathlib import Path

import pytest
import torch
from reference import error, golden, official_shapes, weights_of
from safetensors.torch import save_file
from torch import Tensor

from models import sana
from models.sana import Sana
from models.script import UserError

CASES = [
    "sana_tiny_original",
    "sana_tiny_diffusers",
    "sana_tiny_c128_original",
    "sana_tiny_c128_diffusers",
    "sana_tiny_posembed_diffusers",
]
TINY = {
    "in_channels": 8,
    "out_channels": 8,
    "num_attention_heads": 3,
    "attention_head_dim": 16,
    "num_layers": 2,
    "num_cross_attention_heads": 2,
    "cross_attention_head_dim": 24,
    "cross_attention_dim": 48,
    "caption_channels": 20,
    "mlp_ratio": 2.5,
    "sample_size": 8,
}


def golden_config(metadata: dict) -> dict:
    """The constructor's keywords, in diffusers' words also for the NVlabs files."""
    config = json.loads(metadata["config"])
    if metadata["kind"] == "sana_hf":
        return config
    width, heads = config["hidden_size"], config["num_heads"]
    return {
        "in_channels": config["in_channels"],
        "out_channels": config["in_channels"],
        "num_attention_heads": width // 32,
        "attention_head_dim": 32,
        "num_layers": config["depth"],
        "num_cross_attention_heads": heads,
        "cross_attention_head_dim": width // heads,
        "cross_attention_dim": width,
        "caption_channels": config["caption_channels"],
        "mlp_ratio": config["mlp_ratio"],
        "sample_size": config["input_size"],
    }


def golden_model(name: str, folder: Path) -> tuple[Sana, dict[str, Tensor]]:
    """NVlabs names come in a .pth, as they do on the hub."""
    tensors, metadata = golden(name)
    weights = weights_of(tensors)
    path = folder / ("w.pth" if metadata["kind"] == "sana_orig" else "w.safetensors")
    if path.suffix == ".pth":
        torch.save({"state_dict": weights}, path)
    else:
        save_file(weights, path)
    return Sana.from_pretrained(path, config=golden_config(metadata)), tensors


def golden_inputs(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    def first(*names: str) -> Tensor:
        return next(tensors[f"in/{name}"] for name in names if f"in/{name}" in tensors)

    text = first("encoder_hidden_states", "y")
    return {
        "noisy_latents": first("hidden_states", "x"),
        "timestep": first("timestep", "t") / 1000,
        "text": text[:, 0] if text.ndim == 4 else text,  # NVlabs: (B, 1, L, 2304)
        "text_mask": first("encoder_attention_mask", "mask").bool(),
    }


def run(model: Sana, inputs: dict) -> Tensor:
    with torch.no_grad():
        return model(**inputs)


def random_inputs(
    config: dict, batch: int = 2, grid: tuple = (5, 7), lengths: tuple = (6, 3)
) -> dict:
    """`lengths`: words of each prompt; the rest, up to the longest and one more, is padding."""
    draw = torch.Generator().manual_seed(1)
    longest = max(lengths) + 1
    padded = torch.arange(longest) >= torch.tensor(lengths)[:, None]
    return {
        "noisy_latents": torch.randn(batch, config["in_channels"], *grid, generator=draw),
        "timestep": torch.randint(1000, (batch,), generator=draw) / 1000,
        "text": torch.randn(batch, longest, config["caption_channels"], generator=draw),
        "text_mask": ~padded,
    }


def diffusers_model(**changes):
    diffusers = pytest.importorskip("diffusers", reason="diffusers is the reference here")
    config = {**TINY, **changes}
    torch.manual_seed(0)
    reference = diffusers.SanaTransformer2DModel(**config).eval()
    with torch.no_grad():
        for weight in reference.parameters():
            weight += 0.05 * torch.randn_like(weight)  # norms away from 1, biases from 0
    return reference, config


def run_diffusers(reference, inputs: dict) -> Tensor:
    with torch.no_grad():
        return reference(
            hidden_states=inputs["noisy_latents"],
            encoder_hidden_states=inputs["text"],
            encoder_attention_mask=inputs["text_mask"],
            timestep=(inputs["timestep"].double() * 1000).round().float(),
        ).sample


def tiny(**changes) -> Sana:
    torch.manual_seed(0)
    return Sana(**{**TINY, **changes})


# ---- parity: the reference's numbers


@pytest.mark.parametrize("name", CASES)
def test_golden_cases_agree_inside_and_at_the_end(name, tmp_path):
    model, tensors = golden_model(name, tmp_path)
    block, seen = model.blocks[0], {}
    parts = {  # ours: (NVlabs label, diffusers label)
        model.t_embedder: ("t_embedder", "time_embed.emb"),
        model.t_block: ("t_block", "time_embed.mod6"),
        model.attention_y_norm: ("attention_y_norm", "caption_norm"),
        block.attn: ("block0.attn", "block0.attn1"),
        block.cross_attn: ("block0.cross_attn", "block0.attn2"),
        block: ("block0", "block0"),
    }
    for part in parts:
        part.register_forward_hook(lambda part, _, out: seen.update({part: out}))
    relative = error(run(model, golden_inputs(tensors)), tensors["out/sample"])
    print(f"{name}: {relative:.1e}")
    assert relative < 1e-5
    compared = 0
    for part, labels in parts.items():
        for theirs in (tensors[f"out/{label}"] for label in labels if f"out/{label}" in tensors):
            relative = error(seen[part], theirs.reshape(seen[part].shape))
            print(f"{name} {labels[0]}: {relative:.1e}")
            assert relative < 1e-5
            compared += 1
    assert compared >= 5


@pytest.mark.parametrize(
    ("changes", "grid", "lengths"),
    [
        ({}, (1, 1), (1,)),
        ({}, (3, 11), (9, 4)),
        ({}, (8, 8), (1, 5)),
        ({}, (5, 4), (0, 3)),  # nothing but padding: attends to all of it, as the reference does
        ({"qk_norm": sana.QK_NORM}, (6, 5), (4, 7)),
        ({"attention_bias": True}, (6, 5), (4, 7)),
        ({"interpolation_scale": 1.0}, (8, 8), (4, 7)),
        ({"interpolation_scale": 2.0}, (7, 12), (4, 7)),
        ({"interpolation_scale": 1.0, "sample_size": 4}, (13, 6), (4,)),
        ({"in_channels": 128, "out_channels": 128}, (2, 9), (4, 7, 2)),
        ({"patch_size": 2, "sample_size": 12, "interpolation_scale": 1.0}, (6, 10), (4, 7)),
        ({"norm_eps": 1e-3, "mlp_ratio": 3.3}, (6, 5), (4, 7)),
    ],
)
def test_any_size_agrees_with_diffusers(changes, grid, lengths, tmp_path):
    reference, config = diffusers_model(**changes)
    reference.save_pretrained(tmp_path)
    model = Sana.from_pretrained(tmp_path)
    inputs = random_inputs(config, len(lengths), grid, lengths)
    relative = error(run(model, inputs), run_diffusers(reference, inputs))
    print(f"{relative:.1e}")
    assert relative < 1e-5 if min(lengths) else relative < 1e-4


def test_padding_is_not_read(tmp_path):
    model, inputs = tiny(), random_inputs(TINY, lengths=(6, 3))
    usual = run(model, inputs)
    inputs["text"][1, 3:] = 50.0
    assert torch.equal(run(model, inputs), usual)
    cut = {name: value[1:] for name, value in inputs.items()}
    cut["text"], cut["text_mask"] = cut["text"][:, :3], cut["text_mask"][:, :3]
    assert error(run(model, cut), usual[1:]) < 1e-5


def test_whole_timesteps_survive_the_division_by_1000():
    whole = torch.arange(1001)
    assert torch.equal(sana.thousandths(whole / 1000), whole.float())
    between = torch.tensor([0.12345, 0.99967, 0.0004])
    assert torch.equal(sana.thousandths(between), 1000 * between)


# ---- parity would notice


def reorder(tensor: Tensor, parts: int, order: list[int]) -> None:
    """Its rows, cut into `parts`, in another order."""
    tensor.data = torch.cat([tensor.data.chunk(parts)[i] for i in order])


def swap_blocks(model: Sana) -> None:
    model.blocks[0], model.blocks[1] = model.blocks[1], model.blocks[0]


def swap_keys_and_values(model: Sana) -> None:
    for tensor in model.blocks[0].cross_attn.kv_linear.parameters():
        reorder(tensor, 2, [1, 0])


def turn_the_convolution(model: Sana) -> None:
    conv = model.blocks[0].mlp.depth_conv.conv
    conv.weight.data = conv.weight.data.transpose(2, 3).contiguous()


MUTATIONS = {
    "blocks": swap_blocks,
    "last shift and scale": lambda m: reorder(m.head.scale_shift_table, 2, [1, 0]),
    "shift and scale": lambda m: reorder(m.blocks[1].scale_shift_table, 6, [1, 0, 2, 3, 4, 5]),
    "attention and MLP": lambda m: reorder(m.blocks[0].scale_shift_table, 2, [1, 0]),
    "queries and keys": lambda m: reorder(m.blocks[0].attn.qkv.weight, 3, [1, 0, 2]),
    "keys and values": swap_keys_and_values,
    "rows and columns": turn_the_convolution,
    "heads": lambda m: setattr(m.blocks[0].attn, "head_dim", 8),
}


@pytest.mark.parametrize("swapped", MUTATIONS)
def test_a_mutation_is_caught(swapped, tmp_path):
    model, tensors = golden_model("sana_tiny_original", tmp_path)
    MUTATIONS[swapped](model)
    relative = error(run(model, golden_inputs(tensors)), tensors["out/sample"])
    print(f"{swapped}: {relative:.1e}")
    assert relative > 1e-4


@pytest.mark.parametrize(
    ("layers", "norm"),
    [
        (["caption_projection.linear_2"], "attention_y_norm"),
        (["attn1.to_k"], "blocks.0.attn.k_norm"),
        (["attn2.to_k"], "blocks.0.cross_attn.k_norm"),
        (["attn2.to_q"], "blocks.0.cross_attn.q_norm"),
        (["patch_embed.proj"], "blocks.0"),
    ],
)
def test_a_wrong_norm_eps_is_caught(layers, norm, tmp_path):
    """An eps shows on small activations: the layers in front of the norm are shrunk."""
    reference, config = diffusers_model(qk_norm=sana.QK_NORM, num_layers=1)
    with torch.no_grad():
        for name, weight in reference.named_parameters():
            if any(layer in name for layer in layers):
                weight *= 1e-3
    reference.save_pretrained(tmp_path)
    model, inputs = Sana.from_pretrained(tmp_path), random_inputs(config)
    theirs = run_diffusers(reference, inputs)
    assert error(run(model, inputs), theirs) < 1e-5
    model.get_submodule(norm).eps *= 100
    relative = error(run(model, inputs), theirs)
    print(f"{norm}: {relative:.1e}")
    assert relative > 5e-5


# ---- names: what official files hold is what the full-size models have


FAMILIES = {  # official names: the presets that have them
    "sana-600m-1024-original": ("sana-0.6b-512", "sana-0.6b"),
    "sana-600m-1024-diffusers": ("sana-0.6b-512", "sana-0.6b"),
    "sana-1600m-1024-original": ("sana-1.6b-512", "sana-1.6b", "sana-1.6b-2k", "sana-1.6b-4k"),
    "sana-1600m-1024-diffusers": ("sana-1.6b-512", "sana-1.6b", "sana-1.6b-2k", "sana-1.6b-4k"),
    "sana1.5-1600m-1024-original-qknorm": ("sana-1.5-1.6b",),
    "dcgen-sana-1600m-f64c128-t2icore": ("dc-gen-sana-f64c128",),
    "sana-1600m-f64c128-diffusers-hypothetical": ("dc-gen-sana-f64c128",),
}


@pytest.mark.parametrize(
    ("preset", "keys"), [(preset, keys) for keys in FAMILIES for preset in FAMILIES[keys]]
)
def test_preset_has_the_official_names_and_shapes(preset, keys):
    official = official_shapes(keys)
    with torch.device("meta"):
        model = Sana(**sana.PRESETS[preset]["config"])
    ours, used = model.state_dict(), []
    for name, (theirs, join) in sana.name_rows(ours, official).items():
        parts = [torch.empty(official[their], device="meta") for their in theirs]
        assert (join(*parts) if join else parts[0]).shape == ours[name].shape, name
        used += theirs
    assert sorted(used) == sorted(name for name in official if not sana.DROPPED.search(name))
    if "x_embedder.proj.weight" in official:  # NVlabs' shapes show the config, which is nowhere
        side, width = model.config["sample_size"], official["pos_embed"][2]
        shapes = official | {"pos_embed": (1, side * side, width)}
        with torch.device("meta"):
            assert Sana(**sana.config_from_shapes(shapes)).config == model.config


def test_what_a_config_leaves_out_is_what_diffusers_takes():
    diffusers = pytest.importorskip("diffusers", reason="diffusers is the reference here")
    theirs = inspect.signature(diffusers.SanaTransformer2DModel).parameters
    for name, ours in inspect.signature(Sana).parameters.items():
        assert ours.default == theirs[name].default, name


@pytest.mark.parametrize(
    "change",
    [
        {"guidance_embeds": True},
        {"cross_attention_dim": 64},
        {"qk_norm": "layer_norm"},
        {"depth": 3},
        {"in_channels": 32},
        {"num_layers": 3},
    ],
)
def test_a_config_that_does_not_fit_is_refused(change, tmp_path):
    save_file(tiny().state_dict(), tmp_path / "w.safetensors")
    with pytest.raises(UserError):
        Sana.from_pretrained(tmp_path / "w.safetensors", config={**TINY, **change})


# ---- identities


def test_linear_attention_is_the_quadratic_one_regrouped():
    q, k, v = torch.randn(3, 2, 4, 9, 8, generator=torch.Generator().manual_seed(0)).abs()
    scores = q.relu() @ k.relu().transpose(-1, -2)  # (B, nh, N, N)
    expected = scores / scores.sum(-1, keepdim=True) @ v
    torch.testing.assert_close(sana.linear_attention(q, k, v), expected)
    assert sana.linear_attention(-q, -k, v).abs().max() == 0  # 0 / 0 is 0


def test_attention_is_a_function_the_model_is_given():
    model, inputs = tiny(), random_inputs(TINY)
    usual = run(model, inputs)

    def softmax_attention(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor) -> Tensor:
        return (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5 + attn_mask).softmax(-1) @ v

    model.attention = softmax_attention
    assert error(run(model, inputs), usual) < 1e-5


def test_bf16_is_near_fp32_and_keeps_the_dtype_of_its_input():
    model, inputs = tiny(), random_inputs(TINY)
    exact = run(model, inputs)
    rough = run(model.to(torch.bfloat16), inputs)
    assert rough.dtype == torch.float32 and error(rough, exact) < 0.05
    inputs["noisy_latents"] = inputs["noisy_latents"].bfloat16()
    assert run(model, inputs).dtype == torch.bfloat16


def test_autocast_trains():
    model, inputs = tiny(qk_norm=sana.QK_NORM), random_inputs(TINY)
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(**inputs).float().square().mean()
    loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


def test_latents_that_cannot_be_cut_are_refused():
    model, inputs = tiny(patch_size=2), random_inputs(TINY)
    with pytest.raises(AssertionError, match="patches"):
        model(**inputs)
