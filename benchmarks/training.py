"""Training steps per second, against a plain re-implementation of the published loop.

Both train the published architecture (preset `paper`) on the same simulated sequences: that equal weights
give equal vectors is checked before anything is timed. Loading is included on both sides, cutting sequences
is not. The plain loop does what the published one does: a dictionary of tensors for each sample, padding by a
collate function, two forward passes per step, attention spelled out, masks built anew, the optimiser's
defaults, float32, the loss read back in every step. It was written for this comparison and is leaner than a
loop that also reads files, so the ratio is a lower bound.

    python -m benchmarks.training [--rounds 4] [--threads 2] [--precision auto float32]
    python -m benchmarks.training --device cuda --shapes 512x128x40

The sides alternate in short blocks, so that other load on the machine hits both; the ratio is that of
the medians. Model TFLOP/s count the matrix products that the architecture asks for, three times those of a
forward pass; over the peak of the device they are its utilisation.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from collections.abc import Iterator, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from rayscan.config import Precision, SplitConfig, TrainConfig, load
from rayscan.model.encoder import Encoder, sinusoids
from rayscan.model.features import Sequences, collate
from rayscan.model.fit import fit
from rayscan.model.sampling import PairSampler

PAPER = load("paper", env={}).model
SHAPES = ("128x16x12", "64x128x5")  # sources in a batch, flows in a sequence, steps in a block


def simulated(sources: int, per_source: int, lengths: np.ndarray, seed: int = 0) -> Sequences:
    """Sequences of flows with random addresses, ports and gaps; `lengths` for each of them."""
    rng = np.random.default_rng(seed)
    n, flows = sources * per_source, int(lengths.sum())
    return Sequences(
        offsets=np.concatenate([[0], np.cumsum(lengths)]),
        src=np.repeat(np.arange(sources), per_source),
        index=np.tile(np.arange(per_source, dtype=np.int32), sources),
        sequences=np.full(n, per_source, np.int32),
        sequence_id=np.arange(n),
        start=1_700_000_000_000_000 + rng.integers(0, 10**12, n),
        columns={
            "dst": rng.integers(0, 2**32, flows),
            "dst_port": rng.integers(0, 2**16, flows).astype(np.int32),
            "proto": rng.choice([1, 6, 17], flows).astype(np.int16),
            "gap_us": rng.integers(0, 10**9, flows),
        },
    )


# ---------------------------------------------------------------------------------------------
# The published way, written plainly
# ---------------------------------------------------------------------------------------------


def samples_of(sequences: Sequences) -> list[dict[str, Tensor]]:
    """One dictionary of tensors for each sequence."""
    samples = []
    for i in range(len(sequences)):
        part = slice(sequences.offsets[i], sequences.offsets[i + 1])
        gap = sequences.columns["gap_us"][part].copy()
        gap[0] = 0
        samples.append(
            {
                "time": torch.from_numpy(sequences.start[i] + np.cumsum(gap)),
                "dst": torch.from_numpy(sequences.columns["dst"][part]),
                "port": torch.from_numpy(sequences.columns["dst_port"][part].astype(np.int64)),
                "proto": torch.from_numpy(sequences.columns["proto"][part].astype(np.int64)),
            }
        )
    return samples


def collate_samples(samples: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: pad_sequence([s[name] for s in samples], batch_first=True) for name in samples[0]}


class PlainAttention(nn.Module):
    def __init__(self, d: int, heads: int) -> None:
        super().__init__()
        self.d, self.heads = d, heads
        self.query, self.key, self.value, self.out = (nn.Linear(d, d) for _ in range(4))

    def forward(self, x: Tensor, blocked: Tensor) -> Tensor:
        batch, length, _ = x.shape

        def split(y: Tensor) -> Tensor:
            return y.view(batch, length, self.heads, -1).transpose(1, 2)

        q, k, v = split(self.query(x)), split(self.key(x)), split(self.value(x))
        scores = (q @ k.transpose(-2, -1) / math.sqrt(self.d)).masked_fill(blocked, float("-inf"))
        mixed = torch.nan_to_num(torch.softmax(scores, dim=-1)) @ v
        return self.out(mixed.transpose(1, 2).contiguous().view(batch, length, self.d))


class PlainLayer(nn.Module):
    def __init__(self, d: int, heads: int, d_ff: int) -> None:
        super().__init__()
        self.attention = PlainAttention(d, heads)
        self.widen, self.narrow = nn.Linear(d, d_ff), nn.Linear(d_ff, d)
        self.norm_attention, self.norm_feed = nn.LayerNorm(d), nn.LayerNorm(d)
        self.dropout_attention, self.dropout_feed = nn.Dropout(0.1), nn.Dropout(0.1)

    def forward(self, x: Tensor, blocked: Tensor) -> Tensor:
        x = self.norm_attention(x + self.dropout_attention(self.attention(x, blocked)))
        return self.norm_feed(x + self.dropout_feed(self.narrow(F.relu(self.widen(x)))))


class PlainEncoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.octets = nn.ModuleList(nn.Embedding(256, 8) for _ in range(4))
        self.port, self.proto, self.time = nn.Embedding(65536, 16), nn.Embedding(256, 4), nn.Linear(1, 16)
        self.mix, self.norm = nn.Linear(68, 128), nn.LayerNorm(128)
        self.layers = nn.ModuleList(PlainLayer(128, 4, 256) for _ in range(4))
        self.project = nn.Sequential(nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 128))
        self.register_buffer("position", sinusoids(128, 128))

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        time_ = batch["time"].float()
        gap = torch.cat([torch.zeros_like(time_[:, :1]), time_[:, 1:] - time_[:, :-1]], dim=1)
        real = batch["proto"] != 0
        parts = [
            table((batch["dst"] >> s) & 255) for table, s in zip(self.octets, (24, 16, 8, 0), strict=True)
        ]
        parts += [self.port(batch["port"]), self.proto(batch["proto"])]
        parts += [self.time(torch.log1p(gap.clamp(min=0)).unsqueeze(-1))]
        x = self.norm(self.mix(torch.cat(parts, dim=-1)))
        length = x.shape[1]
        x = x + self.position[:length]
        blocked = (
            torch.triu(torch.ones(length, length, dtype=torch.bool, device=x.device), diagonal=1)
            | ~real[:, None, None, :]
        )
        for layer in self.layers:
            x = layer(x, blocked)
        weight = real.unsqueeze(-1).float()
        return F.normalize(self.project((x * weight).sum(1) / weight.sum(1)), dim=-1)

    def load(self, encoder: Encoder) -> PlainEncoder:
        """The weights of rayscan's encoder under this one's names."""
        own = {}
        for name, x in encoder.state_dict().items():
            if ".qkv." in name:
                layer, kind = name.split(".qkv.")
                for part, rows in zip(("query", "key", "value"), x.chunk(3), strict=True):
                    own[f"{layer}.attention.{part}.{kind}"] = rows
            else:
                own[_renamed(name)] = x
        self.load_state_dict(own, strict=False)
        return self


def _renamed(name: str) -> str:
    pairs = {
        "tokens.parts.dst.tables": "octets",
        "tokens.parts.dst_port": "port",
        "tokens.parts.proto": "proto",
    }
    pairs |= {"tokens.parts.gap": "time", "tokens.": "", ".out.": ".attention.out."}
    for old, new in pairs.items():
        name = name.replace(old, new)
    return name


def plain_loss(first: Tensor, second: Tensor, temperature: float) -> Tensor:
    z = torch.cat([first, second])
    n = len(first)
    itself = torch.eye(2 * n, dtype=torch.bool, device=z.device)
    similarity = (z @ z.T / temperature).masked_fill(itself, float("-inf"))
    return F.cross_entropy(similarity, torch.cat([torch.arange(n) + n, torch.arange(n)]).to(z.device))


def plain_steps(
    encoder: PlainEncoder, sequences: Sequences, sources: int, device: torch.device
) -> Iterator[float]:
    """The published loop; yields each step's loss."""
    encoder.to(device)
    samples = samples_of(sequences)
    of_source: dict[int, list[int]] = {}
    for i, source in enumerate(sequences.src.tolist()):
        of_source.setdefault(source, []).append(i)
    optimizer = torch.optim.AdamW(encoder.parameters(), lr=1e-3)
    encoder.train()
    while True:
        pairs = [random.sample(of_source[s], 2) for s in random.sample(list(of_source), sources)]
        sides = [collate_samples([samples[i] for i in side]) for side in zip(*pairs, strict=True)]
        first, second = (encoder({name: x.to(device) for name, x in side.items()}) for side in sides)
        loss = plain_loss(first, second, 0.07)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        yield loss.item()


