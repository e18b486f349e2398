"""From archives to shards: what is written, where each sample goes, and what is refused."""

import hashlib
import shutil

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from unet.data.prepare import prepare, resolve
from unet.data.shards import MANIFEST, Prepared
from unet.errors import InputError
from unet.storage import Folder


@pytest.fixture(scope="module")
def prepared(ray_cluster, packed, tmp_path_factory) -> Prepared:
    target = Folder(tmp_path_factory.mktemp("prepared") / "pets")
    prepare(str(packed), target, 32)
    return Prepared(target)


def rows_of(prepared) -> list[dict]:
    """Every row, read by an Arrow reader that knows nothing of this project."""
    files = sorted(f for names in prepared.manifest.files.values() for f in names)
    return [row for f in files for row in pq.read_table(f"{prepared.folder.path}/{f}").to_pylist()]


def test_every_sample_is_there_with_its_pixels_and_split(prepared, archives):
    rows = {row["name"]: row for row in rows_of(prepared)}
    lists = {s: (archives / "annotations" / f"{s}.txt").read_text().split("\n")[:-1] for s in ("trainval", "test")}
    names = {split: [line.split()[0] for line in lines] for split, lines in lists.items()}
    assert set(rows) == {*names["trainval"], *names["test"]} and len(rows) == 111
    for name in names["trainval"]:
        in_val = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") / 2**64 < 0.1
        assert rows[name]["split"] == ("val" if in_val else "train")
    assert all(rows[name]["split"] == "test" for name in names["test"])
    assert prepared.manifest.counts == {
        s: sum(r["split"] == s for r in rows.values()) for s in ("train", "val", "test")
    }

    name = names["test"][2]
    photo = Image.open(archives / "images" / f"{name}.jpg")
    trimap = Image.open(archives / "annotations" / "trimaps" / f"{name}.png")
    mask = np.frombuffer(rows[name]["mask"], np.uint8).reshape(32, 32)
    assert np.array_equal(mask, np.asarray(trimap.resize((32, 32), Image.Resampling.NEAREST)) - 1)
    image = np.frombuffer(rows[name]["image"], np.uint8).reshape(32, 32, 3)
    assert np.array_equal(image, np.asarray(photo.resize((32, 32), Image.Resampling.BILINEAR)))
    assert (rows[name]["original_width"], rows[name]["original_height"]) == photo.size
    assert rows[name]["breed"] == name.rsplit("_", 1)[0]


def test_rows_stand_in_canonical_order(prepared):
    for split in ("train", "val", "test"):
        names = prepared.names(split)
        assert names == sorted(names, key=lambda n: hashlib.sha256(n.encode()).digest())


def test_digest_and_order_do_not_depend_on_packing_or_shards(prepared, archives, tmp_path):
    other = Folder(tmp_path / "other")
    manifest = prepare(str(archives), other, 32, shards=1)
    assert manifest.data_digest == prepared.manifest.data_digest
    rows = sorted(rows_of(prepared), key=lambda r: r["name"])
    digests = []
    for row in rows:
        header = f"{row['name']}\0{row['split']}\0" + "32x32x3\0"
        digests.append(hashlib.sha256(header.encode() + row["image"] + row["mask"]).digest())
    assert manifest.data_digest == hashlib.sha256(b"".join(digests)).hexdigest()


def test_a_row_group_is_a_chunk_whatever_the_number_of_files(ray_cluster, tmp_path, monkeypatch):
    from unet.data import sources

    monkeypatch.setattr(sources, "SYNTHETIC_TRAINVAL", 700)
    monkeypatch.setattr(sources, "SYNTHETIC_TEST", 3)
    orders = []
    for shards in (1, 2, 16):
        folder = Folder(tmp_path / str(shards))
        manifest = prepare("synthetic", folder, 16, shards=shards)
        assert len(manifest.files["train"]) == min(shards, 3)
        sizes = []
        for file in manifest.files["train"]:
            metadata = pq.read_metadata(f"{folder.path}/{file}")
            sizes += [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]
        assert sizes[:-1] == [256] * (len(sizes) - 1) and sum(sizes) == manifest.counts["train"]
        orders.append(Prepared(folder).names("train"))
    assert orders[0] == orders[1] == orders[2]


