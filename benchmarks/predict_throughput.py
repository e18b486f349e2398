"""Images/s of jobs/predict.py against the fastest bare loop we know, in turn on the same cores and photos.

    python benchmarks/predict_throughput.py [--rounds 3] [--photos 2000] [--image-size 128] [--base-filters 16]

The loop is one process: a thread decodes and shrinks photos ahead (Pillow), batches of 16 go through a `tf.function`
with as many threads as there are cores, another thread enlarges, takes the likeliest class and writes the same masks
and overlays. It uses the job's own functions for pictures, which are the fastest we know; it checks nothing, keeps no
record, and runs on no second machine. It is also timed without the second thread. The job is `unet.prediction` with
one worker and with as many as there are cores.

Starts are left out and shown apart: of the loop TensorFlow's, tracing and the first batch; of the job the time until
its first photos are through. The job's photos in flight when its clock starts would count for it, so it is timed from
a quarter of the photos to nine tenths, where as many are in flight at both ends. The network's weights are random,
which does not change its speed. Images by CPU seconds of all processes concerned, Ray's own included, say what each
way costs even where others use the machine. Photos are drawn, 500x375, JPEG of quality 93. Ratios are taken within a
round and their medians printed, since a shared machine's speed drifts.
"""

import argparse
import io
import multiprocessing
import os
import statistics
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image
from prepare_throughput import cpu_seconds

from unet.classes import PETS
from unet.config.use import PredictPart
from unet.models.trained import TrainedModel
from unet.recipe.network import ModelSettings
from unet.recipe.networks import describe

BATCH, CORES, DRAWINGS, SHIFT = 16, os.cpu_count(), 100, 3
LOOP, LOOP_AHEAD = "loop", "loop, reading ahead only"


def draw(folder: Path, count: int) -> None:
    """Drawn pets; the copies of a drawing are shifted sideways, so no two files are alike."""
    from unet.data.synthetic import draw_pet

    folder.mkdir()
    for first in range(min(DRAWINGS, count)):
        image, _ = draw_pet(first, 500)
        for copy, i in enumerate(range(first, count, DRAWINGS)):
            Image.fromarray(np.roll(image[:375], SHIFT * copy, 1)).save(folder / f"drawn_{i}.jpg", quality=93)


def model(image_size: int, base_filters: int) -> TrainedModel:
    network, rng = ModelSettings(base_filters=base_filters), np.random.default_rng(0)
    shapes = describe(network, len(PETS.classes)).variables
    weights = {name: rng.normal(0, 0.05, shape).astype(np.float32) for name, shape in shapes.items()}
    return TrainedModel("random", network, image_size, "stretch", PETS.classes, weights, "", None, "random", "")


def loop(folder: Path, output: Path, trained: TrainedModel, writes_ahead: bool, answer) -> None:
    """Send (images/s, seconds of start, images a CPU second)."""
    begun = time.perf_counter()
    from unet.cluster.devices import start_tensorflow
    from unet.data import decode
    from unet.data.resize import to_square
    from unet.models.inference import Network
    from unet.pages.pictures import overlay
    from unet.prediction.enlarge import bands, likeliest

    start_tensorflow(CORES)
    network, palette = Network(trained), bytes(c for info in trained.classes for c in info.colour)
    files = sorted(folder.iterdir())

    def read(first: int) -> tuple[np.ndarray, list]:
        photos = [
            decode.photo(str(path), lambda name: Path(name).read_bytes()) for path in files[first : first + BATCH]
        ]
        squares = [to_square(p, trained.image_size, trained.resize, decode.BILINEAR, 0) for p in photos]
        return np.stack(squares), [np.asarray(photo.convert("L")) for photo in photos]

    def write(first: int, probabilities: np.ndarray, greys: list) -> None:
        for path, found, grey in zip(files[first : first + BATCH], probabilities, greys, strict=True):
            planes = np.ascontiguousarray(np.moveaxis(found, -1, 0))
            ids = np.concatenate([likeliest(band)[0] for _, band in bands(planes, *grey.shape)])
            mask = Image.frombuffer("P", grey.shape[::-1], ids, "raw", "P", 0, 1)
            mask.putpalette(palette)
            for name, picture, options in (
                (f"masks/{path.stem}.png", mask, {"compress_level": 1}),
                (f"overlays/{path.stem}.jpg", overlay(grey, ids, trained.classes), {"quality": 88}),
            ):
                content = io.BytesIO()
                picture.save(content, "PNG" if picture is mask else "JPEG", **options)
                (output / name).write_bytes(content.getbuffer())

    for name in ("masks", "overlays"):
        (output / name).mkdir(parents=True)
    with ThreadPoolExecutor(1) as reader, ThreadPoolExecutor(1) as writer:
        started, ahead, writing = None, reader.submit(read, 0), None
        for first in range(0, len(files), BATCH):
            squares, greys = ahead.result()
            ahead = reader.submit(read, min(first + BATCH, len(files) - 1))
            probabilities = network.probabilities(squares)
            if not writes_ahead:
                write(first, probabilities, greys)
            else:
                if writing:
                    writing.result()
                writing = writer.submit(write, first, probabilities, greys)
            if not started:
                started, cpu = time.perf_counter(), cpu_seconds()
        if writing:
            writing.result()
    seconds, cpu = time.perf_counter() - started, cpu_seconds() - cpu
    answer.send(((len(files) - BATCH) / seconds, started - begun, (len(files) - BATCH) / cpu))


