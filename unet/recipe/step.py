"""The training step: what a worker computes, and the one sum over workers a step.

Every worker holds plain variables with equal values. A step sums gradients, loss and counts over the workers in
one collective; finiteness, norm, clipping and the loss scale act on the sum, so all workers decide alike and
apply the same update. Evaluation runs the float32 graph over the float32 weights whatever the step's precision.
"""

import math
from dataclasses import dataclass

import keras
import numpy as np
import tensorflow as tf

from unet.classes import IGNORE
from unet.config import TrainSettings
from unet.recipe.layers import DropoutKey, build_unet, dropout_key

MIN_LOSS_SCALE, INITIAL_LOSS_SCALE = 1.0, 2.0**15
LOSS_SCALE_STEPS = 2000
"""After so many finite steps the scale of mixed_float16 doubles (Micikevicius et al., 2018)."""


@dataclass(frozen=True)
class StepResult:
    """One step over the global batch.

    Attributes:
        loss_sum: cross-entropy summed over the valid pixels.
        pixels: the number of valid pixels.
        grad_norm: global norm of the mean gradient before clipping.
        finite: whether loss and gradients were; if not, nothing was updated.
        control: the sum of what the workers passed as `control`.
        overflowed: whether gradients of a finite loss were not finite, and the loss had been scaled by more than the
            least scale: then that scale was too large, and nothing is wrong.
    """

    loss_sum: float
    pixels: float
    grad_norm: float
    finite: bool
    control: int
    overflowed: bool


