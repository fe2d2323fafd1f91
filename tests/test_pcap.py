"""pcap and pcapng: the columns that dpkt reads, of every link and clock, and what damage costs."""

from __future__ import annotations

import gzip
import io
import itertools
import random
import struct
from datetime import UTC, datetime
from fractions import Fraction
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from packet_files import (
    ARP,
    COOKED,
    COOKED2,
    ETHERNET,
    IP,
    IP6,
    LINKS,
    LOOP,
    NULL,
    RAW,
    T0,
    Packet,
    Row,
    block,
    enhanced,
    icmp,
    interface,
    ipv4,
    obsolete,
    on_link,
    pcap,
    pcapng,
    read_with_dpkt,
    row_of,
    section,
    some_packets,
    tcp,
    udp,
)

from rayscan.captures import pcap as pcap_module
from rayscan.captures.columns import BATCH, Batch, merge_rejects
from rayscan.captures.detect import read_capture
from rayscan.captures.records import CUT, DAMAGED
from rayscan.config import CapturesConfig
from rayscan.errors import FormatError
from rayscan.simulate import simulate_to


class Result:
    """What was read of a file, and how the reading ended."""

    def __init__(
        self, file: bytes | io.BufferedIOBase, batch_rows: int = 100_000, **settings: object
    ) -> None:
        self.batches: list[Batch] = []
        self.error: FormatError | None = None
        stream = io.BytesIO(file) if isinstance(file, bytes) else file
        try:
            self.format, batches = read_capture(stream, "f", CapturesConfig(**settings), batch_rows)  # type: ignore[arg-type,type-var]
            for batch in batches:
                assert batch.flows.schema == BATCH
                assert batch.flows.num_rows <= batch_rows
                self.batches.append(batch)
        except FormatError as error:
            self.error = error
        self.flows = pa.concat_tables([BATCH.empty_table(), *(b.flows for b in self.batches)])
        self.rejects = {r.reason: r for r in merge_rejects(r for b in self.batches for r in b.rejects)}
        self.counts = {reason: reject.count for reason, reject in self.rejects.items()}
        self.duplicates = sum(batch.duplicates for batch in self.batches)

    @property
    def rows(self) -> list[Row]:
        flows = self.flows.set_column(0, "ts", self.flows["ts"].cast(pa.int64()))
        return [{k: v for k, v in row.items() if k not in ("sensor", "label")} for row in flows.to_pylist()]

    @property
    def ports(self) -> list[int | None]:
        return self.flows["dst_port"].to_pylist()


def numbered(n: int, link: int = RAW, start: int = T0) -> list[Packet]:
    """Packet i went to port i, one a second."""
    return [Packet((start + i) * 10**9, on_link(link, ipv4(tcp(dst_port=i)))) for i in range(n)]


# ---------------------------------------------------------------------------------------------
# Equal to dpkt
# ---------------------------------------------------------------------------------------------

REAL = {
    "chrissanders_synscan.pcapng": (2011, 0),
    "greynoise_brazil_storm.pcap": (5170, 0),
    "ndpi_tcp_scan.pcapng": (18, 12),
    "simplescan_445_scan.pcap": (21, 0),
    "simplescan_backscatter.pcap": (4771, 0),
    "simplescan_multiport.pcap": (16, 0),
    "simplescan_port_scan.pcap": (10, 0),
    "simplescan_zero_windows.pcap": (10, 0),
    "slips_test7.pcap": (1908, 92),
}
"""Flows and rejects of every real file; the rejects are ARP and IPv6."""


@pytest.mark.data
@pytest.mark.parametrize("name", REAL)
def test_real_files_agree_with_dpkt(name: str, real_data: Path) -> None:
    file = (real_data / "captures/pcap" / name).read_bytes()
    result = Result(file)
    expected, packets = read_with_dpkt(file)
    assert result.error is None
    assert result.rows == expected
    assert (len(expected), packets - len(expected)) == REAL[name]
    assert sum(result.counts.values()) == REAL[name][1]


@pytest.mark.data
def test_every_real_file_is_listed(real_data: Path) -> None:
    assert {path.name for path in (real_data / "captures/pcap").iterdir()} == set(REAL)


