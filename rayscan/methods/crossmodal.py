"""Two views of the same flows, as an image of bytes and as a sequence of statistics, aligned and fused.

CrossModal-CLIP-style, **abstract-faithful**: of the published system (Fang, Liu, Teng, Yin, Han; Computer
Networks 272, 111723, 2025) only the abstract is public. It names a grey image of bytes and a sequence of
statistics as two views, contrastive learning to align them, a cross-modal transformer encoder to fuse them,
and a temperature that rises during pre-training. Sizes, layouts and losses below are ours, and no figure of
this module says how good the authors' system is.

    L = ½ [CLIP of view 1 + CLIP of view 2](τ) + λ NT-Xent of the fused vectors(τ)

CLIP (Radford et al. 2021) finds the sequence that belongs to an image among those of the batch and the other
way round, *before* fusion; NT-Xent (Chen et al. 2020) finds the other of two augmentations after it. τ rises
by half a cosine: hard separation first, more tolerance of negatives that are none later.

Captures have no payload here. The image is what a flow records, 16 bytes each, 100 flows: 40 × 40, with a
second channel that says which bytes are recorded. The mean of its patches stands for it: a token of its own,
as in CLIP, learns too slowly for the few steps that a CPU can do. The sequence has statistics of all flows of
the image in front, whose output stands for the sequence, and the first 32 flows behind. The source's address
is in neither. What telescope flows lack stays out (direction and window of a flow), but packets keep their
two bytes, empty.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as nnf

from rayscan.config import ModelConfig
from rayscan.errors import DataError, ModelError
from rayscan.evaluation.splits import TRAIN
from rayscan.methods.clan import Scaling
from rayscan.methods.method import Arrays, Embedded, Facts, list_column, list_values, unit_rows
from rayscan.methods.statistics import TCP_FLAGS
from rayscan.model.encoder import Layer, sinusoids
from rayscan.model.loss import nt_xent
from rayscan.model.schedule import warmed_cosine
from rayscan.schema import MISSING, SEQUENCE_LISTS

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]
Ints = NDArray[np.int64]
Mask = NDArray[np.bool_]

LABEL = "CrossModal-CLIP-style (abstract-faithful): built from the abstract only, no figure is the authors'"
FLOWS, CELL, SIDE, TOKENS = 100, 16, 40, 32
"""Flows of an image, bytes of a flow, pixels of a side, flows of a sequence."""

BYTES = {
    "dst": 4,
    "dst_port": 2,
    "proto": 1,
    "tcp_flags": 1,
    "ttl": 1,
    "gap_us": 2,
    "packets": 2,
    "size": 3,
}
"""The cell of a flow: values and their bytes, highest first. Larger sizes count as the largest."""

FIELDS = tuple(name for name in BYTES if name in SEQUENCE_LISTS)  # packets are not kept
GAP_STEPS = 1024
"""Steps between a gap and its double: log2(1 + 2^63 µs) is then still two bytes."""

PORT_BUCKETS = 17  # 0, 1, 2-3, 4-7, ..., 32768-65535
_FURTHEST = 10.0  # of a scaled feature: a rare bucket is hundreds of deviations off
_CHUNK = 512


@dataclass(frozen=True)
class Settings:
    """Sized for a CPU. `tau_first` = `tau_last` fixes the temperature."""

    patch: int = 8
    width: int = 64
    heads: int = 4
    blocks: int = 2  # of each view's encoder
    crossings: int = 2  # layers of fusion
    d_out: int = 128
    hidden_cells: float = 0.15  # share of the image's cells that an augmentation hides
    least_kept: float = 0.8  # least share of flows that it keeps
    jitter: float = 0.1  # deviation of the logarithm of gaps
    tau_first: float = 0.05
    tau_last: float = 0.2
    fused: float = 1.0  # λ
    batch: int = 64
    steps: int = 300
    peak_rate: float = 1e-3
    warmup: float = 0.05
    decay: float = 0.05  # of matrices
    clip: float = 1.0


# ---------------------------------------------------------------------------------------------
# flows to views
# ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Windows:
    """The first flows of B sequences.

    values  int64 (B, FLOWS, FIELDS), -1 where not recorded and behind the last flow
    real    bool (B, FLOWS): there is a flow; real ones stand in front
    """

    values: Ints
    real: Mask

    def column(self, name: str) -> Ints:
        """(B, FLOWS)"""
        return self.values[:, :, FIELDS.index(name)]


class Recorded:
    """All flows of a table of `schema.SEQUENCES`, ready to cut windows from."""

    def __init__(self, sequences: pa.Table) -> None:
        """Raises SchemaError without a needed column, DataError if lists disagree."""
        gaps = list_column(sequences, "gap_us")
        self.lengths = np.asarray(pc.list_value_length(gaps).fill_null(0), np.int64)
        self.first = np.cumsum(self.lengths) - self.lengths
        columns = [_values(list_column(sequences, name), name, self.lengths) for name in FIELDS]
        self.values = np.stack(columns, axis=1)

    def __len__(self) -> int:
        return len(self.lengths)

    def windows(self, rows: Ints) -> Windows:
        place = np.arange(FLOWS)
        real = place < self.lengths[rows, None]
        values = np.full((len(rows), FLOWS, len(FIELDS)), MISSING)
        values[real] = self.values[(self.first[rows, None] + place)[real]]
        return Windows(values, real)


def _values(lists: pa.ListArray, name: str, lengths: Ints) -> Ints:
    """A per-flow column end to end; a list that is null is one of nothing recorded."""
    recorded = lists.is_valid().to_numpy(zero_copy_only=False)
    if not np.array_equal(pc.list_value_length(lists.drop_null()).to_numpy(), lengths[recorded]):
        raise DataError(f"lists of {name} and gap_us differ in length; make the sequences anew")
    values = np.full(lengths.sum(), MISSING)
    values[np.repeat(recorded, lengths)] = list_values(lists)
    return values


def augment(windows: Windows, settings: Settings, rng: np.random.Generator) -> Windows:
    """At least `least_kept` of the flows, at random and in order, with stretched gaps.

    The gap before a flow that is kept covers the flows left out before it.
    """
    n = windows.real.sum(1, keepdims=True)
    kept = np.ceil(rng.uniform(settings.least_kept, 1, n.shape) * n)
    draw = np.where(windows.real, rng.random(windows.real.shape), np.inf)
    keep = (draw.argsort(1).argsort(1) < kept) & windows.real
    gaps = windows.column("gap_us") * np.exp(settings.jitter * rng.standard_normal(keep.shape))
    time = np.cumsum(np.where(windows.real, gaps, 0), axis=1)
    order = np.argsort(~keep, axis=1, kind="stable")
    real = np.arange(FLOWS) < keep.sum(1, keepdims=True)
    values = np.take_along_axis(windows.values, order[:, :, None], axis=1)
    time = np.take_along_axis(time, order, axis=1)
    values[:, :, FIELDS.index("gap_us")] = np.diff(time, axis=1, prepend=time[:, :1]).round()
    values[~real] = MISSING
    return Windows(values, real)


def image(windows: Windows, shown: Mask) -> F32:
    """Bytes over 255 and which of them are recorded: float32 (B, 2, SIDE, SIDE).

    Cells follow each other row by row. Only flows that are `shown`, bool (B, FLOWS), are drawn.
    """
    cells = np.zeros((2, *shown.shape, CELL), np.uint8)
    place = 0
    for name, width in BYTES.items():
        if name in FIELDS:
            value = windows.column(name)
            recorded = (value != MISSING) & shown
            whole = _whole(name, value) * recorded
            for k in range(width):
                cells[0, :, :, place + k] = (whole >> 8 * (width - 1 - k)) & 255
                cells[1, :, :, place + k] = recorded
        place += width
    pixels = cells.reshape(2, len(shown), SIDE, SIDE).swapaxes(0, 1).astype(np.float32)
    pixels[:, 0] /= 255
    return pixels


def _whole(name: str, value: Ints) -> Ints:
    """The number whose bytes are drawn."""
    if name == "gap_us":
        return np.asarray(np.round(GAP_STEPS * np.log2(1 + value.clip(0))), np.int64)
    return value.clip(0, 2**24 - 1) if name == "size" else value


def tokens(windows: Windows) -> F64:
    """Features of the first flows, float64 (B, TOKENS, features); NaN where not recorded.

    Logarithms of bytes and of the gap in milliseconds, TTL, TCP flags, one of PORT_BUCKETS.
    """
    names = ("size", "gap_us", "ttl", "tcp_flags", "dst_port")
    size, gap, ttl, flags, port = (_known(windows.column(name)[:, :TOKENS]) for name in names)
    set_ = np.nan_to_num(flags).astype(int)
    bits = [np.where(np.isnan(flags), np.nan, set_ & bit != 0) for bit in TCP_FLAGS.values()]
    bucket = np.ceil(np.log2(1 + port))
    buckets = [np.where(np.isnan(port), np.nan, bucket == k) for k in range(PORT_BUCKETS)]
    return np.stack([np.log1p(size), np.log1p(gap / 1e3), ttl / 255, *bits, *buckets], axis=-1)


def summary(windows: Windows) -> F64:
    """Statistics of all flows of a window, float64 (B, features); NaN where not recorded.

    Logarithms of the number of flows, their duration and flows and bytes per second; mean, deviation, least
    and largest of the logarithms of bytes and of gaps, the first excepted.
    """
    count = windows.real.sum(1).astype(np.float64)
    gap = np.where(windows.real, _known(windows.column("gap_us")) / 1e3, np.nan)
    gap[:, 0] = np.nan
    size = _known(windows.column("size"))
    lasting = np.nansum(gap, axis=1)
    seconds = 1e-3 * (1 + lasting)
    total = np.where(np.isnan(size).all(1), np.nan, np.nansum(size, axis=1))
    rates = np.log1p(count / seconds), np.log1p(total / seconds)
    whole = np.log(np.maximum(count, 1)), np.log1p(lasting), *rates
    return np.stack([*whole, *_moments(np.log1p(gap)), *_moments(np.log1p(size))], axis=-1)


def _known(value: Ints) -> F64:
    return np.where(value == MISSING, np.nan, value.astype(np.float64))


def _moments(value: F64) -> list[F64]:
    """Mean, deviation, least and largest of the numbers in each row, NaN where there is none."""
    known = ~np.isnan(value)
    count = known.sum(1)
    some = np.maximum(count, 1)
    mean = np.where(known, value, 0).sum(1) / some
    deviation = np.sqrt(np.where(known, (value - mean[:, None]) ** 2, 0).sum(1) / some)
    least = np.where(known, value, np.inf).min(1)
    largest = np.where(known, value, -np.inf).max(1)
    return [np.where(count > 0, found, np.nan) for found in (mean, deviation, least, largest)]


@dataclass(frozen=True)
class Views:
    """What the encoder is given of B sequences.

    pixels   float32 (B, 2, SIDE, SIDE)
    summary  float32 (B, features), tokens float32 (B, TOKENS, features): scaled, 0 where not recorded
    mask     bool (B, TOKENS): there is a flow
    """

    pixels: Tensor
    summary: Tensor
    tokens: Tensor
    mask: Tensor


class Scalings:
    """Z-scores of summaries and tokens by those of training sequences."""

    def __init__(self, summary: Scaling, tokens: Scaling) -> None:
        self.summary, self.tokens = summary, tokens

    @classmethod
    def learn(cls, recorded: Recorded, sample: Ints) -> Scalings:
        windows = recorded.windows(sample)
        return cls(Scaling.learn(summary(windows)), Scaling.learn(tokens(windows)[windows.real[:, :TOKENS]]))

    def views(self, windows: Windows, shown: Mask | None = None) -> Views:
        """`shown` as for `image`; without it all flows are."""
        return Views(
            torch.from_numpy(image(windows, windows.real if shown is None else shown)),
            torch.from_numpy(self.summary(summary(windows))).clamp(-_FURTHEST, _FURTHEST),
            torch.from_numpy(self.tokens(tokens(windows))).clamp(-_FURTHEST, _FURTHEST),
            torch.from_numpy(windows.real[:, :TOKENS]),
        )


# ---------------------------------------------------------------------------------------------
# views to vectors
# ---------------------------------------------------------------------------------------------


class Vectors(NamedTuple):
    """Float32 (B, d_out), rows of length 1: of each view before fusion, and of both."""

    image: Tensor
    sequence: Tensor
    fused: Tensor


class Crossing(nn.Module):
    """Tokens of one view ask those of the other: attention and two linear maps, pre-norm."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm_own, self.norm_other = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)
        self.feed = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.ReLU(), nn.Linear(2 * width, width)
        )

    def forward(self, own: Tensor, other: Tensor, padding: Tensor | None) -> Tensor:
        """(B, T, width); `padding` bool (B, T of other), True where there is nothing."""
        asked = self.norm_other(other)
        found, _ = self.attention(
            self.norm_own(own), asked, asked, key_padding_mask=padding, need_weights=False
        )
        mixed: Tensor = own + found
        return mixed + self.feed(mixed)  # type: ignore[no-any-return]


