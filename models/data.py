"""Captioned pictures on disk, and their latents, as the trainers take them.

What    `open_source` opens a folder of pictures and captions, or the toy world. `prepare` encodes
        both once and returns a `Dataset`, from which the trainers draw batches.
Why     One broken or upside-down picture in a thousand does not stop a training run, it spoils it.
        So every picture is decoded whole before training starts, and what is left out is listed.
How     Captions stand beside the pictures, `fox.jpg` and `fox.txt` (first line), or in one
        `metadata.jsonl` with a line like {"file_name": "fox.jpg", "text": "a fox in snow"}.
        A picture is cropped to the nearest of some shapes (`buckets`) whose sides are whole
        multiples of the autoencoders' factor. All pictures of a batch have one shape.
        `CachedRows` keeps latents and text under the hash of all that they were made from.
"""

import hashlib
import json
import math
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from tqdm import tqdm

from models import runs, text, toy
from models.registry import Spec, text_source
from models.script import UserError
from models.weights import open_checkpoint, save, write_whole

FORMATS = ("JPEG", "PNG", "WEBP")  # by content; decoders of exotic formats are less tested
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
OTHERS = (".avif", ".bmp", ".gif", ".heic", ".jxl", ".tif", ".tiff")  # found, and left out
TABLE = "metadata.jsonl"  # of captions, as in Hugging Face's ImageFolder
MAX_RATIO = 4  # of the sides; beyond, a crop shows too little of what the caption says
RATIOS = 8  # from square to MAX_RATIO: a crop loses 9% at most, and no shape has few pictures
THREADS = 8  # Pillow decodes without the GIL; each thread holds one full-size picture
RULES = 2  # part of every key: count up when pixels or captions come out differently
FEWEST = 16  # pictures to train on
VALIDATION = 64  # pictures held out, an eighth at most
MEMORY = 2 * 2**30  # bytes of cached rows that are held in memory as one tensor
BATCH_PIXELS = 2**22  # of the pictures that are encoded together, and whose latents share a file
CPU_PIXELS = 2**17  # the same on a CPU: what its caches hold

Size = tuple[int, int]  # (H, W) in pixels
Looked = tuple[Size, str] | str  # what to crop a picture to, its sha256; or why it is left out

# ---- one picture


def open_image(path: str | Path, size: Size | None = None) -> Tensor:
    """(3, H, W) in [-1, 1]. size (H, W): the largest centre crop of that shape, resized."""
    try:
        image = read_image(Path(path))
    except UserError as error:
        raise UserError(f"{path}: {error}; pass a sound JPEG, PNG or WebP") from None
    if size is not None:
        # Pillow's bicubic is antialiased: without that, fine detail would alias into noise.
        image = ImageOps.fit(image, size[::-1], Image.Resampling.BICUBIC)
    pixels = torch.from_numpy(np.array(image))  # (H, W, 3)
    return pixels.permute(2, 0, 1).contiguous() / 127.5 - 1


def read_image(path: Path) -> Image.Image:
    """Decoded to the last pixel, upright, RGB. A UserError says in a phrase what is wrong."""
    try:
        with Image.open(path, formats=FORMATS) as image:
            # A phone's JPEG may carry a depth or HDR map as a second frame (MPO).
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
    """8-bit RGB, from any mode."""
    if image.mode.startswith("I"):  # 16 bits in one channel; convert would clip at 255
        gray = np.asarray(image, dtype=np.float32) * (255 / 65535)
        image = Image.fromarray(gray.round().astype(np.uint8))
    elif image.has_transparency_data:  # over white: convert would show hidden colours
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


# ---- a folder of captioned pictures


