"""The report of a large month: size, time to build, time to open and to use in Chromium.

    python -m benchmarks.report [--campaigns 5000] [--sequences 200000] [--out report.html]

A made-up month: sequences of 16 flows in campaigns whose sizes fall off as 1/rank, each campaign with
ports, networks and hours of its own, and unit vectors around a direction of its own. What the campaigns stage
does is made before the clock starts; what the report stage does is timed, part by part: activity, details,
neighbours, drawing the map (once a model), placing everything on it, and the page. CPU time is that of the
process; time in the browser is what the page's own clock says, with WebGL in software where there is no
graphics card.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa

from rayscan import schema
from rayscan.clustering.objective import cluster_sums
from rayscan.evaluation import projection
from rayscan.report import ReportData, activity, details, render, summarise
from rayscan.report.data import CAMPAIGNS, NEAR, PERIODS, POINTS
from rayscan.report.details import nearest
from rayscan.report.summary import usual_port
from tests.browser.chromium import Chromium, find_chromium

T = TypeVar("T")
LENGTH = 16
START_US = 1_709_251_200_000_000  # 2024-03-01
PERIOD = "2024-03"
SAMPLE = 20_000  # as stages/report.py draws the map
DIMENSIONS = 128


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--campaigns", type=int, default=5_000)
    parser.add_argument("--sequences", type=int, default=200_000)
    parser.add_argument("--out", type=Path, default=Path("report.html"))
    options = parser.parse_args()
    rng = np.random.default_rng(0)
    of = planted(rng, options.campaigns, options.sequences)
    sequences, clusters = month(rng, of)
    vectors = directions(rng, of)
    build(sequences, clusters, vectors, options.out)
    use(options.out)


def planted(rng: np.random.Generator, campaigns: int, sequences: int) -> np.ndarray:
    """The campaign of each sequence: two at least, the rest with weight 1/rank."""
    weight = 1 / np.arange(1, campaigns + 1)
    rest = rng.choice(campaigns, sequences - 2 * campaigns, p=weight / weight.sum())
    return np.r_[np.repeat(np.arange(campaigns), 2), rest]


def month(rng: np.random.Generator, of: np.ndarray) -> tuple[pa.Table, pa.Table]:
    n, flows = len(of), len(of) * LENGTH
    offsets = pa.array(np.arange(n + 1) * LENGTH, pa.int32())
    each = np.repeat(of, LENGTH)
    gaps = rng.exponential(60e6 * (1 + each % 50)).astype(np.int64)
    gaps[::LENGTH] = 0
    base = rng.integers(1 << 24, 223 << 24, of.max() + 1)
    src = base[of] + rng.integers(0, 1 << 18, n) // (1 + of % 7)
    start = START_US + rng.integers(0, 27 * 24, n) * 3_600_000_000
    ports = rng.integers(1, 65536, (of.max() + 1, 4))
    lists = {
        "dst": (10 << 24) + rng.integers(0, 1 << 16, flows),
        "dst_port": ports[each, rng.geometric(0.6, flows).clip(1, 4) - 1],
        "proto": np.where(each % 5, 6, 17),
        "gap_us": gaps,
    }
    columns: dict[str, Any] = {field.name: pa.nulls(n, field.type) for field in schema.SEQUENCES}
    columns |= {
        name: pa.ListArray.from_arrays(offsets, pa.array(values, schema.SEQUENCE_LISTS[name]))
        for name, values in lists.items()
    }
    columns |= {
        "sequence_id": np.arange(n),
        "src": src,
        "index": np.zeros(n, np.int32),
        "sequences": np.ones(n, np.int32),
        "length": np.full(n, LENGTH, np.int32),
        "start": pa.array(start, schema.TIME),
        "end": pa.array(start + gaps.reshape(n, LENGTH).sum(axis=1), schema.TIME),
        "label": pa.array(np.char.add("label ", (of % 40).astype(str))),
        **{name: (of % 11 == at).astype(np.float32) for at, name in enumerate(schema.FINGERPRINTS)},
    }
    found = {
        "sequence_id": np.arange(n),
        "src": src,
        "cluster": of,
        "weight_own": rng.uniform(1, 2, n),
        "weight_next": rng.uniform(0, 1, n),
    }
    return pa.table(columns, schema=schema.SEQUENCES), pa.table(found, schema=schema.CLUSTERS)


def directions(rng: np.random.Generator, of: np.ndarray) -> np.ndarray:
    vectors = rng.standard_normal((of.max() + 1, DIMENSIONS), np.float32)[of]
    vectors += 0.8 * rng.standard_normal(vectors.shape, np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors


def build(sequences: pa.Table, clusters: pa.Table, vectors: np.ndarray, out: Path) -> None:
    of, n = clusters["cluster"].to_numpy(), sequences.num_rows
    campaigns = int(of.max()) + 1
    sums, sizes = cluster_sums(vectors, of, campaigns)
    summary = summarise(sequences, clusters, PERIOD)
    rows = [
        {**row, "campaign": f"{PERIOD}-{7919 * (i + 1):x}", "event": "born", "began": row["first"],
         "size": row["sequences"], "absent": 0}
        for i, row in enumerate(summary.to_pylist())
    ]  # fmt: skip
    begun = time.perf_counter(), time.process_time()
    lines = timed("activity", lambda: activity(sequences, clusters, PERIOD, top=campaigns))
    more = timed("details", lambda: details(sequences, clusters, PERIOD, campaigns))
    near = timed("nearest campaigns", lambda: nearest(np.arange(campaigns), sums, sizes))
    sample = np.random.default_rng(1).permutation(n)[:SAMPLE]
    drawn = timed("map: drawn", lambda: projection.draw(vectors[sample], 7))
    places, _ = timed("map: placed", lambda: projection.place(vectors, vectors[sample], drawn))
    points = {
        "x": places[:, 0], "y": places[:, 1], "period": [PERIOD] * n, "cluster": of,
        "src": sequences["src"], "start": sequences["start"], "label": sequences["label"],
        "scanner": pa.nulls(n, pa.string()), "port": usual_port(sequences), "strange": np.zeros(n, bool),
    }  # fmt: skip
    periods = {"period": PERIOD, "flows": n * LENGTH, "sources": n, "sequences": n, "dropped_flows": 0}
    data = ReportData(
        title=f"{campaigns:,} campaigns, {n:,} points",
        generated=datetime(2024, 4, 1, tzinfo=UTC),
        run="benchmark",
        config_yaml="",
        config_hash="",
        versions={},
        captures=schema.CAPTURES.empty_table(),
        rejects=schema.REJECTS.empty_table(),
        periods=pa.Table.from_pylist([periods], PERIODS),
        campaigns=pa.Table.from_pylist(rows, CAMPAIGNS),
        activity=lines,
        details=more,
        near=pa.table(
            {"period": [PERIOD] * campaigns, "cluster": np.arange(campaigns), "near": near}, schema=NEAR
        ),
        points=pa.table(points, schema=POINTS),
        max_clusters=campaigns,
    )
    page = timed("page", lambda: render(data))
    wall, cpu = time.perf_counter() - begun[0], time.process_time() - begun[1]
    print(f"{'all':20}{wall:8.1f} s wall{cpu:8.1f} s CPU")
    out.write_text(page, "utf-8")
    print(f"{out}: {out.stat().st_size / 1e6:.1f} MB")


def timed(name: str, work: Callable[[], T]) -> T:
    wall, cpu = time.perf_counter(), time.process_time()
    result = work()
    print(
        f"{name:20}{time.perf_counter() - wall:8.1f} s wall{time.process_time() - cpu:8.1f} s CPU", flush=True
    )
    return result


USES = {
    "sort by flows": "document.querySelectorAll('#campaign-table thead button')[3].click()",
    "filter by a port": "(() => { const f = document.getElementById('filter'); f.value = '23/tcp';"
    "f.dispatchEvent(new Event('input')); })()",
    "filter by nothing": "(() => { const f = document.getElementById('filter'); f.value = '';"
    "f.dispatchEvent(new Event('input')); })()",
    "open a campaign": "document.querySelector('#campaign-table tbody button').click()",
    "colour by time": "(() => { const s = document.getElementById('colour'); s.value = 'time';"
    "s.dispatchEvent(new Event('change')); })()",
    "zoom, ten frames": "(async () => { for (let i = 0; i < 10; i += 1) {"
    "document.getElementById('map-in').click();"
    "await new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done))); } })()",
}


def use(page: Path) -> None:
    binary = find_chromium()
    if binary is None:
        print("no Chromium: the page was not opened")
        return
    browser = Chromium(binary)
    try:
        browser.view(1360, 1000)
        walls, busy = [], []
        for _ in range(3):
            browser.open(page)
            walls.append(browser.ask("performance.getEntriesByType('navigation')[0].loadEventEnd") / 1000)
            busy.append(browser.busy_s())
        print(f"{'opened, best of 3':20}{min(walls):8.2f} s wall{min(busy):8.2f} s CPU of the page's thread")
        for name, script in USES.items():
            before = browser.busy_s()
            clock = "const t = performance.now()"
            took = browser.ask(
                f"(async () => {{ {clock}; await {script}; return performance.now() - t; }})()"
            )
            print(f"{name:20}{took / 1000:8.2f} s wall{browser.busy_s() - before:8.2f} s CPU")
        print("map by", browser.ask("document.querySelector('.map canvas').dataset.painter"))
        if browser.problems:
            print("problems:", *browser.problems, sep="\n  ")
    finally:
        browser.close()


if __name__ == "__main__":
    main()
