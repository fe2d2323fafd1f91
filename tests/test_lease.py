"""Leases: one holder at a time, taken over from the dead, on a folder and on object storage."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from datetime import UTC, datetime, timedelta

import pyarrow as pa
import pytest

from rayscan import lease as leases
from rayscan import schema
from rayscan.config import IngestConfig
from rayscan.errors import CommitConflict, LeaseHeld
from rayscan.lease import Lease, end, holders, lease
from rayscan.tables import CommitInfo, Workspace

NAME = "run-main"


@pytest.fixture
def workspace(storage: str) -> Workspace:
    return Workspace.open(storage, IngestConfig())


def put(workspace: Workspace, **facts: object) -> None:
    """A lease that a process of another machine has left in the table."""
    now = datetime.now(UTC)
    row = {
        "token": "other", "owner": "node7, process 12", "machine": "elsewhere", "process": "12 34",
        "taken": now, "renewed": now, "expires": now + timedelta(minutes=10), **facts,
    }  # fmt: skip
    table, key = workspace.table("leases"), {"name": NAME}
    file = table.write(pa.Table.from_pylist([row], schema.LEASES), key)
    table.replace([key], [file], {f"name={NAME}": len(str(facts))}, CommitInfo("other", ""))


def test_one_holder_at_a_time(workspace: Workspace) -> None:
    with lease(workspace, NAME) as held, lease(workspace, "run-other"):
        held.check()
        assert [row["name"] for row in holders(workspace)] == [NAME, "run-other"]
        with pytest.raises(LeaseHeld, match=f"process {os.getpid()} is at work on run-main"):
            lease(workspace, NAME).__enter__()
    assert holders(workspace) == []
    with lease(workspace, NAME):
        pass


def test_of_many_takers_one_wins(workspace: Workspace) -> None:
    won, ready, leave = [], threading.Barrier(4), threading.Event()

    def take() -> None:
        ready.wait()
        try:
            with lease(workspace, NAME):
                won.append(1)
                leave.wait(20)
        except LeaseHeld:
            won.append(0)
            if won.count(0) == 3:
                leave.set()

    threads = [threading.Thread(target=take) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(won) == [0, 0, 0, 1]


def test_a_killed_process_of_this_machine_holds_nothing(workspace: Workspace) -> None:
    code = (
        "import sys, time; from rayscan.lease import lease; from rayscan.tables import Workspace\n"
        "with lease(Workspace(sys.argv[1]), 'run-main'): print('held', flush=True); time.sleep(60)"
    )
    child = subprocess.Popen([sys.executable, "-c", code, workspace.uri], stdout=subprocess.PIPE, text=True)
    assert child.stdout and child.stdout.readline() == "held\n"
    with pytest.raises(LeaseHeld, match=f"process {child.pid} "):
        lease(workspace, NAME).__enter__()
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    with lease(workspace, NAME):
        pass


@pytest.mark.parametrize(
    ("ago", "free"), [(-300, False), (0, False), (leases.SKEW_S - 5, False), (leases.SKEW_S + 5, True)]
)
def test_a_lease_of_another_machine_runs_out(workspace: Workspace, ago: float, free: bool) -> None:
    """Only when it ended longer ago than clocks differ."""
    put(workspace, expires=datetime.now(UTC) - timedelta(seconds=ago))
    if free:
        with lease(workspace, NAME):
            pass
        return
    with pytest.raises(LeaseHeld, match="node7, process 12 is at work"):
        lease(workspace, NAME).__enter__()


def test_a_clock_far_ahead_is_named_and_the_lease_can_be_ended(workspace: Workspace) -> None:
    ahead = datetime.now(UTC) + timedelta(days=3)
    put(workspace, renewed=ahead, expires=ahead + timedelta(minutes=10))
    with pytest.raises(LeaseHeld, match=r"Its clock is 259,\d{3} s or more ahead.*rayscan unlock run-main"):
        lease(workspace, NAME).__enter__()
    end(workspace, NAME)
    with lease(workspace, NAME):
        pass


def test_a_lease_is_renewed_while_it_is_held(workspace: Workspace) -> None:
    with lease(workspace, NAME, seconds=2.0) as held:
        first = holders(workspace)[0]["expires"]
        time.sleep(3)
        held.check()
        assert holders(workspace)[0]["expires"] > first


def test_a_lease_that_was_taken_over_is_noticed(workspace: Workspace) -> None:
    with lease(workspace, NAME, seconds=1.0) as held:
        put(workspace)
        deadline = time.monotonic() + 20
        while not held.lost and time.monotonic() < deadline:
            time.sleep(0.1)
        with pytest.raises(CommitConflict, match="node7, process 12 has taken it over"):
            held.check()
    assert [row["owner"] for row in holders(workspace)] == ["node7, process 12"]  # not given back


def test_a_holder_trusts_its_own_clock_alone(workspace: Workspace) -> None:
    held = Lease(workspace, NAME, 600.0, until=time.monotonic() - 1)
    with pytest.raises(CommitConflict, match="could not be renewed in time"):
        held.check()