@dataclass(frozen=True)
class ImageFolder:
    """Captioned pictures of a folder, each with the shape that it is cropped to."""

    path: Path
    files: list[Path]  # sorted
    captions: list[str]
    sizes: list[Size]  # that each picture is cropped to
    hashes: list[str]  # sha256 of each file
    left_out: list[str]  # of each file that is not trained on, the name and the reason
    key: str  # the digest of all that decides images() and captions; not of file names

    def __len__(self) -> int:
        return len(self.files)

    @property
    def names(self) -> list[str]:
        return [str(path) for path in self.files]

    def images(self, rows: Sequence[int]) -> Tensor:
        """(B, 3, H, W) in [-1, 1], of rows of one size."""
        with ThreadPoolExecutor(THREADS) as pool:
            images = pool.map(lambda row: open_image(self.files[row], self.sizes[row]), rows)
            return torch.stack(list(images))


def buckets(resolution: int, factor: int) -> list[Size]:
    """Shapes (H, W) in whole `factor`s with at most resolution^2 pixels, 1:1 to 1:MAX_RATIO."""
    shapes = {(resolution, resolution)}
    for i in range(1, RATIOS + 1):
        ratio = MAX_RATIO ** (i / RATIOS)
        short = round(resolution / ratio**0.5 / factor) * factor
        long = resolution**2 // (max(short, factor) * factor) * factor
        if short and long <= MAX_RATIO * short:
            shapes |= {(short, long), (long, short)}
    return sorted(shapes)


def nearest(shapes: list[Size], height: int, width: int) -> Size:
    """The shape that a crop of this picture loses least to."""
    return min(shapes, key=lambda shape: abs(math.log(shape[0] * width / (shape[1] * height))))


def open_folder(
    folder: str | Path, resolution: int, factor: int = 0, notes: Path | None = None
) -> ImageFolder:
    """Find pictures and captions, sub-folders included, and decode every picture once.

    factor: divides the sides of all buckets, in pixels; 0: the square is the only one.
    notes: remembers sound pictures, for the next time. left_out.txt beside it lists the others.
    """
    folder = Path(folder)
    if not (pictures := find(folder)):
        raise UserError(f"{folder} is no folder of pictures, {', '.join(SUFFIXES)}: name one")
    captions = read_captions(folder, pictures)
    shapes = buckets(resolution, factor) if factor else [(resolution, resolution)]
    found = scan([path for path in pictures if path in captions], shapes, notes)
    files = [path for path in found if not isinstance(found[path], str)]
    found |= dict.fromkeys(set(pictures) - captions.keys(), "has no caption")
    found |= dict.fromkeys(captions.keys() - set(pictures), f"is in {TABLE}, not in the folder")
    bad = sorted(found.keys() - set(files))
    # Names are quoted: they may hold line breaks, or bytes that no terminal can show.
    left_out = [f"{os.path.relpath(path, folder)!r} {found[path]}" for path in bad]
    if notes:
        notes.with_name("left_out.txt").write_text("\n".join(left_out), errors="replace")
    sizes, hashes = ([found[path][i] for path in files] for i in range(2))
    used = [captions[path] for path in files]
    key = digest(sorted(zip(hashes, sizes, used)))
    opened = ImageFolder(folder, files, used, sizes, hashes, left_out, key)
    if len(left_out) > len(files):
        raise UserError(f"{describe(opened)}: mend or remove these")
    return opened


def find(folder: Path) -> list[Path]:
    """Pictures by their names, sorted, but no hidden ones: those are other programs' notes."""
    found, visited = [], set()
    for parent, folders, names in os.walk(folder, followlinks=True):
        if os.path.realpath(parent) in visited:  # a link leads back
            folders.clear()
            continue
        visited.add(os.path.realpath(parent))
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [Path(parent, name) for name in names if not name.startswith(".")]
    return sorted(path for path in found if path.suffix.lower() in SUFFIXES + OTHERS)


def scan(paths: list[Path], shapes: list[Size], notes: Path | None) -> dict[Path, Looked]:
    """What inspect says of each picture, in the same order."""
    seen = {}
    if notes and notes.exists():
        with suppress(ValueError):  # damaged notes: every picture is looked at again
            seen = dict(json.loads(notes.read_bytes()))
    try:
        with ThreadPoolExecutor(THREADS) as pool:
            looks = pool.map(lambda path: inspect(path, shapes, seen), paths)
            return dict(zip(paths, tqdm(looks, "scan", len(paths), leave=False, unit="img")))
    finally:  # an interrupted scan keeps its notes
        if notes:
            write_whole(notes, lambda path: path.write_text(json.dumps(seen)))


