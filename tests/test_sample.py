"""Why believe sample.py and models/registry.py: the reference's numbers, identities, pictures."""

import json
import math
import sys
from dataclasses import asdict, replace
from itertools import product
from pathlib import Path

import pytest
import torch
from PIL import Image, PngImagePlugin
from reference import error, golden, weights_of
from safetensors.torch import save_file
from test_text import VOCABULARY, tiny_flux_text, tiny_sana_text

import dcae
import sample
from models import data, flux, hub, registry, sana, script, vae, weights
from models.flux import Flux
from models.sana import Sana
from models.text import ToyText
from models.vae import FluxVAE

ROOT = Path(sample.__file__).parent / "models" / "toy"


def assert_close(ours: torch.Tensor, theirs: torch.Tensor, tolerance: float = 5e-5) -> None:
    relative = error(ours, theirs)
    print(f"relative error {relative:.1e}")
    assert relative <= tolerance


# ---- parity


def test_schedules_are_the_references():
    tensors, meta = golden("sched_flow_euler")
    for steps, tokens in json.loads(meta["pairs"]):
        ours = sample.timesteps(steps, "flux", tokens=tokens)
        assert_close(ours, tensors[f"out/dynamic_s{steps}_l{tokens}_sigmas"], 1e-6)
    for steps, tokens, channels in json.loads(meta["flux2r"]):
        ours = sample.timesteps(steps, "dc-gen-1k", tokens=tokens, channels=channels)
        assert_close(ours, tensors[f"out/flux2r_s{steps}_t{tokens}_c{channels}_sigmas"], 1e-6)
    for shift, steps in ((1.0, 18), (3.0, 20)):
        ours = sample.timesteps(steps, "sana-euler", shift=shift)
        assert_close(ours, tensors[f"out/static{shift:.0f}_s{steps}_sigmas"], 1e-6)


class Linear(torch.nn.Module):
    """The model of the golden trajectories, v = x A^T + t b; remembers the timesteps it saw."""

    def __init__(self, tensors: dict):
        super().__init__()
        self.matrix, self.bias, self.seen = tensors["in/A"], tensors["in/b"], []

    def forward(self, noisy_latents, timestep, *cond):
        self.seen.append(timestep[0].item())
        return noisy_latents @ self.matrix.T + timestep[:, None, None] * self.bias


def test_euler_trajectory_is_the_references():
    tensors, _ = golden("sched_flow_euler")
    sigmas = tensors["out/traj_sigmas"]
    assert_close(sample.timesteps(5, "flux", tokens=1024), sigmas, 1e-6)
    for i in range(5):  # a shorter schedule is the beginning of the longer one
        ours = sample.sample(Linear(tensors), (), tensors["in/x0"], sigmas[: i + 2], None)
        assert_close(ours, tensors[f"out/traj_{i}"])


def test_dpm_schedules_timesteps_and_trajectories_are_the_references():
    tensors, meta = golden("sched_sana_dpm")
    for steps in (3, 18):
        sigmas = sample.timesteps(steps, "sana-dpm", shift=3.0)
        ours = sample.sample(Linear(tensors), (), tensors["in/x0"], sigmas, None, solver="dpm")
        assert_close(ours, tensors[f"out/traj_shift3_s{steps}_{steps - 1}"])
        assert_close(ours, tensors[f"out/origsolver_shift3_s{steps}_final"])
    for steps, shift in json.loads(meta["tables"]):
        model, name = Linear(tensors), f"out/dpm_shift{shift:.0f}_s{steps}"
        sigmas = sample.timesteps(steps, "sana-dpm", shift=shift)
        assert_close(sigmas, tensors[f"{name}_sigmas"], 1e-6)
        sample.sample(model, (), tensors["in/x0"], sigmas, None, solver="dpm")
        ours = (1000 * torch.tensor(model.seen)).round().long()
        assert torch.equal(ours, tensors[f"{name}_timesteps"])


def golden_model(cls: type, name: str, folder: Path) -> tuple[torch.nn.Module, dict, dict]:
    tensors, meta = golden(name)
    save_file(weights_of(tensors), folder / "w.safetensors")
    model = cls.from_pretrained(folder / "w.safetensors", config=json.loads(meta["config"]))
    return model, tensors, json.loads(meta["extra"])["e2e"]


