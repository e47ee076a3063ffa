"""What a training run needs around its loop: that nothing is lost, on one GPU or on many.

What    `Run` keeps a stage's progress on disk: what is trained, AdamW's moments, the moving average
        and the step. `start`, `rank`, `world` and `on_first` are the processes of torchrun.
Why     A run of days is interrupted: by Ctrl-C, by a scheduler's SIGTERM, by kill -9, by a full
        disk, by a NaN. The same command then goes on where it was: on a CPU to the same bits.
How     Batch `step` is a function of the seed and the step alone, so progress is tensors and a
        number. No state of a random generator or of a data loader has to be kept.
        Data parallel: each process takes its share of one global batch, and gradients are summed.
"""

import fcntl
import functools
import importlib.util
import json
import math
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, fields
from datetime import timedelta
from itertools import groupby, product
from pathlib import Path

import torch
import torch.distributed as dist
from PIL import Image, ImageDraw
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

from models import hub, script, weights
from models.registry import Spec
from models.script import UserError

# These flags may differ when an interrupted run goes on: they move memory and files, no result.
# (Which pictures lie in --data, the origin says.)
MAY_CHANGE = {"micro_batch", "save_every", "device", "out", "weights", "data"}
PATIENCE = 10  # steps in a row that may be skipped
KEPT = 2  # progress files: the newest, and the one before in case that is damaged

# ---- processes


def start(name: str) -> torch.device:
    """This process's device. Under torchrun it joins the group, in which only rank 0 prints."""
    device = script.pick_device(name)
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32, for the toys: the rest is in bf16
    if "RANK" not in os.environ:
        return device
    backend, bound = "gloo", None
    if device.type == "cuda":
        backend, bound = "nccl", torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(bound)
    # The others wait while rank 0 scans a large folder, or draws the last pictures.
    dist.init_process_group(backend, timeout=timedelta(hours=12), device_id=bound)
    if rank() > 0:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  for the rest of the process
    return bound or device


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def on_first(function: Callable[[], object]) -> object:
    """function() of rank 0, for all processes, which wait for it."""
    box = [function() if rank() == 0 else None]
    if world() > 1:
        dist.broadcast_object_list(box, 0)
    return box[0]


def wait_for_all() -> None:
    if world() > 1:
        dist.barrier()


def finish() -> None:
    """The processes end together."""
    wait_for_all()
    if dist.is_initialized():
        dist.destroy_process_group()


def over_gpus(value: float, device: torch.device, op: dist.ReduceOp = dist.ReduceOp.SUM) -> float:
    """The sum of `value` over processes, or what else `op` is."""
    if world() == 1:
        return value
    box = torch.tensor(value, dtype=torch.float64, device=device)
    dist.all_reduce(box, op)
    return box.item()


def sum_of_all(total: Tensor, device: torch.device) -> Tensor:
    """The sum of `total`, on the CPU, over processes."""
    if world() > 1:
        total = total.to(device)
        dist.all_reduce(total)
    return total.cpu()


def sum_over_gpus(loss: Tensor, parameters: Iterable[Tensor]) -> None:
    """In place: the loss and the gradients become those of the whole batch, on every GPU."""
    if world() > 1:
        works = [dist.all_reduce(p.grad, async_op=True) for p in parameters]
        dist.all_reduce(loss)
        for work in works:
            work.wait()


# ---- the run folder


def folder_of(config, trains: bool = True) -> Path:
    """--out, or runs/<model>: the name of a preset, a repository, a folder or a file.

    Training that goes on from runs/x/lora.safetensors, or an export beside it, is runs/x-2.
    """
    path = Path(config.model)
    path = path.parent if path.stem == "transformer" else path  # of an export
    is_ours = path.stem in ("lora", "diffusers", "comfyui") and path.exists()
    name = path.absolute().parent.name + "-2" * trains if is_ours else path.name
    suffix = next((s for s in hub.SUFFIXES if name.endswith(s)), "")
    return Path(config.out or f"runs/{name.removesuffix(suffix)}")


