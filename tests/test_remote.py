"""An object store that fails: what passes is got over, what lasts is said, and nothing half-written counts as whole."""

import contextlib
import json
import os
import pickle
import re
import threading
from types import SimpleNamespace

import pyarrow.fs as pafs
import pytest
from conftest import command
from faulty_line import Line
from ray._private.runtime_env.constants import RAY_JOB_CONFIG_JSON_ENV_VAR

from unet import remote
from unet.config import TrainSettings, unflat
from unet.config.files import load_yaml
from unet.disk import check_writable
from unet.errors import Damaged, InputError, StorageAway, StorageFailed
from unet.remote import patience
from unet.runs.run import Run, called, where
from unet.storage import Folder

CONTENT = bytes(range(256)) * 40


@pytest.fixture
def line(s3):
    line = Line(s3("").rpartition("endpoint_override=")[2])
    yield line
    line.close()


@pytest.fixture
def folder(line, tmp_path):
    folder = Folder(f"s3://me:word@pets/{tmp_path.name}?scheme=http&endpoint_override={line.place}")
    folder.commit("set", {"a": CONTENT, "b": b"second"})
    folder.write_bytes("file", CONTENT)
    line.calls.clear()
    return folder


def work(folder: Folder) -> None:
    """Each kind of call that a folder makes."""
    folder.write_bytes("new", CONTENT)
    folder.commit("another", {"a": CONTENT})
    assert folder.read_bytes("new") == CONTENT and folder.read_committed("set", "a") == CONTENT
    assert folder.names() == ["another", "file", "new", "set"]
    assert folder.exists("file") and not folder.exists("none") and folder.size("file") == len(CONTENT)
    with folder.fs.open_input_file(folder.at("file")) as file:
        file.seek(-300, os.SEEK_END)
        assert file.read(100) + file.read() == CONTENT[-300:] and file.read() == b""
    folder.delete("another")
    folder.fs.delete_file(folder.at("new"))
    with pytest.raises(FileNotFoundError):
        folder.read_bytes("new")
    assert folder.names() == ["file", "set"]


@pytest.mark.parametrize("fault", ["500", "503", "cut", "lost", "torn"])
def test_what_passes_is_got_over(fault, line, folder, monkeypatch):
    """Of a third of all requests each, in all kinds of calls; also where only the answer was lost."""
    monkeypatch.setattr(remote, "FIRST_PAUSE", 0.01)
    with line.failing(fault, share=0.3):
        work(folder)
    assert line.failed >= 4


def test_a_store_that_is_away_is_waited_for_and_somebody_is_told(line, folder, monkeypatch):
    monkeypatch.setattr(remote, "TOLD_AFTER", 0.2)
    told, over = [], threading.Timer(2.0, line.heal)
    over.start()
    with line.failing("503"), patience(60, told.append):
        folder.write_bytes("file", b"late")
    assert folder.read_bytes("file") == b"late" and len(line.calls) < 20  # it is not stormed
    place = f"s3://{folder.path}/file"
    assert re.fullmatch(rf"waiting for {place}, since \d+ s: slow down \(said by the line\)", told[0])
    assert told[-1].startswith(f"{place} answers again, after ") and len(told) == 2


def test_what_was_taken_over_in_the_meantime_is_not_written(line, folder, tmp_path, monkeypatch):
    """An attempt minutes after the first, when another driver has the run."""
    run = Run("x", None, folder / "x")
    run.folder.write_text("config.yaml", "")
    run.write_summary(status="running")
    run.take_over()

    def taken_over(words):
        line.heal()
        Run("x", None, Folder(folder.uri) / "x").take_over()

    monkeypatch.setattr(remote, "TOLD_AFTER", 0.0)
    with (
        line.failing("503", method="PUT"),
        patience(60, taken_over),
        pytest.raises(StorageFailed, match="has taken over"),
    ):
        run.write_summary(status="stopped")
    assert json.loads(run.folder.read_text("summary.json")) == {"status": "running"}


