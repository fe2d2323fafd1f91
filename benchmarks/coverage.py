"""How often the 95 % intervals of an evaluation hold what they should, on planted sources and labels.

    python -m benchmarks.coverage [--samples 200] [--sources 120] [--labels 3] [--each 5]

A population of 4,000 sources is drawn once. Of many samples of its sources, the share is printed whose
interval holds the figure of the whole population; of figures that depend on how many sources there are (the
nearest, precision), the share that holds their mean over the samples. Beside it: how far the figure moves
from sample to sample, and how far its intervals say it does.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any

import numpy as np
from threadpoolctl import threadpool_limits

from rayscan.evaluation.blockwise import pair_statistics
from rayscan.evaluation.intervals import Resamples
from rayscan.evaluation.parts import by_label, by_source
from rayscan.methods.floors import random_unit

POPULATION, WIDTH, SPREAD, RESAMPLES = 4000, 16, 0.8, 200
BY_SOURCE = ("auroc", "average_precision", "r_at_1", "r_at_1_macro", "mean_same", "mean_different")
BY_LABEL = ("auroc", "mean_same", "mean_different")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--samples", type=int, default=200)
    parser.add_argument("--sources", type=int, default=120)
    parser.add_argument("--labels", type=int, default=3)
    parser.add_argument("--each", type=int, default=5)
    args = parser.parse_args()
    source = np.repeat(np.arange(POPULATION), args.each)
    vectors, label = population(source, args.labels)
    of = {"by source": pair_statistics(vectors, source)}
    of["by label"] = pair_statistics(vectors, label, exclude=source)
    truth = {
        (by, name): value
        for by, counts in of.items()
        for name, value in (
            ("auroc", counts.auroc()),
            ("mean_same", counts.mean_same),
            ("mean_different", counts.mean_different),
        )
    }
    found: dict[tuple[str, str], list[dict[str, Any]]] = {}
    with threadpool_limits(1, user_api="blas"):
        for sample in range(args.samples):
            chosen = np.random.default_rng(sample).choice(POPULATION, args.sources, replace=False)
            rows = (chosen[:, None] * args.each + np.arange(args.each)).ravel()
            for key, one in figures(vectors[rows], label[rows], args.sources, args.each, sample):
                found.setdefault(key, []).append(one)
    print(
        f"{args.samples} samples of {args.sources} sources, {args.each} sequences each, {args.labels} labels"
    )
    print(f"{'':28}{'holds':>8}{'moves by':>10}{'said':>8}")
    for (by, name), many in found.items():
        value, low, high = (np.array([one[key] for one in many]) for key in ("value", "low", "high"))
        target = truth.get((by, name), value.mean())
        held, said = ((low <= target) & (target <= high)).mean(), (high - low).mean() / 3.92
        print(f"{by + ', ' + name:28}{held:>8.1%}{value.std():>10.4f}{said:>8.4f}")


def population(source: np.ndarray, labels: int) -> tuple[np.ndarray, np.ndarray]:
    """Unit vectors of sources around the middle of their label, and the labels."""
    of = np.arange(POPULATION) % labels
    middle = random_unit(labels, WIDTH, 7)[of] + 0.8 * random_unit(POPULATION, WIDTH, 8)
    rows = middle[source] + SPREAD * random_unit(len(source), WIDTH, 9)
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32), of[source]


def figures(
    vectors: np.ndarray, label: np.ndarray, sources: int, each: int, seed: int
) -> Iterator[tuple[tuple[str, str], dict[str, Any]]]:
    source, weights = np.repeat(np.arange(sources), each), Resamples(sources, RESAMPLES, seed)
    one = by_source(vectors, source, weights, here)
    yield from ((("by source", name), one[name]) for name in BY_SOURCE)
    one = by_label(vectors, label, source, source, weights, here)
    yield from ((("by label", name), one[name]) for name in BY_LABEL)
    yield from ((("by label", f"{k}-NN macro F1"), score) for k, score in one["knn_macro_f1"].items())


def here(task: Any, items: Any, shared: Any) -> Iterator[Any]:
    """The map without threads, which take longer to start than these items do."""
    return (task(item, shared) for item in items)


if __name__ == "__main__":
    main()
