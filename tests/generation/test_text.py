"""Tokens in the graph are keras-nlp's own, and come back byte for byte."""

import json

import keras_nlp
import numpy as np
import pytest
import tensorflow as tf

from tfvllm.errors import InputError
from tfvllm.generation.stops import StopStrings
from tfvllm.generation.text import codec_for, valid_utf8

TEXTS = [
    "The quick brown fox jumps over the lazy dog.",
    "",
    " two  spaces ",
    "tab\tnew\n\nline ",
    "it's I'll 12345 _x_ !?",
    "\u4f60\u597d\uff0c\u4e16\u754c\uff01\u8fd9\u662f\u4e00\u4e2a\u5f88\u957f\u7684\u53e5\u5b50",
    "caf\u00e9 na\u00efve \U0001f600 \u3000wide",
    "stop <|endoftext|> here",
]


@pytest.fixture(scope="module")
def byte_pair():
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|endoftext|>"],
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS * 3, trainer)
    model = json.loads(tokenizer.to_str())["model"]
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    return keras_nlp.models.GPT2Tokenizer(vocabulary=model["vocab"], merges=merges)


@pytest.fixture(scope="module")
def sentence_piece(tmp_path_factory):
    import io

    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS * 5),
        model_writer=model,
        vocab_size=330,
        model_type="BPE",
        byte_fallback=True,
        character_coverage=0.98,
        pad_id=3,
        pad_piece="<pad>",
        bos_piece="<s>",
        eos_piece="</s>",
        hard_vocab_limit=False,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    return keras_nlp.models.LlamaTokenizer(proto=model.getvalue())


def encode(codec, texts):
    return codec.encode(tf.constant(texts, tf.string))


@pytest.mark.thorough
def test_byte_pairs(byte_pair):
    codec = codec_for(byte_pair)
    tokens = encode(codec, TEXTS)
    expected = tf.function(lambda x: byte_pair(x))(tf.constant(TEXTS))
    assert tokens.to_list() == expected.to_list()
    found = [text.decode() for text in codec.decode(tokens).numpy()]
    assert found == [text.replace("<|endoftext|>", "") for text in TEXTS]
    assert encode(codec, []).shape[0] == 0


def test_many_special_tokens(byte_pair):
    """keras-nlp's stand-ins for the second and the eleventh begin alike: it takes both for the second."""
    special = [f"<|{name}|>" for name in "abcdefghijklmnopq"] + ["<|a|>b", "<|unknown|>"]
    vocabulary = dict(byte_pair.vocabulary)
    for token in special[:-1]:
        vocabulary[token] = len(vocabulary)
    tokenizer = keras_nlp.tokenizers.BytePairTokenizer(vocabulary, byte_pair.merges, unsplittable_tokens=special)
    codec = codec_for(tokenizer)
    the, dog = encode(codec, ["the", " dog"]).to_list()
    assert the and dog
    texts = [f"the{token} dog{token}" for token in special[:-1]]
    assert encode(codec, texts).to_list() == [
        [*the, vocabulary[token], *dog, vocabulary[token]] for token in special[:-1]
    ]
    assert encode(codec, ["<|a|><|a|>b<|b|>"]).to_list() == [[vocabulary[t] for t in ("<|a|>", "<|a|>b", "<|b|>")]]
    unknown = encode(codec, ["the<|unknown|> dog"])  # in no vocabulary: a word like others
    assert codec.decode(unknown).numpy()[0] == b"the<|unknown|> dog"
    assert [text.decode() for text in codec.decode(encode(codec, [" the<|q|> dog"])).numpy()] == [" the dog"]


def test_texts_with_the_letters_that_keras_nlp_needs_for_itself(byte_pair):
    texts = ["\u0134A fox, \u0134B", "\u096c six", "1\u096c2 \u096c", "\u0134"]
    codec = codec_for(byte_pair)
    assert [text.decode() for text in codec.decode(encode(codec, texts)).numpy()] == texts


def test_byte_pairs_keep_nothing_of_what_they_saw(byte_pair):
    codec = codec_for(byte_pair)
    encode(codec, TEXTS)
    graph = tf.function(codec.encode).get_concrete_function(tf.TensorSpec([None], tf.string)).graph.as_graph_def()
    ops = [node.op for function in graph.library.function for node in function.node_def]
    assert "LookupTableFindV2" in ops
    assert not [op for op in ops if "MutableHashTable" in op or "Insert" in op]


