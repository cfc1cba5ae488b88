"""Experts as a unit: the smaller model computes what the whole one does whose router is closed to those that went."""

import contextlib

import keras
import keras_nlp
import numpy as np
import pytest
import tensorflow as tf

import tfvllm
from tests.generation.reference import keras_generate
from tests.generation.test_causal import generate
from tests.models import zoo
from tfvllm.errors import InputError
from tfvllm.families.taps import hooked
from tfvllm.generation.generator import Generator
from tfvllm.models import EXPERTS, FFN, Experts, adapter_for, read
from tfvllm.pruning import apply_plan, block_flops, mask_model, plan_shrink, unit_scores
from tfvllm.pruning.importance import loss_of

M = keras_nlp.models
FAMILIES = zoo.families(quick=("mixtral",), names=zoo.EXPERTS)
UNEVEN = [1, 3, 2]


def mixtures(model):
    """The experts of each block that has some, by the block's number."""
    blocks = adapter_for(model).blocks(model)
    return {block.index: block.feed_forward for block in blocks if isinstance(block.feed_forward, Experts)}


@contextlib.contextmanager
def closed(model, plan):
    """While it lasts, the routers of `model` give the experts that `plan` removes a logit of -inf (all but)."""
    with contextlib.ExitStack() as taps:
        for inside in mixtures(model).values():
            kept = plan.keep.get((EXPERTS, inside.place))
            if kept is not None:
                shut = np.where(np.isin(np.arange(inside.count), kept), 0.0, -1e30).astype("float32")
                hook = lambda method, x, *args, _shut=shut, **kwargs: method(x, *args, **kwargs) + _shut  # noqa: E731
                taps.enter_context(hooked(inside.router.layer, "call", hook))
        yield


def close(a, b):
    np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=1e-5, atol=1e-5)


def labelled(rows=8):
    found = zoo.inputs("mixtral", rows)
    return found, found["token_ids"], found["padding_mask"]


@pytest.mark.parametrize("name", FAMILIES)
def test_equals_the_model_with_a_closed_router(name, tmp_path):
    model, found = zoo.build(name), zoo.inputs(name)
    before = np.asarray(model(found))
    plan = plan_shrink(model, experts=UNEVEN)
    small = apply_plan(model, plan)
    after = np.asarray(small(found))
    with closed(model, plan):
        close(after, model(found))
    np.testing.assert_array_equal(before, np.asarray(model(found)))
    assert np.abs(after - before).max() > 1e-2
    sizes = {index: (inside.count, inside.top) for index, inside in mixtures(small).items()}
    whole = {0: (1, 1), 1: (3, 2), 2: (2, 2)}  # a token takes as many as before, unless fewer stay
    assert sizes == {index: whole[index] for index in mixtures(model)}
    assert type(small.backbone).__name__.startswith("Shrunk")
    assert small.backbone.structure["decoder"][0]["experts"] == 1
    small.save(tmp_path / "small.keras")
    loaded = keras.models.load_model(tmp_path / "small.keras")
    assert type(loaded) is type(small)
    np.testing.assert_array_equal(np.asarray(loaded(found)), after)
    small.backbone.save_to_preset(tmp_path / "preset")
    again = M.Backbone.from_preset(str(tmp_path / "preset"))
    np.testing.assert_array_equal(np.asarray(again(found)), np.asarray(small.backbone(found)))


@pytest.mark.parametrize("name", FAMILIES)
def test_alike_in_all_layers_is_the_original_class(name, tmp_path):
    model, found = zoo.build(name), zoo.inputs(name)
    plan = plan_shrink(model, experts=0.25, ffn=16)
    small = apply_plan(model, plan)
    assert type(small.backbone) is type(model.backbone) and type(small) is type(model)
    assert (small.backbone.num_experts, small.backbone.top_k) == (3, 2)
    uneven = tfvllm.shrink(model, experts=UNEVEN, ffn=[7, 8, 9], heads=2)
    order = [(variable.name, len(variable.shape)) for variable in model.variables]
    assert [[(v.name, len(v.shape)) for v in m.variables] for m in (small, uneven)] == [order, order]
    neurons = {place: kept for place, kept in plan.keep.items() if place[0] == FFN}
    mask_model(model, tfvllm.pruning.Plan(plan.layers, neurons))
    with closed(model, plan):
        close(small(found), model(found))
    small.save(tmp_path / "small.keras")
    np.testing.assert_array_equal(keras.models.load_model(tmp_path / "small.keras")(found), small(found))


