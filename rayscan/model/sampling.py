"""Pairs of sequences to train on, drawn from a stream of files that need not fit in memory.

Files are read in random order into a pool of at most `pool_sequences` sequences; `pool_steps` batches are
drawn from it, then another pool takes its place, which a background thread has read meanwhile (so two are in
memory while there is more data than one holds). An epoch is as many pools as hold everything once: each file
is in one of them, and the next epoch cuts another random order. Where one pool is enough, it is read once and
kept.

A batch is a set of distinct sources, drawn with probability proportional to sequences^alpha, and two distinct
sequences of each. Only sequences of the part TRAIN are ever in a pool.

All that is drawn depends on nothing but the seed and the number of the pool or step, so that a run resumed at
step k draws what an undisturbed one would have. And every process draws the same global batch and takes its
slice of it: N workers see the batches that one would see, in which no source stands twice, and all
make the same number of steps, whatever the files hold. The price is that every worker reads all files of a
pool. Reading is far cheaper than training on what was read, and memory stays bounded by the pool.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from rayscan.config import ModelConfig, SplitConfig, TrainConfig
from rayscan.errors import ConfigError, DataError
from rayscan.evaluation.splits import TRAIN, VALIDATION, part_of
from rayscan.keys import uniform
from rayscan.model.features import Sequences, collate, concat

Key = Hashable
Load = Callable[[Key], Sequences]
T = TypeVar("T")

_POOL, _STEP = 0, 1  # what a random stream is for, so that no two are alike


@dataclass(frozen=True)
class Pool:
    """Sequences to draw from: all of part TRAIN, of sources that have at least two of them.

    Source s has the sequences rows[first[s]:first[s] + count[s]]; `complete` says that nothing was left out.
    """

    sequences: Sequences
    rows: NDArray[np.int64]
    first: NDArray[np.int64]
    count: NDArray[np.int64]
    complete: bool


@dataclass(frozen=True)
class Batch:
    """This process's slice of the global batch of one step: the first views of its sources, then the second.

    tensors  from `features.collate`, each [2 b, L]
    source   int64 [2 b], the source of each row by its number in the pool
    sizes    rows that each process holds
    """

    step: int
    tensors: dict[str, torch.Tensor]
    source: torch.Tensor
    sizes: tuple[int, ...]


@dataclass(frozen=True)
class PairSampler:
    """Batches of pairs for process `rank` of `world`.

    `load` gives the sequences of a key, all of a source's sequences of one period under one key; it is called
    from a background thread, never twice at a time. Pairs are drawn among what is in the pool together: if
    there is more data than one pool holds, a key should cover all periods of a bucket. `total` says how many
    sequences all keys have together, of every part; without it they are taken to fit into one pool.
    """

    keys: Sequence[Key]
    load: Load
    split: SplitConfig
    train: TrainConfig
    rank: int = 0
    world: int = 1
    total: int = 0

    def __post_init__(self) -> None:
        if self.train.batch_sources < self.world:
            raise ConfigError(
                f"train.batch_sources {self.train.batch_sources} leaves some of {self.world} workers "
                "without a source; raise it or lower train.workers"
            )

    @property
    def _seed(self) -> int:
        return self.train.seed % 2**63  # numpy's seeds are not negative

    def batches(
        self, model: ModelConfig, start: int, stop: int, ahead: int = 4
    ) -> Generator[Batch, None, None]:
        """Batches of the steps start to stop - 1, prepared up to `ahead` steps ahead in a background thread.

        Raises DataError if no two sources have two training sequences. Close the generator, or exhaust it,
        to end the threads.
        """
        return prefetch(self._batches(model, start, stop), ahead)

    def _batches(self, model: ModelConfig, start: int, stop: int) -> Generator[Batch, None, None]:
        for step, pool in self._pools(start, stop):
            first, second, source = self.draw(pool, step)
            shares = np.array_split(np.arange(len(source)), self.world)
            mine = shares[self.rank]
            rows = np.concatenate([first[mine], second[mine]])
            yield Batch(
                step,
                collate(pool.sequences, rows, model),
                torch.from_numpy(np.tile(source[mine], 2)),
                tuple(2 * len(share) for share in shares),
            )

    def draw(self, pool: Pool, step: int) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        """The global batch of a step: two distinct rows of `pool.sequences` for each source, and the source.

        Sources are drawn without replacement, each next one with probability proportional to count^alpha
        among those left: the smallest of exponential variables with these rates (Efraimidis and Spirakis,
        Weighted random sampling with a reservoir, 2006).
        """
        rng = np.random.default_rng([self._seed, _STEP, step])
        n = min(self.train.batch_sources, len(pool.count))
        arrival = rng.standard_exponential(len(pool.count)) / pool.count**self.train.alpha
        source = np.sort(np.argpartition(arrival, n - 1)[:n])
        source = rng.permutation(source)
        count, first = pool.count[source], pool.first[source]
        one = rng.integers(count)
        other = rng.integers(count - 1)
        other += other >= one
        return pool.rows[first + one], pool.rows[first + other], source

    def _pools(self, start: int, stop: int) -> Generator[tuple[int, Pool], None, None]:
        """Each step with its pool; the next pool is read while one is in use."""
        if start >= stop:
            return
        every = self.train.pool_steps
        pool = self.pool(start // every)
        with ThreadPoolExecutor(1, "rayscan-pool") as reader:
            for number in range(start // every, -(-stop // every)):
                more = not pool.complete and (number + 1) * every < stop
                upcoming = reader.submit(self.pool, number + 1) if more else None
                for step in range(max(start, number * every), min(stop, (number + 1) * every)):
                    yield step, pool
                if upcoming is not None:
                    pool = upcoming.result()

    @property
    def pools_per_epoch(self) -> int:
        """How many pools hold everything once, as far as is known before reading."""
        split = self.split
        learnt = (1 - split.test_sources - split.validation_sources) * (1 - split.unseen_sequences)
        pools = -int(-self.total * learnt // self.train.pool_sequences)
        return max(1, min(pools, len(self.keys)))

    def pool(self, number: int) -> Pool:
        """The pool of the given number. Files are chosen at random but joined in the order of `keys`.

        Of the file that overfills the pool, some sources are kept, at random too.
        """
        epoch, place = divmod(number, self.pools_per_epoch)
        order = np.random.default_rng([self._seed, _POOL, epoch]).permutation(len(self.keys))
        left, complete = self.train.pool_sequences, self.pools_per_epoch == 1
        parts: dict[int, Sequences] = {}
        for position in map(int, np.array_split(order, self.pools_per_epoch)[place]):
            if left == 0:
                complete = False
                break
            part = self._training_part(position)
            if len(part) > left:
                part, complete = _some_sources(part, left, number + self._seed), False
            parts[position] = part
            left -= len(part)
        return self._indexed([parts[position] for position in sorted(parts)], complete)

    def _training_part(self, position: int) -> Sequences:
        loaded = self.load(self.keys[position])
        part = part_of(loaded.src, loaded.index, loaded.sequences, self.split)
        return loaded.take(np.flatnonzero(part == TRAIN))

    def _indexed(self, parts: list[Sequences], complete: bool) -> Pool:
        if not parts:
            raise DataError("no sequences to train on: the workspace has none in these periods")
        sequences = concat(parts)
        rows = np.argsort(sequences.src, kind="stable")
        _, first, count = np.unique(sequences.src[rows], return_index=True, return_counts=True)
        many = count >= 2
        if many.sum() < max(2, self.world):
            raise DataError(
                f"{int(many.sum())} of {len(count)} training sources have two sequences, and training on "
                f"pairs needs at least {max(2, self.world)}; make sequences shorter (sequences.length, "
                "sequences.min_length), the pool larger (train.pool_sequences) or ingest more flows"
            )
        return Pool(sequences, rows, first[many], count[many], complete)


def _some_sources(part: Sequences, limit: int, seed: int) -> Sequences:
    """`limit` sequences, of random sources, the last of which may be cut short; in the order of `part`."""
    order = np.lexsort((part.src, uniform(part.src, seed)))
    return part.take(np.sort(order[:limit]))


def validation_sample(
    keys: Sequence[Key],
    load: Load,
    split: SplitConfig,
    *,
    limit: int = 2000,
    per_source: int = 4,
    seed: int = 0,
) -> Sequences | None:
    """At most `limit` sequences of part VALIDATION, `per_source` at most of each of random sources.

    Every source has at least two. None if fewer than two sources do. Holds one file and the sample in memory.
    """
    kept: Sequences | None = None
    for key in keys:
        loaded = load(key)
        part = part_of(loaded.src, loaded.index, loaded.sequences, split)
        found = loaded.take(np.flatnonzero(part == VALIDATION))
        found = found if kept is None else concat([kept, found])
        # Single sequences stay until the end, for their source may go on under a later key.
        kept = found.take(_few_of_each(found, per_source, 4 * limit, 1, seed))
    if kept is None:
        return None
    sample = kept.take(_few_of_each(kept, per_source, limit, 2, seed))
    return sample if len(np.unique(sample.src)) >= 2 else None


def _few_of_each(
    sequences: Sequences, per_source: int, limit: int, at_least: int, seed: int
) -> NDArray[np.int64]:
    """Rows of up to `per_source` sequences of each source that has `at_least`, of random sources."""
    order = np.lexsort((uniform(sequences.sequence_id, seed), sequences.src, uniform(sequences.src, seed)))
    src = sequences.src[order]
    begins = np.diff(src, prepend=src[:1] - 1) != 0
    group = np.cumsum(begins) - 1
    rank = np.arange(len(src)) - np.flatnonzero(begins)[group]
    chosen = (rank < per_source) & (np.bincount(group)[group] >= at_least)
    fits = np.cumsum(np.bincount(group, chosen))[group] <= limit
    rows: NDArray[np.int64] = order[chosen & fits]
    return rows


_END = object()


def prefetch(items: Generator[T, None, None], ahead: int) -> Generator[T, None, None]:
    """The same items, up to `ahead` of them computed in advance by one background thread.

    An exception of `items` is raised where the item would have been. The thread ends with the generator.
    """
    try:
        with ThreadPoolExecutor(1, "rayscan-prefetch") as worker:
            waiting = deque(worker.submit(next, items, _END) for _ in range(ahead))
            try:
                while (item := waiting.popleft().result()) is not _END:
                    waiting.append(worker.submit(next, items, _END))
                    yield item  # type: ignore[misc]
            finally:
                for future in waiting:
                    future.cancel()
    finally:
        items.close()
