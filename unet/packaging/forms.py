"""The forms in which a network alone is exported: a TensorFlow SavedModel, TFLite and ONNX.

All take `image`, float32 (N, S, S, 3), RGB in [0, 1], and give `probabilities`, float32 (N, S, S, C); N is 1 for
TFLite. Resizing is left to the caller: TFLite has no antialiased resize, and tf2onnx writes a broken file for it.

TFLite comes smaller, too: with weights in float16, or with weights and activations in eight bits, whose ranges are
those of the photos that the forms are compared on. Input and output stay float32.
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from unet.models.inference import Network

if TYPE_CHECKING:
    import keras

INPUT, OUTPUT = "image", "probabilities"

CALIBRATED = 100
"""Photos at most that ranges are taken from."""

Run = Callable[[np.ndarray], np.ndarray]
"""Probabilities float32 (1, S, S, C) of an image float32 (1, S, S, 3)."""


@dataclass(frozen=True)
class Form:
    """One of the forms.

    Attributes:
        file: its name in an export's folder; a folder's, for the SavedModel.
        write: writes a model to a path; images uint8 (N, S, S, 3) show what it will be given.
        open: loads what was written, to run on that many threads of the CPU.
        equal: the share of pixels to which it must give the same class as the network.
    """

    file: str
    write: Callable[["keras.Model", Path, np.ndarray], None]
    open: Callable[[Path, int], Run]
    equal: float = 0.999


def as_input(square: np.ndarray) -> np.ndarray:
    """float32 (1, S, S, 3) in [0, 1] of an image uint8 (S, S, 3)."""
    return square[None].astype(np.float32) / np.float32(255)


def exportable(network: Network) -> "keras.Model":
    """The float32 network of a model with probabilities as its output, which has the same name in every form."""
    import keras

    logits = network.keras_model
    return keras.Model(logits.inputs, {OUTPUT: keras.layers.Softmax(dtype="float32", name=OUTPUT)(logits.output)})


def _write_saved_model(model: "keras.Model", path: Path, images: np.ndarray) -> None:
    import tensorflow as tf

    # Not Keras' own export, whose archives hold the weights twice.
    module = tf.Module()
    module.model = model
    spec = tf.TensorSpec((None, *model.inputs[0].shape[1:]), tf.float32, name=INPUT)
    serve = tf.function(lambda image: model(image, training=False), input_signature=[spec], autograph=False)
    tf.saved_model.save(module, str(path), signatures=serve)


def _open_saved_model(path: Path, threads: int) -> Run:
    """Its threads are those of TensorFlow in this process."""
    import tensorflow as tf

    loaded = tf.saved_model.load(str(path))
    serve = loaded.signatures["serving_default"]

    def run(image: np.ndarray, loaded=loaded) -> np.ndarray:  # the signature alone does not keep the variables
        return serve(**{INPUT: tf.constant(image)})[OUTPUT].numpy()

    return run


def _write_tflite(model: "keras.Model", path: Path, images: np.ndarray, **options: Any) -> None:
    """`options` are those of TensorFlow's converter."""
    model.export(path, format="litert", verbose=False, input_signature=_signature(model, 1), **options)


def _write_float16(model: "keras.Model", path: Path, images: np.ndarray) -> None:
    import tensorflow as tf

    halves = {"supported_types": [tf.float16]}
    _write_tflite(model, path, images, optimizations=[tf.lite.Optimize.DEFAULT], target_spec=halves)


def _write_int8(model: "keras.Model", path: Path, images: np.ndarray) -> None:
    import tensorflow as tf

    shown = lambda: ({INPUT: as_input(image)} for image in images[:CALIBRATED])  # noqa: E731
    _write_tflite(model, path, images, optimizations=[tf.lite.Optimize.DEFAULT], representative_dataset=shown)


def _open_tflite(path: Path, threads: int) -> Run:
    import tensorflow as tf

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"\s*Warning: tf.lite.Interpreter is deprecated")
        interpreter = tf.lite.Interpreter(str(path), num_threads=threads)
    run = interpreter.get_signature_runner()
    return lambda image: run(**{INPUT: image})[OUTPUT]


def _write_onnx(model: "keras.Model", path: Path, images: np.ndarray) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="In the future `np.object`")
        model.export(path, format="onnx", verbose=False, input_signature=_signature(model, None))


def _open_onnx(path: Path, threads: int) -> Run:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return lambda image: session.run([OUTPUT], {INPUT: image})[0]


def _signature(model: "keras.Model", batch: int | None) -> list:
    import keras

    return [keras.InputSpec(shape=(batch, *model.inputs[0].shape[1:]), dtype="float32", name=INPUT)]


FORMS = {
    "saved_model": Form("saved_model", _write_saved_model, _open_saved_model),
    "tflite": Form("model.tflite", _write_tflite, _open_tflite),
    "onnx": Form("model.onnx", _write_onnx, _open_onnx),
    "tflite_float16": Form("model_float16.tflite", _write_float16, _open_tflite, equal=0.99),
    "tflite_int8": Form("model_int8.tflite", _write_int8, _open_tflite, equal=0.9),
}
