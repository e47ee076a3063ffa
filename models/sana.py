"""SANA: a transformer with self-attention linear in the tokens, one token a latent pixel.

What    20 blocks (1.6B): linear self-attention, cross-attention to the text, convolutional MLP.
Why     Without a softmax, (q k^T) v = q (k^T v): the N x N matrix of scores is never formed. What
        that loses in precision, a 3x3 depthwise convolution in the MLP gives back. It also sees
        positions, so that models for 512 and 1024 pixels need no positional embedding.
Latents 32 channels at f32 (DC-AE); DC-Gen-SANA: 128 channels at f64, the same class.
Names   Tensors are named as in NVlabs' .pth files; diffusers' names are mapped below.
Source  SANA, arXiv 2410.10629, and SANA-1.5, arXiv 2501.18427 (normalised q and k);
        github.com/NVlabs/Sana (Apache 2.0), written anew from names and numbers.
"""

import math
import re
from collections import OrderedDict
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.adapters import read_adapters
from models.weights import Rows, assign, build, open_model, rows_of

QK_NORM = "rms_norm_across_heads"  # of SANA-1.5
QK_NORM_EPS = 1e-5
TEXT_NORM_EPS = 1e-5
FINAL_NORM_EPS = 1e-6
ATTENTION_EPS = 1e-15  # only for a token whose q or all whose k are 0 after the ReLU
SINUSOID_CHANNELS = 256  # of the timestep embedding
PADDED = -10_000.0  # added to a padded token's logit; finite: no row of the softmax is NaN


def named(**modules: nn.Module) -> nn.Sequential:
    """Modules in a row, under the names that the checkpoints give them."""
    return nn.Sequential(OrderedDict(modules))


# ---- positions and embeddings


def thousandths(timestep: Tensor) -> Tensor:
    """[0, 1] -> [0, 1000] in fp32, where 999 / 1000 comes back as 999 and not as 999.00006.

    SANA's DPM solver gives its model whole numbers; anything else passes as it is.
    """
    scaled = 1000 * timestep.float()
    whole = scaled.round()
    return torch.where((scaled - whole).abs() < 1e-4, whole, scaled)


def sinusoid(value: Tensor) -> Tensor:
    """(B,) -> (B, 256): cos and sin of value * 10000^(-j / 128), in fp32."""
    half = SINUSOID_CHANNELS // 2
    index = torch.arange(half, device=value.device, dtype=torch.float32)
    angle = value[:, None] * torch.exp(-math.log(10_000) * index / half)  # (B, 128)
    return torch.cat((angle.cos(), angle.sin()), dim=-1)  # (B, 256)


class PositionEmbedder(nn.Module):
    """Positions of the 2K and 4K models. A module: a sampler computes it once for all steps."""

    def __init__(self, width: int, base_size: int, scale: float):
        super().__init__()
        self.width, self.base_size, self.scale = width, base_size, scale

    def forward(self, grid: tuple[int, int], device: torch.device) -> Tensor:
        """(N, D): sin and cos of the column in the first half of D, of the row in the second.

        Any grid is stretched over base_size / scale positions a side.
        """
        # fp64 as in the reference; Apple's GPUs have none.
        dtype = torch.float32 if device.type == "mps" else torch.float64
        exact = {"device": device, "dtype": dtype}
        rows, cols = (torch.arange(n, **exact) * (self.base_size / n / self.scale) for n in grid)
        row, col = torch.meshgrid(rows, cols, indexing="ij")  # (h, w) each
        quarter = self.width // 4
        frequency = 10_000 ** -(torch.arange(quarter, **exact) / quarter)
        position = torch.stack((col, row), dim=-1).flatten(0, 1)  # (N, 2)
        angle = position[..., None] * frequency  # (N, 2, D / 4)
        return torch.cat((angle.sin(), angle.cos()), dim=-1).flatten(1).float()  # (N, D)


# ---- parts of a block


class RMSNorm(nn.Module):
    """Unit mean square over all D channels, in fp32; the result has the dtype of the input.

    Not nn.RMSNorm: under autocast that gives fp32 from torch 2.12 on, and bf16 before.
    """

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, hidden: Tensor) -> Tensor:
        normed = F.rms_norm(hidden.float(), self.weight.shape, self.weight.float(), self.eps)
        return normed.type_as(hidden)


