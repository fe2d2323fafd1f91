"""The report: everything known about a run, as one HTML file that needs no network and no other file.

Read top down it says what was read, which campaigns there are, where their sequences lie, how they went
over the periods, how far to trust them, and what made them. Small tables are written here, so that they can
be read and printed without JavaScript; the table of campaigns, which may have thousands of rows, their
details and all plots are drawn in the browser from blocks of JSON. Every text from the data is escaped by
the template or by `plots.block`, and the page's policy lets only its own scripts run, by hash. The price of a
single file is plotly inside it, some 4.8 MB.
"""

from __future__ import annotations

from dataclasses import replace
from datetime import datetime
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from rayscan import schema
from rayscan.errors import SchemaError
from rayscan.evaluation.table import bounded
from rayscan.report import history, html, plots, words
from rayscan.report.comparison import told
from rayscan.report.data import TABLES, ReportData

MAX_CAPTURES = 200
MAX_REASONS = 50
MAX_LINES = 40
MAX_PERIODS = 12
SCRIPTS = ("charts.js", "table.js", "map.js", "report.js")
PART_NOTES = {
    "validation": "Threshold and checkpoint were chosen on these sources, so the figures flatter.",
    "unseen sources, new networks": "Unseen sources in whose /24 no source was trained on.",
    "unseen sources, later": "Sequences of unseen sources that begin after the last one that was trained on.",
}
METHODS = {"model": "Model", "ports": "Port floor", "random": "Random floor"}
SCORES = {
    "auroc": "AUROC",
    "average_precision": "average precision",
    "r_at_1": "retrieval@1",
    "r_at_1_macro": "retrieval@1, mean over sources",
}

KNN = "{}-nearest-neighbour macro-F1"
SEED_SCORES = SCORES | {f"knn_macro_f1@{k}": KNN.format(k) for k in (1, 5)}  # of `seeds.across`


def render(data: ReportData) -> str:
    """The page as text, to be written as UTF-8. Raises SchemaError if a table lacks a column."""
    _check(data)
    shown = pc.is_in(data.campaigns["period"], value_set=data.periods["period"].combine_chunks())
    data = replace(data, campaigns=history.with_change(data.campaigns).filter(shown))
    listed = listed_campaigns(data.campaigns, data.max_clusters)
    section = _campaign_section(data, listed)
    return html.page(
        "report.html",
        SCRIPTS,
        data=data,
        block=plots.block(
            {
                **plots.payload(data, listed),
                "flags": {name: section[name] for name in ("labels", "scanners", "tools")},
            }
        ),
        details=plots.block(plots.details(data, listed)),
        drawn_from=_drawn_from(data),
        verdict=verdict(data),
        read=_read_section(data),
        campaigns=section,
        history=_history_section(data),
        trust=_trust_section(data.evaluation),
        seeds=_seeds_section(data),
        comparison=_comparison_section(data.comparison),
    )


def _seeds_section(data: ReportData) -> dict[str, Any] | None:
    """How far figures move with the seed of training: those that some row has, with their titles."""
    if data.seeds is None or not data.seeds["rows"]:
        return None
    rows = data.seeds["rows"]
    titles = {key: title for key, title in SEED_SCORES.items() if any(key in row for row in rows)}
    other = data.seeds["config_hash"] != data.config_hash
    return {"rows": rows, "titles": titles, "seeds": data.seeds["seeds"], "other_settings": other}


def _comparison_section(comparison: dict[str, Any] | None) -> dict[str, Any] | None:
    if comparison is None or not comparison["rows"]:
        return None
    return {**comparison, "headings": told(comparison["rows"], comparison["headings"])}


def _drawn_from(data: ReportData) -> list[str]:
    """The periods the map was drawn from, where other periods are shown on it."""
    names, shown = data.drawn_from, data.periods["period"].to_pylist()
    if set(shown) <= set(names) or not names:
        return []
    return names if len(names) < 4 else [f"{len(names)} periods from {names[0]} to {names[-1]}"]


def _check(data: ReportData) -> None:
    for name, columns in TABLES.items():
        table = getattr(data, name)
        absent = [] if table is None else [c for c in columns if c not in table.column_names]
        if absent:
            raise SchemaError(f"report: table {name} lacks {', '.join(absent)}; it has {table.column_names}")
    version = (data.evaluation or {}).get("version", 1)
    if version != 1:
        raise SchemaError(f"report: evaluation of layout version {version}, but this rayscan reads version 1")


# ---------------------------------------------------------------------------------------------
# The verdict
# ---------------------------------------------------------------------------------------------


def verdict(data: ReportData) -> list[dict[str, str]]:
    """Sentences for the top of the page, each with a tone: "plain", "good" or "bad"."""
    found = [_what_is_there(data), _what_was_lost(data), _how_far_to_trust(data.evaluation)]
    return [*found, _sentence(data.misfit, "bad")] if data.misfit else found


def _sentence(text: str, tone: str = "plain") -> dict[str, str]:
    return {"text": text, "tone": tone}


def _what_is_there(data: ReportData) -> dict[str, str]:
    periods = data.periods.num_rows
    sources = words.count(_sum(data.periods, "sources"), "source")
    if not periods:
        return _sentence("Nothing was read: no period holds a flow.", "bad")
    over = f"in {data.periods['period'][0].as_py()}" if periods == 1 else f"summed over {periods} periods"
    if not data.campaigns.num_rows:
        return _sentence(f"{sources} {over}, and no campaigns: nothing was clustered.", "bad")
    alone = _alone(data.campaigns)
    tail = f"; {words.count(alone, 'sequence')} stayed alone" if alone else ""
    return _sentence(f"{sources} {over}, in {words.count(_groups(data.campaigns), 'campaign')}{tail}.")


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
        return _sentence("Nothing was evaluated: how far these campaigns can be trusted is unknown.", "bad")
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


