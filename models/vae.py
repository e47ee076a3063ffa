"""The FLUX autoencoder: 8 times smaller a side, 16 channels. What DC-Gen moves away from.

What    encode: (B, 3, H, W) pixels -> (B, 16, H/8, W/8) latents; decode: the way back.
How     Residual convolutions at four resolutions, one attention layer at the coarsest. The encoder
        predicts a Gaussian per latent value; training pulls it towards N(0, 1) a little (KL), which
        keeps the latent space free of holes. Sampling takes the mean or draws from it:
            latents = (mean + exp(logvar / 2) * noise - shift) * scale
Source  The architecture of Rombach et al., arXiv 2112.10752, with the widths, names and shapes of
        FLUX's ae.safetensors (black-forest-labs/flux, Apache 2.0).
"""

import re
from collections import OrderedDict
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.script import UserError
from models.weights import Checkpoint, Rows, assign, build, open_model, to_conv

NORM_EPS = 1e-6

# ---- model


class ResnetBlock(nn.Module):
    def __init__(self, width: int, new_width: int, groups: int):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, width, NORM_EPS)
        self.conv1 = nn.Conv2d(width, new_width, 3, padding=1)
        self.norm2 = nn.GroupNorm(groups, new_width, NORM_EPS)
        self.conv2 = nn.Conv2d(new_width, new_width, 3, padding=1)
        self.nin_shortcut = nn.Identity() if width == new_width else nn.Conv2d(width, new_width, 1)

    def forward(self, hidden: Tensor) -> Tensor:  # (B, width, h, w)
        new = self.conv1(F.silu(self.norm1(hidden)))  # (B, new_width, h, w)
        new = self.conv2(F.silu(self.norm2(new)))
        return self.nin_shortcut(hidden) + new


class AttnBlock(nn.Module):
    """Every pixel of the coarsest grid looks at every other: one head as wide as the network."""

    def __init__(self, width: int, groups: int):
        super().__init__()
        self.norm = nn.GroupNorm(groups, width, NORM_EPS)
        self.q = nn.Conv2d(width, width, 1)
        self.k = nn.Conv2d(width, width, 1)
        self.v = nn.Conv2d(width, width, 1)
        self.proj_out = nn.Conv2d(width, width, 1)

    def forward(self, hidden: Tensor) -> Tensor:  # (B, D, h, w)
        normed = self.norm(hidden)
        # Rows of D numbers each: for transposed views PyTorch would write the whole (h w)^2 matrix.
        query, key, value = (
            conv(normed).flatten(2).mT[:, None].contiguous() for conv in (self.q, self.k, self.v)
        )  # (B, 1, h w, D) each
        mixed = F.scaled_dot_product_attention(query, key, value)
        mixed = mixed[:, 0].mT.unflatten(2, hidden.shape[-2:])  # (B, D, h, w)
        return hidden + self.proj_out(mixed)


class Mid(nn.Module):
    def __init__(self, width: int, groups: int, attention: bool):
        super().__init__()
        self.block_1 = ResnetBlock(width, width, groups)
        self.attn_1 = AttnBlock(width, groups) if attention else nn.Identity()
        self.block_2 = ResnetBlock(width, width, groups)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.block_2(self.attn_1(self.block_1(hidden)))


class Downsample(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, stride=2)

    def forward(self, hidden: Tensor) -> Tensor:  # (B, D, h, w) -> (B, D, h/2, w/2)
        return self.conv(F.pad(hidden, (0, 1, 0, 1)))  # right and bottom only, as trained


class Upsample(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, hidden: Tensor) -> Tensor:  # (B, D, h, w) -> (B, D, 2h, 2w)
        return self.conv(F.interpolate(hidden, scale_factor=2, mode="nearest"))


def level(width: int, new_width: int, depth: int, groups: int, **step: nn.Module) -> nn.Sequential:
    """(B, width, h, w): `depth` blocks to the new width, then the named step to another grid."""
    widths = [width] + [new_width] * (depth - 1)
    blocks = nn.Sequential(*(ResnetBlock(old, new_width, groups) for old in widths))
    return nn.Sequential(OrderedDict(block=blocks, **step))


