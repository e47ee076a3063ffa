"""Alignment: the objective is the paper's algebra, and only embedder and head move."""

import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

import align
import dcae
import lora
import sample
from align import Batch, Config
from models import registry, weights
from models.data import Dataset
from models.flux import Flux
from models.sana import Sana
from models.script import UserError
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
        assert (pooled != 0.5).any() or (guidance == 1).all()  # v(null) is asked for at 1
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
    config = Config(steps=3, batch_size=4, out=str(tmp_path))
    align.solve_embedder(model, base, tiny_pictures(), config)
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {"img_in.weight", "img_in.bias"}
    align.train_head(model, tiny_pictures(), config, SPEC)
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {"img_in.weight", "img_in.bias", "final_layer.linear.weight",
                     "final_layer.linear.bias"}  # fmt: skip


def test_the_solved_embedder_is_where_eq_1_is_least():
    base, pictures = tiny_base(), tiny_pictures()
    model = align.transplant(base, 32, 2)
    align.choose_trained(model)
    align.solve_embedder(model, base, pictures, Config(micro_batch=7))
    solved = {name: p.detach().clone() for name, p in align.trained(model).items()}
    rows = torch.arange(len(pictures))
    loss, _ = align.alignment_loss(model, base, pictures.latents[rows], pictures.base_latents[rows])
    loss.backward()
    gradients = [p.grad.abs().max() for p in model.embedder.parameters()]
    assert max(gradients) < 1e-5 and loss > 1e-3
    align.solve_embedder(model, base, pictures, Config())  # in other passes
    torch.testing.assert_close(model.img_in.weight, solved["img_in.weight"], rtol=1e-4, atol=1e-5)


# ---- what a batch holds, and what a step does


@pytest.mark.parametrize("shift, ratio", [(2.0, 2.0), (None, (4 * 32 / 4096) ** 0.5)])
def test_times_are_spread_as_the_samplers_levels(shift, ratio):
    """Logit-normal, then shifted by the ratio of sampling: of 2 x 2 tokens of 32 channels."""
    spec = replace(SPEC, shift=shift, schedule="dc-gen-1k")
    batch = align.draw_batch(tiny_pictures(), Config(batch_size=20_000), spec, 0)
    level = sample.timesteps(2, "dc-gen-1k", 4, 32, shift)[1].item()
    assert batch.timestep.median().item() == pytest.approx(level, abs=0.01)
    for quantile, normal in ((0.1, -1.2816), (0.25, -0.6745), (0.9, 1.2816)):
        even = 1 / (1 + math.exp(-normal))
        expected = ratio * even / (1 + (ratio - 1) * even)
        assert batch.timestep.quantile(quantile).item() == pytest.approx(expected, abs=0.012)


def test_a_batch_holds_the_pictures_and_captions_of_its_rows():
    pictures = tiny_pictures()
    batch = align.draw_batch(pictures, Config(batch_size=4000), SPEC, 5)
    assert torch.equal(batch.latents, pictures.latents[batch.rows])
    assert batch.rows.max() < len(pictures)  # none that is held out
    text, null = pictures.cond[0][pictures.caption[batch.rows]], pictures.null_cond[0]
    dropped = (batch.cond[0] == null).flatten(1).all(1)
    kept = (batch.cond[0] == text).flatten(1).all(1)
    assert (kept ^ dropped).all() and dropped.float().mean().item() == pytest.approx(0.1, abs=0.02)
    pooled = torch.where(dropped[:, None], pictures.null_cond[1],
                         pictures.cond[1][pictures.caption[batch.rows]])  # fmt: skip
    assert torch.equal(batch.cond[1], pooled)
    quartiles = batch.guidance.quantile(torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0])).tolist()
    assert quartiles == pytest.approx([1, 2, 3, 4, 5], abs=0.12)


