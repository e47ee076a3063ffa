"""Quantization: a transformer in 4 bits, with a thin 16-bit branch for what 4 bits cannot hold.

What    python quant.py
        python quant.py --model flux-krea --lora runs/flux-krea/lora.safetensors --calib prompts.txt
        The first shows the toy beside the 16-bit one, rung by rung of the ladder. What is written,
        runs/<model>/quant.safetensors, is a --model of sample.py.
Why     A large transformer's step is matrix products. Four bits hold its weights in 2/7 of the
        memory, and Blackwell's tensor cores multiply four bits at four times the rate of sixteen.
        But a 4-bit number has 15 values, and one outlier among 16 neighbours costs them all.
How     Outliers of the inputs are moved into the weights, and out of the weights into two thin
        16-bit matrices. What is left has none and is rounded: Q, eq. (1) in models/nvfp4.py.
            x' = x * s,    W' = W / s,    W' = L R + E,    L (N, r), R (r, K)                  (2)
            y = Q(x') Q(E)^T + (x' R^T) L^T + bias                                             (3)
        s = max|W|^beta / max|x|^alpha a channel, the pair with the least error of y on inputs
        that the layer had along the sampler's own trajectories. Then in rounds: L R explains
        W' - Q(E) better than it explained W', and leaves another E.
        GPTQ (--gptq) rounds E column by column, each making up for the errors of those before.
Cost    FLUX 12B: 6.6 GiB instead of 22.2; minutes on one GPU, printed by tests/test_full_size.py.
Source  SVDQuant, arXiv 2411.05007, and its layer lists and search in deepcompressor (MIT HAN Lab,
        Apache 2.0), written anew; GPTQ, arXiv 2210.17323; low rank by arXiv 0909.4061.
Differs Block scales minimise the block's squared error (--scales amax: the published rule). A
        smoothing is scored by its own layer's output, not by the attention behind it; the
        modulations are NVFP4 too (there: INT4, and 16 bits for SANA's).
"""

import functools
import json
import math
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from shlex import quote

import torch
from torch import Tensor, nn
from tqdm import tqdm

import dcae
import sample
from models import export, jobs, nvfp4, registry, runs, script, toy, weights
from models.flux import Flux
from models.identity import digest, placed
from models.nvfp4 import BLOCK, QuantLinear, into_blocks, round_activations, round_blocks
from models.registry import Spec
from models.sana import Sana
from models.script import Files, UserError


@dataclass(frozen=True)
class Config:
    model: str = "dc-gen-toy"  # a name in registry.MODELS, a path, or a run of ours
    lora: str = ""  # lora.py's file, merged first; "": runs/<model>'s if there is one; none: none
    autoencoder: str = ""  # "": the model's own; a preset or a path
    adapter: Files = ""  # FILE[:scale], another program's LoRA, merged first; may be repeated
    calib: str = ""  # prompts, .txt or .jsonl, of which 32 are sampled; "": the toy's captions
    weights: str = ""  # a folder to look in instead of the hub
    mode: str = ""  # how to compute: fake | w4a4 | w4a8; "": the best of this device
    rank: int = 32  # of the 16-bit branch; 0: none
    grid: int = 20  # smoothing exponents to try, in steps of 1 / grid; 0: no smoothing
    rounds: int = 20  # of eq. (2), at most: it ends when the output's error no longer falls
    scales: str = "mse"  # of weight blocks: mse, or amax as published
    gptq: bool = False  # round column by column, later ones making up for earlier ones
    tokens: int = 4096  # inputs kept for each layer; a quarter of them judge, and choose nothing
    ladder: bool | None = None  # plain, + smoothing, ... each in full; unless given, for toys only
    per_task: int = 12  # toy prompts of each task to score by
    steps: int = 0  # of the sampler; 0: the model's own
    export: str = ""  # nunchaku: no quantizing, what diffusers loads of a finished run
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
    published = nvfp4.block_scales(blocks, tensor_scale)
    if rule == "amax":
        return published

    code = published.view(torch.uint8).int()  # neighbours in E4M3 are neighbours as integers
    codes = [(code + step).clamp(0, 126).to(torch.uint8) for step in (0, -1, -2, 1)]
    errors = []
    for code in codes:
        _, rounded = round_blocks(blocks, code.view(torch.float8_e4m3fn), tensor_scale)
        errors.append((rounded - blocks).square().sum(-1))  # (N, B)
    best = torch.stack(errors).argmin(0, keepdim=True)  # a tie: the first
    return torch.stack(codes).gather(0, best)[0].view(torch.float8_e4m3fn)


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
    residual: Tensor  # (N, K) fp32, E of eq. (2)
    scales: Tensor  # (N, B) e4m3
    tensor_scale: float
    rounded: Tensor  # (N, K) fp32, Q(E)
    down: Tensor | None = None  # (r, K)
    up: Tensor | None = None  # (N, r)

    def output(self, inputs: Tensor) -> Tensor:
        """eq. (3) without bias: (T, K) -> (T, N)."""
        out = round_activations(inputs * self.smooth) @ self.rounded.T
        return out if self.up is None else out + (inputs @ self.down.T) @ self.up.T


