"""`jobs/export.py`: the exported forms of a network, each run and compared with it before anything is written."""

import hashlib
import json
import os
import tempfile
from dataclasses import asdict
from importlib import resources
from importlib.metadata import version
from pathlib import Path

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.table import Column, Table

from unet.cluster.session import silenced
from unet.config import ExportSettings
from unet.disk import check_writable
from unet.errors import InputError, RunFailed
from unet.models.trained import TrainedModel
from unet.packaging import compare
from unet.packaging.forms import FORMS, INPUT, OUTPUT, Run, exportable
from unet.pages.numbers import images
from unet.storage import Folder
from unet.terminal import Display

PASSPORT, USAGE = "export.json", "README.md"
LIBRARIES = {name: ("tensorflow",) for name in FORMS} | {"onnx": ("tf2onnx", "onnx", "onnxruntime")}


class Disagreement(RunFailed):
    """A form answers otherwise than the network; `agreeing` are the formats that do not."""

    def __init__(self, words: str, agreeing: tuple[str, ...]):
        super().__init__(words)
        self.agreeing = agreeing


def target_of(settings: ExportSettings, trained: TrainedModel) -> Folder:
    """The folder for an export, before anything is made.

    Raises:
        InputError: no folder is given or known, or it holds something else.
    """
    part = settings.export
    if part.output:
        folder = Folder(part.output)
    elif trained.run:
        folder = trained.run / "export"
    else:
        raise InputError(f"Say where the export of {trained.name} goes: --output FOLDER.")
    check_writable(folder, "--output")
    if folder.names() and not folder.exists(PASSPORT):
        raise InputError(f"{folder} holds something else: give a new or empty --output, or that of an earlier export.")
    return folder


def export(settings: ExportSettings, trained: TrainedModel, target: Folder, display: Display) -> dict:
    """Write the forms of a model with `export.json` and a README.md; the content of `export.json`.

    TensorFlow runs in this process.

    Raises:
        InputError: there are no photos to compare on, or an earlier export is damaged.
        RunFailed: a form does not agree with the network. Nothing was written then.
    """
    part, size, earlier = settings.export, trained.image_size, _forms_in(target)
    threads = part.threads or len(os.sched_getaffinity(0))
    photos, source = compare.squares(part.images, trained, display.say)
    count = images(len(photos))
    display.waiting("loading TensorFlow")
    with tempfile.TemporaryDirectory() as scratch, silenced(settings.command.debug):
        from unet.cluster.devices import start_tensorflow
        from unet.models.inference import Network

        start_tensorflow(threads)
        network = Network(trained)
        runs: dict[str, Run] = {"network": lambda image: network.probabilities(_pixels(image))}
        model = exportable(network)
        expected = [network.probabilities(image[None]) for image in photos]
        found: dict[str, compare.Agreement] = {}
        for name in part.formats:
            display.waiting(f"writing {FORMS[name].file}")
            FORMS[name].write(model, Path(scratch) / FORMS[name].file, photos)
            runs[name] = FORMS[name].open(Path(scratch) / FORMS[name].file, threads)
            display.waiting(f"comparing {FORMS[name].file} on {count}")
            found[name] = compare.agreement(runs[name], photos, expected)
        _refuse_others(found, len(photos), target)
        times = compare.latencies(runs, photos, lambda done, total: display.working("timing", done, total))
        files = {name: _files(Path(scratch) / FORMS[name].file) for name in part.formats}
    passport = {
        "model": {"asked_for": trained.name, **trained.about},
        "input": {"name": INPUT, "shape": [None, size, size, 3], "dtype": "float32", "range": [0, 1], "colour": "RGB"},
        "output": {"name": OUTPUT, "shape": [None, size, size, len(trained.classes)], "dtype": "float32"},
        "compared_on": {"images": len(photos), "source": source},
        "threads": threads,
        "network_ms": round(times["network"], 3),
        "formats": {name: _passport(name, files[name], found[name], times[name]) for name in part.formats},
    }
    for name in part.formats:
        _place(target, name, files[name])
    for other in earlier - {*part.formats}:  # of other weights
        _remove(target, FORMS[other].file)
    target.write_text(USAGE, usage(trained, part.formats))
    target.write_text(PASSPORT, json.dumps(passport, indent=2))
    return passport


