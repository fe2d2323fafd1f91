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
POLICY = (ROOT / "docs/examples/networkpolicy.yaml").read_text("utf-8")


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


def test_a_job_that_is_stopped_has_time_for_its_checkpoint(cluster: dict[str, Any]) -> None:
    assert "RAY_JOB_STOP_WAIT_TIME_S=30 ray start --head" in starts(cluster)[0]
    head, *_ = groups(yaml.safe_load(RAYJOB))
    (container,) = head["template"]["spec"]["containers"]
    assert {"name": "RAY_JOB_STOP_WAIT_TIME_S", "value": "30"} in container["env"]


def test_every_node_knows_its_region(cluster: dict[str, Any]) -> None:
    """One region everywhere: that of the provider, of the secret and of what the libraries are told."""
    regions = set(re.findall(r"\b[a-z]{2}-[a-z]+-\d\b", TEXT))
    assert regions == {cluster["provider"]["region"]}
    assert f"--env AWS_REGION={cluster['provider']['region']}" in cluster["docker"]["run_options"]
    for group in groups(yaml.safe_load(RAYJOB)):
        (container,) = group["template"]["spec"]["containers"]
        assert "AWS_REGION" in [variable["name"] for variable in container["env"]]


def test_shared_memory_holds_what_ray_takes(cluster: dict[str, Any]) -> None:
    """30 % of the memory of the largest machine; the comments say how much each has."""
    (size,) = re.findall(r"--shm-size=(\d+)g", " ".join(cluster["docker"]["run_options"]))
    largest = max(int(gib) for gib in re.findall(r"# \d+ cores, (\d+) GiB", TEXT))
    assert largest == 64 and int(size) >= 0.3 * largest


def groups(job: dict[str, Any]) -> list[dict[str, Any]]:
    cluster = job["spec"]["rayClusterSpec"]
    return [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]


def test_the_network_policy_is_of_these_pods_and_opens_one_port_to_two_others() -> None:
    job, policy = yaml.safe_load(RAYJOB), yaml.safe_load(POLICY)
    selector = policy["spec"]["podSelector"]
    for group in groups(job):
        assert group["template"]["metadata"]["labels"].items() >= selector["matchLabels"].items()
    among, dashboard = policy["spec"]["ingress"]
    assert among == {"from": [{"podSelector": selector}]}
    assert dashboard["ports"] == [{"protocol": "TCP", "port": 8265}]
    submitter, operator = dashboard["from"]
    name = {"batch.kubernetes.io/job-name": job["metadata"]["name"]}
    assert submitter == {"podSelector": {"matchLabels": name}}
    assert operator["namespaceSelector"]["matchLabels"] and operator["podSelector"]["matchLabels"]


def test_versions_are_those_that_were_tested(cluster: dict[str, Any]) -> None:
    assert cluster["docker"]["image"].startswith(f"rayproject/ray:{ray.__version__}-py311")
    assert any("--constraint" in command for command in cluster["setup_commands"])
    assert yaml.safe_load(RAYJOB)["spec"]["rayClusterSpec"]["rayVersion"] == ray.__version__


def test_the_rayjob_is_what_its_reference_says() -> None:
    """Field names by KubeRay's API reference (ray.io/v1, 1.6); docs/cluster.md says how they were checked."""
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
    for group in groups(job):
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
