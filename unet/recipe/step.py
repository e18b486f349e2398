"""The training step: what a worker holds, and how it changes that.

Every worker holds plain variables with equal values. Finiteness, norm, clipping and the loss scale act on the gradient
of the global batch (`unet.recipe.batch`), so all workers decide alike and apply the same update. Evaluation runs the
float32 graph over the float32 weights whatever the step's precision.

Why: docs/decisions.md#plain-variables-one-collective-a-step
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import keras
import numpy as np
import tensorflow as tf

from unet.errors import RunFailed
from unet.recipe.augment import DRAWS, NEUTRAL
from unet.recipe.averaging import Average
from unet.recipe.batch import GlobalBatch, as_input
from unet.recipe.layers import build
from unet.recipe.loss import Loss
from unet.recipe.optimizer import Optimizer, learning_rate
from unet.recipe.recipe import WEIGHTS, Recipe
from unet.recipe.schedule import Horizon
from unet.recipe.terms import Pixels
from unet.recipe.transforms import Augmentation, Drawn

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
        learning_rate: of the step.
    """

    loss_sums: list[float]
    loss: float
    grad_norm: float
    finite: bool
    control: int
    overflowed: bool
    learning_rate: float


class Learner:
    """The model of a recipe, its optimizer and the steps, in one worker of `world_size`.

    `start` has values of weights to begin with, by their names, in the place of those that are drawn.

    Attributes:
        model: in the precision of the steps.
        float32_model: in float32, with the weights that are scored, once `refresh_float32` was called.
    """

    def __init__(
        self,
        recipe: Recipe,
        rank: int = 0,
        world_size: int = 1,
        strategy=None,
        start: Mapping[str, np.ndarray] | None = None,
    ):
        self.recipe, self.classes, self.image_size = recipe, recipe.classes, recipe.image_size
        self.rank, self.world_size, self.strategy = rank, world_size, strategy
        training = recipe.training
        keras.utils.set_random_seed(training.seed)
        keras.config.set_dtype_policy(training.precision)
        self.model = build(recipe.network, recipe.image_size)
        self.optimizer = Optimizer(recipe.optimizer, recipe.network.trainable, self.model.trainable_variables)
        self.average = Average(self.model.weights, recipe.optimizer.ema_decay) if recipe.averages else None
        self.loss = Loss(recipe.loss, recipe.classes)
        self.scales_loss = training.precision == "mixed_float16"
        self.loss_scale = tf.Variable(INITIAL_LOSS_SCALE if self.scales_loss else 1.0, trainable=False)
        self.good_steps = tf.Variable(0, dtype=tf.int64, trainable=False)
        keras.config.set_dtype_policy("float32")
        is_scored = training.precision == "float32" and recipe.scores_its_weights
        self.float32_model = self.model if is_scored else build(recipe.network, recipe.image_size)
        self._check_variables()
        self.load(self._places(start or {}))
        self._initial = {name: _compact(variable.numpy()) for name, variable in self.variables().items()}
        self.share = -(-training.batch_size // world_size)
        self.batch = GlobalBatch(
            recipe, self.model, self.loss, self.loss_scale, rank, world_size, self._sum_over_workers
        )
        images = tf.TensorSpec((self.share, self.image_size, self.image_size, 3), tf.uint8)
        masks = tf.TensorSpec((self.share, self.image_size, self.image_size), tf.uint8)
        step, control = tf.TensorSpec((), tf.int64), tf.TensorSpec((), tf.float32)
        rate, dropout = tf.TensorSpec((), tf.float32), tf.TensorSpec((), tf.float64)
        drawn = Drawn(tf.TensorSpec((self.share, len(DRAWS)), tf.float32), *[tf.TensorSpec((), tf.float32)] * 2)
        inputs = [images, masks, drawn, step, control, rate, dropout]
        self._step, self._frozen_step = _graph(self._step_graph, inputs), _graph(self._frozen_step_graph, inputs)
        self._gradients = _graph(self._gradients_graph, [images, masks, drawn, step, dropout])
        self._evaluate = _graph(self._evaluate_graph, [images, masks])
        self._predict = _graph(self._predict_graph, [images])
        self._sum = _graph(self._sum_over_workers)

    def variables(self) -> dict[str, keras.Variable | tf.Variable]:
        """Everything that a step changes, by the names of `Recipe.variables`."""
        weights = {f"{WEIGHTS}{variable.path}": variable for variable in self.model.weights}
        slots = {f"optimizer/{name}": variable for name, variable in self.optimizer.variables().items()}
        averages = self.average.variables() if self.average else {}
        return weights | slots | averages | {"loss_scale": self.loss_scale, "good_steps": self.good_steps}

    def _check_variables(self) -> None:
        """Refuse to train what no checkpoint could hold.

        Raises:
            RunFailed: with a variable that the recipe describes otherwise.
        """
        own, described = {k: tuple(v.shape) for k, v in self.variables().items()}, self.recipe.variables
        for name in sorted(own.keys() | described.keys()):
            if own.get(name) != described.get(name):
                raise RunFailed(
                    f"The recipe describes {name} as {described.get(name, 'absent')}, but model or optimizer have it "
                    f"as {own.get(name, 'absent')}: correct unet/recipe/network.py, networks/ or optimizer.py."
                )

    def _places(self, weights: Mapping[str, np.ndarray]) -> Iterable[tuple[str, np.ndarray]]:
        """Weights by the names of `variables`, each in every place where a run begins with it."""
        for name, value in weights.items():
            yield f"{WEIGHTS}{name}", value
            if self.average:
                yield self.recipe.scored[name], value

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
        self,
        images: np.ndarray,
        masks: np.ndarray,
        step: int,
        control: int = 0,
        horizon: Horizon | None = None,
        draws: np.ndarray | None = None,
    ) -> StepResult:
        """Update the weights from this worker's share: images uint8 (share, S, S, 3), masks uint8 (share, S, S).

        `step` counts from 1 over the whole run, which is to be as long as `horizon`; it keys the dropout and gives the
        learning rate, which without a horizon is always the full one. `draws`, float32 (share, K) of
        `unet.recipe.augment.draw`, are what the samples are varied by: a recipe without augmentation needs none.
        """
        settings, dropout = self.recipe.optimizer, self.recipe.model.dropout
        rate = settings.learning_rate if horizon is None else learning_rate(settings, step, horizon)
        drawn = self._drawn(draws, step, horizon)
        take = self._frozen_step if horizon and settings.is_frozen(step, horizon) else self._step
        found = take(images, masks, drawn, step, float(control), rate, dropout).numpy().tolist()
        *sums, loss, norm, finite, control, scale = found
        overflowed = not finite and math.isfinite(loss) and scale > MIN_LOSS_SCALE
        return StepResult(sums, loss, norm, bool(finite), round(control), overflowed, rate)

    def augmented(self, images: np.ndarray, masks: np.ndarray, draws: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """What a step makes of any number of samples, for a person to see: uint8 (N, S, S, 3) and (N, S, S)."""
        inputs, labels = Augmentation(self.recipe.augment)(as_input(images), tf.constant(masks), self._drawn(draws))
        return tf.cast(tf.round(inputs * 255), tf.uint8).numpy(), labels.numpy()

    def _drawn(self, draws: np.ndarray | None, step: int = 1, horizon: Horizon | None = None) -> Drawn:
        augment = self.recipe.augment
        strength, mix = augment.at(step, horizon) if horizon else (augment.augment, augment.mix)
        if draws is None:
            if augment.is_on:
                raise ValueError("This recipe augments: a step needs the draws of its samples.")
            draws = np.full((self.share, len(DRAWS)), NEUTRAL, np.float32)
        return Drawn(tf.constant(draws), tf.constant(strength), tf.constant(mix))

    def gradients(
        self, images: np.ndarray, masks: np.ndarray, step: int, draws: np.ndarray | None = None
    ) -> list[np.ndarray]:
        """The gradient of the global batch's loss as a step would apply it, without clipping or update."""
        dropout = self.recipe.model.dropout
        return [g.numpy() for g in self._gradients(images, masks, self._drawn(draws), step, dropout)]

    def _gradients_graph(self, images, masks, drawn, step, dropout):
        found = self.batch.gradients(images, masks, drawn, step, tf.constant(0.0), dropout)
        return list(found.gradients.values())

    def _frozen_step_graph(self, images, masks, drawn, step, control, rate, dropout):
        return self._step_graph(images, masks, drawn, step, control, rate, dropout, trains_encoder=False)

    def _step_graph(self, images, masks, drawn, step, control, rate, dropout, trains_encoder=True):
        found = self.batch.gradients(images, masks, drawn, step, control, dropout, trains_encoder)
        gradients, sums = found.gradients, found.sums
        loss = self.loss.value(sums)
        scale = tf.identity(self.loss_scale)  # before the step changes it
        norm = tf.linalg.global_norm(list(gradients.values()))
        # Of a batch without a label the sums are finite, and the loss is not.
        finite = tf.math.is_finite(norm) & tf.reduce_all(tf.math.is_finite(sums))
        if clip := self.recipe.optimizer.clip_norm:
            gradients = {name: g * (clip / tf.maximum(norm, clip)) for name, g in gradients.items()}

        def update():
            self.optimizer.apply(gradients, rate)
            for average in found.averages:
                average.move()
            if self.average:
                self.average.follow(self.optimizer.updates)
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
        return tf.concat([sums, tf.stack([loss, norm, tf.cast(finite, tf.float32), found.control, scale])], 0)

    def refresh_float32(self) -> None:
        """Bring the weights of the evaluated float32 model up to date; call before evaluating."""
        if self.float32_model is not self.model:
            variables = self.variables()
            for weight in self.float32_model.weights:
                weight.assign(variables[self.recipe.scored[weight.path]])

    def trace_evaluation(self) -> None:
        """Make the graph of `evaluate`, if there is none yet."""
        self._evaluate.get_concrete_function()

    def evaluate(self, images: np.ndarray, masks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """int64 (C, C) confusion of this worker's share (row = truth), and float64 (`loss.size`,) sums of its loss."""
        confusion, sums = self._evaluate(images, masks)
        return confusion.numpy(), sums.numpy().astype(np.float64)

    def _evaluate_graph(self, images, masks):
        logits = self.float32_model(as_input(images), training=False)
        pixels = Pixels.of(logits, masks)
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
        return tf.cast(tf.argmax(self.float32_model(as_input(images), training=False), -1), tf.uint8)

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


def _compact(value: np.ndarray) -> np.ndarray:
    """The same, without memory for zeros: most of what a new optimizer holds."""
    return value if value.any() else np.broadcast_to(np.zeros((), value.dtype), value.shape)
