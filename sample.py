"""Sampling: from a prompt and a seed to a picture, along a differential equation.

What    python sample.py --prompt "a red circle left of a blue square"
        Schedules (which noise levels to visit), solvers (how to step between them), guidance, and
        the whole trip: text, transformer, autoencoder, PNG. A PNG carries its recipe; --from
        x.png repeats it.
Why     A flow-matching model predicts the velocity of a straight path between data and noise; an
        image is that path walked backwards. A deeply compressed latent has fewer tokens with more
        channels each, so it wants other noise levels than its base did: that is the shift below.
How     noisy = (1 - t) latents + t noise,   velocity = d noisy / dt = noise - latents         (1)
        t = r s / (1 + (r - 1) s)            s falls evenly from 1; r > 1 dwells in the noise  (2)
        Euler: noisy += (t_next - t) velocity                                                  (3)
        DPM-Solver++ 2M: the same path in log signal-to-noise, with a memory of one step       (4)
Cost    steps x one call of the transformer (two for SANA's guidance), and one decode.
Speed   On a GPU: flash attention in Triton, fused kernels (models/kernels.py), what the steps share
        computed once, a CUDA graph. --no-fast is the plain model; --fp8 is faster and lossy.
Source  FLUX.1 (mu of the token count), DC-Gen arXiv 2509.25180, SANA arXiv 2410.10629,
        DPM-Solver++ arXiv 2211.01095, FlashAttention-2 arXiv 2307.08691.
Differs Sizes that the latent grid cannot hold are padded and cropped back, where diffusers rounds.
        Noise is drawn on the CPU, one generator a picture: a seed here is another seed there.

--model is a name, a diffusers pipeline (folder or hub id), the weights of a transformer, or a run
of ours.
"""

import json
import math
import re
import textwrap
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields, replace
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont, PngImagePlugin
from torch import Tensor, nn
from tqdm import tqdm

import dcae
from models import flux, kernels, nvfp4, sana, script, text, vae, weights
from models.kernels import describe_tiles, jit, tl, triton
from models.script import UserError


@dataclass(frozen=True)
class Config:
    model: str = "flux-toy"  # a name (see above), a hub id or a path
    prompt: str = "a red circle left of a blue square"
    prompts: str = ""  # a .txt (a prompt a line) or .jsonl file ("prompt", "seed"); writes captions
    negative_prompt: str = ""  # SANA only: what to steer away from
    size: str = ""  # WxH in pixels, any; "": the model's own
    steps: int | None = None  # the model's own unless given
    guidance: float | None = None  # the model's own unless given
    seed: int = 0  # of the first picture of a prompt; the next one has seed + 1
    own_seeds: bool = False  # the next seeds for the next prompts: for pictures to train on
    n: int = 1  # pictures a prompt
    batch_size: int = 1  # 1: a picture is the same, to the bit, alone or among others
    autoencoder: str = ""  # "": the model's own; a preset or a path
    weights: str = ""  # a folder to look in instead of the hub
    text_cache: str = ""  # a .safetensors file that keeps text embeddings
    out: str = "samples"  # a folder; or one .png
    from_: str = ""  # a PNG to repeat, or the .latents.safetensors of a decode that failed
    attention: str = ""  # torch | triton; "": triton on a GPU with TMA (sm_90 and up)
    fast: bool = True  # on CUDA: fused kernels, nothing done twice, a CUDA graph; the same picture
    fp8: bool = False  # linear layers in e4m3, a scale a row: faster, lossy
    device: str = ""  # "": cuda, then mps, then cpu
    dtype: str = ""  # of the weights: fp32, bf16, fp16; "": fp32 on the CPU and for toys, else bf16


# Belong to a machine, not to a recipe.
HERE = ("out", "weights", "text_cache", "from_", "attention")


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
    "flux"        1 .. 1/steps                  exp(mu), linear mu: .5 at 256 tokens, 1.15 at 4096
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
    stepper: "Stepper | None" = None,
) -> Tensor:
    """Latents (B, C, h, w) fp32 from noise (B, C, h, w), conditioning and a schedule.

    With `null_cond` every step runs the model twice and `guidance` extrapolates between the two
    (classifier-free guidance). Without it `guidance` is an input of the model (FLUX was distilled
    to take it), or None for a model that has no such input. A `stepper` of this model does the same
    faster.
    """
    levels, lambdas = sigmas.tolist(), log_snr(sigmas).tolist()
    noisy_latents = noise.float()
    # SANA was trained on whole timesteps of 0..1000; its DPM-Solver truncates to them. (3e-5: what
    # fp32 levels may lose; it keeps 750 from becoming 749.)
    dpm = solver == "dpm"
    levels_told = [int(1000 * level + 3e-5) / 1000 if dpm else level for level in levels[:-1]]
    if stepper is not None:
        stepper.start(levels_told, noisy_latents, cond, guidance, null_cond)
    previous = None  # the clean latents that the step before predicted
    for i, (now, then) in enumerate(pairwise(levels)):
        if stepper is None:
            velocity = predict(model, noisy_latents, levels_told[i], cond, guidance, null_cond)
        else:
            velocity = stepper(i, noisy_latents)
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
    timestep: float | Tensor,
    cond: tuple[Tensor, ...],
    guidance: float | None,
    null_cond: tuple[Tensor, ...] | None,
) -> Tensor:
    """One guided velocity (B, C, h, w) in fp32: v(null) + guidance (v(cond) - v(null))."""
    batch, device = len(noisy_latents), noisy_latents.device
    t = torch.as_tensor(timestep, dtype=torch.float32, device=device)
    if null_cond is None:
        scale = () if guidance is None else (torch.full((batch,), guidance, device=device),)
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
    HAS_BIAS: tl.constexpr, STAGES: tl.constexpr,  # blocks of k and v in flight
):  # fmt: skip
    """A program owns BLOCK_M queries of one head and walks over the keys, BLOCK_N at a time:

    for k, v in blocks:
        logits = q k^T scale + bias              (BLOCK_M, BLOCK_N): never leaves the chip
        top, old = max(top, rowmax(logits)), top
        p = 2^(logits - top)                     of the largest logit so far: no overflow
        total = total 2^(old - top) + rowsum(p)  what was summed before shrinks accordingly
        acc = acc 2^(old - top) + p v
    out = acc / total

    Descriptors (TMA from sm_90 on) read zeros beyond the ends and write nothing there.
    """
    start = tl.program_id(0) * BLOCK_M
    batch, head = tl.program_id(1) // heads, tl.program_id(1) % heads
    bias += batch * bias_stride
    queries = q.load([batch, head, start, 0]).reshape([BLOCK_M, BLOCK_D])
    top = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    full = keys // BLOCK_N * BLOCK_N  # these need no mask, and pay for none
    for first in tl.range(0, full, BLOCK_N, num_stages=STAGES):
        block = k.load([batch, head, first, 0]).reshape([BLOCK_N, BLOCK_D])
        logits = tl.dot(queries, block.T)
        p, top, total, shrink = attend_block(
            logits, scale, bias, first, keys, top, total, BLOCK_N, HAS_BIAS, False
        )
        block = v.load([batch, head, first, 0]).reshape([BLOCK_N, BLOCK_D])
        acc = tl.dot(p.to(block.dtype), block, acc * shrink[:, None])
    if full < keys:
        block = k.load([batch, head, full, 0]).reshape([BLOCK_N, BLOCK_D])
        logits = tl.dot(queries, block.T)
        p, top, total, shrink = attend_block(
            logits, scale, bias, full, keys, top, total, BLOCK_N, HAS_BIAS, True
        )
        block = v.load([batch, head, full, 0]).reshape([BLOCK_N, BLOCK_D])
        acc = tl.dot(p.to(block.dtype), block, acc * shrink[:, None])
    acc = acc / tl.where(total == 0.0, 1.0, total)[:, None]  # 0: every key is padding
    out.store([batch, head, start, 0], acc.to(out.dtype).reshape([1, 1, BLOCK_M, BLOCK_D]))


