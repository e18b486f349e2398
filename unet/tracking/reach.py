"""Which MLflow store is meant, and whether it answers."""

import socket
import urllib.error
import urllib.request
from urllib.parse import quote, urlsplit, urlunsplit

from unet.errors import InputError
from unet.paths import sqlite_uri
from unet.secrets import without_secrets
from unet.storage import Folder

DATABASE = "mlflow.db"
PORTS = {"postgresql": 5432, "mysql": 3306, "mssql": 1433}


def default_uri(storage: Folder) -> str:
    """The store under a storage path.

    Raises:
        InputError: there is none in an object store.
    """
    if not storage.is_local:
        raise InputError(f"{storage} is an object store, which cannot hold a database: give --tracking-uri.")
    return sqlite_uri(f"{storage.path}/{DATABASE}")


UI = "http://127.0.0.1:5000"
"""Where `mlflow ui` shows a database."""


def page(uri: str, experiment_id: str, run_id: str) -> str:
    """The address of a run in MLflow's UI, among what that has for trained models, not for prompts."""
    return f"{_ui(uri)}/#/experiments/{experiment_id}/runs/{run_id}?{WORKSPACE}"


def ranking(uri: str, experiment_id: str, by: str) -> str:
    """The address of charts of an experiment's runs, best first by a metric."""
    order = quote(f"metrics.`{by}`", safe="")
    return f"{_ui(uri)}/#/experiments/{experiment_id}/runs?{WORKSPACE}&compareRunsMode=CHART&orderByKey={order}"


WORKSPACE = "workflowType=machine_learning"


def _ui(uri: str) -> str:
    return without_secrets(uri).rstrip("/") if scheme(uri) in ("http", "https") else UI


def is_database(uri: str) -> bool:
    """Whether it is a database, not an MLflow server."""
    return scheme(uri) in ("sqlite", *PORTS)


def scheme(uri: str) -> str:
    """`postgresql` of `postgresql+psycopg2://…`."""
    return uri.partition("://")[0].partition("+")[0]


def check_server(uri: str | None) -> None:
    """Refuse a tracking server or database that does not answer.

    Raises:
        InputError: with what to do.
    """
    if uri is None:
        return
    kind = scheme(uri)
    try:
        if kind in ("http", "https"):
            parts = urlsplit(uri)
            bare = urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))
            urllib.request.urlopen(f"{bare.rstrip('/')}/health", timeout=5).close()
        elif kind in PORTS:
            from sqlalchemy import make_url

            url = make_url(uri)
            if url.host:
                socket.create_connection((url.host, url.port or PORTS[kind]), timeout=5).close()
    except urllib.error.HTTPError:
        pass  # it answers; whether it accepts us will show later
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", error)
        raise InputError(
            f"The tracking server {without_secrets(uri)} does not answer ({reason}): start it, correct "
            "--tracking-uri, or leave it out to track under the storage path."
        ) from error
