"""Every kind of damage to prepared data is found and named, by `--verify` and by a training that reads them."""

import json
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from unet.data.manifest import MANIFEST, SAMPLES
from unet.data.preparing.pieces import Recipe
from unet.data.preparing.prepare import prepare
from unet.data.preparing.verify import verify
from unet.data.shards import Prepared
from unet.errors import InputError
from unet.storage import Folder


@pytest.fixture(scope="module")
def whole(ray_cluster, packed, tmp_path_factory) -> Path:
    target = tmp_path_factory.mktemp("whole") / "shards"
    prepare(str(packed), Folder(target), Recipe(32, original_masks=True))
    return target


def rewrite(path: Path, change) -> None:
    table = pq.read_table(path)
    pq.write_table(change(table), path, row_group_size=256)


def swap(table: pa.Table, column: str) -> pa.Table:
    """The first two rows' values of a column exchanged."""
    values = table[column].to_pylist()
    values[0], values[1] = values[1], values[0]
    field = table.schema.field(column)
    return table.set_column(table.column_names.index(column), field, pa.array(values, field.type))


def flip(path: Path, content: bytes) -> None:
    """Flip a bit in the middle of where these bytes stand in a file."""
    data = bytearray(path.read_bytes())
    data[data.index(content) + len(content) // 2] ^= 1
    path.write_bytes(data)


def edit(path: Path, **changes) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


SHARD_DAMAGES = {
    "bit of an image": lambda f, t, row: flip(t, row["image"]),
    "bit of a mask": lambda f, t, row: flip(t, row["mask"]),
    "bit of an original mask": lambda f, t, row: flip(t, row["mask_original"]),
    "truncated": lambda f, t, row: t.write_bytes(t.read_bytes()[:-2000]),
    "missing": lambda f, t, row: t.unlink(),
    "empty": lambda f, t, row: t.write_bytes(b""),
    "swapped masks": lambda f, t, row: rewrite(t, lambda table: swap(table, "mask")),
    "swapped names": lambda f, t, row: rewrite(t, lambda table: swap(table, "name")),
    "a row less": lambda f, t, row: rewrite(t, lambda table: table.slice(1)),
    "another breed": lambda f, t, row: rewrite(t, lambda table: swap(table, "breed").slice(0)),
    "a torn file": lambda f, t, row: (f / f".{t.name}.0af31").write_bytes(b"PAR1"),
    "a folder for a shard": lambda f, t, row: t.unlink() or t.mkdir(),
    "another report": lambda f, t, row: (f / "data_report.html").write_text("<script>"),
    "a shard more": lambda f, t, row: shutil.copy(t, f / "train-00001-of-00002.parquet"),
    "count in the manifest": lambda f, t, row: edit(f / MANIFEST, counts={"train": 1, "val": 1, "test": 1}),
    "digest in the manifest": lambda f, t, row: edit(f / MANIFEST, data_digest="0" * 64),
    "torn manifest": lambda f, t, row: (f / MANIFEST).write_text((f / MANIFEST).read_text()[:100]),
    "bit of samples.parquet": lambda f, t, row: flip(f / SAMPLES, row["name"].encode()),
}
NAMED = {"bit of an image", "bit of a mask", "swapped masks", "swapped names"}


@pytest.mark.parametrize("kind", SHARD_DAMAGES)
def test_damaged_shards_are_found_and_named(whole, tmp_path, kind):
    folder = shutil.copytree(whole, tmp_path / "shards")
    shard = next(folder.glob("train-*.parquet"))
    row = pq.read_table(shard).slice(0, 1).to_pylist()[0]
    SHARD_DAMAGES[kind](folder, shard, row)
    damage = list(verify(Folder(folder), lambda *a: None))
    changed = {"a shard more": "train-00001-of-00002.parquet", "bit of samples.parquet": SAMPLES}
    changed |= {"a torn file": f".{shard.name}.0af31", "another report": "data_report.html"}
    place = MANIFEST if "manifest" in kind else changed.get(kind, shard.name)
    assert place in {file for file, _ in damage}
    assert kind not in NAMED or any(row["name"] in words for _, words in damage)


@pytest.mark.parametrize("kind", [*NAMED, "truncated", "missing", "empty", "digest in the manifest", "torn manifest"])
def test_training_never_reads_changed_pixels(whole, tmp_path, kind):
    folder = shutil.copytree(whole, tmp_path / "shards")
    shard = next(folder.glob("train-*.parquet"))
    SHARD_DAMAGES[kind](folder, shard, pq.read_table(shard).slice(0, 1).to_pylist()[0])
    with pytest.raises(InputError, match=r"again"):
        Prepared(Folder(folder)).read_checked("train", 0)
