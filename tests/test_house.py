"""The house is as the README says: what one reads first, in how many lines, in which order."""

import ast
import importlib
import inspect
import re
import subprocess
from dataclasses import fields
from pathlib import Path

import pytest

import align
import lora

ROOT = Path(__file__).parent.parent
STAGES = ["dcae", "sample", "align", "lora", "quant", "bench"]
README = (ROOT / "README.md").read_text()


def imports_of(file: Path) -> set[str]:
    """The first names of all modules that a file imports, wherever the statement stands."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module.split(".")[0])
    return names


def test_imports_run_one_way():
    for i, stage in enumerate(STAGES):
        assert not imports_of(ROOT / f"{stage}.py") & {*STAGES[i:]}, stage
    for file in (ROOT / "models").rglob("*.py"):
        if file.name != "pretrain.py":  # trains the toy's weights, with the stages
            assert not imports_of(file) & {*STAGES}, file
    toy = ROOT / "models" / "toy" / "__init__.py"
    assert "models" not in imports_of(toy)  # no network either


def loop(function) -> str:
    source = inspect.getsource(function)
    return source[source.index("    for step in run.steps") : source.index("    run.done()")]


def test_the_training_loop_stands_in_both_scripts_line_for_line():
    assert loop(align.train_head) == loop(lora.train)
    for line in ("part_loss.backward()", "clip_grad_norm_", "optimizer.step()", "is_finite"):
        assert line in loop(lora.train)


@pytest.mark.parametrize("stage", STAGES)
def test_a_script_has_at_most_22_flags(stage):
    assert len(fields(importlib.import_module(stage).Config)) <= 22


def test_the_objective_begins_within_120_lines():
    assert inspect.getsourcelines(align.alignment_loss)[1] <= 120


def count(command: str) -> int:
    done = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True)
    return int(done.stdout.split()[0])


def test_the_readmes_lines_are_counted():
    """The method by the README's own command; all of it by git."""
    block = re.search(r"    (sed -s .*?wc -l)\s+# the method: ([\d,]+) lines", README, re.DOTALL)
    method, claimed = count(block[1]), int(block[2].replace(",", ""))
    total = count(
        "find . -name '*.py' -not -path './tests/*' -not -path './.*' | xargs cat | wc -l"
    )
    claimed_total = int(re.search(r"framework: ([\d,]+) lines", README)[1].replace(",", ""))
    assert abs(method - claimed) <= 50 and abs(total - claimed_total) <= 100, (method, total)
