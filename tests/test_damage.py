"""Every format, damaged in every way, through one ingest on Ray: what can be read is read, the rest is told.

A format joins with a line in `MAKE`, which `test_every_format_has_its_turn` asks for.
"""

from __future__ import annotations

import gzip
import io
import itertools
import json
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import fastavro
import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from rayscan import schema
from rayscan.captures.columns import BATCH
from rayscan.captures.detect import READERS
from rayscan.config import load
from rayscan.pipeline import SOME_REJECTED, Run
from rayscan.tables import Workspace

N = 1000
START = 1_704_067_200


def flows() -> pa.Table:
    """N TCP flows of ten public sources, a second apart."""
    i = np.arange(N)
    columns = {
        "ts": pa.array((START + i) * 1_000_000).cast(schema.TIME),
        "src": 20 * 2**24 + i % 10,
        "dst": 8 * 2**24 + i,
        "dst_port": 1 + i * 7 % 60_000,
        "src_port": 1 + i * 11 % 60_000,
        "proto": np.full(N, 6),
        "ttl": np.full(N, 64),
        "size": np.full(N, 40),
        "packets": np.full(N, 1),
        "tcp_flags": np.full(N, 2),
    }
    arrays = [
        pa.array(columns[f.name]).cast(f.type) if f.name in columns else pa.nulls(N, f.type) for f in BATCH
    ]
    return pa.Table.from_arrays(arrays, schema=BATCH)


def rows() -> list[dict[str, str]]:
    """The same as text."""
    frame = pl.from_arrow(flows())
    assert isinstance(frame, pl.DataFrame)
    found = frame.with_columns(ts=pl.col("ts").dt.strftime("%Y-%m-%dT%H:%M:%S.%6fZ")).to_dicts()
    for row in found:
        row |= {name: ".".join(map(str, row[name].to_bytes(4, "big"))) for name in ("src", "dst")}
    return [{name: str(value) for name, value in row.items() if value is not None} for row in found]


def parquet() -> bytes:
    file = io.BytesIO()
    pq.write_table(flows(), file, row_group_size=100, write_page_checksum=True)
    return file.getvalue()


def csv() -> bytes:
    found = rows()
    return "\n".join([",".join(found[0]), *(",".join(row.values()) for row in found), ""]).encode()


def packets() -> Iterator[tuple[int, bytes]]:
    """Time in microseconds, and an IPv4 packet with a TCP header."""
    for row in flows().select(["ts", "src", "dst", "src_port", "dst_port"]).to_pylist():
        ip = struct.pack(">BBHHHBBHII", 0x45, 0, 40, 7, 0, 64, 6, 0, row["src"], row["dst"])
        tcp = struct.pack(">HHIIBBHHH", row["src_port"], row["dst_port"], 99, 0, 0x50, 2, 1024, 0, 0)
        yield round(row["ts"].timestamp()) * 1_000_000, ip + tcp


