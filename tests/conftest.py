"""Tests find the scripts at the root of the repository, however pytest is started."""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
# Before torch is imported. Tensors are tiny here: two threads spend their time on each other, and
# where something else keeps a core busy the suite takes four times as long.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch  # noqa: E402

# Before a kernel is defined: without a GPU, Triton's kernels run in its interpreter.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
