"""How far a run can be trusted: a sample's similarities and all clusters, judged by `evaluation.protocol`."""

from __future__ import annotations

from typing import Any

import pyarrow as pa

from rayscan.captures.scanners import Scanners
from rayscan.config import RunConfig
from rayscan.evaluation import protocol
from rayscan.evaluation.splits import PART_NAMES, UNSEEN_SEQUENCES, UNSEEN_SOURCES, VALIDATION
from rayscan.methods.floors import port_vectors
from rayscan.planning import Model, config_hash, run_file
from rayscan.progress import say, track
from rayscan.stages.cluster import find_threshold
from rayscan.stages.lists import label_lists, relabelled
from rayscan.stages.session import run_tasks
from rayscan.stages.similarity import Sample, sample_parts
from rayscan.tables import File, Workspace

_PARTS = (UNSEEN_SEQUENCES, UNSEEN_SOURCES, VALIDATION)


def run(workspace: Workspace, config: RunConfig, model: Model, made_from: str) -> dict[str, Any]:
    """Evaluate and write `evaluation.json`. Returns the figures that head the report."""
    known = label_lists(workspace, config)
    samples = sample_parts(workspace, config, model, _PARTS, known)
    threshold, calibration = find_threshold(workspace, config, model)
    evaluation = protocol.evaluate(
        {PART_NAMES[part]: _part_data(sample) for part, sample in samples.items()},
        config.evaluate,
        _clusters(workspace, config, known),
    )
    for part, sample in samples.items():
        found = evaluation["parts"][PART_NAMES[part]]
        found["available"] = {"sequences": sample.available, "sources": sample.available_sources}
    result = {
        "made_from": made_from,
        "run": config.run,
        "config_hash": config_hash(config),
        "model": model.id,
        "threshold": {
            "value": threshold,
            "how": "auto" if calibration else "given",
            "calibration": calibration,
        },
        "labels_from": "captures" if known is None else "scanner lists",
        **evaluation,
    }
    workspace.write_json(run_file(config, "evaluation.json"), result)
    for line in protocol.as_text(evaluation):
        say(line)
    return _headline(evaluation)


def _part_data(sample: Sample) -> protocol.PartData:
    table = sample.sequences
    return protocol.PartData(
        vectors=sample.vectors,
        src=table["src"].to_numpy(),
        sequence_id=table["sequence_id"].to_numpy(),
        ports=port_vectors(table),
        label=table["label"].combine_chunks(),
    )


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
