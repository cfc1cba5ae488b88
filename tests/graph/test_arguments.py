"""What a simplified function takes and refuses, and the values it gives for it."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import tfvllm
from tfvllm.errors import InputError

WEIGHT = tf.constant(np.random.default_rng(0).normal(size=[4, 3]), tf.float32)
ROWS = tf.ragged.constant([[1.0, 2.0, -3.0], [], [4.0]])
CELLS = tf.sparse.from_dense([[0, 1.5, 0, 2], [0, 0, 0, 0], [-1, 0, 0, 0]])


@pytest.fixture(scope="module")
def sevens():
    """[?, 7] to [?, 7, 3]: with another length, a reshape would still find its sizes."""

    @tf.function(input_signature=[tf.TensorSpec([None, 7], tf.float32)])
    def sevens(x):
        return tf.reshape(x, [-1, 7, 1]) * tf.constant([1.0, 2.0, 3.0])

    return sevens, tfvllm.simplify(sevens)


X = np.arange(14.0).reshape(2, 7)
ACCEPTED = {
    "float64 array": X,
    "integers": X.astype(np.int64),
    "list": X.tolist(),
    "tensor": tf.constant(X, tf.float32),
    "variable": tf.Variable(X, dtype=tf.float32),
    "tuple of rows": tuple(map(tuple, X)),
}


@pytest.mark.parametrize("name", ACCEPTED)
def test_accepted(sevens, name):
    plain, fast = sevens
    for result in (fast(ACCEPTED[name]), fast(x=ACCEPTED[name])):
        np.testing.assert_array_equal(result, plain(tf.constant(X, tf.float32)))


REFUSED = {
    "another length": (np.ones([1, 14]), r"x: expected float32\[\?, 7\], found float64\[1, 14\]"),
    "another rank": (np.ones(7), r"found float64\[7\]"),
    "a scalar": (1.0, r"x: expected float32\[\?, 7\]"),
    "nothing": (None, "found None"),
    "texts": ([["a"] * 7], "found a list like str"),
    "rows of different lengths": ([[1.0], [1.0, 2.0]], "rows of different lengths"),
    "a tensor of another type": (tf.ones([2, 7], tf.int32), r"found int32\[2, 7\]"),
    "ragged": (ROWS, r"found a ragged float32\[3, \?\]"),
    "sparse": (CELLS, r"found a sparse float32\[3, 4\]"),
    "complex": (np.ones([2, 7], np.complex64), "found complex64"),
    "a dict": ({"x": X}, "found {'x'"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(sevens, name):
    given, said = REFUSED[name]
    with pytest.raises(InputError, match=said):
        sevens[1](given)


def test_refused_counts_and_names(sevens):
    _, fast = sevens
    for call, said in [
        (lambda: fast(), "x is missing; the arguments are x: float32"),
        (lambda: fast(X, X), "expected 1 positional arguments, found 2"),
        (lambda: fast(X, y=X), "unexpected argument 'y'"),
        (lambda: fast(X, training=False), "unexpected argument 'training'"),
    ]:
        with pytest.raises(InputError, match=said):
            call()


def test_integers_that_do_not_fit_are_refused():
    fast = tfvllm.simplify(tf.function(lambda ids: ids + 1, input_signature=[tf.TensorSpec([None], tf.int32)]))
    np.testing.assert_array_equal(fast(np.int64([1, 2])), [2, 3])
    for wrong in (
        np.int64([1 << 40]),
        np.float32([1.5]),
        np.uint32([1 << 31]),
    ):  # TensorFlow makes 0, 1, -2**31 of them
        with pytest.raises(InputError, match=r"ids: expected int32\[\?\]"):
            fast(wrong)


def test_inside_another_function(sevens):
    """Sizes that are unknown while tracing are not refused."""
    plain, fast = sevens
    outer = tf.function(lambda x: fast(x) + 1.0, input_signature=[tf.TensorSpec([None, None], tf.float32)])
    np.testing.assert_array_equal(outer(tf.constant(X, tf.float32)), plain(tf.constant(X, tf.float32)) + 1.0)


def test_python_values_of_a_concrete_function():
    @tf.function
    def scale(x, by, flip=False, more=None):
        return {"y": -x * by["a"] if flip else x * by["a"] + (0.0 if more is None else more)}

    x, by = tf.constant([1.0, 2.0]), {"a": tf.constant(3.0)}
    for flip in (False, True):
        fast = tfvllm.simplify(scale.get_concrete_function(x, by, flip=flip))
        want = scale(x, by, flip=flip)["y"]
        for result in (fast(x, by), fast(x, by=by, flip=flip), fast(x, by, flip, None)):
            np.testing.assert_array_equal(result["y"], want)
        with pytest.raises(InputError, match=f"flip: the graph was made with {flip}, found {not flip}"):
            fast(x, by, flip=not flip)
        with pytest.raises(InputError, match="more: the graph was made with None"):
            fast(x, by, more=x)


# ---------------------------------------------------------------------------------------------------------------- Keras


@pytest.fixture(scope="module")
def two_inputs():
    a, b = keras.Input([3], name="a"), keras.Input([1], name="b", dtype="int32")
    result = keras.layers.Dense(2)(a) + keras.ops.cast(b, "float32")
    by_name, by_order = keras.Model({"a": a, "b": b}, result), keras.Model([a, b], result)
    return by_name, tfvllm.simplify(by_name), tfvllm.simplify(by_order)


def test_keras_inputs(two_inputs):
    model, by_name, by_order = two_inputs
    # Three rows: Keras adds [2, 1] to [2, 2] as if it were a bias.
    a, b = np.float32([[1, 2, 3], [4, 5, 6], [7, 8, 9]]), np.int32([[7], [8], [9]])
    want = model({"a": a, "b": b})
    for call in (
        lambda: by_name({"a": a, "b": b}),
        lambda: by_name({"b": b.astype(np.int64), "a": a.astype(np.float64), "unused": 1}),
        lambda: by_name({"a": tf.constant(a, tf.float64), "b": tf.constant(b, tf.int64)}, training=False),
        lambda: by_name({"a": a.tolist(), "b": [7, 8, 9]}),
        lambda: by_order([a, b]),
        lambda: by_order((a, b[:, 0])),
        lambda: by_order({"a": a, "b": b}),
    ):
        np.testing.assert_allclose(call(), want, rtol=1e-6)
    for call, said in [
        (lambda: by_name({"a": a}), "found no 'b'"),
        (lambda: by_name([a, b]), "expected {'a': "),
        (lambda: by_name({"a": a[:, :2], "b": b}), r"batch\['a'\]: expected float32\[\?, 3\], found float32\[3, 2\]"),
        (lambda: by_name({"a": a, "b": b + 0.5}), r"batch\['b'\]: expected int32"),
        (lambda: by_name({"a": a, "b": b}, training=True), "unexpected argument 'training'"),
        (lambda: by_order([a]), r"batch: expected \["),
    ]:
        with pytest.raises(InputError, match=said):
            call()


class Maybe(keras.layers.Layer):
    def call(self, x, more=None):
        return 2.0 * x if more is None else x * more


def test_an_optional_input():
    x, more = keras.Input([4], name="x"), keras.Input([4], optional=True, name="more")
    model = keras.Model({"x": x, "more": more}, Maybe()(x, more))
    given = {"x": np.float32([[1, 2, 3, 4]]), "more": np.float32([[5, 6, 7, 8]])}
    without = {**given, "more": None}
    fast, bare = tfvllm.simplify(model), tfvllm.simplify(model, inputs=without)
    np.testing.assert_array_equal(fast(given), [[5, 12, 21, 32]])
    np.testing.assert_array_equal(bare(without), [[2, 4, 6, 8]])
    with pytest.raises(InputError, match="simplify the model with inputs=… of that kind"):
        fast(without)
    with pytest.raises(InputError, match=r"batch\['more'\]: the graph was made with None"):
        bare(given)


# ---------------------------------------------------------------------------------------------------- ragged and sparse

COMPOSITES = {
    "ragged sums": (lambda x: tf.reduce_sum(x * 2.0, 1), tf.RaggedTensorSpec([None, None], tf.float32, 1), ROWS),
    "ragged result": (lambda x: {"y": x * 2.0 + 1.0}, tf.RaggedTensorSpec([None, None], tf.float32, 1), ROWS),
    "ragged twice": (
        lambda x: tf.reduce_max(tf.reduce_sum(x, 2), 1),
        tf.RaggedTensorSpec([None, None, None], tf.float32, 2),
        tf.ragged.constant([[[1.0], [2.0, 3.0]], [[-4.0]]]),
    ),
    "ragged rows of vectors": (
        lambda x: tf.ragged.map_flat_values(lambda v: v @ WEIGHT, x).to_tensor(),
        tf.RaggedTensorSpec([None, None, 4], tf.float32, 1, tf.int32),
        tf.RaggedTensor.from_row_lengths(tf.reshape(tf.range(12.0), [3, 4]), tf.constant([2, 0, 1], tf.int32)),
    ),
    "ragged words": (
        lambda x: tf.strings.reduce_join(x, -1, separator=" "),
        tf.RaggedTensorSpec([None, None], tf.string, 1),
        tf.ragged.constant([["a", "b"], [], ["c"]], tf.string),
    ),
    "sparse product": (
        lambda x: tf.sparse.sparse_dense_matmul(x, WEIGHT) * 1.0,
        tf.SparseTensorSpec([None, 4], tf.float32),
        CELLS,
    ),
    "sparse result": (lambda x: x * 3.0, tf.SparseTensorSpec([None, 4], tf.float32), CELLS),
}


def dense(result):
    result = tf.nest.flatten(result)[0]
    if isinstance(result, tf.RaggedTensor):
        return result.to_list()
    return (tf.sparse.to_dense(result) if isinstance(result, tf.SparseTensor) else result).numpy().tolist()


@pytest.mark.parametrize("name", COMPOSITES)
def test_ragged_and_sparse(name):
    function, spec, x = COMPOSITES[name]
    plain = tf.function(function, input_signature=[spec])
    for fast in (tfvllm.simplify(plain), tfvllm.simplify(plain.get_concrete_function(), inputs=x)):
        assert fast.report.verification["ok"] and fast.report.verification["samples"] > 0
        assert type(tf.nest.flatten(fast(x))[0]) is type(tf.nest.flatten(plain(x))[0])
        assert dense(fast(x)) == dense(plain(x))
    with pytest.raises(InputError, match=r"expected a (ragged|sparse) "):
        fast(np.ones([2, 4], np.float32))


def test_traced_with_a_ragged_example():
    fast = tfvllm.simplify(tf.function(lambda x: tf.reduce_sum(x, 1)), inputs=ROWS)
    np.testing.assert_array_equal(fast(ROWS), [0.0, 0.0, 4.0])
    with pytest.raises(InputError, match="expected a ragged float32"):
        fast(tf.ragged.constant([[1], [2, 3]]))


def test_keras_sparse_and_ragged_inputs():
    cells = keras.Input([4], sparse=True)
    model = keras.Model(cells, keras.layers.Dense(2)(cells))
    np.testing.assert_allclose(tfvllm.simplify(model)(CELLS), model(CELLS), rtol=1e-6)
    rows = keras.Input([None], ragged=True, dtype="float32")
    model = keras.Model(rows, keras.layers.Lambda(lambda x: tf.reduce_sum(x, 1))(rows))
    np.testing.assert_array_equal(tfvllm.simplify(model)(ROWS), [0.0, 0.0, 4.0])
