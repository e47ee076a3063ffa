"""Why believe models/text.py."""

import inspect
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from models import hub, script, text, weights
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


def test_toy_text_ignores_padding_and_trains_as_it_infers():
    model = toy_text()
    tokens = model.tokenize(["a red circle", "a red circle and a blue square"])
    trained = model.train()(tokens)
    assert all(p.grad_fn is not None for p in trained)
    with torch.no_grad():
        model.eval().words.weight[0] += 100.0  # what a padded place holds is never seen
        for one, other in zip(model(tokens), trained):
            torch.testing.assert_close(one, other.detach(), atol=1e-5, rtol=1e-5)


def test_toy_words_are_checked():
    model = toy_text()
    assert model.tokenize(["A red, circle."]).tolist() == [[1, 2, 4, 6, 0, 0, 0, 0]]
    with pytest.raises(script.UserError, match="no word 'fox'; it knows: a and red"):
        model.tokenize(["a red fox"])
    with pytest.raises(script.UserError, match="at most 7 words; .* has 8"):
        model.tokenize(["a red circle and a blue square left"])


def test_toy_text_comes_back_from_its_file(tmp_path):
    model = toy_text()
    file = tmp_path / "text.safetensors"
    weights.save(file, model.state_dict(), {"config": json.dumps(model.config)})
    back = ToyText.from_pretrained(str(file))
    assert back.config == model.config
    torch.testing.assert_close(back.encode(["a red circle"]), model.encode(["a red circle"]))


# ---- prompts and captions from a file


