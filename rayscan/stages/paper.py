"""The published protocol on a workspace: anchors drawn by bucket, pairs and thresholds as Ray tasks.

Written are `evaluation-paper.json` and, for each part that is studied, `tsne-PART.parquet`.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from rayscan.clustering import solve
from rayscan.config import PaperConfig, RunConfig
from rayscan.evaluation import anchors, paper
from rayscan.evaluation.credit import paper_without_sources
from rayscan.evaluation.parts import Terms
from rayscan.evaluation.protocol import part_data
from rayscan.evaluation.splits import PART_NAMES, TRAIN, UNSEEN_SEQUENCES, UNSEEN_SOURCES, VALIDATION
from rayscan.evaluation.thresholds import THRESHOLDS
from rayscan.methods.method import ONE_VECTOR_A_SOURCE
from rayscan.planning import PAPER, Model, config_hash, run_file
from rayscan.progress import say, track
from rayscan.stages.evaluate import in_tasks
from rayscan.stages.lists import label_lists
from rayscan.stages.session import run_tasks
from rayscan.stages.similarity import Sample, sample_parts
from rayscan.stages.sweep import partitions_at
from rayscan.tables import Workspace

_PARTS = (TRAIN, UNSEEN_SEQUENCES, UNSEEN_SOURCES, VALIDATION)
_DRAWS = ("all", "labelled", "unlabelled")


def run(workspace: Workspace, config: RunConfig, model: Model, made_from: str) -> dict[str, Any]:
    """Evaluate as published and write it down. Returns the figures that head it."""
    known = label_lists(workspace, config)
    settings = config.paper

    def choose(table: pa.Table) -> tuple[pa.Table, NDArray[np.int64]]:
        drawn = table if _DRAWS[0] in table.column_names else _with_times(table, settings.seed)
        return drawn, np.unique(np.concatenate(list(_rows(drawn, settings).values())))

    samples = sample_parts(workspace, config, model, _PARTS, known, choose)
    parts = {PART_NAMES[part]: _anchors(sample, settings) for part, sample in samples.items()}
    with track("paper", len(parts) * len(THRESHOLDS), "thresholds") as advance:

        def solved(points: NDArray[np.float32]) -> Iterator[tuple[float, NDArray[np.int64]]]:
            for one in _partitions(points, settings):
                yield one
                advance(1, f"{one[0]:.2f}")

        found = paper.evaluate(parts, settings, Terms(config.evaluate, map=in_tasks), solved)
    result = {
        "made_from": made_from,
        "run": config.run,
        "config_hash": config_hash(config),
        "model": model.id,
        "labels_from": "captures" if known is None else "scanner lists",
        "tsne": _tsne(workspace, config, parts),
        **found,
    }
    if model.method in ONE_VECTOR_A_SOURCE:
        paper_without_sources(result, model.method)
    workspace.write_json(run_file(config, PAPER), result)
    for line in paper.as_text(result):
        say(line)
    study = result["parts"][PART_NAMES[UNSEEN_SOURCES]]["by_source"]
    return {"parts": len(parts), "auroc_unseen_sources": study and study["auroc"]["value"]}


def _partitions(
    points: NDArray[np.float32], settings: PaperConfig
) -> Iterator[tuple[float, NDArray[np.int64]]]:
    if settings.solver == "moves":
        yield from partitions_at(points, THRESHOLDS, settings.seed)
    else:
        yield from run_tasks(_contracted, THRESHOLDS, ordered=True, shared=points)


def _contracted(threshold: float, points: NDArray[np.float32]) -> NDArray[np.int64]:
    return solve(points, threshold, greedy=True)


def _with_times(table: pa.Table, seed: int) -> pa.Table:
    """With a column for each kind of draw: when a sequence is drawn; never (infinity) if of another kind."""
    ids, src = table["sequence_id"].to_numpy(), table["src"].to_numpy()
    labelled = pc.is_valid(table["label"]).to_numpy()
    for name, member in zip(_DRAWS, (np.ones(len(ids), bool), labelled, ~labelled), strict=True):
        drawn = np.full(len(ids), np.inf)
        drawn[member] = anchors.times(ids[member], src[member], seed)
        table = table.append_column(name, pa.array(drawn))
    return table


def _rows(table: pa.Table, settings: PaperConfig) -> dict[str, NDArray[np.int64]]:
    """The anchors of each draw, in the order drawn."""
    ids = table["sequence_id"].to_numpy()
    counts = settings.anchors, max(settings.anchors, settings.clustered), settings.clustered
    return {
        name: anchors.earliest(table[name].to_numpy(), ids, count)
        for name, count in zip(_DRAWS, counts, strict=True)
    }


def _anchors(sample: Sample, settings: PaperConfig) -> paper.Anchors:
    rows = _rows(sample.sequences, settings)
    half = settings.clustered // 2
    labelled, others = rows["labelled"][:half], rows["unlabelled"][: settings.clustered - half]
    return paper.Anchors(
        part_data(sample.sequences, sample.vectors),
        everything=rows["all"],
        labelled=rows["labelled"][: settings.anchors],
        clustered=np.concatenate([labelled, others]),
        available=sample.available,
        available_sources=sample.available_sources,
    )


def _tsne(workspace: Workspace, config: RunConfig, parts: dict[str, paper.Anchors]) -> dict[str, str]:
    """Places of the first anchors of each studied part, a task each; paths by part."""
    seed = config.paper.seed

    def work(item: tuple[str, NDArray[np.float32]]) -> NDArray[np.float32]:
        return paper.places(item[1], seed)

    rows = {name: parts[name].everything[: config.paper.tsne] for name in paper.STUDIED}
    items = [(name, np.asarray(parts[name].data.vectors)[at]) for name, at in rows.items() if len(at)]
    paths = {}
    for (name, _), places in run_tasks(work, items, ordered=True):
        data, at = parts[name].data, rows[name]
        table = pa.table(
            {
                "sequence_id": data.sequence_id[at],
                "src": data.src[at],
                "label": data.label.take(pa.array(at)),
                "x": places[:, 0],
                "y": places[:, 1],
            }
        )
        sink = io.BytesIO()
        pq.write_table(table, sink)
        paths[name] = run_file(config, f"tsne-{name.replace(' ', '-')}.parquet")
        workspace.write_bytes(paths[name], sink.getvalue())
    return paths
