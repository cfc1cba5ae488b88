"""Fewer tokens with the tokenizer to match: the same text gives the same answers."""

import keras
import keras_nlp
import numpy as np
import pytest
import tensorflow as tf

import tfvllm
from tfvllm.errors import InputError
from tfvllm.models import VOCABULARY
from tfvllm.pruning import plan_shrink
from tfvllm.pruning.vocabulary import cut_tokenizer, sentence_pieces

M = keras_nlp.models
WORDS = [
    "good",
    "bad",
    "film",
    "movie",
    "plot",
    "the",
    "a",
    "##s",
    "##ly",
    "very",
    "好",
    "坏",
    "电",
    "影",
    "unused",
    "rare",
]
LETTERS = [p for c in "abdefgilmoptuvy.,!?" for p in (c, f"##{c}")]

PIECES = list(dict.fromkeys([*WORDS, *LETTERS]))


def bert():
    tokenizer = M.BertTokenizer(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *PIECES], lowercase=True)
    preprocessor = M.BertTextClassifierPreprocessor(tokenizer, sequence_length=12)
    backbone = M.BertBackbone(tokenizer.vocabulary_size(), 2, 2, 8, 12, max_sequence_length=12)
    model = M.BertTextClassifier(backbone, 2, preprocessor=preprocessor)
    for weight in model.weights:
        if "seed" not in weight.path:
            weight.assign(np.random.default_rng(1).normal(0.1, 0.3, weight.shape))
    return model


def answers(model, texts):
    """Logits of raw texts, without the tracing of `predict`."""
    return np.asarray(model(model.preprocessor(tf.constant(texts))))


TEXTS = ["the film, very good!", "a bad movie plots badly", "好电影", ""]


