"""conn.log as text and as JSON: headers, types, what stands where for ICMP, labels, no row forgotten."""

from __future__ import annotations

import gzip
import io
import json

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rayscan.captures import zeek
from rayscan.captures.columns import BATCH, Batch, Reject, merge_rejects
from rayscan.captures.detect import read_capture
from rayscan.config import CapturesConfig
from rayscan.errors import FormatError, SchemaError

NAMES = "ts uid id.orig_h id.orig_p id.resp_h id.resp_p proto history orig_pkts orig_ip_bytes".split()  # noqa: SIM905
TYPES = "time string addr port addr port enum string count count".split()  # noqa: SIM905
ROW = "1700000000.123456 Cx 1.2.3.4 40000 198.18.0.1 23 tcp S 1 40".split()  # noqa: SIM905
US = 1_700_000_000_123_456


def log(*rows: list[str], names: list[str] = NAMES, types: list[str] = TYPES, tab: str = "\t") -> bytes:
    separator = "".join(f"\\x{ord(c):02x}" for c in tab)
    head = [
        f"#separator {separator}",
        tab.join(["#set_separator", ","]),
        tab.join(["#empty_field", "(empty)"]),
    ]
    head += [tab.join(["#unset_field", "-"]), tab.join(["#path", "conn"])]
    head += [tab.join(["#fields", *names]), tab.join(["#types", *types])]
    tail = [tab.join(["#close", "2024-01-01-00-00-00"])]
    return "".join(line + "\n" for line in [*head, *(tab.join(row) for row in rows), *tail]).encode()


def read(data: bytes, batch_rows: int = 1000, **settings: object) -> Batch:
    _, batches = read_capture(io.BytesIO(data), "conn.log", CapturesConfig(**settings), batch_rows)
    parts = list(batches)
    assert all(part.flows.num_rows <= batch_rows for part in parts)
    flows = pa.concat_tables([BATCH.empty_table(), *(part.flows for part in parts)])
    rejects = merge_rejects(reject for part in parts for reject in part.rejects)
    return Batch(flows, rejects, sum(part.duplicates for part in parts))


def column(batch: Batch, name: str) -> list[object]:
    return batch.flows[name].to_pylist()


def changed(**values: str) -> list[str]:
    return [values.get(name.replace(".", "_"), value) for name, value in zip(NAMES, ROW, strict=True)]


def test_a_row() -> None:
    batch = read(log(ROW))
    assert batch.rejects == []
    assert batch.flows["ts"].cast(pa.int64()).to_pylist() == [US]
    assert {name: column(batch, name)[0] for name in BATCH.names if name != "ts"} == {
        "src": 16_909_060, "dst": 3_323_068_417, "dst_port": 23, "proto": 6, "sensor": None,
        "src_port": 40_000, "ttl": None, "size": 40, "packets": 1, "tcp_flags": 2, "icmp_code": None,
        "fingerprint": None, "label": None,
    }  # fmt: skip


@pytest.mark.parametrize("batch_rows", [1, 2, 1000])
def test_logs_put_together(batch_rows: int) -> None:
    """Rotated logs whose columns differ in order and number, as `zcat` gives them."""
    turned = log(ROW[::-1], names=NAMES[::-1], types=TYPES[::-1])
    fewer = log(ROW[2:7], ROW[2:7], names=NAMES[2:7], types=TYPES[2:7])
    data = gzip.compress(log(ROW, ROW)) + gzip.compress(turned)
    batch = read(data, batch_rows)
    assert column(batch, "src_port") == [40_000] * 3
    assert batch.rejects == []
    with pytest.raises(SchemaError, match=r"conn\.log: the log has no ts; flows come from Zeek's conn.log"):
        read(log(ROW) + fewer)


def test_separators_and_what_is_unset() -> None:
    batch = read(log(changed(history="-", orig_pkts="-"), tab=","))
    assert (column(batch, "tcp_flags"), column(batch, "packets"), column(batch, "size")) == (
        [None],
        [None],
        [40],
    )
    named = log(changed(history="(none)")).replace(b"#unset_field\t-", b"#unset_field\t(none)")
    assert column(read(named), "tcp_flags") == [None]
    with pytest.raises(FormatError, match="the separator '::' is not one character"):
        read(b"#separator ::\n" + log(ROW))
    with pytest.raises(FormatError, match="is not one character"):
        read(b"#separator \\x0\n" + log(ROW))


def test_icmp_has_type_and_code_for_ports() -> None:
    row = changed(proto="icmp", id_orig_p="3", id_resp_p="13", history="-")
    for data in (log(row, ROW), as_json(row, ROW)):
        batch = read(data)
        assert column(batch, "dst_port") == [3, 23]
        assert column(batch, "icmp_code") == [13, None]
        assert column(batch, "src_port") == [None, 40_000]
        assert column(batch, "tcp_flags") == [None, 2]


