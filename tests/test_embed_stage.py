"""The embed stage on real Ray: damaged input, actors that die, and what that costs."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import ray
import torch
from tables_of_sequences import sequences_of

from rayscan.config import RunConfig, load
from rayscan.errors import ConfigError, DataError, ModelError
from rayscan.model import artefact
from rayscan.model.encoder import Encoder
from rayscan.planning import Model, embed_units
from rayscan.stages import embed, train
from rayscan.stages.session import gpus_each
from rayscan.tables import CommitInfo, File, Table, Workspace

pytestmark = pytest.mark.ray
PERIODS = ("2024-01", "2024-02", "2024-03")
MODEL = Model("m", "w", {})
ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers cannot import this module


def settings(*sets: str) -> RunConfig:
    small = ("model.layers=1", "model.d_model=16", "model.d_ff=16", "model.heads=2", "model.counts=0")
    return load("quick", sets=["ingest.n_buckets=2", "model.optional=[]", *small, *sets], env={})


def fresh(folder: Path) -> Workspace:
    """A workspace with a model of random weights and three periods of sequences in two buckets."""
    workspace = Workspace.open(str(folder / "ws"), settings().ingest)
    torch.manual_seed(0)
    card = artefact.Card(name="m", created="", sequence_length=16, min_length=4, training={}, metrics={})
    artefact.save(
        lambda name, data: workspace.write_bytes(f"models/m/{name}", data), Encoder(settings().model), card
    )
    table = workspace.table("sequences")
    for i, period in enumerate(PERIODS):
        for bucket in range(2):
            rows = [[{"port": 20 + i + n, "gap": 10 * n}] * 8 for n in range(5)]
            file = table.write(sequences_of(rows), {"period": period, "bucket": bucket})
            table.append([file], {}, CommitInfo("r", "c"))
    return workspace


def run(workspace: Workspace, *sets: str) -> embed.Counts:
    due = [unit for unit in embed_units(workspace, MODEL) if unit.state == "due"]
    return embed.run(workspace, settings(*sets), MODEL, due, CommitInfo("r", "c"))


def committed(workspace: Workspace) -> dict[str, int]:
    """Rows of each period."""
    found = Workspace(workspace.uri).table("embeddings").read(columns=("src", "period"))["period"].to_pylist()
    return {period: found.count(period) for period in sorted(set(found))}


def vectors(workspace: Workspace) -> np.ndarray:
    rows = Workspace(workspace.uri).table("embeddings").read().sort_by("period")
    return np.stack(rows["vector"].to_numpy())


def sequences_file(workspace: Workspace, period: str) -> Path:
    file, *_ = workspace.table("sequences").files({"period": period})
    return Path(workspace.uri) / "sequences" / file.path


def test_a_damaged_file_costs_its_period_alone(ray_session: None, tmp_path: Path) -> None:
    workspace = fresh(tmp_path)
    damaged = sequences_file(workspace, "2024-02")
    whole = damaged.read_bytes()
    damaged.write_bytes(whole[:-100])
    with pytest.raises(DataError, match="1 of 6 buckets failed, the others are done") as raised:
        run(workspace)
    assert str(damaged) in str(raised.value)
    assert committed(workspace) == {"2024-01": 10, "2024-03": 10}
    damaged.write_bytes(whole)
    assert run(workspace).units == 2
    assert committed(workspace) == dict.fromkeys(PERIODS, 10)


class Deadly(Workspace):
    """A workspace in which whoever writes the embeddings of 2024-02's bucket 1 dies, so many times."""

    def __init__(self, uri: str, times: int) -> None:
        super().__init__(uri)
        self.times, self.driver = times, os.getpid()

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "times": self.times, "driver": self.driver}

    def table(self, name: str) -> Table:
        return DeadlyTable(self, name)


