"""What a run's workers report, and what follows from it."""

from dataclasses import dataclass
from typing import Any

from unet.errors import Diverged, NoGpu, RunFailed, StorageFailed
from unet.runs.run import milliseconds
from unet.supervise.recorder import RunRecorder
from unet.supervise.results import Results
from unet.training.link import not_finite
from unet.training.loop import AGAIN_SECONDS


@dataclass
class Reports:
    """The reports of all groups of workers of one start of a run.

    Attributes:
        failure: what ends the run, where no new group can help.
        stopped: whether somebody has asked the run to stop, or its workers have done so.
        left: whether the group under way has left its place to another.
        test, tested: scores of the test split, and when, in milliseconds since 1970.
        gallery, package: of the trained model, as `unet.training.finish` makes them.
    """

    recorder: RunRecorder
    failure: RunFailed | None = None
    stopped: bool = False
    left: bool = False
    test: dict | None = None
    tested: int | None = None
    gallery: dict | None = None
    package: dict[str, bytes] | None = None

    def handle(self, kind: str, content: Any) -> None:
        """Take in one event of the link."""
        getattr(self, f"_on_{kind}")(content)

    @property
    def results(self) -> Results | None:
        """What the end of a training came to; None before, and for a trial of a sweep."""
        if self.test is None or self.tested is None or self.gallery is None or self.package is None:
            return None
        return Results(self.test, self.tested, self.gallery, self.package)

    def _on_start(self, world_size: int) -> None:
        self.recorder.display.waiting(f"{world_size} worker(s) loading TensorFlow")

    def _on_changed(self, what: list[str]) -> None:
        self.recorder.display.say(
            f"The {', '.join(what)} changed: the numbers will not be bit-equal to those of an unbroken run.", "yellow"
        )

    def _on_rate(self, sentence: str) -> None:
        self.recorder.display.say(sentence, "yellow")

    def _on_first_step(self, at: float) -> None:
        self.recorder.first_step(at)

    def _on_epoch(self, content: dict) -> None:
        self.recorder.epoch(content["record"], content["validation"])

    def _on_shown(self, content: dict) -> None:
        self.recorder.shown(content)

    def _on_augmented(self, samples: dict) -> None:
        self.recorder.augmented(samples)

    def _on_sample(self, content: tuple[str, dict[str, float]]) -> None:
        self.recorder.system.take(*content)

    def _on_test(self, result: dict) -> None:
        self.test, self.tested = result, milliseconds()

    def _on_gallery(self, gallery: dict) -> None:
        self.gallery = gallery

    def _on_package(self, files: dict[str, bytes]) -> None:
        self.package = files

    def _on_stopped(self, step: int) -> None:
        self.stopped = True

    def _on_left(self, step: int) -> None:
        self.left = True

    def _on_not_finite(self, content: dict) -> None:
        remedy = "start again with a smaller --learning-rate or --clip-norm 1."
        if self.recorder.run.settings.training.on_nan == "stop":
            remedy = f"continue with --on-nan skip, or {remedy}"
        self.failure = Diverged(f"{not_finite(content)} The last checkpoint is intact: {remedy}")

    def _on_waiting(self, words: str) -> None:
        self.recorder.display.say(f"{words[0].upper()}{words[1:]}.", "yellow")

    def _on_put_off(self, reason: str) -> None:
        self.recorder.display.say(
            f"{reason}. Training goes on, and the checkpoint is tried again every {AGAIN_SECONDS:.0f} s.", "yellow"
        )

    def _on_saved_again(self, step: int) -> None:
        self.recorder.display.say(f"The checkpoint of step {step} is written: the storage is back.", "yellow")

    def _on_storage_failed(self, reason: str) -> None:
        self.failure = StorageFailed(reason)

    def _on_no_gpu(self, reason: str) -> None:
        self.failure = NoGpu(reason)
