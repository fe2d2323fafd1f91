"""Tables of flows: every form a value may take, every way it may be wrong, and no row unaccounted for."""

from __future__ import annotations

import io
import ipaddress
import os
import struct
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from zoneinfo import ZoneInfo

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rayscan import schema
from rayscan.captures.addresses import address
from rayscan.captures.columns import BATCH, Batch, Reject, merge_rejects, read_csv, read_parquet, resolve
from rayscan.captures.duplicates import Seen
from rayscan.captures.fingerprints import fingerprints
from rayscan.captures.times import Clock, time
from rayscan.captures.values import Field, bounded, protocol, tcp_flags
from rayscan.config import CapturesConfig
from rayscan.errors import ConfigError, FormatError, SchemaError

T0 = datetime(2024, 3, 1, 12, tzinfo=UTC)
T0_US = 1_709_294_400_000_000
WIDE = Clock("s", "UTC", -(2**62), 2**62)


def capture(**columns: object) -> pa.Table:
    """A good table of three flows, with columns replaced (None: left out) or added."""
    good: dict[str, object] = {
        "ts": pa.array([T0_US, T0_US + 1, T0_US + 2]).cast(schema.TIME),
        "src": pa.array([1, 2, 3], pa.uint32()),
        "dst": pa.array([7, 8, 9], pa.uint32()),
        "dst_port": pa.array([22, 23, 80], pa.uint16()),
        "proto": pa.array([6, 6, 17], pa.uint8()),
    }
    return pa.table({name: values for name, values in (good | columns).items() if values is not None})


def parquet(table: pa.Table, **options: object) -> io.BytesIO:
    file = io.BytesIO()
    pq.write_table(table, file, **options)
    file.seek(0)
    return file


def read(file: io.BytesIO, batch_rows: int = 1000, **settings: object) -> Batch:
    """All of a Parquet or CSV file as one batch."""
    reader = read_parquet if file.getvalue().startswith(b"PAR1") else read_csv
    return joined(list(reader(file, "some.file", CapturesConfig(**settings), batch_rows)))


def joined(batches: list[Batch]) -> Batch:
    flows = pa.concat_tables([BATCH.empty_table(), *(batch.flows for batch in batches)])
    rejects = merge_rejects(reject for batch in batches for reject in batch.rejects)
    return Batch(flows, rejects, sum(batch.duplicates for batch in batches))


def read_table(table: pa.Table, **settings: object) -> Batch:
    return read(parquet(table), **settings)


def csv(text: str) -> io.BytesIO:
    return io.BytesIO(text.encode())


def ts_us(batch: Batch) -> list[int]:
    return batch.flows["ts"].cast(pa.int64()).to_pylist()


def result(field: Field) -> list[object]:
    """Each value, None where it is missing, the reason where it has a fault."""
    out: list[object] = field.values.tolist()
    for row in np.flatnonzero(field.missing):
        out[row] = None
    for reason, rows in field.faults.items():
        for row in np.flatnonzero(rows):
            assert out[row] is not None
            out[row] = reason
    return out


# ---------------------------------------------------------------------------------------------
# Values
# ---------------------------------------------------------------------------------------------


DIGITS = st.text("0123456789. x", max_size=16)
QUADS = st.builds(lambda v: str(ipaddress.ip_address(v)), st.integers(0, 2**32 - 1))


@settings(max_examples=80, deadline=None)
@given(st.lists(QUADS | DIGITS | st.none(), max_size=30), st.integers(0, 3))
def test_dotted_addresses_agree_with_the_standard_library(texts: list[str | None], skip: int) -> None:
    array = pa.array(texts, pa.string()).slice(skip)  # slices have an offset into the buffers
    for text, got in zip(array.to_pylist(), result(address(array)), strict=True):
        if not (text or "").strip():
            assert got is None
        elif text.count(".") > 1 or "x" in text or " " in text.strip():
            try:
                assert got == int(ipaddress.IPv4Address(text.strip()))
            except ipaddress.AddressValueError:
                assert got == "is not IPv4"


ADDRESSES = ["192.0.2.1", " 192.0.2.1 ", "3221225985", "3221225985.0", "::ffff:192.0.2.1", "::FFFF:192.0.2.1"]
NOT_ADDRESSES = [
    "192.0.2", "192.0.2.1.5", "192.0.2.256", "192.0.2.01", "192.0.2.", ".192.0.2.1", "1..2.3", "1.2.3.x",
    "4294967296", "-5", "host", "1.2.3.4/32", "00:11:22:33:44:55", "1111.2.3.4", "0x7f.0.0.1", "٣.1.1.1",
]  # fmt: skip


def test_addresses_as_text() -> None:
    assert result(address(pa.array(ADDRESSES))) == [3_221_225_985] * len(ADDRESSES)
    assert result(address(pa.array(NOT_ADDRESSES))) == ["is not IPv4"] * len(NOT_ADDRESSES)
    ipv6 = ["2001:db8::1", "::1", "fe80::1%eth0", "2001:0db8:0:0:0:0:0:1"]
    assert result(address(pa.array(ipv6))) == ["is IPv6"] * len(ipv6)
    assert result(address(pa.array(["", "-", None, "NULL"]))) == [None] * 4
    assert result(address(pa.array(["0.0.0.0", "255.255.255.255", "1.20.103.4"]))) == [
        0,
        2**32 - 1,
        18_114_308,
    ]


