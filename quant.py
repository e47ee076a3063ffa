"""Quantization: a transformer in 4 bits, with a thin 16-bit branch for what 4 bits cannot hold.

What    python quant.py
        python quant.py --model flux-krea --lora runs/flux-krea/lora.safetensors --calib prompts.txt
        The first quantizes the toy's DC-Gen model and shows it beside the 16-bit one, rung by rung
        of the ladder. What it writes, runs/<model>/quant.safetensors, is a --model of sample.py.
Why     A large transformer's step is matrix products. Four bits hold its weights in 2/7 of the
        memory, and Blackwell's tensor cores multiply four bits at four times the rate of sixteen.
        But a 4-bit number has 15 values, and one outlier among 16 neighbours costs them all.
How     Outliers of the inputs are moved into the weights, and out of the weights into two thin
        16-bit matrices; only what is left, which has none, is rounded (Q; models/nvfp4.py):
            x' = x * s,    W' = W / s,    W' = L R + E,    L (N, r), R (r, K)                  (1)
            y = Q(x') Q(E)^T + (x' R^T) L^T + bias                                             (2)
        s = max|W|^beta / max|x|^alpha a channel, the pair with the least error of y on inputs
        that the layer had along the sampler's own trajectories. Then in rounds: L R explains
        W' - Q(E) better than it explained W', and leaves another E.
        GPTQ (--gptq) rounds E column by column, each making up for the errors of those before.
Cost    FLUX 12B: 6.6 GiB instead of 22.2; minutes on one GPU, printed by tests/test_full_size.py.
Source  SVDQuant, arXiv 2411.05007, and its layer lists and search in deepcompressor (MIT HAN Lab,
        Apache 2.0), written anew; GPTQ, arXiv 2210.17323; low rank by arXiv 0909.4061.
Differs Block scales minimise the block's squared error (--scales amax: the published rule). FLUX's
        fused layers of single blocks have one branch of twice the rank where the reference has
        two; each smoothing is scored by its own layer's output, not by the attention behind it;
        the modulations are NVFP4 too (there: INT4), and so is SANA's (there: 16 bits).

--model synthetic prints what each part is worth on made-up layers (CPU: some 10 minutes).
"""

import json
import math
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

import dcae
import sample
from models import kernels, nvfp4, runs, script, text, toy, weights
from models.flux import Flux
from models.nvfp4 import (
    BLOCK,
    E2M1_MAX,
    E4M3_MAX,
    QuantLinear,
    block_scales,
    into_blocks,
    pack,
    put,
    round_activations,
    round_blocks,
    round_e2m1,
    round_fp8,
    use,
)
from models.sana import Sana
from models.script import UserError


@dataclass(frozen=True)
class Config:
    model: str = "dc-gen-toy"  # a name in sample.MODELS, a path, or a run of ours
    lora: str = ""  # lora.py's file, merged first; "": runs/<model>'s if there is one; none: none
    autoencoder: str = ""  # "": the model's own; a preset or a path
    calib: str = ""  # prompts, .txt or .jsonl, of which 32 are sampled; "": the toy's captions
    weights: str = ""  # a folder to look in instead of the hub
    format: str = "nvfp4"  # or fp8: e4m3, a scale a row, nothing to calibrate
    mode: str = ""  # how to compute: fake | w4a4 | w4a8; "": the best of this device
    rank: int = 32  # of the 16-bit branch; 0: none
    grid: int = 20  # smoothing exponents to try, in steps of 1 / grid; 0: no smoothing
    rounds: int = 20  # of eq. (1), at most: it ends when the output's error no longer falls
    scales: str = "mse"  # of weight blocks: mse, or amax as published
    gptq: bool = False  # round column by column, later ones making up for earlier ones
    tokens: int = 4096  # inputs kept for each layer; a quarter of them judge, and choose nothing
    ladder: bool | None = None  # plain, + smoothing, ... each in full; unless given, for toys only
    pictures: int = 4  # to compare with the 16-bit model's
    per_task: int = 12  # toy prompts of each task to score by
    steps: int | None = None  # of the sampler; the model's own unless given
    seed: int = 0
    device: str = ""  # "": cuda, or cpu
    dtype: str = ""  # of what stays in 16 bits; "": fp32 on the CPU and for toys, else bf16
    out: str = ""  # "": runs/<model>


# ---- one layer

# Which layers become what: (a module's name, bits of its inputs, how many published layers it
# holds, each with a branch of its own). What is not listed stays in 16 bits.
LAYERS = {
    Flux: (
        (r"double_blocks\.\d+\.(img|txt)_(attn\.(qkv|proj)|mlp\.[02])", 4, 1),
        (r"single_blocks\.\d+\.linear[12]", 4, 2),
        (r".*_blocks\.\d+\.(img_mod|txt_mod|modulation)\.lin", 16, 0),  # one row an image
    ),
    # Cross-attention's keys and values and the depthwise convolution stay as they are.
    Sana: (
        (r"blocks\.\d+\.(attn\.(qkv|proj)|cross_attn\.(q_linear|proj))", 4, 1),
        (r"blocks\.\d+\.mlp\.(inverted|point)_conv\.conv", 4, 1),  # 1x1: a linear layer
        (r"t_block\.1", 16, 0),  # the modulation of all blocks
    ),
}


