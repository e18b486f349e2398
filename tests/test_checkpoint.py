"""Checkpoints against every kind of damage: what is not what was written is passed over, and said so."""

import contextlib
import json
import re
import shutil
import tempfile
from pathlib import Path

import h5py
import numpy as np
import pytest
import tensorflow as tf
from conftest import read_json, state_of, vouch, weights_of
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from unet.classes import ClassInfo
from unet.config import TrainSettings, flat, unflat
from unet.errors import Damaged, InputError, RunFailed, StorageFailed
from unet.models.trained import TrainedModel
from unet.recipe.layers import build_unet
from unet.recipe.network import ModelSettings
from unet.recipe.networks import describe
from unet.recipe.step import Learner
from unet.runs.checkpoint import Checkpoints
from unet.storage import Folder

SMALL = unflat(
    TrainSettings, {"image_size": 16, "base_filters": 2, "depth": 1, "batch_size": 2, "precision": "float32"}
)
OTHER = unflat(
    TrainSettings, {"image_size": 16, "base_filters": 3, "depth": 1, "batch_size": 2, "precision": "float32"}
)
FIRST, SECOND, THIRD = (f"step_{step:08d}" for step in (1, 2, 3))
STATE, WEIGHTS, OPTIMIZER = "state.json", "model.weights.h5", "optimizer.npz"


@pytest.fixture(scope="module")
def learner():
    return Learner(SMALL.recipe(3))


def state(step, **facts):
    return state_of(SMALL, step=step, **facts)


def save(run: Path, learner, step: int, **facts) -> Path:
    """A checkpoint whose weights and slots tell its step; its folder."""
    for value in learner.variables().values():
        value.assign(np.full(value.shape, step, value.numpy().dtype))
    (run / "config.yaml").write_text("base_filters: 2")
    return run / "checkpoints" / Checkpoints(Folder(run)).save(learner, state(step, **facts))


@pytest.fixture(scope="module")
def written(learner, tmp_path_factory):
    run = tmp_path_factory.mktemp("written")
    for step in (1, 2, 3):
        save(run, learner, step)
    return run


@pytest.fixture
def run(written, tmp_path):
    return shutil.copytree(written, tmp_path / "run")


def resume(run: Path):
    found, sentences = Checkpoints(Folder(run)).resume(SMALL)
    return found and found[0], sentences


def change_state(folder: Path, drop: str | None = None, **changes) -> None:
    content = read_json(folder / STATE) | changes
    content.pop(drop, None)
    (folder / STATE).write_text(json.dumps(content))


def change_arrays(folder: Path, change) -> None:
    arrays = dict(np.load(folder / OPTIMIZER))
    change(arrays)
    np.savez(folder / OPTIMIZER, **arrays)


def change_weights(folder: Path, change) -> None:
    with h5py.File(folder / WEIGHTS, "a") as file:
        change(file)


def weights_of_another(folder: Path) -> None:
    build_unet(16, 3, 1, 0.0, 3).save_weights(folder / WEIGHTS)


def flip(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place % len(content)] ^= 0x55
    path.write_bytes(content)


def cut(path: Path, place: int) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: place % len(content)])


# What is done to the last checkpoint, and what is said of it.
BYTES = {
    "a folder in place of a file": (
        lambda f: ((f / STATE).unlink(), (f / STATE).mkdir()),
        r"\(state.json: .* is a directory\)",
    ),
    "garbage in the marker": (lambda f: (f / "COMMIT").write_bytes(b"\xff{"), r"\(COMMIT: not what was written\)"),
    "another kind of marker": (lambda f: (f / "COMMIT").write_text("[1, 2]"), r"\(COMMIT: not what was written\)"),
    "a marker without files": (lambda f: (f / "COMMIT").write_text('{"a": [1, "x"]}'), "does not know state.json"),
    "no marker": (lambda f: (f / "COMMIT").unlink(), r"\(COMMIT: missing\)"),
}
for file in (STATE, WEIGHTS, OPTIMIZER):
    BYTES |= {
        f"{file} is cut": (lambda f, file=file: cut(f / file, -9), rf"\({file}: \d+ bytes of \d+\)"),
        f"{file} is empty": (lambda f, file=file: (f / file).write_bytes(b""), rf"\({file}: 0 bytes of \d+\)"),
        f"{file} is missing": (lambda f, file=file: (f / file).unlink(), rf"\({file}: missing\)"),
        f"{file} has another byte": (lambda f, file=file: flip(f / file, 1000), rf"\({file}: wrong digest\)"),
    }
