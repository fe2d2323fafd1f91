"""Leases: one holder at a time, taken over from the dead, on a folder and on object storage."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

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
                leave.wait(200)
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
    ("ago", "free"), [(-300, False), (0, False), (leases.SKEW_S - 30, False), (leases.SKEW_S + 5, True)]
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
    with lease(workspace, NAME, seconds=8.0) as held:
        first = holders(workspace)[0]["expires"]
        time.sleep(3)
        held.check()
        assert holders(workspace)[0]["expires"] > first


def is_taken_over(held: Lease) -> None:
    """Another one takes the lease, and the holder's next renewal comes upon it."""
    deadline = time.monotonic() + 120
    while True:
        try:
            put(held.workspace)
            break
        except CommitConflict:  # a renewal came between
            assert time.monotonic() < deadline
    while not held.lost and time.monotonic() < deadline:
        time.sleep(0.1)


def test_a_lease_that_was_taken_over_is_noticed(workspace: Workspace) -> None:
    with lease(workspace, NAME, seconds=1.0) as held:
        is_taken_over(held)
        with pytest.raises(CommitConflict, match="node7, process 12 has taken it over"):
            held.check()
    assert [row["owner"] for row in holders(workspace)] == ["node7, process 12"]  # not given back


def late(workspace: Workspace) -> Lease:
    """A lease whose holder slept for longer than it runs."""
    held = Lease(workspace, NAME, 600.0)
    held._take()
    held.until = leases._clock() - 1
    return held


def test_a_holder_that_slept_over_its_lease_goes_on_only_if_nobody_had_it(workspace: Workspace) -> None:
    held = late(workspace)
    held.check()
    held.check()
    held.until = leases._clock() - 1
    end(workspace, NAME)
    with pytest.raises(CommitConflict, match="it was given up"):
        held.check()
    held = late(workspace)
    end(workspace, NAME)
    with lease(workspace, NAME):
        pass  # and it is free again
    with pytest.raises(CommitConflict, match="it was given up"):
        held.check()


@pytest.mark.parametrize("when", ["before", "between"])
def test_a_lease_runs_out_while_storage_is_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    """Before a renewal, or between one that was refused and the look at who has the lease."""
    held = late(Workspace.open(tmp_path / "ws", IngestConfig()))
    log = tmp_path / "ws" / "leases" / "_delta_log"
    for commit in log.iterdir():
        commit.write_text("{")  # opening the table fails
    if when == "between":

        def refused(_: Lease) -> None:
            raise CommitConflict("on purpose")

        monkeypatch.setattr(Lease, "_write", refused)
    held._renew()
    assert not held.lost  # the next try may come through
    with pytest.raises(CommitConflict, match="could not be renewed in time"):
        held.check()


def test_commits_ask_whether_they_may_be_made(workspace: Workspace) -> None:
    with lease(workspace, NAME, seconds=1.0) as held:
        is_taken_over(held)
        rejects = workspace.table("rejects")
        with pytest.raises(CommitConflict, match="has taken it over"):
            rejects.append([], {"x": 1}, CommitInfo("r", "h", check=held.check))
    assert rejects.done([], None) == {}
    assert rejects.version() <= 0


HIDDEN = """
import os, sys
from rayscan.lease import _has_ended, _process
os.setgid(65534), os.setuid(65534)
assert _process(int(sys.argv[1].split()[0])) is None, "it is not hidden"
print([_has_ended(one) for one in sys.argv[1:]])
"""


def test_the_process_of_another_user_counts_as_alive(tmp_path: Path) -> None:
    """Where /proc shows nobody the processes of others."""
    mine = leases._process(os.getpid())
    ended = subprocess.Popen(["true"])
    ended.wait()
    hide = 'mount -t proc -o hidepid=2 proc /proc && exec "$@"'
    command = ["unshare", "--mount", "sh", "-c", hide, "sh"]
    if subprocess.run([*command, "true"], capture_output=True).returncode:
        pytest.skip("no other /proc can be mounted here: it takes root")
    words = [sys.executable, "-c", HIDDEN, str(mine), f"{ended.pid} 1"]
    found = subprocess.run([*command, *words], capture_output=True, text=True)
    assert found.stdout == "[False, True]\n", found.stderr
    assert not leases._has_ended(str(mine))
    assert leases._has_ended(f"{os.getpid()} 1")  # its number, and another start


def test_an_end_does_not_wait_for_storage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leases, "_GOODBYE_S", 0.2)
    workspace = Workspace.open(tmp_path, IngestConfig())
    asked, answer = threading.Event(), threading.Event()

    def stuck(_: Lease) -> None:
        asked.set()
        answer.wait(30)

    with lease(workspace, NAME, seconds=0.2):
        monkeypatch.setattr(Lease, "_renew", stuck)
        assert asked.wait(10)
        began = time.monotonic()
    assert time.monotonic() - began < 5
    answer.set()
