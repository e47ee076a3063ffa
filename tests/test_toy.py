"""The toy world: why its scores can be believed."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import dcae
import sample
from models import toy, weights
from models.sana import Sana
from models.script import UserError
from models.text import SanaToyText, ToyText
from models.toy import pretrain


def test_the_scorer_reads_every_rendered_scene_back():
    scenes = toy.draw_scenes(200, seed=11)
    images, edge = toy.render(toy.on_device(scenes, "cpu"))
    assert images.shape == (200, 3, 128, 128) and images.abs().max() <= 1
    assert edge.shape == (200, 1, 128, 128) and 0 < edge.mean() < 0.2
    assert toy.scenes_kept(scenes, images) == 1.0


def test_a_picture_passes_its_own_caption_and_fails_others():
    scenes = toy.draw_scenes(60, seed=12)
    scenes.shape[scenes.shape == toy.BLOB] = 0
    images, _ = toy.render(toy.on_device(scenes, "cpu"))
    found = toy.read_scenes(images)
    for i in range(len(scenes)):
        pairs = tuple(
            (toy.COLOR_NAMES[scenes.color[i, k]], toy.SHAPES[scenes.shape[i, k]])
            for k in range(scenes.count[i])
        )
        relation = toy.relation_of(scenes, i, 0, 1) if scenes.kind[i] == 2 else ""
        assert toy.Prompt("", "x", pairs, relation).passes(found[i])
        assert not toy.Prompt("", "x", pairs[1:]).passes(found[i])
        assert not toy.Prompt("", "x", (*pairs, pairs[0])).passes(found[i])
        if relation:
            other = {"left": "right", "right": "left", "above": "below", "below": "above"}[relation]
            assert not toy.Prompt("", "x", pairs, other).passes(found[i])


def test_a_broken_or_recoloured_shape_fails():
    scenes = toy.draw_scenes(1, seed=3)
    scenes.kind[:], scenes.count[:] = 0, 1
    scenes.shape[0, 0], scenes.color[0, 0], scenes.radius[0, 0] = (1, 0, 24.0)  # a red square
    scenes.x[0, 0] = scenes.y[0, 0] = 64.0
    image, _ = toy.render(toy.on_device(scenes, "cpu"))
    wanted = toy.Prompt("a red square", "color", (("red", "square"),))
    assert wanted.passes(toy.read_scenes(image)[0])
    cut = image.clone()
    cut[:, :, 64:, 64:] = 0.0  # a quarter of it gone: no template fits any more
    assert not wanted.passes(toy.read_scenes(cut)[0])
    assert not wanted.passes(toy.read_scenes(image[:, [2, 1, 0]])[0])  # blue
    assert not wanted.passes(toy.read_scenes(torch.zeros_like(image))[0])


def test_post_training_data_holds_no_held_out_concept():
    scenes = toy.draw_scenes(3000, seed=5, held_out=False)
    texts = toy.captions(scenes, 5, held_out=False)
    assert not any(w in t.split() for t in texts for w in ("heart", "hearts", "below"))
    pairs = {
        (toy.COLOR_NAMES[scenes.color[i, k]], toy.SHAPES[scenes.shape[i, k]])
        for i in range(len(scenes))
        for k in range(scenes.count[i])
    }
    assert not pairs & set(toy.HELD_OUT_PAIRS)
    assert len(pairs) == 6 * 6 - 6  # five scored shapes and the blob, less the held-out pairs


def test_prompts_of_seen_tasks_name_no_held_out_concept_and_the_others_do():
    for prompt in toy.draw_prompts(30, seed=1):
        held_out = (
            toy.HELD_OUT_RELATION in prompt.text.split()
            or toy.HELD_OUT_SHAPE in prompt.text.split()
            or bool(set(prompt.wanted) & set(toy.HELD_OUT_PAIRS))
        )
        if prompt.task in toy.HELD_OUT_TASKS:
            assert held_out, prompt
        elif prompt.task != "counting":
            assert not held_out, prompt


def test_scenes_and_captions_are_functions_of_their_seed():
    one, two = (toy.draw_scenes(50, seed=9) for _ in range(2))
    assert np.array_equal(one.x, two.x) and toy.captions(one, 1) == toy.captions(two, 1)
    assert all(len(c.split()) < toy.LENGTH for c in toy.captions(one, 1))


# ---- the second base


def test_the_second_base_is_guided_by_two_passes_and_reads_with_the_firsts_encoder():
    spec = sample.describe("sana-toy")
    assert sample.is_sana(spec) and sample.text_kind(spec) == "sana-toy" and spec["text"] == "toy"
    assert not sample.is_sana(sample.MODELS["flux-toy"])
    assert sample.is_sana({"text": "sana"})  # headers written before there was a family
    first, second = ToyText.from_pretrained(), SanaToyText.from_pretrained()
    prompts = ["a red circle", ""]
    text, mask = second.encode(prompts)
    assert torch.equal(text, first.encode(prompts)[0])
    assert mask.sum(1).tolist() == [4, 1]  # "<bos>" and the words


def test_evaluation_guides_sana_away_from_the_empty_prompt():
    class Recorder(Sana):
        """Keeps what tells the two passes apart: the number of words."""

        def __init__(self):
            nn.Module.__init__(self)
            self.patch_size, self.weight = 1, nn.Parameter(torch.zeros(1))

        def forward(self, noisy, timestep, text, mask):
            seen.append(mask.sum(1).tolist())
            return torch.zeros_like(noisy)

    seen, autoencoder = [], dcae.DCAE.from_pretrained("dc-ae-f32c32-toy")
    encoder, prompts = SanaToyText.from_pretrained(), toy.draw_prompts(1, seed=0)[:2]
    toy.evaluate(Recorder(), autoencoder, encoder, prompts, guidance=4.0, steps=2)
    words = [1 + len(prompt.text.split()) for prompt in prompts]
    assert seen == [[1, 1, *words]] * 2  # v(null) and v(text) in one batch, in each step


def test_training_the_second_base_writes_a_model_that_sample_py_takes(
    tmp_path, monkeypatch, capsys
):
    flags = f"--seconds 1 --batch 4 --scenes 24 --per-task 1 --out {tmp_path}"
    monkeypatch.setattr("sys.argv", ["pretrain.py", "sana", *flags.split()])
    pretrain.main()
    rows = [json.loads(r) for r in capsys.readouterr().out.splitlines() if r.startswith("{")]
    assert [row["guidance"] for row in rows] == [1, 2, 3, 4, 5] and rows[0]["what"] == "sana"
    file = tmp_path / "sana.safetensors"
    spec, model, _ = sample.load_pipeline(str(file))
    assert spec == sample.describe("sana-toy") | {"transformer": str(file)}
    assert model.final_layer.linear.weight.abs().max() > 0  # it started at zero
    assert file.stat().st_size < 2.5e6  # of the 25 MB of models/toy/


def test_the_average_of_a_training_that_is_cut_short_is_kept(monkeypatch):
    clock = iter(range(0, 10_000, 30))
    monkeypatch.setattr(pretrain.time, "time", lambda: next(clock))
    layer, kept = nn.Linear(2, 1), []
    inputs = torch.randn(8, 2)
    pretrain.train(lambda: layer(inputs).square().mean(), [layer], 600, 1e-2, "", keep=kept.append)
    assert len(kept) > 3 and isinstance(kept[0][0], nn.Linear)


def test_a_step_that_is_not_finite_moves_nothing(monkeypatch):
    layer, calls = nn.Linear(2, 1), iter(range(10_000))
    clock = iter(range(10_000))
    monkeypatch.setattr(pretrain.time, "time", lambda: next(clock))

    def loss():
        return layer(torch.ones(4, 2)).square().mean() / (0.0 if next(calls) == 15 else 1.0)

    pretrain.train(loss, [layer], 20, 1e-2, "")
    assert next(calls) > 100 and all(p.isfinite().all() for p in layer.parameters())


def test_weights_that_are_not_there_are_told_how_to_get():
    absent = {"path": "models/toy/absent.safetensors"}
    with pytest.raises(UserError, match="is missing: `git checkout models/toy/absent.safetensors`"):
        weights.locate("sana-toy", {"sana-toy": absent})


def test_the_second_base_draws_a_red_circle(tmp_path, monkeypatch):
    argv = ["sample.py", "--model", "sana-toy", "--prompt", "a red circle"]
    monkeypatch.setattr("sys.argv", [*argv, "--n", "4", "--out", str(tmp_path)])
    sample.main()
    pictures = [np.asarray(sample.Image.open(f)) for f in sorted(Path(tmp_path).glob("*.png"))]
    images = torch.from_numpy(np.stack(pictures)).movedim(3, 1) / 127.5 - 1
    found = [[(f.color, f.shape) for f in objects] for objects in toy.read_scenes(images)]
    assert found.count([("red", "circle")]) >= 3, found


def test_captions_are_of_all_that_the_base_knows(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["toy", "captions", "--scenes", "400"])
    toy.main()
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 400
    words = set(" ".join(lines).split())
    assert toy.HELD_OUT_SHAPE in words and toy.HELD_OUT_RELATION in words
    assert words <= set(toy.VOCABULARY)
    monkeypatch.setattr(sys, "argv", ["toy", "captions", "--scenes", "400", "--no-held-out"])
    toy.main()
    words = set(capsys.readouterr().out.split())
    assert not {toy.HELD_OUT_SHAPE, toy.PLURAL["heart"], toy.HELD_OUT_RELATION} & words
    monkeypatch.setattr(sys, "argv", ["toy", "captions", "--scenes", "400", "--uncolored", "0"])
    toy.main()
    lines = capsys.readouterr().out.splitlines()
    assert all(set(line.split()) & set(toy.COLOR_NAMES) for line in lines)


def test_a_score_is_that_of_the_model_named(monkeypatch, capsys):
    rows = {}
    for name in ("flux-toy", "dc-gen-toy"):
        monkeypatch.setattr(sys, "argv", ["toy", "score", "--model", name, "--per-task", "2"])
        toy.main()
        rows[name] = json.loads(capsys.readouterr().out.splitlines()[-1])
        assert rows[name]["model"] == name and rows[name]["prompts"] == 18
        assert rows[name]["seen"] > 0.7 and rows[name]["held_out"] > 0.6
    with pytest.raises(UserError, match="knows more than shapes"):
        monkeypatch.setattr(toy, "load_pipeline", lambda *_, **__: ({"text": "flux"}, None, None))
        toy.score_model("flux-krea", 1)
