"""What a training run needs besides its method: that nothing is lost, on one GPU or on many.

What    `Run` is a stage's state on disk: what is trained, AdamW's moments, the moving average, the
        step. `start`, `rank`, `world`, `on_first` are the several processes of torchrun.
        `checkpoint_blocks` and `estimate` are what makes 12 B parameters fit, and tells so before.
Why     A run of days is interrupted: by Ctrl-C, by a scheduler's SIGTERM, by kill -9, by a full
        disk, by a NaN. Started again, the same command goes on to the same bits.
How     Batch `step` is a function of the seed and the step alone, so a run is its tensors and a
        number: no state of generators or of a data loader is to be kept.
        Data parallel: every process takes its share of one global batch, and gradients are summed.
"""

import fcntl
import functools
import json
import math
import os
import shlex
import signal
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from models import script, weights
from models.script import UserError


@dataclass(frozen=True)
class Options:
    """Flags of both trainers that are not the method. --batch-size is that of all GPUs together."""

    micro_batch: int = 0  # pictures a GPU takes at once; 0: its share of the batch
    checkpointing: bool = False  # keep the blocks' inputs, compute the rest again: saves memory
    warmup: int = 0  # steps over which the learning rate rises
    ema: float = 0.0  # decay of a moving average, e.g. 0.999, which is then what is saved; 0: none
    dtype: str = ""  # of frozen weights and encoders: fp32, bf16; "": fp32 for toys and on a CPU
    compile: bool = False  # for a GPU: some 40 s once, then shorter steps
    graph: bool = False  # for a GPU and a small model: a step's passes as one CUDA graph
    keep: int = 2  # progress files that stay, the newest
    preview_every: int = 0  # steps between pictures of held-out captions; 0: none


# May differ when an interrupted run goes on: they move memory and files, not the result.
MAY_CHANGE = {"micro_batch", "checkpointing", "keep", "preview_every", "save_every"}
MAY_CHANGE |= {"device", "out", "weights", "compile", "graph", "save_dtype"}
PATIENCE = 10  # steps in a row that may be skipped
LIMITS = {  # what flags may be, both ends included
    **dict.fromkeys(("steps", "embed_steps", "micro_batch", "warmup", "preview_every"), (0, 10**9)),
    **dict.fromkeys(("per_task", "resolution", "scenes", "position_stride"), (0, 10**6)),
    **dict.fromkeys(("rank", "batch_size", "embed_batch", "save_every", "keep"), (1, 10**9)),
    **dict.fromkeys(("lr", "embed_lr", "door_rate", "alpha"), (1e-12, 1e6)),
    "decay": (0, 1e6), "shift": (0, 1e3), "guidance_max": (1, 1e3), "seed": (0, 2**40),
    "dropout": (0, 1), "ema": (0, 0.999999),
}  # fmt: skip

# ---- processes


def start(name: str) -> torch.device:
    """This process's device; under torchrun also the group, in which only the first one prints."""
    device = script.pick_device(name)
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32, for the toys: the rest is in bf16
    if "RANK" not in os.environ:
        return device
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    # The others wait while the first one scans a large folder, or draws the last pictures.
    backend = "nccl" if device.type == "cuda" else "gloo"
    bound = device if device.type == "cuda" else None
    dist.init_process_group(backend, timeout=timedelta(hours=12), device_id=bound)
    if rank() > 0:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  for the rest of the process
    return device


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def on_first(function: Callable[[], object]) -> object:
    """function() of the first process, for all."""
    if world() == 1:
        return function()
    box = [function() if rank() == 0 else None]
    dist.broadcast_object_list(box, 0)
    return box[0]


def wait_for_all() -> None:
    if world() > 1:
        dist.barrier()


def finish() -> None:
    """The processes end together."""
    if world() > 1:
        dist.barrier()
        dist.destroy_process_group()


def total(value: float, device: torch.device) -> float:
    """The sum over processes."""
    if world() == 1:
        return value
    box = torch.tensor(value, dtype=torch.float64, device=device)
    dist.all_reduce(box)
    return box.item()


# ---- the run folder


