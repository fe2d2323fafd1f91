"""What the plots and the details of a cluster are drawn from: plain data for one block of JSON in the page.

Texts are sent as they are and are made harmless where they are shown: the block itself holds no `<`, `>` or
`&`, the script sets text and never markup, and escapes what plotly would read as markup.
"""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from markupsafe import Markup
from numpy.typing import NDArray

from rayscan import schema
from rayscan.report import words

if TYPE_CHECKING:
    from rayscan.report.page import ReportData

MAX_COLOURS = 10
MAX_SERIES = 6
NO_LABEL = "no label"
NO_CLUSTER = "not clustered"
_Key = tuple[str, int | None]  # period, cluster


def block(payload: dict[str, Any]) -> Markup:
    """JSON that may stand inside a script element, whatever the texts in it."""
    text = json.dumps(_finite(payload), allow_nan=False, separators=(",", ":"))
    for sign in "<>&":
        text = text.replace(sign, f"\\u{ord(sign):04x}")
    return Markup(text)


def _finite(value: Any) -> Any:
    """The same with None in place of numbers that JSON does not know."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def payload(data: ReportData, listed: pa.Table) -> dict[str, Any]:
    """Everything the script needs. `listed` are the clusters that have a row, in order; colours follow it."""
    lines = _lines(data.activity)
    places = {title: _by_cluster(table) for title, table in data.origins.items()}
    named = list(zip(listed["period"].to_pylist(), listed["cluster"].to_pylist(), strict=True))
    return {
        "single": len(data.clusters["period"].unique()) < 2,
        "clusters": [
            {**_details(row, lines, data.show_sources), "origins": _origins(row, places)}
            for row in listed.to_pylist()
        ],
        "sizes": _sizes(data.clusters),
        "activity": _overview(named, lines),
        "points": _points(data.points, named, data.show_sources),
        "similarity": _similarity(data.evaluation),
        "threshold": data.threshold.get("value"),
        "calibration": (data.threshold.get("calibration") or {}).get("bins"),
        "training": None if data.training is None else data.training.to_pydict(),
    }


def _name(key: _Key) -> str:
    return f"{key[0]} / {key[1]}"


def _details(row: dict[str, Any], lines: dict[_Key, Any], show_sources: bool) -> dict[str, Any]:
    """What opens under a cluster's row."""
    facts = [
        ("First flow", words.instant(row["first"])),
        ("Last flow", words.instant(row["last"])),
        ("Time between", words.span(row["first"], row["last"])),
        ("Median gap between flows", words.duration(row["median_gap_us"])),
        ("Destinations", words.number(row["destinations"])),
        ("Networks (/24) of the sources", words.number(row["networks"])),
        ("Sources with a label", words.number(row["labelled"])),
        ("Sources on a scanner list", words.number(row["known"])),
    ]
    marks = [(words.TOOLS[name], row[name]) for name in schema.FINGERPRINTS if row[name] is not None]
    ports = [(words.port(p["proto"], p["port"]), p["share"]) for p in row["ports"] or ()]
    labels = [(item["label"], item["sources"]) for item in row["labels"] or ()]
    scanners = [(item["organisation"], item["sources"]) for item in row["scanners"] or ()]
    return {
        "name": _name((row["period"], row["cluster"])),
        "facts": facts,
        # bars: name, part of the whole, text
        "ports": [(name, share, words.percent(share)) for name, share in ports],
        "labels": [(name, n / row["sources"], words.number(n)) for name, n in labels],
        "scanners": [(name, n / row["sources"], words.number(n)) for name, n in scanners],
        "tools": [(name, share, words.percent(share)) for name, share in marks],
        "sources": row["sources"],
        "line": lines.get((row["period"], row["cluster"])),
        "examples": [words.address(src) for src in row["examples"] or ()] if show_sources else None,
    }


def _by_cluster(table: pa.Table) -> dict[_Key, list[dict[str, Any]]]:
    keys = zip(table["period"].to_pylist(), table["cluster"].to_pylist(), strict=True)
    return dict(zip(keys, table["names"].to_pylist(), strict=True))


def _origins(row: dict[str, Any], places: dict[str, dict[_Key, list[dict[str, Any]]]]) -> list[Any]:
    """Title and bars of each kind of place that the cluster's sources lie in."""
    key = (row["period"], row["cluster"])
    return [
        (title, [(i["label"], i["sources"] / row["sources"], words.number(i["sources"])) for i in found[key]])
        for title, found in places.items()
        if found.get(key)
    ]


def _sizes(clusters: pa.Table) -> dict[str, list[Any]]:
    """Clusters, and their sequences, by size in powers of two."""
    size = clusters["sequences"].to_numpy()
    step = np.floor(np.log2(np.maximum(size, 1))).astype(np.int64)
    n = int(step.max()) + 1 if len(step) else 0
    low = [2**i for i in range(n)]
    return {
        "low": low,
        "clusters": np.bincount(step, minlength=n).tolist(),
        "sequences": np.bincount(step, weights=size, minlength=n).astype(np.int64).tolist(),
    }


