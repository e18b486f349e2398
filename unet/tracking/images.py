"""Pictures that MLflow's UI shows by their steps: in its grid of images, with a slider.

Their names are those that `MlflowClient.log_image` gives; made here, so that a picture sent again is the same file.
"""

import io
import re
import uuid

from PIL import Image

IMAGES, TAG = "images", "mlflow.loggedImages"
"""The folder of such pictures among a run's artifacts, and the tag that makes the UI look there."""
THUMBNAIL = 256
"""Pixels of the longer side of the small picture that the grid shows."""


def prefix(key: str, step: int) -> str:
    """What the names of a picture begin with: `key` may hold letters, digits, `_-./` and spaces."""
    key = re.sub(r"[^\w\-./ ]", "-", key, flags=re.ASCII).replace("/", "~")
    return f"{key}+step+{step}+"


def files(picture: Image.Image, key: str, step: int, time: int) -> dict[str, bytes]:
    """The picture and its small copy by file name; `time` in milliseconds."""
    stem = f"{prefix(key, step)}timestamp+{time}+"
    stem += str(uuid.uuid5(uuid.NAMESPACE_URL, stem))
    small = picture.copy()
    small.thumbnail((THUMBNAIL, THUMBNAIL))
    return {f"{stem}.png": _saved(picture, "png"), f"{stem}+compressed.webp": _saved(small, "webp")}


def parsed(name: str) -> tuple[str, int, int]:
    """Key, step and time of a file of that name."""
    key, _, step, _, time, _ = name.split("+", 5)
    return key.replace("~", "/"), int(step), int(time)


def _saved(picture: Image.Image, kind: str) -> bytes:
    content = io.BytesIO()
    picture.save(content, kind)
    return content.getvalue()
