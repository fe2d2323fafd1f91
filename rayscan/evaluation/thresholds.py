"""What other thresholds would have done: partitions of a sample at many of them, held against what is known.

A choice among them is a choice on this sample, so it has to be one of validation sources. The sweep is shown
beside the threshold that was taken; nothing is reported at the best of it.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rayscan.evaluation.partitions import UNLABELLED, joins

THRESHOLDS = tuple(number / 100 for number in range(100))
"""Those of the published protocol (arXiv 2606.04733)."""

TRUTHS = ("by_source", "by_label", "by_label_across_sources")


def scored(
    partitions: Iterable[tuple[float, NDArray[np.int64]]],
    src: NDArray[np.int64],
    codes: NDArray[np.int64] | None,
) -> dict[str, Any]:
    """{"rows", "best"} of partitions (threshold, clusters (N,)) of sequences of `src` (N,), for JSON.

    A row holds threshold, clusters, singletons, largest, and JOINS (`Joins.scores`) for each of TRUTHS: pairs
    of one source belong together; or, where `codes` (N,) has labels, pairs of one label, unlabelled
    sequences left out; or these without pairs of one source. "best" holds, for each truth, the threshold of
    largest macro F1, the lowest of equals; None where no label is known or no threshold has one.
    """
    rows = [_row(threshold, clusters, src, codes) for threshold, clusters in partitions]
    return {"rows": rows, "best": {truth: _best(rows, truth) for truth in TRUTHS}}


def _row(
    threshold: float, clusters: NDArray[np.int64], src: NDArray[np.int64], codes: NDArray[np.int64] | None
) -> dict[str, Any]:
    sizes = np.unique(clusters, return_counts=True)[1]
    known = codes if codes is not None and (codes != UNLABELLED).any() else None
    return {
        "threshold": threshold,
        "clusters": len(sizes),
        "singletons": int((sizes == 1).sum()),
        "largest": int(sizes.max(initial=0)),
        "by_source": joins(clusters, src).scores(),
        "by_label": None if known is None else joins(clusters, known).scores(),
        "by_label_across_sources": None if known is None else joins(clusters, known, src).scores(),
    }


def _best(rows: list[dict[str, Any]], truth: str) -> float | None:
    found = [row for row in rows if row[truth] is not None and row[truth]["macro_f1"] is not None]
    return max(found, key=lambda row: row[truth]["macro_f1"])["threshold"] if found else None
