"""The door of every job: settings from flags and files, and errors as sentences with an exit code."""

import argparse
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tyro
from pydantic import BaseModel

from unet import config, environment, streams
from unet.errors import InputError, RunFailed
from unet.secrets import lost, without_secrets
from unet.storage import Folder

DONE, FAILED, REFUSED, STOPPED = 0, 1, 2, 130


def main(settings: type[BaseModel], run: Callable[[Any], int | None], description: str) -> None:
    """Parse the command line, run the job and leave with its exit code.

    0 done; 1 the run failed; 2 wrong settings or input, before anything started; 130 stopped by Ctrl-C.
    """
    streams.forgive()
    debug = "--debug" in sys.argv
    try:
        given = parse(settings, description, sys.argv[1:])
        if overruled := environment.pin():
            print(f"note: a job does not go by the environment's {', '.join(overruled)}.", file=sys.stderr)
        _check_storage(config.flat(given)["storage_path"])
        code = run(given)
    except InputError as error:
        code = _explain(error, REFUSED, debug)
    except RunFailed as error:
        code = _explain(error, FAILED, debug)
    except KeyboardInterrupt:
        code = STOPPED
        print("Stopped.", file=sys.stderr)
    except Exception as error:
        code = _explain(error, FAILED, debug, f"{type(error).__name__}: {error}")
    sys.stdout.flush()
    sys.exit(code or DONE)


def _check_storage(path: str) -> None:
    """Refuse a storage path that nobody lets us look into; one that is not there yet will be made."""
    try:
        if "://" not in path:
            os.scandir(path).close()
    except FileNotFoundError:
        pass
    except OSError as error:
        raise InputError(f"Cannot read {path}: {error.strerror}: give another --storage-path.") from error


def parse(settings: type[BaseModel], description: str, argv: list[str]) -> BaseModel:
    """Settings from `argv`: a flag beats the file, the file beats the default; --resume, --sync read the run's own."""
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for flag in ("--config", "--resume", "--sync", "--storage-path", "--tracking-uri", "--data"):
        early.add_argument(flag)
    given, _ = early.parse_known_args([_with_dashes(a) for a in argv])
    values = {}
    if name := given.resume or given.sync:
        values = _settings_of_run(name, given.storage_path)
        if "space" in values and "sweep" not in settings.model_fields:
            raise InputError(f"{name} is a sweep: continue it with `jobs/tune.py --resume {name}`.")
        values |= {"run_name": name, "resume": name} if given.resume else {"run_name": None, "sync": name}
        for flag in ("tracking_uri",) if given.sync else ("tracking_uri", "data"):
            if lost(values.get(flag)) and not getattr(given, flag):
                again = flag.replace("_", "-")
                raise InputError(f"Give --{again} again: what is secret in {values[flag]} was not saved.")
    if given.config:
        values |= config.load_yaml(Path(given.config))
    # Here already: a default may be impossible, and one is checked beside the other.
    values |= {name: getattr(given, name) for name in ("storage_path", "tracking_uri") if getattr(given, name)}
    defaults = config.unflat(settings, values, f"--config {given.config}" if given.config else "the settings")
    return tyro.cli(settings, args=argv, default=defaults, description=description, config=(tyro.conf.OmitArgPrefixes,))


def _with_dashes(argument: str) -> str:
    """--storage_path=x as --storage-path=x, both of which are understood."""
    flag, equals, value = argument.partition("=")
    return flag.replace("_", "-") + equals + value if flag.startswith("--") else argument


def _settings_of_run(name: str, storage_path: str | None) -> dict:
    storage = config.StoreSettings(**({"storage_path": storage_path} if storage_path else {})).storage_path
    folder = Folder(storage) / name
    if not folder.exists(config.CONFIG):
        known = [n for n in Folder(storage).names() if (Folder(storage) / n).exists(config.CONFIG)]
        raise InputError(
            f"There is no run {name} under {storage}." + (f" There are: {', '.join(known[-8:])}." if known else "")
        )
    return config.read_config(folder) | {"storage_path": storage}


def _explain(error: Exception, code: int, debug: bool, message: str | None = None) -> int:
    if debug:
        print(without_secrets("".join(traceback.format_exception(error))), end="", file=sys.stderr)
    print(f"error: {without_secrets(message or str(error))}", file=sys.stderr)
    if not debug and not isinstance(error, InputError):
        print("(--debug shows where.)", file=sys.stderr)
    return code
