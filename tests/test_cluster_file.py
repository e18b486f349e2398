"""The cluster file passes Ray's own validation."""

import jsonschema
import pytest
import yaml
from conftest import ROOT


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
