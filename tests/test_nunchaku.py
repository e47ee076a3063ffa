"""quant.py --export nunchaku: diffusers' own loader takes it, and it computes what we compute.

nunchaku's kernels need a Blackwell GPU. Here a stand-in of the two that diffusers calls reads the
tensors as they lie, so that whole models run.
"""

import math
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from test_export import inputs, theirs
from test_quant import SMALL, quantized_shell, tiny_flux, tiny_sana, write

from models import export, nvfp4, script
from models.flux import Flux
from models.nvfp4 import QuantLinear
from quant import relative

WIDE = dict(  # whole tiles of 128
    in_channels=32, num_layers=1, num_single_layers=1, num_attention_heads=4, attention_head_dim=32,
    axes_dims_rope=[8, 12, 12], joint_attention_dim=8, pooled_projection_dim=8,
)  # fmt: skip


def read_back(kind: str, tensor: torch.Tensor, shape: tuple) -> torch.Tensor:
    """The matrix of which in_order made `tensor`."""
    places = export.in_order(kind, torch.arange(math.prod(shape)).view(shape), (-1,))
    return tensor.flatten()[places.argsort()].view(shape)


def tile16(row, column):
    """A fragment of mma.m16n8k16: lane 4 i + j holds row i and columns 2 j, and both 8 further."""
    return (
        (row % 8 * 4 + column % 8 // 2) * 8 + row % 16 // 8 * 4 + column % 16 // 8 * 2 + column % 2
    )


# Where number (row, column) of a matrix (rows, columns) lies, worked out from those fragments.
PLACES = {
    "qweight": lambda n, k, rows, columns: (  # columns: bytes; m16n8k64, 4 bits
        (n // 128 * (columns // 32) + k // 32) * 4096 + n % 128 // 16 * 512
        + (n % 8 * 4 + k % 16 // 4) * 16 + n % 16 // 8 * 8 + k % 32 // 16 * 4 + k % 4
    ),
    "wscales": lambda n, g, rows, columns: (  # a lane holds rows 32 apart, four scales of each
        (n // 128 * (columns // 4) + g // 4) * 512
        + (n % 8 * 4 + n % 32 // 8) * 16 + n % 128 // 32 * 4 + g % 4
    ),
    "bias": lambda n, _, rows, columns: n // 16 * 16 + n % 8 // 2 * 4 + n % 16 // 8 * 2 + n % 2,
    "proj_up": lambda n, r, rows, columns: (n // 16 * (columns // 16) + r // 16) * 256 + tile16(n, r),
    "proj_down": lambda r, k, rows, columns: (k // 16 * (rows // 16) + r // 16) * 256 + tile16(r, k),
}  # fmt: skip
SHAPES = dict(qweight=(256, 96), wscales=(256, 24), bias=(256, 1), proj_up=(256, 48))


@pytest.mark.parametrize("kind", PLACES)
def test_every_number_lies_where_its_thread_reads_it(kind):
    shape = SHAPES.get(kind, (48, 256))
    matrix = torch.arange(math.prod(shape)).view(shape)
    packed = export.in_order(kind, matrix, (-1,))
    row, column = matrix // shape[1], matrix % shape[1]
    assert torch.equal(packed[PLACES[kind](row, column, *shape)], matrix)
    assert torch.equal(read_back(kind, packed, shape), matrix)


class Kernels:
    """The two functions that SVDQW4A4Linear calls, on tensors in the order of threads."""

    @staticmethod
    def quantize_w4a4_act_fuse_lora(x, codes, scales, down, lora, smooth, fuse_glu, fp4):
        (m, k), r = x.shape, down.shape[1]
        lora[:m] = x @ read_back("proj_down", down, (r, k)).T
        blocks = nvfp4.into_blocks(x / read_back("smooth_factor", smooth, (k, 1)).flatten())
        scale = nvfp4.block_scales(blocks, 1.0)
        values, _ = nvfp4.round_blocks(blocks, scale, 1.0)
        codes[:m], scales[:, :m] = nvfp4.pack(values.flatten(1)), scale.T

    @staticmethod
    def gemm_w4a4(codes, weight, out, _, scales, wscales, *rest):
        lora, up, bias, alpha, wcscales = (rest[i] for i in (2, 3, 9, 17, 18))
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
    monkeypatch.setattr(diffusers.utils, "is_kernels_available", lambda: True)
    monkeypatch.setattr(diffusers.utils, "is_kernels_version", lambda *_: False)
    monkeypatch.setattr(diffusers.utils.constants, "DIFFUSERS_TRUST_REMOTE_KERNELS", True)
    quantizer = nunchaku.NunchakuLiteQuantizer
    monkeypatch.setattr(quantizer, "validate_environment", lambda *_, **__: None)
    yield network
    sys.modules.pop("diffusers.quantizers.nunchaku.utils", None)


@pytest.mark.parametrize("grid, rank", [(0, 0), (4, 16)])
@torch.no_grad()
def test_diffusers_loads_it_and_computes_what_we_do(network_class, tmp_path, grid, rank):
    torch.manual_seed(0)
    saved, folder = tmp_path / "quant.safetensors", tmp_path / "nunchaku" / "transformer"
    model = Flux(**WIDE).requires_grad_(False).bfloat16().float()
    write(saved, model, replace(SMALL, grid=grid, rank=rank))
    export.write_quantized("nunchaku", tmp_path)
    network = network_class.from_pretrained(folder, torch_dtype=torch.float32)
    assert network.single_transformer_blocks[0].proj_out.rank == max(16, 2 * rank)  # of all layers
    ours, errors = nvfp4.load(saved, "cpu", torch.float32), {4: [], 16: []}
    _, rows = export.diffusers_names(ours)
    for name, layer in ours.named_modules():
        if isinstance(layer, QuantLinear):
            if layer.activations == 4:  # there bf16 holds 1 / s, not s
                layer.smooth = 1 / (1 / layer.smooth).bfloat16().float()
            x = torch.randn(5, layer.in_features)
            parts = [part.removesuffix(".packed") for part in rows[f"{name}.packed"][0]]
            found = torch.cat([network.get_submodule(part)(x) for part in parts], 1)
            errors[layer.activations].append(relative(found, layer(x)))
    whole = relative(theirs(network, ours, *inputs(ours)), ours(*inputs(ours)))
    print(f"a layer {max(errors[4]):.1e}, a modulation {max(errors[16]):.1e}, all {whole:.1e}")
    # Off by 2^-12, which the tensor scale may lose. Modulations are rounded to bf16.
    assert max(errors[4]) < 3e-4 and max(errors[16]) < 2e-3 and whole < 5e-3


def test_at_full_size_names_shapes_and_types_are_what_diffusers_wants(network_class):
    with torch.device("meta"):
        model = quantized_shell(Flux(in_channels=128).bfloat16())
        network = network_class(in_channels=128, guidance_embeds=True).bfloat16()
    state, quantization = export.to_nunchaku(model)
    from diffusers.quantizers.nunchaku import utils

    utils.replace_with_nunchaku_linear(network, quantization, torch.bfloat16)
    utils.check_strict_state_dict_match(network, state)
    for name, parameter in network.named_parameters():
        assert (state[name].shape, state[name].dtype) == (parameter.shape, parameter.dtype), name
    assert 10.8 < sum(tensor.nbytes for tensor in state.values()) / 2**30 < 11.2


def test_what_cannot_be_exported_is_a_sentence(tmp_path):
    with pytest.raises(script.UserError, match="--export onnx is unknown; wanted nunchaku"):
        export.write_quantized("onnx", tmp_path)
    with pytest.raises(script.UserError, match="is missing: run quant.py"):
        export.write_quantized("nunchaku", tmp_path)
    for make, words in (
        (tiny_sana, "is for FLUX"),
        (tiny_flux, "24 x 24, wanted multiples of 128"),
    ):
        write(tmp_path / "quant.safetensors", make(), replace(SMALL, grid=0))
        with pytest.raises(script.UserError, match=words):
            export.write_quantized("nunchaku", tmp_path)
        assert not (tmp_path / "nunchaku").exists()