def check_flags(config, size: int, factors: Sequence[int]) -> None:
    """UserError: fewer pictures a step than GPUs, or a `size` that is no whole number of tokens.

    factors: pixels a side that one token covers, of the base and of the new model.
    """
    least = {"batch_size": world(), "rank": 1, "save_every": 1}
    for name, low in least.items():
        if (value := getattr(config, name, low)) < low:
            flag = f"--{name.replace('_', '-')} {value}"
            raise UserError(f"{flag} on {world()} GPUs: wanted {low} or more")
    factor = math.lcm(*factors)
    if size % factor:
        nearest = size // factor * factor or factor
        raise UserError(f"--resolution {size} is no multiple of {factor}: try {nearest}")


def check_room(folder: Path, size: int = 0, what: str = "") -> None:
    """Make the folder. OSError: it takes no files. UserError: it takes not so many bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    tempfile.TemporaryFile(dir=folder).close()
    size, free = math.ceil(size / 1e6), shutil.disk_usage(folder).free // 10**6
    if size > free:
        told = f"{what} may take {size:,} MB in {folder}, and {free:,} MB are free"
        raise UserError(f"{told}: free some room, or name another --out")


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """One run a folder. The system drops the lock with the process, however that ends."""
    if rank() > 0:
        yield
        return
    check_room(folder)
    with (folder / ".lock").open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            cure = "wait for it, or pass another --out"
            raise UserError(f"{folder} is in use by {file.read()}: {cure}") from None
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        for partial in (*folder.glob(".tmp*"), *folder.glob("cache/**/.tmp*")):
            partial.unlink()  # of a run that was killed inside a save
        yield


@contextmanager
def signals(device: torch.device) -> Iterator[Callable[[], int]]:
    """Ctrl-C and SIGTERM are written down: the step at work is finished and saved first.

    What it yields returns the signal that any process was sent, so that all stop together, or 0.
    """
    asked, numbers = [0], (signal.SIGINT, signal.SIGTERM)
    before = {n: signal.signal(n, lambda number, _: asked.append(number)) for n in numbers}
    try:
        yield lambda: int(over_gpus(max(asked), device, dist.ReduceOp.MAX))
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# ---- one stage


class Run:
    """Progress of one stage: resume, save, stop, skip what is not finite, average, log.

    for step in run.steps(last):   goes on where an earlier process stopped
        ...                        forward, backward, run.is_finite, optimizer.step
        run.log(...)
    """

    def __init__(
        self,
        stage: str,  # names the files: <out>/<stage>.progress-*
        trained: dict[str, Tensor],
        optimizer: torch.optim.AdamW,
        config,  # of the script, --out included; progress made with other flags is refused
        origin: str = "",  # digest of what is trained on and from; other progress is refused
    ):
        self.stage, self.trained, self.optimizer = stage, trained, optimizer
        self.config, self.out, self.origin = config, Path(config.out), origin
        self.device = next(iter(trained.values())).device
        self.skipped, self.updates, self.average, self.watched = 0, 0, {}, []
        self.events = None
        self.out.mkdir(parents=True, exist_ok=True)
        self.first = self.resume()
        if on_first(lambda: self.first) != self.first:
            raise UserError(f"rank {rank()} finds other progress in {self.out}: all need one disk")
        if world() > 1:
            for p in trained.values():
                dist.broadcast(p.data, 0)
        if config.ema and not self.average:
            self.average = {name: p.detach().clone() for name, p in trained.items()}
        if rank() == 0 and importlib.util.find_spec("tensorboard"):
            from torch.utils.tensorboard import SummaryWriter

            self.events = SummaryWriter(self.out / "events" / stage, purge_step=self.first)

    def steps(self, last: int) -> Iterator[int]:
        """The steps that are left. After Ctrl-C or SIGTERM it saves and ends the process."""
        steps = range(self.first, last)
        bar = tqdm(steps, self.stage, initial=self.first, total=last, disable=rank() > 0)
        with signals(self.device) as asked, bar as self.bar:
            for step in bar:
                self.step, self.started = step, time.perf_counter()
                yield step
                number = asked()
                if number or (step + 1) % self.config.save_every == 0 or step + 1 == last:
                    self.save(step + 1)  # the last one too: what follows may be interrupted
                    number = asked()  # a signal may have come meanwhile
                if number:
                    bar.close()
                    again = f"step {step + 1} of {last} is saved: the same command goes on"
                    print(f"stopped by {signal.Signals(number).name}; {again}", file=sys.stderr)
                    sys.exit(128 + number)

    def is_finite(self, loss: Tensor, norm: Tensor, names: list[str]) -> bool:
        """Is this step sound? If not it is reported with `names`, those of its pictures.

        UserError: ten in a row are not. Nothing of them is saved.
        """
        if math.isfinite(loss.item()) and math.isfinite(norm.item()):
            self.updates, self.skipped = self.updates + 1, 0
            return True
        self.skipped += 1
        what = f"{self.stage} step {self.step}: loss {loss.item()}, gradient norm {norm.item()}"
        what += f"; its pictures: {', '.join(names)}" if names else ""
        if rank() == 0:
            self.bar.write(f"skipped {what}", file=sys.stderr)
        if self.skipped == PATIENCE:
            raise UserError(
                f"{what}; the {PATIENCE}th step in a row that is not finite: begin anew with a "
                f"lower --lr and without {self.out}/{self.stage}.progress-*"
            )
        return False

    @torch.no_grad()
    def update_average(self) -> None:
        """average += (1 - decay) (p - average), with a shorter memory in the first steps."""
        if self.average:
            decay = min(self.config.ema, (1 + self.updates) / (10 + self.updates))
            averages = [self.average[name] for name in self.trained]
            torch._foreach_lerp_(averages, [*self.trained.values()], 1 - decay)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Inside, the moving average stands in the place of what is trained, if there is one."""
        self.swap()
        yield
        self.swap()

    def swap(self) -> None:
        for name, average in self.average.items():
            p = self.trained[name]
            p.data, self.average[name] = average, p.data

    def done(self) -> None:
        """What is trained becomes its average, if there is one."""
        self.swap()
        self.average = {}

    def log(self, **figures: float | Tensor) -> None:
        """A line of metrics.jsonl, which all stages share; loss and learning rate to the bar."""
        row = {k: v.item() if isinstance(v, Tensor) else v for k, v in figures.items()}
        row = {"stage": self.stage, "step": self.step, **row}
        if "loss" in row:
            row["seconds"] = round(time.perf_counter() - self.started, 4)
            self.bar.set_postfix_str(f"loss {row['loss']:.3f}, lr {row['lr']:.1e}", refresh=False)
        else:
            self.watched.append(row)
        if rank() == 0:
            with (self.out / "metrics.jsonl").open("a") as file:
                file.write(json.dumps(row) + "\n")
        for name in figures if self.events else ():
            self.events.add_scalar(name, row[name], self.step)

    def show(self, images: Tensor) -> None:
        """Pictures (B, 3, H, W) that were drawn on the way, for tensorboard."""
        if self.events:
            self.events.add_images("preview", images.clamp(-1, 1) / 2 + 0.5, self.step)

    def curve(self, figure: str) -> list[tuple[int, float]]:
        """(step, value) of what is measured on the way, also before an interruption."""
        return [(row["step"], row[figure]) for row in self.watched]

    def files(self) -> list[Path]:
        """Progress on disk, the newest first."""
        return sorted(self.out.glob(f"{self.stage}.progress-*.safetensors"), reverse=True)

    def save(self, step: int) -> None:
        """All that step `step` depends on, in a new file. Older files go once it is there."""
        if rank() == 0:
            tensors = dict(self.trained)
            tensors |= {f"{name}.average": average for name, average in self.average.items()}
            for name, p in self.trained.items():
                moments = self.optimizer.state.get(p, {})  # none before the first update
                tensors |= {f"{name}.{kind}": moment for kind, moment in moments.items()}
            notes = {"step": step, "updates": self.updates, "origin": self.origin}
            notes |= {"command": asdict(self.config), "watched": self.watched}
            path = self.out / f"{self.stage}.progress-{step:08d}.safetensors"
            weights.save(path, tensors, {k: json.dumps(v) for k, v in notes.items()})
            for old in self.files()[KEPT:]:
                old.unlink()
            with suppress(OSError, ValueError):  # a picture is no reason to stop
                draw_curve(self.out)
            if self.events:
                self.events.flush()
        wait_for_all()

    def resume(self) -> int:
        """The step to go on at: 0, or that of an interrupted run of the same command."""
        for path in self.files():
            try:
                progress = weights.open_checkpoint(path)
            except UserError as error:
                print(f"passed over: {error}", file=sys.stderr)
                continue
            notes = {k: json.loads(v) for k, v in progress.metadata.items()}
            self.refuse_other(path, notes)
            self.updates, self.watched = notes["updates"], notes.get("watched", [])
            for name, p in self.trained.items():
                p.data.copy_(progress.get(name))
                kinds = ("step", "exp_avg", "exp_avg_sq", "average")
                kinds = [kind for kind in kinds if f"{name}.{kind}" in progress.shapes]
                saved = {kind: progress.get(f"{name}.{kind}").to(p.device) for kind in kinds}
                if "average" in saved:
                    self.average[name] = saved.pop("average")
                self.optimizer.state[p] = saved
            return notes["step"]
        return 0

    def refuse_other(self, path: Path, notes: dict) -> None:
        """UserError: this progress was made with other flags, pictures, or another start."""
        changed = changed_flags(self.config, notes["command"])
        if notes["origin"] != self.origin:
            changed.append("other pictures or another file of align.py")
        if changed:
            raise UserError(
                f"{path} is of an interrupted run with {', '.join(changed)}: bring that back to "
                f"finish it, or delete {self.out}/*.progress-*"
            )


