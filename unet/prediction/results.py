"""The folder of predictions: what is done, by which job, and `predictions.csv`.

Beside the pictures the folder holds `.predictions/`: a description of the job, and a file of rows for each group of
photos, written after their pictures. The same command reads them and continues; `predictions.csv` is made from them.
"""

import contextlib
import json
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from unet.errors import InputError, first_line
from unet.locks import Busy, held
from unet.storage import Folder

STATE, JOB, LOCK = ".predictions", ".predictions/job.json", ".predictions/lock"
TABLE = "predictions.csv"
MASKS, OVERLAYS, PROBABILITIES = "masks/{}.png", "overlays/{}.jpg", "probabilities/{}.npz"
KINDS = (MASKS, OVERLAYS, PROBABILITIES)


def row_schema(classes: int) -> pa.Schema:
    """The columns known for each photo, for C classes.

    file, size, mtime_ns: its name below the input, its bytes, and when it was changed.
    name: that of the files written for it, without folder and suffix.
    problem, detail: why there are no predictions, as a short name and in words; "" for a good photo.
    height, width: as it is displayed, in pixels.
    confidence: the likeliest class' probability, mean over the pixels.
    pixels: their number for each class.
    written: bytes of mask, overlay and probabilities; 0 for what was not asked for.
    """
    return pa.schema(
        [
            ("file", pa.string()),
            ("size", pa.int64()),
            ("mtime_ns", pa.int64()),
            ("name", pa.string()),
            ("problem", pa.string()),
            ("detail", pa.string()),
            ("height", pa.int32()),
            ("width", pa.int32()),
            ("confidence", pa.float64()),
            ("pixels", pa.list_(pa.int64(), classes)),
            ("written", pa.list_(pa.int64(), len(KINDS))),
        ]
    )


def part(number: int) -> str:
    """The file of a part's rows. If a photo has two rows, the one in the higher part counts."""
    return f"{STATE}/rows-{number:08d}.parquet"


def write_part(folder: Folder, number: int, rows: pa.Table) -> None:
    with folder.writing(part(number)) as stream:
        pq.write_table(rows, stream)


class Results:
    """What a folder holds of one model's predictions.

    Attributes:
        rows: `row_schema`, one per photo, by name.
        next_part: a number that no part has yet.
    """

    def __init__(self, folder: Folder, class_names: Sequence[str]):
        self.folder, self.class_names = folder, class_names
        self.next_part = 1 + max((int(name[5:13]) for name in self._parts()), default=0)
        self._added: list[pa.Table] = []
        self.rows = self._read()
        self._saved, self._seconds = time.monotonic(), 0.0

    @classmethod
    def open(cls, folder: Folder, job: dict, class_names: Sequence[str]) -> "Results":
        """The results of a job, which may have begun already. `job` describes it in plain JSON values.

        Raises:
            InputError: the folder holds those of another job.
        """
        refuse_others(folder, job)
        if not folder.exists(JOB):
            folder.write_text(JOB, json.dumps(job, indent=2))
        return cls(folder, class_names)

    def whole(self) -> dict[str, tuple]:
        """By file: (size, mtime_ns) of each photo whose predictions are all there, at the sizes that were written."""
        written = [_sizes(self.folder, kind.partition("/")[0]) for kind in KINDS]
        columns = (self.rows[name].to_pylist() for name in ("file", "size", "mtime_ns", "name", "problem", "written"))
        found = {}
        for file, size, mtime, name, problem, sizes in zip(*columns, strict=True):
            files = zip(written, KINDS, sizes, strict=True)
            if not problem and all(there.get(kind.format(name), 0) == bytes_ for there, kind, bytes_ in files):
                found[file] = size, mtime
        return found

    def add(self, rows: pa.Table) -> None:
        """Add rows of finished photos; now and then the whole `predictions.csv` is written again."""
        self._added.append(rows)
        # A long table takes a while to write: at most a twentieth of the time is spent on it.
        if time.monotonic() - self._saved > max(10, 20 * self._seconds):
            self.save()

    def save(self) -> None:
        """Write `predictions.csv`. Raises StorageFailed."""
        begun = time.monotonic()
        self.rows, self._added = _latest(pa.concat_tables([self.rows, *self._added])), []
        sink = pa.BufferOutputStream()
        pyarrow.csv.write_csv(self._csv(), sink)
        self.folder.write_bytes(TABLE, sink.getvalue())
        self._saved = time.monotonic()
        self._seconds = self._saved - begun

    def merge(self) -> None:
        """Merge all parts into one, so that the next start reads a single file. No other process may be writing."""
        write_part(self.folder, self.next_part, self.rows)
        state = self.folder / STATE
        for name in self._parts():
            if name != part(self.next_part).rpartition("/")[2]:
                state.fs.delete_file(state.at(name))

    def catch_up(self) -> None:
        """Add the rows of groups whose tasks finished without their rows reaching this process."""
        self._added.append(self._read())

    def _parts(self) -> list[str]:
        return [name for name in (self.folder / STATE).names() if name.startswith("rows-")]

    def _read(self) -> pa.Table:
        schema, state = row_schema(len(self.class_names)), self.folder / STATE
        paths = [state.at(name) for name in self._parts()]
        if not paths:
            return schema.empty_table()

        def read(path: str) -> pa.Table:
            with state.fs.open_input_file(path) as stream:
                return pq.read_table(stream, schema=schema)

        try:
            with ThreadPoolExecutor() as pool:
                table = pa.concat_tables(pool.map(read, paths))
        except (pa.ArrowException, OSError) as error:
            raise InputError(
                f"{state} is damaged ({error}): give another --output, or remove {self.folder}."
            ) from error
        return _latest(table)

    def _csv(self) -> pa.Table:
        rows = self.rows
        good, name = pc.equal(rows["problem"], ""), rows["name"]
        columns = {"file": rows["file"], "status": pc.if_else(good, "done", rows["problem"])}
        columns |= {key: rows[key] for key in ("height", "width")}
        written = _columns(rows["written"], len(KINDS))
        for kind, sizes in zip(KINDS, written, strict=True):
            if sizes.any() or kind == MASKS:
                folder, _, suffix = kind.partition("{}")
                paths = pc.binary_join_element_wise(folder, name, suffix, "")
                columns[{MASKS: "mask", OVERLAYS: "overlay"}.get(kind, "probabilities")] = pc.if_else(good, paths, None)
        columns["confidence"] = pc.round(rows["confidence"], 4)
        pixels = _columns(rows["pixels"], len(self.class_names))
        for class_name, count in zip(self.class_names, pixels, strict=True):
            columns[f"pixels_{class_name}"] = pc.if_else(good, pa.array(count), None)
        total = np.maximum(sum(pixels), 1)
        for class_name, count in zip(self.class_names, pixels, strict=True):
            columns[f"share_{class_name}"] = pc.if_else(good, pa.array(np.round(count / total, 6)), None)
        return pa.table(columns | {"problem": rows["detail"]})


