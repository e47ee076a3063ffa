"""Why believe models/vae.py: the reference's numbers and names, and what holds by construction."""

import json
from pathlib import Path

import pytest
import reference
import torch
from reference import error, official_shapes, weights_of
from safetensors.torch import save_file
from torch import Tensor, nn

from dcae import tiled_decode
from models.script import UserError
from models.vae import PRESETS, AttnBlock, FluxVAE, name_rows
from models.weights import Checkpoint, build, check

MINI = "flux_vae_mini_diffusers"
TINY = {
    "block_out_channels": [8, 8, 16, 12],
    "layers_per_block": 1,
    "latent_channels": 4,
    "norm_num_groups": 4,
}


def golden(name: str) -> tuple[dict[str, Tensor], dict]:
    """The tensors of a reference case and its config in diffusers' words."""
    tensors, metadata = reference.golden(name)
    config = json.loads(metadata["config"])
    if "ch_mult" in config:  # BFL's words; diffusers' file holds the same model
        config = golden(name.replace("_bfl", "_diffusers"))[1]
    return tensors, config


def load(tensors: dict[str, Tensor], config: dict, folder: Path) -> FluxVAE:
    save_file(tensors, folder / "ae.safetensors")
    return FluxVAE.from_pretrained(folder / "ae.safetensors", config=config)


@torch.no_grad()
def golden_errors(model: FluxVAE, tensors: dict[str, Tensor]) -> dict[str, float]:
    image = tensors["in/image"]
    results = {
        "out/mean": lambda: model.moments(image)[0],
        "out/logvar": lambda: model.moments(image)[1],
        "out/logvar_raw": lambda: model.moments(image)[1],  # nothing to clamp in these cases
        "out/diffusion_latents": lambda: model.encode(image),
        "out/decoded": lambda: model.decode(tensors["out/diffusion_latents"]),
        "out/decoded_from_z": lambda: model.decoder(tensors["in/z"]),
        "out/decoded_from_z_raw": lambda: model.decoder(tensors["in/z"]),
    }
    return {k: error(result(), tensors[k]) for k, result in results.items() if k in tensors}


# ---- parity


@pytest.mark.parametrize("name", [MINI, "flux_vae_tiny_bfl", "flux_vae_tiny_diffusers"])
def test_golden_cases_agree_in_the_names_of_bfl_and_of_diffusers(name, tmp_path):
    tensors, config = golden(name)
    errors = golden_errors(load(weights_of(tensors), config, tmp_path), tensors)
    print(name, errors)
    assert max(errors.values()) < 1e-5


@pytest.mark.parametrize("attention", [True, False])
def test_a_random_model_saved_by_diffusers_gives_diffusers_images(attention, tmp_path):
    diffusers = pytest.importorskip("diffusers", reason="diffusers is the reference here")
    torch.manual_seed(1)
    theirs = diffusers.AutoencoderKL(
        **TINY,
        down_block_types=["DownEncoderBlock2D"] * 4,
        up_block_types=["UpDecoderBlock2D"] * 4,
        scaling_factor=0.3611,
        shift_factor=0.1159,
        use_quant_conv=False,
        use_post_quant_conv=False,
        mid_block_add_attention=attention,
    ).eval()
    theirs.save_pretrained(tmp_path / "vae", max_shard_size="50KB")
    ours = FluxVAE.from_pretrained(tmp_path)
    for height, width in ((40, 56), (8, 24)):
        image = torch.rand(2, 3, height, width) * 2 - 1
        with torch.no_grad():
            latents = ours.encode(image)
            posterior = theirs.encode(image).latent_dist
            assert error(latents, (posterior.mean - 0.1159) * 0.3611) < 1e-5
            decoded = theirs.decode(latents / 0.3611 + 0.1159).sample
            assert error(ours.decode(latents), decoded) < 1e-5
            sample = ours.encode(image, torch.Generator().manual_seed(5))
            drawn = posterior.sample(torch.Generator().manual_seed(5))
            assert error(sample, (drawn - 0.1159) * 0.3611) < 1e-5


# ---- names


@pytest.mark.parametrize("names", ["bfl", "diffusers"])
def test_full_size_names_and_shapes_map_both_ways(names):
    shapes, path = official_shapes(f"flux-vae-{names}"), Path("official")
    model = build(FluxVAE, PRESETS["flux-vae"]["config"], path)
    checkpoint = Checkpoint(path, None, {}, shapes, {})
    rows = name_rows(model, checkpoint)
    check(model, rows, checkpoint)
    assert sorted(name for official, _ in rows.values() for name in official) == sorted(shapes)
    assert sum(p.numel() for p in model.parameters()) == 83819683
    assert (model.stride, model.latent_channels) == (8, 16)


def test_a_file_in_bfls_names_needs_no_config(tmp_path):
    shapes = official_shapes("flux-vae-bfl")
    tensors = {
        name: torch.zeros(shape, dtype=torch.float8_e4m3fn) for name, shape in shapes.items()
    }
    save_file(tensors, tmp_path / "ae.safetensors")
    model = FluxVAE.from_pretrained(tmp_path / "ae.safetensors", "meta")
    assert (model.scaling_factor, model.shift_factor, model.latent_channels) == (0.3611, 0.1159, 16)


