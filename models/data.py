"""Captioned pictures on disk, and their latents, as the trainers take them.

What    `open_folder` reads a folder of pictures and captions, `Folder.images` gives batches of it,
        `encode_images` runs an autoencoder over all of it once. A `Store` keeps what encoders
        made of each picture and caption, `Stored` reads it back row by row.
Why     One broken or upside-down picture in a thousand does not stop a training run, it spoils it.
        So every picture is decoded whole before training starts, and what is left out is named.
        Latents are computed once: the autoencoder then makes room for the transformer.
How     Captions stand beside the pictures, `fox.jpg` and `fox.txt` (first line), or in one
        `metadata.jsonl` with a line like {"file_name": "fox.jpg", "text": "a fox in snow"}.
        A picture is cropped to the nearest of some shapes (`buckets`) whose sides are whole
        multiples of the autoencoders' factor; a batch is of one shape.
        What is cached stands under the hash of all it was made from, so that it cannot go stale.
Trust   Pictures are data from strangers: three well-tested formats, told by content, not by name.
"""

import codecs
import contextlib
import hashlib
import json
import math
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields, replace
from functools import cached_property, lru_cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor, nn
from tqdm import tqdm

from models import runs, text
from models.script import UserError
from models.weights import open_checkpoint, save, write_whole

FORMATS = ("JPEG", "PNG", "WEBP")  # no others are tried: exotic decoders are where holes are
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
OTHERS = (".avif", ".bmp", ".gif", ".heic", ".jxl", ".tif", ".tiff")  # named as left out, not read
MAX_RATIO = 4  # of the sides; beyond, a crop shows too little of what the caption tells
RATIOS = 8  # from square to MAX_RATIO: a crop loses 9% at most, and no shape has few pictures
MEMORY = 2 * 2**30  # bytes of each kind of cached rows that stay in memory once they are read
RULES = 2  # part of every key: count up when pixels or captions come out differently
VALIDATION = 64  # pictures held out, an eighth at most
FEWEST = 16  # pictures to train on
MOST_PIXELS = {"cpu": 2**17}  # of a batch to encode (or one picture): what a CPU's caches hold
THREADS = 8  # Pillow decodes without the GIL; each thread holds one full-size picture

# ---- one picture


def open_image(path: str | Path, size: tuple[int, int] | None = None) -> Tensor:
    """(3, H, W) in [-1, 1]; given a size (H, W), the largest middle part of that shape, resized."""
    return to_tensors([read_sized(path, size)])[0]


def read_sized(path: str | Path, size: tuple[int, int] | None) -> Image.Image:
    try:
        image = read_image(Path(path))
    except UserError as error:
        raise UserError(f"{path}: {error}; pass a sound JPEG, PNG or WebP") from None
    if size is not None:
        # Pillow's bicubic is antialiased; picking pixels would leave sparkle to the autoencoder.
        image = ImageOps.fit(image, size[::-1], Image.Resampling.BICUBIC)
    return image


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


def to_tensors(images: Sequence[Image.Image]) -> Tensor:
    """(B, 3, H, W) in [-1, 1], of RGB pictures of one size."""
    pixels = torch.from_numpy(np.stack([np.asarray(image) for image in images]))  # (B, H, W, 3)
    return pixels.permute(0, 3, 1, 2).contiguous() / 127.5 - 1


# ---- a folder of captioned pictures


@dataclass(frozen=True)
class Folder:
    path: Path
    resolution: int  # of a square; other shapes have about as many pixels
    files: list[Path]  # sorted
    captions: list[str]
    sizes: list[tuple[int, int]]  # (H, W) each picture is cropped to
    hashes: list[str]  # sha256 of each file
    left_out: list[tuple[Path, str]]  # (file, the reason in a phrase)
    key: str  # of all that decides images() and captions: other pictures, another run

    def __len__(self) -> int:
        return len(self.files)

    def images(self, rows: Sequence[int]) -> Tensor:
        """(B, 3, H, W) in [-1, 1], of rows of one size."""
        with ThreadPoolExecutor(THREADS) as pool:
            images = list(pool.map(lambda row: read_sized(self.files[row], self.sizes[row]), rows))
        return to_tensors(images)


