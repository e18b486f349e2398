"""The trials of one start of a sweep: Ray Tune with its search, its end, and what follows the last of them."""

import shlex
import threading
import time
from dataclasses import dataclass, field

import ray
from ray import tune

from unet.cluster import planner
from unet.cluster.placement import in_words
from unet.config import SweepSettings
from unet.data import ingest
from unet.data.preparing.findings import checks_row
from unet.data.shards import Prepared
from unet.errors import RunFailed
from unet.runs.run import where
from unet.secrets import without_secrets
from unet.supervise.signals import catch_stop_signals
from unet.terminal import Display
from unet.tracking.registry import register
from unet.tracking.store import code_version
from unet.tracking.tracker import Tracker
from unet.training.link import start_link
from unet.tuning import outcome
from unet.tuning.board import Board, epochs_saved
from unet.tuning.children import ChildRuns
from unet.tuning.ledger import Ledger
from unet.tuning.schedule import make_scheduler
from unet.tuning.search import BEST, Search, population
from unet.tuning.sweep import SPACE, Sweep
from unet.tuning.trial import Shared, WarmTrial, group_trial
from unet.tuning.trial_recorder import TrialRecorder

MAX_RETRIES = 2
"""How often a trial whose process is lost begins again from its checkpoint."""
TUNE_STATE = ".tune"
IDLE_SECONDS = 600
"""How long a sweep waits for a place to run any trial, where others took what was free when it began."""
RECEIVE_SECONDS = 1.0
"""How often the trials are asked whether one of them has found that none can go on."""
SAVE_SECONDS = 120
"""How long the trials under way have to end their step and save."""
BY_USER, TIME_OVER = "stopped by the user", "the time was over"
NO_PLACE = "no trial found free CPUs for ten minutes"


