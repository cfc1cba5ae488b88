"""The smaller model computes what the masked one computes: every family, every unit kind."""

import contextlib

import keras
import numpy as np
import pytest
import tensorflow as tf

import tfvllm
from tests.models import zoo
from tests.models.test_adapters import EVERY
from tfvllm.errors import InputError
from tfvllm.families.base import keep_indices
from tfvllm.models import VOCABULARY, WIDTH, adapter_for
from tfvllm.pruning import apply_plan, mask_model, plan_shrink
from tfvllm.pruning.importance import spread_order
from tfvllm.pruning.sensitivity import _left_out
from tfvllm.pruning.shrinking import DAMPING, _fitted
from tfvllm.pruning.structure import full_plan, resolve

SOME = zoo.families(quick=("bert", "llama"))


def masked(model, plan):
    """A dense copy of `model` with the planned weights zeroed."""
    copy = apply_plan(model, full_plan(model))
    mask_model(copy, plan)
    return copy


def uneven(name):
    """A request that leaves every block of another size, where the family allows it."""
    count = 6 if name in zoo.SEQ2SEQ else 3
    if name == "albert":
        return {"heads": 3, "ffn": 8, "round_to": 1}
    if name in ("t5", "t5_plain"):  # one position bias for all
        return {"heads": 3, "ffn": list(range(8, 8 + count)), "round_to": 1}
    heads = [2, 4, 2] if name in zoo.GROUPED else [1, 2, 3]
    return {"heads": heads * (count // 3), "ffn": list(range(8, 8 + count)), "round_to": 1}


def close(a, b):
    np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", EVERY)
def test_heads_and_neurons_equal_the_masked_model(name, tmp_path):
    model = zoo.build(name)
    found = zoo.inputs(name)
    before = np.asarray(model(found))
    plan = plan_shrink(model, **uneven(name))
    small = apply_plan(model, plan)
    after = np.asarray(small(found))
    close(after, masked(model, plan)(found))
    assert np.abs(after - before).max() > 1e-2  # the removed units did something
    np.testing.assert_array_equal(before, np.asarray(model(found)))  # the original is as it was
    assert small.count_params() < model.count_params()
    sizes = [(b.heads, b.ffn_width) for b in adapter_for(small).blocks(small)]
    assert [ffn for _, ffn in sizes] == ([8] * 3 if name == "albert" else list(range(8, 8 + len(sizes))))
    small.save(tmp_path / "small.keras")
    loaded = keras.models.load_model(tmp_path / "small.keras")
    assert type(loaded) is type(small)
    np.testing.assert_array_equal(np.asarray(loaded(found)), after)


@pytest.mark.thorough
@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n == "gpt2" else pytest.mark.slow) for n in (*zoo.CAUSAL, *zoo.SEQ2SEQ)]
)
def test_generation_with_cache_gives_the_masked_models_tokens(name):
    model = zoo.build(name)
    plan = plan_shrink(model, **uneven(name))
    found = zoo.prompts(name)
    tokens = zoo.generated(apply_plan(model, plan), found)
    np.testing.assert_array_equal(tokens, zoo.generated(masked(model, plan), found))
    assert not np.array_equal(tokens, zoo.generated(model, found))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "bart", "t5", "gemma"])
def test_generation_after_layers_and_width(name):
    """The cached decode agrees with the plain forward pass: each greedy token is the argmax of the logits before it."""
    model = zoo.build(name)
    small = tfvllm.shrink(model, layers=[0, 2], width=0.5, heads=0.5, round_to=2)
    found = zoo.prompts(name)
    tokens = zoo.generated(small, found)
    prefix = "decoder_" if name in zoo.SEQ2SEQ else ""
    full = dict(found, **{f"{prefix}token_ids": tokens, f"{prefix}padding_mask": np.ones_like(tokens)})
    logits = np.asarray(small(full))
    start = found[f"{prefix}padding_mask"].sum(axis=1)
    for row in range(len(tokens)):
        for position in range(start[row], tokens.shape[1]):
            assert tokens[row, position] == logits[row, position - 1].argmax()


