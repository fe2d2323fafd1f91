"""What is drawn: only training sequences, by the declared odds, the same whoever draws and whenever."""

from __future__ import annotations

import threading
from itertools import islice

import numpy as np
import pytest

from rayscan.config import ModelConfig, SplitConfig, TrainConfig
from rayscan.errors import ConfigError, DataError
from rayscan.evaluation.splits import TRAIN, VALIDATION, part_of
from rayscan.model.features import Sequences
from rayscan.model.sampling import PairSampler, prefetch, validation_sample

SPLIT = SplitConfig()
EVERYTHING = SplitConfig(test_sources=0, validation_sources=0, unseen_sequences=0)
MODEL = ModelConfig(inputs=("dst_port", "proto"))


def file_of(sources: dict[int, int], seed: int = 0, length: int = 3) -> Sequences:
    """A file with so many sequences of each source. A flow's port names its sequence, modulo 65536."""
    rng = np.random.default_rng(seed)
    src = np.repeat(list(sources), list(sources.values())).astype(np.int64)
    index = np.concatenate([np.arange(n) for n in sources.values()]).astype(np.int32)
    n = len(src)
    ids = src * 1000 + index
    return Sequences(
        offsets=np.arange(n + 1) * length,
        src=src,
        index=index,
        sequences=np.repeat(list(sources.values()), list(sources.values())).astype(np.int32),
        sequence_id=ids,
        start=rng.integers(0, 10**15, n),
        columns={
            "dst_port": np.repeat(ids % 65536, length).astype(np.int32),
            "proto": np.full(n * length, 6, np.int16),
        },
    )


FILES = {name: file_of({100 * i + s: 2 + s % 5 for s in range(1, 31)}, i) for i, name in enumerate("abcdef")}


def sampler(split: SplitConfig = SPLIT, rank: int = 0, world: int = 1, **settings) -> PairSampler:
    train = TrainConfig(**({"batch_sources": 12, "pool_steps": 4, "seed": 3} | settings))
    return PairSampler(list(FILES), FILES.__getitem__, split, train, rank, world)


def fingerprint(batch) -> tuple:
    return batch.step, batch.tensors["dst_port"].tolist(), batch.source.tolist()


def drawn_ids(a: PairSampler, start: int, stop: int) -> list[np.ndarray]:
    """Sequence ids of each step's global batch, first views then second."""
    out = []
    for step, pool in a._pools(start, stop):
        first, second, _ = a.draw(pool, step)
        out.append(pool.sequences.sequence_id[np.concatenate([first, second])])
    return out


@pytest.mark.parametrize("pool_sequences", [500_000, 120])
def test_only_training_sequences(pool_sequences):
    allowed, others = set(), set()
    for loaded in FILES.values():
        part = part_of(loaded.src, loaded.index, loaded.sequences, SPLIT)
        allowed |= set(loaded.sequence_id[part == TRAIN].tolist())
        others |= set(loaded.sequence_id[part != TRAIN].tolist())
    assert others
    seen = np.concatenate(drawn_ids(sampler(pool_sequences=pool_sequences), 0, 80))
    assert set(seen.tolist()) <= allowed
    assert len(set(seen.tolist())) > 0.6 * len(allowed)


