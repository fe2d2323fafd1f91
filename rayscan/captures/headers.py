"""Headers of packets -> columns of numbers: the link, IPv4 and the transport above it.

One compiled pass over the bytes fills the columns of the packets that become flows and counts the others by
reason. What a packet does not carry, or what was cut off when it was captured, is MISSING.

- Lost, and counted: whatever is not IPv4, and packets that are cut off before the IP header ends.
- TCP, UDP, DCCP, SCTP and UDP-Lite need the port they were sent to; without it a packet says nothing.
- Later fragments have no ports, and the first fragment is a flow already: all of them are rejects.
- `size` is the total length of the IP header; MISSING where it is 0, as segmentation by hardware leaves it.
- Bytes behind the IP packet (padding, checksums of the link) are not read as parts of it.

A packet that agrees with an earlier one in time and in all that is read of it is a duplicate. It is compared
with the REACH packets before it as long as their time is the same: captures that overlap are merged by time,
so twins are neighbours. Others are not found: that needs memory that grows with the file, and even a table of
fixed size, measured, made this pass three times as slow.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from rayscan.captures.columns import IPV6, PORTED
from rayscan.captures.records import AT, CAPTURED, LINK, NO_INTERFACE, NO_TIME, TIME, u16, u32
from rayscan.captures.values import Bytes, Ints
from rayscan.schema import MISSING

COLUMNS = (
    "ts", "src", "dst", "dst_port", "proto", "src_port", "ttl", "size", "packets", "tcp_flags", "icmp_code",
    "fingerprint", "ip_id", "tcp_seq",
)  # fmt: skip
"""Of the array that `decode` fills; the last two serve the fingerprint only, which it leaves to others."""

TS, SRC, DST, DST_PORT, PROTO, SRC_PORT, TTL, SIZE, PACKETS, TCP_FLAGS, ICMP_CODE = range(11)
FINGERPRINT, IP_ID, TCP_SEQ = range(11, 14)

LINK_TYPES = {
    1: "Ethernet", 101: "raw IP", 12: "raw IP", 14: "raw IP", 228: "IPv4", 229: "IPv6", 113: "Linux cooked",
    276: "Linux cooked v2", 0: "BSD loopback", 108: "OpenBSD loopback",
}  # fmt: skip
"""As listed at tcpdump.org/linktypes; 12 and 14 are what old programs on BSD write for 101."""

REASONS = (
    "",
    "interface is not described",
    "ts missing",
    "ts before captures.earliest",
    "ts after captures.latest",
    "link type is not supported",
    IPV6,
    "is ARP",
    "is not IP",
    "cut off before the IP header ends",
    "malformed IP header",
    "later fragment, which has no port",
    "cut off before the port",
    "duplicate packet",
)
"""Why a packet is no flow."""

LEFT_OUT = (IPV6, "is ARP", "is not IP", "later fragment, which has no port", "duplicate packet")
"""Those that say nothing against the capture."""

_READ, _NO_INTERFACE, _TIMELESS, _EARLY, _LATE, _NO_LINK, _IPV6, _ARP, _NOT_IP = range(9)
_CUT, _MALFORMED, _FRAGMENT, _PORTLESS, _DUPLICATE = range(9, 14)

REACH = 32
"""Packets that a packet is compared with to find duplicates."""

_ETHERNET, _COOKED, _COOKED2, _NULL, _LOOP = 1, 113, 276, 0, 108
_ICMP, _TCP = 1, 6


@njit(cache=True, nogil=True)
def decode(
    data: Bytes,
    records: Ints,
    earliest: int,
    latest: int,
    drop_duplicates: bool,
    columns: Ints,
    lost: Ints,
) -> tuple[int, int]:
    """How many of the packets are flows, and how many repeat an earlier one.

    `records` (4, N) says where in `data` they lie (`records.Walk`). `columns` (14, REACH + N) begins with the
    last packets before; the flows are written behind them. Fills `lost` (2, len(REASONS)) with how many
    packets were lost for each reason and the place of the first.
    """
    duplicates, kept = 0, REACH
    for i in range(records.shape[1]):
        begin = records[AT, i]
        end = begin + records[CAPTURED, i]
        time = records[TIME, i]
        for k in range(len(columns)):
            columns[k, kept] = MISSING
        columns[TS, kept] = time
        if records[LINK, i] == NO_INTERFACE:
            fault = _NO_INTERFACE
        elif time == NO_TIME:
            fault = _TIMELESS
        elif time < earliest:
            fault = _EARLY
        elif time >= latest:
            fault = _LATE
        else:
            fault, place = _link(data, begin, end, records[LINK, i])
            if fault == _READ:
                fault = _network(data, place, end, columns, kept)
        if fault == _READ and _repeats(columns, kept):
            duplicates += 1
            if drop_duplicates:
                fault = _DUPLICATE
        if fault == _READ:
            kept += 1
        else:
            if not lost[0, fault]:
                lost[1, fault] = begin
            lost[0, fault] += 1
    return kept - REACH, duplicates


@njit(cache=True, nogil=True)
def _link(data: Bytes, place: int, end: int, link: int) -> tuple[int, int]:
    """Fault, and where the IP header begins."""
    if link in (101, 12, 14, 228, 229):
        return _READ, place
    if link in (_NULL, _LOOP):
        return _loopback(data, place, end)
    if link == _COOKED2:
        kind, behind = place, place + 20
    elif link in (_ETHERNET, _COOKED):
        kind = place + (12 if link == _ETHERNET else 14)
        behind = kind + 2
    else:
        return _NO_LINK, place
    if behind > end:
        return _CUT, place
    number = u16(data, kind, True)
    while number in (0x8100, 0x88A8, 0x9100, 0x9200, 0x9300):  # tags of VLANs, one behind the other
        if behind + 4 > end:
            return _CUT, place
        number = u16(data, behind + 2, True)
        behind += 4
    if number == 0x0800:
        return _READ, behind
    if number == 0x86DD:
        return _IPV6, place
    return _ARP if number == 0x0806 else _NOT_IP, place


@njit(cache=True, nogil=True)
def _loopback(data: Bytes, place: int, end: int) -> tuple[int, int]:
    """The family of addresses stands first, in the byte order of the host that captured."""
    if place + 4 > end:
        return _CUT, place
    family = min(u32(data, place, True), u32(data, place, False))
    if family == 2:
        return _READ, place + 4
    return _IPV6 if family in (10, 24, 28, 30) else _NOT_IP, place  # Linux, BSD, FreeBSD, macOS


@njit(cache=True, nogil=True)
def _network(data: Bytes, place: int, end: int, columns: Ints, i: int) -> int:
    """Fault of a packet of IP; fills column i."""
    if place >= end:
        return _CUT
    version = data[place] >> 4
    if version != 4:
        return _IPV6 if version == 6 else _NOT_IP
    header = np.int64(data[place] & 15) * 4
    if header < 20:
        return _MALFORMED
    if place + header > end:
        return _CUT
    total = u16(data, place + 2, True)
    if 0 < total < header:
        return _MALFORMED
    if u16(data, place + 6, True) & 0x1FFF:
        return _FRAGMENT
    columns[SRC, i], columns[DST, i] = u32(data, place + 12, True), u32(data, place + 16, True)
    columns[PROTO, i], columns[TTL, i], columns[PACKETS, i] = data[place + 9], data[place + 8], 1
    columns[IP_ID, i] = u16(data, place + 4, True)
    if total > 0:
        columns[SIZE, i] = total
        end = min(end, place + total)
    _transport(data, place + header, end, columns, i)
    return _PORTLESS if columns[DST_PORT, i] == MISSING and columns[PROTO, i] in PORTED else _READ


@njit(cache=True, nogil=True)
def _transport(data: Bytes, place: int, end: int, columns: Ints, i: int) -> None:
    proto = columns[PROTO, i]
    if proto in PORTED and place + 4 <= end:
        columns[SRC_PORT, i], columns[DST_PORT, i] = u16(data, place, True), u16(data, place + 2, True)
    if proto == _TCP and place + 8 <= end:
        columns[TCP_SEQ, i] = u32(data, place + 4, True)
    if proto == _TCP and place + 14 <= end:
        columns[TCP_FLAGS, i] = data[place + 13]
    if proto == _ICMP and place + 1 <= end:
        columns[DST_PORT, i] = data[place]
    if proto == _ICMP and place + 2 <= end:
        columns[ICMP_CODE, i] = data[place + 1]


@njit(cache=True, nogil=True)
def _repeats(columns: Ints, i: int) -> bool:
    """Whether the packet equals one of those before it."""
    before = i - 1
    while before >= i - REACH and columns[TS, before] == columns[TS, i]:
        k = 1
        while k < len(columns) and columns[k, before] == columns[k, i]:
            k += 1
        if k == len(columns):
            return True
        before -= 1
    return False
