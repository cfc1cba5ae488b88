"""Every family: its blocks, its weights, and a copy that computes the same."""

import keras
import numpy as np
import pytest

from tests.models import zoo
from tfvllm.errors import InputError
from tfvllm.families.base import BlockShape, structure_from
from tfvllm.models import EXPERTS, FFN, HEADS, WIDTH, Axis, Experts, adapter_for, families
from tfvllm.pruning import apply_plan
from tfvllm.pruning.structure import full_plan

EVERY = zoo.families(quick=("bert", "gpt2", "llama", "gemma", "bart"))  # T5 takes long to trace


@pytest.mark.parametrize("name", EVERY)
def test_describes_blocks_and_copies(name):
    model = zoo.build(name)
    adapter = adapter_for(model)
    blocks = adapter.blocks(model)
    assert len(blocks) == (6 if name in zoo.SEQ2SEQ else 3)
    for block in blocks:
        assert (block.heads, block.ffn_width, block.hidden_width) == (4, 24, 16)
        assert block.kv_heads == (1 if name == "gemma_mqa" else 2 if name in zoo.GROUPED else 4)
        layers = block.projections
        mixed = isinstance(block.feed_forward, Experts)
        assert mixed == (name in zoo.EXPERTS and (name, block.index) != ("qwen3_moe", 1))
        gate = {"gate"} if not mixed and block.feed_forward.gate is not None else set()
        shared = {"shared_gate", "shared_up", "shared_down", "shared_router"} if name == "qwen_moe" else set()
        cross = {"cross_query", "cross_key", "cross_value", "cross_output"} if block.cross_attention else set()
        inside = {"router"} | shared if mixed else {"up", "down"} | gate
        assert set(layers) == {"query", "key", "value", "output"} | inside | cross
        assert (block.cross_attention is not None) == (name in zoo.SEQ2SEQ and block.kind == "decoder")
    weights = adapter.weights(model)
    assert len({w.name for w in weights}) == len(weights)
    for weight in weights:
        assert len(weight.axes) == len(weight.variable.shape)
        for axis, size in zip(weight.axes, weight.variable.shape):
            if axis is not None and axis.unit == WIDTH:
                assert size == 16
            if axis is not None and axis.unit == FFN:
                assert size == 24 * axis.inner * axis.repeats
            if axis is not None and axis.unit == EXPERTS:
                assert size == 4
            if axis is not None and axis.unit == HEADS:
                assert size == 4 * axis.inner
    found = zoo.inputs(name)
    copy = apply_plan(model, full_plan(model))
    assert type(copy.backbone).__mro__[0 if name != "llama_tied" else 2].__name__ == type(model.backbone).__name__
    np.testing.assert_array_equal(np.asarray(copy(found)), np.asarray(model(found)))


def test_ffn_description_computes_what_the_block_computes():
    block = adapter_for(model := zoo.build("llama")).blocks(model)[0]
    x = np.random.default_rng(0).normal(size=(2, 3, 16)).astype("float32")
    gate, up, down = (np.asarray(block.projections[name].kernel) for name in ("gate", "up", "down"))
    by_hand = (np.asarray(block.feed_forward.activation(x @ gate)) * (x @ up)) @ down
    layer = block.layer
    hidden = np.asarray(layer._feedforward_gate_dense(x))
    expected = layer._feedforward_output_dense(
        np.asarray(layer.activation(hidden)) * layer._feedforward_intermediate_dense(x)
    )
    np.testing.assert_allclose(by_hand, np.asarray(expected), rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_t5_gate_is_the_activated_product():
    block = adapter_for(model := zoo.build("t5")).blocks(model)[0]
    assert block.projections["gate"] is block.layer.input_projector
    assert block.projections["up"] is block.layer.gate_projector


def test_unknown_model_lists_families():
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2)])
    with pytest.raises(InputError, match=r"no adapter for Sequential.*BertBackbone.*LlamaBackbone.*T5Backbone"):
        adapter_for(model)
    encoders = {"transformer_encoder", "electra", "deberta_v3", "albert"}
    decoders = {"transformer_decoder", "llama", "gemma", "bloom", "phi3", "gpt_neo_x", "falcon", "smollm3", "experts"}
    assert set(families()) == encoders | decoders | {"bart", "t5", "t5gemma"}


def test_backbone_inside_a_functional_model_is_found():
    task = zoo.build("bert")
    backbone = task.backbone
    model = keras.Model(backbone.input, keras.layers.Dense(1)(backbone(backbone.input)["pooled_output"]))
    assert adapter_for(model).backbone(model) is backbone


def test_structure_round_trips_through_json():
    shape = BlockShape(2, 1, 8, 24, cross_heads=3, traits={"sliding_window": True})
    assert structure_from({"decoder": [shape.to_dict()]}) == {"decoder": [shape]}
    assert Axis("heads") == Axis("heads", "", 1)
