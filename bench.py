"""Benchmarks: where the time of a picture goes, what each optimisation buys, and what is left.

What    python bench.py               on a GPU: all parts below, in under 10 minutes on an H200
        python bench.py --only step   one part, or several with commas between them:
            rates       what this GPU reaches in plain matrix products
            attention   our Triton kernel beside torch's backends
            step        one call of the transformer; of DC-Gen-FLUX in FP8 and NVFP4 too
            decode      one call of the autoencoder
            picture     the steps and the decode, as a whole; --batch 16 for the throughput
            ladder      from eager to final, and torch.compile: time, and error against fp32 weights
            solvers     how near fewer steps come to many: the toy, or --model X --prompts FILE
        --baseline diffusers adds stock diffusers. --train is for align.py and lora.py instead.
How     Models of full size with random weights: latency does not depend on their values.
Floor   A block of FLUX multiplies each of N tokens by 12 D^2 weights, and attends:
            operations = 24 N D^2 + 4 N^2 D                                                    (1)
        The floor of a step is its operations over the rates that `rates` and `attention` reached.
CPU     Without a GPU: `solvers`, and a roofline estimate for some GPUs, labelled as such.
"""

import gc
import json
import math
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from itertools import product
from statistics import median

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import align
import dcae
import lora
import quant
import sample
from models import (
    data,
    flux,
    hub,
    jobs,
    kernels,
    nvfp4,
    registry,
    runs,
    sana,
    script,
    toy,
    vae,
)


@dataclass(frozen=True)
class Config:
    only: str = ""  # parts, with commas between them; "": all
    models: str = "flux,sana"  # one or both
    sizes: str = "1024,2048,4096"  # pixels a side
    steps: int = 20  # of a picture
    batch: int = 1  # pictures at a time, in `picture` alone
    seconds: float = 1.0  # of measuring for each figure; more if a call takes longer
    limit: float = 560.0  # seconds; what would start later is left out, and named
    format: str = "fp8,nvfp4"  # DC-Gen-FLUX also with linear layers in these; "": 16 bits alone
    baseline: str = ""  # diffusers: stock diffusers too
    model: str = "dc-gen-toy"  # of `solvers`: whatever sample.py takes
    prompts: str = ""  # of `solvers`: a .txt or .jsonl as for sample.py; "": the toy's tasks
    weights: str = ""  # of `solvers`: a folder to look in instead of the hub
    train: bool = False  # training steps of DC-Gen-FLUX instead; under torchrun on several GPUs
    device: str = ""  # "": cuda, then the CPU


@dataclass
class Bench:
    """What every part is given: the settings, and what has been measured so far."""

    config: Config
    device: torch.device
    dtype: torch.dtype = torch.bfloat16
    cases: list = field(default_factory=list)
    formats: tuple[str, ...] = ("",)  # of linear layers; "": 16 bits
    found: dict = field(default_factory=dict)  # {part: {label: {figure: value}}}
    left_out: list[str] = field(default_factory=list)
    started: float = field(default_factory=time.perf_counter)

    def random(self, *shape: int) -> Tensor:
        return torch.randn(shape, device=self.device, dtype=self.dtype)


# ---- cases

F32, F64, SANA_F64 = "dc-ae-f32c32-sana-1.1", "dc-ae-f64c128-1.5", "dc-gen-sana-f64c128"
WORDS = 512  # tokens of FLUX's text; SANA has 300


@dataclass(frozen=True)
class Case:
    """A transformer, its autoencoder and a size."""

    name: str
    size: int  # pixels a side
    model: str  # a name in registry.MODELS
    autoencoder: str
    latents: tuple[int, int, int]
    tokens: int
    paper: float | None = None  # DC-Gen, arXiv 2509.25180: seconds on an H100
    steps: int | None = None  # of a flow map; None: --steps

    @property
    def family(self) -> str:
        return self.name.removeprefix("DC-Gen-").split()[0]

    def label(self, kind: str = "") -> str:
        return f"{self.name} {self.size} {kind.upper()}".rstrip()


