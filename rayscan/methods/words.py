"""Word2Vec over traffic: what stands for a word, and what for a sentence.

dante     A word is a service (protocol and port), a sentence the services that one sequence contacts, in
          order. A sequence is the mean of its words, so sources that training never saw have vectors too.
          (Cohen et al., DANTE, 2020; a sequence takes the place of a slice of time. Its tracking of
          clusters is not here.)
ip2vec    Words are sources, destinations, ports and protocols. Each flow gives the pairs source with
          destination, port and protocol, and destination with port and protocol. A sequence has the vector
          of its source: sources that were not learnt are not covered. (Ring et al., IP2Vec, 2017.)

Skip-gram with negative sampling is gensim's, on one thread, where it gives the same bits every time. Pairs
reach it as sentences of two words, so each is learnt in both directions. gensim passes over what follows
the 10 000th word of a sentence without a word; longer ones are cut here. A sentence of one word teaches
nothing and would leave its word with the random vector that it began with: it is not counted.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import pyarrow as pa
from gensim.models import Word2Vec
from numpy.typing import NDArray

from rayscan.errors import DataError, ModelError
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
from rayscan.schema import MISSING

F32 = NDArray[np.float32]
Ints = NDArray[np.int64]

LONGEST = 10_000
SOURCE, DESTINATION, PORT, PROTOCOL = (kind << 40 for kind in range(4))
"""Added to a value to tell words of ip2vec apart."""


@dataclass(frozen=True)
class Skipgram:
    d: int
    window: int
    negative: int  # words drawn for each pair
    epochs: int


@dataclass(frozen=True)
class Settings(Skipgram):
    most_pairs: int = 1_000_000  # ip2vec: of more, so many are drawn evenly


DANTE = Settings(d=64, window=5, negative=5, epochs=5)
IP2VEC = Settings(d=32, window=1, negative=10, epochs=10)


@dataclass(frozen=True)
class Sentences:
    """Words end to end, int64 (T,), and where each of S sentences begins, int64 (S + 1,), T last."""

    words: Ints
    starts: Ints

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __iter__(self) -> Iterator[list[int]]:
        for start, end in pairwise(self.starts.tolist()):
            yield self.words[start:end].tolist()


def sentences(words: Ints, group: Ints) -> Sentences:
    """Neighbouring words of one group as sentences of 2 to `LONGEST` words."""
    if not len(words):
        return Sentences(words, np.zeros(1, np.int64))
    begins = np.flatnonzero(np.r_[True, group[1:] != group[:-1]])
    within = np.arange(len(words)) - np.repeat(begins, np.diff(np.r_[begins, len(words)]))
    lengths = np.diff(np.r_[np.flatnonzero(within % LONGEST == 0), len(words)])
    kept = lengths > 1
    return Sentences(words[np.repeat(kept, lengths)], np.r_[0, np.cumsum(lengths[kept])])


class Words(NamedTuple):
    """What skip-gram has learnt about V words.

    words     int64 (V,), ascending
    counts    int64 (V,), how often each has occurred
    vectors   float32 (V, d)
    contexts  float32 (V, d), what words are predicted with; needed to learn on
    """

    words: Ints
    counts: Ints
    vectors: F32
    contexts: F32

    def only(self, kept: NDArray[np.bool_]) -> Words:
        return Words(self.words[kept], self.counts[kept], self.vectors[kept], self.contexts[kept])


def learn(corpus: Sentences, settings: Skipgram, seed: int, before: Words | None = None) -> Words:
    """Skip-gram with negative sampling: for a word w, one within `window` of it c, and drawn words n,
    log σ(u_c · v_w) + Σ log σ(-u_n · v_w) is made large. Starts from `before`, whose words all remain.

    Draws follow counts^¾. The rate falls from 0.025 to 0.0001 in every call.
    """
    words, counts = np.unique(corpus.words, return_counts=True)
    if before is not None:
        both, place = np.unique(np.r_[words, before.words], return_inverse=True)
        total = np.bincount(place, np.r_[counts, before.counts], minlength=len(both))
        words, counts = both, total.astype(np.int64)
    model = Word2Vec(
        vector_size=settings.d,
        window=settings.window,
        negative=settings.negative,
        sg=1,
        sample=0,
        min_count=1,
        seed=seed,
        workers=1,
    )
    model.build_vocab_from_freq(dict(zip(words.tolist(), counts.tolist(), strict=True)))
    order = np.array([model.wv.key_to_index[word] for word in words.tolist()])
    if before is not None:
        rows = order[positions(words, before.words)]
        model.wv.vectors[rows], model.syn1neg[rows] = before.vectors, before.contexts
    model.train(corpus, total_examples=len(corpus), epochs=settings.epochs)
    if not np.isfinite(model.wv.vectors).all():
        raise ModelError("skip-gram: vectors are not finite")
    return Words(words, counts, model.wv.vectors[order], model.syn1neg[order])


def ports_corpus(sequences: pa.Table) -> Sentences:
    """One sentence for each sequence: its services in order."""
    flows = flows_of(sequences)
    return sentences(flows.service, flows.row)


def pairs_of(flows: Flows) -> Ints:
    """The pairs of ip2vec, int64 (P, 2), five for each flow; without those of what is not recorded."""
    src, dst = SOURCE + flows.src, DESTINATION + flows.dst
    port, proto = PORT + flows.port, PROTOCOL + flows.proto
    has_dst, has_port = flows.dst != MISSING, flows.port != MISSING
    every = np.ones(len(src), np.bool_)
    pairs = [
        (src, dst, has_dst),
        (src, port, has_port),
        (src, proto, every),
        (port, dst, has_port & has_dst),
        (proto, dst, has_dst),
    ]
    return np.concatenate([np.column_stack([a, b])[known] for a, b, known in pairs])


class Dante:
    """Sequences as means of the vectors of services."""

    def __init__(self, services: Ints, vectors: F32, facts: Facts) -> None:
        self.services, self.vectors, self.facts = services, vectors, facts

    @property
    def arrays(self) -> Arrays:
        return {"services": self.services, "vectors": self.vectors}

    def embed(self, sequences: pa.Table) -> Embedded:
        """A sequence of which training knows no service is not covered."""
        flows = flows_of(sequences)
        place = positions(self.services, flows.service)
        known = place != ABSENT
        shape = (sequences.num_rows, len(self.services))
        counts = count_cells(flows.row[known], place[known], shape)
        return Embedded.of(unit_rows(counts @ self.vectors))


class Ip2vec:
    """Sequences as the vectors of their sources."""

    def __init__(self, sources: Ints, vectors: F32, facts: Facts) -> None:
        self.sources, self.vectors, self.facts = sources, vectors, facts

    @property
    def arrays(self) -> Arrays:
        return {"sources": self.sources, "vectors": self.vectors}

    def embed(self, sequences: pa.Table) -> Embedded:
        """A sequence of a source that was not learnt is not covered."""
        return Embedded.of(source_vectors(self.sources, self.vectors, sequences))


def source_vectors(sources: Ints, vectors: F32, sequences: pa.Table) -> F32:
    """The vector of each sequence's source, scaled to length 1; zeros where there is none."""
    place = positions(sources, sequences["src"].to_numpy())
    found = np.zeros((len(place), vectors.shape[1]), np.float32)
    known = place != ABSENT
    found[known] = vectors[place[known]]
    return unit_rows(found)


