"""The whole way as a user goes it: once, again, with other settings, with more captures, and on S3."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import uuid
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import servers
from click.testing import CliRunner, Result
from tiny import KEYS, TINY

from rayscan.cli import main
from rayscan.config import IngestConfig, load
from rayscan.lease import holders, lease
from rayscan.pipeline import Run
from rayscan.planning import Unit, model_id, sweep_id
from rayscan.simulate import simulate_to
from rayscan.tables import Workspace

SMALL = (*TINY, "model.dropout=0.0", "train.checkpoint_every=4", "evaluate.bootstrap=20")
STAGES = ["ingest", "sequences", "train", "embed", "cluster", "campaigns", "evaluate", "report"]


def arguments(workspace: Path, captures: Path, *more: str) -> list[str]:
    sets = [*SMALL, f"captures.paths={captures}", *more]
    return ["-w", str(workspace), "--preset", "quick", *(part for s in sets for part in ("--set", s))]


def rayscan(*words: str) -> Result:
    return CliRunner().invoke(main, [*words], catch_exceptions=False)


def run(workspace: Path, captures: Path, *more: str) -> tuple[int, dict[str, Any]]:
    """Exit code, and the stages that did something."""
    result = rayscan("run", *arguments(workspace, captures, *more), "--json")
    return result.exit_code, json.loads(result.stdout)["stages"]


@pytest.fixture(scope="module")
def captures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("telescope")
    return simulate_to(folder, months=2, sources=300, flows=24_000, seed=5).captures


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, captures: Path, ray_session: None) -> Path:
    """A workspace in which everything has been done once."""
    workspace = tmp_path_factory.mktemp("finished") / "ws"
    code, stages = run(workspace, captures)
    assert code == 0
    assert list(stages) == STAGES
    return workspace


def table(workspace: Path, name: str) -> pl.DataFrame:
    return pl.from_arrow(Workspace.open(workspace).table(name).read())  # type: ignore[return-value]


def test_what_a_run_leaves_behind(finished: Path, captures: Path) -> None:
    flows, sequences = table(finished, "flows"), table(finished, "sequences")
    embeddings, clusters = table(finished, "embeddings"), table(finished, "clusters")
    assert flows.height == 24_000
    assert sequences["sequence_id"].is_unique().all()
    for other in (embeddings, clusters):
        assert set(other["sequence_id"]) == set(sequences["sequence_id"])
        assert other.height == sequences.height
    lengths = np.linalg.norm(np.array(embeddings["vector"].to_list()), axis=1)
    assert np.allclose(lengths, 1, atol=1e-5)
    for (_,), part in clusters.group_by("period"):
        assert set(part["cluster"]) == set(range(part["cluster"].n_unique()))
    outcome = json.loads((finished / "runs" / "main" / "run.json").read_text())
    assert outcome["status"] == "done"
    assert outcome["stages"]["ingest"]["flows"] == 24_000
    page = (finished / "runs" / "main" / "report.html").read_text()
    assert "24,000" in page
    evaluation = json.loads((finished / "runs" / "main" / "evaluation.json").read_text())
    assert evaluation["parts"]["unseen sources"]["methods"]["model"]["auroc"]["value"] > 0.5


def test_cluster_weights_are_those_of_the_definition(finished: Path) -> None:
    evaluation = json.loads((finished / "runs" / "main" / "evaluation.json").read_text())
    theta = evaluation["threshold"]["value"]
    joined = table(finished, "clusters").join(
        table(finished, "embeddings").select("sequence_id", "vector"), on="sequence_id"
    )
    period = joined.filter(pl.col("period") == joined["period"].min())
    vectors = np.array(period["vector"].to_list())
    labels = period["cluster"].to_numpy()
    weight = vectors @ vectors.T - theta
    np.fill_diagonal(weight, 0)
    to_cluster = np.stack([weight[:, labels == c].sum(axis=1) for c in range(labels.max() + 1)], axis=1)
    rows = np.arange(len(labels))
    own = to_cluster[rows, labels].copy()
    assert np.allclose(own, period["weight_own"].to_numpy(), atol=1e-4)
    to_cluster[rows, labels] = -np.inf
    assert np.allclose(to_cluster.max(axis=1), period["weight_next"].to_numpy(), atol=1e-4)


def test_a_second_run_does_nothing_and_says_so(finished: Path, captures: Path) -> None:
    result = rayscan("run", *arguments(finished, captures))
    assert result.exit_code == 4
    assert "nothing to do: everything in" in result.stderr
    assert result.stdout.strip().endswith("report.html")
    status = json.loads(rayscan("status", *arguments(finished, captures), "--json").stdout)["stages"]
    assert {row["stage"] for row in status} == set(STAGES)
    assert all(row["done"] and not row["due"] and not row["stale"] for row in status)
    code, _ = run(finished, captures, "train.workers=2", "resources.local_cpus=8", "embed.batch_tokens=512")
    assert code == 4


def test_status_alone_asks_about_the_last_run(copy: Path, captures: Path) -> None:
    assert run(copy, captures, "report.title=Once more")[0] == 0
    rows = json.loads(rayscan("status", "-w", str(copy), "--json").stdout)["stages"]
    assert {row["stage"] for row in rows} == set(STAGES)
    assert all(row["done"] and not row["due"] and not row["stale"] for row in rows)
    other = json.loads(rayscan("status", "-w", str(copy), "--preset", "quick", "--json").stdout)["stages"]
    assert any(row["due"] for row in other)


def test_dry_run_tells_what_is_due_and_changes_nothing(finished: Path, captures: Path) -> None:
    for setting, sequences in (("train.seed=7", 0), ("sequences.length=24", 4)):
        result = rayscan("run", *arguments(finished, captures, setting), "--dry-run", "--json")
        due: Counter[str] = Counter()
        for row in json.loads(result.stdout):
            due[row["stage"]] += row["due"] + row["stale"]
        assert due == {"ingest": 0, "sequences": sequences, "train": 1}
    result = rayscan("run", *arguments(finished, captures, "cluster.threshold=0.3"), "--dry-run", "--json")
    rows = {(row["stage"], row["period"]): row for row in json.loads(result.stdout)}
    assert rows["cluster", "2024-01"]["stale"] == 1
    assert rows["embed", "2024-01"]["stale"] == 0
    assert run(finished, captures)[0] == 4


@pytest.fixture
def copy(finished: Path, tmp_path: Path) -> Path:
    """A finished workspace of one's own; tables do not know where they lie."""
    subprocess.run(["cp", "-r", str(finished), str(tmp_path / "ws")], check=True)
    return tmp_path / "ws"


