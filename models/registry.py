"""What a model is called and made of, known before any of its weights is read.

What a `Spec` holds belongs together: by another schedule a model draws pictures, but worse ones.
"""

from dataclasses import dataclass, replace
from pathlib import Path

import torch

from models import flux, hub, nvfp4, sana, schedulers, weights
from models.identity import placed
from models.script import UserError
from models.weights import Device


@dataclass(frozen=True)
class Spec:
    transformer: str  # a preset, a file, a folder or a hub id
    autoencoder: str  # likewise; of a pipeline: its vae
    text_encoder: str  # kind of encoder in models/text.py: toy | sana-toy | flux | schnell | sana
    pipeline: str  # where the text encoder is: a pipeline's folder or hub id, or the toy's preset
    schedule: str  # kind of sample.timesteps
    solver: str  # of sample.sample: euler | ab2 | dpm
    steps: int
    guidance: float
    size: int  # pixels a side
    shift: float | None = None  # replaces the schedule's ratio r
    stage: str = ""  # align | lora: a run on top of a base; merged | quant: ours, complete

    @property
    def is_toy(self) -> bool:
        return self.text_encoder in ("toy", "sana-toy")

    @property
    def uses_cfg(self) -> bool:
        return self.text_encoder in ("sana", "sana-toy")  # of FLUX guidance is an input


TOY = dict(text_encoder="toy", pipeline="text-toy", schedule="flux", solver="euler", steps=16)
TOY |= dict(guidance=4.0, size=128)
SANA_TOY = dict(TOY, text_encoder="sana-toy", schedule="sana-euler")
FLUX = dict(text_encoder="flux", schedule="flux", solver="euler", steps=28, guidance=3.5, size=1024)
SANA = dict(text_encoder="sana", schedule="sana-dpm", solver="dpm", steps=20, guidance=4.5)
PRESETS = flux.PRESETS | sana.PRESETS
DC_GEN = {32: "dc-gen-flux-1k", 128: "dc-gen-flux-4k"}  # by channels of the latents
SANA_1K = "Efficient-Large-Model/Sana_1600M_1024px_BF16_diffusers"
MODELS = {
    "flux-toy": dict(TOY, autoencoder="flux-vae-toy", shift=4.0),
    "dc-gen-toy": dict(TOY, autoencoder="dc-ae-f32c32-toy", shift=2.0, stage="lora"),
    "sana-toy": dict(SANA_TOY, autoencoder="dc-ae-f32c32-toy", shift=2.0),
    "flux-dev": FLUX,
    "flux-krea": dict(FLUX, guidance=4.5),
    "flux-schnell": dict(FLUX, text_encoder="schnell", schedule="schnell", steps=4),
    "dc-gen-flux-1k": dict(FLUX, schedule="dc-gen-1k", steps=20),
    "dc-gen-flux-4k": dict(FLUX, size=4096, steps=20),
    "dc-gen-flux-anyflow": dict(FLUX, schedule="anyflow", steps=4),
}
MODELS |= {
    name: dict(SANA, size=32 * side, shift=6.0 if side == 128 else 3.0)
    for name, row in sana.PRESETS.items()
    if (side := row.get("config", {}).get("sample_size"))  # of the latents it was trained for
}
MODELS["dc-gen-sana-f64c128"] |= dict(size=1024, pipeline=SANA_1K, autoencoder="dc-ae-f64c128-1.5")


def describe(model: str, autoencoder: str = "") -> Spec:
    """The Spec of whatever --model accepts. A given `autoencoder` replaces the model's own."""
    path = Path(placed(model))
    try:
        if path.exists():
            is_pipeline = (path / "model_index.json").exists()
            spec = describe_pipeline(path, str(path)) if is_pipeline else describe_weights(path)
        elif model in MODELS:
            own = dict.fromkeys(("autoencoder", "pipeline"), PRESETS[model].get("hub", ""))
            spec = Spec(**own | {"transformer": model} | MODELS[model])
        elif hub.is_hub_id(model):
            wanted = ["model_index.json", "transformer/config.json", "scheduler/*.json"]
            spec = describe_pipeline(hub.download(model, wanted), model)
        else:
            raise UserError(f"{model!r} is no file, folder or name; names: {', '.join(MODELS)}")
    except (TypeError, AttributeError) as error:  # JSON, but of other types
        raise UserError(f"{model}: its config is none of diffusers ({error})") from None
    return replace(spec, autoencoder=placed(autoencoder or spec.autoencoder))