def split(
    weight: Tensor, smooth: Tensor, rank: int, rule: str, explain: Tensor | float = 0.0
) -> Layer:
    """eq. (2): L R approximates W / s - `explain`; the rest of W / s is rounded."""
    scaled, down, up = weight / smooth, None, None
    residual = scaled
    if rank:
        up, down = low_rank(scaled - explain, rank)
        # Rounded first, so that the residual takes up what the 16 bits lose.
        up, down = up.bfloat16().float(), (down * smooth).bfloat16().float()
        residual = scaled - up @ (down / smooth)
    blocks = into_blocks(residual)
    tensor_scale = max(blocks.abs().max().item() / (nvfp4.E2M1_MAX * nvfp4.E4M3_MAX), 1e-30)
    scales = weight_scales(blocks, tensor_scale, rule)
    _, rounded = round_blocks(blocks, scales, tensor_scale)
    rounded = rounded.flatten(1)[:, : weight.shape[1]]
    return Layer(smooth, residual, scales, tensor_scale, rounded, down, up)


def smoothing(inputs: Tensor, weight: Tensor, alpha: float, beta: float) -> Tensor:
    """s of eq. (2), (K,): max|W|^beta / max|x|^alpha; 1 for a channel of zeros."""
    s = weight.abs().amax(0) ** beta / inputs.abs().amax(0) ** alpha
    s = torch.where(s.isfinite() & (s > 0), s, 1.0)
    return s.bfloat16().float()  # as it is kept: W / s is then exact


def quantize(weight: Tensor, inputs: Tensor, config: Config, rank: int) -> Layer:
    """The way to quantize `weight` (N, K) that is best for its output on `inputs` (T, K)."""
    wanted, rank = inputs @ weight.T, min(rank, *weight.shape)

    def error(layer: Layer) -> float:
        return (layer.output(inputs) - wanted).square().sum().item()

    steps = [i / config.grid for i in range(1, config.grid)]
    pairs = [(0.0, 0.0), *((a, 0.0) for a in steps), *((a, 1 - a) for a in steps)]
    least = math.inf
    for alpha, beta in pairs:
        layer = split(weight, smoothing(inputs, weight, alpha, beta), rank, config.scales)
        if (found := error(layer)) < least:
            least, best = found, layer
    for _ in range(config.rounds if rank else 0):
        # What L R has to explain is W / s less what rounding already holds.
        layer = split(weight, best.smooth, rank, config.scales, best.rounded)
        if (found := error(layer)) >= least:
            break
        least, best = found, layer
    return best


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
            value = nvfp4.round_e2m1(left[:, j] / scale) * torch.where(scale.isinf(), 0.0, scale)
            error = (left[:, j] - value) / upper[j, j]
            left[:, j : rows.stop] -= error[:, None] * upper[j, j : rows.stop]
            rounded[:, j], errors[:, j - first] = value, error
        left[:, rows.stop :] -= errors @ upper[rows, rows.stop :]
    return replace(layer, rounded=torch.empty_like(rounded).index_copy_(1, order, rounded))


# ---- calibration

PROMPTS = 32  # that calibration samples: 640 (prompt, step) pairs at 20 steps; the reference, 128
SEARCHED = 4096  # of the inputs choose the smoothing; GPTQ reads all