@pytest.mark.parametrize(
    "array",
    [
        pa.array([3_221_225_985, None], pa.uint32()),
        pa.array([3_221_225_985, None], pa.int64()),
        pa.array([3_221_225_985 - 2**32, None], pa.int32()),  # two's complement
        pa.array([3_221_225_985.0, None], pa.float64()),
        pa.array([Decimal(3_221_225_985), None]),
        pa.array([bytes([192, 0, 2, 1]), None], pa.binary(4)),
        pa.array([bytes([192, 0, 2, 1]), None], pa.binary()),
        pa.array([bytes([192, 0, 2, 1]), None], pa.large_binary()),
        pa.array([bytes(10) + b"\xff\xff" + bytes([192, 0, 2, 1]), None], pa.binary(16)),
        pa.array([b"192.0.2.1", None], pa.binary()),
        pa.array(["192.0.2.1", None], pa.large_string()),
        pa.array(["192.0.2.1", None], pa.string_view()),
        pa.array(["192.0.2.1", None]).dictionary_encode(),
    ],
    ids=lambda array: str(array.type),
)
def test_addresses_of_every_type(array: pa.Array) -> None:
    assert result(address(array)) == [3_221_225_985, None]


def test_addresses_that_are_none() -> None:
    assert result(address(pa.array([-1, 2**32], pa.int64()))) == ["is not IPv4"] * 2
    assert result(address(pa.array([2**64 - 1], pa.uint64()))) == ["is not IPv4"]
    assert result(address(pa.array([bytes(16), b"\x20\x01" + bytes(14)], pa.binary(16)))) == ["is IPv6"] * 2
    assert result(address(pa.array([b"\xff\xfe\xfd", b""], pa.binary()))) == ["is not IPv4", None]


def test_protocols() -> None:
    names = ["tcp", "UDP", " Icmp ", "6", "17.0", "0x2f", "sctp", "256", "-1", "nonsense", "", None]
    expect = [6, 17, 1, 6, 17, 47, 132, "unreadable", "unreadable", "unreadable", None, None]
    assert result(protocol(pa.array(names))) == expect
    numbers = protocol(pa.array([0, 255, 256, -1, None], pa.int32()))
    assert result(numbers) == [0, 255, "above 255", "below 0", None]


def test_tcp_flags() -> None:
    texts = [
        "S",
        "SA",
        "SYN",
        "SYN ACK",
        "SYN|ACK",
        "ACK|RST|FIN",
        ".A..S.",
        "CEUAPRSF",
        "syn,ack",
        "0x12",
        "18",
        "0",
    ]
    assert result(tcp_flags(pa.array(texts))) == [2, 18, 2, 18, 18, 21, 18, 255, 18, 18, 18, 0]
    assert result(tcp_flags(pa.array(["SYNC?", "256", "1.5", ""]))) == ["unreadable"] * 3 + [None]
    assert result(tcp_flags(pa.array([2, 256], pa.int16()))) == [2, "above 255"]


