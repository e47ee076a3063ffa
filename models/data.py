"""Captioned pictures on disk, and their latents, as the trainers take them.

What    `open_source` opens a folder of pictures and captions, or the toy world. `prepare` encodes
        both once and returns a `Dataset`, from which the trainers draw batches.
Why     One broken or upside-down picture in a thousand does not stop a training run, it spoils it.
        So every picture is decoded whole before training starts, and what is left out is listed.
How     A caption stands beside its picture, `fox.jpg` and `fox.txt`, or in a `metadata.jsonl` of
        the folder or of one above, as a line {"file_name": "fox.jpg", "text": "a fox in snow"}.
        A picture is cropped to the nearest of some shapes (`buckets`) whose sides are whole
        multiples of the autoencoders' factor. All pictures of a batch have one shape.
        `CachedRows` keeps latents and text under the hash of all that they were made from.
"""

import hashlib
import io
import json
import math
import os
import shutil
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache, partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageCms, ImageOps, UnidentifiedImageError
from torch import Tensor
from tqdm import tqdm

from models import runs, text, toy
from models.registry import Spec
from models.script import UserError
from models.weights import Device, open_checkpoint, read_json, save, write_whole

FORMATS = ("JPEG", "PNG", "WEBP")  # by content; decoders of exotic formats are less tested
OTHERS = {".heic", ".heif", ".jxl"}  # pictures that Pillow does not know: found, and left out
TABLE = "metadata.jsonl"  # of captions, as in Hugging Face's ImageFolder
MAX_RATIO = 4  # of the sides; beyond, a crop shows too little of what the caption says
RATIOS = 8  # from square to MAX_RATIO: a crop loses 9% at most, and no shape has few pictures
THREADS = 8  # Pillow decodes without the GIL; each thread holds one full-size picture
RULES = 3  # part of every key: count up when pixels or captions come out differently
FEWEST = 16  # pictures to train on
VALIDATION = 64  # pictures held out, an eighth at most
MEMORY = 2 * 2**30  # bytes of cached rows that are held in memory as one tensor
BATCH_PIXELS = 2**22  # of the pictures that are encoded together, and whose latents share a file
CPU_PIXELS = 2**17  # the same on a CPU: what its caches hold

Size = tuple[int, int]  # (H, W) in pixels

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
    except UnidentifiedImageError:
        raise UserError("is not an image, or not JPEG, PNG or WebP") from None
    except Exception as error:  # noqa: BLE001  a damaged file raises any of a dozen kinds
        raise UserError(f"cannot be read ({getattr(error, 'strerror', '') or error})") from None
    if is_animated:
        raise UserError("is animated")
    return image


def to_rgb(image: Image.Image) -> Image.Image:
    """8-bit sRGB from any mode, on white: what is transparent may have any colour."""
    profile, clear, alpha = (image.info.get(k) for k in ("icc_profile", "transparency", ""))
    if isinstance(clear, tuple) and max(clear) > 255:  # of 16 bits, of which Pillow keeps 8
        image.info["transparency"] = tuple(value >> 8 for value in clear)
    if image.mode.startswith("I"):  # 16 bits in one channel; convert would clip at 255
        gray = np.asarray(image, dtype=np.float32)
        alpha = Image.fromarray(np.where(gray == clear, 0, 255).astype(np.uint8))
        image = Image.fromarray((gray * (255 / 65535)).round().astype(np.uint8))
    elif image.has_transparency_data:
        alpha = image.convert("RGBA").getchannel("A")
    if profile:  # PyCMSError: it is of another kind of picture
        profile, srgb = (
            ImageCms.ImageCmsProfile(io.BytesIO(profile)),
            ImageCms.createProfile("sRGB"),
        )
        is_gray = image.getbands()[0] in "L1" and profile.profile.xcolor_space == "GRAY"
        image = image.convert("L" if is_gray else "CMYK" if image.mode == "CMYK" else "RGB")
        image = ImageCms.profileToProfile(image, profile, srgb, outputMode="RGB")
    image, white = image.convert("RGB"), Image.new("RGB", image.size, "white")
    return Image.composite(image, white, alpha) if alpha else image


# ---- a folder of captioned pictures


