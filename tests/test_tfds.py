"""Made archives through the real builder of TensorFlow Datasets: the same pictures as straight from the archives."""

import contextlib
import errno
import functools
import http.server
import io
import os
import shutil
import socket
import tarfile
import threading
import time
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pyarrow.parquet as pq
import pytest
from conftest import write_archives
from PIL import Image

from unet.data.preparing.pieces import Recipe
from unet.data.preparing.prepare import prepare
from unet.data.shards import Prepared
from unet.data.sources import tfds
from unet.data.synthetic import draw_pet
from unet.errors import InputError
from unet.storage import Folder

DAMAGED = ("beagle_116", "chihuahua_121")
PNGS = ("Abyssinian_5", "Egyptian_Mau_14", "Egyptian_Mau_156", "Egyptian_Mau_186")
GIFS = ("Abyssinian_34", *(f"Egyptian_Mau_{n}" for n in (139, 145, 167, 177, 191)))


def odd_photo(name: str, image: np.ndarray) -> bytes:
    """A file as the official archive holds it under this name: a PNG with alpha, a GIF, a damaged JPEG."""
    photo, file = Image.fromarray(image), io.BytesIO()
    if name in PNGS:
        photo.putalpha(photo.convert("L"))
        photo.save(file, "PNG")
    elif name in GIFS:
        photo.quantize().save(file, "GIF")
    else:
        photo.save(file, "JPEG")
        return file.getvalue()[:-2] + b"extraneous" + file.getvalue()[-2:]
    return file.getvalue()


def unlist(folder, name):
    for split in ("trainval", "test"):
        listing = folder / "annotations" / f"{split}.txt"
        lines = listing.read_text().splitlines(keepends=True)
        listing.write_text("".join(line for line in lines if not line.startswith(f"{name} ")))


def pack(folder, target, mode="w:gz"):
    target.mkdir()
    for name in ("images", "annotations"):
        with tarfile.open(target / f"{name}.tar.gz", mode) as tar:
            tar.add(folder / name, arcname=name)
    return target


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """Archives without odd files, not compressed."""
    base = tmp_path_factory.mktemp("plain")
    folder = write_archives(base / "pets", 20, 8)
    unlist(folder, "Abyssinian_5")
    return pack(folder, base / "packed", "w")


@pytest.fixture(scope="module")
def odd(tmp_path_factory):
    """Archives with the twelve odd files. As in the official ones, the GIFs are in no list."""
    base = tmp_path_factory.mktemp("odd")
    folder = write_archives(base / "pets", 20, 8)
    unlist(folder, "Abyssinian_5")
    for i, name in enumerate((*DAMAGED, *PNGS, *GIFS)):
        image, mask = draw_pet(100 + i, 40)
        (folder / "images" / f"{name}.jpg").write_bytes(odd_photo(name, image))
        if name not in GIFS:
            Image.fromarray(mask + 1).save(folder / "annotations" / "trimaps" / f"{name}.png")
            listing = folder / "annotations" / ("test.txt" if name == "Abyssinian_5" else "trainval.txt")
            listing.write_text(listing.read_text() + f"{name} 5 2 4\n")
    return pack(folder, base / "packed")


def builder_of(folder):
    """The installed builder with the checksums of made archives."""
    from tensorflow_datasets.core.download.checksums import compute_url_info
    from tensorflow_datasets.core.registered import skip_registration
    from tensorflow_datasets.datasets.oxford_iiit_pet import oxford_iiit_pet_dataset_builder as official

    infos = {f"{official._BASE_URL}/{a}": compute_url_info(folder / a) for a in ("images.tar.gz", "annotations.tar.gz")}
    package = official.Builder._get_pkg_dir_path()
    with skip_registration():
        return type(
            "Made", (official.Builder,), {"name": "oxford_iiit_pet", "url_infos": infos, "pkg_dir_path": package}
        )


def rows_of(folder: Folder) -> dict:
    files = [f for names in Prepared(folder).manifest.files.values() for f in names]
    return {row["name"]: row for f in files for row in pq.read_table(f"{folder.path}/{f}").to_pylist()}


def members(folder, archive, under):
    with tarfile.open(folder / archive) as tar:
        return {m.name: tar.extractfile(m).read() for m in tar if m.isfile() and m.name.startswith(under)}


