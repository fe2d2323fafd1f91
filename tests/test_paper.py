"""The published protocol: every figure against all pairs written out, and what it says where it cannot."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from rayscan.clustering import solve
from rayscan.config import EvaluateConfig, PaperConfig
from rayscan.evaluation.paper import Anchors, as_text, evaluate, places
from rayscan.evaluation.parts import PartData, Terms
from rayscan.evaluation.thresholds import THRESHOLDS, TRUTHS
from rayscan.methods.floors import random_unit

NAMES = ("training", "unseen sequences", "unseen sources", "validation")
LABELS = ['"quoted"\nand cut', "сканер 🛰", "<script>"]


def anchors(seed: int, labels: bool = True, n_sources: int = 12, each: int = 4) -> Anchors:
    source = np.repeat(np.arange(n_sources), each)
    middle = random_unit(3, 8, 0)[np.arange(n_sources) % 3] + 0.5 * random_unit(n_sources, 8, seed)
    rows = middle[source] + 0.3 * random_unit(len(source), 8, seed + 1)
    names = [LABELS[s % 3] if labels and s % 4 else None for s in source]
    data = PartData(
        (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32),
        source << 8,
        np.arange(len(source)),
        label=names,
    )
    everything = np.arange(len(source))
    labelled = np.array([row for row in everything if names[row]], np.int64)
    return Anchors(data, everything, labelled, everything, 1000, 99)


def solved(points: np.ndarray) -> Iterator[tuple[float, np.ndarray]]:
    for theta in THRESHOLDS:
        yield theta, solve(points, theta, greedy=True)


def run(parts: dict[str, Anchors]) -> tuple[dict[str, Any], dict[str, list[str]]]:
    """The evaluation, and what was not computed, by its reason."""
    found = evaluate(parts, PaperConfig(), Terms(EvaluateConfig(bootstrap=20)), solved)
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    reasons: dict[str, list[str]] = {}
    for item in found["not_computed"]:
        reasons.setdefault(item["why"], []).append(item["what"])
    return found, reasons


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    evaluation, reasons = run({name: anchors(seed) for seed, name in enumerate(NAMES)})
    assert reasons == {}
    return evaluation


def test_similarities_are_those_of_all_pairs(found: dict[str, Any]) -> None:
    for number, name in enumerate(NAMES[1:3], 1):
        data = anchors(number).data
        i, j = np.triu_indices(len(data.src), 1)
        similarity = (data.vectors @ data.vectors.T)[i, j].clip(-1, 1)
        same = data.src[i] == data.src[j]
        label = np.array(data.label, object)
        known = (label[i] != None) & (label[j] != None) & ~same  # noqa: E711 - elementwise
        truths = {"by_source": (same, np.ones(len(i), bool)), "by_label": (label[i] == label[j], known)}
        for by, (together, counted) in truths.items():
            study = found["parts"][name][by]
            inside, outside = similarity[together & counted], similarity[~together & counted]
            assert study["pairs_same"] == len(inside) and study["pairs_different"] == len(outside)
            assert study["difference"] == pytest.approx(inside.mean() - outside.mean(), abs=1e-6)
            assert len(study["masses"]["edges"]) == 51
            for side, values in (("same", inside), ("different", outside)):
                expected = np.histogram(values, 50, (-1, 1))[0] / len(values)
                np.testing.assert_allclose(study["masses"][side], expected, atol=1.5 / len(values))
                assert sum(study["masses"][side]) == pytest.approx(1)


def test_only_unseen_parts_are_studied(found: dict[str, Any]) -> None:
    assert {name for name in NAMES if found["parts"][name]["by_source"]} == set(NAMES[1:3])


def test_thresholds_are_chosen_on_validation_sources(found: dict[str, Any]) -> None:
    best = found["parts"]["validation"]["clusters"]["best"]
    assert found["chosen"] == best and set(best) == set(TRUTHS)
    for part in found["parts"].values():
        clusters = part["clusters"]
        assert len(clusters["rows"]) == 100 and clusters["labelled"] == 36
        for truth, theta in best.items():
            row = clusters["rows"][THRESHOLDS.index(theta)]
            assert clusters["at_chosen"][truth] == {"threshold": theta, **row[truth]}
            assert clusters["at_chosen"][truth]["macro_f1"] > 0.7
    text = "\n".join(as_text(found))
    assert "unseen sources, similarity by label" in text and "training, clusters by source" in text
    assert "unseen sources, clusters by label across sources" in text


def test_nothing_is_left_out_in_silence() -> None:
    none = Anchors(anchors(0).data.take(np.arange(0)), *[np.arange(0)] * 3, 0, 0)
    found, reasons = run({"unseen sources": anchors(0, labels=False), "validation": none})
    assert found["parts"]["unseen sources"]["by_label"] is None
    assert reasons == {
        "no labels": ["unseen sources / by label", "unseen sources / clusters by label"],
        "no sequences": ["validation"],
        "no threshold could be chosen on validation sources": [
            f"clusters {truth.replace('_', ' ')} at the chosen threshold" for truth in TRUTHS
        ],
    }
    one, reasons = run({"unseen sources": anchors(0, n_sources=1)})
    assert "all anchors are of one source" in reasons
    assert one["parts"]["unseen sources"]["by_source"]["auroc"]["value"] is None
    as_text(one)
    _, reasons = run({"unseen sources": anchors(0, each=1)})
    assert "no source has two anchors" in reasons


@pytest.mark.parametrize("n", [0, 1, 4, 40])
def test_places(n: int) -> None:
    vectors = random_unit(n, 8, 0)
    found = places(vectors, 42)
    assert found.shape == (n, 2) and found.dtype == np.float32 and np.isfinite(found).all()
    np.testing.assert_array_equal(found, places(vectors, 42))
    assert np.isfinite(places(np.ones((n, 2), np.float32), 0)).all()
