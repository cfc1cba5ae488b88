"""SavedModels that Keras 2 wrote from compiled models: read without Keras, as TF Serving reads them."""

import subprocess
import sys

import numpy as np
import pytest
import tensorflow as tf

import tfvllm
from tfvllm.graph import loading
from tfvllm.savedmodel import read
from tfvllm.savedmodel.protos import read_proto
from tfvllm.serving.run import predict

# Both generations of Keras 2's optimizers, and one of a user's own of each.
QUICK = ("adam", "old_momentum", "old_own")
MORE = ("momentum", "own", "old_adam")
WRITE = """
import os, sys
os.environ["TF_USE_LEGACY_KERAS"] = "1"
import numpy as np, tensorflow as tf, tf_keras as keras
old, folder = keras.optimizers.legacy, sys.argv[1]


class Own(keras.optimizers.Optimizer):
    def __init__(self):
        super().__init__(name="own")
        self._learning_rate = self._build_learning_rate(0.1)

    def build(self, variables):
        super().build(variables)
        self.speed = [self.add_variable_from_reference(v, "speed") for v in variables]

    def update_step(self, gradient, variable):
        speed = self.speed[self._index_dict[self._var_key(variable)]]
        speed.assign(0.9 * speed + gradient)
        variable.assign_sub(0.1 * speed)


class OldOwn(old.Optimizer):
    def _create_slots(self, variables):
        for variable in variables:
            self.add_slot(variable, "speed")

    def _resource_apply_dense(self, gradient, variable, apply_state=None):
        return variable.assign_sub(0.1 * self.get_slot(variable, "speed").assign_add(gradient))

    def get_config(self):
        return super().get_config()


made = {
    "adam": keras.optimizers.Adam(0.1), "momentum": keras.optimizers.SGD(0.1, momentum=0.9), "own": Own(),
    "old_adam": old.Adam(0.1), "old_momentum": old.SGD(0.1, momentum=0.9), "old_own": OldOwn("OldOwn"),
}
x = np.random.default_rng(0).normal(size=[6, 4]).astype("float32")
answers = {"x": x}
for name in sys.argv[2:]:
    optimizer = made[name]
    keras.utils.set_random_seed(1)
    model = keras.Sequential([keras.layers.Dense(3, activation="tanh"), keras.layers.BatchNormalization()])
    model.build([None, 4])
    model.compile(optimizer, "mse", run_eagerly=True)
    model.train_on_batch(x, np.ones([6, 3]))
    assert len(optimizer.variables() if callable(optimizer.variables) else optimizer.variables) > 1
    answers[name] = model(x).numpy()
    model.save(f"{folder}/{name}/1", save_format="tf")
np.savez(f"{folder}/answers.npz", **answers)
"""
# One process, whose Keras and Keras 2 are hidden, as the command line has it where they are not installed.
WITHOUT_KERAS = """
import json, sys
import numpy as np
from tfvllm.savedmodel import fresh
from tfvllm.quietly import import_tensorflow

fresh.hide(("keras", "tf_keras", "keras_hub", "keras_nlp"))
tf = import_tensorflow(without_keras=True)
from click.testing import CliRunner
from tfvllm.bench.models import ServedModel
from tfvllm.cli import cli

folder, names = sys.argv[1], sys.argv[2:]
answers = np.load(f"{folder}/answers.npz")
x = answers["x"]


def tfvllm(*arguments):
    result = CliRunner().invoke(cli, arguments, catch_exceptions=False)
    assert result.exit_code == 0, (arguments, result.output)
    return json.loads(result.stdout)


def near(found, name):
    np.testing.assert_allclose(found, answers[name], rtol=1e-5, atol=1e-6)


for name in names:
    plain, fast = f"{folder}/{name}/1", f"{folder}/{name}/2"
    (key,) = tfvllm("inspect", plain, "--json")["signatures"]["serving_default"]["inputs"]
    assert tfvllm("simplify", plain, fast, "--json")["verification"]["ok"]
    for path in (plain, fast):
        assert tfvllm("lint", path, "--json")["ok"]
        found = tfvllm("predict", path, "--input", f"{key}={json.dumps(x.tolist())}", "--json")["outputs"]
        near(list(found.values())[0], name)
        near(*ServedModel(path)({key: x}).values(), name)
        near(*fresh.run(fresh.load(path), [("serving_default", {key: x})])[0].values(), name)
assert not {"keras", "tf_keras"} & set(sys.modules)
"""


def child(code, *arguments):
    result = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stderr


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """SavedModels of models that were compiled and trained a step, one for each optimizer, and their answers."""
    path = tmp_path_factory.mktemp("compiled")
    child(WRITE, str(path), *QUICK)
    return path


def test_the_fixture_holds_slot_variables(folder):
    """Otherwise these tests would pass whatever is done about them."""
    nodes = {n: read_proto(folder / n / "1").meta_graphs[0].object_graph_def.nodes for n in QUICK}
    assert [any(o.slot_variables for o in nodes[n]) for n in QUICK] == [False, True, True]