def test_whole_numbers() -> None:
    texts = [
        "443",
        " 443",
        "443.0",
        "+443",
        "443.5",
        "0x1bb",
        "1e2",
        "inf",
        "99999999999999999999",
        "65536",
        "-1",
    ]
    bad = ["unreadable", "unreadable"]
    got = result(bounded(pa.array(texts), 0, 65_535))
    assert got == [443, 443, 443, 443, "unreadable", 443, 100, *bad, "above 65535", "below 0"]
    floats = bounded(pa.array([443.0, 443.5, float("nan"), float("inf"), 1e300, None]), 0, 65_535)
    assert result(floats) == [443, "unreadable", None, "unreadable", "unreadable", None]
    assert result(bounded(pa.array([True, None]), 0, 1)) == [1, None]
    assert result(bounded(pa.nulls(2), 0, 1)) == [None, None]
    with pytest.raises(TypeError):
        bounded(pa.array([], pa.list_(pa.int8())), 0, 1)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.datetimes(datetime(1, 1, 3), datetime(9999, 12, 29)), max_size=10),
    st.integers(-14 * 60, 14 * 60),
    st.sampled_from(["T", " "]),
    st.sampled_from(["auto", "microseconds", "milliseconds"]),
)
def test_iso_times_agree_with_the_standard_library(
    times: list[datetime], offset_min: int, separator: str, digits: str
) -> None:
    sign, (hours, minutes) = "-" if offset_min < 0 else "+", divmod(abs(offset_min), 60)
    texts = [t.isoformat(separator, digits) + f"{sign}{hours:02}:{minutes:02}" for t in times]
    epoch, us = datetime(1970, 1, 1, tzinfo=UTC), timedelta(microseconds=1)
    expect = [(datetime.fromisoformat(text) - epoch) // us for text in texts]
    assert result(time(pa.array(texts, pa.string()), WIDE)) == expect


NOON = [
    "2024-03-01T12:00:00Z", "2024-03-01 12:00:00+00:00", "2024/03/01 12:00:00", "2024-03-01 12:00:00.0000",
    " 1709294400 ", "2024-03-01T12:00:00.000000999Z", "2024-03-01 12:00:00 UTC", "2024-03-01 12:00:00 +0000",
    "2024-03-01T14:30:00+0230", "2024-03-01T04:00:00-08", "2024-03-01t11:59:60z", "1709294400.0",
    "1709294400.0000001", "2024-03-01 12:00:00,000",
]  # fmt: skip
NO_TIMES = [
    "2024-03-01", "2024-03-01 12:00", "2024-13-01 12:00:00", "2023-02-29 12:00:00", "2024-03-01 24:00:00",
    "2024-03-01 12:61:00", "2024-03-01 12:00:00.", "2024-03-01 12:00:00.1234567890",
    "2024-03-01 12:00:00 CET",
    "2024-03-01 12:00:00+25:00", "2024-03-01 12:00:00+1", "2024-03-01 12:00:00+01:0x",
    "2024-03-01 12:00:00+01:000",
    "2024-03/01 12:00:00", "20a4-03-01 12:00:00", "now", "inf", "2024-03-01 12:00:00ZZ",
]  # fmt: skip


def test_times_as_text() -> None:
    assert result(time(pa.array(NOON), WIDE)) == [T0_US] * len(NOON)
    assert result(time(pa.array(NO_TIMES), WIDE)) == ["unreadable"] * len(NO_TIMES)
    assert result(time(pa.array(["", None, "-"]), WIDE)) == [None] * 3
    assert result(time(pa.array(["2024-02-29 00:00:00.25"]), WIDE)) == [1_709_164_800_250_000]


@pytest.mark.parametrize(
    ("unit", "values"),
    [
        ("s", pa.array([1_709_294_400], pa.int64())),
        ("s", pa.array([1_709_294_400], pa.uint32())),
        ("s", pa.array([1_709_294_400.0])),
        ("s", pa.array([Decimal("1709294400.000000")])),
        ("ms", pa.array([1_709_294_400_000])),
        ("us", pa.array([T0_US])),
        ("ns", pa.array([T0_US * 1000 + 999])),  # floored
        ("ns", pa.array([str(T0_US * 1000 + 999)])),
    ],
)
def test_epoch_times(unit: str, values: pa.Array) -> None:
    assert result(time(values, Clock(unit, None, 0, 2**62))) == [T0_US]


def test_fractions_of_a_second_are_what_was_written() -> None:
    written = [1_634_159_075_307_000, 1_634_159_075_307_123]
    for array in (
        pa.array([1634159075.307, 1634159075.307123]),
        pa.array(["1634159075.307", "1634159075.307123"]),
    ):
        assert result(time(array, WIDE)) == written
    before_1970 = pa.array([-1, -1001]).cast(pa.timestamp("ns", "UTC"))
    assert result(time(before_1970, WIDE)) == [-1, -2]


@pytest.mark.parametrize("unit", ["s", "ms", "us", "ns"])
@pytest.mark.parametrize("zone", ["UTC", "Europe/Berlin", "+05:00"])
def test_timestamps_of_every_unit(unit: str, zone: str) -> None:
    array = (
        pa.array([T0_US, None])
        .cast(pa.timestamp("us"))
        .cast(pa.timestamp(unit))
        .view(pa.timestamp(unit, zone))
    )
    assert result(time(array, WIDE)) == [T0_US, None]


def test_local_times() -> None:
    clock = Clock(None, "Europe/Berlin", 0, 2**62)
    local = ["2024-07-01 12:00:00", "2024-01-01 12:00:00", "2024-03-31 02:30:00", "2024-10-27 02:30:00"]
    naive = pa.array(local).cast(pa.timestamp("us"))
    expect: list[object] = [
        int(
            datetime.fromisoformat(text).replace(tzinfo=ZoneInfo("Europe/Berlin"), fold=0).timestamp() * 10**6
        )
        for text in local
    ]
    expect[2] = "does not exist in captures.time_zone"
    assert result(time(naive, clock)) == expect
    assert result(time(pa.array(local), clock)) == expect
    mixed = pa.array(["2024-07-01 12:00:00", "2024-07-01 12:00:00Z"])
    assert result(time(mixed, clock)) == [expect[0], expect[0] + 2 * 3600 * 10**6]


def test_absurd_times() -> None:
    clock = Clock("s", "Europe/Berlin", 0, T0_US)
    early, late = "before captures.earliest", "after captures.latest"
    assert result(time(pa.array([2**63 - 1, -(2**63), 1_709_294_400]), clock)) == [late, early, late]
    assert result(time(pa.array([1e300, -1e300, float("nan")]), clock)) == [late, early, None]
    absurd = pa.array([2**63 - 1, -(2**63)]).view(pa.timestamp("s"))
    assert result(time(absurd, clock)) == [late, early]
    assert result(time(pa.array(["9999-12-31 23:59:59", "0000-01-01 00:00:00"]), clock)) == [late, early]
    with pytest.raises(ConfigError, match="unknown zone 'Mars/Olympus'; give an IANA name"):
        Clock(None, "Mars/Olympus", 0, 1)


# ---------------------------------------------------------------------------------------------
# Which column is which
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "header",
    [
        "ts,src,dst,dst_port,proto",
        "Timestamp,Source IP,Destination-IP,Destination Port,Protocol",
        "StartTime,SrcAddr,DstAddr,Dport,Proto",
        "ts,id.orig_h,id.resp_h,id.resp_p,proto",
        "frame.time_epoch,ip.src,ip.dst,tcp.dstport,ip.proto",
        "@timestamp,src_ip,dest_ip,dest_port,proto",
    ],
)
def test_common_names(header: str) -> None:
    names = header.split(",")
    assert resolve(names, {}, "f") == {"ts": 0, "src": 1, "dst": 2, "dst_port": 3, "proto": 4}


