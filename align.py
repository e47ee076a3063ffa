"""Embedding alignment: stages 1 and 2 of moving a diffusion transformer to another autoencoder.

What    python align.py, then python lora.py. Gives a pretrained FLUX or SANA a new embedder, which
        reads the latents of a deep-compression autoencoder, and a new output head, which writes
        them. The blocks between stay frozen: they hold what the model knows.
Why     A fresh embedder feeds those blocks noise. Fine-tuning then first destroys what they know,
        and the paper's models without alignment never recover (FID 456 against 8 on DiT-XL).
How     Data: pictures that the base draws from prompts, which name what is to be kept.
        Stage 1: the new embedding of an image without noise has to equal the base's, averaged over
        the base tokens that one new token covers,
            L = E || embed(latents) - pool(embed_base(base_latents)) ||^2                      (1)
        An embedder is linear: (1) is least squares, and is solved exactly in one pass.
        Stage 2: embedder and head together, blocks frozen, by flow matching,
            noisy = (1 - t) latents + t noise,
            L = E || v(noisy, t, text) - (noise - latents) ||^2                                (2)
        FLUX.1-dev and Krea take the guidance g as an input and return the guided velocity
            v(text, g) = g v(text) - (g - 1) v(null).
        (2) is least for the mean of noise - latents, which v(text) is and v(text, g) is not:
        applied to v(text, g) it would unlearn the guidance. So it is applied to
            v(text) = [v(text, g) + (g - 1) v(null, 1)] / g,                                     (3)
        recovered from two passes. Ideally v(null, g) is the same for every g; at g = 1 the base
        was asked for nothing else, and is nearest to it. That pass has no gradient: rows whose
        caption is dropped train v(null, g). SANA takes no g: the sampler extrapolates from
        v(null) to v(text), and (2) is applied as it stands.
Cost    The toy: four minutes on two CPU cores. FLUX.1 (12 B) at 1024 x 1024: 25 GiB of a GPU.
Saves   runs/<model>/drawn/: the pictures. align.safetensors beside it: embedder and head, and in
        its header the base, the autoencoder, the schedule and the flags. lora.py goes on from it.
Source  DC-Gen, arXiv 2509.25180: embedding alignment, and eq. 3-7 with w = g - 1.
Differs The paper minimizes (1) by gradient steps, and its authors' code compares on the base's
        grid, to which it enlarges the new embedding. The README lists all differences.
"""

import copy
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

import dcae
import sample
from models import data, jobs, registry, runs, toy
from models.data import Batch, Dataset
from models.identity import placed
from models.registry import Spec
from models.script import Files, UserError, exit_cleanly, parse_config
from models.weights import write_whole


@dataclass(frozen=True)
class Config:
    model: str = "flux-toy"  # the base: a name in registry.MODELS or a path
    autoencoder: str = ""  # the new latent space: a preset or a path; "": for the toys, DEEPER
    adapter: Files = ""  # FILE[:scale], a LoRA to merge into the base; may be repeated
    data: str = ""  # images with same-stem .txt captions; "": the base draws --prompts
    prompts: str = ""  # a .txt, a prompt a line, or .jsonl; "": for the toys, all they know
    weights: str = ""  # a folder to look in instead of the hub
    resolution: int = 0  # pixels, height = width; 0: the model's own
    scenes: int = 3072  # prompts of the toy world, if none are given
    ablation: str = ""  # random: without stage 1
    steps: int = 200  # stage 2
    lr: float = 3e-3  # cosine to zero
    batch_size: int = 32  # of all GPUs together
    micro_batch: int = 0  # pictures a GPU takes at once; 0: its share of the batch
    shift: float = 2.0  # of timesteps, in training and sampling; 0: the schedule's at each size
    ema: float = 0.0  # decay of a moving average, e.g. 0.999, which is then what is saved; 0: none
    per_task: int = 12  # toy prompts of each task to score by; 0: none
    save_every: int = 100  # steps, so that an interrupted run goes on
    seed: int = 0
    device: str = ""  # "": cuda, then mps, then cpu
    dtype: str = ""  # of frozen weights and encoders: fp32, bf16; "": fp32 for toys and on a CPU
    out: str = ""  # "": runs/<model>


