"""What cron does: new, late and corrected captures, drift, another model; once each, and never twice."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner, Result
from tiny import TINY

from rayscan.cli import main
from rayscan.errors import WorkspaceError
from rayscan.lease import lease
from rayscan.planning import CaptureFile, Window
from rayscan.simulate import simulate_to
from rayscan.tables import Workspace

pytestmark = pytest.mark.ray

SETTINGS = (*TINY, "evaluate.bootstrap=0", "reprocess.min_sources=5", "reprocess.train_steps=6")


class Site:
    """A workspace and the folder into which captures are delivered."""

    def __init__(self, folder: Path) -> None:
        self.workspace, self.captures = folder / "ws", folder / "captures"

    def line(self, command: str, *words: str) -> list[str]:
        sets = [*SETTINGS, f"captures.paths={self.captures}"]
        given = ["-w", str(self.workspace), "--preset", "quick", *(w for s in sets for w in ("--set", s))]
        return [command, *words, *given]

    def call(self, command: str, *words: str) -> Result:
        return CliRunner().invoke(main, self.line(command, *words), catch_exceptions=False)

    def reprocess(self, *words: str) -> tuple[int, dict[str, Any]]:
        """Exit code, and the stages that did something."""
        result = self.call("reprocess", *words, "--json")
        assert result.exit_code in (0, 4), result.stderr
        return result.exit_code, json.loads(result.stdout)["stages"]

    def changes(self) -> dict[str, Any]:
        """Of the last run, by period."""
        found = json.loads((self.workspace / "runs/main/changes.json").read_text())
        return {one["period"]: one for one in found["periods"]}

    def table(self, name: str, period: str | None = None) -> pl.DataFrame:
        where = {} if period is None else {"period": period}
        frame = pl.from_arrow(Workspace.open(self.workspace).table(name).read(where))
        assert isinstance(frame, pl.DataFrame)
        return frame

    def health(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.call("status", "--json").stdout)
        return found


@pytest.fixture(scope="module")
def months(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("telescope")
    return simulate_to(folder, months=2, sources=300, flows=24_000, seed=5).captures


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory, months: Path, ray_session: None) -> Path:
    """January, and February up to its middle, have been processed."""
    folder = tmp_path_factory.mktemp("site")
    site = Site(folder)
    site.captures.mkdir()
    shutil.copy(months / "2024-01.parquet", site.captures)
    february = pq.read_table(months / "2024-02.parquet").sort_by("ts")
    half = february.num_rows // 2
    pq.write_table(february.slice(0, half), site.captures / "2024-02-a.parquet")
    pq.write_table(february.slice(half), folder / "2024-02-b.parquet")
    code, stages = site.reprocess()
    assert code == 0
    assert list(stages) == [
        "ingest",
        "sequences",
        "train",
        "embed",
        "cluster",
        "campaigns",
        "changes",
        "pages",
    ]
    return folder


@pytest.fixture
def site(begun: Path, tmp_path: Path) -> Site:
    """A copy of one's own; times of change stay, as they would on a site."""
    subprocess.run(["cp", "-rp", f"{begun}/.", str(tmp_path)], check=True)
    there = Site(tmp_path)
    captures = Workspace.open(there.workspace).table("captures")
    moved = [
        {**row, "path": row["path"].replace(str(begun), str(tmp_path))} for row in captures.read().to_pylist()
    ]
    import pyarrow as pa

    from rayscan import schema
    from rayscan.tables import CommitInfo

    old = [row["path"].replace(str(tmp_path), str(begun)) for row in moved]
    captures.replace_rows("path", old, pa.Table.from_pylist(moved, schema.CAPTURES), CommitInfo("moved", ""))
    return there


def names(rows: list[dict[str, Any]]) -> set[str]:
    return {row["campaign"] for row in rows}


def test_a_second_run_does_nothing_and_the_first_says_what_there_is(site: Site) -> None:
    assert site.reprocess() == (4, {})
    changes = site.changes()
    campaigns = site.table("campaigns")
    assert changes["2024-01"]["compared_with"] == "nothing: it is the first"
    assert changes["2024-02"]["compared_with"] == "2024-01"
    of_events = {
        period: set(campaigns.filter((pl.col("period") == period) & (pl.col("event") == "born"))["campaign"])
        for period in changes
    }
    assert {period: names(told["born"]) for period, told in changes.items()} == of_events
    for period in changes:
        assert (site.workspace / f"runs/main/report-{period}.html").stat().st_size > 10_000
    assert not (site.workspace / "runs/main/report.html").exists()


