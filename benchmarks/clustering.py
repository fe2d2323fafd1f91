"""Correlation clustering: cost and quality on planted vectors, d = 128.

    python -m benchmarks.clustering solve      # N = 10,000; bar: 8 similarity matrices N×N, 1 GB
    python -m benchmarks.clustering reference  # N = 1,000 to 5,000, explicit graph; bar: 0.999 of KL
    python -m benchmarks.clustering blocked    # N = 100,000 in blocks on two processes; bar: 60 CPU-s
    python -m benchmarks.clustering blocked --points 1000000 --thresholds 0.4 --block 62500 --spread 0.05
                                               # bar: 4 minutes, 4 GB
    python -m benchmarks.clustering split      # N = 20,000 in four blocks; bar: 0.5 % of the objective
    python -m benchmarks.clustering choice     # N = 50,000: arbitrary blocks against blocks of similar rows
    python -m benchmarks.clustering sweep      # 100 thresholds at N = 10,000; bar: 2 minutes
    python -m benchmarks.clustering follow     # 16,000 clusters matched to as many campaigns

Run with OMP_NUM_THREADS=1. Times are CPU seconds, of all processes together, and exclude the compilation of
the first call; memory is the largest resident set of the caller plus that of its workers. Seeds are fixed.
"""

from __future__ import annotations

import argparse
import resource
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from threadpoolctl import threadpool_limits

from benchmarks.explicit import greedy_contraction, kernighan_lin, pair_weights, value
from benchmarks.planted import planted
from rayscan.clustering import objective, solve, solve_blocked, sweep
from rayscan.clustering.campaigns import Campaigns, follow
from rayscan.clustering.multilevel import neighbourhoods


def cpu_s(work: Callable[[], Any]) -> tuple[Any, float]:
    start = time.process_time()
    return work(), time.process_time() - start


def peak_gb(who: int = resource.RUSAGE_SELF) -> float:
    return resource.getrusage(who).ru_maxrss / 2**20


def compile_all() -> None:
    points, _ = planted(2600, seed=1)
    solve(np.concatenate([points, points[:50]]), 0.4)
    solve(points, 0.4)
    solve_blocked(lambda i: points[i * 800 : (i + 1) * 800], 3, 0.4)


def bench_solve(n: int, thresholds: Sequence[float], seeds: int) -> None:
    points, _ = planted(n, seed=n)
    compile_all()
    for threshold in thresholds:
        found = [cpu_s(partial(solve, points, threshold, seed=seed)) for seed in range(seeds)]
        gb = peak_gb()
        matrix = float(np.median([_similarity_matrix(points) for _ in range(3)]))
        for seed, (labels, spent) in enumerate(found):
            print(
                f"N {n} θ {threshold} seed {seed}: objective {objective(points, labels, threshold):.1f}, "
                f"{labels.max() + 1} clusters, {spent:.2f} s, {spent / matrix:.1f} × {matrix:.2f} s",
                flush=True,
            )
        if threshold == thresholds[0]:  # later peaks hold the matrix
            print(f"  peak {gb:.2f} GB", flush=True)


def _similarity_matrix(points: np.ndarray) -> float:
    out = np.zeros((len(points), len(points)), np.float32)
    return cpu_s(lambda: np.matmul(points, points.T, out=out))[1]


def bench_reference(sizes: Sequence[int], thresholds: Sequence[float]) -> None:
    compile_all()
    kernighan_lin(pair_weights(planted(50)[0], 0.4), greedy_contraction(pair_weights(planted(50)[0], 0.4)))
    for n in sizes:
        points, _ = planted(n, seed=n)
        for threshold in thresholds:
            weights = pair_weights(points, threshold)
            contracted, contraction_s = cpu_s(partial(greedy_contraction, weights))
            chained, chains_s = cpu_s(partial(kernighan_lin, weights, contracted))
            labels, ours_s = cpu_s(partial(solve, points, threshold))
            same, _ = cpu_s(partial(solve, points, threshold, greedy=True))
            ours, gaec, kl = (value(weights, found) for found in (labels, contracted, chained))
            print(
                f"N {n} θ {threshold}: contraction {gaec:.2f} ({contraction_s:.2f} s), "
                f"+ Kernighan–Lin {kl:.2f} ({chains_s:.2f} s), ours {ours:.2f} ({ours_s:.2f} s), "
                f"ours / KL {ours / kl:.4f}, greedy mode / contraction {value(weights, same) / gaec:.9f}",
                flush=True,
            )


def _rows(path: str, size: int, i: int) -> np.ndarray:
    return np.load(path, mmap_mode="r")[i * size : (i + 1) * size]


def _call(task: Callable[[Any, Any], Any], shared: Any, item: Any) -> Any:
    return task(item, shared)


def bench_blocked(n: int, thresholds: Sequence[float], block: int, workers: int, spread: float) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "points.npy")
        np.save(path, planted(n, seed=n, spread=spread)[0])
        for threshold in thresholds:
            once = get_context("fork").Process(
                target=_blocked_once, args=(path, n, threshold, block, workers)
            )
            once.start()  # a process of its own for each, so that peaks and times do not add up
            once.join()


