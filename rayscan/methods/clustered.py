"""Clusters at the threshold that suited validation sequences best, scored on sequences that had no say in it.

Cosines of two methods cannot be compared as they stand: one spreads its vectors over the sphere, another
packs them into a cone. So every method gets the threshold at which its own clusters agree best with what is
known of validation sequences, and is scored with it on a test part. Candidates are quantiles of its
similarities of validation pairs, from the middle to one pair in 100,000.

The score is the F1 of joins: over pairs of sequences, how many that share a cluster are of one source, and
the other way round; or of one label, where only pairs of different sources count (see
`evaluation.partitions`). The threshold is chosen for each of the two apart. Intervals are by bootstrap over
sources, with the clusters as they are.

Beside it stands what DarkVec's authors cluster with, whatever the vectors are: Louvain communities of the
graph of nearest neighbours. It has no threshold to choose.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import networkx as nx
import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from rayscan.clustering import canonical, solve, sweep
from rayscan.config import EvaluateConfig
from rayscan.evaluation.intervals import Resamples, figure
from rayscan.evaluation.neighbours import NONE, top_k
from rayscan.evaluation.partitions import UNLABELLED

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]
Ints = NDArray[np.int64]

CANDIDATES = 30
_LARGEST_SHARE, _LEAST_SHARE = 0.5, 1e-5
_PAIRS = 1_000_000


@dataclass(frozen=True)
class Members:
    """Sequences to cluster, N of them.

    vectors  float32 (N, d), rows of length 1
    source   int64 (N,), positions from 0 without gaps
    label    int64 (N,), a position or UNLABELLED
    """

    vectors: F32
    source: Ints
    label: Ints


def scores(
    validation: Members, tests: Mapping[str, Members], kind: str, config: EvaluateConfig
) -> dict[str, Any] | None:
    """{"threshold": float, "parts": {NAME: {"f1": FIGURE, "clusters": int}}}; kind is "source" or "label".

    None where validation has no pair that belongs together, for then nothing can be chosen.
    """
    thresholds = candidates(validation.vectors, config.seed)
    if not thresholds:
        return None
    once = np.ones((1, int(validation.source.max()) + 1))
    labels = sweep(validation.vectors, thresholds, seed=config.seed)
    agreed = np.array([joins_f1(validation, cluster, kind, once)[0] for cluster in labels])
    if not np.isfinite(agreed).any() or np.nanmax(agreed) == 0:
        return None
    best = np.flatnonzero(agreed == np.nanmax(agreed))
    threshold = thresholds[int(best[len(best) // 2])]  # in the middle of those that are equally good
    parts = {}
    for name, members in tests.items():
        cluster = solve(members.vectors, threshold, seed=config.seed)
        parts[name] = {"f1": f1(members, cluster, kind, config), "clusters": len(np.unique(cluster))}
    return {"threshold": threshold, "parts": parts}


def candidates(vectors: F32, seed: int) -> list[float]:
    """Thresholds, rising: quantiles of the similarities of random pairs. None for fewer than two vectors."""
    n = len(vectors)
    if n < 2:
        return []
    rng = np.random.default_rng(seed)
    first, other = rng.integers(n, size=_PAIRS), rng.integers(n - 1, size=_PAIRS)
    other += other >= first
    similarity = np.concatenate(
        [
            np.einsum("ij,ij->i", vectors[a], vectors[b])
            for a, b in zip(np.array_split(first, 50), np.array_split(other, 50), strict=True)
        ]
    )
    shares = np.geomspace(_LARGEST_SHARE, _LEAST_SHARE, CANDIDATES)
    return [float(x) for x in np.unique(np.quantile(similarity, 1 - shares))]


def joins_f1(members: Members, cluster: Ints, kind: str, weights: F64) -> F64:
    """F1 of joins in each resample, float64 (R,); NaN where no pair is joined and none belongs together.

    `weights` (R, sources) say how often each source is drawn. Two copies of a source make no pair of
    different sources.
    """
    if kind == "source":
        both = _within(cluster, members.source, weights)
        together = _within(np.zeros_like(cluster), members.source, weights)
        joined = both + _across(cluster, members.source, weights)
    else:
        rows = np.flatnonzero(members.label != UNLABELLED)
        cluster, label, source = cluster[rows], members.label[rows], members.source[rows]
        together = _across(label, source, weights)
        joined = _across(cluster, source, weights)
        both = _across(cluster * (label.max(initial=0) + 1) + label, source, weights)
    either = joined + together
    undefined = np.full(len(weights), np.nan)
    return np.asarray(np.divide(2 * both, either, out=undefined, where=either > 0))


def f1(members: Members, cluster: Ints, kind: str, config: EvaluateConfig) -> dict[str, Any]:
    """F1 of joins as a FIGURE, with its interval over sources."""
    sources = int(members.source.max(initial=-1)) + 1
    value = joins_f1(members, cluster, kind, np.ones((1, sources)))[0]
    drawn = Resamples(sources, config.bootstrap, config.seed)
    weights = np.array([*drawn], np.float64).reshape(config.bootstrap, sources)
    draws = joins_f1(members, cluster, kind, weights)
    return figure(value, draws, sources)


def communities(vectors: F32, k: int = 3, seed: int = 0) -> Ints:
    """Louvain communities of the graph of k nearest neighbours, weighed by cosine: int64 (N,).

    `vectors` are of length 1. Equal rows are one node: a source whose sequences all have its vector would
    else be its own nearest neighbours, and an island. A neighbour either way makes an edge; cosines of 0 or
    less make none. Communities are numbered by their first row.
    """
    vectors, node = np.unique(vectors, axis=0, return_inverse=True)
    index, cosine = top_k(vectors, k, np.arange(len(vectors)))
    graph = nx.Graph()
    graph.add_nodes_from(range(len(vectors)))
    rows, places = np.nonzero((index != NONE) & (cosine > 0))
    ends = index[rows, places].tolist()
    graph.add_weighted_edges_from(zip(rows.tolist(), ends, cosine[rows, places].tolist(), strict=True))
    found = np.empty(len(vectors), np.int64)
    for number, members in enumerate(nx.community.louvain_communities(graph, seed=seed)):
        found[list(members)] = number
    return canonical(found[node.reshape(-1)])


def _table(group: Ints, source: Ints, sources: int) -> sparse.csr_array:
    """Sequences of each group and source."""
    _, row = np.unique(group, return_inverse=True)
    shape = (int(row.max(initial=-1)) + 1, sources)
    return sparse.coo_array((np.ones(len(row)), (row, source)), shape=shape).tocsr()


def _across(group: Ints, source: Ints, weights: F64) -> F64:
    """Pairs of different sources that share a group, in each resample."""
    table = _table(group, source, weights.shape[1])
    squares = np.asarray(table.power(2).sum(axis=0))
    return np.asarray(((table @ weights.T) ** 2).sum(axis=0) - weights**2 @ squares) / 2


def _within(group: Ints, source: Ints, weights: F64) -> F64:
    """Pairs of one source that share a group, in each resample."""
    table = _table(group, source, weights.shape[1])
    pairs = np.asarray(table.power(2).sum(axis=0)) - np.bincount(source, minlength=weights.shape[1])
    return np.asarray(weights @ pairs / 2)
