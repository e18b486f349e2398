"""From archives to shards: what is written, where each sample goes, and what is refused."""

import hashlib
import io
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from tests.conftest import ROOT
from unet.data.manifest import MANIFEST
from unet.data.preparing import pieces
from unet.data.preparing.pieces import Recipe
from unet.data.preparing.prepare import prepare
from unet.data.preparing.resolve import resolve
from unet.data.preparing.verify import verify
from unet.data.shards import Prepared
from unet.errors import InputError
from unet.storage import Folder


@pytest.fixture(scope="module")
def prepared(ray_cluster, packed, tmp_path_factory) -> Prepared:
    target = Folder(tmp_path_factory.mktemp("prepared") / "pets")
    prepare(str(packed), target, Recipe(32))
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
        names = prepared.names_at(split, range(prepared.count(split)))
        assert names == sorted(names, key=lambda n: hashlib.sha256(n.encode()).digest())


def test_digest_and_order_do_not_depend_on_packing_or_shards(prepared, archives, tmp_path):
    other = Folder(tmp_path / "other")
    manifest = prepare(str(archives), other, Recipe(32, shards=1))
    assert manifest.data_digest == prepared.manifest.data_digest
    rows = sorted(rows_of(prepared), key=lambda r: r["name"])
    digests = []
    for row in rows:
        header = f"{row['name']}\0{row['split']}\0" + "32x32x3\0"
        digests.append(hashlib.sha256(header.encode() + row["image"] + row["mask"]).digest())
    assert manifest.data_digest == hashlib.sha256(b"".join(digests)).hexdigest()


@pytest.fixture(scope="module")
def noise(tmp_path_factory) -> Path:
    """Archives of 640 trainval and 20 test samples of noise, which are quick to make."""
    folder, random = tmp_path_factory.mktemp("noise"), np.random.default_rng(3)
    (folder / "images").mkdir()
    (folder / "annotations" / "trimaps").mkdir(parents=True)
    names = [f"noise_{i}" for i in range(660)]
    for name in names:
        Image.fromarray(random.integers(0, 255, (16, 16, 3), np.uint8)).save(folder / "images" / f"{name}.jpg")
        trimap = Image.fromarray(random.integers(1, 4, (16, 16), np.uint8))
        trimap.save(folder / "annotations" / "trimaps" / f"{name}.png")
    (folder / "annotations" / "trainval.txt").write_text("\n".join(names[:640]))
    (folder / "annotations" / "test.txt").write_text("\n".join(names[640:]))
    return folder


def test_a_row_group_is_a_chunk_whatever_the_number_of_files(ray_cluster, noise, tmp_path):
    orders, digests = [], set()
    for shards in (1, 4, 16):
        folder = Folder(tmp_path / str(shards))
        manifest = prepare(str(noise), folder, Recipe(16, shards=shards))
        assert len(manifest.files["train"]) == min(shards, 3)
        sizes = []
        for file in manifest.files["train"]:
            metadata = pq.read_metadata(f"{folder.path}/{file}")
            sizes += [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]
        assert sizes[:-1] == [256] * (len(sizes) - 1) and sum(sizes) == manifest.counts["train"]
        orders.append(Prepared(folder).names_at("train", range(manifest.counts["train"])))
        digests.add(manifest.data_digest)
    assert orders[0] == orders[1] == orders[2] and len(digests) == 1


def test_first_use_prepares_and_the_second_does_not(ray_cluster, packed, tmp_path):
    storage, seen = Folder(tmp_path), []
    first = resolve(str(packed), 32, "stretch", storage, lambda what, done, total: seen.append(done))
    stamp = (tmp_path / "data").stat().st_mtime_ns
    again = resolve(str(packed), 32, "stretch", storage, lambda *step: seen.append(-1))
    assert 111 in seen and -1 not in seen and again.manifest == first.manifest
    assert (tmp_path / "data").stat().st_mtime_ns == stamp
    with pytest.raises(InputError, match="prepared at 32 px: give --image-size 32"):
        resolve(first.folder.path, 64, "stretch", storage, lambda *step: None)
    with pytest.raises(InputError, match="prepared with --resize stretch: give --resize stretch"):
        resolve(first.folder.path, 32, "letterbox", storage, lambda *step: None)