# The same of content that its marker vouches for.
CONTENT = {
    "garbage in the state": (lambda f: (f / STATE).write_text("{"), r"\(state.json: .*EOF"),
    "a state that never ends": (lambda f: (f / STATE).write_text('{"a":' * 10**5), r"\(state.json: .*recursion"),
    "no state": (lambda f: (f / STATE).write_text("null"), r"\(state.json: "),
    "a step that is a text": (lambda f: change_state(f, step="3"), r"\(state.json: step: .*valid integer\)"),
    "a step that is not its own": (lambda f: change_state(f, step=2), r"\(state.json: is of step 2\)"),
    "an epoch before the first": (lambda f: change_state(f, epoch=0), r"\(state.json: epoch: "),
    "a history that is none": (lambda f: change_state(f, history=[3]), r"\(state.json: history.0: "),
    "a best one elsewhere": (lambda f: change_state(f, best_checkpoint="../../x"), r"\(state.json: best_checkpoint: "),
    "classes that are none": (lambda f: change_state(f, classes=[["pet"]]), r"\(state.json: classes.0"),
    "no epoch_step": (lambda f: change_state(f, drop="epoch_step"), r"\(state.json: lacks epoch_step\)"),
    "no network": (lambda f: change_state(f, settings={}), r"\(state.json: --image-size"),
    "a network without end": (lambda f: change_state(f, settings=flat(SMALL) | {"depth": 10**9}), "--depth"),
    "another network": (lambda f: change_state(f, settings=flat(OTHER)), r"\(state.json: is of another network\)"),
    "weights of another model": (weights_of_another, r"\(model.weights.h5: lacks encoder_1_conv_1/kernel\)"),
    "no HDF5": (lambda f: (f / WEIGHTS).write_bytes(b"x" * 5000), r"\(model.weights.h5: "),
    "weights that lack one": (
        lambda f: change_weights(f, lambda h: h.pop("encoder_1_conv_2/bias")),
        "lacks encoder_1_conv_2/bias",
    ),
    "no NPZ": (lambda f: (f / OPTIMIZER).write_bytes(b"x" * 5000), r"\(optimizer.npz: "),
    "an NPY": (lambda f: np.save((f / OPTIMIZER).open("wb"), np.zeros(3)), r"\(optimizer.npz: "),
    "a missing array": (lambda f: change_arrays(f, lambda a: a.pop("loss_scale")), "lacks loss_scale"),
    "an array too many": (lambda f: change_arrays(f, lambda a: a.update(more=np.zeros(2))), "also holds more"),
    "a wrong shape": (
        lambda f: change_arrays(f, lambda a: a.update(loss_scale=np.zeros(2))),
        r"loss_scale is float64 \(",
    ),
    "texts for numbers": (lambda f: change_arrays(f, lambda a: a.update(loss_scale=np.array("x"))), "loss_scale is <U"),
}


@pytest.mark.parametrize("kind", BYTES)
def test_changed_bytes_are_passed_over(run, kind):
    damage, words = BYTES[kind]
    check_passed_over(run, damage, words)


@pytest.mark.parametrize("kind", CONTENT)
def test_content_that_is_none_is_passed_over_though_its_marker_vouches_for_it(run, kind):
    damage, words = CONTENT[kind]
    check_passed_over(run, lambda folder: (damage(folder), vouch(folder)), words)


