"""Correlation clustering of vectors that fit in memory: `solve`, and `sweep` for many thresholds.

Maximises Σ (⟨e_i, e_j⟩ − θ) over pairs that share a cluster. Equal rows become one node and nodes are taken
in an order that follows from their contents and the seed: permuting the rows permutes the labels and
changes nothing else. Rotating all vectors changes that order, so the partition may differ and the objective
differs by what two seeds differ. The problem is NP-hard and no ratio to the optimum is guaranteed. What
holds: no single row can move with a gain; a last round of splitting and joining clusters gained less than a
ten-thousandth; and up to SMALL distinct rows greedy additive edge contraction (in float32 order) is one of
the starts, so that the result is not below it.

Equal data and seed give equal labels. Chance enters through seeded generators only, every move is decided in
float64 from the sums, and products that only propose are cut into tiles by the data alone and formed by one
thread (`products.one_thread`). Another BLAS or processor may round proposals otherwise and find another local
optimum.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import ArrayLike

from rayscan.clustering.greedy import greedy_contraction
from rayscan.clustering.multilevel import SMALL, content_order, cross, solve_nodes
from rayscan.clustering.objective import (
    F64,
    I64,
    UNIT_TOLERANCE,
    Floats,
    canonical,
    check_embeddings,
    check_sums,
    check_threshold,
    cluster_sums,
    objective,
)
from rayscan.clustering.partition import Partition
from rayscan.clustering.products import one_thread
from rayscan.clustering.splitting import refine
from rayscan.errors import DataError

SAME = (1 - UNIT_TOLERANCE) ** 2
"""Up to this threshold equal rows have positive weight, so some optimum keeps them together."""

THOROUGH_EVERY = 3
"""In a sweep of more than SMALL nodes, thresholds from one solution with several starts to the next."""


@one_thread
def solve(
    embeddings: ArrayLike,
    threshold: float,
    *,
    seed: int = 0,
    sizes: ArrayLike | None = None,
    init: ArrayLike | None = None,
    normalise: bool = False,
    greedy: bool = False,
) -> I64:
    """Cluster of each row, int64 (N,), numbered from 0 in the order of their first members.

    `embeddings` (N, d): unit vectors, or any vectors but zero with `normalise`. `threshold`: the similarity
    at which joining and cutting a pair cost the same; any finite number. With `sizes` (N,) rows are
    super-nodes: sums of that many unit vectors, kept whole. With `init` (N,) the search starts from these
    labels and never ends below them. `greedy` gives greedy additive edge contraction (Keuper et al., ICCV
    2015) and nothing after it. Raises DataError for rows that are not finite or not of length 1, and for
    shapes that do not fit.
    """
    vectors, counts = _check_nodes(embeddings, sizes, normalise)
    threshold = check_threshold(threshold)
    if greedy and init is not None:
        raise DataError("greedy contraction starts from single rows: leave out init, or greedy")
    if init is not None and np.shape(init) != (len(vectors),):
        raise DataError(f"init must have one label for each of {len(vectors)} rows, not {np.shape(init)}")
    trivial = _trivial(len(vectors), threshold)
    if trivial is not None:
        return trivial
    if greedy:
        return canonical(greedy_contraction(vectors, counts, threshold))
    if init is not None:
        partition, back = Partition.of(vectors, counts, canonical(init), threshold), np.arange(len(vectors))
        partition.improve()
    else:
        nodes, weights, back = _distinct(vectors, counts, seed, sizes is None and threshold <= SAME)
        partition = solve_nodes(nodes, weights, threshold, seed)
    refine(partition)
    return canonical(partition.labels[back])


def sweep(
    embeddings: ArrayLike, thresholds: Sequence[float], *, seed: int = 0, normalise: bool = False
) -> Iterator[I64]:
    """Labels for each threshold in the order given, at half the cost of `solve` and nearly its objective.

    Neighbouring thresholds share most of their clusters: the result before is moved to its new optimum and
    crossed with a fresh one, which takes several starts at every third threshold and one between. Best
    given in rising or falling order. Measured at N = 10,000, twenty thresholds: 0.9965 to 1 of `solve`.
    """
    points = check_embeddings(embeddings, normalise=normalise)
    nodes, weights, back = _distinct(points, np.ones(len(points)), seed, max(thresholds, default=0) <= SAME)
    labels: I64 | None = None
    for i, value in enumerate(thresholds):
        threshold = check_threshold(value)
        trivial = _trivial(len(points), threshold)
        if trivial is not None:
            yield trivial
            continue
        thorough = labels is None or len(nodes) <= SMALL or i % THOROUGH_EVERY == 0
        labels = _next(nodes, weights, labels, threshold, seed, thorough)
        yield canonical(labels[back])


@one_thread
def _next(
    nodes: Floats, weights: F64, before: I64 | None, threshold: float, seed: int, thorough: bool
) -> I64:
    """Labels of a fresh solution, crossed with those at the threshold before."""
    fresh = solve_nodes(nodes, weights, threshold, seed, thorough=thorough)
    if before is None:
        return fresh.labels
    moved = Partition.of(nodes, weights, before, threshold)
    moved.improve()
    return _better(moved, fresh).labels


def _check_nodes(embeddings: ArrayLike, sizes: ArrayLike | None, normalise: bool) -> tuple[Floats, F64]:
    if sizes is not None:
        if normalise:
            raise DataError(
                "rows with sizes are sums, which cannot be normalised: give unit vectors, or sums"
            )
        return check_sums(embeddings, sizes)
    points = check_embeddings(embeddings, normalise=normalise)
    return points, np.ones(len(points))


def _trivial(n: int, threshold: float) -> I64 | None:
    """The answer where all weights have one sign, whatever the vectors."""
    most = (1 + UNIT_TOLERANCE) ** 2
    if n == 0 or threshold > most:
        return np.arange(n)
    return np.zeros(n, np.int64) if threshold < -most or n == 1 else None


def _better(before: Partition, fresh: Partition) -> Partition:
    """The better of two local optima, crossed with the other."""
    a, b = (objective(p.vectors, p.labels, p.threshold, p.sizes) for p in (before, fresh))
    best, other = (before, fresh) if a > b else (fresh, before)
    cross(best, other.labels)
    best.compact()
    return best


def _distinct(vectors: Floats, counts: F64, seed: int, unite: bool) -> tuple[Floats, F64, I64]:
    """Nodes in content order, points of each, and where every row went; with `unite` equal rows are one."""
    order = content_order(np.concatenate([vectors, counts[:, None]], axis=1, dtype=vectors.dtype), seed)
    ordered, sizes = vectors[order], counts[order]
    new = np.ones(len(order), bool)
    if unite:
        new[1:] = (ordered[1:] != ordered[:-1]).any(axis=1)
    node = np.cumsum(new) - 1
    back = np.empty(len(order), np.int64)
    back[order] = node
    if new.all():
        return ordered, sizes, back
    sums, totals = cluster_sums(ordered, node, int(node[-1]) + 1, sizes)
    return sums, totals, back
