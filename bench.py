"""Benchmarks: where the time of a picture goes, what each optimisation buys, and what is left.

What    python bench.py                     every part below; under 10 minutes on an H200
        python bench.py --only attention    one part, or several with commas between them:
            rates      what this GPU reaches in plain matrix products and copies: the ceilings
            attention  our kernel beside torch's (--tune: every tile size)
            kernels    each fused kernel beside plain PyTorch
            step       one call of the transformer, base and DC-Gen, with FLOP/s and the floor
            decode     the autoencoders
            text       the text encoders
            picture    20 steps and a decode, measured as a whole
            throughput pictures a minute in batches, at 1024
            ablate     the ladder from eager to final: time, and error against fp32
Why     DC-Gen buys its speed with fewer tokens; the rest is engineering, and has to be seen.
How     Full-size models with random weights: latency does not depend on their values. (--weights
        DIR: the official ones found there, for the errors of the ladder.) CUDA events around
        whole calls, after a warm-up; median and 10th to 90th percentile. What is extrapolated
        says so (~). --baseline diffusers measures stock diffusers in the same run.
        --train is for the trainers instead: whole steps of align.py and lora.py, update included,
        on random latents and captions; under torchrun --nproc-per-node N on N GPUs.
Floor   The floating-point operations of a call over the rates that this GPU reached in `rates` and
        `attention`, in this very run.
CPU     Without a GPU: the toy, measured, and a roofline estimate for three GPUs, labelled as such.
Paper   DC-Gen, arXiv 2509.25180: one H100, batch 1, 20 steps.
"""

import json
import math
import platform
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import align
import dcae
import lora
import quant
import sample
from models import flux, kernels, nvfp4, runs, sana, script, vae
from models.data import Pictures, ahead
from models.script import UserError


@dataclass(frozen=True)
class Config:
    only: str = ""  # parts, with commas between them; "": all
    models: str = "flux,sana"  # one or both
    sizes: str = "1024,2048,4096"  # pixels a side
    steps: int = 20  # of a picture
    batch: int = 16  # pictures at a time, for the throughput; all else is one at a time
    seconds: float = 1.0  # of measuring for each figure; more steps where one takes longer
    limit: float = 560.0  # seconds; what would start later is left out, and named
    weights: str = ""  # a folder with official weights; "": random ones
    baseline: str = ""  # diffusers: stock diffusers too, in the same run
    train: bool = False  # training steps instead, of DC-Gen at each of --sizes
    train_batch: int = 4  # --train: pictures a GPU and step
    micro_batch: int = 2  # --train: pictures a GPU takes at once
    tune: bool = False  # attention: every tile size, not just the one in use
    attention: str = ""  # torch | triton; "": what sample.py would use
    fuse: bool = True  # fused kernels
    hoist: bool = True  # what no noise reaches, computed before the first step
    graph: bool = True  # the step as a CUDA graph
    compile: bool = False  # --train: the blocks, by torch.compile
    format: str = "fp8,nvfp4"  # DC-Gen also with linear layers in these (lossy); "": 16 bits alone
    device: str = ""  # "": cuda, then the CPU
    dtype: str = "bf16"  # bf16 | fp16, on a GPU


# ---- cases


@dataclass(frozen=True)
class Case:
    """A transformer, its autoencoder, and a size."""

    name: str
    family: str  # flux | sana
    size: int  # pixels a side
    network: dict  # what differs from the defaults of Flux or Sana
    autoencoder: str  # a preset of dcae or vae
    paper: float | None = None  # seconds a picture on an H100, 20 steps, decode included
    paper_rate: float | None = None  # pictures a minute, likewise, in batches

    @property
    def stride(self) -> int:
        return 8 if self.autoencoder == "flux-vae" else 64 if "f64" in self.autoencoder else 32

    @property
    def base(self) -> bool:
        return not self.name.startswith("DC-Gen")

    @property
    def latents(self) -> tuple[int, int, int, int]:
        channels = {"flux-vae": 16, F64: 128}.get(self.autoencoder, 32)
        return 1, channels, self.size // self.stride, self.size // self.stride

    @property
    def tokens(self) -> int:
        side = self.latents[2] // (2 if self.autoencoder == "flux-vae" else 1)
        return side * side

    def build(self, device: str = "meta") -> nn.Module:
        with torch.device(device):
            return (flux.Flux if self.family == "flux" else sana.Sana)(**self.network)

    @property
    def official(self) -> str:
        """The name of its trained weights."""
        sizes = {1024: "", 2048: "-2k", 4096: "-4k"}
        return {
            "FLUX": "flux-krea",
            "DC-Gen-FLUX": "dc-gen-flux-1k" if self.stride == 32 else "dc-gen-flux-4k",
            "SANA": "sana-1.6b" + sizes[self.size],
            "DC-Gen-SANA": "dc-gen-sana-f64c128",
        }[self.name]


F32, F64 = "dc-ae-f32c32-sana-1.1", "dc-ae-f64c128-1.5"
FLUX, FLUX_F32, FLUX_F64 = ({"in_channels": channels} for channels in (64, 32, 128))
SANA_F64 = sana.DC_GEN_F64
CASES = (
    Case("FLUX", "flux", 1024, FLUX, "flux-vae", 4.65, 16.8),
    Case("DC-Gen-FLUX", "flux", 1024, FLUX_F32, F32, 1.10, 69.4),
    Case("FLUX", "flux", 2048, FLUX, "flux-vae", 23.76),
    Case("DC-Gen-FLUX", "flux", 2048, FLUX_F64, F64, 1.41),
    Case("FLUX", "flux", 4096, FLUX, "flux-vae", 213.81),
    Case("DC-Gen-FLUX", "flux", 4096, FLUX_F64, F64, 4.04),
    Case("SANA", "sana", 1024, sana.SAMPLED_AT[1024], F32, None, 110.7),
    Case("DC-Gen-SANA", "sana", 1024, SANA_F64, F64, None, 435.7),
    Case("SANA", "sana", 2048, sana.SAMPLED_AT[2048], F32),
    Case("DC-Gen-SANA", "sana", 2048, SANA_F64 | {"sample_size": 32}, F64),
    Case("SANA", "sana", 4096, sana.SAMPLED_AT[4096], F32),
    Case("DC-Gen-SANA", "sana", 4096, SANA_F64 | {"sample_size": 64}, F64),
)
TEXT_TOKENS = {"flux": 512, "sana": 300}