def check_equal(sequences: Sequences) -> PlainEncoder:
    """A plain encoder with the weights of one of ours, after checking that both give the same vectors."""
    torch.manual_seed(0)
    ours = Encoder(PAPER).eval()
    plain = PlainEncoder().load(ours).eval()
    rows = np.arange(32)
    samples = samples_of(sequences.take(rows))
    with torch.inference_mode():
        difference = (ours(collate(sequences, rows, PAPER)) - plain(collate_samples(samples))).abs().max()
    assert difference < 1e-5, f"the two encoders differ by {difference}"
    return plain


# ---------------------------------------------------------------------------------------------


def step_flops(sources: int, length: int) -> float:
    """Of the matrix products of a step: forward, and twice that backward."""
    d, wide, tokens = PAPER.d_model, PAPER.d_ff, 2 * sources * length
    layer = 4 * d * d + 2 * d * wide + 2 * length * d  # attention has two products of length x d a token
    per_sequence = 2 * d * d
    return 3 * 2 * (tokens * (68 * d + PAPER.layers * layer) + 2 * sources * per_sequence)


def measure(
    shape: str, rounds: int, precisions: Sequence[Precision], device: torch.device
) -> dict[str, float]:
    """Milliseconds per step, medians over alternating blocks, and their ratios to the plain loop's."""
    sources, length, steps = map(int, shape.split("x"))
    sequences = simulated(max(400, 2 * sources), 8, np.full(8 * max(400, 2 * sources), length))
    sequences.columns["gap_us"][sequences.offsets[:-1]] = 0
    plain = plain_steps(check_equal(sequences), sequences, sources, device)
    train = TrainConfig(
        steps=steps, batch_sources=sources, schedule="constant", warmup_steps=0, clip_norm=None
    )
    ours = [train.model_copy(update={"precision": precision}) for precision in precisions]
    split = SplitConfig(test_sources=0, validation_sources=0, unseen_sequences=0)
    sampler = PairSampler([0], lambda _: sequences, split, train)
    times: dict[str, list[float]] = {"plain": [], **{precision: [] for precision in precisions}}
    for turn in range(rounds + 1):
        marks = [time.perf_counter()]
        for _ in range(steps):
            next(plain)
        marks.append(time.perf_counter())
        for settings in ours:
            fit(PAPER, settings, sampler, device=device)
            marks.append(time.perf_counter())
        if turn:  # the first turn warms up
            for name, seconds in zip(times, np.diff(marks), strict=True):
                times[name].append(1e3 * float(seconds) / steps)
    ms = {name: float(np.median(each)) for name, each in times.items()}
    ratios = {f"plain / {name}": ms["plain"] / ms[name] for name in precisions}
    rates = {f"{name} TFLOP/s": step_flops(sources, length) / x / 1e9 for name, x in ms.items()}
    return {f"{name} ms": x for name, x in ms.items()} | ratios | rates


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--precision", nargs="+", default=["auto", "float32"])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--shapes", nargs="+", default=SHAPES, help="sources x flows x steps of a block")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    for shape in arguments.shapes:
        result = measure(shape, arguments.rounds, arguments.precision, torch.device(arguments.device))
        rounded = {name: round(value, 3) for name, value in result.items()}
        print(json.dumps({"shape": shape, "threads": arguments.threads} | rounded), flush=True)


if __name__ == "__main__":
    main()
