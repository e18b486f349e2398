"""Images/s from shards to tensors, against `tf.data` over TFRecord files of the same pixels, in turn on the same cores.

    python benchmarks/ingest_throughput.py [--rounds 3] [--samples 4096] [--epochs 4] [--data FOLDER]

One worker reads batches of 64 at 128 px, mirrors each sample or not, and makes tensors of images and masks. `tf.data`
reads raw bytes in `tf.train.Example` with a shuffle buffer as wide as the job's window, decodes and mirrors samples
in parallel on all cores; its kept form caches the decoded samples in memory. The job uses one thread to assemble
batches, since in training the cores are the network's.

Where data are kept, the epoch that fills the cache is left out, as is the job's reading into the object store; where
they are streamed, the start of the execution of Ray Data is: the clock starts at the first batch, and the job's
first epoch compares every sample with its digest. The shards come from drawn pets unless `--data` names a prepared
folder.
"""

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import tensorflow as tf

from unet.cluster.session import ray_session
from unet.data.ingest import Ingest, keep, shards
from unet.data.order import CHUNK, window_of
from unet.data.preparing.pieces import Recipe
from unet.data.preparing.prepare import prepare
from unet.data.shards import Prepared
from unet.storage import Folder

BATCH, SIZE, FILES = 64, 128, 4
STREAM_MEMORY = int(1e9)


def write_records(prepared: Prepared, folder: Path) -> list[str]:
    """The training split as TFRecord files, as many as there are shards."""
    paths = [str(folder / f"train-{i}.tfrecord") for i in range(FILES)]
    writers = [tf.io.TFRecordWriter(path) for path in paths]
    for chunk in range(len(prepared.chunks["train"])):
        table = prepared.read_chunk("train", chunk)
        for image, mask in zip(table["image"].to_pylist(), table["mask"].to_pylist(), strict=True):
            feature = {
                key: tf.train.Feature(bytes_list=tf.train.BytesList(value=[value]))
                for key, value in (("image", image), ("mask", mask))
            }
            example = tf.train.Example(features=tf.train.Features(feature=feature))
            writers[chunk % FILES].write(example.SerializeToString())
    for writer in writers:
        writer.close()
    return paths


def tf_data(paths: list[str], kept: bool) -> tf.data.Dataset:
    features = {key: tf.io.FixedLenFeature([], tf.string) for key in ("image", "mask")}

    def decode(record):
        parsed = tf.io.parse_single_example(record, features)
        image = tf.reshape(tf.io.decode_raw(parsed["image"], tf.uint8), (SIZE, SIZE, 3))
        return image, tf.reshape(tf.io.decode_raw(parsed["mask"], tf.uint8), (SIZE, SIZE))

    def mirrored(image, mask):
        # A branch a sample: reversing whole batches and choosing is several times slower.
        flip = tf.random.uniform([]) < 0.5
        return tf.cond(flip, lambda: (tf.reverse(image, [1]), tf.reverse(mask, [1])), lambda: (image, mask))

    records = tf.data.TFRecordDataset(paths, num_parallel_reads=tf.data.AUTOTUNE)
    if kept:
        shuffled = records.map(decode, tf.data.AUTOTUNE).cache().shuffle(window_of(SIZE) * CHUNK)
        samples = shuffled.map(mirrored, tf.data.AUTOTUNE)
    else:
        samples = records.shuffle(window_of(SIZE) * CHUNK).map(
            lambda record: mirrored(*decode(record)), tf.data.AUTOTUNE
        )
    return samples.batch(BATCH).prefetch(tf.data.AUTOTUNE)


def time_tf(paths: list[str], kept: bool, epochs: int, samples: int) -> float:
    dataset = tf_data(paths, kept)
    for _ in dataset if kept else dataset.take(1):
        pass
    begun, seen = time.perf_counter(), 0
    for _ in range(epochs):
        for images, _masks in dataset:
            seen += images.shape[0]
    assert seen == epochs * samples
    return seen / (time.perf_counter() - begun)


def time_job(prepared: Prepared, kept: bool, epochs: int) -> float:
    plan = Ingest(
        folder=prepared.folder.uri,
        image_size=SIZE,
        samples={"train": prepared.count("train"), "val": 0, "test": 0},
        batch_size=BATCH,
        seed=1,
        epochs=epochs + kept,
        start=(1, 0),
        memory=STREAM_MEMORY,
    )
    reader = shards(keep(plan) if kept else plan, 1)[0].reader()
    tensors = _tensors(reader, range(1, plan.epochs + 1))
    if kept:
        for _ in range(plan.plan("train", 1).steps):
            next(tensors)
        begun, seen = time.perf_counter(), 0
    else:
        next(tensors)
        begun, seen = time.perf_counter(), -BATCH
    seen += plan.samples["train"] * epochs
    for _ in tensors:
        pass
    return seen / (time.perf_counter() - begun)


def _tensors(reader, epochs: range) -> Iterator[tuple[tf.Tensor, tf.Tensor]]:
    for epoch in epochs:
        for batch in reader.train(epoch):
            yield tf.constant(batch.images), tf.constant(batch.masks)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--samples", type=int, default=4096, help="of training, about")
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--data", help="a prepared folder of 128 px instead of drawn pets; made there if missing")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch, ray_session():
        folder = Folder(options.data or f"{scratch}/shards")
        if not folder.exists("manifest.json"):
            prepare(f"synthetic:{options.samples * 10 // 7}", folder, Recipe(SIZE))
        prepared = Prepared(folder)
        samples, paths = prepared.count("train"), write_records(prepared, Path(scratch))
        results = {}
        for number in range(options.rounds):
            for kept in (True, False):
                way = "kept" if kept else "streamed"
                for kind, speed in (
                    ("tf.data", time_tf(paths, kept, options.epochs, samples)),
                    ("job", time_job(prepared, kept, options.epochs)),
                ):
                    results.setdefault((way, kind), []).append(speed)
            shown = "  ".join(f"{' '.join(key)} {speeds[-1]:,.0f}" for key, speeds in results.items())
            print(f"round {number + 1}: {shown} images/s", flush=True)
    print(f"\n{samples:,} samples of {SIZE} px, batch {BATCH}, {options.epochs} epochs: medians")
    for (way, kind), speeds in results.items():
        pairs = zip(speeds, results[way, "tf.data"], strict=True)
        ratio = statistics.median(a / b for a, b in pairs)
        print(f"{way:>9} {kind:<8} {statistics.median(speeds):8,.0f} images/s  ratio {ratio:.2f}")


if __name__ == "__main__":
    main()