def prepared(archives: Path, folder: Path, monkeypatch, through_tfds: bool):
    """The archives prepared below `folder`: through the real builder with their own checksums, or directly."""
    if not through_tfds:
        return prepare(str(archives), Folder(folder / "direct"), Recipe(32))
    builder = builder_of(archives)
    # In this process: the builder's class could not be sent to another.
    monkeypatch.setattr(
        tfds, "export_in_task", lambda to, cache, given, tell: tfds.export(to, cache, given, builder, tell)
    )
    return prepare(
        "oxford_iiit_pet", Folder(folder / "through"), Recipe(32), source_dir=archives, cache=folder / "cache"
    )


def test_the_digest_is_that_of_the_archives(ray_cluster, plain, tmp_path, monkeypatch):
    through, direct = (prepared(plain, tmp_path, monkeypatch, way) for way in (True, False))
    assert through.data_digest == direct.data_digest and through.counts == direct.counts
    assert (through.source, direct.source) == ("oxford_iiit_pet", "archives") and through.repaired == []


def test_only_the_reencoded_photos_differ(ray_cluster, odd, tmp_path, monkeypatch):
    exported = tfds.export(tmp_path / "pets", tmp_path / "cache", odd, builder_of(odd))
    assert exported.reencoded == tuple(sorted((*DAMAGED, *PNGS)))
    written = {f"images/{p.name}": p.read_bytes() for p in (tmp_path / "pets" / "images").iterdir()}
    theirs = members(odd, "images.tar.gz", "images/")
    assert {n for n in theirs if n not in written} == {f"images/{n}.jpg" for n in GIFS}
    assert {n for n in written if written[n] != theirs[n]} == {f"images/{n}.jpg" for n in exported.reencoded}

    manifest = prepared(odd, tmp_path, monkeypatch, through_tfds=True)
    prepared(odd, tmp_path, monkeypatch, through_tfds=False)
    through, direct = rows_of(Folder(tmp_path / "through")), rows_of(Folder(tmp_path / "direct"))
    assert list(through) == list(direct) and len(direct) == 33
    assert all(through[n]["mask"] == direct[n]["mask"] for n in direct)
    assert {n for n in direct if through[n]["image"] != direct[n]["image"]} == set(exported.reencoded)
    named = {row["name"] for row in manifest.repaired if row["repair"] == "re-encoded by TensorFlow Datasets"}
    assert named == set(exported.reencoded)


def test_lists_name_class_and_species(odd, tmp_path):
    tfds.export(tmp_path / "pets", tmp_path / "cache", odd, builder_of(odd))
    lines = (tmp_path / "pets" / "annotations" / "trainval.txt").read_text().splitlines()
    assert lines == sorted(lines) and len(lines) == 24 and "chihuahua_121 5 2 1" in lines
    assert "Abyssinian_5 5 2 1" in (tmp_path / "pets" / "annotations" / "test.txt").read_text()


@pytest.fixture
def host(monkeypatch):
    """Serves a folder in the place of the official host, until the test or the given function ends."""
    from tensorflow_datasets.datasets.oxford_iiit_pet import oxford_iiit_pet_dataset_builder as official

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    with contextlib.ExitStack() as stack:

        def serve(folder):
            server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=folder))
            stack.enter_context(server)
            stack.callback(server.shutdown)
            threading.Thread(target=server.serve_forever, args=[0.05], daemon=True).start()
            monkeypatch.setattr(official, "_BASE_URL", f"http://127.0.0.1:{server.server_port}")
            return stack.close

        yield serve


def test_what_was_downloaded_or_built_is_reused(host, plain, ray_cluster, tmp_path, capfd):
    cache, seen = tmp_path / "cache", []
    stop = host(plain)
    first = tfds.export(tmp_path / "pets", cache, builder_class=builder_of(plain))
    stop()
    assert not list(cache.rglob("*.tmp.*")) and not (cache / "extracted").exists()
    shutil.rmtree(cache / "oxford_iiit_pet")  # as if killed while it built
    assert tfds.export(tmp_path / "rebuilt", cache, builder_class=builder_of(plain)) == first

    built = {p: p.stat().st_mtime_ns for p in (cache / "oxford_iiit_pet").rglob("*")}
    # In a process of its own the installed builder itself, which could not build from these archives.
    again = tfds.export_in_task(tmp_path / "again", cache, progress=lambda *step: seen.append(step))
    assert again == first and seen[-1] == (27, 27)
    assert {p: p.stat().st_mtime_ns for p in (cache / "oxford_iiit_pet").rglob("*")} == built
    for path in (tmp_path / "pets").rglob("*.*"):
        assert path.read_bytes() == (tmp_path / "again" / path.relative_to(tmp_path / "pets")).read_bytes()
    assert capfd.readouterr().out == ""


