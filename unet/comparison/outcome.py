"""The page of a comparison: in its folder, and in the MLflow runs of what was compared."""

from unet.comparison.page import comparison_page
from unet.comparison.run import FOLDER, Comparison
from unet.config import StoreSettings
from unet.evaluation.outcome import not_logged
from unet.models.trained import tracking_uri_of
from unet.storage import Folder
from unet.terminal import Display
from unet.tracking.reach import check_server
from unet.tracking.stored_run import StoredRun

PAGE = "comparison.html"


def write(done: Comparison) -> None:
    """Write the page over that of an earlier comparison. Raises StorageFailed."""
    done.folder.write_text(PAGE, comparison_page(done))


def track(done: Comparison, store: StoreSettings, display: Display) -> None:
    """Log the page to the MLflow run of each run, or of the sweep; a sentence says what has none, or was not logged.

    Why: docs/decisions.md#a-comparison-is-logged-to-the-runs-that-it-compares
    """
    kept = f"the page is {done.folder}/{PAGE}."
    to = [(run.name, run.folder, run.summary.get("mlflow_run_id")) for run in done.runs]
    to = [(done.sweep.name, done.sweep.folder, done.sweep.mlflow_run_id)] if done.sweep else to
    if untracked := [name for name, _, run_id in to if run_id is None]:
        display.say(f"Without an MLflow run: {', '.join(untracked)}; {kept}", "yellow")
    silent: set[str | None] = set()
    for _, folder, run_id in to:
        try:
            uri = store.tracking_uri or tracking_uri_of(folder)
            if run_id is None or uri in silent:
                continue
            silent.add(uri)  # unless it answers: then no other run waits for it
            check_server(uri)
            silent.remove(uri)
            run = StoredRun.of_existing(Folder(store.storage_path), run_id, uri)
            run.file(done.folder, PAGE, f"{FOLDER}/{done.name}")
        except Exception as error:  # whatever the store's library raises: the page is there
            display.say(not_logged("comparison", error, kept), "yellow")
