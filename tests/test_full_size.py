"""The 12B model at full size, on a GPU: python -m pytest -s tests/test_full_size.py for times."""

import json
import math
import sys
import time
from dataclasses import replace

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import align
import dcae
import lora
import quant
from models import kernels, nvfp4, registry, weights
from models.flux import Flux, name_rows
from models.vae import FluxVAE
from sample import clock, decode, draw_latents, draw_noise, encode, sample, timesteps

GIB, CUDA = 2**30, torch.device("cuda")
roomy = torch.cuda.is_available() and torch.cuda.get_device_properties(0).total_memory > 40 * GIB
pytestmark = pytest.mark.skipif(not roomy, reason="needs a GPU with 40 GiB and 30 GB of disk")


def write_random_flux(folder, shard_bytes: int = 5 * 10**9) -> None:
    """FLUX.1-dev's tensors as diffusers names and shards them, with random values in bf16."""
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in Flux().state_dict().items()}
    diffusers_names = ["x_embedder.weight"]  # what tells the format
    shards, size = [{}], 0
    for name, (parts, _) in name_rows(shapes, diffusers_names).items():
        rows, width = shapes[name][0], 3072
        split = [width] * 3 + [4 * width] if len(parts) == 4 else [rows // len(parts)] * len(parts)
        for part, n in zip(parts, split):
            shape = (n, *shapes[name][1:])
            values = torch.randn(shape, device="cuda", dtype=torch.bfloat16) * 0.02
            if name.endswith("norm.scale"):
                values += 1
            if size > shard_bytes:
                shards, size = [*shards, {}], 0
            shards[-1][part] = values.cpu()
            size += values.nbytes
    index = {}
    for i, shard in enumerate(shards):
        file = f"diffusion_pytorch_model-{i + 1:05}-of-{len(shards):05}.safetensors"
        save_file(shard, folder / file)
        index |= dict.fromkeys(shard, file)
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": index})
    )
    config = {"_class_name": "FluxTransformer2DModel", "in_channels": 64, "guidance_embeds": True}
    (folder / "config.json").write_text(json.dumps(config))


def test_flux_at_full_size_loads_from_shards_and_samples_1024(tmp_path):
    write_random_flux(tmp_path)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    model = Flux.from_pretrained(tmp_path, "cuda", torch.bfloat16)
    torch.cuda.synchronize()
    load, peak_load = time.perf_counter() - start, torch.cuda.max_memory_allocated()
    assert sum(p.numel() for p in model.parameters()) == 11_901_408_320
    assert peak_load < 1.05 * 2 * 11_901_408_320  # no second copy

    vae = FluxVAE().to("cuda", torch.bfloat16)
    text = torch.randn(1, 512, 4096, device="cuda", dtype=torch.bfloat16)
    pooled = torch.randn(1, 768, device="cuda", dtype=torch.bfloat16)
    noise = draw_noise([0], (16, 128, 128)).cuda()
    sigmas = timesteps(28, "flux", tokens=4096)
    sample(model, (text, pooled), noise, sigmas[-2:], 3.5)  # warm-up
    torch.cuda.synchronize()
    start = time.perf_counter()
    latents = sample(model, (text, pooled), noise, sigmas, 3.5)
    torch.cuda.synchronize()
    denoise, peak = time.perf_counter() - start, torch.cuda.max_memory_allocated()
    start = time.perf_counter()
    image = decode(vae, latents)
    torch.cuda.synchronize()
    assert image.shape == (1, 3, 1024, 1024) and image.isfinite().all()
    print(
        f"\n{torch.cuda.get_device_name()}: load {load:.1f} s, peak {peak_load / GIB:.2f} GiB; "
        f"28 steps at 1024 x 1024 {denoise:.2f} s, peak {peak / GIB:.2f} GiB; "
        f"first decode {time.perf_counter() - start:.2f} s, "
        f"peak {torch.cuda.max_memory_allocated() / GIB:.2f} GiB"
    )


def random_dc_gen_flux() -> Flux:
    """DC-Gen's 4K model with random weights, in bf16."""
    with torch.device("meta"):
        model = Flux(in_channels=128)
    model = model.to(torch.bfloat16).to_empty(device="cuda").requires_grad_(False)
    for name, p in model.named_parameters():
        p.fill_(1) if name.endswith("norm.scale") else p.normal_(std=0.02)
    return model


