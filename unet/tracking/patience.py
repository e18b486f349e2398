"""How long a server may take to accept a file: it may store it elsewhere before it answers."""

import contextlib
import threading
from collections.abc import Iterator

LEAST_SECONDS, SECONDS_PER_MB = 60, 4

_TURN = threading.RLock()


@contextlib.contextmanager
def patient(size: int = 2**27) -> Iterator[float]:
    """Raise the time limit of MLflow's requests for files of `size` bytes; yields the limit in seconds.

    MLflow has one limit for all requests, in the environment, so one thread at a time sends files.
    """
    from mlflow.environment_variables import MLFLOW_HTTP_REQUEST_TIMEOUT as LIMIT

    with _TURN:
        usual = LIMIT.get()
        LIMIT.set(max(usual, LEAST_SECONDS + SECONDS_PER_MB * size // 2**20))
        try:
            yield LIMIT.get()
        finally:
            LIMIT.set(usual)
