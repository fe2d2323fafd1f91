"""How well sequences of one source are told from those of others, by preset, on real captures.

The protocol behind the figures of docs/benchmarks.md: sequences of 16 flows of sources with at least 32, the
whole file as one period; 20 % of the sources are never trained on ("unseen sources"), nor are the last 20 %
of the others' sequences ("unseen sequences"); 300 steps of 128 sources; the last weights are taken. Figures
are of at most 20 sequences a source: AUROC of same-source against different-source pairs, and R@1 (micro:
the mean over sequences whose source has another one). The port floor stands beside them.

    python -m benchmarks.quality --data marx sotm34 --preset default paper [--seeds 0 1 2] [--set KEY=VALUE]

`--dev` is for choosing settings: the test sources are left out altogether, and a quarter of the others takes
their place. It needs RAYSCAN_DATA, the folder with `flows/NAME.parquet`. One process, without Ray.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch

from rayscan import config
from rayscan.config import ModelConfig, RunConfig, SplitConfig
from rayscan.evaluation.blockwise import nearest, pair_statistics, retrieval
from rayscan.evaluation.protocol import sample_rows
from rayscan.evaluation.splits import UNSEEN_SEQUENCES, UNSEEN_SOURCES, part_of
from rayscan.evaluation.tiles import Vectors
from rayscan.keys import uniform
from rayscan.methods.floors import port_vectors
from rayscan.model.embed import embed
from rayscan.model.features import Sequences
from rayscan.model.fit import fit
from rayscan.model.sampling import PairSampler
from rayscan.sequences import build

LENGTH, FEWEST, PER_SOURCE = 16, 32, 20
SPLIT = SplitConfig(test_sources=0.2, validation_sources=0, unseen_sequences=0.2)
DEV_SPLIT = SplitConfig(test_sources=0.25, validation_sources=0, unseen_sequences=0.2, seed=7)
PARTS = {"unseen sequences": UNSEEN_SEQUENCES, "unseen sources": UNSEEN_SOURCES}
NAMES = {"ts": "ts", "src_ip": "src", "dst_ip": "dst", "dst_port": "dst_port", "proto": "proto"}


def sequences_of(name: str, *, dev: bool) -> pa.Table:
    """Sequences of all sources with enough flows; for `dev` without the test sources of SPLIT."""
    file = Path(os.environ["RAYSCAN_DATA"]) / "flows" / f"{name}.parquet"
    flows = pq.read_table(file, columns=list(NAMES)).rename_columns(list(NAMES.values()))
    _, of, flows_of = np.unique(flows["src"].to_numpy(), return_inverse=True, return_counts=True)
    table, _ = build(flows.filter(pa.array(flows_of[of] >= FEWEST)), LENGTH, LENGTH)
    if dev:
        table = table.filter(pa.array(uniform(table["src"].to_numpy(), SPLIT.seed) >= SPLIT.test_sources))
    return table


def figures(vectors: Vectors, src: np.ndarray) -> dict[str, float]:
    found = nearest(vectors, src)
    return {"auroc": pair_statistics(vectors, src).auroc(), "r_at_1": retrieval(found, src)[0]}


def measured(table: pa.Table, split: SplitConfig) -> dict[str, pa.Table]:
    """For each part the sequences that are compared."""
    columns = [table[name].to_numpy() for name in ("src", "index", "sequences")]
    part = part_of(columns[0], columns[1], columns[2], split)
    found = {}
    for name, number in PARTS.items():
        of_part = table.filter(pa.array(part == number))
        ids, src = of_part["sequence_id"].to_numpy(), of_part["src"].to_numpy()
        found[name] = of_part.take(pa.array(sample_rows(ids, src, PER_SOURCE, len(src), 0)))
    few = found["unseen sequences"]
    _, of, count = np.unique(few["src"].to_numpy(), return_inverse=True, return_counts=True)
    return found | {"unseen sequences of two and more": few.filter(pa.array(count[of] > 1))}


def of_parts(parts: dict[str, pa.Table], vectors: Callable[[pa.Table], Vectors]) -> dict[str, float]:
    return {
        f"{name} {figure}": x
        for name, part in parts.items()
        for figure, x in figures(vectors(part), part["src"].to_numpy()).items()
    }


def train_and_measure(
    table: pa.Table, parts: dict[str, pa.Table], split: SplitConfig, run: RunConfig, seed: int
) -> dict[str, float]:
    train = run.train.model_copy(update={"seed": seed})
    sequences = as_arrays(table, run.model)
    begin = time.perf_counter()
    encoder = fit(run.model, train, PairSampler([0], lambda _: sequences, split, train)).encoder
    seconds = time.perf_counter() - begin
    return {"seconds": seconds} | of_parts(
        parts, lambda part: embed(encoder, as_arrays(part, run.model), 4096)
    )


def as_arrays(table: pa.Table, model: ModelConfig) -> Sequences:
    return Sequences.from_table(table, model.inputs)


def say(result: dict[str, float], **about: object) -> None:
    print(json.dumps(about | {name: round(value, 4) for name, value in result.items()}), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", nargs="+", default=["marx", "sg23", "tpot_uqo", "sotm34"])
    parser.add_argument("--preset", nargs="*", default=["default", "paper"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE")
    parser.add_argument("--dev", action="store_true")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    split = DEV_SPLIT if arguments.dev else SPLIT
    sets = ["train.steps=300", "train.batch_sources=128", *arguments.set]
    for data in arguments.data:
        table = sequences_of(data, dev=arguments.dev)
        parts = measured(table, split)
        for name, part in parts.items():
            say({}, data=data, part=name, sequences=len(part), sources=pc.count_distinct(part["src"]).as_py())
        say(of_parts(parts, port_vectors), data=data, method="ports")
        for preset in arguments.preset:
            run = config.load(preset, sets=sets, env={})
            results = []
            for seed in arguments.seeds:
                results.append(train_and_measure(table, parts, split, run, seed))
                say(results[-1], data=data, method=preset, seed=seed)
            mean = {name: float(np.mean([r[name] for r in results])) for name in results[0]}
            say(mean, data=data, method=preset, seeds=len(results))


if __name__ == "__main__":
    main()