def test_held_out_pictures_keep_their_captions_and_do_not_depend_on_the_seed():
    pictures = tiny_pictures()
    rows = pictures.held_out[0].repeat(40)
    batch = align.draw_batch(pictures, Config(), SPEC, 0, held_out=rows)
    assert torch.equal(batch.cond[0], pictures.cond[0][pictures.caption[rows]])
    model = aligned_model()
    nn.init.normal_(model.head.linear.weight)
    losses = [align.held_out_loss(model, pictures, Config(seed=s), SPEC) for s in (0, 5)]
    assert losses[0] == losses[1]


class Faulty(torch.autograd.Function):
    """Its input; the gradient is NaN."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad * math.nan


FAULT = 2  # the step whose gradient is not finite, though its loss is


@pytest.mark.parametrize("stage", [align, lora])
def test_a_run_is_these_steps(tmp_path, monkeypatch, stage):
    """Clipping, rates of both groups, moving average and the skipped step, against a loop of
    PyTorch's own parts written out here."""
    steps, calls, flow_loss = 5, [], align.flow_loss

    def faulty(model, batch, recover):
        calls.append(batch)
        loss = flow_loss(model, batch, recover)
        return Faulty.apply(loss) if len(calls) == FAULT + 1 else loss

    monkeypatch.setattr(align, "held_out_loss", lambda *_: 0.0)
    monkeypatch.setattr(lora, "held_out_loss", lambda *_: 0.0)
    monkeypatch.setattr(stage, "flow_loss", faulty)
    monkeypatch.setattr(stage, "CLIP", 0.01)  # every gradient is larger
    how = dict(steps=steps, lr=1e-2, batch_size=6, ema=0.95, out=str(tmp_path))
    models = [aligned_model(), aligned_model()]
    if stage is align:
        config, first, scales = Config(**how), 0, {}
        align.train_head(models[0], tiny_pictures(), config, SPEC)
    else:
        config, first = lora.Config(**how, rank=2), lora.FIRST_BATCH
        for model in models:
            torch.manual_seed(3)
            lora.choose_trained(model, config)
        scales = {name: 3.0 for name in align.trained(models[0]) if "lora_" not in name}
        lora.train(models[0], tiny_pictures(), config, SPEC)

    trained = align.trained(models[1])
    groups = [{"params": [p], "scale": scales.get(name, 1.0)} for name, p in trained.items()]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.99), weight_decay=0.0)
    average, updates = {name: p.detach().clone() for name, p in trained.items()}, 0
    for step in range(steps):
        if step == FAULT:
            continue
        batch = align.draw_batch(tiny_pictures(), config, SPEC, first + step)
        flow_loss(models[1], batch, True).backward()
        torch.nn.utils.clip_grad_norm_(trained.values(), 0.01)
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 * group["scale"] * 0.5 * (1 + math.cos(math.pi * step / steps))
        optimizer.step()
        optimizer.zero_grad()
        updates += 1
        decay = min(0.95, (1 + updates) / (10 + updates))
        for name, p in trained.items():
            average[name] += (1 - decay) * (p.detach() - average[name])
    assert len(calls) == steps
    for name, p in align.trained(models[0]).items():
        torch.testing.assert_close(p.detach(), average[name], rtol=1e-5, atol=1e-7)


def test_the_learning_rate_is_a_cosine_that_rises_first_in_long_runs():
    assert align.cosine(0, 100, 1e-3) == 1e-3 and align.cosine(50, 100, 1e-3) == 5e-4
    assert align.cosine(0, 10_000, 1.0) == pytest.approx(1 / (align.WARMUP + 1))
    assert align.cosine(align.WARMUP, 10_000, 1.0) > 0.99 > align.cosine(4000, 10_000, 1.0)


def script(*args: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *args], cwd=ROOT, capture_output=True, text=True)


