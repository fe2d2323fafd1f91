"""The stages in order: what is due, do it, say what was done.

A stage starts when the ones before it have committed. Ray is started only when something is due. However
a run ends, `runs/<run>/run.json` says how; what was committed stays, and the next run goes on from there.
"""

from __future__ import annotations

import signal
import threading
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from typing import Any

from rayscan import planning
from rayscan.config import RunConfig, as_yaml
from rayscan.errors import STOPPED, CommitConflict, ConfigError, DataError, LeaseHeld, RayscanError
from rayscan.lease import Lease, lease
from rayscan.model.search import draw
from rayscan.models import check_start, named, starting_from
from rayscan.planning import STAGES, CaptureFile, Model, Unit, Window, run_file
from rayscan.progress import duration, say
from rayscan.tables import CommitInfo, Workspace

DONE, FAILED, BAD_USAGE, SOME_REJECTED, NOTHING_TO_DO = 0, 1, 2, 3, 4


@dataclass
class Outcome:
    """How a run ended; what `run.json` holds."""

    run: str
    run_id: str
    started: str
    config_hash: str
    finished: str = ""
    status: str = "running"
    exit_code: int = FAILED
    error: str | None = None
    stages: dict[str, dict[str, Any]] = field(default_factory=dict)
    report: str | None = None
    changes: str | None = None
    versions: dict[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, config: RunConfig) -> Outcome:
        run_id = f"{datetime.now(UTC):%Y%m%dT%H%M%S}-{uuid.uuid4().hex[:6]}"
        return cls(config.run, run_id, _now(), planning.config_hash(config), versions=planning.versions())

    def fail(self, error: BaseException) -> None:
        self.status, self.exit_code = "failed", FAILED
        if isinstance(error, RayscanError):
            self.exit_code = error.exit_code
        self.error = f"{type(error).__name__}: {error}"
        if isinstance(error, SystemExit):
            self.status, self.exit_code, self.error = "stopped", STOPPED, "stopped by SIGTERM"


@contextmanager
def leaving_on_sigterm() -> Iterator[None]:
    """SIGTERM (a spot machine that is taken away, a scheduler) ends the block by SystemExit(STOPPED).

    Training keeps a checkpoint on its way out. Further SIGTERMs change nothing, so that it can.
    """

    def leave(*_: object) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        raise SystemExit(STOPPED)

    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may take signals
        return
    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def _last_words() -> Iterator[None]:
    """For writing how a run ended, on its way out: what goes wrong with that must not hide why it ended."""
    try:
        yield
    except (LeaseHeld, CommitConflict):
        return  # its run.json is another one's by now
    except Exception as trouble:
        say(f"how the run ended does not stand in its run.json: {trouble}")


