"""Why believe models/weights.py: what must load does, the rest is refused in a sentence."""

import errno
import json
import os
import re
import struct
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from models import hub, sana, script, weights
from models.hub import ROOT
from models.script import UserError
from models.weights import assign, build, open_checkpoint, open_model, save


class Tiny(nn.Module):
    """Two layers whose official names differ from ours: `first` is stored as three parts."""

    def __init__(self, n_in: int = 4, width: int = 6):
        super().__init__()
        self.config = {"n_in": n_in, "width": width}
        self.first = nn.Linear(n_in, width)
        self.norm = nn.BatchNorm1d(width)
        self.last = nn.Linear(width, 2)

    @classmethod
    def from_pretrained(
        cls, path, config=None, dtype=torch.float32, dropped=weights.NOTHING
    ) -> "Tiny":
        checkpoint, config, run = open_model(path, {}, "transformer", config)
        model = build(cls, config, checkpoint.path)
        assign(model, rows_of(model, checkpoint), checkpoint, "cpu", dtype, run, dropped)
        return model.eval()


def rows_of(model: nn.Module, checkpoint: weights.Checkpoint) -> dict:
    rows = {name: ((name,), None) for name in model.state_dict()}
    if "a.weight" in checkpoint.shapes:
        for leaf in ("weight", "bias"):
            rows[f"first.{leaf}"] = (
                tuple(f"{x}.{leaf}" for x in "abc"),
                lambda *parts: torch.cat(parts),
            )
    return rows


def official(model: Tiny) -> dict[str, Tensor]:
    tensors = {k: v for k, v in model.state_dict().items() if not k.startswith("first")}
    for leaf in ("weight", "bias"):
        thirds = getattr(model.first, leaf).detach().chunk(3)
        tensors |= {f"{x}.{leaf}": third.clone() for x, third in zip("abc", thirds, strict=True)}
    return tensors


def is_equal(one: nn.Module, other: nn.Module) -> bool:
    theirs = other.state_dict()
    return all(torch.equal(tensor, theirs[name]) for name, tensor in one.state_dict().items())


@pytest.fixture
def model() -> Tiny:
    torch.manual_seed(0)
    return Tiny()


@pytest.fixture
def base(model: Tiny, tmp_path: Path) -> Path:
    save(tmp_path / "base.safetensors", model.state_dict(), {"config": json.dumps(model.config)})
    return tmp_path / "base.safetensors"


@pytest.fixture
def official_file(model: Tiny, tmp_path: Path) -> Path:
    save_file(official(model), tmp_path / "official.safetensors")
    return tmp_path / "official.safetensors"


# ---- what must load


def test_names_are_joined_and_every_dtype_is_kept_in_its_place(model, official_file):
    assert is_equal(Tiny.from_pretrained(official_file, model.config), model)
    half = Tiny.from_pretrained(official_file, model.config, torch.bfloat16)
    assert half.first.weight.dtype == torch.bfloat16
    assert half.norm.num_batches_tracked.dtype == torch.int64
    assert half.first.weight.requires_grad and not half.training


def test_a_pickle_of_tensors_loads_with_and_without_a_state_dict_around_it(model, tmp_path):
    torch.save({"state_dict": official(model), "epoch": 7}, tmp_path / "wrapped.pth")
    torch.save(official(model), tmp_path / "bare.bin")
    for name in ("wrapped.pth", "bare.bin"):
        assert is_equal(Tiny.from_pretrained(tmp_path / name, model.config), model)


def test_a_folder_serves_the_part_asked_for_and_a_variant_only_if_it_is_alone(model, tmp_path):
    part = tmp_path / "transformer"
    part.mkdir()
    (part / "config.json").write_text(json.dumps({"_class_name": "Tiny", **model.config}))
    usual = part / "diffusion_pytorch_model.safetensors"
    variant = part / "diffusion_pytorch_model.fp16.safetensors"
    save_file(official(model), usual)
    save_file({name: torch.zeros_like(t) for name, t in official(model).items()}, variant)
    assert is_equal(Tiny.from_pretrained(tmp_path), model)
    assert is_equal(Tiny.from_pretrained(part), model)
    usual.replace(variant)
    assert is_equal(Tiny.from_pretrained(tmp_path), model)
    variant.rename(part / "model.fp16-00001-of-00001.safetensors")
    places = dict.fromkeys(official(model), "model.fp16-00001-of-00001.safetensors")
    index = part / "model.safetensors.index.fp16.json"
    index.write_text(json.dumps({"weight_map": places}))
    assert is_equal(Tiny.from_pretrained(tmp_path), model)


