"""The report: everything known about a run, as one HTML file that needs no network and no other file.

Read top down it says what was read, which clusters there are, where their sequences lie, how far to trust
them, and what made them. Tables are written here, so that they can be read and printed without JavaScript;
plots and the details of a cluster are drawn in the browser from one block of JSON. Every text from the data
is escaped by the template or by `plots.block`, and the page's policy lets only its own scripts run, by
hash. The price of a single file is plotly inside it, some 4.8 MB.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import datetime
from importlib import resources
from typing import Any

import jinja2
import pyarrow as pa
import pyarrow.compute as pc
from markupsafe import Markup

from rayscan import schema
from rayscan.errors import SchemaError
from rayscan.report import plots, words
from rayscan.report.summary import ACTIVITY, SUMMARY

MAX_CAPTURES = 200
MAX_REASONS = 50
PERIODS = pa.schema(
    [
        pa.field("period", pa.string(), nullable=False),
        pa.field("flows", pa.int64(), nullable=False),
        pa.field("sources", pa.int64(), nullable=False),  # distinct, of all flows
        pa.field("sequences", pa.int64(), nullable=False),
        pa.field("dropped_flows", pa.int64(), nullable=False),  # in no sequence
    ]
)
TABLES = {
    "captures": schema.CAPTURES.names,
    "rejects": schema.REJECTS.names,
    "periods": PERIODS.names,
    "clusters": SUMMARY.names,
    "activity": ACTIVITY.names,
    "training": ["step", "loss", "learning_rate", "separation"],
    "points": ["x", "y", "period", "cluster", "src", "label", "port"],
}
METHODS = {"model": "Model", "ports": "Port floor", "random": "Random floor"}
SCORES = {
    "auroc": "AUROC",
    "average_precision": "average precision",
    "r_at_1": "retrieval@1",
    "r_at_1_macro": "retrieval@1, mean over sources",
}


@dataclass(frozen=True)
class ReportData:
    """What the page is made of. Tables may have no rows; None means that the part was never made."""

    title: str
    generated: datetime  # with a time zone
    run: str
    config_yaml: str
    config_hash: str
    versions: dict[str, str]
    captures: pa.Table  # schema.CAPTURES
    rejects: pa.Table  # schema.REJECTS
    periods: pa.Table  # PERIODS
    clusters: pa.Table  # summary.SUMMARY, all periods
    activity: pa.Table  # summary.ACTIVITY
    evaluation: dict[str, Any] | None = None  # as rayscan.evaluation writes it, version 1
    training: pa.Table | None = None  # step, loss, learning_rate, separation (nullable)
    # value (similarity), how ("auto" or "given"), calibration: None or the fields of a Calibration
    threshold: dict[str, Any] = field(default_factory=dict)
    points: pa.Table | None = None  # x, y, period, cluster, src, label, port (text or number)
    show_sources: bool = True
    max_clusters: int = 500
    # list, source, networks, organisations, valid_from, valid_to; None: addresses are pseudonyms
    lists: pa.Table | None = field(default_factory=lambda: pa.table({"list": []}))
    tolerance_days: int = 0  # outside an entry's dates on which it counted
    origins: dict[str, pa.Table] = field(default_factory=dict)  # by title: period, cluster, names (of LABEL)


def render(data: ReportData) -> str:
    """The page as text, to be written as UTF-8. Raises SchemaError if a table lacks a column."""
    _check(data)
    listed = _listed(data.clusters, data.max_clusters)
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("rayscan.report"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals["words"] = words
    scripts = [_plotly(), _read("map.js"), _read("report.js")]
    return environment.get_template("report.html").render(
        data=data,
        style=Markup(_read("report.css")),
        scripts=[Markup(script) for script in scripts],
        policy=_policy(scripts),
        block=plots.block(plots.payload(data, listed)),
        verdict=verdict(data),
        read=_read_section(data),
        clusters=_cluster_section(data, listed),
        trust=_trust_section(data.evaluation),
    )


def _check(data: ReportData) -> None:
    for name, columns in TABLES.items():
        table = getattr(data, name)
        absent = [] if table is None else [c for c in columns if c not in table.column_names]
        if absent:
            raise SchemaError(f"report: table {name} lacks {', '.join(absent)}; it has {table.column_names}")
    version = (data.evaluation or {}).get("version", 1)
    if version != 1:
        raise SchemaError(f"report: evaluation of layout version {version}, but this rayscan reads version 1")


def _read(name: str) -> str:
    return (resources.files("rayscan.report") / "templates" / name).read_text("utf-8")


def _plotly() -> str:
    from plotly.offline import get_plotlyjs  # slow to import, and only needed here

    return str(get_plotlyjs()).replace("\r\n", "\n")


def _policy(scripts: Iterable[str]) -> str:
    """Content security policy: no network, no script but these. Stricter than allowing inline scripts."""
    hashes = (base64.b64encode(hashlib.sha256(s.encode()).digest()).decode() for s in scripts)
    allowed = " ".join(f"'sha256-{h}'" for h in hashes)
    return (
        f"default-src 'none'; script-src {allowed}; style-src 'unsafe-inline'; img-src data: blob:; "
        "connect-src 'none'; base-uri 'none'; form-action 'none'"
    )


# ---------------------------------------------------------------------------------------------
# The verdict
# ---------------------------------------------------------------------------------------------


def verdict(data: ReportData) -> list[dict[str, str]]:
    """Sentences for the top of the page, each with a tone: "plain", "good" or "bad"."""
    return [_what_is_there(data), _what_was_lost(data), _how_far_to_trust(data.evaluation)]


def _sentence(text: str, tone: str = "plain") -> dict[str, str]:
    return {"text": text, "tone": tone}


def _what_is_there(data: ReportData) -> dict[str, str]:
    periods = data.periods.num_rows
    sources = words.count(_sum(data.periods, "sources"), "source")
    if not periods:
        return _sentence("Nothing was read: no period holds a flow.", "bad")
    over = f"in {data.periods['period'][0].as_py()}" if periods == 1 else f"summed over {periods} periods"
    if not data.clusters.num_rows:
        return _sentence(f"{sources} {over}, and no clusters: nothing was clustered.", "bad")
    groups, alone = _groups(data.clusters), _alone(data.clusters)
    tail = f"; {words.count(alone, 'sequence')} stayed alone" if alone else ""
    return _sentence(f"{sources} {over}, in {words.count(groups, 'cluster')} of two sequences or more{tail}.")


def _what_was_lost(data: ReportData) -> dict[str, str]:
    kept, rejected, left_out = (_sum(data.captures, name) for name in ("flows", "rejects", "left_out"))
    rows = kept + rejected + left_out
    unread, cut = len(_files_lost(data, "file")), len(_files_lost(data, "rest"))
    files = f" {words.count(unread, 'file')} could not be read at all." if unread else ""
    files += f" {words.count(cut, 'file')} could be read in part only." if cut else ""
    if not rows:
        return _sentence(f"No rows were read.{files}", "bad")
    of = words.count(rows, "row")
    text = (
        f"{words.ratio(rejected, rows)} of {of} could not be read"
        if rejected
        else f"All of {of} could be read"
    )
    text += f", {words.ratio(left_out, rows)} were left out.{files}" if left_out else f".{files}"
    return _sentence(text, "bad" if unread or cut or rejected > 0.05 * rows else "plain")


def _how_far_to_trust(evaluation: dict[str, Any] | None) -> dict[str, str]:
    if evaluation is None:
        return _sentence("Nothing was evaluated: how far these clusters can be trusted is unknown.", "bad")
    methods = evaluation["parts"].get("unseen sources", {}).get("methods", {})
    model, floor = (methods.get(name, {}).get("auroc") or {} for name in ("model", "ports"))
    if model.get("value") is None:
        return _sentence("The model could not be scored on unseen sources: see why below.", "bad")
    score = f"Same-source AUROC on unseen sources is {_with_interval(model)}"
    if floor.get("value") is None:
        return _sentence(f"{score}; the port floor, which would put it in proportion, is missing.", "bad")
    score += f", against {_with_interval(floor)} for the port floor: "
    if model["value"] <= floor["value"]:
        return _sentence(score + "no better than counting ports.", "bad")
    if None in (model.get("low"), floor.get("high")):
        return _sentence(score + "above it, by a margin of unknown uncertainty.")
    if model["low"] <= floor["high"]:
        return _sentence(score + "above it, but the intervals overlap.")
    return _sentence(score + "clearly above it.", "good")


def _with_interval(item: dict[str, Any]) -> str:
    bounds = words.interval(item)
    return words.figure(item["value"]) + (f" ({bounds})" if bounds else "")


def _sum(table: pa.Table, column: str) -> int:
    return int(pc.sum(table[column]).as_py() or 0)


def _groups(clusters: pa.Table) -> int:
    return _sum(pa.table({"n": pc.greater(clusters["sequences"], 1)}), "n")


def _alone(clusters: pa.Table) -> int:
    return int(clusters.num_rows) - _groups(clusters)


def _files_lost(data: ReportData, lost: str) -> set[str]:
    """Paths of the files that were lost as a whole ("file") or from some place on ("rest")."""
    return set(data.rejects.filter(pc.equal(data.rejects["lost"], lost))["path"].to_pylist())


# ---------------------------------------------------------------------------------------------
# Sections
# ---------------------------------------------------------------------------------------------


def _read_section(data: ReportData) -> dict[str, Any]:
    unread, cut = _files_lost(data, "file"), _files_lost(data, "rest")
    state = {**dict.fromkeys(cut, "in part"), **dict.fromkeys(unread, "not read")}
    captures = data.captures.sort_by([("rejects", "descending"), ("path", "ascending")]).to_pylist()
    captures.sort(key=lambda row: row["path"] not in state)  # stable: the damaged ones come first
    reasons = _reasons(data.rejects)
    return {
        "steps": _steps(data),
        "periods": data.periods.to_pylist(),
        "captures": captures[:MAX_CAPTURES],
        "captures_left": max(len(captures) - MAX_CAPTURES, 0),
        "state": state,
        "reasons": reasons[:MAX_REASONS],
        "reasons_left": max(len(reasons) - MAX_REASONS, 0),
        "unread": len(unread),
        "cut": len(cut),
    }


def _steps(data: ReportData) -> list[tuple[str, int, int | None]]:
    """Rows from the captures to the clusters: what, how many, and out of how many."""
    kept, rejected, left_out = (_sum(data.captures, name) for name in ("flows", "rejects", "left_out"))
    rows = kept + rejected + left_out
    flows, dropped = _sum(data.periods, "flows"), _sum(data.periods, "dropped_flows")
    sequences, grouped = _sum(data.periods, "sequences"), _sum(data.clusters, "sequences")
    alone = _alone(data.clusters)
    return [
        ("Rows in the captures", rows, None),
        ("Rows that could not be read", rejected, rows),
        ("Rows left out", left_out, rows),
        ("Flows in the periods below", flows, None),
        ("Flows of sources too quiet for a sequence", dropped, flows),
        ("Sequences", sequences, None),
        ("Sequences in clusters of two or more", grouped - alone, sequences),
        ("Sequences that stayed alone", alone, sequences),
        ("Sequences that were not clustered", sequences - grouped, sequences),
    ]


def _reasons(rejects: pa.Table) -> list[dict[str, Any]]:
    """Rejects by reason with the first place of each: first what cost files, then what cost most rows.

    The count is of rows (or values), and None where a file or its rest was lost.
    """
    of_rows = pc.is_in(rejects["lost"], value_set=pa.array(["rows", "left out", "values"]))
    counted = rejects.set_column(
        rejects.schema.get_field_index("count"), "count", pc.if_else(of_rows, rejects["count"], None)
    )
    by = counted.group_by("reason", use_threads=False)
    what = [("count", "sum"), ("path", "count_distinct"), ("path", "first"), ("offset", "first")]
    order = [("count_sum", "descending"), ("reason", "ascending")]
    found = by.aggregate(what).sort_by(order).to_pylist()
    return sorted(found, key=lambda item: item["count_sum"] is not None)


def _listed(clusters: pa.Table, limit: int) -> pa.Table:
    """The clusters that get a row: of two sequences or more, those with the most sources first."""
    groups = clusters.filter(pc.greater(clusters["sequences"], 1))
    keys = [("sources", "descending"), ("sequences", "descending")]
    return groups.sort_by([*keys, ("period", "ascending"), ("cluster", "ascending")]).slice(0, limit)


def _cluster_section(data: ReportData, listed: pa.Table) -> dict[str, Any]:
    tools = [t for t in schema.FINGERPRINTS if data.clusters[t].null_count < data.clusters.num_rows]
    return {
        "rows": listed.to_pylist(),
        "left": _groups(data.clusters) - listed.num_rows,
        "alone": _alone(data.clusters),
        "periods": data.clusters["period"].unique().sort().to_pylist(),
        "labels": bool(_sum(data.clusters, "labelled")),
        "tools": tools,
        "cautions": [text for tool in tools if (text := words.caution(tool, *_span(data.captures)))],
        "scanners": data.clusters["known"].null_count < data.clusters.num_rows,
        "days_off": pc.max(data.clusters["days_off"]).as_py() or 0,
        "lists": data.lists.to_pylist() if data.lists is not None else None,
    }


def _span(captures: pa.Table) -> tuple[datetime | None, datetime | None]:
    """Times of the first and the last flow."""
    return pc.min(captures["first"]).as_py(), pc.max(captures["last"]).as_py()


def _trust_section(evaluation: dict[str, Any] | None) -> dict[str, Any] | None:
    if evaluation is None:
        return None
    parts = evaluation["parts"]
    present = [m for m in METHODS if any(m in part["methods"] for part in parts.values())]
    return {
        "methods": [METHODS[m] for m in present],
        "parts": [
            {"name": name, **part, "scores": [*_by_source(part, present), *_by_label(part, present)]}
            for name, part in parts.items()
        ],
        "agreement": _agreement(evaluation.get("clusters")),
        "not_computed": evaluation.get("not_computed", []),
    }


def _by_source(part: dict[str, Any], methods: list[str]) -> list[dict[str, Any]]:
    return [
        {"by": "same source", "score": title, "cells": _cells(part["methods"], methods, key)}
        for key, title in SCORES.items()
    ]


def _by_label(part: dict[str, Any], methods: list[str]) -> list[dict[str, Any]]:
    if not part.get("labels"):
        return []
    scored = part["labels"]["methods"]
    keys = {k: SCORES[k] for k in ("auroc", "average_precision")}
    rows = [{"score": title, "cells": _cells(scored, methods, key)} for key, title in keys.items()]
    inner = {name: method.get("knn_macro_f1", {}) for name, method in scored.items()}
    for k in dict.fromkeys(k for figures in inner.values() for k in figures):
        rows.append({"score": f"{k}-nearest-neighbour macro-F1", "cells": _cells(inner, methods, k)})
    return [{"by": "same label", **row} for row in rows]


def _cells(scored: dict[str, Any], methods: list[str], key: str) -> list[dict[str, Any]]:
    """One cell per method; the model's says so where it is not above the port floor."""
    figures = {m: scored.get(m, {}).get(key) or {"value": None} for m in methods}
    model, floor = (figures.get(m, {}).get("value") for m in ("model", "ports"))
    below = model is not None and floor is not None and model <= floor
    return [{**item, "below": below and m == "model"} for m, item in figures.items()]


def _agreement(clusters: dict[str, Any] | None) -> list[dict[str, Any]]:
    """Rows of how well clusters agree with sources and labels; pairs of one source tell nothing of labels."""
    rows = []
    for period, item in (clusters or {}).get("periods", {}).items():
        for by, pairs in (("source", "join"), ("label", "join_across_sources")):
            if item.get(f"by_{by}"):
                found = item[f"by_{by}"]
                unknown = {"precision": None, "recall": None, "f1": None}
                rows.append({**found, "period": period, "by": by, "pairs": found.get(pairs) or unknown})
    return rows
