"""A run that is trained again, and what is said of its numbers."""

import re

import pytest
from conftest import command, listening, read_json, tiny_settings, words_of

from unet.errors import InputError
from unet.runs.run import Run, read_history
from unet.storage import Folder
from unet.supervise import driver
from unet.supervise.reproduction import Reproduction, differences
from unet.tracking.original import Original, numbers

LINE = {"epoch": 1, "time": 5, "train/loss": 0.5, "val/mean_iou": 0.25, "speed/images_per_second": 9.0}


def compared(*lines: dict, there: tuple = (LINE,), **summary) -> tuple[list[str], str]:
    """What is said of each epoch, and in the end."""
    found = Reproduction(Original("first", {}, list(there), {"test": {"mean_iou": 0.5}}))
    words = [found.epoch(line) for line in lines]
    return words, found.verdict({"data_digest": "d" * 40, "code": "c"} | summary, {"tensorflow": "2"})


@pytest.mark.parametrize(
    ("change", "words", "verdict"),
    [
        (
            {"time": 6, "speed/images_per_second": 1.0},
            "the same bits as first",
            "Reproduced: first bit for bit over 1 ",
        ),
        (
            {"train/loss": 0.5 + 1e-8},
            r"within 1e-06 of first \(at most 2.0e-08, train/loss\)",
            "first within 2.0e-08 o",
        ),
        ({"train/loss": 0.6}, r"other numbers .* train/loss 0.5 there, 0.6 here|\(train/loss 0.5", "Not reproduced: "),
        ({"val/mean_iou": None}, "val/mean_iou 0.25 there, None here", "Not reproduced"),
    ],
)
def test_numbers_are_the_same_bits_or_close_or_part(change, words, verdict):
    (found,), line = compared({k: v for k, v in (LINE | change).items() if v is not None})
    assert re.search(words, found) and verdict in line


def test_the_first_place_where_they_part_is_named_and_the_test_split_counts():
    second = LINE | {"epoch": 2}
    words, line = compared(LINE, second | {"train/loss": 1.0}, LINE | {"epoch": 3}, there=(LINE, second))
    assert "parted in epoch 2" in line and "epoch 3: first has none" in words[2]
    assert "parted in the test split" in compared(LINE, test={"mean_iou": 0.6})[1]
    same = compared(LINE, test={"mean_iou": 0.5})[1]
    assert same.startswith("Reproduced: first bit for bit over 1 epoch(s); test mean IoU 0.5000, data dddddddddddd")
    assert compared()[1].startswith("Nothing of first could be compared")


def test_a_run_is_found_by_name_and_in_mlflow_with_the_same_numbers(trained, storage, tmp_path):
    _, summary = trained
    local = Original.find("trained", Folder(storage))
    for name in (summary["mlflow_run_id"], f"runs:/{summary['mlflow_run_id']}/model"):
        sent = Original.find(name, Folder(tmp_path), f"sqlite:///{storage}/mlflow.db")
        assert (sent.name, sent.settings, sent.equality) == (local.name, local.settings, local.equality)
        assert [numbers(line) for line in sent.history] == [numbers(line) for line in local.history]
        assert {k: sent.summary[k] for k in ("code", "test")} == {k: summary[k] for k in ("code", "test")}
    assert len(local.history) == 10 and local.equality["num_workers"] == 2
    for name, words in (
        ("nobody", "There is no run nobody"),
        ("models:/x", "is not a run"),
        ("f" * 32, "does not give"),
    ):
        with pytest.raises(InputError, match=words):
            Original.find(name, Folder(storage))


def test_a_run_is_reproduced(trained, storage, capsys):
    """In its first epochs: the rate is constant, so that fewer change nothing."""
    assert command("train", "--reproduce=trained", f"--storage-path={storage}", "--epochs=2") == 0
    output = " ".join(capsys.readouterr().out.split())
    again = read_json(storage / "trained-again" / "summary.json")
    first, second = ([numbers(r) for r in read_history(Folder(storage / n))[:2]] for n in ("trained", "trained-again"))
    assert first == second
    assert "Trains trained again. What differs here: --epochs: 10 there, 2 here" in output
    assert "epoch 1: the same bits as trained" in output and "epoch 2: the same bits as trained" in output
    assert again["reproduction"] in output and "trained and this run parted in the test split" in again["reproduction"]


def test_a_reproduction_goes_on_without_its_original(storage, tmp_path):
    settings = tiny_settings(tmp_path, storage, run_name="again", reproduce="gone")
    run, display = Run("again", settings, Folder(tmp_path / "again")), listening()
    with pytest.raises(InputError, match="There is no run gone"):
        driver._again(run, None, display)
    run.summary["status"] = "stopped"
    assert driver._again(run, None, display) is None and "goes on without a comparison" in words_of(display)


def test_what_differs_is_told(trained, storage):
    original = Original.find("trained", Folder(storage))
    original.equality["tensorflow"] = "1.0"
    found = differences(original, tiny_settings(storage, storage, seed=3), "other", original.summary["code"])
    assert "--seed: 0 there, 3 here" in found and f"data: {original.summary['data_digest']} there, other here" in found
    assert any(line.startswith("tensorflow: 1.0 there, 2") for line in found)
    assert not any(line.startswith(("code", "--storage", "--run-name", "python")) for line in found)


@pytest.mark.parametrize("flag", ["--config=x.yaml", "--recipe=best"])
def test_a_run_that_is_reproduced_has_its_own_settings(trained, storage, flag, capsys):
    assert command("train", "--reproduce=trained", f"--storage-path={storage}", flag) == 2
    assert "leave out" in capsys.readouterr().err
