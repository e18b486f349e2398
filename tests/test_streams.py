"""Words for the screen never end the work, whatever stdout and stderr are."""

import fcntl
import io
import os
import pty
import re
import subprocess
import sys
import termios
import time

import pytest
from conftest import ROOT

from unet import streams

WORK = """
import pathlib, sys
from unet import streams
streams.forgive()
from rich.table import Table
from unet.classes import Classes, ClassInfo
from unet.terminal import Display

display = Display()
classes = (ClassInfo("Straße", (0, 0, 0)), ClassInfo("other", (1, 1, 1)))
for step in range(40):
    display.working("scoring · words " * 9, step, 0)
    display.say("words " * 2000)
    display.epoch({"epoch": 1, "train/loss": 0.5, "speed/images_per_second": 3.0}, 9, classes)
table = Table()
table.add_row("–")
display.console.print(table)
display.say("accuracy 0.5 · loss – … → ✓")
display.close()
print("told", file=sys.stderr)
sys.stdout.flush()
pathlib.Path(sys.argv[1]).write_text("done")
"""


def start(tmp_path, redirection: str = "", env: dict | None = None, **options) -> subprocess.Popen:
    """Let a program say what a job says, and more than a pipe holds, then write `done`."""
    (tmp_path / "work.py").write_text(WORK, "utf-8")
    command = f'exec "$0" work.py done {redirection}'
    return subprocess.Popen(
        ["sh", "-c", command, sys.executable],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)} | (env or {}),
        **options,
    )


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("redirection", [">&-", "<&- >&- 2>&-", ">/dev/full 2>&1"])
def test_streams_that_take_nothing_end_no_work(redirection, unbuffered, tmp_path):
    done = start(tmp_path, redirection, {"PYTHONUNBUFFERED": unbuffered}, stdout=subprocess.DEVNULL)
    assert done.wait(60) == 0 and (tmp_path / "done").exists()


def test_a_reader_who_leaves_ends_no_work(tmp_path):
    done = start(tmp_path, "2>&1", stdout=subprocess.PIPE)
    done.stdout.readline()
    done.stdout.close()
    assert done.wait(60) == 0 and (tmp_path / "done").exists()


def test_a_full_pipe_that_does_not_block_is_waited_for(tmp_path):
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    done = start(tmp_path, stdout=writing)
    os.close(writing)
    waiting = None
    while not any(now := fcntl.ioctl(reading, termios.FIONREAD, bytes(4))) or now != waiting:
        waiting = now  # it grows until nothing more fits, which need not be the last byte: pages are not shared
        time.sleep(1)
    with os.fdopen(reading, "rb") as pipe:
        told = pipe.read().decode()
    assert done.wait(60) == 0 and (tmp_path / "done").exists()
    assert told.count("Straße") == 40 and told.endswith("→ ✓\n")


@pytest.mark.parametrize(
    "env",
    [{"PYTHONIOENCODING": "ascii"}, {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}],
)
def test_signs_that_the_encoding_lacks_are_told_in_others(env, tmp_path):
    done = start(tmp_path, "2>&1", env, stdout=subprocess.PIPE)
    told = done.communicate(timeout=60)[0].decode("ascii")
    assert done.returncode == 0 and (tmp_path / "done").exists()
    assert "Stra?e -  other -" in told and told.endswith("accuracy 0.5 - loss - ... -> ?\ntold\n")


def told_on_a_terminal(tmp_path, env: dict) -> str:
    ours, theirs = pty.openpty()
    done = start(tmp_path, env={"COLUMNS": "40"} | env, stdin=theirs, stdout=theirs, stderr=theirs)
    os.close(theirs)
    told = b""
    try:
        while part := os.read(ours, 65536):
            told += part
    except OSError:  # the program has ended
        pass
    os.close(ours)
    assert done.wait(60) == 0 and (tmp_path / "done").exists()
    return told.decode()


REDRAWN = re.compile(r"\x1b\[\d*[AK]|\x1b\[\?25l")


def test_lines_are_drawn_anew_on_terminals_that_can(tmp_path):
    assert REDRAWN.search(told_on_a_terminal(tmp_path, {"TERM": "xterm-256color"}))
    assert "\x1b" not in told_on_a_terminal(tmp_path, {"TERM": "dumb"})


def test_a_log_that_is_to_have_colours_is_no_terminal(tmp_path):
    done = start(tmp_path, "2>&1", {"FORCE_COLOR": "1", "TERM": "xterm"}, stdout=subprocess.PIPE)
    told = done.communicate(timeout=60)[0].decode()
    assert done.returncode == 0 and not REDRAWN.search(told)


def test_each_line_of_a_log_begins_with_the_time_once():
    told = io.StringIO()
    log = streams.timed(told)
    for text in ("epoch", " 1\n", "", "two\nlines", "\n\n", "end\n"):
        assert log.write(text) == len(text)
    times, lines = zip(*(line.split(" ", 1) for line in told.getvalue().splitlines()), strict=True)
    assert lines == ("epoch 1", "two", "lines", "", "end")
    assert all(re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", time) for time in times)
    assert log.isatty() is False
