"""Why believe models/data.py: every kind of picture comes out right, or is left out by name."""

import argparse
import json
import os
import struct
import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageCms
from torch import Tensor, nn

from models import data, registry, text
from models.data import CachedRows, describe, open_folder, open_image
from models.script import UserError

RED, WHITE = (1, -1, -1), (1, 1, 1)
FLAGS = partial(argparse.Namespace, weights="")


def write(path: Path, size: tuple[int, int] = (48, 40), caption: str | None = "a red square"):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (255, 0, 0)).save(path)
    if caption is not None:
        path.with_suffix(".txt").write_text(caption)
    return path


def reasons(folder) -> dict[str, str]:
    """{name: reason} of what is left out."""
    lines = (line[1:].split("' ", 1) for line in folder.left_out)
    return {Path(name).name: reason for name, reason in lines}


# ---- one picture


RGB, SIZE = Image.new("RGB", (4, 2), (255, 0, 0)), (4, 2)
SPRITE = RGB.convert("P", palette=Image.Palette.ADAPTIVE)
DEEP = Image.new("I;16", SIZE, 257 * 51)


@pytest.mark.parametrize(
    ("name", "picture", "color"),
    [
        ("rgb.webp", RGB, RED),
        ("cmyk.jpg", Image.new("CMYK", SIZE, (0, 255, 255, 0)), RED),
        ("palette.png", SPRITE, RED),
        ("clear_palette.png", SPRITE, WHITE),
        ("clear.png", Image.new("RGBA", SIZE, (255, 0, 0, 0)), WHITE),
        ("half.png", Image.new("RGBA", SIZE, (255, 0, 0, 51)), (1, 0.6, 0.6)),
        ("half.webp", Image.new("RGBA", SIZE, (255, 0, 0, 51)), (1, 0.6, 0.6)),
        ("gray_alpha.png", Image.new("LA", SIZE, (0, 51)), (0.6, 0.6, 0.6)),
        ("deep.png", DEEP, (-0.6, -0.6, -0.6)),
        ("clear_deep.png", DEEP, WHITE),
        ("bits.png", Image.new("1", SIZE, 1), WHITE),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_every_colour_mode_gives_the_right_rgb(tmp_path, name, picture, color):
    options = {"lossless": True, "exact": True} if name.endswith("webp") else {}
    if name == "clear_palette.png":
        options = {"transparency": 0}  # the palette's only entry
    if name == "clear_deep.png":
        options = {"transparency": 257 * 51}
    picture.save(tmp_path / name, **options)
    image = open_image(tmp_path / name)
    assert image.shape == (3, 2, 4) and image.dtype == torch.float32
    lossy = 2 / 255 if name.endswith("jpg") else 1e-6
    assert (image - torch.tensor(color)[:, None, None]).abs().max() <= lossy


def test_a_transparent_colour_of_16_bits_is_found_in_the_8_that_are_read(tmp_path):
    colours, parts = struct.pack(">6H", 2570, 20, 30, 65535, 0, 0), b"\x89PNG\r\n\x1a\n"
    header = struct.pack(">IIBBBBB", 2, 1, 16, 2, 0, 0, 0)  # 2 x 1 pixels of 16-bit RGB
    data = {b"IHDR": header, b"tRNS": colours[:6], b"IDAT": zlib.compress(b"\0" + colours)}
    for kind, chunk in (data | {b"IEND": b""}).items():
        crc = zlib.crc32(kind + chunk)
        parts += struct.pack(">I", len(chunk)) + kind + chunk + struct.pack(">I", crc)
    (tmp_path / "a.png").write_bytes(parts)
    assert open_image(tmp_path / "a.png")[:, 0].T.tolist() == [[*WHITE], [*RED]]


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P", "L"])
def test_a_picture_is_read_in_the_colours_of_its_profile(tmp_path, mode):
    swapped = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    for one, other in ((b"rXYZ", b"...."), (b"gXYZ", b"rXYZ"), (b"....", b"gXYZ")):
        swapped = swapped.replace(one, other)  # in whose colours red means green
    stored, meant = ((90, 90, 90),) * 2 if mode == "L" else ((200, 60, 40), (60, 200, 40))
    picture = Image.new("RGB", SIZE, stored).convert(mode, palette=1)
    picture.save(tmp_path / "a.png", icc_profile=swapped)
    read = (open_image(tmp_path / "a.png")[:, 0, 0] + 1) * 127.5
    assert (read - torch.tensor(meant)).abs().max() <= 1
    picture.save(tmp_path / "damaged.png", icc_profile=swapped[:50])
    with pytest.raises(UserError, match="cannot be read .*profile"):
        open_image(tmp_path / "damaged.png")


@pytest.mark.parametrize("name", ["turned.jpg", "turned.png", "turned.webp"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation_tag_is_undone(tmp_path, name, orientation):
    upright = np.zeros((32, 48, 3), np.uint8)
    upright[:16, :16] = 255, 0, 0  # red in the top left corner
    stored = upright if orientation < 5 else upright.transpose(1, 0, 2)
    # What a camera held that way writes: from 5 on rows are columns.
    flips = [(1, 1), (1, -1), (-1, -1), (-1, 1), (1, 1), (-1, 1), (-1, -1), (1, -1)]
    down, across = flips[orientation - 1]
    tags = Image.Exif()
    tags[0x0112] = orientation
    picture = Image.fromarray(np.ascontiguousarray(stored[::down, ::across]))
    picture.save(tmp_path / name, exif=tags, quality=95)
    expected = torch.from_numpy(upright).permute(2, 0, 1) / 127.5 - 1
    image = open_image(tmp_path / name)
    assert image.shape == expected.shape and (image - expected).abs().mean() < 0.02


@pytest.mark.parametrize("kept", [0.05, 0.6, 0.99])
@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.webp", "progressive.jpg"])
def test_a_cut_file_never_passes_as_a_picture(tmp_path, name, kept):
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)
    Image.fromarray(noise).save(tmp_path / name, progressive=name.startswith("prog"))
    whole = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(whole[: int(len(whole) * kept)])
    with pytest.raises(UserError, match=r"cannot be read|is not an image"):
        open_image(tmp_path / name)


# ---- folders


def test_captions_beside_the_pictures_in_sub_folders_too(tmp_path):
    for name in ("b.png", "a.jpg", "more/c.JPEG", "more/deep/d.webp"):
        write(tmp_path / name, caption=f"picture {name}")
    write(tmp_path / ".thumbnails" / "a.jpg")
    folder = open_folder(tmp_path, 32)
    names = [Path(name).relative_to(tmp_path).as_posix() for name in folder.names]
    assert names == ["a.jpg", "b.png", "more/c.JPEG", "more/deep/d.webp"]
    assert folder.captions == [f"picture {name}" for name in names]
    images = folder.images([2, 0])
    assert images.shape == (2, 3, 32, 32) and images.dtype == torch.float32
    assert (images[0, :, 5, 5] - torch.tensor(RED)).abs().max() < 0.02
    assert describe(folder) == f"{tmp_path}: 4 pictures, 4 of 32x32"


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
    lines += '{"file_name": "e.png", "text": "half \\ud83d a character"}'
    (tmp_path / "metadata.jsonl").write_bytes(lines.encode("utf-8-sig"))
    folder = open_folder(tmp_path, 32)
    assert [Path(n).name for n in folder.names] == ["a.png", "c.png", "e.png", "f.png", "b.png"]
    assert folder.captions == ["a é", "c", "half ? a character", "", "b"]
    assert reasons(folder) == {
        "d.png": "has no caption",
        "outside.png": "is in metadata.jsonl, not in the folder",
        "root.png": "is in metadata.jsonl, not in the folder",
    }
    assert "'../outside.png' is in metadata.jsonl, not in the folder" in describe(folder)


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
        (b"\xef\xbb\xbfa fox\r\nin snow", "a fox in snow"),
        (b"\n\n  a fox \n", "a fox"),
        ("a fox\u2028in snow".encode(), "a fox in snow"),
        ("a fox é\n".encode("utf-16"), "a fox é"),
        (b"\r\n", ""),
    ],
)
def test_a_caption_is_all_of_its_file_in_one_line(tmp_path, written, caption):
    write(tmp_path / "a.png", caption=None)
    (tmp_path / "a.txt").write_bytes(written)
    folder = open_folder(tmp_path, 32)
    assert folder.captions == [caption]
    assert ("1 captions are empty" in describe(folder)) == (caption == "")
    (tmp_path / "a.txt").write_bytes(b"a caf\xe9")
    with pytest.raises(UserError, match="a.txt line 1: byte 5 is 0xe9"):
        open_folder(tmp_path, 32)


@pytest.mark.parametrize("table", [False, True])
@pytest.mark.parametrize("picture, named", [("e\u0301.png", "é"), ("é.png", "e\u0301")])
def test_a_name_is_found_in_either_spelling_of_an_accent(tmp_path, picture, named, table):
    write(tmp_path / "in" / "sub" / picture, caption=None)
    row = json.dumps({"file_name": f"{named}.png", "text": "a fox"})
    file = "metadata.jsonl" if table else f"{named}.txt"
    (tmp_path / "in" / "sub" / file).write_text(row if table else "a fox")
    write(tmp_path / "in" / "b.png", caption="a dog")  # no table of a sub-folder names it
    folder = open_folder(tmp_path / "in", 32)
    assert folder.captions == ["a dog", "a fox"] and not folder.left_out


def test_what_is_left_out_is_named_with_its_reason(tmp_path, monkeypatch):
    for i in range(12):
        write(tmp_path / f"fine{i}.png")
    sound = write(tmp_path / "cut.jpg", (200, 200)).read_bytes()
    (tmp_path / "cut.jpg").write_bytes(sound[: len(sound) // 2])
    write(tmp_path / "empty.jpg").write_bytes(b"")
    sound = write(tmp_path / "browser.jpg").rename(tmp_path / "browser.jfif")
    write(tmp_path / "page.gif")
    write(tmp_path / "scan.tga")
    write(tmp_path / "gif_named.png").write_bytes((tmp_path / "page.gif").read_bytes())
    write(tmp_path / "small.png", (31, 120))
    write(tmp_path / "long.png", (200, 40))
    write(tmp_path / "both.png", (20, 200))
    write(tmp_path / "mute.png", caption=None)
    write(tmp_path / "bomb.png", (300, 300))
    frames = dict(save_all=True, append_images=[Image.new("RGB", (48, 48), "blue")])
    Image.new("RGB", (48, 48)).save(write(tmp_path / "moving.webp"), **frames)
    Image.new("RGB", (48, 48)).save(write(tmp_path / "moving_too.png"), **frames)
    # A phone's picture with a depth map behind it is no animation.
    Image.new("RGB", (48, 48)).save(write(tmp_path / "phone.jpg"), "MPO", **frames)
    (tmp_path / "nowhere.png").symlink_to(tmp_path / "gone.png")
    (tmp_path / "nowhere.txt").write_text("a link")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 200 * 200)  # raises above twice that
    folder = open_folder(tmp_path, 32)
    fine = ["browser", *sorted(f"fine{i}" for i in range(12)), "phone"]
    assert [Path(name).stem for name in folder.names] == fine
    assert folder.left_out == sorted(folder.left_out)
    expected = {
        "cut.jpg": "cannot be read (image file is truncated",
        "empty.jpg": "is not an image",
        "page.gif": "is not an image",
        "gif_named.png": "is not an image, or not JPEG, PNG or WebP",
        "scan.tga": "is not an image, or not JPEG, PNG or WebP",
        "small.png": "is 31x120: lower --resolution or enlarge it to 32x32",
        "long.png": "is 200x40: crop it to 1:4 or less",
        "both.png": "is 20x200: crop it to 1:4 or less, and lower --resolution or enlarge it to",
        "mute.png": "has no caption",
        "bomb.png": "cannot be read (Image size (90000 pixels) exceeds limit",
        "moving.webp": "is animated",
        "moving_too.png": "is animated",
        "nowhere.png": "[Errno 2] No such file",
    }
    assert {k: v[: len(expected[k])] for k, v in reasons(folder).items()} == expected
    assert "left out 13, first 'bomb.png' cannot be read" in describe(folder)


def captioned(*names: str, size: tuple[int, int] = (48, 40)) -> dict:
    """Pictures of this size and their captions, as {name: size or content}."""
    captions = {f"{Path(name).stem}.txt": "a red square" for name in names}
    return dict.fromkeys(names, size) | captions


def table(*lines: str) -> dict:
    return captioned("a.png") | {"metadata.jsonl": "\n".join(lines)}


ROW = '{"file_name": "a.png", "text": "a"}'
SMALL = captioned(*(f"small{i}.png" for i in range(7)), size=(20, 20))
MOSTLY_SMALL = SMALL | captioned(*(f"fine{i}.png" for i in range(6)))


@pytest.mark.parametrize(
    ("files", "sentence"),
    [
        ({}, "is no folder of pictures, JPEG, PNG, WEBP"),
        (captioned("a.gif"), "0 pictures; left out 1, first 'a.gif' is not an image"),
        ({"a.png": (48, 40)}, "holds no captions: a.txt etc., or metadata.jsonl"),
        (captioned("a.png", "a.jpg"), "a.jpg and .*a.png share a.txt"),
        (table(ROW, "", ROW), "line 3 names a.png a second time"),
        (MOSTLY_SMALL, "6 pic.* left out 7, first 'small0.png' is 20x20.*small4.png.*left_out.txt"),
        (table(ROW, "{"), "line 2 is not like .*file_name"),
        (table('{"file": "a.png"}'), "not like"),
        (table('{"file_name": 7, "text": "a"}'), "not like"),
        (table("[" * 100000), "line 1 is not like"),
        (table('{"file_name": "a.png", "text": 7}'), "holds no captions"),
    ],
)
def test_a_folder_that_cannot_be_trained_on_is_refused_in_a_sentence(tmp_path, files, sentence):
    folder = tmp_path / "in"
    for name, content in files.items():
        if isinstance(content, str):
            (folder / name).write_text(content)
        else:
            write(folder / name, content, caption=None)
    with pytest.raises(UserError, match=sentence) as error:
        open_folder(folder, 32, 0, tmp_path / "run" / "scan.json")
    assert "\n" not in str(error.value)
    if files is MOSTLY_SMALL:
        lines = (tmp_path / "run" / "left_out.txt").read_text().splitlines()
        assert len(lines) == 7 and lines[6].startswith("'small6.png' is 20x20")


def test_linked_folders_are_entered_once_and_names_may_hold_anything(tmp_path):
    folder, odd = tmp_path / "set", os.fsdecode(b"line\nbreak \xff")
    write(folder / "a" / "1.png")
    write(folder / "a" / f"{odd}.png", (20, 20))
    write(tmp_path / "elsewhere" / ("x" * 200 + " 100%.png"))
    (folder / "b").symlink_to(tmp_path / "elsewhere")
    (folder / "a" / "back").symlink_to(folder)
    (folder / "a" / ".hidden").symlink_to(tmp_path / "elsewhere")
    (folder / "gone").symlink_to(tmp_path / "nowhere")
    found = open_folder(folder, 32)
    assert [Path(name).parent.name for name in found.names] == ["a", "b"]
    assert len(found.left_out) == 2 and reasons(found)["gone"] == "is a link to nothing"
    assert "\n" not in describe(found) and describe(found).encode()


def test_the_order_and_the_key_depend_on_content_alone(tmp_path):
    for folder, order in (("one", (2, 0, 1)), ("two", (1, 2, 0))):
        for i in order:
            write(tmp_path / folder / f"{i}.png", (48, 48 + i), caption=str(i))
    one, two = open_folder(tmp_path / "one", 32), open_folder(tmp_path / "two", 32)
    assert one.key == two.key and one.captions == two.captions == ["0", "1", "2"]
    assert len(one.key) == 64 and open_folder(tmp_path / "two", 40).key != one.key
    write(tmp_path / "two" / "bad.png", (8, 8))  # left out: nothing to train on has changed
    assert open_folder(tmp_path / "two", 32).key == one.key
    (tmp_path / "two" / "1.txt").write_text("one")
    recaptioned = open_folder(tmp_path / "two", 32)
    assert recaptioned.key != one.key
    write(tmp_path / "two" / "1.png", (48, 50), caption="one")
    assert open_folder(tmp_path / "two", 32).key != recaptioned.key


# ---- shapes


@pytest.mark.parametrize("resolution, factor", [(128, 32), (512, 32), (1024, 32), (4096, 64)])
def test_buckets_are_whole_tokens_and_no_larger_than_the_square(resolution, factor):
    shapes = data.buckets(resolution, factor)
    assert (resolution, resolution) in shapes and len(set(shapes)) == len(shapes)
    for height, width in shapes:
        assert height % factor == width % factor == 0 and (width, height) in shapes
        assert 0.9 * resolution**2 < height * width <= resolution**2
        assert max(height, width) <= data.MAX_RATIO * min(height, width)


def test_a_picture_goes_to_the_shape_that_crops_it_least():
    shapes = data.buckets(1024, 32)
    for height, width in ((1000, 1500), (900, 1600), (3000, 2000), (1024, 1024), (4000, 1001)):
        kept = {(h, w): min(h / height, w / width) / max(h / height, w / width) for h, w in shapes}
        assert kept[data.nearest(shapes, height, width)] == max(kept.values()) > 0.9


def test_pictures_of_each_shape_are_cropped_to_it_and_counted(tmp_path):
    write(tmp_path / "wide.png", (300, 200))
    write(tmp_path / "tall.png", (200, 300))
    write(tmp_path / "also_wide.png", (320, 190))
    write(tmp_path / "square.png", (140, 130))
    write(tmp_path / "low.png", (150, 90))  # its shape is 160x96
    folder = open_folder(tmp_path, 128, 32)
    assert reasons(folder) == {"low.png": "is 150x90: lower --resolution or enlarge it to 160x96"}
    assert [Path(name).stem for name in folder.names] == ["also_wide", "square", "tall", "wide"]
    assert folder.sizes == [(96, 160), (128, 128), (160, 96), (96, 160)]
    assert folder.images([0, 3]).shape == (2, 3, 96, 160)
    assert "4 pictures, 2 of 160x96, 1 of 128x128, 1 of 96x160" in describe(folder)
    assert data.in_batches(folder.sizes, range(4), 2 * 96 * 160) == [[0, 3], [1], [2]]
    assert data.in_batches(folder.sizes, [3, 0], 1) == [[3], [0]]


# ---- what is kept


def test_a_second_scan_decodes_what_has_changed_alone(tmp_path, monkeypatch):
    some_pictures(tmp_path / "in", 4)
    decoded, read_image = [], data.read_image

    def note(path):
        decoded.append(path.name)
        return read_image(path)

    def scan(resolution: int = 32) -> tuple:
        decoded.clear()
        folder = open_folder(tmp_path / "in", resolution, 0, tmp_path / "cache" / "scan.json")
        return folder, sorted(decoded)

    monkeypatch.setattr(data, "read_image", note)
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
    assert scan()[1] == scan()[1] == ["0.png"]  # what is left out is looked at every time


class Averages(nn.Module):
    """Stands for an autoencoder: means of 4 x 4 pixels, and 1 / 0 for a black picture."""

    def encode(self, images: Tensor) -> Tensor:
        is_black = (images < -0.99).flatten(1).all(1)[:, None, None, None]
        return F.avg_pool2d(images, 4) / (1 - is_black.to(images.dtype))


def encoder(loads: list, identity: str = "weights") -> data.Encoder:
    """An encoder that notes in `loads` when it is loaded."""

    def load() -> Callable:
        loads.append(identity)
        return Averages().encode

    return identity, load


def encode(source, cache: Path, identity: str = "weights", dtype=torch.float32) -> tuple:
    """(latents, how often the autoencoder was loaded)."""
    loads, cpu = [], torch.device("cpu")
    return data.encode_pictures(source, encoder(loads, identity), cache, cpu, dtype), len(loads)


def noise(folder: Path, *sizes: tuple[int, int]) -> None:
    """Captioned pictures, 0.png and so on, of these sizes (H, W)."""
    rng = np.random.default_rng(0)
    for i, size in enumerate(sizes):
        pixels = rng.integers(0, 255, (*size, 3), np.uint8)
        Image.fromarray(pixels).save(write(folder / f"{i}.png"))


def some_pictures(folder: Path, n: int = 5):
    noise(folder, *((40, 40 + i) for i in range(n)))
    return open_folder(folder, 32)


@pytest.mark.parametrize("pixels", [1, 2 * 32 * 32, 2**22])
def test_latents_come_in_order_and_in_their_dtype_whatever_the_batch(tmp_path, monkeypatch, pixels):
    monkeypatch.setattr(data, "CPU_PIXELS", pixels)
    folder, cache = some_pictures(tmp_path, 7), tmp_path / "cache"
    latents, _ = encode(folder, cache)
    assert torch.equal(latents, Averages().encode(folder.images(range(7))))
    assert encode(folder, cache, "weights", torch.bfloat16)[0].dtype == torch.bfloat16
    Image.new("1", (40, 40), 0).save(tmp_path / "3.png")  # overflows
    with pytest.raises(UserError, match=r"/3\.png hold NaN or Inf in torch.float32"):
        encode(folder, tmp_path / "new cache")


def test_latents_are_made_once_and_again_for_whatever_has_changed(tmp_path):
    noise(tmp_path / "in", (96, 160), (128, 128), (160, 96))
    cache, folder = tmp_path / "cache", open_folder(tmp_path / "in", 128, 32)
    rows, loads = encode(folder, cache)
    assert loads == 1 and encode(folder, cache)[1] == 0
    for i in range(3):
        expected = Averages().encode(folder.images([i]))
        assert torch.equal(rows[torch.tensor([i, i])], expected.expand(2, -1, -1, -1))
    assert encode(folder, cache, "other weights")[1] == 1
    assert encode(open_folder(tmp_path / "in", 64, 32), cache)[1] == 1
    # A caption is not part of a latent, and a moved picture is the same picture.
    (tmp_path / "in" / "0.txt").write_text("another")
    for ending in ("png", "txt"):
        os.rename(tmp_path / "in" / f"1.{ending}", tmp_path / "in" / f"x.{ending}")
    again, loads = encode(open_folder(tmp_path / "in", 128, 32), cache)
    assert loads == 0 and sorted(again.names) == sorted(rows.names)


@pytest.mark.parametrize("damage", ["cut short", "deleted"])
def test_what_a_lost_file_held_is_encoded_again_and_nothing_else(tmp_path, monkeypatch, damage):
    monkeypatch.setattr(data, "CPU_PIXELS", 2 * 32 * 32)  # two pictures in a file
    folder, cache = some_pictures(tmp_path / "in", 6), tmp_path / "cache"
    latents, _ = encode(folder, cache)
    paths = sorted(cache.glob("*/*.safetensors"))
    before = paths[1].read_bytes()
    paths[1].write_bytes(before[:-4]) if damage == "cut short" else paths[1].unlink()
    read, read_image = [], data.read_image
    monkeypatch.setattr(data, "read_image", lambda path: read.append(path.name) or read_image(path))
    again, loads = encode(folder, cache)
    assert loads == 1 and torch.equal(again, latents) and len(paths) == 3 and len(read) == 2
    assert paths[1].read_bytes() == before and sorted(cache.glob("*/*.safetensors")) == paths


def test_what_is_there_twice_is_made_once(tmp_path):
    """Two processes would write one file; two pictures of the same bytes have one latent."""
    assert CachedRows(tmp_path, ["a", "b", "a", "c", "b"]).missing() == [0, 1, 3]
    for name in ("0.png", "1.png", "2.png"):
        write(tmp_path / "in" / name, (40, 40 + (name == "2.png")))
    latents, _ = encode(open_folder(tmp_path / "in", 32), tmp_path / "cache")
    (file,) = (tmp_path / "cache").glob("*/*.safetensors")
    assert len(latents) == 3 and len(data.open_checkpoint(file).shapes) == 2


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="counts mapped files by Linux")
def test_rows_in_memory_do_not_hold_their_files(tmp_path):
    names = [f"{i}" for i in range(300)]  # a system maps 65530 files: 100,000 captions are more
    for i, name in enumerate(names):
        CachedRows(tmp_path / "new", []).write({name: torch.full((2 + i % 2,), float(i))})
    rows = CachedRows(tmp_path / "new", names).loaded()
    held = [rows.row(i) for i in range(300)]
    assert held[7].tolist() == [7.0] * 3
    assert Path("/proc/self/maps").read_text().count(str(tmp_path)) <= 256


def test_rows_of_one_shape_are_one_tensor_if_memory_allows(tmp_path, monkeypatch):
    tensors = {f"a{i}": torch.full((2, 3), float(i)) for i in range(4)}
    CachedRows(tmp_path, []).write(tensors | {"b": torch.zeros(5)})
    names, some = ["a2", "a0", "a3"], torch.tensor([1, 2])
    wanted = torch.stack([tensors[name] for name in names])
    assert torch.equal(CachedRows(tmp_path, names).loaded(), wanted)
    assert isinstance(CachedRows(tmp_path, ["a0", "b"]).loaded(), CachedRows)
    monkeypatch.setattr(data, "MEMORY", wanted.nbytes - 1)
    stored = CachedRows(tmp_path, names).loaded()
    assert isinstance(stored, CachedRows) and torch.equal(stored[some], wanted[some])


# ---- what a trainer sees


def test_a_folder_becomes_a_dataset_without_words_that_the_toy_cannot_read(tmp_path, capsys):
    for i in range(16):
        write(tmp_path / "in" / f"{i}.png", (40 + i, 40), "a red fox" if i else "a red circle")
    cpu = torch.device("cpu")
    source = data.open_source(str(tmp_path / "in"), 32, 0, tmp_path)
    about = (registry.describe("flux-toy"), FLAGS(out=tmp_path), cpu, torch.float32)
    dataset = data.prepare(source, [encoder([]), encoder([], "new")], *about)
    assert "knows 33 of 48 words" in capsys.readouterr().out
    assert dataset.captions == ["a red", "a red circle"] and dataset.key == source.key
    assert torch.equal(dataset.latents, dataset.base_latents) and dataset.guidance_is_input
    assert source.hashes == sorted(source.hashes)  # so that those held out are a fair sample
    circle = dataset.caption.tolist().index(1)
    assert dataset.names_of(torch.tensor([circle])) == [str(tmp_path / "in" / "0.png")]
    assert len(dataset) == 14 and [rows.tolist() for rows in dataset.held_out] == [[14, 15]]
    cond = text.ToyText.from_pretrained().encode(["a red", "a red circle", ""])
    for ours, null, theirs in zip(dataset.cond, dataset.null_cond, cond):
        torch.testing.assert_close(ours[:2], theirs[:2], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(null, theirs[2:], rtol=1e-5, atol=1e-5)
    assert data.prepare(source, [encoder([])], *about).base_latents is None


def test_damaged_notes_of_a_scan_are_made_again(tmp_path):
    some_pictures(tmp_path / "in", 16)
    for damage in ("", "{", "[]"):
        (tmp_path / "scan.json").write_text(damage)
        assert len(open_folder(tmp_path / "in", 32, 0, tmp_path / "scan.json")) == 16


@pytest.mark.parametrize("free", [2**40, 2**10])
def test_text_is_encoded_once_and_its_size_is_printed_or_refused(
    tmp_path, monkeypatch, capsys, free
):
    calls, folder = [], some_pictures(tmp_path / "in", 16)

    def encode_each(kind, place, prompts, device, dtype):
        for prompt in prompts:
            calls.append(prompt)
            yield torch.full((3, 128), float(len(prompt[0]))), torch.ones(3, dtype=torch.bool)

    usage = data.shutil.disk_usage(tmp_path)._replace(free=free)
    monkeypatch.setattr(data.shutil, "disk_usage", lambda _: usage)
    monkeypatch.setattr(text, "encode_each", encode_each)
    spec = registry.describe("sana-1.6b")
    about = (folder, [encoder([])], spec, FLAGS(out=tmp_path), torch.device("cpu"), torch.float32)
    if free < 2**20:
        with pytest.raises(UserError, match="GiB are free: train on fewer captions"):
            data.prepare(*about)
        return
    dataset = data.prepare(*about)
    assert "text takes 0.00 GiB" in capsys.readouterr().out
    assert calls == [("a red square", False), ("", True)]  # SANA's empty prompt is a negative one
    assert not dataset.guidance_is_input and dataset.cond[1].dtype == torch.bool
    assert dataset.cond[0][dataset.caption].unique() == 12
    assert dataset.null_cond[0].unique() == 0 and dataset.null_cond[0].shape == (1, 3, 128)
    data.prepare(*about)
    assert len(calls) == 2


def test_micro_batches_are_the_batch_and_their_weights_sum_to_this_gpus_share():
    n, everyone = 5, torch.arange(10)
    column = torch.arange(float(n))
    grid = column[:, None, None, None].expand(n, 2, 1, 1)
    batch = data.Batch(grid, -grid, column, (column, column + 1), (column + 2,), None, everyone)
    for size in (0, 1, 2, 5, 9):
        parts, shares = zip(*batch.split(size, torch.device("cpu")))
        assert max(len(part.noise) for part in parts) == min(size or n, n)
        assert abs(sum(shares) - 0.5) < 1e-9 and parts[0].guidance is None
        assert all(torch.equal(part.rows, everyone) for part in parts)
        for name in ("latents", "noise", "timestep"):
            joined = torch.cat([getattr(part, name) for part in parts])
            assert torch.equal(joined, getattr(batch, name))
        assert torch.equal(torch.cat([part.cond[1] for part in parts]), column + 1)
