"""The campaigns of a period, one campaign, or one source, as the report shows them, for the terminal.

Starts no Ray. Lists are cut short as in the report; `of` says how many there are. As there, no address and no
network of a campaign is told where `report.show_sources` is false.
"""

from __future__ import annotations

import ipaddress
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from rayscan import schema
from rayscan.config import RunConfig
from rayscan.errors import ConfigError, DataError
from rayscan.keys import bucket_of
from rayscan.report import history, words
from rayscan.report.details import details, nearest_to
from rayscan.report.summary import STEPS_US, activity
from rayscan.stages import lists
from rayscan.stages.places import places
from rayscan.tables import Workspace

_LAST = 5  # sequences of a source that are told in words
_SHOWN = 5  # ports, labels and places
_FACTS = [field for field in schema.CAMPAIGNS.names if field != "feature_sum"]


def campaigns(workspace: Workspace, config: RunConfig, period: str | None, limit: int) -> dict[str, Any]:
    """The `limit` campaigns with the most sources in a period, the newest by default, and how many there are.

    Those of one sequence do not count. Raises DataError where there is no such period.
    """
    rows = _all(workspace, config)
    periods = rows["period"].unique().sort().to_pylist()
    chosen = periods[-1] if period is None else period
    if chosen not in periods:
        raise DataError(f"run {config.run} has no period {chosen}; there are {', '.join(periods)}")
    here = rows.filter(pc.equal(rows["period"], chosen))
    grouped = here.filter(pc.greater(here["sequences"], 1))
    order = [("sources", "descending"), ("sequences", "descending"), ("cluster", "ascending")]
    names = grouped.sort_by(order)["campaign"].slice(0, limit)
    told = rows.filter(pc.is_in(rows["campaign"], value_set=names.combine_chunks()))
    found = {row["campaign"]: row for row in history.with_change(told).to_pylist() if row["period"] == chosen}
    short = history.short_names(rows)
    listed = [_listed(found[name], short[name]) for name in names.to_pylist()]
    for column in ("labels", "known scanners"):
        if not any(row[column] for row in listed):
            listed = [{key: value for key, value in row.items() if key != column} for row in listed]
    return {
        "run": config.run,
        "period": chosen,
        "of": grouped.num_rows,
        "alone": here.filter(pc.equal(here["sequences"], 1)).num_rows,
        "campaigns": listed,
    }


def _listed(row: dict[str, Any], short: str) -> dict[str, Any]:
    """A campaign as a row of the list."""
    return {
        "name": short,
        "campaign": row["campaign"],
        "change": words.change(row),
        "sources": row["sources"],
        "sequences": row["sequences"],
        "flows": row["flows"],
        "ports": _shares(row),
        "labels": _sources_by(row["labels"], "label"),
        "known scanners": _sources_by(row["scanners"], "organisation"),
        "first seen": words.day(row["began"]),
        "last seen": words.day(row["last"]),
    }


def _all(workspace: Workspace, config: RunConfig) -> pa.Table:
    rows = workspace.table("campaigns").read({"run": config.run}, ["period", *_FACTS])
    if not rows.num_rows:
        raise DataError(f"run {config.run} of {workspace.uri} has no campaigns; see `rayscan campaigns`")
    return rows


def _shares(row: dict[str, Any]) -> dict[str, float]:
    return {words.port(p["proto"], p["port"]): p["share"] for p in row["ports"] or ()}


def _sources_by(items: list[dict[str, Any]] | None, name: str) -> dict[str, int]:
    return {item[name]: item["sources"] for item in items or ()}


def campaign(workspace: Workspace, config: RunConfig, name: str, period: str | None) -> dict[str, Any]:
    """Everything about the campaign whose name begins with `name`: over all periods, and in one of them.

    That is `period`, or the last in which it has a cluster. Raises DataError where no campaign or more than
    one is meant.
    """
    rows = _all(workspace, config)
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
    sequences = _sequences(workspace, period, own["sequence_id"].combine_chunks())
    step_us = STEPS_US[str((workspace.facts() or {})["period"])]
    near, others = _near(workspace, config, period, row["campaign"])
    origins, totals = _origins(workspace, config, own["src"].unique().to_numpy())
    counts = ("sources", "networks", "sequences", "flows", "destinations", "labelled", "known")
    facts = {
        "period": period,
        "first flow": words.instant(row["first"]),
        "last flow": words.instant(row["last"]),
        **{name: row[name] for name in counts},
        "median gap": words.duration(row["median_gap_us"]),
        "cohesion": row["cohesion"],
        "flows over time": _timeline(activity(sequences, own, period, top=1, step_us=step_us), step_us),
        "marks": {words.TOOLS[name]: row[name] for name in words.TOOLS if row[name] is not None},
        "ports": _shares(row),
        "labels": _sources_by(row["labels"], "label"),
        "scanners": _sources_by(row["scanners"], "organisation"),
        **origins,
        "nearest": near,
        "examples": [words.address(src) for src in row["examples"] or ()],
    }
    totals |= {"labels": pc.count_distinct(sequences["label"].drop_null()).as_py(), "nearest": others}
    totals |= {"examples": row["sources"]}
    if len(own) > 1:
        (item,) = details(sequences, own, period, 1).to_pylist()
        facts |= _details(item, config.report.show_sources)
        totals |= {"ports": item["distinct_ports"], "largest networks": item["slash16"]}
        totals |= {"typical sequences": row["sequences"], "destination networks": _targets(sequences)}
    if not config.report.show_sources:
        hidden = ("examples", "largest networks", "destination networks")
        facts = {name: value for name, value in facts.items() if name not in hidden}
        facts["withheld"] = "addresses and networks (report.show_sources is false)"
    facts["of"] = {name: n for name, n in totals.items() if name in facts}
    return facts


