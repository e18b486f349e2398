"""Predictions at a photo's own size: the graph that library, packaged model and evaluation share."""

import tensorflow as tf

from unet.config import Resize
from unet.data.resize import box_of


def as_network_input(photos, size: int, resize: Resize):
    """Photos uint8 (N, height, width, 3) of one size as the network's input, float32 (N, size, size, 3) in [0, 1].

    The pixels are those that Pillow gave the training: it reduces the width, rounds, reduces the height, and rounds.
    (Pillow 13 reduces some tall photos in the other order: a fifth of their values differ by one level.)
    """
    height, width = tf.unstack(tf.shape(photos)[1:3])
    top, left, new_height, new_width = box_of(height, width, size, resize)
    inputs = tf.cast(photos, tf.float32)
    for target in ((height, new_width), (new_height, new_width)):
        inputs = tf.floor(tf.image.resize(inputs, target, antialias=True) + 0.5)
    return tf.image.pad_to_bounding_box(inputs / 255.0, top, left, size, size)


def probabilities_at(logits, height, width, resize: Resize):
    """Probabilities float32 (N, height, width, C) of photos of one size, from the logits float32 (N, S, S, C).

    They are cut to where the photo lay in the square and enlarged bilinearly.
    """
    box = box_of(height, width, logits.shape[1], resize)
    return tf.image.resize(tf.image.crop_to_bounding_box(tf.nn.softmax(logits), *box), (height, width))


def at_photo_size(logits, height, width, resize: Resize):
    """Class ids uint8 (N, height, width) of photos of one size, from the logits: the likeliest of the probabilities."""
    return tf.cast(tf.argmax(probabilities_at(logits, height, width, resize), -1), tf.uint8)
