"""Why believe dcae.py: the reference's numbers and names, and what holds by construction."""

import inspect
import json
import math
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import reference
import torch
from PIL import Image
from reference import error, official_shapes, weights_of
from safetensors.torch import save_file
from torch import Tensor

import dcae
from dcae import DCAE, PRESETS, name_rows, pad_to_multiple, psnr, ssim, tiled_decode, tiled_encode
from models.script import UserError, exit_cleanly
from models.weights import Checkpoint, build, check, save

CASES = [
    f"dcae_tiny_{s}_{f}" for s in ("sana", "v15", "mix", "lite") for f in ("dcai", "diffusers")
]
# preset: (numbers in it, BatchNorm statistics included; the published scale of latents)
OFFICIAL = {
    "f32c32-in-1.0": (323369275, 0.3189),
    "f32c32-mix-1.0": (323369275, 0.4552),
    "f32c32-sana-1.0": (312250275, 0.41407),
    "f32c32-sana-1.1": (312250275, 0.41407),
    "lite-f32c32-sana-1.1": (421181228, 0.41407),
    "f64c128-in-1.0": (676908955, 0.2889),
    "f64c128-mix-1.0": (676908955, 0.4538),
    "f128c512-in-1.0": (1120695067, 0.4883),
    "f128c512-mix-1.0": (1120695067, 0.362),
    "f32c128-1.5": (523609740, 1.0),  # stands in for one that is published nowhere
    "f64c128-1.5": (714741644, 0.5935),
}
TINY = {  # f8: every kind of stage, two heads, both norms
    "latent_channels": 16,
    **dcae.both(block_types=["ResBlock"] * 2 + ["EfficientViTBlock"] * 2),
    **dcae.both(block_out_channels=[8, 16, 32, 64]),
    "encoder_layers_per_block": [1, 2, 1, 1],
    "decoder_layers_per_block": [2, 1, 1, 1],
    "encoder_qkv_multiscales": [[], [], [5], [3, 5]],
    "decoder_qkv_multiscales": [[], [], [], [5]],
    "decoder_norm_types": ["batch_norm", "rms_norm", "batch_norm", "rms_norm"],
    "decoder_act_fns": ["relu", "silu", "silu", "silu"],
    "scaling_factor": 0.5,
}


def golden(name: str) -> tuple[dict[str, Tensor], dict]:
    """The tensors of a reference case and its config in diffusers' words."""
    tensors, metadata = reference.golden(name)
    config = json.loads(metadata["config"])
    if "dotlist" in config:  # dc-ai's words; diffusers' file holds the same model
        config = golden(name.replace("_dcai", "_diffusers"))[1]
    return tensors, config


def load(tensors: dict[str, Tensor], config: dict, folder: Path) -> DCAE:
    save_file(tensors, folder / "model.safetensors")
    return DCAE.from_pretrained(folder / "model.safetensors", config=config)


@torch.no_grad()
def golden_errors(model: DCAE, tensors: dict[str, Tensor]) -> dict[str, float]:
    scale, image = model.scaling_factor, tensors["in/image"]
    results = {
        "out/latent": lambda: model.encode(image) / scale,
        "out/decoded": lambda: model.decode(tensors["out/latent"] * scale),
        "out/decoded_from_z": lambda: model.decode(tensors["in/z"] * scale),
        "out/latent_c16": lambda: model.encode(image)[:, :16] / scale,
        "out/decoded_c16": lambda: model.decode(tensors["out/latent_c16"] * scale),
    }
    return {k: error(result(), tensors[k]) for k, result in results.items() if k in tensors}


# ---- parity


@pytest.mark.parametrize("name", CASES)
def test_golden_cases_agree_in_the_names_of_dc_ai_and_of_diffusers(name, tmp_path):
    tensors, config = golden(name)
    errors = golden_errors(load(weights_of(tensors), config, tmp_path), tensors)
    print(name, errors)
    assert max(errors.values()) < 1e-5


