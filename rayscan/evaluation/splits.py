"""Which sequences training sees, and which it is judged on.

A source's side depends on nothing but its address and the seed: it never moves when captures or periods
are added, and no pass over the data is needed. The price is that shares hold in expectation only; a heavy
source falls as a whole on one side. Within training sources the last sequences of a period are kept back,
so "unseen sequences" lie later in time than the training ones of the same source and period.

With `split.group` network, the /24 decides and not the source: scanners rent neighbouring addresses, and a
model may know a source that it has not seen by the one next to it. Prefix-preserving pseudonyms keep this.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from rayscan.config import SplitConfig
from rayscan.keys import uniform

TRAIN, UNSEEN_SEQUENCES, VALIDATION, UNSEEN_SOURCES = 0, 1, 2, 3
PART_NAMES = ("training", "unseen sequences", "validation", "unseen sources")


def part_of(
    src: NDArray[np.integer], index: NDArray[np.integer], sequences: NDArray[np.integer], split: SplitConfig
) -> NDArray[np.int8]:
    """Part of each sequence, int8 (a position in PART_NAMES).

    `src`, `index` and `sequences` are the columns of the sequences table, all of shape (N,). Of n sequences
    of a training source and period the first ⌊n (1 - unseen_sequences)⌋ are trained on, and at least one.
    """
    u = uniform(src if split.group == "source" else network_of(src), split.seed)
    # 10 * (1 - 0.8) is 1.9999999999999996, and must count as 2.
    seen = np.maximum(np.floor(sequences * (1 - split.unseen_sequences) + 1e-9), 1)
    part = np.where(index < seen, TRAIN, UNSEEN_SEQUENCES)
    part = np.where(u < split.test_sources + split.validation_sources, VALIDATION, part)
    return np.where(u < split.test_sources, UNSEEN_SOURCES, part).astype(np.int8)


def network_of(src: NDArray[np.integer]) -> NDArray[np.int64]:
    """The /24 of each address, as a number; int64, shape as given."""
    return np.asarray(src, np.int64) >> 8
