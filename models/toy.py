"""The toy world: captioned pictures, an exact scorer, and how the toy weights were trained.

What    128 x 128 pictures of one to three coloured shapes with captions such as "a red circle
        left of a blue square", drawn in closed form, and a scorer that reads a scene back from
        pixels alone.
Why     DC-Gen's claims are about quality kept and knowledge kept. Here both are counted exactly,
        on a laptop, without a judge network: a prompt passes or it does not.
How     Objects are signed distances; the scorer thresholds chroma, takes the nearest hue, labels
        connected components, and compares every component with shape templates. Six tasks in the
        spirit of GenEval (arXiv 2310.11513): single, two, counting, colour, position, attribute.
        Some concepts (six colour-shape pairs, the heart, the word "below") are known to the base
        and left out of all post-training data, so that forgetting can be seen.
Cost    See `python -m models.toy --help`: every file in models/toy/ is made by one of its commands.
"""

import argparse
import copy
import json
import math
import os
import sys
import time
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from dcae import DCAE
from models import training, weights
from models.flux import Flux, sinusoid
from models.sana import QK_NORM, Sana
from models.text import TOYS, SanaToyText, ToyText
from models.vae import FluxVAE
from sample import MODELS, draw_noise, load_pipeline, sample, text_kind, timesteps

HERE = Path(__file__).parent / "toy"
SIZE = 128  # pixels, height = width
MAX_OBJECTS = 3

SHAPES = ["circle", "square", "triangle", "cross", "ring", "heart", "blob"]
BLOB = SHAPES.index("blob")  # a random smooth outline: teaches geometry in general, is never scored
COLORS = {
    "red": (0.90, 0.10, 0.10), "yellow": (0.95, 0.88, 0.10), "green": (0.10, 0.70, 0.20),
    "cyan": (0.10, 0.82, 0.90), "blue": (0.12, 0.22, 0.92), "purple": (0.70, 0.15, 0.85),
}  # fmt: skip
COLOR_NAMES = list(COLORS)
PLURAL = {s: s + ("es" if s == "cross" else "s") for s in SHAPES}
BACKGROUNDS = {"dark": 0.18, "gray": 0.50, "light": 0.84}
RELATIONS = ["left", "right", "above", "below"]  # of the first object, as seen from the second
NUMBERS = ["a", "two", "three"]
VOCABULARY = (
    ["<pad>", "<bos>", "a", "and", "on", "of", "two", "three", "small", "large"]
    + COLOR_NAMES + SHAPES + [PLURAL[s] for s in SHAPES] + RELATIONS + list(BACKGROUNDS)
)  # fmt: skip

# Known to the base, absent from every image and caption of the post-training data.
HELD_OUT_PAIRS = [
    ("red", "ring"), ("yellow", "cross"), ("green", "square"),
    ("cyan", "triangle"), ("blue", "circle"), ("purple", "square"),
]  # fmt: skip
HELD_OUT_SHAPE = "heart"
HELD_OUT_RELATION = "below"
TASKS = ["single", "two", "counting", "color", "position", "attribute"]
HELD_OUT_TASKS = ["pair", "shape", "relation"]


# ---- scenes


@dataclass
class Scenes:
    """n scenes as arrays; objects past `count` are ignored. Positions and radii in pixels."""

    kind: np.ndarray  # (n,) 0 single, 1 counting, 2 relation, 3 two with "and", 4 three with "and"
    count: np.ndarray  # (n,) 1..3
    shape: np.ndarray  # (n, 3) index into SHAPES
    color: np.ndarray  # (n, 3) index into COLOR_NAMES
    x: np.ndarray  # (n, 3)
    y: np.ndarray  # (n, 3) downwards
    radius: np.ndarray  # (n, 3)
    background: np.ndarray  # (n,) index into BACKGROUNDS
    shade: np.ndarray  # (n, 3) brightness offset, slope in x, slope in y
    tint: np.ndarray  # (n, 3, 3) colour offset
    outline: np.ndarray  # (n, 3, 4, 2) cosine and sine amplitudes of a blob's harmonics 2..5

    def __len__(self) -> int:
        return len(self.kind)

    def __getitem__(self, rows) -> "Scenes":
        return Scenes(*(getattr(self, f.name)[rows] for f in fields(self)))


def draw_scenes(n: int, seed: int, held_out: bool = True) -> Scenes:
    """n random scenes. held_out=False leaves the held-out pairs and the held-out shape out.

    Objects stand in a row, in the order in which they are named; above and below, in a column.
    Anywhere at all was tried: who stands where is then settled at noise so high that a small base
    gets the number of objects wrong (two in five prompts failed after 75 M samples).
    """
    rng = np.random.default_rng(seed)
    kind = rng.choice(5, n, p=[0.18, 0.15, 0.24, 0.37, 0.06])
    count = np.choose(kind, [1, rng.integers(2, 4, n), 2, 2, 3])
    shape, color = draw_identities(rng, n, kind)
    banned = np.zeros((len(COLOR_NAMES), len(SHAPES)), bool)
    if not held_out:
        banned[:, SHAPES.index(HELD_OUT_SHAPE)] = True
        for color_name, shape_name in HELD_OUT_PAIRS:
            banned[COLOR_NAMES.index(color_name), SHAPES.index(shape_name)] = True
    while len(bad := np.flatnonzero(banned[color, shape].any(1))):
        shape[bad], color[bad] = draw_identities(rng, len(bad), kind[bad])

    x, y, radius = (np.zeros((n, MAX_OBJECTS)) for _ in range(3))
    todo = np.arange(n)
    while len(todo):  # objects of a scene are drawn together until none touches another
        x[todo], y[todo], radius[todo] = draw_places(rng, kind[todo], count[todo])
        todo = todo[~well_placed(x[todo], y[todo], radius[todo], count[todo], kind[todo])]
    decay = 0.22 / np.arange(2, 6)[:, None] ** 0.5
    return Scenes(
        kind, count, shape, color, x, y, radius,
        background=rng.integers(0, len(BACKGROUNDS), n),
        shade=rng.uniform(-1, 1, (n, 3)) * [0.05, 0.08, 0.08],
        tint=rng.uniform(-0.025, 0.025, (n, MAX_OBJECTS, 3)),
        outline=rng.normal(size=(n, MAX_OBJECTS, 4, 2)) * decay * 0.6,
    )  # fmt: skip