def test_a_file_its_index_its_shards_and_their_folder_are_one_model(model, tmp_path):
    config = {"_class_name": "Tiny", **model.config, "_dc_gen": {"base": "flux-krea"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    tensors, names = official(model), [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    index = tmp_path / "model.safetensors.index.json"
    places = {name: names[i % 2] for i, name in enumerate(tensors)}
    index.write_text(json.dumps({"weight_map": places}))
    for file in names:
        save_file({n: tensors[n] for n in places if places[n] == file}, tmp_path / file)
    for path in (tmp_path, index, *(tmp_path / name for name in names)):
        opened = open_checkpoint(path)
        assert (opened.path, opened.config, len(opened.shapes)) == (tmp_path, config, len(tensors))
        assert is_equal(Tiny.from_pretrained(path), model)
    save(tmp_path / "ours.safetensors", tensors, {"config": '{"n_in": 9}'})  # a header is nearer
    assert open_checkpoint(tmp_path / "ours.safetensors").config == {"n_in": 9}


@pytest.mark.parametrize("prefix", ["", "diffusion_model.", "model.diffusion_model."])
@pytest.mark.parametrize("suffix", ["safetensors", "pth"])
def test_of_a_single_file_for_other_programs_the_transformer_is_read(
    model, tmp_path, prefix, suffix
):
    path, write = tmp_path / f"all.{suffix}", save_file if suffix == "safetensors" else torch.save
    bundle = {prefix + name: tensor for name, tensor in official(model).items()}
    for name in ("vae.decoder.conv_in.bias", "text_encoders.t5xxl.shared", "first_stage_model.a"):
        bundle[name] = torch.zeros(1)
    write(bundle, path)
    assert is_equal(Tiny.from_pretrained(path, model.config), model)
    write(bundle | {"model_ema.decay": torch.zeros(1)}, path)
    with pytest.raises(UserError, match=re.escape("1 unexpected (model_ema.decay)")):
        Tiny.from_pretrained(path, model.config)


def test_names_may_be_dropped_only_on_purpose(model, tmp_path):
    path = tmp_path / "extra.safetensors"
    save_file(official(model) | {"pos_embed": torch.zeros(3)}, path)
    with pytest.raises(UserError, match=re.escape("1 unexpected (pos_embed)")):
        Tiny.from_pretrained(path, model.config)
    assert is_equal(Tiny.from_pretrained(path, model.config, dropped="^pos_"), model)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's own accounting")
def test_loading_maps_the_file_and_keeps_no_second_copy(tmp_path):
    program = f"""
import sys; sys.path.insert(0, {str(ROOT)!r})
import torch
from pathlib import Path
from torch import nn
from models.weights import assign, build, open_checkpoint, save

class Wide(nn.Sequential):
    def __init__(self): super().__init__(*(nn.Linear(1024, 1024, bias=False) for _ in range(24)))

def own_megabytes():
    line = next(x for x in open("/proc/self/status") if x.startswith("RssAnon"))
    return int(line.split()[1]) / 1024

path = Path({str(tmp_path)!r}) / "wide.safetensors"
save(path, Wide().state_dict(), {{}})
for dtype in (torch.float32, torch.bfloat16):
    checkpoint = open_checkpoint(path)
    model = build(Wide, {{}}, path)
    before = own_megabytes()
    assign(model, {{n: ((n,), None) for n in model.state_dict()}}, checkpoint, dtype=dtype)
    sum(p.detach().sum() for p in model.parameters())  # touch every page
    print(own_megabytes() - before)
    del model
"""
    lines = subprocess.check_output([sys.executable, "-c", program], text=True).split()
    mapped, converted = map(float, lines)
    print(f"96 MB file: {mapped:.1f} MB of own memory in fp32, {converted:.1f} MB in bf16")
    assert mapped < 10  # the file itself is the model
    assert converted < 48 + 15  # the bf16 model and one tensor in flight


# ---- runs: our own files on top of a base


def header(base: Path, config: str = '{"width": 6}') -> dict[str, str]:
    return {"stage": "lora", "base": str(base), "alpha": "8", "config": config}


def test_a_run_replaces_adds_and_leaves_the_rest_to_its_base(model, base, official_file, tmp_path):
    down, up = torch.randn(2, 4), torch.randn(6, 2)
    trained = {"last.weight": torch.ones(2, 6), "first.lora_A": down, "first.lora_B": up}
    for source in (base, official_file):  # of three parts: merged after they are joined
        save(tmp_path / "run.safetensors", trained, header(source))
        tuned = Tiny.from_pretrained(tmp_path / "run.safetensors")
        assert torch.equal(tuned.last.weight, trained["last.weight"])
        assert torch.equal(tuned.first.weight, model.first.weight + 8 / 2 * up @ down)
        assert torch.equal(tuned.first.bias, model.first.bias)
    # A run may give the model another shape.
    wide = {"first.weight": torch.ones(6, 9)}
    save(tmp_path / "run.safetensors", wide, header(base, config='{"n_in": 9}'))
    assert Tiny.from_pretrained(tmp_path / "run.safetensors").first.weight.shape == (6, 9)


@pytest.mark.parametrize(
    ("trained", "words"),
    [
        ({"firzt.weight": (6, 4)}, "1 unexpected (firzt.weight)"),
        ({"first": (1,), "first.lora_A": (2, 4), "first.lora_B": (6, 2)}, "1 unexpected (first)"),
        ({"first.lora_A": (2, 4)}, "1 missing (first.lora_B)"),
        ({"first.lora_B": (2, 4)}, "1 missing (first.lora_A)"),
        ({"x.lora_A": (2, 4), "x.lora_B": (6, 2)}, "2 unexpected"),
        ({"first.lora_A": (2, 5), "first.lora_B": (6, 2)}, "1 of another shape (first.weight"),
        ({"first.lora_A": (2, 4), "first.lora_B": (1, 2)}, "1 of another shape (first.weight"),
        ({"first.lora_A": (1, 24), "first.lora_B": (1, 1)}, "1 of another shape (first.weight"),
        ({"first.lora_A": (0, 4), "first.lora_B": (6, 0)}, "1 of another shape (first.weight"),
        ({"first.lora_A": (4,), "first.lora_B": (6,)}, "1 of another shape (first.weight"),
        ({"last.lora_A": (2, 6), "last.lora_B": (2, 2), "last.bias.lora_A": (2, 1)}, "1 missing"),
        ({"first.weight": (6, 5)}, "first.weight is (6, 5), the model has (6, 4)"),
    ],
)
def test_a_run_that_does_not_fit_is_refused(trained, words, base, tmp_path):
    tensors = {name: torch.ones(shape) for name, shape in trained.items()}
    save(tmp_path / "run.safetensors", tensors, header(base))
    with pytest.raises(UserError, match=re.escape(words)):
        Tiny.from_pretrained(tmp_path / "run.safetensors")


@pytest.mark.parametrize("alpha", [None, "", "eight", "nan", "inf"])
def test_a_lora_needs_a_number_alpha_in_its_header(alpha, base, tmp_path):
    notes = {k: v for k, v in (header(base) | {"alpha": alpha}).items() if v is not None}
    pair = {"first.lora_A": torch.ones(2, 4), "first.lora_B": torch.ones(6, 2)}
    save(tmp_path / "run.safetensors", pair, notes)
    with pytest.raises(UserError, match=r"run.safetensors on .*\((alpha\)|.* for Fraction)"):
        Tiny.from_pretrained(tmp_path / "run.safetensors")


def test_a_run_needs_a_base_that_is_there_and_a_full_model(base, tmp_path):
    one, two = tmp_path / "one.safetensors", tmp_path / "two.safetensors"
    save(one, {"last.bias": torch.ones(2)}, header(Path("gone.pth")))
    with pytest.raises(UserError, match=r"one.safetensors builds on gone.pth, which does not load"):
        Tiny.from_pretrained(one)
    save(one, {"last.bias": torch.ones(2)}, header(base))
    save(two, {"last.bias": torch.ones(2)}, header(one))
    with pytest.raises(UserError, match=r"two.safetensors builds on .*: it is a run itself"):
        Tiny.from_pretrained(two)


# ---- what must be refused: tensors


def test_the_first_five_of_each_complaint_are_named_with_both_shapes(model, tmp_path):
    tensors = official(model)
    for name in [n for n in tensors if n.startswith("norm")] + ["last.bias"]:
        del tensors[name]
    tensors |= {f"extra.{i}": torch.zeros(1) for i in range(7)} | {"last.weight": torch.zeros(3, 6)}
    save_file(tensors, tmp_path / "wrong.safetensors")
    with pytest.raises(UserError) as caught:
        Tiny.from_pretrained(tmp_path / "wrong.safetensors", model.config)
    text = str(caught.value)
    assert "6 missing (norm.weight; norm.bias; norm.running_mean; norm.running_var; nor" in text
    assert "7 unexpected (extra.0; extra.1; extra.2; extra.3; extra.4)" in text
    assert "last.weight is (3, 6), the model has (2, 6)" in text
    assert "\n" not in text and "wrong.safetensors does not fit this Tiny" in text
    # Parts that do not join are a complaint about shapes.
    save_file(official(model) | {"b.weight": torch.zeros(2, 5)}, tmp_path / "wrong.safetensors")
    with pytest.raises(UserError, match=r"first.weight is not .* \(Sizes of tensors"):
        Tiny.from_pretrained(tmp_path / "wrong.safetensors", model.config)


# ---- what must be refused: files


class Bomb:
    def __reduce__(self):
        return (os.mkdir, ("bomb",))


def test_code_in_a_pickle_never_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": {"w": torch.ones(2)}, "x": Bomb()}, "bomb.pth")
    with pytest.raises(
        UserError, match="bomb.pth is damaged or holds more than tensors, and was not run"
    ):
        open_checkpoint(Path("bomb.pth"))
    assert not Path("bomb").exists()


def test_no_file_of_the_project_unpickles_anything_else():
    for path in [*ROOT.glob("*.py"), *ROOT.glob("models/*.py")]:
        for call in re.findall(r"torch\.load\([^)]*\)", path.read_text()):
            assert "weights_only=True" in call, f"{path.name}: {call}"


def rewritten(raw: bytes, **lie) -> bytes:
    """A file whose header lies about one tensor."""
    length = struct.unpack("<Q", raw[:8])[0]
    head = json.loads(raw[8 : 8 + length])
    head["last.bias"].update(lie)
    new = json.dumps(head).encode()
    return struct.pack("<Q", len(new)) + new + raw[8 + length :]


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda raw: raw[:-10], r"is cut short, or no sound .*\): fetch it again"),
        (lambda raw: raw[:50], "is cut short"),
        (lambda raw: b"", "is cut short, or no sound safetensors file"),
        (lambda raw: b"<html>404</html>", "no sound safetensors file"),
        (lambda raw: b"version https://git-lfs.github.com/spec/v1\n", "git-lfs pointer"),
        (lambda raw: struct.pack("<Q", 10**15) + raw[8:], "no sound safetensors file"),
        (lambda raw: rewritten(raw, shape=[10**9, 10**9]), "no sound safetensors file"),
        (lambda raw: rewritten(raw, data_offsets=[0, 8]), "no sound safetensors file"),
        (lambda raw: rewritten(raw, data_offsets=[0, 10**12]), "cut short, or no sound"),
        (lambda raw: rewritten(raw, data_offsets=[[], {}]), "no sound safetensors file"),
        (lambda raw: struct.pack("<Q", 10**5) + b"[" * 10**5, "no sound safetensors file"),
    ],
)
def test_a_damaged_or_lying_safetensors_file_is_one_sentence(damage, words, base):
    base.write_bytes(damage(base.read_bytes()))
    with pytest.raises(UserError, match=words) as caught:
        open_checkpoint(base)
    assert "\n" not in str(caught.value) and base.name in str(caught.value)