def chosen(config: Config) -> list[Case]:
    sizes, families = config.sizes.split(","), config.models.split(",")
    cases = [c for c in CASES if str(c.size) in sizes and c.family in families]
    if not cases or not {*families} <= {"flux", "sana"}:
        raise UserError(
            f"--sizes {config.sizes} --models {config.models}: wanted some of 1024,2048,4096 and "
            f"of flux,sana"
        )
    return cases


def random_weights(model: nn.Module, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """From the meta device to values of a trained network's size: latency depends on none."""
    model.to(dtype).to_empty(device=device)
    generator = torch.Generator(device).manual_seed(0)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if not tensor.is_floating_point():
            tensor.data.zero_()
        elif tensor.dim() > 1:
            tensor.data.normal_(0, tensor[0].numel() ** -0.5, generator=generator)
        else:  # a bias is near 0, a norm's scale near 1
            tensor.data.normal_(0, 0.02, generator=generator)
            tensor.data += name.endswith(("scale", "weight", "running_var"))
    return model.requires_grad_(False).eval()


def decoder(case: Case) -> nn.Module:
    if case.autoencoder == "flux-vae":
        model = vae.FluxVAE()
    else:
        model = dcae.DCAE(**dcae.PRESETS[case.autoencoder]["config"])
    del model.encoder
    return model


class Zoo:
    """The models of the cases, on the device. Random FLUX transformers share one set of blocks."""

    def __init__(self, device: torch.device, dtype: torch.dtype, limit: float, folder: str = ""):
        self.device, self.dtype, self.folder, self.kept = device, dtype, folder, {}
        self.deadline, self.left_out = time.perf_counter() + limit, []
        self.drawn = 0

    def late(self, label: str) -> bool:
        """Is the time spent? Then what would have come is noted."""
        if time.perf_counter() < self.deadline:
            return False
        self.left_out.append(label)
        return True

    @contextmanager
    def room(self, label: str) -> Iterator[None]:
        """What does not fit on this GPU is noted, and what comes after it is measured."""
        try:
            yield
        except torch.OutOfMemoryError:
            self.left_out.append(f"{label} (out of memory)")
            self.kept = {}
            torch.cuda.empty_cache()

    def transformer(self, case: Case, form: str = "") -> nn.Module:
        """In 16 bits, or with its linear layers in the format `form`."""
        key = (case.family, form, *sorted(case.network.items()))
        if key not in self.kept:
            if self.folder:  # these share nothing, and there may be no room for two
                self.kept = {}
                model = self.official(case)
            else:
                self.kept = {k: v for k, v in self.kept.items() if k[:2] == key[:2]}
                model = self.random_transformer(case)
            convert(model, form)
            self.kept[key] = model
        return self.kept[key].eval()

    def official(self, case: Case) -> nn.Module:
        spec = sample.describe(case.official)
        model = sample.load_transformer(spec, self.folder, self.device, self.dtype)
        return model.requires_grad_(False)

    def random_transformer(self, case: Case) -> nn.Module:
        model, other = case.build(), next(iter(self.kept.values()), None)
        if case.family != "flux" or other is None:
            return random_weights(model, self.device, self.dtype)
        for name, child in list(model.named_children()):
            if name in ("img_in", "final_layer"):
                random_weights(child, self.device, self.dtype)
            else:
                setattr(model, name, getattr(other, name))
        return model

    def autoencoder(self, case: Case) -> nn.Module:
        if self.folder:
            args = (case.autoencoder, self.folder, self.device, self.dtype)
            model = sample.load_autoencoder(*args).requires_grad_(False)
            del model.encoder
            return model
        with torch.device("meta"):
            model = decoder(case)
        return random_weights(model, self.device, self.dtype)

    def inputs(self, case: Case, batch: int = 1) -> tuple:
        """(noise, cond, guidance, null_cond)."""
        words = TEXT_TOKENS[case.family]
        noise = self.random(batch, *case.latents[1:]).float()
        if case.family == "flux":
            cond = (self.random(batch, words, 4096), self.random(batch, 768))
            return noise, cond, 3.5, None
        mask = torch.arange(words, device=self.device)[None] < words // 3  # a usual prompt
        mask = mask.expand(batch, -1)
        cond, null = self.random(batch, words, 2304), self.random(batch, words, 2304)
        return noise, (cond, mask), 4.5, (null, mask)

    def random(self, *shape: int) -> Tensor:
        self.drawn += 1  # another seed each time: equal q and k would be no attention
        generator = torch.Generator(self.device).manual_seed(self.drawn)
        return torch.randn(shape, generator=generator, device=self.device).to(self.dtype)


# ---- measure


@dataclass(frozen=True)
class Timing:
    """Milliseconds a call."""

    median: float
    p10: float
    p90: float
    n: int

    def __str__(self) -> str:
        return f"{self.median:9.3f} {self.p10:9.3f}-{self.p90:<9.3f} {self.n:4d}"


def measure(call: Callable[[], object], config: Config, device: torch.device) -> Timing:
    """Median of at least three calls after a warm-up; one long call is enough."""
    cuda = device.type == "cuda"
    call()
    once = timed(call, cuda)
    n = max(1 if once > 4000 else 3, min(1000, int(1000 * config.seconds / max(once, 1e-3))))
    times = sorted([once] * (n == 1) or [timed(call, cuda) for _ in range(n)])
    return Timing(times[n // 2], times[n // 10], times[min(n - 1, n * 9 // 10)], n)


def measure_device(call: Callable[[], object], config: Config, device: torch.device) -> Timing:
    """As `measure`, without launches: ten calls as one CUDA graph. For what is over sooner than
    Python is ready for the next, tens of microseconds."""

    def ten_calls() -> None:
        for _ in range(10):
            call()

    took = measure(runs.captured(ten_calls, warmup=1), config, device)
    return Timing(took.median / 10, took.p10 / 10, took.p90 / 10, took.n)


def timed(call: Callable[[], object], cuda: bool) -> float:
    if not cuda:
        start = time.perf_counter()
        call()
        return 1000 * (time.perf_counter() - start)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


@dataclass(frozen=True)
class Work:
    """Floating-point operations of a call."""

    products: float = 0.0  # in matrix products and convolutions
    attention: float = 0.0  # in softmax(q k^T) v

    @property
    def total(self) -> float:
        return self.products + self.attention


def count_step(case: Case) -> Work:
    """Counted by torch while the network runs on tensors that hold nothing."""
    attention = []

    def counted(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        attention.append(4 * q.numel() * k.shape[2])
        return q

    with FakeTensorMode(), torch.no_grad():
        model = case.build("cpu")  # fake, too
        model.attention = counted
        _, *shape = case.latents
        if case.family == "flux":
            cond = torch.empty(1, 512, 4096), torch.empty(1, 768), torch.empty(1)
        else:  # twice, for classifier-free guidance
            cond = torch.empty(2, 300, 2304), torch.ones(2, 300, dtype=torch.bool)
        batch = len(cond[0])
        with FlopCounterMode(display=False) as counter:
            model(torch.empty(batch, *shape), torch.empty(batch), *cond)
    return Work(counter.get_total_flops(), sum(attention))


def count_decode(case: Case) -> Work:
    with FakeTensorMode(), torch.no_grad(), FlopCounterMode(display=False) as counter:
        decoder(case).decode(torch.empty(case.latents))
    return Work(counter.get_total_flops())


@contextmanager
def exactly() -> Iterator[None]:
    """fp32 products in fp32, where `runs.start` allows TF32."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def relative(ours: Tensor, truth: Tensor) -> float:
    return ((ours.double() - truth.double()).norm() / truth.double().norm()).item()


# ---- parts


def measure_rates(config: Config, zoo: Zoo, found: dict) -> None:
    """What the floor is made of: matrix products in bf16 and FP8, and memory."""
    device, dtype = zoo.device, zoo.dtype
    big = torch.empty(2**31, dtype=torch.uint8, device=device)
    other = torch.empty_like(big)
    copied = measure(lambda: other.copy_(big), config, device)
    found["rates"] = rates = {"copy_tb_s": 2 * big.numel() / copied.median / 1e9}
    big = other = None
    print(f"\nrates                     {'ms':>9}   p10-p90               n\n")
    print(f"copy, 4.3 GB moved      {copied}  {rates['copy_tb_s']:7.2f} TB/s")
    for m in (1536, 4608):
        for n, k in ((9216, 3072), (3072, 3072), (12288, 3072), (21504, 3072), (3072, 15360)):
            layer = nn.Linear(k, n, device=device, dtype=dtype).requires_grad_(False)
            hidden = torch.randn(m, k, device=device, dtype=dtype)
            rows = {str(dtype)[6:]: (layer, hidden)}
            if kernels.fp8_runs(device):
                rows["fp8"] = (kernels.FP8Linear(layer), kernels.quantize_rows(hidden))
            for kind, (module, inputs) in rows.items():
                took = measure_device(lambda: module(inputs), config, device)
                rate = 2 * m * n * k / took.median / 1e9
                best = max(rates.get(kind, {}).get(str(m), 0), rate)
                rates.setdefault(kind, {})[str(m)] = best
                print(f"{kind:9}{m:5}x{k:5}x{n:5}{took}  {rate:7.0f} TFLOP/s")


ATTENTION_LENGTHS = (1536, 4608, 16896)  # DC-Gen 1K, DC-Gen 4K = base 1K, base 2K; with the text


def rivals(config: Config, device: torch.device) -> dict[str, Callable]:
    """Attention functions to compare: torch's, ours, and with --tune ours in every tile size."""

    def backend(kind: SDPBackend) -> Callable:
        def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            with sdpa_kernel(kind):
                return F.scaled_dot_product_attention(q, k, v)

        return call

    rows = {
        "torch flash": backend(SDPBackend.FLASH_ATTENTION),
        "torch cuDNN": backend(SDPBackend.CUDNN_ATTENTION),
    }
    if not kernels.runs_on(device):
        return rows
    major = torch.cuda.get_device_capability(device)[0]
    portable = sample.TILES.get((major, 128), sample.TILE)
    rows["ours"] = sample.triton_attention
    rows["  portable kernel"] = lambda *qkv: sample.triton_attention(*qkv, tile=portable)
    for tile in TUNED if config.tune else ():
        rows[f"  {tile}"] = lambda *qkv, tile=tile: sample.triton_attention(*qkv, tile=tile)
    for tile in TUNED_HOPPER if config.tune and major == 9 else ():
        rows[f"  hopper {tile}"] = lambda *qkv, tile=tile: kernels.hopper_attention(*qkv, tile)
    return rows


# As sample.TILES and kernels.HOPPER_TILE
TUNED = [
    (block_m, block_n, warps, stages, registers)
    for block_m, block_n, warps in ((128, 64, 8), (128, 128, 8), (64, 64, 4), (64, 128, 4))
    for stages in (2, 3)
    for registers in (None, 128, 168)
    if not (registers == 168 and warps == 8) and not (registers == 128 and block_n == 128)
]


TUNED_HOPPER = [(128, 2, 168), (64, 4, 168)]


def measure_attention(config: Config, zoo: Zoo, found: dict) -> None:
    """24 heads of 128, as in FLUX; q, k, v are views, (B, N, nh, hd) transposed."""
    found["attention"] = table = {}
    print(
        f"\nattention, 24 heads of 128, {config.dtype}; TFLOP/s (error against fp32 at the first)"
    )
    lengths = ATTENTION_LENGTHS
    print(f"\n{'':26}" + "".join(f"{n:>10}" for n in lengths))
    tensors = {n: [zoo.random(1, n, 24, 128).transpose(1, 2) for _ in range(3)] for n in lengths}
    with exactly():
        exact = sample.attention(*(t.float() for t in tensors[lengths[0]]))
    for name, call in rivals(config, zoo.device).items():
        table[name] = {}
        try:
            for n in lengths:
                took = measure_device(lambda: call(*tensors[n]), config, zoo.device)
                table[name][str(n)] = 4 * n * n * 24 * 128 / took.median / 1e9
            error = relative(call(*tensors[lengths[0]]), exact)
        except Exception as reason:  # a tile that does not fit, a backend that is not there: told
            print(f"{name:26}{str(reason).splitlines()[0][:70]}")
            continue
        cells = "".join(f"{rate:10.0f}" for rate in table[name].values())
        print(f"{name:26}{cells}   ({error:.1e})")


def measure_kernels(config: Config, zoo: Zoo, found: dict) -> None:
    """At DC-Gen-FLUX 4K, 4608 tokens of 3072. Bytes: inputs read once, outputs written once."""
    n, d, device = 4608, 3072, zoo.device
    if not kernels.runs_on(device):
        return
    hidden, branch, mlp = zoo.random(1, n, d), zoo.random(1, n, d), zoo.random(1, n, 7 * d)
    shift, scale, gate = zoo.random(1, 1, 3 * d).chunk(3, dim=-1)
    norm = random_weights(flux.QKNorm(128).to("meta"), device, zoo.dtype)
    rope = torch.stack(flux.rope_table(512, (64, 64), [16, 56, 56], 1, device))
    streams = [(zoo.random(1, 512, 3 * d), norm), (zoo.random(1, 4096, 3 * d), norm)]
    size, right = hidden.element_size(), mlp[..., 3 * d :]
    rows = {  # name: arguments, in FP8 too?, values read, values written
        "modulate": ((hidden, shift, scale), True, n * d, n * d),
        "add_gated": ((hidden, gate, branch), False, 2 * n * d, n * d),
        "split_heads": ((streams, rope), False, 3 * n * d, 3 * n * d),
        "join_gelu": ((hidden, right), True, 5 * n * d, 5 * n * d),
    }
    print(f"\nkernels                  {'plain us':>10}{'fused us':>10}{'TB/s':>8}{'error':>10}")
    found["kernels"] = {}
    for name, (arguments, takes_fp8, read, written) in rows.items():
        plain = partial(getattr(flux, name), *arguments)
        before, expected = measure_device(plain, config, device).median, first_of(plain())
        for fp8 in (False, True) if takes_fp8 and kernels.fp8_runs(device) else (False,):
            how = {"fp8": fp8} if takes_fp8 else {}
            fused = partial(getattr(kernels, name), *arguments, **how)
            after, label = measure_device(fused, config, device).median, name + " FP8" * fp8
            rate = (read * size + written * (1 if fp8 else size)) / after / 1e9
            found["kernels"][label] = {"plain_us": 1000 * before, "us": 1000 * after, "tb_s": rate}
            error = relative(first_of(fused()), expected)
            print(f"{label:25}{1000 * before:10.1f}{1000 * after:10.1f}{rate:8.2f}{error:10.1e}")


def first_of(out: "Tensor | kernels.Rows | tuple") -> Tensor:
    if isinstance(out, kernels.Rows):
        return out.data.float() * out.scale
    return out if isinstance(out, Tensor) else out[0]


@contextmanager
def prepared(model: nn.Module, config: Config, device: torch.device) -> Iterator[str]:
    """The transformer as the flags want it; afterwards plain again (but for FP8)."""
    name, model.attention = sample.pick_attention(
        config.attention, device, script.pick_dtype(config.dtype)
    )
    own = {m: m.ops for m in model.modules() if hasattr(m, "ops")}
    if config.fuse and kernels.runs_on(device):
        kernels.fuse(model)
    yield name
    for module, ops in own.items():
        module.ops = ops


def stepper_of(model: nn.Module, config: Config) -> sample.Stepper | None:
    fast = config.hoist or config.graph
    return sample.Stepper(model, config.hoist, config.graph) if fast else None


def one_step(
    model: nn.Module, inputs: tuple, config: Config
) -> tuple[Callable[[], Tensor], Callable[[], None]]:
    """(a call of the transformer as a sampler makes it, what to do when done)."""
    noise, cond, guidance, null = inputs
    stepper = stepper_of(model, config)
    if stepper is None:
        return lambda: sample.predict(model, noise, 0.5, cond, guidance, null), lambda: None
    stepper.start([0.9, 0.5], noise, cond, guidance, null)
    stepper(0, noise)  # the first is never replayed
    return lambda: stepper(1, noise), stepper.close


def formats(config: Config, device: torch.device) -> list[str]:
    """16 bits (""), then what --format asks for and this GPU has tensor cores for."""
    named = [name for name in config.format.split(",") if name]
    if unknown := [name for name in named if name not in ("fp8", "nvfp4")]:
        raise UserError(f"--format {','.join(unknown)}: wanted fp8, nvfp4 or both")
    runs = {"fp8": kernels.fp8_runs, "nvfp4": fp4_runs}
    return ["", *(name for name in named if runs[name](device))]


def fp4_runs(device: torch.device) -> bool:
    """Does QuantLinear compute on tensor cores here?"""
    return nvfp4.pick_mode("", device) != "fake"


def convert(model: nn.Module, form: str) -> None:
    """The linear layers of the blocks to a format. Blocks are shared: of all models of a Zoo."""
    if form == "fp8":
        kernels.to_fp8(model)
    elif form == "nvfp4":
        quant.convert(model)


def cases_of(config: Config, device: torch.device) -> Iterator[tuple[Case, str, str]]:
    """(case, format, label): all in 16 bits, then DC-Gen-FLUX in fewer."""
    for form in formats(config, device):
        for case in chosen(config):
            if not form or not case.base and case.family == "flux":
                yield case, form, f"{case.name} {case.size} {form.upper()}".rstrip()


def floor_ms(work: Work, case: Case, found: dict, form: str) -> float | None:
    """The operations over the best rates of this run, matched to the number of tokens."""
    tokens = case.tokens + TEXT_TOKENS[case.family]
    rates = found.get("rates", {})
    rates = rates.get("fp8") if form else rates.get("bfloat16", rates.get("float16"))
    speeds = {}  # tokens: the best rate of any attention here
    for row in found.get("attention", {}).values():
        for n, rate in row.items():
            speeds[int(n)] = max(rate, speeds.get(int(n), 0.0))
    if not rates or not speeds:
        return None
    product = rates["1536" if tokens < 3072 else "4608"]
    nearest = min(speeds, key=lambda n: abs(math.log(n / tokens)))
    return 1e3 * (work.products / product + work.attention / speeds[nearest]) / 1e12


def measure_steps(config: Config, zoo: Zoo, found: dict) -> None:
    rows = found.setdefault("step", {})
    print("\nstep: one call of the transformer, batch 1; SANA: two, for guidance")
    print(f"\n{'':27}{'tokens':>7}{'TFLOP':>8}{'ms':>10}   p10-p90              n"
          f"{'TFLOP/s':>9}{'floor ms':>10}{'of it':>6}{'GiB':>7}")  # fmt: skip
    for case, form, label in cases_of(config, zoo.device):
        if zoo.late(label):
            continue
        with zoo.room(label):
            model = zoo.transformer(case, form)
            rows[label] = step_row(label, case, model, config, zoo, found, form)
    zoo.kept = {}


def step_row(
    label: str, case: Case, model: nn.Module, config: Config, zoo: Zoo, found: dict, form: str
) -> dict:
    """Measure, print and return one line of the table."""
    if zoo.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    with prepared(model, config, zoo.device), torch.no_grad():
        call, done = one_step(model, zoo.inputs(case), config)
        took = measure(call, config, zoo.device)
        done()
    work = count_step(case)
    floor = floor_ms(work, case, found, form)
    peak = torch.cuda.max_memory_allocated() / 2**30 if zoo.device.type == "cuda" else 0.0
    share = f"{floor:10.1f}{floor / took.median:6.0%}" if floor else f"{'':16}"
    print(f"{label:27}{case.tokens:7}{work.total / 1e12:8.1f} {took}"
          f"{work.total / took.median / 1e9:8.0f}{share}{peak:7.1f}", flush=True)  # fmt: skip
    return {"ms": took.median, "p10": took.p10, "p90": took.p90, "n": took.n,
            "tflop": work.total / 1e12, "floor_ms": floor, "peak_gib": peak}  # fmt: skip


def measure_decodes(config: Config, zoo: Zoo, found: dict) -> None:
    rows = found.setdefault("decode", {})
    print(f"\ndecode                             {'TFLOP':>8}{'ms':>10}   p10-p90              n"
          f"{'TFLOP/s':>9}{'GiB':>7}")  # fmt: skip
    for case in chosen(config):
        label = f"{case.autoencoder} {case.size}"
        if label in rows or zoo.late(f"decode {label}"):
            continue
        with zoo.room(f"decode {label}"):
            rows[label] = decode_row(label, case, config, zoo)


def decode_row(label: str, case: Case, config: Config, zoo: Zoo) -> dict:
    call = decode_call(zoo.autoencoder(case), zoo.random(*case.latents), config)
    if zoo.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    took, work = measure(call, config, zoo.device), count_decode(case)
    peak = torch.cuda.max_memory_allocated() / 2**30 if zoo.device.type == "cuda" else 0.0
    print(f"{label:35}{work.total / 1e12:8.1f} {took}{work.total / took.median / 1e9:8.0f}"
          f"{peak:7.1f}", flush=True)  # fmt: skip
    return {"ms": took.median, "tflop": work.total / 1e12, "peak_gib": peak}


def decode_call(autoencoder: nn.Module, latents: Tensor, config: Config) -> Callable[[], Tensor]:
    autoencoder.to(memory_format=torch.channels_last)
    latents = latents.contiguous(memory_format=torch.channels_last)
    if config.fuse and kernels.runs_on(latents.device):
        kernels.fuse(autoencoder)

    @torch.no_grad()
    def call() -> Tensor:
        return autoencoder.decode(latents)

    return call


def measure_text(config: Config, zoo: Zoo, found: dict) -> None:
    """T5-XXL and CLIP-L for FLUX, Gemma-2-2B for SANA: one prompt, random weights."""
    import transformers as hub

    encoders = {
        "flux": [
            (hub.T5EncoderModel, hub.T5Config(
                d_model=4096, d_ff=10240, num_layers=24, num_heads=64, vocab_size=32128,
                feed_forward_proj="gated-gelu", d_kv=64), 512),
            (hub.CLIPTextModel, hub.CLIPTextConfig(
                hidden_size=768, intermediate_size=3072, num_hidden_layers=12,
                num_attention_heads=12), 77),
        ],
        "sana": [
            (hub.Gemma2Model, hub.Gemma2Config(
                hidden_size=2304, intermediate_size=9216, num_hidden_layers=26,
                num_attention_heads=8, num_key_value_heads=4, head_dim=256), 300),
        ],
    }  # fmt: skip
    rows = found.setdefault("text", {})
    print(f"\ntext                               {'ms':>10}   p10-p90              n")
    for family in config.models.split(","):
        if zoo.late(f"text {family}"):
            return
        with zoo.room(f"text {family}"):
            rows[family] = {"ms": sum(time_encoder(*row, config, zoo) for row in encoders[family])}


@torch.no_grad()
def time_encoder(cls: type, settings: object, length: int, config: Config, zoo: Zoo) -> float:
    with torch.device("meta"):
        model = cls(settings)
    model = random_weights(model, zoo.device, zoo.dtype)
    ids = torch.ones(1, length, dtype=torch.long, device=zoo.device)
    took = measure(lambda: model(input_ids=ids), config, zoo.device)
    print(f"{cls.__name__:35}{took}", flush=True)
    return took.median


def measure_pictures(config: Config, zoo: Zoo, found: dict) -> None:
    """Latents and decode of one picture, end to end; the text, which is small, is in `text`."""
    rows = found.setdefault("picture", {})
    print(f"\npicture: {config.steps} steps and the decode, batch 1; ~: from single steps; "
          f"x: over base\n\n{'':27}{'seconds':>9}{'x':>7}{'paper s':>10}{'x':>7}")  # fmt: skip
    for case, form, label in cases_of(config, zoo.device):
        if zoo.late(label):
            continue
        with zoo.room(label):
            seconds, measured = picture_seconds(case, form, config, zoo)
            base = base_of(case)
            over = ratio(rows.get(f"{base.name} {base.size}", {}).get("seconds"), seconds)
            paper = f"{case.paper:10.2f}{base.paper / case.paper:7.1f}" if case.paper else ""
            told = f"{'' if measured else '~'}{seconds:9.3f}{over or 0:7.1f}{paper}"
            print(f"{label:27}{told}", flush=True)
            rows[label] = {"seconds": seconds, "measured": measured, "over_base": over,
                           "paper": case.paper}  # fmt: skip
    zoo.kept = {}


def picture_seconds(
    case: Case, form: str, config: Config, zoo: Zoo, batch: int = 1
) -> tuple[float, bool]:
    """(seconds, measured): what would take long is extrapolated from its parts."""
    model, autoencoder = zoo.transformer(case, form), zoo.autoencoder(case)
    noise, cond, guidance, null = inputs = zoo.inputs(case, batch)
    decode = decode_call(autoencoder, zoo.random(batch, *case.latents[1:]), config)
    with prepared(model, config, zoo.device), torch.no_grad():
        call, done = one_step(model, inputs, config)
        once = measure(call, replace(config, seconds=0.1), zoo.device).median / 1000
        done()
        if once * config.steps > 10:
            last = measure(decode, replace(config, seconds=0.1), zoo.device).median / 1000
            return once * config.steps + last, False
        stepper, solver = stepper_of(model, config), "euler" if case.family == "flux" else "dpm"
        schedule = "flux" if case.family == "flux" else "sana-dpm"
        sigmas = sample.timesteps(config.steps, schedule, tokens=case.tokens)

        def picture() -> Tensor:
            how = (guidance, null, solver, None, stepper)
            latents = sample.sample(model, cond, noise, sigmas, *how)
            return autoencoder.decode(latents.contiguous(memory_format=torch.channels_last))

        took = measure(picture, config, zoo.device).median / 1000
        if stepper:
            stepper.close()
    return took, True


def measure_throughput(config: Config, zoo: Zoo, found: dict) -> None:
    """Pictures a minute at 1024, in batches: what DC-Gen-SANA's paper compares."""
    rows = found.setdefault("throughput", {})
    print(f"\nthroughput at 1024, {config.steps} steps and the decode, batches of {config.batch}"
          f"\n\n{'':27}{'a minute':>10}{'x':>7}{'paper':>10}{'x':>7}")  # fmt: skip
    for case in chosen(config):
        label = f"{case.name} {case.size}"
        if case.size != 1024 or zoo.late(f"throughput {label}"):
            continue
        with zoo.room(f"throughput {label}"):
            seconds, measured = picture_seconds(case, "", config, zoo, config.batch)
            rate, base = 60 * config.batch / seconds, base_of(case)
            over = ratio(rate, rows.get(f"{base.name} {base.size}", {"a_minute": rate})["a_minute"])
            rows[label] = {"a_minute": rate, "over_base": over, "paper": case.paper_rate}
            paper = f"{case.paper_rate:10.1f}{case.paper_rate / base.paper_rate:7.1f}"
            print(f"{label:27}{'' if measured else '~'}{rate:10.1f}{over:7.1f}{paper}", flush=True)
    zoo.kept = {}


def ratio(value: float | None, unit: float) -> float | None:
    return value / unit if value else None


def base_of(case: Case) -> Case:
    return next(c for c in CASES if (c.family, c.size, c.base) == (case.family, case.size, True))


# ---- the ladder


def measure_ladder(config: Config, zoo: Zoo, found: dict) -> None:
    """DC-Gen-FLUX, one thing more on every rung; the error is against the same weights in fp32."""
    rows = found.setdefault("ladder", {})
    off = replace(config, attention="torch", fuse=False, hoist=False, graph=False)
    rungs = {"eager": off, "+ Triton attention": replace(off, attention="")}
    rungs["+ fused kernels"] = replace(rungs["+ Triton attention"], fuse=config.fuse)
    rungs["+ hoisting"] = replace(rungs["+ fused kernels"], hoist=config.hoist)
    rungs["+ CUDA graph"] = replace(rungs["+ hoisting"], graph=config.graph)
    cases = [c for c in chosen(config) if c.name == "DC-Gen-FLUX" and c.size in (1024, 4096)]
    for case in cases:
        if zoo.late(f"ladder {case.size}"):
            return
        with zoo.room(f"ladder {case.size}"):
            climb(case, rungs, config, zoo, rows)
        zoo.kept = {}


def climb(case: Case, rungs: dict[str, Config], config: Config, zoo: Zoo, rows: dict) -> None:
    model, inputs = zoo.transformer(case), zoo.inputs(case)
    print(f"\nladder, DC-Gen-FLUX {case.size}        {'ms':>9}   p10-p90              n  error")
    truth = in_fp32(model, lambda: one_step(model, inputs, rungs["eager"])[0]())
    for form in formats(config, zoo.device):
        model = zoo.transformer(case, form)
        last = {f"+ {form.upper()} linears": rungs["+ CUDA graph"]}
        for name, rung in (last if form else rungs).items():
            with prepared(model, rung, zoo.device), torch.no_grad():
                call, done = one_step(model, inputs, rung)
                error, took = relative(call(), truth), measure(call, config, zoo.device)
                done()
            kind = "lossy" if form else "lossless"
            print(f"{name:28}{took}  {error:.2e} {kind}", flush=True)
            rows[f"{case.size} {name}"] = {"ms": took.median, "error": error, "kind": kind}


@torch.no_grad()
def in_fp32(model: nn.Module, call: Callable[[], Tensor]) -> Tensor:
    """What the weights give in fp32: a block at a time, since all of them would take 48 GB."""
    dtype = next(model.parameters()).dtype
    blocks = [*model.double_blocks, *model.single_blocks]
    others = [m for m in model.children() if not isinstance(m, nn.ModuleList)]
    hooks = [block.register_forward_pre_hook(lambda b, _: b.float() and None) for block in blocks]
    hooks += [block.register_forward_hook(lambda b, *_: b.to(dtype) and None) for block in blocks]
    for module in others:
        module.float()
    with exactly():
        truth = call().clone()
    for module in others:
        module.to(dtype)  # exact: these values came from there
    for hook in hooks:
        hook.remove()
    return truth


# ---- stock diffusers


def measure_diffusers(config: Config, zoo: Zoo, found: dict) -> None:
    """The same steps and decodes in stock diffusers, eager, as its users run it."""
    try:
        import diffusers
    except ImportError:
        raise UserError(
            "--baseline diffusers: it is not installed; pip install diffusers"
        ) from None
    rows = found.setdefault("diffusers", {})
    print(f"\nstock diffusers {diffusers.__version__}, eager  {'ms':>9}   p10-p90              n")
    for case in chosen(config):
        label = f"{case.name} {case.size}"
        if case.family != "flux" or zoo.late(f"diffusers {label}"):
            continue
        with zoo.room(f"diffusers {label}"):
            step = measure(diffusers_step(case, zoo), config, zoo.device)
            torch.cuda.empty_cache()
            decode = measure(diffusers_decode(case, zoo), config, zoo.device)
            torch.cuda.empty_cache()
            seconds = (config.steps * step.median + decode.median) / 1000
            rows[label] = {"step_ms": step.median, "decode_ms": decode.median, "seconds": seconds}
            ours = found.get("picture", {}).get(label, {}).get("seconds")
            fast = f", ours {ours:.2f} s" if ours else ""
            print(f"{label:28}{step}  step\n{'':28}{decode}  decode\n{'':28}~{seconds:8.2f} s for "
                  f"{config.steps} steps{fast}", flush=True)  # fmt: skip
    stock = rows.get("FLUX 4096", {}).get("seconds")
    for label in ("DC-Gen-FLUX 4096", "DC-Gen-FLUX 4096 FP8"):
        ours = found.get("picture", {}).get(label, {}).get("seconds")
        if stock and ours:
            rows[f"stock base over our {label}"] = stock / ours
            print(f"stock FLUX 4096 over our {label}: {stock / ours:.1f}x")


def diffusers_step(case: Case, zoo: Zoo) -> Callable[[], Tensor]:
    from diffusers import FluxTransformer2DModel

    with torch.device("meta"):
        model = FluxTransformer2DModel(**case.network, guidance_embeds=True)
    model = random_weights(model, zoo.device, zoo.dtype)
    side = math.isqrt(case.tokens)
    rows, cols = (torch.arange(side, device=zoo.device) for _ in range(2))
    ids = torch.stack(torch.meshgrid(rows, cols, indexing="ij"), -1).flatten(0, 1)
    inputs = dict(
        hidden_states=zoo.random(1, case.tokens, case.network["in_channels"]),
        encoder_hidden_states=zoo.random(1, 512, 4096), pooled_projections=zoo.random(1, 768),
        timestep=zoo.random(1).abs(), guidance=zoo.random(1).abs(),
        img_ids=F.pad(ids, (1, 0)).to(zoo.dtype), txt_ids=zoo.random(512, 3) * 0,
    )  # fmt: skip
    return torch.no_grad()(lambda: model(**inputs, return_dict=False))


def diffusers_decode(case: Case, zoo: Zoo) -> Callable[[], Tensor]:
    from diffusers import AutoencoderDC, AutoencoderKL

    with torch.device("meta"):
        if case.autoencoder == "flux-vae":
            blocks = dict(block_out_channels=(128, 256, 512, 512), layers_per_block=2)
            model = AutoencoderKL(
                **blocks, latent_channels=16, down_block_types=("DownEncoderBlock2D",) * 4,
                up_block_types=("UpDecoderBlock2D",) * 4,
            )  # fmt: skip
        else:
            model = AutoencoderDC(**dcae.PRESETS[case.autoencoder]["config"])
    del model.encoder
    model = random_weights(model, zoo.device, zoo.dtype)
    latents = zoo.random(*case.latents)
    return torch.no_grad()(lambda: model.decode(latents, return_dict=False))


# ---- without a GPU

# Dense tensor-core rates of the data sheets, TFLOP/s: bf16 and FP8 with fp32 sums, NVFP4.
GPUS = {"H100 SXM": (989, 1979, None), "H200": (989, 1979, None), "RTX 5090": (209.5, 419, 1676)}
# What stock parts reach of that on an H200 (cuBLAS, cuDNN; torch 2.11, CUDA 13.0).
REACHED = {"products": 0.70, "fp8": 0.63, "attention": 0.60}


def measure_toy(config: Config, zoo: Zoo, found: dict) -> None:
    rows = found.setdefault("toy", {})
    print(f"\ntoy, measured here          {'ms':>9}   p10-p90              n")
    for name in ("flux-toy", "dc-gen-toy"):
        spec, model, autoencoder = sample.load_pipeline(name, device=zoo.device)
        side = spec["size"] // autoencoder.stride
        noise = sample.draw_noise([0], (model.latent_channels, side, side)).to(zoo.device)
        cond = tuple(
            torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(zoo.device)
            for shape in ((1, 16, model.config["joint_attention_dim"]),
                          (1, model.config["pooled_projection_dim"]))
        )  # fmt: skip
        tokens = (side // model.patch_size) ** 2
        with torch.no_grad():
            calls = {
                "step": lambda: sample.predict(model, noise, 0.5, cond, 2.0, None),
                "decode": lambda: autoencoder.decode(noise),
            }
            for part, call in calls.items():
                took = measure(call, config, zoo.device)
                rows[f"{name} {part}"] = took.median
                print(f"{name + ' ' + part:28}{took}  {tokens} tokens", flush=True)


def estimate(config: Config, found: dict) -> None:
    """Operations over rates. No GPU was measured for this; memory traffic is not counted."""
    rows = found.setdefault("estimate", {})
    shares = ", ".join(f"{share:.0%} of {name}" for name, share in REACHED.items())
    print(f"\nESTIMATE, not measured: {config.steps} steps + decode, from operation counts and data"
          f"\nsheets ({shares}; FP8 and NVFP4: linear layers alone)")  # fmt: skip
    columns = [f"{gpu} {kind}" for gpu, rates in GPUS.items()
               for kind, rate in zip(("bf16", "FP8", "NVFP4"), rates) if rate]  # fmt: skip
    print(f"\n{'seconds':18}{'tokens':>7}{'TFLOP':>8}" + "".join(f"{c:>16}" for c in columns))
    for case in chosen(config):
        step, last = count_step(case), count_decode(case)
        total = config.steps * step.total + last.total
        cells = {}
        for gpu, rates in GPUS.items():
            for kind, rate in zip(("bf16", "FP8", "NVFP4"), rates):
                if rate:
                    share = REACHED["products" if kind == "bf16" else "fp8"]
                    plain = rates[0] * REACHED["products"]
                    seconds = (
                        config.steps
                        * (
                            step.products / (share * rate)
                            + step.attention / (rates[0] * REACHED["attention"])
                        )
                        + last.total / plain
                    )
                    cells[f"{gpu} {kind}"] = seconds / 1e12
        label = f"{case.name} {case.size}"
        rows[label] = {"tokens": case.tokens, "tflop": total / 1e12, **cells}
        print(f"{label:18}{case.tokens:7}{total / 1e12:8.0f}"
              + "".join(f"{cells[c]:16.2f}" for c in columns), flush=True)  # fmt: skip


# ---- training


def measure_training(config: Config, zoo: Zoo, found: dict) -> None:
    """Steps of stages 2 and 3 of the full-size models, frozen weights in bf16."""
    rate = runs.gemm_rate(zoo.device)
    found |= {"gpus": runs.world(), "gemm_tflops": rate / 1e12, "train": []}
    print(
        f"\n{runs.world()} GPUs, each {config.train_batch} pictures a step, "
        f"{config.micro_batch} at once; plain bf16 products: {rate / 1e12:.0f} TFLOP/s a GPU"
    )
    print(f"\n{'':29}{'trained':>9}{'s a step':>10}{'pictures/s':>12}{'TFLOP/s':>9}{'share':>7}"
          f"{'useful':>8}{'peak GiB':>10}")  # fmt: skip
    for case in (case for case in chosen(config) if not case.base):
        for stage in ("align", "lora"):
            label = f"{stage} {case.name} {case.size}"
            if zoo.late(label):
                continue
            with zoo.room(label):
                row = training_row(config, zoo, case, stage)
                row |= {"share": row["tflops"] / found["gemm_tflops"]}
                row |= {"useful": row["useful_tflops"] / found["gemm_tflops"]}
                found["train"].append(row)
                print(f"{stage:6}{case.name:13}{case.size:10}{row['trained'] / 1e6:7.0f} M"
                      f"{row['seconds']:10.3f}{row['pictures_per_s']:12.2f}{row['tflops']:9.0f}"
                      f"{row['share']:7.0%}{row['useful']:8.0%}{row['peak_gib']:10.1f}",
                      flush=True)  # fmt: skip
    print("share: of the plain products; useful: the same without what is computed a second time")


def training_row(config: Config, zoo: Zoo, case: Case, stage: str) -> dict:
    """Median of the steps after the first two; FLOP/s and memory are of one GPU."""
    script, cuda = {"align": align, "lora": lora}[stage], zoo.device.type == "cuda"
    flags = dict(batch_size=config.train_batch * runs.world(), micro_batch=config.micro_batch)
    flags |= dict(checkpointing=True, compile=config.compile, save_every=10**9)
    flags |= dict(rank=256, alpha=256.0) if stage == "lora" else {}
    options = script.Config(**flags)
    rehearsal = case.build()
    choose_trained(rehearsal, options)
    cost = align.cost(rehearsal, case.latents[2:])
    model = random_weights(case.build(), zoo.device, torch.bfloat16)
    choose_trained(model, options)
    for p in align.trained(model).values():
        p.data = p.data.float()
    runs.ready_blocks(align.blocks(model), options)
    if cuda:
        torch.cuda.reset_peak_memory_stats(zoo.device)
    seconds = training_steps(model, random_pictures(zoo, case), options, zoo.device)
    done = cost.forward + cost.backward
    # v(null) of the recovered velocity, half of the forward, carries no gradient: computed once.
    recomputed = done + cost.forward / (2 if align.takes_guidance(model) else 1)
    each = config.train_batch / seconds / 1e12
    return dict(
        stage=stage, model=case.name, size=case.size, seconds=seconds,
        trained=sum(p.numel() for p in align.trained(model).values()),
        pictures_per_s=options.batch_size / seconds,
        tflops=recomputed * each, useful_tflops=done * each,
        peak_gib=torch.cuda.max_memory_allocated(zoo.device) / 2**30 if cuda else 0.0,
    )  # fmt: skip


def choose_trained(model: nn.Module, options: align.Config | lora.Config) -> None:
    if isinstance(options, lora.Config):
        lora.choose_trained(model, options)
    else:
        align.choose_trained(model)


def random_pictures(zoo: Zoo, case: Case, n: int = 32) -> Pictures:
    _, cond, _, _ = zoo.inputs(case)
    cond = tuple(c.cpu() for c in cond)
    latents = torch.randn(n, *case.latents[1:], generator=torch.Generator().manual_seed(2))
    captions = torch.zeros(n, dtype=torch.long)
    return Pictures(None, latents, cond, captions, cond, guided=case.family == "flux")


def training_steps(
    model: nn.Module, pictures: Pictures, options, device: torch.device, steps: int = 7
) -> float:
    """Seconds of a step: the loop of align.py and lora.py, without their reports."""
    trained = align.trained(model)
    with tempfile.TemporaryDirectory() as folder:
        optimizer = runs.adamw([{"params": [*trained.values()]}])
        run = runs.Run("bench", trained, optimizer, options, Path(folder), clip=1.0)
        add_gradients = align.passes(model, options, align.takes_guidance(model), device)
        draw = ahead(lambda step: align.draw_batch(pictures, options, 3.0, step, "cpu"), device)
        for step in run.steps(steps + 1):  # one more, which is not reached: it would be saved
            run.update(add_gradients(draw(step)), 1e-5)
            if step + 1 == steps:
                break
        return statistics.median(row["seconds"] for row in run.metrics.rows[2:])


# ---- main

MEASURES = {
    "rates": measure_rates, "attention": measure_attention, "kernels": measure_kernels,
    "step": measure_steps, "decode": measure_decodes, "text": measure_text,
    "picture": measure_pictures, "throughput": measure_throughput, "ablate": measure_ladder,
}  # fmt: skip


def about(device: torch.device) -> dict:
    """What the figures were measured on, and of which commit."""
    facts = {"torch": torch.__version__, "triton": getattr(kernels.triton, "__version__", None)}
    facts["commit"] = runs.commit() or None
    if device.type == "cuda":
        facts["gpu"] = torch.cuda.get_device_name(device)
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        out = subprocess.run(query, capture_output=True, text=True).stdout.split()
        facts |= {"driver": out[0] if out else None, "cuda": torch.version.cuda}
    else:
        facts["cpu"] = f"{platform.machine()}, {torch.get_num_threads()} threads"
    return facts


def main() -> None:
    config = script.parse_config(Config, __doc__)
    device = runs.start(config.device)
    parts = [part for part in config.only.split(",") if part]
    if unknown := [part for part in parts if part not in MEASURES]:
        raise UserError(f"--only {','.join(unknown)}: wanted some of {','.join(MEASURES)}")
    for name in ("steps", "batch", "train_batch", "micro_batch"):
        if getattr(config, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} {getattr(config, name)}: wanted 1 or more")
    if config.baseline not in ("", "diffusers"):
        raise UserError(f"--baseline {config.baseline!r}: wanted diffusers")
    if device.type != "cuda" and (parts or config.baseline or config.train):
        raise UserError(
            f"--only, --baseline and --train measure a GPU, here is {device}: leave them out"
        )
    dtype = script.pick_dtype(config.dtype)
    if dtype == torch.float32:
        raise UserError("--dtype fp32: wanted bf16 or fp16; a CPU measures the toy in fp32")
    chosen(config)  # what is wrong with the cases or formats is told now
    formats(config, device)
    zoo = Zoo(
        device, dtype if device.type == "cuda" else torch.float32, config.limit, config.weights
    )
    found = {"stage": "bench", **about(device)}
    print("bench | " + " | ".join(f"{key} {value}" for key, value in found.items() if value))
    found["config"] = asdict(config)
    if config.train:
        measure_training(config, zoo, found)
    elif device.type == "cuda":
        for part in parts or MEASURES:
            MEASURES[part](config, zoo, found)
            torch.cuda.empty_cache()
        if config.baseline:
            measure_diffusers(config, zoo, found)
    else:
        measure_toy(config, zoo, found)
        estimate(config, found)
    if zoo.left_out:
        print(f"\nleft out at {config.limit:g} s (--limit): {', '.join(zoo.left_out)}")
    print(json.dumps(found | {"left_out": zoo.left_out}))
    runs.finish()


if __name__ == "__main__":
    script.exit_cleanly(main)