@pytest.mark.parametrize("name", SOME)
def test_layers_equal_the_model_that_skips_them(name):
    model = zoo.build(name)
    found = zoo.inputs(name)
    kept = [1, 2] if name in ("t5", "llama", "gemma") else [0, 2]  # T5's first block owns the position bias
    small = tfvllm.shrink(model, layers=kept, heads=0.5)
    plan = plan_shrink(model, layers=kept, heads=0.5)
    plan.layers = full_plan(model).layers
    reference = masked(model, plan)
    with contextlib.ExitStack() as contexts:
        for block in adapter_for(reference).blocks(reference):
            if block.index not in kept:
                contexts.enter_context(_left_out(block))
        expected = reference(found)
    close(small(found), expected)


@pytest.mark.parametrize("name", SOME)
def test_width_equals_the_model_with_silent_channels(name):
    """Reference: removed channels are zero everywhere and norms look at the kept ones only."""
    model = zoo.build(name)
    found = zoo.inputs(name)
    plan = plan_shrink(model, width=0.5, round_to=2)
    kept = plan.keep[WIDTH, ""]
    small = apply_plan(model, plan)
    reference = apply_plan(model, full_plan(model))
    adapter = adapter_for(reference)
    for weight in adapter.weights(reference):
        value = np.array(weight.variable)
        for position, axis in enumerate(weight.axes):
            if axis is not None and axis.unit == WIDTH:
                gone = np.setdiff1d(np.arange(16), keep_indices(axis, kept, 16))
                value[(slice(None),) * position + (gone,)] = 0
        weight.variable.assign(value)
    spread = tf.one_hot(kept, 16)
    for layer in reference.backbone._flatten_layers():
        if "Norm" in type(layer).__name__ and layer.weights and tuple(layer.weights[0].shape) == (16,):
            narrow = type(layer)(epsilon=layer.epsilon)
            narrow.build((None, None, len(kept)))
            for new, old in zip(narrow.weights, layer.weights):
                new.assign(np.asarray(old)[kept])
            call = lambda x, _n=narrow: tf.matmul(_n(tf.gather(x, kept, axis=-1)), spread)  # noqa: E731
            object.__setattr__(layer, "call", call)
    close(small(found), reference(found))
    assert {block.hidden_width for block in adapter_for(small).blocks(small)} == {8}


@pytest.mark.parametrize("name", ["bert", "gpt2", "bart"])
def test_vocabulary_equals_the_original_on_kept_tokens(name):
    model = zoo.build(name)
    kept = np.asarray([0, *range(3, 40, 2)])
    small = tfvllm.shrink(model, vocabulary=kept.tolist())
    found = zoo.inputs(name)
    old, new = dict(found), dict(found)
    for key in found:
        if key.endswith("token_ids"):
            new[key] = found[key] % len(kept)
            old[key] = kept[new[key]]
    expected = np.asarray(model(old))
    close(small(new), expected if name == "bert" else expected[..., kept])
    assert small.backbone.vocabulary_size == len(kept)
    assert plan_shrink(model, vocabulary=0.5).keep[VOCABULARY, ""].size == 20


@pytest.mark.slow
@pytest.mark.parametrize("name", ["bart", "t5"])
def test_a_shallow_decoder_over_a_deep_encoder(name, tmp_path):
    model = zoo.build(name)
    found = zoo.inputs(name)
    small = tfvllm.shrink(model, layers={"decoder": [0]})
    blocks = adapter_for(small).blocks(small)
    assert [block.kind for block in blocks] == ["encoder"] * 3 + ["decoder"]
    kinds = [w.name.split(".")[0] for w in adapter_for(model).weights(model) if w.name.startswith("decoder.")]
    assert len(small.weights) < len(model.weights) - len(kinds) // 2
    reference = apply_plan(model, full_plan(model))
    with contextlib.ExitStack() as contexts:
        for block in adapter_for(reference).blocks(reference):
            if block.kind == "decoder" and block.index:
                contexts.enter_context(_left_out(block))
        close(small(found), reference(found))
    small.save(tmp_path / "small.keras")
    loaded = keras.models.load_model(tmp_path / "small.keras")
    np.testing.assert_array_equal(np.asarray(loaded(found)), np.asarray(small(found)))
    tokens = zoo.generated(small, zoo.prompts(name))
    logits = np.asarray(
        small(zoo.prompts(name) | {"decoder_token_ids": tokens, "decoder_padding_mask": tokens * 0 + 1})
    )
    np.testing.assert_array_equal(tokens[:, 2:], logits.argmax(-1)[:, 1:-1])


