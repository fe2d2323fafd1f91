"""Sequences to embeddings: Ray Data maps actors that hold the model over the buckets.

An actor reads one bucket's sequences, embeds them and writes the vectors in the same order; only file
descriptions travel. Of a local Ray's CPUs actors never take the last one (docs/ray.md).

A bucket that fails costs its period, and no other. An actor that dies takes Ray Data's whole pass with it,
and nobody says at which bucket: those that are left then go one by one, each in a process of its own.
"""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import ray
import torch
from ray.exceptions import RayError

from rayscan import schema
from rayscan.config import Precision, RunConfig
from rayscan.errors import DataError, ModelError, RayscanError, TaskDied
from rayscan.model import artefact
from rayscan.model.embed import device_of, embed
from rayscan.model.features import Sequences, columns_for
from rayscan.planning import Model, Unit
from rayscan.progress import say, track
from rayscan.stages.commits import PeriodCommits
from rayscan.stages.session import (
    RETRIES,
    check_room,
    cluster_cpus,
    explained,
    gpus_each,
    is_local,
    run_tasks,
    share_of_cores,
)
from rayscan.tables import CommitInfo, File, Workspace


@dataclass
class Counts:
    units: int = 0
    embeddings: int = 0


def run(workspace: Workspace, config: RunConfig, model: Model, due: list[Unit], info: CommitInfo) -> Counts:
    """Embed the sequences of every unit that is due and commit them, period by period.

    A bucket that fails keeps its period from being committed, and no other. Raises DataError in the end.
    """
    counts = Counts()
    commits = PeriodCommits(workspace, "embeddings", due, info)
    failures: list[str] = []
    with track("embed", len(due), "buckets") as advance:
        for unit, made in _made(workspace, config, model, due):
            if isinstance(made, RayscanError):
                failures.append(f"{unit.name}: {made}")
                say(f"embed: {failures[-1]}")
                advance(1, "")
                continue
            commits.add(unit, [made])
            counts.units += 1
            counts.embeddings += made.rows if made else 0
            advance(1, f"{counts.embeddings:,} sequences")
    if failures:
        raise DataError(f"{len(failures)} of {len(due)} buckets failed, the others are done. {failures[0]}")
    return counts


def _made(
    workspace: Workspace, config: RunConfig, model: Model, due: list[Unit]
) -> Iterator[tuple[Unit, File | RayscanError | None]]:
    """Each unit with the file of its vectors, None where there are none, or why it failed."""
    resources = config.resources
    actors = _actors(config, len(due))
    gpus = gpus_each(config.embed.device, resources.embed_gpus, actors)
    check_room(resources.embed_cpus, gpus, memory_mb=resources.embed_memory_mb)
    make: dict[str, Any] = {
        "workspace": workspace,
        "model": model,
        "batch_tokens": config.embed.batch_tokens,
        "device": config.embed.device if gpus else "cpu",
        "precision": config.embed.precision,
        "compile": config.embed.compile,
        "threads": share_of_cores(config.embed.threads, actors, resources.embed_cpus),
    }
    left = dict(enumerate(due))
    try:
        for row in _pass(config, make, due, actors, gpus).iter_rows():
            made = json.loads(row["file"])
            unit = left.pop(row["unit"])
            yield unit, ModelError(row["error"]) if row["error"] else made and _file(made)
        return
    except RayError as error:
        died = explained(error)
        if not isinstance(died, TaskDied):
            raise died or error from None
    say(f"embed: an actor died; {len(left)} buckets that are left go one by one")

    def work(unit: Unit) -> File | None:
        return _Embedder(**make).embed(unit)

    yield from run_tasks(
        work,
        list(left.values()),
        cpus=resources.embed_cpus,
        gpus=gpus,
        memory_mb=resources.embed_memory_mb,
        failed=lambda _, error: error,
        fresh=True,
        at_most=actors,
    )


def _actors(config: RunConfig, buckets: int) -> int:
    """As many as asked for, on a cluster that may have to grow for them; a local Ray keeps a CPU free."""
    asked = min(config.embed.workers, buckets)
    return max(1, min(asked, cluster_cpus() - 1)) if is_local() else asked


