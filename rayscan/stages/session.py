"""Ray itself: joining a cluster or starting a local one, and running tasks with bounded queues.

A local Ray gets at least four logical CPUs whatever the machine has, because Ray Data and Ray Train hang
when actors hold all of them (docs/ray.md). Its dashboard stays off: it would be one more open port.

A cluster may have no worker yet, or one of the twenty that it may grow to: it starts them for tasks that
wait. So on a cluster more tasks are in flight than it can run, what it has is looked up again while a stage
runs, and whatever does not fit is waited for. A local Ray has what it has, and what does not fit is an error.

A task whose process or machine dies is tried again, a few times: a machine may have been taken away. Then
the task is given up and named, since what kills a process each time (a poisonous file, too little memory)
would go on doing so for ever.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from typing import Any, TypeVar

import ray
from ray.exceptions import (
    LocalRayletDiedError,
    NodeDiedError,
    ObjectLostError,
    OutOfDiskError,
    OutOfMemoryError,
    RayActorError,
    RayError,
    RayTaskError,
    WorkerCrashedError,
)

from rayscan.config import ResourcesConfig
from rayscan.errors import ConfigError, RayscanError, TaskDied
from rayscan.progress import say

T = TypeVar("T")
R = TypeVar("R")
RETRIES = 3
"""How often work is tried again after its process or machine was lost."""
_TASKS_PER_CPU = 2  # queued and running, so that no CPU waits for the driver
_LOOK_EVERY_S = 1.0
_RAYLET_DIED = (
    "Ray on this machine has died, its raylet process, and with it all that ran. Run again to go on from "
    "what was committed; Ray's logs may say why (docs/ray.md)"
)


@dataclass(frozen=True)
class _Joined:
    """The Ray that this process is on. As it stands: one that was there before, of which nothing is known."""

    local: bool = False  # started by `session`: it has what this machine has, and never more
    in_flight: int = ResourcesConfig().in_flight


_joined = _Joined()


@contextmanager
def session(resources: ResourcesConfig, address: str | None = None) -> Iterator[None]:
    """Ray for the time of the block: the one that runs, the cluster at `address`, or a local one.

    `address` (or RAY_ADDRESS) as `ray.init` takes it. A Ray that was started here is stopped at the end. What
    is printed in the block goes to stderr: Ray prints what it hears of dead machines, and stdout is for data.
    """
    global _joined
    if ray.is_initialized():
        yield
        return
    address = address or os.environ.get("RAY_ADDRESS")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_task_oom_retries", str(RETRIES))  # Ray's own default is: for ever
    if not sys.stderr.isatty():
        os.environ.setdefault("RAY_COLOR_PREFIX", "0")  # what Ray says into a log has no colours
    options: dict[str, Any] = {
        "address": address or "local",  # without it Ray joins what somebody else has started on this machine
        "logging_level": logging.ERROR,
        "log_to_driver": False,
    }
    if not address:
        cores = len(os.sched_getaffinity(0))
        options |= {
            "num_cpus": resources.local_cpus or max(cores, 4),
            "include_dashboard": False,
            "object_store_memory": resources.object_store_mb * 2**20,
        }
    if address:
        _check_reachable(address)
    _start(options)
    _joined = _Joined(not address, resources.in_flight)
    with redirect_stdout(sys.stderr):
        try:
            yield
        finally:
            _joined = _Joined()
            ray.shutdown()


def _start(options: dict[str, Any]) -> None:
    """`ray.init`, which raises all kinds of errors and takes SIGTERM for itself: that is given back."""
    handler = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(**options)
    except Exception as error:
        ray.shutdown()
        what = "start Ray on this machine" if options["address"] == "local" else "join the Ray cluster"
        raise RayscanError(
            f"cannot {what}: {' '.join(str(error).split())[:300]}. Ray gives up after a time: is the machine "
            "overloaded, or short of memory or disk? Its logs may say (docs/ray.md)"
        ) from error
    if callable(handler):
        signal.signal(signal.SIGTERM, handler)


def _check_reachable(address: str) -> None:
    """Raise RayscanError at once where nobody listens; Ray itself would try for minutes without a word."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not port.isdigit():
        return  # "auto" and the like: Ray knows where to look
    try:
        socket.create_connection((host, int(port)), timeout=10).close()
    except OSError as error:
        raise RayscanError(f"cannot reach the Ray cluster at {address}: {error}") from None


