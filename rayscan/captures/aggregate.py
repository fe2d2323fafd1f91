"""Packets -> flows of several packets, with the open flows in a table of bounded size.

A packet joins the open flow of its source, destination, port and protocol if its time is less than `seconds`
away from the flow's first; otherwise that flow is closed and the packet opens the next. So retransmissions
count as one attempt, and packets in time order make flows that span less than `seconds`. What a flow says:

- time: of its earliest packet; packets and size: sums; TCP flags: all that were set;
- fingerprint: the marks that all its packets carry, since one that holds by chance does not hold twice;
- source port, TTL and ICMP code: of the packet that opened it.

Packets are taken in the order of the file, so the result does not depend on how it is cut into batches. When
a million are open, flows are closed that no packet of the present can join; if these are less than half, all
are. So there are two exceptions, a packet that comes very late and more than a million flows in so many
seconds. Both give two flows where one was possible; no packet is lost.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from rayscan.captures.headers import (
    COLUMNS,
    DST,
    DST_PORT,
    FINGERPRINT,
    PACKETS,
    PROTO,
    SIZE,
    SRC,
    TCP_FLAGS,
    TS,
)
from rayscan.captures.values import Ints
from rayscan.schema import MISSING

OPEN = 1 << 20
"""Most flows that are open at a time, a power of two: their table then takes 235 MB."""

_COUNT, _CLOCK = 0, 1  # state: how many flows are open, and the latest time


class Aggregator:
    """The open flows of one capture. Packets and flows have a row for each of headers.COLUMNS."""

    def __init__(self, seconds: int) -> None:
        self._span = seconds * 10**6
        self._table = np.zeros((2, len(COLUMNS)), np.int64)  # a slot without packets is free
        self._state = np.zeros(2, np.int64)

    def add(self, packets: Ints) -> Ints:
        """The flows that these packets close, in the order in which they are closed."""
        most = min(OPEN, int(self._state[_COUNT]) + packets.shape[1])
        if len(self._table) < 2 * most:
            self._table = _moved(self._table, 1 << (2 * most - 1).bit_length())
        closed = np.empty((len(COLUMNS), self._state[_COUNT] + packets.shape[1]), np.int64)
        return closed[:, : _add(packets, self._table, self._state, self._span, OPEN, closed)]

    def rest(self) -> Ints:
        """The flows that are open still, by time."""
        flows = self._table[self._table[:, PACKETS] > 0]
        return flows[np.argsort(flows[:, TS], kind="stable")].T


@njit(cache=True, nogil=True)
def _add(packets: Ints, table: Ints, state: Ints, span: int, limit: int, closed: Ints) -> int:
    count = 0
    for i in range(packets.shape[1]):
        slot = _slot(table, packets[SRC, i], packets[DST, i], packets[DST_PORT, i], packets[PROTO, i])
        there = table[slot, PACKETS] > 0
        if there and abs(packets[TS, i] - table[slot, TS]) < span:
            _join(packets, i, table, slot)
            continue
        if there:
            closed[:, count] = table[slot]
            count += 1
        state[_COUNT] += not there
        table[slot] = packets[:, i]
        state[_CLOCK] = max(state[_CLOCK], packets[TS, i])
        if state[_COUNT] > limit:
            count = _close(table, state, span, closed, count)
    return count


@njit(cache=True, nogil=True)
def _slot(table: Ints, src: int, dst: int, dst_port: int, proto: int) -> np.int64:
    """Where the flow is, or the free slot where it belongs."""
    last = np.uint64(len(table) - 1)
    value = np.uint64(src << 32 | dst) * np.uint64(0x9E3779B97F4A7C15)
    value = (value ^ value >> np.uint64(32) ^ np.uint64(dst_port + 1 << 8 | proto)) * np.uint64(
        0x9E3779B97F4A7C15
    )
    slot = np.int64((value ^ value >> np.uint64(32)) & last)
    while table[slot, PACKETS] > 0 and not (
        table[slot, SRC] == src
        and table[slot, DST] == dst
        and table[slot, DST_PORT] == dst_port
        and table[slot, PROTO] == proto
    ):
        slot = (slot + 1) % len(table)
    return slot


@njit(cache=True, nogil=True)
def _join(packets: Ints, i: int, table: Ints, slot: int) -> None:
    flow = table[slot]
    flow[TS] = min(flow[TS], packets[TS, i])
    flow[PACKETS] += packets[PACKETS, i]
    flow[FINGERPRINT] &= packets[FINGERPRINT, i]
    if packets[SIZE, i] != MISSING:
        flow[SIZE] = packets[SIZE, i] + max(flow[SIZE], 0)
    if packets[TCP_FLAGS, i] != MISSING:
        flow[TCP_FLAGS] = packets[TCP_FLAGS, i] | max(flow[TCP_FLAGS], 0)


@njit(cache=True, nogil=True)
def _close(table: Ints, state: Ints, span: int, closed: Ints, count: int) -> int:
    """Close what is over, or everything if that frees less than half. Returns how many are closed by now."""
    flows = table[table[:, PACKETS] > 0]
    table[:] = 0
    over = flows[:, TS] + span <= state[_CLOCK]
    if 2 * over.sum() < len(flows):
        over[:] = True
    state[_COUNT] = 0
    for i in range(len(flows)):
        if over[i]:
            closed[:, count] = flows[i]
            count += 1
        else:
            _put(table, flows[i])
            state[_COUNT] += 1
    return count


@njit(cache=True, nogil=True)
def _moved(table: Ints, slots: int) -> Ints:
    """The flows in a larger table."""
    larger = np.zeros((slots, table.shape[1]), np.int64)
    for flow in table:
        if flow[PACKETS] > 0:
            _put(larger, flow)
    return larger


@njit(cache=True, nogil=True)
def _put(table: Ints, flow: Ints) -> None:
    table[_slot(table, flow[SRC], flow[DST], flow[DST_PORT], flow[PROTO])] = flow
