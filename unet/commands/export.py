"""Export a trained model as SavedModel, TFLite and ONNX, or register it in MLflow.

examples:
    python jobs/export.py --model RUN_NAME --output DIR --images FOLDER
    python jobs/export.py --model RUN_NAME --register NAME
"""

from typing import TYPE_CHECKING

from unet.commands import cli
from unet.config import ExportSettings
from unet.errors import InputError

if TYPE_CHECKING:
    from unet.models.trained import TrainedModel
    from unet.storage import Folder
    from unet.terminal import Display


def run(settings: ExportSettings) -> None:
    from unet.disk import at_the_door, check_writable
    from unet.models.trained import tracking_uri_of
    from unet.storage import Folder
    from unet.terminal import Display
    from unet.tracking.reach import default_uri
    from unet.tracking.registry import register

    part, store, display = settings.export, settings.store, Display()
    with at_the_door():
        if part.output:
            check_writable(Folder(part.output), "--output")
        trained = _found(settings)
    if part.register and trained.mlflow_run_id is None:
        raise InputError(f"{part.model} has no run in MLflow to register it from. Give the name of a tracked run.")
    if part.output or not part.register:
        write(settings, display, trained)
    if part.register and trained.mlflow_run_id:
        uri = store.tracking_uri or tracking_uri_of(trained.run) or default_uri(Folder(store.storage_path))
        register(uri, part.register, trained.mlflow_run_id, display, trained.checkpoint)


def write(settings: ExportSettings, display: "Display", trained: "TrainedModel | None" = None) -> "Folder":
    """Write the forms of a model, by default of that of the settings, and show them; where they are.

    Raises:
        InputError, RunFailed: as `unet.packaging.export.export` does.
    """
    from unet.packaging.export import export, table, target_of

    trained = trained or _found(settings)
    target = target_of(settings, trained)
    try:
        made = export(settings, trained, target, display)
    finally:
        display.close()
    display.console.print(table(made))
    display.say(f"Written to {target}")
    return target


def _found(settings: ExportSettings) -> "TrainedModel":
    from unet.cluster.session import silenced
    from unet.models.trained import TrainedModel
    from unet.storage import Folder

    part, store = settings.export, settings.store
    with silenced(settings.command.debug):  # TensorFlow reads the variables of an MLflow model here
        return TrainedModel.find(part.model, Folder(store.storage_path), store.tracking_uri)


def main() -> None:
    cli.main(ExportSettings, run, __doc__)
