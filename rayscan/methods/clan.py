"""CLAN: contrastive learning in which augmented copies are the negatives (Wilkie et al., IEEE CSR 2025).

SimCLR turned round: two benign rows are a positive pair, a row and any corrupted row a negative one. All of
benign traffic is drawn to one place, and the distance to its centre is the anomaly score. With
d(a, b) = (1 - cos(a, b)) / 2 over all pairs of a batch Z and its corrupted copy Z',

    L = α · mean of d(z_i, z_j) + (1 - α) · mean of max(0, m - d(z_i, z'_j)),

where both means are over the terms that are not zero.

A telescope has no benign class: everything there is unsolicited. Here the rows are statistics of training
sequences and "benign" means "as seen in training"; the unit vector of the projection is the embedding. What
follows from drawing all rows together is that they tell sources apart only where the corruptions force it.

Rows are rated in `methods.anomaly` with the authors' own protocol. Departures from their code: values are
scaled with a floor under the deviation (a constant column gave infinities), and rows are drawn once per
epoch without replacement, since no weights call for another way.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from itertools import pairwise

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as nnf

from rayscan.errors import DataError, ModelError
from rayscan.methods.method import Arrays, Embedded, Facts, training_of, unit_rows
from rayscan.methods.statistics import CommonServices, window_statistics
from rayscan.model.schedule import warmed_cosine

F32 = NDArray[np.float32]
_CHUNK = 8192
_NONZERO = 1e-6


@dataclass(frozen=True)
class Settings:
    """As published, but for the size of the work: 300 steps of 512 rows instead of 200 epochs of 8192."""

    width: int = 1024
    blocks: int = 4
    d_out: int = 64
    corrupted: float = 0.1  # share of features replaced
    spread: float = 1.7  # replaced by draws from U(-spread, spread), about unit variance
    margin: float = 0.5
    alpha: float = 0.5
    batch: int = 512
    steps: int = 300
    peak_rate: float = 1e-4
    floor_rate: float = 1e-6
    warmup: float = 0.1
    services: int = 64  # commonest services whose shares are features


class Encoder(nn.Module):
    """Residual MLP: h ← ReLU(W h + b) + R h, with R linear in the first block, then the identity."""

    def __init__(self, d_in: int, settings: Settings) -> None:
        super().__init__()
        widths = [d_in] + [settings.width] * settings.blocks
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(widths))
        self.skip = nn.Linear(d_in, settings.width)
        self.project = nn.Linear(settings.width, settings.d_out)

    def features(self, x: Tensor) -> Tensor:
        """What the projection is made from, (B, width)."""
        hidden: Tensor = nnf.relu(self.layers[0](x)) + self.skip(x)
        for layer in list(self.layers)[1:]:
            hidden = nnf.relu(layer(hidden)) + hidden
        return hidden

    def forward(self, x: Tensor) -> Tensor:
        """(B, d_in) to (B, d_out), not of unit length."""
        out: Tensor = self.project(self.features(x))
        return out


class Scaling:
    """Z-scores by the mean and deviation of training rows; NaN, unrecorded, becomes 0, the mean."""

    def __init__(self, mean: NDArray[np.float64], deviation: NDArray[np.float64]) -> None:
        self.mean, self.deviation = mean, deviation

    @classmethod
    def learn(cls, rows: NDArray[np.float64]) -> Scaling:
        """A column that is constant or never recorded is scaled by 1."""
        known = ~np.isnan(rows)
        count = np.maximum(known.sum(0), 1)
        mean = np.where(known, rows, 0).sum(0) / count
        squares = np.where(known, (rows - mean) ** 2, 0).sum(0)
        deviation = np.sqrt(squares / np.maximum(count - 1, 1))
        deviation[deviation < _NONZERO] = 1
        return cls(mean, deviation)

    def __call__(self, rows: NDArray[np.float64]) -> F32:
        return np.nan_to_num((rows - self.mean) / self.deviation, nan=0.0).astype(np.float32)


def loss(z: Tensor, corrupted: Tensor, settings: Settings) -> Tensor:
    """The loss above for a batch (B, d) and its corrupted copy (B, d)."""
    z, corrupted = nnf.normalize(z, dim=1), nnf.normalize(corrupted, dim=1)
    alike = (1 - z @ z.T) / 2
    apart = (settings.margin - (1 - z @ corrupted.T) / 2).clamp(min=0)
    return settings.alpha * _mean_nonzero(alike) + (1 - settings.alpha) * _mean_nonzero(apart)


def _mean_nonzero(values: Tensor) -> Tensor:
    count = (values > _NONZERO).sum()
    return values.sum() / count.clamp(min=1)


def corrupt(x: Tensor, settings: Settings, generator: torch.Generator) -> Tensor:
    """A copy in which each feature is replaced by noise with probability `corrupted`."""
    chosen = torch.rand(x.shape, generator=generator) < settings.corrupted
    noise = (torch.rand(x.shape, generator=generator) * 2 - 1) * settings.spread
    return torch.where(chosen, noise, x)


def pretrain(rows: F32, settings: Settings, seed: int) -> Encoder:
    """An encoder trained on scaled rows (N, d_in). Raises ModelError when the loss is not finite."""
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        encoder = Encoder(rows.shape[1], settings)
    optimiser = torch.optim.AdamW(encoder.parameters(), lr=settings.peak_rate, weight_decay=0)
    x = torch.from_numpy(rows)
    batches = _batches(len(x), settings.batch, generator)
    warmup = round(settings.warmup * settings.steps)
    for step in range(settings.steps):
        for group in optimiser.param_groups:
            group["lr"] = warmed_cosine(step, settings.steps, warmup, settings.peak_rate, settings.floor_rate)
        batch = x[next(batches)]
        value = loss(encoder(batch), encoder(corrupt(batch, settings, generator)), settings)
        if not torch.isfinite(value):
            raise ModelError(f"CLAN: the loss of step {step} is {value.item()}; look for extreme values")
        optimiser.zero_grad()
        value.backward()  # type: ignore[no-untyped-call]
        optimiser.step()
    return encoder.eval()


def _batches(n: int, size: int, generator: torch.Generator) -> Iterator[Tensor]:
    size = min(n, size)
    while True:
        order = torch.randperm(n, generator=generator)
        for start in range(0, n - size + 1, size):
            yield order[start : start + size]


def project(encoder: Encoder, rows: F32) -> F32:
    """Outputs of the encoder for scaled rows, float32 (N, d_out)."""
    with torch.inference_mode():
        starts = range(0, len(rows), _CHUNK)
        parts = [encoder(torch.from_numpy(rows[start : start + _CHUNK])).numpy() for start in starts]
    return np.concatenate(parts) if parts else np.zeros((0, encoder.project.out_features), np.float32)


def anomaly_scores(outputs: F32, centre: F32) -> NDArray[np.float64]:
    """Minus the cosine to the centre: the larger, the less like training. float64 (N,)."""
    cosines = unit_rows(outputs) @ unit_rows(centre[None])[0]
    return np.asarray(-cosines, np.float64)


class Clan:
    """CLAN on statistics of sequences."""

    def __init__(self, encoder: Encoder, scaling: Scaling, common: CommonServices, facts: Facts) -> None:
        self.encoder, self.scaling, self.common, self.facts = encoder, scaling, common, facts

    @property
    def arrays(self) -> Arrays:
        weights = {f"encoder.{name}": value.numpy() for name, value in self.encoder.state_dict().items()}
        return weights | {
            "mean": self.scaling.mean,
            "deviation": self.scaling.deviation,
            "services": self.common.services,
        }

    def embed(self, sequences: pa.Table) -> Embedded:
        vectors = unit_rows(project(self.encoder, self.scaling(_rows(sequences, self.common))))
        return Embedded.of(vectors)


def _rows(sequences: pa.Table, common: CommonServices) -> NDArray[np.float64]:
    return np.column_stack([window_statistics(sequences)[1], common.shares(sequences)])


def fit(name: str, sequences: pa.Table, part: NDArray[np.int8], seed: int) -> Clan:
    return fit_with(sequences, part, seed, Settings())


def fit_with(sequences: pa.Table, part: NDArray[np.int8], seed: int, settings: Settings) -> Clan:
    """CLAN from the training rows of a table of `schema.SEQUENCES`. Raises DataError without two of them."""
    training = training_of(sequences, part)
    if training.num_rows < 2:
        raise DataError("CLAN needs two training sequences; there are fewer: read more captures")
    common = CommonServices.learn(training, settings.services)
    rows = _rows(training, common)
    scaling = Scaling.learn(rows)
    encoder = pretrain(scaling(rows), settings, seed)
    facts: Facts = {"name": "clan", "settings": asdict(settings), "d_in": rows.shape[1]}
    return Clan(encoder, scaling, common, facts)


def load(arrays: Arrays, facts: Facts) -> Clan:
    encoder = Encoder(facts["d_in"], replace(Settings(), **facts["settings"]))
    weights = {
        name.removeprefix("encoder."): torch.from_numpy(np.array(value))
        for name, value in arrays.items()
        if name.startswith("encoder.")
    }
    encoder.load_state_dict(weights)
    scaling = Scaling(arrays["mean"], arrays["deviation"])
    return Clan(encoder.eval(), scaling, CommonServices(arrays["services"]), facts)
