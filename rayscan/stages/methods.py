"""Methods of others in the encoder's place: one task learns, and a task for each period embeds.

Every task holds all of its sequences, for the methods are made so (`methods.method`). With some of them a
vector depends on what else the period holds, so periods are embedded whole, and when a bucket changes all of
its period is due (`planning.embed_units`). A sequence that the method does not know has no row among the
embeddings; how many these are is counted and said.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from rayscan import planning
from rayscan.config import RunConfig
from rayscan.errors import ConfigError
from rayscan.evaluation.splits import TRAIN, part_of
from rayscan.methods import artefact
from rayscan.methods.method import method
from rayscan.planning import Model, Unit
from rayscan.progress import say, track
from rayscan.stages.commits import PeriodCommits
from rayscan.stages.embed import as_table
from rayscan.stages.session import check_room, run_tasks
from rayscan.stages.train import model_card
from rayscan.tables import CommitInfo, File, Workspace


@dataclass
class Trained:
    method: str
    sequences: int  # learnt from
    model: str


@dataclass
class Embedded:
    units: int = 0
    embeddings: int = 0
    not_covered: int = 0
    inferred: int = 0


@dataclass(frozen=True)
class _Made:
    """What a task made of a period: a file for each of its units, and of its sequences how many."""

    files: list[File | None]
    covered: int
    not_covered: int
    inferred: int


def train(workspace: Workspace, config: RunConfig, fresh: bool) -> Trained:
    """Fit the method that the settings ask for and store it. `fresh` forgets one that is there already."""
    name, settings = config.train.method, config.train
    method(name)  # says which packages are missing
    if settings.start is not None:
        raise ConfigError(f"train.start: training goes on from encoders only, and train.method is {name}")
    model = planning.model_id(config)
    if fresh:
        workspace.delete(f"models/{model}")
    check_room(config.resources.train_cpus, 0)
    files = planning.training_files(workspace, config)

    def work(name: str) -> int:
        sequences = workspace.table("sequences").read_files(files)
        src, index, siblings = (sequences[key].to_numpy() for key in ("src", "index", "sequences"))
        part = part_of(src, index, siblings, config.split)
        fitted = method(name).fit(name, sequences, part, settings.seed)
        card = model_card(
            workspace, config, model, files, {}, {"method": name, "seed": settings.seed, **fitted.facts}
        )
        artefact.save(lambda file, data: workspace.write_bytes(f"models/{model}/{file}", data), fitted, card)
        return int((part == TRAIN).sum())

    with track("train", 1, "methods") as advance:
        ((_, learnt),) = run_tasks(work, [name], cpus=config.resources.train_cpus)
        advance(1, name)
    return Trained(name, learnt, model)


def embed(
    workspace: Workspace, config: RunConfig, model: Model, due: list[Unit], info: CommitInfo
) -> Embedded:
    """Embed every period that is due and commit it."""
    counts = Embedded()
    commits = PeriodCommits(workspace, "embeddings", due, info)
    periods: dict[str, list[Unit]] = defaultdict(list)
    for unit in due:
        periods[unit.key["period"]].append(unit)

    def work(units: list[Unit]) -> _Made:
        return _embed_period(workspace, model, units)

    with track("embed", len(periods), "periods") as advance:
        for units, made in run_tasks(work, periods.values(), cpus=config.resources.embed_cpus):
            for unit, file in zip(units, made.files, strict=True):
                commits.add(unit, [file])
            counts.units += len(units)
            counts.embeddings += made.covered
            counts.not_covered += made.not_covered
            counts.inferred += made.inferred
            advance(1, f"{counts.embeddings:,} sequences")
    if counts.not_covered:
        say(f"embed: {counts.not_covered:,} sequences have no vector: {model.method} does not know them")
    return counts


def _embed_period(workspace: Workspace, model: Model, units: list[Unit]) -> _Made:
    fitted, _ = artefact.load(lambda name: workspace.read_bytes(f"{model.folder}/{name}"))
    embeddings = workspace.table("embeddings")
    tables = [workspace.table("sequences").read_files(unit.files) for unit in units]
    found = fitted.embed(pa.concat_tables(tables))
    files: list[File | None] = []
    begin = 0
    for unit, sequences in zip(units, tables, strict=True):
        rows = np.flatnonzero(found.covered[begin : begin + sequences.num_rows])
        vectors = found.vectors[begin + rows]
        begin += sequences.num_rows
        empty = not len(rows)
        files.append(None if empty else embeddings.write(as_table(sequences.take(rows), vectors), unit.key))
    known = int(found.covered.sum())
    return _Made(files, known, len(found.covered) - known, int(found.inferred.sum()))
