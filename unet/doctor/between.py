"""What nodes have in common: their storage and its lease, MLflow, data, ports and clocks. From facts to findings."""

import statistics
from collections.abc import Iterator, Mapping

from unet.cluster.nodes import named
from unet.doctor.facts import Examination, Finding, Link, Trouble
from unet.doctor.machines import Check
from unet.doctor.words import counted, grouped

SKEW_SECONDS = 2
"""From there on lines of logs and points of curves stand in a wrong order."""
PAIRS = 3
"""Connections that failed are named up to this number."""


def storage(found: Examination) -> Iterator[Finding]:
    """Written from every node, found by all others, and removed."""
    for what, remedy in (("written", OTHER), ("seen", OTHER), ("removed", "allow to delete, too")):
        for words, names in grouped(_troubles(found, what)).items():
            verb = {"written": "write to", "seen": "read from", "removed": "remove from"}[what]
            yield Finding("storage", "failure", f"{named(names)} cannot {verb} {found.storage}: {words}", remedy)
    seen = {node.name: node.seen for node in found.nodes if isinstance(node.seen, frozenset)}
    together = {name: files & frozenset(seen) for name, files in seen.items()}
    if any(group != frozenset(seen) for group in together.values()):
        apart = " | ".join(named(names) for names in grouped(together).values())
        remedy = "mount one file system there on all, or give --storage-path s3://…"
        yield Finding("storage", "failure", f"{found.storage} is not one folder everywhere: {apart}", remedy)
    if seen:
        every = f" from {counted(len(seen), 'node')}, and each found what the others wrote" if len(seen) > 1 else ""
        yield Finding("storage", "ok", f"{found.storage}: written, read and removed{every}")


OTHER = "mend it, or give another --storage-path"
LOCKS = "mount it with locks between machines (NFS: without nolock and local_lock)"


def lease(found: Examination) -> Iterator[Finding]:
    """That a run's folder is for one driver at a time."""
    if isinstance(found.lease, Trouble):
        if not _troubles(found, "written"):
            yield Finding("lease", "failure", f"no lock at {found.storage}: {found.lease.words}", OTHER)
        return
    for words, names in grouped(_troubles(found, "lease")).items():
        yield Finding("lease", "failure", f"no lock at {found.storage} on {named(names)}: {words}", OTHER)
    told = {node.name: node.lease for node in found.nodes if isinstance(node.lease, bool)}
    shared = {node.name for node in found.nodes if isinstance(node.seen, frozenset) and len(node.seen) > 1}
    if inside := [name for name, out in told.items() if not out and (name in shared or len(found.nodes) == 1)]:
        text = f"locks at {found.storage} do not hold on {named(inside)}: two drivers could write one run"
        yield Finding("lease", "failure", text, LOCKS if found.is_local else OTHER)
    if any(told.values()):
        yield Finding("lease", "ok", "a folder that one process holds is refused to others")


def tracking(found: Examination) -> Iterator[Finding]:
    place = found.tracking or f"MLflow's database under {found.storage}"
    troubles, said = _troubles(found, "tracking"), [node for node, _ in found.answered if node.tracking is not None]
    remedy = "start it, open its port, or correct --tracking-uri"
    for words, names in grouped(troubles).items():
        if len(troubles) == len(said):
            yield Finding("mlflow", "failure", words, "" if ": " in words else remedy)
        else:
            text = f"{place} cannot be used from {named(names)}, where then no driver may run and no model be loaded"
            yield Finding("mlflow", "warning", f"{text} ({words})", remedy)
    if isinstance(found.logged_in, Trouble) and len(troubles) < len(said):
        remedy = "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD say who you are"
        yield Finding("mlflow", "failure", f"{place} does not take this user: {found.logged_in.words}", remedy)
    if said:
        where = f" from {counted(len(said), 'node')}" if len(said) > 1 else ""
        yield Finding("mlflow", "ok", f"{place} can be used{where}")


