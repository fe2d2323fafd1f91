"""How well sequences of one source are told from those of others, by preset, on real captures.

The protocol behind the figures of docs/benchmarks.md. Of sources with at least 32 flows, the whole file as
one period, 20 % are never trained on ("unseen sources"); nor is the last fifth of the flows of the others, as
the paper splits ("unseen sequences"). Sequences are full windows of 16 flows, cut in each part by itself. 300
steps of 128 sources; the last weights are taken. Figures are of at most 20 sequences a source: AUROC of
same-source against different-source pairs, and R@1 (micro: the mean over sequences whose source has another
one). The port floor stands beside them.

How hard unseen sequences are hangs on what is cut from that last fifth: full windows leave larger sources.
So a harder reading stands beside it: windows of 8 flows and more, of sources that have two.

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
from rayscan.evaluation.parts import sample_rows
from rayscan.evaluation.tiles import Vectors
from rayscan.keys import uniform
from rayscan.methods.floors import port_vectors
from rayscan.model.embed import embed
from rayscan.model.features import Sequences
from rayscan.model.fit import fit
from rayscan.model.sampling import PairSampler
from rayscan.sequences import build

LENGTH, SHORT, FEWEST, PER_SOURCE = 16, 8, 32, 20
TEST, DEV = (42, 0.2), (7, 0.25)  # seed and share of the sources that are kept back
EVERYTHING = SplitConfig(test_sources=0, validation_sources=0, unseen_sequences=0)
NAMES = {"ts": "ts", "src_ip": "src", "dst_ip": "dst", "dst_port": "dst_port", "proto": "proto"}
NAMES |= {"src_port": "src_port"}  # an input on demand


def flows_of(name: str, *, dev: bool) -> pa.Table:
    """Flows of all sources with enough of them, by source and time; for `dev` without the test sources."""
    file = Path(os.environ["RAYSCAN_DATA"]) / "flows" / f"{name}.parquet"
    there = [name for name in NAMES if name in pq.read_schema(file).names]
    flows = pq.read_table(file, columns=there).rename_columns([NAMES[name] for name in there])
    _, of, flows_of = np.unique(flows["src"].to_numpy(), return_inverse=True, return_counts=True)
    kept = flows.filter(pa.array(flows_of[of] >= FEWEST))
    if dev:
        kept = kept.filter(pa.array(uniform(kept["src"].to_numpy(), TEST[0]) >= TEST[1]))
    return kept.take(pa.array(np.lexsort((kept["ts"].to_numpy(), kept["src"].to_numpy()))))


def tables_of(name: str, *, dev: bool) -> tuple[pa.Table, dict[str, pa.Table]]:
    """Sequences to train on, and of each part those that are compared."""
    flows = flows_of(name, dev=dev)
    src = flows["src"].to_numpy()
    seed, share = DEV if dev else TEST
    unseen = uniform(src, seed) < share
    _, first, of, count = np.unique(src, return_index=True, return_inverse=True, return_counts=True)
    late = np.arange(len(src)) - first[of] >= np.floor(0.8 * count)[of]

    def cut(rows: np.ndarray, shortest: int) -> pa.Table:
        return build(flows.filter(pa.array(rows)), LENGTH, shortest)[0]

    few = sampled(cut(~unseen & late, SHORT))
    _, of, count = np.unique(few["src"].to_numpy(), return_inverse=True, return_counts=True)
    return cut(~unseen & ~late, LENGTH), {
        "unseen sources": sampled(cut(unseen, LENGTH)),
        "unseen sequences": sampled(cut(~unseen & late, LENGTH)),
        "unseen sequences, short ones too": few.filter(pa.array(count[of] > 1)),
    }


def sampled(table: pa.Table) -> pa.Table:
    ids, src = table["sequence_id"].to_numpy(), table["src"].to_numpy()
    return table.take(pa.array(sample_rows(ids, src, PER_SOURCE, len(src), 0)))


def figures(vectors: Vectors, src: np.ndarray) -> dict[str, float]:
    found = nearest(vectors, src)
    return {"auroc": pair_statistics(vectors, src).auroc(), "r_at_1": retrieval(found, src)[0]}


def of_parts(parts: dict[str, pa.Table], vectors: Callable[[pa.Table], Vectors]) -> dict[str, float]:
    return {
        f"{name} {figure}": x
        for name, part in parts.items()
        for figure, x in figures(vectors(part), part["src"].to_numpy()).items()
    }


def train_and_measure(
    table: pa.Table, parts: dict[str, pa.Table], run: RunConfig, seed: int
) -> dict[str, float]:
    train = run.train.model_copy(update={"seed": seed})
    model = run.model.settled(lambda name: table[name].null_count == 0)
    sequences = as_arrays(table, model)
    begin = time.process_time()
    encoder = fit(model, train, PairSampler([0], lambda _: sequences, EVERYTHING, train)).encoder
    seconds = time.process_time() - begin
    return {"cpu_s": seconds} | of_parts(parts, lambda part: embed(encoder, as_arrays(part, model), 4096))


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
    sets = ["train.steps=300", "train.batch_sources=128", *arguments.set]
    for data in arguments.data:
        table, parts = tables_of(data, dev=arguments.dev)
        for name, part in parts.items():
            say({}, data=data, part=name, sequences=len(part), sources=pc.count_distinct(part["src"]).as_py())
        say(of_parts(parts, port_vectors), data=data, method="ports")
        for preset in arguments.preset:
            run = config.load(preset, sets=sets, env={})
            results = []
            for seed in arguments.seeds:
                results.append(train_and_measure(table, parts, run, seed))
                say(results[-1], data=data, method=preset, seed=seed)
            mean = {name: float(np.mean([r[name] for r in results])) for name in results[0]}
            say(mean, data=data, method=preset, seeds=len(results))


if __name__ == "__main__":
    main()
