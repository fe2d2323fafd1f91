"""A cluster of Ray that grows by itself, on this machine: a head that runs no task, and Ray's own autoscaler.

The autoscaler is the one of `ray up`; only its provider is Ray's fake one, whose machines are further raylets
here. They have one CPU each. They come for tasks that wait, and do not go.
"""

from __future__ import annotations

import json
import os
import secrets
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from processes import kill_tree
from servers import free_port

_HEAD = "f" * 51 + "00000"  # the fake provider knows the head by this number
_COMMANDS = (
    "initialization_commands", "setup_commands", "head_setup_commands", "worker_setup_commands",
    "head_start_ray_commands", "worker_start_ray_commands",
)  # fmt: skip


@dataclass(frozen=True)
class GrowingCluster:
    environment: dict[str, str]  # in which a driver finds it
    machines: int  # besides the head, when it is full-grown


@contextmanager
def growing_cluster(folder: Path, machines: int) -> Iterator[GrowingCluster]:
    """`folder` has a short path: sockets lie below it."""
    port = free_port()
    (folder / "token").write_text(secrets.token_hex(32))
    (folder / "cluster.json").write_text(json.dumps(_settings(port, machines)))
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("RAY_")},
        "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(folder / "token"), "OMP_NUM_THREADS": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
    }  # fmt: skip
    fake = {
        "RAY_FAKE_CLUSTER": "1", "RAY_OVERRIDE_NODE_ID_FOR_TESTING": _HEAD,
        "AUTOSCALER_UPDATE_INTERVAL_S": "1", "RAY_health_check_period_ms": "500",
    }  # fmt: skip
    command = [
        str(Path(sys.executable).parent / "ray"), "start", "--head", "--block", f"--port={port}",
        "--node-ip-address=127.0.0.1", "--include-dashboard=false", "--num-cpus=0",
        "--object-store-memory=100000000", f"--temp-dir={folder / 'r'}",
        f"--autoscaling-config={folder / 'cluster.json'}", f"--dashboard-agent-listen-port={free_port()}",
    ]  # fmt: skip
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(command, env={**environment, **fake}, stdout=log, stderr=log)
    try:
        _wait_for(process, port, folder / "log")
        yield GrowingCluster({**environment, "RAY_ADDRESS": f"127.0.0.1:{port}"}, machines)
    finally:
        kill_tree(process.pid)
        process.wait()


def _settings(port: int, machines: int) -> dict[str, object]:
    return {
        "cluster_name": "growing",
        "max_workers": machines,
        "idle_timeout_minutes": 60,
        "provider": {
            "type": "fake_multinode", "gcs_address": f"127.0.0.1:{port}", "head_node_id": _HEAD,
            "launch_multiple": True, "disable_node_updaters": True, "disable_launch_config_check": True,
            "foreground_node_launch": True,  # else it starts some again while they are still starting
        },
        "auth": {},
        "head_node_type": "ray.head.default",
        "available_node_types": {
            "ray.head.default": {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0},
            "worker": {
                "resources": {"CPU": 1, "object_store_memory": 80_000_000},
                "node_config": {},
                "max_workers": machines,
            },
        },
        "file_mounts": {}, "cluster_synced_files": [], "file_mounts_sync_continuously": False,
        **{name: [] for name in _COMMANDS},
    }  # fmt: skip


def _wait_for(process: subprocess.Popen[bytes], port: int, log: Path) -> None:
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline and process.poll() is None:
        try:
            return socket.create_connection(("127.0.0.1", port), 1).close()
        except OSError:
            time.sleep(0.2)
    raise RuntimeError(f"no head came up: {log.read_text()}")
