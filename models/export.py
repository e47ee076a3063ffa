"""What other programs load of a finished run.

What    diffusers    a pipeline's folder: transformer/ (merged), vae/, scheduler/ with the run's
                     shift and model_index.json; its text encoders are the base's. `how_to` says
                     how stock diffusers draws with it. pytorch_lora_weights.safetensors is the
                     LoRA alone, for a transformer that has the run's embedder and head.
        peft         an adapter folder, for PeftModel.from_pretrained of such a transformer.
        comfyui      a folder for ComfyUI/custom_nodes: the merged FLUX in one file of BFL's names,
                     vae/, and the node that loads both (models/comfyui_node.py), as ComfyUI's own
                     loader takes every FLUX for one of 16 channels in 2 x 2 patches.
        comfyui-fp8  the same with the blocks' matrices in e4m3, half the memory.
        The embedder and the head have other shapes than the base's, so no LoRA can carry them:
        embedder_head.safetensors holds them, for load_state_dict(..., strict=False).
Clients sample.py and align.py open the folder, its transformer/, and comfyui's file: config.json
        (or the file's header) names base, autoencoder, shift and size under `_dc_gen`.
How     One layer of ours is several of diffusers with their rows stacked. Each of them gets the
        same A and its own rows of B. B is multiplied by alpha / rank, since loaders may take
        alpha to be the rank.
"""

import json
import re
import shutil
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor, nn

from models import flux, sana, weights
from models.flux import Flux
from models.registry import Spec
from models.script import UserError
from models.weights import Checkpoint

KINDS = ("diffusers", "peft", "comfyui", "comfyui-fp8")
TEXT = {  # the parts of a pipeline that stay the base's
    "FluxPipeline": dict(
        text_encoder="CLIPTextModel", tokenizer="CLIPTokenizer",
        text_encoder_2="T5EncoderModel", tokenizer_2="T5TokenizerFast",
    ),
    "SanaPipeline": dict(text_encoder="Gemma2Model", tokenizer="GemmaTokenizerFast"),
}  # fmt: skip
DCAE_NAMES = (  # our name -> that of diffusers' AutoencoderDC, rule after rule; back: dcae.py
    (r"^encoder\.stages", "encoder.down_blocks"),
    (r"^decoder\.stages", "decoder.up_blocks"),
    (r"(blocks\.\d+\.\d+)\.(weight|bias)$", r"\1.conv.\2"),  # a step down or up
    (r"\.mlp\.", ".conv_out."),
    (r"\.attn\.norm\.", ".attn.norm_out."),
    (r"\.attn\.proj\.", ".attn.to_out."),
    (r"\.multiscale\.(\d+)\.0\.", r".to_qkv_multiscale.\1.proj_in."),
    (r"\.multiscale\.(\d+)\.1\.", r".to_qkv_multiscale.\1.proj_out."),
)
NODE = Path(__file__).with_name("comfyui_node.py")
SHARD = 5 * 10**9  # bytes a file, as in diffusers
LORA = (".lora_A", ".lora_B")

# ---- names


def diffusers_names(model: nn.Module) -> tuple[str, dict[str, tuple]]:
    """(class, {our tensor: (diffusers' tensors, how they are joined)})."""
    ours = model.state_dict()
    if isinstance(model, Flux):
        return "FluxTransformer2DModel", flux.name_rows(ours, ["x_embedder.weight"])
    return "SanaTransformer2DModel", sana.name_rows(ours, ["patch_embed.proj.weight"])


def split(model: nn.Module, tensor: Tensor, row: tuple) -> dict[str, Tensor]:
    """diffusers' tensors by name: the inverse of joining the parts of `row` to ours."""
    parts, join = row
    if join is flux.swap_halves:
        return {parts[0]: flux.swap_halves(tensor)}  # its own inverse
    if len(parts) == 4:  # q, k and v are as wide as the model, the rest is the MLP's
        width = model.config["num_attention_heads"] * model.config["attention_head_dim"]
        return dict(zip(parts, tensor.split([width] * 3 + [len(tensor) - 3 * width])))
    return dict(zip(parts, tensor.chunk(len(parts))))


