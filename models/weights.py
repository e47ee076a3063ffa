"""From a path, a preset or a hub id to a model with every tensor accounted for, and back to disk.

What    `from_pretrained` of every model is four steps of this file: find the files (`locate`), open
        them (`open_checkpoint`), build the model without memory (`build`), hand over the tensors
        under the official names one by one (`assign`).
Why     A tensor that is skipped, left at its random start or loaded into the wrong place does not
        crash: it makes worse pictures. So loading is strict both ways, and names the tensors.
How     The model is built on the meta device (shapes without memory). Files are memory-mapped, and
        what is mapped becomes the parameter, so the weights are in memory once, never twice.
Trust   A checkpoint is data from a stranger: safetensors, or pickles under weights_only, which
        cannot run code. There is no flag to relax that.
Runs    What our stages save holds the trained tensors only; its header says which base the rest
        comes from, and LoRA pairs are merged into that base while it loads.
"""

import argparse
import json
import math
import os
import pickle
import re
import shutil
import sys
import types
from collections.abc import Callable, Iterable, Sequence
from dataclasses import MISSING, dataclass, fields
from inspect import signature
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

ROOT = Path(__file__).parent.parent
INDEX = ".safetensors.index.json"  # diffusers' table of a sharded model: tensor name -> file
PICKLES = (".pth", ".pt", ".bin", ".ckpt")
Rows = dict[str, tuple[tuple[str, ...], Callable[..., Tensor] | None]]

# ---- scripts


class UserError(ValueError):
    """The user's mistake, told in one sentence: what we got, what we wanted, the cure."""


def run(main: Callable[[], None]) -> None:
    """Run a script's main: a user's mistake is one line and exit code 2, Ctrl-C is 130."""
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:
        raise UserError(f"{message}; --help lists the flags")


def parse_config(cls: type, doc: str, argv: Sequence[str] | None = None):
    """Flags from a dataclass: a field without default is a positional argument, `doc` the help."""
    parser = Parser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    for field in fields(cls):
        kind = field.type
        if isinstance(kind, types.UnionType):  # str | None
            kind = next(t for t in kind.__args__ if t is not types.NoneType)
        if field.default is MISSING:
            parser.add_argument(field.name, type=kind)
            continue
        how = {"action": argparse.BooleanOptionalAction} if kind is bool else {"type": kind}
        flag = "--" + field.name.replace("_", "-")
        parser.add_argument(flag, default=field.default, help="%(default)s", **how)
    return cls(**vars(parser.parse_args(argv)))


def pick_device(name: str = "") -> torch.device:
    """The named device, or the best one here: CUDA, then Apple's MPS, then the CPU."""
    counts = {"cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available())}
    available = [kind for kind, count in counts.items() if count] + ["cpu"]
    if not name:
        return torch.device(available[0])
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"--device {name!r} is no device; here: {', '.join(available)}") from None
    if device.type not in available or (device.index or 0) >= counts.get(device.type, 1):
        raise UserError(f"--device {name} is not available; here: {', '.join(available)}")
    return device


def pick_dtype(name: str) -> torch.dtype:
    kinds = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    if name not in kinds:
        raise UserError(f"--dtype {name!r} is unknown; one of {', '.join(kinds)}")
    return kinds[name]


# ---- find


def locate(
    source: str | Path, presets: dict, weights: str | None = None, subfolder: str | None = None
) -> tuple[Path, dict | None]:
    """(file or folder, the preset's config). A local path wins over a preset, that over a hub id.

    `weights` is a folder to look in instead of the hub; `subfolder` the part of a pipeline wanted.
    """
    name = str(source)
    if Path(source).exists():
        return Path(source), None
    preset = presets.get(name)
    if preset is None:  # the official repository of a preset is that preset
        preset = next((p for p in presets.values() if p.get("hub") == name), None)
    if preset is None:
        is_hub_id = re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name)
        if not is_hub_id or name.endswith((".safetensors", *PICKLES)):
            raise UserError(
                f"{name!r} is no file, no folder and no preset; presets: {', '.join(presets)}"
            )
        preset = {"hub": name}
    config = preset.get("config")
    if "path" in preset:
        path = ROOT / preset["path"]
        if not path.exists():
            raise UserError(f"{path} of preset {name} is missing: `git checkout {preset['path']}`")
        return path, config
    if weights is not None:
        return in_folder(Path(weights), preset), config
    return download(preset["hub"], preset.get("file"), subfolder), config


