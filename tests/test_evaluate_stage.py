"""The evaluation on Ray: the same bits as in one process, and what the two protocols leave behind."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner, Result
from tiny import TINY

from rayscan.cli import main
from rayscan.evaluation.blockwise import compare
from rayscan.evaluation.pairs import centres, same_sums
from rayscan.evaluation.tiles import in_threads
from rayscan.methods.floors import random_unit
from rayscan.simulate import simulate_to
from rayscan.stages.evaluate import in_tasks

pytestmark = pytest.mark.ray
SETS = (
    *TINY, "evaluate.bootstrap=10", "split.validation_sources=0.2", "paper.clustered=100",
    "paper.anchors=300", "paper.tsne=40", "evaluate.sweep_sequences=100", "train.periods=2024-01",
    "evaluate.min_label_sources=2",
)  # fmt: skip


def test_tasks_find_what_threads_find(ray_session: None) -> None:
    rng = np.random.default_rng(0)
    vectors, groups, sources = random_unit(4500, 16, 0), rng.integers(0, 90, 4500), rng.integers(0, 500, 4500)
    options = {"exclude": sources, "nearest": True, "k": 3, "block": 1024}
    here, there = (compare(vectors, groups, **options, map=way) for way in (in_threads, in_tasks))
    for a, b in (
        (here.counts, there.counts),
        (here.nearest, there.nearest),
        (here.neighbours, there.neighbours),
    ):
        for x, y in zip(vars(a).values(), vars(b).values(), strict=True):
            np.testing.assert_array_equal(x, y)
    tables = centres()[None]
    for x, y in zip(
        same_sums(vectors, groups, tables, exclude=sources),
        same_sums(vectors, groups, tables, exclude=sources, map=in_tasks),
        strict=True,
    ):
        np.testing.assert_array_equal(x, y)


@pytest.fixture(scope="module")
def arguments(tmp_path_factory: pytest.TempPathFactory, ray_session: None) -> list[str]:
    """A workspace that has been run, as the arguments of further commands."""
    folder = tmp_path_factory.mktemp("evaluated")
    captures = simulate_to(folder / "telescope", months=2, sources=300, flows=24_000, seed=5).captures
    sets = [*SETS, f"captures.paths={captures}"]
    words = ["-w", str(folder / "ws"), "--preset", "quick", *(part for s in sets for part in ("--set", s))]
    assert rayscan("run", *words).exit_code == 0
    return words


def rayscan(*words: str) -> Result:
    return CliRunner().invoke(main, [*words], catch_exceptions=False)


def results(arguments: list[str], name: str) -> Path:
    return Path(arguments[1]) / "runs" / "main" / name


def test_default_protocol(arguments: list[str]) -> None:
    found = json.loads(results(arguments, "evaluation.json").read_text())
    sweep = found["threshold"]["sweep"]
    assert sweep["chosen"] == found["threshold"]["value"] and len(sweep["rows"]) == 100
    assert sweep["part"] == "validation" and 2 <= sweep["sequences"] <= 100
    unseen = found["parts"]["unseen sources"]
    assert 0 <= unseen["calibration"]["error"]["value"] <= 1
    later = found["groups"]["unseen sources, later"]
    assert 0 < later["sequences"] < unseen["sequences"]  # those of February; training saw January
    assert set(found["groups"]) == {"unseen sources, later", "unseen sources, new networks"}


def test_paper_protocol(arguments: list[str]) -> None:
    assert "paper" in rayscan("evaluate", "--protocol", "paper", *arguments, "--dry-run").stdout
    done = rayscan("evaluate", "--protocol", "paper", *arguments)
    assert done.exit_code == 0 and "unseen sources, similarity by source" in done.stderr
    found = json.loads(results(arguments, "evaluation-paper.json").read_text())
    for name in ("training", "unseen sequences", "unseen sources", "validation"):
        clusters = found["parts"][name]["clusters"]
        assert clusters["sequences"] <= 100 and len(clusters["rows"]) == 100
    table = pq.read_table(Path(arguments[1]) / found["tsne"]["unseen sources"])
    assert table.column_names == ["sequence_id", "src", "label", "x", "y"] and 10 < table.num_rows <= 40
    assert rayscan("evaluate", "--protocol", "paper", *arguments).exit_code == 4
    again = rayscan("evaluate", "--protocol", "paper", *arguments, "--set", "paper.solver=moves")
    assert again.exit_code == 0
    better = json.loads(results(arguments, "evaluation-paper.json").read_text())
    studies = [one["parts"]["unseen sources"]["by_source"] for one in (found, better)]
    assert studies[0] == studies[1]


def test_seeds(arguments: list[str]) -> None:
    done = rayscan("evaluate", "--seeds", "2", *arguments, "--json")
    assert done.exit_code == 0
    rows = {(row["part"], row["by"]): row for row in json.loads(done.stdout)}
    assert rows["unseen sources", "source"]["auroc"]["n"] == 2
    assert rows["unseen sources", "source"]["auroc"]["deviation"] > 0
    assert json.loads(results(arguments, "evaluation-seeds.json").read_text())["seeds"] == [0, 1]
    refused = rayscan("evaluate", "--seeds", "2", "--protocol", "paper", *arguments)
    assert refused.exit_code == 2 and "--seeds" in refused.stderr
