"""Every real file gives exactly its records: counts and columns equal those of an independent reading.

The oracles below know nothing of the package. They parse with the standard library's csv and json, with
str.split, or with the format's own program, row by row, and apply the mappings that docs/captures.md states.
"""

from __future__ import annotations

import csv
import io
import ipaddress
import json
import shutil
import subprocess
from collections import Counter
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

import fastavro
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rayscan.captures.columns import BATCH, Batch, merge_rejects
from rayscan.captures.detect import READERS, read_capture
from rayscan.config import CapturesConfig
from rayscan.errors import ConfigError, FormatError, SchemaError

CONFIG = CapturesConfig(earliest=datetime(1970, 1, 1, tzinfo=UTC), time_zone="UTC")
COLUMNS = (
    "ts", "src", "dst", "dst_port", "proto", "src_port", "ttl", "size", "packets", "tcp_flags", "icmp_code",
    "label",
)  # fmt: skip
PROTOCOLS = {"icmp": 1, "igmp": 2, "tcp": 6, "udp": 17, "ipv6-icmp": 58}
FLAGS = {"F": 1, "S": 2, "R": 4, "P": 8, "A": 16, "U": 32}
NONE = ("", "-", "(empty)", None)

Row = dict[str, Any]


def read(path: Path, config: CapturesConfig = CONFIG, batch_rows: int = 1000) -> tuple[str, Batch]:
    with path.open("rb") as file:
        kind, batches = read_capture(file, path.name, config, batch_rows)
        parts = list(batches)
    flows = pa.concat_tables([BATCH.empty_table(), *(part.flows for part in parts)])
    return kind, Batch(flows, merge_rejects(reject for part in parts for reject in part.rejects))


def flow(**values: Any) -> Row:
    return dict.fromkeys(COLUMNS) | values


def ipv4(text: str) -> int:
    return int(ipaddress.IPv4Address(text))


def us(seconds: Any) -> int:
    return round(Decimal(str(seconds)) * 10**6)


def moment(text: str) -> int:
    time = datetime.fromisoformat(text.replace("/", "-"))
    return (time.replace(tzinfo=time.tzinfo or UTC) - datetime(1970, 1, 1, tzinfo=UTC)) // timedelta(
        microseconds=1
    )


def number(text: Any) -> int | None:
    return None if text in NONE else int(text)


# ---------------------------------------------------------------------------------------------
# Oracles: path -> the flows, None for each record that is none
# ---------------------------------------------------------------------------------------------


def zeek(path: Path) -> Iterator[Row | None]:
    names: list[str] = []
    for line in path.read_text().splitlines():
        if line.startswith("{"):
            yield zeek_flow(json.loads(line))
        elif line.startswith("#fields"):
            names = line.split("\t")[1:]
        elif not line.startswith("#"):
            yield zeek_flow(dict(zip(names, line.split("\t"), strict=True)))


def zeek_flow(record: Row) -> Row | None:
    if ":" in record["id.orig_h"]:
        return None
    proto, ports = record["proto"], (int(record["id.orig_p"]), int(record["id.resp_p"]))
    history = record.get("history")
    flags = 0
    for letter, bits in {"S": 2, "H": 18, "A": 16, "F": 1, "R": 4}.items():
        flags |= bits if letter in (history or "") else 0
    labels = [record.get(name) for name in ("detailed-label", "detailedlabel", "label")]
    return flow(
        ts=us(record["ts"]),
        src=ipv4(record["id.orig_h"]),
        dst=ipv4(record["id.resp_h"]),
        proto=PROTOCOLS[proto],
        src_port=None if proto == "icmp" else ports[0],
        dst_port=ports[0] if proto == "icmp" else ports[1],
        icmp_code=ports[1] if proto == "icmp" else None,
        size=number(record.get("orig_ip_bytes")),
        packets=number(record.get("orig_pkts")),
        tcp_flags=flags if proto == "tcp" and history not in NONE else None,
        label=next((label for label in labels if label not in NONE), None),
    )


def argus(path: Path) -> Iterator[Row | None]:
    with path.open(newline="") as file:
        delimiter = "\t" if "\t" in file.readline() else ","
        file.seek(0)
        for record in csv.DictReader(file, delimiter=delimiter):
            yield argus_flow(record)