def test_a_vocabulary_without_all_bytes_drops_what_it_lacks():
    vocabulary = {"<|endoftext|>": 0, "a": 4, "\u0120quick": 5, "\u0120fox": 6}
    merges = ["\u0120 q", "u i", "c k", "ui ck", "\u0120q uick", "\u0120 f", "o x", "\u0120f ox"]
    for merge in merges:
        for part in (*merge.split(), merge.replace(" ", "")):
            vocabulary.setdefault(part, len(vocabulary) + 3)
    tokenizer = keras_nlp.models.GPT2Tokenizer(vocabulary=vocabulary, merges=merges)
    codec = codec_for(tokenizer)
    assert encode(codec, ["a quick fox", "a zzz fox", "z"]).to_list() == [[4, 5, 6], [4, vocabulary["\u0120"], 6], []]


def test_sentence_piece(sentence_piece):
    codec = codec_for(sentence_piece)
    tokens = encode(codec, TEXTS)
    assert tokens.to_list() == [list(row) for row in sentence_piece.tokenize(TEXTS)]
    found = [text.decode() for text in codec.decode(tokens).numpy()]
    assert found == TEXTS == list(sentence_piece.detokenize([list(row) for row in tokens.to_list()]))
    beyond = codec.bytes_of(tf.constant([10**6, 0]))
    assert beyond.numpy()[0] == b""  # a model may know more ids than its tokenizer
    joined = codec.joined(tokens).numpy()
    assert [text.decode() for text in joined] == [" " + text if text else "" for text in TEXTS]


def test_bytes():
    codec = codec_for(keras_nlp.tokenizers.ByteTokenizer(lowercase=False))
    tokens = encode(codec, TEXTS)
    assert tokens.to_list() == [list(text.encode()) for text in TEXTS]
    assert [text.decode() for text in codec.decode(tokens).numpy()] == TEXTS


def test_invalid_utf8_becomes_the_replacement_character(byte_pair):
    texts = [b"ok \xff\xfe", b"\xe4\xbd", "\u4f60".encode()]
    assert valid_utf8(tf.constant(texts)).numpy()[2] == "\u4f60".encode()
    codec = codec_for(byte_pair)
    found = codec.decode(encode(codec, texts)).numpy()
    assert [text.decode() for text in found] == ["ok \ufffd\ufffd", "\ufffd", "\u4f60"]


def test_other_tokenizers_are_refused():
    tokenizer = keras_nlp.tokenizers.WordPieceTokenizer(["[UNK]", "a"])
    with pytest.raises(InputError, match="WordPieceTokenizer cannot be exported"):
        codec_for(tokenizer)


PIECES = tf.constant([b"", b"hel", b"lo wo", b"rld", b"\xe4\xbd", b"\xa0", b"a.b", b"\\E", b"!"])


def feed(stops, tokens):
    """At which token each stop is found, or None."""
    searched = StopStrings(lambda tokens: tf.gather(PIECES, tokens), tf.constant(stops, tf.string))
    tail = tf.constant([""])
    for step, token in enumerate(tokens):
        found, tail = searched.found(tail, tf.constant([token]))
        if found.numpy()[0]:
            return step
    return None


@pytest.mark.parametrize(
    ("stops", "tokens", "step"),
    [
        (["lo w"], [1, 2, 3], 1),
        (["hello world"], [1, 2, 3], 2),
        (["never"], [1, 2, 3], None),
        ([], [1, 2, 3], None),
        ([""], [1, 2, 3], None),
        (["", "rld"], [1, 2, 3], 2),
        (["\u4f60"], [1, 4, 5, 3], 2),
        (["axb"], [6], None),
        (["a.b"], [1, 6], 1),
        (["\\E!"], [7, 8], 1),
        (["x\\E", "o"], [1, 2], 1),
        (["lo", "world"], [2, 3], 0),
    ],
)
def test_stop_strings(stops, tokens, step):
    assert feed(stops, tokens) == step


def test_texts_are_cut_before_the_first_stop():
    searched = StopStrings(lambda tokens: tf.gather(PIECES, tokens), tf.constant(["wo", "lo"]))
    found = searched.cut(tf.constant(["hello world", "world", "none", b"\xff lo"])).numpy()
    np.testing.assert_array_equal(found, [b"hel", b"", b"none", b"\xff "])


def test_a_long_text_takes_memory_in_proportion(byte_pair):
    import resource

    codec, text = codec_for(byte_pair), "the dog and the fox <|endoftext|> " + "the quick brown fox. " * 3000
    encode(codec, ["the dog"])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    (tokens,) = encode(codec, [text]).to_list()
    assert len(tokens) > 12_000
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000  # KiB; a copy a word were 800,000