def changed_flags(config, then: dict) -> list[str]:
    """The flags of an earlier command that are others now, as they were."""
    return [
        f"--{name.replace('_', '-')} {then.get(name)}"
        for name, value in asdict(config).items()
        if value != then.get(name) and name not in MAY_CHANGE
    ]


def is_done(saved: Path, config, notes: dict[str, str]) -> bool:
    """Does the result of this command lie there? UserError: that of another, which stays.

    notes: what its header has to say, as far as that is known. Older files say less.
    """
    if not saved.exists() or any(saved.parent.glob(f"{saved.stem}*.progress-*")):
        return False
    header = weights.open_checkpoint(saved).metadata
    changed = changed_flags(config, weights.parse_json(header.get("command", "{}"), f"{saved}"))
    changed += [f"another {key}" for key, now in notes.items() if header.get(key, now) != now]
    if changed:
        raise UserError(
            f"{saved} is of a finished run with {', '.join(changed)}: name another --out, or move "
            f"it away"
        )
    if "origin" in notes and rank() == 0:
        print(f"{saved} is done: move it away to make it anew")
        print(json.dumps(dict(stage=saved.stem, done=True, files=[str(saved)])))
    return True


def draw_curve(out: Path) -> None:
    """curve.png: a panel a stage of metrics.jsonl's losses, on a log scale; held out in red."""
    lines = (out / "metrics.jsonl").read_text().splitlines()
    panels = [[*rows] for _, rows in groupby(map(json.loads, lines), lambda row: row["stage"])]
    sheet = Image.new("RGB", (640, 200 * len(panels)), "white")
    draw = ImageDraw.Draw(sheet)
    for top, rows in zip(range(0, sheet.height, 200), panels):
        kinds = {"loss": [], "held_out": []}
        for (name, points), (x, row) in product(kinds.items(), enumerate(rows)):
            if 0 < row.get(name, 0) < math.inf:
                points.append((10 + 620 * x / len(rows), math.log(row[name])))
        values = [value for points in kinds.values() for _, value in points] or [0.0]
        low, span = min(values), max(values) - min(values) or 1.0
        for points, color in zip(kinds.values(), ("steelblue", "red")):
            draw.line([(x, top + 190 - 160 * (v - low) / span) for x, v in points], color, 2)
        ends = f"loss {math.exp(low):.3g} to {math.exp(low + span):.3g}"
        draw.text((10, top + 6), f"{rows[0]['stage']}, step {rows[-1]['step']}: {ends}", "black")
    weights.write_whole(out / "curve.png", lambda file: sheet.save(file, "png"))


