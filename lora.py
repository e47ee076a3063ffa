"""LoRA: stage 3 of moving a diffusion transformer to another autoencoder.

What    python lora.py, after python align.py. Trains a low-rank addition to every linear layer
        of the blocks, with the aligned embedder and head, until pictures are the base's again.
Why     Aligned doors alone give the paper's models the right subject, coarsely, and the toy blobs:
        the blocks still work on features of the old latents' statistics. They need to move a
        little, and must not forget. A low-rank update moves them a little by construction, and
        leaves the base's weights as they are.
How     y = W x + b + alpha / r * B (A x),   A (r, in) random, B (out, r) zero                  (1)
        so training starts at the aligned model. The loss is align.py's: flow matching on the
        velocity recovered from the guidance-distilled model, align.py eq. (2) and (3). Merging,
            W' = W + alpha / r * B A,                                                          (2)
        gives a plain transformer again: no cost when sampling.
Cost    The toy: see the README.
Source  DC-Gen, arXiv 2509.25180 (rank 256, alpha 256 for FLUX); LoRA, arXiv 2106.09685.
Differs The modulation layers (27% of FLUX's weights, one row a picture) get no LoRA. On the toy the
        doors learn at three times the rate (--door-rate).
Limits  What the data does not show is forgotten in the end, low rank or not; --decay slows that
        down. The README has figures.
"""

import json
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sample
from align import (
    blocks,
    cosine,
    doors,
    draw_batch,
    held_out_loss,
    open_source,
    own_shift,
    own_stride,
    passes,
    prepare,
    preview,
    print_estimate,
    print_scores,
    settle_autoencoder,
    show_and_score,
    takes_guidance,
    trained,
    transplant,
    watch,
)  # fmt: skip
from models import data, export, runs, script, weights
from models.script import UserError


@dataclass(frozen=True)
class Config(runs.Options):
    model: str = "flux-toy"  # the base: a name in sample.MODELS or a path
    aligned: str = ""  # align.py's file; "": runs/<model>/align.safetensors; none: fresh doors
    autoencoder: str = ""  # only for --aligned none, as in align.py: else the file tells
    data: str = ""  # a folder of images with same-stem .txt captions; "": the toy world
    weights: str = ""  # a folder to look in instead of the hub
    resolution: int = 0  # pixels, height = width; 0: the model's own
    scenes: int = 3072  # toy pictures to draw when there is no data
    rank: int = 64  # of each LoRA
    alpha: float = 64.0  # scale of the update is alpha / rank
    full: bool = False  # train every weight of the blocks instead: forgets more
    recover: bool = True  # eq. (3) of align.py; --no-recover: plain flow matching
    steps: int = 2000
    lr: float = 4e-3  # cosine to zero; at 2e-2 the toy diverges
    door_rate: float = 3.0  # the embedder's and head's learning rate is this times lr
    decay: float = 0.0  # of LoRA's weights, towards none: against forgetting; 1 is much
    batch_size: int = 32
    guidance_max: float = 5.0  # guidance is drawn from [1, this]
    dropout: float = 0.1  # share of captions emptied
    per_task: int = 12  # toy prompts of each task to score by; 0: none
    save_every: int = 100  # steps, so that an interrupted run goes on
    save_dtype: str = "fp32"  # of lora.safetensors: fp32, bf16, fp16
    export: str = ""  # diffusers, peft or comfyui: no training, what these load of a finished run
    seed: int = 0
    device: str = ""  # "": cuda, then mps, then cpu
    out: str = ""  # "": runs/<model>


# For official models, unless flags say otherwise. Rank and alpha are the paper's, the rest is
# customary.
LARGE = dict(
    rank=256, alpha=256.0, steps=10_000, lr=1e-4, door_rate=1.0, micro_batch=2, checkpointing=True,
    warmup=200, save_dtype="bf16", save_every=500, preview_every=1000,
)  # fmt: skip


# ---- model


