"""Embedding alignment: stages 1 and 2 of moving a diffusion transformer to another autoencoder.

What    python align.py, then python lora.py. Gives a pretrained FLUX two new doors: an embedder
        that reads the latents of a deep-compression autoencoder, and an output head that writes
        them. The blocks between stay frozen: they hold what the model knows.
Why     A fresh embedder feeds those blocks noise. Fine-tuning then first destroys what they know,
        and the paper's models without alignment never recover (FID 456 against 8 on DiT-XL).
How     Stage 1: the new embedding of an image is to be the base's, averaged over the base tokens
        that one new token covers,
            L = E || embed(latents) - pool(embed_base(base_latents)) ||^2                      (1)
        Stage 2: embedder and head together, blocks frozen, by flow matching,
            noisy = (1 - t) latents + t noise,
            L = E || v(noisy, t, text) - (noise - latents) ||^2                                (2)
        FLUX.1-dev and Krea take the guidance g as an input and return the guided velocity
            v(text, g) = g v(text) - (g - 1) v(null).
        That is not what noise - latents is the mean of, so (2) is applied to the velocity recovered
            v(text) = [v(text, g) + (g - 1) v(null, g)] / g                                      (3)
        from two passes. Applied to v(text, g) itself, (2) would unlearn the guidance.
Cost    The toy: see the README. Only the doors have gradients to keep: 0.1 M of 4 M parameters.
Source  DC-Gen, arXiv 2509.25180: embedding alignment, and eq. 3-7 with w = g - 1.
Differs Stage 1 sees clean latents only: with independent noise on both sides (1) becomes a ridge
        that shrinks the embedder. `position_stride` puts a new token at the centre of the base
        tokens it covers; the paper's models keep plain positions (--position-stride 1).
"""

import copy
import json
import math
import subprocess
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

import sample
from models import data, text, toy, weights
from models.flux import Flux
from models.weights import UserError


@dataclass(frozen=True)
class Config:
    model: str = "flux-toy"  # the base: a name in sample.MODELS or a path
    autoencoder: str = "dc-ae-f32c32-toy"  # the new latent space
    data: str = ""  # a folder of images with same-stem .txt captions; "": the toy world
    weights: str = ""  # a folder to look in instead of the hub
    resolution: int = 0  # pixels, height = width; 0: the model's own
    scenes: int = 3072  # toy pictures to draw when there is no data
    embed_steps: int = 400  # stage 1
    embed_lr: float = 3e-3  # cosine to zero, as below
    embed_batch: int = 256  # no block runs in stage 1, so a batch costs next to nothing
    steps: int = 200  # stage 2
    lr: float = 3e-3
    batch_size: int = 32
    guidance_max: float = 5.0  # guidance is drawn from [1, this]; eq. (3)
    dropout: float = 0.1  # share of captions emptied: pins down v(null, g)
    shift: float = 2.0  # timestep shift of the new model, trained and sampled; 0: its schedule's
    position_stride: int = 0  # base tokens a side under one new token; 0: by the autoencoders
    per_task: int = 12  # toy prompts of each task to score by; 0: none
    save_every: int = 100  # steps, so that an interrupted run goes on
    seed: int = 0
    device: str = ""  # "": cuda, then mps, then cpu
    out: str = ""  # "": runs/<model>


# ---- data


@dataclass(frozen=True)
class Pictures:
    """What both stages train on; encoded once, on the CPU. The last VALIDATION are held out."""

    base_latents: Tensor | None  # (n, C, h, w) of the base's autoencoder
    latents: Tensor  # (n, C', h', w') of the new one
    cond: tuple[Tensor, ...]  # of the distinct captions
    caption: Tensor  # (n,) which of them
    null_cond: tuple[Tensor, ...]  # of the empty caption

    def __len__(self) -> int:
        return len(self.latents) - VALIDATION


VALIDATION = 64


def open_source(config, size: int, device: torch.device):
    """Anything with captions, images(rows) and a key: a folder of the user's, or the toy world."""
    if config.data:
        folder = data.open_folder(config.data, size)
        print(data.describe(folder))
        return folder
    return toy.Source(config.scenes, seed=1000 + config.seed, device=device)