def test_what_monitoring_is_told(site: Site) -> None:
    with lease(Workspace.open(site.workspace), "run-main"):
        health = site.health()
    campaigns = site.table("campaigns", "2024-02").drop_nulls("cluster")
    newest = campaigns["last"].max()
    assert isinstance(newest, datetime)
    assert health["newest_flow_in_campaigns"] == newest.isoformat(timespec="seconds")
    assert abs(health["lag_s"] - (datetime.now(UTC) - newest).total_seconds()) < 60
    assert health["newest_flow"] >= health["newest_flow_in_campaigns"]
    assert (health["newest_period"], health["clusters"]) == ("2024-02", campaigns.height)
    assert (health["captures"], health["flows"]) == (2, site.table("flows").height)
    assert (health["last_run"]["status"], health["last_run"]["exit_code"]) == ("done", 0)
    assert [row["name"] for row in health["at_work"]] == ["run-main"]


def test_the_rest_of_a_month_redoes_that_month_alone(site: Site) -> None:
    before = {name: site.table(name) for name in ("sequences", "embeddings", "clusters", "campaigns")}
    shutil.copy(site.captures.parent / "2024-02-b.parquet", site.captures)
    code, stages = site.reprocess("--since", "2024-02-01")
    assert code == 0
    assert (stages["ingest"]["captures"], stages["cluster"]["periods"]) == (1, 1)
    assert "train" not in stages
    assert stages["drift"]["sources"] > 5 and not stages["drift"]["drifted"]
    january = pl.col("period") == "2024-01"
    for name, old in before.items():
        assert site.table(name).filter(january).equals(old.filter(january))
    (told,) = site.changes().values()
    assert (told["period"], told["compared_with"]) == ("2024-02", "its last state")
    assert told["grown"] and all(row["sources"] > row["sources_before"] for row in told["grown"])
    alive = pl.col("cluster").is_not_null() & (pl.col("period") == "2024-02")
    then, now = (set(t.filter(alive)["campaign"]) for t in (before["campaigns"], site.table("campaigns")))
    kept = names(told["grown"]) | names(told["shrunk"])
    assert len(then & now) > 0.6 * len(then)  # a campaign keeps its name while its month goes on
    assert kept - names(told["renamed"]) <= then & now
    assert names(told["born"]) | names(told["split"]) | names(told["renamed"]) >= now - then
    assert site.reprocess() == (4, {})


def test_late_flows_of_an_earlier_month(site: Site, months: Path) -> None:
    """Outside the window they are taken in, and left due; without one they redo their month."""
    late = pq.read_table(months / "2024-01.parquet").slice(0, 300)
    pq.write_table(late, site.captures / "late.parquet")
    code, stages = site.reprocess("--since", "2024-02-01")
    assert (code, list(stages)) == (0, ["ingest"])
    stale = {(row["stage"], row["period"]): row["stale"] for row in site.health()["stages"]}
    assert (stale["sequences", "2024-01"], stale["sequences", "2024-02"]) == (2, 0)
    code, stages = site.reprocess()
    assert (code, stages["cluster"]["periods"], stages["campaigns"]["periods"]) == (0, 1, 2)
    assert set(site.changes()) == {"2024-01", "2024-02"}  # February follows January
    assert site.reprocess() == (4, {})


@pytest.mark.parametrize(
    ("since", "until", "held"),
    [
        (None, None, True),
        ((2024, 2, 29, 23), None, True),
        ((2024, 3, 1), None, False),  # the period ends as it begins
        (None, (2024, 2, 1), False),
        (None, (2024, 2, 1, 1), True),
        ((2024, 2, 10), (2024, 2, 11), True),
        ((2024, 3, 1), (2024, 4, 1), False),
    ],
)
def test_which_periods_a_window_holds(
    since: tuple[int, int, int] | None, until: tuple[int, int, int] | None, held: bool
) -> None:
    window = Window(since and datetime(*since, tzinfo=UTC), until and datetime(*until, tzinfo=UTC))
    assert window.holds("2024-02") == held


