"""pcapng files -> flows: sections in either byte order, interfaces with their own links and clocks.

    block      type (4)  length (4)  body  length again (4)
    section    0x0A0D0D0A; a byte order mark says how all that follows is written, until the next section
    interface  1: link type, snap length, options: resolution of the clock (9), offset in seconds (14)
    packets    6 enhanced, 3 simple (no time: rejected), 2 the obsolete one

Blocks of any other type are skipped. A block is believed if the length behind it repeats the one before it.
Where that is not so, the next block of a known type for which it is so is searched for.

Source: draft-ietf-opsawg-pcapng.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import BinaryIO

import numpy as np
from numba import njit

from rayscan.captures.columns import Batch
from rayscan.captures.packets import flows_of
from rayscan.captures.records import (
    AT,
    BROKEN,
    CAPTURED,
    CUT_OFF,
    END,
    LINK,
    MORE,
    NO_INTERFACE,
    NO_TIME,
    TIME,
    Window,
    read_records,
    u16,
    u32,
)
from rayscan.captures.values import Bytes, Ints
from rayscan.config import CapturesConfig

MAX_BLOCK = 16 << 20
"""Bytes: libpcap's own limit. A block that claims more is damaged."""

WINDOW_BYTES = 2 * MAX_BLOCK
MAX_INTERFACES = 65_536
"""Of a section; packets of others count as of no known interface."""

_SECTION, _INTERFACE, _OBSOLETE, _SIMPLE, _ENHANCED = 0x0A0D0D0A, 1, 2, 3, 6
_BIG, _INTERFACES = 0, 1  # what is known of the section
_LINK, _BINARY, _DIGITS, _OFFSET = range(4)  # and of an interface
_FAR = 2**42  # seconds: later than any time that is allowed


def read_pcapng(file: BinaryIO, path: str, config: CapturesConfig, batch_rows: int) -> Iterator[Batch]:
    """Flows of a pcapng file: one for each packet of IPv4, or aggregated as `captures.aggregate` says.

    Offsets of rejects are bytes. Raises FormatError, after the flows before it, for a damaged rest.
    """
    section = np.zeros(2, np.int64)
    interfaces = np.zeros((MAX_INTERFACES, 4), np.int64)

    def walk(data: Bytes, start: int, end: int, final: bool, records: Ints) -> tuple[int, int, int, int]:
        return _walk(data, start, end, final, records, section, interfaces)

    def find(data: Bytes, start: int, end: int, final: bool) -> tuple[bool, int]:
        return _find(data, start, end, final, bool(section[_BIG]))

    return flows_of(read_records(Window(file, WINDOW_BYTES), 0, path, walk, find), config, batch_rows)


@njit(cache=True, nogil=True)
def _walk(
    data: Bytes, start: int, end: int, final: bool, records: Ints, section: Ints, interfaces: Ints
) -> tuple[int, int, int, int]:
    """See `records.Walk`."""
    count, place = 0, start
    while place + 12 <= end:
        big = _byte_order(data, place, section[_BIG] > 0)
        length = u32(data, place + 4, big)
        if not _possible(data, place, big):
            return count, place + 1, BROKEN, place
        if place + length > end:
            return (count, place + 1, CUT_OFF, place) if final else (count, place, MORE, place)
        if u32(data, place + length - 4, big) != length:
            return count, place + 1, BROKEN, place
        kind = u32(data, place, big)
        if kind == _SECTION:
            section[_BIG], section[_INTERFACES] = big, 0
        elif kind == _INTERFACE and section[_INTERFACES] < len(interfaces):
            _describe(data, place, length, big, interfaces[section[_INTERFACES]])
            section[_INTERFACES] += 1
        elif kind in (_OBSOLETE, _SIMPLE, _ENHANCED):
            known = interfaces[: section[_INTERFACES]]
            _note(data, place, length, big, kind, known, records[:, count])
            count += 1
        place += length
    if not final:
        return count, place, MORE, place
    return count, place, END if place == end else CUT_OFF, place


@njit(cache=True, nogil=True)
def _byte_order(data: Bytes, place: int, big: bool) -> bool:
    """Of the block, which is that of its section, and that a section begins by stating."""
    return u32(data, place + 8, True) == 0x1A2B3C4D if u32(data, place, True) == _SECTION else big


