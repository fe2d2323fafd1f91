"""The parallel map of the cluster stage where a GPU is asked for."""

from __future__ import annotations

import pytest
import ray

from rayscan.config import load
from rayscan.errors import ConfigError
from rayscan.stages.cluster import _ray_map


@pytest.mark.ray
@pytest.mark.parametrize("setting", ["cluster.device=cuda", "resources.cluster_gpus=64"])
def test_a_gpu_that_is_not_there_is_an_error_and_no_endless_wait(ray_session: None, setting: str) -> None:
    if setting == "cluster.device=cuda" and ray.cluster_resources().get("GPU"):
        pytest.skip("there is one")
    with pytest.raises(ConfigError, match=r"with \d+ GPU each .* this Ray has \d GPU"):
        list(_ray_map(load(sets=[setting], env={}))(lambda item, shared: item, [1], None))


@pytest.mark.ray
def test_cpu_asks_for_no_gpu(ray_session: None) -> None:
    work = _ray_map(load(sets=["cluster.device=cpu", "resources.cluster_gpus=64"], env={}))
    assert list(work(lambda item, shared: item + shared, [1, 2], 3)) == [4, 5]
