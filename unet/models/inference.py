"""A trained network in this process, in float32."""

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from unet.models.trained import TrainedModel


class Network:
    """The float32 network of a model. Start TensorFlow first.

    On one CPU thread, an image's numbers are the same bits in every batch of one size. Another batch size, number of
    threads or kind of processor may change the last bits.
    """

    def __init__(self, trained: "TrainedModel"):
        import keras
        import tensorflow as tf

        from unet.recipe.layers import build

        size = trained.image_size
        policy = keras.config.dtype_policy()
        keras.config.set_dtype_policy("float32")
        try:
            self.keras_model = build(trained.description, size)
        finally:
            keras.config.set_dtype_policy(policy)  # the process may have set one of its own
        for variable in self.keras_model.weights:
            variable.assign(trained.weights[variable.path])

        @tf.function(input_signature=[tf.TensorSpec((None, size, size, 3), tf.uint8)], autograph=False)
        def logits(images):
            return self.keras_model(tf.cast(images, tf.float32) / 255.0, training=False)

        self._logits = logits

    def logits(self, images: np.ndarray):
        """A float32 tensor (N, S, S, C) of images uint8 (N, S, S, 3)."""
        return self._logits(images)

    def probabilities(self, images: np.ndarray) -> np.ndarray:
        """float32 (N, S, S, C) of images uint8 (N, S, S, 3)."""
        import tensorflow as tf

        return tf.nn.softmax(self._logits(images)).numpy()
