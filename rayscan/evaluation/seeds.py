"""How far figures move when nothing but the seed of training changes.

A bootstrap interval says what other sources would have done to this model; it knows nothing of the model that
another seed would have given. A difference smaller than the spread over seeds is none.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from rayscan.evaluation.table import as_rows

Found = dict[str, Any]
_SHOWN = ("auroc", "average_precision", "r_at_1", "r_at_1_macro", "knn_macro_f1@1", "knn_macro_f1@5")


def across(evaluations: Sequence[Found]) -> list[Found]:
    """One row for each part and kind of pair: figures of the model over `evaluations`, of a seed each.

    Keys: part, by, and for each figure {"mean", "deviation", "low", "high", "n"}: over the n seeds that have
    it; the deviation is that of a sample, None of one seed; low and high are the least and the most.
    """
    values: dict[tuple[str, str], dict[str, list[float]]] = {}
    for evaluation in evaluations:
        for row in as_rows(evaluation):
            if row["method"] == "model":
                kept = values.setdefault((row["part"], row["by"]), {})
                for name in _SHOWN:
                    if name in row and row[name]["value"] is not None:
                        kept.setdefault(name, []).append(row[name]["value"])
    return [
        {"part": part, "by": by, **{name: _spread(np.array(each)) for name, each in kept.items()}}
        for (part, by), kept in values.items()
    ]


def as_text(rows: Sequence[Found]) -> list[str]:
    """A line for each row and figure: mean ± deviation [least, most]."""
    lines = []
    for row in rows:
        for name in _SHOWN:
            if name in row:
                found = row[name]
                deviation = "" if found["deviation"] is None else f" ± {found['deviation']:.3f}"
                title = f"{row['part']}, by {row['by']}: {name}"
                ends = f"[{found['low']:.3f}, {found['high']:.3f}]"
                lines.append(f"{title:70}{found['mean']:.3f}{deviation} {ends}, {found['n']} seeds")
    return lines


def _spread(values: np.ndarray[Any, Any]) -> Found:
    return {
        "mean": float(values.mean()),
        "deviation": float(values.std(ddof=1)) if len(values) > 1 else None,
        "low": float(values.min()),
        "high": float(values.max()),
        "n": len(values),
    }