def folder_of(config) -> Path:
    """--out, or runs/<model>: the name of a preset, a repository, a folder or a file."""
    name = Path(config.model).name
    suffix = next((s for s in weights.SUFFIXES if name.endswith(s)), "")
    return Path(config.out or f"runs/{name.removesuffix(suffix)}")


def check_flags(config) -> None:
    """UserError: a number that no run can have, or fewer pictures a step than GPUs."""
    for field in fields(config):
        low, high = LIMITS.get(field.name, (None, None))
        value, flag = getattr(config, field.name), f"--{field.name.replace('_', '-')}"
        if low is not None and not low <= value <= high:  # NaN is neither
            raise UserError(f"{flag} {value}: wanted {low:g} to {high:g}")
        if field.name in ("batch_size", "embed_batch") and value < world():
            raise UserError(f"{flag} {value} on {world()} GPUs: wanted a picture for each")


def check_size(size: int, factors: list[int]) -> None:
    """UserError: a picture of this size is no whole number of tokens."""
    for factor in factors:
        if size % factor:
            raise UserError(
                f"--resolution {size} is no multiple of {factor}: "
                f"try {size // factor * factor or factor}"
            )


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """One run a folder. The system drops the lock with the process, however that ends."""
    if rank() > 0:
        yield
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / ".lock").open("a+")
    except OSError as error:
        raise UserError(f"--out {folder} cannot be written ({error.strerror})") from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise UserError(
                f"{folder} is in use by {file.read().strip() or 'another run'}: wait for it, or "
                f"pass another --out"
            ) from None
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        for partial in (*folder.glob(".tmp*"), *folder.glob("cache/**/.tmp*")):
            partial.unlink()  # ours or safetensors', of a run that was killed inside a save
        yield


