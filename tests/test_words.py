"""Skip-gram against its equations, DANTE and IP2VEC: what they learn from, and what they say they know."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
from safetensors.numpy import load, save
from sklearn.metrics import roc_auc_score
from tables_of_sequences import bits, sequences_of

from rayscan.errors import DataError
from rayscan.evaluation.splits import TRAIN, UNSEEN_SEQUENCES, UNSEEN_SOURCES
from rayscan.methods import ports, words
from rayscan.methods.method import flows_of
from rayscan.methods.words import DESTINATION, PORT, PROTOCOL, SOURCE

TCP, UDP = 6, 17


def flows(*port: int) -> list[dict[str, int]]:
    return [{"port": p} for p in port]


def pair_auroc(vectors: np.ndarray, group: np.ndarray) -> float:
    """How well the cosine tells pairs of one group from pairs of two."""
    a, b = np.triu_indices(len(vectors), 1)
    return float(roc_auc_score(group[a] == group[b], (vectors @ vectors.T)[a, b]))


def test_sentences_by_hand() -> None:
    found = words.sentences(np.array([5, 6, 7, 8, 9, 9]), np.array([0, 0, 3, 1, 1, 1]))
    assert list(found) == [[5, 6], [8, 9, 9]] and len(found) == 2  # a lone 7 teaches nothing
    assert list(words.sentences(np.zeros(0, np.int64), np.zeros(0, np.int64))) == []


def test_long_sentences_are_cut_not_lost() -> None:
    """gensim skips what follows the 10 000th word; the vectors of 7 and 8 would stay as they were."""
    text = np.r_[np.tile([1, 2], 5000), 7, 8, 7, 8]
    corpus = words.sentences(text, np.zeros(len(text), np.int64))
    assert [len(s) for s in corpus] == [10_000, 4]
    start = words.Words(
        np.array([1, 2, 7, 8]), np.ones(4, np.int64), np.ones((4, 4), np.float32), np.ones((4, 4), np.float32)
    )
    found = words.learn(corpus, words.Skipgram(4, 2, 1, 1), 0, start)
    assert found.words.tolist() == [1, 2, 7, 8] and found.counts.tolist() == [5001, 5001, 3, 3]
    assert not np.isclose(found.vectors, 1).all(axis=1).any()


def test_one_step_of_skip_gram_by_hand() -> None:
    """The sentence 1, 2. Word 3 is so common that every negative is 3. The first rate is 0.025."""
    rate, rng = 0.025, np.random.default_rng(0)
    v, u = rng.standard_normal((2, 3, 4))
    start = words.Words(
        np.array([1, 2, 3]), np.array([1, 1, 10**12]), v.astype(np.float32), u.astype(np.float32)
    )
    corpus = words.sentences(np.array([1, 2]), np.zeros(2, np.int64))
    found = words.learn(corpus, words.Skipgram(4, 1, 1, 1), 0, start)
    for centre, context in ((1, 0), (0, 1)):  # rows; gensim predicts the first word from the second first
        up = rate * (1 - 1 / (1 + np.exp(-v[centre] @ u[context])))
        down = rate / (1 + np.exp(-v[centre] @ u[2]))
        change = up * u[context] - down * u[2]
        u[context] += up * v[centre]
        u[2] -= down * v[centre]
        v[centre] += change
    np.testing.assert_allclose(found.vectors, v, atol=1e-3)  # gensim's sigmoid is a table
    np.testing.assert_allclose(found.contexts, u, atol=1e-3)
    assert np.abs(found.vectors[:2] - start.vectors[:2]).max() > 0.01
    np.testing.assert_array_equal(found.vectors[2], start.vectors[2])


def test_pairs_of_ip2vec_by_hand() -> None:
    table = sequences_of([[{"dst": 50, "port": 80}, {"dst": 51, "port": 53, "proto": UDP}]], src=[9])
    a, b, tcp, udp = DESTINATION + 50, DESTINATION + 51, PROTOCOL + TCP, PROTOCOL + UDP
    assert sorted(map(tuple, words.pairs_of(flows_of(table)).tolist())) == sorted(
        [
            *[(SOURCE + 9, a), (SOURCE + 9, PORT + 80), (SOURCE + 9, tcp), (PORT + 80, a), (tcp, a)],
            *[(SOURCE + 9, b), (SOURCE + 9, PORT + 53), (SOURCE + 9, udp), (PORT + 53, b), (udp, b)],
        ]
    )


def test_pairs_leave_out_what_is_not_recorded() -> None:
    table = sequences_of([[{"dst": -1, "port": 80}], [{"dst": 50, "port": -1}]], src=[9, 9])
    assert sorted(map(tuple, words.pairs_of(flows_of(table)).tolist())) == sorted(
        [
            *[(SOURCE + 9, PORT + 80), (SOURCE + 9, PROTOCOL + TCP)],
            *[(SOURCE + 9, DESTINATION + 50), (SOURCE + 9, PROTOCOL + TCP)],
            (PROTOCOL + TCP, DESTINATION + 50),
        ]
    )


def test_dante_is_the_mean_of_its_words() -> None:
    services = np.array([(TCP << 32) + 22, (TCP << 32) + 80, (UDP << 32) + 80])
    fitted = words.Dante(services, np.array([[3, 0], [0, 3], [9, 9]], np.float32), {})
    table = sequences_of([flows(22, 80, 80), flows(80, 443), flows(443), [{"port": 80, "proto": UDP}]])
    found = fitted.embed(table)
    expected = [[5**-0.5, 2 * 5**-0.5], [0, 1], [0, 0], [0.5**0.5, 0.5**0.5]]
    np.testing.assert_allclose(found.vectors, expected, rtol=1e-6)
    assert found.covered.tolist() == [True, True, False, True] and not found.inferred.any()


def two_toolkits(n: int) -> tuple[pa.Table, np.ndarray]:
    """Each sequence knocks at 4 of the 40 ports of its toolkit, so most pairs have none in common."""
    rng = np.random.default_rng(0)
    kit = np.arange(n) % 2
    drawn = [1000 * k + rng.choice(40, 4, replace=False) for k in kit + 1]
    return sequences_of([flows(*d.tolist()) for d in drawn]), kit


def test_dante_learns_which_ports_go_together() -> None:
    table, kit = two_toolkits(400)
    part = np.where(np.arange(400) < 340, TRAIN, UNSEEN_SOURCES).astype(np.int8)
    unseen = part == UNSEEN_SOURCES
    found = words.fit_with("dante", table, part, 0, replace(words.DANTE, d=16, epochs=20)).embed(table)
    floor = ports.fit("port-share", table, part, 0).embed(table)
    assert found.covered.all()
    assert pair_auroc(found.vectors[unseen], kit[unseen]) > 0.95
    assert pair_auroc(floor.vectors[unseen], kit[unseen]) < 0.75


def two_targets() -> tuple[pa.Table, np.ndarray, np.ndarray]:
    """Two sequences of each of 24 sources. All knock at one port, but one half of the sources at other
    destinations than the other. The second sequence is not trained on, nor are sources 20 to 23."""
    rng = np.random.default_rng(0)
    src = np.repeat(np.arange(24), 2)
    target = src % 2
    rows = [[{"dst": int(d)} for d in 100 * t + rng.integers(0, 10, 30)] for t in target]
    part = np.where(np.arange(48) % 2, UNSEEN_SEQUENCES, TRAIN)
    return sequences_of(rows, src=src), target, np.where(src < 20, part, UNSEEN_SOURCES).astype(np.int8)


def test_ip2vec_learns_who_is_after_whom_and_covers_no_others() -> None:
    table, target, part = two_targets()
    fitted = words.fit("ip2vec", table, part, 0)
    found = fitted.embed(table)
    np.testing.assert_array_equal(found.covered, part != UNSEEN_SOURCES)
    assert not found.vectors[~found.covered].any() and not found.inferred.any()
    first = part == TRAIN
    assert pair_auroc(found.vectors[first], target[first]) > 0.95
    floor = ports.fit("port-share", table, part, 0).embed(table)
    assert pair_auroc(floor.vectors[first], target[first]) == 0.5
    np.testing.assert_array_equal(found.vectors[first], found.vectors[part == UNSEEN_SEQUENCES])
    assert fitted.facts["pairs"] == 20 * 30 * 5 == fitted.facts["sentences"]


def test_ip2vec_draws_of_too_many_pairs() -> None:
    table, _, part = two_targets()
    fitted = words.fit_with("ip2vec", table, part, 0, replace(words.IP2VEC, epochs=1, most_pairs=500))
    assert fitted.facts["pairs"] == 3000 and fitted.facts["sentences"] == 500


@pytest.mark.parametrize("name", ["dante", "ip2vec"])
def test_the_same_bits_again_and_from_what_was_saved(name: str) -> None:
    table, _, part = two_targets()
    settings = replace(words.DANTE if name == "dante" else words.IP2VEC, epochs=1)

    fitted = words.fit_with(name, table, part, 0, settings)
    expected = bits(fitted.embed(table))
    assert bits(words.fit_with(name, table, part, 0, settings).embed(table)) == expected
    assert bits(words.fit_with(name, table, part, 1, settings).embed(table)) != expected
    assert bits(words.load(load(save(fitted.arrays)), fitted.facts).embed(table)) == expected


def test_other_parts_are_not_learnt() -> None:
    dante = sequences_of([flows(1, 2), flows(3, 4)])
    assert words.fit("dante", dante, np.array([TRAIN, UNSEEN_SOURCES]), 0).embed(dante).covered.tolist() == [
        True,
        False,
    ]


def test_nothing_to_learn_from() -> None:
    with pytest.raises(DataError, match="dante needs a training sequence of two flows"):
        words.fit("dante", sequences_of([flows(1)]), np.array([TRAIN], np.int8), 0)
    with pytest.raises(DataError, match="ip2vec needs"):
        words.fit("ip2vec", sequences_of([flows(1)]), np.array([UNSEEN_SOURCES], np.int8), 0)


WITHOUT_GENSIM = """
import sys
from rayscan.errors import ConfigError
from rayscan.methods.method import method

class Without:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name.split(".")[0] == "gensim":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Without)
try:
    method("dante")
except ConfigError as error:
    print(error)
"""


def test_without_gensim_it_says_what_to_install() -> None:
    found = subprocess.run(
        [sys.executable, "-c", WITHOUT_GENSIM], capture_output=True, text=True, check=True, timeout=120
    )
    assert (
        found.stdout
        == "method dante needs the package gensim; install it with pip install 'rayscan[methods]'\n"
    )
