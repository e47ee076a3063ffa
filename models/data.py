"""Images from disk, as the models take them."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from models.weights import UserError

FORMATS = (
    "JPEG",
    "PNG",
    "WEBP",
    "TIFF",
)  # no others are tried: exotic decoders are where holes are


def open_image(path: str | Path) -> Tensor:
    """(3, H, W) in [-1, 1]: turned by its EXIF tag, transparency over white, 16 bits scaled."""
    try:
        with Image.open(path, formats=FORMATS) as image:
            image = ImageOps.exif_transpose(image)  # decodes the whole image
    except FileNotFoundError:
        raise UserError(f"{path}: no such image") from None
    except UnidentifiedImageError:
        raise UserError(f"{path} is not an image; it should be {', '.join(FORMATS)}") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(f"{path} cannot be read ({error}): replace the file") from None
    return to_tensor(image)


def to_tensor(image: Image.Image) -> Tensor:
    if image.mode.startswith("I"):  # 16 bits in one channel; convert("RGB") would clip at 255
        gray = np.asarray(image, dtype=np.float32) / 65535
        pixels = np.repeat(gray[..., None], 3, axis=-1)  # (H, W, 3)
    elif image.has_transparency_data:
        rgba = np.asarray(image.convert("RGBA"), dtype=np.float32) / 255
        pixels = rgba[..., :3] * rgba[..., 3:] + 1 - rgba[..., 3:]  # over white
    else:
        pixels = np.asarray(image.convert("RGB"), dtype=np.float32) / 255
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous() * 2 - 1
