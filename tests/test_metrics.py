"""Scores against an oracle that shares no code with them."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from unet import metric_names
from unet.metrics import scores

NAMES = ("pet", "background", "outline")


@given(arrays(np.uint8, (3, 5, 4), elements=st.sampled_from([0, 1, 2, 255])), st.integers(0, 2**32 - 1))
def test_scores_are_those_of_sets_of_pixels(truth, seed):
    predicted = np.random.default_rng(seed).integers(0, 3, truth.shape).astype(np.uint8)
    pixels = [(int(t), int(p)) for t, p in zip(truth.flat, predicted.flat, strict=True) if t != 255]
    counts = [[sum(pair == (t, p) for pair in pixels) for p in range(3)] for t in range(3)]
    result = scores(np.array(counts), NAMES)
    ious = []
    for i, name in enumerate(NAMES):
        true = {k for k, (t, _) in enumerate(pixels) if t == i}
        found = {k for k, (_, p) in enumerate(pixels) if p == i}
        if not true | found:
            assert result["iou"][name] is None and result["dice"][name] is None
            continue
        ious.append(len(true & found) / len(true | found))
        assert result["iou"][name] == ious[-1]
        assert result["dice"][name] == 2 * len(true & found) / (len(true) + len(found))
    assert result["mean_iou"] == (np.mean(ious) if ious else None)
    assert result["accuracy"] == (sum(t == p for t, p in pixels) / len(pixels) if pixels else None)


def test_an_absent_class_is_null_and_left_out_of_names():
    result = scores(np.array([[3, 1, 0], [0, 4, 0], [0, 0, 0]]), NAMES) | {"loss": 0.5}
    assert result["iou"]["outline"] is None and result["mean_iou"] == (3 / 4 + 4 / 5) / 2
    names = metric_names.of("val", result)
    assert "val/iou/outline" not in names and names["val/dice/pet"] == 6 / 7 and names["val/loss"] == 0.5
