"""The report of a run: a task summarises each period, the driver writes one HTML file.

The map of a model is drawn once, from a sample of the sequences that are there then, and kept beside the
model (`map.parquet`). Every later report places its sequences among that sample, so that a campaign is
found where it was last month. `rayscan train --fresh` makes other vectors, and with them another map.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from rayscan import planning
from rayscan.captures.scanners import Scanners
from rayscan.config import RunConfig, as_yaml
from rayscan.errors import ConfigError, DataError
from rayscan.evaluation import projection
from rayscan.keys import uniform
from rayscan.planning import Model, run_file
from rayscan.progress import say, track
from rayscan.report.data import CAMPAIGNS, NEAR, PERIODS, POINTS, ReportData
from rayscan.report.details import details, nearest
from rayscan.report.page import render
from rayscan.report.summary import STEPS_US, activity, origins, usual_port
from rayscan.stages.cluster import known_threshold
from rayscan.stages.lists import overview, scanners
from rayscan.stages.places import Places, places
from rayscan.stages.session import run_tasks
from rayscan.stages.similarity import vectors_of
from rayscan.tables import File, Workspace

_MAP_SEED = 7
_MAP_SAMPLE = 20_000  # sequences that the map is drawn from


@dataclass(frozen=True)
class _Period:
    """A period and its files."""

    name: str
    flows: list[File]
    sequences: list[File]
    embeddings: list[File]
    clusters: list[File]
    campaigns: list[File]


@dataclass(frozen=True)
class _Asked:
    """What tasks ask about sources."""

    places: Places
    known: Scanners | None


@dataclass(frozen=True)
class _Summary:
    """What the report shows of a period."""

    facts: dict[str, Any]
    activity: pa.Table
    details: pa.Table
    near: pa.Table
    points: pa.Table  # with their vectors
    origins: dict[str, pa.Table]


def run(
    workspace: Workspace, config: RunConfig, model: Model, made_from: str, only: str | None = None
) -> dict[str, Any]:
    """Write `report.html`, then `report.json`, which says what it was made from.

    With `only`, of that period alone, as `report-PERIOD.html`. Raises ConfigError where there is none such.
    """
    periods = _periods(workspace, config, model, only)
    total = sum(file.rows for period in periods for file in period.embeddings)
    share = min(1.0, config.report.max_points / max(total, 1))
    step_us = STEPS_US[str((workspace.facts() or {})["period"])]

    def work(period: _Period, asked: _Asked) -> _Summary:
        return _summarise(workspace, config, period, share, step_us, asked)

    summaries = []
    with track("report", len(periods), "periods") as advance:
        for period, summary in run_tasks(work, periods, ordered=True, shared=_asked(workspace, config)):
            summaries.append(summary)
            advance(1, period.name)
    page = render(_data(workspace, config, model, summaries, step_us))
    html = page.encode()
    name = planning.report_name(only)
    workspace.write_bytes(run_file(config, f"{name}.html"), html)
    facts = {"made_from": made_from, "config_hash": planning.config_hash(config), "bytes": len(html)}
    workspace.write_json(run_file(config, f"{name}.json"), facts)
    return {"periods": len(periods), "megabytes": round(len(html) / 1e6, 1)}


def _periods(workspace: Workspace, config: RunConfig, model: Model, only: str | None) -> list[_Period]:
    where: dict[str, dict[str, str]] = {
        "flows": {},
        "sequences": {},
        "embeddings": {"model": model.id},
        "clusters": {"run": config.run},
        "campaigns": {"run": config.run},
    }
    found: dict[str, dict[str, list[File]]] = {}
    for table, key in where.items():
        for file in workspace.table(table).files(key):
            empty: dict[str, list[File]] = {name: [] for name in where}
            found.setdefault(file.key["period"], empty)[table].append(file)
    if only is not None and only not in found:
        raise ConfigError(f"{workspace.uri} has no period {only}; there are {', '.join(sorted(found))}")
    return [_Period(name, **found[name]) for name in sorted(found) if only in (None, name)]


def _summarise(
    workspace: Workspace, config: RunConfig, period: _Period, share: float, step_us: int, asked: _Asked
) -> _Summary:
    sequences = workspace.table("sequences").read_files(period.sequences)
    clusters = workspace.table("clusters").read_files(period.clusters)
    src = workspace.table("flows").read_files(period.flows, ("src",))["src"]
    in_sequences = pc.sum(sequences["length"]).as_py() or 0
    limit = config.report.max_clusters
    facts = {
        "period": period.name,
        "flows": len(src),
        "sources": pc.count_distinct(src).as_py(),
        "sequences": sequences.num_rows,
        "dropped_flows": len(src) - in_sequences,
    }
    found = details(sequences, clusters, period.name, limit)
    return _Summary(
        facts,
        activity(sequences, clusters, period.name, top=limit, step_us=step_us),
        found,
        _near(workspace, period, found["cluster"]),
        _points(workspace, period, sequences, clusters, share, asked.known),
        {title: origins(clusters, period.name, names) for title, names in asked.places.namers().items()},
    )


def _near(workspace: Workspace, period: _Period, shown: pa.ChunkedArray) -> pa.Table:
    """The nearest others of each cluster that is shown, columns as in NEAR."""
    rows = workspace.table("campaigns").read_files(period.campaigns, ("cluster", "feature_sum", "size"))
    rows = rows.filter(pc.is_in(rows["cluster"], value_set=shown.combine_chunks())).sort_by("cluster")
    if not rows.num_rows:
        return NEAR.empty_table()
    sums = rows["feature_sum"].combine_chunks().flatten().to_numpy().reshape(rows.num_rows, -1)
    found = nearest(rows["cluster"].to_numpy(), sums, rows["size"].to_numpy().astype(float))
    columns = {"period": [period.name] * len(found), "cluster": rows["cluster"], "near": found}
    return pa.table(columns, schema=NEAR)


def _asked(workspace: Workspace, config: RunConfig) -> _Asked:
    """The scanner lists, report.pfx2as and report.mmdb. Raises before any work where they cannot be used."""
    return _Asked(places(workspace, config), scanners(workspace, config))


def _points(
    workspace: Workspace,
    period: _Period,
    sequences: pa.Table,
    clusters: pa.Table,
    share: float,
    known: Scanners | None,
) -> pa.Table:
    """A seeded share of the period's sequences with vector, cluster and what colours them."""
    embedded = workspace.table("embeddings").read_files(period.embeddings, ("sequence_id", "vector"))
    embedded = _thin(embedded, share)
    sequences = _thin(sequences, share)
    organisation = (
        pa.nulls(sequences.num_rows, pa.string()) if known is None else known.known(sequences).organisation
    )
    rows = sequences.select(["sequence_id", "src", "start", "label"])
    rows = rows.append_column("port", usual_port(sequences)).append_column("scanner", organisation)
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