class Encoder(nn.Module):
    """Both views to vectors: each alone, and fused."""

    grid: Tensor
    line: Tensor

    def __init__(self, summaries: int, features: int, settings: Settings) -> None:
        """`summaries` and `features` are the widths of `summary` and `tokens`."""
        super().__init__()
        width, patches = settings.width, SIDE // settings.patch
        config = ModelConfig(d_model=width, heads=settings.heads, d_ff=2 * width, dropout=0, norm="pre")
        self.patches = nn.Conv2d(2, width, settings.patch, stride=settings.patch)
        self.image_layers = nn.ModuleList(Layer(config) for _ in range(settings.blocks))
        self.image_norm = nn.LayerNorm(width)
        self.summary, self.flow = nn.Linear(summaries, width), nn.Linear(features, width)
        self.sequence_layers = nn.ModuleList(Layer(config) for _ in range(settings.blocks))
        self.sequence_norm = nn.LayerNorm(width)
        self.image_out = nn.Linear(width, settings.d_out, bias=False)
        self.sequence_out = nn.Linear(width, settings.d_out, bias=False)
        self.image_asks, self.sequence_asks = (
            nn.ModuleList(Crossing(width, settings.heads) for _ in range(settings.crossings))
            for _ in range(2)
        )
        self.fused_out = nn.Linear(2 * width, settings.d_out)
        half = sinusoids(patches, width // 2)
        grid = torch.cat([half.repeat_interleave(patches, 0), half.repeat(patches, 1)], dim=1)
        self.register_buffer("grid", grid, persistent=False)
        self.register_buffer("line", sinusoids(TOKENS, width), persistent=False)

    def forward(self, views: Views) -> Vectors:
        picture = self.patches(views.pixels).flatten(2).transpose(1, 2) + self.grid
        for layer in self.image_layers:
            picture = layer(picture, None)
        picture = self.image_norm(picture)
        sequence = torch.cat([self.summary(views.summary)[:, None], self.flow(views.tokens) + self.line], 1)
        mask = nnf.pad(views.mask, (1, 0), value=True)
        for layer in self.sequence_layers:
            sequence = layer(sequence, mask[:, None, None])
        sequence = self.sequence_norm(sequence)
        alone = self.image_out(picture.mean(1)), self.sequence_out(sequence[:, 0])
        for image_asks, sequence_asks in zip(self.image_asks, self.sequence_asks, strict=True):
            picture, sequence = image_asks(picture, sequence, ~mask), sequence_asks(sequence, picture, None)
        fused = self.fused_out(torch.cat([picture.mean(1), sequence[:, 0]], dim=1))
        return Vectors(*(nnf.normalize(vector, dim=1) for vector in (*alone, fused)))


# ---------------------------------------------------------------------------------------------
# training
# ---------------------------------------------------------------------------------------------


def clip_loss(a: Tensor, b: Tensor, tau: float) -> Tensor:
    """Mean cross-entropy of finding row i of b by row i of a and the other way round; (B, d) of length 1."""
    logits, own = a @ b.T / tau, torch.arange(len(a))
    return (nnf.cross_entropy(logits, own) + nnf.cross_entropy(logits.T, own)) / 2


def loss(first: Vectors, second: Vectors, tau: float, settings: Settings) -> Tensor:
    """The loss above of what the encoder makes of two augmentations of the same sequences."""
    aligned = sum(clip_loss(one.image, one.sequence, tau) for one in (first, second)) / 2
    owner = torch.arange(len(first.fused)).repeat(2)
    return aligned + settings.fused * nt_xent(torch.cat([first.fused, second.fused]), owner, (tau,))


def temperature(step: int, settings: Settings) -> float:
    """From `tau_first` at step 0 to `tau_last` at the last step, never falling."""
    done = step / max(1, settings.steps - 1)
    return settings.tau_first + (settings.tau_last - settings.tau_first) * (1 - math.cos(math.pi * done)) / 2


def pretrain(recorded: Recorded, rows: Ints, scalings: Scalings, settings: Settings, seed: int) -> Encoder:
    """An encoder trained on these rows, at least two. Raises ModelError when the loss is not finite."""
    rng = np.random.default_rng(seed)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        encoder = Encoder(len(scalings.summary.mean), len(scalings.tokens.mean), settings)
    decaying = [p for p in encoder.parameters() if p.ndim > 1]  # matrices; the rest are biases and norms
    others = [p for p in encoder.parameters() if p.ndim <= 1]
    groups = [{"params": decaying, "weight_decay": settings.decay}, {"params": others, "weight_decay": 0}]
    optimiser = torch.optim.AdamW(groups)

    def view(windows: Windows) -> Vectors:
        changed = augment(windows, settings, rng)
        shown = changed.real & (rng.random(changed.real.shape) >= settings.hidden_cells)
        found: Vectors = encoder(scalings.views(changed, shown))
        return found

    warmup = round(settings.warmup * settings.steps)
    for step in range(settings.steps):
        for group in optimiser.param_groups:
            group["lr"] = warmed_cosine(step, settings.steps, warmup, settings.peak_rate)
        windows = recorded.windows(rng.choice(rows, min(settings.batch, len(rows)), replace=False))
        value = loss(view(windows), view(windows), temperature(step, settings), settings)
        if not torch.isfinite(value):
            raise ModelError(
                f"crossmodal: the loss of step {step} is {value.item()}; look for extreme values"
            )
        optimiser.zero_grad()
        value.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(encoder.parameters(), settings.clip)
        optimiser.step()
    return encoder.eval()


class CrossModal:
    """The fused vectors of sequences."""

    def __init__(self, encoder: Encoder, scalings: Scalings, facts: Facts) -> None:
        self.encoder, self.scalings, self.facts = encoder, scalings, facts

    @property
    def arrays(self) -> Arrays:
        weights = {f"encoder.{name}": value.numpy() for name, value in self.encoder.state_dict().items()}
        both = {"summary": self.scalings.summary, "tokens": self.scalings.tokens}
        return weights | {
            f"{name}.{what}": getattr(scaling, what)
            for name, scaling in both.items()
            for what in ("mean", "deviation")
        }

    def embed(self, sequences: pa.Table) -> Embedded:
        recorded = Recorded(sequences)
        n = len(recorded)
        vectors = np.zeros((n, self.encoder.fused_out.out_features), np.float32)
        with torch.inference_mode():
            for start in range(0, n, _CHUNK):
                rows = np.arange(start, min(start + _CHUNK, n))
                views = self.scalings.views(recorded.windows(rows))
                vectors[rows] = self.encoder(views).fused.numpy()
        return Embedded.of(unit_rows(vectors))


def fit(name: str, sequences: pa.Table, part: NDArray[np.int8], seed: int) -> CrossModal:
    return fit_with(sequences, part, seed, Settings())


_LEARN_FROM = 20_000
"""Training sequences, drawn at random, from which scales are learnt: their features are large together."""


def fit_with(sequences: pa.Table, part: NDArray[np.int8], seed: int, settings: Settings) -> CrossModal:
    """A model of the training rows of a table of `schema.SEQUENCES`. Raises DataError without two of them."""
    rows = np.flatnonzero(part == TRAIN)
    if len(rows) < 2:
        raise DataError("crossmodal needs two training sequences; there are fewer: read more captures")
    recorded = Recorded(sequences)
    sample = np.random.default_rng(seed).permutation(rows)[:_LEARN_FROM]
    scalings = Scalings.learn(recorded, sample)
    encoder = pretrain(recorded, rows, scalings, settings, seed)
    facts: Facts = {"name": "crossmodal", "label": LABEL, "settings": asdict(settings)}
    return CrossModal(encoder, scalings, facts)


def load(arrays: Arrays, facts: Facts) -> CrossModal:
    scalings = Scalings(
        *(Scaling(arrays[f"{name}.mean"], arrays[f"{name}.deviation"]) for name in ("summary", "tokens"))
    )
    settings = replace(Settings(), **facts["settings"])
    encoder = Encoder(len(scalings.summary.mean), len(scalings.tokens.mean), settings)
    weights = {
        name.removeprefix("encoder."): torch.from_numpy(np.array(value))
        for name, value in arrays.items()
        if name.startswith("encoder.")
    }
    encoder.load_state_dict(weights)
    return CrossModal(encoder.eval(), scalings, facts)
