"""One campaign, or one source, as the report shows it, for the terminal. Starts no Ray."""

from __future__ import annotations

import ipaddress
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from rayscan import schema
from rayscan.config import RunConfig
from rayscan.errors import ConfigError, DataError
from rayscan.keys import bucket_of
from rayscan.report import history, words
from rayscan.report.details import details, nearest
from rayscan.stages import lists
from rayscan.tables import Workspace

_LAST = 5  # sequences of a source that are told in words
_PORTS = 5


def campaign(workspace: Workspace, config: RunConfig, name: str, period: str | None) -> dict[str, Any]:
    """Everything about the campaign whose name begins with `name`: over all periods, and in one of them.

    That is `period`, or the last in which it has a cluster. Raises DataError where no campaign or more than
    one is meant.
    """
    columns = [field for field in schema.CAMPAIGNS.names if field != "feature_sum"]
    rows = workspace.table("campaigns").read({"run": config.run}, ["period", *columns])
    if not rows.num_rows:
        raise DataError(f"run {config.run} of {workspace.uri} has no campaigns; see `rayscan campaigns`")
    full = _meant(rows, name)
    own = history.with_change(rows.filter(pc.equal(rows["campaign"], full))).sort_by("period").to_pylist()
    there = [row for row in own if row["cluster"] is not None and period in (None, row["period"])]
    if not there:
        periods = ", ".join(row["period"] for row in own if row["cluster"] is not None)
        raise DataError(f"campaign {full} has no cluster in {period}; it has one in {periods}")
    return {
        "campaign": full,
        "run": config.run,
        "first seen": words.instant(there[-1]["began"]),
        "periods": [_over_time(row) for row in own],
        **_in_period(workspace, config, there[-1]),
    }


def _meant(rows: pa.Table, name: str) -> str:
    found = rows.filter(pc.starts_with(rows["campaign"], name))["campaign"].unique().sort().to_pylist()
    if name in found:
        return name
    if len(found) != 1:
        some = f"; there are {', '.join(found[:5])}{', …' if len(found) > 5 else ''}" if found else ""
        raise DataError(f"{words.count(len(found), 'campaign')} begin with {name!r}{some}")
    return str(found[0])


def _over_time(row: dict[str, Any]) -> dict[str, Any]:
    return {
        "period": row["period"],
        "event": row["event"],
        "relative": row["relative"],
        "change": words.change(row),
        "sources": row["sources"],
        "sequences": row["sequences"],
        "flows": row["flows"],
    }


def _in_period(workspace: Workspace, config: RunConfig, row: dict[str, Any]) -> dict[str, Any]:
    """What a campaign was in one period."""
    period = row["period"]
    clusters = workspace.table("clusters").read({"run": config.run, "period": period})
    own = clusters.filter(pc.equal(clusters["cluster"], row["cluster"]))
    ids = own["sequence_id"].combine_chunks()
    table = workspace.table("sequences")
    parts = [
        rows.filter(pc.is_in(rows["sequence_id"], value_set=ids))
        for rows in (table.read_files([file]) for file in table.files({"period": period}))
    ]
    more = details(pa.concat_tables(parts), own, period, 1).to_pylist() if len(ids) > 1 else []
    counts = ("sources", "networks", "sequences", "flows", "destinations", "labelled", "known")
    return {
        "period": period,
        "first flow": words.instant(row["first"]),
        "last flow": words.instant(row["last"]),
        **{name: row[name] for name in counts},
        "median gap": words.duration(row["median_gap_us"]),
        "cohesion": row["cohesion"],
        "marks": {words.TOOLS[name]: row[name] for name in words.TOOLS if row[name] is not None},
        "ports": {words.port(p["proto"], p["port"]): p["share"] for p in row["ports"] or ()},
        "labels": {item["label"]: item["sources"] for item in row["labels"] or ()},
        "scanners": {item["organisation"]: item["sources"] for item in row["scanners"] or ()},
        "nearest": _near(workspace, config, period, row["campaign"]),
        **_details(more[0] if more else None),
        "examples": [words.address(src) for src in row["examples"] or ()],
    }


def _details(item: dict[str, Any] | None) -> dict[str, Any]:
    if item is None:
        return {}
    return {
        "distinct ports": item["distinct_ports"],
        "networks /16": item["slash16"],
        "networks /8": item["slash8"],
        "largest networks": {words.network(n["network"], 16): n["sources"] for n in item["networks16"]},
        "destination networks": {words.network(n["network"], 24): n["share"] for n in item["targets"]},
        "flows by hour of the day": item["hours"],
        "typical sequences": [f"{words.address(one['src'])}: {one['text']}" for one in item["said"]],
    }