def test_batches_are_pairs_of_distinct_sources():
    for ids in drawn_ids(sampler(), 0, 20):
        first, second = ids[:12], ids[12:]
        assert len(set((first // 1000).tolist())) == 12
        assert (first // 1000 == second // 1000).all()
        assert (first != second).all()


def test_batch_holds_what_was_drawn():
    a = sampler()
    ids = drawn_ids(a, 0, 3)
    for step, batch in enumerate(a.batches(MODEL, 0, 3)):
        assert batch.step == step
        assert batch.sizes == (24,)
        assert batch.tensors["dst_port"][:, 0].tolist() == (ids[step] % 65536).tolist()
        assert batch.source[:12].tolist() == batch.source[12:].tolist()
        assert len(set(batch.source.tolist())) == 12


def test_odds_are_sequences_to_the_alpha():
    counts = {1: 2, 2: 8, 3: 32, 4: 2}
    for alpha, weights in (
        (0.5, [2**0.5, 8**0.5, 32**0.5, 2**0.5]),
        (0.0, [1, 1, 1, 1]),
        (1.0, [2, 8, 32, 2]),
    ):
        train = TrainConfig(batch_sources=2, alpha=alpha)
        a = PairSampler(["x"], lambda _: file_of(counts), EVERYTHING, train)
        pool = a.pool(0)
        picks = np.zeros(4)
        for step in range(3000):
            picks[np.unique(a.draw(pool, step)[2])] += 1
        p = np.array(weights) / sum(weights)
        # Two without replacement: first i, or first some j and then i among the rest.
        expected = p + p * (np.sum(p / (1 - p)) - p / (1 - p))
        np.testing.assert_allclose(picks / 3000, expected, atol=0.04)


def test_every_pair_of_a_source_is_equally_likely():
    a = PairSampler(["x"], lambda _: file_of({1: 3, 2: 3}), EVERYTHING, TrainConfig(batch_sources=2))
    pool = a.pool(0)
    seen = np.zeros((3, 3))
    for step in range(3000):
        first, second, source = a.draw(pool, step)
        one = source == 0
        seen[pool.sequences.index[first[one]], pool.sequences.index[second[one]]] += 1
    assert np.diag(seen).tolist() == [0, 0, 0]
    np.testing.assert_allclose(seen[~np.eye(3, dtype=bool)] / 3000, 1 / 6, atol=0.03)


@pytest.mark.parametrize("pool_sequences", [500_000, 120])
@pytest.mark.parametrize("resume", [1, 4, 6, 11])
def test_resumed_draws_are_the_undisturbed_ones(pool_sequences, resume):
    whole = [fingerprint(b) for b in sampler(pool_sequences=pool_sequences).batches(MODEL, 0, 12)]
    assert len(whole) == 12
    rest = [fingerprint(b) for b in sampler(pool_sequences=pool_sequences).batches(MODEL, resume, 12)]
    assert rest == whole[resume:]


def test_seed_changes_draws_and_negative_seeds_work():
    one, other = (next(iter(sampler(seed=s).batches(MODEL, 0, 1))) for s in (-1, 5))
    assert fingerprint(one) != fingerprint(other)


@pytest.mark.parametrize("world", [2, 5])
def test_workers_share_the_batch_of_one(world):
    single = drawn_ids(sampler(pool_sequences=120), 0, 10)
    parts = [
        list(sampler(rank=r, world=world, pool_sequences=120).batches(MODEL, 0, 10)) for r in range(world)
    ]
    for step, ids in enumerate(single):
        batches = [part[step] for part in parts]
        assert len({b.sizes for b in batches}) == 1
        assert [len(b.source) for b in batches] == list(batches[0].sizes)
        assert sum(batches[0].sizes) == 24
        ports = [b.tensors["dst_port"][:, 0].numpy() for b in batches]
        first, second = (np.concatenate([np.split(p, 2)[view] for p in ports]) for view in (0, 1))
        assert np.concatenate([first, second]).tolist() == (ids % 65536).tolist()
        assert len({s for b in batches for s in b.source.tolist()}) == 12


def test_pool_is_bounded_and_changes():
    a = sampler(pool_sequences=200, split=EVERYTHING)
    pools = [a.pool(number) for number in range(3)]
    assert all(len(p.sequences) <= 200 and not p.complete for p in pools)
    assert len({tuple(np.unique(p.sequences.src)) for p in pools}) == 3
    whole = sampler(split=EVERYTHING).pool(0)
    assert whole.complete
    assert len(whole.sequences) == sum(map(len, FILES.values()))


def test_every_file_is_in_one_pool_of_an_epoch():
    total = sum(map(len, FILES.values()))
    train = TrainConfig(batch_sources=12, pool_sequences=total // 2 - 50, seed=3)
    a = PairSampler(list(FILES), FILES.__getitem__, EVERYTHING, train, total=total)
    assert a.pools_per_epoch == 3
    epochs = [
        [set(np.unique(a.pool(3 * epoch + k).sequences.src // 100)) for k in range(3)] for epoch in (0, 1)
    ]
    for pools in epochs:
        assert [len(files) for files in pools] == [2, 2, 2]
        assert set.union(*pools) == set(range(6))
    assert epochs[0] != epochs[1]
    assert not a.pool(0).complete
    few = TrainConfig(pool_sequences=total // 20, seed=3)  # no more pools than there are files
    assert PairSampler(list(FILES), FILES.__getitem__, EVERYTHING, few, total=total).pools_per_epoch == 6
    assert PairSampler(list(FILES), FILES.__getitem__, SPLIT, TrainConfig(), total=total).pools_per_epoch == 1


def test_complete_pool_is_read_once_and_others_per_refresh():
    for pool_sequences, expected in ((500_000, 6), (60, None)):
        reads: list[str] = []

        def load(key: str, reads: list[str] = reads) -> Sequences:
            reads.append(key)
            return FILES[key]

        train = TrainConfig(batch_sources=4, pool_steps=5, pool_sequences=pool_sequences)
        list(PairSampler(list(FILES), load, EVERYTHING, train).batches(MODEL, 0, 20))
        assert len(reads) == expected if expected else len(reads) >= 4


def test_a_file_larger_than_the_pool_gives_a_part_of_its_sources():
    big = file_of({s: 4 for s in range(1, 200)})
    a = PairSampler(["x"], lambda _: big, EVERYTHING, TrainConfig(pool_sequences=100))
    one, other = a.pool(0), a.pool(1)
    assert len(one.sequences) == len(other.sequences) == 100
    assert one.count.min() >= 2
    assert set(one.sequences.src.tolist()) != set(other.sequences.src.tolist())


def test_too_large_batches_use_all_sources():
    batch = next(
        iter(PairSampler(["a"], FILES.get, EVERYTHING, TrainConfig(batch_sources=999)).batches(MODEL, 0, 1))
    )
    assert len(batch.source) == 60


@pytest.mark.parametrize(
    ("sources", "world", "words"), [({1: 5, 2: 1}, 1, "1 of 2"), ({1: 2, 2: 2}, 3, "at least 3")]
)
def test_too_few_sources_say_so(sources, world, words):
    a = PairSampler(["x"], lambda _: file_of(sources), EVERYTHING, TrainConfig(), 0, world)
    with pytest.raises(DataError, match=rf"{words}[^$]*sequences\.length"):
        next(iter(a.batches(MODEL, 0, 5)))


def test_more_workers_than_sources_in_a_batch():
    with pytest.raises(ConfigError, match=r"batch_sources 12 .* 13 workers"):
        sampler(world=13)


def test_no_keys():
    with pytest.raises(DataError, match="none in these periods"):
        next(iter(PairSampler([], FILES.get, EVERYTHING, TrainConfig()).batches(MODEL, 0, 5)))


def test_pairs_may_span_periods():
    """One sequence of the source under each of two keys makes a pair."""
    files = {"march": file_of({1: 1, 2: 1}), "april": file_of({1: 1, 2: 1}, seed=1)}
    a = PairSampler(list(files), files.__getitem__, EVERYTHING, TrainConfig(batch_sources=2))
    assert a.pool(0).count.tolist() == [2, 2]


# ---------------------------------------------------------------------------------------------


def threads() -> list[str]:
    return [t.name for t in threading.enumerate() if t.name.startswith("rayscan")]


def test_prefetch_is_bounded_ordered_and_ends():
    produced = []

    def items():
        for i in range(100):
            produced.append(i)
            yield i

    ahead = prefetch(items(), 3)
    assert list(islice(ahead, 5)) == [0, 1, 2, 3, 4]
    assert len(produced) <= 5 + 3
    ahead.close()
    assert not threads()
    assert list(prefetch(items(), 3)) == list(range(100))
    assert not threads()


def test_prefetch_passes_errors_on_where_they_happened():
    def items():
        yield 1
        raise DataError("no more")

    ahead = prefetch(items(), 4)
    assert next(ahead) == 1
    with pytest.raises(DataError, match="no more"):
        next(ahead)
    assert not threads()


def test_abandoned_batches_end_their_threads():
    batches = sampler(pool_sequences=60).batches(MODEL, 0, 10_000)
    next(batches)
    batches.close()
    assert not threads()


def test_validation_sample():
    sample = validation_sample(list(FILES), FILES.__getitem__, SPLIT, limit=20, per_source=3)
    assert sample is not None
    assert (part_of(sample.src, sample.index, sample.sequences, SPLIT) == VALIDATION).all()
    counts = np.unique(sample.src, return_counts=True)[1]
    assert set(counts.tolist()) <= {2, 3}
    assert 4 <= len(sample) <= 20
    again = validation_sample(list(FILES)[::-1], FILES.__getitem__, SPLIT, limit=20, per_source=3)
    assert set(again.sequence_id.tolist()) == set(sample.sequence_id.tolist())
    assert validation_sample(list(FILES), FILES.__getitem__, EVERYTHING) is None
    assert validation_sample([], FILES.__getitem__, SPLIT) is None
