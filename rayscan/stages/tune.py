"""A sweep over settings: successive halving in which every training of a trial up to a rung is one Ray task.

A task reads the workspace, trains in its own process with `model.fit`, writes where it came to, and ends. It
waits for nobody and nobody's resources wait for it, so there is nothing that could hang: Ray Tune's ASHA over
Ray Train did on a small machine, where stopped trials kept their workers (docs/ray.md). Ray Tune with plain
functions did not, but keeps a sweep as pickles in the workspace, which would run whoever's code wrote them.

A result is a small JSON file, written last. Whatever was killed, the next run takes the results that are
there and trains what is missing. A trial trains in one process; sweep smaller models, or have a GPU.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import ray
import torch
from ray.exceptions import RayError

from rayscan import planning
from rayscan.config import RunConfig, TuneConfig, as_yaml
from rayscan.errors import DataError, RayscanError
from rayscan.model.embed import device_of
from rayscan.model.fit import Metrics, TrainState, fit
from rayscan.model.sampling import PairSampler
from rayscan.model.search import Trial, draw, keep, rungs
from rayscan.progress import say, track
from rayscan.report.sweep import sweep_page
from rayscan.stages.feeding import by_bucket, loader, read_validation
from rayscan.stages.session import check_room, cluster_cpus, gpus_each, is_local, share_of_cores
from rayscan.tables import File, Workspace

_GRACE_S = 60.0  # after the time limit, for trials to notice it


@dataclass(frozen=True)
class Result:
    """What a trial came to at the end of a rung."""

    trial: int
    rung: int
    steps: int
    separation: float | None  # the best so far, on sources that training has not seen; None if it failed
    best_step: int
    loss: float | None
    seconds: float
    curve: list[list[float]]  # step and separation of each validation in this rung
    error: str = ""


@dataclass(frozen=True)
class _Job:
    """What every task is told."""

    workspace: Workspace
    folder: str
    files: list[File]
    rung: int
    until: int
    threads: int
    gpus: float  # of each trial
    deadline: float


class _OutOfTime(Exception):
    """The time limit has come while a trial was training."""


def run(workspace: Workspace, config: RunConfig, name: str) -> dict[str, Any]:
    """Do what is missing of the sweep `name` and write its results; facts for people and `tune.json`.

    Raises DataError if every trial failed, or if there is nothing to validate on.
    """
    gpus = gpus_each(config.train.device, config.resources.train_gpus)
    check_room(config.resources.train_cpus, gpus)
    start, folder = time.time(), f"tuning/{name}"
    trials = draw(config)
    ends = rungs(config.train.steps, config.tune.first_steps, config.tune.reduction)
    slots = _slots(config, len(trials), gpus)
    threads = share_of_cores(config.train.threads, slots, config.resources.train_cpus)
    deadline = start + 60 * config.tune.minutes if config.tune.minutes else float("inf")
    files = planning.training_files(workspace, config)
    say(f"tune: {len(trials)} trials to {_list(ends)} steps, at most {slots} at a time")
    results: dict[tuple[int, int], Result] = _recorded(workspace, folder, trials, ends)
    before = sum(_steps(ends, rung) for _, rung in results)
    alive = [trial.number for trial in trials]
    complete = True
    with track("tune", _planned(len(trials), ends, config.tune.reduction), "steps", before) as advance:
        for rung, end in enumerate(ends):
            missing = [trials[n] for n in alive if (n, rung) not in results]
            job = _Job(workspace, folder, files, rung, end, threads, gpus, deadline)
            for result in _in_parallel(job, missing, slots, config):
                results[result.trial, rung] = result
                workspace.write_json(_file(folder, result.trial, rung), asdict(result))
                advance(_steps(ends, rung), _describe(result))
            if any((n, rung) not in results for n in alive):
                complete = False
                break
            alive = keep({n: results[n, rung].separation for n in alive}, config.tune.reduction)
            if not alive:
                raise DataError(f"every trial failed; the first says: {_first_error(results)}")
    return _conclude(workspace, folder, trials, results, complete)


def _steps(ends: list[int], rung: int) -> int:
    return ends[rung] - (ends[rung - 1] if rung else 0)


def _planned(trials: int, ends: list[int], reduction: int) -> int:
    total = 0
    for rung in range(len(ends)):
        total += trials * _steps(ends, rung)
        trials = -(-trials // reduction)
    return total


def plan(workspace: Workspace, config: RunConfig, name: str) -> dict[str, Any]:
    """What `run` would do, without Ray."""
    trials = draw(config)
    ends = rungs(config.train.steps, config.tune.first_steps, config.tune.reduction)
    done = _recorded(workspace, f"tuning/{name}", trials, ends)
    return {
        "sweep": name,
        "trials": len(trials),
        "rungs": ends,
        "steps": _planned(len(trials), ends, config.tune.reduction),
        "steps_done": sum(_steps(ends, rung) for _, rung in done),
    }


def _slots(config: RunConfig, trials: int, gpus: float) -> int:
    """Most trials at a time: what a local Ray's CPUs or GPUs allow, or fewer where asked.

    On a cluster none waits for what is there now: Ray queues them, and starts machines for those that wait.
    """
    most, resources = min(config.tune.concurrent or trials, trials), config.resources
    if not is_local():
        return most
    slots = min(int(cluster_cpus() // resources.train_cpus), share_of_cores(0, 1, resources.train_cpus))
    if gpus:
        slots = min(slots, int(ray.cluster_resources().get("GPU", 0) // gpus))
    return max(1, min(slots, most))


def _in_parallel(job: _Job, trials: Iterable[Trial], slots: int, config: RunConfig) -> Iterator[Result]:
    """Results of the trials as they come in; those that the time limit has kept from ending are left out.

    A worker that dies is tried again once, and then is the trial's failure. A RayscanError is raised.
    """
    task = ray.remote(num_cpus=config.resources.train_cpus, num_gpus=job.gpus, max_retries=1)(_advance)
    waiting, running = iter(trials), dict[Any, Trial]()
    try:
        while True:
            while len(running) < slots and time.time() < job.deadline and (one := next(waiting, None)):
                running[task.remote(job, one)] = one
            if not running or time.time() > job.deadline + _GRACE_S:
                return
            for reference in ray.wait(list(running), num_returns=1, timeout=1)[0]:
                trial = running.pop(reference)
                result = _fetched(reference, job, trial)
                if result is not None:
                    yield result
    finally:
        for reference in running:
            ray.cancel(reference)


def _fetched(reference: Any, job: _Job, trial: Trial) -> Result | None:
    try:
        result: Result | None = ray.get(reference)
        return result
    except RayError as error:
        cause = getattr(error, "cause", None)
        if isinstance(cause, OSError):
            raise RayscanError(f"the sweep cannot read or write {job.workspace.uri}: {cause}") from None
        if isinstance(cause, RayscanError):
            raise cause from None
        if cause is not None:
            raise
        text = f"its worker died: {' '.join(str(error).split())[:200]}"
        return Result(trial.number, job.rung, 0, None, 0, None, 0.0, [], text)


def _recorded(
    workspace: Workspace, folder: str, trials: list[Trial], ends: list[int]
) -> dict[tuple[int, int], Result]:
    found: dict[tuple[int, int], Result] = {}
    for trial in trials:
        for rung in range(len(ends)):
            data = workspace.read_json(_file(folder, trial.number, rung))
            if data is None:
                break
            found[trial.number, rung] = Result(**data)
    return found


def _file(folder: str, trial: int, rung: int, kind: str = "json") -> str:
    return f"{folder}/trials/{trial:03d}-{rung}.{kind}"


def _describe(result: Result) -> str:
    if result.separation is None:
        return f"trial {result.trial} failed: {result.error}"
    return f"trial {result.trial}: separation {result.separation:.4f} after {result.steps:,} steps"


def _first_error(results: dict[tuple[int, int], Result]) -> str:
    return next((result.error for result in results.values() if result.error), "unknown")


def _list(ends: list[int]) -> str:
    return ", ".join(f"{end:,}" for end in ends)


# ---------------------------------------------------------------------------------------------
# In a task
# ---------------------------------------------------------------------------------------------


def _advance(job: _Job, trial: Trial) -> Result | None:
    """Train a trial from where it was to the end of the rung. None if the time limit comes first.

    Every `train.checkpoint_every` steps what it has come to is kept, so that a kill costs no more than these.
    """
    torch.set_num_threads(job.threads)
    began = time.time()
    config = planning.settled(job.workspace, trial.config, job.files)
    train = config.train
    buckets = by_bucket(job.files)
    load = loader(job.workspace, config, buckets)
    validation = read_validation(job.workspace, config, job.files)
    if validation is None:
        raise DataError(
            "a sweep needs sources that training does not see: fewer than two validation sources have two "
            "sequences; raise split.validation_sources or ingest more"
        )
    start, curve = _begun(job, trial)
    last = start
    rows: list[Metrics] = []

    def on_step(metrics: Metrics) -> None:
        rows.append(metrics)
        if time.time() > job.deadline:
            raise _OutOfTime

    def on_checkpoint(state: TrainState | None, _: Metrics) -> None:
        nonlocal last
        if state is not None:
            last = state
            if state.step < job.until:
                _keep(job, trial, state, curve + _curve(rows))

    total = sum(file.rows for files in buckets.values() for file in files)
    sampler = PairSampler(tuple(buckets), load, config.split, train, total=total)
    device = device_of(train.device if job.gpus else "cpu")
    try:
        fit(
            config.model, train, sampler, device=device, start_state=start, until=job.until,
            validation=validation, on_step=on_step, on_checkpoint=on_checkpoint,
        )  # fmt: skip
    except _OutOfTime:
        return None
    except RayscanError as error:  # these settings cannot be trained with; others may
        seconds = time.time() - began
        return Result(trial.number, job.rung, len(rows), None, 0, None, seconds, [], str(error))
    assert last is not None  # `fit` ends with a checkpoint, unless the one it began with was the end
    job.workspace.write_bytes(_file(job.folder, trial.number, job.rung, "safetensors"), last.to_bytes())
    for kind in _PART:
        job.workspace.remove(_file(job.folder, trial.number, job.rung, kind))
    return Result(
        trial.number,
        job.rung,
        last.step,
        last.best_separation,
        last.best_step,
        rows[-1]["loss"] if rows else None,
        round(time.time() - began, 2),
        curve + _curve(rows),
    )


def _curve(rows: list[Metrics]) -> list[list[float]]:
    return [[row["step"], row["separation"]] for row in rows if "separation" in row]


_PART = ("part.json", "part.safetensors")
"""What a rung that has not ended leaves: its curve, with the step that it goes to, and the state."""


def _keep(job: _Job, trial: Trial, state: TrainState, curve: list[list[float]]) -> None:
    facts, weights = (_file(job.folder, trial.number, job.rung, kind) for kind in _PART)
    job.workspace.write_bytes(weights, state.to_bytes())
    job.workspace.write_json(facts, {"step": state.step, "curve": curve})  # last: it says that both are there


def _begun(job: _Job, trial: Trial) -> tuple[TrainState | None, list[list[float]]]:
    """Where a trial goes on in this rung, and the curve up to there."""
    facts, weights = (_file(job.folder, trial.number, job.rung, kind) for kind in _PART)
    part = job.workspace.read_json(facts)
    if part is not None:
        state = TrainState.from_bytes(job.workspace.read_bytes(weights))
        if state.step == part["step"]:  # else a kill came between the two
            return state, part["curve"]
    if not job.rung:
        return None, []
    before = _file(job.folder, trial.number, job.rung - 1, "safetensors")
    return TrainState.from_bytes(job.workspace.read_bytes(before)), []


# ---------------------------------------------------------------------------------------------
# What is left behind
# ---------------------------------------------------------------------------------------------


def _conclude(
    workspace: Workspace,
    folder: str,
    trials: list[Trial],
    results: dict[tuple[int, int], Result],
    complete: bool,
) -> dict[str, Any]:
    """Table of trials, curves, page, the best settings; `tune.json` last."""
    rows = trial_rows(trials, results)
    ranked = [row for row in rows if row["separation"] is not None]
    if not ranked:
        raise DataError(
            "the time limit came before any trial had a result; raise tune.minutes, or run it again"
        )
    best = ranked[0]
    curve = [
        {"trial": result.trial, "step": int(step), "separation": separation}
        for _, result in sorted(results.items())
        for step, separation in result.curve
    ]
    for name, table in (("trials", rows), ("curves", curve)):
        sink = pa.BufferOutputStream()
        pq.write_table(pa.Table.from_pylist(_as_text(table)), sink)
        workspace.write_bytes(f"{folder}/{name}.parquet", sink.getvalue().to_pybytes())
    workspace.write_bytes(f"{folder}/report.html", sweep_page(rows, curve).encode())
    settings = trials[best["trial"]].config.model_copy(update={"tune": TuneConfig()})
    workspace.write_bytes(f"{folder}/best.yaml", as_yaml(settings).encode())
    facts = {
        "status": "done" if complete else "stopped by the time limit",
        "trials": len(trials),
        "failed": sum(bool(row["error"]) for row in rows),
        "best_trial": best["trial"],
        "separation": best["separation"],
        "separation_unchanged": next(row["separation"] for row in rows if row["trial"] == 0),
        "best": {path: value for path, value in trials[best["trial"]].values.items()},
        "config": workspace.url(f"{folder}/best.yaml"),
        "page": workspace.url(f"{folder}/report.html"),
        "table": workspace.url(f"{folder}/trials.parquet"),
    }
    workspace.write_json(f"{folder}/tune.json", facts)
    if complete:
        for trial, rung in results:  # states only go on from; the results stay
            workspace.remove(_file(folder, trial, rung, "safetensors"))
    return facts


def trial_rows(trials: list[Trial], results: dict[tuple[int, int], Result]) -> list[dict[str, Any]]:
    """A row per trial, best first: those that came furthest, and among them by separation."""
    rows = []
    for trial in trials:
        mine = sorted((r for r in results.values() if r.trial == trial.number), key=lambda r: r.rung)
        last = mine[-1] if mine else None
        found = next((r.separation for r in reversed(mine) if r.separation is not None), None)
        rows.append(
            {
                "trial": trial.number,
                "separation": found,
                "rung": last.rung if last else -1,
                "steps": last.steps if last else 0,
                "best_step": last.best_step if last else 0,
                "loss": last.loss if last else None,
                "seconds": round(sum(r.seconds for r in mine), 2),
                "error": last.error if last else "",
                **{path: _setting(trial.config, path) for path in trials[-1].values},
            }
        )
    failed = {row["trial"]: bool(row["error"]) for row in rows}
    return sorted(
        rows, key=lambda row: (failed[row["trial"]], -row["rung"], -(row["separation"] or 0), row["trial"])
    )


def _setting(config: RunConfig, path: str) -> Any:
    section, key = path.split(".")
    return getattr(getattr(config, section), key)


def _as_text(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows whose lists are JSON, so that every column of the table has one type."""

    def plain(value: Any) -> Any:
        return json.dumps(value) if isinstance(value, list | tuple | dict) else value

    return [{name: plain(value) for name, value in row.items()} for row in rows]
