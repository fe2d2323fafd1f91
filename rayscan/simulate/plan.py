"""Which sources exist, when each is there, and how many flows it sends: all that is decided once.

Activity of the sources of one campaign follows a bounded Pareto distribution, as it does on real telescopes.
A source sends at a constant mean rate while it is present, so how many flows it has sent by any time
is a closed formula: every month can be generated alone, and the months add up exactly.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from rayscan.errors import ConfigError
from rayscan.simulate.campaigns import LARGEST_NETWORK, Campaign, apportion

_PARETO_EXPONENT = 1.1
_SHORTEST_LIFE = 0.02

# Special-purpose addresses: the IANA registry begun by RFC 6890, and multicast (RFC 5771).
_RESERVED = (
    "0.0.0.0/8", "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "169.254.0.0/16", "172.16.0.0/12",
    "192.0.0.0/24", "192.0.2.0/24", "192.31.196.0/24", "192.52.193.0/24", "192.88.99.0/24", "192.168.0.0/16",
    "192.175.48.0/24", "198.18.0.0/15", "198.51.100.0/24", "203.0.113.0/24", "224.0.0.0/4", "240.0.0.0/4",
)  # fmt: skip


@dataclass(frozen=True)
class Plan:
    """All sources, campaign by campaign. Arrays of shape (S,) unless said otherwise."""

    start: NDArray[np.int64]  # (C + 1,): the sources of campaign c are start[c] to start[c + 1]
    campaign: NDArray[np.int32]  # position of the source's campaign
    address: NDArray[np.uint32]
    begin: NDArray[np.int64]  # µs UTC: present from here
    end: NDArray[np.int64]  # µs UTC: to before here
    flows: NDArray[np.int64]  # over the whole span
    pace: NDArray[np.float64]  # factor on the mean gap
    hops: NDArray[np.uint8]  # between source and telescope
    salt: NDArray[np.uint32]  # what is drawn once for a source: ports, offsets, counters begin here
    key: NDArray[np.uint32]  # (C,): the same for a campaign

    def of(self, campaign: int) -> slice:
        return slice(int(self.start[campaign]), int(self.start[campaign + 1]))

    def sent_before(self, time: int, sources: slice) -> NDArray[np.int64]:
        """Flows that each of the sources has sent before `time` (µs UTC)."""
        begin, end = self.begin[sources], self.end[sources]
        share = np.clip((time - begin) / (end - begin), 0.0, 1.0)
        sent: NDArray[np.int64] = np.floor(self.flows[sources] * share).astype(np.int64)
        return sent


def make_plan(
    campaigns: Sequence[Campaign], seed: int, edges: NDArray[np.int64], telescope: ipaddress.IPv4Network
) -> Plan:
    """The sources of these campaigns. `edges` are the months' boundaries, int64 µs UTC, shape (M + 1,)."""
    rng = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(1,)))
    sizes = np.array([c.sources for c in campaigns], np.int64)
    n = int(sizes.sum())
    lives = [_lives(c, edges, rng) for c in campaigns]
    return Plan(
        start=np.concatenate(([0], np.cumsum(sizes))),
        campaign=np.repeat(np.arange(len(sizes), dtype=np.int32), sizes),
        address=_addresses(campaigns, telescope, rng),
        begin=np.concatenate([begin for begin, _, _ in lives]),
        end=np.concatenate([end for _, end, _ in lives]),
        flows=np.concatenate([flows for _, _, flows in lives]),
        pace=np.exp(np.repeat([c.pace for c in campaigns], sizes) * rng.standard_normal(n)),
        hops=rng.integers(5, 26, n, dtype=np.uint8),
        salt=rng.integers(0, 1 << 32, n, dtype=np.uint32),
        key=rng.integers(0, 1 << 32, len(campaigns), dtype=np.uint32),
    )


def is_reserved(address: NDArray[np.uint32]) -> NDArray[np.bool_]:
    """Which addresses no public host has: special-purpose (RFC 6890) or multicast."""
    networks = sorted(ipaddress.IPv4Network(text) for text in _RESERVED)
    first = np.array([int(net.network_address) for net in networks], np.int64)
    last = np.array([int(net.broadcast_address) for net in networks], np.int64)
    at = np.searchsorted(first, address.astype(np.int64), side="right") - 1
    return address <= last[at]