def test_the_same_command_again_only_reads(prepared, packed, tmp_path):
    before = {p: p.stat().st_mtime_ns for p in Path(prepared.folder.path).iterdir()}
    assert prepare(str(packed), prepared.folder, Recipe(32)) == prepared.manifest
    assert {p: p.stat().st_mtime_ns for p in Path(prepared.folder.path).iterdir()} == before
    for spelled in (f"{prepared.folder.path}/", os.path.relpath(prepared.folder.path)):
        assert prepare(str(packed), Folder(spelled), Recipe(32)) == prepared.manifest
    with pytest.raises(InputError, match=r"holds other data \(image_size 32 there, 64 here\)"):
        prepare(str(packed), prepared.folder, Recipe(64))
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="not empty"):
        prepare(str(packed), Folder(tmp_path), Recipe(32))


def test_a_split_without_samples_is_told_and_harms_nothing(ray_cluster, archives, tmp_path):
    manifest = prepare(str(archives), Folder(tmp_path / "shards"), Recipe(32, val_fraction=1e-9))
    assert manifest.counts == {"train": 90, "val": 0, "test": 21} and manifest.files["val"] == []
    assert ("empty_split", "val has no samples") in {(row["problem"], row["detail"]) for row in manifest.warnings}
    assert not list(verify(Folder(tmp_path / "shards"), lambda *step: None))
    assert len(Prepared(Folder(tmp_path / "shards")).read_checked("test", 0)) == 21


def test_strict_and_what_was_left_out_before(ray_cluster, archives, tmp_path):
    shutil.copytree(archives, tmp_path / "pets")
    (tmp_path / "pets" / "images" / "beagle_4.jpg").write_bytes(b"")
    manifest = prepare(str(tmp_path / "pets"), Folder(tmp_path / "shards"), Recipe(32))
    assert [row["name"] for row in manifest.left_out] == ["beagle_4"]
    with pytest.raises(InputError, match=r"beagle_4: beagle_4.jpg is empty\. Leave --strict out"):
        prepare(str(tmp_path / "pets"), Folder(tmp_path / "shards"), Recipe(32), strict=True)


@pytest.mark.parametrize("kind", ["a file", "below a file", "a mount point"])
def test_outputs_of_other_kinds(ray_cluster, prepared, packed, tmp_path, kind):
    """A file is refused before anything starts; in a mount point (a container's volume) the shards are made in it."""
    (tmp_path / "file").write_text("mine")
    if kind != "a mount point":
        with pytest.raises(InputError, match=r"Cannot write to .*: give another --output"):
            prepare(str(packed), Folder(tmp_path / {"a file": "file", "below a file": "file/x"}[kind]), Recipe(32))
        assert [p.name for p in tmp_path.iterdir()] == ["file"]
        return
    volume = tmp_path / "volume"
    volume.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", volume], capture_output=True).returncode:
        pytest.skip("mounting takes root")
    try:
        manifest = prepare(str(packed), Folder(volume), Recipe(32))
        assert manifest.data_digest == prepared.manifest.data_digest
        assert {p.name for p in volume.iterdir()} == {MANIFEST, *manifest.sha256}
    finally:
        subprocess.run(["umount", volume], check=True)


