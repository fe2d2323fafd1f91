"""Leases: who may work on a run, a model or a sweep, one process at a time, on any storage.

A lease is a row of the table `leases`. Taking, renewing and giving it back are commits that rest on the
version that was read, so of two takers one gets CommitConflict; that holds wherever commits are atomic, on a
folder and on object storage alike. The holder renews it from a thread. When its process has died, the next
taker on the same machine sees that at once; elsewhere the lease runs out.

Clocks decide nothing that could do harm. A holder trusts its own clock alone, one that nobody sets and that
goes on while the machine sleeps: if no renewal went through for as long as the lease runs, one must go
through before the next commit. A taker compares wall clocks and allows them SKEW_S of difference. Should a
clock be off by more than that, two processes may work at once; then their commits conflict (`tables.py`), as
they would without leases, and the later one ends without having changed anything. A lease saves work and
explains itself; what keeps tables whole are the commits.
"""

from __future__ import annotations

import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pyarrow as pa

from rayscan import schema
from rayscan.errors import CommitConflict, LeaseHeld, RayscanError
from rayscan.progress import say
from rayscan.tables import CommitInfo, Workspace, fingerprint, key_name

LEASE_S = 600.0
"""How long a lease runs without renewal, in seconds."""
SKEW_S = 60.0
"""Seconds by which clocks of two machines may differ."""
_RENEWALS = 4  # tries in the time of a lease
_GOODBYE_S = 10.0  # that a renewal in progress may take at the end: whoever is told to go must get away


@dataclass
class Lease:
    """A lease that this process holds, or has lost."""

    workspace: Workspace
    name: str
    seconds: float
    token: str = field(default_factory=lambda: uuid.uuid4().hex)
    taken: datetime = field(default_factory=lambda: datetime.now(UTC))
    version: int = -1  # of the table, as this holder last knew it
    until: float = 0.0  # by _clock
    lost: str = ""
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)  # renewals come one by one

    def check(self) -> None:
        """Raise CommitConflict if the lease is lost: what follows is somebody else's to do.

        One that has run out, because the machine slept or storage was away, is renewed if it can be: that
        rests on the version that this holder knows, so it goes through only if nobody had it meanwhile.
        """
        if not self.lost and _clock() > self.until:
            self._renew()
        if not self.lost and _clock() > self.until:
            self.lost = "it could not be renewed in time"
        if self.lost:
            raise CommitConflict(
                f"lost the lease {self.name} of {self.workspace.uri}: {self.lost}. What was committed stays"
            )

    def _take(self) -> None:
        self.version = self.workspace.table("leases").version()
        row = _row(self.workspace, self.name, self.version)
        if row is not None and _holds(row, datetime.now(UTC)):
            raise LeaseHeld(_held(self.workspace, self.name, row))
        try:
            self._write()
        except CommitConflict:
            raise LeaseHeld(f"another run has just begun on {self.name} in {self.workspace.uri}") from None
        if row is not None:
            say(f"took over from {row['owner']}, which ended without giving back its lease {self.name}")

    def _write(self) -> None:
        started, now = _clock(), datetime.now(UTC)
        machine, process = _here()
        row: dict[str, Any] = {
            "token": self.token,
            "owner": f"{socket.gethostname()}, process {os.getpid()}",
            "machine": machine,
            "process": process,
            "taken": self.taken,
            "renewed": now,
            "expires": now + timedelta(seconds=self.seconds),
        }
        self._replace([row])
        self.until = started + self.seconds

    def _replace(self, rows: list[dict[str, Any]]) -> None:
        table, key = self.workspace.table("leases"), {"name": self.name}
        files = [table.write(pa.Table.from_pylist(rows, schema.LEASES), key)] if rows else []
        done = {key_name(key): fingerprint(self.token, uuid.uuid4().hex)}
        self.version = table.replace([key], files, done, CommitInfo(self.token, ""), self.version)

    def _renew(self) -> None:
        """One try; a storage that is away for a moment is tried again, as long as the lease runs."""
        with self._lock:
            try:
                self._write_or_look()
            except (RayscanError, OSError) as error:
                say(f"the lease {self.name} could not be renewed yet: {error}")

    def _write_or_look(self) -> None:
        try:
            self._write()
        except CommitConflict:
            self.version = self.workspace.table("leases").version()
            row = _row(self.workspace, self.name, self.version)
            if row is None or row["token"] != self.token:
                self.lost = "it was given up" if row is None else f"{row['owner']} has taken it over"

    def _keep(self, done: threading.Event) -> None:
        while not done.wait(self.seconds / _RENEWALS) and not self.lost:
            self._renew()

    def _give_back(self) -> None:
        try:
            if not self.lost:
                self._replace([])
        except (RayscanError, OSError) as error:  # it runs out by itself
            say(f"the lease {self.name} could not be given back: {error}")


