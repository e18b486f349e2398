"""Emulators of Google's and of Azure's object store on loopback, each a process that a test may kill and start again.

As a program: Google's. It answers one request after another, and waits for whoever does not read its answer, as a
client does that has opened an object and reads elsewhere in it: so a line takes its answers.
"""

import base64
import hmac
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path
from typing import ClassVar

BUCKET = "pets"
ACCOUNT = "devstoreaccount1"
KEY = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="
"""Public: every Azurite has this account with this key."""


class Emulator:
    """A server; `place` is its host and port, `keys` what the environment of its clients holds."""

    keys: ClassVar[dict[str, str]] = {}

    def __init__(self, folder: Path):
        from conftest import free_ports

        self.folder, (self.port, self.inner) = folder, free_ports(2)
        self.place = f"127.0.0.1:{self.port}"

    def start(self) -> None:
        with open(self.folder / "log", "ab") as log:
            self._process = subprocess.Popen(self.command(), stdout=log, stderr=log)
        while not self._answers():
            assert self._process.poll() is None, (self.folder / "log").read_text()[-2000:]
            time.sleep(0.2)

    def _answers(self) -> bool:
        try:
            urllib.request.urlopen(f"http://{self.place}", timeout=10).close()
        except urllib.error.HTTPError:
            pass
        except OSError:
            return False
        return True

    def stop(self) -> None:
        self._process.send_signal(signal.SIGTERM)  # Azurite writes what it has only then, or seconds later
        self._process.wait(30)

    def command(self) -> list[str]:
        raise NotImplementedError

    def uri(self, path: str, bucket: str = BUCKET, place: str | None = None) -> str:
        raise NotImplementedError


class Google(Emulator):
    """gcp-storage-emulator. It has no keys: whoever asks is let in."""

    @staticmethod
    def missing() -> str | None:
        if importlib.util.find_spec("gcp_storage_emulator") is None:
            return "gcp-storage-emulator is not installed (`make test-cluster` installs it)"
        return None

    def command(self) -> list[str]:
        return [sys.executable, __file__, str(self.folder), str(self.inner), str(self.port)]

    def uri(self, path: str, bucket: str = BUCKET, place: str | None = None) -> str:
        return f"gs://anonymous@{bucket}/{path}?scheme=http&endpoint_override={place or self.place}"


class Azure(Emulator):
    """Azurite. Arrow 25's client is newer than the newest version of Azure's protocol that it knows."""

    keys: ClassVar = {"AZURE_STORAGE_KEY": KEY}

    @staticmethod
    def program() -> str | None:
        return shutil.which("azurite-blob", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")

    @staticmethod
    def missing() -> str | None:
        if Azure.program() is None or shutil.which("node") is None:
            return "azurite is not installed (`make test-cluster` installs it where there is npm)"
        return None

    def command(self) -> list[str]:
        flags = ["--blobHost", "127.0.0.1", "--blobPort", str(self.port), "--location", str(self.folder)]
        return [str(self.program()), *flags, "--silent", "--disableTelemetry", "--skipApiVersionCheck"]

    def start(self) -> None:
        import pyarrow.fs as pafs

        super().start()
        places = dict.fromkeys(("blob_storage_authority", "dfs_storage_authority"), self.place)
        schemes = dict.fromkeys(("blob_storage_scheme", "dfs_storage_scheme"), "http")
        pafs.AzureFileSystem(ACCOUNT, account_key=KEY, **places, **schemes).create_dir(BUCKET)

    def uri(self, path: str, bucket: str = BUCKET, place: str | None = None) -> str:
        return f"abfs://{ACCOUNT}@{place or self.place}/{bucket}/{path}?enable_tls=false"


def token() -> str:
    """What lets its bearer do everything in the account's containers."""
    said = {"sv": "2020-08-04", "ss": "b", "srt": "sco", "sp": "rwdlac", "se": "2100-01-01T00:00:00Z"}
    signed = "\n".join([ACCOUNT, *(said[name] for name in ("sp", "ss", "srt")), "", said["se"], "", "", said["sv"], ""])
    digest = hmac.digest(base64.b64decode(KEY), signed.encode(), "sha256")
    return urllib.parse.urlencode(said | {"sig": base64.b64encode(digest).decode()})


EMULATORS = {"gs": Google, "abfs": Azure}


def main(folder: str, inner: int, port: int) -> None:
    from faulty_line import Line
    from gcp_storage_emulator.server import create_server

    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
    create_server("127.0.0.1", inner, data_dir=folder, default_bucket=BUCKET).start()
    Line(f"127.0.0.1:{inner}", port)
    threading.Event().wait()


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))
