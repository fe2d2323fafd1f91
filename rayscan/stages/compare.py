"""Other published methods on the workspace's own sequences: one Ray task for each method and seed.

Every task holds all sequences of the periods that are compared: the methods are made so (`methods.method`).
A result is written when it is there and not computed again until sequences, split or settings change.
"""

from __future__ import annotations

import resource
from collections.abc import Sequence

import numpy as np
import pyarrow as pa

from rayscan.config import RunConfig, digest
from rayscan.errors import DataError
from rayscan.methods import compare
from rayscan.methods.compare import Rated
from rayscan.methods.method import Embedded
from rayscan.planning import Model, run_file, version_of
from rayscan.progress import say, track
from rayscan.stages.session import run_tasks
from rayscan.stages.similarity import vectors_of
from rayscan.tables import File, Workspace, fingerprint

Job = tuple[str, int]
OURS = "rayscan"


def run(
    workspace: Workspace,
    config: RunConfig,
    model: Model | None,
    methods: Sequence[str],
    periods: Sequence[str],
    seeds: int,
) -> list[Rated]:
    """Rate the methods that have not been rated yet; returns what is known of each and each seed.

    With a model, its embeddings are rated too, under the name of "rayscan". Raises DataError where there are
    no sequences in these periods.
    """
    files = _files(workspace, "sequences", {}, periods)
    if not files:
        raise DataError(f"no sequences {_in(periods)}; run `rayscan sequences` first")
    embeddings = _files(workspace, "embeddings", {"model": model.id}, periods) if model else []
    if not embeddings:
        say("compare: rayscan's own embeddings are not there; run `rayscan embed` to have them in the table")
    jobs = [(name, seed) for name in methods for seed in range(seeds)]
    jobs = [(OURS, config.train.seed)] * bool(embeddings) + jobs
    made_from = {job: _made_from(config, job, files, embeddings) for job in jobs}
    due = [job for job in jobs if version_of(workspace, _path(config, job)) != made_from[job]]
    split, settings = config.split, config.evaluate

    def work(job: Job) -> Rated:
        name, seed = job
        sequences = workspace.table("sequences").read_files(files)
        if name == OURS:
            found = _ours(workspace, embeddings, sequences)
            rated = compare.rated(name, sequences, found, split, settings)
            return {"method": name, "seed": seed, **rated}
        rated = compare.rate(name, sequences, seed, split, settings)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
        return {**rated, "memory_mb": peak}

    with track("compare", len(due), "methods and seeds") as advance:
        for job, rated in run_tasks(work, due, cpus=config.resources.train_cpus):
            workspace.write_json(_path(config, job), {"made_from": made_from[job], **rated})
            advance(1, f"{job[0]}, seed {job[1]}")
    return [workspace.read_json(_path(config, job)) or {} for job in jobs]


def _files(workspace: Workspace, table: str, where: dict[str, str], periods: Sequence[str]) -> list[File]:
    files = workspace.table(table).files(where)
    return [file for file in files if not periods or file.key["period"] in periods]


def _in(periods: Sequence[str]) -> str:
    return f"in {', '.join(periods)}" if periods else "in this workspace"


def _path(config: RunConfig, job: Job) -> str:
    return run_file(config, f"compare/{job[0]}-{job[1]}.json")


def _made_from(config: RunConfig, job: Job, sequences: list[File], embeddings: list[File]) -> str:
    made_of = sequences + (embeddings if job[0] == OURS else [])
    settings = digest(config.split, config.evaluate, job[0], job[1])
    return f"{fingerprint(settings, sorted(file.path for file in made_of)):x}"


def _ours(workspace: Workspace, embeddings: list[File], sequences: pa.Table) -> Embedded:
    """The model's vectors in the order of the sequences; those that are not embedded are not covered."""
    table = workspace.table("embeddings").read_files(embeddings, ("sequence_id", "vector"))
    ids, wanted = table["sequence_id"].to_numpy(), sequences["sequence_id"].to_numpy()
    vectors, order = vectors_of(table), np.argsort(ids)
    place = order[np.minimum(np.searchsorted(ids, wanted, sorter=order), len(ids) - 1)]
    covered = ids[place] == wanted
    found = np.where(covered[:, None], vectors[place], np.float32(0))
    return Embedded(found, covered, np.zeros_like(covered))
