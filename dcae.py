"""DC-AE: an autoencoder that shrinks an image 32 or 64 times a side and can still give it back.

What    encode: (B, 3, H, W) pixels -> (B, C, H/f, W/f) latents; decode: the way back. With f = 32
        and C = 32, 96 pixel values become one latent value; f8 with 16 channels makes it 12 to 1.
Why     A diffusion transformer pays for tokens, and for 4096 x 4096 pixels f8 with 2x2 patches has
        65,536 of them, f64 has 4,096. But an f8 network with more stages stacked on reconstructs
        worse than without them, although they only have to hand on what they get: what is
        missing is not capacity, it is an optimiser that finds the way.
How     So handing on is built in and costs no weight. Halving the grid moves each 2x2 pixels into
        channels, which loses nothing, and averages groups of them down to the new width; doubling
        it repeats channels and moves them back into pixels. Convolutions learn the rest only:
            down(h) = conv(h) + average(space_to_channel(h))                                (1)
            up(h)   = conv(h) + channel_to_space(repeat(h))                                 (2)
        In the deepest stages ReLU linear attention lets all positions talk, at a cost linear in
        their number.
        The 1.5 family goes on without attention. It was trained to decode from the first k channels
        alone, for random k: the first channels then hold the layout, the later ones the detail, and
        a diffusion model finds such latents easier. Any first k of its channels are valid latents.
Source  DC-AE, arXiv 2410.10733; DC-AE 1.5, arXiv 2508.00413. Written from the papers and from the
        names and shapes of the checkpoints (mit-han-lab/efficientvit, diffusers; Apache 2.0).
Differs At 32 positions or fewer the reference forms the attention matrix; the linear form used here
        is the same sum. A later empty stage (layers_per_block 0) still changes the grid here.
Run     python dcae.py photo.jpg [--model NAME|PATH]: original | reconstruction | 4 x difference.
"""

import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from models.data import open_image
from models.script import UserError, exit_cleanly, parse_config, pick_device, pick_dtype
from models.weights import Checkpoint, Rows, assign, build, open_model, to_conv, write_whole


@dataclass(frozen=True)
class Config:
    image: str  # any photo: rotated by its EXIF tag, ICC profile, alpha over white, CMYK, 16 bit
    model: str = "dc-ae-f32c32-toy"  # for the toy's scenes; a preset, file, folder or hub id
    weights: str | None = None  # a folder to look in instead of the hub
    out: str = "runs/dcae.png"  # original | reconstruction | 4 x difference
    device: str = ""  # cuda, then mps, then cpu
    dtype: str = "fp32"  # fp32 | bf16 | fp16


TILES_ABOVE = 2048 * 2048  # pixels; fp32 features at full size take 2 GB there

# ---- model: the shortcuts that make deep compression trainable


def average_channels(hidden: Tensor, channels: int) -> Tensor:
    """Down to `channels`: the mean of every run of consecutive channels."""
    return hidden.unflatten(1, (channels, -1)).mean(2)  # (B, channels, h, w)


def repeat_channels(hidden: Tensor, channels: int) -> Tensor:
    """Up to `channels`: every channel repeated in place."""
    repeats = channels // hidden.shape[1]
    return hidden[:, :, None].expand(-1, -1, repeats, -1, -1).flatten(1, 2)


