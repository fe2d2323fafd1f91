"""Ingest: flows per second from captures to committed (period, bucket) files, memory, small captures.

    python -m benchmarks.ingest rate [--flows 5000000] [--files 8] [--cpus 1 2] [--pcap]
    python -m benchmarks.ingest memory [--flows 5000000 20000000] [--pcap]
    python -m benchmarks.ingest small [--flows 1000000] [--files 8 1000]

`rate` simulates captures of one month, then runs the ingest stage on them in fresh workspaces, with one CPU
and with more. The start of Ray is not counted. The reader alone (no Ray, no writing) is timed for comparison.
`memory` reads one capture of each size in a process of its own and prints the most memory that it held.
`small` cuts the same flows into few and into many captures, and times what follows on either.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pyarrow.parquet as pq
import ray

from rayscan import planning
from rayscan.captures.detect import read_capture
from rayscan.config import RunConfig, load
from rayscan.planning import capture_units
from rayscan.simulate import simulate_to
from rayscan.stages import ingest, sequence
from rayscan.stages.session import session
from rayscan.tables import CommitInfo, Workspace

INFO = CommitInfo("benchmark", "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("what", choices=["rate", "memory", "small", "one"])
    parser.add_argument("--flows", type=int, nargs="+")
    parser.add_argument("--files", type=int, nargs="+")
    parser.add_argument("--cpus", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--pcap", action="store_true")
    parser.add_argument("--capture", help=argparse.SUPPRESS)  # of "one", which `memory` starts
    options = parser.parse_args()
    if options.what == "one":
        memory_of_one(Path(options.capture))
        return
    with tempfile.TemporaryDirectory() as folder:
        if options.what == "rate":
            (flows,), (files,) = options.flows or [5_000_000], options.files or [8]
            rates(Path(folder), flows, files, options.cpus, options.pcap)
        elif options.what == "memory":
            memory(Path(folder), options.flows or [5_000_000, 20_000_000], options.pcap)
        else:
            (flows,) = options.flows or [1_000_000]
            small(Path(folder), flows, options.files or [8, 1000])


def simulated(folder: Path, flows: int, every: str = "month", pcap: bool = False) -> Path:
    sources = min(20_000, flows // 20)
    return simulate_to(folder, months=1, flows=flows, sources=sources, every=every, pcap=pcap).captures


def rates(folder: Path, flows: int, files: int, cpus: list[int], pcap: bool) -> None:
    if pcap:
        captures = simulated(folder / "telescope", flows, "day", pcap=True)
    else:
        captures = cut(simulated(folder / "telescope", flows), folder / "cut", files)
    found = sorted(captures.iterdir())
    print(f"{flows:,} flows in {len(found)} {'pcap' if pcap else 'Parquet'} files")
    print(f"reader alone, one process  {reader_rate(found):12,.0f} flows/s")
    first = None
    for n in cpus:
        rate, written = stage_rate(folder / f"ws{n}", captures, n)
        first = first or rate
        print(f"ingest stage, {n} CPU        {rate:12,.0f} flows/s ({rate / first:.2f} x), {written} files")


def cut(captures: Path, folder: Path, files: int) -> Path:
    """The flows of one capture in `files` captures."""
    folder.mkdir(parents=True)
    (whole,) = captures.iterdir()
    table = pq.read_table(whole)
    step = -(-table.num_rows // files)
    for number in range(files):
        pq.write_table(table.slice(number * step, step), folder / f"{number:05d}.parquet")
    return folder


def reader_rate(captures: list[Path]) -> float:
    config = load(env={}).captures
    rows, start = 0, time.perf_counter()
    for path in captures:
        with path.open("rb") as file:
            _, batches = read_capture(file, str(path), config, 500_000)
            rows += sum(batch.flows.num_rows for batch in batches)
    return rows / (time.perf_counter() - start)


def settings(captures: Path, *sets: str) -> RunConfig:
    return load(sets=[f"captures.paths={captures}", *sets], env={})


def stage_rate(place: Path, captures: Path, cpus: int) -> tuple[float, int]:
    config = settings(captures, f"resources.local_cpus={cpus}")
    workspace = Workspace.open(place, config.ingest)
    with session(config.resources):
        seconds = ingest_all(workspace, config)
    files = workspace.table("flows").files()
    return sum(file.rows for file in files) / seconds, len(files)


def ingest_all(workspace: Workspace, config: RunConfig) -> float:
    """Seconds, without the start of Ray and its workers."""
    started = ray.remote(lambda: time.sleep(0.1))
    ray.get([started.remote() for _ in range(4)])
    due = capture_units(workspace, config)
    start = time.perf_counter()
    ingest.run(workspace, config, due, INFO)
    return time.perf_counter() - start


def memory(folder: Path, sizes: list[int], pcap: bool) -> None:
    for flows in sizes:
        (capture,) = simulated(folder / str(flows), flows, pcap=pcap).iterdir()
        print(f"one capture of {flows:,} flows, {capture.stat().st_size / 1e9:.2f} GB:", end=" ", flush=True)
        command = [sys.executable, "-m", "benchmarks.ingest", "one", "--capture", str(capture)]
        subprocess.run(command, check=True)
        capture.unlink()


def memory_of_one(capture: Path) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    config = settings(capture)
    workspace = Workspace.open(capture.parent.parent / "ws", config.ingest)
    start = time.perf_counter()
    (file,) = capture_units(workspace, config)
    result = ingest.ingest_file(workspace, file, config)
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(
        f"{result.flows:,} flows in {seconds:.0f} s ({result.flows / seconds:,.0f}/s), at most "
        f"{peak / 1e6:.2f} GB, {before / 1e6:.2f} GB of it before"
    )


def small(folder: Path, flows: int, files: list[int]) -> None:
    whole = simulated(folder / "telescope", flows)
    for n in files:
        config = settings(cut(whole, folder / f"cut{n}", n), "resources.local_cpus=2")
        workspace = Workspace.open(folder / f"ws{n}", config.ingest)
        with session(config.resources):
            seconds = {"ingest": ingest_all(workspace, config)}
            start = time.perf_counter()
            due = planning.sequence_units(workspace, config)
            seconds["plan"] = time.perf_counter() - start
            start = time.perf_counter()
            sequence.run(workspace, config, due, INFO)
            seconds["sequences"] = time.perf_counter() - start
        start = time.perf_counter()
        capture_units(workspace, config)
        seconds["status"] = time.perf_counter() - start
        written = workspace.table("flows").files()
        megabytes = sum(file.bytes for file in written) / 1e6
        told = ", ".join(f"{name} {value:.1f} s" for name, value in seconds.items())
        print(f"{flows:,} flows in {n} captures: {len(written):,} files, {megabytes:.0f} MB; {told}")


if __name__ == "__main__":
    main()