def _lines(activity: pa.Table) -> dict[_Key, dict[str, list[Any]]]:
    """Times and flows of each cluster, and under cluster None those of all others of the period."""
    lines: dict[_Key, dict[str, list[Any]]] = {}
    times = pc.strftime(activity["start"], format="%Y-%m-%dT%H:%M:%S").to_pylist()
    columns = (activity[name].to_pylist() for name in ("period", "cluster", "flows"))
    for period, cluster, flows, time in zip(*columns, times, strict=True):
        line = lines.setdefault((period, cluster), {"t": [], "n": []})
        line["t"].append(time)
        line["n"].append(flows)
    return lines


def _overview(named: list[_Key], lines: dict[_Key, dict[str, list[Any]]]) -> list[dict[str, Any]]:
    """The first listed clusters as one series each, all other flows together as the last one."""
    top = [key for key in named[:MAX_SERIES] if key in lines]
    rest: dict[str, int] = {}
    for key in lines.keys() - set(top):
        for time, flows in zip(lines[key]["t"], lines[key]["n"], strict=True):
            rest[time] = rest.get(time, 0) + flows
    series: list[dict[str, Any]] = [{"rank": named.index(key), **lines[key]} for key in top]
    times = sorted(rest)
    if rest:
        series.append({"rank": None, "t": times, "n": [rest[t] for t in times]})
    return series


# ---------------------------------------------------------------------------------------------
# The map
# ---------------------------------------------------------------------------------------------


def _points(points: pa.Table | None, named: list[_Key], show_sources: bool) -> dict[str, Any] | None:
    """Coordinates, and names and codes of each way to colour them, without points that are not finite."""
    if points is None or not points.num_rows:
        return None
    finite = pc.and_(pc.is_finite(points["x"]), pc.is_finite(points["y"]))
    points, total = points.filter(finite), points.num_rows
    clusters = pc.binary_join_element_wise(points["period"], points["cluster"].cast(pa.string()), " / ")
    clusters = pc.fill_null(clusters, NO_CLUSTER)
    label = pc.fill_null(points["label"], NO_LABEL)
    port = pc.fill_null(points["port"].cast(pa.string()), "no port")
    addresses = [words.address(src) for src in points["src"].to_pylist()] if show_sources else None
    return {
        "x": _rounded(points["x"].to_numpy()),
        "y": _rounded(points["y"].to_numpy()),
        "src": addresses,
        "left": total - points.num_rows,
        "by": {
            "cluster": _categories(clusters, [_name(key) for key in named[:MAX_COLOURS]], NO_CLUSTER),
            "label": _categories(label, last=NO_LABEL),
            "port": _categories(port),
            "period": _categories(points["period"]),
        },
    }


def _rounded(values: NDArray[np.floating]) -> list[float]:
    """Four digits more than the eye needs, and a third of the bytes."""
    scale = float(np.abs(values).max()) if len(values) else 0.0
    digits = 4 - math.ceil(math.log10(scale)) if scale > 0 else 0
    return list(np.round(values.astype(np.float64), digits).tolist())


def _categories(
    column: pa.ChunkedArray, leading: list[str] | None = None, last: str | None = None
) -> dict[str, Any]:
    """Names, for each row its position among them, and how many of the names have a colour.

    In order: `leading`, the only ones with a colour if given; the others by falling frequency; `last`.
    """
    table = pa.table({"name": column}).group_by("name", use_threads=False).aggregate([("name", "count")])
    common = table.sort_by([("name_count", "descending"), ("name", "ascending")])["name"].to_pylist()
    before = set(leading or ())
    others = [name for name in common if name not in before and name != last]
    names = [*(leading or ()), *others, *({last} & set(common))]
    codes = pc.index_in(column, value_set=pa.array(names, pa.string()))
    coloured = len(others) if leading is None else len(leading)
    return {"names": names, "codes": codes.to_pylist(), "shown": min(MAX_COLOURS, coloured)}


# ---------------------------------------------------------------------------------------------
# Similarities
# ---------------------------------------------------------------------------------------------


def _similarity(evaluation: dict[str, Any] | None) -> list[dict[str, Any]]:
    """The model's histograms, one per part, by source and where scored by label."""
    found = []
    for part, item in (evaluation or {}).get("parts", {}).items():
        labels = (item.get("labels") or {}).get("methods", {}).get("model", {})
        for by, histogram in (("source", item.get("histograms")), ("label", labels.get("histograms"))):
            if histogram and sum(histogram["same"]) + sum(histogram["different"]):
                found.append({"part": part, "by": by, **histogram})
    return found