def layers_of(model: nn.Module) -> dict[str, tuple[int, int]]:
    """{module's name: (bits of its inputs, branches)} of what is quantized in this model."""
    found = {}
    for name, _ in model.named_modules():
        for pattern, bits, branches in LAYERS[type(model)]:
            if re.fullmatch(pattern, name):
                found[name] = (bits, branches)
    return found


def weight_scales(blocks: Tensor, tensor_scale: float, rule: str) -> Tensor:
    """(N, B) e4m3. "mse": of the published scale and its neighbours the one of least error.

    Shrinking a scale clips the block's maximum and refines the other 15: 10% less error on
    Gaussian weights, found once, free afterwards.
    """
    published = block_scales(blocks, tensor_scale)
    if rule == "amax":
        return published
    best, least = published, torch.full(published.shape, torch.inf, device=blocks.device)
    for steps in (0, -1, -2, 1):  # neighbours in E4M3 are neighbours as integers
        code = (published.view(torch.uint8).int() + steps).clamp(0, 126).to(torch.uint8)
        scales = code.view(torch.float8_e4m3fn)
        error = (round_blocks(blocks, scales, tensor_scale)[1] - blocks).square().sum(-1)
        better = error < least
        best = torch.where(better, code, best.view(torch.uint8)).view(torch.float8_e4m3fn)
        least = torch.where(better, error, least)
    return best


def low_rank(matrix: Tensor, rank: int, steps: int = 4) -> tuple[Tensor, Tensor]:
    """(N, K) -> L (N, r), R (r, K) with L R nearly the best approximation of that rank.

    Subspace iteration from a random start (arXiv 0909.4061): a few products with thin matrices in
    place of a full decomposition, seconds for every layer of FLUX in place of hours.
    """
    wide = min(rank + 16, *matrix.shape)  # more directions than wanted: they converge faster
    generator = torch.Generator("cpu").manual_seed(0)
    basis = torch.randn(matrix.shape[1], wide, generator=generator).to(matrix.device)
    for _ in range(steps):
        basis = orthonormal(matrix.T @ (matrix @ basis))  # (K, wide)
    projected = matrix @ basis  # (N, wide); its singular vectors are the matrix's
    _, rotation = torch.linalg.eigh(projected.double().T @ projected.double())
    top = rotation[:, -rank:].float()  # eigenvalues ascend
    return projected @ top, (basis @ top).T


def orthonormal(columns: Tensor) -> Tensor:
    """Q of a QR decomposition by Cholesky's: a GPU takes 10 times longer for Householder's.

    It squares the condition number, which fp64 has room for; columns of zeros stay small.
    """
    gram = columns.double().T @ columns.double()
    gram.diagonal().add_(1e-12 * gram.diagonal().mean() + 1e-300)
    lower = torch.linalg.cholesky(gram)
    return torch.linalg.solve_triangular(lower, columns.double().T, upper=False).T.float()


@dataclass
class Layer:
    """One way to quantize a layer; what the search compares."""

    smooth: Tensor  # (K,)
    residual: Tensor  # (N, K) fp32, E of eq. (1)
    scales: Tensor  # (N, B) e4m3
    tensor_scale: float
    rounded: Tensor  # (N, K) fp32, Q(E)
    down: Tensor | None = None  # (r, K)
    up: Tensor | None = None  # (N, r)

    def output(self, inputs: Tensor) -> Tensor:
        """eq. (2) without bias: (T, K) -> (T, N)."""
        out = round_activations(inputs * self.smooth) @ self.rounded.T
        return out if self.up is None else out + (inputs @ self.down.T) @ self.up.T


def split(
    weight: Tensor, smooth: Tensor, rank: int, rule: str, explain: Tensor | float = 0.0
) -> Layer:
    """eq. (1): L R approximates W / s - `explain`; the rest of W / s is rounded."""
    scaled, down, up = weight / smooth, None, None
    residual = scaled
    if rank:
        up, down = low_rank(scaled - explain, rank)
        # Rounded first, so that the residual takes up what the 16 bits lose.
        up, down = up.bfloat16().float(), (down * smooth).bfloat16().float()
        residual = scaled - up @ (down / smooth)
    blocks = into_blocks(residual)
    tensor_scale = max(blocks.abs().max().item() / (E2M1_MAX * E4M3_MAX), 1e-30)
    scales = weight_scales(blocks, tensor_scale, rule)
    _, rounded = round_blocks(blocks, scales, tensor_scale)
    rounded = rounded.flatten(1)[:, : weight.shape[1]]
    return Layer(smooth, residual, scales, tensor_scale, rounded, down, up)


