"""Floors: which services a sequence contacts, with no more learning than counting and one decomposition.

port-share   the share of flows that goes to each of the commonest services. DarkVec's baseline takes the
             five commonest ports of every labelled class. Most sources of a telescope have no label, and a
             floor that is picked by the labels it is judged on is no floor: the commonest services of all
             training sequences take their place.
ports-svd    TF-IDF of all services on their leading right singular vectors, and beside it the statistics
             of the sequence, z-scored and clipped. Both halves weigh about the same: the first has length
             1, the second is divided by the root of its width.

Services that training has not seen count among the rest in port-share and are left out of ports-svd, as
scikit-learn does with unknown words.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from scipy import sparse
from sklearn.utils.extmath import randomized_svd

from rayscan.errors import DataError
from rayscan.methods.clan import Scaling
from rayscan.methods.method import (
    ABSENT,
    Arrays,
    Embedded,
    Facts,
    count_cells,
    flows_of,
    positions,
    training_of,
    unit_rows,
)
from rayscan.methods.statistics import CommonServices, window_statistics

F32 = NDArray[np.float32]
Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Settings:
    services: int = 256  # port-share: the commonest, each with a share of its own
    components: int = 64  # ports-svd
    clip: float = 5.0  # ports-svd: largest z-score, either way


class Tfidf:
    """Counts per service, weighted by how few training sequences contact it; rows of length 1.

    The weight is scikit-learn's smooth one, ln((1 + N) / (1 + sequences with the service)) + 1.
    """

    def __init__(self, services: Ints, weights: F32) -> None:
        self.services, self.weights = services, weights  # (S,), services ascending

    @classmethod
    def learn(cls, sequences: pa.Table) -> Tfidf:
        flows = flows_of(sequences)
        services, place = np.unique(flows.service, return_inverse=True)
        having = count_cells(flows.row, place, (sequences.num_rows, len(services))).astype(bool).sum(axis=0)
        weights = np.log((1 + sequences.num_rows) / (1 + np.asarray(having))) + 1
        return cls(services, weights.astype(np.float32))

    def __call__(self, sequences: pa.Table) -> sparse.csr_array:
        """float32 (N, S)."""
        flows = flows_of(sequences)
        place = positions(self.services, flows.service)
        known = place != ABSENT
        shape = (sequences.num_rows, len(self.services))
        weighted = count_cells(flows.row[known], place[known], shape) @ sparse.diags_array(self.weights)
        lengths = np.sqrt(weighted.power(2).sum(axis=1))
        scaled = sparse.diags_array(1 / np.where(lengths == 0, 1, lengths)) @ weighted
        return sparse.csr_array(scaled, dtype=np.float32)


class PortShare:
    def __init__(self, common: CommonServices, facts: Facts) -> None:
        self.common, self.facts = common, facts

    @property
    def arrays(self) -> Arrays:
        return {"services": self.common.services}

    def embed(self, sequences: pa.Table) -> Embedded:
        return Embedded.of(unit_rows(self.common.shares(sequences)))


class PortsSvd:
    def __init__(self, tfidf: Tfidf, axes: F32, scaling: Scaling, facts: Facts) -> None:
        self.tfidf, self.axes, self.scaling, self.facts = tfidf, axes, scaling, facts  # axes (S, components)

    @property
    def arrays(self) -> Arrays:
        return {
            "services": self.tfidf.services,
            "weights": self.tfidf.weights,
            "axes": self.axes,
            "mean": self.scaling.mean,
            "deviation": self.scaling.deviation,
        }

    def embed(self, sequences: pa.Table) -> Embedded:
        clip = self.facts["settings"]["clip"]
        statistics = self.scaling(window_statistics(sequences)[1]).clip(-clip, clip)
        halves = [unit_rows(self.tfidf(sequences) @ self.axes), statistics / np.sqrt(statistics.shape[1])]
        return Embedded.of(unit_rows(np.hstack(halves)))


def fit(name: str, sequences: pa.Table, part: NDArray[np.int8], seed: int) -> PortShare | PortsSvd:
    return fit_with(name, sequences, part, seed, Settings())


def fit_with(
    name: str, sequences: pa.Table, part: NDArray[np.int8], seed: int, settings: Settings
) -> PortShare | PortsSvd:
    """ "port-share" or "ports-svd". Raises DataError without two training sequences."""
    training = training_of(sequences, part)
    if training.num_rows < 2:
        raise DataError(f"{name} needs two training sequences; there are fewer: read more captures")
    facts: Facts = {"name": name, "settings": asdict(settings)}
    if name == "port-share":
        return PortShare(CommonServices.learn(training, settings.services), facts)
    tfidf = Tfidf.learn(training)
    matrix = tfidf(training)
    axes = randomized_svd(matrix, min(settings.components, *matrix.shape), random_state=seed)[2].T
    scaling = Scaling.learn(window_statistics(training)[1])
    return PortsSvd(tfidf, np.ascontiguousarray(axes, np.float32), scaling, facts)


def load(arrays: Arrays, facts: Facts) -> PortShare | PortsSvd:
    if facts["name"] == "port-share":
        return PortShare(CommonServices(arrays["services"]), facts)
    tfidf = Tfidf(arrays["services"], arrays["weights"])
    return PortsSvd(tfidf, arrays["axes"], Scaling(arrays["mean"], arrays["deviation"]), facts)
