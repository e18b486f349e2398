"""What a training and a sweep ask before anything starts: whether the cluster can hold them, and the data."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

from unet.cluster.demand import needs_of, when_grown
from unet.cluster.nodes import cluster_nodes
from unet.cluster.placement import Node
from unet.config import TrainSettings
from unet.data.preparing.resolve import resolve
from unet.data.shards import Prepared
from unet.errors import InputError
from unet.recipe.recipe import Recipe
from unet.storage import Folder
from unet.supervise.preflight import check_samples, with_weights_of
from unet.terminal import Display

Plan = TypeVar("Plan")


@dataclass(frozen=True)
class Material(Generic[Plan]):
    """What there is to train on, and how.

    Attributes:
        settings: those that were given, with class weights as numbers.
        counts: samples used of each split.
        data_bytes: size of training and validation in memory.
        recipe: of the training, for the classes of the data.
        plan: how the cluster would hold it.
    """

    prepared: Prepared
    settings: TrainSettings
    counts: dict[str, int]
    data_bytes: int
    recipe: Recipe
    plan: Plan


def gather(
    settings: TrainSettings,
    display: Display,
    plan: Callable[[list[Node], int], Plan],
    name: str,
    digest: str | None = None,
) -> Material[Plan]:
    """Prepare or open the data, once it is sure that the cluster can hold what trains on them.

    Args:
        settings: of the training; of the largest one of a sweep.
        display: shows the preparation.
        plan: fits it to nodes, for this many bytes of data.
        name: of the run or sweep.
        digest: of the data that it began with; None if it is new.

    Raises:
        InputError: the cluster is too small, or the data are missing, changed, nothing to learn from, or not what
            the settings are for.
    """
    part = settings.data

    def planned(data_bytes: int) -> Plan:
        needs, waiting = needs_of(settings), display.waiting_for_others
        return when_grown(lambda: plan(cluster_nodes(), data_bytes), needs, waiting)

    try:
        planned(0)  # before the data are prepared for what cannot run
        prepared = resolve(part.data, part.image_size, part.resize, Folder(settings.run.storage_path), display.working)
    finally:
        display.close()
    manifest = prepared.manifest
    if digest not in (None, manifest.data_digest):
        raise InputError(
            f"{name} was trained on data with digest {digest[:12]}, but {prepared.folder} has "
            f"{manifest.data_digest[:12]}: give the original data, or another --run-name."
        )
    counts = check_samples(settings, prepared)
    settings = with_weights_of(prepared, counts["train"], settings)
    data_bytes = sum(prepared.bytes_in_memory(split, counts[split]) for split in ("train", "val"))
    recipe = settings.recipe(len(manifest.classes))
    return Material(prepared, settings, counts, data_bytes, recipe, planned(data_bytes))
