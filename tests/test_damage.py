"""Every kind of damage in raw data is found and named when they are prepared, and clean data raise nothing."""

import hashlib
import io
import os
import shutil
import subprocess
import sys
import tarfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.conftest import ROOT, write_archives
from unet.data.preparing.checks import MISFIT, mask_fit, without_padding
from unet.data.preparing.pieces import Recipe
from unet.data.preparing.prepare import prepare
from unet.data.preparing.verify import verify
from unet.data.resize import letterbox_box
from unet.data.shards import Prepared
from unet.errors import InputError
from unet.storage import Folder

SPARE = 30
"""Samples that stay whole beside the damaged ones."""


@dataclass
class Pet:
    """One sample of trainval in an extracted archive folder, to be damaged; `other` is a whole one of test, `spare`
    are whole ones of trainval."""

    folder: Path
    name: str
    other: str
    spare: list[str]

    @property
    def photo(self) -> Path:
        return self.folder / "images" / f"{self.name}.jpg"

    @property
    def trimap(self) -> Path:
        return self.folder / "annotations" / "trimaps" / f"{self.name}.png"

    def of(self, name: str) -> "Pet":
        return Pet(self.folder, name, self.name, self.spare)

    def resave(self, path: Path, change, format: str = "PNG", **options) -> None:
        image = Image.open(path)
        image.load()
        change(image).save(path, format, **options)

    def list_also(self, line: str) -> None:
        path = self.folder / "annotations" / "trainval.txt"
        path.write_text(path.read_text() + line + "\n")

    def label(self, value: int) -> None:
        labels = np.asarray(Image.open(self.trimap)).copy()
        labels[3, 3] = value
        Image.fromarray(labels).save(self.trimap)


def in_val(name: str) -> bool:
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") / 2**64 < 0.1


DAMAGES = []
"""(how it is planted, where the manifest must show it, by which short name, with which words)."""


def shows(where: str, kind: str, words: str = "", name: str | None = None):
    def keep(plant):
        DAMAGES.append((plant, where, kind, words, name))
        return plant

    return keep


@shows("left_out", "damaged", "cannot be decoded")
def truncated_photo(pet):
    pet.photo.write_bytes(pet.photo.read_bytes()[:-300])


@shows("left_out", "damaged", "cannot be decoded")
def page_saved_as_photo(pet):
    pet.photo.write_text("<html>404</html>")


