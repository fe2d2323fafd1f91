"""S3 servers that tests start, each a process: deltalake keeps the interpreter lock in requests."""

from __future__ import annotations

import contextlib
import json
import os
import random
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import boto3

PROXY = Path(__file__).parent / "s3_proxy.py"
KEYS = {"AWS_ACCESS_KEY_ID": "testing", "AWS_SECRET_ACCESS_KEY": "testing", "AWS_REGION": "us-east-1"}


def free_port() -> int:
    """A free one that neither the system gives to whoever asks for any, nor Ray to its workers."""
    for port in random.SystemRandom().sample(range(20_000, 32_000), 100):
        with contextlib.suppress(OSError), socket.socket() as probe:
            probe.bind(("127.0.0.1", port))
            return port
    raise RuntimeError("no port is free")


def start(*command: str, port: int) -> subprocess.Popen[bytes]:
    """The process, once something listens at the port."""
    process = subprocess.Popen([*command], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline and process.poll() is None:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
            return process
        time.sleep(0.1)
    process.kill()
    raise RuntimeError(f"nothing listens at {port}: {command}")


@contextmanager
def s3_server() -> Iterator[str]:
    """Endpoint of an S3 server: an empty one, or that of TEST_S3_ENDPOINT with the environment's keys."""
    given = os.environ.get("TEST_S3_ENDPOINT")
    if given:
        yield given
        return
    port = free_port()
    process = start(sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port), port=port)
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        process.kill()
        process.wait()


@contextmanager
def proxy(server: str, log: Path, *options: str, port: int | None = None) -> Iterator[str]:
    """Endpoint of a proxy before the server; `options` say which requests it fails (see s3_proxy.py)."""
    port = port or free_port()
    process = start(sys.executable, str(PROXY), server, str(port), str(log), *options, port=port)
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        process.kill()
        process.wait()


def settings(endpoint: str) -> dict[str, str]:
    """The environment that leads to a server."""
    own = {} if "TEST_S3_ENDPOINT" in os.environ else KEYS
    return {**own, "AWS_ENDPOINT_URL": endpoint}


def new_bucket(endpoint: str) -> str:
    """Name of a bucket that was just made."""
    name = f"rayscan-{uuid.uuid4().hex[:12]}"
    client(endpoint).create_bucket(Bucket=name)
    return name


def client(endpoint: str) -> Any:
    keys = {name: os.environ.get(name, value) for name, value in KEYS.items()}
    return boto3.client(
        "s3",
        endpoint_url=endpoint,
        region_name=keys["AWS_REGION"],
        aws_access_key_id=keys["AWS_ACCESS_KEY_ID"],
        aws_secret_access_key=keys["AWS_SECRET_ACCESS_KEY"],
    )


def requests(log: Path) -> list[dict[str, Any]]:
    """What a proxy has written down: method, path, query, bytes, fault."""
    return [json.loads(line) for line in log.read_text().splitlines()]
