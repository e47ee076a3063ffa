"""Embedding alignment: stages 1 and 2 of moving a diffusion transformer to another autoencoder.

What    python align.py, then python lora.py. Gives a pretrained FLUX or SANA two new doors: an
        embedder that reads the latents of a deep-compression autoencoder, and an output head that
        writes them. The blocks between stay frozen: they hold what the model knows.
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
        from two passes, the second without a gradient: empty captions among the data train it.
        Applied to v(text, g) itself, (2) would unlearn the guidance. SANA takes no g: the sampler
        extrapolates from v(null) to v(text), and (2) is applied as it stands to both.
Cost    The toy: see the README. Only the doors have gradients to keep: 0.1 M of 4 M parameters.
Source  DC-Gen, arXiv 2509.25180: embedding alignment, and eq. 3-7 with w = g - 1.
Differs Stage 1 sees clean latents only: with independent noise on both sides (1) becomes a ridge
        that shrinks the embedder. `position_stride` puts a new token at the centre of the base
        tokens it covers, on the toy only: the paper's models keep plain positions. Without a
        gradient for v(null, g) in (3) a step costs a third less, and teaches the toy as much.
"""

import copy
import json
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dcae
import sample
from models import data, runs, script, text, toy, vae, weights
from models.data import Batch, Pictures, example, parts
from models.flux import Flux
from models.script import UserError


@dataclass(frozen=True)
class Config(runs.Options):
    model: str = "flux-toy"  # the base: a name in sample.MODELS or a path
    autoencoder: str = ""  # the new latent space: a preset or a path; "": for the toys, DEEPER
    data: str = ""  # a folder of images with same-stem .txt captions; "": the toy world
    weights: str = ""  # a folder to look in instead of the hub
    resolution: int = 0  # pixels, height = width; 0: the model's own
    scenes: int = 3072  # toy pictures to draw when there is no data
    embed_steps: int = 400  # stage 1
    embed_lr: float = 3e-2  # cosine to zero, as below
    embed_batch: int = 256  # no block runs in stage 1, so a batch costs next to nothing
    steps: int = 200  # stage 2
    lr: float = 3e-3
    batch_size: int = 32
    guidance_max: float = 5.0  # guidance is drawn from [1, this]; eq. (3)
    dropout: float = 0.1  # share of captions emptied: pins down v(null, g)
    shift: float = 2.0  # timestep shift of the new model, trained and sampled; 0: its schedule's
    position_stride: int = 0  # of new tokens, in base tokens; 0: 1, or on the toy what one covers
    per_task: int = 12  # toy prompts of each task to score by; 0: none
    save_every: int = 100  # steps, so that an interrupted run goes on
    seed: int = 0
    device: str = ""  # "": cuda, then mps, then cpu
    out: str = ""  # "": runs/<model>


# Which latent space follows on which, where --autoencoder names none.
DEEPER = {"flux-vae-toy": "dc-ae-f32c32-toy", "dc-ae-f32c32-toy": "dc-ae-f64c128-toy"}

# For official models, unless flags say otherwise. Steps as in the paper, the rest is customary.
LARGE = dict(
    embed_steps=2000, embed_lr=1e-3, embed_batch=64, steps=10_000, lr=1e-4, shift=0.0,
    micro_batch=2, checkpointing=True, warmup=200, save_every=500, preview_every=1000,
)  # fmt: skip


def settle_autoencoder(config):
    """config with --autoencoder filled in. UserError: --model is no base."""
    spec = sample.describe(config.model)
    if spec.get("is_run"):
        raise UserError(
            f"--model {config.model} is a run of ours, which needs its base: wanted a full "
            f"model, such as the transformer that `python lora.py --export diffusers` writes"
        )
    own = spec["autoencoder"]
    name = config.autoencoder or DEEPER.get(own)
    if not name:
        raise UserError(
            f"--autoencoder is missing: wanted the one that {config.model} is to move to from "
            f"{own}, one of {', '.join(dcae.PRESETS)}, or a path"
        )
    return replace(config, autoencoder=name)


# ---- data


