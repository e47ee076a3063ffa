"""LoRA files of other programs, merged into a base before anything else is done with it.

What    --adapter FILE[:scale]: for FLUX from diffusers, peft, kohya or ComfyUI, for SANA from
        diffusers or peft. FILE may be the folder around it.
How     W' = W + scale * alpha / r * B A in fp32, A (r, in), B (out, r), in the rows of W that a
        layer of diffusers has in ours. kohya's names are ours with _ for every dot.
Runs    A base with an adapter is another base: a run's header keeps its adapters, and they are
        merged again wherever the run is loaded, but not into tensors that the run replaces.
Strict  Every tensor finds its place or the file is refused. LoRA of text encoders alone is left
        out, and named: no text encoder changes here, and the rest of such a file works without.
"""

import math
import re
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from models.script import UserError
from models.weights import Checkpoint, Rows, open_checkpoint, parse_json, read_json

# Of peft, ComfyUI, diffusers, kohya, OneTrainer.
PREFIX = re.compile(r"^(((base|diffusion)_)?model\.|transformer\.|lora_(unet|transformer)_)+")
DOWN = re.compile(r"(.+)\.lora([_.])(A|down)((?:\.default)?\.weight)")
UP = {"A": "B", "down": "up"}
Updates = dict[str, list[Callable[[Tensor], Tensor]]]  # by our weight: what adds to it


def read_adapters(adapters: str, model: nn.Module, rows: Rows, run: Checkpoint | None) -> Updates:
    """Of FILE[:scale],... and of what `run` stands on. rows: in diffusers' names, always."""
    places, updates = places_of(model, rows), {}
    below, above = parse(run.metadata.get("adapters", "")) if run else [], parse(adapters)
    if both := {path for path, _ in below} & {path for path, _ in above}:
        raise UserError(f"--adapter {both.pop()} is part of {run.path} already: leave it out")
    for path, scale in below + above:
        owned = run.shapes if (path, scale) in below else {}
        add_file(updates, open_checkpoint(Path(path)), scale, places, owned)
    return updates


def parse(adapters: str) -> list[tuple[str, float]]:
    """FILE[:scale],FILE[:scale] -> (file, scale) of each."""
    matches = (re.fullmatch(r"(.+?)(?::(-?\d*\.?\d+))?", a) for a in adapters.split(",") if a)
    return [(match[1], float(match[2] or 1)) for match in matches]


def places_of(model: nn.Module, rows: Rows) -> dict[str, tuple[str, Tensor, int]]:
    """{layer, theirs or ours, _ for dots: (our weight, the layer's rows of it, its inputs)}"""
    places = {}
    for name, weight in model.state_dict().items():
        if name.endswith(".weight") and weight.dim() > 1:
            (parts, join), order = rows[name], torch.arange(len(weight))
            # Equal parts, but in linear1 an MLP as wide as four of them is behind q, k and v.
            width = len(order) // (7 if len(parts) == 4 else len(parts))
            pieces = order.tensor_split([i * width for i in range(1, len(parts))])
            if join and len(parts) == 1:  # swapped halves
                pieces = [join(order)]
            for layer, its_rows in [*zip(parts, pieces), (name, order)]:
                layer = layer.removesuffix(".weight").replace(".", "_")
                places[layer] = (name, its_rows, math.prod(weight.shape[1:]))
    return places


def add_file(updates: Updates, file: Checkpoint, scale: float, places: dict, owned: dict) -> None:
    """What a file adds to weights that the run does not own. UserError: a tensor finds no place."""
    text = [name for name in file.shapes if re.match(r"lora_te|text_enc|te\d?[._]", name)]
    names = [name for name in file.shapes if name not in text]
    odd, pairs = {*names}, [match.groups() for match in map(DOWN.fullmatch, names) if match]
    for layer, mark, half, end in pairs:
        down, up = f"{layer}.lora{mark}{half}{end}", f"{layer}.lora{mark}{UP[half]}{end}"
        name, rows, inputs = places.get(PREFIX.sub("", layer).replace(".", "_"), ("", (), 0))
        (rank, *ins), outs = file.shapes[down] or (0,), file.shapes.get(up, ())
        fits = (math.prod(ins), *outs, 1, 1)[:5] == (inputs, len(rows), rank, 1, 1)
        if fits or name in owned:
            odd -= {down, up, f"{layer}.alpha"}
        if fits and name not in owned:
            factor = scale * alpha_over_rank(file, layer, rank)
            updates.setdefault(name, []).append(partial(add, file, down, up, factor, rows))
    if odd or not pairs:
        found = f"{len(odd or text)} of its {len(file.shapes)} tensors fit nothing here"
        listed = "; ".join(sorted(odd or text)[:5])
        raise UserError(f"--adapter {file.path}: {found} ({listed}), wanted LoRA of this model")
    without = f", without {len(text)} tensors of text encoders ({text[0]})" if text else ""
    print(f"adapter {file.path}: {len(pairs)} layers, scale {scale:g}{without}", file=sys.stderr)


def alpha_over_rank(file: Checkpoint, layer: str, rank: int) -> float:
    """alpha: the layer's own tensor, else what diffusers' header or peft's config says, else r."""
    beside, is_peft = file.path.with_name("adapter_config.json"), file.path.stem == "adapter_model"
    header = file.metadata.get("lora_adapter_metadata", "{}").replace('"transformer.', '"')
    facts = read_json(beside) if is_peft and beside.exists() else parse_json(header, str(file.path))
    try:
        kinds = (facts.get("alpha_pattern") or {}).items()
        special = [alpha for key, alpha in kinds if re.search(rf"(^|\.)({key})$", layer)]
        own = [file.get(name).item() for name in [f"{layer}.alpha"] if name in file.shapes]
        alpha = [*own, *special, facts.get("lora_alpha", rank)][0]
        return alpha / (math.sqrt(rank) if facts.get("use_rslora") else rank)
    except (TypeError, AttributeError, RuntimeError, ZeroDivisionError, re.error) as error:
        raise UserError(f"--adapter {file.path}: no alpha of {layer} ({error})") from None


def add(file: Checkpoint, down: str, up: str, scale: float, rows: Tensor, weight: Tensor) -> Tensor:
    """weight + scale * B A, in fp32: a bf16 sum would round a small update away."""
    up, down = (file.get(name, weight.device).float().flatten(1) for name in (up, down))
    whole = weight.float().flatten(1)  # a 1x1 convolution is a matrix
    return whole.index_add(0, rows.to(weight.device), scale * up @ down).view_as(weight)
