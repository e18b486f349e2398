"""What is minimised: a sum of terms, each a function of sums over the pixels of a global batch.

The training step, validation and evaluation use the same terms. A batch is never averaged by parts: every worker adds
up its own pixels, the sums are added over micro-shards and workers once, and only then does a term take its value.
So padding, ignored pixels and the number of workers change nothing.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from pydantic import field_validator

from unet.classes import IGNORE
from unet.settings import SettingsGroup, weighted_names

if TYPE_CHECKING:
    import tensorflow as tf


@dataclass(frozen=True)
class Pixels:
    """What a network says of some pixels, and what they are.

    Attributes:
        logits: float32 (N, S, S, C).
        labels: int32 (N, S, S) class ids; 0 where a pixel belongs to no class.
        valid: bool (N, S, S), whether it belongs to one.
        add: adds up values (N, S, S) over what is counted together: a whole batch, or each image by itself.
    """

    logits: "tf.Tensor"
    labels: "tf.Tensor"
    valid: "tf.Tensor"
    add: Callable[["tf.Tensor"], "tf.Tensor"]

    @classmethod
    def of(cls, logits: "tf.Tensor", masks: "tf.Tensor", add: Callable[["tf.Tensor"], "tf.Tensor"]) -> "Pixels":
        """Of logits and masks uint8 (N, S, S), in which `IGNORE` belongs to no class."""
        import tensorflow as tf

        valid = masks != IGNORE
        return cls(logits, tf.where(valid, tf.cast(masks, tf.int32), 0), valid, add)


class Term(Protocol):
    """A part of the loss.

    Attributes:
        is_mean: whether its two sums are a total and a count that does not depend on the logits. Such a term alone
            needs no sums of others before its gradient, which saves a step one of its two collectives. Any other term
            must have a finite slope where nothing is counted: a batch may have no label.
    """

    is_mean: bool

    def size(self, classes: int) -> int:
        """How many sums it has for a number of classes."""
        ...

    def sums(self, pixels: Pixels) -> "list[tf.Tensor]":
        """Each a sum over the pixels, made by `pixels.add`."""
        ...

    def value(self, sums: Sequence[Any]) -> Any:
        """The term, from its sums over a global batch or a whole split.

        Written with + - * / and indexing only: it is computed of tensors in a step, and of floats where scores are
        put together, without TensorFlow.
        """
        ...


class CrossEntropy:
    """The mean cross-entropy of the valid pixels."""

    is_mean = True

    def size(self, classes: int) -> int:
        return 2

    def sums(self, pixels: Pixels) -> "list[tf.Tensor]":
        import tensorflow as tf

        losses = tf.nn.sparse_softmax_cross_entropy_with_logits(pixels.labels, pixels.logits)
        weights = tf.cast(pixels.valid, tf.float32)
        return [pixels.add(losses * weights), pixels.add(weights)]

    def value(self, sums: Sequence[Any]) -> Any:
        return sums[0] / sums[1]


TERMS: dict[str, Callable[[], Term]] = {"cross_entropy": CrossEntropy}
"""The terms by their names in `--loss`."""


class LossSettings(SettingsGroup):
    """What is minimised."""

    loss: str = "cross_entropy"
    """Terms, each with a weight if it has one, joined by +: such as cross_entropy, or 0.5*cross_entropy."""

    @field_validator("loss")
    @classmethod
    def _has_known_terms(cls, value: str) -> str:
        parse(value)
        return value


def parse(text: str) -> list[tuple[float, str]]:
    """Weights and names of terms, of `cross_entropy` or `cross_entropy + 0.5*dice`.

    Raises:
        ValueError: it is written otherwise, or names an unknown term.
    """
    return weighted_names("--loss", text, TERMS)


class Loss:
    """The terms of `--loss` for a number of classes."""

    def __init__(self, settings: LossSettings, classes: int):
        self.terms = [(weight, TERMS[name]()) for weight, name in parse(settings.loss)]
        self._sizes = [term.size(classes) for _, term in self.terms]
        self.size = sum(self._sizes)
        """How many sums it has."""
        self.is_mean = len(self.terms) == 1 and self.terms[0][1].is_mean
        """Whether it is a total over a count, so that its gradient can be scaled after it was added up."""

    def sums(self, pixels: Pixels) -> "tf.Tensor":
        """All sums of all terms: (size,), or (size, N) where each image is added up by itself."""
        import tensorflow as tf

        found = [term.sums(pixels) for _, term in self.terms]
        for (_, term), sums, size in zip(self.terms, found, self._sizes, strict=True):
            if len(sums) != size:
                raise ValueError(f"{type(term).__name__} gives {len(sums)} sums, and says that it has {size}.")
        return tf.stack([total for sums in found for total in sums])

    def value(self, sums: Sequence[Any]) -> Any:
        """The loss, from its sums over a global batch or a whole split."""
        values, first = [], 0
        for (weight, term), size in zip(self.terms, self._sizes, strict=True):
            value = term.value(sums[first : first + size])
            values.append(value if weight == 1 else weight * value)
            first += size
        return sum(values[1:], values[0])

    def counted(self, sums: "Sequence[tf.Tensor]") -> "list[tf.Tensor]":
        """The same sums where a mean of nothing is 0 and has no slope: what a step differentiates."""
        import tensorflow as tf

        found, first = list(sums), 0
        for (_, term), size in zip(self.terms, self._sizes, strict=True):
            if term.is_mean:
                found[first + 1] = tf.maximum(found[first + 1], 1.0)
            first += size
        return found

    def mean_of(self, sums: Sequence[float]) -> float | None:
        """The loss of a split or an epoch; None where nothing was counted, or where it is not finite."""
        try:
            value = float(self.value([float(number) for number in sums]))
        except ZeroDivisionError:
            return None
        return value if math.isfinite(value) else None