def test_global_allocation_lets_blocks_compete():
    model = zoo.build("gpt2")
    adapter = adapter_for(model)
    quiet = adapter.blocks(model)[1].feed_forward
    for projection in quiet.projections:
        kernel = np.array(projection.layer.kernel)
        kernel[:, :20] *= 1.0
        projection.layer.kernel.assign(kernel)
    plan = plan_shrink(model, ffn=0.5, allocation="global", round_to=1)
    counts = [len(v) for k, v in plan.keep.items() if k[0] == "ffn"]
    assert abs(sum(counts) - 36) <= 1 and len(set(counts)) > 1
    close(apply_plan(model, plan)(zoo.inputs("gpt2")), masked(model, plan)(zoo.inputs("gpt2")))


def test_grouped_queries_go_with_their_group():
    model = zoo.build("llama")
    plan = plan_shrink(model, heads=2)
    for block in range(3):
        group = plan.keep["kv_heads", f"decoder.{block}.self"][0]
        np.testing.assert_array_equal(plan.keep["heads", f"decoder.{block}.self"], [2 * group, 2 * group + 1])
    single = plan_shrink(zoo.build("gemma_mqa"), heads=3)
    assert ("kv_heads", "decoder.0.self") not in single.keep and len(single.keep["heads", "decoder.0.self"]) == 3


def data_for(name, rows=8):
    found = zoo.inputs(name, rows)
    if name in zoo.CLASSIFIERS:
        return found, np.arange(rows) % 3
    return found, found["token_ids"], found["padding_mask"]


@pytest.mark.thorough
@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_taylor_is_the_gradient_of_a_switch(name):
    """Score of a neuron = (d loss / d gate)^2 at gate 1, checked by finite differences on its output row."""
    from tfvllm.pruning.importance import loss_of, unit_scores

    model = zoo.build(name)
    x, y, *weight = data_for(name)
    scores = unit_scores(model, "taylor", (x, y, *weight))
    block = adapter_for(model).blocks(model)[1]
    for unit, place, kernel in (
        ("ffn", block.feed_forward.place, block.feed_forward.down.layer.kernel),
        ("heads", block.attention.place, block.attention.output.layer.kernel),
    ):
        value = np.array(kernel)
        losses = []
        for step in (1e-2, -1e-2):
            changed = value.copy()
            changed[2] *= 1 + step
            kernel.assign(changed)
            losses.append(float(loss_of(model, x, y, weight[0] if weight else None)))
        kernel.assign(value)
        slope = (losses[0] - losses[1]) / 2e-2
        np.testing.assert_allclose(scores[unit, place][2], slope**2, rtol=0.05, atol=1e-7)


@pytest.mark.thorough
def test_activation_scores_ignore_padding():
    from tfvllm.pruning.importance import unit_scores

    model = zoo.build("bert")
    x, _ = data_for("bert")
    longer = {k: np.pad(v, [(0, 0), (0, 5)]) for k, v in x.items()}
    short, long = (unit_scores(model, "activation", data) for data in (x, longer))
    for key in short:
        np.testing.assert_allclose(short[key], long[key], rtol=1e-4, err_msg=str(key))


def test_compensation_is_exact_for_constant_units():
    """A neuron that always gives the same value can go without a trace once its mean is in the bias."""
    model = zoo.build("bert")
    for block in adapter_for(model).blocks(model):
        up = block.feed_forward.up.layer
        kernel, bias = np.array(up.kernel), np.array(up.bias)
        kernel[:, 5] = 0.0
        bias[5] = 2.0
        up.kernel.assign(kernel)
        up.bias.assign(bias)
    x, y = data_for("bert")
    with_mean = tfvllm.shrink(model, ffn=23, importance="activation", data=(x, y))
    close(with_mean(x), model(x))
    plan = plan_shrink(model, ffn=23, importance="activation", data=(x, y), compensate=False)
    assert 5 in plan.keep["ffn", "encoder.0"]  # without compensation it matters


