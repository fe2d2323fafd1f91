"""Campaigns for other programs: rows for spreadsheets and databases, a MISP warninglist, STIX 2.1, a graph.

Every function takes campaigns (rows of the campaigns table) and members (MEMBERS) and gives bytes or a
table; equal tables give equal bytes. Lists of addresses are refused to nobody here: where addresses are
pseudonyms, the caller must not ask for a warninglist or STIX, whose readers take every address for a real
one.
"""

from __future__ import annotations

import io
import json
import re
import uuid
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any, Literal

import networkx as nx
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pacsv
import pyarrow.parquet as pq

from rayscan import schema
from rayscan.captures.networks import as_text
from rayscan.clustering.moves import Clusters
from rayscan.clustering.quotient import nearest_clusters
from rayscan.report import words
from rayscan.report.details import NEAR
from rayscan.report.members import count_of, join, micros, pack

Rows = list[dict[str, Any]]
Addresses = Literal["source", "pseudonym"]
"""What the column of addresses is called: a pseudonym must not pass for an address."""

MEMBERS = pa.schema(
    [
        pa.field("period", pa.string(), nullable=False),
        pa.field("campaign", pa.string(), nullable=False),
        pa.field("src", pa.int64(), nullable=False),
        pa.field("sequences", pa.int64(), nullable=False),  # of the source in the campaign
        pa.field("flows", pa.int64(), nullable=False),
        pa.field("first", schema.TIME, nullable=False),
        pa.field("last", schema.TIME, nullable=False),
    ]
)
VALID = timedelta(days=30)
"""How long after the last flow an indicator holds: addresses change hands, those of homes within weeks."""

MOST_NEAR = 10_000
"""Campaigns of a period between which a graph has edges `near`: their comparison grows with the square."""

_NAMESPACE = uuid.uuid5(uuid.NAMESPACE_DNS, "rayscan")
_NOT_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def members(sequences: pa.Table, clusters: pa.Table, campaigns: pa.Table) -> pa.Table:
    """Which sources make up each campaign of one period, columns as in MEMBERS, by campaign and address.

    `sequences` needs the columns sequence_id, src, start, end and length. `campaigns` says which clusters
    are wanted.
    """
    wanted = campaigns.filter(pc.is_valid(campaigns["cluster"])).sort_by("cluster")
    inside = pc.is_in(clusters["cluster"], value_set=wanted["cluster"].combine_chunks())
    m = join(sequences, clusters.filter(inside))
    place = np.searchsorted(wanted["cluster"].to_numpy(), m.clusters)[m.group]
    keys = pack(place, m.src)
    distinct, counts = count_of(keys)
    at = np.searchsorted(distinct, keys)
    first = np.full(len(distinct), np.iinfo(np.int64).max)
    last = np.full(len(distinct), np.iinfo(np.int64).min)
    np.minimum.at(first, at, micros(m.rows["start"]))
    np.maximum.at(last, at, micros(m.rows["end"]))
    flows = np.bincount(at, weights=m.rows["length"].to_numpy(), minlength=len(distinct))
    of = pa.array(distinct >> 32)
    columns = {
        "period": wanted["period"].take(of),
        "campaign": wanted["campaign"].take(of),
        "src": distinct & 0xFFFFFFFF,
        "sequences": counts,
        "flows": flows.astype(np.int64),
        "first": pa.array(first, schema.TIME),
        "last": pa.array(last, schema.TIME),
    }
    return pa.table(columns, schema=MEMBERS)


# ---------------------------------------------------------------------------------------------
# Tables
# ---------------------------------------------------------------------------------------------


def source_table(found: pa.Table, addresses: Addresses) -> pa.Table:
    """The members with addresses as text, in a column that says what they are."""
    text = pa.array([words.address(src) for src in found["src"].to_pylist()], pa.string())
    place = found.schema.get_field_index("src")
    return found.set_column(place, addresses, text)


def campaign_table(campaigns: pa.Table) -> pa.Table:
    """The campaigns without vectors and addresses."""
    return campaigns.drop_columns(["feature_sum", "size", "examples"])


def as_csv(table: pa.Table) -> bytes:
    """CSV with a header. Lists become text: `23/tcp 0.9; 2323/tcp 0.1`, or `censys 12`."""
    for at, field in enumerate(table.schema):
        if pa.types.is_list(field.type):
            text = pa.array([_listed(items) for items in table[field.name].to_pylist()], pa.string())
            table = table.set_column(at, field.name, text)
    sink = io.BytesIO()
    pacsv.write_csv(table, sink)
    return sink.getvalue()


