"""Why believe sample.py: the reference's schedules and trajectories, and what must hold by algebra."""

import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import sample

GOLDEN = ROOT / "tests" / "golden"


def golden(name: str) -> tuple[dict, dict]:
    with safe_open(GOLDEN / f"{name}.safetensors", "pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}, file.metadata()


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
    """The model of the golden trajectories: v = x A^T + t b; remembers the timesteps it was given."""

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
