"""Why believe models/text.py."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from models import weights
from models.text import ToyText

VOCABULARY = "<pad> <bos> a and red blue circle square left of".split()


def toy_text() -> ToyText:
    torch.manual_seed(0)
    return ToyText(VOCABULARY, width=32, layers=2, heads=4, length=8).eval()


# ---- the toy world's encoder


def test_toy_text_is_zero_where_padded_and_pooled_is_the_mean_over_words():
    text, pooled = toy_text().encode(["a red circle", ""])
    assert text.shape == (2, 8, 32) and pooled.shape == (2, 32)
    assert text[0, 4:].abs().max() == 0 and text[1, 1:].abs().max() == 0
    torch.testing.assert_close(pooled[0], text[0, :4].mean(0))


def test_toy_text_ignores_how_much_padding_follows():
    model = toy_text()
    tokens = model.tokenize(["a red circle"])
    whole, pooled = model(tokens)
    with torch.no_grad():
        model.words.weight[0] += 100.0  # what a padded place holds is never seen
    other, other_pooled = model(tokens)
    torch.testing.assert_close(whole, other)
    torch.testing.assert_close(pooled, other_pooled)


def test_toy_text_trains_as_it_infers():
    model = toy_text()
    tokens = model.tokenize(["a red circle and a blue square"])
    with torch.no_grad():
        inferred = model.eval()(tokens)
    trained = model.train()(tokens)
    assert all(p.grad_fn is not None for p in trained)
    torch.testing.assert_close(trained, inferred, atol=1e-5, rtol=1e-5)


def test_toy_words_are_checked():
    model = toy_text()
    assert model.tokenize(["A red, circle."]).tolist() == [[1, 2, 4, 6, 0, 0, 0, 0]]
    with pytest.raises(weights.UserError, match="no word 'fox'; it knows: a and red"):
        model.tokenize(["a red fox"])
    with pytest.raises(weights.UserError, match="at most 7 words; this one has 8"):
        model.tokenize(["a red circle and a blue square left"])


def test_toy_text_comes_back_from_its_file(tmp_path):
    import json

    model = toy_text()
    file = tmp_path / "text.safetensors"
    weights.save(file, model.state_dict(), {"config": json.dumps(model.config)})
    back = ToyText.from_pretrained(str(file))
    assert back.config == model.config
    torch.testing.assert_close(back.encode(["a red circle"]), model.encode(["a red circle"]))
