"""Methods of others in the encoder's place, compared on one table, and by protocols of their own."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner, Result

from rayscan import planning
from rayscan.cli import main
from rayscan.config import load
from rayscan.evaluation.splits import TRAIN, part_of
from rayscan.lease import lease
from rayscan.simulate import simulate_to
from rayscan.tables import Workspace

pytestmark = pytest.mark.ray
SETS = ["ingest.n_buckets=2", "evaluate.bootstrap=20", "sequences.length=16", "sequences.min_length=16"]
OPTIONS = [part for item in SETS for part in ("--set", item)]
CONFIG = load(sets=SETS, env={})


def rayscan(*words: object) -> Result:
    return CliRunner().invoke(main, [str(word) for word in words])


def of_method(name: str, *more: str) -> list[str]:
    return [*OPTIONS, "--method", name, "--set", f"run={name}", *(p for s in more for p in ("--set", s))]


def read(workspace: Path, table: str, **where: str) -> pl.DataFrame:
    return pl.from_arrow(Workspace.open(str(workspace)).table(table).read(where))  # type: ignore[return-value]


@pytest.fixture(scope="module")
def captures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two months, labelled by the campaign of each source."""
    made = simulate_to(tmp_path_factory.mktemp("telescope"), months=2, sources=200, flows=20_000, seed=3)
    truth = pl.read_parquet(made.truth).filter(pl.col("kind") != "noise")
    labels = truth.select(pl.col("src").cast(pl.UInt32).alias("src_ip"), label="campaign")
    for file in made.files:
        flows = pl.read_parquet(file).drop("label")
        pq.write_table(flows.join(labels, "src_ip", how="left").to_arrow(), file)
    return made.captures


@pytest.fixture
def workspace(tmp_path: Path, sequenced: Path) -> Path:
    """With sequences and nothing more."""
    return Path(shutil.copytree(sequenced, tmp_path / "ws"))


@pytest.fixture(scope="module")
def sequenced(tmp_path_factory: pytest.TempPathFactory, captures: Path, ray_session: None) -> Path:
    place = tmp_path_factory.mktemp("sequenced") / "ws"
    for words in (["ingest", captures], ["sequences"]):
        assert rayscan(*words, "-w", place, *OPTIONS).exit_code == 0
    return place


def test_a_method_takes_the_encoders_place(workspace: Path) -> None:
    """From training to the evaluation; once more there is nothing to do, and a copy elsewhere is as good."""
    for stage in ("train", "embed", "cluster", "evaluate"):
        done = rayscan(stage, "-w", workspace, *of_method("ports-svd"), "--json")
        assert done.exit_code == 0, done.stderr
        assert rayscan(stage, "-w", workspace, *of_method("ports-svd")).exit_code == 4
    sequences = read(workspace, "sequences")
    for table in ("embeddings", "clusters"):
        assert set(read(workspace, table)["sequence_id"]) == set(sequences["sequence_id"])
    evaluation = json.loads((workspace / "runs/ports-svd/evaluation.json").read_text())
    assert evaluation["parts"]["unseen sources"]["methods"]["model"]["auroc"]["value"] > 0.5
    model = evaluation["model"]
    folder = workspace / "models" / model
    assert "`ports-svd`" in (folder / "README.md").read_text()

    shutil.move(folder, workspace.parent / "elsewhere")
    again = rayscan("embed", "-w", workspace, *OPTIONS, "--model", workspace.parent / "elsewhere")
    assert again.exit_code == 0, again.stderr
    weights = json.loads((workspace.parent / "elsewhere" / "config.json").read_text())["weights"]
    first, second = (
        read(workspace, "embeddings", model=name).sort("sequence_id") for name in (model, weights[:16])
    )
    assert first["vector"].to_list() == second["vector"].to_list()