def describe_pipeline(folder: Path, source: str) -> Spec:
    """A diffusers pipeline, by its configs; of one on the hub nothing else is there yet."""
    network = weights.read_json(folder / "transformer" / "config.json")
    if "_dc_gen" in network:  # written by lora.py --export diffusers
        return replace(describe_run(network["_dc_gen"], source), autoencoder=source)
    schedule, solver, shift = schedulers.read(folder, network.get("_class_name"), source)
    here = weights.open_checkpoint(folder, "transformer") if folder == Path(source) else None
    spec = nearest(here.shapes if here else {}, network)
    own = dict.fromkeys(("transformer", "autoencoder", "pipeline"), source)
    if spec.uses_cfg:
        stride = 64 if network.get("in_channels") == 128 else 32
        own["size"] = stride * (0 + network.get("sample_size", 32))  # TypeError: no number
    else:  # diffusers gives T5 512 tokens, also for schnell
        own["text_encoder"] = "flux"
    if spec.schedule not in ("dc-gen-1k", "anyflow"):  # theirs, whatever the scheduler says
        own |= dict(schedule=schedule, solver=solver, shift=shift)
    return replace(spec, **own)


def describe_weights(path: Path) -> Spec:
    """A run of ours, whose header (exported: config.json) names its base, or weights alone."""
    checkpoint = weights.open_checkpoint(path, "transformer")
    config = checkpoint.config or {}
    if run := checkpoint.metadata if checkpoint.is_run else config.get("_dc_gen"):
        return describe_run(run, str(path))
    if config.get("joint_attention_dim", 4096) != 4096:  # T5's width
        return replace(describe("flux-toy"), transformer=str(path))
    is_gemmas = config.get("caption_channels", 2304) == 2304
    spec = nearest(checkpoint.shapes, config) if is_gemmas else describe("sana-toy")
    return replace(spec, transformer=str(path))


def describe_run(run: dict[str, str], source: str) -> Spec:
    """By what its header says, or its export's config.json; older runs lack the size."""
    try:
        if run.get("stage") == "quant":  # complete without its base
            spec = weights.parse_json(run["spec"], f"the header of {source}")
            return Spec(**spec | {"transformer": source, "stage": "quant"})
        base = Path(run["base"])
        if base.exists() and weights.open_checkpoint(base, "transformer").is_run:
            raise UserError(f"{base} is a run itself, wanted a complete model")
        kinds = {"schedule": str, "shift": float, "size": int}
        own = {name: kind(run[name]) for name, kind in kinds.items() if name in run}
        spec = describe(run["base"], run["autoencoder"])
        return replace(spec, transformer=source, stage=run.get("stage", "merged"), **own)
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        cause = f"its base or autoencoder is not found ({error}): mend that, or make it again"
        raise UserError(f"{source}: {cause}") from None


def nearest(shapes: dict[str, tuple[int, ...]], config: dict) -> Spec:
    """The model nearest to a transformer, by its config and the shapes of its tensors."""
    seen = flux.config_from_shapes(shapes)
    if "in_channels" in seen or "num_single_layers" in config:
        config = seen | config
        name = "flux-dev" if config["guidance_embeds"] else "flux-schnell"
        name = DC_GEN.get(config.get("in_channels"), name)
        return describe("dc-gen-flux-anyflow" if config.get("gate_value") is not None else name)
    config = config or sana.config_from_shapes(shapes) or {}
    presets = {name: row["config"] for name, row in sana.PRESETS.items() if "config" in row}
    fits = {name: row for name, row in presets.items() if row.items() <= config.items()}
    return describe(max(fits, key=lambda name: len(fits[name]), default="sana-1.6b"))


def load_transformer(
    spec: Spec, folder: str, device: Device, dtype: torch.dtype, adapters: str = ""
) -> torch.nn.Module:
    if spec.stage == "quant":
        if adapters:
            raise UserError(f"--adapter on {spec.transformer}, in 4 bits: wanted it in quant.py")
        return nvfp4.load(spec.transformer, device, dtype)
    cls = sana.Sana if spec.uses_cfg else flux.Flux
    given = dict(weights=folder or None, adapters=adapters)
    return cls.from_pretrained(spec.transformer, device, dtype, **given).eval()


def open_run(spec: Spec, folder: str) -> weights.Checkpoint:
    """The files of a transformer; of a run what it trained, and its header."""
    path, _ = hub.locate(spec.transformer, PRESETS, folder or None, "transformer")
    return weights.open_checkpoint(path, "transformer")
