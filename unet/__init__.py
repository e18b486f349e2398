"""U-Nets that segment photos, trained on Ray, tracked in MLflow.

The jobs are commands; in a program of your own, `unet.load` returns a trained model that takes arrays.
"""

from os import PathLike, fspath
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from unet.prediction.segmenter import Segmenter

__all__ = ["load"]


def load(
    model: str | PathLike[str], storage_path: str | PathLike[str] | None = None, tracking_uri: str | None = None
) -> "Segmenter":
    """A trained model, ready to predict; no Ray has to run.

    Args:
        model: a run's name (its best checkpoint), the folder of a run or a checkpoint, or an MLflow URI (`runs:/…`,
            `models:/…`).
        storage_path: where the runs are; default, as for the jobs: `UNET_STORAGE_PATH`, else `~/unet-runs`.
        tracking_uri: MLflow server or store; default: SQLite under the storage path.

    Raises:
        unet.errors.InputError: there is no such model, it is damaged, or this program's Keras cannot run it.
    """
    from unet.config import StoreSettings
    from unet.environment import check_program
    from unet.models.trained import TrainedModel
    from unet.prediction.segmenter import Segmenter
    from unet.storage import Folder

    given = {"storage_path": None if storage_path is None else fspath(storage_path), "tracking_uri": tracking_uri}
    check_program()
    store = StoreSettings(**{name: value for name, value in given.items() if value is not None})
    return Segmenter(TrainedModel.find(fspath(model), Folder(store.storage_path), store.tracking_uri))
