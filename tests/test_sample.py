"""Why believe sample.py: the reference's numbers, and what must hold by algebra."""

import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import sample
from models.flux import Flux
from models.sana import Sana

GOLDEN = ROOT / "tests" / "golden"


def golden(name: str) -> tuple[dict, dict]:
    for folder in (GOLDEN, ROOT.parent / "shared" / "reference" / "golden"):
        if (folder / f"{name}.safetensors").exists():
            with safe_open(folder / f"{name}.safetensors", "pt") as file:
                return {key: file.get_tensor(key) for key in file.keys()}, file.metadata()
    pytest.skip(f"{name} is not in tests/golden, nor is the reference folder here")


def assert_close(ours: torch.Tensor, theirs: torch.Tensor, relative: float = 5e-5) -> None:
    error = ((ours - theirs).abs().max() / theirs.abs().max()).item()
    print(f"relative error {error:.1e}")
    assert ours.shape == theirs.shape and error <= relative, error


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
    named = {key.removeprefix("weight/"): t for key, t in tensors.items() if "weight/" in key}
    save_file(named, folder / "w.safetensors")
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
