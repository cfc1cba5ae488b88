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
