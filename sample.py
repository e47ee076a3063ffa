"""Sampling: from a prompt and a seed to a picture, along a differential equation.

What    python sample.py --prompt "a red circle left of a blue square"
        Schedules (which noise levels to visit), solvers (how to step between them), guidance, and
        the way from text to PNG. A PNG carries its recipe, and --from x.png repeats it.
Why     A flow-matching model predicts the velocity of a straight path between data and noise; an
        image is that path walked backwards. A deeply compressed latent has fewer tokens of more
        channels than its base, and needs other noise levels: that is the shift below.
How     noisy = (1 - t) latents + t noise,   velocity = d noisy / dt = noise - latents         (1)
        t = r s / (1 + (r - 1) s)            s falls evenly from 1; r > 1 dwells in the noise  (2)
        Euler: noisy += (t_next - t) velocity                                                  (3)
        DPM-Solver++ 2M: the same path in log signal-to-noise, with a memory of one step       (4)
        Adams-Bashforth 2: noisy += h (velocity + h / (2 h_last) (velocity - last velocity))   (5)
        h is the step in t; (5) is of second order at one call a step, as (4) is.
Cost    steps x one call of the transformer (two for SANA's guidance), and one decode. On a GPU:
        fused kernels (models/kernels.py), what the steps share computed once, a CUDA graph.
Source  FLUX.1 (mu of the token count), DC-Gen arXiv 2509.25180, SANA arXiv 2410.10629,
        DPM-Solver++ arXiv 2211.01095, FlashAttention-2 arXiv 2307.08691.
Differs Sizes that the latent grid cannot hold are padded and cropped back, where diffusers rounds.
        Noise is drawn on the CPU, one generator a picture: a seed here is another seed there.
"""

import functools
import json
import math
import re
import shlex
import sys
import textwrap
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor, nn
from tqdm import tqdm

import dcae
from models import data, flux, hub, jobs, kernels, runs, sana, text, toy, vae, weights
from models.identity import placed
from models.kernels import describe_tiles, jit, tl, triton
from models.registry import MODELS, Spec, describe, load_transformer, open_run
from models.script import Files, UserError, exit_cleanly, parse_config, pick_device, pick_dtype
from models.text import Cond
from models.weights import Device


@dataclass(frozen=True)
class Config:
    model: str = "flux-toy"  # a name, a diffusers pipeline (folder or hub id), weights, a run
    prompt: str = "a red circle left of a blue square"
    prompts: str = ""  # a .txt (a prompt a line) or .jsonl file ("prompt", "seed"); writes captions
    negative_prompt: str = ""  # SANA only: what to steer away from
    size: str = ""  # WxH in pixels, any; "": the model's own
    steps: int | None = None  # the model's own unless given
    guidance: float | None = None  # the model's own unless given
    solver: str = ""  # euler | ab2 | dpm; "": the model's own
    seed: int = 0  # of the first prompt; each next one has the next seed
    batch_size: int = 1  # 1: a picture is the same, to the bit, alone or among others
    autoencoder: str = ""  # "": the model's own; a preset or a path
    adapter: Files = ""  # FILE[:scale], a LoRA of the model or of its base; may be repeated
    weights: str = ""  # a folder to look in instead of the hub
    out: str = "samples"  # a folder; or one .png
    from_: str = ""  # a PNG to repeat, or the .latents.safetensors of a decode that failed
    score: int = 0  # toy models, instead of pictures: the score of so many prompts a task
    attention: str = ""  # torch | triton; "": torch, which on Hopper is cuDNN
    fast: bool = True  # on CUDA: fused kernels, nothing done twice, a CUDA graph; the same picture
    fp8: bool = False  # linear layers in e4m3: faster, lossy; SANA's convolutions stay in 16 bits
    compile: bool = False  # on CUDA: torch.compile instead of our kernels, half a minute once; SANA
    device: str = ""  # "": cuda, then mps, then cpu
    dtype: str = ""  # of the weights: fp32, bf16, fp16; "": fp32 on the CPU and for toys, else bf16


@dataclass(frozen=True)
class Job(Config):
    """One picture: its flags, and which files the names in them stood for."""

    model_digest: str = ""  # of weights.Checkpoint
    autoencoder_digest: str = ""


TEXTS = 4096  # prompts whose encoded text is held in memory: FLUX's takes 4 MiB each


# ---- schedule

# The ratio r of eq. (2) by kind of schedule.
RATIOS = {
    # exp(mu), where mu is linear: 0.5 at 256 tokens, 1.15 at 4096
    "flux": lambda n, c: math.exp(0.5 + (1.15 - 0.5) * (n - 256) / (4096 - 256)),
    "dc-gen-1k": lambda n, c: math.sqrt(n * c / 4096),
    "schnell": lambda n, c: 1.0,
    "anyflow": lambda n, c: 3.0,
    "sana-euler": lambda n, c: 3.0,
    "sana-dpm": lambda n, c: 3.0,
}