def encode(source, autoencoder: nn.Module, name: str, out: Path, device) -> Tensor:
    """Latents (n, C, h, w) of every picture, from the run's cache if it is of these very ones."""
    values = torch.stack([p.double().square().sum() for p in autoencoder.parameters()])
    key = f"{source.key} | {name} {values.sum().item()!r}"  # other weights, other latents
    path = out / "cache" / f"{Path(name).stem}.safetensors"

    def compute():
        return {"latents": data.encode_images(source, autoencoder, device, torch.float32, 64, name)}

    return data.cached(path, key, compute)["latents"]


def prepare(config, spec: dict, autoencoders: dict, source, out: Path, device) -> Pictures:
    """Every image through each of {name: autoencoder}, the last of them new; and the captions."""
    if len(source) < 2 * VALIDATION:
        raise UserError(f"{len(source)} pictures; at least {2 * VALIDATION} are needed to train")
    encoded = [encode(source, a, name, out, device) for name, a in autoencoders.items()]
    captions = source.captions
    if spec["text"] == "toy":
        captions = [toy.known_words(caption) for caption in captions]
    distinct = sorted(set(captions))
    cond, _ = text.encode(spec["text"], spec["repo"], ["", *distinct], device=device)
    index = {caption: i for i, caption in enumerate(distinct)}
    return Pictures(
        base_latents=encoded[0] if len(encoded) == 2 else None,
        latents=encoded[-1],
        cond=tuple(c[1:] for c in cond),
        caption=torch.tensor([index[c] for c in captions]),
        null_cond=tuple(c[:1] for c in cond),
    )


@dataclass(frozen=True)
class Batch:
    latents: Tensor  # (B, C, h, w)
    noise: Tensor
    timestep: Tensor  # (B,)
    cond: tuple[Tensor, ...]
    null_cond: tuple[Tensor, ...]
    guidance: Tensor  # (B,)


def draw_batch(
    pictures: Pictures, config, shift: float, step: int, device, held_out=False
) -> Batch:
    """Batch `step` of the run: a function of the seed and the step alone, so a run can go on.

    Drawn on the CPU: the same batch on every device. held_out: the same batch of unseen pictures.
    """
    generator = torch.Generator("cpu").manual_seed(config.seed * 1_000_003 + step)
    size = VALIDATION if held_out else config.batch_size
    rows = torch.randint(len(pictures), (size,), generator=generator)
    if held_out:
        rows = len(pictures) + torch.arange(size)
    timestep = torch.randn(size, generator=generator).sigmoid()
    timestep = sample.shifted(timestep, shift)  # as far into the noise as the sampler goes
    noise = torch.randn(size, *pictures.latents.shape[1:], generator=generator)
    guidance = 1 + (config.guidance_max - 1) * torch.rand(size, generator=generator)
    dropped = torch.rand(size, generator=generator) < (0 if held_out else config.dropout)
    null_cond = tuple(c.expand(size, *c.shape[1:]) for c in pictures.null_cond)
    cond = tuple(c[pictures.caption[rows]] for c in pictures.cond)
    cond = tuple(
        torch.where(dropped.view(-1, *[1] * (c.dim() - 1)), n, c) for c, n in zip(cond, null_cond)
    )
    numbers = (pictures.latents[rows], noise, timestep, guidance)
    latents, noise, timestep, guidance = (n.to(device) for n in numbers)
    cond, null_cond = (tuple(c.to(device) for c in pair) for pair in (cond, null_cond))
    return Batch(latents, noise, timestep, cond, null_cond, guidance)


# ---- model


def transplant(base: Flux, latent_channels: int, position_stride: int) -> Flux:
    """The base with new doors for latents of `latent_channels`; everything between is shared.

    The head starts at zero: a model that says nothing is better than one that says noise.
    """
    changed = {
        "in_channels": latent_channels,
        "out_channels": None,
        "position_stride": position_stride,
    }
    with torch.device("meta"):
        model = Flux(**base.config | changed)
    like = base.img_in.weight
    for name, child in base.named_children():
        setattr(model, name, child)
    width = like.shape[0]
    model.img_in = nn.Linear(latent_channels, width, device=like.device)
    model.final_layer = copy.deepcopy(base.final_layer)
    model.final_layer.linear = nn.Linear(width, latent_channels, device=like.device)
    nn.init.zeros_(model.final_layer.linear.weight)
    nn.init.zeros_(model.final_layer.linear.bias)
    return model


