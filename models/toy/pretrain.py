"""How the toy's weights were trained: autoencoders, a FLUX whose guidance is distilled, a SANA.

What    python -m models.toy.pretrain flux-vae | dc-ae-f32c32 | dc-ae-f64c128 | flux | sana | score
        Every file in models/toy/ but those of align.py and lora.py is made by one of these, on a
        GPU in minutes; torchrun --nproc-per-node 4 -m models.pretrain flux on several.
Why     Small instances of the real classes, good enough that what DC-Gen does to them is seen.
How     Scenes are rendered on the GPU as they are needed. Every loop is `train`: AdamW in captured
        graphs, for a given time; the weights kept are their moving average.
"""

import argparse
import copy
import json
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from dcae import DCAE
from models import runs, script, weights
from models.flux import Flux, sinusoid
from models.sana import QK_NORM, Sana
from models.text import SanaToyText, ToyText
from models.toy import (
    LENGTH,
    VOCABULARY,
    captions,
    draw_prompts,
    draw_scenes,
    evaluate,
    on_device,
    render,
    scenes_kept,
)
from models.vae import FluxVAE
from sample import MODELS

HERE = Path(__file__).parent


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
    differentiate, update = (runs.captured(step) for step in (differentiate, update))
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
    device = script.pick_device()
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
    "text": dict(vocabulary=VOCABULARY, width=128, layers=2, heads=4, length=LENGTH),
}  # fmt: skip


def write(name: str, module: nn.Module, folder: Path) -> None:
    tensors = {k: v.detach().half().cpu().contiguous() for k, v in module.state_dict().items()}
    header = dict(
        config=json.dumps(CONFIGS[name]),
        command="python -m models.toy.pretrain " + " ".join(sys.argv[1:]),
    )
    weights.save(folder / f"{name}.safetensors", tensors, header)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    kinds = ["flux-vae", "dc-ae-f32c32", "dc-ae-f64c128", "flux", "sana", "score"]
    parser.add_argument("what", choices=kinds, help="score: all that is in --out")
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
    parser.add_argument("--per-task", type=int, default=50, help="prompts of each task to score by")
    parser.add_argument("--out", type=Path, default=HERE)
    args = parser.parse_args()
    if "WORLD_SIZE" in os.environ:  # torchrun --nproc-per-node 4 -m models.pretrain flux
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
    if args.what in ("flux", "sana", "score") and is_first():
        print_scores(args)
    if dist.is_initialized():
        dist.destroy_process_group()


def make_base(args) -> None:
    device = script.pick_device()
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
    device = script.pick_device()
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
    device = script.pick_device()
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


if __name__ == "__main__":
    script.exit_cleanly(main)
