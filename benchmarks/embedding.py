"""Sequences embedded per second, against a plain evaluation loop.

Both sides hold the same weights of the published architecture. The plain loop takes sequences in order,
collates dictionaries of tensors into batches of 256 padded to the longest, and spells attention out. Three
sets: every sequence of 16 flows, of 128, and lengths as they come about when sources of Pareto-distributed
size are cut into windows of 128 flows, where nearly half of what the plain loop computes is padding.

    python -m benchmarks.embedding [--rounds 3] [--threads 2] [--precision auto float32] [--compile]
    python -m benchmarks.embedding --device cuda --batch-tokens 262144

The two sides alternate, so that other load on the machine hits both; the ratio is that of the medians.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable

import numpy as np
import torch

from benchmarks.training import PAPER, PlainEncoder, collate_samples, samples_of, simulated
from rayscan.config import Precision
from rayscan.model.embed import embed
from rayscan.model.encoder import Encoder
from rayscan.model.features import Sequences

BATCH = 256
TOKENS = 4096  # a batch whose activations stay in a core's cache


def pareto_lengths(n: int, length: int = 128, shortest: int = 16, seed: int = 0) -> np.ndarray:
    """Lengths of the first n sequences of sources whose flows follow a Pareto law of exponent 1, shuffled."""
    rng = np.random.default_rng(seed)
    flows = np.minimum(shortest / rng.random(n), 50 * length).astype(np.int64)
    full, rest = np.divmod(flows, length)
    lengths = np.concatenate([np.full(full.sum(), length), rest[rest >= shortest]])
    return rng.permutation(lengths)[:n]


def plain_embed(encoder: PlainEncoder, sequences: Sequences, device: torch.device) -> np.ndarray:
    samples = samples_of(sequences)
    vectors = []
    with torch.no_grad():
        for begin in range(0, len(samples), BATCH):
            batch = collate_samples(samples[begin : begin + BATCH])
            vectors.append(encoder({name: x.to(device) for name, x in batch.items()}).cpu())
    return torch.cat(vectors).numpy()


def seconds(work: Callable[[], np.ndarray]) -> tuple[float, np.ndarray]:
    begin = time.perf_counter()
    result = work()
    return time.perf_counter() - begin, result


def measure(
    name: str, lengths: np.ndarray, precision: Precision, options: argparse.Namespace
) -> dict[str, float | str]:
    torch.manual_seed(0)
    device = torch.device(options.device)
    ours = Encoder(PAPER).eval().to(device)
    plain = PlainEncoder().load(ours).eval().to(device)
    if options.compile:
        ours.compile_layers()
    sequences = simulated(len(lengths), 1, lengths)
    sequences.columns["gap_us"][sequences.offsets[:-1]] = 0
    times = []
    for turn in range(options.rounds + 1):
        plain_s, expected = seconds(lambda: plain_embed(plain, sequences, device))
        ours_s, vectors = seconds(lambda: embed(ours, sequences, options.batch_tokens, device, precision))
        assert np.abs(vectors - expected).max() < (1e-4 if precision == "float32" else 1e-2)
        if turn:  # the first turn warms up
            times.append((plain_s, ours_s))
    plain_s, ours_s = np.median(times, axis=0)
    return {
        "set": name,
        "precision": precision,
        "sequences": len(lengths),
        "mean_flows": round(float(lengths.mean()), 1),
        "plain_per_s": round(len(lengths) / plain_s),
        "rayscan_per_s": round(len(lengths) / ours_s),
        "ratio": round(plain_s / ours_s, 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--precision", nargs="+", default=["auto", "float32"])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch-tokens", type=int, default=TOKENS)
    parser.add_argument("--compile", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    sets = {
        "full, 16 flows": np.full(8000, 16),
        "full, 128 flows": np.full(1000, 128),
        "as cut, up to 128 flows": pareto_lengths(2500),
    }
    for name, lengths in sets.items():
        for precision in arguments.precision:
            result = measure(name, lengths, precision, arguments)
            how = {"device": arguments.device, "threads": arguments.threads, "compiled": arguments.compile}
            print(json.dumps(result | how), flush=True)


if __name__ == "__main__":
    main()
