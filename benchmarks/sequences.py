"""Flows to sequences: `rayscan.sequences.build` against one polars process doing the same grouping.

    python -m benchmarks.sequences --flows 5000000 --sources 50000

Both get the same flows in memory (source popularity as in a telescope: zipf with exponent 0.7) and return
one row per sequence with lists of destination, port, protocol and gap. Polars may use every core. Each
figure is the best of `--repeat` runs that take turns, and the two results are compared value by value. Bar:
a ratio of 0.5.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import numpy as np
import polars as pl
import pyarrow as pa

from rayscan import schema
from rayscan.sequences import build

MONTH_US = 30 * 86_400 * 10**6
START_US = 1_709_251_200_000_000  # 2024-03-01


def flows(n: int, sources: int, in_order: bool, seed: int = 0) -> pa.Table:
    rng = np.random.default_rng(seed)
    share = np.arange(1, sources + 1) ** -0.7
    addresses = rng.choice(2**32, sources, replace=False)
    ts = START_US + rng.integers(0, MONTH_US, n)
    if in_order:
        ts.sort()
    columns = {
        "ts": pa.array(ts).cast(schema.TIME),
        "src": addresses[rng.choice(sources, n, p=share / share.sum())],
        "dst": (10 << 24) + rng.integers(0, 2**16, n),
        "dst_port": rng.integers(0, 2**16, n).astype(np.int32),
        "proto": rng.choice([1, 6, 17], n).astype(np.int16),
    }
    return pa.table(columns)


def with_polars(table: pa.Table, length: int, min_length: int) -> pl.DataFrame:
    """The same windows, start times and lists from one polars pipeline."""
    frame = pl.from_arrow(table)
    assert isinstance(frame, pl.DataFrame)
    lists = ["dst", "dst_port", "proto"]
    return (
        frame.lazy()
        .sort("src", "ts", maintain_order=True)
        .with_columns(index=pl.int_range(pl.len()).over("src") // length)
        .group_by("src", "index", maintain_order=True)
        .agg(
            *lists,
            pl.col("ts").diff().dt.total_microseconds().fill_null(0).alias("gap_us"),
            pl.col("ts").first().alias("start"),
            pl.col("ts").last().alias("end"),
            pl.len().alias("length"),
        )
        .filter(pl.col("length") >= min_length)
        .collect()
    )


def same(ours: pa.Table, theirs: pl.DataFrame) -> bool:
    frame = pl.from_arrow(
        ours.select(["src", "index", "start", "length", "dst", "dst_port", "proto", "gap_us"])
    )
    assert isinstance(frame, pl.DataFrame)
    return frame.equals(theirs.select(frame.columns).cast(dict(frame.schema)))


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--flows", type=int, default=5_000_000)
    parser.add_argument("--sources", type=int, default=50_000)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--min-length", type=int, default=16)
    parser.add_argument("--repeat", type=int, default=3)
    args = parser.parse_args()
    cut = (args.length, args.min_length)
    print(f"{args.flows:,} flows, {args.sources:,} sources, polars on {pl.thread_pool_size()} threads")
    print(f"{'order of times':<16}{'rayscan':>14}{'polars':>14}{'ratio':>8}")
    for in_order in (False, True):
        table = flows(args.flows, args.sources, in_order)
        assert same(build(table, *cut)[0], with_polars(table, *cut)), "the two results differ"
        runs = [
            (seconds(lambda: build(table, *cut)), seconds(lambda: with_polars(table, *cut)))  # noqa: B023
            for _ in range(args.repeat)
        ]
        ours, theirs = (args.flows / min(column) / 1e6 for column in zip(*runs, strict=True))
        name = "in time order" if in_order else "random"
        print(f"{name:<16}{ours:>10.2f} M/s{theirs:>10.2f} M/s{ours / theirs:>8.2f}")


if __name__ == "__main__":
    main()
