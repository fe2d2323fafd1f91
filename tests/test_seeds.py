"""Spread of figures over seeds."""

from __future__ import annotations

import pytest

from rayscan.evaluation.seeds import across, as_text


def evaluation(auroc: float | None) -> dict:
    figures = {"auroc": {"value": auroc, "low": None, "high": None, "n": 9}}
    ports = {"auroc": {"value": 0.1, "low": None, "high": None, "n": 9}}
    part = {"sequences": 50, "sources": 9, "methods": {"model": figures, "ports": ports}, "labels": None}
    return {"parts": {"unseen sources": part}, "groups": {"later": None}}


def test_spread_is_that_of_the_model_over_seeds() -> None:
    (row,) = across([evaluation(0.9), evaluation(0.8), evaluation(None)])
    assert (row["part"], row["by"]) == ("unseen sources", "source")
    found = row["auroc"]
    assert found["mean"] == pytest.approx(0.85) and found["deviation"] == pytest.approx(0.0707, abs=1e-4)
    assert (found["low"], found["high"], found["n"]) == (0.8, 0.9, 2)
    (line,) = as_text([row])
    assert line.endswith("0.850 ± 0.071 [0.800, 0.900], 2 seeds")


def test_one_seed_has_no_deviation() -> None:
    (row,) = across([evaluation(0.9)])
    assert row["auroc"]["deviation"] is None and as_text([row])[0].endswith("0.900 [0.900, 0.900], 1 seeds")
    assert across([]) == []
