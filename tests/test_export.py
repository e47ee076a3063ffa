"""What is exported gives, in diffusers, peft and ComfyUI's interface, what our model gives."""

import importlib.util
import json
import math
import sys
from dataclasses import replace
from itertools import pairwise
from types import ModuleType, SimpleNamespace

import pytest
import torch
from PIL import Image
from reference import error
from safetensors.torch import load_file
from test_dcae import TINY as TINY_DCAE
from test_sample import assert_same_picture, flux_pipeline, run, sana_pipeline

import dcae
import lora
import sample
from models import export, registry, script, weights
from models.flux import Flux
from models.sana import Sana

diffusers = pytest.importorskip("diffusers", reason="the client is not installed")

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


def finished_run(folder, kind: str, pipeline=None, shift: float | None = 2.5, **aligned):
    """(Spec, merged model, autoencoder): another embedder and head, and LoRA of every block."""
    torch.manual_seed(0)
    cls, sizes = TINY[kind]
    if pipeline is not None:
        pipeline.save_pretrained(folder / "base")
        base = cls.from_pretrained(folder / "base")
    else:
        base = cls(**sizes)
        weights.save(folder / "base" / "model.safetensors", base.state_dict(), {})
        (folder / "base" / "config.json").write_text(json.dumps(base.config))
    model = cls(**base.config | ALIGNED[kind] | {"out_channels": None} | aligned)
    trained = {n: t for n, t in model.state_dict().items() if n.startswith(EMBEDDER_HEAD)}
    for name, weight in base.state_dict().items():
        is_linear = weight.dim() > 1 and math.prod(weight.shape[2:]) == 1  # or a 1x1 convolution
        if "blocks." in name and name.endswith(".weight") and is_linear:
            layer = name.removesuffix(".weight")
            trained[f"{layer}.lora_A"] = torch.empty(4, weight.shape[1])
            trained[f"{layer}.lora_B"] = torch.empty(weight.shape[0], 4)
    trained = {name: 0.1 * torch.randn(tensor.shape) for name, tensor in trained.items()}
    autoencoder = tiny_dcae(latent_channels=model.latent_channels)
    notes = dict(config=json.dumps(autoencoder.config))
    weights.save(folder / "ae.safetensors", autoencoder.state_dict(), notes)
    notes = dict(
        stage="lora", base=str(folder / "base"), autoencoder=str(folder / "ae.safetensors"),
        size="64", config=json.dumps(model.config), alpha="8",
    ) | ({"shift": str(shift)} if shift else {})  # fmt: skip
    file = folder / "lora.safetensors"
    weights.save(file, trained, notes)
    return sample.load_pipeline(str(file))


def tiny_dcae(**change) -> dcae.DCAE:
    torch.manual_seed(1)
    shortcuts = dict(encoder_out_shortcut=False, decoder_in_shortcut=False)
    return dcae.DCAE(**TINY_DCAE | shortcuts | change).eval()