@pytest.mark.parametrize("more", [{}, {"heads": 0.5, "width": 0.5, "round_to": 2}])
def test_wordpiece_classifier_answers_the_same(tmp_path, more):
    model = bert()
    small = tfvllm.shrink(model, vocabulary="seen", data=np.asarray(TEXTS), **more)
    vocabulary = small.preprocessor.tokenizer.get_vocabulary()
    assert "unused" not in vocabulary and "rare" not in vocabulary and "坏" not in vocabulary
    assert {"[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "好", "good", "##ly"} <= set(vocabulary)
    assert len(vocabulary) == small.backbone.vocabulary_size == small.backbone.token_embedding.input_dim
    texts = np.asarray(TEXTS)
    if not more:
        np.testing.assert_allclose(answers(small, texts), answers(model, texts), rtol=1e-5, atol=1e-6)
    assert small.preprocessor.sequence_length == 12 and small.preprocessor.tokenizer.lowercase
    small.save(tmp_path / "small.keras")
    loaded = keras.models.load_model(tmp_path / "small.keras")
    np.testing.assert_array_equal(answers(loaded, texts), answers(small, texts))
    assert model.preprocessor.tokenizer.vocabulary_size() == 5 + len(PIECES)


def test_counts_lists_and_errors():
    model = bert()
    total = model.backbone.vocabulary_size
    plan = plan_shrink(model, vocabulary=total - 6)
    assert len(plan.keep[VOCABULARY, ""]) == total - 6
    data = np.asarray(["rare unused"] * 3)
    frequent = plan_shrink(model, vocabulary=0.1, data=data)
    assert frequent.tokenizer.token_to_id("rare") is not None and "rare" in frequent.tokenizer.get_vocabulary()
    named = plan_shrink(model, vocabulary=["good", "rare"])
    assert {"good", "rare", "[CLS]"} <= set(named.tokenizer.get_vocabulary())
    assert "film" not in named.tokenizer.get_vocabulary()
    with pytest.raises(InputError, match="'nonsense' is not a token"):
        plan_shrink(model, vocabulary=["nonsense"])
    with pytest.raises(InputError, match="expected 'seen'"):
        plan_shrink(model, vocabulary="all")


def byte_pair():
    from keras_hub.src.tokenizers.byte_pair_tokenizer import bytes_to_unicode

    letters = bytes_to_unicode()[1]
    merges = ["t h", "th e", "Ġ the", "c a", "ca t", "Ġ cat", "d o", "do g", "Ġ dog", "a t"]
    vocabulary = {"<|endoftext|>": 0}
    for token in [*letters, *(m.replace(" ", "") for m in merges)]:
        vocabulary.setdefault(token, len(vocabulary))
    return M.GPT2Tokenizer(vocabulary=vocabulary, merges=merges)


def test_byte_pair_keeps_bytes_and_merge_steps():
    tokenizer = byte_pair()
    text = "the cat the cat, 猫!"
    ids = {int(i) for i in tokenizer(text)}
    cut, kept = cut_tokenizer(tokenizer, ids | {0} | {i for t, i in tokenizer.vocabulary.items() if len(t) == 1})
    assert "Ġdog" not in cut.vocabulary and "do" not in cut.vocabulary
    assert {"Ġcat", "ca", "cat", "th", "the"} <= set(cut.vocabulary)  # the steps to what stays
    tokens = [tokenizer.id_to_token(int(i)) for i in tokenizer(text)]
    assert [cut.id_to_token(int(i)) for i in cut(text)] == tokens
    assert keras.ops.convert_to_numpy(cut(text)).max() < len(kept) == cut.vocabulary_size()
    detokenized = cut.detokenize(cut("a dog 狗"))
    assert (detokenized.numpy().decode() if hasattr(detokenized, "numpy") else str(detokenized)) == "a dog 狗"


def sentence_proto():
    """A small unigram ModelProto, written by hand."""
    import struct

    from tfvllm.pruning.vocabulary import _as_varint, _key

    def piece(text, score, role):
        body = _key(1, 2) + _as_varint(len(text.encode())) + text.encode()
        body += _key(2, 5) + struct.pack("<f", score) + _key(3, 0) + _as_varint(role)
        return _key(1, 2) + _as_varint(len(body)) + body

    pieces = [
        ("<pad>", 0.0, 3),
        ("</s>", 0.0, 3),
        ("<unk>", 0.0, 2),
        ("▁the", -1.0, 1),
        ("▁cat", -2.0, 1),
        ("▁dog", -2.0, 1),
        ("▁", -4.0, 1),
        *((c, -6.0, 1) for c in "acdeghnot猫"),
    ]
    spec = _key(3, 0) + _as_varint(1) + _key(4, 0) + _as_varint(len(pieces))
    for field, token in ((40, 2), (41, 1), (42, 1), (43, 0)):
        spec += _key(field, 0) + _as_varint(token)
    proto = b"".join(piece(*p) for p in pieces)
    return proto + _key(2, 2) + _as_varint(len(spec)) + spec


def test_sentencepiece_keeps_letters_and_moves_special_ids():
    tokenizer = M.T5Tokenizer(proto=sentence_proto())
    texts = ["the cat", "the hat 猫", ""]
    ids = {int(i) for text in texts for i in np.asarray(tokenizer(text)).reshape(-1)}
    letters = {i for i, (_, text, role) in enumerate(sentence_pieces(sentence_proto())) if role != 1 or len(text) == 1}
    cut, kept = cut_tokenizer(tokenizer, ids | letters)
    assert len(kept) == tokenizer.vocabulary_size() - 1 == cut.vocabulary_size()
    assert "▁dog" not in cut.get_vocabulary()
    for text in texts:
        pieces = [tokenizer.id_to_token(int(i)) for i in np.asarray(tokenizer(text)).reshape(-1)]
        assert [cut.id_to_token(int(i)) for i in np.asarray(cut(text)).reshape(-1)] == pieces
    assert (cut.pad_token_id, cut.end_token_id) == (tokenizer.pad_token_id, tokenizer.end_token_id)
    assert len(np.asarray(cut("dog")).reshape(-1)) > 1  # falls back on letters


def test_causal_lm_with_byte_pairs(tmp_path):
    tokenizer = byte_pair()
    preprocessor = M.GPT2CausalLMPreprocessor(tokenizer, sequence_length=10)
    backbone = M.GPT2Backbone(tokenizer.vocabulary_size(), 2, 2, 8, 12, max_sequence_length=16)
    model = M.GPT2CausalLM(backbone, preprocessor=preprocessor)
    small = tfvllm.shrink(model, vocabulary="seen", data=np.asarray(["the cat", "a hat"]))
    assert small.backbone.vocabulary_size == small.preprocessor.tokenizer.vocabulary_size() < backbone.vocabulary_size
    old, new = (m.preprocessor.tokenizer for m in (model, small))
    ids_old, ids_new = old("the cat"), new("the cat")
    x_old = {"token_ids": np.asarray(ids_old)[None], "padding_mask": np.ones((1, len(ids_old)), "int32")}
    x_new = {"token_ids": np.asarray(ids_new)[None], "padding_mask": np.ones((1, len(ids_new)), "int32")}
    kept = [old.token_to_id(new.id_to_token(i)) for i in range(new.vocabulary_size())]
    np.testing.assert_allclose(np.asarray(small(x_new)), np.asarray(model(x_old))[..., kept], rtol=1e-5, atol=1e-6)
