"""How weights follow their gradient: the optimizer, what it remembers, and the rate of each step."""

import math
import re
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field, field_validator, model_validator

from unet.recipe import muon
from unet.recipe.network import Shapes, is_of_encoder
from unet.recipe.schedule import Horizon, Schedule, part_of_run, share_of_rate
from unet.settings import SettingsGroup

if TYPE_CHECKING:
    import keras
    import tensorflow as tf

ADAM = ("momentum", "velocity")
"""What Adam remembers of each weight, by Keras' names."""
MOMENTUM = ("momentum",)
COUNTS = ("iteration", "encoder_iteration")
"""Of the updates of all weights, and of an encoder that is set apart."""
USUAL_MOMENTUM = {"sgd": 0.9, "muon": 0.95}


class OptimizerSettings(SettingsGroup):
    """How the weights follow the gradient."""

    optimizer: Literal["adam", "adamw", "sgd", "muon"] = "adam"
    """adam; adamw: Adam with --weight-decay; sgd: with Nesterov momentum; muon: orthogonal momentum for the kernels
    inside the network, AdamW for all else, at the same rate."""
    learning_rate: Annotated[float, Field(gt=0)] = 1e-3
    """Learning rate of the optimizer; with a schedule, the highest."""
    schedule: Schedule = "constant"
    """How the rate goes over the run: constant; cosine or linear: down to almost 0 at the end; trapezoid: in the last
    fifth only; one_cycle: up for 30 % of the steps, then down."""
    warmup: str = "0"
    """Let the rate rise from 0 at the start: 200 for steps, 2e for epochs, 5% of the run. 0: no warm-up."""
    weight_decay: Annotated[float, Field(ge=0)] = 0
    """Shrink kernels by this share, times the rate, in every step (not biases and norms). 0: no decay."""
    momentum: Annotated[float | None, Field(ge=0, lt=1)] = None
    """Momentum of sgd and muon. None: 0.9 for sgd, 0.95 for muon."""
    clip_norm: Annotated[float | None, Field(gt=0)] = None
    """Clip the gradient of the global batch to this norm. None: no clipping."""
    ema_decay: Annotated[float, Field(ge=0, lt=1)] = 0
    """Score and package a moving average of the weights, which keeps this share of itself in a step, such as 0.999, and
    less in the first steps. 0: no average."""
    encoder_rate: Annotated[float, Field(gt=0, le=1)] = 1
    """Share of the learning rate that the layers before the decoder take, which may know something already. With less
    than 1 they have an Adam of their own (with sgd: an SGD)."""
    freeze: str | None = None
    """encoder:2 leaves the layers before the decoder as they are for the first two epochs; encoder for the whole run.
    Their batch norms go by what they have seen before. None: all layers learn."""

    @field_validator("warmup")
    @classmethod
    def _is_length(cls, value: str) -> str:
        part_of_run("--warmup", value, Horizon(1, 1))
        return value

    @field_validator("freeze")
    @classmethod
    def _is_of_encoder(cls, value: str | None) -> str | None:
        if value is not None and not re.fullmatch(r"encoder(:\d+)?", value):
            raise ValueError(
                f"--freeze {value}: write encoder:2 for the first two epochs, or encoder for the whole run"
            )
        return value

    @model_validator(mode="after")
    def _fits_together(self):
        if self.weight_decay and self.optimizer == "adam":
            raise ValueError(
                f"--weight-decay {self.weight_decay:g} is not for adam: give --optimizer adamw, which is adam with it, "
                "or --weight-decay 0"
            )
        if self.momentum is not None and self.optimizer not in USUAL_MOMENTUM:
            raise ValueError(
                f"--momentum {self.momentum:g} is for sgd and muon: give --momentum None with {self.optimizer}"
            )
        if self.schedule == "one_cycle" and part_of_run("--warmup", self.warmup, Horizon(1, 1)):
            raise ValueError(f"--warmup {self.warmup}: --schedule one_cycle has a rise of its own: give --warmup 0")
        return self

    @property
    def warmup_epochs(self) -> float:
        """What a warm-up in epochs means; 0 for one of steps, or of a part of the run."""
        return part_of_run("--warmup", self.warmup, Horizon(0, 1)) if self.warmup.strip().endswith("e") else 0.0

    @property
    def sets_encoder_apart(self) -> bool:
        """Whether the layers before the decoder learn otherwise than the rest."""
        return self.encoder_rate < 1 or self.freeze is not None

    @property
    def frozen_epochs(self) -> float:
        """For how many epochs the layers before the decoder stay as they are."""
        if self.freeze is None:
            return 0
        _, _, epochs = self.freeze.partition(":")
        return int(epochs) if epochs else math.inf

    def is_frozen(self, step: int, horizon: Horizon) -> bool:
        """Whether a step, counted from 1, leaves the layers before the decoder as they are."""
        return step <= self.frozen_epochs * horizon.epoch_steps

    @property
    def used_momentum(self) -> float:
        """Of sgd and muon."""
        return USUAL_MOMENTUM[self.optimizer] if self.momentum is None else self.momentum


