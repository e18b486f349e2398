"""The trials of one start of a sweep: Ray Tune with its search, its end, and what follows the last of them."""

import threading
import time
from dataclasses import dataclass, field
from typing import Any

import ray
from ray import tune

from unet.cluster import planner
from unet.data import ingest
from unet.data.shards import Prepared
from unet.errors import RunFailed
from unet.models.start import Known
from unet.runs.run import called, where
from unet.secrets import without_secrets
from unet.supervise.signals import catch_stop_signals
from unet.terminal import Display
from unet.training.link import News, start_link
from unet.tuning import outcome
from unet.tuning.board import Board
from unet.tuning.ledger import Ledger
from unet.tuning.schedule import Asha, make_scheduler
from unet.tuning.search import Search, population
from unet.tuning.sweep import Sweep
from unet.tuning.sweep_runs import SweepRuns
from unet.tuning.trial import Shared, WarmTrial, group_trial
from unet.tuning.trial_recorder import TrialRecorder

MAX_RETRIES = 2
"""How often a trial whose process is lost is started again from its checkpoint."""
TUNE_STATE = ".tune"
IDLE_SECONDS = 600
"""How long a sweep waits for room for any trial, after other jobs took what was free when it began."""
RECEIVE_SECONDS = 1.0
"""How often the trials are asked whether one of them has found that none can go on."""
SAVE_SECONDS = 120
"""How long running trials have to end their step and save."""
BY_USER, TIME_OVER = "stopped by the user", "the time limit was reached"
NO_PLACE = "no trial found free CPUs for ten minutes"


class _Stopper(tune.Stopper):
    """Ends Tune's part when the sweep is to stop, once each running trial has saved itself."""

    def __init__(self, session: "Trials", stop_signal: threading.Event):
        self._session, self._stop_signal = session, stop_signal

    def __getstate__(self):
        return {}  # Tune pickles it for a restore that a sweep does not use

    def __call__(self, trial_id, result) -> bool:
        return bool(result.get("stopped"))

    def stop_all(self) -> bool:
        session = self._session
        if self._stop_signal.is_set():
            session.stop(BY_USER)
        elif session.seconds_of_budget == 0:
            session.stop(TIME_OVER)
        elif session.recorder.idle_seconds > IDLE_SECONDS:
            session.stop(NO_PLACE)
        elif reason := session.hopeless():
            session.stop(reason)
        if session.stopped is None:
            return False
        saving = session.plan.num_workers == 1 and session.recorder.running & session.stopping
        return not saving or time.monotonic() - session.stopped_at > SAVE_SECONDS


