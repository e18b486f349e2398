"""Export a trained model as SavedModel, TFLite and ONNX, or register it in MLflow.

examples:
    python jobs/export.py --model RUN_NAME --output DIR --images FOLDER
    python jobs/export.py --model RUN_NAME --register NAME
"""

from unet.commands import cli
from unet.config import ExportSettings
from unet.errors import InputError


def run(settings: ExportSettings) -> None:
    from unet.cluster.session import silenced
    from unet.disk import check_writable
    from unet.models.trained import TrainedModel, tracking_uri_of
    from unet.packaging.export import export, table, target_of
    from unet.storage import Folder
    from unet.terminal import Display
    from unet.tracking.reach import default_uri
    from unet.tracking.registry import register

    part, store, display = settings.export, settings.store, Display()
    if part.output:
        check_writable(Folder(part.output), "--output")
    with silenced(settings.command.debug):  # TensorFlow reads the variables of an MLflow model here
        trained = TrainedModel.find(part.model, Folder(store.storage_path), store.tracking_uri)
    if part.register and trained.mlflow_run_id is None:
        raise InputError(f"{part.model} has no run in MLflow to register it from. Give the name of a tracked run.")
    try:
        if part.output or not part.register:
            target = target_of(settings, trained)
            compared = export(settings, trained, target, display)
            display.close()
            display.console.print(table(compared))
            display.say(f"Written to {target}")
        if part.register and trained.mlflow_run_id:
            uri = store.tracking_uri or tracking_uri_of(trained.run) or default_uri(Folder(store.storage_path))
            register(uri, part.register, trained.mlflow_run_id, display, trained.checkpoint)
    finally:
        display.close()


def main() -> None:
    cli.main(ExportSettings, run, __doc__)
