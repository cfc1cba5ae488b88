"""The decoder of a shrunk model is read like any other: the tokens are those of the shrunk Keras model."""

import numpy as np
import pytest

import tfvllm
from tests.models import zoo
from tfvllm.generation.generator import Generator
from tfvllm.models import adapter_for, read

from .reference import filled_by_forward_passes, keras_generate
from .test_causal import generate

NAMES = ("bloom", "phi3")


def shrunk(name):
    heads = [2, 4] if name in zoo.GROUPED else [3, 2]
    model = tfvllm.shrink(zoo.build(name), layers=[0, 2], heads=heads, ffn=[7, 8], width=8, round_to=2)
    assert [block.heads for block in adapter_for(model).blocks(model)] == heads
    return model


def test_shrunk_bloom_is_read_with_the_slopes_of_the_heads_that_stayed():
    model = shrunk("bloom")
    first, second = (block.attention.alibi for block in read(model).decoder.blocks)
    assert len(first) == 3 and len(second) == 2
    assert set(first) < {2.0**-2, 2.0**-4, 2.0**-6, 2.0**-8} > set(second)
    ids = np.zeros([2, 9], np.int32)
    ids[:, :5] = zoo.inputs("bloom")["token_ids"][:2, :5] + 1
    mask = np.asarray([[1] * 5, [1] * 3 + [0] * 2], np.int32)
    filled = filled_by_forward_passes(model, ids, [5, 3])
    found = generate(Generator(read(model)), ids[:, :5] * mask, mask, 4)[0]
    np.testing.assert_array_equal(found, [filled[0, 5:], filled[1, 3:7]])


@pytest.mark.parametrize("name", zoo.families(quick=(), names=NAMES))
def test_greedy_tokens_are_those_of_the_shrunk_model(name):
    model, found = shrunk(name), zoo.inputs(name)
    ids, mask = found["token_ids"], found["padding_mask"]
    expected = keras_generate(model, ids, mask, 6)
    assert len(np.unique(expected)) > 3
    np.testing.assert_array_equal(generate(Generator(read(model)), ids, mask, 6)[0], expected)
