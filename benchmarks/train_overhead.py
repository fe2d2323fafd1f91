"""What Ray Train costs: two CPU workers under it, and two plain torch.distributed processes.

Both sides train the same model on the same workspace with the same loop (`model.fit`), two gloo processes of
one thread each, and write the same checkpoints. Under Ray the first worker also reports every step to the
driver, which writes TensorBoard files. Compared are the seconds of the steps, reading ahead and checkpoints
included, after the first ten; and the whole call, starting processes included, on a Ray that runs already.

    python -m benchmarks.train_overhead [--rounds 5] [--steps 60]

The two sides alternate, so that other load on the machine hits both; the ratio is that of the medians.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import pyarrow.parquet as pq
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from rayscan import config as configuration
from rayscan import planning
from rayscan.config import RunConfig
from rayscan.model.fit import Metrics, TrainState, fit
from rayscan.model.sampling import PairSampler
from rayscan.pipeline import Run
from rayscan.simulate import simulate_to
from rayscan.stages import feeding, train
from rayscan.stages.session import session
from rayscan.tables import Workspace

WARM_UP = 10


def plain(rank: int, workspace: Workspace, config: RunConfig, folder: str) -> None:
    """One of two processes that somebody started by hand."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    buckets = feeding.by_bucket(planning.training_files(workspace, config))
    load = feeding.loader(workspace, config, buckets)
    sampler = PairSampler(tuple(buckets), load, config.split, config.train, rank, 2)

    def keep(state: TrainState | None, _: Metrics) -> None:
        if state is not None:
            Path(folder, "state.safetensors").write_bytes(state.to_bytes())

    result = fit(config.model, config.train, sampler, on_checkpoint=keep)
    if rank == 0:
        Path(folder, "curve.json").write_text(json.dumps(result.metrics))
    dist.destroy_process_group()


def by_hand(workspace: Workspace, config: RunConfig) -> list[float]:
    """sequences/s of each step."""
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(plain, (workspace, config, folder), nprocs=2)
        return [row["sequences_per_s"] for row in json.loads(Path(folder, "curve.json").read_text())]


def under_ray(workspace: Workspace, config: RunConfig) -> list[float]:
    counts = train.run(workspace, config, fresh=True)
    path = Path(workspace.url(f"models/{counts.model}/metrics.parquet"))
    return list(pq.read_table(path)["sequences_per_s"].to_pylist())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=60)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        captures = simulate_to(Path(folder, "telescope"), months=1, sources=1000, flows=120_000).captures
        sets = [
            f"captures.paths={captures}", f"train.steps={options.steps}",
            "train.workers=2", "train.threads=1", "train.checkpoint_every=25",
            "split.validation_sources=0", "resources.local_cpus=4",
        ]  # fmt: skip
        config = configuration.load("quick", sets=sets, env={})
        workspace = Workspace.open(Path(folder, "ws"), config.ingest)
        with session(config.resources):
            Run(workspace, config).execute(("ingest", "sequences"))
            files = planning.training_files(workspace, config)
            compare(workspace, planning.settled(workspace, config, files), options.rounds)


def compare(workspace: Workspace, config: RunConfig, rounds: int) -> None:
    step_ms: dict[str, list[float]] = {"plain": [], "ray": []}
    whole_s: dict[str, list[float]] = {"plain": [], "ray": []}
    for number in range(rounds + 1):
        for name, side in (("plain", by_hand), ("ray", under_ray)):
            began = time.perf_counter()
            speeds = side(workspace, config)[WARM_UP:]
            if number:  # the first round fills caches
                whole_s[name].append(time.perf_counter() - began)
                step_ms[name].append(1000 * statistics.mean(1 / speed for speed in speeds))
    batch = 2 * config.train.batch_sources
    for name in step_ms:
        steps, whole = (statistics.median(x[name]) for x in (step_ms, whole_s))
        spread = f"{batch * min(step_ms[name]):.0f} to {batch * max(step_ms[name]):.0f}"
        print(f"{name:<6} {batch * steps:8.1f} ms a step ({spread}), {whole:6.1f} s in all")
    ratio = statistics.median(step_ms["ray"]) / statistics.median(step_ms["plain"])
    each = sorted(r / p for r, p in zip(step_ms["ray"], step_ms["plain"], strict=True))
    print(f"a step under Ray takes {ratio:.3f} of plain (rounds: {', '.join(f'{x:.3f}' for x in each)})")


if __name__ == "__main__":
    main()
