"""Rate of the pair statistics against the bare matrix product, in pairs per second, in one run.

    python -m benchmarks.similarity [--sequences 20000] [--dimensions 128] [--repeats 5]

Both are timed in turns, so that a busy machine slows both; the best turn of each counts. The product is
the machine's own: float32 N×d by d×N with numpy's BLAS, all N² results written to one array. Bar: at
least half of it.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable

import numpy as np

from rayscan.evaluation.pairs import nearest, pair_statistics


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sequences", type=int, default=20_000)
    parser.add_argument("--dimensions", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    n, rng = args.sequences, np.random.default_rng(0)
    source = rng.integers(0, n // 10, n)
    vectors = around_centres(source, args.dimensions, rng)
    m = min(n, 8192)  # the result of the bare product must fit in memory
    out = np.empty((m, m), np.float32)
    label = source % 50
    tasks: dict[str, tuple[int, Callable[[], object]]] = {
        "matrix product": (m * m, lambda: np.matmul(vectors[:m], vectors[-m:].T, out=out)),
        "pairs by source": (n * (n - 1) // 2, lambda: pair_statistics(vectors, source)),
        "pairs by label": (n * (n - 1) // 2, lambda: pair_statistics(vectors, label, exclude=source)),
        "nearest": (n * n, lambda: nearest(vectors, source)),
    }
    rates = best_rates(tasks, args.repeats)
    bare = rates["matrix product"]
    for name, rate in rates.items():
        print(f"{name:16} {rate / 1e6:8.0f} M pairs/s  {rate / bare:5.2f} of the product")
    print(json.dumps({"n": n, "d": args.dimensions, "cpus": os.cpu_count(), "pairs_per_s": rates}))


def around_centres(source: np.ndarray, d: int, rng: np.random.Generator) -> np.ndarray:
    """Unit vectors, alike within a source: similarities spread over many bins, as real ones do."""
    centres = rng.standard_normal((source.max() + 1, d)) + rng.standard_normal(d)
    rows = centres[source] + 0.5 * rng.standard_normal((len(source), d))
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def best_rates(tasks: dict[str, tuple[int, Callable[[], object]]], repeats: int) -> dict[str, float]:
    for _, task in tasks.values():
        task()  # compiles, and touches memory
    seconds = {name: float("inf") for name in tasks}
    for _ in range(repeats):
        for name, (_, task) in tasks.items():
            start = time.perf_counter()
            task()
            seconds[name] = min(seconds[name], time.perf_counter() - start)
    return {name: pairs / seconds[name] for name, (pairs, _) in tasks.items()}


if __name__ == "__main__":
    main()
