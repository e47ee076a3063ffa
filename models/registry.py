"""What a model is called and made of, known before any of its weights is read.

`describe` turns whatever --model accepts into a `Spec`. Text encoder, transformer, autoencoder and
schedule belong together: with another schedule a model still draws pictures, but worse ones.
"""

import json
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from models import flux, nvfp4, sana, weights
from models.script import UserError


@dataclass(frozen=True)
class Spec:
    """What a model is called and made of, without its weights."""

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
    # "": a model of others; align | lora: a run on top of a base; merged, quant: a complete one
    stage: str = ""

    @property
    def is_toy(self) -> bool:
        return self.text_encoder in ("toy", "sana-toy")

    @property
    def uses_cfg(self) -> bool:
        """SANA: guidance extrapolates between two passes. FLUX takes guidance as an input."""
        return self.text_encoder in ("sana", "sana-toy")


TOY = dict(text_encoder="toy", pipeline="text-toy", schedule="flux", solver="euler", steps=16)
TOY |= dict(guidance=4.0, size=128)
SANA_TOY = dict(TOY, text_encoder="sana-toy", schedule="sana-euler")
FLUX = dict(text_encoder="flux", schedule="flux", solver="euler", steps=28, guidance=3.5, size=1024)
DC_GEN = dict(FLUX, steps=20)
SANA = dict(text_encoder="sana", schedule="sana-dpm", solver="dpm", steps=20, guidance=4.5)
SANA |= dict(size=1024, shift=3.0)
SANA_1K = "Efficient-Large-Model/Sana_1600M_1024px_BF16_diffusers"
MODELS = {
    "flux-toy": dict(TOY, autoencoder="flux-vae-toy", shift=4.0),
    "dc-gen-toy": dict(TOY, autoencoder="dc-ae-f32c32-toy", shift=2.0, stage="lora"),
    "sana-toy": dict(SANA_TOY, autoencoder="dc-ae-f32c32-toy", shift=2.0),
    "flux-dev": FLUX,
    "flux-krea": dict(FLUX, guidance=4.5),
    "flux-schnell": dict(FLUX, text_encoder="schnell", schedule="schnell", steps=4),
    "dc-gen-flux-1k": dict(DC_GEN, schedule="dc-gen-1k"),
    "dc-gen-flux-4k": dict(DC_GEN, size=4096),
    "dc-gen-flux-anyflow": dict(DC_GEN, schedule="anyflow", steps=4),
    "sana-0.6b-512": dict(SANA, size=512),
    "sana-0.6b": SANA,
    "sana-1.6b-512": dict(SANA, size=512),
    "sana-1.6b": SANA,
    "sana-1.6b-2k": dict(SANA, size=2048),
    "sana-1.6b-4k": dict(SANA, size=4096, shift=6.0),
    "sana-1.5-1.6b": SANA,
    "dc-gen-sana-f64c128": dict(SANA, pipeline=SANA_1K, autoencoder="dc-ae-f64c128-1.5"),
}


def describe(model: str, autoencoder: str = "") -> Spec:
    """The Spec of whatever --model accepts. A given `autoencoder` replaces the model's own."""
    path = Path(model)
    if path.exists():
        is_pipeline = (path / "model_index.json").exists()
        spec = describe_pipeline(path, str(path)) if is_pipeline else describe_weights(path)
    elif model in MODELS:
        hub = (flux.PRESETS | sana.PRESETS)[model].get("hub", "")
        spec = Spec(**{"transformer": model, "autoencoder": hub, "pipeline": hub} | MODELS[model])
    elif weights.is_hub_id(model):
        wanted = ["model_index.json", "transformer/config.json", "scheduler/*.json"]
        spec = describe_pipeline(weights.download(model, wanted), model)
    else:
        raise UserError(f"{model!r} is no file, no folder and no name; names: {', '.join(MODELS)}")
    return replace(spec, autoencoder=autoencoder or spec.autoencoder)


# (transformer, scheduler) of a diffusers pipeline -> our schedule and solver.
SCHEDULES = {
    ("FluxTransformer2DModel", "FlowMatchEulerDiscreteScheduler"): ("flux", "euler"),
    ("SanaTransformer2DModel", "FlowMatchEulerDiscreteScheduler"): ("sana-euler", "euler"),
    ("SanaTransformer2DModel", "DPMSolverMultistepScheduler"): ("sana-dpm", "dpm"),
}
# Another value of one of these makes another scheduler; settings that are not here do not matter.
STANDARD = dict(
    algorithm_type="dpmsolver++", solver_order=2, solver_type="midpoint", thresholding=False,
    prediction_type="flow_prediction", final_sigmas_type="zero", euler_at_final=False,
    use_flow_sigmas=True, use_lu_lambdas=False, use_karras_sigmas=False, use_beta_sigmas=False,
    use_exponential_sigmas=False, stochastic_sampling=False, invert_sigmas=False,
    shift_terminal=None, num_train_timesteps=1000, time_shift_type="exponential",
    base_shift=0.5, max_shift=1.15, base_image_seq_len=256, max_image_seq_len=4096,
)  # fmt: skip


