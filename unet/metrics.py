"""Class-wise scores from a confusion matrix of exact integers.

Everything follows from one int64 matrix whose row is the truth and whose column is the prediction, summed over
images and workers. Counting in float32 would go wrong past 2**24 pixels, which is 1,024 images of 128x128.
"""

from collections.abc import Sequence

import numpy as np


def scores(confusion: np.ndarray, names: Sequence[str]) -> dict:
    """IoU and Dice by class name, their means, accuracy and the matrix, ready for JSON.

    IoU is TP / (TP + FP + FN), Dice 2 TP / (2 TP + FP + FN). A class absent from truth and prediction has neither
    (None), and the means leave it out.
    """
    confusion = np.asarray(confusion)
    true_positive = np.diagonal(confusion).astype(float)
    sizes = confusion.sum(0) + confusion.sum(1)  # 2 TP + FP + FN

    def by_class(values):
        return {name: float(v) if size else None for name, v, size in zip(names, values, sizes, strict=True)}

    with np.errstate(invalid="ignore"):
        iou = by_class(true_positive / (sizes - true_positive))
        dice = by_class(2 * true_positive / sizes)
    total = int(confusion.sum())
    return {
        "iou": iou,
        "dice": dice,
        "mean_iou": _mean(iou),
        "mean_dice": _mean(dice),
        "accuracy": float(true_positive.sum() / total) if total else None,
        "confusion": confusion.tolist(),
    }


def as_metrics(split: str, result: dict) -> dict[str, float]:
    """Scores as MLflow metric names: `val_loss, val_mean_iou, val_iou_pet, …`; absent ones are left out."""
    metrics = {f"{split}_{key}": result[key] for key in ("loss", "accuracy", "mean_iou", "mean_dice")}
    for kind in ("iou", "dice"):
        metrics |= {f"{split}_{kind}_{name}": value for name, value in result[kind].items()}
    return {name: value for name, value in metrics.items() if value is not None}


def _mean(values: dict) -> float | None:
    present = [v for v in values.values() if v is not None]
    return float(np.mean(present)) if present else None
