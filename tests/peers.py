"""A peer of two workers joined by TensorFlow alone, without Ray: run by the tests as a script.

python tests/peers.py RANK PORT PORT OUTPUT SETTINGS_JSON STEPS [POISON_STEP]
"""

import json
import os
import sys

import numpy as np


def main(rank, ports, output, values, steps, poison):
    world = len(ports)
    if world > 1:
        cluster = {"cluster": {"worker": [f"127.0.0.1:{p}" for p in ports]}, "task": {"type": "worker", "index": rank}}
        os.environ["TF_CONFIG"] = json.dumps(cluster)
    import tensorflow as tf

    tf.config.threading.set_intra_op_parallelism_threads(1)
    tf.config.threading.set_inter_op_parallelism_threads(1)
    strategy = tf.distribute.MultiWorkerMirroredStrategy() if world > 1 else None

    from unet.config import TrainSettings, unflat
    from unet.data.synthetic import draw_pet
    from unet.training.learner import Learner

    settings = unflat(TrainSettings, {"precision": "float32"} | values | {"num_workers": world})
    learner = Learner(settings, 3, rank, world, strategy)
    learner.synchronise()
    size, batch = settings.data.image_size, settings.training.batch_size
    pets = [draw_pet(i, size) for i in range(2 * batch)]
    images, masks = np.stack([p[0] for p in pets]), np.stack([p[1] for p in pets])
    masks[1, : size // 2] = 255  # ignored pixels, so that the shares do not count the same
    share = slice(rank * batch // world, (rank + 1) * batch // world)

    def rows(step):
        first = step % 2 * batch
        return images[first : first + batch][share], masks[first : first + batch][share]

    results = {f"gradient/{i}": g for i, g in enumerate(learner.gradients(*rows(0), 1))}
    losses, norms, finite = [], [], []
    for step in range(steps):
        if step == poison and rank == world - 1:
            # Only this worker's own gradient is not finite.
            # The last bias: behind it no ReLU could make a zero of it.
            bias = learner.model.weights[-1]
            good = bias.numpy()
            bias.assign(np.full_like(good, np.nan))
            before = [w.numpy() for w in learner.model.weights[:-1]]
            result = learner.train_step(*rows(step), step + 1)
            bias.assign(good)
            after = [w.numpy() for w in learner.model.weights[:-1]]
            results["unchanged"] = np.array(all(map(np.array_equal, before, after)))
        else:
            result = learner.train_step(*rows(step), step + 1)
        losses.append(result.loss_sum / result.pixels)
        norms.append(result.grad_norm)
        finite.append(result.finite)
    results["counted"] = learner.sum_over_workers(np.array([2**53 + 1, rank]))
    results |= {f"weight/{i:03d}": w.numpy() for i, w in enumerate(learner.model.weights)}
    np.savez(output, losses=losses, norms=norms, finite=finite, **results)


if __name__ == "__main__":
    rank, ports, output, values, steps, poison = sys.argv[1:]
    main(int(rank), json.loads(ports), output, json.loads(values), int(steps), int(poison))
