"""A real tracking server as a child, that is frozen and killed, and a line to it that loses an answer.

Over sqlite; or over PostgreSQL with basic auth, as a team has it (`TeamServer`).
"""

import base64
import http.client
import http.server
import itertools
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from conftest import free_ports


class Server:
    """MLflow's server over sqlite in a folder, always on the same port."""

    def __init__(self, folder: Path):
        self.folder, self.database, self.port = folder, folder / "mlflow.db", free_ports()[0]
        self.uri = f"http://127.0.0.1:{self.port}"

    def command(self) -> list[str]:
        """What `mlflow server` starts, without its second process."""
        return [sys.executable, "-m", "uvicorn", "mlflow.server.fastapi_app:app", "--host", "127.0.0.1"]

    def settings(self) -> dict[str, str]:
        """What `mlflow server` tells its processes."""
        return {
            "_MLFLOW_SERVER_FILE_STORE": f"sqlite:///{self.database}",
            "_MLFLOW_SERVER_ARTIFACT_DESTINATION": str(self.folder / "artifacts"),
            "_MLFLOW_SERVER_ARTIFACT_ROOT": "mlflow-artifacts:/",
            "_MLFLOW_SERVER_SERVE_ARTIFACTS": "true",
            "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        }

    def headers(self) -> dict[str, str]:
        return {}

    def start(self) -> None:
        silent: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "start_new_session": True}
        self.process = self.popen([*self.command(), "--port", str(self.port)], **silent)
        first = f"{self.uri}/api/2.0/mlflow/experiments/get?experiment_id=0"  # it makes the database
        while not self.answers(first):
            assert self.process.poll() is None, "the server has ended"
            time.sleep(0.1)

    def popen(self, command: list[str], **options) -> subprocess.Popen:
        return subprocess.Popen(command, env=os.environ | self.settings(), **options)

    def answers(self, url: str) -> bool:
        try:
            urllib.request.urlopen(urllib.request.Request(url, headers=self.headers()), timeout=60).close()
            return True
        except OSError:
            return False

    def freeze(self) -> None:
        """It accepts, and never answers."""
        os.killpg(self.process.pid, signal.SIGSTOP)

    def thaw(self) -> None:
        os.killpg(self.process.pid, signal.SIGCONT)

    def kill(self) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()

    def rows(self, query: str, *values) -> list[tuple]:
        """What is in its database, without the server."""
        connection = sqlite3.connect(f"file:{self.database}?mode=ro", uri=True, timeout=60)
        try:
            return connection.execute(query, values).fetchall()
        finally:
            connection.close()


