"""Every family of models that the simplifier promises to work on: both targets, verified, no more nodes than before."""

import keras
import keras_nlp
import numpy as np
import pytest
import tensorflow as tf

import tfvllm
from tests.graph.conftest import run_saved
from tests.models import zoo

M = keras_nlp.models
TARGETS = ("portable", "onednn")
FAST = ("bert", "gpt2", "llama")
QUICK = ("bert", pytest.param("gpt2", marks=pytest.mark.thorough), "llama")
LANGUAGE = ("distil_bert", "roberta", "albert", "deberta_v3", "gemma", "mistral", "qwen", "t5", "bart")
slow = pytest.mark.slow


def _stack(name):
    common = {
        "vocabulary_size": zoo.VOCABULARY,
        "num_layers": 2,
        "num_heads": 4,
        "hidden_dim": 16,
        "intermediate_dim": 24,
    }
    if name == "albert":
        model = M.AlbertBackbone(embedding_dim=8, max_sequence_length=32, **common)
    else:
        model = M.DebertaV3Backbone(max_sequence_length=32, bucket_size=8, **common)
    rng = np.random.default_rng(0)
    for variable in model.variables:
        variable.assign(variable + rng.normal(0, 0.1, variable.shape))
    return model


def _language(name):
    return _stack(name) if name in ("albert", "deberta_v3") else zoo.build(name)


def _inputs(name, model, rows, length):
    found = zoo.inputs("bert" if name == "albert" else name, rows, length)
    return {k: found[k] for k in {t.name for t in model.inputs} & set(found)}


def _same(a, b):
    a, b = tf.nest.flatten(a), tf.nest.flatten(b)
    assert len(a) == len(b)
    for x, y in zip(a, b):
        scale = max(1.0, float(np.max(np.abs(x))))
        np.testing.assert_allclose(np.asarray(y), np.asarray(x), rtol=0, atol=3e-5 * scale)


def _holds(report, merged=True):
    for section in report.signatures.values():
        assert section.verification["ok"] and not section.rolled_back
        assert section.after["nodes"] <= section.before["nodes"] + _once(report)
    if merged:
        assert report.rules and report.after["nodes"] < report.before["nodes"] + _once(report)


def _once(report):
    """What finding the end of the padding, and attending with one query, cost in nodes, however many the layers."""
    return 24 * ("TrimPadding" in report.rules) + 20 * ("AbsorbKeyValueProjections" in report.rules)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", [*QUICK, *(pytest.param(n, marks=slow) for n in LANGUAGE)])
def test_language_models(name, target):
    model = _language(name)
    fast = tfvllm.simplify(model, target=target)
    _holds(fast.report)
    for rows, length in ((1, 8), (3, 12)):
        inputs = _inputs(name, model, rows, length)
        _same(model(inputs, training=False), fast(inputs))


@slow
@pytest.mark.parametrize("name", [*FAST, *LANGUAGE])
def test_language_models_as_saved_models(name, tmp_path):
    model = _language(name)
    model.export(str(tmp_path / "a"), verbose=False)
    inputs = _inputs(name, model, 3, 12)
    for target in TARGETS:
        _holds(tfvllm.simplify_saved_model(tmp_path / "a", tmp_path / target, target=target))
        loaded = tf.saved_model.load(str(tmp_path / target)).signatures["serving_default"]
        names = set(loaded.structured_input_signature[1])
        result = loaded(**{k: tf.constant(v) for k, v in inputs.items() if k in names})
        _same(list(run_saved(tmp_path / "a", inputs).values()), list(result.values()))


@pytest.mark.thorough
@pytest.mark.parametrize("name", FAST)
def test_what_must_merge_does(name):
    rules = tfvllm.simplify(_language(name), target="onednn").report.rules
    layers = 3
    if name == "llama":
        assert rules["FuseSwish"] == layers and rules["GammaIntoWeights"] == 2 * layers + 1
        assert rules["MergeParallelMatMuls"] == 2 * layers  # query/key/value and gate/up
    else:
        assert rules["FuseLayerNorm"] == 2 * layers + 1 and rules["FuseGelu"] == layers
        position_0_only = rules.get(
            "AbsorbKeyValueProjections", 0
        )  # the last layer of a classifier computes neither keys nor values
        assert position_0_only == (name == "bert") and rules["MergeParallelMatMuls"] == layers - position_0_only


def _image_model(name):
    arguments = {"weights": None, "input_shape": (32, 32, 3), "classes": 5}
    applications = {
        "resnet50": keras.applications.ResNet50,
        "mobilenet_v3": keras.applications.MobileNetV3Small,
        "efficientnet": keras.applications.EfficientNetB0,
    }
    model = applications[name](**arguments)
    rng = np.random.default_rng(0)
    for variable in model.variables:  # statistics and gains as training leaves them, not 0 and 1
        if "moving_mean" in variable.path or "beta" in variable.path:
            variable.assign(rng.normal(0, 0.1, variable.shape))
        if "moving_variance" in variable.path or "gamma" in variable.path:
            variable.assign(rng.uniform(0.5, 1.5, variable.shape))
    return model


@slow
@pytest.mark.parametrize("name, folded", [("resnet50", 53), ("mobilenet_v3", 34), ("efficientnet", 49)])
def test_image_models(name, folded):
    model = _image_model(name)
    images = np.random.default_rng(1).normal(size=(2, 32, 32, 3)).astype(np.float32)
    for target in TARGETS:
        fast = tfvllm.simplify(model, target=target)
        _holds(fast.report)
        assert fast.report.rules["ScaleIntoWeights"] == folded
        _same(model(images, training=False), fast(images))


