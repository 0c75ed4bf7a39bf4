"""What an image file holds, as RGB."""

from __future__ import annotations

import numpy as np
from PIL import Image

__all__ = ["rgb"]

_THINNEST = 1000
_GRAY_16 = 257
"""16 bits a pixel by this are 8 bits: 65535 becomes 255."""


def rgb(image: Image.Image) -> Image.Image:
    """The image in RGB, of which Pillow itself would clip gray values of 16 bits to white.

    Raises ValueError for values that have no known range, and for strips of which resizing would make a giant.
    """
    if max(image.size) > _THINNEST * min(image.size):
        raise ValueError(f"it has {image.width} x {image.height} pixels, one side over {_THINNEST:,} times the other")
    if image.mode == "F" or image.mode.startswith("I"):
        gray = np.asarray(image)
        if gray.dtype.kind == "f" or gray.min() < 0 or gray.max() > 65535:
            raise ValueError(f"its pixels are {gray.dtype} of no known range: store 8 or 16 bits")
        scaled = gray.astype(np.float32)  # exact enough: no quotient is nearer than 1/514 to a tie
        scaled /= _GRAY_16
        image = Image.fromarray(np.rint(scaled, out=scaled).astype(np.uint8))
    return image.convert("RGB")
