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
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from typing import Any

from rayscan import planning
from rayscan.config import RunConfig, as_yaml
from rayscan.errors import STOPPED, DataError, RayscanError
from rayscan.model.search import draw
from rayscan.models import check_start
from rayscan.planning import STAGES, Model, Unit, run_file
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
    versions: dict[str, str] = field(default_factory=dict)


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


class Run:
    """One pass over the stages with one configuration."""

    def __init__(self, workspace: Workspace, config: RunConfig, address: str | None = None) -> None:
        self.workspace, self.config, self.address = workspace, config, address
        config_hash = planning.config_hash(config)
        run_id = f"{datetime.now(UTC):%Y%m%dT%H%M%S}-{uuid.uuid4().hex[:6]}"
        self.info = CommitInfo(run_id, config_hash)
        self.outcome = Outcome(config.run, run_id, _now(), config_hash, versions=planning.versions())
        self._stack = ExitStack()
        self._ray = False

    def execute(
        self, stages: Iterable[str] = STAGES, fresh: bool = False, period: str | None = None
    ) -> Outcome:
        """Do what is due in these stages. Expected errors are recorded in `run.json` and raised again.

        `fresh` is for training, `period` for the report.
        """
        steps: dict[str, Callable[[], dict[str, Any] | None]] = {
            "ingest": self._ingest,
            "sequences": self._sequences,
            "train": lambda: self._train(fresh),
            "embed": self._embed,
            "cluster": self._cluster,
            "campaigns": self._campaigns,
            "evaluate": self._evaluate,
            "report": lambda: self._report(period),
            "paper": self._paper,
        }
        outcome = self.outcome
        try:
            with leaving_on_sigterm(), self._stack:
                for stage in stages:
                    self._step(stage, steps[stage])
        except BaseException as error:
            outcome.status, outcome.exit_code = "failed", FAILED
            if isinstance(error, RayscanError):
                outcome.exit_code = error.exit_code
            outcome.error = f"{type(error).__name__}: {error}"
            if isinstance(error, SystemExit):
                outcome.status, outcome.exit_code, outcome.error = "stopped", STOPPED, "stopped by SIGTERM"
            raise
        else:
            self._conclude()
        finally:
            self._write_outcome()
        return outcome

    def _step(self, stage: str, step: Callable[[], dict[str, Any] | None]) -> None:
        start = datetime.now(UTC)
        counts = step()
        if counts is None:
            say(f"{stage}: nothing to do")
            return
        seconds = (datetime.now(UTC) - start).total_seconds()
        self.outcome.stages[stage] = {**counts, "seconds": round(seconds, 1)}
        shown = ", ".join(
            f"{name.replace('_', ' ')} {_number(value)}"
            for name, value in counts.items()
            if value is not None
        )
        say(f"{stage}: {shown} ({duration(seconds)})")

    def _conclude(self) -> None:
        stages = self.outcome.stages
        if not stages:
            self.outcome.status, self.outcome.exit_code = "nothing to do", NOTHING_TO_DO
        elif any(stages.get("ingest", {}).get(name) for name in ("rejected", "incomplete")):
            self.outcome.status, self.outcome.exit_code = "done, some inputs rejected", SOME_REJECTED
        else:
            self.outcome.status, self.outcome.exit_code = "done", DONE

    def _write_outcome(self) -> None:
        self.outcome.finished = _now()
        if self.outcome.exit_code == NOTHING_TO_DO:
            return  # the last run that did something stays on record
        self.workspace.write_json(run_file(self.config, "run.json"), asdict(self.outcome))
        self.workspace.write_bytes(run_file(self.config, "config.yaml"), as_yaml(self.config).encode())

    def _need_ray(self) -> None:
        if not self._ray:
            from rayscan.stages.session import session

            self._stack.enter_context(session(self.config.resources, self.address))
            self._ray = True

    def _model(self) -> Model:
        model = planning.find_model(self.workspace, self.config)
        if model is None and self.config.embed.model is not None:
            raise DataError(f"{self.workspace.uri} has no model {self.config.embed.model} (embed.model)")
        if model is None:
            raise DataError("these settings have no trained model yet; run `rayscan train` with them first")
        return model

    # -- the stages: None when nothing is due, else counts for people and run.json

    def _ingest(self) -> dict[str, Any] | None:
        if not self.config.captures.paths:
            say("ingest: no captures.paths given; going on with the flows that are there")
            return None
        due = [file for file in planning.capture_units(self.workspace, self.config) if file.state != "done"]
        if not due:
            return None
        self._need_ray()
        from rayscan.stages import ingest

        return asdict(ingest.run(self.workspace, self.config, due, self.info))

    def _why_no_flows(self) -> str:
        rejects = self.workspace.table("rejects").read().to_pylist()
        if not rejects:
            return "there are no flows; run `rayscan ingest` with captures.paths first"
        first = min(rejects, key=lambda row: str(row["path"]))
        reason = str(first["reason"])
        where = "" if first["path"] in reason else f"{first['path']}: "
        files = len({row["path"] for row in rejects})
        return f"no flow could be read from {files} captures; the first says: {where}{reason}"

    def _sequences(self) -> dict[str, Any] | None:
        if not self.workspace.table("flows").files():
            raise DataError(self._why_no_flows())
        due = _due(planning.sequence_units(self.workspace, self.config))
        if not due:
            return None
        self._need_ray()
        from rayscan.stages import sequence

        return asdict(sequence.run(self.workspace, self.config, due, self.info))

    def _train(self, fresh: bool) -> dict[str, Any] | None:
        if self.config.embed.model is not None:
            self._model()
            return None  # it came trained
        if planning.find_model(self.workspace, self.config) is not None and not fresh:
            return None
        planning.training_files(self.workspace, self.config)  # says what is missing before Ray starts
        check_start(self.workspace, self.config)
        self._need_ray()
        from rayscan.stages import train

        return asdict(train.run(self.workspace, self.config, fresh))

    def _embed(self) -> dict[str, Any] | None:
        model = self._model()
        due = _due(planning.embed_units(self.workspace, model))
        if not due:
            return None
        self._need_ray()
        from rayscan.stages import embed

        return asdict(embed.run(self.workspace, self.config, model, due, self.info))

    def _cluster(self) -> dict[str, Any] | None:
        model = self._model()
        due = _due(planning.cluster_units(self.workspace, self.config, model))
        if not due:
            return None
        self._need_ray()
        from rayscan.stages import cluster

        return asdict(cluster.run(self.workspace, self.config, model, due, self.info))

    def _campaigns(self) -> dict[str, Any] | None:
        model = self._model()
        due = _due(planning.campaign_units(self.workspace, self.config))
        if not due:
            return None
        self._need_ray()
        from rayscan.stages import campaigns

        return asdict(campaigns.run(self.workspace, self.config, model, due, self.info))

    def _evaluate(self) -> dict[str, Any] | None:
        model = self._model()
        path = run_file(self.config, "evaluation.json")
        made_from = planning.evaluation_version(self.workspace, self.config, model)
        if planning.version_of(self.workspace, path) == made_from:
            return None
        self._need_ray()
        from rayscan.stages import evaluate

        return evaluate.run(self.workspace, self.config, model, made_from)

    def _paper(self) -> dict[str, Any] | None:
        model = self._model()
        made_from = planning.paper_version(self.workspace, self.config, model)
        if planning.version_of(self.workspace, run_file(self.config, planning.PAPER)) == made_from:
            return None
        self._need_ray()
        from rayscan.stages import paper

        return paper.run(self.workspace, self.config, model, made_from)

    def _report(self, period: str | None) -> dict[str, Any] | None:
        model = self._model()
        made_from = planning.report_version(self.workspace, self.config, model)
        name = planning.report_name(period)
        self.outcome.report = self.workspace.url(run_file(self.config, f"{name}.html"))
        if planning.version_of(self.workspace, run_file(self.config, f"{name}.json")) == made_from:
            return None
        self._need_ray()
        from rayscan.stages import report

        return report.run(self.workspace, self.config, model, made_from, period)


