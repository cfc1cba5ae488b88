"""Greedy tokens of every causal family are keras-nlp's own."""

import functools

import numpy as np
import pytest
import tensorflow as tf

from tfvllm.errors import InputError
from tfvllm.generation import layers, loop
from tfvllm.generation.generator import Generator
from tfvllm.graph.probes import check_runs
from tfvllm.models import read

from .models import (
    CAUSAL,
    VOCABULARY,
    bloom,
    build,
    families,
    gemma2,
    gemma3,
    gpt2,
    gpt_neo_x,
    gpt_oss,
    llama,
    mistral,
    prompts,
)
from .reference import keras_generate, log_probs


def generate(generator, ids, mask, count, **options):
    run = traced(generator, loop.GROWTH, loop.BUCKET, **options)
    return [None if x is None else x.numpy() for x in run(tf.constant(ids), tf.constant(mask), tf.constant(count))]


@functools.lru_cache(maxsize=2)
def traced(generator, *_, **options):
    @tf.function(autograph=False)
    def run(ids, mask, count):
        result = generator.generate(*generator.read_ids(ids, mask), count, **options)
        return result.token_ids, result.lengths, result.reasons, result.log_probs

    ids_spec = tf.TensorSpec([None, None], tf.int32)
    return run.get_concrete_function(ids_spec, ids_spec, tf.TensorSpec([], tf.int32))


def caches_of(state):
    return {name: value for name, value in state.items() if name.startswith(("key_", "value_"))}


@pytest.mark.parametrize("make", families(CAUSAL, quick=(gpt2,), thorough=(mistral, gemma3)))
def test_greedy_tokens_are_keras_own(make):
    model = build(make)
    ids, mask = prompts([3, 9, 1, 17, 6])
    expected = keras_generate(model, ids, mask, 12)
    found, lengths, _, _ = generate(Generator(read(model)), ids, mask, 12)
    assert len(np.unique(expected)) > 3  # a test that any constant would pass is none
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(lengths, [12] * 5)


@pytest.mark.parametrize(
    "make", families((gpt2, bloom, mistral, gemma2, gemma3, gpt_oss), quick=(gpt2,), thorough=(gemma2,))
)
def test_prompts_long_enough_for_attention_by_parts(make, monkeypatch):
    monkeypatch.setattr(layers, "LONG", 4)
    model = build(make)
    ids, mask = prompts([3, 33, 17, 1])
    expected = keras_generate(model, ids, mask, 6)
    assert len(np.unique(expected)) > 3
    generator = Generator(read(model))
    np.testing.assert_array_equal(generate(generator, ids, mask, 6)[0], expected)
    one, all_of_it = prompts([5])
    found, _, _, _ = generate(generator, one, all_of_it, 6)
    np.testing.assert_array_equal(found, keras_generate(model, one, all_of_it, 6))


@pytest.mark.slow
@pytest.mark.parametrize("percentage", [0.0, 0.5, 1.0])
def test_rotary_positions_of_a_part_of_a_head(percentage):
    model = build(gpt_neo_x, rotary_percentage=percentage)
    ids, mask = prompts([3, 9, 1, 6])
    expected = keras_generate(model, ids, mask, 6)
    np.testing.assert_array_equal(generate(Generator(read(model)), ids, mask, 6)[0], expected)


def test_an_odd_part_of_a_head_is_refused():
    with pytest.raises(InputError, match="rotates 3 of the 16 channels of a head"):
        read(build(gpt_neo_x, rotary_percentage=0.2))


@pytest.fixture(scope="module")
def small():
    model = build(gpt2)
    return model, Generator(read(model))


@pytest.mark.parametrize(
    "batch", [pytest.param(1, marks=pytest.mark.thorough), pytest.param(3, marks=pytest.mark.slow), 8]
)
def test_any_batch_size_and_side_of_padding(small, batch):
    model, generator = small
    ids, mask = prompts([5, 2, 16, 1, 9, 9, 3, 12][:batch], seed=batch)
    expected = keras_generate(model, ids, mask, 20)
    np.testing.assert_array_equal(generate(generator, ids, mask, 20)[0], expected)
    shift = ids.shape[1] - mask.sum(1)
    left_ids, left_mask = (np.stack([np.roll(row, s) for row, s in zip(x, shift)]) for x in (ids, mask))
    np.testing.assert_array_equal(generate(generator, left_ids, left_mask, 20)[0], expected)