@shows("left_out", "damaged", "cannot be decoded")
def flipped_bit_in_mask(pet):
    content = bytearray(pet.trimap.read_bytes())
    content[len(content) // 2] ^= 16
    pet.trimap.write_bytes(content)


@shows("left_out", "damaged", "directory")
def folder_for_photo(pet):
    pet.photo.unlink()
    pet.photo.mkdir()


@shows("left_out", "empty_file", "is empty")
def empty_photo(pet):
    pet.photo.write_bytes(b"")


@shows("left_out", "empty_file", "is empty")
def empty_mask_file(pet):
    pet.trimap.write_bytes(b"")


@shows("left_out", "missing_image", "is missing")
def missing_photo(pet):
    pet.photo.unlink()


@shows("left_out", "missing_mask", "is missing")
def missing_mask(pet):
    pet.trimap.unlink()


@shows("left_out", "unknown_label", "label 4 in 1 pixels")
def label_4(pet):
    pet.label(4)


@shows("left_out", "unknown_label", "label 0")
def label_0(pet):
    pet.label(0)


@shows("left_out", "size_mismatch", "20x30")
def mask_of_another_size(pet):
    pet.resave(pet.trimap, lambda i: i.resize((20, 30), Image.Resampling.NEAREST))


@shows("left_out", "colour_mask", "painted in colours (#010301, #020602, #030903)")
def colour_mask(pet):
    pet.resave(pet.trimap, lambda i: Image.merge("RGB", [i, i.point(lambda v: 3 * v), i]))


@shows("left_out", "listed_twice", "listed twice")
def listed_twice(pet):
    pet.list_also(f"{pet.name} 1 1 1")


@shows("left_out", "unsafe_name", "not a plain file name", name="../../etc/passwd")
def name_that_leads_outside(pet):
    pet.list_also("../../etc/passwd 1 1 1")


@shows("left_out", "unsafe_name", "not a plain file name", name=r"pet\x00name")
def name_with_a_nul(pet):
    pet.list_also("pet\0name 1 1 1")


@shows("left_out", "damaged", "cannot be decoded")
def damaged_tiff(pet):
    pet.resave(pet.photo, lambda i: i, "TIFF")
    pet.photo.write_bytes(pet.photo.read_bytes().replace(b"\x00\x01\x04\x00", b"\x00\x01\x0c\x00", 1)[:-40])


@shows("left_out", "unsupported_depth", "F pixels")
def photo_of_floats(pet):
    pet.resave(pet.photo, lambda i: i.convert("F"), "TIFF")


@shows("left_out", "lossy_mask", "save masks as PNG")
def mask_as_jpeg(pet):
    pet.resave(pet.trimap, lambda i: i, "JPEG")


@shows("left_out", "unsafe_name", "not a plain file name", name="x" * 300)
def endless_name(pet):
    pet.list_also("x" * 300)


@shows("left_out", "duplicate_across_splits", "the same photo as")
def photo_of_the_test_split(pet):
    shutil.copy(pet.of(pet.other).photo, pet.photo)
    shutil.copy(pet.of(pet.other).trimap, pet.trimap)


@shows("repaired", "GIF named .jpg")
def gif_named_jpg(pet):
    pet.resave(pet.photo, lambda i: i.convert("P"), "GIF")


@shows("repaired", "alpha dropped")
def alpha(pet):
    pet.resave(pet.photo, lambda i: i.convert("RGBA"))


@shows("repaired", "palette to RGB")
def palette(pet):
    pet.resave(pet.photo, lambda i: i.convert("P"))


@shows("repaired", "grey to RGB")
def grey(pet):
    pet.resave(pet.photo, lambda i: i.convert("L"), "JPEG")


@shows("repaired", "CMYK to RGB")
def cmyk(pet):
    pet.resave(pet.photo, lambda i: i.convert("CMYK"), "JPEG")


@shows("repaired", "turned upright as its EXIF says")
def lying_on_its_side(pet):
    exif = Image.Exif()
    exif[0x0112] = 6
    pet.resave(pet.photo, lambda i: i.rotate(90, expand=True), "JPEG", exif=exif, quality=95)


@shows("repaired", "mask: turned upright as its EXIF says")
def photo_and_mask_upside_down(pet):
    exif = Image.Exif()
    exif[0x0112] = 3
    pet.resave(pet.photo, lambda i: i.rotate(180), "JPEG", exif=exif, quality=95)
    pet.resave(pet.trimap, lambda i: i.rotate(180), exif=exif)


@shows("repaired", "PNG named .jpg")
def png_with_broken_exif(pet):
    pet.resave(pet.photo, lambda i: i, exif=b"Exif\0\0zzzz")


@shows("repaired", "16-bit grey to RGB")
def sixteen_bits(pet):
    pet.resave(pet.photo, lambda i: Image.fromarray(np.asarray(i.convert("L")).astype(np.uint16) * 257))


@shows("repaired", "mask: RGB of equal channels to grey")
def grey_mask_in_rgb(pet):
    pet.resave(pet.trimap, lambda i: i.convert("RGB"))


@shows("warnings", "one_class_only", "nothing but background")
def mask_without_a_pet(pet):
    pet.resave(pet.trimap, lambda i: Image.new("L", i.size, 2))


@shows("warnings", "duplicate", "the same photo as")
def photo_under_two_names(pet):
    twin = next(name for name in pet.spare if in_val(name) == in_val(pet.name))
    shutil.copy(pet.of(twin).photo, pet.photo)
    shutil.copy(pet.of(twin).trimap, pet.trimap)


@shows("warnings", "same_mask", "pixel for pixel")
def copied_mask(pet):
    other = pet.of(pet.other)
    size = Image.open(other.trimap).size
    pet.resave(pet.photo, lambda i: i.resize(size), "JPEG")
    shutil.copy(other.trimap, pet.trimap)


@shows("warnings", "in_no_split", "not in any list", name="stray")
def photo_in_no_list(pet):
    shutil.copy(pet.photo, pet.of("stray").photo)


@pytest.fixture(scope="module")
def damaged(ray_cluster, tmp_path_factory):
    """All the damages, each in its own sample of one source, and its manifest; the names by damage."""
    folder = write_archives(tmp_path_factory.mktemp("damaged") / "pets", len(DAMAGES) + SPARE, len(DAMAGES) + 4, 64)
    lists = {s: (folder / "annotations" / f"{s}.txt").read_text().split("\n") for s in ("trainval", "test")}
    names = {s: [line.split()[0] for line in lines if line] for s, lines in lists.items()}
    victims = {}
    for (plant, *_), name, other in zip(DAMAGES, names["trainval"], names["test"], strict=False):
        victims[plant.__name__] = name
        plant(Pet(folder, name, other, names["trainval"][len(DAMAGES) :]))
    target = Folder(folder.parent / "shards")
    return prepare(str(folder), target, Recipe(64)), victims, folder, target


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage[0].__name__)
def test_damaged_sample_is_found_and_named(damaged, damage):
    plant, where, kind, words, name = damage
    manifest, victims, *_ = damaged
    victim = name or victims[plant.__name__]
    rows = [
        row for row in getattr(manifest, where) if victim == row["name"] or f"as {victim} " in row.get("detail", "")
    ]
    assert [row for row in rows if row.get("problem", row.get("repair")) == kind and words in row.get("detail", "")]


