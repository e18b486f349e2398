"""What a sweep tries next and whom it stops: spaces, draws, the past that a search is told. No cluster."""

import json
import random
from types import SimpleNamespace

import numpy as np
import pytest
import yaml
from conftest import command
from pages import pets, write_prepared
from ray.tune.search import Searcher

from unet.commands.cli import parse
from unet.config import TrainSettings, TuneSettings, unflat
from unet.data.shards import Prepared
from unet.errors import InputError
from unet.metric_names import BEST
from unet.storage import Folder
from unet.tuning.ledger import Ledger, ranked
from unet.tuning.runner import _settle_class_weights
from unet.tuning.schedule import check_schedule, make_scheduler
from unet.tuning.search import Search, variants
from unet.tuning.space import SPACES, parse_space, read_space

RANGES = "dropout: {uniform: [0.0, 0.5]}\nlearning_rate: {loguniform: [0.001, 0.1]}\nbase_filters: {choice: [4, 8]}\n"


def space_of(text: str, **settings):
    return parse_space(text, "small.yaml", unflat(TuneSettings, settings))


@pytest.mark.parametrize("name", sorted(path.stem for path in SPACES.glob("*.yaml")))
def test_every_space_of_the_folder_is_valid(name):
    of_a_sweep = parse(TuneSettings, "", [])  # which names no recipe
    space = parse_space(read_space(name), name, of_a_sweep)
    assert set(space.draws) == set(yaml.safe_load(space.text)) >= {"dropout", "learning_rate"}
    assert name == "pbt" or "base_filters" in space.draws


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("learning_rat: {uniform: [0.1, 0.2]}", "did you mean learning_rate?"),
        ("epochs: {choice: [1, 2]}", "cannot search 'epochs'"),
        ("dropout: {unifrom: [0.1, 0.2]}", "did you mean uniform?"),
        ("dropout: {uniform: 0.3}", "`uniform: [low, high]`"),
        ("dropout: {uniform: [0.5, 0.2]}", "`uniform: [low, high]`"),
        ("learning_rate: {loguniform: [0, 1]}", "above 0"),
        ("dropout: {uniform: [0.2, 1.5]}", "--dropout 1.5"),
        ("base_filters: {choice: [8, none]}", "--base-filters none"),
        ("base_filters: {choice: []}", "`choice: [a, b, …]`"),
        ("depth: {choice: [3, 6]}", "--image-size 96"),  # six poolings do not divide 96 px
        ("base_filters: {uniform: [8, 16]}", "randint or choice"),
        ("batch_size: {randint: [4, 32]}", "draws settings that do not fit together: --grad-shards 4"),
        ("dropout", "needs lines such as"),
        ("dropout: [", "not valid YAML"),
        (
            "depth: {choice: [2]}\ndropout: {choice: [0]}\ndepth: {choice: [3]}",
            "depth is given twice, in lines 1 and 3",
        ),
    ],
)
def test_a_space_that_cannot_work_is_refused(text, words):
    with pytest.raises(InputError) as error:
        space_of(text, image_size=96, grad_shards=4)
    assert words in str(error.value) and "small.yaml" in str(error.value)


def test_a_space_is_found_by_name_or_path_and_the_nearest_is_named(tmp_path, capsys):
    for flags, words in (
        (["--space", "defualt"], "did you mean default?"),
        (["--space", tmp_path / "none.yaml"], "none.yaml: No such file"),
        (["--search", "grid"], "needs choices"),
        (["--search", "grid", "--num-samples", "3"], "leave out --num-samples"),
        (["--scheduler", "pbt", "--num-workers", "2"], "one worker"),
        (["--scheduler", "pbt"], "--space pbt"),
        (["--extend", "3", "--run-name", "none"], "There is no sweep none"),
    ):
        assert command("tune", *flags, f"--storage-path={tmp_path}") == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ") and error.count("\n") == 1 and words in error


