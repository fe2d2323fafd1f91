"""How far an embedding and its clusters can be trusted, as one dictionary that JSON can hold.

Sequences that training did not see are compared with each other, part by part: are those of one source
more alike than those of different sources, are those of one label, when pairs of the same source do not
count? The same figures stand beside it for port counts and for random vectors. Clusters are held
against sources and labels.

    {"version": 1,
     "settings": {"max_sequences_per_source", "max_sequences", "min_label_sources", "bootstrap", "seed"},
     "parts": {NAME: {
         "sequences": int, "sources": int,                    compared, after sampling
         "available": {"sequences": int, "sources": int},     given
         "methods": {"model" | "ports" | "random": {
             "n_sequences", "n_sources", "pairs_same", "pairs_different": int,
             "auroc", "average_precision", "r_at_1", "r_at_1_macro", "mean_same", "mean_different": FIGURE,
             "histograms": HISTOGRAMS}},
         "labels": None or {
             "sequences": int, "sources": int,                of labels with enough sources
             "names": [{"label": str, "sources": int, "sequences": int}],      most sources first
             "left_out": {"labels": int, "sequences": int},   labels with too few sources
             "unlabelled": int,                               sequences
             "methods": {METHOD: {
                 "pairs_same", "pairs_different": int,        of different sources
                 "auroc", "average_precision", "mean_same", "mean_different": FIGURE,
                 "knn_macro_f1": {"1": FIGURE, "3": FIGURE, "5": FIGURE, "7": FIGURE},
                 "histograms": HISTOGRAMS}}},
         "histograms": HISTOGRAMS or None}},                  those of the model
     "clusters": None or {"periods": {PERIOD: {
         "sequences", "sources", "clusters", "singletons", "largest": int,
         "by_source": AGREEMENT or None, "by_label": AGREEMENT or None}}},
     "not_computed": [{"what": str, "why": str}]}

FIGURE is {"value", "low", "high", "n"}: a number, its 95 % interval, the sources behind it; None for
what is undefined (then said in "not_computed") or has no interval. HISTOGRAMS is {"edges": [65],
"same": [64], "different": [64]}, counts of pairs. AGREEMENT is {"sequences", "groups", "ari", "ami",
"homogeneity", "completeness", "v_measure", "join", "join_across_sources"}; the last two {"precision",
"recall", "f1", "joined", "together", "both"}, or None for sources.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rayscan.config import EvaluateConfig
from rayscan.errors import DataError
from rayscan.evaluation import intervals, neighbours, pairs, partitions
from rayscan.evaluation.intervals import figure
from rayscan.evaluation.tiles import Vectors
from rayscan.keys import hash64
from rayscan.methods.floors import random_unit

VERSION = 1
_RANDOM_WIDTH = 64
_COLUMNS = {
    "source": {
        "auroc": "AUROC",
        "average_precision": "average precision",
        "r_at_1": "R@1",
        "r_at_1_macro": "R@1 macro",
    },
    "label": {
        "auroc": "AUROC",
        "average_precision": "average precision",
        "knn_macro_f1@1": "1-NN macro F1",
        "knn_macro_f1@5": "5-NN macro F1",
    },
}
Found = dict[str, Any]


@dataclass(frozen=True)
class PartData:
    """Sequences of one part of the split, N of them.

    vectors      float32 (N, d), rows of length 1, or None without a model
    src          int64 (N,)
    sequence_id  int64 (N,), no two alike
    ports        rows of `floors.port_vectors`, or None
    label        strings and nulls (pyarrow or a sequence), or None
    """

    vectors: Vectors | None
    src: NDArray[np.int64]
    sequence_id: NDArray[np.int64]
    ports: Vectors | None = None
    label: Any = None


@dataclass(frozen=True)
class ClusterData:
    """Clusters of one period: int64 (N,), int64 (N,), and strings and nulls, or None."""

    cluster: NDArray[np.int64]
    src: NDArray[np.int64]
    label: Any = None


def evaluate(
    parts: Mapping[str, PartData],
    config: EvaluateConfig,
    clusters: Mapping[str, ClusterData] | None = None,
) -> Found:
    """All figures, laid out as the module says. `parts` are by name, `clusters` by period.

    Rows may come in any order: samples and ties are settled by ids. Raises DataError where columns do not
    fit each other or vectors are not of length 1.
    """
    missing: list[dict[str, str]] = []
    found: Found = {
        "version": VERSION,
        "settings": config.model_dump(mode="json"),
        "parts": {name: _part(name, part, config, missing) for name, part in parts.items()},
        "clusters": None,
        "not_computed": missing,
    }
    if clusters is None:
        _note(missing, "clusters", "no clusters given")
    else:
        periods = {period: _period(period, data, missing) for period, data in clusters.items()}
        found["clusters"] = {"periods": periods}
    return found


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


def as_rows(evaluation: Found) -> list[Found]:
    """One row for each part, kind of group ("source" or "label") and method, with its figures by name.

    Keys: part, by, method, n_sequences, n_sources, then FIGUREs; the k-NN scores as "knn_macro_f1@5".
    """
    rows = []
    for name, part in evaluation["parts"].items():
        for by, of in (("source", part), ("label", part["labels"] or {"methods": {}})):
            for method, scores in of["methods"].items():
                row = {"part": name, "by": by, "method": method}
                row |= {"n_sequences": of["sequences"], "n_sources": of["sources"]}
                row |= {key: value for key, value in scores.items() if _is_figure(value)}
                row |= {f"knn_macro_f1@{k}": value for k, value in scores.get("knn_macro_f1", {}).items()}
                rows.append(row)
    return rows


def as_text(evaluation: Found) -> list[str]:
    """The same for a terminal: a table for each part and kind of group, then what was not computed."""
    lines, above = [], None
    for row in as_rows(evaluation):
        columns = _COLUMNS[row["by"]]
        if (row["part"], row["by"]) != above:
            above = row["part"], row["by"]
            title = f"{row['part']}, by {row['by']}"
            lines.append(f"{title}: {row['n_sequences']:,} sequences of {row['n_sources']:,} sources")
            lines.append(f"  {'method':8}" + "".join(f"{column:>22}" for column in columns.values()))
        lines.append(f"  {row['method']:8}" + "".join(f"{_cell(row[key]):>22}" for key in columns))
    reasons: dict[str, list[str]] = {}
    for item in evaluation["not_computed"]:
        reasons.setdefault(item["why"], []).append(item["what"])
    return lines + [f"not computed, {why}: {', '.join(what)}" for why, what in reasons.items()]


def _is_figure(value: Any) -> bool:
    return isinstance(value, dict) and "low" in value


def _cell(value: Found) -> str:
    if value["value"] is None:
        return "-"
    if value["low"] is None:
        return f"{value['value']:.3f}"
    return f"{value['value']:.3f} [{value['low']:.3f}, {value['high']:.3f}]"


def _part(name: str, part: PartData, config: EvaluateConfig, missing: list[dict[str, str]]) -> Found:
    _check(name, part)
    rows = _sample(part, np.arange(len(part.src)), config)
    source, n_sources = _positions(part.src[rows])
    methods: Found = {}
    if len(rows):
        weights = intervals.resamples(n_sources, config.bootstrap, config.seed)
        for method, vectors in _methods(part, rows, config).items():
            methods[method] = _by_source(vectors, source, weights)
    _note_sources(name, part, source, missing)
    return {
        "sequences": len(rows),
        "sources": n_sources,
        "available": {"sequences": len(part.src), "sources": len(np.unique(part.src))},
        "methods": methods,
        "labels": _labels(name, part, config, missing),
        "histograms": methods["model"]["histograms"] if "model" in methods else None,
    }


def _by_source(vectors: Vectors, source: NDArray[np.int64], weights: NDArray[np.float64]) -> Found:
    counts = pairs.pair_statistics(vectors, source)
    found = pairs.nearest(vectors, source)
    sizes = np.bincount(source)
    several, everyone = int((sizes > 1).sum()), len(sizes)
    micro, macro = pairs.retrieval(found, source) if everyone > 1 else (np.nan, np.nan)
    draws = intervals.separation_draws(vectors, source, counts, weights)
    draws |= intervals.retrieval_draws(np.nan_to_num(found.same), source, weights)
    return {
        "n_sequences": len(source),
        "n_sources": everyone,
        "pairs_same": counts.n_same,
        "pairs_different": counts.n_different,
        "auroc": figure(counts.auroc(), draws["auroc"], several),
        "average_precision": figure(counts.average_precision(), draws["average_precision"], several),
        "r_at_1": figure(micro, draws["r_at_1"], several),
        "r_at_1_macro": figure(macro, draws["r_at_1_macro"], several),
        "mean_same": figure(counts.mean_same, draws["mean_same"], several),
        "mean_different": figure(counts.mean_different, draws["mean_different"], everyone),
        "histograms": _histograms(counts),
    }


def _labels(name: str, part: PartData, config: EvaluateConfig, missing: list[dict[str, str]]) -> Found | None:
    """Figures by label, of a sample of the labelled sequences alone: in all of them they may be rare."""
    what = f"{name} / labels"
    if part.label is None or not len(part.src):
        _note(missing, what, "no labels" if len(part.src) else "no sequences")
        return None
    codes, names = partitions.label_codes(part.label)
    rows = _sample(part, np.flatnonzero(codes != partitions.UNLABELLED), config)
    if not len(rows):
        _note(missing, what, "no labels")
        return None
    n_sources = _sources_of_labels(codes[rows], part.src[rows], len(names))
    enough = n_sources >= config.min_label_sources
    scored = rows[enough[codes[rows]]]
    if enough.sum() < 2:
        at_least = f"with {config.min_label_sources} or more sources"
        _note(missing, what, f"{int(enough.sum())} of {len(names)} labels {at_least}; needs 2")
        return None
    label, (source, everyone) = codes[scored], _positions(part.src[scored])
    weights = intervals.resamples(everyone, config.bootstrap, config.seed)
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
        "methods": {
            method: _by_label(vectors, label, source, weights)
            for method, vectors in _methods(part, scored, config).items()
        },
    }


def _by_label(
    vectors: Vectors, label: NDArray[np.int64], source: NDArray[np.int64], weights: NDArray[np.float64]
) -> Found:
    counts = pairs.pair_statistics(vectors, label, exclude=source)
    n = weights.shape[1]
    drawn = {}
    for figure_name, table in (("auroc", counts.ranks()), ("mean_same", pairs.centres())):
        sums, numbers = pairs.same_sums(vectors, label, table, exclude=source)
        drawn[figure_name] = intervals.pair_draws(sums, numbers, source, weights)
    return {
        "pairs_same": counts.n_same,
        "pairs_different": counts.n_different,
        "auroc": figure(counts.auroc(), drawn["auroc"], n),
        "average_precision": figure(counts.average_precision(), None, n),
        "mean_same": figure(counts.mean_same, drawn["mean_same"], n),
        "mean_different": figure(counts.mean_different, None, n),
        "knn_macro_f1": _votes(vectors, label, source, weights),
        "histograms": _histograms(counts),
    }


def _votes(
    vectors: Vectors, label: NDArray[np.int64], source: NDArray[np.int64], weights: NDArray[np.float64]
) -> Found:
    near, _ = neighbours.top_k(vectors, max(neighbours.KS), source)
    found = {}
    for k in neighbours.KS:
        predicted = neighbours.vote(near[:, :k], label)
        draws = intervals.vote_draws(label, predicted, source, weights)
        found[str(k)] = figure(neighbours.macro_f1(label, predicted), draws, weights.shape[1])
    return found


def _period(period: str, data: ClusterData, missing: list[dict[str, str]]) -> Found:
    what = f"clusters / {period}"
    if len({len(data.cluster), len(data.src)} | ({len(data.label)} if data.label is not None else set())) > 1:
        raise DataError(f"{what}: columns differ in length; give one cluster, source and label per sequence")
    cluster, src = np.asarray(data.cluster, np.int64), np.asarray(data.src, np.int64)
    sizes = np.unique(cluster, return_counts=True)[1]
    codes = None if data.label is None else partitions.label_codes(data.label)[0]
    if codes is not None and not (codes != partitions.UNLABELLED).any():
        codes = None
    if codes is None:
        _note(missing, f"{what} / by_label", "no labels")
    if not len(cluster):
        _note(missing, f"{what} / by_source", "no sequences")
    return {
        "sequences": len(cluster),
        "sources": len(np.unique(src)),
        "clusters": len(sizes),
        "singletons": int((sizes == 1).sum()),
        "largest": int(sizes.max(initial=0)),
        "by_source": partitions.compare(cluster, _positions(src)[0]) if len(cluster) else None,
        "by_label": None if codes is None else partitions.compare(cluster, codes, src),
    }


def _check(name: str, part: PartData) -> None:
    columns = {
        "vectors": part.vectors,
        "src": part.src,
        "sequence_id": part.sequence_id,
        "ports": part.ports,
        "label": part.label,
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


def _note(missing: list[dict[str, str]], what: str, why: str) -> None:
    missing.append({"what": what, "why": why})


def _note_sources(
    name: str, part: PartData, source: NDArray[np.int64], missing: list[dict[str, str]]
) -> None:
    """Says what too few sources leave undefined."""
    if not len(source):
        _note(missing, name, "no sequences")
        return
    for method, vectors in (("model", part.vectors), ("ports", part.ports)):
        if vectors is None:
            _note(missing, f"{name} / {method}", "no vectors given")
    sizes = np.bincount(source)
    several = int((sizes > 1).sum())
    if len(sizes) < 2:
        _note(missing, f"{name} / all but mean_same", "all sequences are of one source")
    if several == 0:
        _note(missing, f"{name} / all but mean_different", "no source has two sequences")
    elif several < 2:
        _note(missing, f"{name} / intervals", "fewer than 2 sources with two sequences")


def _sources_of_labels(codes: NDArray[np.int64], src: NDArray[np.int64], n_labels: int) -> NDArray[np.int64]:
    """Number of distinct sources of each label, int64 (n_labels,)."""
    source, n = _positions(src)
    return np.bincount(np.unique(codes * n + source) // max(n, 1), minlength=n_labels)


def _positions(ids: NDArray[np.int64]) -> tuple[NDArray[np.int64], int]:
    values, position = np.unique(ids, return_inverse=True)
    return position.astype(np.int64), len(values)


def _histograms(counts: pairs.PairCounts) -> Found:
    edges, same, different = counts.coarse()
    return {"edges": edges.tolist(), "same": same.tolist(), "different": different.tolist()}
