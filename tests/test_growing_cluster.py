"""A cluster whose head runs no task and whose other machines are yet to come: as `cluster.yaml` makes it."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from growing_cluster import GrowingCluster, growing_cluster
from processes import kill_tree
from tiny import TINY

from rayscan.simulate import simulate_to

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(600)]
SETTINGS = (
    *TINY, "ingest.n_buckets=4", "train.steps=6", "train.workers=2", "embed.workers=2",
    "evaluate.bootstrap=0",
)  # fmt: skip


@pytest.fixture(scope="module")
def cluster() -> Iterator[GrowingCluster]:
    folder = Path(tempfile.mkdtemp(prefix="rs-"))
    try:
        with growing_cluster(folder, machines=3) as made:
            yield made
    finally:
        shutil.rmtree(folder, ignore_errors=True)


WORK = """
import itertools, json, os, sys, time
import ray
from rayscan.config import ResourcesConfig
from rayscan.stages.session import run_tasks, session

def work(item):
    began = time.time()
    time.sleep(0.5)
    raylet = os.getppid()
    return began, time.time(), ray.get_runtime_context().get_node_id(), raylet

enough = lambda _: not os.path.exists(sys.argv[1])
with session(ResourcesConfig()):
    for item, result in run_tasks(work, itertools.takewhile(enough, itertools.count())):
        print(json.dumps([item, *result]), file=sys.__stdout__, flush=True)
    sys.stdin.read()
"""


def test_tasks_that_wait_bring_all_machines_and_one_that_is_lost_costs_what_ran_there(
    cluster: GrowingCluster, tmp_path: Path
) -> None:
    """Each has one CPU. Two tasks in flight, all that no CPU at all allows for, never run three at once.

    What Ray says of the machine, by its health checks at the latest, is not among the data on stdout.
    """
    enough = tmp_path / "enough"
    process = subprocess.Popen(
        [sys.executable, "-c", WORK, str(enough)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=cluster.environment,
    )
    assert process.stdout and process.stderr
    rows = []
    while most_at_once(rows) < cluster.machines:
        line = process.stdout.readline()
        assert line, process.communicate()
        rows.append(json.loads(line))
    assert len({machine for *_, machine, _ in rows}) == cluster.machines
    kill_tree(rows[-1][-1])  # the raylet and its workers, all that a machine has
    enough.touch()
    errors = ""
    for line in process.stderr:
        errors += line
        if line.startswith("(raylet)"):  # without the codes of a colour
            break
    said, _ = process.communicate(timeout=300)  # it stays until its stdin is closed: here
    rows += [json.loads(line) for line in said.splitlines()]
    assert sorted(item for item, *_ in rows) == list(range(len(rows))), errors
    assert "waiting for the cluster to grow: 1 processes with 1 CPU each" in errors
    assert "\n(raylet)" in errors


def most_at_once(rows: list[list[Any]]) -> int:
    """The most tasks that ran at one time."""
    return max((sum(began <= at < ended for _, began, ended, *_ in rows) for _, at, *_ in rows), default=0)


def test_every_stage_finds_its_machines(cluster: GrowingCluster, tmp_path: Path) -> None:
    captures = simulate_to(tmp_path / "telescope", months=1, sources=200, flows=6000, seed=5).captures
    sets = [word for one in (*SETTINGS, f"captures.paths={captures}") for word in ("--set", one)]
    line = [sys.executable, "-m", "rayscan", "run", "-w", str(tmp_path / "ws"), "--preset", "quick", *sets]
    done = subprocess.run(line, capture_output=True, text=True, env=cluster.environment)
    assert done.returncode == 0, done.stderr
    tune = ["--set", "tune.space={train.learning_rate: {loguniform: [1e-4, 1e-2]}}", "--set", "tune.trials=2"]
    done = subprocess.run(
        [*line[:3], "tune", *line[4:], *tune], capture_output=True, text=True, env=cluster.environment
    )
    assert done.returncode == 0, done.stderr
    assert "at most 2 at a time" in done.stderr
