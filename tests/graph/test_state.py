"""What a graph writes: simplifying leaves it as it was, and the result writes the same."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import tfvllm
from tfvllm.errors import InputError
from tfvllm.graph import effects, importer
from tfvllm.graph.guarantee import Exact
from tfvllm.graph.pattern import op
from tfvllm.graph.rewriter import Rule
from tfvllm.simplifier.state import State

X = np.float32([[1, 2], [3, -4]])
ROWS = [tf.TensorSpec([None, 2], name="x")]


class Counting(tf.Module):
    """Writes a counter, a moving mean, a row of a weight in a loop, two tables and a generator; results read them."""

    def __init__(self):
        self.weight = tf.Variable(tf.ones([2, 3]))
        self.count = tf.Variable(0, dtype=tf.int64)
        self.mean = tf.Variable(tf.zeros([3]))
        self.table = tf.lookup.experimental.MutableHashTable(tf.int64, tf.float32, -1.0)
        self.words = tf.lookup.experimental.DenseHashTable(
            tf.string, tf.int64, default_value=-1, empty_key="", deleted_key="deleted", initial_num_buckets=64
        )
        self.generator = tf.random.Generator.from_seed(3)

    @tf.function(input_signature=ROWS)
    def __call__(self, x):
        before = self.count.read_value()
        self.count.assign_add(1)
        seen = self.words.lookup(tf.strings.as_string(before)[None])
        for _ in tf.range(2):
            self.weight.scatter_add(tf.IndexedSlices(tf.ones([1, 3]), [0]))
        y = x @ self.weight * 1.0
        if tf.reduce_sum(y) > 0.0:
            self.mean.assign(0.5 * self.mean + 0.5 * tf.reduce_mean(y, 0))
        self.table.insert(self.count.read_value()[None], tf.reduce_sum(y)[None])
        self.words.insert(tf.strings.as_string(self.count.read_value())[None], before[None])
        return {
            "y": y + self.generator.normal([3]),
            "before": before,
            "seen": seen,
            "found": self.table.lookup(tf.constant([1, 2], tf.int64)),
            "mean": self.mean.read_value(),
        }

    def state(self):
        variables = [self.weight, self.count, self.mean, self.generator.state]
        tables = [t.export() for t in (self.table, self.words)]
        return [v.numpy() for v in variables] + [np.sort(a.numpy(), axis=None) for pair in tables for a in pair]


def assert_same(found, wanted):
    for a, b in zip(found, wanted, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.fixture(scope="module")
def counted(tmp_path_factory):
    """A SavedModel whose signature writes, with the state after one call, and what simplifying made of it."""
    folder = tmp_path_factory.mktemp("counting")
    model = Counting()
    model(X)
    tf.saved_model.save(model, str(folder / "a"), signatures=model.__call__)
    report = tfvllm.simplify_saved_model(folder / "a", folder / "b")
    return model, folder, report


def test_what_a_function_writes_is_as_it_was(counted):
    model, _, _ = counted
    before = model.state()
    fast = tfvllm.simplify(model.__call__)
    assert_same(model.state(), before)
    check = fast.report.verification
    assert check["ok"] and check["status"] == "verified" and check["reference"] == "float64" and not fast.report.notes
    assert check["tolerance"] < 1e-2  # values of some tens


def test_results_that_depend_on_state_are_those_of_the_original_call_by_call(counted):
    _, folder, report = counted
    assert report.verification["ok"] and report.rules
    twins = [tf.saved_model.load(str(folder / name)).signatures["serving_default"] for name in "ab"]
    for _ in range(3):
        wanted, found = (twin(x=tf.constant(X)) for twin in twins)
        for key, value in wanted.items():
            np.testing.assert_allclose(found[key], value, rtol=1e-6, err_msg=key)


def test_the_stored_state_is_the_original_one(counted):
    model, folder, _ = counted
    first = tf.saved_model.load(str(folder / "b")).signatures["serving_default"](x=tf.constant(X))
    assert int(first["before"]) == 1 and int(first["seen"][0]) == 0
    np.testing.assert_allclose(first["found"].numpy()[0], model.table.lookup(tf.constant(1, tf.int64)))


def test_the_result_has_a_state_of_its_own(counted):
    model, _, _ = counted
    fast = tfvllm.simplify(model.__call__)
    before = model.state()
    assert [int(fast(X)["before"]) for _ in range(3)] == [1, 2, 3]
    assert_same(model.state(), before)


@pytest.mark.parametrize("make", ["stateful", "training"])
def test_keras_layers_that_write(make):
    keras.utils.set_random_seed(2)
    x = np.random.default_rng(0).normal(size=(2, 3, 4)).astype(np.float32)
    if make == "stateful":
        model = keras.Sequential([keras.Input(batch_shape=(2, 3, 4)), keras.layers.LSTM(3, stateful=True)])
        call = model
        wanted = [model(x).numpy() for _ in range(3)][1:]
        model.layers[-1].reset_state()
        model(x)
    else:
        model = keras.Sequential(
            [keras.Input((3, 4)), keras.layers.BatchNormalization(), keras.layers.Dropout(0.5), keras.layers.Dense(2)]
        )
        call = tf.function(lambda b: model(b, training=True), input_signature=[tf.TensorSpec([None, 3, 4])])
    before = [v.numpy() for v in model.variables]
    fast = tfvllm.simplify(call)
    assert_same([v.numpy() for v in model.variables], before)
    assert fast.report.verification["ok"]
    if make == "training":
        wanted = [call(tf.constant(x)).numpy() for _ in range(2)]
    for step in wanted:
        np.testing.assert_allclose(fast(x), step, atol=1e-6)


class _ForgetsTheUpdate(Rule):
    """x + 1 -> x + 2, wrong on purpose."""

    guarantee = Exact()

    def pattern(self, x):
        return op.AddV2(x, 1.0)

    def replacement(self, b, m):
        return b.AddV2(m.x, b.const(2.0))


def test_a_wrong_value_that_is_only_stored_is_found():
    stored = tf.Variable([0.0, 0.0])

    @tf.function(input_signature=ROWS)
    def call(x):
        stored.assign(tf.reduce_sum(x, 0) + 1.0)
        return x * 2.0

    fast = tfvllm.simplify(call, rules=[_ForgetsTheUpdate()])
    assert [entry["rule"] for entry in fast.report.main.rolled_back] == ["_ForgetsTheUpdate"]
    assert "after the run" in fast.report.main.rolled_back[0]["reason"]


def test_state_is_restored_when_a_run_fails():
    count = tf.Variable(0.0)

    @tf.function(input_signature=[tf.TensorSpec([None])])
    def call(x):
        count.assign_add(1.0)
        tf.debugging.assert_less(tf.size(x), 4, "too long")
        return x + count

    with pytest.raises(InputError, match="fails on the given input"):
        tfvllm.simplify(call, inputs=(np.zeros(9, np.float32),))
    assert count.numpy() == 0.0
    assert tfvllm.simplify(call).report.verification["ok"] and count.numpy() == 0.0


def test_measuring_and_calibrating_leave_no_trace(clock):
    count, weight = tf.Variable(0.0), tf.Variable(np.random.default_rng(0).normal(size=(64, 64)).astype(np.float32))

    @tf.function(input_signature=[tf.TensorSpec([None, 64])])
    def call(x):
        count.assign_add(1.0)
        return tf.nn.relu(tf.nn.relu(x @ weight) @ weight) + count

    for options in ({"measure": True}, {"profile": [{"batch": 1}, {"batch": 64}]}):
        tfvllm.simplify(call, **options)
        assert count.numpy() == 0.0


@pytest.mark.parametrize("kind", ["queue", "python", "file"])
def test_a_graph_that_writes_outside_is_not_run(kind, tmp_path):
    queue, calls = tf.queue.FIFOQueue(99, [tf.float32]), []

    @tf.function(input_signature=ROWS)
    def call(x):
        if kind == "queue":
            queue.enqueue(tf.reduce_sum(x))
        elif kind == "file":
            tf.io.write_file(str(tmp_path / "file"), "text")
        else:
            tf.numpy_function(lambda a: calls.append(a) or a, [x], tf.float32)
        return x * 1.0 + 0.0

    fast = tfvllm.simplify(call)
    assert queue.size() == 0 and not calls and not (tmp_path / "file").exists()
    check = fast.report.verification
    assert check["status"] == "not verified" and check["ok"] is False and check["samples"] == 0
    assert "was not run" in check["not_verified"]["output_0"]
    np.testing.assert_array_equal(fast(X), X)
    with pytest.raises(InputError, match="measure needs runs of the graph"):
        tfvllm.simplify(call, measure=True)


def test_prints_stay_and_are_silent_meanwhile(capfd):
    @tf.function(input_signature=ROWS)
    def call(x):
        for i in tf.range(2):
            tf.print("turn", i)
        tf.print("done")
        return x + 0.0

    fast = tfvllm.simplify(call)
    assert "turn" not in "".join(capfd.readouterr())
    fast(X)
    assert capfd.readouterr().err.split("\n") == ["turn 0", "turn 1", "done", ""]


def test_reads_writes_assertions_and_prints_keep_their_order(capfd):
    value = tf.Variable(1.0)

    @tf.function(input_signature=[tf.TensorSpec([])])
    def call(x):
        first = value.read_value()
        value.assign(first * 10.0 + x)
        tf.print("stored", value)
        second = value.read_value()
        with tf.control_dependencies([tf.debugging.assert_less(second, 1000.0)]):
            value.assign(second * 10.0 + x)
        return first, second, value.read_value()

    found = []
    for function in (tfvllm.simplify(call), tfvllm.simplify(call, live=True), call):
        value.assign(1.0)
        found.append(([float(v) for v in function(tf.constant(2.0))], capfd.readouterr().err))
    assert found == [([1.0, 12.0, 122.0], "stored 12\n")] * 3
    value.assign(1.0)
    for function in (tfvllm.simplify(call, live=True), call):
        value.assign(1.0)
        with pytest.raises(tf.errors.InvalidArgumentError):
            function(tf.constant(5000.0))
        assert value.numpy() == 5010.0  # what stands before the assertion was done, what stands after it was not


def test_loops_with_break_inputs_as_outputs_and_no_rows():
    @tf.function(input_signature=ROWS)
    def call(x):
        rows = tf.TensorArray(tf.float32, size=0, dynamic_size=True, element_shape=[])
        for i in tf.range(5):
            if i >= tf.shape(x)[0]:
                break
            rows = rows.write(i, tf.reduce_sum(x[i]) * 1.0)
        return rows.stack(), x, x * 2.0 - x

    fast = tfvllm.simplify(call)
    assert fast.report.verification["ok"]
    for rows in (X, np.concatenate([X] * 4), X[:0]):
        for found, wanted in zip(fast(rows), call(rows), strict=True):
            np.testing.assert_array_equal(found, wanted)
    assert [tuple(v.shape) for v in fast(X[:0])] == [(0,), (0, 2), (0, 2)]


def test_writes_in_functions_of_functions_are_seen():
    outer, untouched = tf.Variable([0.0, 0.0]), tf.Variable([1.0, 1.0])

    @tf.function(jit_compile=False)
    def inner(x):
        for _ in tf.range(2):
            if tf.reduce_sum(x) > 0.0:
                outer.scatter_nd_update([[0]], [7.0])
        return x * untouched

    graph = importer.from_concrete(tf.function(inner, input_signature=ROWS).get_concrete_function())
    written = effects.find(graph).written
    names = {id(graph.captures[n].tensor) for n in written}
    assert names == {id(outer.handle)} and [p.handle for p in State.of(graph).parts] == [outer.handle]
    assert {id(c.tensor) for c in graph.captures.values() if c.frozen} == {id(untouched.handle)}