def inspect(path: Path, shapes: list[Size], seen: dict[str, list]) -> Looked:
    """seen: {path: [stamp, width, height, sha256]} of the sound pictures. Others are decoded."""
    try:
        about = path.stat()
        # The second date is the system's own: no copying sets it back.
        stamp = [RULES, about.st_size, about.st_mtime_ns, about.st_ctime_ns]
        if seen.get(str(path), [None])[0] != stamp:
            sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
            seen[str(path)] = [stamp, *read_image(path).size, sha256]
    except (OSError, UserError) as error:  # OSError: a broken link
        return str(error)
    _, width, height, sha256 = seen[str(path)]
    size = nearest(shapes, height, width)
    if height < size[0] or width < size[1]:  # enlarged, it would teach the model to blur
        return f"is {width}x{height}: lower --resolution or enlarge it to {size[1]}x{size[0]}"
    if max(width, height) > MAX_RATIO * min(width, height):
        return f"is {width}x{height}: crop it to 1:{MAX_RATIO} or less"
    return size, sha256


def read_captions(folder: Path, pictures: list[Path]) -> dict[Path, str]:
    """From metadata.jsonl if it exists, otherwise from the text files beside the pictures."""
    if (folder / TABLE).exists():
        captions = read_table(folder / TABLE)
    else:
        owners = {}  # caption file -> its picture
        for path in pictures:
            file = path.with_suffix(".txt")
            if file.is_file() and owners.setdefault(file, path) != path:
                both = f"{owners[file]} and {path} share {file.name}"
                raise UserError(f"{both}: rename or remove one")
        captions = {path: first_line(read_text(file)) for file, path in owners.items()}
    if not captions:
        raise UserError(f"{folder} holds no captions: {pictures[0].stem}.txt etc., or {TABLE}")
    return captions


