"""How a photo of any size becomes the network's square, and how what the network says becomes the photo's size again.

`stretch` changes the shape as the reference does. `letterbox` keeps it and fills up with black, ignored pixels.
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


def from_square(values: np.ndarray, height: int, width: int, resize: Resize) -> np.ndarray:
    """What the network says of a square, at the photo's own size: cut to the photo's box and enlarged.

    Args:
        values: float32 (S, S, C) probabilities, enlarged bilinearly, or uint8 (S, S) class ids, by nearest.

    Returns:
        An array (height, width, …) of the same dtype.
    """
    top, left, h, w = box_of(height, width, values.shape[0], resize)
    inside = values[top : top + h, left : left + w]
    if values.dtype == np.uint8:
        return np.asarray(Image.fromarray(inside).resize((width, height), Image.Resampling.NEAREST))
    bands = [Image.fromarray(np.ascontiguousarray(inside[..., c])) for c in range(inside.shape[2])]
    return np.stack([np.asarray(b.resize((width, height), Image.Resampling.BILINEAR)) for b in bands], -1)


def ignore_padding(mask: np.ndarray, height: int, width: int) -> np.ndarray:
    """A mask, uint8 (S, S), with `IGNORE` where the letterbox of a photo (height, width) has padding."""
    top, left, new_height, new_width = letterbox_box(height, width, len(mask))
    box = slice(top, top + new_height), slice(left, left + new_width)
    ignored = np.full_like(mask, IGNORE)
    ignored[box] = mask[box]
    return ignored