def run_loop(folder: Path, trained: TrainedModel, writes_ahead: bool) -> tuple[float, float, float]:
    context = multiprocessing.get_context("spawn")
    mine, theirs = context.Pipe()
    with tempfile.TemporaryDirectory() as output:
        process = context.Process(target=loop, args=(folder, Path(output), trained, writes_ahead, theirs))
        process.start()
        found = mine.recv()
        process.join()
    return found


def run_job(folder: Path, trained: TrainedModel, workers: int) -> tuple[float, float, float]:
    """(images/s, seconds of start, images a CPU second)"""
    import pyarrow as pa

    from unet.cluster.nodes import cluster_nodes
    from unet.cluster.planner import plan_prediction
    from unet.prediction.photos import find_photos
    from unet.prediction.results import Results
    from unet.prediction.stages import Work
    from unet.prediction.stream import predicted
    from unet.storage import Folder

    with tempfile.TemporaryDirectory() as output:
        begun = time.perf_counter()
        results = Results.open(Folder(output), {}, trained.class_names)
        photos = find_photos(str(folder), Folder(output)).table
        photos = photos.append_column("name", pa.array([Path(file).stem for file in photos["file"].to_pylist()]))
        size = trained.image_size
        work = Work(str(folder), output, size, trained.resize, trained.classes, False, True, False, 1)
        fitted, done, times = plan_prediction(cluster_nodes(), workers), 0, []
        for rows in predicted(photos, work, trained, fitted, PredictPart(batch_size=BATCH)):
            results.add(rows)
            done += len(rows)
            times.append((done, time.perf_counter(), cpu_seconds()))
        results.save()
        assert done == len(photos) == len(list(Path(output, "masks").iterdir()))
    (first, start, cpu), (last, end, cpu_end) = (
        next(t for t in times if t[0] >= share * done) for share in (0.25, 0.9)
    )
    return (last - first) / (end - start), times[0][1] - begun, (last - first) / (cpu_end - cpu)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--photos", type=int, default=2000)
    parser.add_argument("--image-size", type=int, default=128)
    parser.add_argument("--base-filters", type=int, default=16)
    options = parser.parse_args()
    from unet.cluster.session import ray_session

    trained = model(options.image_size, options.base_filters)
    workers = sorted({1, CORES})
    kinds = [LOOP, LOOP_AHEAD, *(f"job, {n} worker{'s' * (n > 1)}" for n in workers)]
    runs = [lambda f: run_loop(f, trained, True), lambda f: run_loop(f, trained, False)]
    runs += [lambda f, n=n: run_job(f, trained, n) for n in workers]
    found = {kind: [] for kind in kinds}
    with tempfile.TemporaryDirectory() as scratch, ray_session():
        folder = Path(scratch) / "photos"
        draw(folder, options.photos)
        for number in range(options.rounds):
            order = list(zip(kinds, runs, strict=True))
            for kind, run in order[number % len(order) :] + order[: number % len(order)]:
                found[kind].append(run(folder))
            print(f"round {number + 1}: " + "  ".join(f"{k} {v[-1][0]:.1f}" for k, v in found.items()), flush=True)
    what = f"{options.image_size} px, {options.base_filters} filters"
    print(f"\n{options.photos:,} photos of 500x375, network of {what}, {CORES} cores: medians")
    for kind in kinds:
        speed, start, cpu = (statistics.median(r[i] for r in found[kind]) for i in (0, 1, 2))
        ratio, of_cpu = (
            statistics.median(a[i] / b[i] for a, b in zip(found[kind], found[LOOP], strict=True)) for i in (0, 2)
        )
        print(
            f"{kind:>24}  {speed:6.1f} images/s, {ratio:.2f} of the loop  |  {cpu:5.1f} a CPU second, {of_cpu:.2f}"
            f"  |  {start:.1f} s of start"
        )


if __name__ == "__main__":
    main()