class Run:
    """One pass over the stages with one configuration.

    Each stage has a plan and a work: the plan says what is due and changes nothing, the work does it. Before
    the first work the run takes its lease, and asks again what is due: another run may have done it. From
    then on all stages are about one model, whoever trains or switches meanwhile, unless the run itself does.
    """

    def __init__(
        self,
        workspace: Workspace,
        config: RunConfig,
        address: str | None = None,
        window: Window | None = None,
    ) -> None:
        self.workspace, self.config, self.address = workspace, config, address
        self.window = window or Window()
        self.outcome = Outcome.of(config)
        self.info = CommitInfo(self.outcome.run_id, self.outcome.config_hash)
        self._stack = ExitStack()
        self._lease: Lease | None = None
        self._model_found: Model | None = None
        self._campaigns_before = -1  # version of their table
        self._drift_found: dict[str, Any] | None = None

    def execute(
        self, stages: Iterable[str] = STAGES, fresh: bool = False, period: str | None = None
    ) -> Outcome:
        """Do what is due in these stages. Expected errors are recorded in `run.json` and raised again.

        `fresh` is for training, `period` for the report. Raises LeaseHeld, and records nothing, while another
        process is at work on this run.
        """
        steps: dict[str, tuple[Callable[[], Any], Callable[[Any], dict[str, Any]]]] = {
            "ingest": (self._plan_ingest, self._ingest),
            "sequences": (self._plan_sequences, self._sequences),
            "train": (lambda: self._plan_train(fresh), lambda _: self._train(fresh)),
            "embed": (self._plan_embed, self._embed),
            "cluster": (self._plan_cluster, self._cluster),
            "campaigns": (self._plan_campaigns, self._campaigns),
            "evaluate": (self._plan_evaluate, self._evaluate),
            "report": (lambda: self._plan_report(period), lambda todo: self._report(todo, period)),
            "paper": (self._plan_paper, self._paper),
            "drift": (self._plan_drift, self._drift),
            "changes": (self._plan_changes, self._changes),
            "pages": (self._plan_pages, self._pages),
        }
        outcome = self.outcome
        with leaving_on_sigterm(), self._stack:
            try:
                for stage in stages:
                    self._step(stage, *steps[stage])
            except BaseException as error:
                self._fail(error)
                raise
            self._conclude()
        return outcome

    def _step(self, stage: str, plan: Callable[[], Any], work: Callable[[Any], dict[str, Any]]) -> None:
        todo = plan()
        if todo and self._begin():
            todo = plan()
        if not todo:
            say(f"{stage}: nothing to do")
            return
        start = datetime.now(UTC)
        counts = work(todo)
        seconds = (datetime.now(UTC) - start).total_seconds()
        self.outcome.stages[stage] = {**counts, "seconds": round(seconds, 1)}
        shown = ", ".join(
            f"{name.replace('_', ' ')} {_number(value)}"
            for name, value in counts.items()
            if value is not None
        )
        say(f"{stage}: {shown} ({duration(seconds)})")

    def _begin(self) -> bool:
        """Before work: take the lease, say so in `run.json`, start Ray. True the first time."""
        if self._lease is not None:
            self._lease.check()
            return False
        self._take_lease()
        self._model_found = None
        self._campaigns_before = self.workspace.table("campaigns").version()
        self._write_outcome()
        from rayscan.stages.session import session

        self._stack.enter_context(session(self.config.resources, self.address))
        return True

    def _take_lease(self) -> None:
        self._lease = self._stack.enter_context(lease(self.workspace, f"run-{self.config.run}"))
        self.info = replace(self.info, check=self._lease.check)

    def _fail(self, error: BaseException) -> None:
        """Say in `run.json` how this run ended, unless another one is at work on it."""
        if isinstance(error, LeaseHeld) and self._lease is None:
            return
        self.outcome.fail(error)
        with _last_words():
            if self._lease is None:  # it was a plan that failed
                self._take_lease()
            self._write_outcome()

    def _conclude(self) -> None:
        stages = self.outcome.stages
        self.outcome.status, self.outcome.exit_code = "done", DONE
        if not stages:
            self.outcome.status, self.outcome.exit_code = "nothing to do", NOTHING_TO_DO
            if self._lease is None:
                return  # the last run that did something stays on record
        elif any(stages.get("ingest", {}).get(name) for name in ("rejected", "incomplete")):
            self.outcome.status, self.outcome.exit_code = "done, some inputs rejected", SOME_REJECTED
        self._write_outcome()

    def _write_outcome(self) -> None:
        """Raises CommitConflict once the lease is lost."""
        self.info.check()
        self.outcome.finished = "" if self.outcome.status == "running" else _now()
        self.workspace.write_json(run_file(self.config, "run.json"), asdict(self.outcome))
        self.workspace.write_bytes(run_file(self.config, "config.yaml"), as_yaml(self.config).encode())

    def _model(self) -> Model:
        if self._model_found is None:
            self._model_found = self._find_model()
        return self._model_found

    def _find_model(self) -> Model:
        model = planning.find_model(self.workspace, self.config)
        if model is None and self.config.embed.model is not None:
            raise DataError(f"{self.workspace.uri} has no model {self.config.embed.model} (embed.model)")
        if model is None:
            raise DataError("these settings have no trained model yet; run `rayscan train` with them first")
        return model

    def _due(self, units: list[Unit]) -> list[Unit]:
        return [unit for unit in _due(units) if self.window.holds(unit.key["period"])]

    # -- the stages: what is due, which is empty when nothing is; and doing it, with counts for people

    def _plan_ingest(self) -> list[CaptureFile]:
        if not self.config.captures.paths:
            say("ingest: no captures.paths given; going on with the flows that are there")
            return []
        files = planning.capture_units(self.workspace, self.config)
        return [file for file in files if file.state != "done" and self.window.can_hold(file)]

    def _ingest(self, due: list[CaptureFile]) -> dict[str, Any]:
        from rayscan.stages import ingest

        with lease(self.workspace, "ingest") as held:  # of any run: there is one set of books

            def check() -> None:
                self.info.check()
                held.check()

            return asdict(ingest.run(self.workspace, self.config, due, replace(self.info, check=check)))

    def _why_no_flows(self) -> str:
        rejects = self.workspace.table("rejects").read().to_pylist()
        if not rejects:
            return "there are no flows; run `rayscan ingest` with captures.paths first"
        first = min(rejects, key=lambda row: str(row["path"]))
        reason = str(first["reason"])
        where = "" if first["path"] in reason else f"{first['path']}: "
        files = len({row["path"] for row in rejects})
        return f"no flow could be read from {files} captures; the first says: {where}{reason}"

    def _plan_sequences(self) -> list[Unit]:
        if not self.workspace.table("flows").files():
            raise DataError(self._why_no_flows())
        return self._due(planning.sequence_units(self.workspace, self.config))

    def _sequences(self, due: list[Unit]) -> dict[str, Any]:
        from rayscan.stages import sequence

        return asdict(sequence.run(self.workspace, self.config, due, self.info))

    def _plan_train(self, fresh: bool) -> bool:
        if self.config.embed.model is not None:
            self._model()
            return False  # it came trained
        if planning.find_model(self.workspace, self.config) is not None and not fresh:
            return False
        planning.training_files(self.workspace, self.config)  # says what is missing before Ray starts
        if self.config.train.method == planning.ENCODER:
            check_start(self.workspace, self.config)
        return True

    def _train(self, fresh: bool) -> dict[str, Any]:
        from rayscan.stages import methods, train

        self._model_found = None
        name = f"model-{planning.model_id(self.config)}"
        with lease(self.workspace, name) as held:  # of any run: one folder
            work = train.run if self.config.train.method == planning.ENCODER else methods.train
            counts: dict[str, Any] = asdict(work(self.workspace, self.config, fresh))
            held.check()  # else another one is writing into that folder
            return counts

    def _plan_embed(self) -> list[Unit]:
        self._widen()
        return self._due(planning.embed_units(self.workspace, self._model()))

    def _embed(self, due: list[Unit]) -> dict[str, Any]:
        if self._model().method != planning.ENCODER:
            from rayscan.stages import methods

            return asdict(methods.embed(self.workspace, self.config, self._model(), due, self.info))
        from rayscan.stages import embed

        return asdict(embed.run(self.workspace, self.config, self._model(), due, self.info))

    def _plan_cluster(self) -> list[Unit]:
        return self._due(planning.cluster_units(self.workspace, self.config, self._model()))

    def _cluster(self, due: list[Unit]) -> dict[str, Any]:
        from rayscan.stages import cluster

        return asdict(cluster.run(self.workspace, self.config, self._model(), due, self.info))

    def _plan_campaigns(self) -> list[Unit]:
        self._model()
        return _due(planning.campaign_units(self.workspace, self.config))

    def _campaigns(self, due: list[Unit]) -> dict[str, Any]:
        from rayscan.stages import campaigns

        return asdict(campaigns.run(self.workspace, self.config, self._model(), due, self.info))

    def _plan_evaluate(self) -> str | None:
        made_from = planning.evaluation_version(self.workspace, self.config, self._model())
        path = run_file(self.config, planning.EVALUATION)
        return None if planning.version_of(self.workspace, path) == made_from else made_from

    def _evaluate(self, made_from: str) -> dict[str, Any]:
        from rayscan.stages import evaluate

        return evaluate.run(self.workspace, self.config, self._model(), made_from)

    def _plan_paper(self) -> str | None:
        made_from = planning.paper_version(self.workspace, self.config, self._model())
        found = planning.version_of(self.workspace, run_file(self.config, planning.PAPER))
        return None if found == made_from else made_from

    def _paper(self, made_from: str) -> dict[str, Any]:
        from rayscan.stages import paper

        return paper.run(self.workspace, self.config, self._model(), made_from)

    def _plan_report(self, period: str | None) -> str | None:
        made_from = planning.report_version(self.workspace, self.config, self._model(), period)
        name = planning.report_name(period)
        self.outcome.report = self.workspace.url(run_file(self.config, f"{name}.html"))
        found = planning.version_of(self.workspace, run_file(self.config, f"{name}.json"))
        return None if found == made_from else made_from

    def _report(self, made_from: str, period: str | None) -> dict[str, Any]:
        from rayscan.stages import report

        return report.run(self.workspace, self.config, self._model(), made_from, period)

    # -- what a periodic run does besides

    def _plan_drift(self) -> list[str]:
        """Periods that a model from before is about to embed; nothing when it has just been trained."""
        if "train" in self.outcome.stages:
            return []
        units = self._due(planning.embed_units(self.workspace, self._model()))
        return sorted({unit.key["period"] for unit in units if unit.files})

    def _drift(self, periods: list[str]) -> dict[str, Any]:
        from rayscan.stages import drift

        model, settings = self._model(), self.config.reprocess
        found = drift.run(self.workspace, self.config, model, periods)
        self._drift_found = asdict(found)
        counts = {"sources": found.sources, "then": found.then, "now": found.now, "drifted": found.drifted}
        if not found.drifted:
            return counts
        if settings.on_drift == "report" or self.config.embed.model is not None:
            say(
                f"drift: model {model.id} fits {', '.join(periods)} worse than its own data; see changes.json"
            )
            return counts
        return {**counts, "model": self._train_on(model, periods)}

    def _train_on(self, model: Model, periods: list[str]) -> str:
        """Train on from a model with these periods, and switch to what comes out; its name."""
        settings = self.config.reprocess
        config = starting_from(self.config, named(self.workspace, model.id))
        changes = {
            "periods": tuple(periods),
            "steps": settings.train_steps,
            "learning_rate": settings.learning_rate,
        }
        config = config.model_copy(update={"train": config.train.model_copy(update=changes)})
        name = planning.model_id(config)
        if planning.stored_model(self.workspace, name) is None:  # else a run was killed before it switched
            from rayscan.stages import train

            with lease(self.workspace, f"model-{name}") as held:
                train.run(self.workspace, config, fresh=False)
                held.check()
        self.info.check()
        planning.switch_model(self.workspace, self.config, name, f"drift in {', '.join(periods)}")
        self._model_found = None
        say(f"drift: the model is {name} from now on; `rayscan switch {model.id}` goes back")
        return name

    def _widen(self) -> None:
        """Give up the window when periods outside it were clustered with another model.

        Campaigns follow clusters through all periods, and vectors of two models cannot be compared.
        """
        model = self._model()
        clustered = self.workspace.table("clusters").files({"run": self.config.run})
        embedded = {
            file.key["period"] for file in self.workspace.table("embeddings").files({"model": model.id})
        }
        others = {file.key["period"] for file in clustered} - embedded
        if any(not self.window.holds(period) for period in others):
            say(f"the clusters of run {self.config.run} are of another model: all periods are done anew")
            self.window = Window()

    def _plan_changes(self) -> list[Unit]:
        from rayscan.stages import changes

        self.outcome.changes = self.workspace.url(run_file(self.config, "changes.json"))
        return changes.due(self.workspace, self.config)

    def _changes(self, units: list[Unit]) -> dict[str, Any]:
        from rayscan.stages import changes

        facts = {"run": self.config.run, "run_id": self.outcome.run_id, "drift": self._drift_found}
        counts: dict[str, Any] = changes.run(
            self.workspace, self.config, self._model(), units, self._campaigns_before, facts
        )
        return counts

    def _plan_pages(self) -> dict[str, str]:
        """Periods whose report is not of their campaigns, with what it is to be made from."""
        units = planning.campaign_units(self.workspace, self.config)
        periods = [unit.key["period"] for unit in units if unit.files]  # one that came out empty has no page
        found = {period: self._plan_report(period) for period in periods}
        return {period: made_from for period, made_from in found.items() if made_from is not None}

    def _pages(self, due: dict[str, str]) -> dict[str, Any]:
        for period, made_from in due.items():
            self._report(made_from, period)
        return {"periods": len(due)}


