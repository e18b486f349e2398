"""The memory of every process while data larger than the object store are streamed for many epochs.

    python benchmarks/stream_memory.py [--epochs 20] [--samples 8000] [--object-store 100] [--data FOLDER]

Starts its own Ray with a small object store, prepares drawn pets of 128 px (`--data` keeps them for the next time), and
reads training and validation of every epoch through one worker's reader, an actor as in training, but trains
nothing. Each epoch must be a permutation of the samples, and the very order of `epoch_order`.

After each epoch it prints the memory of the session's processes by kind: private memory (USS) of each, and the object
store once, by what Ray says is in use. At the end, the slope by least squares over the epochs from the third.
"""

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np
import psutil
import ray
from processes import MB, slope, usage

from unet.cluster.session import ray_session
from unet.data.ingest import Ingest, shards
from unet.data.manifest import MANIFEST
from unet.data.order import PADDING, epoch_order, window_of
from unet.data.preparing.pieces import Recipe
from unet.data.preparing.prepare import prepare
from unet.data.shards import Prepared
from unet.storage import Folder

SIZE, BATCH, SEED, SETTLED = 128, 64, 7, 3
KINDS = {"ray::Reader": "reader", "ray::": "Ray workers", "/raylet": "raylet"}
COLUMNS = ("driver", *KINDS.values(), "other Ray")


@ray.remote(num_cpus=1)
class Reader:
    """A worker of training that only reads."""

    def __init__(self, shard):
        self.shard, self.reader = shard, None

    def epoch(self, epoch: int) -> np.ndarray:
        """The training indices of an epoch, in the order they came; its validation is read too."""
        self.reader = self.reader or self.shard.reader()  # a stream starts when it is opened
        indices = np.concatenate([batch.indices for batch in self.reader.train(epoch)])
        for _ in self.reader.validation(epoch):
            pass
        return indices[indices != PADDING]


def memory() -> dict[str, float]:
    """MB by kind, of all processes of the session."""
    found = {kind: used.private for kind, used in usage(psutil.Process(), KINDS, "other Ray").items()}
    return found | {"total": sum(found.values())}


def object_store() -> float:
    """MB in use."""
    total, free = (found().get("object_store_memory", 0) for found in (ray.cluster_resources, ray.available_resources))
    return (total - free) / MB


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--samples", type=int, default=8000)
    parser.add_argument("--object-store", type=int, default=100, help="MB")
    parser.add_argument("--data", help="a folder of prepared data of 128 px; made there if missing")
    options = parser.parse_args()
    ray.init("local", object_store_memory=options.object_store * MB, logging_level="ERROR", log_to_driver=False)
    with tempfile.TemporaryDirectory() as scratch, ray_session():
        folder = Folder(Path(options.data).resolve() if options.data else f"{scratch}/shards")
        if not folder.exists(MANIFEST):
            prepare(f"synthetic:{options.samples}", folder, Recipe(SIZE))
        read(Prepared(folder), options.epochs, options.object_store * MB)
    ray.shutdown()


def read(prepared: Prepared, epochs: int, store: int) -> None:
    samples = prepared.count("train")
    plan = Ingest(prepared.folder.uri, SIZE, prepared.manifest.counts, BATCH, SEED, epochs, lambda: (1, 0), store // 2)
    size = sum(prepared.bytes_in_memory(split) for split in ("train", "val"))
    print(f"{samples:,} training samples, {size / MB:.0f} MB an epoch, object store {store / MB:.0f} MB", flush=True)
    reader = Reader.remote(shards(plan, 1)[0])
    rows = []
    print("".join(f"{name:>13}" for name in ("epoch", *COLUMNS, "total", "object store", "images/s")))
    for epoch in range(1, epochs + 1):
        begun = time.perf_counter()
        indices = ray.get(reader.epoch.remote(epoch))
        speed = prepared.count("train") / (time.perf_counter() - begun)
        if not np.array_equal(np.sort(indices), np.arange(samples)):
            raise SystemExit(f"Epoch {epoch} did not read every sample exactly once.")
        if not np.array_equal(indices, epoch_order(samples, SEED, epoch, window_of(SIZE))):
            raise SystemExit(f"Epoch {epoch} came in another order.")
        rows.append(memory() | {"object store": object_store()})
        values = "".join(f"{value:13.1f}" for value in rows[-1].values())
        print(f"{epoch:13d}{values}{speed:13.0f}", flush=True)
    settled = rows[SETTLED - 1 :]
    slopes = "".join(f"{slope([row[name] for row in settled]):13.2f}" for name in rows[0])
    print(f"{'MB an epoch':>13}{slopes}   over epochs {SETTLED}-{epochs}; all in order, every sample once")


if __name__ == "__main__":
    main()