@pytest.mark.filterwarnings("ignore")
def test_a_damaged_pickle_is_one_sentence(model, tmp_path):
    path = tmp_path / "model.pth"
    torch.save(model.state_dict(), path)
    raw = path.read_bytes()
    torch.manual_seed(0)
    for _ in range(60):  # cut short at random, and with a random byte of the pickle changed
        at, value = torch.randint(len(raw), ()).item(), torch.randint(256, ()).item()
        flipped = bytearray(raw)
        flipped[at % 800] = value
        for damaged in (raw[:at], bytes(flipped)):
            path.write_bytes(damaged)
            try:
                open_checkpoint(path)  # a changed name or value is no damage that can be seen
            except UserError as error:
                assert "\n" not in str(error) and "model.pth" in str(error)
    path.write_bytes(raw[:900])
    with pytest.raises(UserError, match="is damaged or holds more"):
        open_checkpoint(path)


@pytest.mark.parametrize(
    "thing", [[1, 2], {"state_dict": [torch.ones(1)]}, torch.ones(1), {"w": 3}, {1: 2}]
)
def test_a_pickle_of_something_else_is_refused(thing, tmp_path):
    torch.save(thing, tmp_path / "thing.pt")
    with pytest.raises(UserError, match="holds more than tensors, and was not run"):
        open_checkpoint(tmp_path / "thing.pt")