@dataclass(frozen=True)
class ImageFolder:
    """Captioned pictures of a folder, each with the shape that it is cropped to."""

    path: Path
    names: list[str]  # of the files, sorted
    captions: list[str]
    sizes: list[Size]  # that each picture is cropped to
    hashes: list[str]  # sha256 of each file
    left_out: list[str]  # of each file that is not trained on, the name and the reason
    key: str  # the digest of all that decides images() and captions; not of file names

    def __len__(self) -> int:
        return len(self.names)

    def images(self, rows: Sequence[int]) -> Tensor:
        """(B, 3, H, W) in [-1, 1], of rows of one size."""
        with ThreadPoolExecutor(THREADS) as pool:
            images = pool.map(lambda row: open_image(self.names[row], self.sizes[row]), rows)
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
    folder, left_out = Path(folder), {}  # {path: the reason}
    captions = read_captions(folder, left_out)
    looked = scan([*captions], buckets(resolution, factor or resolution), notes, left_out)
    # Names are quoted: they may hold line breaks, or bytes that no terminal can show.
    listed = [f"{os.path.relpath(path, folder)!r} {left_out[path]}" for path in sorted(left_out)]
    if notes:
        file = notes.with_name("left_out.txt")
        file.write_text("\n".join(listed), errors="replace")
    sizes, hashes = ([looked[path][i] for path in looked] for i in range(2))
    used = [" ".join(text.whole(captions[path]).split()) for path in looked]  # in one line
    key = digest(sorted(zip(hashes, sizes, used)))
    opened = ImageFolder(folder, [*map(str, looked)], used, sizes, hashes, listed, key)
    if len(listed) > len(looked):
        where = f"; {file} lists all" if notes else ""
        raise UserError(f"{describe(opened)}: mend or remove these{where}")
    return opened


def find(folder: Path, left_out: dict[Path, str]) -> list[Path]:
    """Files, sorted; no hidden ones: those are other programs' notes."""
    found, entered = [], {}
    how = dict(onerror=lambda e: left_out.update({Path(e.filename): e.strerror}), followlinks=True)
    for parent, folders, names in os.walk(folder, **how):
        if entered.setdefault(os.path.realpath(parent), parent) != parent:  # a link leads back
            del folders[:], names[:]
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        found += [Path(parent, name) for name in names if not name.startswith(".")]
    dangling = (path for path in found if not path.suffix and not path.exists())
    left_out |= dict.fromkeys(dangling, "is a link to nothing")
    return sorted(found)


def scan(
    paths: list[Path], shapes: list[Size], notes: Path | None, left_out: dict[Path, str]
) -> dict[Path, tuple[Size, str]]:
    """What inspect says of each sound picture, in the same order."""
    seen = {}
    if notes:
        with suppress(UserError):  # none yet, or damaged: every picture is looked at again
            seen = read_json(notes)

    def look(path: Path) -> tuple[Size, str] | None:
        try:
            return inspect(path, shapes, seen)
        except (OSError, UserError) as error:  # OSError: a broken link
            left_out[path] = str(error)

    try:
        with ThreadPoolExecutor(THREADS) as pool:
            looks = tqdm(pool.map(look, paths), "scan", len(paths), leave=False, unit="img")
            return {path: found for path, found in zip(paths, looks) if found}
    finally:  # an interrupted scan keeps its notes
        if notes:
            write_whole(notes, lambda path: path.write_text(json.dumps(seen)))


def inspect(path: Path, shapes: list[Size], seen: dict[str, list]) -> tuple[Size, str]:
    """(what to crop a picture to, its sha256). `seen` pictures are not decoded again."""
    about = path.stat()
    # The second date is the system's own: no copying sets it back.
    stamp = digest(str(path), about.st_size, about.st_mtime_ns, about.st_ctime_ns)
    if stamp not in seen:
        seen[stamp] = [*read_image(path).size, hashlib.sha256(path.read_bytes()).hexdigest()]
    width, height, sha256 = seen[stamp]
    size, cures = nearest(shapes, height, width), []
    if max(width, height) > MAX_RATIO * min(width, height):
        cures.append(f"crop it to 1:{MAX_RATIO} or less")
    if height < size[0] or width < size[1]:  # enlarged by us, it would teach the model to blur
        cures.append(f"lower --resolution or enlarge it to {size[1]}x{size[0]}")
    if cures:
        raise UserError(f"is {width}x{height}: {', and '.join(cures)}")
    return size, sha256


