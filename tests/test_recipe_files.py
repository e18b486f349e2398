"""Recipes by name and by file: what overrides what, and what a recipe may not say."""

import pytest
import yaml
from conftest import command

from unet.commands.cli import parse
from unet.config import DEFAULT_EPOCHS, RECIPE_SETTINGS, RECIPES, TrainSettings, TuneSettings, flat
from unet.errors import InputError
from unet.recipe.networks import describe
from unet.settings import defaults


@pytest.fixture
def mine(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("dropout: 0.1\nbatch_size: 8\nlearning_rate: 2e-3\nepochs: 7\n")
    return path


def test_a_flag_beats_the_file_and_the_file_the_recipe(mine, tmp_path):
    (tmp_path / "some.yaml").write_text(f"recipe: {mine}\nbatch_size: 16\nlearning_rate: 3e-3\n")
    settings = parse(TrainSettings, "", ["--config", str(tmp_path / "some.yaml"), "--learning-rate", "0.004"])
    found = flat(settings)
    assert (found["dropout"], found["batch_size"], found["learning_rate"], found["epochs"]) == (0.1, 16, 0.004, 7)
    assert found["recipe"] == str(mine) and found["base_filters"] == defaults(TrainSettings)["base_filters"]


def test_the_reference_is_what_all_settings_begin_with():
    found = flat(parse(TrainSettings, "", ["--recipe", "reference"]))
    begins = {name: value for name, value in defaults(TrainSettings).items() if name in RECIPE_SETTINGS}
    assert {name: found[name] for name in RECIPE_SETTINGS} == begins | {"epochs": DEFAULT_EPOCHS}
    assert describe(parse(TrainSettings, "", ["--recipe", "reference"]).model, 3).parameters == 34_513_475


def test_a_length_that_is_given_stands_for_the_recipes(mine):
    mine.write_text("minutes: 30\n")
    of = ["--recipe", str(mine)]
    assert parse(TrainSettings, "", of).length_in_words == "30 minutes"
    assert parse(TrainSettings, "", [*of, "--epochs", "3"]).length_in_words == "3 epochs"
    assert parse(TrainSettings, "", [*of, "--minutes", "5"]).length_in_words == "5 minutes"
    assert (
        parse(TrainSettings, "", [*of, "--minutes", "5", "--epochs=3"]).length_in_words == "5 minutes, at most 3 epochs"
    )
    # The minutes of a sweep are its own; its trials take the usual epochs.
    assert parse(TuneSettings, "", of).length.minutes is None and parse(TuneSettings, "", of).epochs == DEFAULT_EPOCHS


def test_a_length_by_flag_stands_for_that_of_a_file_or_a_run(mine, tmp_path):
    (tmp_path / "run").mkdir()
    for config in (tmp_path / "run" / "config.yaml", tmp_path / "some.yaml"):
        config.write_text(yaml.safe_dump(flat(parse(TrainSettings, "", ["--recipe", str(mine)]))))
    for source in (["--resume", "run", "--storage-path", str(tmp_path)], ["--config", str(tmp_path / "some.yaml")]):
        assert parse(TrainSettings, "", source).length_in_words == "7 epochs"
        assert parse(TrainSettings, "", [*source, "--minutes", "5"]).length_in_words == "5 minutes"
        assert parse(TrainSettings, "", [*source, "--epochs", "9"]).length_in_words == "9 epochs"


def test_the_minutes_of_a_sweep_leave_the_epochs_of_its_trials(mine, tmp_path):
    assert parse(TuneSettings, "", ["--recipe", str(mine), "--minutes", "60"]).epochs == 7
    timed = flat(parse(TrainSettings, "", ["--recipe", str(mine), "--minutes", "20"]))
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(timed))
    assert parse(TuneSettings, "", ["--config", str(tmp_path / "run.yaml")]).length.minutes is None


def test_settings_that_are_complete_take_no_other_recipe(mine, tmp_path):
    """A run's or a sweep's own, which need no recipe: its file may be gone."""
    complete = flat(parse(TrainSettings, "", ["--recipe", str(mine)]))
    (tmp_path / "all.yaml").write_text(yaml.safe_dump({k: v for k, v in complete.items() if k != "minutes"}))
    mine.unlink()
    config = ["--config", str(tmp_path / "all.yaml")]
    assert flat(parse(TrainSettings, "", config)) | {"config": None} == complete
    with pytest.raises(InputError, match="has every setting of a recipe: leave out --recipe"):
        parse(TrainSettings, "", [*config, "--recipe", "reference"])


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
@pytest.mark.parametrize("settings", [TrainSettings, TuneSettings])
def test_every_recipe_fits_a_training_and_a_sweep(path, settings):
    found = flat(parse(settings, "", ["--recipe", path.stem]))
    said = yaml.safe_load(path.read_text())
    for name in said.keys() - {"minutes"}:
        assert found[name] == pytest.approx(said[name]) if isinstance(said[name], float) else found[name] == said[name]


def test_a_job_that_names_none_takes_the_best():
    best = flat(parse(TrainSettings, "", ["--recipe", "best"]))
    assert flat(parse(TrainSettings, "", [])) == best != flat(TrainSettings())


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("num_workers: 2\n", "cannot set num_workers: it can set"),
        ("drop: 0.1\n", "cannot set drop"),
        ("[1, 2]\n", "must hold `name: value` lines"),
        ("dropout: 1.5\n", "--dropout 1.5"),
        ("dropout: 0.1\ndropout: 0.2\n", "dropout is given twice"),
    ],
)
def test_what_a_recipe_cannot_say_is_one_sentence(mine, text, words):
    mine.write_text(text)
    with pytest.raises(InputError) as error:
        parse(TrainSettings, "", ["--recipe", str(mine)])
    assert words in str(error.value) and "\n" not in str(error.value)


def test_a_recipe_that_is_not_there_meets_its_nearest(tmp_path, capsys):
    assert command("train", "--recipe", "refrence", "--storage-path", tmp_path / "new") == 2
    assert not (tmp_path / "new").exists()
    assert "There is no recipe 'refrence': did you mean reference?" in capsys.readouterr().err
    with pytest.raises(InputError, match=r"Cannot read --recipe .*none.yaml: No such file"):
        parse(TrainSettings, "", ["--recipe", str(tmp_path / "none.yaml")])


def test_a_run_that_continues_keeps_its_recipe(mine, tmp_path):
    complete = flat(parse(TrainSettings, "", ["--recipe", str(mine)]))
    # A run of a version that had no such setting: what it lacks is the reference's, not today's best.
    old = {name: value for name, value in complete.items() if name not in ("recipe", "loss")}
    for name, values in (("now", complete), ("old", old)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.yaml").write_text(yaml.safe_dump(values))
    here = ["--storage-path", str(tmp_path)]
    mine.unlink()
    now, before = (flat(parse(TrainSettings, "", ["--resume", name, *here])) for name in ("now", "old"))
    assert {n: now[n] for n in RECIPE_SETTINGS} == {n: before[n] for n in RECIPE_SETTINGS}
    assert now["recipe"] == str(mine) and before["recipe"] == "reference"
    with pytest.raises(InputError, match="now goes on with its own settings: leave out --recipe"):
        parse(TrainSettings, "", ["--resume", "now", "--recipe", "reference", *here])
