"""The page of a comparison."""

from __future__ import annotations

from typing import Any

from report_example import example

from rayscan.methods.compare import COLUMNS, as_rows
from rayscan.report import render
from rayscan.report.comparison import comparison_page


def rated(name: str, value: float | None, coverage: float = 1.0) -> dict[str, Any]:
    def of(value: float) -> dict[str, Any]:
        return {"auroc": {"value": value, "low": value - 0.01, "high": value + 0.01, "n": 30}}

    source = None if value is None else {"method": of(value), "ports": of(0.7), "random": of(0.5)}
    part = {"sequences": 1234, "coverage": coverage, "source": source, "label": None}
    costs = {"fit_s": 1.0, "fit_cpu_s": 2.0, "embed_s": 3.0, "embed_cpu_s": 4.0, "memory_mb": 500}
    facts = {"facts": {"name": name, "label": "built from the abstract"}, "seed": 0, **costs}
    return {"method": name, "parts": {"unseen sequences": part, "unseen sources": part}, **facts}


def page(*runs: dict[str, Any]) -> str:
    return comparison_page(as_rows(runs), runs, list(COLUMNS), "main")


def test_figures_stand_with_interval_floor_and_cost() -> None:
    text = page(rated("good", 0.912), rated("better", 0.955), rated("blind", None, 0.0))
    assert text.index('<th scope="row">better') < text.index('<th scope="row">good')
    assert "0.955<small>0.945 to 0.965</small>" in text and "floor: ports" in text
    assert "labels AUROC" not in text  # nobody has one
    assert "better: 0.955, 95 % interval 0.945 to 0.965" in text and "built from the abstract" in text
    assert "1,234 unseen sequences and 1,234 unseen sources" in text and ">500<" in text


def test_marks_lie_in_order_on_the_axis() -> None:
    text = page(rated("good", 0.912), rated("better", 0.955))
    places = [float(part.split('"')[0]) for part in text.split('class="value" cx="')[1:3]]
    assert places[0] > places[1] > 170 and places[0] < 470


def test_it_needs_nothing_and_trusts_no_name() -> None:
    text = page(rated("<script>alert(1)</script>", 0.9))
    assert "<script" not in text and "&lt;script&gt;" in text
    assert "http://" not in text and "https://" not in text and "default-src 'none'" in text


def test_the_report_has_the_table_too() -> None:
    rows = as_rows([rated("good<b>", 0.912), rated("blind", None, 0.0)])
    made = {"made": "2024-05-01T00:00:00+00:00", "page": "compare/comparison.html"}
    text = render(example(comparison={**made, "rows": rows, "headings": list(COLUMNS)}))
    assert "Beside other methods" in text and "compared 2024-05-01; compare/comparison.html has" in text
    assert "0.912<small>0.902 to 0.922</small>" in text and "good&lt;b&gt;" in text
    assert "labels AUROC" not in text
    for nothing in (None, {**made, "rows": [], "headings": []}):
        assert "Beside other methods" not in render(example(comparison=nothing))


def test_a_method_that_failed_says_why() -> None:
    broken = {"method": "darkvec", "seed": 0, "failed": "nobody <meets>"}
    text = page(rated("good", 0.912), broken)
    assert "<b>darkvec</b> did not come to its end: nobody &lt;meets&gt;" in text
    assert '<th scope="row">darkvec' not in text
    assert "<b>good</b> did not come to its end with every seed: x" in page(
        rated("good", 0.9), {"method": "good", "seed": 1, "failed": "x"}
    )


def test_nothing_rated_yet() -> None:
    assert "Methods compared" in page(rated("blind", None, 0.0))
