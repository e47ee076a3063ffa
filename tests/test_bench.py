"""The benchmark's arithmetic, and each of its parts on networks small enough for a CPU."""

import json
import math
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

import bench
import dcae
from models import kernels, weights
from models.script import UserError

CPU = torch.device("cpu")
NETWORK = dict(
    num_layers=1, num_single_layers=1, num_attention_heads=2, attention_head_dim=16,
    axes_dims_rope=(4, 6, 6),
)  # fmt: skip
SMALL = (
    bench.Case("FLUX", "flux", 1024, NETWORK | {"in_channels": 64}, "flux-vae", 4.0, 10.0),
    bench.Case("DC-Gen-FLUX", "flux", 1024, NETWORK | {"in_channels": 128}, bench.F64, 1.0, 40.0),
    bench.Case(
        "SANA", "sana", 1024,
        dict(
            num_attention_heads=2, attention_head_dim=16, num_layers=1, cross_attention_dim=32,
            num_cross_attention_heads=2, cross_attention_head_dim=16,
        ),
        bench.F32, None, 100.0,
    ),
)  # fmt: skip
CONFIG = bench.Config(seconds=0.001, steps=2, attention="torch", fuse=False, dtype="fp32")


@pytest.fixture
def small(monkeypatch) -> bench.Zoo:
    """Tiny transformers, and autoencoders of one convolution a side at the true strides."""

    def decoder(case: bench.Case):
        depth = int(math.log2(case.stride)) + 1
        return dcae.DCAE(
            latent_channels=case.latents[1], encoder_block_out_channels=[4] * depth,
            decoder_block_out_channels=[4] * depth, encoder_layers_per_block=[0] * depth,
            decoder_layers_per_block=[0] * depth, decoder_in_shortcut=False,
            encoder_out_shortcut=False,
        )  # fmt: skip

    monkeypatch.setattr(bench, "CASES", SMALL)
    monkeypatch.setattr(bench, "decoder", decoder)
    return bench.Zoo(CPU, torch.float32, limit=600)


def test_counted_operations_are_those_of_the_formula():
    case = next(c for c in bench.CASES if c.name == "DC-Gen-FLUX" and c.size == 4096)
    tokens, d = 4096 + 512, 3072
    attention = 57 * 4 * tokens**2 * d
    # 12 D^2 weights a token in every block, and the modulations once: 2 operations each
    products = 2 * 57 * 12 * d * d * tokens
    work = bench.count_step(case)
    assert work.attention == attention
    assert work.products == pytest.approx(products, rel=1e-3)


def test_counted_operations_of_a_decode_are_those_of_its_convolutions():
    case = next(c for c in bench.CASES if c.autoencoder == bench.F64 and c.size == 1024)
    with torch.device("meta"):
        autoencoder = bench.decoder(case)
        total = []

        def count(conv, inputs, out):
            total.append(2 * out.numel() * conv.weight[0].numel())

        for module in autoencoder.modules():
            if isinstance(module, torch.nn.Conv2d):
                module.register_forward_hook(count)
        # An Upsample is the convolution itself: its output has been shuffled, not grown.
        autoencoder.decode(torch.empty(case.latents))
    assert bench.count_decode(case).total == pytest.approx(sum(total), rel=0.01)


@pytest.mark.parametrize("case", bench.CASES, ids=lambda c: f"{c.name} {c.size}")
def test_a_case_has_the_tokens_of_the_paper(case):
    side = case.size // {"flux-vae": 16, bench.F32: 32, bench.F64: 64}[case.autoencoder]
    assert case.tokens == side * side and case.latents[2] * case.stride == case.size


def test_median_and_percentiles_are_of_the_calls(monkeypatch):
    times = iter([50.0, *range(1, 12)])  # the first measured call tells how many more
    monkeypatch.setattr(bench, "timed", lambda call, cuda: float(next(times)))
    took = bench.measure(lambda: None, replace(CONFIG, seconds=0.55), CPU)
    assert (took.median, took.p10, took.p90, took.n) == (6, 2, 10, 11)


