"""The benchmark's arithmetic, and each of its parts on networks small enough for a CPU."""

import json
import math
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import bench
import dcae
from models import flux, hub, kernels, sana, vae
from models.script import UserError

CPU = torch.device("cpu")
FLUX = dict(
    num_layers=1, num_single_layers=1, num_attention_heads=2, attention_head_dim=16,
    axes_dims_rope=(4, 6, 6), guidance_embeds=True,
)  # fmt: skip
SANA = dict(
    num_attention_heads=2, attention_head_dim=16, num_layers=1, cross_attention_dim=32,
    num_cross_attention_heads=2, cross_attention_head_dim=16,
)  # fmt: skip
CASES = tuple(case for case in bench.CASES if case.size == 1024)


def one_convolution_a_side(channels: int, stride: int) -> dict:
    """The config of a DC-AE with a true stride."""
    depth = int(math.log2(stride)) + 1
    return dict(
        latent_channels=channels, encoder_block_out_channels=[4] * depth,
        decoder_block_out_channels=[4] * depth, encoder_layers_per_block=[0] * depth,
        decoder_layers_per_block=[0] * depth, decoder_in_shortcut=False,
        encoder_out_shortcut=False,
    )  # fmt: skip


@pytest.fixture
def small(monkeypatch) -> Iterator[bench.Bench]:
    """Tiny networks under the official names; the interpreter of kernels would take minutes."""
    for name, channels in {"flux-krea": 64, "dc-gen-flux-1k": 32}.items():
        monkeypatch.setitem(flux.PRESETS, name, {"config": FLUX | {"in_channels": channels}})
    flow_map = FLUX | {"in_channels": 32, "gate_value": 0.25}
    monkeypatch.setitem(flux.PRESETS, "dc-gen-flux-anyflow", {"config": flow_map})
    for name, channels in {"sana-1.6b": 32, bench.SANA_F64: 128}.items():
        config = SANA | {"in_channels": channels, "out_channels": channels}
        monkeypatch.setitem(sana.PRESETS, name, {"config": config})
    for name, shape in {"flux-vae": (16, 8), bench.F32: (32, 32), bench.F64: (128, 64)}.items():
        monkeypatch.delitem(vae.PRESETS, name, raising=False)
        monkeypatch.setitem(dcae.PRESETS, name, {"config": one_convolution_a_side(*shape)})
    monkeypatch.setattr(kernels, "runs_on", lambda device: False)
    monkeypatch.setattr(bench, "measure_kernel", bench.measure)
    config = bench.Config(seconds=0.001, steps=2, only="rates,attention,step,decode,picture,ladder")
    with torch.compiler.set_stance("force_eager"):  # torch's compiler, too, would take minutes
        yield bench.Bench(config, CPU, torch.float32, [*CASES], ("", "fp8", "nvfp4"))