@pytest.mark.thorough
def test_compensated_shrunk_equals_compensated_masked():
    model = zoo.build("gpt2")
    plan = plan_shrink(model, heads=0.5, ffn=0.5, importance="activation", data=data_for("gpt2"), round_to=4)
    assert plan.bias
    close(apply_plan(model, plan)(zoo.inputs("gpt2")), masked(model, plan)(zoo.inputs("gpt2")))


@pytest.mark.thorough
@pytest.mark.parametrize("name", ["bert", "llama", pytest.param("bart", marks=pytest.mark.slow)])
def test_fitted_shrunk_equals_fitted_masked(name):
    model = zoo.build(name)
    wanted = {"importance": "activation", "data": zoo.inputs(name, 8), "compensate": "least_squares", "round_to": 4}
    plan = plan_shrink(model, heads=0.5, ffn=0.5, **wanted)
    assert plan.kernels and bool(plan.bias) == (name != "llama")
    close(apply_plan(model, plan)(zoo.inputs(name)), masked(model, plan)(zoo.inputs(name)))


def test_the_fit_is_the_minimum_of_its_objective():
    rng = np.random.default_rng(0)
    h, kernel, stay = rng.normal(size=(50, 6)) @ rng.normal(size=(6, 6)), rng.normal(size=(6, 3)), np.array([0, 2, 5])
    moments = h.T @ h / len(h)
    found = _fitted(kernel, moments, stay)
    damping = DAMPING * np.diag(moments)[stay].mean()
    rows = np.concatenate([h[:, stay] / np.sqrt(len(h)), np.sqrt(damping) * np.eye(3)])
    wanted = np.concatenate([h @ kernel / np.sqrt(len(h)), np.sqrt(damping) * kernel[stay]])
    np.testing.assert_allclose(found, np.linalg.lstsq(rows, wanted, rcond=None)[0], rtol=1e-9)


@pytest.mark.thorough
def test_twin_neurons_go_without_a_trace_when_fitted():
    model = zoo.build("bert")
    for block in adapter_for(model).blocks(model):
        up = block.feed_forward.up.layer
        for variable in (up.kernel, up.bias):
            value = np.array(variable)
            value[..., 1::2] = value[..., ::2]
            variable.assign(value)
    x, y = data_for("bert")
    evens = {("ffn", f"encoder.{i}"): np.arange(24) % 2 == 0 for i in range(3)}
    errors = {}
    for compensate in ("mean", "least_squares"):
        small = tfvllm.shrink(model, ffn=12, importance=evens, data=(x, y), compensate=compensate, round_to=1)
        errors[compensate] = float(np.abs(np.asarray(small(x)) - np.asarray(model(x))).max())
    assert errors["least_squares"] < 0.05 * errors["mean"]


@pytest.mark.thorough
def test_shrunk_model_fine_tunes():
    x, y = data_for("bert", 16)
    small = tfvllm.shrink(zoo.build("bert"), heads=0.5, ffn=0.5, layers=2)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    small.compile(keras.optimizers.Adam(1e-2), loss, metrics=None, run_eagerly=True)
    first = float(loss(y, small(x)))
    small.fit(x, y, epochs=12, batch_size=8, verbose=0)
    assert float(loss(y, small(x))) < 0.8 * first


@pytest.mark.parametrize("name", ["bert", "gpt2", "bart"])
def test_shrunk_copy_of_a_frozen_teacher_can_be_trained(name):
    teacher = zoo.build(name)
    teacher.trainable = False  # as a Distiller leaves it
    small = tfvllm.shrink(teacher, ffn=0.5)
    assert len(small.trainable_variables) > 10
    assert not teacher.trainable_variables


def test_shrinks_a_shrunk_model_again():
    model = tfvllm.shrink(zoo.build("bert"), heads=[1, 2, 3])
    again = tfvllm.shrink(model, ffn=0.5, layers=[0, 2])
    assert [b.heads for b in adapter_for(again).blocks(again)] == [1, 3]
    assert np.asarray(again(zoo.inputs("bert"))).shape == (3, 3)