def test_patience_ends_in_a_sentence_and_leaves_what_was_whole(line, folder):
    known, remedy = folder.marker("set"), f"make sure that {line.place} can be reached"
    with line.failing("500"), patience(0.1):
        for call in (
            lambda: folder.commit("set", {"a": b"other"}),
            lambda: folder.write_bytes("file", b"other"),
            lambda: folder.names(),
            lambda: folder.exists("file"),
            lambda: folder.read_bytes("file"),
            lambda: folder.delete("set"),
        ):
            with pytest.raises(StorageAway, match=rf"^Cannot \w+ s3://{folder.path}.*: .*; {remedy}$"):
                call()
    assert folder.marker("set") == known and folder.read_committed("set", "a") == folder.read_bytes("file") == CONTENT


@pytest.mark.parametrize("ends_at", range(5))
def test_wherever_a_write_is_broken_off_no_mixture_counts(ends_at, line, folder):
    """Over an older set of the same name: its marker goes first, that of the new one comes last."""
    done = lambda path: sum(method == "PUT" for method, _ in line.calls) > ends_at  # noqa: E731
    fails = line.failing("500", only=lambda method, path: done(path) and method == "PUT")
    ends = pytest.raises(StorageAway) if ends_at < 4 else contextlib.nullcontext()
    with fails, patience(0), ends:
        folder.commit("set", {"a": b"new", "b": b"newer"})
    if ends_at < 4:
        with pytest.raises(Damaged, match="COMMIT: missing"):
            folder.read_committed("set", "b")
    else:
        assert folder.read_committed("set", "a") + folder.read_committed("set", "b") == b"newnewer"


def test_a_short_answer_that_says_it_is_whole_never_passes_for_another_content(line, folder):
    """Arrow fills it up from old memory, which may hold the right bytes by chance."""
    with line.failing("short", match="set/a", method="GET"), contextlib.suppress(Damaged):
        assert folder.read_committed("set", "a") == CONTENT
    assert line.failed and folder.read_committed("set", "a") == CONTENT


@pytest.mark.parametrize("fault", ["slow", "silent"])
def test_a_slow_store_is_slow_and_a_silent_one_is_asked_again(fault, line, folder, monkeypatch):
    """The limit of the AWS SDK is three seconds without a byte."""
    monkeypatch.setattr(remote, "SILENT_SECONDS", {"slow": 5.0, "silent": 1.0}[fault])
    line.seconds, folder = 3.5, Folder(folder.uri)
    with line.failing(fault, first=1):
        assert folder.read_bytes("file") == CONTENT
    assert len(line.calls) == {"slow": 2, "silent": 3}[fault]


def test_a_store_may_be_passed_to_another_process(line, folder):
    with line.failing("500", first=2):
        assert pickle.loads(pickle.dumps(folder / "set")).read_bytes("b") == b"second"


@pytest.mark.parametrize(("given", "settled"), [(None, "when_required"), ("when_supported", "when_supported")])
def test_only_aws_is_sent_its_own_kind_of_checksums(given, settled, s3, monkeypatch):
    for name in remote.CHECKSUMS:
        monkeypatch.delenv(name, raising=False)
        if given:
            monkeypatch.setenv(name, given)
    Folder("s3://key:word@bucket/x?region=eu-west-1")
    assert os.environ.get(remote.CHECKSUMS[0]) == given
    Folder(s3("x"))
    assert [os.environ[name] for name in remote.CHECKSUMS] == [settled] * 2
    for name in remote.CHECKSUMS:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    Folder("s3://key:word@bucket/x")
    assert remote.CHECKSUMS[0] in os.environ


def test_what_waiting_does_not_cure_is_said_at_once(s3):
    nowhere = Folder(s3("x").replace("@pets/", "@nowhere/"))
    words = "^Cannot write s3://nowhere/x/a: there is no such bucket; create it, or correct its name$"
    with pytest.raises(StorageFailed, match=words) as error:
        nowhere.write_bytes("a", b"")
    assert not isinstance(error.value, StorageAway)


@pytest.mark.parametrize("content", [None, "{}", "no JSON"])
def test_credentials_that_google_s_client_does_not_take_are_said_at_once(content, tmp_path, monkeypatch):
    file = tmp_path / "key.json"
    if content:
        file.write_text(content)
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(file))
    words = "it does not take the credentials; correct GOOGLE_APPLICATION_CREDENTIALS, or give another --storage-path"
    with pytest.raises(InputError, match=f"^Cannot write gs://pets/x: {words}"):
        check_writable(Folder("gs://pets/x"))


