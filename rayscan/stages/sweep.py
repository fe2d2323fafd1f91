"""A sweep over thresholds on Ray: one task for each run of neighbouring thresholds.

What a run finds depends on the vectors, its thresholds and the seed alone. So any number of workers, and a
task that is retried after its worker was lost, give the labels that one process gives.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from rayscan.clustering.objective import F32
from rayscan.clustering.runs import Partition, runs, solve_run
from rayscan.config import ResourcesConfig
from rayscan.stages.session import run_tasks, session


def in_tasks(
    points: F32, parts: Sequence[Sequence[float]], seed: int, address: str | None = None
) -> Iterator[Partition]:
    """`solve_run` of every run as a Ray task; partitions in the order of the thresholds.

    Joins the cluster at `address`, or starts a local Ray for the time of the sweep.
    """

    cores = len(os.sched_getaffinity(0))
    store = 512 + 2 * (points.nbytes >> 20)  # the vectors, and labels on their way back
    with session(ResourcesConfig(local_cpus=cores, object_store_mb=store), address):
        yield from _solved(points, parts, seed)


def partitions_at(
    points: F32, thresholds: Sequence[float], seed: int
) -> Iterator[tuple[float, NDArray[np.int64]]]:
    """Each threshold, in rising order, with the labels (N,) found there; on the Ray that runs."""
    for one in _solved(points, runs(thresholds), seed):
        yield one.threshold, one.labels


def _solved(points: F32, parts: Sequence[Sequence[float]], seed: int) -> Iterator[Partition]:
    def work(run: Sequence[float], shared: F32) -> list[Partition]:
        return list(solve_run(shared, run, seed))

    for _, found in run_tasks(work, parts, ordered=True, shared=points):
        yield from found
