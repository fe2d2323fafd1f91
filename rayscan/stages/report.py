"""The report of a run: a task summarises each period, the driver writes one HTML file."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from rayscan import planning
from rayscan.captures.origins import SYSTEMS, AsNumbers, MaxMind
from rayscan.config import RunConfig, as_yaml
from rayscan.errors import ConfigError
from rayscan.evaluation.projection import pca_2d
from rayscan.keys import uniform
from rayscan.planning import Model, run_file
from rayscan.progress import track
from rayscan.report.page import PERIODS, ReportData, render
from rayscan.report.summary import SUMMARY, activity, origins, usual_port
from rayscan.stages.lists import HIDDEN, overview, read_whole
from rayscan.stages.session import run_tasks
from rayscan.stages.similarity import vectors_of
from rayscan.tables import File, Workspace

_MAP_SEED = 7


@dataclass(frozen=True)
class _Period:
    """A period and its files."""

    name: str
    flows: list[File]
    sequences: list[File]
    embeddings: list[File]
    clusters: list[File]


@dataclass(frozen=True)
class _Places:
    """What tells where addresses are; a database is opened by each task, since it cannot travel."""

    systems: AsNumbers | None
    mmdb: str | None


@dataclass(frozen=True)
class _Summary:
    """What the report shows of a period."""

    facts: dict[str, Any]
    activity: pa.Table
    points: pa.Table  # with their vectors
    origins: dict[str, pa.Table]


def run(workspace: Workspace, config: RunConfig, model: Model, made_from: str) -> dict[str, Any]:
    """Write `report.html`, then `report.json`, which says what it was made from."""
    periods = _periods(workspace, config, model)
    total = sum(file.rows for period in periods for file in period.embeddings)
    share = min(1.0, config.report.max_points / max(total, 1))

    places = _places(workspace, config)

    def work(period: _Period, places: _Places | None = None) -> _Summary:
        return _summarise(workspace, period, share, places)

    summaries = []
    with track("report", len(periods), "periods") as advance:
        for period, summary in run_tasks(work, periods, ordered=True, shared=places):
            summaries.append(summary)
            advance(1, period.name)
    page = render(_data(workspace, config, model, summaries))
    html = page.encode()
    workspace.write_bytes(run_file(config, "report.html"), html)
    facts = {"made_from": made_from, "config_hash": planning.config_hash(config), "bytes": len(html)}
    workspace.write_json(run_file(config, "report.json"), facts)
    return {"periods": len(periods), "megabytes": round(len(html) / 1e6, 1)}


def _periods(workspace: Workspace, config: RunConfig, model: Model) -> list[_Period]:
    where: dict[str, dict[str, str]] = {
        "flows": {},
        "sequences": {},
        "embeddings": {"model": model.id},
        "clusters": {"run": config.run},
    }
    found: dict[str, dict[str, list[File]]] = {}
    for table, key in where.items():
        for file in workspace.table(table).files(key):
            empty: dict[str, list[File]] = {name: [] for name in where}
            found.setdefault(file.key["period"], empty)[table].append(file)
    return [_Period(name, **found[name]) for name in sorted(found)]


def _summarise(workspace: Workspace, period: _Period, share: float, places: _Places | None) -> _Summary:
    sequences = workspace.table("sequences").read_files(period.sequences)
    clusters = workspace.table("clusters").read_files(period.clusters)
    src = workspace.table("flows").read_files(period.flows, ("src",))["src"]
    in_sequences = pc.sum(sequences["length"]).as_py() or 0
    facts = {
        "period": period.name,
        "flows": len(src),
        "sources": pc.count_distinct(src).as_py(),
        "sequences": sequences.num_rows,
        "dropped_flows": len(src) - in_sequences,
    }
    return _Summary(
        facts,
        activity(sequences, clusters, period.name),
        _points(workspace, period, sequences, clusters, share),
        {title: origins(clusters, period.name, names) for title, names in _namers(places).items()},
    )


def _places(workspace: Workspace, config: RunConfig) -> _Places | None:
    """What report.pfx2as and report.mmdb name. Raises before any work where they cannot be used."""
    given = config.report
    if given.pfx2as is None and given.mmdb is None:
        return None
    if workspace.addresses != "raw":
        raise ConfigError(f"report.pfx2as and report.mmdb: {HIDDEN}")
    systems = None if given.pfx2as is None else AsNumbers(read_whole(given.pfx2as), given.pfx2as)
    found = _Places(systems, given.mmdb)
    _namers(found)
    return found


def _namers(places: _Places | None) -> dict[str, Callable[[NDArray[np.int64]], pa.Array]]:
    """What names addresses, by the title of the names."""
    found: dict[str, Callable[[NDArray[np.int64]], pa.Array]] = {}
    if places is not None and places.mmdb is not None:
        database = MaxMind(places.mmdb)
        found[database.title] = database
    if places is not None and places.systems is not None:
        found[SYSTEMS] = places.systems
    return found


def _points(
    workspace: Workspace, period: _Period, sequences: pa.Table, clusters: pa.Table, share: float
) -> pa.Table:
    """A seeded share of the period's sequences with vector, cluster and what colours them."""
    embedded = workspace.table("embeddings").read_files(period.embeddings, ("sequence_id", "vector"))
    embedded = _thin(embedded, share)
    sequences = _thin(sequences, share)
    rows = sequences.select(["sequence_id", "src", "label"])
    rows = rows.append_column("port", usual_port(sequences))
    rows = rows.join(embedded.drop_columns(["vector"]), "sequence_id", join_type="inner")
    rows = rows.join(clusters.select(["sequence_id", "cluster"]), "sequence_id", join_type="left outer")
    rows = rows.sort_by("sequence_id").append_column(
        "period", pa.repeat(pa.scalar(period.name), rows.num_rows)
    )
    place = pc.index_in(rows["sequence_id"], value_set=embedded["sequence_id"].combine_chunks())
    return rows.append_column("vector", embedded["vector"].take(place))


