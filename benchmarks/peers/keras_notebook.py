"""The published notebook's training in plain Keras: `model.fit`, nothing of this project.

    python benchmarks/peers/keras_notebook.py FOLDER MINUTES [--filters 64]

The U-Net with dropout, Adam at a constant rate, cross-entropy, photos mirrored at random, batch 64. In bfloat16 where
`--precision` says so. The last line is JSON: minutes trained, and the test mean IoU of the last weights.
"""

import json
import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras
import numpy as np
import tensorflow as tf
from arrays import Clock, arguments, load, mean_iou
from keras import layers


def unet(side: int, filters: int, classes: int = 3) -> keras.Model:
    def block(x, width):
        for _ in range(2):
            x = layers.Conv2D(width, 3, padding="same", activation="relu", kernel_initializer="he_normal")(x)
        return x

    inputs = keras.Input((side, side, 3))
    x, skips = inputs, []
    for level in range(4):
        x = block(x, filters * 2**level)
        skips.append(x)
        x = layers.Dropout(0.3)(layers.MaxPooling2D(2)(x))
    x = block(x, filters * 16)
    for level in reversed(range(4)):
        x = layers.Conv2DTranspose(filters * 2**level, 3, 2, padding="same")(x)
        x = block(layers.Dropout(0.3)(layers.concatenate([x, skips[level]])), filters * 2**level)
    return keras.Model(inputs, layers.Conv2D(classes, 1, activation="softmax", dtype="float32")(x))


class EndsInTime(keras.callbacks.Callback):
    """Ends the training after so many seconds, within an epoch if need be."""

    def __init__(self, seconds: float):
        super().__init__()
        self.seconds = seconds

    def on_train_begin(self, logs=None):
        self.clock = Clock()

    def on_train_batch_end(self, batch, logs=None):
        self.model.stop_training = self.clock() >= self.seconds


def mirrored(image, mask):
    flip = tf.random.uniform(()) < 0.5
    image = tf.cast(tf.cond(flip, lambda: image[:, ::-1], lambda: image), tf.float32) / 255.0
    return image, tf.cond(flip, lambda: mask[:, ::-1], lambda: mask)


def main() -> None:
    args = arguments(__doc__, 64)
    keras.utils.set_random_seed(args.seed)
    keras.config.set_dtype_policy(args.precision)
    images, masks = load(args.folder, "train")
    data = tf.data.Dataset.from_tensor_slices((images, masks)).shuffle(len(images)).map(mirrored, tf.data.AUTOTUNE)
    model = unet(images.shape[1], args.filters)
    model.compile("adam", "sparse_categorical_crossentropy")
    ends = EndsInTime(60 * args.minutes)
    model.fit(data.batch(64).prefetch(2), epochs=10_000, verbose=0, callbacks=[ends])
    minutes = ends.clock() / 60
    score = mean_iou(lambda x: np.argmax(model.predict_on_batch(x / np.float32(255)), -1), *load(args.folder, "test"))
    print(json.dumps({"minutes": minutes, "mean_iou": score, "parameters": model.count_params()}))


if __name__ == "__main__":
    main()