class Encoder(nn.Module):
    def __init__(self, config: dict):
        super().__init__()
        widths, groups = config["block_out_channels"], config["norm_num_groups"]
        self.conv_in = nn.Conv2d(config["in_channels"], widths[0], 3, padding=1)
        self.down = nn.Sequential()
        for i, width in enumerate(widths):
            step = Downsample(width) if i + 1 < len(widths) else nn.Identity()
            sizes = (widths[max(i - 1, 0)], width, config["layers_per_block"], groups)
            self.down.append(level(*sizes, downsample=step))
        self.mid = Mid(widths[-1], groups, config["mid_block_add_attention"])
        self.norm_out = nn.GroupNorm(groups, widths[-1], NORM_EPS)
        self.conv_out = nn.Conv2d(widths[-1], 2 * config["latent_channels"], 3, padding=1)

    def forward(self, images: Tensor) -> Tensor:  # (B, 3, H, W)
        hidden = self.mid(self.down(self.conv_in(images)))  # (B, widths[-1], h, w)
        return self.conv_out(F.silu(self.norm_out(hidden)))  # (B, 2C, h, w), mean and log variance


class Decoder(nn.Module):
    """`up` is indexed by resolution, 0 = full size, and runs from the last to the first."""

    def __init__(self, config: dict):
        super().__init__()
        widths, groups = config["block_out_channels"], config["norm_num_groups"]
        self.conv_in = nn.Conv2d(config["latent_channels"], widths[-1], 3, padding=1)
        self.mid = Mid(widths[-1], groups, config["mid_block_add_attention"])
        self.up = nn.ModuleList()
        for i, width in enumerate(widths):
            step = Upsample(width) if i > 0 else nn.Identity()
            wider = widths[min(i + 1, len(widths) - 1)]
            sizes = (wider, width, config["layers_per_block"] + 1, groups)
            self.up.append(level(*sizes, upsample=step))
        self.norm_out = nn.GroupNorm(groups, widths[0], NORM_EPS)
        self.conv_out = nn.Conv2d(widths[0], config["out_channels"], 3, padding=1)

    def forward(self, latents: Tensor) -> Tensor:  # (B, C, h, w)
        hidden = self.mid(self.conv_in(latents))
        for resolution in reversed(self.up):
            hidden = resolution(hidden)  # (B, widths[0], H, W) at the end
        return self.conv_out(F.silu(self.norm_out(hidden)))  # (B, 3, H, W)