def test_only_the_damaged_are_touched(damaged):
    manifest, victims, _, target = damaged
    stay = {"listed_twice", "copied_mask"}  # the first of the two lines stays
    gone = {plant.__name__ for plant, where, *_, name in DAMAGES if where == "left_out" and name is None} - stay
    assert sum(manifest.counts.values()) == 2 * len(DAMAGES) + SPARE + 4 - len(gone)
    rows = [*manifest.left_out, *manifest.repaired, *manifest.warnings]
    named = {name for *_, name in DAMAGES if name}
    twins = {row["name"] for row in manifest.warnings if row["problem"] == "duplicate"}
    assert {row["name"] for row in rows} <= {*victims.values(), *named, *twins, ""} and len(twins) == 1
    kept = set(Prepared(target).samples()["name"].to_pylist())
    assert kept.isdisjoint(victims[name] for name in gone)


def test_repaired_photos_have_the_right_pixels(damaged, ray_cluster):
    """A photo that was turned or given an alpha channel looks as before; so does a mask of three equal bands."""
    from unet.data.synthetic import draw_pet

    _, victims, _, target = damaged
    prepared = Prepared(target)
    rows = {}
    for split, chunks in prepared.chunks.items():
        for chunk in range(len(chunks)):
            rows |= {
                row["name"]: row for row in prepared.read_chunk(split, chunk, ("name", "image", "mask")).to_pylist()
            }
    for kind in ("alpha", "lying_on_its_side", "photo_and_mask_upside_down", "cmyk", "grey_mask_in_rgb"):
        row, index = rows[victims[kind]], [plant.__name__ for plant, *_ in DAMAGES].index(kind)
        image, mask = draw_pet(index, 64, seed=7)
        difference = np.frombuffer(row["image"], np.uint8).reshape(64, 64, 3).astype(int) - image
        assert np.abs(difference).mean() < 12, kind
        assert (np.frombuffer(row["mask"], np.uint8).reshape(64, 64) == mask).mean() > 0.9, kind


def test_strict_refuses_and_leaves_nothing(damaged, tmp_path):
    _, _, folder, _ = damaged
    with pytest.raises(InputError, match=r"more samples cannot be used\. Leave --strict out"):
        prepare(str(folder), Folder(tmp_path / "out" / "shards"), Recipe(64), strict=True)
    assert list((tmp_path / "out").iterdir()) == []


