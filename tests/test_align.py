"""Alignment: the objective is the paper's algebra, and only embedder and head move."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

import align
from align import Batch, Config
from models import registry, weights
from models.data import Dataset
from models.flux import Flux
from models.sana import Sana
from models.toy import pretrain

ROOT = Path(__file__).parent.parent
TINY = dict(
    num_layers=1, num_single_layers=1, num_attention_heads=2, attention_head_dim=16,
    axes_dims_rope=[4, 6, 6], joint_attention_dim=8, pooled_projection_dim=8,
)  # fmt: skip


def tiny_base() -> Flux:
    torch.manual_seed(0)
    return Flux(in_channels=64, **TINY).requires_grad_(False)


def tiny_pictures(n: int = 160) -> Dataset:
    g = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=g)

    return Dataset(
        draw(n, 16, 8, 8), draw(n, 32, 2, 2), (draw(5, 3, 8), draw(5, 8)),
        torch.arange(n) % 5, (draw(1, 3, 8), draw(1, 8)),
    )  # fmt: skip


class Guided(nn.Module):
    """A model distilled exactly as FLUX is said to be: v(c, g) = g v(c) - (g - 1) v(null)."""

    def conditional(self, noisy, timestep, pooled):
        return noisy * pooled.mean(1)[:, None, None, None] + timestep[:, None, None, None]

    def forward(self, noisy, timestep, text, pooled, guidance):
        g = guidance[:, None, None, None]
        null = self.conditional(noisy, timestep, torch.full_like(pooled, 0.5))
        return g * self.conditional(noisy, timestep, pooled) - (g - 1) * null


SPEC = replace(registry.describe("flux-toy"), shift=2.0)


def aligned_model() -> Flux:
    """A transplanted tiny base, its embedder and head to be trained: the same each time."""
    model = align.transplant(tiny_base(), 32, position_stride=2)
    align.choose_trained(model)
    torch.manual_seed(1)
    model.img_in.reset_parameters()
    return model


def batch_of(pooled_text) -> Batch:
    b = len(pooled_text)
    null = torch.full_like(pooled_text, 0.5)
    text = torch.zeros(b, 3, 8)
    return Batch(
        torch.randn(b, 4, 2, 2), torch.randn(b, 4, 2, 2), torch.rand(b),
        (text, pooled_text), (text, null), 1 + 4 * torch.rand(b), torch.arange(b),
    )  # fmt: skip


def test_the_recovered_velocity_undoes_the_guidance_at_any_scale():
    batch = batch_of(torch.randn(16, 8))
    model, noisy = Guided(), torch.randn(16, 4, 2, 2)
    conditional = model.conditional(noisy, batch.timestep, batch.cond[1])
    torch.testing.assert_close(align.recovered_velocity(model, noisy, batch), conditional)
    returned = model(noisy, batch.timestep, *batch.cond, batch.guidance)
    assert not torch.allclose(returned, conditional, atol=0.1)  # plain flow matching regresses this


def test_flow_loss_is_zero_for_the_true_velocity():
    batch = batch_of(torch.randn(4, 8))

    class Oracle(nn.Module):
        def forward(self, noisy, *_):
            return (batch.noise - batch.latents).repeat(len(noisy) // 4, 1, 1, 1)

    assert align.flow_loss(Oracle(), batch, recover=True) < 1e-10
    assert align.flow_loss(Oracle(), batch, recover=False) < 1e-10


def test_a_perfect_embedder_explains_everything():
    base = tiny_base()
    model = align.transplant(base, 32, position_stride=2)
    base_latents = torch.randn(6, 16, 8, 8)
    target = base.embed(base_latents).mT.unflatten(2, (4, 4))
    pooled = nn.functional.avg_pool2d(target, 2).flatten(2).mT  # (6, 4, D)
    latents = torch.randn(6, 32, 2, 2)
    model.embed = lambda _: pooled
    loss, seen = align.alignment_loss(model, base, latents, base_latents)
    assert loss < 1e-10 < seen.var() and torch.allclose(seen, pooled)


def test_what_stage_1_explains_does_not_depend_on_the_passes():
    base, pictures = tiny_base(), tiny_pictures()
    model = align.transplant(base, 32, position_stride=2)
    shares = [align.explained(model, base, pictures, Config(micro_batch=n)) for n in (0, 1, 3)]
    assert max(shares) - min(shares) < 1e-6 and shares[0] < 1


def test_a_transplant_shares_the_blocks_and_starts_silent():
    base = tiny_base()
    model = align.transplant(base, 32, position_stride=2)
    assert model.double_blocks is base.double_blocks
    assert model.final_layer.adaLN_modulation is not base.final_layer.adaLN_modulation
    batch = tiny_batch(model)
    assert model(batch.noise, batch.timestep, *batch.cond, batch.guidance).abs().max() == 0


def test_a_transplant_is_the_model_that_its_config_describes():
    """Loaded from its file, a model is built anew: positions and all must be those of runs."""
    model = align.transplant(tiny_base(), 32, position_stride=2)
    nn.init.normal_(model.final_layer.linear.weight)
    built = Flux(**model.config)
    built.load_state_dict(model.state_dict())
    batch = tiny_batch(model)
    args = (batch.noise, batch.timestep, *batch.cond, batch.guidance)
    torch.testing.assert_close(built(*args), model(*args), rtol=1e-5, atol=1e-5)


def tiny_batch(model, step: int = 0) -> Batch:
    return align.draw_batch(tiny_pictures(), Config(batch_size=4), SPEC, step)


def test_a_batch_is_a_function_of_seed_and_step():
    pictures = tiny_pictures()
    draws = [
        align.draw_batch(pictures, Config(seed=s), SPEC, n)
        for s, n in ((0, 7), (0, 7), (0, 8), (1, 7))
    ]
    assert torch.equal(draws[0].noise, draws[1].noise)
    assert not torch.equal(draws[0].noise, draws[2].noise)
    assert not torch.equal(draws[0].noise, draws[3].noise)
    assert (draws[0].timestep > 0).all() and (draws[0].timestep < 1).all()
    assert (draws[0].guidance >= 1).all() and (draws[0].guidance <= 5).all()


def test_training_moves_embedder_and_head_and_nothing_else(tmp_path):
    base = tiny_base()
    model = align.transplant(base, 32, 2)
    align.choose_trained(model)
    before = {name: p.clone() for name, p in model.named_parameters()}
    config = Config(embed_steps=3, steps=3, batch_size=4, embed_batch=8, out=str(tmp_path))
    align.train_embedder(model, base, tiny_pictures(), config)
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {"img_in.weight", "img_in.bias"}
    align.train_head(model, tiny_pictures(), config, SPEC)
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {name for name in before if name.startswith(("img_in", "final_layer"))}


def test_the_learning_rate_is_a_cosine_that_rises_first_in_long_runs(tmp_path):
    assert align.cosine(0, 100, 1e-3) == 1e-3 and align.cosine(50, 100, 1e-3) == 5e-4
    assert align.cosine(0, 10_000, 1.0) == pytest.approx(1 / (align.WARMUP + 1))
    assert align.cosine(align.WARMUP, 10_000, 1.0) > 0.99 > align.cosine(4000, 10_000, 1.0)
    config = Config(steps=4, lr=1e-2, batch_size=4, out=str(tmp_path))
    align.train_head(aligned_model(), tiny_pictures(), config, SPEC)
    rows = [json.loads(row) for row in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["lr"] for row in rows] == [align.cosine(step, 4, 1e-2) for step in range(4)]


def script(*args: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *args], cwd=ROOT, capture_output=True, text=True)


def test_the_two_commands_run_end_to_end(tmp_path):
    common = ["--scenes", "160", "--per-task", "1", "--out", str(tmp_path)]
    done = script("align.py", *common, "--embed-steps", "3", "--steps", "2")
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout.splitlines()[-1])
    assert all(Path(file).exists() for file in figures["files"]) and figures["tokens"] == [64, 16]
    assert len(figures["reconstruction"]) == 2 and min(figures["reconstruction"].values()) > 30
    done = script("lora.py", *common, "--steps", "2", "--rank", "4")
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout.splitlines()[-1])
    assert set(figures["scores"]) == {"base", "aligned", "+ LoRA"}
    picture = tmp_path / "x.png"
    done = script(
        "sample.py", "--model", figures["files"][0], "--out", str(picture), "--steps", "2"
    )
    assert done.returncode == 0 and picture.exists(), done.stderr


def sana_toy(folder: Path) -> str:
    """A base of the second toy's kind, with random weights."""
    torch.manual_seed(0)
    width = dict(num_layers=2, num_attention_heads=1, num_cross_attention_heads=1)
    config = pretrain.CONFIGS["sana"] | width | dict(cross_attention_dim=32)
    file = folder / "sana.safetensors"
    weights.save(file, Sana(**config).state_dict(), {"config": json.dumps(config)})
    return str(file)