def test_the_largest_trial_is_what_memory_is_planned_for():
    largest = space_of("base_filters: {choice: [8, 64, 16]}\nbatch_size: {randint: [4, 32]}").largest
    assert (largest.model.base_filters, largest.training.batch_size) == (64, 32)
    kinds = "network: {choice: [compact, unet]}\nnorm: {choice: [none, batch]}\nblocks: {choice: [2, 1]}"
    model = space_of(f"{kinds}\ndepth: {{randint: [1, 3]}}").largest.model
    assert (model.network, model.norm, model.depth, model.blocks) == ("unet", "batch", 3, 2)


def test_choices_are_read_as_the_settings_read_them():
    """YAML takes 1e-3 for a text, and a number in quotes is one too."""
    assert space_of("learning_rate: {choice: [1e-3, 0.01]}").draws["learning_rate"].categories == [0.001, 0.01]
    assert space_of('base_filters: {choice: ["8", 16]}').largest.model.base_filters == 16


def test_losses_and_class_weights_are_drawn_with_numbers_in_the_place_of_auto(tmp_path):
    losses = "loss: {choice: [cross_entropy, cross_entropy+0.5*jaccard]}\nlabel_smoothing: {uniform: [0, 0.2]}\n"
    space = space_of(losses + "class_weights: {choice: [null, auto, '1,2,3']}", class_weights="auto")
    rows = [
        row | {"split": "train", "mask": np.full((32, 32), (0, 1, 1, 1, 1)[i], np.uint8)}
        for i, row in enumerate(pets(5))
    ]
    sweep = SimpleNamespace(settings=unflat(TuneSettings, {"class_weights": "auto"}), space=space)
    _settle_class_weights(sweep, write_prepared(tmp_path / "one_to_four", rows), 5)
    weights = "1.2,0.6,1.2"
    assert sweep.settings.loss.class_weights == weights
    assert sweep.space.draws["class_weights"].categories == [None, weights, "1,2,3"]
    stream = variants(sweep.space, "random", 0)
    drawn = [unflat(TrainSettings, next(stream)).recipe(3).loss for _ in range(30)]
    assert {loss.loss for loss in drawn} == {"cross_entropy", "cross_entropy+0.5*jaccard"}
    assert {loss.class_weights for loss in drawn} == {None, weights, "1,2,3"}
    assert all(0 <= loss.label_smoothing <= 0.2 for loss in drawn)
    sweep.space = space_of("class_weights: {choice: [null, '1,2']}")
    with pytest.raises(InputError, match="--class-weights 1,2 has 2 numbers, but the data have 3 classes"):
        _settle_class_weights(sweep, Prepared(Folder(tmp_path / "one_to_four")), 5)


def test_random_draws_repeat_by_seed_and_stay_inside():
    space = space_of(RANGES)

    def first(seed, count=40):
        stream = variants(space, "random", seed)
        return [next(stream) for _ in range(count)]

    assert first(3) == first(3) != first(4)
    assert all(0 <= d["dropout"] <= 0.5 and 0.001 <= d["learning_rate"] <= 0.1 for d in first(3))
    assert {d["base_filters"] for d in first(3)} == {4, 8}
    assert json.loads(json.dumps(first(3))) == first(3)  # plain numbers
    stream = variants(space_of("batch_size: {randint: [4, 6]}"), "random", 0)
    ends = {next(stream)["batch_size"] for _ in range(60)}
    assert ends == {4, 5, 6}


def test_the_grid_is_every_combination_once():
    space = space_of("base_filters: {choice: [4, 8]}\ndropout: {choice: [0.0, 0.1, 0.2]}")
    found = [tuple(sorted(d.items())) for d in variants(space, "grid", 0)]
    assert len(found) == len(set(found)) == 6


