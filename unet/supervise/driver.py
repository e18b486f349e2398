"""A training from an opened run to its end: everything that can be refused, then the supervisor's part."""

import threading
import time
from collections.abc import Mapping

from unet.cluster import planner, precision
from unet.cluster.placement import in_words
from unet.cluster.room import take_room
from unet.data.preparing.findings import checks_row
from unet.data.shards import Prepared
from unet.data.streaming import STREAM_TASKS
from unet.errors import InputError, RunFailed, StorageFailed
from unet.evaluation.intervals import LEAST_IMAGES
from unet.models.start import Known, Start, check_same, known_of, start_of
from unet.recipe.optimizer import in_few_words
from unet.runs.run import Run
from unet.storage import Folder
from unet.supervise import results
from unet.supervise.preflight import check_disk
from unet.supervise.prelude import gather
from unet.supervise.recorder import RunRecorder
from unet.supervise.reproduction import Reproduction, differences
from unet.supervise.results import AUGMENTED
from unet.supervise.supervisor import Supervisor
from unet.terminal import Display
from unet.tracking.original import Original
from unet.tracking.send import send_later
from unet.tracking.stored_run import code_version
from unet.training.plan import has_ended, planned_steps


def train(
    run: Run,
    display: Display | None = None,
    callbacks: tuple = (),
    as_trial: bool = False,
    together: int = 1,
    started: float | None = None,
    stop_signal: threading.Event | None = None,
    known: Known | None = None,
) -> dict:
    """Train an opened run to its end; its summary (the content of `summary.json`).

    Ray must be connected (`unet.cluster.session`). `callbacks` go to Ray Train. A trial of a sweep skips the test
    split, pictures, packaging and MLflow (the sweep writes it); `together` trials share the cluster. `started` is
    when the job began, in seconds since 1970; `stop_signal` ends it with a checkpoint (default: set by Ctrl-C).
    `known` is what a trial knows at its beginning; others find it themselves.

    Raises:
        InputError: before anything started.
        RunFailed: the run had started and failed.
    """
    with run.locked():
        try:
            return _train(
                run,
                display or Display(quiet=True),
                callbacks,
                as_trial,
                together,
                started or time.time(),
                stop_signal,
                known,
            )
        except StorageFailed as error:
            raise run.after(error) from error


def _train(
    run: Run,
    display: Display,
    callbacks: tuple,
    as_trial: bool,
    together: int,
    started: float,
    stop_signal: threading.Event | None,
    known: Known | None,
) -> dict:
    settings = run.settings
    if run.summary.get("status", "finished") != "finished":  # its workers may have outlived their driver
        run.take_over()
    latest, passed_over = run.checkpoints.resume(settings)
    for sentence in passed_over:
        display.say(f"{sentence[0].upper()}{sentence[1:]}.", "yellow")
    # A trial of a sweep may be finished without a test score, which is then made up for; so is that of another best.
    chosen = latest and f"checkpoints/{latest[1].chosen}"
    scored = as_trial or (run.summary.get("test") and run.summary.get("best_checkpoint") == chosen)
    if run.summary.get("status") == "finished" and latest and scored:
        done, best = latest[1].epoch - 1, latest[1].best_epoch or "none"
        patience, stale = settings.training.patience, latest[1].stale_epochs
        if patience is not None and stale >= patience:
            display.say(
                f"The run {run.name} stopped early after epoch {done}, best {best}. More: --patience {stale + 5}."
            )
            return _finished(run, display, as_trial)
        # Of a run by the clock the number of steps is in its state; of one by epochs they say it all.
        if has_ended(settings, latest[1], planned_steps(settings, latest[1], 0)):
            more = results.more(settings, done)
            display.say(f"The run {run.name} is finished ({done} epochs, best {best}). More: {more}.")
            return _finished(run, display, as_trial)
    material = gather(
        settings,
        display,
        lambda nodes, data_bytes: planner.plan(settings, nodes, data_bytes, together),
        f"The run {run.name}",
        latest and latest[1].data_digest,
    )
    prepared, counts, parameters = material.prepared, material.counts, material.recipe.network.parameters
    names = prepared.manifest.classes
    if latest and [c.name for c in latest[1].class_infos] != names:
        raise InputError(f"{prepared.folder} has other classes now ({', '.join(names)}): give another --run-name.")
    # The sweep of a trial has asked for its room.
    plan = material.plan if as_trial else take_room(settings, material.data_bytes, display.waiting_for_others)
    check_disk(settings, Folder(settings.run.storage_path), material.recipe)
    start = None
    if not latest:
        known = known if as_trial else known_of(material.settings, material.recipe, prepared)
        start = start_of(known, material.recipe, names)
        check_same(start, run.summary, f"The run {run.name}")
    run.settings, choice = precision.settled(material.settings, plan.use_gpu)

    display.table(f"Run {run.name}", _overview(run, prepared, counts, parameters, plan, choice, start))
    if choice.warning:
        display.say(choice.warning, "yellow")
    if latest:
        display.say(f"Continuing at step {latest[1].step} of {latest[0]}.")
    if not prepared.is_labelled("val"):
        display.say(
            f"No pixel of val has a class at {prepared.manifest.image_size} px: no epoch is scored, --patience stops "
            "nothing, and the run's name means its last checkpoint.",
            "yellow",
        )
    elif not (as_trial or latest) and (few := _few(counts)):
        display.say(few, "yellow")
    again = None if as_trial else _again(run, prepared, display)
    recorder = RunRecorder(run, prepared, parameters, display, as_trial, started, reproduction=again)
    return Supervisor(recorder, counts, plan, callbacks, together, latest, start).run_to_end(stop_signal)