def smoothing(inputs: Tensor, weight: Tensor, alpha: float, beta: float) -> Tensor:
    """(K,), what multiplies the inputs: max|W|^beta / max|x|^alpha; 1 for a channel without."""
    s = weight.abs().amax(0) ** beta / inputs.abs().amax(0) ** alpha
    s = torch.where(s.isfinite() & (s > 0), s, 1.0)
    return s.bfloat16().float()  # as it is kept: W / s is then exact


def exponents(grid: int) -> list[tuple[float, float]]:
    """The (alpha, beta) that are tried, (0, 0) first: 39 pairs for a grid of 20."""
    steps = [i / grid for i in range(1, grid)]
    return [(0.0, 0.0), *((a, 0.0) for a in steps), *((a, 1 - a) for a in steps)]


def quantize(weight: Tensor, inputs: Tensor, config: Config, rank: int) -> tuple[Layer, tuple]:
    """(the best way found, its alpha and beta), by the error of the output (T, N).

    weight (N, K); inputs (T, K): what the layer's look like.
    """
    wanted, rank = inputs @ weight.T, min(rank, *weight.shape)

    def error(layer: Layer) -> float:
        return (layer.output(inputs) - wanted).square().sum().item()

    least, best, pair = math.inf, None, (0.0, 0.0)
    for alpha, beta in exponents(config.grid) if config.grid else [(0.0, 0.0)]:
        layer = split(weight, smoothing(inputs, weight, alpha, beta), rank, config.scales)
        if (found := error(layer)) < least:
            least, best, pair = found, layer, (alpha, beta)
    for _ in range(config.rounds if rank else 0):
        # What L R has to explain is W / s less what rounding already holds.
        layer = split(weight, best.smooth, rank, config.scales, best.rounded)
        if (found := error(layer)) >= least:
            break
        least, best = found, layer
    return best, pair


def gptq(layer: Layer, inputs: Tensor, width: int = 128) -> Layer:
    """Round column by column; the columns to come make up for each one's error on the inputs.

    With H = X^T X of the smoothed inputs, the error e of a column changes the others by
    -e / U[j, j] U[j, j:], U the upper Cholesky factor of H^-1 (arXiv 2210.17323, eq. 2-3).
    Columns go by falling diag H, so that those that matter most are rounded while all others can
    still help; the block scales stay as they are.
    """
    smoothed = inputs * layer.smooth
    hessian = smoothed.T @ smoothed
    diagonal = hessian.diagonal()
    diagonal[diagonal == 0] = 1  # a channel that is never used
    order = diagonal.argsort(descending=True)
    hessian = hessian[order][:, order]
    hessian.diagonal().add_(0.01 * diagonal.mean())
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian))
    upper = torch.linalg.cholesky(inverse, upper=True)
    decode = layer.scales.float().repeat_interleave(BLOCK, 1) * layer.tensor_scale
    decode = torch.where(decode == 0, torch.inf, decode)[:, order]  # (N, K)
    left, rounded = layer.residual[:, order], torch.empty_like(layer.residual)
    for first in range(0, left.shape[1], width):
        rows = slice(first, min(first + width, left.shape[1]))
        errors = torch.empty_like(left[:, rows])
        for j in range(rows.start, rows.stop):
            scale = decode[:, j]
            value = round_e2m1(left[:, j] / scale) * torch.where(scale.isinf(), 0.0, scale)
            error = (left[:, j] - value) / upper[j, j]
            left[:, j : rows.stop] -= error[:, None] * upper[j, j : rows.stop]
            rounded[:, j], errors[:, j - first] = value, error
        left[:, rows.stop :] -= errors @ upper[rows, rows.stop :]
    return replace(layer, rounded=torch.empty_like(rounded).index_copy_(1, order, rounded))


# ---- calibration

PROMPTS = 32  # that calibration samples: 640 (prompt, step) pairs at 20 steps; the reference, 128
KEPT_BYTES = 16e9  # of calibration inputs at a time; layers beyond it wait for another pass
SEARCHED = 4096  # of them choose the smoothing; GPTQ reads all


@dataclass(frozen=True)
class Trip:
    """All that a trajectory depends on but the transformer."""

    cond: text.Cond  # of every prompt, on the CPU
    null_cond: text.Cond
    shape: tuple[int, int, int]  # of the latents (C, h, w)
    sigmas: Tensor
    guidance: float | None
    solver: str
    seed: int  # of the first prompt's noise
    batch: int

    def latents(self, model: nn.Module, rows: range, bar: tqdm | None = None) -> Tensor:
        """(n, C, h, w) of the prompts in `rows`, by the project's own sampler."""
        device, made = next(model.parameters()).device, []
        for first in range(rows.start, rows.stop, self.batch):
            some = range(first, min(first + self.batch, rows.stop))
            noise = sample.draw_noise([self.seed + i for i in some], self.shape).to(device)
            cond = tuple(c[some.start : some.stop].to(device) for c in self.cond)
            null = tuple(c.expand(len(some), *c.shape[1:]).to(device) for c in self.null_cond)
            settings = (self.sigmas, self.guidance, null or None, self.solver, bar)
            made.append(sample.sample(model, cond, noise, *settings))
        return torch.cat(made)