CASES = (
    Case("FLUX", 1024, "flux-krea", "flux-vae", (16, 128, 128), 4096, 4.65),
    Case("DC-Gen-FLUX", 1024, "dc-gen-flux-1k", F32, (32, 32, 32), 1024, 1.10),
    Case("DC-Gen-FLUX AnyFlow", 1024, "dc-gen-flux-anyflow", F32, (32, 32, 32), 1024, steps=4),
    Case("FLUX", 2048, "flux-krea", "flux-vae", (16, 256, 256), 16384, 23.76),
    Case("DC-Gen-FLUX", 2048, "dc-gen-flux-4k", F64, (128, 32, 32), 1024, 1.41),
    Case("FLUX", 4096, "flux-krea", "flux-vae", (16, 512, 512), 65536, 213.81),
    Case("DC-Gen-FLUX", 4096, "dc-gen-flux-4k", F64, (128, 64, 64), 4096, 4.04),
    Case("SANA", 1024, "sana-1.6b", F32, (32, 32, 32), 1024, 60 / 110.7),  # in batches
    Case("DC-Gen-SANA", 1024, SANA_F64, F64, (128, 16, 16), 256, 60 / 435.7),
    Case("SANA", 4096, "sana-1.6b-4k", F32, (32, 128, 128), 16384),
    Case("DC-Gen-SANA", 4096, SANA_F64, F64, (128, 64, 64), 4096),
)


def build(preset: str) -> nn.Module:
    """A transformer or an autoencoder by its official config."""
    classes = {flux: flux.Flux, sana: sana.Sana, dcae: dcae.DCAE, vae: vae.FluxVAE}
    module = next(module for module in classes if preset in module.PRESETS)
    return classes[module](**module.PRESETS[preset]["config"])


def random_weights(make: Callable[[], nn.Module], bench: Bench, kind: str = "") -> nn.Module:
    """Values as large as trained ones (errors depend on it); linear layers in the format `kind`."""
    torch.manual_seed(0)
    torch.set_default_dtype(bench.dtype)
    try:
        with bench.device:
            model = make().requires_grad_(False)
    finally:
        torch.set_default_dtype(torch.float32)
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            parameter.normal_(0, parameter[0].numel() ** -0.5)
        else:  # a bias is near 0, the scale of a norm near 1
            parameter.normal_(float(name.endswith(("scale", "weight"))), 0.02)
    if kind:
        {"fp8": kernels.to_fp8, "nvfp4": quant.convert}[kind](model)
    return model


def random_text(case: Case, bench: Bench, batch: int = 1) -> tuple[tuple, tuple]:
    """(cond, null_cond); the latter is empty for FLUX."""
    if "FLUX" in case.name:
        return (bench.random(batch, WORDS, 4096), bench.random(batch, 768)), ()
    mask = (torch.arange(300, device=bench.device) < 100).expand(batch, -1)
    return (bench.random(batch, 300, 2304), mask), (bench.random(batch, 300, 2304), mask)


def one_step(case: Case, stepper: sample.Stepper, text: tuple) -> Callable[[], Tensor]:
    """A call of the transformer as the sampler makes it."""
    (cond, null_cond), guidance = text, registry.describe(case.model).guidance
    noise = sample.draw_noise([0], case.latents).to(cond[0].device)
    ends = (0.5, 0.0) if case.steps else None
    stepper.start([0.9, 0.5], noise, cond, guidance, null_cond or None, ends)
    stepper(0, noise)  # the first call is never replayed
    return lambda: stepper(1, noise)


