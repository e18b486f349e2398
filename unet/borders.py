"""Where a mask changes from one class to another."""

import numpy as np

from unet.classes import IGNORE


def near_border(masks: np.ndarray, width: int) -> np.ndarray:
    """bool (N, H, W): which pixels of uint8 (N, H, W) class ids lie in the band around the borders between classes.

    A pixel is in the band if the square of 2 * width + 1 pixels around it holds a pixel of another class. So the band
    reaches `width` pixels to either side of a border. Ignored pixels are in no band and make no border: neither a
    letterbox' padding nor the picture's edge is one. The square is that of Boundary IoU (Cheng et al., CVPR 2021), the
    band that of the trimap plots of Kohli, Ladický and Torr (IJCV 2009).
    """
    ignored = masks == IGNORE
    # The largest and the smallest id in the square differ where it holds two classes.
    largest = _largest(np.where(ignored, 0, masks + np.uint8(1)), width)  # 0 loses against every class
    smallest = IGNORE - _largest(IGNORE - masks, width)
    return ~ignored & (largest - 1 != smallest)


def near_change(values: np.ndarray, width: int) -> np.ndarray:
    """bool (..., H, W): where the square of 2 * width + 1 pixels around a pixel of uint8 values holds two of them."""
    return _largest(values, width) != 255 - _largest(255 - values, width)


def _largest(values: np.ndarray, width: int) -> np.ndarray:
    """The largest value in the square around each, uint8 (..., H, W); one axis after the other."""
    # Pillow's filters take sixty times as long.
    for axis in (-2, -1):
        lines, found = values.swapaxes(-2, axis), values.copy().swapaxes(-2, axis)
        for shift in range(1, min(width, lines.shape[-2] - 1) + 1):
            np.maximum(found[..., shift:, :], lines[..., :-shift, :], out=found[..., shift:, :])
            np.maximum(found[..., :-shift, :], lines[..., shift:, :], out=found[..., :-shift, :])
        values = found.swapaxes(-2, axis)
    return values