def buckets(resolution: int, factor: int) -> list[tuple[int, int]]:
    """Shapes (H, W) in whole `factor`s with at most resolution^2 pixels, 1:1 to 1:MAX_RATIO."""
    shapes = {(resolution, resolution)}
    for i in range(1, RATIOS + 1):
        ratio = MAX_RATIO ** (i / RATIOS)
        short = round(resolution / ratio**0.5 / factor) * factor
        long = resolution**2 // (max(short, factor) * factor) * factor
        if short and long <= MAX_RATIO * short:
            shapes |= {(short, long), (long, short)}
    return sorted(shapes)


def nearest(shapes: Sequence[tuple[int, int]], height: int, width: int) -> tuple[int, int]:
    """The shape that a crop of this picture loses least to."""
    return min(shapes, key=lambda shape: abs(math.log(shape[0] * width / (shape[1] * height))))


def open_folder(
    folder: str | Path, resolution: int, factor: int = 0, notes: Path | None = None
) -> Folder:
    """Find pictures and captions, sub-folders included, and decode every picture once.

    factor: of the sides of all buckets, in pixels; 0: every picture is cropped to the square.
    notes: a file that remembers the pictures found sound, for the next time.
    """
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
    shapes = buckets(resolution, factor) if factor else [(resolution, resolution)]

    seen = Seen(notes)

    def look(path: Path) -> Look:
        return inspect(path, shapes, seen) if path in captions else Look(reason="has no caption")

    with seen, ThreadPoolExecutor(THREADS) as pool:
        bar = tqdm(pool.map(look, pictures), "scan", len(pictures), leave=False, unit="img")
        scan = dict(zip(pictures, bar))
    absent = captions.keys() - set(pictures)
    left_out = dict.fromkeys(absent, f"is in {table.name} and not in the folder")
    left_out |= dict.fromkeys(others, "is of another format: convert it to PNG")
    left_out |= {path: found.reason for path, found in scan.items() if found.reason}
    left_out = sorted(left_out.items())
    files = [path for path, found in scan.items() if not found.reason]
    if len(left_out) > len(files):
        raise UserError(
            f"{folder} has {len(files)} usable pictures and {len(left_out)} that are not "
            f"({first_reasons(folder, left_out)}): mend or remove these"
        )
    kept = [captions[path] for path in files]
    sizes, hashes = [scan[path].size for path in files], [scan[path].sha256 for path in files]
    key = digest(sorted(zip(hashes, sizes, kept)))  # whatever the files are called
    return Folder(folder, resolution, files, kept, sizes, hashes, left_out, key)


def shuffled(folder: Folder) -> Folder:
    """In the order of the pictures' hashes, so that the last ones are a fair sample of all."""
    order = sorted(range(len(folder)), key=folder.hashes.__getitem__)
    columns = ("files", "captions", "sizes", "hashes")
    return replace(folder, **{c: [getattr(folder, c)[i] for i in order] for c in columns})


def find(folder: Path, suffixes: Sequence[str]) -> list[Path]:
    """Files named like pictures, sorted. What is hidden is thumbnails and other programs' notes."""
    paths = (path for path in folder.rglob("*") if path.suffix.lower() in suffixes)
    paths = (path for path in paths if path.is_file() or path.is_symlink())  # a link may be broken
    parts = {path: path.relative_to(folder).parts for path in paths}
    return sorted(p for p in parts if not any(part.startswith(".") for part in parts[p]))


@dataclass(frozen=True)
class Look:
    """What the scan found in one file."""

    size: tuple[int, int] = (0, 0)  # (H, W) to crop to
    sha256: str = ""
    reason: str = ""  # to leave it out, in a phrase


class Seen:
    """What earlier scans found in sound pictures: of these only the dates are looked at again."""

    def __init__(self, notes: Path | None):
        self.notes, self.rows = notes, {}
        try:
            told = json.loads(notes.read_bytes()) if notes else {}
            self.rows = dict(told["files"]) if told.get("rules") == RULES else {}
        except (OSError, ValueError, LookupError, TypeError, AttributeError):
            pass  # absent or damaged: everything is looked at

    def examine(self, path: Path) -> tuple[int, int, str]:
        """(width, height, sha256) of a picture that decodes to its last pixel."""
        try:
            about = path.stat()
        except OSError:
            read_image(path)  # says what is wrong
            raise
        # The second date is the system's own: no copying sets it back.
        stamp = [about.st_size, about.st_mtime_ns, about.st_ctime_ns]
        name = os.path.abspath(path)
        if self.rows.get(name, [None])[0] != stamp:
            size = read_image(path).size
            self.rows[name] = [stamp, *size, hashlib.sha256(path.read_bytes()).hexdigest()]
        return tuple(self.rows[name][1:])

    def __enter__(self):
        return self

    def __exit__(self, *_) -> None:
        """Kept when a scan is interrupted, too."""
        if self.notes:
            with contextlib.suppress(OSError):  # no room: the next scan takes longer
                told = json.dumps({"rules": RULES, "files": self.rows})
                write_whole(self.notes, lambda path: path.write_text(told))


