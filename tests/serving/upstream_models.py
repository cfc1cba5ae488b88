"""The models of TF Serving's own tests, built anew: what they compute and how their signatures are named is theirs."""

from pathlib import Path

PREDICT, CLASSIFY, REGRESS = (f"tensorflow/serving/{name}" for name in ("predict", "classify", "regress"))


def _save(session, directory, signatures, **options) -> None:
    """`signatures`: name to (method name, tensors in, tensors out)."""
    import tensorflow as tf

    v1 = tf.compat.v1.saved_model
    definitions = {
        name: v1.signature_def_utils.build_signature_def(
            *({key: _info(tensor) for key, tensor in tensors.items()} for tensors in (inputs, outputs)), method
        )
        for name, (method, inputs, outputs) in signatures.items()
    }
    builder = v1.builder.SavedModelBuilder(str(directory))
    builder.add_meta_graph_and_variables(session, ["serve"], signature_def_map=definitions, **options)
    builder.save()


def _info(tensor):
    import tensorflow as tf

    if isinstance(tensor, tuple):  # declared as a scalar, whatever it is
        info = tf.compat.v1.saved_model.utils.build_tensor_info(tensor[0])
        del info.tensor_shape.dim[:]
        return info
    return tf.compat.v1.saved_model.utils.build_tensor_info(tensor)


def half_plus_two(directory: Path) -> None:
    """y = a x + b, y2 = a x + c of tf.Examples or of x itself, y3 = a x2 + c; written as TensorFlow 1 does."""
    import tensorflow as tf

    v1 = tf.compat.v1
    with tf.Graph().as_default(), v1.Session() as session:
        a, b, c = (v1.Variable(value, name=name) for name, value in (("a", 0.5), ("b", 2.0), ("c", 3.0)))
        asset = directory.parent.parent / "foo.txt"
        asset.parent.mkdir(parents=True, exist_ok=True)
        asset.write_text("asset-file-contents")
        v1.add_to_collection(v1.GraphKeys.ASSET_FILEPATHS, tf.constant(str(asset)))
        example = v1.placeholder(tf.string, [None], name="tf_example")
        features = tf.io.parse_example(
            example,
            {
                "x": tf.io.FixedLenFeature([1], tf.float32),
                "x2": tf.io.FixedLenFeature([1], tf.float32, default_value=[0.0]),
            },
        )
        x, x2 = tf.identity(features["x"], name="x"), tf.identity(features["x2"], name="x2")
        y, y2, y3 = (
            tf.identity(a * value + plus, name=name) for name, value, plus in (("y", x, b), ("y2", x, c), ("y3", x2, c))
        )
        session.run(v1.global_variables_initializer())
        _save(
            session,
            directory,
            {
                "serving_default": (PREDICT, {"x": x}, {"y": y}),
                "regress_x_to_y": (REGRESS, {"inputs": example}, {"outputs": y}),
                "regress_x_to_y2": (REGRESS, {"inputs": example}, {"outputs": y2}),
                "regress_x2_to_y3": (REGRESS, {"inputs": x2}, {"outputs": y3}),
                "classify_x_to_y": (CLASSIFY, {"inputs": example}, {"scores": y}),
                "classify_x2_to_y3": (CLASSIFY, {"inputs": x2}, {"scores": y3}),
            },
            assets_collection=v1.get_collection(v1.GraphKeys.ASSET_FILEPATHS),
        )


def half_plus_two_tf2(directory: Path) -> None:
    """The same, written as TensorFlow 2 does: every signature has the predict method name."""
    import tensorflow as tf

    module = tf.Module()
    module.a, module.b, module.c = tf.Variable(0.5), tf.Variable(2.0), tf.Variable(3.0)

    def signature(spec, plus, out):
        @tf.function(input_signature=[spec])
        def compute(value):
            if spec.dtype == tf.string:
                value = tf.io.parse_example(value, {"x": tf.io.FixedLenFeature([1], tf.float32)})["x"]
            return {out: module.a * value + plus}

        return compute

    examples, numbers = tf.TensorSpec([None], tf.string, "inputs"), tf.TensorSpec([1], tf.float32, "inputs")
    tf.saved_model.save(
        module,
        str(directory),
        signatures={
            "serving_default": signature(tf.TensorSpec([1], tf.float32, "x"), module.b, "y"),
            "regress_x_to_y": signature(examples, module.b, "outputs"),
            "regress_x_to_y2": signature(examples, module.c, "outputs"),
            "regress_x2_to_y3": signature(numbers, module.c, "outputs"),
            "classify_x_to_y": signature(examples, module.b, "scores"),
            "classify_x2_to_y3": signature(numbers, module.c, "scores"),
        },
    )


def half_plus_three(directory: Path) -> None:
    """y = x / 2 + 3. The signature declares scalars, the graph's x is [?, 1]: an older exporter wrote no shapes."""
    import tensorflow as tf

    v1 = tf.compat.v1
    with tf.Graph().as_default(), v1.Session() as session:
        x = v1.placeholder(tf.float32, [None, 1], name="x")
        y = x * v1.Variable(0.5) + v1.Variable(3.0)
        session.run(v1.global_variables_initializer())
        _save(
            session,
            directory,
            {
                "serving_default": (PREDICT, {"x": (x,)}, {"y": (y,)}),
                REGRESS: (REGRESS, {"inputs": (x,)}, {"outputs": (y,)}),
            },
        )


