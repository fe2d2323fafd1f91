"""Parquet and pcap captures of a simulation.

`folder/captures/` holds nothing but captures, so that it can be given to `captures.paths` as it is; the truth
lies beside it. Files are written under another name outside of `captures/` and renamed when complete: a
killed run leaves no half capture. Captures are Parquet or pcap, never both, or every flow would count twice.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from rayscan.errors import ConfigError, DataError, SchemaError
from rayscan.simulate.campaigns import ICMP, TCP, UDP
from rayscan.simulate.telescope import FLOW_COLUMNS, TRUTH, Every, Simulation, simulate

Progress = Callable[[str, int, int], None]  # name of the file done, flows so far, flows in all

# Columns worth a dictionary; on the others Parquet would build one in vain.
_REPEATING = (
    "src_ip",
    "dst_port",
    "proto",
    "ttl",
    "size",
    "tcp_flags",
    "label",
    "campaign",
    "kind",
    "organisation",
)
_PCAP_ROWS = 100_000  # packets encoded at a time
_LINKTYPE_RAW = 101
_SNAPLEN = 65535
_RECORD = 16  # bytes of a pcap record's own header
_LONGEST = _RECORD + 20 + 20  # bytes of a packet that are not zero


@dataclass(frozen=True)
class Summary:
    """What was written."""

    captures: Path  # the folder to read
    files: tuple[Path, ...]
    truth: Path
    flows: int
    sources: int
    campaigns: int  # noise not counted
    bytes: int  # of the captures


def simulate_to(
    folder: str | Path,
    *,
    seed: int = 0,
    months: int = 3,
    start: str = "2024-01-01",
    sources: int = 2000,
    flows: int = 500_000,
    prefix: str = "198.18.0.0/16",
    every: Every = "month",
    pcap: bool = False,
    progress: Progress | None = None,
) -> Summary:
    """Simulate the default campaigns (see `simulate`) and write them: `write_parquet`, or pcap instead."""
    simulation = simulate(seed=seed, months=months, start=start, sources=sources, flows=flows, prefix=prefix)
    return _write(simulation, folder, every, ".pcap" if pcap else ".parquet", progress)


def write_parquet(
    simulation: Simulation,
    folder: str | Path,
    *,
    every: Every = "month",
    progress: Progress | None = None,
) -> Summary:
    """Write `folder/captures/2024-01.parquet` and so on (one a month or day), and `folder/truth.parquet`.

    Days without a flow get no file. Files of the same names are replaced. Raises ConfigError if `captures/`
    holds anything else, which would be read together with this simulation.
    """
    return _write(simulation, folder, every, ".parquet", progress)


def _write(
    simulation: Simulation, folder: str | Path, every: Every, suffix: str, progress: Progress | None
) -> Summary:
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"{folder} is a file; the captures need a folder")
    captures, truth = folder / "captures", folder / "truth.parquet"
    captures.mkdir(parents=True, exist_ok=True)
    _refuse_strangers(captures, simulation, every, suffix)
    truth.unlink(missing_ok=True)  # an older one must not stand beside new captures
    encode = _encode_pcap if suffix == ".pcap" else partial(_encode_parquet, FLOW_COLUMNS)
    files, done = [], 0
    for name, tables in simulation.parts(every):
        path = captures / (name + suffix)
        rows = _put_file(path, folder, partial(encode, tables))
        if rows:
            files.append(path)
            done += rows
            if progress is not None:
                progress(path.name, done, simulation.n_flows)
    _put_file(truth, folder, partial(_encode_parquet, TRUTH, [simulation.truth]))
    n_campaigns = sum(c.kind != "noise" for c in simulation.campaigns)
    n_bytes = sum(path.stat().st_size for path in files)
    return Summary(captures, tuple(files), truth, done, simulation.n_sources, n_campaigns, n_bytes)


def _refuse_strangers(captures: Path, simulation: Simulation, every: Every, suffix: str) -> None:
    expected = {name + suffix for name in simulation.names(every)}
    strangers = sorted(path.name for path in captures.iterdir() if path.name not in expected)
    if strangers:
        raise ConfigError(
            f"{captures} holds {len(strangers)} files that are not of this simulation, such as "
            f"{strangers[0]!r}: choose another folder or remove them"
        )


def _put_file(path: Path, folder: Path, encode: Callable[[BinaryIO], int]) -> int:
    """Rows written to `path`: the whole file or, on any failure or without rows, none at all."""
    unfinished = folder / f".{path.name}.partial"
    try:
        with unfinished.open("wb") as file:
            rows = encode(file)
        if rows:
            unfinished.replace(path)
        else:
            path.unlink(missing_ok=True)
        return rows
    finally:
        unfinished.unlink(missing_ok=True)


def _encode_parquet(schema: pa.Schema, tables: Iterable[pa.Table], file: BinaryIO) -> int:
    """Rows written: one row group a table."""
    rows = 0
    repeating = [name for name in schema.names if name in _REPEATING]
    with pq.ParquetWriter(file, schema, compression="zstd", use_dictionary=repeating) as writer:
        for table in tables:
            writer.write_table(table)
            rows += table.num_rows
    return rows


def _encode_pcap(tables: Iterable[pa.Table], file: BinaryIO) -> int:
    rows = 0
    file.write(_pcap_header())
    for table in tables:
        _write_packets(table, file)
        rows += table.num_rows
    return rows


def write_pcap(table: pa.Table, file: BinaryIO) -> None:
    """Write flows (columns FLOW_COLUMNS, `label` not needed) as a pcap file: microseconds, raw IPv4.

    Headers carry what the table says, checksums are right, and what `size` leaves beyond them is zero:
    end-of-options for TCP, payload else. Raises SchemaError for a missing column, DataError for a protocol
    other than TCP, UDP and ICMP, a size that its headers do not fit in, or a time outside 1970 to 2106.
    """
    missing = [name for name in FLOW_COLUMNS.names if name != "label" and name not in table.column_names]
    if missing:
        raise SchemaError(f"flows lack {', '.join(missing)}; a packet cannot be written without")
    file.write(_pcap_header())
    _write_packets(table, file)


def _pcap_header() -> bytes:
    return struct.pack("<IHHiIII", 0xA1B2C3D4, 2, 4, 0, 0, _SNAPLEN, _LINKTYPE_RAW)


def _write_packets(table: pa.Table, file: BinaryIO) -> None:
    for at in range(0, table.num_rows, _PCAP_ROWS):
        file.write(_encode(_numpy(table.slice(at, _PCAP_ROWS))).data)


def _numpy(table: pa.Table) -> dict[str, NDArray[np.int64]]:
    """All columns but the label as int64, nulls as 0."""
    names = [name for name in FLOW_COLUMNS.names if name != "label"]
    return {name: table[name].cast(pa.int64()).fill_null(0).to_numpy() for name in names}


def _encode(flows: dict[str, NDArray[np.int64]]) -> NDArray[np.uint8]:
    """The records of these packets, one after the other."""
    _check(flows)
    size, proto = flows["size"], flows["proto"]
    heads = np.zeros((len(size), _LONGEST), np.uint8)
    _put_record_header(heads, flows)
    _put_ip(heads, flows)
    for number, put in ((TCP, _put_tcp), (UDP, _put_udp), (ICMP, _put_icmp)):
        rows = np.flatnonzero(proto == number)
        if len(rows):
            block = heads[rows]
            put(block, {name: values[rows] for name, values in flows.items()})
            heads[rows] = block
    length = _RECORD + size
    packets = np.zeros(int(length.sum()), np.uint8)
    within = np.arange(_LONGEST) < length[:, None]
    position = (np.cumsum(length) - length)[:, None] + np.arange(_LONGEST)
    packets[position[within]] = heads[within]
    return packets


def _check(flows: dict[str, NDArray[np.int64]]) -> None:
    proto, size, ts = flows["proto"], flows["size"], flows["ts"]
    unknown = np.setdiff1d(proto, (ICMP, TCP, UDP))
    if len(unknown):
        raise DataError(f"protocol {unknown[0]} has no packet format here; write TCP, UDP and ICMP only")
    tcp = proto == TCP
    bad = (size < np.where(tcp, 40, 28)) | (size > np.where(tcp, 80, _SNAPLEN)) | (tcp & (size % 4 > 0))
    if bad.any():
        i = int(np.argmax(bad))
        raise DataError(f"flow {i}: size {size[i]} does not fit the headers of protocol {proto[i]}")
    if len(ts) and (ts.min() < 0 or ts.max() >= 1_000_000 << 32):
        raise DataError("a pcap file holds times from 1970 to 2106 only")


def _put(block: NDArray[np.uint8], at: int, value: Any, width: int) -> None:
    """Write `value` (N,) as big-endian bytes into columns at, ..., at + width - 1 after the record header."""
    for i in range(width):
        block[:, _RECORD + at + i] = (value >> (8 * (width - 1 - i))) & 0xFF


def _put_record_header(heads: NDArray[np.uint8], flows: dict[str, NDArray[np.int64]]) -> None:
    """Seconds, microseconds, captured and original length, little-endian."""
    seconds, micros = np.divmod(flows["ts"], 1_000_000)
    words = np.stack((seconds, micros, flows["size"], flows["size"]), axis=1).astype("<u4")
    heads[:, :_RECORD] = words.view(np.uint8)


def _put_ip(heads: NDArray[np.uint8], flows: dict[str, NDArray[np.int64]]) -> None:
    """RFC 791: version and length, no fragments, header checksum."""
    heads[:, _RECORD] = 0x45
    for at, name, width in ((2, "size", 2), (4, "ip_id", 2), (8, "ttl", 1), (9, "proto", 1)):
        _put(heads, at, flows[name], width)
    _put(heads, 12, flows["src_ip"], 4)
    _put(heads, 16, flows["dst_ip"], 4)
    _put(heads, 10, _checksum(_word_sum(heads, 0, 20)), 2)


def _put_tcp(block: NDArray[np.uint8], flows: dict[str, NDArray[np.int64]]) -> None:
    """RFC 9293; options are all end-of-list."""
    _put(block, 20, flows["src_port"], 2)
    _put(block, 22, flows["dst_port"], 2)
    _put(block, 24, flows["tcp_seq"], 4)
    _put(block, 32, (flows["size"] - 20) << 2, 1)  # header length in words, upper half of the byte
    _put(block, 33, flows["tcp_flags"], 1)
    _put(block, 34, 65535 + 0 * flows["size"], 2)  # window
    _put(block, 36, _checksum(_word_sum(block, 20, 40) + _pseudo_header(block, flows)), 2)


def _put_udp(block: NDArray[np.uint8], flows: dict[str, NDArray[np.int64]]) -> None:
    """RFC 768; a checksum of 0 would mean none and is sent as its complement."""
    _put(block, 20, flows["src_port"], 2)
    _put(block, 22, flows["dst_port"], 2)
    _put(block, 24, flows["size"] - 20, 2)
    checksum = _checksum(_word_sum(block, 20, 28) + _pseudo_header(block, flows))
    _put(block, 26, np.where(checksum == 0, 0xFFFF, checksum), 2)


def _put_icmp(block: NDArray[np.uint8], flows: dict[str, NDArray[np.int64]]) -> None:
    """RFC 792: type, code 0, checksum."""
    _put(block, 20, flows["dst_port"], 1)
    _put(block, 22, _checksum(_word_sum(block, 20, 28)), 2)


def _word_sum(block: NDArray[np.uint8], first: int, stop: int) -> NDArray[np.int64]:
    """Sum of the 16-bit words in these bytes of each packet."""
    words = block[:, _RECORD + first : _RECORD + stop].astype(np.int64)
    total: NDArray[np.int64] = (words[:, 0::2].sum(axis=1) << 8) + words[:, 1::2].sum(axis=1)
    return total


def _pseudo_header(block: NDArray[np.uint8], flows: dict[str, NDArray[np.int64]]) -> NDArray[np.int64]:
    """What TCP and UDP add to their checksums: addresses, protocol and length."""
    return _word_sum(block, 12, 20) + flows["proto"] + flows["size"] - 20


def _checksum(total: NDArray[np.int64]) -> NDArray[np.int64]:
    """Internet checksum (RFC 1071): complement of the sum with end-around carry."""
    total = (total & 0xFFFF) + (total >> 16)
    total = (total & 0xFFFF) + (total >> 16)
    return np.bitwise_xor(total, 0xFFFF)
