"""LoRA and Keras quantisation, where `layer.kernel` is no variable: merged, or refused by name."""

import keras
import numpy as np
import pytest

import tfvllm
from tests.models import zoo
from tfvllm.errors import InputError
from tfvllm.families.stored import lora_layers, lora_parts
from tfvllm.models import adapter_for, read
from tfvllm.pruning import apply_plan, mask_model, merge_lora, plan_shrink, sparsify, unit_scores
from tfvllm.pruning.structure import full_plan


def with_lora(model, alpha=3.0):
    """LoRA on every layer that takes it, with matrices that matter and an alpha that is not the rank."""
    rng = np.random.default_rng(0)
    for layer in model._flatten_layers():
        if not getattr(layer, "lora_enabled", True):
            layer.enable_lora(2, lora_alpha=alpha)
            for part in lora_parts(layer):
                part.assign(rng.normal(0, 0.3, part.shape))
    return model


def merged(model):
    """A copy of a zoo task with LoRA merged by hand: W + alpha / rank A B."""
    copy = apply_plan(model, full_plan(model))
    for layer, name in lora_layers(model):
        a, b = (np.asarray(part, np.float64) for part in lora_parts(layer))
        whole = np.asarray(getattr(layer, f"_{name}"), np.float64) + layer.lora_alpha / layer.lora_rank * (a @ b)
        np.testing.assert_allclose(np.asarray(getattr(layer, name)), whole, rtol=1e-5, atol=1e-6)
    return copy


@pytest.fixture(scope="module", params=["bert", pytest.param("gpt2", marks=pytest.mark.thorough)])
def adapted(request):
    """(name, a model with LoRA, the same merged, inputs), their weights not to be changed."""
    name = request.param
    model = with_lora(zoo.build(name))
    return name, model, merged(model), zoo.inputs(name)


def test_shrinking_nothing_changes_nothing(adapted):
    name, model, copy, x = adapted
    before = [np.asarray(v) for v in model.variables]
    plain = zoo.build(name)
    expected = np.asarray(model(x))
    assert np.abs(np.asarray(plain(x)) - expected).max() > 0.5  # LoRA says much here
    for small in (copy, tfvllm.shrink(model, ffn=0.0), tfvllm.distillation.student_from(model, layers=3)):
        np.testing.assert_allclose(np.asarray(small(x)), expected, rtol=1e-5, atol=1e-5)
        assert not list(lora_layers(small)) and len(small.trainable_variables) == len(plain.trainable_variables)
    for variable, value in zip(model.variables, before, strict=True):
        np.testing.assert_array_equal(np.asarray(variable), value)


@pytest.mark.parametrize(
    "importance", ["magnitude", *(pytest.param(n, marks=pytest.mark.thorough) for n in ("taylor", "activation"))]
)
def test_scores_and_plans_are_those_of_the_merged_model(adapted, importance):
    name, model, copy, x = adapted
    y = np.zeros(3, "int32") if name == "bert" else np.asarray(x["token_ids"])
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    for each in (model, copy):
        each.compile("sgd", loss)
    ours, theirs = (unit_scores(each, importance, (x, y)) for each in (model, copy))
    assert set(ours) == set(theirs)
    for place, values in theirs.items():
        np.testing.assert_allclose(ours[place], values, rtol=1e-3, atol=1e-6)


@pytest.mark.thorough
def test_smaller_models_are_those_of_the_merged_model(adapted):
    _, model, copy, x = adapted
    sizes = {"heads": 0.5, "ffn": 16, "layers": 2, "compensate": "least_squares", "data": (x,)}
    for options in (sizes, {"width": 0.5}):
        ours, theirs = (tfvllm.shrink(each, **options) for each in (model, copy))
        np.testing.assert_allclose(np.asarray(ours(x)), np.asarray(theirs(x)), rtol=1e-4, atol=1e-4)


@pytest.mark.thorough
def test_masked_in_place_it_computes_what_the_smaller_model_does():
    model, x = with_lora(zoo.build("bert")), zoo.inputs("bert")
    plan = plan_shrink(model, heads=0.5, ffn=16)
    small = apply_plan(model, plan)
    mask_model(model, plan)
    np.testing.assert_allclose(np.asarray(model(x)), np.asarray(small(x)), rtol=1e-5, atol=1e-5)


@pytest.mark.thorough
def test_sensitivity_puts_lora_back():
    model, x = with_lora(zoo.build("bert")), zoo.inputs("bert")
    model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    before = np.asarray(model(x))
    tfvllm.pruning.sensitivity(model, (x, np.zeros(3, "int32")), units=["ffn"], shares=[0.5])
    np.testing.assert_array_equal(np.asarray(model(x)), before)


