"""Run by test_replicas.py in a process of its own: one training step on this many logical CPUs, weights to a file."""

import os
import sys

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
import tensorflow as tf


def softmax(layers: int, **_) -> keras.Model:
    """A model whose softmax is a layer of its own, and its last."""
    inputs = keras.Input((4,))
    hidden = keras.layers.Dense(4 * layers, "relu")(inputs)
    return keras.Model(inputs, keras.layers.Softmax()(keras.layers.Dense(3)(hidden)))


def points(rows: int) -> tuple[np.ndarray, np.ndarray]:
    return np.random.default_rng(0).normal(size=(rows, 4)).astype("float32"), np.arange(rows) % 3


def main(path: str) -> None:
    cpu = tf.config.list_physical_devices("CPU")[0]
    tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
    import tfvllm
    from tests.distillation.pairs import batch, causal_lm, classifier, lm_batch

    losses = tfvllm.losses
    found = {}
    for count in (1, 2):  # one strategy of each size: a second one of two replicas would meet the keys of the first
        strategy = tf.distribute.MirroredStrategy([f"CPU:{i}" for i in range(count)])
        for family, models, data in (
            ("classifier", classifier, batch),
            ("causal_lm", causal_lm, lm_batch),
            ("softmax", softmax, points),
        ):
            with strategy.scope():
                keras.utils.set_random_seed(3)
                teacher, student = models(3), models(2, heads=4, width=8)
                distiller = tfvllm.Distiller(
                    teacher,
                    student,
                    losses={
                        "logits": losses.ForwardKL(2.0),
                        **(
                            {
                                "hidden": losses.HiddenStates(),
                                "maps": losses.AttentionMaps("last"),
                                "relations": losses.Relations(),
                            }
                            if family != "softmax"
                            else {}
                        ),
                    },
                    task_weight=0.0 if family == "causal_lm" else 0.2,
                )
                for layers in distiller.projections.values():
                    for layer in layers:
                        layer.kernel.assign(np.full(layer.kernel.shape, 0.1))
                loss = "sparse_categorical_crossentropy" if family == "softmax" else "auto"
                distiller.compile(keras.optimizers.SGD(0.3), loss)
            before = student.get_weights()
            parts = data(rows=8)  # the rows' real lengths differ, so the replicas see unlike numbers of positions
            logs = distiller.fit(tf.data.Dataset.from_tensor_slices(parts).batch(8), epochs=1, verbose=0).history
            for index, (old, new) in enumerate(zip(before, student.get_weights())):
                found[f"{family}/{count}/{index}"] = new - old
            for name, values in logs.items():
                found[f"{family}/{count}/{name}"] = np.array(values)
    np.savez(path, **found)


if __name__ == "__main__":
    main(sys.argv[1])