def check_passed_over(run, damage, words):
    damage(run / "checkpoints" / THIRD)
    name, (sentence,) = resume(run)
    assert name == SECOND
    assert sentence.startswith(f"checkpoint {THIRD} is damaged (") and sentence.endswith(f": continuing from {SECOND}")
    assert re.search(words, sentence), sentence
    # Everybody who asks from here on gets the same answer.
    checkpoints = Checkpoints(Folder(run))
    assert checkpoints.latest()[0] == SECOND and checkpoints.whole() == [FIRST, SECOND]


def test_what_a_kill_left_half_written_is_passed_over_and_removed(run):
    folder = run / "checkpoints"
    shutil.move(folder / THIRD, folder / f".tmp-{THIRD}-0a1b2c3d")
    shutil.copytree(folder / FIRST, folder / f".tmp-{SECOND}-0a1b2c3d")  # of a step that was written again
    assert resume(run) == (SECOND, [f"checkpoint {THIRD} was not finished: continuing from {SECOND}"])
    assert sorted(p.name for p in folder.iterdir()) == [FIRST, SECOND]


def test_a_kill_between_the_renamings_of_a_replacement_loses_nothing(run):
    folder = run / "checkpoints"
    shutil.copytree(folder / THIRD, folder / f".tmp-{THIRD}-0a1b2c3d")
    shutil.move(folder / THIRD, folder / f".tmp-{THIRD}-4e5f6a7b")
    assert resume(run) == (THIRD, [])
    assert sorted(p.name for p in folder.iterdir()) == [FIRST, SECOND, THIRD]


def test_several_are_passed_over_and_a_new_run_starts_at_the_beginning(run, tmp_path):
    cut(run / "checkpoints" / THIRD / WEIGHTS, 100)
    (run / "checkpoints" / SECOND / "COMMIT").unlink()
    name, sentences = resume(run)
    assert name == FIRST and [s.split()[1] for s in sentences] == [THIRD, SECOND]
    assert resume(tmp_path / "new") == (None, [])
    assert not (tmp_path / "new").exists()


def test_a_run_of_damaged_ones_only_is_refused_and_left_as_it_is(run):
    for name in (FIRST, SECOND, THIRD):
        flip(run / "checkpoints" / name / OPTIMIZER, 500)
    before = {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}
    with pytest.raises(InputError, match=rf"{FIRST} is damaged \(optimizer.npz: wrong digest\)\. Bring back a copy"):
        resume(run)
    assert before == {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}


@settings(max_examples=80, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    file=st.sampled_from([STATE, WEIGHTS, OPTIMIZER, "COMMIT"]),
    change=st.sampled_from([flip, cut]),
    place=st.integers(0, 2**31),
)
def test_any_byte_changed_anywhere_is_passed_over_or_changes_nothing(written, tmp_path, file, change, place):
    run = tmp_path / "run"
    shutil.rmtree(run, ignore_errors=True)
    shutil.copytree(written, run)
    change(run / "checkpoints" / THIRD / file, place)
    name, sentences = resume(run)
    if name == THIRD:  # a blank of the marker, or all of it
        assert sentences == [] and file == "COMMIT"
        assert (run / "checkpoints" / THIRD / STATE).read_bytes() == (
            written / "checkpoints" / THIRD / STATE
        ).read_bytes()
    else:
        assert name == SECOND and len(sentences) == 1


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    file=st.sampled_from([STATE, WEIGHTS, OPTIMIZER]), change=st.sampled_from([flip, cut]), place=st.integers(0, 2**31)
)
def test_damage_that_no_digest_tells_never_crashes(written, tmp_path, file, change, place):
    """The arrays of NPZ carry a checksum; in a state or weights a changed number is not seen."""
    run = tmp_path / "run"
    shutil.rmtree(run, ignore_errors=True)
    shutil.copytree(written, run)
    change(run / "checkpoints" / THIRD / file, place)
    vouch(run / "checkpoints" / THIRD)
    with contextlib.suppress(InputError):  # a name of a variable has changed, which is told from damage
        assert resume(run)[0] in (SECOND, THIRD)


