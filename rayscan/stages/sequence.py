"""Flows to sequences: a map over (period, bucket), since a bucket holds all flows of its sources.

A task reads one bucket's flow files, so its memory is a bucket's, whatever the number of periods.
"""

from __future__ import annotations

from dataclasses import dataclass

from rayscan import sequences
from rayscan.config import RunConfig
from rayscan.errors import DataError, RayscanError
from rayscan.planning import Unit
from rayscan.progress import say, track
from rayscan.stages import metrics
from rayscan.stages.commits import PeriodCommits
from rayscan.stages.session import run_tasks
from rayscan.tables import CommitInfo, File, Workspace


@dataclass
class Counts:
    units: int = 0
    sequences: int = 0
    dropped_flows: int = 0  # flows in no sequence: too few of their source in the period
    dropped_sources: int = 0


def run(workspace: Workspace, config: RunConfig, due: list[Unit], info: CommitInfo) -> Counts:
    """Build the sequences of every unit that is due and commit them, period by period.

    A bucket that fails keeps its period from being committed, and no other. Raises DataError in the end.
    """
    settings = config.sequences

    def work(unit: Unit) -> tuple[File | None, sequences.Dropped] | None:
        return build_unit(workspace, unit, settings.length, settings.min_length)

    failures: list[str] = []

    def failed(unit: Unit, error: RayscanError) -> None:
        failures.append(f"{unit.name}: {error}")
        say(f"sequences: {failures[-1]}")

    counts = Counts()
    commits = PeriodCommits(workspace, "sequences", due, info)
    with track("sequences", len(due), "buckets") as advance:
        resources = config.resources
        tasks = run_tasks(
            work, due, cpus=resources.sequence_cpus, memory_mb=resources.sequence_memory_mb, failed=failed
        )
        for unit, made in tasks:
            if made is None:
                advance(1, "")
                continue
            file, dropped = made
            commits.add(unit, [file])
            counts.units += 1
            counts.sequences += file.rows if file else 0
            metrics.add("sequences", config.run, file.rows if file else 0)
            counts.dropped_flows += dropped.flows
            counts.dropped_sources += dropped.sources
            advance(1, f"{counts.sequences:,} sequences")
    if failures:
        raise DataError(f"{len(failures)} of {len(due)} buckets failed, the others are done. {failures[0]}")
    return counts


def build_unit(
    workspace: Workspace, unit: Unit, length: int, min_length: int
) -> tuple[File | None, sequences.Dropped]:
    """Sequences of one bucket, written but not committed. None where there are none."""
    flows = workspace.table("flows").read_files(unit.files)
    table, dropped = sequences.build(flows, length, min_length)
    if table.num_rows == 0:
        return None, dropped
    return workspace.table("sequences").write(table, unit.key), dropped