def timesteps(
    steps: int,
    kind: str,
    tokens: int | None = None,
    channels: int | None = None,
    shift: float | None = None,
) -> Tensor:
    """The noise levels t to visit, (steps + 1,), from (nearly) 1 to 0: one formula, eq. (2).

    `shift` replaces r. `tokens` are what the transformer sees, `channels` the latent's.
    """
    assert steps >= 1, f"steps={steps}: at least one step is needed"
    if kind not in RATIOS:
        raise ValueError(f"unknown schedule {kind!r}")
    ratio = RATIOS[kind](tokens, channels) if shift is None else shift
    last = 1 / steps
    if kind == "sana-euler":
        # SANA's scheduler shifts the ends of the range, spaces evenly, and shifts once more.
        last = shifted(1 / 1000, ratio)
    even = torch.linspace(1, last, steps, dtype=torch.float64)
    if kind == "sana-dpm":
        # Not from 1: there the log signal-to-noise ratio that DPM-Solver works in is -infinity.
        even = torch.linspace(0.999, 0, steps + 1, dtype=torch.float64)[:-1]
    return torch.cat([shifted(even, ratio), torch.zeros(1)]).float()


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
    cond: Cond,
    noise: Tensor,
    sigmas: Tensor,
    guidance: float | None,
    null_cond: Cond | None = None,
    solver: str = "euler",
    progress: tqdm | None = None,
    stepper: "Stepper | None" = None,
) -> Tensor:
    """Latents (B, C, h, w) fp32 from noise (B, C, h, w), conditioning and a schedule.

    With `null_cond` every step runs the model twice, and `guidance` extrapolates between the two
    (classifier-free guidance). Without it `guidance` is an input of the model (FLUX was distilled
    to take it), or None for a model that has no such input. A `stepper` of this model does the
    same faster.
    """
    levels, noisy_latents, is_dpm = sigmas.tolist(), noise.float(), solver == "dpm"
    # SANA was trained on whole timesteps of 0..1000; its DPM-Solver truncates to them. (3e-5: what
    # fp32 levels may lose; it keeps 750 from becoming 749.)
    inputs = [int(1000 * t + 3e-5) / 1000 if is_dpm else t for t in levels[:-1]]
    # A flow map (AnyFlow) is told where the step ends, and steps there exactly.
    is_map = isinstance(model, flux.Flux) and model.config["gate_value"] is not None
    ends = levels[1:] if is_map else None
    check_solver(solver, len(inputs), is_map)
    memory, previous = last_weights(sigmas, is_dpm), noisy_latents
    if stepper is not None:
        stepper.start(inputs, noisy_latents, cond, guidance, null_cond, ends)
    for i, (now, then) in enumerate(pairwise(levels)):
        if stepper is None:
            given = (cond, guidance, null_cond, ends[i] if is_map else None)
            velocity = predict(model, noisy_latents, inputs[i], *given)
        else:
            velocity = stepper(i, noisy_latents)
        if is_dpm:  # eq. (4): alpha (1 - exp(-h)) without lambda, which is infinite at t = 0
            latents = noisy_latents - now * velocity  # eq. (1): the data as predicted here
            estimate = latents + memory[i] * (latents - previous)
            weight = (1 - then) - (1 - now) * then / now
            noisy_latents = then / now * noisy_latents + weight * estimate
            previous = latents
        else:
            mean = velocity  # of the step, eq. (3)
            if solver == "ab2":  # eq. (5)
                mean = velocity + memory[i] * (velocity - previous)
                previous = velocity.clone()  # the next replay of a stepper writes over it
            noisy_latents = noisy_latents + (then - now) * mean
        if progress is not None:
            progress.update()
    return noisy_latents


def check_solver(solver: str, steps: int, is_map: bool) -> None:
    if is_map and solver != "euler":
        raise UserError(f"--solver {solver} on a flow map, which steps exactly: wanted euler")
    if solver not in ("euler", "ab2", "dpm"):
        raise UserError(f"--solver {solver}: wanted euler, ab2 or dpm")
    if solver == "ab2" and steps < 6:  # its first step is Euler's, and its error stays
        raise UserError(f"--solver ab2 in {steps} steps: wanted 6 or more, or euler")


def last_weights(sigmas: Tensor, is_dpm: bool) -> list[float]:
    """By step: how much of the last change eq. (4) and (5) add, h / (2 h of the last), in fp64.

    h is the step in t, and for DPM-Solver++ 2M in lambda = log((1 - t) / t). Where no last step is
    and where lambda is infinite (t = 0) they are of first order.
    """
    levels = sigmas.double()
    h = (torch.log(1 - levels) - torch.log(levels) if is_dpm else levels).diff()
    shares = [0.0, *(h[1:] / h[:-1] / 2).tolist()]
    return [*shares[:-1], 0.0] if is_dpm else shares


def predict(
    model: nn.Module,
    noisy_latents: Tensor,
    timestep: float | Tensor,
    cond: Cond,
    guidance: float | None,
    null_cond: Cond | None,
    end: float | Tensor | None = None,  # of a flow map: the time where the step ends
) -> Tensor:
    """One guided velocity (B, C, h, w) in fp32: v(null) + guidance (v(cond) - v(null))."""
    batch, device = len(noisy_latents), noisy_latents.device
    t = torch.as_tensor(timestep, dtype=torch.float32, device=device)
    if null_cond is None:
        scale = () if guidance is None else (torch.full((batch,), guidance, device=device),)
        if end is not None:
            end = torch.as_tensor(end, dtype=torch.float32, device=device)
            scale = (*scale, end.expand(batch))
        return model(noisy_latents, t.expand(batch), *cond, *scale).float()
    both = [torch.cat(pair) for pair in zip(null_cond, cond)]
    doubled = torch.cat([noisy_latents, noisy_latents])  # (2B, C, h, w)
    without, with_text = model(doubled, t.expand(2 * batch), *both).float().chunk(2)
    return without + guidance * (with_text - without)


# ---- attention

LOG2_E = math.log2(math.e)


def attention(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None) -> Tensor:
    """softmax(q k^T / sqrt(hd) + mask) v, in fp32, for q (B, nh, N, hd) and k, v (B, nh, L, hd).

    `attn_mask` (B, 1, 1, L) is added to the logits; if it is boolean, False is a padded key.
    """
    logits = q.float() @ k.float().mT / math.sqrt(q.shape[-1])  # (B, nh, N, L)
    if attn_mask is not None:
        logits = logits + additive(attn_mask)
    return (logits.softmax(-1) @ v.float()).type_as(q)  # (B, nh, N, hd)