def check(folder, name, written):
    answers = np.load(folder / "answers.npz")
    assert tfvllm.simplify_saved_model(folder / name / "1", written).verification["ok"]
    for path in (folder / name / "1", written):
        call = read.load(path).signatures["serving_default"]
        (key,) = call.structured_input_signature[1]
        (found,) = call(**{key: tf.constant(answers["x"])}).values()
        np.testing.assert_allclose(found, answers[name], rtol=1e-5, atol=1e-6)
        (found,) = predict(path, [], {key: answers["x"].tolist()}).values()  # as a server reads it
        np.testing.assert_allclose(found, answers[name], rtol=1e-5, atol=1e-6)


def test_by_python(folder, tmp_path):
    check(folder, "old_own", tmp_path / "1")


@pytest.mark.thorough
def test_by_every_command_without_keras(folder):
    said = child(WITHOUT_KERAS, str(folder), *QUICK)
    assert "unrestored" not in said and "Traceback" not in said


@pytest.mark.thorough
def test_more_optimizers(tmp_path):
    child(WRITE, str(tmp_path), *MORE)
    for name in MORE:
        check(tmp_path, name, tmp_path / name / "2")
    child(WITHOUT_KERAS.replace("{name}/2", "{name}/3"), str(tmp_path), *MORE)


class Trained(tf.Module):
    """A tf.Module that holds an optimizer's state under the names a checkpoint uses."""

    def __init__(self):
        super().__init__()
        self.weight = tf.Variable([[2.0, -1.0], [0.5, 3.0]])
        self.momentum = tf.Variable(tf.ones([2, 2]))
        self.optimizer = tf.train.Checkpoint(step=tf.Variable(7, dtype=tf.int64), momentum=self.momentum)

    @tf.function(input_signature=[tf.TensorSpec([None, 2], tf.float32, name="x")])
    def serve(self, x):
        return {"y": x @ self.weight}


def test_a_module_with_a_checkpoint_of_its_training(tmp_path):
    module = Trained()
    tf.saved_model.save(module, str(tmp_path / "1"), signatures=module.serve)
    tfvllm.simplify_saved_model(tmp_path / "1", tmp_path / "2")
    found = read.load(tmp_path / "2").signatures["serving_default"](x=tf.constant([[1.0, 2.0]]))["y"]
    np.testing.assert_array_equal(found, [[3.0, 5.0]])


def test_a_keras_3_export_of_a_compiled_model(tmp_path):
    import keras

    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input([4]), keras.layers.Dense(3)])
    model.compile(keras.optimizers.SGD(0.1, momentum=0.9), "mse")
    x = np.random.default_rng(1).normal(size=[5, 4]).astype("float32")
    model.train_on_batch(x, np.ones([5, 3]))
    model.export(str(tmp_path / "1"), verbose=False)
    tfvllm.simplify_saved_model(tmp_path / "1", tmp_path / "2")
    call = read.load(tmp_path / "2").signatures["serving_default"]
    (found,) = call(tf.constant(x)).values()
    np.testing.assert_allclose(found, model(x), rtol=1e-5, atol=1e-6)


def write_tf1(path, words):
    """A SavedModel as TF 1 writes them: a session, a Saver, momenta of its optimizer, a table read from a file."""
    v1 = tf.compat.v1
    with tf.Graph().as_default(), v1.Session() as session:
        text = v1.placeholder(tf.string, [None], "text")
        initializer = tf.lookup.TextFileInitializer(
            words, tf.string, tf.lookup.TextFileIndex.WHOLE_LINE, tf.int64, tf.lookup.TextFileIndex.LINE_NUMBER
        )
        table = tf.lookup.StaticHashTable(initializer, -1)
        weight = v1.get_variable("weight", initializer=[2.0, 3.0, 5.0], use_resource=True)
        y = tf.reduce_sum(tf.one_hot(table.lookup(text), 3) * weight, -1, name="y")
        train = v1.train.MomentumOptimizer(0.1, 0.9).minimize(v1.reduce_sum(y), var_list=[weight])
        session.run([v1.global_variables_initializer(), v1.tables_initializer()])
        session.run(train, {text: ["a"]})
        v1.saved_model.simple_save(session, path, {"text": text}, {"y": y}, legacy_init_op=v1.tables_initializer())


def test_a_session_with_a_saver(tmp_path):
    words = tmp_path / "words.txt"
    words.write_text("a\nb\nc\n")
    write_tf1(str(tmp_path / "1"), str(words))
    words.unlink()
    call = loading.load(tmp_path / "1").signatures["serving_default"].original
    want = call(tf.constant(["c", "a", "?", "b"]))["y"]
    np.testing.assert_allclose(want, [5.0, 1.9, 0.0, 3.0], rtol=1e-6)
    tfvllm.simplify_saved_model(tmp_path / "1", tmp_path / "2")
    call = read.load(tmp_path / "2").signatures["serving_default"]
    np.testing.assert_array_equal(call(tf.constant(["c", "a", "?", "b"]))["y"], want)