class Stop:
    """Ctrl-C and SIGTERM ask for an end after this step; a second Ctrl-C does not wait."""

    def __init__(self):
        self.signal, self.time = 0, 0.0

    def __enter__(self) -> "Stop":
        self.before = {s: signal.signal(s, self.ask) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def ask(self, number: int, _frame) -> None:
        # torchrun hands on the Ctrl-C that the terminal has given to all: that one is no second.
        if self.signal == number == signal.SIGINT and time.monotonic() - self.time > 1:
            raise KeyboardInterrupt
        if not self.signal:
            self.signal, self.time = number, time.monotonic()

    def asked(self, device: torch.device) -> int:
        """The signal, of whichever process: all stop at the same step."""
        if world() == 1:
            return self.signal
        box = torch.tensor(self.signal, device=device)
        dist.all_reduce(box, dist.ReduceOp.MAX)
        return int(box)


# ---- one stage


class Run:
    """One stage: its loop's progress on disk, its measurements, and the update that is safe.

    for step in run.steps(n):  goes on where an earlier process stopped, and saves on the way
        ... loss.backward() ...
        run.update(loss, lr)
    """

    def __init__(
        self,
        stage: str,
        trained: dict[str, Tensor],
        optimizer,
        config,
        out: Path,
        clip: float = 0,
        origin: str = "",
    ):
        """origin: the digest of what is trained on and from; the progress of another is refused."""
        self.stage, self.trained, self.optimizer = stage, trained, optimizer
        self.config, self.out, self.clip, self.origin = config, out, clip, origin
        self.device = next(iter(trained.values())).device
        self.skipped, self.updates, self.bar = 0, 0, None
        self.average = {}
        self.first = self.resume()
        if world() > 1:
            for p in trained.values():
                dist.broadcast(p.data, 0)
        if config.ema and not self.average:
            self.average = {name: p.detach().clone() for name, p in trained.items()}
        self.metrics = Metrics(out / "metrics.jsonl", stage, self.first)

    def steps(self, last: int) -> Iterator[int]:
        """The steps that are left. After Ctrl-C or SIGTERM: saves, and ends the process."""
        steps = range(self.first, last)
        off = rank() > 0
        self.bar = tqdm(steps, self.stage, initial=self.first, total=last, disable=off)
        with Stop() as stop:
            for step in self.bar:
                self.step, self.started = step, time.perf_counter()
                yield step
                number = stop.asked(self.device)
                if number or (step + 1) % self.config.save_every == 0 or step + 1 == last:
                    self.save(step + 1)  # the last one too: what follows may be interrupted
                    number = stop.asked(self.device)  # perhaps meanwhile
                if number:
                    self.bar.close()
                    again = f"step {step + 1} of {last} is saved: the same command goes on"
                    print(f"stopped by {signal.Signals(number).name}; {again}", file=sys.stderr)
                    sys.exit(128 + number)

    def update(self, loss: Tensor, lr: float, names: Callable[[], list[str]] = list) -> None:
        """One step of the optimizer, with the gradients of all processes, if all is finite.

        loss: this process's share of the batch's; names: what the batch is of, for the report.
        """
        parameters = list(self.trained.values())
        if world() > 1:
            works = [dist.all_reduce(p.grad, async_op=True) for p in parameters]
            dist.all_reduce(loss)
            for work in works:
                work.wait()
        # Without a limit: the norm for the record, and no gradient is changed.
        norm = nn.utils.clip_grad_norm_(parameters, self.clip or math.inf)
        loss, norm = loss.item(), norm.item()
        lr *= min(1.0, (self.step + 1) / (self.config.warmup + 1))
        if math.isfinite(loss) and math.isfinite(norm):
            for group in self.optimizer.param_groups:
                group["lr"] = lr * group.get("scale", 1.0)
            self.optimizer.step()
            self.updates, self.skipped = self.updates + 1, 0
            self.update_average()
        else:
            self.skip(loss, norm, names())
        self.optimizer.zero_grad(set_to_none=not self.config.graph)  # a graph writes in place
        seconds = time.perf_counter() - self.started
        self.metrics.add(self.step, loss=loss, lr=lr, norm=norm, seconds=round(seconds, 4))
        self.bar.set_postfix(loss=f"{loss:.3f}", lr=f"{lr:.1e}", refresh=False)

    def skip(self, loss: float, norm: float, names: list[str]) -> None:
        self.skipped += 1
        of = f"; its pictures: {', '.join(names)}" if names else ""
        what = f"{self.stage} step {self.step}: loss {loss}, gradient norm {norm}"
        if rank() == 0:
            self.bar.write(f"skipped {what}{of}", file=sys.stderr)
        if self.skipped == PATIENCE:
            raise UserError(
                f"{what}, the {PATIENCE}th step in a row that is not finite: delete {self.out}/"
                f"{self.stage}.progress-* and begin anew with a lower --lr; the last is sound{of}"
            )

    @torch.no_grad()
    def update_average(self) -> None:
        """average += (1 - decay) (p - average), with a shorter memory while there is little."""
        if self.average:
            decay = min(self.config.ema, (1 + self.updates) / (10 + self.updates))
            averages = [self.average[name] for name in self.trained]
            torch._foreach_lerp_(averages, [*self.trained.values()], 1 - decay)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """The moving average in the place of what is trained, if there is one."""
        self.swap()
        yield
        self.swap()

    def swap(self) -> None:
        for name, average in self.average.items():
            p = self.trained[name]
            p.data, self.average[name] = average, p.data

    # -- on disk

    def files(self) -> list[Path]:
        """Progress files, the newest first."""
        return sorted(self.out.glob(f"{self.stage}.progress-*.safetensors"), reverse=True)

    def save(self, step: int) -> None:
        """All that step `step` depends on, in a new file; older ones go once it is there."""
        if rank() == 0:
            tensors = {}
            for name, p in self.trained.items():
                moments = self.optimizer.state.get(p)
                tensors[name] = p
                if moments:  # none before the first update
                    tensors[f"{name}.mean"] = moments["exp_avg"]
                    tensors[f"{name}.square"] = moments["exp_avg_sq"]
                if name in self.average:
                    tensors[f"{name}.average"] = self.average[name]
            notes = {"step": step, "updates": self.updates, "origin": self.origin}
            notes["command"] = asdict(self.config)
            path = self.out / f"{self.stage}.progress-{step:08d}.safetensors"
            weights.save(path, tensors, {k: json.dumps(v) for k, v in notes.items()})
            for old in self.files()[max(self.config.keep, 1) :]:
                old.unlink()
        wait_for_all()

    def resume(self) -> int:
        """The step to go on at: 0, or that of an interrupted run with the same settings."""
        for path in self.files():
            try:
                checkpoint = weights.open_checkpoint(path)
            except UserError as error:
                print(f"passed over: {error}", file=sys.stderr)
                continue
            told, now = json.loads(checkpoint.metadata["command"]), asdict(self.config)
            changed = [k for k in now if now[k] != told.get(k) and k not in MAY_CHANGE]
            if changed:
                then = ", ".join(f"--{k.replace('_', '-')} {told.get(k)}" for k in changed)
                raise UserError(
                    f"{path} is of an interrupted run with {then}: run that command again to "
                    f"finish it, or delete {self.out}/*.progress-*"
                )
            if json.loads(checkpoint.metadata.get("origin", '""')) != self.origin:
                raise UserError(
                    f"{path} is of an interrupted run on other pictures, or from another file of "
                    f"align.py: bring these back to finish it, or delete {self.out}/*.progress-*"
                )
            self.updates = int(checkpoint.metadata["updates"])
            for name, p in self.trained.items():
                self.load_row(name, p, checkpoint)
            return int(checkpoint.metadata["step"])
        return 0

    def load_row(self, name: str, p: Tensor, checkpoint: weights.Checkpoint) -> None:
        p.data.copy_(checkpoint.get(name))
        if f"{name}.mean" in checkpoint.shapes:
            mean, square = (checkpoint.get(f"{name}.{k}").to(p.device) for k in ("mean", "square"))
            on_device = self.optimizer.defaults.get("fused")
            updates = torch.tensor(float(self.updates), device=p.device if on_device else "cpu")
            self.optimizer.state[p] = {"step": updates, "exp_avg": mean, "exp_avg_sq": square}
        if f"{name}.average" in checkpoint.shapes:
            self.average[name] = checkpoint.get(f"{name}.average").to(p.device)

    def done(self) -> None:
        """What is trained becomes its average, if there is one."""
        self.swap()
        self.average = {}


def save_last(path: Path, tensors: dict[str, Tensor], notes: dict[str, str]) -> None:
    """What the stage is for."""
    if rank() == 0:
        weights.save(path, tensors, notes)
    wait_for_all()


def delete_progress(path: Path) -> None:
    """Once all is told, the way there is no longer needed."""
    for file in path.parent.glob(f"{path.stem}*.progress-*.safetensors"):
        file.unlink()


def with_large(doc: str, flags: dict) -> str:
    """A script's help, and what flags are for official models unless given."""
    spelled = [f"--{k.replace('_', '-')}" + f" {v}" * (v is not True) for k, v in flags.items()]
    return f"{doc}\n{textwrap.fill('For official models: ' + '  '.join(spelled), 100)}"


def same_flags(config) -> str:
    """Of this command, what the next one needs to be about the same run."""
    shared = ("model", "data", "weights", "resolution", "out")
    given = {f.name: getattr(config, f.name) for f in fields(config) if f.name in shared}
    plain = {f.name: f.default for f in fields(config)} | {"model": ""}
    return " ".join(f"--{k} {shlex.quote(str(v))}" for k, v in given.items() if v != plain[k])


def adamw(groups: list[dict]) -> torch.optim.AdamW:
    """groups: {"params": [...], "scale": of the learning rate, "weight_decay": 0 unless given}.

    Fused where it is large: unfused, AdamW's temporaries are a copy of all that is trained.
    """
    parameters = [p for group in groups for p in group["params"]]
    is_large = sum(p.numel() for p in parameters) > 10**8 and parameters[0].is_cuda
    return torch.optim.AdamW(groups, betas=(0.9, 0.99), weight_decay=0.0, fused=is_large)


def commit() -> str:
    """Of this code; "" outside of a git clone."""
    git = ["git", "-C", str(weights.ROOT), "rev-parse", "--short", "HEAD"]
    try:
        return subprocess.run(git, capture_output=True, text=True).stdout.strip()
    except OSError:  # no git
        return ""


def header(config, stage: str, spec: dict, model: nn.Module, step: int) -> dict[str, str]:
    """What makes a run loadable and repeatable, as a safetensors header holds it: strings.

    spec: what sample.describe says of the base, with the run's own autoencoder, shift and size.
    """
    facts = dict(
        stage=stage, base=spec["transformer"], autoencoder=spec["autoencoder"],
        config=model.config, shift=spec.get("shift"), size=spec["size"],
        seed=config.seed, step=step, command=asdict(config),
        commit=commit(), torch=torch.__version__,
    )  # fmt: skip
    return {k: v if isinstance(v, str) else json.dumps(v) for k, v in facts.items()}


class Metrics:
    """metrics.jsonl: a line a step, of all stages of the run folder."""

    def __init__(self, path: Path, stage: str, first: int):
        """Forget what this stage wrote of steps that are to be done again."""
        self.path, self.stage, self.rows = path, stage, []
        if rank() > 0:
            return
        lines = path.read_text(errors="replace").splitlines() if path.exists() else []
        kept = []
        for line in lines:
            try:
                row = json.loads(line)
                is_ours = row["stage"] == stage
                is_past = row["step"] < first
            except (ValueError, LookupError, TypeError):
                continue  # cut short by a kill
            if is_ours and is_past:
                self.rows.append(row)
            if is_past or not is_ours:
                kept.append(line)
        text = "".join(line + "\n" for line in kept)
        weights.write_whole(path, lambda file: file.write_text(text))

    def add(self, step: int, **figures) -> None:
        row = {"stage": self.stage, "step": step, **figures}
        self.rows.append(row)
        if rank() == 0:
            with self.path.open("a") as file:
                file.write(json.dumps(row) + "\n")

    def curve(self, figure: str) -> list[tuple[int, float]]:
        """(step, value) of every row that has this figure."""
        return [(row["step"], row[figure]) for row in self.rows if figure in row]


# ---- memory and time


def ready_blocks(blocks: list[nn.Module], config) -> None:
    """--compile and --checkpointing, block by block: blocks of a kind are compiled once."""
    # On Hopper, torch 2.11's default, cuDNN's attention, has a faulty backward (NaN: pytorch issue
    # 196678); a step of FLUX with it ended in an illegal address on an H200.
    torch.backends.cuda.enable_cudnn_sdp(False)
    for block in blocks:
        if config.compile:
            block.forward = torch.compile(block.forward)
        if config.checkpointing:  # no block draws random numbers
            how = dict(use_reentrant=False, preserve_rng_state=False)
            block.forward = functools.partial(checkpoint, block.forward, **how)


def eager(function: Callable) -> Callable:
    """For functions that measure and show: blocks compiled for steps run as they are.

    Every batch of another size would be compiled anew, longer than it takes.
    """

    @functools.wraps(function)
    def run(*args, **kwargs):
        # Not around `function` as a whole: that would load the compiler when a script starts.
        with torch.compiler.set_stance("force_eager"):
            return function(*args, **kwargs)

    return run


def captured(step: Callable, warmup: int = 3) -> Callable:
    """`step()` as one CUDA graph: at toy sizes a step is hundreds of launches and little work.

    What step returns, the next call overwrites. On a CPU: step itself.
    """
    if not torch.cuda.is_available():
        return step
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(warmup):  # kernels are chosen, and every parameter gets its gradient
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step()

    def replay():
        graph.replay()
        return out

    return replay


def replayed(function: Callable, model: nn.Module) -> Callable:
    """function(batch, share), which adds to the gradients, `captured` for each shape of a batch."""
    recorded = {}

    def call(batch, share: float) -> Tensor:
        key = (share, *(tensor.shape for tensor in batch.tensors()))
        if key not in recorded:
            parameters = [p for p in model.parameters() if p.requires_grad]
            before = [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in parameters]
            kept = batch.clone()
            recorded[key] = kept, captured(lambda: function(kept, share))
            for p, gradient in zip(parameters, before):  # the rehearsals do not count
                p.grad.copy_(gradient)
        kept, replay = recorded[key]
        for mine, new in zip(kept.tensors(), batch.tensors()):
            mine.copy_(new)
        return replay()

    return call


def keep_mixed(model: nn.Module) -> None:
    """All weights to fp32, for updates too small for bf16; `autocast` goes on as before."""
    model.mixed = any(p.dtype == torch.bfloat16 for p in model.parameters())
    model.float()


def autocast(model: nn.Module, device: torch.device):
    """bf16 for matmuls, where weights are bf16 and what is trained is fp32."""
    mixed = getattr(model, "mixed", False)
    mixed = mixed or any(p.dtype == torch.bfloat16 for p in model.parameters())
    # Without the cache: a graph would find a copy of a weight that is no longer there.
    return torch.autocast(device.type, torch.bfloat16, enabled=mixed, cache_enabled=False)


def gemm_rate(device: torch.device) -> float:
    """bf16 matrix products of this device, in FLOP/s, over a tenth of a second or so."""
    n = 8192 if device.type == "cuda" else 256
    a = torch.randn(n, n, device=device, dtype=torch.bfloat16)
    for count in (5, 50):  # the first to warm up
        begin = time.perf_counter()
        for _ in range(count):
            a @ a
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    return count * 2 * n**3 / (time.perf_counter() - begin)


@dataclass(frozen=True)
class Cost:
    """What one picture costs in one pass of a training step; counted on the meta device."""

    forward: int  # FLOP
    backward: int
    kept: int  # bytes that the backward pass needs
    inputs: int  # bytes of the inputs of all blocks
    blocks: int


def count(loss: Callable[[], Tensor], model: nn.Module, blocks: list[nn.Module]) -> Cost:
    """Run `loss` of one picture on the meta device: every operation and shape, no arithmetic."""
    own = {p.untyped_storage()._cdata for p in model.parameters()}
    kept, inputs = {}, []

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = (storage.nbytes(), tensor)  # held: an id may not be used twice
        return tensor

    def look(_, args: tuple) -> None:
        inputs.extend(a.nbytes for a in args if isinstance(a, Tensor))

    hooks = [block.register_forward_pre_hook(look) for block in blocks]
    with FlopCounterMode(display=False) as counter:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            value = loss()
        forward = counter.get_total_flops()
        value.backward()
    for hook in hooks:
        hook.remove()
    nbytes = sum(size for size, _ in kept.values())
    backward = counter.get_total_flops() - forward
    return Cost(forward, backward, nbytes, sum(inputs), len(blocks))


def estimate(cost: Cost, model: nn.Module, config, steps: int, device: torch.device) -> str:
    """Memory of a GPU and time of a step, in two lines, before anything large is loaded."""
    dtype = 2 if frozen_dtype(config, device) == torch.bfloat16 else 4
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    frozen = sum(p.numel() for p in model.parameters()) - trained
    share = math.ceil(config.batch_size / world())
    micro = min(config.micro_batch or share, share)
    activations = cost.kept
    if config.checkpointing:  # the inputs of all blocks, and all of the one at work
        activations = cost.inputs + cost.kept // cost.blocks
    parts = {
        "frozen": dtype * frozen,
        "trained": 4 * trained,
        "gradients": 4 * trained,
        "AdamW": 8 * trained,
        "average": 4 * trained * bool(config.ema),
        "activations": micro * activations,
    }
    gb = {name: size / 1e9 for name, size in parts.items() if size}
    words = " + ".join(f"{value:.1f} {name}" for name, value in gb.items())
    report = f"memory  {words} = {sum(gb.values()):.0f} GB"
    # Forward, once more if activations were not kept, and backward.
    flops = cost.forward * (1 + config.checkpointing) + cost.backward
    flops *= config.batch_size
    if device.type != "cuda":
        return f"{report}\ntime    {flops / 1e12:.1f} TFLOP a step"
    room = torch.cuda.get_device_properties(device).total_memory / 1e9
    rate = gemm_rate(device)
    seconds = flops / (0.45 * rate) / world()
    report += f" of {room:.0f}" + " (does NOT fit)" * (sum(gb.values()) > room)
    return (
        f"{report}\ntime    {flops / 1e12:.0f} TFLOP a step; at 45% of the {rate / 1e12:.0f} "
        f"TFLOP/s this GPU multiplies with: {seconds:.1f} s a step, {seconds * steps / 3600:.1f} h"
    )


def frozen_dtype(config, device: torch.device, is_toy: bool = False) -> torch.dtype:
    """--dtype; by default fp32 for toys and on a CPU, where fp32 is faster, else bf16."""
    plain = device.type != "cuda" or is_toy
    dtype = script.pick_dtype(config.dtype or ("fp32" if plain else "bf16"))
    if dtype == torch.float16:
        raise UserError("--dtype fp16: small gradients are zero in it; wanted bf16 or fp32")
    return dtype
