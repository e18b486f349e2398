"""How what nodes have is put in a sentence."""

from collections.abc import Mapping
from typing import Any

from unet.cluster.nodes import named


def grouped(values: Mapping[str, Any]) -> dict[Any, list[str]]:
    """By value, the nodes that have it: the most frequent first."""
    found: dict[Any, list[str]] = {}
    for name, value in values.items():
        found.setdefault(value, []).append(name)
    return dict(sorted(found.items(), key=lambda item: -len(item[1])))


def compared(values: Mapping[str, Any]) -> str:
    """Such as "2.21.0 on h1, h2; 2.20.0 on h3"."""
    return "; ".join(f"{value} on {named(names)}" for value, names in grouped(values).items())


def counted(number: int, what: str) -> str:
    """Such as "1 node", "3 nodes"."""
    return f"{number} {what}" if number == 1 else f"{number} {what}s"
