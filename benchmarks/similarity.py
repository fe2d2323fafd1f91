"""What the statistics of all pairs cost, in CPU time of the bare matrix product, in one run.

    python -m benchmarks.similarity [--sequences 50000] [--dimensions 128] [--repeats 3]

The product is float32 N×d by d×N with numpy's BLAS, all N² results, written in pieces to one array. Each
figure is CPU time over that of the product, taken in turns, the best turn of each, so that little depends on
what else the machine does. Bars: counting the N²/2 pairs takes at most as long as the product; all statistics
of N = 50,000 at most three times as long, in under 2 GB.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import time
from collections.abc import Callable

import numpy as np
import pyarrow as pa

from rayscan.config import EvaluateConfig
from rayscan.evaluation import tiles
from rayscan.evaluation.blockwise import compare, pair_statistics
from rayscan.evaluation.intervals import Resamples
from rayscan.evaluation.parts import PartData, by_label, by_source
from rayscan.evaluation.protocol import evaluate
from rayscan.methods.floors import port_vectors

PIECE = 4096
Task = Callable[[], object]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sequences", type=int, default=50_000)
    parser.add_argument("--dimensions", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    n, rng = args.sequences, np.random.default_rng(0)
    source = np.unique(rng.integers(0, n // 10, n), return_inverse=True)[1]
    vectors = around_centres(source, args.dimensions, rng)
    label = source % 50
    weights = Resamples(int(source.max()) + 1, EvaluateConfig().bootstrap, 0)
    out = np.zeros((PIECE, PIECE), np.float32)
    tasks: dict[str, Task] = {
        "matrix product": lambda: product(vectors, out),
        "counts by source": lambda: pair_statistics(vectors, source),
        "counts and nearest": lambda: compare(vectors, source, nearest=True),
        "counts by label and 7 nearest": lambda: compare(vectors, label, exclude=source, k=7),
        "all by source": lambda: by_source(vectors, source, weights, tiles.in_threads),
        "all by label": lambda: by_label(vectors, label, source, source, weights, tiles.in_threads),
    }
    seconds = best_cpu_seconds(tasks, args.repeats)
    bare = seconds["matrix product"]
    for name, taken in seconds.items():
        print(f"{name:30} {taken:8.2f} CPU-s  {taken / bare:5.2f} products")
    both = seconds["all by source"] + seconds["all by label"]
    print(f"{'all statistics':30} {both:8.2f} CPU-s  {both / bare:5.2f} products")
    memory = peak_gb()
    start = time.process_time()
    evaluate({"part": part(vectors, source, label, rng)}, EvaluateConfig(max_sequences=n))
    whole = time.process_time() - start
    print(f"{'with floors, across networks':30} {whole:8.2f} CPU-s  {whole / bare:5.2f} products")
    print(f"peak memory {memory:.2f} GB, with floors {peak_gb():.2f} GB")
    print(json.dumps({"n": n, "d": args.dimensions, "cpus": os.cpu_count(), "cpu_s": seconds}))


def around_centres(source: np.ndarray, d: int, rng: np.random.Generator) -> np.ndarray:
    """Unit vectors, alike within a source: similarities spread over many bins, as real ones do."""
    centres = rng.standard_normal((source.max() + 1, d)) + rng.standard_normal(d)
    rows = centres[source] + 0.5 * rng.standard_normal((len(source), d))
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def part(vectors: np.ndarray, source: np.ndarray, label: np.ndarray, rng: np.random.Generator) -> PartData:
    """The same sequences as an evaluation takes them, each with flows to four ports of its source's dozen."""
    n = len(source)
    ports = (source[:, None] * 7 + rng.integers(0, 12, (n, 4))) % 3000
    flows = {"proto": np.full((n, 4), 6), "dst_port": ports}
    table = pa.table({name: pa.array(list(values), pa.list_(pa.int32())) for name, values in flows.items()})
    names = pa.array([f"label {each}" for each in label])
    return PartData(vectors, source << 8, np.arange(n), port_vectors(table), names)


def product(vectors: np.ndarray, out: np.ndarray) -> None:
    for rows in tiles.slices(len(vectors), PIECE):
        for columns in tiles.slices(len(vectors), PIECE):
            a, b = vectors[rows], vectors[columns]
            np.matmul(a, b.T, out=out[: len(a), : len(b)])


def best_cpu_seconds(tasks: dict[str, Task], repeats: int) -> dict[str, float]:
    small = np.eye(64, dtype=np.float32)
    compare(small, np.arange(64), exclude=np.arange(64), nearest=True, k=7)  # compiles
    pair_statistics(small, np.arange(64))
    seconds = {name: float("inf") for name in tasks}
    for _ in range(repeats):
        for name, task in tasks.items():
            start = time.process_time()
            task()
            seconds[name] = min(seconds[name], time.process_time() - start)
    return seconds


def peak_gb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


if __name__ == "__main__":
    main()