def in_folder(folder: Path, preset: dict) -> Path:
    """The file or repository of a preset inside the user's --weights folder."""
    repository = preset["hub"].split("/")[-1]
    places = [folder / repository]
    if "file" in preset:
        file = Path(preset["file"])
        places = [folder / file, folder / file.name, folder / repository / file, *places]
    for place in places:
        if place.exists():
            return place
    wanted = " or ".join(dict.fromkeys(str(place.relative_to(folder)) for place in places))
    raise UserError(f"--weights {folder} has no {wanted}: fetch {preset['hub']} and put it there")


def download(repository: str, file: str | None, subfolder: str | None) -> Path:
    """From the hub's cache, or the hub; HF_TOKEN, HF_HOME and HF_HUB_OFFLINE mean what they say."""
    from huggingface_hub import errors, hf_hub_download, snapshot_download

    page = f"https://huggingface.co/{repository}"
    try:
        if file is not None:
            return Path(hf_hub_download(repository, file))
        if subfolder is not None:
            part = [f"{subfolder}/*.json", f"{subfolder}/*.safetensors"]
            folder = Path(snapshot_download(repository, allow_patterns=part))
            if (folder / subfolder).is_dir():
                return folder
        top = ["config.json", "*.safetensors", f"*{INDEX}"]
        return Path(snapshot_download(repository, allow_patterns=top, ignore_patterns="*/*"))
    except errors.GatedRepoError:
        cure = f"accept its licence at {page}, then set HF_TOKEN to a token of that account"
        raise UserError(f"{repository} is gated: {cure}") from None
    except errors.RepositoryNotFoundError:
        raise UserError(
            f"no file, folder or preset {repository!r}, and the hub shows no such repository: "
            f"check the name, or set HF_TOKEN if it is private"
        ) from None
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled):
        raise UserError(
            f"{repository} is not in the local cache and the hub cannot be reached (no network, or "
            f"HF_HUB_OFFLINE set): fetch it elsewhere and pass its folder, or --weights"
        ) from None
    except errors.EntryNotFoundError:
        raise UserError(f"{page} has no file {file}: pass a path instead") from None
    except (errors.HfHubHTTPError, ConnectionError) as error:
        raise UserError(f"{page} failed ({error}): try again, or pass a local path") from None


# ---- open


@dataclass(frozen=True)
class Checkpoint:
    """One opened set of weight files. Shapes are known, values are read when asked for."""

    path: Path
    config: dict | None  # config.json beside the weights, or "config" in the header
    metadata: dict[str, str]  # the safetensors header's own notes
    shapes: dict[str, tuple[int, ...]]
    sources: dict  # tensor name -> the open safetensors file it is in, or the mapped tensor

    def get(self, name: str) -> Tensor:
        source = self.sources[name]
        return source if isinstance(source, Tensor) else source.get_tensor(name)

    @property
    def is_run(self) -> bool:
        return {"stage", "base"} <= self.metadata.keys()


def read_json(path: Path) -> dict:
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is not readable JSON ({error}): fetch it again") from None
    if not isinstance(document, dict):
        raise UserError(f"{path} holds a {type(document).__name__}, not a JSON object")
    return document


