"""A sweep from its opened folder to its end: everything that can be refused, then its trials."""

from unet.cluster import planner, precision
from unet.cluster.demand import needs_of
from unet.cluster.placement import in_words
from unet.cluster.room import take_places
from unet.data.preparing.findings import checks_row
from unet.data.shards import Prepared
from unet.errors import InputError
from unet.metric_names import BEST
from unet.models.start import check_same, known_of, start_of
from unet.secrets import without_secrets
from unet.storage import Folder
from unet.supervise.preflight import check_disk, with_weights_of
from unet.supervise.prelude import gather
from unet.terminal import Display
from unet.tracking.reach import default_uri
from unet.tracking.registry import register
from unet.tuning import outcome
from unet.tuning.ledger import Ledger
from unet.tuning.search import variants
from unet.tuning.space import choices
from unet.tuning.sweep import Sweep
from unet.tuning.sweep_runs import SweepRuns
from unet.tuning.trials import Trials

DEFAULT_TRIALS = 10


def run_sweep(sweep: Sweep, display: Display) -> dict:
    """Run an opened sweep to its end; the content of its `summary.json`. Ray must be connected.

    Raises:
        InputError: before anything started.
        RunFailed: no trial has a score.
    """
    with sweep.locked():
        return _run_sweep(sweep, display)


def _run_sweep(sweep: Sweep, display: Display) -> dict:
    settings, ledger = sweep.settings, Ledger(sweep.folder, sweep.lock)
    if sweep.summary.get("status") == "finished" and not settings.sweep.extend:
        return _finished(sweep, ledger, display)
    planned, largest = _planned(sweep, len(ledger)), sweep.space.largest
    material = gather(
        largest,
        display,
        lambda nodes, data_bytes: planner.plan_trials(largest, nodes, data_bytes, planned),
        f"The sweep {sweep.name}",
        sweep.summary.get("data_digest"),
    )
    prepared = material.prepared
    known = known_of(largest, material.recipe, prepared)
    check_same(known, sweep.summary, f"The sweep {sweep.name}")
    start_of(known, material.recipe, prepared.manifest.classes)  # refused before any trial
    if not prepared.is_labelled("val"):
        raise InputError(
            f"No pixel of val in {prepared.folder} has a class at {prepared.manifest.image_size} px, so no trial would "
            "have a score: label val, list other samples for it, or give a larger --image-size."
        )
    plan, together = material.plan
    places = take_places(plan, together * plan.num_workers, needs_of(largest), display.waiting_for_others)
    at_a_time = places // plan.num_workers
    runs = (planned or at_a_time) - len(ledger)
    check_disk(settings, Folder(settings.run.storage_path), material.recipe, runs)
    _settle_class_weights(sweep, prepared, material.counts["train"])
    _settle_precision(sweep, plan.use_gpu, display)
    writer = SweepRuns(sweep, ledger, lambda words: display.say(words, "yellow"))
    if not sweep.summary:  # one that continues goes on without MLflow
        writer.check()
    session = Trials(
        sweep, ledger, prepared, material.counts, plan, together, at_a_time, planned, writer, display, known
    )
    display.table(f"Sweep {sweep.name}", _overview(session))
    return session.run_to_end()


def _settle_precision(sweep: Sweep, use_gpu: bool, display: Display) -> None:
    """Choose the precision of all trials, or warn about slow ones that the space draws."""
    sweep.settings, choice = precision.settled(sweep.settings, use_gpu)
    found = [choice]
    if drawn := choices(sweep.space.draws.get("precision")):
        found = [precision.settled(sweep.settings.with_precision(p), use_gpu)[1] for p in drawn]
    for warning in filter(None, (choice.warning for choice in found)):
        display.say(warning, "yellow")


def _settle_class_weights(sweep: Sweep, prepared: Prepared, samples: int) -> None:
    """Put numbers in the place of `auto`, in the settings and among what the space draws."""
    sweep.settings = with_weights_of(prepared, samples, sweep.settings)
    if drawn := choices(sweep.space.draws.get("class_weights")):
        each = (with_weights_of(prepared, samples, sweep.settings.with_class_weights(weights)) for weights in drawn)
        sweep.space = sweep.space.choosing("class_weights", [settings.loss.class_weights for settings in each])


def _finished(sweep: Sweep, ledger: Ledger, display: Display) -> dict:
    """Say that a sweep is finished, send what MLflow lacks, and register its best model if that is asked for."""
    summary, run = sweep.summary, sweep.settings.run
    best = f"best {summary['best_trial']}, val mean IoU {summary[BEST]:.4f}"
    more = "" if sweep.settings.sweep.search == "grid" else " More: --extend 10."
    display.say(f"The sweep {sweep.name} is finished ({len(ledger)} trials, {best}).{more}")
    if not summary.get("delivered", True):
        outcome.send_missing(sweep, ledger, display)
    if run.register:
        uri = run.tracking_uri or default_uri(Folder(run.storage_path))
        run_id = ledger.run_summary(summary["best_trial"])["mlflow_run_id"]
        sweep.write_summary(registered=register(uri, run.register, run_id, display))
    return sweep.summary


def _planned(sweep: Sweep, begun: int) -> int | None:
    """How many trials the sweep has when it is finished; None where only the time limits it.

    An extension that was interrupted is continued by the same command, not extended again.
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
    return part.num_samples or (None if sweep.settings.length.minutes and part.scheduler != "pbt" else DEFAULT_TRIALS)


def _overview(session: Trials) -> list[tuple[str, str]]:
    sweep, ledger, plan = session.sweep, session.ledger, session.plan
    settings, part = sweep.settings, sweep.settings.sweep
    mode = "read once and shared" if plan.kept else "streamed"
    trials = "as many as fit" if session.planned is None else str(session.planned)
    if minutes := settings.length.minutes:
        trials += f", for {minutes:g} minutes"
    if len(ledger):
        trials += f" ({len(ledger)} begun earlier, {len(ledger.unfinished())} of them continue)"
    workers = f"{plan.num_workers} worker(s) x {plan.cpus_per_worker:g} CPUs, {plan.threads} thread(s)"
    return [
        ("data", f"{session.prepared.folder} ({plan.data_bytes / 1e6:.0f} MB, {mode})"),
        ("splits", ", ".join(f"{name} {count:,}" for name, count in session.counts.items())),
        *checks_row(session.prepared),
        *([] if "precision" in sweep.space.draws else [("precision", settings.training.precision)]),
        ("space", sweep.space.described()),
        ("search", f"{part.search}, {part.scheduler}, up to {settings.epochs} epochs a trial"),
        ("trials", f"{trials}; {session.at_a_time} at a time, {workers} each"),
        ("device", in_words(plan.use_gpu, plan.why_cpus)),
        ("results", str(sweep.folder)),
        ("tracking", f"{without_secrets(session.runs.own.uri)}, experiment {settings.run.experiment}"),
    ]