def _lives(
    campaign: Campaign, edges: NDArray[np.int64], rng: np.random.Generator
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Begin, end and flows of each source of one campaign."""
    n, span = campaign.sources, int(edges[-1] - edges[0])
    life = np.ones(n)
    if campaign.life < 1:
        life = np.clip(rng.exponential(campaign.life, n), _SHORTEST_LIFE, 1)
    start = campaign.begin + (campaign.end - campaign.begin) * (1 - life) * rng.random(n)
    stop = start + (campaign.end - campaign.begin) * life
    begin = edges[0] + np.floor(start * span).astype(np.int64)
    begin = np.minimum(begin, edges[-1] - 1)
    end = np.clip(edges[0] + np.floor(stop * span).astype(np.int64), begin + 1, edges[-1])
    activity = _bounded_pareto(campaign.spread, n, rng) * life
    return begin, end, apportion(campaign.flows, activity, np.ones(n, np.int64))


def _bounded_pareto(spread: float, n: int, rng: np.random.Generator) -> NDArray[np.float64]:
    """Values in [1, spread] by inversion of the bounded Pareto distribution."""
    survival = 1 - rng.random(n) * (1 - spread**-_PARETO_EXPONENT)
    activity: NDArray[np.float64] = survival ** (-1 / _PARETO_EXPONENT)
    return activity


def _addresses(
    campaigns: Sequence[Campaign], telescope: ipaddress.IPv4Network, rng: np.random.Generator
) -> NDArray[np.uint32]:
    """A different public address for every source; those of one organisation share a /24."""
    hosts = _organisation_hosts(campaigns, telescope, rng)
    networks = np.unique([int(h[0]) >> 8 for h in hosts.values()]).astype(np.uint32)
    n_spread = sum(c.sources for c in campaigns if c.organisation is None)
    spread = _draw(n_spread, networks, telescope, rng, shift=0)
    parts, at = [], 0
    used = dict.fromkeys(hosts, 0)
    for c in campaigns:
        if c.organisation is None:
            parts.append(spread[at : at + c.sources])
            at += c.sources
        else:
            parts.append(hosts[c.organisation][used[c.organisation] :][: c.sources])
            used[c.organisation] += c.sources
    return np.concatenate(parts)


def _organisation_hosts(
    campaigns: Sequence[Campaign], telescope: ipaddress.IPv4Network, rng: np.random.Generator
) -> dict[str, NDArray[np.uint32]]:
    """The hosts of each organisation's own /24, shuffled."""
    need: dict[str, int] = {}
    for c in campaigns:
        if c.organisation is not None:
            need[c.organisation] = need.get(c.organisation, 0) + c.sources
    for name, count in need.items():
        if count > LARGEST_NETWORK:
            raise ConfigError(f"organisation {name!r} has {count} sources; its /24 holds {LARGEST_NETWORK}")
    networks = _draw(len(need), np.array([], np.uint32), telescope, rng, shift=8)
    hosts = np.arange(1, LARGEST_NETWORK + 1, dtype=np.uint32)
    return {
        name: (network << np.uint32(8)) + rng.permutation(hosts)
        for name, network in zip(need, networks, strict=True)
    }


def _draw(
    n: int,
    taken: NDArray[np.uint32],
    telescope: ipaddress.IPv4Network,
    rng: np.random.Generator,
    shift: int,
) -> NDArray[np.uint32]:
    """`n` different public networks of 2^shift addresses, outside the telescope and the /24s `taken`."""
    first, last = int(telescope.network_address) >> shift, int(telescope.broadcast_address) >> shift
    found = np.array([], np.uint32)
    while len(found) < n:
        more = rng.integers(0, 1 << (32 - shift), n + n // 4 + 16, dtype=np.uint32)
        inside = (more >= first) & (more <= last)
        bad = inside | is_reserved(more << np.uint32(shift)) | np.isin(more >> np.uint32(8 - shift), taken)
        found = np.concatenate((found, more[~bad]))
        found = found[np.sort(np.unique(found, return_index=True)[1])]
    return found[:n]
