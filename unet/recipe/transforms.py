"""Augmentation inside the training step: what the numbers of `unet.recipe.augment.draw` do to pictures and masks.

A sample's own numbers decide alone what becomes of it, but for mixing, which takes a rectangle of its neighbour. All
lengths are shares of the picture's side.
"""

import math
from typing import NamedTuple

import numpy as np
import tensorflow as tf

from unet.classes import IGNORE
from unet.recipe.augment import DRAWS, AugmentSettings

ROTATION = math.radians(20)
SCALE, ASPECT = math.log(1.5), math.log(1.15)
SHIFT = 0.12
SATURATION, CONTRAST, BRIGHTNESS, CHANNEL = 0.5, 0.35, 0.2, 0.06
"""The most that strength 1 turns, scales, shifts and recolours, either way; scale, aspect, saturation and contrast as
logarithms of a factor."""
SHARE = 0.5
"""Of the samples that strength 1 blurs, and of those that it cuts out of."""
CUT_LEAST, CUT_MOST = 1 / 8, 3 / 8
"""Sides of the rectangle that is cut out."""
GREY = (0.299, 0.587, 0.114)
"""What red, green and blue give to a pixel's grey (ITU-R BT.601)."""
BINOMIAL = np.outer([1, 4, 6, 4, 1], [1, 4, 6, 4, 1]).astype(np.float32) / 256
"""The strongest blur: a deviation of one pixel."""

Numbers = dict[str, tf.Tensor]
"""Of a batch, each (N,) in [0, 1), by the names of `DRAWS`."""


class Drawn(NamedTuple):
    """What comes with every step.

    Attributes:
        draws: float32 (N, K) in [0, 1), from `unet.recipe.augment.draw`.
        strength: float32 scalar.
        mix: float32 scalar, the share of samples that are mixed.
    """

    draws: tf.Tensor
    strength: tf.Tensor
    mix: tf.Tensor


class Augmentation:
    """The changes that settings ask for, by graphs that are being traced; where they ask for none it does nothing."""

    def __init__(self, settings: AugmentSettings):
        self._varies, self._mixes, self._weights = settings.augment > 0, settings.mix > 0, settings.weights

    def __call__(self, images: tf.Tensor, masks: tf.Tensor, drawn: Drawn) -> tuple[tf.Tensor, tf.Tensor]:
        """Of a micro-shard: images float32 (N, S, S, 3) in [0, 1], masks uint8 (N, S, S).

        Ignored pixels move along with the others. Padding, of which every pixel is ignored, stays that.
        """
        numbers: Numbers = dict(zip(DRAWS, tf.unstack(drawn.draws, axis=1), strict=True))
        samples = tf.reduce_any(masks != IGNORE, (1, 2))
        if self._varies:
            by = {name: weight * drawn.strength for name, weight in self._weights.items() if weight}
            images, masks = _moved(images, masks, numbers, by)
            images = _recoloured(images, numbers, by)
        if self._mixes:
            images, masks = _mixed(images, masks, samples, numbers, drawn.mix)
        return images, masks


def _moved(images, masks, numbers: Numbers, by: Numbers) -> tuple[tf.Tensor, tf.Tensor]:
    """Scaled, rotated and shifted about the centre, what lies outside being reflected; then the images blurred.

    One bilinear sampling of the images, one of the masks that takes the nearest pixel.
    """
    side, border = images.shape[1], len(BINOMIAL) // 2 if "blur" in by else 0
    if by.keys() & {"scale", "rotate", "shift"}:
        matrix = _affine(numbers, by)
        shift = [SHIFT * side * by.get("shift", 0.0) * _either_way(numbers[name]) for name in ("shift_x", "shift_y")]
        images = _sampled(images, matrix, shift, border, "BILINEAR")
        masks = _sampled(masks[..., None], matrix, shift, 0, "NEAREST")[..., 0]
    elif border:
        images = tf.pad(images, [[0, 0], [border, border], [border, border], [0, 0]], "SYMMETRIC")
    if border:
        kernel = np.repeat(BINOMIAL[:, :, None, None], 3, 2)
        smooth = tf.nn.depthwise_conv2d(images, kernel, [1, 1, 1, 1], "VALID")
        amount = numbers["blur"] * _chosen(numbers["blurred"], SHARE * by["blur"])
        sharp = images[:, border:-border, border:-border]
        images = sharp + _over(amount, 4) * (smooth - sharp)
    return images, masks


def _affine(numbers: Numbers, by: Numbers) -> list[tf.Tensor]:
    """Where a pixel comes from, about the centre: a, b, c, d of (x, y) = (a X + b Y, c X + d Y), each (N,)."""
    angle = ROTATION * by.get("rotate", 0.0) * _either_way(numbers["angle"])
    scale = by.get("scale", 0.0)
    zoom = SCALE * scale * _either_way(numbers["zoom"])
    aspect = ASPECT * scale * _either_way(numbers["aspect"]) / 2  # which leaves the area to the zoom
    width, height = tf.exp(-zoom - aspect), tf.exp(-zoom + aspect)
    cos, sin = tf.cos(angle), tf.sin(angle)
    return [width * cos, -width * sin, height * sin, height * cos]