def test_a_dc_ai_folder_names_its_preset_and_nothing_else(tmp_path, monkeypatch):
    tensors, config = golden("dcae_tiny_v15_dcai")
    monkeypatch.setitem(PRESETS, "dc-ae-tiny", {"hub": "dc-ai/dc-ae-tiny", "config": config})
    (tmp_path / "config.json").write_text('{"model_name": "dc-ae-tiny"}')
    save_file(weights_of(tensors), tmp_path / "model.safetensors")
    assert DCAE.from_pretrained(tmp_path).config["latent_channels"] == 32


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"downsample_block_type": "Conv", "upsample_block_type": "interpolate"},
        dcae.both(layers_per_block=[0, 1, 1, 1]) | {"decoder_layers_per_block": [0, 1, 1, 0]},
        dcae.both(layers_per_block=[0, 1, 1, 1])
        | {"downsample_block_type": "conv", "upsample_block_type": "interpolate"},
        {"encoder_out_shortcut": False, "decoder_in_shortcut": False, "decoder_act_fns": "relu"},
        {"decoder_norm_types": "batch_norm", "decoder_block_types": "ResBlock"},
    ],
)
def test_a_random_model_saved_by_diffusers_gives_diffusers_images(change, tmp_path):
    diffusers = pytest.importorskip("diffusers", reason="diffusers is the reference here")
    torch.manual_seed(1)
    theirs = diffusers.AutoencoderDC(**TINY | change).eval()
    with torch.no_grad():
        for name, tensor in theirs.state_dict().items():
            if tensor.is_floating_point():
                tensor.copy_(tensor + 0.1 * torch.rand_like(tensor) * (1 + ("norm" in name)))
    theirs.save_pretrained(tmp_path / "vae", max_shard_size="100KB")
    ours = DCAE.from_pretrained(tmp_path)
    for height, width in ((40, 56), (8, 24), (104, 72)):  # latents 5x7, 1x3 (few tokens), 13x9
        image = torch.rand(2, 3, height, width) * 2 - 1
        with torch.no_grad():
            latents = ours.encode(image)
            assert error(latents, theirs.encode(image).latent * 0.5) < 1e-5
            assert error(ours.decode(latents), theirs.decode(latents / 0.5).sample) < 1e-5


# ---- names


def test_what_a_config_leaves_out_is_what_diffusers_takes():
    diffusers = pytest.importorskip("diffusers", reason="diffusers is the reference here")
    theirs = inspect.signature(diffusers.AutoencoderDC).parameters
    for name, ours in inspect.signature(DCAE).parameters.items():
        assert ours.default == theirs[name].default, name


@pytest.mark.parametrize("names", ["dcai", "diffusers"])
@pytest.mark.parametrize("preset", OFFICIAL)
def test_presets_have_the_official_names_shapes_and_scale_of_latents(preset, names):
    shapes, path = official_shapes(f"dcae-{preset}-{names}"), Path("official")
    model = build(DCAE, PRESETS[f"dc-ae-{preset}"]["config"], path)
    checkpoint = Checkpoint(path, None, {}, shapes, {})
    rows = name_rows(model, checkpoint)
    check(model, rows, checkpoint)  # raises when a name is left over on either side
    used = [name for official, _ in rows.values() for name in official]
    assert sorted(used) == sorted(shapes)
    numbers = sum(tensor.numel() for tensor in model.state_dict().values())
    assert (numbers, model.scaling_factor) == OFFICIAL[preset]


def test_presets_are_the_official_configs():
    path = reference.SHARED / "configs.json"
    if not path.exists():
        pytest.skip(f"{path} is not here")
    for key, entry in json.loads(path.read_text())["dcae"].items():
        if key == "source" or "diffusers_config" not in entry:
            continue
        ours = build(DCAE, PRESETS[f"dc-ae-{key}"]["config"], path)
        config = {k: v for k, v in entry["diffusers_config"].items() if not k.endswith("_note")}
        official = build(DCAE, config, path)
        assert ours.scaling_factor == official.scaling_factor
        assert str(ours) == str(official), key  # the printed tree of modules


# ---- mutations: a wrong model must not pass for the right one


