"""What comes from outside to inside, against `ipaddress`, address by address."""

from __future__ import annotations

import ipaddress

import pyarrow as pa
from hypothesis import given
from hypothesis import strategies as st

from rayscan.captures.columns import BATCH, Batch, Reject
from rayscan.captures.outside import RESERVED, Outside
from rayscan.config import CapturesConfig, load
from rayscan.schema import TIME


def number(text: str) -> int:
    return int(ipaddress.IPv4Address(text))


def batch(pairs: list[tuple[int, int | None]]) -> Batch:
    """Flows of these sources and destinations."""
    n = len(pairs)
    columns = {field.name: pa.nulls(n, field.type) for field in BATCH}
    columns |= {
        "ts": pa.array(range(n), TIME),
        "src": pa.array([src for src, _ in pairs], pa.int64()),
        "dst": pa.array([dst for _, dst in pairs], pa.int64()),
        "proto": pa.array([6] * n, pa.int16()),
    }
    return Batch(pa.table(columns, schema=BATCH), [Reject("before", 3, 1)], 2)


def test_each_reason_is_counted() -> None:
    texts = ["8.8.8.8", "10.1.2.3", "172.16.0.1", "172.32.0.1", "192.168.9.9", "10.0.0.1", "224.0.0.1"]
    found = Outside(CapturesConfig())(batch([(number(text), 1) for text in texts]))
    assert found.flows["src"].to_pylist() == [number("8.8.8.8"), number("172.32.0.1")]
    assert found.duplicates == 2
    assert [(reject.reason, reject.count) for reject in found.rejects] == [
        ("before", 1),
        ("source in 10.0.0.0/8, private (RFC 1918)", 2),
        ("source in 172.16.0.0/12, private (RFC 1918)", 1),
        ("source in 192.168.0.0/16, private (RFC 1918)", 1),
        ("source in 224.0.0.0/4, multicast (RFC 5771)", 1),
    ]
    assert all(reject.rows_lost for reject in found.rejects)


def test_the_telescope_keeps_what_goes_in() -> None:
    config = load(sets=["captures.telescope=[198.18.0.0/16, 9.9.9.0/24]", "captures.reserved=keep"], env={})
    inside, outside = number("198.18.3.4"), number("8.8.8.8")
    pairs = [(outside, inside), (outside, number("9.9.9.255")), (inside, outside), (inside, inside)]
    pairs += [(outside, outside), (number("10.0.0.1"), inside)]
    found = Outside(config.captures)(batch([*pairs, (outside, None)]))
    kept = [(outside, inside), (outside, number("9.9.9.255")), (number("10.0.0.1"), inside), (outside, None)]
    assert list(zip(found.flows["src"].to_pylist(), found.flows["dst"].to_pylist(), strict=True)) == kept
    assert [(reject.reason, reject.count) for reject in found.rejects[1:]] == [
        ("source in the telescope itself", 2),
        ("destination outside the telescope", 1),
    ]


OUTSIDE = Outside(CapturesConfig())


@given(st.lists(st.integers(0, 2**32 - 1), max_size=50))
def test_reserved_is_what_ipaddress_knows(sources: list[int]) -> None:
    nets = [ipaddress.IPv4Network(text) for text in RESERVED]
    edges = [int(end) + step for net in nets for end in (net[0], net[-1]) for step in (-1, 0, 1)]
    sources = [src for src in [*sources, *edges] if 0 <= src < 2**32]
    found = OUTSIDE(batch([(src, None) for src in sources]))
    kept = [src for src in sources if not any(ipaddress.IPv4Address(src) in net for net in nets)]
    assert found.flows["src"].to_pylist() == kept
    assert sum(reject.count for reject in found.rejects[1:]) == len(sources) - len(kept)
    for src in kept:  # Python's own registry agrees that these can be reached, but for what is deprecated
        address = ipaddress.IPv4Address(src)
        assert address.is_global or address in ipaddress.IPv4Network("192.0.0.0/8")


def test_nothing_is_copied_where_nothing_is_lost() -> None:
    full = batch([(number("8.8.8.8"), 1)])
    assert Outside(CapturesConfig())(full) is full
    empty = batch([])
    assert Outside(CapturesConfig(telescope=("198.18.0.0/16",)))(empty) is empty