def inspect(path: Path, shapes: Sequence[tuple[int, int]], seen: Seen) -> Look:
    try:
        width, height, sha256 = seen.examine(path)
    except UserError as error:
        return Look(reason=str(error))
    size = nearest(shapes, height, width)
    if height < size[0] or width < size[1]:  # enlarged, it would teach the model to blur
        resolution = math.isqrt(size[0] * size[1])
        if size[0] == size[1]:
            cure = f"lower --resolution {resolution}"
        else:
            cure = f"lower --resolution below the {size[1]}x{size[0]} of its shape"
        return Look(reason=f"is {width}x{height}: {cure}, or enlarge it yourself")
    if max(width, height) > MAX_RATIO * min(width, height):
        return Look(reason=f"is {width}x{height}: crop it to 1:{MAX_RATIO} or less")
    return Look(size, sha256)


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
    counts = Counter(folder.sizes).most_common()
    if len(counts) > 1:
        report += "\nshapes " + ", ".join(f"{w}x{h} {n}" for (h, w), n in counts)
    if folder.left_out:
        report += f"\nleft out {len(folder.left_out)}: "
        report += first_reasons(folder.path, folder.left_out)
    return report


def write_left_out(folder: Folder, path: Path) -> Path:
    """Every file that is not trained on and why, a line each."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = (f"{os.path.relpath(p, folder.path)!r} {why}\n" for p, why in folder.left_out)
    path.write_text("".join(lines), errors="replace")
    return path


def first_reasons(folder: Path, left_out: list[tuple[Path, str]]) -> str:
    """Names are quoted: they may hold line breaks, or bytes that no terminal takes."""
    reasons = [f"{os.path.relpath(path, folder)!r} {reason}" for path, reason in left_out[:5]]
    return "; ".join(reasons) + f"; and {len(left_out) - 5} more" * (len(left_out) > 5)


# ---- latents and text, kept


def digest(*facts) -> str:
    """A name for what is made of these facts: other facts, another name."""
    return hashlib.sha256(json.dumps([RULES, *facts], default=str).encode()).hexdigest()


def file_digest(path: Path) -> str:
    """sha256 of a file of weights, or of all in a folder of shards."""
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    total = hashlib.sha256()
    for file in files:
        with file.open("rb") as stream:
            total.update(hashlib.file_digest(stream, "sha256").digest())
    return total.hexdigest()


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


@dataclass(frozen=True)
class Store:
    """A folder of safetensors, one for the rows of a batch: what is killed half way goes on."""

    folder: Path

    def files(self) -> dict[str, Path]:
        """Where each key's row is, by the headers of all files."""
        places = {}
        for path in sorted(self.folder.glob("??/*.safetensors")):
            about = path.stat()
            places |= dict.fromkeys(keys_in(path, about.st_size, about.st_mtime_ns), path)
        return places

    def lacks(self, keys: Sequence[str]) -> list[int]:
        """Which of them are not there; of equal ones the first: two processes may share it."""
        places, first = self.files(), {}
        for i, key in enumerate(keys):
            first.setdefault(key, i)
        return [i for key, i in first.items() if key not in places]

    def write(self, rows: dict[str, dict[str, Tensor]]) -> None:
        """{key: {name: tensor}}, as one file."""
        tensors = {f"{key}.{name}": t for key, row in rows.items() for name, t in row.items()}
        name = digest(*rows)
        save(self.folder / name[:2] / f"{name}.safetensors", tensors, {})

    def rows(self, keys: Sequence[str], name: str) -> "Tensor | Stored":
        """One tensor (n, ...) if all rows have one shape and fit in MEMORY; otherwise from disk."""
        places = self.files()
        stored = Stored([(places[key], f"{key}.{name}") for key in keys])
        if stored.row(0).nbytes * len(stored) > MEMORY:
            return stored
        rows = [stored.row(i) for i in range(len(stored))]
        return torch.stack(rows) if len({row.shape for row in rows}) == 1 else stored


