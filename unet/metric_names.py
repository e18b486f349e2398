"""The names of all metrics, in `metrics.jsonl`, MLflow, TensorBoard and the tables of sweeps alike.

MLflow's UI makes a section of charts of all that a name has before its last `/`: so a class' score stands beside those
of the other classes, and no section grows with the number of kinds.
"""

TRAIN_LOSS, LEARNING_RATE, SKIPPED_STEPS = "train/loss", "train/learning_rate", "train/skipped_steps"
VAL_LOSS, SCORE, BEST, BEST_EPOCH = "val/loss", "val/mean_iou", "val/best_mean_iou", "val/best_epoch"
TEST_SCORE = "test/mean_iou"
SPEED, DATA_WAIT = "speed/images_per_second", "speed/data_wait_fraction"
TRIALS, EPOCHS_SAVED = "sweep/trials", "sweep/trial_epochs_saved"
PLACE = ("epoch", "step", "time")
"""What a line of `metrics.jsonl` or `system.jsonl` has beside its metrics: where and when (milliseconds) they were."""


def step_of(record: dict) -> int:
    """Where a chart shows a line: the epoch of `metrics.jsonl`, the seconds of `system.jsonl`."""
    return record["epoch"] if "epoch" in record else record["step"]


def of_node(node: str, values: dict[str, float]) -> dict[str, float]:
    """`system/node_0/cpu_utilization_percentage`: MLflow's UI shows such names in a tab of their own."""
    return {f"system/{node}/{name}": value for name, value in values.items()}


def of(prefix: str, result: dict) -> dict[str, float]:
    """Scores as `unet.metrics.scores` gives them, by name: `val/mean_iou, val/iou/pet, …`; absent ones are left out."""
    found = {f"{prefix}/{key}": result.get(key) for key in ("loss", "accuracy", "mean_iou", "mean_dice")}
    for kind in ("iou", "dice"):
        found |= {of_class(prefix, kind, name): value for name, value in result[kind].items()}
    return {name: value for name, value in found.items() if value is not None}


def of_class(prefix: str, kind: str, name: str) -> str:
    """`val/iou/pet`."""
    return f"{prefix}/{kind}/{name}"
