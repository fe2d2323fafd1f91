"""What tests share: one local Ray for all of them, the place of the real captures, and their order."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import servers
from hypothesis import HealthCheck, settings

from rayscan.config import ResourcesConfig

settings.register_profile(  # how long an example takes says how busy the machine is
    "ours",
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("ours")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
# Of Ray's agents and log monitors, of which each Ray has its own: nobody looks at what they collect here.
os.environ.setdefault("REPORTER_UPDATE_INTERVAL_MS", "60000")
os.environ.setdefault("LOG_NAME_UPDATE_INTERVAL_S", "60")
for name in [n for n in os.environ if n.startswith("RAYSCAN_") and n != "RAYSCAN_DATA"]:
    del os.environ[name]  # a developer's own settings must not reach the tests


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Modules of slow tests come first, so that no process is left alone with one at the end."""
    marks: dict[Path, set[str]] = {}
    for item in items:
        marks.setdefault(item.path, set()).update(mark.name for mark in item.iter_markers())
    items.sort(key=lambda item: ("slow" not in marks[item.path], "ray" not in marks[item.path]))


@pytest.fixture(scope="session")
def ray_session() -> Iterator[None]:
    """A local Ray, started once."""
    from ray._private import worker

    from rayscan.stages.session import session

    # A thread of Ray prints what its machines tell, at any time: not into what a test at work prints.
    worker.print_to_stdstream = lambda data, ignore_prefix: print(
        *data["lines"], sep="\n", file=sys.__stderr__
    )
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
    """Endpoint of an S3 server."""
    with servers.s3_server() as endpoint:
        yield endpoint


@pytest.fixture
def s3_prefix(s3_server: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """A fresh s3://bucket/prefix, with the usual environment variables set for it."""
    for name, value in servers.settings(s3_server).items():
        monkeypatch.setenv(name, value)
    return f"s3://{servers.new_bucket(s3_server)}/prefix"


@pytest.fixture(params=["file", "s3"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Where a workspace may lie: the same test on a folder and on object storage."""
    if request.param == "file":
        return str(tmp_path / "ws")
    return str(request.getfixturevalue("s3_prefix"))
