"""Clustering as a user runs it: the cluster stage on Ray, from an embeddings table to a clusters table.

    python -m benchmarks.cluster_stage --points 1000000 --threshold 0.4    # bar: 4 minutes, 4 GB

Planted clusters (`benchmarks.planted`) are written as one period of embeddings into a fresh workspace; then
the stage runs on it. Printed: wall and CPU time without the start of Ray, the objective, and the largest
memory of the driver and of any one worker, libraries included. Making the data and the objective are other
processes'.
"""

from __future__ import annotations

import argparse
import os
import resource
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import numpy as np
import pyarrow as pa
import ray

from benchmarks.planted import planted
from rayscan import schema
from rayscan.clustering import objective
from rayscan.config import load
from rayscan.planning import Model, Unit
from rayscan.stages import cluster
from rayscan.stages.session import session
from rayscan.stages.similarity import vectors_of
from rayscan.tables import CommitInfo, File, Workspace


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--points", type=int, default=100_000)
    parser.add_argument("--threshold", type=float, default=0.4)
    parser.add_argument("--dimensions", type=int, default=128)
    parser.add_argument("--spread", type=float, default=0.05, help="see benchmarks.planted")
    parser.add_argument("--buckets", type=int, default=16)
    parser.add_argument("--cpus", type=int, default=2)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, ProcessPoolExecutor(1, get_context("spawn")) as aside:
        sets = [f"cluster.threshold={options.threshold}", f"resources.local_cpus={options.cpus}"]
        config = load(sets=sets, env={})
        workspace = Workspace.open(folder, config.ingest)
        instance = (options.points, options.dimensions, options.spread)
        unit = aside.submit(write_embeddings, workspace, *instance, options.buckets).result()
        with session(config.resources):
            before = used(options.cpus)  # workers are up
            start = time.perf_counter()
            counts = cluster.run(workspace, config, Model("m", "w", {}), [unit], CommitInfo("b", ""))
            wall = time.perf_counter() - start
            after = used(options.cpus)
        driver = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        largest = max(mb for mb, _ in after.values())
        spent = sum(cpu_s - before.get(pid, (0.0, 0.0))[1] for pid, (_, cpu_s) in after.items())
        value = aside.submit(objective_of, workspace, unit, options.threshold).result()
    print(f"{options.points:,} points, θ = {options.threshold:g}: {wall:.1f} s, {spent:.0f} CPU-s")
    print(f"{counts.clusters:,} clusters")
    print(f"objective {value:,.1f}")
    print(f"memory: driver {driver:,.0f} MB, largest worker {largest:,.0f} MB")


def write_embeddings(workspace: Workspace, points: int, d: int, spread: float, buckets: int) -> Unit:
    """One period of embeddings; row i has sequence id i."""
    vectors, _ = planted(points, seed=0, d=d, spread=spread)
    table = workspace.table("embeddings")
    files: list[File] = []
    for bucket, rows in enumerate(np.array_split(np.arange(len(vectors)), buckets)):
        offsets = pa.array(np.arange(len(rows) + 1, dtype=np.int32) * vectors.shape[1])
        columns = {
            "sequence_id": rows,
            "src": rows,
            "start": pa.array(np.zeros(len(rows), np.int64)).cast(schema.TIME),
            "vector": pa.ListArray.from_arrays(offsets, pa.array(vectors[rows].reshape(-1))),
        }
        key = {"model": "m", "period": "all", "bucket": bucket}
        files.append(table.write(pa.table(columns, schema=schema.EMBEDDINGS), key))
    return Unit({"run": "main", "period": "all"}, tuple(files), 1, "due")


def objective_of(workspace: Workspace, unit: Unit, threshold: float) -> float:
    """The objective of the committed clusters."""
    rows = workspace.table("embeddings").read_files(unit.files)
    found = workspace.table("clusters").read()
    labels = np.empty(found.num_rows, np.int64)
    labels[found["sequence_id"].to_numpy()] = found["cluster"].to_numpy()
    return objective(vectors_of(rows), labels[rows["sequence_id"].to_numpy()], threshold)


def used(cpus: int) -> dict[int, tuple[float, float]]:
    """Of the driver and of every worker: its largest resident memory in MB, and the CPU seconds it took."""
    return dict([usage(), *ray.get([worker_usage.remote() for _ in range(4 * cpus)])])


@ray.remote(num_cpus=1)
def worker_usage() -> tuple[int, tuple[float, float]]:
    time.sleep(0.3)  # so that every worker gets one
    return usage()


def usage() -> tuple[int, tuple[float, float]]:
    found = resource.getrusage(resource.RUSAGE_SELF)
    return os.getpid(), (found.ru_maxrss / 1024, found.ru_utime + found.ru_stime)


if __name__ == "__main__":
    main()
