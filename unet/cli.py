"""The door of every job: settings from flags and files, and errors as sentences with an exit code."""

import argparse
import sys
import traceback
from collections.abc import Callable
from typing import Any

import tyro
from pydantic import BaseModel

from unet import config
from unet.errors import InputError, RunFailed
from unet.storage import Folder

DONE, FAILED, REFUSED, STOPPED = 0, 1, 2, 130


def main(settings: type[BaseModel], run: Callable[[Any], int | None], description: str) -> None:
    """Parse the command line, run the job and leave with its exit code.

    0 done; 1 the run failed; 2 wrong settings or input, before anything started; 130 stopped by Ctrl-C.
    """
    debug = "--debug" in sys.argv
    try:
        code = run(parse(settings, description, sys.argv[1:]))
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


def parse(settings: type[BaseModel], description: str, argv: list[str]) -> BaseModel:
    """Settings from `argv`: a flag beats the file, the file beats the default; --resume reads the run's own."""
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for flag in ("--config", "--resume", "--storage-path", "--tracking-uri"):
        early.add_argument(flag)
    given, _ = early.parse_known_args([_with_dashes(a) for a in argv])
    values = {}
    if given.resume:
        values = _settings_of_run(given.resume, given.storage_path)
        if "space" in values and "sweep" not in settings.model_fields:
            raise InputError(f"{given.resume} is a sweep: continue it with `jobs/tune.py --resume {given.resume}`.")
        if ":***@" in (values.get("tracking_uri") or "") and not given.tracking_uri:
            raise InputError(f"Give --tracking-uri again: the password of {values['tracking_uri']} was not saved.")
    if given.config:
        values |= config.load_yaml(config.Path(given.config))
    defaults = config.unflat(settings, values, f"--config {given.config}" if given.config else "the settings")
    return tyro.cli(settings, args=argv, default=defaults, description=description, config=(tyro.conf.OmitArgPrefixes,))


def _with_dashes(argument: str) -> str:
    """--storage_path=x as --storage-path=x, both of which are understood."""
    flag, equals, value = argument.partition("=")
    return flag.replace("_", "-") + equals + value if flag.startswith("--") else argument


def _settings_of_run(name: str, storage_path: str | None) -> dict:
    storage = config.StoreSettings(**({"storage_path": storage_path} if storage_path else {})).storage_path
    folder = Folder(storage) / name
    if not folder.exists("config.yaml"):
        known = [n for n in Folder(storage).names() if (Folder(storage) / n).exists("config.yaml")]
        raise InputError(
            f"There is no run {name} under {storage}." + (f" There are: {', '.join(known[-8:])}." if known else "")
        )
    return config.read_config(folder) | {"storage_path": storage, "run_name": name, "resume": name}


def _explain(error: Exception, code: int, debug: bool, message: str | None = None) -> int:
    if debug:
        traceback.print_exception(error)
    print(f"error: {message or error}", file=sys.stderr)
    if not debug and not isinstance(error, InputError):
        print("(--debug shows where.)", file=sys.stderr)
    return code