class LoRALinear(nn.Module):
    """eq. (1) around a frozen linear layer, whose parameters keep their names."""

    def __init__(self, base: nn.Linear | nn.Conv2d, rank: int, alpha: float):
        super().__init__()
        self.weight, self.bias, self.scale = base.weight, base.bias, alpha / rank
        out_features, in_features = base.weight.shape[:2]
        like = dict(device=base.weight.device, dtype=torch.float32)
        self.lora_A = nn.Parameter(torch.randn(rank, in_features, **like) / in_features**0.5)
        self.lora_B = nn.Parameter(torch.zeros(out_features, rank, **like))

    def forward(self, hidden: Tensor) -> Tensor:  # (..., in) -> (..., out)
        # The scale is a factor of the small matrix, not of all tokens.
        down, up = self.lora_A.to(hidden.dtype), (self.scale * self.lora_B).to(hidden.dtype)
        update = F.linear(F.linear(hidden, down), up)
        return F.linear(hidden, self.weight, self.bias) + update

    def merged(self) -> nn.Linear:
        """eq. (2), summed in fp32: a small update would drown in a bf16 sum."""
        linear = nn.Linear(*self.weight.shape[::-1], bias=self.bias is not None, device="meta")
        weight = self.weight.float() + self.scale * self.lora_B @ self.lora_A
        linear.weight, linear.bias = nn.Parameter(weight.to(self.weight.dtype)), self.bias
        return linear


class LoRAConv(LoRALinear):
    """The same around a 1x1 convolution, a linear layer for each pixel: SANA's MLPs."""

    def forward(self, image: Tensor) -> Tensor:  # (B, in, h, w) -> (B, out, h, w)
        halves = (self.lora_A, self.scale * self.lora_B)
        down, up = (half.to(image.dtype)[..., None, None] for half in halves)
        update = F.conv2d(F.conv2d(image, down), up)
        return F.conv2d(image, self.weight, self.bias) + update

    def merged(self) -> nn.Conv2d:
        conv = nn.Conv2d(*self.weight.shape[1::-1], 1, bias=self.bias is not None, device="meta")
        update = self.scale * self.lora_B @ self.lora_A
        weight = self.weight.float() + update[..., None, None]
        conv.weight, conv.bias = nn.Parameter(weight.to(self.weight.dtype)), self.bias
        return conv


def replace_layers(model: nn.Module, kinds: tuple, make) -> None:
    """Every layer of these kinds inside the blocks, but the modulations, becomes make(layer)."""
    for block in blocks(model):
        for path, module in list(block.named_modules()):
            if isinstance(module, kinds) and "mod" not in path:
                parent, _, name = path.rpartition(".")
                setattr(block.get_submodule(parent), name, make(module))


def add_lora(model: nn.Module, rank: int, alpha: float) -> None:
    def wrap(layer: nn.Module) -> nn.Module:
        if isinstance(layer, nn.Linear):
            return LoRALinear(layer, rank, alpha)
        return LoRAConv(layer, rank, alpha) if layer.kernel_size == (1, 1) else layer

    replace_layers(model, (nn.Linear, nn.Conv2d), wrap)


def merge_lora(model: nn.Module) -> None:
    replace_layers(model, (LoRALinear,), lambda layer: layer.merged())


def choose_trained(model: nn.Module, config: Config) -> None:
    """Freeze by name, in the open: LoRA (or all weights) and the two doors are trained."""
    model.requires_grad_(config.full)
    if config.full:
        runs.keep_mixed(model)  # in bf16 a small step is no step
    else:
        add_lora(model, config.rank, config.alpha)
    for door in doors(model):
        door.requires_grad_(True)


# ---- train


def rates(model: nn.Module, config: Config) -> list[dict]:
    """Doors and blocks as AdamW's groups: the doors have further to go, at --door-rate times."""
    at_doors = {id(p) for door in doors(model) for p in door.parameters()}
    groups = [
        {"params": [p for p in trained(model).values() if (id(p) in at_doors) == is_door]}
        for is_door in (False, True)
    ]
    groups[0]["weight_decay"] = config.decay  # A and B towards zero: the blocks towards the base's
    groups[1]["scale"] = config.door_rate
    return groups


