"""The settings of a sweep: those of a training, and the search over some of them."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from unet.config.fields import SearchSpace
from unet.config.training import DEFAULT_EPOCHS, MAY_CHANGE, LengthSettings, TrainSettings
from unet.recipe.recipe import PARTS
from unet.recipe.start import StartSettings
from unet.settings import SettingsGroup


class SweepSettings(SettingsGroup):
    """The search."""

    space: SearchSpace = "default"
    """Name of a search space in tune_spaces/, or a YAML file."""
    num_samples: Annotated[int | None, Field(ge=1)] = None
    """Number of trials. None: 10; with --minutes, as many as fit; with --search grid, every combination."""
    search: Literal["random", "grid", "tpe"] = "random"
    """random draws settings at random; grid tries every combination; tpe learns from the scores so far (Optuna)."""
    scheduler: Literal["asha", "pbt", "none"] = "asha"
    """asha stops weak trials early; pbt lets weak trials take over the weights of strong ones, with nearby settings;
    none trains every trial to its end."""
    grace_epochs: Annotated[int, Field(ge=1)] = 1
    """Epochs before asha may stop a trial; with pbt, epochs between two comparisons of the trials."""
    reduction_factor: Annotated[float, Field(gt=1)] = 3
    """asha lets the best 1/F of the trials go on at epochs GRACE, GRACE*F, GRACE*F*F, …"""
    extend: Annotated[int | None, Field(ge=1)] = None
    """Add this many trials to a finished sweep."""


class SweepLengthSettings(LengthSettings):
    """How long it takes."""

    minutes: Annotated[float | None, Field(gt=0, allow_inf_nan=False)] = None
    """Stop this many minutes after the first trial of this start began; running trials keep their scores so far."""


class TuneSettings(TrainSettings):
    """A training's settings and the search over some of them."""

    length: SweepLengthSettings = SweepLengthSettings()
    sweep: SweepSettings = SweepSettings()

    @property
    def epochs(self) -> int:
        """Of a trial; the minutes are the sweep's."""
        return self.training.epochs or DEFAULT_EPOCHS

    @model_validator(mode="after")
    def _search_fits(self):
        sweep = self.sweep
        if self.run.reproduce:
            raise ValueError("--reproduce is for `jobs/train.py`")
        if self.run.sync:
            raise ValueError("--sync is for `jobs/train.py`: of a sweep, --resume sends what MLflow lacks")
        if self.run.tensorboard:
            raise ValueError("--tensorboard is for `jobs/train.py`: the trials of a sweep are compared in MLflow")
        if self.run.report or self.run.export:
            raise ValueError(
                "--report and --export are for `jobs/train.py`: of the best trial, jobs/evaluate.py and jobs/export.py "
                "make them with --model SWEEP/TRIAL"
            )
        if sweep.search == "grid" and (sweep.num_samples or sweep.extend):
            raise ValueError("--search grid tries every combination: leave out --num-samples and --extend")
        if self.compute.is_elastic:
            raise ValueError(f"--num-workers {self.compute.num_workers}: the trials of a sweep need a fixed number")
        if sweep.scheduler == "pbt" and self.compute.most_workers > 1:
            raise ValueError(
                "--scheduler pbt hands weights from trial to trial, which works only if each has one worker: give "
                "--num-workers 1, or --scheduler asha"
            )
        if sweep.scheduler == "pbt" and sweep.search != "random":
            raise ValueError(
                f"--scheduler pbt changes settings during a trial, so --search {sweep.search} could neither learn from "
                "them nor cover them: leave out --search"
            )
        return self


SWEEP_MAY_CHANGE = MAY_CHANGE - {"epochs", "patience", "num_workers", "on_nan", "precision"} | {"minutes", "extend"}
"""Settings that may change when a sweep continues, whose trials must stay comparable."""

SEARCHABLE = frozenset(name for part in PARTS.values() for name in part.model_fields) - {
    *("epochs", "patience", "on_nan", "encoder", *StartSettings.model_fields),
}
"""Settings that a space may draw: what changes the model or how it learns, not how long or on what."""