@lru_cache(maxsize=None)
def keys_in(path: Path, _size: int, _written: int) -> set[str]:
    """Of the rows in a file of a Store; none if it is damaged. Read once, until written again."""
    try:
        return {name.split(".")[0] for name in open_checkpoint(path).shapes}
    except UserError:
        return set()


class Stored:
    """Tensors on disk, read when asked for: stands for one tensor (n, ...) of all of them."""

    def __init__(self, places: list[tuple[Path, str]]):
        self.places, self.kept, self.room = places, {}, MEMORY
        self.open = lru_cache(maxsize=256)(open_checkpoint)  # a header names a batch of rows

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, rows: Tensor) -> Tensor:
        """(B, ...), of rows (B,) of one shape."""
        with ThreadPoolExecutor(THREADS) as pool:
            return torch.stack(list(pool.map(self.row, rows.tolist())))

    def row(self, i: int) -> Tensor:
        if i in self.kept:
            return self.kept[i]
        path, name = self.places[i]
        # A copy: what is mapped holds its file, and the system counts those (65530 on Linux).
        tensor = self.open(path).get(name).clone()
        if tensor.nbytes < self.room:
            self.kept[i], self.room = tensor, self.room - tensor.nbytes
        return tensor


@dataclass(frozen=True)
class Encoder:
    """An autoencoder that is not loaded yet."""

    name: str
    identity: str  # the digest of its weights and config
    load: Callable[[], nn.Module]
    device: torch.device
    dtype: torch.dtype


@torch.no_grad()
def encode_rows(
    source: Folder,  # or whatever has a length and images(rows): the toy world
    rows: Sequence[int],
    images: Tensor,
    autoencoder: nn.Module,
    device: torch.device,
    dtype: torch.dtype,
) -> Tensor:
    """Latents (B, C, h, w) of these images, on the CPU. UserError: one of them is not finite."""
    latents = autoencoder.encode(images.to(device, dtype)).cpu()
    finite = latents.isfinite().flatten(1).all(1)  # (B,)
    if not finite.all():
        row = rows[finite.tolist().index(False)]
        name = source.files[row] if hasattr(source, "files") else f"image {row}"
        raise UserError(f"the latents of {name} hold NaN or Inf in {dtype}: pass --dtype fp32")
    return latents


def encode_images(
    source: Folder,
    autoencoder: nn.Module,
    device: torch.device,
    dtype: torch.dtype,
    batch_size: int,
    label: str,
) -> Tensor:
    """Latents of every image of a source whose images have one size, (n, C, h, w), on the CPU."""
    starts = tqdm(range(0, len(source), batch_size), label, leave=False, unit="batch")
    batches = (range(first, min(first + batch_size, len(source))) for first in starts)
    how = (autoencoder, device, dtype)
    return torch.cat([encode_rows(source, rows, source.images(rows), *how) for rows in batches])