def test_every_part_that_a_cpu_can_run_fills_its_table(small, capsys):
    found = {"rates": {"bfloat16": {"1536": 1.0, "4608": 2.0}}, "attention": {"x": {"1536": 1.0}}}
    bench.measure_steps(CONFIG, small, found)
    bench.measure_decodes(CONFIG, small, found)
    bench.measure_pictures(CONFIG, small, found)
    bench.measure_throughput(replace(CONFIG, batch=2), small, found)
    assert list(found["throughput"]) == list(found["step"])
    assert found["throughput"]["DC-Gen-FLUX 1024"]["a_minute"] > 0
    assert list(found["step"]) == ["FLUX 1024", "DC-Gen-FLUX 1024", "SANA 1024"]
    assert len(found["decode"]) == 3 and all(row["ms"] > 0 for row in found["decode"].values())
    row = found["picture"]["DC-Gen-FLUX 1024"]
    assert row["measured"] and row["paper"] == 1.0
    assert found["picture"]["FLUX 1024"]["over_base"] is None  # it is the base
    base = found["picture"]["FLUX 1024"]["seconds"]
    assert row["over_base"] == pytest.approx(base / row["seconds"])
    json.dumps(found)
    assert "DC-Gen-FLUX 1024" in capsys.readouterr().out and small.left_out == []


def test_what_does_not_fit_is_named_and_the_rest_measured(small, monkeypatch):
    transformer = small.transformer

    def greedy(case, form=""):
        if case.name == "FLUX":
            raise torch.OutOfMemoryError("CUDA out of memory")
        return transformer(case, form)

    monkeypatch.setattr(small, "transformer", greedy)
    found = {}
    bench.measure_steps(CONFIG, small, found)
    bench.measure_pictures(CONFIG, small, found)
    assert list(found["step"]) == list(found["picture"]) == ["DC-Gen-FLUX 1024", "SANA 1024"]
    assert small.left_out == ["FLUX 1024 (out of memory)"] * 2


def test_fp32_is_fp32_where_tf32_is_allowed():
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        with bench.exactly():
            assert torch.get_float32_matmul_precision() == "highest"
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision(before)


def test_the_floor_is_operations_over_rates(small):
    found = {"rates": {"bfloat16": {"1536": 2.0, "4608": 4.0}, "fp8": {"1536": 8.0, "4608": 8.0}}}
    found["attention"] = {"a": {"1536": 1.0, "4608": 3.0}, "b": {"1536": 2.0, "4608": 1.0}}
    work = bench.Work(products=8e12, attention=6e12)
    case = replace(SMALL[0], size=1024)  # 4096 tokens and 512 of text
    assert bench.floor_ms(work, case, found, "") == pytest.approx(1000 * (8 / 4 + 6 / 3))
    assert bench.floor_ms(work, case, found, "fp8") == pytest.approx(1000 * (8 / 8 + 6 / 3))
    assert bench.floor_ms(work, case, {}, "") is None


def test_the_ladder_knows_lossless_from_lossy(small, monkeypatch, capsys):
    monkeypatch.setattr(bench.kernels, "fp8_runs", lambda device: True)
    monkeypatch.setattr(bench, "fp4_runs", lambda device: True)
    monkeypatch.setattr(kernels, "runs_on", lambda device: False)  # the interpreter takes minutes
    found = {}
    bench.measure_ladder(replace(CONFIG, models="flux"), small, found)
    rows = {name.removeprefix("1024 "): row for name, row in found["ladder"].items()}
    assert list(rows) == ["eager", "+ Triton attention", "+ fused kernels", "+ hoisting",
                          "+ CUDA graph", "+ FP8 linears", "+ NVFP4 linears"]  # fmt: skip
    assert all(row["error"] < 1e-5 for row in rows.values() if row["kind"] == "lossless")
    fp8, nvfp4 = (rows[f"+ {name} linears"] for name in ("FP8", "NVFP4"))
    assert fp8["kind"] == nvfp4["kind"] == "lossy"
    assert 1e-3 < fp8["error"] < nvfp4["error"] < 0.2


def test_a_format_that_is_none_is_refused(small):
    with pytest.raises(UserError, match="--format int4: wanted fp8, nvfp4"):
        bench.measure_steps(replace(CONFIG, format="fp8,int4"), small, {})


def test_the_truth_in_fp32_leaves_the_model_as_it_was():
    model = bench.Zoo(CPU, torch.bfloat16, 600).transformer(SMALL[0])
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    inputs = bench.Zoo(CPU, torch.bfloat16, 600).inputs(SMALL[0])
    off = replace(CONFIG, fuse=False, hoist=False, graph=False)
    exact = bench.in_fp32(model, lambda: bench.one_step(model, inputs, off)[0]())
    for name, tensor in model.state_dict().items():
        assert tensor.dtype == torch.bfloat16 and torch.equal(tensor, before[name]), name
    rough = bench.one_step(model, inputs, off)[0]()
    assert 1e-4 < bench.relative(rough, exact) < 0.05
    model.float()
    assert bench.relative(bench.one_step(model, inputs, off)[0](), exact) < 1e-6


