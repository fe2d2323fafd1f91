"""Training on Ray Train: one to many workers, killed and resumed, with the loop of `model.fit`.

Every worker reads the sequence files by itself (Ray Data's dataset shards starved and were far slower:
docs/ray.md). Checkpoints go to the workspace's storage; a worker that dies, or a run that is started again,
goes on from the last one. Process 0 writes the finished artefact, whose last file makes it exist.
"""

from __future__ import annotations

import json
import logging
import tempfile
import threading
from collections import defaultdict
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.fs as pafs
import pyarrow.parquet as pq
import torch
from ray import train as ray_train
from ray.train import Checkpoint, CheckpointConfig, FailureConfig, ScalingConfig
from ray.train import RunConfig as RayRunConfig
from ray.train.torch import TorchConfig, TorchTrainer
from ray.util.queue import Empty, Queue

from rayscan import planning
from rayscan.config import RunConfig
from rayscan.errors import DataError, RayscanError
from rayscan.model import artefact
from rayscan.model.features import Sequences, columns_for
from rayscan.model.fit import FitResult, Metrics, TrainState, fit
from rayscan.model.sampling import PairSampler, validation_sample
from rayscan.progress import say, track
from rayscan.stages.session import share_of_cores
from rayscan.tables import File, Workspace

_STATE, _METRICS = "state.safetensors", "metrics.json"


@dataclass
class Counts:
    steps: int
    loss: float
    separation: float | None
    best_step: int


def run(workspace: Workspace, config: RunConfig, fresh: bool) -> Counts:
    """Train the model that the settings ask for and store it. `fresh` forgets one that is there already."""
    name = planning.model_id(config)
    if fresh:
        workspace.delete(f"models/{name}")
        workspace.delete(f"training/{name}")
    files = planning.training_files(workspace, config)
    queue = Queue(actor_options={"num_cpus": 0})
    trainer = _trainer(workspace, config, name, _Job(workspace, config, name, files, queue))
    try:
        _fit_with_progress(trainer, queue, config.train.steps)
    finally:
        queue.shutdown(force=True)
    workspace.delete(f"training/{name}")  # the checkpoints; the artefact is in models/
    model = planning.find_model(workspace, config)
    if model is None:
        raise DataError("training ended without a model; run it again to go on from the last checkpoint")
    metrics = model.card["metrics"]
    return Counts(config.train.steps, metrics["loss"], metrics.get("separation"), int(metrics["best_step"]))


@dataclass(frozen=True)
class _Job:
    """What every worker is told."""

    workspace: Workspace
    config: RunConfig
    name: str
    files: list[File]
    queue: Any


def _trainer(workspace: Workspace, config: RunConfig, name: str, job: _Job) -> TorchTrainer:
    settings, resources = config.train, config.resources
    use_gpu = settings.device == "cuda" or resources.train_gpus > 0
    fs, path = workspace.location("training")
    if isinstance(fs, pafs.LocalFileSystem):
        Path(path).mkdir(parents=True, exist_ok=True)
    threads = share_of_cores(settings.threads, settings.workers, resources.train_cpus)
    per_worker = {"CPU": resources.train_cpus}
    if use_gpu:
        per_worker["GPU"] = resources.train_gpus or 1
    return TorchTrainer(
        _worker,
        train_loop_config={"job": job, "threads": threads},
        scaling_config=ScalingConfig(
            num_workers=settings.workers, use_gpu=use_gpu, resources_per_worker=per_worker
        ),
        torch_config=TorchConfig(backend="nccl" if use_gpu else "gloo", timeout_s=300),
        run_config=RayRunConfig(
            name=name,
            storage_path=path,
            storage_filesystem=fs,
            failure_config=FailureConfig(max_failures=settings.max_failures),
            checkpoint_config=CheckpointConfig(num_to_keep=2),
        ),
    )


def _fit_with_progress(trainer: TorchTrainer, queue: Queue, steps: int) -> None:
    """Run the trainer in a thread, and show what its first worker reports meanwhile."""
    logging.getLogger("ray.train").setLevel(logging.ERROR)
    failure: list[BaseException] = []

    def target() -> None:
        try:
            trainer.fit()
        except BaseException as error:
            failure.append(error)

    thread = threading.Thread(target=target, name="rayscan-train", daemon=True)
    thread.start()
    with track("train", steps, "steps") as advance:
        done = 0
        while thread.is_alive():
            try:
                note = queue.get(timeout=0.5)
            except Empty:
                continue
            if isinstance(note, str):
                say(f"train: {note}")
            else:
                advance(note["step"] - done, _describe(note))
                done = note["step"]
    thread.join()
    if failure:
        raise _cause(failure[0])


