"""What a training begins with that is not drawn: weights of an earlier model, or of an encoder known from ImageNet."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from unet.config import NETWORK, TrainSettings
from unet.data.shards import Prepared
from unet.errors import Damaged, InputError
from unet.models.imagenet import encoder_weights
from unet.models.trained import TrainedModel
from unet.recipe.network import ModelSettings, Shapes, is_of_encoder
from unet.recipe.optimizer import OptimizerSettings
from unet.recipe.recipe import Recipe
from unet.recipe.start import StartSettings
from unet.runs.checkpoint import Checkpoints
from unet.runs.run import prepared_of, read_summary
from unet.storage import Folder

HEAD = "head/"
"""What the names of the last layer's weights begin with, which mean the classes."""


@dataclass(frozen=True, repr=False)  # the weights would fill a log
class Known:
    """Weights that trainings may begin with.

    Attributes:
        weights: float32 arrays by name.
        words: where they are from.
        class_names: what the last layer means, if they have one.
        network: the settings of an earlier model's.
        lessons: the data that an earlier model and those before it were trained on, newest first.
    """

    weights: dict[str, np.ndarray]
    words: str
    class_names: Sequence[str] = ()
    network: ModelSettings | None = None
    lessons: Sequence[dict] = ()

    @property
    def facts(self) -> dict:
        """What the summary of a run or sweep says of them."""
        found = hashlib.sha256()
        for name in sorted(self.weights):
            found.update(f"{name}{self.weights[name].shape}".encode())
            found.update(np.ascontiguousarray(self.weights[name]).data)
        return {"begins_with": self.words, "begins_with_sha256": found.hexdigest(), "lessons": [*self.lessons]}


class Start(Known):
    """Those that a training takes of them, by `Network.variables`: the others are drawn. `words` says how many."""


def check_start(model: ModelSettings, start: StartSettings, optimizer: OptimizerSettings) -> None:
    """Refuse what cannot be begun with, as far as the settings and a look at the disk say.

    Raises:
        InputError: with what to give.
    """
    if optimizer.sets_encoder_apart and not start.init_from and model.encoder == "none":
        raise InputError(
            "--freeze and --encoder-rate are for layers that know something already: give --init-from or --encoder, "
            "or --freeze None --encoder-rate 1."
        )
    if start.encoder_weights:
        if model.encoder == "none":
            raise InputError(f"--encoder-weights {start.encoder_weights} is for an --encoder: name it, too.")
        if not Path(start.encoder_weights).is_file():
            raise InputError(f"There is no file {start.encoder_weights}: give another --encoder-weights.")


def known_of(settings: TrainSettings, recipe: Recipe, prepared: Prepared) -> Known | None:
    """What trainings of such settings know at their beginning; None: nothing.

    `recipe` is that of the deepest network among them.

    Raises:
        InputError: it cannot be had, or was learned from what `prepared` tests with.
    """
    start, encoder = recipe.start, recipe.model.encoder
    if start.init_from:
        return _of_model(start.init_from, settings, recipe.network.variables, prepared)
    if encoder == "none":
        return None
    weights = encoder_weights(encoder, start.encoder_weights, recipe.network.variables)
    return Known(weights, Path(start.encoder_weights).name if start.encoder_weights else f"ImageNet's {encoder}")


def start_of(known: Known | None, recipe: Recipe, class_names: Sequence[str]) -> Start | None:
    """What a training by this recipe takes of it: whose name and shape fit, and mean the same classes.

    Raises:
        InputError: nothing fits, or layers that nothing is known of would be frozen.
    """
    if known is None:
        return None
    wanted, same_classes = recipe.network.variables, list(known.class_names) == list(class_names)
    fit = {
        name: array
        for name, array in known.weights.items()
        if wanted.get(name) == array.shape and (same_classes or not name.startswith(HEAD))
    }
    anew = sorted({name.partition("/")[0] for name in wanted.keys() - fit.keys()})
    if not any(map(is_of_encoder, fit)):
        theirs = f" ({_title(known.network)})" if known.network else ""
        raise InputError(
            f"Nothing of {known.words}{theirs} fits the network of this training ({_title(recipe.model)}): leave out "
            "the flags that make it another one, such as --base-filters, or the lines of --config."
        )
    drawn = [layer for layer in anew if is_of_encoder(layer)]
    for flag, value, off in (
        ("freeze", recipe.optimizer.freeze, None),
        ("frozen-stages", recipe.model.frozen_stages, 0),
    ):
        if value and drawn:
            raise InputError(
                f"--{flag} {value} would keep layers that {known.words} lacks, such as {drawn[0]}: "
                f"give --{flag} {off}, or leave out the flags that add them, such as --depth."
            )
    some = f", anew: {', '.join(anew[:4])}{' and others' if len(anew) > 4 else ''}" if anew else ""
    words = f"{len(fit)} of {len(wanted)} variables of {known.words}{some}{_differing(known.network, recipe.model)}"
    return Start(fit, words, known.class_names, known.network, known.lessons)


