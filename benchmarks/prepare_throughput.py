"""Preparing shards against a plain Pillow loop that makes the same pixels, in turn on the same cores.

    python benchmarks/prepare_throughput.py [--rounds 3] [--originals 2000] [--small 8000] [--photos FOLDER]

The loop opens, converts, resizes to 128 px (photos bilinear, masks nearest), collects uint8 arrays and saves them once
with `np.save`: no digests, no checks, no fsync. It runs as one process and as one a core, which are started before the
clock. The job prepares the same folder in a warm Ray session, from its listing to the manifest; Ray's start and the
drawing of the report are shown apart. Photos are drawn, saved as JPEG of quality 93 and shifted a little from
copy to copy, unless a folder in the official layout is given.

Images/s per core are images by CPU seconds of all processes concerned, so waiting for the disk does not count there;
they are compared with the loop on all cores, which is busy on as many as the job.
Ratios are taken within a round and their medians printed, since a shared machine's speed drifts.
"""

import argparse
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import psutil
from PIL import Image

SIZE, DRAWINGS, SHIFT, CORES = 128, 200, 3, os.cpu_count()
KINDS = ("loop, 1 process", f"loop, {CORES} processes", "job", "job, decoding")


def draw(folder: Path, count: int, height: int, width: int) -> Path:
    """Drawn pets in the official layout; the copies of a drawing are shifted sideways, so no two files are alike."""
    from unet.data.synthetic import draw_pet

    (folder / "images").mkdir(parents=True)
    (folder / "annotations" / "trimaps").mkdir(parents=True)
    for first in range(min(DRAWINGS, count)):
        image, mask = (a[:height] for a in draw_pet(first, width))
        for copy, i in enumerate(range(first, count, DRAWINGS)):
            shifted = np.roll(image, SHIFT * copy, 1), np.roll(mask + 1, SHIFT * copy, 1)
            Image.fromarray(shifted[0]).save(folder / "images" / f"drawn_{i}.jpg", quality=93)
            Image.fromarray(shifted[1]).save(folder / "annotations" / "trimaps" / f"drawn_{i}.png")
    for split, numbers in (("trainval", range(0, count * 4 // 5)), ("test", range(count * 4 // 5, count))):
        (folder / "annotations" / f"{split}.txt").write_text("".join(f"drawn_{i}\n" for i in numbers))
    return folder


def files_of(folder: Path) -> list[tuple[str, str]]:
    names = [
        line.split()[0]
        for split in ("trainval", "test")
        for line in (folder / "annotations" / f"{split}.txt").read_text().splitlines()
        if line and not line.startswith("#")
    ]
    return [(f"{folder}/images/{name}.jpg", f"{folder}/annotations/trimaps/{name}.png") for name in names]


def loop(files: list[tuple[str, str]], target: str) -> None:
    images = np.empty((len(files), SIZE, SIZE, 3), np.uint8)
    masks = np.empty((len(files), SIZE, SIZE), np.uint8)
    for i, (photo, mask) in enumerate(files):
        images[i] = Image.open(photo).convert("RGB").resize((SIZE, SIZE), Image.Resampling.BILINEAR)
        masks[i] = Image.open(mask).resize((SIZE, SIZE), Image.Resampling.NEAREST)
    masks -= 1
    np.save(f"{target}-images.npy", images)
    np.save(f"{target}-masks.npy", masks)


def run_loop(files: list, processes: int) -> tuple[float, float]:
    """(seconds, CPU seconds)"""
    with tempfile.TemporaryDirectory() as folder, multiprocessing.get_context("spawn").Pool(processes) as pool:
        pool.starmap(loop, [(files[i : i + 1], f"{folder}/warm-{i}") for i in range(4 * processes)], chunksize=1)
        parts = [(files[i::processes], f"{folder}/{i}") for i in range(processes)]
        return measured(lambda: pool.starmap(loop, parts, chunksize=1))


def run_job(folder: Path) -> dict[str, float]:
    """Seconds and CPU seconds of the whole, and seconds of its parts."""
    from unet.data.preparing.pieces import Recipe
    from unet.data.preparing.prepare import prepare
    from unet.data.sources.find import open_source, version_of
    from unet.storage import Folder

    ends, cpu = {}, {}

    def progress(what: str, done: int, total: int) -> None:
        ends[what], cpu[what] = time.perf_counter(), cpu_seconds()

    with tempfile.TemporaryDirectory() as target:
        listing, _ = measured(
            lambda: (version_of(str(folder)), open_source(str(folder), 0.1, Path(target), None, None, progress))
        )
        begun, cpu_begun = time.perf_counter(), cpu_seconds()
        manifest = prepare(str(folder), Folder(f"{target}/shards"), Recipe(SIZE), progress=progress)
        ended, report = time.perf_counter(), "drawing data_report.html"
    return {
        "images": sum(manifest.counts.values()),
        "listing": listing,
        "decoding": ends["preparing data"] - begun - listing,
        "decoding cpu": cpu["preparing data"] - cpu_begun,
        "shards": ends["writing shards"] - ends["preparing data"],
        "whole": ends[report] - begun,
        "whole cpu": cpu[report] - cpu_begun,
        "report": ended - ends[report],
    }


def measured(work: Callable[[], object]) -> tuple[float, float]:
    begun, cpu_begun = time.perf_counter(), cpu_seconds()
    work()
    return time.perf_counter() - begun, cpu_seconds() - cpu_begun


def cpu_seconds() -> float:
    """Of this process and all below it, ended ones included."""
    me, total = psutil.Process(), 0.0
    for process in [me, *me.children(recursive=True)]:
        try:
            total += sum(process.cpu_times()[:4])
        except psutil.NoSuchProcess:
            continue
    return total


def compare(folder: Path, title: str, rounds: int) -> None:
    files, speeds, parts = files_of(folder), {kind: [] for kind in KINDS}, []  # speeds: (images, seconds, CPU seconds)
    for number in range(rounds):
        # In another order each round: who comes first finds less memory ready for its pages.
        for kind in (KINDS[:3] * 2)[number % 3 : number % 3 + 3]:
            if kind != "job":
                speeds[kind].append((len(files), *run_loop(files, 1 if kind == KINDS[0] else CORES)))
                continue
            job = run_job(folder)
            speeds["job"].append((job["images"], job["whole"], job["whole cpu"]))
            speeds["job, decoding"].append((job["images"], job["decoding"], job["decoding cpu"]))
            parts.append(job)
        shown = "  ".join(f"{k} {r[-1][0] / r[-1][1]:.0f}" for k, r in speeds.items())
        print(f"round {number + 1}: {shown} images/s", flush=True)
    print(f"\n{title}, {len(files):,} samples to {SIZE} px, {CORES} cores: medians")
    for kind in KINDS:
        speed, per_core = (statistics.median(r[0] / r[i] for r in speeds[kind]) for i in (1, 2))
        ratios = []
        for base in KINDS[:2]:
            pairs = zip(speeds[kind], speeds[base], strict=True)
            ratios.append(statistics.median((a[0] / a[1]) / (b[0] / b[1]) for a, b in pairs))
        pairs = zip(speeds[kind], speeds[KINDS[1]], strict=True)
        core = statistics.median((a[0] / a[2]) / (b[0] / b[2]) for a, b in pairs)
        print(
            f"{kind:>17}  {speed:6.0f} images/s, {ratios[0]:.2f} of 1 process, {ratios[1]:.2f} of {CORES}"
            f"  |  {per_core:6.0f} a CPU second, {core:.2f} of the loop on {CORES}"
        )
    shown = ", ".join(f"{p} {statistics.median(j[p] for j in parts):.1f}" for p in ("listing", "decoding", "shards"))
    print(f"seconds: {shown}; and {statistics.median(j['report'] for j in parts):.1f} to draw the report\n", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--originals", type=int, default=2000, help="photos of 500x375 to draw; 0 leaves them out")
    parser.add_argument("--small", type=int, default=8000, help="photos of 128x128 to draw; 0 leaves them out")
    parser.add_argument("--photos", type=Path, help="a folder in the official layout, unpacked, instead of drawn pets")
    options = parser.parse_args()
    from unet.cluster.session import ray_session
    from unet.data.preparing.pieces import Recipe
    from unet.data.preparing.prepare import prepare
    from unet.storage import Folder

    begun = time.perf_counter()
    with tempfile.TemporaryDirectory() as scratch, ray_session():
        started = time.perf_counter()
        prepare("synthetic:400", Folder(f"{scratch}/warm"), Recipe(16))
        print(
            f"Ray's start {started - begun:.1f} s, a first small job {time.perf_counter() - started:.1f} s", flush=True
        )
        if options.photos:
            compare(options.photos, str(options.photos), options.rounds)
            return
        for count, height, width in ((options.originals, 375, 500), (options.small, SIZE, SIZE)):
            if count:
                folder = draw(Path(scratch) / f"{width}x{height}", count, height, width)
                compare(folder, f"Photos of {width}x{height}", options.rounds)


if __name__ == "__main__":
    main()