def _thin(table: pa.Table, share: float) -> pa.Table:
    chosen = uniform(table["sequence_id"].to_numpy(), _MAP_SEED) < share
    return table.filter(pa.array(chosen))


def _data(workspace: Workspace, config: RunConfig, model: Model, summaries: list[_Summary]) -> ReportData:
    evaluation = workspace.read_json(run_file(config, "evaluation.json"))
    campaigns = workspace.table("campaigns").read({"run": config.run}, [*SUMMARY.names, "campaign", "event"])
    return ReportData(
        title=config.report.title,
        generated=datetime.now(UTC),
        run=config.run,
        config_yaml=as_yaml(config),
        config_hash=planning.config_hash(config),
        versions=planning.versions(),
        captures=workspace.table("captures").read(),
        rejects=workspace.table("rejects").read(),
        periods=pa.Table.from_pylist([summary.facts for summary in summaries], PERIODS),
        clusters=campaigns.filter(pc.is_valid(campaigns["cluster"])),
        activity=_stack(summary.activity for summary in summaries),
        evaluation=evaluation,
        training=_curve(workspace, model),
        threshold=(evaluation or {}).get("threshold", {}),
        points=_map(_stack(summary.points for summary in summaries)),
        show_sources=config.report.show_sources,
        max_clusters=config.report.max_clusters,
        lists=None if workspace.addresses != "raw" else overview(workspace),
        tolerance_days=config.scanners.tolerance_days,
        origins={
            title: _stack(summary.origins[title] for summary in summaries)
            for title in (summaries[0].origins if summaries else ())
        },
    )


def _curve(workspace: Workspace, model: Model) -> pa.Table | None:
    """The training curve, which a model from elsewhere need not bring along."""
    try:
        return pq.read_table(pa.BufferReader(workspace.read_bytes(f"{model.folder}/metrics.parquet")))
    except FileNotFoundError:
        return None


def _stack(tables: Iterable[pa.Table]) -> pa.Table:
    return pa.concat_tables(list(tables), promote_options="permissive")


def _map(points: pa.Table) -> pa.Table:
    """The points with x and y in place of their vectors."""
    place = pca_2d(vectors_of(points), _MAP_SEED) if points.num_rows > 1 else np.zeros((points.num_rows, 2))
    return (
        points.drop_columns(["vector", "sequence_id"])
        .append_column("x", pa.array(place[:, 0], pa.float32()))
        .append_column("y", pa.array(place[:, 1], pa.float32()))
    )
