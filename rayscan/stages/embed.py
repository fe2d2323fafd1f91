"""Sequences to embeddings: Ray Data maps actors that hold the model over the buckets.

An actor reads one bucket's sequences, embeds them and writes the vectors in the same order; only file
descriptions travel. There are always fewer actors than CPUs, since Ray Data hangs otherwise (docs/ray.md).
"""

from __future__ import annotations

import json
import logging
import warnings
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import ray
import torch

from rayscan import schema
from rayscan.config import RunConfig
from rayscan.errors import ModelError, RayscanError
from rayscan.model import artefact
from rayscan.model.embed import embed
from rayscan.model.features import Sequences, columns_for
from rayscan.planning import Model, Unit
from rayscan.progress import track
from rayscan.stages.commits import PeriodCommits
from rayscan.stages.session import cluster_cpus, share_of_cores, single_machine
from rayscan.tables import CommitInfo, File, Workspace


@dataclass
class Counts:
    units: int = 0
    embeddings: int = 0


def run(workspace: Workspace, config: RunConfig, model: Model, due: list[Unit], info: CommitInfo) -> Counts:
    """Embed the sequences of every unit that is due and commit them, period by period."""
    counts = Counts()
    commits = PeriodCommits(workspace, "embeddings", due, info)
    with track("embed", len(due), "buckets") as advance:
        for row in _results(workspace, config, model, due).iter_rows():
            if row["error"]:
                raise ModelError(row["error"])
            made = json.loads(row["file"])
            file = _file(made) if made else None
            commits.add(due[row["unit"]], [file])
            counts.units += 1
            counts.embeddings += file.rows if file else 0
            advance(1, f"{counts.embeddings:,} sequences")
    return counts


def _results(workspace: Workspace, config: RunConfig, model: Model, due: list[Unit]) -> ray.data.Dataset:
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    resources = config.resources
    actors = max(1, min(config.embed.workers, len(due), cluster_cpus() - 1))
    items = [{"unit": number, "made": json.dumps(asdict(unit))} for number, unit in enumerate(due)]
    # A lost machine's actors start again elsewhere; with one machine there is no elsewhere, and Ray would
    # warn in every run that restarts may fail. The only way to say so is one that 2.60 calls deprecated.
    more: dict[str, Any] = {"max_restarts": 0} if single_machine() else {}
    if resources.embed_memory_mb:
        more["memory"] = resources.embed_memory_mb * 2**20
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return ray.data.from_items(items, override_num_blocks=len(items)).map_batches(
            _Embedder,
            fn_constructor_kwargs={
                "workspace": workspace,
                "model": model,
                "batch_tokens": config.embed.batch_tokens,
                "device": config.embed.device,
                "threads": share_of_cores(config.embed.threads, actors, resources.embed_cpus),
            },
            batch_size=1,
            num_cpus=resources.embed_cpus,
            num_gpus=resources.embed_gpus,
            compute=ray.data.ActorPoolStrategy(min_size=1, max_size=actors),
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
        threads: int,
    ) -> None:
        torch.set_num_threads(threads)
        self.workspace, self.model, self.batch_tokens = workspace, model, batch_tokens
        self.device = torch.device(
            ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
        )
        encoder, _ = artefact.load(lambda name: workspace.read_bytes(f"{model.folder}/{name}"))
        self.encoder = encoder.to(self.device)

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
        vectors = embed(self.encoder, Sequences.from_table(table, inputs), self.batch_tokens, self.device)
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
