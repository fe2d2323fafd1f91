"""What the page's tables, plots and details are drawn from: plain data for two blocks of JSON in the page.

One block holds what is shown at once, the other what opens under a campaign and is parsed when first asked
for. Both are columns, not rows, and the map is packed into base64, so that 5,000 campaigns and 200,000 points
take some ten megabytes. Texts are sent as they are and are made harmless where they are shown: the blocks
hold no `<`, `>` or `&`, the script sets text and never markup, and escapes what plotly would read as markup.
"""

from __future__ import annotations

import base64
import json
import math
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from markupsafe import Markup
from numpy.typing import NDArray

from rayscan import schema
from rayscan.report import history, words
from rayscan.report.data import TRAINING, ReportData

MAX_COLOURS = 10
MAX_SERIES = 6
TIME_STEPS = 10
NO_LABEL = "no label"
NO_SCANNER = "on no list"
NO_PORT = "no port"
SMALL = "alone, or in a campaign without a row"
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
    """What is shown at once. `listed` are the campaigns that have a row, in order; colours follow it."""
    short = history.short_names(data.campaigns)
    names = listed["campaign"].unique().to_pylist()
    place = {name: at for at, name in enumerate(names)}
    keys = _keys(listed)
    lines = _lines(data.activity, data.step_us // 1_000_000)
    return {
        "periods": data.periods["period"].to_pylist(),
        "campaigns": [short[name] for name in names],
        "ids": names,
        "table": _table(listed, place, short, lines),
        "step": data.step_us // 1_000_000,
        "sizes": _sizes(data.campaigns),
        "activity": _overview([place[name] for name in listed["campaign"].to_pylist()], keys, lines),
        "events": history.events(data.campaigns),
        "points": _points(data, keys, [place[name] for name in listed["campaign"].to_pylist()]),
        "similarity": _similarity(data.evaluation),
        "threshold": data.threshold.get("value"),
        "calibrations": calibrations(data.evaluation),
        "sweep": _sweep(data.evaluation),
        "training": None if data.training is None else data.training.select(TRAINING).to_pydict(),
    }


def _keys(table: pa.Table) -> list[_Key]:
    return list(zip(table["period"].to_pylist(), table["cluster"].to_pylist(), strict=True))


def _table(
    listed: pa.Table, place: dict[str, int], short: dict[str, str], lines: dict[_Key, Any]
) -> dict[str, list[Any]]:
    """The columns of the table of campaigns."""
    rows = listed.to_pylist()
    periods = listed["period"].to_pylist()
    columns: dict[str, list[Any]] = {
        "campaign": [place[row["campaign"]] for row in rows],
        "period": periods,
        "event": listed["became"].to_pylist(),
        "change": [words.change(row) for row in rows],
        "relative": [short.get(row["relative"] or "") for row in rows],
        "before": listed["sources_before"].to_pylist(),
        "first": [_seconds(row["began"]) for row in rows],
        "last": [_seconds(row["last"]) for row in rows],
        "ports": [_ports(row) for row in rows],
        "labels": [[[item["label"], item["sources"]] for item in row["labels"] or ()] for row in rows],
        "scanners": [
            [[item["organisation"], item["sources"]] for item in row["scanners"] or ()] for row in rows
        ],
        "cohesion": [_round(row["cohesion"], 4) for row in rows],
        "line": [lines.get(key) for key in _keys(listed)],
    }
    for name in ("sources", "sequences", "flows", "networks", "known"):
        columns[name] = listed[name].to_pylist()
    for name in schema.FINGERPRINTS:
        columns[name] = [_round(value, 6) for value in listed[name].to_pylist()]
    return columns


def _ports(row: dict[str, Any]) -> list[list[Any]]:
    return [[words.port(p["proto"], p["port"]), _round(p["share"], 4)] for p in row["ports"] or ()]


def _seconds(value: Any) -> int | None:
    return None if value is None else int(value.timestamp())


def _round(value: float | None, digits: int) -> float | None:
    return None if value is None else round(value, digits)


# ---------------------------------------------------------------------------------------------
# What opens under a campaign
# ---------------------------------------------------------------------------------------------


def details(data: ReportData, listed: pa.Table) -> dict[str, list[Any]]:
    """Columns in the order of `listed`; None in each where a campaign has no details.

    Without `data.show_sources` no address or network of sources or destinations is in them.
    """
    found = dict(zip(_keys(data.details), data.details.to_pylist(), strict=True))
    near = dict(zip(_keys(data.near), data.near["near"].to_pylist(), strict=True))
    places = {title: _by_cluster(table) for title, table in data.origins.items()}
    row_of = {key: at for at, key in enumerate(_keys(listed))}
    shown = data.show_sources
    columns: dict[str, list[Any]] = {}
    for key, row in zip(row_of, listed.to_pylist(), strict=True):
        item = found.get(key)
        one = {
            "lasted": words.span(row["first"], row["last"]),
            "gap": words.duration(row["median_gap_us"]),
            "destinations": row["destinations"],
            "labelled": row["labelled"],
            "examples": [words.address(src) for src in row["examples"] or ()] if shown else None,
            "origins": _origins(key, row["sources"], places),
            "near": _near(near.get(key) or (), key[0], row_of),
            **_detail(item, shown),
        }
        for name, value in one.items():
            columns.setdefault(name, []).append(value)
    return columns


def _detail(item: dict[str, Any] | None, shown: bool) -> dict[str, Any]:
    if item is None:
        return dict.fromkeys(("hours", "slash8", "slash16", "ports", "networks", "targets", "said"))
    networks = [[words.network(net["network"], 16), net["sources"]] for net in item["networks16"]]
    targets = [[words.network(net["network"], 24), _round(net["share"], 4)] for net in item["targets"]]
    return {
        "hours": item["hours"],
        "slash8": item["slash8"],
        "slash16": item["slash16"],
        "ports": item["distinct_ports"],
        "networks": networks if shown else None,
        "targets": targets if shown else None,
        "said": [[words.address(one["src"]) if shown else None, one["text"]] for one in item["said"]],
    }


def _near(found: Any, period: str, row_of: dict[_Key, int]) -> list[list[Any]]:
    """Rows of the table, with the mean similarity of their sequences to those of this one."""
    rows = [(row_of.get((period, one["cluster"])), one["similarity"]) for one in found]
    return [[row, _round(similarity, 3)] for row, similarity in rows if row is not None]


def _by_cluster(table: pa.Table) -> dict[_Key, list[dict[str, Any]]]:
    return dict(zip(_keys(table), table["names"].to_pylist(), strict=True))


def _origins(key: _Key, sources: int, places: dict[str, dict[_Key, list[dict[str, Any]]]]) -> list[Any]:
    """Title and names of each kind of place that the sources lie in, with their sources."""
    return [
        [title, [[item["label"], item["sources"]] for item in found[key]]]
        for title, found in places.items()
        if found.get(key)
    ]


# ---------------------------------------------------------------------------------------------
# Sizes and activity
# ---------------------------------------------------------------------------------------------


def _sizes(campaigns: pa.Table) -> dict[str, list[Any]]:
    """Clusters, and their sequences, by size in powers of two."""
    size = campaigns.filter(pc.is_valid(campaigns["cluster"]))["sequences"].to_numpy()
    step = np.floor(np.log2(np.maximum(size, 1))).astype(np.int64)
    n = int(step.max()) + 1 if len(step) else 0
    low = [2**i for i in range(n)]
    return {
        "low": low,
        "clusters": np.bincount(step, minlength=n).tolist(),
        "sequences": np.bincount(step, weights=size, minlength=n).astype(np.int64).tolist(),
    }


def _lines(activity: pa.Table, step: int) -> dict[_Key, list[int]]:
    """Of each cluster the time of its first step, in seconds since 1970, then the flows of every step.

    Under cluster None stand those of all clusters of the period that have no line of their own.
    """
    lines: dict[_Key, list[int]] = {}
    start = activity["start"].cast(pa.int64()).to_numpy() // 1_000_000
    columns = (*(activity[name].to_pylist() for name in ("period", "cluster", "flows")), start.tolist())
    for period, cluster, flows, time in zip(*columns, strict=True):
        line = lines.setdefault((period, cluster), [time])
        gap = (time - line[0]) // step - (len(line) - 1)
        line.extend([0] * gap)
        line.append(flows)
    return lines


def _overview(campaigns: list[int], keys: list[_Key], lines: dict[_Key, list[int]]) -> list[dict[str, Any]]:
    """The first campaigns as one series each over all periods, and all other flows together as the last one.

    A series is a list of lines as `_lines` makes them, which may overlap.
    """
    top = sorted(set(campaigns))[:MAX_SERIES]
    series: dict[int | None, list[list[int]]] = {campaign: [] for campaign in top}
    own = {key: campaign for key, campaign in zip(keys, campaigns, strict=True) if campaign in series}
    for key, line in lines.items():
        series.setdefault(own.get(key), []).append(line)
    rest = series.pop(None, [])
    found = [{"campaign": campaign, "lines": parts} for campaign, parts in series.items() if parts]
    return [*found, {"campaign": None, "lines": _added(rest)}] if rest else found


def _added(lines: list[list[int]]) -> list[list[int]]:
    """Lines of the same steps added up, one for each time that any of them begins at."""
    by_start: dict[int, NDArray[np.int64]] = {}
    for start, *flows in lines:
        have = by_start.get(start, np.zeros(0, np.int64))
        total = np.zeros(max(len(have), len(flows)), np.int64)
        total[: len(have)] += have
        total[: len(flows)] += flows
        by_start[start] = total
    return [[start, *flows.tolist()] for start, flows in sorted(by_start.items())]


# ---------------------------------------------------------------------------------------------
# The map
# ---------------------------------------------------------------------------------------------


def _points(data: ReportData, keys: list[_Key], campaigns: list[int]) -> dict[str, Any] | None:
    """Coordinates, and names and codes of each way to colour them, without points that are not finite."""
    points = data.points
    if points is None or not points.num_rows:
        return None
    finite = pc.and_(pc.is_finite(points["x"]), pc.is_finite(points["y"]))
    points, total = points.filter(finite), points.num_rows
    by = {"campaign": _campaign_codes(points, keys, campaigns)}
    if points["scanner"].null_count < points.num_rows:
        by["scanner"] = _categories(points["scanner"], NO_SCANNER)
    if points["label"].null_count < points.num_rows:
        by["label"] = _categories(points["label"], NO_LABEL)
    by["port"] = _categories(points["port"].cast(pa.string()), NO_PORT)
    by["time"] = _times(points["start"])
    return {
        "n": points.num_rows,
        "x": _packed(_scaled(points["x"].to_numpy(), points), "<u2"),
        "y": _packed(_scaled(points["y"].to_numpy(), points), "<u2"),
        "src": _packed(points["src"].to_numpy(), "<u4") if data.show_sources else None,
        "period": _categories(points["period"], None, ordered=True),
        "left": total - points.num_rows,
        "strange": int(pc.sum(points["strange"]).as_py() or 0),
        "by": by,
    }


def _packed(values: NDArray[Any], kind: str) -> str:
    """Little-endian numbers of one kind, in base64."""
    return base64.b64encode(np.ascontiguousarray(values.astype(kind)).tobytes()).decode()


def _scaled(values: NDArray[np.floating], points: pa.Table) -> NDArray[np.float64]:
    """Coordinates as numbers from 0 to 65535, both axes on the same scale."""
    both = [points[name].to_numpy() for name in ("x", "y")]
    side = max(float(np.ptp(axis)) for axis in both) if len(values) else 0.0
    middle = (values.min() + values.max()) / 2 if len(values) else 0.0
    return np.round(32767.5 + 65535 * (values.astype(np.float64) - middle) / (side or 1.0))


def _campaign_codes(points: pa.Table, keys: list[_Key], campaigns: list[int]) -> dict[str, Any]:
    """Codes are positions among the page's campaigns, report.max_clusters at most; then SMALL, NO_CLUSTER."""
    small = max(campaigns, default=-1) + 1
    of_key = dict(zip(keys, campaigns, strict=True))
    codes = [
        small + 1 if key[1] is None else of_key.get(key, small)
        for key in zip(points["period"].to_pylist(), points["cluster"].to_pylist(), strict=True)
    ]
    found = {"extra": [SMALL, NO_CLUSTER], "codes": _packed(np.array(codes), "<u2")}
    return {**found, "shown": min(MAX_COLOURS, small)}


def _categories(column: pa.ChunkedArray, last: str | None, ordered: bool = False) -> dict[str, Any]:
    """Names, for each row its position among them, and how many of the names have a colour.

    By falling frequency, or with `ordered` in their own order; `last`, which stands for null, at the end.
    """
    table = pa.table({"name": column}).group_by("name", use_threads=False).aggregate([("name", "count")])
    keys = [("name", "ascending")] if ordered else [("name_count", "descending"), ("name", "ascending")]
    names = table.sort_by(keys)["name"].drop_null().to_pylist()[: 2**16 - 2]
    codes = pc.fill_null(pc.index_in(column, value_set=pa.array(names, pa.string())), len(names)).to_numpy()
    coloured = min(MAX_COLOURS, len(names))
    more = [last] if last is not None and (codes == len(names)).any() else []
    return {"names": [*names, *more], "codes": _packed(codes, "<u2"), "shown": coloured}


def _times(column: pa.ChunkedArray) -> dict[str, Any]:
    """Equal steps from the first to the last time, named by the day (and hour) they begin on."""
    times = column.cast(pa.int64()).to_numpy()
    low, high = int(times.min()), int(times.max())
    width = max((high - low) / TIME_STEPS, 1.0)
    codes = np.minimum((times - low) / width, TIME_STEPS - 1).astype(np.int64)
    starts = np.array([low + i * width for i in range(TIME_STEPS)]).astype("datetime64[us]")
    unit = "D" if width >= 86_400_000_000 else "m"
    names = [str(start.astype(f"datetime64[{unit}]")).replace("T", " ") for start in starts]
    return {"names": names, "codes": _packed(codes, "<u2"), "shown": TIME_STEPS, "ordered": True}


# ---------------------------------------------------------------------------------------------
# Similarities
# ---------------------------------------------------------------------------------------------


def _similarity(evaluation: dict[str, Any] | None) -> list[dict[str, Any]]:
    """The model's histograms, one per part, by source and where scored by label."""
    found = []
    for part, item in _parts(evaluation).items():
        labels = (item.get("labels") or {}).get("methods", {}).get("model", {})
        for by, histogram in (("source", item.get("histograms")), ("label", labels.get("histograms"))):
            if histogram and sum(histogram["same"]) + sum(histogram["different"]):
                found.append({"part": part, "by": by, **histogram})
    return found


def _parts(evaluation: dict[str, Any] | None) -> dict[str, dict[str, Any]]:
    """The parts that were evaluated, the harder groups of them after the others."""
    found = evaluation or {}
    groups = {name: part for name, part in found.get("groups", {}).items() if part is not None}
    return {**found.get("parts", {}), **groups}


def calibrations(evaluation: dict[str, Any] | None) -> list[dict[str, Any]]:
    """Chances given against shares found, on each part but the one they were fitted on."""
    return [
        {"part": name, "bins": part["calibration"]["bins"], "error": part["calibration"]["error"]["value"]}
        for name, part in _parts(evaluation).items()
        if part.get("calibration") and name != "validation"
    ]


def _sweep(evaluation: dict[str, Any] | None) -> dict[str, Any] | None:
    """Of each threshold the number of clusters, and how well joins and cuts fit; the one that was chosen."""
    sweep = ((evaluation or {}).get("threshold") or {}).get("sweep")
    if sweep is None:
        return None
    rows = sweep["rows"]
    truth = {"source": "by_source", "label, other sources": "by_label_across_sources"}
    return {
        "chosen": sweep["chosen"],
        "threshold": [row["threshold"] for row in rows],
        "clusters": [row["clusters"] for row in rows],
        "scores": {
            by: {name: [row[key][name] for row in rows] for name in ("precision", "recall", "macro_f1")}
            for by, key in truth.items()
            if rows and rows[0][key] is not None
        },
    }