class Learner:
    """The model for a number of `classes` (1-255), its optimizer and the steps, in one worker of `world_size`."""

    def __init__(self, settings: TrainSettings, classes: int, rank: int = 0, world_size: int = 1, strategy=None):
        self.settings, self.classes = settings, classes
        self.rank, self.world_size, self.strategy = rank, world_size, strategy
        self.image_size = settings.data.image_size
        training = settings.training
        keras.utils.set_random_seed(training.seed)
        keras.config.set_dtype_policy(training.precision)
        self.model = self._build()
        self.optimizer = keras.optimizers.Adam(training.learning_rate)
        self.optimizer.build(self.model.trainable_variables)
        self.scales_loss = training.precision == "mixed_float16"
        self.loss_scale = tf.Variable(INITIAL_LOSS_SCALE if self.scales_loss else 1.0, trainable=False)
        self.good_steps = tf.Variable(0, dtype=tf.int64, trainable=False)
        # A variable, so that the one traced step serves trials that differ in it.
        self.dropout = tf.Variable(settings.model.dropout, dtype=tf.float64, trainable=False)
        keras.config.set_dtype_policy("float32")
        self.float32_model = self.model if training.precision == "float32" else self._build()
        # A share holds equal micro-shards; with more workers than shards (always 1 then) it is one.
        self.micro_shards = max(1, training.grad_shards // world_size)
        self.share = -(-training.batch_size // world_size)
        images = tf.TensorSpec((self.share, self.image_size, self.image_size, 3), tf.uint8)
        masks = tf.TensorSpec((self.share, self.image_size, self.image_size), tf.uint8)
        step, control = tf.TensorSpec((), tf.int64), tf.TensorSpec((), tf.float32)
        self._step = _graph(self._step_graph, [images, masks, step, control])
        self._evaluate = _graph(self._evaluate_graph, [images, masks])
        self._predict = _graph(self._predict_graph, [images])
        self._sum = _graph(self._sum_over_workers)

    def _build(self) -> keras.Model:
        model = self.settings.model
        return build_unet(self.image_size, model.base_filters, model.depth, model.dropout, self.classes)

    def train_step(self, images: np.ndarray, masks: np.ndarray, step: int, control: int = 0) -> StepResult:
        """Update the weights from this worker's share: images uint8 (share, S, S, 3), masks uint8 (share, S, S).

        `step` counts from 1 over the whole run and keys the dropout.
        """
        found = self._step(images, masks, step, float(control)).numpy().tolist()
        loss_sum, pixels, norm, finite, control, scale = found
        overflowed = not finite and math.isfinite(loss_sum) and scale > MIN_LOSS_SCALE
        return StepResult(loss_sum, pixels, norm, bool(finite), round(control), overflowed)

    def gradients(self, images: np.ndarray, masks: np.ndarray, step: int) -> list[np.ndarray]:
        """The mean gradient over the global batch as a step would apply it, without clipping or update."""

        @tf.function
        def compute(images, masks, step):
            grads, sums = self._global_gradients(images, masks, step, tf.constant(0.0))
            return self._mean_gradients(grads, sums[1])

        return [g.numpy() for g in compute(images, masks, tf.constant(step, tf.int64))]

    def _step_graph(self, images, masks, step, control):
        grads, sums = self._global_gradients(images, masks, step, control)
        loss_sum, pixels, control = tf.unstack(sums)
        scale = tf.identity(self.loss_scale)  # before the step changes it
        grads = self._mean_gradients(grads, pixels)
        norm = tf.linalg.global_norm(grads)
        finite = tf.math.is_finite(norm) & tf.math.is_finite(loss_sum)
        if clip := self.settings.training.clip_norm:
            grads = [g * (clip / tf.maximum(norm, clip)) for g in grads]

        def update():
            self.optimizer.apply(grads, self.model.trainable_variables)
            if self.scales_loss:
                grown = (self.good_steps + 1) // LOSS_SCALE_STEPS
                self.loss_scale.assign(self.loss_scale * tf.where(grown > 0, 2.0, 1.0))
                self.good_steps.assign(tf.where(grown > 0, tf.constant(0, tf.int64), self.good_steps + 1))
            return finite

        def pass_over():
            if self.scales_loss:
                self.loss_scale.assign(tf.maximum(self.loss_scale / 2, MIN_LOSS_SCALE))
                self.good_steps.assign(0)
            return finite

        finite = tf.cond(finite, update, pass_over)
        return tf.stack([loss_sum, pixels, norm, tf.cast(finite, tf.float32), control, scale])

    def _global_gradients(self, images, masks, step, control):
        """Scaled gradient sums over the global batch, and the sums (loss, valid pixels, control)."""
        rows = self.share // self.micro_shards
        parts = []
        for i in range(self.micro_shards):
            place = slice(i * rows, (i + 1) * rows if i + 1 < self.micro_shards else None)
            # The barrier keeps one micro-shard's activations in memory at a time.
            with tf.control_dependencies(parts[-1] if parts else []):
                position = tf.constant(self.rank * self.share + i * rows, tf.int64)
                parts.append(self._local_gradients(tf.identity(images[place]), masks[place], step, position))
        total = _tree_sum(parts)
        flat = tf.concat([tf.reshape(t, [-1]) for t in total[:-1]] + [total[-1], [control]], 0)
        flat = self._sum_over_workers(flat)
        sizes = [int(np.prod(v.shape)) for v in self.model.trainable_variables]
        *grads, sums = tf.split(flat, [*sizes, 3])
        return [tf.reshape(g, v.shape) for g, v in zip(grads, self.model.trainable_variables, strict=True)], sums

    def _local_gradients(self, images, masks, step, position):
        """Gradients of the loss sum over a constant, the same for all workers, then [loss sum, valid pixels]."""
        key = DropoutKey(self.settings.training.seed, step, position, self.dropout)
        with tf.GradientTape() as tape, dropout_key(key):
            loss_sum, pixels, _ = _loss(self.model(_as_input(images), training=True), masks)
            # The constant keeps numbers near one (for float16); the true count is known only after the sum.
            scaled = loss_sum * (self.loss_scale / self._nominal_pixels)
        return [*tape.gradient(scaled, self.model.trainable_variables), tf.stack([loss_sum, pixels])]

    def _mean_gradients(self, grads, pixels):
        factor = self._nominal_pixels / (tf.maximum(pixels, 1.0) * self.loss_scale)
        return [g * factor for g in grads]

    @property
    def _nominal_pixels(self) -> float:
        return float(self.settings.training.batch_size * self.image_size**2)

    def refresh_float32(self) -> None:
        """Bring the weights of the evaluated float32 model up to date; call before evaluating."""
        if self.float32_model is not self.model:
            for target, weight in zip(self.float32_model.weights, self.model.weights, strict=True):
                target.assign(weight)

    def evaluate(self, images: np.ndarray, masks: np.ndarray) -> tuple[np.ndarray, float]:
        """int64 (C, C) confusion of this worker's share (row = truth) and its loss sum."""
        confusion, loss_sum = self._evaluate(images, masks)
        return confusion.numpy(), float(loss_sum)

    def _evaluate_graph(self, images, masks):
        logits = self.float32_model(_as_input(images), training=False)
        loss_sum, _, valid = _loss(logits, masks)
        classes = self.classes
        cells = tf.cast(masks, tf.int32) * classes + tf.argmax(logits, -1, tf.int32)
        cells = tf.where(valid, cells, classes**2)  # ignored pixels fall into a bin that is cut off
        counts = tf.math.bincount(tf.reshape(cells, [-1]), minlength=classes**2 + 1, dtype=tf.int64)
        return tf.reshape(counts[: classes**2], (classes, classes)), loss_sum

    def predict(self, images: np.ndarray) -> np.ndarray:
        """uint8 (N, S, S) class ids from uint8 (N, S, S, 3), in float32; N is at most a share."""
        padded = np.zeros((self.share, *images.shape[1:]), np.uint8)
        padded[: len(images)] = images
        return self._predict(padded).numpy()[: len(images)]

    def _predict_graph(self, images):
        return tf.cast(tf.argmax(self.float32_model(_as_input(images), training=False), -1), tf.uint8)

    def sum_over_workers(self, values: np.ndarray) -> np.ndarray:
        """The elementwise sum of an array over all workers, in its own dtype (int64 stays exact)."""
        return self._sum(tf.constant(values)).numpy()

    def _sum_over_workers(self, tensor):
        if self.world_size == 1:
            return tensor

        def reduce(local):
            # The copy stands on the replica's device, which the collective asks for.
            return tf.distribute.get_replica_context().all_reduce(tf.distribute.ReduceOp.SUM, tf.identity(local))

        return self.strategy.run(reduce, args=(tensor,))

    def restart(self, weights: list[np.ndarray], settings: TrainSettings) -> None:
        """Begin anew from initial weights, with settings that differ in nothing the graphs were traced for."""
        self.model.set_weights(weights)
        for variable in self.optimizer.variables:
            variable.assign(tf.zeros_like(variable))
        self.loss_scale.assign(INITIAL_LOSS_SCALE if self.scales_loss else 1.0)
        self.good_steps.assign(0)
        self.settings = settings
        self.set_rates()

    def set_rates(self) -> None:
        """Take learning rate and dropout from the settings (a loaded optimizer brings the rate of its own run)."""
        self.optimizer.learning_rate.assign(self.settings.training.learning_rate)
        self.dropout.assign(self.settings.model.dropout)

    def synchronise(self) -> None:
        """Give every worker the state of rank 0, exactly."""
        if self.world_size == 1:
            return
        variables = [*self.model.weights, *self.optimizer_variables().values()]
        for dtype in sorted({v.numpy().dtype for v in variables}, key=str):
            same = [v for v in variables if v.numpy().dtype == dtype]
            own = np.concatenate([v.numpy().reshape(-1) for v in same])
            shared = self.sum_over_workers(own if self.rank == 0 else np.zeros_like(own))
            ends = np.cumsum([v.numpy().size for v in same])
            for variable, value in zip(same, np.split(shared, ends[:-1]), strict=True):
                variable.assign(value.reshape(variable.shape))

    def optimizer_variables(self) -> dict[str, tf.Variable]:
        """What a step changes beside the weights, by a stable name."""
        slots = {f"optimizer/{i:03d}": v for i, v in enumerate(self.optimizer.variables)}
        return slots | {"loss_scale": self.loss_scale, "good_steps": self.good_steps}


def traced_for(settings: TrainSettings, classes: int) -> tuple:
    """What a learner's graphs and initial weights depend on: with equal ones, a learner serves both settings."""
    training, model = settings.training, settings.model
    network = (settings.data.image_size, model.base_filters, model.depth, model.dropout > 0, classes)
    return (*network, training.batch_size, training.precision, training.clip_norm, training.grad_shards, training.seed)


def _graph(function, signature=None):
    return tf.function(function, input_signature=signature, autograph=False)


def _as_input(images):
    """uint8 pixels to float32 in [0, 1]."""
    return tf.cast(images, tf.float32) / 255.0


def _loss(logits, masks):
    """Cross-entropy summed over valid pixels, their number (both float32 scalars), and which are valid."""
    valid = masks != IGNORE
    labels = tf.where(valid, tf.cast(masks, tf.int32), 0)
    losses = tf.nn.sparse_softmax_cross_entropy_with_logits(labels, logits)
    weights = tf.cast(valid, tf.float32)
    return tf.reduce_sum(losses * weights), tf.reduce_sum(weights), valid


def _tree_sum(parts):
    """Sum lists of tensors pairwise: two halves summed apart give the same bits as here."""
    while len(parts) > 1:
        pairs = [[a + b for a, b in zip(*pair, strict=True)] for pair in zip(parts[::2], parts[1::2], strict=False)]
        parts = pairs + (parts[-1:] if len(parts) % 2 else [])
    return parts[0]