def pcap() -> bytes:
    head = struct.pack("<IHHiIII", 0xA1B2C3D4, 2, 4, 0, 0, 65_535, 101)
    records = (struct.pack("<IIII", us // 1_000_000, 0, 40, 40) + packet for us, packet in packets())
    return b"".join([head, *records])


def pcapng() -> bytes:
    def block(kind: int, body: bytes) -> bytes:
        size = struct.pack("<I", 12 + len(body))
        return struct.pack("<I", kind) + size + body + size

    section = block(0x0A0D0D0A, struct.pack("<IHHq", 0x1A2B3C4D, 1, 0, -1))
    interface = block(1, struct.pack("<HHI", 101, 0, 0))
    blocks = (
        block(6, struct.pack("<IIIII", 0, us >> 32, us & 0xFFFFFFFF, 40, 40) + packet)
        for us, packet in packets()
    )
    return b"".join([section, interface, *blocks])


def lines(make: Callable[[dict[str, str]], object]) -> bytes:
    """A line of JSON for each flow."""
    return "".join(json.dumps(make(row)) + "\n" for row in rows()).encode()


def zeek() -> bytes:
    fields = {
        "ts": "time",
        "id.orig_h": "addr",
        "id.orig_p": "port",
        "id.resp_h": "addr",
        "id.resp_p": "port",
    }
    fields |= {"proto": "enum"}
    head = ["#separator \\x09", "#unset_field\t-", "#path\tconn"]
    head += ["\t".join(["#fields", *fields]), "\t".join(["#types", *fields.values()])]
    names = ("src", "src_port", "dst", "dst_port")
    body = ["\t".join([f"{START + i}.0", *(r[n] for n in names), "tcp"]) for i, r in enumerate(rows())]
    return "\n".join([*head, *body, ""]).encode()


def zeek_json() -> bytes:
    times = itertools.count(START)
    return lines(
        lambda row: {
            "ts": float(next(times)), "id.orig_h": row["src"], "id.orig_p": int(row["src_port"]),
            "id.resp_h": row["dst"], "id.resp_p": int(row["dst_port"]), "proto": "tcp", "conn_state": "S0",
        }
    )  # fmt: skip


def eve() -> bytes:
    return lines(
        lambda row: {
            "event_type": "flow", "src_ip": row["src"], "src_port": int(row["src_port"]), "proto": "TCP",
            "dest_ip": row["dst"], "dest_port": int(row["dst_port"]),
            "flow": {"start": row["ts"].replace("Z", "+0000"), "bytes_toserver": 40, "pkts_toserver": 1},
        }
    )  # fmt: skip


def flowtuple(**names: str) -> bytes:
    """Avro in blocks of some twenty records; `names` are the file's for ours."""
    fields = [{"name": name, "type": "long"} for name in (*names.values(), "packet_cnt")]
    seconds = pc.divide(flows()["ts"].cast(pa.int64()), 1_000_000)
    columns = [flows().set_column(0, "ts", seconds)[name].to_pylist() for name in names]
    records = [
        dict(zip((*names.values(), "packet_cnt"), (*row, 1), strict=True))
        for row in zip(*columns, strict=True)
    ]
    file = io.BytesIO()
    schema = {"type": "record", "name": "flowtuple", "fields": fields}
    fastavro.writer(file, schema, records, codec="deflate", sync_interval=500)
    return file.getvalue()


def nfdump_text() -> bytes:
    head = "Date first seen    Duration Proto   Src IP Addr:Port    Dst IP Addr:Port   Packets    Bytes Flows"
    body = (
        f"{row['ts'][:10]} {row['ts'][11:23]}     0.000 TCP    {row['src']}:{row['src_port']}  ->  "
        f"{row['dst']}:{row['dst_port']}        1       40     1"
        for row in rows()
    )
    return "\n".join([head, *body, ""]).encode()


V3 = {
    "ts": "time", "src": "src_ip", "dst": "dst_ip", "src_port": "src_port", "dst_port": "dst_port",
    "proto": "protocol", "ttl": "ttl", "tcp_flags": "tcp_flags", "size": "ip_len",
}  # fmt: skip
V4 = {"ts": "time", "src": "src_ip", "dst": "dst_net", "dst_port": "dst_port", "proto": "protocol"}
MAKE: dict[str, Callable[[], bytes]] = {
    "parquet": parquet,
    "csv": csv,
    "json": lambda: lines(lambda row: row),
    "zeek": zeek,
    "zeek-json": zeek_json,
    "eve": eve,
    "flowtuple3": lambda: flowtuple(**V3),
    "flowtuple4": lambda: flowtuple(**V4),
    "nfdump-text": nfdump_text,
    "pcap": pcap,
    "pcapng": pcapng,
}
BY_PROGRAMS = {"nfdump"}
"""Formats that a program of their own reads and nothing else writes."""

WHOLE_OR_NOTHING = {"parquet"}
"""Formats that cannot be read at all without their end."""

IN_BLOCKS = {"flowtuple3", "flowtuple4"}
"""Formats of blocks, of some fifty rows here, that are lost as a whole."""


def turned(data: bytes, *places: float) -> bytes:
    """With 16 bytes turned over at each place, given as a share of the length."""
    broken = bytearray(data)
    for place in places:
        at = int(place * len(data))
        broken[at : at + 16] = bytes(byte ^ 0xFF for byte in broken[at : at + 16])
    return bytes(broken)


def cut(data: bytes, share: float) -> bytes:
    """Cut where no row can end: 3 bytes after a byte that is a line's end, or any byte."""
    at = int(share * len(data))
    line = data.find(b"\n", at)
    return data[: line + 4] if 0 <= line < len(data) - 4 else data[:at]


NOISE = np.random.default_rng(0).bytes(5000)
DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "whole": lambda data: data,
    "whole.gz": gzip.compress,
    "empty": lambda data: b"",
    "cut in the head": lambda data: data[:12],
    "cut early": lambda data: cut(data, 0.1),
    "cut in the middle": lambda data: cut(data, 0.5),
    "cut late": lambda data: cut(data, 0.97),
    "turned in the middle": lambda data: turned(data, 0.5),
    "turned in three places": lambda data: turned(data, 0.1, 0.3, 0.5),
    "zeros inside": lambda data: data[: len(data) // 2] + bytes(500) + data[len(data) // 2 + 500 :],
    "noise inside": lambda data: data[: len(data) // 2] + NOISE + data[len(data) // 2 :],
    "noise after the head": lambda data: data[:30] + NOISE,
    "noise": lambda data: NOISE,
    "cut.gz": lambda data: gzip.compress(data)[: len(gzip.compress(data)) // 2],
    "turned.gz": lambda data: turned(gzip.compress(data), 0.5),
}


class Outcome(NamedTuple):
    """What became of one file."""

    flows: int
    lost: dict[str, int]  # rows, values, rest, file: counts
    reasons: list[str]
    rejected: int  # as the captures table has it


@pytest.fixture(scope="module")
def outcomes(ray_session: None, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Outcome]:
    """One ingest of all files; what it left, by file name."""
    folder = tmp_path_factory.mktemp("damage")
    captures = folder / "captures"
    captures.mkdir()
    for name, make in MAKE.items():
        data = make()
        for damage, spoil in DAMAGE.items():
            (captures / f"{name} {damage}").write_bytes(spoil(data))
    sets = [f"captures.paths={captures}", "ingest.n_buckets=1", "ingest.period=all", "captures.time_zone=UTC"]
    config = load(sets=sets, env={})
    workspace = Workspace.open(folder / "ws", config.ingest)
    outcome = Run(workspace, config).execute(("ingest",))
    assert outcome.exit_code == SOME_REJECTED
    written = workspace.table("flows").read(columns=["capture", "ts"])
    assert pc.min(written["ts"]).as_py().timestamp() >= START - 86_400 * 365 * 60
    counts = {row["values"]: row["counts"] for row in pc.value_counts(written["capture"]).to_pylist()}
    rejects = workspace.table("rejects").read().to_pylist()
    known = {row["path"]: row for row in workspace.table("captures").read().to_pylist()}
    found = {}
    for path in map(str, captures.iterdir()):
        row = known.get(path, {"flows": 0, "capture": "", "rejects": 0})  # a reader that failed leaves none
        mine = [reject for reject in rejects if reject["path"] == path]
        assert row["flows"] == counts.get(row["capture"], 0)
        lost = {kind: sum(r["count"] for r in mine if r["lost"] == kind) for kind in schema.LOST}
        reasons = [reject["reason"] for reject in mine]
        found[Path(path).name] = Outcome(row["flows"], lost, reasons, row["rejects"])
    assert outcome.stages["ingest"]["captures"] == len(found) == len(MAKE) * len(DAMAGE)
    return found


def test_every_format_has_its_turn() -> None:
    assert set(MAKE) | BY_PROGRAMS == set(READERS)


@pytest.mark.ray
@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("name", MAKE)
def test_damage(outcomes: dict[str, Outcome], name: str, damage: str) -> None:
    found = outcomes[f"{name} {damage}"]
    assert found.rejected == found.lost["rows"]
    assert not any("reader failed" in reason for reason in found.reasons), found.reasons
    if damage.startswith("whole"):
        assert found == (N, dict.fromkeys(schema.LOST, 0), [], 0)
        return
    assert found.flows <= N
    unseen = damage.startswith("turned in") and found.flows == N  # other values, where nothing sums them up
    assert found.reasons or unseen, "something is missing, and nothing says so"
    if damage == "empty":
        assert (found.flows, found.reasons) == (0, ["empty file"])
    elif damage == "noise":
        assert (found.flows, found.lost["file"]) == (0, 1)
    elif damage.startswith("cut"):
        share = {"cut early": 0.1, "cut in the middle": 0.5, "cut late": 0.97}.get(damage, 0.0)
        at_least = 0 if name in WHOLE_OR_NOTHING else int(share * N) - (60 if name in IN_BLOCKS else 2)
        assert at_least <= found.flows < N
    elif damage.endswith("inside") or damage.startswith("turned in"):
        assert found.flows >= 0.6 * N, "a bad place costs its surroundings"
