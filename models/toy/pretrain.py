"""How the toy's weights were trained: three autoencoders, a guidance-distilled FLUX, a SANA.

What    python -m models.toy.pretrain flux-vae | dc-ae-f32c32 | dc-ae-f64c128 | flux | sana
        Each recipe writes one file of models/toy/ (flux: two, with its text encoder). The bases
        are trained on the latents of the autoencoders in models/toy/.
        python sample.py --model models/toy/flux.safetensors --score 50    # what it has learned
Differs The shipped weights were made by earlier, faster versions of these recipes, at the commits
        that README.md in this folder names: in bf16 as CUDA graphs, and the decoders were then
        trained alone for a while. These plain loops need more --seconds for the same quality.
"""

import copy
import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from dcae import DCAE
from models import script, toy, weights
from models.flux import Flux
from models.sana import QK_NORM, Sana
from models.text import ToyText
from models.vae import FluxVAE


def dcae_config(channels: int, widths: list[int], encoder: list[int], decoder: list[int]) -> dict:
    """Of latent channels, and each stage's width and numbers of blocks; without attention."""
    return dict(
        latent_channels=channels, upsample_block_type="interpolate", decoder_conv_act_fn="silu",
        encoder_block_out_channels=widths, decoder_block_out_channels=widths,
        encoder_layers_per_block=encoder, decoder_layers_per_block=decoder,
        encoder_qkv_multiscales=[[]] * len(widths), decoder_qkv_multiscales=[[]] * len(widths),
    )  # fmt: skip


F32 = ([16, 32, 64, 64, 128, 128], [0, 0, 1, 1, 1, 1], [0, 1, 1, 2, 2, 1])
F64 = ([16, 32, 64, 64, 64, 128, 128], [0, 0, 1, 1, 1, 1, 1], [0, 1, 1, 2, 1, 1, 1])
CONFIGS = {
    "flux-vae": dict(
        block_out_channels=[16, 32, 64, 64], layers_per_block=1, norm_num_groups=8,
        mid_block_add_attention=False, scaling_factor=1.0, shift_factor=0.0,
    ),
    "dc-ae-f32c32": dcae_config(32, *F32), "dc-ae-f64c128": dcae_config(128, *F64),
    "flux": dict(
        num_layers=1, num_single_layers=4, num_attention_heads=6, attention_head_dim=32,
        axes_dims_rope=[4, 14, 14], joint_attention_dim=128, pooled_projection_dim=128,
    ),
    "sana": dict(
        num_layers=4, num_attention_heads=4, num_cross_attention_heads=4, caption_channels=128,
        cross_attention_head_dim=32, cross_attention_dim=128, sample_size=4, qk_norm=QK_NORM,
    ),
}  # fmt: skip
WHITEN = 0.002  # weight of whitening_loss
NOISE = 0.3  # of the latent's standard deviation, at most, that is decoded too
LEVELS = {8: 1.2, 32: 0.7}  # mean logit of the timestep: f8 shows a layout through more noise


@dataclass(frozen=True)
class Config:
    what: str  # flux-vae, dc-ae-f32c32, dc-ae-f64c128, flux or sana
    seconds: float = 150  # of training
    last_seconds: float = 50  # then flux distils guidance
    batch: int = 256
    lr: float = 2e-3
    scenes: int = 400_000  # that the bases are trained on
    out: str = str(Path(__file__).parent)  # the folder to write to