def counter(directory: Path) -> None:
    """Signatures without inputs, on a variable of TensorFlow 1, and one with a method name of its own."""
    import tensorflow as tf

    v1 = tf.compat.v1
    with tf.Graph().as_default(), v1.Session() as session:
        count = v1.Variable(0.0, use_resource=False)
        delta = v1.placeholder(tf.float32)
        signatures = {
            "get_counter": ({}, count),
            "incr_counter": ({}, count.assign_add(1.0)),
            "incr_counter_by": ({"delta": delta}, count.assign_add(delta)),
            "reset_counter": ({}, count.assign(0.0)),
        }
        session.run(v1.global_variables_initializer())
        written = {name: (PREDICT, given, {"output": output}) for name, (given, output) in signatures.items()}
        written["odd_method"] = ("not/supported/method", {"x": delta}, {"y": delta * 0.5 + 2.0})
        _save(session, directory, written)


def classifier(directory: Path) -> None:
    """Examples of two classes, scores and an `output` that go out as they came in, and signatures of wrong outputs."""
    import tensorflow as tf

    spec = {
        "class": tf.io.FixedLenFeature([2], tf.string, ["", ""]),
        "score": tf.io.FixedLenFeature([2], tf.float32, [0.0, 0.0]),
        "output": tf.io.FixedLenFeature([1], tf.float32, [0.0]),
    }

    def signature(outputs):
        @tf.function(input_signature=[tf.TensorSpec([None], tf.string, "inputs")])
        def compute(inputs):
            row = tf.io.parse_example(inputs, spec)
            return outputs(row["class"], row["score"], row["output"])

        return compute

    def twice(tensor):
        return tf.concat([tensor, tensor], 0)

    signatures = {
        "serving_default": lambda classes, scores, _: {"classes": classes, "scores": scores},
        "classes_only": lambda classes, scores, _: {"classes": classes},
        "scores_only": lambda classes, scores, _: {"scores": scores},
        "plus_one": lambda classes, scores, _: {"classes": classes, "scores": scores + 1},
        "rank_three": lambda classes, scores, _: {"scores": scores[:, :, None]},
        "classes_batch": lambda classes, scores, _: {"classes": twice(classes), "scores": scores},
        "classes_type": lambda classes, scores, _: {"classes": scores, "scores": scores},
        "scores_batch": lambda classes, scores, _: {"classes": classes, "scores": twice(scores)},
        "scores_type": lambda classes, scores, _: {"classes": classes, "scores": classes},
        "widths": lambda classes, scores, _: {"classes": classes, "scores": tf.concat([scores, scores], 1)},
        "regress": lambda classes, scores, output: {"outputs": output[:, 0]},
        "regress_plus_one": lambda classes, scores, output: {"outputs": output + 1},
        "regress_wide": lambda classes, scores, output: {"outputs": scores},
        "regress_batch": lambda classes, scores, output: {"outputs": twice(output)},
        "regress_type": lambda classes, scores, output: {"outputs": classes[:, :1]},
    }
    module = tf.Module()
    tf.saved_model.save(
        module, str(directory), signatures={name: signature(outputs) for name, outputs in signatures.items()}
    )


def saved(directory: Path) -> None:
    """y = 6 x of x of any shape, and a signature whose answer is a constant."""
    import tensorflow as tf

    root = tf.Module()
    root.three, root.two = tf.Variable(3.0), tf.Variable(2.0)
    spec = [tf.TensorSpec(None, tf.float32, name="x")]
    product = tf.function(lambda x: {"y": root.three * root.two * x}, input_signature=spec)
    constant = tf.function(lambda x: {"y": 2.0}, input_signature=spec)
    signatures = {"serving_default": product, "custom_signature_key": constant}
    tf.saved_model.save(root, str(directory), signatures=signatures)


def keras_2(directory: Path) -> None:
    """A compiled and trained Keras 2 model, x [?, 1] to y = x, with an optimizer's slot variables in its checkpoint."""
    import numpy as np
    import tensorflow as tf
    import tf_keras

    model = tf_keras.Sequential(
        [
            tf_keras.layers.Input((1,), name="x"),
            tf_keras.layers.Dense(1, kernel_initializer="ones", bias_initializer="zeros"),
            tf_keras.layers.Lambda(lambda x: x, name="y"),
        ]
    )
    model.compile(optimizer=tf_keras.optimizers.legacy.Adam(0.0), loss="mse")
    model.fit(np.ones((4, 1)), np.ones((4, 1)), verbose=0)
    tf.saved_model.save(model, str(directory))


MODELS = {
    "default": half_plus_two,
    "tf2": half_plus_two_tf2,
    "half_plus_three": half_plus_three,
    "counter": counter,
    "classifier": classifier,
    "saved": saved,
}


def write_all(base: Path) -> None:
    """Each of MODELS as `base/NAME/00000123`."""
    for name, write in MODELS.items():
        write(base / name / "00000123")
