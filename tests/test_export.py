"""What is exported gives, in diffusers and peft, what our merged model gives."""

import json

import pytest
import torch
from safetensors.torch import load_file
from test_align import tiny_base
from torch import nn

import align
import lora
import sample
from models import export, script, weights
from models.flux import Flux
from models.sana import Sana

diffusers = pytest.importorskip("diffusers", reason="the reference is not installed")


def finished_run(folder, kind: str, alpha: float = 8.0):
    """(file of the run, merged model): all that is trained is random."""
    torch.manual_seed(0)
    if kind == "flux":
        base, channels, stride = tiny_base(), 32, 2
    else:
        base = Sana(
            in_channels=32, out_channels=32, num_layers=2, num_attention_heads=2,
            attention_head_dim=16, num_cross_attention_heads=2, cross_attention_head_dim=16,
            cross_attention_dim=32, caption_channels=48, sample_size=32,
        )  # fmt: skip
        channels, stride = 128, 1
    weights.save(folder / "base" / "model.safetensors", base.state_dict(), {})
    (folder / "base" / "config.json").write_text(json.dumps(base.config))
    model = align.transplant(base, channels, stride)
    lora.choose_trained(model, lora.Config(rank=4, alpha=alpha))
    for p in align.trained(model).values():
        nn.init.normal_(p, std=0.1)
    notes = dict(
        stage="lora", base=str(folder / "base"), autoencoder="x", shift="2.5", size="2048",
        config=json.dumps(model.config), alpha=str(alpha),
    )  # fmt: skip
    file = folder / "lora.safetensors"
    weights.save(file, align.trained(model), notes)
    return file, type(base).from_pretrained(file)


def inputs(model) -> tuple:
    g = torch.Generator().manual_seed(5)

    def draw(*shape):
        return torch.randn(*shape, generator=g)

    t = torch.rand(2, generator=g)
    noisy = draw(2, model.latent_channels, 4, 6)
    if isinstance(model, Flux):
        return noisy, t, draw(2, 3, 8), draw(2, 8), 1 + draw(2).abs()
    return noisy, t, draw(2, 7, 48), torch.arange(7) < torch.tensor([[4], [7]])


def theirs(network, model, noisy, t, text, second, guidance=None):
    """diffusers' transformer on the same inputs."""
    if guidance is None:
        mask = second.to(noisy.dtype)
        return network(noisy, text, 1000 * t, encoder_attention_mask=mask).sample
    stride, (h, w) = model.config["position_stride"], noisy.shape[2:]
    rows, cols = (torch.arange(n) * stride + (stride - 1) / 2 for n in (h, w))
    row, col = torch.meshgrid(rows, cols, indexing="ij")
    ids = torch.stack((torch.zeros_like(row), row, col), -1).flatten(0, 1)
    tokens = noisy.flatten(2).mT
    out = network(
        tokens, encoder_hidden_states=text, pooled_projections=second, timestep=t,
        img_ids=ids, txt_ids=torch.zeros(text.shape[1], 3), guidance=guidance,
    ).sample  # fmt: skip
    return out.mT.unflatten(2, (h, w))


def transformer_with_doors(kind: str, folder, model):
    """The base in diffusers' class, with the doors of the run: what a LoRA goes on."""
    cls = {"flux": diffusers.FluxTransformer2DModel, "sana": diffusers.SanaTransformer2DModel}[kind]
    config = {k: v for k, v in model.config.items() if k != "position_stride"}
    network = cls(**config)
    base = type(model).from_pretrained(folder / "base")
    blocks = [name for name in base.state_dict() if "blocks." in name]
    rest = [name for name in base.state_dict() if "blocks." not in name]
    doors = ("img_in", "final_layer", "x_embedder")
    kept = [*blocks, *(name for name in rest if not name.startswith(doors))]
    state = export.to_diffusers(base, kept) | load_file(folder / "out" / "doors.safetensors")
    missing, unexpected = network.load_state_dict(state, strict=False)
    assert not unexpected and not missing
    return network.eval()


@pytest.mark.parametrize("kind", ["flux", "sana"])
@torch.no_grad()
def test_the_merged_folder_opens_in_diffusers(tmp_path, monkeypatch, kind):
    file, model = finished_run(tmp_path, kind)
    monkeypatch.setattr(export, "SHARD", 60_000)  # several files
    files = export.write("diffusers", file, model, tmp_path / "out")
    assert sum(file.name.startswith("diffusion_pytorch_model-") for file in files) > 1
    name = "FluxTransformer2DModel" if kind == "flux" else "SanaTransformer2DModel"
    network = getattr(diffusers, name).from_pretrained(tmp_path / "out" / "transformer")
    args = inputs(model)
    ours, others = model(*args), theirs(network, model, *args)
    print(f"largest difference {(ours - others).abs().max().item():.1e}")
    torch.testing.assert_close(others, ours, rtol=1e-4, atol=1e-4)
    assert ours.std() > 0.1
    again = type(model).from_pretrained(tmp_path / "out" / "transformer")  # and in ours
    torch.testing.assert_close(again(*args), ours)
    spec = sample.describe(str(tmp_path / "out" / "transformer"))
    assert (spec["autoencoder"], spec["shift"], spec["size"]) == ("x", 2.5, 2048)