def _sequences(workspace: Workspace, period: str, ids: pa.Array) -> pa.Table:
    table = workspace.table("sequences")
    parts = [
        rows.filter(pc.is_in(rows["sequence_id"], value_set=ids))
        for rows in (table.read_files([file]) for file in table.files({"period": period}))
    ]
    return pa.concat_tables(parts)


def _timeline(steps: pa.Table, step_us: int) -> dict[str, Any]:
    """Flows in each step from the first with any to the last."""
    start = steps["start"].cast(pa.int64()).to_numpy() // step_us
    flows = np.zeros(int(start[-1] - start[0]) + 1, np.int64)
    flows[start - start[0]] = steps["flows"].to_numpy()
    return {
        "from": words.instant(steps["start"][0].as_py()),
        "each": words.duration(step_us),
        "flows": flows.tolist(),
    }


def _origins(
    workspace: Workspace, config: RunConfig, src: NDArray[np.int64]
) -> tuple[dict[str, dict[str, int]], dict[str, int]]:
    """The places that most of the sources lie in, by the title of their kind; and how many there are."""
    found, totals = {}, {}
    for title, names_of in places(workspace, config).namers().items():
        names = pa.chunked_array([names_of(src).drop_null()])
        found[title] = dict(_counted(names, _SHOWN))
        totals[title] = pc.count_distinct(names).as_py()
    return found, totals


def _targets(sequences: pa.Table) -> int:
    """Distinct /24 of the destinations."""
    dst = pc.list_flatten(sequences["dst"]).drop_null().to_numpy()
    return len(np.unique(dst[dst != schema.MISSING] >> 8))


def _details(item: dict[str, Any], shown: bool) -> dict[str, Any]:
    """What sequences together tell; sources are named beside theirs if `shown`."""
    return {
        "distinct ports": item["distinct_ports"],
        "networks /16": item["slash16"],
        "networks /8": item["slash8"],
        "largest networks": {words.network(n["network"], 16): n["sources"] for n in item["networks16"]},
        "destination networks": {words.network(n["network"], 24): n["share"] for n in item["targets"]},
        "flows by hour of the day": item["hours"],
        "typical sequences": [
            f"{words.address(one['src'])}: {one['text']}" if shown else one["text"] for one in item["said"]
        ],
    }


def _near(workspace: Workspace, config: RunConfig, period: str, name: str) -> tuple[dict[str, float], int]:
    """The nearest campaigns of a period, with the mean similarity of their sequences; how many there are."""
    rows = workspace.table("campaigns").read(
        {"run": config.run, "period": period}, ["campaign", "cluster", "feature_sum", "size"]
    )
    large = pc.or_(pc.greater(rows["size"], 1), pc.equal(rows["campaign"], name))
    rows = rows.filter(pc.and_(pc.is_valid(rows["cluster"]), large))
    place = rows["campaign"].to_pylist().index(name)
    sums = rows["feature_sum"].combine_chunks().flatten().to_numpy().reshape(rows.num_rows, -1)
    found = nearest_to(place, sums, rows["size"].to_numpy().astype(float))
    return {rows["campaign"][at].as_py(): similarity for at, similarity in found}, rows.num_rows - 1


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
        "labels": {str(name): int(n) for name, n in _counted(flows["label"].drop_null(), _SHOWN)},
        **_origin(workspace, config, src),
        "marks": _marks(flows),
        "sequences": sequences.num_rows,
        "campaigns": _campaigns(workspace, config, src),
        "last sequences": [
            words.sequence(row)
            for row in sequences.sort_by("start").slice(max(sequences.num_rows - _LAST, 0)).to_pylist()
        ],
    }
    found["of"] = {
        "ports": flows.group_by(["proto", "dst_port"]).aggregate([]).num_rows,
        "labels": pc.count_distinct(flows["label"].drop_null()).as_py(),
        "last sequences": sequences.num_rows,
    }
    if raw:
        found["scanner lists"] = [
            {name: str(value) for name, value in row.items()}
            for row in lists.lookup(workspace, config, address, None)
        ]
    return found


def _origin(workspace: Workspace, config: RunConfig, src: int) -> dict[str, str | None]:
    """Where a source lies, by the title of the kind of place."""
    return {
        title: names_of(np.array([src], np.int64))[0].as_py()
        for title, names_of in places(workspace, config).namers().items()
    }


def _of(workspace: Workspace, table: str, where: dict[str, int], src: int) -> pa.Table:
    """The rows of a source; its bucket says where they are."""
    rows = workspace.table(table)
    parts = [
        part.filter(pc.equal(part["src"], src))
        for part in (rows.read_files([file]) for file in rows.files(where))
    ]
    return pa.concat_tables(parts) if parts else rows.schema.empty_table()


def _counted(column: pa.ChunkedArray, limit: int) -> list[tuple[Any, int]]:
    counts = [(item["values"], item["counts"]) for item in pc.value_counts(column).to_pylist()]
    return sorted(counts, key=lambda item: (-item[1], str(item[0])))[:limit]


def _ports(flows: pa.Table) -> dict[str, float]:
    """The commonest ports with their share of flows."""
    rows = flows.group_by(["proto", "dst_port"], use_threads=False).aggregate([([], "count_all")])
    order = [("count_all", "descending"), ("proto", "ascending"), ("dst_port", "ascending")]
    found = rows.sort_by(order).slice(0, _SHOWN).to_pylist()
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
        rows = rows.filter(pc.is_in(rows["cluster"], value_set=pa.array([c for c, _ in own], pa.int64())))
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
