"""The fused kernels: each does what its plain twin does. On a CPU under Triton's interpreter."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from models import kernels

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
runs = kernels.runs_on(torch.device(DEVICE))
needs_triton = pytest.mark.skipif(not runs, reason="needs Triton and a GPU, or its interpreter")


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator("cpu").manual_seed(seed)
    return torch.randn(shape, generator=generator).to(DEVICE, dtype)


def plain(monkeypatch) -> None:
    """From here on, the wrappers of the kernels take their plain twins."""
    monkeypatch.setattr(kernels, "runs_on", lambda device: False)


def relative(ours: torch.Tensor, truth: torch.Tensor) -> float:
    return ((ours.double() - truth.double()).norm() / truth.double().norm()).item()


# ---- FP8


def test_rows_of_fp8_are_the_matrix_up_to_half_a_step():
    matrix = normal(3, 5, 48) * torch.logspace(-3, 3, 15, device=DEVICE).view(3, 5, 1)
    data, scale = kernels.quantize_rows(matrix)
    assert data.shape == matrix.shape and scale.shape == (3, 5, 1)
    error = (data.float() * scale - matrix).abs() / matrix.abs().amax(-1, keepdim=True)
    assert error.max() <= 16.001 / 448  # the step of e4m3 between 256 and 448 is 32
    assert data.float().abs().amax(-1).eq(448).all()  # every row uses the whole range


@needs_triton
@pytest.mark.parametrize("shape", [(1, 16), (7, 48), (2, 3, 272)])
def test_the_kernel_quantizes_as_its_twin(monkeypatch, shape):
    matrix = normal(*shape)
    matrix[..., 0, :] = 0  # a row of zeros has a scale too
    data, scale = kernels.quantize_rows(matrix)
    plain(monkeypatch)
    expected, expected_scale = kernels.quantize_rows(matrix)
    assert torch.allclose(scale, expected_scale, rtol=1e-6)
    # A quotient that differs in its last bit may fall on the other side of a tie.
    steps = (data.view(torch.uint8).int() - expected.view(torch.uint8).int()).abs()
    assert steps.max() <= 1 and (steps > 0).float().mean() < 0.005
    assert data[..., 0, :].float().abs().max() == 0


@needs_triton
def test_a_slice_of_columns_is_quantized_in_place():
    wide = normal(6, 80)
    ours, expected = (
        kernels.quantize_rows(wide[:, 16:64]),
        kernels.quantize_rows(wide[:, 16:64].clone()),
    )
    assert torch.equal(ours.data.view(torch.uint8), expected.data.view(torch.uint8))
    assert torch.equal(ours.scale, expected.scale)


@pytest.mark.parametrize("bias", [True, False])
def test_a_linear_layer_in_fp8_is_near_the_exact_one(bias):
    linear = nn.Linear(256, 64, bias=bias).to(DEVICE, torch.bfloat16).requires_grad_(False)
    linear.weight.copy_(0.02 * normal(64, 256, seed=1))
    hidden = normal(2, 33, 256, dtype=torch.bfloat16)
    hidden[:, 5] *= 1000  # an outlier row keeps its own scale
    out = kernels.FP8Linear(linear)(hidden)
    assert out.shape == (2, 33, 64) and out.dtype == torch.bfloat16
    exact = F.linear(hidden.float(), linear.weight.float(), linear.bias.float() if bias else None)
    for row in (5, 6):
        # e4m3 rounds a normal variable by 2.6 % (rms); two operands, hence times sqrt(2)
        assert 0.02 < relative(out[:, row], exact[:, row]) < 0.06
    rows = kernels.quantize_rows(hidden)
    assert torch.equal(kernels.FP8Linear(linear)(rows), out)  # quantized outside: the same


def test_fp8_refuses_widths_that_tensor_cores_do_not_take():
    with pytest.raises(AssertionError, match="multiples of 16"):
        kernels.FP8Linear(nn.Linear(24, 16))


# ---- for GPUs that are not here


@pytest.mark.skipif(kernels.triton is None, reason="needs Triton")
def test_kernels_compile_for_hopper_and_blackwell_without_spilling(capsys):
    import aot

    columns = {"row_stride": "i32", "K": "i32"}
    out = {"data": "*fp8e4nv", "scale": "*fp32"}
    jobs = [
        [
            "models.kernels",
            "quantize_rows_kernel",
            {"matrix": "*bf16", **out, **columns},
            {"BLOCK": kernels.row_block(width)[0]},
            {"num_warps": kernels.row_block(width)[1]},
        ]
        for width in (3072, 15360)
    ]
    for row in aot.compile_all(jobs):
        with capsys.disabled():
            print(f"\n  {row['kernel']} sm_{row['sm']}: {row['registers']} registers", end="")
        assert row["spilled"] == 0 and row["registers"] <= 128
