"""Many thresholds, cut into runs of neighbouring ones.

Neighbours share most of their clusters, so a run is solved as a chain (`solver.sweep`). Runs share nothing:
any number of processes may take them and find what one would. The cut depends on the grid alone.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rayscan.clustering.objective import F32, objective
from rayscan.clustering.solver import sweep

RUN = 10
"""Most thresholds of a run. More share more work, fewer divide better."""


@dataclass(frozen=True)
class Partition:
    """A clustering and what it is worth."""

    threshold: float
    labels: NDArray[np.int64]
    objective: float
    seconds: float
    left: float = 0.0
    """What the last pass over all vectors still gained, as a share of the objective: 0 at an optimum."""

    def summary(self) -> dict[str, Any]:
        sizes = np.sort(np.bincount(self.labels))[::-1] if len(self.labels) else np.zeros(0, np.int64)
        return {
            "threshold": self.threshold,
            "points": len(self.labels),
            "clusters": len(sizes),
            "singletons": int((sizes == 1).sum()),
            "largest": [int(size) for size in sizes[:10]],
            "objective": self.objective,
            "left": self.left,
            "seconds": round(self.seconds, 2),
        }


def runs(thresholds: Sequence[float]) -> list[list[float]]:
    """The thresholds cut into runs of at most RUN, of nearly equal length."""
    count = -(-len(thresholds) // RUN)
    ends = [len(thresholds) * i // count for i in range(count + 1)]
    return [list(thresholds[a:b]) for a, b in itertools.pairwise(ends)]


def solve_run(points: F32, thresholds: Sequence[float], seed: int) -> Iterator[Partition]:
    """Solve at neighbouring thresholds, each with the help of the one before."""
    found = sweep(points, thresholds, seed=seed)
    for threshold in thresholds:
        start = time.perf_counter()
        labels = next(found)
        seconds = time.perf_counter() - start
        yield Partition(threshold, labels, objective(points, labels, threshold), seconds)