def test_which_column_wins() -> None:
    names = ["time", "Source", "SRC_IP", "src_ip", "port", "dport", "proto", "service", "other"]
    found = resolve(names, {}, "f")
    assert found == {"ts": 0, "src": 2, "dst_port": 5, "proto": 6}
    assert resolve(names, {"src": "Source", "dst_port": "OTHER"}, "f") == found | {"src": 1, "dst_port": 8}


def test_columns_that_are_not_there() -> None:
    names = ["when", "src", "port"]
    with pytest.raises(
        SchemaError, match=r"f\.csv: no column found for ts, proto among when, src, port"
    ) as error:
        resolve(names, {}, "f.csv")
    assert "ts: tried ts, timestamp, time" in str(error.value)
    assert "captures: {columns: {ts: NAME, proto: NAME}}" in str(error.value)
    with pytest.raises(
        SchemaError, match=r"f\.csv: captures\.columns\.ts is 'wen', but the columns are when, src"
    ):
        resolve(names, {"ts": "wen"}, "f.csv")
    with pytest.raises(ConfigError, match="unknown column 'dst_prot'; did you mean dst_port"):
        resolve(names, {"dst_prot": "port"}, "f.csv")


def test_a_map_in_use() -> None:
    table = capture().rename_columns(["When", "from", "to", "p", "proto"])
    batch = read_table(table, columns={"ts": "when", "src": "from", "dst_port": "p"})
    assert batch.flows["src"].to_pylist() == [1, 2, 3]
    assert batch.flows["dst"].null_count == 3


def test_service_stands_in_for_port_and_protocol() -> None:
    service = pa.array([6 * 65_536 + 23, 17 * 65_536 + 53, 256 * 65_536])
    batch = read_table(capture(dst_port=None, proto=None, service=service))
    assert batch.flows["proto"].to_pylist() == [6, 17]
    assert batch.flows["dst_port"].to_pylist() == [23, 53]
    assert batch.rejects == [Reject("proto unreadable in service", 2, 1)]
    assert read_table(capture(proto=None, service=service)).flows["dst_port"].to_pylist() == [22, 23]
    assert read_table(capture(service=["ssh", "http", "dns"])).rejects == []  # not needed, not looked at
    with pytest.raises(SchemaError, match=r"column 'service' \(service\) \('ssh'\) unreadable"):
        read_table(capture(dst_port=None, service=["ssh", "http", "dns"]))


# ---------------------------------------------------------------------------------------------
# Rows
# ---------------------------------------------------------------------------------------------


def test_a_good_table() -> None:
    batch = read_table(capture(), sensor="north")
    assert batch.flows.schema.equals(BATCH)
    assert BATCH.names == [name for name in schema.FLOWS.names if name != "capture"]
    assert ts_us(batch) == [T0_US, T0_US + 1, T0_US + 2]
    assert batch.flows["sensor"].to_pylist() == ["north"] * 3
    assert batch.flows["fingerprint"].null_count == 3
    assert (batch.rejects, batch.duplicates) == ([], 0)
    named = read_table(capture(sensor=["a", None, "b"]), sensor="c")
    assert named.flows["sensor"].to_pylist() == ["a", "c", "b"]


@pytest.mark.parametrize(
    ("column", "values", "expect"),
    [
        ("dst_port", pa.array([22, 65_536, -1]), {"dst_port below 0": 2, "dst_port above 65535": 1}),
        ("dst_port", pa.array([22, 80, None]), {"dst_port missing": 2}),
        ("dst_port", ["22", "x", "80"], {"dst_port unreadable": 1}),
        ("ts", pa.array([T0_US, None, T0_US]).cast(schema.TIME), {"ts missing": 1}),
        ("ts", ["2024-03-01T12:00:00Z", "yesterday", ""], {"ts missing": 2, "ts unreadable": 1}),
        ("ts", pa.array([T0_US, -1, 2**62]).cast(schema.TIME),
         {"ts before captures.earliest": 1, "ts after captures.latest": 2}),
        ("src", ["1.2.3.4", "::1", "x"], {"src is not IPv4": 2, "IPv6 is not supported yet": 1}),
        ("src", pa.array([1, None, 2**32]), {"src missing": 1, "src is not IPv4": 2}),
        ("proto", ["tcp", "tpc", ""], {"proto missing": 2, "proto unreadable": 1}),
        ("proto", pa.array([6, 300, -1]), {"proto below 0": 2, "proto above 255": 1}),
    ],
)  # fmt: skip
def test_a_bad_required_value_costs_its_row(column: str, values: object, expect: dict[str, int]) -> None:
    batch = read_table(capture(**{column: values}, size=[0, 1, 2]))
    kinds = {"IPv6 is not supported yet": "left out"}
    wanted = [Reject(reason, row, 1, kinds.get(reason, "rows")) for reason, row in expect.items()]
    assert batch.rejects == wanted
    assert batch.flows["size"].to_pylist() == [row for row in range(3) if row not in expect.values()]


def test_a_row_is_counted_once_however_bad() -> None:
    table = capture(src=["x", "1.2.3.4", "y"], dst_port=pa.array([-1, 22, 70_000]), ttl=["q", "q", "64"])
    batch = read_table(table)
    assert batch.rejects == [
        Reject("src is not IPv4", 0, 2),
        Reject("ttl unreadable (kept as missing)", 1, 1, "values"),
    ]
    assert batch.flows.num_rows == 1