@pytest.mark.parametrize(
    ("history", "flags"),
    [
        ("S", 2),
        ("Sr", 2),
        ("ShAdDaFf", 19),
        ("^hR", 4),
        ("SAR", 22),
        ("H", 18),
        ("d", 0),
        ("-", None),
        ("(empty)", None),
    ],
)
def test_history_of_the_originator(history: str, flags: int | None) -> None:
    assert column(read(log(changed(history=history), ROW)), "tcp_flags") == [flags, 2]
    assert column(read(log(changed(history=history, proto="udp"))), "tcp_flags") == [None]


@pytest.mark.parametrize("name", ["detailedlabel", "detailed-label"])
def test_labels(name: str) -> None:
    names, types = [*NAMES, "label", name], [*TYPES, "string", "string"]
    labels = [("Malicious", "C&C"), ("Benign", "-"), ("-", "-"), ("Malicious", "(empty)")]
    rows = [[*ROW, *pair] for pair in labels]
    expect = ["C&C", "Benign", None, "Malicious"]
    assert column(read(log(*rows, names=names, types=types)), "label") == expect
    assert column(read(as_json(*rows, names=names)), "label") == expect


def test_the_number_of_the_protocol_wins() -> None:
    names, types = [*NAMES, "ip_proto"], [*TYPES, "count"]
    rows = [[*changed(proto="unknown_transport"), "47"], [*ROW, "-"]]
    assert column(read(log(*rows, names=names, types=types)), "proto") == [47, 6]
    assert read(log(changed(proto="unknown_transport"))).rejects == [Reject("proto unreadable", 0, 1)]


def test_bad_rows_cost_themselves() -> None:
    rows = [
        ROW,
        ROW[:5],
        changed(id_resp_p="x"),
        changed(ts="-"),
        changed(id_orig_h='1.2.3.4"'),
        ROW,
        [*ROW, "9"],
    ]
    for batch_rows in (1, 2, 1000):
        batch = read(log(*rows, ROW), batch_rows)
        assert batch.flows.num_rows == 3
        assert sorted(batch.rejects, key=lambda r: r.reason) == [
            Reject("dst_port unreadable", 2, 1),
            Reject("src is not IPv4", 4, 1),
            Reject("ts missing", 3, 1),
            Reject("wrong number of fields", 1, 2),
        ]
        assert column(batch, "tcp_flags") == [2, 2, 2]


FIELDS = {
    "ts": [
        "1700000000.123456",
        "1700000000.1",
        "1700000001",
        "1.5",
        "1700000000.1234567",
        "99999999999.5",
        "-",
        "1e9",
    ],
    "uid": ["Cx", "", "#", "a b", "\u00e9"],
    "id.orig_h": [
        "1.2.3.4",
        "255.255.255.255",
        "256.1.1.1",
        "01.2.3.4",
        "1.2.3",
        "fe80::1",
        "::ffff:1.2.3.4",
        "7",
        "-",
    ],
    "id.orig_p": ["0", "8", "40000", "65535", "65536", "040", " 8", "300", "-", "x", "-1"],
    "proto": ["tcp", "udp", "icmp", "TCP", "sctp", "6", "tc", "icmp6", "unknown_transport", "-"],
    "history": ["S", "ShAdDaFf", "^hR", "-", "", "(empty)", "nan", "NA", "S1", "Sr "],
    "orig_pkts": ["1", "0", "-", "(empty)", "99999999999999999999", "123456789012345678", "1.0", "0x10"],
    "ip_proto": ["6", "17", "1", "-", "47", "300"],
}
FIELDS |= {
    "id.resp_h": FIELDS["id.orig_h"],
    "id.resp_p": FIELDS["id.orig_p"],
    "orig_ip_bytes": FIELDS["orig_pkts"],
}
USUAL = st.sampled_from([True] * 3 + [False])


@st.composite
def lines(draw: st.DrawFn, names: list[str]) -> list[str]:
    """A line of a log: mostly usual values, or not even the right number of fields."""
    row = [FIELDS[n][0] if draw(USUAL) else draw(st.sampled_from(FIELDS[n])) for n in names]
    return (
        row
        if draw(USUAL)
        else draw(st.sampled_from([row, row[:-1], [*row, "9"], [""], [*row[:-1], row[-1] + "\r"]]))
    )


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_the_compiled_loop_gives_what_the_general_way_gives(data: st.DataObject) -> None:
    names = data.draw(st.sampled_from([NAMES, NAMES[::-1], NAMES[:7], [*NAMES, "ip_proto"]]))
    text = log(*data.draw(st.lists(lines(names), max_size=12)), names=names, types=[])
    same_both_ways(text, data.draw(st.sampled_from([1, 3, 1000])))


@pytest.mark.parametrize("proto", ["tcp", "icmp"])
def test_each_odd_value_alone(proto: str) -> None:
    names = [*NAMES, "ip_proto"]
    first = {n: FIELDS[n][0] for n in names} | {"proto": proto, "ip_proto": "-"}
    rows = [list((first | {n: value}).values()) for n in names for value in FIELDS[n]]
    same_both_ways(log(*rows, names=names, types=[]), 1000)


