"""ComfyUI nodes for a DC-Gen FLUX: `lora.py --export comfyui` puts this text beside its weights.

What    "DC-Gen" gives MODEL and VAE of the files beside this one, "DC-Gen empty latent" what a
        KSampler begins with (cfg 1, euler, simple). All else is ComfyUI's: DualCLIPLoader (flux),
        T5TokenizerOptions (min_length 512, as in training: ComfyUI pads to 256), FluxGuidance.
Why     ComfyUI's own loader takes every FLUX for one of 16 channels in 2 x 2 patches.
How     ComfyUI's FLUX with patch 1 and C channels, the run's timestep shift, and diffusers'
        AutoencoderDC (`pip install diffusers`) as VAE. It takes a ComfyUI that knows FLUX.2: an
        older one's FLUX stops at patch 1, by the shape of its output.
"""

import json
import math
from pathlib import Path

import comfy.latent_formats
import comfy.model_management as memory
import comfy.model_patcher
import comfy.supported_models
import comfy.utils
import torch
from diffusers import AutoencoderDC
from safetensors import safe_open

HERE = Path(__file__).parent
BYTES = 4000  # that the autoencoder takes a pixel, about


class VAE:
    """What ComfyUI's nodes call of a VAE. Images are (B, H, W, 3) in [0, 1], latents not scaled."""

    def __init__(self, folder: Path):
        self.device, self.home = memory.vae_device(), memory.vae_offload_device()
        dtype = memory.vae_dtype(self.device, [torch.bfloat16])
        self.model = AutoencoderDC.from_pretrained(folder, torch_dtype=dtype).requires_grad_(False)
        self.stride = 2 ** (len(self.model.config.encoder_block_out_channels) - 1)

    def run(self, function, tensor, pixels: int):
        memory.free_memory(BYTES * pixels, self.device)
        self.model.to(self.device)
        (result,) = function(tensor.to(self.device, self.model.dtype), return_dict=False)
        self.model.to(self.home)
        return result.float().cpu()

    def decode(self, latents):
        images = self.run(self.model.decode, latents, latents[:, 0].numel() * self.stride**2)
        return (images.movedim(1, -1) / 2 + 0.5).clamp(0, 1)

    def encode(self, images):
        height, width = (side // self.stride * self.stride for side in images.shape[1:3])
        images = images[:, :height, :width, :3].movedim(-1, 1) * 2 - 1
        return self.run(self.model.encode, images, images[:, 0].numel())


def model_config(facts: dict, vae: VAE, dtype: torch.dtype):
    """ComfyUI's description of this FLUX. facts: the config in the file's header."""
    heads, channels = facts["num_attention_heads"], facts["in_channels"]
    config = comfy.supported_models.Flux(dict(
        image_model="flux", patch_size=1, in_channels=channels, out_channels=channels,
        hidden_size=heads * facts["attention_head_dim"], num_heads=heads, mlp_ratio=4.0,
        depth=facts["num_layers"], depth_single_blocks=facts["num_single_layers"],
        vec_in_dim=facts["pooled_projection_dim"], context_in_dim=facts["joint_attention_dim"],
        axes_dim=facts["axes_dims_rope"], theta=10000, qkv_bias=True,
        guidance_embed=facts["guidance_embeds"],
    ))  # fmt: skip
    # The ratio by which ComfyUI shifts FLUX's timesteps is exp(shift).
    config.sampling_settings = {"shift": math.log(facts["_shift"])}
    config.latent_format = comfy.latent_formats.LatentFormat()
    config.latent_format.latent_channels = channels
    config.latent_format.scale_factor = vae.model.config.scaling_factor
    config.latent_format.spacial_downscale_ratio = vae.stride
    config.memory_usage_factor *= 4  # a latent is a token, in FLUX.1 a quarter of one
    kinds = config.supported_inference_dtypes
    cast = memory.unet_manual_cast(dtype, memory.get_torch_device(), kinds)
    config.set_inference_dtype(dtype, cast)
    return config


class DCGen:
    RETURN_TYPES, FUNCTION, CATEGORY = ("MODEL", "VAE"), "load", "loaders"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {}}

    def load(self):
        path, vae = HERE / "transformer.safetensors", VAE(HERE / "vae")
        with safe_open(path, "pt") as file:
            facts = json.loads(file.metadata()["config"])
        tensors = comfy.utils.load_torch_file(str(path), safe_load=True)
        dtype = tensors["double_blocks.0.img_mlp.0.weight"].dtype
        config = model_config(facts, vae, dtype)
        model = config.get_model(tensors, "")
        # Strictly, which ComfyUI's own loading is not, and every tensor in the file's dtype.
        tensors = config.process_unet_state_dict(tensors)
        model.diffusion_model.load_state_dict(tensors, strict=True, assign=True)
        devices = memory.get_torch_device(), memory.unet_offload_device()
        return comfy.model_patcher.ModelPatcher(model, *devices), vae


class DCGenEmptyLatent:
    RETURN_TYPES, FUNCTION, CATEGORY = ("LATENT",), "make", "latent"

    @classmethod
    def INPUT_TYPES(cls):
        side = ("INT", {"default": 1024, "min": 64, "max": 16384, "step": 64})
        count = ("INT", {"default": 1, "min": 1, "max": 64})
        return {"required": {"model": ("MODEL",), "width": side, "height": side, "count": count}}

    def make(self, model, width, height, count):
        kind = model.get_model_object("latent_format")
        grid = (side // kind.spacial_downscale_ratio for side in (height, width))
        return ({"samples": torch.zeros(count, kind.latent_channels, *grid)},)


# Named by folder, so that several runs can be installed.
NODE_CLASS_MAPPINGS = {f"DC-Gen {HERE.name}": DCGen, "DC-Gen empty latent": DCGenEmptyLatent}
