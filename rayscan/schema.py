"""The columns of every table, as Arrow types that survive a Delta table unchanged.

Delta has no unsigned integers, fixed-size lists or large strings, so addresses are int64 (0 to 2^32-1),
ports int32, vectors list<float32>. A value that a capture does not record is null in `flows`, and
`MISSING` inside the lists of `sequences`, so that these turn into numpy arrays without a copy.
Partition columns (`period`, `bucket`, ...) stand in the paths, not in the files: `tables.py` adds them.
"""

from __future__ import annotations

import pyarrow as pa

VERSION = 2
"""Version of everything below. Workspaces of another are refused; `rayscan upgrade` brings older ones here.

2: sequences have src_port and icmp_code.
"""

MISSING = -1

TIME = pa.timestamp("us", tz="UTC")

FLOWS = pa.schema(
    [
        pa.field("ts", TIME, nullable=False),
        pa.field("src", pa.int64(), nullable=False),
        pa.field("dst", pa.int64()),
        pa.field("dst_port", pa.int32()),  # ICMP: the type
        pa.field("proto", pa.int16(), nullable=False),
        pa.field("sensor", pa.string()),  # which telescope or vantage point
        pa.field("capture", pa.string(), nullable=False),  # content hash of the file it came from
        pa.field("src_port", pa.int32()),
        pa.field("ttl", pa.int16()),
        pa.field("size", pa.int64()),  # bytes
        pa.field("packets", pa.int64()),
        pa.field("tcp_flags", pa.int16()),
        pa.field("icmp_code", pa.int16()),
        pa.field("fingerprint", pa.int16()),  # bit set: 1 ZMap, 2 masscan, 4 Mirai
        pa.field("label", pa.string()),  # what the capture itself says of the source
    ]
)

FINGERPRINTS = {"zmap": 1, "masscan": 2, "mirai": 4}

SEQUENCE_LISTS = {
    "dst": pa.int64(),
    "dst_port": pa.int32(),
    "proto": pa.int16(),
    "gap_us": pa.int64(),  # since the flow before; the first of a sequence has 0
    "ttl": pa.int16(),
    "size": pa.int64(),
    "tcp_flags": pa.int16(),
    "src_port": pa.int32(),
    "icmp_code": pa.int16(),
}
"""Per-flow columns of a sequence. dst and the last five are null lists where no flow records them, though
some could: an ICMP code is not missing where nobody pings."""

SEQUENCES = pa.schema(
    [
        pa.field("sequence_id", pa.int64(), nullable=False),
        pa.field("src", pa.int64(), nullable=False),
        pa.field("index", pa.int32(), nullable=False),  # 0, 1, ... within source and period
        pa.field("sequences", pa.int32(), nullable=False),  # how many the source has in the period
        pa.field("start", TIME, nullable=False),
        pa.field("end", TIME, nullable=False),
        pa.field("length", pa.int32(), nullable=False),
        *(pa.field(name, pa.list_(kind)) for name, kind in SEQUENCE_LISTS.items()),
        *(pa.field(name, pa.float32()) for name in FINGERPRINTS),  # share of flows, null if unrecorded
        pa.field("label", pa.string()),  # the label most of its flows carry
    ]
)

EMBEDDINGS = pa.schema(
    [
        pa.field("sequence_id", pa.int64(), nullable=False),
        pa.field("src", pa.int64(), nullable=False),
        pa.field("start", TIME, nullable=False),
        pa.field("vector", pa.list_(pa.float32()), nullable=False),
    ]
)

CLUSTERS = pa.schema(
    [
        pa.field("sequence_id", pa.int64(), nullable=False),
        pa.field("src", pa.int64(), nullable=False),
        pa.field("cluster", pa.int64(), nullable=False),  # 0, 1, ... within run and period
        pa.field("weight_own", pa.float64(), nullable=False),  # sum of similarity - threshold, own cluster
        pa.field("weight_next", pa.float64()),  # the same for the best other of the heavy ones; null if none
    ]
)

PORT = pa.struct([("proto", pa.int16()), ("port", pa.int32()), ("share", pa.float64())])
LABEL = pa.struct([("label", pa.string()), ("sources", pa.int64())])
SCANNER = pa.struct([("organisation", pa.string()), ("sources", pa.int64())])

