"""FLUX: a transformer from a noisy picture and a text to the velocity from picture to noise.

What    19 double blocks (text and image tokens have their own weights and meet in one attention),
        then 38 single blocks (one stream, attention and MLP in parallel). Rotary positions,
        adaptive LayerNorm.
Base    16 latent channels in 2x2 patches: 64 numbers a token, 4,096 tokens at 1024 x 1024.
DC-Gen  32 or 128 latent channels, one token a latent pixel: the same class with other
        `in_channels`. Only `img_in` and `final_layer.linear` change shape.
Names   Tensors are named as in Black Forest Labs' single files; diffusers' are mapped below.
Source  github.com/black-forest-labs/flux (Apache 2.0), written anew from names and numbers.
"""

import math
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.adapters import read_adapters
from models.weights import Rows, assign, build, open_model, rows_of

EPS = 1e-6  # of every norm
ROPE_THETA = 10_000  # longest wavelength of a rotary axis: 2 pi theta tokens
SINUSOID_CHANNELS = 256  # of the timestep and guidance embeddings
MLP_RATIO = 4


# ---- positions and embeddings


def sinusoid(value: Tensor) -> Tensor:
    """(B,) in [0, 1] -> (B, 256): cos and sin of 1000 * value * 10000^(-j / 128), in fp32."""
    half = SINUSOID_CHANNELS // 2
    index = torch.arange(half, device=value.device, dtype=torch.float32)
    frequency = torch.exp(-math.log(10_000) * index / half)
    angle = 1000 * value.float()[:, None] * frequency  # (B, 128)
    return torch.cat((angle.cos(), angle.sin()), dim=-1)  # (B, 256)


class RopeEmbedder(nn.Module):
    """The table that `rotate` reads. A module: a sampler computes it once for all steps."""

    def __init__(self, axes: Sequence[int], stride: int):
        super().__init__()
        self.axes, self.stride = axes, stride

    def forward(self, text_length: int, grid: tuple[int, int], device: torch.device) -> Tensor:
        """(2, L + N, 1, hd): cos and sin of id * theta^(-2j / axis).

        A token has three ids: (0, row, col) for the image, (0, 0, 0) for text. A token that
        covers `stride` x `stride` tokens of the base sits at their centre.
        """
        # fp64 as in the reference: at row 255 an fp32 angle is off by 1e-5. Apple's GPUs
        # have no fp64.
        dtype = torch.float32 if device.type == "mps" else torch.float64
        exact = {"device": device, "dtype": dtype}
        centre = (self.stride - 1) / 2
        rows, cols = (torch.arange(n, **exact) * self.stride + centre for n in grid)
        row, col = torch.meshgrid(rows, cols, indexing="ij")  # (h', w') each
        ids = torch.stack((torch.zeros_like(row), row, col)).flatten(1)  # (3, N)
        ids = F.pad(ids, (text_length, 0))  # (3, L + N): text first
        angles = [
            position[:, None] * ROPE_THETA ** -(torch.arange(0, axis, 2, **exact) / axis)
            for position, axis in zip(ids, self.axes)
        ]
        angle = torch.cat(angles, dim=-1)[:, None, :, None]  # (L + N, 1, hd / 2, 1)
        cos, sin = angle.cos().float(), angle.sin().float()
        pairs = torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)
        return torch.stack(pairs).flatten(3)  # (2, L + N, 1, hd)


def rotate(heads: Tensor, rope: Tensor) -> Tensor:
    """(B, N, nh, hd): neighbouring channels (a, b) to (a cos - b sin, b cos + a sin)."""
    cos, sin = rope  # sin is (-sin, sin) on each pair
    swapped = heads.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)  # (b, a)
    return heads * cos + swapped * sin


class MLPEmbedder(nn.Module):
    """A vector to the width of the model: timestep, guidance and pooled text each have one."""

    def __init__(self, in_dim: int, width: int):
        super().__init__()
        self.in_layer = nn.Linear(in_dim, width)
        self.out_layer = nn.Linear(width, width)

    def forward(self, vector: Tensor) -> Tensor:
        return self.out_layer(F.silu(self.in_layer(vector)))


