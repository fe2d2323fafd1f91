"""What a campaign is, and the default set of them.

A campaign is a number of sources with one purpose and one tool. Its kind says how targets are chosen and
which headers its packets carry; everything else is a number. The default set is built so that a port says
little: telnet, SSH, RDP and HTTPS are each shared by campaigns of several kinds.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, NamedTuple, get_args

import numpy as np
from numpy.typing import NDArray

from rayscan.errors import ConfigError

Kind = Literal[
    "zmap",  # horizontal, permuted targets, one port at a time, sources share the permutation in shards
    "masscan",  # horizontal, permuted targets, several ports, ip.id derived from target and sequence number
    "mirai",  # worm: random targets, sequence number equals the target's address
    "sweep",  # horizontal, one address after the other
    "survey",  # every port of one target, then the next, at fixed hours of the day
    "vertical",  # every port of a range on one target, then on the next
    "brute",  # the same few targets again and again
    "backscatter",  # answers of a victim to spoofed packets
    "misconfigured",  # one target, one port, periodic
    "noise",  # every source on its own: no campaign at all
]
KINDS: tuple[str, ...] = get_args(Kind)
ICMP, TCP, UDP = 1, 6, 17
LARGEST_NETWORK = 254  # hosts of the /24 that an organisation has


@dataclass(frozen=True)
class Campaign:
    """One campaign. Times called shares are shares of the simulated span, in [0, 1].

    Raises ConfigError for values that no campaign can have.
    """

    name: str
    kind: Kind
    ports: tuple[int, ...]  # destination ports; vertical: lowest and highest; backscatter: the victim's
    sources: int = 1
    flows: int = 1  # over the whole span, all sources together; at least one each
    weights: tuple[float, ...] = ()  # of the ports; equal when empty
    later_ports: tuple[int, ...] = ()  # in place of `ports` from `change` on, one for one
    change: float = 1.0  # share of the span
    begin: float = 0.0  # share of the span
    end: float = 1.0  # share of the span
    life: float = 1.0  # typical share of [begin, end] that a source is present; 1: all of it, for all
    spread: float = 30.0  # most active source over least active one (bounded Pareto)
    session: int = 0  # flows in one go; 0: as many as there are
    gap_s: float = 1.0  # mean seconds between flows of a session; less where they would not fit
    jitter: float = 1.0  # of these gaps: 0 constant, 1 exponential
    pace: float = 0.5  # how sources differ in their mean gap: sigma of a lognormal factor; 0 not at all
    hours: tuple[int, ...] = ()  # survey: hours of the day (UTC) at which sessions begin
    shuffled: bool = False  # vertical: ports in a shuffled order
    targets: int = 3  # brute: destinations of one source
    proto: int = TCP
    organisation: str | None = None  # known to lists: becomes the label; its sources share a /24

    def __post_init__(self) -> None:
        for wrong, why in self._faults():
            if wrong:
                raise ConfigError(f"campaign {self.name!r}: {why}")

    def _faults(self) -> list[tuple[bool, str]]:
        """Every rule, and whether it is broken."""
        n, ports = len(self.ports), self.ports + self.later_ports
        only_tcp = self.kind in ("masscan", "mirai")
        return [
            (self.kind not in KINDS, f"no kind {self.kind!r}; choose one of {', '.join(KINDS)}"),
            (self.sources < 1, f"sources is {self.sources}, needs at least 1"),
            (self.flows < self.sources, f"{self.flows} flows are too few for {self.sources} sources"),
            (not self.ports, "needs at least one port"),
            (any(not 0 <= port <= 65535 for port in ports), f"ports {ports} must be 0 to 65535"),
            (len(self.later_ports) not in (0, n), "later_ports must match ports one for one"),
            (len(self.weights) not in (0, n), "weights must match ports one for one"),
            (any(weight <= 0 for weight in self.weights), "weights must be positive"),
            (not 0 <= self.begin < self.end <= 1, f"needs 0 <= begin < end <= 1: {self.begin}, {self.end}"),
            (not 0 <= self.change <= 1, f"change {self.change} must lie in [0, 1]"),
            (not 0 < self.life <= 1, f"life {self.life} must lie in (0, 1]"),
            (not self.spread >= 1, f"spread {self.spread} must be at least 1"),
            (self.session < 0, f"session {self.session} must not be negative"),
            (not self.gap_s > 0, f"gap_s {self.gap_s} must be positive"),
            (not 0 <= self.pace <= 3, f"pace {self.pace} must lie in [0, 3]"),
            (not 0 <= self.jitter <= 1, f"jitter {self.jitter} must lie in [0, 1]"),
            (self.kind == "survey" and not self.hours, "a survey needs hours"),
            (any(not 0 <= hour <= 23 for hour in self.hours), f"hours {self.hours} must be 0 to 23"),
            (self.kind == "vertical" and not self._is_range(), "vertical needs ports (lowest, highest)"),
            (self.targets < 1, f"targets is {self.targets}, needs at least 1"),
            (self.proto not in (ICMP, TCP, UDP), f"proto {self.proto} must be 1 (ICMP), 6 (TCP) or 17 (UDP)"),
            (only_tcp and self.proto != TCP, f"{self.kind} speaks TCP: proto must be 6"),
        ]  # fmt: skip

    def _is_range(self) -> bool:
        return len(self.ports) == 2 and self.ports[0] < self.ports[1] and not self.later_ports


class _Row(NamedTuple):
    """A campaign of the default set, and how it grows with the telescope."""

    share: float  # of all sources
    least: int
    most: int
    weight: float  # of all flows
    campaign: Campaign


_ANY = 1 << 40
_NOISE_SOURCE_FLOWS = 6
_POOL = (21, 22, 23, 25, 80, 110, 143, 443, 445, 1433, 2222, 3306, 3389, 5432, 5900, 6379, 8080, 8443, 9200)

_ROWS = (
    # telnet: one port, four ways
    _Row(0.16, 8, _ANY, 15, Campaign(
        "telnet-worm", "mirai", (23, 2323), weights=(9, 1), life=0.35, spread=300, session=48,
        gap_s=200)),
    _Row(0.08, 8, _ANY, 9, Campaign(
        "telnet-worm-fast", "mirai", (23, 2323), weights=(9, 1), begin=0.25, life=0.3, spread=300,
        session=40, gap_s=0.7)),
    _Row(0.004, 4, 128, 6, Campaign(
        "telnet-zmap", "zmap", (23,), end=0.8, spread=3, session=200, gap_s=4)),
    _Row(0.02, 6, _ANY, 3, Campaign(
        "telnet-brute", "brute", (23,), life=0.6, session=20, gap_s=120, jitter=0.2)),
    # SSH
    _Row(0.005, 4, 128, 6, Campaign(
        "ssh-zmap", "zmap", (22,), later_ports=(2222,), change=0.6, spread=3, session=150, gap_s=9)),
    _Row(0.03, 8, _ANY, 6, Campaign(
        "ssh-brute", "brute", (22,), life=0.7, session=30, gap_s=300, jitter=0.05)),
    _Row(0.02, 6, _ANY, 3, Campaign(
        "ssh-brute-slow", "brute", (22,), begin=0.15, life=0.8, targets=2, gap_s=2500, jitter=1)),
    # RDP
    _Row(0.02, 6, _ANY, 4, Campaign(
        "rdp-brute", "brute", (3389,), life=0.5, session=50, gap_s=45, jitter=0.3, targets=4)),
    _Row(0.02, 6, _ANY, 4, Campaign(
        "rdp-sweep", "sweep", (3389,), life=0.6, session=64, gap_s=0.5, jitter=0.5)),
    _Row(0.004, 4, 96, 5, Campaign(
        "rdp-masscan", "masscan", (3388, 3389, 3390), end=0.9, spread=10, session=120, gap_s=0.03)),
    # databases and file shares
    _Row(0.03, 6, _ANY, 4, Campaign(
        "mssql-brute", "brute", (1433,), life=0.5, session=25, gap_s=900, jitter=0.1)),
    _Row(0.03, 6, _ANY, 4, Campaign(
        "mssql-sweep", "sweep", (1433,), later_ports=(445,), change=0.5, life=0.5, session=48, gap_s=3,
        jitter=0.3)),
    # the web
    _Row(0.004, 5, 64, 6, Campaign(
        "web-zmap", "zmap", (443,), spread=3, session=256, gap_s=1.5, organisation="tidepool-labs")),
    _Row(0.004, 4, 96, 5, Campaign(
        "web-masscan", "masscan", (80, 443, 8080, 8443), begin=0.1, end=0.7, spread=10, session=80,
        gap_s=0.02)),
    _Row(0.003, 5, 24, 5, Campaign(
        "web-survey", "survey", (22, 23, 80, 443, 3389, 8080), hours=(3,), spread=2, gap_s=1,
        organisation="northlight-survey")),
    _Row(0.003, 5, 24, 5, Campaign(
        "port-census", "survey", (21, 22, 25, 80, 443, 993, 3306, 5900),
        later_ports=(22, 80, 443, 3389, 5432, 6379, 8443, 9200), change=0.5, hours=(6, 18), spread=2,
        gap_s=6, jitter=0.5, organisation="nowhere-university")),
    _Row(0.002, 3, 24, 2, Campaign(
        "ping-census", "zmap", (8,), proto=ICMP, spread=2, session=100, gap_s=12,
        organisation="nowhere-university")),
    _Row(0.02, 6, _ANY, 2, Campaign(
        "tls-beacon", "misconfigured", (443,), life=0.7, session=96, gap_s=900, jitter=0.01,
        pace=0)),
    # many ports of few hosts
    _Row(0.02, 6, _ANY, 4, Campaign(
        "port-walk", "vertical", (1, 1024), life=0.6, session=128, gap_s=0.3, jitter=0.4)),
    _Row(0.02, 6, _ANY, 4, Campaign(
        "port-shuffle", "vertical", (1, 1024), shuffled=True, life=0.6, session=128, gap_s=0.3,
        jitter=0.4)),
    # nobody scans
    _Row(0.03, 6, _ANY, 4, Campaign(
        "web-backscatter", "backscatter", (80, 443), life=0.3, spread=100, session=60, gap_s=0.4)),
    _Row(0.02, 6, _ANY, 3, Campaign(
        "dns-backscatter", "backscatter", (53,), proto=UDP, begin=0.3, life=0.3, spread=100,
        session=90, gap_s=0.1)),
    _Row(0.03, 6, _ANY, 3, Campaign(
        "ntp-beacon", "misconfigured", (123,), proto=UDP, life=0.8, gap_s=1024, jitter=0.01, pace=0)),
)  # fmt: skip

LEAST_SOURCES = 200
LEAST_FLOWS_PER_SOURCE = 10


def default_campaigns(sources: int, flows: int, seed: int = 0) -> tuple[Campaign, ...]:
    """Campaigns and noise with exactly this many sources and flows.

    With 2,000 sources there are 23 campaigns; beyond, their number grows with the square root of the sources:
    further generations of the same kinds with other ports, tempo and time of activity. About four in
    ten sources are noise. Raises ConfigError below 200 sources or 10 flows a source.
    """
    if sources < LEAST_SOURCES:
        raise ConfigError(f"sources is {sources}; the default campaigns need at least {LEAST_SOURCES}")
    if flows < LEAST_FLOWS_PER_SOURCE * sources:
        raise ConfigError(
            f"flows is {flows}; {sources} sources need at least {LEAST_FLOWS_PER_SOURCE * sources} "
            f"({LEAST_FLOWS_PER_SOURCE} each)"
        )
    generations = max(1, round(float(np.sqrt(sources / 2000))))
    rng = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(0,)))
    rows = [_vary(row, g, rng) for g in range(generations) for row in _ROWS]
    sizes = [min(max(round(row.share * sources / generations), row.least), row.most) for row in rows]
    n_noise = sources - sum(sizes)
    n_noise_flows = _NOISE_SOURCE_FLOWS * n_noise
    counts = apportion(flows - n_noise_flows, np.array([row.weight for row in rows]), np.array(sizes))
    noise = Campaign("noise", "noise", _POOL, n_noise, n_noise_flows, life=0.05, spread=200, gap_s=600)
    return (
        *(
            replace(row.campaign, sources=size, flows=int(count))
            for row, size, count in zip(rows, sizes, counts, strict=True)
        ),
        noise,
    )


def apportion(total: int, weights: NDArray[np.floating], least: NDArray[np.integer]) -> NDArray[np.int64]:
    """Whole numbers that sum to `total`, each `least` plus a share ∝ `weights` (largest remainder)."""
    rest = total - int(least.sum())
    if rest < 0:
        raise ConfigError(f"{total} flows are too few: the sources of these campaigns need {least.sum()}")
    exact = rest * (weights / weights.sum())
    whole: NDArray[np.int64] = np.floor(exact).astype(np.int64)
    missing = rest - int(whole.sum())
    whole[np.argsort(whole - exact, kind="stable")[:missing]] += 1
    whole += least
    return whole


def _vary(row: _Row, generation: int, rng: np.random.Generator) -> _Row:
    """The row itself for generation 0; later ones get another name, tempo, time and, mostly, other ports."""
    if generation == 0:
        return row
    c = row.campaign
    begin, end = c.begin + 0.3 * rng.random(), c.end - 0.3 * rng.random()
    ports, later = c.ports, c.later_ports
    if c.proto == TCP and c.kind not in ("mirai", "vertical", "backscatter"):
        ports = tuple(rng.choice(_POOL, len(ports), replace=False).tolist())
        later = tuple(rng.choice(_POOL, len(later), replace=False).tolist())
    changed = replace(
        c,
        name=f"{c.name}-{generation + 1}",
        organisation=None if c.organisation is None else f"{c.organisation}-{generation + 1}",
        ports=ports,
        later_ports=later,
        begin=begin,
        end=max(end, begin + 0.2),
        gap_s=c.gap_s * float(rng.lognormal(0.0, 0.8)),
        session=max(round(c.session * float(rng.lognormal(0.0, 0.4))), 16) if c.session else 0,
        hours=tuple(sorted({(hour + int(rng.integers(24))) % 24 for hour in c.hours})),
    )
    return row._replace(campaign=changed)
