"""What a method has by construction is taken out of its evaluation, and what is gone is said."""

from __future__ import annotations

from typing import Any

from rayscan.evaluation.credit import paper_without_sources, without_sources

WHY = "gcn has one vector for all sequences of a source"


def scored() -> dict[str, Any]:
    return {
        "rows": [{"by_source": {"f1": 1.0}, "by_label": {"f1": 0.5}}],
        "best": {"by_source": 0.3, "by_label": 0.2},
    }


def kept(found: dict[str, Any]) -> bool:
    """By source nothing is left, by label everything."""
    (row,) = found["rows"]
    best = {"by_source": None, "by_label": 0.2}
    return row == {"by_source": None, "by_label": {"f1": 0.5}} and found["best"] == best


def test_an_evaluation() -> None:
    part = {"methods": {"model": {}, "ports": {}}, "histograms": {}, "calibration": {}, "labels": {"n": 1}}
    evaluation = {
        "parts": {"unseen sources": part},
        "groups": {"later": None},
        "clusters": {"periods": {"2024-01": {"by_source": {"ari": 1.0}, "by_label": {"ari": 0.5}}}},
        "threshold": {"sweep": scored()},
        "not_computed": [],
    }
    without_sources(evaluation, "gcn")
    assert part == {"methods": {"ports": {}}, "histograms": None, "calibration": None, "labels": {"n": 1}}
    assert evaluation["clusters"]["periods"]["2024-01"] == {"by_source": None, "by_label": {"ari": 0.5}}
    assert (
        kept(evaluation["threshold"]["sweep"])
        and evaluation["threshold"]["sweep"]["best"]["by_source"] is None
    )
    gone = ["unseen sources / model by source", "clusters / 2024-01 / by_source", "sweep / by_source"]
    assert evaluation["not_computed"] == [{"what": what, "why": WHY} for what in gone]
    nothing = {"parts": {}, "groups": {}, "clusters": None, "threshold": {"sweep": None}, "not_computed": []}
    without_sources(nothing, "gcn")
    assert nothing["not_computed"] == []


def test_the_papers_protocol() -> None:
    clusters = {**scored(), "at_chosen": {"by_source": {"f1": 1.0}, "by_label": {"f1": 0.5}}}
    part = {"by_source": {"auroc": 1.0}, "by_label": {"auroc": 0.9}, "clusters": clusters}
    seen = {"by_source": None, "by_label": None, "clusters": None}
    found = {"parts": {"unseen": part, "seen": seen}, "chosen": {"by_source": 0.3}, "not_computed": []}
    paper_without_sources(found, "gcn")
    assert part["by_source"] is None and part["by_label"] == {"auroc": 0.9} and kept(clusters)
    assert clusters["at_chosen"] == {"by_source": None, "by_label": {"f1": 0.5}}
    assert found["chosen"] == {"by_source": None}
    gone = ["unseen / by source", "unseen / clusters by source"]
    assert found["not_computed"] == [{"what": what, "why": WHY} for what in gone]
