"""Correlation clustering in blocks: pure steps, and the loop that strings them together.

Nobody needs all vectors at once. A task solves a block of sequences from its rows alone and returns
super-nodes, feature sums and sizes. Joint weights add up, so the same problem on super-nodes is exact for all
partitions that keep them whole, and *merging* blocks is the same algorithm one level up. What the blocking
cost is then won back in *rounds of moves*: tasks compare their rows with the broadcast sums of all clusters
and return only those that may gain; one process verifies and makes the moves in a canonical order. Some
rounds move tighter *parts* of clusters as wholes instead of rows. The first rounds look at the heaviest
clusters alone, which decide nearly all of the objective; to compare light rows with all light clusters costs
the most by far, so it is left until the heavy ones have settled.

Every step after the merge raises the objective or leaves it. The result depends on the blocks, the threshold
and the seed, not on how many tasks run at a time or which ends first. `solve_blocked` takes the parallel map
as an argument; with Ray it is a few lines, without it is the built-in loop.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rayscan.clustering.moves import (
    NEW,
    Clusters,
    Scorer,
    apply,
    best_others,
    propose,
    touched,
)
from rayscan.clustering.multilevel import content_order, merge, solve_nodes
from rayscan.clustering.objective import (
    F32,
    F64,
    I64,
    Floats,
    canonical,
    check_embeddings,
    check_threshold,
    cluster_sums,
)
from rayscan.clustering.partition import Partition
from rayscan.clustering.products import one_thread
from rayscan.clustering.splitting import LIFTS, tighter_parts

HEAVY_CLUSTERS = 4096
"""Clusters that are compared with rows before the last rounds, and with parts at all."""

LEAST_SHARE = 1e-5
"""Of the objective: a round that gains no more is the last."""

Load = Callable[[int], NDArray[np.floating[Any]]]
Map = Callable[[Callable[[Any, Any], Any], Sequence[Any], Any], Iterable[Any]]
"""map(task, items, shared): task(item, shared) for every item, results in the order of the items."""


def serial_map(task: Callable[[Any, Any], Any], items: Sequence[Any], shared: Any) -> Iterable[Any]:
    """The map without any parallelism."""
    return (task(item, shared) for item in items)


@dataclass(frozen=True)
class Solution:
    """Labels int64 of each block, and the clusters they number: by first members over all blocks.

    `rounds` passes over all rows were made after merging. `left` is the share of the objective that the last
    of them gained: 0 if no row can move with a gain, NaN if there was none that looked at all clusters.
    """

    labels: list[I64]
    clusters: Clusters
    rounds: int
    left: float

    def stopped(self, least_gain: float = LEAST_SHARE) -> str:
        """How far it is from the end, in words; "" if rounds ended by themselves."""
        if self.left <= least_gain:
            return ""
        if math.isnan(self.left):
            return f"stopped after {self.rounds} rounds; none has compared the rows with all clusters"
        return f"stopped after {self.rounds} rounds; the last still raised the objective by {self.left:.3%}"


def solve_block(vectors: Floats, threshold: float, seed: int = 0) -> tuple[I64, F64, F64]:
    """Clusters of one block from its rows alone.

    `vectors` (B, d): unit vectors, checked here. Returns labels int64 (B,), feature sums float64 (K, d) and
    numbers of points float64 (K,). An empty block gives no clusters. The order of the rows does not matter.
    """
    return _solve_block(vectors, check_threshold(threshold), seed, thorough=False)


@one_thread
def _solve_block(vectors: Floats, threshold: float, seed: int, thorough: bool) -> tuple[I64, F64, F64]:
    points = check_embeddings(vectors)
    order = content_order(points, seed)
    labels = np.empty(len(points), np.int64)
    one = np.ones(len(points))
    labels[order] = solve_nodes(points[order], one, threshold, seed, thorough=thorough).labels
    clusters = Clusters.of(points, labels, one)
    return labels, clusters.sums, clusters.sizes


@one_thread
def weights(vectors: Floats, labels: I64, clusters: Clusters, threshold: float) -> tuple[F64, F64]:
    """Weight of each point to the rest of its own cluster and to the best other one, float64 (B,) both.

    `labels` (B,) number `clusters`. The second is NaN where there is no other cluster. Of more than
    HEAVY_CLUSTERS only the heaviest are asked, since light ones would cost a product for each pair of rows.
    """
    points = check_embeddings(vectors)
    own = _weight(points, labels, clusters, threshold) + threshold
    own -= np.einsum("ij,ij->i", points, points, dtype=np.float64)
    _, target = best_others(points, labels, Scorer(clusters, threshold, most=HEAVY_CLUSTERS))
    best = _weight(points, np.maximum(target, 0), clusters, threshold) if len(clusters) else own
    return own, np.where(target == NEW, np.nan, best)


def _weight(points: F32, labels: I64, clusters: Clusters, threshold: float) -> F64:
    products: F64 = np.einsum("ij,ij->i", points, clusters.sums[labels], dtype=np.float64)
    return products - threshold * clusters.sizes[labels]


@one_thread
def solve_blocked(
    load_block: Load,
    n_blocks: int,
    threshold: float,
    *,
    seed: int = 0,
    max_rounds: int = 20,
    least_gain: float = LEAST_SHARE,
    map: Map = serial_map,
    mover_bytes: int = 512 << 20,
) -> Solution:
    """Correlation clustering of the rows of all blocks; no process holds them together.

    `load_block(i)` returns the unit vectors (B_i, d) of block i, always in the same order; tasks call it,
    so it must be picklable where `map` runs them elsewhere. Blocks of 10,000 to 100,000 rows suit most
    machines. The calling process holds some 40 bytes for each row, the sums of the clusters several times
    over, and at most about `mover_bytes` of rows that want to move, twice while they are put together. So
    memory follows the number of clusters: where the threshold leaves most rows alone, their sums are the rows
    themselves in float64. There are at most `max_rounds`
    passes over all rows after merging. Rounds over all clusters end with one that raised the objective by no
    more than a share of `least_gain`.
    """
    threshold = check_threshold(threshold)
    run = _start(load_block, n_blocks, threshold, seed, map)
    most = max(1, mover_bytes // max(1, n_blocks * 4 * run.clusters.sums.shape[1]))
    step = partial(_round, run, load_block, threshold, most, map)
    rounds, left = 0, math.nan if len(run.clusters) else 0.0
    phases = [(None, HEAVY_CLUSTERS), *((lift, HEAVY_CLUSTERS) for lift in LIFTS), (None, None)]
    for i, (lift, heavy) in enumerate(phases):
        share = -(-(max_rounds - rounds) // (len(phases) - i))  # of the rounds left, evenly
        if lift is not None and share > 1:
            step(lift, heavy)
            _join_clusters(run, threshold)
            rounds, share = rounds + 1, share - 1
        for _ in range(share):
            rounds += 1
            gained = step(None, heavy)
            left = gained if heavy is None else left
            if gained <= least_gain:
                break
    return _solution(run, rounds, left)


@dataclass
class _Run:
    """State between rounds: labels and memory of each block, clusters, and which changed since the memory."""

    labels: list[I64]
    clusters: Clusters
    memory: list[F32 | None]
    changed: NDArray[np.bool_]


@dataclass(frozen=True)
class _Movers:
    """Rows or groups of rows of one block that may gain by moving.

    `sums` (P, d), `sizes` (P,), `source` and `target` (P,); `rows` (R,) are the members of all, and `group`
    (R,) says of which.
    """

    sums: Floats
    sizes: F64
    source: I64
    target: I64
    rows: I64
    group: I64


def _start(load_block: Load, n_blocks: int, threshold: float, seed: int, map: Map) -> _Run:
    task = partial(_solve_task, load_block, threshold, seed, n_blocks == 1)
    solved = list(map(task, range(n_blocks), None))
    offset = np.cumsum([0, *(len(sizes) for _, _, sizes in solved)])
    if not offset[-1]:
        none = Clusters(np.empty((0, 0)), np.empty(0))
        return _Run([labels for labels, _, _ in solved], none, [None] * n_blocks, np.empty(0, bool))
    sums = np.concatenate([sums for _, sums, _ in solved if len(sums)])
    sizes = np.concatenate([sizes for _, _, sizes in solved])
    joined = merge(sums, sizes, threshold, seed) if n_blocks > 1 else np.arange(len(sizes))
    clusters = Clusters.of(sums, joined, sizes)
    labels = [joined[part + k] for (part, _, _), k in zip(solved, offset, strict=False)]
    return _Run(labels, clusters, [None] * n_blocks, np.ones(len(clusters), bool))


def _solve_task(
    load_block: Load, threshold: float, seed: int, thorough: bool, block: int, _: None
) -> tuple[I64, F64, F64]:
    return _solve_block(load_block(block), threshold, seed, thorough)


def _round(
    run: _Run,
    load_block: Load,
    threshold: float,
    most: int,
    map: Map,
    lift: float | None,
    heavy: int | None,
) -> float:
    """One pass over all rows, or with `lift` over parts of clusters; the share of the objective gained."""
    scorer = Scorer(run.clusters, threshold, run.changed if lift is None else None, heavy)
    task: Any = partial(_rows_task, load_block, most)
    if lift is not None:  # sums of parts are float64, rows float32
        task = partial(_parts_task, load_block, threshold + lift, max(1, most // 2))
    items = list(zip(range(len(run.labels)), run.labels, run.memory, strict=True))
    found: list[tuple[_Movers, F32 | None]] = list(map(task, items, scorer))
    run.memory = [memory for _, memory in found]
    if lift is None:
        run.changed = np.zeros(len(run.clusters), bool)
    gained = _move(run, [movers for movers, _ in found], threshold)
    return gained / max(gained, abs(_value(run.clusters, threshold))) if gained else 0.0


def _value(clusters: Clusters, threshold: float) -> float:
    """The objective of unit vectors."""
    pairs = clusters.sizes @ (clusters.sizes - 1)
    return float(
        0.5 * (np.einsum("ij,ij->", clusters.sums, clusters.sums) - clusters.sizes.sum() - threshold * pairs)
    )


def _move(run: _Run, found: list[_Movers], threshold: float) -> float:
    """Verifies and makes the moves that the blocks propose; the objective gained."""
    some = [movers for movers in found if len(movers.source)]
    if not some:
        return 0.0
    sums, sizes, source, target = (
        np.concatenate([getattr(movers, name) for movers in some])
        for name in ("sums", "sizes", "source", "target")
    )
    clusters, target, gained = apply(
        run.clusters, sums, sizes, source, target, np.arange(len(source)), threshold
    )
    at = 0
    for labels, movers in zip(run.labels, found, strict=True):
        labels[movers.rows] = target[at + movers.group]
        at += len(movers.source)
    run.changed = touched(len(clusters), run.changed, source, target)
    run.clusters = clusters
    _drop_empty(run)
    return gained


def _join_clusters(run: _Run, threshold: float) -> None:
    """Moves whole clusters into others where that gains."""
    several = np.flatnonzero(run.clusters.sizes > 1)
    whole = Partition(
        run.clusters.sums[several], run.clusters.sizes[several], threshold, several.copy(), run.clusters
    )
    whole.improve(most=HEAVY_CLUSTERS)
    joined = np.arange(len(run.clusters))
    joined[several] = whole.labels
    run.labels = [joined[labels] for labels in run.labels]
    run.clusters = whole.clusters
    run.changed = touched(len(whole.clusters), run.changed, several, whole.labels)
    _drop_empty(run)


def _drop_empty(run: _Run) -> None:
    held = run.clusters.sizes > 0
    number = np.cumsum(held) - 1
    run.labels = [number[labels] for labels in run.labels]
    run.clusters = Clusters(run.clusters.sums[held], run.clusters.sizes[held])
    run.changed = run.changed[held]


@one_thread
def _rows_task(
    load_block: Load, most: int, item: tuple[int, I64, F32 | None], scorer: Scorer
) -> tuple[_Movers, F32 | None]:
    block, labels, memory = item
    points = _load(load_block, block)
    found, memory = propose(points, np.ones(len(points)), labels, scorer, memory)
    v, target = _strongest(found.nodes, found.targets, found.gains, most)
    return _Movers(points[v], np.ones(len(v)), labels[v], target, v, np.arange(len(v))), memory


def _strongest(nodes: I64, targets: I64, gains: Floats, most: int) -> tuple[I64, I64]:
    """At most `most` of the proposals, by gain; the others come again in the next round."""
    keep = np.sort(np.argsort(-gains, kind="stable")[:most])
    return nodes[keep], targets[keep]


@one_thread
def _parts_task(
    load_block: Load, threshold: float, most: int, item: tuple[int, I64, F32 | None], scorer: Scorer
) -> tuple[_Movers, F32 | None]:
    """Proposals for parts of this block's share of each cluster; the memory of rows passes through."""
    block, labels, memory = item
    points = _load(load_block, block)
    parts = tighter_parts(points, np.ones(len(points)), labels, threshold)
    sums, sizes = cluster_sums(points, parts, int(parts.max(initial=-1)) + 1)
    parent = np.empty(len(sizes), np.int64)
    parent[parts] = labels
    several = np.flatnonzero(sizes > 1)  # single rows have rounds of their own
    means = (sums[several] / sizes[several, None]).astype(np.float32)
    found, _ = propose(means, sizes[several], parent[several], scorer)
    v = several[found.nodes]
    p, target = _strongest(v, found.targets, found.gains * sizes[v], most)
    number = np.full(len(sizes), -1, np.int64)
    number[p] = np.arange(len(p))
    rows = np.flatnonzero(number[parts] >= 0)
    return _Movers(sums[p], sizes[p], parent[p], target, rows, number[parts[rows]]), memory


def _load(load_block: Load, block: int) -> F32:
    """Rows of a block that were checked when it was solved."""
    return np.ascontiguousarray(load_block(block), np.float32)


def _solution(run: _Run, rounds: int, left: float) -> Solution:
    if not len(run.clusters):
        return Solution(run.labels, run.clusters, rounds, left)
    ends = np.cumsum([len(labels) for labels in run.labels])
    before = np.concatenate(run.labels)
    after = canonical(before)
    old = np.empty(len(run.clusters), np.int64)
    old[after] = before
    clusters = Clusters(run.clusters.sums[old], run.clusters.sizes[old])
    return Solution(np.split(after, ends[:-1]), clusters, rounds, left)
