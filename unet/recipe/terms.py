"""The terms of a loss: each a mean that follows from sums over the pixels of a global batch."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Protocol

from unet.classes import IGNORE

if TYPE_CHECKING:
    import tensorflow as tf

    from unet.recipe.loss import LossSettings


@dataclass(frozen=True)
class Pixels:
    """What a network says of some pixels, and what they are.

    Attributes:
        logits: float32 (N, S, S, C).
        labels: int32 (N, S, S) class ids; 0 where a pixel belongs to no class.
        valid: bool (N, S, S), whether it belongs to one.
        by_image: whether each image is added up by itself, in float64; else all together.
    """

    logits: "tf.Tensor"
    labels: "tf.Tensor"
    valid: "tf.Tensor"
    by_image: bool = False

    @classmethod
    def of(cls, logits: "tf.Tensor", masks: "tf.Tensor", by_image: bool = False) -> "Pixels":
        """Of logits and masks uint8 (N, S, S), in which `IGNORE` belongs to no class."""
        import tensorflow as tf

        valid = masks != IGNORE
        return cls(logits, tf.where(valid, tf.cast(masks, tf.int32), 0), valid, by_image)

    @cached_property
    def probabilities(self) -> "tf.Tensor":
        """float32 (N, S, S, C)."""
        import tensorflow as tf

        return tf.nn.softmax(self.logits)

    @cached_property
    def truth(self) -> "tf.Tensor":
        """float32 (N, S, S, C), 1 at the class of a pixel, and 0 everywhere at one that belongs to none."""
        import tensorflow as tf

        return tf.one_hot(tf.where(self.valid, self.labels, -1), self.logits.shape[-1])

    def add(self, values: "tf.Tensor") -> "tf.Tensor":
        """The sum of values (N, S, S): a scalar, or (N,) by image."""
        import tensorflow as tf

        return tf.reduce_sum(tf.cast(values, tf.float64), (1, 2)) if self.by_image else tf.reduce_sum(values)

    def add_by_class(self, values: "tf.Tensor") -> "tf.Tensor":
        """The sums of values (N, S, S, C): (C,), or (N, C) by image."""
        import tensorflow as tf

        if self.by_image:
            return tf.reduce_sum(tf.cast(values, tf.float64), (1, 2))
        return tf.reduce_sum(values, (0, 1, 2))


class Term(Protocol):
    """A part of the loss, made from the settings and the number of classes.

    Attributes:
        size: how many sums it has.
        is_mean: whether they are just the total and the count of `mean`, in pixels. Such a term alone needs no sums of
            others before its gradient, which saves a step one of its two collectives.
    """

    size: int
    is_mean: bool

    def sums(self, pixels: Pixels) -> "list[tf.Tensor]":
        """Each made by `pixels.add`, or several at once by `pixels.add_by_class`."""
        ...

    def mean(self, sums: Any, ops: Any) -> tuple[Any, Any]:
        """A total and a count, whose quotient is the term, from its sums (size,) over a global batch or a split.

        Where nothing is counted the count is 0 and the total has a finite slope; nothing is learned then. The count
        does not depend on the logits. In a step the sums are a tensor and `ops` is `keras.ops`; where scores are put
        together they are an array and it is NumPy: what it takes from there has the same name in both.
        """
        ...


class CrossEntropy:
    """The mean cross-entropy of the valid pixels.

    With `label_smoothing` e the truth is 1 - e at a pixel's class, and e is spread evenly over all classes (Szegedy et
    al., 2016, "Rethinking the Inception Architecture"). With `class_weights` the mean is weighted: each pixel by the
    weight of its class, divided by the sum of these weights over the global batch.
    """

    size, is_mean = 2, True

    def __init__(self, settings: "LossSettings", classes: int):
        self._weights = settings.weights(classes)
        self._smoothing = settings.label_smoothing

    def sums(self, pixels: Pixels) -> "list[tf.Tensor]":
        return _weighted(pixels, _cross_entropies(pixels, self._smoothing), self._weights)

    def mean(self, sums: Any, ops: Any) -> tuple[Any, Any]:
        return sums[0], sums[1]


class Focal:
    """The mean of (1 - p)^gamma * cross-entropy, where p is the probability of a pixel's class.

    Pixels that are well classified count less (Lin et al., 2017, "Focal Loss for Dense Object Detection"). Weighted by
    class as cross-entropy is; labels are not smoothed.
    """

    size, is_mean = 2, True

    def __init__(self, settings: "LossSettings", classes: int):
        self._weights = settings.weights(classes)
        self._gamma = settings.focal_gamma

    def sums(self, pixels: Pixels) -> "list[tf.Tensor]":
        import tensorflow as tf

        losses = _cross_entropies(pixels)
        # A gamma below 1 has an infinite slope at 0, where the product has none.
        doubts = tf.maximum(-tf.math.expm1(-losses), 1e-7)
        return _weighted(pixels, doubts**self._gamma * losses, self._weights)

    def mean(self, sums: Any, ops: Any) -> tuple[Any, Any]:
        return sums[0], sums[1]


class _Overlap:
    """A mean over classes of what three sums a class say: the product of probability and truth, and each of both.

    Sums over the global batch, not over each image; only classes that are in its truth count.
    """

    is_mean = False

    def __init__(self, settings: "LossSettings", classes: int):
        self._classes = classes
        self.size = 3 * classes

    def sums(self, pixels: Pixels) -> "list[tf.Tensor]":
        import tensorflow as tf

        truth = pixels.truth
        probabilities = pixels.probabilities * tf.cast(pixels.valid, tf.float32)[..., None]
        return [pixels.add_by_class(values) for values in (probabilities * truth, probabilities, truth)]

    def mean(self, sums: Any, ops: Any) -> tuple[Any, Any]:
        both, predicted, true = (sums[i * self._classes : (i + 1) * self._classes] for i in range(3))
        present = ops.sign(true)
        # What is divided by is at least 1 for each class that counts.
        losses = 1 - self._agreement(both, ops.maximum(predicted + true, 1.0))
        return ops.sum(present * losses), ops.sum(present)

    def _agreement(self, both: Any, total: Any) -> Any:
        """Of each class (C,), from the sum of products and the sum of probabilities and truth."""
        raise NotImplementedError


class Dice(_Overlap):
    """One minus the mean soft Dice over the classes in the truth of the global batch.

    2 sum(p y) / (sum(p) + sum(y)), linear in both (Drozdzal et al., 2016, "The Importance of Skip Connections in
    Biomedical Image Segmentation"; without the squares of V-Net).
    """

    def _agreement(self, both: Any, total: Any) -> Any:
        return 2 * both / total


class Jaccard(_Overlap):
    """One minus the mean soft IoU over the classes in the truth of the global batch.

    sum(p y) / (sum(p) + sum(y) - sum(p y)) (Rahman and Wang, 2016, "Optimizing Intersection-Over-Union in Deep Neural
    Networks for Image Segmentation").
    """

    def _agreement(self, both: Any, total: Any) -> Any:
        return both / (total - both)


class Lovasz:
    """The Lovász extension of one minus the IoU, of each class in the truth of each image.

    Lovász-Softmax (Berman et al., 2018, "The Lovász-Softmax loss"). It sorts pixels by their errors and is no function
    of sums over a batch, so it is one of each image: the mean over all pairs of an image and a class in its truth.
    Ignored pixels are left out. It sorts each class of each image by itself, which costs time.
    """

    size, is_mean = 2, True

    def __init__(self, settings: "LossSettings", classes: int):
        pass

    def sums(self, pixels: Pixels) -> "list[tf.Tensor]":
        """Pairs count once for each pixel of their image, so that the count is in pixels as that of other means."""
        import tensorflow as tf

        truth = pixels.truth
        errors = tf.abs(truth - pixels.probabilities) * tf.cast(pixels.valid, tf.float32)[..., None]
        slopes = _lovasz_slopes(tf.stop_gradient(errors), truth)
        side = tf.shape(truth)[1]
        losses = tf.reduce_sum(errors * slopes, -1) * tf.cast(side * side, tf.float32)
        present = tf.reduce_sum(tf.reduce_max(truth, (1, 2)), -1)
        return [pixels.add(losses), pixels.add(tf.broadcast_to(present[:, None, None], tf.shape(losses)))]

    def mean(self, sums: Any, ops: Any) -> tuple[Any, Any]:
        return sums[0], sums[1]


def _cross_entropies(pixels: Pixels, smoothing: float = 0.0) -> "tf.Tensor":
    """float32 (N, S, S), of each pixel; of class 0 where it belongs to none."""
    import tensorflow as tf

    if not smoothing:
        return tf.nn.sparse_softmax_cross_entropy_with_logits(pixels.labels, pixels.logits)
    classes = pixels.logits.shape[-1]
    low = smoothing / classes
    truth = tf.one_hot(pixels.labels, classes, 1 - smoothing + low, low)
    return tf.nn.softmax_cross_entropy_with_logits(truth, pixels.logits)


def _weighted(pixels: Pixels, losses: "tf.Tensor", by_class: list[float] | None) -> "list[tf.Tensor]":
    """The sums of losses (N, S, S) and of weights over the valid pixels, each weighted by its class."""
    import tensorflow as tf

    weights = tf.cast(pixels.valid, tf.float32)
    if by_class:
        weights *= tf.gather(tf.constant(by_class, tf.float32), pixels.labels)
    return [pixels.add(losses * weights), pixels.add(weights)]


def _lovasz_slopes(errors: "tf.Tensor", truth: "tf.Tensor") -> "tf.Tensor":
    """By how much each error counts: float32 (N, S, S, C), 0 for a class that the truth of an image lacks.

    Algorithm 1 of Berman et al. (2018): over the errors in falling order, how much each adds to one minus the IoU.
    Pixels that are left out have an error of 0 and no truth: they come last, where they change nothing.
    """
    import tensorflow as tf

    shape, size = tf.shape(errors), errors.shape[1] * errors.shape[2]
    by_class = lambda values: tf.reshape(tf.transpose(values, (0, 3, 1, 2)), [-1, size])  # noqa: E731
    errors, truth = by_class(errors), by_class(truth)
    order = tf.argsort(errors, direction="DESCENDING")
    true = tf.gather(truth, order, batch_dims=1)
    total, found = tf.reduce_sum(truth, 1, keepdims=True), tf.cumsum(true, 1)
    places = tf.range(1, size + 1, dtype=tf.float32)
    losses = 1 - (total - found) / (total + places - found)
    steps = (losses - tf.pad(losses[:, :-1], ((0, 0), (1, 0)))) * tf.sign(total)
    rows = tf.range(tf.shape(order)[0])[:, None] * size
    slopes = tf.scatter_nd(tf.reshape(order + rows, [-1, 1]), tf.reshape(steps, [-1]), [tf.size(steps)])
    return tf.transpose(tf.reshape(slopes, [shape[0], shape[3], shape[1], shape[2]]), (0, 2, 3, 1))


TERMS: dict[str, Callable[["LossSettings", int], Term]] = {
    "cross_entropy": CrossEntropy,
    "focal": Focal,
    "dice": Dice,
    "jaccard": Jaccard,
    "lovasz": Lovasz,
}
"""The terms by their names in `--loss`."""