@pytest.mark.parametrize("case", bench.CASES, ids=lambda case: case.label())
def test_a_case_is_what_its_networks_say(case):
    """Tokens, latents and operations, which the cases and eq. (1) give without a network."""
    side = case.size // {"flux-vae": 8, bench.F32: 32, bench.F64: 64}[case.autoencoder]
    with torch.device("meta"):
        model = bench.build(case.model)
        assert case.latents == (model.latent_channels, side, side)
        assert case.tokens == (side // model.patch_size) ** 2
        text, _ = bench.random_text(case, bench.Bench(bench.Config(), torch.device("meta")))
        guidance = (torch.empty(1),) if "FLUX" in case.name else ()
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            model(torch.empty(1, *case.latents), torch.empty(1), *text, *guidance)
    counted, ours = counter.get_total_flops(), sum(bench.step_operations(case))
    if "SANA" in case.name:  # a pass; without the text's embedding and the keys and values of it
        width, length = 2240, 300
        counted -= 2 * length * (2304 * width + width**2 + 20 * 2 * width**2)
        ours /= 2
    assert ours == pytest.approx(counted, rel=2e-3)


def test_counted_operations_of_a_decode_are_those_of_its_convolutions():
    case = next(case for case in bench.CASES if case.autoencoder == bench.F64)
    total = []

    def count(conv, inputs, out):
        total.append(2 * out.numel() * conv.weight[0].numel())

    with torch.device("meta"):
        autoencoder = bench.build(case.autoencoder)
        for module in autoencoder.modules():
            if isinstance(module, torch.nn.Conv2d):
                module.register_forward_hook(count)
        # An Upsample is the convolution itself: its output has been shuffled, not grown.
        autoencoder.decode(torch.empty(1, *case.latents))
    assert bench.decode_operations(case) == pytest.approx(sum(total), rel=0.01)


def test_median_and_percentiles_are_of_the_calls(small, monkeypatch):
    """Eleven calls of 1 to 11 ms last 66 ms; a call of 5 s is measured once."""
    marks = iter(sum(([float(i), i + i / 1000] for i in range(1, 12)), []))
    monkeypatch.setattr(bench.sample, "clock", lambda device: next(marks))
    small.config = replace(small.config, seconds=0.0655)
    row = bench.measure(lambda: None, small)
    assert (row["n"], [row[k] for k in ("ms", "p10", "p90")]) == (11, pytest.approx([6, 2, 10]))
    marks = iter((0.0, 5.0))
    assert bench.measure(lambda: None, small)["n"] == 1


def test_every_part_fills_its_rows(small, monkeypatch, capsys):
    monkeypatch.setattr(bench, "PRODUCTS", ((32, 64),))
    monkeypatch.setattr(bench, "LENGTHS", (16, 32))
    monkeypatch.setattr(bench, "FEWER", (6,))
    for label, rows in bench.plan(small):
        bench.keep(label, rows, small)
    found, labels = small.found, [case.label() for case in CASES]
    few = "DC-Gen-FLUX AnyFlow 1024"
    lossy = [f"{name} {kind}" for kind in ("FP8", "NVFP4") for name in ("DC-Gen-FLUX 1024", few)]
    assert list(found["step"]) == list(found["picture"]) == labels + lossy
    assert len(found["rates"]) == 2 and len(found["decode"]) == 3
    assert all(row["tflop_s"] > 0 for row in found["decode"].values())
    assert all(row["error"] < 1e-5 for row in found["attention"].values())
    # On a CPU some of torch's backends lack, and so do kernels: they are named.
    assert {name.split(":")[0] for name in small.left_out} >= {"attention cudnn", "attention ours"}
    base, row = (found["picture"][label] for label in labels[:2])
    assert row["over_base"] == pytest.approx(base["seconds"] / row["seconds"])
    row = found["picture"][few]  # against the same base
    assert row["over_base"] == pytest.approx(base["seconds"] / row["seconds"])
    row = found["picture"][labels[1]]
    assert base["over_base"] == 1 and row["paper"] == 1.1 and row["steps_run"] == 2
    # A solver is for the base as well: rows of its own, against the base by the same solver.
    assert list(found["fewer"]) == ["FLUX 1024, 6 ab2", "DC-Gen-FLUX 1024 FP8, 6 ab2"]
    base, row = found["fewer"].values()
    assert row["over_base"] == pytest.approx(base["seconds"] / row["seconds"])
    assert row["steps_run"] == 6
    assert all(row["file"] > 0 <= row["transfer"] for row in found["decode"].values())
    floor = found["step"][labels[0]]["floor_ms"]
    assert floor == pytest.approx(bench.floor_ms(CASES[0], "", small)) and floor > 0
    json.dumps(found)
    assert "DC-Gen-FLUX 1024 FP8" in capsys.readouterr().out


def test_the_ladder_knows_lossless_from_lossy(small):
    for label, rows in bench.plan(replace(small, config=replace(small.config, only="ladder"))):
        bench.keep(label, rows, small)
    rows, model = small.found["ladder"], "DC-Gen-FLUX 1024 "
    lossless = ["eager", "+ fused kernels", "+ hoisting", "+ CUDA graph", "compile, not fused"]
    assert [name for name in rows if "DC" not in name] == [f"SANA 1024 {rung}" for rung in lossless]
    rows = {name.removeprefix(model): row for name, row in rows.items() if model in name}
    assert list(rows) == [*lossless[:4], "FP8 linears", "NVFP4 linears", lossless[4]]
    assert all(rows[name]["error"] < 1e-5 and rows[name]["first_s"] > 0 for name in lossless)
    assert {rows[name]["kind"] for name in lossless} == {"lossless"}
    assert 1e-3 < rows["FP8 linears"]["error"] < rows["NVFP4 linears"]["error"] < 0.2


def test_the_truth_of_the_ladder_is_fp32_of_the_same_weights(small):
    """In bf16 the first rung is near to it, in fp32 it was equal."""
    small.dtype = torch.bfloat16
    (_, _, row), *_ = bench.ladder(CASES[1], replace(small, formats=("",)))
    assert 1e-4 < row["error"] < 0.05


def test_long_pictures_are_put_together_from_steps(small, monkeypatch):
    """A step of 3 s: three are run, and seventeen more count."""
    small.config = replace(small.config, steps=20)
    monkeypatch.setattr(bench, "measure", lambda call, bench: {"ms": 3000.0})
    (_, _, row), (_, _, ten), _ = bench.picture(CASES[0], "", {"picture"}, small)
    assert row["steps_run"] == 3 and row["seconds"] == pytest.approx(3 + 17 * 3)
    assert ten["steps_run"] == 3 and ten["seconds"] == pytest.approx(3 + 7 * 3)  # too few for AB2


def test_the_estimate_is_operations_over_rates_for_the_steps_of_each_case(small):
    bench.keep("estimate", bench.estimate(small), small)
    for case in CASES:
        row, steps = small.found["estimate"][case.label()], 4 if "AnyFlow" in case.name else 2
        operations = steps * sum(bench.step_operations(case)) + bench.decode_operations(case)
        assert row["tflop"] == pytest.approx(operations / 1e12)


def test_what_does_not_fit_is_named_and_the_rest_measured(small):
    def greedy():
        yield "step", "first", {"ms": 1.0}
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")

    bench.keep("FLUX 1024", greedy(), small)
    bench.keep("SANA 1024", iter([("step", "second", {"ms": 2.0})]), small)
    small.config = replace(small.config, limit=0.0)
    bench.keep("FLUX 4096", greedy(), small)
    assert list(small.found["step"]) == ["first", "second"]
    assert small.left_out == ["FLUX 1024: CUDA out of memory", "FLUX 4096: --limit 0"]


def test_the_floor_is_operations_over_rates(small, monkeypatch):
    def rows(*rates):
        return {i: dict(tokens=n, tflop_s=r, format=f) for i, (n, r, f) in enumerate(rates)}

    sixteen = (1536, 2.0, "16 bits"), (4608, 4.0, "16 bits"), (4608, 1.0, "16 bits")
    small.found = {"rates": rows(*sixteen, (1536, 8.0, "fp8"), (4608, 8.0, "fp8"))}
    small.found["attention"] = rows((1536, 1.0, "16 bits"), (4608, 3.0, "16 bits"))
    monkeypatch.setattr(bench, "step_operations", lambda case: (8e12, 6e12))
    case = CASES[0]  # 4096 tokens and 512 of text
    assert bench.floor_ms(case, "", small) == pytest.approx(1000 * (8 / 4 + 6 / 3))
    assert bench.floor_ms(case, "fp8", small) == pytest.approx(1000 * (8 / 8 + 6 / 3))
    small.found = {}
    assert bench.floor_ms(case, "", small) == 0


def test_random_weights_are_the_same_each_time_and_leave_the_default_dtype(small):
    small.dtype = torch.bfloat16
    first, second = (bench.random_weights(lambda: bench.build("flux-krea"), small) for _ in "ab")
    for name, tensor in first.state_dict().items():
        assert tensor.dtype == torch.bfloat16 and torch.equal(tensor, second.state_dict()[name])
    with pytest.raises(ZeroDivisionError):
        bench.random_weights(lambda: 1 / 0, small)
    assert torch.get_default_dtype() == torch.float32


def test_stock_diffusers_runs_the_same_step(small, monkeypatch):
    pytest.importorskip("diffusers")
    small.found["picture"] = {"DC-Gen-FLUX 1024": {"seconds": 1.0}, "FLUX 4096": {"seconds": 1.0}}
    shapes = []

    def measure(call, bench):
        shapes.append(call().shape)
        return {"ms": 500.0}

    monkeypatch.setattr(bench, "measure", measure)
    ((_, _, row),) = bench.diffusers(CASES[1], small)
    assert shapes[0] == (1, CASES[1].tokens, 32) and len(shapes) == 2  # a step and a decode
    assert row["seconds"] == row["over our DC-Gen-FLUX 1024:"] == pytest.approx(2 * 0.5 + 0.5)
    assert "over our FLUX 4096:" not in row


@pytest.mark.parametrize(
    "case",
    [c for c in bench.CASES if c.family == "FLUX" and not c.steps],
    ids=lambda case: case.label(),
)
def test_stock_diffusers_has_every_decoder(case):
    pytest.importorskip("diffusers")
    from stock_diffusers import decode_call

    with torch.device("meta"):
        call = decode_call(lambda build: build(), case.autoencoder, torch.empty(1, *case.latents))
        assert call().shape == (1, 3, case.size, case.size)


def test_training_steps_are_those_of_the_trainers(small, monkeypatch):
    """On a CPU without compiling."""
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: None)
    case = CASES[1]
    for stage in ("align", "lora"):
        ((part, label, row),) = bench.training(case, stage, small)
        assert (part, label) == ("train", f"{stage} DC-Gen-FLUX 1024")
        assert row["pictures_per_s"] == pytest.approx(4 / row["seconds"])


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_estimates_and_compares_solvers(tmp_path):
    """On prompts of the user AB2 is nearer to many steps than Euler is."""
    (tmp_path / "p.txt").write_text("\n".join(["a red circle", "two blue squares"] * 3))
    command = [sys.executable, "bench.py", "--sizes", "1024", "--models", "sana"]
    command += ["--prompts", str(tmp_path / "p.txt")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=hub.ROOT)
    assert done.returncode == 0, done.stderr
    assert "ESTIMATE, not measured" in done.stdout
    figures = json.loads(done.stdout.splitlines()[-1])
    rows = {name.removeprefix("dc-gen-toy "): row for name, row in figures["solvers"].items()}
    assert rows["ab2 20"]["psnr"] > rows["ab2 8"]["psnr"] > rows["euler 8"]["psnr"] > 20
    assert rows["ab2 8"]["n"] == 6
    assert list(figures["estimate"]) == ["SANA 1024", "DC-Gen-SANA 1024"]


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--only", "stpe"], "wanted some of rates"),
        (["--sizes", "999"], "wanted some of 1024"),
        (["--format", "int4"], "wanted some of fp8"),
        (["--baseline", "tensorrt"], "wanted some of diffusers"),
        (["--steps", "0"], "wanted 1 or more"),
        (["--train"], "need a GPU"),
    ],
)
def test_mistakes_are_told(monkeypatch, flags, message):
    monkeypatch.setattr(sys, "argv", ["bench.py", "--device", "cpu", *flags])
    with pytest.raises(UserError, match=message):
        bench.main()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_what_only_a_gpu_runs():
    small = bench.Bench(bench.Config(seconds=0.01, only="rates,attention"), torch.device("cuda"))
    for label, rows in bench.plan(small):
        bench.keep(label, rows, small)
    assert small.found["rates"] and small.found["attention"]
