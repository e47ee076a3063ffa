"""The attention kernel of sample.py: on a CPU under Triton's interpreter, else on the GPU."""

import pytest
import torch
import torch.nn.functional as F

import sample
from models import kernels
from models.flux import Flux
from models.script import UserError

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPES = [torch.float16, torch.bfloat16 if DEVICE.type == "cuda" else torch.float32]
# The interpreter multiplies bf16 by their bits. Tolerance: relative to the norm of the result.
TOLERANCE = {torch.float16: 1e-3, torch.bfloat16: 6e-3, torch.float32: 1e-6}
TILE = None if DEVICE.type == "cuda" else (32, 16, 4, 2, None)  # small: the interpreter is slow
pytestmark = pytest.mark.skipif(
    not kernels.runs_on(DEVICE), reason="needs Triton and a GPU, or its interpreter"
)


def normal(*shape: int, dtype: torch.dtype = DTYPES[-1], seed: int = 0) -> torch.Tensor:
    generator = torch.Generator("cpu").manual_seed(seed)
    return torch.randn(shape, generator=generator).to(DEVICE, dtype)


def heads(batch: int, n: int, length: int, dim: int, dtype: torch.dtype, seed: int = 0):
    """(B, nh, N, hd), as a view into (B, N, nh, hd)."""
    return normal(batch, length, n, dim, dtype=dtype, seed=seed).transpose(1, 2)


def relative(ours: torch.Tensor, truth: torch.Tensor) -> float:
    assert ours.shape == truth.shape
    return ((ours.double() - truth.double()).norm() / truth.double().norm()).item()


def test_the_twin_is_torchs_attention():
    q, k, v = (heads(2, 3, n, 24, torch.float32, seed=n) for n in (7, 9, 9))
    mask = torch.arange(9, device=DEVICE) < torch.tensor([[5], [9]], device=DEVICE)  # (2, 9)
    for attn_mask in (None, mask[:, None, None], normal(2, 1, 1, 9, dtype=torch.float32)):
        expected = F.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask)
        assert relative(sample.attention(q, k, v, attn_mask), expected) < 1e-6


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [16, 32, 72, 112, 128])
def test_the_kernel_is_the_twin_at_every_head_width(dim, dtype):
    q, k, v = (heads(2, 2, n, dim, dtype, seed=n) for n in (37, 50, 50))
    out = sample.triton_attention(q, k, v, tile=TILE)
    assert relative(out, sample.attention(q.float(), k.float(), v.float())) < TOLERANCE[dtype]


@pytest.mark.parametrize("queries, keys", [(1, 1), (32, 16), (33, 17), (5, 64), (70, 15)])
def test_lengths_may_be_ragged(queries, keys):
    q, k, v = (heads(1, 3, n, 32, DTYPES[-1], seed=n) for n in (queries, keys, keys))
    out = sample.triton_attention(q, k, v, tile=TILE)
    assert relative(out, sample.attention(q, k, v)) < TOLERANCE[q.dtype]


def test_padded_keys_have_no_say():
    q, k, v = (heads(3, 2, n, 32, DTYPES[-1], seed=n) for n in (20, 40, 40))
    lengths = torch.tensor([[3], [40], [17]], device=DEVICE)
    mask = (torch.arange(40, device=DEVICE) < lengths)[:, None, None]  # (B, 1, 1, L)
    out = sample.triton_attention(q, k, v, mask, tile=TILE)
    assert relative(out, sample.attention(q, k, v, mask)) < TOLERANCE[q.dtype]
    loud = torch.where(mask[:, :, 0, :, None], v, 1e4 * torch.ones_like(v))
    assert torch.equal(sample.triton_attention(q, k, loud, mask, tile=TILE), out)
    bias = -10_000.0 * (~mask).to(q.dtype)  # SANA's way to say it
    assert relative(sample.triton_attention(q, k, v, bias, tile=TILE), out) < TOLERANCE[q.dtype]


def test_a_picture_without_any_key_is_zero_and_not_nan():
    q, k, v = (heads(2, 1, 20, 16, DTYPES[-1], seed=n) for n in range(3))
    mask = torch.tensor([[False] * 20, [True] * 20], device=DEVICE)[:, None, None]
    out = sample.triton_attention(q, k, v, mask, tile=TILE)
    assert out[0].abs().max() == 0 and out[1].isfinite().all()