def save_last(path: Path, tensors: dict[str, Tensor], notes: dict[str, str]) -> None:
    """The stage's result, by rank 0; the others wait."""
    on_first(lambda: weights.save(path, tensors, notes))


def delete_progress(path: Path) -> None:
    """The report is printed: the progress files of this stage are no longer needed."""
    for file in path.parent.glob(f"{path.stem}*.progress-*.safetensors"):
        file.unlink()


def same_flags(config) -> str:
    """The flags of this command that the next one needs to be about the same run."""
    defaults = {f.name: f.default for f in fields(config)} | {"model": ""}
    shared = ("model", "adapter", "data", "weights", "resolution", "out")
    given = {name: getattr(config, name) for name in shared}
    return " ".join(f"--{k} {shlex.quote(str(v))}" for k, v in given.items() if v != defaults[k])


def commit() -> str:
    """Of this code; "" outside of a git clone."""
    git = ["git", "-C", str(hub.ROOT), "rev-parse", "--short", "HEAD"]
    try:
        return subprocess.run(git, capture_output=True, text=True).stdout.strip()
    except OSError:  # no git
        return ""


def header(config, stage: str, spec: Spec, model: nn.Module, step: int) -> dict[str, str]:
    """What makes a run repeatable. spec: of the base, with the run's autoencoder, shift, size."""
    facts = dict(
        stage=stage, base=spec.transformer, autoencoder=spec.autoencoder, config=model.config,
        schedule=spec.schedule, shift=spec.shift, size=spec.size, seed=config.seed, step=step,
        command=asdict(config), adapters=config.adapter or None, commit=commit(),
        torch=torch.__version__,
    )  # fmt: skip
    known = {name: fact for name, fact in facts.items() if fact is not None}
    return {name: f if isinstance(f, str) else json.dumps(f) for name, f in known.items()}