@pytest.mark.parametrize(
    ("column", "values", "expect", "bad"),
    [
        ("dst", ["1.2.3.4", "::1", "x"], [16_909_060, None, None], 2),
        ("src_port", pa.array([0, 65_536, 65_535]), [0, None, 65_535], 1),
        ("ttl", ["64", "256", ""], [64, None, None], 1),
        ("size", pa.array([40.0, -1.0, float("nan")]), [40, None, None], 1),
        ("packets", pa.array([1, -1, None]), [1, None, None], 1),
        ("tcp_flags", ["SYN", "?", None], [2, None, None], 1),
        ("icmp_code", pa.array([0, 256, 255]), [0, None, 255], 1),
        ("fingerprint", pa.array([7, 8, None]), [7, None, None], 1),
    ],
)
def test_a_bad_optional_value_becomes_null(
    column: str, values: object, expect: list[object], bad: int
) -> None:
    batch = read_table(capture(**{column: values}))
    assert batch.flows[column].to_pylist() == expect
    assert batch.rejects == [Reject(f"{column} unreadable (kept as missing)", 1, bad, "values")]


def test_protocols_without_ports_need_none() -> None:
    table = capture(dst_port=pa.array([None, None, 8], pa.int32()), proto=["gre", "tcp", "icmp"])
    batch = read_table(table)
    assert batch.flows["dst_port"].to_pylist() == [None, 8]
    assert batch.rejects == [Reject("dst_port missing", 1, 1)]


def test_labels_are_text() -> None:
    assert read_table(capture(label=[" a ", "", None])).flows["label"].to_pylist() == ["a", None, None]
    assert read_table(capture(label=pa.array([5, 7, None]))).flows["label"].to_pylist() == ["5", "7", None]


def test_labels_that_name_nobody_are_no_labels() -> None:
    for label, setting in (
        (["Unknown", "censys", "none"], {}),
        (pa.array([0, 3, None]), {}),
        (["nobody", "unknown", None], {"no_label": ("NOBODY",)}),
    ):
        found = read_table(capture(label=label), **setting).flows["label"].to_pylist()
        assert [name is None for name in found] == [True, False, True]


def test_text_that_is_not_utf8_costs_only_itself() -> None:
    label = pa.array([b"a\xff", b"b", b"c"]).view(pa.string())
    src = pa.array([b"1.2.3.4", b"1.2.3.\xff", b"1.2.3.5"]).view(pa.string())
    batch = read_table(capture(label=label, src=src))
    assert batch.flows["label"].to_pylist() == ["a\ufffd", "c"]
    assert batch.rejects == [Reject("src is not IPv4", 1, 1)]


# ---------------------------------------------------------------------------------------------
# Settings and types, told before or at the first row
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (capture(ts=pa.array([1, 2, 3])), r"column 'ts' \(ts\) holds numbers: set captures.time_unit"),
        (capture(ts=["1", "2", "3"]), r"\('1'\) is a number: set captures.time_unit"),
        (capture(ts=["?", "2", "3"]), r"\('2'\) is a number: set captures.time_unit"),
        (capture(ts=pa.array([1, 2, 3]).cast(pa.timestamp("s"))), "no time zone: set captures.time_zone"),
        (capture(ts=["2024-01-01 00:00:00"] * 3), r"without a zone: set captures.time_zone"),
        (capture(src=[[1], [2], [3]]), r"some\.file: column 'src' \(src\) has type list"),
        (capture(ts=[True, False, True]), r"column 'ts' \(ts\) has type bool; a time is needed"),
        (capture(label=[{"a": 1}] * 3), r"column 'label' \(label\) has type struct"),
        (capture(src=None), "no column found for src"),
    ],
)
def test_files_that_do_not_fit_the_settings(table: pa.Table, message: str) -> None:
    with pytest.raises(SchemaError, match=message):
        read_table(table)


def test_a_number_among_times_costs_its_row() -> None:
    batch = read_table(capture(ts=["2024-03-01T12:00:00Z", "17", "2024-03-01T12:00:00"]))
    assert batch.flows.num_rows == 1
    assert {(r.reason, r.offset) for r in batch.rejects} == {
        ("ts is a number: set captures.time_unit", 1),
        ("ts without a zone: set captures.time_zone", 2),
    }


def test_an_unknown_zone() -> None:
    with pytest.raises(ConfigError, match="Mars"):
        read_table(capture(), time_zone="Mars/Olympus")


# ---------------------------------------------------------------------------------------------
# Duplicates and fingerprints
# ---------------------------------------------------------------------------------------------


def test_duplicates_are_counted_and_dropped_on_demand() -> None:
    table = capture()
    table = pa.concat_tables([table, table.slice(1, 1), capture(dst=pa.array([7, 8, 0], pa.uint32()))])
    for batch_rows in (1, 2, 100):
        kept = read(parquet(table), batch_rows)
        assert (kept.flows.num_rows, kept.duplicates, kept.rejects) == (7, 3, [])
        dropped = read(parquet(table), batch_rows, duplicates="drop")
        assert (dropped.flows.num_rows, dropped.duplicates) == (4, 3)
        assert dropped.rejects == [Reject("duplicate row", 3, 3, "left out")]
        assert dropped.flows["dst"].to_pylist() == [7, 8, 9, 0]