@torch.no_grad()
def measure(call: Callable[[], object], bench: Bench) -> dict:
    """Milliseconds of a call: of three or more after a warm-up, or of one that takes long."""
    call()
    if bench.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    times, enough = [], 1000 * bench.config.seconds
    while not times or times[0] < 2000 and (len(times) < 3 or sum(times) < enough):
        start = sample.clock(bench.device)
        call()
        times.append(1000 * (sample.clock(bench.device) - start))
    ms, p10, p90 = (sorted(times)[int(share * len(times))] for share in (0.5, 0.1, 0.9))
    gib = torch.cuda.max_memory_allocated() / 2**30  # on a CPU 0
    return dict(ms=ms, p10=p10, p90=p90, n=len(times), gib=gib)


def measure_kernel(call: Callable[[], object], bench: Bench) -> dict:
    """The same without launches, which take Python longer than the kernel takes the GPU."""
    how = dict(rep=100 * bench.config.seconds, quantiles=(0.5, 0.1, 0.9))
    times = kernels.triton.testing.do_bench_cudagraph(call, **how)
    return dict(zip(("ms", "p10", "p90"), times), n=10)


def keep(label: str, rows: Iterator, bench: Bench) -> None:
    """Print and keep rows as they come; name what time, memory or this GPU do not allow."""
    gc.collect()  # a model with fused blocks holds itself
    torch.cuda.empty_cache()
    try:
        if runs.on_first(lambda: time.perf_counter() - bench.started > bench.config.limit):
            raise script.UserError(f"--limit {bench.config.limit:g}")
        for part, name, row in rows:
            bench.found.setdefault(part, {})[name] = row
            shown = {k: f"{v:.4g}" if isinstance(v, float) else v for k, v in row.items()}
            cells = (f"{f'{k} {v}':16}" for k, v in shown.items())
            print(f"{part:10} {name:30}", *cells, flush=True)
    except (RuntimeError, script.UserError, ImportError) as reason:
        bench.left_out.append(f"{label}: {str(reason).split('. ')[0]}")
        print(f"left out   {bench.left_out[-1]}", flush=True)


def step_operations(case: Case) -> tuple[float, float]:
    """(in matrix products, in attention) of a step; what no noise reaches is not part of it."""
    if "FLUX" in case.name:  # eq. (1) for 57 blocks
        n, width = case.tokens + WORDS, 3072
        return 57 * 24 * n * width**2, 57 * 4 * n**2 * width
    # Two passes, for guidance. A token meets 13.5 D^2 weights (self-attention 4, cross-attention
    # 2, MLP 7.5), two 32 x 32 matrices in each head, and a 3 x 3 convolution of 5 D channels.
    n, width = 2 * case.tokens, 2240
    return 20 * n * (27 * width**2 + 128 * width + 90 * width), 20 * 4 * n * 300 * width


def decode_operations(case: Case) -> float:
    """Counted by torch while the decoder runs on tensors that hold nothing."""
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        build(case.autoencoder).decode(torch.empty(1, *case.latents))
    return counter.get_total_flops()


def floor_ms(case: Case, kind: str, bench: Bench) -> float:
    """eq. (1) over the best rates of this run, at the nearest number of tokens; 0 without."""
    floor, kinds = 0.0, ("fp8" if kind else "16 bits", "16 bits")
    for part, of, work in zip(("rates", "attention"), kinds, step_operations(case)):
        rows = [r for r in bench.found.get(part, {}).values() if r["format"] == of]
        distance = [abs(math.log(r["tokens"] / (case.tokens + WORDS))) for r in rows]
        near = [r["tflop_s"] for r, d in zip(rows, distance) if d == min(distance)]
        floor += work / max(near, default=math.inf) / 1e9
    return floor


# ---- parts: each yields rows, (part, label, {figure: value})

PARTS = ("rates", "attention", "step", "decode", "picture", "ladder", "solvers")
PRODUCTS = ((9216, 3072), (3072, 3072), (12288, 3072), (21504, 3072), (3072, 15360))  # FLUX's
FEWER = (10, 8)  # calls of --solver ab2
LENGTHS = (1536, 4608, 16896)  # tokens: DC-Gen 1K; DC-Gen 4K and base 1K; base 2K