def to_diffusers(model: nn.Module, names: Iterable[str] | None = None) -> dict[str, Tensor]:
    """The state dict, or the tensors of these names, under diffusers' names."""
    state, (_, rows) = model.state_dict(), diffusers_names(model)
    theirs = {}
    for name in state if names is None else names:
        theirs |= split(model, state[name], rows[name])
    return theirs


def diffusers_lora(model: nn.Module, run: Checkpoint) -> dict[str, tuple[Tensor, Tensor]]:
    """{diffusers' layer: (A (r, in), alpha / r * B (out, r))}; empty if the run has no LoRA."""
    _, rows = diffusers_names(model)
    pairs = {}
    for layer in (n.removesuffix(".lora_A") for n in run.shapes if n.endswith(".lora_A")):
        down, up = run.get(f"{layer}.lora_A").float(), run.get(f"{layer}.lora_B").float()
        up = up * (run.alpha / len(down))
        is_conv = model.get_parameter(f"{layer}.weight").dim() == 4  # 1 x 1: so are A and B
        for theirs, piece in split(model, up, rows[f"{layer}.weight"]).items():
            pair = (down[..., None, None], piece[..., None, None]) if is_conv else (down, piece)
            pairs[theirs.removesuffix(".weight")] = pair
    return pairs


def dcae_to_diffusers(model: nn.Module) -> dict[str, Tensor]:
    """A DCAE's tensors under the names of diffusers' AutoencoderDC."""
    rules, theirs = [*DCAE_NAMES], {}
    for end in ("encoder.conv_in", "decoder.conv_out"):
        if model.config[f"{end[:7]}_layers_per_block"][0] == 0:  # it takes the empty stage's step
            rules.append((rf"^({end})\.", r"\1.conv."))
    for name, tensor in model.state_dict().items():
        for ours, official in rules:
            name = re.sub(ours, official, name)
        if ".attn.qkv." in name:  # a 1x1 convolution here, three linear layers there
            parts = zip("qkv", tensor.flatten(1).chunk(3))
            theirs |= {name.replace(".qkv.", f".to_{part}."): rows for part, rows in parts}
        else:
            theirs[name] = tensor.flatten(1) if ".attn.to_out." in name else tensor
    return theirs


# ---- files


def write(
    kind: str, spec: Spec, model: nn.Module, autoencoder: nn.Module, folder: Path
) -> list[Path]:
    """Export the run that `spec` describes; returns the files. model: merged, on the CPU."""
    if kind not in KINDS:
        raise UserError(f"--export {kind} is unknown; one of {', '.join(KINDS)}")
    if "encoder_block_types" not in autoencoder.config:
        raise UserError(f"--export {kind}: {spec.autoencoder} is no DC-AE, all that they read")
    run = weights.open_checkpoint(Path(spec.transformer))
    if kind.startswith("comfyui"):
        facts = diffusers_config(model, run) | {"_shift": spec.shift}
        return write_comfyui(model, facts, autoencoder, folder, is_fp8=kind.endswith("fp8"))
    pairs = diffusers_lora(model, run)
    if kind == "peft" and not pairs:
        raise UserError(f"{run.path} holds no LoRA: it was trained in full, export it merged")
    files = []
    if pairs:
        embedder_head = [name for name in run.shapes if not name.endswith(LORA)]
        tensors = to_diffusers(model, embedder_head)
        files.append(save(folder / "embedder_head.safetensors", tensors))
        if kind == "peft":
            return [*files, *write_peft(pairs, folder)]
        tensors = lora_tensors(pairs, "transformer")
        files.append(save(folder / "pytorch_lora_weights.safetensors", tensors))
    files += write_transformer(model, run, folder / "transformer")
    return [*files, *write_autoencoder(autoencoder, folder), *write_pipeline(model, spec, folder)]


