"""A network's exported forms against the network itself: equal probabilities, and the time that an image takes."""

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from unet.config import Resize
from unet.data.decode import BILINEAR, photo
from unet.data.pictures import Unusable
from unet.data.resize import to_square
from unet.data.shards import Prepared
from unet.data.sources import SUFFIXES
from unet.data.synthetic import draw_pet
from unet.errors import InputError
from unet.models.trained import TrainedModel
from unet.packaging.forms import Run, as_input
from unet.secrets import without_secrets
from unet.tracking.send import open_data

PHOTOS, DRAWN = 200, 20
"""How many are compared: of the user's photos at most, or of drawn pets."""
ENOUGH = 100
"""Where val has fewer photos, some of train come along: the ranges of eight bits are measured on them."""
ROUNDS, TIMED = 5, 8
"""Rounds of timing, and the images that every form takes in each."""


@dataclass(frozen=True)
class Agreement:
    """How far a form's answers are from the network's.

    Attributes:
        max_difference: the largest absolute difference of a probability.
        equal_classes: the share of pixels with the same likeliest class.
    """

    max_difference: float
    equal_classes: float


def squares(folder: Path | None, trained: TrainedModel, say: Callable[[str], None]) -> tuple[np.ndarray, str]:
    """Photos at the network's size as in training, uint8 (N, S, S, 3), and where they are from.

    Without a folder they are those that the model was validated on, with some of train where these are few, or drawn
    pets where its data are gone.

    Raises:
        InputError: the folder has no photo that can be read, or the data are damaged.
    """
    size, resize = trained.image_size, trained.resize
    if folder:
        return _of_folder(folder, size, resize, say), str(folder)
    if trained.run and (data := open_data(trained.run, trained.data_digest)):
        return _of_data(data)
    # At odd sizes, so that a drawing is resized as a photo is.
    drawn = (draw_pet(i, size + 2 * i + 1)[0] for i in range(DRAWN))
    pets = [to_square(Image.fromarray(pet), size, resize, BILINEAR, fill=0) for pet in drawn]
    return np.stack(pets), "drawn pets"


def _of_data(data: Prepared) -> tuple[np.ndarray, str]:
    found = {"val": _spread(data.count("val"), PHOTOS)}
    if len(found["val"]) < ENOUGH:
        found["train"] = _spread(data.count("train"), ENOUGH - len(found["val"]))
    photos = [image for split, places in found.items() for _, image, _ in data.pick(split, places)]
    splits = " and ".join(split for split, places in found.items() if places)
    return np.stack(photos), f"{splits} of {without_secrets(data.folder.uri)}"


def _spread(count: int, most: int) -> list[int]:
    """At most so many of `count` places, from the first to the last."""
    return np.linspace(0, count - 1, min(most, count)).astype(int).tolist()


def _of_folder(folder: Path, size: int, resize: Resize, say: Callable[[str], None]) -> np.ndarray:
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)
    chosen = [files[i] for i in _spread(len(files), PHOTOS)]
    found = []
    for file in chosen:
        try:
            picture = photo(str(file), lambda name: Path(name).read_bytes())
        except Unusable as error:
            say(f"left out: {error}")
        else:
            found.append(to_square(picture, size, resize, BILINEAR, fill=0))
    if not found:
        raise InputError(f"--images {folder} has no photo that can be read: give a folder of photos.")
    return np.stack(found)


def agreement(run: Run, images: np.ndarray, expected: list[np.ndarray]) -> Agreement:
    """A form's agreement with the network's probabilities, float32 (1, S, S, C) each, of images uint8 (N, S, S, 3)."""
    difference, equal = 0.0, []
    for image, truth in zip(images, expected, strict=True):
        found = run(as_input(image))
        if found.shape != truth.shape or not np.isfinite(found).all():
            return Agreement(float("inf"), 0.0)
        difference = max(difference, float(np.abs(found - truth).max()))
        equal.append(float((found.argmax(-1) == truth.argmax(-1)).mean()))
    return Agreement(difference, statistics.mean(equal))


def latencies(runs: Mapping[str, Run], images: np.ndarray, report: Callable[[int, int], None]) -> dict[str, float]:
    """The median milliseconds per image, by form, all warmed up.

    The forms take turns, in another order each round, so that other load on the machine affects them all.
    """
    inputs = [as_input(image) for image in images[:TIMED]]
    taken: dict[str, list[float]] = {name: [] for name in runs}
    names = list(runs)
    for turn in range(ROUNDS):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            runs[name](inputs[0])  # the others may have evicted its data from the caches
            for image in inputs:
                began = time.perf_counter()
                runs[name](image)
                taken[name].append(1000 * (time.perf_counter() - began))
        report(turn + 1, ROUNDS)
    return {name: statistics.median(times) for name, times in taken.items()}