def plan(
    config: Config,
    spec: dict,
    model: nn.Module,  # on the meta device will do
    stride: int,
    prompts: list[str],
    device: torch.device,
    dtype: torch.dtype,
) -> Trip:
    settings = sample.Config(steps=config.steps, weights=config.weights)
    settings = sample.complete(settings, spec, device)
    grid = sample.latent_grid(sample.parse_size(settings.size), stride, model.patch_size)
    tokens, channels = math.prod(grid) // model.patch_size**2, model.latent_channels
    cond, null_cond = sample.encode_text(settings, spec, prompts, device, dtype)
    return Trip(
        cond,
        null_cond,
        (channels, *grid),
        sample.timesteps(settings.steps, spec["schedule"], tokens, channels, spec.get("shift")),
        settings.guidance if null_cond or not sample.is_sana(spec) else None,
        spec["solver"],
        config.seed * 10_000,
        64 if spec["text"] == "toy" else 1,
    )


@torch.no_grad()
def collect(model: nn.Module, names: list[str], trip: Trip, rows: range, tokens: int) -> dict:
    """{name: (tokens, K)}: inputs of those layers, as many from every call of every trajectory."""
    steps = len(trip.sigmas) - 1
    each = math.ceil(tokens / (math.ceil(len(rows) / trip.batch) * steps))
    kept = {name: [] for name in names}

    def keep(name: str) -> Callable:
        def hook(module: nn.Module, args: tuple) -> None:
            inputs = args[0].movedim(1, -1) if args[0].dim() == 4 else args[0]
            inputs = inputs.flatten(0, -2)  # (B N, K)
            generator = torch.Generator("cpu").manual_seed(len(kept[name]))
            chosen = torch.randperm(len(inputs), generator=generator)[:each]
            kept[name].append(inputs[chosen.to(inputs.device)])

        return hook

    hooks = [model.get_submodule(n).register_forward_pre_hook(keep(n)) for n in names]
    with tqdm(total=math.ceil(len(rows) / trip.batch) * steps, desc="quant calibrate") as bar:
        trip.latents(model, rows, bar)
    for hook in hooks:
        hook.remove()
    order = torch.Generator("cpu").manual_seed(0)  # one for all: calls are mixed, then cut
    return {n: torch.cat(k)[torch.randperm(sum(map(len, k)), generator=order)[:tokens]]
            for n, k in kept.items()}  # fmt: skip


# ---- model


def quantize_model(
    model: nn.Module, config: Config, gather: Callable, progress: Path | None, key: str
) -> tuple[dict[str, Tensor], dict[str, dict]]:
    """(state dict, {layer: what its QuantLinear is made with, and its errors}) of the whole model.

    gather(names) gives inputs of those layers. A layer that lies finished in the folder `progress`
    under the same key is read, not made again.
    """
    layers = layers_of(model)
    finished = {n: done for n in layers if (done := read_layer(progress, n, key))}
    bar = tqdm(total=len(layers), initial=len(finished), desc="quant", unit="layer")
    for group in memory_groups(model, [n for n in layers if n not in finished], config.tokens):
        names = tuple(n for n in group if layers[n][0] < 16)
        inputs = gather(names) if names else {}
        for name in group:
            done = quantize_layer(name, model, *layers[name], inputs.get(name), config)
            finished[name] = done
            if progress is not None:
                notes = {"key": key, "notes": json.dumps(done[1])}
                weights.save(progress / f"{name}.safetensors", done[0], notes)
            bar.update()
    bar.close()
    state = {n: t for n, t in model.state_dict().items() if n.removesuffix(".weight") not in layers}
    for name, (tensors, _) in finished.items():
        state |= {f"{name}.{kind}": tensor for kind, tensor in tensors.items()}
    return state, {name: notes for name, (_, notes) in finished.items()}


def read_layer(progress: Path | None, name: str, key: str) -> tuple[dict, dict] | None:
    path = progress and progress / f"{name}.safetensors"
    if not path or not path.exists():
        return None
    file = weights.open_checkpoint(path)
    if file.metadata.get("key") != key:
        return None
    return {n: file.get(n) for n in file.shapes}, json.loads(file.metadata["notes"])


def memory_groups(model: nn.Module, names: list[str], tokens: int) -> list[list[str]]:
    """Layers whose calibration inputs are in memory together; each group is another sampling."""
    groups, size = [], math.inf
    for name in names:
        weight = model.get_submodule(name).weight
        needed = tokens * weight.shape[1] * weight.element_size()
        if size + needed > KEPT_BYTES:
            groups, size = [*groups, []], 0
        groups[-1].append(name)
        size += needed
    return groups


