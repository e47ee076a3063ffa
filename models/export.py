"""What other tools load of a finished run.

What    diffusers  transformer/ is the merged model, for FluxTransformer2DModel.from_pretrained or
                   SanaTransformer2DModel.from_pretrained; pytorch_lora_weights.safetensors is the
                   LoRA alone, for load_lora_adapter of a transformer that has the doors.
        peft       an adapter folder for PeftModel.from_pretrained on a transformer of diffusers'
                   that has the doors.
        comfyui    one file in the keys of ComfyUI and of kohya's scripts (FLUX).
Doors   The embedder and the head have other shapes than the base's, so no LoRA can carry them:
        doors.safetensors holds them in diffusers' names, for load_state_dict(..., strict=False).
How     One layer of ours is several of diffusers' whose rows are stacked. A LoRA of it is one for
        each: the same A, and its rows of B. alpha / rank is multiplied into B, so that a loader
        that takes alpha to be the rank is right.
"""

import json
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor, nn

from models import flux, sana, weights
from models.flux import Flux
from models.script import UserError
from models.weights import Checkpoint

KINDS = ("diffusers", "peft", "comfyui")
SHARD = 5 * 10**9  # bytes a file, as diffusers has it


def rows_of(model: nn.Module) -> dict[str, tuple]:
    """{our tensor: (diffusers' tensors, how they are joined)}."""
    if isinstance(model, Flux):
        return flux.name_rows(model.state_dict(), ["x_embedder.weight"])
    return sana.name_rows(model.state_dict(), ["patch_embed.proj.weight"])


def split(tensor: Tensor, parts: tuple[str, ...], width: int) -> list[Tensor]:
    """Rows for each part: q, k, v of `width` rows each, then what is left, if there are four."""
    if len(parts) == 4:
        return list(tensor.split([width] * 3 + [len(tensor) - 3 * width]))
    return list(tensor.chunk(len(parts)))


def to_diffusers(model: nn.Module, names: Iterable[str] | None = None) -> dict[str, Tensor]:
    """The state dict (or the part of these names) under diffusers' names."""
    state, rows = model.state_dict(), rows_of(model)
    width = model.config["num_attention_heads"] * model.config["attention_head_dim"]
    theirs = {}
    for name in state if names is None else names:
        parts, join = rows[name]
        pieces = split(state[name], parts, width)
        if join is flux.swap_halves:
            pieces = [flux.swap_halves(state[name])]  # its own inverse
        theirs |= dict(zip(parts, pieces))
    return theirs


def lora_pairs(run: Checkpoint) -> dict[str, tuple[Tensor, Tensor]]:
    """{our layer: (A (r, in), alpha / r * B (out, r))}."""
    stems = [n.removesuffix(".lora_A") for n in run.shapes if n.endswith(".lora_A")]
    if not stems:
        raise UserError(f"{run.path} holds no LoRA: it was trained in full, export it merged")
    pairs = {}
    for stem in stems:
        down, up = run.get(f"{stem}.lora_A").float(), run.get(f"{stem}.lora_B").float()
        pairs[stem] = (down, up * (float(run.metadata["alpha"]) / len(down)))
    return pairs


def diffusers_lora(model: nn.Module, run: Checkpoint) -> dict[str, tuple[Tensor, Tensor]]:
    """{diffusers' layer: (A, B)}, as 1x1 convolutions where theirs are."""
    rows = rows_of(model)
    width = model.config["num_attention_heads"] * model.config["attention_head_dim"]
    pairs = {}
    for stem, (down, up) in lora_pairs(run).items():
        parts, _ = rows[f"{stem}.weight"]
        is_conv = model.get_parameter(f"{stem}.weight").dim() == 4
        for part, piece in zip(parts, split(up, parts, width)):
            pair = (down, piece.contiguous())
            pair = tuple(half[..., None, None] for half in pair) if is_conv else pair
            pairs[part.removesuffix(".weight")] = pair
    return pairs


