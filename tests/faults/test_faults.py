"""What a run does when the ground gives way: kills, a full disk, poison, SIGTERM. Everything is real.

The long version of the kills is `rounds.py`; its figures are in docs/benchmarks.md.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import numpy as np
import polars as pl
import pytest

sys.path.insert(0, str(Path(__file__).parent))
import rounds
from click.testing import CliRunner, Result
from numpy.typing import NDArray
from processes import below, command_of, kill

from rayscan.cli import main
from rayscan.simulate import simulate_to
from rayscan.stages.session import run_tasks
from rayscan.tables import Workspace

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def captures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("telescope")
    return simulate_to(folder, months=1, sources=200, flows=6000, seed=5).captures


def words(command: str, workspace: Path, captures: Path, *more: str) -> list[str]:
    sets = [*rounds.SETTINGS, f"captures.paths={captures}", *more]
    return [command, "-w", str(workspace), "--preset", "quick", *(w for s in sets for w in ("--set", s))]


def rayscan(*line: str) -> Result:
    return CliRunner().invoke(main, [*line], catch_exceptions=False)


def rows(workspace: Path, name: str, *order: str) -> pl.DataFrame:
    found = pl.from_arrow(Workspace.open(workspace).table(name).read())
    assert isinstance(found, pl.DataFrame)
    return found.sort(order)


def test_kills() -> None:
    """A worker is killed while a period is embedded; a rerun leaves the tables of an undisturbed run. All
    victims and stages in turn: `python tests/faults/rounds.py`."""
    with rounds.site(None) as site:
        done = rounds.play(site, 0, random.Random(7), "worker", "embed")
        assert not done.different, asdict(done)
        assert done.codes[-1] == 4, asdict(done)


# ---------------------------------------------------------------------------------------------
# A disk that is full
# ---------------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 100 kB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=100k", "rayscan-test", str(folder)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("no file system can be mounted here: it takes root")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_a_full_disk_is_named_and_room_mends_it(
    small_disk: Path, captures: Path, tmp_path: Path, ray_session: None
) -> None:
    line = [sys.executable, "-m", "rayscan", *words("ingest", small_disk / "ws", captures)]
    done = subprocess.run(
        line, capture_output=True, text=True
    )  # its lease, which it cannot give back, ends with it
    assert done.returncode == 1, done.stderr
    assert "No space left on device" in done.stderr
    assert f"cannot write {small_disk}" in done.stderr or f"cannot commit to {small_disk}" in done.stderr
    assert not any(sign in done.stderr for sign in ("Traceback", "\x1b", "tried"))
    subprocess.run(["mount", "-o", "remount,size=64m", str(small_disk)], check=True)
    assert rayscan(*words("ingest", small_disk / "ws", captures)).exit_code == 0
    assert rayscan(*words("ingest", tmp_path / "ws", captures)).exit_code == 0
    order = ("capture", "ts", "src", "dst", "dst_port", "src_port")
    assert rows(small_disk / "ws", "flows", *order).equals(rows(tmp_path / "ws", "flows", *order))


# ---------------------------------------------------------------------------------------------
# An object store that is full, and a Ray that does not start
# ---------------------------------------------------------------------------------------------


def test_what_does_not_fit_into_the_object_store_goes_to_disk(ray_session: None) -> None:
    """The store has 300 MB: what tasks share is larger, and so are their results together."""
    shared = np.arange(45_000_000.0)

    def work(item: int, numbers: NDArray[np.float64]) -> NDArray[np.float64]:
        return numbers[:12_000_000] + item

    for item, result in run_tasks(work, range(4), ordered=True, shared=shared):
        assert (result[0], result[-1]) == (item, item + 12_000_000 - 1)


def test_a_ray_that_does_not_start_is_explained(captures: Path, tmp_path: Path) -> None:
    line = words("ingest", tmp_path / "ws", captures, "resources.object_store_mb=1000000000")
    done = subprocess.run([sys.executable, "-m", "rayscan", *line], capture_output=True, text=True)
    assert done.returncode == 1
    assert "cannot start Ray on this machine" in done.stderr
    assert "Traceback" not in done.stderr


LOSE_THE_RAYLET = """
import os, time
import ray
from processes import below, command_of, kill
from rayscan.config import ResourcesConfig
from rayscan.errors import RayscanError
from rayscan.stages.session import check_room, session

