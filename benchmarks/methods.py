"""What a method of others reaches, and takes, at other settings than its own, on real captures.

The protocol of `rayscan compare` (`methods.compare.rated`) on sequences of 16 flows, with the whole file as
one period. This is for choosing settings, so the sources that comparisons are judged on are left out, and
others take their place. Prints a line of JSON for each list of settings and seed: figures, and CPU seconds.

    python -m benchmarks.methods --data marx --method crossmodal --settings patch=4 patch=8,batch=64

It needs RAYSCAN_DATA, the folder with `flows/NAME.parquet`. One process, one thread, without Ray.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import replace
from typing import Any

import pyarrow as pa
import torch
import yaml

from benchmarks.quality import LENGTH, flows_of
from rayscan.config import EvaluateConfig, SplitConfig
from rayscan.evaluation.splits import part_of
from rayscan.methods import clan, crossmodal
from rayscan.methods.compare import COLUMNS, rated
from rayscan.sequences import build

METHODS = {"clan": clan, "crossmodal": crossmodal}
SPLIT = SplitConfig(seed=7)
EVALUATE = EvaluateConfig(bootstrap=0)


def measure(table: pa.Table, method: str, changes: dict[str, Any], seed: int) -> dict[str, float]:
    module = METHODS[method]
    part = part_of(*(table[name].to_numpy() for name in ("src", "index", "sequences")), SPLIT)
    begun = time.process_time()
    fitted = module.fit_with(table, part, seed, replace(module.Settings(), **changes))
    trained = time.process_time()
    found = fitted.embed(table)
    done = time.process_time()
    parts = rated(table, found, SPLIT, EVALUATE)["parts"]
    figures = {
        name: round(parts[where][kind]["method"][key]["value"], 4)
        for name, (where, kind, key) in COLUMNS.items()
        if parts[where][kind] is not None
    }
    return {"fit_cpu_s": round(trained - begun, 1), "embed_cpu_s": round(done - trained, 1)} | figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default="marx")
    parser.add_argument("--method", choices=METHODS, default="crossmodal")
    parser.add_argument("--settings", nargs="+", default=[""], metavar="KEY=VALUE,...")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    table, _ = build(flows_of(arguments.data, dev=True), LENGTH, LENGTH)
    for text in arguments.settings:
        changes = yaml.safe_load(f"{{{text.replace('=', ': ')}}}")
        for seed in arguments.seeds:
            found = measure(table, arguments.method, changes, seed)
            print(json.dumps({"settings": text, "seed": seed} | found), flush=True)


if __name__ == "__main__":
    main()
