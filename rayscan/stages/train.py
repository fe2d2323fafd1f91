"""Training on Ray Train: one to many workers, killed and resumed, with the loop of `model.fit`.

Every worker reads the sequence files by itself (Ray Data's dataset shards starved and were far slower:
docs/ray.md). Checkpoints go to the workspace's storage; a worker that dies, or a run that is started again,
goes on from the last one. Process 0 writes the finished artefact, whose last file makes it exist.

An error that would come again (bad data, a loss that is not finite, a full disk) ends training: the worker
sends it to the driver and returns, because Ray Train would restart it as if a machine had been lost. One of
several workers cannot just return, for the others would wait for it: it fails, and all of them find on their
restart that there is nothing left to do.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.fs as pafs
import pyarrow.parquet as pq
import ray
import torch
import torch.distributed as dist
from ray import train as ray_train
from ray.exceptions import ActorDiedError
from ray.train import Checkpoint, CheckpointConfig, ControllerError, FailureConfig, ScalingConfig
from ray.train import RunConfig as RayRunConfig
from ray.train.torch import TorchConfig, TorchTrainer

from rayscan import planning
from rayscan.config import RunConfig
from rayscan.errors import DataError, ModelError, RayscanError, WorkspaceError
from rayscan.model import artefact
from rayscan.model.encoder import Encoder
from rayscan.model.features import Sequences
from rayscan.model.fit import READ_BACK, FitResult, Metrics, TrainState, fit, separation
from rayscan.model.precision import arithmetic
from rayscan.model.sampling import PairSampler
from rayscan.progress import say, track
from rayscan.stages.feeding import by_bucket, loader, validation_in_task
from rayscan.stages.post import Post
from rayscan.stages.session import check_room, gpus_each, is_local, share_of_cores
from rayscan.tables import File, Workspace
from rayscan.tracking import tracked

_STATE, _METRICS = "state.safetensors", "metrics.json"
_DRIFT = "drift.json"
_LOOK_EVERY_S = 0.2
_LEAVE_WITHIN_S = 20.0  # of the 30 that a machine gets before it is taken away
_ASK_EVERY_S = 1.0
_POLL_S = "0.2"
"""Seconds between looks of Ray Train's controller at its workers. A worker that reports waits for such a
look: with Ray's own 2 s, a checkpoint every five small steps cost four fifths of all training time."""
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


@dataclass
class Counts:
    steps: int
    loss: float
    separation: float | None
    best_step: int
    model: str
    separation_of_start: float | None = None


def run(workspace: Workspace, config: RunConfig, fresh: bool) -> Counts:
    """Train the model that the settings ask for and store it. `fresh` forgets one that is there already."""
    name = planning.model_id(config)
    if fresh:
        workspace.delete(f"models/{name}")
        workspace.delete(f"training/{name}")
    resources, workers = config.resources, config.train.workers
    gpus = gpus_each(config.train.device, resources.train_gpus, workers)
    check_room(resources.train_cpus, gpus, workers, memory_mb=resources.train_memory_mb)
    files = planning.training_files(workspace, config)
    post = ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1)(Post).remote()
    settled = planning.settled(workspace, config, files)
    validation = ray.put(validation_in_task(workspace, settled, files))
    job = _Job(workspace, settled, name, files, post, [validation])
    trainer = _trainer(workspace, config, name, job, gpus)
    try:
        with _curve_folder(workspace, name) as folder:
            told = {
                part: getattr(config, part).model_dump(mode="json")
                for part in ("sequences", "model", "train")
            }
            with tracked(config.train.trackers, name, told, folder) as log:
                _fit_with_progress(trainer, post, config, log)
    finally:
        ray.kill(post)
    model = planning.stored_model(workspace, name)
    if model is None:
        raise DataError("training ended without a model; run it again to go on from the last checkpoint")
    workspace.delete(f"training/{name}")  # the checkpoints; the artefact is in models/
    metrics = model.card["metrics"]
    _show_drift(workspace, model.folder)
    return Counts(
        int(metrics["steps"]),
        metrics["loss"],
        metrics.get("separation"),
        int(metrics["best_step"]),
        name,
        metrics.get("separation of the model it began with"),
    )


