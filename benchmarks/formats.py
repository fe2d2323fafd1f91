"""Readers of logs: rows per second of one core, from bytes in memory to batches of flows.

    python -m benchmarks.formats [zeek] [flowtuple] [--rows 300000]

Zeek: conn.log as text, beside polars' and Arrow's CSV parsers on the same bytes (all columns, types
inferred), which is the least that any reader has to do. FlowTuple: version 3 and 4, beside fastavro (a dict
for each record) and polars (the columns in use). One thread; the best of three runs, taken in turn.
"""

from __future__ import annotations

import argparse
import io
import os
import time
from collections.abc import Callable, Iterator
from typing import Any

os.environ.setdefault("POLARS_MAX_THREADS", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import fastavro
import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.csv as pacsv

from rayscan.captures.detect import read_capture
from rayscan.config import CapturesConfig

NAMES = (
    "ts uid id.orig_h id.orig_p id.resp_h id.resp_p proto service duration orig_bytes resp_bytes conn_state"
    " local_orig local_resp missed_bytes history orig_pkts orig_ip_bytes resp_pkts resp_ip_bytes"
    " tunnel_parents"
)
TYPES = (
    "time string addr port addr port enum string interval count count string bool bool count string count"
    " count count count set[string]"
)
ARRAY = {"type": "array", "items": "long"}
GEO = dict.fromkeys(("maxmind_continent", "maxmind_country", "netacq_continent", "netacq_country"), "string")
V3: dict[str, Any] = (
    dict.fromkeys(("time", "src_ip", "dst_ip"), "long")
    | dict.fromkeys(("src_port", "dst_port", "protocol", "ttl", "tcp_flags", "ip_len"), "int")
    | dict.fromkeys(("tcp_synlen", "tcp_synwinlen"), "int")
    | {"packet_cnt": "long", "is_spoofed": "int", "is_masscan": "int"} | GEO | {"prefix2asn": "long"}
)  # fmt: skip
V4: dict[str, Any] = (
    dict.fromkeys(("time", "src_ip", "dst_net"), "long")
    | {"dst_port": "int", "protocol": "int", "packet_cnt": "long"}
    | dict.fromkeys([f"uniq_{n}" for n in ("dst_ips", "pkt_sizes", "ttls", "src_ports", "tcp_flags")], "int")
    | dict.fromkeys(("first_syn_length", "first_tcp_rwin"), "int")
    | {f"common_{n}{end}": ARRAY for n in ("pktsize", "ttl", "srcport", "tcpflag") for end in ("s", "_freqs")}
    | GEO | {"prefix2asn": "long"}
)  # fmt: skip
UNUSED = ("uniq", "first", "maxmind", "netacq", "prefix", "tcp_syn", "is_spoofed", "dst_net")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("what", nargs="*", default=["zeek", "flowtuple"])
    parser.add_argument("--rows", type=int, default=300_000)
    options = parser.parse_args()
    if "zeek" in options.what:
        zeek(options.rows)
    if "flowtuple" in options.what:
        for version, fields in ((3, V3), (4, V4)):
            for codec in ("deflate", "snappy"):
                flowtuple(version, fields, codec, options.rows)


def read(data: bytes) -> int:
    _, batches = read_capture(io.BytesIO(data), "benchmark", CapturesConfig(), 500_000)
    return sum(batch.flows.num_rows for batch in batches)


def compare(title: str, rows: int, ways: dict[str, Callable[[], Any]]) -> None:
    """CPU seconds of this thread's process, best of three, the ways in turn."""
    best = dict.fromkeys(ways, float("inf"))
    for turn in range(4):  # the first compiles and warms up
        for name, way in ways.items():
            start = time.process_time()
            way()
            if turn:
                best[name] = min(best[name], time.process_time() - start)
    shown = ", ".join(f"{name} {rows / seconds / 1e6:.3f}" for name, seconds in best.items())
    ours = best["rayscan"]
    ratios = ", ".join(
        f"{seconds / ours:.1f} × {name}" for name, seconds in best.items() if name != "rayscan"
    )
    print(f"{title}: M rows per CPU second: {shown}; rayscan is {ratios}", flush=True)


def zeek(rows: int) -> None:
    data = b"".join(line.encode() for line in conn_log(rows))
    body = data[data.index(b"\n1") + 1 : data.rindex(b"#close")]
    parse = pacsv.ParseOptions(delimiter="\t")
    reading = pacsv.ReadOptions(use_threads=False, column_names=NAMES.split(), block_size=16 << 20)
    assert read(data) == rows
    compare(
        f"Zeek conn.log, {rows:,} rows, {len(data) / rows:.0f} bytes each", rows,
        {
            "rayscan": lambda: read(data),
            "polars CSV": lambda: pl.read_csv(body, separator="\t", has_header=False),
            "Arrow CSV": lambda: pacsv.read_csv(pa.BufferReader(body), reading, parse),
        },
    )  # fmt: skip


def conn_log(rows: int) -> Iterator[str]:
    """Scans of a telescope: 85 % TCP SYN, 12 % UDP, 3 % ICMP."""
    rng = np.random.default_rng(1)
    sources = [".".join(map(str, quad)) for quad in rng.integers(1, 255, (20_000, 4)).tolist()]
    head = [
        "#separator \\x09",
        "#set_separator\t,",
        "#empty_field\t(empty)",
        "#unset_field\t-",
        "#path\tconn",
    ]
    head += ["#fields\t" + NAMES.replace(" ", "\t"), "#types\t" + TYPES.replace(" ", "\t")]
    yield "".join(line + "\n" for line in head)
    kinds = (("tcp", 23, "S0", "S", 40), ("udp", 53, "S0", "D", 60), ("icmp", 0, "OTH", "-", 84))
    ts = 1_704_067_200 + np.cumsum(rng.exponential(0.01, rows))
    which = rng.choice(3, rows, p=[0.85, 0.12, 0.03]).tolist()
    source, port, last = (rng.integers(0, top, rows).tolist() for top in (20_000, 65_536, 65_536))
    for k, time_s in enumerate(ts.tolist()):
        proto, dst_port, state, history, size = kinds[which[k]]
        src_port = 8 if proto == "icmp" else port[k]
        yield (
            f"{time_s:.6f}\tC{k:016x}\t{sources[source[k]]}\t{src_port}"
            f"\t198.18.{last[k] >> 8}.{last[k] & 255}\t{dst_port}\t{proto}"
            f"\t-\t-\t-\t-\t{state}\tF\tF\t0\t{history}\t1\t{size}\t0\t0\t-\n"
        )
    yield "#close\t2024-01-02-00-00-00\n"


def flowtuple(version: int, fields: dict[str, Any], codec: str, rows: int) -> None:
    data = container(version, fields, codec, rows)
    used = [name for name in fields if not name.startswith(UNUSED)]
    assert read(data) == rows
    compare(
        f"FlowTuple {version}, {codec}, {rows:,} records", rows,
        {
            "rayscan": lambda: read(data),
            "fastavro": lambda: sum(1 for _ in fastavro.reader(io.BytesIO(data))),
            "polars": lambda: pl.read_avro(io.BytesIO(data), columns=used),
        },
    )  # fmt: skip


def container(version: int, fields: dict[str, Any], codec: str, rows: int) -> bytes:
    rng = np.random.default_rng(version)
    values = {name: [1700000000 if name == "time" else "DE" if kind == "string" else 1] * rows
              for name, kind in fields.items()}  # fmt: skip
    for name, top in (
        ("src_ip", 2**32),
        ("dst_ip", 2**32),
        ("dst_net", 2**32),
        ("src_port", 65_536),
        ("dst_port", 65_536),
        ("packet_cnt", 6),
        ("prefix2asn", 65_536),
    ):
        if name in fields:
            values[name] = rng.integers(1, top, rows).tolist()
    for name, value in (
        ("common_pktsizes", 40),
        ("common_ttls", 240),
        ("common_srcports", 40_000),
        ("common_tcpflags", 2),
    ):
        if name in fields:
            values[name] = [[value]] * rows
            values[name[:-1] + "_freqs"] = [[count] for count in values["packet_cnt"]]
    values |= {"protocol": [6] * rows}
    schema = {"type": "record", "namespace": "org.caida.corsaro", "name": f"flowtuple{version}"}
    schema["fields"] = [{"name": name, "type": kind} for name, kind in fields.items()]  # type: ignore[assignment]
    file = io.BytesIO()
    records = (
        dict(zip(fields, row, strict=True)) for row in zip(*(values[name] for name in fields), strict=True)
    )
    fastavro.writer(file, schema, records, codec=codec)
    return file.getvalue()


if __name__ == "__main__":
    main()
