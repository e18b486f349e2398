"""Where a photo lies in the network's square."""

from typing import Literal

Resize = Literal["stretch", "letterbox"]
Box = tuple[int, int, int, int]
"""(top, left, height, width) in the square, in pixels: where the photo lies."""


def letterbox_box(height: int, width: int, size: int) -> Box:
    """The box of a photo of that height and width; works on integer tensors too."""
    # The longer side without `max`, which tensors do not take: integer arithmetic is exact everywhere.
    longest = (height + width + abs(height - width)) // 2
    new_height, new_width = ((2 * side * size + longest) // (2 * longest) for side in (height, width))
    new_height, new_width = (side + (side < 1) * 1 for side in (new_height, new_width))
    return (size - new_height) // 2, (size - new_width) // 2, new_height, new_width


def box_of(height: int, width: int, size: int, resize: Resize) -> Box:
    """Where a photo of that height and width lies in the square of side `size`."""
    return letterbox_box(height, width, size) if resize == "letterbox" else (0, 0, size, size)
