"""Who is told of training's figures besides the workspace itself: TensorBoard, MLflow, Weights & Biases.

All three run in the driver, so workers need neither their libraries nor their credentials. Those come from
the environment alone (MLFLOW_TRACKING_URI, WANDB_API_KEY, ...): settings name trackers and nothing else.
A tracker that cannot begin stops the run before it starts; one that fails later is left out with a word,
since training is worth more than its diary. Each start of training is a run of its own with the whole curve.
"""

from __future__ import annotations

import importlib
import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

from rayscan.errors import ConfigError
from rayscan.progress import say

Metrics = dict[str, float]
_PROJECT = "rayscan"


class Tracker(Protocol):
    """What a tracker does between its start and its end."""

    def log(self, rows: list[Metrics]) -> None: ...

    def close(self, failed: bool) -> None: ...


@contextmanager
def tracked(
    names: tuple[str, ...], run: str, settings: dict[str, Any], folder: str
) -> Iterator[Callable[[list[Metrics]], None]]:
    """A function that tells all these trackers of steps, in order, for the time of the block.

    `run` names the model; `settings` are nested plain data; TensorBoard's files go into `folder`. Rows hold
    `step` and figures by name. Raises ConfigError if a tracker cannot begin.
    """
    open_ones: dict[str, Tracker] = {}
    failed = True

    def attempt(name: str, work: Callable[[Tracker], None]) -> None:
        try:
            work(open_ones[name])
        except Exception as error:
            del open_ones[name]
            say(f"train: {name} failed and is left out from here on: {_harmless(error)}")

    def log(rows: list[Metrics]) -> None:
        for name in list(open_ones):
            attempt(name, lambda tracker: tracker.log(rows))

    try:
        for name in names:
            open_ones[name] = _begin(name, run, settings, folder)
        yield log
        failed = False
    finally:
        for name in list(open_ones):
            attempt(name, lambda tracker: tracker.close(failed))


def _begin(name: str, run: str, settings: dict[str, Any], folder: str) -> Tracker:
    try:
        match name:
            case "tensorboard":
                return _TensorBoard(folder)
            case "mlflow":
                return _MLflow(run, settings)
            case _:
                return _WandB(run, settings)
    except ImportError as error:
        raise ConfigError(
            f"train.trackers: {name} is not installed ({error}): `pip install 'rayscan[{name}]'`, "
            "or leave it out"
        ) from None
    except ConfigError:
        raise
    except Exception as error:  # whatever these libraries raise
        raise ConfigError(f"train.trackers: {name} cannot begin: {_harmless(error)}") from None


def _harmless(error: Exception) -> str:
    """An error of somebody else's library, without user:password of an address in it, on one line."""
    text = re.sub(r"://[^/\s@]*@", "://", f"{type(error).__name__}: {error}")
    return " ".join(text.split())[:300]


def _flat(settings: dict[str, Any], prefix: str = "") -> dict[str, str]:
    """{"train": {"steps": 5}} -> {"train.steps": "5"}."""
    flat: dict[str, str] = {}
    for key, value in settings.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": str(value)}
    return flat


class _TensorBoard:
    def __init__(self, folder: str) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer: Any = SummaryWriter(folder)

    def log(self, rows: list[Metrics]) -> None:
        for row in rows:
            for name, value in row.items():
                if name != "step":
                    self.writer.add_scalar(name, value, int(row["step"]))
        self.writer.flush()

    def close(self, failed: bool) -> None:
        self.writer.close()


class _MLflow:
    def __init__(self, run: str, settings: dict[str, Any]) -> None:
        tracking = importlib.import_module("mlflow.tracking")
        self.entities = importlib.import_module("mlflow.entities")
        if not os.environ.get("MLFLOW_TRACKING_URI"):
            raise ConfigError("train.trackers: mlflow needs MLFLOW_TRACKING_URI, a server or file:/folder")
        self.client = tracking.MlflowClient()
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", _PROJECT)
        found = self.client.get_experiment_by_name(name)
        experiment = found.experiment_id if found else self.client.create_experiment(name)
        self.run = self.client.create_run(experiment, run_name=run).info.run_id
        parameters = [self.entities.Param(key, value[:500]) for key, value in _flat(settings).items()]
        self.client.log_batch(self.run, params=parameters)

    def log(self, rows: list[Metrics]) -> None:
        now = int(time.time() * 1000)
        figures = [
            self.entities.Metric(name, value, now, int(row["step"]))
            for row in rows
            for name, value in row.items()
            if name != "step"
        ]
        for first in range(0, len(figures), 1000):  # no more go into one request
            self.client.log_batch(self.run, metrics=figures[first : first + 1000])

    def close(self, failed: bool) -> None:
        self.client.set_terminated(self.run, "FAILED" if failed else "FINISHED")


class _WandB:
    def __init__(self, run: str, settings: dict[str, Any]) -> None:
        wandb = importlib.import_module("wandb")
        project = os.environ.get("WANDB_PROJECT", _PROJECT)
        self.run = wandb.init(project=project, name=run, config=settings, settings={"console": "off"})

    def log(self, rows: list[Metrics]) -> None:
        for row in rows:
            self.run.log({k: v for k, v in row.items() if k != "step"}, step=int(row["step"]))

    def close(self, failed: bool) -> None:
        self.run.finish(exit_code=int(failed))
