"""The jobs as an operator runs them: submitted to a real head node, followed, killed, submitted again."""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from ray.job_submission import JobSubmissionClient
from servers import free_port
from tiny import TINY

from rayscan.simulate import simulate_to
from rayscan.tables import Workspace

ROOT = Path(__file__).parent.parent
SETTINGS = (*TINY, "train.validate_every=100", "train.checkpoint_every=2", "evaluate.bootstrap=0")
ENDED = {"SUCCEEDED", "FAILED", "STOPPED"}


def until(look: Callable[[], Any], seconds: float = 600) -> Any:
    """What `look` finds, as soon as it finds something."""
    deadline, trouble = time.monotonic() + seconds, None
    while time.monotonic() < deadline:
        try:
            if found := look():
                return found
        except OSError as error:  # of urllib and requests: the head is busy
            trouble = error
        time.sleep(0.3)
    raise AssertionError(f"it did not come in time: {trouble}")


class Head:
    """A head node of its own with the Jobs API, a token, and two GPUs that are not there."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder  # a short path: sockets lie below it
        port, agent, self.dashboard, self.metrics = (free_port() for _ in range(4))
        token = secrets.token_hex(32)
        (folder / "token").write_text(token)
        self.headers = {"Authorization": f"Bearer {token}"}
        environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith("RAY_")},
            "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(folder / "token"),
            "RAY_metrics_report_interval_ms": "200", "OMP_NUM_THREADS": "1",
            "RAY_JOB_STOP_WAIT_TIME_S": "30",  # as in cluster.yaml
        }  # fmt: skip
        command = [
            *(
                str(Path(sys.executable).parent / "ray"),
                "start",
                "--head",
                "--block",
                "--disable-usage-stats",
            ),
            *(f"--port={port}", "--node-ip-address=127.0.0.1", "--dashboard-host=127.0.0.1"),
            *(f"--dashboard-port={self.dashboard}", f"--metrics-export-port={self.metrics}"),
            f"--dashboard-agent-listen-port={agent}",  # another head on this machine may have the usual one
            *(
                "--num-cpus=4",
                "--num-gpus=2",
                "--object-store-memory=150000000",
                f"--temp-dir={folder / 'r'}",
            ),
        ]
        with (folder / "log").open("w") as log:
            self.process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
        self.client: JobSubmissionClient = until(self._connect)

    def _connect(self) -> JobSubmissionClient | None:
        assert self.process.poll() is None, (self.folder / "log").read_text()
        try:
            return JobSubmissionClient(f"http://127.0.0.1:{self.dashboard}", headers=self.headers)
        except (ConnectionError, RuntimeError):
            return None

    def stop(self) -> None:
        for pid in descendants(self.process.pid):
            kill(pid)
        self.process.wait()

    def submit(self, script: str, *words: str) -> str:
        environment = {"PYTHONUNBUFFERED": "1"}
        runtime = {"working_dir": str(ROOT), "excludes": ["tests", "docs"], "env_vars": environment}
        entrypoint = " ".join([sys.executable, f"jobs/{script}.py", *words])

        def attempt() -> str | None:
            try:
                return str(self.client.submit_job(entrypoint=entrypoint, runtime_env=runtime))
            except RuntimeError as error:
                if "No available agent" not in str(error):  # it is not up yet
                    raise
                return None

        return str(until(attempt))

    def follow(self, job: str) -> tuple[int | None, str]:
        """Wait for the job's end; its exit code and its log."""
        until(lambda: self.client.get_job_status(job) in ENDED)
        return self.client.get_job_info(job).driver_exit_code, self.client.get_job_logs(job)

    def get(self, port: int, path: str) -> str:
        request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", headers=self.headers)
        with urllib.request.urlopen(request, timeout=20) as answer:
            return str(answer.read().decode())


def descendants(pid: int) -> list[int]:
    listed = subprocess.run(["ps", "-eo", "pid=,ppid="], capture_output=True, text=True, check=True).stdout
    pairs = [tuple(map(int, line.split())) for line in listed.splitlines()]
    found = [pid]
    for one in found:
        found += [child for child, parent in pairs if parent == one]
    return found