def inputs(model) -> tuple:
    g = torch.Generator().manual_seed(5)

    def draw(*shape):
        return torch.randn(*shape, generator=g)

    t = torch.rand(2, generator=g)
    noisy = draw(2, model.latent_channels, 4, 6)
    if isinstance(model, Flux):
        widths = model.config["joint_attention_dim"], model.config["pooled_projection_dim"]
        return noisy, t, draw(2, 3, widths[0]), draw(2, widths[1]), 1 + draw(2).abs()
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
    _, model, _ = parts = finished_run(tmp_path, kind)
    monkeypatch.setattr(export, "SHARD", 60_000)  # several files
    files = export.write("diffusers", *parts, tmp_path / "out")
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
    assert (spec.autoencoder, spec.shift, spec.size) == (parts[0].autoencoder, 2.5, 64)
    config = json.loads((tmp_path / "out" / "transformer" / "config.json").read_text())
    assert config["out_channels"] == config["in_channels"]  # None stops SanaPipeline
    monkeypatch.setattr(export, "SHARD", 10**9)  # a smaller export leaves nothing of this one
    written = export.write("diffusers", *parts, tmp_path / "out")
    there = {path for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert there == set(written) and len([*(tmp_path / "out" / "transformer").iterdir()]) == 2


@pytest.mark.parametrize("kind", ["flux", "sana"])
@torch.no_grad()
def test_the_lora_loads_in_diffusers(tmp_path, kind):
    pytest.importorskip("peft", reason="diffusers loads LoRA through peft")
    _, model, _ = parts = finished_run(tmp_path, kind)
    export.write("diffusers", *parts, tmp_path / "out")
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
    _, model, _ = parts = finished_run(tmp_path, kind)
    export.write("peft", *parts, tmp_path / "out")
    network = aligned_transformer(kind, tmp_path, model)
    adapted = peft.PeftModel.from_pretrained(network, tmp_path / "out").eval()
    args = inputs(model)
    torch.testing.assert_close(theirs(adapted, model, *args), model(*args), rtol=1e-4, atol=1e-4)
    merged = adapted.merge_and_unload()
    torch.testing.assert_close(theirs(merged, model, *args), model(*args), rtol=1e-4, atol=1e-4)


def test_a_run_trained_in_full_is_exported_merged_or_not_at_all(tmp_path):
    spec, model, _ = parts = finished_run(tmp_path, "flux")
    notes = weights.open_checkpoint(spec.transformer).metadata
    weights.save(spec.transformer, model.state_dict(), notes)
    files = export.write("diffusers", *parts, tmp_path / "out")
    assert not [path.name for path in files if "lora" in path.name or "embedder" in path.name]
    with pytest.raises(script.UserError, match="holds no LoRA: it was trained in full"):
        export.write("peft", *parts, tmp_path / "out")


@pytest.mark.parametrize("kind, model, said", [
    ("onnx", "flux", "onnx is unknown; one of diffusers, peft, comfyui, comfyui-fp8"),
    ("comfyui", "sana", "no FLUX, or .* wanted --export diffusers"),
    ("comfyui", "flux", "positions are spread"),  # the toy's are spread
])  # fmt: skip
def test_what_cannot_be_exported_is_a_sentence(tmp_path, kind, model, said):
    parts = finished_run(tmp_path, model)
    with pytest.raises(script.UserError, match=said):
        export.write(kind, *parts, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_full_disk_leaves_no_shard_half_written(tmp_path, monkeypatch):
    parts = finished_run(tmp_path, "flux")
    usage = weights.shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(weights.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(script.UserError, match=r"safetensors not written .* 0 MB are free"):
        export.write("diffusers", *parts, tmp_path / "out")
    assert not [path for path in (tmp_path / "out").rglob("*") if path.is_file()]


# ---- whole pipelines


@pytest.mark.parametrize("change", [
    {},
    dcae.both(layers_per_block=[0, 1, 1, 1]),
    {"downsample_block_type": "conv", "upsample_block_type": "interpolate"},
])  # fmt: skip
@torch.no_grad()
def test_the_autoencoder_opens_in_diffusers(tmp_path, change):
    ours = tiny_dcae(**change)
    export.write_autoencoder(ours, tmp_path)
    theirs = diffusers.AutoencoderDC.from_pretrained(tmp_path / "vae")
    assert theirs.state_dict().keys() == export.dcae_to_diffusers(ours).keys()
    image = torch.rand(1, 3, 40, 56) * 2 - 1
    latents = ours.encode(image)
    torch.testing.assert_close(theirs.encode(image).latent * 0.5, latents, rtol=1e-5, atol=1e-5)
    images = theirs.decode(latents / 0.5).sample
    torch.testing.assert_close(images, ours.decode(latents), rtol=1e-5, atol=1e-5)


def exported_pipeline(folder, kind: str):
    """finished_run of a pipeline that diffusers draws with."""
    if "flux" in kind:
        shift = 2.5 if kind == "flux" else None  # the base's at each size
        return finished_run(folder, "flux", flux_pipeline(diffusers), shift, position_stride=1)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    if kind == "sana-dpm":
        scheduler = diffusers.DPMSolverMultistepScheduler(
            flow_shift=4.0, use_flow_sigmas=True, prediction_type="flow_prediction"
        )
    return finished_run(folder, "sana", sana_pipeline(diffusers, scheduler))


def run_lora(monkeypatch, folder, kind: str) -> None:
    flags = ["--export", kind, "--dtype", "fp32", "--model", folder / "base", "--out", folder]
    monkeypatch.setattr(sys, "argv", ["lora.py", *map(str, flags)])
    lora.main()


@pytest.mark.parametrize("kind", ["flux", "flux-dynamic", "sana-euler", "sana-dpm"])
def test_the_printed_lines_draw_the_picture_of_sample_py(tmp_path, monkeypatch, capsys, kind):
    spec, model, _ = exported_pipeline(tmp_path, kind)
    run_lora(monkeypatch, tmp_path, "diffusers")
    text = capsys.readouterr().out
    lines = text[text.index("import torch, diffusers") : text.index("\nsaved  ")].splitlines()
    assert len(lines) <= 9 and spec.transformer.replace("lora.safetensors", "diffusers") in text
    noise = sample.draw_noise([11], (model.latent_channels, 8, 8))
    noise = noise.flatten(2).mT if "flux" in kind else noise
    program = "\n".join(lines).replace('"cuda"', '"cpu"').replace("bfloat16", "float32")
    monkeypatch.chdir(tmp_path)
    exec(program.replace('pipe("', 'pipe(latents=noise, prompt="'), {"noise": noise})
    ours = run(monkeypatch, capsys, "--model", spec.transformer, "--prompt", "a fox in the snow",
               "--seed", 11, "--out", tmp_path / "x.png")  # fmt: skip
    with Image.open(tmp_path / "fox.png") as theirs:
        assert_same_picture(ours["files"][0], theirs)


class DCGen_FluxPipeline(diffusers.FluxPipeline):
    """As the authors' class of this name: FLUX's parts, with AutoencoderDC for a vae."""

    def __init__(
        self, scheduler, vae, text_encoder, tokenizer, text_encoder_2, tokenizer_2, transformer
    ):
        diffusers.DiffusionPipeline.__init__(self)
        self.register_modules(
            **{k: v for k, v in locals().items() if k not in ("self", "__class__")}
        )


def test_the_folder_is_that_of_a_pipeline_with_a_deep_autoencoder(tmp_path):
    parts = exported_pipeline(tmp_path, "flux")
    export.write("diffusers", *parts, tmp_path / "out")
    base = diffusers.FluxPipeline.from_pretrained(tmp_path / "base")
    text = {name: getattr(base, name) for name in export.TEXT["FluxPipeline"]}
    pipe = DCGen_FluxPipeline.from_pretrained(tmp_path / "out", **text)
    assert isinstance(pipe.vae, diffusers.AutoencoderDC)
    sigmas = torch.linspace(1, 1 / 4, 4).tolist()
    pipe.scheduler.set_timesteps(sigmas=sigmas, mu=7.0)  # the shift is the run's, not mu
    assert torch.allclose(pipe.scheduler.sigmas, sample.timesteps(4, "flux", shift=2.5))


@pytest.mark.parametrize("kind, path, tolerance", [
    ("diffusers", "", 0), ("diffusers", "transformer", 0),
    ("comfyui", "transformer.safetensors", 0), ("comfyui-fp8", "transformer.safetensors", 0.1),
])  # fmt: skip
@torch.no_grad()
def test_an_export_is_a_model_of_sample_py(tmp_path, kind, path, tolerance):
    spec, model, autoencoder = parts = exported_pipeline(tmp_path, "flux")
    export.write(kind, *parts, tmp_path / "out")
    again, network, decoder = sample.load_pipeline(str(tmp_path / "out" / path))
    args = inputs(model)
    assert error(network(*args), model(*args)) <= tolerance
    latents = torch.randn(1, model.latent_channels, 2, 3)
    assert error(decoder.decode(latents), autoencoder.decode(latents)) == 0
    kept = dict(transformer="", autoencoder="", stage="")
    assert replace(again, **kept) == replace(spec, **kept)


# ---- ComfyUI: a stub of what the node uses of it, as read in its source (no ComfyUI is at hand)


class ComfyFlux(Flux):
    """ComfyUI's FLUX has its own keywords, and `weight` for the `scale` of a norm."""

    def __init__(self, dtype, **unet):
        assert unet.pop("out_channels") == unet["in_channels"] and unet.pop("patch_size") == 1
        assert (unet.pop("image_model"), unet.pop("theta"), unet.pop("mlp_ratio")) == (
            "flux",
            10000,
            4,
        )
        assert unet.pop("qkv_bias") and unet.pop("hidden_size") == 16 * unet["num_heads"]
        names = dict(
            in_channels="in_channels", num_heads="num_attention_heads", depth="num_layers",
            depth_single_blocks="num_single_layers", vec_in_dim="pooled_projection_dim",
            context_in_dim="joint_attention_dim", axes_dim="axes_dims_rope",
            guidance_embed="guidance_embeds",
        )  # fmt: skip
        super().__init__(attention_head_dim=16, **{names[k]: v for k, v in unet.items()})
        self.to(dtype)

    def load_state_dict(self, state, **how):
        theirs = {name.replace("_norm.weight", "_norm.scale"): t for name, t in state.items()}
        assert len(theirs) == len(state) and not any(name.endswith("scale") for name in state)
        return super().load_state_dict(theirs, **how)


class ComfyConfig:  # comfy.supported_models.Flux
    memory_usage_factor, supported_inference_dtypes = 3.1, [torch.bfloat16, torch.float32]

    def __init__(self, unet_config):
        self.unet_config = unet_config.copy()

    def set_inference_dtype(self, dtype, manual_cast_dtype):
        self.unet_config["dtype"] = dtype

    def get_model(self, state_dict, prefix="", device=None):
        return SimpleNamespace(diffusion_model=ComfyFlux(**self.unet_config), model_config=self)

    def process_unet_state_dict(self, state):
        return {name.replace("_norm.scale", "_norm.weight"): t for name, t in state.items()}


class ComfyPatcher:  # comfy.model_patcher.ModelPatcher
    def __init__(self, model, load_device, offload_device):
        self.model = model

    def get_model_object(self, name):
        return getattr(self.model.model_config, name)


@pytest.fixture
def comfy(monkeypatch):
    cpu = torch.device("cpu")
    devices = ("get_torch_device", "unet_offload_device", "vae_device", "vae_offload_device")
    memory = {name: lambda: cpu for name in devices} | {
        "vae_dtype": lambda device=None, allowed_dtypes=(): torch.float32,
        "unet_manual_cast": lambda weight_dtype, device, supported_dtypes: None,
        "free_memory": lambda memory_required, device, keep_loaded=(): None,
    }
    parts = {
        "latent_formats": {"LatentFormat": type("LatentFormat", (), {})}, "model_management": memory,
        "model_patcher": {"ModelPatcher": ComfyPatcher}, "supported_models": {"Flux": ComfyConfig},
        "utils": {"load_torch_file": lambda path, safe_load=False: load_file(path)},
    }  # fmt: skip
    root = ModuleType("comfy")
    for name, members in parts.items():
        module = ModuleType(f"comfy.{name}")
        vars(module).update(members)
        setattr(root, name, module)
        monkeypatch.setitem(sys.modules, f"comfy.{name}", module)
    monkeypatch.setitem(sys.modules, "comfy", root)


def comfy_sample(patcher, noise, cond, steps: int):
    """KSampler: euler, simple, cfg 1. Latents leave it without the scale."""
    config, network = patcher.model.model_config, patcher.model.diffusion_model
    mu, even = math.exp(config.sampling_settings["shift"]), torch.arange(1, 10001) / 10000
    table = mu / (mu + (1 / even - 1))
    sigmas = [table[-1 - int(i * 10000 / steps)] for i in range(steps)] + [torch.tensor(0.0)]
    for now, then in pairwise(sigmas):
        noise = noise + (then - now) * network(noise, now.expand(1), *cond)
    return noise / config.latent_format.scale_factor


@torch.no_grad()
def test_the_comfyui_node_draws_the_picture_of_sample_py(tmp_path, monkeypatch, comfy):
    spec, model, autoencoder = exported_pipeline(tmp_path, "flux-dynamic")
    run_lora(monkeypatch, tmp_path, "comfyui")
    source = importlib.util.spec_from_file_location("node", tmp_path / "comfyui" / "__init__.py")
    node = importlib.util.module_from_spec(source)
    source.loader.exec_module(node)
    loader, empty = (cls() for cls in node.NODE_CLASS_MAPPINGS.values())
    assert [*node.NODE_CLASS_MAPPINGS] == ["DC-Gen comfyui", "DC-Gen empty latent"]
    patcher, vae = getattr(loader, loader.FUNCTION)()
    (latents,) = getattr(empty, empty.FUNCTION)(patcher, 64, 96, 2)
    assert latents["samples"].shape == (2, model.latent_channels, 96 // 8, 64 // 8)
    noise, text = sample.draw_noise([3], (model.latent_channels, 6, 4)), torch.randn(1, 5, 40)
    cond = (text, torch.randn(1, 32))
    images = vae.decode(comfy_sample(patcher, noise, (*cond, torch.full((1,), 3.5)), 5))
    sigmas = sample.timesteps(5, spec.schedule, tokens=(spec.size // 8) ** 2)
    ours = sample.decode(autoencoder, sample.sample(model, cond, noise, sigmas, 3.5))
    ours = ((ours.clamp(-1, 1) + 1) / 2).movedim(1, -1)
    print(f"largest difference {(images - ours).abs().max().item() * 255:.1e} of 255")
    assert images.std() > 0.01 and (images - ours).abs().max() * 255 < 1
    scaled = autoencoder.encode(ours.movedim(-1, 1) * 2 - 1)
    torch.testing.assert_close(vae.encode(ours) * 0.5, scaled, rtol=1e-4, atol=1e-4)


# ---- fp8 as ComfyUI's users have it


def fp8_file(path, model, layout: str) -> None:
    """The blocks' matrices in e4m3; scaled: times a scale a layer, in ComfyUI's old or new names."""
    state, marks = {}, {"scaled": {"scaled_fp8": torch.zeros(2)}}.get(layout, {})
    for name, tensor in model.state_dict().items():
        layer, leaf = name.rsplit(".", 1)
        if "_blocks." not in name or tensor.dim() < 2:
            state[name] = tensor
            continue
        scale = torch.tensor(1.0) if layout in ("plain", "checkpoint") else tensor.abs().max() / 448
        state[name] = (tensor / scale).to(torch.float8_e4m3fn)
        if layout == "scaled":
            marks |= {f"{layer}.scale_weight": scale, f"{layer}.scale_input": torch.ones(1)}
        if layout == "new":
            marks |= {f"{layer}.weight_scale": scale, f"{layer}.comfy_quant": torch.zeros(9).byte()}
        if layout == "int8":
            state[name] = (tensor / scale).to(torch.int8)
            marks[f"{layer}.weight_scale"] = scale
    state |= marks
    if layout == "mixed":  # parts of one layer of ours
        state = export.to_diffusers(model)
        fp8 = {n: t.to(torch.float8_e4m3fn) for n, t in state.items() if "to_q.w" in n}
        state |= {name: tensor.bfloat16() for name, tensor in state.items()} | fp8
    if layout == "checkpoint":
        state = {f"model.diffusion_model.{name}": tensor for name, tensor in state.items()}
        state |= {"vae.decoder.x": torch.ones(1), "text_encoders.t5xxl.y": torch.ones(1)}
    weights.save(path, state, {"config": json.dumps(model.config)})


@pytest.mark.parametrize("layout, tolerance", [
    ("plain", 0.1), ("checkpoint", 0.1), ("scaled", 0.1), ("new", 0.1), ("mixed", 0.1), ("int8", None),
])  # fmt: skip
@torch.no_grad()
def test_fp8_files_of_comfyui_load(tmp_path, layout, tolerance):
    torch.manual_seed(0)
    model = Flux(**TINY["flux"][1] | ALIGNED["flux"])
    fp8_file(tmp_path / "x.safetensors", model, layout)
    if tolerance is None:
        with pytest.raises(script.UserError, match="I8 with scales .*: wanted 16 bits, or fp8"):
            Flux.from_pretrained(tmp_path / "x.safetensors")
        return
    args, again = inputs(model), Flux.from_pretrained(tmp_path / "x.safetensors")
    assert error(again(*args), model(*args)) < tolerance
    weight, stored = (m.single_blocks[0].linear1.weight for m in (model, again))
    assert 0 < error(stored, weight) < 0.05
