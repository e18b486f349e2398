"""The start of MLflow in a process."""

import logging
import os


def load_mlflow():
    """MLflow's package, told to be patient for a bounded time and to keep quiet."""
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # nothing of a job goes where nobody sent it
    os.environ.setdefault("GIT_PYTHON_REFRESH", "quiet")
    import mlflow

    # It prints every failed use of a database, with its stack.
    logging.getLogger("mlflow").setLevel(logging.CRITICAL)
    logging.getLogger("alembic").setLevel(logging.ERROR)
    return mlflow
