"""TensorBoard's files of a run: what its recorder records in any case, for those who look there."""

import contextlib
import io
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from PIL import Image

from unet.metric_names import PLACE, step_of
from unet.runs.run import Run
from unet.tracking.images import IMAGES, parsed

TENSORBOARD = "tensorboard"


class Board:
    """The files of one start of a run: made from its folder, then grown. Nothing without the setting.

    A disk that does not take them ends the files, not the run: its folder has all that is in them.
    """

    def __init__(self, run: Run, say: Callable[[str], None]):
        self._run, self._say, self._writes = run, say, run.settings.run.tensorboard
        self._folder = Path(run.folder.path) / TENSORBOARD
        self._lines: list[dict] = []
        self._pictures: list[tuple[str, str, int, int]] = []
        self._events: Any = None

    def epochs(self, lines: list[dict]) -> None:
        """The lines of `metrics.jsonl`; after another line than before the files are begun anew."""
        if lines[: len(self._lines)] != self._lines:
            self.close()
            self._lines = []
            for picture in self._pictures:
                self._draw(*picture)
        for line in lines[len(self._lines) :]:
            values = {name: value for name, value in line.items() if name not in PLACE}
            self.scores(values, step_of(line), line["time"])
        self._lines = list(lines)

    def scores(self, values: dict[str, float], step: int, time_ms: int) -> None:
        self._write(
            lambda: [{"tag": name, "simple_value": float(value)} for name, value in values.items()], step, time_ms
        )

    def picture(self, tag: str, name: str, step: int, time_ms: int) -> None:
        """A PNG file of the run's folder."""
        self._pictures.append((tag, name, step, time_ms))
        self._draw(tag, name, step, time_ms)

    def image(self, name: str) -> None:
        """A picture of an epoch in `images/`, of which there are smaller copies."""
        if name.endswith(".png"):
            key, step, time_ms = parsed(name)
            self.picture(key, f"{IMAGES}/{name}", step, time_ms)

    def _draw(self, tag: str, name: str, step: int, time_ms: int) -> None:
        self._write(lambda: [{"tag": tag, "image": _image(self._run.folder.read_bytes(name))}], step, time_ms)

    def _write(self, values: Callable[[], list[dict[str, Any]]], step: int, time_ms: int) -> None:
        if not self._writes:
            return
        from tensorboardX.proto.event_pb2 import Event  # loads for a second

        try:
            self._events = self._events or self._begin()
            self._events.write_event(Event(wall_time=time_ms / 1000, step=step, summary={"value": values()}))
            self._events.flush()
        except OSError as error:
            self._writes = False
            self._say(f"TensorBoard's files in {self._folder} end here ({error}): the next start writes them anew.")

    def _begin(self):
        # Synchronous, unlike the library's `SummaryWriter`, which waits for ever once its thread has met a full disk.
        from tensorboardX.event_file_writer import EventsWriter

        shutil.rmtree(self._folder, ignore_errors=True)
        self._folder.mkdir(exist_ok=True)
        return EventsWriter(str(self._folder / "events"))

    def close(self) -> None:
        events, self._events = self._events, None
        if events:
            with contextlib.suppress(OSError):  # of a disk that has taken no more before
                events.close()


def _image(png: bytes) -> dict[str, Any]:
    """A PNG file as TensorBoard's events hold it."""
    with Image.open(io.BytesIO(png)) as picture:
        size = {"width": picture.width, "height": picture.height, "colorspace": len(picture.getbands())}
    return size | {"encoded_image_string": png}
