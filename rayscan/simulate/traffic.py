"""The flows of one campaign in one month, as arrays.

Three steps, each vectorised over all flows: the clock (when), the targets (where to, in which order) and the
headers (what the tool's packets look like). A flow knows its source and how many flows that source has
sent before, in all months; scan orders are functions of these two numbers, so no state is carried from
month to month.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from rayscan.simulate.campaigns import TCP, UDP, Campaign

_HOUR_US = 3_600_000_000
DAY_US = 24 * _HOUR_US
_FILL = 0.9  # of its slot that a session fills at most
_PUNCTUAL_US = 10 * 60_000_000  # a survey begins at most this long after the hour
_SERVERS = 8  # targets a brute-force campaign has in all
_SYN, _RST, _SYN_ACK = 0x02, 0x04, 0x12
ZMAP_ID = 54321

COLUMNS = {
    "ts": np.int64,
    "source": np.int32,  # position in the plan
    "dst_ip": np.uint32,
    "dst_port": np.uint16,
    "proto": np.uint8,
    "src_port": np.uint16,
    "ttl": np.uint8,
    "size": np.uint32,
    "tcp_flags": np.uint8,
    "ip_id": np.uint16,
    "tcp_seq": np.uint32,
}


class Span(NamedTuple):
    """What the clock needs of a campaign's sources in one month; arrays of shape (S,), times in µs UTC."""

    begin: NDArray[np.int64]
    end: NDArray[np.int64]
    flows: NDArray[np.int64]  # sent in the month
    pace: NDArray[np.float64]  # factor on the mean gap
    month: tuple[int, int]  # its own begin and end


class Run(NamedTuple):
    """The flows of a campaign in a month; arrays of shape (F,), source by source and in time order."""

    campaign: Campaign
    key: int  # the campaign's own random number
    salt: NDArray[np.uint32]  # the source's own
    hops: NDArray[np.uint8]
    source: NDArray[np.int64]  # position among the campaign's sources
    order: NDArray[np.int64]  # flows of this source before this one
    later: NDArray[np.bool_]  # after the change of ports
    base: int  # first address of the telescope
    bits: int  # the telescope has 2^bits addresses


Targets = tuple[NDArray[np.uint32], NDArray[np.uint16]]  # position in the telescope, port

# ---------------------------------------------------------------------------------------------
# When
# ---------------------------------------------------------------------------------------------


def clock(campaign: Campaign, span: Span, rng: np.random.Generator) -> NDArray[np.int64]:
    """Times (F,) of all flows, int64 µs UTC, source by source and in time order within a source.

    A source's time is divided into slots, one for each session. A session lies somewhere in its slot. Its
    gaps have a mean of `gap_s` times the source's pace, or less where it would fill more than nine tenths
    of the slot.
    """
    sessions, slot_begin, slot_length = _daily(campaign, span) if campaign.hours else _even(campaign, span)
    source = np.repeat(np.arange(len(sessions)), sessions)
    number, count = ragged_arange(sessions), span.flows[source]
    size = (number + 1) * count // sessions[source] - number * count // sessions[source]
    gap_us = campaign.gap_s * 1e6 * span.pace[source]
    duration = np.minimum(gap_us * np.maximum(size - 1, 0), _FILL * slot_length)
    room = slot_length - duration
    if campaign.hours:
        room = np.minimum(room, _PUNCTUAL_US)
    begin = slot_begin + np.floor(room * rng.random(len(room))).astype(np.int64)
    return np.repeat(begin, size) + _offsets(size, duration, campaign.jitter, rng)


def ragged_arange(sizes: NDArray[np.int64]) -> NDArray[np.int64]:
    """0, 1, ..., size - 1 for each size in turn."""
    position: NDArray[np.int64] = np.arange(int(sizes.sum())) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    return position


def _even(campaign: Campaign, span: Span) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float64]]:
    """Slots of equal length over each source's time: sessions (S,), begin and length (R,) of each slot."""
    n = span.flows
    sessions = -(-n // campaign.session) if campaign.session else np.minimum(n, 1)
    length = (span.end - span.begin) / np.maximum(sessions, 1)
    source = np.repeat(np.arange(len(n)), sessions)
    begin = span.begin[source] + np.floor(ragged_arange(sessions) * length[source]).astype(np.int64)
    return sessions, begin, length[source]


def _daily(
    campaign: Campaign, span: Span
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float64]]:
    """Slots from one of the campaign's hours to the next, as `_even`."""
    days = np.arange(span.month[0], span.month[1], DAY_US)
    slots = (days[:, None] + np.array(sorted(set(campaign.hours))) * _HOUR_US).ravel()
    length = np.diff(slots, append=span.month[1])
    low = np.minimum(np.searchsorted(slots, span.begin), len(slots) - 1)
    free = np.maximum(np.searchsorted(slots, span.end) - low, 1)
    sessions = np.minimum(free, span.flows)
    source = np.repeat(np.arange(len(sessions)), sessions)
    chosen = low[source] + ragged_arange(sessions) * free[source] // sessions[source]
    return sessions, slots[chosen], length[chosen].astype(np.float64)


