"""Which pictures are to be drawn, where they go, and what each of them remembers.

A job is a dataclass of flags: the Config of sample.py, for one picture. Its PNG carries its recipe:
the flags that it depends on, and the digests of the files that they name.
"""

import json
import re
from contextlib import suppress
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import TypeVar

from PIL import Image, PngImagePlugin
from torch import Tensor

from models import adapters, runs, text, weights
from models.identity import digest
from models.script import UserError
from models.weights import Checkpoint

Job = TypeVar("Job")
# What a picture does not depend on: where it lies, on which list, which kernel.
ELSEWHERE = ("prompts", "out", "weights", "from_", "score", "attention", "compile")
DIGESTS = ("model_digest", "autoencoder_digest")
LATENTS = ".latents.safetensors"  # beside a picture, until it is written


def recipe_of(job: Job) -> dict:
    return {name: value for name, value in vars(job).items() if name not in ELSEWHERE}


def read_recipe(path: Path) -> dict:
    """The flags that made a picture, or latents that were kept. Older versions had other flags."""
    try:
        if path.suffix == ".safetensors":
            found = weights.open_checkpoint(path).metadata["recipe"]
        else:
            with Image.open(path) as image:
                found = image.info["recipe"]
        found = weights.parse_json(found, "it")
        if odd := [k for k, v in found.items() if not isinstance(v, str | int | float | None)]:
            raise TypeError(f"{odd[0]} is neither text nor a number")
        return found
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"--from {path} carries no recipe of this program ({error})") from None


def is_made(job: Job, path: Path | None = None) -> bool:
    """Does its picture (or what else `path` is) lie there, by this very recipe?"""
    with suppress(UserError):  # none, or another program's
        found = read_recipe(path or Path(job.out))
        return all(found.get(name) == value for name, value in recipe_of(job).items())
    return False


def in_the_way(job: Job) -> list[Path]:
    """What has a name that a job writes to, and is of another recipe."""
    paths = (Path(job.out), Path(job.out).with_suffix(LATENTS))
    return [path for path in paths if path.exists() and not is_made(job, path)]


def read_jobs(flags: Job) -> list[Job]:
    """One for each picture, named by its index and seed: a prompt may hold any character.

    No picture of another recipe is replaced. A single one takes the next free index; where a list
    or a named file goes, what is in the way is set aside.
    """
    pairs, out = [(flags.prompt, flags.seed)], Path(flags.out)
    if flags.prompts:
        pairs = read_prompts(flags.prompts, flags.seed)
    is_file = out.suffix == ".png" and len(pairs) == 1
    if out.suffix in (".png", ".jpg", ".jpeg", ".webp") and not is_file:
        raise UserError(f"--out {out}: wanted a folder, or for one picture a .png")
    runs.check_room(out.parent if is_file else out)

    def job(i: int, prompt: str, seed: int) -> Job:
        place = out if is_file else out / f"{i:04d}_seed{seed}.png"
        return replace(flags, prompt=prompt, seed=seed, out=str(place))

    if not (flags.prompts or is_file):
        return [next(one for i in count() if not in_the_way(one := job(i, *pairs[0])))]
    jobs = [job(i, *pair) for i, pair in enumerate(pairs)]
    set_aside(out.parent if is_file else out, jobs)
    return jobs


def set_aside(folder: Path, jobs: list[Job]) -> None:
    """What is in the way goes to a hidden folder; where a list goes, all that sample.py named.

    Other pictures beside a list's are told: align.py --data would read them, too.
    """
    old, rest = {path for job in jobs for path in in_the_way(job)}, []
    if jobs[0].prompts:
        kinds, made = Image.registered_extensions(), {Path(job.out) for job in jobs}
        rest = [path for path in folder.iterdir() if path.suffix.lower() in kinds]
        old |= {p for p in rest if re.fullmatch(r"\d{4,}_seed\d+", p.stem)} - made
        rest = sorted({*rest} - made - old)
        old |= {text for path in old if (text := path.with_suffix(".txt")).exists()}
    if old:
        aside = next(path for i in count() if not (path := folder / f".earlier-{i}").exists())
        aside.mkdir()
        for path in old:
            path.rename(aside / path.name)
        print(f"of other recipes, now in {aside}: {', '.join(sorted(p.name for p in old)):.300}")
    if rest:
        print(f"also in {folder}, and not of this list: {', '.join(p.name for p in rest):.300}")


