"""What a sweep is: a training's settings and the search over some of them."""

from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from unet.config.training import MAY_CHANGE, TrainSettings
from unet.recipe.recipe import PARTS
from unet.settings import SettingsGroup, absolute


class SweepSettings(SettingsGroup):
    """The search."""

    space: str = "default"
    """A space of tune_spaces/ by name, or a YAML file."""
    num_samples: Annotated[int | None, Field(ge=1)] = None
    """How many trials. Default: 10; with --minutes as many as fit; with --search grid all combinations."""
    minutes: Annotated[float | None, Field(gt=0)] = None
    """Stop so long after the first trial of this start began; trials under way keep their scores so far."""
    search: Literal["random", "grid", "tpe"] = "random"
    """Draw at random, try every combination, or learn from the scores so far (Optuna's TPE)."""
    scheduler: Literal["asha", "pbt", "none"] = "asha"
    """Stop bad trials early (asha), let bad ones take over the weights and nearby settings of good ones (pbt), or
    train each to its end."""
    grace_epochs: Annotated[int, Field(ge=1)] = 1
    """asha stops no trial before; pbt compares the trials every so many epochs."""
    reduction_factor: Annotated[float, Field(gt=1)] = 3
    """asha lets the best 1/F go on at the epochs GRACE, GRACE*F, GRACE*F*F, …"""
    extend: Annotated[int | None, Field(ge=1)] = None
    """Add so many trials to a sweep that is finished."""

    @field_validator("space")
    @classmethod
    def _found_from_anywhere(cls, value):
        return str(absolute(value)) if value.endswith((".yaml", ".yml")) else value


class TuneSettings(TrainSettings):
    """A training's settings and the search over some of them."""

    sweep: SweepSettings = SweepSettings()

    @model_validator(mode="after")
    def _search_fits(self):
        sweep = self.sweep
        if self.run.sync:
            raise ValueError("--sync is for `jobs/train.py`; --resume sends what MLflow lacks of a sweep")
        if sweep.search == "grid" and (sweep.num_samples or sweep.extend):
            raise ValueError("--search grid tries every combination: leave out --num-samples and --extend")
        if self.compute.is_elastic:
            raise ValueError(f"--num-workers {self.compute.num_workers}: the trials of a sweep need one number")
        if sweep.scheduler == "pbt" and self.compute.most_workers > 1:
            raise ValueError(
                "--scheduler pbt hands weights from trial to trial, which works for trials of one worker only: give "
                "--num-workers 1, or --scheduler asha"
            )
        if sweep.scheduler == "pbt" and sweep.search != "random":
            raise ValueError(
                f"--scheduler pbt changes settings in flight, so --search {sweep.search} could not learn from or "
                "cover them: leave out --search"
            )
        return self


SWEEP_MAY_CHANGE = MAY_CHANGE - {"epochs", "patience", "num_workers", "on_nan", "precision"} | {"minutes", "extend"}
"""The same of a sweep, whose trials must stay comparable."""

SEARCHABLE = frozenset(name for part in PARTS.values() for name in part.model_fields) - {
    *("epochs", "patience", "on_nan"),
}
"""Settings that a space may draw: what changes the model or how it learns, not how long or on what."""
