"""What SentencePiece takes off the front of a text, and what it leaves: as keras-nlp's own detokenizer."""

import io

import keras_nlp
import numpy as np
import pytest
import tensorflow as tf

from tfvllm.generation.text import codec_for

TEXTS = ["two dogs run over the hill", "a man and a woman sit there", "the hill is over there", "nobody runs"] * 5


def t5_tokenizer(prefix=True, collapse=True, fallback=False):
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS),
        model_writer=model,
        vocab_size=320 if fallback else 60,
        model_type="BPE",
        byte_fallback=fallback,
        add_dummy_prefix=prefix,
        remove_extra_whitespaces=collapse,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        pad_piece="<pad>",
        eos_piece="</s>",
        unk_piece="<unk>",
        hard_vocab_limit=False,
        minloglevel=2,
    )
    return keras_nlp.models.T5Tokenizer(proto=model.getvalue())


def texts_of(tokenizer, rows):
    decoded = codec_for(tokenizer).decode(tf.ragged.constant(rows, tf.int32, ragged_rank=1))
    return [text.decode(errors="replace") for text in decoded.numpy()]


def test_a_leading_unknown_token_keeps_its_space():
    tokenizer = t5_tokenizer()
    rows = [list(tokenizer.tokenize(text)) for text in ("Ω two dogs", "two Ω", "run", "")]
    rows += [[2, *rows[2]], [2, 2], [0, 2]]
    found = texts_of(tokenizer, rows)
    assert found == list(tokenizer.detokenize(rows))
    assert found == [" ⁇  two dogs", "two  ⁇ ", "run", "", " ⁇  run", " ⁇  ⁇ ", " ⁇ "]


@pytest.mark.parametrize("fallback", [False, True])
@pytest.mark.parametrize("collapse", [False, True])
@pytest.mark.parametrize("prefix", [False, True])
def test_any_tokens_become_the_text_that_sentencepiece_gives(prefix, collapse, fallback):
    tokenizer = t5_tokenizer(prefix, collapse, fallback)
    random = np.random.default_rng(3)
    space = tokenizer.token_to_id("▁")
    usual = [i for i in range(tokenizer.vocabulary_size()) if not tokenizer.id_to_token(i).startswith("<0x")]
    rows = [random.choice(usual, length).tolist() for length in (1, 2, 5, 9) for _ in range(20)]
    rows += (
        [[space, space, *row] for row in rows[::8]] + [[1, 0, space, 2, *row] for row in rows[::8]] + [[], [space], [2]]
    )
    assert texts_of(tokenizer, rows) == list(tokenizer.detokenize(rows))
