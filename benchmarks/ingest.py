"""Ingest: flows per second from Parquet captures to committed (period, bucket) files, through Ray.

    python -m benchmarks.ingest [--flows 5000000] [--files 8] [--cpus 2]

Simulates the captures, then runs the ingest stage on them in fresh workspaces, with one CPU and with
more. The start of Ray is not counted. The reader alone (no Ray, no writing) is timed for comparison.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import pyarrow.parquet as pq
import ray

from rayscan.captures.detect import read_capture
from rayscan.config import RunConfig, load
from rayscan.planning import capture_units
from rayscan.simulate import simulate_to
from rayscan.stages import ingest
from rayscan.stages.session import session
from rayscan.tables import CommitInfo, Workspace


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--flows", type=int, default=5_000_000)
    parser.add_argument("--files", type=int, default=8)
    parser.add_argument("--cpus", type=int, nargs="+", default=[1, 2])
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        captures = make_captures(Path(folder), options.flows, options.files)
        print(f"{options.flows:,} flows in {options.files} Parquet files")
        print(f"reader alone, one process  {reader_rate(captures):12,.0f} flows/s")
        for cpus in options.cpus:
            rate, files = stage_rate(Path(folder) / f"ws{cpus}", captures, cpus)
            print(f"ingest stage, {cpus} CPU        {rate:12,.0f} flows/s, {files} files written")


def make_captures(folder: Path, flows: int, files: int) -> Path:
    """Captures of one month, cut into `files` files."""
    made = simulate_to(folder / "telescope", months=1, flows=flows, sources=min(20_000, flows // 20))
    table = pq.read_table(made.files[0])
    made.files[0].unlink()
    step = -(-table.num_rows // files)
    for number in range(files):
        pq.write_table(table.slice(number * step, step), made.captures / f"{number:03d}.parquet")
    return made.captures


def reader_rate(captures: Path) -> float:
    config = load(env={}).captures
    rows, start = 0, time.perf_counter()
    for path in sorted(captures.iterdir()):
        with path.open("rb") as file:
            _, batches = read_capture(file, str(path), config, 500_000)
            rows += sum(batch.flows.num_rows for batch in batches)
    return rows / (time.perf_counter() - start)


def stage_rate(place: Path, captures: Path, cpus: int) -> tuple[float, int]:
    sets = [f"captures.paths={captures}", f"resources.local_cpus={cpus}"]
    config: RunConfig = load(sets=sets, env={})
    workspace = Workspace.open(place, config.ingest)
    with session(config.resources):
        ray.get(ray.remote(lambda: None).remote())
        due = capture_units(workspace, config)
        start = time.perf_counter()
        counts = ingest.run(workspace, config, due, CommitInfo("benchmark", ""))
        elapsed = time.perf_counter() - start
    return counts.flows / elapsed, len(workspace.table("flows").files())


if __name__ == "__main__":
    main()
