"""One method, one seed, rated like every other: the same sequences, the same split, the same figures.

A method learns from the training part and embeds all sequences; unseen sequences and unseen sources are then
compared with each other as `evaluation.protocol` does for rayscan's own encoder, the port floor beside them.

Two things keep the table honest. A method that does not know a source says so: figures are of the sequences
it covers, and coverage stands beside them. And a method with one vector for all of a source's sequences gets
no figure for telling that they are of one source, since that is true by construction.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from rayscan.config import EvaluateConfig, SplitConfig
from rayscan.evaluation import protocol
from rayscan.evaluation.splits import PART_NAMES, UNSEEN_SEQUENCES, UNSEEN_SOURCES, part_of
from rayscan.evaluation.table import as_rows as figure_rows
from rayscan.methods.method import METHODS, ONE_VECTOR_A_SOURCE, Embedded, method

PARTS = (UNSEEN_SEQUENCES, UNSEEN_SOURCES)
_BY_SOURCE = ("auroc", "r_at_1")
_BY_LABEL = ("auroc", "knn_macro_f1@5")
Rated = dict[str, Any]


def names_of(asked: Sequence[str]) -> list[str]:
    """The methods that are asked for, in the order of `METHODS`; "all" stands for all of them.

    Raises ConfigError for a name that is none, or whose packages are missing.
    """
    wanted = list(METHODS) if "all" in asked else list(asked)
    for name in wanted:
        method(name)
    return [name for name in METHODS if name in wanted]


def rate(name: str, sequences: pa.Table, seed: int, split: SplitConfig, config: EvaluateConfig) -> Rated:
    """Fit, embed and rate a method: `rated` of its vectors, with the seconds of fit and embed."""
    begun = time.perf_counter()
    fitted = method(name).fit(name, sequences, _parts(sequences, split), seed)
    trained = time.perf_counter()
    found = fitted.embed(sequences)
    done = time.perf_counter()
    facts = {"facts": fitted.facts, "fit_s": round(trained - begun, 2), "embed_s": round(done - trained, 2)}
    return {"method": name, "seed": seed, **facts, **rated(name, sequences, found, split, config)}


def rated(
    name: str, sequences: pa.Table, found: Embedded, split: SplitConfig, config: EvaluateConfig
) -> Rated:
    """{"parts": {PART: {"coverage", "inferred", "source", "label"}}}: shares, and figures by their names.

    `sequences` has the columns of `schema.SEQUENCES`, `found` its vectors. "source" and "label" hold for
    "method" and for "ports" what `protocol.evaluate` says, or None for what has no figure.
    """
    of_part = _parts(sequences, split)
    return {
        "parts": {PART_NAMES[part]: _part(name, sequences, found, of_part == part, config) for part in PARTS}
    }


def _parts(sequences: pa.Table, split: SplitConfig) -> NDArray[np.int8]:
    src, index, siblings = (sequences[key].to_numpy() for key in ("src", "index", "sequences"))
    return part_of(src, index, siblings, split)


def _part(
    name: str, sequences: pa.Table, found: Embedded, member: NDArray[np.bool_], config: EvaluateConfig
) -> Rated:
    all_rows = np.flatnonzero(member)
    rows = all_rows[found.covered[all_rows]]
    table = sequences.take(rows)
    part = protocol.part_data(table, found.vectors[rows])
    scores: dict[str, Any] = {"source": None, "label": None}
    if len(rows):
        for row in figure_rows(protocol.evaluate({"part": part}, config)):
            if row["by"] not in scores:
                continue
            which = "method" if row["method"] == "model" else row["method"]
            kept = _BY_SOURCE if row["by"] == "source" else _BY_LABEL
            scores[row["by"]] = (scores[row["by"]] or {}) | {which: {key: row[key] for key in kept}}
    if name in ONE_VECTOR_A_SOURCE and not found.inferred[rows].any():
        scores["source"] = None
    return {
        "sequences": len(all_rows),
        "coverage": len(rows) / max(len(all_rows), 1),
        "inferred": float(found.inferred[all_rows].mean()) if len(all_rows) else 0.0,
        **scores,
    }


COLUMNS = {
    "sequences AUROC": ("unseen sequences", "source", "auroc"),
    "sequences R@1": ("unseen sequences", "source", "r_at_1"),
    "sources AUROC": ("unseen sources", "source", "auroc"),
    "sources R@1": ("unseen sources", "source", "r_at_1"),
    "labels AUROC": ("unseen sources", "label", "auroc"),
    "labels 5-NN F1": ("unseen sources", "label", "knn_macro_f1@5"),
}
"""Figures of the table: its heading, and where `rated` has it."""


def as_rows(found: Sequence[Rated]) -> list[dict[str, Any]]:
    """A row for each method, best first by AUROC on unseen sources: means over its seeds.

    Keys: method, seeds, coverage (of unseen sources), those of COLUMNS, fit_s, embed_s, memory_mb (the most).
    What no seed could give is None.
    """
    rows = []
    for name in dict.fromkeys(one["method"] for one in found):
        runs = [one for one in found if one["method"] == name]
        row: dict[str, Any] = {"method": name, "seeds": len(runs)}
        row["coverage"] = _mean([one["parts"]["unseen sources"]["coverage"] for one in runs])
        for heading, (part, by, key) in COLUMNS.items():
            row[heading] = _mean([_figure(one["parts"][part][by], key) for one in runs])
        for key in ("fit_s", "embed_s"):
            row[key] = _mean([one.get(key) for one in runs])
        row["memory_mb"] = max((one["memory_mb"] for one in runs if "memory_mb" in one), default=None)
        rows.append(row)
    first = "sources AUROC"
    return sorted(rows, key=lambda row: (row[first] is None, -(row[first] or 0), row["method"]))


def _figure(scores: Mapping[str, Any] | None, key: str) -> float | None:
    return None if scores is None or "method" not in scores else scores["method"][key]["value"]


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None
