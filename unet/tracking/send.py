"""Sends a run's folder to its MLflow run: at the start and the end of a training, and later with `--sync`.

The folder holds all that MLflow gets, and nothing is doubled however often it is sent.
"""

import threading

from unet import metric_names
from unet.config import TrainSettings, read_config
from unet.data.shards import Prepared
from unet.errors import InputError, RunFailed
from unet.runs.checkpoint import OPTIMIZER
from unet.runs.run import CONFIG, MODEL, SUMMARY, Run, called, locked, prepared_of, where
from unet.secrets import without_secrets
from unet.storage import Folder
from unet.terminal import Display
from unet.tracking.database import check_database
from unet.tracking.description import NOTE, described
from unet.tracking.images import IMAGES, TAG
from unet.tracking.logged_models import Models, best_of
from unet.tracking.reach import check_server, default_uri
from unet.tracking.stored_run import data_set
from unet.tracking.writer import AsyncWriter

PATIENCE = 30.0
"""Seconds after which a store that accepts nothing any more is given up."""
STOP_SECONDS = 2.0
"""How long a job that was stopped waits for MLflow."""
PICTURES = (".png", ".npz")


def begin(run: Run, to: AsyncWriter, prepared: Prepared | None = None) -> None:
    """Send what is known of a run from its start, and its epochs so far; `prepared`: its data, if they are open."""
    config, summary = read_config(run.folder), run.summary
    params = config | {name: summary.get(name) for name in ("parameters", "data_digest")}
    tags = {"data_digest": summary.get("data_digest"), "run_folder": str(run.folder)}
    to.start(run.name, summary["mlflow_run_id"], params, tags, run.mlflow_key(), summary.get("started"))
    if prepared := prepared or open_data(run.folder, summary["data_digest"]):
        to.data(prepared)
    to.epoch(*run.history(), *run.system())
    to.file(run.folder, CONFIG)
    pictures = run.folder / IMAGES
    for name in pictures.files() if run.folder.exists(IMAGES) else []:
        shown(run, name, to)


def tell(run: Run, to: AsyncWriter, packaged: str | None = None, **of_the_end) -> None:
    """Send what follows from the run's epochs so far: its description and its best checkpoints."""
    to.tags({NOTE: described(run)})
    summary = run.summary
    tags = {"data_digest": summary["data_digest"], "run_folder": str(run.folder), "run_name": run.name}
    source = summary.get("data_source") or "data"
    on = data_set(source, summary["data_digest"], "val")
    to.models(Models(best_of(run, packaged), tags, run.public_settings(), on, packaged=packaged, **of_the_end))


def shown(run: Run, name: str, to: AsyncWriter) -> None:
    """Send a picture of an epoch, which MLflow's UI finds by its name."""
    to.file(run.folder / IMAGES, name, IMAGES)
    to.tags({TAG: "true"})


def open_data(folder: Folder, digest: str) -> Prepared | None:
    """The prepared data with this digest that a run's or sweep's folder names, if they are where they were."""
    try:
        uri = prepared_of(folder)
        prepared = Prepared(Folder(uri)) if uri else None
    except (InputError, OSError):
        return None
    return prepared if prepared and prepared.manifest.data_digest == digest else None


def send(
    run: Run,
    to: AsyncWriter,
    patience: float = PATIENCE,
    at_most: float = float("inf"),
    until: threading.Event | None = None,
) -> bool:
    """Send all of an ended run; whether MLflow has accepted it. Its summary then names its MLflow run.

    Waits as `AsyncWriter.deliver` does.
    """
    begin(run, to)
    if not to.reach(patience, at_most, until):
        return False
    summary, finished = run.summary, run.summary["status"] == "finished"
    has_model = finished and run.folder.committed(MODEL)
    run.write_summary(
        mlflow_run_id=to.run_id,
        mlflow_experiment_id=to.experiment_id,
        model_uri=f"runs:/{to.run_id}/model" if has_model else None,
    )
    to.single(run.mlflow_key())
    if finished and summary.get("test"):  # a sweep's trials have none
        _results(run, to)
    if has_model:
        test = metric_names.of("test", summary["test"])
        package, packaged = run.folder / MODEL, summary["best_checkpoint"].rpartition("/")[2]
        tell(run, to, package=package, packaged=packaged, test=test, tested=_tested(run))
    else:
        tell(run, to)
    to.tags(restart_tags(summary))
    facts = {name: summary.get(name) for name in ("status", "reason", "best_checkpoint", "model_uri", "reproduction")}
    to.tags({name: value[:500] for name, value in facts.items() if value})
    to.file(run.folder, SUMMARY)
    to.status(summary["status"], summary.get("ended"))
    delivered = to.deliver(patience, at_most, until)
    run.write_summary(delivered=delivered)
    return delivered


