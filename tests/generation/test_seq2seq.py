"""Sequence to sequence: greedy and beam answers are keras-nlp's own; the length penalty is a plain reference's."""

import numpy as np
import pytest
import tensorflow as tf

import tfvllm
from tests.onednn import by_reference_code, products
from tfvllm.generation.translator import Translator
from tfvllm.models import read

from .models import SEQ2SEQ, bart, build, families, prompts, t5, t5gemma, t5gemma2
from .reference import beam_sampler, beam_search, keras_translate, seq2seq_log_probs

START = {"bart": (2, 0)}


def run(translator, ids, mask, count, beams=1, penalty=0.0):
    @tf.function(autograph=False)
    def call(ids, mask, count):
        source = translator.read_source_ids(ids, mask)
        if beams > 1:
            result, scores = translator.beam(*source, count, beams, penalty)
            return result.token_ids, result.lengths, scores
        result = translator.generate(*source, count)
        return result.token_ids, result.lengths, tf.zeros([0])

    spec = tf.TensorSpec([None, None], tf.int32)
    concrete = call.get_concrete_function(spec, spec, tf.TensorSpec([], tf.int32))
    return [x.numpy() for x in concrete(tf.constant(ids), tf.constant(mask), tf.constant(count))]


@pytest.mark.parametrize("make", families(SEQ2SEQ, quick=(bart,), thorough=(t5, t5gemma, t5gemma2)))
def test_greedy_and_beam_are_keras_own(make):
    model = build(make)
    start = START.get(make.__name__, (0,))
    ids, mask = prompts([3, 9, 1, 5, 7], low=3)
    translator = Translator(read(model), max_length=40, start_ids=start)
    greedy = keras_translate(model, ids, mask, start, 14)
    assert len(np.unique(greedy)) > 3
    np.testing.assert_array_equal(run(translator, ids, mask, 14)[0], greedy)
    beam = keras_translate(model, ids, mask, start, 14, beam_sampler(3))
    np.testing.assert_array_equal(run(translator, ids, mask, 14, beams=3)[0], beam)


def test_one_softmax_over_the_answer_and_the_source():
    model = build(t5gemma2)
    ids, mask = prompts([3, 9], low=3)
    targets, known = prompts([7, 5], seed=1, low=3)
    lengths = tf.constant(known.sum(1), tf.int32)
    translator = Translator(read(model), max_length=40, start_ids=(0,))
    found = translator.score(tf.constant(ids), tf.constant(mask > 0), tf.constant(targets), lengths)["log_probs"]
    inputs = {"encoder_token_ids": ids, "encoder_padding_mask": mask}
    logits = model({**inputs, "decoder_token_ids": targets, "decoder_padding_mask": known})
    expected = tf.gather(tf.nn.log_softmax(logits)[:, :-1], targets[:, 1:], batch_dims=2).numpy() * known[:, 1:]
    assert np.ptp(expected) > 1
    np.testing.assert_allclose(found[:, 1:], expected, atol=1e-4)


@pytest.mark.thorough
def test_a_shrunk_t5gemma_with_blocks_of_different_sizes():
    model = tfvllm.shrink(build(t5gemma), heads=[2, 4, 4, 2], ffn=[*range(16, 20)], round_to=1)
    ids, mask = prompts([3, 9, 1], low=3)
    expected = keras_translate(model, ids, mask, (0,), 8)
    assert len(np.unique(expected)) > 3
    found = run(Translator(read(model), max_length=40, start_ids=(0,)), ids, mask, 8)[0]
    np.testing.assert_array_equal(found, expected)


@pytest.mark.thorough
@pytest.mark.parametrize("make", families((bart, t5), quick=(bart,)))
@pytest.mark.parametrize(
    "penalty", [pytest.param(0.0, marks=pytest.mark.slow), 1.0, pytest.param(2.0, marks=pytest.mark.slow)]
)
def test_beams_that_end_against_a_plain_reference(make, penalty):
    model = build(make)
    start = START.get(make.__name__, (0,))
    ids, mask = prompts([4, 6], low=3)
    free = keras_translate(model, ids, mask, start, 8)
    stop = tuple(int(token) for token in {free[0, 2], free[1, 4], *range(40, 60)})
    translator = Translator(read(model), max_length=40, start_ids=start, stop_ids=stop)
    found, lengths, scores = run(translator, ids, mask, 8, beams=3, penalty=penalty)
    for row, length in enumerate(mask.sum(1)):
        source = ids[row, :length]
        tokens, score = beam_search(lambda t, s=source: seq2seq_log_probs(model, s, t), start, 3, stop, penalty, 8)
        assert tuple(found[row, : lengths[row]]) == tokens
        np.testing.assert_allclose(scores[row], score, atol=1e-4)


@pytest.mark.thorough
def test_empty_sources_and_limits():
    model = build(bart)
    translator = Translator(read(model), max_length=6, start_ids=(2, 0), max_source_length=5)
    ids, mask = prompts([0, 9], low=3)
    found, lengths, _ = run(translator, ids, mask, 10)
    np.testing.assert_array_equal(lengths, [4, 4])  # six tokens, two of them to start from
    expected = keras_translate(model, ids[1:, :5], mask[1:, :5], (2, 0), 4)
    np.testing.assert_array_equal(found[1:, :4], expected)
    beam = run(translator, ids, mask, 10, beams=2)
    np.testing.assert_array_equal(beam[1], [4, 4])
    nothing = np.zeros([0, 3], np.int32)
    assert run(translator, nothing, nothing, 3)[0].shape == (0, 3)
    assert run(translator, nothing, nothing, 3, beams=2)[0].shape == (0, 3)
    assert run(translator, ids, mask, 0, beams=2)[0].shape == (2, 0)


_PROGRAM = """
import numpy as np, tensorflow as tf
from tests.generation.models import bart, build
from tfvllm.models import read
from tfvllm.generation.translator import Translator

translator = Translator(read(build(bart)), max_length=20, start_ids=(2, 0))

@tf.function(input_signature=[tf.TensorSpec([None, None], tf.int32)] * 2, autograph=False)
def translate(ids, mask):
    return translator.generate(*translator.read_source_ids(ids, mask), 4).token_ids

print(translate(np.full([3, 6], 5, np.int32), np.ones([3, 6], np.int32)).shape)
"""


@pytest.mark.slow
def test_onednn_has_a_kernel_for_every_product():
    """What TensorFlow makes of scale, product and causal mask must not end in oneDNN's reference code."""
    assert not by_reference_code(products(_PROGRAM))