def test_a_log_cut_in_its_header_is_no_empty_log() -> None:
    for length in (12, 25, 60):
        with pytest.raises(FormatError, match="ends before a #fields line"):
            read(log(["x"])[:length])
    assert read(log()).flows.num_rows == 0


def test_a_line_that_ends_in_half_a_word() -> None:
    names = [*(name for name in NAMES if name != "proto"), "proto"]
    first = {n: FIELDS[n][0] for n in names}
    rows = [list((first | {"proto": proto}).values()) for proto in ("tcp", "icm", "tcp", "ic", "udp", "icm")]
    assert read(log(*rows, names=names, types=[]), 1000).flows.num_rows == 3
    same_both_ways(log(*rows, names=names, types=[]), 1000)


def same_both_ways(text: bytes, batch_rows: int) -> None:
    fast = read(text, batch_rows)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(zeek._Layout, "slots", lambda layout: np.empty(0, np.int64))  # all lines are odd
        slow = read(text, batch_rows)
    assert fast.flows.equals(slow.flows)
    assert key(fast) == key(slow)
    assert fast.duplicates == slow.duplicates


def key(batch: Batch) -> list[Reject]:
    return sorted(batch.rejects, key=lambda reject: reject.reason)


@pytest.mark.parametrize("seconds", [0, 1, 631152000, 1700000000, 2147483647])
def test_times_are_those_of_floats(seconds: int) -> None:
    """All ends in microseconds that a float could round otherwise."""
    rng = np.random.default_rng(seconds)
    texts = [f"{seconds}.{micro:06d}" for micro in rng.integers(0, 10**6, 5000)]
    data = np.frombuffer("\n".join([*texts, ""]).encode(), np.uint8)
    starts = np.append(0, np.flatnonzero(data == 10) + 1)[:-1]
    got = [zeek._time(data, np.uint64(start))[0] for start in starts.tolist()]
    assert got == np.rint(np.array(texts, np.float64) * 10**6).astype(np.int64).tolist()


def test_a_flood_of_header_lines_is_refused() -> None:
    again = b"#unset_field\t-\n#empty_field\tnone\n" * 1000
    assert read(again + log(ROW)).flows.num_rows == 1
    flood = b"".join(b"#unset_field\t%d\n" % i for i in range(100))
    with pytest.raises(FormatError, match="more than 16 values for an unset field"):
        read(log(ROW) + flood + log(ROW))


def test_other_logs_are_refused() -> None:
    with pytest.raises(SchemaError, match=r"this is Zeek's dns\.log; flows come from conn\.log"):
        read(log(ROW).replace(b"#path\tconn", b"#path\tdns"))
    with pytest.raises(FormatError, match="rows before a #fields line"):
        read(b"#separator \\x09\n" + "\t".join(ROW).encode())
    with pytest.raises(FormatError, match=r"a log of Zeek's other than conn\.log"):
        read(b'{"ts":1.5,"id.orig_h":"1.2.3.4","query":"x"}\n')


def as_json(*rows: list[str], names: list[str] = NAMES) -> bytes:
    numeric = {"ts", "id.orig_p", "id.resp_p", "orig_pkts", "orig_ip_bytes"}
    lines = []
    for row in rows:
        found = {
            n: json.loads(v) if n in numeric else v
            for n, v in zip(names, row, strict=True)
            if v not in ("-", "(empty)")
        }
        lines.append(json.dumps(found | {"conn_state": "S0"}))
    return "\n".join(lines).encode()


def test_json_is_the_same() -> None:
    rows = [
        ROW,
        changed(proto="udp", history="D"),
        changed(proto="icmp", id_orig_p="8", id_resp_p="0", history="-"),
    ]
    assert read(as_json(*rows)).flows.equals(read(log(*rows)).flows)
    iso = as_json(ROW).replace(b"1700000000.123456", b'"2023-11-14T22:13:20.123456Z"')
    assert read(iso).flows.equals(read(log(ROW)).flows)


def test_json_with_several_logs_in_a_file() -> None:
    lines = [json.loads(line) for line in as_json(ROW, ROW, ROW).splitlines()]
    for line, name in zip(lines, ("conn", "dns", "conn"), strict=True):
        line["_path"] = name
    batch = read("\n".join(map(json.dumps, lines)).encode())
    assert batch.flows.num_rows == 2
    assert batch.rejects == [Reject("of another Zeek log", 1, 1, "left out")]


def test_lines_that_are_no_objects() -> None:
    good = as_json(ROW)
    lines = [
        good,
        b"{bad",
        b"[1,2]",
        b"null",
        good,
        b'"x"',
        b'{"ts":1}{"ts":2}',
        b"\xff\xfe",
        b"[" * 5000,
        good,
    ]
    for batch_rows in (1, 3, 1000):
        batch = read(b"\n".join(lines), batch_rows)
        assert batch.flows.num_rows == 3
        assert batch.rejects == [Reject("not a JSON object", 1, 7)]


def test_times_before_1990_are_counted() -> None:
    batch = read(log(changed(ts="19.981745"), ROW))
    assert batch.rejects == [Reject("ts before captures.earliest", 0, 1)]