def write(kind: str, run_file: Path, model: nn.Module, folder: Path) -> list[Path]:
    """The files written. model: the merged one, on the CPU. UserError: no such kind."""
    if kind not in KINDS:
        raise UserError(f"--export {kind} is unknown; one of {', '.join(KINDS)}")
    run = weights.open_checkpoint(run_file)
    if kind == "comfyui":
        return [write_comfyui(model, run, folder)]
    has_lora = any(name.endswith(".lora_A") for name in run.shapes)
    # Before a file is written: for peft there has to be one.
    pairs = diffusers_lora(model, run) if has_lora or kind == "peft" else {}
    doors = [n for n in run.shapes if not n.endswith((".lora_A", ".lora_B"))]
    files = [save(folder / "doors.safetensors", to_diffusers(model, doors))]
    if kind == "peft":
        return [*files, *write_peft(pairs, folder)]
    if pairs:
        tensors = {}
        for layer, (down, up) in pairs.items():
            tensors[f"transformer.{layer}.lora_A.weight"] = down
            tensors[f"transformer.{layer}.lora_B.weight"] = up
        files.append(save(folder / "pytorch_lora_weights.safetensors", tensors))
    return [*files, *write_transformer(model, run, folder / "transformer")]


def save(path: Path, tensors: dict[str, Tensor]) -> Path:
    weights.save(path, {name: t.clone() for name, t in tensors.items()}, {"format": "pt"})
    return path


def write_transformer(model: nn.Module, run: Checkpoint, folder: Path) -> list[Path]:
    """config.json and shards, as diffusers' save_pretrained lays them out.

    What diffusers' config has no word for stands under `_dc_gen`, for sample.py and align.py: its
    readers pass over a name that begins so.
    """
    name = "FluxTransformer2DModel" if isinstance(model, Flux) else "SanaTransformer2DModel"
    told = {k: v for k, v in run.metadata.items() if k in ("base", "autoencoder", "shift", "size")}
    told["position_stride"] = model.config.get("position_stride", 1)
    config = {k: v for k, v in model.config.items() if k != "position_stride"} | {"_dc_gen": told}
    for old in folder.glob("diffusion_pytorch_model*"):
        old.unlink()  # more shards of an earlier export, and their index, would be read first
    shards, size = [{}], 0
    for key, tensor in to_diffusers(model).items():
        if size + tensor.nbytes > SHARD and shards[-1]:
            shards, size = [*shards, {}], 0
        shards[-1][key], size = tensor, size + tensor.nbytes
    stem, files, index = "diffusion_pytorch_model", [], {}
    for i, shard in enumerate(shards):
        part = f"-{i + 1:05}-of-{len(shards):05}" if len(shards) > 1 else ""
        files.append(save(folder / f"{stem}{part}.safetensors", shard))
        index |= dict.fromkeys(shard, files[-1].name)
    if len(shards) > 1:
        files.append(folder / f"{stem}.safetensors.index.json")
        total = sum(t.nbytes for shard in shards for t in shard.values())
        table = {"metadata": {"total_size": total}, "weight_map": index}
        files[-1].write_text(json.dumps(table, indent=1))
    files.append(folder / "config.json")
    files[-1].write_text(json.dumps({"_class_name": name, **config}, indent=1))
    return files


def write_peft(pairs: dict[str, tuple[Tensor, Tensor]], folder: Path) -> list[Path]:
    tensors = {}
    for layer, (down, up) in pairs.items():
        tensors[f"base_model.model.{layer}.lora_A.weight"] = down
        tensors[f"base_model.model.{layer}.lora_B.weight"] = up
    rank = len(next(iter(pairs.values()))[0])
    config = dict(peft_type="LORA", r=rank, lora_alpha=rank, target_modules=sorted(pairs))
    config |= dict(bias="none", lora_dropout=0.0, inference_mode=True, task_type=None)
    file = save(folder / "adapter_model.safetensors", tensors)
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=1))
    return [file, folder / "adapter_config.json"]


def write_comfyui(model: nn.Module, run: Checkpoint, folder: Path) -> Path:
    """Keys are Black Forest Labs' names with _ for . , which are ours."""
    if not isinstance(model, Flux):
        raise UserError("--export comfyui is for FLUX; SANA's LoRA goes to diffusers or peft")
    tensors = {}
    for layer, (down, up) in lora_pairs(run).items():
        key = "lora_unet_" + layer.replace(".", "_")
        tensors[f"{key}.lora_down.weight"], tensors[f"{key}.lora_up.weight"] = down, up
        tensors[f"{key}.alpha"] = torch.tensor(float(len(down)))
    return save(folder / "lora.safetensors", tensors)
