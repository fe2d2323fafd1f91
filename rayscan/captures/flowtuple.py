"""CAIDA's FlowTuple, version 3 and 4 (Avro) -> flows.

Corsaro, the program at the UCSD telescope, counts packets that agree in their headers for an interval (one
minute in version 3, five in version 4) and writes the counts at its end. `time` is the interval's start. So
**within an interval nothing is known of time or order**: gaps are 0 or whole intervals, and flows of equal
time stand in the order of the file, which corsaro sorts. Version 4 puts together all packets of a source
to one port of a destination *network*.

| flow        | version 3                       | version 4                                           |
|-------------|---------------------------------|-----------------------------------------------------|
| dst         | dst_ip                          | unknown                                             |
| dst_port    | dst_port; ICMP: src_port (type) | dst_port; ICMP: its upper byte (type)               |
| icmp_code   | dst_port                        | lower byte of dst_port                              |
| packets     | packet_cnt                      | packet_cnt                                          |
| size        | ip_len × packet_cnt             | of common_pktsizes, where these cover all packets   |
| src_port    | src_port                        | the most frequent of common_srcports                |
| ttl         | ttl                             | the most frequent of common_ttls                    |
| tcp_flags   | tcp_flags                       | the most frequent of common_tcpflags                |
| fingerprint | is_masscan                      | unknown                                             |

`is_spoofed` is not used: it is CAIDA's own guess, and flows that it marks are kept like all others.
Names are accepted as corsaro writes them (time, packet_cnt, tcp_flags) and as pyavro-stardust shows
them (timestamp, packets, tcpflags).

Sources: libcorsaro_flowtuple.h and libcorsaro3_filtering.c of CAIDA/corsaro3, pyavro-stardust.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import BinaryIO

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from rayscan.captures.avro import BOOLEAN, LIST, NULL, WHOLE, Header, read_header, read_rows
from rayscan.captures.columns import BATCH, Batch, Converter
from rayscan.captures.values import Ints
from rayscan.config import CapturesConfig
from rayscan.errors import SchemaError

_NAMES = {
    "ts": ("time", "timestamp"),
    "src": ("srcip",),
    "dst": ("dstip",),
    "net": ("dstnet",),
    "src_port": ("srcport",),
    "dst_port": ("dstport",),
    "proto": ("protocol",),
    "packets": ("packetcnt", "packets"),
    "ttl": ("ttl",),
    "tcp_flags": ("tcpflags",),
    "length": ("iplen",),
    "masscan": ("ismasscan",),
    "sizes": ("commonpktsizes",),
    "size_counts": ("commonpktsizefreqs",),
    "ttls": ("commonttls",),
    "ttl_counts": ("commonttlfreqs",),
    "ports": ("commonsrcports",),
    "port_counts": ("commonsrcportfreqs",),
    "flags": ("commontcpflags",),
    "flag_counts": ("commontcpflagfreqs",),
}
"""Names of fields, without underscores."""

_REQUIRED = ("ts", "src", "dst_port", "proto", "packets")
_COMMON = {
    "ttl": ("ttls", "ttl_counts"),
    "src_port": ("ports", "port_counts"),
    "tcp_flags": ("flags", "flag_counts"),
}
_ROWS = 1 << 16  # at a time: 380 bytes each in version 4
_ICMP, _TCP = 1, 6

Found = Mapping[str, Ints]


def read_flowtuple(file: BinaryIO, path: str, config: CapturesConfig, batch_rows: int) -> Iterator[Batch]:
    """Flows of a FlowTuple file; which version is told by its fields.

    Rows are numbered from 0. Raises FormatError for damage, after the flows before it, SchemaError for an
    Avro file of something else.
    """
    header = read_header(file, path)
    fields = _resolve(header, path)
    converter = Converter(path, fields | {"size": "ip_len"}, config.model_copy(update={"time_unit": "s"}))
    wanted = [name for key, name in fields.items() if key != "net"]
    for rows in read_rows(file, path, header, wanted, min(batch_rows, _ROWS)):
        if rows.rejects:
            yield Batch(BATCH.empty_table(), rows.rejects)
        found = {key: rows.columns[name] for key, name in fields.items() if key != "net"}
        numbers = np.arange(rows.first, rows.first + len(found["ts"]))
        columns = _version_3(found) if "dst" in fields else _version_4(found)
        if len(numbers):
            yield converter.convert({key: _array(values) for key, values in columns.items()}, numbers)


def _resolve(header: Header, path: str) -> dict[str, str]:
    """The file's name of each field that is used."""
    names = {name.lower().replace("_", ""): name for name in header.names}
    fields = {}
    for key, candidates in _NAMES.items():
        name = next((names[candidate] for candidate in candidates if candidate in names), None)
        kinds = (
            (LIST,) if key.endswith("s") and key not in ("ts", "packets", "tcp_flags") else (WHOLE, BOOLEAN)
        )
        if name is not None and header.plan[0, header.names.index(name)] in kinds:
            fields[key] = name
    absent = [key for key in _REQUIRED if key not in fields]
    if absent or not {"dst", "net"} & set(fields):
        shown = ", ".join(name[:40] for name in header.names[:40])
        raise SchemaError(f"{path}: Avro records of {shown} are no FlowTuple; convert them to Parquet")
    return fields


def _version_3(found: Found) -> dict[str, Ints]:
    columns = {key: values for key, values in found.items() if key in (*_REQUIRED, "dst", "ttl", "masscan")}
    icmp = found["proto"] == _ICMP
    if "src_port" in found:
        columns["src_port"] = np.where(icmp, NULL, found["src_port"])
        columns["dst_port"] = np.where(icmp, found["src_port"], found["dst_port"])
        columns["icmp_code"] = np.where(icmp, found["dst_port"], NULL)
    if "tcp_flags" in found:
        columns["tcp_flags"] = _of_tcp(found["tcp_flags"], found)
    if "length" in found:
        length, packets = found["length"], found["packets"]
        columns["size"] = np.where((length == NULL) | (packets == NULL), NULL, length * packets)
    return columns


def _version_4(found: Found) -> dict[str, Ints]:
    columns = {key: found[key] for key in _REQUIRED}
    for key, (values, counts) in _COMMON.items():
        if values in found and counts in found:
            columns[key] = _most_frequent(found[values], found[counts])
    if "tcp_flags" in columns:
        columns["tcp_flags"] = _of_tcp(columns["tcp_flags"], found)
    if "sizes" in found and "size_counts" in found:
        size, packets = (np.where(found[key] == NULL, 0, found[key]) for key in ("sizes", "size_counts"))
        columns["size"] = np.where(packets.sum(1) == found["packets"], (size * packets).sum(1), NULL)
    return columns


def _of_tcp(flags: Ints, found: Found) -> Ints:
    return np.where(found["proto"] == _TCP, flags, NULL)


def _most_frequent(values: NDArray[np.int64], counts: NDArray[np.int64]) -> Ints:
    """Of each row's values (N, k) the one that is counted most often; the first of equals."""
    best: Ints = values[np.arange(len(values)), counts.argmax(1)]
    return best


def _array(values: Ints) -> pa.Array:
    missing = values == NULL
    return pa.array(values, mask=missing if missing.any() else None)