def in_few_words(settings: OptimizerSettings) -> str:
    """The optimizer, its rate, and what differs from a constant one."""
    names = {"adam": "Adam", "adamw": "AdamW", "sgd": "SGD", "muon": "Muon"}
    words = f"{names[settings.optimizer]} {settings.learning_rate:g}"
    words += f" {settings.schedule.replace('_', '-')}" if settings.schedule != "constant" else ""
    words += f", weight decay {settings.weight_decay:g}" if settings.weight_decay else ""
    return words + (f", average {settings.ema_decay:g}" if settings.ema_decay else "")


def learning_rate(settings: OptimizerSettings, step: int, horizon: Horizon) -> float:
    """The rate of a step, counted from 1 over the whole run, of a run that is to be so long."""
    return settings.learning_rate * share_of_rate(settings.schedule, settings.warmup, step, horizon)


def variable_shapes(settings: OptimizerSettings, trainable: Shapes) -> Shapes:
    """What the optimizer remembers of such weights: its counts of steps, and `<weight>/<slot>`."""
    kept: dict[str, tuple[str, ...]] = dict.fromkeys(trainable, ADAM)
    if settings.optimizer == "sgd":
        kept = dict.fromkeys(trainable, MOMENTUM if settings.used_momentum else ())
    elif settings.optimizer == "muon":
        kept |= dict.fromkeys(_muon_kernels(settings, trainable), MOMENTUM)
    slots = {f"{name}/{slot}": shape for name, shape in trainable.items() for slot in kept[name]}
    counts = COUNTS if settings.sets_encoder_apart else COUNTS[:1]
    return {name: () for name in counts} | slots


def _muon_kernels(settings: OptimizerSettings, trainable: Shapes) -> list[str]:
    """The weights that Muon takes: none of an encoder that knows something already."""
    found = muon.kernels(trainable)
    return [name for name in found if not (settings.sets_encoder_apart and is_of_encoder(name))]


class Optimizer:
    """The optimizer of a model's weights, which `trainable` names in the order of the network.

    Its rate is no part of what it remembers: it comes with every step. An encoder that is set apart has a count of its
    own, since Adam's first steps are not its own without.
    """

    def __init__(self, settings: OptimizerSettings, trainable: Shapes, weights: "list[keras.Variable]"):
        self._settings, self._names = settings, variable_shapes(settings, trainable)
        inside = set(_muon_kernels(settings, trainable)) if settings.optimizer == "muon" else set[str]()
        kernels = [weight for weight in weights if weight.path in inside]
        self._muon = muon.Muon(kernels, settings.used_momentum, settings.weight_decay) if kernels else None
        others = [weight for weight in weights if weight.path not in inside]
        apart = [weight for weight in others if settings.sets_encoder_apart and is_of_encoder(weight.path)]
        names = {weight.path for weight in apart}
        self._main = _Part(settings, "main", [weight for weight in others if weight.path not in names])
        self._encoder = _Part(settings, "encoder", apart) if settings.sets_encoder_apart else None

    @property
    def updates(self) -> "keras.Variable":
        """How many there were."""
        return self._main.keras.iterations

    def apply(self, gradients: "dict[str, tf.Tensor]", rate: "tf.Tensor") -> None:
        """Update the weights by their gradients, by name; an encoder without gradients stays."""
        self._main.apply(gradients, rate)
        if self._muon:
            self._muon.apply(gradients, rate)
        if self._encoder and self._encoder.weights[0].path in gradients:
            self._encoder.apply(gradients, rate * self._settings.encoder_rate)

    def variables(self) -> "dict[str, keras.Variable | tf.Variable]":
        """What it remembers, by the names of `variable_shapes`."""
        found = {f"{name}/momentum": variable for name, variable in self._muon.momenta.items()} if self._muon else {}
        found |= self._main.variables(self._names, COUNTS[0])
        return found | (self._encoder.variables(self._names, COUNTS[1]) if self._encoder else {})


class _Part:
    """Some weights, and Keras' optimizer of them."""

    def __init__(self, settings: OptimizerSettings, name: str, weights: "list[keras.Variable]"):
        import keras

        self.weights, decay = weights, settings.weight_decay or None
        self.keras: keras.optimizers.Optimizer
        if settings.optimizer == "sgd":
            momentum = settings.used_momentum
            self.keras = keras.optimizers.SGD(name=name, momentum=momentum, nesterov=momentum > 0, weight_decay=decay)
        else:
            self.keras = keras.optimizers.Adam(name=name, weight_decay=decay)
        if decay:
            self.keras.exclude_from_weight_decay([weight for weight in weights if len(weight.shape) < 2])
        self.keras.build(weights)

    def apply(self, gradients: "dict[str, tf.Tensor]", rate: "tf.Tensor") -> None:
        self.keras.learning_rate.assign(rate)
        self.keras.apply([gradients[weight.path] for weight in self.weights], self.weights)

    def variables(self, names: Shapes, count: str) -> "dict[str, keras.Variable | tf.Variable]":
        """Those of `names` that are its own; `count` is the name of its count of steps."""
        own = {variable.path: variable for variable in self.keras.variables}
        paths = {name: f"{self.keras.name}/{name.replace('/', '_')}" for name in names if name not in COUNTS}
        found = {name: own[path] for name, path in paths.items() if path in own}
        return found | {count: self.keras.iterations}