def _due(units: list[Unit]) -> list[Unit]:
    return [unit for unit in units if unit.state != "done"]


def tune(workspace: Workspace, config: RunConfig, address: str | None = None) -> tuple[int, dict[str, Any]]:
    """Do what is missing of the sweep that these settings ask for; the exit code and what came out.

    How it ended stands in the sweep's `run.json`, as for a run.
    """
    if config.train.method != planning.ENCODER:
        raise ConfigError(f"a sweep varies the encoder, and train.method is {config.train.method}")
    name = planning.sweep_id(config)
    facts = workspace.read_json(f"tuning/{name}/tune.json")
    if facts is not None and facts["status"] == "done":
        return NOTHING_TO_DO, facts
    outcome = Outcome.of(config)
    with leaving_on_sigterm(), lease(workspace, f"sweep-{name}") as held:

        def write() -> None:
            held.check()
            outcome.finished = "" if outcome.status == "running" else _now()
            workspace.write_json(f"tuning/{name}/run.json", asdict(outcome))

        write()
        try:
            facts = _sweep(workspace, config, name, address)
        except BaseException as error:
            outcome.fail(error)
            with _last_words():
                write()
            raise
        outcome.status, outcome.exit_code, outcome.stages = "done", DONE, {"tune": facts}
        write()
    return DONE, facts