@contextmanager
def _curve_folder(workspace: Workspace, name: str) -> Iterator[str]:
    """A local folder for TensorBoard's files: the model's own, or one that is uploaded there in the end."""
    inner = f"models/{name}/tensorboard"
    workspace.delete(inner)  # of a start that was killed: every start tells the whole curve
    fs, path = workspace.location(inner)
    if isinstance(fs, pafs.LocalFileSystem):
        yield path
        return
    with tempfile.TemporaryDirectory() as folder:
        yield folder
        for file in Path(folder).iterdir():
            workspace.write_bytes(f"{inner}/{file.name}", file.read_bytes())


def _show_drift(workspace: Workspace, folder: str) -> None:
    drift = workspace.read_json(f"{folder}/{_DRIFT}")
    if drift is None:
        return
    figures = [drift[name] for name in ("then", "before", "after")]
    then, before, after = ("not measured" if x is None else f"{x:.4f}" for x in figures)
    say(
        f"drift: model {drift['start']} separated unseen sources of its own data at {then}, "
        f"of these periods at {before}; trained on, {after}"
    )


@dataclass(frozen=True)
class _Job:
    """What every worker is told."""

    workspace: Workspace
    config: RunConfig
    name: str
    files: list[File]
    post: Any  # a Post
    validation: list[Any]  # a reference to Sequences or None; in a list, so that it is not fetched everywhere

    def tell(self, message: Any) -> None:
        ray.get(self.post.put.remote(message))

    def is_to_stop(self) -> bool:
        return bool(ray.get(self.post.is_to_stop.remote()))

    def is_over(self) -> bool:
        """Whether a worker has told of an error that would come again."""
        return bool(ray.get(self.post.is_over.remote()))


def _trainer(workspace: Workspace, config: RunConfig, name: str, job: _Job, gpus: float) -> TorchTrainer:
    settings, resources = config.train, config.resources
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", _POLL_S)
    if is_local():  # no cloud gives notice of taking it away, and what waits for that is a process more
        os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
    fs, path = workspace.location(f"training/{name}")
    if isinstance(fs, pafs.LocalFileSystem):
        Path(path).mkdir(parents=True, exist_ok=True)
    threads = share_of_cores(settings.threads, settings.workers, resources.train_cpus)
    per_worker: dict[str, float] = {"CPU": resources.train_cpus}
    if resources.train_memory_mb:
        per_worker["memory"] = resources.train_memory_mb * 2**20
    if gpus:
        per_worker["GPU"] = gpus
    return TorchTrainer(
        _worker,
        train_loop_config={"job": job, "threads": threads},
        scaling_config=ScalingConfig(
            num_workers=settings.workers, use_gpu=gpus > 0, resources_per_worker=per_worker
        ),
        torch_config=TorchConfig(backend="nccl" if gpus else "gloo", timeout_s=300),
        run_config=RayRunConfig(
            name=planning.data_version(job.files),  # other sequences are another training
            storage_path=path,
            storage_filesystem=fs,
            failure_config=FailureConfig(
                max_failures=settings.max_failures,
                # Else workers that die while they start are started for ever. A cluster gets time to grow.
                controller_failure_limit=settings.max_failures if is_local() else 20,
            ),
            checkpoint_config=CheckpointConfig(num_to_keep=2),
        ),
    )


