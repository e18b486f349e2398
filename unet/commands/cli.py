"""The command line of every job: settings from flags and files, and errors as sentences with an exit code."""

import argparse
import contextlib
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tyro

from unet import config, environment, streams, versions
from unet.disk import at_the_door
from unet.errors import InputError, RunFailed
from unet.secrets import lost, without_secrets
from unet.settings import Settings
from unet.storage import Folder

if TYPE_CHECKING:
    from unet.terminal import Display

DONE, FAILED, REFUSED, STOPPED = 0, 1, 2, 130


def main(
    settings: type[Settings], run: Callable[[Settings], int | None], description: str | None, any_version: bool = False
) -> None:
    """Parse the command line, run the job and exit with its code.

    0 done; 1 the run failed; 2 wrong settings or input, before anything started; 130 stopped by Ctrl-C.

    Args:
        any_version: of Ray, TensorFlow and MLflow is taken, for a job that tells which there are.
    """
    streams.forgive()
    if environment.is_submitted() and not sys.stderr.isatty():
        sys.stderr = streams.timed(sys.stderr)  # stdout may be for machines: `Display` does it for people
    debug = "--debug" in sys.argv
    code: int | None
    try:
        with at_the_door():
            given = parse(settings, description, sys.argv[1:])
        if overruled := environment.pin():
            print(f"note: ignoring {', '.join(overruled)} from the environment.", file=sys.stderr)
        if not any_version:
            versions.check()
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


@contextlib.contextmanager
def work_is_kept(display: "Display") -> Iterator[None]:
    """Close the display after the block, and say on Ctrl-C that the same command continues."""
    try:
        yield
    except KeyboardInterrupt:
        display.close()
        display.say("Finished work is kept: the same command continues from here.")
        raise
    finally:
        display.close()


def _check_storage(path: str) -> None:
    """Refuse a storage path that may not be read; one that does not exist yet will be created."""
    try:
        if "://" not in path:
            os.scandir(path).close()
    except FileNotFoundError:
        pass
    except OSError as error:
        raise InputError(f"Cannot read {path}: {error.strerror}. Give another --storage-path.") from error


def parse(settings: type[Settings], description: str | None, argv: list[str]) -> Settings:
    """Settings from `argv`: a flag beats the file, the file the default; --resume and --sync start from the run's own.

    Raises:
        InputError: a file, a run or a value that cannot be used.
    """
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    known = ("config", "resume", "sync", "reproduce", "run-name", "storage-path", "tracking-uri", "data", "recipe")
    for flag in (*known, *config.BEGINNINGS, *config.LENGTHS):
        early.add_argument(f"--{flag.replace('_', '-')}")
    given, _ = early.parse_known_args([_with_dashes(a) for a in argv])
    values: dict[str, Any] = {}
    if name := given.resume or given.sync:
        values = _settings_of_run(name, given.storage_path)
        if "space" in values and "sweep" not in settings.model_fields:
            raise InputError(f"{name} is a sweep: continue it with `python jobs/tune.py --resume {name}`.")
        values |= {"run_name": name, "resume": name} if given.resume else {"run_name": None, "sync": name}
        for flag in ("tracking_uri",) if given.sync else ("tracking_uri", "data"):
            if lost(values.get(flag)) and not getattr(given, flag):
                again = flag.replace("_", "-")
                raise InputError(f"Give --{again} again: the secret in {values[flag]} was not saved.")
    elif given.reproduce:
        values = _settings_to_reproduce(given)
    if given.config:
        values |= config.load_yaml(given.config)
    if "recipe" in config.defaults(settings):
        values = _with_recipe(settings, values, given)
    # Here already, since a default may be invalid by itself, and the two are checked together.
    values |= {name: getattr(given, name) for name in ("storage_path", "tracking_uri") if getattr(given, name)}
    defaults = config.unflat(settings, values, f"--config {given.config}" if given.config else "the settings")
    called = sys.argv[0] if sys.argv[0].endswith(".py") else Path(sys.argv[0]).name
    options = (tyro.conf.OmitArgPrefixes,)
    return tyro.cli(settings, prog=called, args=argv, default=defaults, description=description, config=options)


