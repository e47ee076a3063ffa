"""Weights from a path, a preset or a hub id to a model, every tensor accounted for.

What    `from_pretrained` of every model finds the files (models/hub.py), opens them
        (`open_checkpoint`), builds the model on the meta device, which has shapes and no
        memory (`build`), and gives it the tensors under their official names (`assign`).
Why     A tensor that is skipped, left at its random start or loaded into the wrong place
        does not crash: it makes worse pictures. So loading is strict both ways.
Trust   A checkpoint is data from a stranger: safetensors, or a pickle under weights_only,
        which cannot run code. There is no flag to relax that.
Runs    A file of ours holds the trained tensors only. Its header names the base that the
        other tensors come from, and LoRA pairs are merged into that base while it loads.
"""

import inspect
import json
import math
import os
import re
import shutil
import sys
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from models.hub import SUFFIXES, locate
from models.identity import DECISIVE, digest
from models.script import UserError

NOTHING = r"(?!)"  # a pattern that no name matches
# Single files of other programs: the transformer under a prefix, and the rest of a pipeline beside.
PREFIX = re.compile(r"^(model\.)?diffusion_model\.")
BUNDLED = re.compile(r"^(vae|(first|cond)_stage_model|conditioner|text_encoders?(_\d)?)\.")
# ComfyUI's fp8 files: a weight is what is stored times its layer's scale. The rest is for kernels.
SCALES = (".scale_weight", ".weight_scale")
ASIDE = re.compile(
    r"(\.(scale_weight|weight_scale|scale_input|input_scale|comfy_quant)|scaled_fp8)$"
)
Device = str | torch.device
# our name -> (official names, join): join(*official tensors) is ours; None: of one part
Rows = dict[str, tuple[tuple[str, ...], Callable[..., Tensor] | None]]

# ---- open


@dataclass(frozen=True)
class Checkpoint:
    """One opened set of weight files. Shapes are known, values are read when asked for."""

    path: Path
    config: dict | None  # "config" in the header, or config.json beside the weights
    metadata: dict[str, str]  # free text in the safetensors header
    shapes: dict[str, tuple[int, ...]]
    sources: dict  # tensor name -> its slice of an open safetensors file, or the mapped tensor
    files: Sequence[Path] = ()

    def get(self, name: str, device: Device = "cpu") -> Tensor:
        """On "meta" the shape alone, of integers or not. KeyError: there is no such tensor."""
        source = self.sources.get(name)
        if torch.device(device).type == "meta" and not isinstance(source, Tensor):
            is_float = not source or re.match("B?F", source.get_dtype())
            dtype = torch.float32 if is_float else torch.int32
            return torch.empty(self.shapes[name], dtype=dtype, device="meta")
        tensor = source if isinstance(source, Tensor) else self.sources[name][...]
        layer, _, leaf = name.rpartition(".")
        if "float8" in str(tensor.dtype) and leaf in ("weight", "bias"):
            tensor = tensor.float()  # torch joins fp8 with no other type
            for scale in (layer + suffix for suffix in SCALES if leaf == "weight"):
                if scale in self.sources:
                    tensor *= self.sources[scale][...].float().item()
        return tensor.to(device)

    @property
    def digest(self) -> str:
        """Of config, tensors and, of a run, what its header says of its pictures."""
        config = {k: v for k, v in (self.config or {}).items() if not k.startswith("_")}
        return digest([config, *map(self.metadata.get, DECISIVE)], self.files)

    @property
    def is_run(self) -> bool:
        return {"stage", "base"} <= self.metadata.keys()

    @property
    def alpha(self) -> float:
        """Of a LoRA: its update is alpha / r * B @ A. (A Fraction is never NaN or Inf.)"""
        return float(Fraction(self.metadata["alpha"]))


def read_json(path: Path) -> dict:
    if not path.is_file():
        raise UserError(f"{path} is missing: fetch it again")
    return parse_json(path.read_bytes(), str(path))


def parse_json(text: str | bytes, where: str) -> dict:
    try:
        return dict(json.loads(text))
    except (ValueError, TypeError, RecursionError) as error:
        raise UserError(f"{where} is no readable JSON object ({error}): fetch it again") from None