class Postgres:
    """Debian's PostgreSQL as a child of this process, as a user of its own: it refuses to run as root."""

    def __init__(self):
        (self.programs,) = sorted(Path("/usr/lib/postgresql").glob("*/bin"))[-1:]
        self.top, self.port = Path(tempfile.mkdtemp(prefix="postgres-")), free_ports()[0]
        self.folder, word = self.top / "data", self.top / "word"
        word.write_text("word")
        shutil.chown(self.top, "postgres")
        files = ["-D", self.folder, "-U", "me", "-A", "scram-sha-256", f"--pwfile={word}"]
        subprocess.run([*self._as_postgres("initdb"), *files, "--no-sync"], check=True, stdout=subprocess.DEVNULL)

    def _as_postgres(self, program: str) -> list:
        return ["setpriv", "--reuid=postgres", "--regid=postgres", "--clear-groups", self.programs / program]

    def start(self) -> None:
        options = ["-c", "listen_addresses=127.0.0.1", "-c", "unix_socket_directories=", "-c", "fsync=off"]
        self.process = subprocess.Popen(
            [*self._as_postgres("postgres"), "-D", self.folder, "-p", str(self.port), *options],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        while not self._answers():
            assert self.process.poll() is None, "PostgreSQL has ended"
            time.sleep(0.1)

    def _answers(self) -> bool:
        import psycopg2

        try:
            psycopg2.connect(self.uri("postgres", "postgresql")).close()
            return True
        except psycopg2.OperationalError:
            return False

    def stop(self) -> None:
        """At once: clients lose their connections."""
        self.process.send_signal(signal.SIGQUIT)
        self.process.wait()

    def remove(self) -> None:
        self.stop()
        shutil.rmtree(self.top)

    def uri(self, database: str, scheme: str = "postgresql+psycopg2") -> str:
        return f"{scheme}://me:word@127.0.0.1:{self.port}/{database}"

    def rows(self, database: str, query: str, *values) -> list[tuple]:
        import psycopg2

        connection = psycopg2.connect(self.uri(database, "postgresql"))
        connection.autocommit = True  # a database is made outside of transactions
        try:
            with connection.cursor() as cursor:
                cursor.execute(query.replace("?", "%s"), values)
                return cursor.fetchall() if cursor.description else []
        finally:
            connection.close()


class TeamServer(Server):
    """The same over PostgreSQL and with basic auth, whose user is admin with the password `PASSWORD`."""

    PASSWORD = "a word of twelve"

    def __init__(self, folder: Path):
        super().__init__(folder)
        self.postgres = Postgres()
        self.postgres.start()
        for database in ("runs", "users"):
            self.postgres.rows("postgres", f"create database {database}")
        (folder / "auth.ini").write_text(
            "[mlflow]\ndefault_permission = READ\nadmin_username = admin\n"
            f"admin_password = {self.PASSWORD}\ndatabase_uri = {self.postgres.uri('users')}\n"
            "authorization_function = mlflow.server.auth:authenticate_request_basic_auth\n"
        )

    def command(self) -> list[str]:
        command = [sys.executable, "-m", "mlflow", "server", "--app-name", "basic-auth", "--host", "127.0.0.1"]
        places = ["--backend-store-uri", self.postgres.uri("runs")]
        places += ["--serve-artifacts", "--artifacts-destination", str(self.folder / "artifacts")]
        return [*command, *places, "--workers", "1"]

    def settings(self) -> dict[str, str]:
        return {
            "MLFLOW_AUTH_CONFIG_PATH": str(self.folder / "auth.ini"),
            "MLFLOW_FLASK_SERVER_SECRET_KEY": "any",
            "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        }

    def headers(self) -> dict[str, str]:
        return {"Authorization": "Basic " + base64.b64encode(f"admin:{self.PASSWORD}".encode()).decode()}

    def rows(self, query: str, *values) -> list[tuple]:
        return self.postgres.rows("runs", query, *values)


class Line:
    """Hands requests on to a server; the first answer to a POST of each path in `lose` never arrives.

    Attributes:
        lost: those that did not.
        slow: seconds that pass before a file is answered to.
        broken: asked at each request that may change something, with its number from 1: "before" or "after" the server
            takes it the connection ends; None: it does not.
    """

    def __init__(
        self,
        server: Server,
        lose: Sequence[str] = (),
        slow: float = 0,
        broken: Callable[[int], str | None] = lambda number: None,
    ):
        line, numbers = self, itertools.count(1)
        lose, self.lost = list(lose), []

        class Handler(http.server.BaseHTTPRequestHandler):
            def do(self):
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                end = broken(next(numbers)) if self.command != "GET" else None
                self.close_connection = end is not None
                if end == "before":
                    return
                connection = http.client.HTTPConnection("127.0.0.1", server.port)
                connection.request(self.command, self.path, body, dict(self.headers))
                answer = connection.getresponse()
                content = answer.read()
                connection.close()
                if end == "after":
                    return
                if self.command == "PUT":
                    time.sleep(slow)
                if hit := [path for path in lose if self.command == "POST" and self.path.endswith(path)]:
                    lose.remove(hit[0])
                    line.lost.append(hit[0])
                    self.close_connection = True
                    return
                self.send_response(answer.status)
                self.send_header("Content-Type", answer.getheader("Content-Type", "application/json"))
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = do

            def log_message(self, *args):
                pass

        self._http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.uri = f"http://127.0.0.1:{self._http.server_port}"
        threading.Thread(target=self._http.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._http.shutdown()
        self._http.server_close()