def test_which_captures_a_window_may_hold() -> None:
    """One may be about any time before its last change; one without a time of change about any time."""
    day = datetime(2024, 2, 10, tzinfo=UTC)
    for window, expected in (
        (Window(), (True, True, True)),
        (Window(until=day), (True, True, True)),
        (Window(since=day), (False, True, True)),
    ):
        times = (day - timedelta(seconds=1), day, None)
        assert tuple(window.can_hold(CaptureFile("a", 1, time)) for time in times) == expected


def test_what_begins_after_a_window_is_left_due(site: Site, months: Path) -> None:
    shutil.copy(site.captures.parent / "2024-02-b.parquet", site.captures)
    pq.write_table(pq.read_table(months / "2024-01.parquet").slice(0, 300), site.captures / "late.parquet")
    february = site.table("clusters", "2024-02")
    code, stages = site.reprocess("--until", "2024-02-01")
    assert (code, stages["ingest"]["captures"], stages["cluster"]["periods"]) == (0, 2, 1)
    stale = {(row["stage"], row["period"]): row["stale"] for row in site.health()["stages"]}
    assert (stale["sequences", "2024-01"], stale["sequences", "2024-02"]) == (0, 2)
    assert site.table("clusters", "2024-02").equals(february)
    code, stages = site.reprocess()
    assert (code, stages["cluster"]["periods"]) == (0, 1)
    assert site.reprocess() == (4, {})


