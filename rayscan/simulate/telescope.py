"""All campaigns together, month by month, and the truth about them.

Each campaign has its own random numbers in each month, so a month can be generated alone, and equals the
same month of the whole. A month is held in memory as columns, about 60 bytes for each of its flows at the
peak; how many months there are does not matter.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import date
from functools import cached_property
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from rayscan.errors import ConfigError, DataError
from rayscan.keys import period_of
from rayscan.schema import TIME
from rayscan.simulate.campaigns import TCP, UDP, Campaign, default_campaigns
from rayscan.simulate.plan import Plan, make_plan
from rayscan.simulate.traffic import COLUMNS, DAY_US, Run, Span, clock, fill, ragged_arange

Every = Literal["month", "day"]

FLOW_COLUMNS = pa.schema(
    [
        pa.field("ts", TIME, nullable=False),
        pa.field("src_ip", pa.uint32(), nullable=False),
        pa.field("dst_ip", pa.uint32(), nullable=False),
        pa.field("dst_port", pa.uint16(), nullable=False),  # ICMP: the type
        pa.field("proto", pa.uint8(), nullable=False),
        pa.field("src_port", pa.uint16()),  # null for ICMP
        pa.field("ttl", pa.uint8(), nullable=False),
        pa.field("size", pa.uint32(), nullable=False),  # bytes, IP header included
        pa.field("tcp_flags", pa.uint8()),  # null but for TCP
        pa.field("ip_id", pa.uint16(), nullable=False),
        pa.field("tcp_seq", pa.uint32()),  # null but for TCP
        pa.field("label", pa.string()),  # organisation of a known scanner
    ]
)

TRUTH = pa.schema(
    [
        pa.field("src", pa.int64(), nullable=False),
        pa.field("campaign", pa.string(), nullable=False),  # a noise source has one of its own
        pa.field("kind", pa.string(), nullable=False),
        pa.field("organisation", pa.string()),
        pa.field("first", TIME, nullable=False),
        pa.field("last", TIME, nullable=False),
        pa.field("flows", pa.int64(), nullable=False),
    ]
)


def simulate(
    campaigns: Sequence[Campaign] | None = None,
    *,
    seed: int = 0,
    months: int = 3,
    start: str = "2024-01-01",
    sources: int = 2000,
    flows: int = 500_000,
    prefix: str = "198.18.0.0/16",
) -> Simulation:
    """A telescope at `prefix` from `start` (first day of a month, UTC) over that many months.

    Without `campaigns`, those of `default_campaigns(sources, flows, seed)`; with them, `sources` and
    `flows` are what they say themselves. The default prefix is set aside for benchmarks (RFC 2544) and
    belongs to nobody. Nothing is generated yet. Raises ConfigError.
    """
    if seed < 0:
        raise ConfigError(f"seed is {seed}; it must not be negative")
    if campaigns is None:
        campaigns = default_campaigns(sources, flows, seed)
    names = [c.name for c in campaigns]
    if not names or len(set(names)) < len(names):
        raise ConfigError("campaigns need names of their own, and there must be at least one")
    telescope, edges = _network(prefix), _edges(start, months)
    return Simulation(tuple(campaigns), seed, edges, telescope, make_plan(campaigns, seed, edges, telescope))


def _network(prefix: str) -> ipaddress.IPv4Network:
    try:
        network = ipaddress.IPv4Network(prefix)
    except ValueError as error:
        raise ConfigError(f"prefix {prefix!r} is no IPv4 network: {error}") from None
    if not 8 <= network.prefixlen <= 28:
        raise ConfigError(f"prefix {prefix} must be /8 to /28")
    return network


def _edges(start: str, months: int) -> NDArray[np.int64]:
    """Boundaries of the months, int64 µs UTC, shape (months + 1,)."""
    if months < 1:
        raise ConfigError(f"months is {months}, needs at least 1")
    try:
        day = date.fromisoformat(start)
    except ValueError:
        raise ConfigError(f"start {start!r} is no date such as 2024-01-01") from None
    if day.day != 1:
        raise ConfigError(f"start {start} must be the first day of a month, for example {day:%Y-%m}-01")
    begins = np.datetime64(day, "M") + np.arange(months + 1)
    return begins.astype("datetime64[us]").astype(np.int64)


@dataclass(frozen=True, eq=False)
class Simulation:
    """What `simulate` returns: flows on demand, and the truth."""

    campaigns: tuple[Campaign, ...]
    seed: int
    edges: NDArray[np.int64]  # boundaries of the months, µs UTC, shape (M + 1,)
    telescope: ipaddress.IPv4Network
    plan: Plan

    @property
    def months(self) -> list[str]:
        return self.names("month")

    def names(self, every: Every) -> list[str]:
        """Names of the months (`2024-01`) or of the days (`2024-01-31`), in time order."""
        if every not in ("month", "day"):
            raise ConfigError(f"every is {every!r}; choose month or day")
        begins = self.edges[:-1] if every == "month" else np.arange(self.edges[0], self.edges[-1], DAY_US)
        return period_of(begins, every)[0]

    @property
    def n_flows(self) -> int:
        return int(self.plan.flows.sum())

    @property
    def n_sources(self) -> int:
        return len(self.plan.address)

    def month(self, name: str) -> pa.Table:
        """All flows of one month in time order, columns FLOW_COLUMNS."""
        if name not in self.months:
            raise DataError(f"no month {name!r}; the simulation has {self.months[0]} to {self.months[-1]}")
        columns = self._columns(self.months.index(name))
        return self._table(columns, np.argsort(columns["ts"], kind="stable"))

    def flows(self, every: Every = "month") -> Iterator[pa.Table]:
        """The flows of each month, or of each day, in turn; columns FLOW_COLUMNS, rows in time order."""
        for _, tables in self.parts(every, rows=self.n_flows):
            yield from tables

    def parts(self, every: Every, rows: int = 1_000_000) -> Iterator[tuple[str, Iterator[pa.Table]]]:
        """Name of each month or day, and its flows as tables of at most `rows` rows (at least one table)."""
        names = iter(self.names(every))
        for index in range(len(self.months)):
            yield from self._month_parts(index, names, every, rows)

    @cached_property
    def truth(self) -> pa.Table:
        """One row a source, columns TRUTH, sorted by address. Runs the clock of every campaign and month."""
        first = np.full(self.n_sources, np.iinfo(np.int64).max)
        last = np.full(self.n_sources, np.iinfo(np.int64).min)
        for month in range(len(self.months)):
            for c in range(len(self.campaigns)):
                at, _, count, ts = self._clock(c, month)
                stop = np.cumsum(count)
                active = np.flatnonzero(count)
                where = at.start + active
                first[where] = np.minimum(first[where], ts[(stop - count)[active]])
                last[where] = np.maximum(last[where], ts[stop[active] - 1])
        return self._truth(first, last)

    def _truth(self, first: NDArray[np.int64], last: NDArray[np.int64]) -> pa.Table:
        campaign = self.plan.campaign
        names = self._of_campaign([c.name for c in self.campaigns])
        for i in np.flatnonzero(self._of_campaign([c.kind for c in self.campaigns]) == "noise"):
            names[i] += f"-{i - self.plan.start[campaign[i]]:06d}"
        columns = {
            "src": self.plan.address.astype(np.int64),
            "campaign": names,
            "kind": self._of_campaign([c.kind for c in self.campaigns]),
            "organisation": self._of_campaign([c.organisation for c in self.campaigns]),
            "first": first,
            "last": last,
            "flows": self.plan.flows,
        }
        arrays = [pa.array(columns[field.name], field.type) for field in TRUTH]
        return pa.table(arrays, schema=TRUTH).sort_by("src")

    def _of_campaign(self, values: Sequence[str | None]) -> NDArray[np.object_]:
        """For each source, its campaign's value."""
        return np.array(values, object)[self.plan.campaign]

    def _clock(
        self, c: int, month: int
    ) -> tuple[slice, NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        """Sources of a campaign (in the plan), flows of each before and in the month, times of the latter."""
        at, (low, high) = self.plan.of(c), self.edges[month : month + 2].tolist()
        before = self.plan.sent_before(low, at)
        count = self.plan.sent_before(high, at) - before
        begin, end = np.maximum(self.plan.begin[at], low), np.minimum(self.plan.end[at], high)
        span = Span(begin, end, count, self.plan.pace[at], (low, high))
        return at, before, count, clock(self.campaigns[c], span, self._rng(c, month, 0))

    def _rng(self, c: int, month: int, stream: int) -> np.random.Generator:
        return np.random.default_rng(np.random.SeedSequence(self.seed, spawn_key=(2, c, month, stream)))

    def _columns(self, month: int) -> dict[str, NDArray[Any]]:
        """The flows of a month, campaign by campaign."""
        everyone, (low, high) = slice(None), self.edges[month : month + 2].tolist()
        counts = self.plan.sent_before(high, everyone) - self.plan.sent_before(low, everyone)
        edges = np.concatenate(([0], np.cumsum(counts)))[self.plan.start]
        columns = {name: np.empty(int(edges[-1]), kind) for name, kind in COLUMNS.items()}
        for c in range(len(self.campaigns)):
            self._fill({name: values[edges[c] : edges[c + 1]] for name, values in columns.items()}, c, month)
        return columns

    def _fill(self, columns: dict[str, NDArray[Any]], c: int, month: int) -> None:
        at, before, count, columns["ts"][:] = self._clock(c, month)
        source = np.repeat(np.arange(len(count)), count)
        columns["source"][:] = source + at.start
        change = self.edges[0] + int(self.campaigns[c].change * (self.edges[-1] - self.edges[0]))
        run = Run(
            campaign=self.campaigns[c],
            key=int(self.plan.key[c]),
            salt=self.plan.salt[at][source],
            hops=self.plan.hops[at][source],
            source=source,
            order=ragged_arange(count) + before[source],
            later=columns["ts"] >= change,
            base=int(self.telescope.network_address),
            bits=32 - self.telescope.prefixlen,
        )
        fill(columns, run, self._rng(c, month, 1))

    def _month_parts(
        self, month: int, names: Iterator[str], every: Every, rows: int
    ) -> Iterator[tuple[str, Iterator[pa.Table]]]:
        columns = self._columns(month)
        order = np.argsort(columns["ts"], kind="stable")
        days = np.arange(self.edges[month], self.edges[month + 1], DAY_US)
        cuts = np.searchsorted(columns["ts"], days[1:], sorter=order)
        for part in np.split(order, cuts) if every == "day" else [order]:
            yield next(names), self._chunks(columns, part, rows)

    def _chunks(
        self, columns: dict[str, NDArray[Any]], order: NDArray[np.int64], rows: int
    ) -> Iterator[pa.Table]:
        for at in range(0, max(len(order), 1), rows):
            yield self._table(columns, order[at : at + rows])

    def _table(self, columns: dict[str, NDArray[Any]], rows: NDArray[np.int64]) -> pa.Table:
        """These rows as Arrow, addresses and labels looked up, nulls where a protocol has no such field."""
        taken = {name: values[rows] for name, values in columns.items()}
        source, proto = taken.pop("source"), taken["proto"]
        not_tcp = proto != TCP
        missing = {"tcp_flags": not_tcp, "tcp_seq": not_tcp, "src_port": not_tcp & (proto != UDP)}
        taken["src_ip"] = self.plan.address[source]
        arrays = {name: pa.array(values, mask=missing.get(name)) for name, values in taken.items()}
        arrays["ts"] = arrays["ts"].cast(TIME)
        arrays["label"] = self._labels(source)
        return pa.table([arrays[field.name] for field in FLOW_COLUMNS], schema=FLOW_COLUMNS)

    def _labels(self, source: NDArray[np.int32]) -> pa.Array:
        campaign = self.plan.campaign[source]
        known = np.array([c.organisation is not None for c in self.campaigns])[campaign]
        names = pa.array([c.organisation for c in self.campaigns], pa.string())
        return pa.DictionaryArray.from_arrays(pa.array(campaign, mask=~known), names).cast(pa.string())
