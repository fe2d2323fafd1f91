"""Delimited text (CSV, TSV, ...) -> Arrow tables of strings, block by block.

A line is a row, always: a quoted field may hold delimiters but no line break. So a stray quote, which would
make a general parser swallow the rest of the file, costs its own line. Blocks of whole lines go to Arrow's
parser; a block in which rows and lines do not add up is read again line by line.

Every line is a row or counted in `Block.ragged`. Blank lines are neither. Bytes that are not UTF-8 become
U+FFFD. Columns are strings, unless the caller knows their types and every value of the block has them.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import BinaryIO, cast

import numpy as np
import pyarrow as pa
import pyarrow.csv as pacsv
from numpy.typing import NDArray

from rayscan.errors import FormatError

DELIMITERS = ",;\t|"
MAX_LINE_BYTES = 16 << 20
_BOM = b"\xef\xbb\xbf"
_VALUE = re.compile(r"(?=.*\d)[-+.:/\d]+[T\d.:Z+-]*")  # a number, an address or a time, but no name


@dataclass(frozen=True)
class Header:
    names: tuple[str, ...]
    delimiter: str
    quotes: bool = True  # False: a quote is a character like any other
    end: bytes = b""  # a line that stands behind the last row; empty: none does


@dataclass(frozen=True)
class Block:
    """Rows of some lines. Row numbers count the lines after the header from 0, without blank ones."""

    columns: dict[int, pa.Array]  # by place in the header
    rows: NDArray[np.int64]  # number of each row
    ragged: NDArray[np.int64]  # numbers of the lines that have another number of fields, or an open quote


def read_header(file: BinaryIO, path: str) -> Header:
    """Names and delimiter from the first line that is not blank; the file then stands behind it."""
    line = b""
    while not line.strip():
        line = file.readline(MAX_LINE_BYTES)
        if not line:
            raise FormatError(path, "no header line")
        line = line.removeprefix(_BOM)
    text = line.decode("utf-8", "replace").strip("\r\n")
    delimiter = max(DELIMITERS, key=text.count)  # the first of equals
    if "\r" in text:
        raise FormatError(path, "lines end with a carriage return alone: convert it with tr '\\r' '\\n'")
    try:
        names = tuple(name.strip() for name in next(csv.reader([text], delimiter=delimiter)))
    except csv.Error as error:
        raise FormatError(path, f"the header line cannot be read: {error}") from None
    value = next((place for place, name in enumerate(names, 1) if _VALUE.fullmatch(name)), None)
    if value is not None:  # not shown: it may be an address, which is not to be seen where all are hidden
        raise FormatError(
            path, f"no column names: field {value} of the first line is a value; add a header line"
        )
    return Header(names, delimiter)


def read_blocks(
    file: BinaryIO, path: str, header: Header, wanted: Sequence[int], block_bytes: int
) -> Iterator[Block]:
    """The rows of a buffered file with the `wanted` columns, about `block_bytes` of text at a time.

    Raises FormatError, after the rows before it, where the file is damaged or a line exceeds 16 MiB.
    """
    row = 0
    for text in read_lines(file, path, block_bytes):
        rows, ended, _ = _until(header.end, text)
        if rows:
            yield parse(rows, row, header, wanted)
        if ended:
            return
        row += text.count(b"\n")


def block_bytes(batch_rows: int, row_bytes: int, most_mib: int) -> int:
    """How much text to read at a time for about so many rows of about so many bytes."""
    return min(max(row_bytes * batch_rows, 1 << 16), most_mib << 20)


def _until(end: bytes, text: bytes) -> tuple[bytes, bytes, bytes]:
    """The lines before the line `end`, that line, and the rest."""
    if not end:
        return text, b"", b""
    before, found, rest = (b"\n" + text).partition(b"\n" + end + b"\n")
    return (before + b"\n" if found else before)[1:], found, rest


def read_lines(file: BinaryIO, path: str, block_bytes: int) -> Iterator[bytes]:
    """The lines of a buffered file, about `block_bytes` at a time.

    They are valid UTF-8, each ends with a line feed, and none is empty.

    Raises FormatError, after the lines before it, where the file is damaged or a line exceeds 16 MiB.
    """
    for lines in read_pieces(file, path, block_bytes):
        text = clean(lines)
        if text:
            yield text


def read_pieces(file: BinaryIO, path: str, block_bytes: int) -> Iterator[bytes]:
    """The same as it stands in the file, but for a byte order mark: each piece ends with a line feed."""
    buffered, rest, damage = cast(io.BufferedIOBase, file), b"", None
    mark = _BOM
    while True:
        try:
            piece = buffered.read1(block_bytes)  # read() would lose what comes before damage
        except FormatError as error:
            piece, damage = b"", error
        if not piece:
            break
        end = piece.rfind(b"\n") + 1
        if end:
            yield b"".join((rest, memoryview(piece)[:end])).removeprefix(mark)  # one copy: they are large
            rest, mark = piece[end:], b""
        else:
            rest += piece
        if len(rest) > MAX_LINE_BYTES:
            raise FormatError(path, f"a line is longer than {MAX_LINE_BYTES >> 20} MiB")
    if damage is not None:
        raise damage  # the last line is a part of one
    if rest:
        yield rest.removeprefix(mark) + b"\n"


def clean(lines: bytes) -> bytes:
    """UTF-8 with single line feeds and without blank lines."""
    if b"\r" in lines:
        lines = lines.replace(b"\r\n", b"\n").replace(b"\r", b" ")
    while b"\n\n" in lines:
        lines = lines.replace(b"\n\n", b"\n")
    if not lines.isascii():
        lines = lines.decode(errors="replace").encode()
    return lines.lstrip(b"\n")


def parse(
    text: bytes,
    row: int,
    header: Header,
    wanted: Sequence[int],
    types: Mapping[int, pa.DataType] | None = None,
    null: Sequence[str] = (),
) -> Block:
    """The rows of some lines (as `read_lines` gives them), whose first has the number `row`.

    Columns named in `types` have that type, with nulls for the texts `null`, if every value of theirs can be
    read so; else all columns are strings as they stand.
    """
    count = text.count(b"\n")
    parsed = _with_arrow(text, header, wanted, types, null) if types else None
    if parsed is None:
        parsed = _with_arrow(text, header, wanted, {}, ())
    if parsed is None or len(parsed[0][wanted[0]]) + len(parsed[1]) != count:
        parsed = _line_by_line(text, header, wanted)
    columns, ragged = parsed
    rows = np.setdiff1d(np.arange(count), ragged, assume_unique=True)
    return Block(columns, row + rows, row + ragged)


def _with_arrow(
    text: bytes,
    header: Header,
    wanted: Sequence[int],
    types: Mapping[int, pa.DataType],
    null: Sequence[str],
) -> tuple[dict[int, pa.Array], NDArray[np.int64]] | None:
    """Columns and the ragged lines; None where Arrow gives up."""
    ragged: list[int] = []

    def skip(row: pacsv.InvalidRow) -> str:
        ragged.append(row.number - 1)
        return "skip"

    names = [str(place) for place in range(len(header.names))]
    try:
        table = pacsv.read_csv(
            pa.BufferReader(text),
            pacsv.ReadOptions(use_threads=False, block_size=len(text) + 1, column_names=names),
            pacsv.ParseOptions(
                delimiter=header.delimiter,
                quote_char='"' if header.quotes else False,
                invalid_row_handler=skip,
            ),
            pacsv.ConvertOptions(
                check_utf8=False,
                column_types={str(place): types.get(place, pa.string()) for place in wanted},
                include_columns=[str(place) for place in wanted],
                null_values=list(null),
            ),
        )
    except pa.ArrowInvalid:
        return None
    columns = {place: one_chunk(table.column(str(place))) for place in wanted}
    return columns, np.array(ragged, np.int64)


def one_chunk(column: pa.ChunkedArray) -> pa.Array:
    if column.num_chunks == 1:
        return column.chunk(0)
    return pa.concat_arrays(column.chunks or [pa.array([], column.type)])


def _line_by_line(
    text: bytes, header: Header, wanted: Sequence[int]
) -> tuple[dict[int, pa.Array], NDArray[np.int64]]:
    good: list[list[str]] = []
    ragged: list[int] = []
    for number, line in enumerate(text.decode().removesuffix("\n").split("\n")):
        fields = _fields(line, header)
        if len(fields) == len(header.names):
            good.append([fields[place] for place in wanted])
        else:
            ragged.append(number)
    columns = {place: pa.array([row[k] for row in good], pa.string()) for k, place in enumerate(wanted)}
    return columns, np.array(ragged, np.int64)


def _fields(line: str, header: Header) -> list[str]:
    """The fields of a line, none where it ends inside a quoted one."""
    if not header.quotes:
        return line.split(header.delimiter)
    try:
        return next(csv.reader([line], delimiter=header.delimiter, strict=True))
    except csv.Error:
        return []
