"""A trained model for use as a library: arrays of photos of any size in, class ids or probabilities out."""

import os
from collections.abc import Callable

import numpy as np

from unet.cluster.devices import float32_exactly
from unet.models.inference import Network
from unet.models.trained import TrainedModel

PIXELS = 2**22
"""Of the photos taken together, so that a stack of large ones does not fill the memory."""


class Segmenter:
    """A trained model in this process, in float32, as `unet.load` returns it.

    TensorFlow keeps the process' own threads and GPUs. TF32 is off while the model computes, and as before afterwards.

    Attributes:
        trained: the weights, and all that is known about them.
    """

    def __init__(self, trained: TrainedModel):
        os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
        import tensorflow as tf

        from unet.prediction.resizing import as_network_input, at_photo_size, probabilities_at

        self.trained = trained
        network, size, resize = Network(trained).keras_model, trained.image_size, trained.resize

        def segmented(finish):
            @tf.function(input_signature=[tf.TensorSpec((None, None, None, 3), tf.uint8)], autograph=False)
            def graph(photos):
                logits = network(as_network_input(photos, size, resize), training=False)
                return finish(logits, tf.shape(photos)[1], tf.shape(photos)[2], resize)

            return graph

        self._ids, self._probabilities = segmented(at_photo_size), segmented(probabilities_at)

    @property
    def classes(self) -> list[str]:
        """The names of the classes, in the order of their ids."""
        return self.trained.class_names

    def predict(self, photos: np.ndarray) -> np.ndarray:
        """Class ids uint8 (H, W) of a photo, uint8 (H, W, 3) RGB; or (N, H, W) of photos of one size, (N, H, W, 3).

        Raises:
            ValueError: they are of another shape or type.
        """
        return self._of(photos, self._ids)

    def probabilities(self, photos: np.ndarray) -> np.ndarray:
        """The probability of each class, float32 (H, W, C) or (N, H, W, C), of the same photos.

        Raises:
            ValueError: they are of another shape or type.
        """
        return self._of(photos, self._probabilities)

    def _of(self, photos: np.ndarray, graph: Callable) -> np.ndarray:
        photos = np.asarray(photos)
        if photos.dtype != np.uint8 or photos.ndim not in (3, 4) or photos.shape[-1] != 3 or 0 in photos.shape:
            raise ValueError(
                f"Photos are uint8 arrays (H, W, 3) or (N, H, W, 3), RGB; this is {photos.dtype} {photos.shape}."
            )
        batch = photos if photos.ndim == 4 else photos[None]
        at_a_time = max(1, PIXELS // (batch.shape[1] * batch.shape[2]))
        with float32_exactly():  # until the numbers are there
            parts = [graph(batch[i : i + at_a_time]).numpy() for i in range(0, len(batch), at_a_time)]
        return np.concatenate(parts) if photos.ndim == 4 else parts[0][0]
