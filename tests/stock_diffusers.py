"""The models of stock diffusers that `bench.py --baseline diffusers` times; no test is here."""

from collections.abc import Callable
from functools import partial

from diffusers import AutoencoderDC, AutoencoderKL, FluxTransformer2DModel
from torch import Tensor, nn

import dcae
from models import flux

Make = Callable[[Callable[[], nn.Module]], nn.Module]  # fills what a function builds with weights


def step_call(make: Make, name: str, tokens: int, draw: Callable[..., Tensor]) -> Callable:
    """A call of a FLUX, by our name of it, on inputs of draw(*shape), with 512 tokens of text."""
    model = make(partial(FluxTransformer2DModel, **flux.PRESETS[name]["config"]))
    inputs = dict(
        hidden_states=draw(1, tokens, model.config.in_channels),
        encoder_hidden_states=draw(1, 512, model.config.joint_attention_dim),
        pooled_projections=draw(1, model.config.pooled_projection_dim),
        timestep=draw(1), guidance=draw(1), img_ids=draw(tokens, 3), txt_ids=draw(512, 3),
    )  # fmt: skip
    return lambda: model(**inputs).sample


def decode_call(make: Make, name: str, latents: Tensor) -> Callable:
    """A decode of a DC-AE or of FLUX's autoencoder, by our names of them."""
    if name in dcae.PRESETS:
        build = partial(AutoencoderDC, **dcae.PRESETS[name]["config"])
    else:
        build = partial(
            AutoencoderKL, block_out_channels=(128, 256, 512, 512), layers_per_block=2,
            latent_channels=16, down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
        )  # fmt: skip
    autoencoder = make(build)
    return lambda: autoencoder.decode(latents).sample
