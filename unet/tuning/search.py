"""Which settings the next trial gets: unfinished trials first, then new draws, up to a number."""

import itertools
from collections.abc import Iterator

import numpy as np
from ray import tune
from ray.tune.search import Searcher
from ray.tune.search.variant_generator import generate_variants

from unet.metric_names import BEST
from unet.tuning.ledger import Ledger
from unet.tuning.schedule import Asha
from unet.tuning.space import Space


class Search(Searcher):
    """Suggests `{"trial": name, "draw": settings}` and enters new trials into the ledger.

    `planned` trials in all, None for no limit. `asha`, if given, learns the past epochs of trials that continue.
    """

    def __init__(self, space: Space, kind: str, seed: int, ledger: Ledger, planned: int | None, asha: Asha | None):
        super().__init__(metric=BEST, mode="max")
        self._ledger, self._planned, self._asha = ledger, planned, asha
        self._waiting, self._closed = ledger.unfinished(), False
        self._source: Tpe | Variants
        if kind == "tpe":
            self._source = Tpe(space, seed, ledger, planned)
        else:
            self._source = Variants(space, kind, seed, len(ledger))

    def close(self) -> None:
        """Suggest nothing any more: the sweep is stopping."""
        self._closed = True

    def __getstate__(self):
        return {}  # Tune pickles it for a restore; the ledger is what a sweep continues from

    def set_search_properties(self, metric, mode, config, **spec) -> bool:
        return True

    def suggest(self, trial_id: str):
        if self._closed:
            return Searcher.FINISHED
        if self._waiting:
            row = self._waiting.pop(0)
            if self._asha:
                self._asha.know(trial_id, self._ledger.continued(row["trial"]))
            self._source.adopt(trial_id, row["settings"])
            return {"trial": row["trial"], "draw": row["settings"]}
        draw = None
        if self._planned is None or len(self._ledger) < self._planned:
            draw = self._source.draw(trial_id)
        if draw is None:
            return Searcher.FINISHED
        return {"trial": self._ledger.begin(draw)["trial"], "draw": draw}

    def on_trial_result(self, trial_id: str, result: dict) -> None:
        pass  # only final scores count: a restart would forget any other

    def on_trial_complete(self, trial_id: str, result: dict | None = None, error: bool = False) -> None:
        self._source.learn(trial_id, (result or {}).get(BEST))

    def save(self, checkpoint_path: str) -> None:
        open(checkpoint_path, "w").close()

    def restore(self, checkpoint_path: str) -> None:
        raise NotImplementedError("A sweep continues from its ledger, not from Tune's state.")


def population(space: Space, seed: int, ledger: Ledger, planned: int) -> dict:
    """Tune's parameter space of all trials at once, for PBT, which refuses a search algorithm."""
    rows = ledger.unfinished()
    for draw in itertools.islice(variants(space, "random", seed), len(ledger), planned):
        rows.append(ledger.begin(draw))
    draws = {row["trial"]: row["settings"] for row in rows}
    return {"trial": tune.grid_search(list(draws)), "draw": tune.sample_from(lambda config: draws[config["trial"]])}


class Variants:
    """Draws at random or over the grid, as Tune makes them; the first `past` were used before."""

    def __init__(self, space: Space, kind: str, seed: int, past: int):
        self._draws = itertools.islice(variants(space, kind, seed), past, None)

    def draw(self, trial_id: str) -> dict | None:
        return next(self._draws, None)

    def adopt(self, trial_id: str, settings: dict) -> None:
        pass

    def learn(self, trial_id: str, value: float | None) -> None:
        pass


def variants(space: Space, kind: str, seed: int) -> Iterator[dict]:
    """Endless random draws, the same for the same seed; or every combination of the grid once."""
    random_state = np.random.RandomState(seed)
    if kind == "grid":
        for _, draw in generate_variants(space.grid()):
            yield _plain(draw)
        return
    while True:
        for _, draw in generate_variants(dict(space.draws), random_state=random_state):
            yield _plain(draw)


class Tpe:
    """Optuna's tree-structured Parzen estimator, as Tune integrates it, given the sweep's past."""

    RANDOM = 10
    """Trials drawn at random before it models, Optuna's own number; a short sweep has fewer."""

    def __init__(self, space: Space, seed: int, ledger: Ledger, planned: int | None):
        import optuna
        from ray.tune.search.optuna import OptunaSearch

        optuna.logging.set_verbosity(optuna.logging.ERROR)
        # A continued search must not repeat the random draws it began with: the seed moves on with the ledger.
        distributions = OptunaSearch.convert_search_space(space.draws)
        at_random = min(self.RANDOM, max(3, planned // 4)) if planned else self.RANDOM
        sampler = optuna.samplers.TPESampler(seed=(seed + len(ledger)) % 2**32, n_startup_trials=at_random)
        self._optuna = OptunaSearch(space=distributions, metric=BEST, mode="max", sampler=sampler)
        self._adopted: dict[str, dict] = {}
        for row in ledger.rows:
            value = 0.0 if row.get("diverged") else row[BEST]
            if row["end"] in ("finished", "pruned", "failed") and value is not None:
                self._optuna.add_evaluated_point(row["settings"], value)

    def draw(self, trial_id: str) -> dict | None:
        suggested = self._optuna.suggest(trial_id)
        return suggested and _plain(suggested)

    def adopt(self, trial_id: str, settings: dict) -> None:
        self._adopted[trial_id] = settings

    def learn(self, trial_id: str, value: float | None) -> None:
        if trial_id not in self._adopted:
            self._optuna.on_trial_complete(trial_id, {BEST: value} if value is not None else None, value is None)
        elif value is not None:
            self._optuna.add_evaluated_point(self._adopted.pop(trial_id), value)


def _plain(draw: dict) -> dict:
    """NumPy's numbers as Python's, which YAML and JSON know."""
    return {name: value.item() if isinstance(value, np.generic) else value for name, value in draw.items()}