# For official models, unless flags say otherwise. The paper takes 5,000 to 20,000 steps.
LARGE = dict(steps=10_000, lr=1e-4, shift=0.0, micro_batch=2, save_every=500)
DROPOUT = 0.1  # share of captions emptied: they train v(null, g), at every g
GUIDANCE = (1.0, 5.0)  # the guidance of eq. (3) is drawn from this interval
CLIP = 1.0  # largest norm of a gradient
ADAMW = dict(betas=(0.9, 0.99), weight_decay=0.0)
WARMUP = 200  # steps over which the learning rate rises, in runs of 5,000 steps and more
# The next deeper latent space, for the toys.
DEEPER = {"flux-vae-toy": "dc-ae-f32c32-toy", "dc-ae-f32c32-toy": "dc-ae-f64c128-toy"}


# ---- objective


def pooled_embedding(base: nn.Module, base_latents: Tensor, grid: Sequence[int]) -> Tensor:
    """The target (B, N, D) of eq. (1): the base's embedding, averaged to a grid of N tokens."""
    base_grid = [n // base.patch_size for n in base_latents.shape[2:]]
    embedding = base.embed(base_latents).mT.unflatten(2, base_grid)  # (B, D, h, w)
    return F.adaptive_avg_pool2d(embedding, grid).flatten(2).mT


def alignment_loss(
    model: nn.Module, base: nn.Module, latents: Tensor, base_latents: Tensor
) -> tuple[Tensor, Tensor]:
    """eq. (1), and its target (B, N, D)."""
    target = pooled_embedding(base, base_latents, latents.shape[2:])
    return F.mse_loss(model.embed(latents), target), target


def recovered_velocity(model: nn.Module, noisy: Tensor, batch: Batch) -> Tensor:
    """eq. (3): the conditional velocity (B, C, h, w) of a guidance-distilled model."""
    with torch.no_grad():
        one = torch.ones_like(batch.guidance)
        without = model(noisy, batch.timestep, *batch.null_cond, one).float()
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
        guidance = () if batch.guidance is None else (batch.guidance,)
        velocity = model(noisy, batch.timestep, *batch.cond, *guidance).float()
    return F.mse_loss(velocity, batch.noise - batch.latents)


# ---- model


def transplant(base: nn.Module, latent_channels: int, position_stride: int = 1) -> nn.Module:
    """The base with a new embedder and head for `latent_channels`; all between them is shared.

    The head starts at zero: a model that predicts nothing is better than one that predicts noise.
    Embedder and head are in fp32, whatever the base is: they train. A new token is one latent
    (models/flux.py: 64 channels are FLUX's own 16 in 2 x 2 patches, others have no patches).
    position_stride: base tokens a side between two new tokens, for the positions of FLUX.
    """
    changed = {"in_channels": latent_channels, "out_channels": None}
    if "position_stride" in base.config:
        changed["position_stride"] = position_stride
    with torch.device("meta"):
        model = type(base)(**base.config | changed)
    embedder, linear = model.embedder, model.head.linear
    for layer in (*embedder.modules(), linear):
        if isinstance(layer, nn.Linear | nn.Conv2d):
            layer.to_empty(device=next(base.parameters()).device)
            layer.reset_parameters()
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)
    for name, child in base.named_children():
        if child is base.embedder or not [*child.parameters()]:
            continue  # the new embedder stays; positions follow the new config
        if child is base.head:  # its modulation stays the base's
            child = copy.deepcopy(child)
            child.linear = linear
        setattr(model, name, child)
    return model


