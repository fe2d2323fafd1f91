"""An evaluation as rows, and as tables for a terminal."""

from __future__ import annotations

from textwrap import wrap
from typing import Any

Found = dict[str, Any]
_COLUMNS = {
    "source": {
        "auroc": "AUROC",
        "average_precision": "average precision",
        "r_at_1": "R@1",
        "r_at_1_macro": "R@1 macro",
    },
    "label": {
        "auroc": "AUROC",
        "average_precision": "average precision",
        "knn_macro_f1@1": "1-NN macro F1",
        "knn_macro_f1@5": "5-NN macro F1",
    },
}


def as_rows(evaluation: Found) -> list[Found]:
    """One row for each part, kind of pair and method, with its figures by name.

    Pairs are of one "source", of one "label", or of one "label across networks" (`by`). Further keys: part,
    method, n_sequences, n_sources, then FIGUREs; the k-NN scores as "knn_macro_f1@5".
    """
    rows = []
    groups = {name: part for name, part in evaluation["groups"].items() if part is not None}
    for name, part in {**evaluation["parts"], **groups}.items():
        kinds = [("source", part, part["methods"])]
        if of := part["labels"]:
            kinds += [("label", of, of["methods"]), ("label across networks", of, of["across_networks"])]
        for by, of, methods in kinds:
            for method, scores in methods.items():
                row = {"part": name, "by": by, "method": method}
                row |= {"n_sequences": of["sequences"], "n_sources": of["sources"]}
                row |= {key: value for key, value in scores.items() if _is_figure(value)}
                row |= {f"knn_macro_f1@{k}": value for k, value in scores.get("knn_macro_f1", {}).items()}
                rows.append(row)
    return rows


def as_text(evaluation: Found) -> list[str]:
    """The same for a terminal, then clusters, threshold and calibration, then what was not computed."""
    lines: list[str] = []
    above = None
    for row in as_rows(evaluation):
        columns = _COLUMNS[row["by"].split()[0]]
        if (row["part"], row["by"]) != above:
            above = row["part"], row["by"]
            title = f"{row['part']}, by {row['by']}"
            lines.append(f"{title}: {row['n_sequences']:,} sequences of {row['n_sources']:,} sources")
            lines.append(f"  {'method':8}" + "".join(f"{column:>22}" for column in columns.values()))
        lines.append(f"  {row['method']:8}" + "".join(f"{_cell(row[key]):>22}" for key in columns))
    lines += _of_clusters(evaluation["clusters"]) + _of_threshold(evaluation)
    reasons: dict[str, list[str]] = {}
    for item in evaluation["not_computed"]:
        reasons.setdefault(item["why"], []).append(item["what"])
    for why, what in reasons.items():
        lines += wrap(f"not computed, {why}: {', '.join(what)}", 110, subsequent_indent="  ")
    return lines


def _of_clusters(clusters: Found | None) -> list[str]:
    """Agreement of each period's clusters with sources and labels."""
    lines = []
    for period, found in (clusters or {"periods": {}})["periods"].items():
        lines.append(f"{period}: {found['sequences']:,} sequences in {found['clusters']:,} clusters")
        lines.append(f"  {'':22}" + "".join(f"{name:>22}" for name in ("ARI", "V-measure", "join F1", "AMI")))
        for by, join, title in _AGREEMENT:
            if of := found[by]:
                ends = of["intervals"]
                figures = [bounded(of[name], ends.get(name)) for name in ("ari", "v_measure", "ami")]
                if join == "join_across_sources":  # the others know no pairs
                    figures = [bounded(None, None)] * 3
                figures.insert(2, bounded(of[join]["f1"], ends[join]["f1"]))
                lines.append(f"  {title:22}" + "".join(f"{_cell(figure):>22}" for figure in figures))
    return lines


_AGREEMENT = (
    ("by_source", "join", "with sources"),
    ("by_label", "join", "with labels"),
    ("by_label", "join_across_sources", "... of other sources"),
)


def bounded(value: float | None, ends: list[float] | None) -> Found:
    """A figure with its interval, which where sources are drawn again may lie beside it."""
    if value is None or ends is None:
        return {"value": value, "low": None, "high": None}
    return {"value": value, "low": min(ends[0], value), "high": max(ends[1], value)}


def _of_threshold(evaluation: Found) -> list[str]:
    lines = []
    for name, part in evaluation["parts"].items():
        if part["calibration"]:
            error = _cell(part["calibration"]["error"])
            lines.append(f"{name}: chances that a pair is of one source are off by {error}")
    threshold = evaluation.get("threshold")
    if threshold and threshold["sweep"]:
        best = threshold["sweep"]["best"].items()
        shown = ", ".join(f"{by.replace('_', ' ')} {value:.2f}" for by, value in best if value is not None)
        lines.append(f"threshold {threshold['value']:.3f}; best over validation sources: {shown or 'none'}")
    return lines


def _is_figure(value: Any) -> bool:
    return isinstance(value, dict) and "low" in value


def _cell(value: Found) -> str:
    if value["value"] is None:
        return "-"
    if value["low"] is None:
        return f"{value['value']:.3f}"
    return f"{value['value']:.3f} [{value['low']:.3f}, {value['high']:.3f}]"