def test_large_logits_do_not_overflow():
    q, k, v = (heads(1, 2, 40, 32, DTYPES[-1], seed=n) for n in range(3))
    out = sample.triton_attention(60 * q, 60 * k, v, tile=TILE)  # logits of 1e5
    assert out.isfinite().all() and relative(out, sample.attention(60 * q, 60 * k, v)) < 1e-2


def test_views_into_a_joint_qkv_are_read_in_place():
    qkv = normal(2, 40, 3, 2, 32)
    q, k, v = (t.transpose(1, 2) for t in qkv.unbind(2))
    out = sample.triton_attention(q, k, v, tile=TILE)
    expected = sample.triton_attention(*(t.contiguous() for t in (q, k, v)), tile=TILE)
    assert torch.equal(out, expected)
    assert out.transpose(1, 2).flatten(2).data_ptr() == out.data_ptr()  # joining heads: a view


def test_a_model_that_is_given_the_kernel_says_the_same():
    model = Flux(
        in_channels=8, num_layers=1, num_single_layers=1, num_attention_heads=2,
        attention_head_dim=16, joint_attention_dim=12, pooled_projection_dim=10,
        axes_dims_rope=(4, 6, 6),
    ).to(DEVICE, DTYPES[-1]).eval()  # fmt: skip
    inputs = normal(2, 8, 5, 3), normal(2)[:, None][:, 0].float().abs().clamp(max=1)
    inputs = (*inputs, normal(2, 7, 12), normal(2, 10), normal(2).float())
    with torch.no_grad():
        expected = model(*inputs)
        calls = []

        def counted(q, k, v):
            calls.append(q.shape)
            return sample.triton_attention(q, k, v, tile=TILE)

        model.attention = counted
        assert relative(model(*inputs), expected) < TOLERANCE[DTYPES[-1]] * 5
    assert calls == [(2, 2, 22, 16)] * 2


def test_shapes_that_do_not_fit_are_refused():
    q, k, v = (heads(1, 2, n, 16, DTYPES[-1]) for n in (4, 5, 6))
    with pytest.raises(AssertionError, match="wanted"):
        sample.triton_attention(q, k, v)
    with pytest.raises(AssertionError, match="mask"):
        sample.triton_attention(q, k, k, torch.ones(1, 1, 4, 5, dtype=torch.bool, device=DEVICE))


def test_torchs_attention_is_the_default_and_the_kernel_is_refused_where_it_does_not_run(
    monkeypatch,
):
    cpu = torch.device("cpu")
    for name in ("", "torch"):
        picked = sample.pick_attention(name, DEVICE, torch.bfloat16)
        assert picked == ("torch", F.scaled_dot_product_attention)
    monkeypatch.setattr(kernels, "runs_on", lambda device: False)
    with pytest.raises(UserError, match="triton needs an NVIDIA GPU"):
        sample.pick_attention("triton", cpu, torch.bfloat16)
    with pytest.raises(UserError, match="wanted torch or triton"):
        sample.pick_attention("flash", cpu, torch.bfloat16)


def test_it_compiles_for_hopper_and_blackwell_without_spilling(capsys, monkeypatch):
    import aot

    rows = []
    for capability, tile in ((90, sample.HOPPER_TILE), (100, sample.TILE), (120, sample.TILE)):
        jobs = []
        recorder = aot.Recorder("sample", "attention_kernel", sample.attention_kernel, jobs)
        with monkeypatch.context() as patch, torch.device("meta"):
            patch.setattr(sample, "attention_kernel", recorder)
            for dim in (16, 32, 64, 128):
                q, k = (torch.ones(1, 2, n, dim).bfloat16() for n in (128, 100))
                sample.triton_attention(q, q, q, tile=tile)
                sample.triton_attention(q, k, k, torch.ones(1, 1, 1, 100), tile=tile)  # ragged
        rows += aot.compile_all(jobs, (capability,))
    assert len(rows) == 24
    for row in rows:
        with capsys.disabled():
            print(f"\n  attention sm_{row['sm']}: {row['registers']} registers", end="")
        wanted = {90: "wgmma", 100: "tcgen05.mma", 120: "mma.sync"}[row["sm"]]
        assert row["tma"] and any(wanted in name for name in row["mma"])
        assert row["spilled"] <= 8  # a stack frame of 8 bytes is not a spill
