"""Errors whose messages are sentences for a person. `unet.commands.cli` prints them without a traceback."""

import re


class InputError(Exception):
    """Settings, data or a folder that cannot work, found before anything started. Exit code 2."""


class RunFailed(Exception):
    """A run that had started and failed. Exit code 1."""


class Diverged(RunFailed):
    """A run whose numbers stopped being finite: starting it again would end the same."""


class StepFailed(Exception):
    """An error of TensorFlow in a worker, as text: whoever reads an error of its own classes has to import it."""


class StorageFailed(RunFailed):
    """What could not be written (or read), why (the disk is full, read-only, gone), and half of the remedy."""


class StorageAway(StorageFailed):
    """An object store that could not be reached, or did not answer, for longer than it was waited for. It may be back
    at any time."""


class Damaged(RunFailed):
    """A checkpoint that is not what was written: its name, the file, and what is wrong with it."""


class NoGpu(RunFailed):
    """A process cannot use the GPU it was given, and neither could another process or a new start."""


def own_words(text: str) -> str | None:
    """The message of an error of this module within one of Ray, which passes some errors on as text only."""
    own = re.search(r"^unet\.errors\.(?!StepFailed|Damaged)\w+: (.+)$", text, re.MULTILINE)
    return own and own[1]


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or the name of its class."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