def _due(units: list[Unit]) -> list[Unit]:
    return [unit for unit in units if unit.state != "done"]


def tune(workspace: Workspace, config: RunConfig, address: str | None = None) -> tuple[int, dict[str, Any]]:
    """Do what is missing of the sweep that these settings ask for; the exit code and what came out."""
    name = planning.sweep_id(config)
    facts = workspace.read_json(f"tuning/{name}/tune.json")
    if facts is not None and facts["status"] == "done":
        return NOTHING_TO_DO, facts
    draw(config)  # says what is wrong with the settings before Ray starts
    planning.training_files(workspace, config)
    from rayscan.stages.session import session

    with leaving_on_sigterm(), session(config.resources, address):
        from rayscan.stages import tune as stage

        return DONE, stage.run(workspace, config, name)


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
            found.append(workspace.read_json(run_file(one, "evaluation.json")) or {})
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


def plan(uri: str, config: RunConfig, model: Model | None = None) -> list[dict[str, Any]]:
    """`status` of a workspace that need not exist yet: then everything is due."""
    if Workspace(uri).facts() is not None:
        opened = Workspace.open(uri)
        return [*status(opened, config, model), _paper_row(opened, config, model)]
    files = planning.find_captures(config.captures, uri)
    later = [_status_row(stage, "", ["due"]) for stage in (*STAGES[1:], "paper")]
    return [_status_row("ingest", "", [file.state for file in files]), *later]


