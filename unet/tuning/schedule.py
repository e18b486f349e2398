"""What happens to a trial after an epoch: ASHA stops the bad ones, PBT has them copy good ones."""

import random
from types import SimpleNamespace
from typing import Any

import numpy as np
from ray.tune.schedulers import ASHAScheduler, PopulationBasedTraining, TrialScheduler

from unet.config import TuneSettings
from unet.errors import InputError
from unet.metric_names import SCORE
from unet.recipe.recipe import GIVEN_TO_EACH_STEP
from unet.tuning.ledger import Ledger
from unet.tuning.space import Space, choices, limits

IN_FLIGHT = tuple(name for names in GIVEN_TO_EACH_STEP.values() for name in sorted(names))
"""Settings that can change during a training."""


class Asha(ASHAScheduler):
    """Asynchronous successive halving (Li et al., 2020) that can learn of the trials of an earlier start."""

    def know(self, trial_id: str, history: list[dict]) -> None:
        """Take in the epochs of a trial, as if it had run under this scheduler."""
        trial: Any = SimpleNamespace(trial_id=trial_id)  # ASHA reads no more of it, and nothing of the controller
        controller: Any = None
        self.on_trial_add(controller, trial)
        for record in history:
            self.on_trial_result(controller, trial, record)


def check_schedule(settings: TuneSettings, space: Space) -> None:
    """Refuse a space whose settings PBT cannot change during a training.

    Raises:
        InputError: with what to do.
    """
    fixed = [name for name in space.draws if name not in IN_FLIGHT]
    if settings.sweep.scheduler == "pbt" and fixed:
        raise InputError(
            f"--scheduler pbt changes settings during a training, which works for {' and '.join(IN_FLIGHT)} only, but "
            f"the space also draws {', '.join(fixed)}: give --space pbt, or --scheduler asha."
        )


def make_scheduler(settings: TuneSettings, space: Space, ledger: Ledger) -> TrialScheduler | None:
    """Tune's scheduler, which has learned of the ledger's ended trials; None to train every trial to the end."""
    sweep = settings.sweep
    common: dict[str, Any] = {"time_attr": "epoch", "metric": SCORE, "mode": "max"}
    if sweep.scheduler == "asha":
        asha = Asha(
            **common,
            grace_period=min(sweep.grace_epochs, settings.epochs),
            max_t=settings.epochs,
            reduction_factor=sweep.reduction_factor,
        )
        for row in ledger.rows:
            if row["end"] in ("finished", "pruned"):
                asha.know(row["trial"], ledger.history(row["trial"]))
        return asha
    if sweep.scheduler == "none":
        return None
    random.seed(settings.training.seed)  # which trial another copies, and where its settings move
    np.random.seed(settings.training.seed)

    def within(config: dict) -> dict:
        """Keep what a perturbation made inside the space."""
        for name, domain in space.draws.items():
            if choices(domain) is None:
                low, high = limits(domain)
                config["draw"][name] = min(max(config["draw"][name], low), high)
        return config

    mutations = {name: choices(domain) or domain for name, domain in space.draws.items()}
    return PopulationBasedTraining(
        **common,
        perturbation_interval=sweep.grace_epochs,
        hyperparam_mutations={"draw": mutations},
        custom_explore_fn=within,
        log_config=False,
    )
