"""Class-wise scores from a confusion matrix of exact integers.

Everything follows from one int64 matrix whose row is the truth and whose column is the prediction, summed over
images and workers. Counting in float32 would go wrong past 2**24 pixels, which is 1,024 images of 128x128.
"""

from collections.abc import Sequence

import numpy as np


def confusion_of(truth: np.ndarray, predicted: np.ndarray, classes: int) -> np.ndarray:
    """int64 (C, C) of masks of one shape, uint8 class ids; pixels without a true class (255) are not counted."""
    counted = truth < classes
    cells = truth[counted].astype(np.int64) * classes + predicted[counted]
    return np.bincount(cells, minlength=classes**2).reshape(classes, classes)


def iou_and_dice(true_positive: np.ndarray, truth: np.ndarray, predicted: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """IoU, TP / (TP + FP + FN), and Dice, 2 TP / (2 TP + FP + FN), of each class, both float64; NaN for an absent one.

    Takes the pixels of each class that are right, that truly have it and that are predicted to, in any one shape.
    """
    sizes = truth + predicted  # 2 TP + FP + FN
    with np.errstate(invalid="ignore", divide="ignore"):
        return true_positive / (sizes - true_positive), 2 * true_positive / sizes


def scores(confusion: np.ndarray, names: Sequence[str]) -> dict:
    """IoU and Dice by class name, their means, accuracy and the matrix, ready for JSON.

    A class absent from truth and prediction has neither (None), and the means leave it out.
    """
    confusion = np.asarray(confusion)
    true_positive = np.diagonal(confusion)
    iou, dice = (
        {name: None if np.isnan(value) else float(value) for name, value in zip(names, values, strict=True)}
        for values in iou_and_dice(true_positive, confusion.sum(1), confusion.sum(0))
    )
    total = int(confusion.sum())
    return {
        "iou": iou,
        "dice": dice,
        "mean_iou": _mean(iou),
        "mean_dice": _mean(dice),
        "accuracy": float(true_positive.sum() / total) if total else None,
        "confusion": confusion.tolist(),
    }


def _mean(values: dict) -> float | None:
    present = [v for v in values.values() if v is not None]
    return float(np.mean(present)) if present else None
