"""What single families ask of shrinking."""

import keras_nlp
import numpy as np
import pytest

import tfvllm
from tests.models import zoo
from tfvllm.errors import InputError
from tfvllm.families.outputs import run
from tfvllm.models import adapter_for
from tfvllm.pruning import apply_plan, block_flops, mask_model, plan_shrink
from tfvllm.pruning.structure import full_plan

M = keras_nlp.models


@pytest.mark.parametrize("name", zoo.THOROUGH)
def test_shrunk_equals_masked(name):
    model, found = zoo.build(name), zoo.inputs(name, rows=2)
    plan = plan_shrink(model, heads=2, ffn=9)
    small = apply_plan(model, plan)
    mask_model(model, plan)
    np.testing.assert_allclose(np.asarray(small(found)), np.asarray(model(found)), rtol=1e-5, atol=1e-5)


def test_electra_keeps_its_narrow_embeddings():
    model = zoo.build("electra")
    small = tfvllm.shrink(model, width=8, vocabulary=[*range(30)])
    kept = small.backbone.get_config()
    assert (kept["hidden_dim"], kept["embedding_dim"], kept["vocab_size"]) == (8, 12, 30)
    table = np.asarray(model.backbone.token_embedding.embeddings)
    np.testing.assert_array_equal(np.asarray(small.backbone.token_embedding.embeddings), table[:30])
    with pytest.raises(InputError, match=r"width=12: blocks as wide as the embeddings .* another width than 12"):
        tfvllm.shrink(model, width=12)


def test_gpt_neo_x_loses_heads_of_one_kernel_for_queries_keys_and_values():
    model = zoo.build("gpt_neo_x")
    plan = plan_shrink(model, heads=[1, 3, 2])
    small = apply_plan(model, plan)
    for before, after, kept in zip(adapter_for(model).blocks(model), adapter_for(small).blocks(small), (1, 3, 2)):
        stay = plan.keep["heads", before.attention.place]
        kernel = np.asarray(before.attention.query.layer.kernel)
        assert len(stay) == kept and kernel.shape == (16, 4, 12)
        np.testing.assert_array_equal(np.asarray(after.attention.value.layer.kernel), kernel[:, stay])
    assert block_flops(model, 1, 1) == 2 * 3 * (4 * 16 * 16 + 2 * 16 + 2 * 16 * 24)
    found = run(small, zoo.inputs("gpt_neo_x"), read=["relations"]).blocks["decoder"][1]
    mask_model(model, plan)
    whole = run(model, zoo.inputs("gpt_neo_x"), read=["relations"]).blocks["decoder"][1]
    for name in ("queries", "keys", "values"):
        masked = np.reshape(getattr(whole, name), [3, 12, 4, 4])[:, :, plan.keep["heads", "decoder.1.self"]]
        np.testing.assert_allclose(getattr(found, name), np.reshape(masked, [3, 12, 12]), atol=1e-5)


@pytest.fixture(scope="module")
def two_widths():
    """A T5Gemma whose stacks have widths and heads of their own."""
    model = zoo.t5gemma(encoder_hidden_dim=24, encoder_head_dim=12)
    rng = np.random.default_rng(4)
    for variable in model.weights:
        variable.assign(rng.normal(0, 0.3, variable.shape))
    return model


@pytest.mark.thorough
@pytest.mark.parametrize("importance", ["magnitude", "activation"])
def test_t5gemma_of_two_widths_loses_groups_of_heads_in_self_and_cross_attention(two_widths, importance):
    model, found = two_widths, zoo.inputs("t5gemma")
    data = None if importance == "magnitude" else found
    uneven = {"heads": [2, 4, 2, 4, 2, 2], "ffn": [*range(8, 14)], "round_to": 1}
    plan = plan_shrink(model, **uneven, importance=importance, data=data)
    small = apply_plan(model, plan)
    blocks = adapter_for(small).blocks(small)
    assert [(b.heads, b.kv_heads, b.head_dim) for b in blocks] == [
        *[(2, 1, 12), (4, 2, 12), (2, 1, 12)],
        *[(4, 2, 8), (2, 1, 8), (2, 1, 8)],
    ]
    crosses = [b.cross_attention for b in blocks[3:]]
    assert [(a.heads, a.kv_heads) for a in crosses] == [(4, 2), (2, 1), (2, 1)]
    prompts = zoo.prompts("t5gemma")
    answers = np.asarray(small(found)), zoo.generated(small, prompts)
    mask_model(whole := apply_plan(model, full_plan(model)), plan)
    np.testing.assert_allclose(answers[0], np.asarray(whole(found)), rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(answers[1], zoo.generated(whole, prompts))  # keras-nlp's caches, narrower in some


@pytest.mark.thorough
def test_t5gemma_of_two_widths_keeps_both(two_widths):
    told = "width=8: expected one width in the whole model, found 24 in the encoder and 16 in the decoder"
    for importance, data in (("magnitude", None), ("activation", zoo.inputs("t5gemma"))):
        with pytest.raises(InputError, match=told):
            plan_shrink(two_widths, width=8, importance=importance, data=data)
    small = tfvllm.shrink(two_widths, layers={"decoder": [1]}, heads=0.5, ffn=0.5, round_to=1)
    assert type(small.backbone) is M.T5GemmaBackbone
    assert small.backbone.decoder_layer_types == ["full_attention"]
    assert small.backbone.encoder_layer_types == two_widths.backbone.encoder_layer_types


@pytest.mark.thorough
def test_t5gemma_keeps_the_tokens_that_stay():
    model = zoo.build("t5gemma")
    small = tfvllm.shrink(model, vocabulary=[*range(30)])
    found = zoo.inputs("t5gemma")
    found = {name: value % 30 if name.endswith("token_ids") else value for name, value in found.items()}
    np.testing.assert_allclose(np.asarray(small(found)), np.asarray(model(found))[..., :30], rtol=1e-5, atol=1e-5)