def fit(name: str, sequences: pa.Table, part: NDArray[np.int8], seed: int) -> Dante | Ip2vec:
    return fit_with(name, sequences, part, seed, DANTE if name == "dante" else IP2VEC)


def fit_with(
    name: str, sequences: pa.Table, part: NDArray[np.int8], seed: int, settings: Settings
) -> Dante | Ip2vec:
    """ "dante" or "ip2vec". Raises DataError without a training sequence of two flows."""
    training = training_of(sequences, part)
    facts: Facts = {"name": name, "settings": asdict(settings)}
    if name == "dante":
        corpus = ports_corpus(training)
    else:
        pairs = pairs_of(flows_of(training))
        facts["pairs"] = len(pairs)
        pairs = np.random.default_rng(seed).permutation(pairs)[: settings.most_pairs]
        corpus = sentences(pairs.ravel(), np.repeat(np.arange(len(pairs)), 2))
    if not len(corpus):
        raise DataError(f"{name} needs a training sequence of two flows; there is none: read more captures")
    found = learn(corpus, settings, seed)
    facts |= {"words": len(found.words), "sentences": len(corpus)}
    if name == "dante":
        return Dante(found.words, found.vectors, facts)
    found = found.only(found.words < DESTINATION)
    return Ip2vec(found.words, found.vectors, facts)


def load(arrays: Arrays, facts: Facts) -> Dante | Ip2vec:
    if facts["name"] == "dante":
        return Dante(arrays["services"], arrays["vectors"], facts)
    return Ip2vec(arrays["sources"], arrays["vectors"], facts)
