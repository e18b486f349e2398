"""The cluster file passes Ray's own validation."""

import re
import shlex
from importlib import metadata

import jsonschema
import pytest
import yaml
from conftest import ROOT
from packaging.requirements import Requirement


def accepted(config: dict) -> dict:
    """The configuration as `ray up` completes and validates it."""
    from ray.autoscaler._private.util import prepare_config, validate_config

    prepared = prepare_config(config)
    validate_config(prepared)
    return prepared


def test_ray_accepts_the_cluster_file():
    text = (ROOT / "ray_cluster.yaml").read_text()
    prepared = accepted(yaml.safe_load(text))
    assert prepared["available_node_types"]["worker"]["max_workers"] == 4
    assert prepared["head_node_type"] in prepared["available_node_types"]
    with pytest.raises(jsonschema.ValidationError):  # the check is a check
        accepted(yaml.safe_load(text.replace("setup_commands:", "set_up_commands:")))


def test_the_command_for_gpus_brings_cudas_libraries():
    """As it stands in the comment: the extra with its dependencies, which are TensorFlow's with CUDA."""
    text = (ROOT / "ray_cluster.yaml").read_text()
    (comment,) = re.findall(r"^  # (- python3 .*\[gpu\].*)$", text, re.MULTILINE)
    prepared = accepted(yaml.safe_load(text.replace(f"  # {comment}", f"  {comment}")))
    *others, command = (
        prepared["available_node_types"]["worker"].get("worker_setup_commands") or prepared["setup_commands"]
    )
    assert others and "--no-deps" not in command
    *_, target = shlex.split(command)
    extra = target.partition("[")[2].rstrip("]")
    needed = [Requirement(line) for line in metadata.requires("unet-pets")]
    brought = [r for r in needed if r.marker and r.marker.evaluate({"extra": extra}) and r.name == "tensorflow"]
    assert [r.extras for r in brought] == [{"and-cuda"}]
    cuda = [Requirement(line) for line in metadata.requires("tensorflow")]
    assert any(r.name.startswith("nvidia-cudnn") and r.marker.evaluate({"extra": "and-cuda"}) for r in cuda)
