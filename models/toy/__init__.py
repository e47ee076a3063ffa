"""The toy world: captioned pictures, and an exact scorer.

What    128 x 128 pictures of one to three coloured shapes with captions such as "a red circle
        left of a blue square", and a scorer that reads a scene back from pixels alone.
Why     DC-Gen claims that quality and knowledge are kept. Here both are counted exactly, on a
        laptop, without a judge network: a picture passes its prompt or it does not.
How     Objects are signed distances. The scorer thresholds chroma, takes the nearest hue, labels
        connected components, and compares every component with shape templates. Six tasks follow
        GenEval (arXiv 2310.11513): single, two, counting, colour, position, attribute.
        The base knows some concepts (six colour-shape pairs, the heart, the word "below") that
        rendered post-training scenes never show, so that forgetting can be measured.
"""

import math
from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor

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
# Of the first object, as seen from the second; with the words of a caption.
RELATIONS = {"left": "left of", "right": "right of", "above": "above", "below": "below"}
NUMBERS = ["a", "two", "three"]
LENGTH = 14  # words of a caption, and one in front
VOCABULARY = (
    ["<pad>", "<bos>", "a", "and", "on", "of", "two", "three", "small", "large"]
    + COLOR_NAMES + SHAPES + [PLURAL[s] for s in SHAPES] + [*RELATIONS, *BACKGROUNDS]
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

    def __getitem__(self, rows: np.ndarray) -> "Scenes":
        return Scenes(*(getattr(self, f.name)[rows] for f in fields(self)))


def draw_scenes(n: int, seed: int, held_out: bool = True) -> Scenes:
    """n random scenes. held_out=False leaves the held-out pairs and the held-out shape out.

    Objects stand in a row, in the order in which they are named, or in a column (above, below).
    Free positions were tried: a small base then decides the layout at noise so high that it gets
    the number of objects wrong (two in five prompts failed after 75 M samples).
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


def draw_identities(
    rng: np.random.Generator, n: int, kind: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Shapes and colours (n, 3): all different within a scene, or all the same (counting)."""
    weights = np.array([1.0] * BLOB + [1.5]) / (BLOB + 1.5)
    # The Gumbel trick: the largest perturbed log-weights are a draw without replacement.
    shape = np.argsort(-(np.log(weights) + rng.gumbel(size=(n, len(SHAPES)))), 1)[:, :MAX_OBJECTS]
    color = np.argsort(rng.random((n, len(COLOR_NAMES))), 1)[:, :MAX_OBJECTS]
    shape[kind == 1] = shape[kind == 1][:, :1]
    color[kind == 1] = color[kind == 1][:, :1]
    return shape, color


def draw_places(
    rng: np.random.Generator, kind: np.ndarray, count: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
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


def well_placed(
    x: np.ndarray, y: np.ndarray, radius: np.ndarray, count: np.ndarray, kind: np.ndarray
) -> np.ndarray:
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
    size, result = np.where(scenes.radius > 19, "large ", "small "), []
    for i in range(len(scenes)):
        nouns = list(PLURAL.values()) if scenes.kind[i] == 1 else SHAPES
        words = [
            size[i, k] * bool(sized[i] and scenes.kind[i] != 4)
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
            text = f"a {words[first]} {RELATIONS[relation]} a {words[second]}"
        else:
            text = " and ".join("a " + w for w in words)
        result.append(text + f" on {list(BACKGROUNDS)[scenes.background[i]]}" * bool(placed[i]))
    return result


def prompts_of_all(n: int, held_out: bool = True, uncolored: float = 0.2) -> list[str]:
    """n captions that name all the base knows, and colours often: what is not named is lost."""
    return captions(draw_scenes(n, seed=1, held_out=held_out), 1, held_out, uncolored)


def relation_of(scenes: Scenes, i: int, first: int, second: int) -> str:
    dx = scenes.x[i, first] - scenes.x[i, second]
    dy = scenes.y[i, first] - scenes.y[i, second]
    if abs(dx) > abs(dy):
        return "left" if dx < 0 else "right"
    return "above" if dy < 0 else "below"


# ---- renderer


def on_device(scenes: Scenes, device: torch.device | str) -> dict[str, Tensor]:
    """The arrays as tensors for the renderer: integers int64, the rest fp32."""
    arrays = [(f.name, torch.from_numpy(getattr(scenes, f.name))) for f in fields(scenes)]
    as_kind = {k: v.float() if v.is_floating_point() else v.long() for k, v in arrays}
    return {k: v.to(device) for k, v in as_kind.items()}


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


def known_words(captions: list[str]) -> list[str]:
    """The words of a user's captions that the toy's text encoder knows; perhaps none."""
    words = [caption.lower().replace(",", " ").split() for caption in captions]
    known = [[w for w in line if w in VOCABULARY[2:]][: LENGTH - 1] for line in words]
    counts = [sum(map(len, lines)) for lines in (known, words)]
    if counts[0] < counts[1]:
        print("the toy's text encoder knows {} of {} words".format(*counts))
    return [" ".join(line) for line in known]


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

    Every pixel points at the largest index among its neighbours of the same colour, then at what
    that pixel points at (pointer jumping), until nothing changes.
    """
    b, h, w = color.shape
    label = torch.arange(b * h * w, device=color.device).view(b, h, w)
    while True:
        before, label = label, label.clone()
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
        start = torch.zeros_like(roots)
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
    scenes = draw_scenes(BLOB, seed=0)
    scenes.shape[:, 0], scenes.count[:] = np.arange(BLOB), 1
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
    for image, s, ok, c, x, y in zip(*(fact.tolist() for fact in facts)):
        result[image].append(Found(SHAPES[s] if ok else "unknown", COLOR_NAMES[c], x, y))
    return result


@dataclass(frozen=True)
class Prompt:
    """A prompt, and the objects that a picture must show to pass: (colour or "", shape) each."""

    text: str
    task: str
    wanted: tuple
    relation: str = ""  # of the first object, as seen from the second

    def passes(self, found: list[Found]) -> bool:
        """Exactly the wanted objects, and the relation between the first two if there is one."""
        left, matched = list(found), []
        for color, shape in self.wanted:
            hits = [f for f in left if f.shape == shape and color in ("", f.color)]
            if not hits:
                return False
            left.remove(hits[0])
            matched.append(hits[0])
        if left or not self.relation:
            return not left
        first, second = matched
        dx, dy = first.x - second.x, first.y - second.y
        along = {"left": -dx, "right": dx, "above": -dy, "below": dy}[self.relation]
        across = dy if self.relation in ("left", "right") else dx
        return along > abs(across)


def draw_prompts(per_task: int, seed: int) -> list[Prompt]:
    """per_task prompts of each of TASKS (no held-out concept in them) and of HELD_OUT_TASKS."""
    rng = np.random.default_rng(seed)
    seen_shapes = [s for s in SHAPES if s not in ("blob", HELD_OUT_SHAPE)]
    pairs = [(c, s) for c in COLOR_NAMES for s in seen_shapes if (c, s) not in HELD_OUT_PAIRS]

    def two_pairs(first: tuple[str, str]) -> tuple[tuple[str, str], tuple[str, str]]:
        others = [p for p in pairs if p[0] != first[0] and p[1] != first[1]]
        return first, others[rng.integers(len(others))]

    prompts = []
    for i in range(per_task):
        shape = seen_shapes[i % len(seen_shapes)]
        other = rng.choice([s for s in seen_shapes if s != shape])
        pair = pairs[rng.integers(len(pairs))]
        number, color = 2 + i % 2, rng.choice([c for c, s in pairs if s == shape])
        many = f"{NUMBERS[number - 1]} {color} {PLURAL[shape]}"
        one, two = two_pairs(pair)
        relation = list(RELATIONS)[i % 3]  # never "below"
        placed = f"{name(one)} {RELATIONS[relation]} {name(two)}"
        novel = two_pairs(HELD_OUT_PAIRS[i % len(HELD_OUT_PAIRS)])[:: 1 if i % 4 < 2 else -1]
        heart = (COLOR_NAMES[i % len(COLOR_NAMES)], HELD_OUT_SHAPE)
        up, down = two_pairs(pairs[rng.integers(len(pairs))])
        prompts += [
            Prompt(f"a {shape}", "single", (("", shape),)),
            Prompt(f"a {shape} and a {other}", "two", (("", shape), ("", other))),
            Prompt(many, "counting", ((color, shape),) * number),
            Prompt(f"a {pair[0]} {pair[1]}", "color", (pair,)),
            Prompt(placed, "position", (one, two), relation),
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
    """Share of pictures whose every object reads back right: place, colour, shape (no blob's)."""
    kept = []
    for i, found in enumerate(read_scenes(images)):
        good = len(found) == originals.count[i]
        for k in range(originals.count[i]):  # no two objects are as close as 16 pixels
            shape, color = SHAPES[originals.shape[i, k]], COLOR_NAMES[originals.color[i, k]]
            x, y = originals.x[i, k], originals.y[i, k]
            near = [f for f in found if math.hypot(f.x - x, f.y - y) < 8]
            good &= any(f.color == color and shape in ("blob", f.shape) for f in near)
        kept.append(good)
    return float(np.mean(kept))


def print_scores(scores: dict[str, dict[str, float]]) -> None:
    """A table: a row for each model, a column for each group and task. Nothing if none is given."""
    if not scores:
        return
    groups = ["seen", "held_out", *TASKS, *HELD_OUT_TASKS]
    print("\n" + " " * 12 + "".join(f"{group:>10}" for group in groups))
    for name, rates in scores.items():
        print(f"{name:12}" + "".join(f"{rates[group]:10.2f}" for group in groups))
