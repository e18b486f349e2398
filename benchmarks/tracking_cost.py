"""What it costs a training to send its epochs to MLflow, beside the time that its steps take.

    python benchmarks/tracking_cost.py RUN_FOLDER

Sends a finished run (of `jobs/train.py`) once more, epoch by epoch as while it trained, to a new store over sqlite.
The time of the main thread is what the job's driver does not do meanwhile; the processor time of the whole process is
what workers on the same machine may miss. Both are medians over the epochs, as shares of what an epoch took.
"""

import argparse
import shutil
import statistics
import tempfile
import time
from itertools import pairwise
from pathlib import Path

from unet.config import TrainSettings, read_config, unflat
from unet.metric_names import SPEED
from unet.runs.run import METRICS, Run
from unet.storage import Folder
from unet.tracking.images import IMAGES, parsed
from unet.tracking.send import begin, shown, tell
from unet.tracking.writer import AsyncWriter


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="the folder of a finished run")
    source = parser.parse_args().run
    with tempfile.TemporaryDirectory() as scratch:
        storage = Path(scratch)
        shutil.copytree(source, storage / source.name)
        settings = unflat(TrainSettings, read_config(Folder(source)) | {"storage_path": scratch, "tracking_uri": None})
        run = Run.load(source.name, settings)
        run.summary |= {"mlflow_run_id": None, "mlflow_experiment_id": None}
        history, pictures = run.history(), (run.folder / IMAGES).names()
        lines = (storage / source.name / METRICS).read_text().splitlines(keepends=True)
        writer = AsyncWriter(Folder(scratch), "cost", None, print)
        (storage / source.name / METRICS).write_text("")
        begin(run, writer)
        assert writer.deliver(60)
        main_thread, processor = [], []
        for epoch, record in enumerate(history, 1):
            (storage / source.name / METRICS).write_text("".join(lines[:epoch]))
            began, used = time.perf_counter(), time.process_time()
            writer.epoch(record)
            tell(run, writer)
            for name in pictures:
                if parsed(name)[1] == record["epoch"]:
                    shown(run, name, writer)
            main_thread.append(time.perf_counter() - began)
            assert writer.deliver(60)
            processor.append(time.process_time() - used)
        writer.close()
    samples = statistics.median(after["step"] - before["step"] for before, after in pairwise(history))
    seconds = samples * settings.training.batch_size / statistics.median(record[SPEED] for record in history)
    print(f"{len(history)} epochs of {seconds:.1f} s of steps")
    for words, times in (("main thread", main_thread), ("processor", processor)):
        middle = statistics.median(times)
        print(f"{words}: {1000 * middle:.0f} ms an epoch, {middle / seconds:.2%} (at most {max(times) / seconds:.2%})")


if __name__ == "__main__":
    main()