with session(ResourcesConfig(local_cpus=1, object_store_mb=100)):
    check_room(1)
    kill(*(pid for pid in below(os.getpid()) if "raylet/raylet" in command_of(pid)))
    while ray.cluster_resources().get("CPU"):
        time.sleep(0.1)
    try:
        check_room(1)
    except RayscanError as error:
        print(type(error).__name__, error)
"""


def test_a_ray_that_has_died_is_not_taken_for_a_small_one() -> None:
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)}
    environment["RAY_health_check_period_ms"] = "500"  # looked at more often, so that this is noticed sooner
    command = [sys.executable, "-c", LOSE_THE_RAYLET]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert "RayscanError Ray on this machine has died" in done.stderr, (done.stdout, done.stderr)


# ---------------------------------------------------------------------------------------------
# Poison
# ---------------------------------------------------------------------------------------------


@contextmanager
def death_to_readers_of(path: Path) -> Iterator[list[int]]:
    """Kill every process of Ray that has this file open: what a crash in a parser does. Their numbers."""
    killed: list[int] = []
    over = threading.Event()

    def watch() -> None:
        while not over.wait(0.002):
            for pid in below(os.getpid()):
                if "ray::" in command_of(pid) and pid not in killed and _has_open(pid, path):
                    kill(pid)
                    killed.append(pid)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield killed
    finally:
        over.set()
        thread.join()


def _has_open(pid: int, path: Path) -> bool:
    try:
        return any(fd.samefile(path) for fd in Path(f"/proc/{pid}/fd").iterdir() if fd.exists())
    except OSError:
        return False


def test_a_capture_that_kills_its_reader_costs_itself_alone(
    captures: Path, tmp_path: Path, ray_session: None
) -> None:
    poison = tmp_path / "captures" / "poison.csv"
    shutil.copytree(captures, poison.parent)
    lines = "".join(f"2024-01-03T00:00:00Z,1.2.3.{n % 250},10.0.0.1,{n},6\n" for n in range(60_000)) * 40
    poison.write_text("ts,src,dst,dst_port,proto\n" + lines)
    line = words("ingest", tmp_path / "ws", poison.parent)
    with death_to_readers_of(poison) as killed:
        done = rayscan(*line)
    assert len(killed) == 4, "the first try and three more"
    assert done.exit_code == 3, done.stderr
    rejects = rows(tmp_path / "ws", "rejects", "path")
    assert rejects["path"].to_list() == [str(poison)]
    assert "died 4 times" in rejects["reason"][0]
    assert rows(tmp_path / "ws", "flows", "ts").height == 6000
    assert rayscan(*line).exit_code == 0  # nobody kills it now: it is read
    assert rows(tmp_path / "ws", "rejects", "path").is_empty()


def test_a_damaged_file_of_the_workspace_costs_its_period_alone(tmp_path: Path, ray_session: None) -> None:
    telescope = simulate_to(tmp_path / "t", months=2, sources=200, flows=6000, seed=5).captures
    assert rayscan(*words("ingest", tmp_path / "ws", telescope)).exit_code == 0
    damaged = next((tmp_path / "ws" / "flows" / "period=2024-01").rglob("*.parquet"))
    whole = damaged.read_bytes()
    damaged.write_bytes(whole[:100] + bytes(len(whole) - 200) + whole[-100:])
    done = rayscan(*words("sequences", tmp_path / "ws", telescope))
    assert done.exit_code == 1, done.stderr
    assert str(damaged) in done.stderr
    assert "1 of 4 buckets failed, the others are done" in done.stderr
    assert set(rows(tmp_path / "ws", "sequences", "src")["period"]) == {"2024-02"}
    damaged.write_bytes(whole)
    assert rayscan(*words("sequences", tmp_path / "ws", telescope)).exit_code == 0
    assert set(rows(tmp_path / "ws", "sequences", "src")["period"]) == {"2024-01", "2024-02"}


# ---------------------------------------------------------------------------------------------
# Training
# ---------------------------------------------------------------------------------------------

TRAINING = ("train.steps=300", "train.validate_every=300")
CURVE = ["step", "loss", "learning_rate", "gradient_norm", "separation"]


def curve(workspace: Path) -> pl.DataFrame:
    (path,) = workspace.glob("models/*/metrics.parquet")
    return pl.read_parquet(path).select(CURVE)


@pytest.fixture(scope="module")
def untrained(captures: Path, tmp_path_factory: pytest.TempPathFactory, ray_session: None) -> Path:
    """A workspace that has all that training takes."""
    workspace = tmp_path_factory.mktemp("untrained") / "ws"
    for command in ("ingest", "sequences"):
        assert rayscan(*words(command, workspace, captures)).exit_code == 0
    return workspace


@pytest.fixture(scope="module")
def undisturbed(untrained: Path, captures: Path) -> pl.DataFrame:
    """The curve of a training that nothing happens to."""
    workspace = untrained.with_name("undisturbed")
    shutil.copytree(untrained, workspace)
    assert rayscan(*words("train", workspace, captures, *TRAINING)).exit_code == 0
    return curve(workspace)


@pytest.fixture
def workspace(untrained: Path, tmp_path: Path) -> Path:
    shutil.copytree(untrained, tmp_path / "ws")
    return tmp_path / "ws"


def start(*line: str) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-m", "rayscan", *line], stderr=subprocess.PIPE, text=True)


def test_sigterm_leaves_with_a_checkpoint(workspace: Path, captures: Path, undisturbed: pl.DataFrame) -> None:
    """A machine that is taken away gives 30 seconds. Nothing of training is lost, to the last bit."""
    line = words("train", workspace, captures, *TRAINING, "train.checkpoint_every=290")
    process = start(*line)
    assert process.stderr
    said = [""]
    while " of 300 steps" not in said[-1]:
        said.append(process.stderr.readline())
        assert said[-1], said
    asked = time.monotonic()
    process.send_signal(signal.SIGTERM)
    said += process.stderr.readlines()
    assert process.wait() == 143, said
    assert time.monotonic() - asked < 60  # 7 s where nothing else runs
    assert "run again to go on" in said[-1]
    outcome = json.loads((workspace / "runs" / "main" / "run.json").read_text())
    assert (outcome["status"], outcome["exit_code"]) == ("stopped", 143)
    again = rayscan(*line)
    assert again.exit_code == 0, again.stderr
    step = int(again.stderr.partition("going on from step ")[2].split()[0])
    assert 0 < step < 290, "it went on from what SIGTERM left"
    assert curve(workspace).equals(undisturbed)


def test_a_killed_training_worker_costs_nothing(
    workspace: Path, captures: Path, undisturbed: pl.DataFrame
) -> None:
    """The run goes on from the checkpoint, to the very same curve."""
    process = start(*words("train", workspace, captures, *TRAINING, "train.checkpoint_every=10"))
    assert process.stderr
    # With the second of them, the first is registered.
    while len(list(workspace.glob("training/*/*/checkpoint_*"))) < 2:
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.05)
    victims = [pid for pid in below(process.pid) if "RayTrainWorker" in command_of(pid)]
    assert victims
    kill(victims[0])
    said = process.stderr.readlines()
    assert process.wait() == 0, said
    assert any("going on from step" in line for line in said), said
    assert curve(workspace).equals(undisturbed)
