"""The page of a comparison: every method's figures with intervals, what they cost, and how to read them.

One file that needs no network, no other file and no JavaScript: plots are drawn here, as SVG. It has the
style of the report (`report.page`). Every text from outside is escaped by the template.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rayscan.report.html import rendered

PLOTTED = ("sources AUROC", "sources R@1", "sources F1", "labels AUROC", "labels 5-NN F1", "labels F1")
_ROW, _LEFT, _WIDTH = 22, 170, 300  # pixels: of a row, before the axis, of the axis
Row = dict[str, Any]


@dataclass(frozen=True)
class _Mark:
    """A method in a plot; places in pixels. `floor` is where ports alone are, `about` its values in words."""

    name: str
    y: int
    low: float
    value: float
    high: float
    floor: float | None
    about: str


@dataclass(frozen=True)
class _Plot:
    title: str
    marks: list[_Mark]
    ticks: list[tuple[float, str]]  # place and text
    left: int
    width: int
    height: int


def comparison_page(rows: Sequence[Row], runs: Sequence[Row], headings: Sequence[str], run: str) -> str:
    """HTML, to be written as UTF-8.

    `rows`, `runs` and `headings` are what `methods.compare` has: `as_rows`, the ratings of each method and
    seed, and the names of the figures.
    """
    done = [one for one in runs if "parts" in one]
    plotted = [name for name in PLOTTED if name in headings]
    return rendered(
        "comparison.html",
        run=run,
        rows=rows,
        headings=told(rows, headings),
        plots=[plot for name in plotted if (plot := _plot(name, rows)).marks],
        parts=next(([(name, part["sequences"]) for name, part in one["parts"].items()] for one in done), []),
        methods=[
            (str(one["facts"]["name"]), one["facts"].get("label"), json.dumps(one["facts"], indent=1))
            for one in {one["method"]: one for one in runs if "facts" in one}.values()
        ],
    )


def told(rows: Sequence[Row], headings: Sequence[str]) -> list[str]:
    """The headings under which some method has a figure."""
    return [name for name in headings if any(row[name] is not None for row in rows)]


def _plot(heading: str, rows: Sequence[Row]) -> _Plot:
    """Methods under each other, on an axis from the least of what is shown to 1."""
    shown = [row for row in rows if row[heading] is not None and row["seeds"]]
    least = min((_ends(row[heading])[0] for row in shown), default=0.0)
    floors = [row[heading]["ports"] for row in shown if row[heading]["ports"] is not None]
    begin = int(10 * min([least, *floors])) / 10 if shown else 0.0

    def place(value: float) -> float:
        return round(_LEFT + _WIDTH * (value - begin) / (1 - begin), 1)

    marks = []
    for number, row in enumerate(shown):
        cell = row[heading]
        low, high = _ends(cell)
        about = f"{row['method']}: {cell['value']:.3f}, 95 % interval {low:.3f} to {high:.3f}"
        floor = None if cell["ports"] is None else place(cell["ports"])
        y = _ROW * number + _ROW // 2
        marks.append(_Mark(row["method"], y, place(low), place(cell["value"]), place(high), floor, about))
    ticks = [(place(value), f"{value:.2g}") for value in (begin, (begin + 1) / 2, 1.0)]
    return _Plot(heading, marks, ticks, _LEFT, _WIDTH, _ROW * len(shown))


def _ends(cell: dict[str, Any]) -> tuple[float, float]:
    """Of the interval; where there is none, the value itself."""
    return tuple(cell["value"] if cell[end] is None else cell[end] for end in ("low", "high"))