def _describe(metrics: Metrics) -> str:
    text = f"loss {metrics['loss']:.3f}, {metrics['sequences_per_s']:,.0f} sequences/s"
    if "separation" in metrics:
        text += f", separation {metrics['separation']:.4f}"
    return text


def _cause(error: BaseException) -> BaseException:
    """The RayscanError that a worker ended with, if that is what happened."""
    for worker_error in getattr(error, "worker_failures", {}).values():
        cause = getattr(worker_error, "cause", worker_error)
        if isinstance(cause, RayscanError):
            return cause
    return error


# ---------------------------------------------------------------------------------------------
# In the workers
# ---------------------------------------------------------------------------------------------


def _worker(settings: dict[str, Any]) -> None:
    job: _Job = settings["job"]
    torch.set_num_threads(settings["threads"])
    context = ray_train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    buckets = _by_bucket(job.files)
    load = _loader(job, buckets)
    sampler = PairSampler(tuple(buckets), load, job.config.split, job.config.train, rank, world)
    validation = None
    if rank == 0:
        validation = validation_sample(tuple(buckets), load, job.config.split)
        if validation is None:
            job.queue.put("no validation: fewer than two validation sources have two sequences")
    state, curve = _resume()
    if state is not None and rank == 0:
        job.queue.put(f"going on from step {state.step}")

    def on_step(metrics: Metrics) -> None:
        curve.append(metrics)
        if rank == 0 and (metrics["step"] % 10 == 0 or "separation" in metrics):
            job.queue.put(metrics)

    result = fit(
        job.config.model,
        job.config.train,
        sampler,
        device=ray_train.torch.get_device(),
        start_state=state,
        validation=validation,
        on_step=on_step,
        on_checkpoint=lambda state, metrics: _report(state, metrics, curve),
    )
    if rank == 0:
        _store(job, result, curve)


def _by_bucket(files: list[File]) -> dict[str, list[File]]:
    """All periods of a bucket stand under one key, so that pairs are drawn across periods too."""
    buckets: dict[str, list[File]] = defaultdict(list)
    for file in files:
        buckets[file.key["bucket"]].append(file)
    return dict(buckets)


def _loader(job: _Job, buckets: dict[str, list[File]]) -> Any:
    inputs = job.config.model.inputs

    def load(bucket: Any) -> Sequences:
        table = job.workspace.table("sequences").read_files(buckets[bucket], columns_for(inputs))
        return Sequences.from_table(table, inputs)

    return load


def _resume() -> tuple[TrainState | None, list[Metrics]]:
    checkpoint = ray_train.get_checkpoint()
    if checkpoint is None:
        return None, []
    with checkpoint.as_directory() as folder:
        state = TrainState.from_bytes((Path(folder) / _STATE).read_bytes())
        curve: list[Metrics] = json.loads((Path(folder) / _METRICS).read_text())
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


def _store(job: _Job, result: FitResult, curve: list[Metrics]) -> None:
    folder = f"models/{job.name}"
    columns = ("step", "loss", "learning_rate", "gradient_norm", "sequences_per_s", "separation")
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({name: [m.get(name) for m in curve] for name in columns}), sink)
    job.workspace.write_bytes(f"{folder}/metrics.parquet", sink.getvalue().to_pybytes())
    metrics = {"loss": curve[-1]["loss"], "best_step": float(result.best_step)}
    if result.separation is not None:
        metrics["separation"] = result.separation
    artefact.save(
        lambda name, data: job.workspace.write_bytes(f"{folder}/{name}", data),
        result.encoder,
        _card(job, metrics),
    )


def _card(job: _Job, metrics: dict[str, float]) -> artefact.Card:
    span = job.workspace.table("sequences").read_files(job.files, ("start", "end"))
    flows = job.workspace.table("flows").read(columns=("sensor",))
    sensors = [s for s in pc.unique(flows["sensor"]).to_pylist() if s]
    return artefact.Card(
        name=job.name,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        data_from=pc.min(span["start"]).as_py().isoformat(),
        data_to=pc.max(span["end"]).as_py().isoformat(),
        sensors=tuple(sorted(sensors)),
        sequence_length=job.config.sequences.length,
        min_length=job.config.sequences.min_length,
        training={
            **job.config.train.model_dump(mode="json"),
            "sequences": span.num_rows,
            "data_version": planning.data_version(job.files),
        },
        metrics=metrics,
    )
