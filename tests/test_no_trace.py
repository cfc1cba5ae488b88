"""Every public entry point that runs a user's model leaves that model as it was, bit by bit, and global seeds too."""

import hashlib
import random

import keras
import numpy as np
import pytest
import tensorflow as tf

import tfvllm
from tests.graph.conftest import bert_inputs, tiny_bert
from tfvllm.bench import models as bench
from tfvllm.serving.lint import lint

X = np.random.default_rng(0).normal(size=(2, 3, 4)).astype(np.float32)


class Everything(tf.Module):
    """A counter, an EMA, BatchNorm in training, tables, generators and a stateful LSTM, all written by one call."""

    def __init__(self):
        keras.utils.set_random_seed(3)
        self.count = tf.Variable(0, dtype=tf.int64)
        self.average = tf.Variable(tf.zeros([2]))
        self.table = tf.lookup.experimental.MutableHashTable(tf.int64, tf.float32, -1.0)
        self.generator = tf.random.Generator.from_seed(5)
        self.net = keras.Sequential(
            [
                keras.Input(batch_shape=X.shape),
                keras.layers.BatchNormalization(),
                keras.layers.LSTM(4, stateful=True),
                keras.layers.Dropout(0.5),
                keras.layers.Dense(2),
            ]
        )
        self.tracked = [v.value for v in self.net.variables]  # seeds of layers too, for saving

    @tf.function(input_signature=[tf.TensorSpec(X.shape, name="x")])
    def serve(self, x):
        self.count.assign_add(1)
        y = self.net(x, training=True) + 0.1 * self.generator.normal([2]) + 0.1 * tf.random.uniform([2], seed=9)
        self.average.assign(0.9 * self.average + 0.1 * tf.reduce_mean(y, 0))
        self.table.insert(self.count[None], tf.reduce_sum(y)[None])
        return {"y": y, "seen": self.table.lookup(tf.range(3, dtype=tf.int64)), "average": self.average.read_value()}

    def state(self):
        variables = [*self.variables, *(v.value for v in self.net.variables)]
        keys, values = self.table.export()
        return [v.numpy() for v in variables] + [keys.numpy(), values.numpy()]


def _global_state():
    return random.getstate(), [np.asarray(part).tolist() for part in np.random.get_state(legacy=True)]


def _drawn():
    """What TensorFlow's global seed gives next; looking is drawing, so both sides begin from the same seed."""
    return tf.random.uniform([3]).numpy().tolist()


def _files(folder):
    return {
        str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.rglob("*") if p.is_file()
    }


def _assert_same(found, wanted):
    for a, b in zip(found, wanted, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.fixture(scope="module")
def everything():
    module = Everything()
    module.serve(X)
    return module


@pytest.fixture(scope="module")
def saved(everything, tmp_path_factory):
    folder = tmp_path_factory.mktemp("everything") / "a"
    tf.saved_model.save(everything, str(folder), signatures=everything.serve)
    return folder


@pytest.fixture
def clock(monkeypatch):
    from tfvllm import timing

    real = timing.duel
    monkeypatch.setattr(timing, "duel", lambda first, second: real(first, second, seconds=0.0))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"live": True},
        pytest.param({"inputs": (X,)}, marks=pytest.mark.slow),
        pytest.param({"measure": True}, marks=pytest.mark.slow),
        pytest.param({"target": "onednn"}, marks=pytest.mark.slow),
    ],
)
def test_simplify(everything, options, clock):
    before, seeds = everything.state(), _global_state()
    tf.random.set_seed(1)
    fast = tfvllm.simplify(everything.serve, **options)
    drawn = _drawn()
    _assert_same(everything.state(), before)
    assert _global_state() == seeds
    tf.random.set_seed(1)
    assert drawn == _drawn()
    check = fast.report.verification
    assert check["status"] == "verified" and check["tolerance"] < 1e-2, check
    if "live" not in options:
        fast(X)
        _assert_same(everything.state(), before)


def test_simplify_saved_model_stores_the_state_that_was_there(everything, saved, tmp_path):
    before, files = everything.state(), _files(saved)
    report = tfvllm.simplify_saved_model(saved, tmp_path / "b", calibration=[{"x": X}])
    assert report.verification["status"] == "verified"
    _assert_same(everything.state(), before)
    assert _files(saved) == files
    old, new = (tf.train.load_checkpoint(str(p / "variables" / "variables")) for p in (saved, tmp_path / "b"))

    def values(reader):
        names = [
            n for n in reader.get_variable_to_shape_map() if n != "_CHECKPOINTABLE_OBJECT_GRAPH" and "save_c" not in n
        ]
        return [reader.get_tensor(n) for n in names]

    theirs = values(old)
    for array in values(new):
        assert any(a.dtype == array.dtype and np.array_equal(a, array) for a in theirs), array


def test_looking_at_a_saved_model_changes_no_file(saved):
    files = _files(saved)
    assert tfvllm.inspect_saved_model(saved)["signatures"]
    lint(saved)
    served = bench.ServedModel(saved)
    bench.latency({"model": served}, {"model": {"x": X}}, repeats=2, warmup=1)
    assert _files(saved) == files


def _weights(model):
    return [v.numpy() for v in model.variables]


@pytest.fixture(scope="module")
def classifier():
    return tiny_bert()


@pytest.fixture(scope="module")
def examples():
    return bert_inputs(4, 8), np.array([0, 1, 1, 0])


@pytest.mark.parametrize("importance", ["taylor", pytest.param("activation", marks=pytest.mark.slow)])
def test_shrinking_with_data(classifier, examples, importance):
    before, trainable = _weights(classifier), [v.trainable for v in classifier.variables]
    classifier.compile(loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    tfvllm.shrink(classifier, heads=0.5, ffn=0.5, importance=importance, data=examples)
    _assert_same(_weights(classifier), before)
    assert [v.trainable for v in classifier.variables] == trainable


def test_distilling_leaves_the_teacher(classifier, examples):
    before = _weights(classifier)
    student = tiny_bert(layers=1)
    distiller = tfvllm.Distiller(classifier, student, losses={"logits": tfvllm.losses.ForwardKL()})
    distiller.compile(optimizer="adam", loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    distiller.fit(*examples, batch_size=2, verbose=0)
    _assert_same(_weights(classifier), before)


@pytest.mark.slow
def test_exporting_with_its_check(tmp_path):
    from tests import tiny_models

    model = tiny_models.bert_classifier(seed=2)
    before, seeds = _weights(model), _global_state()
    tfvllm.export(model, tmp_path / "1", "classify", labels=["a", "b"])
    _assert_same(_weights(model), before)
    assert _global_state() == seeds