def open_checkpoint(path: Path, subfolder: str | None = None) -> Checkpoint:
    """Open a file, a diffusers folder (single or sharded), or its `subfolder` if there is one."""
    path = Path(path)
    if not path.exists():
        raise UserError(f"{path}: no such file or folder")
    if path.is_dir():
        if subfolder is not None and (path / subfolder).is_dir():
            path = path / subfolder
        config = read_json(path / "config.json") if (path / "config.json").exists() else None
        file = weights_file(path)
    else:
        config, file = None, path
    if file.name.endswith(INDEX):
        return open_shards(file, config or read_json(path / "config.json"))
    if file.suffix == ".safetensors":
        return open_safetensors(file, config)
    if file.suffix in PICKLES:
        return open_pickle(file, config)
    raise UserError(f"{file}: weights are .safetensors, {', '.join(PICKLES)} or a folder of them")


def weights_file(folder: Path) -> Path:
    """The one set of weights of a folder; with several, the one without a variant in its name."""
    for pattern in (f"*{INDEX}", "*.safetensors"):
        files = sorted(folder.glob(pattern), key=lambda file: (len(file.name), file.name))
        plain = [f for f in files if f.name.split(".")[0] in ("diffusion_pytorch_model", "model")]
        if files and (len(files) == 1 or plain):
            return (plain or files)[0]
        if files:
            names = ", ".join(file.name for file in files[:5])
            raise UserError(f"{folder} holds several weight files ({names}): name the one to load")
    parts = ", ".join(sorted(p.name for p in folder.iterdir() if p.is_dir())) or "no folders"
    raise UserError(f"{folder} holds no .safetensors weights ({parts} inside): pass their folder")


def open_safetensors(path: Path, config: dict | None) -> Checkpoint:
    file = map_safetensors(path)
    metadata = file.metadata() or {}
    if config is None and "config" in metadata:
        try:
            config = json.loads(metadata["config"])
        except ValueError as error:
            raise UserError(f"{path}: the config in its header is not JSON ({error})") from None
    shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    return Checkpoint(path, config, metadata, shapes, dict.fromkeys(shapes, file))


def open_shards(index: Path, config: dict | None) -> Checkpoint:
    places = read_json(index).get("weight_map", {})
    files = {name: map_safetensors(index.parent / Path(name).name) for name in set(places.values())}
    sources = {name: files[place] for name, place in places.items()}
    held = {place: set(file.keys()) for place, file in files.items()}
    lost = [name for name, place in places.items() if name not in held[place]]
    if lost or not places:
        raise UserError(f"{index} does not match its files ({lost[:5]}): fetch them again")
    shapes = {name: tuple(file.get_slice(name).get_shape()) for name, file in sources.items()}
    return Checkpoint(index.parent, config, {}, shapes, sources)


def map_safetensors(path: Path):
    if not path.exists():
        raise UserError(f"{path} is missing: the folder is not complete, fetch it again")
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} {why_broken(path, error)}: fetch it again") from None


def why_broken(path: Path, error: Exception) -> str:
    """Safetensors begin with 8 bytes of header length and a JSON header that names every range."""
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        if start.startswith(b"version"):
            return "is a git-lfs pointer, not the weights (`git lfs pull`)"
        length = int.from_bytes(start, "little")
        if length <= size:
            try:
                header = json.loads(file.read(length))
                ends = [row["data_offsets"][1] for name, row in header.items() if name[:2] != "__"]
                if size < 8 + length + max(ends):
                    return f"is {size} bytes, its header says {8 + length + max(ends)}: cut short"
            except (ValueError, LookupError, TypeError, AttributeError):
                pass  # not even a header: the library's own words say enough
    return f"is not a sound safetensors file ({error})"


def open_pickle(path: Path, config: dict | None) -> Checkpoint:
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError:
        raise UserError(
            f"{path} holds more than tensors, perhaps code, and was not run: use its .safetensors"
        ) from None
    except Exception as error:  # noqa: BLE001  a damaged stream raises any of a dozen kinds
        reason = str(error).split("\n")[0]
        raise UserError(
            f"{path} is damaged, or older than PyTorch 1.6 ({reason}): fetch it again"
        ) from None
    tensors = tensors.get("state_dict", tensors) if isinstance(tensors, dict) else {}
    strange = [name for name, tensor in tensors.items() if not isinstance(tensor, Tensor)]
    if strange or not tensors:
        raise UserError(f"{path} is no state dict: found {strange[:5] or 'no tensors'}")
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    return Checkpoint(path, config, {}, shapes, tensors)