@torch.no_grad()
def quantize_layer(
    name: str, model: nn.Module, bits: int, branches: int, inputs: Tensor | None, config: Config
) -> tuple[dict[str, Tensor], dict]:
    """(tensors of its QuantLinear on the CPU, what else it needs, with its errors)."""
    weight = model.get_submodule(name).weight.detach().flatten(1).float()
    for what, numbers in ((f"{name}.weight", weight), (f"the inputs of {name}", inputs)):
        if numbers is not None and not numbers.isfinite().all():
            raise UserError(f"{what} hold NaN or Inf: no scale fits them, check the checkpoint")
    ones = torch.ones(weight.shape[1], device=weight.device)
    layer, notes = split(weight, ones, 0, config.scales), {}
    if bits == 16:
        notes["error"] = relative(layer.rounded, weight)
    else:
        fitted, judged = inputs.float().tensor_split([len(inputs) * 3 // 4])
        wanted = judged @ weight.T
        notes["plain"] = relative(split(weight, ones, 0, "amax").output(judged), wanted)
        layer, (alpha, beta) = quantize(weight, fitted[:SEARCHED], config, branches * config.rank)
        if config.gptq:
            layer = gptq(layer, fitted)
        notes |= {"error": relative(layer.output(judged), wanted), "alpha": alpha, "beta": beta}
    rank = 0 if layer.up is None else layer.up.shape[1]
    notes |= {"rank": rank, "activations": bits, "tensor_scale": layer.tensor_scale}
    return {kind: t.cpu() for kind, t in layer_tensors(layer, bits).items()}, notes


@torch.no_grad()
def convert(model: nn.Module, rank: int = 32) -> None:
    """Put quantized layers into the model, without search or calibration: as fast as any other.

    For timing, and for memory. Pictures want `quantize_model`.
    """
    for name, (bits, branches) in layers_of(model).items():
        linear = model.get_submodule(name)
        if isinstance(linear, QuantLinear):
            continue  # of blocks shared with a model that is converted
        weight = linear.weight.detach().flatten(1).float()
        ones = torch.ones(weight.shape[1], device=weight.device)
        layer = split(weight, ones, min(branches * rank, *weight.shape), "amax")
        put(model, name, as_linear(linear, layer, bits))
    use(model)


def as_linear(linear: nn.Module, layer: Layer, bits: int) -> QuantLinear:
    """In the place of `linear`, on its device and in its dtype."""
    rank = 0 if layer.up is None else layer.up.shape[1]
    quantized = QuantLinear(linear, rank, bits, layer.tensor_scale)
    for kind, tensor in layer_tensors(layer, bits).items():
        is_packed = kind in ("packed", "scales")
        setattr(quantized, kind, tensor if is_packed else tensor.to(linear.weight.dtype))
    return quantized


def layer_tensors(layer: Layer, bits: int) -> dict[str, Tensor]:
    """What a QuantLinear holds, but for the bias."""
    decode = (layer.scales.float() * layer.tensor_scale)[..., None]
    values = round_e2m1(into_blocks(layer.rounded) / torch.where(decode == 0, torch.inf, decode))
    tensors = {"packed": pack(values.flatten(1)), "scales": layer.scales}
    if bits < 16:
        tensors["smooth"] = layer.smooth.bfloat16()
    if layer.up is not None:
        tensors |= {"down": layer.down.bfloat16(), "up": layer.up.bfloat16()}
    return {kind: tensor.contiguous() for kind, tensor in tensors.items()}  # kernels count on it


def relative(ours: Tensor, wanted: Tensor) -> float:
    return ((ours - wanted).norm() / wanted.norm().clamp(min=1e-30)).item()


# ---- the error table


def synthetic(name: str) -> tuple[Tensor, Tensor, Tensor]:
    """(calibration inputs, inputs that judge, weight) of a made-up layer with 3072 channels.

    A: normal. B: A's channels of uneven size, 32 of them 30 times larger. C: B with a strong
    rank-16 part and 32 large columns in W. D: B's inputs correlated, 8192 to calibrate on.
    """
    k, generator = 3072, torch.Generator().manual_seed(0)
    tokens = 8192 + 1024 if name == "D" else 2048

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    inputs, weight = normal(tokens, k), 0.02 * normal(k, k)
    if name == "D":  # token n is a mix of directions, the i-th of size i^-1/2
        size = torch.arange(1, k + 1) ** -0.5
        inputs = inputs * (size / size.square().mean().sqrt()) @ torch.linalg.qr(normal(k, k)).Q
    if name != "A":
        channel = torch.exp(0.5 * normal(k))
        channel[torch.randperm(k, generator=generator)[:32]] *= 30
        inputs = inputs * channel
    if name in "CD":
        weight += 0.02 / 4 * (normal(k, 16) @ normal(16, k))
    if name == "C":
        weight[:, torch.randperm(k, generator=generator)[:32]] *= 4
    return inputs[:-1024], inputs[-1024:], weight


def error_rows(fitted: Tensor, judged: Tensor, weight: Tensor) -> dict[str, Callable[[], float]]:
    """{method: () -> relative error of the output}: what each part of the method is worth."""
    config = Config(rank=32, scales="amax")
    wanted = judged @ weight.T

    def ours(layer: Layer) -> float:
        return relative(layer.output(judged), wanted)

    def fixed(alpha: float, rank: int, rule: str = "amax") -> Layer:
        return split(weight, smoothing(fitted, weight, alpha, alpha), rank, rule)

    def grid(**changed) -> Layer:
        so = replace(config, **{"rounds": 0} | changed)
        return quantize(weight, fitted[:SEARCHED], so, so.rank)[0]

    def both(rounding: Callable) -> float:
        return relative(rounding(judged) @ rounding(weight).T, wanted)

    return {
        "FP8 W8A8, a scale a row": lambda: both(round_fp8),
        "INT4 W4A4, groups of 64": lambda: both(round_int4),
        "MXFP4 W4A4, blocks of 32": lambda: both(round_mxfp4),
        "NVFP4 W4A16": lambda: relative(judged @ fixed(0, 0).rounded.T, wanted),
        "NVFP4 W16A4": lambda: relative(round_activations(judged) @ weight.T, wanted),
        "NVFP4 W4A8": lambda: relative(round_fp8(judged) @ fixed(0, 0).rounded.T, wanted),
        "NVFP4 W4A4": lambda: ours(fixed(0, 0)),
        "smoothing .5/.5": lambda: ours(fixed(0.5, 0)),
        "low rank": lambda: ours(fixed(0, 32)),
        "smoothing .5/.5, low rank": lambda: ours(fixed(0.5, 32)),
        "+ mse scales": lambda: ours(fixed(0.5, 32, "mse")),
        "+ GPTQ": lambda: ours(gptq(fixed(0.5, 32), fitted)),
        "smoothing by grid": lambda: ours(grid(rank=0)),
        "grid, low rank": lambda: ours(grid()),
        "grid, low rank, rounds": lambda: ours(grid(rounds=20)),
        "all of it but GPTQ": lambda: ours(grid(rounds=20, scales="mse")),
    }


def round_int4(x: Tensor) -> Tensor:
    groups = x.unflatten(-1, (-1, 64))
    scale = groups.abs().amax(-1, keepdim=True) / 7
    return ((groups / scale).round() * scale).flatten(-2)


def round_mxfp4(x: Tensor) -> Tensor:
    blocks = x.unflatten(-1, (-1, 32))
    scale = torch.exp2(blocks.abs().amax(-1, keepdim=True).log2().floor() - 2)
    return (round_e2m1(blocks / scale) * scale).flatten(-2)


def print_error_table(device: torch.device) -> None:
    """`--model synthetic`: relative errors of a layer's output, on inputs it was not fitted to."""
    sets = {name: error_rows(*(t.to(device) for t in synthetic(name))) for name in "ABCD"}
    print(f"{'relative error of the output':32}" + "".join(f"{name:>8}" for name in sets))
    errors = {}
    for row in sets["A"]:
        errors[row] = [round(sets[name][row](), 4) for name in sets]
        print(f"{row:32}" + "".join(f"{error:8.4f}" for error in errors[row]), flush=True)
    print(json.dumps(dict(stage="quant", model="synthetic", errors=errors)))


# ---- main


def rungs(config: Config, widest: int) -> dict[str, Config]:
    """The ladder: what each part of the method is worth. GPTQ where there are inputs enough."""
    plain = replace(config, rank=0, grid=0, rounds=0, scales="amax", gptq=False)
    ways = {
        "NVFP4": plain,
        "+ smoothing": replace(plain, grid=config.grid),
        "+ low rank": replace(config, scales="amax", gptq=False),
        "+ block scales": replace(config, scales="mse", gptq=False),
    }
    enough = config.tokens >= gptq_tokens(widest)
    return ways | ({"+ GPTQ": replace(config, scales="mse", gptq=True)} if enough else {})


def gptq_tokens(widest: int) -> int:
    """--tokens of which the fitted three quarters are twice the inputs of the widest layer."""
    return math.ceil(8 / 3 * widest)


def widest_of(model: nn.Module) -> int:
    layers = (name for name, (bits, _) in layers_of(model).items() if bits == 4)
    return max(model.get_submodule(name).weight.shape[1] for name in layers)


def check(config: Config, spec: dict, model: nn.Module, device: torch.device) -> None:
    """Refuse what cannot work before anything is computed."""
    least = dict(rank=0, grid=0, rounds=0, tokens=64, pictures=1, per_task=1, seed=0)
    for name, limit in least.items():
        if not limit <= getattr(config, name) < 2**40:
            flag = f"--{name.replace('_', '-')} {getattr(config, name)}"
            raise UserError(f"{flag}: wanted {limit} or more, below 2^40")
    if spec.get("stage") == "quant":
        raise UserError(f"{config.model} is quantized already: name what it was made of")
    if config.format not in ("nvfp4", "fp8"):
        raise UserError(f"--format {config.format!r}: wanted nvfp4 or fp8")
    if config.scales not in ("mse", "amax"):
        raise UserError(f"--scales {config.scales!r}: wanted mse or amax")
    nvfp4.pick_mode(config.mode, device)
    is_toy = spec["text"] == "toy"
    is_list = Path(config.calib).is_file() and Path(config.calib).suffix in (".txt", ".jsonl")
    if not is_list and (config.calib or not is_toy):
        raise UserError(
            f"--calib {config.calib!r}: calibration needs prompts, a .txt or .jsonl file of lines, "
            f"{PROMPTS} or more like those that the model will be asked for"
        )
    if config.gptq and config.tokens < gptq_tokens(widest_of(model)):
        raise UserError(
            f"--gptq with --tokens {config.tokens}: the widest layer has {widest_of(model)} inputs;"
            f" with less than twice as many to learn from GPTQ fits their noise and is worse "
            f"than rounding: --tokens {gptq_tokens(widest_of(model))} or more, or no --gptq"
        )
    if config.lora:
        run = weights.open_checkpoint(Path(config.lora)).metadata
        base = sample.describe(config.model)["transformer"]
        if run.get("stage") != "lora" or run.get("base") != base:
            raise UserError(
                f"--lora {config.lora} is of stage {run.get('stage')!r} and base "
                f"{run.get('base')!r}: wanted a file of lora.py for --model {config.model}"
            )


def checksum(model: nn.Module) -> float:
    return sum(p.double().square().sum().item() for p in model.parameters())


def settings_key(config: Config, origin: str) -> str:
    """What a finished layer depends on."""
    about = ("rank", "grid", "rounds", "scales", "gptq", "tokens", "steps", "seed", "dtype")
    return json.dumps([origin, {name: getattr(config, name) for name in about}])


def print_header(config: Config, model: nn.Module, trip: Trip, calls: int) -> None:
    layers = layers_of(model)
    held = sum(model.get_submodule(name).weight.numel() for name in layers)
    share = held / sum(p.numel() for p in model.parameters())
    print(
        f"quant | {config.lora or config.model} | {len(layers)} layers, {share:.1%} of the weights "
        f"| rank {config.rank} | calibrated on {calls} prompts x {len(trip.sigmas) - 1} steps | "
        f"seed {config.seed} | {next(model.parameters()).device}"
    )


def print_layers(layers: dict[str, dict]) -> None:
    """Error of the outputs by kind of layer: the mean over blocks, and the worst of them."""
    kinds = {}
    for name, row in layers.items():
        kinds.setdefault(re.sub(r"\.\d+\.", ".*.", name, count=1), []).append(row)
    print(f"\n{'error of the output':32} layers   NVFP4    ours   worst  (alpha, beta)")
    for kind, rows in kinds.items():
        plain, error = ([row.get(k, row["error"]) for row in rows] for k in ("plain", "error"))
        pairs = sorted((row["alpha"], row["beta"]) for row in rows if "alpha" in row)
        pair = "({:.2f}, {:.2f})".format(*pairs[len(pairs) // 2]) if pairs else "weights only"
        mean = [sum(values) / len(values) for values in (plain, error)]
        print(f"{kind:32} {len(rows):6}  {mean[0]:.4f}  {mean[1]:.4f}  {max(error):.4f}  {pair}")


def compare(
    images: dict[str, Tensor], layers: dict[str, dict[str, dict]], tasks: list
) -> dict[str, dict]:
    """Same prompts, same noise: how far from the 16-bit model's pictures, and the toy's score."""
    wanted, figures = images["16-bit"], {}
    for way, ours in images.items():
        pairs = [(a[None], b[None]) for a, b in zip(ours, wanted)]
        rates = toy.score(ours, tasks) if tasks else {}
        figures[way] = {name: rates[name] for name in ("seen", "held_out") if name in rates}
        if layers.get(way):
            found = [row["error"] for row in layers[way].values() if row["activations"] < 16]
            figures[way]["layers"] = sum(found) / len(found)
        if way != "16-bit":
            figures[way]["psnr"] = sum(dcae.psnr(*pair) for pair in pairs) / len(pairs)
            figures[way]["ssim"] = sum(dcae.ssim(*pair) for pair in pairs) / len(pairs)
    columns = {"layers": "layers", "psnr": "PSNR dB", "ssim": "SSIM"}
    columns |= {"seen": "seen", "held_out": "held out"} if tasks else {}
    print(f"\n{len(wanted)} pictures  " + "".join(f"{title:>10}" for title in columns.values()))
    for way, row in figures.items():
        cells = [f"{row[c]:10.3f}" if c in row else " " * 10 for c in columns]
        print(f"{way:13} " + "".join(cells))
    return figures


def read_prompts(config: Config, is_toy: bool) -> tuple[list[str], list[str], list[toy.Prompt]]:
    """(prompts to calibrate on, prompts to show, what the toy's scorer wants of the latter)."""
    if config.calib:
        given = [prompt for prompt, _ in sample.read_jobs(sample.Config(prompts=config.calib))]
    else:
        given = toy.captions(toy.draw_scenes(PROMPTS, seed=config.seed), seed=config.seed)
    tasks = toy.draw_prompts(config.per_task, seed=7) if is_toy else []
    others = given[PROMPTS:] or given
    return given[:PROMPTS], [task.text for task in tasks] or others[: config.pictures], tasks


def find_lora(config: Config, out: Path) -> str:
    """lora.py's file of this model: --lora, or what lies in the run folder; "" for none."""
    own = out / "lora.safetensors"
    return {"": str(own) if own.exists() else "", "none": ""}.get(config.lora, config.lora)


def main() -> None:
    config = script.parse_config(Config, __doc__)
    device = script.pick_device(config.device)
    if device.type == "mps":  # which has no float8
        device = torch.device("cpu")
    torch.set_float32_matmul_precision("high")  # errors of 3% are compared: TF32 is enough
    if config.model == "synthetic":
        return print_error_table(device)
    out = runs.folder_of(config)
    with runs.locked(out):
        run(replace(config, lora=find_lora(config, out)), device, out)


@torch.no_grad()
def run(config: Config, device: torch.device, out: Path) -> None:
    parts = (config.lora or config.model, config.autoencoder, config.weights)
    # First on the meta device, without memory: refuse what cannot work.
    spec, rehearsal, autoencoder = sample.load_pipeline(*parts, "meta")
    check(config, spec, rehearsal, device)
    is_toy = spec["text"] == "toy"
    plain = is_toy or device.type == "cpu"
    dtype = script.pick_dtype(config.dtype or ("fp32" if plain else "bf16"))
    prompts, shown, tasks = read_prompts(config, is_toy)
    words = [*shown, *prompts]
    trip = plan(config, spec, rehearsal, autoencoder.stride, words, device, dtype)
    spec, model, autoencoder = sample.load_pipeline(*parts, device, dtype)
    _, model.attention = sample.pick_attention("", device, dtype)
    print_header(config, model, trip, len(prompts))

    @lru_cache(maxsize=1)
    def gather(names: tuple[str, ...]) -> dict[str, Tensor]:
        rows = range(len(shown), len(shown) + len(prompts))
        return collect(model, names, trip, rows, config.tokens)

    def pictures(transformer: nn.Module) -> Tensor:
        transformer.attention = model.attention
        return sample.decode(autoencoder, trip.latents(transformer, range(len(shown))))

    has_ladder = config.format == "nvfp4" and (is_toy if config.ladder is None else config.ladder)
    ways = rungs(config, widest_of(model)) if has_ladder else {}
    chosen = next((way for way, rung in ways.items() if rung == config), config.format)
    images, seconds, layers = {"16-bit": pictures(model)}, {}, {}
    saved, origin = out / "quant.safetensors", f"{checksum(model)!r} {prompts}"
    for way, rung in (ways | {chosen: config}).items():
        start, progress = sample.clock(device), out / "quant.progress" / re.sub(r"\W+", "-", way)
        if config.format == "fp8":
            kernels.to_fp8(model)
            state, layers[way] = model.state_dict(), {}
        else:
            key = settings_key(rung, origin)
            state, layers[way] = quantize_model(model, rung, gather, progress, key)
        seconds[way] = round(sample.clock(device) - start, 2)
        told = write_header(config, spec, model, layers[way])
        if way == chosen:
            weights.save(saved, state, told)
            quantized = weights.open_checkpoint(saved)  # as a user will
        else:
            shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
            quantized = weights.Checkpoint(saved, model.config, told, shapes, state)
        images[way] = pictures(nvfp4.assemble(quantized, device, dtype, config.mode))
    shutil.rmtree(out / "quant.progress", ignore_errors=True)
    report(config, images, layers, chosen, seconds, saved, tasks, shown)


def report(
    config: Config,
    images: dict[str, Tensor],
    layers: dict[str, dict],
    chosen: str,
    seconds: dict[str, float],
    saved: Path,
    tasks: list,
    shown: list[str],
) -> None:
    if layers[chosen]:
        print_layers(layers[chosen])
    figures = compare(images, layers, tasks)
    files = [str(saved), str(saved.with_suffix(".png"))]
    sheet = {way: rows[:6].float() for way, rows in images.items()}
    sample.save_sheet(saved.with_suffix(".png"), sheet, shown[:6])
    print(f"\nsaved  {'  '.join(files)}\nnext   python sample.py --model {saved}")
    facts = dict(stage="quant", model=config.model, format=config.format, figures=figures)
    size = saved.stat().st_size
    print(json.dumps(facts | dict(seconds=seconds, bytes=size, layers=layers[chosen], files=files)))


def write_header(config: Config, spec: dict, model: nn.Module, layers: dict) -> dict[str, str]:
    told = runs.header(config, "quant", spec, model, 0)
    told |= {"class": type(model).__name__, "layers": json.dumps(layers), "format": config.format}
    return told | {"spec": json.dumps(spec | {"stage": "quant"})}


if __name__ == "__main__":
    script.exit_cleanly(main)