class DeadlyTable(Table):
    def write(self, data: pa.Table, key: object, prefix: str = "part") -> File:
        workspace = self.workspace
        assert isinstance(workspace, Deadly) and isinstance(key, dict)
        deaths = Path(workspace.uri).parent / "deaths"
        deaths.mkdir(exist_ok=True)
        deadly = self.name == "embeddings" and (key["period"], key["bucket"]) == ("2024-02", "1")
        if deadly and len(list(deaths.iterdir())) < workspace.times and os.getpid() != workspace.driver:
            (deaths / os.urandom(8).hex()).touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return super().write(data, key, prefix)  # type: ignore[arg-type]


def test_an_actor_that_dies_is_made_up_for(
    ray_session: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    workspace = fresh(tmp_path / "one")
    run(workspace)
    (tmp_path / "two").mkdir()
    struck = fresh(tmp_path / "two")
    assert run(Deadly(struck.uri, 1)).units == 6
    assert "embed: an actor died; " in capsys.readouterr().err
    assert np.array_equal(vectors(struck), vectors(workspace))


def test_a_bucket_that_kills_its_actor_costs_its_period_alone(ray_session: None, tmp_path: Path) -> None:
    workspace = fresh(tmp_path)
    with pytest.raises(DataError, match="1 of 6 buckets failed, the others are done") as raised:
        run(Deadly(workspace.uri, 99))
    assert "period=2024-02" in str(raised.value) and "died 4 times" in str(raised.value)
    assert len(list((tmp_path / "deaths").iterdir())) == 5, "the actor, and the four tries of a task"
    assert committed(workspace) == {"2024-01": 10, "2024-03": 10}
    assert run(workspace).units == 2  # nobody dies now


def test_a_model_that_is_damaged_is_named(ray_session: None, tmp_path: Path) -> None:
    workspace = fresh(tmp_path)
    weights = tmp_path / "ws" / "models" / "m" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    with pytest.raises(DataError, match=r"6 of 6 buckets failed.*model\.safetensors"):
        run(workspace)


def test_fused_layers_give_the_same_vectors(
    ray_session: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    workspace = fresh(tmp_path)
    run(workspace, "embed.precision=float32")
    expected = vectors(workspace)
    (tmp_path / "fused").mkdir()
    fused = fresh(tmp_path / "fused")
    run(fused, "embed.precision=float32", "embed.compile=true")
    assert np.abs(vectors(fused) - expected).max() < 1e-5
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(ModelError, match="no no-such-compiler: install one"):
        Encoder(settings().model).compile_layers()


@pytest.mark.parametrize("setting", ["resources.embed_cpus=64", "resources.embed_memory_mb=100000000"])
def test_what_does_not_fit_is_an_error_and_no_endless_wait(
    ray_session: None, tmp_path: Path, setting: str
) -> None:
    with pytest.raises(ConfigError, match=r"with (64 CPU|100,000,000 MB of memory) each"):
        run(fresh(tmp_path), setting)


@pytest.mark.parametrize(
    ("device", "asked", "processes", "gpus"),
    [("cpu", 2, 1, 0), ("cuda", 0, 1, 1), ("cuda", 0.5, 2, 0.5), ("auto", 1, 3, 1)],
)
def test_gpus_are_reserved_as_asked(device: str, asked: float, processes: int, gpus: float) -> None:
    assert gpus_each(device, asked, processes) == gpus


def test_auto_takes_this_machines_gpus_where_there_are_enough(ray_session: None) -> None:
    here = int(ray.cluster_resources().get("GPU", 0)) if torch.cuda.is_available() else 0
    assert gpus_each("auto", 0, max(here, 1)) == bool(here)
    assert gpus_each("auto", 0, here + 1) == 0


@pytest.mark.parametrize(
    ("stage", "setting"), [("train", "train.device=cuda"), ("embed", "embed.device=cuda")]
)
def test_a_gpu_that_is_not_there_is_an_error(
    ray_session: None, tmp_path: Path, stage: str, setting: str
) -> None:
    if ray.cluster_resources().get("GPU", 0):
        pytest.skip("this machine has a GPU")
    workspace = fresh(tmp_path)
    with pytest.raises(ConfigError, match=r"with 1 GPU each .* do not fit: this Ray has 0 GPU"):
        run(workspace, setting) if stage == "embed" else train.run(workspace, settings(setting), fresh=False)