def searched(folder, kind, planned, seed=0, scores=None):
    """Let a search run dry against made-up scores; what it suggested, in order."""
    ledger, space = Ledger(Folder(folder)), space_of(RANGES)
    search, draws = Search(space, kind, seed, ledger, planned, None), []
    while (suggested := search.suggest(f"id-{len(draws)}")) != Searcher.FINISHED:
        score = scores(suggested["draw"]) if scores else 0.5
        ledger.update(suggested["trial"], end="finished", **{BEST: score})
        search.on_trial_complete(f"id-{len(draws)}", {"val/best_mean_iou": score})
        draws.append(suggested)
    return draws


@pytest.mark.parametrize("kind", ["random", "tpe"])
def test_suggestions_repeat_by_seed_and_a_continued_search_repeats_none(kind, tmp_path):
    whole = searched(tmp_path / "whole", kind, 6)
    assert searched(tmp_path / "again", kind, 6) == whole and len(whole) == 6
    assert searched(tmp_path / "other", kind, 6, seed=1) != whole
    first = searched(tmp_path / "parts", kind, 3)
    rest = searched(tmp_path / "parts", kind, 6)
    assert [d["trial"] for d in first + rest] == [f"trial-{i:03d}" for i in range(1, 7)]
    assert len({d["draw"]["learning_rate"] for d in first + rest}) == 6
    if kind == "random":  # as if it had never been interrupted
        assert first + rest == whole


def test_tpe_learns_from_the_past_of_an_earlier_start(tmp_path):
    """Twenty past trials that all say: dropout near 0.1. Its next draws lie nearer than random ones."""
    target = lambda draw: 1 - abs(draw["dropout"] - 0.1)  # noqa: E731
    searched(tmp_path, "random", 20, scores=target)
    learnt = [d["draw"] for d in searched(tmp_path, "tpe", 40, scores=target)]
    drawn = [d["draw"] for d in searched(tmp_path / "random", "random", 20)]
    distance = lambda draws: sum(abs(d["dropout"] - 0.1) for d in draws) / len(draws)  # noqa: E731
    assert len(learnt) == 20 and distance(learnt) < 0.6 * distance(drawn)


def test_trials_under_way_go_on_before_new_ones(tmp_path):
    ledger = Ledger(Folder(tmp_path))
    for end in ("finished", "running", "stopped", "pruned", "failed"):
        ledger.update(ledger.begin({"dropout": 0.1})["trial"], end=end, **{BEST: 0.5})
    search = Search(space_of(RANGES), "random", 0, Ledger(Folder(tmp_path)), 6, None)
    suggested = [search.suggest(str(i)) for i in range(4)]
    assert [s["trial"] for s in suggested[:3]] == ["trial-002", "trial-003", "trial-006"]
    assert suggested[0]["draw"] == {"dropout": 0.1} and suggested[3] == Searcher.FINISHED


def test_tpe_hears_of_each_trial_once_whether_it_ended_before_or_goes_on(tmp_path, monkeypatch):
    """What is under way counts when it ends, a trial without a score never, one that diverged as the worst."""
    from ray.tune.search.optuna import OptunaSearch

    told, ledger = [], Ledger(Folder(tmp_path))
    add = OptunaSearch.add_evaluated_point
    record = lambda self, settings, value: told.append((settings["dropout"], value)) or add(self, settings, value)  # noqa: E731
    monkeypatch.setattr(OptunaSearch, "add_evaluated_point", record)
    ends = ("finished", 0.5), ("pruned", 0.3), ("running", 0.4), ("failed", None), ("stopped", 0.2)
    for i, (end, score) in enumerate(ends):
        draw = {"dropout": i / 10, "learning_rate": 0.01, "base_filters": 4}
        ledger.update(ledger.begin(draw)["trial"], end=end, **{BEST: score})
    ledger.update(ledger.begin(draw | {"dropout": 0.5})["trial"], end="failed", **{BEST: 0.9}, diverged=True)
    search = Search(space_of(RANGES), "tpe", 2**32 - 1, ledger, 7, None)  # the greatest seed there is
    assert told == [(0.0, 0.5), (0.1, 0.3), (0.5, 0.0)]
    for trial_id, score in (("a", 0.45), ("b", None)):
        assert search.suggest(trial_id)["trial"] == {"a": "trial-003", "b": "trial-005"}[trial_id]
        search.on_trial_complete(trial_id, {"val/best_mean_iou": score} if score else None, error=score is None)
    assert told[3:] == [(0.2, 0.45)]
    assert search.suggest("c")["trial"] == "trial-007"
    search.on_trial_complete("c", {"val/best_mean_iou": 0.6})
    assert len(told) == 4 and search.suggest("d") == Searcher.FINISHED