SUMMARY = pa.schema(
    [
        pa.field("cluster", pa.int64()),
        pa.field("sequences", pa.int64(), nullable=False),
        pa.field("sources", pa.int64(), nullable=False),
        pa.field("networks", pa.int64(), nullable=False),  # distinct /24 of the sources
        pa.field("flows", pa.int64(), nullable=False),
        pa.field("first", TIME),
        pa.field("last", TIME),
        pa.field("ports", pa.list_(PORT)),  # share of flows; a port that is not recorded is null
        pa.field("labels", pa.list_(LABEL)),
        pa.field("labelled", pa.int64(), nullable=False),  # sources with any label
        pa.field("scanners", pa.list_(SCANNER)),  # known scanners; null if no list was there to ask
        pa.field("known", pa.int64()),  # sources that are known scanners
        pa.field("days_off", pa.int32()),  # most days between flows and the entry that names their source
        *(pa.field(name, pa.float64()) for name in FINGERPRINTS),  # share of flows
        pa.field("destinations", pa.int64()),  # distinct; null if none is recorded
        pa.field("median_gap_us", pa.int64()),  # between flows of a source; null without two flows
        pa.field("cohesion", pa.float64()),  # mean similarity - threshold to the others; null if alone
        pa.field("examples", pa.list_(pa.int64())),  # sources with the most flows
    ]
)
"""What a cluster consists of."""

CAMPAIGNS = pa.schema(
    [
        pa.field("campaign", pa.string(), nullable=False),  # the same name in every period
        pa.field("event", pa.string(), nullable=False),  # born, continued, split, merged, gone
        pa.field("relative", pa.string()),  # split: where it came from; merged: where it went
        pa.field("began", TIME, nullable=False),  # first flow of the campaign in any period
        *SUMMARY,  # of its cluster; merged and gone campaigns have none: cluster is null, counts are 0
        pa.field("feature_sum", pa.list_(pa.float64()), nullable=False),  # of its last cluster
        pa.field("size", pa.int64(), nullable=False),  # sequences of its last cluster
        pa.field("absent", pa.int32(), nullable=False),  # periods since it last had a cluster
    ]
)

SCANNERS = pa.schema(
    [
        pa.field("network", pa.int64(), nullable=False),
        pa.field("length", pa.int16(), nullable=False),  # of the prefix
        pa.field("organisation", pa.string(), nullable=False),
        pa.field("kind", pa.string(), nullable=False),  # scanner or botnet
        pa.field("source", pa.string(), nullable=False),  # whose list it is
        pa.field("valid_from", pa.date32(), nullable=False),  # first and last day the list vouches for
        pa.field("valid_to", pa.date32(), nullable=False),
    ]
)
"""Lists of known scanners."""

CAPTURES = pa.schema(
    [
        pa.field("capture", pa.string(), nullable=False),
        pa.field("path", pa.string(), nullable=False),
        pa.field("bytes", pa.int64(), nullable=False),
        pa.field("modified", TIME),
        pa.field("format", pa.string(), nullable=False),
        pa.field("flows", pa.int64(), nullable=False),
        pa.field("rejects", pa.int64(), nullable=False),  # rows that could not be read, as far as counted
        pa.field("left_out", pa.int64(), nullable=False),  # rows that are no flows, or not by the settings
        pa.field("duplicates", pa.int64(), nullable=False),  # exact duplicate rows seen, kept or not
        pa.field("first", TIME),
        pa.field("last", TIME),
    ]
)

LEASES = pa.schema(
    [
        pa.field("token", pa.string(), nullable=False),  # tells one holder from every other
        pa.field("owner", pa.string(), nullable=False),  # for people: machine and process
        pa.field("machine", pa.string(), nullable=False),  # within which process numbers mean something
        pa.field("process", pa.string(), nullable=False),  # number and start of the process
        pa.field("taken", TIME, nullable=False),
        pa.field("renewed", TIME, nullable=False),
        pa.field("expires", TIME, nullable=False),
    ]
)
"""Who is at work on what, one row a lease: see `lease.py`."""

REJECTS = pa.schema(
    [
        pa.field("capture", pa.string(), nullable=False),
        pa.field("path", pa.string(), nullable=False),
        pa.field("offset", pa.int64()),  # row or byte where it first happened
        pa.field("reason", pa.string(), nullable=False),
        pa.field("count", pa.int64(), nullable=False),  # rows or values; 1 for a file or its rest
        pa.field("lost", pa.string(), nullable=False),  # what: one of LOST
    ]
)

LOST = ("rows", "left out", "values", "rest", "file")
"""Rows that could not be read; rows that were read and are no flows, by their kind or by a setting; values of
optional columns, whose rows are there; the rest of a file from the offset on, of unknown size; a file of
which nothing was read."""
