"""The cluster files: what Ray and Kubernetes say to them, and what no schema looks at."""

import os
import re
import shlex
import subprocess
import sys
import tomllib
import zipfile

import jsonschema
import pytest
import yaml
from conftest import ROOT
from packaging.requirements import Requirement

from unet.cluster.demand import needs_of
from unet.config import TrainSettings, unflat

FILES = {"aws": "ray_cluster.yaml", "gcp": "clusters/gcp.yaml", "local": "clusters/on_premises.yaml"}
KUBERNETES = ROOT / "clusters" / "kubernetes"


def accepted(config: dict) -> dict:
    """The configuration as `ray up` completes and validates it."""
    from ray.autoscaler._private.util import prepare_config, validate_config

    prepared = prepare_config(config)
    validate_config(prepared)
    return prepared


def read(provider: str) -> dict:
    return yaml.safe_load((ROOT / FILES[provider]).read_text())


def gpu_packages() -> set[str]:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    return {str(Requirement(package)) for package in extras["gpu"]}


@pytest.mark.parametrize("provider", FILES)
def test_ray_accepts_the_file(provider):
    text = (ROOT / FILES[provider]).read_text()
    prepared = accepted(yaml.safe_load(text))
    assert prepared["head_node_type"] in prepared["available_node_types"]
    # Ray's own defaults would install a Ray of another version, or with a Python that is not the cluster's.
    assert not any("wheels" in line or line.startswith("pip ") for line in prepared["head_setup_commands"])
    with pytest.raises(jsonschema.ValidationError):  # the check is a check
        accepted(yaml.safe_load(text.replace("setup_commands:", "set_up_commands:", 1)))


@pytest.mark.parametrize("provider", FILES)
def test_every_node_asks_for_the_token_and_has_the_pinned_packages(provider):
    prepared = accepted(read(provider))
    for kind in ("head", "worker"):
        commands = prepared[f"{kind}_setup_commands"] + prepared[f"{kind}_start_ray_commands"]
        for command in commands:
            subprocess.run(["bash", "-n", "-c", command], check=True)
        start = commands[-1]
        assert re.search(r"export RAY_AUTH_MODE=token\b.*; ulimit -n 65536; ray start", start)
        assert any("--require-hashes -r ~/unet-pets/requirements.txt" in command for command in commands)
    assert "--dashboard-host=127.0.0.1" in prepared["head_start_ray_commands"][-1]
    assert prepared["file_mounts"]["~/.ray/auth_token"] == "~/.ray/auth_token"
    assert "RAY_AUTH_TOKEN" not in (ROOT / FILES[provider]).read_text()


@pytest.mark.parametrize("provider", FILES)
def test_where_there_is_a_gpu_cudas_libraries_come(provider):
    """The packages of the extra, which names TensorFlow with CUDA."""
    (command,) = [line for line in accepted(read(provider))["setup_commands"] if "nvidia-smi" in line]
    _, _, install = command.partition("install")
    words = shlex.split(install.partition(";")[0])
    assert {str(Requirement(word)) for word in words if not word.startswith("-")} == gpu_packages()


def test_idle_costs_the_head_alone_and_work_has_a_limit():
    spot = {"aws": ("InstanceMarketOptions", "MarketType", "spot"), "gcp": ("scheduling", "provisioningModel", "SPOT")}
    account = {"aws": "IamInstanceProfile", "gcp": "serviceAccounts"}
    for provider, (field, key, value) in spot.items():
        config = read(provider)
        assert config["provider"]["cache_stopped_nodes"] is False and config["max_workers"] == 8
        types = dict(config["available_node_types"])
        head = types.pop("head")
        assert head["resources"] == {"CPU": 0} and field not in head["node_config"]
        assert set(types) == {"cpu", "gpu"}
        for node in types.values():
            assert node["min_workers"] == 0 < node["max_workers"] <= 8
            assert node["node_config"][field][key] == value
            assert node["node_config"][account[provider]]


def test_a_worker_finds_room_on_a_node_of_google_cloud():
    """Ray looks up neither CPUs nor memory there, and what has no memory holds no worker."""
    types = read("gcp")["available_node_types"]
    for name, node in types.items():
        assert name == "head" or node["resources"]["memory"] > needs_of(unflat(TrainSettings, {"threads": 8})).memory
    assert types["cpu"]["resources"]["CPU"] == 16  # as many as the example's threads


