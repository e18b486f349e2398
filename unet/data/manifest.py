"""What a prepared folder says of itself: its manifest, and the digests by which samples and data are known."""

import hashlib
import json
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

from unet.classes import Classes, ClassInfo
from unet.config import Resize
from unet.data.order import CHUNK
from unet.errors import InputError

SCHEMA_VERSION = 2
MANIFEST, SAMPLES, REPORT = "manifest.json", "samples.parquet", "data_report.html"
SPLITS = ("train", "val", "test")


def name_hash(name: str) -> bytes:
    """What the canonical order sorts by and what decides the split."""
    return hashlib.sha256(name.encode()).digest()


def sample_digest(name: str, split: str, image: np.ndarray, mask: np.ndarray) -> bytes:
    """sha256 of a sample's name, split, shape and pixels; image uint8 (S, S, 3), mask uint8 (S, S)."""
    header = f"{name}\0{split}\0{'x'.join(map(str, image.shape))}\0"
    found = hashlib.sha256(header.encode())
    found.update(np.ascontiguousarray(image).data)
    found.update(np.ascontiguousarray(mask).data)
    return found.digest()


def data_digest(digests: dict[str, bytes]) -> str:
    """The passport of a data set: sha256 over the samples' digests sorted by name, independent of sharding."""
    return hashlib.sha256(b"".join(digests[name] for name in sorted(digests))).hexdigest()


@dataclass(frozen=True)
class Manifest:
    """The content of `manifest.json`.

    Attributes:
        image_size: side of the square pictures, in pixels.
        resize: how photos became square: `stretch` or `letterbox`.
        classes: names, in the order of the ids.
        colours: of the classes, RGB 0-255.
        counts: samples by split.
        files: the shards by split, in canonical order.
        sha256: of every file beside the manifest.
        data_digest: of names, splits and pixels, independent of sharding.
        source, source_version: what it was made from.
        val_fraction: share of trainval that became val.
        shards: files of a split, at most.
        original_masks: whether the shards hold `mask_original`.
        left_out: samples that could not be used: {name, split, problem, detail}.
        repaired: samples that were repaired: {name, repair}.
        warnings: what looks wrong but was kept: {name, problem, detail}; an empty name concerns the whole set.
        totals: of these three, how many there are of each problem or repair. The lists hold the first of each
            (`unet.data.preparing.findings`); empty where the lists hold all.
    """

    image_size: int
    resize: Resize
    classes: list[str]
    colours: list[list[int]]
    counts: dict[str, int]
    files: dict[str, list[str]]
    sha256: dict[str, str]
    data_digest: str
    source: str
    source_version: str
    val_fraction: float
    shards: int = 4
    original_masks: bool = False
    left_out: list[dict] = field(default_factory=list)
    repaired: list[dict] = field(default_factory=list)
    warnings: list[dict] = field(default_factory=list)
    totals: dict[str, dict[str, int]] = field(default_factory=dict)
    schema_version: int = SCHEMA_VERSION

    def kinds(self, found: str) -> Counter[str]:
        """How many samples of `left_out`, `repaired` or `warnings` there are of each problem or repair."""
        key = "repair" if found == "repaired" else "problem"
        return Counter(self.totals[found] if found in self.totals else (row[key] for row in getattr(self, found)))

    @property
    def class_infos(self) -> Classes:
        """The classes with their colours."""
        pairs = zip(self.classes, self.colours, strict=True)
        return tuple(ClassInfo(name, (red, green, blue)) for name, (red, green, blue) in pairs)

    def to_json(self) -> str:
        """With `manifest_digest`, the sha256 of all the rest, so that no edit goes unnoticed."""
        content = asdict(self)
        return json.dumps(content | {"manifest_digest": _digest_of(content)}, indent=2)

    @classmethod
    def from_json(cls, text: str) -> "Manifest":
        """The manifest of a file's content.

        Raises:
            ValueError, TypeError, KeyError: it is not what `to_json` wrote.
        """
        content = json.loads(text)
        if content["schema_version"] != SCHEMA_VERSION:
            raise InputError(
                f"the data were prepared with schema version {content['schema_version']}, but this program reads "
                f"{SCHEMA_VERSION}: prepare them again"
            )
        if content.pop("manifest_digest") != _digest_of(content):
            raise ValueError("its content was changed")
        manifest = cls(**content)
        for file in (*manifest.sha256, *(file for files in manifest.files.values() for file in files)):
            if not file or file == ".." or Path(file).name != file:
                raise ValueError(f"it names {file!r}, which is not a file beside it")
        if empty := next((s for s in SPLITS if manifest.counts[s] and not manifest.files[s]), None):
            raise ValueError(f"it names no shard of {empty}")
        return manifest


def _digest_of(content: dict) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def files_of_chunks(samples: int, shards: int) -> list[int]:
    """For each chunk of a split, which of its files, `shards` at most, holds it."""
    chunks = -(-samples // CHUNK)
    return [chunk * min(shards, chunks) // chunks for chunk in range(chunks)]
