"""How a photo of any size becomes the network's square, and how the network's output gets the photo's size again.

`stretch` changes the shape as the reference does. `letterbox` keeps it and pads with black, ignored pixels.
"""

import numpy as np
from PIL import Image

from unet.classes import IGNORE
from unet.config import Resize

Box = tuple[int, int, int, int]
"""(top, left, height, width) in the square, in pixels: where the photo lies."""


def letterbox_box(height: int, width: int, size: int) -> Box:
    """The box of a photo of that height and width; takes integer arrays and tensors too."""
    longest = _larger(height, width)
    new_height, new_width = (_larger(1, (2 * side * size + longest) // (2 * longest)) for side in (height, width))
    return (size - new_height) // 2, (size - new_width) // 2, new_height, new_width


def _larger(a, b):
    # In integer arithmetic, which is the same for numbers, arrays and tensors.
    return (a + b + abs(a - b)) // 2


def box_of(height: int, width: int, size: int, resize: Resize) -> Box:
    """Where a photo of that height and width lies in the square of side `size`."""
    return letterbox_box(height, width, size) if resize == "letterbox" else (0, 0, size, size)


def to_square(picture: Image.Image, size: int, resize: Resize, resample: Image.Resampling, fill: int) -> np.ndarray:
    """A picture as an array (size, size) or (size, size, bands), with `fill` where it does not reach."""
    top, left, height, width = box_of(picture.height, picture.width, size, resize)
    inside = np.asarray(picture.resize((width, height), resample))
    if resize == "stretch":
        return inside
    square = np.full((size, size, *inside.shape[2:]), fill, inside.dtype)
    square[top : top + height, left : left + width] = inside
    return square


def ignore_padding(mask: np.ndarray, height: int, width: int) -> np.ndarray:
    """A mask, uint8 (S, S), with `IGNORE` where the letterbox of a photo (height, width) has padding."""
    top, left, new_height, new_width = letterbox_box(height, width, len(mask))
    box = slice(top, top + new_height), slice(left, left + new_width)
    ignored = np.full_like(mask, IGNORE)
    ignored[box] = mask[box]
    return ignored
