"""The training step: what a worker computes, and the sums over workers.

Every worker holds plain variables with equal values. A step adds up gradients, the sums of the loss, moving averages
and a control code over the workers in one collective; finiteness, norm, clipping and the loss scale act on the sum,
so all workers decide alike and apply the same update. Evaluation runs the float32 graph over the float32 weights
whatever the step's precision.

Why: docs/decisions.md#plain-variables-one-collective-a-step
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import keras
import numpy as np
import tensorflow as tf

from unet.classes import IGNORE
from unet.recipe.layers import TrainingPass, build, training_pass
from unet.recipe.loss import Loss, Pixels
from unet.recipe.optimizer import Optimizer, learning_rate
from unet.recipe.recipe import WEIGHTS, Recipe

MIN_LOSS_SCALE, INITIAL_LOSS_SCALE = 1.0, 2.0**15
LOSS_SCALE_STEPS = 2000
"""After this many finite steps the scale of mixed_float16 doubles (Micikevicius et al., 2018)."""


@dataclass(frozen=True)
class StepResult:
    """One step over the global batch.

    Attributes:
        loss_sums: the sums of the loss' terms (`Loss.value` makes the loss of them).
        loss: of the global batch.
        grad_norm: global norm of the mean gradient before clipping.
        finite: whether loss and gradients were; if not, nothing was updated.
        control: the sum of what the workers passed as `control`.
        overflowed: whether gradients of a finite loss were not finite, and the loss had been scaled by more than the
            least scale: then that scale was too large, and nothing is wrong.
    """

    loss_sums: list[float]
    loss: float
    grad_norm: float
    finite: bool
    control: int
    overflowed: bool


class Learner:
    """The model of a recipe, its optimizer and the steps, in one worker of `world_size`.

    Attributes:
        model: in the precision of the steps.
        float32_model: the same weights in float32, once `refresh_float32` was called.
    """

    def __init__(self, recipe: Recipe, rank: int = 0, world_size: int = 1, strategy=None):
        self.recipe, self.classes, self.image_size = recipe, recipe.classes, recipe.image_size
        self.rank, self.world_size, self.strategy = rank, world_size, strategy
        training = recipe.training
        keras.utils.set_random_seed(training.seed)
        keras.config.set_dtype_policy(training.precision)
        self.model = build(recipe.network, recipe.image_size)
        self.optimizer = Optimizer(self.model.trainable_variables)
        self.loss = Loss(recipe.loss, recipe.classes)
        self.scales_loss = training.precision == "mixed_float16"
        self.loss_scale = tf.Variable(INITIAL_LOSS_SCALE if self.scales_loss else 1.0, trainable=False)
        self.good_steps = tf.Variable(0, dtype=tf.int64, trainable=False)
        keras.config.set_dtype_policy("float32")
        is_float32 = training.precision == "float32"
        self.float32_model = self.model if is_float32 else build(recipe.network, recipe.image_size)
        self._initial = {name: _compact(variable.numpy()) for name, variable in self.variables().items()}
        # A share holds equal micro-shards; with more workers than shards (always 1 then) it is one.
        self.micro_shards = max(1, training.grad_shards // world_size)
        self.share = -(-training.batch_size // world_size)
        images = tf.TensorSpec((self.share, self.image_size, self.image_size, 3), tf.uint8)
        masks = tf.TensorSpec((self.share, self.image_size, self.image_size), tf.uint8)
        step, control = tf.TensorSpec((), tf.int64), tf.TensorSpec((), tf.float32)
        rate, dropout = tf.TensorSpec((), tf.float32), tf.TensorSpec((), tf.float64)
        self._moved: list[tuple[keras.Variable, float]] = []  # as tracing finds them
        self._step = _graph(self._step_graph, [images, masks, step, control, rate, dropout])
        self._evaluate = _graph(self._evaluate_graph, [images, masks])
        self._predict = _graph(self._predict_graph, [images])
        self._sum = _graph(self._sum_over_workers)

    def variables(self) -> dict[str, keras.Variable | tf.Variable]:
        """Everything that a step changes, by the names of `Recipe.variables`."""
        weights = {f"{WEIGHTS}{variable.path}": variable for variable in self.model.weights}
        slots = {f"optimizer/{name}": variable for name, variable in self.optimizer.variables().items()}
        return weights | slots | {"loss_scale": self.loss_scale, "good_steps": self.good_steps}

    def restart(self, recipe: Recipe) -> None:
        """Begin anew with a recipe of the same `traced_key`: equal, bit for bit, to a new learner."""
        self.load(self._initial.items())
        self.recipe = recipe

    def load(self, values: Iterable[tuple[str, np.ndarray]]) -> None:
        """Give variables these values, by name; those that are not named stay."""
        variables = self.variables()
        for name, value in values:
            variables[name].assign(value)

    def synchronise(self) -> None:
        """Give every worker the state of rank 0, exactly."""
        if self.world_size == 1:
            return
        variables = list(self.variables().values())
        for dtype in sorted({v.numpy().dtype for v in variables}, key=str):
            same = [v for v in variables if v.numpy().dtype == dtype]
            own = np.concatenate([v.numpy().reshape(-1) for v in same])
            shared = self.sum_over_workers(own if self.rank == 0 else np.zeros_like(own))
            ends = np.cumsum([v.numpy().size for v in same])
            for variable, value in zip(same, np.split(shared, ends[:-1]), strict=True):
                variable.assign(value.reshape(variable.shape))

    def train_step(
        self, images: np.ndarray, masks: np.ndarray, step: int, control: int = 0, steps: int = 0
    ) -> StepResult:
        """Update the weights from this worker's share: images uint8 (share, S, S, 3), masks uint8 (share, S, S).

        `step` counts from 1 over the whole run, which is to have `steps`; it keys the dropout and gives the learning
        rate.
        """
        rate = learning_rate(self.recipe.optimizer, step, steps)
        found = self._step(images, masks, step, float(control), rate, self.recipe.model.dropout).numpy().tolist()
        *sums, loss, norm, finite, control, scale = found
        overflowed = not finite and math.isfinite(loss) and scale > MIN_LOSS_SCALE
        return StepResult(sums, loss, norm, bool(finite), round(control), overflowed)

    def gradients(self, images: np.ndarray, masks: np.ndarray, step: int) -> list[np.ndarray]:
        """The gradient of the global batch's loss as a step would apply it, without clipping or update."""

        @tf.function
        def compute(images, masks, step):
            dropout = tf.constant(self.recipe.model.dropout, tf.float64)
            return self._global_gradients(images, masks, step, tf.constant(0.0), dropout)[0]

        return [g.numpy() for g in compute(images, masks, tf.constant(step, tf.int64))]

    def _step_graph(self, images, masks, step, control, rate, dropout):
        gradients, sums, moved, control = self._global_gradients(images, masks, step, control, dropout)
        loss = self.loss.value(tf.unstack(sums))
        scale = tf.identity(self.loss_scale)  # before the step changes it
        norm = tf.linalg.global_norm(gradients)
        # Of a batch without a label the sums are finite, and the loss is not.
        finite = tf.math.is_finite(norm) & tf.reduce_all(tf.math.is_finite(sums))
        if clip := self.recipe.optimizer.clip_norm:
            gradients = [g * (clip / tf.maximum(norm, clip)) for g in gradients]

        def update():
            self.optimizer.apply(gradients, rate)
            for variable, momentum, total, count in moved:
                variable.assign(momentum * variable + (1 - momentum) * total / tf.maximum(count, 1.0))
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
        return tf.concat([sums, tf.stack([loss, norm, tf.cast(finite, tf.float32), control, scale])], 0)

    def _global_gradients(self, images, masks, step, control, dropout):
        """Gradients of the loss of the global batch, the sums of its terms, moving averages, and the control sum."""
        shards = self._shards(images, masks, step, dropout)
        if self.loss.is_mean:
            # The constant keeps numbers near one (for float16); the true count is known only after the sum.
            constant = self.loss_scale / self._nominal_pixels
            slopes = lambda sums: tf.stack([constant, *[tf.zeros(())] * (self.loss.size - 1)])  # noqa: E731
        elif len(shards) == 1:
            slopes = lambda sums: self._slopes(self._sum_over_workers(sums))  # noqa: E731
        else:
            # The sums of the whole batch are made by a pass of their own: to keep what several micro-shards need for
            # their backward pass would take the memory that micro-shards are to save.
            whole = self._slopes(self._sum_over_workers(_tree_sum(_in_turn(shards, self._local_sums))[0]))
            slopes = lambda sums: whole  # noqa: E731
        own = _in_turn(shards, lambda *shard: self._local_gradients(*shard, slopes))
        *gradients, sums, moved = _tree_sum(own)
        flat = tf.concat([tf.reshape(g, [-1]) for g in gradients] + [sums, moved, [control]], 0)
        flat = self._sum_over_workers(flat)
        weights = self.model.trainable_variables
        sizes = [int(np.prod(v.shape)) for v in weights]
        *gradients, sums, moved, control = tf.split(flat, [*sizes, self.loss.size, int(moved.shape[0]), 1])
        gradients = [tf.reshape(g, v.shape) for g, v in zip(gradients, weights, strict=True)]
        return self._unscaled(gradients, sums), sums, self._averages(moved), control[0]

    def _shards(self, images, masks, step, dropout) -> list[tuple]:
        """The micro-shards of this worker's share: what `_forward` takes."""
        rows, shards = self.share // self.micro_shards, []
        for i in range(self.micro_shards):
            place = slice(i * rows, (i + 1) * rows if i + 1 < self.micro_shards else None)
            position = tf.constant(self.rank * self.share + i * rows, tf.int64)
            shards.append((images[place], masks[place], step, position, dropout))
        return shards

    def _forward(self, images, masks, step, position, dropout) -> tuple[tf.Tensor, TrainingPass]:
        """The sums of the loss' terms over a micro-shard, and what its layers left behind."""
        samples = tf.reduce_any(masks != IGNORE, (1, 2))
        current = TrainingPass(self.recipe.training.seed, step, position, dropout, samples)
        with training_pass(current):
            logits = self.model(_as_input(images), training=True)
        return self.loss.sums(Pixels.of(logits, masks, tf.reduce_sum)), current

    def _local_sums(self, *shard):
        return [self._forward(*shard)[0]]

    def _local_gradients(self, *shard_and_slopes):
        """Scaled gradients over a micro-shard, then the sums of the loss' terms, then those of moving averages.

        `slopes` gives the scaled derivatives of the loss by its sums, from this micro-shard's own.
        """
        *shard, slopes = shard_and_slopes
        with tf.GradientTape() as tape:
            sums, current = self._forward(*shard)
        gradients = tape.gradient(sums, self.model.trainable_variables, output_gradients=slopes(sums))
        averages = list(current.moved.values())
        self._moved = [(average.variable, average.momentum) for average in averages]
        moved = [tf.reshape(t, [-1]) for average in averages for t in (average.total, average.count)]
        return [*gradients, sums, tf.concat(moved, 0) if moved else tf.zeros([0])]

    def _slopes(self, sums: tf.Tensor) -> tf.Tensor:
        """The derivatives of the loss by each of its sums over the global batch, times the loss scale."""
        with tf.GradientTape() as tape:
            tape.watch(sums)
            value = self.loss.value(tf.unstack(sums))
        return tape.gradient(value, sums) * self.loss_scale

    def _unscaled(self, gradients, sums):
        if self.loss.is_mean:
            (weight, _), count = self.loss.terms[0], sums[1]
            factor = weight * self._nominal_pixels / (tf.maximum(count, 1.0) * self.loss_scale)
        else:
            factor = 1.0 / self.loss_scale
        return [g * factor for g in gradients]

    @property
    def _nominal_pixels(self) -> float:
        return float(self.recipe.training.batch_size * self.image_size**2)

    def _averages(self, flat) -> list[tuple]:
        """(variable, momentum, total, count) of each moving average, over the global batch."""
        sizes = [size for variable, _ in self._moved for size in (int(np.prod(variable.shape)), 1)]
        parts = iter(tf.split(flat, sizes) if sizes else [])
        return [(v, momentum, tf.reshape(next(parts), v.shape), next(parts)[0]) for v, momentum in self._moved]

    def refresh_float32(self) -> None:
        """Bring the weights of the evaluated float32 model up to date; call before evaluating."""
        if self.float32_model is not self.model:
            for target, weight in zip(self.float32_model.weights, self.model.weights, strict=True):
                target.assign(weight)

    def evaluate(self, images: np.ndarray, masks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """int64 (C, C) confusion of this worker's share (row = truth), and float64 (`loss.size`,) sums of its loss."""
        confusion, sums = self._evaluate(images, masks)
        return confusion.numpy(), sums.numpy().astype(np.float64)

    def _evaluate_graph(self, images, masks):
        logits = self.float32_model(_as_input(images), training=False)
        pixels = Pixels.of(logits, masks, tf.reduce_sum)
        classes = self.classes
        cells = tf.cast(masks, tf.int32) * classes + tf.argmax(logits, -1, tf.int32)
        cells = tf.where(pixels.valid, cells, classes**2)  # ignored pixels fall into a bin that is cut off
        counts = tf.math.bincount(tf.reshape(cells, [-1]), minlength=classes**2 + 1, dtype=tf.int64)
        return tf.reshape(counts[: classes**2], (classes, classes)), self.loss.sums(pixels)

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


def _graph(function, signature=None):
    return tf.function(function, input_signature=signature, autograph=False)


def _as_input(images):
    """uint8 pixels to float32 in [0, 1]."""
    return tf.cast(images, tf.float32) / 255.0


def _compact(value: np.ndarray) -> np.ndarray:
    """The same, without memory for zeros: most of what a new optimizer holds."""
    return value if value.any() else np.broadcast_to(np.zeros((), value.dtype), value.shape)


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
