"""nfdump and nfcapd files -> flows, through the program `nfdump`; and the lines that it prints.

The binary format has changed with each major version and is described by nothing but the program, so the
program reads it (1.7 reads what 1.6 wrote, and 1.5). It is told what to print by `-o fmt:`, which is much
faster than its CSV, and ends with 0 whatever happens, so anything it says about an error counts.

Text in its formats for people (`-o line`, `long`, `extended`) is read as well; what `-o csv` prints is CSV.

Source: nfdump(1).
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from typing import IO, Any, BinaryIO, cast

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from rayscan.captures.columns import BATCH, Batch, Converter, Reject
from rayscan.captures.delimited import Header, block_bytes, parse, read_lines
from rayscan.config import CapturesConfig
from rayscan.errors import FormatError

PROGRAM = "nfdump"
_FIELDS = {
    "ts": "%tsr",
    "src": "%sa",
    "dst": "%da",
    "src_port": "%sp",
    "dst_port": "%dp",
    "proto": "%pr",
    "tcp_flags": "%flg",
    "packets": "%pkt",
    "size": "%byt",
    "icmp_type": "%it",
    "icmp_code": "%ic",
}
_SECONDS, _KIBIBYTES = 3600, 4 << 20
"""Of a processor and of memory: the most that a damaged file can make the program take."""

_LIMITED = 'ulimit -t "$1" 2>/dev/null; ulimit -v "$2" 2>/dev/null; shift 2; exec "$@"'
"""The shell is held to them before it becomes the program; limits set on a running one can come too late."""

_NOTHING = b"No matching flows\n"
_TROUBLE = re.compile(r".*(?:error|short|corrupt|fail|unknown|not |bad|skip).*", re.IGNORECASE)

Columns = dict[str, pa.Array]


def read_nfdump(file: BinaryIO, path: str, config: CapturesConfig, batch_rows: int) -> Iterator[Batch]:
    """Flows of a file in nfdump's format; rows are numbered from 0.

    Raises FormatError where the program is not installed, and, after the flows before it, for what it finds
    fault with.
    """
    program = shutil.which(PROGRAM)
    if program is None:
        raise FormatError(
            path, "the program nfdump, which reads this format, is not installed on this machine"
        )
    converter = Converter(path, _FIELDS, config.model_copy(update={"time_unit": "s"}))
    row = 0
    for lines in _printed(program, file, path, batch_rows):
        block = parse(lines, row, Header(tuple(_FIELDS), "|", quotes=False), range(len(_FIELDS)))
        if len(block.ragged):
            raise FormatError(path, "nfdump prints what was not asked for", int(block.ragged[0]))
        columns = dict(zip(_FIELDS, block.columns.values(), strict=True))
        for start in range(0, len(block.rows), batch_rows):
            part = slice(start, start + batch_rows)
            yield converter.convert(_numbers({k: c[part] for k, c in columns.items()}), block.rows[part])
        row += len(block.rows)


def _printed(program: str, file: BinaryIO, path: str, batch_rows: int) -> Iterator[bytes]:
    """What the program prints of the file, some lines at a time."""
    form = "fmt:" + "|".join(_FIELDS.values())
    with tempfile.NamedTemporaryFile() as copy, tempfile.TemporaryFile() as errors:
        shutil.copyfileobj(file, copy, 1 << 20)
        copy.flush()
        limits = ["sh", "-c", _LIMITED, "sh", str(_SECONDS), str(_KIBIBYTES)]
        process = subprocess.Popen(
            [*limits, program, "-r", copy.name, "-q", "-N", "-6", "-o", form],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=errors,
            env={"PATH": os.environ.get("PATH", ""), "TZ": "UTC", "LC_ALL": "C"},
        )
        try:
            printed = cast(IO[bytes], process.stdout)
            for lines in read_lines(cast(BinaryIO, printed), path, block_bytes(batch_rows, 128, 8)):
                if rows := lines.replace(_NOTHING, b""):
                    yield rows
            process.wait()
        finally:
            process.kill()
            process.wait()
            printed.close()
        trouble = _said(errors, copy.name)
        if trouble or process.returncode:
            raise FormatError(path, f"damaged: nfdump says: {trouble or f'exit code {process.returncode}'}")


def _said(errors: Any, name: str) -> str:
    """The first line about an error."""
    errors.seek(0)
    said = errors.read(1 << 16).decode(errors="replace").replace(name, "the file")
    found = next((line for line in said.splitlines() if _TROUBLE.fullmatch(line)), "")
    return str(found)[:160]


def _numbers(columns: Columns) -> Columns:
    """Ports of ICMP are printed as type.code, which also stand apart."""
    columns = dict(columns)
    kind, code = columns.pop("icmp_type"), columns["icmp_code"]
    proto = pc.ascii_trim_whitespace(columns["proto"])
    icmp = pc.is_in(proto, pa.array(["1", "ICMP"]))
    columns["dst_port"] = pc.if_else(icmp, kind, columns["dst_port"])
    columns["icmp_code"] = pc.if_else(icmp, code, None)
    columns["src_port"] = pc.if_else(icmp, None, columns["src_port"])
    columns["tcp_flags"] = pc.if_else(pc.is_in(proto, pa.array(["6", "TCP"])), columns["tcp_flags"], None)
    return columns


# ---------------------------------------------------------------------------------------------
# As text
# ---------------------------------------------------------------------------------------------

_LINE = (
    r"^\s*(?P<day>\d{4}-\d\d-\d\d)\s+(?P<time>[\d:.]+)\s+[\d:.]+\s+(?P<proto>\S+)"
    r"\s+(?P<src>\d+\.[\d.]+|[\dA-Fa-f:.]+):(?P<src_port>\d+)\s+(?:<?->?\s+)?"
    r"(?P<dst>\d+\.[\d.]+|[\dA-Fa-f:.]+):(?P<dst_port>\d+)(?P<icmp_code>\.\d+)?"
    r"(?:\s+(?P<tcp_flags>[.A-Z]{6,8})\s+\d+)?\s+(?P<packets>\d\S*(?: [KMGT])?)\s+(?P<size>\d\S*(?: [KMGT])?)"
    r"(?:\s+\d\S*(?: [KMGT])?)*(?:\s+(?P<label>[A-Za-z].*?))?\s*$"
)
"""A flow as nfdump prints it, with what others have added behind it as a label."""

_NO_FLOW = r"^(?:Date (?:first seen|flow start)|Summary:?|Time window:|Total flows processed:|Sys: )"
_TEXT = (
    "ts",
    "src",
    "dst",
    "src_port",
    "dst_port",
    "proto",
    "tcp_flags",
    "packets",
    "size",
    "icmp_code",
    "label",
)


def read_nfdump_text(file: BinaryIO, path: str, config: CapturesConfig, batch_rows: int) -> Iterator[Batch]:
    """Flows of the text that nfdump prints for people; numbers that it has scaled (1.2 M) are missing.

    Its times are local: captures.time_zone says where. Lines are numbered from 0, without blank ones. Raises
    FormatError for damage, after the flows before it.
    """
    converter = Converter(path, {key: key for key in _TEXT}, config)
    row = 0
    for text in read_lines(file, path, block_bytes(batch_rows, 128, 4)):
        lines = pa.array(text.decode().removesuffix("\n").split("\n"), pa.string())
        flows = pc.extract_regex(lines, _LINE)
        found = flows.is_valid().to_numpy(zero_copy_only=False)
        odd = ~found & ~pc.match_substring_regex(lines, _NO_FLOW).to_numpy(zero_copy_only=False)
        if odd.any():
            yield Batch(BATCH.empty_table(), [Reject("not a flow", row + int(odd.argmax()), int(odd.sum()))])
        rows = row + np.flatnonzero(found)
        columns = _of_text(pc.drop_null(flows))
        for start in range(0, len(rows), batch_rows):
            part = slice(start, start + batch_rows)
            yield converter.convert({key: c[part] for key, c in columns.items()}, rows[part])
        row += len(lines)


def _of_text(flows: pa.StructArray) -> Columns:
    columns = {name: flows.field(name) for name in flows.type.names}
    columns["ts"] = pc.binary_join_element_wise(columns.pop("day"), columns.pop("time"), " ")
    columns["icmp_code"] = pc.utf8_ltrim(columns["icmp_code"], ".")
    icmp = pc.equal(columns["proto"], "ICMP")
    columns["src_port"] = pc.if_else(icmp, None, columns["src_port"])
    columns["tcp_flags"] = pc.if_else(pc.equal(columns["proto"], "TCP"), columns["tcp_flags"], None)
    return columns