def _data(
    workspace: Workspace, config: RunConfig, model: Model, summaries: list[_Summary], step_us: int
) -> ReportData:
    evaluation = workspace.read_json(run_file(config, planning.EVALUATION))
    threshold = _threshold(workspace, config, model)
    points, drawn_from = _map(
        workspace, config, model, _stack(summary.points for summary in summaries), threshold.get("value")
    )
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
        campaigns=workspace.table("campaigns").read({"run": config.run}, CAMPAIGNS.names),
        activity=_stack(summary.activity for summary in summaries),
        details=_stack(summary.details for summary in summaries),
        near=_stack(summary.near for summary in summaries),
        model=model.id,
        weights=model.weights,
        evaluation=evaluation,
        misfit=_misfit(workspace, config, model, evaluation),
        seeds=workspace.read_json(run_file(config, planning.SEEDS)),
        comparison=workspace.read_json(run_file(config, planning.COMPARISON)),
        training=_curve(workspace, model),
        threshold=threshold,
        points=points,
        drawn_from=drawn_from,
        step_us=step_us,
        show_sources=config.report.show_sources,
        max_clusters=config.report.max_clusters,
        lists=None if workspace.addresses != "raw" else overview(workspace),
        tolerance_days=config.scanners.tolerance_days,
        origins={
            title: _stack(summary.origins[title] for summary in summaries)
            for title in (summaries[0].origins if summaries else ())
        },
    )


def _threshold(workspace: Workspace, config: RunConfig, model: Model) -> dict[str, Any]:
    """Value, how it came about, and the calibration; nothing where none was given or calibrated yet."""
    found = known_threshold(workspace, config, model)
    if found is None:
        return {}
    value, calibration = found
    return {"value": value, "how": "auto" if calibration else "given", "calibration": calibration}


