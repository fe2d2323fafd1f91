"""What each stage costs as flows grow: `python -m benchmarks.scale [--flows 500000] [--times 1,2,4,8]`.

Simulated telescopes of one month with as many times the flows and the sources are run through all stages, in
one Ray. A stage's cost is the CPU time of the driver, of Ray and of all its workers while the stage runs, so
other load on the machine does not count. The model is trained once, for a few steps: its quality does not
matter here, its size does. Slopes are of a line through the logarithms of flows and CPU time: 1 is linear.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np

from rayscan import config as configuration
from rayscan import models
from rayscan.config import ResourcesConfig, RunConfig
from rayscan.pipeline import Run
from rayscan.planning import STAGES
from rayscan.simulate import simulate_to
from rayscan.stages.session import session
from rayscan.tables import Workspace


class Meter:
    """CPU time of this process and everything below it: what a process had when it was last seen counts."""

    def __init__(self) -> None:
        self.seen: dict[str, int] = {}
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        while True:
            self.look()
            time.sleep(0.5)

    def look(self) -> None:
        parents, ticks = {}, {}
        for stat in Path("/proc").glob("[0-9]*/stat"):
            with contextlib.suppress(OSError):
                fields = stat.read_text().rpartition(")")[2].split()
                one = stat.parent.name
                parents[one], ticks[one] = fields[1], (f"{one} {fields[19]}", sum(map(int, fields[11:13])))
        found = {str(os.getpid())}
        while more := {one for one, parent in parents.items() if parent in found} - found:
            found |= more
        self.seen.update(ticks[one] for one in found)

    def seconds(self) -> float:
        self.look()
        return sum(list(self.seen.values())) / os.sysconf("SC_CLK_TCK")


def settings(captures: Path, model: str | None) -> RunConfig:
    sets = [
        f"captures.paths={captures}",
        "train.steps=30",
        "evaluate.bootstrap=20",
        "evaluate.max_sequences=4000",
    ]
    sets += ["train.trackers=[]"]
    return configuration.load("quick", None, sets + ([f"embed.model={model}"] if model else []), {})


def measure(
    meter: Meter, folder: Path, flows: int, model: Path | None
) -> tuple[dict[str, float], dict[str, Any], Path]:
    """CPU seconds of each stage on so many flows; counts; and the folder of the model that was used."""
    captures = simulate_to(folder / "telescope", months=1, sources=flows // 100, flows=flows, seed=1).captures
    workspace = Workspace.open(folder / "ws", settings(captures, None).ingest)
    name = None
    if model is not None:
        found = models.named(workspace, str(model))
        models.bring_in(workspace, found)
        name = found.model.id
    config = settings(captures, name)
    seconds, counts = {}, {}
    for stage in STAGES:
        before = meter.seconds()
        counts |= Run(workspace, config).execute((stage,)).stages
        seconds[stage] = meter.seconds() - before
    for table in ("flows", "sequences", "embeddings", "clusters", "campaigns"):
        files = workspace.table(table).files()
        counts[table] = {"rows": sum(f.rows for f in files), "bytes": sum(f.bytes for f in files)}
    (used,) = (folder / "ws" / "models").iterdir()
    return seconds, counts, used


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--flows", type=int, default=500_000)
    parser.add_argument("--times", default="1,2,4,8")
    options = parser.parse_args()
    sizes = [options.flows * int(times) for times in options.times.split(",")]
    found, counted, model, meter = [], [], None, Meter()
    with tempfile.TemporaryDirectory() as folder, session(ResourcesConfig()):
        measure(meter, Path(folder) / "warm-up", sizes[0] // 4, None)  # compiles, loads, starts workers
        for flows in sizes:
            seconds, counts, model = measure(meter, Path(folder) / str(flows), flows, model)
            found.append(seconds)
            counted.append(counts)
            print(
                json.dumps({"flows": flows, "cpu_s": {k: round(v, 1) for k, v in seconds.items()}}),
                flush=True,
            )
    print("stage        " + "".join(f"{flows:>12,}" for flows in sizes) + "   slope")
    for stage in STAGES:
        times = [seconds[stage] for seconds in found]
        slope = np.polyfit(np.log(sizes), np.log(times), 1)[0] if stage != "train" else float("nan")
        print(f"{stage:12} " + "".join(f"{time:12.1f}" for time in times) + f"   {slope:5.2f}")
    sequences = [counts["embed"]["embeddings"] for counts in counted]
    clusters = [counts["cluster"]["clusters"] for counts in counted]
    print("sequences    " + "".join(f"{n:>12,}" for n in sequences))
    for table in ("flows", "sequences", "embeddings", "clusters", "campaigns"):
        rows, size = counted[-1][table].values()
        print(f"{table}: {rows:,} rows of {size / rows:.1f} bytes in {sizes[-1]:,} flows")
    print("clusters     " + "".join(f"{n:>12,}" for n in clusters))


if __name__ == "__main__":
    main()