def test_caches_grow_past_their_first_size(small, monkeypatch):
    model, generator = small
    monkeypatch.setattr(loop, "GROWTH", 4)
    monkeypatch.setattr(loop, "BUCKET", 2)
    ids, mask = prompts([3, 8, 1])
    np.testing.assert_array_equal(generate(generator, ids, mask, 25)[0], keras_generate(model, ids, mask, 25))


def test_rows_that_stop_leave_and_the_others_go_on_as_before(small):
    model, _ = small
    ids, mask = prompts([5, 2, 16, 1, 9, 9, 3, 12], seed=5)
    free = keras_generate(model, ids, mask, 20)
    stop = tuple(int(t) for t in (free[0, 2], free[3, 7], free[5, 11]))  # rows stop at different steps
    stopping = Generator(read(model), stop_ids=stop, pad_id=96)
    found, lengths, reasons, _ = generate(stopping, ids, mask, 20)
    for row in range(8):
        hits = np.flatnonzero(np.isin(free[row], stop))
        length = hits[0] + 1 if len(hits) else 20
        assert lengths[row] == length
        assert loop.FINISH_REASONS[reasons[row]] == ("stop" if len(hits) else "length")
        np.testing.assert_array_equal(found[row, :length], free[row, :length])
        assert (found[row, length:] == 96).all()
    assert len(set(lengths)) > 2


def test_log_probabilities_are_the_models(small):
    model, generator = small
    ids, mask = prompts([4, 7])
    found, _, _, scores = generate(generator, ids, mask, 6, log_probs=True)
    for row, length in enumerate(mask.sum(1)):
        whole = [*ids[row, :length], *found[row]]
        table = log_probs(model, whole)
        expected = [table[length - 1 + i, token] for i, token in enumerate(found[row])]
        np.testing.assert_allclose(scores[row], expected, atol=1e-4)


@pytest.mark.thorough
def test_length_limits(small):
    model, _ = small
    ids, mask = prompts([20, 3])
    generator = Generator(read(model), max_length=22)
    found, lengths, reasons, _ = generate(generator, ids, mask, 10)
    expected = keras_generate(model, ids, mask, 10)
    np.testing.assert_array_equal(lengths, [2, 10])
    np.testing.assert_array_equal(found[0], [*expected[0, :2], *[0] * 8])
    np.testing.assert_array_equal(found[1], expected[1])
    assert [loop.FINISH_REASONS[r] for r in reasons] == ["length", "length"]


@pytest.mark.thorough
def test_a_prompt_too_long_keeps_its_last_tokens(small):
    model, _ = small
    ids, mask = prompts([30, 4])
    found, lengths, _, _ = generate(Generator(read(model), max_length=12), ids, mask, 5)
    last = keras_generate(model, ids[:1, 19:30], np.ones([1, 11], np.int32), 1)
    assert found[0, 0] == last[0, 0]
    np.testing.assert_array_equal(lengths, [1, 5])


@pytest.mark.parametrize("count", [0, -3, 1])
def test_few_or_no_new_tokens(small, count):
    _, generator = small
    ids, mask = prompts([4, 7])
    found, lengths, _, _ = generate(generator, ids, mask, count)
    assert found.shape == (2, max(count, 0))
    np.testing.assert_array_equal(lengths, [max(count, 0)] * 2)


def test_empty_rows_and_empty_batches(small):
    model, generator = small
    ids, mask = prompts([4, 0, 6])
    found, lengths, reasons, _ = generate(generator, ids, mask, 5)
    np.testing.assert_array_equal(lengths, [5, 0, 5])
    assert [loop.FINISH_REASONS[r] for r in reasons] == ["length", "empty", "length"]
    np.testing.assert_array_equal(found[[0, 2]], keras_generate(model, ids[[0, 2]], mask[[0, 2]], 5))
    nothing = np.zeros([0, 4], np.int32)
    assert generate(generator, nothing, nothing, 5)[0].shape == (0, 5)
    no_columns = np.zeros([2, 0], np.int32)
    np.testing.assert_array_equal(generate(generator, no_columns, no_columns, 3)[1], [0, 0])