@pytest.mark.parametrize(
    "name",
    ["flux_tiny_diffusers", "flux_tiny_dcgen_c32_diffusers", "flux_tiny_dcgen_c128_diffusers"],
)
def test_flux_latents_are_the_references_after_every_step(name, tmp_path):
    model, tensors, trip = golden_model(Flux, name, tmp_path)
    size = tensors["in/latents_bchw"].shape[2:]

    def unpack(tokens):  # (B, N, C p p) -> (B, C, h, w)
        return model.unpatchify(tokens, *size)

    tokens = size.numel() // model.patch_size**2
    kind = "dc-gen-1k" if trip["rule"] == "flux2_r" else "flux"
    sigmas = sample.timesteps(trip["steps"], kind, tokens, model.latent_channels)
    assert_close(sigmas, tensors["out/e2e_sigmas"], 1e-6)
    cond = (tensors["in/encoder_hidden_states"], tensors["in/pooled_projections"])
    noise = unpack(tensors["in/e2e_noise_packed"])
    for i in range(trip["steps"]):
        ours = sample.sample(model, cond, noise, sigmas[: i + 2], trip["guidance"])
        assert_close(ours, unpack(tensors[f"out/e2e_latents_{i}"]))


@pytest.mark.parametrize("name", ["sana_tiny_diffusers", "sana_tiny_c128_diffusers"])
def test_sana_latents_are_the_references(name, tmp_path):
    model, tensors, trip = golden_model(Sana, name, tmp_path)
    sigmas = sample.timesteps(trip["steps"], "sana-dpm", shift=trip["flow_shift"])
    assert_close(sigmas, tensors["out/e2e_sigmas"], 1e-6)
    cond = (tensors["in/encoder_hidden_states"], tensors["in/encoder_attention_mask"] > 0)
    null = (tensors["in/negative_prompt_embeds"], tensors["in/negative_prompt_attention_mask"] > 0)
    noise = tensors["in/e2e_noise"]
    ours = sample.sample(model, cond, noise, sigmas, trip["guidance"], null, "dpm")
    assert_close(ours, tensors[f"out/e2e_latents_{trip['steps'] - 1}"])


# ---- identities


@pytest.mark.parametrize("solver, steps", [("ab2", 7), *product(("euler", "dpm"), (1, 2, 7))])
@pytest.mark.parametrize("kind", ["flux", "sana-dpm", "schnell"])
def test_an_exact_straight_path_gives_the_data_back(solver, kind, steps):
    latents, noise = torch.randn(2, 3, 4, 5), torch.randn(2, 3, 4, 5)
    sigmas = sample.timesteps(steps, kind, tokens=1024)
    start = (1 - sigmas[0]) * latents + sigmas[0] * noise

    def straight(noisy_latents, timestep, *cond):
        return noise - latents

    ours = sample.sample(straight, (), start, sigmas, None, solver=solver)
    assert torch.isfinite(ours).all()
    assert_close(ours, latents, 1e-5)


def decay(noisy_latents, timestep, *cond):
    """A velocity whose path is known: x(t) = x(1) exp(sin 2t - sin 2)."""
    return 2 * math.cos(2 * float(timestep[0])) * noisy_latents


class Overwriting:
    """As a CUDA graph does it: every call returns the same memory."""

    def start(self, timesteps, noise, *given):
        self.timesteps, self.out = timesteps, torch.empty_like(noise)

    def __call__(self, step, noisy_latents):
        return self.out.copy_(decay(noisy_latents, torch.tensor([self.timesteps[step]])))


@pytest.mark.parametrize("solver, gain", [("euler", 2), ("ab2", 4)])
def test_twice_the_steps_halve_or_quarter_the_error(solver, gain):
    start, errors = torch.ones(1, 1, 1, 1), []
    for steps in (40, 80):
        sigmas = sample.timesteps(steps, "flux", tokens=1024)  # uneven steps
        end = sample.sample(decay, (), start, sigmas, None, solver=solver)
        given = dict(solver=solver, stepper=Overwriting())
        assert torch.equal(end, sample.sample(decay, (), start, sigmas, None, **given))
        errors.append(abs(end.item() - math.exp(-math.sin(2))))
    assert errors[0] / errors[1] == pytest.approx(gain, rel=0.15)


def test_ab2_begins_with_euler_and_is_refused_for_few_steps():
    sigmas = sample.timesteps(6, "flux", tokens=1024)
    x, last, levels = 1.0, None, sigmas.double().tolist()
    for i in range(6):
        h, velocity = levels[i + 1] - levels[i], 2 * math.cos(2 * levels[i]) * x
        ratio = h / (levels[i] - levels[i - 1]) if i else 0
        x += h * ((1 + ratio / 2) * velocity - ratio / 2 * (last or 0))
        last = velocity
    ours = sample.sample(decay, (), torch.ones(1, 1, 1, 1), sigmas, None, solver="ab2")
    assert ours.item() == pytest.approx(x, rel=1e-5)
    for solver, steps in (("ab2", 5), ("heun", 20)):
        with pytest.raises(script.UserError, match=f"--solver {solver}.*wanted"):
            sample.sample(decay, (), ours, sample.timesteps(steps, "schnell"), None, solver=solver)


