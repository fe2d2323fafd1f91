"""Periods, buckets and the hash that outlives programs."""

from __future__ import annotations

import itertools
from datetime import UTC, datetime

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rayscan.keys import Period, bucket_of, hash64, period_of, span_of, uniform


def test_hash_is_splitmix64() -> None:
    """First outputs of the reference generator from state 0: its n-th state is n times the increment."""
    increment = 0x9E3779B97F4A7C15
    states = np.array([0, increment, 2 * increment % 2**64], np.uint64).view(np.int64)
    expected = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]
    assert hash64(states).tolist() == expected


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        ("day", ["1969-12-31", "2013-03-03", "2013-12-30", "2014-01-01"]),
        ("week", ["1970-W01", "2013-W09", "2014-W01"]),
        ("month", ["1969-12", "2013-03", "2013-12", "2014-01"]),
        ("all", ["all"]),
    ],
)
def test_period_names(kind: Period, names: list[str]) -> None:
    times = ["2013-03-03T21:53:59.999999", "2013-12-30", "2014-01-01", "1969-12-31T23:59:59"]
    found, position = period_of(np.array(times, "datetime64[us]").astype(np.int64), kind)
    assert found == names
    if kind == "day":
        assert [found[p] for p in position] == [t[:10] for t in times]


@given(st.integers(-(10**15), 4 * 10**15))
def test_week_agrees_with_the_calendar(us: int) -> None:
    found, _ = period_of(np.array([us]), "week")
    year, week, _ = np.datetime64(us, "us").astype("datetime64[D]").item().isocalendar()
    assert found == [f"{year}-W{week:02d}"]


def test_buckets_and_uniform_numbers_are_even_and_independent_of_each_other() -> None:
    src = np.arange(2**24, 2**24 + 40_000)
    counts = np.bincount(bucket_of(src, 16), minlength=16)
    assert abs(counts - 2500).max() < 5 * np.sqrt(2500)
    u = uniform(src, seed=42)
    assert u.min() >= 0
    assert u.max() < 1
    chosen = np.bincount(bucket_of(src[u < 0.2], 16), minlength=16)
    assert abs(chosen - 500).max() < 5 * np.sqrt(500)


@pytest.mark.parametrize("kind", ["day", "week", "month"])
def test_a_period_spans_what_is_named_after_it(kind: Period) -> None:
    hours = np.arange(0, 20_000, 7)  # across two turns of the year, one into a leap year
    times = hours * 3_600_000_000 + int(datetime(2022, 12, 1, tzinfo=UTC).timestamp() * 1e6)
    names, position = period_of(times, kind)
    spans = [span_of(name) for name in names]
    assert all(end == begin for (_, end), (begin, _) in itertools.pairwise(spans))
    for time, place in zip(times.tolist(), position, strict=True):
        begin, end = spans[place]
        assert begin <= datetime.fromtimestamp(time / 1e6, UTC) < end