@pytest.mark.thorough
@pytest.mark.parametrize("name", zoo.EXPERTS)
def test_the_reader_gives_the_shrunk_models_tokens(name):
    small = tfvllm.shrink(zoo.build(name), experts=UNEVEN, heads=[2, 4, 2], ffn=[7, 9, 8])
    found = zoo.inputs(name)
    ids, mask = found["token_ids"], found["padding_mask"]
    expected = keras_generate(small, ids, mask, 4)
    np.testing.assert_array_equal(generate(Generator(read(small)), ids, mask, 4)[0], expected)


@pytest.mark.parametrize("name", FAMILIES)
def test_everything_at_once_and_again(name):
    model, found = zoo.build(name), zoo.inputs(name)
    small = tfvllm.shrink(model, layers=[0, 2], experts=[2, 3], heads=[2, 4], ffn=[7, 8], width=8, vocabulary=30)
    sizes = {index: (inside.count, inside.width) for index, inside in mixtures(small).items()}
    assert sizes == {0: (2, 7), 1: (3, 8)}
    assert (small.backbone.hidden_dim, small.backbone.vocabulary_size) == (8, 30)
    if name == "gpt_oss":  # whose second layer, the one with a window, is gone
        assert [layer.sliding_window for layer in small.backbone.transformer_layers] == [None, None]
    found["token_ids"] %= 30
    assert np.isfinite(small(found)).all()
    once = tfvllm.shrink(small, experts=1)
    assert [inside.top for inside in mixtures(once).values()] == [1, 1]


def test_experts_leave_plain_layers_alone():
    model = zoo.build("qwen3_moe")
    small = tfvllm.shrink(model, experts=2)
    assert list(mixtures(model)) == list(mixtures(small)) == [0, 2]
    for name in ("_feedforward_gate_dense", "_feedforward_output_dense"):
        kernels = [getattr(m.backbone.transformer_layers[1].mlp, name).kernel for m in (small, model)]
        np.testing.assert_array_equal(*map(np.asarray, kernels))
    assert small.backbone.mlp_only_layers == [1]
    last = tfvllm.shrink(model, layers=[1, 2], ffn=[8, 9])
    assert [b.ffn_width for b in adapter_for(last).blocks(last)] == [8, 9]
    assert last.backbone.mlp_only_layers == [0]  # and it can be said in the original's config
    assert type(last.backbone) is M.Qwen3MoeBackbone


@pytest.mark.thorough
def test_a_mixture_without_experts_is_an_ordinary_model(tmp_path):
    options = {"moe_intermediate_dim": 24, "shared_expert_intermediate_dim": 24, "mlp_only_layers": [0, 1]}
    sizes = {"num_layers": 2, "num_query_heads": 4, "num_key_value_heads": 2, "hidden_dim": 16, "intermediate_dim": 24}
    backbone = M.QwenMoeBackbone(40, num_experts=4, **sizes, **options)
    small = tfvllm.shrink(backbone, ffn=[7, 8])
    assert (small.num_experts, small.moe_intermediate_dim) == (4, 24)
    small.save(tmp_path / "small.keras")
    found = zoo.inputs("qwen_moe")
    np.testing.assert_array_equal(keras.models.load_model(tmp_path / "small.keras")(found), small(found))
    with pytest.raises(InputError, match="found no block with experts"):
        tfvllm.shrink(backbone, experts=2)


def test_the_shared_expert_stays_whole():
    model = zoo.build("qwen_moe")
    small = tfvllm.shrink(model, experts=[1, 2, 3], ffn=8)
    for old, new in zip(mixtures(model).values(), mixtures(small).values()):
        for before, after in zip(old.others, new.others, strict=True):
            np.testing.assert_array_equal(np.asarray(before.layer.kernel), np.asarray(after.layer.kernel))
    assert len(old.others) == 4 and new.width == 8


# ----------------------------------------------------------------------------------------------------------- importance


