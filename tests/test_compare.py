from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest
from tables_of_sequences import sequences_of

from rayscan.config import EvaluateConfig, SplitConfig
from rayscan.errors import ConfigError
from rayscan.evaluation.splits import TRAIN, UNSEEN_SOURCES, part_of
from rayscan.methods.compare import as_rows, names_of, rate, rated
from rayscan.methods.method import METHODS, Embedded

SPLIT = SplitConfig(test_sources=0.4, validation_sources=0.1)
CONFIG = EvaluateConfig(bootstrap=20)


def telescope(sources: int = 60) -> pa.Table:
    """Sources with four sequences each and three services of their own."""
    rng = np.random.default_rng(0)
    rows, src = [], []
    for source in range(sources):
        ports = rng.integers(1, 400, 3)
        rows += [
            [{"port": int(p), "dst": 1 + k} for k, p in enumerate(rng.choice(ports, 12))] for _ in range(4)
        ]
        src += [source] * 4
    return sequences_of(rows, src=src)


def parts(table: pa.Table) -> np.ndarray:
    return part_of(*(table[name].to_numpy() for name in ("src", "index", "sequences")), SPLIT)


def test_a_method_is_rated_beside_the_port_floor() -> None:
    table = telescope()
    found = rate("ports-svd", table, 0, SPLIT, CONFIG)
    part = found["parts"]["unseen sources"]
    assert part["sequences"] == int((parts(table) == UNSEEN_SOURCES).sum()) and part["coverage"] == 1
    assert part["source"]["method"]["auroc"]["value"] > 0.7 and "ports" in part["source"]
    assert part["label"] is None
    assert found["fit_s"] >= 0 and found["facts"]["name"] == "ports-svd"


def test_what_is_not_covered_is_not_rated() -> None:
    """Half of the sources get the vector of their neighbour, the others are unknown."""
    table = telescope()
    src = table["src"].to_numpy()
    covered = src % 2 == 0
    vectors = np.eye(32, dtype=np.float32)[src // 2 % 32] * covered[:, None]
    none = np.zeros(len(src), np.bool_)
    part = rated("dante", table, Embedded(vectors, covered, none), SPLIT, CONFIG)["parts"]["unseen sources"]
    mine = parts(table) == UNSEEN_SOURCES
    assert part["coverage"] == pytest.approx(covered[mine].mean()) and 0 < part["coverage"] < 1
    assert part["source"]["method"]["auroc"]["value"] == 1 == part["source"]["method"]["r_at_1"]["value"]
    nothing = rated("dante", table, Embedded(vectors, none, none), SPLIT, CONFIG)["parts"]["unseen sources"]
    assert (nothing["coverage"], nothing["source"]) == (0, None)


def test_one_vector_a_source_earns_nothing_for_sources() -> None:
    table = telescope()
    src = table["src"].to_numpy()
    vectors = np.eye(60, dtype=np.float32)[src]
    none, everything = np.zeros(len(src), np.bool_), np.ones(len(src), np.bool_)
    found = rated("darkvec", table, Embedded(vectors, everything, none), SPLIT, CONFIG)
    assert all(part["source"] is None for part in found["parts"].values())
    inferred = rated("darkvec", table, Embedded(vectors, everything, everything), SPLIT, CONFIG)
    assert inferred["parts"]["unseen sources"]["source"] is not None
    assert inferred["parts"]["unseen sources"]["inferred"] == 1


def test_rows_are_means_over_seeds_and_the_best_comes_first() -> None:
    def one(name: str, auroc: float | None, **more: float) -> dict[str, object]:
        scores = None if auroc is None else {"method": {"auroc": {"value": auroc}, "r_at_1": {"value": 0.5}}}
        part = {"coverage": 1.0, "source": scores, "label": None}
        return {"method": name, "parts": {"unseen sources": part, "unseen sequences": part}, **more}

    rows = as_rows(
        [one("a", 0.6), one("b", None), one("c", 0.9, fit_s=1), one("c", 0.7, fit_s=3, memory_mb=9)]
    )
    assert [row["method"] for row in rows] == ["c", "a", "b"]
    assert rows[0]["sources AUROC"] == pytest.approx(0.8) and rows[0]["seeds"] == 2
    assert (rows[0]["fit_s"], rows[0]["memory_mb"], rows[1]["memory_mb"]) == (2, 9, None)
    assert rows[2]["sources AUROC"] is None and rows[0]["labels AUROC"] is None


def test_names() -> None:
    assert names_of(["all"]) == list(METHODS)
    assert names_of(["dante", "port-share"]) == ["port-share", "dante"]
    with pytest.raises(ConfigError, match="no method 'dantee'"):
        names_of(["dantee"])


def test_training_rows_are_the_only_ones_learnt_from() -> None:
    """Whatever the other sources send, a fitted method stays the same."""
    table = telescope()
    kept = table.filter(pa.array(parts(table) == TRAIN))
    from rayscan.methods.method import method

    of_all = method("port-share").fit("port-share", table, parts(table), 0)
    alone = method("port-share").fit("port-share", kept, np.zeros(kept.num_rows, np.int8), 0)
    for name, values in of_all.arrays.items():
        np.testing.assert_array_equal(values, alone.arrays[name])
