"""An examination: every node is asked at once, and waited for no longer than it says. Silence is a finding, too.

Without a cluster the same is tried in this process, without Ray.

Why: docs/decisions.md#the-doctor-tries-what-it-can
"""

import contextlib
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, wait
from typing import Any

from unet import versions
from unet.cluster import internals
from unet.cluster.session import finds_cluster, ray_session, silenced
from unet.config.doctor import DoctorSettings
from unet.config.fields import is_source_name
from unet.doctor import probe
from unet.doctor.asking import Ask, Asked, answer, gather, here, in_thread, lost_nodes, on_nodes, ray_nodes
from unet.doctor.examiner import Examiner
from unet.doctor.facts import Examination, Node, RayNode, Trouble
from unet.errors import InputError
from unet.secrets import without_secrets
from unet.tracking.library import load_mlflow
from unet.tracking.reach import scheme

CONNECT_SECONDS = 15
"""How long the head has to let this process in."""
SILENT_HEAD = (
    "the head accepts connections, but does not let this process in: if it asks for a token, export "
    "RAY_AUTH_MODE=token and put the cluster's token into ~/.ray/auth_token; else look at its Ray, or start it again"
)
ANSWER_SECONDS = 20
"""How long a node has to answer, and the storage and MLflow from there."""
MEETING_SECONDS = 6
"""How long the nodes have after that to find each other, and what the others wrote."""
REMOVAL_SECONDS = 3


def examine(settings: DoctorSettings, waiting: Callable[[str], object] = lambda text: None) -> Examination:
    """Every node of the cluster that a job would run on, or this machine if it would start its own Ray.

    `waiting` is told what is waited for.
    """
    began, part = time.monotonic(), settings.store
    at = part.storage_path, f".doctor-{uuid.uuid4().hex[:8]}"
    nodes: Mapping[str, RayNode | None]
    lost: dict[str, str] = {}
    grows = False
    with contextlib.ExitStack() as stack:
        cluster = _connect(settings.command.debug, stack, waiting)
        if cluster is True:
            nodes = of_ray = ray_nodes()
            lost, grows = lost_nodes(), bool(internals.autoscales())
            waiting(f"asking {len(nodes)} nodes")
            asks = stack.enter_context(on_nodes(of_ray, *at))
        else:
            nodes = {socket.gethostname(): None}
            asks = dict.fromkeys(nodes, here(*at))
        found = _ask(settings, at, nodes, asks)
    return Examination(
        **found,
        driver=probe.examine(),
        cluster=cluster,
        grows=grows,
        lost=lost,
        requirements=versions.requirements(),
        storage=without_secrets(part.storage_path).partition("?")[0],
        is_local=is_local(part.storage_path),
        tracking=part.tracking_uri and without_secrets(part.tracking_uri),
        data=settings.doctor.data and without_secrets(settings.doctor.data).partition("?")[0],
        seconds=round(time.monotonic() - began, 1),
    )


def _connect(debug: bool, stack: contextlib.ExitStack, waiting: Callable[[str], object]) -> bool | Trouble:
    """Whether there is a cluster, to which this process is connected until the stack is closed."""
    try:
        if not finds_cluster():
            return False
        waiting("connecting to the cluster")
        with silenced(debug):
            # In a thread, since Ray waits without end for a head that accepts connections and does nothing with them.
            connected = in_thread(stack.enter_context, ray_session(debug))
            wait([connected], CONNECT_SECONDS)
        if not connected.done():
            return Trouble(SILENT_HEAD)
        connected.result()
        return True
    except InputError as error:  # this machine may show why
        return Trouble(str(error).rstrip("."))


def _ask(
    settings: DoctorSettings, at: tuple[str, str], nodes: Mapping[str, RayNode | None], asks: dict[str, Ask]
) -> dict[str, Any]:
    """What the nodes say, and the driver meanwhile: values of an `Examination`."""
    until, source, uri = time.monotonic() + ANSWER_SECONDS, settings.doctor.data, settings.store.tracking_uri
    driver, asked = Examiner(*at, in_cluster=False), Asked()
    driver.note()  # before anybody writes
    for name, ask in asks.items():
        node = nodes[name]
        asked[name] = {"machine": ask("machine"), "written": ask("write", name), "tracking": ask("tracking", uri)}
        if node:
            asked[name]["port"] = ask("listen", node.address)
        if node and node.gpus:
            asked[name]["visible_gpus"] = ask("visible_gpus")
        if source and not is_source_name(source):
            asked[name]["data"] = ask("data", source)
    logged_in = in_thread(_log_in, uri) if uri and scheme(uri) in ("http", "https") else None
    with _held(driver, until) as lease:
        if lease is True:
            # A disk may be mounted otherwise on each node; an object store is one, and a try costs it many calls.
            for name, ask in list(asks.items())[: None if is_local(at[0]) else 1]:
                asked[name]["lease"] = ask("kept_out")
        said = gather(asked, until)
        ports = {name: port for name, of in said.items() if isinstance(port := of.pop("port", None), int)}
        peers = {name: (node.address, ports[name]) for name, node in nodes.items() if node and name in ports}
        wrote = [name for name, of in said.items() if isinstance(of["written"], float)]
        met = _meet(asks, peers, wrote)
    found = [Node(name, node, **(said.get(name, {}) | met.get(name, {}))) for name, node in nodes.items()]
    if logged_in:
        wait([logged_in], max(0, until - time.monotonic()))
    return {"nodes": tuple(found), "lease": lease, "logged_in": logged_in and answer(logged_in)}


def _meet(asks: dict[str, Ask], peers: dict[str, tuple[str, int]], wrote: list[str]) -> dict[str, dict[str, Any]]:
    """Let the nodes look for each other, and for the files that the others wrote; then remove those."""
    asked: Asked = {name: {} for name in asks}
    for name, ask in asks.items():
        if name in peers and len(peers) > 1:
            asked[name]["links"] = ask("reach", {other: place for other, place in peers.items() if other != name})
        if name in wrote:
            asked[name]["seen"] = ask("seen", name, wrote)
    met = gather(asked, time.monotonic() + MEETING_SECONDS)
    removals = {name: {"removed": asks[name]("remove", name)} for name in wrote}
    removed = gather(removals, time.monotonic() + REMOVAL_SECONDS)
    return {name: of | removed.get(name, {}) for name, of in met.items()}


@contextlib.contextmanager
def _held(by: Examiner, until: float) -> Iterator[bool | Trouble]:
    """Hold the folder of the examination; True, or why not."""
    entered, over = Future[bool](), threading.Event()
    done = in_thread(by.hold, entered, over)
    try:
        wait([entered, done], max(0, until - time.monotonic()), return_when="FIRST_COMPLETED")
        yield True if entered.done() else answer(done)
    finally:
        over.set()
        wait([done], REMOVAL_SECONDS)


def is_local(storage: str) -> bool:
    """Whether a storage path is on a disk; settings have no `file://` any more."""
    return "://" not in storage


def _log_in(uri: str) -> bool:
    """Whether an MLflow server takes this process for a user."""
    load_mlflow().MlflowClient(uri).search_experiments(max_results=1)
    return True