def _few(counts: Mapping[str, int]) -> str | None:
    """What to expect of scores over so few samples, in a sentence; None where there are enough."""
    few = [f"{split} {counts[split]}" for split in ("val", "test") if counts[split] < LEAST_IMAGES]
    if not few:
        return None
    return (
        f"Few photos are scored ({', '.join(few)}): the scores say little, and the best epoch is chosen by those of "
        f"val. Add photos, or lists that give val and test {LEAST_IMAGES} or more each."
    )


def _again(run: Run, prepared: Prepared, display: Display) -> Reproduction | None:
    """The comparison with the run that this one trains again, if it does; says what differs here.

    Raises:
        InputError: that run is not there.
    """
    part = run.settings.run
    if part.reproduce is None:
        return None
    try:
        original = Original.find(part.reproduce, Folder(part.storage_path), part.tracking_uri)
    except InputError as error:
        if not run.summary:
            raise
        display.say(f"{error} This run goes on without a comparison.", "yellow")
        return None
    found = differences(original, run.settings, prepared.manifest.data_digest, code_version())
    same = f"Trains {original.name} again; as far as is known now, nothing differs here."
    display.say("\n  ".join([f"Trains {original.name} again. What differs here:", *found]) if found else same)
    return Reproduction(original)


def _finished(run: Run, display: Display, as_trial: bool) -> dict:
    """The summary of a run that was finished before; what an outage or a kill kept from MLflow is sent."""
    if not as_trial and not run.summary.get("delivered", True):
        try:
            send_later(run, display)
        except RunFailed as error:
            display.say(str(error), "yellow")
    return run.summary


def _overview(
    run: Run,
    prepared: Prepared,
    counts: dict[str, int],
    parameters: int,
    plan: planner.Plan,
    choice: precision.Choice,
    start: Start | None,
) -> list[tuple[str, str]]:
    s = run.settings
    mode = "kept in memory" if plan.kept else "streamed"
    if plan.stream_tasks < STREAM_TASKS:
        mode += ", one window at a time: there is no memory for the next"
    tracking = s.run.tracking_uri or f"sqlite in {s.run.storage_path}"
    return [
        ("data", f"{prepared.folder} ({plan.data_bytes / 1e6:.0f} MB, {mode})"),
        ("splits", ", ".join(f"{name} {count:,}" for name, count in counts.items())),
        *checks_row(prepared),
        (
            "model",
            f"{s.model.title}, {parameters:,} parameters, {s.data.image_size} px, {s.model.base_filters} filters",
        ),
        *([("begins with", start.words)] if start else []),
        (
            "training",
            f"{s.length_in_words}, global batch {s.training.batch_size}, {in_few_words(s.optimizer)}, "
            f"{s.loss.loss}, seed {s.training.seed}",
        ),
        ("recipe", s.command.recipe),
        *([("class weights", s.loss.class_weights)] if s.loss.class_weights else []),
        *_augmentation_row(run),
        ("precision", f"{choice.precision}: {choice.reason}"),
        (
            "workers",
            f"{plan.num_workers} x {plan.cpus_per_worker:g} CPUs, {plan.threads} thread(s) each"
            + (f"; {s.compute.least_workers} to {s.compute.most_workers}" if s.compute.is_elastic else ""),
        ),
        ("device", in_words(plan.use_gpu, plan.why_cpus) + (", deterministic" if s.compute.deterministic else "")),
        ("results", str(run.folder)),
        ("tracking", f"{tracking}, experiment {s.run.experiment}"),
    ]


def _augmentation_row(run: Run) -> list[tuple[str, str]]:
    """What varies the training samples, if something does."""
    augment = run.settings.augment
    if not augment.is_on:
        return []
    last = "" if augment.augment_except_last == "0" else f", but for the last {augment.augment_except_last}"
    words = f"strength {augment.augment:g}, {augment.mix:.0%} mixed{last}; see {run.folder}/{AUGMENTED}"
    return [("augmentation", words)]
