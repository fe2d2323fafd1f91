"""Packet captures as a stream of records, whatever file format frames them.

A window slides over the file. A compiled `walk` of the format goes from record to record inside it and notes
where each packet lies; what it leaves, at most one record, moves to the front of the window and the file
fills up the rest. So memory is the window, and the stream need not be seekable.

Where the framing is damaged the format's `find` looks for the next place from which records follow each
other again. What lies between is one reject with the offset of the damage. If no such place comes, what was
read stands and the rest is a FormatError.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from typing import BinaryIO, NamedTuple, cast

import numpy as np
from numba import njit

from rayscan.captures.columns import Reject
from rayscan.captures.values import Bytes, Ints
from rayscan.errors import FormatError

MAX_PACKET = 262_144
"""Most bytes captured of a packet: libpcap's own limit. A record that claims more is damaged."""

_PIECE = 1 << 20  # bytes read at a time

SMALLEST_RECORD = 16
"""Bytes. Neither format has a shorter record of a packet."""

NO_TIME = -(2**63)
"""Time of a packet of which none is recorded."""

NO_INTERFACE = -1
"""Link type of a packet whose interface is not described."""

DAMAGED = "damaged: not a packet record"
CUT = "cut off in the middle of a packet record"

AT, CAPTURED, TIME, LINK = range(4)
MORE, END, BROKEN, CUT_OFF = range(4)
"""How a walk ends: it needs what follows, all is read, this is no record, the file ends inside a record."""

Walk = Callable[[Bytes, int, int, bool, Ints], tuple[int, int, int, int]]
"""(data, start, end, final, records) -> (how many records, where it stopped, how it ended, where it broke).

`data[start:end]` is what is there, to the end of the file if `final`. Of record i, records[AT, i] is the
place of the packet's first byte, CAPTURED how many there are, TIME microseconds since 1970 and LINK the link
type.
"""

Find = Callable[[Bytes, int, int, bool], tuple[bool, int]]
"""(data, start, end, final) -> (whether records follow from the place, the place). Not found and not final:
the search goes on from the place when more has been read."""


class Records(NamedTuple):
    """Packets in a buffer. They are gone when the next records are asked for."""

    data: Bytes
    offset: int  # of data[0] in the file
    table: Ints  # (4, N)
    rejects: list[Reject]


class Window:
    """`data[:end]` holds the bytes of the file from `offset` on; `final` if they reach its end."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        self.data: Bytes = np.empty(size, np.uint8)
        self.offset, self.end, self.final = 0, 0, False
        self.damage: FormatError | None = None  # of the compression around the capture
        self._file = cast(io.BufferedIOBase, file)
        self.advance(0)

    def advance(self, keep: int) -> None:
        """Let go of everything before `keep`, and read on until the window is full or the file ends."""
        rest = self.end - keep
        self.data[:rest] = self.data[keep : self.end]
        self.offset, self.end = self.offset + keep, rest
        while self.end < len(self.data) and not self.final:
            try:
                piece = self._file.read1(min(_PIECE, len(self.data) - self.end))  # readinto1() loses what
            except FormatError as error:  # comes before damage
                piece, self.damage = b"", error
            self.data[self.end : self.end + len(piece)] = np.frombuffer(piece, np.uint8)
            self.end += len(piece)
            self.final = not piece


def read_records(window: Window, start: int, path: str, walk: Walk, find: Find) -> Iterator[Records]:
    """All records from `start` on. Raises FormatError after the last where the rest cannot be read."""
    table = np.empty((4, len(window.data) // SMALLEST_RECORD + 1), np.int64)
    position, rejects = start, list[Reject]()
    while True:
        count, position, state, broken = walk(window.data, position, window.end, window.final, table)
        yield Records(window.data, window.offset, table[:, :count], rejects)
        rejects = []
        if state == END:
            break
        if state == MORE:
            window.advance(position)
            position = 0
            continue
        offset = window.offset + broken
        found, position = _search(window, position, find)
        if not found:
            raise window.damage or FormatError(path, CUT if state == CUT_OFF else DAMAGED, offset)
        rejects = [Reject(DAMAGED, offset, 1)]
    if window.damage is not None:
        raise window.damage


def _search(window: Window, position: int, find: Find) -> tuple[bool, int]:
    while True:
        found, position = find(window.data, position, window.end, window.final)
        if found or window.final:
            return found, position
        window.advance(position)
        position = 0


@njit(cache=True, nogil=True)
def u16(data: Bytes, place: int, big: bool) -> np.int64:
    at = np.uint64(place)  # unsigned: places do not count from the end
    a, b = np.int64(data[at]), np.int64(data[at + np.uint64(1)])
    return a << 8 | b if big else b << 8 | a


@njit(cache=True, nogil=True)
def u32(data: Bytes, place: int, big: bool) -> np.int64:
    a, b = u16(data, place, big), u16(data, place + 2, big)
    return a << 16 | b if big else b << 16 | a