def test_a_probe_is_written_read_and_removed(line, folder):
    check_writable(folder)
    assert folder.names() == ["file", "set"] and [method for method, _ in line.calls][:3] == ["PUT", "HEAD", "GET"]


def test_what_is_to_be_typed_again_works_by_the_keys_of_the_shell(s3, tmp_path, monkeypatch):
    folder = Folder(s3(f"{tmp_path.name}/a sweep".replace(" ", "%20")))
    folder.write_text("best_config.yaml", "epochs: 3\n")
    typed, rest = folder.typed("best_config.yaml"), s3("").partition("?")[2]
    assert typed == f"s3://pets/{tmp_path.name}/a%20sweep/best_config.yaml?{rest}"
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "me")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "word")
    assert load_yaml(typed) == {"epochs": 3}
    with pytest.raises(InputError, match=r"^Cannot read --config s3://.*: No such file or directory\.$"):
        load_yaml(folder.typed("none.yaml"))
    run = unflat(TrainSettings, {"storage_path": f"{folder.uri}&secret_key=word", "tracking_uri": "http://host"}).run
    assert where(run) == f" --storage-path '{folder.typed()}' --tracking-uri http://host"


def test_a_submitted_job_is_continued_by_a_submission(monkeypatch):
    assert called("train") == "python jobs/train.py"
    monkeypatch.setenv(RAY_JOB_CONFIG_JSON_ENV_VAR, "{}")
    assert called("train") == "ray job submit --working-dir . -- python jobs/train.py"


JOBS = {
    "train": ["--data=synthetic:20", "--tracking-uri=http://127.0.0.1:9"],
    "tune": ["--data=synthetic:20", "--space=quick", "--tracking-uri=http://127.0.0.1:9"],
    "evaluate": ["--model=run"],
    "predict": ["--model=run", "--input=docs/img", "--output={}"],
    "prepare": ["--source=synthetic:20"],
}


@pytest.mark.parametrize("name", JOBS)
def test_jobs_refuse_a_store_before_ray_starts(name, s3, monkeypatch, capsys):
    import ray

    from unet import disk

    monkeypatch.setattr(disk, "DOOR_SECONDS", 1.0)
    monkeypatch.setattr(ray, "init", None)
    wrong = {
        s3("x").replace("@pets/", "@nowhere/"): "there is no such bucket; create it, or correct its name",
        "s3://me:word@pets/x?scheme=http&endpoint_override=127.0.0.1:9": "; make sure that 127.0.0.1:9 can be reached",
    }
    for uri, words in wrong.items():
        assert command(name, f"--storage-path={uri}", *(flag.format(uri) for flag in JOBS[name])) == 2
        error = capsys.readouterr().err.splitlines()[-1]
        assert error.startswith("error: Cannot ") and words in error and "word@" not in error


@pytest.fixture
def asked_of_aws(monkeypatch):
    """What AWS answers to the question for a bucket's region, one after another, before it says it."""
    answers: list[str] = []

    class Opened:
        @staticmethod
        def from_uri(uri):
            if answers:
                raise OSError(answers.pop(0))
            return pafs.S3FileSystem(region="us-west-2"), uri.partition("://")[2]

    names = {name: getattr(pafs, name) for name in dir(pafs)} | {"FileSystem": Opened}
    monkeypatch.setattr(remote, "pafs", SimpleNamespace(**names))
    return answers


def test_the_region_of_a_bucket_is_waited_for(asked_of_aws, monkeypatch):
    monkeypatch.setattr(remote, "FIRST_PAUSE", 0.01)
    asked_of_aws += [
        "When resolving region for bucket 'pets': AWS Error NETWORK_CONNECTION: curlCode: 6, Could not"
    ] * 2
    folder = Folder("s3://pets/runs")
    assert not asked_of_aws and folder.path == "pets/runs"
    asked_of_aws += ["AWS Error NETWORK_CONNECTION: curlCode: 28, Timeout was reached"] * 9
    with pytest.raises(StorageAway, match=r"^Cannot find s3://pets/runs: .*can be reached$"), patience(0):
        Folder("s3://pets/runs")


def test_a_bucket_that_aws_does_not_know_is_said_at_once(asked_of_aws):
    asked_of_aws += ["Bucket 'pets' not found"]
    with pytest.raises(StorageFailed, match=r"^Cannot find s3://pets/runs: there is no such bucket; create it"):
        Folder("s3://pets/runs")