def modulate(hidden: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    return F.layer_norm(hidden, hidden.shape[-1:], eps=eps) * (1 + scale) + shift


def linear_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T) v with relu(q) relu(k)^T for the exponential; (B, nh, N, hd) each.

    out_n = q_n (sum_m k_m^T v_m) / (q_n . sum_m k_m), with q and k after the ReLU.
    """
    # fp32, autocast or not: the sums run over every token of the image.
    # (The meta device, which counts operations, has no autocast of its own.)
    with torch.autocast("cpu" if q.is_meta else q.device.type, enabled=False):
        q, k, v = F.relu(q).float(), F.relu(k).float(), v.float()
        context = k.transpose(-1, -2) @ v  # (B, nh, hd, hd)
        total = k.sum(dim=-2)[..., None]  # (B, nh, hd, 1)
        return (q @ context) / (q @ total + ATTENTION_EPS)


class LinearSelfAttention(nn.Module):
    def __init__(self, width: int, head_dim: int, bias: bool, qk_norm: bool):
        super().__init__()
        self.head_dim = head_dim
        self.qkv = nn.Linear(width, 3 * width, bias=bias)
        self.proj = nn.Linear(width, width)
        self.q_norm = RMSNorm(width, QK_NORM_EPS) if qk_norm else nn.Identity()
        self.k_norm = RMSNorm(width, QK_NORM_EPS) if qk_norm else nn.Identity()

    def forward(self, hidden: Tensor) -> Tensor:
        q, k, v = self.qkv(hidden).chunk(3, dim=-1)  # (B, N, D) each
        q, k, v = (
            part.unflatten(2, (-1, self.head_dim)).transpose(1, 2)  # (B, nh, N, hd)
            for part in (self.q_norm(q), self.k_norm(k), v)
        )
        out = linear_attention(q, k, v).transpose(1, 2).flatten(2)  # (B, N, D)
        out = self.proj(out.type_as(v))  # (B, N, D)
        return out.clip(-65504, 65504) if out.dtype == torch.float16 else out  # fp16 ends there


class CrossAttention(nn.Module):
    """Ordinary attention from image tokens to text tokens, with few and wide heads."""

    def __init__(self, width: int, heads: int, head_dim: int, qk_norm: bool):
        super().__init__()
        inner = heads * head_dim
        self.head_dim = head_dim
        self.q_linear = nn.Linear(width, inner)
        self.kv_linear = nn.Linear(width, 2 * inner)
        self.proj = nn.Linear(inner, width)
        self.q_norm = RMSNorm(inner, QK_NORM_EPS) if qk_norm else nn.Identity()
        self.k_norm = RMSNorm(inner, QK_NORM_EPS) if qk_norm else nn.Identity()

    def forward(self, hidden: Tensor, text: Tensor, bias: Tensor, attention: Callable) -> Tensor:
        q = self.q_linear(hidden)  # (B, N, D)
        k, v = self.kv_linear(text).chunk(2, dim=-1)  # (B, L, D) each
        q, k, v = (
            channels.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)  # (B, nh, N or L, hd)
            for channels in (self.q_norm(q), self.k_norm(k), v)
        )
        out = attention(q, k, v, attn_mask=bias.to(q.dtype))  # (B, nh, N, hd)
        return self.proj(out.transpose(1, 2).flatten(2))  # (B, N, D)


class ConvMLP(nn.Module):
    """Expand, look at the eight neighbours, gate, contract ("Mix-FFN")."""

    def __init__(self, width: int, ratio: float):
        super().__init__()
        inner = int(ratio * width)
        self.inverted_conv = named(conv=nn.Conv2d(width, 2 * inner, 1))
        depthwise = nn.Conv2d(2 * inner, 2 * inner, 3, padding=1, groups=2 * inner)
        self.depth_conv = named(conv=depthwise)
        self.point_conv = named(conv=nn.Conv2d(inner, width, 1, bias=False))

    def forward(self, hidden: Tensor, grid: tuple[int, int]) -> Tensor:
        image = hidden.unflatten(1, grid).permute(0, 3, 1, 2)  # (B, D, h, w)
        image = self.depth_conv(F.silu(self.inverted_conv(image)))  # (B, 5D, h, w)
        value, gate = image.chunk(2, dim=1)
        return self.point_conv(value * F.silu(gate)).flatten(2).transpose(1, 2)  # (B, N, D)


# ---- blocks


class SanaBlock(nn.Module):
    """Modulated by its own table plus a vector that all blocks share ("adaLN-single")."""

    def __init__(self, width: int, config: dict):
        super().__init__()
        qk_norm = config["qk_norm"] is not None
        heads, head_dim = config["num_cross_attention_heads"], config["cross_attention_head_dim"]
        self.eps = config["norm_eps"]
        self.scale_shift_table = nn.Parameter(torch.randn(6, width) / width**0.5)
        self.attn = LinearSelfAttention(
            width, config["attention_head_dim"], config["attention_bias"], qk_norm
        )
        self.cross_attn = CrossAttention(width, heads, head_dim, qk_norm)
        self.mlp = ConvMLP(width, config["mlp_ratio"])

    def forward(
        self,
        hidden: Tensor,  # (B, N, D)
        text: Tensor,  # (B, L, D)
        text_bias: Tensor,  # (B, 1, 1, L)
        condition: Tensor,  # (B, 6, D)
        grid: tuple[int, int],
        attention: Callable,
    ) -> Tensor:
        modulation = (self.scale_shift_table + condition).chunk(6, dim=1)  # (B, 1, D) each
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = modulation
        attended = self.attn(modulate(hidden, shift, scale, self.eps))
        hidden = hidden + gate * attended
        # The text is added with neither norm nor gate.
        hidden = hidden + self.cross_attn(hidden, text, text_bias, attention)
        branch = self.mlp(modulate(hidden, mlp_shift, mlp_scale, self.eps), grid)
        return hidden + mlp_gate * branch


class FinalLayer(nn.Module):
    """Modulated LayerNorm, then back to latent channels."""

    def __init__(self, width: int, out_channels: int):
        super().__init__()
        self.linear = nn.Linear(width, out_channels)
        self.scale_shift_table = nn.Parameter(torch.randn(2, width) / width**0.5)

    def forward(self, hidden: Tensor, condition: Tensor) -> Tensor:
        shift, scale = (self.scale_shift_table + condition[:, None]).chunk(2, dim=1)  # (B, 1, D)
        return self.linear(modulate(hidden, shift, scale, FINAL_NORM_EPS))


# ---- model


class Sana(nn.Module):
    def __init__(
        self,
        in_channels: int = 32,
        out_channels: int | None = 32,  # None: in_channels
        num_attention_heads: int = 70,
        attention_head_dim: int = 32,
        num_layers: int = 20,
        num_cross_attention_heads: int = 20,
        cross_attention_head_dim: int = 112,
        cross_attention_dim: int = 2240,
        caption_channels: int = 2304,  # Gemma-2-2b
        mlp_ratio: float = 2.5,
        dropout: float = 0.0,
        attention_bias: bool = False,
        sample_size: int = 32,  # latent pixels a side it was trained for
        patch_size: int = 1,
        norm_elementwise_affine: bool = False,
        norm_eps: float = 1e-6,
        interpolation_scale: float | None = None,  # not None: positional embedding (2K, 4K)
        guidance_embeds: bool = False,
        guidance_embeds_scale: float = 0.1,
        qk_norm: str | None = None,  # "rms_norm_across_heads": SANA-1.5
        timestep_scale: float = 1.0,
    ):
        config = {k: v for k, v in locals().items() if k not in ("self", "__class__")}
        width = num_attention_heads * attention_head_dim
        unknown = guidance_embeds or dropout or qk_norm not in (None, QK_NORM)
        if unknown or cross_attention_dim != width:
            wanted = f"cross_attention_dim={width}, qk_norm={QK_NORM} or None, no guidance_embeds"
            raise ValueError(f"wanted {wanted}, no dropout")  # with guidance it is SANA-Sprint
        super().__init__()
        self.config = config
        self.patch_size, self.latent_channels = patch_size, in_channels
        self.attention = F.scaled_dot_product_attention  # replaceable: q, k, v, attn_mask -> out

        patch = nn.Conv2d(in_channels, width, patch_size, stride=patch_size)
        self.x_embedder = named(proj=patch)
        self.pos_embedder = None
        if interpolation_scale is not None:
            size = sample_size // patch_size
            self.pos_embedder = PositionEmbedder(width, size, interpolation_scale)
        layers = nn.Linear(SINUSOID_CHANNELS, width), nn.SiLU(), nn.Linear(width, width)
        self.t_embedder = named(mlp=nn.Sequential(*layers))
        self.t_block = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))
        self.y_embedder = named(
            y_proj=named(
                fc1=nn.Linear(caption_channels, width),
                act=nn.GELU(approximate="tanh"),
                fc2=nn.Linear(width, width),
            )
        )
        self.attention_y_norm = RMSNorm(width, TEXT_NORM_EPS)
        self.blocks = nn.ModuleList(SanaBlock(width, config) for _ in range(num_layers))
        self.final_layer = FinalLayer(width, patch_size**2 * (out_channels or in_channels))

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,  # a preset, a file, a folder or a hub id
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
        config: dict | None = None,  # for a file that carries none
        weights: str | None = None,  # a folder to look in instead of the hub
        adapters: str = "",  # LoRA files to merge: FILE[:scale],FILE[:scale]
    ) -> "Sana":
        checkpoint, config, run = open_model(path, PRESETS, "transformer", config, weights)
        model = build(cls, config or config_from_shapes(checkpoint.shapes), checkpoint.path)
        rows = name_rows(model.state_dict(), checkpoint.shapes)
        updates = read_adapters(adapters, model, rows_of(NAME_MAP, rows), run)
        assign(model, rows, checkpoint, device, dtype, run, DROPPED, updates=updates)
        return model

    @property
    def embedder(self) -> nn.Module:
        return self.x_embedder

    @property
    def head(self) -> nn.Module:
        return self.final_layer

    def embed(self, latents: Tensor) -> Tensor:
        """(B, C, h, w) -> tokens (B, N, D). Embedding alignment regresses on this."""
        return self.x_embedder(latents).flatten(2).transpose(1, 2)

    def unpatchify(self, patches: Tensor, grid: tuple[int, int]) -> Tensor:
        """(B, N, p p C) -> (B, C, h, w)."""
        p = self.patch_size
        patches = patches.unflatten(1, grid).unflatten(3, (p, p, -1))  # (B, h', w', p, p, C)
        return patches.permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3)  # (B, C, h' p, w' p)

    def forward(
        self,
        noisy_latents: Tensor,  # (B, C, h, w)
        timestep: Tensor,  # (B,) in [0, 1], 1 is noise
        text: Tensor,  # (B, L, 2304)
        text_mask: Tensor,  # (B, L), False where padded
    ) -> Tensor:
        dtype = self.x_embedder.proj.weight.dtype
        height, width = noisy_latents.shape[2:]
        p = self.patch_size
        assert height % p == 0 and width % p == 0, (
            f"latents of {height} x {width} cannot be cut into {p} x {p} patches"
        )
        grid = (height // p, width // p)
        hidden = self.embed(noisy_latents.to(dtype))  # (B, N, D)
        if self.pos_embedder is not None:
            hidden = hidden + self.pos_embedder(grid, hidden.device).to(dtype)
        text = self.attention_y_norm(self.y_embedder(text.to(dtype)))  # (B, L, D)
        text_bias = PADDED * (1 - text_mask.to(dtype))[:, None, None]  # (B, 1, 1, L)
        embedded = self.t_embedder(sinusoid(thousandths(timestep)).to(dtype))  # (B, D)
        condition = self.t_block(embedded).unflatten(1, (6, -1))  # (B, 6, D)
        for block in self.blocks:
            hidden = block(hidden, text, text_bias, condition, grid, self.attention)
        velocity = self.final_layer(hidden, embedded)  # (B, N, p p C): not the blocks' condition
        return self.unpatchify(velocity, grid).to(noisy_latents.dtype)


# ---- official weights

SIZE_600M = {
    "num_attention_heads": 36,
    "num_layers": 28,
    "num_cross_attention_heads": 16,
    "cross_attention_head_dim": 72,
    "cross_attention_dim": 1152,
}
SAMPLED_AT = {  # pixels a side
    512: {"sample_size": 16},
    1024: {"sample_size": 32},
    2048: {"sample_size": 64, "interpolation_scale": 1.0},
    4096: {"sample_size": 128, "interpolation_scale": 2.0},
}


def nvlabs(name: str, config: dict) -> dict:
    return {"hub": f"Efficient-Large-Model/{name}_diffusers", "config": config}


PRESETS = {
    "sana-toy": {"path": "models/toy/sana.safetensors"},
    "sana-0.6b-512": nvlabs("Sana_600M_512px", SIZE_600M | SAMPLED_AT[512]),
    "sana-0.6b": nvlabs("Sana_600M_1024px", SIZE_600M | SAMPLED_AT[1024]),
    "sana-1.6b-512": nvlabs("Sana_1600M_512px_MultiLing", SAMPLED_AT[512]),
    "sana-1.6b": nvlabs("Sana_1600M_1024px_BF16", SAMPLED_AT[1024]),
    "sana-1.6b-2k": nvlabs("Sana_1600M_2Kpx_BF16", SAMPLED_AT[2048]),
    "sana-1.6b-4k": nvlabs("Sana_1600M_4Kpx_BF16", SAMPLED_AT[4096]),
    "sana-1.5-1.6b": nvlabs("SANA1.5_1.6B_1024px", SAMPLED_AT[1024] | {"qk_norm": QK_NORM}),
    # No release is known: the name under which --weights DIR looks for it.
    "dc-gen-sana-f64c128": {
        "hub": "dc-ai/DC-Gen-SANA-1.6B-f64c128",
        "config": {"in_channels": 128, "out_channels": 128, "sample_size": 16},
    },
}

# Buffers that nothing reads, and a head from training.
DROPPED = re.compile(r"^((patch_embed\.)?pos_embed|y_embedder\.y_embedding|logvar_linear\..*)$")

NAME_MAP = {  # our module: diffusers' modules, whose rows are stacked; {} is the block's index
    "x_embedder.proj": ("patch_embed.proj",),
    "t_embedder.mlp.0": ("time_embed.emb.timestep_embedder.linear_1",),
    "t_embedder.mlp.2": ("time_embed.emb.timestep_embedder.linear_2",),
    "t_block.1": ("time_embed.linear",),
    "y_embedder.y_proj.fc1": ("caption_projection.linear_1",),
    "y_embedder.y_proj.fc2": ("caption_projection.linear_2",),
    "attention_y_norm": ("caption_norm",),
    "blocks.{}": ("transformer_blocks.{}",),  # its scale_shift_table
    "blocks.{}.attn.qkv": (
        "transformer_blocks.{}.attn1.to_q",
        "transformer_blocks.{}.attn1.to_k",
        "transformer_blocks.{}.attn1.to_v",
    ),
    "blocks.{}.attn.q_norm": ("transformer_blocks.{}.attn1.norm_q",),
    "blocks.{}.attn.k_norm": ("transformer_blocks.{}.attn1.norm_k",),
    "blocks.{}.attn.proj": ("transformer_blocks.{}.attn1.to_out.0",),
    "blocks.{}.cross_attn.q_linear": ("transformer_blocks.{}.attn2.to_q",),
    "blocks.{}.cross_attn.kv_linear": (
        "transformer_blocks.{}.attn2.to_k",
        "transformer_blocks.{}.attn2.to_v",
    ),
    "blocks.{}.cross_attn.q_norm": ("transformer_blocks.{}.attn2.norm_q",),
    "blocks.{}.cross_attn.k_norm": ("transformer_blocks.{}.attn2.norm_k",),
    "blocks.{}.cross_attn.proj": ("transformer_blocks.{}.attn2.to_out.0",),
    "blocks.{}.mlp.inverted_conv.conv": ("transformer_blocks.{}.ff.conv_inverted",),
    "blocks.{}.mlp.depth_conv.conv": ("transformer_blocks.{}.ff.conv_depth",),
    "blocks.{}.mlp.point_conv.conv": ("transformer_blocks.{}.ff.conv_point",),
    "final_layer.linear": ("proj_out",),
    "final_layer": ("",),  # its scale_shift_table is at diffusers' top level
}


def config_from_shapes(shapes: dict[str, tuple]) -> dict | None:
    """The config of a full-size NVlabs file, which carries none."""
    if "x_embedder.proj.weight" not in shapes:
        return None
    width, channels = shapes["x_embedder.proj.weight"][:2]
    size = math.isqrt(shapes["pos_embed"][1]) if "pos_embed" in shapes else 32
    sampled_at = {at["sample_size"]: at for at in SAMPLED_AT.values()}
    return {
        **(SIZE_600M if width == 36 * 32 else {}),
        **sampled_at.get(size, {}),
        "in_channels": channels,
        "out_channels": channels,
        "qk_norm": QK_NORM if any("q_norm" in name for name in shapes) else None,
    }


def name_rows(ours: Iterable[str], official: Iterable[str]) -> Rows:
    """The official tensors of each of ours, in the dialect that these official names are in."""
    if "patch_embed.proj.weight" not in official:
        return {name: ((name,), None) for name in ours}
    return rows_of(NAME_MAP, ours)