def test_a_folder_that_is_not_whole_and_a_file_of_another_kind_are_refused(model, tmp_path):
    def refused(words: str) -> None:
        with pytest.raises(UserError, match=words):
            open_checkpoint(tmp_path)

    config, index = tmp_path / "config.json", tmp_path / "model.safetensors.index.json"
    refused("holds no .safetensors weights")
    for text in ("{", "[" * 10**5):
        config.write_text(text)
        refused("config.json is no readable JSON")
    config.write_text(json.dumps(model.config))
    for header in ("[1]", "{", "3"):
        save_file(official(model), tmp_path / "one.safetensors", {"config": header})
        with pytest.raises(UserError, match="config in the header of .*one.safetensors is no read"):
            open_checkpoint(tmp_path / "one.safetensors")
    save_file(official(model), tmp_path / "one.safetensors")
    save_file(official(model), tmp_path / "two.safetensors")
    refused("holds one.safetensors, two.safetensors: wanted one model")
    places = dict.fromkeys(official(model), "one.safetensors")
    for weight_map, words in (
        ({}, "names no files"),
        ([], "names no files"),
        (places | {"more": "two.safetensors"}, "two.safetensors: another shard also holds"),
        (places | {"a.bias": "three.safetensors"}, "three.safetensors is missing"),
        (places | {"a.bias": [3]}, r"\[3\] is missing"),
    ):
        index.write_text(json.dumps({"weight_map": weight_map}))
        refused(words)
    index.write_text("{}")
    refused("names no files")
    (tmp_path / "weights.gguf").touch()
    for name, words in (
        ("weights.gguf", "weights are .safetensors"), ("absent", "no such file or folder"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=words):
            open_checkpoint(tmp_path / name)


def test_a_rehearsal_checks_everything_and_reads_nothing(model, base):
    checkpoint = open_checkpoint(base)
    checkpoint.sources.clear()  # whoever reads fails
    rehearsed = build(Tiny, model.config, base)
    assign(rehearsed, rows_of(rehearsed, checkpoint), checkpoint, device="meta")
    assert rehearsed.first.weight.is_meta
    with pytest.raises(UserError, match="does not fit this Tiny"):
        assign(
            build(Tiny, {"width": 7}, base), rows_of(model, checkpoint), checkpoint, device="meta"
        )


def test_a_config_value_without_effect_here_is_refused():
    with pytest.raises(UserError, match="does not describe a Sana: wanted .* no dropout"):
        build(sana.Sana, {"dropout": 0.1}, Path("x"))


# ---- finding

TABLE = {
    "toy": {"path": "models/toy/absent.safetensors"},
    "real": {"hub": "org/real-model", "file": "real.safetensors", "config": {"width": 6}},
    "folder": {"hub": "org/whole", "config": {}},
}


def test_a_local_path_wins_over_a_preset_and_the_weights_folder_over_the_hub(tmp_path, monkeypatch):
    for place in ("real.safetensors", "real-model/real.safetensors"):
        (tmp_path / place).parent.mkdir(exist_ok=True)
        (tmp_path / place).touch()
        assert hub.locate("real", TABLE, str(tmp_path)) == (tmp_path / place, {"width": 6})
        assert hub.locate("org/real-model", TABLE, str(tmp_path))[0] == tmp_path / place
        (tmp_path / place).unlink()
    with pytest.raises(UserError, match="has no whole: fetch org/whole and put it there"):
        hub.locate("folder", TABLE, str(tmp_path))
    monkeypatch.chdir(tmp_path)
    Path("real").mkdir()
    assert hub.locate("real", TABLE) == (Path("real"), None)


def test_an_unknown_name_lists_the_presets():
    for name in ("reel", "reel.safetensors", "folder/reel.safetensors", "./reel"):
        with pytest.raises(UserError, match="presets: toy, real, folder"):
            hub.locate(name, TABLE)
    with pytest.raises(UserError, match="absent.safetensors is missing: `git checkout"):
        hub.locate("toy", TABLE)


def hub_error(name: str):
    errors = pytest.importorskip("huggingface_hub.errors", reason="the hub's own exceptions")
    kind = getattr(errors, name)
    return kind.__new__(kind)  # they want an HTTP response that we do not have


@pytest.mark.parametrize(
    ("name", "words"),
    [
        (
            "GatedRepoError",
            r"org/real-model is gated: accept its licence .* HF_TOKEN",
        ),
        ("RepositoryNotFoundError", "org/real-model is no file, .* public repository"),
        ("HFValidationError", "public repository"),
        ("LocalEntryNotFoundError", "cannot be downloaded .*: pass a local path, or --weights"),
        ("OfflineModeIsEnabled", "cannot be downloaded"),
        ("HfHubHTTPError", "cannot be downloaded"),
    ],
)
def test_what_the_hub_refuses_is_one_sentence(name, words, monkeypatch):
    import huggingface_hub

    def refuse(*args, **kwargs):
        raise hub_error(name)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(UserError, match=words) as caught:
        hub.locate("real", TABLE)
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError):
        hub.locate("someone/else", TABLE, subfolder="vae")


