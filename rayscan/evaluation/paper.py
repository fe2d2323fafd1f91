"""The published protocol (arXiv 2606.04733), the defects of its code mended: docs/evaluation.md lists them.

Of anchors (`evaluation.anchors`): similarities of pairs of one source against others, and of pairs of one
label against others where pairs of the same source do not count; agreement of clusters with labels at 100
thresholds; places by t-SNE. Going further than the paper: intervals, joins across sources beside those of all
pairs, and scores at the threshold that is best on validation sources, not on those that are scored.

    {"version": 1, "settings": fields of PaperConfig,
     "parts": {NAME: {
         "available": {"sequences", "sources": int},
         "by_source": None or STUDY, "by_label": None or STUDY,      of unseen sequences and unseen sources
         "clusters": None or {"sequences", "sources", "labelled": int, "rows", "best",
             "at_chosen": {TRUTH: None or {"threshold": float, JOINS}}}}},
     "chosen": {TRUTH: float or None},                               on validation sources
     "not_computed": [{"what", "why"}]}

STUDY is what `protocol` says of a method by source or by label, with histograms of 50 bins, and "sequences",
"sources", "difference" (of the means) and "masses": {"edges": [51], "same": [50], "different": [50]}, which
sum to 1. "rows", "best" and TRUTH are those of `thresholds.scored`. The stage adds "made_from", "run",
"config_hash", "model", "labels_from" and "tsne": {NAME: path in the workspace}.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rayscan.config import PaperConfig
from rayscan.evaluation import intervals, partitions
from rayscan.evaluation.parts import PartData, Terms, by_label, by_source, positions
from rayscan.evaluation.splits import PART_NAMES, UNSEEN_SEQUENCES, UNSEEN_SOURCES, VALIDATION
from rayscan.evaluation.thresholds import THRESHOLDS, TRUTHS, scored

VERSION = 1
STUDIED = (PART_NAMES[UNSEEN_SEQUENCES], PART_NAMES[UNSEEN_SOURCES])
_BINS = 50
_PERPLEXITY = 30.0
Found = dict[str, Any]
Solve = Callable[[NDArray[np.float32]], Iterable[tuple[float, NDArray[np.int64]]]]
"""Labels of these vectors at each of `THRESHOLDS`."""


@dataclass(frozen=True)
class Anchors:
    """Anchors of one part: sequences that any sample holds, and rows of each sample in the order drawn."""

    data: PartData
    everything: NDArray[np.int64]
    labelled: NDArray[np.int64]
    clustered: NDArray[np.int64]
    available: int
    available_sources: int


def evaluate(parts: Mapping[str, Anchors], config: PaperConfig, terms: Terms, solve: Solve) -> Found:
    """All figures, laid out as the module says; `terms` say the number of resamples and the parallel map."""
    found = {name: _part(name, anchors, terms, solve) for name, anchors in parts.items()}
    validation = found.get(PART_NAMES[VALIDATION], {}).get("clusters")
    chosen = {truth: validation["best"][truth] if validation else None for truth in TRUTHS}
    for part in found.values():
        if part["clusters"]:
            part["clusters"]["at_chosen"] = {
                truth: _at(part["clusters"]["rows"], truth, theta) for truth, theta in chosen.items()
            }
    for truth, theta in chosen.items():
        if theta is None:
            why = "no threshold could be chosen on validation sources"
            terms.note(f"clusters {truth.replace('_', ' ')} at the chosen threshold", why)
    return {
        "version": VERSION,
        "settings": config.model_dump(mode="json"),
        "parts": found,
        "chosen": chosen,
        "not_computed": terms.missing,
    }


def places(vectors: NDArray[np.float32], seed: int) -> NDArray[np.float32]:
    """Coordinates float32 (N, 2) by Barnes-Hut t-SNE as published: cosine, perplexity 30, 1,000 steps.

    It starts along the principal components. Of few sequences the perplexity is a third, and fewer than four
    lie on one point.
    """
    from sklearn.manifold import TSNE  # slow to import

    if len(vectors) < 4:
        return np.zeros((len(vectors), 2), np.float32)
    perplexity = min(_PERPLEXITY, (len(vectors) - 1) / 3)
    start = "pca" if vectors.std(axis=0).any() else "random"  # equal vectors have no components
    model = TSNE(metric="cosine", perplexity=perplexity, init=start, max_iter=1000, random_state=seed)
    return np.asarray(model.fit_transform(vectors), np.float32)


def _part(name: str, anchors: Anchors, terms: Terms, solve: Solve) -> Found:
    found: Found = {
        "available": {"sequences": anchors.available, "sources": anchors.available_sources},
        "by_source": None,
        "by_label": None,
        "clusters": None,
    }
    if not len(anchors.data.src):
        terms.note(name, "no sequences")
        return found
    if name in STUDIED:
        found["by_source"] = _by_source(name, anchors, terms)
        found["by_label"] = _by_label(name, anchors, terms)
    found["clusters"] = _clusters(name, anchors, terms, solve)
    return found


def _by_source(name: str, anchors: Anchors, terms: Terms) -> Found:
    rows = anchors.everything
    source, n = positions(anchors.data.src[rows])
    if not 1 < n < len(rows):
        why = "all anchors are of one source" if n == 1 else "no source has two anchors"
        terms.note(f"{name} / by source", why)
    weights = intervals.Resamples(n, terms.config.bootstrap, terms.config.seed)
    figures = by_source(_vectors(anchors, rows), source, weights, terms.map, _BINS)
    return _study(figures, len(rows), n)


def _by_label(name: str, anchors: Anchors, terms: Terms) -> Found | None:
    rows = anchors.labelled
    label = partitions.label_codes(anchors.data.label)[0][rows]
    if len(np.unique(label)) < 2:
        terms.note(f"{name} / by label", "fewer than two labels" if len(rows) else "no labels")
        return None
    source, n = positions(anchors.data.src[rows])
    weights = intervals.Resamples(n, terms.config.bootstrap, terms.config.seed)
    figures = by_label(_vectors(anchors, rows), label, source, source, weights, terms.map, _BINS)
    if not figures["pairs_same"]:
        terms.note(f"{name} / by label", "no two sources share a label")
    return _study(figures, len(rows), n)


def _study(figures: Found, sequences: int, sources: int) -> Found:
    counts = figures["histograms"]
    masses = {side: _mass(counts[side]) for side in ("same", "different")}
    means = [figures[name]["value"] for name in ("mean_same", "mean_different")]
    return {
        "sequences": sequences,
        "sources": sources,
        **figures,
        "difference": None if None in means else means[0] - means[1],
        "masses": {"edges": counts["edges"], **masses},
    }


def _mass(counts: list[int]) -> list[float]:
    total = max(sum(counts), 1)
    return [count / total for count in counts]


def _clusters(name: str, anchors: Anchors, terms: Terms, solve: Solve) -> Found | None:
    rows = anchors.clustered
    if len(rows) < 2:
        terms.note(f"{name} / clusters", "fewer than two sequences")
        return None
    src = anchors.data.src[rows]
    codes = partitions.label_codes(anchors.data.label)[0][rows]
    if not (codes != partitions.UNLABELLED).any():
        terms.note(f"{name} / clusters by label", "no labels")
    return {
        "sequences": len(rows),
        "sources": len(np.unique(src)),
        "labelled": int((codes != partitions.UNLABELLED).sum()),
        **scored(solve(_vectors(anchors, rows)), src, codes),
    }


def _at(rows: list[Found], truth: str, threshold: float | None) -> Found | None:
    if threshold is None:
        return None
    row = rows[THRESHOLDS.index(threshold)]
    return None if row[truth] is None else {"threshold": threshold, **row[truth]}


def _vectors(anchors: Anchors, rows: NDArray[np.int64]) -> NDArray[np.float32]:
    return np.asarray(anchors.data.vectors)[rows]


def as_text(found: Found) -> list[str]:
    """For a terminal: similarities, then clusters at the threshold that validation sources choose."""
    lines = [f"{'':42}{'sequences':>10}{'same':>8}{'other':>8}{'AUROC':>24}"]
    for name, part in found["parts"].items():
        for by in ("by_source", "by_label"):
            if study := part[by]:
                means = "".join(f"{_cell(study[key]['value']):>8}" for key in ("mean_same", "mean_different"))
                title = f"{name}, similarity {by.replace('_', ' ')}"
                lines.append(f"{title:42}{study['sequences']:>10,}{means}{_interval(study['auroc']):>24}")
    lines.append(f"{'':56}{'threshold':>10}{'join F1':>9}{'cut F1':>9}{'macro':>8}{'weighted':>9}")
    for name, part in found["parts"].items():
        for truth, scores in (part["clusters"] or {}).get("at_chosen", {}).items():
            if scores is not None:
                figures = scores["f1"], scores["cuts"]["f1"], scores["macro_f1"], scores["weighted_f1"]
                cells = "".join(f"{_cell(x):>{w}}" for x, w in zip(figures, (9, 9, 8, 9), strict=True))
                title = f"{name}, clusters {truth.replace('_', ' ')}"
                lines.append(f"{title:56}{scores['threshold']:>10.2f}{cells}")
    return lines + [f"not computed, {item['why']}: {item['what']}" for item in found["not_computed"]]


def _cell(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _interval(figure: Found) -> str:
    if figure["low"] is None:
        return _cell(figure["value"])
    return f"{figure['value']:.3f} [{figure['low']:.3f}, {figure['high']:.3f}]"