def additive(mask: Tensor) -> Tensor:
    """A boolean mask as what to add to a logit: log 1 = 0, log 0 = -inf."""
    return mask.float().log() if mask.dtype == torch.bool else mask.float()


@jit
def attention_kernel(
    q, k, v, out,  # descriptors of (B, nh, N or L, hd), cut into (1, 1, BLOCK, BLOCK_D)
    bias, bias_stride,  # fp32 (B, L), log2(e) times what is added to a logit
    keys, heads, scale,  # scale: log2(e) / sqrt(hd), as the hardware's exponential is 2^x
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    RAGGED: tl.constexpr,  # the last block of keys is not full
    STAGES: tl.constexpr,  # blocks of k and v in flight
):  # fmt: skip
    """A program owns BLOCK_M queries of one head and walks over the keys, BLOCK_N at a time:

    for k, v in blocks:
        logits = q k^T scale + bias                (BLOCK_M, BLOCK_N): never leaves the chip
        row_max, old = max(row_max, max of logits), row_max
        p = 2^(logits - row_max)                   of the largest logit so far: no overflow
        rescale = 2^(old - row_max)                what was summed before shrinks accordingly
        row_sum = row_sum rescale + sum of p
        acc = acc rescale + p v
    out = acc / row_sum

    Descriptors (TMA from sm_90 on) read zeros beyond the ends and write nothing there.
    """
    start = tl.program_id(0) * BLOCK_M
    batch, head = tl.program_id(1) // heads, tl.program_id(1) % heads
    queries = q.load([batch, head, start, 0]).reshape([BLOCK_M, BLOCK_D])
    row_max = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    row_sum = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for first in tl.range(0, keys, BLOCK_N, num_stages=STAGES):
        block = k.load([batch, head, first, 0]).reshape([BLOCK_N, BLOCK_D])
        logits = tl.dot(queries, block.T) * scale
        columns = first + tl.arange(0, BLOCK_N)
        if HAS_BIAS:
            added = tl.load(bias + batch * bias_stride + columns, columns < keys, 0.0)
            logits += added[None, :]
        if RAGGED:
            logits = tl.where((columns < keys)[None, :], logits, float("-inf"))
        old, row_max = row_max, tl.maximum(row_max, tl.max(logits, 1))
        base = row_max
        if HAS_BIAS:  # all padding so far: -inf - -inf is no number
            base = tl.where(row_max == float("-inf"), 0.0, row_max)
        p = tl.math.exp2(logits - base[:, None])
        rescale = tl.math.exp2(old - base)
        row_sum = row_sum * rescale + tl.sum(p, 1)
        block = v.load([batch, head, first, 0]).reshape([BLOCK_N, BLOCK_D])
        acc = tl.dot(p.to(block.dtype), block, acc * rescale[:, None])
    acc = acc / tl.where(row_sum == 0.0, 1.0, row_sum)[:, None]  # 0: every key is padding
    out.store([batch, head, start, 0], acc.to(out.dtype).reshape([1, 1, BLOCK_M, BLOCK_D]))


# BLOCK_M, BLOCK_N, warps, stages, registers a thread at most.
TILE = (128, 64, 8, 2, None)
# Two programs to a multiprocessor: the tensor cores serve one while the other takes exponents.
HOPPER_TILE = (128, 64, 8, 2, 128)


def triton_attention(
    q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, tile: tuple | None = None
) -> Tensor:
    """`attention` by the kernel, for hd <= 128; views into a joint qkv need no copy."""
    (batch, heads, queries, head_dim), keys = q.shape, k.shape[2]
    assert k.shape == v.shape == (batch, heads, keys, head_dim) and head_dim <= 128, (
        f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}: "
        f"wanted (B, nh, N, hd) and twice (B, nh, L, hd), hd <= 128"
    )
    is_hopper = q.is_cuda and torch.cuda.get_device_capability(q.device)[0] == 9
    block_m, block_n, warps, stages, registers = tile or (HOPPER_TILE if is_hopper else TILE)
    block_d = max(triton.next_power_of_2(head_dim), 16)
    bias, bias_stride = q, 0  # not read
    if attn_mask is not None:
        assert attn_mask.shape[1:] == (1, 1, keys), f"mask {tuple(attn_mask.shape)}: (B, 1, 1, L)"
        bias = (additive(attn_mask).flatten(1) * LOG2_E).contiguous()  # (B, L)
        bias_stride = keys if len(bias) > 1 else 0
    # Heads side by side in a row, so that joining them is a view.
    out = q.new_empty(batch, queries, heads, head_dim).transpose(1, 2)
    cut = {"q": (q, block_m), "k": (k, block_n), "v": (v, block_n), "out": (out, block_m)}
    described = {name: describe_tiles(t, [1, 1, n, block_d]) for name, (t, n) in cut.items()}
    attention_kernel[(triton.cdiv(queries, block_m), batch * heads)](
        **described, bias=bias, bias_stride=bias_stride, keys=keys, heads=heads,
        scale=LOG2_E / math.sqrt(head_dim), BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_D=block_d,
        HAS_BIAS=attn_mask is not None, RAGGED=keys % block_n > 0, STAGES=stages,
        num_warps=warps, maxnreg=registers,
    )  # fmt: skip
    return out


def pick_attention(name: str, device: torch.device, dtype: torch.dtype) -> tuple[str, Callable]:
    """The name, torch or triton, and the function. torch is the default: cuDNN on Hopper."""
    if name in ("", "torch"):
        return "torch", F.scaled_dot_product_attention
    usable = name == "triton" and kernels.runs_on(device)
    if usable and not kernels.INTERPRETED:  # TMA begins with sm_90; tensor cores take 16 bits
        usable = torch.cuda.get_device_capability(device) >= (9, 0) and dtype != torch.float32
    if not usable:
        raise UserError(
            f"--attention {name} on {device} in {dtype}: wanted torch or triton; triton needs "
            f"an NVIDIA GPU from sm_90 on, and --dtype bf16 or fp16"
        )
    return name, triton_attention


