"""Processes of a run are killed at random times, and it ends as if nothing had happened.

Every draw depends on one number, which is printed: `UNET_KILL_SEED=N make kill-test` draws the same again.
"""

import json
import os
import random
import re
import secrets
import time
from dataclasses import dataclass, replace
from datetime import datetime
from itertools import pairwise, zip_longest

import numpy as np
import pytest
from conftest import TINY, read_json, train, weights_of
from oracle import check, names_by_digest, starts_of
from watched import Kill, Watched

KINDS = ("worker", "controller", "driver")
EVERY = 3
"""Steps between checkpoints."""
START_SECONDS = 10
"""About how long workers take to start."""
REAL_SIZE = {"image_size": 128, "base_filters": 16, "depth": 4, "batch_size": 16, "limit_train": 90, "epochs": 3}
# With everything on that a recipe can ask for beside the loss' plainest form.
REAL_SIZE |= {"network": "compact", "norm": "batch", "optimizer": "muon", "weight_decay": 0.05, "ema_decay": 0.9}
REAL_SIZE |= {"schedule": "cosine", "warmup": "5%", "loss": "cross_entropy+jaccard+0.5*lovasz", "class_weights": "auto"}
REAL_SIZE |= {"label_smoothing": 0.05, "augment": 0.5, "mix": 0.5}
DRAWN = "synthetic:150"


@pytest.fixture(scope="module")
def draws() -> random.Random:
    seed = int(os.environ.get("UNET_KILL_SEED") or secrets.randbits(32))
    print(f"\nUNET_KILL_SEED={seed}")
    return random.Random(seed)


@pytest.fixture
def watched(storage, tmp_path):
    """Makes trainings that are ended with the test, by name, data and settings."""
    made = []

    def make(name, data, address="local", **settings) -> Watched:
        values = TINY | {"threads": 1, "checkpoint_every": EVERY, "data": data} | settings
        flags = [f"--{key.replace('_', '-')}={value}" for key, value in values.items()]
        made.append(Watched(flags, storage, name, tmp_path / name, address))
        return made[-1]

    yield make
    for job in made:
        job.end()


@dataclass(frozen=True)
class Blow:
    """A kill that is to come.

    Attributes:
        kind: of process.
        rank: of a worker.
        step: of the training, after which it comes; where it does not come while workers start or after the last step.
        phase: "train"; "validation" or "checkpoint", those of an epoch's end, which that step is the last one before;
            "start"; "end".
        steps: of an epoch.
        delay: 0-1 of the longest time that passed between two steps so far, of the time that workers take to start, or
            of the time that an unbroken run took after its last step.
    """

    kind: str
    rank: int
    delay: float
    step: int | None = None
    phase: str = "train"
    steps: int = 1


def play(job: Watched, blows: list[Blow], last: int, rest: float = 0.0) -> None:
    """Run a job to its end under these blows, with the same command again after a driver's.

    `last`: the number of its steps. `rest`: how many seconds an unbroken run took after it. A blow that would come
    after the job's end is left out.
    """
    job.start()
    known, since = set(), time.time()
    for blow in blows:
        if blow.phase == "train":
            job.wait_for_start(known)
            job.wait_for_step(blow.step)
            moment = time.time() + blow.delay * longest_gap(job)
        elif blow.phase in ("checkpoint", "validation"):
            job.wait_for_start(known)
            job.wait_for_step(blow.step)
            if blow.phase == "checkpoint":
                wait_for_a_save(job, blow.steps)
            moment = time.time()
        elif blow.phase == "start":
            moment = since + blow.delay * START_SECONDS
        else:
            job.wait_for_step(last)
            moment = max(line["time"] for line in job.applied) + blow.delay * rest
        job.wait_until(moment)
        if job.kill(blow.kind, blow.rank) is None:
            break
        known, since = {line["start"] for line in job.applied}, time.time()
        if blow.kind == "driver":
            job.start()
    job.wait_until_end()
    assert job.driver.returncode == 0, job.output


