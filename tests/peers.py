"""A peer of two workers joined by TensorFlow alone, without Ray: run by the tests as a script.

python tests/peers.py RANK PORTS_JSON DEVICES DETERMINISTIC

Each line that it reads is a training, as JSON: `output`, the file for its results; `values` of settings; `steps`, of
which none asks for the gradients of the first; and `poison`, the step in which the numbers of the last rank are not
finite.
"""

import json
import os
import sys

import numpy as np


def play_gpus(count):
    """Let logical CPU devices be GPUs that the process sees, as a strategy takes them (of the installed TensorFlow)."""
    import tensorflow as tf
    from tensorflow.python.distribute.collective_all_reduce_strategy import CollectiveAllReduceExtended

    (cpu,) = tf.config.list_physical_devices("CPU")
    tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * count)

    def devices(self, resolver, worker):
        by_itself = isinstance(resolver, tf.distribute.cluster_resolver.TFConfigClusterResolver)
        taken = count if by_itself else resolver.num_accelerators().get("GPU", 0)
        return tuple(f"{worker}/device:CPU:{i}" for i in range(max(1, taken))), "CPU"

    CollectiveAllReduceExtended._initialize_local_devices = devices


def join(rank, ports, devices, deterministic):
    """The strategy over the peers; None for one alone."""
    world = len(ports)
    if world > 1:
        cluster = {"cluster": {"worker": [f"127.0.0.1:{p}" for p in ports]}, "task": {"type": "worker", "index": rank}}
        os.environ["TF_CONFIG"] = json.dumps(cluster)
    from unet.cluster.devices import start_tensorflow
    from unet.training.backend import join_workers

    start_tensorflow(1, deterministic=deterministic)
    if devices > 1:
        play_gpus(devices)
    return join_workers(devices > 1) if world > 1 else None


def train(rank, world, strategy, output, values, steps, poison):
    from unet.config import TrainSettings, unflat
    from unet.data.synthetic import draw_pet
    from unet.recipe.augment import draw
    from unet.recipe.schedule import Horizon
    from unet.recipe.step import Learner

    settings = unflat(TrainSettings, {"precision": "float32"} | values | {"num_workers": world})
    learner = Learner(settings.recipe(3), rank, world, strategy)
    learner.synchronise()
    size, batch = settings.data.image_size, settings.training.batch_size
    pets = [draw_pet(i, size) for i in range(2 * batch)]
    images, masks = np.stack([p[0] for p in pets]), np.stack([p[1] for p in pets])
    masks[1, : size // 2] = 255  # ignored pixels, so that the shares do not count the same
    share = slice(rank * batch // world, (rank + 1) * batch // world)
    draws = draw(np.arange(2 * batch), 0, 1)

    def rows(step):
        first = step % 2 * batch
        return tuple(part[first : first + batch][share] for part in (images, masks, draws))

    def take(step):
        *pixels, drawn = rows(step)
        return learner.train_step(*pixels, step + 1, horizon=Horizon(steps, 2), draws=drawn)

    results = {}
    if not steps:
        *pixels, drawn = rows(0)
        results = {f"gradient/{i}": g for i, g in enumerate(learner.gradients(*pixels, 1, drawn))}
    losses, norms, finite = [], [], []
    for step in range(steps):
        if step == poison and rank == world - 1:
            # Only this worker's own gradient is not finite.
            # The last bias: behind it no ReLU could make a zero of it.
            bias = learner.model.weights[-1]
            good = bias.numpy()
            bias.assign(np.full_like(good, np.nan))
            before = [w.numpy() for w in learner.model.weights[:-1]]
            result = take(step)
            bias.assign(good)
            after = [w.numpy() for w in learner.model.weights[:-1]]
            results["unchanged"] = np.array(all(map(np.array_equal, before, after)))
        else:
            result = take(step)
        losses.append(result.loss)
        norms.append(result.grad_norm)
        finite.append(result.finite)
    results["counted"] = learner.sum_over_workers(np.array([2**53 + 1, rank]))
    results |= {f"weight/{name}": variable.numpy() for name, variable in learner.variables().items()}
    np.savez(f"{output}.part.npz", losses=losses, norms=norms, finite=finite, **results)
    os.replace(f"{output}.part.npz", output)


def main(rank, ports, devices, deterministic):
    strategy = join(rank, ports, devices, deterministic)
    import pytest
    import toys

    for line in sys.stdin:
        told = json.loads(line)
        with pytest.MonkeyPatch.context() as patch:
            if told["values"].pop("toys", False):
                toys.add_layer(patch)
            train(rank, len(ports), strategy, **told)


if __name__ == "__main__":
    main(*map(json.loads, sys.argv[1:]))