def train(loss_fn: Callable, modules: list, seconds: float, lr: float) -> nn.ModuleList:
    """Minimise loss_fn(), which draws its own batch. Returns the modules with averaged weights."""
    modules = nn.ModuleList(modules)
    params = [p for p in modules.parameters() if p.requires_grad]
    averaged = AveragedModel(modules, multi_avg_fn=get_ema_multi_avg_fn(0.998))
    optimizer = torch.optim.AdamW(params, lr, betas=(0.9, 0.99), weight_decay=0.01, fused=True)
    start, steps, done = time.time(), 0, 0.0
    while done < 1:
        # Linear warm-up over 500 steps, then constant, then linear to zero over the last 40%.
        optimizer.param_groups[0]["lr"] = lr * min((steps + 1) / 500, 1.0, (1 - done) / 0.4)
        loss = loss_fn()
        optimizer.zero_grad()
        loss.backward()
        if nn.utils.clip_grad_norm_(params, 1.0).isfinite():  # else one batch would end it all
            optimizer.step()
            averaged.update_parameters(modules)
        steps += 1
        done = (time.time() - start) / seconds
        if steps % 1000 == 0:
            print(f"step {steps:6d} {done:4.0%} loss {loss.item():.4f}", flush=True)
    return averaged.module


def write(name: str, module: nn.Module, folder: str) -> None:
    tensors = {k: v.detach().half() for k, v in module.state_dict().items()}
    header = dict(config=json.dumps(module.config), command=" ".join(sys.argv))
    weights.save(Path(folder) / f"{name}.safetensors", tensors, header)


def whitening_loss(latents: Tensor) -> Tensor:
    """Distance of the latents' mean and channel covariance from 0 and 1 (after VICReg, 2105.04906).

    Without it most directions of a deep latent are nearly empty, and a transformer that has to
    read them amplifies noise. With too much of it no linear layer can read the code, and stage 1
    of align.py has nothing to align: at weight 0.05, f32 explains 18% of the base embedding.
    """
    tokens = latents.movedim(1, -1).flatten(0, 2)  # (B h w, C)
    centred = tokens - tokens.mean(0)
    off = centred.T @ centred / len(tokens) - torch.eye(tokens.shape[1], device=tokens.device)
    return off.square().sum() / tokens.shape[1] + tokens.mean(0).square().mean()