def choose_trained(model: nn.Module) -> None:
    """The embedder and the head's linear layer are trained, all else is frozen.

    The head's modulation too: it sees the timestep alone, which means what it meant.
    """
    model.requires_grad_(False)
    model.embedder.requires_grad_(True)
    model.head.linear.requires_grad_(True)


def trained(model: nn.Module) -> dict[str, Tensor]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


# ---- data


def draw_batch(
    pictures: Dataset, config, spec: Spec, step: int, held_out: Tensor | None = None
) -> Batch:
    """Batch `step`, on the CPU: a function of the seed and the step alone, for any device.

    Of several processes each takes its share of the rows. held_out: these rows instead, with all
    captions kept.
    """
    generator = torch.Generator("cpu").manual_seed(config.seed * 1_000_003 + step)
    size = config.batch_size if held_out is None else len(held_out)
    rows = pictures.draw(size, generator)  # advances the generator even where it is not used
    rows = rows if held_out is None else held_out
    mine = slice(runs.rank(), None, runs.world())  # this process's share
    latents = pictures.latents[rows[mine]].float()
    timestep = torch.randn(size, generator=generator).sigmoid()  # logit-normal
    *_, channels, height, width = latents.shape
    ratio = sample.shift_of(spec, height * width, channels)  # that of sampling, at this size
    timestep = sample.shifted(timestep, ratio)
    noise = torch.randn(size, *latents.shape[1:], generator=generator)
    guidance = GUIDANCE[0] + (GUIDANCE[1] - GUIDANCE[0]) * torch.rand(size, generator=generator)
    dropped = torch.rand(size, generator=generator) < (DROPOUT if held_out is None else 0)

    text = tuple(embeddings[pictures.caption[rows[mine]]] for embeddings in pictures.cond)
    null = tuple(one.expand(len(latents), *one.shape[1:]) for one in pictures.null_cond)
    cond = tuple(torch.where(dropped[mine].view(-1, *[1] * (n.dim() - 1)), n, c)
                 for c, n in zip(text, null))  # fmt: skip
    return Batch(
        latents=latents,
        noise=noise[mine],
        timestep=timestep[mine],
        cond=cond,
        null_cond=null,
        guidance=guidance[mine] if pictures.guidance_is_input else None,
        rows=rows,
    )


# ---- train

# The loop of train_head is written out again in lora.py, so that each script is whole.
# What the loops call stands in models/runs.py and models/data.py:
#   Run.steps       yields the steps that are left; saves every --save-every steps and after Ctrl-C
#                   or SIGTERM. The same command goes on there; with other flags it is refused.
#   Run.is_finite   False where loss or gradient is NaN or Inf: the step is skipped and its pictures
#                   are named. The tenth such step in a row ends the run.
#   Run.done        puts the moving average (--ema) in the place of the parameters
#   Batch.split     micro-batches, and the weight of each one in the loss of the whole batch
#   sum_over_gpus   each GPU holds the whole model and differentiates its share of the batch
#   autocast        bf16 matrix products where the frozen weights are bf16
#   compiled, ahead on a GPU: CUDA graphs for toys; the next batch is drawn meanwhile


def cosine(step: int, steps: int, peak: float) -> float:
    """The learning rate: it rises over WARMUP steps in a long run, and falls to zero."""
    warmup = WARMUP if steps >= 5000 else 0
    rise = min(1.0, (step + 1) / (warmup + 1))
    return peak * rise * 0.5 * (1 + math.cos(math.pi * step / steps))


def takes_guidance(model: nn.Module) -> bool:
    """Guidance-distilled: eq. (3) recovers its conditional velocity."""
    return model.config["guidance_embeds"]


