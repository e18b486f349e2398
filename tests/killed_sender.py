"""Sends a run to MLflow in a process that is killed at a request, again and again until none is left.

`python tests/killed_sender.py FOLDER PORT before|after` prints how many requests there were that may change something,
and leaves each of them as the last one of a sender once, the server having taken it or not.
"""

import os
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

from conftest import ROOT, tiny_settings
from mlflow_server import Line

from unet.runs.run import Run
from unet.storage import Folder
from unet.terminal import Display
from unet.tracking.library import load_mlflow
from unet.tracking.send import send_later


def send_all(folder: Path, uri: str) -> None:
    settings = tiny_settings(folder.parent, ROOT, tracking_uri=uri)
    run = Run.load(folder.name, settings)
    Folder(folder)  # opened before anything is sent
    send_later(run, Display(quiet=True))


def main(folder: Path, port: int, when: str) -> None:
    load_mlflow()  # once for all: they are forked
    number = 0
    while True:
        number += 1
        ready, go = os.pipe()
        sender = os.fork()
        if sender == 0:
            os.close(go)
            uri = os.read(ready, 100).decode()
            send_all(folder, uri)
            os._exit(0)

        def broken(which: int, at: int = number, sender: int = sender) -> str | None:
            if which < at:
                return None
            os.kill(sender, signal.SIGKILL)
            return when

        line = Line(SimpleNamespace(port=port), broken=broken)
        os.close(ready)
        os.write(go, line.uri.encode())
        os.close(go)
        _, status = os.waitpid(sender, 0)
        line.close()
        if not os.WIFSIGNALED(status):
            print(number - 1)
            sys.exit(os.waitstatus_to_exitcode(status))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
