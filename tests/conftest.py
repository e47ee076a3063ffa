"""Tests find the scripts at the root of the repository, however pytest is started."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
