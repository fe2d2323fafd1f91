"""How far a run can be trusted: a sample's similarities and all clusters, judged by `evaluation.protocol`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from rayscan.captures.scanners import Scanners
from rayscan.clustering.calibration import Calibration, calibrate
from rayscan.config import RunConfig
from rayscan.errors import DataError
from rayscan.evaluation import protocol, thresholds, tiles
from rayscan.evaluation.credit import without_sources
from rayscan.evaluation.partitions import UNLABELLED, label_codes
from rayscan.evaluation.parts import sample_rows
from rayscan.evaluation.splits import (
    PART_NAMES,
    TRAIN,
    UNSEEN_SEQUENCES,
    UNSEEN_SOURCES,
    VALIDATION,
    network_of,
    part_of,
)
from rayscan.evaluation.table import as_text
from rayscan.methods.method import ONE_VECTOR_A_SOURCE
from rayscan.planning import EVALUATION, Model, config_hash, model_id, run_file, training_files
from rayscan.progress import say, track
from rayscan.stages.cluster import find_threshold
from rayscan.stages.lists import label_lists, relabelled
from rayscan.stages.session import run_tasks
from rayscan.stages.similarity import Sample, sample_parts
from rayscan.stages.sweep import partitions_at
from rayscan.tables import File, Workspace

_FEW = 10  # blocks of 1,024 sequences with each other: a second at most
_PARTS = (UNSEEN_SEQUENCES, UNSEEN_SOURCES, VALIDATION)


def run(workspace: Workspace, config: RunConfig, model: Model, made_from: str) -> dict[str, Any]:
    """Evaluate and write `evaluation.json`. Returns the figures that head the report."""
    known = label_lists(workspace, config)
    samples = sample_parts(workspace, config, model, _PARTS, known)
    threshold, calibration = find_threshold(workspace, config, model)
    evaluation = protocol.evaluate(
        {PART_NAMES[part]: protocol.part_data(one.sequences, one.vectors) for part, one in samples.items()},
        config.evaluate,
        _clusters(workspace, config, known),
        curve=_curve(config, samples[VALIDATION], calibration),
        training=_training(workspace, config),
        map=in_tasks,
    )
    for part, sample in samples.items():
        found = evaluation["parts"][PART_NAMES[part]]
        found["available"] = {"sequences": sample.available, "sources": sample.available_sources}
        found["covered"] = sample.covered
    sweep = _sweep(config, samples[VALIDATION], threshold)
    if sweep is None:
        why = "fewer than two sequences of validation sources"
        evaluation["not_computed"].append({"what": "other thresholds", "why": why})
    result = {
        "made_from": made_from,
        "run": config.run,
        "config_hash": config_hash(config),
        "model": model.id,
        "threshold": {
            "value": threshold,
            "how": "auto" if calibration else "given",
            "calibration": calibration,
            "sweep": sweep,
        },
        "labels_from": "captures" if known is None else "scanner lists",
        **evaluation,
    }
    if model.method in ONE_VECTOR_A_SOURCE:
        without_sources(result, model.method)
    workspace.write_json(run_file(config, EVALUATION), result)
    for line in as_text(result):
        say(line)
    return _headline(result)


def in_tasks(task: Callable[[Any, Any], Any], items: Sequence[Any], shared: Any) -> Iterator[Any]:
    """The map that compares all pairs, as Ray tasks; of a few thousand sequences here, where they are."""
    if len(items) < _FEW:
        yield from tiles.in_threads(task, items, shared)
    else:
        for _, result in run_tasks(task, items, ordered=True, shared=shared):
            yield result


def _curve(config: RunConfig, validation: Sample, found: dict[str, Any] | None) -> Calibration | None:
    """The curve behind the threshold; of a threshold that was given, what would have been fitted."""
    if found is not None:
        return Calibration(**found)
    src = validation.sequences["src"].to_numpy()
    try:
        return calibrate(validation.vectors, src, prior=config.cluster.prior, seed=config.evaluate.seed)
    except DataError:
        return None  # the evaluation says of each part that there is no curve


def _training(workspace: Workspace, config: RunConfig) -> protocol.Training | None:
    """What the model was trained on, or None for one that was trained elsewhere; a task reads one file."""
    if config.embed.model not in (None, model_id(config)):
        return None

    def work(file: File) -> tuple[NDArray[np.int64], int]:
        table = workspace.table("sequences").read_files([file], ("src", "index", "sequences", "start"))
        src, index, siblings = (table[name].to_numpy() for name in ("src", "index", "sequences"))
        seen = part_of(src, index, siblings, config.split) == TRAIN
        start = table["start"].cast(pa.int64()).to_numpy()[seen]
        return np.unique(network_of(src[seen])), int(start.max(initial=np.iinfo(np.int64).min))

    found = [extent for _, extent in run_tasks(work, training_files(workspace, config))]
    networks = np.unique(np.concatenate([networks for networks, _ in found]))
    return protocol.Training(networks, max(last for _, last in found))


def _sweep(config: RunConfig, validation: Sample, chosen: float) -> dict[str, Any] | None:
    """What each of 100 thresholds would have done with validation sources; a task takes a run of them."""
    table = validation.sequences
    settings = config.evaluate
    rows = sample_rows(
        table["sequence_id"].to_numpy(),
        table["src"].to_numpy(),
        settings.max_sequences_per_source,
        settings.sweep_sequences,
        settings.seed,
    )
    if len(rows) < 2:
        return None
    src = table["src"].to_numpy()[rows]
    codes = label_codes(table["label"].combine_chunks().take(pa.array(rows)))[0]
    found = thresholds.scored(
        partitions_at(validation.vectors[rows], thresholds.THRESHOLDS, settings.seed), src, codes
    )
    return {
        "part": PART_NAMES[VALIDATION],
        "sequences": len(rows),
        "sources": len(np.unique(src)),
        "labelled": int((codes != UNLABELLED).sum()),
        "chosen": chosen,
        **found,
    }


def _clusters(
    workspace: Workspace, config: RunConfig, known: Scanners | None
) -> dict[str, protocol.ClusterData]:
    """Every period's clusters with the labels of their sequences; a task joins one period."""
    periods: dict[str, tuple[list[File], list[File]]] = {}
    for file in workspace.table("clusters").files({"run": config.run}):
        periods.setdefault(file.key["period"], ([], []))[0].append(file)
    for file in workspace.table("sequences").files():
        if file.key["period"] in periods:
            periods[file.key["period"]][1].append(file)

    def work(
        item: tuple[str, tuple[list[File], list[File]]], known: Scanners | None = None
    ) -> protocol.ClusterData:
        _, (clusters, sequences) = item
        rows = workspace.table("clusters").read_files(clusters, ("sequence_id", "src", "cluster"))
        labels = workspace.table("sequences").read_files(sequences, ("sequence_id", "src", "start", "label"))
        return _cluster_data(rows, relabelled(labels, known).select(["sequence_id", "label"]))

    found = {}
    with track("evaluate", len(periods), "periods of clusters") as advance:
        for (period, _), data in run_tasks(work, periods.items(), ordered=True, shared=known):
            found[period] = data
            advance(1, period)
    return found


def _cluster_data(clusters: pa.Table, labels: pa.Table) -> protocol.ClusterData:
    joined = clusters.join(labels, "sequence_id", join_type="left outer").sort_by("sequence_id")
    return protocol.ClusterData(
        cluster=joined["cluster"].to_numpy(),
        src=joined["src"].to_numpy(),
        label=joined["label"].combine_chunks(),
    )


def _headline(evaluation: dict[str, Any]) -> dict[str, Any]:
    part = evaluation["parts"].get(PART_NAMES[UNSEEN_SOURCES], {})
    methods = part.get("methods", {})
    figures: dict[str, Any] = {"sequences": part.get("sequences", 0), "sources": part.get("sources", 0)}
    for method, name in (("model", "auroc"), ("ports", "auroc"), ("model", "r_at_1"), ("ports", "r_at_1")):
        figures[f"{name}_{method}"] = methods.get(method, {}).get(name, {}).get("value")
    return figures