def rates(bench: Bench) -> Iterator:
    for m in LENGTHS[:2]:
        for n, k in PRODUCTS:
            layer = nn.Linear(k, n, device=bench.device, dtype=bench.dtype).requires_grad_(False)
            hidden = bench.random(m, k)
            calls = {"16 bits": partial(layer, hidden)}
            if kernels.fp8_runs(bench.device):
                calls["fp8"] = partial(kernels.FP8Linear(layer), kernels.quantize_rows(hidden))
            for kind, call in calls.items():
                row = measure_kernel(call, bench)
                row |= dict(tflop_s=2 * m * n * k / row["ms"] / 1e9, tokens=m, format=kind)
                yield "rates", f"{m} x {k} x {n} {kind}", row


def attention(name: str, bench: Bench) -> Iterator:
    """24 heads of 128, as in FLUX: q, k, v (B, N, nh, hd), transposed."""
    kind = "triton" if name == "ours" else "torch"
    _, attend = sample.pick_attention(kind, bench.device, bench.dtype)
    backend = SDPBackend.FLASH_ATTENTION if name == "flash" else SDPBackend.CUDNN_ATTENTION
    for n in LENGTHS:
        qkv = [bench.random(1, n, 24, 128).transpose(1, 2) for _ in range(3)]
        exact = nn.functional.scaled_dot_product_attention(*(heads.float() for heads in qkv))
        with sdpa_kernel(backend):
            error = quant.relative(attend(*qkv).float(), exact)
            row = measure_kernel(partial(attend, *qkv), bench)
        row |= dict(tflop_s=4 * n * n * 24 * 128 / row["ms"] / 1e9, error=error)
        yield "attention", f"{n} {name}", row | dict(tokens=n, format="16 bits")


def picture(case: Case, kind: str, parts: set[str], bench: Bench) -> Iterator:
    """A call of the transformer (of SANA two), one of the decoder, and the whole picture."""
    model = random_weights(partial(build, case.model), bench, kind)
    autoencoder = random_weights(partial(build, case.autoencoder), bench)
    stepper, latents = sample.speed_up(model), bench.random(1, *case.latents)
    sample.speed_up_decoder(autoencoder)
    if parts & {"step", "picture"}:
        step = measure(one_step(case, stepper, random_text(case, bench)), bench)
    if "step" in parts:
        rate, floor = sum(step_operations(case)) / step["ms"] / 1e9, floor_ms(case, kind, bench)
        own = dict(tflop_s=rate, floor_ms=floor, of_floor=floor / step["ms"])
        yield "step", case.label(kind), dict(tokens=case.tokens) | step | own
    if "decode" in parts and not kind:
        row = measure(lambda: autoencoder.decode(latents), bench)
        row["tflop_s"] = decode_operations(case) / row["ms"] / 1e9
        with tempfile.TemporaryDirectory() as out:  # a PNG of noise: the largest there is
            job = sample.Config(size=f"{case.size}x{case.size}", out=f"{out}/x.png")
            sample.save_pictures(
                autoencoder, latents, [job], row
            )  # seconds: decode, transfer, file
        yield "decode", f"{case.autoencoder} {case.size}", row
    if "picture" in parts:
        yield from whole_pictures(case, kind, stepper, autoencoder, step["ms"], bench)


def whole_pictures(case: Case, kind: str, stepper, autoencoder, step_ms: float, bench) -> Iterator:
    """From noise to pixels. Of steps that take over 10 s some are run, and the rest is added."""
    own, batch = registry.describe(case.model), bench.config.batch
    rows = {"": ("picture", own.solver, case.steps or bench.config.steps)}
    if case.name == "FLUX" or (case.name == "DC-Gen-FLUX" and kind == "fp8"):
        rows |= {f", {n} ab2": ("fewer", "ab2", n) for n in FEWER}  # the base is faster by it, too
    given = (*random_text(case, bench, batch), [*range(batch)], case.latents[1:], stepper)
    took = {}  # by what was run
    for ending, (part, solver, steps) in rows.items():
        run = max(1, min(steps, int(10_000 / batch / step_ms)))
        # Of few steps the model's own solver: what a solver computes takes no time.
        spec = replace(own, steps=run, solver=solver if run == steps else own.solver)
        if spec not in took:
            draw = partial(sample.draw_latents, stepper.model, spec, *given)
            took[spec] = measure(lambda: autoencoder.decode(draw()), bench)["ms"] / batch
        row = dict(seconds=(took[spec] + (steps - run) * step_ms) / 1000, steps_run=run)
        base = bench.found.get(part, {}).get(f"{case.family} {case.size}{ending}", row)
        row = row | dict(paper=case.paper, over_base=base["seconds"] / row["seconds"])
        yield part, case.label(kind) + ending, row