def test_in_an_object_store_files_without_a_marker_are_what_a_kill_left(written, learner, tmp_path, s3):
    run = Folder(s3("unmarked/run"))
    for path in filter(Path.is_file, written.rglob("*")):
        run.write_bytes(str(path.relative_to(written)), path.read_bytes())
    store, weights = Checkpoints(run), f"checkpoints/{THIRD}/{WEIGHTS}"
    content = bytearray(run.read_bytes(weights))
    content[1000] ^= 1
    run.write_bytes(weights, bytes(content))
    (found, _), (sentence,) = store.resume(SMALL)
    assert found == SECOND and sentence.endswith(f"(model.weights.h5: wrong digest): continuing from {SECOND}")
    store.save(learner, state(3))
    assert store.resume(SMALL)[0][0] == THIRD
    for name in (FIRST, SECOND, THIRD):
        run.fs.delete_file(run.at(f"checkpoints/{name}/COMMIT"))
    found, sentences = store.resume(SMALL)
    assert found is None and sentences[0].endswith("(COMMIT: missing): starting from the beginning")
    on_disk = shutil.copytree(written, tmp_path / "run")
    for marker in on_disk.glob("checkpoints/*/COMMIT"):
        marker.unlink()
    with pytest.raises(InputError, match="can be used"):  # on a disk no kill leaves that
        resume(on_disk)


def test_it_loads_what_was_saved_bit_for_bit_and_keras_reads_it(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "none"))  # nothing is staged there
    rng = np.random.default_rng(0)
    one, other = Learner(SMALL.recipe(3)), Learner(SMALL.recipe(3))
    values = list(one.variables().values())
    for value in values:
        value.assign(rng.integers(0, 2**31, value.shape).astype(value.numpy().dtype))
    (tmp_path / "config.yaml").touch()
    checkpoints = Checkpoints(Folder(tmp_path))
    name = checkpoints.save(one, state(7, loss_sums=[0.1 + 0.2, 3.0], history=[{"epoch": 1, "val/loss": 1 / 3}]))
    checkpoints.load(name, other)
    for a, b in zip(values, other.variables().values(), strict=True):
        np.testing.assert_array_equal(a.numpy(), b.numpy())
    told = {"loss_sums": [0.1 + 0.2, 3.0], "history": [{"epoch": 1, "val/loss": 1 / 3}]}
    variables = {name: list(shape) for name, shape in SMALL.recipe(3).variables.items()}
    assert checkpoints.state(name) == state(7, variables=variables, **told)
    plain = build_unet(16, 2, 1, 0.0, 3)
    plain.load_weights(tmp_path / "checkpoints" / name / WEIGHTS)
    assert all(np.array_equal(a, b) for a, b in zip(plain.get_weights(), one.model.get_weights(), strict=True))


def test_a_file_has_what_the_recipe_describes_under_both_names(learner, tmp_path):
    save(tmp_path, learner, 1)
    recipe, folder = SMALL.recipe(3), tmp_path / "checkpoints" / FIRST
    assert {name: tuple(v.shape) for name, v in learner.variables().items()} == recipe.variables
    with h5py.File(folder / WEIGHTS) as file:
        for name, shape in recipe.network.variables.items():
            assert file[name].shape == shape and file[name] == file[recipe.network.keras_paths[name]]
    other = describe(ModelSettings(base_filters=3, depth=3), 21)
    model = build_unet(16, 3, 3, 0.0, 21)
    model.save_weights(tmp_path / WEIGHTS)
    with h5py.File(tmp_path / WEIGHTS) as file:
        for variable in model.weights:
            np.testing.assert_array_equal(file[other.keras_paths[variable.path]], variable.numpy())


