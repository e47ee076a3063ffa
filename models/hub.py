"""Where a model's files are: a path, a preset, the user's --weights folder, or the hub."""

import re
from collections.abc import Sequence
from pathlib import Path

from models.script import UserError

ROOT = Path(__file__).parent.parent
SUFFIXES = (".safetensors", ".pth", ".pt", ".bin", ".ckpt")
VARIANTS = ["*.fp16*", "*.bf16*", "*.fp8*", "*.int4*"]  # the same in another precision


def locate(
    source: str | Path, presets: dict, weights: str | None = None, subfolder: str = ""
) -> tuple[Path, dict | None]:
    """(file or folder, the preset's config): a local path, else a preset, else a hub id."""
    name = str(source)
    if Path(name).exists():
        return Path(name), None
    same_hub = (preset for preset in presets.values() if preset.get("hub") == name)
    preset = presets.get(name) or next(same_hub, {"hub": name})
    if "path" in preset:
        path = ROOT / preset["path"]
        if not path.exists():
            raise UserError(f"{path} is missing: `git checkout {preset['path']}`")
    elif not is_hub_id(preset["hub"]):
        known = ", ".join(presets)
        raise UserError(f"{name!r} is no file, no folder and no preset; presets: {known}")
    elif weights is not None:
        path = in_folder(Path(weights), preset)
    else:
        path = download_model(preset["hub"], preset.get("file"), subfolder)
    return path, preset.get("config")


def is_hub_id(name: str) -> bool:
    """Is it "org/name", and not the path of a missing file?"""
    is_pair = re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name)
    return bool(is_pair) and Path(name).suffix not in SUFFIXES


def in_folder(folder: Path, preset: dict) -> Path:
    """The file or repository of a preset inside the user's --weights folder."""
    hub, file = preset["hub"], preset.get("file")
    repository = hub.split("/")[-1]
    places = [file, f"{repository}/{file}", repository] if file else [repository]
    if found := [folder / place for place in places if (folder / place).exists()]:
        return found[0]
    wanted = " or ".join(places)
    raise UserError(f"--weights {folder} has no {wanted}: fetch {hub} and put it there")


def download_model(repository: str, file: str | None, subfolder: str) -> Path:
    """The one file; or a folder with the weights of a pipeline's part or of the whole."""
    if file is not None:
        return download(repository, [file]) / file
    for part in (f"{subfolder}/", "") if subfolder else ("",):
        for avoid in (VARIANTS, []):  # a variant is fetched only if there is nothing else
            wanted = [part + "*.json", part + "*.safetensors"]
            folder = download(repository, wanted, avoid + ([] if part else ["*/*"]))
            if any((folder / part).glob("*.safetensors")):
                return folder
    raise UserError(f"{repository} on the hub holds no .safetensors weights: pass a path")


def download(repository: str, wanted: list[str], avoid: Sequence[str] = ()) -> Path:
    """A folder of the hub's cache. HF_TOKEN, HF_HOME and HF_HUB_OFFLINE are respected."""
    from huggingface_hub import errors, snapshot_download

    try:
        return Path(snapshot_download(repository, allow_patterns=wanted, ignore_patterns=avoid))
    except errors.GatedRepoError:
        reason = f"is gated: accept its licence on huggingface.co/{repository}, set HF_TOKEN"
    except (errors.RepositoryNotFoundError, errors.HFValidationError):
        reason = "is no file, folder, preset or public repository: check it, or set HF_TOKEN"
    except OSError as error:  # no network, HF_HUB_OFFLINE, another answer, a full disk
        cause = str(error).split("\n")[0]
        reason = f"cannot be downloaded ({cause}): pass a local path, or --weights"
    raise UserError(f"{repository} {reason}")
