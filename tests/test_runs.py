"""Nothing is lost: kills, signals, NaNs, several processes."""

import functools
import json
import math
import multiprocessing
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_align import SPEC, aligned_model, tiny_pictures
from test_sample import flux_pipeline, sana_pipeline
from torch import nn

import align
import lora
import quant
import sample
from models import data, flux, runs, weights
from models.script import UserError

ROOT = Path(__file__).parent.parent
# How many times a run is killed: KILLS=100 python -m pytest tests/test_runs.py -k killed
KILLS = int(os.environ.get("KILLS", "6"))
CPU = torch.device("cpu")
CONFIG = align.Config(steps=10 * KILLS, batch_size=4, micro_batch=2, ema=0.9, save_every=1)
processes = multiprocessing.get_context("forkserver")


@pytest.fixture(scope="module", autouse=True)
def one_import_for_all_processes():
    processes.set_forkserver_preload(["align"])


def train(out: Path, config=CONFIG, pictures=None) -> dict:
    model = aligned_model()
    config = replace(config, out=str(out))
    align.train_head(model, pictures or tiny_pictures(), config, SPEC)
    return {name: p.detach().clone() for name, p in align.trained(model).items()}


def state(out: Path) -> tuple[dict, dict]:
    """(tensors, metadata) of the newest progress."""
    newest = weights.open_checkpoint(sorted(out.glob("*.progress-*"))[-1])
    return {name: newest.get(name) for name in newest.shapes}, newest.metadata


def losses(out: Path) -> list[tuple]:
    """(step, loss, lr, norm); of a step that was done again the last time."""
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    last = {row["step"]: (row["step"], row["loss"], row["lr"], row["norm"]) for row in rows}
    return [*last.values()]


def assert_same_run(one: Path, other: Path) -> None:
    (tensors, notes), (others, other_notes) = state(one), state(other)
    kinds = {name.split(".")[-1] for name in tensors}
    assert {"exp_avg", "exp_avg_sq", "average", "weight"} <= kinds
    assert {**notes, "command": ""} == {**other_notes, "command": ""}  # but for --out
    assert tensors.keys() == others.keys()
    assert all(torch.equal(tensors[name], others[name]) for name in tensors)
    assert losses(one) == losses(other)


# ---- kill -9


