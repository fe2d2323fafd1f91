"""What a vote of neighbours would be without each of the sources in turn, comparing nothing again.

Who is nearest depends on which sources are there, so an interval that holds neighbours fixed promises too
much. Leaving a source out takes its own sequences away, and gives those that it was among the nearest of the
next ones instead. Both are read off a list with more neighbours of each row than vote.

What is traded: where one source has nearly all of the `DEPTH` places of such a list, fewer than k are left to
vote, and where it has all of them, the vote stays as it was.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from rayscan.evaluation.blockwise import NONE
from rayscan.evaluation.neighbours import vote

DEPTH = 16
F64 = NDArray[np.float64]
Ids = NDArray[np.int64]


def macro_f1_without(neighbours: Ids, label: Ids, source: Ids, k: int) -> F64:
    """Macro F1 of the vote of the k nearest without each source, which neither votes nor counts then.

    float64 (G,); NaN where no label is left. `neighbours` (N, DEPTH) are rows, nearest first, none of a row's
    own source; `label` (N,) and `source` (N,) are positions from 0.
    """
    predicted = vote(neighbours[:, :k], label)
    voters = np.where(neighbours == NONE, NONE, source[neighbours])
    moved = [_claims(source, predicted, label, -1), np.stack([source, label, *_counts(label, 0, 0, -1)])]
    for place in range(min(k, neighbours.shape[1])):
        gone = voters[:, place]
        rows = np.flatnonzero((gone != NONE) & (voters[:, :place] != gone[:, None]).all(axis=1))
        kept = (voters[rows] != NONE) & (voters[rows] != gone[rows, None])
        rows, kept = rows[kept.any(axis=1)], kept[kept.any(axis=1)]
        order = np.argsort(~kept, axis=1, kind="stable")[:, :k]  # those that are left come first
        others = np.take_along_axis(np.where(kept, neighbours[rows], NONE), order, axis=1)
        moved.append(_claims(gone[rows], predicted[rows], label[rows], -1))
        moved.append(_claims(gone[rows], vote(others, label), label[rows], 1))
    return _macro_f1_after(np.concatenate(moved, axis=1), label, predicted, int(source.max(initial=-1)) + 1)


def _claims(gone: Ids, predicted: Ids, truth: Ids, sign: int) -> Ids:
    """What these votes add (or take) without `gone`, int64 (5, M): source, label; hits, claims, members."""
    told = predicted != NONE
    gone, predicted, truth = gone[told], predicted[told], truth[told]
    return np.stack([gone, predicted, *_counts(predicted, sign * (predicted == truth), sign, 0)])


def _counts(like: Ids, *values: Any) -> list[Ids]:
    return [np.broadcast_to(value, like.shape).astype(np.int64) for value in values]


def _macro_f1_after(moved: Ids, label: Ids, predicted: Ids, n_sources: int) -> F64:
    """Macro F1 without each source, from what that moves, as `_claims` has it."""
    labels = int(label.max(initial=-1)) + 1
    told = predicted[predicted != NONE]
    hits, claims, members = (
        np.bincount(ids, minlength=labels) for ids in (label[label == predicted], told, label)
    )
    there = members > 0
    f1 = 2 * hits / np.maximum(members + claims, 1)
    cell, at = np.unique(moved[0] * labels + moved[1], return_inverse=True)
    gone, of = np.divmod(cell, labels)
    more_hits, more_claims, more_members = (np.bincount(at, each, len(cell)) for each in moved[2:])
    left = members[of] + more_members
    after = 2 * (hits[of] + more_hits) / np.maximum(left + claims[of] + more_claims, 1) * (left > 0)
    total = f1[there].sum() + np.bincount(gone, after - f1[of], n_sources)
    number = there.sum() - np.bincount(gone, left == 0, n_sources)
    undefined = np.full(n_sources, np.nan)
    return np.asarray(np.divide(total, number, out=undefined, where=number > 0))
