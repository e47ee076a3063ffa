"""The toy world: captioned pictures, and an exact scorer.

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
Use     python -m models.toy score --model dc-gen-toy --per-task 100
        python -m models.toy captions --scenes 3072 > prompts.txt    # of all that the base knows
        How the toy's weights were trained: models/pretrain.py.
"""

import argparse
import json
import math
from dataclasses import dataclass, fields
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from models import script
from models.sana import Sana
from models.text import TOYS
from sample import decode, draw_noise, load_pipeline, sample, text_kind, timesteps

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
LENGTH = 14  # words of a caption, and one in front
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


def captions(scenes: Scenes, seed: int, held_out: bool = True, uncolored: float = 0.6) -> list[str]:
    """One caption a scene. Colours, sizes and the background are sometimes left unsaid."""
    rng = np.random.default_rng(seed)
    plain, swap = rng.random(len(scenes)) < uncolored, rng.random(len(scenes)) < 0.5
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
    return " ".join(words[: LENGTH - 1])


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


# ---- a model's score


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
        images.append(decode(autoencoder, latents).to(device))
    images = torch.cat(images)
    return score(images, prompts), images


def score_model(name: str, per_task: int) -> dict:
    """A toy model, base or not, at its own guidance, by the prompts of align.py and lora.py."""
    device = script.pick_device()
    spec, model, autoencoder = load_pipeline(name, device=device)
    if spec["text"] != "toy":
        raise script.UserError(f"--model {name} knows more than shapes: wanted a toy model")
    text = TOYS[text_kind(spec)].from_pretrained(spec["repo"], device)
    prompts = draw_prompts(per_task, seed=7)
    how = (spec["guidance"], spec["steps"], spec.get("shift"))
    rates, _ = evaluate(model, autoencoder, text, prompts, *how)
    return dict(model=name, prompts=len(prompts), **rates)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=["captions", "score"])
    parser.add_argument("--scenes", type=int, default=3072, help="captions: of so many")
    parser.add_argument(
        "--held-out", action=argparse.BooleanOptionalAction, default=True,
        help="captions: of what post-training scenes leave out, too",
    )  # fmt: skip
    parser.add_argument("--uncolored", type=float, default=0.2,
                        help="captions: share without colours; 0.6 in rendered scenes")  # fmt: skip
    parser.add_argument("--model", default="flux-toy", help="score: a name, or a run of ours")
    parser.add_argument("--per-task", type=int, default=50, help="score: prompts of each task")
    args = parser.parse_args()
    if args.what == "captions":
        scenes = draw_scenes(args.scenes, 1, args.held_out)
        print("\n".join(captions(scenes, 1, args.held_out, args.uncolored)))
    else:
        print(json.dumps(score_model(args.model, args.per_task)))


if __name__ == "__main__":
    script.exit_cleanly(main)