@contextmanager
def lease(workspace: Workspace, name: str, seconds: float = LEASE_S) -> Iterator[Lease]:
    """Hold the lease `name` for the time of the block. Raises LeaseHeld when another process has it."""
    held = Lease(workspace, name, seconds)
    held._take()
    done = threading.Event()
    thread = threading.Thread(target=held._keep, args=(done,), name=f"lease-{name}", daemon=True)
    thread.start()
    try:
        yield held
    finally:
        done.set()
        thread.join(_GOODBYE_S)
        if thread.is_alive():
            say(f"the lease {name} is left to run out: storage has not answered for {_GOODBYE_S:.0f} s")
        else:
            held._give_back()


def holders(workspace: Workspace) -> list[dict[str, Any]]:
    """Everybody who holds a lease now: name, owner, taken, renewed, expires."""
    rows: list[dict[str, Any]] = workspace.table("leases").read().to_pylist()
    now = datetime.now(UTC)
    return [
        {name: row[name] for name in ("name", "owner", "taken", "renewed", "expires")}
        for row in rows
        if _holds(row, now)
    ]


def names(workspace: Workspace) -> list[str]:
    """Names of all leases that stand in the table, those of the dead too."""
    return sorted(file.key["name"] for file in workspace.table("leases").files())


def end(workspace: Workspace, name: str) -> None:
    """Take a lease away from whoever holds it, who ends at the next look. Raises LeaseHeld on a race."""
    taken = Lease(workspace, name, 0.0)
    taken.version = workspace.table("leases").version()
    try:
        taken._replace([])
    except CommitConflict:
        raise LeaseHeld(f"the lease {name} was renewed just now; try again") from None


def _row(workspace: Workspace, name: str, version: int) -> dict[str, Any] | None:
    if version < 0:
        return None
    rows: list[dict[str, Any]] = workspace.table("leases").read({"name": name}, version=version).to_pylist()
    return rows[0] if rows else None


def _holds(row: dict[str, Any], now: datetime) -> bool:
    """Is the holder of this lease at work, as far as can be told from here?"""
    if row["machine"] == _here()[0] and _has_ended(row["process"]):
        return False
    expires: datetime = row["expires"]
    return now <= expires + timedelta(seconds=SKEW_S)


def _held(workspace: Workspace, name: str, row: dict[str, Any]) -> str:
    text = (
        f"{row['owner']} is at work on {name} in {workspace.uri} since {row['taken']:%Y-%m-%d %H:%M:%S} UTC; "
        f"it holds its lease until {row['expires']:%H:%M:%S}, and renews it"
    )
    if row["renewed"] > datetime.now(UTC) + timedelta(seconds=SKEW_S):
        ahead = (row["renewed"] - datetime.now(UTC)).total_seconds()
        text += f". Its clock is {ahead:,.0f} s or more ahead of this one: when the lease ends cannot be told"
    return f"{text}. If it is known to be dead: `rayscan unlock {name}`"


def _here() -> tuple[str, str]:
    """This machine, so far as process numbers are unique in it, and this process."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot} {Path('/proc/self/ns/pid').readlink()}", _process(os.getpid()) or ""


def _has_ended(process: str) -> bool:
    """Is this process of this machine gone? Not for certain while another user has its number, unseen."""
    pid = int(process.split()[0])
    hidden = False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except PermissionError:  # another user's, which /proc may hide (hidepid)
        hidden = True
    found = _process(pid)
    return not hidden if found is None else found != process


def _process(pid: int) -> str | None:
    """Number and start of a process, "" for what a dead one leaves behind; None where /proc shows none."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    fields = text.rpartition(")")[2].split()
    return "" if fields[0] in "ZX" else f"{pid} {fields[19]}"


def _clock() -> float:
    """Seconds that pass while the machine sleeps, too, and that nobody sets."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)
