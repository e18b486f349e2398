"""Output for the screen never stops the work: stdout and stderr that take whatever they are given.

A pipe whose reader left, a full disk under a log, a terminal that is gone, a stream that was closed, an encoding
without the characters that we print: none of them is a reason to stop.
"""

import codecs
import io
import os
import select
import sys
from datetime import UTC, datetime
from typing import Any, TextIO, cast

PLAIN = {
    **{"·": "-", "–": "-", "—": "-", "─": "-", "−": "-", "…": "...", "×": "x", "→": "->"},
    **{"“": '"', "”": '"', "’": "'", "\N{NO-BREAK SPACE}": " "},
}
"""What is printed for a character that the stream's encoding lacks; for others a question mark."""
ERRORS = "unet.plain"
"""The name by which streams take `PLAIN`."""


class _Forgiving(io.FileIO):
    """Bytes to an open descriptor; when it takes no more, the rest goes nowhere."""

    def write(self, data) -> int:
        data, done = memoryview(data).cast("B"), 0
        try:
            while done < len(data):
                written = super().write(data[done:])
                if written is None:  # somebody made it non-blocking, and it is full
                    select.select([], [self.fileno()], [])
                done += written or 0
        except OSError:
            _to_nowhere(self.fileno())
        return len(data)


def _plain(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    return "".join(PLAIN.get(letter, "?") for letter in error.object[error.start : error.end]), error.end


codecs.register_error(ERRORS, _plain)


def forgive() -> None:
    """Make stdout and stderr of this process forgiving, and open those of the standard streams that were closed.

    Otherwise whatever is opened next, such as a socket, would get the number of one, and what libraries write to it.
    """
    for number, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        stream = getattr(sys, name)
        if stream is None:
            _to_nowhere(number)
            stream = open(number, mode, encoding="utf-8", closefd=False)  # noqa: SIM115
            setattr(sys, name, stream)
        if mode == "w" and type(stream) is io.TextIOWrapper and stream.errors != ERRORS:  # not one that captures output
            setattr(sys, name, _forgiving(stream))


class _Timed:
    """A stream whose lines begin with the time, in UTC."""

    def __init__(self, stream: TextIO):
        self._stream, self._in_line = stream, False

    def write(self, text: str) -> int:
        if text:
            now, whole = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ "), text.endswith("\n")
            lines = text.removesuffix("\n").replace("\n", f"\n{now}")
            # At once, since others write there too.
            self._stream.write(("" if self._in_line else now) + lines + "\n" * whole)
            self._in_line = not whole
        return len(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def timed(stream: TextIO) -> TextIO:
    """The stream, with the time (UTC, to the second) before each line."""
    return cast(TextIO, _Timed(stream))


def _to_nowhere(number: int) -> None:
    nowhere = os.open(os.devnull, os.O_RDWR)
    if nowhere != number:
        os.dup2(nowhere, number)
        os.close(nowhere)


def _forgiving(stream: io.TextIOWrapper) -> io.TextIOWrapper:
    raw = _Forgiving(stream.fileno(), "w", closefd=False)
    at_once = stream.write_through  # PYTHONUNBUFFERED
    kept = raw if at_once else io.BufferedWriter(raw)
    return io.TextIOWrapper(kept, stream.encoding, ERRORS, line_buffering=stream.line_buffering, write_through=at_once)