def doors(model: Flux) -> list[nn.Module]:
    return [model.img_in, model.final_layer]


def trained(model: nn.Module) -> dict[str, Tensor]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


# ---- objective


def alignment_loss(
    model: Flux, base: Flux, latents: Tensor, base_latents: Tensor
) -> tuple[Tensor, Tensor]:
    """eq. (1), and the variance of its target: 1 - loss / variance is the share explained."""
    grid = [n // base.patch_size for n in base_latents.shape[2:]]
    target = base.embed(base_latents).mT.unflatten(2, grid)  # (B, D, h, w) in base tokens
    target = F.adaptive_avg_pool2d(target, latents.shape[2:]).flatten(2).mT  # (B, N, D)
    loss = F.mse_loss(model.embed(latents), target)
    return loss, (target - target.mean((0, 1))).square().mean()


def recovered_velocity(model: nn.Module, noisy: Tensor, batch: Batch) -> Tensor:
    """eq. (3): the conditional velocity of a guidance-distilled model, both passes in one batch."""
    both = [torch.cat(pair) for pair in zip(batch.cond, batch.null_cond)]
    twice = [torch.cat([x, x]) for x in (noisy, batch.timestep, batch.guidance)]
    with_text, without = model(twice[0], twice[1], *both, twice[2]).float().chunk(2)
    g = batch.guidance[:, None, None, None]
    return (with_text + (g - 1) * without) / g


def flow_loss(model: nn.Module, batch: Batch, recover: bool) -> Tensor:
    """eq. (2). recover: through eq. (3); otherwise on what the model returns at that guidance."""
    t = batch.timestep[:, None, None, None]
    noisy = (1 - t) * batch.latents + t * batch.noise
    if recover:
        velocity = recovered_velocity(model, noisy, batch)
    else:
        velocity = model(noisy, batch.timestep, *batch.cond, batch.guidance).float()
    return F.mse_loss(velocity, batch.noise - batch.latents)


@torch.no_grad()
def held_out_loss(model: nn.Module, pictures: Pictures, config, shift: float, device) -> float:
    """Flow-matching loss on unseen pictures, at 8 fixed draws of noise, timestep and guidance."""
    batches = (
        draw_batch(pictures, replace(config, seed=0), shift, i, device, held_out=True)
        for i in range(8)
    )
    return sum(flow_loss(model, batch, recover=True).item() for batch in batches) / 8


# ---- train


def cosine(step: int, steps: int, peak: float) -> float:
    return peak * 0.5 * (1 + math.cos(math.pi * step / steps))


def save_progress(path: Path, model: nn.Module, optimizer, config, step: int) -> None:
    """All that step `step` depends on: batches are functions of seed and step, so no generator."""
    tensors = {}
    for name, p in trained(model).items():
        moments = optimizer.state[p]
        tensors |= {
            name: p,
            f"{name}.mean": moments["exp_avg"],
            f"{name}.square": moments["exp_avg_sq"],
        }
    weights.save(path, tensors, {"step": str(step), "command": json.dumps(asdict(config))})


def load_progress(path: Path, model: nn.Module, optimizer, config) -> int:
    """The step to go on at: 0, or that of an interrupted run with the same settings."""
    if not path.exists():
        return 0
    checkpoint = weights.open_checkpoint(path)
    told, now = json.loads(checkpoint.metadata["command"]), asdict(config)
    changed = [k for k in now if now[k] != told.get(k) and k != "device"]
    if changed:
        raise UserError(
            f"{path} is of an interrupted run with another {', '.join(changed)}: run that command "
            f"again to finish it, or delete the file"
        )
    step = int(checkpoint.metadata["step"])
    for name, p in trained(model).items():
        p.data.copy_(checkpoint.get(name))
        mean, square = (
            checkpoint.get(f"{name}.{kind}").to(p.device) for kind in ("mean", "square")
        )
        optimizer.state[p] = {
            "step": torch.tensor(float(step)),
            "exp_avg": mean,
            "exp_avg_sq": square,
        }
    return step


def train_embedder(model: Flux, base: Flux, pictures: Pictures, config: Config, device) -> float:
    """Stage 1. Returns the share of the pooled base embedding's variance that is explained."""
    optimizer = torch.optim.AdamW(model.img_in.parameters(), betas=(0.9, 0.99), weight_decay=0.0)
    bar = tqdm(range(config.embed_steps), "align 1 embedder")
    for step in bar:
        generator = torch.Generator("cpu").manual_seed(config.seed * 1_000_003 + step)
        rows = torch.randint(len(pictures), (config.embed_batch,), generator=generator)
        latents, base_latents = (
            pictures.latents[rows].to(device),
            pictures.base_latents[rows].to(device),
        )

        loss, _ = alignment_loss(model, base, latents, base_latents)  # eq. (1)

        for group in optimizer.param_groups:
            group["lr"] = cosine(step, config.embed_steps, config.embed_lr)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
    rows = slice(len(pictures), None)
    latents, base_latents = (
        pictures.latents[rows].to(device),
        pictures.base_latents[rows].to(device),
    )
    with torch.no_grad():
        loss, variance = alignment_loss(model, base, latents, base_latents)
    return 1 - (loss / variance).item()


def train_doors(
    model: Flux, pictures: Pictures, config: Config, shift: float, device, progress: Path
) -> None:
    """Stage 2: embedder and head by flow matching, through the frozen blocks."""
    parameters = list(trained(model).values())
    optimizer = torch.optim.AdamW(parameters, betas=(0.9, 0.99), weight_decay=0.0)
    first = load_progress(progress, model, optimizer, config)
    bar = tqdm(range(first, config.steps), "align 2 doors", initial=first, total=config.steps)
    for step in bar:
        batch = draw_batch(pictures, config, shift, step, device)

        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            loss = flow_loss(model, batch, recover=model.config["guidance_embeds"])  # eq. (2), (3)

        for group in optimizer.param_groups:
            group["lr"] = cosine(step, config.steps, config.lr)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        bar.set_postfix(loss=f"{loss.item():.3f}", lr=f"{group['lr']:.1e}", refresh=False)
        if (step + 1) % config.save_every == 0:
            save_progress(progress, model, optimizer, config, step + 1)


# ---- report


def header(
    config, stage: str, spec: dict, autoencoder: str, model: Flux, shift: float, step: int
) -> dict[str, str]:
    """What makes a run loadable and repeatable, as a safetensors header holds it: strings."""
    commit = subprocess.run(
        ["git", "-C", str(weights.ROOT), "rev-parse", "--short", "HEAD"],
        capture_output=True,
        text=True,
    )
    facts = dict(
        stage=stage, base=spec["transformer"], autoencoder=autoencoder, config=model.config,
        shift=shift, seed=config.seed, step=step, command=asdict(config),
        commit=commit.stdout.strip(), torch=torch.__version__,
    )  # fmt: skip
    return {k: v if isinstance(v, str) else json.dumps(v) for k, v in facts.items()}


def show_and_score(
    contestants: dict[str, tuple], spec: dict, config, device
) -> tuple[dict[str, dict], dict[str, Tensor], list[str]]:
    """Scores by task (toy) and pictures of the same seeds, for each (model, decoder, shift)."""
    if spec["text"] != "toy":
        return {}, {}, []
    prompts = toy.draw_prompts(max(config.per_task, 1), seed=7)
    encoder = text.ToyText.from_pretrained(spec["repo"], device)
    scores, pictures = {}, {}
    for name, (model, autoencoder, shift) in contestants.items():
        rates, images = toy.evaluate(
            model, autoencoder, encoder, prompts, spec["guidance"], spec["steps"], shift
        )
        scores[name], pictures[name] = rates, images[:9].cpu()
    return scores, pictures, [prompt.text for prompt in prompts[:9]]


def print_scores(scores: dict[str, dict]) -> None:
    if not scores:
        return
    groups = ["seen", "held_out", *toy.TASKS, *toy.HELD_OUT_TASKS]
    print("\n" + " " * 12 + "".join(f"{g:>10}" for g in groups))
    for name, rates in scores.items():
        print(f"{name:12}" + "".join(f"{rates[g]:10.2f}" for g in groups))


# ---- main


def main() -> None:
    config = weights.parse_config(Config, __doc__)
    device = weights.pick_device(config.device)
    torch.manual_seed(config.seed)
    out = Path(config.out or f"runs/{Path(config.model).stem}")
    spec, base, base_autoencoder = sample.load_pipeline(config.model, "", config.weights, device)
    autoencoder = sample.load_autoencoder(config.autoencoder, config.weights, device, torch.float32)
    size = config.resolution or spec["size"]
    for factor in (autoencoder.stride, base_autoencoder.stride * base.patch_size):
        if size % factor:
            raise UserError(
                f"--resolution {size} is no multiple of {factor}: "
                f"try {size // factor * factor or factor}"
            )
    base.requires_grad_(False)

    source = open_source(config, size, device)
    autoencoders = {spec["autoencoder"]: base_autoencoder, config.autoencoder: autoencoder}
    pictures = prepare(config, spec, autoencoders, source, out, device)
    stride = autoencoder.stride // (base_autoencoder.stride * base.patch_size)
    model = transplant(base, autoencoder.latent_channels, config.position_stride or max(stride, 1))
    model.requires_grad_(False)
    for door in doors(model):
        door.requires_grad_(True)
    shift = config.shift or own_shift(spec, autoencoder, size)

    count = sum(p.numel() for p in trained(model).values()) / 1e6
    tokens = [
        (size // (a.stride * m.patch_size)) ** 2
        for a, m in ((base_autoencoder, base), (autoencoder, model))
    ]
    print(
        f"align | {config.model} -> {config.autoencoder} | {tokens[0]} -> {tokens[1]} tokens | "
        f"{count:.2f} M trained | {len(pictures)} pictures | seed {config.seed} | {device}"
    )

    losses = {"start": held_out_loss(model, pictures, config, shift, device)}
    explained = train_embedder(model, base, pictures, config, device)
    losses["embedder"] = held_out_loss(model, pictures, config, shift, device)
    train_doors(model, pictures, config, shift, device, out / "align.progress.safetensors")
    losses["aligned"] = held_out_loss(model, pictures, config, shift, device)

    saved = out / "align.safetensors"
    notes = header(config, "align", spec, config.autoencoder, model, shift, config.steps)
    weights.save(saved, trained(model), notes)
    (out / "align.progress.safetensors").unlink(missing_ok=True)
    contestants = {
        "base": (base, base_autoencoder, spec.get("shift")),
        "aligned": (model, autoencoder, shift),
    }
    scores, images, prompts = show_and_score(contestants, spec, config, device)
    files = [str(saved)]
    if images:
        files.append(str(out / "align.png"))
        sample.contact_sheet(images, prompts).save(files[-1])

    print(f"\nstage 1 explains {explained:.1%} of the pooled base embedding (held out)")
    print("held-out flow loss   " + "   ".join(f"{k} {v:.3f}" for k, v in losses.items()))
    print_scores(scores)
    print(f"\nsaved  {'  '.join(files)}\nnext   python lora.py")
    figures = dict(
        stage="align",
        explained=explained,
        held_out_loss=losses,
        scores=scores,
        tokens=tokens,
        files=files,
    )
    print(json.dumps(figures))


def own_shift(spec: dict, autoencoder: nn.Module, size: int) -> float:
    """The ratio r of the model's sampling schedule, read off its middle: r s / (1 + (r - 1) s)."""
    tokens = (size // autoencoder.stride) ** 2
    middle = sample.timesteps(
        2, spec["schedule"], tokens, autoencoder.latent_channels, spec.get("shift")
    )[1].item()
    return middle / (1 - middle)


if __name__ == "__main__":
    weights.run(main)