# ---- speed


class Stepper:
    """`predict`, step after step, with nothing computed twice.

    hoist   The outputs of modules that no noise reaches are computed before the first step: the
            text's projections and, for all steps in one pass over their weights (a quarter of
            FLUX), the modulations. During a step these modules return the result. Lossless.
    graph   The step is recorded once as a CUDA graph and replayed: one launch instead of a
            thousand, the same kernels on the same memory. Bit-identical.
    """

    def __init__(self, model: nn.Module, hoist: bool = True, graph: bool = True):
        self.model, self.hoist, self.graph = model, hoist, graph
        self.signature = self.recorded = None
        self.per_step: dict[nn.Module, Tensor] = {}  # a module's outputs, (S, ...)
        self.buffers: dict[nn.Module, Tensor] = {}  # its output in the present step

    def start(
        self,
        timesteps: list[float],
        noise: Tensor,
        cond: Cond,
        guidance: float | None,
        null_cond: Cond | None,
        ends: Sequence[float] | None = None,  # of a flow map: the time where each step ends
    ) -> None:
        """Get ready for a batch of pictures; the next one of its shapes replays the same graph."""
        given, is_map = [*cond, *(null_cond or ())], ends is not None
        signature = [self.model.attention, next(self.model.parameters()).dtype, guidance, is_map]
        signature += [len(cond), noise.shape, *((t.shape, t.dtype) for t in given)]
        if signature != self.signature:
            self.buffers, self.recorded, self.signature = {}, None, signature
            self.timestep, self.noisy = noise.new_zeros(()), noise.clone()
            self.end = noise.new_zeros(()) if is_map else None
            self.given = [tensor.clone() for tensor in given]
        torch._foreach_copy_(self.given, given)
        words, null = tuple(self.given[: len(cond)]), tuple(self.given[len(cond) :])
        self.timesteps, self.ends = timesteps, ends
        self.conditions = (words, guidance, null or None, self.end)
        if not self.hoist:
            return
        both = [torch.cat(pair) for pair in zip(null_cond, cond)] if null_cond else cond
        constants, self.per_step = precompute(self.model, noise, timesteps, both, guidance, ends)
        for module, value in (constants | {m: v[0] for m, v in self.per_step.items()}).items():
            self.buffers.setdefault(module, torch.empty_like(value)).copy_(value)

    def __call__(self, step: int, noisy_latents: Tensor) -> Tensor:
        """The velocity (B, C, h, w) of a step. The next call overwrites it."""
        self.timestep.fill_(self.timesteps[step])
        self.noisy.copy_(noisy_latents)
        if self.end is not None:
            self.end.fill_(self.ends[step])
        if rows := [outputs[step] for outputs in self.per_step.values()]:
            torch._foreach_copy_([self.buffers[module] for module in self.per_step], rows)
        is_warm = self.recorded is not None or step > 0  # kernels compile, libraries wake first
        if not (self.graph and noisy_latents.is_cuda and is_warm):
            return self.run()
        if self.recorded is None:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                self.velocity = self.run()
            self.recorded = graph  # not earlier: a capture may run out of memory
        self.recorded.replay()
        return self.velocity

    def run(self) -> Tensor:
        for module, buffer in self.buffers.items():
            module.forward = lambda *_, buffer=buffer: buffer
        try:
            return predict(self.model, self.noisy, self.timestep, *self.conditions)
        finally:  # the model is as it was, for other steppers and for those who have none
            for module in self.buffers:
                del module.forward


