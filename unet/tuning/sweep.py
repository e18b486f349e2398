"""A sweep's folder: which sweep the settings mean, and its record of itself."""

import contextlib
import json
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field

import yaml

from unet.config import SWEEP_MAY_CHANGE, SweepSettings, TuneSettings, flat, parse_yaml, read_config
from unet.data.sources.find import check_source
from unet.disk import at_the_door, check_writable
from unet.errors import InputError
from unet.locks import Lock
from unet.models.start import check_start
from unet.runs.run import CONFIG, SUMMARY, locked, milliseconds, read_summary
from unet.secrets import without_passwords
from unet.settings import defaults
from unet.storage import Folder
from unet.supervise.preflight import refuse_changes, with_chosen
from unet.tracking.database import check_database
from unet.tracking.reach import check_server, default_uri
from unet.tuning.schedule import check_schedule
from unet.tuning.space import Space, parse_space, read_space

SPACE = "space.yaml"


@dataclass
class Sweep:
    """A sweep's folder and its record of itself.

    Attributes:
        name: of the sweep, its folder and its MLflow run.
        settings: it runs with.
        folder: `<storage-path>/<name>`, with a run's folder for each trial.
        space: what is searched.
        summary: the content of `summary.json`; empty for a new sweep.
    """

    name: str
    settings: TuneSettings
    folder: Folder
    space: Space
    summary: dict = field(default_factory=dict)
    lock: Lock | None = None

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """This sweep, for this process alone, with its present summary. Raises InputError."""
        with locked(self.folder, self.name) as self.lock:
            self.summary = read_summary(self.folder)  # another driver may have had it until now
            yield

    def start(self, **facts) -> None:
        """Record that the sweep is running: its settings, its space and what is known of it."""
        self.folder.write_text(SPACE, self.space.text)
        once = {"started": self.summary.get("started") or milliseconds()}
        once["mlflow_key"] = self.summary.get("mlflow_key") or uuid.uuid4().hex
        at_its_end = dict.fromkeys(("reason", "ended", "delivered"))
        self.write_summary(sweep=self.name, status="running", **once, **at_its_end, **facts)
        # Last: where this file is, the others are.
        self.folder.write_text(CONFIG, yaml.safe_dump(self.public_settings(), sort_keys=False))

    def public_settings(self) -> dict:
        """The settings as they may be saved and sent: this sweep's name, and no secret."""
        unsaved = dict.fromkeys(("resume", "sync", "config", "extend"))
        return without_passwords(flat(self.settings) | {"run_name": self.name} | unsaved)

    def base(self, data: str, tracking_uri: str) -> dict:
        """What all trials have in common: flat settings of a training, without those of the search."""
        kept = {k: v for k, v in self.public_settings().items() if k not in SweepSettings.model_fields}
        kept.pop("register")
        kept.pop("minutes")  # which are the sweep's
        return kept | {"data": data, "storage_path": self.folder.uri, "tracking_uri": tracking_uri}

    def write_summary(self, **changes) -> None:
        self.summary |= changes
        if self.lock:
            self.lock.check(f"the sweep {self.name}")
        self.folder.write_text(SUMMARY, json.dumps(self.summary, indent=2))


@at_the_door()
def open_sweep(settings: TuneSettings) -> Sweep:
    """The sweep that the settings mean, new or to continue, after every check that needs no cluster.

    Raises:
        InputError: the settings, the space, the data or the tracking server cannot work.
    """
    storage = Folder(settings.run.storage_path)
    check_writable(storage)
    name = settings.run.resume or settings.run.run_name or time.strftime("sweep-%Y%m%d-%H%M%S")
    folder, saved, summary = storage / name, None, {}
    if folder.exists(CONFIG):
        before = read_config(folder)
        if "space" not in before:
            raise InputError(f"{name} is the run of a training: give another --run-name.")
        settings = with_chosen(settings, before)
        # The space may have moved: its content is compared.
        saved_settings = defaults(TuneSettings) | before | {"space": None}
        refuse_changes(name, saved_settings, flat(settings) | {"space": None}, SWEEP_MAY_CHANGE)
        saved, summary = folder.read_text(SPACE), read_summary(folder)
    elif [n for n in folder.names() if n not in (SPACE, SUMMARY) and not n.startswith(".")]:
        raise InputError(f"{folder} is not a sweep: give another --run-name.")
    elif settings.sweep.extend:
        raise InputError(f"There is no sweep {name} under {storage} to extend: give its name with --resume.")
    if not summary:
        check_start(settings.model, settings.start, settings.optimizer)
    text = saved if saved is not None and settings.run.resume else read_space(settings.sweep.space)
    space = parse_space(text, settings.sweep.space, settings)
    if saved is not None and parse_yaml(saved, f"{folder}/{SPACE}") != parse_yaml(text, settings.sweep.space):
        raise InputError(f"The sweep {name} searches another space, {folder}/{SPACE}: give another --run-name.")
    if settings.sweep.search == "grid":
        space.grid()
    check_schedule(settings, space)
    check_source(settings.data.data)
    check_database(settings.run.tracking_uri or default_uri(storage))
    if not summary:  # one that continues goes on without its tracking server
        check_server(settings.run.tracking_uri)
    return Sweep(name, settings, folder, space, summary)
