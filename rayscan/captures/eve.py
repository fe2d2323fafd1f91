"""Suricata's EVE JSON -> flows.

EVE is one stream of events of many types. Those of type `flow` are connections; the others (alerts, DNS,
statistics) are skipped and counted, since an alert's connection has its own flow event. What goes to the
server is the flow: Suricata takes the side that it saw first for the client.

| flow      | EVE                                                                        |
|-----------|----------------------------------------------------------------------------|
| ts        | flow.start, which has a zone; `timestamp` is when the flow was given up    |
| dst_port  | dest_port; for ICMP icmp_type                                              |
| size      | flow.bytes_toserver, link layer included                                   |
| packets   | flow.pkts_toserver                                                         |
| tcp_flags | tcp.tcp_flags_ts, in hexadecimal                                           |
| sensor    | host (`sensor-name` in suricata.yaml)                                      |
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import BinaryIO

import pyarrow as pa
import pyarrow.compute as pc

from rayscan.captures.columns import BATCH, Batch, Converter, Reject
from rayscan.captures.jsonlines import Objects, read_objects
from rayscan.config import CapturesConfig

_KEYS = {
    "ts": ("flow", "start"),
    "src": ("src_ip",),
    "dst": ("dest_ip",),
    "src_port": ("src_port",),
    "dst_port": ("dest_port",),
    "proto": ("proto",),
    "icmp_type": ("icmp_type",),
    "icmp_code": ("icmp_code",),
    "size": ("flow", "bytes_toserver"),
    "packets": ("flow", "pkts_toserver"),
    "tcp_flags": ("tcp", "tcp_flags_ts"),
    "sensor": ("host",),
}
_TYPE = {"event_type": ("event_type",)}

_EVENTS = ("alert", "anomaly", "dhcp", "dns", "drop", "fileinfo", "http", "netflow", "quic", "rdp", "smb",
           "smtp", "snmp", "ssh", "stats", "tls")  # fmt: skip
"""Types that are named when they are skipped. The others are "other": a damaged file can invent many."""


def read_eve(file: BinaryIO, path: str, config: CapturesConfig, batch_rows: int) -> Iterator[Batch]:
    """The flow events of a file of EVE JSON lines, as flows.

    Rows are numbered from 0 over events of all types, without blank lines. Raises FormatError for damage.
    """
    names = {key: ".".join(place) for key, place in _KEYS.items() if key != "icmp_type"}
    converter = Converter(path, names, config)
    for objects in read_objects(file, path, _KEYS | _TYPE, batch_rows):
        is_flow = pc.fill_null(pc.equal(objects.columns["event_type"], "flow"), False)
        rejects = objects.rejects + _skipped(objects)
        if rejects:
            yield Batch(BATCH.empty_table(), rejects)
        rows = objects.rows[is_flow.to_numpy(zero_copy_only=False)]
        if len(rows):
            flows = {key: objects.columns[key].filter(is_flow) for key in _KEYS}
            yield converter.convert(_columns(flows), rows)


def _skipped(objects: Objects) -> list[Reject]:
    kinds = objects.columns["event_type"]
    named = pc.if_else(pc.fill_null(pc.is_in(kinds, pa.array(("flow", *_EVENTS))), False), kinds, "other")
    return [
        Reject(
            f"{entry['values']} event, no flow",
            int(objects.rows[pc.index(named, entry["values"]).as_py()]),
            entry["counts"],
            "left out",
        )
        for entry in named.value_counts().to_pylist()
        if entry["values"] != "flow"
    ]


def _columns(flows: dict[str, pa.Array]) -> dict[str, pa.Array]:
    kind = flows.pop("icmp_type")
    flows["dst_port"] = pc.coalesce(kind, flows["dst_port"])
    flows["tcp_flags"] = pc.binary_join_element_wise("0x", flows["tcp_flags"], "")
    return flows