def restart_tags(summary: dict) -> dict[str, str]:
    """The restarts of a run's workers as tags: their number, and when and why each happened."""
    log = summary.get("restart_log") or []
    texts = [f"{r['time']} {r['reason']}; {r['workers']} worker(s) from step {r['step']}" for r in log]
    return {"restarts": str(len(log))} | {f"restart_{i:03d}": text[:500] for i, text in enumerate(texts, 1)}


def _results(run: Run, to: AsyncWriter) -> None:
    """Test scores, pictures and the best checkpoint, as far as evaluation and prediction read it."""
    summary = run.summary
    to.metrics(metric_names.of("test", summary["test"]), *_tested(run))
    for name in run.folder.names():
        if name.endswith(PICTURES):
            to.file(run.folder, name)
    best = run.folder / summary["best_checkpoint"]
    for name in best.files():
        if name != OPTIMIZER:  # twice the weights; only a continuation needs it, and that begins at the folder
            to.file(best, name, "best_checkpoint")


def _tested(run: Run) -> tuple[int, int]:
    """The epoch and the time of the scores on the test split."""
    last = run.history()[-1]
    return last["epoch"], run.summary.get("test_time") or last["time"]


def kept_back(run: Run, to: AsyncWriter) -> str:
    """What to do about an ended run that MLflow does not have whole."""
    store, again = (
        f"MLflow at {without_secrets(to.uri)}",
        f"{called('train')} --sync {run.name}{where(run.settings.run)}",
    )
    if to.refuses:
        return (
            f"{store} refuses part of the run ({to.reason}) and has the rest; the run's folder holds everything. "
            f"Waiting does not help. Once that store, or another, accepts it, send it: {again}"
        )
    return (
        f"{store} does not have all of the run ({to.reason or 'there was not enough time'}); the run's folder holds "
        f"everything. Send it later: {again}"
    )


def send_later(run: Run, display: Display) -> None:
    """Send what MLflow lacks of an ended run.

    Raises:
        RunFailed: the store has not accepted everything.
    """
    part = run.settings.run
    writer = AsyncWriter(Folder(part.storage_path), part.experiment, part.tracking_uri, display.say)
    try:
        display.waiting(f"sending {run.name} to MLflow")
        writer.check(PATIENCE)
        delivered = send(run, writer)
    finally:
        writer.close()
        display.close()
    if not delivered:
        raise RunFailed(kept_back(run, writer))
    display.say(
        f"MLflow at {without_secrets(writer.uri)} has all of the run {run.name} ({run.summary['status']}, "
        f"{len(run.history())} epochs): run {run.summary['mlflow_run_id']}."
    )


def sync(settings: TrainSettings, display: Display) -> None:
    """`--sync`.

    Raises:
        InputError: the run has not ended, or the store does not answer.
        RunFailed: the store has not accepted everything.
    """
    name, part = settings.run.sync, settings.run
    assert name is not None  # --sync names it
    with locked(Folder(part.storage_path) / name, name):
        _sync(Run.load(name, settings), display)


def _sync(run: Run, display: Display) -> None:
    part = run.settings.run
    if run.summary.get("status") not in ("finished", "stopped", "failed"):
        raise InputError(
            f"The run {run.name} has not ended, and sends what MLflow lacks as it goes on. If it was killed, continue "
            f"it: {called('train')} --resume {run.name}{where(part)}"
        )
    check_database(part.tracking_uri or default_uri(Folder(part.storage_path)))
    check_server(part.tracking_uri)
    send_later(run, display)