def ladder(case: Case, bench: Bench) -> Iterator:
    """One thing more on every rung; the error is that of the velocity against fp32 weights."""
    make = partial(random_weights, partial(build, case.model), bench)
    text, model = random_text(case, bench), make()
    truth = one_step(case, sample.Stepper(model.float(), False, False), text)().clone()
    model.to(bench.dtype)  # exact: these values came from there
    kinds = bench.formats[1:] if "FLUX" in case.name else ()
    rungs = {"eager": "", "+ fused kernels": "", "+ hoisting": "", "+ CUDA graph": ""}
    rungs |= {f"{kind.upper()} linears": kind for kind in kinds} | {"compile, not fused": ""}
    for i, (name, kind) in enumerate(rungs.items()):
        is_compiled = name.startswith("compile")
        if kind or is_compiled:
            model = call = None
            gc.collect()  # a fused model holds itself, and the next one needs its room
            torch.compiler.reset()
            model = make(kind)
        if name != "eager":
            sample.speed_up(model, is_compiled)
        start = sample.clock(bench.device)
        call = one_step(case, sample.Stepper(model, hoist=i >= 2, graph=i >= 3), text)
        first = sample.clock(bench.device) - start  # in which what is new compiles
        row = dict(error=quant.relative(call(), truth), first_s=first)
        row["kind"] = "lossy" if kind else "lossless"
        yield "ladder", f"{case.label()} {name}", measure(call, bench) | row


def diffusers(case: Case, bench: Bench) -> Iterator:
    """The same step and decode in stock diffusers, eager, as its users run it."""
    sys.path.append(str(hub.ROOT / "tests"))
    import stock_diffusers as stock

    make, latents = partial(random_weights, bench=bench), bench.random(1, *case.latents)
    step = measure(stock.step_call(make, case.model, case.tokens, bench.random), bench)["ms"]
    decode = measure(stock.decode_call(make, case.autoencoder, latents), bench)["ms"]
    seconds = (bench.config.steps * step + decode) / 1000
    ours = bench.found.get("picture", {}) | bench.found.get("fewer", {})
    ours = {k: v["seconds"] for k, v in ours.items()}
    over = {f"over our {k}:": seconds / v for k, v in ours.items() if f"FLUX {case.size}" in k}
    yield "diffusers", case.label(), dict(step_ms=step, decode_ms=decode, seconds=seconds) | over


