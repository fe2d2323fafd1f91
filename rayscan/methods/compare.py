"""One method, one seed, rated like every other: the same sequences, the same split, the same figures.

A method learns from the training part and embeds the sequences of each period; unseen sequences and unseen
sources are then compared with each other as `evaluation.protocol` does for rayscan's own encoder, with the
floors beside them, and clustered at the threshold that suited validation sequences best
(`methods.clustered`).

Two things keep the table honest. A method that does not know a source says so: figures are of the sequences
it covers, and coverage stands beside them. And a method with one vector for all of a source's sequences gets
no figure for telling that they are of one source, since that is true by construction; where it infers a
vector for each sequence of a source that it has not learnt, these alone are asked.

Such methods were published *transductive*: all sources are in the corpus or graph they learn from. Rated so,
they are said to be, since "unseen" then means nothing.
"""

from __future__ import annotations

import resource
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from rayscan.config import EvaluateConfig, RunConfig, SplitConfig
from rayscan.errors import ConfigError
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

VERSION = 4
"""Of what `rated` finds; raised when that changes, so that nothing older is taken for it."""

PARTS = (UNSEEN_SEQUENCES, UNSEEN_SOURCES)
_OF_PROTOCOL = {"source": ("auroc", "r_at_1"), "label": ("auroc", "knn_macro_f1@5")}
_NAMES = {"model": "method"}  # in what `protocol` calls them
Rated = dict[str, Any]


def names_of(asked: Sequence[str]) -> tuple[list[str], list[str]]:
    """The methods that are asked for, rayscan first, then in the order of `METHODS`; and what is left out.

    "all" stands for all whose packages are there; the others are what is left out, each with the reason.
    Raises ConfigError for a name that is none, or that is asked for by itself and whose packages are missing.
    """
    missing: dict[str, str] = {}
    for name in METHODS if "all" in asked else ():
        try:
            method(name)
        except ConfigError as error:
            missing[name] = str(error)
    wanted = {*asked, *(own.NAME, *METHODS)} - {"all"} if "all" in asked else set(asked)
    wanted -= set(missing) - set(asked)
    for name in sorted(wanted - {own.NAME}):
        method(name)
    return [name for name in (own.NAME, *METHODS) if name in wanted], list(missing.values())


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
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    embedded = Embedded(*(np.concatenate(columns) for columns in zip(*found, strict=True)))
    facts = {"method": name, "seed": seed, "transductive": transductive, "facts": fitted.facts}
    facts["memory_mb"] = memory  # the most of this process until now: fit and embed, libraries included
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
    asked = {"source": found.inferred if of_sources else found.covered, "label": found.covered}
    parts: dict[str, Rated] = {
        PART_NAMES[part]: {
            "sequences": int((of_part == part).sum()),
            "coverage": _share(found.covered[of_part == part]),
            "inferred": _share(found.inferred[of_part == part]),
        }
        for part in PARTS
    }
    thresholds = {}
    for kind, known in asked.items():
        rows = {part: np.flatnonzero((of_part == part) & known) for part in (*PARTS, VALIDATION)}
        for part in PARTS:
            table, vectors = sequences.take(rows[part]), found.vectors[rows[part]]
            parts[PART_NAMES[part]][kind] = _figures(table, vectors, config)[kind]
        members = {part: _members(sequences, found, rows[part], config) for part in rows}
        tests = {PART_NAMES[part]: members[part] for part in PARTS}
        chosen = clustered.scores(members[VALIDATION], tests, kind, config)
        if chosen is not None:
            thresholds[kind] = chosen["threshold"]
        for name, some in tests.items():
            figures = parts[name][kind]
            if figures is not None and chosen is not None:
                figures["method"] |= chosen["parts"][name]
            if figures is not None and kind == "label":
                communities = clustered.communities(some.vectors, seed=config.seed)
                figures["method"]["louvain_f1"] = clustered.f1(some, communities, kind, config)
    return {"parts": parts, "thresholds": thresholds}


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
FEW = 5
"""Sources behind a figure below which the table does not show it: that of one source says nothing."""
SHARES = {
    "coverage": ("unseen sources", "coverage"),
    "inferred": ("unseen sources", "inferred"),
    "seen_coverage": ("unseen sequences", "coverage"),
}
"""Shares of sequences that have a vector, or one that was inferred: where `rated` has them."""
COSTS = ("fit_s", "fit_cpu_s", "embed_s", "embed_cpu_s")
FLOORS = {"ports": "floor: ports", "random": "floor: random"}


def as_rows(found: Sequence[Rated]) -> list[Rated]:
    """A row for each method, best first by AUROC on unseen sources; then what failed, and the floors last.

    Keys: method, seeds, coverage and inferred (shares of the sequences of unseen sources), seen_coverage (of
    unseen sequences), those of COLUMNS, COSTS, memory_mb (the most), failed (why, or None). A cell of
    COLUMNS is {"value", "low", "high", "seeds", "ports"}: mean over seeds, mean of their intervals (over
    sources, so no narrower for several seeds), the value of each seed, and the port floor of the same
    sequences; or None for what no seed could give of FEW sources or more. The floors' rows are of the
    sequences that the first row of full coverage is rated on.
    """
    rows = []
    for name in dict.fromkeys(title(one) for one in found):
        runs = [one for one in found if title(one) == name and "failed" not in one]
        row: Rated = {"method": name, "seeds": len(runs)}
        for key, (part, share) in SHARES.items():
            row[key] = _mean([one["parts"][part].get(share) for one in runs])
        row |= {heading: _cell(runs, where, "method") for heading, where in COLUMNS.items()}
        row |= {key: _mean([one.get(key) for one in runs]) for key in COSTS}
        row["memory_mb"] = max((one["memory_mb"] for one in runs if "memory_mb" in one), default=None)
        row["failed"] = next((one["failed"] for one in found if title(one) == name and "failed" in one), None)
        rows.append(row)
    rows.sort(key=lambda row: (row["sources AUROC"] is None, -_value(row["sources AUROC"]), row["method"]))
    done = [one for one in found if "failed" not in one]
    whole = next((one for one in done if one["parts"]["unseen sources"]["coverage"] == 1), None)
    return rows + ([] if whole is None else [_floor(whole, which) for which in FLOORS])


def title(one: Rated) -> str:
    """What a row is called."""
    return f"{one['method']}, transductive" if one.get("transductive") else str(one["method"])


def _floor(whole: Rated, which: str) -> Rated:
    row = dict.fromkeys(("method", "seeds", *SHARES, *COLUMNS, *COSTS, "memory_mb", "failed"))
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
    return None if figure is None or figure["value"] is None or figure["n"] < FEW else figure


def _value(cell: Rated | None) -> float:
    return 0.0 if cell is None else float(cell["value"])


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None