def open_source(config, size: int, factor: int, out: Path, device: torch.device):
    """Anything with captions, images(rows) and a key: a folder of the user's, or the toy world."""
    if config.data:
        notes = out / "cache" / "scan.json"
        source = runs.on_first(lambda: data.open_folder(config.data, size, factor, notes))
        source = data.shuffled(source)
        print(data.describe(source))
        if source.left_out and runs.rank() == 0:
            print(f"all of them: {data.write_left_out(source, out / 'left_out.txt')}")
    else:
        if size != toy.SIZE:
            raise UserError(
                f"--resolution {size}: scenes are drawn {toy.SIZE} pixels a side: leave it out, or "
                f"name a folder of pictures, --data"
            )
        source = toy.Source(config.scenes, seed=1000 + config.seed, device=device)
    if len(source) < data.FEWEST:
        where = "in --data" if config.data else "--scenes"
        raise UserError(
            f"{len(source)} pictures; at least {data.FEWEST} are needed to train, {where}"
        )
    return source


def open_autoencoder(name: str, config, device, dtype) -> data.Encoder:
    """What the cache must know of an autoencoder, which is loaded only if there is work for it."""
    path, preset = weights.locate(name, dcae.PRESETS | vae.PRESETS, config.weights or None, "vae")
    checkpoint = weights.open_checkpoint(path, "vae")
    identity = data.digest(data.file_digest(checkpoint.path), checkpoint.config or preset)

    def load() -> nn.Module:
        return sample.load_autoencoder(name, config.weights, device, dtype)

    return data.Encoder(name, identity, load, device, dtype)


def prepare(config, spec: dict, names: list[str], source, out: Path, device, dtype) -> Pictures:
    """Every image through each of the named autoencoders (the last one is new), and captions."""
    captions = source.captions
    if spec["text"] == "toy":
        captions = [toy.known_words(caption) for caption in captions]
        counts = [sum(len(line.split()) for line in lines) for lines in (captions, source.captions)]
        if counts[0] < counts[1]:
            print(f"the toy's text encoder knows {counts[0]} of {counts[1]} words")
    cache = out / "cache"
    words = (sample.text_kind(spec), sample.text_source(spec, config.weights))
    words = data.encode_captions(*words, captions, cache, device, dtype)
    encoders = [open_autoencoder(name, config, device, dtype) for name in names]
    latents = data.encode(source, encoders, cache)
    return data.assemble(source, captions, latents, words, guided=not sample.is_sana(spec))


def draw_batch(
    pictures: Pictures, config, shift: float, step: int, device, held_out: Tensor | None = None
) -> Batch:
    """Batch `step` of the run: a function of the seed and the step alone, so a run can go on.

    Drawn on the CPU: the same batch on every device; of several processes each takes its share.
    held_out: the same for these rows.
    """
    generator = torch.Generator("cpu").manual_seed(config.seed * 1_000_003 + step)
    size = config.batch_size if held_out is None else len(held_out)
    rows = pictures.draw(size, generator)
    rows = rows if held_out is None else held_out
    timestep = torch.randn(size, generator=generator).sigmoid()
    timestep = sample.shifted(timestep, shift)  # as far into the noise as the sampler goes
    share = slice(runs.rank(), None, runs.world())
    latents = pictures.latents[rows[share]]
    noise = torch.randn(size, *latents.shape[1:], generator=generator)
    guidance = 1 + (config.guidance_max - 1) * torch.rand(size, generator=generator)
    dropped = torch.rand(size, generator=generator) < (config.dropout if held_out is None else 0)
    noise, timestep, guidance, dropped = (n[share] for n in (noise, timestep, guidance, dropped))
    null_cond = tuple(c.expand(len(noise), *c.shape[1:]) for c in pictures.null_cond)
    cond = tuple(c[pictures.caption[rows[share]]] for c in pictures.cond)
    cond = tuple(
        torch.where(dropped.view(-1, *[1] * (c.dim() - 1)), n, c) for c, n in zip(cond, null_cond)
    )
    guidance = guidance if pictures.guided else None
    whole = Batch(latents.float(), noise, timestep, cond, null_cond, guidance, rows)
    return whole.part(slice(None), device)


# ---- model


