"""The whole evaluation: its layout, what it leaves out and says so, and figures that must come out."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from numpy.typing import NDArray
from sklearn.metrics import roc_auc_score

from rayscan.clustering import calibrate
from rayscan.config import EvaluateConfig
from rayscan.errors import DataError
from rayscan.evaluation.parts import PartData, sample_rows
from rayscan.evaluation.protocol import LATER, NEW_NETWORKS, ClusterData, Training, evaluate
from rayscan.evaluation.table import as_rows, as_text
from rayscan.methods.floors import port_vectors, random_unit

CONFIG = EvaluateConfig(bootstrap=50)
BY_LABEL = {"auroc", "average_precision", "mean_same", "mean_different"}
FIGURES = BY_LABEL | {"r_at_1", "r_at_1_macro", "mean_same_macro"}
LABELS = ['the "scan" people', "o'botnet 🤖", "<b>ünïcode</b>"]


def part(
    n_sources: int = 40, each: int = 5, spread: float = 0.8, labels: bool = True, seed: int = 0
) -> PartData:
    """Sources around their own centre, these around that of their label; a fifth has no label."""
    rng = np.random.default_rng(seed)
    of_label = np.arange(n_sources) % len(LABELS)
    middle = random_unit(len(LABELS), 16, seed)[of_label] + 0.8 * random_unit(n_sources, 16, seed + 1)
    source = np.repeat(np.arange(n_sources), each)
    rows = middle[source] + spread * random_unit(len(source), 16, seed + 2)
    names = [LABELS[of_label[s]] if s % 5 else None for s in source]
    ports = pa.table(
        {
            "proto": pa.array([[6, 6]] * len(source), pa.list_(pa.int16())),
            "dst_port": pa.array([[s % 7, int(rng.integers(0, 7))] for s in source], pa.list_(pa.int32())),
        }
    )
    return PartData(
        vectors=(rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32),
        src=source * 65_537 + 3_000_000_000,
        sequence_id=rng.permutation(len(source)) + 10**15,
        ports=port_vectors(ports),
        label=pa.array(names, pa.string()) if labels else None,
    )


def take(given: PartData, rows: NDArray[np.int64]) -> PartData:
    columns = {
        key: None if value is None else value[rows] for key, value in vars(given).items() if key != "label"
    }
    return PartData(**columns, label=None if given.label is None else given.label.take(pa.array(rows)))


def figures(scores: dict[str, Any]) -> set[str]:
    return {key for key, value in scores.items() if isinstance(value, dict) and "low" in value}


def said(evaluation: dict[str, Any], what: str) -> list[str]:
    return [item["why"] for item in evaluation["not_computed"] if what in item["what"]]


def test_layout() -> None:
    given = part()
    cluster = ClusterData(np.arange(200) // 10, given.src, given.label)
    found = evaluate({"unseen sources": given}, CONFIG, {"2024-03": cluster})
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert list(found) == ["version", "settings", "parts", "groups", "clusters", "not_computed"]
    assert found["version"] == 1 and found["settings"]["bootstrap"] == 50
    assert {item["what"]: item["why"] for item in found["not_computed"]} == {
        "unseen sources / calibration": "no curve was fitted on validation sources",
        "groups": "what the model was trained on is not known",
    }
    of = found["parts"]["unseen sources"]
    assert (of["sequences"], of["sources"]) == (200, 40)
    assert of["available"] == {"sequences": 200, "sources": 40}
    assert list(of["methods"]) == list(of["labels"]["methods"]) == ["model", "ports", "random"]
    for scores in of["methods"].values():
        assert figures(scores) == FIGURES
        assert scores["pairs_same"] == 40 * 10
        assert scores["pairs_same"] + scores["pairs_different"] == 200 * 199 // 2
        assert sum(scores["histograms"]["same"]) == scores["pairs_same"]
        for name in FIGURES:
            assert scores[name]["low"] <= scores[name]["value"] <= scores[name]["high"]
            assert scores[name]["n"] == 40
    assert of["histograms"] == of["methods"]["model"]["histograms"]
    assert [len(of["histograms"][key]) for key in ("edges", "same", "different")] == [65, 64, 64]
    for scores in of["labels"]["methods"].values():
        assert figures(scores) == BY_LABEL
        assert set(scores["knn_macro_f1"]) == {"1", "3", "5", "7"}


def test_figures_are_those_of_every_pair() -> None:
    given = part(n_sources=20, each=4)
    found = evaluate({"p": given}, EvaluateConfig(bootstrap=0))["parts"]["p"]
    i, j = np.triu_indices(80, 1)
    similarity = (given.vectors @ given.vectors.T)[i, j]
    same = given.src[i] == given.src[j]
    model = found["methods"]["model"]
    assert model["auroc"]["value"] == pytest.approx(roc_auc_score(same, similarity), abs=1e-5)
    assert model["mean_same"]["value"] == pytest.approx(similarity[same].mean(), abs=1e-6)
    assert model["auroc"]["low"] is model["auroc"]["high"] is None
    full = given.vectors @ given.vectors.T - 3 * np.eye(80)
    assert model["r_at_1"]["value"] == pytest.approx((given.src[full.argmax(1)] == given.src).mean())
    label = np.array(given.label.to_pylist(), object)
    counted = ~same & (label[i] != None) & (label[j] != None)  # noqa: E711 - elementwise
    expected = roc_auc_score((label[i] == label[j])[counted], similarity[counted])
    assert found["labels"]["methods"]["model"]["auroc"]["value"] == pytest.approx(expected, abs=1e-4)


def test_the_model_beats_the_floors_where_it_should() -> None:
    found = evaluate({"p": part(n_sources=60)}, CONFIG)["parts"]["p"]
    by_source = {method: scores["auroc"] for method, scores in found["methods"].items()}
    assert by_source["model"]["low"] > by_source["random"]["high"]
    assert by_source["random"]["value"] == pytest.approx(0.5, abs=0.05)
    by_label = {
        method: scores["knn_macro_f1"]["5"]["value"] for method, scores in found["labels"]["methods"].items()
    }
    assert by_label["model"] > 0.8 > 0.6 > by_label["random"]


def test_order_of_rows_changes_nothing() -> None:
    given = part(n_sources=30, each=6)
    config = EvaluateConfig(bootstrap=20, max_sequences_per_source=4, max_sequences=70)
    order = np.random.default_rng(1).permutation(180)
    assert evaluate({"p": given}, config) == evaluate({"p": take(given, order)}, config)


def test_intervals_hold_the_truth() -> None:
    """Of 60 small samples of one population, the 95 % intervals of nearly all hold its AUROC."""
    truth = evaluate({"p": part(400, 5, labels=False, seed=7)}, EvaluateConfig(bootstrap=0))
    model = truth["parts"]["p"]["methods"]["model"]
    everything = part(400, 5, labels=False, seed=7)
    held = {"auroc": 0, "mean_same": 0}
    for sample in range(60):
        chosen = np.random.default_rng(sample).choice(400, 40, replace=False)
        rows = np.flatnonzero(np.isin((everything.src - 3_000_000_000) // 65_537, chosen))
        few = PartData(everything.vectors[rows], everything.src[rows], everything.sequence_id[rows])
        found = evaluate({"p": few}, EvaluateConfig(bootstrap=60))["parts"]["p"]["methods"]["model"]
        for name in held:
            held[name] += found[name]["low"] <= model[name]["value"] <= found[name]["high"]
    assert held["auroc"] >= 52 and held["mean_same"] >= 52


def test_sample_is_capped_and_composes() -> None:
    rng = np.random.default_rng(2)
    src, ids = rng.integers(0, 50, 1000), rng.permutation(1000)
    rows = sample_rows(ids, src, 7, 120, 0)
    assert len(rows) == 120 and np.bincount(src[rows]).max() == 7
    assert (
        np.bincount(src[rows])[np.unique(src[rows])] == 7
    ).sum() >= 16  # whole sources, not single sequences
    assert set(ids[rows]) != set(ids[sample_rows(ids, src, 7, 120, 1)])
    np.testing.assert_array_equal(rows[sample_rows(ids[rows], src[rows], 7, 120, 0)], rows)
    halves = [np.flatnonzero(src % 2 == half) for half in (0, 1)]
    union = np.concatenate([half[sample_rows(ids[half], src[half], 7, 120, 0)] for half in halves])
    np.testing.assert_array_equal(union[sample_rows(ids[union], src[union], 7, 120, 0)], rows)
    assert len(sample_rows(ids[:0], src[:0], 7, 120, 0)) == 0


def test_labels_with_few_sources_are_left_out() -> None:
    given = part(n_sources=40)
    names = given.label.to_pylist()
    rare = "rare, with 2 sources"
    given = PartData(given.vectors, given.src, given.sequence_id, label=names[:-10] + [rare] * 10)
    found = evaluate({"p": given}, CONFIG)["parts"]["p"]["labels"]
    assert [row["label"] for row in found["names"]] == sorted(
        LABELS, key=lambda label: -names[:-10].count(label)
    )
    assert found["left_out"] == {"labels": 1, "sequences": 10}
    assert found["sequences"] == sum(row["sequences"] for row in found["names"])
    assert found["unlabelled"] == 200 - found["sequences"] - 10
    assert (
        evaluate({"p": given}, EvaluateConfig(min_label_sources=2))["parts"]["p"]["labels"]["left_out"][
            "labels"
        ]
        == 0
    )


@pytest.mark.parametrize(
    ("label", "why"),
    [
        (None, "no labels"),
        (pa.nulls(200, pa.string()), "no labels"),
        (["one"] * 200, "1 of 1 labels with 5 or more sources; needs 2"),
        (["one", "two"] * 2 + [None] * 196, "0 of 2 labels"),
    ],
)
def test_labels_that_compare_nothing(label: Any, why: str) -> None:
    given = part()
    found = evaluate({"p": PartData(given.vectors, given.src, given.sequence_id, label=label)}, CONFIG)
    assert found["parts"]["p"]["labels"] is None
    assert why in said(found, "p / labels")[0]


def test_empty_part() -> None:
    empty = np.zeros(0, np.int64)
    none = pa.array([], pa.string())
    found = evaluate({"validation": PartData(np.empty((0, 0), np.float32), empty, empty, label=none)}, CONFIG)
    of = found["parts"]["validation"]
    assert (of["sequences"], of["methods"], of["labels"], of["histograms"]) == (0, {}, None, None)
    assert "no sequences" in said(found, "validation")
    assert as_rows(found) == []


@pytest.mark.parametrize(
    ("src", "undefined", "why"),
    [
        ([5, 5, 5], FIGURES - {"mean_same", "mean_same_macro"}, "all sequences are of one source"),
        ([5, 6, 7], FIGURES - {"mean_different"}, "no source has two sequences"),
        ([5], FIGURES, "no source has two sequences"),
        ([5, 5, 7], set(), "fewer than 2 sources with two sequences"),
    ],
)
def test_too_few_sources(src: list[int], undefined: set[str], why: str) -> None:
    vectors = random_unit(len(src), 4, 0)
    found = evaluate({"p": PartData(vectors, np.array(src), np.arange(len(src)))}, CONFIG)
    scores = found["parts"]["p"]["methods"]["model"]
    assert {name for name in FIGURES if scores[name]["value"] is None} == undefined
    assert why in said(found, "p")
    json.dumps(found, allow_nan=False)


def test_without_a_model() -> None:
    given = part(labels=False)
    found = evaluate({"p": PartData(None, given.src, given.sequence_id, given.ports)}, CONFIG)
    assert list(found["parts"]["p"]["methods"]) == ["ports", "random"]
    assert found["parts"]["p"]["histograms"] is None
    assert said(found, "p / model") == ["no vectors given"]


def test_columns_that_do_not_fit() -> None:
    given = part()
    with pytest.raises(DataError, match=r"unseen: columns differ in length.*'src': 199"):
        evaluate({"unseen": PartData(given.vectors, given.src[:-1], given.sequence_id)}, CONFIG)
    with pytest.raises(DataError, match="occurs twice"):
        evaluate({"unseen": PartData(given.vectors, given.src, given.sequence_id // 2)}, CONFIG)
    with pytest.raises(DataError, match="2024"):
        evaluate({}, CONFIG, {"2024": ClusterData(np.arange(3), np.arange(2))})


def test_clusters() -> None:
    """Ten sources of two labels; clusters follow the labels but for one source, which has its own."""
    src, label = np.repeat(np.arange(10), 3), np.repeat(["a", "b"], 15)
    cluster = np.where(src == 9, 99, np.where(label == "a", -4, 7))
    data = ClusterData(cluster, src, [str(name) for name in label])
    found = evaluate({}, CONFIG, {"2024-W09": data, "2024-W10": ClusterData(cluster[:0], src[:0], [])})
    of = found["clusters"]["periods"]["2024-W09"]
    assert (of["sequences"], of["sources"], of["clusters"]) == (30, 10, 3)
    assert (of["singletons"], of["largest"]) == (0, 15)
    across = of["by_label"]["join_across_sources"]
    together = 2 * (15 * 14 // 2 - 5 * 3)
    assert (across["joined"], across["together"], across["both"]) == (together - 36, together, together - 36)
    assert across["precision"] == 1 and across["recall"] == pytest.approx(1 - 36 / together)
    assert of["by_label"]["join"]["recall"] == pytest.approx(1 - 36 / 210)
    assert of["by_source"]["groups"] == 10 and of["by_source"]["join_across_sources"] is None
    assert of["by_source"]["completeness"] == pytest.approx(1) and of["by_source"]["homogeneity"] < 1
    assert of["by_source"]["join"]["recall"] == 1
    empty = found["clusters"]["periods"]["2024-W10"]
    assert (empty["largest"], empty["by_source"], empty["by_label"]) == (0, None, None)
    assert said(found, "2024-W10 / by_label") == ["no labels"]


def test_no_clusters() -> None:
    found = evaluate({}, CONFIG)
    assert found["clusters"] is None and said(found, "clusters") == ["no clusters given"]


def test_clusters_and_threshold_on_a_terminal() -> None:
    src, label = np.repeat(np.arange(10), 3), [str(s // 5) for s in np.repeat(np.arange(10), 3)]
    data = ClusterData(np.repeat(np.arange(15), 2), src, label)
    found = evaluate({}, CONFIG, {"2024-03": data})
    for by in ("by_source", "by_label"):
        scores = found["clusters"]["periods"]["2024-03"][by]
        low, high = scores["intervals"]["v_measure"]
        assert low <= scores["v_measure"] + 0.05 and scores["v_measure"] - 0.05 <= high and low < high
    best = {"by_source": 0.41, "by_label": None}
    text = as_text({**found, "threshold": {"value": 0.5, "sweep": {"best": best}}})
    assert text[0] == "2024-03: 30 sequences in 15 clusters"
    assert [line.split()[0] for line in text[2:5]] == ["with", "with", "..."]
    assert text[5] == "threshold 0.500; best over validation sources: by source 0.41"
    assert max(map(len, text)) <= 120


def test_rows_and_text() -> None:
    found = evaluate({"unseen sequences": part(), "unseen sources": part(labels=False)}, CONFIG)
    rows = as_rows(found)
    assert [(row["part"], row["by"], row["method"]) for row in rows[:9]] == [
        ("unseen sequences", by, method)
        for by in ("source", "label", "label across networks")
        for method in ("model", "ports", "random")
    ]
    assert len(rows) == 12
    assert rows[0]["auroc"] == found["parts"]["unseen sequences"]["methods"]["model"]["auroc"]
    assert set(rows[3]["knn_macro_f1@5"]) == {"value", "low", "high", "n"}
    text = as_text(found)
    assert text[0] == "unseen sequences, by source: 200 sequences of 40 sources"
    assert f"{rows[0]['auroc']['value']:.3f} [" in text[2]
    assert "not computed, no clusters given: clusters" in text
    assert max(map(len, text)) <= 110


def test_chances_hold_where_they_were_fitted_and_not_elsewhere() -> None:
    """Half a population against the other half; then against one whose sources are twice as spread."""
    fitted = part(200, seed=1)
    curve = calibrate(fitted.vectors, fitted.src)
    errors = {}
    for name, given in {"alike": part(200, seed=2), "other": part(200, spread=1.6, seed=2)}.items():
        found = evaluate({"p": given}, CONFIG, curve=curve)["parts"]["p"]["calibration"]
        assert found["error"]["low"] <= found["error"]["value"] <= found["error"]["high"]
        assert found["pairs_same"] == 200 * 4 and found["prior"] == 0.5
        assert sum(row["pairs"] for row in found["bins"]) == found["pairs_same"] + found["pairs_different"]
        errors[name] = found["error"]["value"]
    assert errors["alike"] < 0.06 < 0.1 < errors["other"]


def test_groups_of_the_split() -> None:
    """Sources that share a /24 with a training source are left out of one group, early ones of the other."""
    given = part(n_sources=40)
    given = replace(given, start=np.repeat(np.arange(40), 5) * 1000)
    networks = np.unique(given.src >> 8)
    known = Training(networks[: len(networks) // 2], 29_500)
    found = evaluate({"unseen sources": given}, CONFIG, training=known)["groups"]
    few, later = found[NEW_NETWORKS], found[LATER]
    assert few["sources"] == (~np.isin(np.unique(given.src) >> 8, known.networks)).sum()
    assert later["sources"] == 10 and later["sequences"] == 50
    assert later["methods"]["model"]["auroc"]["n"] == 10
    assert {row["part"] for row in as_rows({"parts": {}, "groups": found})} == {NEW_NETWORKS, LATER}
    none = evaluate({"unseen sources": given}, CONFIG, training=Training(networks, 10**15))
    assert none["groups"] == {NEW_NETWORKS: None, LATER: None}
    assert "see train.periods" in said(none, LATER)[0] and "its /24" in said(none, NEW_NETWORKS)[0]


def test_labels_across_networks() -> None:
    """A label whose sources are all neighbours has no pair of different networks."""
    given = part(n_sources=40)
    alone = replace(given, src=np.repeat(np.arange(40), 5) + (10 << 24))
    found = evaluate({"p": alone}, CONFIG)["parts"]["p"]["labels"]
    assert found["methods"]["model"]["pairs_same"] > 0
    assert found["across_networks"]["model"]["pairs_same"] == 0
    assert found["across_networks"]["model"]["auroc"]["value"] is None
    spread = replace(given, src=np.repeat(np.arange(40) << 8, 5))
    found = evaluate({"p": spread}, CONFIG)["parts"]["p"]["labels"]
    assert found["across_networks"] == found["methods"]
