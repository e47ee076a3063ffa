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

import inspect
import json
import math
import os
import pickle
import re
import shutil
import sys
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from models.script import UserError

ROOT = Path(__file__).parent.parent
PICKLES = (".pth", ".pt", ".bin", ".ckpt")
SUFFIXES = (".safetensors", *PICKLES)
VARIANTS = ["*.fp16*", "*.bf16*", "*.fp8*", "*.int4*"]  # other precisions of what is there as well
Rows = dict[str, tuple[tuple[str, ...], Callable[..., Tensor] | None]]

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
    # The official repository of a preset is that preset.
    preset = presets.get(name) or next((p for p in presets.values() if p.get("hub") == name), None)
    if preset is None and not is_hub_id(name):
        raise UserError(
            f"{name!r} is no file, no folder and no preset; presets: {', '.join(presets)}"
        )
    preset = preset or {"hub": name}
    if "path" in preset:
        path = ROOT / preset["path"]
        if not path.exists():
            cure = f"`git checkout {preset['path']}` brings it back"
            raise UserError(f"{path} of preset {name} is missing: {cure}")
    elif weights is not None:
        path = in_folder(Path(weights), preset)
    else:
        path = download_model(preset["hub"], preset.get("file"), subfolder)
    return path, preset.get("config")


def is_hub_id(name: str) -> bool:
    """ "org/name" and not the path of a file that is missing."""
    return bool(re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name)) and Path(name).suffix not in SUFFIXES


def in_folder(folder: Path, preset: dict) -> Path:
    """The file or repository of a preset inside the user's --weights folder."""
    repository = preset["hub"].split("/")[-1]
    places = [folder / repository]
    if "file" in preset:
        file = preset["file"]
        places = [folder / file, folder / repository / file, *places]
    for place in places:
        if place.exists():
            return place
    wanted = " or ".join(str(place.relative_to(folder)) for place in places)
    raise UserError(f"--weights {folder} has no {wanted}: fetch {preset['hub']} and put it there")


def download_model(repository: str, file: str | None, subfolder: str | None) -> Path:
    """The one file, or a folder with the weights of a pipeline's part, or of a whole repository."""
    if file is not None:
        path = download(repository, [file]) / file
        if not path.exists():
            raise UserError(f"{repository} has no file {file}: pass a path instead")
        return path
    for part in (f"{subfolder}/", "") if subfolder else ("",):
        for avoid in (VARIANTS, []):  # a second precision of the same weights only if it is alone
            wanted = [part + "*.json", part + "*.safetensors"]
            folder = download(repository, wanted, avoid + ([] if part else ["*/*"]))
            if any((folder / part).glob("*.safetensors")):
                return folder
    raise UserError(f"{repository} on the hub holds no .safetensors weights: pass a path instead")


def download(repository: str, wanted: list[str], avoid: Sequence[str] = ()) -> Path:
    """A folder of the hub's cache; HF_TOKEN, HF_HOME and HF_HUB_OFFLINE mean what they say."""
    from huggingface_hub import errors, snapshot_download

    page = f"https://huggingface.co/{repository}"
    try:
        return Path(snapshot_download(repository, allow_patterns=wanted, ignore_patterns=avoid))
    except errors.GatedRepoError:
        cure = f"accept its licence at {page}, then set HF_TOKEN to a token of that account"
        raise UserError(f"{repository} is gated: {cure}") from None
    except (errors.RepositoryNotFoundError, errors.HFValidationError):
        raise UserError(
            f"no file, folder or preset {repository!r}, and the hub shows no such repository: "
            f"check the name, or set HF_TOKEN if it is private"
        ) from None
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled):
        raise UserError(
            f"{repository} is not in the local cache and the hub cannot be reached (no network, or "
            f"HF_HUB_OFFLINE set): fetch it elsewhere and pass its folder, or --weights"
        ) from None
    except OSError as error:  # every other answer of the hub, no connection, no room on the disk
        reason = str(error).split("\n")[0]
        raise UserError(f"{page} failed ({reason}): try again, or pass a local path") from None


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
        return parse_json(path.read_bytes(), str(path))
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): fetch it again") from None


def parse_json(text: str | bytes, where: str) -> dict:
    try:
        document = json.loads(text)
    except ValueError as error:
        raise UserError(f"{where} is not readable JSON ({error}): fetch it again") from None
    if not isinstance(document, dict):
        raise UserError(f"{where} holds a {type(document).__name__}, not a JSON object")
    return document


def open_checkpoint(path: Path, subfolder: str | None = None) -> Checkpoint:
    """Open a file, a diffusers folder (single or sharded), or its `subfolder` if there is one."""
    path, config = Path(path), None
    if not path.exists():
        raise UserError(f"{path}: no such file or folder")
    if path.is_dir():
        if subfolder is not None and (path / subfolder).is_dir():
            path = path / subfolder
        config = read_json(path / "config.json") if (path / "config.json").exists() else None
        path = weights_file(path)
    if path.suffix == ".json":
        return open_shards(path, config)
    if path.suffix == ".safetensors":
        return open_safetensors([path], config)
    if path.suffix in PICKLES:
        return open_pickle(path, config)
    raise UserError(f"{path}: weights are {', '.join(SUFFIXES)} or a folder of them")


