"""What a ledger of applied steps must show: each sample once an epoch, whatever was killed on the way.

Knows the shards through pyarrow and the ledger's lines (`benchmarks/ledger`), nothing of the project's code.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

PADDING = "padding"


@dataclass
class Start:
    """What one start of the workers did: by step and rank, what was taken in and what loss came out."""

    world: int
    began: float
    ended: float
    taken: dict[int, dict[int, dict]]
    losses: dict[int, dict[int, float]]

    @property
    def first(self) -> int:
        return min(self.taken)

    @property
    def last(self) -> int:
        """The last applied step."""
        return max(self.losses, default=self.first - 1)


def names_by_digest(folder: Path, data_digest: str, limit: int | None = None) -> dict[str, str]:
    """The training samples of the prepared data below a folder, by the digest that the ledger gives them."""
    manifests = ((path, json.loads(path.read_text())) for path in folder.glob("*/manifest.json"))
    (path, manifest), *_ = ((p, m) for p, m in manifests if m["data_digest"] == data_digest)
    tables = [
        pq.read_table(path.parent / file, columns=["name", "image", "mask"]) for file in manifest["files"]["train"]
    ]
    rows = [row for table in tables for row in table.to_pylist()][:limit]
    size = manifest["image_size"]
    found = {}
    for row in rows:
        image = np.frombuffer(row["image"], np.uint8).reshape(size, size, 3)
        mask = np.frombuffer(row["mask"], np.uint8).reshape(size, size)
        ways = (image.tobytes() + mask.tobytes(), np.fliplr(image).tobytes() + np.fliplr(mask).tobytes())
        found[min(hashlib.blake2b(way, digest_size=8).hexdigest() for way in ways)] = row["name"]
    assert len(found) == len(rows), "some training samples have the same pixels"
    return found


def starts_of(lines: Iterable[dict]) -> list[Start]:
    """The starts in the order of time; none may have begun to step while another one still did."""
    starts, processes = {}, {}
    for line in sorted(lines, key=lambda line: line["time"]):
        start = starts.setdefault(line["start"], Start(line["world"], line["time"], line["time"], {}, {}))
        start.ended = line["time"]
        step, rank = line["step"], line["rank"]
        assert processes.setdefault((line["start"], rank), line["pid"]) == line["pid"], "two processes of one rank"
        assert line["world"] == start.world and 0 <= rank < start.world
        place = start.losses if "loss" in line else start.taken
        assert rank not in place.setdefault(step, {}), f"rank {rank} did step {step} twice in one start"
        place[step][rank] = line.get("loss", line)
    ordered = sorted(starts.values(), key=lambda start: start.began)
    for before, after in pairwise(ordered):
        assert before.ended < after.began, "two starts stepped at once"
    for start in ordered:
        for step, losses in start.losses.items():
            assert set(start.taken[step]) == set(range(start.world)), f"step {step} was applied without a rank"
            assert len(set(losses.values())) == 1, f"the ranks disagree about step {step}: {losses}"
        assert sorted(start.taken) == list(range(start.first, max(start.taken) + 1)), "a start left out a step"
    return ordered


def check(lines: Iterable[dict], committed: dict[int, float], names: dict[str, str], batch: int, epochs: int) -> list:
    """Hold a finished run's ledger against what it promises; how many steps each new start repeated.

    `committed`: when each checkpoint was seen, by step. `names`: of the training samples by digest.
    """
    starts, steps = starts_of(lines), -(-len(names) // batch)
    repeated = []
    for before, after in pairwise(starts):
        known = [step for step, seen in committed.items() if seen < after.began]
        assert after.first - 1 == max(known, default=0), f"a start at {after.first}, checkpoints {sorted(known)}"
        assert after.first <= before.last + 1, f"the steps {before.last + 1} to {after.first - 1} are missing"
        repeated.append(before.last + 1 - after.first)
    assert starts[0].first == 1 and starts[-1].last == steps * epochs
    for index, start in enumerate(starts):
        for later in starts[index + 1 :]:
            for step in start.losses.keys() & later.losses.keys():
                _check_same(step, start, later)
    used = {step: start for start in starts for step in sorted(start.losses)}  # the last start to apply it counts
    for epoch in range(epochs):
        rows = Counter()
        for step in range(epoch * steps + 1, (epoch + 1) * steps + 1):
            assert step in used, f"step {step} was never applied"
            for line in used[step].taken[step].values():
                rows.update(line["rows"])
        rows.pop(PADDING, None)
        wrong = {names.get(digest, digest): count for digest, count in rows.items() if count != 1}
        wrong |= {name: 0 for digest, name in names.items() if digest not in rows}
        assert not wrong and rows.keys() == names.keys(), f"epoch {epoch + 1} did not use each sample once: {wrong}"
    return repeated


def _check_same(step: int, one: Start, other: Start) -> None:
    """A step that was done again took the same samples; by as many workers, the same pixels to the same loss."""
    mine, theirs = (
        Counter(row for line in start.taken[step].values() for row in line["rows"] if row != PADDING)
        for start in (one, other)
    )
    assert mine == theirs, f"step {step} took other samples when it was done again"
    if one.world == other.world:
        for rank, line in one.taken[step].items():
            assert line["pixels"] == other.taken[step][rank]["pixels"], f"step {step} was augmented otherwise"
        losses = {loss for start in (one, other) for loss in start.losses[step].values()}
        assert len(losses) == 1, f"step {step} had another loss when it was done again: {losses}"