def test_flux_at_full_size_is_quantized_in_minutes(tmp_path):
    """Calibrated on the trajectories of random texts at 4096 x 4096; pictures are not looked at."""
    torch.set_float32_matmul_precision("high")
    spec = replace(registry.describe("dc-gen-flux-4k"), steps=20, guidance=4.5)
    shapes = ((quant.PROMPTS, 512, 4096), (quant.PROMPTS, 768))
    cond = tuple(torch.randn(shape, dtype=torch.bfloat16) for shape in shapes)
    model, config, path = random_dc_gen_flux(), quant.Config(), tmp_path / "quant.safetensors"

    def draw(bar) -> None:
        for i in range(quant.PROMPTS):
            words = tuple(c[i : i + 1] for c in cond)
            draw_latents(model, spec, words, (), [i], (64, 64), progress=bar)

    torch.cuda.reset_peak_memory_stats()
    marks = [clock(CUDA)]
    inputs = quant.calibration_inputs(model, draw, quant.PROMPTS * spec.steps, config.tokens)
    marks.append(clock(CUDA))
    state, layers = quant.quantize_model(model, config, inputs)
    marks.append(clock(CUDA))
    peak = torch.cuda.max_memory_allocated() / GIB
    notes = {"class": "Flux", "layers": json.dumps(layers), "config": json.dumps(model.config)}
    weights.save(path, state, notes | {"stage": "quant"})
    quant.print_layers(layers)
    total, size = marks[2] - marks[0], path.stat().st_size / GIB
    print(
        f"{torch.cuda.get_device_name()}: quantized in {total:.0f} s, of which "
        f"{marks[1] - marks[0]:.0f} s for {quant.PROMPTS} x {spec.steps} steps; "
        f"peak {peak:.1f} GiB, file {size:.2f} GiB"
    )
    model = state = None
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    ours = nvfp4.load(path, "cuda", torch.bfloat16)
    held = torch.cuda.memory_allocated() / GIB
    words = tuple(c[:1] for c in cond)
    draw_latents(ours, replace(spec, steps=1), words, (), [0], (64, 64))
    peak_step = torch.cuda.max_memory_allocated() / GIB
    print(f"in memory {held:.2f} GiB; in a step {peak_step:.2f} GiB at most")
    assert total < 900 and peak < 80 and size < 6.8 and held < 6.9


def milliseconds(run, times: int = 20) -> float:
    """Of one call: the median of `times`, after a warm-up."""
    run()
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(times + 1)]
    torch.cuda.synchronize()
    for mark in marks:
        mark.record()
        run()
    torch.cuda.synchronize()
    return sorted(a.elapsed_time(b) for a, b in zip(marks, marks[1:]))[times // 2]


@pytest.mark.parametrize("tokens", [4608, 1536])
@pytest.mark.parametrize(
    "k, n, rank",
    [(3072, 9216, 32), (3072, 12288, 32), (12288, 3072, 32), (3072, 21504, 64), (15360, 3072, 64)],
)
def test_quantized_layers_of_flux_are_right_and_timed(tokens, k, n, rank):
    """Right: near the definition. The times beside bf16 and FP8 are printed, not judged."""
    generator = torch.Generator("cuda").manual_seed(0)

    def normal(*shape):
        return torch.randn(shape, generator=generator, device="cuda", dtype=torch.bfloat16)

    linear = torch.nn.Linear(k, n, device="meta").requires_grad_(False)
    linear.weight = torch.nn.Parameter(0.02 * normal(n, k), requires_grad=False)
    linear.bias = torch.nn.Parameter(normal(n), requires_grad=False)
    mode = nvfp4.pick_mode("", CUDA)
    if mode == "fake":
        pytest.skip("no tensor cores for FP4 or FP8")
    split = quant.split(linear.weight.float(), torch.ones(k, device="cuda"), rank, "amax")
    bare = quant.split(linear.weight.float(), split.smooth, 0, "amax")
    layer, thin = (quant.as_linear(linear, each, 4, torch.bfloat16) for each in (split, bare))
    for each in (layer, thin):
        each.activations = 8 if mode == "w4a8" else 4
        nvfp4.make_real(each)
    hidden, fp8 = normal(tokens, k), kernels.FP8Linear(linear)
    wanted = nvfp4.fake_linear(hidden, layer).float()
    times = {"bf16": milliseconds(lambda: linear(hidden)), "fp8": milliseconds(lambda: fp8(hidden))}
    error = quant.relative(nvfp4.real_linear(hidden, layer).float(), wanted)
    assert error < 0.01, error  # bf16 rounds the sum, FP8 keeps 14 bits of it
    times[mode] = milliseconds(lambda: nvfp4.real_linear(hidden, layer))
    times["no branch"] = milliseconds(lambda: nvfp4.real_linear(hidden, thin))
    if mode == "w4a8":
        times["rebuilt"] = milliseconds(lambda: nvfp4.rebuild(layer, torch.float8_e4m3fn))
    else:
        times["inputs"] = milliseconds(lambda: nvfp4.quantize_inputs(hidden, layer))
    row = "  ".join(f"{name} {time:.3f}" for name, time in times.items())
    print(f"\n{mode} {tokens} x {k} x {n}, rank {rank}, ms: {row}")


def write_pipeline(folder, transformer) -> None:
    """A FLUX pipeline around `transformer`(folder): encoders of full width and few layers."""
    from test_text import tiny_tokenizer
    from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

    clip = CLIPTextConfig(
        vocab_size=30, hidden_size=768, intermediate_size=64, num_hidden_layers=1,
        num_attention_heads=2, max_position_embeddings=77,
        bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    t5 = T5Config(
        vocab_size=30, d_model=4096, d_kv=8, d_ff=64, num_layers=1, num_heads=4,
        feed_forward_proj="gated-gelu", pad_token_id=0, eos_token_id=2,
    )  # fmt: skip
    CLIPTextModel(clip).save_pretrained(folder / "text_encoder")
    T5EncoderModel(t5).save_pretrained(folder / "text_encoder_2")
    tiny_tokenizer("<bos>", 77).save_pretrained(folder / "tokenizer")
    tiny_tokenizer(None, 512).save_pretrained(folder / "tokenizer_2")
    weights.save(folder / "vae" / "ae.safetensors", FluxVAE().state_dict(), {})
    (folder / "transformer").mkdir()
    transformer(folder / "transformer")
    (folder / "scheduler").mkdir()
    kinds = {
        "transformer": "FluxTransformer2DModel",
        "scheduler": "FlowMatchEulerDiscreteScheduler",
    }
    schedule = {"_class_name": kinds["scheduler"], "use_dynamic_shifting": True, "shift": 3.0}
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(schedule))
    index = {name: ["diffusers", kind] for name, kind in kinds.items()}
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "FluxPipeline"} | index))


