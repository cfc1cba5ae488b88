"""ALBERT: every call of a layer is a block."""

import contextlib

import keras
import keras_nlp
import numpy as np
import pytest

import tfvllm
from tests.models import zoo
from tfvllm.distillation import student_from
from tfvllm.errors import InputError
from tfvllm.families.outputs import run
from tfvllm.models import adapter_for
from tfvllm.pruning import apply_plan, mask_model, plan_shrink, sensitivity, sparsify
from tfvllm.pruning.sensitivity import _left_out

M = keras_nlp.models
SIZES = {"vocabulary_size": 40, "num_heads": 4, "embedding_dim": 12, "hidden_dim": 16, "intermediate_dim": 24}


def grouped(task=M.AlbertTextClassifier, **options):
    """Two groups of two layers, each called twice: blocks 0 1 0 1 2 3 2 3."""
    backbone = M.AlbertBackbone(
        **SIZES, num_layers=4, num_groups=2, num_inner_repetitions=2, max_sequence_length=32, dropout=0.0
    )
    model = task(backbone, **options)
    rng = np.random.default_rng(0)
    for weight in adapter_for(model).weights(model):
        weight.variable.assign(rng.normal(0, 0.3, weight.variable.shape))
    return model


def test_every_call_is_a_block():
    model = grouped(num_classes=3)
    adapter = adapter_for(model)
    blocks = adapter.blocks(model)
    assert [(b.index, b.call, b.calls) for b in blocks] == [
        *[(0, 0, 2), (1, 0, 2), (2, 1, 2), (3, 1, 2)],
        *[(4, 0, 2), (5, 0, 2), (6, 1, 2), (7, 1, 2)],
    ]
    assert blocks[3].attention.place == blocks[1].attention.place == "encoder.1.self"
    named = {w.name.split(".")[1] for w in adapter.weights(model) if w.name.startswith("encoder.")}
    assert named == {"0", "1", "4", "5"}
    x, backbone = zoo.inputs("albert"), model.backbone
    read = run(model, x, read=["hidden_states", "relations"]).blocks["encoder"]
    before = keras.Model(backbone.input, backbone.embeddings_projection.output)(x)
    for block, found in zip(blocks, read, strict=True):
        queries = block.layer._self_attention_layer.query_dense(before)
        np.testing.assert_allclose(found.queries, np.reshape(queries, found.queries.shape), rtol=1e-4, atol=1e-5)
        before = block.layer(before, padding_mask=x["padding_mask"])
        np.testing.assert_allclose(found.hidden_state, before, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("kept", "sizes"),
    [
        ([0, 1, 4, 5], (2, 2, 2)),
        pytest.param([2, 3, 6, 7], (2, 2, 2), marks=pytest.mark.thorough),  # any turn stands for any other
        pytest.param([1, 3, 4, 6], (4, 2, 1), marks=pytest.mark.thorough),
        pytest.param([4, 5, 6, 7], (2, 1, 2), marks=pytest.mark.thorough),
        pytest.param([7], (1, 1, 1), marks=pytest.mark.thorough),
    ],
)
def test_fewer_layers_are_fewer_calls(kept, sizes):
    model, x = grouped(num_classes=3), zoo.inputs("albert")
    small = tfvllm.shrink(model, layers=kept)
    backbone = small.backbone
    assert type(backbone) is M.AlbertBackbone
    assert (backbone.num_layers, backbone.num_groups, backbone.num_inner_repetitions) == sizes
    np.testing.assert_array_equal(student_from(model, kept)(x), small(x))
    with contextlib.ExitStack() as left_out:
        for block in adapter_for(model).blocks(model):
            if block.index not in kept:
                left_out.enter_context(_left_out(block))
        np.testing.assert_allclose(small(x), model(x), rtol=1e-5, atol=1e-5)


def test_what_no_albert_calls_is_refused():
    model = grouped(num_classes=3)
    with pytest.raises(InputError, match=r"every group equally often; blocks \[0, 1, 2\] are .*as many whole turns"):
        tfvllm.shrink(model, layers=[0, 1, 2])
    with pytest.raises(InputError, match="every group equally often"):
        student_from(model, [0, 1, 4])
    with pytest.raises(InputError, match=r"heads: blocks 0 and 2 are calls of one layer; .* found 2 and 3"):
        tfvllm.shrink(model, heads=[2, 2, 3, 2, 1, 1, 1, 1])


@pytest.mark.thorough
def test_layers_of_unlike_sizes(tmp_path):
    model, x = grouped(num_classes=3), zoo.inputs("albert")
    plan = plan_shrink(model, layers=[0, 1, 4, 5], heads=[1, 2, 3, 4], ffn=[5, 6, 7, 8])
    small = apply_plan(model, plan)
    sizes = [(b.heads, b.ffn_width) for b in adapter_for(small).blocks(small)]
    assert sizes == [(1, 5), (2, 6), (3, 7), (4, 8)]
    assert small.backbone.num_layers == 2
    small.save(tmp_path / "small.keras")
    np.testing.assert_array_equal(keras.models.load_model(tmp_path / "small.keras")(x), small(x))
    reference = tfvllm.shrink(model, layers=[0, 1, 4, 5])
    plan.layers = {"encoder": [0, 1, 2, 3]}
    plan.keep = {
        (unit, place.replace(".4", ".2").replace(".5", ".3")): kept for (unit, place), kept in plan.keep.items()
    }
    mask_model(reference, plan)
    np.testing.assert_allclose(small(x), reference(x), rtol=1e-5, atol=1e-5)


@pytest.mark.thorough
def test_the_head_over_the_vocabulary_is_cut_with_its_own_width():
    model = grouped(M.AlbertMaskedLM)
    x = {**zoo.inputs("albert"), "mask_positions": np.asarray([[0, 1], [1, 2], [0, 3]])}
    small = tfvllm.shrink(model, width=8, round_to=2)
    head = small.masked_lm_head
    assert head._intermediate_dense.kernel.shape == (8, 12)
    kept = [*range(0, 40, 2)]
    few = tfvllm.shrink(model, vocabulary=kept)
    ids = x["token_ids"] % 20
    old, new = ({**x, "token_ids": ids * 2}, {**x, "token_ids": ids})
    np.testing.assert_allclose(few(new), np.asarray(model(old))[..., kept], rtol=1e-5, atol=1e-5)
    plan = plan_shrink(model, heads=2, ffn=9)
    smaller = apply_plan(model, plan)
    mask_model(model, plan)
    np.testing.assert_allclose(smaller(x), model(x), rtol=1e-5, atol=1e-5)


@pytest.mark.thorough
def test_measures_that_go_through_the_blocks():
    model, x = grouped(num_classes=3), zoo.inputs("albert")
    found = sensitivity(model, (x, np.asarray([0, 1, 2])), shares=[0.5], metric=lambda model, batches: 0.0)
    counts = {unit: sum(row["unit"] == unit for row in found.rows) for unit in ("heads", "ffn", "layers")}
    assert counts == {"heads": 4, "ffn": 4, "layers": 8}
    model, data = zoo.build("albert"), (x, np.asarray([0, 1, 2]))
    small = tfvllm.shrink(model, heads=0.5, ffn=0.5, layers=2, importance="activation", data=data, round_to=1)
    assert small(x).shape == (3, 3) and small.backbone.num_layers == 2
    shares = sparsify(model, 0.5, method="wanda", data=x)
    assert len(shares) == 6 and all(abs(share - 0.5) < 0.05 for share in shares.values())