@torch.no_grad()
def calibration_inputs(
    model: nn.Module, draw: Callable[[tqdm], object], calls: int, tokens: int
) -> dict[str, Tensor]:
    """{layer: (tokens, K)} on the CPU. draw(bar) samples prompts, by `calls` calls of the model."""
    names = [name for name, (bits, _) in layers_of(model).items() if bits == 4]
    kept, each = {name: [] for name in names}, math.ceil(tokens / calls)

    def keep(name: str, module: nn.Module, args: tuple) -> None:
        inputs = args[0].movedim(1, -1) if args[0].dim() == 4 else args[0]
        inputs = inputs.flatten(0, -2)  # (B N, K)
        generator = torch.Generator("cpu").manual_seed(len(kept[name]))
        chosen = torch.randperm(len(inputs), generator=generator)[:each]
        kept[name].append(inputs[chosen.to(inputs.device)].cpu())

    rows = ((model.get_submodule(name), functools.partial(keep, name)) for name in names)
    hooks = [layer.register_forward_pre_hook(hook) for layer, hook in rows]
    with tqdm(total=calls, desc="quant calibrate") as bar:
        draw(bar)
    for hook in hooks:
        hook.remove()
    order = torch.Generator("cpu").manual_seed(0)  # one for all: calls are mixed, then cut
    joined = {name: torch.cat(parts) for name, parts in kept.items()}
    return {n: x[torch.randperm(len(x), generator=order)[:tokens]] for n, x in joined.items()}


# ---- model


@torch.no_grad()
def quantize_model(
    model: nn.Module, config: Config, inputs: dict[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, dict]]:
    """(state dict, {layer: how it is made, its error}) of the model, which stays as it is."""
    layers, figures = layers_of(model), {}
    state = {n: t for n, t in model.state_dict().items() if n.removesuffix(".weight") not in layers}
    for name, (_, branches) in tqdm(layers.items(), "quant", unit="layer"):
        linear, rank = model.get_submodule(name), branches * config.rank
        if not all(t.isfinite().all() for t in (linear.weight, inputs.get(name, torch.ones(1)))):
            raise UserError(f"{name} holds or reads NaN or Inf: check the checkpoint")
        packed, figures[name] = quantize_layer(linear, inputs.get(name), rank, config)
        state |= {f"{name}.{kind}": t.cpu() for kind, t in packed.state_dict().items()}
    return state, figures


