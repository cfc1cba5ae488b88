"""Whose weights a simplified function has: its own, or with `live=True` those of the model."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import tfvllm
from tests.graph.conftest import bert_inputs, tiny_bert
from tfvllm.errors import InputError


def _norm_net():
    """Layers whose weights rules fold and merge, beside some that they leave alone, and an embedding."""
    keras.utils.set_random_seed(4)
    ids = keras.Input((6,), dtype="int32")
    x = keras.layers.Embedding(20, 8)(ids)
    x = keras.layers.Conv1D(8, 3, padding="same")(x)
    x = keras.layers.BatchNormalization()(x)
    x = keras.layers.Add()([keras.layers.Dense(8, use_bias=False)(x), keras.layers.Dense(8, use_bias=False)(x)])
    x = keras.layers.GlobalAveragePooling1D()(keras.layers.LayerNormalization()(x))
    model = keras.Model(ids, keras.layers.Dense(3)(x))
    model.compile("adam", "mse")
    return model


IDS = np.random.default_rng(0).integers(0, 20, (5, 6)).astype(np.int32)


def _train(model):
    for _ in range(2):
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum(model(IDS, training=True)[:, 0] ** 2)
        model.optimizer.apply(tape.gradient(loss, model.trainable_variables), model.trainable_variables)


def _set(model):
    model.set_weights([w + 0.5 for w in model.get_weights()])


def _by_row(model):
    table = model.layers[1].embeddings.value
    table.scatter_update(tf.IndexedSlices(tf.ones([20, 8]), tf.range(20)))


@pytest.mark.parametrize("change", [_train, _set, _by_row])
def test_a_result_keeps_the_weights_it_was_made_with(change):
    model = _norm_net()
    fast = tfvllm.simplify(model)
    old, first = model(IDS, training=False).numpy(), fast(IDS).numpy()
    np.testing.assert_allclose(first, old, atol=1e-5)
    change(model)
    assert np.abs(model(IDS, training=False).numpy() - old).max() > 1e-4
    np.testing.assert_array_equal(fast(IDS), first)


def test_the_model_does_not_see_what_the_result_writes():
    total = tf.Variable([1.0, 1.0])
    call = tf.function(lambda x: total.assign_add(x) + 0.0, input_signature=[tf.TensorSpec([2])])
    fast = tfvllm.simplify(call)
    x = np.float32([1, 2])
    assert fast(x).numpy().tolist() == [2.0, 3.0] and fast(x).numpy().tolist() == [3.0, 5.0]
    assert total.numpy().tolist() == [1.0, 1.0]


@pytest.mark.parametrize("change", [_train, _set, _by_row])
def test_a_live_result_follows_the_model(change):
    model = _norm_net()
    fast = tfvllm.simplify(model, live=True)
    for _ in range(2):
        change(model)
        np.testing.assert_allclose(fast(IDS), model(IDS, training=False), atol=1e-5)
    assert any("live" in note for note in fast.report.notes)
    kept = {id(v.value.handle) if hasattr(v, "value") else id(v.handle) for v in model.variables}
    assert {id(c.tensor) for c in fast.graph.captures.values()} <= kept


def test_live_makes_no_weight_of_the_weights():
    model = tiny_bert()
    shared = tfvllm.simplify(model, target="onednn", live=True)
    assert not any(c.made for c in shared.graph.captures.values()) and shared.report.rules
    x = bert_inputs()
    model.set_weights([w * 0.9 for w in model.get_weights()])
    np.testing.assert_allclose(shared(x), model(x), atol=1e-5)


def test_live_writes_what_the_model_writes():
    total = tf.Variable(0.0)
    call = tf.function(lambda x: total.assign_add(x) * 1.0, input_signature=[tf.TensorSpec([])])
    fast = tfvllm.simplify(call, live=True)
    assert [float(f(tf.constant(1.0))) for f in (fast, call, fast)] == [1.0, 2.0, 3.0]


@pytest.mark.parametrize("precision", ["bfloat16", "int8"])
def test_live_is_for_float32(precision):
    with pytest.raises(InputError, match=f"live: expected precision float32, found {precision}"):
        tfvllm.simplify(tiny_bert(), target="onednn", precision=precision, live=True)


def test_a_copy_shares_its_memory_until_the_model_changes():
    """So that a copy of all weights costs nothing where the model is let go, or stays as it is."""
    model = keras.Sequential([keras.Input((1 << 10,)), keras.layers.Dense(1 << 10, use_bias=False)])
    fast = tfvllm.simplify(model)
    (capture,) = [c for c in fast.graph.captures.values()]
    assert capture.tensor is not model.layers[0].kernel.value.handle
    reads = (tf.raw_ops.ReadVariableOp(resource=h, dtype=tf.float32) for h in _handles(model, capture))
    theirs, ours = (r.numpy().__array_interface__["data"][0] for r in reads)
    assert theirs == ours


def _handles(model, capture):
    return model.layers[0].kernel.value.handle, capture.tensor
