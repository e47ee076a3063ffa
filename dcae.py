"""DC-AE: an autoencoder that shrinks an image 32 or 64 times a side and still gives it back."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ACTIVATIONS = {"relu": F.relu, "silu": F.silu}

# ---- model: shortcuts without weights


def average_channels(hidden: Tensor, channels: int) -> Tensor:
    """Down to `channels`: the mean of every run of consecutive channels."""
    if hidden.shape[1] == channels:
        return hidden
    return hidden.unflatten(1, (channels, -1)).mean(2)      # (B, channels, h, w)


def repeat_channels(hidden: Tensor, channels: int) -> Tensor:
    """Up to `channels`: every channel repeated in place."""
    repeats = channels // hidden.shape[1]
    return hidden[:, :, None].expand(-1, -1, repeats, -1, -1).flatten(1, 2)  # (B, channels, h, w)


class Downsample(nn.Conv2d):
    """Half the grid: a 3x3 convolution corrects what moving pixels into channels gives for free."""

    def __init__(self, width: int, new_width: int, kind: str, shortcut: bool = True):
        unshuffle = kind == "pixel_unshuffle"  # every other spelling is the strided convolution
        super().__init__(
            width,
            new_width // 4 if unshuffle else new_width,
            kernel_size=3,
            stride=1 if unshuffle else 2,
            padding=1,
        )
        self.new_width, self.unshuffle, self.shortcut = new_width, unshuffle, shortcut

    def forward(self, hidden: Tensor) -> Tensor:            # (B, width, H, W)
        learned = super().forward(hidden)
        if self.unshuffle:
            learned = F.pixel_unshuffle(learned, 2)         # (B, new_width, H/2, W/2)
        if not self.shortcut:
            return learned
        return learned + average_channels(F.pixel_unshuffle(hidden, 2), self.new_width)


class Upsample(nn.Conv2d):
    """Twice the grid: the mirror image, channels move back into pixels."""

    def __init__(self, width: int, new_width: int, kind: str, shortcut: bool = True):
        interpolate = kind == "interpolate"
        super().__init__(width, new_width if interpolate else 4 * new_width, 3, padding=1)
        self.new_width, self.interpolate, self.shortcut = new_width, interpolate, shortcut

    def forward(self, hidden: Tensor) -> Tensor:            # (B, width, h, w)
        if self.interpolate:
            learned = super().forward(F.interpolate(hidden, scale_factor=2, mode="nearest"))
        else:
            learned = F.pixel_shuffle(super().forward(hidden), 2)  # (B, new_width, 2h, 2w)
        if not self.shortcut:
            return learned
        return learned + F.pixel_shuffle(repeat_channels(hidden, 4 * self.new_width), 2)


# ---- model: blocks


class RMSNorm(nn.Module):
    """hidden / sqrt(mean_c hidden^2 + eps) * weight + bias, at every pixel on its own."""

    def __init__(self, width: int, eps: float = 1e-5):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width))
        self.eps = eps

    def forward(self, hidden: Tensor) -> Tensor:            # (B, C, h, w)
        # Statistics in fp32: bf16 keeps two to three digits, too few for a sum of 1024 squares.
        mean_square = hidden.float().square().mean(1, keepdim=True)
        normed = hidden * torch.rsqrt(mean_square + self.eps)
        return (normed * self.weight[:, None, None] + self.bias[:, None, None]).type_as(hidden)


def make_norm(kind: str, width: int) -> nn.Module:
    return {"rms_norm": RMSNorm, "batch_norm": nn.BatchNorm2d}[kind](width)


class ResBlock(nn.Module):
    def __init__(self, width: int, norm: str, act: str):
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm = make_norm(norm, width)
        self.act = ACTIVATIONS[act]

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden + self.norm(self.conv2(self.act(self.conv1(hidden))))


def linear_attention(query: Tensor, key: Tensor, value: Tensor, eps: float = 1e-15) -> Tensor:
    """out_n = sum_m (q_n . k_m) v_m / (sum_m q_n . k_m + eps), reordered: N hd^2, not N^2 hd."""
    summary = value @ key.mT                                # (B, nh, hd, hd), all a query needs
    total = key.sum(-1, keepdim=True).mT                    # (B, nh, 1, hd)
    return (summary @ query) / (total @ query + eps)        # (B, nh, hd, N)


class Attention(nn.Module):
    """ReLU linear attention; each extra scale adds heads that see k x k neighbourhoods."""

    def __init__(self, width: int, head_dim: int, scales: list[int], norm: str):
        super().__init__()
        self.head_dim = head_dim
        heads = width // head_dim
        inner = 3 * heads * head_dim
        self.qkv = nn.Conv2d(width, inner, 1, bias=False)
        self.multiscale = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(inner, inner, k, padding=k // 2, groups=inner, bias=False),
                nn.Conv2d(inner, inner, 1, groups=3 * heads, bias=False),
            )
            for k in scales
        )
        self.proj = nn.Conv2d(heads * head_dim * (1 + len(scales)), width, 1, bias=False)
        self.norm = make_norm(norm, width)

    def forward(self, hidden: Tensor) -> Tensor:            # (B, C, h, w)
        grid = hidden.shape[-2:]
        qkv = self.qkv(hidden)                              # (B, 3C, h, w)
        qkv = torch.cat([qkv, *(scale(qkv) for scale in self.multiscale)], 1)
        # Channels are (head, q|k|v, hd): the thirds of one head lie together, those of C do not.
        # Sums over all pixels overflow fp16 and blur in bf16: fp32, also under autocast.
        with torch.autocast(hidden.device.type, enabled=False):
            query, key, value = (
                qkv.float().flatten(2).unflatten(1, (-1, 3, self.head_dim)).unbind(2)
            )                                               # (B, nh, hd, N) each
            mixed = linear_attention(query.relu(), key.relu(), value)
        mixed = mixed.type_as(qkv).flatten(1, 2).unflatten(2, grid)  # (B, nh hd, h, w)
        return hidden + self.norm(self.proj(mixed))


class GLUMBConv(nn.Module):
    """Gated inverted bottleneck: expand 8x, mix 3x3 neighbours per channel, gate, project back."""

    def __init__(self, width: int):
        super().__init__()
        self.conv_inverted = nn.Conv2d(width, 8 * width, 1)
        self.conv_depth = nn.Conv2d(8 * width, 8 * width, 3, padding=1, groups=8 * width)
        self.conv_point = nn.Conv2d(4 * width, width, 1, bias=False)
        self.norm = RMSNorm(width)

    def forward(self, hidden: Tensor) -> Tensor:
        value, gate = self.conv_depth(F.silu(self.conv_inverted(hidden))).chunk(2, 1)
        return hidden + self.norm(self.conv_point(value * F.silu(gate)))


class EfficientViTBlock(nn.Module):
    def __init__(self, width: int, head_dim: int, scales: list[int], norm: str):
        super().__init__()
        self.attn = Attention(width, head_dim, scales, norm)
        self.mlp = GLUMBConv(width)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.mlp(self.attn(hidden))


# ---- model: encoder, decoder


def make_blocks(
    kind: str, count: int, width: int, head_dim: int, scales: list[int], norm: str, act: str
) -> list[nn.Module]:
    if kind == "ResBlock":
        return [ResBlock(width, norm, act) for _ in range(count)]
    return [EfficientViTBlock(width, head_dim, scales, norm) for _ in range(count)]


def per_stage(value: str | list[str], stages: int) -> list[str]:
    return [value] * stages if isinstance(value, str) else value


class Encoder(nn.Module):
    """Stage s works at 1/2^s of the image and ends with the step down to stage s + 1.

    When stage 0 is empty conv_in takes that step, straight from the pixels.
    """

    def __init__(
        self,
        in_channels: int,
        latent_channels: int,
        head_dim: int,
        block_types: str | list[str],
        widths: list[int],
        depths: list[int],
        scales: list[list[int]],
        downsample: str,
        shortcut: bool,
    ):
        super().__init__()
        block_types = per_stage(block_types, len(widths))
        if depths[0] > 0:
            self.conv_in = nn.Conv2d(in_channels, widths[0], 3, padding=1)
        else:
            self.conv_in = Downsample(in_channels, widths[1], downsample, shortcut=False)
        self.stages = nn.ModuleList()
        for s, (width, depth) in enumerate(zip(widths, depths, strict=True)):
            stage = make_blocks(
                block_types[s], depth, width, head_dim, scales[s], "rms_norm", "silu"
            )
            if s + 1 < len(widths) and (s > 0 or depth > 0):
                stage.append(Downsample(width, widths[s + 1], downsample))
            self.stages.append(nn.Sequential(*stage))
        self.conv_out = nn.Conv2d(widths[-1], latent_channels, 3, padding=1)
        self.latent_channels, self.shortcut = latent_channels, shortcut

    def forward(self, image: Tensor) -> Tensor:             # (B, 3, H, W)
        hidden = self.conv_in(image)
        for stage in self.stages:
            hidden = stage(hidden)                          # (B, widths[-1], h, w) at the end
        latents = self.conv_out(hidden)                     # (B, C, h, w)
        if self.shortcut:
            latents = latents + average_channels(hidden, self.latent_channels)
        return latents


class Decoder(nn.Module):
    """The same stages run backwards: the step up comes first, then the blocks."""

    def __init__(
        self,
        in_channels: int,
        latent_channels: int,
        head_dim: int,
        block_types: str | list[str],
        widths: list[int],
        depths: list[int],
        scales: list[list[int]],
        norms: str | list[str],
        acts: str | list[str],
        upsample: str,
        shortcut: bool,
        last_act: str,
    ):
        super().__init__()
        block_types, norms, acts = (per_stage(v, len(widths)) for v in (block_types, norms, acts))
        self.conv_in = nn.Conv2d(latent_channels, widths[-1], 3, padding=1)
        self.stages = nn.ModuleList()
        for s, (width, depth) in enumerate(zip(widths, depths, strict=True)):
            kind, norm, act = block_types[s], norms[s], acts[s]
            stage = make_blocks(kind, depth, width, head_dim, scales[s], norm, act)
            if s + 1 < len(widths) and (s > 0 or depth > 0):
                stage.insert(0, Upsample(widths[s + 1], width, upsample))
            self.stages.append(nn.Sequential(*stage))
        if depths[0] > 0:
            self.norm_out = RMSNorm(widths[0])
            self.conv_out = nn.Conv2d(widths[0], in_channels, 3, padding=1)
        else:
            self.norm_out = RMSNorm(widths[1])
            self.conv_out = Upsample(widths[1], in_channels, upsample, shortcut=False)
        self.width, self.shortcut, self.last_act = widths[-1], shortcut, ACTIVATIONS[last_act]

    def forward(self, latents: Tensor) -> Tensor:           # (B, C, h, w)
        hidden = self.conv_in(latents)                      # (B, widths[-1], h, w)
        if self.shortcut:
            hidden = hidden + repeat_channels(latents, self.width)
        for stage in reversed(self.stages):
            hidden = stage(hidden)                          # (B, widths[0], H, W) at the end
        return self.conv_out(self.last_act(self.norm_out(hidden)))  # (B, 3, H, W)


class DCAE(nn.Module):
    """The keywords are the keys of config.json in diffusers' format; so are the defaults."""

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
        scaling_factor: float = 1.0,
    ):
        config = {k: v for k, v in locals().items() if k not in ("self", "__class__")}
        super().__init__()
        self.config = config
        self.latent_channels, self.scaling_factor = latent_channels, scaling_factor
        self.stride = 2 ** (len(encoder_block_out_channels) - 1)
        self.encoder = Encoder(
            in_channels,
            latent_channels,
            attention_head_dim,
            encoder_block_types,
            encoder_block_out_channels,
            encoder_layers_per_block,
            encoder_qkv_multiscales,
            downsample_block_type,
            encoder_out_shortcut,
        )
        self.decoder = Decoder(
            in_channels,
            latent_channels,
            attention_head_dim,
            decoder_block_types,
            decoder_block_out_channels,
            decoder_layers_per_block,
            decoder_qkv_multiscales,
            decoder_norm_types,
            decoder_act_fns,
            upsample_block_type,
            decoder_in_shortcut,
            decoder_conv_act_fn,
        )

    def encode(self, images: Tensor) -> Tensor:             # (B, 3, H, W) -> (B, C, h, w)
        height, width = images.shape[-2:]
        assert height % self.stride == 0 and width % self.stride == 0, (
            f"image of {width}x{height}: both sides must be multiples of {self.stride}"
        )
        return self.encoder(images) * self.scaling_factor

    def decode(self, latents: Tensor) -> Tensor:            # (B, C, h, w) -> (B, 3, H, W)
        return self.decoder(latents / self.scaling_factor)

    def forward(self, images: Tensor) -> Tensor:
        return self.decode(self.encode(images))
