"""Models that write without being exported: the export's own draws, with the weights of the moment."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import tfvllm
from tests.generation import general_models, small_tokenizers
from tests.generation.models import CAUSAL, SEQ2SEQ, bart, build, families, gemma3, gpt2, mistral, prompts, t5
from tests.generation.reference import (
    beam_search,
    filled_by_forward_passes,
    keras_generate,
    keras_translate,
    log_probs,
)
from tfvllm.errors import InputError
from tfvllm.export.generate import NEUTRAL
from tfvllm.generation.kernels import OneDnn
from tfvllm.generation.network import Network
from tfvllm.rollouts import Answers, Rollouts

LENGTH = 20
TEXTS = ["the quick brown fox", "a dog", "", "quick quick"]


def rows(lengths, length=LENGTH, seed=0, names=("token_ids", "padding_mask")):
    """Prompts with room behind them."""
    ids, mask = prompts(lengths, seed)
    room = [(0, 0), (0, length - ids.shape[1])]
    return dict(zip(names, (np.pad(ids, room), np.pad(mask, room))))


def pairs(lengths, length=12):
    """Sources, and what each row's decoder starts from."""
    source = rows([9, 3, 6, 1][: len(lengths)], 9, 5, ("encoder_token_ids", "encoder_padding_mask"))
    return source | rows(lengths, length, 6, ("decoder_token_ids", "decoder_padding_mask"))


def train(model, seed=2):
    """Other weights, as after a step of an optimizer."""
    random = np.random.default_rng(seed)
    for variable in model.trainable_variables:
        variable.assign_add(random.normal(size=variable.shape) * 0.1)


def test_rows_go_on_to_their_end_token_or_length():
    model = build(gpt2, layers=1)
    x = rows([5, 1, 0, LENGTH, 12])
    write = Rollouts(model)
    free, known = write(x, seed=3)
    given = x["padding_mask"].astype(bool)
    assert free.dtype == np.int32 and known.dtype == bool
    np.testing.assert_array_equal(free[given], x["token_ids"][given])
    np.testing.assert_array_equal(known.sum(1), [LENGTH, LENGTH, 0, LENGTH, LENGTH])
    assert len(np.unique(free)) > 20
    again, other = (write(x, seed)[0] for seed in (3, 4))
    np.testing.assert_array_equal(free, again)
    assert (free != other).any(axis=1).tolist() == [True, True, False, False, True]

    stop = int(free[0, 9])  # the fifth that row 0 writes
    x["token_ids"][4, 11] = stop  # row 4 has come to its end before
    found, known = Rollouts(model, stop_token_ids=[stop], pad_token_id=96)(x, seed=3)
    assert known.sum(1).tolist()[0] == 10 and known.sum(1).tolist()[3:] == [LENGTH, 12]
    np.testing.assert_array_equal(found[0], [*free[0, :10], *[96] * 10])
    ends = np.argmax(free[1, 1:] == stop) + 2 if stop in free[1, 1:] else LENGTH
    np.testing.assert_array_equal(found[1, :ends], free[1, :ends])


@pytest.mark.thorough
def test_draws_are_those_of_an_export(tmp_path):
    model = build(gpt2)
    x = rows([5, 2, 9, 7])
    served = tf.saved_model.load(str(tfvllm.export(model, tmp_path / "1", task="generate", warmup=False)))
    new = served.signatures["generate"](
        token_ids=tf.constant(x["token_ids"]),
        padding_mask=tf.constant(x["padding_mask"]),
        max_new_tokens=tf.constant(LENGTH - 2),
        temperature=tf.constant(0.7),
        top_k=tf.constant(30),
        seed=tf.constant(11),
        **{name: NEUTRAL[name] for name in ("top_p", "repetition_penalty", "no_repeat_ngram")},
    )["token_ids"].numpy()
    found, _ = Rollouts(model, temperature=0.7, top_k=30)(x, seed=11)
    for row, answer, length in zip(found, new, [5, 2, 9, 7]):
        np.testing.assert_array_equal(row[length:], answer[: LENGTH - length])


@pytest.mark.parametrize("make", families(CAUSAL, quick=(gpt2,), thorough=(mistral, gemma3)))
def test_rows_follow_the_weights(make):
    model = build(make, **({"layers": 1} if make is gpt2 else {}))
    x = rows([3, 9, 1, 6])
    write = Rollouts(model)
    before, _ = write(x, seed=5)
    train(model)
    after, _ = write(x, seed=5)
    np.testing.assert_array_equal(after, Rollouts(model)(x, seed=5)[0])
    assert (after != before).any()
    assert write._run.experimental_get_tracing_count() == 1


@pytest.mark.thorough
def test_the_most_probable_tokens_are_keras_own():
    model = build(gpt2)
    x = rows([3, 9, 1, 6])
    write = Rollouts(model, temperature=0.0)
    for seed in (2, 3):
        train(model, seed)
        greedy, _ = write(x, seed)
        mask = x["padding_mask"][:, :9]
        new = keras_generate(model, x["token_ids"][:, :9], mask, LENGTH - 1)
        for row, answer, length in zip(greedy, new, mask.sum(1)):
            np.testing.assert_array_equal(row[length:], answer[: LENGTH - length])