@dataclass
class Trials:
    """One start of a sweep."""

    sweep: Sweep
    ledger: Ledger
    prepared: Prepared
    counts: dict[str, int]
    plan: planner.Plan
    together: int
    at_a_time: int
    planned: int | None
    runs: SweepRuns
    display: Display
    known: Known | None = None
    stopped: str | None = None
    stopped_at: float = 0.0
    stopping: set[str] = field(default_factory=set)
    received_at: float = 0.0
    search: Search | None = None

    def run_to_end(self) -> dict:
        sweep, manifest, folder = self.sweep, self.prepared.manifest, self.prepared.folder.uri
        extending = bool(sweep.settings.sweep.extend) or sweep.summary.get("extending", False)
        facts = {"data_digest": manifest.data_digest, "prepared": without_secrets(folder)}
        facts |= self.known.facts if self.known else {}
        sweep.start(planned=self.planned, extending=extending, **facts)
        base = sweep.base(folder, without_secrets(self.runs.own.uri))  # trials do not write to MLflow
        self.runs.begin(base, self.prepared)
        self.link = start_link()
        with catch_stop_signals() as stop_signal:
            try:
                return self._run(stop_signal, self._shared(base))
            except BaseException as error:
                status = "stopped" if isinstance(error, KeyboardInterrupt) else "failed"
                sweep.write_summary(status=status)
                self.runs.mark(status, str(error))
                raise
            finally:
                self.display.close()
                self.runs.close()
                if ray.is_initialized():
                    ray.kill(self.link)

    def _run(self, stop_signal: threading.Event, shared: Shared) -> dict:
        part, epochs = self.sweep.settings.sweep, self.sweep.settings.epochs
        self.recorder = TrialRecorder(self.ledger, self.runs, epochs, part.scheduler)
        for row in self.ledger.unfinished():  # a kill of an earlier start may have come before their rows were written
            self.ledger.refresh(row["trial"])
        self.runs.send_missing()
        try:
            if self.ledger.unfinished() or self.planned is None or len(self.ledger) < self.planned:
                self._tune(shared, stop_signal)
            for row in self.ledger.unfinished():  # Tune reports nothing of those that it stops at our request
                self.ledger.refresh(row["trial"])
                self.recorder.end(row["trial"], "stopped", self.stopped)
        finally:
            self._forget()
            delivered = self.runs.deliver(stop_signal)
        concludes = self.stopped in (None, TIME_OVER) and not stop_signal.is_set()
        if not (delivered or concludes):
            self.display.say(f"{outcome.NOT_ALL_SENT} The same command sends the rest.", "yellow")
        if self.stopped == NO_PLACE:
            raise RunFailed(f"The sweep ended because {NO_PLACE}: see `ray status`; the same command continues it.")
        if self.stopped not in (None, BY_USER, TIME_OVER):
            raise RunFailed(f"{self.stopped} The same command continues the sweep.")
        if not concludes:
            return self._stop()
        reason = self.stopped or "all trials ended"
        done = outcome.conclude(self.sweep, self.ledger, shared, self.runs, self.display, reason, stop_signal)
        return done or self._stop()

    def _shared(self, base: dict) -> Shared:
        """What the trials have in common, with the data read once where they are kept in memory."""
        settings, manifest = self.sweep.settings, self.prepared.manifest
        reading = ingest.Ingest(
            folder=self.prepared.folder.uri,
            image_size=settings.data.image_size,
            samples=self.counts,
            batch_size=settings.training.batch_size,
            seed=settings.training.seed,
            epochs=settings.epochs,
            start=(1, 0),
            memory=self.plan.stream_bytes // self.together,
            tasks=self.plan.stream_tasks,
        )
        if self.plan.kept and self.plan.num_workers == 1:
            reading = ingest.keep(reading)
        return Shared(
            base=base,
            folder=self.sweep.folder.uri,
            reading=reading,
            threads=self.plan.threads,
            use_gpu=self.plan.use_gpu,
            data_digest=manifest.data_digest,
            classes=manifest.class_infos,
            link=self.link,
            together=self.together,
            known=ray.put(self.known) if self.known else None,
        )

    def _tune(self, shared: Shared, stop_signal: threading.Event) -> None:
        """Tune's part: trials until none is left, the time is over or the sweep is stopped."""
        settings, plan = self.sweep.settings, self.plan
        warm = plan.num_workers == 1
        # Almost nothing for the process of a trial of several workers: it only waits for them.
        asked = {"CPU": plan.cpus_per_worker if warm else 0.001} | ({"GPU": 1} if warm and plan.use_gpu else {})
        trainable = tune.with_parameters(WarmTrial if warm else group_trial, shared=shared)
        self._forget()
        epochs = settings.epochs
        with Board(self.display, self.ledger, self.link, epochs, shared.classes, self._left) as board:
            tuner = tune.Tuner(
                tune.with_resources(trainable, asked),
                **self._search(reuse_actors=warm and plan.kept),
                run_config=tune.RunConfig(
                    name=TUNE_STATE,
                    storage_path=self.sweep.folder.uri,
                    verbose=0,
                    stop=_Stopper(self, stop_signal),
                    failure_config=tune.FailureConfig(max_failures=MAX_RETRIES),
                    # The trials keep their own; only PBT copies them to other trials.
                    checkpoint_config=tune.CheckpointConfig(num_to_keep=4, checkpoint_at_end=False) if warm else None,
                    callbacks=[self.recorder, board],
                ),
            )
            tuner.fit()

    def _search(self, reuse_actors: bool) -> dict:
        """What Tune is to try, and which trials to stop."""
        settings, space, ledger = self.sweep.settings, self.sweep.space, self.ledger
        seed, scheduler = settings.training.seed, make_scheduler(settings, space, ledger)
        common: dict[str, Any] = {
            "scheduler": scheduler,
            "reuse_actors": reuse_actors,
            "trial_name_creator": lambda trial: trial.config["trial"],
            "trial_dirname_creator": lambda trial: trial.config["trial"],
        }
        if settings.sweep.scheduler == "pbt":  # compares all trials at the same age: they take turns
            assert self.planned is not None  # pbt is never limited by time alone
            trials = population(space, seed, ledger, self.planned)
            return {"param_space": trials, "tune_config": tune.TuneConfig(**common)}
        asha = scheduler if isinstance(scheduler, Asha) else None
        self.search = Search(space, settings.sweep.search, seed, ledger, self.planned, asha)
        common |= {"search_alg": self.search, "num_samples": -1, "max_concurrent_trials": self.at_a_time}
        return {"tune_config": tune.TuneConfig(**common)}

    def _forget(self) -> None:
        """Remove Tune's own state: a sweep continues from its ledger."""
        state = self.sweep.folder / TUNE_STATE
        if state.names():
            state.fs.delete_dir(state.path)

    @property
    def seconds_of_budget(self) -> float | None:
        """What is left of --minutes, at least 0; None without."""
        minutes, begun = self.sweep.settings.length.minutes, self.recorder.begun
        if minutes is None:
            return None
        return max(0.0, 60 * minutes - (time.monotonic() - begun if begun else 0.0))

    def _left(self) -> float | None:
        """An estimate of the seconds to the end of the last trial, if the running ones train to the end."""
        left, rows = [], self.ledger.rows
        if self.seconds_of_budget is not None:
            left.append(self.seconds_of_budget)
        ended = [r["seconds"] for r in rows if r["end"] in ("finished", "pruned")]
        if ended and self.planned:
            mean, epochs = sum(ended) / len(ended), self.sweep.settings.epochs
            running = [r for r in rows if r["end"] == "running"]
            rest = [(epochs - r["epochs"]) * r["seconds"] / r["epochs"] if r["epochs"] else mean for r in running]
            waiting = (self.planned - len(rows)) * mean
            left.append(max([*rest, (sum(rest) + waiting) / self.at_a_time]))
        return min(left, default=None)

    def hopeless(self) -> str | None:
        """Why no trial can continue, as one of them has reported."""
        if time.monotonic() - self.received_at < RECEIVE_SECONDS:
            return None
        self.received_at = time.monotonic()
        answer: ray.ObjectRef[News] = self.link.poll.remote()
        return next((reason for kind, reason in ray.get(answer)[1] if kind == "no_gpu"), None)

    def stop(self, reason: str) -> None:
        """Mark the runs first, since a submitted job may have only seconds left, then stop the trials."""
        if self.stopped is not None:
            return
        self.stopped, self.stopped_at, self.stopping = reason, time.monotonic(), set(self.recorder.running)
        self.link.request.remote("stop")
        if self.search:
            self.search.close()
        if reason == BY_USER:
            self._mark_stopped()
            how = "save a checkpoint" if self.plan.num_workers == 1 else "keep their last epoch's checkpoint"
            self.display.say(f"Stopping: the running trials {how} (Ctrl-C again stops at once).")

    def _mark_stopped(self) -> None:
        self.sweep.write_summary(status="stopped")
        self.runs.mark("stopped", BY_USER)

    def _stop(self) -> dict:
        self._mark_stopped()
        name = self.sweep.name
        self.display.say(f"Stopped. Continue: {called('tune')} --resume {name}{where(self.sweep.settings.run)}")
        return self.sweep.summary
