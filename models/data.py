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
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
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


def open_image(path: str | Path, size: tuple[int, int] | None = None) -> Tensor:
    """(3, H, W) in [-1, 1]; given a size (H, W), the largest middle part of that shape, resized."""
    try:
        image = read_image(Path(path))
    except UserError as error:
        raise UserError(f"{path}: {error}; pass a sound JPEG, PNG or WebP") from None
    if size is not None:
        # Pillow's bicubic is antialiased; picking pixels would leave sparkle to the autoencoder.
        image = ImageOps.fit(image, size[::-1], Image.Resampling.BICUBIC)
    return to_tensor(image)


def read_image(path: Path) -> Image.Image:
    """Decoded to the last pixel, upright, RGB. A UserError tells in a phrase what is wrong."""
    try:
        with Image.open(path, formats=FORMATS) as image:
            # A phone's JPEG may carry a depth or HDR map behind the picture (MPO): no animation.
            is_animated = getattr(image, "is_animated", False) and image.format != "MPO"
            image = to_rgb(ImageOps.exif_transpose(image))
    except FileNotFoundError:
        raise UserError("no such image") from None
    except UnidentifiedImageError:
        raise UserError("is not an image, or not JPEG, PNG or WebP") from None
    except Exception as error:  # noqa: BLE001  a damaged file raises any of a dozen kinds
        raise UserError(f"cannot be read ({getattr(error, 'strerror', '') or error})") from None
    if is_animated:
        raise UserError("is animated")
    return image


def to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16 bits in one channel; convert would clip at 255
        gray = np.asarray(image, dtype=np.float32) * (255 / 65535)
        image = Image.fromarray(gray.round().astype(np.uint8))
    elif image.has_transparency_data:  # over white; convert would show what the alpha hides
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def to_tensor(image: Image.Image) -> Tensor:
    """(3, H, W) in [-1, 1]."""
    pixels = np.asarray(image.convert("RGB"), dtype=np.float32)  # (H, W, 3)
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous() / 127.5 - 1


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
        size = (self.resolution, self.resolution)
        with ThreadPoolExecutor(THREADS) as pool:
            images = pool.map(lambda row: open_image(self.files[row], size), rows)
            return torch.stack(list(images))


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
            f"{folder} holds pictures ({len(pictures)}) and no captions: put {pictures[0].stem}.txt"
            f" beside {pictures[0].name} and so on, or all of them into {table}"
        )

    def look(path: Path) -> tuple[str, str]:
        return inspect(path, resolution) if path in captions else ("", "has no caption")

    with ThreadPoolExecutor(THREADS) as pool:
        bar = tqdm(pool.map(look, pictures), "scan", len(pictures), leave=False, unit="img")
        scan = dict(zip(pictures, bar))
    absent = captions.keys() - set(pictures)
    left_out = dict.fromkeys(absent, f"is in {table.name} and not in the folder")
    left_out |= dict.fromkeys(others, "is of another format: convert it to PNG")
    left_out |= {path: reason for path, (_, reason) in scan.items() if reason}
    left_out = sorted(left_out.items())
    files = [path for path, (_, reason) in scan.items() if not reason]
    if len(left_out) > len(files):
        raise UserError(
            f"{folder} has {len(files)} usable pictures and {len(left_out)} that are not "
            f"({first_reasons(folder, left_out)}): mend or remove these"
        )
    kept = [captions[path] for path in files]
    told = json.dumps([RULES, resolution, [scan[path][0] for path in files], kept])
    key = hashlib.sha256(told.encode()).hexdigest()
    return Folder(folder, resolution, files, kept, left_out, key)


def find(folder: Path, suffixes: Sequence[str]) -> list[Path]:
    """Files named like pictures, sorted. What is hidden is thumbnails and other programs' notes."""
    paths = (path for path in folder.rglob("*") if path.suffix.lower() in suffixes)
    paths = (path for path in paths if path.is_file() or path.is_symlink())  # a link may be broken
    parts = {path: path.relative_to(folder).parts for path in paths}
    return sorted(p for p in parts if not any(part.startswith(".") for part in parts[p]))


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
    """Names are quoted: they may hold line breaks, or bytes that no terminal takes."""
    reasons = [f"{os.path.relpath(path, folder)!r} {reason}" for path, reason in left_out[:5]]
    return "; ".join(reasons) + f"; and {len(left_out) - 5} more" * (len(left_out) > 5)


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
    for first in tqdm(range(0, len(source), batch_size), label, leave=False, unit="batch"):
        rows = range(first, min(first + batch_size, len(source)))
        latents = autoencoder.encode(source.images(rows).to(device, dtype)).cpu()  # (B, C, h, w)
        finite = latents.isfinite().flatten(1).all(1)  # (B,)
        if not finite.all():
            row = rows[finite.tolist().index(False)]
            name = source.files[row] if hasattr(source, "files") else f"image {row}"
            raise UserError(f"the latents of {name} hold NaN or Inf in {dtype}: pass --dtype fp32")
        batches.append(latents)
    return torch.cat(batches)
