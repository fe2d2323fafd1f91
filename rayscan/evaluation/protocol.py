"""How far an embedding and its clusters can be trusted, as one dictionary that JSON can hold.

Sequences that training did not see are compared with each other, part by part: are those of one source
more alike than those of different sources, are those of one label, when pairs of the same source do not
count? The same figures stand beside it for port counts and for random vectors. Clusters are held
against sources and labels.

    {"version": 1,
     "settings": fields of EvaluateConfig,
     "parts": {NAME: PART},
     "groups": {NAME: PART or None},                          of unseen sources, see below
     "clusters": None or {"periods": {PERIOD: {
         "sequences", "sources", "clusters", "singletons", "largest": int,
         "by_source": AGREEMENT or None, "by_label": AGREEMENT or None}}},
     "not_computed": [{"what": str, "why": str}]}

PART is {
    "sequences": int, "sources": int,                    compared, after sampling
    "available": {"sequences": int, "sources": int},     given
    "methods": {"model" | "ports" | "random": {
        "n_sequences", "n_sources", "pairs_same", "pairs_different": int,
        "auroc", "average_precision", "r_at_1", "r_at_1_macro", "mean_same", "mean_same_macro",
        "mean_different": FIGURE,
        "auroc_error": float or None,                    most that binning can have moved the AUROC
        "histograms": HISTOGRAMS}},
    "labels": None or {
        "sequences": int, "sources": int,                of labels with enough sources
        "names": [{"label": str, "sources": int, "sequences": int}],      most sources first
        "left_out": {"labels": int, "sequences": int},   labels with too few sources
        "unlabelled": int,                               sequences
        "methods": {METHOD: BY_LABEL},                   pairs of different sources
        "across_networks": {METHOD: BY_LABEL}},          pairs of different /24 networks
    "calibration": None or {                             of the model: chances fitted on validation sources
        "bins": [{"predicted", "observed": float, "pairs": int}], "error": FIGURE,
        "prior": float, "pairs_same", "pairs_different": int},
    "histograms": HISTOGRAMS or None}                    those of the model

BY_LABEL is {"pairs_same", "pairs_different": int,
    "auroc", "average_precision", "mean_same", "mean_different": FIGURE, "auroc_error": float or None,
    "knn_macro_f1": {"1": FIGURE, "3": FIGURE, "5": FIGURE, "7": FIGURE}, "histograms": HISTOGRAMS}

Groups are "unseen sources, new networks": unseen sources in whose /24 no source was trained on; and "unseen
sources, later": their sequences that begin after the last one that was trained on.

FIGURE is {"value", "low", "high", "n"}: a number, its 95 % interval, the sources behind it; None for
what is undefined (then said in "not_computed") or has no interval. HISTOGRAMS is {"edges": [65],
"same": [64], "different": [64]}, counts of pairs. AGREEMENT is {"sequences", "groups", "ari", "ami",
"homogeneity", "completeness", "v_measure", "join", "join_across_sources"}; the last two {"precision",
"recall", "f1"} of joins, "pairs", "joined", "together", "both", "cuts": {"precision", "recall", "f1"},
"accuracy", "macro_f1", "weighted_f1"} (`partitions.Joins`), or None for sources; and "intervals": {name:
[low, high] or None} with the names of `partitions.intervals`.

The stage adds "made_from", "run", "config_hash", "model", "labels_from", and "threshold": {"value", "how":
"auto" | "given", "calibration": None or the fields of a `Calibration`, "sweep": None or {"part": NAME,
"sequences", "sources", "labelled": int, "chosen": float, "rows", "best"}}, the last two as
`thresholds.scored` has them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from rayscan.clustering.calibration import Calibration
from rayscan.config import EvaluateConfig
from rayscan.errors import DataError
from rayscan.evaluation import partitions, tiles
from rayscan.evaluation.intervals import Resamples
from rayscan.evaluation.parts import PartData, Terms, figures_of, positions
from rayscan.evaluation.splits import PART_NAMES, UNSEEN_SOURCES, network_of
from rayscan.methods.floors import port_vectors

VERSION = 1
NEW_NETWORKS = f"{PART_NAMES[UNSEEN_SOURCES]}, new networks"
LATER = f"{PART_NAMES[UNSEEN_SOURCES]}, later"
Found = dict[str, Any]


@dataclass(frozen=True)
class ClusterData:
    """Clusters of one period: int64 (N,), int64 (N,), and strings and nulls, or None."""

    cluster: NDArray[np.int64]
    src: NDArray[np.int64]
    label: Any = None


@dataclass(frozen=True)
class Training:
    """What training has seen: the /24 networks of its sources, and when its last sequence began (µs UTC)."""

    networks: NDArray[np.int64]
    last_start: int


def part_data(sequences: pa.Table, vectors: NDArray[np.float32]) -> PartData:
    """A part from the columns sequence_id, src, start, label, proto and dst_port of `schema.SEQUENCES`."""
    return PartData(
        vectors=vectors,
        src=sequences["src"].to_numpy(),
        sequence_id=sequences["sequence_id"].to_numpy(),
        ports=port_vectors(sequences),
        label=sequences["label"].combine_chunks(),
        start=sequences["start"].cast(pa.int64()).to_numpy(),
    )


def evaluate(
    parts: Mapping[str, PartData],
    config: EvaluateConfig,
    clusters: Mapping[str, ClusterData] | None = None,
    *,
    curve: Calibration | None = None,
    training: Training | None = None,
    map: tiles.Map = tiles.in_threads,
) -> Found:
    """All figures, laid out as the module says. `parts` are by name, `clusters` by period.

    `curve` is what was fitted on validation sources. `map` takes the comparison of all pairs, block by block,
    and does not change a figure. Rows may come in any order: samples and ties are settled
    by ids. Raises DataError where columns do not fit each other or vectors are not of length 1.
    """
    terms = Terms(config, curve, map)
    found: Found = {
        "version": VERSION,
        "settings": config.model_dump(mode="json"),
        "parts": {name: figures_of(name, part, terms) for name, part in parts.items()},
        "groups": _groups(parts.get(PART_NAMES[UNSEEN_SOURCES]), training, terms),
        "clusters": None,
        "not_computed": terms.missing,
    }
    if not clusters:
        terms.note("clusters", "no clusters given" if clusters is None else "no period has any")
    if clusters is not None:
        items = list(clusters.items())
        periods = zip(items, map(_period, items, config), strict=True)
        found["clusters"] = {"periods": {}}
        for (period, _), (agreement, missing) in periods:
            found["clusters"]["periods"][period] = agreement
            for what, why in missing:
                terms.note(what, why)
    return found


def _groups(part: PartData | None, training: Training | None, terms: Terms) -> Found:
    """Figures of those unseen sources that training knew least of."""
    if part is None or not len(part.src):
        return {}
    if training is None:
        terms.note("groups", "what the model was trained on is not known")
        return {}
    rows = {NEW_NETWORKS: np.flatnonzero(~np.isin(network_of(part.src), training.networks))}
    if part.start is not None:
        rows[LATER] = np.flatnonzero(part.start > training.last_start)
    reasons = {
        NEW_NETWORKS: "every unseen source has a training source in its /24",
        LATER: "training has seen sequences as late as the last ones; see train.periods",
    }
    found: Found = {}
    for name, chosen in rows.items():
        if len(chosen):
            found[name] = figures_of(name, part.take(chosen), terms)
        else:
            found[name] = None
            terms.note(name, reasons[name])
    return found


def _period(item: tuple[str, ClusterData], config: EvaluateConfig) -> tuple[Found, list[tuple[str, str]]]:
    """Agreement of one period's clusters, and what could not be computed and why."""
    period, data = item
    what = f"clusters / {period}"
    if len({len(data.cluster), len(data.src)} | ({len(data.label)} if data.label is not None else set())) > 1:
        raise DataError(f"{what}: columns differ in length; give one cluster, source and label per sequence")
    cluster = np.asarray(data.cluster, np.int64)
    source, n_sources = positions(np.asarray(data.src, np.int64))
    sizes = np.unique(cluster, return_counts=True)[1]
    codes = None if data.label is None else partitions.label_codes(data.label)[0]
    missing = []
    if codes is None or not (codes != partitions.UNLABELLED).any():
        codes = None
        missing.append((f"{what} / by_label", "no labels"))
    if not len(cluster):
        missing.append((f"{what} / by_source", "no sequences"))
    weights = Resamples(n_sources, config.bootstrap, config.seed)
    by_source, by_label = None, None
    if len(cluster):
        ends = partitions.intervals(cluster, source, source, weights)
        by_source = {**partitions.compare(cluster, source), "intervals": ends}
    if codes is not None:
        ends = partitions.intervals(cluster, codes, source, weights)
        by_label = {**partitions.compare(cluster, codes, source), "intervals": ends}
    return {
        "sequences": len(cluster),
        "sources": n_sources,
        "clusters": len(sizes),
        "singletons": int((sizes == 1).sum()),
        "largest": int(sizes.max(initial=0)),
        "by_source": by_source,
        "by_label": by_label,
    }, missing
