"""Anchors: the published protocol's sample, which favours sources with much traffic, but by its root only.

The paper (arXiv 2606.04733) draws sources again and again with chance ∝ √capacity, each at most as often as
it has windows, and puts a window at random into the source, anew until it overlaps no other. Where nearly
all windows are asked for, its code never comes to an end.

Here the windows are the sequences themselves, which do not overlap and lie within one part of the split, in a
random order for each source. The draw is done by clocks: a source of c sequences rings at random times at
rate √c, and hands out one sequence at each ring, until it has none left. The first sequences to be handed out
are distributed as those of one draw after another, since which clock rings next has chance ∝ rate. But times
are a function of the source's own sequences: no order of files, and no other source, changes them, and the
first of all are among the first of each bucket.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from rayscan.keys import hash64, uniform


def times(sequence_id: NDArray[np.int64], src: NDArray[np.int64], seed: int = 0) -> NDArray[np.float64]:
    """When each sequence is handed out, float64 (N,); the earliest are the anchors.

    All sequences of a source that may be drawn must be given at once.
    """
    order = np.lexsort((hash64(sequence_id, seed), src))
    ordered = src[order]
    new = np.r_[True, ordered[1:] != ordered[:-1]][: len(order)]
    source, size = np.cumsum(new) - 1, np.diff(np.r_[np.flatnonzero(new), len(order)])
    waited = -np.log1p(-uniform(sequence_id[order], seed + 1)) / np.sqrt(size)[source]
    total = np.cumsum(waited)
    before = np.r_[0.0, total[:-1]][: len(order)][new]
    out = np.empty(len(order))
    out[order] = total - before[source]
    return out


def earliest(drawn: NDArray[np.float64], sequence_id: NDArray[np.int64], count: int) -> NDArray[np.int64]:
    """Positions of the `count` earliest, earliest first; those at infinity are never taken."""
    order = np.lexsort((sequence_id, drawn))
    return order[: min(count, int(np.isfinite(drawn).sum()))].astype(np.int64)