def refuse_others(folder: Folder, job: dict) -> None:
    """Refuse a folder with the predictions of another job; nothing is touched.

    Raises:
        InputError: says what differs.
    """
    if not folder.exists(JOB):
        theirs = {TABLE, *(kind.partition("/")[0] for kind in KINDS)}.intersection(folder.names())
        if theirs:
            raise InputError(
                f"{folder} holds {' and '.join(sorted(theirs))} that this job did not write: give another --output."
            )
        return
    try:
        found = json.loads(folder.read_text(JOB))
        differing = [key for key in job if found.get(key) != job[key]]
    except (ValueError, AttributeError) as error:
        raise InputError(f"{folder}/{JOB} is damaged: give another --output, or remove {folder}.") from error
    if differing:
        words = ", ".join(f"{key} {found.get(key)} there, {job[key]} here" for key in differing)
        raise InputError(f"{folder} holds predictions of another job ({words}): give another --output, or remove it.")


@contextlib.contextmanager
def locked(folder: Folder) -> Iterator[None]:
    """Let one job at a time write to a folder.

    Raises:
        InputError: another one does.
    """
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(held(folder, LOCK))
        except Busy as error:
            raise InputError(f"Another job is predicting into {folder} ({error}): wait for it, or stop it.") from error
        yield


def _latest(table: pa.Table) -> pa.Table:
    """The last row of each file, by file."""
    codes = table["file"].combine_chunks().dictionary_encode()
    last = np.zeros(len(codes.dictionary), np.int64)
    last[codes.indices.to_numpy()] = np.arange(len(table))
    return table.take(pa.array(last)).sort_by("file")


def _columns(lists: pa.ChunkedArray, width: int) -> np.ndarray:
    """int64 (width, rows) of fixed-size lists."""
    return lists.combine_chunks().flatten().to_numpy().reshape(-1, width).T


def _sizes(folder: Folder, name: str) -> dict[str, int]:
    """The size of each file below one of its folders, by name relative to `folder`."""
    place = folder / name
    selector = pafs.FileSelector(place.path, allow_not_found=True, recursive=True)
    try:
        found = [info for info in place.fs.get_file_info(selector) if info.type == pafs.FileType.File]
    except OSError as error:
        raise InputError(f"Cannot read {place}: {first_line(error)}. Fix that, or give another --output.") from error
    return {f"{name}/{info.path.removeprefix(f'{place.path}/')}": info.size for info in found}
