"""Avro object containers -> numpy columns, as a stream and in bounded memory.

A container is a schema, then blocks of records, each compressed on its own and followed by a mark. A record
has no length: to find the second, the first must be decoded. Numbers take 1 to 10 bytes each. So a compiled
loop goes over the bytes once and keeps the wanted fields: several times the rate of polars' reader, which
panics on damage and reserves whatever memory a damaged count asks for.

Read are records of numbers, strings, arrays of whole numbers, and any of these or null. A block that cannot
be decoded costs itself; where there is no mark behind a block, reading goes on behind the next mark. Source:
Apache Avro 1.12 specification, "Object Container Files".
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import pyarrow as pa
from numba import njit
from numpy.typing import NDArray

from rayscan.captures.columns import Reject
from rayscan.captures.source import DAMAGE
from rayscan.captures.values import Bytes, Ints
from rayscan.errors import FormatError, SchemaError

MAGIC = b"Obj\x01"
MAX_BLOCK_BYTES = 64 << 20
"""Of a block, compressed or not. Writers make blocks of some kilobytes."""
LIST_LENGTH = 5
"""Entries that are kept of an array."""
NULL = -(2**63)
"""Stands for null, and for what an array has not got."""

_MAX_HEADER_BYTES = 1 << 20
_SYNC_BYTES = 16
_PIECE = 1 << 20  # bytes read at a time in search of a mark
_FLOATS = {"float": 4, "double": 8}
WHOLE, BOOLEAN, FIXED, TEXT, LIST = range(5)


@dataclass(frozen=True)
class Header:
    """What stands before the blocks.

    Column i of `plan` is the type of field i: what it is, its bytes if fixed, which branch of a union is null
    (-1: it is no union).
    """

    names: tuple[str, ...]
    plan: Ints  # (3, fields)
    codec: str
    sync: bytes


class Rows(NamedTuple):
    """Some records. What cannot be decoded is in `rejects`."""

    first: int  # number of the first
    columns: dict[str, Ints]  # (N,) for numbers, (N, LIST_LENGTH) for arrays
    rejects: list[Reject]


def read_header(file: BinaryIO, path: str) -> Header:
    """Raises FormatError where this is no container, SchemaError where records hold what cannot be read."""
    try:
        if file.read(4) != MAGIC:
            raise ValueError("no magic bytes")
        meta = _metadata(file)
        schema = json.loads(meta.get("avro.schema", b""))
        sync = _exactly(file, _SYNC_BYTES)
        codec = meta.get("avro.codec", b"null").decode()
        fields = [(_clean(field["name"]), field["type"]) for field in schema["fields"]]
        plan = np.array([_type(kind, name, path) for name, kind in fields], np.int64).reshape(-1, 3)
    except (EOFError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise FormatError(path, f"damaged: Avro header: {error or 'cut off'}") from None
    if codec not in ("null", "deflate", "snappy"):
        raise FormatError(path, f"Avro codec {codec[:40]!r} is not supported; write null, deflate or snappy")
    return Header(tuple(name for name, _ in fields), np.ascontiguousarray(plan.T), codec, sync)


def _metadata(file: BinaryIO) -> dict[str, bytes]:
    """Keys and values, of which there may be many empty ones: all together have a limit."""
    meta: dict[str, bytes] = {}
    left = _MAX_HEADER_BYTES
    while count := _number(file):
        if count < 0:
            _number(file)  # bytes of this part
        for _ in range(abs(count)):
            key = _exactly(file, _number(file), left).decode()
            meta[key] = _exactly(file, _number(file), left)
            left -= len(key) + len(meta[key]) + 2
    return meta


def _number(file: BinaryIO | _Stream) -> int:
    """A zigzag number of up to ten bytes. Raises EOFError only where there is no byte at all."""
    value = 0
    for shift in range(0, 70, 7):
        byte = file.read(1)
        if not byte:
            raise ValueError("cut off") if shift else EOFError
        value |= (byte[0] & 0x7F) << shift
        if byte[0] < 0x80:
            return (value >> 1) ^ -(value & 1)
    raise ValueError("a number of more than ten bytes")


def _exactly(file: BinaryIO, size: int, limit: int = _MAX_HEADER_BYTES) -> bytes:
    if not 0 <= size <= limit:
        raise ValueError(f"a size of {size} bytes")
    data = file.read(size)
    if len(data) < size:
        raise ValueError("cut off")
    return data


def _clean(name: Any) -> str:
    """Without the halves of surrogate pairs, which JSON can escape and UTF-8 cannot hold."""
    return str(name).encode(errors="replace").decode()


def _type(kind: Any, name: str, path: str) -> tuple[int, int, int]:
    """A column of `Header.plan`."""
    null, value = -1, kind
    if isinstance(kind, list) and len(kind) == 2 and "null" in kind:
        null = kind.index("null")
        value = kind[1 - null]
    inner = value.get("type") if isinstance(value, dict) else value
    if inner in ("int", "long", "enum"):
        return WHOLE, 0, null
    if inner == "boolean":
        return BOOLEAN, 1, null
    if inner in ("string", "bytes"):
        return TEXT, 0, null
    if isinstance(inner, str) and inner in _FLOATS:
        return FIXED, _FLOATS[inner], null
    if isinstance(value, dict) and inner == "array" and value.get("items") in ("int", "long"):
        return LIST, 0, null
    shown = _clean(kind)[:80]
    raise SchemaError(f"{path}: Avro field {name[:60]!r} has a type that is not supported: {shown}")


def read_rows(
    file: BinaryIO, path: str, header: Header, wanted: Sequence[str], batch_rows: int
) -> Iterator[Rows]:
    """The `wanted` fields, whole numbers or arrays, of all records, at most `batch_rows` at a time.

    Raises FormatError, after the records before it, where no further block can be found.
    """
    batch = _Batch(header, wanted, batch_rows)
    row, rejects = 0, list[Reject]()
    damage: FormatError | None = None
    blocks = _blocks(_Stream(file), header)
    while True:
        try:
            found = next(blocks, None)
        except FormatError as error:  # of the compression around the file
            damage, found = error, None
        except ValueError as error:
            damage, found = FormatError(path, f"damaged: Avro block: {error}", row), None
        if found is None:
            break
        count, data = found
        place, left = 0, count
        while left and data is not None:
            if batch.filled == batch_rows:
                yield batch.take(row - batch.filled, rejects)
                rejects = []
            good, place = batch.add(data, place, left)
            row, left = row + good, left - good
            if place < 0:
                break
        if left:
            if batch.filled or rejects:
                yield batch.take(row - batch.filled, rejects)
            rejects, row = [Reject("damaged: Avro block", row, left)], row + left
    if batch.filled or rejects:
        yield batch.take(row - batch.filled, rejects)
    if damage is not None:
        raise damage


class _Stream:
    """A file, and what has been read of it since the block in hand began."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._data, self._start, self._place = file, bytearray(), 0, 0

    def begin(self) -> None:
        """A block begins here."""
        self._start = self._place
        if 2 * self._start >= len(self._data):
            del self._data[: self._start]
            self._start = self._place = 0

    def read(self, size: int) -> bytes:
        self._fill(size)
        with memoryview(self._data) as data:
            piece = bytes(data[self._place : self._place + size])
        self._place += len(piece)
        return piece

    def read_marked(self, size: int, mark: bytes) -> bytes:
        """So many bytes, and go behind the mark that follows. Copies nothing unless the mark is there: a file
        may claim a large block at each of many places."""
        self._fill(size + len(mark))
        end = self._place + size
        if len(self._data) < end + len(mark):
            raise ValueError("cut off")
        if not self._data.startswith(mark, end):
            raise ValueError("the mark behind it is missing")
        piece = self.read(size)
        self._place += len(mark)
        return piece

    def _fill(self, size: int) -> None:
        missing = self._place + size - len(self._data)
        if missing > 0:
            self._data += self._file.read(missing)

    def skip(self, mark: bytes) -> bool:
        """Go behind the first mark since the block began, if there is one."""
        found = self._data.find(mark, self._start)
        while found < 0:
            del self._data[: max(0, len(self._data) - len(mark))]
            self._start, more = 0, self._file.read(_PIECE)
            if not more:
                return False
            self._data += more
            found = self._data.find(mark)
        self._place = found + len(mark)
        return True


