"""Full runs that are struck down at random moments, and what is left of them after a rerun.

    python tests/faults/rounds.py --rounds 100 --seed 1 --log rounds.jsonl      # hours
    python tests/faults/rounds.py --rounds 20 --server http://127.0.0.1:18333   # on an S3 server of one's own

Each round runs the whole pipeline on simulated captures, in a new workspace on S3, and kills one of: the
driver, a worker of Ray, the raylet, the S3 server. The moment is a stage of the run and some seconds after
it has begun, both by chance (seeded). The server that is killed is the proxy before the real one, whose
requests in flight are lost, and it comes back after some seconds: what an outage of a store looks like that
does not lose what it has acknowledged. Then the run is started again until it says that it is done, and all
tables are compared with those of an undisturbed run: row for row, every column, and with the embeddings
the trained model too.

A process of Ray that outlives its driver is counted, and killed by its number.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

import polars as pl

sys.path.insert(0, str(Path(__file__).parent.parent))
import servers
from processes import below, command_of, kill, started
from tiny import KEYS, TINY

from rayscan.simulate import simulate_to
from rayscan.tables import Workspace

VICTIMS = ("driver", "worker", "raylet", "server")
STAGES = ("ingest", "sequences", "train", "embed", "cluster", "campaigns", "evaluate", "report")
LASTS_S = {"ingest": 12.0, "train": 25.0, "embed": 8.0}
"""Within how many seconds of a stage it is struck; 2 for the others."""
SETTINGS = (
    *TINY, "train.checkpoint_every=3", "evaluate.bootstrap=0", "resources.local_cpus=4",
    "resources.object_store_mb=100",
)  # fmt: skip
_OWN = {"captures": ["modified"]}  # of the copy in the bucket, not of the content
_SUMS = (
    "cohesion",
)  # added in the order in which threads come: the last bits differ in undisturbed runs too
_DRIVER_S, _ATTEMPTS = 900.0, 4


@dataclass
class Round:
    """What happened in one round."""

    number: int
    victim: str
    stage: str  # at whose beginning the clock was started
    after_s: float
    struck: str = "nothing: it was over"
    codes: list[int] = field(default_factory=list)  # exit codes of the struck run and of the reruns
    left_over: int = 0  # processes of Ray that outlived their driver by ten seconds
    said: list[str] = field(default_factory=list)  # last words of those that failed
    different: list[str] = field(default_factory=list)  # tables
    seconds: float = 0.0


class Site:
    """Captures in a bucket, and the tables that an undisturbed run makes of them."""

    def __init__(self, server: str, folder: Path) -> None:
        self.server, self.folder = server, folder
        self.bucket = servers.new_bucket(server)
        made = simulate_to(folder / "telescope", months=2, sources=200, flows=12_000, seed=5)
        for path in sorted(made.captures.iterdir()):
            servers.client(server).upload_file(str(path), self.bucket, f"captures/{path.name}")
        self.port = servers.free_port()
        self.environment = {**os.environ, **servers.settings(f"http://127.0.0.1:{self.port}")}
        self.proxy = self.serve()
        self.expected: dict[str, pl.DataFrame] = {}

    def serve(self) -> subprocess.Popen[bytes]:
        command = [sys.executable, str(servers.PROXY), self.server, str(self.port), str(self.folder / "log")]
        return servers.start(*command, port=self.port)

    def run(self, name: str) -> subprocess.Popen[str]:
        sets = [*SETTINGS, f"captures.paths=s3://{self.bucket}/captures"]
        words = ["run", "-w", f"s3://{self.bucket}/{name}", "--preset", "quick"]
        words += [word for one in sets for word in ("--set", one)]
        return subprocess.Popen(
            [sys.executable, "-m", "rayscan", *words],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            env={**self.environment, "PYTHONUNBUFFERED": "1"},
        )

    def tables(self, name: str) -> dict[str, pl.DataFrame]:
        workspace = Workspace.open(f"s3://{self.bucket}/{name}")
        found = {}
        for table, keys in KEYS.items():
            rows = pl.from_arrow(workspace.table(table).read())
            assert isinstance(rows, pl.DataFrame)
            rows = rows.drop(_OWN.get(table, [])).sort(keys)
            exact = [pl.col(name).round(9) for name in _SUMS if name in rows.columns]
            found[table] = rows.with_columns(exact)
        return found


@contextmanager
def site(server: str | None) -> Iterator[Site]:
    """A site with an undisturbed run, on the S3 server at this endpoint or on one of its own."""
    with tempfile.TemporaryDirectory() as folder, _server(server) as endpoint:
        made = Site(endpoint, Path(folder))
        before = {name: os.environ.get(name) for name in servers.settings("")}
        os.environ.update(servers.settings(endpoint))
        try:
            process = made.run("undisturbed")
            _, said = process.communicate(timeout=_DRIVER_S)
            assert process.returncode == 0, said
            made.expected = made.tables("undisturbed")
            yield made
        finally:
            made.proxy.kill()
            made.proxy.wait()
            for name, value in before.items():
                os.environ.pop(name) if value is None else os.environ.update({name: value})


@contextmanager
def _server(given: str | None) -> Iterator[str]:
    if given is not None:
        yield given
        return
    with servers.s3_server() as endpoint:
        yield endpoint


def play(site: Site, number: int, chance: random.Random, victim: str, stage: str) -> Round:
    """One round, to its comparison."""
    began = time.monotonic()
    done = Round(number, victim, stage, round(chance.uniform(0, LASTS_S.get(stage, 2.0)), 2))
    name = f"round-{number}"
    process = site.run(name)
    tree: dict[int, str] = {}
    if _reaches(process, stage):
        time.sleep(done.after_s)
        tree = {pid: started(pid) for pid in below(process.pid)}
        done.struck = _strike(site, process, sorted(tree), victim, chance)
    _end(process, done)
    done.left_over = _left_over(tree)
    for _ in range(_ATTEMPTS):
        if done.codes[-1] == 4:
            break
        _end(site.run(name), done)
    found = site.tables(name)
    done.different = [table for table, rows in site.expected.items() if not rows.equals(found[table])]
    done.seconds = round(time.monotonic() - began, 1)
    return done


def _reaches(process: subprocess.Popen[str], stage: str) -> bool:
    """Wait for the stage before to end; False if the process ended first."""
    if stage == STAGES[0]:
        return True
    before = STAGES[STAGES.index(stage) - 1]
    assert process.stderr
    return any(line.startswith(f"{before}: ") and line.endswith("s)\n") for line in process.stderr)


def _strike(
    site: Site, process: subprocess.Popen[str], tree: list[int], victim: str, chance: random.Random
) -> str:
    """Kill the victim; what it was, for people."""
    if process.poll() is not None:
        return "nothing: it was over"
    if victim == "driver":
        kill(process.pid)
        return victim
    if victim == "server":
        kill(site.proxy.pid)
        site.proxy.wait()
        time.sleep(chance.uniform(1, 8))
        site.proxy = site.serve()
        return victim
    sign = "raylet/raylet" if victim == "raylet" else "ray::"
    there = [pid for pid in tree if sign in command_of(pid)]
    if not there:
        return f"nothing: no {victim} yet"
    pid = chance.choice(there)
    what = command_of(pid).split("\0")[0].rpartition("/")[2][:40]
    kill(pid)
    return what


def _end(process: subprocess.Popen[str], done: Round) -> None:
    """Note its exit code; a process that goes on for ever is killed, and that is code -99."""
    try:
        _, said = process.communicate(timeout=_DRIVER_S)
        done.codes.append(process.returncode)
    except subprocess.TimeoutExpired:
        kill(process.pid, *below(process.pid))
        _, said = process.communicate()
        done.codes.append(-99)
    if done.codes[-1] not in (0, 4):
        done.said.append(" ".join(said.split())[-300:])


def _left_over(tree: dict[int, str]) -> int:
    deadline = time.monotonic() + 10
    while alive := [pid for pid, when in tree.items() if "ray" in command_of(pid) and started(pid) == when]:
        if time.monotonic() > deadline:
            break
        time.sleep(0.5)
    kill(*alive)
    return len(alive)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--log", type=Path, default=Path("rounds.jsonl"))
    parser.add_argument("--server", help="endpoint of an S3 server; without it, one is started")
    given = parser.parse_args()
    chance = random.Random(given.seed)
    tally: Counter[str] = Counter()
    with site(given.server) as place, given.log.open("a", buffering=1) as log:
        for number in range(given.rounds):
            done = play(place, number, chance, chance.choice(VICTIMS), chance.choice(STAGES))
            log.write(json.dumps(asdict(done)) + "\n")
            tally["rounds"] += 1
            tally["struck"] += not done.struck.startswith("nothing")
            tally["equal"] += not done.different
            tally["hung"] += -99 in done.codes
            print(json.dumps(asdict(done)), dict(tally), flush=True)
    sys.exit(tally["equal"] != tally["rounds"] or tally["hung"] > 0)


if __name__ == "__main__":
    main()