@jit
def attend_block(
    logits, scale, bias, first, keys, top, total,
    BLOCK_N: tl.constexpr, HAS_BIAS: tl.constexpr, RAGGED: tl.constexpr,
):  # fmt: skip
    """(p, top, total, shrink) of one block, as above; `logits` are still to be scaled."""
    if HAS_BIAS or RAGGED:
        columns = first + tl.arange(0, BLOCK_N)
    if HAS_BIAS:
        logits = logits * scale + tl.load(bias + columns, columns < keys, 0.0)[None, :]
        scale = 1.0
    if RAGGED:
        logits = tl.where((columns < keys)[None, :], logits, float("-inf"))
    new_top = tl.maximum(top, tl.max(logits, 1) * scale)
    base = new_top
    if HAS_BIAS:  # all padding so far: -inf - -inf is no number
        base = tl.where(new_top == float("-inf"), 0.0, new_top)
    p = tl.math.exp2(logits * scale - base[:, None])  # one multiply-add and one exponential
    shrink = tl.math.exp2(top - base)
    return p, new_top, total * shrink + tl.sum(p, 1), shrink


# (BLOCK_M, BLOCK_N, warps, stages, registers a thread at most), by (GPU generation, BLOCK_D).
TILE = (128, 64, 8, 2, None)
TILES = {
    # Two programs to a multiprocessor: the tensor cores serve one while the other takes exponents.
    (9, 128): (128, 64, 8, 2, 128),
    (8, 128): (128, 32, 8, 2, None),
}


def triton_attention(
    q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, tile: tuple | None = None
) -> Tensor:
    """`attention` by the kernel, for hd <= 256; views into a joint qkv need no copy."""
    (batch, heads, queries, head_dim), keys = q.shape, k.shape[2]
    assert k.shape == v.shape == (batch, heads, keys, head_dim) and head_dim <= 256, (
        f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}: "
        f"wanted (B, nh, N, hd) and twice (B, nh, L, hd), hd <= 256"
    )
    assert q.dtype in (torch.bfloat16, torch.float16) or kernels.INTERPRETED, (
        f"{q.dtype}: tensor cores take bf16 and fp16"
    )
    if tile is None and attn_mask is None and kernels.hopper_takes(q, k, v):
        return kernels.hopper_attention(q, k, v)  # the same algorithm, scheduled by hand
    if head_dim % 8 or not all(map(tma_reads, (q, k, v))):
        whole = torch.contiguous_format
        q, k, v = (F.pad(t, (0, -head_dim % 8)).clone(memory_format=whole) for t in (q, k, v))
    block_d = max(triton.next_power_of_2(head_dim), 16)
    major = 0 if kernels.INTERPRETED else torch.cuda.get_device_capability(q.device)[0]
    tile = tile or TILES.get((major, block_d), TILE)
    block_m, block_n, warps, stages, registers = tile
    bias, bias_stride = q, 0  # not read
    if attn_mask is not None:
        assert attn_mask.shape[1:] == (1, 1, keys), f"mask {tuple(attn_mask.shape)}: (B, 1, 1, L)"
        bias = (additive(attn_mask).flatten(1) * LOG2_E).contiguous()  # (B, L)
        bias_stride = keys if len(bias) > 1 else 0
    # Heads side by side in a row, so that joining them is a view.
    out = q.new_empty(batch, queries, heads, q.shape[3]).transpose(1, 2)
    cut = {"q": (q, block_m), "k": (k, block_n), "v": (v, block_n), "out": (out, block_m)}
    described = {name: describe_tiles(t, [1, 1, n, block_d]) for name, (t, n) in cut.items()}
    attention_kernel[(triton.cdiv(queries, block_m), batch * heads)](
        **described, bias=bias, bias_stride=bias_stride, keys=keys, heads=heads,
        scale=LOG2_E / math.sqrt(head_dim), BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_D=block_d,
        HAS_BIAS=attn_mask is not None, STAGES=stages, num_warps=warps, maxnreg=registers,
    )  # fmt: skip
    return out[..., :head_dim]