def data(found: Examination) -> Iterator[Finding]:
    for words, names in grouped(_troubles(found, "data")).items():
        where = f" on {named(names)}" if len(found.nodes) > 1 else ""
        yield Finding("data", "failure", f"{words}{where}", "put them where every node finds them, such as s3://…")
    digests = {node.name: node.data for node in found.nodes if isinstance(node.data, str)}
    if len(set(digests.values())) > 1:
        apart = " | ".join(named(names) for names in grouped(digests).values())
        yield Finding("data", "failure", f"{found.data} holds other data: {apart}", "copy or mount the same everywhere")
    if digests:
        same = f" is the same on {counted(len(digests), 'node')}" if len(digests) > 1 else " can be read"
        yield Finding("data", "ok", f"{found.data}{same}")


def ports(found: Examination) -> Iterator[Finding]:
    """That any port is open between nodes: TensorFlow's workers, and Ray's, take those that are free."""
    for words, names in grouped(_troubles(found, "links")).items():
        yield Finding("ports", "failure", f"{named(names)} could not look for the others: {words}", PORTS)
    links = _links(found)
    failed = {pair: link.words for pair, link in links.items() if isinstance(link, Trouble)}
    if failed:
        pairs = [f"{one} to {other} ({words})" for (one, other), words in list(failed.items())[:PAIRS]]
        more = f" and {len(failed) - PAIRS} more" if len(failed) > PAIRS else ""
        text = f"no connection from {', '.join(pairs)}{more}: workers there would wait for each other"
        yield Finding("ports", "failure", text, PORTS)
    if times := [1000 * link.seconds for link in links.values() if isinstance(link, Link)]:
        text = f"{counted(len(times), 'connection')} between nodes, to free ports; the slowest took {max(times):.1f} ms"
        yield Finding("ports", "ok", text)


PORTS = "open all TCP ports between the nodes, and to nobody else"


def clocks(found: Examination) -> Iterator[Finding]:
    """Of nodes among each other, and beside that of the storage."""
    remedy = "let the clocks follow a time server (chrony, systemd-timesyncd)"
    ahead = {pair: link.ahead for pair, link in _links(found).items() if isinstance(link, Link)}
    if ahead:
        first = next(iter(ahead))[0]
        from_first = {first: 0.0} | {other: seconds for (one, other), seconds in ahead.items() if one == first}
        middle = statistics.median_low(from_first.values())
        if apart := _apart({name: seconds - middle for name, seconds in from_first.items()}):
            yield Finding("clocks", "warning", f"beside the other nodes' clocks: {apart}", remedy)
    of_storage = {node.name: node.written for node in found.nodes if isinstance(node.written, float)}
    if apart := _apart(of_storage):
        yield Finding("clocks", "warning", f"beside the storage's clock: {apart}", remedy)
    if beside := ["each other's"] * bool(ahead) + ["the storage's"] * bool(of_storage):
        yield Finding("clocks", "ok", f"within {SKEW_SECONDS} s of {' and '.join(beside)}")


def _apart(seconds: Mapping[str, float]) -> str:
    """Such as "h1 is 3.2 s ahead, h2 is 60.0 s behind"; the furthest first, without those that hardly are."""
    wrong = sorted((name for name in seconds if abs(seconds[name]) > SKEW_SECONDS), key=lambda n: -abs(seconds[n]))
    return named(f"{name} is {abs(seconds[name]):.1f} s {'ahead' if seconds[name] > 0 else 'behind'}" for name in wrong)


def _troubles(found: Examination, what: str) -> dict[str, str]:
    """Of the nodes that answered otherwise: why there is no answer to this."""
    answers: Mapping[str, object] = {node.name: getattr(node, what) for node, _ in found.answered}
    return {name: answer.words for name, answer in answers.items() if isinstance(answer, Trouble)}


def _links(found: Examination) -> dict[tuple[str, str], Link | Trouble]:
    """By the names of both ends."""
    links: dict[tuple[str, str], Link | Trouble] = {}
    for node in found.nodes:
        if isinstance(node.links, Mapping):
            links |= {(node.name, other): link for other, link in node.links.items()}
    return links


CHECKS: tuple[Check, ...] = storage, lease, tracking, data, ports, clocks
