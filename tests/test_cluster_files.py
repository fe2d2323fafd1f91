"""`cluster.yaml` and the RayJob: valid for Ray, and safe in what its own check does not look at."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import botocore.loaders
import botocore.model
import botocore.validate
import pytest
import ray
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "cluster.yaml").read_text("utf-8")
RAYJOB = (ROOT / "docs/examples/rayjob.yaml").read_text("utf-8")


@pytest.fixture
def cluster() -> dict[str, Any]:
    data: dict[str, Any] = yaml.safe_load(TEXT)
    return data


def starts(cluster: dict[str, Any]) -> list[str]:
    groups = (cluster["head_start_ray_commands"], cluster["worker_start_ray_commands"])
    return [command for group in groups for command in group if "ray start" in command]


def test_ray_takes_it(cluster: dict[str, Any]) -> None:
    validate_config(prepare_config(cluster))


def test_a_typing_error_is_found(cluster: dict[str, Any]) -> None:
    with pytest.raises(Exception, match="idle_timeout_minute"):
        validate_config(prepare_config({**cluster, "idle_timeout_minute": 1}))


def test_aws_takes_every_node(cluster: dict[str, Any]) -> None:
    """By the model of RunInstances that boto3 itself checks requests with; SubnetIds is Ray's own."""
    model = botocore.loaders.Loader().load_service_model("ec2", "service-2")
    shape = botocore.model.ServiceModel(model).operation_model("RunInstances").input_shape
    for name, kind in cluster["available_node_types"].items():
        config = dict(kind["node_config"])
        assert config.pop("SubnetIds"), name
        request = {**config, "MinCount": 1, "MaxCount": 1}
        report = botocore.validate.ParamValidator().validate(request, shape)
        assert not report.has_errors(), f"{name}: {report.generate_report()}"
    assert botocore.validate.ParamValidator().validate({**request, "InstanceTyp": "x"}, shape).has_errors()


def test_bounds_fit_together(cluster: dict[str, Any]) -> None:
    kinds = cluster["available_node_types"]
    assert all(kind["max_workers"] <= cluster["max_workers"] for kind in kinds.values())
    assert all(kind["min_workers"] == 0 for kind in kinds.values())
    assert cluster["idle_timeout_minutes"] > 0
    assert kinds[cluster["head_node_type"]]["resources"]["CPU"] == 0


def test_the_head_is_on_demand_and_workers_are_not(cluster: dict[str, Any]) -> None:
    for name, kind in cluster["available_node_types"].items():
        spot = kind["node_config"].get("InstanceMarketOptions") == {"MarketType": "spot"}
        assert spot == (name != cluster["head_node_type"])


def test_nothing_is_open_and_no_key_is_written_down(cluster: dict[str, Any]) -> None:
    assert cluster["provider"]["use_internal_ips"] is True
    assert "0.0.0.0" not in TEXT
    assert not re.search(r"AKIA|aws_secret|ssh_private_key|[Pp]assword", TEXT)
    for kind in cluster["available_node_types"].values():
        config = kind["node_config"]
        assert set(config["IamInstanceProfile"]) == {"Arn"}
        assert config["MetadataOptions"]["HttpTokens"] == "required"
        assert all(disk["Ebs"]["Encrypted"] for disk in config["BlockDeviceMappings"])


def test_every_node_asks_for_the_token(cluster: dict[str, Any]) -> None:
    assert len(starts(cluster)) == 2
    for command in starts(cluster):
        assert re.search(r"RAY_AUTH_MODE=token .*ray start", command, re.DOTALL)
        assert "RAY_AUTH_TOKEN_PATH=" in command
    assert "--dashboard-host=127.0.0.1" in starts(cluster)[0]


def test_versions_are_those_that_were_tested(cluster: dict[str, Any]) -> None:
    assert cluster["docker"]["image"].startswith(f"rayproject/ray:{ray.__version__}-py311")
    assert any("--constraint" in command for command in cluster["setup_commands"])
    assert yaml.safe_load(RAYJOB)["spec"]["rayClusterSpec"]["rayVersion"] == ray.__version__


def test_the_rayjob_is_what_its_reference_says() -> None:
    """Field names by KubeRay's API reference (ray.io/v1, 1.6); its schema is in no package registry."""
    job = yaml.safe_load(RAYJOB)
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    spec, cluster = job["spec"], job["spec"]["rayClusterSpec"]
    assert set(spec) <= {
        "entrypoint", "runtimeEnvYAML", "backoffLimit", "submitterConfig", "shutdownAfterJobFinishes",
        "ttlSecondsAfterFinished", "activeDeadlineSeconds", "rayClusterSpec",
    }  # fmt: skip
    assert set(cluster) <= {
        "rayVersion", "authOptions", "enableInTreeAutoscaling", "autoscalerOptions", "headGroupSpec",
        "workerGroupSpecs",
    }  # fmt: skip
    assert cluster["authOptions"] == {"mode": "token"}
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    for group in groups:
        (container,) = group["template"]["spec"]["containers"]
        assert "@sha256:" in container["image"]
        assert container["resources"]["limits"]["memory"] == container["resources"]["requests"]["memory"]
        assert all(isinstance(value, str) for value in group["rayStartParams"].values())
    for group in cluster["workerGroupSpecs"]:
        assert set(group) == {
            "groupName", "replicas", "minReplicas", "maxReplicas", "rayStartParams", "template"
        }  # fmt: skip
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
        assert group["template"]["spec"]["nodeSelector"] == {"karpenter.sh/capacity-type": "spot"}
    script = spec["entrypoint"].split()[1]
    assert (ROOT / script).exists()