def open_checkpoint(path: Path, subfolder: str = "") -> Checkpoint:
    """A model by its file, index, shard or folder (the `subfolder` of a pipeline): all the same."""
    path = Path(path)
    if not path.exists():
        raise UserError(f"{path}: no such file or folder")
    path = path / subfolder if (path / subfolder).is_dir() else path
    beside = (path if path.is_dir() else path.parent) / "config.json"
    config = read_json(beside) if beside.exists() else None
    if path.is_dir():
        path = weights_file(path)
    elif re.search(r"-\d+-of-\d+\.safetensors$", path.name):  # a shard
        indices = path.parent.glob("*.safetensors.index*.json")
        path = next((index for index in indices if path in shards_of(index)), path)
    if path.suffix == ".safetensors":
        return open_safetensors([path], config)
    if path.suffix == ".json":
        return open_safetensors(shards_of(path), config)
    if path.suffix in SUFFIXES:
        return open_pickle(path, config)
    raise UserError(f"{path}: weights are {', '.join(SUFFIXES)} or a folder of them")


def weights_file(folder: Path) -> Path:
    """The one file or index of shards in a folder; of several, the one diffusers opens."""
    whole = re.compile(r"(?!.*-\d+-of-\d+\.).*\.safetensors(\.index.*\.json)?")  # no shard
    usual = re.compile(r"(diffusion_pytorch_)?model\.safetensors(\.index\.json)?")
    names = sorted(file.name for file in folder.iterdir() if whole.fullmatch(file.name))
    plain = [name for name in names if usual.fullmatch(name)]
    if len(names) == 1 or plain:
        return folder / (plain or names)[-1]
    found = ", ".join(names[:5]) or "no .safetensors weights"
    raise UserError(f"{folder} holds {found}: wanted one model, name its file or folder")


def shards_of(index: Path) -> list[Path]:
    places = read_json(index).get("weight_map")
    if not places or not isinstance(places, dict):
        raise UserError(f"{index} names no files: fetch it again")
    names = {Path(str(place)).name for place in places.values()}
    return [index.parent / name for name in sorted(names)]


def open_safetensors(paths: list[Path], config: dict | None) -> Checkpoint:
    """One file, or all shards of a model."""
    sources, shapes = {}, {}
    for path in paths:
        try:
            file = safe_open(path, framework="pt")
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path} {why_broken(path, error)}: fetch it again") from None
        for stored in file.keys():  # noqa: SIM118
            name = PREFIX.sub("", stored)
            if name in sources:
                raise UserError(f"{path}: another shard also holds {name}, fetch both again")
            if not BUNDLED.match(name):
                sources[name] = file.get_slice(stored)
                shapes[name] = tuple(sources[name].get_shape())
    for scale in filter(ASIDE.search, [*shapes]):
        shape, layer = shapes.pop(scale), scale.rpartition(".")[0]
        weight = sources.get(f"{layer}.weight")
        kind = weight.get_dtype() if weight else "absent"
        if scale.endswith(SCALES) and not (kind.startswith("F8") and math.prod(shape) == 1):
            found = f"{layer} as {kind} with scales {shape}"
            raise UserError(f"{paths[0]} holds {found}: wanted 16 bits, or fp8 with one scale")
    path = paths[0] if len(paths) == 1 else paths[0].parent
    metadata = file.metadata() or {}
    if "config" in metadata:
        config = parse_json(metadata["config"], f"the config in the header of {path}")
    return Checkpoint(path, config, metadata, shapes, sources, paths)


def why_broken(path: Path, error: Exception) -> str:
    if not path.exists():
        return "is missing"
    with path.open("rb") as file:
        if file.read(30).startswith(b"version https://git-lfs"):
            return "is a git-lfs pointer, not the weights (`git lfs pull`)"
    return f"is cut short, or no sound safetensors file ({error})"


def open_pickle(path: Path, config: dict | None) -> Checkpoint:
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        tensors = tensors.get("state_dict", tensors)
        tensors = {PREFIX.sub("", n): t for n, t in tensors.items() if not BUNDLED.match(n)}
        shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    except Exception:  # noqa: BLE001  a damaged stream raises any of a dozen kinds
        cause = "is damaged or holds more than tensors, and was not run"
        raise UserError(f"{path} {cause}: take its .safetensors") from None
    return Checkpoint(path, config, {}, shapes, tensors, [path])