def test_flux_transformers_share_their_blocks(small):
    base, ours = (small.transformer(case) for case in SMALL[:2])
    assert base.double_blocks is ours.double_blocks and base.img_in is not ours.img_in
    assert not any(p.is_meta for p in ours.parameters())


def test_official_weights_are_those_of_the_case(small, monkeypatch):
    """Their names are known to the sampler, and their channels and patches are the case's."""
    presets = bench.flux.PRESETS | bench.sana.PRESETS
    for case in bench.CASES:
        config = presets[bench.sample.describe(case.official)["transformer"]].get("config", {})
        assert config.get("in_channels", 32) == case.network.get("in_channels", 32), case
    asked = []

    def load(spec: dict, folder: str, device, dtype):
        asked.append((spec["transformer"], folder))
        with torch.device("meta"):
            return bench.flux.Flux(**NETWORK, in_channels=64)

    monkeypatch.setattr(bench.sample, "load_transformer", load)
    small.folder = "shelf"
    model = small.transformer(SMALL[0])
    assert small.transformer(SMALL[0]) is model and asked == [("flux-krea", "shelf")]


def test_stock_diffusers_runs_the_same_step(small):
    pytest.importorskip("diffusers")
    (out,) = bench.diffusers_step(SMALL[1], small)()
    assert out.shape == (1, SMALL[1].tokens, 128)


@pytest.mark.parametrize("case", bench.CASES[:6], ids=lambda case: f"{case.name} {case.size}")
def test_stock_diffusers_has_every_decoder(case, monkeypatch):
    pytest.importorskip("diffusers")
    monkeypatch.setattr(bench, "random_weights", lambda model, *_: model)
    zoo = bench.Zoo(torch.device("meta"), torch.float32, 600)
    zoo.random = lambda *shape: torch.empty(shape, device="meta")
    assert bench.diffusers_decode(case, zoo)()[0].shape == (1, 3, case.size, case.size)


def test_what_no_longer_fits_the_time_is_named(small):
    small.deadline = 0.0
    found = {}
    bench.measure_steps(CONFIG, small, found)
    assert found["step"] == {} and small.left_out == ["FLUX 1024", "DC-Gen-FLUX 1024", "SANA 1024"]


def test_without_a_gpu_it_estimates_and_says_so():
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    command = [sys.executable, "bench.py", "--sizes", "1024", "--models", "sana", "--seconds", "0"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=weights.ROOT)
    assert done.returncode == 0, done.stderr
    assert "ESTIMATE, not measured" in done.stdout
    figures = json.loads(done.stdout.splitlines()[-1])
    assert figures["toy"]["flux-toy step"] > 0 and "SANA 1024" in figures["estimate"]


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--only", "stpe"], "wanted some of rates"),
        (["--sizes", "999"], "wanted some of 1024"),
        (["--baseline", "tensorrt"], "wanted diffusers"),
    ],
)
def test_mistakes_are_told(monkeypatch, flags, message):
    monkeypatch.setattr(sys, "argv", ["bench.py", "--device", "cpu", *flags])
    with pytest.raises(UserError, match=message):
        bench.main()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("measure", [bench.measure_attention, bench.measure_kernels])
def test_what_only_a_gpu_runs(measure):
    found = {}
    measure(bench.Config(seconds=0.01), bench.Zoo(torch.device("cuda"), torch.bfloat16, 60), found)
    assert found and kernels.runs_on(torch.device("cuda"))


def test_training_steps_are_timed_and_counted(small, capsys):
    """The tokens are few here; the shares of a real GPU's rate come out of the same arithmetic."""
    config, found = replace(CONFIG, models="flux", train_batch=2, micro_batch=1), {}
    bench.measure_training(config, small, found)
    rows = {row["stage"]: row for row in found["train"]}
    assert rows.keys() == {"align", "lora"} and rows["lora"]["trained"] > rows["align"]["trained"]
    for row in rows.values():
        # Forward twice and backward, over the time; backward is at least a forward through blocks.
        assert row["seconds"] > 0 and row["pictures_per_s"] == 2 / row["seconds"]
        assert 1.2 < row["tflops"] / row["useful_tflops"] < 1.6
        assert row["share"] == pytest.approx(row["tflops"] / found["gemm_tflops"])
