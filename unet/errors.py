"""Errors that are sentences for a person. `unet.commands.cli` prints them without a traceback."""

import re


class InputError(Exception):
    """Settings, data or a place that cannot work, found before anything started. Exit code 2."""


class RunFailed(Exception):
    """A run that had started and failed. Exit code 1."""


class Diverged(RunFailed):
    """A run whose numbers stopped being finite: starting it again would end the same."""


class StepFailed(Exception):
    """What TensorFlow raised in a worker, in words: its own errors would make who reads them import it."""


class StorageFailed(RunFailed):
    """What could not be written (or read), why, and the first half of the remedy: the disk is full, read-only, away."""


class Damaged(RunFailed):
    """A checkpoint that is not what was written: its name, the file and what is wrong with it."""


class NoGpu(RunFailed):
    """A process that was given a GPU cannot use it: no other process, nor the same once more, could."""


def own_words(text: str) -> str | None:
    """What an error of this module says in the words of Ray, which gives on some of what was raised as text only."""
    own = re.search(r"^unet\.errors\.(?!StepFailed|Damaged)\w+: (.+)$", text, re.MULTILINE)
    return own and own[1]


def first_line(error: BaseException) -> str:
    """The first line of what an error says, or its name."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
