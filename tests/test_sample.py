"""Why believe sample.py: the reference's numbers, and what must hold by algebra."""

import json
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image, PngImagePlugin
from reference import error, golden, weights_of
from safetensors.torch import save_file
from test_text import VOCABULARY, tiny_flux_text, tiny_sana_text

import dcae
import sample
from dcae import DCAE
from models import data, flux, sana, script, text, vae, weights
from models.flux import Flux
from models.sana import Sana
from models.text import ToyText
from models.vae import FluxVAE


def assert_close(ours: torch.Tensor, theirs: torch.Tensor, tolerance: float = 5e-5) -> None:
    relative = error(ours, theirs)
    print(f"relative error {relative:.1e}")
    assert relative <= tolerance


# ---- parity


def test_flux_schedules_are_the_references():
    tensors, meta = golden("sched_flow_euler")
    for steps, tokens in json.loads(meta["pairs"]):
        ours = sample.timesteps(steps, "flux", tokens=tokens)
        assert_close(ours, tensors[f"out/dynamic_s{steps}_l{tokens}_sigmas"], 1e-6)
    for steps, tokens, channels in json.loads(meta["flux2r"]):
        ours = sample.timesteps(steps, "dc-gen-1k", tokens=tokens, channels=channels)
        assert_close(ours, tensors[f"out/flux2r_s{steps}_t{tokens}_c{channels}_sigmas"], 1e-6)


def test_sana_schedules_are_the_references():
    tensors, _ = golden("sched_flow_euler")
    for shift, steps in ((1.0, 18), (3.0, 20)):
        ours = sample.timesteps(steps, "sana-euler", shift=shift)
        assert_close(ours, tensors[f"out/static{shift:.0f}_s{steps}_sigmas"], 1e-6)
    tensors, meta = golden("sched_sana_dpm")
    for steps, shift in json.loads(meta["tables"]):
        ours = sample.timesteps(steps, "sana-dpm", shift=shift)
        assert_close(ours, tensors[f"out/dpm_shift{shift:.0f}_s{steps}_sigmas"], 1e-6)


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


def test_dpm_trajectory_is_the_references():
    tensors, _ = golden("sched_sana_dpm")
    for steps in (3, 18):
        model = Linear(tensors)
        sigmas = sample.timesteps(steps, "sana-dpm", shift=3.0)
        ours = sample.sample(model, (), tensors["in/x0"], sigmas, None, solver="dpm")
        assert_close(ours, tensors[f"out/traj_shift3_s{steps}_{steps - 1}"])
        assert_close(ours, tensors[f"out/origsolver_shift3_s{steps}_final"])
        if steps == 18:
            whole = tensors["out/dpm_shift3_s18_timesteps"]
            assert torch.equal((1000 * torch.tensor(model.seen)).round().long(), whole)


def test_every_whole_timestep_is_the_references():
    tensors, meta = golden("sched_sana_dpm")
    for steps, shift in json.loads(meta["tables"]):
        model = Linear(tensors)
        sigmas = sample.timesteps(steps, "sana-dpm", shift=shift)
        sample.sample(model, (), tensors["in/x0"], sigmas, None, solver="dpm")
        ours = (1000 * torch.tensor(model.seen)).round().long()
        assert torch.equal(ours, tensors[f"out/dpm_shift{shift:.0f}_s{steps}_timesteps"])


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
    height, width = tensors["in/latents_bchw"].shape[2:]
    patch, channels = model.patch_size, model.latent_channels

    def unpack(tokens):  # (B, N, C p p) -> (B, C, h, w)
        return model.unpatchify(tokens, height, width)

    tokens = height * width // patch**2
    kind = "dc-gen-1k" if trip["rule"] == "flux2_r" else "flux"
    sigmas = sample.timesteps(trip["steps"], kind, tokens=tokens, channels=channels)
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


@pytest.mark.parametrize("solver", ["euler", "dpm"])
@pytest.mark.parametrize("kind", ["flux", "sana-dpm", "schnell"])
@pytest.mark.parametrize("steps", [1, 2, 7])
def test_an_exact_straight_path_gives_the_data_back(solver, kind, steps):
    latents, noise = torch.randn(2, 3, 4, 5), torch.randn(2, 3, 4, 5)
    sigmas = sample.timesteps(steps, kind, tokens=1024)
    start = (1 - sigmas[0]) * latents + sigmas[0] * noise

    def straight(noisy_latents, timestep, *cond):
        return noise - latents

    ours = sample.sample(straight, (), start, sigmas, None, solver=solver)
    assert torch.isfinite(ours).all()
    assert_close(ours, latents, 1e-5)