def test_sources_that_a_method_does_not_know_have_no_vector(workspace: Path) -> None:
    assert rayscan("train", "-w", workspace, *of_method("ip2vec")).exit_code == 0
    done = rayscan("embed", "-w", workspace, *of_method("ip2vec"), "--json")
    counts = json.loads(done.stdout)["stages"]["embed"]
    assert counts["not_covered"] > 0 and counts["inferred"] == 0
    assert f"{counts['not_covered']:,} sequences have no vector: ip2vec does not know them" in done.stderr
    assert counts["embeddings"] + counts["not_covered"] == read(workspace, "sequences").height
    done = rayscan("run", "-w", workspace, *of_method("ip2vec"), "--json")
    assert done.exit_code == 1 and "ip2vec has one vector for all of them: give a number" in done.stderr
    done = rayscan("run", "-w", workspace, *of_method("ip2vec", "cluster.threshold=0.5"), "--json")
    assert done.exit_code == 0, done.stderr
    sequences = read(workspace, "sequences")
    part = part_of(*(sequences[key].to_numpy() for key in ("src", "index", "sequences")), CONFIG.split)
    trained = set(sequences.filter(pl.Series(part == TRAIN))["src"])
    known = sequences.filter(pl.col("src").is_in(trained))
    embedded = read(workspace, "embeddings")
    assert set(embedded["sequence_id"]) == set(known["sequence_id"]) and embedded.height < sequences.height
    assert set(read(workspace, "clusters")["sequence_id"]) == set(known["sequence_id"])
    report = (workspace / "runs/ip2vec/report.html").read_text()
    assert "<title>" in report
    evaluation = json.loads((workspace / "runs/ip2vec/evaluation.json").read_text())
    unseen, seen = (evaluation["parts"][name] for name in ("unseen sources", "unseen sequences"))
    assert unseen["covered"] == 0 < unseen["available"]["sequences"]
    assert seen["covered"] == seen["available"]["sequences"] and "model" not in seen["methods"]
    why = {item["what"]: item["why"] for item in evaluation["not_computed"]}
    one = "ip2vec has one vector for all sequences of a source"
    assert why["unseen sequences / model by source"] == one
    assert why["other thresholds"] == "fewer than two sequences of validation sources"
    assert evaluation["threshold"]["sweep"] is None
    periods = evaluation["clusters"]["periods"]
    assert periods and all(why[f"clusters / {period} / by_source"] == one for period in periods)
    assert all(found["by_source"] is None for found in periods.values())


def test_the_papers_protocol_gives_one_vector_a_source_no_credit(workspace: Path) -> None:
    """And says again what it found when there is nothing to do."""
    settings = of_method("ip2vec", "cluster.threshold=0.5", "paper.solver=moves")
    assert rayscan("train", "-w", workspace, *settings).exit_code == 0
    assert rayscan("embed", "-w", workspace, *settings).exit_code == 0
    done = rayscan("evaluate", "--protocol", "paper", "-w", workspace, *settings)
    assert done.exit_code == 0, done.stderr
    found = json.loads((workspace / "runs/ip2vec/evaluation-paper.json").read_text())
    seen = found["parts"]["unseen sequences"]
    assert seen["by_source"] is None and seen["by_label"] is not None
    assert seen["clusters"]["at_chosen"]["by_source"] is None is found["chosen"]["by_source"]
    assert all(row["by_source"] is None for row in seen["clusters"]["rows"])
    again = rayscan("evaluate", "--protocol", "paper", "-w", workspace, *settings)
    assert again.exit_code == 4
    shown = [line for line in done.stderr.splitlines() if line.startswith(("unseen", "not computed"))]
    assert shown and all(line in again.stderr for line in shown)


def test_what_changes_in_a_period_makes_all_of_it_due(workspace: Path, tmp_path: Path) -> None:
    """For vectors may depend on what else the period holds."""
    rayscan("train", "-w", workspace, *of_method("port-share"))
    rayscan("embed", "-w", workspace, *of_method("port-share"))
    config = load(sets=[*SETS, "train.method=port-share"], env={})
    opened = Workspace.open(str(workspace))
    model = planning.find_model(opened, config)
    assert model is not None and model.method == "port-share"
    flows = read(workspace, "flows").sort("ts").head(200)
    one = flows.select("ts", "dst", "dst_port", "proto", src=pl.lit(3_000_000_000)).to_arrow()
    pq.write_table(one, tmp_path / "one.parquet")
    for words in (["ingest", tmp_path / "one.parquet"], ["sequences"]):
        assert rayscan(*words, "-w", workspace, *OPTIONS).exit_code == 0
    units = planning.embed_units(opened, model)
    assert {unit.key["period"]: unit.state for unit in units} == {"2024-01": "stale", "2024-02": "done"}
    assert [unit.state for unit in units].count("stale") == 2  # both buckets
    again = rayscan("embed", "-w", workspace, *of_method("port-share"), "--json")
    assert json.loads(again.stdout)["stages"]["embed"]["units"] == 2