class FluxVAE(nn.Module):
    """The keywords are the keys of config.json in diffusers' format, the defaults FLUX's values."""

    def __init__(
        self,
        in_channels: int = 3,
        out_channels: int = 3,
        block_out_channels: list[int] = (128, 256, 512, 512),
        layers_per_block: int = 2,
        latent_channels: int = 16,
        norm_num_groups: int = 32,
        mid_block_add_attention: bool = True,
        scaling_factor: float = 0.3611,
        shift_factor: float | None = 0.1159,
    ):
        config = {k: v for k, v in locals().items() if k not in ("self", "__class__")}
        super().__init__()
        self.config = config
        self.latent_channels, self.scaling_factor = latent_channels, scaling_factor
        self.shift_factor = shift_factor or 0.0
        self.stride = 2 ** (len(block_out_channels) - 1)
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
    ) -> "FluxVAE":
        """A file, a folder, a preset or a hub id, in BFL's names (which are ours) or diffusers'."""
        checkpoint, config, run = open_model(path, PRESETS, "vae", config, weights)
        if config is None and "encoder.down.0.block.0.conv1.weight" in checkpoint.shapes:
            config = {}  # BFL's files carry none: FLUX's
        model = build(cls, config and only_ours(config), checkpoint.path)
        assign(model, name_rows(model, checkpoint), checkpoint, device, dtype, run)
        return model.eval()

    def moments(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log variance of the raw (unscaled) latent; training needs both for its KL."""
        height, width = images.shape[-2:]
        assert height % self.stride == 0 and width % self.stride == 0, (
            f"image of {width}x{height}: both sides must be multiples of {self.stride}"
        )
        images = images.to(self.encoder.conv_in.weight.dtype)
        mean, logvar = self.encoder(images).chunk(2, 1)  # (B, C, h, w) each
        return mean, logvar.clamp(-30, 20)  # exp stays finite

    def encode(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Latents (B, C, h, w): the mean, or with a generator a sample."""
        raw, logvar = self.moments(images)
        if generator is not None:
            noise = torch.randn(raw.shape, generator=generator, device=generator.device)
            raw = raw + torch.exp(0.5 * logvar) * noise.to(raw)
        return (raw - self.shift_factor) * self.scaling_factor

    def decode(self, latents: Tensor) -> Tensor:  # (B, C, h, w) -> (B, 3, H, W)
        raw = latents / self.scaling_factor + self.shift_factor
        return self.decoder(raw.to(self.decoder.conv_in.weight.dtype))

    def forward(self, images: Tensor) -> Tensor:
        return self.decode(self.encode(images))


# ---- official weights

PRESETS = {
    "flux-vae-toy": {"path": "models/toy/flux-vae.safetensors"},
    "flux-vae": {"hub": "black-forest-labs/FLUX.1-schnell", "file": "ae.safetensors", "config": {}},
}

# Keys of diffusers' config.json that this class has one answer to, and those without effect.
FIXED = {"act_fn": "silu", "use_quant_conv": False, "use_post_quant_conv": False}
FIXED |= {"latents_mean": None, "latents_std": None}
UNUSED = ("down_block_types", "up_block_types", "sample_size", "force_upcast")

NAME_MAP = (  # diffusers' name -> BFL's, one rule after the other; BFL's pass unchanged
    (r"\.conv_norm_out\.", ".norm_out."),
    (r"\.down_blocks\.(\d+)\.", r".down.\1."),
    (r"\.resnets\.", ".block."),
    (r"\.conv_shortcut\.", ".nin_shortcut."),
    (r"\.downsamplers\.0\.", ".downsample."),
    (r"\.upsamplers\.0\.", ".upsample."),
    (r"\.mid_block\.block\.0\.", ".mid.block_1."),
    (r"\.mid_block\.block\.1\.", ".mid.block_2."),
    (r"\.mid_block\.attentions\.0\.", ".mid.attn_1."),
    (r"\.attn_1\.group_norm\.", ".attn_1.norm."),
    (r"\.attn_1\.to_([qkv])\.", r".attn_1.\1."),
    (r"\.attn_1\.to_out\.0\.", ".attn_1.proj_out."),
)


def only_ours(config: dict) -> dict:
    for key, value in FIXED.items():
        if config.get(key, value) != value:
            raise UserError(f"{key} is {config[key]!r} in the config, FluxVAE has {value!r} only")
    return {key: value for key, value in config.items() if key not in (*FIXED, *UNUSED)}


def our_name(name: str, levels: int) -> str:
    for official, ours in NAME_MAP:
        name = re.sub(official, ours, name)
    # diffusers counts the decoder's levels from the coarsest, BFL from the finest.
    return re.sub(r"\.up_blocks\.(\d+)\.", lambda m: f".up.{levels - 1 - int(m[1])}.", name)


def name_rows(model: FluxVAE, checkpoint: Checkpoint) -> Rows:
    levels = len(model.config["block_out_channels"])
    official = {our_name(name, levels): name for name in checkpoint.shapes}
    rows = {}
    for ours in model.state_dict():
        name = official.get(ours, ours)
        is_linear = ".attn_1." in ours and len(checkpoint.shapes.get(name, ())) == 2
        rows[ours] = ((name,), to_conv if is_linear else None)
    return rows
