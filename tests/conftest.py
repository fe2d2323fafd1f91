"""What tests share: one local Ray for all of them, and the place of the real captures."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

from rayscan.config import ResourcesConfig

settings.register_profile("ours", deadline=None)  # how long an example takes says how busy the machine is
settings.load_profile("ours")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
for name in [n for n in os.environ if n.startswith("RAYSCAN_") and n != "RAYSCAN_DATA"]:
    del os.environ[name]  # a developer's own settings must not reach the tests


@pytest.fixture(scope="session")
def ray_session() -> Iterator[None]:
    """A local Ray, started once."""
    from rayscan.stages.session import session

    with session(ResourcesConfig(local_cpus=4, object_store_mb=300)):
        yield


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real captures; tests that ask for it skip where there is none."""
    place = os.environ.get("RAYSCAN_DATA")
    if not place:
        pytest.skip("RAYSCAN_DATA does not name the folder of real captures")
    return Path(place)


@pytest.fixture(scope="session")
def s3_server() -> Iterator[str]:
    """Endpoint of an S3 server of its own process (deltalake keeps the interpreter lock in requests)."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        for _ in range(150):
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                break
            time.sleep(0.2)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.kill()
        server.wait()


@pytest.fixture
def s3_prefix(s3_server: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """A fresh s3://bucket/prefix, with the usual environment variables set for it."""
    settings = {
        "AWS_ENDPOINT_URL": s3_server,
        "AWS_ACCESS_KEY_ID": "testing",
        "AWS_SECRET_ACCESS_KEY": "testing",
        "AWS_REGION": "us-east-1",
    }
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    import boto3

    bucket = f"rayscan-{uuid.uuid4().hex[:12]}"
    boto3.client("s3", endpoint_url=s3_server, region_name="us-east-1").create_bucket(Bucket=bucket)
    return f"s3://{bucket}/prefix"


@pytest.fixture(params=["file", "s3"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Where a workspace may lie: the same test on a folder and on object storage."""
    if request.param == "file":
        return str(tmp_path / "ws")
    return str(request.getfixturevalue("s3_prefix"))