@pytest.fixture
def fetched(tmp_path, monkeypatch) -> list:
    """A hub with one repository; returns the names fetched from it into tmp_path, by call."""
    huggingface_hub = pytest.importorskip("huggingface_hub", reason="its client is replaced")
    files = [
        "README.md", "model_index.json", "real.safetensors", "vae/config.json",
        "vae/diffusion_pytorch_model.safetensors", "vae/diffusion_pytorch_model.bf16.safetensors",
        "transformer/config.json", "transformer/diffusion_pytorch_model.fp16.safetensors",
    ]  # fmt: skip
    names = []

    def snapshot(repository, allow_patterns, ignore_patterns):
        some = list(huggingface_hub.utils.filter_repo_objects(
            files, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns
        ))  # fmt: skip
        for name in some:
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).touch()
        names.append(some)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    return names


def test_a_hub_pipeline_is_fetched_only_in_part(fetched, tmp_path):
    assert hub.locate("some/one", TABLE, subfolder="vae") == (tmp_path, None)
    assert fetched == [["vae/config.json", "vae/diffusion_pytorch_model.safetensors"]]
    hub.locate("some/one", TABLE, subfolder="transformer")  # a variant only when it is alone
    files = ["transformer/config.json", "transformer/diffusion_pytorch_model.fp16.safetensors"]
    assert fetched[1:] == [files[:1], files]
    hub.locate("some/one", TABLE, subfolder="unet")  # no pipeline: the top of the repository
    assert fetched[-1] == ["model_index.json", "real.safetensors"]
    assert hub.locate("real", TABLE) == (tmp_path / "real.safetensors", {"width": 6})
    assert fetched[-1] == ["real.safetensors"]  # a preset's one file
    with pytest.raises(UserError, match="other.safetensors: no such file"):
        open_model("new", {"new": {"hub": "org/name", "file": "other.safetensors"}})


