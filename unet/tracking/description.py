"""A run's description in MLflow, in Markdown: what happened, where the best score stands, how to go on."""

from unet.classes import MANY
from unet.errors import first_line
from unet.pages.numbers import duration, score
from unet.runs.run import Run, called, where

NOTE = "mlflow.note.content"
"""MLflow's tag of a description."""
SHOWN_RESTARTS = 10
"""A tag holds 8,000 characters."""


def described(run: Run) -> str:
    """What the run's folder says, as Markdown."""
    summary, history = run.summary, run.history()
    parts = [_status(run, history), _scores(summary)]
    if restarts := summary.get("restart_log"):
        shown = restarts[-SHOWN_RESTARTS:]
        lines = [f"- {r['time']}, step {r['step']}: {first_line(r['reason'])[:200]}" for r in shown]
        left = f" (the last {len(shown)} are shown)" if len(shown) < len(restarts) else ""
        parts.append("\n".join([f"**{len(restarts)} restart(s) of workers**{left}", "", *lines]))
    commands = [("Made by", summary.get("command"))]
    commands.append(("Go on", f"{called('train')} --resume {run.name}{where(run.settings.run)}"))
    parts += [f"**{title}**\n\n```\n{command[:1000]}\n```" for title, command in commands if command]
    parts.append(f"Folder: `{run.folder}`. The report of an evaluation is its artifact `evaluation/test/report.html`.")
    return "\n\n".join(part for part in parts if part)


def _status(run: Run, history: list[dict]) -> str:
    summary, last = run.summary, history[-1] if history else {}
    best = summary.get("best_epoch")
    words = f"**{str(summary.get('status', 'running')).capitalize()}** after {last.get('epoch', 0)} epoch(s)"
    if history and (started := summary.get("started")):
        words += f", {duration((last['time'] - started) / 1000)} after it began"
    if best is not None and summary.get("val"):
        words += f". Best val mean IoU **{score(summary['val']['mean_iou'])}** in epoch {best}"
    if summary.get("begins_with"):
        words += f". Begins with {summary['begins_with']}"
    reason = summary.get("reason")
    return words + (f".\n\nReason: {first_line(reason)[:500]}" if reason else ".")


def _scores(summary: dict) -> str:
    """The table by class, of the best epoch on val and, at the end, on the test split."""
    found = {split: summary[split] for split in ("val", "test") if summary.get(split)}
    if not found:
        return ""
    heads = [f"{split} {kind}" for split in found for kind in ("IoU", "Dice")]
    names = list(next(iter(found.values()))["iou"])
    rows = [
        [name, *(score(of[kind].get(name)) for of in found.values() for kind in ("iou", "dice"))]
        for name in names[:MANY]
    ]
    rows.append(["**mean**", *(score(of[f"mean_{kind}"]) for of in found.values() for kind in ("iou", "dice"))])
    lines = [["class", *heads], ["---"] + ["---:"] * len(heads), *rows]
    left = f"\n\n{len(names) - MANY} more classes: see `summary.json`." if len(names) > MANY else ""
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + left