def kill(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    folder = Path(tempfile.mkdtemp(prefix="rs-"))
    started = Head(folder)
    try:
        yield started
    finally:
        started.stop()
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with captures and settings; the workspace will be `ws`."""
    folder = tmp_path_factory.mktemp("site")
    captures = simulate_to(folder, months=1, sources=250, flows=10_000, seed=5).captures
    sections: dict[str, dict[str, Any]] = {"captures": {"paths": [str(captures)]}}
    for item in SETTINGS:
        section, _, rest = item.partition(".")
        key, _, value = rest.partition("=")
        sections.setdefault(section, {})[key] = json.loads(value)
    (folder / "site.yaml").write_text(json.dumps(sections))
    return folder


def words(site: Path, *sets: str) -> list[str]:
    given = ["--config", str(site / "site.yaml"), "--preset", "quick", "--workspace", str(site / "ws")]
    return given + [word for one in sets for word in ("--set", one)]


def outcome(site: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((site / "ws/runs/main/run.json").read_text())
    return found


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_month_by_jobs(head: Head, site: Path) -> None:
    """All five scripts in turn; each exit code, log and record is that of the command."""
    code, log = head.follow(head.submit("cluster", *words(site)))
    assert (code, outcome(site)["status"]) == (1, "failed")
    assert "these settings have no trained model yet" in log and "Traceback" not in log
    assert outcome(site)["error"].startswith("DataError")

    code, log = head.follow(head.submit("ingest", *words(site, "resources.ingest_memory_mb=200")))
    assert code == 0, log
    settings, _, rest = log.partition("settings ")
    assert f"paths:\n  - {site}" in settings
    assert rest.startswith(outcome(site)["config_hash"])
    assert re.search(r"ingest: captures 1, .*flows 10,000", rest)
    assert outcome(site)["stages"]["ingest"]["flows"] == 10_000
    assert required(head, "ingest") == {"CPU": 1.0, "memory": 200.0 * 2**20}

    long = "train.steps=600"
    job = head.submit("train", *words(site, long))
    until(lambda: re.search(r"train: [1-9]\d* of 600", head.client.get_job_logs(job)))
    (driver,) = (pid for pid in descendants(head.process.pid) if is_driver(pid, "jobs/train.py"))
    kill(driver)
    assert head.follow(job)[0] != 0
    assert outcome(site)["status"] == "running"  # it could not say otherwise
    seldom = words(site, long, "train.checkpoint_every=600")  # any further one is of a stop
    job = head.submit("train", *seldom)
    until(lambda: "going on from step" in head.client.get_job_logs(job))
    assert head.client.stop_job(job)
    _, log = head.follow(job)
    assert head.client.get_job_status(job) == "STOPPED"
    assert "took over from" in log
    assert (outcome(site)["status"], outcome(site)["exit_code"]) == ("stopped", 143)
    killed_at = step_begun_at(log)
    code, log = head.follow(head.submit("train", *seldom))
    assert code == 0, log
    assert 2 <= killed_at < step_begun_at(log) < 600, "the stopped job has left a checkpoint"

    job = head.submit("reprocess", *words(site, long, "resources.embed_gpus=0.5", "resources.cluster_cpus=2"))
    until(lambda: exports(head, "lag_seconds"))  # it ends with the job
    assert head.follow(job)[0] == 0, head.client.get_job_logs(job)
    assert (site / "ws/runs/main/changes.json").exists()
    assert required(head, "_Embedder", "actors") == {"CPU": 1.0, "GPU": 0.5}
    assert required(head, "cluster") == {"CPU": 2.0}
    clusters = until(lambda: exports(head, "clusters_total"))
    assert clusters == len(set(Workspace.open(site / "ws").table("clusters").read()["cluster"].to_pylist()))
    assert exports(head, "flows_total") == 10_000
    sequences = exports(head, "sequences_total")
    assert sequences and exports(head, "pairs_total") == sequences * (sequences - 1) / 2
    assert exports(head, "rejects_total") is None  # nothing was rejected

    assert head.follow(head.submit("cluster", *words(site, long)))[0] == 0
    assert (site / "ws/runs/main/report.html").exists()

    space = "'tune.space={train.learning_rate: {loguniform: [1e-4, 1e-2]}}'"
    code, log = head.follow(head.submit("sweep", *words(site, "tune.trials=2", "train.steps=4", space)))
    assert code == 0, log
    assert "the best of 2 trials" in log
    (sweep,) = (site / "ws/tuning").iterdir()
    assert json.loads((sweep / "run.json").read_text())["status"] == "done"


def step_begun_at(log: str) -> int:
    return int(re.findall(r"going on from step (\d+)", log)[0])


def is_driver(pid: int, script: str) -> bool:
    try:
        command = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return False
    return command[0].decode() == sys.executable and command[1:2] == [script.encode()]


def required(head: Head, name: str, kind: str = "tasks") -> dict[str, float]:
    """Resources that Ray was asked for, for the newest task or actor whose name has `name` in it."""
    rows = json.loads(head.get(head.dashboard, f"/api/v0/{kind}?detail=1&limit=1000"))["data"]["result"][
        "result"
    ]
    field = "class_name" if kind == "actors" else "name"
    found = [row["required_resources"] for row in rows if name in row[field]]
    assert found, sorted({row[field] for row in rows})
    asked: dict[str, float] = found[-1]
    return asked


def exports(head: Head, name: str) -> float | None:
    """The value of one of rayscan's metrics of run `main` at the endpoint for Prometheus."""
    text = head.get(head.metrics, "/metrics")
    found = re.search(rf'^ray_rayscan_{name}{{.*run="main".*}} (.+)$', text, re.MULTILINE)
    return float(found[1]) if found else None