# ---- parts of a block


class Modulation(nn.Module):
    """adaLN: condition -> (shift, scale, gate), (B, 1, D) each, for `parts` branches."""

    def __init__(self, width: int, parts: int):
        super().__init__()
        self.parts = parts
        self.lin = nn.Linear(width, 3 * parts * width)

    def forward(self, condition: Tensor) -> tuple[Tensor, ...]:
        return self.lin(condition)[:, None].chunk(3 * self.parts, dim=-1)


def modulate(hidden: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return F.layer_norm(hidden, hidden.shape[-1:], eps=EPS) * (1 + scale) + shift


class RMSNorm(nn.Module):
    """Unit mean square over each head. In fp32, and left there: the rotation follows."""

    def __init__(self, dim: int):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(dim))

    def forward(self, heads: Tensor) -> Tensor:
        return F.rms_norm(heads.float(), self.scale.shape, self.scale.float(), EPS)


class QKNorm(nn.Module):
    """(B, N, 3D) -> q, k, v (B, N, nh, hd); q and k are normalised, which bounds the logits."""

    def __init__(self, head_dim: int):
        super().__init__()
        self.query_norm = RMSNorm(head_dim)
        self.key_norm = RMSNorm(head_dim)

    def forward(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        head_dim = self.query_norm.scale.shape[0]
        q, k, v = qkv.unflatten(-1, (3, -1, head_dim)).unbind(-3)
        return self.query_norm(q), self.key_norm(k), v


class SelfAttention(nn.Module):
    """The projections of one stream; the attention itself is shared by both streams."""

    def __init__(self, width: int, head_dim: int):
        super().__init__()
        self.qkv = nn.Linear(width, 3 * width)
        self.norm = QKNorm(head_dim)
        self.proj = nn.Linear(width, width)


def attend(q: Tensor, k: Tensor, v: Tensor, attention: Callable) -> Tensor:
    """q, k, v (B, L + N, nh, hd) -> (B, L + N, D)."""
    q, k, v = (heads.transpose(1, 2) for heads in (q, k, v))  # (B, nh, L + N, hd) each
    return attention(q, k, v).transpose(1, 2).flatten(2)


def clip(hidden: Tensor) -> Tensor:
    """fp16 ends at 65504, and the residual streams of FLUX pass it."""
    return hidden.clip(-65504, 65504) if hidden.dtype == torch.float16 else hidden


# ---- blocks


class DoubleStreamBlock(nn.Module):
    """Text and image have their own weights and meet in one attention over [text, image]."""

    def __init__(self, width: int, head_dim: int):
        super().__init__()
        for stream in ("img", "txt"):
            mlp = nn.Sequential(
                nn.Linear(width, MLP_RATIO * width),
                nn.GELU(approximate="tanh"),
                nn.Linear(MLP_RATIO * width, width),
            )
            self.add_module(f"{stream}_mod", Modulation(width, parts=2))
            self.add_module(f"{stream}_attn", SelfAttention(width, head_dim))
            self.add_module(f"{stream}_mlp", mlp)

    def forward(
        self, img: Tensor, txt: Tensor, condition: Tensor, rope: Tensor, attention: Callable
    ) -> tuple[Tensor, Tensor]:
        img_mod, txt_mod = self.img_mod(condition), self.txt_mod(condition)
        img_qkv = self.img_attn.qkv(modulate(img, *img_mod[:2]))  # (B, N, 3D)
        txt_qkv = self.txt_attn.qkv(modulate(txt, *txt_mod[:2]))  # (B, L, 3D)
        streams = zip(self.txt_attn.norm(txt_qkv), self.img_attn.norm(img_qkv))
        q, k, v = (torch.cat(parts, dim=1) for parts in streams)  # (B, L + N, nh, hd) each
        q, k = (rotate(heads, rope).type_as(v) for heads in (q, k))
        joint = attend(q, k, v, attention)  # (B, L + N, D)
        txt_out, img_out = joint.split((txt.shape[1], img.shape[1]), dim=1)
        img = self.after(img, img_out, img_mod, self.img_attn, self.img_mlp)
        txt = self.after(txt, txt_out, txt_mod, self.txt_attn, self.txt_mlp)
        return img, txt

    def after(
        self,
        hidden: Tensor,
        attended: Tensor,
        mod: tuple[Tensor, ...],
        attn: SelfAttention,
        mlp: nn.Sequential,
    ) -> Tensor:
        """What one stream does after the attention, (B, n, D) twice -> (B, n, D)."""
        _, _, gate, mlp_shift, mlp_scale, mlp_gate = mod
        hidden = hidden + gate * attn.proj(attended)
        branch = mlp(modulate(hidden, mlp_shift, mlp_scale))
        return clip(hidden + mlp_gate * branch)


class SingleStreamBlock(nn.Module):
    """One stream [text, image]; attention and MLP read the same input, side by side."""

    def __init__(self, width: int, head_dim: int):
        super().__init__()
        self.widths = (3 * width, MLP_RATIO * width)
        self.linear1 = nn.Linear(width, sum(self.widths))  # qkv and the MLP's first layer
        self.linear2 = nn.Linear(width + MLP_RATIO * width, width)  # proj and the MLP's second
        self.norm = QKNorm(head_dim)
        self.modulation = Modulation(width, parts=1)

    def forward(
        self, hidden: Tensor, condition: Tensor, rope: Tensor, attention: Callable
    ) -> Tensor:
        shift, scale, gate = self.modulation(condition)
        modulated = modulate(hidden, shift, scale)
        qkv, mlp = self.linear1(modulated).split(self.widths, dim=-1)  # (.., 3D), (.., 4D)
        q, k, v = self.norm(qkv)  # (B, L + N, nh, hd) each
        q, k = (rotate(heads, rope).type_as(v) for heads in (q, k))
        attended = attend(q, k, v, attention)  # (B, L + N, D)
        mlp = F.gelu(mlp, approximate="tanh")
        branch = self.linear2(torch.cat((attended, mlp), dim=-1))  # (B, L + N, D)
        return clip(hidden + gate * branch)


class LastLayer(nn.Module):
    """Modulated LayerNorm, then back to latent channels."""

    def __init__(self, width: int, out_channels: int):
        super().__init__()
        self.linear = nn.Linear(width, out_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, hidden: Tensor, condition: Tensor) -> Tensor:
        # The Sequential's SiLU is part of `condition`; here it holds a place in the names.
        shift, scale = self.adaLN_modulation[1](condition)[:, None].chunk(2, dim=-1)
        return self.linear(modulate(hidden, shift, scale))


# ---- model


class Flux(nn.Module):
    def __init__(
        self,
        in_channels: int = 64,  # of a token: 64 = 16 channels in 2 x 2 patches, else no patches
        out_channels: int | None = None,  # None or in_channels
        patch_size: int = 1,  # in every official config: their pipeline cuts the patches
        num_layers: int = 19,  # double blocks
        num_single_layers: int = 38,
        num_attention_heads: int = 24,
        attention_head_dim: int = 128,
        joint_attention_dim: int = 4096,  # T5-XXL
        pooled_projection_dim: int = 768,  # CLIP-L
        guidance_embeds: bool = True,  # False: schnell
        axes_dims_rope: tuple[int, ...] = (16, 56, 56),
        gate_value: float | None = None,  # AnyFlow: weight of next_timestep; None: no such input
        position_stride: int = 1,  # ours: base tokens a side that one token covers
    ):
        config = {k: v for k, v in locals().items() if k not in ("self", "__class__")}
        axes = list(axes_dims_rope)
        if len(axes) != 3 or sum(axes) != attention_head_dim or any(axis % 2 for axis in axes):
            raise ValueError(
                f"{axes_dims_rope=} must be 3 even numbers of sum {attention_head_dim}"
            )
        if patch_size != 1 or out_channels not in (None, in_channels):
            raise ValueError(f"{patch_size=} must be 1, and {out_channels=} {in_channels}")
        super().__init__()
        self.config = config | {"axes_dims_rope": axes}
        self.patch_size = 2 if in_channels == 64 else 1
        self.latent_channels = in_channels // self.patch_size**2
        self.attention = F.scaled_dot_product_attention  # replaceable: q, k, v -> out

        width = num_attention_heads * attention_head_dim
        self.img_in = nn.Linear(in_channels, width)
        self.txt_in = nn.Linear(joint_attention_dim, width)
        self.time_in = MLPEmbedder(SINUSOID_CHANNELS, width)
        self.vector_in = MLPEmbedder(pooled_projection_dim, width)
        if guidance_embeds:
            self.guidance_in = MLPEmbedder(SINUSOID_CHANNELS, width)
        if gate_value is not None:
            self.next_time_in = MLPEmbedder(SINUSOID_CHANNELS, width)
        self.pe_embedder = RopeEmbedder(axes, position_stride)
        self.double_blocks = nn.ModuleList(
            DoubleStreamBlock(width, attention_head_dim) for _ in range(num_layers)
        )
        self.single_blocks = nn.ModuleList(
            SingleStreamBlock(width, attention_head_dim) for _ in range(num_single_layers)
        )
        self.final_layer = LastLayer(width, in_channels)

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,  # a preset, a file, a folder or a hub id
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
        config: dict | None = None,  # for a file that carries none
        weights: str | None = None,  # a folder to look in instead of the hub
        adapters: str = "",  # LoRA files to merge: FILE[:scale],FILE[:scale]
    ) -> "Flux":
        checkpoint, config, run = open_model(path, PRESETS, "transformer", config, weights)
        config = config_from_shapes(checkpoint.shapes) | (config or {})
        if exported := config.get("_dc_gen"):  # by lora.py, in diffusers' format
            config["position_stride"] = exported.get("position_stride", 1)
        model = build(cls, config, checkpoint.path)
        rows = name_rows(model.state_dict(), checkpoint.shapes)
        updates = read_adapters(adapters, model, name_rows(rows, ["x_embedder.weight"]), run)
        assign(model, rows, checkpoint, device, dtype, run, updates=updates)
        return model

    @property
    def embedder(self) -> nn.Module:
        return self.img_in

    @property
    def blocks(self) -> list[nn.Module]:
        """All blocks, in order."""
        return [*self.double_blocks, *self.single_blocks]

    @property
    def head(self) -> nn.Module:
        return self.final_layer

    def embed(self, latents: Tensor) -> Tensor:
        """(B, C, h, w) -> tokens (B, N, D). Embedding alignment regresses on this."""
        p = self.patch_size
        patches = latents.unflatten(3, (-1, p)).unflatten(2, (-1, p))  # (B, C, h', p, w', p)
        patches = patches.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)  # (B, N, C p p)
        return self.img_in(patches)

    def unpatchify(self, patches: Tensor, height: int, width: int) -> Tensor:
        """(B, N, C p p) -> (B, C, h, w)."""
        p = self.patch_size
        grid = patches.unflatten(1, (height // p, width // p)).unflatten(3, (-1, p, p))
        return grid.permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3)  # (B, C, h', p, w', p)

    def condition(
        self,
        timestep: Tensor,
        guidance: Tensor | None,
        pooled_text: Tensor,
        next_timestep: Tensor | None = None,
    ) -> Tensor:
        """(B, D), the SiLU that every modulation begins with included."""
        dtype, gate = pooled_text.dtype, self.config["gate_value"]
        time = self.time_in(sinusoid(timestep).to(dtype))
        if gate is not None:  # a flow map: the time where this step ends, too
            end = timestep if next_timestep is None else next_timestep
            time = (1 - gate) * time + gate * self.next_time_in(sinusoid(end).to(dtype))
        condition = time + self.vector_in(pooled_text)
        if self.config["guidance_embeds"]:
            assert guidance is not None, "this model is guidance-distilled: it needs guidance (B,)"
            condition = condition + self.guidance_in(sinusoid(guidance).to(dtype))
        return F.silu(condition)

    def forward(
        self,
        noisy_latents: Tensor,  # (B, C, h, w)
        timestep: Tensor,  # (B,) in [0, 1], 1 is noise
        text: Tensor,  # (B, L, 4096)
        pooled_text: Tensor,  # (B, 768)
        guidance: Tensor | None = None,  # (B,), 3.5 means 3.5
        next_timestep: Tensor | None = None,  # (B,) in [0, 1], of a flow map: where the step ends
    ) -> Tensor:
        height, width = noisy_latents.shape[2:]
        p, length, dtype = self.patch_size, text.shape[1], self.img_in.weight.dtype
        assert height % p == 0 and width % p == 0, (
            f"latents of {height} x {width} cannot be cut into {p} x {p} patches"
        )
        img = self.embed(noisy_latents.to(dtype))  # (B, N, D)
        txt = self.txt_in(text.to(dtype))  # (B, L, D)
        pooled_text = pooled_text.to(dtype)
        condition = self.condition(timestep, guidance, pooled_text, next_timestep)  # (B, D)
        rope = self.pe_embedder(length, (height // p, width // p), img.device)

        for block in self.double_blocks:
            img, txt = block(img, txt, condition, rope, self.attention)
        hidden = torch.cat((txt, img), dim=1)  # (B, L + N, D)
        for block in self.single_blocks:
            hidden = block(hidden, condition, rope, self.attention)
        velocity = self.final_layer(hidden[:, length:], condition)  # (B, N, C p p)
        return self.unpatchify(velocity, height, width).to(noisy_latents.dtype)


# ---- official weights

GUIDED = {"in_channels": 64, "guidance_embeds": True}  # distilled: guidance is an input
SCHNELL = {"in_channels": 64, "guidance_embeds": False}
GATE = 0.25  # of AnyFlow: in the authors' code alone (custom_code at da8f9a8)
DC_GEN = "dc-ai/DC-Gen-FLUX.1-Krea-Dev-"


def bfl(name: str, file: str, config: dict) -> dict:
    return {"hub": f"black-forest-labs/FLUX.1-{name}", "file": file, "config": config}


PRESETS = {
    "flux-toy": {"path": "models/toy/flux.safetensors"},
    "dc-gen-toy": {"path": "models/toy/dc-gen-f32.safetensors"},  # a run of ours
    "flux-dev": bfl("dev", "flux1-dev.safetensors", GUIDED),
    "flux-krea": bfl("Krea-dev", "flux1-krea-dev.safetensors", GUIDED),
    "flux-schnell": bfl("schnell", "flux1-schnell.safetensors", SCHNELL),
    "dc-gen-flux-1k": {"hub": DC_GEN + "Res1K", "config": GUIDED | {"in_channels": 32}},
    "dc-gen-flux-4k": {"hub": DC_GEN + "Res4K", "config": GUIDED | {"in_channels": 128}},
    "dc-gen-flux-anyflow": {
        "hub": DC_GEN + "v1.0-Res1K-Anyflow",
        "config": GUIDED | {"in_channels": 32, "gate_value": GATE},
    },
}

NAME_MAP = {  # our module: diffusers' modules, whose rows are stacked; {} is the block's index
    "img_in": ("x_embedder",),
    "txt_in": ("context_embedder",),
    "time_in.in_layer": ("time_text_embed.timestep_embedder.linear_1",),
    "time_in.out_layer": ("time_text_embed.timestep_embedder.linear_2",),
    "next_time_in.in_layer": ("time_text_embed.delta_embedder.linear_1",),
    "next_time_in.out_layer": ("time_text_embed.delta_embedder.linear_2",),
    "guidance_in.in_layer": ("time_text_embed.guidance_embedder.linear_1",),
    "guidance_in.out_layer": ("time_text_embed.guidance_embedder.linear_2",),
    "vector_in.in_layer": ("time_text_embed.text_embedder.linear_1",),
    "vector_in.out_layer": ("time_text_embed.text_embedder.linear_2",),
    "double_blocks.{}.img_mod.lin": ("transformer_blocks.{}.norm1.linear",),
    "double_blocks.{}.txt_mod.lin": ("transformer_blocks.{}.norm1_context.linear",),
    "double_blocks.{}.img_attn.qkv": (
        "transformer_blocks.{}.attn.to_q",
        "transformer_blocks.{}.attn.to_k",
        "transformer_blocks.{}.attn.to_v",
    ),
    "double_blocks.{}.txt_attn.qkv": (
        "transformer_blocks.{}.attn.add_q_proj",
        "transformer_blocks.{}.attn.add_k_proj",
        "transformer_blocks.{}.attn.add_v_proj",
    ),
    "double_blocks.{}.img_attn.norm.query_norm": ("transformer_blocks.{}.attn.norm_q",),
    "double_blocks.{}.img_attn.norm.key_norm": ("transformer_blocks.{}.attn.norm_k",),
    "double_blocks.{}.txt_attn.norm.query_norm": ("transformer_blocks.{}.attn.norm_added_q",),
    "double_blocks.{}.txt_attn.norm.key_norm": ("transformer_blocks.{}.attn.norm_added_k",),
    "double_blocks.{}.img_attn.proj": ("transformer_blocks.{}.attn.to_out.0",),
    "double_blocks.{}.txt_attn.proj": ("transformer_blocks.{}.attn.to_add_out",),
    "double_blocks.{}.img_mlp.0": ("transformer_blocks.{}.ff.net.0.proj",),
    "double_blocks.{}.img_mlp.2": ("transformer_blocks.{}.ff.net.2",),
    "double_blocks.{}.txt_mlp.0": ("transformer_blocks.{}.ff_context.net.0.proj",),
    "double_blocks.{}.txt_mlp.2": ("transformer_blocks.{}.ff_context.net.2",),
    "single_blocks.{}.modulation.lin": ("single_transformer_blocks.{}.norm.linear",),
    "single_blocks.{}.linear1": (
        "single_transformer_blocks.{}.attn.to_q",
        "single_transformer_blocks.{}.attn.to_k",
        "single_transformer_blocks.{}.attn.to_v",
        "single_transformer_blocks.{}.proj_mlp",
    ),
    "single_blocks.{}.norm.query_norm": ("single_transformer_blocks.{}.attn.norm_q",),
    "single_blocks.{}.norm.key_norm": ("single_transformer_blocks.{}.attn.norm_k",),
    "single_blocks.{}.linear2": ("single_transformer_blocks.{}.proj_out",),
    "final_layer.adaLN_modulation.1": ("norm_out.linear",),
    "final_layer.linear": ("proj_out",),
}


def config_from_shapes(shapes: dict[str, tuple]) -> dict:
    """What a file without a config shows of it; the rest must then be FLUX.1's."""
    config = {"guidance_embeds": any("guidance" in name for name in shapes)}
    if any(re.search(r"\bdelta_embedder\.|^next_time_in\.", name) for name in shapes):
        config["gate_value"] = GATE
    for name in ("img_in.weight", "x_embedder.weight"):
        if name in shapes:
            config["in_channels"] = shapes[name][1]
    return config


def swap_halves(rows: Tensor) -> Tensor:
    """diffusers' last modulation gives (scale, shift), ours (shift, scale)."""
    return torch.cat(rows.chunk(2)[::-1])


def name_rows(ours: Iterable[str], official: Iterable[str]) -> Rows:
    """The official tensors of each of ours, in the dialect that these official names are in."""
    official = set(official)
    if "x_embedder.weight" not in official:
        return {name: ((name,), None) for name in ours}
    rows = rows_of(NAME_MAP, ours)
    for name, (theirs, join) in rows.items():
        if name.endswith(".scale"):  # of a norm
            rows[name] = (tuple(their.replace(".scale", ".weight") for their in theirs), join)
        if name.startswith("final_layer.adaLN_modulation"):
            rows[name] = (theirs, swap_halves)
    return rows