def _fit_with_progress(
    trainer: TorchTrainer, post: Any, config: RunConfig, log: Callable[[list[Metrics]], None]
) -> None:
    """Run the trainer in a thread, and show and `log` what its first worker reports meanwhile."""
    logging.getLogger("ray.train").setLevel(logging.ERROR)
    failure: list[BaseException] = []
    # An event: a signal that ends a Thread.join by an exception makes CPython 3.11 take the thread for ended.
    over = threading.Event()

    def target() -> None:
        try:
            trainer.fit()
        except BaseException as error:
            failure.append(error)
        finally:
            over.set()

    threading.Thread(target=target, name="rayscan-train", daemon=True).start()
    messages = _messages(post, over)
    try:
        begun = next(messages, None)  # steps that a checkpoint has, once a worker is up
        told = begun if isinstance(begun, RayscanError) else None
        if isinstance(begun, list):
            log(begun)
            told = _show(messages, len(begun), config.train.steps, log)
    except (SystemExit, KeyboardInterrupt):
        say("train: stopping; the workers keep a checkpoint")
        ray.get(post.stop.remote())
        over.wait(_LEAVE_WITHIN_S)
        raise
    over.wait()  # also after an error: to stop Ray under a trainer can crash the process
    if told is not None:
        raise told
    if failure:
        raise _explained(failure[0], config)


def _messages(post: Any, over: threading.Event) -> Iterator[Any]:
    """What workers send, until training is over and nothing is left."""
    while True:
        last = over.is_set()
        taken = ray.get(post.take.remote())
        yield from taken
        if last and not taken:
            return
        over.wait(_LOOK_EVERY_S)


def _show(
    messages: Iterator[Any], done: int, steps: int, log: Callable[[list[Metrics]], None]
) -> RayscanError | None:
    """Progress from the messages: curves, notes, errors that end it all. The first of these errors."""
    begun, since = done, time.monotonic()
    validated, told = "", None
    with track("train", steps, "steps", done) as advance:
        for message in messages:
            if isinstance(message, RayscanError):
                told = told or message
                continue
            if isinstance(message, str):
                say(f"train: {message}")
                continue
            rows = [row for row in message if row["step"] > done]  # not those done again after a restart
            if not rows:
                continue
            log(rows)
            for row in rows:
                if "separation" in row:
                    validated = f", separation {row['separation']:.4f}"
            last = int(rows[-1]["step"])
            speed = (last - begun) / max(time.monotonic() - since, 1e-9)
            advance(last - done, f"{speed:.2f} steps/s, loss {rows[-1]['loss']:.3f}{validated}")
            done = last
    return told


def _explained(error: BaseException, config: RunConfig) -> BaseException:
    """What training ended with, in words where it is no bug."""
    failures = getattr(error, "worker_failures", {})
    causes = [getattr(one, "cause", None) or one for one in failures.values()]
    causes = causes or [getattr(error, "controller_failure", error)]
    for cause in causes:
        if isinstance(cause, RayscanError):
            return cause
        if isinstance(cause, OSError):
            return RayscanError(f"training cannot read or write the workspace: {cause}; what was kept stays")
    if isinstance(error, ControllerError) or any(isinstance(cause, ActorDiedError) for cause in causes):
        first = " ".join(str(causes[0]).split())[:200]
        return RayscanError(
            f"training gave up after {config.train.max_failures} restarts (train.max_failures), because "
            f"workers died: {first}. Often it is memory: lower train.pool_sequences or train.batch_sources. "
            "Run it again to go on from the last checkpoint"
        )
    return error


# ---------------------------------------------------------------------------------------------
# In the workers
# ---------------------------------------------------------------------------------------------


def _worker(settings: dict[str, Any]) -> None:
    job: _Job = settings["job"]
    if job.is_over():
        return
    torch.set_num_threads(settings["threads"])
    try:
        _train(job)
    except (OSError, RayscanError) as error:
        cause = error.__cause__ if isinstance(error, WorkspaceError) else error
        full = isinstance(cause, OSError) and cause.errno in _FULL
        if isinstance(cause, OSError) and not full:
            raise  # storage that is away for a moment: Ray Train tries again
        note = f"no room left for checkpoints or the model in {job.workspace.uri}: {error}"
        job.tell(RayscanError(note) if full else error)
        if ray_train.get_context().get_world_size() > 1:
            raise


