"""Connecting to Ray, quietly: to the cluster of a submitted job or a running one, else to a new local one."""

import contextlib
import functools
import logging
import os
import re
import socket
import sys
import warnings

from unet.errors import InputError

POLL_SECONDS = "0.5"
ANSWER_SECONDS = 5
"""How long a cluster may take to answer at all."""


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
    """What `ray.init` is to connect to: as Ray decides (None), or "local" where it would wait for minutes.

    A cluster that was killed leaves word of itself, by which Ray looks for it.

    Raises:
        InputError: the cluster of RAY_ADDRESS does not answer.
    """
    from ray._private.utils import read_ray_address

    given = os.environ.get("RAY_ADDRESS")
    place = re.fullmatch(r"([^:/]+):(\d+)", given or read_ray_address() or "")
    if place is None:
        return None
    try:
        socket.create_connection((place[1], int(place[2])), timeout=ANSWER_SECONDS).close()
    except OSError as error:
        if given:
            raise InputError(f"The Ray cluster at {given} does not answer: start it, or unset RAY_ADDRESS.") from error
        return "local"
    return None


@contextlib.contextmanager
def _any_agent_port():
    """A Ray that starts here has its node's agent listen on a free port.

    Ray has a fixed one, which `ray.init` cannot change. Where another Ray of the machine has it, or the agents of one
    whose driver was killed, which live a minute longer, every start would wait for it for more than three seconds.
    """
    from ray._private import parameter

    known = parameter.RayParams
    parameter.RayParams = functools.partial(known, dashboard_agent_listen_port=0)
    try:
        yield
    finally:
        parameter.RayParams = known


@contextlib.contextmanager
def ray_session(debug: bool = False, dashboard: bool = False):
    """A connected Ray for the time of the block; what was started here is ended here.

    A Ray of this job's own comes without a dashboard, unless it is asked for: ten processes less to start.
    """
    # How often the controller of Ray Train looks at its workers; its 2 s would delay every report and the end.
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", POLL_SECONDS)
    # The supervisor does it, and another process for each group of workers would only make their start longer.
    os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
    os.environ.setdefault("RAY_TRAIN_ENABLE_PRINT_PATCH", "0")
    os.environ.setdefault("RAY_CHDIR_TO_TRIAL_DIR", "0")
    # A Ray that starts here keeps word of so many calls, else of 100,000, for a dashboard that it does not have.
    os.environ.setdefault("RAY_task_events_max_num_task_in_gcs", "1000")
    # It would end idle processes after a second where there are more than CPUs, and those of networks count: the tasks
    # that read and write would start new ones again and again, each of which leaves the GCS a handle.
    os.environ.setdefault("RAY_idle_worker_killing_time_threshold_ms", "60000")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    if not debug:
        warnings.filterwarnings("ignore", category=FutureWarning, module="ray")
    import ray

    started = not ray.is_initialized()
    if started:
        try:
            logging_level = "INFO" if debug else "ERROR"
            with _any_agent_port():
                ray.init(_address(), logging_level=logging_level, log_to_driver=debug, include_dashboard=dashboard)
        except ConnectionError as error:
            raise InputError(f"Cannot reach the Ray cluster: {error}. Start it, or unset RAY_ADDRESS.") from error
    import ray.data

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    if not debug:
        for name in ("ray.data", "ray.train"):
            logging.getLogger(name).setLevel(logging.ERROR)
        logging.getLogger("ray.tune").setLevel(logging.CRITICAL)  # a failed trial is one line of ours
        # Ray prints a paragraph about each process that died; it has no setting for that, and ours is a line.
        ray._private.worker.print_to_stdstream = lambda data, ignore_prefix: None
    try:
        yield
    finally:
        if started:
            ray.shutdown()
