"""Sequences for training and validation, read from the workspace by whoever needs them.

By itself, since tasks that read a sample need no Ray Train, which takes as long to import as PyTorch.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Any

from rayscan.config import RunConfig
from rayscan.model.features import Sequences, columns_for
from rayscan.model.sampling import validation_sample
from rayscan.stages.session import run_tasks
from rayscan.tables import File, Workspace


def by_bucket(files: list[File]) -> dict[str, list[File]]:
    """All periods of a bucket stand under one key, so that pairs are drawn across periods too."""
    buckets: dict[str, list[File]] = defaultdict(list)
    for file in files:
        buckets[file.key["bucket"]].append(file)
    return dict(buckets)


def loader(
    workspace: Workspace, config: RunConfig, buckets: dict[str, list[File]]
) -> Callable[[Any], Sequences]:
    """What reads the sequences of a bucket, with the columns that the model needs."""
    inputs = config.model.inputs

    def load(bucket: Any) -> Sequences:
        table = workspace.table("sequences").read_files(buckets[bucket], columns_for(inputs))
        return Sequences.from_table(table, inputs)

    return load


def read_validation(workspace: Workspace, config: RunConfig, files: list[File]) -> Sequences | None:
    """The sequences to validate on, None where there are too few."""
    buckets = by_bucket(files)
    return validation_sample(tuple(buckets), loader(workspace, config, buckets), config.split)


def validation_in_task(workspace: Workspace, config: RunConfig, files: list[File]) -> Sequences | None:
    """The same from a task: workers would have to wait for the one of them that read."""

    def work(_: None) -> Sequences | None:
        return read_validation(workspace, config, files)

    ((_, found),) = run_tasks(work, [None], cpus=config.resources.train_cpus)
    return found