@pytest.mark.parametrize("name", FAMILIES)
def test_neurons_of_experts_give_what_the_bank_gives(name):
    model = zoo.build(name)
    rows = np.random.default_rng(0).normal(size=[5, 16]).astype("float32") * 4  # beyond GPT-OSS's limit
    for inside in mixtures(model).values():
        bank = inside.down.owner
        bias = getattr(bank, "down_proj_bias", np.zeros([4, 16], "float32"))
        found = np.einsum("etm,emh->eth", np.asarray(inside.hidden(rows)), np.asarray(inside.down.variable))
        np.testing.assert_allclose(found + np.asarray(bias)[:, None], np.asarray(bank(rows)), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("name", FAMILIES)
def test_magnitude_is_the_norm_of_an_experts_weights(name):
    model = zoo.build(name)
    for inside in mixtures(model).values():
        weights = [np.asarray(weight.variable) for weight in inside.bare]
        weights += [np.moveaxis(np.asarray(weight), -1, 0) for weight in inside.router.layer.weights]
        norms = np.sqrt(sum((np.reshape(w, [4, -1]) ** 2).sum(1) for w in weights))
        np.testing.assert_allclose(unit_scores(model, "magnitude")[EXPERTS, inside.place], norms, rtol=1e-5)
        kept = plan_shrink(model, experts=2).keep[EXPERTS, inside.place]
        np.testing.assert_array_equal(kept, np.sort(np.argsort(-norms)[:2]))


@pytest.mark.parametrize("name", FAMILIES)
def test_activation_is_what_the_router_gives_out(name):
    model, (found, *_) = zoo.build(name), labelled(6)
    scores = unit_scores(model, "activation", found)
    for inside in mixtures(model).values():
        seen, routing = [], []
        with contextlib.ExitStack() as taps:
            for layer, kept in ((inside.router.layer, seen), (inside.down.owner, routing)):
                keep = lambda method, x, _kept=kept, **_: _kept.append((x, method(x))) or _kept[-1][1]  # noqa: E731
                taps.enter_context(hooked(layer, "call", keep))
            model(found)
        real = found["padding_mask"].reshape(-1) == 1
        logits = np.asarray(seen[0][1], np.float64)[real]
        shares = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
        shares[shares < np.sort(shares, axis=1)[:, -2:-1]] = 0
        if name != "qwen_moe":
            shares /= shares.sum(1, keepdims=True)
        np.testing.assert_allclose(scores[EXPERTS, inside.place], shares.mean(0), rtol=1e-4)
        hidden = np.asarray(inside.hidden(np.asarray(routing[0][0])[real])) * shares.T[..., None]
        down = np.asarray(inside.down.variable)
        expected = np.sqrt(((hidden**2).mean(1) * (down**2).sum(-1)).sum(0))
        np.testing.assert_allclose(scores[FFN, inside.place], expected, rtol=1e-3)


@pytest.mark.thorough
@pytest.mark.parametrize("name", zoo.EXPERTS)
def test_taylor_is_the_gradient_of_a_switch(name):
    model, (x, y, weight) = zoo.build(name), labelled(4)
    scores = unit_scores(model, "taylor", (x, y, weight), units=(EXPERTS, FFN))
    inside = mixtures(model)[2]
    down, router = inside.down.variable, inside.down.owner
    bias = getattr(router, "down_proj_bias", None)
    switched = [(EXPERTS, (1,), [down] if bias is None else [down, bias]), (FFN, (slice(None), 3), [down])]
    for unit, where, variables in switched:
        losses = []
        for step in (1e-2, -1e-2):
            values = [np.array(variable) for variable in variables]
            for variable, value in zip(variables, values):
                changed = value.copy()
                changed[where] *= 1 + step
                variable.assign(changed)
            losses.append(float(loss_of(model, x, y, weight)))
            for variable, value in zip(variables, values):
                variable.assign(value)
        slope = (losses[0] - losses[1]) / 2e-2
        np.testing.assert_allclose(scores[unit, inside.place][where[-1]], slope**2, rtol=0.05, atol=1e-7)


@pytest.mark.thorough
@pytest.mark.parametrize("backbone", [M.MixtralBackbone, M.GptOssBackbone])
def test_mixed_precision(backbone):
    sizes = {"num_layers": 2, "num_query_heads": 4, "num_key_value_heads": 2, "hidden_dim": 16, "intermediate_dim": 24}
    model, found = backbone(40, num_experts=4, dtype="mixed_bfloat16", **sizes), zoo.inputs("mixtral")
    small = tfvllm.shrink(model, experts=[1, 3], ffn=8, importance="activation", data=found)
    banks = [weight.variable for inside in mixtures(small).values() for weight in inside.bare]
    assert {v.dtype for v in banks} == {"float32"} and small(found).dtype == "bfloat16"


def test_scores_of_the_users_own_and_experts_that_compete():
    model = zoo.build("mixtral")
    own = {(EXPERTS, f"decoder.{i}"): scores for i, scores in enumerate(([1, 9, 2, 8], [9, 9, 9, 9], [0, 0, 1, 99]))}
    plan = plan_shrink(model, experts=2, importance=own)
    np.testing.assert_array_equal(plan.keep[EXPERTS, "decoder.0"], [1, 3])
    np.testing.assert_array_equal(plan.keep[EXPERTS, "decoder.2"], [2, 3])
    small = tfvllm.shrink(model, experts=0.5, importance=own, allocation="global")
    assert [inside.count for inside in mixtures(small).values()] == [2, 4, 1]


@pytest.mark.thorough
@pytest.mark.parametrize("name", zoo.EXPERTS)
def test_a_shrunk_mixture_can_be_trained(name):
    small = tfvllm.shrink(zoo.build(name), experts=UNEVEN, ffn=8)
    x, y, weight = labelled(4)
    banks = [weight.variable for inside in mixtures(small).values() for weight in inside.bare]
    assert {id(v) for v in banks} <= {id(v) for v in small.trainable_variables}
    with tf.GradientTape() as tape:
        loss = loss_of(small, x, y, weight)
    assert all(gradient is not None for gradient in tape.gradient(loss, [v.value for v in banks]))
    small.fit(x, y, sample_weight=weight, epochs=2, verbose=0)


def test_heads_beside_experts_are_made_up_for():
    model, (x, *_) = zoo.build("gpt_oss"), labelled(4)
    plan = plan_shrink(model, heads=2, ffn=8, data=x)
    names = [f"decoder.{i}.self_attention_layer.output_dense.bias" for i in range(3)]
    assert sorted(plan.bias) == names and not plan.kernels
    small = apply_plan(model, plan)
    mask_model(model, plan)
    close(small(x), model(x))
    assert plan_shrink(model, heads=2, data=x, compensate="least_squares").kernels
    assert not plan_shrink(model, experts=2, ffn=8, data=x).bias


def test_flops_count_every_expert():
    model = zoo.build("mixtral")
    whole, small = (block_flops(m, 1, 1) for m in (model, tfvllm.shrink(model, experts=3)))
    assert whole - small == 2 * 3 * (3 * 16 * 24 + 16)  # an expert and its column of the router, in three layers


# ------------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("request_", "words"),
    [
        ({"experts": 5}, "expected 1 to 4"),
        ({"experts": 0}, "expected 1 to 4"),
        ({"experts": 1.0}, "1.0 would leave nothing"),
        ({"experts": 0.9}, "leaves 0 of 4"),
        ({"experts": [2, 2]}, "experts has 2 entries, expected 3"),
        ({"experts": 2, "importance": "taylor"}, "needs calibration data"),
        ({"experts": 2, "adaptive": True, "heads": 2}, "expected experts=None, found 2"),
        ({"ffn": 8, "compensate": "least_squares", "data": 1}, "makes up for nothing inside experts"),
        ({"heads": 3}, "whole groups"),
    ],
)
def test_impossible_requests(request_, words, made=[]):  # noqa: B006
    if not made:
        made.append(zoo.build("mixtral"))
    with pytest.raises(InputError, match=words):
        tfvllm.shrink(made[0], **request_)


def test_where_experts_make_no_sense():
    with pytest.raises(InputError, match=r"experts=2: expected a mixture of experts, found no block with experts"):
        tfvllm.shrink(zoo.build("llama"), experts=2)
    model = zoo.build("mixtral")
    with pytest.raises(InputError, match="only heads and feed-forward neurons can be masked"):
        mask_model(model, plan_shrink(model, experts=2))