def argus_flow(record: Row) -> Row | None:
    proto = PROTOCOLS.get(record["Proto"])
    if proto is None or ":" in record["SrcAddr"]:
        return None
    source, target = (int(record[name] or "-1", 0) for name in ("Sport", "Dport"))
    return flow(
        ts=moment(record["StartTime"]),
        src=ipv4(record["SrcAddr"]),
        dst=ipv4(record["DstAddr"]),
        proto=proto,
        src_port=None if proto == 1 or source < 0 else source,
        dst_port=source & 255 if proto == 1 else None if target < 0 else target,
        icmp_code=source >> 8 if proto == 1 and source & 255 else None,  # 0xCCTT; echo replies have none
        size=int(record["SrcBytes"]),
        packets=int(record.get("SrcPkts") or record["TotPkts"]),
        label=record["Label"] or None,
    )


def spoki(path: Path) -> Iterator[Row | None]:
    with path.open(newline="") as file:
        for record in csv.DictReader(file, delimiter="|"):
            flags = {"fin": 1, "syn": 2, "rst": 4, "ack": 16}
            yield flow(
                ts=int(record["ts"]) * 1000,
                src=ipv4(record["saddr"]),
                dst=ipv4(record["daddr"]),
                proto=PROTOCOLS[record["proto"]],
                src_port=int(record["sport"]),
                dst_port=int(record["dport"]),
                ttl=int(record["ttl"]),
                tcp_flags=sum(bit for name, bit in flags.items() if record[name] == "1"),
            )


def nfdump_text(path: Path) -> Iterator[Row | None]:
    for line in path.read_text().splitlines()[1:]:
        day, time, _, proto, source, _, target, flags, _, packets, size, _, *label = line.split()
        if source.count(":") > 1:
            yield None
            continue
        (src, src_port), (dst, dst_port) = source.split(":"), target.split(":")
        yield flow(
            ts=moment(f"{day} {time}"),
            src=ipv4(src),
            dst=ipv4(dst),
            proto=PROTOCOLS[proto.lower()],
            src_port=int(src_port),
            dst_port=int(dst_port),
            tcp_flags=sum(FLAGS[flag] for flag in flags if flag != ".") if proto == "TCP" else None,
            packets=int(packets),
            size=int(size),
            label=label[0] if label else None,
        )


def nfdump(path: Path) -> Iterator[Row | None]:
    """By another output of the program than the one that is used: addresses as numbers, flags as bits."""
    program = shutil.which("nfdump")
    if program is None:
        pytest.skip("the program nfdump is not installed")
    printed = subprocess.run(
        [program, "-r", str(path), "-q", "-o", "pipe"], capture_output=True, text=True, check=True
    )
    for line in printed.stdout.splitlines():
        family, *fields = line.split("|")
        assert family == "2"
        ms, _, proto, _, _, _, src, src_port, _, _, _, dst, dst_port, *_, flags, _, packets, size = map(
            int, fields
        )
        yield flow(
            ts=ms * 1000, src=src, dst=dst, proto=proto, src_port=src_port, dst_port=dst_port,
            tcp_flags=flags if proto == 6 else None, packets=packets, size=size,
        )  # fmt: skip


def eve(path: Path) -> Iterator[Row | None]:
    for line in path.read_text().splitlines():
        assert json.loads(line)["event_type"] != "flow"
        yield None


Oracle = Callable[[Path], Iterator[Row | None]]

