"""Captioned pictures on disk, and their latents, as the trainers take them.

What    `open_folder` reads a folder of pictures and captions, `Folder.images` gives batches of it,
        `encode_images` runs an autoencoder over all of it once, `cached` keeps the result.
Why     One broken or upside-down picture in a thousand does not stop a training run, it spoils it.
        So every picture is decoded whole before training starts, and what is left out is named.
        Latents are computed once: the autoencoder then makes room for the transformer.
How     Captions stand beside the pictures, `fox.jpg` and `fox.txt` (first line), or in one
        `metadata.jsonl` with a line like {"file_name": "fox.jpg", "text": "a fox in snow"}.
        A cache carries the key of what it was made from, so that it cannot go stale unnoticed.
Trust   Pictures are data from strangers: three well-tested formats, told by content, not by name.
"""

import codecs
import hashlib
import json
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor, nn
from tqdm import tqdm

from models.weights import UserError, open_checkpoint, save

FORMATS = ("JPEG", "PNG", "WEBP")  # no others are tried: exotic decoders are where holes are
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
OTHERS = (".avif", ".bmp", ".gif", ".heic", ".jxl", ".tif", ".tiff")  # named as left out, not read
MAX_RATIO = 4  # of the sides; beyond, a square crop shows too little of what the caption tells
RULES = 1  # part of every key: count up when pixels or captions come out differently
THREADS = 8  # Pillow decodes without the GIL; each thread holds one full-size picture

# ---- one picture


def open_image(path: str | Path) -> Tensor:
    """(3, H, W) in [-1, 1]: turned by its EXIF tag, transparency over white, 16 bits scaled."""
    try:
        return to_tensor(read_image(Path(path)))
    except UserError as error:
        raise UserError(f"{path}: {error}; pass a sound JPEG, PNG or WebP") from None


def read_image(path: Path) -> Image.Image:
    """Decoded to the last pixel and upright. A UserError tells in a phrase what is wrong."""
    try:
        with Image.open(path, formats=FORMATS) as image:
            # A phone's JPEG may carry a depth or HDR map behind the picture (MPO): no animation.
            is_animated = getattr(image, "is_animated", False) and image.format != "MPO"
            image = ImageOps.exif_transpose(image)  # a copy, so the whole file was decoded
    except FileNotFoundError:
        raise UserError("no such image") from None
    except UnidentifiedImageError:
        raise UserError("is not an image, or not JPEG, PNG or WebP") from None
    except Exception as error:  # noqa: BLE001  a damaged file raises any of a dozen kinds
        raise UserError(f"cannot be read ({getattr(error, 'strerror', '') or error})") from None
    if is_animated:
        raise UserError("is animated")
    return image


def to_tensor(image: Image.Image) -> Tensor:
    if image.mode.startswith("I"):  # 16 bits in one channel; convert("RGB") would clip at 255
        gray = np.asarray(image, dtype=np.float32) / 65535
        pixels = np.repeat(gray[..., None], 3, axis=-1)  # (H, W, 3)
    elif image.has_transparency_data:
        rgba = np.asarray(image.convert("RGBA"), dtype=np.float32) / 255
        pixels = rgba[..., :3] * rgba[..., 3:] + 1 - rgba[..., 3:]  # over white
    else:
        pixels = np.asarray(image.convert("RGB"), dtype=np.float32) / 255
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous() * 2 - 1


def fit(image: Tensor, height: int, width: int) -> Tensor:
    """The largest centred part of this shape, resized: (3, H, W) -> (3, height, width)."""
    scale = min(image.shape[1] / height, image.shape[2] / width)
    tall, wide = round(height * scale), round(width * scale)
    top, left = (image.shape[1] - tall) // 2, (image.shape[2] - wide) // 2
    part = image[None, :, top : top + tall, left : left + wide]
    # Antialiased: else a reduced picture sparkles, and an autoencoder spends its latents on that.
    part = F.interpolate(part, (height, width), mode="bicubic", antialias=True)
    return part[0].clamp(-1, 1)  # bicubic overshoots at edges


