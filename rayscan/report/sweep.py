"""The page of a sweep: what the settings did to separation, and how it grew. One file, no network."""

from __future__ import annotations

from html import escape
from typing import Any

_FIXED = ("trial", "separation", "rung", "steps", "best_step", "loss", "seconds", "error")
_STYLE = (
    "body{font:15px/1.5 system-ui,sans-serif;margin:2rem auto;max-width:70rem;padding:0 1rem}"
    "table{border-collapse:collapse}td,th{padding:.2rem .7rem;text-align:right;border-bottom:1px solid #ddd}"
)


def sweep_page(rows: list[dict[str, Any]], curve: list[dict[str, Any]]) -> str:
    """HTML with parallel coordinates, separation over steps, and the table.

    `rows`: one per trial, best first, with the keys of the table of trials, then one for each varied setting.
    `curve`: trial, step and separation of every validation.
    """
    from plotly import graph_objects  # slow to import, and only needed here

    varied = [name for name in rows[0] if name not in _FIXED]
    axes = [*varied, "steps", "separation"]
    shown = [row for row in rows if row["separation"] is not None]
    parallel = graph_objects.Figure(
        graph_objects.Parcoords(
            line={
                "color": [row["separation"] for row in shown],
                "colorscale": "Viridis",
                "showscale": True,
                "colorbar": {"title": "separation"},
            },
            dimensions=[_axis(name, [row[name] for row in shown]) for name in axes],
        ),
        layout={"margin": {"l": 90, "r": 30, "t": 50, "b": 30}, "height": 420},
    )
    over_time = graph_objects.Figure(
        [
            graph_objects.Scatter(
                x=[point["step"] for point in curve if point["trial"] == row["trial"]],
                y=[point["separation"] for point in curve if point["trial"] == row["trial"]],
                mode="lines+markers",
                name=f"trial {row['trial']}",
                line={"width": 4 if row is rows[0] else 1.5},
            )
            for row in shown
        ],
        layout={
            "xaxis": {"title": "step"},
            "yaxis": {"title": "separation of unseen sources (AUROC)"},
            "height": 460,
        },
    )
    first = parallel.to_html(full_html=False, include_plotlyjs=True)
    second = over_time.to_html(full_html=False, include_plotlyjs=False)
    return (
        f"<!doctype html><html lang='en'><meta charset='utf-8'><title>rayscan sweep</title>"
        f"<style>{_STYLE}</style><h1>Sweep</h1><p>{len(rows)} trials; the first in the table is the best, "
        f"trial 0 has the unchanged settings. Separation: probability that two sequences of one source are "
        f"more alike than two of different sources, on sources that training has not seen.</p>"
        f"<h2>What the settings did</h2>{first}<h2>Separation over training</h2>{second}"
        f"<h2>All trials</h2>{_table(rows)}</html>"
    )


def _axis(name: str, values: list[Any]) -> dict[str, Any]:
    """A coordinate: numbers as they are, anything else as evenly spaced marks."""
    if all(isinstance(v, int | float) and not isinstance(v, bool) for v in values):
        return {"label": escape(name), "values": values}
    texts = [str(v) for v in values]
    marks = sorted(set(texts))
    return {
        "label": escape(name),
        "values": [marks.index(text) for text in texts],
        "tickvals": list(range(len(marks))),
        "ticktext": [escape(mark) for mark in marks],
    }


def _table(rows: list[dict[str, Any]]) -> str:
    head = "".join(f"<th>{escape(name)}" for name in rows[0])
    body = "".join(f"<tr>{''.join(f'<td>{escape(_text(value))}' for value in row.values())}" for row in rows)
    return f"<table><tr>{head}{body}</table>"


def _text(value: Any) -> str:
    return "" if value is None else f"{value:.5g}" if isinstance(value, float) else str(value)
