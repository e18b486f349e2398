"""What is drawn to change a training sample: flips, and the numbers behind every other change.

All of it comes from stateless streams keyed by (seed, epoch, sample), so it does not matter who draws it, when, or
beside which other samples. Flips are applied here, to bytes; the other numbers go into the training step, where
`unet.recipe.transforms` applies them to pictures and masks.
"""

from typing import Annotated

import numpy as np
from pydantic import Field, field_validator

from unet.recipe.schedule import Horizon, part_of_run
from unet.settings import SettingsGroup, weighted_names

TRANSFORMS = ("scale", "rotate", "shift", "colour", "blur", "cutout")
"""What `--augment-with` may name."""
DRAWS = (
    *("zoom", "aspect", "angle", "shift_x", "shift_y"),
    *("saturation", "contrast", "brightness", "red", "green", "blue"),
    *("blurred", "blur"),
    *("cut", "cut_height", "cut_width", "cut_y", "cut_x"),
    *("mixed", "mix_area", "mix_y", "mix_x"),
)
"""The numbers that are drawn for a sample, in their order."""
NEUTRAL = 0.5
"""The number that changes nothing where it says how far to go, and which way: what padding has."""


class AugmentSettings(SettingsGroup):
    """How training samples are varied."""

    augment: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    """How strongly training samples are varied, each anew in every epoch. 0: mirrored left-right only; 1: strongly. A
    run's augmented.png shows it."""
    augment_with: str = "+".join(TRANSFORMS)
    """What --augment does, joined by +, each at a part of its strength if it has one, such as rotate+0.5*colour: scale,
    rotate and shift move picture and mask alike; colour, blur and cutout (a grey rectangle) change the picture."""
    mix: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Share of training samples that get a rectangle of another one of the batch, with its mask (CutMix). 0: none."""

    augment_except_last: str = "0"
    """How long a run ends with samples as they are, mirrored only: 200 for steps, 2e for epochs, 10% of the run."""

    @field_validator("augment_except_last")
    @classmethod
    def _is_length(cls, value: str) -> str:
        part_of_run("--augment-except-last", value, Horizon(1, 1))
        return value

    @field_validator("augment_with")
    @classmethod
    def _has_known_transforms(cls, value: str) -> str:
        weighted_names("--augment-with", value, TRANSFORMS)
        return value

    @property
    def is_on(self) -> bool:
        """Whether a step does anything to its samples."""
        return self.augment > 0 or self.mix > 0

    def at(self, step: int, horizon: Horizon) -> tuple[float, float]:
        """The strength, and the share of mixed samples, of a step, counted from 1, of a run that is to be so long."""
        rest = part_of_run("--augment-except-last", self.augment_except_last, horizon)
        return (0.0, 0.0) if step > horizon.steps - rest else (self.augment, self.mix)

    @property
    def weights(self) -> dict[str, float]:
        """By transform, the part of the strength that it has; 0 where it is left out."""
        found = dict.fromkeys(TRANSFORMS, 0.0)
        for weight, name in weighted_names("--augment-with", self.augment_with, TRANSFORMS):
            found[name] += weight
        return found


def flips(indices: np.ndarray, seed: int, epoch: int) -> np.ndarray:
    """Whether each sample (by canonical index) is mirrored in this epoch: bool (len(indices),)."""
    return (_mix(_streams(indices, seed, epoch, 1)) >> np.uint64(63)).astype(bool)


def draw(indices: np.ndarray, seed: int, epoch: int) -> np.ndarray:
    """The numbers of `DRAWS` for each sample (by canonical index) in this epoch: float32 (len(indices), K) in [0, 1).

    They do not depend on the strength, so a stronger augmentation moves each sample the same way, only further. Padding
    (a negative index) has `NEUTRAL` throughout.
    """
    streams = _mix(_streams(indices, seed, epoch, 2))
    places = np.arange(len(DRAWS), dtype=np.uint64)
    numbers = (_mix(streams[:, None] + places * GAMMA) >> np.uint64(40)).astype(np.float32) / np.float32(2**24)
    numbers[indices < 0] = NEUTRAL
    return numbers


def mirror(images: np.ndarray, masks: np.ndarray, flipped: np.ndarray) -> None:
    """Mirror the flagged samples in place: images (N, H, W, 3), masks (N, H, W), flipped bool (N,)."""
    for row in np.flatnonzero(flipped):
        image = images[row].copy()
        for band in range(image.shape[-1]):  # NumPy moves single bytes four times as fast as pixels of three
            images[row, ..., band] = image[:, ::-1, band]
    masks[flipped] = masks[flipped, :, ::-1]


def _streams(indices: np.ndarray, seed: int, epoch: int, purpose: int) -> np.ndarray:
    """A number for each sample to begin a stream with: uint64 (len(indices),).

    The counter sets the streams of each purpose apart, and from the one that orders the epoch under the same key (0).
    """
    key = np.random.Philox(key=[seed, epoch], counter=[0, 0, 0, purpose]).random_raw()
    return indices.astype(np.uint64) ^ np.uint64(key)


GAMMA = np.uint64(0x9E3779B97F4A7C15)


def _mix(x: np.ndarray) -> np.ndarray:
    """SplitMix64 (Steele, Lea, Flood, 2014): every output bit depends on every input bit.

    Of states `GAMMA` apart it gives the generator's successive numbers.
    """
    x = x + GAMMA
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