def solvers(bench: Bench) -> Iterator:
    """Median PSNR to the pictures of 60 AB2 steps, by solver and steps; a toy's score beside it."""
    config, device = bench.config, bench.device
    spec, is_gpu = registry.describe(config.model), device.type == "cuda"
    if not (spec.is_toy or config.prompts):
        raise script.UserError(f"--model {config.model}: wanted --prompts with it")
    tasks = [] if config.prompts else toy.draw_prompts(100 if is_gpu else 6, seed=7)
    pairs = [(task.text, i) for i, task in enumerate(tasks)]
    prompts, seeds = zip(*(pairs or jobs.read_prompts(config.prompts)))
    dtype = bench.dtype if is_gpu and not spec.is_toy else torch.float32  # as sample.py has it
    cond, null = sample.encode_text(spec, [*prompts], "", config.weights, device, dtype)
    _, model, autoencoder = sample.load_pipeline(config.model, "", config.weights, device, dtype)
    stepper = sample.speed_up(model) if is_gpu else None
    grid = sample.latent_grid((spec.size, spec.size), autoencoder.stride, model.patch_size)

    def draw(solver: str, steps: int) -> Tensor:  # (B, 3, H, W) on the CPU
        images, how = [], replace(spec, solver=solver, steps=steps)
        for rows in torch.arange(len(seeds)).split(100 if spec.is_toy else 1):
            words, own = tuple(c[rows] for c in cond), [seeds[i] for i in rows]
            latents = sample.draw_latents(model, how, words, null, own, grid, stepper)
            images.append(sample.decode(autoencoder, latents).clamp(-1, 1).cpu())
        return torch.cat(images)

    exact = draw("ab2", 60)
    for solver, steps in product(dict.fromkeys(("euler", "ab2", spec.solver)), (8, 10, 16, 20)):
        images = draw(solver, steps)
        row = dict(psnr=median(map(dcae.psnr, images, exact)), n=len(images))
        if tasks:
            row |= {k: v for k, v in toy.score(images, tasks).items() if k in ("seen", "held_out")}
        yield "solvers", f"{config.model} {solver} {steps}", row


def training(case: Case, stage: str, bench: Bench) -> Iterator:
    """Steps of align.py's stage 2 or of lora.py as they are, four random pictures a GPU."""
    spec = replace(registry.describe(case.model), shift=1.0)
    cond = tuple(c.cpu() for c in random_text(case, bench)[0])
    latents, caption = torch.randn(7, *case.latents), torch.zeros(7, dtype=torch.long)
    pictures = data.Dataset(None, latents, cond, caption, cond)
    model = random_weights(partial(build, case.model), bench)
    with tempfile.TemporaryDirectory() as out:
        how = dict(batch_size=4 * runs.world(), micro_batch=2, steps=8, out=out)
        config = lora.Config(**lora.LARGE | how) if stage == "lora" else align.Config(**how)
        lora.choose_trained(model, config) if stage == "lora" else align.choose_trained(model)
        for p in align.trained(model).values():
            p.data = p.data.float()
        runs.ready_blocks(model.blocks, bench.device)
        torch.cuda.reset_peak_memory_stats()
        (lora.train if stage == "lora" else align.train_head)(model, pictures, config, spec)
        lines = runs.on_first(lambda: open(f"{out}/metrics.jsonl").readlines())
    seconds = sorted(json.loads(line)["seconds"] for line in lines if "loss" in line)[3]
    row = dict(seconds=seconds, pictures_per_s=config.batch_size / seconds)
    row["gib"] = torch.cuda.max_memory_allocated() / 2**30
    yield "train", f"{stage} {case.label()}", row


# Of data sheets, TFLOP/s by dense tensor cores: bf16 and FP8 with fp32 sums, NVFP4.
HOPPER, BLACKWELL = {"bf16": 989, "FP8": 1979}, {"bf16": 209.5, "FP8": 419, "NVFP4": 1676}
GPUS = {"H100 SXM, H200": HOPPER, "RTX 5090": BLACKWELL}
# What stock parts reach of that on an H200 (cuBLAS, cuDNN; torch 2.11, CUDA 13.0).
REACHED = {"products": 0.70, "fp8": 0.63, "attention": 0.60}


def estimate(bench: Bench) -> Iterator:
    """Seconds by operations and data sheets; memory traffic is not counted."""
    for case in bench.cases:
        (products, attended), decoded = step_operations(case), decode_operations(case)
        steps = case.steps or bench.config.steps
        row = dict(tokens=case.tokens, tflop=(steps * (products + attended) + decoded) / 1e12)
        for gpu, rates in GPUS.items():
            rest = steps * attended / rates["bf16"] / REACHED["attention"]
            rest += decoded / rates["bf16"] / REACHED["products"]
            for kind, rate in rates.items():  # of linear layers
                reached = rate * REACHED["products" if kind == "bf16" else "fp8"]
                row[f"{gpu} {kind}"] = (steps * products / reached + rest) / 1e12
        yield "estimate", case.label(), row