def test_the_two_commands_run_for_a_base_guided_by_two_passes(tmp_path):
    common = ["--model", sana_toy(tmp_path), "--scenes", "160", "--per-task", "1"]
    common += ["--out", str(tmp_path / "run")]
    done = script("align.py", *common, "--embed-steps", "3", "--steps", "2")
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout.splitlines()[-1])
    assert figures["tokens"] == [16, 4] and set(figures["scores"]) == {"base", "aligned"}
    assert "dc-ae-f64c128-toy" in done.stdout.splitlines()[0]  # what follows on f32
    done = script("lora.py", *common, "--steps", "2", "--rank", "4")
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout.splitlines()[-1])
    assert set(figures["scores"]) == {"base", "aligned", "+ LoRA"}
    picture = str(tmp_path / "x.png")
    words = ["--prompt", "a red circle", "--negative-prompt", "a blue square", "--steps", "2"]
    done = script("sample.py", "--model", figures["files"][0], "--out", picture, *words)
    assert done.returncode == 0 and Path(picture).exists(), done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["guidance"] == 4.0


@pytest.mark.parametrize(
    "args, words",
    [
        (["align.py", "--model", "sana-1.6b"], "--autoencoder is missing"),
        (["align.py", "--model", "dc-gen-flux-anyflow"], "is distilled to few steps"),
        (["align.py", "--data", "no/such/folder"], "no/such/folder"),
        (["align.py", "--resolution", "100"], "no multiple of"),
        (["align.py", "--model", "flux-tuy"], "flux-tuy"),
        (["align.py", "--scenes", "10"], "at least"),
        (["lora.py", "--out", "no/run/here"], "align.py"),
        (["lora.py", "--aligned", "models/toy/flux.safetensors"], "no file of align.py"),
    ],
)
def test_a_users_mistake_is_one_sentence_and_exit_code_2(args, words):
    done = script(*args)
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode == 2 and len(errors) == 1 and words in errors[0], done.stderr
    assert "Traceback" not in done.stderr