def _sweep(workspace: Workspace, config: RunConfig, name: str, address: str | None) -> dict[str, Any]:
    draw(config)  # says what is wrong with the settings before Ray starts
    planning.training_files(workspace, config)
    from rayscan.stages.session import session

    with session(config.resources, address):
        from rayscan.stages import tune as stage

        return stage.run(workspace, config, name)


def evaluate_seeds(
    workspace: Workspace, config: RunConfig, count: int, address: str | None = None
) -> list[dict[str, Any]]:
    """Train, embed and evaluate with so many seeds from `train.seed` on; the rows of `seeds.across`.

    The first is the run itself, the others are named RUN-seed1 and so on. What is done is not done again.
    """
    from rayscan.evaluation import seeds
    from rayscan.stages.session import session

    first, found = config.train.seed, []
    with session(config.resources, address):
        for seed in range(first, first + count):
            train = config.train.model_copy(update={"seed": seed})
            name = config.run if seed == first else f"{config.run}-seed{seed}"
            one = config.model_copy(update={"run": name, "train": train})
            run = Run(workspace, one, address)
            run.execute(("train", "embed", "evaluate"))
            found.append(workspace.read_json(run_file(one, planning.EVALUATION)) or {})
    rows = seeds.across(found)
    facts = {"seeds": list(range(first, first + count)), "config_hash": planning.config_hash(config)}
    workspace.write_json(run_file(config, "evaluation-seeds.json"), {**facts, "rows": rows})
    for line in seeds.as_text(rows):
        say(line)
    return rows


def plan_tune(workspace: Workspace, config: RunConfig) -> dict[str, Any]:
    """What `tune` would do; changes nothing."""
    planning.training_files(workspace, config)
    from rayscan.stages import tune as stage

    return stage.plan(workspace, config, planning.sweep_id(config))


def _number(value: Any) -> str:
    return (
        f"{value:,}" if isinstance(value, int) else f"{value:.4g}" if isinstance(value, float) else str(value)
    )


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
