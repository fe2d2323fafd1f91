"""pcap files -> flows: micro- and nanoseconds, either byte order.

    file    magic (4 bytes)  version (2 + 2)  zone (4)  accuracy (4)  snap length (4)  link type (4)
    record  seconds (4)  fraction (4)  captured bytes (4)  bytes on the wire (4)  packet

A record is believed if what follows it may be one, too. If not, one of the two headers is wrong: the record
is kept, since its packet begins where it should, and the search for the next begins inside it. It asks for
three headers in a row that make sense in every field, which neither payload nor runs of zeros do by chance.
The snap length is not used: files that lie about it are common.

Source: draft-ietf-opsawg-pcap. Files may have been put together with `cat`: the file header of the second
is a damaged place of 24 bytes.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import BinaryIO

from numba import njit

from rayscan.captures.columns import Batch, time_limits
from rayscan.captures.headers import LINK_TYPES
from rayscan.captures.packets import flows_of
from rayscan.captures.records import (
    AT,
    BROKEN,
    CAPTURED,
    CUT_OFF,
    END,
    LINK,
    MAX_PACKET,
    MORE,
    TIME,
    Window,
    read_records,
    u32,
)
from rayscan.captures.values import Bytes, Ints
from rayscan.config import CapturesConfig
from rayscan.errors import FormatError

WINDOW_BYTES = 16 << 20

_HEADER, _RECORD = 24, 16  # bytes
_IN_A_ROW = 3
MAGIC = {
    b"\xa1\xb2\xc3\xd4": (True, 10**6),
    b"\xd4\xc3\xb2\xa1": (False, 10**6),
    b"\xa1\xb2\x3c\x4d": (True, 10**9),
    b"\x4d\x3c\xb2\xa1": (False, 10**9),
}
"""The first bytes of a file: whether its numbers are big-endian, fractions in a second."""


def read_pcap(file: BinaryIO, path: str, config: CapturesConfig, batch_rows: int) -> Iterator[Batch]:
    """Flows of a pcap file: one for each packet of IPv4, or aggregated as `captures.aggregate` says.

    Offsets of rejects are bytes. Raises FormatError for a damaged file header, an unknown link type, and,
    after the flows before it, for a damaged rest.
    """
    window = Window(file, WINDOW_BYTES)
    head = window.data[: min(window.end, _HEADER)].tobytes()
    if len(head) < _HEADER:
        raise window.damage or FormatError(path, "cut off in the file header", len(head))
    if head[:4] not in MAGIC:
        raise FormatError(path, f"not a pcap file: it begins with {head[:4]!r}")
    big, unit = MAGIC[head[:4]]
    link = int.from_bytes(head[20:], "big" if big else "little") & 0xFFFF  # above it: length of checksums
    if link not in LINK_TYPES:
        known = ", ".join(f"{name} ({number})" for number, name in LINK_TYPES.items())
        raise FormatError(path, f"link type {link} is not supported; these are: {known}")
    earliest, latest = (limit // 10**6 for limit in time_limits(config))

    def walk(data: Bytes, start: int, end: int, final: bool, records: Ints) -> tuple[int, int, int, int]:
        return _walk(data, start, end, final, records, big, unit, link)

    def find(data: Bytes, start: int, end: int, final: bool) -> tuple[bool, int]:
        return _find(data, start, end, final, big, unit, earliest, latest)

    return flows_of(read_records(window, _HEADER, path, walk, find), config, batch_rows)


@njit(cache=True, nogil=True)
def _walk(
    data: Bytes, start: int, end: int, final: bool, records: Ints, big: bool, unit: int, link: int
) -> tuple[int, int, int, int]:
    """See `records.Walk`. A record is noted when the header behind it is there to be checked."""
    count, place = 0, start
    if place + _RECORD <= end and not _possible(data, place, big, unit):
        return count, place + 1, BROKEN, place
    while place + _RECORD <= end:
        captured = u32(data, place + 8, big)
        following = place + _RECORD + captured
        if following + _RECORD > end and not final:
            return count, place, MORE, place
        if following > end:
            return count, place + _RECORD, CUT_OFF, place
        fraction = u32(data, place + 4, big)
        records[AT, count] = place + _RECORD
        records[CAPTURED, count] = captured
        micro = fraction if unit == 1_000_000 else fraction // 1000
        records[TIME, count] = u32(data, place, big) * 1_000_000 + micro
        records[LINK, count] = link
        count += 1
        if following + _RECORD <= end and not _possible(data, following, big, unit):
            return count, place + _RECORD, BROKEN, following
        place = following
    if not final:
        return count, place, MORE, place
    return count, place, END if place == end else CUT_OFF, place


@njit(cache=True, nogil=True)
def _possible(data: Bytes, place: int, big: bool, unit: int) -> bool:
    """Whether this may be the header of a record, however odd. Nothing but zeros is a hole in the file."""
    captured, fraction = u32(data, place + 8, big), u32(data, place + 4, big)
    if captured > MAX_PACKET or fraction >= unit:
        return False
    return captured > 0 or fraction > 0 or u32(data, place, big) > 0 or u32(data, place + 12, big) > 0


@njit(cache=True, nogil=True)
def _find(
    data: Bytes, start: int, end: int, final: bool, big: bool, unit: int, earliest: int, latest: int
) -> tuple[bool, int]:
    """See `records.Find`. A row of headers may be shorter where it ends with the file."""
    for first in range(start, end - _RECORD + 1):
        place, row = first, 0
        while row < _IN_A_ROW and place + _RECORD <= end:
            if not _sensible(data, place, big, unit, earliest, latest):
                break
            place += _RECORD + u32(data, place + 8, big)
            row += 1
        else:
            if row == _IN_A_ROW or (final and (place == end or row > 1)):
                return True, first
            if not final:
                return False, first
    return False, max(start, end - _RECORD + 1)


@njit(cache=True, nogil=True)
def _sensible(data: Bytes, place: int, big: bool, unit: int, earliest: int, latest: int) -> bool:
    """Whether every field of a record's header makes sense."""
    captured, wire = u32(data, place + 8, big), u32(data, place + 12, big)
    if not (0 < captured <= wire and wire <= MAX_PACKET):
        return False
    seconds = u32(data, place, big)
    return earliest <= seconds and seconds < latest and u32(data, place + 4, big) < unit