def test_a_killed_preparation_goes_on(prepared, packed, tmp_path, monkeypatch):
    """SIGKILL at random moments: no output before the end, then the very same; no piece is decoded twice."""
    target, random = tmp_path / "shards", np.random.default_rng()
    command = [sys.executable, "-c", KILLED, str(packed), str(target)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    known = {}
    for phase in ("preparing", "writing"):
        process = subprocess.Popen(command, env=environment, start_new_session=True, stdout=subprocess.PIPE, text=True)
        for line in process.stdout:
            if line.startswith(phase):
                break
        time.sleep(random.uniform(0, 0.3))
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        process.stdout.close()
        if target.exists():
            break
        now = {p.name: p.stat().st_mtime_ns for p in (tmp_path / ".preparing-shards").glob("*.facts.arrow")}
        assert known.items() <= now.items()
        known = now
    if not target.exists():
        unfinished = tmp_path / ".preparing-shards" / "shards"
        unfinished.mkdir(exist_ok=True)
        (unfinished / ".train-00000-of-00001.parquet.0af31").write_bytes(b"PAR1")  # as a kill can leave it
    monkeypatch.setattr(pieces, "PIECE_SAMPLES", 8)
    manifest = prepare(str(packed), Folder(target), Recipe(32))
    assert manifest.data_digest == prepared.manifest.data_digest
    assert [p.name for p in tmp_path.iterdir()] == ["shards"]
    assert {p.name for p in target.iterdir()} == {MANIFEST, *manifest.sha256}
    assert not list(verify(Folder(target), lambda *a: None))


KILLED = """
import sys, time
import ray
from unet.data.preparing import pieces
from unet.data.preparing.pieces import Recipe
from unet.data.preparing.prepare import prepare
from unet.storage import Folder

pieces.PIECE_SAMPLES = 8
if __name__ == "__main__":
    ray.init("local", num_cpus=1, include_dashboard=False, logging_level="ERROR", log_to_driver=False)
    prepare(sys.argv[1], Folder(sys.argv[2]), Recipe(32), progress=lambda *step: print(*step, flush=True))
"""


@pytest.mark.parametrize("photo", [(40, 64), (64, 40), (50, 50), (3, 400)])
def test_letterbox_keeps_the_shape(photo, tmp_path):
    """Padding is ignored; what lies in the box is the plain resize; the mask is kept at its own size too."""
    from unet.classes import PETS
    from unet.data.decode import load
    from unet.data.sources import Sample

    height, width = photo
    random = np.random.default_rng(1)
    ids = random.integers(0, 3, (height, width), np.uint8)
    pixels = random.integers(0, 255, (height, width, 3), np.uint8)
    Image.fromarray(ids + 1).save(tmp_path / "mask.png")
    Image.fromarray(pixels).save(tmp_path / "photo.png")
    sample = Sample("pet", "train", "", str(tmp_path / "photo.png"), str(tmp_path / "mask.png"))
    decoded = load(sample, PETS, 64, "letterbox", original_mask=True)
    rows, columns = np.flatnonzero((decoded.mask != 255).any(1)), np.flatnonzero((decoded.mask != 255).any(0))
    box = slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)
    tall, wide = len(rows), len(columns)
    for side, whole in ((tall, height), (wide, width)):
        assert side == max(1, int(64 * whole / max(photo) + 0.5))
    assert abs((64 - tall) // 2 - rows[0]) <= 1 and abs((64 - wide) // 2 - columns[0]) <= 1
    assert (decoded.mask[box] != 255).all() and decoded.image.sum() == decoded.image[box].sum()
    plain = np.asarray(Image.fromarray(pixels).resize((wide, tall), Image.Resampling.BILINEAR))
    assert np.array_equal(decoded.image[box], plain)
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(decoded.original_mask))), ids)


def test_real_photos_of_all_sizes(real_pets, ray_cluster, tmp_path):
    """Original photos of the official archives, packed; the counts are those of their lists."""
    manifest = prepare(str(real_pets / "oxford_pets_original"), Folder(tmp_path / "real"), Recipe(64))
    assert manifest.counts["train"] + manifest.counts["val"] == 150 and manifest.counts["test"] == 90