def _offsets(
    size: NDArray[np.int64], duration: NDArray[np.float64], jitter: float, rng: np.random.Generator
) -> NDArray[np.int64]:
    """Time since its session's begin of each flow: 0 for the first, the duration for the last."""
    first = np.cumsum(size) - size
    total = int(size.sum())
    gaps = rng.standard_exponential(total) * jitter + (1 - jitter) if jitter else np.ones(total)
    passed = np.cumsum(gaps)
    whole = passed[first + size - 1] - passed[first]
    scale = np.divide(duration, whole, out=np.zeros_like(duration), where=whole > 0)
    since = passed - np.repeat(passed[first], size)
    offsets: NDArray[np.int64] = (since * np.repeat(scale, size)).astype(np.int64)
    return offsets


# ---------------------------------------------------------------------------------------------
# Where to
# ---------------------------------------------------------------------------------------------


def permute(x: NDArray[np.integer], bits: int, key: int) -> NDArray[np.uint32]:
    """A keyed permutation of [0, 2^bits), taken piecewise: x // 2^bits selects another one each time.

    Rounds of an odd multiplication, an addition and a shift by half, all modulo 2^bits: each undoable, so
    every value is met once in 2^bits steps, as a scanner's permutation meets every address.
    """
    mask, half = np.uint32((1 << bits) - 1), np.uint32(max(bits // 2, 1))
    turn = (x >> bits).astype(np.uint32) * np.uint32(0x632BE5AB) + np.uint32(key)
    y = x.astype(np.uint32) & mask
    for odd in (0x9E3779B1, 0x85EBCA77, 0xC2B2AE3D):
        y = (y * np.uint32(odd) + turn) & mask
        y ^= y >> half
        turn = turn * np.uint32(0x2C1B3C6D) + np.uint32(0x297A2D39)
    return y


def _permuted(run: Run, rng: np.random.Generator) -> Targets:
    """One permutation of all addresses; source s of n takes its elements s, s + n, s + 2n, ..."""
    return permute(_shard(run, run.order), run.bits, run.key), _ports(run, _drawn(run, rng))


def _shard(run: Run, order: NDArray[np.int64]) -> NDArray[np.int64]:
    return order * run.campaign.sources + run.source


def _random(run: Run, rng: np.random.Generator) -> Targets:
    return _anywhere(run, rng), _ports(run, _drawn(run, rng))


def _sequential(run: Run, rng: np.random.Generator) -> Targets:
    at = run.order + run.salt.astype(np.int64)
    return (at & ((1 << run.bits) - 1)).astype(np.uint32), _ports(run, _drawn(run, rng))


def _host_by_host(run: Run, rng: np.random.Generator) -> Targets:
    host, port = np.divmod(run.order, len(run.campaign.ports))
    return permute(_shard(run, host), run.bits, run.key), _ports(run, port)


def _port_by_port(run: Run, rng: np.random.Generator) -> Targets:
    low, high = run.campaign.ports
    host, at = np.divmod(run.order, high - low + 1)
    offset = permute(host + run.salt, run.bits, run.key)
    ports = np.arange(low, high + 1, dtype=np.uint16)
    if run.campaign.shuffled:
        ports = np.random.default_rng(run.key).permutation(ports)
        at = (at + run.salt + offset) % len(ports)
    return offset, ports[at]


def _few(run: Run, rng: np.random.Generator) -> Targets:
    """Some of the campaign's servers, in turn."""
    at = (run.salt + run.order % run.campaign.targets) % _SERVERS
    return permute(at, run.bits, run.key), _ports(run, _drawn(run, rng))


def _one(run: Run, rng: np.random.Generator) -> Targets:
    return permute(np.zeros_like(run.order), run.bits, run.key), _ports(run, _drawn(run, rng))


def _spoofed(run: Run, rng: np.random.Generator) -> Targets:
    return _anywhere(run, rng), rng.integers(1024, 1 << 16, len(run.order), dtype=np.uint16)


def _alone(run: Run, rng: np.random.Generator) -> Targets:
    """Each source has one port of its own: half of them one that campaigns use too."""
    common = _ports(run, (run.salt >> 1) % len(run.campaign.ports))
    return _anywhere(run, rng), np.where(run.salt & 1, common, (run.salt >> 16).astype(np.uint16))


def _anywhere(run: Run, rng: np.random.Generator) -> NDArray[np.uint32]:
    return rng.integers(0, 1 << run.bits, len(run.order), dtype=np.uint32)


def _ports(run: Run, choice: NDArray[np.integer]) -> NDArray[np.uint16]:
    """Port number `choice` of the campaign, before or after the change."""
    c = run.campaign
    table = np.array((c.ports, c.later_ports or c.ports), np.uint16)
    ports: NDArray[np.uint16] = table[run.later.astype(np.intp), choice]
    return ports


def _drawn(run: Run, rng: np.random.Generator) -> NDArray[np.integer]:
    """A port's position for each flow, by weight."""
    c = run.campaign
    if len(c.ports) == 1:
        return np.zeros(len(run.order), np.intp)
    weights = np.array(c.weights or [1.0] * len(c.ports))
    edges = np.cumsum(weights)[:-1] / weights.sum()
    return np.searchsorted(edges, rng.random(len(run.order)), side="right")


_TARGETS: dict[str, Callable[[Run, np.random.Generator], Targets]] = {
    "zmap": _permuted,
    "masscan": _permuted,
    "mirai": _random,
    "sweep": _sequential,
    "survey": _host_by_host,
    "vertical": _port_by_port,
    "brute": _few,
    "backscatter": _spoofed,
    "misconfigured": _one,
    "noise": _alone,
}

# ---------------------------------------------------------------------------------------------
# What it looks like
# ---------------------------------------------------------------------------------------------


class _Stack(NamedTuple):
    """Habits of a tool or operating system."""

    ttl: int  # as sent
    size: int  # of a TCP packet, IP header included
    src_port: str  # random, fixed (one a source) or counter
    ip_id: str  # zmap, masscan, random, counter or zero


_STACKS = {
    "zmap": _Stack(255, 40, "random", "zmap"),
    "masscan": _Stack(255, 40, "fixed", "masscan"),
    "mirai": _Stack(64, 40, "fixed", "random"),
    "sweep": _Stack(128, 52, "counter", "counter"),
    "survey": _Stack(64, 44, "random", "random"),
    "vertical": _Stack(64, 44, "fixed", "random"),
    "brute": _Stack(64, 60, "counter", "random"),
    "backscatter": _Stack(64, 44, "fixed", "zero"),
    "misconfigured": _Stack(128, 52, "counter", "counter"),
    "noise": _Stack(64, 60, "random", "random"),
}
_SIZE_UDP, _SIZE_ICMP = 76, 84


def fill(columns: dict[str, NDArray[Any]], run: Run, rng: np.random.Generator) -> None:
    """Write all columns of these flows but `ts` and `source` into arrays of shape (F,)."""
    stack, n = _STACKS[run.campaign.kind], len(run.order)
    offset, columns["dst_port"][:] = _TARGETS[run.campaign.kind](run, rng)
    dst = np.uint32(run.base) + offset
    seq = dst if run.campaign.kind == "mirai" else rng.integers(0, 1 << 32, n, dtype=np.uint32)
    columns["dst_ip"][:] = dst
    columns["tcp_seq"][:] = seq
    columns["proto"][:] = run.campaign.proto
    columns["src_port"][:] = _src_port(run, stack, rng)
    columns["ttl"][:] = np.uint8(stack.ttl) - run.hops
    columns["size"][:] = {TCP: stack.size, UDP: _SIZE_UDP}.get(run.campaign.proto, _SIZE_ICMP)
    columns["tcp_flags"][:] = _flags(run)
    columns["ip_id"][:] = _ip_id(run, stack, dst ^ columns["dst_port"] ^ seq, rng)


def _src_port(run: Run, stack: _Stack, rng: np.random.Generator) -> NDArray[np.integer]:
    if run.campaign.kind == "backscatter":
        return _ports(run, run.salt % len(run.campaign.ports))
    if stack.src_port == "random":
        return rng.integers(32768, 61000, len(run.order), dtype=np.uint16)
    step = run.order if stack.src_port == "counter" else 0
    return 32768 + (run.salt + step) % 28232


def _ip_id(
    run: Run, stack: _Stack, mixed: NDArray[np.integer], rng: np.random.Generator
) -> NDArray[np.integer] | int:
    """IP identification. `mixed` is destination ^ port ^ sequence number, masscan's choice."""
    if stack.ip_id == "masscan":
        return mixed & 0xFFFF
    if stack.ip_id == "random":
        return rng.integers(0, 1 << 16, len(run.order), dtype=np.uint16)
    if stack.ip_id == "counter":
        return (run.salt + run.order) & 0xFFFF
    return ZMAP_ID if stack.ip_id == "zmap" else 0


def _flags(run: Run) -> NDArray[np.integer] | int:
    """SYN; a victim of spoofed SYNs answers with SYN-ACK if it listens, else with RST."""
    if run.campaign.kind != "backscatter":
        return _SYN
    return np.where(run.salt & 3, _SYN_ACK, _RST)
