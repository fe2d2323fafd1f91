"""CLAN's own protocol on rows of any labelled table: anomalies without labels, and classes from a few.

As in Wilkie et al. (IEEE CSR 2025): each class is split in half, at random and by class; an encoder learns
from the benign half alone, and a row's score is minus the cosine of its vector to the mean benign one. Each
attack class is told from benign rows by the AUROC of that score. Classes with fewer than 100 rows are
"zero-day": they are in no training set, and tested whole. Then the encoder is trained on with a few labelled
rows of each other class, and judged by macro precision, recall and F1 on the other half.

What their code gets wrong and this does not:

- an AUROC below one half stays below one half. Theirs takes the larger of a and 1 - a, by which a detector
  that finds everything but the attacks is perfect;
- a row without a value loses its label too. Theirs drops the row alone, which shifts all labels behind it;
- a column that is constant among benign rows is scaled by 1, not divided by 0;
- few-label training scales rows as pre-training did, once. Theirs scales scaled rows again by the few;
- a class of which there is one row is drawn like any other. Theirs gives it weight 0.

The split is theirs: rows of one attack, host or minute lie on both sides, so figures say how well known
behaviour is found again, not how a new network would fare.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import polars as pl
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as nnf

from rayscan.captures.delimited import Header, read_blocks, read_header
from rayscan.captures.values import cast_text, trimmed
from rayscan.errors import DataError, FormatError, ModelError, SchemaError
from rayscan.methods.clan import Encoder, Scaling, Settings, anomaly_scores, pretrain, project
from rayscan.model.fit import auroc

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]
Ints = NDArray[np.int64]
Mask = NDArray[np.bool_]
Texts = NDArray[np.str_]

FEWEST = 100
"""Rows below which a class is zero-day."""

IDENTITIES = {
    "flowid", "id", "uid", "timestamp", "ts", "time", "date", "datetime", "starttime", "endtime", "stime",
    "ltime", "etime", "firstseen", "lastseen", "flowstart", "flowend", "flowstartmilliseconds",
    "flowendmilliseconds", "srcaddr", "dstaddr", "srcip", "dstip", "sourceip", "destinationip", "saddr",
    "daddr", "ipsrc", "ipdst", "ipv4srcaddr", "ipv4dstaddr", "idorigh", "idresph", "srcport", "dstport",
    "sourceport", "destinationport", "sport", "dport", "dsport", "l4srcport", "l4dstport", "idorigp",
    "idrespp", "ipprot", "protocol", "proto",
}  # fmt: skip
"""Columns, in small letters and digits alone, that say who or when and are no features: the published ones,
and what Zeek, Argus, NetFlow and other common tables call the same."""

LABELS = {"label", "labels", "class", "attack", "attacks", "attackcat", "attacktype", "attackcategory",
          "category", "subcategory", "target", "detailedlabel"}  # fmt: skip
"""Columns that say what a row is, as the label column does: as features they would give it away."""


# ---------------------------------------------------------------------------------------------
# a table of rows
# ---------------------------------------------------------------------------------------------


class Rows(NamedTuple):
    """Labelled rows.

    names     of the features
    features  float64 (N, F), all finite
    labels    str (N,)
    left_out  columns that are no features, and why
    dropped   rows that lack a value or hold one that is no finite number
    ragged    lines with another number of fields
    """

    names: list[str]
    features: F64
    labels: Texts
    left_out: dict[str, str]
    dropped: int
    ragged: int


def read_rows(file: BinaryIO, path: str, label_column: str, without: Sequence[str] = ()) -> Rows:
    """Rows of buffered delimited text with a header line; `path` is for messages.

    A feature is a column that is not named in IDENTITIES, LABELS or `without` and not the same everywhere,
    and most of whose values in the first 16 MiB are numbers. Names are compared without blanks around them.
    Raises SchemaError without one of the columns named, FormatError for a file that cannot be read, DataError
    if no row or no feature is left.
    """
    header = read_header(file, path)
    label = _place(header, label_column, path)
    for name in without:
        _place(header, name, path)
    left_out = {}
    for name in (name for place, name in enumerate(header.names) if place != label):
        plain = "".join(filter(str.isalnum, name.lower()))
        if name in {one.strip() for one in without}:
            left_out[name] = "was asked to be"
        elif plain in IDENTITIES:
            left_out[name] = "says who or when"
        elif plain in LABELS:
            left_out[name] = "is called like a label"
    wanted = [k for k, name in enumerate(header.names) if k != label and name not in left_out]
    parts: list[F64] = []
    labels: list[Texts] = []
    ragged = 0
    for block in read_blocks(file, path, header, [label, *wanted], 16 << 20):
        columns = {place: _numbers(block.columns[place]) for place in wanted}
        if not parts:
            numeric = [place for place in wanted if _of_numbers(block.columns[place], columns[place])]
            left_out |= {header.names[k]: "holds hardly any numbers" for k in wanted if k not in numeric}
            wanted = numeric
        if not wanted:
            raise DataError(f"{path}: there is no column of numbers beside {label_column!r}")
        parts.append(np.stack([columns[place] for place in wanted], axis=1))
        labels.append(np.asarray(trimmed(block.columns[label]).fill_null("").to_pylist(), np.str_))
        ragged += len(block.ragged)
    if not parts:
        raise FormatError(path, "a header line and no rows")
    features, named, dropped = complete(np.concatenate(parts), np.concatenate(labels))
    if not len(features):
        raise DataError(
            f"{path}: none of {dropped:,} rows has a label and a number in every column of numbers"
        )
    names, varied = np.array(header.names)[wanted], (features != features[0]).any(0)
    if not varied.any():
        raise DataError(f"{path}: there is no column of different numbers beside {label_column!r}")
    left_out |= dict.fromkeys(names[~varied].tolist(), "is the same in all rows")
    return Rows(names[varied].tolist(), features[:, varied], named, left_out, dropped, ragged)


def _place(header: Header, label_column: str, path: str) -> int:
    if label_column.strip() not in header.names:
        raise SchemaError(f"{path}: there is no column {label_column!r}; there are {', '.join(header.names)}")
    return header.names.index(label_column.strip())


def _numbers(column: pa.Array) -> F64:
    """NaN where a text is no number."""
    values, parsed = cast_text(trimmed(column), pl.Float64())
    return np.where(parsed, values, np.nan)


def _of_numbers(column: pa.Array, numbers: F64) -> bool:
    """Whether most of what is there is numbers: else a stray one in a column of words would cost all rows."""
    there = len(column) - trimmed(column).null_count
    return bool(2 * (~np.isnan(numbers)).sum() > there)


def complete(features: F64, labels: Texts) -> tuple[F64, Texts, int]:
    """Rows, and their labels, that have a label and finite numbers alone; and how many have not."""
    whole = np.isfinite(features).all(1) & (labels != "")
    return features[whole], labels[whole], int((~whole).sum())


# ---------------------------------------------------------------------------------------------
# anomalies
# ---------------------------------------------------------------------------------------------


def halves(labels: Texts, seed: int) -> Mask:
    """bool (N,): rows to train on. Half of each class, none of a class with fewer than FEWEST rows."""
    rng = np.random.default_rng(seed)
    train = np.zeros(len(labels), np.bool_)
    for label in np.unique(labels):
        rows = np.flatnonzero(labels == label)
        if len(rows) >= FEWEST:
            train[rng.permutation(rows)[: len(rows) // 2]] = True
    return train


class Detector(NamedTuple):
    """An encoder of benign rows, how they are scaled, and the mean of what it makes of them."""

    encoder: Encoder
    scaling: Scaling
    centre: F32

    def scores(self, features: F64) -> F64:
        """The larger, the less benign: float64 (N,)."""
        return anomaly_scores(_outputs(self.encoder, self.scaling(features)), self.centre)


def learn_benign(features: F64, settings: Settings, seed: int) -> Detector:
    """Learn from benign rows, (N, F)."""
    scaling = Scaling.learn(features)
    rows = scaling(features)
    encoder = pretrain(rows, settings, seed)
    return Detector(encoder, scaling, _outputs(encoder, rows).mean(0))


def _outputs(encoder: Encoder, rows: F32) -> F32:
    outputs = project(encoder, rows)
    if not np.isfinite(outputs).all():
        raise ModelError("CLAN: vectors are not finite; look for extreme values among the features")
    return outputs


class Detected(NamedTuple):
    """How well each attack class is told from benign rows."""

    auroc: dict[str, float]
    zero_day: list[str]  # those that are tested whole

    @property
    def mean(self) -> float:
        """Over classes, each the same."""
        return float(np.mean(list(self.auroc.values())))


def detected(scores: F64, labels: Texts, train: Mask, benign: str) -> Detected:
    """AUROC of benign test rows against those of each other class, as it is, also below one half."""
    usual = scores[~train & (labels == benign)]
    classes = [str(label) for label in np.unique(labels) if label != benign]
    found = {label: auroc(scores[~train & (labels == label)], usual) for label in classes}
    return Detected(found, [label for label in classes if not train[labels == label].any()])


# ---------------------------------------------------------------------------------------------
# a few labels
# ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tuning:
    """As published."""

    epochs: int = 100
    batch: int = 64
    rate: float = 1e-3
    decay: float = 1e-6


class Scores(NamedTuple):
    """Precision, recall and F1 are means over classes."""

    accuracy: float
    precision: float
    recall: float
    f1: float


def few_of_each(classes: Ints, rows: Ints, k: int, rng: np.random.Generator) -> Ints:
    """Of `rows` at most `k` of each class, at random: positions in `classes`."""
    found = [rng.permutation(rows[classes[rows] == one])[:k] for one in np.unique(classes[rows])]
    return np.concatenate(found)


def balanced(classes: Ints, count: int, generator: torch.Generator) -> Tensor:
    """`count` positions drawn with replacement, every class equally often, however few rows it has."""
    weights = 1 / np.bincount(classes)[classes]
    return torch.multinomial(torch.from_numpy(weights), count, replacement=True, generator=generator)


def fine_tune(
    encoder: Encoder, rows: F32, classes: Ints, tuning: Tuning, seed: int
) -> tuple[Encoder, nn.Linear]:
    """A copy of the whole encoder and a new head, trained on scaled rows (N, F) of classes 0, 1, ..."""
    generator = torch.Generator().manual_seed(seed)
    encoder = copy.deepcopy(encoder).train()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        head = nn.Linear(encoder.project.out_features, int(classes.max()) + 1)
    optimiser = torch.optim.AdamW(
        [*encoder.parameters(), *head.parameters()], lr=tuning.rate, weight_decay=tuning.decay
    )
    x, y = torch.from_numpy(rows), torch.from_numpy(classes)
    for _ in range(tuning.epochs):
        drawn = balanced(classes, len(x), generator)
        for start in range(0, len(x), tuning.batch):
            batch = drawn[start : start + tuning.batch]
            value = nnf.cross_entropy(head(encoder(x[batch])), y[batch])
            optimiser.zero_grad()
            value.backward()  # type: ignore[no-untyped-call]
            optimiser.step()
    return encoder.eval(), head


def scores_of(truth: Ints, guess: Ints) -> Scores:
    """Over the classes that occur in the truth; one that is never guessed has precision 0."""
    classes = np.unique(truth)
    hits = np.array([((truth == one) & (guess == one)).sum() for one in classes])
    guessed = np.array([(guess == one).sum() for one in classes])
    there = np.array([(truth == one).sum() for one in classes])
    precision, recall = hits / np.maximum(guessed, 1), hits / there
    f1 = 2 * hits / (guessed + there)
    return Scores(float((truth == guess).mean()), *(float(x.mean()) for x in (precision, recall, f1)))


def few_labels(
    detector: Detector, features: F64, labels: Texts, train: Mask, k: int, tuning: Tuning, seed: int
) -> Scores:
    """Train on `k` rows of each class of the training half, and classify the other half.

    Zero-day classes are in neither. A class with fewer than `k` rows to train on gives all it has.
    """
    known = np.unique(labels[train])
    rows = np.flatnonzero(np.isin(labels, known))
    classes = np.full(len(labels), -1)
    classes[rows] = np.searchsorted(known, labels[rows])
    few = few_of_each(classes, rows[train[rows]], k, np.random.default_rng(seed))
    encoder, head = fine_tune(detector.encoder, detector.scaling(features[few]), classes[few], tuning, seed)
    test = rows[~train[rows]]
    with torch.inference_mode():
        outputs = torch.from_numpy(_outputs(encoder, detector.scaling(features[test])))
        guess = head(outputs).argmax(1).numpy()
    return scores_of(classes[test], guess)


def run(
    rows: Rows, benign: str, few: Sequence[int], seed: int, settings: Settings, tuning: Tuning
) -> dict[str, Any]:
    """The whole protocol, as facts for JSON. Raises DataError if there is nothing to tell apart."""
    labels = rows.labels
    found, counts = np.unique(labels, return_counts=True)
    classes = dict(zip(found.tolist(), counts.tolist(), strict=True))
    if classes.get(benign, 0) < FEWEST:
        raise DataError(
            f"{classes.get(benign, 0):,} rows are labelled {benign!r}, and {FEWEST} are needed; labels are "
            f"{', '.join(classes)}: name the usual one with --benign"
        )
    if len(classes) < 2:
        raise DataError(f"all rows are labelled {benign!r}: there is nothing to tell them from")
    train = halves(labels, seed)
    detector = learn_benign(rows.features[train & (labels == benign)], settings, seed)
    told = detected(detector.scores(rows.features), labels, train, benign)
    learnt = {
        str(k): few_labels(detector, rows.features, labels, train, k, tuning, seed)._asdict() for k in few
    }
    return {
        "rows": len(labels),
        "dropped": rows.dropped,
        "ragged": rows.ragged,
        "features": rows.names,
        "left_out": rows.left_out,
        "benign": benign,
        "classes": classes,
        "auroc": told.auroc,
        "mean_auroc": told.mean,
        "zero_day": told.zero_day,
        "few": learnt,
    }
