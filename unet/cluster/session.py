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
from pathlib import Path

import psutil

from unet import environment
from unet.cluster import internals
from unet.errors import InputError
from unet.secrets import without_secrets

ANSWER_SECONDS = 5
"""How long a cluster may take to answer at all."""
SOCKET_BYTES = 107 - len("/ray/session_2026-01-31_23-59-59_123456_1234567/sockets/dash_TaskEventsHead")
"""How long the folder may be, in bytes, under which Ray makes its sockets: their paths end at 107."""
SHORT_FOLDERS = ("/tmp", "/var/tmp", "/dev/shm")
UNFIT = f"cannot be written, or is longer than {SOCKET_BYTES} bytes, after which there is no room for Ray's sockets"


def cause_of(error: BaseException) -> BaseException:
    """What was raised first, in a process of the cluster, of what Ray raises here."""
    while cause := getattr(error, "cause", None) or error.__cause__:
        error = cause
    return error


@contextlib.contextmanager
def silenced(debug: bool = False):
    """Nothing that libraries write to stderr past Python reaches the terminal, as TensorFlow does while it loads."""
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
    """What `ray.init` is to connect to: as Ray decides (None), or "local" where it finds none or waits for minutes.

    A cluster that was killed leaves word of itself, by which Ray looks for it.

    Raises:
        InputError: RAY_ADDRESS is no address for a job, or the cluster there does not answer.
    """
    given = os.environ.get("RAY_ADDRESS")
    if given and "://" in given:
        raise InputError(
            f"RAY_ADDRESS={without_secrets(given)} is an address for Ray's clients, through which a job cannot share "
            "its data: submit it (ray job submit --address http://HEAD:8265 -- python jobs/…), or start it on a "
            "machine of the cluster with RAY_ADDRESS=HEAD:6379, or unset RAY_ADDRESS."
        )
    if given == "local":
        return given
    started = internals.recorded_address()
    if given == "auto" and not started:
        raise InputError("RAY_ADDRESS=auto, but no Ray cluster runs here: start it (ray start --head), or unset it.")
    known = started if given == "auto" else given or started
    place = re.fullmatch(r"(.+):(\d+)", known or "")
    if place is None and given:
        raise InputError(f"RAY_ADDRESS={given} is not an address: write HOST:PORT, or unset it.")
    if place is None:
        return "local"
    try:
        socket.create_connection((place[1].strip("[]"), int(place[2])), timeout=ANSWER_SECONDS).close()
    except (OSError, OverflowError, UnicodeError) as error:
        if given:
            raise InputError(f"The Ray cluster at {given} does not answer: start it, or unset RAY_ADDRESS.") from error
        return "local"
    if _is_foreign(place[2]):
        if given:
            raise InputError(
                f"The Ray cluster at {known} is another user's, and its folder cannot be written: RAY_ADDRESS=local "
                "starts one for this job alone."
            )
        return "local"
    return known if given == "auto" else None


def _is_foreign(port: str) -> bool:
    """Whether the cluster with this port has a node on this machine whose folder is shut: Ray would abort the job."""
    for process in psutil.process_iter(["cmdline"]):
        name, *arguments = process.info["cmdline"] or [""]
        given = dict(argument.partition("=")[::2] for argument in arguments)
        if name.endswith("/raylet") and given.get("--gcs-address", "").endswith(f":{port}"):
            events = f"{given.get('--session_dir', '')}/logs/events"
            return os.path.exists(events) and not os.access(events, os.W_OK | os.X_OK)
    return False


def _settle_temporary_folder() -> None:
    """A Ray that starts here gets a folder that it can write, with a path that leaves room for its sockets'.

    Raises:
        InputError: there is none, or RAY_TMPDIR is another.
    """
    if given := os.environ.get("RAY_TMPDIR"):
        if not _fits(given):
            raise InputError(f"RAY_TMPDIR={given} {UNFIT}: give another, or unset it.")
        return
    try:
        usual = tempfile.gettempdir()
    except OSError as error:
        raise InputError(f"{error.strerror}: set TMPDIR to a folder that can be written.") from error
    folder = next(filter(_fits, (usual, *SHORT_FOLDERS)), None)
    if folder is None:
        raise InputError(
            f"Ray cannot start: TMPDIR={usual} {UNFIT}, and so are {', '.join(SHORT_FOLDERS)}: set TMPDIR."
        )
    if folder != os.environ.get("TMPDIR", "/tmp"):
        os.environ["TMPDIR"] = folder  # of Ray's processes: Python makes sockets there as well
        os.environ.setdefault("RAY_object_spilling_directory", usual)  # it may be there because of its size


def _settle_token() -> None:
    """A Ray that starts here keeps its token in the environment where the home directory cannot hold it."""
    if os.environ.get("RAY_AUTH_TOKEN") or os.environ.get("RAY_AUTH_TOKEN_PATH"):
        return
    try:
        place = Path.home() / ".ray"
        place.mkdir(exist_ok=True)
        if (place / "auth_token").exists() or os.access(place, os.W_OK | os.X_OK):
            return
    except (OSError, RuntimeError):  # there is no such directory, or no entry of this user
        pass
    os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)


def _fits(folder: str) -> bool:
    try:
        os.makedirs(folder, exist_ok=True)
    except OSError:
        return False
    return len(os.fsencode(folder)) <= SOCKET_BYTES and os.access(folder, os.W_OK | os.X_OK)


def _connect(debug: bool, dashboard: bool) -> None:
    import ray

    address = _address()
    if address == "local":
        _settle_temporary_folder()
        _settle_token()
    logging_level = logging.INFO if debug else logging.ERROR
    try:
        with internals.any_agent_port():
            ray.init(address, logging_level=logging_level, log_to_driver=debug, include_dashboard=dashboard)
    except Exception as error:  # whatever Ray makes of a place where it cannot be
        reason = " ".join(str(error).split())[:400] or type(error).__name__
        if address == "local":
            raise InputError(f"Ray cannot start here: {reason.rstrip('.')}.") from error
        raise InputError(
            f"The Ray cluster cannot be used: {reason.rstrip('.')}. RAY_ADDRESS=local starts one for this job alone."
        ) from error


@contextlib.contextmanager
def ray_session(debug: bool = False, dashboard: bool = False):
    """A connected Ray for the time of the block; what was started here is ended here.

    A Ray of this job's own comes without a dashboard, unless it is asked for: ten processes less to start.
    """
    environment.pin()
    if not debug:
        warnings.filterwarnings("ignore", category=FutureWarning, module="ray")
    import ray

    started = not ray.is_initialized()
    if started:
        _connect(debug, dashboard)
    import ray.data

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    if not debug:
        for name in ("ray.data", "ray.train"):
            logging.getLogger(name).setLevel(logging.ERROR)
        logging.getLogger("ray.tune").setLevel(logging.CRITICAL)  # a failed trial is one line of ours
        internals.silence_deaths()
    try:
        yield
    finally:
        if started:
            ray.shutdown()
