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
        nunchaku     of quant.py: transformer/ in 4 bits, for diffusers on Blackwell.
        The embedder and the head have other shapes than the base's, so no LoRA can carry them:
        embedder_head.safetensors holds them, for load_state_dict(..., strict=False).
Clients sample.py and align.py open the folder, its transformer/, and comfyui's file: config.json
        (or the file's header) names base, autoencoder, shift and size under `_dc_gen`.
How     One layer of ours is several of diffusers with their rows stacked. Each of them gets the
        same A and its own rows of B. B is multiplied by alpha / rank, since loaders may take
        alpha to be the rank.
"""

import json
import math
import re
import shutil
from collections.abc import Iterable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models import flux, nvfp4, sana, weights
from models.flux import Flux
from models.nvfp4 import QuantLinear
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
    if "adapters" in run.metadata:  # it is a LoRA of another base than other programs have
        return {}
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
        raise UserError(
            f"{run.path} holds no LoRA: it was trained in full or on an --adapter, export it merged"
        )
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
    return write_shards(to_diffusers(model), diffusers_config(model, run), folder)


def write_shards(state: dict[str, Tensor], config: dict, folder: Path) -> list[Path]:
    """config.json and shards, as diffusers' save_pretrained lays them out."""
    from huggingface_hub import split_torch_state_dict_into_shards

    stem = "diffusion_pytorch_model"
    # First, so that an export which is interrupted never mixes its shards with an older one's.
    for old in folder.glob(f"{stem}*"):
        old.unlink()
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
    return [*files, save_json(folder / "config.json", config)]


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


# ---- nunchaku
#
# SVDQW4A4Linear of diffusers 0.42.1 computes eq. (3) of models/nvfp4.py in nunchaku's kernels, with
# lambda = 1 / s for s. Its tensors lie in the order in which the kernels' threads read them (after
# deepcompressor, MIT HAN Lab, Apache 2.0), so that their shapes are names of sizes only. Its 4-bit
# layer for modulations is INT4, so ours are written in 16 bits.

ORDER = {  # tensor: (pieces of its rows, pieces of its columns, the order of all these)
    "qweight": ((-1, 8, 2, 8), (-1, 2, 4, 4), (0, 4, 1, 3, 6, 2, 5, 7)),  # columns: bytes
    "wscales": ((-1, 4, 4, 8), (-1, 4), (0, 4, 3, 2, 1, 5)),
    "smooth_factor": ((-1, 8, 2, 4, 2), (1,), (0, 1, 3, 2, 4, 5)),
    "bias": ((-1, 8, 2, 4, 2), (1,), (0, 1, 3, 2, 4, 5)),
    "proj_down": ((-1, 2, 8), (-1, 2, 4, 2), (3, 0, 2, 5, 1, 4, 6)),  # of (r, K)
    "proj_up": ((-1, 2, 8), (-1, 2, 4, 2), (0, 3, 2, 5, 1, 4, 6)),
}
TILE = 128  # whole tiles of rows and columns are what the kernels take


def in_order(kind: str, matrix: Tensor, shape: tuple[int, ...]) -> Tensor:
    """(rows, columns) in the order of the kernels' threads, under the nominal shape."""
    rows, columns, axes = ORDER[kind]
    return matrix.unflatten(1, columns).unflatten(0, rows).permute(axes).reshape(shape)


def two_factors(scale: float) -> tuple[float, float]:
    """bf16 numbers, the first in [1, 2), whose product is the scale to 2^-12 or, mostly, 2^-15."""
    first = 1 + torch.arange(128) / 128
    second = (scale / first).bfloat16().float()
    best = (first * second - scale).abs().argmin()
    return first[best].item(), second[best].item()


def svdq_tensors(layer: QuantLinear, part: dict[str, Tensor], rank: int) -> dict[str, Tensor]:
    """SVDQW4A4Linear's tensors. part: packed, scales, up and bias in its rows of our layer."""
    n, k = len(part["packed"]), layer.in_features
    if n % TILE or k % TILE:
        raise UserError(f"--export nunchaku: a layer is {n} x {k}, wanted multiples of {TILE}")
    (channel, whole), missing = two_factors(layer.tensor_scale), rank - layer.rank
    down = F.pad(layer.down, (0, 0, 0, missing)) if layer.rank else torch.zeros(rank, k)
    up = F.pad(part["up"], (0, missing)) if layer.rank else torch.zeros(n, rank)
    tensors = {
        "qweight": in_order("qweight", part["packed"].view(torch.int8), (n, k // 2)),
        "wscales": in_order("wscales", part["scales"], (k // nvfp4.BLOCK, n)),
        "smooth_factor": in_order("smooth_factor", 1 / layer.smooth.float()[:, None], (k,)),
        "bias": in_order("bias", part["bias"][:, None], (n,)),
        "proj_down": in_order("proj_down", down, (k, rank)),
        "proj_up": in_order("proj_up", up, (n, rank)),
        "wcscales": torch.full((n,), channel),
        "wtscale": torch.full((1,), whole),
    }
    return {n: t.bfloat16() if t.dtype == torch.float32 else t for n, t in tensors.items()}


def to_nunchaku(model: nn.Module) -> tuple[dict[str, Tensor], dict]:
    """(state dict, quantization_config) of diffusers. model: of nvfp4.load, in bf16."""
    layers = {n: m for n, m in model.named_modules() if isinstance(m, QuantLinear)}
    kept = [n for n in model.state_dict() if n.rpartition(".")[0] not in layers]
    state, (_, rows), targets = to_diffusers(model, kept), diffusers_names(model), []
    rank = 16 * max(1, *(math.ceil(layer.rank / 16) for layer in layers.values()))  # one for all
    for name, layer in layers.items():
        row = rows[f"{name}.packed"]
        theirs = [part.removesuffix(".packed") for part in row[0]]
        if layer.activations == 16:
            weight = nvfp4.unpack(layer.packed, layer.scales, layer.bias.dtype)
            state[f"{theirs[0]}.weight"] = weight[:, : layer.in_features] * layer.tensor_scale
            state[f"{theirs[0]}.bias"] = layer.bias
            continue
        stacked = ("packed", "scales", "bias") + ("up",) * bool(layer.rank)
        pieces = [split(model, getattr(layer, kind), row).values() for kind in stacked]
        for target, piece in zip(theirs, zip(*pieces)):
            tensors = svdq_tensors(layer, dict(zip(stacked, piece)), rank)
            state |= {f"{target}.{kind}": tensor for kind, tensor in tensors.items()}
        targets += theirs
    svdq = dict(precision="nvfp4", group_size=nvfp4.BLOCK, rank=rank, targets=targets)
    return state, dict(quant_method="nunchaku_lite", compute_dtype="bfloat16", svdq_w4a4=svdq)


def write_quantized(kind: str, folder: Path) -> None:
    """quant.py --export: folder/nunchaku/transformer, of folder/quant.safetensors."""
    saved, target = folder / "quant.safetensors", folder / "nunchaku" / "transformer"
    if kind != "nunchaku":
        raise UserError(f"--export {kind} is unknown; wanted nunchaku")
    if not saved.exists():
        raise UserError(f"{saved} is missing: run quant.py with the same --model or --out first")
    model, run = nvfp4.load(saved, "cpu", torch.bfloat16), weights.open_checkpoint(saved)
    if not isinstance(model, Flux):  # 1x1 convolutions, and 2240 channels
        raise UserError("--export nunchaku is for FLUX: diffusers has no 4-bit layer for SANA's")
    state, quantization = to_nunchaku(model)
    config = diffusers_config(model, run) | {"quantization_config": quantization}
    files = [str(file) for file in write_shards(state, config, target)]
    call = f'FluxTransformer2DModel.from_pretrained("{target}", torch_dtype=torch.bfloat16)'
    print(f"in diffusers on Blackwell, with DIFFUSERS_TRUST_REMOTE_KERNELS=true: {call}")
    print(json.dumps(dict(stage="export", kind=kind, files=files)))