@pytest.mark.parametrize("change", ["one more", "a weight more", "one less", "another shape"])
def test_what_could_not_be_resumed_is_not_saved(learner, run, monkeypatch, change):
    """An optimizer, or a layer, whose variables are not those that are described."""
    variables = learner.variables()
    if change == "one more":
        variables["optimizer/head/kernel/third_moment"] = tf.Variable(0.0)
    elif change == "a weight more":
        variables["weights/norm/gamma"] = tf.Variable(np.zeros(2, np.float32))
    elif change == "one less":
        variables.pop("optimizer/head/kernel/velocity")
    else:
        variables["weights/head/kernel"] = tf.Variable(np.zeros((3, 3, 2, 3), np.float32))
    monkeypatch.setattr(learner, "variables", lambda: variables)
    (run / "config.yaml").touch()
    with pytest.raises(RunFailed, match=r"Nothing could continue from checkpoint .*(head/kernel|norm/gamma)"):
        Checkpoints(Folder(run)).save(learner, state(4))
    assert resume(run) == (THIRD, [])


def test_other_code_is_told_from_damage(run):
    """An optimizer, or a layer, that has changed since."""
    change_state(run / "checkpoints" / THIRD, variables={**learner_variables(run), "optimizer/head/kernel/third": [3]})
    vouch(run / "checkpoints" / THIRD)
    words = r"head/kernel/third as \(3,\), and this version of the code has it as absent: continue with the version"
    with pytest.raises(InputError, match=words):
        resume(run)


def learner_variables(run: Path) -> dict:
    return read_json(run / "checkpoints" / THIRD / STATE)["variables"]


def test_a_model_is_read_wherever_runs_are_kept(run, monkeypatch):
    """An object store as the default asks for a tracking URI, which a model does not need."""
    monkeypatch.setenv("UNET_STORAGE_PATH", "s3://bucket/runs")
    assert TrainedModel.of_checkpoint(Folder(run), THIRD).network == SMALL.model


def test_another_network_is_refused_when_it_is_loaded(run):
    with pytest.raises(Damaged, match=rf"{THIRD} is damaged \(state.json: is of another network\)"):
        Checkpoints(Folder(run)).load(THIRD, Learner(OTHER.recipe(3)))


def test_the_best_and_the_last_stay(learner, tmp_path):
    checkpoints, folder = Checkpoints(Folder(tmp_path)), tmp_path / "checkpoints"
    for step, score in ((1, 0.5), (2, 0.7), (3, None), (4, 0.6), (5, None)):
        save(tmp_path, learner, step, score=score)
    checkpoints.prune(keep_best=2)
    assert checkpoints.whole() == ["step_00000002", "step_00000004", "step_00000005"]
    (folder / "notes.txt").write_text("mine")
    save(tmp_path, learner, 6, best_checkpoint="step_00000004")  # whatever the scores say
    checkpoints.prune(keep_best=1)
    assert sorted(p.name for p in folder.iterdir()) == ["notes.txt", SECOND, "step_00000004", "step_00000006"]


def test_the_last_that_verifies_stays_beside_damaged_ones(run):
    flip(run / "checkpoints" / THIRD / WEIGHTS, 1000)
    Checkpoints(Folder(run)).prune(keep_best=1)
    assert [p.name for p in (run / "checkpoints").iterdir()] == [SECOND]
    flip(run / "checkpoints" / SECOND / WEIGHTS, 1000)
    Checkpoints(Folder(run)).prune(keep_best=1)
    assert [p.name for p in (run / "checkpoints").iterdir()] == [SECOND]  # maybe somebody can do with it