def train(
    model: nn.Module, pictures, config: Config, shift: float, device, out: Path, show=None
) -> list:
    """Stage 3. Returns rows of the learning curve: (step, held-out loss)."""
    optimizer = runs.adamw(rates(model, config))
    run = runs.Run("lora", trained(model), optimizer, config, out, 1.0, pictures.key)
    add_gradients = passes(model, config, config.recover and takes_guidance(model), device)
    first = 1_000_000  # other batches than stage 2's
    draw = data.ahead(lambda step: draw_batch(pictures, config, shift, first + step, "cpu"), device)
    for step in run.steps(config.steps):
        if step % max(config.steps // 5, 1) == 0:
            with run.averaged():
                loss = held_out_loss(model, pictures, config, shift, device)
            run.metrics.add(step, held_out=loss)
        if show and config.preview_every and step % config.preview_every == 0:
            show(run, step)
        batch = draw(step)
        loss = add_gradients(batch)  # of align.py eq. (2), (3)
        run.update(loss, cosine(step, config.steps, config.lr), pictures.names_of(batch.rows))
    run.done()
    last = held_out_loss(model, pictures, config, shift, device)
    return [*run.metrics.curve("held_out"), (config.steps, last)]


# ---- main


def load_aligned(config: Config, spec: dict, device, dtype) -> nn.Module:
    """The model to go on from, from align.py's file. Its doors stay in fp32: they are trained."""
    if config.aligned == "none":
        base = sample.load_transformer(sample.describe(config.model), config.weights, device, dtype)
        names = (sample.describe(config.model)["autoencoder"], spec["autoencoder"])
        old, new = (sample.load_autoencoder(n, config.weights, "meta", dtype) for n in names)
        return transplant(base, new.latent_channels, own_stride(spec, base, old, new))
    model = sample.load_transformer(spec, config.weights, device, dtype)
    run = weights.open_checkpoint(Path(spec["transformer"]))
    if torch.device(device).type != "meta":
        for door in doors(model):
            door.float()
        for name in run.shapes:
            model.get_parameter(name).data.copy_(run.get(name))
    return model


def find_aligned(config: Config, out: Path) -> dict:
    """What sample.describe says of align.py's file: its base, its autoencoder and its shift."""
    if config.aligned == "none":
        autoencoder = settle_autoencoder(config).autoencoder
        spec = sample.describe(config.model, autoencoder)
        return spec | ({"shift": 2.0} if spec["text"] == "toy" else {})  # as align.py's default
    path = Path(config.aligned or out / "align.safetensors")
    if not path.exists():
        raise UserError(f"{path} is missing: run `python align.py {runs.same_flags(config)}`")
    run = weights.open_checkpoint(path)
    if run.metadata.get("stage") != "align":
        raise UserError(f"{path} is no file of align.py (stage {run.metadata.get('stage')!r})")
    if run.metadata["base"] != sample.describe(config.model)["transformer"]:
        raise UserError(
            f"{path} was aligned for {run.metadata['base']}, --model is {config.model}: "
            f"align that model first"
        )
    if config.autoencoder not in ("", run.metadata["autoencoder"]):
        raise UserError(
            f"{path} was aligned for {run.metadata['autoencoder']}, --autoencoder is "
            f"{config.autoencoder}: leave it out, or align for that one first"
        )
    return sample.describe(str(path))


def main() -> None:
    doc = runs.with_large(__doc__, LARGE)
    config = script.parse_config(Config, doc)
    if sample.describe(config.model)["text"] != "toy":
        config = script.parse_config(Config, doc, defaults=LARGE)
    out = runs.folder_of(config)
    if config.export:
        return export_run(config, out)
    device = runs.start(config.device)
    runs.check_flags(config)
    spec = find_aligned(config, out)
    with runs.locked(out):
        run(config, spec, out, device)
    runs.finish()


def export_run(config: Config, out: Path) -> None:
    """Write what --export asks for, beside the run."""
    saved = out / "lora.safetensors"
    if not saved.exists():
        raise UserError(f"{saved} is missing: run `python lora.py {runs.same_flags(config)}`")
    spec = sample.describe(str(saved))
    dtype = script.pick_dtype(config.dtype or ("fp32" if spec["text"] == "toy" else "bf16"))
    model = sample.load_transformer(spec, config.weights, "cpu", dtype)
    files = export.write(config.export, saved, model, out / config.export)
    stride = model.config.get("position_stride", 1)
    if stride > 1:
        print(
            f"positions: a token sits at {stride} * i + {(stride - 1) / 2:g}; give these as img_ids"
        )
    side = spec["size"]
    print(f"sample with {spec['autoencoder']}, timestep shift {spec['shift']:.3g}, {side}x{side}")
    print("saved  " + "  ".join(map(str, files)))
    files = [str(file) for file in files]
    facts = {name: spec[name] for name in ("autoencoder", "shift", "size")}
    print(json.dumps(dict(stage="export", kind=config.export, files=files) | facts))


def run(config: Config, spec: dict, out: Path, device: torch.device) -> None:
    torch.manual_seed(config.seed)
    save_dtype = script.pick_dtype(config.save_dtype, "--save-dtype")
    if config.full and config.decay:
        raise UserError(
            f"--decay {config.decay:g} takes LoRA back to nothing; --full has none, and all "
            f"weights would go to zero: one of them"
        )
    base_spec = sample.describe(config.model)
    is_toy = spec["text"] == "toy"
    dtype = runs.frozen_dtype(config, device, is_toy)
    autoencoder = sample.load_autoencoder(spec["autoencoder"], config.weights, "meta", dtype)
    size = config.resolution or spec["size"]
    runs.check_size(size, [autoencoder.stride])
    shift = own_shift(spec, autoencoder, size)
    if not is_toy:
        rehearsal = load_aligned(config, spec, "meta", dtype)
        choose_trained(rehearsal, config)
        grid = (size // autoencoder.stride,) * 2
        print_estimate(rehearsal, grid, config, config.steps, device)

    source = open_source(config, size, autoencoder.stride, out, device)
    pictures = prepare(config, spec, [spec["autoencoder"]], source, out, device, dtype)
    if config.aligned != "none":
        key = data.digest(pictures.key, data.file_digest(Path(spec["transformer"])))
        pictures = replace(pictures, key=key)
    model = load_aligned(config, spec, device, dtype)
    choose_trained(model, config)
    runs.ready_blocks(blocks(model), config)
    autoencoder = sample.load_autoencoder(spec["autoencoder"], config.weights, device, dtype)

    count = sum(p.numel() for p in trained(model).values()) / 1e6
    kind = "all weights" if config.full else f"rank {config.rank}"
    print(
        f"lora | {config.model} -> {spec['autoencoder']} | {kind}, {count:.2f} M trained | "
        f"{len(pictures)} pictures | seed {config.seed} | {device}"
    )
    show = watch("lora", model, autoencoder, spec, shift, pictures, out, device)
    curve = train(model, pictures, config, shift, device, out, show)

    saved = out / "lora.safetensors"
    about = base_spec | {"autoencoder": spec["autoencoder"], "shift": shift, "size": size}
    notes = runs.header(config, "lora", about, model, config.steps)
    kept = {name: p.to(save_dtype) for name, p in trained(model).items()}
    runs.save_last(saved, kept, notes | {"alpha": str(config.alpha)})
    if runs.rank() > 0:
        return
    scores = {}
    if is_toy:
        scores, images, labels = compare(config, base_spec, spec, saved, device)
    else:
        shown, labels = preview(model, autoencoder, spec, shift, pictures, device)
        images = {"+ LoRA": shown}
    files = [str(saved), str(out / "lora.png")]
    sample.save_sheet(out / "lora.png", images, labels)

    print(
        "\nstep  held-out flow loss\n" + "\n".join(f"{step:5d}  {loss:.3f}" for step, loss in curve)
    )
    print_scores(scores)
    print(f"\nsaved  {'  '.join(files)}\nnext   python sample.py --model {saved}")
    print(json.dumps(dict(stage="lora", curve=curve, scores=scores, files=files)))
    runs.delete_progress(saved)


def compare(config: Config, base_spec: dict, spec: dict, saved: Path, device) -> tuple:
    """Scores and pictures of the base, the aligned model and this one, loaded as a user will."""
    contestants = {}
    rows = [("base", base_spec), ("aligned", spec)]
    rows = rows[:1] if config.aligned == "none" else rows
    rows.append(("+ full" if config.full else "+ LoRA", sample.describe(str(saved))))
    for name, part in rows:
        model = sample.load_transformer(part, config.weights, device, torch.float32)
        autoencoder = sample.load_autoencoder(
            part["autoencoder"], config.weights, device, torch.float32
        )
        contestants[name] = (model, autoencoder, part.get("shift"))
    return show_and_score(contestants, spec, config, device)


if __name__ == "__main__":
    script.exit_cleanly(main)