def victim(out: Path, ready) -> None:
    """Train, with saves that lie half written for a while."""
    torch.set_num_threads(1)
    save_file = weights.save_file

    def slow_save_file(tensors, path, metadata):
        save_file(tensors, path, metadata)
        whole = Path(path).read_bytes()
        Path(path).write_bytes(whole[: len(whole) // 2])
        time.sleep(0.01)
        Path(path).write_bytes(whole)

    weights.save_file = slow_save_file
    ready.set()
    train(out)


def test_a_run_killed_at_random_moments_ends_in_the_same_bits(tmp_path):
    """Half of the kills hit inside a save."""
    torch.set_num_threads(1)  # as in a victim: the number of threads is in the bits
    train(tmp_path / "whole")
    out, rng = tmp_path / "killed", random.Random(0)
    out.mkdir()
    kills, inside = 0, 0
    while True:
        with runs.locked(out):
            pass  # what a script does first: the leftovers of a killed save go
        ready = processes.Event()
        process = processes.Process(target=victim, args=(out, ready))
        process.start()
        assert ready.wait(60)
        if kills < KILLS and kills % 2:
            while process.is_alive() and not list(out.glob(".tmp-align*")):
                pass
            process.kill()
        elif kills < KILLS:
            process.join(rng.uniform(0, 0.3))
            process.kill()
        process.join()
        if process.exitcode == 0:
            break
        assert process.exitcode == -signal.SIGKILL
        kills, inside = kills + 1, inside + bool(list(out.glob(".tmp-align*")))
    assert kills == KILLS and inside >= KILLS // 2
    assert len(list(out.glob("*.progress-*"))) == runs.KEPT
    assert_same_run(tmp_path / "whole", out)


def test_progress_that_is_damaged_is_passed_over_for_the_one_before(tmp_path):
    config = replace(CONFIG, steps=6)
    train(tmp_path / "whole", config)
    train(tmp_path / "damaged", config)
    newest = sorted((tmp_path / "damaged").glob("*.progress-*"))[-1]
    newest.write_bytes(newest.read_bytes()[:-9])
    train(tmp_path / "damaged", config)
    assert_same_run(tmp_path / "whole", tmp_path / "damaged")


def test_what_is_measured_on_the_way_goes_on_with_the_run(tmp_path):
    config, times = replace(CONFIG, steps=9, out=str(tmp_path)), iter(range(100))
    model = aligned_model()

    def watch(run: runs.Run) -> None:  # before every step
        run.log(held_out=next(times))

    for _ in range(2):  # and step 8 is done again
        align.train_head(model, tiny_pictures(), config, SPEC, watch)
        newest = sorted(tmp_path.glob("*.progress-*"))[-1]
        newest.rename(newest.with_suffix(".away"))
    newest.with_suffix(".away").rename(newest)
    run = runs.Run("align", align.trained(model), torch.optim.AdamW(model.parameters()), config)
    assert run.curve("held_out") == [*enumerate(range(8)), (8, 9)]
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "loss" in row] == [*range(9), 8]


# ---- signals


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_step_saves_and_exits(tmp_path, monkeypatch, number):
    config = replace(CONFIG, steps=8, save_every=100)
    train(tmp_path / "whole", replace(config, save_every=8))
    is_finite = runs.Run.is_finite

    def interrupted(self, *args):
        if self.step == 3 and not self.out.name.startswith("whole"):
            os.kill(os.getpid(), number)
        return is_finite(self, *args)

    monkeypatch.setattr(runs.Run, "is_finite", interrupted)
    before = signal.getsignal(number)
    with pytest.raises(SystemExit) as end:
        train(tmp_path / "stopped", config)
    assert end.value.code == 128 + number and signal.getsignal(number) is before
    assert int(state(tmp_path / "stopped")[1]["step"]) == 4
    train(tmp_path / "stopped", replace(config, save_every=8))
    one, other = state(tmp_path / "whole")[0], state(tmp_path / "stopped")[0]
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_signal_during_the_last_save_is_heard(tmp_path, monkeypatch):
    save = runs.Run.save

    def interrupted(self, step):
        save(self, step)
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(runs.Run, "save", interrupted)
    with pytest.raises(SystemExit) as end:
        train(tmp_path, replace(CONFIG, steps=2, save_every=100))
    assert end.value.code == 128 + signal.SIGTERM and int(state(tmp_path)[1]["step"]) == 2


def test_what_is_trained_is_not_trained_again_for_its_report(tmp_path, monkeypatch, capsys):
    flags = "--scenes 32 --steps 2 --per-task 1 --device cpu"
    flags = [*flags.split(), "--out", tmp_path]

    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(sample, "show_and_score", interrupted)
        run_main(align, patch, capsys, *flags)
    assert (tmp_path / "align.safetensors").exists()
    with monkeypatch.context() as patch:
        patch.setattr(runs.Run, "is_finite", None)  # no step is left
        assert run_main(align, patch, capsys, *flags)["scores"]
    assert not list(tmp_path.glob("*.progress-*"))


def test_a_finished_run_stays_and_its_parts_are_known_by_content(tmp_path, monkeypatch, capsys):
    """By lora.py, the sampler, an export and quant.py: from any folder, and never another file."""
    monkeypatch.chdir(tmp_path)
    for name in ("flux", "dc-ae-f32c32"):
        shutil.copy(ROOT / f"models/toy/{name}.safetensors", tmp_path / f"{name}.safetensors")
    own = ["--model", "flux.safetensors", "--steps", 1, "--per-task", 0, "--out", "r"]
    flags = ["--autoencoder", "dc-ae-f32c32.safetensors", "--scenes", 24, *own]
    run_main(align, monkeypatch, capsys, *flags)
    first = Path("r/align.safetensors").read_bytes()
    assert run_main(align, monkeypatch, capsys, *flags)["done"]
    with pytest.raises(UserError, match="of a finished run with --steps 1: name another --out"):
        run_main(align, monkeypatch, capsys, *flags, "--steps", 2)
    assert Path("r/align.safetensors").read_bytes() == first
    run_main(lora, monkeypatch, capsys, *own, "--rank", 2)
    assert run_main(lora, monkeypatch, capsys, *own, "--rank", 2)["done"]
    saved, elsewhere = tmp_path / "r" / "lora.safetensors", tmp_path / "elsewhere"
    elsewhere.mkdir()
    with monkeypatch.context() as moved:
        moved.chdir(elsewhere)  # headers hold whole paths
        assert sample.load_pipeline(str(saved), device="meta")[0].stage == "lora"
    for name in ("flux", "dc-ae-f32c32"):
        file = weights.open_checkpoint(Path(f"{name}.safetensors"))
        changed = {key: 1.5 * file.get(key) for key in file.shapes}
        before = file.path.read_bytes()
        weights.save(file.path, changed, file.metadata)
        attempts = {
            lora: [*own, "--rank", 3], sample: ["--model", saved, "--out", "x.png"],
            quant: ["--model", saved, "--out", "q", "--lora", "none"],
        }  # fmt: skip
        for module, given in (*attempts.items(), (lora, [*own, "--export", "diffusers"])):
            with pytest.raises(UserError, match=r"is not the file that|of a finished run with"):
                run_main(module, monkeypatch, capsys, *given)
        assert not Path("x.png").exists() and not Path("q/quant.safetensors").exists()
        file.path.write_bytes(before)


@pytest.mark.parametrize("module", [align, lora, quant, sample])
def test_a_full_disk_is_seen_before_anything_is_loaded(module, tmp_path, monkeypatch, capsys):
    flags = {align: ["--scenes", 24], lora: ["--aligned", tmp_path / "a/align.safetensors"]}
    if module is lora:
        short = ["--scenes", 24, "--steps", 1, "--per-task", 0, "--out", tmp_path / "a"]
        run_main(align, monkeypatch, capsys, *short)
    usage = shutil.disk_usage(tmp_path)._replace(free=0)
    monkeypatch.setattr(runs.shutil, "disk_usage", lambda path: usage)
    monkeypatch.setattr(weights.Checkpoint, "get", only_on_meta(weights.Checkpoint.get))
    with pytest.raises(UserError, match=r"may take [\d,]+ MB in .*, and 0 MB are free"):
        run_main(module, monkeypatch, capsys, *flags.get(module, []), "--out", tmp_path / "out")


def only_on_meta(get):
    def checked(self, name, device="cpu"):
        assert str(device) == "meta", "weights are read before the disk is seen to be full"
        return get(self, name, device)

    return checked


def test_progress_on_other_pictures_is_refused(tmp_path):
    for _ in range(2):
        train(tmp_path, replace(CONFIG, steps=2), replace(tiny_pictures(), key="these"))
    with pytest.raises(UserError, match="interrupted run with other pictures"):
        train(tmp_path, replace(CONFIG, steps=2), replace(tiny_pictures(), key="those"))


# ---- what is not finite


def poisoned(rows: slice):
    pictures = tiny_pictures()
    pictures.latents[rows] = math.nan
    return replace(pictures, names=tuple(f"{i}.png" for i in range(160)))


def test_a_step_that_is_not_finite_is_skipped_and_its_pictures_named(tmp_path, capsys):
    # Pictures 0 to 9 are NaN: about a fifth of the batches hold one of them.
    pictures = poisoned(slice(0, 10))
    trained = train(tmp_path, replace(CONFIG, steps=30), pictures)
    assert all(p.isfinite().all() for p in trained.values())
    bad = {step for step, loss, *_ in losses(tmp_path) if not math.isfinite(loss)}
    assert 3 < len(bad) < 15
    told = [line for line in capsys.readouterr().err.splitlines() if "skipped" in line]
    assert len(told) == len(bad)
    for step, line in zip(sorted(bad), told):
        rows = align.draw_batch(pictures, CONFIG, SPEC, step).rows.tolist()
        assert f"step {step}: loss nan" in line
        assert line.endswith(", ".join(f"{row}.png" for row in rows))
    assert int(state(tmp_path)[1]["updates"]) == 30 - len(bad)
    whole = state(tmp_path)[0]
    newest = sorted(tmp_path.glob("*.progress-*"))[-1]
    newest.unlink()  # go on from step 29: the optimizer counts updates, not steps
    train(tmp_path, replace(CONFIG, steps=30), pictures)
    again = state(tmp_path)[0]
    assert all(torch.equal(whole[name], again[name]) for name in whole)


def test_ten_steps_in_a_row_that_are_not_finite_stop_the_run(tmp_path):
    with pytest.raises(UserError, match="10th step in a row"):
        train(tmp_path, pictures=poisoned(slice(None)))
    tensors, notes = state(tmp_path)
    assert notes["updates"] == "0" and all(t.isfinite().all() for t in tensors.values())


# ---- one folder


def test_a_folder_takes_one_run_at_a_time(tmp_path):
    with runs.locked(tmp_path):
        with pytest.raises(UserError, match=f"process {os.getpid()} on {socket.gethostname()}"):
            with runs.locked(tmp_path):
                pass
    left = [tmp_path / ".tmp-x.safetensors", tmp_path / ".tmpAb3xYz"]  # ours, safetensors'
    left.append(tmp_path / "cache" / "0a" / ".tmpQ1w2E3")
    left[-1].parent.mkdir(parents=True)
    for file in left:
        file.write_text("half")
    with runs.locked(tmp_path):
        assert not any(file.exists() for file in left)


def test_a_folder_is_named_after_the_whole_model():
    names = {
        "sana-1.6b-4k": "sana-1.6b-4k",
        "black-forest-labs/FLUX.1-Krea-dev": "FLUX.1-Krea-dev",
        "weights/my.flux/": "my.flux",
        "weights/flux1-dev.safetensors": "flux1-dev",
    }
    for model, folder in names.items():
        assert runs.folder_of(align.Config(model=model)) == Path("runs") / folder
    assert runs.folder_of(align.Config(out="here")) == Path("here")


def test_what_goes_on_from_a_run_has_a_folder_of_its_own(tmp_path):
    for name in ("lora.safetensors", "diffusers", "diffusers/transformer"):
        config = align.Config(model=str(tmp_path / "x" / name))
        (tmp_path / "x" / name).mkdir(parents=True, exist_ok=True)
        assert runs.folder_of(config) == Path("runs/x-2")
        assert runs.folder_of(config, trains=False) == Path("runs/x")  # quant.py, --export


@pytest.mark.parametrize("script, flags", [
    (align, "--lr nan"), (align, "--steps -1"), (align, "--micro-batch -1"), (lora, "--lr -0.001"),
    (lora, "--seed -1"), (align, "--save-every 0"), (lora, "--rank 0"), (lora, "--batch-size 0"),
    (align, "--batch-size 0"),
])  # fmt: skip
def test_a_flag_that_no_run_can_have_is_refused(tmp_path, monkeypatch, script, flags):
    aligned = ROOT / "models/toy/dc-gen-f32.safetensors"  # any run
    monkeypatch.setattr(lora, "find_aligned", lambda config: aligned)
    monkeypatch.setattr(sys, "argv", ["x.py", *flags.split(), "--out", str(tmp_path)])
    with pytest.raises(UserError, match=r"^--[a-z-]+ \S+( on 1 GPUs)?: wanted"):
        script.main()


def test_a_machine_without_git_can_save(monkeypatch):
    def absent(*_, **__):
        raise FileNotFoundError("git")

    monkeypatch.setattr(subprocess, "run", absent)
    assert runs.commit() == ""


# ---- the same result, with less memory or more processes


def test_micro_batches_and_recomputation_change_memory_and_not_the_result(tmp_path):
    config = replace(CONFIG, steps=4, micro_batch=0)
    whole = train(tmp_path / "whole", config)
    parts = train(tmp_path / "parts", replace(config, micro_batch=1))
    model = aligned_model()
    runs.ready_blocks(model.blocks, CPU)
    align.train_head(model, tiny_pictures(), replace(config, out=str(tmp_path / "again")), SPEC)
    for name, p in align.trained(model).items():
        torch.testing.assert_close(parts[name], whole[name], rtol=1e-4, atol=1e-6)
        assert torch.equal(p, whole[name])


def worker(rank: int, world: int, port: int, out: Path, config) -> None:
    torch.set_num_threads(1)
    os.environ |= {
        "RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
    }  # fmt: skip
    runs.start("cpu")
    model = aligned_model()
    if rank:  # another start: the first process's is what counts
        model.img_in.reset_parameters()
    align.train_head(model, tiny_pictures(), replace(config, out=str(out)), SPEC)
    loss = align.held_out_loss(model, tiny_pictures(), config, SPEC)
    weights.save(out / f"{rank}.safetensors", align.trained(model), {"loss": str(loss)})
    runs.finish()


@pytest.mark.parametrize("world, batch", [(2, 4), (3, 4)])
def test_processes_together_do_what_one_does_alone(tmp_path, world, batch):
    config = replace(CONFIG, steps=5, batch_size=batch, micro_batch=1)
    one = train(tmp_path / "one", config)
    (tmp_path / "all").mkdir()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    workers = [
        processes.Process(target=worker, args=(rank, world, port, tmp_path / "all", config))
        for rank in range(world)
    ]
    for process in workers:
        process.start()
    for process in workers:
        process.join(120)
        assert process.exitcode == 0
    files = [weights.open_checkpoint(tmp_path / "all" / f"{r}.safetensors") for r in range(world)]
    for name in one:
        assert all(torch.equal(files[0].get(name), file.get(name)) for file in files)
        torch.testing.assert_close(files[0].get(name), one[name], rtol=1e-4, atol=1e-6)
    model = aligned_model()
    for name, p in align.trained(model).items():
        p.data.copy_(files[0].get(name))
    alone = align.held_out_loss(model, tiny_pictures(), config, SPEC)
    assert all(abs(float(file.metadata["loss"]) - alone) < 1e-5 for file in files)
    for (step, loss, lr, norm), row in zip(losses(tmp_path / "one"), losses(tmp_path / "all")):
        assert row == pytest.approx((step, loss, lr, norm), rel=1e-4)


def test_the_memory_before_activations_is_the_arithmetic():
    model = aligned_model()
    trained = sum(p.numel() for p in align.trained(model).values())
    frozen = sum(p.numel() for p in model.parameters()) - trained
    for ema, bytes_each in ((0.0, 16), (0.9, 20)):
        gib = (4 * frozen + bytes_each * trained) / 2**30
        line = runs.memory(model, replace(CONFIG, ema=ema))
        assert line == f"{trained / 1e6:.2f} M trained, {gib:.1f} GiB before activations"


# ---- the two commands on pictures of the user's, with models in the official layout


def hostile_folder(folder: Path) -> set[str]:
    """20 sound pictures of all kinds, and some that are not: returns the names of those."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    modes = ["RGB", "RGBA", "LA", "P", "L", "1", "CMYK", "RGB"]
    dog, cat = b"a dog\r\nin two lines", "a cat".encode("utf-16")
    captions = [b"\xef\xbb\xbfa fox", dog, cat, b"caf\xc3\xa9"]
    for i in range(20):
        size = [(64, 64), (100, 70), (80, 130)][i % 3]
        picture = Image.fromarray(rng.integers(0, 255, (*size[::-1], 3), np.uint8))
        mode = modes[i % len(modes)]
        path = folder / f"{i}.{'jpg' if mode == 'CMYK' else 'png'}"
        exif = Image.Exif()
        exif[0x112] = 1 + i % 8  # turned
        picture.convert(mode).save(path, exif=exif)
        path.with_suffix(".txt").write_bytes(captions[i % 4])
    whole = (folder / "0.png").read_bytes()
    bad = {"cut.png": whole[:500], "text.jpg": b"no picture", "empty.webp": b"", "mute.png": whole}
    for name, content in bad.items():
        (folder / name).write_bytes(content)
        if name != "mute.png":
            (folder / name).with_suffix(".txt").write_text("bad")
    return set(bad)


def run_main(module, monkeypatch, capsys, *flags) -> dict:
    monkeypatch.setattr(sys, "argv", ["x.py", *map(str, flags)])
    module.main()
    return json.loads(capsys.readouterr().out.splitlines()[-1])


@pytest.mark.parametrize("kind", ["flux", "sana"])
def test_official_layouts_train_on_a_hostile_folder(tmp_path, monkeypatch, capsys, kind):
    diffusers = pytest.importorskip("diffusers", reason="makes the pipelines")
    dcae = dict(
        attention_head_dim=8, encoder_block_types="ResBlock", decoder_block_types="ResBlock",
        encoder_qkv_multiscales=((),) * 7, decoder_qkv_multiscales=((),) * 7,
        encoder_block_out_channels=(8,) * 7, decoder_block_out_channels=(8,) * 7,
        encoder_layers_per_block=(1,) * 7, decoder_layers_per_block=(1,) * 7,
        decoder_in_shortcut=False, encoder_out_shortcut=False, scaling_factor=1.0,
    )  # fmt: skip
    if kind == "flux":
        pipeline = flux_pipeline(diffusers)
    else:
        flow = dict(use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0)
        pipeline = sana_pipeline(diffusers, diffusers.DPMSolverMultistepScheduler(**flow))
    pipeline.save_pretrained(tmp_path / kind)
    diffusers.AutoencoderDC(latent_channels=128, **dcae).save_pretrained(tmp_path / "ae")
    bad = hostile_folder(tmp_path / "pictures")
    out = tmp_path / "run"
    flags = ["--model", tmp_path / kind, "--data", tmp_path / "pictures", "--resolution", 64]
    flags += ["--out", out, "--batch-size", 4, "--steps", 2, "--device", "cpu"]
    run_main(align, monkeypatch, capsys, *flags, "--autoencoder", tmp_path / "ae")
    assert {line.split("'")[1] for line in (out / "left_out.txt").read_text().splitlines()} == bad

    def fail(*_, **__):
        raise AssertionError("an encoder was loaded, though all is cached")

    monkeypatch.setattr("models.text.open_encoder", fail)
    monkeypatch.setattr("models.data.encode_rows", fail)
    tuned = run_main(lora, monkeypatch, capsys, *flags, "--rank", 2)
    previews = {file.name for file in (out / "previews").iterdir()}
    assert previews == {f"{s}-00000{n}.png" for s in ("align", "lora") for n in (0, 1)}
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [row["stage"] for row in rows if "loss" in row] == [
        stage for stage in ("align", "lora") for _ in range(2)
    ]
    spec, model, _ = sample.load_pipeline(tuned["files"][0])
    assert model.latent_channels == 128 and spec.autoencoder == str(tmp_path / "ae")
    assert model.config.get("position_stride", 1) == 1  # as tools that load an export have it
    # FLUX's ratio follows the size that is sampled; SANA's is a number.
    wanted = ("flux", None) if kind == "flux" else ("sana-dpm", 3.0)
    assert (spec.schedule, spec.shift, spec.size) == (*wanted, 64)


def script(*args: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *args], cwd=ROOT, capture_output=True, text=True)


def test_torchrun_gives_what_python_gives(tmp_path):
    flags = "--scenes 32 --per-task 1 --steps 2 --batch-size 4 --device cpu".split()
    alone = script("align.py", *flags, "--out", str(tmp_path / "one"))
    assert alone.returncode == 0, alone.stderr
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    both = script(*launch, "align.py", *flags, "--out", str(tmp_path / "two"))
    assert both.returncode == 0, both.stderr
    one, two = (json.loads(done.stdout.splitlines()[-1]) for done in (alone, both))
    assert two["held_out_loss"] == pytest.approx(one["held_out_loss"], rel=1e-4)
    assert sum(line.startswith("align | ") for line in both.stdout.splitlines()) == 1


def test_blocks_are_compiled_for_steps_and_nothing_else(tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    config, pictures = replace(CONFIG, steps=3, out=str(tmp_path)), tiny_pictures()
    train(tmp_path / "plain", config)
    model = aligned_model()
    runs.ready_blocks(model.blocks, torch.device("cuda"))  # as on a GPU
    torch._dynamo.utils.counters.clear()
    align.train_head(model, pictures, config, SPEC)
    assert losses(tmp_path) == losses(tmp_path / "plain")
    made = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert made > 0
    align.held_out_loss(model, pictures, config, SPEC)  # batches of another size
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == made


def test_batches_drawn_ahead_are_those_of_their_steps():
    """Also where a run goes on at another step than the one that was drawn ahead."""
    draw = data.ahead(lambda step: torch.full((2,), step), torch.device("cuda"))
    assert [draw(step)[0].item() for step in (5, 6, 7, 100, 101, 3)] == [5, 6, 7, 100, 101, 3]


@pytest.mark.parametrize("tokens", [30, 512])
def test_gradients_in_bf16_are_those_of_fp32(tokens):
    """Through checkpointed blocks with heads as wide as FLUX's: what the GPU's attention makes of
    views into qkv. On an H200 a step once ended in an illegal address."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if tokens > 30 and device.type == "cpu":
        pytest.skip("as long as FLUX's texts: for a GPU")
    torch.manual_seed(0)
    model = flux.Flux(
        in_channels=32, num_layers=1, num_single_layers=2, num_attention_heads=2,
        attention_head_dim=128, joint_attention_dim=64, pooled_projection_dim=32,
    ).to(device)  # fmt: skip
    lora.choose_trained(model, lora.Config(rank=8))
    for name, p in model.named_parameters():
        if name.endswith("lora_B"):
            nn.init.normal_(p, std=0.1)
    runs.ready_blocks(model.blocks, device)

    def draw(*shape):
        return torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape)))

    batch = data.Batch(
        draw(4, 32, 16, 16), draw(4, 32, 16, 16).flip(0), torch.linspace(0.1, 0.9, 4),
        (draw(4, tokens, 64), draw(4, 32)), (draw(1, tokens, 64).expand(4, -1, -1), draw(4, 32)),
        torch.linspace(1, 5, 4), torch.arange(4),
    )  # fmt: skip
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        for p in model.parameters():
            p.data = p.data if p.requires_grad else p.data.to(dtype)
            p.grad = None
        for part, weight in batch.split(2, device):
            with runs.autocast(model):
                (weight * align.flow_loss(model, part, recover=True)).backward()
        found.append({name: p.grad.float() for name, p in align.trained(model).items()})
    exact, rough = (torch.cat([g.flatten() for g in grads.values()]) for grads in found)
    assert rough.isfinite().all() and (rough - exact).norm() < 0.05 * exact.norm()


def test_a_run_leaves_its_curve(tmp_path):
    train(tmp_path)
    with Image.open(tmp_path / "curve.png") as curve:
        colors = {color for _, color in curve.convert("RGB").getcolors()}
    assert (70, 130, 180) in colors  # the loss, in steel blue


def test_tensorboard_reads_a_runs_figures(tmp_path):
    pytest.importorskip("tensorboard", reason="event files are written where it is installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(tmp_path)
    events = EventAccumulator(str(tmp_path / "events" / "align-2")).Reload()
    told = [(event.step, event.value) for event in events.Scalars("loss")]
    assert told == [(step, pytest.approx(loss)) for step, loss, *_ in losses(tmp_path)]