def write_comfyui(
    model: nn.Module, config: dict, autoencoder: nn.Module, folder: Path, is_fp8: bool
) -> list[Path]:
    """BFL's names are ours. The autoencoder is in diffusers' format: ComfyUI has no DC-AE."""
    if not isinstance(model, Flux) or model.config["position_stride"] > 1:
        found = "no FLUX, or one whose positions are spread, as the toy's are"
        raise UserError(f"--export comfyui: this model is {found}: wanted --export diffusers")

    def stored(name: str, tensor: Tensor) -> Tensor:
        if not is_fp8 or "_blocks." not in name or tensor.dim() < 2:
            return tensor
        return tensor.clamp(-448, 448).to(torch.float8_e4m3fn)  # beyond 448 it knows NaN alone

    path = folder / "transformer.safetensors"
    tensors = {name: stored(name, tensor) for name, tensor in model.state_dict().items()}
    weights.save(path, tensors, {"format": "pt", "config": json.dumps(config)})
    weights.write_whole(folder / "__init__.py", lambda file: shutil.copyfile(NODE, file))
    return [path, *write_autoencoder(autoencoder, folder), folder / "__init__.py"]


def lora_tensors(pairs: dict[str, tuple[Tensor, Tensor]], prefix: str) -> dict[str, Tensor]:
    tensors = {}
    for layer, (down, up) in pairs.items():
        tensors[f"{prefix}.{layer}.lora_A.weight"] = down
        tensors[f"{prefix}.{layer}.lora_B.weight"] = up
    return tensors


def write_peft(pairs: dict[str, tuple[Tensor, Tensor]], folder: Path) -> list[Path]:
    rank = len(next(iter(pairs.values()))[0])
    config = dict(peft_type="LORA", r=rank, lora_alpha=rank, target_modules=sorted(pairs))
    config |= dict(bias="none", lora_dropout=0.0, inference_mode=True, task_type=None)
    file = save(folder / "adapter_model.safetensors", lora_tensors(pairs, "base_model.model"))
    return [file, save_json(folder / "adapter_config.json", config)]


def write_transformer(model: nn.Module, run: Checkpoint, folder: Path) -> list[Path]:
    """config.json and shards, as diffusers' save_pretrained lays them out."""
    from huggingface_hub import split_torch_state_dict_into_shards

    stem = "diffusion_pytorch_model"
    # First, so that an export which is interrupted never mixes its shards with an older one's.
    for old in folder.glob(f"{stem}*"):
        old.unlink()
    state = to_diffusers(model)
    plan = split_torch_state_dict_into_shards(
        state, filename_pattern=stem + "{suffix}.safetensors", max_shard_size=SHARD
    )
    files = [
        save(folder / file, {name: state[name] for name in names})
        for file, names in plan.filename_to_tensors.items()
    ]
    if plan.is_sharded:
        index = dict(metadata=plan.metadata, weight_map=plan.tensor_to_filename)
        files.append(save_json(folder / f"{stem}.safetensors.index.json", index))
    return [*files, save_json(folder / "config.json", diffusers_config(model, run))]


def diffusers_config(model: nn.Module, run: Checkpoint) -> dict:
    """diffusers' keys, and under `_dc_gen`, which diffusers skips, what sample.py needs."""
    kept = ("base", "autoencoder", "schedule", "shift", "size")
    facts = {key: run.metadata[key] for key in kept if key in run.metadata}
    config = dict(model.config)
    facts["position_stride"] = config.pop("position_stride", 1)
    config.pop("gate_value", None)  # a flow map's, which no run is made of
    # SanaPipeline counts with it, so None for "as many as in_channels" will not do.
    config["out_channels"] = config["out_channels"] or config["in_channels"]
    name, _ = diffusers_names(model)
    return {"_class_name": name, **config, "_dc_gen": facts}


def write_autoencoder(autoencoder: nn.Module, folder: Path) -> list[Path]:
    config = {"_class_name": "AutoencoderDC", **autoencoder.config}
    file = folder / "vae" / "diffusion_pytorch_model.safetensors"
    return [
        save(file, dcae_to_diffusers(autoencoder)),
        save_json(file.parent / "config.json", config),
    ]


