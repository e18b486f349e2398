"""A trial that hangs ends its process; one that works, or waits for its next epoch, does not."""

import subprocess
import sys

import pytest

from unet.tuning.watch import HUNG

SCRIPT = """
import sys, time
from unet.tuning import watch
watch.LOOK_SECONDS = 0.05
one = watch.Watch(0.5)
time.sleep(0.8)  # nobody works yet
with one.working():
    for _ in range(4):
        time.sleep(0.2)
        if sys.argv[1] == "steps":
            one.moved()
time.sleep(0.8)
"""


@pytest.mark.parametrize(("kind", "code"), [("steps", 0), ("hangs", HUNG)])
def test_only_work_without_an_end_ends_the_process(kind, code):
    assert subprocess.run([sys.executable, "-c", SCRIPT, kind]).returncode == code