def tma_reads(heads: Tensor) -> bool:
    """Do its rows lie where the hardware that copies tiles can address them?"""
    steps = (n * heads.element_size() for n in heads.stride()[:-1])
    return heads.stride(-1) == 1 and not any(n % 16 for n in (heads.data_ptr(), *steps))


def pick_attention(name: str, device: torch.device, dtype: torch.dtype) -> tuple[str, Callable]:
    """(torch | triton, the function): what `name` says, or the faster one here."""
    usable = kernels.runs_on(device) and (dtype != torch.float32 or kernels.INTERPRETED)
    if name == "triton" and not usable:
        raise UserError(
            f"--attention triton on {device} in {str(dtype)[6:]}: it wants Triton, an NVIDIA GPU "
            f"from sm_80 on, and --dtype bf16 or fp16; --attention torch runs anywhere"
        )
    if name not in ("", "torch", "triton"):
        raise UserError(f"--attention {name!r}: wanted torch or triton")
    # Below sm_90 there is no TMA, and torch's FlashAttention-2 is at home.
    hopper = usable and device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)
    name = name or ("triton" if hopper else "torch")
    return name, triton_attention if name == "triton" else F.scaled_dot_product_attention


# ---- speed


class Stepper:
    """`predict`, step after step, with nothing done twice.

    hoist   What no noise reaches is computed before the first step: the text's projections and, for
            all steps in one pass over their weights (a quarter of FLUX), the modulations. The
            modules that would compute it hand out the result, during a step and no longer.
            Lossless.
    graph   The step is recorded once as a CUDA graph and replayed: one launch instead of a
            thousand, the same kernels on the same memory. Bit-identical.
    """

    def __init__(self, model: nn.Module, hoist: bool = True, graph: bool = True):
        self.model, self.hoist, self.graph = model, hoist, graph
        self.signature = self.recorded = None
        self.now: dict[nn.Module, Tensor] = {}  # what stands for a module's output in this step
        self.hand_out: dict[nn.Module, Callable] = {}  # its forward during a step

    def start(
        self,
        timesteps: list[float],
        noise: Tensor,
        cond: tuple[Tensor, ...],
        guidance: float | None,
        null_cond: tuple[Tensor, ...] | None,
    ) -> None:
        """Get ready for a batch of pictures; the next one of its shapes replays the same graph."""
        given = (*cond, *(null_cond or ()))
        signature = [noise.shape, guidance, len(cond), *(tensor.shape for tensor in given)]
        if signature != self.signature:
            self.close()
            self.signature = signature
            self.timestep = noise.new_zeros(())
            self.noisy, self.given = noise.clone(), [tensor.clone() for tensor in given]
        for mine, new in zip(self.given, given):
            mine.copy_(new)
        self.timesteps, self.guidance, self.split = timesteps, guidance, len(cond)
        if not self.hoist:
            return
        both = [torch.cat(pair) for pair in zip(null_cond, cond)] if null_cond else cond
        self.once, self.each = known_before(self.model, noise, timesteps, both, guidance)
        for module, value in self.once.items() | {m: v[0] for m, v in self.each.items()}.items():
            if module in self.now:
                self.now[module].copy_(value)
            else:
                self.now[module] = value.clone()
                self.hand_out[module] = lambda *_, value=self.now[module]: value

    def __call__(self, step: int, noisy_latents: Tensor) -> Tensor:
        """The velocity (B, C, h, w) of a step. The next call overwrites it."""
        self.timestep.fill_(self.timesteps[step])
        self.noisy.copy_(noisy_latents)
        if self.hoist:
            rows = [value[step] for value in self.each.values()]
            torch._foreach_copy_([self.now[module] for module in self.each], rows)
        if not (self.graph and noisy_latents.is_cuda):
            return self.run()
        if self.recorded is None and step == 0:  # as warm-up: kernels compile, libraries wake
            return self.run()
        if self.recorded is None:
            self.recorded = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.recorded):
                self.velocity = self.run()
        self.recorded.replay()
        return self.velocity

    def run(self) -> Tensor:
        cond, null_cond = self.given[: self.split], self.given[self.split :]
        rest = (self.guidance, tuple(null_cond) or None)
        for module, forward in self.hand_out.items():
            module.forward = forward
        try:
            return predict(self.model, self.noisy, self.timestep, tuple(cond), *rest)
        finally:  # the model is as it was, for other steppers and for those who have none
            for module in self.hand_out:
                del module.forward

    def close(self) -> None:
        """Let go of what was computed and recorded."""
        self.now, self.hand_out, self.signature, self.recorded = {}, {}, None, None


def speed_up(transformer: nn.Module, autoencoder: nn.Module) -> Stepper:
    """Fused kernels where they run; what `sample` steps with. For models on a CUDA device."""
    if kernels.runs_on(next(transformer.parameters()).device):
        kernels.fuse(transformer)
        kernels.fuse(autoencoder)
        autoencoder.to(memory_format=torch.channels_last)  # what its fused functions read
    return Stepper(transformer)


