"""What an evaluation records of each image: a row of `per_image.parquet`, from which all scores and pictures follow.

Counts are exact integers, so sums over any images, in any order, are exact too.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import pyarrow as pa

from unet.data.plain import open_parquet
from unet.evaluation.counts import CELLS, Counts, cells_of
from unet.evaluation.intervals import score_vector

PART_BYTES = 2**25
_MATRIX = pa.list_(pa.int64())


def record_schema() -> pa.Schema:
    """The columns, for C classes.

    name, split, breed, species: of the sample; breed and species are "" where they are not known.
    height, width: of the photo before it was resized, in pixels.
    confusion: the counts at the network's size, as `unet.evaluation.counts.CELLS`; in `per_image.parquet` as int64 C*C,
        row-major, row = truth, column = predicted (`written`).
    confusion_band: the same near the border between two classes of the truth (`unet.borders.near_border`).
    confusion_own: the same at the photo's own size; null where the masks of that size were not kept.
    loss_sums: the sums of the terms of the model's loss over the image (`unet.recipe.loss`); of cross-entropy its total
        over the valid pixels, and their number.
    doubt: how surely the model disagrees with the mask: the mean over the valid pixels of the likeliest class'
        probability minus that of the true class (0-1); null where no pixel is valid.
    predicted: PNG bytes (8 bit, class ids) of the prediction at the network's size; 255 in a letterbox' padding.
    """
    return pa.schema(
        [
            ("name", pa.string()),
            ("split", pa.string()),
            ("breed", pa.string()),
            ("species", pa.string()),
            ("height", pa.int32()),
            ("width", pa.int32()),
            ("confusion", CELLS),
            ("confusion_band", CELLS),
            ("confusion_own", CELLS),
            ("loss_sums", pa.list_(pa.float64())),
            ("doubt", pa.float64()),
            ("predicted", pa.binary()),
        ]
    )


def is_measured(records: pa.Table, view: str) -> bool:
    """Whether every image has a view's counts; "confusion" always has, and "confusion_band" unless it was not read."""
    return view in records.column_names and records[view].null_count == 0


def counts_of(records: pa.Table, view: str, classes: int) -> Counts:
    """The counts of a view that `is_measured`."""
    return Counts.of_column(records[view], classes)


def written(records: pa.Table, classes: int) -> Iterator[pa.Table]:
    """The records as `per_image.parquet` has them, in parts of about `PART_BYTES`: whole matrices, which any reader
    understands, take 8 C*C bytes per image and view in memory, but hardly any in the file."""
    rows = max(1, PART_BYTES // (8 * classes**2))
    for first in range(0, max(1, len(records)), rows):
        part = records.slice(first, rows)
        for view in (field.name for field in records.schema if field.type == CELLS):
            measured = is_measured(part, view)
            # Lists of no fixed size: pyarrow cannot read a null of fixed size from Parquet.
            values = _matrices(counts_of(part, view, classes)) if measured else pa.nulls(len(part), _MATRIX)
            part = part.set_column(part.column_names.index(view), view, values)
        yield part


def read_counts(content: bytes, classes: int) -> pa.Table:
    """The names and the counts at the network's size from a `per_image.parquet`, a part at a time.

    Raises:
        OSError, KeyError, ValueError: it holds something else.
    """
    file = open_parquet(pa.BufferReader(content))
    parts = []
    for group in range(file.num_row_groups):
        part = file.read_row_group(group, columns=["name", "confusion"])
        matrices = part["confusion"].combine_chunks().flatten().to_numpy().reshape(len(part), classes, classes)
        parts.append(pa.table({"name": part["name"], "confusion": pa.array([cells_of(m) for m in matrices], CELLS)}))
    return pa.concat_tables(parts)


def _matrices(counts: Counts) -> pa.Array:
    cells = counts.classes**2
    return pa.ListArray.from_arrays(
        pa.array(np.arange(len(counts) + 1, dtype=np.int32) * cells), pa.array(counts.matrices().reshape(-1))
    )


def with_scores(records: pa.Table, names: Sequence[str]) -> pa.Table:
    """The records with columns of scores at the network's size: iou_<class>, dice_<class>, mean_iou, mean_dice,
    accuracy; null where an image has nothing to measure."""
    vectors = score_vector(counts_of(records, "confusion", len(names)).sums())
    titles = [f"{kind}_{name}" for kind in ("iou", "dice") for name in names] + ["mean_iou", "mean_dice", "accuracy"]
    for title, values in zip(titles, vectors.T, strict=True):
        records = records.append_column(title, pa.array(values, pa.float64(), from_pandas=True))
    return records
