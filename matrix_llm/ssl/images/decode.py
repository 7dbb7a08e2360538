"""Decode one image file safely, and convert it to 8 bits.

No decoder runs on a file that is not one of `FORMATS` or has more than `MAX_PIXELS`.
"""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from matrix_llm.base.errors import ImageDataError

__all__ = ["MAX_PIXELS", "convert_to_eight_bit", "decode_image"]

FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")  # EPS would start Ghostscript, whatever the file's name
MAX_PIXELS = 89_478_485  # a quarter of a GiB as RGB; where Pillow starts to warn of decompression bombs
ORIENTATION = 0x0112  # EXIF's tag


def decode_image(file: str | Path | io.BytesIO) -> Image.Image:
    """The first frame, upright (EXIF says how a camera was held), with every byte read."""
    try:
        with Image.open(file, formats=FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                raise ImageDataError(
                    f"{image.width} x {image.height} pixels, more than {MAX_PIXELS:,}; make it smaller"
                )
            image.load()
            return ImageOps.exif_transpose(image) if image.getexif().get(ORIENTATION, 1) != 1 else image
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ImageDataError(f"too large: {error}") from None


def convert_to_eight_bit(image: Image.Image) -> Image.Image:
    """To "L" or "RGB": transparent parts become white, 16 bits become 8.

    PIL's plain conversion would show colours hidden under transparency, and would clip the 16 bits.
    """
    if image.mode in ("L", "RGB"):
        return image
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    if image.mode == "F":
        raise ImageDataError("floating-point pixels have no fixed range; save it with 8 or 16 bits a channel")
    if image.mode == "I" or image.mode.startswith("I;16"):
        values = np.asarray(image).astype(np.int64)
        if values.min() < 0 or values.max() > 65535:
            raise ImageDataError(f"pixels from {values.min()} to {values.max()}; save it with 8 or 16 bits a channel")
        return Image.fromarray(((values + 128) // 257).astype(np.uint8))
    return image.convert("L" if image.mode == "1" else "RGB")
