"""Sampling: from noise to latents in a few steps of an ordinary differential equation.

What    Schedules (which noise levels to visit), solvers (how to step between them) and guidance.
Why     A flow-matching model predicts the velocity of a straight path between data and noise; an
        image is that path walked backwards. A deeply compressed latent has fewer tokens with more
        channels each, so it wants other noise levels than its base did: that is the shift below.
How     noisy = (1 - t) latents + t noise,   velocity = d noisy / dt = noise - latents         (1)
        t = r s / (1 + (r - 1) s)            s falls evenly from 1; r > 1 dwells in the noise  (2)
        Euler: noisy += (t_next - t) velocity                                                  (3)
        DPM-Solver++ 2M: the same path in log signal-to-noise, with a memory of one step       (4)
Source  FLUX.1 (mu of the token count), DC-Gen arXiv 2509.25180, SANA arXiv 2410.10629,
        DPM-Solver++ arXiv 2211.01095.
"""

import math
from itertools import pairwise

import torch
from torch import Tensor, nn
from tqdm import tqdm

# ---- schedule


def timesteps(
    steps: int,
    kind: str,
    tokens: int | None = None,
    channels: int | None = None,
    shift: float | None = None,
) -> Tensor:
    """The noise levels t to visit, (steps + 1,), from (nearly) 1 to 0: one formula, eq. (2).

    kind          even steps s                  shift ratio r
    "flux"        1 .. 1/steps                  exp(mu), mu linear in tokens: .5 at 256, 1.15 at 4096
    "dc-gen-1k"   1 .. 1/steps                  sqrt(tokens * channels / 4096)
    "schnell"     1 .. 1/steps                  1
    "sana-euler"  1 .. r-shifted 1/1000         shift, 3 unless given
    "sana-dpm"    0.999 .. 0                    shift, 3 unless given

    `shift` replaces r. `tokens` are what the transformer sees, `channels` the latent's.
    """
    assert steps >= 1, f"steps={steps}: at least one step is needed"
    even = torch.linspace(1, 1 / steps, steps, dtype=torch.float64)
    if kind == "flux":
        if shift is None:
            shift = math.exp(0.5 + (1.15 - 0.5) * (tokens - 256) / (4096 - 256))
    elif kind == "dc-gen-1k":
        shift = math.sqrt(tokens * channels / 4096) if shift is None else shift
    elif kind == "schnell":
        shift = 1.0 if shift is None else shift
    elif kind == "sana-euler":
        shift = 3.0 if shift is None else shift
        # SANA's scheduler shifts the ends of the range, spaces evenly, and shifts once more.
        even = torch.linspace(1, shifted(1 / 1000, shift), steps, dtype=torch.float64)
    elif kind == "sana-dpm":
        shift = 3.0 if shift is None else shift
        # Not from 1: there the log signal-to-noise ratio that DPM-Solver works in is -infinity.
        even = torch.linspace(0.999, 0, steps + 1, dtype=torch.float64)[:-1]
    else:
        raise ValueError(f"unknown schedule {kind!r}")
    return torch.cat([shifted(even, shift), torch.zeros(1)]).float()


def shifted(even: Tensor | float, ratio: float) -> Tensor | float:
    """eq. (2): multiplies the noise-to-signal ratio s / (1 - s) by `ratio`."""
    return ratio * even / (1 + (ratio - 1) * even)


def draw_noise(seeds: list[int], shape: tuple[int, int, int]) -> Tensor:
    """(B, C, h, w), one generator per image, always on the CPU: a seed is one noise everywhere."""
    generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
    return torch.stack([torch.randn(shape, generator=generator) for generator in generators])


# ---- solver


@torch.no_grad()
def sample(
    model: nn.Module,
    cond: tuple[Tensor, ...],
    noise: Tensor,
    sigmas: Tensor,
    guidance: float | None,
    null_cond: tuple[Tensor, ...] | None = None,
    solver: str = "euler",
    progress: tqdm | None = None,
) -> Tensor:
    """Latents (B, C, h, w) fp32 from noise (B, C, h, w), conditioning and a schedule.

    With `null_cond` every step runs the model twice and `guidance` extrapolates between the two
    (classifier-free guidance). Without it `guidance` is an input of the model (FLUX was distilled
    to take it), or None for a model that has no such input.
    """
    levels, lambdas = sigmas.tolist(), log_snr(sigmas).tolist()
    noisy_latents = noise.float()
    previous = None  # the clean latents that the step before predicted
    for i, (now, then) in enumerate(pairwise(levels)):
        # SANA was trained on whole timesteps of 0..1000; its DPM-Solver truncates to them. (3e-5:
        # what fp32 levels may lose; it keeps 750 from becoming 749.)
        timestep = int(1000 * now + 3e-5) / 1000 if solver == "dpm" else now
        velocity = predict(model, noisy_latents, timestep, cond, guidance, null_cond)
        if solver == "euler":
            noisy_latents = noisy_latents + (then - now) * velocity  # eq. (3)
        else:
            latents = noisy_latents - now * velocity
            estimate = latents
            # First order at both ends: no memory yet; and at t = 0 lambda is infinite.
            if 0 < i < len(levels) - 2:
                ratio = (lambdas[i + 1] - lambdas[i]) / (lambdas[i] - lambdas[i - 1])
                estimate = latents + ratio / 2 * (latents - previous)
            # eq. (4): alpha (1 - exp(-h)) written without lambda, so that t = 0 gives `estimate`.
            weight = (1 - then) - (1 - now) * then / now
            noisy_latents = then / now * noisy_latents + weight * estimate
            previous = latents
        if progress is not None:
            progress.update()
    return noisy_latents


def log_snr(sigmas: Tensor) -> Tensor:
    """lambda = log((1 - t) / t), in fp64: -infinity at t = 1, +infinity at t = 0."""
    sigmas = sigmas.double()
    return torch.log(1 - sigmas) - torch.log(sigmas)


def predict(
    model: nn.Module,
    noisy_latents: Tensor,
    timestep: float,
    cond: tuple[Tensor, ...],
    guidance: float | None,
    null_cond: tuple[Tensor, ...] | None,
) -> Tensor:
    """One guided velocity (B, C, h, w) in fp32: v(null) + guidance (v(cond) - v(null))."""
    batch, device = len(noisy_latents), noisy_latents.device
    dtype = next((c.dtype for c in cond), noisy_latents.dtype)  # the text is in the model's
    if null_cond is None:
        t = torch.full((batch,), timestep, device=device)
        scale = () if guidance is None else (torch.full((batch,), guidance, device=device),)
        return model(noisy_latents.to(dtype), t, *cond, *scale).float()
    t = torch.full((2 * batch,), timestep, device=device)
    both = [torch.cat(pair) for pair in zip(null_cond, cond)]
    doubled = torch.cat([noisy_latents, noisy_latents]).to(dtype)  # (2B, C, h, w)
    without, with_text = model(doubled, t, *both).float().chunk(2)
    return without + guidance * (with_text - without)
