"""What an examination comes to: findings, worst of all for the exit code, as lines and as JSON."""

import json
from dataclasses import asdict
from typing import Any

from rich.text import Text

from unet.doctor import between, machines
from unet.doctor.facts import Examination, Finding
from unet.doctor.words import counted
from unet.terminal import Display

STYLES: dict[str, tuple[str, str]] = {
    "ok": ("ok", "green"),
    "skipped": ("–", "dim"),
    "warning": ("warning", "yellow"),
    "failure": ("failure", "bold red"),
}
WIDTH = max(len(word) for word, _ in STYLES.values())


def findings(found: Examination) -> list[Finding]:
    """What there is to say, in the order of the checks; that all is well only where a check says nothing else."""
    every = [list(check(found)) for check in (*machines.CHECKS, *between.CHECKS)]
    return [one for said in every for one in ([other for other in said if other.level != "ok"] or said)]


def fails(said: list[Finding]) -> bool:
    """Whether a run would fail, be refused, or not be what it should."""
    return any(finding.level == "failure" for finding in said)


def show(display: Display, found: Examination, said: list[Finding]) -> None:
    """A line for each finding, unbroken, so that what it tells to do can be copied."""
    names = max(len(finding.check) for finding in said)
    for one in said:
        word, style = STYLES[one.level]
        remedy = f" → {one.remedy}" if one.remedy else ""
        line = (f"{word.ljust(WIDTH)}  ", style), (f"{one.check.ljust(names)}  ", "cyan"), f"{one.text}{remedy}"
        display.console.print(Text.assemble(*line))
    levels = [one.level for one in said]
    told = [counted(levels.count(level), level) for level in ("failure", "warning") if level in levels]
    display.say(f"{', '.join(told) or 'All is well'}, after {found.seconds:.1f} s.", "bold")


def as_json(found: Examination, said: list[Finding]) -> str:
    """The findings, whether none fails, and what was measured."""
    content = {"ok": not fails(said), "findings": [asdict(one) for one in said], "measured": asdict(found)}
    return json.dumps(content, default=_plain, indent=2)


def _plain(value: Any) -> Any:
    if isinstance(value, frozenset):
        return sorted(value)
    raise TypeError(f"{type(value)} has no place in JSON")