# ---- mutations: a wrong model must not pass for the right one


def test_a_wrong_norm_eps_is_seen(tmp_path):
    tensors, config = golden(MINI)
    model = load(weights_of(tensors), config, tmp_path)
    for module in model.modules():
        if isinstance(module, nn.GroupNorm):
            module.eps = 1e-5
    assert max(golden_errors(model, tensors).values()) > 1e-4


@pytest.mark.parametrize(
    "names",
    [
        ("encoder.mid_block.resnets.0.", "encoder.mid_block.resnets.1."),
        ("decoder.up_blocks.0.resnets.0.", "decoder.up_blocks.0.resnets.1."),
        ("attentions.0.to_q.", "attentions.0.to_v."),
    ],
)
def test_two_swapped_modules_are_seen(names, tmp_path):
    tensors, config = golden(MINI)
    weights = weights_of(tensors)
    mirror = {k: k.replace(*pair) for pair in (names, names[::-1]) for k in weights if pair[0] in k}
    swapped = {mirror.get(name, name): tensor for name, tensor in weights.items()}
    if names[0].startswith("decoder"):  # differently wide: strict loading sees it first
        swapped = {k: swapped[k] if swapped[k].shape == v.shape else v for k, v in weights.items()}
    errors = golden_errors(load(swapped, config, tmp_path), tensors)
    assert max(errors.values()) > 1e-4


# ---- identities


def test_the_mean_is_deterministic_and_a_sample_follows_its_generator():
    model = FluxVAE(**TINY)
    image = torch.rand(1, 3, 16, 24) * 2 - 1
    seeds = [torch.Generator().manual_seed(seed) for seed in (0, 0, 1)]
    first, again, other = (model.encode(image, seed) for seed in seeds)
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert torch.equal(model.encode(image), model.encode(image))
    assert first.shape == (1, 4, 2, 3)
    with pytest.raises(AssertionError, match="image of 20x16: both sides must be multiples of 8"):
        model.encode(torch.rand(1, 3, 16, 20))


def test_a_log_variance_out_of_all_proportion_is_clamped():
    model = FluxVAE(**TINY)
    torch.nn.init.constant_(model.encoder.conv_out.bias[4:6], 1e3)
    torch.nn.init.constant_(model.encoder.conv_out.bias[6:8], -1e3)
    _, logvar = model.moments(torch.rand(1, 3, 16, 24) * 2 - 1)
    assert (logvar[:, :2] == 20).all() and (logvar[:, 2:] == -30).all()


@pytest.mark.parametrize("attention", [True, False])
def test_it_trains_under_autocast_and_keeps_its_config(attention):
    model = FluxVAE(**TINY, mid_block_add_attention=attention)
    image = torch.rand(2, 3, 16, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mean, logvar = model.moments(image)
        kl = (mean.square() + logvar.exp() - logvar).float().mean()
        loss = (model(image).float() - image).square().mean() + kl
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    again = FluxVAE(**json.loads(json.dumps(model.config)))
    assert again.state_dict().keys() == model.state_dict().keys()


def test_attention_does_not_write_down_all_scores(monkeypatch):
    """torch's kernels that need no (h w)^2 matrix read rows: a transposed view would not do."""
    seen, attend = [], nn.functional.scaled_dot_product_attention
    attention = "scaled_dot_product_attention"
    monkeypatch.setattr(nn.functional, attention, lambda *qkv: seen.extend(qkv) or attend(*qkv))
    for layout in (torch.contiguous_format, torch.channels_last):
        AttnBlock(8, 4)(torch.randn(1, 8, 3, 5).contiguous(memory_format=layout))
    assert len(seen) == 6 and all(tensor.is_contiguous() for tensor in seen)


def test_tiles_serve_this_autoencoder_too():
    torch.manual_seed(0)
    model = FluxVAE(**TINY, mid_block_add_attention=False).eval()
    latents = torch.randn(1, 4, 20, 20)
    with torch.no_grad():
        whole, tiles = model.decode(latents), tiled_decode(model, latents, tile=128, stride=96)
    assert tiles.shape == whole.shape
    # Not as close as the DC-AE: GroupNorm takes its statistics from the tile, not from the image.
    assert (tiles - whole).abs().mean() < 0.1 * whole.std()


def test_what_this_class_cannot_be_is_said(tmp_path):
    tensors, config = golden(MINI)
    with pytest.raises(UserError, match="use_quant_conv is True in the config, FluxVAE has False"):
        load(weights_of(tensors), config | {"use_quant_conv": True}, tmp_path)
    with pytest.raises(UserError, match="does not describe a FluxVAE: .*encoder_block_types"):
        load(weights_of(tensors), {"encoder_block_types": "ResBlock"}, tmp_path)
    with pytest.raises(UserError, match="does not fit this FluxVAE"):
        load(weights_of(tensors), config | {"mid_block_add_attention": False}, tmp_path)
