"""A sweep from its opened folder to its end: everything that can be refused, then its trials."""

from unet.cluster import planner, precision
from unet.cluster.nodes import cluster_nodes
from unet.cluster.room import take_places
from unet.data.preparing.resolve import resolve
from unet.errors import InputError
from unet.storage import Folder
from unet.supervise.preflight import check_disk, check_samples
from unet.terminal import Display
from unet.tracking.reach import default_uri
from unet.tracking.registry import register
from unet.tracking.tracker import Tracker
from unet.tuning.ledger import Ledger
from unet.tuning.search import BEST, variants
from unet.tuning.sweep import Sweep
from unet.tuning.trials import Trials

DEFAULT_TRIALS = 10


def run_sweep(sweep: Sweep, display: Display) -> dict:
    """Run an opened sweep to its end; the content of its `summary.json`. Ray must be connected.

    Raises:
        InputError: before anything started.
        RunFailed: no trial came to a score.
    """
    with sweep.locked():
        return _run_sweep(sweep, display)


def _run_sweep(sweep: Sweep, display: Display) -> dict:
    settings, ledger = sweep.settings, Ledger(sweep.folder, sweep.lock)
    if sweep.summary.get("status") == "finished" and not settings.sweep.extend:
        return _finished(sweep, ledger, display)
    planned = _planned(sweep, len(ledger))
    nodes, storage, largest = cluster_nodes(), Folder(settings.run.storage_path), sweep.space.largest
    planner.plan_trials(largest, nodes, 0, planned)  # before the data are prepared
    try:
        prepared = resolve(settings.data.data, settings.data.image_size, settings.data.resize, storage, display.working)
    finally:
        display.close()
    digest = prepared.manifest.data_digest
    if sweep.summary.get("data_digest", digest) != digest:
        raise InputError(f"The sweep {sweep.name} was begun with other data: give those, or another --run-name.")
    counts = check_samples(settings, prepared)
    if not prepared.is_labelled("val"):
        raise InputError(
            f"No pixel of val in {prepared.folder} has a class at {prepared.manifest.image_size} px, so no trial would "
            "have a score to be chosen by: label val, list other samples for it, or give a larger --image-size."
        )
    data_bytes = sum(prepared.bytes_in_memory(s, counts[s]) for s in ("train", "val"))
    plan, together = planner.plan_trials(largest, nodes, data_bytes, planned)
    at_a_time = take_places(plan, together * plan.num_workers) // plan.num_workers
    classes = len(prepared.manifest.classes)
    parameters = largest.recipe(classes).network.parameters
    check_disk(settings, storage, parameters, (planned or at_a_time) - len(ledger))
    _settle_precision(sweep, plan.use_gpu, display)
    tracker = Tracker(storage, settings.run.experiment, settings.run.tracking_uri)
    session = Trials(sweep, ledger, prepared, counts, plan, together, at_a_time, planned, tracker, display)
    return session.run_to_end()


def _settle_precision(sweep: Sweep, use_gpu: bool, display: Display) -> None:
    """Choose the precision of all trials, or warn about slow ones that the space draws."""
    sweep.settings, choice = precision.settled(sweep.settings, use_gpu)
    choices = [choice]
    if drawn := sweep.space.draws.get("precision"):
        choices = [precision.settled(sweep.settings.with_precision(p), use_gpu)[1] for p in drawn.categories]
    for warning in filter(None, (choice.warning for choice in choices)):
        display.say(warning, "yellow")


def _finished(sweep: Sweep, ledger: Ledger, display: Display) -> dict:
    """Answer for a finished sweep, and register its best model where that is asked for."""
    summary, model = sweep.summary, sweep.settings.run.register
    best = f"best {summary['best_trial']}, val mean IoU {summary[BEST]:.4f}"
    more = "" if sweep.settings.sweep.search == "grid" else " More: --extend 10."
    display.say(f"The sweep {sweep.name} is finished ({len(ledger)} trials, {best}).{more}")
    if model:
        run = sweep.settings.run
        uri = run.tracking_uri or default_uri(Folder(run.storage_path))
        run_id = ledger.run_summary(summary["best_trial"])["mlflow_run_id"]
        sweep.write_summary(registered=register(uri, model, run_id, display))
    return sweep.summary


def _planned(sweep: Sweep, begun: int) -> int | None:
    """How many trials the sweep has when it is finished; None where only the time limits it.

    An extension that was broken off is continued by the same command, not extended again.
    """
    part, before = sweep.settings.sweep, sweep.summary
    if part.extend:
        if before["extending"] and before["status"] != "finished":
            return before["planned"]
        return max(begun, before["planned"] or 0) + part.extend
    if before.get("extending"):
        return before["planned"]
    if part.search == "grid":
        return sum(1 for _ in variants(sweep.space, "grid", 0))
    # PBT needs its whole population at once.
    return part.num_samples or (None if part.minutes and part.scheduler != "pbt" else DEFAULT_TRIALS)
