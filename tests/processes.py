"""Processes that tests start: what is below them, and how to end them for real."""

from __future__ import annotations

import os
import signal
from pathlib import Path


def started(pid: int) -> str:
    """When it was started, which tells it from a later one of its number; "" once it is gone."""
    stat = _stat(pid)
    return stat[19] if stat else ""


def _stat(pid: int) -> list[str]:
    """What follows its name in /proc/PID/stat; nothing once it is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []


def below(pid: int) -> list[int]:
    """All processes below this one."""
    parents: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and (stat := _stat(int(entry.name))):
            parents.setdefault(int(stat[1]), []).append(int(entry.name))
    found = list(parents.get(pid, []))
    for one in found:
        found += parents.get(one, [])
    return found


def command_of(pid: int) -> str:
    """Its command line, "" once it is gone."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_text()
    except OSError:
        return ""


def kill(*pids: int) -> None:
    """SIGKILL, which nobody can catch; what is gone already is left alone."""
    for pid in pids:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue


def kill_tree(pid: int) -> None:
    kill(pid, *below(pid))
