"""Muon (Jordan et al., 2024): the momentum of a kernel, made orthogonal, is its update.

A convolution's kernel counts as the matrix (all but its last dimension, its last dimension). Keras' own Muon leaves
kernels of four dimensions to Adam.
"""

import math
from collections import defaultdict
from collections.abc import Sequence
from typing import TYPE_CHECKING

from unet.recipe.network import Shapes

if TYPE_CHECKING:
    import keras
    import tensorflow as tf

CHANNELS = 8
"""A kernel with fewer inputs or outputs is no matrix worth the work: a depthwise one, say."""
COEFFICIENTS = 3.4445, -4.7750, 2.0315
"""Of x, x^3 and x^5 in the Newton-Schulz iteration: they bring singular values to about 0.7 to 1.2 in five steps."""
STEPS = 5
RMS = 0.2
"""The size of an update's entries at rate 1, about that of Adam's: both parts of the network take one rate, and a rate
that was found for AdamW serves (Liu et al., 2025: "Muon is scalable for LLM training")."""


def kernels(trainable: Shapes) -> list[str]:
    """The names of the weights that Muon takes: kernels but for the network's first and last, by channels."""
    found = [name for name, shape in trainable.items() if len(shape) >= 2]
    return [name for name in found[1:-1] if min(trainable[name][-2:]) >= CHANNELS]


class Muon:
    """Nesterov momentum of some kernels, made orthogonal, with decoupled weight decay.

    Attributes:
        momenta: what it remembers of each kernel, by its name.
    """

    def __init__(self, weights: "Sequence[keras.Variable]", momentum: float, weight_decay: float):
        import tensorflow as tf

        self._momentum, self._decay = momentum, weight_decay
        self.momenta = {w.path: tf.Variable(tf.zeros(w.shape), trainable=False) for w in weights}
        self._groups: dict[tuple[int, int], list[keras.Variable]] = defaultdict(list)
        for weight in weights:
            self._groups[math.prod(weight.shape[:-1]), weight.shape[-1]].append(weight)

    def apply(self, gradients: "dict[str, tf.Tensor]", rate: "tf.Tensor") -> None:
        """Update the kernels by their gradients, by name; those of equal shape together, which is faster."""
        import tensorflow as tf

        for (rows, columns), weights in self._groups.items():
            directions = [self._direction(w.path, gradients[w.path]) for w in weights]
            matrices = tf.stack([tf.reshape(direction, (rows, columns)) for direction in directions])
            updates = tf.unstack(orthogonal(matrices) * (RMS * math.sqrt(max(rows, columns))))
            for weight, update in zip(weights, updates, strict=True):
                change = tf.reshape(update, weight.shape)
                if self._decay:
                    change += self._decay * tf.convert_to_tensor(weight)
                weight.assign_sub(rate * change)

    def _direction(self, name: str, gradient: "tf.Tensor") -> "tf.Tensor":
        momentum = self.momenta[name].assign(self._momentum * self.momenta[name] + gradient)
        return gradient + self._momentum * momentum


def orthogonal(matrices: "tf.Tensor") -> "tf.Tensor":
    """The nearest orthogonal matrices, roughly: float32 (n, rows, columns), all singular values about 1.

    The iteration X <- a X + b X G + c X G G, with G = X' X, multiplies X by polynomials of its first G only. They are
    collected on the small side, which takes a third of the work for a kernel of 3x3.
    """
    import tensorflow as tf

    a, b, c = COEFFICIENTS
    if matrices.shape[1] < matrices.shape[2]:
        return tf.linalg.matrix_transpose(orthogonal(tf.linalg.matrix_transpose(matrices)))
    matrices /= tf.norm(matrices, axis=(1, 2), keepdims=True) + 1e-7
    gram = tf.matmul(matrices, matrices, transpose_a=True)
    identity = tf.eye(matrices.shape[2])
    product = None
    for _ in range(STEPS):
        factor = a * identity + b * gram + c * tf.matmul(gram, gram)
        product = factor if product is None else tf.matmul(product, factor)
        gram = tf.matmul(tf.matmul(factor, gram), factor)
    return tf.matmul(matrices, product)