def test_every_image_has_a_python_that_the_wheels_accept():
    """Ubuntu 24.04 has Python 3.12."""
    for node in read("aws")["available_node_types"].values():
        assert re.match(r"resolve:ssm:/aws/service/.+24\.04/.+/ami-id$", node["node_config"]["ImageId"])
        (disk,) = node["node_config"]["BlockDeviceMappings"]
        assert disk["Ebs"]["VolumeSize"] >= 100 and disk["Ebs"]["Encrypted"]
    for node in read("gcp")["available_node_types"].values():
        (disk,) = node["node_config"]["disks"]
        assert "ubuntu" in disk["initializeParams"]["sourceImage"] and "2404" in disk["initializeParams"]["sourceImage"]
        assert disk["initializeParams"]["diskSizeGb"] >= 100


@pytest.mark.cluster
def test_what_ray_would_ask_of_aws(tmp_path, monkeypatch):
    """Against moto: the account's roles and firewall are made by the template, and Ray takes them as they are."""
    cfnlint = pytest.importorskip("cfnlint", reason="needs the extra `cluster`")
    import boto3
    from moto import mock_aws
    from ray.autoscaler._private.aws.config import bootstrap_aws

    template = (ROOT / "clusters" / "aws_account.yaml").read_text()
    assert not [found for found in cfnlint.api.lint_all(template) if not found.rule.id.startswith("I")]
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "made-up")
    monkeypatch.setenv("HOME", str(tmp_path))  # Ray draws a key for ssh
    with mock_aws():
        region = {"region_name": "us-west-2"}
        boto3.client("cloudformation", **region).create_stack(
            StackName="unet-pets",
            TemplateBody=template,
            Capabilities=["CAPABILITY_NAMED_IAM"],
            Parameters=[
                {"ParameterKey": "Bucket", "ParameterValue": "pets"},
                {"ParameterKey": "SshFrom", "ParameterValue": "203.0.113.7/32"},
            ],
        )
        (stack,) = boto3.client("cloudformation", **region).describe_stacks(StackName="unet-pets")["Stacks"]
        groups = boto3.client("ec2", **region).describe_security_groups
        before = groups()["SecurityGroups"]
        (output,) = stack["Outputs"]
        (firewall,) = [group for group in before if group["GroupId"] == output["OutputValue"]]
        config = read("aws")
        with pytest.raises(AssertionError):  # as shipped, rather than behind a firewall of Ray's own
            bootstrap_aws(accepted(config))
        for node in config["available_node_types"].values():
            assert node["node_config"]["SecurityGroupIds"] == ["SECURITY_GROUP"]
            node["node_config"]["SecurityGroupIds"] = [firewall["GroupId"]]
        types = bootstrap_aws(accepted(config))["available_node_types"]
        assert groups()["SecurityGroups"] == before
        profiles = boto3.client("iam", **region).list_instance_profiles()["InstanceProfiles"]
    assert {(node["node_config"]["IamInstanceProfile"]["Name"]) for node in types.values()} == {
        profile["InstanceProfileName"] for profile in profiles
    }
    assert all(node["node_config"]["SecurityGroupIds"] == [firewall["GroupId"]] for node in types.values())
    rules = {rule["IpProtocol"]: rule for rule in firewall["IpPermissions"]}
    assert set(rules) == {"tcp", "-1"}
    assert rules["tcp"]["IpRanges"] == [{"CidrIp": "203.0.113.7/32"}] and rules["tcp"]["ToPort"] == 22
    assert not rules["-1"]["IpRanges"] and rules["-1"]["UserIdGroupPairs"][0]["GroupId"] == firewall["GroupId"]


def pods() -> dict:
    """The cluster of Kubernetes, which the job and the cluster that stays share."""
    job, cluster = (yaml.safe_load((KUBERNETES / name).read_text()) for name in ("rayjob.yaml", "raycluster.yaml"))
    assert job["spec"]["rayClusterSpec"] == cluster["spec"]
    return cluster


def test_rays_autoscaler_reads_the_groups_of_kubernetes():
    from ray import __version__
    from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr

    cluster = pods()
    assert cluster["spec"]["rayVersion"] == __version__ and cluster["spec"]["authOptions"] == {"mode": "token"}
    cluster["metadata"]["namespace"] = "default"
    config = _derive_autoscaling_config_from_ray_cr(cluster)
    assert config["idle_timeout_minutes"] == 10
    types = config["available_node_types"]
    asked = {name: (node["min_workers"], node["max_workers"]) for name, node in types.items()}
    assert asked == {"headgroup": (0, 0), "cpu": (0, 8), "gpu": (0, 4)}
    resources = {name: [node["resources"].get(kind, 0) for kind in ("CPU", "GPU")] for name, node in types.items()}
    assert resources == {"headgroup": [0, 0], "cpu": [8, 0], "gpu": [4, 1]}
    assert all(types[name]["resources"]["memory"] == 16 * 2**30 for name in ("cpu", "gpu"))
    # The worker of the example fills a pod.
    entrypoint = yaml.safe_load((KUBERNETES / "rayjob.yaml").read_text())["spec"]["entrypoint"]
    assert "--num-workers 1:4 --threads 8" in entrypoint