def wait_for_a_save(job: Watched, steps: int) -> None:
    """Until the checkpoint of an epoch's end is being written, which takes some hundredths of a second."""
    until = time.monotonic() + 60
    while not job.ended and time.monotonic() < until:
        saves = [re.match(r"\.tmp-step_(\d+)", name) for name in os.listdir(job.checkpoints)]
        if any(save and int(save[1]) % steps == 0 for save in saves):
            return
        time.sleep(0.001)


def longest_gap(job: Watched) -> float:
    """Seconds between two steps of the same start: a validation and a checkpoint, where there was one."""
    lines = sorted(job.applied, key=lambda line: (line["start"], line["time"]))
    gaps = [b["time"] - a["time"] for a, b in pairwise(lines) if a["start"] == b["start"]]
    return max(gaps, default=0.0)


def phase_of(kill: Kill, steps: int, last: int) -> str:
    """What a kill fell into, by the ledger and what lay in the folder of checkpoints."""
    if kill.step is None:
        return "start"
    committed = f"step_{kill.step:08d}" in kill.files
    if committed:
        return "end" if kill.step == last else "step"
    if any(name.startswith(f".tmp-step_{kill.step:08d}") for name in kill.files):
        return "checkpoint"
    if kill.step % steps == 0:
        return "validation"
    return "checkpoint" if kill.step % EVERY == 0 else "step"


def history_of(run) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def rest_of(run) -> float:
    """How many seconds an unbroken run took after its last epoch."""
    return (run / "summary.json").stat().st_mtime - history_of(run)[-1]["time"] / 1000


def assert_ended_alike(job: Watched, unbroken, limit: int | None = None) -> None:
    """Bit-equal weights, optimizer and scores; a whole history here and in MLflow; each sample once an epoch."""
    run, summary = job.run, read_json(job.run / "summary.json")
    lines, expected = history_of(run), history_of(unbroken)
    show(job, expected)
    last = f"step_{expected[-1]['step']:08d}"
    same = {key for key in expected[0] if key not in ("time", "speed/images_per_second", "speed/data_wait_fraction")}
    assert [{k: line[k] for k in same} for line in lines] == [{k: line[k] for k in same} for line in expected]
    weights, expected_weights = weights_of(run, last), weights_of(unbroken, last)
    assert weights.keys() == expected_weights.keys()
    assert all(np.array_equal(weights[key], expected_weights[key]) for key in weights)
    with (
        np.load(run / "checkpoints" / last / "optimizer.npz") as arrays,
        np.load(unbroken / "checkpoints" / last / "optimizer.npz") as expected_arrays,
    ):
        assert set(arrays) == set(expected_arrays) and len(arrays) > 2
        assert all(np.array_equal(arrays[key], expected_arrays[key]) for key in arrays)
    finished = read_json(unbroken / "summary.json")
    assert summary["status"] == "finished"
    for key in ("val", "test", "best_epoch", "best_checkpoint"):
        assert summary[key] == finished[key], key

    assert_mlflow_agrees(job.storage, summary["mlflow_run_id"], lines)

    epochs, settings = expected[-1]["epoch"], dict(flag[2:].split("=", 1) for flag in job.flags)
    names = names_by_digest(job.storage / "data", summary["data_digest"], limit)
    repeated = check(job.lines, job.committed, names, int(settings["batch-size"]), epochs)
    assert max(repeated, default=0) <= EVERY, f"steps done again: {repeated}"
    restarts = len(starts_of(job.lines)) - 1 - sum(kill.kind == "driver" for kill in job.kills)
    assert summary["restarts"] >= restarts
    assert_restarts_are_told(job, summary)
    print(f"{job.name:>24}  steps done again by each new start: {repeated}")
    until = time.monotonic() + 30  # Ray ends them a moment after their driver
    while (job.processes("worker") or job.processes("controller")) and time.monotonic() < until:
        time.sleep(0.2)
    assert not job.processes("worker") and not job.processes("controller")