def _with_recipe(settings: type[Settings], values: dict[str, Any], given: argparse.Namespace) -> dict[str, Any]:
    """Settings from files, over those of the recipe that the command line or they name, or of the best.

    Raises:
        InputError: there is no such recipe.
    """
    is_sweep, flags = "sweep" in settings.model_fields, {n for n in config.LENGTHS if getattr(given, n)}
    if len(flags) == 1 and not is_sweep:  # else --epochs of a run of minutes would change nothing
        values |= {name: None for name in config.LENGTHS if name in values}
    # With settings that are complete, but for those that are newer than the run.
    if run := given.resume or given.sync or given.reproduce:
        values = {"recipe": config.REFERENCE} | values
        if given.recipe and config.recipe_name(given.recipe) != values["recipe"]:
            raise InputError(f"{run} goes on with its own settings: leave out --recipe.")
        return values
    flagged = {name: getattr(given, name) for name in config.BEGINNINGS if getattr(given, name)}
    begin = {name: None if value == "None" else value for name, value in flagged.items()}
    name = given.recipe or values.get("recipe") or config.usual_recipe(values | begin)
    if config.is_complete(values):
        if given.recipe and config.recipe_name(name) != values.get("recipe"):
            raise InputError(f"--config {given.config} has every setting of a recipe: leave out --recipe.")
        is_of_training = is_sweep and "space" not in values
        return {key: value for key, value in values.items() if not (is_of_training and key in config.NOT_OF_A_SWEEP)}
    without = set(config.LENGTHS) if not is_sweep and (flags or values.keys() & set(config.LENGTHS)) else set()
    if is_sweep:
        without.add(config.MINUTES)
    if model := (values | begin).get("init_from"):
        values = _network_of(model, values, given) | values
    return config.with_recipe(name, values, without) | {"recipe": name}


def _network_of(model: str, values: dict[str, Any], given: argparse.Namespace) -> dict[str, Any]:
    """The settings of the network of an earlier model, which one that begins with it has unless a flag or --config says
    otherwise; of a run or sweep that has begun its own, since the earlier model may be gone.

    Raises:
        InputError: there is no such model.
    """
    storage = Folder(_storage(given.storage_path or values.get("storage_path")))
    name = given.run_name or values.get("run_name")
    if name and (storage / name).exists(config.CONFIG):
        begun = config.read_config(storage / name)
        return {setting: begun[setting] for setting in config.NETWORK if setting in begun}
    from unet.models.trained import network_of

    uri = given.tracking_uri or values.get("tracking_uri")
    return network_of(model, storage, uri).model_dump(include=set(config.NETWORK))


def _with_dashes(argument: str) -> str:
    """--storage_path=x as --storage-path=x: both spellings are accepted."""
    flag, equals, value = argument.partition("=")
    return flag.replace("_", "-") + equals + value if flag.startswith("--") else argument


def _storage(path: str | None) -> str:
    """The storage path that was given, or the usual one."""
    return config.StoreSettings(**({"storage_path": path} if path else {})).storage_path


def _settings_of_run(name: str, storage_path: str | None) -> dict[str, Any]:
    storage = _storage(storage_path)
    return config.read_config(config.folder_of(name, Folder(storage))) | {"storage_path": storage}


def _settings_to_reproduce(given: argparse.Namespace) -> dict[str, Any]:
    """What the run of --reproduce was, under a new name.

    Raises:
        InputError: there is no such run, its data are not known, or --config gives other settings.
    """
    from unet.tracking.original import Original

    if given.config:
        raise InputError("--reproduce takes the settings of that run: leave out --config.")
    original = Original.find(given.reproduce, Folder(_storage(given.storage_path)), given.tracking_uri)
    if lost(original.settings.get("data")) and not given.data:
        raise InputError(f"Give --data again: the secret in {original.settings['data']} was not saved.")
    return original.settings | {"reproduce": given.reproduce, "run_name": f"{original.name}-again"}


def _explain(error: Exception, code: int, debug: bool, message: str | None = None) -> int:
    if debug:
        print(without_secrets("".join(traceback.format_exception(error))), end="", file=sys.stderr)
    print(f"error: {without_secrets(message or str(error))}", file=sys.stderr)
    if not debug and not isinstance(error, InputError):
        print("(--debug shows the traceback.)", file=sys.stderr)
    return code
