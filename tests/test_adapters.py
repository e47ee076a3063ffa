"""--adapter: LoRA of other programs gives here what it gives there, or is refused by name."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file
from test_export import OURS, TINY, diffusers, finished_run

import align
import lora
from models import export, registry, runs, script, weights
from models.script import UserError


def tiny_base(folder, kind: str = "flux"):
    """(model, its file) of width 32."""
    torch.manual_seed(0)
    cls, sizes = TINY[kind]
    base, file = cls(**sizes), folder / "base.safetensors"
    weights.save(file, base.state_dict(), {"config": json.dumps(base.config)})
    return base, file


def pair(layer: str, outs: int, ins: int, ends=("lora_A", "lora_B"), rank: int = 2) -> dict:
    down, up = (f"{layer}.{end}.weight" for end in ends)
    return {down: torch.randn(rank, ins), up: torch.randn(outs, rank)}


def kohya(layer: str, outs: int, ins: int) -> dict:
    tensors = pair(f"lora_unet_{layer}", outs, ins, ("lora_down", "lora_up"))
    return tensors | {f"lora_unet_{layer}.alpha": torch.tensor(1.0)}


# Files as these programs write them, and what their header says of alpha.
DIFFUSERS = dict(
    pair("transformer.transformer_blocks.0.attn.to_k", 32, 32)
    | pair("transformer.single_transformer_blocks.0.attn.to_v", 32, 32)
    | pair("transformer.single_transformer_blocks.0.proj_mlp", 128, 32)
    | pair("transformer.norm_out.linear", 64, 32)
)
PEFT = dict(r=2, target_modules=["to_k", "to_v", "proj_mlp", "norm_out.linear"])
KOHYA = dict(
    kohya("double_blocks_0_img_attn_qkv", 96, 32)
    | kohya("double_blocks_0_txt_mlp_2", 32, 128)
    | kohya("single_blocks_0_linear2", 32, 160)
)
SANA = dict(
    pair("transformer.transformer_blocks.0.attn1.to_q", 32, 32)
    | pair("transformer.transformer_blocks.1.attn2.to_v", 32, 32)
)


@pytest.mark.parametrize(
    "kind, tensors, facts",
    [
        ("flux", DIFFUSERS, {}),
        ("flux", DIFFUSERS, PEFT | {"lora_alpha": 6, "alpha_pattern": {"attn.to_k": 1}}),
        ("flux", DIFFUSERS, PEFT | {"lora_alpha": 6, "use_rslora": True}),
        ("flux", KOHYA, {}),
        ("sana", SANA, {}),
    ],
)
def test_what_is_merged_is_what_diffusers_fuses(tmp_path, kind, tensors, facts):
    pytest.importorskip("peft", reason="diffusers loads LoRA through peft")
    base, file = tiny_base(tmp_path, kind)
    header = json.dumps({f"transformer.{key}": fact for key, fact in facts.items()})
    header = {"lora_adapter_metadata": header} if facts else None
    save_file(tensors, tmp_path / "x.safetensors", header)
    merged = type(base).from_pretrained(file, adapters=f"{tmp_path}/x.safetensors:0.5")
    name, _ = export.diffusers_names(base)
    network = getattr(diffusers, name)(**{k: v for k, v in base.config.items() if k not in OURS})
    network.load_state_dict(export.to_diffusers(base))
    pipeline = getattr(diffusers, name.replace("Transformer2DModel", "Pipeline"))
    slots = ["scheduler", "vae", "text_encoder", "tokenizer"]
    slots += ["text_encoder_2", "tokenizer_2"] * (kind == "flux")
    pipe = pipeline(**dict.fromkeys(slots), transformer=network)
    pipe.load_lora_weights(tmp_path, weight_name="x.safetensors")
    pipe.fuse_lora(lora_scale=0.5)
    pipe.unload_lora_weights()
    before, fused = export.to_diffusers(base), network.state_dict()
    for name, ours in export.to_diffusers(merged).items():
        torch.testing.assert_close(fused[name], ours, rtol=1e-5, atol=1e-5)
    assert sum(not torch.equal(before[name], fused[name]) for name in before) > 1


@pytest.mark.parametrize("kind", ["flux", "sana"])
def test_our_own_adapter_folder_comes_back(tmp_path, kind):
    spec, model, autoencoder = finished_run(tmp_path, kind)
    file, run = spec.transformer, registry.open_run(spec, "")
    export.write("peft", spec, model, autoencoder, tmp_path / "out")
    stacked = replace(run, metadata=run.metadata | {"adapters": "x.safetensors"})
    assert not export.diffusers_lora(model, stacked)  # which would be wrong on the plain base
    kept = {name: run.get(name) for name in run.shapes if "lora_" not in name}
    weights.save(file, kept, run.metadata)
    again = type(model).from_pretrained(file, adapters=f"{tmp_path}/out/adapter_model.safetensors")
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(again.state_dict()[name], tensor)


FORMS = [  # a layer of diffusers or of ours, and its rows of our linear1: q, k, v and an MLP
    ("base_model.model.single_transformer_blocks.0.attn.to_k", slice(32, 64), "AB"),
    ("lora_transformer_single_transformer_blocks_0_proj_mlp", slice(96, 224), ("down", "up")),
    ("diffusion_model.single_blocks.0.linear1", slice(0, 224), "AB"),
    ("lora_unet_single_blocks_0_linear1", slice(0, 224), ("down", "up")),
]


@pytest.mark.parametrize("layer, rows, ends", FORMS)
def test_every_way_to_name_a_layer_finds_its_rows(tmp_path, layer, rows, ends):
    base, file = tiny_base(tmp_path)
    tensors = pair(layer, rows.stop - rows.start, 32, [f"lora_{end}" for end in ends])
    down, up = tensors.values()
    save_file(tensors | {f"{layer}.alpha": torch.tensor(3.0)}, tmp_path / "x.safetensors")
    given = f"{tmp_path}/x.safetensors:-0.5,{tmp_path}/x.safetensors:2"  # 1.5 in sum
    merged = type(base).from_pretrained(file, dtype=torch.bfloat16, adapters=given)
    wanted = dict(base.state_dict())
    wanted["single_blocks.0.linear1.weight"][rows] += 1.5 * 3 / 2 * up @ down
    for name, tensor in merged.state_dict().items():
        assert torch.equal(tensor, wanted[name].bfloat16()), name  # summed in fp32, rounded once


PAIR = pair("transformer.proj_out", 64, 32)
TEXT = pair("lora_te1_text_model_encoder_layers_0_mlp_fc1", 8, 8)


@pytest.mark.parametrize(
    "tensors, words",
    [
        (PAIR | pair("transformer.nowhere", 8, 8), "2 of its 4 tensors fit nothing here .*nowhere"),
        (PAIR | {"transformer.proj_out.lora_magnitude_vector": torch.ones(64)}, "magnitude_vector"),
        ({name: t for name, t in PAIR.items() if "lora_A" in name}, "1 of its 1 tensors"),
        (pair("transformer.proj_out", 32, 32), "proj_out.lora_A"),  # DC-Gen's head
        (PAIR | {"transformer.proj_out.alpha": torch.ones(2)}, "no alpha of transformer.proj_out"),
        (TEXT, "2 of its 2 tensors fit nothing"),
        ({"x": torch.ones(1)}, "1 of its 1 tensors fit nothing"),
    ],
)
def test_a_tensor_without_a_place_is_named(tmp_path, tensors, words):
    base, file = tiny_base(tmp_path)
    save_file(tensors, tmp_path / "x.safetensors")
    with pytest.raises(UserError, match=words):
        type(base).from_pretrained(file, "meta", adapters=f"{tmp_path}/x.safetensors")


def test_lora_of_text_encoders_is_left_out_and_said(tmp_path, capsys):
    base, file = tiny_base(tmp_path)
    save_file(PAIR | TEXT, tmp_path / "x.safetensors")
    merged = type(base).from_pretrained(file, adapters=f"{tmp_path}/x.safetensors")
    assert (
        "1 layers, scale 1, without 2 tensors of text encoders (lora_te1" in capsys.readouterr().err
    )
    assert not torch.equal(merged.final_layer.linear.weight, base.final_layer.linear.weight)


def test_a_run_is_loaded_with_the_adapters_of_its_base(tmp_path):
    base, file = tiny_base(tmp_path)
    adapter, path = tmp_path / "x.safetensors", tmp_path / "align.safetensors"
    save_file(DIFFUSERS | pair("transformer.x_embedder", 32, 64), adapter)
    adapted = type(base).from_pretrained(file, adapters=f"{adapter}:0.5")
    model = align.transplant(adapted, 32)
    align.choose_trained(model)
    spec = registry.describe(str(file))
    config = align.Config(model=str(file), adapter=f"{adapter}:0.5")
    weights.save(path, align.trained(model), runs.header(config, "align", spec, model, 1))
    spec = registry.describe(str(path))
    again = registry.load_transformer(spec, "", "cpu", torch.float32)
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
    with pytest.raises(UserError, match="is part of .* already: leave it out"):
        registry.load_transformer(spec, "", "meta", torch.float32, str(adapter))
    with pytest.raises(UserError, match="stands on --adapter '.*:0.5', not ''"):
        lora.finetune(lora.Config(model=str(file)), str(path), torch.device("cpu"))
    adapter.unlink()
    with pytest.raises(UserError, match="x.safetensors: no such file"):
        registry.load_transformer(spec, "", "meta", torch.float32)


def test_the_flag_may_be_repeated(tmp_path):
    def parse(*flags, **defaults):
        return script.parse_config(align.Config, "", flags, defaults=lambda _: defaults).adapter

    assert parse() == "" and parse("--adapter", "a") == "a"
    assert parse("--adapter", "a:0.5", "--adapter", "b") == "a:0.5,b"
    assert parse(adapter="old") == "old" and parse("--adapter", "a", adapter="old") == "a"
    quantized = replace(registry.describe("flux-toy"), stage="quant")
    with pytest.raises(UserError, match="wanted it in quant.py"):
        registry.load_transformer(quantized, "", "cpu", torch.float32, "a")