def damage(folder, kind):
    image = next((folder / "images").glob("*.jpg"))
    trimap = folder / "annotations" / "trimaps" / f"{image.stem}.png"
    listing = folder / "annotations" / "trainval.txt"
    if kind == "unknown label":
        labels = np.asarray(Image.open(trimap)).copy()
        labels[3, 3] = 4
        Image.fromarray(labels).save(trimap)
    elif kind == "another size":
        Image.open(trimap).resize((20, 20), Image.Resampling.NEAREST).save(trimap)
    elif kind == "truncated photo":
        image.write_bytes(image.read_bytes()[:300])
    elif kind == "colour mask":
        Image.open(trimap).convert("RGB").save(trimap)
    elif kind == "missing mask":
        trimap.unlink()
    elif kind == "name leads outside":
        listing.write_text("../../etc/passwd 1 1 1\n" + listing.read_text())
        return "etc/passwd"
    elif kind == "named twice":
        listing.write_text(listing.read_text() + f"{image.stem} 1 1 1\n" * 2)
    elif kind == "no list":
        listing.unlink()
        return "trainval.txt is missing"
    return image.stem


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("unknown label", "label 4"),
        ("another size", "20x20"),
        ("truncated photo", "Cannot read"),
        ("colour mask", "RGB"),
        ("missing mask", "is missing"),
        ("name leads outside", "plain file name"),
        ("named twice", "twice"),
        ("no list", "layout"),
    ],
)
def test_bad_data_are_one_sentence_and_leave_nothing(ray_cluster, archives, tmp_path, kind, words):
    shutil.copytree(archives, tmp_path / "pets")
    named = damage(tmp_path / "pets", kind)
    with pytest.raises(InputError) as error:
        prepare(str(tmp_path / "pets"), Folder(tmp_path / "out" / "shards"), 32)
    assert words in str(error.value) and named in str(error.value) and "\n" not in str(error.value)
    assert list((tmp_path / "out").iterdir()) == []


def test_an_archive_entry_that_leads_outside_is_refused(ray_cluster, packed, tmp_path):
    import io
    import tarfile

    shutil.copytree(packed, tmp_path / "pets")
    with tarfile.open(tmp_path / "pets" / "images.tar.gz", "w:gz") as tar:
        entry = tarfile.TarInfo("../../escaped.jpg")
        entry.size = 3
        tar.addfile(entry, io.BytesIO(b"abc"))
    with pytest.raises(InputError, match="Cannot unpack"):
        prepare(str(tmp_path / "pets"), Folder(tmp_path / "out" / "a" / "shards"), 32)
    assert not list(tmp_path.rglob("escaped.jpg"))


def test_first_use_prepares_and_the_second_does_not(ray_cluster, packed, tmp_path):
    storage, seen = Folder(tmp_path), []
    first = resolve(str(packed), 32, storage, lambda done, total: seen.append(done))
    stamp = (tmp_path / "data").stat().st_mtime_ns
    again = resolve(str(packed), 32, storage, lambda done, total: seen.append(-1))
    assert seen[-1] == 111 and -1 not in seen and again.manifest == first.manifest
    assert (tmp_path / "data").stat().st_mtime_ns == stamp
    with pytest.raises(InputError, match="prepared at 32 px: give --image-size 32"):
        resolve(first.folder.path, 64, storage, lambda done, total: None)


def test_a_damaged_manifest_or_missing_shard_is_named(prepared, tmp_path):
    shutil.copytree(prepared.folder.path, tmp_path / "pets")
    victim = next((tmp_path / "pets").glob("train-*.parquet"))
    victim.unlink()
    with pytest.raises(InputError, match=victim.name):
        Prepared(Folder(tmp_path / "pets")).chunks["train"]
    (tmp_path / "pets" / MANIFEST).write_text("{")
    with pytest.raises(InputError, match="is damaged"):
        Prepared(Folder(tmp_path / "pets"))


def test_real_photos_of_all_sizes(real_pets, ray_cluster, tmp_path):
    """Original photos of the official archives, packed; the counts are those of their lists."""
    manifest = prepare(str(real_pets / "oxford_pets_original"), Folder(tmp_path / "real"), 64)
    assert manifest.counts["train"] + manifest.counts["val"] == 150 and manifest.counts["test"] == 90