def _pass(
    config: RunConfig, make: dict[str, Any], due: list[Unit], actors: int, gpus: float
) -> ray.data.Dataset:
    """Ray Data's pass over the buckets: a row for each, with the file or the error as text."""
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)  # of deaths `run` tells
    resources = config.resources
    items = [{"unit": number, "made": json.dumps(asdict(unit))} for number, unit in enumerate(due)]
    # A lost machine's actors start again elsewhere, a few times: Ray Data's own number is without end. With
    # one machine there is no elsewhere, and Ray would warn in every run that restarts may fail. The only way
    # to say so is one that 2.60 calls deprecated.
    again = 0 if is_local() else RETRIES
    more: dict[str, Any] = {"max_restarts": again, "max_task_retries": again}
    if resources.embed_memory_mb:
        more["memory"] = resources.embed_memory_mb * 2**20
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return ray.data.from_items(items, override_num_blocks=len(items)).map_batches(
            _Embedder,
            fn_constructor_kwargs=make,
            batch_size=1,
            num_cpus=resources.embed_cpus,
            num_gpus=gpus,
            # All are asked for at once where Ray starts machines for those that wait.
            compute=ray.data.ActorPoolStrategy(min_size=1 if is_local() else actors, max_size=actors),
            **more,
        )


class _Embedder:
    """Holds the model in an actor."""

    def __init__(
        self,
        workspace: Workspace,
        model: Model,
        batch_tokens: int,
        device: str,
        precision: Precision,
        compile: bool,
        threads: int,
    ) -> None:
        torch.set_num_threads(threads)
        self.workspace, self.model, self.batch_tokens = workspace, model, batch_tokens
        self.precision = precision
        self.device = device_of(device)
        encoder, _ = artefact.load(lambda name: workspace.read_bytes(f"{model.folder}/{name}"))
        self.encoder = encoder.to(self.device)
        if compile:
            self.encoder.compile_layers()

    def __call__(self, batch: dict[str, np.ndarray[Any, Any]]) -> dict[str, list[Any]]:
        number = int(batch["unit"][0])
        try:
            file = self.embed(_unit(batch["made"][0]))
            return {"unit": [number], "file": [json.dumps(file and asdict(file))], "error": [""]}
        except RayscanError as error:
            return {"unit": [number], "file": ["null"], "error": [str(error)]}

    def embed(self, unit: Unit) -> File | None:
        """Embed and write one bucket. None if it has no sequences any more."""
        if not unit.files:
            return None
        inputs = self.encoder.config.inputs
        table = self.workspace.table("sequences").read_files(unit.files, columns_for(inputs))
        sequences = Sequences.from_table(table, inputs)
        vectors = embed(self.encoder, sequences, self.batch_tokens, self.device, self.precision)
        return self.workspace.table("embeddings").write(as_table(table, vectors), unit.key)


def as_table(sequences: pa.Table, vectors: np.ndarray[Any, Any]) -> pa.Table:
    """Rows of the embeddings table: float32 (N, d) for N sequences."""
    offsets = np.arange(len(vectors) + 1, dtype=np.int64) * vectors.shape[1]
    if offsets[-1] >= 2**31:
        raise ModelError("more than 2^31 numbers in one bucket's embeddings; raise ingest.n_buckets")
    values = pa.array(vectors.reshape(-1))
    column = pa.ListArray.from_arrays(pa.array(offsets.astype(np.int32)), values)
    names = [name for name in schema.EMBEDDINGS.names if name != "vector"]
    return sequences.select(names).append_column(schema.EMBEDDINGS.field("vector"), column)


def _unit(text: str) -> Unit:
    data = json.loads(text)
    return Unit(**{**data, "files": tuple(_file(file) for file in data["files"])})


def _file(data: dict[str, Any]) -> File:
    return File(**{**data, "partition": tuple(tuple(pair) for pair in data["partition"])})
