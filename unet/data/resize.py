"""Where a photo that keeps its shape lies in the network's square."""

from collections.abc import Callable

import numpy as np

from unet.classes import IGNORE


def letterbox_box(height: int, width: int, size: int, larger: Callable = max) -> tuple[int, int, int, int]:
    """The box (top, left, height, width) of a photo in a square of side `size`; what is beside it is padding.

    The longer side becomes `size`, the other is rounded half up and at least 1. The one rule for preparing,
    evaluating and packaging: with `larger=tf.maximum` it takes integer tensors too.
    """
    longest = larger(height, width)
    new_height = larger(1, (2 * height * size + longest) // (2 * longest))
    new_width = larger(1, (2 * width * size + longest) // (2 * longest))
    return (size - new_height) // 2, (size - new_width) // 2, new_height, new_width


def ignore_padding(mask: np.ndarray, height: int, width: int) -> np.ndarray:
    """A mask, uint8 (S, S), with `IGNORE` where the letterbox of a photo (height, width) has padding."""
    top, left, new_height, new_width = letterbox_box(height, width, len(mask))
    box = slice(top, top + new_height), slice(left, left + new_width)
    ignored = np.full_like(mask, IGNORE)
    ignored[box] = mask[box]
    return ignored