FILES: list[tuple[str, str, Oracle, int, dict[str, int]]] = [
    # file, format, oracle, flows, rejects
    ("zeek/001-zeek-scenario-malicious_labeled-conn.log", "zeek", zeek, 331, {"IPv6": 661}),
    ("zeek/002-zeek-scenario-port-scanning_conn.log", "zeek-json", zeek, 4504, {}),
    ("zeek/conn.json.log", "zeek-json", zeek, 915, {"IPv6": 85}),
    ("zeek/conn.json.small.log", "zeek-json", zeek, 95, {"IPv6": 5}),
    ("zeek/conn.tab.log", "zeek", zeek, 66, {"IPv6": 26}),
    ("zeek/slips_horizontal_conn.log", "zeek", zeek, 41, {}),
    ("zeek/slips_test9_conn.log", "zeek-json", zeek, 560, {"IPv6": 16}),
    ("zeek/slips_vertical_conn.log", "zeek-json", zeek, 50, {}),
    ("argus/slips_test2-malicious.binetflow", "csv", argus, 6751, {}),
    (
        "argus/slips_test5-mixed.binetflow",
        "csv",
        argus,
        290,
        {"src is not IPv4": 1, "IPv6": 6, "proto unreadable": 3},
    ),
    ("argus/test.binetflow", "csv", argus, 86, {"src is not IPv4": 2, "IPv6": 5, "proto unreadable": 6}),
    (
        "argus/test5.tabs.binetflow",
        "csv",
        argus,
        6715,
        {"src is not IPv4": 1, "IPv6": 6, "proto unreadable": 3},
    ),
    ("nfdump/nfcapd.sample1", "nfdump-text", nfdump_text, 35, {}),
    ("nfdump/nfcapd.sample1.labeled", "nfdump-text", nfdump_text, 32, {"src is not IPv4": 3}),
    ("nfdump/nfcapd.sample2", "nfdump-text", nfdump_text, 167, {}),
    ("nfdump/slips_test1-malicious.nfdump", "nfdump", nfdump, 4593, {}),
    ("suricata/small.suricata.json", "eve", eve, 0, {"alert event, no flow": 13}),
    ("spoki/2021-10-13.21:00:00.test.spoki.tcp.raw.1634158800.csv", "csv", spoki, 5069, {}),
    ("spoki/2021-10-13.22:00:00.test.spoki.tcp.raw.1634162400.csv", "csv", spoki, 5299, {}),
]


@pytest.mark.data
@pytest.mark.parametrize(("name", "kind", "oracle", "flows", "rejects"), FILES, ids=[f[0] for f in FILES])
def test_exactly_the_records(
    real_data: Path, name: str, kind: str, oracle: Oracle, flows: int, rejects: dict[str, int]
) -> None:
    path = real_data / "captures" / name
    found_kind, batch = read(path)
    expected = list(oracle(path))
    assert found_kind == kind
    flows_us = batch.flows.set_column(0, "ts", batch.flows["ts"].cast(pa.int64()))
    found = flows_us.to_pylist()
    assert [{key: row[key] for key in COLUMNS} for row in found] == [
        row for row in expected if row is not None
    ]
    assert len(found) == flows
    counted = Counter({reject.reason: reject.count for reject in batch.rejects})
    assert sum(counted.values()) == expected.count(None)
    assert {
        reason.removesuffix(" is not supported yet"): count for reason, count in counted.items()
    } == rejects


@pytest.mark.data
def test_every_real_file_is_in_the_table(real_data: Path) -> None:
    folders = ("zeek", "argus", "nfdump", "suricata", "spoki")
    there = {
        f"{path.parent.name}/{path.name}"
        for name in folders
        for path in (real_data / "captures" / name).iterdir()
    }
    assert there == {file[0] for file in FILES}


# ---------------------------------------------------------------------------------------------
# Damage
# ---------------------------------------------------------------------------------------------


def avro(fields: dict[str, object]) -> bytes:
    schema = {
        "type": "record",
        "name": "flowtuple",
        "fields": [{"name": n, "type": t} for n, t in fields.items()],
    }
    row = {n: [1, 2] if isinstance(t, dict) else "DE" if t == "string" else 6 for n, t in fields.items()}
    file = io.BytesIO()
    fastavro.writer(file, schema, [row] * 40, codec="null", sync_interval=200)
    return file.getvalue()