def test_a_search_that_is_closed_suggests_nothing(tmp_path):
    search = Search(space_of(RANGES), "random", 0, Ledger(Folder(tmp_path)), 6, None)
    assert search.suggest("a") != Searcher.FINISHED
    search.close()
    assert search.suggest("b") == Searcher.FINISHED


def test_asha_knows_the_trials_of_an_earlier_start(tmp_path):
    """A trial that is worse than nine past ones at the first rung is stopped; without the past it would go on."""
    settings, space = unflat(TuneSettings, {"epochs": 9}), space_of(RANGES)
    empty = make_scheduler(settings, space, Ledger(Folder(tmp_path / "empty")))
    ledger = Ledger(Folder(tmp_path / "past"))
    for i in range(9):
        row = ledger.begin({"dropout": 0.1})
        ledger.update(row["trial"], end="pruned")
        line = json.dumps({"epoch": 1, "val/mean_iou": 0.3 + 0.05 * i})
        (Folder(tmp_path / "past") / row["trial"]).write_text("metrics.jsonl", line + "\n")
    told = make_scheduler(settings, space, ledger)

    class Trial:
        trial_id = "new"

    for scheduler, decision in ((empty, "CONTINUE"), (told, "STOP")):
        scheduler.on_trial_add(None, Trial)
        assert scheduler.on_trial_result(None, Trial, {"epoch": 1, "val/mean_iou": 0.4}) == decision


def test_pbt_stays_inside_the_space_and_needs_settings_that_can_change(tmp_path):
    settings = unflat(TuneSettings, {"scheduler": "pbt"})
    with pytest.raises(InputError, match="base_filters"):
        check_schedule(settings, space_of(RANGES))
    space = space_of("dropout: {uniform: [0.1, 0.2]}\nlearning_rate: {choice: [0.001, 0.01]}")
    check_schedule(settings, space)
    scheduler = make_scheduler(settings, space, Ledger(Folder(tmp_path)))
    moved = scheduler._custom_explore_fn({"draw": {"dropout": 0.24, "learning_rate": 0.01}})
    assert moved["draw"] == {"dropout": 0.2, "learning_rate": 0.01}

    def luck():
        make_scheduler(settings, space, Ledger(Folder(tmp_path)))
        return random.random(), np.random.random()

    assert luck() == luck()


def test_the_ledger_outlives_its_process_and_ranks_by_score(tmp_path):
    ledger = Ledger(Folder(tmp_path))
    for score in (0.2, None, 0.5):
        ledger.update(ledger.begin({"dropout": 0.1})["trial"], end="finished", **{BEST: score})
    assert Ledger(Folder(tmp_path)).rows == ledger.rows
    assert [r["trial"] for r in ranked(ledger.rows)] == ["trial-003", "trial-001", "trial-002"]


def test_importance_names_the_setting_that_decides(tmp_path):
    """Forty trials whose score is their learning rate's alone; too few trials say nothing."""
    from unet.tuning.importance import parameter_importance

    space = space_of(RANGES)
    searched(tmp_path, "random", 40, scores=lambda draw: draw["learning_rate"])
    rows = Ledger(Folder(tmp_path)).rows
    importance = parameter_importance(rows, space, 0)
    assert importance["learning_rate"] > 0.9 and sum(importance.values()) == pytest.approx(1)
    assert parameter_importance(rows[:8], space, 0) and parameter_importance(rows[:7], space, 0) == {}
