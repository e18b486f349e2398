"""Tells the workers of Ray Train where their peers are, as TensorFlow expects it, and joins them.

Ray's own `TensorflowConfig` does the same, but imports TensorFlow in the driver and in the controller (5-9 s each
before the first step) and sets TF_USE_LEGACY_KERAS, with which anything that touches `tf.keras` fails.

Why: docs/decisions.md#own-backend-instead-of-tensorflowtrainer
"""

import json
import os
import socket
from dataclasses import dataclass

import ray
from ray.train.backend import Backend, BackendConfig


@dataclass
class TensorflowBackendConfig(BackendConfig):
    """Sets TF_CONFIG in every worker, anew at every start of the group."""

    @property
    def backend_cls(self):
        return _TensorflowBackend


class _TensorflowBackend(Backend):
    def on_start(self, worker_group, backend_config):
        addresses = worker_group.execute(_free_address)
        ray.get(
            [worker_group.execute_single_async(rank, _set_tf_config, addresses, rank) for rank in range(len(addresses))]
        )


def join_workers(use_gpu: bool):
    """The strategy over the workers of TF_CONFIG, of one device each, before anything else runs in TensorFlow.

    By itself it would take every GPU that the process sees, and a replica for each.
    """
    import tensorflow as tf

    told = json.loads(os.environ["TF_CONFIG"])
    resolver = tf.distribute.cluster_resolver.SimpleClusterResolver(
        tf.train.ClusterSpec(told["cluster"]),
        task_type=told["task"]["type"],
        task_id=told["task"]["index"],
        num_accelerators={"GPU": int(use_gpu)},
        rpc_layer="grpc",
    )
    return tf.distribute.MultiWorkerMirroredStrategy(resolver)


def _free_address() -> str:
    """An address of this node that nobody listens on. It is bound later, so two jobs can in principle collide."""
    host = ray.util.get_node_ip_address()
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.bind((host, 0))
        port = probe.getsockname()[1]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _set_tf_config(addresses: list[str], rank: int) -> None:
    hosts = [address.rpartition(":")[0].strip("[]") for address in addresses]
    # Else gRPC would ask a proxy of the environment for them.
    os.environ["no_grpc_proxy"] = ",".join(hosts)  # noqa: SIM112
    os.environ["TF_CONFIG"] = json.dumps({"cluster": {"worker": addresses}, "task": {"type": "worker", "index": rank}})
