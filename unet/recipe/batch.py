"""The gradient of a global batch from the shares of its workers.

A step adds up gradients, the sums of the loss, moving averages and a control code over the workers in one collective; a
loss that is not a mean has its own sums added before.
"""

from collections.abc import Callable
from dataclasses import dataclass

import keras
import numpy as np
import tensorflow as tf

from unet.classes import IGNORE
from unet.recipe.loss import Loss, counted
from unet.recipe.network import is_of_encoder
from unet.recipe.passes import MovingAverage, TrainingPass, training_pass
from unet.recipe.recipe import Recipe
from unet.recipe.terms import Pixels
from unet.recipe.transforms import Augmentation, Drawn


@dataclass(frozen=True)
class Summed:
    """What a step needs to know of its global batch, the same on every worker.

    Attributes:
        gradients: of the loss by the weights that learn, by their names.
        sums: of the loss' terms (`Loss.size`,).
        averages: the moving averages of the layers.
        control: the sum of what the workers passed as `control`.
    """

    gradients: dict[str, tf.Tensor]
    sums: tf.Tensor
    averages: list[MovingAverage]
    control: tf.Tensor


class GlobalBatch:
    """Sums over the micro-shards of a worker's share and over `world_size` workers, by graphs that are being traced.

    `add` adds up a tensor over the workers.
    """

    def __init__(
        self,
        recipe: Recipe,
        model: keras.Model,
        loss: Loss,
        loss_scale: tf.Variable,
        rank: int,
        world_size: int,
        add: Callable[[tf.Tensor], tf.Tensor],
    ):
        self._recipe, self._model, self._loss, self._loss_scale = recipe, model, loss, loss_scale
        self._rank, self._add = rank, add
        # A share holds equal micro-shards; with more workers than shards (always 1 then) it is one.
        self._micro_shards = max(1, recipe.training.grad_shards // world_size)
        self._share = -(-recipe.training.batch_size // world_size)
        self._augmentation = Augmentation(recipe.augment)
        self._moved: list[MovingAverage] = []  # as tracing finds them

    def gradients(self, images, masks, drawn: Drawn, step, control, dropout, trains_encoder: bool = True) -> Summed:
        """Of this worker's share and those of the others: images uint8 (share, S, S, 3), masks uint8 (share, S, S)."""
        shards = self._shards(images, masks, drawn, step, dropout, trains_encoder)
        weights = [w for w in self._model.trainable_variables if trains_encoder or not is_of_encoder(w.path)]
        if self._loss.is_mean:
            # The constant keeps numbers near one (for float16); the true count is known only after the sum.
            constant = self._loss_scale / self._nominal_pixels
            slopes = lambda sums: tf.stack([constant, *[tf.zeros(())] * (self._loss.size - 1)])  # noqa: E731
        elif len(shards) == 1:
            slopes = lambda sums: self._slopes(self._add(sums))  # noqa: E731
        else:
            # The sums of the whole batch are made by a pass of their own: to keep what several micro-shards need for
            # their backward pass would take the memory that micro-shards are to save.
            whole = self._slopes(self._add(_tree_sum(_in_turn(shards, self._local_sums))[0]))
            slopes = lambda sums: whole  # noqa: E731
        own = _in_turn(shards, lambda *shard: self._local_gradients(*shard, weights, slopes))
        *gradients, sums, moved = _tree_sum(own)
        flat = tf.concat([tf.reshape(g, [-1]) for g in gradients] + [sums, moved, [control]], 0)
        flat = self._add(flat)
        sizes = [int(np.prod(v.shape)) for v in weights]
        *gradients, sums, moved, control = tf.split(flat, [*sizes, self._loss.size, int(moved.shape[0]), 1])
        gradients = [tf.reshape(g, v.shape) for g, v in zip(gradients, weights, strict=True)]
        by_name = {w.path: g for w, g in zip(weights, self._unscaled(gradients, sums), strict=True)}
        return Summed(by_name, sums, self._averages(moved), control[0])

    def _shards(self, images, masks, drawn, step, dropout, trains_encoder) -> list[tuple]:
        """The micro-shards of this worker's share: what `_forward` takes."""
        rows, shards = self._share // self._micro_shards, []
        for i in range(self._micro_shards):
            place = slice(i * rows, (i + 1) * rows if i + 1 < self._micro_shards else None)
            position = tf.constant(self._rank * self._share + i * rows, tf.int64)
            draws = drawn._replace(draws=drawn.draws[place])
            shards.append((images[place], masks[place], draws, step, position, dropout, trains_encoder))
        return shards

    def _forward(self, images, masks, drawn, step, position, dropout, trains_encoder) -> tuple[tf.Tensor, TrainingPass]:
        """The sums of the loss' terms over a micro-shard, and what its layers left behind."""
        samples = tf.reduce_any(masks != IGNORE, (1, 2))
        current = TrainingPass(self._recipe.training.seed, step, position, dropout, samples, trains_encoder)
        inputs, masks = self._augmentation(as_input(images), masks, drawn)
        with training_pass(current):
            logits = self._model(inputs, training=True)
        return self._loss.sums(Pixels.of(logits, masks)), current

    def _local_sums(self, *shard):
        return [self._forward(*shard)[0]]

    def _local_gradients(self, *shard_and_more):
        """Scaled gradients over a micro-shard, then the sums of the loss' terms, then those of moving averages.

        Behind the shard stand the weights, and `slopes`, which gives the scaled derivatives of the loss by its sums,
        from this micro-shard's own.
        """
        *shard, weights, slopes = shard_and_more
        with tf.GradientTape() as tape:
            sums, current = self._forward(*shard)
        gradients = tape.gradient(sums, weights, output_gradients=slopes(sums))
        averages = list(current.moved.values())
        self._moved = averages
        moved = [tf.reshape(t, [-1]) for average in averages for t in (average.total, average.count)]
        return [*gradients, sums, tf.concat(moved, 0) if moved else tf.zeros([0])]

    def _slopes(self, sums: tf.Tensor) -> tf.Tensor:
        """The derivatives of the loss by each of its sums over the global batch, times the loss scale."""
        return self._loss.slopes(sums) * self._loss_scale

    def _unscaled(self, gradients, sums):
        if self._loss.is_mean:
            (weight, _), count = self._loss.terms[0], sums[1]
            factor = weight * self._nominal_pixels / (counted(count) * self._loss_scale)
        else:
            factor = 1.0 / self._loss_scale
        return [g * factor for g in gradients]

    @property
    def _nominal_pixels(self) -> float:
        return float(self._recipe.training.batch_size * self._recipe.image_size**2)

    def _averages(self, flat) -> list[MovingAverage]:
        """Those that the layers move, with totals and counts over the global batch."""
        sizes = [size for average in self._moved for size in (int(np.prod(average.variable.shape)), 1)]
        parts = iter(tf.split(flat, sizes) if sizes else [])
        return [
            MovingAverage(one.variable, tf.reshape(next(parts), one.variable.shape), next(parts)[0], one.momentum)
            for one in self._moved
        ]


def as_input(images: tf.Tensor) -> tf.Tensor:
    """uint8 pixels to float32 in [0, 1]."""
    return tf.cast(images, tf.float32) / 255.0


def _in_turn(shards: list[tuple], compute) -> list[list[tf.Tensor]]:
    """What `compute` makes of each micro-shard, one after another: one's activations are in memory at a time."""
    found: list[list[tf.Tensor]] = []
    for images, *rest in shards:
        with tf.control_dependencies(found[-1] if found else []):
            found.append(compute(tf.identity(images), *rest))
    return found


def _tree_sum(parts):
    """Sum lists of tensors pairwise: two halves summed apart give the same bits as here."""
    while len(parts) > 1:
        pairs = [[a + b for a, b in zip(*pair, strict=True)] for pair in zip(parts[::2], parts[1::2], strict=False)]
        parts = pairs + (parts[-1:] if len(parts) % 2 else [])
    return parts[0]
