"""Flows of several packets: sums, marks, and no packet lost however many are open."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from packet_files import T0, Packet, icmp, ipv4, pcap, tcp
from test_pcap import Result

from rayscan.captures import aggregate
from rayscan.captures.aggregate import Aggregator
from rayscan.captures.headers import COLUMNS

KEY = ("src", "dst", "dst_port", "proto")
Ints = NDArray[np.int64]
Flow = dict[str, int]


def columns(packets: list[Flow]) -> Ints:
    return np.array([[packet.get(name, -1) for packet in packets] for name in COLUMNS], np.int64)


def flows(table: Ints) -> Iterator[Flow]:
    for row in table.T.tolist():
        yield dict(zip(COLUMNS, row, strict=True))


def one_by_one(packets: list[Flow], span: int) -> list[Flow]:
    """The flows as the documentation says, without a bound on how many are open."""
    closed: list[Flow] = []
    current: dict[tuple[int, ...], Flow] = {}
    for packet in packets:
        key = tuple(packet[name] for name in KEY)
        flow = current.get(key)
        if flow is None or abs(packet["ts"] - flow["ts"]) >= span:
            closed += [] if flow is None else [flow]
            current[key] = dict(packet)
            continue
        for name in ("size", "tcp_flags"):
            known = [value for value in (flow[name], packet[name]) if value >= 0]
            merged = sum(known) if name == "size" else int(np.bitwise_or.reduce(known or [-1]))
            flow[name] = merged if known else -1
        flow["ts"] = min(flow["ts"], packet["ts"])
        flow["packets"] += 1
        flow["fingerprint"] &= packet["fingerprint"]
    return closed + sorted(current.values(), key=lambda flow: flow["ts"])


PACKETS = st.lists(
    st.builds(
        lambda ts, src, port, size, flags, marks: {
            "ts": ts * 100_000, "src": src, "dst": 2**32 - 1, "dst_port": port, "proto": 6, "packets": 1,
            "size": size, "tcp_flags": flags, "fingerprint": marks, "ttl": ts, "src_port": ts, 
            "icmp_code": -1, "ip_id": -1, "tcp_seq": -1,
        },
        st.integers(0, 60), st.integers(0, 3), st.sampled_from([-1, 0, 65535]), st.sampled_from([-1, 40, 60]),
        st.sampled_from([-1, 0, 2, 16]), st.integers(0, 7),
    ),
    max_size=60,
)  # fmt: skip


def by_all(table: list[Flow]) -> list[tuple[int, ...]]:
    return sorted(tuple(flow.values()) for flow in table)


@settings(max_examples=60, deadline=None)
@given(PACKETS, st.lists(st.integers(0, 60), max_size=4), st.integers(1, 4))
def test_flows_are_what_is_documented(packets: list[Flow], cuts: list[int], seconds: int) -> None:
    """In whatever batches the packets come."""
    aggregator, made = Aggregator(seconds), list[Flow]()
    edges = [0, *sorted(cuts), len(packets)]
    for first, end in itertools.pairwise(edges):
        made += flows(aggregator.add(columns(packets[first:end]).reshape(len(COLUMNS), -1)))
    made += flows(aggregator.rest())
    expected = one_by_one(packets, seconds * 10**6)
    assert by_all(made) == by_all([{name: flow[name] for name in COLUMNS} for flow in expected])


@pytest.mark.parametrize("batch", [7, 100, 1000])
def test_too_many_open_flows_are_closed_early(batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(aggregate, "OPEN", 64)
    rng = np.random.default_rng(0)
    table = np.full((len(COLUMNS), 1000), -1)
    values = dict.fromkeys(COLUMNS, 1) | {"ts": np.arange(1000) * 10**5, "src": rng.integers(0, 200, 1000)}
    for name, value in values.items():
        table[COLUMNS.index(name)] = value
    made = {}
    for size in (batch, 1):
        aggregator, parts = Aggregator(5), []
        for first in range(0, 1000, size):
            parts.append(aggregator.add(table[:, first : first + size]))
            assert len(aggregator._table) <= 2 * 64  # what the memory is reckoned by
        made[size] = np.concatenate([*parts, aggregator.rest()], axis=1)
        assert made[size][COLUMNS.index("packets")].sum() == 1000
        assert made[size].shape[1] < 900
    assert (made[batch] == made[1]).all()


def test_retransmissions_are_one_flow() -> None:
    data = ipv4(tcp(dst_port=23, flags=2)), ipv4(tcp(dst_port=23, flags=16)), ipv4(icmp(8), proto=1)
    order = [(0, 0), (1, 0), (3, 1), (4, 2), (59.999999, 0), (60, 0), (64, 2), (300, 0)]
    packets = [Packet(int((T0 + s) * 10**6) * 1000, data[k]) for s, k in order]
    rows = Result(pcap(packets), aggregate="60s").rows
    rows.sort(key=lambda row: (row["proto"], row["ts"]))
    seen = [(r["proto"], (r["ts"] - T0 * 10**6) / 1e6, r["packets"], r["size"], r["tcp_flags"]) for r in rows]
    assert seen == [
        (1, 4, 1, 28, None),
        (1, 64, 1, 28, None),
        (6, 0, 4, 160, 18),
        (6, 60, 1, 40, 2),
        (6, 300, 1, 40, 2),
    ]


def test_damage_keeps_the_open_flows() -> None:
    result = Result(pcap([Packet(T0 * 10**9, ipv4(tcp()))]) + b"?", aggregate=60)
    assert result.error is not None
    assert result.flows.num_rows == 1
