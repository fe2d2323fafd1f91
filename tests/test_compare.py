from __future__ import annotations

import sys
from typing import get_args

import numpy as np
import pyarrow as pa
import pytest
from tables_of_sequences import sequences_of

from rayscan.config import EvaluateConfig, Method, ModelConfig, RunConfig, SplitConfig, TrainConfig
from rayscan.errors import ConfigError
from rayscan.evaluation.splits import TRAIN, UNSEEN_SOURCES, part_of
from rayscan.methods.compare import as_rows, names_of, rate, rated
from rayscan.methods.method import METHODS, Embedded

NEED_GENSIM = ("darkvec", "i-darkvec", "dante", "ip2vec")
SPLIT = SplitConfig(test_sources=0.4, validation_sources=0.1)
CONFIG = EvaluateConfig(bootstrap=20)
RUN = RunConfig(split=SPLIT, evaluate=CONFIG)


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
    found = rate("ports-svd", [table.slice(0, 100), table.slice(100)], 0, RUN)
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
    part = rated(table, Embedded(vectors, covered, none), SPLIT, CONFIG)["parts"]["unseen sources"]
    mine = parts(table) == UNSEEN_SOURCES
    assert part["coverage"] == pytest.approx(covered[mine].mean()) and 0 < part["coverage"] < 1
    assert part["source"]["method"]["auroc"]["value"] == 1 == part["source"]["method"]["r_at_1"]["value"]
    nothing = rated(table, Embedded(vectors, none, none), SPLIT, CONFIG)["parts"]["unseen sources"]
    assert (nothing["coverage"], nothing["source"]) == (0, None)


def test_one_vector_a_source_earns_nothing_for_sources() -> None:
    table = telescope()
    src = table["src"].to_numpy()
    vectors = np.eye(60, dtype=np.float32)[src]
    none, everything = np.zeros(len(src), np.bool_), np.ones(len(src), np.bool_)
    found = rated(table, Embedded(vectors, everything, none), SPLIT, CONFIG, of_sources=True)
    assert all(part["source"] is None for part in found["parts"].values())
    # One inferred sequence among many, as when a sender of training was away: still nothing.
    one = none.copy()
    one[np.flatnonzero(parts(table) == UNSEEN_SOURCES)[0]] = True
    found = rated(table, Embedded(vectors, everything, one), SPLIT, CONFIG, of_sources=True)
    assert all((part["source"] or {}).get("method", {}).get("auroc", {}).get("value") is None
               for part in found["parts"].values())  # fmt: skip
    inferred = rated(table, Embedded(vectors, everything, everything), SPLIT, CONFIG, of_sources=True)
    assert inferred["parts"]["unseen sources"]["source"] is not None
    assert inferred["parts"]["unseen sources"]["inferred"] == 1


def test_rows_are_means_over_seeds_and_the_best_comes_first() -> None:
    def one(
        name: str, auroc: float | None, coverage: float = 0.5, n: int = 9, **more: float
    ) -> dict[str, object]:
        def of(value: float) -> dict[str, object]:
            return {"auroc": {"value": value, "low": value - 0.1, "high": value + 0.1, "n": n}}

        scores = None if auroc is None else {"method": of(auroc), "ports": of(0.3), "random": of(0.5)}
        part = {"coverage": coverage, "source": scores, "label": None}
        return {"method": name, "parts": {"unseen sources": part, "unseen sequences": part}, **more}

    runs = [one("a", 0.6), one("b", None), one("c", 0.9, 1, fit_s=1), one("c", 0.7, 1, fit_s=3, memory_mb=9)]
    rows = as_rows([*runs, one("a", 0.8, transductive=True)])
    names = ["a, transductive", "c", "a", "b", "floor: ports", "floor: random"]
    assert [row["method"] for row in rows] == names
    cell = rows[1]["sources AUROC"]
    assert [cell["value"], cell["low"], cell["high"], cell["ports"]] == pytest.approx([0.8, 0.7, 0.9, 0.3])
    assert cell["seeds"] == [0.9, 0.7] and rows[1]["seeds"] == 2
    assert (rows[1]["fit_s"], rows[1]["memory_mb"], rows[2]["memory_mb"]) == (2, 9, None)
    assert rows[3]["sources AUROC"] is None and rows[1]["labels AUROC"] is None
    assert [row["sources AUROC"]["value"] for row in rows[4:]] == [0.3, 0.5]
    broken = {"method": "d", "seed": 0, "failed": "nobody meets"}
    (*_, last) = as_rows([*runs[:2], broken])
    assert (last["method"], last["seeds"], last["failed"], last["coverage"]) == ("d", 0, "nobody meets", None)
    (few,) = as_rows([one("e", 1.0, n=4)])
    assert few["sources AUROC"] is None
    assert len(as_rows(runs[:2])) == 2  # without a method of full coverage there is no floor to show


def test_names() -> None:
    assert names_of(["all"]) == (["rayscan", *METHODS], [])
    assert names_of(["dante", "rayscan", "port-share"]) == (["rayscan", "port-share", "dante"], [])
    assert get_args(Method) == ("rayscan", *METHODS)  # what train.method may be
    with pytest.raises(ConfigError, match="no method 'dantee'"):
        names_of(["dantee"])


def test_all_is_all_whose_packages_are_there(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("rayscan.methods.words", "rayscan.methods.darkvec"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    for name in ("gensim", "gensim.models"):
        monkeypatch.setitem(sys.modules, name, None)  # as if it were not installed
    found, left_out = names_of(["all"])
    assert found == [name for name in ("rayscan", *METHODS) if name not in NEED_GENSIM]
    assert len(left_out) == len(NEED_GENSIM) and "pip install 'rayscan[methods]'" in left_out[0]
    with pytest.raises(ConfigError, match="dante needs the package gensim"):
        names_of(["dante"])
    with pytest.raises(ConfigError, match="dante needs the package gensim"):
        names_of(["all", "dante"])


def test_training_rows_are_the_only_ones_learnt_from() -> None:
    """Whatever the other sources send, a fitted method stays the same."""
    table = telescope()
    kept = table.filter(pa.array(parts(table) == TRAIN))
    from rayscan.methods.method import method

    of_all = method("port-share").fit("port-share", table, parts(table), 0)
    alone = method("port-share").fit("port-share", kept, np.zeros(kept.num_rows, np.int8), 0)
    for name, values in of_all.arrays.items():
        np.testing.assert_array_equal(values, alone.arrays[name])


def test_transductive_methods_know_every_source() -> None:
    table = telescope(20)
    alone = rate("ip2vec", [table], 0, RUN)["parts"]["unseen sources"]
    everyone = rate("ip2vec", [table], 0, RUN, transductive=True)["parts"]["unseen sources"]
    assert (alone["coverage"], everyone["coverage"]) == (0, 1)
    assert everyone["source"] is None


def test_the_own_encoder_is_trained_with_the_seed_and_rated_alike() -> None:
    model = ModelConfig(d_model=16, layers=1, heads=2, d_ff=16, d_embedding=8, counts=64)
    train = TrainConfig(steps=3, batch_sources=8, warmup_steps=0)
    run = RUN.model_copy(update={"model": model, "train": train})
    one, other = (rate("rayscan", [telescope()], seed, run) for seed in (0, 1))
    assert one["facts"]["settings"]["train"]["seed"] == 0 and one["facts"]["best_step"] == 3
    aurocs = [each["parts"]["unseen sources"]["source"]["method"]["auroc"]["value"] for each in (one, other)]
    assert aurocs[0] != aurocs[1] and min(aurocs) > 0.5
