"""Methods of others on the workspace's own sequences: one Ray task for each method and seed.

Every task holds all sequences of the periods that are compared: the methods are made so (`methods.method`).
It has a process of its own, so that the most memory that the process had is what the method took. A result
is written when it is there and not computed again until sequences, labels, split or settings change.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from rayscan import planning
from rayscan.captures.scanners import Scanners
from rayscan.config import RunConfig, digest
from rayscan.errors import RayscanError
from rayscan.methods import compare, own
from rayscan.methods.compare import Rated
from rayscan.methods.method import ABSENT, ONE_VECTOR_A_SOURCE, Embedded, positions
from rayscan.planning import Model, run_file, sequence_files, settled, version_of
from rayscan.progress import say, track
from rayscan.report.comparison import comparison_page
from rayscan.stages.lists import label_lists, relabelled
from rayscan.stages.session import check_room, run_tasks
from rayscan.stages.similarity import vectors_of
from rayscan.tables import File, Workspace, fingerprint

PAGE = "compare/comparison.html"
"""Of the last comparison of a run."""


class _Job(NamedTuple):
    """A method to rate with a seed; or the vectors that a model of the workspace has made."""

    method: str
    seed: int
    transductive: bool = False
    embeddings: tuple[File, ...] = ()
    of_sources: bool = False  # that model has one vector a source

    @property
    def name(self) -> str:
        return f"{self.method}{'-transductive' * self.transductive}-{self.seed}"


def run(
    workspace: Workspace,
    config: RunConfig,
    model: Model | None,
    methods: Sequence[str],
    periods: Sequence[str] = (),
    seeds: int = 1,
    transductive: bool = False,
) -> list[Rated]:
    """Rate the methods that have not been rated yet; returns what is known of each and each seed.

    With a model, its embeddings are rated too, as "model ID". `transductive` rates methods with one vector a
    source a second time, as their authors do. Raises DataError where there are no sequences in these periods.
    """
    check_room(config.resources.train_cpus, 0)
    files = sequence_files(workspace, periods)
    config = settled(workspace, config, files)
    jobs = _jobs(workspace, config, model, methods, periods, seeds, transductive)
    asked = planning.scanner_version(workspace, config) if config.evaluate.labels != "capture" else ""
    made_from = {job: _made_from(config, job, files, asked) for job in jobs}
    paths = {job: _path(config, job, periods) for job in jobs}
    due = [job for job in jobs if version_of(workspace, paths[job]) != made_from[job]]
    failed: dict[_Job, Rated] = {}

    def work(job: _Job, known: Scanners | None = None) -> Rated:
        return _rate(workspace, config, job, files, known)

    with track("compare", len(due), "methods and seeds") as advance:
        tasks = run_tasks(
            work,
            due,
            cpus=config.resources.train_cpus,
            shared=label_lists(workspace, config) if due else None,
            failed=_failed,
            fresh=True,
        )
        for job, rated in tasks:
            if "failed" in rated:
                failed[job] = rated
                say(f"compare: {compare.title(rated)}, seed {job.seed}, failed: {rated['failed']}")
            else:
                workspace.write_json(paths[job], {"made_from": made_from[job], **rated})
            advance(1, f"{compare.title(rated)}, seed {job.seed}")
    found = [failed.get(job) or workspace.read_json(paths[job]) or {} for job in jobs]
    rows = compare.as_rows(found)
    page = comparison_page(rows, found, list(compare.COLUMNS), config.run)
    workspace.write_bytes(run_file(config, PAGE), page.encode())
    facts = {
        "made_from": f"{fingerprint(sorted(made_from.values())):016x}",
        "made": datetime.now(UTC).isoformat(timespec="seconds"),
        "page": PAGE,
        "headings": list(compare.COLUMNS),
        "rows": rows,
    }
    workspace.write_json(run_file(config, planning.COMPARISON), facts)
    return found


def _failed(job: _Job, error: RayscanError) -> Rated:
    """In place of figures, and not kept: the next comparison tries again."""
    facts = {"method": job.method, "seed": job.seed, "transductive": job.transductive}
    return {**facts, "failed": str(error)}


def _jobs(
    workspace: Workspace,
    config: RunConfig,
    model: Model | None,
    methods: Sequence[str],
    periods: Sequence[str],
    seeds: int,
    transductive: bool,
) -> list[_Job]:
    jobs = [_Job(name, seed) for name in methods for seed in range(seeds)]
    if transductive:
        jobs += [_Job(*job[:2], True) for job in jobs if job.method in ONE_VECTOR_A_SOURCE]
    if model is not None:
        embeddings = workspace.table("embeddings").files({"model": model.id})
        embeddings = [file for file in embeddings if not periods or file.key["period"] in periods]
        if embeddings:
            of_sources = model.method in ONE_VECTOR_A_SOURCE
            jobs.append(_Job(f"model {model.id}", config.train.seed, False, tuple(embeddings), of_sources))
    return jobs


def _rate(
    workspace: Workspace, config: RunConfig, job: _Job, files: list[File], known: Scanners | None
) -> Rated:
    table = workspace.table("sequences")
    tables = [
        relabelled(table.read_files([file for file in files if file.key["period"] == period]), known)
        for period in sorted({file.key["period"] for file in files})
    ]
    if job.embeddings:
        sequences = pa.concat_tables(tables)
        found = _embedded(workspace, job.embeddings, sequences)
        rated = compare.rated(sequences, found, config.split, config.evaluate, job.of_sources)
        return {"method": job.method, "seed": job.seed, **rated}
    return compare.rate(job.method, tables, job.seed, config, transductive=job.transductive)


def _path(config: RunConfig, job: _Job, periods: Sequence[str]) -> str:
    """Where a result is kept: those of different periods side by side."""
    of = f"-{digest(*sorted(periods))}" if periods else ""
    return run_file(config, f"compare/{job.name.replace(' ', '-')}{of}.json")


def _made_from(config: RunConfig, job: _Job, sequences: list[File], asked: str) -> str:
    settings = digest(compare.VERSION, config.split, config.evaluate, asked, job.name)
    if job.method == own.NAME:
        settings = digest(settings, config.model, config.train)
    made_of = sorted(file.path for file in (*sequences, *job.embeddings))
    return f"{fingerprint(settings, made_of):x}"


def _embedded(workspace: Workspace, embeddings: Sequence[File], sequences: pa.Table) -> Embedded:
    """A model's vectors in the order of the sequences; those that are not embedded are not covered."""
    table = workspace.table("embeddings").read_files(list(embeddings), ("sequence_id", "vector"))
    vectors, ids = vectors_of(table), table["sequence_id"].to_numpy()
    order = np.argsort(ids)
    place = positions(ids[order], sequences["sequence_id"].to_numpy())
    found = np.zeros((len(place), vectors.shape[1]), np.float32)
    known = place != ABSENT
    found[known] = vectors[order[place[known]]]
    return Embedded.of(found)
