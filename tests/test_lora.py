"""LoRA: it starts as the base, merges without a trace, and is saved as what was trained."""

import json

import pytest
import torch
from test_align import tiny_base
from torch import nn

import lora
from align import doors, trained
from lora import Config, LoRALinear
from models import runs, weights
from models.flux import Flux
from models.script import UserError


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


def test_merged_equals_unmerged():
    model, args = tiny_base(), inputs(16)
    names = set(model.state_dict())
    lora.add_lora(model, rank=4, alpha=8.0)
    perturb(model)
    before = model(*args)
    lora.merge_lora(model)
    torch.testing.assert_close(model(*args), before, rtol=1e-5, atol=1e-5)
    assert set(model.state_dict()) == names


def test_every_block_linear_but_the_modulations_gets_lora():
    model = tiny_base()
    lora.add_lora(model, rank=4, alpha=4.0)
    wrapped = {name for name, module in model.named_modules() if isinstance(module, LoRALinear)}
    assert wrapped == {
        *(f"double_blocks.0.{s}_attn.{x}" for s in ("img", "txt") for x in ("qkv", "proj")),
        *(f"double_blocks.0.{s}_mlp.{x}" for s in ("img", "txt") for x in (0, 2)),
        "single_blocks.0.linear1", "single_blocks.0.linear2",
    }  # fmt: skip


def test_lora_and_the_doors_are_trained_and_the_blocks_are_not():
    model = tiny_base()
    lora.choose_trained(model, Config(rank=4, alpha=4.0))
    expected = {
        n
        for n, _ in model.named_parameters()
        if n.startswith(("img_in", "final_layer")) or "lora_" in n
    }
    assert set(trained(model)) == expected
    model(*inputs(16)).square().mean().backward()
    assert all(p.grad is not None for p in trained(model).values())
    full = tiny_base()
    lora.choose_trained(full, Config(full=True))
    assert set(trained(full)) == {name for name, _ in full.named_parameters()}


def test_decay_takes_lora_towards_nothing_and_leaves_the_doors():
    model = tiny_base()
    config = Config(rank=4, alpha=4.0, decay=0.5, door_rate=3.0)
    lora.choose_trained(model, config)
    perturb(model)
    before = {name: p.detach().clone() for name, p in trained(model).items()}
    optimizer = runs.adamw(lora.rates(model, config))
    for group in optimizer.param_groups:
        group["lr"] = 0.1
        for p in group["params"]:
            p.grad = torch.zeros_like(p)
    optimizer.step()
    for name, p in trained(model).items():
        shrunk = 1 - 0.1 * 0.5 if "lora_" in name else 1.0
        assert torch.allclose(p, shrunk * before[name]), name


def test_all_weights_are_trained_in_fp32_and_multiplied_in_bf16():
    model = tiny_base().to(torch.bfloat16)
    lora.choose_trained(model, Config(full=True))
    assert all(p.requires_grad and p.dtype == torch.float32 for p in model.parameters())
    with runs.autocast(model, torch.device("cpu")):
        assert model.txt_in(torch.ones(1, 3, 8)).dtype == torch.bfloat16
    model = tiny_base()
    lora.choose_trained(model, Config(full=True))
    with runs.autocast(model, torch.device("cpu")):
        assert model.txt_in(torch.ones(1, 3, 8)).dtype == torch.float32


def test_decay_of_all_weights_is_refused(tmp_path):
    with pytest.raises(UserError, match="--full has none"):
        lora.run(Config(full=True, decay=1.0), {}, tmp_path, torch.device("cpu"))


def test_a_saved_run_loads_as_the_merged_model(tmp_path):
    base = tiny_base()
    folder = tmp_path / "base"
    weights.save(folder / "model.safetensors", base.state_dict(), {})
    (folder / "config.json").write_text(json.dumps(base.config))
    model = tiny_base()
    lora.choose_trained(model, Config(rank=4, alpha=8.0))
    perturb(model)
    nn.init.normal_(doors(model)[0].weight)
    notes = dict(
        stage="lora", base=str(folder), autoencoder="x", config=json.dumps(base.config), alpha="8.0"
    )
    weights.save(tmp_path / "lora.safetensors", trained(model), notes)
    loaded = Flux.from_pretrained(tmp_path / "lora.safetensors")
    args = inputs(16)
    torch.testing.assert_close(loaded(*args), model(*args), rtol=1e-5, atol=1e-5)
