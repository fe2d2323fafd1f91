"""The whole way as a user goes it: once, again, with other settings, with more captures, and on S3."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import uuid
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow.parquet as pq
import pytest
import servers
from click.testing import CliRunner, Result
from processes import below, command_of, kill

from rayscan.cli import main
from rayscan.simulate import simulate_to
from rayscan.tables import Workspace

SMALL = [
    "ingest.n_buckets=2", "train.steps=12", "train.batch_sources=32", "train.validate_every=6",
    "train.checkpoint_every=4", "model.layers=1", "model.d_model=32", "model.d_ff=32", "model.heads=2",
    "evaluate.bootstrap=20",
]  # fmt: skip
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


def test_dry_run_changes_nothing(finished: Path, captures: Path) -> None:
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
        ("train.seed=7", STAGES[2:]),
        ("sequences.length=24", STAGES[1:]),
    ],
)
def test_a_setting_redoes_what_depends_on_it(
    copy: Path, captures: Path, setting: str, redone: list[str]
) -> None:
    code, stages = run(copy, captures, setting)
    assert code == 0
    assert list(stages) == redone
    assert run(copy, captures, setting)[0] == 4


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
# Training in several processes, and one that dies
# ---------------------------------------------------------------------------------------------


def curve(workspace: Path) -> pl.DataFrame:
    """The training curve of the newest model of a workspace."""
    newest = max((workspace / "models").iterdir(), key=lambda p: p.stat().st_mtime)
    return pl.read_parquet(newest / "metrics.parquet")


def test_two_workers_train_what_one_does(copy: Path, captures: Path) -> None:
    curves = []
    for workers in (1, 2):
        sets = ["model.dropout=0.0", f"train.workers={workers}", "train.steps=8"]
        result = rayscan("train", *arguments(copy, captures, *sets), "--fresh")
        assert result.exit_code == 0, result.stderr
        curves.append(curve(copy))
    one, two = curves
    assert one["step"].to_list() == two["step"].to_list() == list(range(1, 9))
    assert np.allclose(one["loss"], two["loss"], rtol=1e-3)
    assert np.allclose(one["gradient_norm"], two["gradient_norm"], rtol=1e-2)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_killed_training_worker_costs_nothing(copy: Path, captures: Path) -> None:
    """Kill a training process for real: the run goes on from the checkpoint, to the very same curve."""
    sets = ["train.seed=21", "train.steps=200", "train.checkpoint_every=5", "train.validate_every=40"]
    words = ["train", *arguments(copy, captures, *sets)]
    process = subprocess.Popen(
        [sys.executable, "-m", "rayscan", *words], stderr=subprocess.PIPE, text=True, env=os.environ.copy()
    )
    assert process.stderr
    said = [process.stderr.readline() for _ in range(2)]  # some seconds apart: checkpoints are registered
    assert all(line.startswith("train: ") for line in said), said
    victims = [pid for pid in below(process.pid) if "RayTrainWorker" in command_of(pid)]
    assert victims
    kill(victims[0])
    said += process.stderr.readlines()
    assert process.wait() == 0, said
    assert any("going on from step" in line for line in said), said
    disturbed = curve(copy)
    assert rayscan(*words, "--fresh").exit_code == 0
    undisturbed = curve(copy)
    columns = ["step", "loss", "learning_rate", "gradient_norm", "separation"]
    assert disturbed.select(columns).equals(undisturbed.select(columns))


# ---------------------------------------------------------------------------------------------
# Object storage
# ---------------------------------------------------------------------------------------------


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
        for code in (0, 4):
            command = [sys.executable, "-m", "rayscan", *words]
            done = subprocess.run(command, capture_output=True, text=True, env=environment)
            assert done.returncode == code, done.stderr
            said += done.stdout + done.stderr
        logs = [path.read_bytes() for path in Path(ray_folder).rglob("*") if path.is_file()]
    workspace = Workspace.open(s3_prefix)
    for name, keys in (("sequences", []), ("clusters", []), ("campaigns", ["campaign"])):
        order = ["period", *(keys or ["sequence_id"])]
        inexact = ("weight_own", "weight_next", "cohesion", "feature_sum")
        columns = [c for c in table(finished, name).columns if c not in inexact]
        found = pl.from_arrow(workspace.table(name).read(columns=columns))
        assert isinstance(found, pl.DataFrame)
        assert found.sort(order).equals(table(finished, name).select(columns).sort(order)), name

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