def read_captions(folder: Path, left_out: dict[Path, str]) -> dict[Path, str]:
    """Of each picture: from the metadata.jsonl that names it, or else from the .txt beside it."""
    composed = partial(unicodedata.normalize, "NFC")  # a Mac writes an accent as a character
    found, captions, owners = find(folder, left_out), {}, {}  # owners: .txt -> its picture
    spelled = {composed(str(path)): path for path in found}
    suffixes = OTHERS.union(Image.registered_extensions())
    pictures = [path for path in found if path.suffix.lower() in suffixes]
    if not pictures:
        raise UserError(f"{folder} is no folder of pictures, {', '.join(FORMATS)}: name one")
    for table in (path for path in found if path.name == TABLE):
        for where, row in text.read_rows(table, "file_name"):
            path = table.parent / row["file_name"]
            path = spelled.get(composed(str(path)), path)
            if path in captions:
                raise UserError(f"{where} names {path.name} a second time: remove one")
            given = [row.get(word) for word in ("text", "caption", "prompt")]
            captions[path] = next((said for said in given if isinstance(said, str)), None)
    for path in (path for path in pictures if path not in captions):
        if file := spelled.get(composed(str(path.with_suffix(".txt")))):
            if owners.setdefault(file, path) != path:
                both = f"{owners[file]} and {path} share {file.name}"
                raise UserError(f"{both}: rename or remove one")
            captions[path] = text.read_text(file)
    absent = captions.keys() - set(pictures)
    left_out |= dict.fromkeys(absent, f"is in {TABLE}, not in the folder")
    captions = {p: captions[p] for p in pictures if captions.get(p) is not None}
    left_out |= dict.fromkeys(set(pictures) - captions.keys(), "has no caption")
    if not captions:
        raise UserError(f"{folder} holds no captions: {pictures[0].stem}.txt etc., or {TABLE}")
    return captions


def describe(folder: ImageFolder) -> str:
    """A line on what is there and what is left out."""
    shapes = [f"{n} of {w}x{h}" for (h, w), n in Counter(folder.sizes).most_common()]
    report = ", ".join([f"{folder.path}: {len(folder)} pictures", *shapes])
    if odd := sum(not caption or "\ufffd" in caption for caption in folder.captions):
        report += f"; {odd} captions are empty or hold U+FFFD"
    if folder.left_out:
        report += f"; left out {len(folder.left_out)}, first {'; '.join(folder.left_out[:5])}"
    return report


# ---- latents and text


def digest(*facts: object) -> str:
    """A name for what is made from these facts: other facts give another name."""
    return hashlib.sha256(json.dumps([RULES, *facts], default=str).encode()).hexdigest()


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
# The digest of an autoencoder's weights and config, and what loads its encode(images), if needed.
Encoder = tuple[str, Callable[[], Callable[[Tensor], Tensor]]]


def encode_pictures(
    source: ImageFolder, encoder: Encoder, cache: Path, device: torch.device, dtype: torch.dtype
) -> Rows:
    """Latents (n, C, h, w) of all pictures. Each process encodes a share of what is missing."""
    identity, load = encoder
    folder = cache / digest("latents", identity, str(dtype))
    names = [digest(sha256, size) for sha256, size in zip(source.hashes, source.sizes)]
    cached = CachedRows(folder, names)
    most = CPU_PIXELS if device.type == "cpu" else BATCH_PIXELS
    batches = in_batches(source.sizes, cached.missing(), most)
    if batches := batches[runs.rank() :: runs.world()]:
        encode = load()
        images = ahead(lambda i: source.images(batches[i]), device)
        for i, rows in enumerate(tqdm(batches, "encode", leave=False, unit="batch")):
            pixels = images(i).to(device, dtype)
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
    if bad := [name for name, row in zip(names, latents) if not row.isfinite().all()]:
        cure = "remove it" if images.dtype == torch.float32 else "try --dtype fp32"
        raise UserError(f"latents of {bad[0]} hold NaN or Inf in {images.dtype}: {cure}")
    return latents


def encode_captions(
    captions: list[str], spec: Spec, folder: str, cache: Path, device: Device, dtype: torch.dtype
) -> tuple[Rows, ...]:
    """cond of these captions, and of the empty one in a last row."""
    kind, place = spec.text_encoder, text.source_of(spec, folder)
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
    columns = ("names", "captions", "sizes", "hashes")
    source = replace(source, **{c: [getattr(source, c)[i] for i in order] for c in columns})
    print(describe(source))
    if len(source) < FEWEST:
        raise UserError(f"{len(source)} pictures in {folder}: wanted at least {FEWEST}")
    return source


def prepare(
    source: ImageFolder,
    encoders: list[Encoder],
    spec: Spec,
    config,
    device: Device,
    dtype: torch.dtype,
) -> Dataset:
    """Encode captions, and pictures with each autoencoder: (the base's and) the new one."""
    cache = Path(config.out) / "cache"
    captions = toy.known_words(source.captions) if spec.is_toy else source.captions
    distinct = sorted(set(captions))
    index = {caption: i for i, caption in enumerate(distinct)}
    cond = encode_captions(distinct, spec, config.weights, cache, device, dtype)
    latents = [encode_pictures(source, one, cache, device, dtype) for one in encoders]
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
