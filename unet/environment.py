"""What the environment of whoever starts a job may decide, and what it may not: one table, with the reason of each.

Libraries obey variables and files in the home directory that were meant for other programs. What would change the
numbers of a run, or where they are delivered, is pinned in every process of a job, whatever the shell says. The rest
is the user's: credentials, certificates, proxies, what of the processor may be used, `RAY_ADDRESS`. In somebody
else's program (`unet.load`) nothing is changed: there the network is built so that it is right, or refused.
"""

import os
import sys
import warnings

from unet.errors import InputError, first_line

PINNED = {
    # The networks are TensorFlow's, whatever other projects of this user compute with.
    "KERAS_BACKEND": "tensorflow",
    # No keras.json: one of another floatx, epsilon or image format trains another network, or fails.
    "KERAS_HOME": os.devnull,
    # With it everything that touches `tf.keras`, as MLflow does when it packages the model, asks for another package.
    "TF_USE_LEGACY_KERAS": "0",
    # XLA sums in another order, and on CPUs takes 13 times as long.
    "TF_XLA_FLAGS": "",
    "TF_FUNCTION_JIT_COMPILE_DEFAULT": "0",
    # Where a run is told of is a setting, which the run keeps: it would be told of elsewhere by the next start.
    "MLFLOW_TRACKING_URI": None,
    "MLFLOW_EXPERIMENT_NAME": None,
    "MLFLOW_EXPERIMENT_ID": None,
    "MLFLOW_RUN_ID": None,
    # The registry is the store's own: a version refers to the run that it is of.
    "MLFLOW_REGISTRY_URI": None,
    # A database under the storage path has no workspaces; with them every job would be asked for one.
    "MLFLOW_ENABLE_WORKSPACES": "false",
    # A metric counts as delivered when the store has it, not when it is promised.
    "MLFLOW_ENABLE_ASYNC_LOGGING": "false",
    # Long values of settings are cut, as MLflow does by default, and not refused.
    "MLFLOW_TRUNCATE_LONG_VALUES": "true",
    # Packaging a model asks no package index.
    "MLFLOW_LOCK_MODEL_DEPENDENCIES": "false",
    # Pictures need no display, no notebook, no LaTeX.
    "MPLBACKEND": "agg",
    "MATPLOTLIBRC": os.devnull,
    # A warning of a library is no error of the job.
    "PYTHONWARNINGS": None,
    # The first version of Ray Train has none of what the supervisor speaks to.
    "RAY_TRAIN_V2_ENABLED": "1",
    # The supervisor does it, and another process for each group of workers would only make their start longer.
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    # Else what a worker prints appears twice.
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    # Trials find what relative paths mean where the job was started.
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    # Ctrl-C is our stop signal, not Tune's, which would end the sweep as if it were finished.
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
    # What a sweep leaves is the ledger's, and what is shown the board's.
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "RAY_AIR_NEW_OUTPUT": "0",
}
"""The values of a job's processes; None: not set."""

FLAGS = {"MLFLOW_TRACKING_URI": "--tracking-uri", "MLFLOW_EXPERIMENT_NAME": "--experiment"}
"""What is a setting instead."""

CHOSEN = {
    "TF_CPP_MIN_LOG_LEVEL": "2",
    # How often the controller of Ray Train looks at its workers; its 2 s would delay every report and the end.
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    # A Ray that starts here keeps word of so many calls, else of 100,000, for a dashboard that it does not have.
    "RAY_task_events_max_num_task_in_gcs": "1000",
    # It would end idle processes after a second where there are more than CPUs, and those of networks count: the tasks
    # that read and write would start new ones again and again, each of which leaves the GCS a handle.
    "RAY_idle_worker_killing_time_threshold_ms": "60000",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}
"""Values where the user has set none."""

LOOPBACK = ("localhost", "127.0.0.1", "::1")
PROXIES = ("http_proxy", "https_proxy", "all_proxy")


def pin() -> list[str]:
    """Make the environment of this process, which is a job's own, and of those that it starts what the job needs.

    To be called before TensorFlow, Keras, Ray or MLflow is imported: they read it then.

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
    if os.path.expanduser("~") == "~":  # neither HOME nor an entry of the user, and libraries ask when they load
        os.environ["HOME"] = "/nonexistent"
    if any(os.environ.get(name) or os.environ.get(name.upper()) for name in PROXIES):
        _spare_loopback()
    if sys.warnoptions:  # -W and PYTHONWARNINGS
        warnings.resetwarnings()
        warnings.simplefilter("ignore")
    return overruled


def _spare_loopback() -> None:
    """No proxy is asked for this machine itself, where a tracking server, a dashboard or a cluster may be."""
    spared = (os.environ.get("no_proxy") or os.environ.get("NO_PROXY") or "").split(",")
    if "*" not in spared:
        spared = [host for host in (*spared, *LOOPBACK) if host.strip()]
        os.environ["no_proxy"] = os.environ["NO_PROXY"] = ",".join(dict.fromkeys(spared))


def check_program() -> None:
    """Refuse a program, not a job, in which the network cannot be right. What that program has set stays.

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
            f"Keras computes with {keras.config.backend()} in this program, and this model with TensorFlow: set "
            "KERAS_BACKEND=tensorflow before Keras is imported, or load the model in a program of its own."
        )
    if not tf.executing_eagerly():
        raise InputError(
            "TensorFlow's eager execution is off here (tf.compat.v1.disable_eager_execution, or inside a graph): load "
            "the model where it is on."
        )
