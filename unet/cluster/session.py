"""Connecting to Ray, quietly: to the cluster of a submitted job or a running one, else to a new local one."""

import contextlib
import logging
import os
import re
import secrets
import socket
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import psutil

from unet import environment
from unet.cluster import internals
from unet.errors import InputError
from unet.secrets import without_secrets

Result = TypeVar("Result")

ANSWER_SECONDS = 5
"""How long a cluster may take to answer at all."""
SOCKET_BYTES = 107 - len("/ray/session_2026-01-31_23-59-59_123456_1234567/sockets/dash_TaskEventsHead")
"""How long the path may be, in bytes, of the folder for Ray's sockets: theirs may have 107."""
SHORT_FOLDERS = ("/tmp", "/var/tmp", "/dev/shm")
UNFIT = f"cannot be written, or its path is longer than {SOCKET_BYTES} bytes, too long for Ray's sockets"


def cause_of(error: BaseException) -> BaseException:
    """The exception that was raised first, in a process of the cluster, behind the one that Ray raises here."""
    while cause := getattr(error, "cause", None) or error.__cause__:
        error = cause
    return error


def in_task(function: Callable[..., Result], *arguments: Any) -> Result:
    """What a function gives: in a task of Ray if it is connected, else here. So a driver loads no TensorFlow."""
    ray = sys.modules.get("ray")
    if ray and ray.is_initialized():
        return ray.get(ray.remote(num_cpus=0)(function).remote(*arguments))
    return function(*arguments)


@contextlib.contextmanager
def silenced(debug: bool = False) -> Iterator[None]:
    """Keep what native code writes to stderr off the terminal, as TensorFlow does while it loads."""
    if debug:
        yield
        return
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def _address() -> str | None:
    """The address for `ray.init`: None for Ray's own choice, or "local" where it would find none or wait for minutes.

    A cluster that was killed leaves a record of its address, by which Ray would look for it.

    Raises:
        InputError: RAY_ADDRESS is not an address for a job, or the cluster there does not answer.
    """
    given = os.environ.get("RAY_ADDRESS")
    if given and "://" in given:
        raise InputError(
            f"RAY_ADDRESS={without_secrets(given)} is an address for Ray clients, through which a job cannot share its "
            "data: submit the job (ray job submit --address http://HEAD:8265 -- python jobs/…), start it on a machine "
            "of the cluster with RAY_ADDRESS=HEAD:6379, or unset RAY_ADDRESS."
        )
    if given == "local":
        return given
    started = internals.recorded_address()
    if given == "auto" and not started:
        raise InputError(
            "RAY_ADDRESS=auto, but no Ray cluster runs here: start one (ray start --head), or unset RAY_ADDRESS."
        )
    known = started if given == "auto" else given or started
    match = re.fullmatch(r"(.+):(\d+)", known or "")
    if match is None and given:
        raise InputError(f"RAY_ADDRESS={given} is not an address: write HOST:PORT, or unset it.")
    if match is None:
        return "local"
    host, port = match.groups()
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=ANSWER_SECONDS).close()
    except (OSError, OverflowError, UnicodeError) as error:
        if given:
            raise InputError(f"The Ray cluster at {given} does not answer: start it, or unset RAY_ADDRESS.") from error
        return "local"
    if _is_foreign(port):
        if given:
            raise InputError(
                f"The Ray cluster at {known} is another user's, and its folder cannot be written: give "
                "RAY_ADDRESS=local, which starts one for this job alone."
            )
        return "local"
    return known if given == "auto" else None


def finds_cluster() -> bool:
    """Whether a job would run on a cluster that is there already, and not start one of its own.

    Raises:
        InputError: RAY_ADDRESS is not an address for a job, or the cluster there does not answer.
    """
    ray = sys.modules.get("ray")
    return bool(ray and ray.is_initialized()) or _address() != "local"