@pytest.mark.parametrize(("big", "nano"), [*itertools.product([False, True], repeat=2)])
@pytest.mark.parametrize("link", LINKS)
def test_every_link_and_clock_agrees_with_dpkt(link: int, big: bool, nano: bool) -> None:
    packets = some_packets(link, 300, link)
    file = pcap(packets, link, big, nano)
    expected = [row_of(Fraction(p.ns // 1000, 10**6), p.data, link) for p in packets]
    flows = [row for row in expected if row is not None]
    assert 100 < len(flows) < 280
    result = Result(file)
    assert (result.format, result.error) == ("pcap", None)
    assert result.rows == flows
    assert sum(result.counts.values()) == 300 - len(flows)
    if link in (ETHERNET, RAW, COOKED, NULL):  # dpkt's reader of files, too
        assert read_with_dpkt(file) == (flows, 300)
    assert Result(pcapng(packets, link, big)).rows == flows


def test_simulated_captures_hold_the_same_flows(tmp_path: Path) -> None:
    for packets in (False, True):
        simulate_to(tmp_path / str(packets), seed=3, months=1, sources=200, flows=3000, pcap=packets)
    table = pq.read_table(tmp_path / "False/captures/2024-01.parquet")
    result = Result((tmp_path / "True/captures/2024-01.pcap").read_bytes(), 1000, sensor="here")
    assert result.flows["src"].to_pylist() == table["src_ip"].to_pylist()
    for name in ("ts", "dst_port", "proto", "src_port", "ttl", "size", "tcp_flags"):
        assert result.flows[name].to_pylist() == table[name].to_pylist(), name
    assert set(result.flows["sensor"].to_pylist()) == {"here"}
    assert result.counts == {}


# ---------------------------------------------------------------------------------------------
# Packets
# ---------------------------------------------------------------------------------------------

FAULTS = {
    "IPv6 is not supported yet": [
        on_link(ETHERNET, bytes(40), IP6),
        on_link(ETHERNET, bytes(40), IP6, [0x8100]),
        on_link(ETHERNET, b"\x60" + bytes(40)),
    ],
    "is ARP": [on_link(ETHERNET, bytes(28), ARP)],
    "is not IP": [
        on_link(ETHERNET, bytes(28), 0x88CC),
        on_link(ETHERNET, bytes(28), 38),  # a length: 802.3
        on_link(ETHERNET, b"\x10" + bytes(40)),
    ],
    "cut off before the IP header ends": [
        b"",
        bytes(13),
        on_link(ETHERNET, b""),
        on_link(ETHERNET, b"", IP, [0x8100])[:17],
        on_link(ETHERNET, ipv4(tcp())[:19]),
        on_link(ETHERNET, ipv4(tcp(), options=bytes(4))[:23]),
    ],
    "malformed IP header": [
        on_link(ETHERNET, b"\x44" + ipv4(tcp())[1:]),
        on_link(ETHERNET, ipv4(tcp(), total=19)),
    ],
    "later fragment, which has no port": [on_link(ETHERNET, ipv4(tcp(), fragment=1))],
    "cut off before the port": [
        on_link(ETHERNET, ipv4(udp()[:3])),
        on_link(ETHERNET, ipv4(tcp(), total=23)),  # what follows is padding
        on_link(ETHERNET, ipv4(bytes(20), proto=132)[:23]),
    ],
}  # fmt: skip


@pytest.mark.parametrize("reason", FAULTS)
def test_packets_that_are_no_flow_are_counted(reason: str) -> None:
    good = on_link(ETHERNET, ipv4(tcp()))
    data = [good, *FAULTS[reason], good]
    packets = [Packet(T0 * 10**9 + 1000 * i, packet) for i, packet in enumerate(data)]
    result = Result(pcap(packets, ETHERNET))
    assert result.counts == {reason: len(packets) - 2}
    assert result.rejects[reason].offset == 24 + 16 + len(good) + 16
    assert result.flows.num_rows == 2
    assert (result.error, result.duplicates) == (None, 0)


def test_what_is_cut_off_is_missing() -> None:
    whole = ipv4(tcp(1, 2, 3, 18))
    ends = {24: (1, 2, None), 33: (1, 2, None), 34: (1, 2, 18), 40: (1, 2, 18)}
    result = Result(pcap([Packet(T0 * 10**9 + end, whole[:end], 40) for end in ends]))
    columns = zip(*(result.flows[k].to_pylist() for k in ("src_port", "dst_port", "tcp_flags")), strict=True)
    assert list(columns) == list(ends.values())
    assert set(result.flows["size"].to_pylist()) == {40}
    kinds = Result(pcap([Packet(T0 * 10**9 + n, ipv4(icmp(3, 1)[:n], proto=1)) for n in (0, 1, 2)])).rows
    assert [(row["dst_port"], row["icmp_code"]) for row in kinds] == [(None, None), (3, None), (3, 1)]


def test_loopback_in_the_order_of_another_machine() -> None:
    packets = [
        Packet(T0 * 10**9 + i, on_link(NULL, ipv4(tcp()), big=big)) for i, big in enumerate([True, False])
    ]
    assert Result(pcap(packets, NULL)).flows.num_rows == 2


def test_tags_without_end() -> None:
    deep = on_link(ETHERNET, ipv4(tcp(dst_port=5)), IP, [0x9100] * 40)
    loop = on_link(ETHERNET, b"", 0x8100, [0x8100] * 40)
    result = Result(pcap([Packet(T0 * 10**9, deep), Packet(T0 * 10**9, loop)], ETHERNET))
    assert (result.ports, sum(result.counts.values())) == ([5], 1)


def test_fingerprints() -> None:
    dst, port, seq = 0xC6120001, 23, 12345
    packets = [
        ipv4(tcp(), ip_id=54321),
        ipv4(tcp(dst_port=port, seq=seq), dst=dst, ip_id=(dst ^ port ^ seq) & 0xFFFF),
        ipv4(tcp(seq=dst), dst=dst),
        ipv4(udp(), proto=17, ip_id=54321),
        ipv4(tcp()),
    ]
    result = Result(pcap(Packet(T0 * 10**9, data) for data in packets))
    assert result.flows["fingerprint"].to_pylist() == [1, 2, 4, 1, 0]


def test_times_outside_the_limits_are_rejects() -> None:
    packets = numbered(5)
    limits = [datetime.fromtimestamp(T0 + s, UTC) for s in (1, 3)]
    result = Result(pcap(packets), earliest=limits[0], latest=limits[1])
    assert result.ports == [1, 2]
    assert result.counts == {"ts before captures.earliest": 1, "ts after captures.latest": 2}


def test_duplicates_are_told_whatever_the_batches() -> None:
    packets = [Packet(T0 * 10**9, ipv4(tcp(dst_port=i % 10, seq=i % 20))) for i in range(30)]
    packets += [Packet(T0 * 10**9 + 10**6, packets[0].data)]  # another time
    for batch_rows in (3, 1000):
        kept = Result(pcap(packets), batch_rows)
        assert (kept.flows.num_rows, kept.duplicates, kept.counts) == (31, 10, {})
        dropped = Result(pcap(packets), batch_rows, duplicates="drop")
        assert (dropped.flows.num_rows, dropped.duplicates) == (21, 10)
        assert dropped.counts == {"duplicate packet": 10}


# ---------------------------------------------------------------------------------------------
# pcapng
# ---------------------------------------------------------------------------------------------


def test_sections_and_interfaces_have_their_own_order_link_and_clock() -> None:
    data = [ipv4(tcp(dst_port=i)) for i in range(8)]
    ethernet = [on_link(ETHERNET, packet) for packet in data]
    file = b"".join([
        section(), interface(ETHERNET), interface(RAW, resolution=9), block(5, bytes(12)),
        enhanced(ethernet[0], T0 * 10**6 + 1), enhanced(data[1], T0 * 10**9 + 2999, 1),
        block(0x0BAD, b"who knows"), block(4, bytes(40)),
        section(True), interface(COOKED2, True, offset=T0), interface(RAW, True, 0x80 | 10),
        block(10, bytes(8), True),
        enhanced(on_link(COOKED2, data[2]), 3, 0, True), enhanced(data[3], T0 << 10 | 512, 1, True),
        obsolete(data[4], T0 << 10 | 1, 1, True),
        section(), interface(RAW, resolution=0), enhanced(data[5], T0),
        interface(RAW, resolution=3, offset=-1),
        enhanced(data[6], T0 * 1000 + 1001, 1), obsolete(data[7], T0, 0),
    ])  # fmt: skip
    result = Result(file)
    assert (result.format, result.error, result.counts) == ("pcapng", None, {})
    assert result.ports == list(range(8))
    us = [row["ts"] - T0 * 10**6 for row in result.rows]
    assert us == [1, 2, 3, 500_000, 976, 0, 1000, 0]


def test_packets_without_a_time_or_an_interface() -> None:
    data = ipv4(tcp())
    simple = block(3, struct.pack("<I", len(data)) + data)
    file = section() + interface(RAW) + simple + enhanced(data, T0 * 10**6, 1) + enhanced(data, T0 * 10**6)
    file += interface(147) + enhanced(data, T0 * 10**6, 1) + simple
    result = Result(file)
    assert result.flows.num_rows == 1
    assert result.counts == {
        "ts missing": 2,
        "interface is not described": 1,
        "link type is not supported": 1,
    }


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 2**64 - 1), st.integers(0, 255), st.integers(-(2**63), 2**63 - 1))
def test_any_clock(ticks: int, resolution: int, offset: int) -> None:
    unit = Fraction(1, 2 ** (resolution & 127) if resolution & 128 else 10**resolution)
    seconds = ticks * unit
    if resolution & 1:
        offset = T0 - int(seconds)  # else few come to lie within the limits
    in_range = 0 <= seconds + offset < 2**32
    exact = int((seconds + offset) * 10**6 // 1)
    result = Result(
        section()
        + interface(RAW, resolution=resolution, offset=max(-(2**63), offset))
        + enhanced(ipv4(tcp()), ticks),
        earliest=datetime(1970, 1, 1, tzinfo=UTC),
        latest=datetime.fromtimestamp(2**32, UTC),
    )
    assert result.flows.num_rows == in_range
    for row in result.rows:
        assert exact - row["ts"] in (0, 1)
        assert exact == row["ts"] or resolution & 127 > 40


def test_interfaces_without_end() -> None:
    data = ipv4(tcp())
    file = section() + interface(RAW) * 65_540 + enhanced(data, T0 * 10**6, 65_535)
    result = Result(file + enhanced(data, T0 * 10**6, 65_536))
    assert (result.flows.num_rows, result.counts) == (1, {"interface is not described": 1})


# ---------------------------------------------------------------------------------------------
# Streams
# ---------------------------------------------------------------------------------------------


class Trickle(io.BytesIO):
    """A stream that gives as much as it likes."""

    def read(self, size: int | None = -1, /) -> bytes:
        return super().read(min(size or 1, 70_001)) if size and size > 0 else super().read(size)


def test_records_across_the_ends_of_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pcap_module, "WINDOW_BYTES", 1 << 20)
    draw = random.Random(1)
    packets = [
        Packet((T0 + i) * 10**9, ipv4(tcp(dst_port=i)) + bytes(draw.choice([0, 7, 3000, 200_000])))
        for i in range(60)
    ]
    for write in (pcap, pcapng):
        file = write(packets)
        assert len(file) > 3 << 20
        for stream in (file, gzip.compress(file, 1), Trickle(file)):
            result = Result(stream, 7)
            assert (result.ports, result.error) == (list(range(60)), None)


def test_empty_captures() -> None:
    for file in (pcap([]), section(), section() + interface(ETHERNET)):
        result = Result(file)
        assert (result.flows.num_rows, result.counts, result.error) == (0, {}, None)


@pytest.mark.parametrize("snaplen", [0, 1, 2**32 - 1])
def test_the_snap_length_may_lie(snaplen: int) -> None:
    assert Result(pcap(numbered(5), snaplen=snaplen)).ports == list(range(5))


def test_links_without_a_reader_are_named() -> None:
    error = Result(pcap(numbered(5), link=105)).error
    assert error is not None
    assert "link type 105 is not supported; these are: Ethernet (1), raw IP (101)" in error.reason


def test_a_format_that_is_set_is_checked() -> None:
    error = Result(b"a,b\n" * 20, format="pcap").error
    assert error is not None
    assert error.reason == "not a pcap file: it begins with b'a,b\\n'"


def test_a_length_of_checksums_is_no_part_of_the_link() -> None:
    file = bytearray(pcap(numbered(5)))
    file[23] = 0x24
    assert Result(bytes(file)).ports == list(range(5))


# ---------------------------------------------------------------------------------------------
# Damage
# ---------------------------------------------------------------------------------------------


def record(i: int) -> int:
    """Where record i of `numbered` packets begins."""
    return 24 + i * (16 + 40)


@pytest.mark.parametrize("write", [pcap, pcapng])
def test_cut_off_anywhere(write: object) -> None:
    file = (pcap if write is pcap else pcapng)(numbered(3))
    size = 56 if write is pcap else 72
    first = len(file) - 3 * size
    for end in range(first, len(file)):
        result = Result(file[:end])
        whole, rest = divmod(end - first, size)
        assert result.ports == list(range(whole))
        assert result.counts == {}
        if rest:
            assert result.error is not None
            assert (result.error.reason, result.error.offset) == (CUT, first + whole * size)
        else:
            assert result.error is None


def test_a_file_header_that_is_cut_off() -> None:
    for end in range(4, 24):
        error = Result(pcap([])[:end]).error
        assert error is not None
        assert (error.reason, error.offset) == ("cut off in the file header", end)


def with_length(file: bytes, length: int) -> bytes:
    """Record 5 claims to be of another length."""
    order = ">" if file[0] == 0xA1 else "<"
    return file[: record(5) + 8] + struct.pack(order + "I", length) + file[record(5) + 12 :]


DAMAGE = {
    "length too small": (lambda f: with_length(f, 30), {}),
    "length too large": (lambda f: with_length(f, 45), {}),
    "length far too large": (lambda f: with_length(f, 2**31), {5}),
    "length beyond the end": (lambda f: with_length(f, 5000), {5}),
    "zeros for a header": (lambda f: f[: record(5)] + bytes(16) + f[record(6) - 40 :], {5}),
    "zeros for records": (lambda f: f[: record(5)] + bytes(2 * 56) + f[record(7) :], {5, 6}),
    "text inserted": (lambda f: f[: record(5)] + b"Lorem ipsum dolor sit amet" + f[record(5) :], {}),
    "bytes removed": (lambda f: f[: record(5) + 30] + f[record(5) + 41 :], {5}),
    "a second file header": (lambda f: f[: record(5)] + f[:24] + f[record(5) :], {}),
}


@pytest.mark.parametrize("name", DAMAGE)
@pytest.mark.parametrize("big", [False, True])
def test_damage_costs_the_records_it_hits(name: str, big: bool) -> None:
    damage, lost = DAMAGE[name]
    result = Result(damage(pcap(numbered(20), big=big)))
    assert result.error is None
    assert set(range(20)) - set(result.ports) <= {*lost, 6}  # the next may be hidden in a length
    assert {*range(5), *range(7, 20)} <= set(result.ports)
    assert result.counts.pop(DAMAGED) == 1
    assert sum(result.counts.values()) <= 2  # what the damage looked like


def test_the_place_of_damage_is_told() -> None:
    file = pcap(numbered(20))
    result = Result(file[: record(5)] + b"?" * 1000 + file[record(5) :])
    assert result.ports == list(range(20))
    assert result.rejects[DAMAGED].offset == record(5)
    many = b"".join(
        [file[: record(5)], b"?" * 99, file[record(5) : record(10)], b"?" * 99, file[record(10) :]]
    )
    assert Result(many).counts == {DAMAGED: 2}


def test_damage_without_an_end() -> None:
    for rest in (b"?" * 5000, bytes(5000), bytes(3 << 20)):
        result = Result(pcap(numbered(20)) + rest)
        assert result.ports == list(range(20))
        assert result.error is not None
        assert (result.error.reason, result.error.offset) == (DAMAGED, record(20))
    result = Result(pcap([]) + b"?" * 100)
    assert result.error is not None
    assert result.error.offset == 24


def test_damage_across_the_ends_of_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pcap_module, "WINDOW_BYTES", 1 << 20)
    file = pcap(numbered(20_000))
    hole = (5 << 19) + 3
    result = Result(file[: record(3000)] + bytes(hole) + file[record(3000) :])
    assert result.ports == list(range(20_000))
    assert result.counts == {DAMAGED: 1}


