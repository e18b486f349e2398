"""The classes of a pixel: their ids, names and colours, and what the official trimaps call them.

Source: Parkhi, Vedaldi, Zisserman, Jawahar, "Cats and Dogs", CVPR 2012; the trimap values are those of the
data set's own README (1 foreground, 2 background, 3 not classified: the outline).
"""

from typing import NamedTuple


class ClassInfo(NamedTuple):
    """A class of pixels: its name in metrics and files, and its RGB colour (0-255) in pictures."""

    name: str
    colour: tuple[int, int, int]


CLASSES = (
    ClassInfo("pet", (222, 84, 6)),
    ClassInfo("background", (92, 112, 155)),
    ClassInfo("outline", (255, 217, 61)),
)
"""Id = position. The colours stay apart for colour-blind readers."""

IGNORE = 255
"""A pixel with this id has no class: it is left out of the loss and of every metric."""

TRIMAP_TO_ID = {1: 0, 2: 1, 3: 2}