def write(pixels: Tensor, job: Job) -> None:
    """A PNG with its recipe; for --prompts its caption first, as align.py --data reads it."""
    path, notes = Path(job.out), PngImagePlugin.PngInfo()
    if job.prompts:
        path.with_suffix(".txt").write_text(" ".join(job.prompt.split()) + "\n")
    notes.add_text("recipe", json.dumps(recipe_of(job)))
    how = dict(pnginfo=notes, compress_level=1)  # at 4096 x 4096 1 s instead of 3
    weights.write_whole(path, lambda file: Image.fromarray(pixels.numpy()).save(file, **how))


def digests_of(files: tuple[Checkpoint, Checkpoint], adapter: str = "") -> dict[str, str]:
    """Of a model, with what is merged into it, and of its autoencoder."""
    model, autoencoder = (file.digest for file in files)
    more = [weights.open_checkpoint(Path(file)).digest for file, _ in adapters.parse(adapter)]
    return dict(zip(DIGESTS, (digest([model, *more], []) if more else model, autoencoder)))


def check_origin(job: Job, recipe: dict) -> None:
    """UserError: a name in the recipe of --from stands for another file today."""
    for name in ("model", "autoencoder"):
        if getattr(job, name) != recipe.get(name):
            return  # the user's choice, and what belongs to it
        today = getattr(job, f"{name}_digest")
        if recipe.get(f"{name}_digest", today) != today:
            raise UserError(
                f"the {name} is another file than {job.from_} was made with: put that back, or "
                f"name it by --{name}"
            )


def open_latents(
    job: Job, recipe: dict, channels: int, stride: int, size: tuple[int, int]
) -> Tensor:
    """The latents of --from, (1, C, h, w). UserError: they are not what these flags say."""
    for name in recipe.keys() & vars(job).keys() - {"device", "dtype", "autoencoder", *DIGESTS}:
        if getattr(job, name) != recipe[name]:
            raise UserError(f"--{name} changes nothing of latents that are drawn: leave it out")
    file = weights.open_checkpoint(Path(job.from_))
    shape = file.shapes.get("latents", ())
    covers = all(n * stride >= side for n, side in zip(shape[2:], size))
    if len(shape) != 4 or shape[:2] != (1, channels) or not covers:
        wanted = f"(1, {channels}, h, w) for {job.size} pixels"
        raise UserError(f"--from {job.from_} holds latents of shape {shape}: wanted {wanted}")
    return file.get("latents").float()


def read_prompts(file: str, seed: int = 0) -> list[tuple[str, int]]:
    """The prompt of every line and its seed: `seed`, `seed` + 1, ..., or what a .jsonl says.

    Pictures that share a noise share background and layout: a poor training set.
    """
    path, pairs = Path(file), []
    try:
        for where, row in text.read_rows(path, "prompt"):
            own = row.get("seed", seed + len(pairs))
            if type(own) is not int or not 0 <= own < 2**63:
                raise UserError(f"{where} has a seed beyond 0 .. 2^63 - 1")
            pairs.append((text.whole(row["prompt"]), own))
        if not pairs or path.suffix not in (".txt", ".jsonl"):
            raise UserError("no prompt in this file")
        return pairs
    except UserError as error:
        wanted = 'a .txt, a prompt a line, or a .jsonl, {"prompt": "a fox", "seed": 0} a line'
        raise UserError(f"{path}: wanted {wanted} ({error})") from None