def _sampled(pictures, matrix: list[tf.Tensor], shift: list[tf.Tensor], border: int, how: str) -> tf.Tensor:
    """Pictures (N, S, S, C) through that map, and as much of what surrounds them."""
    a, b, c, d = matrix
    side = pictures.shape[1]
    centre = (side - 1) / 2
    first = -(centre + border)  # of a row of the result, from the centre
    x, y = (shift[0] + centre + (a + b) * first, shift[1] + centre + (c + d) * first)
    nought = tf.zeros_like(a)
    return tf.raw_ops.ImageProjectiveTransformV3(
        images=pictures,
        transforms=tf.stack([a, b, x, c, d, y, nought, nought], 1),
        output_shape=[side + 2 * border] * 2,
        fill_value=0.0,
        interpolation=how,
        fill_mode="REFLECT",
    )


def _recoloured(images, numbers: Numbers, by: Numbers) -> tf.Tensor:
    """Images with a rectangle of their mean colour, then in other colours: one 3x3 matrix and offset each."""
    side = images.shape[1]
    mean = tf.reduce_mean(images, (1, 2))
    # As lines of S * 3 numbers: to repeat values along an axis of three takes TensorFlow four times as long.
    lines = tf.reshape(images, (-1, side, side * 3))
    if "cutout" in by:
        height, width = (CUT_LEAST + (CUT_MOST - CUT_LEAST) * numbers[name] for name in ("cut_height", "cut_width"))
        cut = _rectangle(side, 3, numbers["cut_y"], numbers["cut_x"], height, width)
        cut &= _over(numbers["cut"] < SHARE * by["cutout"], 3)
        lines = tf.where(cut, tf.tile(mean, [1, side])[:, None], lines)
    if "colour" in by:
        strength = by["colour"]
        saturation = tf.exp(SATURATION * strength * _either_way(numbers["saturation"]))
        contrast = tf.exp(CONTRAST * strength * _either_way(numbers["contrast"]))
        grey = tf.constant(GREY)
        # Columns are the channels of the result: grey + saturation * (pixel - grey).
        matrix = _over(saturation, 3) * tf.eye(3) + _over(1 - saturation, 3) * grey[:, None]
        offset = (1 - contrast) * tf.linalg.matvec(mean, grey)
        offset += BRIGHTNESS * strength * _either_way(numbers["brightness"])
        channels = tf.stack([_either_way(numbers[name]) for name in ("red", "green", "blue")], 1)
        offset = offset[:, None] + CHANNEL * strength * channels
        pixels = tf.matmul(tf.reshape(lines, (-1, side * side, 3)), _over(contrast, 3) * matrix)
        lines = tf.reshape(pixels, (-1, side, side * 3)) + tf.tile(offset, [1, side])[:, None]
        lines = tf.clip_by_value(lines, 0.0, 1.0)
    return tf.reshape(lines, images.shape)


def _mixed(images, masks, samples, numbers: Numbers, share) -> tuple[tf.Tensor, tf.Tensor]:
    """A rectangle of the neighbour pasted into some samples (CutMix: Yun et al., ICCV 2019).

    Neighbours are two and two, so that the number of workers does not change them where each has an even number of
    samples. What `samples`, bool (N,), calls padding neither gives nor takes.
    """
    rows = np.arange(images.shape[0])
    neighbour = np.where((rows ^ 1) < len(rows), rows ^ 1, rows)
    side = tf.sqrt(numbers["mix_area"])
    chosen = (numbers["mixed"] < share) & samples & tf.gather(samples, neighbour)

    def pasted(pictures: tf.Tensor, channels: int) -> tf.Tensor:
        place = _rectangle(images.shape[1], channels, numbers["mix_y"], numbers["mix_x"], side, side)
        place = tf.reshape(place & _over(chosen, 3), pictures.shape)
        return tf.where(place, tf.gather(pictures, neighbour), pictures)

    return pasted(images, 3), pasted(masks, 1)


def _rectangle(side: int, channels: int, y, x, height, width) -> tf.Tensor:
    """Of pictures, line by line, the numbers in a rectangle about (y, x), cut off at the edges: bool (N, S, S * C).

    Places and lengths are shares of the side, (N,).
    """
    places = (np.arange(side, dtype=np.float32) + 0.5) / side
    rows = tf.abs(places - y[:, None]) < height[:, None] / 2
    columns = tf.abs(places - x[:, None]) < width[:, None] / 2
    return rows[:, :, None] & tf.repeat(columns, channels, axis=1)[:, None]


def _either_way(number: tf.Tensor) -> tf.Tensor:
    """From [0, 1) to [-1, 1)."""
    return 2 * number - 1


def _chosen(number: tf.Tensor, share: tf.Tensor) -> tf.Tensor:
    """1 for a share of the samples, else 0."""
    return tf.cast(number < share, tf.float32)


def _over(values: tf.Tensor, rank: int) -> tf.Tensor:
    """(N,) as (N, 1, ...) of so many axes."""
    return tf.reshape(values, (-1, *[1] * (rank - 1)))