def open_model(
    source: str | Path,
    presets: dict,
    subfolder: str = "",
    config: dict | None = None,
    weights: str | None = None,
) -> tuple[Checkpoint, dict | None, Checkpoint | None]:
    """(checkpoint of the official tensors, config of the model, our run on top or None)."""
    path, preset_config = locate(source, presets, weights, subfolder)
    checkpoint = open_checkpoint(path, subfolder)
    if not checkpoint.is_run:
        return checkpoint, config or checkpoint.config or preset_config, None
    if checkpoint.metadata["stage"] == "quant":
        raise UserError(f"{path} is quantized: sample.py draws with it, nothing else can")
    run, base = checkpoint, checkpoint.metadata["base"]
    try:
        checkpoint = open_checkpoint(locate(base, presets, weights, subfolder)[0], subfolder)
        if checkpoint.is_run:
            raise UserError("it is a run itself, wanted a complete model")
        if run.metadata.get("base_digest") not in (None, checkpoint.digest):
            raise UserError("it is not the file that was trained on: put that back, or train anew")
    except UserError as error:
        raise UserError(f"{source} builds on {base}, which does not load: {error}") from None
    return checkpoint, config or run.config, run


# ---- build, assign


def build(cls: type[nn.Module], config: dict | None, path: Path) -> nn.Module:
    """The model on the meta device: every name and shape, no memory."""
    if config is None:
        raise UserError(f"{path} carries no config: pass its folder, or name a preset")
    config = {key: value for key, value in config.items() if not key.startswith("_")}
    for key, kind in inspect.get_annotations(cls.__init__).items():
        value = config.get(key, 0)
        if kind not in (int, float) and (value is None or kind not in (int | None, float | None)):
            continue
        if not (isinstance(value, int | float) and math.isfinite(value)):
            raise UserError(f"config of {path}: {key} is {value!r}, wanted a number")
    try:
        with torch.device("meta"):
            return cls(**config)
    except (TypeError, ValueError, LookupError, ArithmeticError, RuntimeError) as error:
        raise UserError(f"config of {path} does not describe a {cls.__name__}: {error}") from None


def to_conv(*linears: Tensor) -> Tensor:
    """diffusers has linear layers for 1x1 convolutions, and three of them for one qkv."""
    return torch.cat(linears)[:, :, None, None]


def rows_of(name_map: dict[str, tuple[str, ...]], ours: Iterable[str]) -> Rows:
    """Rows from a map of our modules to the official ones; {} is the index of a block."""
    rows = {}
    for name in ours:
        module, _, leaf = name.rpartition(".")
        index = "".join(re.findall(r"blocks\.(\d+)", module))
        theirs = name_map[re.sub(r"blocks\.\d+", "blocks.{}", module)]
        parts = tuple(f"{their.format(index)}.{leaf}".lstrip(".") for their in theirs)
        rows[name] = (parts, (lambda *p: torch.cat(p)) if len(parts) > 1 else None)
    return rows


def assign(
    model: nn.Module,
    rows: Rows,
    checkpoint: Checkpoint,
    device: Device = "cpu",  # "meta" is a rehearsal: all is checked, nothing is read
    dtype: torch.dtype = torch.float32,
    run: Checkpoint | None = None,  # its tensors replace the checkpoint's, LoRA is added
    dropped: str | re.Pattern = NOTHING,  # official names with no place in the model
    as_stored: Collection[str] = (),  # quantized tensors, which keep the file's dtype
    updates: dict[str, list[Callable[[Tensor], Tensor]]] | None = None,  # of models/adapters.py
) -> None:
    """Give a meta-device model its tensors: all of them, each once, nothing left over."""
    check(model, rows, checkpoint, run, dropped)
    if torch.device(device).type == "meta":
        return
    state = {}
    for name in model.state_dict():
        tensor = assemble(name, rows, checkpoint, run, device)
        for update in (updates or {}).get(name, ()):
            tensor = update(tensor)
        # A counter stays an integer; what has the right dtype stays the mapped file itself.
        is_kept = name in as_stored or not tensor.is_floating_point()
        state[name] = tensor if is_kept else tensor.to(dtype)
    model.load_state_dict(state, strict=True, assign=True)
    count = sum(tensor.numel() for tensor in state.values()) / 1e6
    what = f"{len(state)} tensors, {count:.1f} M parameters, {str(dtype)[6:]}"
    print(f"loaded {what}, {(run or checkpoint).path.name}", file=sys.stderr)