@pytest.mark.parametrize(
    ("setting", "redone"),
    [
        ("report.title=Other", ["report"]),
        ("evaluate.bootstrap=5", ["evaluate", "report"]),
        ("campaigns.remember=1", ["campaigns", "report"]),
        ("cluster.threshold=0.35", STAGES[4:]),
    ],
)
def test_a_setting_redoes_what_depends_on_it(
    copy: Path, captures: Path, setting: str, redone: list[str]
) -> None:
    code, stages = run(copy, captures, setting)
    assert code == 0
    assert list(stages) == redone
    assert run(copy, captures, setting)[0] == 4


def test_a_report_follows_the_evaluation_that_is_there(copy: Path, captures: Path) -> None:
    """Whether it was evaluated before or after: what the page shows is what there is."""
    place = copy / "runs" / "main"
    for name in ("evaluation.json", "report.html", "report.json"):
        (place / name).unlink()
    words = arguments(copy, captures)
    assert rayscan("report", *words).exit_code == 0
    assert "Nothing was evaluated" in (place / "report.html").read_text()
    assert rayscan("report", *words).exit_code == 4
    assert rayscan("evaluate", *words).exit_code == 0
    assert rayscan("report", *words).exit_code == 0
    page = (place / "report.html").read_text()
    assert "Nothing was evaluated" not in page and "The evaluation is" not in page
    assert rayscan("report", *words).exit_code == 4
    assert run(copy, captures)[0] == 4
    older = arguments(copy, captures, "evaluate.bootstrap=5")
    assert rayscan("report", *older).exit_code == 0
    assert "The evaluation is older than" in (place / "report.html").read_text()