def _blocks(stream: _Stream, header: Header) -> Iterator[tuple[int, Bytes | None]]:
    """What `_block` gives. A place that holds no block counts as one record, up to the next mark."""
    while True:
        stream.begin()
        try:
            found = _block(stream, header)
        except ValueError:
            if not stream.skip(header.sync):
                raise
            found = 1, None
        if found is None:
            return
        yield found


def _block(file: _Stream, header: Header) -> tuple[int, Bytes | None] | None:
    """Records and bytes of the next block, None at the end; no bytes where they cannot be unpacked."""
    try:
        count = _number(file)
    except EOFError:
        return None
    try:
        size = _number(file)
    except EOFError:
        raise ValueError("cut off") from None
    if not 0 <= count <= MAX_BLOCK_BYTES:
        raise ValueError(f"{count} records")
    if not 0 <= size <= MAX_BLOCK_BYTES:
        raise ValueError(f"a size of {size} bytes")
    packed = file.read_marked(size, header.sync)
    try:
        data = np.frombuffer(_unpacked(packed, header.codec), np.uint8)
    except DAMAGE:
        return count, None
    return count, data if count <= len(data) else None  # a record without a byte says nothing


def _unpacked(packed: bytes, codec: str) -> bytes:
    if codec == "deflate":
        decoder = zlib.decompressobj(-15)
        data: bytes = decoder.decompress(packed, MAX_BLOCK_BYTES)
        if not decoder.eof:
            raise ValueError("cut off or too large")
        return data
    if codec == "snappy":
        size = _snappy_size(packed)
        data = pa.decompress(packed[:-4], size, codec="snappy", asbytes=True)
        if zlib.crc32(data) != int.from_bytes(packed[-4:], "big"):
            raise ValueError("checksum")
        return data
    return packed


