"""LoRA: it starts as the base, merges without a trace, and is saved as what was trained."""

import json
from dataclasses import replace

import pytest
import torch
from test_align import SPEC, aligned_model, tiny_base, tiny_pictures
from torch import nn

import lora
from align import trained
from lora import Config, LoRALinear
from models import weights
from models.flux import Flux


def perturb(model: nn.Module) -> None:
    for name, p in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(p, std=0.1)


def inputs(channels: int) -> tuple:
    g = torch.Generator().manual_seed(3)

    def draw(*shape):
        return torch.randn(*shape, generator=g)

    return (
        draw(2, channels, 4, 4),
        torch.rand(2, generator=g),
        draw(2, 3, 8),
        draw(2, 8),
        draw(2).abs(),
    )


def test_lora_starts_as_the_base_layer():
    base, tokens = nn.Linear(64, 32), torch.randn(2, 5, 64)
    assert torch.equal(LoRALinear(base, rank=4, alpha=4.0)(tokens), base(tokens))


def test_a_model_with_fresh_lora_is_the_model():
    model, args = tiny_base(), inputs(16)
    before = model(*args)
    lora.add_lora(model, rank=4, alpha=8.0)
    assert torch.equal(model(*args), before)


def test_every_block_linear_but_the_modulations_gets_lora():
    model = tiny_base()
    lora.add_lora(model, rank=4, alpha=4.0)
    wrapped = {name for name, module in model.named_modules() if isinstance(module, LoRALinear)}
    assert wrapped == {
        *(f"double_blocks.0.{s}_attn.{x}" for s in ("img", "txt") for x in ("qkv", "proj")),
        *(f"double_blocks.0.{s}_mlp.{x}" for s in ("img", "txt") for x in (0, 2)),
        "single_blocks.0.linear1", "single_blocks.0.linear2",
    }  # fmt: skip


def test_lora_embedder_and_head_are_trained_and_the_blocks_are_not():
    model = tiny_base()
    lora.choose_trained(model, Config(rank=4))
    expected = {
        n
        for n, _ in model.named_parameters()
        if n.startswith(("img_in", "final_layer.linear")) or "lora_" in n
    }
    assert set(trained(model)) == expected
    model(*inputs(16)).square().mean().backward()
    assert all(p.grad is not None for p in trained(model).values())


def test_on_the_toy_embedder_and_head_learn_at_three_times_the_rate():
    model = tiny_base()
    lora.choose_trained(model, Config(rank=4))
    blocks, outer = lora.groups(model, SPEC)
    assert (blocks["scale"], outer["scale"]) == (1.0, 3.0)
    assert {id(p) for p in outer["params"]} == {
        id(p) for n, p in trained(model).items() if "lora_" not in n
    }
    assert len(blocks["params"]) + len(outer["params"]) == len(trained(model))
    official = replace(SPEC, text_encoder="flux")
    assert lora.groups(model, official)[1]["scale"] == 1.0


def test_the_full_ablation_trains_all_weights_in_fp32():
    model = tiny_base().to(torch.bfloat16)
    lora.choose_trained(model, Config(ablation="full"))
    assert all(p.requires_grad and p.dtype == torch.float32 for p in model.parameters())


@pytest.mark.parametrize("ablation, recover", [("", True), ("plain", False)])
def test_the_plain_ablation_leaves_the_recovered_velocity_out(
    tmp_path, monkeypatch, ablation, recover
):
    seen, flow_loss = [], lora.flow_loss

    def spy(model, batch, recover):
        seen.append(recover)
        return flow_loss(model, batch, recover)

    monkeypatch.setattr(lora, "flow_loss", spy)
    model = aligned_model()
    config = Config(rank=2, steps=1, batch_size=4, ablation=ablation, out=str(tmp_path))
    lora.choose_trained(model, config)
    lora.train(model, tiny_pictures(), config, SPEC)
    assert seen == [recover]


def test_a_saved_run_loads_as_the_merged_model(tmp_path):
    base = tiny_base()
    folder = tmp_path / "base"
    weights.save(folder / "model.safetensors", base.state_dict(), {})
    (folder / "config.json").write_text(json.dumps(base.config))
    model = tiny_base()
    model.requires_grad_(False)
    lora.add_lora(model, rank=4, alpha=8.0)
    model.embedder.requires_grad_(True)
    perturb(model)
    nn.init.normal_(model.embedder.weight)
    notes = dict(
        stage="lora", base=str(folder), autoencoder="x", config=json.dumps(base.config), alpha="8.0"
    )
    weights.save(tmp_path / "lora.safetensors", trained(model), notes)
    loaded = Flux.from_pretrained(tmp_path / "lora.safetensors")
    args = inputs(16)
    torch.testing.assert_close(loaded(*args), model(*args), rtol=1e-5, atol=1e-5)


def test_a_run_that_is_trained_further_holds_both_updates(tmp_path):
    """B1 A1 alpha / r + B2 A2 is what the joined file adds at alpha = r; the rest is the newer."""

    def pair(rank: int) -> dict:
        return {"x.lora_A": torch.randn(rank, 5), "x.lora_B": torch.randn(7, rank)}

    old, new = pair(2) | {"img_in.bias": torch.zeros(3)}, pair(3) | {"img_in.bias": torch.ones(3)}
    weights.save(tmp_path / "run.safetensors", old, {"stage": "lora", "base": "x", "alpha": "6.0"})
    both = lora.joined(weights.open_checkpoint(tmp_path / "run.safetensors"), new)
    expected = 3 * old["x.lora_B"] @ old["x.lora_A"] + new["x.lora_B"] @ new["x.lora_A"]
    torch.testing.assert_close(both["x.lora_B"] @ both["x.lora_A"], expected)
    assert len(both["x.lora_A"]) == 5 and torch.equal(both["img_in.bias"], torch.ones(3))
