"""What the environment in which a job is started may decide, and what it may not: one table, with the reasons.

Libraries obey variables and files in the home directory that were meant for other programs. What would change the
numbers of a run, or where they are delivered, is pinned in every process of a job, whatever the shell says. The rest
is the user's: credentials, certificates, proxies, how much of the processor may be used, `RAY_ADDRESS`. In somebody
else's program (`unet.load`) nothing is changed: there the network is built so that it is right, or refused.

Why: docs/decisions.md#the-environment-is-pinned-not-read
"""

import os
import sys
import warnings

from unet.errors import InputError, first_line

PINNED = {
    # The networks are TensorFlow's, whatever other projects of this user compute with.
    "KERAS_BACKEND": "tensorflow",
    # No keras.json: another floatx, epsilon or image format trains another network, or fails.
    "KERAS_HOME": os.devnull,
    # With it everything that touches `tf.keras`, as MLflow does when it packages the model, asks for another package.
    "TF_USE_LEGACY_KERAS": "0",
    # XLA sums in another order, and on CPUs takes 13 times as long.
    "TF_XLA_FLAGS": "",
    "TF_FUNCTION_JIT_COMPILE_DEFAULT": "0",
    # Where a run is tracked is a setting that the run keeps: the next start would track it elsewhere.
    "MLFLOW_TRACKING_URI": None,
    "MLFLOW_EXPERIMENT_NAME": None,
    "MLFLOW_EXPERIMENT_ID": None,
    "MLFLOW_RUN_ID": None,
    # The registry is that of the store: a model version refers to its run.
    "MLFLOW_REGISTRY_URI": None,
    # A database under the storage path has no workspaces; with them every job would be asked for one.
    "MLFLOW_ENABLE_WORKSPACES": "false",
    # A metric counts as delivered when the store has it, not when it is promised.
    "MLFLOW_ENABLE_ASYNC_LOGGING": "false",
    # Long values of settings are cut, as MLflow does by default, not refused.
    "MLFLOW_TRUNCATE_LONG_VALUES": "true",
    # Packaging a model asks no package index.
    "MLFLOW_LOCK_MODEL_DEPENDENCIES": "false",
    # Pictures need no display, no notebook, no LaTeX.
    "MPLBACKEND": "agg",
    "MATPLOTLIBRC": os.devnull,
    # A library's warning is not an error of the job.
    "PYTHONWARNINGS": None,
    # The first version of Ray Train lacks what the supervisor talks to.
    "RAY_TRAIN_V2_ENABLED": "1",
    # The supervisor does this; a process more for each group of workers would only slow their start.
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    # Otherwise what a worker prints appears twice.
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    # In trials too, relative paths start where the job was started.
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    # Ctrl-C is our stop signal, not Tune's, which would end the sweep as if it were finished.
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
    # The ledger writes what a sweep leaves behind, and the board shows it.
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "RAY_AIR_NEW_OUTPUT": "0",
}
"""The values in a job's processes; None: not set."""

FLAGS = {"MLFLOW_TRACKING_URI": "--tracking-uri", "MLFLOW_EXPERIMENT_NAME": "--experiment"}
"""The settings that take the place of variables."""

CHOSEN = {
    "TF_CPP_MIN_LOG_LEVEL": "2",
    # How often the controller of Ray Train looks at its workers; its 2 s would delay every report and the end.
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    # How many calls a Ray started here remembers, by default 100,000, for a dashboard that it does not have.
    "RAY_task_events_max_num_task_in_gcs": "1000",
    # If there are more processes than CPUs, Ray would end idle ones after a second, and processes with networks count:
    # the tasks that read and write would start new ones again and again, each of which leaves a handle in the GCS.
    "RAY_idle_worker_killing_time_threshold_ms": "60000",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}
"""Values for variables that the user has not set."""

LOOPBACK = ("localhost", "127.0.0.1", "::1")
PROXIES = ("http_proxy", "https_proxy", "all_proxy")


def pin() -> list[str]:
    """Set the environment of a job's process, and so of those that it starts, to what the job needs.

    Call it before TensorFlow, Keras, Ray or MLflow is imported: they read the environment then.

    Returns:
        Variables that were set to something else, in words.
    """
    overruled = [
        name + (f" (give {FLAGS[name]})" if name in FLAGS else "")
        for name, value in PINNED.items()
        if os.environ.get(name) not in (None, value)
    ]
    for name, value in PINNED.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
    for name, value in CHOSEN.items():
        os.environ.setdefault(name, value)
    if os.path.expanduser("~") == "~":  # neither HOME nor a user entry, and libraries ask for it when they load
        os.environ["HOME"] = "/nonexistent"
    if any(os.environ.get(name) or os.environ.get(name.upper()) for name in PROXIES):
        _spare_loopback()
    if sys.warnoptions:  # -W and PYTHONWARNINGS
        warnings.resetwarnings()
        warnings.simplefilter("ignore")
    return overruled


def is_submitted() -> bool:
    """Whether Ray started this process as a job, by `ray job submit` or its like."""
    return "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ  # of Ray's variables the only one that no other driver has


def _spare_loopback() -> None:
    """Use no proxy for this machine itself, where a tracking server, a dashboard or a cluster may run."""
    spared = (os.environ.get("no_proxy") or os.environ.get("NO_PROXY") or "").split(",")
    if "*" not in spared:
        spared = [host for host in (*spared, *LOOPBACK) if host.strip()]
        os.environ["no_proxy"] = os.environ["NO_PROXY"] = ",".join(dict.fromkeys(spared))


def check_program() -> None:
    """Refuse a program, other than a job, in which the network would not be right. Its own environment stays.

    Raises:
        InputError: its Keras does not compute with TensorFlow, or its TensorFlow does not compute eagerly.
    """
    try:
        import keras
        import tensorflow as tf
    except Exception as error:  # whatever a backend, or a keras.json, makes of its import
        raise InputError(
            f"Keras does not load here ({type(error).__name__}: {first_line(error)}): set KERAS_BACKEND=tensorflow, "
            "and remove or correct keras.json (in KERAS_HOME, else ~/.keras)."
        ) from error
    if keras.config.backend() != "tensorflow":
        raise InputError(
            f"Keras computes with {keras.config.backend()} in this program, but this model needs TensorFlow: set "
            "KERAS_BACKEND=tensorflow before Keras is imported, or load the model in a program of its own."
        )
    if not tf.executing_eagerly():
        raise InputError(
            "TensorFlow's eager execution is off here (tf.compat.v1.disable_eager_execution, or inside a graph): load "
            "the model where it is on."
        )