def test_model_around_a_backbone():
    backbone = zoo.build("bert").backbone
    model = keras.Model(backbone.input, keras.layers.Dense(2, name="head")(backbone(backbone.input)["pooled_output"]))
    small = tfvllm.shrink(model, heads=0.5)
    found = zoo.inputs("bert")
    plan = plan_shrink(model, heads=0.5)
    mask_model(model, plan)
    close(small(found), model(found))
    with pytest.raises(InputError, match=r"width= and vocabulary="):
        tfvllm.shrink(model, width=0.5)


def test_mixed_precision_policy_survives():
    import keras_nlp

    backbone = keras_nlp.models.BertBackbone(40, 2, 4, 16, 24, max_sequence_length=32, dtype="mixed_bfloat16")
    small = tfvllm.shrink(backbone, heads=0.5, ffn=0.5)
    assert small.dtype_policy.name == "mixed_bfloat16"
    assert small.transformer_layers[0]._self_attention_layer._query_dense.compute_dtype == "bfloat16"


def test_spread_order_keeps_ends_and_spaces():
    scores = spread_order(6)
    assert sorted(np.argsort(-scores)[:2]) == [0, 5]
    assert sorted(np.argsort(-scores)[:3]) in ([0, 2, 5], [0, 3, 5])


@pytest.mark.parametrize(
    ("request_", "words"),
    [
        ({"heads": 1.0}, "1.0 would leave nothing"),
        ({"ffn": 1.2}, r"share to remove in \[0, 1\)"),
        ({"heads": 0}, "expected 1 to 4"),
        ({"heads": 5}, "expected 1 to 4"),
        ({"layers": 4}, "expected 1 to 3"),
        ({"layers": [0, 0]}, "distinct block indices"),
        ({"layers": [3]}, "from 0 to 2"),
        ({"ffn": [0.5, 0.5]}, "expected 3, one per block"),
        ({"ffn": "half"}, "expected a share"),
        ({"width": 7}, "even"),
        ({}, "nothing to remove"),
        ({"heads": 0.5, "importance": "taylor"}, "needs calibration data"),
        ({"heads": 0.5, "importance": "luck"}, "magnitude, taylor, activation"),
        ({"heads": 0.5, "allocation": "fair"}, "uniform"),
        ({"ffn": 0.5, "compensate": True}, "needs calibration data"),
        ({"ffn": 0.5, "compensate": "least_squares"}, "needs calibration data"),
        ({"ffn": 0.5, "compensate": "some"}, "expected 'mean', 'least_squares'"),
        ({"vocabulary": "seen"}, "data is needed"),
        ({"vocabulary": [99]}, "outside 0 to 39"),
        ({"vocabulary": ["word"]}, "no preprocessor"),
    ],
)
def test_impossible_requests(request_, words, bert=[]):  # noqa: B006
    if not bert:
        bert.append(zoo.build("bert"))
    with pytest.raises(InputError, match=words):
        tfvllm.shrink(bert[0], **request_)


def test_impossible_requests_of_families():
    with pytest.raises(InputError, match="whole groups"):
        tfvllm.shrink(zoo.build("llama"), heads=3)
    with pytest.raises(InputError, match="no output bias"):
        tfvllm.shrink(zoo.build("llama"), ffn=0.5, compensate=True, data=data_for("llama"))
    with pytest.raises(InputError, match="no adapter for Sequential"):
        tfvllm.shrink(keras.Sequential([keras.Input((4,)), keras.layers.Dense(2)]), ffn=0.5)


@pytest.mark.slow
def test_t5_blocks_lose_heads_together():
    with pytest.raises(InputError, match="share one position bias"):
        tfvllm.shrink(zoo.build("t5"), heads=[2, 3, 2, 3, 2, 3])


def test_shares_and_counts():
    assert resolve(0.5, 24, "ffn", round_to=16) == 16
    assert resolve(0.9, 64, "ffn", round_to=16) == 16  # at least one step
    assert resolve(0.0, 10, "ffn", round_to=16) == 10
    assert resolve(0.25, 12, "heads") == 9
    assert resolve(7, 12, "heads") == 7