def describe_pipeline(folder: Path, source: str) -> Spec:
    """A diffusers pipeline. Its scheduler must be one of ours: another makes other pictures."""
    network = weights.read_json(folder / "transformer" / "config.json")
    if "_dc_gen" in network:  # written by lora.py --export diffusers
        return replace(describe_run(network["_dc_gen"], source), autoencoder=source)
    scheduler = weights.read_json(folder / "scheduler" / "scheduler_config.json")
    classes = (network.get("_class_name"), scheduler.get("_class_name"))
    odd = [f"{k}={v}" for k, v in scheduler.items() if STANDARD.get(k, v) != v]
    if odd or classes not in SCHEDULES:
        found = f"{classes[0]} with {classes[1]} ({', '.join(odd)})"
        raise UserError(f"{source}: {found} is not known here")
    schedule, solver = SCHEDULES[classes]
    own = dict.fromkeys(("transformer", "autoencoder", "pipeline"), source)
    own |= {"schedule": schedule, "solver": solver}
    channels, shift = network.get("in_channels"), scheduler.get("shift", 1.0)
    if schedule != "flux":
        size = network.get("sample_size", 32) * (64 if channels == 128 else 32)
        shift = scheduler.get("flow_shift", shift)
        return replace(describe("sana-1.6b"), **own, size=size, shift=shift)
    is_local = folder == Path(source)  # from the hub come configs alone
    names = weights.open_checkpoint(folder, "transformer").shapes if is_local else network
    spec = describe_flux(channels, network.get("guidance_embeds", False), is_flow_map(names))
    if spec.schedule in ("dc-gen-1k", "anyflow"):  # whatever its scheduler says
        return replace(spec, **own | {"schedule": spec.schedule})
    # diffusers gives T5 512 tokens, also for schnell.
    shift = None if scheduler.get("use_dynamic_shifting") else shift
    return replace(spec, **own, text_encoder="flux", shift=shift)


def is_flow_map(names: Iterable[str]) -> bool:
    """Do these tensors (or keys of a config) belong to AnyFlow, which is told where a step ends?"""
    return any(re.search(r"delta_embedder|next_time_in|gate_value", name) for name in names)


def describe_flux(in_channels: int, is_guided: bool, is_map: bool) -> Spec:
    """A FLUX by its shape: DC-Gen's 1K model is the one with 32 channels, 4K has 128."""
    if is_map:
        return describe("dc-gen-flux-anyflow")
    names = {32: "dc-gen-flux-1k", 128: "dc-gen-flux-4k"}
    return describe(names.get(in_channels, "flux-dev" if is_guided else "flux-schnell"))


def describe_weights(path: Path) -> Spec:
    """A run of ours, whose header names base and autoencoder, or a transformer's weights alone."""
    checkpoint = weights.open_checkpoint(path, "transformer")
    header, config = checkpoint.metadata, checkpoint.config or {}
    # lora.py --export keeps the facts of a run in config.json.
    if run := header if checkpoint.is_run else config.get("_dc_gen"):
        return describe_run(run, str(path))
    return replace(describe_shapes(checkpoint.shapes, config), transformer=str(path))


def describe_run(run: dict[str, str], source: str) -> Spec:
    """The Spec of a run, by the facts that stand in its header or its export's config.json."""
    try:
        if run.get("stage") == "quant":  # complete without its base
            return Spec(**json.loads(run["spec"]) | {"transformer": source, "stage": "quant"})
        # Older runs lack the size or the schedule: the base's holds.
        kinds = {"schedule": str, "shift": float, "size": int}
        own = {name: kind(run[name]) for name, kind in kinds.items() if name in run}
        own |= {"transformer": source, "stage": run.get("stage", "merged")}
        return replace(describe(run["base"], run["autoencoder"]), **own)
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        lack = f"its base or autoencoder is not found ({error})"
        cure = "or its header is not of this version: make it again"
        raise UserError(f"{source}: {lack}, {cure}") from None


def describe_shapes(shapes: dict[str, tuple[int, ...]], config: dict) -> Spec:
    """A transformer by the names and shapes of its tensors: the model nearest to it."""
    for name, shape in shapes.items():
        if re.search(r"(img_in|x_embedder)\.weight$", name):  # FLUX: BFL's name, diffusers' name
            if config.get("joint_attention_dim", 4096) != 4096:  # not T5's width
                return describe("flux-toy")
            is_guided = any("guidance" in other for other in shapes)
            return describe_flux(shape[1], is_guided, is_flow_map(shapes))
    config = config or sana.config_from_shapes(shapes) or {}
    if config.get("caption_channels", 2304) != 2304:  # not Gemma's width
        return describe("sana-toy")
    presets = {name: row["config"] for name, row in sana.PRESETS.items() if "config" in row}
    fits = {name: row for name, row in presets.items() if row.items() <= config.items()}
    return describe(max(fits, key=lambda name: len(fits[name]), default="sana-1.6b"))


def load_transformer(
    spec: Spec, folder: str, device: str | torch.device, dtype: torch.dtype, adapters: str = ""
) -> nn.Module:
    """`folder` is the user's --weights, where presets are looked for instead of the hub."""
    if spec.stage == "quant":
        if adapters:
            raise UserError(f"--adapter on {spec.transformer}, in 4 bits: wanted it in quant.py")
        return nvfp4.load(spec.transformer, device, dtype)
    cls = sana.Sana if spec.uses_cfg else flux.Flux
    given = dict(weights=folder or None, adapters=adapters)
    return cls.from_pretrained(spec.transformer, device, dtype, **given).eval()


def open_run(spec: Spec, folder: str) -> weights.Checkpoint:
    """The file of a run: what it trained, and its header."""
    path, _ = weights.locate(spec.transformer, flux.PRESETS | sana.PRESETS, folder or None)
    return weights.open_checkpoint(path)


def text_source(spec: Spec, folder: str) -> str:
    """Where the text encoders are: a pipeline on the hub, or in the user's --weights folder."""
    if folder and not spec.is_toy and not Path(spec.pipeline).exists():
        return str(weights.in_folder(Path(folder), {"hub": spec.pipeline}))
    return spec.pipeline


def for_official(large: dict) -> Callable[[str], dict]:
    """Defaults for script.parse_config: `large` where --model is no toy."""
    return lambda model: {} if describe(model).is_toy else large
