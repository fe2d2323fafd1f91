"""DarkVec: its corpus by hand, what is learnt day by day, and what is inferred for others."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
from safetensors.numpy import load, save
from sklearn.metrics import roc_auc_score
from tables_of_sequences import HOUR_US, bits, sequences_of

from rayscan.errors import ConfigError, DataError
from rayscan.evaluation.splits import TRAIN, UNSEEN_SEQUENCES, UNSEEN_SOURCES
from rayscan.methods import darkvec, ports
from rayscan.methods.darkvec import PORT_CLASSES
from rayscan.methods.method import Flows, flows_of
from rayscan.schema import SEQUENCES

A, B, C = 1, 2, 3
TCP, UDP, ICMP = 6, 17, 1
SMALL = replace(darkvec.DARKVEC, d=16, epochs=5, active=1)
DAILY = replace(darkvec.I_DARKVEC, d=16, active=1, trailing_days=2)


def corpus(
    src: list[int], hour: list[int] | None = None, service: list[int] | None = None, collapse: bool = True
) -> list[list[int]]:
    zeros = [0] * len(src)
    columns = [np.array(column, np.int64) for column in (src, hour or zeros, service or zeros)]
    return list(darkvec.corpus_of(*columns, collapse=collapse))


def test_only_immediate_repeats_are_left_out() -> None:
    """Comparing the last sender with the first as well would give A, B here and nothing below."""
    assert corpus([A, B, B, A]) == [[A, B, A]]
    assert corpus([A, B, B, A], collapse=False) == [[A, B, B, A]]
    assert corpus([A, A, B, B, B]) == [[A, B]]
    assert corpus([A, A], collapse=False) == [[A, A]]
    assert corpus([A, A]) == []  # one sender in nobody's company: no sentence


def test_sentences_are_by_hour_then_service_then_time() -> None:
    src = [A, B, C, A, B, C, A, B]
    hour = [0, 0, 0, 0, 0, 0, 1, 1]
    service = [7, 2, 7, 2, 7, 2, 2, 2]
    assert corpus(src, hour, service) == [[B, A, C], [A, C, B], [A, B]]


def test_repeats_across_sentences_stay() -> None:
    assert corpus([A, B, B, C], service=[0, 0, 1, 1]) == [[A, B], [B, C]]
    assert corpus([A, B, B, C], hour=[0, 0, 1, 1]) == [[A, B], [B, C]]


def flows_to(*service: tuple[int, int]) -> Flows:
    return flows_of(sequences_of([[{"proto": proto, "port": port} for proto, port in service]]))


def test_kinds_of_services() -> None:
    flows = flows_to((TCP, 23), (TCP, 23), (TCP, 80), (UDP, 80), (TCP, 80), (TCP, 9))
    auto = replace(SMALL, commonest=2)
    commonest = darkvec.commonest_services(flows, auto)
    assert commonest.tolist() == [(TCP << 32) + 23, (TCP << 32) + 80]
    assert darkvec.service_of(flows, "auto", commonest).tolist() == [0, 0, 1, 2, 1, 2]
    assert darkvec.service_of(flows, "single", commonest).tolist() == [0] * 6
    with pytest.raises(ConfigError, match="'hybrid'; there are single, dks, auto"):
        darkvec.service_of(flows, "hybrid", commonest)


def test_classes_of_ports() -> None:
    name = list(PORT_CLASSES).index
    flows = flows_to(
        *[(TCP, 23), (TCP, 22), (UDP, 53), (TCP, 3306), (UDP, 3306)],
        *[(TCP, 1), (TCP, 1023), (TCP, 1024), (TCP, 49_151), (TCP, 49_152), (TCP, 65_535), (TCP, -1)],
        *[(ICMP, 8), (ICMP, 53)],
    )
    end = len(PORT_CLASSES)
    classes = [name("telnet"), name("ssh"), name("dns"), name("database"), end + 1]
    ranges = [end, end, end + 1, end + 1, end + 2, end + 2, end + 3]
    assert darkvec.service_of(flows, "dks", np.zeros(0, np.int64)).tolist() == [
        *classes,
        *ranges,
        end + 4,
        end + 4,
    ]


def test_no_port_has_two_classes() -> None:
    every = [
        (proto, port)
        for ports_of in PORT_CLASSES.values()
        for proto, of_class in ports_of.items()
        for port in of_class
    ]
    assert len(every) == len(set(every))


def meeting_table(days: list[tuple[int, list[int]]]) -> pa.Table:
    """On each day the given sources contact one port in turn, over and over, within an hour."""
    rows, src, start = [], [], []
    for day, sources in days:
        for turn, source in enumerate(sources):
            rows.append([{"gap": 0 if k == 0 else 10_000_000} for k in range(20)])
            src.append(source)
            start.append(day * 24 * HOUR_US + turn * 1_000_000)
    return sequences_of(rows, src=src, start_us=start)


def meeting(days: list[tuple[int, list[int]]]) -> tuple[Flows, np.ndarray]:
    """Its flows, in one period."""
    flows = flows_of(meeting_table(days))
    return flows, np.zeros(len(flows.src), np.int64)


def test_too_few_flows_and_a_sender_is_not_learnt() -> None:
    flows, service = meeting([(0, [A, B, C]), (1, [A, B])])
    known, _ = darkvec.train(flows, service, replace(SMALL, active=21), 0)
    assert known.sender.tolist() == [A, B] and known.day.tolist() == [0, 0]
    assert not len(darkvec.train(flows, service, replace(SMALL, active=41), 0)[0].sender)


def test_day_by_day_it_learns_on_and_forgets() -> None:
    flows, service = meeting([(0, [A, B, C]), (1, [A, B])])
    first, _ = darkvec.train(*meeting([(0, [A, B, C])]), DAILY, 0)
    second, facts = darkvec.train(flows, service, DAILY, 0)
    assert first.sender.tolist() == [A, B, C]
    assert list(zip(second.sender.tolist(), second.day.tolist(), strict=True)) == [
        (A, 0), (A, 1), (B, 0), (B, 1), (C, 0)
    ]  # fmt: skip
    assert facts["forgotten"] == 0
    np.testing.assert_array_equal(second.vectors[[0, 2, 4]], first.vectors)  # the first day is as it was
    moved = np.abs(second.vectors[[1, 3]] - first.vectors[:2]).max(axis=1)
    assert (moved > 0).all()
    away = np.abs(second.vectors[[1, 3]] - darkvec.train(*meeting([(1, [A, B])]), DAILY, 0)[0].vectors)
    assert away.max() > moved.max()  # not begun anew
    # Two trailing days: on the third C has not been there for two. It keeps the vector of its day.
    third, facts = darkvec.train(*meeting([(0, [A, B, C]), (1, [A, B]), (2, [A, B])]), DAILY, 0)
    assert third.sender.tolist() == [A, A, A, B, B, B, C]
    assert facts["forgotten"] == 1 and facts["steps"] == 3


def test_a_source_has_the_vector_of_its_last_day() -> None:
    known = darkvec.Senders.of(
        [(np.array([A, C]), np.array([3, 3]), np.eye(2)), (np.array([A]), np.array([5]), np.ones((1, 2)))], 2
    )
    src = np.array([A, A, A, A, A, B, C, C])
    day = np.array([3, 4, 5, 9, 1, 4, 0, 9])
    rows = known.rows(src, day)
    assert [None if row < 0 else int(known.day[row]) for row in rows] == [3, 3, 5, 5, 3, None, 3, 3]
    assert all(known.sender[row] == s for row, s in zip(rows, src, strict=True) if row >= 0)
    assert darkvec.Senders.of([], 2).rows(src, day).tolist() == [-1] * 8


def test_senders_of_every_month_are_known() -> None:
    """Three crowds that come a month each: each is known in its own month, day by day as well as at once."""
    days = [(month * 40 + day, [month * 10 + k for k in range(1, 6)]) for month in range(3) for day in (0, 1)]
    table = meeting_table(days)
    for name, settings in (("darkvec", SMALL), ("i-darkvec", replace(DAILY, trailing_days=30))):
        fitted = darkvec.fit_with(name, table, np.zeros(table.num_rows, np.int8), 0, settings)
        found = fitted.embed(table)
        assert found.covered.all() and not found.inferred.any(), name


def test_company_by_hand() -> None:
    """Flows of source 9: two where 1 (often) and 2 are, one where 3 is, one where nobody known is."""
    vectors = np.array([[2, 0], [0, 5], [3, 4]], np.float32)
    fitted = darkvec.Darkvec(
        darkvec.Senders.of([(np.array([1, 2, 3]), np.zeros(3, np.int64), vectors)], 2),
        np.array([(TCP << 32) + 22, (TCP << 32) + 80]),
        {"settings": {"services": "auto", "daily": False}},
    )
    at_80, at_22, at_443 = {"port": 80}, {"port": 22}, {"port": 443}
    table = sequences_of(
        [[at_80] * 5, [at_80], [at_22], [at_80, at_80, at_22, at_443], [at_443], [at_80], [at_80]],
        src=[1, 2, 3, 9, 8, 9, 2],
        start_us=[0, 0, 0, 0, 0, 5 * HOUR_US, 7 * HOUR_US],
    )
    found = fitted.embed(table)
    company = np.array([2 * 0.5 + 0.6, 2 * 0.5 + 0.8])
    expected = [[1, 0], [0, 1], [0.6, 0.8], company / np.linalg.norm(company), [0, 0], [0, 0], [0, 1]]
    np.testing.assert_allclose(found.vectors, expected, rtol=1e-6)
    # Neither the company of another unknown source nor that of another hour counts.
    assert found.covered.tolist() == [True, True, True, True, False, False, True]
    assert found.inferred.tolist() == [False, False, False, True, False, False, False]


def test_nobody_near_nobody_covered() -> None:
    fitted = darkvec.Darkvec(
        darkvec.Senders.of([(np.array([1]), np.zeros(1, np.int64), np.ones((1, 2), np.float32))], 2),
        np.zeros(0, np.int64),
        {"settings": {"services": "single", "daily": False}},
    )
    found = fitted.embed(sequences_of([[{}], [{}]], src=[8, 9]))
    assert not found.covered.any() and not found.inferred.any() and not found.vectors.any()
    assert fitted.embed(sequences_of([[{}]], src=[1])).covered.all()
    assert len(fitted.embed(SEQUENCES.empty_table()).vectors) == 0


def two_crews() -> tuple[pa.Table, np.ndarray, np.ndarray]:
    """24 sources on two days. All knock at one port, one crew in even hours, the other in odd ones. The
    sequences of the second day, and sources 20 to 23, are not trained on."""
    rng = np.random.default_rng(0)
    src = np.tile(np.arange(24), 4)
    crew = src % 2
    day = np.repeat([0, 0, 0, 1], 24)
    start = day * 24 + 2 * rng.integers(0, 12, len(src)) + crew
    rows = [[{"gap": int(g)} for g in rng.integers(0, 100_000_000, 30)] for _ in src]
    part = np.where(day == 0, TRAIN, UNSEEN_SEQUENCES)
    part = np.where(src < 20, part, UNSEEN_SOURCES).astype(np.int8)
    return sequences_of(rows, src=src, start_us=start * HOUR_US), crew, part


def pair_auroc(vectors: np.ndarray, group: np.ndarray) -> float:
    a, b = np.triu_indices(len(vectors), 1)
    return float(roc_auc_score(group[a] == group[b], (vectors @ vectors.T)[a, b]))


def test_it_learns_who_comes_together() -> None:
    table, crew, part = two_crews()
    src = table["src"].to_numpy()
    fitted = darkvec.fit_with("darkvec", table, part, 0, SMALL)
    found = fitted.embed(table)
    once = (part == UNSEEN_SEQUENCES) & found.covered
    assert once.sum() == 20 and fitted.facts["senders"] == 20
    assert pair_auroc(found.vectors[once], crew[once]) > 0.9
    inferred = found.inferred
    assert set(src[inferred].tolist()) == {20, 21, 22, 23}
    assert pair_auroc(found.vectors[inferred], crew[inferred]) > 0.9
    np.testing.assert_array_equal(found.vectors[src == 3], found.vectors[src == 3][[0, 0, 0, 0]])
    floor = ports.fit("port-share", table, part, 0).embed(table)
    assert pair_auroc(floor.vectors[once], crew[once]) == 0.5


@pytest.mark.parametrize(("name", "settings"), [("darkvec", SMALL), ("i-darkvec", DAILY)])
def test_the_same_bits_again_and_from_what_was_saved(name: str, settings: darkvec.Settings) -> None:
    table, _, part = two_crews()

    fitted = darkvec.fit_with(name, table, part, 0, settings)
    expected = bits(fitted.embed(table))
    assert bits(darkvec.fit_with(name, table, part, 0, settings).embed(table)) == expected
    assert bits(darkvec.fit_with(name, table, part, 1, settings).embed(table)) != expected
    assert bits(darkvec.load(load(save(fitted.arrays)), fitted.facts).embed(table)) == expected


def test_all_sources_are_known_that_train() -> None:
    table, _, part = two_crews()
    fitted = darkvec.fit_with("i-darkvec", table, np.zeros_like(part), 0, DAILY)
    found = fitted.embed(table)
    assert found.covered.all() and not found.inferred.any()
    assert fitted.facts["senders"] == 24
    assert fitted.facts["steps"] == 2


def test_nobody_meets() -> None:
    table, _, part = two_crews()
    with pytest.raises(DataError, match="i-darkvec needs two training sources with 1000 flows"):
        darkvec.fit_with("i-darkvec", table, part, 0, replace(DAILY, active=1000))
