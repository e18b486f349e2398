"""What the network says, at a photo's own size: the graph that the packaged model and the evaluation share."""

import tensorflow as tf

from unet.config import Resize
from unet.data.resize import box_of


def as_network_input(photos, size: int, resize: Resize):
    """Photos uint8 (N, height, width, 3) of one size as the network's input, float32 (N, size, size, 3) in [0, 1]."""
    height, width = tf.unstack(tf.shape(photos)[1:3])
    box = box_of(height, width, size, resize)
    inputs = tf.image.resize(tf.cast(photos, tf.float32), box[2:], antialias=True) / 255.0
    return tf.image.pad_to_bounding_box(inputs, *box[:2], size, size)


def at_photo_size(logits, height, width, resize: Resize):
    """Class ids uint8 (N, height, width) of photos of one size, from the network's logits float32 (N, S, S, C).

    Probabilities are cut to where the photo lay in the square and enlarged bilinearly; then the likeliest is taken.
    """
    box = box_of(height, width, logits.shape[1], resize)
    probabilities = tf.image.crop_to_bounding_box(tf.nn.softmax(logits), *box)
    return tf.cast(tf.argmax(tf.image.resize(probabilities, (height, width)), -1), tf.uint8)
