"""The classes of a pixel: their ids, names and colours, and what a mask file's values mean.

Source: Parkhi, Vedaldi, Zisserman, Jawahar, "Cats and Dogs", CVPR 2012; the trimap values are those of the
data set's own README (1 foreground, 2 background, 3 not classified: the outline).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np


class ClassInfo(NamedTuple):
    """A class of pixels: its name in metrics and files, and its RGB colour (0-255) in pictures. Its id is its place."""

    name: str
    colour: tuple[int, int, int]


Classes = tuple[ClassInfo, ...]

MANY = 30
"""Beyond so many classes, pictures and tables show a part of them: a name or a number each could not be read."""
IGNORE = 255
"""A pixel with this id has no class: it is left out of the loss and of every metric."""
UNKNOWN = -1
"""The "id" of a mask value that means nothing."""


@dataclass(frozen=True)
class Labels:
    """What the files of a data set mean.

    Attributes:
        classes: the classes, in the order of their ids.
        values: mask value (0-65535) to class id, or to `IGNORE`.
    """

    classes: Classes
    values: Mapping[int, int]

    @cached_property
    def table(self) -> np.ndarray:
        """uint8 (65536,): the class id of each mask value, `IGNORE` where it has none."""
        table = np.full(65536, IGNORE, np.uint8)
        table[list(self.values)] = list(self.values.values())
        return table


# Orange, blue and yellow stay apart for colour-blind readers.
PETS = Labels(
    (ClassInfo("pet", (222, 84, 6)), ClassInfo("background", (92, 112, 155)), ClassInfo("outline", (255, 217, 61))),
    {1: 0, 2: 1, 3: 2},
)
