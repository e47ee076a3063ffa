"""quant.py --export nunchaku: diffusers' own loader takes it, and what is in it is what we compute.

nunchaku's kernels need a Blackwell GPU. Here a stand-in of the two that diffusers calls reads the
tensors as written, so that the whole model runs.
"""

import math
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from test_export import inputs, theirs
from test_quant import SMALL, tiny_flux, tiny_sana, write

from models import export, nvfp4, script
from models.flux import Flux
from models.nvfp4 import QuantLinear
from quant import relative

WIDE = dict(  # whole tiles of 128; a second single block
    in_channels=32, num_layers=1, num_single_layers=2, num_attention_heads=4, attention_head_dim=32,
    axes_dims_rope=[8, 12, 12], joint_attention_dim=8, pooled_projection_dim=8,
)  # fmt: skip


def read_back(kind: str, tensor: torch.Tensor, shape: tuple) -> torch.Tensor:
    """The inverse of in_order: where each number of the matrix went is asked of it."""
    places = export.in_order(kind, torch.arange(math.prod(shape)).view(shape), (-1,))
    return tensor.flatten()[places.argsort()].view(shape)


# Where (row, column) of a matrix of (rows, columns) lies, by the fragments of mma.m16n8k64 (four
# bits) and m16n8k16 (16 bits), in which lane 4 a + b of 32 holds row a and columns of b.
def byte_of_weight(n, k, rows, columns):  # columns in bytes
    tile = n // 128 * (columns // 32) + k // 32
    lane = n % 8 * 4 + k % 16 // 4
    return (
        tile * 4096 + n % 128 // 16 * 512 + lane * 16 + n % 16 // 8 * 8 + k % 32 // 16 * 4 + k % 4
    )


