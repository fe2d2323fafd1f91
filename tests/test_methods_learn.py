"""On a simulated telescope, whose campaigns share ports, methods tell more than ports alone do.

Graphs and DarkVec are not among them: a month of so few sources has hardly two senders in the same service
and hour. What they learn is tested on crews that do come together (test_darkvec, test_graph).
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import polars as pl
import pyarrow as pa
import pytest

from rayscan.config import EvaluateConfig, SplitConfig
from rayscan.evaluation.splits import part_of
from rayscan.methods import clan, crossmodal, ports, words
from rayscan.methods.compare import Rated, rated
from rayscan.methods.method import Fitted
from rayscan.sequences import build
from rayscan.simulate import simulate_to

SPLIT = SplitConfig(test_sources=0.4, validation_sources=0.1)
CONFIG = EvaluateConfig(bootstrap=0, min_label_sources=3)
CLAN = replace(clan.Settings(), width=128, steps=60, batch=128, peak_rate=1e-3)
CROSSMODAL = replace(
    crossmodal.Settings(),
    width=32, heads=2, blocks=1, crossings=1, d_out=32, steps=60, batch=32, peak_rate=3e-3,
)  # fmt: skip


@pytest.fixture(scope="module")
def telescope(tmp_path_factory: pytest.TempPathFactory) -> pa.Table:
    """Sequences of a month, labelled by campaign; noise has no label."""
    made = simulate_to(tmp_path_factory.mktemp("telescope"), months=1, sources=300, flows=30_000, seed=1)
    truth = pl.read_parquet(made.truth).filter(pl.col("kind") != "noise")
    flows = pl.concat(pl.read_parquet(file) for file in made.files).drop("label")
    flows = flows.rename({"src_ip": "src", "dst_ip": "dst"}).cast({"src": pl.Int64})
    labelled = flows.join(truth.select("src", label="campaign"), "src", how="left")
    return build(labelled.drop("ip_id", "tcp_seq").to_arrow(), 16, 16)[0]


def learnt(name: str, table: pa.Table) -> Fitted:
    part = part_of(*(table[key].to_numpy() for key in ("src", "index", "sequences")), SPLIT)
    if name == "clan":
        return clan.fit_with(table, part, 0, CLAN)
    if name == "crossmodal":
        return crossmodal.fit_with(table, part, 0, CROSSMODAL)
    return (words if name == "dante" else ports).fit(name, table, part, 0)


@pytest.mark.parametrize(
    ("name", "times"), [("ports-svd", 2), ("clan", 2), ("crossmodal", 2), ("dante", 0.9)]
)
def test_more_than_ports_alone_on_unseen_sources(name: str, times: float, telescope: pa.Table) -> None:
    """The nearest other sequence is of the same source `times` as often; neighbours vote for the campaign."""
    found: Rated = rated(telescope, learnt(name, telescope).embed(telescope), SPLIT, CONFIG)
    part = found["parts"]["unseen sources"]
    assert part["coverage"] > 0.9
    source, label = part["source"], part["label"]
    assert source["method"]["r_at_1"]["value"] > times * source["ports"]["r_at_1"]["value"]
    votes = "knn_macro_f1@5"
    assert label["method"][votes]["value"] > label["ports"][votes]["value"] + 0.03
    assert np.isfinite([found["thresholds"][kind] for kind in ("source", "label")]).all()