def assert_restarts_are_told(job: Watched, summary: dict) -> None:
    """Each kill of a worker or controller by its name, at its time, in the summary, on the terminal and in MLflow."""
    import mlflow

    log = summary["restart_log"] or []
    words = {"worker": "worker ", "controller": "the controller of Ray Train was lost", "driver": "the driver was lost"}
    for kill, following in zip_longest(job.kills, job.kills[1:]):
        # None had to follow one after the last step; one that another follows at once may not have been noticed, and a
        # driver may not have begun the run.
        felt = any(line["time"] > kill.time for line in job.applied)
        unseen = following is not None and following.time - kill.time < 5
        unbegun = kill.kind == "driver" and not any(line["time"] < kill.time for line in job.applied)
        if felt and not unseen and not unbegun:
            told = [entry for entry in log if words[kill.kind] in entry["reason"]]
            after = [datetime.fromisoformat(entry["time"]).timestamp() - kill.time for entry in told]
            assert any(-1 <= seconds <= 120 for seconds in after), (kill, log)
    output = " ".join(job.output.split()).lower()
    for entry in log:
        assert entry["reason"].lower() in output or "driver" in entry["reason"], entry
    tags = mlflow.MlflowClient(f"sqlite:///{job.storage}/mlflow.db").get_run(summary["mlflow_run_id"]).data.tags
    assert tags.get("restarts", "0") == str(len(log))
    for number, entry in enumerate(log, 1):
        assert tags[f"restart_{number:03d}"].startswith(f"{entry['time']} {entry['reason']};")


def assert_mlflow_agrees(storage, run_id: str, lines: list[dict]) -> None:
    import mlflow

    client = mlflow.MlflowClient(f"sqlite:///{storage}/mlflow.db")
    run = client.get_run(run_id)
    assert run.info.status == "FINISHED"
    for name in (name for name in run.data.metrics if not name.startswith("system/")):
        history = [(m.step, m.value, m.timestamp) for m in client.get_metric_history(run_id, name)]
        if name.startswith("test/"):
            assert len(history) == 1, name
        else:
            assert history == [(line["epoch"], line[name], line["time"]) for line in lines if name in line], name
    assert set(lines[-1]) - set(run.data.metrics) <= {"epoch", "step", "time"}


def show(job: Watched, lines: list[dict]) -> None:
    """A table of the kills, for `pytest -s`."""
    steps, last = lines[0]["step"], lines[-1]["step"]
    for kill in job.kills:
        rank = "" if kill.rank is None else f" of rank {kill.rank}"
        at = "" if kill.step is None else f"after step {kill.step} of {last}"
        print(f"{job.name:>24}  {kill.kind + rank:<18} in {phase_of(kill, steps, last):<11} {at}")


