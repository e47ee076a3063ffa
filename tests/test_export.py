"""What is exported gives, in diffusers and peft, what our merged model gives."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file

from models import export, registry, script, weights
from models.flux import Flux
from models.sana import Sana

diffusers = pytest.importorskip("diffusers", reason="the reference is not installed")

TINY = {
    "flux": (Flux, dict(
        num_layers=1, num_single_layers=1, num_attention_heads=2, attention_head_dim=16,
        axes_dims_rope=[4, 6, 6], joint_attention_dim=8, pooled_projection_dim=8,
    )),
    "sana": (Sana, dict(
        num_layers=2, num_attention_heads=2, attention_head_dim=16, num_cross_attention_heads=2,
        cross_attention_head_dim=16, cross_attention_dim=32, caption_channels=48, sample_size=32,
    )),
}  # fmt: skip
OURS = ("position_stride", "gate_value")  # keys of a config that diffusers' class lacks
ALIGNED = {"flux": dict(in_channels=32, position_stride=2), "sana": dict(in_channels=128)}
EMBEDDER_HEAD = ("img_in", "x_embedder", "final_layer")


def finished_run(folder, kind: str, alpha: float = 8.0, rank: int = 4):
    """(file of the run, merged model): another embedder and head, and LoRA of every block."""
    torch.manual_seed(0)
    cls, sizes = TINY[kind]
    base = cls(**sizes)
    weights.save(folder / "base" / "model.safetensors", base.state_dict(), {})
    (folder / "base" / "config.json").write_text(json.dumps(base.config))
    model = cls(**base.config | ALIGNED[kind] | {"out_channels": None})
    trained = {n: t for n, t in model.state_dict().items() if n.startswith(EMBEDDER_HEAD)}
    for name, weight in base.state_dict().items():
        is_linear = weight.dim() > 1 and math.prod(weight.shape[2:]) == 1  # or a 1x1 convolution
        if "blocks." in name and name.endswith(".weight") and is_linear:
            layer = name.removesuffix(".weight")
            trained[f"{layer}.lora_A"] = torch.empty(rank, weight.shape[1])
            trained[f"{layer}.lora_B"] = torch.empty(weight.shape[0], rank)
    trained = {name: 0.1 * torch.randn(tensor.shape) for name, tensor in trained.items()}
    notes = dict(
        stage="lora", base=str(folder / "base"), autoencoder="x", shift="2.5", size="2048",
        config=json.dumps(model.config), alpha=str(alpha),
    )  # fmt: skip
    file = folder / "lora.safetensors"
    weights.save(file, trained, notes)
    return file, cls.from_pretrained(file)


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


def aligned_transformer(kind: str, folder, model):
    """The base in diffusers' class, with the run's embedder and head: what a LoRA goes on."""
    cls = {"flux": diffusers.FluxTransformer2DModel, "sana": diffusers.SanaTransformer2DModel}[kind]
    network = cls(**{k: v for k, v in model.config.items() if k not in OURS})
    base = type(model).from_pretrained(folder / "base")
    kept = [name for name in base.state_dict() if not name.startswith(EMBEDDER_HEAD)]
    state = export.to_diffusers(base, kept)
    state |= load_file(folder / "out" / "embedder_head.safetensors")
    network.load_state_dict(state)
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
    spec = registry.describe(str(tmp_path / "out" / "transformer"))
    assert (spec.autoencoder, spec.shift, spec.size) == ("x", 2.5, 2048)
    config = json.loads((tmp_path / "out" / "transformer" / "config.json").read_text())
    assert config["out_channels"] == config["in_channels"]  # None stops SanaPipeline
    monkeypatch.setattr(export, "SHARD", 10**9)  # a smaller export leaves nothing of this one
    written = export.write("diffusers", file, model, tmp_path / "out")
    there = set((tmp_path / "out" / "transformer").iterdir())
    assert there == {path for path in written if path.parent.name == "transformer"}
    assert len(there) == 2


@pytest.mark.parametrize("kind", ["flux", "sana"])
@torch.no_grad()
def test_the_lora_loads_in_diffusers(tmp_path, kind):
    pytest.importorskip("peft", reason="diffusers loads LoRA through peft")
    file, model = finished_run(tmp_path, kind)
    export.write("diffusers", file, model, tmp_path / "out")
    network = aligned_transformer(kind, tmp_path, model)
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
    network = aligned_transformer(kind, tmp_path, model)
    adapted = peft.PeftModel.from_pretrained(network, tmp_path / "out").eval()
    args = inputs(model)
    torch.testing.assert_close(theirs(adapted, model, *args), model(*args), rtol=1e-4, atol=1e-4)
    merged = adapted.merge_and_unload()
    torch.testing.assert_close(theirs(merged, model, *args), model(*args), rtol=1e-4, atol=1e-4)


def test_a_run_trained_in_full_is_exported_merged_or_not_at_all(tmp_path):
    file, model = finished_run(tmp_path, "flux")
    notes = weights.open_checkpoint(file).metadata
    weights.save(file, model.state_dict(), notes)
    files = export.write("diffusers", file, model, tmp_path / "out")
    assert {path.parent.name for path in files} == {"transformer"}
    with pytest.raises(script.UserError, match="holds no LoRA: it was trained in full"):
        export.write("peft", file, model, tmp_path / "out")


def test_what_cannot_be_exported_is_a_sentence(tmp_path):
    file, model = finished_run(tmp_path, "sana")
    for kind in ("onnx", "comfyui"):
        with pytest.raises(script.UserError, match=f"{kind} is unknown; one of diffusers, peft"):
            export.write(kind, file, model, tmp_path / "out")


def test_a_full_disk_leaves_no_shard_half_written(tmp_path, monkeypatch):
    file, model = finished_run(tmp_path, "flux")
    usage = weights.shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(weights.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(script.UserError, match=r"safetensors not written .* 0 MB are free"):
        export.write("diffusers", file, model, tmp_path / "out")
    assert not [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