# ---- saving


def test_saving_is_atomic_and_readable_by_others(model, tmp_path):
    path = tmp_path / "new" / "file.safetensors"
    save(path, {"w": model.first.weight, "t": model.first.weight.T}, {"stage": "align"})
    assert torch.equal(load_file(path)["t"], model.first.weight.T)
    assert path.stat().st_mode & 0o044 == 0o044
    assert [p.name for p in path.parent.iterdir()] == ["file.safetensors"]


def test_saving_over_the_file_that_is_loaded_keeps_both_right(model, base):
    loaded = Tiny.from_pretrained(base)
    save(base, {name: t + 1 for name, t in loaded.state_dict().items()}, {"config": "{}"})
    assert is_equal(loaded, model)
    assert torch.equal(load_file(base)["last.bias"], model.last.bias + 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn])
def test_nan_is_never_written(dtype, base):
    old, bad = base.read_bytes(), torch.tensor([1, float("nan")]).to(dtype)
    with pytest.raises(UserError, match="last.bias holds NaN or Inf"):
        save(base, {"first.bias": torch.ones(2), "last.bias": bad}, {})
    assert base.read_bytes() == old
    save(base, {"first.bias": torch.ones(2).to(dtype), "step": torch.tensor(3)}, {})
    assert load_file(base)["first.bias"].dtype == dtype