def test_masks_that_belong_to_other_photos_stand_out(real_pets):
    """The share of masks below the line: of real ones next to none, of another photo's about a third."""
    with tarfile.open(real_pets / "oxford_pets_128" / "images.tar.gz") as photos:
        names = sorted(n for n in photos.getnames() if n.endswith(".jpg"))[::40]
        images = [np.asarray(Image.open(photos.extractfile(n)).convert("RGB")) for n in names]
    with tarfile.open(real_pets / "oxford_pets_128" / "annotations.tar.gz") as trimaps:
        paths = [f"annotations/trimaps/{Path(n).stem}.png" for n in names]
        masks = [np.asarray(Image.open(trimaps.extractfile(p))) - 1 for p in paths]
    images, masks = np.stack(images), np.stack(masks).astype(np.uint8)
    foreign = np.roll(masks, 1, 0)
    for own, others in (
        (mask_fit(images, masks), mask_fit(images, foreign)),
        (letterboxed_fit(images, masks), letterboxed_fit(images, foreign)),
    ):
        assert np.nanmean(own < MISFIT) < 0.02 and np.nanmean(others < MISFIT) > 0.25
        assert np.nanmedian(own) > 3 and abs(np.nanmedian(others)) < 0.5


def letterboxed_fit(images, masks):
    """The fit of what letterboxing makes of 4:3 cuts of the pictures."""
    boxed, ids = np.zeros_like(images), np.full_like(masks, 255)
    boxed[:, 16:112], ids[:, 16:112] = images[:, 16:112], masks[:, 16:112]
    boxes = [letterbox_box(96, 128, 128)] * len(images)
    small = without_padding(boxed, boxes, Image.Resampling.BILINEAR)
    return mask_fit(small, without_padding(ids, boxes, Image.Resampling.NEAREST))


def test_clean_data_raise_nothing(ray_cluster, tmp_path):
    manifest = prepare("synthetic:300", Folder(tmp_path / "clean"), Recipe(64))
    assert manifest.left_out == manifest.repaired == manifest.warnings == []
    assert not list(verify(Folder(tmp_path / "clean"), lambda *a: None))


@pytest.mark.skipif(os.geteuid() != 0, reason="giving up one's rights takes root")
def test_file_that_may_not_be_read(tmp_path):
    path = tmp_path / "secret.jpg"
    Image.new("RGB", (20, 20)).save(path)
    for place in (tmp_path, *tmp_path.parents[:-1]):
        place.chmod(place.stat().st_mode | 0o011)
    path.chmod(0)
    code = (
        "import os, sys; from unet.data import decode, pictures; os.setgroups([]); os.setgid(65534); os.setuid(65534)\n"
        f"try: decode.photo({str(path)!r}, pictures.file_content)\n"
        "except pictures.Unusable as error: print(error.problem, error.detail)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={"PYTHONPATH": str(ROOT)})
    assert done.stdout.startswith("no_permission secret.jpg cannot be read"), done.stderr


@pytest.mark.parametrize("entry", ["../../escaped.jpg", "/tmp/escaped.jpg", "images/nul\0.jpg", "link"])
def test_archive_entry_that_leads_outside_is_refused(ray_cluster, packed, tmp_path, entry):
    shutil.copytree(packed, tmp_path / "pets")
    with tarfile.open(tmp_path / "pets" / "images.tar.gz", "w:gz", format=tarfile.PAX_FORMAT) as tar:
        info = tarfile.TarInfo(entry)
        info.size = 3
        if entry == "link":
            info.type, info.linkname, info.size = tarfile.SYMTYPE, "../../..", 0
        if "\0" in entry:
            info.pax_headers, info.name = {"path": entry}, "images/x.jpg"
        tar.addfile(info, io.BytesIO(b"abc"))
    with pytest.raises(InputError, match=r"Cannot unpack|holds no folder"):
        prepare(str(tmp_path / "pets"), Folder(tmp_path / "out" / "a" / "shards"), Recipe(32))
    assert not list(tmp_path.rglob("escaped*")) and not Path("/tmp/escaped.jpg").exists()
    assert list((tmp_path / "out" / "a").iterdir()) == []