@pytest.mark.parametrize("coding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("name", ["p.txt", "p.jsonl"])
def test_lines_end_where_the_format_says_in_any_unicode_with_its_mark(tmp_path, coding, name):
    prompts = ["a fox\u2028in snow", "é\x85\x0c", "an owl"]
    rows = prompts if name == "p.txt" else [json.dumps({"prompt": p}) for p in prompts]
    (tmp_path / name).write_bytes("\r\n".join([*rows[:2], " ", rows[2] + "\n"]).encode(coding))
    found = list(text.read_rows(tmp_path / name, "prompt"))
    assert [row["prompt"] for _, row in found] == prompts
    assert [where.split()[-1] for where, _ in found] == ["1", "2", "4"]


@pytest.mark.parametrize(
    ("written", "words"),
    [
        ("a fox\na café".encode("cp1252"), "p.jsonl line 2: byte 11 is 0xe9, neither UTF-8 nor"),
        (b"\xef\xbb\xbf{}\n\xff", "line 2: byte 6 is 0xff"),  # counted with the mark
        ("a fox".encode("utf-16-le"), "line 1: byte 1 is 0x00"),
        ("a fox".encode("utf-32"), "line 1: byte 0 is 0xff"),
        ("a\nfox".encode("utf-16")[:-1], "line 2: byte 10 is 0x78"),
        (b'{"prompt": "a"}\n{"prompt": null}', 'p.jsonl line 2 is not like {"prompt": "..."}'),
        (b'["prompt"]', "line 1 is not like"),
        (b"[" * 100_000, "line 1 is not like"),
        (None, "cannot be read (No such file"),
    ],
)
def test_a_file_that_is_no_text_or_holds_no_prompts_is_refused_by_line(tmp_path, written, words):
    if written is not None:
        (tmp_path / "p.jsonl").write_bytes(written)
    with pytest.raises(script.UserError) as error:
        list(text.read_rows(tmp_path / "p.jsonl", "prompt"))
    assert words in str(error.value) and "\n" not in str(error.value)


# ---- the encoders of FLUX and SANA, tiny and random, saved as a diffusers pipeline saves them


def tiny_tokenizer(bos: str | None, length: int):
    """One token a word, unknown words share one; T5 has no first token, CLIP and Gemma do."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = "<pad> <bos> <eos> <unk>".split() + [chr(c) for c in range(97, 123)]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Split("", "isolated")]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A <eos>" if bos else "$A <eos>", special_tokens=[("<bos>", 1), ("<eos>", 2)]
    )
    special = dict(pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", bos_token=bos)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=length, **special)


def tiny_flux_text() -> dict:
    from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

    torch.manual_seed(1)
    clip = CLIPTextConfig(
        vocab_size=30, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=77,
        bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    t5 = T5Config(
        vocab_size=30, d_model=40, d_kv=8, d_ff=64, num_layers=2, num_heads=4,
        feed_forward_proj="gated-gelu", pad_token_id=0, eos_token_id=2,
    )  # fmt: skip
    return dict(
        tokenizer=tiny_tokenizer("<bos>", 77),
        text_encoder=CLIPTextModel(clip).eval(),
        tokenizer_2=tiny_tokenizer(None, 512),
        text_encoder_2=T5EncoderModel(t5).eval(),
    )


def tiny_sana_text() -> dict:
    from transformers import Gemma2Config, Gemma2Model

    torch.manual_seed(2)
    gemma = Gemma2Config(
        vocab_size=30, hidden_size=48, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, head_dim=24,
        bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    tokenizer = tiny_tokenizer("<bos>", 8192)
    tokenizer.padding_side = "left"  # as Gemma's own is: SANA pads on the right
    return dict(tokenizer=tokenizer, text_encoder=Gemma2Model(gemma).eval())


def saved(parts: dict, folder: Path, **how) -> str:
    for name, part in parts.items():
        part.save_pretrained(folder / name, **(how if name.startswith("text") else {}))
    return str(folder)


PROMPTS = ["a fox in the snow", "", "A Red  circle " * 30]


def test_flux_text_is_diffusers(tmp_path, capsys):
    diffusers = pytest.importorskip("diffusers", reason="the reference is not installed")
    parts = tiny_flux_text()
    pipeline = diffusers.FluxPipeline(scheduler=None, vae=None, transformer=None, **parts)
    for kind, length in (("flux", 512), ("schnell", 256)):
        with torch.no_grad():
            theirs = pipeline.encode_prompt(PROMPTS, max_sequence_length=length)
        ours, _ = text.encode(kind, saved(parts, tmp_path), PROMPTS)
        torch.testing.assert_close(ours[0], theirs[0], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(ours[1], theirs[1], atol=1e-5, rtol=1e-5)
    notes = capsys.readouterr().err.splitlines()
    assert (
        "prompts over the limit: tokens not read by {'CLIPTextModel': 225, 'T5EncoderModel': 0}"
        in notes
    )


def test_sana_text_is_diffusers(tmp_path, capsys):
    diffusers = pytest.importorskip("diffusers", reason="the reference is not installed")
    parts = tiny_sana_text()
    ours, ours_null = text.encode("sana", saved(parts, tmp_path), PROMPTS, ["", "Blurry"])
    pipeline = diffusers.SanaPipeline(scheduler=None, vae=None, transformer=None, **parts)
    chi = text.INSTRUCTION.split("\n")
    with torch.no_grad():
        theirs = pipeline.encode_prompt(PROMPTS, False, complex_human_instruction=chi)
        null = pipeline.encode_prompt(["a", "b"], True, negative_prompt=["", "Blurry"])
    for a, b in zip((*ours, *ours_null), (*theirs[:2], *null[2:])):
        torch.testing.assert_close(a.float(), b.float(), atol=1e-5, rtol=1e-5)
    assert ours[0].shape == (3, 300, 48) and ours[1].dtype == torch.bool
    assert "prompts over the limit: tokens not read by {'Gemma2Model': " in capsys.readouterr().err


def test_the_instruction_is_the_one_sana_was_trained_with():
    diffusers = pytest.importorskip("diffusers", reason="the reference is not installed")
    signature = inspect.signature(diffusers.SanaPipeline.__call__)
    lines = signature.parameters["complex_human_instruction"].default
    assert text.INSTRUCTION == "\n".join(lines)


def test_a_prompt_given_twice_is_encoded_once(tmp_path, monkeypatch):
    source = saved(tiny_sana_text(), tmp_path)
    once, once_null = text.encode("sana", source, ["a fox", ""], [""])
    calls, encode = [], text.SanaText.encode
    monkeypatch.setattr(text.SanaText, "encode", lambda *args: calls.append(args) or encode(*args))
    twice, null = text.encode("sana", source, ["a fox", "", "a fox"], ["", ""])
    assert len(calls) == 3  # "" with the instruction and "" without it are two prompts
    for one, two in zip((*once, *once_null), (*twice, *null)):
        assert torch.equal(two[: len(one)], one) and torch.equal(two[-1], one[0])


@pytest.mark.parametrize("how", [dict(variant="fp16"), dict(variant="bf16", max_shard_size="9KB")])
def test_encoders_saved_as_a_variant_are_the_same_encoders(tmp_path, how):
    for kind, parts in (("flux", tiny_flux_text()), ("sana", tiny_sana_text())):
        sources = saved(parts, tmp_path / kind), saved(parts, tmp_path / f"{kind} variant", **how)
        assert not list(Path(sources[1]).glob("*/model.safetensors"))
        plain, variant = (text.encode(kind, source, PROMPTS[:1])[0] for source in sources)
        assert all(torch.equal(one, other) for one, other in zip(plain, variant))


def test_a_variant_is_fetched_from_the_hub_where_there_is_nothing_else(tmp_path, monkeypatch):
    whole, bare = (
        Path(saved(tiny_flux_text(), tmp_path / "whole", variant="fp16")),
        tmp_path / "bare",
    )
    (bare / "text_encoder").mkdir(parents=True)
    found = {True: bare, False: whole}  # by whether variants are avoided
    monkeypatch.setattr(hub, "download", lambda name, wanted, avoid: found[bool(avoid)])
    assert text.encode("flux", "org/flux", ["a"])[0][0].shape == (1, 512, 40)


def test_padding_is_on_the_right_whatever_the_tokenizer_says(tmp_path):
    saved(tiny_sana_text(), tmp_path)
    masks = []
    for side in ("left", "right"):
        config = tmp_path / "tokenizer" / "tokenizer_config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | {"padding_side": side}))
        masks.append(text.encode("sana", str(tmp_path), [""], ["a fox"])[1][1])
    assert torch.equal(*masks) and masks[0][0, :2].all()


def test_an_encoder_that_is_not_whole_or_in_a_pickle_is_refused(tmp_path):
    source = saved(tiny_flux_text(), tmp_path)

    def refused(words: str, source: str = source) -> None:
        with pytest.raises(script.UserError, match=words):
            text.encode("flux", source, ["a"])

    file = tmp_path / "text_encoder_2" / "model.safetensors"
    tensors = load_file(file)
    save_file({k: v for k, v in tensors.items() if "block.1" not in k}, file, {"format": "pt"})
    refused("lacks tensors of T5EncoderModel: encoder.block.1")
    file.write_bytes(file.read_bytes()[:-100])
    refused("text_encoder_2 or its tokenizer does not load")
    torch.save(tensors, file.with_name("pytorch_model.bin"))
    file.unlink()
    refused("text_encoder_2 or its tokenizer does not load")
    refused("no file, folder, preset or public", str(tmp_path / "nowhere"))
