"""Flows per second of the simulated telescope, on one core: generating, truth, Parquet, pcap.

python -m benchmarks.simulate --flows 10000000 --sources 20000 --months 3
"""

from __future__ import annotations

import argparse
import io
import resource
import tempfile
import time
from collections.abc import Callable

import pyarrow as pa

from rayscan.simulate import simulate, write_parquet, write_pcap


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--flows", type=int, default=5_000_000)
    parser.add_argument("--sources", type=int, default=10_000)
    parser.add_argument("--months", type=int, default=3)
    args = parser.parse_args()
    pa.set_cpu_count(1)
    simulation = simulate(months=args.months, sources=args.sources, flows=args.flows)
    print(f"{args.flows:,} flows, {args.sources:,} sources, {args.months} months, one thread")
    report("generate", args.flows, lambda: sum(table.num_rows for table in simulation.flows()))
    report("truth", args.flows, lambda: simulation.truth.num_rows)
    with tempfile.TemporaryDirectory() as folder:
        report("generate and write Parquet", args.flows, lambda: write_parquet(simulation, folder).flows)
    month = simulation.month(simulation.months[0]).slice(0, 1_000_000)
    report("write pcap", month.num_rows, lambda: write_pcap(month, io.BytesIO()))


def report(what: str, flows: int, work: Callable[[], object]) -> None:
    """Time the work once and print its rate and the process's largest memory so far."""
    start = time.perf_counter()
    work()
    rate = flows / (time.perf_counter() - start)
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"{what:28} {rate / 1e6:8.2f} M flows/s   peak {memory:6,.0f} MB")


if __name__ == "__main__":
    main()