def test_rows_that_differ_in_any_recognised_column_are_no_duplicates() -> None:
    same = {name: capture()[name].take([0, 0, 0]) for name in ("ts", "src", "dst", "dst_port", "proto")}
    assert read_table(capture(**same)).duplicates == 2
    assert read_table(capture(**same, ttl=pa.array([1, 2, None]))).duplicates == 0
    assert read_table(capture(**same, tcp_seq=pa.array([1, 2, 3]))).duplicates == 0
    assert read_table(capture(**same, comment=["a", "b", "c"])).duplicates == 2


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.integers(0, 12) | st.none(), max_size=30), max_size=8))
def test_seen_agrees_with_a_set(batches: list[list[int | None]]) -> None:
    seen, known = Seen(), set()
    for batch in batches:
        expect = []
        for value in batch:
            expect.append(value in known)
            known.add(value)
        assert seen.repeats(pa.table({"a": pa.array(batch, pa.int64())})).tolist() == expect


def test_fingerprints_by_hand() -> None:
    proto = np.array([6, 6, 6, 17, 6, 6])
    dst = np.array([0x01020304, 5, 9, 9, -1, 9])
    port = np.array([23, 80, 80, 80, 80, 80])
    seq = np.array([0x00050006, 5, -1, 9, 9, -1])
    ip_id = np.array([(0x0304 ^ 23 ^ 0x0006), 54_321, 54_321, 1, 54_321, -1])
    bits, known = fingerprints(proto, dst, port, ip_id, seq)
    assert bits.tolist()[:5] == [2, 1 | 4, 1, 0, 1]
    assert known.tolist() == [True] * 5 + [False]


def test_fingerprints_of_a_table() -> None:
    batch = read_table(capture(ip_id=pa.array([54_321, 1, None]), tcp_seq=pa.array([7, 1, 1])))
    assert batch.flows["fingerprint"].to_pylist() == [1 | 4, 0, None]  # the third is UDP without an IP id
    assert read_table(capture(seq=[7, 8, 9])).flows["fingerprint"].null_count == 3  # a counter, of Argus
    flags = capture(zmap=[True, False, None], is_mirai=pa.array([1, 0, None]))
    assert read_table(flags).flows["fingerprint"].to_pylist() == [1 | 4, 0, None]


# ---------------------------------------------------------------------------------------------
# Delimited text
# ---------------------------------------------------------------------------------------------

HEAD = "ts,src,dst_port,proto,label\n"
ROW = "2024-03-01T12:00:00Z,1.2.3.4,23,tcp,x\n"


@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
@pytest.mark.parametrize(("prefix", "newline"), [("", "\n"), ("\ufeff", "\r\n"), ("\n\n", "\n")])
def test_delimiters_and_line_ends(delimiter: str, prefix: str, newline: str) -> None:
    text = prefix + (HEAD + ROW + "\n" + ROW).replace(",", delimiter).replace("\n", newline)
    batch = read(csv(text[: -len(newline)]))
    assert batch.flows.num_rows == 2
    assert batch.rejects == []
    assert ts_us(batch) == [T0_US, T0_US]
    assert batch.flows["label"].to_pylist() == ["x", "x"]


def test_bad_lines_cost_themselves() -> None:
    short, long, wrong = "2024-03-01T12:00:00Z,1.2.3.4\n", "a,b,c,d,e,f\n", ROW.replace("23", "x")
    lines = [ROW, short, ROW, long, wrong, "\n", ROW, '2024,"open,1,2,3\n', ROW, "garbage\n", ROW]
    text = HEAD + "".join(lines)
    for batch_rows in (1, 2, 1000):
        batch = read(csv(text), batch_rows)
        assert batch.flows.num_rows == 5
        assert sorted(batch.rejects, key=lambda r: r.reason) == [
            Reject("dst_port unreadable", 4, 1),
            Reject("wrong number of fields", 1, 4),
        ]


@pytest.mark.parametrize(
    "odd", ['a"b,"c,1,2,3', '"', '1,"2,3,4', '"a"b,2,3,4,5"', 'x,"y\x0b",3', "\x85,\u2028"]
)
def test_quotes_do_not_swallow_lines(odd: str) -> None:
    quoted = '"2024-03-01T12:00:00Z","1.2.3.4","23","tcp","a, ""b"""\n'
    batch = read(csv(HEAD + quoted + odd + "\n" + quoted + quoted))
    assert batch.flows["label"].to_pylist() == ['a, "b"'] * 3
    assert [(r.offset, r.count, r.rows_lost) for r in batch.rejects] == [(1, 1, True)]


LINE = st.text(st.characters(exclude_characters="\n\r", codec="utf-8"), max_size=30) | st.just(ROW.strip())


@settings(max_examples=80, deadline=None)
@given(st.lists(LINE, max_size=12), st.sampled_from([1, 3, 100]))
def test_every_line_is_a_row_or_a_reject(lines: list[str], batch_rows: int) -> None:
    batch = read(csv(HEAD + "".join(line + "\n" for line in lines)), batch_rows)
    assert batch.flows.num_rows == lines.count(ROW.strip())
    lost = sum(reject.count for reject in batch.rejects if reject.rows_lost)
    assert batch.flows.num_rows + lost == sum(line != "" for line in lines)


def test_bytes_that_are_no_text() -> None:
    row = ROW.encode()
    rows = [HEAD.encode(), row, row.replace(b"x", b"\xff\xfe"), row.replace(b"1.2.3.4", b"\xff"), row]
    batch = read(io.BytesIO(b"".join(rows)))
    assert batch.flows["label"].to_pylist() == ["x", "\ufffd\ufffd", "x"]
    assert batch.rejects == [Reject("src is not IPv4", 2, 1)]


