"""The figures of one part of the split: by source, by label, and whether calibrated chances hold.

Laid out as `protocol` says. Everything is computed of a sample in which no source has many sequences.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from rayscan.clustering.calibration import Calibration
from rayscan.config import EvaluateConfig
from rayscan.errors import DataError
from rayscan.evaluation import intervals, jackknife, neighbours, pairs, partitions, tiles
from rayscan.evaluation.blockwise import compare, own_counts, retrieval
from rayscan.evaluation.chances import kept_word
from rayscan.evaluation.intervals import Resamples, figure
from rayscan.evaluation.splits import network_of
from rayscan.evaluation.tiles import Map, Vectors
from rayscan.keys import hash64
from rayscan.methods.floors import random_unit

_RANDOM_WIDTH = 64
Found = dict[str, Any]


@dataclass(frozen=True)
class PartData:
    """Sequences of one part of the split, N of them.

    vectors      float32 (N, d), rows of length 1, or None without a model
    src          int64 (N,)
    sequence_id  int64 (N,), no two alike
    ports        rows of `floors.port_vectors`, or None
    label        strings and nulls (pyarrow or a sequence), or None
    start        int64 (N,), µs UTC, or None
    """

    vectors: Vectors | None
    src: NDArray[np.int64]
    sequence_id: NDArray[np.int64]
    ports: Vectors | None = None
    label: Any = None
    start: NDArray[np.int64] | None = None

    def take(self, rows: NDArray[np.int64]) -> PartData:
        """These rows of every column."""
        given = {field.name: getattr(self, field.name) for field in fields(self)}
        if given["label"] is not None:
            given["label"] = partitions.as_strings(given["label"]).take(pa.array(rows))
        return PartData(**{k: v if v is None or k == "label" else v[rows] for k, v in given.items()})


@dataclass(frozen=True)
class Terms:
    """On what terms parts are judged: settings, the curve fitted on validation sources, the parallel map.

    What cannot be computed is said in `missing`.
    """

    config: EvaluateConfig
    curve: Calibration | None = None
    map: Map = tiles.in_threads
    missing: list[dict[str, str]] = field(default_factory=list)

    def note(self, what: str, why: str) -> None:
        self.missing.append({"what": what, "why": why})


def figures_of(name: str, part: PartData, terms: Terms) -> Found:
    """PART of `protocol`'s layout."""
    config = terms.config
    _check(name, part)
    rows = _sample(part, np.arange(len(part.src)), config)
    source, n_sources = positions(part.src[rows])
    weights = Resamples(n_sources, config.bootstrap, config.seed)
    methods = {
        method: by_source(vectors, source, weights, terms.map)
        for method, vectors in (_methods(part, rows, config) if len(rows) else {}).items()
    }
    _note_sources(name, part, source, terms)
    return {
        "sequences": len(rows),
        "sources": n_sources,
        "available": {"sequences": len(part.src), "sources": len(np.unique(part.src))},
        "methods": methods,
        "labels": _labels(name, part, terms),
        "calibration": _calibration(name, part, rows, source, weights, terms),
        "histograms": methods["model"]["histograms"] if "model" in methods else None,
    }


def by_source(
    vectors: Vectors,
    source: NDArray[np.int64],
    weights: Resamples,
    map: Map,
    plot_bins: int = 64,
) -> Found:
    """Figures of whether vectors (N, d) of one source, positions (N,) from 0, are more alike than others."""
    compared = compare(vectors, source, nearest=True, map=map)
    counts, found = compared.counts, compared.nearest
    assert found is not None
    sizes = np.bincount(source)
    several, everyone = int((sizes > 1).sum()), len(sizes)
    micro, macro = retrieval(found, source) if everyone > 1 else (np.nan, np.nan)
    own = own_counts(vectors, source, map)
    draws = intervals.separation_draws(vectors, source, counts, own, weights)
    mean_macro, draws["mean_same_macro"] = intervals.macro_mean(own, weights)
    draws |= intervals.retrieval_draws(np.nan_to_num(found.same), source, weights)
    return {
        "n_sequences": len(source),
        "n_sources": everyone,
        "pairs_same": counts.n_same,
        "pairs_different": counts.n_different,
        "auroc": figure(counts.auroc(), draws["auroc"], several),
        "auroc_error": _bound(counts),
        "average_precision": figure(counts.average_precision(), draws["average_precision"], several),
        "r_at_1": figure(micro, draws["r_at_1"], several),
        "r_at_1_macro": figure(macro, draws["r_at_1_macro"], several),
        "mean_same": figure(counts.mean_same, draws["mean_same"], several),
        "mean_same_macro": figure(mean_macro, draws["mean_same_macro"], several),
        "mean_different": figure(counts.mean_different, draws["mean_different"], everyone),
        "histograms": _histograms(counts, plot_bins),
    }