# ---- build


def build(cls: type[nn.Module], config: dict | None, path: Path) -> nn.Module:
    """The model on the meta device: every name and shape, no memory."""
    if config is None:
        raise UserError(
            f"{path} carries no config: name a preset, put config.json beside it in a folder, or "
            f"pass config=dict(...)"
        )
    config = {key: value for key, value in config.items() if not key.startswith("_")}
    unknown = [key for key in config if key not in signature(cls).parameters]
    if unknown:
        raise UserError(f"config of {path}: {cls.__name__} has no {', '.join(unknown[:5])}")
    try:
        with torch.device("meta"):
            return cls(**config)
    except (TypeError, ValueError, KeyError, IndexError, ZeroDivisionError, RuntimeError) as error:
        raise UserError(f"config of {path} does not describe a {cls.__name__}: {error}") from None


def open_model(
    source: str | Path,
    presets: dict,
    subfolder: str | None = None,
    config: dict | None = None,
    weights: str | None = None,
) -> tuple[Checkpoint, dict | None, Checkpoint | None]:
    """(checkpoint of the official tensors, config of the model, our run on top of it or None)."""
    path, preset_config = locate(source, presets, weights, subfolder)
    checkpoint = open_checkpoint(path, subfolder)
    if not checkpoint.is_run:
        return checkpoint, config or checkpoint.config or preset_config, None
    run, base = checkpoint, checkpoint.metadata["base"]
    try:
        path, _ = locate(base, presets, weights, subfolder)
        checkpoint = open_checkpoint(path, subfolder)
    except UserError as error:
        raise UserError(f"{run.path} builds on {base}, which does not load: {error}") from None
    if checkpoint.is_run:
        raise UserError(f"{run.path} names the run {base} as its base: a base is a full model")
    return checkpoint, config or run.config, run


# ---- assign


def assign(
    model: nn.Module,
    rows: Rows,
    checkpoint: Checkpoint,
    dropped: Iterable[str] | re.Pattern = (),
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    run: Checkpoint | None = None,
) -> None:
    """Give a meta-device model its tensors: all of them, each once, nothing left over.

    rows     our name -> (official names, join): join(*official tensors) is ours; None: the only one
    dropped  official names that have no place in the model, on purpose
    run      trained tensors that replace the checkpoint's, and LoRA pairs that are added to them
    """
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    trained = run.shapes if run else {}
    check(model, wanted, rows, checkpoint, dropped, trained)
    state = {}
    for name in wanted:
        if name in trained:
            tensor = run.get(name).to(device)
        else:
            official, join = rows[name]
            parts = [checkpoint.get(part).to(device) for part in official]
            tensor = join(*parts) if join else parts[0]
        stem = name.removesuffix(".weight")
        if f"{stem}.lora_A" in trained:
            tensor = merge_lora(tensor, run, stem)
        # A counter stays an integer. What already has the dtype stays the mapped file: no copy.
        state[name] = tensor.to(dtype if tensor.is_floating_point() else tensor.dtype)
    model.load_state_dict(state, strict=True, assign=True)
    homeless = [n for n, t in (*model.named_buffers(), *model.named_parameters()) if t.is_meta]
    assert not homeless, f"{homeless} never get a value: compute them, or keep them in checkpoints"
    count = sum(tensor.numel() for tensor in state.values()) / 1e6
    name = (run or checkpoint).path.name
    kind = str(dtype).removeprefix("torch.")
    print(f"loaded {len(state)} tensors, {count:.1f} M parameters, {kind}, {name}", file=sys.stderr)


