"""A sweep in Ray tasks finds what one process finds, also when a task's process dies."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from rayscan import vectors
from rayscan.clustering.runs import Partition, runs, solve_run
from rayscan.stages import sweep as tasks
from rayscan.stages.sweep import in_tasks
from rayscan.vectors import partitions

THRESHOLDS = [round(0.04 * i, 2) for i in range(21)]


@pytest.fixture(scope="module")
def points() -> np.ndarray:
    """Unit vectors around 40 centres."""
    rng = np.random.default_rng(3)
    found = rng.standard_normal((40, 16))[rng.integers(40, size=120)] + 0.6 * rng.standard_normal((120, 16))
    return (found / np.linalg.norm(found, axis=1, keepdims=True)).astype(np.float32)


@pytest.fixture(scope="module")
def alone(points: np.ndarray) -> list[Partition]:
    return list(partitions(points, THRESHOLDS, seed=2))


def same(found: list[Partition], expected: list[Partition]) -> bool:
    assert [one.threshold for one in found] == [one.threshold for one in expected]
    return all(
        np.array_equal(a.labels, b.labels) and a.objective == b.objective
        for a, b in zip(found, expected, strict=True)
    )


def test_runs_stand_alone(points: np.ndarray, alone: list[Partition]) -> None:
    """Work is shared within a run only, so a run needs no other."""
    assert [len(run) for run in runs(THRESHOLDS)] == [7, 7, 7]
    assert same(list(solve_run(points, THRESHOLDS[7:14], 2)), alone[7:14])
    assert len({one.labels.max() for one in alone}) > 10, "these thresholds hardly differ"


@pytest.mark.ray
def test_tasks_find_the_same(ray_session: None, points: np.ndarray, alone: list[Partition]) -> None:
    assert same(list(in_tasks(points, runs(THRESHOLDS), seed=2)), alone)


@pytest.mark.ray
def test_a_long_sweep_goes_on_in_tasks(
    ray_session: None, points: np.ndarray, alone: list[Partition], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first run is timed; tasks do the others if that pays, and only then."""
    in_ray: list[object] = []

    def noted(points: np.ndarray, others: list[list[float]], *more: object) -> Iterator[Partition]:
        in_ray.extend(others)
        return in_tasks(points, others, *more)  # type: ignore[arg-type]

    monkeypatch.setattr(tasks, "in_tasks", noted)
    for pays, expected in ((1e9, []), (-1.0, runs(THRESHOLDS)[1:])):
        monkeypatch.setattr(vectors, "RAY_PAYS_S", pays)
        assert same(list(partitions(points, THRESHOLDS, seed=2)), alone)
        assert in_ray == expected


@pytest.mark.parametrize(("address", "expected"), [(None, []), ("ray://there:1", runs(THRESHOLDS)[1:])])
def test_one_core_leaves_a_sweep_to_a_named_cluster(
    points: np.ndarray, monkeypatch: pytest.MonkeyPatch, address: str | None, expected: list[list[float]]
) -> None:
    asked: list[list[float]] = []

    def noted(points: np.ndarray, others: list[list[float]], seed: int, address: str) -> Iterator[Partition]:
        asked.extend(others)
        return iter(())

    monkeypatch.setattr(tasks, "in_tasks", noted)
    monkeypatch.setattr(vectors, "RAY_PAYS_S", 0.0)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0})
    list(partitions(points, THRESHOLDS, seed=2, address=address))
    assert asked == expected


@pytest.mark.ray
def test_a_killed_task_runs_again(
    ray_session: None, points: np.ndarray, alone: list[Partition], tmp_path: Path
) -> None:
    """The process of a task dies for real, once, as it begins to solve."""
    driver, marker = os.getpid(), tmp_path / "killed"

    class Deadly(list[float]):
        def __iter__(self) -> Iterator[float]:
            if os.getpid() != driver and not marker.exists():
                marker.touch()
                os.kill(os.getpid(), signal.SIGKILL)
            return super().__iter__()

    first, second, third = runs(THRESHOLDS)
    found = list(in_tasks(points, [first, Deadly(second), third], seed=2))
    assert marker.exists(), "nothing was killed"
    assert same(found, alone)
