"""Ray itself: joining a cluster or starting a local one, and running tasks with bounded queues.

A local Ray gets at least four logical CPUs whatever the machine has, because Ray Data and Ray Train hang
when actors hold all of them (docs/ray.md). Its dashboard stays off: it would be one more open port.

A task whose process dies is tried again, a few times: a machine may have been taken away. Then the task is
given up and named, since what kills a process each time (a poisonous file, too little memory) would go on
doing so for ever.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import ray
from ray.exceptions import OutOfMemoryError, RayTaskError, WorkerCrashedError

from rayscan.config import ResourcesConfig
from rayscan.errors import ConfigError, RayscanError, TaskDied

T = TypeVar("T")
R = TypeVar("R")
_TASKS_PER_CPU = 2  # queued and running, so that no CPU waits for the driver
_RETRIES = 3


@contextmanager
def session(resources: ResourcesConfig, address: str | None = None) -> Iterator[None]:
    """Ray for the time of the block: the one that runs, the cluster at `address`, or a local one.

    `address` (or RAY_ADDRESS) as `ray.init` takes it. A Ray that was started here is stopped at the end.
    """
    if ray.is_initialized():
        yield
        return
    address = address or os.environ.get("RAY_ADDRESS")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_task_oom_retries", str(_RETRIES))  # Ray's own default is: for ever
    options: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False}
    if address:
        options["address"] = address
    else:
        cores = len(os.sched_getaffinity(0))
        options |= {
            "num_cpus": resources.local_cpus or max(cores, 4),
            "include_dashboard": False,
            "object_store_memory": resources.object_store_mb * 2**20,
        }
    if address:
        _check_reachable(address)
    _start(options)
    try:
        yield
    finally:
        ray.shutdown()


def _start(options: dict[str, Any]) -> None:
    """`ray.init`, which raises all kinds of errors and takes SIGTERM for itself: that is given back."""
    handler = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(**options)
    except Exception as error:
        ray.shutdown()
        what = "join the Ray cluster" if "address" in options else "start Ray on this machine"
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


def share_of_cores(asked: int, workers: int, cpus: float) -> int:
    """Threads for each of `workers` processes: as asked; else on a single machine its cores shared out.

    On a cluster a process keeps to the CPUs that it has reserved.
    """
    if asked:
        return asked
    return max(1, len(os.sched_getaffinity(0)) // workers if single_machine() else int(cpus))


def check_room(cpus: float, gpus: float, processes: int = 1) -> None:
    """Raise ConfigError if so many processes can never run at once: Ray would wait for ever, without a word.

    A cluster may grow, so only a single machine is asked.
    """
    have = ray.cluster_resources()
    for name, each in (("CPU", cpus), ("GPU", gpus)):
        if single_machine() and each * processes > have.get(name, 0):
            raise ConfigError(
                f"{processes} processes with {each:g} {name} each (resources.*) do not fit: this Ray has "
                f"{have.get(name, 0):g} {name}; ask for less, or set resources.local_cpus"
            )


def single_machine() -> bool:
    return len(ray.nodes()) == 1


def cluster_cpus() -> int:
    return int(ray.cluster_resources().get("CPU", 1))


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
) -> Iterator[tuple[T, R]]:
    """Run `function(item)` for every item as a Ray task and yield (item, result).

    With `shared`, tasks get it as a second argument; it travels to each machine once. Results come as they
    finish, or with `ordered` in the order of the items. No more tasks are in flight than keep the CPUs busy,
    so neither a long list nor slow commits fill the memory. A lost worker's task runs again (up to three
    times), then TaskDied is raised. A RayscanError in a task is raised here as itself. With `failed`, what
    that makes of the item and either error is the result instead. With `fresh` no process does two items.
    """
    options: dict[str, Any] = {"num_cpus": cpus, "max_retries": _RETRIES, "name": _name(function)}
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
    limit = max(2, int(_TASKS_PER_CPU * cluster_cpus() / max(cpus, 1)))
    running: dict[Any, T] = {}
    try:
        while True:
            while len(running) < limit and (item := next(waiting, _END)) is not _END:
                running[task.remote(item, *more)] = item
            if not running:
                return
            ready = next(iter(running)) if ordered else ray.wait(list(running), num_returns=1)[0][0]
            item = running.pop(ready)
            try:
                result = fetch(ready)
            except RayscanError as error:
                if failed is None:
                    raise
                result = failed(item, error)
            yield item, result
    finally:
        for reference in running:  # not by force: in 2.60 that can abort the driver when a task just ends
            ray.cancel(reference)


_END: Any = object()


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
    except OutOfMemoryError as error:
        raise TaskDied(
            f"the machine ran out of memory {_RETRIES + 1} times: {' '.join(str(error).split())[:200]}. Let "
            "fewer tasks run at once (resources.*_cpus, resources.ingest_memory_mb)"
        ) from None
    except WorkerCrashedError:
        raise TaskDied(
            f"the process that worked on it died {_RETRIES + 1} times, killed or by a crash in a library; "
            "Ray's logs may say why (docs/ray.md)"
        ) from None