def draw_identities(rng, n: int, kind: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Shapes and colours (n, 3): all different within a scene, or all the same (counting)."""
    weights = np.array([1.0] * BLOB + [1.5]) / (BLOB + 1.5)
    # The largest of weight-perturbed keys: a weighted draw without replacement (Gumbel trick).
    shape = np.argsort(-(np.log(weights) + rng.gumbel(size=(n, len(SHAPES)))), 1)[:, :MAX_OBJECTS]
    color = np.argsort(rng.random((n, len(COLOR_NAMES))), 1)[:, :MAX_OBJECTS]
    shape[kind == 1], color[kind == 1] = (shape[kind == 1][:, :1], color[kind == 1][:, :1])
    return shape, color


def draw_places(rng, kind, count) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Centres and radii (n, 3) in pixels."""
    n = len(kind)
    large = rng.random((n, MAX_OBJECTS)) < 0.5
    large[kind == 1] = large[kind == 1][:, :1]  # counted objects share their size word
    large &= count[:, None] < 3  # three large ones do not fit in a row
    radius = np.where(large, rng.uniform(21, 26, large.shape), rng.uniform(14, 17, large.shape))
    along = np.array([[64, 64, 64], [36, 92, 64], [24, 64, 104]])[count - 1].astype(float)
    along += rng.uniform(-1, 1, large.shape) * np.array([20, 8, 4])[count - 1][:, None]
    across = 64 + rng.uniform(-1, 1, large.shape) * 20
    upright = ((kind == 2) & (rng.random(n) < 0.5))[:, None]
    x, y = np.where(upright, across, along), np.where(upright, along, across)
    return (*(v.clip(1.15 * radius, SIZE - 1.15 * radius) for v in (x, y)), radius)


def well_placed(x, y, radius, count, kind) -> np.ndarray:
    """No two objects closer than a gap; the two of a relation clearly beside each other."""
    ok = np.ones(len(x), bool)
    for i in range(MAX_OBJECTS):
        for j in range(i):
            gap = np.hypot(x[:, i] - x[:, j], y[:, i] - y[:, j])
            ok &= (count <= i) | (gap > 1.12 * (radius[:, i] + radius[:, j]) + 4)
    dx, dy = np.abs(x[:, 0] - x[:, 1]), np.abs(y[:, 0] - y[:, 1])
    return ok & ((kind != 2) | (np.maximum(dx, dy) > 1.4 * np.minimum(dx, dy)))


# ---- captions


def captions(scenes: Scenes, seed: int, held_out: bool = True) -> list[str]:
    """One caption a scene. Colours, sizes and the background are sometimes left unsaid."""
    rng = np.random.default_rng(seed)
    plain, swap = rng.random(len(scenes)) < 0.6, rng.random(len(scenes)) < 0.5
    sized, placed = rng.random(len(scenes)) < 0.3, rng.random(len(scenes)) < 0.3
    large = scenes.radius > 19
    background = list(BACKGROUNDS)
    result = []
    for i in range(len(scenes)):
        nouns = list(PLURAL.values()) if scenes.kind[i] == 1 else SHAPES
        words = [
            ("large " if large[i, k] else "small ") * bool(sized[i] and scenes.kind[i] != 4)
            + (COLOR_NAMES[scenes.color[i, k]] + " ") * (not plain[i])
            + nouns[scenes.shape[i, k]]
            for k in range(scenes.count[i])
        ]
        if scenes.kind[i] == 1:
            text = f"{NUMBERS[scenes.count[i] - 1]} {words[0]}"
        elif scenes.kind[i] == 2:
            first, second = (1, 0) if swap[i] else (0, 1)
            relation = relation_of(scenes, i, first, second)
            if relation == HELD_OUT_RELATION and not held_out:
                first, second, relation = second, first, "above"
            text = f"a {words[first]} {phrase(relation)} a {words[second]}"
        else:
            text = " and ".join("a " + w for w in words)
        result.append(text + f" on {background[scenes.background[i]]}" * bool(placed[i]))
    return result


def phrase(relation: str) -> str:
    return f"{relation} of" if relation in ("left", "right") else relation


def relation_of(scenes: Scenes, i: int, first: int, second: int) -> str:
    dx = scenes.x[i, first] - scenes.x[i, second]
    dy = scenes.y[i, first] - scenes.y[i, second]
    if abs(dx) > abs(dy):
        return "left" if dx < 0 else "right"
    return "above" if dy < 0 else "below"


# ---- renderer


def on_device(scenes: Scenes, device: torch.device | str) -> dict[str, Tensor]:
    """What the renderer needs, as tensors: integers int64, the rest fp32."""
    arrays = {f.name: torch.from_numpy(getattr(scenes, f.name)) for f in fields(scenes)}
    return {
        k: (v.float() if v.is_floating_point() else v.long()).to(device) for k, v in arrays.items()
    }


def distance(shape: Tensor, dx: Tensor, dy: Tensor, r: Tensor, outline: Tensor) -> Tensor:
    """Signed distance in pixels to the edge of a shape, negative inside. All (B, 3, H, W)."""
    length = torch.sqrt(dx * dx + dy * dy + 1e-6)
    ax, ay = dx.abs(), dy.abs()
    angle = torch.atan2(dy, dx)
    wave = sum(
        outline[..., k, 0, None, None] * torch.cos((k + 2) * angle)
        + outline[..., k, 1, None, None] * torch.sin((k + 2) * angle)
        for k in range(4)
    )
    # Heart: unit height 0..1.1, two arcs and a point (closed form after Inigo Quilez' sdHeart).
    hx, hy = ax / (1.75 * r), 0.55 - dy / (1.75 * r)
    upper = torch.sqrt((hx - 0.25) ** 2 + (hy - 0.75) ** 2) - math.sqrt(2) / 4
    corner = 0.5 * (hx + hy).clamp(min=0)
    lower = torch.minimum(hx**2 + (hy - 1) ** 2, (hx - corner) ** 2 + (hy - corner) ** 2).sqrt()
    heart = torch.where(hx + hy > 1, upper, lower * torch.sign(hx - hy)) * 1.75 * r
    choices = [
        length - r,  # circle
        torch.maximum(ax, ay) - 0.85 * r,  # square
        torch.maximum(dy - 0.85 * r, 0.866 * ax - 0.5 * dy - 0.425 * r),  # triangle, point up
        torch.minimum(  # cross
            torch.maximum(ax - r, ay - 0.33 * r), torch.maximum(ax - 0.33 * r, ay - r)
        ),
        (length - 0.8 * r).abs() - 0.21 * r,  # ring
        heart,
        length - r * 0.9 * (1 + wave.clamp(-0.6, 0.25)),  # blob
    ]
    result = choices[0]
    for index, choice in enumerate(choices[1:], start=1):
        result = torch.where(shape == index, choice, result)
    return result


def render(scenes: dict[str, Tensor], size: int = SIZE) -> tuple[Tensor, Tensor]:
    """Images (B, 3, size, size) in [-1, 1], and a map (B, 1, size, size) that is 1 near an edge."""
    device = scenes["x"].device
    axis = (torch.arange(size, device=device) + 0.5) * (SIZE / size)
    grid_y, grid_x = axis[:, None], axis[None, :]
    shade = scenes["shade"][:, :, None, None]
    levels = torch.tensor(list(BACKGROUNDS.values()), device=device)[scenes["background"]]
    ramp = shade[:, 1] * (grid_x / SIZE * 2 - 1) + shade[:, 2] * (grid_y / SIZE * 2 - 1)
    image = (levels[:, None, None] + shade[:, 0] + ramp)[:, None].expand(-1, 3, -1, -1)

    shape, x, y, radius = (scenes[k][:, :, None, None] for k in ("shape", "x", "y", "radius"))
    d = distance(shape, grid_x - x, grid_y - y, radius, scenes["outline"])  # (B, 3, H, W)
    present = torch.arange(MAX_OBJECTS, device=device) < scenes["count"][:, None]
    d = torch.where(present[:, :, None, None], d, 99.0)
    cover = (0.5 - d * (size / SIZE)).clamp(0, 1)  # anti-aliased over one pixel
    palette = torch.tensor(list(COLORS.values()), device=device)
    paint = palette[scenes["color"]] + scenes["tint"]  # (B, 3 objects, 3 channels)
    for k in range(MAX_OBJECTS):  # objects never overlap, so the order does not matter
        image = torch.lerp(image, paint[:, k, :, None, None], cover[:, k : k + 1])
    edge = (d.abs().amin(1, keepdim=True) < 2.5).float()
    return image.clamp(0, 1) * 2 - 1, edge


class Source:
    """n captioned pictures, kept in 8 bits; the face of models/data.py's Folder.

    What post-training sees: nothing that is held out.
    """

    def __init__(self, n: int, seed: int, device: torch.device | str = "cpu"):
        self.scenes, self.device = draw_scenes(n, seed, held_out=False), device
        self.captions = captions(self.scenes, seed, held_out=False)
        self.key = f"toy world, {n} scenes, seed {seed}"

    @cached_property
    def pixels(self) -> Tensor:
        """(n, 3, SIZE, SIZE), drawn when first asked for, as many at a time as caches hold."""
        rows = np.array_split(np.arange(len(self)), math.ceil(len(self) / 16))
        chunks = (on_device(self.scenes[chunk], self.device) for chunk in rows)
        return torch.cat([to_bytes(render(chunk)[0]) for chunk in chunks])

    def __len__(self) -> int:
        return len(self.captions)

    def images(self, rows) -> Tensor:
        return self.pixels[torch.as_tensor(np.asarray(rows))].float() / 127.5 - 1


def known_words(caption: str) -> str:
    """What the toy's text encoder can read of a caption from elsewhere; perhaps nothing."""
    words = [w for w in caption.lower().replace(",", " ").split() if w in VOCABULARY[2:]]
    return " ".join(words[: CONFIGS["text"]["length"] - 1])


def to_bytes(images: Tensor) -> Tensor:
    return ((images + 1) * 127.5).round().byte()


# ---- scorer: pixels in, objects out


@dataclass
class Found:
    """One object as read from pixels; position in pixels of a 128-pixel picture."""

    shape: str  # "unknown" when no template fits
    color: str
    x: float
    y: float


def components(color: Tensor) -> Tensor:
    """Connected components of equal colour index: (B, H, W) int -> (B, H, W) label, -1 where 0.

    Every pixel points at the largest index it has seen among its like-coloured neighbours, then at
    what that pixel points at (pointer jumping), until nothing moves.
    """
    b, h, w = color.shape
    label = torch.arange(b * h * w, device=color.device).view(b, h, w)
    while True:
        before = label
        label = label.clone()
        for axis in (1, 2):
            n = color.shape[axis] - 1
            low, high = label.narrow(axis, 0, n), label.narrow(axis, 1, n)
            same = color.narrow(axis, 0, n) == color.narrow(axis, 1, n)
            low.copy_(torch.where(same, torch.maximum(low, high), low))
            high.copy_(torch.where(same, torch.maximum(low, high), high))
        for _ in range(3):
            label = label.flatten()[label]
        if torch.equal(label, before):
            return torch.where(color > 0, label, -1)


def hue(rgb: Tensor) -> Tensor:
    """Angle in radians on the colour circle; rgb (..., 3)."""
    r, g, b = rgb.unbind(-1)
    return torch.atan2(math.sqrt(3) * (g - b), 2 * r - g - b)


def color_index(images: Tensor) -> Tensor:
    """(B, 3, H, W) in [-1, 1] -> (B, H, W): 0 where grey, else 1 + index of the nearest hue."""
    rgb = images.float().clamp(-1, 1).movedim(1, -1) * 0.5 + 0.5
    palette = hue(torch.tensor(list(COLORS.values()), device=images.device))
    gap = (hue(rgb)[..., None] - palette).abs()
    nearest = torch.minimum(gap, 2 * math.pi - gap).argmin(-1)
    chroma = rgb.amax(-1) - rgb.amin(-1)
    return torch.where(chroma >= 0.30, nearest + 1, 0)


def crops(images: Tensor, grid: int = 24, smallest: int = 60) -> dict[str, Tensor]:
    """Every coloured component of at least `smallest` pixels, its mask resized to grid x grid."""
    color = color_index(images)
    b, h, w = color.shape
    label = components(color)
    roots, area = torch.unique(label[label >= 0], return_counts=True)
    roots = roots[area >= smallest]
    where = torch.full((b * h * w,), -1, device=images.device, dtype=torch.long)
    where[roots] = torch.arange(len(roots), device=images.device)
    member = torch.where(label >= 0, where[label.clamp(min=0)], -1)  # component of each pixel
    batch, row, col = torch.nonzero(member >= 0, as_tuple=True)
    index = member[batch, row, col]
    box = {}
    corners = ("y0", row, "amin"), ("x0", col, "amin"), ("y1", row, "amax"), ("x1", col, "amax")
    for name, value, how in corners:
        start = torch.zeros(len(roots), dtype=torch.long, device=images.device)
        box[name] = start.scatter_reduce(0, index, value, how, include_self=False)
    step = (torch.arange(grid, device=images.device) + 0.5) / grid
    tall, wide = box["y1"] - box["y0"] + 1, box["x1"] - box["x0"] + 1
    rows = box["y0"][:, None] + (step * tall[:, None]).long()  # (K, grid)
    cols = box["x0"][:, None] + (step * wide[:, None]).long()
    owner = roots // (h * w)
    mask = member[owner[:, None, None], rows[:, :, None], cols[:, None, :]]  # (K, grid, grid)
    mask = mask == torch.arange(len(roots), device=images.device)[:, None, None]
    return dict(
        mask=mask, image=owner, color=color.flatten()[roots] - 1,
        x=(box["x0"] + box["x1"] + 1) / 2 * SIZE / w, y=(box["y0"] + box["y1"] + 1) / 2 * SIZE / h,
        aspect=torch.maximum(tall, wide) / torch.minimum(tall, wide),
    )  # fmt: skip


def templates(device: torch.device | str = "cpu") -> Tensor:
    """Masks (shapes without blob, 24, 24) of the ideal shapes, cut out by the scorer's own code."""
    n = BLOB
    scenes = draw_scenes(n, seed=0)
    scenes.shape[:, 0], scenes.count[:] = np.arange(n), 1
    scenes.x[:], scenes.y[:], scenes.radius[:] = SIZE / 2, SIZE / 2, 40.0
    return crops(render(on_device(scenes, device))[0])["mask"]


def read_scenes(images: Tensor) -> list[list[Found]]:
    """The objects in each picture (B, 3, H, W) in [-1, 1], from pixels alone."""
    found = crops(images)
    mask = found["mask"].flatten(1).float()
    ideal = templates(images.device).flatten(1).float()
    both = mask @ ideal.T
    overlap = both / (mask.sum(1)[:, None] + ideal.sum(1) - both)  # (K, shapes) IoU
    best, shape = overlap.max(1)
    known = (best >= 0.80) & (found["aspect"] <= 1.35)
    result = [[] for _ in range(len(images))]
    facts = (found["image"], shape, known, found["color"], found["x"], found["y"])
    rows = zip(*(fact.tolist() for fact in facts))
    for image, s, ok, c, x, y in rows:
        result[image].append(Found(SHAPES[s] if ok else "unknown", COLOR_NAMES[c], x, y))
    return result


@dataclass(frozen=True)
class Prompt:
    """A prompt with what a picture must hold to pass: each object as (colour or "", shape)."""

    text: str
    task: str
    wanted: tuple
    relation: str = ""  # of the first object, as seen from the second

    def passes(self, found: list[Found]) -> bool:
        """Exactly the wanted objects, and the relation between the first two if there is one."""
        if len(found) != len(self.wanted):
            return False
        left = list(found)
        for color, shape in self.wanted:
            hits = [f for f in left if f.shape == shape and color in ("", f.color)]
            if not hits:
                return False
            left.remove(hits[0])
        if not self.relation:
            return True
        first, second = (
            next(f for f in found if (f.color, f.shape) == pair) for pair in self.wanted[:2]
        )
        dx, dy = first.x - second.x, first.y - second.y
        along = {"left": -dx, "right": dx, "above": -dy, "below": dy}[self.relation]
        across = dy if self.relation in ("left", "right") else dx
        return along > abs(across)


def draw_prompts(per_task: int, seed: int) -> list[Prompt]:
    """per_task prompts of each of TASKS (no held-out concept in them) and of HELD_OUT_TASKS."""
    rng = np.random.default_rng(seed)
    seen_shapes = [s for s in SHAPES if s not in ("blob", HELD_OUT_SHAPE)]
    pairs = [(c, s) for c in COLOR_NAMES for s in seen_shapes if (c, s) not in HELD_OUT_PAIRS]

    def two_pairs(first):
        others = [p for p in pairs if p[0] != first[0] and p[1] != first[1]]
        return first, others[rng.integers(len(others))]

    prompts = []
    for i in range(per_task):
        shape = seen_shapes[i % len(seen_shapes)]
        other = rng.choice([s for s in seen_shapes if s != shape])
        pair = pairs[rng.integers(len(pairs))]
        number, color = 2 + i % 2, rng.choice([c for c, s in pairs if s == shape])
        one, two = two_pairs(pair)
        relation = RELATIONS[i % 3]  # never "below"
        novel = two_pairs(HELD_OUT_PAIRS[i % len(HELD_OUT_PAIRS)])
        novel = novel if i % 4 < 2 else novel[::-1]
        heart = (COLOR_NAMES[i % len(COLOR_NAMES)], HELD_OUT_SHAPE)
        up, down = two_pairs(pairs[rng.integers(len(pairs))])
        prompts += [
            Prompt(f"a {shape}", "single", (("", shape),)),
            Prompt(f"a {shape} and a {other}", "two", (("", shape), ("", other))),
            Prompt(
                f"{NUMBERS[number - 1]} {color} {PLURAL[shape]}",
                "counting",
                ((color, shape),) * number,
            ),
            Prompt(f"a {pair[0]} {pair[1]}", "color", (pair,)),
            Prompt(f"{name(one)} {phrase(relation)} {name(two)}", "position", (one, two), relation),
            Prompt(f"{name(one)} and {name(two)}", "attribute", (one, two)),
            Prompt(f"{name(novel[0])} and {name(novel[1])}", "pair", novel),
            Prompt(name(heart), "shape", (heart,)),
            Prompt(f"{name(up)} below {name(down)}", "relation", (up, down), "below"),
        ]
    return prompts


def name(pair: tuple[str, str]) -> str:
    return f"a {pair[0]} {pair[1]}"


def score(images: Tensor, prompts: list[Prompt]) -> dict[str, float]:
    """Share of prompts passed by task; `seen` is the mean of TASKS, `held_out` of the others."""
    passed = {task: [] for task in TASKS + HELD_OUT_TASKS}
    for prompt, found in zip(prompts, read_scenes(images), strict=True):
        passed[prompt.task].append(prompt.passes(found))
    rates = {task: float(np.mean(hits)) for task, hits in passed.items() if hits}
    for group, tasks in (("seen", TASKS), ("held_out", HELD_OUT_TASKS)):
        if all(t in rates for t in tasks):
            rates[group] = float(np.mean([rates[t] for t in tasks]))
    return rates


def scenes_kept(originals: Scenes, images: Tensor) -> float:
    """Share of pictures whose every object reads back right: shape, colour, place to 8 pixels.

    Blobs have no template, so only their colour and place count.
    """
    kept = []
    for i, found in enumerate(read_scenes(images)):
        left, good = list(found), len(found) == originals.count[i]
        for k in range(originals.count[i]):
            shape = SHAPES[originals.shape[i, k]]
            hits = [
                f for f in left
                if f.color == COLOR_NAMES[originals.color[i, k]] and shape in ("blob", f.shape)
                and math.hypot(f.x - originals.x[i, k], f.y - originals.y[i, k]) < 8
            ]  # fmt: skip
            good = good and bool(hits)
            if hits:
                left.remove(hits[0])
        kept.append(good)
    return float(np.mean(kept))


# ---- how the toy weights were trained (on GPUs; a CPU can run it, for a test)


def compiled(function):
    return torch.compile(function) if torch.cuda.is_available() else function


def train(
    loss_fn,
    modules: list[nn.Module],
    seconds: float,
    lr: float,
    label: str,
    mixed: bool = True,
    keep=None,
) -> list[nn.Module]:
    """Minimise loss_fn() for a time, and return copies of the modules with averaged weights (EMA).

    loss_fn draws its own batch, on the device, so that a whole step is two captured graphs; between
    them the gradients are averaged over the GPUs that torchrun started. mixed: bf16 matmuls on a
    GPU, else TF32. keep(averaged modules) is called once a minute, should the job be cut short.
    """
    params = [p for m in modules for p in m.parameters() if p.requires_grad]
    averaged = copy.deepcopy(modules)
    averages = [p for m in averaged for p in m.parameters() if p.requires_grad]
    device = params[0].device
    gradient = torch.zeros(sum(p.numel() for p in params), device=device)
    for p, view in zip(params, gradient.split([p.numel() for p in params])):
        p.grad = view.as_strided(p.shape, p.stride())  # channels_last where the weight is
    rate, newest = torch.tensor(0.0, device=device), torch.tensor(0.0, device=device)
    mean_loss = torch.zeros((), device=device)
    optimizer = torch.optim.AdamW(
        params, lr=rate, betas=(0.9, 0.99), weight_decay=0.01, fused=True, capturable=True
    )

    def differentiate():
        gradient.zero_()
        with torch.autocast(
            device.type, torch.bfloat16, mixed and device.type == "cuda", cache_enabled=False
        ):
            loss = loss_fn()
        loss.backward()
        mean_loss.lerp_(loss.detach().float(), 0.01)

    def update():
        norm = gradient.norm()
        gradient.mul_((1 / (norm + 1e-6)).clamp(max=1))
        # One batch that overflows would be the end: there is nobody to look in between.
        gradient.copy_(torch.where(norm.isfinite(), gradient, 0.0))
        optimizer.step()
        with torch.no_grad():
            moves = torch._foreach_sub(params, averages)
            torch._foreach_mul_(moves, newest)
            torch._foreach_add_(averages, moves)

    # The rehearsals are at rate 0: nothing moves yet.
    differentiate, update = (training.captured(step) for step in (differentiate, update))
    start, steps, kept = time.time(), 0, time.time()
    done = torch.zeros((), device=device)
    while done < 1:
        # Linear warm-up over 500 steps, then flat, then linear to zero over the last 40%.
        rate.fill_(lr * min(steps / 500, 1.0, (1 - done.item()) / 0.4))
        newest.fill_(max(0.002, 1 / (steps + 1)))  # EMA over the last 500 steps or so
        for _ in range(10):
            differentiate()
            if dist.is_initialized():
                dist.all_reduce(gradient, dist.ReduceOp.AVG)
            update()
        steps += 10
        mean_loss.item()  # waits for the device
        done.fill_((time.time() - start) / seconds)
        if dist.is_initialized():
            dist.broadcast(done, 0)  # all GPUs stop at the same step
        if steps % 2000 == 0 and is_first():
            print(f"{label} {steps:6d} {done:4.0%} loss {mean_loss.item():.4f}", flush=True)
        if keep and is_first() and time.time() - kept > 60:
            keep(averaged)
            kept = time.time()
    return averaged


def is_first() -> bool:
    return not dist.is_initialized() or dist.get_rank() == 0


def spread(latents: Tensor) -> Tensor:
    """Distance of the latents' mean and channel covariance from 0 and 1 (after VICReg, 2105.04906).

    Without it the encoder leaves most directions of a deeply compressed latent nearly empty, and a
    transformer that has to read them amplifies noise. With too much of it the code becomes one that
    no linear layer can read, and stage 1 of align.py has nothing to align: at 0.05 the f32 latents
    explain 18% of the pooled base embedding.
    """
    tokens = latents.float().movedim(1, -1).flatten(0, 2)  # (B h w, C)
    centred = tokens - tokens.mean(0)
    covariance = centred.T @ centred / len(tokens)
    off = covariance - torch.eye(tokens.shape[1], device=tokens.device)
    return off.square().sum() / tokens.shape[1] + tokens.mean(0).square().mean()


def thumbnails(images: Tensor, stride: int, side: int) -> Tensor:
    """What a linear layer should be able to read: side x side mean colours under every token.

    (B, 3, H, W) -> (B, 3 side^2, h, w).
    """
    return F.pixel_unshuffle(F.avg_pool2d(images, stride // side), side)


def train_autoencoder(
    autoencoder: nn.Module, seconds: float, args, decoder_only: bool
) -> nn.Module:
    """L1, five times heavier near edges, + squared error; noisy latents; legible latents."""
    device = weights.pick_device()
    scenes = on_device(draw_scenes(200_000, seed=1), device)
    autoencoder = autoencoder.to(device, memory_format=torch.channels_last)
    autoencoder.encoder.requires_grad_(not decoder_only)
    draw, encode, decode = map(compiled, (render, autoencoder.encode, autoencoder.decode))
    side = 2 if autoencoder.stride == 8 else 4
    read = nn.Conv2d(autoencoder.latent_channels, 3 * side**2, 1).to(device)  # only for the loss

    def loss_fn():
        rows = torch.randint(len(scenes["x"]), (args.batch,), device=device)
        with torch.autocast(device.type, enabled=False):
            images, edge = draw({k: v[rows] for k, v in scenes.items()})
        latents = encode(images.contiguous(memory_format=torch.channels_last))
        # The decoder must bear what a sampler will give it: latents that are slightly off.
        level = args.noise * torch.rand(args.batch, 1, 1, 1, device=device)
        decoded = decode(latents + level * torch.randn_like(latents)).float()
        with torch.autocast(device.type, enabled=False):
            error = ((decoded - images).abs() * (1 + 4 * edge)).mean()
            error = error + (decoded - images).square().mean()
            if decoder_only:
                return error
            small = thumbnails(images, autoencoder.stride, side)
            legible = F.mse_loss(read(latents.float()), small)
            return error + args.legible * legible + args.whiten * spread(latents)

    trained = [autoencoder] if decoder_only else [autoencoder, read]
    return train(loss_fn, trained, seconds, args.lr, args.what)[0]


@torch.no_grad()
def check_autoencoder(autoencoder, n: int = 1024) -> dict:
    """On unseen scenes: PSNR in dB, scenes kept, how well filled and how legible the latent is."""
    device = next(autoencoder.parameters()).device
    scenes = draw_scenes(n, seed=2)
    images, latents, decoded = [], [], []
    for i in range(0, n, 64):
        images.append(render(on_device(scenes[np.arange(i, i + 64)], device))[0])
        latents.append(autoencoder.encode(images[-1]).float())
        decoded.append(autoencoder.decode(latents[-1]).float())
    images, latents, decoded = map(torch.cat, (images, latents, decoded))
    tokens = latents.movedim(1, -1).flatten(0, 2)
    eigenvalues = torch.linalg.eigvalsh(torch.cov(tokens.T))
    small = thumbnails(images, autoencoder.stride, 2 if autoencoder.stride == 8 else 4)
    mse = (decoded.clamp(-1, 1) - images).square().mean((1, 2, 3)) / 4
    return dict(
        psnr=float((-10 * mse.log10()).mean()), scenes_kept=scenes_kept(scenes, decoded),
        latent_std=float(tokens.std()),
        legible=explained(tokens, small.movedim(1, -1).flatten(0, 2)),
        eigenvalue_min=float(eigenvalues[0]), eigenvalue_max=float(eigenvalues[-1]),
    )  # fmt: skip


def explained(inputs: Tensor, targets: Tensor) -> float:
    """Share of the targets' variance that the best linear map from the inputs explains."""
    inputs, targets = inputs - inputs.mean(0), targets - targets.mean(0)
    weights_ = torch.linalg.lstsq(inputs, targets).solution
    return float(1 - (inputs @ weights_ - targets).square().sum() / targets.square().sum())


@dataclass(frozen=True)
class Captioned:
    """The base's training set, on the GPU: latents (n, C, h, w) bf16 and caption tokens (n, L)."""

    latents: Tensor
    tokens: Tensor
    null: Tensor  # (1, L), the empty caption
    level: float  # mean logit of the timestep

    def draw(self, batch: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """noisy latents, timestep, caption tokens (10% of them empty), velocity."""
        device = self.latents.device
        rows = torch.randint(len(self.latents), (batch,), device=device)
        dropped = torch.rand(batch, 1, device=device) < 0.1
        latents = self.latents[rows].float()
        timestep = torch.sigmoid(1.3 * torch.randn(batch, device=device) + self.level)
        noise, t = torch.randn_like(latents), timestep[:, None, None, None]
        words = torch.where(dropped, self.null, self.tokens[rows])
        return (1 - t) * latents + t * noise, timestep, words, noise - latents


# The 4096 latent numbers of f8 show the layout through much noise: it is settled above 0.9. The
# 512 of f32 do not.
LEVELS = {8: 1.2, 32: 0.7}


def encode_scenes(autoencoder, text, n: int) -> Captioned:
    seed = 3 + (dist.get_rank() if dist.is_initialized() else 0)  # every GPU has its own scenes
    torch.manual_seed(seed)
    scenes = draw_scenes(n, seed)
    device = next(autoencoder.parameters()).device
    draw, encode, latents = compiled(render), compiled(autoencoder.encode), []
    with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, device.type == "cuda"):
        for i in range(0, n, 1000):
            images = draw(on_device(scenes[np.arange(i, min(i + 1000, n))], device))[0]
            latents.append(encode(images).bfloat16())
    tokens = text.tokenize([*captions(scenes, seed), ""]).to(device)
    level = LEVELS[autoencoder.stride]
    return Captioned(torch.cat(latents), tokens[:-1], tokens[-1:], level)


def reader(model, text):
    """The base for caption tokens, compiled: (noisy, timestep, tokens, guidance) -> velocity."""
    if isinstance(model, Sana):  # its guidance is two passes
        return compiled(lambda x, t, tokens, _: model(x, t, text(tokens)[0], tokens != 0).float())
    return compiled(lambda noisy, t, tokens, g: model(noisy, t, *text(tokens), g).float())


def train_base(model, text, scenes: Captioned, seconds: float, batch: int, lr: float, **how):
    """Flow matching on captions; guidance 1 stands for the conditional velocity itself."""
    run, one = reader(model, text), torch.ones(batch, device=scenes.null.device)

    def loss_fn():
        noisy, timestep, words, velocity = scenes.draw(batch)
        return F.mse_loss(run(noisy, timestep, words, one), velocity)

    return train(loss_fn, [model, text], seconds, lr, type(model).__name__.lower(), **how)


def distill_guidance(flux, text, scenes: Captioned, seconds: float, batch: int, lr: float):
    """v(text, g) learns to be the teacher's v(null) + g (v(text) - v(null)), g in [1, 5].

    It starts deaf to g: what the guidance embedder says at 1, the only value the teacher was given,
    it says at all. Errors count relative to g, or the largest would drown the others.
    """
    teach = reader(copy.deepcopy(flux), text.requires_grad_(False))
    run, one = reader(flux, text), torch.ones(batch, device=scenes.null.device)
    with torch.no_grad():
        last = flux.guidance_in.out_layer
        last.bias.copy_(flux.guidance_in(sinusoid(one[:1]))[0])
        last.weight.zero_()
    null = scenes.null.expand(batch, -1)

    def loss_fn():
        noisy, timestep, words, _ = scenes.draw(batch)
        g = 1 + 4 * torch.rand(batch, device=scenes.null.device)
        with torch.no_grad():
            with_text = teach(noisy, timestep, words, one)
            without = teach(noisy, timestep, null, one)
            target = without + g[:, None, None, None] * (with_text - without)
        error = run(noisy, timestep, words, g) - target
        return (error / g[:, None, None, None]).square().mean()

    return train(loss_fn, [flux], seconds, lr, "distil")[0]


DCAE_SHAPE = dict(
    attention_head_dim=32, encoder_block_types="ResBlock", decoder_block_types="ResBlock",
    upsample_block_type="interpolate", downsample_block_type="pixel_unshuffle",
    decoder_norm_types="rms_norm", decoder_act_fns="silu", decoder_conv_act_fn="silu",
)  # fmt: skip
CONFIGS = {
    "flux-vae": dict(
        block_out_channels=[16, 32, 64, 64], layers_per_block=1, norm_num_groups=8,
        mid_block_add_attention=False, scaling_factor=1.0, shift_factor=0.0,
    ),
    "dc-ae-f32c32": dict(
        DCAE_SHAPE, latent_channels=32,
        encoder_block_out_channels=[16, 32, 64, 64, 128, 128],
        decoder_block_out_channels=[16, 32, 64, 64, 128, 128],
        encoder_layers_per_block=[0, 0, 1, 1, 1, 1], decoder_layers_per_block=[0, 1, 1, 2, 2, 1],
        encoder_qkv_multiscales=[[]] * 6, decoder_qkv_multiscales=[[]] * 6,
    ),
    "dc-ae-f64c128": dict(
        DCAE_SHAPE, latent_channels=128,
        encoder_block_out_channels=[16, 32, 64, 64, 64, 128, 128],
        decoder_block_out_channels=[16, 32, 64, 64, 64, 128, 128],
        encoder_layers_per_block=[0, 0, 1, 1, 1, 1, 1],
        decoder_layers_per_block=[0, 1, 1, 2, 1, 1, 1],
        encoder_qkv_multiscales=[[]] * 7, decoder_qkv_multiscales=[[]] * 7,
    ),
    "flux": dict(
        in_channels=64, num_layers=1, num_single_layers=4, num_attention_heads=6,
        attention_head_dim=32, axes_dims_rope=[4, 14, 14], joint_attention_dim=128,
        pooled_projection_dim=128, guidance_embeds=True,
    ),
    "sana": dict(
        in_channels=32, out_channels=32, num_layers=4, num_attention_heads=4,
        attention_head_dim=32, num_cross_attention_heads=4, cross_attention_head_dim=32,
        cross_attention_dim=128, caption_channels=128, sample_size=4, qk_norm=QK_NORM,
    ),
    "text": dict(vocabulary=VOCABULARY, width=128, layers=2, heads=4, length=14),
}  # fmt: skip


@torch.no_grad()
def evaluate(
    model,
    autoencoder,
    text,
    prompts: list[Prompt],
    guidance: float,
    steps: int = 16,
    shift: float | None = None,
    batch: int = 100,
    seed: int = 0,
) -> tuple[dict, Tensor]:
    """Rates by task, and the pictures. Prompt i has seed `seed + i`.

    text: what the model takes, a ToyText for FLUX and a SanaToyText for SANA.
    """
    device, guided = next(model.parameters()).device, isinstance(model, Sana)
    side, channels = SIZE // autoencoder.stride, autoencoder.latent_channels
    schedule, tokens = "sana-euler" if guided else "flux", (side // model.patch_size) ** 2
    sigmas = timesteps(steps, schedule, tokens=tokens, shift=shift)
    images = []
    for i in range(0, len(prompts), batch):
        cond = text.encode([p.text for p in prompts[i : i + batch]])
        null = text.encode([""] * len(cond[0])) if guided else None
        noise = draw_noise(list(range(seed + i, seed + i + len(cond[0]))), (channels, side, side))
        latents = sample(model, cond, noise.to(device), sigmas, guidance, null)
        few = latents.split(batch if latents.is_cuda else 8)  # as many as a CPU's caches hold
        images += [autoencoder.decode(part) for part in few]
    images = torch.cat(images)
    return score(images, prompts), images


def write(name: str, module: nn.Module, folder: Path) -> None:
    tensors = {k: v.detach().half().cpu().contiguous() for k, v in module.state_dict().items()}
    header = dict(
        config=json.dumps(CONFIGS[name]), command="python -m models.toy " + " ".join(sys.argv[1:])
    )
    weights.save(folder / f"{name}.safetensors", tensors, header)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    kinds = ["flux-vae", "dc-ae-f32c32", "dc-ae-f64c128", "flux", "sana", "score", "captions"]
    parser.add_argument("what", choices=kinds, help="captions: for sample.py")
    parser.add_argument("--seconds", type=float, default=150, help="of training, on each GPU")
    parser.add_argument("--batch", type=int, default=256, help="on each GPU")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--whiten", type=float, default=0.002, help="weight of `spread`")
    parser.add_argument("--legible", type=float, default=1.0, help="weight of `thumbnails`")
    parser.add_argument("--noise", type=float, default=0.3, help="of the latent's std, decoded too")
    parser.add_argument(
        "--last-seconds", type=float, default=50,
        help="then: autoencoders train the decoder alone, flux distils guidance",
    )  # fmt: skip
    parser.add_argument("--resume", action="store_true", help="bases: go on from what is in --out")
    parser.add_argument("--scenes", type=int, default=400_000, help="for bases, on each GPU")
    parser.add_argument("--model", default="", help="score: this one, such as dc-gen-toy or a run")
    parser.add_argument("--per-task", type=int, default=50, help="prompts of each task to score by")
    parser.add_argument("--out", type=Path, default=HERE)
    args = parser.parse_args()
    if args.what == "captions":  # of all that the base knows
        return print("\n".join(captions(draw_scenes(args.scenes, seed=1), seed=1)))
    if "WORLD_SIZE" in os.environ:  # torchrun --nproc-per-node 4 -m models.toy flux
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("nccl")
    torch.manual_seed(0)
    torch.backends.cudnn.benchmark = True
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    if args.what == "flux":
        make_base(args)
    elif args.what == "sana":
        make_sana(args)
    elif args.what != "score":
        make_autoencoder(args)
    if args.what == "score" and args.model:
        score_model(args)
    elif args.what in ("flux", "sana", "score") and is_first():
        print_scores(args)
    if dist.is_initialized():
        dist.destroy_process_group()


def make_base(args) -> None:
    device = weights.pick_device()
    autoencoder = FluxVAE.from_pretrained(args.out / "flux-vae.safetensors", device)
    flux, text = Flux(**CONFIGS["flux"]).to(device), ToyText(**CONFIGS["text"]).to(device)
    if args.resume:
        for name, module in (("flux", flux), ("text", text)):
            trained = type(module).from_pretrained(args.out / f"{name}.safetensors", device)
            module.load_state_dict(trained.state_dict())
    scenes = encode_scenes(autoencoder, text, args.scenes)
    if args.seconds:
        flux, text = train_base(flux, text, scenes, args.seconds, args.batch, args.lr)
    for distilled in (False, True):  # kept before distillation too, should that be cut short
        if distilled:
            flux = distill_guidance(flux, text, scenes, args.last_seconds, args.batch, args.lr / 3)
        if is_first():
            write("flux", flux, args.out)
            write("text", text, args.out)


def make_sana(args) -> None:
    """The second base: SANA on f32 latents. It reads with the first one's encoder, as that is."""
    device = weights.pick_device()
    autoencoder = DCAE.from_pretrained(part("dc-ae-f32c32", args), device)
    # Frozen, but in training mode, where torch's encoder takes no short cut that is not compiled.
    text = ToyText.from_pretrained(part("text", args), device).train()
    sana = Sana(**CONFIGS["sana"]).to(device)
    nn.init.zeros_(sana.final_layer.linear.weight)
    if args.resume:
        trained = Sana.from_pretrained(args.out / "sana.safetensors", device)
        sana.load_state_dict(trained.state_dict())
    scenes = encode_scenes(autoencoder, text, args.scenes)

    def keep(modules: list[nn.Module]) -> None:
        write("sana", modules[0], args.out)

    # In TF32: LoRA's captured steps of the toy FLUX ended in NaN in bf16.
    how = dict(mixed=False, keep=keep)
    trained = train_base(sana, text, scenes, args.seconds, args.batch, args.lr, **how)
    if is_first():
        keep(trained)


def part(name: str, args) -> Path:
    """What a base is made with: from --out, or else from here."""
    file = args.out / f"{name}.safetensors"
    return file if file.exists() else HERE / file.name


def make_autoencoder(args) -> None:
    cls = FluxVAE if args.what == "flux-vae" else DCAE
    autoencoder = cls(**CONFIGS[args.what])
    for decoder_only, seconds in ((False, args.seconds), (True, args.last_seconds)):
        autoencoder = train_autoencoder(autoencoder, seconds, args, decoder_only)
        write(args.what, autoencoder, args.out)
        print(json.dumps(dict(what=args.what, **check_autoencoder(autoencoder))), flush=True)


def print_scores(args) -> None:
    """The figures of what is in args.out, a line each."""
    device = weights.pick_device()
    for what, cls in {"flux-vae": FluxVAE, "dc-ae-f32c32": DCAE, "dc-ae-f64c128": DCAE}.items():
        file = args.out / f"{what}.safetensors"
        if args.what == "score" and file.exists():  # making one has printed them
            figures = check_autoencoder(cls.from_pretrained(file, device))
            print(json.dumps(dict(what=what, **figures)), flush=True)
    prompts = draw_prompts(args.per_task, seed=0)
    for what, autoencoder, classes in (
        ("flux", "flux-vae", (Flux, FluxVAE, ToyText)),
        ("sana", "dc-ae-f32c32", (Sana, DCAE, SanaToyText)),
    ):
        file = args.out / f"{what}.safetensors"
        if args.what not in (what, "score") or not file.exists():
            continue
        files = (file, part(autoencoder, args), part("text", args))
        parts = [cls.from_pretrained(f, device) for cls, f in zip(classes, files)]
        for guidance in (1.0, 2.0, 3.0, 4.0, 5.0):
            shift = MODELS[f"{what}-toy"]["shift"]
            rates, _ = evaluate(*parts, prompts, guidance, shift=shift)
            rates = {task: round(rate, 3) for task, rate in rates.items()}
            print(json.dumps(dict(what=what, guidance=guidance, **rates)), flush=True)


def score_model(args) -> None:
    """A toy model, base or not, at its own guidance, by the prompts of align.py and lora.py."""
    device = weights.pick_device()
    spec, model, autoencoder = load_pipeline(args.model, device=device)
    if spec["text"] != "toy":
        raise weights.UserError(f"--model {args.model} knows more than shapes: wanted a toy model")
    text = TOYS[text_kind(spec)].from_pretrained(spec["repo"], device)
    prompts = draw_prompts(args.per_task, seed=7)
    how = (spec["guidance"], spec["steps"], spec.get("shift"))
    rates, _ = evaluate(model, autoencoder, text, prompts, *how)
    print(json.dumps(dict(what=args.model, prompts=len(prompts), **rates)))


if __name__ == "__main__":
    weights.run(main)
