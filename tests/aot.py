"""Compile kernels ahead of time, for GPUs that are not here: what a test runs beside itself.

python tests/aot.py '[["models.kernels", "quantize_rows_kernel", {"x": "*bf16", ...},
{"BLOCK": 4096}, {"num_warps": 4}], ...]' [capability ...] prints, as JSON, one object for each
kernel and capability: registers a thread, bytes spilled, bytes of shared memory, and the PTX's
matrix instructions.
(Beside, because a process that interprets kernels cannot compile them.)
"""

import inspect
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

os.environ.pop("TRITON_INTERPRET", None)
ROOT = Path(__file__).parent.parent
POINTERS = {
    "torch.bfloat16": "*bf16",
    "torch.float16": "*fp16",
    "torch.float32": "*fp32",
    "torch.float8_e4m3fn": "*fp8e4nv",
    "torch.uint8": "*u8",
}
SHARED = {89: 99, 90: 227, 100: 227, 120: 99}  # KiB that a program may have, by capability
MMA = re.compile(r"\b(?:wgmma\.mma_async|mma\.sync|tcgen05\.mma)[\w.:]*")
if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))


def compile_one(module: str, name: str, signature: dict, constants: dict, options: dict, cap: int):
    import importlib

    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = getattr(importlib.import_module(module), name)
    signature = {arg: signature.get(arg, "constexpr") for arg in kernel.arg_names}
    unknown = [a for a, kind in signature.items() if kind == "constexpr" and a not in constants]
    assert not unknown, f"{name}: neither typed nor constant: {unknown}"
    # As at run time: pointers and strides are multiples of 16, and the compiler may rely on it.
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, (arg, kind) in enumerate(signature.items())
        if kind.startswith("*")
        or kind == "i32:16"
        or (kind == "i32" and re.search("stride|_row|_batch|_part|groups", arg))
    }
    signature = {arg: kind.removesuffix(":16") for arg, kind in signature.items()}
    source = ASTSource(kernel, signature, constants, aligned)
    compiled = triton.compile(source, target=GPUTarget("cuda", cap, 32), options=options)
    ptx = compiled.asm["ptx"]
    usage = resource_usage(compiled.asm["cubin"])
    return {
        "kernel": name,
        "sm": cap,
        "registers": usage["REG"],
        "spilled": usage["STACK"] + usage["LOCAL"],
        "shared": compiled.metadata.shared,
        "mma": sorted(set(MMA.findall(ptx))),
        "tma": "cp.async.bulk.tensor" in ptx,
    }


def resource_usage(cubin: bytes) -> dict[str, int]:
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        out = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True).stdout
    return {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", out)}


class Recorder:
    """In the place of a kernel: notes what it is launched with as a job for `compile_all`."""

    def __init__(self, module: str, name: str, kernel, jobs: list):
        self.module, self.name, self.jobs = module, name, jobs
        self.parameters = inspect.signature(kernel.fn).parameters

    def __getitem__(self, grid):
        return self.note

    def note(self, *args, num_warps: int = 4, num_stages: int = 3, maxnreg=None, **named) -> None:
        given = dict(zip(self.parameters, args)) | named
        signature, constants = {}, {}
        for name, parameter in self.parameters.items():
            value = given[name]
            if "constexpr" in str(parameter.annotation) or value is None:
                constants[name] = value
            elif hasattr(value, "block_shape"):  # a descriptor
                tile = ", ".join(map(str, value.block_shape))
                signature[name] = f"tensordesc<{POINTERS[str(value.base.dtype)][1:]}[{tile}]>"
            elif hasattr(value, "dtype"):
                signature[name] = POINTERS[str(value.dtype)]
            elif isinstance(value, float):
                signature[name] = "fp32"
            else:
                signature[name] = "i32:16" if value % 16 == 0 else "i32"
        options = {"num_warps": num_warps, "num_stages": num_stages, "maxnreg": maxnreg}
        job = [self.module, self.name, signature, constants, options]
        if job not in self.jobs:
            self.jobs.append(job)


def compile_all(jobs: list[list], capabilities: tuple[int, ...] = (90, 100, 120)) -> list[dict]:
    """In a process of its own; [module, kernel, signature, constants, options] a job."""
    command = [sys.executable, __file__, json.dumps(jobs), *map(str, capabilities)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-4000:]
    rows = json.loads(done.stdout.splitlines()[-1])
    too_large = [row for row in rows if row["shared"] > SHARED[row["sm"]] * 1024]
    assert not too_large, too_large  # they would compile here and fail there, at the launch
    return rows


def main() -> None:
    jobs, capabilities = json.loads(sys.argv[1]), [int(cap) for cap in sys.argv[2:]]
    rows = [compile_one(*job, cap) for job in jobs for cap in capabilities]
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