def weights_file(folder: Path) -> Path:
    """The one file or index of shards in a folder; of several, diffusers' own without a variant."""
    files = sorted(folder.glob("*.safetensors")) + sorted(folder.glob("*.safetensors.index*.json"))
    files = [file for file in files if not re.search(r"-\d+-of-\d+\.", file.name)]
    usual = re.compile(r"(diffusion_pytorch_)?model\.safetensors(\.index\.json)?")
    plain = [file for file in files if usual.fullmatch(file.name)]
    if len(files) == 1 or plain:
        return (plain or files)[-1]
    if files:
        names = ", ".join(file.name for file in files[:5])
        raise UserError(f"{folder} holds several weight files ({names}): name the one to load")
    parts = ", ".join(sorted(file.name for file in folder.iterdir())[:8]) or "nothing"
    raise UserError(f"{folder} holds no .safetensors weights ({parts} inside): pass their folder")


def open_shards(index: Path, config: dict | None) -> Checkpoint:
    places = read_json(index).get("weight_map")
    if not places or not isinstance(places, dict):
        raise UserError(f"{index} names no files: fetch it again")
    shards = [index.parent / Path(name).name for name in sorted(set(places.values()))]
    checkpoint = open_safetensors(shards, config)
    differing = sorted(places.keys() ^ checkpoint.shapes.keys())
    if differing:
        raise UserError(f"{index} does not match its files ({differing[:5]}): fetch them again")
    return checkpoint


def open_safetensors(paths: list[Path], config: dict | None) -> Checkpoint:
    """One file, or all shards of a model."""
    files = [map_safetensors(path) for path in paths]
    sources = {name: file for file in files for name in file.keys()}  # noqa: SIM118
    path = paths[0] if len(paths) == 1 else paths[0].parent
    if len(sources) < sum(len(file.keys()) for file in files):
        raise UserError(f"two shards of {path} hold the same tensor: fetch them again")
    shapes = {name: tuple(file.get_slice(name).get_shape()) for name, file in sources.items()}
    metadata = files[0].metadata() or {}
    if config is None and "config" in metadata:
        config = parse_json(metadata["config"], f"the config in the header of {path}")
    return Checkpoint(path, config, metadata, shapes, sources)


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
    if isinstance(tensors, dict):
        tensors = tensors.get("state_dict", tensors)
    if not isinstance(tensors, dict) or not tensors:
        raise UserError(f"{path} is no state dict: found no tensors")
    strange = [n for n, t in tensors.items() if not (isinstance(n, str) and isinstance(t, Tensor))]
    if strange:
        raise UserError(f"{path} is no state dict: found {strange[:5]}")
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    return Checkpoint(path, config, {}, shapes, tensors)


# ---- build


def build(cls: type[nn.Module], config: dict | None, path: Path) -> nn.Module:
    """The model on the meta device: every name and shape, no memory."""
    if config is None:
        raise UserError(
            f"{path} carries no config: pass its folder if config.json is in it, name a preset, or "
            f"pass config=dict(...)"
        )
    config = {key: value for key, value in config.items() if not key.startswith("_")}
    unknown = [key for key in config if key not in inspect.signature(cls).parameters]
    if unknown:
        raise UserError(
            f"config of {path}: {cls.__name__} has no {', '.join(unknown[:5])}: wanted the weights "
            f"of a {cls.__name__}"
        )
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
    if checkpoint.metadata["stage"] == "quant":
        raise UserError(f"{path} is quantized: it can be sampled from (sample.py), nothing else")
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
    as_stored: Collection[str] = (),
) -> None:
    """Give a meta-device model its tensors: all of them, each once, nothing left over.

    rows     our name -> (official names, join): join(*official tensors) is ours; None: the only one
    dropped  official names that have no place in the model, on purpose
    run      trained tensors that replace the checkpoint's, and LoRA pairs that are added to them
    as_stored  names that keep the file's dtype: the numbers of a quantized layer
    device   "meta" is a rehearsal: everything is checked, nothing read
    """
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    trained = run.shapes if run else {}
    check(model, wanted, rows, checkpoint, dropped, trained)
    if torch.device(device).type == "meta":
        return
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
        is_kept = name in as_stored or not tensor.is_floating_point()
        state[name] = tensor if is_kept else tensor.to(dtype)
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
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor.float()).all():
            raise UserError(f"{path} not written: {name} holds NaN or Inf; lower the learning rate")
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
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
        sync_folder(path.parent)
    except (SafetensorError, OSError) as error:
        if partial.exists():
            partial.unlink()
        raise UserError(f"{path} not written ({error}); what was there before is intact") from None


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """A file that is not half written: write(temporary), which then takes the name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".tmp-{path.name}")
    try:
        write(partial)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """A rename is on the disk when its folder is."""
    handle = os.open(folder, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)