def check_same(begun: Known | None, summary: dict, name: str) -> None:
    """Refuse to begin a run or sweep again, of which `summary` tells, with other weights than it began with.

    Raises:
        InputError: with what they were and are.
    """
    before = summary.get("begins_with_sha256")
    if begun and before not in (None, begun.facts["begins_with_sha256"]):
        raise InputError(
            f"{name} began with {summary['begins_with']}, which has changed since; now it is {begun.words}: give "
            "another --run-name."
        )


def _title(network: ModelSettings) -> str:
    return f"{network.title}, {network.base_filters} filters"


def _differing(theirs: ModelSettings | None, ours: ModelSettings) -> str:
    """Where a network differs from that of the earlier model, as flags or a file may have it."""
    before, now = (theirs.model_dump(include=set(NETWORK)) if theirs else {}), ours.model_dump()
    found = [f"{name} {now[name]}, not {value}" for name, value in before.items() if now[name] != value]
    return f"; another network: {', '.join(found).replace('_', ' ')}" if found else ""


def _of_model(model: str, settings: TrainSettings, wanted: Shapes, prepared: Prepared) -> Known:
    """What an earlier model knows. A package has its norms folded away, so its checkpoint is taken."""
    storage = Folder(settings.run.storage_path)
    trained = TrainedModel.find(model, storage, settings.run.tracking_uri)
    run, weights = trained.run or storage / trained.run_name, trained.weights
    is_of_run = _is_checkpoint_of(trained, run)
    lessons = [{"run_name": trained.run_name, "data_digest": trained.data_digest, "prepared": None}]
    if is_of_run:
        lessons[0]["prepared"] = prepared_of(run)
        lessons += read_summary(run).get("lessons") or []
        weights = Checkpoints(run).weights(trained.checkpoint)
    refuse_shared(lessons, prepared, storage)
    if not is_of_run and any("/moving_" in name for name in wanted):
        raise InputError(
            f"{model} is a package, whose batch norms are folded away, and {run} lacks {trained.checkpoint}, which has "
            "them: give --init-from a run or a checkpoint."
        )
    words = f"{trained.run_name}, {trained.checkpoint}"
    return Known(weights, words, trained.class_names, trained.network, lessons)


def _is_checkpoint_of(trained: TrainedModel, run: Folder) -> bool:
    """Whether the run in this folder has the checkpoint that a model is of; another run may have its name."""
    if trained.checkpoint not in Checkpoints(run).whole():
        return False
    try:
        found = TrainedModel.of_checkpoint(run, trained.checkpoint).weights
    except Damaged:
        return False
    same = (np.array_equal(array, trained.weights[name]) for name, array in found.items() if name in trained.weights)
    return found.keys() == trained.weights.keys() and all(same)


MIXED = (("train", "test"), ("train", "val"), ("test", "train"))
"""Splits, of the data before and now, that must have no photo in common: else a score means less than it seems to."""


def refuse_shared(lessons: Sequence[dict], prepared: Prepared, storage: Folder) -> None:
    """Refuse to go on from a model with other splits of the same photos, whatever their names.

    It is seen where the data of its lessons are still there and were prepared at the same size: by their pixels.

    Raises:
        InputError: with how many there are, and one of them.
    """
    now: dict[str, dict[bytes, str]] = {}
    for lesson in lessons:
        before = _data_of(lesson, storage) if lesson["data_digest"] != prepared.manifest.data_digest else None
        if before is None or _form(before) != _form(prepared):  # in another form photos have other pixels
            continue
        for old in ("train", "test"):
            try:
                earlier = _photos(before, old)
            except InputError:  # they can no longer be read
                continue
            for new in (new for split, new in MIXED if split == old):
                now[new] = now.get(new) or _photos(prepared, new)
                if shared := sorted(now[new][photo] for photo in earlier.keys() & now[new].keys()):
                    raise InputError(
                        f"{len(shared):,} photos that {lesson['run_name']} had in {old} are in {new} now, such as "
                        f"{shared[0]}: scores would not be of unseen photos. Give data with the splits of then (list "
                        "files), or another --init-from."
                    )


def _form(prepared: Prepared) -> tuple[int, str]:
    return prepared.manifest.image_size, prepared.manifest.resize


def _data_of(lesson: dict, storage: Folder) -> Prepared | None:
    """The data of a lesson, if they are where they were or below the storage path."""
    places = [Folder(lesson["prepared"])] if lesson["prepared"] else []
    for place in [*places, *(storage / "data" / name for name in (storage / "data").names())]:
        try:
            if (found := Prepared(place)).manifest.data_digest == lesson["data_digest"]:
                return found
        except (InputError, OSError):
            continue
    return None


def _photos(prepared: Prepared, split: str) -> dict[bytes, str]:
    """The name of each photo of a split, by a digest of its pixels."""
    found: dict[bytes, str] = {}
    for chunk in range(len(prepared.chunks[split])):
        table = prepared.read_chunk(split, chunk, ("name", "image"))
        rows = zip(table["image"], table["name"].to_pylist(), strict=True)
        found |= {hashlib.sha256(image.as_buffer()).digest(): name for image, name in rows}
    return found