def batches_of_a_size(folder: Folder, rows: Sequence[int], pixels: int) -> list[list[int]]:
    """Rows in batches of one size and at most so many pixels (or one picture)."""
    of_size = {}
    for row in rows:
        of_size.setdefault(folder.sizes[row], []).append(row)
    batches = []
    for (height, width), members in sorted(of_size.items()):
        n = max(1, pixels // (height * width))
        batches += [members[i : i + n] for i in range(0, len(members), n)]
    return batches


def read_ahead(folder: Folder, batches: Sequence[list[int]]) -> Iterator[Tensor]:
    """The images of each batch. The next one's are read while the caller is busy."""
    with ThreadPoolExecutor(1) as pool:
        tasks = (pool.submit(folder.images, rows) for rows in batches)
        following = next(tasks, None)
        while following is not None:
            images = following.result()
            following = next(tasks, None)
            yield images


def store_latents(
    folder: Folder, store: Store, encoders: Sequence[Encoder], share: slice = slice(None)
) -> list[list[str]]:
    """Encode what the store lacks, and return for each encoder the key of every row's latents.

    A picture is read once for all encoders; one that has nothing to do is not loaded.
    share: the part of the missing rows that this process encodes.
    """
    keys = [
        [
            digest("latents", encoder.identity, str(encoder.dtype), sha256, size)
            for sha256, size in zip(folder.hashes, folder.sizes)
        ]
        for encoder in encoders
    ]
    lacking = [set(store.lacks(of_rows)) for of_rows in keys]
    runs.wait_for_all()  # every process has looked before one writes
    pixels = MOST_PIXELS.get(encoders[0].device.type, 2**22)
    batches = batches_of_a_size(folder, sorted(set().union(*lacking)), pixels)[share]
    loaded = [
        encoder.load() if batches and lacks else None for encoder, lacks in zip(encoders, lacking)
    ]
    bar = tqdm(batches, "encode", leave=False, unit="batch")
    for rows, images in zip(bar, read_ahead(folder, batches)):
        for encoder, autoencoder, lacks, names in zip(encoders, loaded, lacking, keys):
            if mine := [i for i, row in enumerate(rows) if row in lacks]:
                few = [rows[i] for i in mine]
                how = (autoencoder, encoder.device, encoder.dtype)
                latents = encode_rows(folder, few, images[mine], *how)
                store.write({names[row]: {"latents": one} for row, one in zip(few, latents)})
    return keys


# ---- all that a trainer sees


@dataclass(frozen=True)
class Pictures:
    """What both stages train on, encoded once: tensors, or rows on disk (Stored)."""

    base_latents: Tensor | Stored | None  # (n, C, h, w) of the base's autoencoder
    latents: Tensor | Stored  # (n, C', h', w') of the new one
    cond: tuple[Tensor | Stored, ...]  # of the distinct captions
    caption: Tensor  # (n,) which of them
    null_cond: tuple[Tensor, ...]  # of the empty caption
    guided: bool = True  # the model takes guidance as an input: FLUX
    sizes: tuple = ()  # of each picture, in pixels; (): all the same
    names: tuple[str, ...] = ()  # of each picture
    captions: tuple[str, ...] = ()  # the distinct ones
    key: str = ""  # of all of this

    def __len__(self) -> int:
        """How many are trained on. The last ones are held out."""
        return len(self.latents) - min(VALIDATION, len(self.latents) // 8)

    def of_a_size(self, rows: range) -> list[Tensor]:
        groups = {}
        for row in rows:
            groups.setdefault(self.sizes[row] if self.sizes else 0, []).append(row)
        return [torch.tensor(group) for group in groups.values()]

    @cached_property
    def trained(self) -> list[Tensor]:
        return self.of_a_size(range(len(self)))

    @cached_property
    def held_out(self) -> list[Tensor]:
        return self.of_a_size(range(len(self), len(self.latents)))

    def names_of(self, rows: Tensor) -> Callable[[], list[str]]:
        return lambda: [self.names[row] for row in rows] if self.names else []

    def draw(self, size: int, generator: torch.Generator) -> Tensor:
        """Rows (B,) of one size; every picture is as likely as any other."""
        group = self.trained[0]
        if len(self.trained) > 1:
            counts = torch.tensor([float(len(group)) for group in self.trained])
            group = self.trained[torch.multinomial(counts, 1, generator=generator)]
        return group[torch.randint(len(group), (size,), generator=generator)]


def encode(source, encoders: Sequence[Encoder], cache: Path) -> list:
    """For each encoder the latents (n, C, h, w) of every picture: a tensor, or Stored.

    source: a Folder, whose latents are a file a batch, each process encoding its part; or the toy
    world, whose are one file.
    """
    if isinstance(source, Folder):
        store, share = Store(cache), slice(runs.rank(), None, runs.world())
        keys = store_latents(source, store, encoders, share)
        runs.wait_for_all()
        return [store.rows(of_rows, "latents") for of_rows in keys]

    def encode_scenes(encoder: Encoder) -> Tensor:
        def compute() -> dict[str, Tensor]:
            batch = 64 if encoder.device.type == "cuda" else 8  # what a CPU's caches hold
            how = (encoder.load(), encoder.device, encoder.dtype, batch, encoder.name)
            return {"latents": encode_images(source, *how)}

        path = cache / f"{Path(encoder.name).stem}.safetensors"
        key = f"{source.key} | {encoder.identity} {encoder.dtype}"
        return runs.on_first(lambda: cached(path, key, compute))["latents"]

    return [encode_scenes(encoder) for encoder in encoders]


def encode_captions(
    kind: str, repo: str, captions: list[str], cache: Path, device, dtype: torch.dtype
) -> tuple[list[str], tuple, tuple]:
    """(the distinct captions, their cond, null_cond): tensors (toy), or rows kept on disk."""
    distinct = sorted(set(captions))
    if kind in text.TOYS:
        cond, _ = text.encode(kind, repo, ["", *distinct], device=device)
        return distinct, tuple(c[1:] for c in cond), tuple(c[:1] for c in cond)
    # SANA's unconditional prompt goes without instruction, like a negative one.
    prompts = [("", kind == "sana"), *((caption, False) for caption in distinct)]
    store = Store(cache)
    named = text.cache_keys(kind, repo, dtype, prompts)
    keys = [named[prompt] for prompt in prompts]
    missing = store.lacks(keys)[runs.rank() :: runs.world()]
    runs.wait_for_all()  # every process has looked before one writes
    if missing:
        rows = text.encode_each(kind, repo, [prompts[i] for i in missing], device, dtype)
        bar = tqdm(missing, "text", leave=False)
        for outputs, i in zip(rows, bar):
            store.write({keys[i]: {str(j): output for j, output in enumerate(outputs)}})
    runs.wait_for_all()
    null = tuple(store.rows(keys[:1], str(i))[torch.tensor([0])] for i in range(2))
    return distinct, tuple(store.rows(keys[1:], str(i)) for i in range(2)), null


def assemble(
    source, captions: list[str], latents: list, words: tuple[list, tuple, tuple], guided: bool
) -> Pictures:
    """latents: (the base's and) the new ones; words: what encode_captions gives."""
    distinct, cond, null_cond = words
    index = {caption: i for i, caption in enumerate(distinct)}
    return Pictures(
        base_latents=latents[0] if len(latents) == 2 else None,
        latents=latents[-1],
        cond=cond,
        caption=torch.tensor([index[caption] for caption in captions]),
        null_cond=null_cond,
        guided=guided,
        sizes=tuple(getattr(source, "sizes", ())),
        names=tuple(map(str, getattr(source, "files", ()))),
        captions=tuple(distinct),
        key=source.key,
    )


@dataclass(frozen=True)
class Batch:
    latents: Tensor  # (B, C, h, w)
    noise: Tensor
    timestep: Tensor  # (B,)
    cond: tuple[Tensor, ...]
    null_cond: tuple[Tensor, ...]
    guidance: Tensor | None  # (B,), None if the model does not take it
    rows: Tensor | None = None  # of the pictures, all processes' together

    def part(self, rows: slice, device) -> "Batch":
        return self.mapped(lambda tensor: tensor[rows].to(device))

    def tensors(self) -> list[Tensor]:
        """All that a pass reads."""
        given = [] if self.guidance is None else [self.guidance]
        return [self.latents, self.noise, self.timestep, *self.cond, *self.null_cond, *given]

    def clone(self) -> "Batch":
        """In memory of its own, every tensor contiguous."""
        return self.mapped(lambda tensor: tensor.clone(memory_format=torch.contiguous_format))

    def mapped(self, function: Callable[[Tensor], Tensor]) -> "Batch":
        """function of each tensor that a pass reads."""

        def take(value):
            if isinstance(value, tuple):
                return tuple(map(take, value))
            return value if value is None else function(value)

        taken = {f.name: take(getattr(self, f.name)) for f in fields(self) if f.name != "rows"}
        return Batch(**taken, rows=self.rows)


def parts(batch: Batch, size: int, device) -> Iterator[tuple[Batch, float]]:
    """The batch in passes of `size` pictures (0: at once), and the weight of each one's loss."""
    n = len(batch.noise)
    for first in range(0, n, size or n):
        part = batch.part(slice(first, first + (size or n)), device)
        yield part, len(part.noise) / len(batch.rows)


def ahead(draw: Callable[[int], Batch], device: torch.device) -> Callable[[int], Batch]:
    """draw(step), which on a GPU is there already: the next is drawn while this one trains."""
    if device.type != "cuda":
        return draw
    pool, waiting = ThreadPoolExecutor(1), {}

    def take(step: int) -> Batch:
        batch = waiting.pop(step).result() if step in waiting else draw(step)
        waiting[step + 1] = pool.submit(draw, step + 1)
        return batch

    return take


def example(model: nn.Module, height: int, width: int) -> Batch:
    """One picture's batch on the meta device: shapes without values."""
    config, channels = model.config, model.latent_channels
    with torch.device("meta"):
        latents = torch.empty(1, channels, height, width)
        if "joint_attention_dim" in config:
            text_cond = torch.empty(1, 512, config["joint_attention_dim"])
            cond = (text_cond, torch.empty(1, config["pooled_projection_dim"]))
        else:
            text_cond = torch.empty(1, 300, config["caption_channels"])
            cond = (text_cond, torch.empty(1, 300, dtype=torch.bool))
        guidance = torch.empty(1) if "joint_attention_dim" in config else None
        return Batch(latents, latents, torch.empty(1), cond, cond, guidance)