def _snappy_size(packed: bytes) -> int:
    """Bytes after unpacking, which stand first as a number of 7 bits a byte."""
    size = 0
    for k, byte in enumerate(packed[:5]):
        size |= (byte & 0x7F) << (7 * k)
        if byte < 0x80:
            break
    if size > MAX_BLOCK_BYTES:
        raise ValueError("too large")
    return size


class _Batch:
    """Room for the wanted fields of `rows` records."""

    def __init__(self, header: Header, wanted: Sequence[str], rows: int) -> None:
        self.filled = 0
        self._plan, self._slots = header.plan, np.full(len(header.names), -1, np.int64)
        self._numbers, self._lists = list[str](), list[str]()
        for name in wanted:
            field = header.names.index(name)
            names = self._lists if header.plan[0, field] == LIST else self._numbers
            self._slots[field] = len(names)
            names.append(name)
        self._values = np.empty((len(self._numbers), rows), np.int64)
        self._entries = np.empty((len(self._lists), rows, LIST_LENGTH), np.int64)

    def add(self, data: Bytes, place: int, count: int) -> tuple[int, int]:
        """Up to `count` records from `place` on; how many, and where they end (-1: the next is damaged)."""
        count = min(count, self._values.shape[1] - self.filled)
        good, place = _decode(
            data, place, count, self._plan, self._slots, self._values, self._entries, self.filled
        )
        self.filled += good
        return good, place

    def take(self, first: int, rejects: list[Reject]) -> Rows:
        columns = {name: self._values[k, : self.filled].copy() for k, name in enumerate(self._numbers)}
        columns |= {name: self._entries[k, : self.filled].copy() for k, name in enumerate(self._lists)}
        self.filled = 0
        return Rows(first, columns, rejects)


@njit(cache=True, nogil=True)
def _decode(  # noqa: C901  one loop, since calls inside it double its time
    data: Bytes,
    place: int,
    count: int,
    plan: Ints,
    slots: Ints,
    values: Ints,
    entries: NDArray[np.int64],
    row: int,
) -> tuple[int, int]:
    """Decode up to `count` records from `place` on into rows from `row` on.

    How many, and where they end (-1: the next is damaged). Each turn reads a number, or skips a field of
    fixed size; `chosen` means that the branch of a union is known, `items` are left in this part of an array,
    and `sized` that the number ahead is the size of the part.
    """
    end = len(data)
    for k in range(row, row + count):
        field, items, kept, chosen, sized = 0, 0, 0, False, False
        while field < len(slots):
            kind, slot, null = plan[0, field], slots[field], plan[2, field]
            if kind in (BOOLEAN, FIXED) and (chosen or null < 0):
                place += plan[1, field]
                if place > end:
                    return k - row, -1
                if slot >= 0:
                    values[slot, k] = data[place - 1]
                field, chosen = field + 1, False
                continue
            bits, shift = np.uint64(0), np.uint64(0)
            more: Any = True
            while more:
                if place >= end or shift > np.uint64(63):
                    return k - row, -1
                byte = np.uint64(data[place])
                bits |= (byte & np.uint64(0x7F)) << shift
                shift += np.uint64(7)
                place += 1
                more = byte >= np.uint64(0x80)
            number: Any = np.int64(bits >> np.uint64(1)) ^ -np.int64(bits & np.uint64(1))
            if null >= 0 and not chosen:
                chosen = number != null
                if number < 0 or number > 1:
                    return k - row, -1
                if not chosen:
                    if slot >= 0 and kind == LIST:
                        entries[slot, k] = NULL
                    elif slot >= 0:
                        values[slot, k] = NULL
                    field += 1
            elif kind in (WHOLE, TEXT):
                if kind == WHOLE and slot >= 0:
                    values[slot, k] = number
                elif kind == TEXT:
                    if number < 0 or number > end - place:
                        return k - row, -1
                    place += number
                field, chosen = field + 1, False
            elif sized:
                sized = False
            elif items > 0:
                if slot >= 0 and kept < LIST_LENGTH:
                    entries[slot, k, kept] = number
                kept, items = kept + 1, items - 1
            elif number != 0:
                sized, items = number < 0, abs(number)
                if items < 0 or items > end - place:
                    return k - row, -1
            else:
                if slot >= 0:
                    entries[slot, k, kept:] = NULL
                field, kept, chosen = field + 1, 0, False
    return count, place