# ---- a folder of captioned pictures


@dataclass(frozen=True)
class Folder:
    path: Path
    resolution: int  # pixels a side
    files: list[Path]  # sorted
    captions: list[str]
    left_out: list[tuple[Path, str]]  # (file, the reason in a phrase)
    key: str  # of all that decides images() and captions: a cache of them must match it

    def __len__(self) -> int:
        return len(self.files)

    def images(self, rows: Sequence[int]) -> Tensor:
        """(B, 3, R, R) in [-1, 1]."""
        size = self.resolution, self.resolution
        with ThreadPoolExecutor(THREADS) as pool:
            return torch.stack(
                list(pool.map(lambda row: fit(open_image(self.files[row]), *size), rows))
            )


def open_folder(folder: str | Path, resolution: int) -> Folder:
    """Find pictures and captions, sub-folders included, and decode every picture once."""
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder} is no folder: name one that holds pictures and their captions")
    pictures, others = find(folder, SUFFIXES), find(folder, OTHERS)
    if not pictures:
        raise UserError(
            f"{folder} holds no {', '.join(SUFFIXES)} ({len(others)} of other formats): convert "
            "them, or name another folder"
        )
    table = folder / "metadata.jsonl"
    captions = read_table(table) if table.exists() else read_sidecars(pictures)
    if not captions:
        raise UserError(
            f"{folder} holds {len(pictures)} pictures and no captions: put {pictures[0].stem}.txt "
            f"beside {pictures[0].name} and so on, or all of them into {table}"
        )
    left_out = [(path, "is of another format: convert it to PNG") for path in others]
    absent = captions.keys() - set(pictures) - set(others)
    left_out += [(path, f"is in {table.name} and not in the folder") for path in absent]
    left_out += [(path, "has no caption") for path in pictures if path not in captions]

    candidates = [path for path in pictures if path in captions]
    with ThreadPoolExecutor(THREADS) as pool:
        scan = pool.map(lambda path: inspect(path, resolution), candidates)
        scan = list(tqdm(scan, desc="scan", total=len(candidates), unit="img", leave=False))
    left_out += [(path, reason) for path, (_, reason) in zip(candidates, scan) if reason]
    left_out.sort()
    digests = {path: digest for path, (digest, _) in zip(candidates, scan) if digest}
    if len(left_out) > len(digests):
        raise UserError(
            f"{folder} has {len(digests)} usable pictures and {len(left_out)} that are not "
            f"({first_reasons(folder, left_out)}): mend or remove these"
        )
    kept = [captions[path] for path in digests]
    told = json.dumps([RULES, resolution, list(digests.values()), kept])
    key = hashlib.sha256(told.encode()).hexdigest()
    return Folder(folder, resolution, list(digests), kept, left_out, key)


def find(folder: Path, suffixes: Sequence[str]) -> list[Path]:
    """Files named like pictures, sorted. What is hidden is thumbnails and other programs' notes."""
    paths = (path for path in folder.rglob("*") if path.suffix.lower() in suffixes)
    return sorted(
        path
        for path in paths
        if not any(part.startswith(".") for part in path.relative_to(folder).parts)
        and not path.is_dir()
    )


def inspect(path: Path, resolution: int) -> tuple[str, str]:
    """(sha256 of the file, "") or ("", the reason to leave it out)."""
    try:
        width, height = read_image(path).size
    except UserError as error:
        return "", str(error)
    if min(width, height) < resolution:  # enlarged, it would teach the model to blur
        return "", f"is {width}x{height}: lower --resolution {resolution}, or enlarge it yourself"
    if max(width, height) > MAX_RATIO * min(width, height):
        return "", f"is {width}x{height}: crop it to 1:{MAX_RATIO} or less"
    return hashlib.sha256(path.read_bytes()).hexdigest(), ""


# ---- captions


