"""Training as a user meets it: what it leaves, going on from a model, models from elsewhere, ends, sweeps.

All tests share one Ray and one small workspace, which holds what training must cope with: sources with a
single sequence, a batch larger than all sources, empty buckets.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow.parquet as pq
import pytest
import torch
from click.testing import CliRunner, Result
from processes import below, command_of, kill, kill_tree
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from rayscan import config as configuration
from rayscan.cli import main
from rayscan.config import ModelConfig
from rayscan.model import artefact
from rayscan.model.encoder import Encoder
from rayscan.model.fit import TrainState, fit, separation
from rayscan.model.search import Trial
from rayscan.planning import settled, training_files
from rayscan.simulate import simulate_to
from rayscan.stages import tune
from rayscan.stages.feeding import read_validation
from rayscan.tables import Workspace

pytestmark = [pytest.mark.ray, pytest.mark.timeout(900)]

SETTINGS = [
    "ingest.n_buckets=40", "train.steps=6", "train.batch_sources=500", "train.validate_every=3",
    "train.checkpoint_every=2", "model.layers=1", "model.d_model=16", "model.d_ff=16", "model.heads=2",
    "model.counts=64", "split.validation_sources=0.3", "evaluate.bootstrap=5", "resources.local_cpus=4",
]  # fmt: skip


def rayscan(command: str, workspace: Path, *words: str, sets: tuple[str, ...] = ()) -> Result:
    settings = [part for one in (*SETTINGS, *sets) for part in ("--set", one)]
    line = [command, "-w", str(workspace), "--preset", "quick", *settings, *words]
    return CliRunner().invoke(main, line, catch_exceptions=False)


def settings(*sets: str) -> configuration.RunConfig:
    return configuration.load("quick", sets=[*SETTINGS, *sets], env={})


@pytest.fixture(scope="module")
def captures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("telescope")
    made = simulate_to(folder, months=2, sources=200, flows=8000, prefix="198.18.4.0/23", seed=3)
    return made.captures


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, captures: Path, ray_session: None) -> Path:
    workspace = tmp_path_factory.mktemp("trained") / "ws"
    for command in ("ingest", "sequences", "train"):
        done = rayscan(command, workspace, sets=(f"captures.paths={captures}",))
        assert done.exit_code == 0, done.stderr
    # Progress says how far, how fast and how well.
    last = next(line for line in done.stderr.splitlines() if line.startswith("train: 6 of 6 steps in"))
    assert all(word in last for word in ("steps/s", "loss", "separation"))
    return workspace


@pytest.fixture
def copy(trained: Path, tmp_path: Path) -> Path:
    subprocess.run(["cp", "-r", str(trained), str(tmp_path / "ws")], check=True)
    return tmp_path / "ws"


def model_of(workspace: Path) -> Path:
    """The newest model."""
    return max((workspace / "models").iterdir(), key=lambda folder: (folder / "config.json").stat().st_mtime)


def encoder_in(folder: Path) -> tuple[Encoder, artefact.Card]:
    return artefact.load(lambda name: (folder / name).read_bytes())


# ---------------------------------------------------------------------------------------------
# What training leaves
# ---------------------------------------------------------------------------------------------


def test_the_workspace_is_a_hard_one(trained: Path) -> None:
    """Else the tests here would not show what they are meant to."""
    opened = Workspace.open(trained)
    sequences = opened.table("sequences").read(columns=("src", "sequences"))
    assert 1 in sequences["sequences"].to_pylist()
    assert len(set(sequences["src"].to_pylist())) < 500
    assert len(opened.table("sequences").files()) < 2 * 40


def test_card_and_curve(trained: Path) -> None:
    folder = model_of(trained)
    card = json.loads((folder / "card.json").read_text())
    # The captures record source ports, and ICMP packets in another way than by code.
    inputs = json.loads((folder / "config.json").read_text())["model"]["inputs"]
    assert inputs == ["dst", "dst_port", "proto", "gap", "src_port"]
    assert card["prefixes"] == ["198.18.4.0/23"]
    assert card["data_from"].startswith("2024-01-01")
    assert card["data_to"].startswith("2024-02")
    assert "198.18.4.0/23" in (folder / "README.md").read_text()
    curve = pl.read_parquet(folder / "metrics.parquet")
    assert curve["step"].to_list() == [1, 2, 3, 4, 5, 6]
    assert curve.filter(pl.col("separation").is_not_null())["step"].to_list() == [3, 6]
    assert card["metrics"]["separation"] == curve["separation"].max()
    board = EventAccumulator(str(folder / "tensorboard"))
    board.Reload()
    told = {event.step: event.value for event in board.Scalars("loss")}
    assert told == pytest.approx(dict(curve.select("step", "loss").iter_rows()))
    assert [event.step for event in board.Scalars("separation")] == [3, 6]


# ---------------------------------------------------------------------------------------------
# Going on from a model
# ---------------------------------------------------------------------------------------------


def test_going_on_from_a_model_on_a_new_period(copy: Path) -> None:
    first = model_of(copy)
    weights = (first / "model.safetensors").read_bytes()
    sets = ("train.periods=2024-02", "train.steps=4", "model.d_model=32")  # the model's own size is taken
    done = rayscan("train", copy, "--from", first.name, sets=sets)
    assert done.exit_code == 0, done.stderr
    assert f"drift: model {first.name} separated unseen sources" in done.stderr
    second = model_of(copy)
    assert second != first
    assert (first / "model.safetensors").read_bytes() == weights

    opened, asked = Workspace.open(copy), settings("train.periods=2024-02")
    files = training_files(opened, asked)
    validation = read_validation(opened, settled(opened, asked, files), files)
    assert validation is not None
    drift = json.loads((second / "drift.json").read_text())
    old, new = encoder_in(first), encoder_in(second)
    assert drift["before"] == pytest.approx(separation(old[0], validation, "cpu"), abs=1e-6)
    assert drift["after"] == pytest.approx(separation(new[0], validation, "cpu"), abs=1e-6)
    assert drift["then"] == old[1].metrics["separation"]
    assert (drift["periods"], drift["same_split"]) == (["2024-02"], True)
    moved = [
        float((x - new[0].state_dict()[k]).abs().max()) for k, x in old[0].state_dict().items() if x.ndim == 2
    ]
    assert 0 < max(moved) < 0.1  # four small steps from where it began, not from elsewhere
    assert rayscan("train", copy, "--from", str(first), sets=sets).exit_code == 4  # by its path: the same


def test_a_start_of_another_architecture(copy: Path) -> None:
    sets = (f"train.start={model_of(copy).name}", "model.d_model=32")
    done = rayscan("train", copy, sets=sets)
    assert done.exit_code == 1
    assert "another architecture" in done.stderr
    assert "d_model 16, not 32" in done.stderr
    done = rayscan("train", copy, sets=("train.start=0123456789abcdef",))
    assert done.exit_code == 1
    assert "there is no model" in done.stderr


# ---------------------------------------------------------------------------------------------
# A model from elsewhere
# ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory: pytest.TempPathFactory, captures: Path, ray_session: None) -> Path:
    """A workspace with sequences and no model."""
    workspace = tmp_path_factory.mktemp("elsewhere") / "ws"
    for command in ("ingest", "sequences"):
        assert rayscan(command, workspace, sets=(f"captures.paths={captures}",)).exit_code == 0
    return workspace


def test_a_model_folder_does_without_the_workspace_it_was_trained_in(
    trained: Path, elsewhere: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "taken"
    folder.mkdir()
    for name in ("model.safetensors", "config.json", "card.json", "README.md"):
        (folder / name).write_bytes((model_of(trained) / name).read_bytes())
    planned = rayscan("embed", elsewhere, "--model", str(folder), "--dry-run", "--json")
    assert sum(row["due"] for row in json.loads(planned.stdout)) > 0
    assert not (elsewhere / "models").exists()
    done = rayscan("run", elsewhere, "--model", str(folder), "--json")
    assert done.exit_code == 0, done.stderr
    assert list(json.loads(done.stdout)["stages"]) == ["embed", "cluster", "campaigns", "evaluate", "report"]
    embedded = rayscan("embed", trained)
    assert embedded.exit_code == 0
    found, expected = (
        pl.from_arrow(Workspace.open(w).table("embeddings").read(columns=("sequence_id", "vector")))
        for w in (elsewhere, trained)
    )
    assert isinstance(found, pl.DataFrame) and isinstance(expected, pl.DataFrame)
    assert found.sort("sequence_id").equals(expected.sort("sequence_id"))
    assert rayscan("run", elsewhere, "--model", str(folder)).exit_code == 4
    name = json.loads((folder / "config.json").read_text())["weights"][:16]
    assert rayscan("run", elsewhere, "--model", name).exit_code == 4
    status = CliRunner().invoke(main, ["status", "-w", str(elsewhere), "--json"])
    assert not any(row["due"] or row["stale"] for row in json.loads(status.stdout)["stages"])


def test_models_that_cannot_be_used(trained: Path, tmp_path: Path) -> None:
    damaged = tmp_path / "damaged"
    subprocess.run(["cp", "-r", str(model_of(trained)), str(damaged)], check=True)
    whole = (damaged / "model.safetensors").read_bytes()
    (damaged / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    cases = [
        (str(damaged), 1, f"{damaged}: model.safetensors is damaged"),
        (str(tmp_path), 2, "neither a model of"),
        ("0123456789abcdef", 2, "neither a model of"),
    ]
    (tmp_path / "cut").mkdir()
    (tmp_path / "cut" / "config.json").write_text('{"weights":')
    cases.append((str(tmp_path / "cut"), 1, "config.json is damaged"))
    before = sorted(str(path) for path in trained.rglob("*.safetensors"))
    for reference, code, message in cases:
        done = rayscan("embed", trained, "--model", reference)
        assert (done.exit_code, message in done.stderr) == (code, True), (reference, done.stderr)
    assert sorted(str(path) for path in trained.rglob("*.safetensors")) == before
    missing = rayscan("embed", trained, sets=("embed.model=0123456789abcdef",))
    assert missing.exit_code == 1
    assert "has no model 0123456789abcdef" in missing.stderr


def test_flows_that_lack_an_input_are_refused(captures: Path, tmp_path: Path, ray_session: None) -> None:
    few = tmp_path / "few"
    few.mkdir()
    source = pq.read_table(next(captures.glob("*.parquet")))
    keep = [name for name in source.column_names if name not in ("ttl", "size")]
    pq.write_table(source.select(keep), few / "flows.parquet")
    workspace, model = tmp_path / "ws", tmp_path / "model"
    model.mkdir()
    small = ModelConfig(inputs=("dst_port", "ttl"), d_model=16, layers=1, heads=2, d_ff=16, d_embedding=8)

    def write(name: str, data: bytes) -> None:
        (model / name).write_bytes(data)

    artefact.save(write, Encoder(small), artefact.Card())
    for command in ("ingest", "sequences"):
        assert rayscan(command, workspace, sets=(f"captures.paths={few}",)).exit_code == 0
    done = rayscan("embed", workspace, "--model", str(model))
    assert done.exit_code == 1
    assert "the model needs ttl" in done.stderr
    assert "do not record it" in done.stderr


# ---------------------------------------------------------------------------------------------
# Bad ends
# ---------------------------------------------------------------------------------------------


@contextmanager
def to_each_worker(deed: Callable[[int], Any]) -> Iterator[list[int]]:
    """Do this once to every training process as soon as it is seen; the process numbers."""
    done: list[int] = []
    over = threading.Event()

    def watch() -> None:
        while not over.wait(0.05):
            for pid in below(os.getpid()):
                if pid not in done and "RayTrainWorker" in command_of(pid):
                    with suppress(ProcessLookupError):
                        deed(pid)
                        done.append(pid)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield done
    finally:
        over.set()
        thread.join()


def test_a_worker_that_dies_every_time(copy: Path) -> None:
    with to_each_worker(kill) as killed:
        done = rayscan("train", copy, sets=("train.seed=1", "train.max_failures=1"))
    assert len(killed) >= 2
    assert done.exit_code == 1
    assert "training gave up after 1 restarts" in done.stderr
    assert "Run it again to go on from the last checkpoint" in done.stderr


def test_a_full_disk(copy: Path) -> None:
    """The kernel refuses every file over a kilobyte to the training process: no checkpoint fits."""
    with to_each_worker(lambda pid: resource.prlimit(pid, resource.RLIMIT_FSIZE, (1024, 1024))) as limited:
        done = rayscan("train", copy, sets=("train.seed=2", "train.max_failures=1"))
    assert limited
    assert done.exit_code == 1
    assert "File too large" in done.stderr
    assert str(copy) in done.stderr
    assert "Traceback" not in done.stderr


def test_an_error_of_one_of_two_workers_ends_both(copy: Path) -> None:
    """Only the first of them writes, and finds no room; the other would wait for it for ever."""
    began = time.monotonic()
    with to_each_worker(lambda pid: resource.prlimit(pid, resource.RLIMIT_FSIZE, (1024, 1024))) as limited:
        done = rayscan("train", copy, sets=("train.seed=2", "train.workers=2", "train.max_failures=2"))
    assert limited
    assert done.exit_code == 1
    assert "File too large" in done.stderr and "going on from step" not in done.stderr
    assert time.monotonic() - began < 250, "it did not wait for a collective to run out of time"


DIVERGING = ("train.learning_rate=1e30", "train.clip_norm=null", "train.warmup_steps=0")


@pytest.mark.parametrize(
    ("sets", "code", "message"),
    [
        (("train.periods=1999-01",), 1, "there are no sequences of 1999-01"),
        (("train.seed=3", "train.workers=9"), 2, "9 processes with 1 CPU each"),
        (DIVERGING, 1, "training diverged"),
    ],
)
def test_settings_that_cannot_be_trained_with(
    copy: Path, sets: tuple[str, ...], code: int, message: str
) -> None:
    done = rayscan("train", copy, sets=sets)
    assert done.exit_code == code
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert "going on from step" not in done.stderr  # what would come again is not tried again


# ---------------------------------------------------------------------------------------------
# Sweeps
# ---------------------------------------------------------------------------------------------

SPACE = "tune.space={train.learning_rate: {loguniform: [1e-4, 1e-2]}, model.heads: {choice: [1, 2, 4]}}"
SWEEP = (SPACE, "tune.trials=5", "tune.first_steps=2", "tune.reduction=2", "train.steps=8")


def test_a_sweep(copy: Path) -> None:
    planned = json.loads(rayscan("tune", copy, "--dry-run", sets=SWEEP).stdout)
    assert (planned["trials"], planned["rungs"], planned["steps_done"]) == (5, [2, 4, 8], 0)
    assert planned["steps"] == 5 * 2 + 3 * 2 + 2 * 4
    assert not (copy / "tuning").exists()
    done = rayscan("tune", copy, "--json", sets=SWEEP)
    assert done.exit_code == 0, done.stderr
    facts = json.loads(done.stdout)
    folder = Path(facts["config"]).parent
    rows = pl.read_parquet(facts["table"])
    assert sorted(rows["trial"]) == [0, 1, 2, 3, 4]
    assert sorted(rows["steps"]) == [2, 2, 4, 8, 8]
    assert rows["trial"][0] == facts["best_trial"]
    assert rows.filter(pl.col("steps") == 8)["separation"].max() == facts["separation"]
    page = Path(facts["page"]).read_text()
    assert "Sweep over settings" in page
    assert "<script src" not in page
    assert rayscan("tune", copy, sets=SWEEP).exit_code == 4
    # The best settings are a file for `train --config`, which comes to what the sweep has promised.
    line = ["train", "-w", str(copy), "--config", facts["config"]]
    assert CliRunner().invoke(main, line, catch_exceptions=False).exit_code == 0
    card = json.loads((model_of(copy) / "card.json").read_text())
    assert card["metrics"]["separation"] == pytest.approx(facts["separation"], abs=1e-4)
    assert not list(folder.rglob("*.safetensors"))


def test_a_trial_that_cannot_be_trained_is_one_trial(copy: Path) -> None:
    space = "tune.space={train.learning_rate: {choice: [1e30]}}"
    sets = (space, "tune.trials=2", "tune.first_steps=8", "train.steps=8", *DIVERGING[1:])
    done = rayscan("tune", copy, "--json", sets=sets)
    assert done.exit_code == 0, done.stderr
    facts = json.loads(done.stdout)
    assert (facts["best_trial"], facts["failed"]) == (0, 1)
    assert "training diverged" in pl.read_parquet(facts["table"])["error"][1]


def test_a_time_limit_ends_a_sweep_and_the_next_run_goes_on(copy: Path) -> None:
    sets = (*SWEEP, "tune.seed=1", "tune.concurrent=1", "train.steps=40000")
    began = time.monotonic()
    done = rayscan("tune", copy, "--json", sets=(*sets, "tune.minutes=0.3"))
    assert time.monotonic() - began < 300
    assert done.exit_code == 0, done.stderr
    assert json.loads(done.stdout)["status"] == "stopped by the time limit"
    assert json.loads(rayscan("tune", copy, "--dry-run", sets=sets).stdout)["steps_done"] > 0


@pytest.mark.slow
def test_a_killed_sweep_repeats_no_finished_rung(copy: Path) -> None:
    """Kill everything, for real; the results that were there are not touched again."""
    settings = [part for one in (*SETTINGS, *SWEEP, "tune.concurrent=1") for part in ("--set", one)]
    line = [sys.executable, "-m", "rayscan", "tune", "-w", str(copy), "--preset", "quick", *settings]
    process = subprocess.Popen(line, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 400
    while len(list(copy.glob("tuning/*/trials/???-?.json"))) < 2:
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.02)
    kill_tree(process.pid)
    process.wait()
    before = {path: path.stat().st_mtime_ns for path in copy.glob("tuning/*/trials/???-?.json")}
    assert not list(copy.glob("tuning/*/tune.json"))
    done = rayscan("tune", copy, "--json", sets=(*SWEEP, "tune.concurrent=1"))
    assert done.exit_code == 0, done.stderr
    assert json.loads(done.stdout)["status"] == "done"
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert len(list(copy.glob("tuning/*/trials/*.json"))) == 5 + 3 + 2


def test_a_rung_goes_on_from_its_last_checkpoint(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And comes to what it would have come to without the interruption."""
    workspace = Workspace.open(copy)
    settings = configuration.load("quick", sets=[*SETTINGS, *SWEEP], env={})
    files = training_files(workspace, settings)
    begun: list[int] = []

    def fit_from(*args: Any, start_state: TrainState | None, **options: Any) -> Any:
        begun.append(start_state.step if start_state else 0)
        return fit(*args, start_state=start_state, **options)

    def advance(folder: str, rung: int, until: int) -> tune.Result:
        job = tune._Job(workspace, folder, files, rung, until, 1, 0, float("inf"))
        found = tune._advance(job, Trial(0, {}, settings))
        assert found is not None
        return replace(found, seconds=0)

    monkeypatch.setattr(tune, "fit", fit_from)
    expected = advance("tuning/one", 0, 8)
    write = Workspace.write_json
    left = [2]

    def dying(self: Workspace, path: str, data: Any) -> None:
        write(self, path, data)
        left[0] -= 1
        if not left[0]:
            raise KeyboardInterrupt

    monkeypatch.setattr(Workspace, "write_json", dying)
    with pytest.raises(KeyboardInterrupt):
        advance("tuning/two", 0, 8)
    assert advance("tuning/two", 0, 8) == expected
    assert begun == [0, 0, 4]
    assert {path.name for path in (copy / "tuning/two/trials").iterdir()} == {"000-0.safetensors"}
    assert advance("tuning/two", 1, 8).loss is None, "there was nothing left to do"


def test_a_sweep_that_cannot_be(copy: Path, tmp_path: Path) -> None:
    for sets, message in [
        ((), "tune.space is empty"),
        (("tune.space={train.learning_rat: {choice: [1]}}",), "did you mean train.learning_rate?"),
        (("tune.space={train.learning_rate: {choice: [-1]}}",), "train.learning_rate cannot be -1"),
        (("tune.space={sequences.length: {choice: [8]}}",), "sequences.length cannot be swept"),
        (("tune.space={train.steps: {choice: [8]}}",), "trials would not be comparable"),
        (("tune.space={train.learning_rate: {uniform: [2, 1]}}",), "smaller number first"),
        (("tune.space={train.alpha: {uniform: [0, 1], choice: [1]}}",), "exactly one of"),
        (("tune.space={model.heads: {choice: [3, 5]}}",), "nothing to try"),
    ]:
        done = rayscan("tune", copy, sets=sets)
        assert (done.exit_code, message in done.stderr) == (2, True), done.stderr
    torch.manual_seed(0)
