"""Mixtures of experts: the weights, and that an expert is read for the tokens that chose it only."""

import numpy as np
import pytest
import tensorflow as tf

import tfvllm
from tfvllm.generation.experts import each_for_its_own, route
from tfvllm.generation.generator import Generator
from tfvllm.models import read
from tfvllm.savedmodel import parity

from .models import build, gpt_oss, mixtral, prompts
from .reference import keras_generate
from .test_causal import generate

EXPERTS = 8


def test_weights_are_a_softmax_of_all_or_of_the_chosen():
    logits = np.float32([[0.0, 3.0, 1.0, 2.0], [5.0, -1.0, 5.5, 0.0]])
    every = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    weights, chosen = route(tf.constant(logits), 2, normalized=False)
    assert chosen.numpy().tolist() == [[1, 3], [2, 0]]
    np.testing.assert_allclose(weights, np.take_along_axis(every, chosen.numpy(), 1), rtol=1e-6)
    weights, _ = route(tf.constant(logits), 2, normalized=True)
    best = np.take_along_axis(every, chosen.numpy(), 1)
    np.testing.assert_allclose(weights, best / best.sum(-1, keepdims=True), rtol=1e-6)


@pytest.mark.parametrize("rows", [0, 1, 2, 37])
def test_each_expert_computes_once_and_for_its_own_rows(rows):
    random = np.random.default_rng(rows)
    x = random.normal(size=[rows, 3]).astype(np.float32)
    chosen = np.argsort(random.normal(size=[rows, EXPERTS]))[:, :2].astype(np.int32)
    calls = []

    def times(expert, some):
        calls.append((int(expert), len(some)))
        return some * np.float32(expert + 1)

    @tf.function(input_signature=[tf.TensorSpec([None, 3]), tf.TensorSpec([None, 2], tf.int32)])
    def run(x, chosen):
        return each_for_its_own(x, chosen, lambda expert, some: tf.numpy_function(times, [expert, some], tf.float32))

    found = run(tf.constant(x), tf.constant(chosen))
    np.testing.assert_allclose(found, x[:, None] * (chosen[:, :, None] + 1), rtol=1e-6)
    assert sorted(calls) == [(e, int((chosen == e).sum())) for e in np.unique(chosen)]


def mixtral_of_eight():
    return mixtral(num_experts=EXPERTS, layers=1)


def test_a_step_reads_no_expert_that_no_token_chose():
    """What is not chosen is made NaN: a product with it, weighted 0, would be NaN too."""
    model = build(mixtral_of_eight)
    ids, mask = prompts([1])
    expected = keras_generate(model, ids, mask, 2)  # reads the prompt, then one token more
    generator = Generator(read(model))
    used: set[int] = set()
    layer = model.backbone.transformer_layers[0]
    moe = layer._sparse_moe_block
    original = moe.call

    def watched(x, *args, **kwargs):
        logits = moe._sparse_feedforward_gate_dense(x)
        used.update(np.asarray(tf.math.top_k(logits, 2).indices).ravel().tolist())
        return original(x, *args, **kwargs)

    moe.call = watched
    model({"token_ids": np.c_[ids, expected[:, :1]], "padding_mask": np.ones([1, 2], np.int32)})
    assert 2 <= len(used) < EXPERTS
    poisoned = 0
    for variable in generator.variables:
        if variable.shape.rank == 3 and variable.shape[0] == EXPERTS:
            values = variable.numpy()
            values[[e for e in range(EXPERTS) if e not in used]] = np.nan
            variable.assign(values)
            poisoned += 1
    assert poisoned == 2
    np.testing.assert_array_equal(generate(generator, ids, mask, 2)[0], expected)


@pytest.mark.thorough
@pytest.mark.parametrize("make", [mixtral, gpt_oss])
def test_a_saved_model_in_a_fresh_process(make, tmp_path):
    model = build(make)
    path = tfvllm.export(model, tmp_path / "1", task="generate", max_length=32, check="here")
    batches = [prompts(lengths) for lengths in ([5], [3, 8, 1, 2, 9, 4, 4, 7], [31])]
    name, count = "serving_default", np.int32(6)
    requests = [(name, {"token_ids": i, "padding_mask": m, "max_new_tokens": count}) for i, m in batches]
    for (ids, mask), found in zip(batches, parity.run_fresh(path, requests)):
        room = min(6, 32 - ids.shape[1])
        expected = keras_generate(model, ids, mask, room)
        np.testing.assert_array_equal(found["token_ids"][:, :room], expected)
        assert found["lengths"].tolist() == [room] * len(ids)
