"""What the tests of pages share: prepared data to show, a reader of HTML, and that a page needs nothing else."""

import base64
import io
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from unet.classes import IGNORE, PETS
from unet.data.manifest import MANIFEST, SPLITS, Manifest
from unet.data.order import CHUNK
from unet.data.shards import Prepared, shard_schema
from unet.data.synthetic import draw_pet
from unet.storage import Folder


def write_prepared(folder: Path, rows: list[dict], classes=PETS.classes, **entries) -> Prepared:
    """A prepared folder of rows with image and mask arrays, in their order within each split."""
    folder.mkdir(parents=True)
    size = len(rows[0]["mask"])
    rows = [row for split in SPLITS for row in rows if row["split"] == split]
    counts = {split: sum(row["split"] == split for row in rows) for split in SPLITS}
    files = {split: [f"{split}.parquet"] if counts[split] else [] for split in SPLITS}
    for split, names in files.items():
        packed = [row | {key: row[key].tobytes() for key in ("image", "mask")} for row in rows if row["split"] == split]
        for name in names:
            pq.write_table(pa.Table.from_pylist(packed, shard_schema(size)), folder / name, row_group_size=CHUNK)
    shown = ("name", "split", "breed", "original_height", "original_width", "repairs", "mask_fit")
    schema = samples_schema(len(classes))
    with pq.ParquetWriter(folder / "samples.parquet", schema) as writer:
        for split in filter(counts.get, SPLITS):
            own = [row for row in rows if row["split"] == split]
            table = [{key: row[key] for key in shown} | _pixels(row["mask"], len(classes)) for row in own]
            writer.write_table(pa.Table.from_pylist(table, schema), row_group_size=CHUNK)
    manifest = {
        "image_size": size,
        "resize": "stretch",
        "classes": [item.name for item in classes],
        "colours": [list(item.colour) for item in classes],
        "counts": counts,
        "files": files,
        "sha256": {},
        "data_digest": "4f" * 32,
        "source": "archives",
        "source_version": "0123456789abcdef",
        "val_fraction": 0.1,
    }
    (folder / MANIFEST).write_text(Manifest(**manifest | entries).to_json())
    return Prepared(Folder(folder))


def _pixels(mask: np.ndarray, count: int) -> dict:
    return {
        "pixels": [int((mask == index).sum()) for index in range(count)],
        "ignored": int((mask == IGNORE).sum()),
    }


def samples_schema(count: int) -> pa.Schema:
    return pa.schema(
        [
            ("name", pa.string()),
            ("split", pa.string()),
            ("breed", pa.string()),
            ("original_height", pa.int32()),
            ("original_width", pa.int32()),
            ("pixels", pa.list_(pa.int64(), count)),
            ("ignored", pa.int64()),
            ("repairs", pa.list_(pa.string())),
            ("mask_fit", pa.float64()),
        ]
    )


def pets(count: int, size: int = 32) -> list[dict]:
    """Drawn pets of three breeds: ten of val, fifteen of test, the rest of train."""
    rows = []
    for index in range(count):
        image, mask = draw_pet(index, size, seed=5)
        rows.append(
            {
                "name": f"pet_{index}",
                "split": "val" if index < 10 else "test" if index < 25 else "train",
                "breed": ("Abyssinian", "beagle", "<b>pug</b>")[index % 3],
                "image": image,
                "mask": mask,
                "original_height": 300 + index,
                "original_width": 400,
                "repairs": [],
                "mask_fit": 2.0 + index,
            }
        )
    return rows


class Page(HTMLParser):
    """What a reader sees: the text, images and links of each section; tags that do not nest are an error."""

    VOID = frozenset(("meta", "img", "input", "br", "wbr"))

    def __init__(self, html: str):
        super().__init__()
        self.open, self.text, self.attributes, self.images, self.kinds = [], {}, [], {}, set()
        self.section = self.name = ""
        self.feed(html)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.kinds.add(tag)
        self.attributes += attrs.items()
        if tag == "section":
            self.section = attrs["id"]
        if tag == "img":
            # A photo with its name, then the outlines over it.
            self.name = attrs["alt"] or self.name
            self.images.setdefault((self.section, self.name), []).append(attrs["src"])
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag, f"</{tag}> closes something else"

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.text[self.section] = self.text.get(self.section, "") + data

    def words(self, section: str) -> str:
        return " ".join(self.text[section].split())


def picture(uri: str, mode: str) -> np.ndarray:
    """A decoded data URI, int (H, W, bands)."""
    file = io.BytesIO(base64.b64decode(uri.partition(",")[2]))
    return np.asarray(Image.open(file).convert(mode)).astype(int)


def assert_stands_alone(html: str, page: Page) -> None:
    """Nothing runs, and nothing is fetched from elsewhere."""
    assert not re.search(r"https?:|@import|url\(", html) and not page.kinds & {"script", "link", "iframe", "object"}
    assert ("http-equiv", "Content-Security-Policy") in page.attributes
    assert ("content", "default-src 'none'; img-src data:; style-src 'unsafe-inline'") in page.attributes
    for key, value in page.attributes:
        assert not key.startswith("on")
        if key in ("src", "href"):
            assert value.startswith("data:image/" if key == "src" else "#")