class Downsample(nn.Conv2d):
    """Half the grid, eq. (1); itself the convolution, for a short name of its weight."""

    def __init__(self, width: int, new_width: int, kind: str, shortcut: bool = True):
        unshuffle = kind == "pixel_unshuffle"  # everything else is the strided convolution
        channels, stride = (new_width // 4, 1) if unshuffle else (new_width, 2)
        super().__init__(width, channels, 3, stride, padding=1)
        self.new_width, self.unshuffle, self.shortcut = new_width, unshuffle, shortcut

    def forward(self, hidden: Tensor) -> Tensor:  # (B, width, H, W)
        learned = super().forward(hidden)
        if self.unshuffle:
            learned = F.pixel_unshuffle(learned, 2)  # (B, new_width, H/2, W/2)
        if not self.shortcut:
            return learned
        return learned + average_channels(F.pixel_unshuffle(hidden, 2), self.new_width)


class Upsample(nn.Conv2d):
    """Twice the grid, eq. (2)."""

    def __init__(self, width: int, new_width: int, kind: str, shortcut: bool = True):
        interpolate = kind == "interpolate"
        super().__init__(width, new_width if interpolate else 4 * new_width, 3, padding=1)
        self.new_width, self.interpolate, self.shortcut = new_width, interpolate, shortcut

    def forward(self, hidden: Tensor) -> Tensor:  # (B, width, h, w)
        if self.interpolate:
            learned = super().forward(F.interpolate(hidden, scale_factor=2, mode="nearest"))
        else:
            learned = F.pixel_shuffle(super().forward(hidden), 2)  # (B, new_width, 2h, 2w)
        if not self.shortcut:
            return learned
        return learned + F.pixel_shuffle(repeat_channels(hidden, 4 * self.new_width), 2)


# ---- model: blocks


class RMSNorm(nn.Module):
    """hidden / sqrt(mean_c hidden^2 + eps) * weight + bias, at every position."""

    def __init__(self, width: int, eps: float = 1e-5):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width))
        self.eps = eps

    def forward(self, hidden: Tensor) -> Tensor:  # (B, D, h, w)
        # In fp32: bf16 keeps two to three digits, too few for a sum of 1024 squares.
        mean_square = hidden.float().square().mean(1, keepdim=True)
        normed = hidden * torch.rsqrt(mean_square + self.eps)
        return (normed * self.weight[:, None, None] + self.bias[:, None, None]).type_as(hidden)


NORMS = {"rms_norm": RMSNorm, "batch_norm": nn.BatchNorm2d}
ACTIVATIONS = {"relu": F.relu, "silu": F.silu}


class ResBlock(nn.Module):
    def __init__(self, width: int, norm: str, act: str):
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm = NORMS[norm](width)
        self.act = ACTIVATIONS[act]

    def forward(self, hidden: Tensor) -> Tensor:
        branch = self.conv2(self.act(self.conv1(hidden)))
        return hidden + self.norm(branch)


def linear_attention(query: Tensor, key: Tensor, value: Tensor, eps: float = 1e-15) -> Tensor:
    """out_n = sum_m (q_n . k_m) v_m / (sum_m q_n . k_m + eps), reordered: N hd^2, not N^2 hd."""
    summary = value @ key.mT  # (B, nh, hd, hd), all that a query needs to know of the image
    total = key.sum(-1, keepdim=True).mT  # (B, nh, 1, hd)
    return (summary @ query) / (total @ query + eps)  # (B, nh, hd, N)


class PerHead(nn.Conv2d):
    """A 1x1 convolution among the channels of each head's q, of its k and of its v."""


class Attention(nn.Module):
    """Linear attention over ReLU features; each scale k adds heads that see k x k means."""

    def __init__(self, width: int, head_dim: int, scales: list[int], norm: str):
        super().__init__()
        self.head_dim = head_dim
        heads = width // head_dim
        inner = heads * head_dim
        self.qkv = nn.Conv2d(width, 3 * inner, 1, bias=False)
        self.multiscale = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(3 * inner, 3 * inner, k, padding=k // 2, groups=3 * inner, bias=False),
                PerHead(3 * inner, 3 * inner, 1, groups=3 * heads, bias=False),
            )
            for k in scales
        )
        self.proj = nn.Conv2d(inner * (1 + len(scales)), width, 1, bias=False)
        self.norm = NORMS[norm](width)

    def forward(self, hidden: Tensor) -> Tensor:  # (B, D, h, w)
        qkv = self.qkv(hidden)
        joint = torch.cat([qkv, *(scale(qkv) for scale in self.multiscale)], 1)
        # A head's q, k and v lie together, (nh, 3, hd): the thirds of qkv are not q, k and v.
        # Sums over all positions overflow fp16 and blur in bf16: fp32, autocast or not.
        # (The meta device, which counts operations, has no autocast of its own.)
        with torch.autocast("cpu" if qkv.is_meta else qkv.device.type, enabled=False):
            heads = joint.float().flatten(2).unflatten(1, (-1, 3, self.head_dim))
            query, key, value = heads.unbind(2)  # (B, nh, hd, N) each
            mixed = linear_attention(query.relu(), key.relu(), value)
        mixed = mixed.type_as(qkv).flatten(1, 2).unflatten(2, qkv.shape[-2:])
        return hidden + self.norm(self.proj(mixed))  # of (B, nh hd, h, w)


