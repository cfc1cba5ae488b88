"""Token by token: the pieces of text models joined are their completions, whatever lies across tokens."""

import codecs

import keras_nlp
import numpy as np
import pytest
import tensorflow as tf

from tfvllm.export.generate import end_token_ids
from tfvllm.generation.generator import Generator
from tfvllm.generation.text import codec_for
from tfvllm.models import read

from .small_tokenizers import tokenizer_of

M = keras_nlp.models
LENGTH = 48
thorough = pytest.mark.thorough


def scripted(tokenizer, prompt: str, answer: str) -> tuple[Generator, list[int]]:
    """(a model that answers to one prompt with one text and its end token, the tokens of that answer).

    Its blocks add nothing; each position carries, ten times over, the embedding of the token that comes next.
    """
    codec = codec_for(tokenizer)
    start = [] if tokenizer.start_token_id is None else [tokenizer.start_token_id]
    ends = end_token_ids(tokenizer)
    whole = [int(token) for token in codec.encode(tf.constant([prompt + answer]))[0]]
    before = [int(token) for token in codec.encode(tf.constant([prompt]))[0]]
    assert whole[: len(before)] == before
    backbone = M.GPT2Backbone(tokenizer.vocabulary_size(), 1, 2, 128, 16, max_sequence_length=LENGTH)
    model = M.GPT2CausalLM(backbone, preprocessor=None)
    random = np.random.default_rng(0)
    for variable in backbone.transformer_layers[0].weights:
        variable.assign(np.zeros(variable.shape))
    embeddings = random.normal(size=(tokenizer.vocabulary_size(), 128))
    positions = np.zeros([LENGTH, 128])
    script = [*start, *whole, ends[0]]
    for place, token in enumerate(script[1:]):
        positions[place] = 10.0 * embeddings[token]
    backbone.token_embedding.embeddings.assign(embeddings)
    backbone.get_layer("position_embedding").position_embeddings.assign(positions)
    generator = Generator(
        read(model), codec=codec, max_length=LENGTH, start_ids=tuple(start), stop_ids=tuple(ends), pad_id=0
    )
    return generator, [*whole[len(before) :], ends[0]]


def streamed(generator, prompts, count):
    """The states of prefill and of every step after it, as a caller of the two signatures has them."""
    state = generator.prefill(*generator.read_texts(tf.constant(prompts)), tf.constant(count))
    yield state
    taken = generator.cache_specs()
    for _ in range(count - 1):
        caches = {name: state[name] for name in taken}
        state = generator.decode(state["token_ids"], state["positions"], caches)
        yield state


@pytest.mark.parametrize("family", ["gpt2", *(pytest.param(n, marks=thorough) for n in ("llama", "bloom", "gemma"))])
def test_characters_across_tokens(family):
    tokenizer = tokenizer_of(family)
    answer = " quick \U0001f600 na\u00efve \u4e16\u754c"  # neither a token nor learnt: bytes
    generator, tokens = scripted(tokenizer, "a fox", answer)
    decoder, text, pieces, found = codecs.getincrementaldecoder("utf-8")("strict"), "", [], []
    for state in streamed(generator, ["a fox"], len(tokens)):
        found.append(int(state["token_ids"][0]))
        pieces.append(state["piece_bytes"][0].numpy())
        text += decoder.decode(pieces[-1])
    text += decoder.decode(b"", final=True)
    assert found == tokens
    assert text == answer
    assert sum(piece.decode(errors="ignore").encode() != piece for piece in pieces) >= 8  # parts of characters
    whole = generator.generate_texts(tf.constant(["a fox"]), tf.constant(30))
    assert whole["completions"][0].numpy().decode() == text
    assert whole["texts"][0].numpy().decode() == "a fox" + text
    assert whole["finish_reasons"][0].numpy() == b"stop"


@pytest.mark.thorough
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_half_a_character_at_the_limit(family):
    tokenizer = tokenizer_of(family)
    generator, tokens = scripted(tokenizer, "a fox", " \U0001f600")
    pieces = [state["piece_bytes"][0].numpy() for state in streamed(generator, ["a fox"], len(tokens) - 3)]
    whole = generator.generate_texts(tf.constant(["a fox"]), tf.constant(len(tokens) - 3))
    assert b"".join(pieces) == b" \xf0\x9f"
    assert whole["completions"][0].numpy().decode() == " \ufffd"
    assert whole["texts"][0].numpy().decode() == "a fox \ufffd"
    assert whole["finish_reasons"][0].numpy() == b"length"


def test_spaces_of_sentence_piece():
    tokenizer = tokenizer_of("llama")
    generator, tokens = scripted(tokenizer, "the quick", " fox jumps")
    whole = generator.generate_texts(tf.constant(["the quick"]), tf.constant(30))
    assert whole["completions"][0].numpy() == b" fox jumps"  # what goes behind the prompt
    assert whole["texts"][0].numpy() == b"the quick fox jumps"
    ids = [token for token in tokens if token != tokenizer.end_token_id]
    assert tokenizer.detokenize(ids) == "fox jumps"  # as keras-nlp's strip_prompt=True has it
    generator, _ = scripted(tokenizer, "", "a lazy dog")
    whole = generator.generate_texts(tf.constant([""]), tf.constant(30))
    assert whole["completions"][0].numpy() == b" a lazy dog"
    assert whole["texts"][0].numpy() == b"a lazy dog"


@pytest.mark.parametrize("family", [pytest.param("gpt2", marks=thorough), "llama"])
@pytest.mark.parametrize(
    ("stop", "kept"), [("k br", " quic"), ("\u4f60", " quick brown "), ("n \u4f60\u597d", " quick brow"), ("", None)]
)
def test_stop_strings_across_tokens(family, stop, kept):
    answer = " quick brown \u4f60\u597d caf\u00e9"
    generator, tokens = scripted(tokenizer_of(family), "a fox", answer)
    whole = generator.generate_texts(tf.constant(["a fox"]), tf.constant(40), stops=tf.constant([stop, "never"]))
    assert whole["completions"][0].numpy().decode() == (answer if kept is None else kept)
    assert whole["texts"][0].numpy().decode() == "a fox" + (answer if kept is None else kept)
    assert (whole["lengths"][0] < len(tokens)) == (kept is not None)
