"""How weights follow their gradient: the optimizer, what it remembers, and the rate of each step."""

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field, field_validator, model_validator

from unet.recipe import muon
from unet.recipe.network import Shapes
from unet.recipe.schedule import Horizon, Schedule, share_of_rate, warmup_steps
from unet.settings import SettingsGroup

if TYPE_CHECKING:
    import keras
    import tensorflow as tf

ADAM = ("momentum", "velocity")
"""What Adam remembers of each weight, by Keras' names."""
MOMENTUM = ("momentum",)
USUAL_MOMENTUM = {"sgd": 0.9, "muon": 0.95}


class OptimizerSettings(SettingsGroup):
    """How the weights follow the gradient."""

    optimizer: Literal["adam", "adamw", "sgd", "muon"] = "adam"
    """adam; adamw: Adam with --weight-decay; sgd: with Nesterov momentum; muon: orthogonal momentum for the kernels
    inside the network, AdamW for all else, at the same rate."""
    learning_rate: Annotated[float, Field(gt=0)] = 1e-3
    """Learning rate of the optimizer; with a schedule, the highest."""
    schedule: Schedule = "constant"
    """How the rate goes over the run: constant; cosine or linear: down to almost 0 at the end; one_cycle: up for 30 %
    of the steps, then down."""
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

    @field_validator("warmup")
    @classmethod
    def _is_length(cls, value: str) -> str:
        warmup_steps(value, Horizon(1, 1))
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
        if self.schedule == "one_cycle" and warmup_steps(self.warmup, Horizon(1, 1)):
            raise ValueError(f"--warmup {self.warmup}: --schedule one_cycle has a rise of its own: give --warmup 0")
        return self

    @property
    def warmup_epochs(self) -> float:
        """What a warm-up in epochs means; 0 for one of steps, or of a part of the run."""
        return warmup_steps(self.warmup, Horizon(0, 1)) if self.warmup.strip().endswith("e") else 0.0

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
    """What the optimizer remembers of such weights: its count of steps, and `<weight>/<slot>`."""
    kept: dict[str, tuple[str, ...]] = dict.fromkeys(trainable, ADAM)
    if settings.optimizer == "sgd":
        kept = dict.fromkeys(trainable, MOMENTUM if settings.used_momentum else ())
    elif settings.optimizer == "muon":
        kept |= dict.fromkeys(muon.kernels(trainable), MOMENTUM)
    slots = {f"{name}/{slot}": shape for name, shape in trainable.items() for slot in kept[name]}
    return {"iteration": ()} | slots


class Optimizer:
    """The optimizer of a model's weights, which `trainable` names in the order of the network.

    Its rate is no part of what it remembers: it comes with every step.
    """

    def __init__(self, settings: OptimizerSettings, trainable: Shapes, weights: "list[keras.Variable]"):
        import keras

        self._weights, self._names = weights, variable_shapes(settings, trainable)
        inside = set(muon.kernels(trainable)) if settings.optimizer == "muon" else set[str]()
        self._others = [weight for weight in weights if weight.path not in inside]
        kernels = [weight for weight in weights if weight.path in inside]
        self._muon = muon.Muon(kernels, settings.used_momentum, settings.weight_decay) if kernels else None
        decay = settings.weight_decay or None
        if settings.optimizer == "sgd":
            momentum = settings.used_momentum
            self._keras = keras.optimizers.SGD(momentum=momentum, nesterov=momentum > 0, weight_decay=decay)
        else:
            self._keras = keras.optimizers.Adam(weight_decay=decay)
        if decay:
            self._keras.exclude_from_weight_decay([weight for weight in weights if len(weight.shape) < 2])
        self._keras.build(self._others)

    @property
    def updates(self) -> "keras.Variable":
        """How many there were."""
        return self._keras.iterations

    def apply(self, gradients: "list[tf.Tensor]", rate: "tf.Tensor") -> None:
        """Update the weights, in their order."""
        by_name = {weight.path: gradient for weight, gradient in zip(self._weights, gradients, strict=True)}
        self._keras.learning_rate.assign(rate)
        self._keras.apply([by_name[weight.path] for weight in self._others], self._others)
        if self._muon:
            self._muon.apply(by_name, rate)

    def variables(self) -> "dict[str, keras.Variable | tf.Variable]":
        """What it remembers, by the names of `variable_shapes`."""
        own = self._keras.name
        by_path = {variable.path: variable for variable in self._keras.variables}
        found = {f"{name}/momentum": variable for name, variable in self._muon.momenta.items()} if self._muon else {}
        paths = {name: f"{own}/{name.replace('/', '_')}" for name in self._names if name not in found}
        return found | {name: by_path[path] for name, path in paths.items() if path in by_path}