def read_sidecars(pictures: list[Path]) -> dict[Path, str]:
    owners = {}  # caption file -> its picture
    for path in pictures:
        text = path.with_suffix(".txt")
        if text.is_file() and owners.setdefault(text, path) != path:
            raise UserError(f"{owners[text]} and {path} share {text.name}: rename or remove one")
    return {path: first_line(read_text(text)) for text, path in owners.items()}


def read_table(table: Path) -> dict[Path, str]:
    """metadata.jsonl as in Hugging Face's ImageFolder; paths are relative to it."""
    captions = {}
    for number, line in enumerate(read_text(table).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            path = table.parent / row["file_name"]
        except (ValueError, LookupError, TypeError, RecursionError) as error:
            raise UserError(
                f'{table} line {number} is not like {{"file_name": "fox.jpg", "text": "a fox"}} '
                f"({type(error).__name__}: {error})"
            ) from None
        if path in captions:
            raise UserError(f"{table} line {number} names {path.name} a second time: remove one")
        texts = [row.get(word) for word in ("text", "caption", "prompt")]
        if texts := [text for text in texts if isinstance(text, str)]:
            captions[path] = first_line(texts[0])
    return captions


def read_text(path: Path) -> str:
    """UTF-8, with or without a mark in front, or the UTF-16 that Windows writes."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror})") from None
    is_wide = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    return data.decode("utf-16" if is_wide else "utf-8-sig", errors="replace")


def first_line(text: str) -> str:
    """The first that is not blank. Half a character, which JSON can hold, becomes a "?"."""
    lines = text.encode(errors="replace").decode().splitlines()
    return next((line.strip() for line in lines if line.strip()), "")


# ---- report


def describe(folder: Folder) -> str:
    """A line on what is there, and one on what is left out."""
    empty = sum(not caption for caption in folder.captions)
    broken = sum("\ufffd" in caption for caption in folder.captions)
    report = f"{folder.path}: {len(folder)} pictures at {folder.resolution}x{folder.resolution}"
    report += f", {empty} captions are empty" * bool(empty)
    report += f", {broken} captions are not UTF-8" * bool(broken)
    if folder.left_out:
        report += f"\nleft out {len(folder.left_out)}: "
        report += first_reasons(folder.path, folder.left_out)
    return report


def first_reasons(folder: Path, left_out: list[tuple[Path, str]]) -> str:
    names = [(str(path.relative_to(folder)), reason) for path, reason in left_out[:5]]
    reasons = "; ".join(f"{name!r} {reason}" for name, reason in names)  # quoted: a name holds any
    return reasons + f"; and {len(left_out) - 5} more" * (len(left_out) > 5)


# ---- latents


def cached(
    path: Path | None, key: str, compute: Callable[[], dict[str, Tensor]]
) -> dict[str, Tensor]:
    """What compute() gives, from the file if that was made under the same key."""
    if path is not None and path.exists():
        try:
            file = open_checkpoint(path)
        except UserError:
            file = None  # damaged: as good as absent
        if file is not None and file.metadata.get("key") == key:
            return {name: file.get(name) for name in file.shapes}
    tensors = compute()
    if path is not None:
        save(path, tensors, {"key": key})
    return tensors


@torch.no_grad()
def encode_images(
    source: Folder,  # or whatever has a length and images(rows): the toy world
    autoencoder: nn.Module,
    device: torch.device,
    dtype: torch.dtype,
    batch_size: int,
    label: str,
) -> Tensor:
    """Latents of every image, (n, C, h, w), on the CPU."""
    batches = []
    rows = range(len(source))
    for first in tqdm(rows[::batch_size], desc=label, unit="batch", leave=False):
        some = rows[first : first + batch_size]
        latents = autoencoder.encode(source.images(some).to(device, dtype)).cpu()  # (B, C, h, w)
        finite = latents.isfinite().flatten(1).all(1)  # (B,)
        if not finite.all():
            row = some[finite.tolist().index(False)]
            name = source.files[row] if hasattr(source, "files") else f"image {row}"
            raise UserError(f"the latents of {name} overflow in {dtype}: try --dtype fp32")
        batches.append(latents)
    return torch.cat(batches)
