"""A store with real keys and signatures: Ceph's gateway, through the line that fails."""

import json
import os
import threading
import time

import ceph
import numpy as np
import pyarrow.fs as pafs
import pytest
from conftest import job, read_json, weights_of
from faulty_line import Line

from unet import locks, remote
from unet.disk import check_writable
from unet.errors import InputError
from unet.locks import Busy, held
from unet.remote import patience
from unet.runs.checkpoint import WEIGHTS
from unet.storage import Folder


@pytest.fixture(scope="module")
def gateway(tmp_path_factory):
    ceph.require()
    gateway = ceph.Gateway(tmp_path_factory.mktemp("ceph"))
    try:
        gateway.start()
        folder = Folder(uri_of(gateway.place, "x"))  # leaves the checksums out
        assert [os.environ[name] for name in remote.CHECKSUMS] == ["when_required"] * 2
        options = {"access_key": ceph.KEY, "secret_key": ceph.SECRET, "scheme": "http"}
        owner = pafs.S3FileSystem(endpoint_override=gateway.place, allow_bucket_creation=True, **options)
        owner.create_dir(ceph.BUCKET)
        assert not folder.names()
        yield gateway
    finally:
        gateway.stop()


def uri_of(place: str, path: str, key: str = ceph.KEY, secret: str = ceph.SECRET, bucket: str = ceph.BUCKET) -> str:
    return f"s3://{key}:{secret}@{bucket}/{path}?scheme=http&endpoint_override={place}"


@pytest.mark.cluster
def test_it_takes_all_that_a_folder_does(gateway, monkeypatch):
    monkeypatch.setattr(locks, "BEAT_SECONDS", 1.0)
    folder = Folder(uri_of(gateway.place, "all/of%20it"))
    large = os.urandom(2 * 2**20) * 12
    check_writable(folder)
    folder.commit("set", {"a": large, "b": b"1"})
    folder.commit("set", {"a": large, "b": b"2"})
    assert folder.read_committed("set", "a") == large and folder.read_committed("set", "b") == b"2"
    assert folder.sizes() == {"set/a": len(large), "set/b": 1, "set/COMMIT": folder.size("set/COMMIT")}
    with held(folder / "lock"), pytest.raises(Busy), held(folder / "lock"):
        pass
    folder.delete("set")
    assert "set" not in folder.names()


@pytest.mark.cluster
@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"key": "nobody"}, "it does not know the access key; correct AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"),
        ({"secret": "other"}, "the secret key is wrong; correct AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"),
        ({"key": "guest"}, "access is denied; allow it, or correct AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"),
        ({"bucket": "nowhere"}, "there is no such bucket; create it, or correct its name"),
    ],
)
def test_what_is_wrong_is_said_at_once(wrong, words, gateway):
    began = time.monotonic()
    with pytest.raises(InputError) as error:
        check_writable(Folder(uri_of(gateway.place, "x", **wrong)))
    assert f": {words}, or give another --storage-path." in str(error.value) and time.monotonic() - began < 5
    assert ceph.SECRET not in str(error.value)


@pytest.mark.cluster
def test_a_frozen_gateway_is_waited_for(gateway):
    folder, told = Folder(uri_of(gateway.place, "frozen")), []
    folder.write_bytes("file", b"before")
    gateway.freeze()
    threading.Timer(30, gateway.thaw).start()
    with patience(60, told.append):
        folder.write_bytes("file", b"after")
    assert folder.read_bytes("file") == b"after" and "answers again, after" in told[-1]


TRAINING = ["--data=synthetic:120", "--image-size=32", "--base-filters=4", "--depth=2", "--batch-size=8", "--epochs=12"]
TRAINING += ["--recipe=reference", "--precision=float32", "--num-workers=2", "--threads=1", "--checkpoint-every=4"]


@pytest.mark.cluster
def test_a_training_outlasts_an_outage_and_equals_one_without(gateway, tmp_path):
    """503 to everything for 40 seconds from the second checkpoint on, in the driver and in the workers."""
    line, place = Line(gateway.place), Folder(uri_of(gateway.place, "runs")) / "away"
    keys = {"AWS_ACCESS_KEY_ID": ceph.KEY, "AWS_SECRET_ACCESS_KEY": ceph.SECRET}
    keys["AWS_ENDPOINT_URL"] = f"http://{line.place}"
    over = threading.Event()

    def fail():
        while sum(name.endswith("COMMIT") for name in place.sizes()) < 2 and not over.wait(0.2):
            pass
        with line.failing("503"):
            over.wait(40)

    failing = threading.Thread(target=fail)
    failing.start()
    flags = [*TRAINING, f"--tracking-uri=sqlite:///{tmp_path}/mlflow.db"]
    done = job("train", *flags, "--storage-path=s3://pets/runs", "--run-name=away", env=keys)
    over.set()
    failing.join()
    line.close()
    assert done.returncode == 0 and line.failed > 10, done.stdout
    assert "Training goes on" in done.stdout and "the storage is back" in done.stdout, done.stdout
    assert "--storage-path s3://pets/runs" in done.stdout
    calm = job("train", *flags, f"--storage-path={tmp_path}", "--run-name=calm")
    assert calm.returncode == 0, calm.stdout
    expected, found = read_json(tmp_path / "calm" / "summary.json"), json.loads(place.read_text("summary.json"))
    assert [found[key] for key in ("val", "test", "best_epoch")] == [expected[k] for k in ("val", "test", "best_epoch")]
    last = sorted(p.name for p in (tmp_path / "calm" / "checkpoints").iterdir())[-1]
    copy = tmp_path / "away" / "checkpoints" / last
    copy.mkdir(parents=True)
    (copy / WEIGHTS).write_bytes((place / "checkpoints").read_committed(last, WEIGHTS))
    before, after = weights_of(tmp_path / "calm", last), weights_of(tmp_path / "away", last)
    assert before and all(np.array_equal(before[name], after[name]) for name in before)
