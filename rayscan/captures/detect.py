"""What a file is, told by its first bytes, and the reader for it.

Names say little: captures come as `.gz` that is not, `.log` that is CSV, or with no extension at all. An
outer compression is undone while streaming; then the format is told by its magic bytes, or, for text, by a
header line. A format that is known but has no reader is refused by its name.
"""

from __future__ import annotations

import io
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO, cast

from rayscan.captures.columns import Batch, read_csv, read_parquet
from rayscan.captures.eve import read_eve
from rayscan.captures.flowtuple import read_flowtuple
from rayscan.captures.jsonlines import read_json
from rayscan.captures.nfdump import read_nfdump, read_nfdump_text
from rayscan.captures.pcap import MAGIC as PCAP_MAGIC
from rayscan.captures.pcap import read_pcap
from rayscan.captures.pcapng import read_pcapng
from rayscan.captures.source import BUFFER_BYTES, Decompressed, Source, compression_of
from rayscan.captures.zeek import read_zeek, read_zeek_json
from rayscan.config import CapturesConfig, RunConfig
from rayscan.errors import FormatError

Reader = Callable[[BinaryIO, str, CapturesConfig, int], Iterator[Batch]]

SIGNATURES = {
    b"PAR1": "parquet",
    **dict.fromkeys(PCAP_MAGIC, "pcap"),
    b"\x0a\x0d\x0d\x0a": "pcapng",
    b"Obj\x01": "avro",
    b"#separator": "zeek",
    b"#fields": "zeek",
    b"Date first seen": "nfdump-text",
    b"Date flow start": "nfdump-text",
    b"\x0c\xa5": "nfdump",
    b"\xa5\x0c": "nfdump",
    b"\xde\xad\xbe\xef": "SiLK",
    b"PARE": "encrypted parquet",
    b"ARROW1": "arrow",
    b"ORC": "orc",
    b"PK\x03\x04": "zip",
}
"""Magic bytes and the formats they announce."""

READERS: dict[str, Reader] = {
    "parquet": read_parquet,
    "csv": read_csv,
    "json": read_json,
    "zeek": read_zeek,
    "zeek-json": read_zeek_json,
    "eve": read_eve,
    "flowtuple3": read_flowtuple,
    "flowtuple4": read_flowtuple,
    "nfdump": read_nfdump,
    "nfdump-text": read_nfdump_text,
    "pcap": read_pcap,
    "pcapng": read_pcapng,
}
"""The reader of each format."""

_DELIMITERS = b",;\t|"
_CONTROL = re.compile(rb"[\x00-\x08\x0e-\x1f]")


def read_capture(
    file: BinaryIO, path: str, config: CapturesConfig, batch_rows: int
) -> tuple[str, Iterator[Batch]]:
    """Format of a capture, and its flows in batches of at most `batch_rows`.

    `file` is open for reading at any place and stays open until the last batch; `path` is for messages.
    Raises FormatError for a file of no known format. The batches raise FormatError for a file that cannot be
    read, SchemaError for a table that lacks what a flow needs; the batches before it then stand.
    """
    kind, stream = open_capture(file, path, config)
    return kind, _batches(kind, stream, path, config, batch_rows)


def _batches(
    kind: str, stream: BinaryIO, path: str, config: CapturesConfig, batch_rows: int
) -> Iterator[Batch]:
    if kind not in READERS:
        supported = ", ".join(READERS)
        raise FormatError(path, f"{kind} captures are not supported yet; convert it to one of: {supported}")
    yield from READERS[kind](stream, path, config, batch_rows)


def reader_failed(error: Exception, config: RunConfig) -> str:
    """What to say of an error that no reader should raise. It may quote an address."""
    shown = f": {error}" if config.ingest.addresses == "raw" else ""
    return f"reader failed: {type(error).__name__}{shown}"


def open_capture(file: BinaryIO, path: str, config: CapturesConfig) -> tuple[str, BinaryIO]:
    """Format of a file (as captures.format says, or by its content) and its decompressed content, buffered.

    The stream of a Parquet file is seekable (a compressed one is unpacked into a temporary file), others
    need not be. Raises FormatError for an empty file, an unknown format, damage, and where the content is
    larger than captures.max_gb, or more than 64 MiB and captures.max_ratio times the compressed bytes read.
    """
    stream: io.BufferedReader[Any] = io.BufferedReader(Source(file), BUFFER_BYTES)
    stream.seek(0)
    head = stream.peek(1)
    compression = compression_of(head)
    if compression is not None:
        stream = io.BufferedReader(Decompressed(stream, path, compression, config), BUFFER_BYTES)
        head = stream.peek(1)
    kind = _format(head, path) if config.format == "auto" or not head else config.format
    if kind == "parquet" and compression is not None:
        return kind, _unpacked(stream)
    return kind, stream


def _match(head: bytes, signatures: dict[bytes, str]) -> str | None:
    return next((name for magic, name in signatures.items() if head.startswith(magic)), None)


def _format(head: bytes, path: str) -> str:
    if not head:
        raise FormatError(path, "empty file")
    known = _match(head, SIGNATURES)
    if head.startswith(b"#") and b"\n#fields\t" in head:
        return "zeek"
    if known is not None:
        return _flowtuple(head) if known == "avro" else known
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    if text.startswith(b"{"):
        return _json(text.split(b"\n", 1)[0], path)
    header = text.split(b"\n", 1)[0]
    if not _CONTROL.search(header) and any(mark in header for mark in _DELIMITERS):
        return "csv"
    raise FormatError(path, f"not a capture in a known format (it begins with {head[:4]!r})")


def _flowtuple(head: bytes) -> str:
    """Which Avro file this is, by the schema at its beginning."""
    if b'"dst_net"' in head:
        return "flowtuple4"
    return "flowtuple3" if b'"dst_ip"' in head else "avro"


def _json(line: bytes, path: str) -> str:
    """Whose JSON lines these are, by the keys of the first."""
    if b'"event_type"' in line:
        return "eve"
    if b'"id.orig_h"' not in line:
        return "json"
    if b'"conn_state"' in line or b'"_path"' in line:
        return "zeek-json"
    raise FormatError(path, "a log of Zeek's other than conn.log, where flows come from")


def _unpacked(stream: io.BufferedReader[Any]) -> BinaryIO:
    unpacked = tempfile.TemporaryFile()  # noqa: SIM115  lives as long as the reader
    shutil.copyfileobj(stream, unpacked, BUFFER_BYTES)
    unpacked.seek(0)
    return cast(BinaryIO, unpacked)