def test_guidance_extrapolates_between_two_passes_or_is_an_input_of_each_image():
    noise, text, sigmas = torch.randn(2, 3, 4, 5), torch.randn(2, 3), torch.tensor([1.0, 0.0])

    def two_passes(noisy_latents, timestep, text):
        assert text[: len(text) // 2].abs().max() == 0
        return noisy_latents * 0 + text[:, :, None, None]

    ours = sample.sample(two_passes, (text,), noise, sigmas, 4.5, null_cond=(0 * text,))
    torch.testing.assert_close(ours, noise - 4.5 * text[:, :, None, None])

    def distilled(noisy_latents, timestep, text, guidance):
        assert guidance.tolist() == [3.5, 3.5] and timestep.tolist() == [1.0, 1.0]
        return noisy_latents

    assert sample.sample(distilled, (text,), noise, sigmas, 3.5).abs().max() == 0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("solver, kind", [("euler", "flux"), ("dpm", "sana-dpm")])
def test_a_gpu_makes_the_latents_of_the_cpu(solver, kind):
    def model(noisy_latents, timestep, text):
        return noisy_latents.sin() + timestep[:, None, None, None] * text[..., None]

    noise, text = sample.draw_noise([0, 1], (3, 4, 5)), torch.randn(2, 3, 4)
    sigmas = sample.timesteps(6, kind, tokens=1024)
    cpu = sample.sample(model, (text,), noise, sigmas, 2.0, (0 * text,), solver)
    cond, null = (text.cuda(),), (0 * text.cuda(),)
    gpu = sample.sample(model, cond, noise.cuda(), sigmas.cuda(), 2.0, null, solver)
    assert_close(gpu.cpu(), cpu, 1e-5)


# ---- the whole trip, with tiny random models


def run(monkeypatch, capsys, *flags: str) -> dict:
    """python sample.py ...: what the last line of stdout says."""
    monkeypatch.setattr(sys, "argv", ["sample.py", "--device", "cpu", *map(str, flags)])
    sample.main()
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def pixels(path: str) -> torch.Tensor:
    with Image.open(path) as image:
        return as_tensor(image)


def as_tensor(image: Image.Image) -> torch.Tensor:
    return torch.tensor(list(image.convert("RGB").tobytes())).view(image.height, image.width, 3)


def save_with_recipe(path: str, recipe: dict, text: str = "") -> None:
    notes = PngImagePlugin.PngInfo()
    notes.add_text("recipe", text or json.dumps(recipe))
    Image.new("RGB", (8, 8)).save(path, pnginfo=notes)


@pytest.fixture
def toy(tmp_path, monkeypatch) -> Path:
    """The toy's three files, tiny and random, where its presets look for them."""
    torch.manual_seed(0)
    parts = {
        "flux-vae": FluxVAE(block_out_channels=[8, 8, 8, 8], layers_per_block=1, norm_num_groups=4),
        "text": ToyText(VOCABULARY, width=24, heads=2, length=12),
        "flux": Flux(
            num_layers=1, num_single_layers=1, num_attention_heads=2, attention_head_dim=16,
            axes_dims_rope=[4, 6, 6], joint_attention_dim=24, pooled_projection_dim=24,
        ),
    }  # fmt: skip
    for name, part in parts.items():
        config = {"config": json.dumps(part.config)}
        weights.save(tmp_path / "models" / "toy" / f"{name}.safetensors", part.state_dict(), config)
    monkeypatch.setattr(hub, "ROOT", tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_picture_is_the_same_alone_among_others_and_repeated_from_itself(
    toy, monkeypatch, capsys
):
    words = "a blue square left of a red circle"
    (toy / "p.txt").write_text(f"a red circle\n\n{words}\n{words}\n")
    files = run(monkeypatch, capsys, "--prompts", "p.txt", "--seed", 5, "--steps", 2)
    files = files["files"]  # every picture has a noise of its own
    assert [Path(file).name for file in files] == [f"000{i}_seed{5 + i}.png" for i in range(3)]
    flags = ["--prompt", words, "--steps", 2, "--out", "alone.png"]
    run(monkeypatch, capsys, *flags, "--seed", 7)
    same = pixels(files[2])
    assert torch.equal(pixels("alone.png"), same) and same.float().std() > 1
    run(monkeypatch, capsys, "--from", files[2], "--out", "again.png")
    assert Path("again.png").read_bytes() == Path(files[2]).read_bytes()
    run(monkeypatch, capsys, "--from", files[2], "--seed", 6, "--out", "other.png")
    assert Path("other.png").read_bytes() == Path(files[1]).read_bytes()
    assert not torch.equal(pixels(files[1]), same)


def test_a_recipe_sets_known_flags_only(toy, monkeypatch, capsys):
    """An older version's flag is passed over, and no picture names the file to write."""
    flags = {"prompt": "a red circle", "steps": 1, "seed": 2}
    save_with_recipe("old.png", flags | {"own_seeds": False, "out": "theirs.png"})
    run(monkeypatch, capsys, "--from", "old.png", "--out", "again.png")
    flags = ["--prompt", "a red circle", "--steps", 1, "--seed", 2, "--out", "new.png"]
    run(monkeypatch, capsys, *flags)
    assert torch.equal(pixels("again.png"), pixels("new.png")) and not Path("theirs.png").exists()


def test_any_size_is_made_on_the_next_larger_grid_and_cropped(toy, monkeypatch, capsys):
    flags = ["--steps", 1, "--prompt", "a red circle"]
    odd = run(monkeypatch, capsys, *flags, "--size", "61x35", "--out", "odd.png")
    whole = run(monkeypatch, capsys, *flags, "--size", "64x48", "--out", "whole.png")
    assert odd["tokens"] == whole["tokens"] == 4 * 3
    assert {*odd["seconds"]} == {"text", "load", "steps", "decode", "transfer", "file"}
    assert torch.equal(pixels("odd.png"), pixels("whole.png")[6:41, 1:62])


def test_prompts_make_a_folder_that_the_trainers_read(toy, monkeypatch, capsys):
    rows = [{"prompt": "a red circle", "seed": 9}, {"prompt": "a blue square"}]
    (toy / "p.jsonl").write_text("\n".join(map(json.dumps, rows)))
    flags = ["--prompts", "p.jsonl", "--seed", 3, "--out", toy / "pictures", "--steps", 1]
    files = [Path(file) for file in run(monkeypatch, capsys, *flags)["files"]]
    assert [file.name for file in files] == ["0000_seed9.png", "0001_seed4.png"]
    folder = data.open_folder(toy / "pictures", 32)
    assert folder.names == [*map(str, files)] and folder.captions == [
        "a red circle",
        "a blue square",
    ]
    # An interrupted list goes on: what is missing or of another recipe is drawn.
    files[1].unlink()
    assert run(monkeypatch, capsys, *flags)["files"] == [str(files[1])]
    assert run(monkeypatch, capsys, *flags)["files"] == []
    again = run(monkeypatch, capsys, *flags[:-1], 2)["files"]
    assert again == [str(file) for file in files]


def test_no_picture_of_another_recipe_is_replaced(toy, monkeypatch, capsys):
    flags = ["--steps", 1, "--prompt", "a red circle"]
    (first,) = run(monkeypatch, capsys, *flags)["files"]
    before = Path(first).read_bytes()
    assert run(monkeypatch, capsys, *flags)["files"] == [first]  # the same again
    (second,) = run(monkeypatch, capsys, *flags, "--guidance", 2)["files"]
    assert Path(second).name == "0001_seed0.png" and Path(first).read_bytes() == before
    # A named file is replaced, and what was there is set aside.
    Path(first).rename("x.png")
    run(monkeypatch, capsys, *flags, "--guidance", 3, "--out", "x.png")
    assert Path(".earlier-0/x.png").read_bytes() == before != Path("x.png").read_bytes()


def test_a_folder_of_prompts_is_this_lists(toy, monkeypatch, capsys):
    for name, lines in (("a", ["a red circle"] * 3), ("b", ["a blue square"])):
        (toy / f"{name}.txt").write_text("\n".join(lines))
    Path("d").mkdir()
    Image.new("RGB", (8, 8)).save("d/mine.png")
    run(monkeypatch, capsys, "--prompts", "a.txt", "--steps", 1, "--out", "d")
    monkeypatch.setattr(sys, "argv", ["x", *"--prompts b.txt --steps 1 --out d".split()])
    sample.main()
    told = capsys.readouterr().out
    assert {path.name for path in Path("d").glob("*.*")} - {".earlier-0"} == {
        "mine.png", "0000_seed0.png", "0000_seed0.txt",
    }  # fmt: skip
    assert (
        len([*Path("d/.earlier-0").iterdir()]) == 6
        and "also in d, and not of this list: mi" in told
    )


@pytest.mark.parametrize("part", ["flux", "flux-vae"])
def test_a_picture_is_repeated_with_the_files_it_was_made_with(part, toy, monkeypatch, capsys):
    name = {"flux": "model", "flux-vae": "autoencoder"}[part]
    own = [f"--{name}", f"models/toy/{part}.safetensors"]
    (file,) = run(monkeypatch, capsys, *own, "--steps", 1, "--out", toy / "x.png")["files"]
    (toy / "elsewhere").mkdir()
    monkeypatch.chdir(toy / "elsewhere")  # the recipe holds the whole path
    run(monkeypatch, capsys, "--from", file, "--out", "y.png")
    assert Path("y.png").read_bytes() == Path(file).read_bytes()
    saved = weights.open_checkpoint(toy / own[1])
    tensors = {name: saved.get(name) * 1.5 for name in saved.shapes}
    weights.save(toy / own[1], tensors, saved.metadata)
    with pytest.raises(script.UserError, match=f"the {name} is another file than"):
        run(monkeypatch, capsys, "--from", file, "--out", "z.png")


@pytest.mark.parametrize("name", ["dc-gen-toy", "sana-toy"])
def test_the_shipped_toys_score(name, monkeypatch, capsys):
    scored = run(monkeypatch, capsys, "--model", name, "--score", 2)
    assert (scored["model"], scored["prompts"]) == (name, 18) and scored["seen"] > 0.7


def test_the_cache_knows_an_autoencoder_by_its_weights(toy):
    path = "models/toy/flux-vae.safetensors"
    identity, load = sample.latent_encoder("flux-vae-toy", "", "cpu", torch.float32)
    assert identity == sample.latent_encoder(path, "", "cpu", torch.float32)[0]
    assert load()(torch.zeros(1, 3, 8, 8)).shape == (1, 16, 1, 1)
    saved = weights.open_checkpoint(Path(path))
    tensors = {name: saved.get(name) + 1 for name in saved.shapes}
    weights.save(path, tensors, saved.metadata)
    assert identity != sample.latent_encoder(path, "", "cpu", torch.float32)[0]


def test_latents_survive_a_decoder_that_fails(toy, monkeypatch, capsys):
    flags = ["--steps", 1, "--prompt", "a red circle"]
    good = run(monkeypatch, capsys, *flags, "--out", "good.png")

    def interrupted(*_):
        raise KeyboardInterrupt

    failures = {
        "--from kept.lat": (script.UserError, lambda *_: torch.zeros(2).view(3)),
        "pixels hold NaN or Inf in fp32: look": (script.UserError, lambda _, x: x[:, :3] / 0),
        "^$": (KeyboardInterrupt, interrupted),  # by then they are on the disk: kill -9 is the same
    }
    for words, (kind, decode) in failures.items():
        with monkeypatch.context() as broken, pytest.raises(kind, match=words):
            broken.setattr(FluxVAE, "decode", decode)
            run(monkeypatch, capsys, *flags, "--out", "kept.png")
        assert not Path("kept.png").exists()
        run(monkeypatch, capsys, "--from", "kept.latents.safetensors", "--out", "late.png")
        assert torch.equal(pixels("late.png"), pixels(good["files"][0]))
        Path("kept.latents.safetensors").unlink()
    assert not [*Path().glob("*.latents*")]  # where all went well none are left


def test_a_run_of_ours_brings_its_base_and_autoencoder(tmp_path):
    run = weights.open_checkpoint(ROOT / "dc-gen-f32.safetensors")
    base = Flux.from_pretrained("flux-toy")
    tensors, path = {name: run.get(name) for name in run.shapes}, str(tmp_path / "lora.safetensors")
    weights.save(path, tensors, run.metadata)
    spec, transformer, found = sample.load_pipeline(path)
    assert torch.equal(transformer.img_in.weight, tensors["img_in.weight"])
    assert torch.equal(transformer.txt_in.weight, base.txt_in.weight)
    assert (spec.schedule, spec.solver, spec.shift, spec.stage) == (
        "dc-gen-1k",
        "euler",
        2.0,
        "lora",
    )
    assert (found.stride, spec.size) == (32, 128)
    weights.save(path, tensors, run.metadata | {"shift": "1.5", "size": "256"})
    assert registry.describe(path) == replace(spec, shift=1.5, size=256)
    with pytest.raises(script.UserError, match="latents of 32 channels, and flux-vae-toy reads 16"):
        sample.load_pipeline(path, "flux-vae-toy")


def test_a_flux_alone_is_known_by_its_shape(toy):
    assert registry.describe("models/toy/flux.safetensors").pipeline == "text-toy"
    rows = {64: ("flux", 1024, 28), 32: ("dc-gen-1k", 1024, 20), 128: ("flux", 4096, 20)}
    for channels, expected in rows.items():
        tensors = {"x_embedder.weight": torch.zeros(8, channels), "guidance": torch.zeros(1)}
        weights.save("x.safetensors", tensors, {})
        spec = registry.describe("x.safetensors")
        assert (spec.schedule, spec.size, spec.steps) == expected
    more = {"time_text_embed.delta_embedder.linear_1.bias": torch.zeros(1)}
    weights.save("x.safetensors", tensors | more, {})
    spec = registry.describe("x.safetensors")
    assert (spec.schedule, spec.size, spec.steps) == ("anyflow", 1024, 4)


@pytest.mark.parametrize(
    "width, channels, tokens, size, shift",
    [(1152, 32, 32**2, 1024, 3.0), (2240, 32, 16**2, 512, 3.0), (2240, 32, 128**2, 4096, 6.0),
     (2240, 128, 16**2, 1024, 3.0)],  # the last is DC-Gen: f64
)  # fmt: skip
def test_a_sana_alone_is_known_by_its_shape(width, channels, tokens, size, shift, tmp_path):
    patch, positions = torch.zeros(width, channels, 1, 1), torch.zeros(1, tokens, 1)
    tensors = {"x_embedder.proj.weight": patch, "pos_embed": positions}
    torch.save({"state_dict": tensors}, tmp_path / "sana.pth")
    spec = registry.describe(str(tmp_path / "sana.pth"))
    assert (spec.size, spec.shift) == (size, shift)
    assert spec.autoencoder == ("dc-ae-f64c128-1.5" if channels == 128 else spec.pipeline)


def test_every_model_names_parts_that_exist():
    for name in registry.MODELS:
        spec = registry.describe(name)
        assert spec.transformer in flux.PRESETS | sana.PRESETS
        assert spec.autoencoder in dcae.PRESETS | vae.PRESETS or "/" in spec.autoencoder
        assert (spec.pipeline == "text-toy") if spec.is_toy else ("/" in spec.pipeline)
        sample.timesteps(spec.steps, spec.schedule, 1024, 32, spec.shift)


def test_a_quantized_file_is_described_by_its_own_header(tmp_path):
    path = str(tmp_path / "quant.safetensors")
    spec = replace(registry.describe("dc-gen-toy"), steps=5)
    header = {"stage": "quant", "base": "flux-toy", "spec": json.dumps(asdict(spec))}
    weights.save(path, {"x": torch.zeros(1)}, header)
    assert registry.describe(path) == replace(spec, transformer=path, stage="quant")
    weights.save(path, {"x": torch.zeros(1)}, header | {"spec": '{"text": "toy"}'})
    with pytest.raises(script.UserError, match="make it again"):
        registry.describe(path)


@pytest.mark.parametrize(
    "flags, sentence",
    [
        (["--model", "flux-toys"], "is no file, folder or name; names: flux-toy, dc-gen"),
        (["--prompt", "a red fox"], "no word 'fox'"),
        (["--size", "12x99"], "below this model's minimum of 16x16"),
        (["--size", "big"], "wanted WxH in pixels"),
        (["--steps", "0"], "--steps and --batch-size: wanted 1 or more"),
        (["--batch-size", "0"], "--batch-size: wanted 1 or more"),
        (["--seed", "-1"], "--seed -1: wanted a number"),
        (["--prompts", "below.jsonl"], "a seed beyond 0 .. 2"),
        (["--prompts", "nowhere.txt"], "wanted a .txt, a prompt a line, or a .jsonl"),
        (["--prompts", "bad.jsonl"], "wanted a .txt, a prompt a line, or a .jsonl"),
        (["--from", "nowhere.png"], "--from nowhere.png carries no recipe"),
        (["--from", "plain.png"], "carries no recipe"),
        (["--prompts", "huge.jsonl"], "huge.jsonl line 1 has a seed beyond 0 .. 2"),
        (["--prompts", "west.txt"], "west.txt line 1: byte 5 is 0xe9"),
        (["--from", "typed.png"], "argument --steps: invalid int value: 'x'"),
        (["--model", "lost.safetensors"], "its base or autoencoder is not found"),
        (["--model", "half.safetensors"], "its base or autoencoder is not found ('autoencoder')"),
        (["--model", "other.safetensors"], "does not fit this Flux: tensors 1 of another shape"),
        (["--out", "x.jpg"], "wanted a folder, or for one picture a .png"),
        (["--out", "x.png", "--prompts", "two.txt"], "wanted a folder, or for one picture a .png"),
        (["--out", "bad.jsonl"], "bad.jsonl cannot be written (File exists)"),
        (["--negative-prompt", "blue"], "--negative-prompt is for SANA"),
        (["--autoencoder", "nonsense"], "no file, no folder and no preset"),
        (["--attention", "flash"], "wanted torch or triton"),
        (["--model", "flux-krea", "--score", "1"], "wanted a toy"),
        (["--score", "1", "--fp8"], "--fp8 has no effect beside --score"),
        (["--prompts", "two.txt", "--prompt", "a ring"], "--prompt has no effect beside --prompts"),
        (["--guidance", "-2"], "--guidance -2.0: wanted a number, not negative"),
        (["--model", "plain.safetensors", "--guidance", "2"], "plain.safetensors takes none"),
        (["--size", "32x99999999999999999999"], "wanted WxH in pixels, at most 2^30"),
        (["--from", "deep.png"], "carries no recipe of this program (it is no readable JSON"),
        (["--from", "listed.png"], "carries no recipe of this program (steps is neither text nor"),
        (["--from", "none.safetensors"], "holds latents of shape (): wanted (1, 16, h, w)"),
        (["--from", "none.safetensors", "--steps", "9"], "--steps changes nothing of latents"),
        (["--model", "self.safetensors"], "self.safetensors is a run itself, wanted a complete"),
        (["--autoencoder", "null.safetensors"], "scaling_factor is None, wanted a number"),
    ],
)
def test_bad_input_is_one_sentence_and_exit_code_2(toy, monkeypatch, capsys, flags, sentence):
    (toy / "two.txt").write_text("a red circle\na blue square\n")
    (toy / "bad.jsonl").write_text('{"prompts": 3}')
    (toy / "west.txt").write_bytes(b"a caf\xe9")
    (toy / "below.jsonl").write_text('{"prompt": "a", "seed": -1}')
    (toy / "huge.jsonl").write_text('{"prompt": "a", "seed": Infinity}')
    Image.new("RGB", (8, 8)).save("plain.png")
    save_with_recipe("typed.png", {"model": "flux-toy", "steps": "x"})
    header = {"stage": "align", "base": "gone.safetensors", "autoencoder": "flux-vae-toy"}
    weights.save("lost.safetensors", {"x": torch.zeros(1)}, header)
    weights.save("half.safetensors", {"x": torch.zeros(1)}, {"stage": "lora", "base": "flux-toy"})
    base = weights.open_checkpoint("models/toy/flux.safetensors")
    tensors = {name: base.get(name) for name in base.shapes} | {"img_in.bias": torch.zeros(3)}
    weights.save("other.safetensors", tensors, base.metadata)
    for name, steps in (("deep.png", "[" * 100_000), ("listed.png", '{"steps": [1]}')):
        save_with_recipe(name, {}, steps)
    told = {"recipe": '{"model": "flux-toy", "dtype": "fp32", "steps": 1}'}
    weights.save("none.safetensors", {"x": torch.zeros(2)}, told)
    header = {"stage": "lora", "base": "self.safetensors", "autoencoder": "flux-vae-toy"}
    weights.save("self.safetensors", {"x": torch.zeros(1)}, header)
    vae_file = weights.open_checkpoint(Path("models/toy/flux-vae.safetensors"))
    config = {"config": json.dumps(vae_file.config | {"scaling_factor": None})}
    tensors = {name: vae_file.get(name) for name in vae_file.shapes}
    weights.save("null.safetensors", tensors, config)
    plain = Flux(**base.config | {"guidance_embeds": False})
    config = {"config": json.dumps(plain.config)}
    weights.save("plain.safetensors", plain.state_dict(), config)
    monkeypatch.setattr(sys, "argv", ["sample.py", "--device", "cpu", *flags])
    with pytest.raises(SystemExit) as stop:
        script.exit_cleanly(sample.main)
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert stop.value.code == 2 and len(error) == 1 and sentence in error[0]


class Doubling(torch.nn.Module):
    """An autoencoder whose decoder sees one pixel around: exact tiles must not show."""

    stride = 32

    def __init__(self):
        super().__init__()
        self.kernel = torch.nn.Parameter(torch.rand(3, 4, 1, 1), requires_grad=False)

    def decode(self, latents):
        mixed = torch.nn.functional.conv2d(latents, self.kernel)
        return torch.nn.functional.interpolate(mixed, scale_factor=32.0)


@pytest.mark.parametrize("grid", [(33, 20), (64, 40), (29, 28), (32, 61)])
def test_a_decode_that_would_not_fit_is_tiled_without_a_seam(monkeypatch, grid):
    latents, autoencoder, shapes = torch.randn(2, 4, *grid), Doubling(), []
    expected, decode = autoencoder.decode(latents), autoencoder.decode
    monkeypatch.setattr(dcae, "TILES_ABOVE", 0)
    autoencoder.decode = lambda tile: shapes.append(tile.shape) or decode(tile)
    torch.testing.assert_close(sample.decode(autoencoder, latents), expected)
    assert max(max(shape[2:]) for shape in shapes) <= 32  # a tile is 1024 pixels


# ---- diffusers' own pipelines, saved by diffusers


def flux_pipeline(diffusers, dynamic: bool = True):
    torch.manual_seed(3)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler
    return diffusers.FluxPipeline(
        scheduler=scheduler(shift=3.0, use_dynamic_shifting=dynamic),
        vae=diffusers.AutoencoderKL(
            block_out_channels=[8, 8, 8, 8], layers_per_block=1, norm_num_groups=4,
            down_block_types=["DownEncoderBlock2D"] * 4, up_block_types=["UpDecoderBlock2D"] * 4,
            latent_channels=16, use_quant_conv=False, use_post_quant_conv=False,
            scaling_factor=0.3611, shift_factor=0.1159,
        ).eval(),
        transformer=diffusers.FluxTransformer2DModel(
            in_channels=64, num_layers=1, num_single_layers=1, attention_head_dim=16,
            num_attention_heads=2, joint_attention_dim=40, pooled_projection_dim=32,
            guidance_embeds=True, axes_dims_rope=(4, 6, 6),
        ).eval(),
        **tiny_flux_text(),
    )  # fmt: skip


def sana_pipeline(diffusers, scheduler):
    torch.manual_seed(4)
    return diffusers.SanaPipeline(
        scheduler=scheduler,
        vae=diffusers.AutoencoderDC(
            latent_channels=32, attention_head_dim=8, encoder_block_types="ResBlock",
            decoder_block_types="ResBlock", encoder_block_out_channels=(8,) * 6,
            decoder_block_out_channels=(8,) * 6, encoder_layers_per_block=(1,) * 6,
            decoder_layers_per_block=(1,) * 6, encoder_qkv_multiscales=((),) * 6,
            decoder_qkv_multiscales=((),) * 6, decoder_in_shortcut=False,
            encoder_out_shortcut=False, scaling_factor=0.41407,
        ).eval(),
        transformer=diffusers.SanaTransformer2DModel(
            in_channels=32, out_channels=32, num_layers=1, num_attention_heads=2,
            attention_head_dim=16, num_cross_attention_heads=2, cross_attention_head_dim=16,
            cross_attention_dim=32, caption_channels=48, sample_size=32,
        ).eval(),
        **tiny_sana_text(),
    )  # fmt: skip


def assert_same_picture(ours: str, theirs: Image.Image) -> None:
    ours, theirs = pixels(ours), as_tensor(theirs)
    error = (ours - theirs).abs().max().item()
    print(f"largest difference {error} of 255")
    assert error <= 1 and theirs.float().std() > 1  # not a flat picture


@pytest.mark.parametrize("dynamic", [True, False])
def test_a_flux_pipeline_folder_gives_diffusers_picture(dynamic, tmp_path, monkeypatch, capsys):
    diffusers = pytest.importorskip("diffusers", reason="the reference is not installed")
    pipeline = flux_pipeline(diffusers, dynamic)
    pipeline.save_pretrained(tmp_path)
    noise = sample.draw_noise([11], (16, 8, 12))
    (theirs,) = pipeline(
        "a fox", height=64, width=96, num_inference_steps=3, guidance_scale=2.5,
        latents=pipeline._pack_latents(noise, 1, 16, 8, 12),
    ).images  # fmt: skip
    flags = ["--prompt", "a fox", "--size", "96x64", "--steps", 3, "--guidance", 2.5, "--seed", 11]
    ours = run(monkeypatch, capsys, "--model", tmp_path, *flags, "--out", tmp_path / "x.png")
    assert_same_picture(ours["files"][0], theirs)
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: str(tmp_path))
    hub = run(monkeypatch, capsys, "--model", "some/pipeline", *flags, "--out", tmp_path / "y.png")
    assert torch.equal(pixels(hub["files"][0]), pixels(ours["files"][0]))


@pytest.mark.parametrize("solver", ["dpm", "euler"])
def test_a_sana_pipeline_folder_gives_diffusers_picture(solver, tmp_path, monkeypatch, capsys):
    diffusers = pytest.importorskip("diffusers", reason="the reference is not installed")
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    if solver == "dpm":
        scheduler = diffusers.DPMSolverMultistepScheduler(
            flow_shift=4.0, use_flow_sigmas=True, prediction_type="flow_prediction"
        )
    pipeline = sana_pipeline(diffusers, scheduler)
    pipeline.save_pretrained(tmp_path)
    (theirs,) = pipeline(
        "A fox", negative_prompt="blurry", height=96, width=64, num_inference_steps=4,
        guidance_scale=3.0, use_resolution_binning=False,
        latents=sample.draw_noise([12], (32, 3, 2)),
    ).images  # fmt: skip
    flags = ["--prompt", "A fox", "--negative-prompt", "blurry", "--size", "64x96", "--steps", 4]
    flags += ["--guidance", 3, "--seed", 12, "--model", tmp_path, "--out", tmp_path / "x.png"]
    assert_same_picture(run(monkeypatch, capsys, *flags)["files"][0], theirs)


def test_an_unknown_scheduler_is_refused(tmp_path):
    diffusers = pytest.importorskip("diffusers", reason="the reference is not installed")
    pipeline = sana_pipeline(diffusers, diffusers.DPMSolverMultistepScheduler(solver_order=3))
    pipeline.save_pretrained(tmp_path)
    with pytest.raises(script.UserError, match="solver_order=3.* is not known here"):
        registry.describe(str(tmp_path))


def test_a_list_is_drawn_in_parts_of_as_much_text_as_memory_holds(toy, monkeypatch, capsys):
    Path("list.txt").write_text("a red circle\na blue square\na red square\n")
    flags = ["--prompts", "list.txt", "--steps", 1]
    whole = run(monkeypatch, capsys, *flags, "--out", "whole")["files"]
    held, encode_text = [], sample.encode_text

    def spy(spec, prompts, *args):
        held.append(len(prompts))
        return encode_text(spec, prompts, *args)

    monkeypatch.setattr(sample, "encode_text", spy)
    monkeypatch.setattr(sample, "TEXTS", 2)
    parts = run(monkeypatch, capsys, *flags, "--out", "parts")["files"]
    assert held == [2, 1] and len(parts) == 3
    assert [pixels(a).tolist() for a in parts] == [pixels(b).tolist() for b in whole]
