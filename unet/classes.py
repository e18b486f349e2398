"""The classes of a pixel: their ids, names and colours, and what a mask file's values mean.

Source: Parkhi, Vedaldi, Zisserman, Jawahar, "Cats and Dogs", CVPR 2012; the trimap values are those of the
data set's own README (1 foreground, 2 background, 3 not classified: the outline).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple


class ClassInfo(NamedTuple):
    """A class of pixels: its name in metrics and files, its RGB colour (0-255) in pictures. Its id is its position."""

    name: str
    colour: tuple[int, int, int]


Classes = tuple[ClassInfo, ...]

MANY = 30
"""With more classes than this, pictures and tables show only some: a name or number for each could not be read."""
IGNORE = 255
"""A pixel with this id has no class: it is left out of the loss and of every metric."""
UNKNOWN = -1
"""The "id" of a mask value that stands for no class."""
COLOUR = 1 << 24
"""A colour as a mask value: this plus red * 65536 + green * 256 + blue, so that no number of another kind equals it."""

Reading = Literal["index", "grey", "colour", "alpha", "red", "green", "blue"]
"""What of a mask's pixel is its value: its palette's index or the number that is stored, its grey value, its colour, or
one channel."""
Orientation = Literal["applied", "ignored"]
"""Whether masks lie over photos as displayed, their EXIF orientation applied, or over the pixels as stored."""


@dataclass(frozen=True)
class Labels:
    """What the files of a data set mean.

    Attributes:
        classes: the classes, in the order of their ids.
        values: mask value (0-65535, or a colour) to class id, or to `IGNORE`.
        masks: what of a mask's pixel is its value; None if that has to follow from the values.
        exif_orientation: what masks lie over; None if that has to follow from the sizes.
        described_in: the file in which both can be stated, if there is one.
    """

    classes: Classes
    values: Mapping[int, int]
    masks: Reading | None = None
    exif_orientation: Orientation | None = None
    described_in: str = ""


# Orange, blue and yellow stay apart for colour-blind readers.
PETS = Labels(
    (ClassInfo("pet", (222, 84, 6)), ClassInfo("background", (92, 112, 155)), ClassInfo("outline", (255, 217, 61))),
    {1: 0, 2: 1, 3: 2},
)