def test_another_capture_redoes_its_periods_alone(copy: Path, captures: Path, tmp_path: Path) -> None:
    more = tmp_path / "more"
    more.mkdir()
    one_month = pq.read_table(captures / "2024-02.parquet")
    pq.write_table(one_month.slice(0, 500), more / "late.parquet")
    before = {name: table(copy, name) for name in ("sequences", "embeddings", "clusters")}
    code, stages = run(copy, captures, f"captures.paths=[{captures}, {more}]")
    assert code == 0
    assert "train" not in stages
    assert stages["ingest"]["captures"] == 1
    assert stages["sequences"]["units"] == 2
    assert stages["embed"]["units"] == 2
    assert stages["cluster"]["periods"] == 1
    assert table(copy, "flows").height == 24_500
    for name, old in before.items():
        january = pl.col("period") == "2024-01"
        assert table(copy, name).filter(january).equals(old.filter(january))


def test_campaigns_carry_clusters_on(finished: Path, captures: Path) -> None:
    """Every cluster has one campaign; one that goes on is the same simulated campaign in both months."""
    campaigns, clusters = table(finished, "campaigns"), table(finished, "clusters")
    alive = campaigns.filter(pl.col("cluster").is_not_null())
    keys = ["period", "cluster"]
    assert alive.select(keys).sort(keys).equals(clusters.select(keys).unique().sort(keys))
    assert alive.select(["period", "campaign"]).is_unique().all()
    assert set(alive.filter(pl.col("period") == "2024-01")["event"]) == {"born"}
    assert set(campaigns["event"]) >= {"born", "continued"}
    truth = pl.read_parquet(captures.parent / "truth.parquet").select(
        pl.col("src").cast(pl.Int64), "campaign"
    )
    members = clusters.join(truth.rename({"campaign": "true"}), on="src")
    named = members.join(alive.select([*keys, "campaign", "event"]), on=keys)
    usual = named.group_by("campaign", "period").agg(pl.col("true").mode().sort().first(), pl.len())
    both = usual.filter(pl.col("period") == "2024-01").join(
        usual.filter(pl.col("period") == "2024-02"), on="campaign"
    )
    same = (both["true"] == both["true_right"]).mean()
    shares = [both[name].value_counts(normalize=True) for name in ("true", "true_right")]
    by_chance = shares[0].join(shares[1], left_on="true", right_on="true_right")
    assert both.height >= 5
    assert same > 3 * (by_chance["proportion"] * by_chance["proportion_right"]).sum()


def test_campaign_names_survive_reprocessing(copy: Path, captures: Path) -> None:
    before = table(copy, "campaigns").sort("period", "campaign")
    assert run(copy, captures, "cluster.max_rounds=19")[0] == 0  # the clusters come out the same
    after = table(copy, "campaigns").sort("period", "campaign")
    columns = ["period", "campaign", "event", "relative", "sequences", "sources"]
    assert after.select(columns).equals(before.select(columns))


def test_fresh_training_replaces_the_model(copy: Path, captures: Path) -> None:
    result = rayscan("train", *arguments(copy, captures), "--fresh")
    assert result.exit_code == 0
    assert run(copy, captures)[0] == 4  # the same seed and data: the very same weights


def test_two_runs_side_by_side(copy: Path, captures: Path) -> None:
    code, stages = run(copy, captures, "run=tight", "cluster.threshold=0.9")
    assert code == 0
    assert list(stages) == STAGES[4:]
    assert run(copy, captures)[0] == 4
    assert set(table(copy, "clusters")["run"]) == {"main", "tight"}