def _groups(campaigns: pa.Table) -> int:
    """Campaigns, each counted once, that had two sequences or more in some period."""
    return int(pc.count_distinct(_grouped(campaigns)["campaign"]).as_py())


def _grouped(campaigns: pa.Table) -> pa.Table:
    return campaigns.filter(pc.greater(campaigns["sequences"], 1))


def _alone(campaigns: pa.Table) -> int:
    return int(campaigns.filter(pc.equal(campaigns["sequences"], 1)).num_rows)


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
    sequences, grouped = _sum(data.periods, "sequences"), _sum(data.campaigns, "sequences")
    alone = _alone(data.campaigns)
    return [
        ("Rows in the captures", rows, None),
        ("Rows that could not be read", rejected, rows),
        ("Rows left out", left_out, rows),
        ("Flows in the periods below", flows, None),
        ("Flows of sources too quiet for a sequence", dropped, flows),
        ("Sequences", sequences, None),
        ("Sequences in campaigns", grouped - alone, sequences),
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


def listed_campaigns(campaigns: pa.Table, limit: int) -> pa.Table:
    """The rows that are shown: of two sequences or more, those with the most sources first."""
    keys = [("sources", "descending"), ("sequences", "descending")]
    order = [*keys, ("period", "ascending"), ("cluster", "ascending")]
    return _grouped(campaigns).sort_by(order).slice(0, limit)


def _campaign_section(data: ReportData, listed: pa.Table) -> dict[str, Any]:
    campaigns = data.campaigns
    there = campaigns.filter(pc.is_valid(campaigns["cluster"]))
    tools = [t for t in schema.FINGERPRINTS if there[t].null_count < there.num_rows]
    return {
        "rows": listed.num_rows,
        "left": _grouped(campaigns).num_rows - listed.num_rows,
        "alone": _alone(campaigns),
        "labels": bool(_sum(campaigns, "labelled")),
        "tools": tools,
        "cautions": [text for tool in tools if (text := words.caution(tool, *_span(data.captures)))],
        "scanners": there["known"].null_count < there.num_rows,
        "days_off": pc.max(campaigns["days_off"]).as_py() or 0,
        "lists": data.lists.to_pylist() if data.lists is not None else None,
    }


def _history_section(data: ReportData) -> dict[str, Any]:
    """The last periods, and the largest campaigns in each of them."""
    periods = data.periods["period"].to_pylist()[-MAX_PERIODS:]
    lines = history.timeline(data.campaigns, periods, MAX_LINES)
    short = history.short_names(data.campaigns)
    sizes = [cell["sources"] for line in lines for cell in line.cells if cell is not None]
    total = pc.count_distinct(_grouped(data.campaigns)["campaign"]).as_py()
    return {
        "periods": periods,
        "earlier": data.periods.num_rows - len(periods),
        "lines": lines,
        "left": total - len(lines),
        "most": max([*sizes, 1]),
        "short": short,
        "newest": _newest(data.campaigns),
        "least": history.LEAST,
    }


def _newest(campaigns: pa.Table) -> dict[str, str] | None:
    """What became of campaigns in the last period, in words."""
    events = history.events(campaigns)
    if not events:
        return None
    period = events[-1].pop("period")
    happened = [f"{words.number(n)} {event}" for event, n in events[-1].items() if n]
    return {"period": period, "told": words.listed(happened) if happened else "no campaign"}


def _span(captures: pa.Table) -> tuple[datetime | None, datetime | None]:
    """Times of the first and the last flow."""
    return pc.min(captures["first"]).as_py(), pc.max(captures["last"]).as_py()


def _trust_section(evaluation: dict[str, Any] | None) -> dict[str, Any] | None:
    if evaluation is None:
        return None
    groups = {name: part for name, part in evaluation.get("groups", {}).items() if part is not None}
    parts = {**evaluation["parts"], **groups}
    present = [m for m in METHODS if any(m in part["methods"] for part in parts.values())]
    return {
        "methods": [METHODS[m] for m in present],
        "notes": PART_NOTES,
        "calibrations": [item["part"] for item in plots.calibrations(evaluation)],
        "sweep": (evaluation.get("threshold") or {}).get("sweep"),
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
    """Figures on pairs of different sources, then on those of different networks alone."""
    labels = part.get("labels") or {}
    kinds = (("same label", "methods"), ("same label, other networks (/24)", "across_networks"))
    return [
        {"by": title, **row}
        for title, kind in kinds
        if labels.get(kind)
        for row in _scores_by_label(labels[kind], methods)
    ]


def _scores_by_label(scored: dict[str, Any], methods: list[str]) -> list[dict[str, Any]]:
    keys = {k: SCORES[k] for k in ("auroc", "average_precision")}
    rows = [{"score": title, "cells": _cells(scored, methods, key)} for key, title in keys.items()]
    inner = {name: method.get("knn_macro_f1", {}) for name, method in scored.items()}
    for k in dict.fromkeys(k for figures in inner.values() for k in figures):
        rows.append({"score": KNN.format(k), "cells": _cells(inner, methods, k)})
    return rows


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
        for by, kind in (("source", "join"), ("label", "join_across_sources")):
            found = item.get(f"by_{by}")
            if found:
                ends = found.get("intervals", {})
                cells = [bounded(found.get(name), ends.get(name)) for name in ("ari", "ami", "v_measure")]
                pairs, ends = found.get(kind) or {}, ends.get(kind, {})
                cells += [bounded(pairs.get(name), ends.get(name)) for name in ("precision", "recall", "f1")]
                shown = {name: found[name] for name in ("sequences", "groups")}
                rows.append({**shown, "period": period, "by": by, "cells": cells})
    return rows