def swap(weights: dict[str, Tensor], one: str, other: str) -> dict[str, Tensor]:
    mirror = {k: k.replace(one, other) for k in weights if one in k}
    mirror |= {k: k.replace(other, one) for k in weights if other in k}
    return {mirror.get(k, k): v for k, v in weights.items()}


def swap_blocks(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return swap(weights, "encoder.stages.5.op_list.0.", "encoder.stages.6.op_list.0.")


def thirds_of_qkv(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """q, k and v of a head lie together; here all of q, then all of k, then all of v."""
    name = "encoder.stages.5.op_list.0.context_module.main.qkv.conv.weight"
    thirds = weights[name].unflatten(0, (3, -1, 32)).transpose(0, 1).flatten(0, 2)
    return weights | {name: thirds.contiguous()}


@pytest.mark.parametrize(
    ("name", "mutate"),
    [("dcae_tiny_v15_dcai", swap_blocks), ("dcae_tiny_sana_dcai", thirds_of_qkv)],
)
def test_a_mutation_is_caught(name, mutate, tmp_path):
    tensors, config = golden(name)
    errors = golden_errors(load(mutate(weights_of(tensors)), config, tmp_path), tensors)
    assert errors["out/latent"] > 1e-3


def test_a_wrong_norm_eps_is_caught(tmp_path):
    tensors, config = golden("dcae_tiny_v15_dcai")
    model = load(weights_of(tensors), config, tmp_path)
    for module in model.modules():
        if isinstance(module, dcae.RMSNorm):
            module.eps = 1e-6
    assert max(golden_errors(model, tensors).values()) > 1e-4


# ---- identities


def test_shortcuts_alone_carry_the_image_down_and_up_again():
    """Zero convolutions: averaging away nothing, the space-to-channel path is lossless."""
    down, up = dcae.Downsample(3, 12, "pixel_unshuffle"), dcae.Upsample(12, 3, "pixel_shuffle")
    for layer in (down, up):
        torch.nn.init.zeros_(layer.weight), torch.nn.init.zeros_(layer.bias)
    image = torch.rand(2, 3, 6, 10)
    assert torch.equal(up(down(image)), image)


def test_linear_attention_is_the_quadratic_sum():
    query, key, value = torch.rand(3, 2, 4, 8, 21).unbind(0)
    scores = key.mT @ query  # (B, nh, m, n)
    expected = value @ (scores / (scores.sum(2, keepdim=True) + 1e-15))
    assert error(dcae.linear_attention(query, key, value), expected) < 1e-6
    assert dcae.linear_attention(query * 0, key, value).abs().max() == 0  # 0 / 0 is 0


def test_an_empty_stage_still_changes_the_grid():
    model = DCAE(**TINY | {"encoder_layers_per_block": [0, 0, 1, 1]})
    assert model.encode(torch.rand(1, 3, 16, 24)).shape == (1, 16, 2, 3)


def test_first_channels_are_for_the_1_5_family_only(tmp_path):
    tensors, config = golden("dcae_tiny_v15_dcai")
    model = load(weights_of(tensors), config, tmp_path)
    latents = model.encode(tensors["in/image"])
    muted = torch.cat([latents[:, :8], torch.zeros_like(latents[:, 8:])], 1)
    assert torch.equal(model.decode(latents[:, :8]), model.decode(muted))
    with pytest.raises(AssertionError, match="latents of 8 channels, this decoder takes 16"):
        DCAE(**TINY).decode(torch.rand(1, 8, 2, 2))
    with pytest.raises(AssertionError, match="image of 20x16: both sides must be multiples of 8"):
        DCAE(**TINY).encode(torch.rand(1, 3, 16, 20))


def test_half_precision_models_take_fp32_images_and_latents():
    model = DCAE(**TINY).eval()
    image = torch.rand(1, 3, 16, 16) * 2 - 1
    with torch.no_grad():
        exact = model(image)
        rough = model.bfloat16().decode(model.encode(image).float())
    assert rough.dtype == torch.bfloat16
    assert (rough.float() - exact).abs().mean() < 0.05 * exact.std()


def test_it_trains_under_autocast_and_keeps_its_config():
    model = DCAE(**TINY)
    image = torch.rand(2, 3, 16, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = (model(image).float() - image).square().mean()
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    again = DCAE(**json.loads(json.dumps(model.config)))
    assert again.state_dict().keys() == model.state_dict().keys()


# ---- tiles


def test_tiles_cross_fade_and_leave_no_seam():
    torch.manual_seed(0)
    sizes = dcae.both(block_out_channels=[16] * 4, layers_per_block=[0, 1, 0, 0])
    model = DCAE(latent_channels=8, scaling_factor=0.5, **sizes).eval()
    image = torch.rand(1, 3, 21 * 8, 25 * 8) * 2 - 1
    with torch.no_grad():
        latents = model.encode(image)
        whole = model.decode(latents)
        tiles = tiled_decode(model, latents, tile=128, stride=96)
        halves = torch.cat([model.decode(half) for half in latents.split([12, 13], -1)], -1)
        encoded = tiled_encode(model, image, tile=128, stride=96)
        assert torch.equal(tiled_decode(model, latents), whole)  # one tile is no tile
    seam, hard_seam = (tiles - whole).abs() / whole.std(), (halves - whole).abs() / whole.std()
    print(f"seam: mean {seam.mean():.3f}, worst {seam.max():.2f}, uncovered {hard_seam.max():.2f}")
    assert seam.mean() < 0.03 and seam.max() < 0.25 * hard_seam.max()
    assert seam[..., :32, :32].max() < 1e-5  # in one tile only, far from its edges
    assert (encoded - latents).abs().mean() < 0.03 * latents.std()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_blending_is_exact_in_every_dtype(dtype):
    image = (torch.rand(1, 3, 2048, 1280) * 2 - 1).to(dtype)
    blended = dcae.in_tiles(lambda tile: tile, image, 1, 1, tile=1024, stride=896)
    assert blended.dtype == dtype
    assert error(blended.float(), image.float()) < 1e-6


def test_tile_starts_cover_everything_at_most_a_stride_apart():
    for length in range(1, 60):
        starts = dcae.tile_starts(length, tile=16, stride=14)
        assert starts[0] == 0 and max(starts[-1] + 16, length) == max(length, 16)
        assert all(0 < b - a <= 14 for a, b in pairwise(starts))


# ---- pictures


def test_what_overflows_is_an_error(tmp_path, monkeypatch):
    """Clamped to a picture's range, infinity would pass for white."""
    Image.new("RGB", (32, 32)).save(tmp_path / "x.png")
    white = torch.full((1, 3, 32, 32), math.inf)
    monkeypatch.setattr(dcae.DCAE, "decode", lambda _, latents: white)
    monkeypatch.setattr("sys.argv", ["dcae.py", str(tmp_path / "x.png"), "--device", "cpu"])
    with pytest.raises(UserError, match="overflows in fp32"):
        dcae.main()


def test_padding_repeats_the_border_and_measures_agree_with_the_definitions():
    image = torch.rand(1, 3, 5, 7)
    padded = pad_to_multiple(image, 4)
    assert padded.shape == (1, 3, 8, 8)
    assert torch.equal(padded[..., :5, :7], image)
    assert torch.equal(padded[..., 7, :7], image[..., 4, :])
    assert psnr(image, image + 0.02) == pytest.approx(40, abs=1e-3)  # 20 log10(2 / 0.02)
    metrics = pytest.importorskip("skimage.metrics", reason="scikit-image checks SSIM")
    one, other = torch.rand(2, 3, 20, 24)
    how = dict(gaussian_weights=True, sigma=1.5, use_sample_covariance=False, data_range=1)
    pictures = one.numpy() / 2 + 0.5, other.numpy() / 2 + 0.5
    theirs = metrics.structural_similarity(*pictures, channel_axis=0, **how)
    assert ssim(one[None], other[None]) == pytest.approx(theirs, abs=1e-4)


# ---- command line


def command(arguments: list, monkeypatch, capsys) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["dcae.py", *map(str, arguments)])
    code = 0
    try:
        exit_cleanly(dcae.main)
    except SystemExit as stop:
        code = stop.code
    return code, *capsys.readouterr()


def saved_model(folder: Path) -> Path:
    model, path = DCAE(**TINY), folder / "tiny.safetensors"
    save(path, model.state_dict(), {"config": json.dumps(model.config)})
    return path


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_pixels_are_rounded_and_clamped_in_any_layout(layout):
    images = torch.linspace(-1.5, 1.5, 2 * 3 * 4 * 5).view(2, 3, 4, 5)
    pixels = dcae.to_pixels(images.contiguous(memory_format=layout))
    expected = ((images + 1) * 127.5).round().clamp(0, 255).permute(0, 2, 3, 1)
    assert pixels.dtype == torch.uint8 and pixels.is_contiguous()
    assert torch.equal(pixels.float(), expected) and expected.min() == 0 < 255 == expected.max()
    assert dcae.to_pil(images[1]).tobytes() == bytes(pixels[1].flatten().tolist())


def test_the_command_writes_the_picture_and_ends_with_json(tmp_path, monkeypatch, capsys):
    file, out = saved_model(tmp_path), tmp_path / "new" / "out.png"
    Image.new("RGB", (29, 21), (10, 200, 90)).save(tmp_path / "photo.jpg")
    arguments = [tmp_path / "photo.jpg", "--model", file, "--out", out]
    code, stdout, stderr = command(arguments, monkeypatch, capsys)
    figures = json.loads(stdout.splitlines()[-1])
    assert code == 0 and "padded to 32x24" in stdout and "loaded" in stderr
    assert figures["latents"] == [16, 3, 4] and figures["compression"] == 12
    assert {"psnr", "ssim", "out"} <= figures.keys()
    assert Image.open(out).size == (3 * 29, 21)
    monkeypatch.setattr(dcae, "TILES_ABOVE", 100)
    assert "in tiles" in command(arguments, monkeypatch, capsys)[1]


def test_a_mistake_is_one_sentence_and_exit_code_2(tmp_path, monkeypatch, capsys):
    tiny = ["--model", saved_model(tmp_path)]
    (tmp_path / "text.jpg").write_text("not a picture")
    Image.new("RGB", (64, 64)).save(tmp_path / "whole.jpg")
    for arguments, words in (
        (["missing.jpg"], "missing.jpg: cannot be read (No such file"),
        ([tmp_path / "text.jpg"], "is not an image"),
        ([tmp_path], "cannot be read"),
        ([tmp_path / "whole.jpg", "--model", "dc-ae-f33"], "presets: dc-ae-f32c32-toy"),
        ([tmp_path / "whole.jpg", "--dtype", "fp8"], "one of fp32, bf16, fp16"),
        ([tmp_path / "whole.jpg", *tiny, "--out", tmp_path / "a.xyz"], "cannot be written"),
        ([tmp_path / "whole.jpg", "--device", "abacus"], "is no device"),
        ([], "required: image"),
    ):
        code, stdout, stderr = command(arguments, monkeypatch, capsys)
        assert code == 2 and "{" not in stdout, arguments
        sentence = stderr.splitlines()[-1]
        assert sentence.startswith("error: ") and words in sentence, stderr


def test_a_model_of_another_kind_is_refused(tmp_path):
    tensors, config = golden("dcae_tiny_v15_dcai")
    with pytest.raises(UserError, match="does not fit this DCAE"):
        load(weights_of(tensors), config | {"latent_channels": 16}, tmp_path)
    with pytest.raises(UserError, match="does not describe a DCAE: .*block_out_channels"):
        load(weights_of(tensors), {"block_out_channels": [1]}, tmp_path)
    with pytest.raises(UserError, match="neither ResBlock nor EfficientViTBlock"):
        load(weights_of(tensors), config | {"encoder_block_types": "Swin"}, tmp_path)
    with pytest.raises(UserError, match="carries no config"):
        load(weights_of(tensors), None, tmp_path)