@pytest.mark.thorough
@pytest.mark.parametrize("make", families((gpt2, llama, mistral), quick=(gpt2,)))
@pytest.mark.parametrize("options", [{"target": "onednn"}, {"dtype": "bfloat16", "target": "onednn"}])
def test_fused_kernels_give_the_same_scores(make, options):
    check_runs("onednn", options.get("dtype", "float32"))
    model = build(make)
    ids, mask = prompts([9, 4])
    tolerance = 0.35 if "dtype" in options else 2e-4
    scores = [
        tf.function(lambda g=g: g.score(tf.constant(ids), tf.constant(mask.sum(1), tf.int32)), autograph=False)()
        for g in (Generator(read(model)), Generator(read(model), **options))
    ]
    np.testing.assert_allclose(scores[1]["log_probs"], scores[0]["log_probs"], atol=tolerance)
    for row, length in enumerate(mask.sum(1)):
        table = log_probs(model, ids[row, :length])
        expected = [0.0] + [table[i, ids[row, i + 1]] for i in range(length - 1)]
        np.testing.assert_allclose(scores[0]["log_probs"][row, :length], expected, atol=1e-4)
        np.testing.assert_allclose(scores[0]["perplexity"][row], np.exp(-np.mean(expected[1:])), rtol=1e-3)


@pytest.mark.thorough
@pytest.mark.parametrize(("precision", "alternative", "usual"), [("bfloat16", 1, 2), ("float32", 9, 7)])
def test_products_of_some_numbers_of_rows_by_other_kernels(precision, alternative, usual):
    check_runs("onednn", precision)
    model = build(gpt2)
    fused = Generator(read(model), dtype=precision, target="onednn")
    ids, mask = prompts([7])

    def step(generator, ids, lengths):
        state = generator.prefill(ids, lengths, tf.constant(4))
        return generator.decode(state["token_ids"], state["positions"], caches_of(state))["logits"]

    spec = [tf.TensorSpec([None, None], tf.int32), tf.TensorSpec([None], tf.int32)]
    traced = tf.function(lambda *x: step(fused, *x), autograph=False).get_concrete_function(*spec)
    expected = step(Generator(read(model)), tf.constant(ids), tf.constant(mask.sum(1), tf.int32))
    assert np.std(expected) > 0.5
    for rows in (alternative, usual, alternative):
        found = traced(tf.constant(np.repeat(ids, rows, 0)), tf.repeat(tf.constant(mask.sum(1), tf.int32), rows))
        tolerance = 1e-4 if precision == "float32" else 0.1
        np.testing.assert_allclose(found, np.repeat(expected, rows, 0), atol=tolerance)
    nodes = [node for function in traced.graph.as_graph_def().library.function for node in function.node_def]
    packed = [node.attr["is_filter_const"].b for node in nodes if node.op == "_MklNativeFusedMatMul"]
    # 3 blocks of 4 products and the head of a step, and the head of the prompt's last positions.
    assert packed.count(precision == "float32") == 3 * 4 + 1 + 1
    # The prompt's positions, and a step's, for both kinds of rows; after a ResourceGather of the tied head every step
    # would copy it whole.
    assert sum(node.op == "ResourceGather" for node in nodes) == 3