def test_a_smaller_export_leaves_nothing_of_a_larger_one(tmp_path, monkeypatch):
    file, model = finished_run(tmp_path, "flux")
    monkeypatch.setattr(export, "SHARD", 60_000)
    export.write("diffusers", file, model, tmp_path / "out")
    monkeypatch.setattr(export, "SHARD", 10**9)
    written = export.write("diffusers", file, model, tmp_path / "out")
    there = set((tmp_path / "out" / "transformer").iterdir())
    assert there == {path for path in written if path.parent.name == "transformer"}


@pytest.mark.parametrize("kind", ["flux", "sana"])
@torch.no_grad()
def test_the_lora_loads_in_diffusers(tmp_path, kind):
    pytest.importorskip("peft", reason="diffusers loads LoRA through peft")
    file, model = finished_run(tmp_path, kind)
    export.write("diffusers", file, model, tmp_path / "out")
    network = transformer_with_doors(kind, tmp_path, model)
    args = inputs(model)
    before = theirs(network, model, *args)
    network.load_lora_adapter(load_file(tmp_path / "out" / "pytorch_lora_weights.safetensors"))
    torch.testing.assert_close(theirs(network, model, *args), model(*args), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(before, model(*args), atol=1e-2)  # the LoRA does something


@pytest.mark.parametrize("kind", ["flux", "sana"])
@torch.no_grad()
def test_the_adapter_loads_in_peft(tmp_path, kind):
    peft = pytest.importorskip("peft", reason="the reference is not installed")
    file, model = finished_run(tmp_path, kind)
    export.write("peft", file, model, tmp_path / "out")
    network = transformer_with_doors(kind, tmp_path, model)
    adapted = peft.PeftModel.from_pretrained(network, tmp_path / "out").eval()
    args = inputs(model)
    torch.testing.assert_close(theirs(adapted, model, *args), model(*args), rtol=1e-4, atol=1e-4)
    merged = adapted.merge_and_unload()
    torch.testing.assert_close(theirs(merged, model, *args), model(*args), rtol=1e-4, atol=1e-4)


def test_comfyuis_keys_are_the_blocks_own_and_give_the_merged_weights(tmp_path):
    file, model = finished_run(tmp_path, "flux")
    (written,) = export.write("comfyui", file, model, tmp_path / "out")
    tensors, base = load_file(written), Flux.from_pretrained(tmp_path / "base")
    # ComfyUI's rule: every weight "diffusion_model.<name>.weight" is "lora_unet_<name with _>".
    keys = {
        "lora_unet_" + name.removesuffix(".weight").replace(".", "_"): name
        for name in base.state_dict()
        if name.endswith(".weight")
    }
    stems = {key.split(".")[0] for key in tensors}
    assert stems <= keys.keys() and len(tensors) == 3 * len(stems)
    for stem in stems:
        down, up = (tensors[f"{stem}.lora_{half}.weight"] for half in ("down", "up"))
        scale = tensors[f"{stem}.alpha"].item() / len(down)
        merged = base.state_dict()[keys[stem]] + scale * up @ down
        torch.testing.assert_close(model.state_dict()[keys[stem]], merged)


@torch.no_grad()
def test_comfyuis_file_is_read_by_diffusers_converter(tmp_path):
    """Its rows for FLUX.1's own sizes: the keys alone are what this can check on a tiny model."""
    from diffusers.loaders import lora_conversion_utils as utils

    file, model = finished_run(tmp_path, "flux")
    (written,) = export.write("comfyui", file, model, tmp_path / "out")
    tensors = {k: v for k, v in load_file(written).items() if "double_blocks" in k}
    converted = utils._convert_kohya_flux_lora_to_diffusers(tensors)
    run = weights.open_checkpoint(file)
    for layer, (down, up) in export.diffusers_lora(model, run).items():
        if not layer.startswith("single"):
            a, b = (converted[f"transformer.{layer}.lora_{half}.weight"] for half in "AB")
            torch.testing.assert_close(b @ a, up @ down)


def test_what_cannot_be_exported_is_a_sentence(tmp_path):
    file, model = finished_run(tmp_path, "sana")
    with pytest.raises(script.UserError, match="one of diffusers, peft, comfyui"):
        export.write("onnx", file, model, tmp_path / "out")
    with pytest.raises(script.UserError, match="is for FLUX"):
        export.write("comfyui", file, model, tmp_path / "out")