def _calibration(
    name: str,
    part: PartData,
    rows: NDArray[np.int64],
    source: NDArray[np.int64],
    weights: Resamples,
    terms: Terms,
) -> Found | None:
    what = f"{name} / calibration"
    if terms.curve is None or part.vectors is None:
        why = "no vectors given" if part.vectors is None else "no curve was fitted on validation sources"
        terms.note(what, why)
        return None
    try:
        return kept_word(part.vectors[rows], source, terms.curve, weights, terms.config.seed)
    except DataError as error:
        terms.note(what, str(error))
        return None


def _labels(name: str, part: PartData, terms: Terms) -> Found | None:
    """Figures by label, of a sample of the labelled sequences alone: in all of them they may be rare."""
    config = terms.config
    what = f"{name} / labels"
    if part.label is None or not len(part.src):
        terms.note(what, "no labels" if len(part.src) else "no sequences")
        return None
    codes, names = partitions.label_codes(part.label)
    rows = _sample(part, np.flatnonzero(codes != partitions.UNLABELLED), config)
    if not len(rows):
        terms.note(what, "no labels")
        return None
    n_sources = _sources_of_labels(codes[rows], part.src[rows], len(names))
    enough = n_sources >= config.min_label_sources
    scored = rows[enough[codes[rows]]]
    if enough.sum() < 2:
        at_least = f"with {config.min_label_sources} or more sources"
        terms.note(what, f"{int(enough.sum())} of {len(names)} labels {at_least}; needs 2")
        return None
    label, (source, everyone) = codes[scored], positions(part.src[scored])
    network = network_of(part.src[scored])
    weights = Resamples(everyone, config.bootstrap, config.seed)
    methods = _methods(part, scored, config)
    across, between = (
        {
            method: by_label(vectors, label, source, apart, weights, terms.map)
            for method, vectors in methods.items()
        }
        for apart in (network, source)
    )
    if not all(scores["pairs_same"] for scores in across.values()):
        terms.note(f"{what} across networks", "no two sources of different /24 networks share a label")
    sequences = np.bincount(label, minlength=len(names))
    order = sorted(np.flatnonzero(enough), key=lambda at: (-n_sources[at], names[at]))
    return {
        "sequences": len(scored),
        "sources": everyone,
        "names": [
            {"label": names[at], "sources": int(n_sources[at]), "sequences": int(sequences[at])}
            for at in order
        ],
        "left_out": {
            "labels": int(((n_sources > 0) & ~enough).sum()),
            "sequences": len(rows) - len(scored),
        },
        "unlabelled": int((codes == partitions.UNLABELLED).sum()),
        "methods": between,
        "across_networks": across,
    }


def by_label(
    vectors: Vectors,
    label: NDArray[np.int64],
    source: NDArray[np.int64],
    apart: NDArray[np.int64],
    weights: Resamples,
    map: Map,
    plot_bins: int = 64,
) -> Found:
    """The same of one label, over pairs that differ in `apart`: their source, or its network, which holds all
    of a source."""
    compared = compare(vectors, label, exclude=apart, k=jackknife.DEPTH, map=map)
    counts, near = compared.counts, compared.neighbours
    assert near is not None
    n = weights.n_sources
    moved = []
    for summed, ranks in (pairs.same_sums, counts.ranks()), (pairs.different_sums, counts.ranks_from_above()):
        sums, numbers = summed(vectors, label, np.stack([ranks, pairs.centres()]), exclude=apart, map=map)
        moved.append([intervals.pair_changes(each, numbers, source, weights) for each in sums])
    (rank_same, same), (rank_different, different) = moved
    votes = {}
    for k in neighbours.KS:
        value = neighbours.macro_f1(label, neighbours.vote(near.index[:, :k], label))
        without = jackknife.macro_f1_without(near.index, label, source, k)
        votes[str(k)] = figure(value, intervals.left_out_draws(value, without, weights), n)
    return {
        "pairs_same": counts.n_same,
        "pairs_different": counts.n_different,
        "auroc": figure(counts.auroc(), np.clip(counts.auroc() + rank_same + rank_different, 0, 1), n),
        "auroc_error": _bound(counts),
        "average_precision": figure(counts.average_precision(), None, n),
        "mean_same": figure(counts.mean_same, np.clip(counts.mean_same + same, -1, 1), n),
        "mean_different": figure(counts.mean_different, np.clip(counts.mean_different + different, -1, 1), n),
        "knn_macro_f1": votes,
        "histograms": _histograms(counts, plot_bins),
    }


