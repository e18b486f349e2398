"""A node provider for Ray's autoscaler whose nodes are further Rays on this machine, as children of the autoscaler.

Ray's own fake provider lacks a file in the wheel. A cluster file names this one as `external`; see `Growing`.
"""

import os
import signal
import subprocess
import sys
import uuid

from ray.autoscaler.node_provider import NodeProvider
from ray.autoscaler.tags import NODE_KIND_HEAD, STATUS_UP_TO_DATE, TAG_RAY_NODE_KIND, TAG_RAY_NODE_STATUS

HEAD = "head"


class GrowingNodes(NodeProvider):
    """Nodes by id, each with an address of this machine's; `head` is there from the beginning."""

    def __init__(self, provider_config, cluster_name):
        super().__init__(provider_config, cluster_name)
        kind = provider_config["head_type"]
        self._tags = {HEAD: {TAG_RAY_NODE_KIND: NODE_KIND_HEAD, "ray-user-node-type": kind, "ray-node-name": HEAD}}
        self._tags[HEAD][TAG_RAY_NODE_STATUS] = STATUS_UP_TO_DATE
        self._addresses = {HEAD: provider_config["address"].partition(":")[0]}
        self._free = list(provider_config["free"])
        self._processes: dict[str, subprocess.Popen] = {}

    def non_terminated_nodes(self, tag_filters):
        for name in [name for name, process in self._processes.items() if process.poll() is not None]:
            self.terminate_node(name)  # its Ray did not start, as of two at once it may not: another is asked for
        return [name for name, tags in self._tags.items() if all(tags.get(k) == v for k, v in tag_filters.items())]

    def is_running(self, node_id):
        return node_id in self._tags

    def is_terminated(self, node_id):
        return node_id not in self._tags

    def node_tags(self, node_id):
        return self._tags[node_id]

    def set_node_tags(self, node_id, tags):
        self._tags[node_id].update(tags)

    def external_ip(self, node_id):
        return self._addresses[node_id]

    internal_ip = external_ip

    def create_node(self, node_config, tags, count):
        self.create_node_with_resources_and_labels(node_config, tags, count, {}, {})

    def create_node_with_resources_and_labels(self, node_config, tags, count, resources, labels):
        for _ in range(count):
            name = uuid.uuid4().hex
            environment = os.environ | {
                "RAY_CLOUD_INSTANCE_ID": name,
                "RAY_NODE_TYPE_NAME": tags["ray-user-node-type"],
            }
            self._addresses[name] = self._free.pop(0)
            places = [f"--address={self.provider_config['address']}", f"--node-ip-address={self._addresses[name]}"]
            command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", *places]
            command += [
                f"--num-cpus={resources['CPU']}",
                "--object-store-memory=100000000",
                f"--memory={resources['memory']}",
            ]
            self._processes[name] = subprocess.Popen(
                command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
            )
            self._tags[name] = tags | {TAG_RAY_NODE_STATUS: STATUS_UP_TO_DATE}

    def terminate_node(self, node_id):
        self._tags.pop(node_id)
        self._free.append(self._addresses[node_id])
        process = self._processes.pop(node_id)
        process.send_signal(signal.SIGTERM)
        process.wait()

    @staticmethod
    def bootstrap_config(cluster_config):
        return cluster_config