@pytest.mark.thorough
def test_a_head_around_the_backbone_keeps_its_lora():
    backbone, x = zoo.build("bert").backbone, zoo.inputs("bert")
    model = keras.Model(backbone.input, keras.layers.Dense(2)(backbone(backbone.input)["pooled_output"]))
    with_lora(model, alpha=5.0)
    small = tfvllm.shrink(model, ffn=0.0)
    np.testing.assert_allclose(np.asarray(small(x)), np.asarray(model(x)), rtol=1e-5, atol=1e-5)
    assert [layer.name for layer, _ in lora_layers(small)] == [model.layers[-1].name]


def net():
    return keras.Sequential(
        [
            keras.Input((6, 4)),
            keras.layers.Conv1D(5, 2),
            keras.layers.EinsumDense("abc,cde->abde", (5, 2, 3)),
            keras.layers.Flatten(),
            keras.layers.Dense(3),
        ]
    )


def test_merging_in_place():
    model = with_lora(net())
    x = np.random.default_rng(1).normal(size=(2, 6, 4)).astype("float32")
    before = np.asarray(model(x))
    assert merge_lora(model) == 3
    np.testing.assert_allclose(np.asarray(model(x)), before, rtol=1e-5, atol=1e-5)
    plain = net()
    assert [v.path.split("/")[-1] for v in model.weights] == [v.path.split("/")[-1] for v in plain.weights]
    assert len(model.trainable_weights) == len(plain.trainable_weights)
    again = type(model).from_config(model.get_config())  # and no trace is left in the config
    assert len(again.weights) == len(plain.weights)
    assert merge_lora(model) == 0
    model.compile("sgd", "mse")
    pruning = tfvllm.callbacks.MagnitudePruning(model, tfvllm.ConstantSparsity(0.5, 0, frequency=1))
    model.fit(x, before, verbose=0, callbacks=[pruning])
    assert abs(pruning.sparsity - 0.5) < 0.03


def test_embeddings_with_lora_merge_too():
    model = keras.Sequential([keras.Input((3,)), keras.layers.Embedding(7, 4)])
    with_lora(model)
    before = np.asarray(model(np.asarray([[1, 2, 6]])))
    assert merge_lora(model) == 1
    np.testing.assert_allclose(np.asarray(model(np.asarray([[1, 2, 6]]))), before, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "prune",
    [
        lambda model: tfvllm.callbacks.MagnitudePruning(model, tfvllm.ConstantSparsity(0.5, 0)),
        lambda model: tfvllm.prune_low_magnitude(model),
        lambda model: tfvllm.pruning.PruneLowMagnitude(model.layers[-1]),
        lambda model: sparsify(model, 0.5, method="magnitude"),
    ],
)
def test_masks_name_lora_and_quantisation(prune):
    with pytest.raises(InputError, match=r"has LoRA.*merge_lora"):
        prune(with_lora(net()))
    for mode in ("int8", "int4"):
        model = net()
        model.quantize(mode)
        with pytest.raises(InputError, match=f"quantised to {mode}.*before quantize"):
            prune(model)


def test_zeros_stay_zeros_under_float8():
    model = net()
    model.quantize("float8")
    x = np.random.default_rng(1).normal(size=(8, 6, 4)).astype("float32")
    model.compile("sgd", "mse")
    pruning = tfvllm.callbacks.MagnitudePruning(model, tfvllm.ConstantSparsity(0.5, 0, frequency=1))
    model.fit(x, np.zeros((8, 3)), verbose=0, callbacks=[pruning])
    assert abs(pruning.sparsity - 0.5) < 0.03


@pytest.mark.parametrize("mode", ["int8", "int4", "float8"])
def test_structure_and_generation_name_the_quantisation(mode):
    model = zoo.build("gpt2")
    plan = full_plan(model)
    model.quantize(mode)
    for what in (
        lambda: tfvllm.shrink(model, layers=2),
        lambda: apply_plan(model, plan),
        lambda: mask_model(model, plan),
        lambda: tfvllm.distillation.student_from(model, 2),
        lambda: merge_lora(model),
        lambda: read(model),
    ):
        with pytest.raises(InputError, match=rf"quantised to {mode} \(\d+ layers, first .*as it was before quantize"):
            what()


def test_generation_reads_lora(adapted):
    name, model, copy, _ = adapted
    if name == "bert":
        pytest.skip("an encoder does not generate")
    ours, theirs = read(model), read(copy)
    np.testing.assert_allclose(ours.embedding, theirs.embedding, rtol=1e-5, atol=1e-6)
    for block, other in zip(ours.decoder.blocks, theirs.decoder.blocks, strict=True):
        for found, wanted in ((block.attention, other.attention), (block.feed_forward, other.feed_forward)):
            np.testing.assert_allclose(found.output.kernel, wanted.output.kernel, rtol=1e-5, atol=1e-6)
    weights = {w.name: w.value() for w in adapter_for(copy).weights(copy)}
    query = weights["decoder.0.self_attention_layer.query_dense.kernel"].reshape(16, 16)
    np.testing.assert_allclose(ours.decoder.blocks[0].attention.query_key_value.kernel[:, :16], query, atol=1e-5)