class GLUMBConv(nn.Module):
    """Gated bottleneck, 2 x 4 the width: 3x3 neighbours, channel by channel; half is the gate."""

    def __init__(self, width: int):
        super().__init__()
        self.conv_inverted = nn.Conv2d(width, 8 * width, 1)
        self.conv_depth = nn.Conv2d(8 * width, 8 * width, 3, padding=1, groups=8 * width)
        self.conv_point = nn.Conv2d(4 * width, width, 1, bias=False)
        self.norm = RMSNorm(width)

    def forward(self, hidden: Tensor) -> Tensor:
        wide = F.silu(self.conv_inverted(hidden))  # (B, 8D, h, w)
        value, gate = self.conv_depth(wide).chunk(2, 1)  # (B, 4D, h, w) each
        return hidden + self.norm(self.conv_point(value * F.silu(gate)))


class EfficientViTBlock(nn.Module):
    def __init__(self, width: int, head_dim: int, scales: list[int], norm: str):
        super().__init__()
        self.attn = Attention(width, head_dim, scales, norm)
        self.mlp = GLUMBConv(width)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.mlp(self.attn(hidden))


# ---- model: encoder, decoder


def make_blocks(config: dict, side: str, stage: int, norm: str, act: str) -> list[nn.Module]:
    width = config[f"{side}_block_out_channels"][stage]
    each = (config[f"{side}_block_types"], norm, act)  # of all stages, or one a stage
    kind, norm, act = (value if isinstance(value, str) else value[stage] for value in each)
    depth = range(config[f"{side}_layers_per_block"][stage])
    if kind == "ResBlock":
        return [ResBlock(width, norm, act) for _ in depth]
    if kind == "EfficientViTBlock":
        head_dim, scales = config["attention_head_dim"], config[f"{side}_qkv_multiscales"][stage]
        return [EfficientViTBlock(width, head_dim, scales, norm) for _ in depth]
    raise ValueError(f"block type {kind!r} is neither ResBlock nor EfficientViTBlock")


class Encoder(nn.Module):
    """Stage s works at 1/2^s of the image and ends with the step down to stage s + 1.

    When stage 0 is empty conv_in takes its step, straight from the pixels.
    """

    def __init__(self, config: dict):
        super().__init__()
        widths, kind = config["encoder_block_out_channels"], config["downsample_block_type"]
        channels, self.latent_channels = config["in_channels"], config["latent_channels"]
        self.shortcut = config["encoder_out_shortcut"]
        skip = int(config["encoder_layers_per_block"][0] == 0)
        if skip:
            self.conv_in = Downsample(channels, widths[1], kind, shortcut=False)
        else:
            self.conv_in = nn.Conv2d(channels, widths[0], 3, padding=1)
        self.stages = nn.ModuleList()
        for s, width in enumerate(widths):
            stage = make_blocks(config, "encoder", s, "rms_norm", "silu")
            if skip <= s < len(widths) - 1:
                stage.append(Downsample(width, widths[s + 1], kind))
            self.stages.append(nn.Sequential(*stage))
        self.conv_out = nn.Conv2d(widths[-1], self.latent_channels, 3, padding=1)

    def forward(self, images: Tensor) -> Tensor:  # (B, 3, H, W)
        hidden = self.conv_in(images)
        for stage in self.stages:
            hidden = stage(hidden)  # (B, widths[-1], h, w) at the end
        latents = self.conv_out(hidden)  # (B, C, h, w)
        if self.shortcut:
            latents = latents + average_channels(hidden, self.latent_channels)
        return latents


class Decoder(nn.Module):
    """The same stages, run from the last to the first: a step up, then the blocks."""

    def __init__(self, config: dict):
        super().__init__()
        widths, kind = config["decoder_block_out_channels"], config["upsample_block_type"]
        norms, acts = config["decoder_norm_types"], config["decoder_act_fns"]
        self.width, self.shortcut = widths[-1], config["decoder_in_shortcut"]
        self.act_out = ACTIVATIONS[config["decoder_conv_act_fn"]]
        skip = int(config["decoder_layers_per_block"][0] == 0)
        self.conv_in = nn.Conv2d(config["latent_channels"], widths[-1], 3, padding=1)
        self.stages = nn.ModuleList()
        for s, width in enumerate(widths):
            stage = make_blocks(config, "decoder", s, norms, acts)
            if skip <= s < len(widths) - 1:
                stage.insert(0, Upsample(widths[s + 1], width, kind))
            self.stages.append(nn.Sequential(*stage))
        self.norm_out = RMSNorm(widths[skip])
        if skip:
            self.conv_out = Upsample(widths[1], config["in_channels"], kind, shortcut=False)
        else:
            self.conv_out = nn.Conv2d(widths[0], config["in_channels"], 3, padding=1)

    def forward(self, latents: Tensor) -> Tensor:  # (B, C, h, w)
        hidden = self.conv_in(latents)  # (B, widths[-1], h, w)
        if self.shortcut:
            hidden = hidden + repeat_channels(latents, self.width)
        for stage in reversed(self.stages):
            hidden = stage(hidden)  # (B, widths[0], H, W) at the end
        return self.conv_out(self.act_out(self.norm_out(hidden)))  # (B, 3, H, W)