def _mlp():
    layers = [
        keras.layers.Dense(16, activation="relu"),
        keras.layers.Dense(8),
        keras.layers.Dense(3, activation="softmax"),
    ]
    return keras.Sequential([keras.Input((10,)), *layers])


def _lstm():
    tokens = keras.Input((None,), dtype="int32")
    x = keras.layers.LSTM(8)(keras.layers.Embedding(20, 6)(tokens))
    return keras.Model(tokens, keras.layers.Dense(2)(x))


def _several_outputs():
    a, b = keras.Input((6,), name="a"), keras.Input((6,), name="b")
    x = keras.layers.Dense(8, activation="gelu")(keras.layers.Add()([a, b]))
    return keras.Model({"a": a, "b": b}, {"one": keras.layers.Dense(3)(x), "two": [keras.layers.Dense(2)(x), x]})


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(
    "build, inputs",
    [
        (_mlp, np.ones((3, 10), np.float32)),
        (_lstm, np.arange(12, dtype=np.int32).reshape(2, 6)),
        (_several_outputs, {"a": np.ones((2, 6), np.float32), "b": np.full((2, 6), 0.5, np.float32)}),
    ],
)
def test_keras_models(build, inputs, target):
    model = build()
    fast = tfvllm.simplify(model, target=target)
    _holds(fast.report)
    expected = model(inputs, training=False)
    result = fast(inputs)
    tf.nest.assert_same_structure(expected, result)
    _same(expected, result)


@pytest.mark.parametrize("target", TARGETS)
def test_plain_function_and_nothing_to_merge(target):
    @tf.function(input_signature=[tf.TensorSpec([None, 4], tf.float32)])
    def plain(x):
        return tf.linalg.matmul(tf.exp(x), x, transpose_b=True)

    fast = tfvllm.simplify(plain, target=target)
    _holds(fast.report, merged=False)
    x = tf.random.stateless_normal([3, 4], [1, 2])
    _same(plain(x), fast(x))

    @tf.function(input_signature=[tf.TensorSpec([None], tf.float32)])
    def least(x):
        return tf.raw_ops.Tanh(x=x)

    report = tfvllm.simplify(least, target=target).report
    assert set(report.rules) <= {"DropIdentities"} and report.after["ops"] == {"Tanh": 1}


@slow
@pytest.mark.parametrize("target", TARGETS)
def test_legacy_keras_saved_model(target, tmp_path):
    tf_keras = pytest.importorskip("tf_keras")
    layers = tf_keras.layers
    model = tf_keras.Sequential(
        [
            layers.Input((8, 8, 3)),
            layers.Conv2D(4, 3, padding="same"),
            layers.BatchNormalization(),
            layers.ReLU(),
            layers.GlobalAveragePooling2D(),
            layers.Dense(2),
        ]
    )
    for variable in model.variables:
        variable.assign(variable + np.random.default_rng(0).uniform(0, 0.2, variable.shape))
    tf.saved_model.save(model, str(tmp_path / "a"))
    report = tfvllm.simplify_saved_model(tmp_path / "a", tmp_path / "b", target=target)
    _holds(report)
    assert report.rules["BatchNormToAffine"] == 1 and report.rules["ScaleIntoWeights"] == 1
    images = np.random.default_rng(1).normal(size=(2, 8, 8, 3)).astype(np.float32)
    (name,) = tf.saved_model.load(str(tmp_path / "b")).signatures["serving_default"].structured_input_signature[1]
    (result,) = run_saved(tmp_path / "b", {name: images}).values()
    _same(model(images), result)


@pytest.mark.thorough
@pytest.mark.parametrize("target", TARGETS)
def test_signatures_tables_loops_and_ragged_text(target, tmp_path):
    text = pytest.importorskip("tensorflow_text")
    module = tf.Module()
    module.w = tf.Variable(np.random.default_rng(0).normal(size=(4, 4)), dtype=tf.float32)
    keys = tf.constant(["good", "bad", "film"])
    module.table = tf.lookup.StaticHashTable(tf.lookup.KeyValueTensorInitializer(keys, tf.constant([1, 2, 3])), 0)
    splitter = text.WhitespaceTokenizer()

    @tf.function(input_signature=[tf.TensorSpec([None], tf.string, "text")])
    def classify(text):
        ids = module.table.lookup(splitter.tokenize(text).flat_values)
        rows = splitter.tokenize(text).with_flat_values(ids).to_tensor(shape=[None, 4])
        x = tf.cast(rows, tf.float32)
        return {"scores": tf.nn.softmax((x @ module.w) * 0.5), "ids": rows}

    @tf.function(input_signature=[tf.TensorSpec([None, 4], tf.float32, "x")])
    def loop(x):
        def body(i, y):
            return i + 1, tf.tanh(y @ module.w) - -tf.tanh(y @ module.w)

        return {"y": tf.while_loop(lambda i, y: i < 3, body, [0, x])[1]}

    tf.saved_model.save(module, str(tmp_path / "a"), signatures={"serving_default": classify, "loop": loop})
    report = tfvllm.simplify_saved_model(tmp_path / "a", tmp_path / "b", target=target)
    _holds(report, merged=False)
    assert set(report.signatures) == {"serving_default", "loop"}
    assert "RewriteBodies" in report.signatures["loop"].fired
    texts = np.array([b"good film", b"", b"a bad bad film indeed it was"], object)
    for signature, inputs in (("serving_default", {"text": texts}), ("loop", {"x": np.ones((2, 4), np.float32)})):
        before, after = (run_saved(tmp_path / d, inputs, signature) for d in ("a", "b"))
        assert before.keys() == after.keys()
        _same([before[k] for k in sorted(before)], [after[k] for k in sorted(after)])