def write_pictures(folder, size: int, n: int = 18) -> None:
    folder.mkdir()
    for i in range(n):
        pixels = torch.randint(256, (8, 8, 3), generator=torch.Generator().manual_seed(i))
        picture = Image.fromarray(pixels.to(torch.uint8).numpy())
        picture = picture.resize((size, size), Image.Resampling.BICUBIC)
        picture.save(folder / f"{i}.png", compress_level=1)  # 18 of 4096 x 4096 in seconds
        (folder / f"{i}.txt").write_text(f"coloured clouds, number {i}")


def write_autoencoder(folder, preset: str) -> None:
    config = dcae.PRESETS[preset]["config"]
    weights.save(folder / "model.safetensors", dcae.DCAE(**config).state_dict(), {})
    (folder / "config.json").write_text(json.dumps(config))


def run_script(script, monkeypatch, capsys, *flags) -> dict:
    monkeypatch.setattr(sys, "argv", ["x.py", *map(str, flags)])
    script.main()
    out = capsys.readouterr().out
    print(out)
    return json.loads(out.splitlines()[-1])


@pytest.mark.parametrize("size", [1024, 2048, 4096])
def test_pictures_of_any_size_are_encoded_whole(size, capsys):
    """As align.py does, by the base's autoencoder and by a new one, in bf16."""
    for cls, config in ((FluxVAE, {}), (dcae.DCAE, dcae.PRESETS["dc-ae-f64c128-1.5"]["config"])):
        model = cls(**config).to(CUDA, torch.bfloat16)
        images = torch.randn(1, 3, size, size, device=CUDA, dtype=torch.bfloat16)
        torch.cuda.reset_peak_memory_stats()
        for _ in range(2):
            start = clock(CUDA)
            latents = encode(model, images)
            seconds = clock(CUDA) - start
        peak = torch.cuda.max_memory_allocated() / GIB
        with capsys.disabled():
            print(f"\n{cls.__name__} encodes {size}: {1000 * seconds:.0f} ms, peak {peak:.1f} GiB")
        assert latents.shape[2] == size // model.stride and latents.isfinite().all()
        assert peak < 60
        del model, images, latents
        torch.cuda.empty_cache()


SIZES = [(1024, "dc-ae-f32c32-sana-1.1"), (4096, "dc-ae-f64c128-1.5")]


@pytest.mark.parametrize(("size", "autoencoder"), SIZES)
def test_both_stages_train_flux_within_80_gib(tmp_path, monkeypatch, capsys, size, autoencoder):
    """The two commands as a user gives them, a few steps of each; random weights and pictures."""
    train_both(tmp_path, monkeypatch, capsys, size, autoencoder, write_random_flux)


def train_both(folder, monkeypatch, capsys, size: int, autoencoder: str, transformer) -> None:
    write_pipeline(folder / "flux", transformer)
    write_autoencoder(folder / "ae", autoencoder)
    write_pictures(folder / "pictures", size)
    flags = ["--model", folder / "flux", "--data", folder / "pictures", "--out", folder / "run"]
    flags += ["--resolution", size, "--steps", 4, "--batch-size", 4]
    for script, more in ((align, ["--autoencoder", folder / "ae"]), (lora, [])):
        monkeypatch.setattr(script, "watcher", lambda *_: None)  # previews would take minutes
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        run_script(script, monkeypatch, capsys, *flags, *more)
        peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
        lines = (folder / "run" / "metrics.jsonl").read_text().splitlines()
        rows = [row for row in map(json.loads, lines) if "loss" in row]
        seconds = [row["seconds"] for row in rows][-3:]
        print(
            f"\n{script.__name__} at {size}: {min(seconds):.2f} s a step of 4, peak "
            f"{peak / GIB:.1f} GiB, all of it {time.perf_counter() - start:.0f} s"
        )
        assert all(math.isfinite(row["loss"]) for row in rows) and peak < 80 * GIB