class _Stopper(tune.Stopper):
    """Ends Tune's part when it is to stop or the time is over: trials first, each as it has saved itself."""

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
    tracker: Tracker
    display: Display
    stopped: str | None = None
    stopped_at: float = 0.0
    stopping: set[str] = field(default_factory=set)
    received_at: float = 0.0
    search: Search | None = None

    def run_to_end(self) -> dict:
        sweep, tracker, digest = self.sweep, self.tracker, self.prepared.manifest.data_digest
        extending = bool(sweep.settings.sweep.extend) or sweep.summary.get("extending", False)
        sweep.start(planned=self.planned, extending=extending, data_digest=digest)
        shown = sweep.public_settings()
        tags = {"kind": "sweep", "status": "running", "data_digest": digest, "run_folder": str(sweep.folder)}
        # What the space draws is a parameter of the children only.
        params = {k: v for k, v in shown.items() if k not in sweep.space.draws}
        params["searched"] = sweep.space.described()
        run_id = tracker.start(sweep.name, sweep.summary.get("mlflow_run_id"), params, tags)
        sweep.write_summary(mlflow_run_id=run_id)
        tracker.data(self.prepared)
        tracker.artifacts("", {SPACE: sweep.space.text.encode()})
        self.display.table(f"Sweep {sweep.name}", self._overview())
        self.link = start_link()
        with catch_stop_signals() as stop_signal:
            try:
                return self._run(stop_signal, shown)
            except BaseException as error:
                status = "stopped" if isinstance(error, KeyboardInterrupt) else "failed"
                sweep.write_summary(status=status)
                tracker.tags({"status": status, "reason": str(error)[:500]})
                tracker.status(status)
                raise
            finally:
                self.display.close()
                if ray.is_initialized():
                    ray.kill(self.link)

    def _run(self, stop_signal: threading.Event, shown: dict) -> dict:
        shared = self._shared(shown)
        tags = {"data_digest": shared.data_digest, "code": code_version()}
        self.children = ChildRuns(self.tracker, self.ledger, shared.base, tags)
        part, epochs = self.sweep.settings.sweep, self.sweep.settings.training.epochs
        self.recorder = TrialRecorder(self.ledger, self.children, epochs, part.scheduler)
        for row in self.ledger.under_way():  # the kill of an earlier start may have come before their rows were written
            self.ledger.refresh(row["trial"])
        self.children.send_missing()
        try:
            if self.ledger.under_way() or self.planned is None or len(self.ledger) < self.planned:
                self._tune(shared, stop_signal)
            for row in self.ledger.under_way():  # Tune reports nothing of those that it stops when we ask
                self.ledger.refresh(row["trial"])
                self.recorder.end(row["trial"], "stopped", self.stopped)
        finally:
            self._forget()
            delivered = self.children.close()
        if not delivered:
            self.display.say("MLflow did not take everything; the same command sends the rest.", "yellow")
        if self.stopped == NO_PLACE:
            raise RunFailed(f"The sweep ended because {NO_PLACE}: see `ray status`; the same command continues it.")
        if self.stopped not in (None, BY_USER, TIME_OVER):
            raise RunFailed(f"{self.stopped} The same command continues the sweep.")
        return self._stop() if stop_signal.is_set() else self._conclude(shared, stop_signal)

    def _shared(self, shown: dict) -> Shared:
        settings, folder = self.sweep.settings, self.prepared.folder.uri
        base = {k: v for k, v in shown.items() if k not in SweepSettings.model_fields and k != "register"}
        base |= {"data": folder, "storage_path": self.sweep.folder.uri}
        base["tracking_uri"] = without_secrets(self.tracker.uri)  # trials do not write there
        reading = ingest.Ingest(
            folder=folder,
            image_size=settings.data.image_size,
            samples=self.counts,
            batch_size=settings.training.batch_size,
            seed=settings.training.seed,
            epochs=settings.training.epochs,
            start=(1, 0),
            memory=self.plan.stream_bytes // self.together,
            tasks=self.plan.stream_tasks,
        )
        if self.plan.kept and self.plan.num_workers == 1:
            reading = ingest.keep(reading)
        manifest = self.prepared.manifest
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
        )

    def _tune(self, shared: Shared, stop_signal: threading.Event) -> None:
        """Tune's part: trials until none is left, the time is over or somebody stops it."""
        settings, plan = self.sweep.settings, self.plan
        warm = plan.num_workers == 1
        # Nothing reserved for a trial of several workers itself: it only waits for them.
        asked = {"CPU": plan.cpus_per_worker if warm else 0.001} | ({"GPU": 1} if warm and plan.use_gpu else {})
        trainable = tune.with_parameters(WarmTrial if warm else group_trial, shared=shared)
        self._forget()
        epochs = settings.training.epochs
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
                    # The trials keep their own; only PBT asks for copies to hand on.
                    checkpoint_config=tune.CheckpointConfig(num_to_keep=4, checkpoint_at_end=False) if warm else None,
                    callbacks=[self.recorder, board],
                ),
            )
            tuner.fit()

    def _search(self, reuse_actors: bool) -> dict:
        """What Tune is to try, and whom to stop."""
        settings, space, ledger = self.sweep.settings, self.sweep.space, self.ledger
        seed, scheduler = settings.training.seed, make_scheduler(settings, space, ledger)
        common = {
            "scheduler": scheduler,
            "reuse_actors": reuse_actors,
            "trial_name_creator": lambda trial: trial.config["trial"],
            "trial_dirname_creator": lambda trial: trial.config["trial"],
        }
        if settings.sweep.scheduler == "pbt":  # compares all trials at the same age: they take turns
            trials = population(space, seed, ledger, self.planned)
            return {"param_space": trials, "tune_config": tune.TuneConfig(**common)}
        asha = scheduler if settings.sweep.scheduler == "asha" else None
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
        minutes, begun = self.sweep.settings.sweep.minutes, self.recorder.begun
        if minutes is None:
            return None
        return max(0.0, 60 * minutes - (time.monotonic() - begun if begun else 0.0))

    def _left(self) -> float | None:
        """An estimate of the seconds to the end of the last trial, if those under way train to their end."""
        left, rows = [], self.ledger.rows
        if self.seconds_of_budget is not None:
            left.append(self.seconds_of_budget)
        ended = [r["seconds"] for r in rows if r["end"] in ("finished", "pruned")]
        if ended and self.planned:
            mean, epochs = sum(ended) / len(ended), self.sweep.settings.training.epochs
            running = [r for r in rows if r["end"] == "running"]
            rest = [(epochs - r["epochs"]) * r["seconds"] / r["epochs"] if r["epochs"] else mean for r in running]
            waiting = (self.planned - len(rows)) * mean
            left.append(max([*rest, (sum(rest) + waiting) / self.at_a_time]))
        return min(left, default=None)

    def hopeless(self) -> str | None:
        """Why no trial can go on, as one of them has said."""
        if time.monotonic() - self.received_at < RECEIVE_SECONDS:
            return None
        self.received_at = time.monotonic()
        _, events = ray.get(self.link.poll.remote())
        return next((reason for kind, reason in events if kind == "no_gpu"), None)

    def stop(self, reason: str) -> None:
        """Mark the runs first, since a submitted job may have few seconds left, then tell the trials."""
        if self.stopped is not None:
            return
        self.stopped, self.stopped_at, self.stopping = reason, time.monotonic(), set(self.recorder.running)
        self.link.request.remote("stop")
        if self.search:
            self.search.close()
        if reason == BY_USER:
            self._mark_stopped()
            how = "save a checkpoint" if self.plan.num_workers == 1 else "keep their last epoch's checkpoint"
            self.display.say(f"Stopping: the trials under way {how} (again to stop at once).")

    def _mark_stopped(self) -> None:
        self.sweep.write_summary(status="stopped")
        self.tracker.tags({"status": "stopped", "reason": BY_USER})
        self.tracker.status("stopped")

    def _stop(self) -> dict:
        self._mark_stopped()
        name = self.sweep.name
        self.display.say(f"Stopped. Continue: python jobs/tune.py --resume {name}{where(self.sweep.settings.run)}")
        return self.sweep.summary

    def _conclude(self, shared: Shared, stop_signal: threading.Event) -> dict:
        sweep, settings, tracker = self.sweep, self.sweep.settings, self.tracker
        rows = outcome.rank(self.ledger)
        files = outcome.write_files(sweep.folder, rows, self.ledger, settings, sweep.space, shared)
        best = rows[0]
        saved = epochs_saved(rows, settings.training.epochs)
        facts = {"trials": len(rows), "trial_epochs_saved": saved, "best_trial": best["trial"], BEST: best[BEST]}
        self.display.waiting(f"scoring the test split with {best['trial']}")
        self.ledger.close_run(best["trial"])  # the id of its MLflow run may have come after its end
        run = outcome.score_best(best, shared, tracker.uri, stop_signal)
        if run["status"] != "finished":
            return self._stop()
        facts |= {"model_uri": run["model_uri"], "test": run["test"]}
        name = settings.run.register
        if name and not run.get("delivered", True):
            sync = f"python jobs/train.py --sync {best['trial']} --storage-path {shlex.quote(str(sweep.folder))}"
            self.display.say(
                f"Not registered: MLflow lacks the model. After `{sync}` the same command does it.", "yellow"
            )
        elif name:
            facts["registered"] = register(tracker.uri, name, run["mlflow_run_id"], self.display)
        self.display.close()
        told = facts | {"status": "finished", "reason": self.stopped or "all trials ended"}
        outcome.report_to_parent(tracker, rows, settings.training.epochs, told, files)
        sweep.write_summary(status="finished", extending=False, **facts)
        if not tracker.deliver():
            self.display.say("MLflow did not take everything; the sweep's folder holds it all.", "yellow")
        flags = where(settings.run)
        outcome.show(sweep.name, sweep.folder, rows, sweep.summary, settings, shared.classes, flags, self.display)
        return sweep.summary

    def _overview(self) -> list[tuple[str, str]]:
        settings, part = self.sweep.settings, self.sweep.settings.sweep
        mode = "read once and shared" if self.plan.kept else "streamed"
        trials = "as many as fit" if self.planned is None else str(self.planned)
        if part.minutes:
            trials += f", for {part.minutes:g} minutes"
        if len(self.ledger):
            trials += f" ({len(self.ledger)} begun before, {len(self.ledger.under_way())} of them go on)"
        workers = (
            f"{self.plan.num_workers} worker(s) x {self.plan.cpus_per_worker:g} CPUs, {self.plan.threads} thread(s)"
        )
        return [
            ("data", f"{self.prepared.folder} ({self.plan.data_bytes / 1e6:.0f} MB, {mode})"),
            ("splits", ", ".join(f"{name} {count:,}" for name, count in self.counts.items())),
            *checks_row(self.prepared),
            *([] if "precision" in self.sweep.space.draws else [("precision", settings.training.precision)]),
            ("space", self.sweep.space.described()),
            ("search", f"{part.search}, {part.scheduler}, up to {settings.training.epochs} epochs a trial"),
            ("trials", f"{trials}; {self.at_a_time} at a time, {workers} each"),
            ("device", in_words(self.plan.use_gpu, self.plan.why_cpus)),
            ("results", str(self.sweep.folder)),
            ("tracking", f"{without_secrets(self.tracker.uri)}, experiment {settings.run.experiment}"),
        ]