def precompute(
    model: nn.Module,
    noise: Tensor,
    timesteps: list[float],
    cond: Cond,
    guidance: float | None,
    ends: Sequence[float] | None,
) -> tuple[dict[nn.Module, Tensor], dict[nn.Module, Tensor]]:
    """Outputs of modules that no noise reaches, by module: those that all steps share, and those
    that follow the timestep, (S, ...)."""
    steps, batch, parameter = len(timesteps), len(cond[0]), next(model.parameters())
    device, dtype = parameter.device, parameter.dtype
    levels = torch.tensor(timesteps, device=device)[:, None].expand(-1, batch)  # (S, B)
    grid = (noise.shape[2] // model.patch_size, noise.shape[3] // model.patch_size)
    if isinstance(model, flux.Flux):
        text, pooled = (tensor.to(dtype) for tensor in cond)
        scale = None if guidance is None else torch.full((steps * batch,), guidance, device=device)
        end = None
        if ends is not None:
            end = torch.tensor(ends, device=device).repeat_interleave(batch)  # (S B,)
        pooled = pooled.repeat(steps, 1)
        conditions = model.condition(levels.flatten(), scale, pooled, end)  # (S B, D)
        conditions = conditions.unflatten(0, (steps, batch))
        layers = [m.lin for m in model.modules() if isinstance(m, flux.Modulation)]
        layers.append(model.final_layer.adaLN_modulation[1])
        rope = model.pe_embedder(text.shape[1], grid, device)
        constants = {model.txt_in: model.txt_in(text), model.pe_embedder: rope}
        return constants, {lin: lin(conditions) for lin in layers}
    text = model.attention_y_norm(model.y_embedder(cond[0].to(dtype)))  # (B, L, D)
    constants = {model.y_embedder: text, model.attention_y_norm: text}
    for block in model.blocks:
        constants[block.cross_attn.kv_linear] = block.cross_attn.kv_linear(text)
    if model.pos_embedder is not None:
        constants[model.pos_embedder] = model.pos_embedder(grid, device)
    sinusoids = [sana.sinusoid(sana.thousandths(t)).to(dtype) for t in levels]
    embedded = model.t_embedder(torch.stack(sinusoids))  # (S, B, D)
    return constants, {model.t_embedder: embedded, model.t_block: model.t_block(embedded)}


def speed_up(transformer: nn.Module, compiled: bool = False) -> Stepper:
    """What `sample` steps with, on a CUDA device: with fused kernels, or by torch's compiler."""
    if compiled:
        for block in transformer.blocks:  # those of a kind are compiled once
            block.compile(dynamic=False)
    elif kernels.runs_on(next(transformer.parameters()).device):
        kernels.fuse(transformer)
    return Stepper(transformer)


def speed_up_decoder(autoencoder: nn.Module) -> None:
    """Fused kernels for a DC-AE on a CUDA device. They compile here, on a few latents."""
    parameter = next(autoencoder.parameters())
    if isinstance(autoencoder, dcae.DCAE) and kernels.runs_on(parameter.device):
        kernels.fuse(autoencoder)
        # What they read. Not for FLUX's autoencoder: torch's GroupNorm leaves this layout, and the
        # next convolution comes back to it.
        autoencoder.to(memory_format=torch.channels_last)
    with torch.cuda.device_of(parameter):  # every thread has its own current device
        decode(autoencoder, torch.zeros(1, autoencoder.latent_channels, 4, 4))


# ---- pipeline


def load_pipeline(
    model: str,
    autoencoder: str = "",
    folder: str = "",
    device: Device = "cpu",
    dtype: torch.dtype = torch.float32,
    adapters: str = "",
) -> tuple[Spec, nn.Module, nn.Module]:
    """The spec, the transformer and the autoencoder. Encode text first: it needs the room."""
    spec = describe(model, autoencoder)
    open_parts(spec, folder)
    transformer = load_transformer(spec, folder, device, dtype, adapters)
    decoder = load_autoencoder(spec.autoencoder, folder, device, dtype)
    if decoder.config["scaling_factor"] is None:
        raise UserError(f"{spec.autoencoder} has no scaling_factor in its config: wanted a number")
    if transformer.latent_channels != decoder.latent_channels:
        raise UserError(
            f"{model} makes latents of {transformer.latent_channels} channels, and "
            f"{spec.autoencoder} reads {decoder.latent_channels}: wanted another --autoencoder"
        )
    return spec, transformer, decoder


def open_parts(spec: Spec, folder: str) -> tuple[weights.Checkpoint, weights.Checkpoint]:
    """The files of the transformer and of the autoencoder.

    UserError: the latter is not the one that a run was trained with.
    """
    model, (autoencoder, _) = open_run(spec, folder), open_autoencoder(spec.autoencoder, folder)
    told = model.metadata | (model.config or {}).get("_dc_gen", {})
    is_own = placed(told.get("autoencoder", "")) == spec.autoencoder
    if is_own and told.get("autoencoder_digest", autoencoder.digest) != autoencoder.digest:
        raise UserError(
            f"{spec.autoencoder} is not the file that {spec.transformer} was trained with: put "
            f"that back, or name it by --autoencoder"
        )
    return model, autoencoder


def open_autoencoder(source: str, folder: str) -> tuple[weights.Checkpoint, dict | None]:
    """Its opened files, and the config of the preset if it is one."""
    path, config = hub.locate(source, dcae.PRESETS | vae.PRESETS, folder or None, "vae")
    return weights.open_checkpoint(path, "vae"), config


def load_autoencoder(source: str, folder: str, device: Device, dtype: torch.dtype) -> nn.Module:
    """A DCAE or a FluxVAE: the tensor names say which."""
    names = open_autoencoder(source, folder)[0].shapes
    is_vae = any(re.match(r"encoder\.(down\.0\.block|down_blocks\.0\.resnets)\.", n) for n in names)
    cls = vae.FluxVAE if is_vae else dcae.DCAE
    # fp16 ends at 65504, and activations of these decoders pass it.
    dtype = torch.float32 if dtype == torch.float16 else dtype
    return cls.from_pretrained(source, device, dtype, weights=folder or None)


def latent_encoder(source: str, folder: str, device: Device, dtype: torch.dtype) -> data.Encoder:
    """An autoencoder for the latent cache, which loads it only if there is work for it."""
    checkpoint, config = open_autoencoder(source, folder)
    key = data.digest(checkpoint.digest, checkpoint.config or config)

    def load() -> Callable[[Tensor], Tensor]:
        return functools.partial(encode, load_autoencoder(source, folder, device, dtype))

    return key, load


@torch.no_grad()
def encode(autoencoder: nn.Module, images: Tensor) -> Tensor:
    """Images (B, 3, H, W) -> latents (B, C, h, w); in tiles if memory is short, as `decode`."""
    tiled = functools.partial(dcae.tiled_encode, autoencoder)
    return whole_or_tiled(autoencoder.encode, tiled, images, images[0, 0].numel())


def whole_or_tiled(
    whole: Callable[[Tensor], Tensor], tiled: Callable[[Tensor], Tensor], some: Tensor, pixels: int
) -> Tensor:
    """whole(some); where memory does not hold pictures of so many pixels, `tiled` of each."""
    if some.is_cuda or pixels <= dcae.TILES_ABOVE:
        with suppress(torch.OutOfMemoryError):
            return whole(some)
    torch.cuda.empty_cache()
    return torch.cat([tiled(one) for one in some.split(1)])


def encode_text(
    spec: Spec,
    prompts: list[str],
    negative_prompt: str,
    folder: str,
    device: Device,
    dtype: torch.dtype,
) -> tuple[Cond, Cond]:
    """(cond, null_cond) on the CPU; null_cond is empty unless SANA is guided."""
    negatives = [negative_prompt] if spec.uses_cfg and spec.guidance != 1 else []
    source = text.source_of(spec, folder)
    return text.encode(spec.text_encoder, source, prompts, negatives, device, dtype)


def draw_latents(
    model: nn.Module,
    spec: Spec,
    cond: Cond,
    null_cond: Cond,
    seeds: list[int],
    grid: tuple[int, int],
    stepper: Stepper | None = None,
    progress: tqdm | None = None,
) -> Tensor:
    """Latents (B, C, h, w) from noise of these seeds, by the schedule and solver of `spec`."""
    device, channels = next(model.parameters()).device, model.latent_channels
    tokens = math.prod(grid) // model.patch_size**2
    sigmas = timesteps(spec.steps, spec.schedule, tokens, channels, spec.shift)
    noise = draw_noise(seeds, (channels, *grid)).to(device)
    cond = tuple(c.to(device) for c in cond)
    null = tuple(c.expand(len(noise), *c.shape[1:]).to(device) for c in null_cond) or None
    guidance = spec.guidance if null or not spec.uses_cfg else None
    return sample(model, cond, noise, sigmas, guidance, null, spec.solver, progress, stepper)


@runs.measuring()
def score_toy(
    model: nn.Module, autoencoder: nn.Module, spec: Spec, prompts: list[toy.Prompt]
) -> tuple[dict[str, float], Tensor]:
    """A toy model's rates by task, and its pictures. Prompt i has seed i."""
    device = next(model.parameters()).device
    encoder = text.TOYS[spec.text_encoder].from_pretrained(spec.pipeline, device)
    grid = latent_grid((toy.SIZE, toy.SIZE), autoencoder.stride, model.patch_size)
    images = []
    for rows in torch.arange(len(prompts)).split(100):
        cond = encoder.encode([prompts[i].text for i in rows])
        null_cond = encoder.encode([""] * len(rows)) if spec.uses_cfg else ()
        with runs.autocast(model):
            latents = draw_latents(model, spec, cond, null_cond, rows.tolist(), grid)
        images.append(decode(autoencoder, latents))
    images = torch.cat(images)
    return toy.score(images, prompts), images


@runs.measuring()
def preview(
    model: nn.Module, autoencoder: nn.Module, spec: Spec, pictures: data.Dataset
) -> tuple[Tensor, list[str]]:
    """(images, captions) of four held-out captions, seeds 0 to 3."""
    rows = pictures.held_out[0][:4]
    captions, grid = pictures.caption[rows], tuple(pictures.latents[rows].shape[2:])
    cond = tuple(c[captions] for c in pictures.cond)
    null_cond = pictures.null_cond if spec.uses_cfg else ()
    with runs.autocast(model):
        latents = draw_latents(model, spec, cond, null_cond, [*range(len(rows))], grid)
    return decode(autoencoder, latents), [pictures.captions[i] for i in captions]


def show_and_score(
    models: dict[str, tuple[Spec, nn.Module, nn.Module]], per_task: int, pictures: data.Dataset
) -> tuple[dict[str, dict], dict[str, Tensor], list[str]]:
    """(scores by model, a column of images by model, captions): toys are scored on `per_task`
    prompts a task; of other models the last one draws held-out captions."""
    *_, (last, (spec, model, autoencoder)) = models.items()
    if not (spec.is_toy and per_task):
        images, captions = preview(model, autoencoder, spec, pictures)
        return {}, {last: images}, captions
    prompts, scores, images = toy.draw_prompts(per_task, seed=7), {}, {}
    for name, (spec, model, autoencoder) in models.items():
        scores[name], drawn = score_toy(model, autoencoder, spec, prompts)
        images[name] = drawn[:9].cpu()
    return scores, images, [prompt.text for prompt in prompts[:9]]


def shift_of(spec: Spec, tokens: int, channels: int) -> float:
    """The ratio r of eq. (2), read off the middle of the schedule."""
    middle = timesteps(2, spec.schedule, tokens, channels, spec.shift)[1].item()
    return spec.shift or middle / (1 - middle)


# ---- pictures


@torch.no_grad()
def decode(autoencoder: nn.Module, latents: Tensor) -> Tensor:
    """(B, C, h, w) -> images (B, 3, H, W) in fp32, there; in tiles if memory is short."""
    parameter, images = next(autoencoder.parameters()), []
    pixels = latents[0, 0].numel() * autoencoder.stride**2  # of one picture
    # Small ones together: one alone leaves a GPU idle, and eight toys fit a CPU's caches.
    together = max(1, (2**20 if parameter.is_cuda else 2**17) // pixels)
    tiled = functools.partial(dcae.tiled_decode, autoencoder)
    for some in latents.to(parameter.device).split(together):
        images.append(whole_or_tiled(autoencoder.decode, tiled, some, pixels).float())
    return torch.cat(images)


def parse_size(size: str) -> tuple[int, int]:
    """WxH -> (height, width)."""
    match = re.fullmatch(r"(\d+)x(\d+)", size)
    if not match or int(match[1]) * int(match[2]) > 2**30:
        raise UserError(f"--size {size!r}: wanted WxH in pixels, at most 2^30, such as 1024x768")
    return int(match[2]), int(match[1])


def latent_grid(size: tuple[int, int], stride: int, patch: int) -> tuple[int, int]:
    """The latents (h, w) that hold an image of `size`: whole tokens, so often a little more."""
    unit, (height, width) = stride * patch, size  # pixels a side that one token covers
    if min(size) < unit:
        raise UserError(f"--size {width}x{height} is below this model's minimum of {unit}x{unit}")
    return math.ceil(height / unit) * patch, math.ceil(width / unit) * patch


def crop(image: Tensor, size: tuple[int, int]) -> Tensor:
    """The middle of (..., H, W)."""
    top, left = ((full - side) // 2 for full, side in zip(image.shape[-2:], size))
    return image[..., top : top + size[0], left : left + size[1]]


def save_sheet(path: Path, columns: dict[str, Tensor], rows: list[str]) -> None:
    """A labelled column of images (B, 3, H, W) for each model, a labelled row for each prompt."""
    font, margin, line = ImageFont.load_default(), 170, 24
    height, width = next(iter(columns.values())).shape[2:]
    full = (margin + len(columns) * (width + 4), line + len(rows) * (height + 4))
    sheet = Image.new("RGB", full, "white")
    draw = ImageDraw.Draw(sheet)
    for y, row in enumerate(rows):
        label = textwrap.fill(row, margin // 7)
        draw.multiline_text((6, line + y * (height + 4) + 4), label, "black", font)
    for x, (name, images) in enumerate(columns.items()):
        left = margin + x * (width + 4)
        draw.text((left + 4, 6), name, "black", font)
        for y, image in enumerate(images):
            picture = dcae.to_pil(image).resize((width, height))  # other sizes: seen at the first's
            sheet.paste(picture, (left, line + y * (height + 4)))
    weights.write_whole(path, sheet.save)


def save_pictures(
    autoencoder: nn.Module, latents: Tensor, wanted: list[Job], seconds: dict[str, float]
) -> None:
    """Decode, crop, write. The latents took minutes: they lie on the disk until the pictures do."""
    cure = "look at weights and --guidance" if wanted[0].dtype == "fp32" else "try --dtype fp32"
    if not torch.isfinite(latents).all():
        raise UserError(f"the latents hold NaN or Inf in {wanted[0].dtype}: {cure}")
    kept = [Path(job.out).with_suffix(jobs.LATENTS) for job in wanted]
    for path, job, single in zip(kept, wanted, latents.split(1)):
        weights.save(path, {"latents": single}, {"recipe": json.dumps(jobs.recipe_of(job))})
    try:
        with timed(seconds, "decode", latents.device):
            images = crop(decode(autoencoder, latents), parse_size(wanted[0].size))
        if not torch.isfinite(images).all():
            raise UserError(f"pixels hold NaN or Inf in {wanted[0].dtype}: {cure}")
        with timed(seconds, "transfer", latents.device):
            pixels = dcae.to_pixels(images)
        with timed(seconds, "file", latents.device), ThreadPoolExecutor(8) as pool:
            list(pool.map(jobs.write, pixels, wanted))  # zlib does not hold the GIL
    except BaseException as error:  # also Ctrl-C
        told = f"latents are kept: python sample.py --from {shlex.quote(str(kept[0]))} decodes"
        told += " them, with --device cpu if need be"
        if isinstance(error, RuntimeError | OSError | MemoryError | UserError):  # no room, mostly
            cause = str(error).partition("\n")[0]
            raise UserError(f"decoding failed ({cause}); {told}") from error
        print(told, file=sys.stderr)
        raise
    for path in kept:
        path.unlink()


# ---- main


def clock(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


@contextmanager
def timed(seconds: dict[str, float], phase: str, device: torch.device) -> Iterator[None]:
    start = clock(device)
    yield
    seconds[phase] = round(seconds.get(phase, 0) + clock(device) - start, 3)


def read_flags() -> tuple[Config, dict]:
    """The flags, and the recipe of --from: it counts behind the command line, then the model."""
    doc, recipe = f"{__doc__}\nnames: {', '.join(MODELS)}", {}
    if given := parse_config(Config, doc).from_:
        recipe = jobs.read_recipe(Path(given))

    def defaults(model: str) -> dict:
        spec = describe(model)
        own = dict(steps=spec.steps, guidance=spec.guidance, solver=spec.solver)
        own["size"] = f"{spec.size}x{spec.size}"
        for name in recipe.keys() & vars(Config()).keys() - {*jobs.ELSEWHERE}:
            is_typed = isinstance(recipe[name], bool | None)  # argparse converts text alone
            own[name] = recipe[name] if is_typed else str(recipe[name])
        return own

    config = parse_config(Config, doc, defaults=defaults)
    names = {name: placed(getattr(config, name)) for name in ("model", "autoencoder")}
    return replace(config, **names), recipe


def check_flags(config: Config, spec: Spec) -> None:
    """UserError: what cannot be, or has no effect, before any file is opened."""
    if config.steps == 0 or config.batch_size == 0:
        raise UserError("--steps and --batch-size: wanted 1 or more")
    check_solver(config.solver, config.steps, spec.schedule == "anyflow")
    if config.fp8 and spec.stage == "quant":
        raise UserError(f"--fp8 and {config.model}, which is quantized already: leave --fp8 out")
    if config.negative_prompt and not spec.uses_cfg:
        raise UserError("--negative-prompt is for SANA: FLUX is guidance-distilled and takes none")
    if config.score and not spec.is_toy:
        raise UserError(f"--score counts shapes, {config.model} draws more: wanted a toy")
    unused = {"prompts": ("prompt",), "score": ("prompt", "prompts", "seed", "batch_size", "fp8")}
    for flag, names in unused.items() if not config.from_ else ():
        for name in names if getattr(config, flag) else ():
            if getattr(config, name) != getattr(Config, name):
                raise UserError(f"--{name} has no effect beside --{flag}: leave one out")


def as_used(config: Config, spec: Spec, model: weights.Checkpoint) -> Config:
    """The flags without those that have no effect on this model."""
    known = flux.config_from_shapes(model.shapes) | (model.config or {})
    if not spec.uses_cfg and not known["guidance_embeds"]:
        if config.guidance not in (None, spec.guidance):
            raise UserError(f"--guidance {config.guidance:g}: {config.model} takes none")
        return replace(config, guidance=None)
    if config.negative_prompt and config.guidance == 1:
        print("--guidance 1 is one pass without the negative prompt, which is left out")
        return replace(config, negative_prompt="")
    return config


def main() -> None:
    config, recipe = read_flags()
    device, spec = pick_device(config.device), describe(config.model, config.autoencoder)
    check_flags(config, spec)
    name = config.dtype or ("fp32" if device.type != "cuda" or spec.is_toy else "bf16")
    config, dtype = replace(config, device=str(device), dtype=name), pick_dtype(name)
    files = open_parts(spec, config.weights)
    config = as_used(config, spec, files[0])
    spec = replace(spec, steps=config.steps, guidance=config.guidance, solver=config.solver)
    if config.score:
        parts = (config.model, config.autoencoder, config.weights)
        _, *models = load_pipeline(*parts, device, dtype, config.adapter)
        prompts = toy.draw_prompts(config.score, seed=7)
        rates, _ = score_toy(*models, spec, prompts)
        toy.print_scores({config.model: rates})
        return print(json.dumps({"model": config.model, "prompts": len(prompts)} | rates))
    job = Job(**vars(config), **jobs.digests_of(files, config.adapter))
    jobs.check_origin(job, recipe)
    if config.from_.endswith(".safetensors"):
        autoencoder = load_autoencoder(spec.autoencoder, config.weights, device, dtype)
        about = (autoencoder.latent_channels, autoencoder.stride, parse_size(config.size))
        latents, wanted = jobs.open_latents(job, recipe, *about), jobs.read_jobs(job)
        save_pictures(autoencoder, latents, wanted, {})
        return print(json.dumps({"stage": "decode", "files": [wanted[0].out]}))
    wanted = jobs.read_jobs(job)
    if config.prompts:  # an interrupted list goes on with what is missing
        wanted = [job for job in wanted if not jobs.is_made(job)]
    if not wanted:
        return print(json.dumps({"stage": "sample", "files": []}))
    figures = draw_list(config, spec, wanted, device, dtype)
    print(f"saved    {wanted[0].out}" + f" and {len(wanted) - 1} more" * (len(wanted) > 1))
    print(f"next     python sample.py --from {shlex.quote(wanted[0].out)}   # the same again")
    print(json.dumps(figures))


def draw_list(
    config: Config, spec: Spec, wanted: list[Job], device: torch.device, dtype: torch.dtype
) -> dict:
    """Draw and write the pictures of these jobs. The figures of the last line."""
    seconds = {}
    for first in range(0, len(wanted), TEXTS):
        some = wanted[first : first + TEXTS]
        figures = draw_pictures(config, spec, some, device, dtype, seconds)
    return figures | {"seconds": seconds, "files": [job.out for job in wanted]}


def draw_pictures(
    config: Config,
    spec: Spec,
    wanted: list[Job],
    device: torch.device,
    dtype: torch.dtype,
    seconds: dict[str, float],  # by phase; this adds to them
) -> dict:
    attention_name, attend = pick_attention(config.attention, device, dtype)
    parts = (config.model, config.autoencoder, config.weights)
    # Does it fit, before it is read?
    _, transformer, autoencoder = load_pipeline(*parts, "meta", adapters=config.adapter)
    grid = latent_grid(parse_size(config.size), autoencoder.stride, transformer.patch_size)
    tokens = math.prod(grid) // transformer.patch_size**2
    folder, pixels = Path(wanted[0].out).parent, math.prod(parse_size(config.size))
    runs.check_room(folder, 2 * len(wanted) * pixels, f"{len(wanted)} pictures")
    guidance = "no guidance" if spec.guidance is None else f"guidance {spec.guidance:g}"
    print(
        f"sample | {config.model} + {spec.autoencoder} | {config.size}, {tokens} tokens | "
        f"{spec.steps} {spec.solver} steps, {guidance} | {config.dtype} | "
        f"seed {config.seed} | {config.device}, {attention_name} attention"
    )
    is_fast, threads = config.fast and device.type == "cuda", ThreadPoolExecutor(1)
    with timed(seconds, "load", device):
        autoencoder = load_autoencoder(spec.autoencoder, config.weights, device, dtype)
    # Its kernels compile while text encoders and weights are read.
    compiling = threads.submit(speed_up_decoder, autoencoder) if is_fast else None
    with timed(seconds, "text", device):
        how = (config.negative_prompt, config.weights, device, dtype)
        cond, null_cond = encode_text(spec, [job.prompt for job in wanted], *how)
    with timed(seconds, "load", device):
        transformer = load_transformer(spec, config.weights, device, dtype, config.adapter)
        transformer.attention = attend
        if config.fp8:
            kernels.to_fp8(transformer)
        stepper = speed_up(transformer, config.compile) if is_fast else None
        if compiling:
            compiling.result()
    batches = torch.arange(len(wanted)).split(config.batch_size)
    with tqdm(total=len(batches) * spec.steps, desc="sample", unit="step") as bar:
        for rows in batches:
            some, words = [wanted[i] for i in rows], tuple(c[rows] for c in cond)
            given = (spec, words, null_cond, [job.seed for job in some], grid, stepper, bar)
            with timed(seconds, "steps", device):
                latents = draw_latents(transformer, *given)
            save_pictures(autoencoder, latents, some, seconds)
    print("\nseconds  " + ", ".join(f"{phase} {value:.2f}" for phase, value in seconds.items()))
    shown = ("model", "size", "steps", "guidance", "dtype", "device")
    figures = {"stage": "sample"} | {name: getattr(config, name) for name in shown}
    figures["tokens"] = tokens
    if device.type == "cuda":
        figures["peak_gb"] = round(torch.cuda.max_memory_allocated(device) / 1e9, 2)
    return figures


if __name__ == "__main__":
    exit_cleanly(main)