@pytest.mark.parametrize("left", [True, False])
def test_a_best_one_that_is_damaged_gives_its_place_to_the_next(learner, tmp_path, left):
    best = {"best_checkpoint": SECOND, "best_score": 0.7, "best_epoch": 2, "validation": {"mean_iou": 0.7}}
    if left:
        first = {"best_checkpoint": FIRST, "best_score": 0.5, "best_epoch": 1, "validation": {"mean_iou": 0.5}}
        save(tmp_path, learner, 1, epoch=2, score=0.5, **first)
    save(tmp_path, learner, 2, epoch=3, score=0.7, **best)
    save(tmp_path, learner, 3, epoch=4, epoch_step=1, stale_epochs=1, **best)
    assert resume(tmp_path) == (THIRD, [])
    flip(tmp_path / "checkpoints" / SECOND / WEIGHTS, 1000)
    name, (sentence,) = resume(tmp_path)
    words = f"the best checkpoint {SECOND} is damaged (model.weights.h5: wrong digest): the best that is left is "
    assert name == THIRD and sentence == words + (FIRST if left else "still to come")
    found = Checkpoints(Folder(tmp_path)).latest()[1]
    facts = (found.best_checkpoint, found.best_score, found.best_epoch, found.validation, found.stale_epochs)
    assert facts == ((FIRST, 0.5, 1, {"mean_iou": 0.5}, 2) if left else (None, None, None, None, 0))
    assert resume(tmp_path) == (THIRD, [])
    assert weights_of(tmp_path, THIRD)["encoder_1_conv_1/bias"][0] == 3


def test_the_last_one_may_be_the_best_that_is_left(learner, tmp_path):
    best = {"best_checkpoint": SECOND, "best_score": 0.7, "best_epoch": 2, "validation": {"mean_iou": 0.7}}
    save(tmp_path, learner, 1, epoch=2, score=0.5, best_checkpoint=FIRST, best_score=0.5, best_epoch=1)
    save(tmp_path, learner, 2, epoch=3, score=0.7, **best)
    save(tmp_path, learner, 3, epoch=4, score=0.6, stale_epochs=1, **best)
    flip(tmp_path / "checkpoints" / SECOND / WEIGHTS, 1000)
    name, (sentence,) = resume(tmp_path)
    assert name == THIRD and sentence.endswith(f"the best that is left is {THIRD}")
    found = Checkpoints(Folder(tmp_path)).latest()[1]
    facts = (found.best_checkpoint, found.best_score, found.best_epoch, found.validation, found.stale_epochs)
    assert facts == (THIRD, 0.6, 3, None, 0)  # all its scores were not kept: it was not the best of then


def test_a_run_whose_best_is_damaged_is_not_used(learner, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    save(run, learner, 1, epoch=2, score=0.5, best_checkpoint=FIRST)
    save(run, learner, 2, epoch=2, epoch_step=1, best_checkpoint=FIRST)
    flip(run / "checkpoints" / FIRST / WEIGHTS, 1000)
    words = rf"{FIRST} is damaged \(model.weights.h5: wrong digest\) of .* give --model .*/{SECOND}\.$"
    with pytest.raises(InputError, match=words):
        TrainedModel.find("run", Folder(tmp_path))


def test_a_run_that_was_removed_is_not_made_again(run, learner):
    shutil.rmtree(run)
    with pytest.raises(StorageFailed, match=r"run is gone, or the disk it was on: bring it back"):
        Checkpoints(Folder(run)).save(learner, state(4))
    assert not run.exists()


def test_a_checkpoint_says_what_its_outputs_mean(learner, tmp_path):
    classes = (ClassInfo("road", (1, 2, 3)), ClassInfo("sky", (4, 5, 6)), ClassInfo("sea", (7, 8, 9)))
    folder = save(tmp_path, learner, 1, classes=list(classes))
    assert Checkpoints(Folder(tmp_path)).state(folder.name).class_infos == classes
    assert read_json(folder / STATE)["classes"][0] == ["road", [1, 2, 3]]
