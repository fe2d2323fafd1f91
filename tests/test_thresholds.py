"""Sweeps held against what is known, and what the best of one means."""

from __future__ import annotations

import json

import numpy as np

from rayscan.evaluation.thresholds import THRESHOLDS, TRUTHS, scored

SRC = np.repeat(np.arange(6), 2)
LABEL = np.repeat([0, 1, -1], 4)


def test_everything_joined_and_nothing_joined() -> None:
    together, alone = np.zeros(12, np.int64), np.arange(12)
    found = scored([(0.0, together), (0.5, SRC), (0.9, alone)], SRC, LABEL)
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    first, middle, last = found["rows"]
    assert (first["clusters"], first["singletons"], first["largest"]) == (1, 0, 12)
    assert first["by_source"]["recall"] == 1 and first["by_source"]["cuts"]["recall"] == 0
    assert (last["clusters"], last["singletons"], last["largest"]) == (12, 12, 1)
    assert last["by_source"]["precision"] is None and last["by_source"]["cuts"]["recall"] == 1
    assert middle["by_source"]["f1"] == middle["by_source"]["cuts"]["f1"] == 1
    assert middle["by_label"]["pairs"] == 8 * 7 // 2 and middle["by_label"]["precision"] == 1
    across = middle["by_label_across_sources"]
    assert (across["joined"], across["recall"]) == (0, 0)
    assert found["best"]["by_source"] == 0.5


def test_without_labels() -> None:
    for codes in (None, np.full(12, -1)):
        found = scored([(0.5, SRC)], SRC, codes)
        assert found["rows"][0]["by_label"] is None and found["best"]["by_label"] is None
        assert found["best"]["by_source"] == 0.5


def test_of_equally_good_thresholds_the_lowest() -> None:
    found = scored([(t, SRC) for t in THRESHOLDS], SRC, SRC // 2)
    assert set(found["best"]) == set(TRUTHS) and found["best"]["by_source"] == 0.0
    assert len(found["rows"]) == 100 and found["rows"][-1]["threshold"] == 0.99


def test_no_sequences() -> None:
    none = np.zeros(0, np.int64)
    found = scored([(0.5, none)], none, None)
    assert found["rows"][0]["largest"] == 0 and found["best"]["by_source"] is None