def test_blocks_that_are_damaged() -> None:
    start, size = len(pcapng([])), 72
    file = pcapng(numbered(20))
    fifth = start + 5 * size
    for length in (0, 13, 40, 2**31, 2**32 - 1, 5000):
        damaged = file[: fifth + 4] + struct.pack("<I", length) + file[fifth + 8 :]
        result = Result(damaged)
        assert set(range(20)) - set(result.ports) == {5}
        assert (result.counts, result.error) == ({DAMAGED: 1}, None)
        assert result.rejects[DAMAGED].offset == fifth
    for rest in (b"?" * 999, bytes(5000)):
        result = Result(file + rest)
        assert result.ports == list(range(20))
        assert result.error is not None
        assert (result.error.reason, result.error.offset) == (DAMAGED, len(file))
    result = Result(file + b"??" + pcapng(numbered(7), big=True))
    assert (result.flows.num_rows, result.counts) == (27, {DAMAGED: 1})
    captured = fifth + 20  # more than the block holds
    result = Result(file[:captured] + struct.pack("<I", 10**6) + file[captured + 4 :])
    assert (result.ports, result.counts) == (list(range(20)), {})


def test_a_section_that_is_none() -> None:
    for wrong in (slice(4, 8), slice(8, 12)):
        file = bytearray(section())
        file[wrong] = b"????"
        error = Result(bytes(file) + interface(RAW)).error
        assert error is None or error.reason == DAMAGED