def _listed(items: Rows | None) -> str | None:
    if items is None:
        return None
    return "; ".join(
        f"{words.port(item['proto'], item['port'])} {item['share']:.4g}"
        if "port" in item
        else " ".join(str(value) for value in item.values())
        for item in items
    )


def as_parquet(table: pa.Table) -> bytes:
    sink = io.BytesIO()
    pq.write_table(table, sink, compression="zstd")
    return sink.getvalue()


# ---------------------------------------------------------------------------------------------
# Lists of addresses
# ---------------------------------------------------------------------------------------------


def as_warninglist(campaigns: pa.Table, found: pa.Table, run: str) -> bytes:
    """A MISP warninglist of all sources, of type cidr; its version is the day of the last flow."""
    periods = sorted(set(campaigns["period"].to_pylist()))
    last = pc.max(found["last"]).as_py() or datetime(1970, 1, 1, tzinfo=UTC)
    sources = sorted(set(found["src"].to_pylist()))
    names = words.listed(periods) if periods else "no period"
    content = {
        "name": f"Network telescope: scanning campaigns of {names}",
        "description": f"Sources of {campaigns.num_rows:,} campaigns that a network telescope saw in "
        f"{names}, found by rayscan (run {run}). A match says that an address scans, not that it attacks.",
        "version": int(f"{last:%Y%m%d}"),
        "type": "cidr",
        "matching_attributes": ["ip-src", "ip-dst", "domain|ip", "ip-src|port", "ip-dst|port"],
        "list": [as_text(src, 32) for src in sources],
    }
    return json.dumps(content, indent=1, ensure_ascii=False).encode() + b"\n"


def as_stix(campaigns: pa.Table, found: pa.Table, run: str, committed: dict[str, datetime]) -> bytes:
    """A STIX 2.1 bundle: for each campaign an indicator of its sources that indicates it.

    Identifiers follow from the run, the campaign's name and the period, so that a later export is a newer
    version of the same objects. An object was created when the campaign began, and modified when the
    campaigns of its period were `committed`: whatever changes them is a commit, and a later one.
    """
    maker = {
        "type": "identity",
        "spec_version": "2.1",
        "id": _id("identity", "rayscan"),
        "created": "2024-01-01T00:00:00.000Z",
        "modified": "2024-01-01T00:00:00.000Z",
        "name": "rayscan",
        "identity_class": "system",
    }
    sources: dict[tuple[str, str], list[int]] = {}
    for row in found.select(["period", "campaign", "src"]).to_pylist():
        sources.setdefault((row["period"], row["campaign"]), []).append(row["src"])
    objects = [maker]
    for row in campaigns.sort_by([("period", "ascending"), ("campaign", "ascending")]).to_pylist():
        addresses = sources.get((row["period"], row["campaign"]), [])
        if addresses:
            objects += _stix_campaign(row, addresses, run, maker["id"], committed[row["period"]])
    bundle = {"type": "bundle", "id": _id("bundle", json.dumps(objects)), "objects": objects}
    return json.dumps(bundle, indent=1, ensure_ascii=False).encode() + b"\n"


def _stix_campaign(
    row: dict[str, Any], sources: list[int], run: str, maker: str, committed: datetime
) -> Rows:
    key = f"{run}/{row['campaign']}/{row['period']}"
    common = {
        "spec_version": "2.1",
        "created_by_ref": maker,
        "created": _stix_time(row["began"]),
        "modified": _stix_time(max(committed, row["last"])),  # a clock may lag behind the traffic
    }
    campaign = {
        "type": "campaign",
        "id": _id("campaign", key),
        **common,
        "name": row["campaign"],
        "description": described(row),
        "first_seen": _stix_time(row["began"]),
        "last_seen": _stix_time(row["last"]),
    }
    values = ", ".join(f"'{words.address(src)}'" for src in sorted(sources))
    indicator = {
        "type": "indicator",
        "id": _id("indicator", key),
        **common,
        "name": f"Sources of {row['campaign']} in {row['period']}",
        "indicator_types": ["anomalous-activity"],
        "pattern": f"[ipv4-addr:value IN ({values})]",
        "pattern_type": "stix",
        "valid_from": _stix_time(row["first"]),
        "valid_until": _stix_time(row["last"] + VALID),
    }
    indicates = {
        "type": "relationship",
        "id": _id("relationship", key),
        **common,
        "relationship_type": "indicates",
        "source_ref": indicator["id"],
        "target_ref": campaign["id"],
    }
    return [campaign, indicator, indicates]