def make_autoencoder(config: Config, device: torch.device) -> None:
    """L1, five times heavier near edges, and squared error; of noisy, legible, white latents."""
    cls = FluxVAE if config.what == "flux-vae" else DCAE
    autoencoder = cls(**CONFIGS[config.what]).to(device)
    scenes = toy.on_device(toy.draw_scenes(200_000, seed=1), device)
    side = 2 if autoencoder.stride == 8 else 4
    probe = nn.Conv2d(autoencoder.latent_channels, 3 * side**2, 1).to(device)  # only for the loss

    def loss_fn() -> Tensor:
        rows = torch.randint(len(scenes["x"]), (config.batch,), device=device)
        images, edge = toy.render({k: v[rows] for k, v in scenes.items()})
        latents = autoencoder.encode(images)
        # A sampler's latents are slightly off: the decoder must bear that.
        level = NOISE * torch.rand(config.batch, 1, 1, 1, device=device)
        error = autoencoder.decode(latents + level * torch.randn_like(latents)) - images
        loss = (error.abs() * (1 + 4 * edge)).mean() + error.square().mean()
        # side x side mean colours under every token: a linear layer should be able to read them.
        colours = F.pixel_unshuffle(F.avg_pool2d(images, autoencoder.stride // side), side)
        return loss + F.mse_loss(probe(latents), colours) + WHITEN * whitening_loss(latents)

    autoencoder, _ = train(loss_fn, [autoencoder, probe], config.seconds, config.lr)
    write(config.what, autoencoder, config.out)
    unseen = toy.draw_scenes(256, seed=2)
    with torch.no_grad():
        images, _ = toy.render(toy.on_device(unseen, device))
        decoded = autoencoder.decode(autoencoder.encode(images)).clamp(-1, 1)
    psnr = -10 * ((decoded - images).square().mean((1, 2, 3)) / 4).log10()  # dB
    kept = toy.scenes_kept(unseen, decoded)  # share that the scorer reads back right
    print(json.dumps(dict(what=config.what, psnr=float(psnr.mean()), scenes_kept=kept)))


@torch.no_grad()
def encode_scenes(autoencoder: nn.Module, text: ToyText, config: Config) -> Callable:
    """A function: noisy latents, timestep, caption tokens (10% of them empty), velocity."""
    n, batch, device = config.scenes, config.batch, text.positions.device
    scenes, latents, level = toy.draw_scenes(n, seed=3), [], LEVELS[autoencoder.stride]
    for rows in np.array_split(np.arange(n), 1 + n // 1000):
        images, _ = toy.render(toy.on_device(scenes[rows], device))
        latents.append(autoencoder.encode(images))
    latents = torch.cat(latents)  # (n, C, h, w)
    tokens = text.tokenize([*toy.captions(scenes, 3), ""]).to(device)  # (n + 1, L)

    def draw() -> tuple[Tensor, ...]:
        rows = torch.randint(n, (batch,), device=device)
        clean, noise = latents[rows], torch.randn_like(latents[rows])
        timestep = torch.sigmoid(1.3 * torch.randn(batch, device=device) + level)
        t = timestep[:, None, None, None]
        dropped = torch.rand(batch, device=device) < 0.1
        words = tokens[torch.where(dropped, n, rows)]  # the last one is empty
        return (1 - t) * clean + t * noise, timestep, words, noise - clean

    return draw


def distill_guidance(flux: Flux, text: ToyText, draw: Callable, config: Config) -> Flux:
    """v(text, g) learns to be the teacher's v(null) + g (v(text) - v(null)), g in [1, 5].

    At first both ignore g. Errors count relative to g, or the largest g would dominate.
    """
    empty = text.tokenize([""] * config.batch).to(text.positions.device)
    teacher, one = copy.deepcopy(flux), torch.ones(config.batch, device=empty.device)
    flux.guidance_in.out_layer.weight.requires_grad_(True)

    def loss_fn() -> Tensor:
        noisy, timestep, words, _ = draw()
        g = 1 + 4 * torch.rand(config.batch, device=noisy.device)
        scale = g[:, None, None, None]
        with torch.no_grad():
            cond = text(words)
            without = teacher(noisy, timestep, *text(empty), one)
            target = without + scale * (teacher(noisy, timestep, *cond, one) - without)
        return ((flux(noisy, timestep, *cond, g) - target) / scale).square().mean()

    return train(loss_fn, [flux], config.last_seconds, config.lr / 3)[0]


def make_base(config: Config, device: torch.device) -> None:
    """FLUX and its text encoder; or SANA, which reads with the same encoder, frozen."""
    is_flux = config.what == "flux"
    if is_flux:
        autoencoder = FluxVAE.from_pretrained("flux-vae-toy", device)
        text = ToyText(toy.VOCABULARY, length=toy.LENGTH).to(device)
        model = Flux(**CONFIGS["flux"]).to(device)
        nn.init.zeros_(model.guidance_in.out_layer.weight).requires_grad_(False)  # g is ignored
    else:
        autoencoder = DCAE.from_pretrained("dc-ae-f32c32-toy", device)
        text = ToyText.from_pretrained("text-toy", device)
        model = Sana(**CONFIGS["sana"]).to(device)
        nn.init.zeros_(model.final_layer.linear.weight)
    draw = encode_scenes(autoencoder, text, config)
    one = torch.ones(config.batch, device=device)  # guidance 1: the conditional velocity itself

    def loss_fn() -> Tensor:
        noisy, timestep, words, velocity = draw()
        embeddings, pooled = text(words)
        cond = (embeddings, pooled, one) if is_flux else (embeddings, words != 0)
        return F.mse_loss(model(noisy, timestep, *cond), velocity)

    model, text = train(loss_fn, [model, text], config.seconds, config.lr)
    if is_flux:
        write("text", text, config.out)
        model = distill_guidance(model, text, draw, config)
    write(config.what, model, config.out)


def main() -> None:
    config = script.parse_config(Config, __doc__)
    if config.what not in CONFIGS:
        raise script.UserError(f"{config.what!r} is no recipe: wanted one of {', '.join(CONFIGS)}")
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("high")  # TF32
    make = make_base if config.what in ("flux", "sana") else make_autoencoder
    make(config, script.pick_device())


if __name__ == "__main__":
    script.exit_cleanly(main)
