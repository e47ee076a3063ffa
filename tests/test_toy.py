"""The toy world: why its scores can be believed."""

import numpy as np
import torch

from models import toy


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
    assert all(len(c.split()) < toy.CONFIGS["text"]["length"] for c in toy.captions(one, 1))