@pytest.mark.parametrize("make", families(SEQ2SEQ, quick=(), thorough=(bart, t5)))
def test_translations_follow_the_weights(make):
    model = build(make)
    x = pairs([2, 2, 2, 2])
    x["decoder_token_ids"][:, :2] = 2, 0
    write = Rollouts(model, temperature=0.0)
    before, _ = write(x, seed=0)
    train(model)
    after, known = write(x, seed=0)
    assert (after != before).any() and known.all() and write._run.experimental_get_tracing_count() == 1
    encoder = x["encoder_token_ids"], x["encoder_padding_mask"]
    np.testing.assert_array_equal(after[:, 2:], keras_translate(model, *encoder, [2, 0], 10))
    drawn, fresh = (Rollouts(model)(x, seed=1)[0] for _ in range(2))
    np.testing.assert_array_equal(drawn, fresh)


@pytest.mark.thorough
def test_decoders_start_from_rows_of_any_length():
    model = build(bart)
    lengths = [1, 5, 2, 8]
    x = pairs(lengths)
    found, _ = Rollouts(model, temperature=0.0)(x, seed=0)

    def decoder(features, training=False):
        return model({**{k: x[k] for k in x if "encoder" in k}, **{f"decoder_{k}": v for k, v in features.items()}})

    np.testing.assert_array_equal(found, filled_by_forward_passes(decoder, x["decoder_token_ids"], lengths))


@pytest.mark.slow
@pytest.mark.parametrize("make", [general_models.gemma4_experts, general_models.rwkv7, general_models.ed_rec])
def test_families_without_a_reader_write_by_their_own_step(make):
    model = general_models.built(make)
    two = make is general_models.ed_rec
    x = pairs([3, 1, 2]) if two else rows([3, 9, 1, 6])
    side = "decoder_" if two else ""
    write = Rollouts(model)
    before, _ = write(x, seed=5)
    train(model)
    after, known = write(x, seed=5)
    given = x[f"{side}padding_mask"].astype(bool)
    np.testing.assert_array_equal(after[given], x[f"{side}token_ids"][given])
    np.testing.assert_array_equal(after, Rollouts(model)(x, seed=5)[0])
    assert (after != before).any() and known.all()
    assert write._run.experimental_get_tracing_count() == 1
    if not two:
        greedy, _ = Rollouts(model, temperature=0.0)(x, seed=0)
        model.generate_function = model.make_generate_function()
        new = general_models.keras_greedy(model, x["token_ids"][:, :9], x["padding_mask"][:, :9])
        for row, answer, length in zip(greedy, new, [3, 9, 1, 6]):
            np.testing.assert_array_equal(row[length : length + len(answer)], answer)


def test_packed_weights_are_not_replaced():
    network = Network(tfvllm.models.read(build(gpt2)))
    network.kernels = OneDnn()
    with pytest.raises(InputError, match="expected 'portable'"):
        network.assign(tfvllm.models.read(build(gpt2)))


def test_rollouts_tell_what_is_wrong():
    with pytest.raises(InputError, match="temperature must be"):
        Rollouts(build(gpt2), temperature=-1.0)
    with pytest.raises(InputError, match="cannot generate with Sequential"):
        Rollouts(keras.Sequential([keras.Input([3])]))
    with pytest.raises(InputError, match="has no preprocessor"):
        Answers(build(gpt2))


# ---------------------------------------------------------------- texts


def with_text(make):
    return build(make, **small_tokenizers.text_options(make.__name__))


@pytest.mark.thorough
@pytest.mark.parametrize("make", [gpt2, bart])
def test_greedy_answers_are_keras_own(make):
    model = with_text(make)
    model.compile(sampler="greedy")
    texts = [text for text in TEXTS if text]
    expected = model.generate(texts, max_length=30)
    assert Answers(model, max_length=30)(texts) == expected and len(set(expected)) == len(texts)


@pytest.mark.slow
def test_beams_are_those_of_an_export(tmp_path):
    model = with_text(bart)
    path = tfvllm.export(model, tmp_path / "1", task="translate", beams=3, length_penalty=0.5, warmup=False)
    served = tf.saved_model.load(str(path)).signatures["serving_default"]
    expected = [text.decode() for text in served(texts=tf.constant(TEXTS))["translations"].numpy()]
    assert Answers(model, beams=3, length_penalty=0.5)(TEXTS) == expected
    with pytest.raises(InputError, match="beams must be"):
        Answers(model, beams=0)


@pytest.mark.slow
def test_beams_of_a_causal_model_are_those_of_a_search_by_hand():
    model = with_text(gpt2)
    texts, stop = ["the quick brown fox", "a dog"], model.preprocessor.tokenizer.end_token_id
    found = Answers(model, beams=4, max_length=24)(texts)
    assert all(answer.startswith(text) for text, answer in zip(texts, found))

    def log_prob(beams):  # of a search by hand, over tokens
        start = [stop, *np.asarray(model.preprocessor.tokenizer(texts[1]))]
        return beam_search(lambda row: log_probs(model, row)[-1], start, beams, (stop,), 0.0, 24 - len(start))

    assert log_prob(4)[1] > log_prob(1)[1]
    assert found[1] == texts[1] + model.preprocessor.tokenizer.detokenize([t for t in log_prob(4)[0] if t != stop])