class DCAE(nn.Module):
    """The keywords and their defaults are those of config.json in diffusers' format."""

    def __init__(
        self,
        in_channels: int = 3,
        latent_channels: int = 32,
        attention_head_dim: int = 32,
        encoder_block_types: str | list[str] = "ResBlock",
        decoder_block_types: str | list[str] = "ResBlock",
        encoder_block_out_channels: list[int] = (128, 256, 512, 512, 1024, 1024),
        decoder_block_out_channels: list[int] = (128, 256, 512, 512, 1024, 1024),
        encoder_layers_per_block: list[int] = (2, 2, 2, 3, 3, 3),
        decoder_layers_per_block: list[int] = (3, 3, 3, 3, 3, 3),
        encoder_qkv_multiscales: list[list[int]] = ((), (), (), (5,), (5,), (5,)),
        decoder_qkv_multiscales: list[list[int]] = ((), (), (), (5,), (5,), (5,)),
        upsample_block_type: str = "pixel_shuffle",
        downsample_block_type: str = "pixel_unshuffle",
        decoder_norm_types: str | list[str] = "rms_norm",
        decoder_act_fns: str | list[str] = "silu",
        encoder_out_shortcut: bool = True,
        decoder_in_shortcut: bool = True,
        decoder_conv_act_fn: str = "relu",
        scaling_factor: float | None = 1.0,  # None: not known, and a transformer needs it
    ):
        config = {k: v for k, v in locals().items() if k not in ("self", "__class__")}
        super().__init__()
        self.config = config
        self.latent_channels, self.scaling_factor = latent_channels, scaling_factor or 1.0
        self.stride = 2 ** (len(encoder_block_out_channels) - 1)
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
        config: dict | None = None,
        weights: str | None = None,
    ) -> "DCAE":
        """A file, a folder, a preset or a hub id, in dc-ai's names, diffusers' or ours."""
        checkpoint, config, run = open_model(path, PRESETS, "vae", config, weights)
        if config and "model_name" in config:  # of a dc-ai repository: only a name
            config = PRESETS.get(config["model_name"], PRESETS.get(str(path), {})).get("config")
        model = build(cls, config, checkpoint.path)
        assign(model, name_rows(model, checkpoint), checkpoint, device, dtype, run)
        return model.eval()

    def encode(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) in [-1, 1] -> scaled latents (B, C, h, w)."""
        height, width = images.shape[-2:]
        fits = height % self.stride == width % self.stride == 0
        assert fits, f"image of {width}x{height}: both sides must be multiples of {self.stride}"
        images = images.to(self.encoder.conv_in.weight.dtype)
        return self.encoder(images) * self.scaling_factor

    def decode(self, latents: Tensor) -> Tensor:
        """Scaled latents -> (B, 3, H, W). The 1.5 family takes the first channels alone, too."""
        absent = self.latent_channels - latents.shape[1]
        assert absent == 0 or (absent > 0 and not self.config["decoder_in_shortcut"]), (
            f"latents of {latents.shape[1]} channels, this decoder takes {self.latent_channels}"
        )
        raw = F.pad(latents, (0, 0, 0, 0, 0, absent)) / self.scaling_factor
        return self.decoder(raw.to(self.decoder.conv_in.weight.dtype))

    def forward(self, images: Tensor) -> Tensor:
        return self.decode(self.encode(images))


# ---- official weights


def both(**settings: str | list) -> dict:
    """The same for encoder_... and for decoder_..."""
    return {f"{side}_{k}": v for side in ("encoder", "decoder") for k, v in settings.items()}


def family_1_0(latent_channels: int, widths: list[int], scaling_factor: float) -> dict:
    """in: trained on ImageNet, mix: on more. ResBlocks at high resolution, attention below."""
    deep = len(widths) - 3
    types, scales = ["ResBlock"] * 3 + ["EfficientViTBlock"] * deep, [[]] * len(widths)
    return both(block_types=types, block_out_channels=widths, qkv_multiscales=scales) | {
        "latent_channels": latent_channels,
        "encoder_layers_per_block": [0, 4, 8] + [2] * deep,
        "decoder_layers_per_block": [0, 5, 10] + [2] * deep,
        "decoder_norm_types": ["batch_norm"] * 3 + ["rms_norm"] * deep,
        "decoder_act_fns": ["relu"] * 3 + ["silu"] * deep,
        "scaling_factor": scaling_factor,
    }


def family_1_5(widths: list[int], scaling_factor: float | None) -> dict:
    """No attention, and no shortcut around the latent: training puts its channels in order."""
    depths = [0, 5, 10] + [4] * (len(widths) - 3)
    scales = [[]] * len(widths)  # diffusers reads them unasked
    return both(block_out_channels=widths, layers_per_block=depths, qkv_multiscales=scales) | {
        "latent_channels": 128,
        "encoder_out_shortcut": False,
        "decoder_in_shortcut": False,
        "decoder_conv_act_fn": "silu",
        "scaling_factor": scaling_factor,
    }


F32 = [128, 256, 512, 512, 1024, 1024]
F64, F128 = [*F32, 2048], [*F32, 2048, 2048]
# The class's own widths and depths, with attention at two scales.
SANA = both(block_types=["ResBlock"] * 3 + ["EfficientViTBlock"] * 3) | {
    "downsample_block_type": "conv",
    "upsample_block_type": "interpolate",
    "scaling_factor": 0.41407,
}
SANA_LITE = SANA | {  # SANA's latents, a decoder without attention
    "decoder_block_types": "ResBlock",
    "decoder_layers_per_block": [0, 3, 5, 4, 4, 4],
    "upsample_block_type": "pixel_shuffle",
    "decoder_conv_act_fn": "silu",
}


def official(hub: str, config: dict) -> dict:
    return {"hub": hub, "file": "model.safetensors", "config": config}


MIT = "mit-han-lab/dc-ae-"
PRESETS = {
    "dc-ae-f32c32-toy": {"path": "models/toy/dc-ae-f32c32.safetensors"},
    "dc-ae-f64c128-toy": {"path": "models/toy/dc-ae-f64c128.safetensors"},
    "dc-ae-f32c32-in-1.0": official(MIT + "f32c32-in-1.0", family_1_0(32, F32, 0.3189)),
    "dc-ae-f32c32-mix-1.0": official(MIT + "f32c32-mix-1.0", family_1_0(32, F32, 0.4552)),
    "dc-ae-f64c128-in-1.0": official(MIT + "f64c128-in-1.0", family_1_0(128, F64, 0.2889)),
    "dc-ae-f64c128-mix-1.0": official(MIT + "f64c128-mix-1.0", family_1_0(128, F64, 0.4538)),
    "dc-ae-f128c512-in-1.0": official(MIT + "f128c512-in-1.0", family_1_0(512, F128, 0.4883)),
    "dc-ae-f128c512-mix-1.0": official(MIT + "f128c512-mix-1.0", family_1_0(512, F128, 0.362)),
    "dc-ae-f32c32-sana-1.0": official(MIT + "f32c32-sana-1.0", SANA),
    "dc-ae-f32c32-sana-1.1": official(MIT + "f32c32-sana-1.1", SANA),
    "dc-ae-lite-f32c32-sana-1.1": official("dc-ai/dc-ae-lite-f32c32", SANA_LITE),
    "dc-ae-f32c128-1.5": official("dc-ai/dc-ae-f32c128-1.5", family_1_5(F32, None)),
    "dc-ae-f64c128-1.5": official("dc-ai/dc-ae-f64c128-1.5", family_1_5([*F32, 1024], 0.5935)),
}

NAME_MAP = (  # official name -> ours, rule after rule; our own names pass unchanged
    # dc-ai (efficientvit): op_list and main are containers, conv is inside its layer
    (r"project_in(\.main)?(\.conv)+\.", "conv_in."),
    (r"project_out(\.main)?\.op_list\.\d(\.conv)+\.", "conv_out."),
    (r"project_out\.op_list\.0\.", "norm_out."),
    (r"\.op_list\.", "."),
    (r"\.context_module\.main\.", ".attn."),
    (r"\.(qkv|proj)\.conv\.", r".\1."),
    (r"\.proj\.norm\.", ".norm."),
    (r"\.aggreg\.", ".multiscale."),
    (r"\.local_module\.main\.(\w+)_conv\.conv\.", r".mlp.conv_\1."),
    (r"\.local_module\.main\.point_conv\.norm\.", ".mlp.norm."),
    (r"\.main\.conv2\.norm\.", ".norm."),
    (r"\.main(\.conv\d)\.conv\.", r"\1."),
    (r"\.main(\.conv)+\.", "."),
    # diffusers
    (r"(down|up)_blocks\.", "stages."),
    (r"(stages\.\d+\.\d+|conv_in|conv_out)\.conv\.", r"\1."),
    (r"(stages\.\d+\.\d+)\.conv_out\.", r"\1.mlp."),
    (r"\.attn\.norm_out\.", ".attn.norm."),
    (r"\.attn\.to_out\.", ".attn.proj."),
    (r"\.to_qkv_multiscale\.(\d+)\.proj_in\.", r".multiscale.\1.0."),
    (r"\.to_qkv_multiscale\.(\d+)\.proj_out\.", r".multiscale.\1.1."),
)


def our_name(name: str) -> str:
    for official, ours in NAME_MAP:
        name = re.sub(official, ours, name)
    return name


def name_rows(model: DCAE, checkpoint: Checkpoint) -> Rows:
    official = {our_name(name): name for name in checkpoint.shapes}
    rows = {}
    for ours in model.state_dict():
        thirds = [official.get(ours.replace(".qkv.", f".to_{third}.")) for third in "qkv"]
        names = tuple(thirds) if ".qkv." in ours and all(thirds) else (official.get(ours, ours),)
        is_linear = ".attn." in ours and len(checkpoint.shapes.get(names[0], ())) == 2
        rows[ours] = (names, to_conv if is_linear else None)
    return rows


# ---- tiles: images too large to hold at once


def tile_starts(length: int, tile: int, stride: int) -> list[int]:
    """Evenly spread from 0 to flush with the end, at most `stride` apart."""
    steps = math.ceil(max(length - tile, 0) / stride)
    return [(length - tile) * i // steps for i in range(steps + 1)] if steps else [0]


def in_tiles(  # a latent is `cell` pixels wide before `function` and `new_cell` after it
    function: Callable, whole: Tensor, cell: int, new_cell: int, tile: int, stride: int
) -> Tensor:
    """Map overlapping tiles, `tile` latents a side, and blend them."""
    rows, cols = whole.shape[-2] // cell, whole.shape[-1] // cell
    if max(rows, cols) <= tile:
        return function(whole)
    total = weight = None
    for top in tile_starts(rows, tile, stride):
        for left in tile_starts(cols, tile, stride):
            y, x = top * cell, left * cell
            piece = function(whole[..., y : y + tile * cell, x : x + tile * cell])
            height, width = piece.shape[-2:]
            if total is None:  # fp32: what is summed here is divided again below
                weight = torch.zeros(rows * new_cell, cols * new_cell, device=piece.device)
                total = weight.expand(*piece.shape[:2], -1, -1).clone()
            # A tile counts by the distance to its nearest edge, where it knows least:
            # over the overlap of two tiles that is a linear cross-fade.
            y, x = (torch.arange(1.0, n + 1, device=piece.device) for n in (height, width))
            ramp = torch.minimum(y, y.flip(0))[:, None] * torch.minimum(x, x.flip(0))  # (h, w)
            y, x = top * new_cell, left * new_cell
            total[..., y : y + height, x : x + width] += piece * ramp
            weight[y : y + height, x : x + width] += ramp
    return (total / weight).to(whole.dtype)


def tiled_encode(model: nn.Module, images: Tensor, tile: int = 1024, stride: int = 896) -> Tensor:
    """As model.encode(images), tile x tile pixels at a time. Any model with a .stride."""
    f = model.stride
    return in_tiles(model.encode, images, f, 1, tile // f, stride // f)


def tiled_decode(model: nn.Module, latents: Tensor, tile: int = 1024, stride: int = 896) -> Tensor:
    f = model.stride
    return in_tiles(model.decode, latents, 1, f, tile // f, stride // f)


# ---- main


def psnr(image: Tensor, other: Tensor) -> float:
    """10 log10(range^2 / mean squared error) in dB, for images in [-1, 1]."""
    return 10 * math.log10(4 / max(F.mse_loss(image, other).item(), 1e-12))


def ssim(image: Tensor, other: Tensor) -> float:
    """Structural similarity (Wang et al. 2004): Gaussian 11 x 11 windows, sigma 1.5."""
    image, other = (image + 1) / 2, (other + 1) / 2  # defined on [0, 1]
    window = torch.exp(-(torch.arange(-5.0, 6.0) ** 2) / (2 * 1.5**2))
    window = (window / window.sum()).to(image)

    def blur(x: Tensor) -> Tensor:  # (B, 3, H, W) -> (B, 3, H - 10, W - 10)
        kernel = window.expand(x.shape[1], 1, 1, -1)
        return F.conv2d(F.conv2d(x, kernel, groups=x.shape[1]), kernel.mT, groups=x.shape[1])

    mean_a, mean_b = blur(image), blur(other)
    var_a, var_b = blur(image**2) - mean_a**2, blur(other**2) - mean_b**2
    cov = blur(image * other) - mean_a * mean_b
    light = (2 * mean_a * mean_b + 0.01**2) / (mean_a**2 + mean_b**2 + 0.01**2)
    return (light * (2 * cov + 0.03**2) / (var_a + var_b + 0.03**2)).mean().item()


def pad_to_multiple(images: Tensor, multiple: int) -> Tensor:
    """Repeat the last row and column: (B, 3, H, W) -> the next multiples of both sides."""
    height, width = images.shape[-2:]
    return F.pad(images, (0, -width % multiple, 0, -height % multiple), mode="replicate")


def to_pixels(images: Tensor) -> Tensor:
    """(..., 3, H, W) in [-1, 1] -> 8 bits (..., H, W, 3) on the CPU, converted where they lie."""
    pixels = ((images.float().clamp(-1, 1) + 1) * 127.5).round().byte()
    return pixels.movedim(-3, -1).contiguous().cpu()


def to_pil(image: Tensor) -> Image.Image:
    """(3, H, W) in [-1, 1] -> a picture."""
    return Image.fromarray(to_pixels(image).numpy())


@torch.no_grad()
def main() -> None:
    config = parse_config(Config, __doc__)
    device, dtype = pick_device(config.device), pick_dtype(config.dtype)
    image = open_image(config.image)[None]  # (1, 3, H, W)
    model = DCAE.from_pretrained(config.model, device, dtype, weights=config.weights)
    padded = pad_to_multiple(image, model.stride)
    (height, width), (tall, wide) = image.shape[-2:], padded.shape[-2:]
    tiled = tall * wide > TILES_ABOVE
    note = f", padded to {wide}x{tall}" * (padded.shape != image.shape) + ", in tiles" * tiled
    print(f"dcae | {config.model} | {config.image} {width}x{height}{note} | {device} {dtype}")

    images = padded.to(device, dtype)
    latents = tiled_encode(model, images) if tiled else model.encode(images)  # (1, C, h, w)
    decoded = tiled_decode(model, latents) if tiled else model.decode(latents)
    decoded = decoded[..., :height, :width].float().cpu()
    if not decoded.isfinite().all():
        cure = "look at the weights" if dtype == torch.float32 else "pass --dtype fp32"
        raise UserError(f"the reconstruction overflows in {config.dtype}: {cure}")
    decoded = decoded.clamp(-1, 1)
    difference = 4 * (decoded - image).abs() - 1  # black where equal
    sheet = to_pil(torch.cat([image, decoded, difference], -1)[0])
    try:
        write_whole(Path(config.out), sheet.save)
    except (OSError, ValueError) as error:
        raise UserError(f"{config.out} cannot be written ({error}): wanted a .png") from None

    figures = {
        "psnr": round(psnr(image, decoded), 2),
        "ssim": round(ssim(image, decoded), 4) if min(height, width) >= 11 else None,
        "latents": list(latents.shape[1:]),
        "latents_std": round(latents.float().std().item(), 4),
        "compression": round(padded.numel() / latents.numel(), 2),
    }
    print(f"saved  {config.out}: original | reconstruction | 4 x difference")
    print(json.dumps(figures | {"model": config.model, "image": config.image, "out": config.out}))


if __name__ == "__main__":
    exit_cleanly(main)