def described(row: dict[str, Any]) -> str:
    """A campaign of one period in a sentence."""
    ports = [
        f"{words.port(item['proto'], item['port'])} ({words.percent(item['share'])})"
        for item in (row["ports"] or ())[:3]
    ]
    marks = [
        f"mark of {words.TOOLS[name]} on {words.percent(row[name])}" for name in words.TOOLS if row[name]
    ]
    parts = [
        f"{words.count(row['sources'], 'source')} in {words.count(row['networks'], 'network')} (/24)",
        words.count(row["flows"], "flow"),
        *([f"to {words.listed(ports)}"] if ports else []),
        *marks,
        *([f"{words.count(row['known'], 'known scanner')}"] if row["known"] else []),
    ]
    return f"In {row['period']}: {', '.join(parts)}."


def _id(kind: str, key: str) -> str:
    return f"{kind}--{uuid.uuid5(_NAMESPACE, f'{kind}/{key}')}"


def _stix_time(value: datetime) -> str:
    return f"{value.astimezone(UTC):%Y-%m-%dT%H:%M:%S}.{value.microsecond // 1000:03d}Z"


# ---------------------------------------------------------------------------------------------
# Graph
# ---------------------------------------------------------------------------------------------


def as_graphml(campaigns: pa.Table, found: pa.Table, addresses: Addresses) -> bytes:
    """Campaigns and sources as nodes; edges `member`, `split from`, `merged into`, `near`.

    Members weigh their sequences. A campaign of several periods is one node, with what it was in the last of
    them; one that `campaigns` tell nothing of but that others came from or went into is a bare one. `near`
    lead to the NEAR most similar ones of a period (weight: mean cosine of their sequences), among the
    MOST_NEAR with the most sources.
    """
    graph: Any = nx.DiGraph()
    rows = campaigns.sort_by([("period", "ascending"), ("campaign", "ascending")])
    there = rows.filter(pc.is_valid(rows["cluster"]))
    for row in there.to_pylist():
        graph.add_node(row["campaign"], **_node(row))
    for row in rows.select(["campaign", "event", "relative"]).to_pylist():
        if row["relative"] is not None:
            kind = "split from" if row["event"] == "split" else "merged into"
            for name in (row["campaign"], row["relative"]):
                graph.add_node(name, kind="campaign")  # a node that is there keeps what it has
            graph.add_edge(row["campaign"], row["relative"], kind=kind, weight=1)
    for one, other, similarity in _near(there):
        if not graph.has_edge(one, other):
            graph.add_edge(one, other, kind="near", weight=similarity)
    for row in found.select(["src", "campaign", "sequences"]).to_pylist():
        address = words.address(row["src"])
        graph.add_node(address, kind=addresses)
        edge = graph.get_edge_data(address, row["campaign"], {"weight": 0})
        graph.add_edge(address, row["campaign"], kind="member", weight=edge["weight"] + row["sequences"])
    sink = io.BytesIO()
    nx.write_graphml(graph, sink)
    return sink.getvalue()


def _node(row: dict[str, Any]) -> dict[str, Any]:
    return {
        "kind": "campaign",
        "period": row["period"],
        "sources": row["sources"],
        "flows": row["flows"],
        "ports": _xml(_listed(row["ports"]) or ""),
        "labels": _xml(_listed(row["labels"]) or ""),
        "scanners": _xml(_listed(row["scanners"]) or ""),
        "began": f"{row['began'].astimezone(UTC):%Y-%m-%dT%H:%M:%SZ}",
    }


def _near(campaigns: pa.Table) -> Iterator[tuple[str, str, float]]:
    """Pairs of campaigns of one period, the newest first."""
    order = [("sources", "descending"), ("sequences", "descending"), ("campaign", "ascending")]
    for period in sorted(set(campaigns["period"].to_pylist()), reverse=True):
        rows = campaigns.filter(pc.equal(campaigns["period"], period)).sort_by(order).slice(0, MOST_NEAR)
        rows = rows.sort_by("campaign")
        sums = rows["feature_sum"].combine_chunks().flatten().to_numpy().reshape(rows.num_rows, -1)
        sizes = rows["size"].to_numpy().astype(np.float64)
        names = rows["campaign"].to_pylist()
        for one, others, values in zip(names, *nearest_clusters(Clusters(sums, sizes), NEAR), strict=True):
            for j, value in zip(others.tolist(), values.tolist(), strict=True):
                yield one, names[j], value


def _xml(text: str) -> str:
    """The text without signs that no XML document may hold."""
    return _NOT_XML.sub("\ufffd", text)
