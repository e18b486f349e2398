"""A trained model with its preprocessing, as an MLflow model that does not need this code.

uint8 (N, height, width, 3) photos of any one size in, uint8 (N, height, width) class ids out. Photos are resized to
the network antialiased, stretched or letterboxed as in training, and probabilities back bilinearly without the
padding; then the likeliest class is taken. Float32 throughout.
"""

import tempfile
from pathlib import Path

from unet.models.inference import Network
from unet.models.trained import TrainedModel
from unet.tracking.library import load_mlflow


def package(trained: TrainedModel) -> dict[str, bytes]:
    """The files of the packaged model, by relative path.

    Builds the float32 graph in this process, so call it where TensorFlow may be imported.
    """
    from importlib.metadata import version

    load_mlflow()
    import mlflow.tensorflow
    import numpy as np
    import tensorflow as tf
    from mlflow.models import ModelSignature
    from mlflow.types import Schema, TensorSpec

    from unet.prediction.resizing import as_network_input, at_photo_size

    size, resize = trained.image_size, trained.resize
    network = Network(trained).keras_model

    class Segmenter(tf.Module):
        def __init__(self):
            super().__init__()
            self.network = network
            self.weights = {weight.path: weight for weight in network.weights}  # `TrainedModel` finds them by name

        @tf.function(input_signature=[tf.TensorSpec((None, None, None, 3), tf.uint8, name="photos")])
        def __call__(self, photos):
            logits = self.network(as_network_input(photos, size, resize), training=False)
            return at_photo_size(logits, tf.shape(photos)[1], tf.shape(photos)[2], resize)

    signature = ModelSignature(
        Schema([TensorSpec(np.dtype(np.uint8), (-1, -1, -1, 3))]),
        Schema([TensorSpec(np.dtype(np.uint8), (-1, -1, -1))]),
    )
    requirements = [f"{name}=={version(name)}" for name in ("mlflow", "tensorflow", "numpy")]
    with tempfile.TemporaryDirectory() as scratch:
        target = Path(scratch) / "model"
        about = {"signature": signature, "pip_requirements": requirements, "metadata": trained.about}
        mlflow.tensorflow.save_model(Segmenter(), target, **about)
        return {str(p.relative_to(target)): p.read_bytes() for p in target.rglob("*") if p.is_file()}