def test_a_corrected_capture_takes_the_place_of_the_first(site: Site, months: Path) -> None:
    flows = pq.read_table(months / "2024-01.parquet")
    pq.write_table(flows.slice(0, flows.num_rows // 2), site.captures / "2024-01.parquet")
    code, stages = site.reprocess()
    assert code == 0
    assert stages["ingest"]["captures"] == 1
    assert site.table("flows", "2024-01").height == flows.num_rows // 2
    told = site.changes()["2024-01"]
    assert len(told["gone"]) + len(told["merged"]) + len(told["shrunk"]) > len(told["grown"])
    assert site.reprocess() == (4, {})


def test_two_at_once_exclude_each_other(site: Site) -> None:
    shutil.copy(site.captures.parent / "2024-02-b.parquet", site.captures)
    record = (site.workspace / "runs/main/run.json").read_bytes()
    with lease(Workspace.open(site.workspace), "run-main"):
        refused = site.call("reprocess")
        assert refused.exit_code == 4
        assert "is at work on run-main" in refused.stderr
        assert site.call("run").exit_code == 4
    assert (site.workspace / "runs/main/run.json").read_bytes() == record
    assert site.table("flows", "2024-02").height < 12_000
    assert site.reprocess()[0] == 0
    shutil.copy(site.captures / "2024-02-a.parquet", site.captures / "again.parquet")
    with lease(Workspace.open(site.workspace), "ingest"):  # whatever the name of the run
        refused = site.call("ingest", "--set", "run=other")
    assert refused.exit_code == 4
    assert "is at work on ingest" in refused.stderr
    (model,) = (path.name for path in (site.workspace / "models").iterdir())
    with lease(Workspace.open(site.workspace), f"model-{model}"):  # two runs of other names may train it
        refused = site.call("train", "--fresh", "--set", "run=other")
    assert refused.exit_code == 4
    assert f"is at work on model-{model}" in refused.stderr


def test_of_two_runs_at_once_one_does_the_work(site: Site) -> None:
    """Each a process, as cron starts them."""
    shutil.copy(site.captures.parent / "2024-02-b.parquet", site.captures)
    record = site.workspace / "runs/main/run.json"
    before = record.read_text()
    command = [sys.executable, "-m", "rayscan", *site.line("reprocess")]
    first = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    while first.poll() is None and record.read_text() == before:
        time.sleep(0.05)
    second = subprocess.run(command, capture_output=True, text=True)
    assert second.returncode == 4, second.stderr
    assert f"process {first.pid} is at work on run-main" in second.stderr
    _, said = first.communicate()
    assert first.returncode == 0, said
    assert json.loads(record.read_text())["status"] == "done"
    assert site.reprocess() == (4, {})


def test_a_run_killed_before_it_told_what_changed_leaves_it_to_the_next(site: Site) -> None:
    last = site.changes()["2024-02"]
    shutil.copy(site.captures.parent / "2024-02-b.parquet", site.captures)
    assert site.call("run", "--set", "report.max_points=100").exit_code == 0  # all but the changes
    assert last == site.changes()["2024-02"]
    code, stages = site.reprocess()
    assert (code, list(stages)) == (0, ["changes", "pages"])
    assert site.changes()["2024-02"]["compared_with"] == "its last state"
    assert site.changes()["2024-02"]["grown"]


def test_a_run_killed_while_it_told_what_changed_is_told_whole(
    site: Site, months: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of two months one was written; the next run's summary has both, and does not say the first as new."""
    shutil.copy(site.captures.parent / "2024-02-b.parquet", site.captures)
    pq.write_table(pq.read_table(months / "2024-01.parquet").slice(0, 300), site.captures / "late.parquet")
    write = Workspace.write_json

    def dying(workspace: Workspace, path: str, data: dict[str, Any]) -> None:
        if path.endswith("changes/2024-02.json"):
            raise WorkspaceError("on purpose")
        write(workspace, path, data)

    with monkeypatch.context() as dies:
        dies.setattr(Workspace, "write_json", dying)
        assert site.call("reprocess").exit_code == 1
    code, stages = site.reprocess()
    assert (code, list(stages)) == (0, ["changes", "pages"])
    changes = site.changes()
    assert set(changes) == {"2024-01", "2024-02"}
    assert {told["compared_with"] for told in changes.values()} == {"its last state"}
    assert changes["2024-02"]["grown"]
    for period, told in changes.items():
        assert json.loads((site.workspace / f"runs/main/changes/{period}.json").read_text()) == told
    assert json.loads((site.workspace / "runs/main/changes.json").read_text())["drift"]["sources"] > 5
    assert site.reprocess() == (4, {})


def test_changes_are_told_when_the_state_before_was_vacuumed(site: Site) -> None:
    """A run redid the campaigns without telling what changed, and then what they had been was deleted."""
    shutil.copy(site.captures.parent / "2024-02-b.parquet", site.captures)
    assert site.call("run", "--set", "report.max_points=100").exit_code == 0
    assert Workspace.open(site.workspace).table("campaigns").vacuum(0)
    code, stages = site.reprocess()
    assert (code, list(stages)) == (0, ["changes", "pages"])
    assert site.changes()["2024-02"]["compared_with"] == "2024-01"
    assert site.reprocess() == (4, {})


def test_drift_trains_on_and_switching_goes_back(site: Site) -> None:
    """A model that claims more than it holds has drifted; then everything is of the new one."""
    (old,) = (path.name for path in (site.workspace / "models").iterdir())
    card = site.workspace / "models" / old / "card.json"
    facts = json.loads(card.read_text())
    card.write_text(json.dumps({**facts, "metrics": {**facts["metrics"], "separation": 1.5}}))
    shutil.copy(site.captures.parent / "2024-02-b.parquet", site.captures)
    code, stages = site.reprocess("--since", "2024-02-01", "--set", "reprocess.on_drift=train")
    assert code == 0
    assert stages["drift"]["drifted"]
    new = stages["drift"]["model"]
    assert stages["embed"]["units"] == 4 and stages["cluster"]["periods"] == 2  # January too
    found = json.loads((site.workspace / "runs/main/changes.json").read_text())
    assert (found["model"], found["drift"]["model"], found["drift"]["then"]) == (new, old, 1.5)
    assert json.loads((site.workspace / "models" / new / "drift.json").read_text())["start"] == old
    assert site.reprocess()[0] == 4
    clusters = site.table("clusters").sort("period", "sequence_id")

    beside = site.call("run", "--set", "run=old", "--model", old)  # side by side
    assert beside.exit_code == 0, beside.stderr
    assert site.reprocess()[0] == 4
    assert site.call("switch", old).exit_code == 0
    code, stages = site.reprocess()
    assert code == 0 and stages["cluster"]["periods"] == 2
    both = site.table("clusters").sort("period", "sequence_id")
    main_run = both.filter(pl.col("run") == "main").drop("run")
    assert main_run.equals(both.filter(pl.col("run") == "old").drop("run"))
    assert not main_run.equals(clusters.drop("run"))
