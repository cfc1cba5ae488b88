"""What is read inside models of every family, and students made from them."""

import numpy as np
import pytest
import tensorflow as tf

import tfvllm
from tests.distillation.pairs import batch, classifier
from tests.models import zoo
from tfvllm.distillation import student_from
from tfvllm.errors import InputError
from tfvllm.families.outputs import find_layer, run
from tfvllm.models import adapter_for


@pytest.mark.parametrize("name", zoo.families(quick=("bert", "gpt2")))
def test_every_family(name):
    model, x = zoo.build(name), zoo.inputs(name)
    plain = model(x)
    hides = {"t5": "T5MultiHeadAttention", "t5_plain": "T5MultiHeadAttention", "gpt_oss": "GptOssAttention"}.get(name)
    read = ["hidden_states", "relations"] + ([] if hides else ["attention_maps"])
    outputs = run(model, x, read=read)
    np.testing.assert_allclose(outputs.answer, plain, atol=1e-4)
    kinds = ("encoder", "decoder") if name in zoo.SEQ2SEQ else ("encoder",) if name in zoo.CLASSIFIERS else ("decoder",)
    assert tuple(outputs.blocks) == kinds
    for kind in kinds:
        mask = x.get(f"{kind}_padding_mask", x.get("padding_mask")) == 1
        length = mask.shape[1]
        described = [b for b in adapter_for(model).blocks(model) if b.kind == kind]
        for block, found in zip(described, outputs.blocks[kind], strict=True):
            assert found.hidden_state.shape == (3, length, 16)
            assert found.queries.shape == (3, length, block.heads * block.head_dim)
            assert found.keys.shape == found.values.shape == (3, length, block.kv_heads * block.head_dim)
            if found.attention_map is not None:
                assert found.attention_map.shape == (3, 4, length, length)
                sums = np.sum(found.attention_map, axis=-1).transpose(0, 2, 1)[mask]
                np.testing.assert_allclose(sums, 1.0, atol=1e-3)
    if hides:
        with pytest.raises(InputError, match=rf"{hides} does not show .*losses.Relations"):
            run(model, x, read=["attention_maps"])
    with pytest.raises(InputError, match="cannot read"):
        run(model, x, read=["logits"])

    np.testing.assert_allclose(student_from(model, 3)(x), plain, atol=1e-4)
    small = student_from(model, 1)
    assert not {id(v) for v in small.variables} & {id(v) for v in model.variables}
    losses = {
        "logits": tfvllm.losses.ForwardKL(),
        "hidden": tfvllm.losses.HiddenStates(),
        "r": tfvllm.losses.Relations(),
    }
    distiller = tfvllm.Distiller(model, small, losses=losses)
    with tf.GradientTape() as tape:
        loss = distiller.compute_loss(x)
    assert np.isfinite(loss) and loss > 0
    assert any(g is not None for g in tape.gradient(loss, small.trainable_variables))


def test_what_is_read_is_what_keras_computes():
    model, (x, _) = classifier(2), batch()
    found = run(model, x, read=["hidden_states", "attention_maps", "relations"]).blocks["encoder"]
    backbone = model.backbone
    h = backbone.embeddings_add(
        (
            backbone.token_embedding(x["token_ids"]),
            backbone.position_embedding(backbone.token_embedding(x["token_ids"])),
            backbone.segment_embedding(x["segment_ids"]),
        )
    )
    h = backbone.embeddings_layer_norm(h)
    for block, read in zip(backbone.transformer_layers, found):
        attention = block._self_attention_layer
        np.testing.assert_allclose(read.queries, np.reshape(attention.query_dense(h), (6, 8, 16)), rtol=1e-5, atol=1e-6)
        h, scores = block(h, padding_mask=x["padding_mask"], return_attention_scores=True)
        np.testing.assert_allclose(read.hidden_state, h, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(read.attention_map, scores, rtol=1e-5, atol=1e-6)


def test_taps_go_when_the_model_fails():
    model, (x, _) = classifier(1), batch()
    with pytest.raises(Exception):  # noqa: B017
        run(model, {**x, "token_ids": np.zeros((2, 3, 4, 5), "int32")}, read=["hidden_states"])
    assert all("call" not in vars(layer) for layer in model._flatten_layers())


def test_taps_inside_taps_and_threads():
    import threading

    model, (x, _) = classifier(1), batch()
    layer = model.backbone.transformer_layers[0]
    expected = run(model, x, read=["hidden_states"]).blocks["encoder"][0].hidden_state
    results = []

    def work():
        results.append(run(model, x, read=["hidden_states"], layers=["pooled_dense"]))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for found in results:
        np.testing.assert_array_equal(found.blocks["encoder"][0].hidden_state, expected)
        assert found.layers["pooled_dense"].shape == (6, 16)
    assert "call" not in vars(layer)


def test_layers_by_name_and_path():
    model = classifier(2)
    assert find_layer(model, "pooled_dense") is model.backbone.pooled_dense
    with pytest.raises(InputError, match=r"2 layers of .* named 'feedforward_output_dense'; give a path"):
        find_layer(model, "feedforward_output_dense")
    path = model.backbone.transformer_layers[1]._feedforward_output_dense.path
    assert find_layer(model, path) is model.backbone.transformer_layers[1]._feedforward_output_dense


@pytest.mark.slow
def test_a_shrunk_teacher_is_distilled():
    teacher = classifier(3, heads=4, width=16, ffn=32)
    student = tfvllm.shrink(student_from(teacher, 2), heads=[3, 2], ffn=16)
    smaller = student_from(student, [1])
    x, _ = batch()
    assert smaller(x).shape == (6, 3)
    losses = {
        "hidden": tfvllm.losses.HiddenStates(),
        "maps": tfvllm.losses.AttentionMaps(),
        "r": tfvllm.losses.Relations(),
    }
    assert np.isfinite(tfvllm.Distiller(teacher, student, losses=losses).compute_loss(x))