@runs.measuring()
def solve_embedder(model: nn.Module, base: nn.Module, pictures: Dataset, config: Config) -> None:
    """Stage 1, the embedder alone: where the gradient of eq. (1) is zero. No block runs.

    Each token gives X a row [latent, 1] and Y its target: [weight, bias]^T = (X^T X)^-1 X^T Y.
    Both products are sums over tokens, of a size that does not grow with them.
    """
    weight, bias = model.embedder.parameters()
    n, mine = weight[0].numel() + 1, slice(runs.rank(), None, runs.world())
    xx, xy = torch.zeros(n, n).double(), torch.zeros(n, len(weight)).double()
    for rows in pictures.trained:
        for part in tqdm(rows[mine].split(config.micro_batch or 64), "align-1", leave=False):
            latents = pictures.latents[part].float()
            base_latents = pictures.base_latents[part].float().to(weight.device)
            y = pooled_embedding(base, base_latents, latents.shape[2:]).flatten(0, 1)  # (B N, D)
            x = F.pad(latents.flatten(2).mT.flatten(0, 1), (0, 1), value=1.0).double()
            xx += x.mT @ x
            xy += x.mT @ y.cpu().double()
    xx, xy = (runs.sum_of_all(total, weight.device) for total in (xx, xy))
    ridge = 1e-6 * xx.diagonal().mean() * torch.eye(n)  # for channels that never change
    solution = torch.linalg.solve(xx + ridge, xy)
    weight.copy_(solution[:-1].mT.view_as(weight))
    bias.copy_(solution[-1])