def _train(job: _Job) -> None:
    context = ray_train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    device = ray_train.torch.get_device()
    settings = job.config.train
    buckets = by_bucket(job.files)
    load = loader(job.workspace, job.config, buckets)
    total = sum(file.rows for file in job.files)
    sampler = PairSampler(tuple(buckets), load, job.config.split, settings, rank, world, total)
    state, curve = _resume()
    start = _start(job) if settings.start is not None else None
    validation, drift = None, None
    if rank == 0:
        job.tell(list(curve))
        validation = ray.get(job.validation[0])
        if validation is None:
            job.tell("no validation: fewer than two validation sources have two sequences")
        if state is not None:
            job.tell(f"going on from step {state.step}")
        if start is not None:
            drift = _drift(job, start, validation, device)
    if state is None and start is not None:
        state = TrainState.starting_from(start[0].state_dict(), job.config.model, settings)
    unsent: list[Metrics] = []

    def on_step(metrics: Metrics) -> None:
        curve.append(metrics)
        unsent.append(metrics)
        step = metrics["step"]
        if rank == 0 and (step % READ_BACK == 0 or "separation" in metrics or step == settings.steps):
            job.tell(list(unsent))
            unsent.clear()

    stop = _Stop(job, rank, world, device)
    result = fit(
        job.config.model,
        settings,
        sampler,
        device=device,
        start_state=state,
        validation=validation,
        on_step=on_step,
        on_checkpoint=lambda state, metrics: _report(state, metrics, curve),
        stop=stop,
    )
    if rank == 0 and not stop.stopping:
        if curve[-1]["step"] < settings.steps:
            job.tell(f"separation is best at step {result.best_step}: ended at step {curve[-1]['step']:.0f}")
        _store(job, result, curve, drift, arithmetic(device, settings.precision))


@dataclass
class _Stop:
    """Whether to stop: worker 0 asks the driver now and then, and tells the others after every step."""

    job: _Job
    rank: int
    world: int
    device: torch.device
    stopping: bool = False
    asked: float = field(default_factory=time.monotonic)

    def __call__(self) -> bool:
        if self.rank == 0 and time.monotonic() - self.asked > _ASK_EVERY_S:
            self.asked, self.stopping = time.monotonic(), self.job.is_to_stop()
        if self.world > 1:
            flag = torch.tensor([int(self.stopping)], device=self.device)
            dist.broadcast(flag, 0)
            self.stopping = bool(flag.item())
        return self.stopping


def _start(job: _Job) -> tuple[Encoder, artefact.Card]:
    """The model to go on from; `models.check_start` has seen that it is of the right architecture."""
    folder = f"models/{job.config.train.start}"
    try:
        return artefact.load(lambda name: job.workspace.read_bytes(f"{folder}/{name}"))
    except ModelError as error:
        raise ModelError(f"{job.workspace.url(folder)}: {error}") from None


def _drift(
    job: _Job,
    start: tuple[Encoder, artefact.Card],
    validation: Sequences | None,
    device: torch.device,
) -> dict[str, Any]:
    """How well the model to go on from separates unseen sources: on its own data then, on this data now."""
    encoder, card = start
    precision = job.config.train.precision
    before = None if validation is None else separation(encoder.to(device), validation, device, precision)
    encoder.cpu()
    return {
        "start": job.config.train.start,
        "start_data_from": card.data_from,
        "start_data_to": card.data_to,
        "periods": sorted({file.key["period"] for file in job.files}),
        "sequences": 0 if validation is None else len(validation),
        "sources": 0 if validation is None else len(np.unique(validation.src)),
        "then": card.metrics.get("separation"),
        "before": before,
        "same_split": card.training.get("split") == job.config.split.model_dump(mode="json"),
    }


def _resume() -> tuple[TrainState | None, list[Metrics]]:
    checkpoint = ray_train.get_checkpoint()
    if checkpoint is None:
        return None, []
    with checkpoint.as_directory() as folder:
        state = TrainState.from_bytes((Path(folder) / _STATE).read_bytes())
        try:
            curve: list[Metrics] = json.loads((Path(folder) / _METRICS).read_text())
        except ValueError as error:
            raise ModelError(f"the checkpoint's curve is damaged ({error}); train with --fresh") from None
    return state, curve


