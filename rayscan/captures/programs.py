"""What the tables of known programs leave unsaid: units, zones, and where type and code of ICMP stand.

A table is told by its header, since nothing else names the program. All are read as CSV; what is here is done
to a block's columns before they become flows. Other tables need none of it.

| program       | header has              | what is known                                            |
|---------------|-------------------------|----------------------------------------------------------|
| Spoki         | anum, snum, probed      | times in ms; one column for each TCP flag                |
| SiLK rwcut    | sIP, dIP, pro           | times in UTC                                             |
| Argus ra      | StartTime, SrcAddr, Dir | of ICMP the source port holds code and type, as 0xCCTT   |
| nfdump -o csv | ts, te, ibyt            | a summary stands behind the rows                         |

SiLK and nfdump write ICMP's type and code as one port, type × 256 + code, as NetFlow does; the converter
knows that of all tables.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import pyarrow as pa
import pyarrow.compute as pc

from rayscan.captures.values import trimmed

Columns = dict[str, pa.Array]


def _same(columns: Columns) -> Columns:
    return columns


@dataclass(frozen=True)
class Program:
    header: frozenset[str]  # columns that tell it, in lower case
    settings: Mapping[str, str] = field(default_factory=dict)  # of CapturesConfig
    extra: tuple[str, ...] = ()  # columns that `adapt` needs, by these names
    adapt: Callable[[Columns], Columns] = _same
    end: bytes = b""  # the line behind the last row


def program_of(names: Sequence[str]) -> Program:
    """The program whose header this is; one that says nothing if it is none of them."""
    there = {name.lower() for name in names}
    return next((program for program in PROGRAMS if program.header <= there), Program(frozenset()))


def _spoki(columns: Columns) -> Columns:
    columns = dict(columns)
    names = [name for name in ("syn", "ack", "rst", "fin") if name in columns]
    words = [pc.if_else(pc.equal(columns.pop(name), "1"), name, "") for name in names]
    return columns | {"tcp_flags": pc.binary_join_element_wise(*words, " ")} if words else columns


def _argus(columns: Columns) -> Columns:
    if not {"src_port", "proto"} <= set(columns):
        return columns
    icmp = pc.equal(trimmed(columns["proto"]), "icmp")
    ports = trimmed(columns["src_port"]).dictionary_encode()
    swapped = [_swapped(port) for port in ports.dictionary.to_pylist()]
    kinds = pa.array(swapped, pa.string()).take(ports.indices)
    return columns | {
        "dst_port": pc.if_else(icmp, kinds, columns["dst_port"]),
        "src_port": pc.if_else(icmp, None, columns["src_port"]),
    }


def _swapped(port: str) -> str | None:
    """type × 256 + code from 0xCCTT."""
    match = re.fullmatch(r"0x([0-9a-fA-F]{2})([0-9a-fA-F]{2})", port)
    return f"0x{match[2]}{match[1]}" if match else port


PROGRAMS = (
    Program(frozenset({"anum", "snum", "probed"}), {"time_unit": "ms"}, ("syn", "ack", "rst", "fin"), _spoki),
    Program(frozenset({"sip", "dip", "pro"}), {"time_zone": "UTC"}),
    Program(frozenset({"starttime", "srcaddr", "dir"}), adapt=_argus),
    Program(frozenset({"ts", "te", "ibyt"}), end=b"Summary"),
)