def test_the_layout_of_published_sequence_experiments() -> None:
    """Integer microseconds, dotted addresses, port and protocol in one number, tools as flags."""
    text = (
        "timestamp,ip.src,ip.dst,service,ttl,zmap,mirai,asn\n"
        f"{T0_US},1.2.3.4,10.0.0.1,{6 * 65_536 + 23},64,false,True,1\n"
        f"{T0_US + 5},1.2.3.4,10.0.0.2,{17 * 65_536 + 53},63,1,0,1\n"
    )
    batch = read(csv(text), time_unit="us")
    assert batch.rejects == []
    assert ts_us(batch) == [T0_US, T0_US + 5]
    assert batch.flows.select(["src", "dst_port", "proto", "ttl", "fingerprint"]).to_pylist() == [
        {"src": 16_909_060, "dst_port": 23, "proto": 6, "ttl": 64, "fingerprint": 4},
        {"src": 16_909_060, "dst_port": 53, "proto": 17, "ttl": 63, "fingerprint": 1},
    ]


def test_a_header_is_required() -> None:
    with pytest.raises(FormatError, match="field 1 of the first line is a value; add a header") as error:
        read(csv(ROW))
    assert "1.2.3.4" in ROW and "1.2.3.4" not in str(error.value)  # addresses may have to stay hidden
    with pytest.raises(FormatError, match="no header line"):
        read(csv("\n \n"))
    with pytest.raises(FormatError, match="lines end with a carriage return alone"):
        read(csv((HEAD + ROW).replace("\n", "\r")))
    with pytest.raises(FormatError, match="the header line cannot be read: field larger"):
        read(csv("x" * 200_000 + "," + HEAD + ROW))
    assert read(csv(HEAD)).flows.num_rows == 0


def test_a_line_without_an_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rayscan.captures.delimited.MAX_LINE_BYTES", 1 << 17)
    batches = read_csv(csv(HEAD + ROW * 10 + "x" * (1 << 20)), "f.csv", CapturesConfig(), 5)
    first = next(batches)
    assert first.flows.num_rows == 5
    with pytest.raises(FormatError, match=r"f\.csv: a line is longer than"):
        list(batches)


def test_text_and_parquet_agree() -> None:
    rng = np.random.default_rng(3)
    n = 5000
    table = pa.table(
        {
            "ts": pa.array(T0_US + rng.integers(0, 10**12, n)).cast(schema.TIME),
            "src": pa.array(rng.integers(0, 2**32, n), pa.int64()),
            "dst_port": pa.array(rng.integers(0, 65_536, n), pa.int32()),
            "proto": pa.array(rng.choice([1, 6, 17], n), pa.int16()),
            "size": pa.array(rng.integers(0, 2**40, n), pa.int64(), mask=rng.random(n) < 0.2),
        }
    )
    text = io.BytesIO()
    pl.from_arrow(table).with_columns(pl.col("ts").dt.strftime("%Y-%m-%dT%H:%M:%S%.6f%:z")).write_csv(text)
    text.seek(0)
    assert read(text, 700).flows.combine_chunks().equals(read(parquet(table), 900).flows.combine_chunks())


# ---------------------------------------------------------------------------------------------
# Damaged Parquet
# ---------------------------------------------------------------------------------------------


def groups(n: int, **options: object) -> tuple[pa.Table, bytearray, pq.FileMetaData]:
    """A table of n rows in row groups of 100, its bytes and its footer."""
    rows = pa.array(range(n))
    table = pa.table(
        {
            "ts": pa.compute.add(rows, T0_US).cast(schema.TIME),
            "src": rows,
            "dst_port": pa.array([23] * n, pa.int32()),
            "proto": pa.array([6] * n, pa.int16()),
        }
    )
    file = parquet(table, row_group_size=100, use_dictionary=False, compression="zstd", **options)
    return table, bytearray(file.getvalue()), pq.read_metadata(file)


@pytest.mark.parametrize("checksum", [True, False])
def test_a_damaged_page_costs_its_row_group(tmp_path: Path, checksum: bool) -> None:
    _, data, footer = groups(300, write_page_checksum=checksum)
    column = footer.row_group(1).column(1)
    middle = column.data_page_offset + column.total_compressed_size // 2
    for place in range(middle, middle + 40):
        data[place] ^= 0xFF
    path = tmp_path / "damaged.parquet"
    path.write_bytes(data)
    with path.open("rb") as file:
        batch = joined(list(read_parquet(file, path.name, CapturesConfig(), 1000)))
    assert batch.flows["src"].to_pylist() == [*range(100), *range(200, 300)]
    (reject,) = batch.rejects
    assert reject.reason.startswith("damaged: ")
    assert (reject.offset, reject.count, reject.rows_lost) == (100, 100, True)


def test_every_flipped_byte_is_noticed_or_harmless() -> None:
    """With page checksums no damage to a page goes unnoticed, and the rows always add up."""
    table, data, footer = groups(200, write_page_checksum=True)
    end = len(data) - 8 - struct.unpack("<I", data[-8:-4])[0]
    for place in range(4, end, 37):
        broken = bytearray(data)
        broken[place] ^= 0x55
        batch = read(io.BytesIO(broken), 30)
        lost = sum(reject.count for reject in batch.rejects)
        assert batch.flows.num_rows + lost == footer.num_rows
        if not lost:
            assert batch.flows["src"].to_pylist() == table["src"].to_pylist()