def _report(state: TrainState | None, metrics: Metrics, curve: list[Metrics]) -> None:
    """Every worker reports; process 0 brings the checkpoint."""
    if state is None:
        ray_train.report(metrics)
        return
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / _STATE).write_bytes(state.to_bytes())
        (Path(folder) / _METRICS).write_text(json.dumps(curve))
        ray_train.report(metrics, checkpoint=Checkpoint.from_directory(folder))


def _store(
    job: _Job, result: FitResult, curve: list[Metrics], drift: dict[str, Any] | None, computed_in: str
) -> None:
    folder = f"models/{job.name}"
    sink = pa.BufferOutputStream()
    pq.write_table(curve_table(curve), sink)
    job.workspace.write_bytes(f"{folder}/metrics.parquet", sink.getvalue().to_pybytes())
    last = curve[-1]
    metrics = {"loss": last["loss"], "steps": last["step"], "best_step": float(result.best_step)}
    if result.separation is not None:
        metrics["separation"] = result.separation
    if drift is not None:
        job.workspace.write_json(f"{folder}/{_DRIFT}", {**drift, "after": result.separation})
        if drift["before"] is not None:
            metrics["separation of the model it began with"] = drift["before"]
    artefact.save(
        lambda name, data: job.workspace.write_bytes(f"{folder}/{name}", data),
        result.encoder,
        model_card(
            job.workspace,
            job.config,
            job.name,
            job.files,
            metrics,
            {**job.config.train.model_dump(mode="json"), "computed_in": computed_in},
        ),
    )


def curve_table(curve: list[Metrics]) -> pa.Table:
    """A row per step; `separation` is null where nothing was validated."""
    columns = {name: None for row in curve for name in row} | {"separation": None}
    return pa.table(
        {
            name: pa.array([row.get(name) for row in curve], pa.int64() if name == "step" else pa.float64())
            for name in columns
        }
    )


def model_card(
    workspace: Workspace,
    config: RunConfig,
    name: str,
    files: list[File],
    metrics: dict[str, float],
    training: dict[str, Any],
) -> artefact.Card:
    """What there is to say of a model that has learnt from these sequence files, with these settings."""
    span = workspace.table("sequences").read_files(files, ("start", "end"))
    hidden = ("Addresses are pseudonyms: the model fits flows made with the same key alone.",)
    return artefact.Card(
        name=name,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        data_from=pc.min(span["start"]).as_py().isoformat(),
        data_to=pc.max(span["end"]).as_py().isoformat(),
        prefixes=tuple(map(str, config.captures.telescope)) or _prefixes(workspace, files),
        sensors=_sensors(workspace, {str(file.key["period"]) for file in files}),
        sequence_length=config.sequences.length,
        min_length=config.sequences.min_length,
        training={
            **training,
            "split": config.split.model_dump(mode="json"),
            "sequences": span.num_rows,
            "data_version": planning.data_version(files),
        },
        metrics=metrics,
        limits=() if workspace.addresses == "raw" else hidden,
    )


def _sensors(workspace: Workspace, periods: set[str]) -> tuple[str, ...]:
    """Names of the telescopes that recorded these periods, read a file at a time."""
    flows = workspace.table("flows")
    found: set[str | None] = set()
    for file in flows.files():
        if file.key["period"] in periods:
            found |= set(pc.unique(flows.read_files([file], ("sensor",))["sensor"]).to_pylist())
    return tuple(sorted(name for name in found if name))


def _prefixes(workspace: Workspace, files: Iterable[File]) -> tuple[str, ...]:
    """Prefixes of the destinations in the training data, read a file at a time."""
    networks = np.zeros(0, np.int64)
    for file in files:
        seen = pc.list_flatten(workspace.table("sequences").read_files([file], ("dst",))["dst"])
        seen = pc.unique(seen.drop_null()).to_numpy().astype(np.int64)
        networks = np.union1d(networks, seen[seen >= 0] >> 8)
    return artefact.covering_prefixes(networks)
