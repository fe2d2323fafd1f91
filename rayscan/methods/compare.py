"""One method, one seed, rated like every other: the same sequences, the same split, the same figures.

A method learns from the training part and embeds the sequences of each period; unseen sequences and unseen
sources are then compared with each other as `evaluation.protocol` does for rayscan's own encoder, with the
floors beside them, and clustered at the threshold that suited validation sequences best
(`methods.clustered`).

Two things keep the table honest. A method that does not know a source says so: figures are of the sequences
it covers, and coverage stands beside them. And a method with one vector for all of a source's sequences gets
no figure for telling that they are of one source, since that is true by construction.

Such methods were published *transductive*: all sources are in the corpus or graph they learn from. Rated so,
they are said to be, since "unseen" then means nothing.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from rayscan.config import EvaluateConfig, RunConfig, SplitConfig
from rayscan.evaluation import protocol
from rayscan.evaluation.partitions import UNLABELLED, label_codes
from rayscan.evaluation.parts import sample_rows
from rayscan.evaluation.splits import (
    PART_NAMES,
    TRAIN,
    UNSEEN_SEQUENCES,
    UNSEEN_SOURCES,
    VALIDATION,
    part_of,
)
from rayscan.evaluation.table import as_rows as table_rows
from rayscan.methods import clustered, own
from rayscan.methods.clustered import Members
from rayscan.methods.method import METHODS, ONE_VECTOR_A_SOURCE, Embedded, Fitted, method

VERSION = 3
"""Of what `rated` finds; raised when that changes, so that nothing older is taken for it."""

PARTS = (UNSEEN_SEQUENCES, UNSEEN_SOURCES)
_OF_PROTOCOL = {"source": ("auroc", "r_at_1"), "label": ("auroc", "knn_macro_f1@5")}
_NAMES = {"model": "method"}  # in what `protocol` calls them
Rated = dict[str, Any]


def names_of(asked: Sequence[str]) -> list[str]:
    """The methods that are asked for, rayscan first, then in the order of `METHODS`; "all" stands for all.

    Raises ConfigError for a name that is none, or whose packages are missing.
    """
    wanted = [own.NAME, *METHODS] if "all" in asked else list(asked)
    for name in wanted:
        if name != own.NAME:
            method(name)
    return [name for name in (own.NAME, *METHODS) if name in wanted]


def rate(
    name: str, periods: Sequence[pa.Table], seed: int, config: RunConfig, *, transductive: bool = False
) -> Rated:
    """Fit, embed and rate a method: `rated` of its vectors, and the seconds of fit and embed.

    `periods` are tables of `schema.SEQUENCES`, one for each period. With `transductive` it learns from the
    sequences of every part.
    """
    sequences = pa.concat_tables(periods)
    clock = _Clock()
    fitted = _fit(name, sequences, seed, config, transductive)
    clock.lap("fit")
    found = [fitted.embed(period) for period in periods]
    clock.lap("embed")
    embedded = Embedded(*(np.concatenate(columns) for columns in zip(*found, strict=True)))
    facts = {"method": name, "seed": seed, "transductive": transductive, "facts": fitted.facts}
    figures = rated(sequences, embedded, config.split, config.evaluate, name in ONE_VECTOR_A_SOURCE)
    return {**facts, **clock.laps, **figures}


class _Clock:
    """Seconds as they pass, and as this process spends them."""

    def __init__(self) -> None:
        self.laps: dict[str, float] = {}
        self.wall, self.cpu = time.perf_counter(), time.process_time()

    def lap(self, name: str) -> None:
        wall, cpu = time.perf_counter(), time.process_time()
        self.laps |= {f"{name}_s": round(wall - self.wall, 2), f"{name}_cpu_s": round(cpu - self.cpu, 2)}
        self.wall, self.cpu = wall, cpu


def _fit(name: str, sequences: pa.Table, seed: int, config: RunConfig, transductive: bool) -> Fitted:
    if name == own.NAME:
        train = config.train.model_copy(update={"seed": seed})
        return own.fit(sequences, config.split, config.model, train)
    part = _parts(sequences, config.split)
    return method(name).fit(name, sequences, np.full_like(part, TRAIN) if transductive else part, seed)


def rated(
    sequences: pa.Table, found: Embedded, split: SplitConfig, config: EvaluateConfig, of_sources: bool = False
) -> Rated:
    """{"parts": {PART: {"sequences", "coverage", "inferred", "source", "label"}}, "thresholds": {KIND}}.

    `sequences` has the columns of `schema.SEQUENCES`, `found` its vectors; `of_sources` says that a source
    has one. "source" and "label" hold for "method", "ports" and "random" FIGUREs by name, or are None for
    what has no figure: those of `protocol.evaluate`, and for "method" the "f1" of clusters.
    """
    of_part = _parts(sequences, split)
    covered = {part: np.flatnonzero((of_part == part) & found.covered) for part in (*PARTS, VALIDATION)}
    parts = {
        PART_NAMES[part]: {
            "sequences": int((of_part == part).sum()),
            "coverage": _share(found.covered[of_part == part]),
            "inferred": _share(found.inferred[of_part == part]),
            **_figures(sequences.take(covered[part]), found.vectors[covered[part]], config),
        }
        for part in PARTS
    }
    members = {part: _members(sequences, found, covered[part], config) for part in covered}
    tests = {PART_NAMES[part]: members[part] for part in PARTS}
    clusters = clustered.scores(members[VALIDATION], tests, config)
    for kind, chosen in clusters.items():
        for name, scored in chosen["parts"].items():
            if parts[name][kind] is not None:
                parts[name][kind]["method"] |= scored
    for name, some in tests.items():
        if parts[name]["label"] is not None:
            communities = clustered.communities(some.vectors, seed=config.seed)
            louvain = clustered.f1(some, communities, "label", config)
            parts[name]["label"]["method"]["louvain_f1"] = louvain
    for part in PARTS:
        if of_sources and not found.inferred[covered[part]].any():
            parts[PART_NAMES[part]]["source"] = None
    return {"parts": parts, "thresholds": {kind: chosen["threshold"] for kind, chosen in clusters.items()}}


def _parts(sequences: pa.Table, split: SplitConfig) -> NDArray[np.int8]:
    src, index, siblings = (sequences[key].to_numpy() for key in ("src", "index", "sequences"))
    return part_of(src, index, siblings, split)


def _share(chosen: NDArray[np.bool_]) -> float:
    return float(chosen.mean()) if len(chosen) else 0.0


def _figures(table: pa.Table, vectors: NDArray[np.float32], config: EvaluateConfig) -> Rated:
    scores: Rated = {"source": None, "label": None}
    if not table.num_rows:
        return scores
    part = protocol.part_data(table, vectors)
    for row in table_rows(protocol.evaluate({"part": part}, config)):
        kind, which = row["by"], _NAMES.get(row["method"], row["method"])
        if kind not in scores:
            continue
        scores[kind] = (scores[kind] or {}) | {which: {key: row[key] for key in _OF_PROTOCOL[kind]}}
    return scores


def _members(
    sequences: pa.Table, found: Embedded, rows: NDArray[np.int64], config: EvaluateConfig
) -> Members:
    """A sample of these rows, and one of those that have a label, for these may be rare."""
    codes, _ = label_codes(sequences["label"])
    ids, src = sequences["sequence_id"].to_numpy(), sequences["src"].to_numpy()
    limits = (config.max_sequences_per_source, config.max_sequences, config.seed)
    samples = [
        some[sample_rows(ids[some], src[some], *limits)] for some in (rows, rows[codes[rows] != UNLABELLED])
    ]
    chosen = np.union1d(*samples)
    source = np.unique(src[chosen], return_inverse=True)[1]
    return Members(found.vectors[chosen], source, codes[chosen])


COLUMNS = {
    "sequences AUROC": ("unseen sequences", "source", "auroc"),
    "sequences R@1": ("unseen sequences", "source", "r_at_1"),
    "sources AUROC": ("unseen sources", "source", "auroc"),
    "sources R@1": ("unseen sources", "source", "r_at_1"),
    "sources F1": ("unseen sources", "source", "f1"),
    "labels AUROC": ("unseen sources", "label", "auroc"),
    "labels 5-NN F1": ("unseen sources", "label", "knn_macro_f1@5"),
    "labels F1": ("unseen sources", "label", "f1"),
    "labels Louvain F1": ("unseen sources", "label", "louvain_f1"),
}
"""Figures of the table: its heading, and where `rated` has it."""
COSTS = ("fit_s", "fit_cpu_s", "embed_s", "embed_cpu_s")
FLOORS = {"ports": "floor: ports", "random": "floor: random"}


def as_rows(found: Sequence[Rated]) -> list[Rated]:
    """A row for each method, best first by AUROC on unseen sources; the floors come last.

    Keys: method, seeds, coverage (of unseen sources), those of COLUMNS, COSTS, memory_mb (the most). A cell
    of COLUMNS is {"value", "low", "high", "seeds", "ports"}: mean over seeds, mean of their intervals (over
    sources, so no narrower for several seeds), the value of each seed, and the port floor of the same
    sequences; or None for what no seed could give. The floors' rows are of the sequences that the first row
    of full coverage is rated on.
    """
    rows = []
    for name in dict.fromkeys(title(one) for one in found):
        runs = [one for one in found if title(one) == name]
        row: Rated = {"method": name, "seeds": len(runs)}
        row["coverage"] = _mean([one["parts"]["unseen sources"]["coverage"] for one in runs])
        row |= {heading: _cell(runs, where, "method") for heading, where in COLUMNS.items()}
        row |= {key: _mean([one.get(key) for one in runs]) for key in COSTS}
        row["memory_mb"] = max((one["memory_mb"] for one in runs if "memory_mb" in one), default=None)
        rows.append(row)
    rows.sort(key=lambda row: (row["sources AUROC"] is None, -_value(row["sources AUROC"]), row["method"]))
    whole = next((one for one in found if one["parts"]["unseen sources"]["coverage"] == 1), None)
    return rows + ([] if whole is None else [_floor(whole, which) for which in FLOORS])


def title(one: Rated) -> str:
    """What a row is called."""
    return f"{one['method']}, transductive" if one.get("transductive") else str(one["method"])


def _floor(whole: Rated, which: str) -> Rated:
    row = dict.fromkeys(("method", "seeds", "coverage", *COLUMNS, *COSTS, "memory_mb"))
    row |= {"method": FLOORS[which], "coverage": 1.0}
    return row | {heading: _cell([whole], where, which) for heading, where in COLUMNS.items()}


def _cell(runs: Sequence[Rated], where: tuple[str, str, str], which: str) -> Rated | None:
    figures = [figure for one in runs if (figure := _figure(one, where, which)) is not None]
    if not figures:
        return None
    floors = [figure["value"] for one in runs if (figure := _figure(one, where, "ports")) is not None]
    ends = {end: _mean([figure[end] for figure in figures]) for end in ("value", "low", "high")}
    return {**ends, "seeds": [figure["value"] for figure in figures], "ports": _mean(floors)}


def _figure(one: Rated, where: tuple[str, str, str], which: str) -> Rated | None:
    part, kind, key = where
    figure = ((one["parts"][part][kind] or {}).get(which) or {}).get(key)
    return None if figure is None or figure["value"] is None else figure


def _value(cell: Rated | None) -> float:
    return 0.0 if cell is None else float(cell["value"])


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None