# ---- precision, memory, speed


def frozen_dtype(name: str, device: torch.device, is_toy: bool = False) -> torch.dtype:
    """--dtype; by default fp32 for toys and on a CPU, where it is faster, else bf16."""
    plain = device.type != "cuda" or is_toy
    dtype = script.pick_dtype(name or ("fp32" if plain else "bf16"))
    if dtype == torch.float16:
        raise UserError("--dtype fp16: small gradients are zero in it; wanted bf16 or fp32")
    return dtype


def memory(model: nn.Module, config) -> str:
    """What is certain before the first step: weights, gradients, AdamW, moving average."""
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    frozen = sum(p.nbytes for p in model.parameters() if not p.requires_grad)
    each = 16 + 4 * bool(config.ema)  # bytes in fp32: weight, gradient, two moments
    gib = (frozen + each * trained) / 2**30
    return f"{trained / 1e6:.2f} M trained, {gib:.1f} GiB before activations"


def autocast(model: nn.Module) -> torch.autocast:
    """bf16 for matrix products where frozen weights are bf16; what is trained stays in fp32."""
    device = next(model.parameters()).device
    mixed = any(p.dtype == torch.bfloat16 for p in model.parameters())
    # Without the cache: eq. (3)'s pass without gradients would leave casts that have none.
    return torch.autocast(device.type, torch.bfloat16, enabled=mixed, cache_enabled=False)


def ready_blocks(blocks: list[nn.Module], device: torch.device, is_toy: bool = False) -> None:
    """Blocks of official models keep their inputs only, and compute the rest again in backward.

    On a GPU they are compiled, half a minute once; blocks of a kind are compiled once.
    TORCH_COMPILE_DISABLE=1 is torch's own switch against that.
    """
    # On Hopper, torch 2.11's default, cuDNN's attention, has a faulty backward (NaN: pytorch issue
    # 196678); a step of FLUX with it ended in an illegal address on an H200.
    torch.backends.cuda.enable_cudnn_sdp(False)
    if is_toy:
        return
    for block in blocks:
        if device.type == "cuda":
            block.forward = torch.compile(block.forward)
        # No block draws random numbers, so their state need not be kept.
        settings = dict(use_reentrant=False, preserve_rng_state=False)
        block.forward = functools.partial(checkpoint, block.forward, **settings)


def compiled(loss: Callable, config, device: torch.device, is_toy: bool) -> Callable:
    """For toys on a GPU: `loss` and its backward pass as CUDA graphs; elsewhere `loss` itself.

    A toy's step is hundreds of launches and little work. Of 256 pictures it takes 6.4 ms instead
    of 27.5 on an H200, after half a minute of compiling.
    """
    if device.type == "cuda" and is_toy and not config.micro_batch:
        return torch.compile(loss, mode="reduce-overhead")
    return loss


@contextmanager
def measuring() -> Iterator[None]:
    """No gradients, and compiled blocks run as they are.

    A batch of another size would be compiled anew, which takes longer than it takes to run.
    """
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        yield
