"""The page of a sweep: what the settings did to separation, and how it grew. One file, no network."""

from __future__ import annotations

import math
from typing import Any

from rayscan.report import html
from rayscan.report.plots import block

_FIXED = ("trial", "separation", "rung", "steps", "best_step", "loss", "seconds", "error")
_WIDE = 30.0
"""Numbers of one sign that span more than this factor are shown on a logarithmic axis."""


def sweep_page(rows: list[dict[str, Any]], curve: list[dict[str, Any]]) -> str:
    """HTML with parallel coordinates, separation over steps, and the table.

    `rows`: one per trial, best first, with the keys of the table of trials, then one for each varied setting.
    `curve`: trial, step and separation of every validation.
    """
    varied = [name for name in rows[0] if name not in _FIXED]
    shown = [row for row in rows if row["separation"] is not None]
    payload = {
        "trials": [{"trial": row["trial"], "separation": row["separation"]} for row in shown],
        "axes": [_axis(name, [row[name] for row in shown]) for name in (*varied, "steps", "separation")],
        "curves": [
            {
                "trial": row["trial"],
                "step": [point["step"] for point in curve if point["trial"] == row["trial"]],
                "separation": [point["separation"] for point in curve if point["trial"] == row["trial"]],
            }
            for row in shown
        ],
    }
    cells = [[_text(value) for value in row.values()] for row in rows]
    return html.page(
        "sweep.html",
        ("charts.js", "sweep.js"),
        block=block(payload),
        columns=[name.replace("_", " ") for name in rows[0]],
        rows=cells,
        failed=len(rows) - len(shown),
    )


def _axis(name: str, values: list[Any]) -> dict[str, Any]:
    """A coordinate: each value's text and its height from 0 to 1, and the texts along the axis with theirs.

    Numbers stand where they belong, anything else in even steps.
    """
    if all(isinstance(v, int | float) and not isinstance(v, bool) for v in values):
        wide = min(values, default=0) > 0 and max(values) / min(values) > _WIDE
        numbers = [math.log(v) for v in values] if wide else [float(v) for v in values]
        low, high = min(numbers, default=0.0), max(numbers, default=0.0)
        heights = [(v - low) / (high - low) if high > low else 0.5 for v in numbers]
    else:
        marks = sorted({str(v) for v in values})
        heights = [marks.index(str(v)) / max(len(marks) - 1, 1) for v in values]
    texts = [_text(v) for v in values]
    at = dict(zip(texts, heights, strict=True))
    ends = {text: height for text, height in at.items() if height in (0, 1)}
    shown = list((at if len(at) <= 6 else ends).items())
    return {"name": name, "heights": heights, "texts": texts, "marks": shown}


def _text(value: Any) -> str:
    return "" if value is None else f"{value:.5g}" if isinstance(value, float) else str(value)