def train_head(
    model: nn.Module,
    pictures: Dataset,
    config: Config,
    spec: Spec,
    watch: Callable[[runs.Run], None] | None = None,  # called five times on the way
) -> None:
    """Stage 2: embedder and head, by eq. (2). The frozen blocks hand gradients on."""
    parameters = [*trained(model).values()]
    groups = [{"params": parameters, "scale": 1.0}]  # scale: of the learning rate
    optimizer = torch.optim.AdamW(groups, **ADAMW, fused=parameters[0].is_cuda)
    run = runs.Run("align", trained(model), optimizer, config, pictures.key)
    recover = takes_guidance(model)
    loss_of = runs.compiled(flow_loss, config, run.device, spec.is_toy)
    batch_of = data.ahead(lambda step: draw_batch(pictures, config, spec, step), run.device)
    for step in run.steps(config.steps):  # goes on where an earlier process stopped
        if watch and step % max(config.steps // 5, 1) == 0:
            watch(run)
        batch = batch_of(step)
        loss = torch.zeros((), device=run.device)
        for part, weight in batch.split(config.micro_batch, run.device):
            with runs.autocast(model):
                part_loss = weight * loss_of(model, part, recover)  # eq. (2), (3)
            part_loss.backward()
            loss += part_loss.detach()
        runs.sum_over_gpus(loss, parameters)
        norm = nn.utils.clip_grad_norm_(parameters, CLIP)
        lr = cosine(step, config.steps, config.lr)
        if run.is_finite(loss, norm, pictures.names_of(batch.rows)):  # else the step is skipped
            for group in optimizer.param_groups:
                group["lr"] = lr * group["scale"]
            optimizer.step()
            run.update_average()  # where --ema is given
        optimizer.zero_grad()
        run.log(loss=loss, lr=lr, norm=norm)
    run.done()


# ---- measure


@runs.measuring()
def explained(model: nn.Module, base: nn.Module, pictures: Dataset, config: Config) -> float:
    """1 - eq. (1) / its target's variance, on the pictures held out."""
    device = next(model.parameters()).device
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


@runs.measuring()
def held_out_loss(model: nn.Module, pictures: Dataset, config, spec: Spec) -> float:
    """eq. (2) on unseen pictures, at 8 fixed draws of noise, timestep and guidance."""
    device = next(model.parameters()).device
    fixed = replace(config, seed=0)
    n, loss = sum(map(len, pictures.held_out)), 0.0
    for i in range(8):
        for rows in pictures.held_out:
            if runs.rank() >= len(rows):  # none of these is this process's
                continue
            batch = draw_batch(pictures, fixed, spec, i, held_out=rows)
            for part, weight in batch.split(config.micro_batch, device):
                with runs.autocast(model):
                    value = flow_loss(model, part, takes_guidance(model)).item()
                loss += value * weight * (len(rows) / n)
    return runs.over_gpus(loss, device) / 8


def watcher(
    model: nn.Module, autoencoder: nn.Module, spec: Spec, pictures: Dataset, config
) -> Callable[[runs.Run], None]:
    """What a stage calls on the way: held-out loss to metrics.jsonl, pictures to previews/."""

    def watch(run: runs.Run) -> None:
        with run.averaged():
            run.log(held_out=held_out_loss(model, pictures, config, spec))
            if runs.rank() == 0:
                images, captions = sample.preview(model, autoencoder, spec, pictures)
                path = run.out / "previews" / f"{run.stage}-{run.step:06d}.png"
                sample.save_sheet(path, {f"{run.stage}, step {run.step}": images}, captions)
                run.show(images)
        runs.wait_for_all()

    return watch


def compare_autoencoders(
    pictures: Dataset, images: Tensor, old: nn.Module, new: nn.Module, path: Path
) -> dict[str, float]:
    """PSNR in dB of the first held-out `images` through both, and a sheet of their middles.

    What the new autoencoder loses no training brings back: look before hours of it.
    """
    rows = pictures.held_out[0][: len(images)]
    decoded = {
        "the base's autoencoder": sample.decode(old, pictures.base_latents[rows]).cpu(),
        "the new one": sample.decode(new, pictures.latents[rows]).cpu(),
    }
    size = [min(side, 512) for side in images.shape[2:]]
    columns = {name: sample.crop(c, size) for name, c in {"picture": images, **decoded}.items()}
    sample.save_sheet(path, columns, [pictures.captions[i] for i in pictures.caption[rows]])
    return {name: dcae.psnr(column.clamp(-1, 1), images) for name, column in decoded.items()}


# ---- main


def main() -> None:
    def defaults(model: str) -> dict:
        return {} if registry.describe(model).is_toy else LARGE

    config = parse_config(Config, __doc__, defaults=defaults)
    if config.ablation not in ("", "random"):
        raise UserError(f"--ablation {config.ablation!r}: wanted random")
    device = runs.start(config.device)
    config = replace(config, out=str(runs.folder_of(config)))
    parts = plan(config)
    with runs.locked(Path(config.out)):
        # Another's result is refused before anything is drawn.
        runs.is_done(Path(config.out, "align.safetensors"), config, {})
        align(config, config.data or drawn_by_base(config, *parts[:2], device), parts, device)
    runs.finish()


def drawn_by_base(config: Config, base_spec: Spec, spec: Spec, device: torch.device) -> str:
    """The folder of pictures that the base draws from --prompts. Those that are there stay.

    At the size that is trained, so that has to be one that the base can draw; else: --data.
    """
    folder, prompts = Path(config.out) / "drawn", config.prompts
    if not prompts and not spec.is_toy:
        raise UserError("--data and --prompts are missing: wanted pictures, or what is to be drawn")
    if not prompts:
        prompts = str(folder / "prompts.txt")
        lines = "\n".join(toy.prompts_of_all(config.scenes))
        runs.on_first(lambda: write_whole(Path(prompts), lambda file: file.write_text(lines)))
    dtype, size = runs.frozen_dtype(config.dtype, device, spec.is_toy), spec.size
    # A second-order solver needs half the calls of Euler for the same pictures: sample.py, eq. (5).
    spec = replace(base_spec, solver="ab2", steps=max(base_spec.steps // 2, 6))  # it wants 6
    at_once = 2**23 if device.type == "cuda" else 2**20  # pixels
    wanted = sample.Job(
        model=base_spec.transformer, prompts=prompts, size=f"{size}x{size}", out=str(folder),
        steps=spec.steps, guidance=spec.guidance, solver=spec.solver, weights=config.weights,
        adapter=config.adapter,
        batch_size=max(1, at_once // size**2), device=device.type, dtype=str(dtype)[6:],
        **jobs.digests_of(sample.open_parts(base_spec, config.weights), config.adapter),
    )  # fmt: skip
    drawn = runs.on_first(lambda: jobs.read_jobs(wanted))[runs.rank() :: runs.world()]
    if missing := [job for job in drawn if not jobs.is_made(job)]:
        sample.draw_list(wanted, spec, missing, device, dtype)
    runs.wait_for_all()
    return str(folder)


Plan = tuple[Spec, Spec, list[int], int, tuple[nn.Module, nn.Module, nn.Module]]


def plan(config: Config) -> Plan:
    """(Spec of the base, Spec of the new model, pixels a side that a token of each covers, stride
    of the new positions, base and both autoencoders on the meta device, where they take no memory).

    UserError: parts that do not fit, or a --model that is no base.
    """
    base_spec = registry.describe(config.model)
    if base_spec.stage not in ("", "merged"):
        raise UserError(
            f"--model {config.model} is a run of ours, which needs its base: wanted a full "
            f"model, such as the transformer that `python lora.py --export diffusers` writes"
        )
    if base_spec.schedule in ("anyflow", "schnell"):
        raise UserError(
            f"--model {config.model} is distilled to few steps, which flow matching would undo: "
            f"wanted the model that it was made of, or another of many steps"
        )
    name = config.autoencoder or DEEPER.get(base_spec.autoencoder)
    if not name:
        raise UserError(
            f"--autoencoder is missing: wanted the one that {config.model} moves to from "
            f"{base_spec.autoencoder}, one of {', '.join(dcae.PRESETS)}, or a path"
        )
    given = (config.model, "", config.weights, "meta")
    _, base, old = sample.load_pipeline(*given, adapters=config.adapter)
    new = sample.load_autoencoder(name, config.weights, "meta", torch.float32)
    size = config.resolution or base_spec.size
    pixels = [old.stride * base.patch_size, new.stride]
    runs.check_flags(config, size, pixels)
    if new.config["scaling_factor"] is None:
        raise UserError(
            f"{name} has no published scaling factor: wanted a folder of its weights, and in its "
            f"config.json 1 / the standard deviation of latents, which dcae.py prints of a picture"
        )
    spec = replace(base_spec, autoencoder=name, size=size, shift=config.shift or base_spec.shift)
    if spec.schedule == "flux":  # DC-Gen's own for these channels, a ratio for each size
        own = registry.describe(registry.DC_GEN.get(new.latent_channels, "flux-dev"))
        spec = replace(spec, schedule=own.schedule)
    # The toy's base knows one resolution: a new token sits amid the base tokens that it covers.
    # Official bases know many, and positions stay as they are, as in the paper: spread over 4096
    # pixels they would run to 254, and FLUX.1, trained up to 2 megapixels, knows some 90 a side.
    stride = max(pixels[1] // pixels[0], 1) if spec.is_toy else 1
    stride *= base.config.get("position_stride", 1)
    return base_spec, spec, pixels, stride, (base, old, new)


def align(config: Config, folder: str, parts: Plan, device: torch.device) -> None:
    """folder: of the pictures."""
    torch.manual_seed(config.seed)
    base_spec, spec, pixels, position_stride, (base, *autoencoders) = parts
    dtype, out = runs.frozen_dtype(config.dtype, device, spec.is_toy), Path(config.out)
    names = (base_spec.autoencoder, spec.autoencoder)
    encoders = [sample.latent_encoder(name, config.weights, device, dtype) for name in names]
    source = data.open_source(folder, spec.size, math.lcm(*pixels), out)
    check_disk(out, source, base, autoencoders, spec, dtype)
    pictures = data.prepare(source, encoders, spec, config, device, dtype)
    base_file, old_file = sample.open_parts(base_spec, config.weights)
    new_file, _ = sample.open_autoencoder(spec.autoencoder, config.weights)
    notes = dict(base_digest=base_file.digest, autoencoder_digest=new_file.digest)
    # What the progress files of this run are known by.
    notes["origin"] = data.digest(pictures.key, old_file.digest, *notes.values())
    pictures, saved = replace(pictures, key=notes["origin"]), out / "align.safetensors"
    if runs.is_done(saved, config, notes):
        return

    base = registry.load_transformer(base_spec, config.weights, device, dtype, config.adapter)
    base.requires_grad_(False)
    base.embedder.float()  # as the new one, which imitates it
    old, new = (sample.load_autoencoder(name, config.weights, device, dtype) for name in names)
    model = transplant(base, new.latent_channels, position_stride)
    choose_trained(model)
    runs.ready_blocks(model.blocks, device, spec.is_toy)
    tokens = [(spec.size // side) ** 2 for side in pixels]
    print(
        f"align | {config.model} -> {spec.autoencoder} | {tokens[0]} -> {tokens[1]} tokens | "
        f"{runs.memory(model, config)} | {len(pictures)} pictures | seed {config.seed} | {device}"
    )
    if runs.rank() == 0:
        images = source.images(pictures.held_out[0][:4].tolist()).cpu()
        psnr = compare_autoencoders(pictures, images, old, new, out / "autoencoders.png")

    # The head is zero: the embedder changes no loss until stage 2.
    losses = {"start": held_out_loss(model, pictures, config, spec)}
    if config.ablation != "random":
        solve_embedder(model, base, pictures, config)
    share = explained(model, base, pictures, config)
    train_head(model, pictures, config, spec, watcher(model, new, spec, pictures, config))
    losses["aligned"] = held_out_loss(model, pictures, config, spec)

    told = replace(config, data=placed(folder))
    notes |= runs.header(told, "align", spec, model, config.steps)
    runs.save_last(saved, trained(model), notes)
    if runs.rank() > 0:
        return
    models = {"base": (base_spec, base, old), "aligned": (spec, model, new)}
    scores, images, captions = sample.show_and_score(models, config.per_task, pictures)
    sample.save_sheet(out / "align.png", images, captions)
    files = [saved, out / "align.png", out / "autoencoders.png"]
    report(config, dict(
        stage="align", explained=share, held_out_loss=losses, reconstruction=psnr, scores=scores,
        tokens=tokens, files=[str(file) for file in files],
    ))  # fmt: skip
    runs.delete_progress(saved)


def check_disk(
    out: Path,
    source: data.ImageFolder,
    model: nn.Module,
    autoencoders: Sequence[nn.Module],
    spec: Spec,
    dtype: torch.dtype,
    trained: int = 0,  # parameters of which progress is saved
) -> None:
    """UserError: the disk does not hold the cache, of which nothing is there yet, and progress."""
    width = model.config.get("joint_attention_dim") or model.config["caption_channels"]
    text = 0 if spec.is_toy else width * (300 if spec.uses_cfg else 512)
    latents = sum(a.latent_channels * (spec.size // a.stride) ** 2 for a in autoencoders)
    cache = (len(source) * latents + len({*source.captions}) * text) * dtype.itemsize
    progress = (runs.KEPT + 1) * 16 * trained  # weight, two moments, moving average
    runs.check_room(
        out, progress + (0 if (out / "cache").exists() else cache), "cache and progress"
    )


def report(config: Config, figures: dict) -> None:
    """The tables for a person, and the last line for a program."""
    for name, value in figures["reconstruction"].items():
        print(f"held-out pictures through {name}: {value:.1f} dB")
    print(f"stage 1 explains {figures['explained']:.1%} of the pooled base embedding (held out)")
    losses = figures["held_out_loss"].items()
    print("held-out flow loss   " + "   ".join(f"{k} {v:.3f}" for k, v in losses))
    toy.print_scores(figures["scores"])
    print(f"\nsaved  {'  '.join(figures['files'])}")
    print(f"next   python lora.py {runs.same_flags(config)}")
    print(json.dumps(figures))


if __name__ == "__main__":
    exit_cleanly(main)
