"""Takes out of an evaluation what a method has by construction: no credit for alike sequences of one source.

Some methods learn one vector for each source. Their sequences of one source are alike whatever they do, and
so are their clusters: figures by source would be perfect and mean nothing. Agreement with labels stays, and
joins of different sources with it, which are the ones to read.
"""

from __future__ import annotations

from typing import Any

Found = dict[str, Any]


def without_sources(evaluation: Found, method: str) -> None:
    """Changes an evaluation as `protocol` lays it out; "not_computed" says what is gone and why."""
    gone = []
    for name, part in {**evaluation["parts"], **evaluation["groups"]}.items():
        if part is not None and part["methods"].pop("model", None) is not None:
            part |= {"histograms": None, "calibration": None}
            gone.append(f"{name} / model by source")
    for period, found in (evaluation["clusters"] or {"periods": {}})["periods"].items():
        found["by_source"] = None
        gone.append(f"clusters / {period} / by_source")
    if sweep := evaluation["threshold"]["sweep"]:
        _forget(sweep)
        gone.append("sweep / by_source")
    _note(evaluation, gone, method)


def paper_without_sources(found: Found, method: str) -> None:
    """The same of an evaluation as `paper` lays it out."""
    gone = []
    for name, part in found["parts"].items():
        if part["by_source"] is not None:
            part["by_source"] = None
            gone.append(f"{name} / by source")
        if clusters := part["clusters"]:
            _forget(clusters)
            clusters["at_chosen"]["by_source"] = None
            gone.append(f"{name} / clusters by source")
    found["chosen"]["by_source"] = None
    _note(found, gone, method)


def _forget(scored: Found) -> None:
    """Of what `thresholds.scored` says."""
    scored["best"]["by_source"] = None
    for row in scored["rows"]:
        row["by_source"] = None


def _note(found: Found, gone: list[str], method: str) -> None:
    why = f"{method} has one vector for all sequences of a source"
    found["not_computed"] += [{"what": what, "why": why} for what in gone]