def _misfit(workspace: Workspace, config: RunConfig, model: Model, evaluation: dict[str, Any] | None) -> str:
    """In a sentence how the evaluation that is there fails to fit what is reported; "" where it fits."""
    if evaluation is None:
        return ""
    if evaluation["model"] != model.id:
        return (
            f"The evaluation is of another model, {evaluation['model']}, and says nothing of these "
            "campaigns: run “rayscan evaluate”."
        )
    if evaluation["made_from"] != planning.evaluation_version(workspace, config, model):
        return (
            "The evaluation is older than the model's weights, the clusters, the lists of scanners or the "
            "settings as they are now: run “rayscan evaluate”."
        )
    return ""


def _curve(workspace: Workspace, model: Model) -> pa.Table | None:
    """The training curve, which a model from elsewhere need not bring along."""
    try:
        return pq.read_table(pa.BufferReader(workspace.read_bytes(f"{model.folder}/metrics.parquet")))
    except FileNotFoundError:
        return None


def _stack(tables: Iterable[pa.Table]) -> pa.Table:
    return pa.concat_tables(list(tables), promote_options="permissive")


# ---------------------------------------------------------------------------------------------
# The map
# ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Drawn:
    """The sample that a model's map was drawn from."""

    ids: NDArray[np.int64]  # ascending
    vectors: NDArray[np.float32]
    places: NDArray[np.float32]
    periods: list[str]


def _map(
    workspace: Workspace, config: RunConfig, model: Model, points: pa.Table, threshold: float | None
) -> tuple[pa.Table | None, list[str]]:
    """The points with places in place of their vectors, columns as in POINTS; the periods of the map.

    A point is strange that is less alike than `threshold` to whatever the map was drawn from.
    """
    if not points.num_rows:
        return None, []
    drawn = _stored(workspace, model) or _draw(workspace, config, model)
    ids, vectors = points["sequence_id"].to_numpy(), vectors_of(points)
    places, alike = projection.place(vectors, drawn.vectors, drawn.places)
    at = np.minimum(np.searchsorted(drawn.ids, ids), len(drawn.ids) - 1)
    same = drawn.ids[at] == ids
    places[same] = drawn.places[at[same]]
    strange = alike < (-1.0 if threshold is None else threshold)
    table = points.drop_columns(["vector", "sequence_id"])
    for name, column in (("x", places[:, 0]), ("y", places[:, 1]), ("strange", strange & ~same)):
        table = table.append_column(name, pa.array(column))
    return table.select(POINTS.names).cast(POINTS), drawn.periods


def _stored(workspace: Workspace, model: Model) -> _Drawn | None:
    """The map that was kept, if it was drawn from vectors of this very model."""
    try:
        table = pq.read_table(pa.BufferReader(workspace.read_bytes(f"{model.folder}/map.parquet")))
    except FileNotFoundError:
        return None
    facts = json.loads(table.schema.metadata[b"rayscan"])
    if facts["weights"] != model.weights:
        return None
    places = np.stack([table[name].to_numpy() for name in ("x", "y")], axis=1)
    return _Drawn(table["sequence_id"].to_numpy(), vectors_of(table), places, facts["periods"])


def _draw(workspace: Workspace, config: RunConfig, model: Model) -> _Drawn:
    """Draw the model's map from a seeded sample of everything embedded, and keep it."""
    table = workspace.table("embeddings")
    files = table.files({"model": model.id})
    share = min(1.0, _MAP_SAMPLE / max(sum(file.rows for file in files), 1))
    parts = [_thin(table.read_files([file], ("sequence_id", "vector")), share) for file in files]
    sample = pa.concat_tables(parts).sort_by("sequence_id")
    if not sample.num_rows:
        raise DataError("no sequence is embedded yet; run `rayscan embed` first")
    vectors = vectors_of(sample)
    say(f"report: drawing the map of {len(vectors):,} sequences")
    places = projection.draw(vectors, _MAP_SEED)
    periods = sorted({file.key["period"] for file in files})
    facts = json.dumps({"weights": model.weights, "periods": periods})
    for name, column in (("x", places[:, 0]), ("y", places[:, 1])):
        sample = sample.append_column(name, pa.array(column))
    sink = pa.BufferOutputStream()
    pq.write_table(sample.replace_schema_metadata({"rayscan": facts}), sink, compression="zstd")
    workspace.write_bytes(f"{model.folder}/map.parquet", sink.getvalue().to_pybytes())
    return _Drawn(sample["sequence_id"].to_numpy(), vectors, places, periods)