NUMBERS = {"type": "array", "items": "long"}
V3 = dict.fromkeys(("time", "src_ip", "dst_ip", "src_port", "dst_port", "protocol", "packet_cnt"), "long")
V4 = dict.fromkeys(("time", "src_ip", "dst_net", "dst_port", "protocol", "packet_cnt"), "long")
V4 = V4 | dict.fromkeys(("common_ttls", "common_ttl_freqs"), NUMBERS) | {"country": "string"}
SEEDS = {
    "zeek": b"#separator \\x09\n#fields\tts\tid.orig_h\tid.orig_p\tid.resp_h\tid.resp_p\tproto\thistory\n"
    b"#types\ttime\taddr\tport\taddr\tport\tenum\tstring\n"
    + b"1700000000.5\t1.2.3.4\t5\t6.7.8.9\t23\ttcp\tS\n"
    * 4,
    "zeek-json": b'{"ts":1700000000.5,"id.orig_h":"1.2.3.4","id.orig_p":8,"id.resp_h":"6.7.8.9",'
    b'"id.resp_p":0,"proto":"icmp","conn_state":"OTH"}\n' * 4,
    "eve": b'{"event_type":"flow","src_ip":"1.2.3.4","dest_ip":"6.7.8.9","dest_port":23,"proto":"TCP",'
    b'"flow":{"start":"2024-03-01T12:00:00+0200","pkts_toserver":1},"tcp":{"tcp_flags_ts":"02"}}\n' * 4,
    "json": b'{"ts":"2024-03-01T12:00:00Z","src":"1.2.3.4","dst":{"port":23},"dst_port":23,"proto":6}\n' * 4,
    "csv": b"ts,src,dst_port,proto\n" + b"2024-03-01T12:00:00Z,1.2.3.4,23,tcp\n" * 4,
    "nfdump-text": b"Date first seen Duration Proto Src Dst Packets Bytes Flows\n"
    + b"2024-03-01 12:00:00.000 0.000 TCP 1.2.3.4:5 -> 6.7.8.9:23 ......S. 0 1 40 1\n" * 4,
    "flowtuple3": avro(V3),
    "flowtuple4": avro(V4),
}


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(sorted(SEEDS)),
    st.lists(
        st.tuples(st.integers(0, 10**6), st.binary(max_size=6), st.integers(0, 8)), min_size=1, max_size=4
    ),
    st.sampled_from([1, 3, 1000]),
)
def test_damage_costs_rows_or_is_an_error_of_ours(
    name: str, edits: list[tuple[int, bytes, int]], batch_rows: int
) -> None:
    data = bytearray(SEEDS[name])
    for place, bytes_, length in edits:
        start = place % len(data) if data else 0
        data[start : start + length] = bytes_
    damaged(bytes(data), name, batch_rows)


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(sorted(SEEDS)), st.binary(max_size=200), st.integers(0, 60))
def test_anything_may_follow_a_good_beginning(name: str, rest: bytes, kept: int) -> None:
    damaged(SEEDS[name][: kept * len(SEEDS[name]) // 60] + rest, name, 1000)


def damaged(data: bytes, name: str, batch_rows: int) -> None:
    """Batches and errors of ours are all that may come of it, by either way to the reader."""
    for config in (CONFIG, CONFIG.model_copy(update={"format": name})):
        try:
            for batch in read_capture(io.BytesIO(data), "f", config, batch_rows)[1]:
                assert batch.flows.schema.equals(BATCH)
                assert batch.flows.num_rows <= batch_rows
                assert all(reject.count > 0 for reject in batch.rejects)
        except (FormatError, SchemaError, ConfigError):
            pass


@pytest.mark.parametrize("name", SEEDS)
def test_the_seeds_are_good(name: str) -> None:
    kind, batches = read_capture(io.BytesIO(SEEDS[name]), "f", CONFIG, 3)
    parts = list(batches)
    assert kind == name
    assert sum(part.flows.num_rows for part in parts) == (40 if "flowtuple" in name else 4)
    assert not [reject for part in parts for reject in part.rejects]
    assert {part.flows["dst_port"][0].as_py() for part in parts if part.flows.num_rows} <= {23, 6, 8}


def test_one_object_behind_a_byte_order_mark() -> None:
    data = b"\xef\xbb\xbf" + SEEDS["json"].split(b"\n")[0]
    assert sum(part.flows.num_rows for part in read_capture(io.BytesIO(data), "f", CONFIG, 3)[1]) == 1


def test_every_reader_is_tried() -> None:
    assert set(SEEDS) | {"parquet", "pcap", "pcapng", "nfdump"} == set(
        READERS
    )  # these have tests of their own