def transplant(base: nn.Module, latent_channels: int, position_stride: int) -> nn.Module:
    """The base with new doors for latents of `latent_channels`; everything between is shared.

    The head starts at zero: a model that says nothing is better than one that says noise.
    The doors are fp32, whatever the base is: they are to be trained.
    """
    changed = {"in_channels": latent_channels, "out_channels": None}
    if isinstance(base, Flux):
        changed["position_stride"] = position_stride
    with torch.device("meta"):
        model = type(base)(**base.config | changed)
    new_embedder, new_head = embedder(model), model.final_layer.linear
    for name, child in base.named_children():
        if any(True for _ in child.parameters()):  # not the positions: they are by the new config
            setattr(model, name, child)
    setattr(model, embedder_name(model), new_embedder)
    model.final_layer = copy.deepcopy(base.final_layer).float()
    model.final_layer.linear = new_head
    for door in (new_embedder, new_head):
        door.to_empty(device=next(base.parameters()).device)
        for layer in door.modules():
            if hasattr(layer, "reset_parameters"):
                layer.reset_parameters()
    nn.init.zeros_(new_head.weight)
    nn.init.zeros_(new_head.bias)
    return model


def own_stride(spec: dict, base: nn.Module, old: nn.Module, new: nn.Module) -> int:
    """Base tokens a side under one new token, as far as its position is concerned.

    The toy's base knows one resolution: a new token sits amid those that it covers. Official bases
    know many, and positions stay as they are, as in the paper: spread over 4096 pixels they would
    run to 254, and FLUX.1, trained up to 2 megapixels, knows some 90 a side.
    """
    own = base.config.get("position_stride", 1)
    if spec["text"] != "toy":
        return own
    return own * max(new.stride // (old.stride * base.patch_size), 1)


def embedder_name(model: nn.Module) -> str:
    return "img_in" if isinstance(model, Flux) else "x_embedder"


def embedder(model: nn.Module) -> nn.Module:
    return getattr(model, embedder_name(model))


def doors(model: nn.Module) -> list[nn.Module]:
    return [embedder(model), model.final_layer]


def blocks(model: nn.Module) -> list[nn.Module]:
    if isinstance(model, Flux):
        return [*model.double_blocks, *model.single_blocks]
    return [*model.blocks]


def trained(model: nn.Module) -> dict[str, Tensor]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


# ---- objective


def alignment_loss(
    model: nn.Module, base: nn.Module, latents: Tensor, base_latents: Tensor
) -> tuple[Tensor, Tensor]:
    """eq. (1), and its target, (B, N, D)."""
    grid = [n // base.patch_size for n in base_latents.shape[2:]]
    target = base.embed(base_latents).mT.unflatten(2, grid)  # (B, D, h, w) in base tokens
    target = F.adaptive_avg_pool2d(target, latents.shape[2:]).flatten(2).mT  # (B, N, D)
    return F.mse_loss(model.embed(latents), target), target


def recovered_velocity(model: nn.Module, noisy: Tensor, batch: Batch) -> Tensor:
    """eq. (3): the conditional velocity of a guidance-distilled model.

    v(null, g) is taken as it is, without a gradient: the captions that are dropped train it.
    """
    with torch.no_grad():
        without = model(noisy, batch.timestep, *batch.null_cond, batch.guidance).float()
    with_text = model(noisy, batch.timestep, *batch.cond, batch.guidance).float()
    g = batch.guidance[:, None, None, None]
    return (with_text + (g - 1) * without) / g


def flow_loss(model: nn.Module, batch: Batch, recover: bool) -> Tensor:
    """eq. (2). recover: through eq. (3); otherwise on what the model returns at that guidance."""
    t = batch.timestep[:, None, None, None]
    noisy = (1 - t) * batch.latents + t * batch.noise
    if recover:
        velocity = recovered_velocity(model, noisy, batch)
    else:
        scale = () if batch.guidance is None else (batch.guidance,)
        velocity = model(noisy, batch.timestep, *batch.cond, *scale).float()
    return F.mse_loss(velocity, batch.noise - batch.latents)


@torch.no_grad()
@runs.eager
def held_out_loss(model: nn.Module, pictures: Pictures, config, shift: float, device) -> float:
    """Flow-matching loss on unseen pictures, at 8 fixed draws of noise, timestep and guidance."""
    fixed = replace(config, seed=0)
    n, loss = len(pictures.latents) - len(pictures), 0.0
    for i in range(8):
        for rows in pictures.held_out:
            if runs.rank() >= len(rows):  # none of these is this process's
                continue
            batch = draw_batch(pictures, fixed, shift, i, "cpu", held_out=rows)
            for part, share in parts(batch, config.micro_batch, device):
                with runs.autocast(model, device):
                    value = flow_loss(model, part, takes_guidance(model)).item()
                loss += value * share * (len(rows) / n)
    return runs.total(loss, device) / 8


@torch.no_grad()
@runs.eager
def feature_distance(
    model: nn.Module, base: nn.Module, pictures: Pictures, config, device, n: int = 8
) -> list[float]:
    """Mean squared distance of the two models' image tokens after each block, on unseen pictures.

    The base's are averaged over those that one new token covers, as in eq. (1). Both see the clean
    latents of the same picture (t = 0): the paper's figure for what alignment does.
    """
    rows, total = pictures.held_out[0][:n], 0.0
    for row in rows.split(1):
        latents = pictures.latents[row].float().to(device)
        base_latents = pictures.base_latents[row].float().to(device)
        cond = [c[pictures.caption[row]].to(device) for c in pictures.cond]
        cond += [torch.ones(1, device=device)] if pictures.guided else []
        ours, theirs = (
            features(network, z, cond, latents.shape[2:])
            for network, z in ((model, latents), (base, base_latents))
        )
        total = total + torch.stack([F.mse_loss(a, b) for a, b in zip(ours, theirs)])
    return (total / len(rows)).tolist()


def features(model: nn.Module, latents: Tensor, cond: list, size: torch.Size) -> list[Tensor]:
    """(1, D, h, w) of the image tokens after each block, averaged to this size, in fp32."""
    grid, kept = [side // model.patch_size for side in latents.shape[2:]], []

    def keep(_block, _inputs, out) -> None:
        # FLUX's double blocks return (image, text), its single blocks have the text in front.
        tokens = (out[0] if isinstance(out, tuple) else out)[:, -math.prod(grid) :]
        kept.append(F.adaptive_avg_pool2d(tokens.float().mT.unflatten(2, grid), size))

    hooks = [block.register_forward_hook(keep) for block in blocks(model)]
    with runs.autocast(model, latents.device):
        model(latents, torch.zeros(1, device=latents.device), *cond)
    for hook in hooks:
        hook.remove()
    return kept


# ---- train


def cosine(step: int, steps: int, peak: float) -> float:
    return peak * 0.5 * (1 + math.cos(math.pi * step / steps))


def takes_guidance(model: nn.Module) -> bool:
    """Guidance-distilled: its velocity is to be recovered by eq. (3)."""
    return model.config["guidance_embeds"]


def train_embedder(
    model: nn.Module, base: nn.Module, pictures: Pictures, config, device, out: Path
) -> float:
    """Stage 1. Returns the share of the pooled base embedding's variance that is explained."""
    parameters = {f"{embedder_name(model)}.{n}": p for n, p in embedder(model).named_parameters()}
    optimizer = runs.adamw([{"params": [*parameters.values()]}])
    run = runs.Run("align-1", parameters, optimizer, config, out, origin=pictures.key)
    share = slice(runs.rank(), None, runs.world())
    for step in run.steps(config.embed_steps):
        generator = torch.Generator("cpu").manual_seed(config.seed * 1_000_003 + step)
        rows = pictures.draw(config.embed_batch, generator)
        loss = torch.zeros((), device=device)
        for part in rows[share].split(config.micro_batch or len(rows)):
            latents = pictures.latents[part].float().to(device)
            base_latents = pictures.base_latents[part].float().to(device)
            part_loss, _ = alignment_loss(model, base, latents, base_latents)  # eq. (1)
            part_loss = part_loss * (len(part) / len(rows))
            part_loss.backward()
            loss += part_loss.detach()
        lr = cosine(step, config.embed_steps, config.embed_lr)
        run.update(loss, lr, pictures.names_of(rows))
    run.done()
    return explained(model, base, pictures, config, device)


@torch.no_grad()
def explained(model: nn.Module, base: nn.Module, pictures: Pictures, config, device) -> float:
    """1 - eq. (1) / its target's variance, on the pictures held out."""
    count, errors, mean, square = 0, 0.0, 0.0, 0.0
    for rows in pictures.held_out:
        for part in rows.split(config.micro_batch or len(rows)):
            latents = pictures.latents[part].float().to(device)
            base_latents = pictures.base_latents[part].float().to(device)
            loss, target = alignment_loss(model, base, latents, base_latents)
            tokens = target.flatten(0, 1).cpu().double()  # (B N, D)
            count, errors = count + len(tokens), errors + loss.item() * len(tokens)
            mean, square = mean + tokens.sum(0), square + tokens.square().sum(0)
    variance = (square / count - (mean / count).square()).mean().item()
    return 1 - errors / count / variance


def passes(model: nn.Module, config, recover: bool, device) -> Callable[[Batch], Tensor]:
    """A function of a batch: adds to the gradients, and returns this process's share of its loss.

    Forward and backward are two passes; with --micro-batch they are several times two.
    """

    def forward_and_backward(part: Batch, share: float) -> Tensor:
        with runs.autocast(model, device):
            loss = share * flow_loss(model, part, recover)  # eq. (2), (3)
        loss.backward()
        return loss.detach()

    if config.graph and device.type == "cuda":
        forward_and_backward = runs.replayed(forward_and_backward, model)

    def whole(batch: Batch) -> Tensor:
        loss = torch.zeros((), device=device)
        for part, share in parts(batch, config.micro_batch, device):
            loss += forward_and_backward(part, share)
        return loss

    return whole


def train_doors(
    model: nn.Module, pictures: Pictures, config, shift: float, device, out: Path, watch=None
) -> None:
    """Stage 2: embedder and head by flow matching, through the frozen blocks."""
    optimizer = runs.adamw([{"params": [*trained(model).values()]}])
    run = runs.Run("align-2", trained(model), optimizer, config, out, 1.0, pictures.key)
    add_gradients = passes(model, config, takes_guidance(model), device)
    draw = data.ahead(lambda step: draw_batch(pictures, config, shift, step, "cpu"), device)
    for step in run.steps(config.steps):
        if watch and config.preview_every and step % config.preview_every == 0:
            watch(run, step)
            with run.averaged():
                loss = held_out_loss(model, pictures, config, shift, device)
            run.metrics.add(step, held_out=loss)
        batch = draw(step)
        loss = add_gradients(batch)
        run.update(loss, cosine(step, config.steps, config.lr), pictures.names_of(batch.rows))
    run.done()


# ---- report


def compare_autoencoders(
    source, pictures: Pictures, old: nn.Module, new: nn.Module, path: Path
) -> dict[str, float]:
    """PSNR in dB of held-out pictures through both, and a sheet of their middles.

    What the new autoencoder loses no training brings back: look before hours of it.
    """
    rows = pictures.held_out[0][:4]
    images = source.images(rows.tolist())
    columns = {"picture": images}
    columns["the base's autoencoder"] = sample.decode(old, pictures.base_latents[rows])
    columns["the new one"] = sample.decode(new, pictures.latents[rows])
    size = [min(side, 512) for side in images.shape[2:]]
    labels = [pictures.captions[i] for i in pictures.caption[rows]]
    shown = {name: sample.crop(column, size) for name, column in columns.items()}
    sample.save_sheet(path, shown, labels)
    rest = list(columns.items())[1:]
    return {name: dcae.psnr(column.clamp(-1, 1), images) for name, column in rest}


@runs.eager
def show_and_score(
    contestants: dict[str, tuple], spec: dict, config, device
) -> tuple[dict[str, dict], dict[str, Tensor], list[str]]:
    """Scores by task (toy) and pictures of the same seeds, for each (model, decoder, shift)."""
    prompts = toy.draw_prompts(max(config.per_task, 1), seed=7)
    encoder = text.TOYS[sample.text_kind(spec)].from_pretrained(spec["repo"], device)
    scores, pictures = {}, {}
    for name, (model, autoencoder, shift) in contestants.items():
        how = (spec["guidance"], spec["steps"], shift)
        with runs.autocast(model, device):
            rates, images = toy.evaluate(model, autoencoder, encoder, prompts, *how)
        scores[name], pictures[name] = rates, images[:9].cpu()
    return scores, pictures, [prompt.text for prompt in prompts[:9]]


@runs.eager
def preview(
    model: nn.Module, autoencoder: nn.Module, spec: dict, shift: float, pictures: Pictures, device
) -> tuple[Tensor, list[str]]:
    """(images, captions) of four held-out captions, seeds 0 to 3, through the real sampler."""
    rows = pictures.held_out[0][:4]
    words = pictures.caption[rows]
    cond = tuple(c[words].to(device) for c in pictures.cond)
    null = tuple(c.expand(len(rows), *c.shape[1:]).to(device) for c in pictures.null_cond)
    shape = tuple(pictures.latents[rows].shape[1:])
    noise = sample.draw_noise([*range(len(rows))], shape).to(device)
    tokens = math.prod(shape[1:]) // model.patch_size**2
    sigmas = sample.timesteps(spec["steps"], spec["schedule"], tokens, shape[0], shift)
    guided = (spec["guidance"], None if pictures.guided else null, spec["solver"])
    with runs.autocast(model, device):
        latents = sample.sample(model, cond, noise, sigmas, *guided)
    return sample.decode(autoencoder, latents), [pictures.captions[i] for i in words]


def watch(stage: str, model, autoencoder, spec, shift, pictures, out: Path, device):
    """A function that draws previews of step n, in out/previews."""

    def draw(run: runs.Run, step: int) -> None:
        if runs.rank() == 0:
            with run.averaged():
                images, captions = preview(model, autoencoder, spec, shift, pictures, device)
            path = out / "previews" / f"{stage}-{step:06d}.png"
            sample.save_sheet(path, {f"{stage}, step {step}": images}, captions)
        runs.wait_for_all()

    return draw


def print_scores(scores: dict[str, dict]) -> None:
    if not scores:
        return
    groups = ["seen", "held_out", *toy.TASKS, *toy.HELD_OUT_TASKS]
    print("\n" + " " * 12 + "".join(f"{g:>10}" for g in groups))
    for name, rates in scores.items():
        print(f"{name:12}" + "".join(f"{rates[g]:10.2f}" for g in groups))


def print_distances(distances: dict[str, list[float]]) -> None:
    shown = range(0, len(distances["start"]), math.ceil(len(distances["start"]) / 10))
    print("\nsquared distance to the base's features, t = 0, after block")
    print(" " * 9 + "".join(f"{i:>9}" for i in shown))
    for name, row in distances.items():
        print(f"{name:9}" + "".join(f"{row[i]:9.3g}" for i in shown))


# ---- main


def main() -> None:
    doc = runs.with_large(__doc__, LARGE)
    config = script.parse_config(Config, doc)
    if sample.describe(config.model)["text"] != "toy":
        config = script.parse_config(Config, doc, defaults=LARGE)
    config = settle_autoencoder(config)
    device = runs.start(config.device)
    runs.check_flags(config)
    out = runs.folder_of(config)
    with runs.locked(out):
        run(config, out, device)
    runs.finish()


def choose_trained(model: nn.Module) -> None:
    """Freeze by name, in the open: the two doors are trained."""
    model.requires_grad_(False)
    for door in doors(model):
        door.requires_grad_(True)


def cost(model: nn.Module, grid: tuple[int, int]) -> runs.Cost:
    """What a picture of this grid costs in training; model: on the meta device."""
    batch, recover = example(model, *grid), takes_guidance(model)
    model = copy.deepcopy(model).to(torch.bfloat16)
    return runs.count(lambda: flow_loss(model, batch, recover), model, blocks(model))


def print_estimate(model: nn.Module, grid: tuple[int, int], config, steps: int, device) -> None:
    print(runs.estimate(cost(model, grid), model, config, steps, device))


def rehearse(config: Config, device: torch.device) -> dict:
    """What sample.describe says of the new model, on the meta device, without memory: do the parts
    fit together, and on this machine?"""
    spec, base, old = sample.load_pipeline(config.model, "", config.weights, "meta")
    new = sample.load_autoencoder(config.autoencoder, config.weights, "meta", torch.float32)
    size = config.resolution or spec["size"]
    factors = [old.stride * base.patch_size, new.stride]  # pixels a side that a token covers
    runs.check_size(size, factors)
    stride = config.position_stride or own_stride(spec, base, old, new)
    if spec["text"] != "toy":
        rehearsal = transplant(base, new.latent_channels, stride)
        choose_trained(rehearsal)
        print_estimate(rehearsal, (size // new.stride,) * 2, config, config.steps, device)
    return spec | dict(
        autoencoder=config.autoencoder, old_autoencoder=spec["autoencoder"], size=size,
        old_shift=spec.get("shift"), shift=config.shift or own_shift(spec, new, size),
        factors=factors, position_stride=stride,
    )  # fmt: skip


def run(config: Config, out: Path, device: torch.device) -> None:
    torch.manual_seed(config.seed)
    spec = rehearse(config, device)
    is_toy, shift = spec["text"] == "toy", spec["shift"]
    names = [spec["old_autoencoder"], spec["autoencoder"]]
    dtype = runs.frozen_dtype(config, device, is_toy)
    source = open_source(config, spec["size"], math.lcm(*spec["factors"]), out, device)
    pictures = prepare(config, spec, names, source, out, device, dtype)
    base = sample.load_transformer(spec, config.weights, device, dtype).requires_grad_(False)
    embedder(base).float()  # the target of eq. (1), and a match for the new one's fp32
    autoencoder = sample.load_autoencoder(names[1], config.weights, device, dtype)
    model = transplant(base, autoencoder.latent_channels, spec["position_stride"])
    choose_trained(model)
    runs.ready_blocks(blocks(model), config)

    count = sum(p.numel() for p in trained(model).values()) / 1e6
    tokens = [(spec["size"] // factor) ** 2 for factor in spec["factors"]]
    print(
        f"align | {config.model} -> {config.autoencoder} | {tokens[0]} -> {tokens[1]} tokens | "
        f"{count:.2f} M trained | {len(pictures)} pictures | seed {config.seed} | {device}"
    )
    if runs.rank() == 0:
        old = sample.load_autoencoder(names[0], config.weights, device, dtype)
        files = [out / "autoencoders.png"]
        psnr = compare_autoencoders(source, pictures, old, autoencoder, files[0])
        told = ", ".join(f"through {name} {value:.1f} dB" for name, value in psnr.items())
        print(f"held-out pictures {told}: {files[0]}")
    measured = (model, pictures, config, shift, device)
    losses = {"start": held_out_loss(*measured)}
    distances = {"start": feature_distance(model, base, pictures, config, device)}
    share = train_embedder(model, base, pictures, config, device, out)
    losses["embedder"] = held_out_loss(*measured)
    distances["embedder"] = feature_distance(model, base, pictures, config, device)
    draw = watch("align", model, autoencoder, spec, shift, pictures, out, device)
    train_doors(*measured, out, draw)
    losses["aligned"] = held_out_loss(*measured)
    distances["aligned"] = feature_distance(model, base, pictures, config, device)

    saved = out / "align.safetensors"
    notes = runs.header(config, "align", spec, model, config.steps)
    runs.save_last(saved, trained(model), notes)
    if runs.rank() > 0:
        return
    images, labels, scores = {}, [], {}
    if is_toy:
        contestants = {"base": (base, old, spec["old_shift"])}
        contestants["aligned"] = (model, autoencoder, shift)
        scores, images, labels = show_and_score(contestants, spec, config, device)
    else:
        shown, labels = preview(model, autoencoder, spec, shift, pictures, device)
        images = {"aligned": shown}
    files = [saved, out / "align.png", *files]
    sample.save_sheet(files[1], images, labels)
    report(config, dict(
        stage="align", explained=share, held_out_loss=losses, feature_distance=distances,
        reconstruction=psnr, scores=scores, tokens=tokens, files=[str(file) for file in files],
    ))  # fmt: skip
    runs.delete_progress(saved)


def report(config: Config, figures: dict) -> None:
    losses = figures["held_out_loss"].items()
    print(f"\nstage 1 explains {figures['explained']:.1%} of the pooled base embedding (held out)")
    print("held-out flow loss   " + "   ".join(f"{k} {v:.3f}" for k, v in losses))
    print_distances(figures["feature_distance"])
    print_scores(figures["scores"])
    print(f"\nsaved  {'  '.join(figures['files'])}")
    print(f"next   python lora.py {runs.same_flags(config)}")
    print(json.dumps(figures))


def own_shift(spec: dict, autoencoder: nn.Module, size: int) -> float:
    """The ratio r of the model's sampling schedule, read off its middle: r s / (1 + (r - 1) s)."""
    if spec.get("shift"):
        return spec["shift"]
    tokens = (size // autoencoder.stride) ** 2
    middle = sample.timesteps(2, spec["schedule"], tokens, autoencoder.latent_channels)[1].item()
    return middle / (1 - middle)


if __name__ == "__main__":
    script.exit_cleanly(main)