def quantize_layer(
    linear: nn.Module, inputs: Tensor | None, rank: int, config: Config
) -> tuple[QuantLinear, dict]:
    """(what replaces a linear layer or a 1x1 convolution, how it is made and its error).

    Without `inputs` (T, K), what the layer's look like, they stay in 16 bits.
    """
    weight, bits = linear.weight.flatten(1).float(), 16 if inputs is None else 4
    if inputs is None:
        layer = split(weight, torch.ones_like(weight[0]), 0, config.scales)
        error = relative(layer.rounded, weight)
    else:
        inputs = inputs.to(weight.device).float()
        fitted, judged = inputs.tensor_split([len(inputs) * 3 // 4])
        layer = quantize(weight, fitted[:SEARCHED], config, rank)
        layer = gptq(layer, fitted) if config.gptq else layer
        error = relative(layer.output(judged), judged @ weight.T)
    packed = as_linear(linear, layer, bits, torch.bfloat16)
    facts = dict(rank=packed.rank, activations=bits, tensor_scale=layer.tensor_scale)
    return packed, {"error": error} | facts


def as_linear(linear: nn.Module, layer: Layer, bits: int, dtype: torch.dtype) -> QuantLinear:
    """The packed layer that replaces `linear`, on its device. `dtype` is of its 16-bit parts."""
    rank = 0 if layer.up is None else layer.up.shape[1]
    quantized = QuantLinear(linear, rank, bits, layer.tensor_scale)
    values, _ = round_blocks(into_blocks(layer.rounded), layer.scales, layer.tensor_scale)
    quantized.packed, quantized.scales = nvfp4.pack(values.flatten(1)), layer.scales
    if bits < 16:
        quantized.smooth = layer.smooth.to(dtype)
    if rank:  # contiguous, as the kernels count on it
        quantized.down = layer.down.to(dtype).contiguous()
        quantized.up = layer.up.to(dtype).contiguous()
    return quantized


@torch.no_grad()
def convert(model: nn.Module, rank: int = 32) -> None:
    """Quantize in place without search or calibration: as fast as any other, for timing."""
    for name, (bits, branches) in layers_of(model).items():
        linear = model.get_submodule(name)
        weight = linear.weight.flatten(1).float()
        thin = min(branches * rank, *weight.shape)
        layer = split(weight, torch.ones_like(weight[0]), thin, "amax")
        model.set_submodule(name, as_linear(linear, layer, bits, linear.weight.dtype))
    nvfp4.use(model)


def relative(ours: Tensor, wanted: Tensor) -> float:
    return ((ours - wanted).norm() / wanted.norm().clamp(min=1e-30)).item()


# ---- ladder


def rungs(config: Config, model: nn.Module) -> dict[str, Config]:
    """The ladder: what each part of the method is worth. GPTQ where there are inputs enough."""
    plain = replace(config, rank=0, grid=0, rounds=0, scales="amax", gptq=False)
    ways = {
        "NVFP4": plain,
        "+ smoothing": replace(plain, grid=config.grid),
        "+ low rank": replace(config, scales="amax", gptq=False),
        "+ block scales": replace(config, scales="mse", gptq=False),
    }
    if config.tokens >= gptq_tokens(model):
        ways["+ GPTQ"] = replace(config, scales="mse", gptq=True)
    return ways


def gptq_tokens(model: nn.Module) -> int:
    """--tokens of which the fitted three quarters are twice the inputs of the widest layer."""
    layers = (name for name, (bits, _) in layers_of(model).items() if bits == 4)
    return math.ceil(8 / 3 * max(model.get_submodule(name).weight.shape[1] for name in layers))


def compare(
    images: dict[str, Tensor], layers: dict[str, dict[str, dict]], tasks: list[toy.Prompt]
) -> dict[str, dict]:
    """Same prompts, same noise: how far from the 16-bit model's pictures, and the toy's score."""
    wanted, figures = images["16-bit"], {}
    print(f"\n{len(wanted)} pictures")
    for way, ours in images.items():
        rates = toy.score(ours, tasks) if tasks else {}
        row = {name: rates[name] for name in ("seen", "held_out") if name in rates}
        if way in layers:
            errors = [r["error"] for r in layers[way].values() if r["activations"] == 4]
            row["layers"] = sum(errors) / len(errors)
            for name, measure in (("psnr", dcae.psnr), ("ssim", dcae.ssim)):
                values = [measure(a[None], b[None]) for a, b in zip(ours, wanted)]
                row[name] = sum(values) / len(values)
        figures[way] = row
        print(f"{way:16}" + "  ".join(f"{name} {value:.3f}" for name, value in row.items()))
    return figures


# ---- main


def check(config: Config, spec: Spec, model: nn.Module, device: torch.device) -> None:
    """Refuse what cannot work, or would measure another thing, before anything is computed."""
    nvfp4.pick_mode(config.mode, device)
    if config.scales not in ("mse", "amax"):
        raise UserError(f"--scales {config.scales!r}: wanted mse or amax")
    if spec.stage == "quant":
        raise UserError(f"{config.model} is quantized already: name what it was made of")
    # GPTQ with less than twice as many inputs as a layer has channels fits their noise.
    needed = gptq_tokens(model) if config.gptq else 64
    if config.tokens < needed:
        raise UserError(f"--tokens {config.tokens}: wanted {needed} or more")
    base = registry.describe(config.model).transformer
    header = weights.open_checkpoint(Path(config.lora)).metadata if config.lora else {"base": base}
    if placed(header.get("base", "")) != base:
        raise UserError(f"--lora {config.lora} is of another base than --model {config.model}")


def read_prompts(config: Config, is_toy: bool) -> tuple[list[str], list[str], list[toy.Prompt]]:
    """(prompts to show, prompts to calibrate on, the former as the toy's scorer reads them)."""
    if config.calib:
        given = [prompt for prompt, _ in jobs.read_prompts(config.calib)]
    elif is_toy:
        given = toy.captions(toy.draw_scenes(PROMPTS, seed=config.seed), seed=config.seed)
    else:
        raise UserError(f"--calib is missing: wanted {PROMPTS} prompts in a .txt or .jsonl file")
    tasks = toy.draw_prompts(config.per_task, seed=7) if is_toy else []
    return [task.text for task in tasks] or given[-4:], given[:PROMPTS], tasks


def print_layers(layers: dict[str, dict]) -> None:
    """Relative error of the output by kind of layer: the mean over blocks, and the worst."""
    kinds = {}
    for name, row in layers.items():
        kinds.setdefault(re.sub(r"\.\d+\.", ".*.", name, count=1), []).append(row["error"])
    print(f"\n{'layer':34}{'number':>8}{'error':>10}{'worst':>10}")
    for kind, errors in kinds.items():
        mean = sum(errors) / len(errors)
        print(f"{kind:34}{len(errors):8}{mean:10.4f}{max(errors):10.4f}")


def main() -> None:
    config = script.parse_config(Config, __doc__)
    if config.export:
        return export.write_quantized(config.export, runs.folder_of(config, trains=False))
    device = script.pick_device(config.device)
    if device.type == "mps":  # which has no float8
        device = torch.device("cpu")
    torch.set_float32_matmul_precision("high")  # errors of 3% are compared: TF32 is enough
    out = runs.folder_of(config, trains=False)
    own = str(out / "lora.safetensors") if (out / "lora.safetensors").exists() else ""
    lora = {"": own, "none": ""}.get(config.lora, config.lora)
    with runs.locked(out):
        run(replace(config, lora=lora), device, out)


@torch.no_grad()
def run(config: Config, device: torch.device, out: Path) -> None:
    name = config.lora or config.model
    parts = (name, config.autoencoder, config.weights)
    # First on the meta device, without memory: refuse what cannot work.
    spec, model, autoencoder = sample.load_pipeline(*parts, "meta", adapters=config.adapter)
    check(config, spec, model, device)
    shown, prompts, tasks = read_prompts(config, spec.is_toy)
    is_laddered = spec.is_toy if config.ladder is None else config.ladder
    ways = rungs(config, model) if is_laddered else {}
    files, saved = sample.open_parts(spec, config.weights), out / "quant.safetensors"
    notes = dict(base_digest=files[0].digest, autoencoder_digest=files[1].digest)
    notes["origin"] = digest([*notes.values(), shown, prompts], [])
    if runs.is_done(saved, config, notes):
        return
    thin = [f"{name}.weight" for name in layers_of(model)]  # 4 bits, scales, two thin matrices
    size = sum(p.numel() * (0.7 if n in thin else 4) for n, p in model.named_parameters())
    runs.check_room(out, size * (2 if ways else 1), "quant.safetensors")
    is_plain = spec.is_toy or device.type == "cpu"
    dtype = script.pick_dtype(config.dtype or ("fp32" if is_plain else "bf16"))
    sampled, batch = replace(spec, steps=config.steps or spec.steps), 64 if spec.is_toy else 1
    grid = sample.latent_grid((spec.size, spec.size), autoencoder.stride, model.patch_size)
    how = ([*shown, *prompts], "", config.weights, device, dtype)
    cond, null_cond = sample.encode_text(sampled, *how)
    spec, model, autoencoder = sample.load_pipeline(*parts, device, dtype, config.adapter)
    how = f"{len(prompts)} prompts x {sampled.steps} steps"
    print(
        f"quant | {name} | {len(layers_of(model))} layers | {how} | seed {config.seed} | {device}"
    )

    def draw(transformer: nn.Module, some: range, bar: tqdm | None = None) -> Tensor:
        """Latents of some prompts. A prompt has the same noise for every model."""
        latents = []
        for rows in torch.tensor(some).split(batch):
            words, seeds = tuple(c[rows] for c in cond), (config.seed * 10_000 + rows).tolist()
            given = (sampled, words, null_cond, seeds, grid)
            latents.append(sample.draw_latents(transformer, *given, progress=bar))
        return torch.cat(latents)

    seen, learned = range(len(shown)), range(len(shown), len(shown) + len(prompts))
    images, layers = {"16-bit": sample.decode(autoencoder, draw(model, seen)).cpu()}, {}
    calls = math.ceil(len(prompts) / batch) * sampled.steps
    calibrate = functools.partial(draw, model, learned)
    inputs = calibration_inputs(model, calibrate, calls, config.tokens)
    chosen = next((way for way, rung in ways.items() if rung == config), "nvfp4")
    other, seconds = out / "rung.safetensors", {}
    for way, rung in (ways | {chosen: config}).items():
        path = saved if way == chosen else other
        start = sample.clock(device)
        state, layers[way] = quantize_model(model, rung, inputs)
        seconds[way] = round(sample.clock(device) - start, 2)
        notes |= runs.header(config, "quant", spec, model, 0) | {"class": type(model).__name__}
        notes |= {"layers": json.dumps(layers[way]), "spec": json.dumps(asdict(spec))}
        weights.save(path, state, notes)
        ours = nvfp4.load(path, device, dtype, config.mode)  # as a user will
        images[way] = sample.decode(autoencoder, draw(ours, seen)).cpu()
    other.unlink(missing_ok=True)
    print_layers(layers[chosen])
    figures = compare(images, layers, tasks)
    picture, sheet = saved.with_suffix(".png"), {way: x[:6].float() for way, x in images.items()}
    sample.save_sheet(picture, sheet, shown[:6])
    print(f"\nsaved  {saved}  {picture}\nnext   python sample.py --model {quote(str(saved))}")
    about = dict(stage="quant", model=config.model, figures=figures, bytes=saved.stat().st_size)
    about |= dict(seconds=seconds, layers=layers[chosen], files=[str(saved), str(picture)])
    print(json.dumps(about))


if __name__ == "__main__":
    script.exit_cleanly(main)