def assemble(
    name: str, rows: Rows, checkpoint: Checkpoint, run: Checkpoint | None, device: Device
) -> Tensor:
    """Our tensor of this name: the run's, or the official parts joined; LoRA merged in."""
    trained = run.shapes if run else {}
    if name in trained:
        tensor = run.get(name, device)
    else:
        official, join = rows[name]
        parts = [checkpoint.get(part, device) for part in official]
        tensor = join(*parts) if join else parts[0]
    layer = name.removesuffix(".weight")
    if f"{layer}.lora_A" in trained or f"{layer}.lora_B" in trained:
        # weight + alpha / r * B @ A, in fp32: a bf16 sum would round a small update away.
        down = run.get(f"{layer}.lora_A", device).float()  # (r, in)
        up = run.get(f"{layer}.lora_B", device).float()  # (out, r)
        update = run.alpha / len(down) * (up @ down)
        # In place, where an update of another shape is not broadcast but refused.
        tensor = update.add_(tensor.float().flatten(1)).view_as(tensor)
    return tensor


def check(
    model: nn.Module,
    rows: Rows,
    checkpoint: Checkpoint,
    run: Checkpoint | None = None,
    dropped: str | re.Pattern = NOTHING,
) -> None:
    """Assemble all shapes before a byte is read; complain once, five of a kind."""
    wanted, missing, mismatched = model.state_dict(), [], []
    for name, tensor in wanted.items():
        shape = tuple(tensor.shape)
        try:
            part = assemble(name, rows, checkpoint, run, "meta")
            found = tuple(part.shape)
            if tensor.is_floating_point() > part.is_floating_point():
                found = f"{found} of integers"  # quantized by another program
        except KeyError as error:
            missing.append(error.args[0])
            continue
        except (RuntimeError, IndexError, ValueError, ArithmeticError) as error:
            found = f"not to be assembled ({str(error).splitlines()[0]})"
        if found != shape:
            mismatched.append(f"{name} is {found}, the model has {shape}")
    used = {part for official, _ in rows.values() for part in official}
    unexpected = [n for n in checkpoint.shapes if n not in used and not re.search(dropped, n)]
    pairs = {f"{name.removesuffix('.weight')}.lora_{x}" for name in wanted for x in "AB"}
    unexpected += sorted(run.shapes.keys() - wanted.keys() - pairs) if run else []
    kinds = {"missing": missing, "unexpected": unexpected, "of another shape": mismatched}
    listed = [f"{len(n)} {kind} ({'; '.join(n[:5])})" for kind, n in kinds.items() if n]
    if listed:
        where = f"{run.path} on {checkpoint.path}" if run else checkpoint.path
        cause = f"does not fit this {type(model).__name__}: tensors {', '.join(listed)}"
        raise UserError(f"{where} {cause}; do these weights belong to this model and config?")


# ---- save


def save(path: str | Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Write a safetensors file, whole or not at all. NaN and a full disk are refused."""
    path = Path(path)
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor.float()).all():
            raise UserError(f"{path} not written: {name} holds NaN or Inf; lower --lr")
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    size = sum(tensor.nbytes for tensor in tensors.values())
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        free, size = shutil.disk_usage(path.parent).free // 10**6, size // 10**6 + 2  # with a spare
        if free < size:
            raise OSError(f"it takes {size} MB and {free} MB are free")
        write_whole(path, lambda partial: save_sorted(tensors, partial, metadata))
        path.chmod(0o644)  # safetensors writes for the owner only
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} not written ({error}); what was there is intact") from None


def save_sorted(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
    """save_file, which writes the metadata in random order: here equal contents are equal files."""
    save_file(tensors, path, metadata)
    if not metadata:
        return
    with path.open("r+b") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        header["__metadata__"] = dict(sorted(metadata.items()))
        file.seek(8)  # the text is as long as before
        file.write(json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode())


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file that is never half there: write(a temporary one), then rename it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".tmp-{path.name}")  # one name: the next save replaces it
    try:
        write(partial)
        with partial.open("rb") as file:
            os.fsync(file.fileno())  # on the disk, before its name is
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
