"""Which settings of a sweep mattered, and how far its trials can tell.

Why: docs/decisions.md#importance-over-resamples-of-the-trials
"""

from collections.abc import Callable, Sequence

import numpy as np

from unet.metric_names import BEST
from unet.tuning.space import Space

LEAST_TRIALS = 8
"""With fewer trials an importance would be noise."""
RESAMPLES, LEVEL = 50, 0.9


def parameter_importance(rows: Sequence[dict], space: Space, seed: int) -> dict[str, float]:
    """The share of the scores' variance that each setting explains (fANOVA, by Optuna); empty for too few trials.

    Pruned trials count with the score they had, so what matters early weighs more.
    """
    import optuna
    from ray.tune.search.optuna import OptunaSearch

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    scored = [r for r in rows if r[BEST] is not None]
    if len(scored) < LEAST_TRIALS or len({r[BEST] for r in scored}) < 2:
        return {}
    study = optuna.create_study(direction="maximize")
    distributions = OptunaSearch.convert_search_space(space.draws)
    for row in scored:
        study.add_trial(optuna.trial.create_trial(params=row["settings"], distributions=distributions, value=row[BEST]))
    evaluator = optuna.importance.FanovaImportanceEvaluator(seed=seed)
    return optuna.importance.get_param_importances(study, evaluator=evaluator)


def importance_spans(
    rows: Sequence[dict], space: Space, seed: int, told: Callable[[int, int], None]
) -> dict[str, tuple[float, float]]:
    """The interval in which the importance of each setting lies in `LEVEL` of the resamples of the trials, each judged
    by a forest of its own. The trials have an importance (`parameter_importance`); `told` hears how many resamples are
    done.
    """
    rng = np.random.default_rng(seed)
    scored = [r for r in rows if r[BEST] is not None]
    found: list[dict[str, float]] = []
    for index in range(RESAMPLES):
        told(index, RESAMPLES)
        drawn = [scored[i] for i in rng.integers(0, len(scored), len(scored))]
        found.append(parameter_importance(drawn, space, seed + 1 + index))
    found = [shares for shares in found if shares]  # none of trials that all scored the same
    tails = (1 - LEVEL) / 2, (1 + LEVEL) / 2
    spans = {name: np.quantile([shares[name] for shares in found], tails) for name in (found[0] if found else ())}
    return {name: (float(low), float(high)) for name, (low, high) in spans.items()}
