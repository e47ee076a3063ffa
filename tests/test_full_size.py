"""The 12B model at full size, on a GPU: python -m pytest -s tests/test_full_size.py for times."""

import json
import time

import pytest
import torch
from safetensors.torch import save_file

from models.flux import Flux, name_rows
from models.vae import FluxVAE
from sample import decode, draw_noise, sample, timesteps

GIB = 2**30
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