def test_the_port_of_a_damaged_file(copy: Path, captures: Path, tmp_path: Path) -> None:
    """A file that cannot be read costs nothing but itself, is counted, and makes the exit code 3."""
    more = tmp_path / "more"
    more.mkdir()
    (more / "bad.parquet").write_bytes((captures / "2024-01.parquet").read_bytes()[:-50])
    result = rayscan("run", *arguments(copy, captures, f"captures.paths=[{captures}, {more}]"))
    assert result.exit_code == 3
    assert table(copy, "flows").height == 24_000
    page = (copy / "runs" / "main" / "report.html").read_text()
    assert "bad.parquet" in page
    assert "All of 24,000 rows could be read. 1 file could not be read at all." in page
    again = rayscan("run", *arguments(copy, captures, f"captures.paths=[{captures}, {more}]"))
    assert again.exit_code == 4


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("when,who\n1,2\n", "Name it in the configuration"),
        ("ts,src,dst_port,proto\n2024-01-01T00:00:00,1.2.3.4,22,6\n", "set captures.time_zone"),
        ("ts,src,dst_port,proto\n2024-01-01T00:00:00Z,1.2.3,99999,6\n", "src is not IPv4"),
    ],
)
def test_captures_of_which_nothing_can_be_read(
    ray_session: None, tmp_path: Path, content: str, message: str
) -> None:
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "flows.csv").write_text(content)
    for _ in range(2):  # the second time there is nothing to ingest, and as little to go on with
        result = rayscan("run", *arguments(tmp_path / "ws", tmp_path / "c"))
        assert result.exit_code == 1
        assert "no flow could be read from 1 captures" in result.stderr
        assert message in result.stderr
        assert "flows.csv" in result.stderr


def test_a_scanner_list_redoes_what_asks_it(copy: Path, captures: Path, tmp_path: Path) -> None:
    sources = table(copy, "sequences")["src"].unique().sort()
    lines = [f"{src >> 24}.{src >> 16 & 255}.{src >> 8 & 255}.{src & 255}\n" for src in sources]
    for name, half in (("even", lines[::2]), ("odd", lines[1::2])):
        (tmp_path / name).write_text("".join(half))
        words = [str(tmp_path / name), "--organisation", name, "--from", "2024-01-15"]
        assert rayscan("scanners", "import", "-w", str(copy), *words).exit_code == 0
    code, stages = run(copy, captures)
    assert (code, list(stages)) == (0, STAGES[5:])
    campaigns = table(copy, "campaigns").filter(pl.col("cluster").is_not_null())
    assert (campaigns["known"] == campaigns["sources"]).all()
    assert 0 <= campaigns["days_off"].min() <= campaigns["days_off"].max() <= 46  # type: ignore[operator]
    assert "2 lists of known scanners" in (copy / "runs" / "main" / "report.html").read_text()
    assert run(copy, captures)[0] == 4
    assert list(run(copy, captures, "evaluate.labels=scanners")[1]) == STAGES[6:]
    evaluation = json.loads((copy / "runs" / "main" / "evaluation.json").read_text())
    assert evaluation["labels_from"] == "scanner lists"
    names = evaluation["parts"]["unseen sources"]["labels"]["names"]
    assert {row["label"] for row in names} == {"even", "odd"}
    assert list(run(copy, captures, "scanners.tolerance_days=0")[1]) == STAGES[5:]


# ---------------------------------------------------------------------------------------------
# Who may write what, and how an end is told
# ---------------------------------------------------------------------------------------------


@pytest.fixture
def empty(tmp_path: Path) -> Workspace:
    """A workspace without flows, in which every plan of a stage fails."""
    return Workspace.open(tmp_path / "ws", IngestConfig())