def one_of_each(draws: random.Random, last: int, world: int) -> list[Blow]:
    """A kill of each kind, drawn uniformly over each third of the training: the delay of one may be many steps long."""
    kinds, steps = draws.sample(KINDS, 3), [draws.randrange(i * last // 3, (i + 1) * last // 3) for i in range(3)]
    return [Blow(kind, draws.randrange(world), draws.random(), step) for kind, step in zip(kinds, steps, strict=True)]


def test_a_run_survives_its_workers_its_controller_and_its_driver(
    trained, ray_cluster, storage, packed, draws, watched
):
    """Streamed, so that it also shows that this way gives the numbers of the unbroken run, which keeps its data."""
    unbroken, _ = trained
    job = watched(
        "killed",
        packed,
        ray_cluster.address_info["gcs_address"],
        num_workers=2,
        memory_budget="10kB",
    )
    lines = history_of(unbroken)
    steps, last = lines[0]["step"], lines[-1]["step"]
    first, second, third = one_of_each(draws, last, 2)
    # One in the save at an epoch's end: that epoch is over, and whoever had to tell of it is gone.
    end = second.step - second.step % steps
    second = replace(second, step=end, phase="checkpoint", rank=1, steps=steps)
    play(job, [first, second, third], last)
    assert len(job.kills) == 3
    assert_ended_alike(job, unbroken)
    assert_the_oracle_notices(job)


def assert_the_oracle_notices(job: Watched) -> None:
    """What would be wrong in a ledger is found in this one, changed so."""
    names = names_by_digest(job.storage / "data", read_json(job.run / "summary.json")["data_digest"])
    epochs, batch = TINY["epochs"], TINY["batch_size"]
    last = max(line["step"] for line in job.lines)
    # Of rank 0: the short last batch gives the other one nothing but padding.
    at = next(i for i, line in enumerate(job.lines) if line["step"] == last and "rows" in line and not line["rank"])
    line, others = job.lines[at], job.lines[:at] + job.lines[at + 1 :]
    other = next(digest for digest in names if digest not in line["rows"])
    wrong = {
        "a sample twice": [*others, line | {"rows": [other, *line["rows"][1:]]}],
        "a sample left out": [*others, line | {"rows": ["padding", *line["rows"][1:]]}],
        "a sample of another set": [*others, line | {"rows": ["0" * 16, *line["rows"][1:]]}],
        "a step left out": [line for line in job.lines if line["step"] != last],
        "ranks that disagree": [line | {"loss": line.get("rank")} if "loss" in line else line for line in job.lines],
    }
    for what, lines in wrong.items():
        try:
            check(lines, job.committed, names, batch, epochs)
        except AssertionError:
            continue
        pytest.fail(f"the oracle does not notice {what}")
    with pytest.raises(AssertionError, match="a start at"):
        check(job.lines, {}, names, batch, epochs)


@pytest.fixture(scope="module")
def unbroken(ray_cluster, storage, packed):
    """An unbroken run by its number of workers, made when first asked for."""
    made = {}

    def of(workers: int):
        if workers not in made:
            train(storage, packed, run_name=f"unbroken-{workers}", num_workers=workers)
            made[workers] = storage / f"unbroken-{workers}"
        return made[workers]

    return of


@pytest.mark.kills
@pytest.mark.parametrize("way", ["kept", "streamed"])
@pytest.mark.parametrize("workers", [1, 2])
def test_at_least_six_kills_of_a_run_on_a_ray_of_its_own(workers, way, unbroken, storage, packed, draws, watched):
    """With the driver dies its whole Ray. Also kills while workers start and after the last step, and in the first run
    some that are aimed at a checkpoint and at a validation."""
    before, kills, phases = unbroken(workers), 0, set()
    lines = history_of(before)
    steps, last = lines[0]["step"], lines[-1]["step"]
    for number in range(5):
        if kills >= 6 and {"checkpoint", "validation"} <= phases:
            break
        settings = {"num_workers": workers} | ({"memory_budget": "10kB"} if way == "streamed" else {})
        job = watched(f"{way}-{workers}-{number}", packed, **settings)
        blows = one_of_each(draws, last, workers)
        if not {"checkpoint", "validation"} <= phases:
            aimed = zip(
                draws.sample(KINDS, 2), (steps, 2 * steps), draws.sample(["checkpoint", "validation"], 2), strict=True
            )
            later = replace(blows[-1], step=max(blows[-1].step, 2 * steps))
            blows = [Blow(kind, workers - 1, 0.0, step, phase, steps) for kind, step, phase in aimed] + [later]
        fourth = draws.choice(KINDS), draws.randrange(workers), draws.random()
        if number % 2:
            blows.append(Blow(*fourth, phase="end"))
        else:
            blows.insert(draws.randrange(3), Blow(*fourth, phase="start"))
        play(job, blows, last, rest_of(before))
        assert_ended_alike(job, before)
        kills += len(job.kills)
        phases |= {phase_of(kill, steps, last) for kill in job.kills}
    assert kills >= 6 and {"checkpoint", "validation"} <= phases, (kills, phases)


@pytest.mark.kills
def test_kills_at_real_size(ray_cluster, storage, draws, watched):
    train(storage, DRAWN, run_name="real-unbroken", **REAL_SIZE)
    before = storage / "real-unbroken"
    job = watched("real-killed", DRAWN, num_workers=2, **REAL_SIZE)
    last = history_of(before)[-1]["step"]
    play(job, one_of_each(draws, last, 2), last)
    assert len(job.kills) == 3
    assert_ended_alike(job, before, REAL_SIZE["limit_train"])


@pytest.mark.kills
def test_kills_while_the_encoder_is_frozen_and_afterwards(ray_cluster, storage, draws, watched):
    """What the encoder's optimizer counts begins when the encoder does, in whatever start that is."""
    settings = REAL_SIZE | {"encoder": "efficientnet-lite0", "freeze": "encoder:2", "encoder_rate": 0.1, "epochs": 4}
    train(storage, DRAWN, run_name="thawed-unbroken", **settings)
    before = storage / "thawed-unbroken"
    steps = history_of(before)[0]["step"]
    kinds = draws.sample(KINDS, 3)
    job = watched("thawed-killed", DRAWN, num_workers=2, **settings)
    # In the last frozen epoch once more than in the first: a start that goes by its own count thaws too late.
    falls = (
        draws.randrange(1, steps),
        draws.randrange(steps + 1, 2 * steps),
        draws.randrange(2 * steps + 1, 4 * steps - 2),
    )
    # Right after a step: the longest gap is the tracing of two graphs here, in which all that is left would be done.
    blows = [Blow(kind, draws.randrange(2), 0.0, step) for kind, step in zip(kinds, falls, strict=True)]
    play(job, blows, 4 * steps)
    assert len(job.kills) == 3 and job.kills[0].step <= 2 * steps
    assert_ended_alike(job, before, settings["limit_train"])


@pytest.mark.kills
@pytest.mark.parametrize("size", ["tiny", "real"])
def test_a_run_of_two_one_and_two_workers_agrees_with_one(size, ray_cluster, storage, packed, draws, watched):
    """Stopped by Ctrl-C and continued by other numbers of workers, anywhere in an epoch."""
    data, limit = (packed, None) if size == "tiny" else (DRAWN, REAL_SIZE["limit_train"])
    settings = {"grad_shards": 2} | ({} if size == "tiny" else REAL_SIZE)
    train(storage, data, run_name=f"{size}-one", num_workers=1, **settings)
    before = storage / f"{size}-one"
    expected = history_of(before)
    last = expected[-1]["step"]
    job = watched(f"{size}-switched", data, **settings)
    first = draws.randrange(1, last // 2)
    stops = (first, draws.randrange(first + last // 4, last - 2))
    for number, (workers, stop) in enumerate(zip((2, 1, 2), (*stops, None), strict=True)):
        job.start(f"--num-workers={workers}", resume=number > 0)
        if stop is None:
            break
        assert job.wait_for_step(stop), job.output
        job.interrupt()
        job.wait_until_end()
        assert job.driver.returncode == 130, job.output
    job.wait_until_end()
    assert job.driver.returncode == 0, job.output
    starts = starts_of(job.lines)
    print(f"{job.name:>24}  " + ", ".join(f"{s.world} worker(s): steps {s.first}-{s.last}" for s in starts))
    assert [start.world for start in starts] == [2, 1, 2]
    names = names_by_digest(storage / "data", read_json(job.run / "summary.json")["data_digest"], limit)
    batch = (TINY | settings)["batch_size"]
    assert set(check(job.lines, job.committed, names, batch, expected[-1]["epoch"])) == {0}  # Ctrl-C repeats nothing
    checkpoint = f"step_{last:08d}"
    weights, expected_weights = weights_of(job.run, checkpoint), weights_of(before, checkpoint)
    for key, value in expected_weights.items():
        np.testing.assert_allclose(weights[key], value, rtol=0, atol=1e-6)
    for line, other in zip(history_of(job.run), expected, strict=True):
        assert line["train/loss"] == pytest.approx(other["train/loss"], rel=1e-6)
