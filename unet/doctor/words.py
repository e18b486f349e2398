"""How nodes are named in a sentence."""

from collections.abc import Iterable, Mapping
from typing import Any

NAMED = 4
"""So many nodes are named, of more the number."""


def named(nodes: Iterable[str]) -> str:
    """Such as "h1, h2, h3, h4 and 96 more"."""
    names = list(nodes)
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more


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
