"""Graph networks over hosts and ports: gcn, i-gcn, gcn-gru, i-gcn-gru (Gioacchini et al., GNNet 2023).

Each day is a graph (`methods.snapshots`) with edges A, weights and all. Messages go along the row-normalised
P = D⁻¹ (A + Aᵀ + I), in two convolutions from features X,

    Z = P ReLU(P X W₀ + b₀) W₁ + b₁.

Then a linear layer and ReLU make the vectors of the nodes; in the -gru methods a GRU does, over a node's Z
in the snapshots of the last days. They pass a batch normalisation, and a small head learns from them which
host contacts which port. gcn begins anew on every day, i-gcn and i-gcn-gru go on from the day before,
gcn-gru learns once from all days.

A sequence has the vector of its source in the snapshot of its middle flow, so all sequences of a source on
one day have the same. Training builds its graphs from training sequences only. To embed, graphs are of all
sequences given, and sources that training never saw are nodes like the others, made from their features and
neighbours: what else is embedded along with a sequence counts, so give whole periods. The network is that of
the day, or of the last one before that has one (the first for days before). Vectors are scaled by mean and
deviation of the day's training hosts, as the authors scale theirs by those of all hosts before they compare:
windows of the first days are short, and without this their vectors all lie apart from those of later days.

Departures from the authors' code, which has errors:
- The optimiser holds the weights that go on. (Theirs keeps those of the first day: i-gcn never learns again.)
- Windows of the GRU end with the day itself. Theirs, for gcn-gru, end a day before.
- Edges to be predicted are taken out of the graph: else they are read off, not predicted.
- Vectors are made in evaluation mode, from nodes that are there; absent ones change no normalisation.
- Pairs that are no edges are drawn with the seed, and when there are too few their labels still fit.
- Features are divided by the largest training value so far, not by that of the day.
- No filter of small sources: a sequence has a least length.
The second and third are as published with `as_published`. The variant whose features are the numbers of the
nodes is not here: it knows no other sources.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass
from typing import NamedTuple, TypeVar

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from scipy import sparse
from torch import Tensor, nn
from torch.nn import functional as nnf

from rayscan.errors import DataError, ModelError
from rayscan.evaluation.neighbours import macro_f1, top_k, vote
from rayscan.evaluation.tiles import Vectors
from rayscan.methods.method import (
    ABSENT,
    Arrays,
    Embedded,
    Facts,
    flows_of,
    positions,
    training_of,
    unit_rows,
)
from rayscan.methods.snapshots import FEATURES, NEVER_RECORDED, Snapshot, same_nodes, snapshots_of

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]
Ints = NDArray[np.int64]
T = TypeVar("T")

DAY_US = 24 * 3_600_000_000

UNKNOWN = 0
_NEIGHBOURS = 3
_SMALL_CLASS = 10
_FLAT = 1e-6
_ENOUGH = 25  # hosts to take a mean and a deviation from
_SCALE = "scale"


@dataclass(frozen=True)
class Settings:
    """As published, but for the size: 256 and 128 hidden instead of 1024 and 512, 20 000 edges a step.

    One epoch is one step per snapshot. The incremental methods take 1 in the paper, over a month; their
    results with 5 are as good, and periods here are often shorter.
    """

    recurrent: bool
    regime: str  # "anew" on every snapshot, "carried" from one to the next, "once" for all
    epochs: int
    patience: int = 3  # epochs in which the training accuracy may stand still
    snapshot_us: int = DAY_US
    commonest: int = 2500  # services with a node of their own
    history: int = 5  # snapshots before its own in a window
    log_weights: bool = False
    hidden: int = 256
    convolved: int = 128
    d_out: int = 128
    head: int = 64
    rate: float = 1e-3
    decay: float = 5e-3
    most_edges: int = 20_000  # to predict in a step
    held_out: float = 0.2  # share of the edges that a step takes out of the graph and predicts
    as_published: bool = False  # predict edges that are in the graph; windows of gcn-gru end before the day


SETTINGS = {
    "gcn": Settings(recurrent=False, regime="anew", epochs=50),
    "i-gcn": Settings(recurrent=False, regime="carried", epochs=5),
    "gcn-gru": Settings(recurrent=True, regime="once", epochs=50),
    "i-gcn-gru": Settings(recurrent=True, regime="carried", epochs=5),
}


class Convolution(nn.Module):
    """P X W + b, with weights drawn from U(±1/√out)."""

    def __init__(self, d_in: int, d_out: int) -> None:
        super().__init__()
        bound = d_out**-0.5
        self.weight = nn.Parameter(torch.empty(d_in, d_out).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(d_out).uniform_(-bound, bound))

    def forward(self, propagate: Tensor, x: Tensor) -> Tensor:
        found: Tensor = torch.sparse.mm(propagate, x) @ self.weight + self.bias
        return found


class Network(nn.Module):
    """From snapshots to vectors of nodes."""

    largest: Tensor  # (2, features): by what features of hosts and of services are divided; 0 is unrecorded

    def __init__(self, settings: Settings) -> None:
        super().__init__()
        self.first = Convolution(len(FEATURES), settings.hidden)
        self.second = Convolution(settings.hidden, settings.convolved)
        self.last: nn.GRU | nn.Linear
        self.last = (nn.GRU if settings.recurrent else nn.Linear)(settings.convolved, settings.d_out)
        self.norm = nn.BatchNorm1d(settings.d_out)
        self.head = nn.Sequential(
            nn.Linear(2 * settings.d_out, settings.head), nn.ReLU(), nn.Linear(settings.head, 2)
        )
        self.register_buffer("largest", torch.zeros(2, len(FEATURES)))

    def forward(self, target: Snapshot, window: Sequence[Snapshot], taken_out: Ints | None = None) -> Tensor:
        """Vectors (nodes of `target`, d_out), made from a window of snapshots in order of time.

        `taken_out` are edges of `target` that no message goes along. Networks without a GRU look at the last
        snapshot only. A node that was not there has no edges and features 0, but a message from itself.
        """
        if isinstance(self.last, nn.Linear):
            made = nnf.relu(self.last(self._seen_from(target, window[-1], taken_out)))
        else:
            steps = [self._seen_from(target, snapshot, taken_out) for snapshot in window]
            made = self.last(torch.stack(steps))[1][0]
        out: Tensor = self.norm(made)
        return out

    def links(self, nodes: Tensor, host: Ints, service: Ints) -> Tensor:
        """Logits of no edge and edge for pairs of nodes (L,): (L, 2)."""
        # Of the ways to pick rows, the backward pass of this one adds in the same order every time.
        ends = [nnf.embedding(torch.from_numpy(end), nodes) for end in (host, service)]
        found: Tensor = self.head(torch.cat(ends, dim=1))
        return found

    def convolve(self, snapshot: Snapshot, taken_out: Ints | None = None) -> Tensor:
        """Z of the nodes of a snapshot, (nodes, convolved)."""
        propagate = propagation(snapshot, taken_out)
        hidden = nnf.relu(self.first(propagate, self._scaled(snapshot)))
        found: Tensor = self.second(propagate, hidden)
        return found

    def _scaled(self, snapshot: Snapshot) -> Tensor:
        kind = torch.zeros(len(snapshot.features), dtype=torch.int64)
        kind[len(snapshot.hosts) :] = 1
        largest = self.largest[kind]
        return torch.where(largest > 0, torch.from_numpy(snapshot.features) / largest, 0)

    def _seen_from(self, target: Snapshot, snapshot: Snapshot, taken_out: Ints | None) -> Tensor:
        """Z in `snapshot` of the nodes of `target`."""
        if snapshot is target:
            return self.convolve(target, taken_out)
        absent = nnf.relu(self.first.bias) @ self.second.weight + self.second.bias
        table = torch.cat([self.convolve(snapshot), absent[None]])
        node = same_nodes(target, snapshot)
        return nnf.embedding(torch.from_numpy(np.where(node == ABSENT, len(table) - 1, node)), table)


def propagation(snapshot: Snapshot, taken_out: Ints | None = None) -> Tensor:
    """P of a snapshot without the edges of these positions: sparse float32 (nodes, nodes)."""
    n = len(snapshot.features)
    kept = np.ones(len(snapshot.weight), np.bool_)
    kept[[] if taken_out is None else taken_out] = False
    host, service, weight = snapshot.host[kept], snapshot.service[kept], snapshot.weight[kept]
    self_ = np.arange(n)
    row = np.concatenate([host, service, self_])
    column = np.concatenate([service, host, self_])
    values = np.concatenate([weight, weight, np.ones(n)])
    values /= np.bincount(row, values, n)[row]
    index = torch.from_numpy(np.stack([row, column]))
    return torch.sparse_coo_tensor(
        index, torch.from_numpy(values.astype(np.float32)), (n, n), check_invariants=False
    ).coalesce()


def non_edges(snapshot: Snapshot, count: int, rng: np.random.Generator) -> tuple[Ints, Ints]:
    """Hosts and services of different pairs without an edge, drawn evenly; fewer if there are no more."""
    h, s = len(snapshot.hosts), len(snapshot.services)
    edges = snapshot.host * s + snapshot.service - h  # ascending
    free = h * s - len(edges)
    rank = rng.choice(free, min(count, free), replace=False)
    # The pair of rank r comes after as many edges as have r or fewer free pairs before them.
    cell = rank + np.searchsorted(edges - np.arange(len(edges)), rank, side="right")
    return cell // s, cell % s + h


def window_of(snapshots: Sequence[Snapshot], target: Snapshot, settings: Settings) -> list[Snapshot]:
    """The snapshots that make the vectors of `target`: it, and with a GRU those of the days before."""
    first = target.number - (settings.history if settings.recurrent else 0)
    return [snapshot for snapshot in snapshots if first <= snapshot.number <= target.number]


def train(snapshots: Sequence[Snapshot], settings: Settings, seed: int) -> tuple[dict[int, Network], int]:
    """Networks by the number of the snapshot from which on they hold, and how many epochs it took in all."""
    rng = np.random.default_rng(seed)
    found: dict[int, Network] = {}
    epochs = 0
    network, optimiser = _begin(settings, seed)
    for today in [list(snapshots)] if settings.regime == "once" else [[snapshot] for snapshot in snapshots]:
        if settings.regime == "anew":
            network, optimiser = _begin(settings, seed)
        largest = np.max([snapshot.largest for snapshot in today], axis=0)
        network.largest.copy_(torch.maximum(network.largest, torch.from_numpy(largest)))
        epochs += _learn(network, optimiser, snapshots, today, settings, rng)
        found[today[0].number] = deepcopy(network).eval()
    return found, epochs


def scales_of(
    networks: dict[int, Network], snapshots: Sequence[Snapshot], settings: Settings
) -> dict[int, F32]:
    """Mean and deviation (2, d_out) of the vectors of each snapshot's hosts, by its number.

    Where they are fewer than `_ENOUGH`, hosts of the snapshots before count too. None for snapshots whose
    hosts have no vectors.
    """
    found: dict[int, F32] = {}
    for end, target in enumerate(snapshots, 1):
        rows = np.zeros((0, settings.d_out), np.float32)
        for snapshot in reversed(snapshots[:end]):
            if len(rows) >= _ENOUGH:
                break
            made, known = _hosts(_last(networks, target), snapshots, snapshot, settings)
            rows = np.concatenate([rows, made[known]])
        if len(rows):
            found[target.number] = _mean_and_deviation(rows)
    return found


def outputs(network: Network, target: Snapshot, window: Sequence[Snapshot]) -> F32:
    """Vectors of the hosts of a snapshot, not scaled: float32 (hosts, d_out)."""
    network.eval()
    with torch.inference_mode():
        return np.asarray(network(target, window)[: len(target.hosts)].numpy())


def _begin(settings: Settings, seed: int) -> tuple[Network, torch.optim.Optimizer]:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = Network(settings)
    return network, torch.optim.Adam(network.parameters(), settings.rate, weight_decay=settings.decay)


def _learn(
    network: Network,
    optimiser: torch.optim.Optimizer,
    snapshots: Sequence[Snapshot],
    today: Sequence[Snapshot],
    settings: Settings,
    rng: np.random.Generator,
) -> int:
    """Epochs over the snapshots `today` until the accuracy stands still. Returns how many."""
    network.train()
    best, since, epoch = 0.0, 0, 0
    while epoch < settings.epochs and since < settings.patience:
        accuracy = np.mean(
            [
                _step(network, optimiser, target, window_of(snapshots, target, settings), settings, rng)
                for target in today
            ]
        )
        since = 0 if accuracy > best else since + 1
        best = max(best, float(accuracy))
        epoch += 1
    return epoch


def _step(
    network: Network,
    optimiser: torch.optim.Optimizer,
    target: Snapshot,
    window: Sequence[Snapshot],
    settings: Settings,
    rng: np.random.Generator,
) -> float:
    """One step of the optimiser; returns the share of pairs that were told right."""
    edges = len(target.weight)
    share = 1 if settings.as_published else settings.held_out
    chosen = rng.choice(edges, min(int(np.ceil(share * edges)), settings.most_edges), replace=False)
    host, service = non_edges(target, len(chosen), rng)
    nodes = network(target, window, None if settings.as_published else chosen)
    logits = network.links(nodes, np.r_[target.host[chosen], host], np.r_[target.service[chosen], service])
    truth = torch.from_numpy(np.repeat([1, 0], [len(chosen), len(host)]))
    value = nnf.cross_entropy(logits, truth)
    if not torch.isfinite(value):
        raise ModelError(f"graph: the loss of snapshot {target.number} is {value.item()}")
    optimiser.zero_grad()
    value.backward()  # type: ignore[no-untyped-call]
    optimiser.step()
    return float((logits.argmax(dim=1) == truth).float().mean())


def _mean_and_deviation(rows: F32) -> F32:
    """Per column, (2, columns); the deviation of a constant column is 1."""
    deviation = rows.std(axis=0)
    return np.stack([rows.mean(axis=0), np.where(deviation < _FLAT, 1, deviation)])


class Graph:
    """`networks` and `scales`, each by the number of the snapshot from which on it holds."""

    def __init__(self, networks: dict[int, Network], scales: dict[int, F32], facts: Facts) -> None:
        self.networks, self.scales, self.facts = networks, scales, facts

    @property
    def arrays(self) -> Arrays:
        weights = {
            f"{number}.{name}": value.numpy()
            for number, network in self.networks.items()
            for name, value in network.state_dict().items()
        }
        return weights | {f"{number}.{_SCALE}": scale for number, scale in self.scales.items()}

    def embed(self, sequences: pa.Table) -> Embedded:
        settings = Settings(**self.facts["settings"])
        snapshots = _snapshots(sequences, settings)
        src = sequences["src"].to_numpy().astype(np.int64)
        middle = _middle(sequences) // settings.snapshot_us
        vectors = np.zeros((len(src), settings.d_out), np.float32)
        for target in snapshots:
            rows = np.flatnonzero(middle == target.number)
            if not len(rows):
                continue
            made, known = _hosts(_last(self.networks, target), snapshots, target, settings)
            mean, deviation = _last(self.scales, target)
            scaled = (made - mean) / deviation
            scaled[~known] = 0
            vectors[rows] = unit_rows(scaled)[positions(target.hosts, src[rows])]
        return Embedded.of(vectors)


class Scores(NamedTuple):
    """Macro-F1 of the days that were scored, as `daily_scores` finds it.

    number    int64 (D,): which snapshot
    hosts     int64 (D,): how many of it were scored
    macro_f1  float64 (D,): NaN on days without a class
    ports     float64 (D,): what a host's flows per service alone would score, the floor
    mean      of macro_f1, over the days that have one
    std       the same, with one degree of freedom less; NaN for less than two days
    """

    number: Ints
    hosts: Ints
    macro_f1: F64
    ports: F64
    mean: float
    std: float


def daily_scores(sequences: pa.Table, seed: int, settings: Settings, first: int = 20) -> Scores:
    """The authors' own protocol, in which all sources are in the graph, on all snapshots but the `first`.

    gcn-gru learns from the first ones alone, the incremental methods from all up to the day that is scored,
    gcn from that day. Vectors of a day's hosts are standard-scaled; each is told by its 3 nearest others by
    cosine. Hosts of classes with 10 or fewer on that day become unknown: unknown hosts are neighbours but
    are not scored. Labels are those of the sequences, the commonest if a host has several.

    Raises DataError if there are not more than `first` snapshots, or none for gcn-gru to learn from.
    """
    snapshots = _snapshots(sequences, settings)
    if len(snapshots) <= first:
        raise DataError(
            f"there are {len(snapshots)} snapshots and the first {first} are not scored; "
            "read more captures or score earlier ones"
        )
    learnt_from = {"once": snapshots[:first], "anew": snapshots[first:], "carried": snapshots}[
        settings.regime
    ]
    if not learnt_from:
        raise DataError("gcn-gru learns from the first snapshots, which are not scored; leave at least 1")
    networks, _ = train(learnt_from, settings, seed)
    sources, labels = _labels(sequences)
    hosts: list[int] = []
    scores: list[float] = []
    floor: list[float] = []
    for target in snapshots[first:]:
        made, _ = _hosts(_last(networks, target), snapshots, target, settings)
        label = labels[positions(sources, target.hosts)]
        label = np.where(np.bincount(label)[label] > _SMALL_CLASS, label, UNKNOWN)
        scored = label != UNKNOWN
        hosts.append(int(scored.sum()))
        mean, deviation = _mean_and_deviation(made)
        for found, rows in (
            (scores, unit_rows((made - mean) / deviation)),
            (floor, _flows_per_service(target)),
        ):
            found.append(macro_f1(label[scored], _told_by_others(rows, label)[scored]))
    days = np.array(scores)
    valid = days[~np.isnan(days)]
    return Scores(
        np.array([target.number for target in snapshots[first:]]),
        np.array(hosts),
        days,
        np.array(floor),
        float(valid.mean()) if len(valid) else np.nan,
        float(valid.std(ddof=1)) if len(valid) > 1 else np.nan,
    )


def _told_by_others(rows: Vectors, label: Ints) -> Ints:
    """By the nearest other rows, of length 1."""
    nearest, _ = top_k(rows, _NEIGHBOURS, np.arange(rows.shape[0]))
    return vote(nearest, label)


def _flows_per_service(target: Snapshot) -> Vectors:
    """Of each host, scaled to length 1: float32 csr (hosts, services)."""
    h = len(target.hosts)
    length = np.sqrt(np.bincount(target.host, target.weight**2, h))
    values = (target.weight / length[target.host]).astype(np.float32)
    return sparse.csr_array((values, (target.host, target.service - h)), shape=(h, len(target.services)))


def _labels(sequences: pa.Table) -> tuple[Ints, Ints]:
    """Sources, ascending, and the label of each: 1 and up, or `UNKNOWN`."""
    codes = sequences["label"].combine_chunks().dictionary_encode().indices
    code = np.asarray(codes.cast(pa.int64()).fill_null(-1)) + 1
    src = sequences["src"].to_numpy().astype(np.int64)
    sources = np.unique(src)
    pairs, counts = np.unique(np.stack([src, code])[:, code != UNKNOWN], axis=1, return_counts=True)
    rare_first = np.argsort(counts, kind="stable")
    labels = np.full(len(sources), UNKNOWN)
    labels[positions(sources, pairs[0, rare_first])] = pairs[1, rare_first]  # the last one stays
    return sources, labels


def _hosts(
    network: Network, snapshots: Sequence[Snapshot], target: Snapshot, settings: Settings
) -> tuple[F32, NDArray[np.bool_]]:
    """Vectors of the hosts of `target`, not scaled, and which of them are in its window at all."""
    window = window_of(snapshots, target, settings)
    if settings.as_published and settings.regime == "once":
        window = window[:-1]
    if not window:
        blank = np.zeros((len(target.hosts), settings.d_out), np.float32)
        return blank, np.zeros(len(blank), np.bool_)
    known = np.isin(target.hosts, np.concatenate([snapshot.hosts for snapshot in window]))
    return outputs(network, target, window), known


def _last(of: dict[int, T], target: Snapshot) -> T:
    """That of the snapshot, or of the last before it that has one; the first for earlier ones."""
    return of[max((number for number in of if number <= target.number), default=min(of))]


def _middle(sequences: pa.Table) -> Ints:
    """When the middle flow of each sequence was, microseconds; of an even number, the later one."""
    length = sequences["length"].to_numpy().astype(np.int64)
    return np.asarray(flows_of(sequences).ts[np.cumsum(length) - length + length // 2])


def _snapshots(sequences: pa.Table, settings: Settings) -> list[Snapshot]:
    return snapshots_of(sequences, settings.snapshot_us, settings.commonest, log_weights=settings.log_weights)


def fit(name: str, sequences: pa.Table, part: NDArray[np.int8], seed: int) -> Graph:
    return fit_with(name, sequences, part, seed, SETTINGS[name])


def fit_with(name: str, sequences: pa.Table, part: NDArray[np.int8], seed: int, settings: Settings) -> Graph:
    """Raises DataError without two training sources."""
    training = training_of(sequences, part)
    snapshots = _snapshots(training, settings)
    if len(training["src"].unique()) < 2:
        raise DataError(f"{name} needs two training sources; there are fewer: read more captures")
    networks, epochs = train(snapshots, settings, seed)
    scales = scales_of(networks, snapshots, settings)
    if not scales:
        raise DataError(f"{name} as published knows nothing of the first day, and there is no other")
    recorded = np.any([network.largest.numpy().any(axis=0) for network in networks.values()], axis=0)
    facts: Facts = {
        "name": name,
        "settings": asdict(settings),
        "snapshots": len(snapshots),
        "edges": sum(len(snapshot.weight) for snapshot in snapshots),
        "epochs": epochs,
        "features": [feature for feature, has in zip(FEATURES, recorded, strict=True) if has],
        "unrecorded": [feature for feature, has in zip(FEATURES, recorded, strict=True) if not has]
        + list(NEVER_RECORDED),
    }
    return Graph(networks, scales, facts)


def load(arrays: Arrays, facts: Facts) -> Graph:
    settings = Settings(**facts["settings"])
    weights: dict[int, dict[str, Tensor]] = {}
    scales: dict[int, F32] = {}
    for key, value in arrays.items():
        number, name = key.split(".", 1)
        if name == _SCALE:
            scales[int(number)] = value
        else:
            weights.setdefault(int(number), {})[name] = torch.from_numpy(np.array(value))
    networks = {}
    for snapshot in sorted(weights):
        networks[snapshot] = Network(settings).eval()
        networks[snapshot].load_state_dict(weights[snapshot])
    return Graph(networks, scales, facts)