@njit(cache=True, nogil=True)
def _possible(data: Bytes, place: int, big: bool) -> bool:
    """Whether the length may be one, and a section's mark is one."""
    length, kind = u32(data, place + 4, big), u32(data, place, big)
    if length % 4 or length > MAX_BLOCK or length < _least(kind):
        return False
    return kind != _SECTION or u32(data, place + 8, big) == 0x1A2B3C4D


@njit(cache=True, nogil=True)
def _least(kind: int) -> int:
    """Bytes of the shortest block of this type."""
    if kind == _SECTION:
        return 28
    if kind in (_OBSOLETE, _ENHANCED):
        return 32
    if kind == _INTERFACE:
        return 20
    return 16 if kind == _SIMPLE else 12


@njit(cache=True, nogil=True)
def _describe(data: Bytes, place: int, length: int, big: bool, interface: Ints) -> None:
    """Link type and clock of an interface."""
    interface[_LINK], interface[_BINARY], interface[_DIGITS], interface[_OFFSET] = 0, 0, 6, 0
    interface[_LINK] = u16(data, place + 8, big)
    option, end = place + 16, place + length - 4
    while option + 4 <= end:
        code, size = u16(data, option, big), u16(data, option + 2, big)
        value = option + 4
        if code == 0 or value + size > end:
            break
        if code == 9 and size == 1:
            interface[_BINARY], interface[_DIGITS] = data[value] >> 7, data[value] & 127
        if code == 14 and size == 8:
            high, low = u32(data, value, big), u32(data, value + 4, big)
            interface[_OFFSET] = high << 32 | low if big else low << 32 | high
        option = value + (size + 3) // 4 * 4


@njit(cache=True, nogil=True)
def _note(data: Bytes, place: int, length: int, big: bool, kind: int, interfaces: Ints, record: Ints) -> None:
    """The record of a packet's block."""
    number, behind = np.int64(0), place + length - 4
    if kind == _SIMPLE:
        record[AT], record[CAPTURED], record[TIME] = place + 12, u32(data, place + 8, big), NO_TIME
    else:
        number = u16(data, place + 8, big) if kind == _OBSOLETE else u32(data, place + 8, big)
        record[AT], record[CAPTURED] = place + 28, u32(data, place + 20, big)
    record[CAPTURED] = min(record[CAPTURED], behind - record[AT])
    if number >= len(interfaces):
        record[LINK] = NO_INTERFACE
        return
    record[LINK] = interfaces[number, _LINK]
    if kind != _SIMPLE:
        high, low = u32(data, place + 12, big), u32(data, place + 16, big)
        record[TIME] = _microseconds(high, low, interfaces[number])


@njit(cache=True, nogil=True)
def _microseconds(high: int, low: int, interface: Ints) -> int:
    """Since 1970, of a time of 64 bits in the interface's unit; finer digits are cut off."""
    ticks = np.uint64(high) << np.uint64(32) | np.uint64(low)
    digits, offset = interface[_DIGITS], interface[_OFFSET]
    seconds = micro = np.uint64(0)
    if interface[_BINARY]:
        seconds = ticks >> np.uint64(digits) if digits < 64 else seconds
        while digits > 40:  # so that the product fits
            ticks, digits = ticks >> np.uint64(1), digits - 1
        part = ticks & (np.uint64(1) << np.uint64(digits)) - np.uint64(1)
        micro = part * np.uint64(10**6) >> np.uint64(digits)
    else:
        while digits > 6:
            ticks, digits = ticks // np.uint64(10), digits - 1
        unit = np.uint64(10**digits)
        seconds, micro = ticks // unit, ticks % unit * np.uint64(10 ** (6 - digits))
    if seconds >> np.uint64(62) or offset >> 62 > 0:
        return _FAR * 10**6
    return max(-_FAR, min(_FAR, np.int64(seconds) + offset)) * 1_000_000 + np.int64(micro)


@njit(cache=True, nogil=True)
def _find(data: Bytes, start: int, end: int, final: bool, big: bool) -> tuple[bool, int]:
    """See `records.Find`."""
    for place in range(start, end - 11):
        order = _byte_order(data, place, big)
        kind = u32(data, place, order)
        if (kind != _SECTION and not 1 <= kind <= 6) or not _possible(data, place, order):
            continue
        length = u32(data, place + 4, order)
        if place + length <= end:
            if u32(data, place + length - 4, order) == length:
                return True, place
        elif not final:
            return False, place
    return False, max(start, end - 11)