def refused(folder, tmp_path, source_dir=None, in_task=False) -> str:
    """The sentence of an export that must fail and leave nothing."""
    with pytest.raises(InputError) as error:
        if in_task:
            tfds.export_in_task(tmp_path / "out" / "pets", tmp_path / "cache", source_dir)
        else:
            tfds.export(tmp_path / "out" / "pets", tmp_path / "cache", source_dir, builder_of(folder))
    assert type(error.value) is InputError and "\n" not in str(error.value)
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())
    if in_task:  # in this process TensorFlow Datasets may still be extracting the other archive
        assert not [p for p in tmp_path.rglob("*") if "incomplete" in p.name or p.name == "extracted"]
    return str(error.value)


def test_no_network_is_said_at_once_with_what_to_do(plain, tmp_path, monkeypatch):
    from tensorflow_datasets.datasets.oxford_iiit_pet import oxford_iiit_pet_dataset_builder as official

    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    monkeypatch.setattr(official, "_BASE_URL", f"http://127.0.0.1:{port}")
    began = time.monotonic()
    sentence = refused(plain, tmp_path)
    assert time.monotonic() - began < 5
    assert "127.0.0.1" in sentence and "Connection refused" in sentence
    assert "HTTPS_PROXY" in sentence and "--source-dir FOLDER" in sentence and "--source synthetic" in sentence
    monkeypatch.setattr(official, "_BASE_URL", "http://pets.invalid")
    monkeypatch.setenv("HTTP_PROXY", f"http://127.0.0.1:{port}")
    assert "ProxyError: [Errno" in refused(plain, tmp_path)
    monkeypatch.delenv("HTTP_PROXY")
    assert "pets.invalid" in refused(plain, tmp_path)


def test_a_missing_file_on_the_host(host, plain, tmp_path):
    host(tmp_path)
    assert "404" in refused(plain, tmp_path)


def test_an_archive_that_is_not_the_official_one(host, plain, odd, ray_cluster, tmp_path):
    assert "annotations.tar.gz again" in refused(plain, tmp_path, odd)
    truncated = tmp_path / "truncated"
    shutil.copytree(plain, truncated)
    os.truncate(truncated / "images.tar.gz", 3000)
    assert f"images.tar.gz of {truncated} is truncated" in refused(plain, tmp_path, truncated)
    host(truncated)
    assert "--source-dir FOLDER" in refused(plain, tmp_path)
    # The installed checksums, and the way through Ray.
    assert "SHA-256" in refused(plain, tmp_path, plain, in_task=True)


def test_a_missing_archive_is_named_and_not_fetched(host, plain, tmp_path):
    host(plain)
    (tmp_path / "mine").mkdir()
    shutil.copy(plain / "images.tar.gz", tmp_path / "mine")
    assert "lacks annotations.tar.gz" in refused(plain, tmp_path, tmp_path / "mine")


def test_archives_that_the_builder_cannot_read(plain, tmp_path):
    shutil.copytree(plain, tmp_path / "mine")
    (tmp_path / "mine" / "images.tar.gz").write_bytes(b"not an archive")
    assert "images.tar.gz" in refused(tmp_path / "mine", tmp_path, tmp_path / "mine")


def test_a_gif_in_the_lists_is_beyond_the_builder(tmp_path):
    folder = write_archives(tmp_path / "pets", 3, 1)
    (folder / "images" / "Abyssinian_34.jpg").write_bytes(odd_photo("Abyssinian_34", draw_pet(1, 40)[0]))
    (folder / "annotations" / "test.txt").write_text("Abyssinian_34 1 1 1\n")
    packed = pack(folder, tmp_path / "packed")
    assert "must be 3-dimensional" in refused(packed, tmp_path, packed)


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), RuntimeError("No space left on")])
def test_a_full_disk(plain, tmp_path, monkeypatch, error):
    builder = builder_of(plain)
    monkeypatch.setattr("pathlib.Path.write_bytes", Mock(side_effect=error))
    with pytest.raises(InputError, match="No space left under"):
        tfds.export(tmp_path / "out" / "pets", tmp_path / "cache", plain, builder)
    assert not list((tmp_path / "out").iterdir())


def test_a_folder_that_is_there_is_not_touched(plain, tmp_path):
    with pytest.raises(InputError, match="already exists"):
        tfds.export(tmp_path, tmp_path / "cache", plain, builder_of(plain))
    assert not list(tmp_path.iterdir())