def check(
    model: nn.Module,
    wanted: dict[str, tuple],
    rows: Rows,
    checkpoint: Checkpoint,
    dropped: Iterable[str] | re.Pattern,
    trained: dict[str, tuple],
) -> None:
    """Compare names and shapes before a byte is read; complain once, five of a kind."""
    assert rows.keys() <= wanted.keys(), f"rows for no tensor: {rows.keys() - wanted.keys()}"
    is_dropped = dropped.search if isinstance(dropped, re.Pattern) else set(dropped).__contains__
    used = {part for official, _ in rows.values() for part in official}
    unexpected = [n for n in checkpoint.shapes if n not in used and not is_dropped(n)]
    missing, mismatched = [], []
    for name, shape in wanted.items():
        official, join = rows.get(name, ((name,), None))
        absent = [part for part in official if part not in checkpoint.shapes]
        if name not in trained and absent:
            missing += absent
            continue
        found = trained[name] if name in trained else joined_shape(official, join, checkpoint)
        if found != shape:
            mismatched.append(f"{name} is {found}, the model has {shape}")
    for name in trained.keys() - wanted.keys():
        stem, half = name[:-7], name[-7:]  # the rest of a run is <linear>.lora_A and .lora_B
        down, up = trained.get(f"{stem}.lora_A"), trained.get(f"{stem}.lora_B")
        shape = wanted.get(f"{stem}.weight")
        if half not in (".lora_A", ".lora_B") or not (down and up and shape):
            unexpected.append(name)
        elif down[0] != up[1] or (up[0], down[1]) != (shape[0], math.prod(shape[1:])):
            mismatched.append(f"{name} is {trained[name]}, for a weight of {shape}")
    kinds = {"missing": missing, "unexpected": unexpected, "of another shape": mismatched}
    complaints = [
        f"{len(names)} {kind} ({'; '.join(names[:5])}{'; ...' if len(names) > 5 else ''})"
        for kind, names in kinds.items()
        if names
    ]
    if complaints:
        raise UserError(
            f"{checkpoint.path} does not fit this {type(model).__name__}: tensors "
            f"{', '.join(complaints)}; check that these weights belong to this model and config"
        )


def joined_shape(official: tuple, join: Callable | None, checkpoint: Checkpoint) -> tuple | str:
    shapes = [checkpoint.shapes[part] for part in official]
    if join is None:
        return shapes[0]
    try:
        return tuple(join(*(torch.empty(shape, device="meta") for shape in shapes)).shape)
    except (RuntimeError, IndexError) as error:  # parts that do not fit each other
        return f"{shapes} ({str(error).splitlines()[0]})"


def merge_lora(weight: Tensor, run: Checkpoint, stem: str) -> Tensor:
    """weight + alpha / r * B @ A, summed in fp32: a small update would drown in a bf16 sum."""
    down = run.get(f"{stem}.lora_A").to(weight.device).float()  # (r, in)
    up = run.get(f"{stem}.lora_B").to(weight.device).float()  # (out, r)
    scale = float(run.metadata["alpha"]) / down.shape[0]
    return weight.float() + scale * (up @ down).view_as(weight)


# ---- save


def save(path: str | Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Write a safetensors file that is all there or not there: a temporary, then a rename."""
    path = Path(path)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor.float()).all():
            raise UserError(f"{path} not written: {name} holds NaN or Inf; lower the learning rate")
    size = sum(tensor.nbytes for tensor in tensors.values())
    partial = path.with_name(f".tmp-{path.name}")  # one name: the next save cleans up after a kill
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(path.parent).free
        if free < size + 2**20:
            raise OSError(f"it takes {size / 1e6:.0f} MB and {free / 1e6:.0f} MB are free")
        save_file(tensors, partial, metadata)
        partial.chmod(0o644)  # safetensors writes for the owner only
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        partial.replace(path)
    except (SafetensorError, OSError) as error:
        if partial.exists():
            partial.unlink()
        raise UserError(f"{path} not written ({error}); what was there before is intact") from None