def _near(workspace: Workspace, config: RunConfig, period: str, name: str) -> dict[str, float]:
    """The nearest campaigns of the period, with the mean similarity of their sequences."""
    rows = workspace.table("campaigns").read(
        {"run": config.run, "period": period}, ["campaign", "cluster", "feature_sum", "size"]
    )
    large = pc.or_(pc.greater(rows["size"], 1), pc.equal(rows["campaign"], name))
    rows = rows.filter(pc.and_(pc.is_valid(rows["cluster"]), large))
    place = rows["campaign"].to_pylist().index(name)
    sums = rows["feature_sum"].combine_chunks().flatten().to_numpy().reshape(rows.num_rows, -1)
    found = nearest(np.arange(rows.num_rows), sums, rows["size"].to_numpy().astype(float))[place]
    return {rows["campaign"][one["cluster"]].as_py(): one["similarity"] for one in found}


def source(workspace: Workspace, config: RunConfig, address: str) -> dict[str, Any]:
    """Everything about one source: flows, ports, sequences, and the campaigns it belongs to.

    Where addresses are pseudonyms, `address` is one. Raises ConfigError for what is no IPv4 address.
    """
    try:
        src = int(ipaddress.IPv4Address(address))
    except ValueError as error:
        raise ConfigError(f"{address} is no IPv4 address: {error}") from None
    facts = workspace.facts() or {}
    where = {"bucket": int(bucket_of(np.array([src]), int(facts["n_buckets"]))[0])}
    flows = _of(workspace, "flows", where, src)
    sequences = _of(workspace, "sequences", where, src)
    raw = workspace.addresses == "raw"
    found: dict[str, Any] = {
        "source": words.address(src),
        "is a pseudonym": not raw,
        "flows": flows.num_rows,
        "first flow": words.instant(pc.min(flows["ts"]).as_py()),
        "last flow": words.instant(pc.max(flows["ts"]).as_py()),
        "destinations": pc.count_distinct(flows["dst"]).as_py(),
        "ports": _ports(flows),
        "labels": {str(name): int(n) for name, n in _counted(flows["label"].drop_null())},
        "marks": _marks(flows),
        "sequences": sequences.num_rows,
        "campaigns": _campaigns(workspace, config, src),
        "last sequences": [
            words.sequence(row)
            for row in sequences.sort_by("start").slice(max(sequences.num_rows - _LAST, 0)).to_pylist()
        ],
    }
    if raw:
        found["scanner lists"] = [
            {name: str(value) for name, value in row.items()}
            for row in lists.lookup(workspace, config, address, None)
        ]
    return found


def _of(workspace: Workspace, table: str, where: dict[str, int], src: int) -> pa.Table:
    """The rows of a source; its bucket says where they are."""
    rows = workspace.table(table)
    parts = [
        part.filter(pc.equal(part["src"], src))
        for part in (rows.read_files([file]) for file in rows.files(where))
    ]
    return pa.concat_tables(parts) if parts else rows.schema.empty_table()


def _counted(column: pa.ChunkedArray, limit: int = 5) -> list[tuple[Any, int]]:
    counts = [(item["values"], item["counts"]) for item in pc.value_counts(column).to_pylist()]
    return sorted(counts, key=lambda item: (-item[1], str(item[0])))[:limit]


def _ports(flows: pa.Table) -> dict[str, float]:
    """The commonest ports with their share of flows."""
    rows = flows.group_by(["proto", "dst_port"], use_threads=False).aggregate([([], "count_all")])
    order = [("count_all", "descending"), ("proto", "ascending"), ("dst_port", "ascending")]
    found = rows.sort_by(order).slice(0, _PORTS).to_pylist()
    return {words.port(row["proto"], row["dst_port"]): row["count_all"] / flows.num_rows for row in found}


def _marks(flows: pa.Table) -> dict[str, float]:
    """Share of flows with the mark of each tool, of those where it could be known."""
    bits = flows["fingerprint"].drop_null().to_numpy()
    names = schema.FINGERPRINTS if len(bits) else {}
    return {words.TOOLS[name]: float((bits & bit > 0).mean()) for name, bit in names.items()}


def _campaigns(workspace: Workspace, config: RunConfig, src: int) -> list[dict[str, Any]]:
    """The campaigns of a source in each period, with its sequences in them."""
    found = []
    for period in sorted(
        {file.key["period"] for file in workspace.table("clusters").files({"run": config.run})}
    ):
        where = {"run": config.run, "period": period}
        clusters = workspace.table("clusters").read(where, ["src", "cluster"])
        own = _counted(clusters.filter(pc.equal(clusters["src"], src))["cluster"], clusters.num_rows)
        rows = workspace.table("campaigns").read(where, ["cluster", "campaign", "sources", "sequences"])
        by_cluster = {row["cluster"]: row for row in rows.to_pylist()}
        for cluster, n in own:
            row = by_cluster.get(cluster)
            if row is not None:
                alone = row["sequences"] == 1
                found.append(
                    {
                        "period": period,
                        "campaign": None if alone else row["campaign"],
                        "sequences": n,
                        "sources": row["sources"],
                    }
                )
    return found