def known_before(
    model: nn.Module,
    noise: Tensor,
    timesteps: list[float],
    cond: tuple[Tensor, ...],
    guidance: float | None,
) -> tuple[dict[nn.Module, Tensor], dict[nn.Module, Tensor]]:
    """Outputs that do not depend on the noisy latents: {module: output} of those that are the same
    in every step, and {module: outputs (S, ...)} of those that follow the timestep."""
    parameter, batch = next(model.parameters()), len(cond[0])
    device, dtype = parameter.device, parameter.dtype
    levels = torch.tensor(timesteps, device=device)[:, None].expand(-1, batch)  # (S, B)
    grid = (noise.shape[2] // model.patch_size, noise.shape[3] // model.patch_size)
    if isinstance(model, flux.Flux):
        steps = len(timesteps)
        text, pooled = (tensor.to(dtype) for tensor in cond)
        scale = None if guidance is None else torch.full((steps * batch,), guidance, device=device)
        conditions = model.condition(levels.flatten(), scale, pooled.repeat(steps, 1))  # (S B, D)
        conditions = conditions.unflatten(0, (steps, batch))
        layers = [m.lin for m in model.modules() if isinstance(m, flux.Modulation)]
        layers.append(model.final_layer.adaLN_modulation[1])
        rope = model.pe_embedder(text.shape[1], grid, device)
        once = {model.txt_in: model.txt_in(text), model.pe_embedder: rope}
        return once, {lin: lin(conditions) for lin in layers}
    text = model.attention_y_norm(model.y_embedder(cond[0].to(dtype)))  # (B, L, D)
    sinusoids = [sana.sinusoid(sana.milliseconds(t)).to(dtype) for t in levels]
    embedded = model.t_embedder(torch.stack(sinusoids))  # (S, B, D)
    once = {model.y_embedder: text, model.attention_y_norm: text}
    once |= {block.cross_attn.kv_linear: block.cross_attn.kv_linear(text) for block in model.blocks}
    if model.pos_embedder is not None:
        once[model.pos_embedder] = model.pos_embedder(grid, device)
    return once, {model.t_embedder: embedded, model.t_block: model.t_block(embedded)}


# ---- model

TOY = dict(text="toy", repo="text-toy", schedule="flux", solver="euler", steps=16, guidance=4.0)
SANA_TOY = dict(TOY, family="sana", schedule="sana-euler")
FLUX = dict(text="flux", schedule="flux", solver="euler", steps=28, guidance=3.5, size=1024)
DC_GEN = dict(FLUX, steps=20)
SANA = dict(text="sana", schedule="sana-dpm", shift=3.0, solver="dpm", steps=20, guidance=4.5)
SANA_1K = "Efficient-Large-Model/Sana_1600M_1024px_BF16_diffusers"
# `text` names the encoders and tells the toy world; `family` the transformer, where these do not.
# `repo` has the text encoders, and the autoencoder unless that is named: it is the hub's pipeline
# with the transformer, unless it is named too. `shift` replaces the ratio r of the schedule.
# `is_run`: what our stages trained, on top of a base.
MODELS = {
    "flux-toy": dict(TOY, size=128, autoencoder="flux-vae-toy", shift=4.0),
    "dc-gen-toy": dict(TOY, size=128, autoencoder="dc-ae-f32c32-toy", shift=2.0, is_run=True),
    "sana-toy": dict(SANA_TOY, size=128, autoencoder="dc-ae-f32c32-toy", shift=2.0),
    "flux-dev": FLUX,
    "flux-krea": dict(FLUX, guidance=4.5),
    "flux-schnell": dict(FLUX, text="schnell", schedule="schnell", steps=4),
    "dc-gen-flux-1k": dict(DC_GEN, schedule="dc-gen-1k"),
    "dc-gen-flux-4k": dict(DC_GEN, size=4096),
    "sana-0.6b-512": dict(SANA, size=512),
    "sana-0.6b": dict(SANA, size=1024),
    "sana-1.6b-512": dict(SANA, size=512),
    "sana-1.6b": dict(SANA, size=1024),
    "sana-1.6b-2k": dict(SANA, size=2048),
    "sana-1.6b-4k": dict(SANA, size=4096, shift=6.0),
    "sana-1.5-1.6b": dict(SANA, size=1024),
    "dc-gen-sana-f64c128": dict(SANA, size=1024, repo=SANA_1K, autoencoder="dc-ae-f64c128-1.5"),
}


def describe(model: str, autoencoder: str = "") -> dict:
    """All that is to know of a model but its weights: a row of MODELS plus where the parts are."""
    path = Path(model)
    if path.exists():
        is_pipeline = (path / "model_index.json").exists()
        spec = describe_pipeline(path, str(path)) if is_pipeline else describe_weights(path)
    elif model in MODELS:
        repo = (flux.PRESETS | sana.PRESETS)[model].get("hub", "")
        spec = {"transformer": model, "repo": repo, "autoencoder": repo} | MODELS[model]
    elif weights.is_hub_id(model):
        about = ["model_index.json", "transformer/config.json", "scheduler/*.json"]
        spec = describe_pipeline(weights.download(model, about), model)
    else:
        names = ", ".join(MODELS)
        raise UserError(f"{model!r} is no file, no folder and no name; names: {names}")
    return spec | ({"autoencoder": autoencoder} if autoencoder else {})


def is_sana(spec: dict) -> bool:
    """Is the transformer a Sana, guided by two passes? Else it is a Flux, without null_cond."""
    return spec.get("family", spec["text"]) == "sana"


def text_kind(spec: dict) -> str:
    """What models/text.py calls the encoders of this model."""
    return "sana-toy" if spec["text"] == "toy" and is_sana(spec) else spec["text"]


# What a scheduler may say of itself to be one of ours; a word not listed here does not matter.
STANDARD = dict(
    algorithm_type="dpmsolver++", solver_order=2, solver_type="midpoint", thresholding=False,
    prediction_type="flow_prediction", final_sigmas_type="zero", euler_at_final=False,
    use_flow_sigmas=True, use_lu_lambdas=False, use_karras_sigmas=False, use_beta_sigmas=False,
    use_exponential_sigmas=False, stochastic_sampling=False, invert_sigmas=False,
    shift_terminal=None, num_train_timesteps=1000, time_shift_type="exponential",
    base_shift=0.5, max_shift=1.15, base_image_seq_len=256, max_image_seq_len=4096,
)  # fmt: skip


def describe_pipeline(folder: Path, source: str) -> dict:
    """A diffusers pipeline; its scheduler must be one of ours: another makes other pictures."""
    network = weights.read_json(folder / "transformer" / "config.json")
    scheduler = weights.read_json(folder / "scheduler" / "scheduler_config.json")
    odd = [f"{k}={v}" for k, v in scheduler.items() if STANDARD.get(k, v) != v]
    dynamic, shift = scheduler.get("use_dynamic_shifting"), scheduler.get("shift", 1.0)
    kinds = (network.get("_class_name"), scheduler.get("_class_name"))
    parts = dict.fromkeys(("transformer", "repo", "autoencoder"), source)
    if kinds[0] == "SanaTransformer2DModel" and not odd and not dynamic:
        stride = 64 if network.get("in_channels") == 128 else 32
        spec = dict(SANA, **parts, size=stride * network.get("sample_size", 32))
        if kinds[1] == "DPMSolverMultistepScheduler":
            return dict(spec, shift=scheduler.get("flow_shift", 1.0))
        if kinds[1] == "FlowMatchEulerDiscreteScheduler":
            return dict(spec, schedule="sana-euler", solver="euler", shift=shift)
    if kinds == ("FluxTransformer2DModel", "FlowMatchEulerDiscreteScheduler") and not odd:
        channels, guidance = network.get("in_channels", 64), network.get("guidance_embeds", False)
        spec = describe_flux(channels, guidance) | parts
        if spec["schedule"] == "dc-gen-1k":  # whatever its scheduler says
            return spec
        # Its text is 512 tokens, also schnell's.
        return dict(spec, text="flux", schedule="flux", shift=None if dynamic else shift)
    raise UserError(f"{source}: {kinds[0]} with {kinds[1]} ({', '.join(odd)}) is not known here")


def describe_flux(in_channels: int, guidance: bool) -> dict:
    """What a FLUX's own shape tells: DC-Gen's 1K model is the one with 32 channels, 4K has 128."""
    names = {32: "dc-gen-flux-1k", 128: "dc-gen-flux-4k"}
    return describe(names.get(in_channels, "flux-dev" if guidance else "flux-schnell"))


def describe_weights(path: Path) -> dict:
    """A run of ours, whose header names base and autoencoder, or a transformer's weights alone."""
    checkpoint = weights.open_checkpoint(path, "transformer")
    here, notes, told = {"transformer": str(path)}, checkpoint.metadata, checkpoint.config or {}
    if notes.get("stage") == "quant":  # complete without its base
        spec = weights.parse_json(notes.get("spec", ""), f"the header of {path}")
        if not {*TOY, "repo", "size", "autoencoder"} <= spec.keys():
            raise UserError(f"{path}: its header lacks what a sampler needs: make it again")
        return spec | here
    if ours := notes if checkpoint.is_run else told.get("_dc_gen"):  # the latter: lora.py --export
        try:
            spec = describe(ours["base"]) | here | own_facts(ours)
        except (KeyError, ValueError, TypeError) as error:
            raise UserError(f"{path}: its base or autoencoder is not found ({error})") from None
        return spec | {"is_run": checkpoint.is_run}
    for name, shape in checkpoint.shapes.items():
        if name.endswith(("img_in.weight", "x_embedder.weight")):  # FLUX: BFL's name, diffusers'
            if told.get("joint_attention_dim", 4096) != 4096:  # not T5's width
                return describe("flux-toy") | here
            guidance = any("guidance" in other for other in checkpoint.shapes)
            return describe_flux(shape[1], guidance) | here
    told = told or sana.told_by_names(checkpoint.shapes) or {}
    if told.get("caption_channels", 2304) != 2304:  # not Gemma's width
        return describe("sana-toy") | here
    configs = {
        name: preset["config"] for name, preset in sana.PRESETS.items() if "config" in preset
    }
    fits = {name: config for name, config in configs.items() if config.items() <= told.items()}
    closest = max(fits, key=lambda name: len(fits[name]), default="sana-1.6b")
    return describe(closest) | here


def own_facts(notes: dict[str, str]) -> dict:
    """What a run of ours says of itself that is not its base's; older ones lack the size.

    KeyError: the autoencoder is not named. ValueError: a number is none.
    """
    told = {"shift": float, "size": int}
    told = {name: kind(notes[name]) for name, kind in told.items() if name in notes}
    return {"autoencoder": notes["autoencoder"]} | told


def load_pipeline(
    model: str,
    autoencoder: str = "",
    folder: str = "",
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
) -> tuple[dict, nn.Module, nn.Module]:
    """(what `describe` says, transformer, autoencoder). Encode text first: it needs the room."""
    spec = describe(model, autoencoder)
    transformer = load_transformer(spec, folder, device, dtype)
    decoder = load_autoencoder(spec["autoencoder"], folder, device, dtype)
    if transformer.latent_channels != decoder.latent_channels:
        raise UserError(
            f"{model} makes latents of {transformer.latent_channels} channels, and "
            f"{spec['autoencoder']} reads {decoder.latent_channels}: --autoencoder must be the one "
            f"that it was trained with"
        )
    return spec, transformer, decoder


def load_transformer(
    spec: dict, folder: str, device: str | torch.device, dtype: torch.dtype
) -> nn.Module:
    if spec.get("stage") == "quant":
        return nvfp4.load(spec["transformer"], device, dtype)
    cls = sana.Sana if is_sana(spec) else flux.Flux
    return cls.from_pretrained(spec["transformer"], device, dtype, weights=folder or None).eval()


def load_autoencoder(
    source: str, folder: str, device: str | torch.device, dtype: torch.dtype
) -> nn.Module:
    """A DCAE or a FluxVAE: the tensor names tell which."""
    path, _ = weights.locate(source, dcae.PRESETS | vae.PRESETS, folder or None, "vae")
    names = weights.open_checkpoint(path, "vae").shapes
    is_vae = any(re.match(r"encoder\.(down\.0\.block|down_blocks\.0\.resnets)\.", n) for n in names)
    cls = vae.FluxVAE if is_vae else dcae.DCAE
    # fp16 ends at 65504, and activations of these decoders pass it.
    dtype = torch.float32 if dtype == torch.float16 else dtype
    return cls.from_pretrained(source, device, dtype, weights=folder or None)


def text_source(spec: dict, folder: str) -> str:
    """Where the text encoders are: a pipeline on the hub, or in the user's --weights folder."""
    if folder and spec["text"] != "toy" and not Path(spec["repo"]).exists():
        return str(weights.in_folder(Path(folder), {"hub": spec["repo"]}))
    return spec["repo"]


def encode_text(
    config: Config, spec: dict, prompts: list[str], device: torch.device, dtype: torch.dtype
) -> tuple[text.Cond, text.Cond]:
    """(cond, null_cond) on the CPU; null_cond is empty unless SANA is guided."""
    repo = text_source(spec, config.weights)
    guided = is_sana(spec) and config.guidance > 1
    negatives = [config.negative_prompt] if guided else []
    cache = config.text_cache or None
    return text.encode(text_kind(spec), repo, prompts, negatives, device, dtype, cache)


# ---- picture


@torch.no_grad()
def decode(autoencoder: nn.Module, latents: Tensor) -> Tensor:
    """(B, C, h, w) -> images (B, 3, H, W) on the CPU; in tiles if memory is short.

    Large ones one by one.
    """
    device = next(autoencoder.parameters()).device
    images = []
    for few in latents.to(device).split(decoded_together(autoencoder, latents)):
        image = None
        if decode_bytes(autoencoder, few) < free_bytes(device):
            try:
                image = autoencoder.decode(few)
            except torch.OutOfMemoryError:
                torch.cuda.empty_cache()
        if image is None:
            image = torch.cat([dcae.tiled_decode(autoencoder, single) for single in few.split(1)])
        images.append(image.float().cpu())
    return torch.cat(images)


def decoded_together(autoencoder: nn.Module, latents: Tensor) -> int:
    """Small pictures: too little alone for a GPU, and eight toys are what a CPU's caches hold."""
    pixels = 2**20 if next(autoencoder.parameters()).is_cuda else 2**17
    return max(1, pixels // (latents[0, 0].numel() * autoencoder.stride**2))


def decode_bytes(autoencoder: nn.Module, latents: Tensor) -> int:
    """An estimate: the widest layers at full resolution, of which a few are alive at once."""
    config = autoencoder.config
    width = config.get("decoder_block_out_channels") or config["block_out_channels"]
    pixels = latents[:, 0].numel() * autoencoder.stride**2
    return 6 * width[0] * pixels * next(autoencoder.parameters()).element_size()


def free_bytes(device: torch.device) -> int:
    if device.type != "cuda":
        return 8 * 2**30  # what a laptop can spare
    held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + held


def contact_sheet(columns: dict[str, Tensor], rows: list[str]) -> Image.Image:
    """A labelled column of images (B, 3, H, W) for each model, a labelled row for each prompt."""
    font, margin, line = ImageFont.load_default(), 170, 24
    height, width = next(iter(columns.values())).shape[2:]
    sheet = Image.new(
        "RGB", (margin + len(columns) * (width + 4), line + len(rows) * (height + 4)), "white"
    )
    draw = ImageDraw.Draw(sheet)
    for y, row in enumerate(rows):
        words = textwrap.fill(row, margin // 7)
        draw.multiline_text((6, line + y * (height + 4) + 4), words, "black", font)
    for x, (name, images) in enumerate(columns.items()):
        left = margin + x * (width + 4)
        draw.text((left + 4, 6), name, "black", font)
        for y, image in enumerate(images):
            picture = dcae.to_pil(image).resize((width, height))  # other sizes: seen at the first's
            sheet.paste(picture, (left, line + y * (height + 4)))
    return sheet


def save_sheet(path: Path, columns: dict[str, Tensor], rows: list[str]) -> None:
    weights.write_whole(path, contact_sheet(columns, rows).save)


# ---- main


def read_jobs(config: Config) -> list[tuple[str, int]]:
    """(prompt, seed) of every picture."""
    if config.n < 1 or config.batch_size < 1:
        raise UserError(f"--n {config.n} --batch-size {config.batch_size}: wanted 1 or more")
    rows = [(config.prompt, config.seed)]
    if config.prompts:
        path = Path(config.prompts)
        if path.suffix not in (".txt", ".jsonl") or not path.is_file():
            raise UserError(f"--prompts {path}: wanted a .txt or .jsonl file that exists")
        lines = path.read_text("utf-8-sig", errors="replace").splitlines()
        lines = [line for line in lines if line.strip()]
        try:
            rows = [json.loads(r) if path.suffix == ".jsonl" else {"prompt": r} for r in lines]
            step = config.n if config.own_seeds else 0
            seeds = [int(r.get("seed", config.seed + i * step)) for i, r in enumerate(rows)]
            rows = [(str(r["prompt"]), seed) for r, seed in zip(rows, seeds)]
        except (ValueError, TypeError, KeyError, AttributeError, OverflowError) as error:
            raise UserError(
                f'{path}: every line is an object like {{"prompt": "a fox", "seed": 0}} ({error!r})'
            ) from None
        if not rows:
            raise UserError(f"--prompts {path} is empty: wanted a prompt a line")
    jobs = [(prompt, seed + i) for prompt, seed in rows for i in range(config.n)]
    if any(not 0 <= seed < 2**63 for _, seed in jobs):
        raise UserError(f"--seed {config.seed}: wanted 0 .. 2^63 - 1")
    return jobs


def parse_size(size: str) -> tuple[int, int]:
    """WxH -> (height, width)."""
    match = re.fullmatch(r"(\d+)x(\d+)", size)
    if not match:
        raise UserError(f"--size {size!r}: wanted WxH in pixels, for instance 1024x768")
    return int(match[2]), int(match[1])


def latent_grid(size: tuple[int, int], stride: int, patch: int) -> tuple[int, int]:
    """The latents (h, w) that hold an image of `size`: whole tokens, so often a little more."""
    unit = stride * patch  # pixels a side that one token covers
    if min(size) < unit:
        raise UserError(
            f"--size {size[1]}x{size[0]} is below this model's minimum of {unit}x{unit}"
        )
    return tuple(math.ceil(side / unit) * patch for side in size)


def crop(image: Tensor, size: tuple[int, int]) -> Tensor:
    """The middle of (..., H, W)."""
    top, left = ((full - side) // 2 for full, side in zip(image.shape[-2:], size))
    return image[..., top : top + size[0], left : left + size[1]]


def output_paths(out: str, jobs: list[tuple[str, int]]) -> list[Path]:
    """Named by index and seed: a prompt may hold anything."""
    folder = Path(out)
    if folder.suffix == ".png":
        if len(jobs) > 1:
            raise UserError(
                f"--out {out} is one file, there are {len(jobs)} pictures: name a folder"
            )
        return [folder]
    if folder.suffix in (".jpg", ".jpeg", ".webp") or folder.is_file():
        raise UserError(f"--out {out}: wanted a folder, or a .png, which can keep the recipe")
    return [folder / f"{i:04d}_seed{seed}.png" for i, (_, seed) in enumerate(jobs)]


def make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out: {folder} cannot be made ({error}): name another") from None


def read_recipe(config: Config) -> tuple[Config, Tensor | None]:
    """The config of a PNG, or of kept latents (and they), on this machine's terms."""
    path, latents = Path(config.from_), None
    ours = [f.name for f in fields(Config) if f.name not in (*HERE, "device")]
    if given := [n for n in ours if getattr(config, n) != getattr(Config, n)]:
        flags = ", ".join(f"--{name.replace('_', '-')}" for name in given)
        raise UserError(
            f"--from {path} repeats its recipe, with {flags} it would be another: leave out either"
        )
    if path.suffix == ".safetensors":
        saved = weights.open_checkpoint(path)
        recipe = saved.metadata.get("recipe")
        latents = saved.get("latents") if recipe else None
    else:
        try:
            with Image.open(path) as image:
                recipe = image.info.get("recipe")
        except OSError as error:
            raise UserError(f"--from {path} is not a readable picture ({error})") from None
    try:
        told = json.loads(recipe).items()
    except (TypeError, ValueError, AttributeError):
        raise UserError(f"--from {path} carries no recipe of this program") from None
    spelled = [(name.replace("_", "-"), value) for name, value in told]
    flags = [
        f"--{name}={value}" if not isinstance(value, bool) else f"--{'' if value else 'no-'}{name}"
        for name, value in spelled
    ]
    told = script.parse_config(Config, __doc__, flags)
    here = {name: getattr(config, name) for name in HERE}
    return replace(told, **here | {"device": config.device or told.device, "from_": ""}), latents


def complete(config: Config, spec: dict, device: torch.device) -> Config:
    """Every default filled in, so that the recipe in the PNG needs none."""
    if config.negative_prompt and not is_sana(spec):
        raise UserError("--negative-prompt is for SANA: FLUX is guidance-distilled and takes none")
    steps = spec["steps"] if config.steps is None else config.steps
    guidance = spec["guidance"] if config.guidance is None else config.guidance
    if steps < 1 or not math.isfinite(guidance):
        raise UserError(f"--steps {steps} --guidance {guidance}: wanted 1 or more, and a number")
    plain = device.type != "cuda" or spec["text"] == "toy"
    dtype = config.dtype or ("fp32" if plain else "bf16")
    size = config.size or f"{spec['size']}x{spec['size']}"
    filled = {"device": str(device), "dtype": dtype, "steps": steps, "guidance": guidance}
    return replace(config, **filled, size=size)


def write_recipe(config: Config, prompt: str, seed: int) -> str:
    told = asdict(replace(config, prompt=prompt, seed=seed, n=1, prompts=""))
    return json.dumps({name: value for name, value in told.items() if name not in HERE})


def save_pictures(
    autoencoder: nn.Module,
    latents: Tensor,
    config: Config,
    jobs: list[tuple[str, int]],
    paths: list[Path],
) -> None:
    """Decode, crop, write. Latents took minutes to make: they are kept if that fails."""
    if not torch.isfinite(latents).all():
        raise UserError(f"the latents hold NaN or Inf in {config.dtype}: try --dtype bf16 or fp32")
    rows, size = list(zip(latents.split(1), jobs, paths)), parse_size(config.size)
    together = decoded_together(autoencoder, latents)
    for first in range(0, len(rows), together):
        few = rows[first : first + together]
        try:
            images = decode(autoencoder, torch.cat([single for single, _, _ in few]))
            pictures = [dcae.to_pil(crop(image, size)) for image in images]
            with ThreadPoolExecutor(8) as pool:  # compressing does not hold the GIL
                list(pool.map(lambda picture, row: write(picture, config, *row[1:]), pictures, few))
        except (RuntimeError, OSError) as error:  # no memory, on any device; no room on the disk
            kept = [keep_latents(config, *row) for row in rows[first:]]
            reason = str(error).split("\n")[0]
            others = f" (and {len(kept) - 1} more beside it)" * (len(kept) > 1)
            raise UserError(
                f"decoding failed ({reason}); the latents are in {kept[0]}{others}: "
                f"python sample.py --from {kept[0]} decodes them, with --device cpu if need be"
            ) from error


def write(picture: Image.Image, config: Config, job: tuple[str, int], path: Path) -> None:
    """As a PNG with its recipe; for --prompts its caption too."""
    notes = PngImagePlugin.PngInfo()
    notes.add_text("recipe", write_recipe(config, *job))
    notes.add_text("Software", f"torch {torch.__version__}")
    how = dict(pnginfo=notes, compress_level=1)  # at 4096 x 4096 1 s instead of 3
    weights.write_whole(path, lambda file: picture.save(file, **how))
    if config.prompts:  # the layout that align.py --data reads; written last, it marks the end
        path.with_suffix(".txt").write_text(" ".join(job[0].split()) + "\n")


def keep_latents(config: Config, latents: Tensor, job: tuple[str, int], path: Path) -> Path:
    kept = path.with_suffix(".latents.safetensors")
    weights.save(kept, {"latents": latents}, {"recipe": write_recipe(config, *job)})
    return kept


def unmade(
    config: Config, jobs: list[tuple[str, int]], paths: list[Path]
) -> tuple[list[tuple[str, int]], list[Path]]:
    """What an interrupted --prompts run has left: no caption yet, or pictures of another recipe."""
    rows = list(zip(jobs, paths))
    if config.prompts:
        rows = [(job, path) for job, path in rows if not is_made(config, job, path)]
        if done := len(jobs) - len(rows):
            print(f"{done} of {len(jobs)} pictures are there already, of this very recipe")
    return [job for job, _ in rows], [path for _, path in rows]


def is_made(config: Config, job: tuple[str, int], path: Path) -> bool:
    if not (path.exists() and path.with_suffix(".txt").exists()):
        return False
    try:
        with Image.open(path) as image:
            return image.info.get("recipe") == write_recipe(config, *job)
    except OSError:
        return False


def decode_kept(config: Config, latents: Tensor) -> None:
    """`--from x.latents.safetensors`: the end of a run whose decoder failed."""
    device, dtype = script.pick_device(config.device), script.pick_dtype(config.dtype)
    source = describe(config.model, config.autoencoder)["autoencoder"]
    autoencoder = load_autoencoder(source, config.weights, device, dtype)
    jobs = [(config.prompt, config.seed)]
    (path,) = paths = output_paths(config.out, jobs)
    make_folder(path.parent)
    save_pictures(autoencoder, latents, config, jobs, paths)
    print(json.dumps({"stage": "decode", "files": [str(path)]}))


def clock(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def main() -> None:
    config = script.parse_config(Config, f"{__doc__}\nnames: {', '.join(MODELS)}")
    if config.from_:
        config, kept_latents = read_recipe(config)
        if kept_latents is not None:
            return decode_kept(config, kept_latents)
    device = script.pick_device(config.device)
    spec = describe(config.model, config.autoencoder)
    if config.fp8 and spec.get("stage") == "quant":
        raise UserError(f"--fp8 and {config.model}, which is quantized already: leave --fp8 out")
    config = complete(config, spec, device)
    name, attend = pick_attention(config.attention, device, script.pick_dtype(config.dtype))
    config = replace(config, attention=name)
    dtype, size = script.pick_dtype(config.dtype), parse_size(config.size)
    jobs = read_jobs(config)
    paths = output_paths(config.out, jobs)
    jobs, paths = unmade(config, jobs, paths)
    if not jobs:
        return print(json.dumps({"stage": "sample", "files": []}))
    parts = (config.model, config.autoencoder, config.weights)
    _, transformer, autoencoder = load_pipeline(*parts, "meta")  # does it fit, before it is read
    grid = latent_grid(size, autoencoder.stride, transformer.patch_size)
    channels, tokens = transformer.latent_channels, math.prod(grid) // transformer.patch_size**2
    sigmas = timesteps(config.steps, spec["schedule"], tokens, channels, spec.get("shift"))
    print_header(config, spec, grid, tokens, autoencoder.stride)

    times = [clock(device)]
    cond, null_cond = encode_text(config, spec, [prompt for prompt, _ in jobs], device, dtype)
    make_folder(paths[0].parent)
    times.append(clock(device))
    _, transformer, autoencoder = load_pipeline(*parts, device, dtype)
    transformer.attention = attend
    if config.fp8:
        kernels.to_fp8(transformer)
    stepper = speed_up(transformer, autoencoder) if config.fast and device.type == "cuda" else None
    times.append(clock(device))
    seconds = {"text": times[1] - times[0], "load": times[2] - times[1], "sample": 0, "decode": 0}
    batches = range(0, len(jobs), config.batch_size)
    with tqdm(total=len(batches) * config.steps, desc="sample", unit="step") as bar:
        for first in batches:
            rows = slice(first, first + config.batch_size)
            noise = draw_noise([seed for _, seed in jobs[rows]], (channels, *grid)).to(device)
            words = tuple(c[rows].to(device) for c in cond)
            null = tuple(c.expand(len(noise), *c.shape[1:]).to(device) for c in null_cond) or None
            guidance = config.guidance if null or not is_sana(spec) else None
            times = [clock(device)]
            how = (guidance, null, spec["solver"], bar, stepper)
            latents = sample(transformer, words, noise, sigmas, *how)
            times.append(clock(device))
            save_pictures(autoencoder, latents, config, jobs[rows], paths[rows])
            seconds["sample"] += times[1] - times[0]
            seconds["decode"] += clock(device) - times[1]
    report(config, paths, tokens, seconds, device)


def print_header(
    config: Config, spec: dict, grid: tuple[int, int], tokens: int, stride: int
) -> None:
    print(
        f"sample | {config.model} + {spec['autoencoder']} | {config.size}, {tokens} tokens | "
        f"{config.steps} {spec['solver']} steps, guidance {config.guidance:g} | {config.dtype} | "
        f"seed {config.seed} | {config.device}, {config.attention} attention"
    )
    made = f"{grid[1] * stride}x{grid[0] * stride}"
    if made != config.size:
        print(f"{config.size} does not fit the latent grid: made as {made}, its middle kept")


def report(
    config: Config, paths: list[Path], tokens: int, seconds: dict, device: torch.device
) -> None:
    seconds = {name: round(value, 3) for name, value in seconds.items()}
    print("\n        " + "".join(f"{name:>9}" for name in seconds))
    print("seconds " + "".join(f"{value:9.2f}" for value in seconds.values()))
    print(f"\nsaved  {paths[0]}" + f"  and {len(paths) - 1} more" * (len(paths) > 1))
    print(f"next   python sample.py --from {paths[0]}   # the same picture again")
    figures = {"stage": "sample", "model": config.model, "size": config.size, "tokens": tokens}
    figures |= {"steps": config.steps, "guidance": config.guidance, "dtype": config.dtype}
    figures |= {"device": config.device, "seconds": seconds}
    if device.type == "cuda":
        figures["peak_gb"] = round(torch.cuda.max_memory_allocated(device) / 1e9, 2)
    print(json.dumps(figures | {"files": [str(path) for path in paths]}))


if __name__ == "__main__":
    script.exit_cleanly(main)
