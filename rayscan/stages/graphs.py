"""The graph methods by their authors' own protocol: one Ray task for each method and seed.

All sources are in the graph; every day's hosts are told by their nearest neighbours (`graph.daily_scores`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import numpy as np

from rayscan.captures.scanners import Scanners
from rayscan.config import RunConfig
from rayscan.methods import graph
from rayscan.planning import sequence_files
from rayscan.progress import track
from rayscan.stages.lists import label_lists, relabelled
from rayscan.stages.session import run_tasks
from rayscan.tables import Workspace

_Job = tuple[str, int]


def run(
    workspace: Workspace,
    config: RunConfig,
    methods: Sequence[str],
    periods: Sequence[str],
    seeds: int,
    first: int,
    as_published: bool,
) -> list[dict[str, Any]]:
    """{"method", "seed", "mean", "std", "ports", "days": [{"day", "hosts", "macro_f1", "ports"}]} of each.

    None stands for days without a class. Raises DataError where there are no sequences in these periods, or
    no more than `first` days of them.
    """
    files = sequence_files(workspace, periods)
    jobs = [(name, seed) for name in methods for seed in range(seeds)]

    def work(job: _Job, known: Scanners | None = None) -> dict[str, Any]:
        name, seed = job
        sequences = relabelled(workspace.table("sequences").read_files(files), known)
        settings = replace(graph.SETTINGS[name], as_published=as_published)
        return _facts(graph.daily_scores(sequences, seed, settings, first))

    found = {}
    with track("graphs", len(jobs), "methods and seeds") as advance:
        lists = label_lists(workspace, config)
        for job, facts in run_tasks(work, jobs, cpus=config.resources.train_cpus, shared=lists):
            found[job] = {"method": job[0], "seed": job[1], **facts}
            advance(1, f"{job[0]}, seed {job[1]}")
    return [found[job] for job in jobs]


def _facts(scores: graph.Scores) -> dict[str, Any]:
    begun = datetime(1970, 1, 1, tzinfo=UTC)
    days = [
        {
            "day": f"{begun + timedelta(days=number):%Y-%m-%d}",
            "hosts": hosts,
            "macro_f1": _number(score),
            "ports": _number(floor),
        }
        for number, hosts, score, floor in zip(*(column.tolist() for column in scores[:4]), strict=True)
    ]
    valid = scores.ports[~np.isnan(scores.ports)]
    ports = float(valid.mean()) if len(valid) else None
    return {"mean": _number(scores.mean), "std": _number(scores.std), "ports": ports, "days": days}


def _number(value: float) -> float | None:
    return None if np.isnan(value) else value
