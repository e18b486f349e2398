"""Runs compared in pairs, on the same images: by the evaluations that they have, and by those that are made for it."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import pyarrow as pa

from unet.cluster.session import ray_session
from unet.comparison.runs import ComparedRun
from unet.config import EvaluateSettings
from unet.config.compare import CompareSettings
from unet.config.use import EvaluatePart
from unet.errors import InputError
from unet.evaluation import outcome
from unet.evaluation.output import FOLDER
from unet.evaluation.run import evaluate
from unet.evaluation.summary import compare
from unet.terminal import Display
from unet.tracking.send import open_data


@dataclass(frozen=True)
class Pairs:
    """What the runs score on the same images.

    Attributes:
        scores: the content of `metrics.json` of the evaluation, by the name of the run.
        pairs: each two of these runs, as `unet.evaluation.summary.compare` gives them.
        left_out: why other runs are not among them, in sentences.
    """

    scores: dict[str, dict] = field(default_factory=dict)
    pairs: list[dict] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)

    @property
    def best(self) -> str | None:
        """The run that scores highest; None where nothing was scored."""
        scored = {name: found["mean_iou"] for name, found in self.scores.items() if found["mean_iou"] is not None}
        return max(scored, key=scored.__getitem__, default=None)

    def of(self, run: str | None) -> list[dict]:
        """The pairs that a run is one of."""
        return [pair for pair in self.pairs if run in (pair["a"], pair["b"])]

    @property
    def images(self) -> int:
        """How many they were scored on."""
        return max((found["images"] for found in self.scores.values()), default=0)


def data_of(runs: Sequence[ComparedRun]) -> str:
    """The digest of the data that all of the runs have.

    Raises:
        InputError: they have different data.
    """
    digests = {run.summary.get("data_digest"): run for run in runs}
    if len(digests) > 1:
        first, other = list(digests.values())[:2]
        raise InputError(
            f"{first.name} and {other.name} were trained on different data (or at different sizes), so their scores "
            "cannot be compared: score both on the same data with python jobs/evaluate.py --model "
            f"{first.model},{other.model} --data DATA."
        )
    return str(next(iter(digests)))


def paired(runs: Sequence[ComparedRun], digest: str, settings: CompareSettings, display: Display) -> Pairs:
    """Compare runs of data with this digest in pairs; those that have not been evaluated yet are now, if their data
    are there.

    Raises:
        RunFailed: scoring failed.
    """
    split = settings.compare.split
    found = {run.name: known for run in runs if (known := _stored(run, split, digest))}
    left_out = [f"Without a checkpoint, not compared in pairs: {run.name}." for run in runs if not run.checkpoint]
    missing = [run for run in runs if run.checkpoint and run.name not in found]
    if missing and (refusal := _evaluate(missing, runs, digest, settings, display)):
        left_out.append(refusal)
    found |= {run.name: known for run in missing if (known := _stored(run, split, digest))}
    ordered = [run.name for run in runs if run.name in found]
    if len(ordered) < 2:
        return Pairs({name: found[name][0] for name in ordered}, [], left_out)
    names = list(found[ordered[0]][0]["iou"])
    differences = compare(ordered, [found[name][1] for name in ordered], names, EvaluateSettings().evaluate.bootstrap)
    return Pairs({name: found[name][0] for name in ordered}, differences["pairs"], left_out)


def _stored(run: ComparedRun, split: str, digest: str) -> tuple[dict, pa.Table] | None:
    """The evaluation of the run's checkpoint that its folder holds."""
    return outcome.read(run.folder / FOLDER / split, run.checkpoint, digest) if run.checkpoint else None


def _evaluate(
    missing: Sequence[ComparedRun],
    runs: Sequence[ComparedRun],
    digest: str,
    settings: CompareSettings,
    display: Display,
) -> str | None:
    """Evaluate as `jobs/evaluate.py` does; a sentence if that cannot be done."""
    models, split = ",".join(run.model for run in missing), settings.compare.split
    left_out = f"Without scores on {split}, not compared in pairs: {', '.join(run.name for run in missing)}."
    data = next(filter(None, (open_data(run.folder, digest) for run in runs)), None)
    if data is None:
        again = f"python jobs/evaluate.py --model {models} --split {split} --data DATA"
        return f"{left_out} The data are not where they were: {again}, then compare again."
    part = EvaluatePart(model=models, split=split, data=data.folder.uri, track=settings.compare.track)
    asked = EvaluateSettings(evaluate=part, store=settings.store, command=settings.command)
    try:
        with ray_session(settings.command.debug):
            evaluations = evaluate(asked, display)
    except InputError as error:
        return f"{left_out} {error}"
    for done in evaluations:
        outcome.write(done, display)
        if asked.evaluate.track:
            outcome.track(done, asked, display)
    return None


def best_of(pairs: Pairs, split: str) -> str | None:
    """Which run scores highest, and whether by more than chance, in a sentence; None where nothing was scored."""
    best = pairs.best
    if not pairs.pairs or best is None:
        return None
    clear, unclear, unknown = "is more than chance", "may be chance", "cannot be told from chance"
    others: dict[str, list[str]] = {clear: [], unclear: [], unknown: []}
    for pair in pairs.of(best):
        span = pair["network_size"]["mean_iou"]["interval"]
        told = unknown if span is None else clear if excludes_zero(span) else unclear
        others[told].append(pair["a"] if pair["b"] == best else pair["b"])
    parts = [f"{best} scores highest on {split}: mean IoU {pairs.scores[best]['mean_iou']:.4f}."]
    for told, names in others.items():
        if names:
            all_of_many = 2 < len(names) == len(pairs.scores) - 1
            which = "any other" if all_of_many else " and ".join(filter(None, (", ".join(names[:-1]), names[-1])))
            parts.append(f"Its difference to {which} {told}.")
    return " ".join(parts)


def excludes_zero(span: list | None) -> bool:
    """Whether the interval of a difference tells it from chance."""
    return span is not None and not span[0] <= 0 <= span[1]
