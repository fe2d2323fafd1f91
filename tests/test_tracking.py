"""Trackers are told every figure, need nothing in the settings, and never stop a training that runs."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from rayscan.errors import ConfigError
from rayscan.tracking import tracked

ROWS = [{"step": float(s), "loss": 1 / s} | ({"separation": 0.9} if s == 2 else {}) for s in (1, 2, 3)]
SETTINGS = {"train": {"steps": 3, "trackers": ["tensorboard"]}, "model": {"layers": 1}}


def absent(name: str) -> bool:
    return importlib.util.find_spec(name) is None


def test_tensorboard_gets_every_step(tmp_path: Path) -> None:
    with tracked(("tensorboard",), "m", SETTINGS, str(tmp_path / "deep" / "board")) as log:
        log(ROWS[:2])
        log(ROWS[2:])
    board = EventAccumulator(str(tmp_path / "deep" / "board"))
    board.Reload()
    assert [(e.step, e.value) for e in board.Scalars("loss")] == [
        (s, pytest.approx(1 / s)) for s in (1, 2, 3)
    ]
    assert [e.step for e in board.Scalars("separation")] == [2]


@pytest.mark.parametrize("name", ["mlflow", "wandb"])
def test_a_tracker_that_is_not_installed(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setitem(sys.modules, f"{name}.tracking", None)
    with (
        pytest.raises(ConfigError, match=rf"{name} is not installed.*rayscan\[{name}\]"),
        tracked((name,), "m", SETTINGS, str(tmp_path)),
    ):
        pass


def test_a_tracker_that_fails_midway_is_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "board").mkdir()
    with tracked(("tensorboard",), "m", SETTINGS, str(tmp_path / "board")) as log:
        log([{"step": 1.0, "loss": object()}])  # type: ignore[dict-item]
        log(ROWS)
    assert capsys.readouterr().err.count("tensorboard failed and is left out") == 1


def test_a_password_in_an_address_is_not_shown(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Of an error of somebody else's library, which may name the server it could not reach."""

    def refuse(*_: object) -> None:
        raise OSError("cannot reach https://user:s3cret@host.example/api")

    monkeypatch.setattr("rayscan.tracking._TensorBoard", refuse)
    with pytest.raises(ConfigError) as caught, tracked(("tensorboard",), "m", SETTINGS, str(tmp_path)):
        pass
    assert "https://host.example/api" in str(caught.value)
    assert "s3cret" not in str(caught.value)


# MLflow and wandb leave threads and settings behind: each in a process of its own.

_MLFLOW = """
from mlflow.tracking import MlflowClient
from rayscan.tracking import tracked
import sys; sys.path.insert(0, {tests!r})
from test_tracking import ROWS, SETTINGS
with tracked(("mlflow",), "model-1", SETTINGS, "") as log:
    log(ROWS)
try:
    with tracked(("mlflow",), "model-2", SETTINGS, "") as log:
        raise KeyError
except KeyError:
    pass
client = MlflowClient()
experiment = client.get_experiment_by_name("rayscan")
runs = {{run.info.run_name: run for run in client.search_runs([experiment.experiment_id])}}
run = runs["model-1"]
assert run.data.params["train.steps"] == "3", run.data.params
told = [(m.step, m.value) for m in client.get_metric_history(run.info.run_id, "loss")]
assert told == [(1, 1.0), (2, 0.5), (3, 1 / 3)], told
assert [run.info.status, runs["model-2"].info.status] == ["FINISHED", "FAILED"]
"""

_WANDB = """
import sys; sys.path.insert(0, {tests!r})
from test_tracking import ROWS, SETTINGS
from rayscan.tracking import tracked
with tracked(("wandb",), "model-1", SETTINGS, "") as log:
    log(ROWS)
"""


def in_a_process(code: str, folder: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    import os

    return subprocess.run(
        [sys.executable, "-c", code.format(tests=str(Path(__file__).parent))],
        env={**os.environ, **variables}, cwd=folder, capture_output=True, text=True,
    )  # fmt: skip


@pytest.mark.skipif(absent("mlflow"), reason="extra rayscan[mlflow] is not installed")
def test_mlflow_on_a_store_of_files(tmp_path: Path) -> None:
    places = {"MLFLOW_TRACKING_URI": f"file:{tmp_path}/runs", "MLFLOW_ALLOW_FILE_STORE": "true"}
    done = in_a_process(_MLFLOW, tmp_path, **places)
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(absent("mlflow"), reason="extra rayscan[mlflow] is not installed")
def test_mlflow_without_a_place_to_go(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    done = in_a_process(_MLFLOW, tmp_path, MLFLOW_TRACKING_URI="")
    assert "mlflow needs MLFLOW_TRACKING_URI" in done.stderr


@pytest.mark.skipif(absent("wandb"), reason="extra rayscan[wandb] is not installed")
def test_wandb_offline(tmp_path: Path) -> None:
    done = in_a_process(_WANDB, tmp_path, WANDB_MODE="offline", WANDB_SILENT="true")
    assert done.returncode == 0, done.stderr
    (written,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    assert written.stat().st_size > 500