def test_damage_of_the_compression_is_the_one_that_is_told() -> None:
    packets = some_packets(1, 3000, RAW)
    whole = gzip.compress(pcap(packets))
    result = Result(whole[: len(whole) // 2])
    assert result.error is not None
    assert "gzip" in result.error.reason
    assert result.rows == Result(pcap(packets)).rows[: len(result.rows)]
    assert len(result.rows) > 100


# ---------------------------------------------------------------------------------------------
# Fuzz
# ---------------------------------------------------------------------------------------------

Edit = tuple[int, str, bytes]
EDITS = st.lists(
    st.tuples(st.integers(0, 2000), st.sampled_from(["set", "del", "ins", "dup"]), st.binary(max_size=9))
)
WHOLE = [
    *(pcap(some_packets(3, 20, link), link, big=link == LOOP, nano=link == RAW) for link in LINKS),
    *(pcapng(some_packets(4, 20, link), link, big=link == COOKED) for link in LINKS),
]


def edited(file: bytes, edits: list[Edit]) -> bytes:
    data = bytearray(file)
    for place, how, value in edits:
        place %= len(data) + 1
        if how == "set":
            data[place : place + len(value)] = value
        elif how == "del":
            del data[place : place + len(value)]
        elif how == "ins":
            data[place:place] = value
        else:
            data[place:place] = data[max(0, place - 100) : place]
    return bytes(data)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.sampled_from(WHOLE), EDITS, st.sampled_from([None, 1, 60]))
def test_any_damage_is_a_result(file: bytes, edits: list[Edit], aggregate: int | None) -> None:
    """Nothing is raised but FormatError, and no more is read than there is room for."""
    data = file[:4] + edited(file[4:], edits)
    result = Result(data, 6, aggregate=aggregate)
    packets = sum(row["packets"] for row in result.rows)
    assert packets + sum(result.counts.values()) <= len(data) / 12
    whole = Result(data, aggregate=aggregate)
    assert (whole.rows, whole.counts, str(whole.error)) == (result.rows, result.counts, str(result.error))


@settings(max_examples=100, deadline=None)
@given(st.sampled_from([pcap([]), pcap([], big=True, nano=True), section(), section(True)]), st.binary())
def test_any_bytes_are_a_result(head: bytes, rest: bytes) -> None:
    result = Result(head + rest)
    assert bool(rest) == (result.error is not None or bool(result.counts) or result.flows.num_rows > 0)


# ---------------------------------------------------------------------------------------------
