"""Export a trained model to TensorFlow SavedModel, TFLite and ONNX, each compared with it; register it in MLflow.

python jobs/export.py --model RUN_NAME --output DIR --images FOLDER
python jobs/export.py --model RUN_NAME --register NAME
"""

from unet import cli
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
        raise InputError(f"{part.model} has no run in MLflow, so there is nothing to register.")
    uri = store.tracking_uri
    if part.register:
        uri = uri or tracking_uri_of(trained.run) or default_uri(Folder(store.storage_path))
    try:
        if part.output or not part.register:
            target = target_of(settings, trained)
            told = export(settings, trained, target, display)
            display.close()
            display.console.print(table(told))
            display.say(f"Written: {target}")
        if part.register:
            register(uri, part.register, trained.mlflow_run_id, display, trained.checkpoint)
    finally:
        display.close()


if __name__ == "__main__":
    cli.main(ExportSettings, run, __doc__)