def scheduler_config(spec: Spec) -> dict:
    """The scheduler of diffusers that visits the timesteps of sample.py."""
    if spec.solver == "dpm":
        flow = dict(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=spec.shift)
        return {"_class_name": "DPMSolverMultistepScheduler", **flow}
    # Without a shift of its own the run follows FLUX's at each size: so does diffusers.
    how = {"shift": spec.shift} if spec.shift else {"use_dynamic_shifting": True}
    return {"_class_name": "FlowMatchEulerDiscreteScheduler", **how}


def write_pipeline(model: nn.Module, spec: Spec, folder: Path) -> list[Path]:
    scheduler, (network, _) = scheduler_config(spec), diffusers_names(model)
    name = network.replace("Transformer2DModel", "Pipeline")
    ours = dict(transformer=network, vae="AutoencoderDC", scheduler=scheduler["_class_name"])
    index = {part: ["diffusers", cls] for part, cls in ours.items()}
    index |= {part: ["transformers", cls] for part, cls in TEXT[name].items()}
    return [
        save_json(folder / "scheduler" / "scheduler_config.json", scheduler),
        save_json(folder / "model_index.json", {"_class_name": name, **index}),
    ]


def save(path: Path, tensors: dict[str, Tensor]) -> Path:
    # Copies: q, k and v share one A, and safetensors refuses tensors that share memory.
    weights.save(path, {name: t.clone() for name, t in tensors.items()}, {"format": "pt"})
    return path


def save_json(path: Path, document: dict) -> Path:
    weights.write_whole(path, lambda file: file.write_text(json.dumps(document, indent=1)))
    return path


# ---- how to draw with it


def how_to(
    kind: str, spec: Spec, model: nn.Module, autoencoder: nn.Module, base: str, folder: Path
) -> str:
    """What a person does next. base: the pipeline that holds the text encoders."""
    shift = f"shift {spec.shift:.3g}" if spec.shift else "FLUX's shift"
    facts = f"sample with {spec.autoencoder}, {shift}, {spec.size} pixels"
    if kind.startswith("comfyui"):
        nodes = f"euler, simple, cfg 1, FluxGuidance {spec.guidance:g}, T5TokenizerOptions 512"
        return f"{facts}\nmove {folder} to ComfyUI/custom_nodes, pip install diffusers; {nodes}"
    if (spaced := model.config.get("position_stride", 1)) > 1:
        return f"{facts}; token i sits at {spaced} * i + {(spaced - 1) / 2:g} (img_ids)"
    if kind == "peft" or spec.is_toy:  # the toy's text encoder is not in diffusers
        return facts
    is_flux, dtype = isinstance(model, Flux), "torch_dtype=torch.bfloat16"
    scheduler, (network, _) = scheduler_config(spec), diffusers_names(model)
    name, stride = scheduler.pop("_class_name"), autoencoder.stride
    scheduler = f"{name}({', '.join(f'{k}={v!r}' for k, v in scheduler.items())})"
    size = f"height={spec.size}, width={spec.size}, num_inference_steps={spec.steps}"
    call = f'pipe("a fox in the snow", {size}, guidance_scale={spec.guidance}'
    lines = f"""
import torch, diffusers
vae = diffusers.AutoencoderDC.from_pretrained("{folder}/vae", {dtype}).to("cuda")
net = diffusers.{network}.from_pretrained("{folder}/transformer", {dtype})
parts = dict(transformer=net, scheduler=diffusers.{scheduler}, {dtype})
"""
    if not is_flux:
        return f"""{facts}; in stock diffusers:
{lines}\
pipe = diffusers.SanaPipeline.from_pretrained("{base}", vae=vae, **parts).to("cuda")
image = {call}, use_resolution_binning=False).images[0]
image.save("fox.png")
"""
    return f"""{facts}; in stock diffusers, to which h x w tokens of C are 2h x 2w latents of C / 4:
{lines}\
pipe = diffusers.FluxPipeline.from_pretrained("{base}", vae=None, **parts).to("cuda")
pipe.vae_scale_factor = {stride // 2}
tokens = {call}, output_type="latent").images
image = vae.decode(tokens.mT.unflatten(2, ({spec.size // stride}, -1)) / vae.config.scaling_factor)
pipe.image_processor.postprocess(image.sample.detach())[0].save("fox.png")
"""