def status(workspace: Workspace, config: RunConfig, model: Model | None = None) -> list[dict[str, Any]]:
    """What is done, due and stale, one row per stage and period, with row counts.

    `model` is one that is not in the workspace yet, but would be brought in.
    """
    rows: list[dict[str, Any]] = []
    if config.captures.paths:
        files = planning.capture_units(workspace, config)
        flows = sum(_rows_by_period(workspace, "flows", {}).values())
        rows.append({**_status_row("ingest", "", [file.state for file in files]), "rows": flows})
    rows += _period_rows(
        "sequences", planning.sequence_units(workspace, config), _rows_by_period(workspace, "sequences", {})
    )
    model = model or planning.find_model(workspace, config)
    rows.append(_status_row("train", "", ["due" if model is None else "done"]))
    if model is None:
        return rows
    rows += _period_rows(
        "embed",
        planning.embed_units(workspace, model),
        _rows_by_period(workspace, "embeddings", {"model": model.id}),
    )
    rows += _period_rows(
        "cluster",
        planning.cluster_units(workspace, config, model),
        _rows_by_period(workspace, "clusters", {"run": config.run}),
    )
    rows += _period_rows(
        "campaigns",
        planning.campaign_units(workspace, config),
        _rows_by_period(workspace, "campaigns", {"run": config.run}),
    )
    evaluated = planning.evaluation_version(workspace, config, model)
    reported = planning.report_version(workspace, config, model)
    rows.append(_result_row(workspace, config, "evaluate", "evaluation.json", evaluated))
    rows.append(_result_row(workspace, config, "report", "report.json", reported))
    return rows


def _paper_row(workspace: Workspace, config: RunConfig, model: Model | None) -> dict[str, Any]:
    model = model or planning.find_model(workspace, config)
    wanted = "" if model is None else planning.paper_version(workspace, config, model)
    return _result_row(workspace, config, "paper", planning.PAPER, wanted)


def _result_row(
    workspace: Workspace, config: RunConfig, stage: str, name: str, wanted: str
) -> dict[str, Any]:
    """Status of a result that is one JSON file of the run and says what it was made from."""
    found = planning.version_of(workspace, run_file(config, name))
    return _status_row(stage, "", ["due" if found is None else "done" if found == wanted else "stale"])


def _period_rows(stage: str, units: list[Unit], counts: dict[str, int]) -> list[dict[str, Any]]:
    states: dict[str, list[str]] = {}
    for unit in units:
        states.setdefault(unit.key["period"], []).append(unit.state)
    return [
        {**_status_row(stage, period, found), "rows": counts.get(period, 0)}
        for period, found in sorted(states.items())
    ]


def _status_row(stage: str, period: str, states: list[str]) -> dict[str, Any]:
    counted = {name: states.count(name) for name in ("done", "due", "stale")}
    return {"stage": stage, "period": period, **counted, "rows": None}


def _rows_by_period(workspace: Workspace, table: str, where: dict[str, str]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for file in workspace.table(table).files(where):
        counts[file.key["period"]] = counts.get(file.key["period"], 0) + file.rows
    return counts


def _number(value: Any) -> str:
    return (
        f"{value:,}" if isinstance(value, int) else f"{value:.4g}" if isinstance(value, float) else str(value)
    )


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
