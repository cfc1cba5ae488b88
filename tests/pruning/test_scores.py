"""Scores of single weights, and pruning at once."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.models import zoo
from tfvllm.errors import InputError
from tfvllm.models import adapter_for
from tfvllm.pruning import oneshot, scores, sparsify
from tfvllm.pruning.capture import block_calls
from tfvllm.pruning.prunable import prunable_weights


def test_formulas_by_hand():
    weight = np.asarray([[1.0, -2.0], [3.0, 0.5]])
    gradient = np.asarray([[0.5, 1.0], [-1.0, 4.0]])
    np.testing.assert_allclose(scores.magnitude(weight), [[1, 2], [3, 0.5]])
    np.testing.assert_allclose(scores.movement(weight, gradient), [[-0.5, 2], [3, -2]])
    np.testing.assert_allclose(scores.taylor(weight, gradient), [[0.25, 4], [9, 4]])
    np.testing.assert_allclose(scores.wanda(weight, [2.0, 0.1]), [[2, 4], [0.3, 0.05]])
    np.testing.assert_allclose(scores.activation([4.0, 9.0], [[3.0, 4.0], [0.0, 1.0]]), [10, 3])


def test_movement_scores_what_a_gradient_step_moves_away_from_zero():
    weight = tf.constant([1.0, -1.0, 1.0, -1.0])
    gradient = tf.constant([-1.0, 1.0, 1.0, -1.0])  # steps: away, away, towards, towards zero
    after = weight - 0.1 * gradient
    assert np.array_equal(np.asarray(scores.movement(weight, gradient) > 0), np.asarray(abs(after) > abs(weight)))


def test_masks_from_scores():
    values = np.asarray([[1.0, 4.0], [2.0, 3.0], [3.0, 2.0], [4.0, 1.0]])
    kept = np.asarray(scores.mask_from_scores(values, 0.5, by="output"))
    np.testing.assert_array_equal(kept, [[0, 1], [0, 1], [1, 0], [1, 0]])
    assert np.asarray(scores.mask_from_scores(np.ones((4, 2)), 0.5)).sum() == 4  # ties do not remove more
    np.testing.assert_array_equal(np.asarray(scores.m_by_n_mask(values, 1, 2)), [[0, 1], [1, 0], [0, 1], [1, 0]])
    # The last group is filled up with zeros, which go first.
    np.testing.assert_array_equal(np.asarray(scores.m_by_n_mask(values, 2, 3)), [[0, 1], [0, 0], [1, 0], [1, 1]])
    with pytest.raises(InputError, match="0 < m < n"):
        scores.m_by_n_mask(values, 3, 3)
    with pytest.raises(InputError, match=r"\[0, 1\)"):
        scores.mask_from_scores(values, 1.0)


@given(st.integers(1, 20), st.integers(1, 5), st.floats(0, 0.99))
@settings(max_examples=30, deadline=None)
def test_masks_remove_the_share_and_nothing_better(inputs, outputs, sparsity):
    values = np.random.default_rng(inputs * 31 + outputs).normal(size=(inputs, outputs))
    kept = np.asarray(scores.mask_from_scores(values, sparsity, by="output"))
    assert (kept.sum(axis=0) == inputs - int(inputs * sparsity)).all()
    for column in range(outputs):
        gone = values[~kept[:, column], column]
        assert gone.size == 0 or gone.max() <= values[kept[:, column], column].min()


def correlated(tokens=400, inputs=24, seed=0):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(tokens, 6)) @ rng.normal(size=(6, inputs)) + 0.3 * rng.normal(size=(tokens, inputs))


def test_sparsegpt_of_one_removed_weight_is_optimal_brain_surgeon():
    """Removing the last weight of a block by the closed form of Hassibi and Stork 1993 (no damping)."""
    x = correlated(inputs=4)
    hessian = x.T @ x
    weight = np.asarray([[1e-6], [2.0], [-1.0], [0.5]])  # the first goes
    new, mask = scores.sparsegpt(weight, hessian, 0.25, damping=0.0)
    np.testing.assert_array_equal(mask[:, 0], [False, True, True, True])
    inverse = np.linalg.inv(hessian)
    np.testing.assert_allclose(new[:, 0], weight[:, 0] - weight[0, 0] / inverse[0, 0] * inverse[:, 0], atol=1e-12)
    weight = np.asarray([[0.05], [2.0], [-1.0], [0.5]])
    new, _ = scores.sparsegpt(weight, hessian, 0.25, damping=0.0)
    # The rest is the least-squares optimum without the first input.
    rest = weight[1:, 0] + np.linalg.lstsq(x[:, 1:], x[:, 0] * weight[0, 0], rcond=None)[0]
    np.testing.assert_allclose(new[1:, 0], rest, rtol=1e-6)


@pytest.mark.parametrize("block", [7, 12, 128])
def test_sparsegpt_beats_wanda_beats_magnitude_on_the_layer_output(block):
    x = correlated() * np.linspace(0.1, 3, 24)
    weight = np.random.default_rng(1).normal(size=(24, 10))
    dense = x @ weight
    new, mask = scores.sparsegpt(weight, x.T @ x, 0.5, block=block)
    assert abs(1 - mask.mean() - 0.5) < 0.05 and not np.any(new[~mask])
    by_norm = np.asarray(scores.mask_from_scores(scores.wanda(weight, np.linalg.norm(x, axis=0)), 0.5, by="output"))
    by_size = np.asarray(scores.mask_from_scores(scores.magnitude(weight), 0.5))
    errors = [np.linalg.norm(x @ w - dense) for w in (new, weight * by_norm, weight * by_size)]
    assert errors[0] < errors[1] < errors[2]


def test_sparsegpt_m_by_n_and_dead_inputs():
    x = correlated()
    x[:, 3] = 0.0
    weight = np.random.default_rng(1).normal(size=(24, 10))
    new, mask = scores.sparsegpt(weight, x.T @ x, m_by_n=(2, 4))
    assert ((new != 0).reshape(6, 4, 10).sum(axis=1) <= 2).all() and np.isfinite(new).all()
    assert not mask[3].any()
    with pytest.raises(InputError, match="exactly one"):
        scores.sparsegpt(weight, x.T @ x)


@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt"])
def test_sparsify_reaches_the_share_in_the_blocks_only(method):
    model = zoo.build("gpt2")
    data = zoo.inputs("gpt2", 8)
    table = np.array(model.backbone.token_embedding.embeddings)
    shares = sparsify(model, 0.5, method=method, data=data)
    assert len(shares) == 18 and all(abs(share - 0.5) < 0.04 for share in shares.values())
    for target in prunable_weights(model):
        if target.name in shares:
            assert abs(np.mean(np.asarray(target.variable) == 0) - shares[target.name]) < 1e-6
    np.testing.assert_array_equal(np.asarray(model.backbone.token_embedding.embeddings), table)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(
            n, marks={"bert": (), "llama": pytest.mark.thorough, "bart": pytest.mark.thorough}.get(n, pytest.mark.slow)
        )
        for n in zoo.BUILDERS
        if n != "albert"  # which calls one block again and again
    ],
)
def test_blocks_run_by_themselves_as_in_the_whole_model(name, monkeypatch):
    found = zoo.inputs(name, 6)
    pruned = []
    for walk in (block_calls, lambda *_: None):
        told = []
        monkeypatch.setattr(oneshot, "block_calls", lambda *args, f=walk, told=told: told.append(f(*args)) or told[0])
        model = zoo.build(name)
        sparsify(model, 0.5, method="wanda", data=found)
        pruned.append([np.array(v) for v in model.weights])
        assert [calls is None for calls in told] == [walk is not block_calls]
    for alone, whole in zip(*pruned):
        np.testing.assert_allclose(alone, whole, rtol=1e-5, atol=1e-6)


def test_a_block_called_twice_is_calibrated_on_both_calls():
    """Two texts through one backbone, as for sentence pairs: its blocks cannot be run one by one."""
    backbone = zoo.build("bert").backbone
    sides = [
        {name: keras.Input(spec.shape[1:], dtype=spec.dtype) for name, spec in backbone.input.items()} for _ in "ab"
    ]
    pooled = [backbone(side)["pooled_output"] for side in sides]
    model = keras.Model(sides, keras.layers.Concatenate()(pooled))
    layers = [block.layer for block in adapter_for(backbone).blocks(backbone)]
    data = [[zoo.inputs("bert", 4, seed=1), zoo.inputs("bert", 4, seed=2)]]
    assert block_calls(model, layers, data) is None
    assert block_calls(backbone, layers, data[0]) is not None


def test_sparsegpt_keeps_the_model_closer_than_magnitude():
    found = zoo.inputs("gpt2", 32)
    real = found["padding_mask"].astype(bool)
    errors = {}
    for method in ("magnitude", "sparsegpt"):
        model = zoo.build("gpt2")
        expected = np.asarray(model(found))[real]
        sparsify(model, 0.3, method=method, data=found)
        errors[method] = np.linalg.norm(np.asarray(model(found))[real] - expected)
    assert errors["sparsegpt"] < 0.9 * errors["magnitude"]


@pytest.mark.thorough
def test_calibration_ignores_padding():
    moments = []
    for extra in (0, 5):
        model = zoo.build("bert")
        found = {k: np.pad(v, [(0, 0), (0, extra)]) for k, v in zoo.inputs("bert", 8).items()}
        sparsify(model, 0.5, method="wanda", data=found)
        moments.append([np.array(w.variable) for w in adapter_for(model).weights(model)])
    for a, b in zip(*moments):
        np.testing.assert_array_equal(a, b)


def test_sparsify_other_models_patterns_and_m_by_n():
    model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(8, name="a"), keras.layers.Dense(4, name="b")])
    x = np.random.default_rng(0).normal(size=(32, 8)).astype("float32")
    names = [t.name for t in prunable_weights(model)]
    shares = sparsify(model, {names[1]: 0.25}, method="wanda", data=x)
    assert shares == {names[1]: 0.25}
    shares = sparsify(model, method="sparsegpt", data=x, sparsity_m_by_n=(2, 4))
    assert ((np.asarray(model.layers[0].kernel) != 0).reshape(2, 4, 8).sum(axis=1) <= 2).all()
    for bad, words in (
        ({"method": "luck"}, "magnitude, wanda, sparsegpt"),
        ({"method": "wanda"}, "needs calibration data"),
        ({"sparsity": 1.0, "method": "magnitude"}, r"\[0, 1\)"),
        ({"sparsity": {"x": 0.5}, "method": "magnitude"}, "nothing was pruned"),
    ):
        with pytest.raises(InputError, match=words):
            sparsify(model, **bad)