def test_the_two_commands_run_end_to_end(tmp_path):
    common = ["--per-task", "1", "--out", str(tmp_path)]
    done = script("align.py", *common, "--scenes", "32", "--steps", "2")
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout.splitlines()[-1])
    assert all(Path(file).exists() for file in figures["files"]) and figures["tokens"] == [64, 16]
    assert len(figures["reconstruction"]) == 2 and min(figures["reconstruction"].values()) > 30
    done = script("lora.py", *common, "--steps", "2", "--rank", "4")
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout.splitlines()[-1])
    assert set(figures["scores"]) == {"base", "aligned", "+ LoRA"}
    assert len([*(tmp_path / "drawn").glob("*.png")]) == 32
    run, picture = figures["files"][0], tmp_path / "x.png"
    done = script("sample.py", "--model", run, "--out", str(picture), "--steps", "2")
    assert done.returncode == 0 and picture.exists(), done.stderr

    # Trained again, it begins where it was, and is still its base and one file.
    again = [*common[:2], "--out", str(tmp_path / "again"), "--steps", "2", "--rank", "2"]
    done = script("lora.py", "--model", run, *again)
    assert done.returncode == 0, done.stderr
    more = json.loads(done.stdout.splitlines()[-1])
    assert more["curve"][0][1] == pytest.approx(figures["curve"][-1][1], rel=1e-4)
    assert set(more["scores"]) == {"before", "+ LoRA"}
    notes = weights.open_checkpoint(more["files"][0]).metadata
    assert notes["base"] == "flux-toy" and notes["alpha"] == "6.0"


def sana_toy(folder: Path) -> str:
    """A base of the second toy's kind, with random weights."""
    torch.manual_seed(0)
    width = dict(num_layers=2, num_attention_heads=1, num_cross_attention_heads=1)
    config = pretrain.CONFIGS["sana"] | width | dict(cross_attention_dim=32)
    file = folder / "sana.safetensors"
    weights.save(file, Sana(**config).state_dict(), {"config": json.dumps(config)})
    return str(file)


def test_the_two_commands_run_for_a_base_guided_by_two_passes(tmp_path):
    common = ["--model", sana_toy(tmp_path), "--per-task", "1", "--out", str(tmp_path / "run")]
    done = script("align.py", *common, "--scenes", "32", "--steps", "2")
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout.splitlines()[-1])
    assert figures["tokens"] == [16, 4] and set(figures["scores"]) == {"base", "aligned"}
    assert "-> dc-ae-f64c128-toy |" in done.stdout  # what follows on f32
    done = script("lora.py", *common, "--steps", "2", "--rank", "4")
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout.splitlines()[-1])
    assert set(figures["scores"]) == {"base", "aligned", "+ LoRA"}
    picture = str(tmp_path / "x.png")
    words = ["--prompt", "a red circle", "--negative-prompt", "a blue square", "--steps", "2"]
    done = script("sample.py", "--model", figures["files"][0], "--out", picture, *words)
    assert done.returncode == 0 and Path(picture).exists(), done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["guidance"] == 4.0


def test_an_autoencoder_without_a_scaling_factor_is_refused(tmp_path):
    config = dcae.PRESETS["dc-ae-f32c128-1.5"]["config"]
    assert config["scaling_factor"] is None  # none is published
    widths = {f"{side}_block_out_channels": [8] * 6 for side in ("encoder", "decoder")}
    model = dcae.DCAE(**config | widths)
    image = torch.randn(1, 3, 32, 32)
    assert torch.equal(model.encode(image), model.encoder(image))
    file = tmp_path / "ae.safetensors"
    weights.save(file, model.state_dict(), {"config": json.dumps(model.config)})
    with pytest.raises(UserError, match="has no published scaling factor"):
        align.plan(Config(autoencoder=str(file)))


@pytest.mark.parametrize(
    "args, words",
    [
        (["align.py", "--model", "sana-1.6b"], "--autoencoder is missing"),
        (["align.py", "--model", "dc-gen-flux-anyflow"], "is distilled to few steps"),
        (["align.py", "--model", "flux-schnell"], "is distilled to few steps"),
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
