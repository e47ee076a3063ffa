"""What the reference implementations say: golden cases, and the names in official checkpoints.

A few cases lie in tests/golden. The others are not in the repository: a folder shared/reference
beside it has them, else their tests are skipped.
"""

import gzip
import json
from pathlib import Path

import pytest
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

HERE = Path(__file__).parent / "golden"
SHARED = HERE.parents[2] / "shared" / "reference"


def golden(name: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """(tensors, the header's notes) of a case."""
    for folder in (HERE, SHARED / "golden"):
        path = folder / f"{name}.safetensors"
        if path.exists():
            with safe_open(path, "pt") as file:
                return load_file(path), file.metadata()
    pytest.skip(f"the case {name} is neither in {HERE} nor in {SHARED / 'golden'}")


def weights_of(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {k.removeprefix("weight/"): v for k, v in tensors.items() if k.startswith("weight/")}


def official_shapes(name: str) -> dict[str, tuple]:
    """Tensor name -> shape of a full-size official checkpoint."""
    with gzip.open(HERE / "keys.json.gz", "rt") as file:
        return {key: tuple(shape) for key, shape in json.load(file)[name].items()}


def error(ours: Tensor, theirs: Tensor) -> float:
    """max |ours - theirs| / max |theirs|; NaN fails any comparison with it."""
    assert ours.shape == theirs.shape, f"{tuple(ours.shape)} is not {tuple(theirs.shape)}"
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()
