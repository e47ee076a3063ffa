"""Which model it is that a name stood for: tomorrow another file may lie at the same path.

A run and a picture note the digest of what they were made from, and another one is refused.
"""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

PIECE = 2**14  # bytes that are read at a time
# What the header of a run says of its pictures; the rest is who made it, when, and by which flags.
DECISIVE = ("base_digest", "autoencoder_digest", "adapters", "alpha", "schedule", "shift", "size")


def digest(facts: list, files: Sequence[Path]) -> str:
    """Of what JSON can say, and of what files of weights hold, whatever they are called."""
    facts = [*facts, *map(file_digest, files)]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def file_digest(path: Path) -> str:
    """sha256 of a file's tensors, up to 1 MiB whole, of larger ones 64 pieces: 12 B take a second.

    A pickle counts as one tensor of up to 256 MiB.
    """
    total, start = hashlib.sha256(), 0
    with path.open("rb") as file:
        tensors, whole = {"": {"data_offsets": (0, path.stat().st_size)}}, 2**28
        if path.suffix == ".safetensors":
            length = int.from_bytes(file.read(8), "little")
            tensors, start, whole = json.loads(file.read(length)), 8 + length, 2**20
            tensors.pop("__metadata__", None)
        for name, about in sorted(tensors.items()):
            first, end = about["data_offsets"]
            total.update(f"{name} {about.get('dtype')} {about.get('shape')}".encode())
            for at in range(first, end, PIECE * (1 + (end - first - 1) // whole)):
                file.seek(start + at)
                total.update(file.read(min(PIECE, end - at)))
    return total.hexdigest()


def placed(name: str) -> str:
    """A path that exists as an absolute one, which holds from anywhere; other names as they are."""
    return str(Path(name).absolute()) if name and Path(name).exists() else name