def _is_foreign(port: str) -> bool:
    """Whether the cluster with this port has a node here whose folder cannot be written: Ray would abort the job."""
    for process in psutil.process_iter(["cmdline"]):
        name, *arguments = process.info["cmdline"] or [""]
        given = dict(argument.partition("=")[::2] for argument in arguments)
        if name.endswith("/raylet") and given.get("--gcs-address", "").endswith(f":{port}"):
            events = f"{given.get('--session_dir', '')}/logs/events"
            return os.path.exists(events) and not os.access(events, os.W_OK | os.X_OK)
    return False


def _settle_temporary_folder() -> None:
    """Make sure that a Ray that starts here has a folder that it can write, with a path short enough for its sockets.

    Raises:
        InputError: there is none, or RAY_TMPDIR is not one.
    """
    if given := os.environ.get("RAY_TMPDIR"):
        if not _fits(given):
            raise InputError(f"RAY_TMPDIR={given} {UNFIT}: give another, or unset it.")
        return
    try:
        usual = tempfile.gettempdir()
    except OSError as error:
        raise InputError(f"{error.strerror}: set TMPDIR to a writable folder.") from error
    folder = next(filter(_fits, (usual, *SHORT_FOLDERS)), None)
    if folder is None:
        raise InputError(
            f"Ray cannot start: TMPDIR={usual} {UNFIT}, and so are {', '.join(SHORT_FOLDERS)}: set TMPDIR."
        )
    if folder != os.environ.get("TMPDIR", "/tmp"):
        os.environ["TMPDIR"] = folder  # for Ray's processes: Python makes sockets there too
        os.environ.setdefault("RAY_object_spilling_directory", usual)  # it may have been chosen for its size


def _settle_token() -> bool:
    """Keep the token of a Ray that starts here in the environment; whether there was none before.

    Ray would write one into the home directory, and then every `ray start` of the user asks for it.
    """
    if os.environ.get("RAY_AUTH_TOKEN") or os.environ.get("RAY_AUTH_TOKEN_PATH"):
        return False
    with contextlib.suppress(OSError, RuntimeError):  # there is no home directory, or no entry for this user
        if (Path.home() / ".ray" / "auth_token").exists():
            return False
    os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
    return True


def _fits(folder: str) -> bool:
    try:
        os.makedirs(folder, exist_ok=True)
    except OSError:
        return False
    return len(os.fsencode(folder)) <= SOCKET_BYTES and os.access(folder, os.W_OK | os.X_OK)


def _connect(debug: bool, dashboard: bool) -> bool:
    """Connect to a cluster, or start a Ray; whether that has a token of its own. Raises InputError."""
    import ray

    address, own_token = _address(), False
    if address == "local":
        _settle_temporary_folder()
        own_token = _settle_token()
    logging_level = logging.INFO if debug else logging.ERROR
    try:
        with internals.any_agent_port():
            ray.init(address, logging_level=logging_level, log_to_driver=debug, include_dashboard=dashboard)
    except Exception as error:  # whatever Ray raises where it cannot start
        reason = " ".join(str(error).split())[:400] or type(error).__name__
        if address == "local":
            raise InputError(f"Ray cannot start here: {reason.rstrip('.')}.") from error
        raise InputError(
            f"The Ray cluster cannot be used: {reason.rstrip('.')}. RAY_ADDRESS=local starts one for this job alone."
        ) from error
    return own_token


@contextlib.contextmanager
def ray_session(debug: bool = False, dashboard: bool = False) -> Iterator[None]:
    """A connected Ray for the duration of the block; one that was started here is stopped here.

    A Ray of this job's own has no dashboard unless it is asked for: ten fewer processes to start.
    """
    environment.pin()
    if not debug:
        warnings.filterwarnings("ignore", category=FutureWarning, module="ray")
    import ray

    started = not ray.is_initialized()
    own_token = started and _connect(debug, dashboard)
    import ray.data

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    if not debug:
        for name in ("ray.data", "ray.train"):
            logging.getLogger(name).setLevel(logging.ERROR)
        logging.getLogger("ray.tune").setLevel(logging.CRITICAL)  # a failed trial is reported in one line of ours
        internals.silence_deaths()
    try:
        yield
    finally:
        if started:
            ray.shutdown()
        if own_token:
            os.environ.pop("RAY_AUTH_TOKEN", None)