def test_guidance_extrapolates_from_the_unconditional_half():
    def model(noisy_latents, timestep, text):
        assert torch.equal(text[: len(text) // 2], torch.zeros_like(text[: len(text) // 2]))
        return noisy_latents * 0 + text[:, :, None, None]

    noise, text = torch.randn(2, 3, 4, 5), torch.randn(2, 3)
    sigmas = torch.tensor([1.0, 0.0])
    ours = sample.sample(model, (text,), noise, sigmas, 4.5, null_cond=(torch.zeros(2, 3),))
    torch.testing.assert_close(ours, noise - 4.5 * text[:, :, None, None])


def test_distilled_guidance_is_an_input_of_each_image():
    def model(noisy_latents, timestep, text, guidance):
        assert guidance.tolist() == [3.5, 3.5] and timestep.tolist() == [1.0, 1.0]
        return noisy_latents

    noise = torch.randn(2, 3, 4, 5)
    sigmas = torch.tensor([1.0, 0.0])
    assert sample.sample(model, (torch.zeros(2, 1, 1),), noise, sigmas, 3.5).abs().max() == 0


def test_an_image_depends_on_its_own_seed_only():
    pair, single = sample.draw_noise([7, 8], (3, 4, 5)), sample.draw_noise([8], (3, 4, 5))
    assert torch.equal(pair[1:], single) and not torch.equal(pair[0], pair[1])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("solver, kind", [("euler", "flux"), ("dpm", "sana-dpm")])
def test_a_gpu_makes_the_latents_of_the_cpu(solver, kind):
    class Model(torch.nn.Module):
        def forward(self, noisy_latents, timestep, text):
            return noisy_latents.sin() + timestep[:, None, None, None] * text[..., None]

    noise, text = sample.draw_noise([0, 1], (3, 4, 5)), torch.randn(2, 3, 4)
    sigmas = sample.timesteps(6, kind, tokens=1024)
    cpu = sample.sample(Model(), (text,), noise, sigmas, 2.0, (0 * text,), solver)
    cond, null = (text.cuda(),), (0 * text.cuda(),)
    gpu = sample.sample(Model(), cond, noise.cuda(), sigmas.cuda(), 2.0, null, solver)
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
    monkeypatch.setattr(weights, "ROOT", tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_picture_is_the_same_alone_among_others_and_repeated_from_itself(
    toy, monkeypatch, capsys
):
    (toy / "p.txt").write_text("a red circle\n\na blue square left of a red circle\n")
    many = run(monkeypatch, capsys, "--prompts", "p.txt", "--n", 2, "--seed", 5, "--steps", 2)
    assert [Path(f).name for f in many["files"]] == [
        "0000_seed5.png", "0001_seed6.png", "0002_seed5.png", "0003_seed6.png"
    ]  # fmt: skip
    flags = ["--prompt", "a blue square left of a red circle", "--seed", 6, "--steps", 2]
    alone = run(monkeypatch, capsys, *flags, "--out", "alone.png")
    again = run(monkeypatch, capsys, "--from", many["files"][3], "--out", "again.png")
    same = pixels(many["files"][3])
    assert torch.equal(pixels(alone["files"][0]), same) and same.float().std() > 1
    assert torch.equal(pixels(again["files"][0]), same)
    assert Path("again.png").read_bytes() == Path(many["files"][3]).read_bytes()
    assert not torch.equal(pixels(many["files"][2]), same)


def test_any_size_is_made_on_the_next_larger_grid_and_cropped(toy, monkeypatch, capsys):
    flags = ["--steps", 1, "--prompt", "a red circle"]
    odd = run(monkeypatch, capsys, *flags, "--size", "61x35", "--out", "odd.png")
    whole = run(monkeypatch, capsys, *flags, "--size", "64x48", "--out", "whole.png")
    assert odd["tokens"] == whole["tokens"] == 4 * 3
    assert torch.equal(pixels("odd.png"), pixels("whole.png")[6:41, 1:62])


def test_pictures_to_train_on_have_noises_of_their_own(toy, monkeypatch, capsys):
    """3072 pictures from one noise made a model that knows one background and two colours."""
    Path("p.txt").write_text("a red circle\na blue square\n")
    flags = ["--prompts", "p.txt", "--n", 2, "--seed", 5, "--own-seeds", "--steps", 1]
    files = run(monkeypatch, capsys, *flags)["files"]
    assert [Path(f).name for f in files] == [f"000{i}_seed{5 + i}.png" for i in range(4)]


def test_jsonl_prompts_have_their_own_seeds(toy, monkeypatch, capsys):
    rows = [{"prompt": "a red circle", "seed": 9}, {"prompt": "a blue square"}]
    (toy / "p.jsonl").write_text("\n".join(map(json.dumps, rows)))
    out = run(monkeypatch, capsys, "--prompts", "p.jsonl", "--steps", 1, "--seed", 3)
    assert [Path(f).name for f in out["files"]] == ["0000_seed9.png", "0001_seed3.png"]


def test_prompts_make_a_folder_that_the_trainers_read(toy, monkeypatch, capsys):
    (toy / "p.txt").write_text("a red circle\na blue square\n")
    flags = ["--prompts", toy / "p.txt", "--out", toy / "pictures", "--steps", 1]
    files = [Path(file) for file in run(monkeypatch, capsys, *flags)["files"]]
    folder = data.open_folder(toy / "pictures", 32)
    assert folder.files == files and folder.captions == ["a red circle", "a blue square"]
    # Interrupted, it goes on: only what is missing or of another recipe is made.
    times = [file.stat().st_mtime_ns for file in files]
    files[1].with_suffix(".txt").unlink()
    assert run(monkeypatch, capsys, *flags)["files"] == [str(files[1])]
    assert files[0].stat().st_mtime_ns == times[0] and files[1].stat().st_mtime_ns > times[1]
    assert run(monkeypatch, capsys, *flags)["files"] == []
    again = run(monkeypatch, capsys, *flags[:-1], 2)["files"]
    assert again == [str(file) for file in files]


def test_latents_survive_a_decoder_that_fails(toy, monkeypatch, capsys):
    flags = ["--steps", 1, "--prompt", "a red circle"]
    good = run(monkeypatch, capsys, *flags, "--out", "good.png")
    with monkeypatch.context() as broken, pytest.raises(script.UserError, match="--from kept.lat"):
        broken.setattr(FluxVAE, "decode", lambda *_: torch.zeros(2).view(3))
        run(monkeypatch, capsys, *flags, "--out", "kept.png")
    run(monkeypatch, capsys, "--from", "kept.latents.safetensors", "--out", "late.png")
    assert torch.equal(pixels("late.png"), pixels(good["files"][0]))


def test_a_run_of_ours_brings_its_base_and_autoencoder(toy, monkeypatch, capsys):
    base = Flux.from_pretrained("flux-toy")
    config = base.config | {"in_channels": 32, "position_stride": 2}
    new = Flux(**config)
    trained = {n: t for n, t in new.state_dict().items() if n.startswith(("img_in", "final_layer"))}
    autoencoder = DCAE(
        encoder_block_out_channels=[8] * 6, decoder_block_out_channels=[8] * 6,
        encoder_layers_per_block=[1] * 6, decoder_layers_per_block=[1] * 6,
        encoder_qkv_multiscales=[[]] * 6, decoder_qkv_multiscales=[[]] * 6,
        encoder_out_shortcut=False, decoder_in_shortcut=False,
    )  # fmt: skip
    header = {"config": json.dumps(autoencoder.config)}
    weights.save("models/toy/dc-ae-f32c32.safetensors", autoencoder.state_dict(), header)
    header = {"config": json.dumps(config), "stage": "align", "alpha": "4", "base": "flux-toy"}
    header |= {"autoencoder": "dc-ae-f32c32-toy", "seed": "0", "step": "1"}
    weights.save("runs/align.safetensors", trained, header)
    flags = ["--steps", 2, "--size", "96x64", "--model", "runs/align.safetensors"]
    assert run(monkeypatch, capsys, *flags)["tokens"] == 6
    spec, transformer, found = sample.load_pipeline("runs/align.safetensors")
    assert torch.equal(transformer.img_in.weight, new.img_in.weight)
    assert torch.equal(transformer.txt_in.weight, base.txt_in.weight)
    assert (spec["schedule"], spec["solver"], found.stride) == ("flux", "euler", 32)
    weights.save("runs/align.safetensors", trained, header | {"shift": "1.5"})
    assert sample.describe("runs/align.safetensors")["shift"] == 1.5
    with pytest.raises(script.UserError, match="latents of 32 channels, and flux-vae-toy reads 16"):
        sample.load_pipeline("runs/align.safetensors", "flux-vae-toy")


def test_a_transformer_alone_is_known_by_its_shape(toy):
    assert sample.describe("models/toy/flux.safetensors")["repo"] == "text-toy"
    rows = {64: ("flux", 1024, 28), 32: ("dc-gen-1k", 1024, 20), 128: ("flux", 4096, 20)}
    for channels, expected in rows.items():
        tensors = {"x_embedder.weight": torch.zeros(8, channels), "guidance": torch.zeros(1)}
        weights.save("x.safetensors", tensors, {})
        spec = sample.describe("x.safetensors")
        assert (spec["schedule"], spec["size"], spec["steps"]) == expected


@pytest.mark.parametrize(
    ("width", "channels", "tokens", "size", "shift"),
    [
        (1152, 32, 32**2, 1024, 3.0),
        (2240, 32, 16**2, 512, 3.0),
        (2240, 32, 128**2, 4096, 6.0),
        (2240, 128, 16**2, 1024, 3.0),  # DC-Gen: f64
    ],
)
def test_a_sana_alone_is_known_by_its_shape(width, channels, tokens, size, shift, tmp_path):
    patch, positions = torch.zeros(width, channels, 1, 1), torch.zeros(1, tokens, 1)
    tensors = {"x_embedder.proj.weight": patch, "pos_embed": positions}
    torch.save({"state_dict": tensors}, tmp_path / "sana.pth")
    spec = sample.describe(str(tmp_path / "sana.pth"))
    assert (spec["size"], spec["shift"]) == (size, shift)
    assert spec["autoencoder"] == ("dc-ae-f64c128-1.5" if channels == 128 else spec["repo"])


def test_every_model_names_parts_that_exist():
    for name in sample.MODELS:
        spec = sample.describe(name)
        assert spec["transformer"] in flux.PRESETS | sana.PRESETS
        assert spec["autoencoder"] in dcae.PRESETS | vae.PRESETS or "/" in spec["autoencoder"]
        assert (spec["repo"] == "text-toy") or "/" in spec["repo"]
        sample.timesteps(spec["steps"], spec["schedule"], 1024, 32, spec.get("shift"))


@pytest.mark.parametrize(
    "flags, sentence",
    [
        (["--model", "flux-toys"], "is no file, no folder and no name; names: flux-toy, dc-gen"),
        (["--prompt", "a red fox"], "no word 'fox'"),
        (["--size", "12x99"], "below this model's minimum of 16x16"),
        (["--size", "big"], "wanted WxH in pixels"),
        (["--steps", "-1"], "--steps -1 --guidance 4.0: wanted 1 or more"),
        (["--n", "0"], "--n 0 --batch-size 1: wanted 1 or more"),
        (["--seed", "-1"], "--seed -1: wanted 0 .. 2"),
        (["--dtype", "int4"], "one of fp32, bf16, fp16"),
        (["--device", "tpu"], "--device"),
        (["--prompts", "nowhere.txt"], "wanted a .txt or .jsonl file that exists"),
        (["--prompts", "bad.jsonl"], "every line is an object like"),
        (["--from", "nowhere.png"], "not a readable picture"),
        (["--from", "plain.png"], "carries no recipe"),
        (["--from", "plain.png", "--seed", "9", "--fp8"], "with --seed, --fp8 it would be another"),
        (["--prompts", "huge.jsonl"], "every line is an object like"),
        (["--from", "typed.png"], "argument --steps: invalid int value: 'x'"),
        (["--model", "lost.safetensors"], "its base or autoencoder is not found"),
        (["--model", "half.safetensors"], "its base or autoencoder is not found ('autoencoder')"),
        (["--model", "other.safetensors"], "does not fit this Flux: tensors 1 of another shape"),
        (["--out", "x.jpg"], "wanted a folder, or a .png"),
        (["--out", "plain.png", "--n", "2"], "is one file, there are 2 pictures"),
        (["--out", "bad.jsonl"], "wanted a folder, or a .png"),
        (["--negative-prompt", "blue"], "--negative-prompt is for SANA"),
        (["--autoencoder", "nonsense"], "no file, no folder and no preset"),
        (["--steps", "many"], "invalid int value"),
    ],
)
def test_bad_input_is_one_sentence_and_exit_code_2(toy, monkeypatch, capsys, flags, sentence):
    (toy / "bad.jsonl").write_text('{"prompts": 3}')
    (toy / "huge.jsonl").write_text('{"prompt": "a", "seed": Infinity}')
    Image.new("RGB", (8, 8)).save("plain.png")
    notes = PngImagePlugin.PngInfo()
    notes.add_text("recipe", '{"model": "flux-toy", "steps": "x"}')
    Image.new("RGB", (8, 8)).save("typed.png", pnginfo=notes)
    header = {"stage": "align", "base": "gone.safetensors", "autoencoder": "flux-vae-toy"}
    weights.save("lost.safetensors", {"x": torch.zeros(1)}, header)
    weights.save("half.safetensors", {"x": torch.zeros(1)}, {"stage": "lora", "base": "flux-toy"})
    base = weights.open_checkpoint("models/toy/flux.safetensors")
    tensors = {name: base.get(name) for name in base.shapes} | {"img_in.bias": torch.zeros(3)}
    weights.save("other.safetensors", tensors, base.metadata)
    monkeypatch.setattr(sys, "argv", ["sample.py", "--device", "cpu", *flags])
    with pytest.raises(SystemExit) as stop:
        script.exit_cleanly(sample.main)
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert stop.value.code == 2 and len(error) == 1 and sentence in error[0]


class Doubling(torch.nn.Module):
    """An autoencoder whose decoder sees one pixel around: exact tiles must not show."""

    stride, config = 32, {"block_out_channels": [1]}

    def __init__(self):
        super().__init__()
        self.kernel = torch.nn.Parameter(torch.rand(3, 4, 1, 1))

    def decode(self, latents):
        assert max(latents.shape[2:]) <= 32, "a tile is 1024 pixels"
        mixed = torch.nn.functional.conv2d(latents, self.kernel)
        return torch.nn.functional.interpolate(mixed, scale_factor=32.0)


@pytest.mark.parametrize("grid", [(33, 20), (64, 100), (29, 28), (32, 61)])
def test_tiles_join_without_a_seam(grid):
    latents, autoencoder = torch.randn(1, 4, *grid), Doubling()
    with torch.no_grad():
        mixed = torch.nn.functional.conv2d(latents, autoencoder.kernel)
        tiled = dcae.tiled_decode(autoencoder, latents)
    torch.testing.assert_close(tiled, torch.nn.functional.interpolate(mixed, scale_factor=32.0))


def test_a_decode_that_would_not_fit_is_tiled(monkeypatch):
    monkeypatch.setattr(sample, "free_bytes", lambda device: 0)
    with torch.no_grad():
        assert sample.decode(Doubling(), torch.randn(2, 4, 40, 8)).shape == (2, 3, 1280, 256)


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
    flags += ["--guidance", 3, "--seed", 12, "--text-cache", tmp_path / "text.safetensors"]
    flags += ["--model", tmp_path, "--out", tmp_path / "x.png"]
    ours = run(monkeypatch, capsys, *flags)
    assert_same_picture(ours["files"][0], theirs)
    monkeypatch.setattr(text, "open_encoder", None)  # the second time it is not needed
    run(monkeypatch, capsys, *flags)
    assert_same_picture(ours["files"][0], theirs)


def test_an_unknown_scheduler_is_refused(tmp_path):
    diffusers = pytest.importorskip("diffusers", reason="the reference is not installed")
    pipeline = sana_pipeline(diffusers, diffusers.DPMSolverMultistepScheduler(solver_order=3))
    pipeline.save_pretrained(tmp_path)
    with pytest.raises(script.UserError, match="solver_order=3.* is not known here"):
        sample.describe(str(tmp_path))