def sample_rows(
    sequence_id: NDArray[np.int64], src: NDArray[np.int64], per_source: int, total: int, seed: int
) -> NDArray[np.int64]:
    """Positions of at most `per_source` sequences of each source and `total` in all, int64.

    Whole sources are taken, in the order of their hash, since single sequences of many sources make no
    pairs of one source; of each the sequences of smallest hash. So the sample does not depend on the
    order of rows, and may be taken in steps: a sample of the union of samples of some sources each is
    the sample of all.
    """
    by_source, by_sequence = hash64(np.asarray(src), seed), hash64(np.asarray(sequence_id), seed)
    order = np.lexsort((by_sequence, by_source))
    ordered = by_source[order]
    rank = np.arange(len(order)) - np.searchsorted(ordered, ordered)
    return order[rank < per_source][:total].astype(np.int64)


def _check(name: str, part: PartData) -> None:
    columns = {
        "vectors": part.vectors,
        "src": part.src,
        "sequence_id": part.sequence_id,
        "ports": part.ports,
        "label": part.label,
        "start": part.start,
    }
    lengths = {
        key: column.shape[0] if hasattr(column, "shape") else len(column)
        for key, column in columns.items()
        if column is not None
    }
    if len(set(lengths.values())) > 1:
        raise DataError(f"{name}: columns differ in length ({lengths}); give one row per sequence in each")
    if len(np.unique(part.sequence_id)) < len(part.sequence_id):
        raise DataError(f"{name}: a sequence_id occurs twice; give each sequence once")


def _sample(part: PartData, rows: NDArray[np.int64], config: EvaluateConfig) -> NDArray[np.int64]:
    """Of these rows. The order, and so the random vectors and every tie, depends on ids alone."""
    chosen = sample_rows(
        part.sequence_id[rows],
        part.src[rows],
        config.max_sequences_per_source,
        config.max_sequences,
        config.seed,
    )
    return rows[chosen]


def _methods(part: PartData, rows: NDArray[np.int64], config: EvaluateConfig) -> dict[str, Vectors]:
    found: dict[str, Vectors] = {}
    if part.vectors is not None:
        found["model"] = part.vectors[rows]
    if part.ports is not None:
        found["ports"] = part.ports[rows]
    width = _RANDOM_WIDTH if part.vectors is None else part.vectors.shape[1]
    return found | {"random": random_unit(len(rows), width, config.seed)}


def _note_sources(name: str, part: PartData, source: NDArray[np.int64], terms: Terms) -> None:
    """Says what too few sources leave undefined."""
    if not len(source):
        terms.note(name, "no sequences")
        return
    for method, vectors in (("model", part.vectors), ("ports", part.ports)):
        if vectors is None:
            terms.note(f"{name} / {method}", "no vectors given")
    sizes = np.bincount(source)
    several = int((sizes > 1).sum())
    if len(sizes) < 2:
        terms.note(f"{name} / all but mean_same", "all sequences are of one source")
    if several == 0:
        terms.note(f"{name} / all but mean_different", "no source has two sequences")
    elif several < 2:
        terms.note(f"{name} / intervals", "fewer than 2 sources with two sequences")


def _sources_of_labels(codes: NDArray[np.int64], src: NDArray[np.int64], n_labels: int) -> NDArray[np.int64]:
    """Number of distinct sources of each label, int64 (n_labels,)."""
    source, n = positions(src)
    return np.bincount(np.unique(codes * n + source) // max(n, 1), minlength=n_labels)


def positions(ids: NDArray[np.int64]) -> tuple[NDArray[np.int64], int]:
    """Each id's position among the distinct ones, int64 (N,), and how many these are."""
    values, position = np.unique(ids, return_inverse=True)
    return position.astype(np.int64), len(values)


def _bound(counts: pairs.PairCounts) -> float | None:
    error = counts.auroc_error()
    return error if np.isfinite(error) else None


def _histograms(counts: pairs.PairCounts, n: int) -> Found:
    edges, same, different = counts.coarse(n)
    return {"edges": edges.tolist(), "same": same.tolist(), "different": different.tolist()}