@pytest.mark.parametrize("keep", [0.3, 0.9, 0.999])
def test_a_truncated_file(keep: float) -> None:
    _, data, _ = groups(300)
    with pytest.raises(FormatError, match="damaged: Parquet footer"):
        read(io.BytesIO(data[: int(len(data) * keep)]))


class Unplugged(io.BytesIO):
    """Storage that goes away after `reads` reads."""

    reads = 10**9

    def read(self, size: int | None = -1, /) -> bytes:
        self.reads -= 1
        if self.reads < 0:
            raise TimeoutError("storage went away")
        return super().read(size)


def test_failing_storage_is_not_damage() -> None:
    _, data, _ = groups(300)
    file = Unplugged(bytes(data))
    batches = read_parquet(file, "f", CapturesConfig(), 1000)
    file.reads = 2
    with pytest.raises(OSError, match="storage went away"):
        list(batches)
    file.reads = 0
    with pytest.raises(OSError, match="storage went away"):
        read_parquet(file, "f", CapturesConfig(), 1000)


def test_a_table_that_expands_without_bound_is_refused() -> None:
    """Ten million rows of one flow are a file of some kilobytes."""
    n = 10_000_000
    one = capture().slice(0, 1)
    columns = [pa.repeat(one[name][0], n) for name in one.column_names]
    file = parquet(pa.table(columns, one.column_names), compression="zstd", row_group_size=n)
    assert len(file.getvalue()) < n // 50
    with pytest.raises(FormatError, match=r"expands more than 1000 times.*captures\.max_ratio"):
        next(read_parquet(file, "f", CapturesConfig(), 1000))
    with pytest.raises(FormatError, match=r"to more than 0\.3 GB.*captures\.max_gb"):
        next(read_parquet(file, "f", CapturesConfig(max_ratio=10**9, max_gb=0.3), 1000))
    batches = read_parquet(file, "f", CapturesConfig(max_ratio=10**9), 1000)
    assert next(batches).flows.num_rows == 1000


def test_batches_are_bounded() -> None:
    _, data, _ = groups(300)
    sizes = [b.flows.num_rows for b in read_parquet(io.BytesIO(data), "f", CapturesConfig(), 64)]
    assert sum(sizes) == 300
    assert max(sizes) <= 64
    text = csv(HEAD + ROW * 100)
    assert max(b.flows.num_rows for b in read_csv(text, "f", CapturesConfig(), 7)) <= 7


def test_odd_schemas() -> None:
    table = capture()
    twice = pa.Table.from_arrays([*table.columns, table["dst"]], names=[*table.column_names, "src"])
    assert read_table(twice).flows["src"].to_pylist() == [1, 2, 3]
    nested = capture(dst=None, src=None).append_column("id.orig_h", pa.array([4, 5, 6]))
    nested = nested.append_column("id", pa.array([{"orig_h": "x"}] * 3))
    assert read_table(nested).flows["src"].to_pylist() == [4, 5, 6]
    assert read_table(capture().slice(0, 0)).flows.num_rows == 0


def test_merge_rejects() -> None:
    parts = [Reject("a", 5, 1), Reject("b", 6, 2), Reject("a", 9, 3), Reject("a", 1, 1, "values")]
    assert merge_rejects(parts) == [Reject("a", 5, 4), Reject("b", 6, 2), Reject("a", 1, 1, "values")]


# ---------------------------------------------------------------------------------------------
# Real files
# ---------------------------------------------------------------------------------------------

real = pytest.mark.skipif("RAYSCAN_DATA" not in os.environ, reason="RAYSCAN_DATA is not set")


@real
@pytest.mark.data
@pytest.mark.parametrize(
    ("name", "rows", "duplicates"),
    [("marx", 451_581, 52_018), ("sotm34", 177_034, None), ("sg23", 414_357, None), ("tpot_uqo", 367_985, 0)],
)
def test_real_parquet(name: str, rows: int, duplicates: int | None) -> None:
    path = Path(os.environ["RAYSCAN_DATA"]) / "flows" / f"{name}.parquet"
    with path.open("rb") as file:
        batch = joined(list(read_parquet(file, name, CapturesConfig(), 100_000)))
    assert batch.flows.num_rows == rows
    assert batch.rejects == []
    assert duplicates is None or batch.duplicates == duplicates
    raw = pl.read_parquet(path)
    for ours, theirs in (("src", "src_ip"), ("dst", "dst_ip"), ("dst_port", "dst_port"), ("proto", "proto")):
        assert (batch.flows[ours].to_numpy() == raw[theirs].to_numpy()).all()


@real
@pytest.mark.data
def test_real_text() -> None:
    folder = Path(os.environ["RAYSCAN_DATA"]) / "captures" / "spoki"
    for path in sorted(folder.glob("*.csv")):
        with path.open("rb") as file:
            batch = joined(list(read_csv(file, path.name, CapturesConfig(time_unit="ms"), 1000)))
        raw = pl.read_csv(path, separator="|", infer_schema=False)
        assert batch.flows.num_rows == raw.height
        assert [str(ipaddress.ip_address(v)) for v in batch.flows["src"].to_pylist()] == raw[
            "saddr"
        ].to_list()
        assert [v // 1000 for v in ts_us(batch)] == raw["ts"].cast(pl.Int64).to_list()
        zmap = (raw["ipid"] == "54321").sum()
        assert sum(bits & 1 for bits in batch.flows["fingerprint"].to_pylist()) == zmap