# ---- main


def plan(bench: Bench) -> Iterator:
    """What is measured, in order. Nothing begins before its rows are asked for."""
    config, cases = bench.config, bench.cases
    every = ",".join(PARTS) if bench.device.type == "cuda" else "solvers"
    parts = set() if config.train else {*(config.only or every).split(",")}
    if "rates" in parts:
        yield "rates", rates(bench)
    for name in ("flash", "cudnn", "ours") if "attention" in parts else ():
        yield f"attention {name}", attention(name, bench)
    for kind in bench.formats if parts & {"step", "decode", "picture"} else ():
        for case in cases:
            if not kind or case.name.startswith("DC-Gen-FLUX"):
                yield case.label(kind), picture(case, kind, parts, bench)
    for case in cases:
        if "ladder" in parts and case.name in ("DC-Gen-FLUX", "SANA") and case.size != 2048:
            yield f"ladder {case.size}", ladder(case, bench)
        if config.baseline and case.family == "FLUX" and not case.steps:
            yield f"diffusers {case.label()}", diffusers(case, bench)
        for stage in ("align", "lora") if config.train and case.name == "DC-Gen-FLUX" else ():
            yield f"{stage} {case.label()}", training(case, stage, bench)
    if "solvers" in parts:
        yield "solvers", solvers(bench)


def main() -> None:
    config = script.parse_config(Config, __doc__)
    device = runs.start(config.device)
    wanted = dict(only=PARTS, models=("flux", "sana"), sizes=("1024", "2048", "4096"))
    wanted |= dict(format=("fp8", "nvfp4"), baseline=("diffusers",))
    for flag, names in wanted.items():
        if unknown := {*getattr(config, flag).split(",")} - {"", *names}:
            wrong = f"--{flag} {','.join(unknown)}"
            raise script.UserError(f"{wrong}: wanted some of {','.join(names)}")
    if config.steps < 1 or config.batch < 1:
        raise script.UserError(f"--steps {config.steps} --batch {config.batch}: wanted 1 or more")
    needs_gpu = config.only not in ("", "solvers") or config.baseline or config.train
    if device.type != "cuda" and needs_gpu:
        raise script.UserError(f"--only, --baseline and --train need a GPU, here is {device}")
    triton = getattr(kernels.triton, "__version__", None)
    facts = dict(stage="bench", torch=torch.__version__, triton=triton, commit=runs.commit())
    if device.type == "cuda":
        query = "nvidia-smi --query-gpu=driver_version --format=csv,noheader".split()
        facts["driver"] = subprocess.run(query, capture_output=True, text=True).stdout.strip()
        facts["gpu"] = torch.cuda.get_device_name(device)
    print("bench | " + " | ".join(f"{key} {value}" for key, value in facts.items()))
    cases = [c for c in CASES if str(c.size) in config.sizes]
    cases = [c for c in cases if c.family.lower() in config.models]
    bench = Bench(config, device, cases=cases)
    if device.type == "cuda":
        torch.set_float32_matmul_precision("highest")  # as in sample.py: fp32 is the truth
        is_fp4 = nvfp4.pick_mode("", device) != "fake"  # that is simulated, and slow
        can = {"": True, "fp8": kernels.fp8_runs(device), "nvfp4": is_fp4}
        bench.formats = tuple(kind for kind in can if can[kind] and kind in config.format)
    for label, rows in plan(bench):
        keep(label, rows, bench)
    if device.type != "cuda" and not config.only:
        print("\nESTIMATE, not measured: seconds by operations and data sheets")
        keep("estimate", estimate(bench), bench)
    print(json.dumps(facts | {"config": asdict(config), **bench.found, "left_out": bench.left_out}))
    runs.finish()


if __name__ == "__main__":
    script.exit_cleanly(main)
