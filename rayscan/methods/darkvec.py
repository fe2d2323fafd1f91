"""DarkVec: senders that turn up together are alike (Gioacchini et al., CoNEXT 2021; ACM TOIT 23(3), 2023).

A word is a source. A sentence is the senders that one service saw in one hour, in the order of their flows,
without immediate repeats. Skip-gram over the sentences gives each sender a vector; `darkvec` learns from
all days at once, `i-darkvec` takes day after day. What makes two senders alike is that they come at the
same time for the same thing, not what they do: the opposite of rayscan's own encoder, and worth having
beside it.

Services are one for all ("single"), classes of ports that we know to belong together ("dks", for domain
knowledge), or the commonest ports each on its own and one more for the rest ("auto", the authors' best).

A vector belongs to a source, or with `i-darkvec` to a source and a day: what it was after the last day until
then on which the source was seen (or the first one after). So sequences share theirs, and sources that
training never saw have none. Each of their sequences gets a vector of our making, flagged as inferred: every
flow counts the mean vector of the known senders that share its service and hour. It depends on the sequences
that are embedded along with it; give whole periods. Without a known sender near, a sequence is not covered.

Departures from the authors' code, which has errors: only immediate repeats are left out (one variant
compares the last sender with the first, so that a, a leaves nothing and a, b, b, a loses its end), and
senders that fall below the least number of flows in the trailing days are no longer trained, since theirs
are vectors of another time; they keep those of their days. `darkvec` counts flows and learns over all days
that there are, not over the last thirty. The rate starts anew every day, as published: an incremental model
knows no last day to fall towards. Votes among neighbours are in `evaluation.neighbours`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from rayscan.errors import ConfigError, DataError
from rayscan.methods.method import (
    ABSENT,
    Arrays,
    Embedded,
    Facts,
    Flows,
    count_cells,
    flows_of,
    positions,
    training_of,
    unit_rows,
)
from rayscan.methods.words import Sentences, Skipgram, Words, learn, sentences

F32 = NDArray[np.float32]
Ints = NDArray[np.int64]

HOUR_US = 3_600_000_000
DAY_US = 24 * HOUR_US
ICMP = 1

PORT_CLASSES: dict[str, dict[int, tuple[int, ...]]] = {
    "telnet": {6: (23, 107, 992, 2323)},
    "ssh": {6: (22, 2222)},
    "ftp": {6: (20, 21, 989, 990), 17: (69,)},
    "mail": {6: (25, 110, 143, 465, 587, 993, 995)},
    "web": {6: (80, 81, 443, 591, 8000, 8008, 8080, 8081, 8088, 8443, 8888), 17: (443,)},
    "proxy": {6: (1080, 3128, 8118, 9050)},
    "dns": {6: (53, 853), 17: (53, 853, 5353, 5355)},
    "database": {
        6: (1433, 1521, 3306, 5432, 5984, 6379, 7000, 9042, 9200, 9300, 11211, 27017, 27018, 27019),
        17: (1434, 11211),
    },
    "windows": {6: (135, 139, 445), 17: (137, 138)},
    "remote desktop": {6: (3389, 5800, 5900, 5901, 5938), 17: (3389,)},
    "remote management": {
        6: (5555, 5985, 5986, 7547, 16992, 16993, 37215, 52869, 60001),
        17: (161, 162, 623),
    },
    "kerberos and directory": {6: (88, 389, 464, 636, 749, 3268, 3269), 17: (88, 389, 464)},
    "containers": {6: (2375, 2376, 2379, 4243, 6443, 10250)},
    "industry": {6: (102, 502, 1911, 2404, 4840, 20000, 44818), 17: (20000, 44818, 47808)},
    "things": {6: (554, 1883, 8554, 8883, 37777), 17: (1900, 3702, 5683, 37810)},
    "voice": {6: (5060, 5061), 17: (5060, 5061)},
    "time": {17: (123,)},
    "peer to peer": {6: (4662, *range(6881, 6890), 30303), 17: (4672, *range(6881, 6890), 30303)},
}
"""Ports by protocol number, by what IANA registers and devices commonly run; ours, after the idea."""

PORT_RANGES = (1024, 49_152)
"""Where ports of no class are parted: system, user and ephemeral ones."""


@dataclass(frozen=True)
class Settings(Skipgram):
    daily: bool
    services: str = "auto"
    commonest: int = 2500  # of "auto"
    collapse: bool = True  # leave out immediate repeats of a sender
    active: int = 10  # flows that a sender needs
    trailing_days: int = 30  # within so many days


DARKVEC = Settings(d=50, window=25, negative=5, epochs=20, daily=False)
I_DARKVEC = Settings(d=200, window=5, negative=5, epochs=1, daily=True)


def commonest_services(flows: Flows, settings: Settings) -> Ints:
    """What "auto" takes for services: those with most flows, ascending; none for the other kinds."""
    if settings.services != "auto":
        return np.zeros(0, np.int64)
    services, counts = np.unique(flows.service, return_counts=True)
    return np.sort(services[np.lexsort((services, -counts))[: settings.commonest]])


def service_of(flows: Flows, kind: str, commonest: Ints) -> Ints:
    """The service of each flow, int64 (F,), from 0. Raises ConfigError for a kind that is none."""
    if kind == "single":
        return np.zeros(len(flows.src), np.int64)
    if kind == "auto":
        place = positions(commonest, flows.service)
        return np.where(place == ABSENT, len(commonest), place)
    if kind == "dks":
        return _port_class(flows)
    raise ConfigError(f"there is no kind of services {kind!r}; there are single, dks, auto")


def corpus_of(src: Ints, hour: Ints, service: Ints, *, collapse: bool) -> Sentences:
    """Senders by hour, then service, then time; the arguments are of flows in order of time, (F,)."""
    order = np.lexsort((service, hour))
    src, hour, service = src[order], hour[order], service[order]
    group = np.cumsum(np.r_[0, (np.diff(hour) != 0) | (np.diff(service) != 0)])[: len(src)]
    if collapse:
        repeat = np.r_[False, (src[1:] == src[:-1]) & (group[1:] == group[:-1])][: len(src)]
        src, group = src[~repeat], group[~repeat]
    return sentences(src, group)


def train(flows: Flows, service: Ints, settings: Settings, seed: int) -> tuple[Senders, Facts]:
    """The senders' vectors, none if no two ever met; and how it went."""
    order = np.argsort(flows.ts, kind="stable")
    src, ts, service = flows.src[order], flows.ts[order], service[order]
    step = ts // DAY_US if settings.daily else np.zeros(len(ts), np.int64)
    known: Words | None = None
    seen: list[tuple[Ints, Ints, F32]] = []
    facts = {"steps": 0, "sentences": 0, "words": 0, "forgotten": 0}
    for today in np.unique(step).tolist():
        begin, end = np.searchsorted(step, [today, today + 1])
        trailing = np.searchsorted(step, today - settings.trailing_days + 1)
        senders, counts = np.unique(src[trailing:end], return_counts=True)
        active = senders[counts >= settings.active]
        if known is not None:
            kept = np.isin(known.words, active)
            facts["forgotten"] += int((~kept).sum())
            known = known.only(kept)
        now = begin + np.flatnonzero(np.isin(src[begin:end], active))
        corpus = corpus_of(src[now], ts[now] // HOUR_US, service[now], collapse=settings.collapse)
        if len(corpus):
            known = learn(corpus, settings, seed + facts["steps"], known)
        if known is not None:
            here = np.isin(known.words, src[now])
            seen.append((known.words[here], np.full(int(here.sum()), today), known.vectors[here]))
        facts["steps"] += 1
        facts["sentences"] += len(corpus)
        facts["words"] += len(corpus.words)
    return Senders.of(seen, settings.d), facts


@dataclass(frozen=True)
class Senders:
    """Vectors of senders by day, V of them, ordered by sender and then day.

    sender   int64 (V,)
    day      int64 (V,), days since 1970; 0 where all days are learnt at once
    vectors  float32 (V, d)
    """

    sender: Ints
    day: Ints
    vectors: F32

    @classmethod
    def of(cls, seen: Sequence[tuple[Ints, Ints, F32]], width: int) -> Senders:
        """From senders, days and vectors of each step."""
        if not seen:
            return cls(np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros((0, width), np.float32))
        sender, day, vectors = (np.concatenate(column) for column in zip(*seen, strict=True))
        order = np.lexsort((day, sender))
        return cls(sender[order], day[order], vectors[order])

    def rows(self, src: Ints, day: Ints) -> Ints:
        """Row of the last day until then on which the sender was seen, else of its first; or ABSENT."""
        if not len(self.sender):
            return np.full(len(src), ABSENT)
        last = np.searchsorted(self._key(self.sender, self.day), self._key(src, day), side="right") - 1
        first = np.minimum(last + 1, len(self.sender) - 1)
        mine = self.sender[np.maximum(last, 0)] == src
        return np.where(mine & (last >= 0), last, np.where(self.sender[first] == src, first, ABSENT))

    @staticmethod
    def _key(sender: Ints, day: Ints) -> Ints:
        return (sender << 24) + day  # 2^24 days


class Darkvec:
    """`senders`, and the `commonest` services, if "auto"."""

    def __init__(self, senders: Senders, commonest: Ints, facts: Facts) -> None:
        self.senders, self.commonest, self.facts = senders, commonest, facts

    @property
    def arrays(self) -> Arrays:
        return {**vars(self.senders), "commonest": self.commonest}

    def embed(self, sequences: pa.Table) -> Embedded:
        place = self._place(sequences["src"].to_numpy(), sequences["start"].cast(pa.int64()).to_numpy())
        vectors = np.zeros((len(place), self.senders.vectors.shape[1]), np.float32)
        vectors[place != ABSENT] = unit_rows(self.senders.vectors[place[place != ABSENT]])
        unknown = ~vectors.any(axis=1)
        vectors[unknown] = self._company(flows_of(sequences), sequences.num_rows)[unknown]
        covered = np.asarray(vectors.any(axis=1))
        return Embedded(vectors, covered, covered & unknown)

    def _place(self, src: Ints, ts: Ints) -> Ints:
        """Row of each source's vector at that time."""
        day = ts // DAY_US if self.facts["settings"]["daily"] else np.zeros(len(ts), np.int64)
        return self.senders.rows(src.astype(np.int64), day)

    def _company(self, flows: Flows, n: int) -> F32:
        """For each sequence whose source is not known the mean over its flows of the mean vector of the
        known senders in the same service and hour, scaled to length 1; zeros for all others."""
        service = service_of(flows, self.facts["settings"]["services"], self.commonest)
        window = np.unique((flows.ts // HOUR_US << 32) + service, return_inverse=True)[1]
        sender = self._place(flows.src, flows.ts)
        known = sender != ABSENT
        shared = np.intersect1d(window[known], window[~known])
        at = positions(shared, window)
        met = (at != ABSENT) & known
        present = count_cells(at[met], sender[met], (len(shared), len(self.senders.sender)))
        present.data[:] = 1  # a sender counts once
        mean = present @ unit_rows(self.senders.vectors) / present.sum(axis=1)[:, None]
        asking = (at != ABSENT) & ~known
        return unit_rows(count_cells(flows.row[asking], at[asking], (n, len(shared))) @ mean)


def fit(name: str, sequences: pa.Table, part: NDArray[np.int8], seed: int) -> Darkvec:
    return fit_with(name, sequences, part, seed, I_DARKVEC if name == "i-darkvec" else DARKVEC)


def fit_with(
    name: str, sequences: pa.Table, part: NDArray[np.int8], seed: int, settings: Settings
) -> Darkvec:
    """Raises DataError if no two active senders of the training sequences met."""
    training = training_of(sequences, part)
    flows = flows_of(training)
    commonest = commonest_services(flows, settings)
    found, facts = train(flows, service_of(flows, settings.services, commonest), settings, seed)
    if not len(found.sender):
        raise DataError(
            f"{name} needs two training sources with {settings.active} flows each that meet in a service "
            "within an hour; there are none: read more captures"
        )
    facts = {"name": name, "settings": asdict(settings), "senders": len(np.unique(found.sender))} | facts
    return Darkvec(found, commonest, facts)


def load(arrays: Arrays, facts: Facts) -> Darkvec:
    senders = Senders(*(arrays[name] for name in ("sender", "day", "vectors")))
    return Darkvec(senders, arrays["commonest"], facts)


def _port_class(flows: Flows) -> Ints:
    """Classes in the order of `PORT_CLASSES`, then ports of no class by range, not recorded ones, ICMP."""
    table = {
        (proto << 32) + port: number
        for number, ports in enumerate(PORT_CLASSES.values())
        for proto, of_class in ports.items()
        for port in of_class
    }
    services = np.array(sorted(table), np.int64)
    classes = np.array([table[service] for service in services.tolist()], np.int64)
    place = positions(services, flows.service)
    other = len(PORT_CLASSES) + np.searchsorted(PORT_RANGES, flows.port, side="right")
    other[flows.port < 0] = len(PORT_CLASSES) + len(PORT_RANGES) + 1
    found = np.where(place == ABSENT, other, classes[place])
    return np.where(flows.proto == ICMP, len(PORT_CLASSES) + len(PORT_RANGES) + 2, found)
