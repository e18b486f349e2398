"""Loading MLflow in a process."""

import logging
import os
from types import ModuleType


def load_mlflow() -> ModuleType:
    """MLflow's package, set to wait for a bounded time and to keep quiet."""
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # no usage reports to its makers
    os.environ.setdefault("GIT_PYTHON_REFRESH", "quiet")
    import mlflow

    # It prints every failed use of a database, with its stack.
    logging.getLogger("mlflow").setLevel(logging.CRITICAL)
    logging.getLogger("alembic").setLevel(logging.ERROR)
    return mlflow