def _pixels(image: np.ndarray) -> np.ndarray:
    """The uint8 image of an input: the network divides by 255 itself."""
    return np.rint(image * 255).astype(np.uint8)


def _refuse_others(found: dict[str, compare.Agreement], count: int, target: Folder) -> None:
    agreeing = tuple(name for name, seen in found.items() if seen.equal_classes >= FORMS[name].equal)
    for name, seen in found.items():
        if name not in agreeing:
            raise Disagreement(
                f"{FORMS[name].file} gives the network's class to only {seen.equal_classes:.2%} of the pixels of "
                f"{images(count)} (at least {FORMS[name].equal:.1%} is required; probabilities differ by up to "
                f"{seen.max_difference:.2g}): nothing was written to {target}. Leave this form out with --formats.",
                agreeing,
            )


def _files(path: Path) -> dict[str, bytes]:
    """The content of a form's files: by relative name in a folder, under "" for a single file."""
    if path.is_file():
        return {"": path.read_bytes()}
    return {str(p.relative_to(path)): p.read_bytes() for p in sorted(path.rglob("*")) if p.is_file()}


def _passport(name: str, files: dict[str, bytes], found: compare.Agreement, milliseconds: float) -> dict:
    place = FORMS[name].file
    digests = {f"{place}/{file}" if file else place: hashlib.sha256(c).hexdigest() for file, c in files.items()}
    return {
        **{"file": place, "bytes": sum(map(len, files.values())), "ms": round(milliseconds, 3), **asdict(found)},
        **{"sha256": digests, "made_with": {library: version(library) for library in LIBRARIES[name]}},
    }


def _place(target: Folder, name: str, files: dict[str, bytes]) -> None:
    if "" in files:
        target.write_bytes(FORMS[name].file, files[""])
    else:
        target.commit(FORMS[name].file, {**files})


def _forms_in(target: Folder) -> set[str]:
    """The forms of an earlier export, as its `export.json` lists them."""
    if not target.exists(PASSPORT):
        return set()
    try:
        return FORMS.keys() & {*json.loads(target.read_text(PASSPORT))["formats"]}
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{target}/{PASSPORT} is damaged: give another --output, or remove {target}.") from error


def _remove(target: Folder, file: str) -> None:
    if target.committed(file):
        target.delete(file)
    elif target.exists(file):
        target.fs.delete_file(target.at(file))


def usage(trained: TrainedModel, formats: tuple[str, ...]) -> str:
    """The README of an export: how to call each form, in code that runs next to a photo.jpg."""
    from jinja2 import Environment

    text = (resources.files("unet.packaging") / "usage.md.jinja").read_text("utf-8")
    template = Environment(trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True).from_string(text)
    return template.render(trained.about, size=trained.image_size, formats=formats)


def table(passport: dict) -> Table:
    """The terminal's table of an export: size, agreement and speed of each form."""
    right = [Column(title, justify="right") for title in ("MB", "ms an image", "equal classes", "largest difference")]
    on = passport["compared_on"]
    table = Table("form", *right, title=f"{images(on['images'])}, {passport['threads']} thread(s)", box=SIMPLE_HEAD)
    table.add_row("network", "", f"{passport['network_ms']:.2f}", "", "")
    for seen in passport["formats"].values():
        size, time = f"{seen['bytes'] / 1e6:.2f}", f"{seen['ms']:.2f}"
        table.add_row(seen["file"], size, time, f"{seen['equal_classes']:.4%}", f"{seen['max_difference']:.1e}")
    return table
