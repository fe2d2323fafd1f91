"""Clusters to campaigns: each period's clusters are described, then matched to the campaigns before them.

A task describes one period and adds up its clusters' vectors; matching needs only these sums and goes through
the periods in time order on the driver. A campaign that is gone stays on the table for a few periods
(`campaigns.remember`), so that one that pauses comes back under its old name.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from rayscan import planning, schema
from rayscan.captures.scanners import Scanners
from rayscan.clustering.campaigns import Campaigns, Step, follow
from rayscan.clustering.objective import cluster_sums
from rayscan.config import RunConfig
from rayscan.planning import Model, Unit
from rayscan.progress import track
from rayscan.report.summary import summarise
from rayscan.stages import metrics
from rayscan.stages.cluster import find_threshold
from rayscan.stages.commits import PeriodCommits
from rayscan.stages.lists import scanners
from rayscan.stages.session import run_tasks
from rayscan.stages.similarity import vectors_of
from rayscan.tables import CommitInfo, File, Workspace

_NOTHING = {"sequences": 0, "sources": 0, "networks": 0, "flows": 0, "labelled": 0}


@dataclass
class Counts:
    periods: int = 0
    born: int = 0
    continued: int = 0
    split: int = 0
    merged: int = 0
    gone: int = 0


@dataclass(frozen=True)
class _Period:
    """A due period and the files it is described from."""

    unit: Unit
    sequences: tuple[File, ...]
    embeddings: tuple[File, ...]


@dataclass(frozen=True)
class _Described:
    """Clusters 0 to K - 1 of a period: contents, ids of their earliest sequences, feature sums, sizes."""

    summary: pa.Table
    keys: NDArray[np.int64]
    sums: NDArray[np.float64]
    sizes: NDArray[np.float64]


def run(workspace: Workspace, config: RunConfig, model: Model, due: list[Unit], info: CommitInfo) -> Counts:
    """Follow the clusters of every period that is due, in time order, and commit period by period."""
    table = workspace.table("campaigns")
    commits = PeriodCommits(workspace, "campaigns", due, info)
    threshold, _ = find_threshold(workspace, config, model)
    before = _rows_before(workspace, config, due[0])
    counts = Counts()
    periods = [_files(workspace, model, unit) for unit in due]

    def work(period: _Period, known: Scanners | None = None) -> _Described:
        return _describe(workspace, period, known)

    options: dict[str, Any] = {"cpus": config.resources.cluster_cpus, "shared": scanners(workspace, config)}
    with track("campaigns", len(due), "periods") as advance:
        for period, found in run_tasks(work, periods, ordered=True, **options):
            unit, name = period.unit, period.unit.key["period"]
            known = [row for row in before if _goes_on(row, config.campaigns.remember)]
            step = follow(_campaigns(known), name, found.keys, found.sums, found.sizes, threshold)
            rows = _rows(step, found, known)
            files = [table.write(pa.Table.from_pylist(rows, schema.CAMPAIGNS), unit.key)] if rows else []
            commits.add(unit, files)
            _count(counts, rows)
            before = rows
            if last := max((row["last"] for row in rows if row["last"] is not None), default=None):
                metrics.put("lag_seconds", config.run, (datetime.now(UTC) - last).total_seconds())
            advance(1, f"{name}: {len(step.names):,} campaigns")
    return counts


def _rows_before(workspace: Workspace, config: RunConfig, first: Unit) -> list[dict[str, Any]]:
    """Campaigns that the first due period follows: those of the period before it."""
    names = [unit.key["period"] for unit in planning.campaign_units(workspace, config)]
    place = names.index(first.key["period"])
    if place == 0:
        return []
    where = {"run": config.run, "period": names[place - 1]}
    rows: list[dict[str, Any]] = workspace.table("campaigns").read(where, schema.CAMPAIGNS.names).to_pylist()
    return rows


def _goes_on(row: dict[str, Any], remember: int) -> bool:
    """May clusters of the next period carry this campaign on?"""
    return bool(row["event"] != "merged" and row["absent"] <= remember)


def _campaigns(rows: list[dict[str, Any]]) -> Campaigns:
    if not rows:
        return Campaigns.none()
    sums = np.array([row["feature_sum"] for row in rows])
    return Campaigns([row["campaign"] for row in rows], sums, np.array([float(row["size"]) for row in rows]))


def _files(workspace: Workspace, model: Model, unit: Unit) -> _Period:
    period = {"period": unit.key["period"]}
    return _Period(
        unit,
        tuple(workspace.table("sequences").files(period)),
        tuple(workspace.table("embeddings").files({"model": model.id, **period})),
    )


def _describe(workspace: Workspace, period: _Period, known: Scanners | None) -> _Described:
    clusters = workspace.table("clusters").read_files(period.unit.files)
    sequences = workspace.table("sequences").read_files(period.sequences)
    summary = summarise(sequences, clusters, period.unit.key["period"], known).drop_columns(["period"])
    k = summary.num_rows
    ids, labels = clusters["sequence_id"].to_numpy(), clusters["cluster"].to_numpy()
    order = np.argsort(ids)
    keys = _earliest(sequences, ids[order], labels[order])
    return _Described(summary, keys, *_sums(workspace, period.embeddings, ids[order], labels[order], k))


def _earliest(sequences: pa.Table, ids: NDArray[np.int64], labels: NDArray[np.int64]) -> NDArray[np.int64]:
    """Id of each cluster's earliest sequence, the smallest of several; `ids` ascending, with their `labels`.

    Flows that are added in time order change neither the first sequences of a period nor these ids.
    """
    of_table = pc.index_in(pa.array(ids), value_set=sequences["sequence_id"].combine_chunks())
    start = sequences["start"].take(of_table).cast(pa.int64()).to_numpy(zero_copy_only=False)
    order = np.lexsort((ids, start, labels))
    firsts = order[np.flatnonzero(np.diff(labels[order], prepend=-1))]
    earliest: NDArray[np.int64] = ids[firsts]
    return earliest


def _sums(
    workspace: Workspace, files: Iterable[File], ids: NDArray[np.int64], labels: NDArray[np.int64], k: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Feature sums (k, d) and sizes (k,), file by file; `ids` ascending, with their `labels`."""
    sums, sizes = np.zeros((k, 0)), np.zeros(k)
    for file in files:
        rows = workspace.table("embeddings").read_files([file], ("sequence_id", "vector"))
        embedded = rows["sequence_id"].to_numpy()
        mine = np.isin(embedded, ids)  # others were embedded after the period was clustered
        own = labels[np.searchsorted(ids, embedded[mine])]
        part, counts = cluster_sums(vectors_of(rows)[mine], own, k)
        sums = part if sums.shape[1] == 0 else sums + part
        sizes = sizes + counts
    return sums, sizes


def _rows(step: Step, found: _Described, before: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows of the period's table: its clusters, then campaigns that have none."""
    known = {row["campaign"]: row for row in before}
    rows = []
    for j, summary in enumerate(found.summary.to_pylist()):
        name = step.names[j]
        rows.append(
            {
                **summary,
                "campaign": name,
                "event": step.events[j],
                "relative": step.parents[j],
                "began": known[name]["began"] if name in known else summary["first"],
                "feature_sum": found.sums[j],
                "size": int(found.sizes[j]),
                "absent": 0,
            }
        )
    for ended in step.ended:
        last = known[ended.name]
        kept = {name: last[name] for name in ("campaign", "began", "feature_sum", "size")}
        event = {"event": ended.event, "relative": ended.into, "absent": last["absent"] + 1}
        rows.append({**dict.fromkeys(schema.SUMMARY.names), **_NOTHING, **kept, **event})
    return rows


def _count(counts: Counts, rows: list[dict[str, Any]]) -> None:
    counts.periods += 1
    for row in rows:
        if row["absent"] <= 1:
            setattr(counts, row["event"], getattr(counts, row["event"]) + 1)