def test_training_goes_on_from_encoders_alone(workspace: Path) -> None:
    model = json.loads(rayscan("train", "-w", workspace, *of_method("port-share"), "--json").stdout)
    name = model["stages"]["train"]["model"]
    from_method = rayscan("train", "-w", workspace, *OPTIONS, "--from", name)
    assert from_method.exit_code == 1 and "of the method port-share" in from_method.stderr
    from_any = rayscan("train", "-w", workspace, *of_method("clan", f"train.start={name}"))
    assert from_any.exit_code == 2 and "train.method is clan" in from_any.stderr
    sweep = rayscan("tune", "-w", workspace, *OPTIONS, "--set", "train.method=clan")
    assert sweep.exit_code == 2 and "train.method is clan" in sweep.stderr


def test_one_table_of_all_that_was_asked_for(workspace: Path) -> None:
    words = ["compare", "-w", workspace, *OPTIONS, "--methods", "port-share,ip2vec", "--seeds", "1"]
    for stage in ("train", "embed"):
        rayscan(stage, "-w", workspace, *OPTIONS, "--method", "port-share")
    done = rayscan(*words, "--transductive", "--json", "--set", "train.method=port-share")
    assert done.exit_code == 0, done.stderr
    rows = {row["method"]: row for row in json.loads(done.stdout)["table"]}
    (model,) = (name for name in rows if name.startswith("model "))
    floors = {"floor: ports", "floor: random"}
    assert set(rows) == {"port-share", "ip2vec", "ip2vec, transductive", model} | floors
    assert rows["port-share"]["sources AUROC"]["value"] > rows["floor: random"]["sources AUROC"]["value"]
    assert rows["port-share"]["sources AUROC"] == rows[model]["sources AUROC"]  # as `embed` has made them
    assert rows["port-share"]["memory_mb"] > 100 and rows[model]["memory_mb"] is None
    assert (rows["ip2vec"]["coverage"], rows["ip2vec, transductive"]["coverage"]) == (0, 1)
    page = workspace / "runs/main/compare/comparison.html"
    assert str(page) in done.stderr and "ip2vec, transductive" in page.read_text()
    stored = json.loads((workspace / "runs/main/comparison.json").read_text())
    assert stored["rows"] == json.loads(done.stdout)["table"]

    files = sorted((workspace / "runs/main/compare").glob("*.json"))
    written = {file: file.stat().st_mtime_ns for file in files}
    table = rayscan(*words)  # without the second half; nothing is computed again
    assert table.exit_code == 0 and "port-share" in table.stdout and "transductive" not in table.stdout
    assert written == {file: file.stat().st_mtime_ns for file in files}
    rayscan(*words, "--set", "evaluate.bootstrap=21")
    changed = {file.name for file in files if file.stat().st_mtime_ns != written[file]}
    assert changed == {"port-share-0.json", "ip2vec-0.json"}
    with lease(Workspace.open(workspace), "compare-main"):
        busy = rayscan(*words)
    assert busy.exit_code == 4 and "compare-main" in busy.stderr
    wrong = rayscan(*words, "--period", "1999-01")
    assert wrong.exit_code == 1 and "there are no sequences of 1999-01" in wrong.stderr


def test_graphs_day_by_day(workspace: Path) -> None:
    words = ["graphs", "-w", workspace, *OPTIONS, "--methods", "i-gcn", "--seeds", "1", "--first", "50"]
    found = json.loads(rayscan(*words, "--json").stdout)
    days: list[dict[str, Any]] = found[0]["days"]
    assert found[0]["method"] == "i-gcn" and days[0]["day"] > "2024-02-18" and len(days) > 5
    assert all(0 <= day["macro_f1"] <= 1 for day in days if day["macro_f1"] is not None)
    scored = [day["ports"] for day in days if day["ports"] is not None]
    assert found[0]["ports"] == (pytest.approx(np.mean(scored)) if scored else None)
    wrong = rayscan("graphs", "-w", workspace, "--methods", "clan")
    assert wrong.exit_code == 2 and "'clan' is no graph method" in wrong.stderr