def of_kuberay(required: str, **fields: dict | str) -> dict:
    """The schema of an object that has these fields and no other."""
    known = {name: {"type": kind} if isinstance(kind, str) else kind for name, kind in fields.items()}
    return {"type": "object", "required": required.split(), "properties": known, "additionalProperties": False}


# Those of KubeRay's fields that the files use, from its API types (ray-operator/apis/ray/v1, of 1.5.1 to 1.7).
WORDS = {"type": "object", "additionalProperties": {"type": "string"}}
GROUP = {"rayStartParams": WORDS, "template": "object"}
WORKERS = GROUP | {"groupName": "string", "replicas": "integer", "minReplicas": "integer", "maxReplicas": "integer"}
RAY_CLUSTER = of_kuberay(
    "headGroupSpec",
    rayVersion="string",
    authOptions=of_kuberay("", mode={"enum": ["disabled", "token"]}),
    enableInTreeAutoscaling="boolean",
    autoscalerOptions=of_kuberay("", idleTimeoutSeconds="integer"),
    headGroupSpec=of_kuberay("template", **GROUP),
    workerGroupSpecs={"type": "array", "items": of_kuberay("groupName maxReplicas minReplicas template", **WORKERS)},
)
RAY_JOB = of_kuberay(
    "",
    entrypoint="string",
    backoffLimit="integer",
    shutdownAfterJobFinishes="boolean",
    ttlSecondsAfterFinished="integer",
    rayClusterSpec=RAY_CLUSTER,
)


@pytest.mark.parametrize(
    ("name", "kind", "schema"), [("rayjob", "RayJob", RAY_JOB), ("raycluster", "RayCluster", RAY_CLUSTER)]
)
def test_kuberay_knows_every_field(name, kind, schema):
    document = yaml.safe_load((KUBERNETES / f"{name}.yaml").read_text())
    assert (document["apiVersion"], document["kind"]) == ("ray.io/v1", kind)
    jsonschema.validate(document["spec"], schema)


@pytest.mark.cluster
def test_kubernetes_knows_every_field_of_the_pods_and_the_policy():
    validate = pytest.importorskip("kubernetes_validate", reason="needs the extra `cluster`").validate
    spec = pods()["spec"]
    policy = yaml.safe_load((KUBERNETES / "network_policy.yaml").read_text())
    validate(policy, "1.34", strict=True)
    for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
        pod = {"apiVersion": "v1", "kind": "Pod", **group["template"]}
        validate(pod, "1.34", strict=True)
        assert policy["spec"]["podSelector"]["matchLabels"].items() <= pod["metadata"]["labels"].items()
        pod["spec"]["container"] = []
        with pytest.raises(Exception, match="container"):
            validate(pod, "1.34", strict=True)


def test_the_image_has_the_pinned_packages_and_those_for_gpus():
    text = (KUBERNETES / "Dockerfile").read_text()
    assert "pip install --no-cache-dir --require-hashes -r /opt/requirements.txt" in text
    (packages,) = re.findall(r"PACKAGES='(.+)'", text)
    assert {str(Requirement(package)) for package in packages.split()} == gpu_packages()
    copied = [word for line in re.findall(r"^COPY (.+)$", text, re.MULTILINE) for word in line.split()[:-1]]
    assert all((ROOT / path).exists() for path in copied)


def test_a_submitted_job_carries_what_runs_and_no_more(tmp_path):
    """What `ray job submit --working-dir .` packs is small, and enough."""
    from ray._private.ray_constants import get_runtime_env_default_excludes
    from ray._private.runtime_env.packaging import create_package

    package = tmp_path / "package.zip"
    create_package(str(ROOT), package, include_gitignore=True, excludes=get_runtime_env_default_excludes())
    assert package.stat().st_size < 2_000_000  # not compressed
    with zipfile.ZipFile(package) as content:
        assert not [name for name in content.namelist() if name.startswith(("docs/", "tests/", "clusters/", ".git/"))]
        content.extractall(tmp_path / "job")
    done = subprocess.run(
        [sys.executable, "jobs/train.py", "--recipe", "best", "--help"],
        cwd=tmp_path / "job",
        env={name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert "--num-workers" in done.stdout