@pytest.mark.thorough
@pytest.mark.parametrize("make", [gpt2, pytest.param(llama, marks=pytest.mark.slow)])
def test_loops_of_one_row_and_of_several_in_bfloat16(make):
    check_runs("onednn", "bfloat16")
    model = build(make)
    generator = Generator(read(model), dtype="bfloat16", target="onednn")
    graph = tf.function(lambda ids, mask: generator.generate(*generator.read_ids(ids, mask), 40).token_ids)
    traced = graph.get_concrete_function(*[tf.TensorSpec([None, None], tf.int32)] * 2)
    for rows in (1, 2):
        ids, mask = prompts([7] * rows)
        for row, found in enumerate(traced(tf.constant(ids), tf.constant(mask)).numpy()):
            assert len(np.unique(found)) > 3
            table = log_probs(model, [*ids[row], *found])[6:-1]
            chosen = np.take_along_axis(table, found[:, np.newaxis], axis=1)[:, 0]
            assert np.all(table.max(-1) - chosen < 0.1)  # what float32 finds as likely as its own choice
    nodes = [node for function in traced.graph.as_graph_def().library.function for node in function.node_def]
    alone = [
        node for node in nodes if node.op == "BatchMatMulV3" and node.attr["Ta"].type == tf.float32.as_datatype_enum
    ]
    blocks = len(model.backbone.transformer_layers)
    assert len(alone) == (2 * blocks if make is gpt2 else 0)  # a single row's caches are float32, but for grouped heads


def test_streaming_from_the_callers_caches_gives_the_same_tokens(small):
    model, generator = small
    ids, mask = prompts([3, 9, 5])
    expected = keras_generate(model, ids, mask, 10)
    state = generator.prefill(*generator.read_ids(tf.constant(ids), tf.constant(mask)), tf.constant(10))
    held = sum(value.numpy().nbytes for name, value in state.items() if name.startswith(("key_", "value_")))
    capacity = state["key_0"].shape[2]
    assert capacity == 16 + 10  # the longest prompt's bucket and what was asked for
    assert held == 3 * capacity * generator.network.cache_bytes_per_token
    tokens = [state["token_ids"].numpy()]
    for _ in range(9):
        caches = caches_of(state)
        before = caches["key_1"].numpy().copy()
        state = generator.decode(state["token_ids"], state["positions"], caches)
        np.testing.assert_array_equal(caches["key_1"].numpy(), before)  # the caller's caches stay as they were
        tokens.append(state["token_ids"].numpy())
    np.testing.assert_array_equal(np.stack(tokens, axis=1), expected)
    with pytest.raises(tf.errors.InvalidArgumentError, match="beyond the cache"):
        generator.decode(state["token_ids"], tf.constant([999, 0, 0]), caches)


@pytest.mark.thorough
@pytest.mark.parametrize("make", families((gpt2, llama), quick=(llama,)))
def test_shrunk_models_with_blocks_of_different_sizes(make):
    from tfvllm.pruning import shrink

    depth = len(build(make).backbone.transformer_layers)
    model = shrink(build(make), heads=[2, *[4] * (depth - 1)], ffn=[48, *[32] * (depth - 1)])
    ids, mask = prompts([3, 9, 6])
    expected = keras_generate(model, ids, mask, 12)
    assert len(np.unique(expected)) > 3
    np.testing.assert_array_equal(generate(Generator(read(model)), ids, mask, 12)[0], expected)


def test_unknown_families_and_targets_are_refused():
    class Strange:
        backbone = object()

    with pytest.raises(InputError, match="cannot generate with object; expected one of GPT2Backbone"):
        read(Strange())
    with pytest.raises(InputError, match="target: expected one of portable, onednn, found 'cuda'"):
        Generator(read(build(gpt2)), target="cuda")


def test_memory_is_one_copy_of_the_weights():
    model = build(gpt2)
    spec = read(model)
    held = sum(int(np.prod(variable.shape)) for variable in Generator(spec).network.variables)
    assert held == spec.parameters() == model.count_params()
    low = Generator(spec, dtype="bfloat16", target="onednn").network.variables
    assert len(low) == 3 * 4 + 4  # the kernels, the tied head, the positions, all biases, all norms
    norms = (2 * 3 + 1) * 2 * 32  # scale and offset of each stay float32
    assert sum(variable.dtype.size * int(np.prod(variable.shape)) for variable in low) == 2 * (held + norms)
    assert spec.cache_bytes_per_token(4) == 3 * 2 * 32 * 4
    assert spec.vocabulary_size == VOCABULARY
