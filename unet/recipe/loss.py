"""What is minimised: a sum of terms, each a function of sums over the pixels of a global batch.

The training step, validation and evaluation use the same terms. A batch is never averaged by parts: every worker adds
up its own pixels, the sums are added over micro-shards and workers once, and only then does a term take its value.
So padding, ignored pixels and the number of workers change nothing.
"""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import numpy as np
from pydantic import Field, field_validator

from unet.recipe.terms import TERMS, Pixels
from unet.settings import SettingsGroup, weighted_names

if TYPE_CHECKING:
    import tensorflow as tf

AUTO_WEIGHTS = "auto"
"""The class weights that are chosen when the run begins, by the pixels of its training split."""


class LossSettings(SettingsGroup):
    """What is minimised."""

    loss: str = "cross_entropy"
    """Terms, each with a weight if it has one, joined by +: such as cross_entropy, or cross_entropy+0.5*jaccard. Terms:
    cross_entropy, focal, dice and jaccard (overlap in the whole batch), lovasz (overlap in each image)."""
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the truth that cross_entropy spreads evenly over all classes. 0: none."""
    focal_gamma: Annotated[float, Field(ge=0, le=10)] = 2.0
    """How much less focal counts pixels that are well classified. 0: as cross_entropy."""
    class_weights: str | None = None
    """How much the pixels of each class count in cross_entropy and focal: numbers joined by commas, in the order of the
    classes, such as 1,0.5,2; only their ratios matter. auto: by the inverse square root of how frequent a class is in
    train. None: all alike."""

    @field_validator("loss")
    @classmethod
    def _has_known_terms(cls, value: str) -> str:
        parse(value)
        return value

    @field_validator("class_weights")
    @classmethod
    def _are_weights(cls, value: str | None) -> str | None:
        if value not in (None, AUTO_WEIGHTS):
            _numbers(value)
        return value

    def weights(self, classes: int) -> list[float] | None:
        """One a class, of mean 1, so that losses keep their scale; None where all are alike.

        Raises:
            ValueError: there are not as many, or they were not chosen yet.
        """
        if self.class_weights is None:
            return None
        if self.class_weights == AUTO_WEIGHTS:
            raise ValueError("--class-weights auto was not chosen by the data: give numbers")
        found = _numbers(self.class_weights)
        if len(found) != classes:
            raise ValueError(
                f"--class-weights {self.class_weights} has {len(found)} numbers, but the data have {classes} classes: "
                "give one for each, in their order"
            )
        return [number / sum(found) * classes for number in found]


def _numbers(text: str) -> list[float]:
    """Of `1,0.5,2`. Raises ValueError."""
    try:
        found = [float(part) for part in text.split(",")]
    except ValueError:
        found = []
    if not (all(number >= 0 for number in found) and 0 < sum(found) < math.inf):
        raise ValueError(
            f"--class-weights {text} are not weights: write auto, or a number of 0 or more for each class, joined by "
            "commas, such as 1,0.5,2"
        )
    return found


def weights_by_frequency(pixels: np.ndarray) -> str:
    """What `--class-weights auto` means for so many pixels of each class, int64 (C,): 1 / sqrt(share), of mean 1.

    After SalsaNext (Cortinhal, Tzelepis, Aksoy, 2020). The root keeps rare classes from drowning the others. A class
    that is absent, of which nothing can be learned, counts as the rarest.
    """
    rarest = pixels[pixels > 0].min(initial=max(pixels.max(), 1))
    weights = 1 / np.sqrt(np.maximum(pixels, rarest))
    return ",".join(f"{weight:.4g}" for weight in weights / weights.mean())


def parse(text: str) -> list[tuple[float, str]]:
    """Weights and names of terms, of `cross_entropy` or `cross_entropy + 0.5*dice`.

    Raises:
        ValueError: it is written otherwise, or names an unknown term.
    """
    return weighted_names("--loss", text, TERMS)


class Loss:
    """The terms of `--loss` for a number of classes."""

    def __init__(self, settings: LossSettings, classes: int):
        self.terms = [(weight, TERMS[name](settings, classes)) for weight, name in parse(settings.loss)]
        self.size = sum(term.size for _, term in self.terms)
        """How many sums it has."""
        self.is_mean = len(self.terms) == 1 and self.terms[0][1].is_mean
        """Whether it is a total over a count, so that its gradient can be scaled after it was added up."""

    def sums(self, pixels: Pixels) -> "tf.Tensor":
        """All sums of all terms: (size,), or (N, size) where each image is added up by itself."""
        import tensorflow as tf

        found = []
        for _, term in self.terms:
            sums = [part if part.shape.rank > pixels.by_image else part[..., None] for part in term.sums(pixels)]
            size = sum(part.shape[-1] for part in sums)
            if size != term.size:
                raise ValueError(f"{type(term).__name__} gives {size} sums, and says that it has {term.size}.")
            found += sums
        return tf.concat(found, -1)

    def value(self, sums: "tf.Tensor") -> "tf.Tensor":
        """The loss, from its sums (size,) over a global batch; NaN where a term counts nothing."""
        import keras

        return self._added(sums, keras.ops, lambda total, count: total / count)

    def slopes(self, sums: "tf.Tensor") -> "tf.Tensor":
        """The derivatives of the loss by each of its sums, (size,); a term that counts nothing has none."""
        import keras
        import tensorflow as tf

        with tf.GradientTape() as tape:
            tape.watch(sums)
            value = self._added(sums, keras.ops, lambda total, count: total / counted(count))
        return tape.gradient(value, sums)

    def mean_of(self, sums: Sequence[float]) -> float | None:
        """The loss of a split or an epoch; None where nothing was counted, or where it is not finite."""
        with np.errstate(all="ignore"):
            value = float(self._added(np.asarray(sums, np.float64), np, lambda total, count: total / count))
        return value if math.isfinite(value) else None

    def _added(self, sums, ops, divide):
        values, first = [], 0
        for weight, term in self.terms:
            value = divide(*term.mean(sums[first : first + term.size], ops))
            values.append(value if weight == 1 else weight * value)
            first += term.size
        return sum(values[1:], values[0])


def counted(count: "tf.Tensor") -> "tf.Tensor":
    """What a total is divided by: a mean of nothing is 0 and has no slope. Counts of weights may be below 1."""
    import tensorflow as tf

    return tf.where(count > 0, count, tf.ones_like(count))