def is_local() -> bool:
    """Was Ray started here, for this process alone? Then it never grows. A cluster may, from nothing."""
    return _joined.local


def share_of_cores(asked: int, workers: int, cpus: float) -> int:
    """Threads for each of `workers` processes: as asked; else of a local Ray the cores shared out.

    On a cluster a process keeps to the CPUs that it has reserved: the machine it will be on is not this one.
    """
    if asked:
        return asked
    return max(1, len(os.sched_getaffinity(0)) // workers if is_local() else int(cpus))


def check_room(cpus: float, gpus: float = 0, processes: int = 1, memory_mb: int = 0) -> None:
    """Raise ConfigError if so many processes can never run at once: Ray would wait for ever, without a word.

    That can be known of a local Ray alone; of one without any CPU RayscanError says that it has died. Of a
    cluster, which may grow, it is said what is waited for.
    """
    have = ray.cluster_resources()
    if is_local() and not have.get("CPU"):
        raise RayscanError(_RAYLET_DIED)
    for name, each, there, cure in (
        ("CPU", cpus, have.get("CPU", 0), "set resources.local_cpus"),
        ("GPU", gpus, have.get("GPU", 0), "compute without one (`device: cpu`)"),
        ("MB of memory", memory_mb, have.get("memory", 0) // 2**20, "reserve none (0)"),
    ):
        if each * processes <= there:
            continue
        asked = f"{processes} processes with {each:,.10g} {name} each (resources.*)"
        if is_local():
            raise ConfigError(
                f"{asked} do not fit: this Ray has {there:,.10g} {name}; ask for less, or {cure}"
            )
        say(f"waiting for the cluster to grow: {asked} are asked for, and it has {there:,.10g} {name} now")


def gpus_each(device: str, asked: float, processes: int = 1) -> float:
    """GPUs that each of so many processes of a stage reserves, by its `device` and what `resources` asks for.

    What is asked for is taken, and one for "cuda"; nothing for "cpu". "auto" takes what is asked for too, and
    where nothing is, one of a local Ray that has enough for all. A cluster's are taken by asking alone: its
    machines may be of many kinds, and Ray starts the ones that tasks ask for.
    """
    if device == "cpu":
        return 0
    if asked or device == "cuda":
        return asked or 1
    import torch  # takes a second, and most stages go without

    here = ray.cluster_resources().get("GPU", 0) if is_local() and torch.cuda.is_available() else 0
    return float(here >= processes)


def cluster_cpus() -> int:
    """CPUs of all machines that Ray has now."""
    return int(ray.cluster_resources().get("CPU", 0))


def run_tasks(
    function: Callable[..., R],
    items: Iterable[T],
    *,
    cpus: float = 1,
    gpus: float = 0,
    memory_mb: int = 0,
    ordered: bool = False,
    shared: Any = None,
    failed: Callable[[T, RayscanError], R] | None = None,
    fresh: bool = False,
    at_most: int | None = None,
) -> Iterator[tuple[T, R]]:
    """Run `function(item)` for every item as a Ray task and yield (item, result).

    With `shared`, tasks get it as a second argument; it travels to each machine once. Results come as they
    finish, or with `ordered` in the order of the items. No more tasks are in flight than keep the CPUs busy
    (on a cluster resources.in_flight at the least, for it to grow; `at_most` bounds both), so neither a long
    list nor slow commits fill the memory. A lost worker's task runs again (up to three times), then TaskDied
    is raised. A RayscanError in a task is raised here as itself. With `failed`, what that makes of the item
    and either error is the result instead. With `fresh` no process does two items.
    What a local Ray can never run is a ConfigError.
    """
    check_room(cpus, gpus, memory_mb=memory_mb)
    options: dict[str, Any] = {"num_cpus": cpus, "max_retries": RETRIES, "name": _name(function)}
    if gpus:
        options["num_gpus"] = gpus
    if memory_mb:
        options["memory"] = memory_mb * 2**20
    if fresh:
        options["max_calls"] = 1

    def work(*parts: Any) -> R:  # Ray takes functions only, not partial() and the like
        return function(*parts)

    task = ray.remote(**options)(work)
    more = () if shared is None else (ray.put(shared),)
    waiting = iter(items)
    room = _Room(cpus, at_most)
    running: dict[Any, T] = {}
    try:
        while True:
            while len(running) < room.now() and (item := next(waiting, _END)) is not _END:
                running[task.remote(item, *more)] = item
            if not running:
                return
            wanted = [next(iter(running))] if ordered else list(running)
            ready, _ = ray.wait(wanted, num_returns=1, timeout=_LOOK_EVERY_S)
            if not ready:
                continue  # a machine may have come, with room for more
            item = running.pop(ready[0])
            try:
                result = fetch(ready[0])
            except RayscanError as error:
                if failed is None:
                    raise
                result = failed(item, error)
            yield item, result
    finally:
        for reference in running:  # not by force: in 2.60 that can abort the driver when a task just ends
            ray.cancel(reference)


_END: Any = object()


class _Room:
    """How many tasks of so many CPUs to have in flight. What a cluster has is asked again now and then."""

    def __init__(self, cpus: float, at_most: int | None) -> None:
        self.cpus, self.at_most = cpus, at_most
        self.found, self.asked = 0, -_LOOK_EVERY_S

    def now(self) -> int:
        if not self.found or (not is_local() and time.monotonic() - self.asked > _LOOK_EVERY_S):
            self.found, self.asked = self._look(), time.monotonic()
        return self.found

    def _look(self) -> int:
        busy = max(2, int(_TASKS_PER_CPU * cluster_cpus() / max(self.cpus, 1)))
        wanted = busy if is_local() else max(busy, _joined.in_flight)
        return wanted if self.at_most is None else min(wanted, self.at_most)


def _name(function: Callable[..., Any]) -> str:
    """What Ray's dashboard calls a task: its stage and function, such as ingest.work."""
    inner = getattr(function, "func", function)  # of a partial
    return f"{inner.__module__.rpartition('.')[2]}.{inner.__name__}"


def fetch(reference: Any) -> Any:
    """The result behind a reference. Expected errors are raised as themselves, without Ray's wrapping."""
    try:
        return ray.get(reference)
    except RayTaskError as error:
        if isinstance(error.cause, RayscanError):
            raise error.cause from None
        raise
    except RayError as error:
        known = explained(error)
        if known is None:
            raise
        raise known from None


def explained(error: RayError) -> RayscanError | None:
    """What a death that Ray tells of means for people: TaskDied where it is that of one piece of work.

    None for an error that nobody expects: it keeps its trace.
    """
    text, tries = " ".join(str(error).split())[:200], f"{RETRIES + 1} times"
    if isinstance(error, LocalRayletDiedError):
        return RayscanError(_RAYLET_DIED)
    if isinstance(error, OutOfMemoryError):
        return TaskDied(
            f"the machine ran out of memory {tries}: {text}. Let fewer tasks run at once "
            "(resources.*_cpus, resources.*_memory_mb)"
        )
    if isinstance(error, OutOfDiskError):
        return TaskDied(
            f"a machine's disk is full, and Ray's shared memory with it: {text}. Make room where Ray spills "
            "to (docs/ray.md)"
        )
    if isinstance(error, WorkerCrashedError | RayActorError):
        return TaskDied(
            f"the process that worked on it died {tries}, killed or by a crash in a library; Ray's logs may "
            "say why (docs/ray.md)"
        )
    if isinstance(error, NodeDiedError | ObjectLostError):
        return TaskDied(
            f"the machine that worked on it, or had what it had made, was lost {tries}: {text}. Run again to "
            "go on; machines that are taken away less often may be needed (docs/cluster.md)"
        )
    return None
