"""What every script needs: a sentence for the user's mistake, a command line, a device, a dtype."""

import argparse
import errno
import inspect
import re
import resource
import sys
import types
from collections.abc import Callable, Sequence
from dataclasses import MISSING, fields

import torch

NO_WRITING = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EEXIST, errno.ENOTDIR)


class UserError(ValueError):
    """The user's mistake in one sentence: what we got, what we wanted, the cure."""


def exit_cleanly(main: Callable[[], None]) -> None:
    """Run a script's main: a user's mistake is one line and exit code 2, Ctrl-C is 130."""
    try:
        return main()
    except UserError as error:
        sentence = str(error)
    except OSError as error:  # a picture, a folder, a line of metrics.jsonl
        if error.errno not in NO_WRITING:
            raise
        cause = f"{error.filename or 'a file'} cannot be written ({error.strerror or error})"
        sentence = f"{cause}: free some room or name another --out; saved progress is sound"
    except (RuntimeError, MemoryError) as error:  # a CPU has no class of its own for it
        kinds = r"(\w+ )*out of memory|can't allocate memory|\bMemoryError"
        if not (memory := re.search(kinds, repr(error))):
            raise
        sentence = f"{memory[0]}: a smaller picture or batch, --rank or --micro-batch 1 may fit"
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    print(f"error: {sentence}", file=sys.stderr)
    sys.exit(2)


class Files(str):
    """The values of a flag that may be repeated, joined by commas."""


class Join(argparse.Action):
    def __call__(self, parser, namespace, value, flag=None) -> None:
        before = getattr(namespace, self.dest)
        setattr(namespace, self.dest, value if before is self.default else f"{before},{value}")


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:
        raise UserError(f"{message}; --help lists the flags")


def parse_config(
    cls: type,
    doc: str,
    argv: Sequence[str] | None = None,
    defaults: Callable[[str], dict] | None = None,
):
    """Flags from a dataclass: `doc` and the comments behind its fields are the help.

    A field without default is a positional argument; `from_` is the flag --from.
    `defaults`, a function of --model, gives other defaults than the fields'.
    UserError: what argparse refuses, and numbers that are negative or not finite.
    """
    parser = Parser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    notes = dict(re.findall(r"^    (\w+):.*?  # (.*)$", inspect.getsource(cls), re.MULTILINE))
    for field in fields(cls):
        kind, note = field.type, notes.get(field.name, "").replace("%", "%%")
        if isinstance(kind, types.UnionType):  # str | None
            kind = next(t for t in kind.__args__ if t is not types.NoneType)
        if field.default is MISSING:
            parser.add_argument(field.name, type=kind, help=note)
            continue
        actions = {bool: argparse.BooleanOptionalAction, Files: Join}
        how = {"action": actions[kind]} if kind in actions else {"type": kind}
        if field.default not in ("", None) and kind is not bool:
            note = f"{note} (default: %(default)s)"
        flag = "--" + field.name.strip("_").replace("_", "-")
        parser.add_argument(flag, dest=field.name, default=field.default, help=note, **how)
    if defaults:
        parser.set_defaults(**defaults(parser.parse_args(argv).model))
    config = cls(**vars(parser.parse_args(argv)))
    for name, value in vars(config).items():
        if isinstance(value, int | float) and not 0 <= value < 2**63:  # NaN is neither
            raise UserError(f"--{name.replace('_', '-')} {value}: wanted a number, not negative")
    return config


def pick_device(name: str = "") -> torch.device:
    """The named device, or the best one here: CUDA, then Apple's MPS, then the CPU."""
    counts = {"cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available())}
    available = [kind for kind, count in counts.items() if count] + ["cpu"]
    kind, _, index = (name or available[0]).partition(":")
    if kind not in available or index not in map(str, ["", *range(counts.get(kind, 1))]):
        raise UserError(f"--device {name} is no device here: {', '.join(available)}")
    if kind == "cpu" and sys.platform == "linux":  # which kills who asks for more than there is
        lines = open("/proc/meminfo").read()
        free = 1024 * sum(map(int, re.findall(r"(?:MemAvailable|SwapFree):\s+(\d+)", lines)))
        _, most = resource.getrlimit(resource.RLIMIT_DATA)  # -1: none
        resource.setrlimit(resource.RLIMIT_DATA, (min(free, most % 2**63), most))
    if kind == "cuda" and index:  # kernels and graphs go to the current one
        torch.cuda.set_device(name)
    return torch.device(name or kind)


def pick_dtype(name: str, flag: str = "--dtype") -> torch.dtype:
    short = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    kinds = short | {str(kind).removeprefix("torch."): kind for kind in short.values()}
    if name not in kinds:
        raise UserError(f"{flag} {name!r} is unknown; one of {', '.join(short)}")
    return kinds[name]
