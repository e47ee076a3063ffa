"""Why believe models/data.py: every kind of picture comes out right, or is left out by name."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from models import data
from models.data import (
    MAX_RATIO,
    Encoder,
    Store,
    Stored,
    batches_of_a_size,
    buckets,
    cached,
    describe,
    encode_images,
    file_digest,
    nearest,
    open_folder,
    open_image,
    store_latents,
)
from models.script import UserError

RED, WHITE, BLACK = (1, -1, -1), (1, 1, 1), (-1, -1, -1)


def write(path: Path, size: tuple[int, int] = (48, 40), caption: str | None = "a red square"):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (255, 0, 0)).save(path)
    if caption is not None:
        path.with_suffix(".txt").write_text(caption)
    return path


def reasons(folder) -> dict[str, str]:
    return {path.name: reason for path, reason in folder.left_out}


# ---- one picture


@pytest.mark.parametrize(
    ("name", "picture", "color"),
    [
        ("rgb.png", Image.new("RGB", (4, 2), (255, 0, 0)), RED),
        ("rgb.webp", Image.new("RGB", (4, 2), (255, 0, 0)), RED),
        ("cmyk.jpg", Image.new("CMYK", (4, 2), (0, 255, 255, 0)), RED),
        ("palette.png", Image.new("RGB", (4, 2), (255, 0, 0)).convert("P"), RED),
        ("clear.png", Image.new("RGBA", (4, 2), (255, 0, 0, 0)), WHITE),
        ("half.png", Image.new("RGBA", (4, 2), (255, 0, 0, 51)), (1, 0.6, 0.6)),
        ("half.webp", Image.new("RGBA", (4, 2), (255, 0, 0, 51)), (1, 0.6, 0.6)),
        ("gray_alpha.png", Image.new("LA", (4, 2), (0, 51)), (0.6, 0.6, 0.6)),
        (
            "deep.png",
            Image.new("I;16", (4, 2), 257 * 51),
            (-0.6, -0.6, -0.6),
        ),  # convert("RGB") gives white
        ("white_16.png", Image.new("I;16", (4, 2), 65535), WHITE),
        ("gray.png", Image.new("L", (4, 2), 51), (-0.6, -0.6, -0.6)),
        ("bits.png", Image.new("1", (4, 2), 1), WHITE),
        ("no_bits.png", Image.new("1", (4, 2), 0), BLACK),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_every_colour_mode_gives_the_right_rgb(tmp_path, name, picture, color):
    options = {"lossless": True, "exact": True} if name.endswith("webp") else {}
    picture.save(tmp_path / name, **options)
    image = open_image(tmp_path / name)
    assert image.shape == (3, 2, 4) and image.dtype == torch.float32
    lossy = 2 / 255 if name.endswith("jpg") else 1e-6
    assert (image - torch.tensor(color)[:, None, None]).abs().max() <= lossy


def test_a_palette_entry_named_transparent_is_white(tmp_path):
    picture = Image.new("P", (2, 1))
    picture.putpalette([255, 0, 0, 0, 255, 0])
    picture.putpixel((1, 0), 1)
    picture.save(tmp_path / "sprite.png", transparency=1)
    left, right = open_image(tmp_path / "sprite.png").unbind(-1)
    assert left.flatten().tolist() == list(RED) and right.flatten().tolist() == list(WHITE)


@pytest.mark.parametrize("name", ["turned.jpg", "turned.png", "turned.webp"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation_tag_is_undone(tmp_path, name, orientation):
    upright = np.zeros((32, 48, 3), np.uint8)
    upright[:16, :16] = 255, 0, 0  # red in the top left corner
    stored = {  # what a camera held that way writes
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: upright.transpose(1, 0, 2)[::-1],
        7: upright.transpose(1, 0, 2)[::-1, ::-1],
        8: upright.transpose(1, 0, 2)[:, ::-1],
    }[orientation]
    tags = Image.Exif()
    tags[0x0112] = orientation
    Image.fromarray(np.ascontiguousarray(stored)).save(tmp_path / name, exif=tags, quality=95)
    expected = torch.from_numpy(upright).permute(2, 0, 1) / 127.5 - 1
    image = open_image(tmp_path / name)
    assert image.shape == expected.shape
    assert (image - expected).abs().mean() < 0.02


# ---- folders


def test_captions_beside_the_pictures_in_sub_folders_too(tmp_path):
    for name in ("b.png", "a.jpg", "more/c.JPEG", "more/deep/d.webp"):
        write(tmp_path / name, caption=f"picture {name}")
    write(tmp_path / ".thumbnails" / "a.jpg")
    (tmp_path / "notes.md").write_text("not a picture")
    folder = open_folder(tmp_path, 32)
    names = [path.relative_to(tmp_path).as_posix() for path in folder.files]
    assert names == ["a.jpg", "b.png", "more/c.JPEG", "more/deep/d.webp"]
    assert folder.captions == [f"picture {name}" for name in names]
    assert len(folder) == 4 and folder.left_out == []
    images = folder.images([2, 0])
    assert images.shape == (2, 3, 32, 32) and images.dtype == torch.float32
    assert (images[0, :, 5, 5] - torch.tensor(RED)).abs().max() < 0.02
    assert describe(folder) == f"{tmp_path}: 4 pictures at 32x32"


def test_captions_in_a_metadata_file(tmp_path):
    for name in ("a.png", "sub/b.png", "c.png", "d.png", "e.png", "f.png"):
        write(tmp_path / name, caption=None)
    rows = [
        {"file_name": "sub/b.png", "text": "b\u2028", "caption": "not this"},
        {"file_name": "./a.png", "caption": "a é"},
        {"file_name": "c.png", "prompt": "c"},
        {"file_name": "f.png", "text": ["f"], "prompt": ""},
        {"file_name": "d.png", "text": None},
        {"file_name": "../outside.png", "text": "never opened"},
        {"file_name": "/root.png", "text": "nor this"},
    ]
    lines = "\r\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\r\n\r\n"
    (tmp_path / "metadata.jsonl").write_bytes(lines.encode("utf-8-sig"))
    folder = open_folder(tmp_path, 32)
    assert dict(zip([path.name for path in folder.files], folder.captions)) == {
        "a.png": "a é",
        "c.png": "c",
        "f.png": "",
        "b.png": "b",
    }
    assert reasons(folder) == {
        "d.png": "has no caption",
        "e.png": "has no caption",
        "outside.png": "is in metadata.jsonl and not in the folder",
        "root.png": "is in metadata.jsonl and not in the folder",
    }
    assert "'../outside.png' is in metadata.jsonl" in describe(folder)


def pictures(folder: Path, *pixels: np.ndarray) -> Tensor:
    """Arrays (H, W) of 0..255 as read through a folder at 16 x 16."""
    for i, array in enumerate(pixels):
        Image.fromarray(array.astype(np.uint8)).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text("a picture")
    return open_folder(folder, 16).images(range(len(pixels)))


def test_the_middle_of_a_picture_of_the_right_size_keeps_every_pixel(tmp_path):
    wide = np.random.default_rng(0).integers(0, 256, (16, 24))
    expected = torch.from_numpy(wide[:, 4:20] / 127.5 - 1).float().expand(3, 16, 16)
    images = pictures(tmp_path, wide, wide.T, wide[:, 4:20])
    assert (images[0] - expected).abs().max() < 1e-6
    assert (images[1] - expected.mT).abs().max() < 1e-6
    assert torch.equal(images[2], images[0])


def test_a_size_is_height_then_width(tmp_path):
    rows = np.repeat([0, 255, 0], 16)[:, None].repeat(
        32, 1
    )  # dark, bright, dark from top to bottom
    Image.fromarray(rows.astype(np.uint8)).save(tmp_path / "rows.png")
    image = open_image(tmp_path / "rows.png", (8, 16))  # the middle third, reduced twice
    assert image.shape == (3, 8, 16)
    assert (image[:, 1:-1] == 1).all()


def test_reducing_averages_instead_of_picking_pixels(tmp_path):
    stripes = np.tile([0, 255], (64, 64))
    ramp = np.tile(np.linspace(0, 255, 64), (64, 1))
    striped, gray = pictures(tmp_path, stripes, ramp)
    assert striped[..., 2:-2].abs().max() < 0.01
    expected = torch.linspace(-1, 1, 64).unflatten(0, (16, 4)).mean(-1)
    assert (gray - expected).abs().max() < 0.02


@pytest.mark.parametrize(
    ("written", "caption"),
    [
        (b"a fox", "a fox"),
        (b"\xef\xbb\xbfa fox\r\nsecond line", "a fox"),
        (b"\n\n  a fox \n", "a fox"),
        (b"a caf\xe9", "a caf\ufffd"),
        ("a fox é\n".encode("utf-16"), "a fox é"),
        (b"", ""),
        (b"\r\n", ""),
    ],
)
def test_a_caption_is_the_first_line_in_whatever_encoding(tmp_path, written, caption):
    write(tmp_path / "a.png", caption=None)
    (tmp_path / "a.txt").write_bytes(written)
    folder = open_folder(tmp_path, 32)
    assert folder.captions == [caption]
    assert ("1 captions are empty" in describe(folder)) == (caption == "")
    assert ("not UTF-8" in describe(folder)) == ("\ufffd" in caption)


def test_what_is_left_out_is_named_with_its_reason(tmp_path, monkeypatch):
    for i in range(12):
        write(tmp_path / f"fine{i}.png")
    sound = write(tmp_path / "cut.jpg", (200, 200)).read_bytes()
    (tmp_path / "cut.jpg").write_bytes(sound[: len(sound) // 2])
    write(tmp_path / "empty.jpg").write_bytes(b"")
    write(tmp_path / "text.jpg").write_text("not a picture")
    write(tmp_path / "page.gif")
    write(tmp_path / "gif_named.png").write_bytes((tmp_path / "page.gif").read_bytes())
    write(tmp_path / "small.png", (31, 200))
    write(tmp_path / "long.png", (200, 40))
    write(tmp_path / "mute.png", caption=None)
    write(tmp_path / "bomb.png", (300, 300))
    frames = [Image.new("RGB", (48, 48), color) for color in ("red", "blue")]
    for name in ("moving.webp", "moving_too.png"):
        write(tmp_path / name)
        frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:])
    (tmp_path / "nowhere.png").symlink_to(tmp_path / "gone.png")
    (tmp_path / "nowhere.txt").write_text("a link")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 200 * 200)  # raises above twice that
    folder = open_folder(tmp_path, 32)
    assert [path.stem for path in folder.files] == sorted(f"fine{i}" for i in range(12))
    assert folder.left_out == sorted(folder.left_out)
    expected = {
        "cut.jpg": "cannot be read (image file is truncated",
        "empty.jpg": "is not an image",
        "text.jpg": "is not an image",
        "page.gif": "is of another format",
        "gif_named.png": "is not an image, or not JPEG, PNG or WebP",
        "small.png": "is 31x200: lower --resolution 32",
        "long.png": "is 200x40: crop it to 1:4",
        "mute.png": "has no caption",
        "bomb.png": "cannot be read (Image size (90000 pixels) exceeds limit",
        "moving.webp": "is animated",
        "moving_too.png": "is animated",
        "nowhere.png": "no such image",
    }
    found = reasons(folder)
    assert found.keys() == expected.keys()
    for name, reason in expected.items():
        assert found[name].startswith(reason), name
    assert "left out 12: 'bomb.png' cannot be read" in describe(folder)
    assert describe(folder).endswith("; and 7 more")


@pytest.mark.parametrize("kept", [0.05, 0.3, 0.6, 0.9, 0.99])
@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.webp", "progressive.jpg"])
def test_a_cut_file_never_passes_as_a_picture(tmp_path, name, kept):
    rng = np.random.default_rng(0)
    noise = Image.fromarray(rng.integers(0, 255, (64, 64, 3), np.uint8))
    options = {"progressive": True} if name.startswith("prog") else {}
    noise.save(tmp_path / name, **options)
    whole = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(whole[: int(len(whole) * kept)])
    with pytest.raises(UserError, match=r"cannot be read|is not an image"):
        open_image(tmp_path / name)


def test_a_phones_picture_with_a_depth_map_behind_it_is_no_animation(tmp_path):
    picture, depth = Image.new("RGB", (48, 40), (255, 0, 0)), Image.new("RGB", (24, 20))
    picture.save(tmp_path / "phone.jpg", "MPO", save_all=True, append_images=[depth])
    assert Image.open(tmp_path / "phone.jpg").format == "MPO"
    assert open_image(tmp_path / "phone.jpg").shape == (3, 40, 48)


def nothing(folder: Path):
    pass


def only_text(folder: Path):
    (folder / "a.txt").write_text("a fox")


def only_others(folder: Path):
    write(folder / "a.gif")


def no_captions(folder: Path):
    write(folder / "a.png", caption=None)


def two_of_a_stem(folder: Path):
    write(folder / "a.png")
    write(folder / "a.jpg")


def mostly_small(folder: Path):
    for i in range(7):
        write(folder / f"small{i}.png", (20, 20))
    for i in range(6):
        write(folder / f"fine{i}.png")


def table(*lines: str):
    def make(folder: Path):
        write(folder / "a.png")
        (folder / "metadata.jsonl").write_text("\n".join(lines))

    return make


ROW = '{"file_name": "a.png", "text": "a"}'


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (Path.rmdir, "is no folder: name one"),
        (nothing, "holds no .jpg, .jpeg, .png, .webp"),
        (only_text, "holds no .jpg"),
        (only_others, r"\(1 of other formats\): convert"),
        (no_captions, "holds pictures .1. and no captions: put a.txt beside a.png"),
        (two_of_a_stem, "a.jpg and .*a.png share a.txt"),
        (mostly_small, "6 usable .* 7 that are not .*small0.png.*small4.png.*20x20.*and 2 more"),
        (table(ROW, "", ROW), "line 3 names a.png a second time"),
        (table(ROW, "{"), "line 2 is not like .*file_name"),
        (table('["a.png", "a"]'), "line 1 is not like"),
        (table('{"file": "a.png"}'), "line 1 is not like .*KeyError"),
        (table('{"file_name": 7, "text": "a"}'), "line 1 is not like"),
        (table("[" * 100000), "line 1 is not like"),
        (table('{"file_name": "a.png", "text": 7}'), "and no captions"),
    ],
)
def test_a_folder_that_cannot_be_trained_on_is_refused_in_a_sentence(tmp_path, make, sentence):
    make(tmp_path)
    with pytest.raises(UserError, match=sentence) as error:
        open_folder(tmp_path, 32)
    assert "\n" not in str(error.value)


def test_file_names_may_hold_anything(tmp_path):
    odd = os.fsdecode(b"line\nbreak \xff")
    write(tmp_path / f"{odd}.png", (20, 20))
    write(tmp_path / ("x" * 200 + " 100%.png"))
    report = describe(open_folder(tmp_path, 32))
    assert report.count("\n") == 1
    report.encode()


def test_a_caption_may_hold_half_a_character(tmp_path):
    table('{"file_name": "a.png", "text": "a \\ud83d fox"}')(tmp_path)
    folder = open_folder(tmp_path, 32)
    assert folder.captions == ["a ? fox"] and len(folder.key) == 64


def test_the_order_and_the_key_depend_on_content_alone(tmp_path):
    for i in (2, 0, 1):
        write(tmp_path / "one" / f"{i}.png", (48, 48 + i), caption=str(i))
    for i in (1, 2, 0):
        write(tmp_path / "two" / f"{i}.png", (48, 48 + i), caption=str(i))
    one, two = open_folder(tmp_path / "one", 32), open_folder(tmp_path / "two", 32)
    assert one.key == two.key and one.captions == two.captions == ["0", "1", "2"]
    assert open_folder(tmp_path / "two", 40).key != one.key
    write(tmp_path / "two" / "bad.png", (8, 8))  # left out: nothing to train on has changed
    assert open_folder(tmp_path / "two", 32).key == one.key
    (tmp_path / "two" / "1.txt").write_text("one")
    recaptioned = open_folder(tmp_path / "two", 32)
    assert recaptioned.key != one.key
    write(tmp_path / "two" / "1.png", (48, 50), caption="one")
    assert open_folder(tmp_path / "two", 32).key != recaptioned.key


# ---- latents


class Averages(nn.Module):
    """Stands for an autoencoder: means of 4 x 4 pixels, and 1 / 0 for a black picture."""

    def encode(self, images: Tensor) -> Tensor:
        is_black = (images < -0.99).flatten(1).all(1)[:, None, None, None]
        return F.avg_pool2d(images, 4) / (1 - is_black.to(images.dtype))


class Ramp:
    """A source without files: image i is i everywhere."""

    def __len__(self) -> int:
        return 7

    def images(self, rows) -> Tensor:
        return torch.tensor([*rows]).float().add(1)[:, None, None, None].expand(-1, 3, 8, 8)


@pytest.mark.parametrize("batch_size", [1, 3, 7, 100])
def test_latents_come_in_order_whatever_the_batch(batch_size):
    latents = encode_images(Ramp(), Averages(), "cpu", torch.float32, batch_size, "encode")
    assert latents.shape == (7, 3, 2, 2) and not latents.requires_grad
    assert torch.equal(latents[:, 0, 0, 0], torch.arange(1.0, 8))


def test_latents_keep_the_autoencoders_dtype():
    latents = encode_images(Ramp(), Averages(), "cpu", torch.bfloat16, 4, "encode")
    assert latents.dtype == torch.bfloat16


def test_a_latent_that_overflows_names_its_picture(tmp_path):
    for i in range(5):
        write(tmp_path / f"{i}.png")
    Image.new("1", (40, 40), 0).save(tmp_path / "3.png")
    folder = open_folder(tmp_path, 32)
    with pytest.raises(UserError, match=r"/3\.png hold NaN or Inf in torch.float32"):
        encode_images(folder, Averages(), "cpu", torch.float32, 2, "encode")


def test_a_cache_is_used_only_under_its_key(tmp_path):
    path, calls = tmp_path / "run" / "latents.safetensors", []

    def compute(value: float):
        calls.append(value)
        return {"latents": torch.full((2, 3), value, dtype=torch.bfloat16)}

    for key, value in (("k1", 1.0), ("k1", 2.0), ("k2", 3.0), ("k2", 4.0)):
        latents = cached(path, key, lambda value=value: compute(value))["latents"]
        assert latents.dtype == torch.bfloat16 and latents[0, 0] == (1 if key == "k1" else 3)
    assert calls == [1, 3]
    path.write_bytes(path.read_bytes()[:-3])  # damaged
    assert cached(path, "k2", lambda: compute(5.0))["latents"][0, 0] == 5
    assert cached(path, "k2", lambda: compute(6.0))["latents"][0, 0] == 5
    assert cached(None, "k2", lambda: compute(7.0))["latents"][0, 0] == 7
    with pytest.raises(UserError, match="NaN"):
        cached(path, "k3", lambda: compute(float("nan")))
    assert cached(path, "k2", lambda: compute(8.0))["latents"][0, 0] == 5


# ---- shapes


@pytest.mark.parametrize("resolution, factor", [(128, 32), (512, 32), (1024, 32), (4096, 64)])
def test_buckets_are_whole_tokens_and_no_larger_than_the_square(resolution, factor):
    shapes = buckets(resolution, factor)
    assert (resolution, resolution) in shapes and len(set(shapes)) == len(shapes)
    for height, width in shapes:
        assert height % factor == width % factor == 0 and (width, height) in shapes
        assert 0.9 * resolution**2 < height * width <= resolution**2
        assert max(height, width) <= MAX_RATIO * min(height, width)


def test_a_picture_goes_to_the_shape_that_crops_it_least():
    shapes = buckets(1024, 32)
    for height, width in ((1000, 1500), (900, 1600), (3000, 2000), (1024, 1024), (4000, 1001)):
        kept = {(h, w): min(h / height, w / width) / max(h / height, w / width) for h, w in shapes}
        assert kept[nearest(shapes, height, width)] == max(kept.values()) > 0.9


def test_pictures_of_each_shape_are_cropped_to_it_and_counted(tmp_path):
    write(tmp_path / "wide.png", (300, 200))
    write(tmp_path / "tall.png", (200, 300))
    write(tmp_path / "also_wide.png", (320, 190))
    write(tmp_path / "square.png", (140, 130))
    write(tmp_path / "wide_and_low.png", (150, 90))  # its shape is 160x96
    folder = open_folder(tmp_path, 128, 32)
    assert reasons(folder) == {
        "wide_and_low.png": "is 150x90: lower --resolution below the 160x96 of its shape, "
        "or enlarge it yourself"
    }
    sizes = {path.name: size for path, size in zip(folder.files, folder.sizes)}
    assert sizes == {
        "also_wide.png": (96, 160), "square.png": (128, 128),
        "tall.png": (160, 96), "wide.png": (96, 160),
    }  # fmt: skip
    assert folder.images([0, 3]).shape == (2, 3, 96, 160)
    assert "shapes 160x96 2, 128x128 1, 96x160 1" in describe(folder)
    batches = batches_of_a_size(folder, range(4), pixels=2 * 96 * 160)
    assert batches == [[0, 3], [1], [2]]  # one size a batch


# ---- what is kept


def test_a_second_scan_decodes_what_has_changed_alone(tmp_path, monkeypatch):
    for i in range(4):
        write(tmp_path / "in" / f"{i}.png", (40 + i, 40))
    notes, decoded = tmp_path / "cache" / "scan.json", []

    def scan(resolution: int = 32, break_at: str = "") -> tuple:
        def note(path):
            if path.name == break_at:
                raise KeyboardInterrupt
            decoded.append(path.name)
            return read_image(path)

        decoded.clear()
        monkeypatch.setattr(data, "read_image", note)
        return open_folder(tmp_path / "in", resolution, 0, notes), sorted(decoded)

    read_image = data.read_image
    first, read = scan()
    assert read == ["0.png", "1.png", "2.png", "3.png"] and scan() == (first, [])
    assert scan(36)[1] == []  # another size is another crop of the same pictures
    date = os.stat(tmp_path / "in" / "2.png").st_mtime_ns
    (tmp_path / "in" / "2.png").write_bytes((tmp_path / "in" / "3.png").read_bytes())
    os.utime(tmp_path / "in" / "2.png", ns=(date, date))  # as cp -p would
    write(tmp_path / "in" / "1.png", (60, 40))
    changed, read = scan()
    assert read == ["1.png", "2.png"] and changed.hashes[2] == first.hashes[3]
    (tmp_path / "in" / "0.png").write_bytes(b"not a picture")
    for _ in range(2):  # what is left out is looked at every time
        folder, read = scan()
        assert read == ["0.png"] and len(folder) == 3
    notes.write_text('{"rules": ')  # damaged
    assert scan()[1] == ["0.png", "1.png", "2.png", "3.png"]
    notes.unlink()
    with pytest.raises(KeyboardInterrupt):
        scan(break_at="3.png")
    assert scan()[1] == ["0.png", "3.png"]  # an interrupted scan goes on


def encode_all(folder, store, identity: str = "weights", dtype=torch.float32) -> tuple[list, int]:
    """(keys, how often the autoencoder was loaded)."""
    loads = []

    def load():
        loads.append(1)
        return Averages()

    encoder = Encoder("averages", identity, load, torch.device("cpu"), dtype)
    (keys,) = store_latents(folder, store, [encoder])
    return keys, len(loads)


def test_a_picture_is_read_once_for_all_autoencoders(tmp_path, monkeypatch):
    for i in range(5):
        write(tmp_path / "in" / f"{i}.png", (40 + i, 40))
    store, folder = Store(tmp_path / "cache"), open_folder(tmp_path / "in", 32)
    monkeypatch.setitem(data.MOST_PIXELS, "cpu", 2 * 32 * 32)  # two pictures in a file, and one
    read, read_image = [], data.read_image
    monkeypatch.setattr(data, "read_image", lambda path: read.append(path.name) or read_image(path))
    cpu, half = torch.device("cpu"), Averages()
    both = [Encoder(name, name, lambda: half, cpu, torch.float32) for name in ("old", "new")]
    old, new = store_latents(folder, store, both)
    assert sorted(read) == [f"{i}.png" for i in range(5)] and not set(old) & set(new)
    expected = half.encode(folder.images(range(5)))
    assert all(torch.equal(store.rows(keys, "latents"), expected) for keys in (old, new))
    # What one of them lacks is read for that one alone.
    store.files()[new[3]].unlink()
    read.clear()
    assert store.lacks(old) == [] and store.lacks(new) == [2, 3]
    both[0] = Encoder("old", "old", None, cpu, torch.float32)  # not loaded: it has all
    assert store_latents(folder, store, both) == [old, new]
    assert sorted(read) == ["2.png", "3.png"] and store.lacks(new) == []


def test_what_is_there_twice_is_made_once(tmp_path):
    """Two processes would write one file; two pictures of the same bytes have one latent."""
    assert Store(tmp_path).lacks(["a", "b", "a", "c", "b"]) == [0, 1, 3]
    for name in ("0.png", "1.png", "2.png"):
        write(tmp_path / "in" / name, (40, 40 + (name == "2.png")))
    folder, store = open_folder(tmp_path / "in", 32), Store(tmp_path / "cache")
    (first, second, third), _ = encode_all(folder, store)
    assert first == second != third and store.lacks([first, third]) == []


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="counts mapped files by Linux")
def test_rows_in_memory_do_not_hold_their_files(tmp_path):
    store, n = Store(tmp_path), 300  # a system maps 65530 files: 100,000 captions are more
    for i in range(n):
        store.write({f"{i}": {"text": torch.full((2 + i % 2,), float(i))}})
    rows = store.rows([f"{i}" for i in range(n)], "text")
    assert len(rows.kept) == n and rows.row(7).tolist() == [7.0] * 3
    assert Path("/proc/self/maps").read_text().count(str(tmp_path)) <= 256


def test_latents_are_made_once_and_again_for_whatever_has_changed(tmp_path):
    rng = np.random.default_rng(0)
    for i, size in enumerate([(160, 96), (128, 128), (96, 160)]):
        (tmp_path / "in").mkdir(exist_ok=True)
        pixels = rng.integers(0, 255, (*size[::-1], 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / "in" / f"{i}.png")
        (tmp_path / "in" / f"{i}.txt").write_text("noise")
    store, folder = Store(tmp_path / "cache"), open_folder(tmp_path / "in", 128, 32)
    keys, loads = encode_all(folder, store)
    assert loads == 1 and encode_all(folder, store) == (keys, 0)
    rows = store.rows(keys, "latents")
    for i in range(3):
        expected = Averages().encode(folder.images([i]))
        assert torch.equal(rows[torch.tensor([i, i])], expected.expand(2, -1, -1, -1))
    assert not set(keys) & set(encode_all(folder, store, "other weights")[0])
    assert not set(keys) & set(encode_all(folder, store, dtype=torch.bfloat16)[0])
    assert not set(keys) & set(encode_all(open_folder(tmp_path / "in", 64, 32), store)[0])
    # A caption is not part of a latent, and a moved picture is the same picture.
    (tmp_path / "in" / "0.txt").write_text("another")
    os.rename(tmp_path / "in" / "1.png", tmp_path / "in" / "x.png")
    os.rename(tmp_path / "in" / "1.txt", tmp_path / "in" / "x.txt")
    again, loads = encode_all(open_folder(tmp_path / "in", 128, 32), store)
    assert loads == 0 and sorted(again) == sorted(keys)


def test_what_a_damaged_file_held_is_encoded_again(tmp_path, monkeypatch):
    for i in range(3):
        write(tmp_path / "in" / f"{i}.png", (40 + i, 40))
    store, folder = Store(tmp_path / "cache"), open_folder(tmp_path / "in", 32)
    monkeypatch.setitem(data.MOST_PIXELS, "cpu", 2 * 32 * 32)  # two pictures in a file, and one
    keys, _ = encode_all(folder, store)
    path = store.files()[keys[1]]
    before = path.read_bytes()
    path.write_bytes(before[:-4])
    assert store.lacks(keys) == [0, 1]
    assert encode_all(folder, store) == (keys, 1)
    assert path.read_bytes() == before and len(set(store.files().values())) == 2


def test_rows_of_one_shape_are_one_tensor_if_memory_allows(tmp_path, monkeypatch):
    store, rows = Store(tmp_path), [torch.full((2, 3), float(i)) for i in range(4)]
    store.write({f"a{i}": {"x": row} for i, row in enumerate(rows)})
    store.write({"b": {"x": torch.zeros(5)}})
    keys, some = ["a2", "a0", "a3"], torch.tensor([1, 2])
    wanted = torch.stack([rows[2], rows[0], rows[3]])
    assert torch.equal(store.rows(keys, "x"), wanted)
    assert isinstance(store.rows(["a0", "b"], "x"), Stored)
    monkeypatch.setattr(data, "MEMORY", wanted.nbytes - 1)
    stored = store.rows(keys, "x")
    assert isinstance(stored, Stored) and torch.equal(stored[some], wanted[some])


def test_the_digest_of_weights_is_of_their_content(tmp_path):
    for name, content in (("a", b"one"), ("b", b"one"), ("c", b"two")):
        (tmp_path / f"{name}.safetensors").write_bytes(content)
    a, b, c = (file_digest(tmp_path / f"{name}.safetensors") for name in "abc")
    assert a == b != c
    assert file_digest(tmp_path) not in (a, c)