def test_a_full_disk_leaves_the_old_file_intact(base, monkeypatch):
    old = base.read_bytes()

    def half_written(tensors, path, metadata):
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(weights, "save_file", half_written)
    with pytest.raises(UserError, match="No space left on device"):
        save(base, {"w": torch.ones(3)}, {})
    usage = weights.shutil.disk_usage(base.parent)._replace(free=1000)
    monkeypatch.setattr(weights.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(UserError, match="0 MB are free"):
        save(base, {"w": torch.ones(3)}, {})
    assert base.read_bytes() == old and list(base.parent.iterdir()) == [base]


# ---- scripts


@dataclass(frozen=True)
class Flags:
    photo: str
    batch_size: int = 4
    lr: float = 1e-4
    data: str | None = None
    compile: bool = False  # 50% faster, later
    from_: str = ""  # a name that Python keeps for itself


def test_flags_come_from_the_dataclass():
    parse = script.parse_config
    assert parse(Flags, "doc", ["a.jpg"]) == Flags("a.jpg")
    arguments = ["a.jpg", "--batch-size", "8", "--lr", "3e-4", "--data", "x", "--compile"]
    assert parse(Flags, "doc", [*arguments, "--from", "b"]) == Flags(
        "a.jpg", 8, 3e-4, "x", True, "b"
    )
    for wrong in ([], ["a.jpg", "--batch-size", "many"], ["a.jpg", "--epochs", "1"]):
        with pytest.raises(UserError, match="--help lists the flags"):
            parse(Flags, "doc", wrong)


def test_help_is_the_docstring_and_the_comments_of_the_config(capsys):
    with pytest.raises(SystemExit):
        script.parse_config(Flags, "what the script does", ["--help"])
    text = " ".join(capsys.readouterr().out.split())
    for words in (
        "what the script does", "50% faster, later", "--from FROM_ a name that Python keeps for",
        "--batch-size BATCH_SIZE (default: 4)", "--data DATA --compile",
    ):  # fmt: skip
        assert words in text, text


def test_a_users_mistake_is_a_line_on_stderr_and_code_2(capsys):
    def mistaken():
        raise UserError("got this, wanted that, do so")

    def interrupted():
        raise KeyboardInterrupt

    def greedy():
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 12 GiB. GPU 0 ...")

    def full():
        raise OSError(errno.ENOSPC, "No space left on device", "runs/x/lora.png")

    for main, code in ((mistaken, 2), (interrupted, 130), (greedy, 2), (full, 2)):
        with pytest.raises(SystemExit) as stop:
            script.exit_cleanly(main)
        assert stop.value.code == code
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "error: got this, wanted that, do so"
    assert lines[1] == "interrupted" and lines.pop(1)
    assert lines[1].startswith("error: CUDA out of memory: a smaller picture or batch")
    assert lines[2].startswith("error: runs/x/lora.png cannot be written (No space left on device)")
    script.exit_cleanly(lambda: None)
    with pytest.raises(FileNotFoundError):  # a mistake of ours keeps its traceback
        script.exit_cleanly(lambda: open("/nowhere/at/all"))


def test_devices_and_dtypes_are_picked_or_refused():
    assert script.pick_device("cpu") == torch.device("cpu")
    assert script.pick_device().type in ("cuda", "mps", "cpu")
    for name in ("abacus", "cuda:99", "meta"):
        with pytest.raises(UserError, match="here: "):
            script.pick_device(name)
    for name in ("bf16", "bfloat16"):
        assert script.pick_dtype(name) == torch.bfloat16
    with pytest.raises(UserError, match="one of fp32, bf16, fp16"):
        script.pick_dtype("int4")


# ---- which model a name stands for


def test_a_digest_is_of_what_a_model_is_and_not_of_how_its_file_says_it(base, tmp_path):
    tensors, header = load_file(base), safe_open(base, "pt").metadata()
    first, other = open_checkpoint(base).digest, tmp_path / "other.safetensors"
    notes = {f"note {i}": str(i) for i in range(9)}
    save_file(tensors, other, header | notes)
    assert open_checkpoint(other).digest == first
    large = {"w": torch.zeros(2**18), "v": torch.zeros(1, 2**22)}  # the second is read in pieces
    for name, place in (("w", 5), ("w", -1), ("v", slice(2**20, 2**21))):
        save_file(large, other)
        before = open_checkpoint(other).digest
        changed = {k: v.clone() for k, v in large.items()}
        changed[name].view(-1)[place] = 1.0
        save_file(changed, other)
        assert open_checkpoint(other).digest != before
    torch.save(large, tmp_path / "x.pth")
    assert open_checkpoint(tmp_path / "x.pth").digest not in (first, before)


def test_equal_contents_are_equal_files(tmp_path):
    notes = {f"{i} é\n\u2028": f'{{"{i}": "\x7f"}}' for i in range(20)}
    files = set()
    for _ in range(4):
        save(tmp_path / "x.safetensors", {"w": torch.ones(3)}, notes)
        files.add((tmp_path / "x.safetensors").read_bytes())
    assert len(files) == 1 and safe_open(tmp_path / "x.safetensors", "pt").metadata() == notes


def test_a_run_on_another_base_than_its_own_is_refused(base, tmp_path):
    run, notes = tmp_path / "run.safetensors", header(base)
    notes |= {"base_digest": open_checkpoint(base).digest}
    save(run, {"last.bias": torch.ones(2)}, notes)
    Tiny.from_pretrained(run)
    tensors = {k: v + 1 if v.is_floating_point() else v for k, v in load_file(base).items()}
    save_file(tensors, base, safe_open(base, "pt").metadata())
    with pytest.raises(UserError, match="is not the file that was trained on"):
        Tiny.from_pretrained(run)


def test_integers_are_no_weights_and_are_seen_before_they_are_read(model, tmp_path):
    tensors = official(model) | {"last.weight": torch.zeros(2, 6, dtype=torch.int8)}
    save_file(tensors, tmp_path / "x.safetensors")
    with pytest.raises(UserError, match=r"last.weight is \(2, 6\) of integers"):
        Tiny.from_pretrained(tmp_path / "x.safetensors", model.config)