def test_a_run_without_the_lease_leaves_the_record_alone(empty: Workspace) -> None:
    record = {"status": "running", "error": None}
    empty.write_json("runs/main/run.json", record)
    with lease(empty, "run-main"):
        assert rayscan("sequences", "-w", empty.uri).exit_code == 1
        assert empty.read_json("runs/main/run.json") == record
        assert empty.read_json("runs/main/config.yaml") is None
    assert rayscan("sequences", "-w", empty.uri).exit_code == 1
    found = empty.read_json("runs/main/run.json") or {}
    assert (found["status"], "there are no flows" in found["error"]) == ("failed", True)
    assert holders(empty) == []


def test_a_record_that_cannot_be_written_hides_no_error(
    empty: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    Path(empty.uri, "runs").write_text("")  # no folder
    failed = rayscan("sequences", "-w", empty.uri)
    assert failed.exit_code == 1
    assert "rayscan: there are no flows" in failed.stderr
    assert "does not stand in its run.json: cannot create the folder" in failed.stderr

    def stopped(_: Run) -> list[Unit]:
        os.kill(os.getpid(), signal.SIGTERM)
        raise AssertionError("still here")

    monkeypatch.setattr(Run, "_plan_sequences", stopped)
    assert rayscan("sequences", "-w", empty.uri).exit_code == 143


def test_a_sweep_says_that_it_runs_and_why_it_did_not(
    empty: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    space = "tune.space={train.learning_rate: {loguniform: [1e-4, 1e-2]}}"

    def tune(*sets: str) -> tuple[int, dict[str, Any]]:
        result = rayscan("tune", "-w", empty.uri, *(word for one in sets for word in ("--set", one)))
        return result.exit_code, record(*sets)

    def record(*sets: str) -> dict[str, Any]:
        return empty.read_json(f"tuning/{sweep_id(load(sets=sets, env={}))}/run.json") or {}

    code, found = tune()  # with nothing to vary
    assert (code, found["status"], found["exit_code"]) == (2, "failed", 2)
    code, found = tune(space)
    assert (code, found["status"]) == (1, "failed")
    assert "there are no sequences" in found["error"]
    seen = []

    def killed(*_: Any) -> None:
        seen.append(record(space)["status"])
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr("rayscan.planning.training_files", killed)
    code, found = tune(space)
    assert (code, seen, found["status"]) == (143, ["running"], "stopped")


def test_a_run_keeps_to_its_model_and_nobody_switches_meanwhile(empty: Workspace) -> None:
    old, new = ("a" * 32, "b" * 32)
    config = load(env={})
    for name, weights in ((model_id(config), old), ("new", new)):
        empty.write_json(f"models/{name}/config.json", {"weights": weights, "model": {}})
    run = Run(empty, config)
    assert run._model().weights == old
    with lease(empty, "run-main"):
        refused = rayscan("switch", "new", "-w", empty.uri)
    assert (refused.exit_code, "is at work on run-main" in refused.stderr) == (4, True)
    assert Run(empty, config)._model().weights == old
    assert rayscan("switch", "new", "-w", empty.uri).exit_code == 0
    assert Run(empty, config)._model().weights == new
    assert run._model().weights == old


# ---------------------------------------------------------------------------------------------
# Training in several processes, and one that dies
# ---------------------------------------------------------------------------------------------


def curve(workspace: Path) -> pl.DataFrame:
    """The training curve of the newest model of a workspace."""
    newest = max((workspace / "models").iterdir(), key=lambda p: p.stat().st_mtime)
    return pl.read_parquet(newest / "metrics.parquet")


def test_two_workers_train_what_one_does(finished: Path, copy: Path, captures: Path) -> None:
    """Without dropout, of which each worker has its own."""
    result = rayscan("train", *arguments(copy, captures, "train.workers=2"), "--fresh")
    assert result.exit_code == 0, result.stderr
    one, two = curve(finished), curve(copy)
    assert one["step"].to_list() == two["step"].to_list() == list(range(1, 13))
    assert np.allclose(one["loss"], two["loss"], rtol=1e-3)
    assert np.allclose(one["gradient_norm"], two["gradient_norm"], rtol=1e-2)


# ---------------------------------------------------------------------------------------------
# Object storage
# ---------------------------------------------------------------------------------------------


INEXACT = ("vector", "weight_own", "weight_next", "cohesion", "feature_sum")


def exact(name: str, rows: pa.Table) -> pl.DataFrame:
    """What a table says wherever it lies: no last bits of sums, and of a capture its name alone."""
    found = pl.from_arrow(rows.drop_columns([column for column in rows.column_names if column in INEXACT]))
    assert isinstance(found, pl.DataFrame)
    if "path" in found.columns:
        found = found.drop("modified", strict=False)
        found = found.with_columns(pl.col("path").str.split("/").list.last())
    return found


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_whole_way_on_object_storage(
    finished: Path, captures: Path, s3_prefix: str, tmp_path: Path
) -> None:
    """Captures and workspace on S3, where one request in twenty fails: the tables are those of a folder.

    In a process of its own, so that Ray's workers get credentials too. These then stand nowhere: not in the
    bucket, not in what is printed, not in Ray's logs. And nothing lists what it need not.
    """
    bucket, secret = s3_prefix.split("/")[2], f"secret-{uuid.uuid4().hex}"
    server = os.environ["AWS_ENDPOINT_URL"]
    client = servers.client(server)
    for path in sorted(captures.iterdir()):
        client.upload_file(str(path), bucket, f"captures/{path.name}")
    sets = [*SMALL, f"captures.paths=s3://{bucket}/captures"]
    words = ["run", "-w", s3_prefix, "--preset", "quick", "--json", *(w for s in sets for w in ("--set", s))]
    said, log = "", tmp_path / "log"
    with (
        tempfile.TemporaryDirectory(prefix="r") as ray_folder,  # the paths of its sockets must be short
        servers.proxy(server, log, "--rate", "0.05", "--seed", "1") as endpoint,
    ):
        environment = {**os.environ, "AWS_ENDPOINT_URL": endpoint, "RAY_TMPDIR": ray_folder}
        environment |= {"AWS_SECRET_ACCESS_KEY": secret, "AWS_SESSION_TOKEN": f"token-{secret}"}
        failing = ["--set", "embed.model=nowhere"]
        refused = ["--set", f"captures.paths=s3://testing:{secret}@{bucket}/captures"]
        for code, more in ((0, []), (4, []), (1, failing), (2, refused)):
            command = [sys.executable, "-m", "rayscan", *words, *more]
            done = subprocess.run(command, capture_output=True, text=True, env=environment)
            assert done.returncode == code, done.stderr
            said += done.stdout + done.stderr
        logs = [path.read_bytes() for path in Path(ray_folder).rglob("*") if path.is_file()]
    workspace = Workspace.open(s3_prefix)
    for name, keys in KEYS.items():
        expected, found = (exact(name, of.table(name).read()) for of in (Workspace.open(finished), workspace))
        assert found.sort(keys).equals(expected.sort(keys)), name
    vectors = [
        np.array(pl.from_arrow(of.table("embeddings").read()).sort("sequence_id")["vector"].to_list())
        for of in (Workspace.open(finished), workspace)
    ]
    assert np.allclose(*vectors, atol=1e-5)

    made = servers.requests(log)
    assert sum(line["fault"] is not None for line in made) > 20
    listed = {line["query"]["prefix"].strip("/") for line in made if "list-type" in line["query"]}
    tables = {
        place.split("/")[1] for place in listed if place.startswith("prefix/") and "_delta_log" not in place
    }
    assert tables <= {"models", "training"}, listed
    objects = client.get_paginator("list_objects_v2").paginate(Bucket=bucket)
    kept = [
        client.get_object(Bucket=bucket, Key=o["Key"])["Body"].read() for p in objects for o in p["Contents"]
    ]
    assert len(logs) > 10
    assert len(kept) > 50
    assert secret not in said
    assert not any(secret.encode() in data for data in (*logs, *kept))