def read_table(table: Path) -> dict[Path, str]:
    """The paths in metadata.jsonl are relative to it."""
    captions = {}
    for number, line in enumerate(read_text(table).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            path = table.parent / row["file_name"]
        except (ValueError, LookupError, TypeError, RecursionError):
            row = '{"file_name": "fox.jpg", "text": "a fox"}'
            raise UserError(f"{table} line {number} is not like {row}") from None
        if path in captions:
            raise UserError(f"{table} line {number} names {path.name} a second time: remove one")
        given = [row.get(word) for word in ("text", "caption", "prompt")]
        if given := [caption for caption in given if isinstance(caption, str)]:
            captions[path] = first_line(given[0])
    return captions


def read_text(path: Path) -> str:
    """UTF-8, with or without a byte order mark, or the UTF-16 that Windows writes."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror})") from None
    is_wide = data[:2] in (b"\xff\xfe", b"\xfe\xff")
    return data.decode("utf-16" if is_wide else "utf-8-sig", errors="replace")


def first_line(content: str) -> str:
    """The first line that is not blank. Half a character (JSON can hold it) becomes "?"."""
    lines = content.encode(errors="replace").decode().splitlines()
    return next((line.strip() for line in lines if line.strip()), "")


def describe(folder: ImageFolder) -> str:
    """A line on what is there and what is left out."""
    shapes = [f"{n} of {w}x{h}" for (h, w), n in Counter(folder.sizes).most_common()]
    report = ", ".join([f"{folder.path}: {len(folder)} pictures", *shapes])
    if odd := sum(not caption or "\ufffd" in caption for caption in folder.captions):
        report += f"; {odd} captions are empty or not UTF-8"
    if folder.left_out:
        report += f"; left out {len(folder.left_out)}, first {'; '.join(folder.left_out[:5])}"
    return report


# ---- latents and text


def digest(*facts: object) -> str:
    """A name for what is made from these facts: other facts give another name."""
    return hashlib.sha256(json.dumps([RULES, *facts], default=str).encode()).hexdigest()


def file_digest(path: Path) -> str:
    """sha256 of a file of weights, or of all files in a folder of shards."""
    total = hashlib.sha256()
    for file in sorted(path.glob("*.safetensors")) if path.is_dir() else [path]:
        with file.open("rb") as stream:
            total.update(hashlib.file_digest(stream, "sha256").digest())
    return total.hexdigest()


class CachedRows:
    """Tensors on disk under their names, read when indexed: they stand for one (n, ...)."""

    def __init__(self, folder: Path, names: Sequence[str]):
        self.folder, self.names = folder, names
        self.files = {}  # name -> the file that holds it, by the headers of all files
        self.open = lru_cache(maxsize=256)(open_checkpoint)
        runs.wait_for_all()  # no process writes while another one looks
        for path in sorted(folder.glob("*.safetensors")):
            with suppress(UserError):  # a damaged file: its rows are made again
                self.files |= dict.fromkeys(self.open(path).shapes, path)
        runs.wait_for_all()

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, rows: Tensor) -> Tensor:
        """(B, ...), of rows (B,) of one shape."""
        return torch.stack([self.row(i) for i in rows.tolist()])

    def row(self, i: int) -> Tensor:
        # A copy: a mapped tensor holds its file, and Linux maps at most 65530 of them.
        return self.open(self.files[self.names[i]]).get(self.names[i]).clone()

    def missing(self) -> list[int]:
        """The rows without a file; of equal names the first alone."""
        first = {name: i for i, name in reversed([*enumerate(self.names)])}
        return sorted(i for name, i in first.items() if name not in self.files)

    def write(self, rows: dict[str, Tensor]) -> None:
        """As one file. An interrupted encoding goes on with what is missing."""
        save(self.folder / f"{digest(*rows)}.safetensors", rows, {})

    def loaded(self) -> "Rows":
        """One tensor (n, ...) if all rows have one shape and fit in MEMORY."""
        if self.row(0).nbytes * len(self) > MEMORY:
            return self
        rows = [self.row(i) for i in range(len(self))]
        return torch.stack(rows) if len({row.shape for row in rows}) == 1 else self


Rows = Tensor | CachedRows


@dataclass(frozen=True)
class LatentEncoder:
    """An autoencoder that is loaded only if there is something to encode."""

    identity: str  # the digest of its weights and config
    load: Callable[[], Callable[[Tensor], Tensor]]  # its encode: images -> latents
    device: torch.device
    dtype: torch.dtype


def encode_pictures(source: ImageFolder, encoder: LatentEncoder, cache: Path) -> Rows:
    """Latents (n, C, h, w) of all pictures. Each process encodes a share of what is missing."""
    folder = cache / digest("latents", encoder.identity, str(encoder.dtype))
    names = [digest(sha256, size) for sha256, size in zip(source.hashes, source.sizes)]
    cached = CachedRows(folder, names)
    most = CPU_PIXELS if encoder.device.type == "cpu" else BATCH_PIXELS
    batches = in_batches(source.sizes, cached.missing(), most)
    if batches := batches[runs.rank() :: runs.world()]:
        encode = encoder.load()
        images = ahead(lambda i: source.images(batches[i]), encoder.device)
        for i, rows in enumerate(tqdm(batches, "encode", leave=False, unit="batch")):
            pixels = images(i).to(encoder.device, encoder.dtype)
            latents = encode_rows(encode, pixels, [source.names[row] for row in rows])
            cached.write({names[row]: one for row, one in zip(rows, latents)})
    return CachedRows(folder, names).loaded()


def in_batches(sizes: Sequence[Size], rows: Sequence[int], pixels: int) -> list[list[int]]:
    """Rows in batches of one size, each of at most so many pixels (or one picture)."""
    batches, groups = [], {}
    for row in rows:
        groups.setdefault(sizes[row], []).append(row)
    for size, group in groups.items():
        n = max(1, pixels // math.prod(size))
        batches += [group[i : i + n] for i in range(0, len(group), n)]
    return batches


def encode_rows(encode: Callable[[Tensor], Tensor], images: Tensor, names: list[str]) -> Tensor:
    """Latents (B, C, h, w) of these images, on the CPU. UserError: one holds NaN or Inf."""
    latents = encode(images).cpu()
    finite = latents.isfinite().flatten(1).all(1).tolist()
    if not all(finite):
        bad = names[finite.index(False)]
        raise UserError(f"latents of {bad} hold NaN or Inf in {images.dtype}: try --dtype fp32")
    return latents


def encode_captions(
    captions: list[str],
    spec: Spec,
    folder: str,
    cache: Path,
    device: torch.device,
    dtype: torch.dtype,
) -> tuple[Rows, ...]:
    """cond of these captions, and of the empty one in a last row."""
    kind, place = spec.text_encoder, text_source(spec, folder)
    if spec.is_toy:  # its encoder is faster than the disk
        return text.encode(kind, place, [*captions, ""], device=device)[0]
    # SANA's unconditional prompt goes without instruction, like a negative one.
    prompts = [*((caption, False) for caption in captions), ("", kind == "sana")]
    keys = text.cache_keys(kind, place, dtype, prompts)
    parts = [[f"{keys[prompt]}.{part}" for prompt in prompts] for part in range(2)]
    cached = CachedRows(cache / "text", parts[0])
    missing = cached.missing()
    if mine := missing[runs.rank() :: runs.world()]:
        encoded = text.encode_each(kind, place, [prompts[i] for i in mine], device, dtype)
        for cond, i in zip(encoded, tqdm(mine, "text", leave=False)):
            if i == mine[0]:
                check_room(cached.folder, sum(part.nbytes for part in cond) * len(missing))
            cached.write({names[i]: part for names, part in zip(parts, cond)})
    return tuple(CachedRows(cached.folder, names).loaded() for names in parts)


def check_room(folder: Path, size: int) -> None:
    """Print what the text takes on the disk. UserError: it does not fit."""
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    report = f"text takes {size / 2**30:.2f} GiB in {folder}, {free / 2**30:.1f} GiB are free"
    if size > free:
        raise UserError(f"{report}: train on fewer captions, or name another --out")
    print(report)


# ---- all that a trainer sees


@dataclass(frozen=True)
class Dataset:
    """What the trainers draw from, encoded once."""

    base_latents: Rows | None  # (n, C, h, w) of the base's autoencoder
    latents: Rows  # (n, C', h', w') of the new one
    cond: tuple[Rows, ...]  # of the distinct captions, and perhaps of the empty one behind them
    caption: Tensor  # (n,) the index of each picture's caption among them
    null_cond: tuple[Tensor, ...]  # of the empty caption
    guidance_is_input: bool = True  # of the model: FLUX
    sizes: Sequence[Size] = ()  # of each picture; (): all the same
    names: Sequence[str] = ()  # of each picture
    captions: Sequence[str] = ()  # the distinct ones
    key: str = ""  # the digest of pictures and captions

    def __len__(self) -> int:
        """How many are trained on. The last ones are held out."""
        return len(self.latents) - min(VALIDATION, len(self.latents) // 8)

    @cached_property
    def trained(self) -> list[Tensor]:
        """The rows to train on, in groups of one size."""
        return self.groups(range(len(self)))

    @cached_property
    def held_out(self) -> list[Tensor]:
        return self.groups(range(len(self), len(self.latents)))

    def groups(self, rows: range) -> list[Tensor]:
        sizes = self.sizes or [(1, 1)] * len(self.latents)
        return [torch.tensor(group) for group in in_batches(sizes, rows, pixels=2**63)]

    def names_of(self, rows: Tensor) -> list[str]:
        return [self.names[row] for row in rows] if self.names else []

    def draw(self, size: int, generator: torch.Generator) -> Tensor:
        """Rows (B,) of one size; every picture is as likely as any other."""
        group = self.trained[0]
        if len(self.trained) > 1:
            counts = torch.tensor([float(len(group)) for group in self.trained])
            group = self.trained[torch.multinomial(counts, 1, generator=generator)]
        return group[torch.randint(len(group), (size,), generator=generator)]


def open_source(folder: str, size: int, factor: int, out: Path) -> ImageFolder:
    """The pictures of a folder, in the order in which the last ones are held out."""
    source = runs.on_first(lambda: open_folder(folder, size, factor, out / "scan.json"))
    # In the order of their hashes the last pictures are a fair sample.
    order = sorted(range(len(source)), key=source.hashes.__getitem__)
    columns = ("files", "captions", "sizes", "hashes")
    source = replace(source, **{c: [getattr(source, c)[i] for i in order] for c in columns})
    print(describe(source))
    if len(source) < FEWEST:
        raise UserError(f"{len(source)} pictures in {folder}: wanted at least {FEWEST}")
    return source


def prepare(
    source: ImageFolder,
    encoders: Sequence[LatentEncoder],
    spec: Spec,
    folder: str,  # the user's --weights, where text encoders are looked for
    cache: Path,
    device: torch.device,
    dtype: torch.dtype,
) -> Dataset:
    """Encode captions, and pictures with each autoencoder: (the base's and) the new one."""
    captions = source.captions
    if spec.is_toy:  # its text encoder cannot read other words
        captions = [toy.known_words(caption) for caption in captions]
        known, all_ = (sum(len(line.split()) for line in c) for c in (captions, source.captions))
        print(f"the toy's text encoder knows {known} of {all_} words\n" * (known < all_), end="")
    distinct = sorted(set(captions))
    index = {caption: i for i, caption in enumerate(distinct)}
    cond = encode_captions(distinct, spec, folder, cache, device, dtype)
    latents = [encode_pictures(source, encoder, cache) for encoder in encoders]
    return Dataset(
        base_latents=latents[0] if len(latents) == 2 else None,
        latents=latents[-1],
        cond=cond,
        caption=torch.tensor([index[caption] for caption in captions]),
        null_cond=tuple(rows[torch.tensor([len(distinct)])] for rows in cond),
        guidance_is_input=not spec.uses_cfg,
        sizes=source.sizes,
        names=source.names,
        captions=distinct,
        key=source.key,
    )


@dataclass(frozen=True)
class Batch:
    """This process's share of a batch."""

    latents: Tensor  # (B, C, h, w)
    noise: Tensor
    timestep: Tensor  # (B,)
    cond: tuple[Tensor, ...]
    null_cond: tuple[Tensor, ...]
    guidance: Tensor | None  # (B,); None if it is no input of the model
    rows: Tensor  # of the pictures of all processes together

    def split(self, size: int, device: torch.device) -> Iterator[tuple["Batch", float]]:
        """Micro-batches of `size` pictures (0: one of all), each with its weight in the loss."""
        n = len(self.noise)
        for first in range(0, n, size or n):
            part = slice(first, first + (size or n))
            fixed = [x[part].to(device) for x in (self.latents, self.noise, self.timestep)]
            conds = [tuple(x[part].to(device) for x in c) for c in (self.cond, self.null_cond)]
            guidance = None if self.guidance is None else self.guidance[part].to(device)
            yield Batch(*fixed, *conds, guidance, self.rows), len(fixed[0]) / len(self.rows)


def ahead(draw: Callable[[int], Batch], device: torch.device) -> Callable[[int], Batch]:
    """draw(step). On a GPU the next batch is drawn while the caller trains on this one."""
    if device.type != "cuda":
        return draw
    pool, waiting = ThreadPoolExecutor(1), {}

    def take(step: int) -> Batch:
        batch = waiting.pop(step).result() if step in waiting else draw(step)
        waiting[step + 1] = pool.submit(draw, step + 1)
        return batch

    return take
