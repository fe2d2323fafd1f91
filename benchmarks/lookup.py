"""Known scanners on a day, what comes from outside, and pseudonyms: addresses per second of one CPU.

    python -m benchmarks.lookup --lists FILE... [--addresses 5000000]

FILE are scanner lists as `rayscan scanners import` reads them. Addresses are drawn at random from all of
IPv4, a share of them from the lists; days at random from those of the lists. Bisecting the ends of all
networks by `np.searchsorted`, without any dates, stands beside it. Time is the process's own, so that others
on the machine count little.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from rayscan.captures.anonymise import Pseudonyms
from rayscan.captures.columns import BATCH, Batch
from rayscan.captures.outside import Outside
from rayscan.captures.scanner_lists import Given, read_list
from rayscan.captures.scanners import Scanners
from rayscan.config import CapturesConfig
from rayscan.schema import TIME

Ints = NDArray[np.int64]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--lists", type=Path, nargs="+", required=True)
    parser.add_argument("--addresses", type=int, default=5_000_000)
    options = parser.parse_args()
    rng, n = np.random.default_rng(0), options.addresses
    listed = [read_list(path.read_bytes(), str(path), Given("benchmark")) for path in options.lists]
    entries = pa.concat_tables([one.entries for one in listed])
    start = time.process_time()
    known = Scanners(entries, 183)
    print(f"{entries.num_rows:,} entries, made ready in {time.process_time() - start:.2f} s")
    lookups(known, rng, n)
    print(f"outside-in filter             {rate(Outside(CapturesConfig()), batch(rng, n), n):14,.0f} flows/s")
    hide = Pseudonyms(bytes(range(32)))
    for distinct in (n // 10, n // 100):
        addresses = rng.integers(0, 2**32, distinct)[rng.integers(0, distinct, n // 10)]
        shown = f"pseudonyms, {len(np.unique(addresses)):,} distinct"
        print(f"{shown:30}{rate(hide, addresses, len(addresses)):14,.0f} addresses/s")


def lookups(known: Scanners, rng: np.random.Generator, n: int) -> None:
    network, length = (known.entries[name].to_numpy().astype(np.int64) for name in ("network", "length"))
    ends = np.unique(np.r_[0, network, network + (1 << (32 - length))])
    days = np.array([(day - date(1970, 1, 1)).days for day in known.entries["valid_from"].to_pylist()])
    for share in (0, 0.01, 0.1, 0.5, 1):
        listed = network[rng.integers(0, len(network), n)]
        addresses = np.where(rng.random(n) < share, listed, rng.integers(0, 2**32, n))
        on = rng.integers(days.min(), days.max() + 1, n)
        dated = rate(lambda pair: known.find(*pair), (addresses, on), n)
        plain = rate(lambda values: np.searchsorted(ends, values, side="right"), addresses, n)
        print(f"{share:4.0%} of addresses on a list   {dated:14,.0f} addresses/s, ", end="")
        print(f"np.searchsorted {plain:14,.0f}, {dated / plain:.1f}x")


def batch(rng: np.random.Generator, n: int) -> Batch:
    columns = {field.name: pa.nulls(n, field.type) for field in BATCH}
    columns |= {name: pa.array(rng.integers(0, 2**32, n)) for name in ("src", "dst")}
    columns |= {"ts": pa.array(np.arange(n), TIME), "proto": pa.array(np.full(n, 6, np.int16))}
    return Batch(pa.table(columns, schema=BATCH), [])


def rate(function: Callable[[Any], Any], argument: Any, n: int, times: int = 3) -> float:
    """Of `n` items, by the best of some tries."""
    found = []
    for _ in range(times):
        start = time.process_time()
        function(argument)
        found.append(time.process_time() - start)
    return n / min(found)


if __name__ == "__main__":
    main()
