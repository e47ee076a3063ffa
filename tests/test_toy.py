"""The toy world: why its scores can be believed."""

import hashlib
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

import sample
from models import hub, registry, toy
from models.sana import Sana
from models.script import UserError
from models.text import SanaToyText, ToyText
from models.toy import __main__ as captions_main
from models.toy import pretrain

ROOT = Path(__file__).parent.parent


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
        for other in set(toy.RELATIONS) - {relation} if relation else ():
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
        words = {toy.HELD_OUT_RELATION, toy.HELD_OUT_SHAPE} & set(prompt.text.split())
        held_out = bool(words or set(prompt.wanted) & set(toy.HELD_OUT_PAIRS))
        if prompt.task != "counting":
            assert held_out == (prompt.task in toy.HELD_OUT_TASKS), prompt


def test_the_world_is_the_one_that_the_shipped_models_were_trained_on():
    """Other random numbers would be another world, and no figure of models/toy/README.md hold."""
    scenes = toy.draw_scenes(64, seed=1000, held_out=False)
    captions = toy.captions(scenes, 1000, held_out=False)
    assert digest("\n".join(captions).encode()) == "808c3ef672cfaf6f"
    assert all(len(caption.split()) < toy.LENGTH for caption in captions)
    assert digest(scenes.x.tobytes() + scenes.tint.tobytes()) == "c92364547d8285d5"
    prompts = "\n".join(prompt.text for prompt in toy.draw_prompts(12, seed=7))
    assert digest(prompts.encode()) == "aab75cbcf2ae3e88"


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


# ---- the second base


def test_the_second_base_reads_with_the_firsts_encoder():
    prompts = ["a red circle", ""]
    text, mask = SanaToyText.from_pretrained().encode(prompts)
    assert torch.equal(text, ToyText.from_pretrained().encode(prompts)[0])
    assert mask.sum(1).tolist() == [4, 1]  # "<bos>" and the words


def test_scoring_guides_sana_away_from_the_empty_prompt(monkeypatch):
    seen, prompts = [], toy.draw_prompts(1, seed=0)[:2]

    def forward(self, noisy, timestep, text, mask):
        seen.append(mask.sum(1).tolist())  # the number of words distinguishes the two passes
        return torch.zeros_like(noisy)

    monkeypatch.setattr(Sana, "forward", forward)
    spec, model, autoencoder = sample.load_pipeline("sana-toy")
    sample.score_toy(model, autoencoder, replace(spec, guidance=4.0, steps=2), prompts)
    words = [1 + len(prompt.text.split()) for prompt in prompts]
    assert seen == [[1, 1, *words]] * 2  # v(null) and v(text) in one batch, in each step


@pytest.mark.parametrize("what", ["sana", "flux"])
def test_training_a_base_writes_a_model_that_sample_py_takes(tmp_path, monkeypatch, what):
    flags = f"--seconds 1 --last-seconds 1 --batch 4 --scenes 24 --out {tmp_path}"
    monkeypatch.setattr("sys.argv", ["pretrain.py", what, *flags.split()])
    pretrain.main()
    file = tmp_path / f"{what}.safetensors"
    spec, model, _ = sample.load_pipeline(str(file))
    assert spec == replace(registry.describe(f"{what}-toy"), transformer=str(file))
    started_at_zero = model.head if what == "sana" else model.guidance_in.out_layer
    assert max(p.abs().max() for p in started_at_zero.parameters() if p.ndim > 1) > 0
    monkeypatch.setattr("sys.argv", ["pretrain.py", "text"])
    with pytest.raises(UserError, match="no recipe: wanted one of flux-vae"):
        pretrain.main()


def test_a_step_that_is_not_finite_moves_nothing(monkeypatch):
    layer, calls = nn.Linear(2, 1), iter(range(10_000))
    clock = iter(range(10_000))
    monkeypatch.setattr(pretrain.time, "time", lambda: next(clock))

    def loss():
        return layer(torch.ones(4, 2)).square().mean() / (0.0 if next(calls) == 15 else 1.0)

    pretrain.train(loss, [layer], 200, 1e-2)
    assert next(calls) > 100 and all(p.isfinite().all() for p in layer.parameters())


def test_weights_that_are_not_there_are_told_how_to_get():
    absent = {"path": "models/toy/absent.safetensors"}
    with pytest.raises(UserError, match="is missing: `git checkout models/toy/absent.safetensors`"):
        hub.locate("sana-toy", {"sana-toy": absent})


def test_captions_are_of_all_that_the_base_knows(monkeypatch, capsys):
    def printed(*flags: str) -> list[set[str]]:
        monkeypatch.setattr("sys.argv", ["toy", "--scenes", "400", *flags])
        captions_main.main()
        return [set(line.split()) for line in capsys.readouterr().out.splitlines()]

    lines, held_out = printed(), {toy.HELD_OUT_SHAPE, toy.PLURAL["heart"], toy.HELD_OUT_RELATION}
    assert len(lines) == 400 and held_out < set.union(*lines) <= set(toy.VOCABULARY)
    assert not held_out & set.union(*printed("--no-held-out"))
    assert all(words & set(toy.COLOR_NAMES) for words in printed("--uncolored", "0"))


@pytest.mark.parametrize("name", ["flux-toy", "dc-gen-toy"])
def test_a_shipped_model_scores_well_and_the_table_shows_it(name, capsys):
    spec, model, autoencoder = sample.load_pipeline(name)
    prompts = toy.draw_prompts(2, seed=7)
    rates, images = sample.score_toy(model, autoencoder, spec, prompts)
    assert len(images) == 18 and rates["seen"] > 0.7 and rates["held_out"] > 0.6
    toy.print_scores({name: rates})
    title, row = capsys.readouterr().out.split("\n")[1:3]
    assert title.split()[:2] == ["seen", "held_out"]
    assert row.split()[:2] == [name, f"{rates['seen']:.2f}"]