def place_of_scale(n, g, rows, columns):  # a lane holds rows 32 apart, four groups of each
    lane = n % 8 * 4 + n % 32 // 8
    return (n // 128 * (columns // 4) + g // 4) * 512 + lane * 16 + n % 128 // 32 * 4 + g % 4


def place_in_vector(n, _, rows, columns):  # a lane holds two neighbours, and the two 8 behind
    return n // 16 * 16 + n % 8 // 2 * 4 + n % 16 // 8 * 2 + n % 2


def place_in_tile(n, k):
    return (n % 8 * 4 + k % 8 // 2) * 8 + n % 16 // 8 * 4 + k % 16 // 8 * 2 + k % 2


def place_of_up(n, r, rows, columns):
    return (n // 16 * (columns // 16) + r // 16) * 256 + place_in_tile(n, r)


def place_of_down(r, k, rows, columns):
    return (k // 16 * (rows // 16) + r // 16) * 256 + place_in_tile(r, k)


@pytest.mark.parametrize(
    "kind, shape, place",
    [
        ("qweight", (256, 192), byte_of_weight), ("wscales", (256, 24), place_of_scale),
        ("smooth_factor", (256, 1), place_in_vector), ("bias", (256, 1), place_in_vector),
        ("proj_up", (256, 48), place_of_up), ("proj_down", (48, 256), place_of_down),
    ],
)  # fmt: skip
def test_every_number_lies_where_its_thread_reads_it(kind, shape, place):
    matrix = torch.arange(math.prod(shape)).view(shape)
    packed = export.in_order(kind, matrix, (-1,))
    row, column = (
        part.flatten() for part in torch.meshgrid(*map(torch.arange, shape), indexing="ij")
    )
    assert torch.equal(packed[place(row, column, *shape)], matrix.flatten())
    assert torch.equal(read_back(kind, packed, shape), matrix)


@pytest.mark.parametrize("scale", [1e-6, 3.3e-5, 0.001234, 1.0])
def test_two_bf16_numbers_hold_a_scale_better_than_one(scale):
    pair = export.two_factors(scale)
    assert all(torch.tensor(x).bfloat16().item() == x for x in pair)
    assert abs(math.prod(pair) / scale - 1) < 2**-11.9


class Kernels:
    """The two functions that SVDQW4A4Linear calls, on tensors as they are laid out for them."""

    @staticmethod
    def quantize_w4a4_act_fuse_lora(x, codes, scales, down, lora, smooth, fuse_glu, fp4):
        assert fp4 and not fuse_glu
        (m, k), r = x.shape, down.shape[1]
        lora[:m] = x @ read_back("proj_down", down, (r, k)).T
        blocks = nvfp4.into_blocks(x / read_back("smooth_factor", smooth, (k, 1)).flatten())
        scale = nvfp4.block_scales(blocks, 1.0)
        values, _ = nvfp4.round_blocks(blocks, scale, 1.0)
        codes[:m], scales[:, :m] = nvfp4.pack(values.flatten(1)), scale.T

    @staticmethod
    def gemm_w4a4(*args):
        codes, weight, out, _, scales, wscales = args[:6]
        (lora, up), bias, alpha, wcscales = args[8:10], args[15], args[23], args[24]
        (m, n), k = out.shape, 2 * codes.shape[1]
        inputs = nvfp4.unpack(codes[:m], scales.T[:m])
        weight = read_back("qweight", weight, (n, k // 2)).view(torch.uint8)
        weight = nvfp4.unpack(weight, read_back("wscales", wscales, (n, k // 16)))
        out[:] = inputs @ weight.T * alpha * wcscales + read_back("bias", bias, (n, 1)).flatten()
        out += lora[:m] @ read_back("proj_up", up, (n, up.shape[1])).T


@pytest.fixture
def network_class(monkeypatch):
    """diffusers' FLUX, for which Kernels stand in for nunchaku's."""
    diffusers = pytest.importorskip("diffusers", reason="the client is not installed")
    nunchaku = pytest.importorskip("diffusers.quantizers.nunchaku", reason="diffusers is too old")
    network = diffusers.FluxTransformer2DModel  # imports what looks for kernels
    stub = SimpleNamespace(get_kernel=lambda *_, **__: SimpleNamespace(ops=Kernels))
    monkeypatch.setitem(sys.modules, "kernels", stub)
    monkeypatch.delitem(sys.modules, "diffusers.quantizers.nunchaku.utils", raising=False)
    monkeypatch.setattr(diffusers.utils, "is_kernels_available", lambda: True)
    monkeypatch.setattr(diffusers.utils, "is_kernels_version", lambda *_: False)
    monkeypatch.setattr(diffusers.utils.constants, "DIFFUSERS_TRUST_REMOTE_KERNELS", True)
    quantizer = nunchaku.NunchakuLiteQuantizer
    monkeypatch.setattr(quantizer, "validate_environment", lambda *_, **__: None)
    yield network
    sys.modules.pop("diffusers.quantizers.nunchaku.utils", None)


# Without smoothing a layer is exact; with it lambda has 8 bits, as our s had. Over the whole model
# modulations count too, which are bf16 there.
@pytest.mark.parametrize("grid, rank, layerwise", [(0, 0, 3e-4), (0, 16, 3e-4), (4, 8, 0.03)])
@torch.no_grad()
def test_diffusers_loads_it_and_computes_what_we_do(network_class, tmp_path, grid, rank, layerwise):
    torch.manual_seed(0)
    saved, folder = tmp_path / "quant.safetensors", tmp_path / "nunchaku" / "transformer"
    model = Flux(**WIDE).requires_grad_(False).bfloat16().float()
    write(saved, model, replace(SMALL, grid=grid, rank=rank))
    export.write_quantized("nunchaku", tmp_path)
    network = network_class.from_pretrained(folder, torch_dtype=torch.float32)
    linear = network.single_transformer_blocks[1].proj_out
    assert type(linear).__name__ == "SVDQW4A4Linear" and linear.rank == max(16, rank * 2)
    ours = nvfp4.load(saved, "cpu", torch.float32)
    _, rows = export.diffusers_names(ours)
    layers = {n: m for n, m in ours.named_modules() if isinstance(m, QuantLinear)}
    errors = {}
    for name, layer in layers.items():
        x = torch.randn(5, layer.in_features)
        parts = [part.removesuffix(".packed") for part in rows[f"{name}.packed"][0]]
        found = torch.cat([network.get_submodule(part)(x) for part in parts], 1)
        errors[name] = relative(found, layer(x))
    print(f"of a layer {max(errors.values()):.1e}")
    whole = relative(theirs(network, ours, *inputs(ours)), ours(*inputs(ours)))
    print(f"of the model {whole:.1e}")
    assert whole < layerwise + 5e-3
    assert max(e for n, e in errors.items() if "mod" not in n) < layerwise


def test_what_cannot_be_exported_is_a_sentence(tmp_path):
    with pytest.raises(script.UserError, match="--export onnx is unknown; wanted nunchaku"):
        export.write_quantized("onnx", tmp_path)
    for make, words in ((tiny_sana, "is for FLUX"), (tiny_flux, "72 x 24|24 x 24")):
        write(tmp_path / "quant.safetensors", make(), replace(SMALL, grid=0))
        with pytest.raises(script.UserError, match=words):
            export.write_quantized("nunchaku", tmp_path)
        assert not (tmp_path / "nunchaku").exists()