def _blocked_once(path: str, n: int, threshold: float, block: int, workers: int) -> None:
    start = time.perf_counter()
    own = time.process_time()
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:

        def parallel(task: Callable[[Any, Any], Any], items: Sequence[Any], shared: Any) -> Iterable[Any]:
            began = time.perf_counter()
            yield from pool.map(partial(_call, task, shared), items)
            print(f"  {len(items)} tasks in {time.perf_counter() - began:.1f} s", flush=True)

        solution = solve_blocked(partial(_rows, path, block), -(-n // block), threshold, map=parallel)
    wall, spent = time.perf_counter() - start, time.process_time() - own
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    gb = peak_gb() + workers * peak_gb(resource.RUSAGE_CHILDREN)
    found = objective(np.load(path, mmap_mode="r"), np.concatenate(solution.labels), threshold)
    spent_all = spent + children.ru_utime + children.ru_stime
    print(
        f"N {n} θ {threshold}: objective {found:.0f}, {len(solution.clusters)} clusters, "
        f"{solution.rounds} rounds (the last gained {solution.left:.1e}), "
        f"{spent_all:.1f} CPU-s (caller {spent:.1f}), {wall:.1f} s, at most {gb:.2f} GB",
        flush=True,
    )


def bench_split(n: int, thresholds: Sequence[float], spread: float, n_blocks: int = 4) -> None:
    points, _ = planted(n, seed=0, spread=spread)
    parts = np.array_split(np.arange(n), n_blocks)
    for threshold in thresholds:
        whole = objective(points, solve(points, threshold), threshold)
        solution = solve_blocked(lambda i: points[parts[i]], n_blocks, threshold)
        split = objective(points, np.concatenate(solution.labels), threshold)
        print(f"N {n} θ {threshold}: {n_blocks} blocks / one {split / whole:.5f}", flush=True)


def bench_choice(n: int, thresholds: Sequence[float], block: int, spread: float) -> None:
    points, _ = planted(n, seed=0, spread=spread)
    compile_all()
    similar, spent = cpu_s(lambda: points[np.concatenate(neighbourhoods(points.astype(np.float64), 0))])
    print(f"N {n}: dividing into blocks of similar rows {spent:.1f} s", flush=True)
    for threshold in thresholds:
        for name, rows in (("arbitrary", points), ("similar", similar)):
            for rounds in (0, 20):
                load = partial(_slice, rows, block)
                task = partial(solve_blocked, load, -(-n // block), threshold, max_rounds=rounds)
                solution, spent = cpu_s(task)
                found = objective(rows, np.concatenate(solution.labels), threshold)
                print(
                    f"θ {threshold} {name} blocks of {block}, {solution.rounds} rounds: {found:.0f}, "
                    f"{len(solution.clusters)} clusters, {spent:.1f} s",
                    flush=True,
                )


def _slice(rows: np.ndarray, size: int, i: int) -> np.ndarray:
    return rows[i * size : (i + 1) * size]


def bench_sweep(n: int, steps: int) -> None:
    points, _ = planted(n, seed=n)
    compile_all()
    thresholds = [i / steps for i in range(steps)]
    found, spent = cpu_s(lambda: list(sweep(points, thresholds)))
    print(f"N {n}: {steps} thresholds in {spent:.1f} s")
    for i in range(steps // 10, steps, steps // 5):
        alone, one_s = cpu_s(partial(solve, points, thresholds[i]))
        ratio = objective(points, found[i], thresholds[i]) / objective(points, alone, thresholds[i])
        print(f"  θ {thresholds[i]:.2f}: sweep / solve {ratio:.5f}, solve alone {one_s:.2f} s", flush=True)


def bench_follow(n: int) -> None:
    """Clusters that are the campaigns of the period before, each turned a little; products in float64."""
    rng = np.random.default_rng(0)
    old = rng.standard_normal((n, 128))
    new = old + 0.3 * rng.standard_normal((n, 128))
    old, new = (rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in (old, new))
    sizes = np.floor(rng.pareto(1.0, n)) + 1
    before = Campaigns([f"c{i}" for i in range(n)], old * sizes[:, None], sizes)
    step, spent = cpu_s(lambda: follow(before, "p", np.arange(n), new * sizes[:, None], sizes, 0.4))
    with threadpool_limits(1):
        product = cpu_s(lambda: [float((old[i : i + 128] @ new.T)[0, 0]) for i in range(0, n, 128)])[1]
    carried = step.events.count("continued")
    print(f"{n:,}: {spent:.1f} CPU-s, {spent / product:.1f} products, {carried:,} go on, {peak_gb():.2f} GB")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "what", choices=["solve", "reference", "blocked", "split", "choice", "sweep", "follow"]
    )
    parser.add_argument("--points", type=int)
    parser.add_argument("--thresholds", type=float, nargs="+", default=[0.2, 0.4, 0.6])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--block", type=int, default=12_500)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument(
        "--spread", type=float, default=0.22, help="of planted points; see benchmarks.planted"
    )
    args = parser.parse_args()
    if args.what == "solve":
        bench_solve(args.points or 10_000, args.thresholds, args.seeds)
    elif args.what == "reference":
        bench_reference([args.points] if args.points else [1000, 2000, 5000], args.thresholds)
    elif args.what == "blocked":
        bench_blocked(args.points or 100_000, args.thresholds, args.block, args.workers, args.spread)
    elif args.what == "split":
        bench_split(args.points or 20_000, args.thresholds, args.spread)
    elif args.what == "choice":
        bench_choice(args.points or 50_000, args.thresholds, args.block, args.spread)
    elif args.what == "sweep":
        bench_sweep(args.points or 10_000, steps=100)
    else:
        bench_follow(args.points or 16_000)


if __name__ == "__main__":
    main()
