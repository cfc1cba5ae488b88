"""Vocabularies learnt from the training texts: word pieces for classifiers, byte pairs for language models."""

import collections
import json
from collections.abc import Iterable, Sequence

import numpy as np
import tensorflow as tf
from keras_hub.src.tokenizers.word_piece_tokenizer import pretokenize  # the very splitting the tokenizer does
from tensorflow_text.tools.wordpiece_vocab import wordpiece_tokenizer_learner_lib as learner

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


def learn_vocabulary(texts: Sequence[str], size: int) -> list[str]:
    """Learns at most `size` tokens: the special ones, single Chinese characters, then word pieces.

    Text is lower-cased, accents are stripped, and every Chinese character is a word of its own, as in BERT's
    uncased tokenizer. Chinese characters (at most three quarters of the vocabulary, those seen at least twice) are
    put in directly: the word piece learner keeps only 1000 different characters and would give each one a useless
    `##` form too.

    Raises:
        ValueError: `size` leaves no room beside the special tokens.
    """
    if size <= len(SPECIAL) + 1:
        raise ValueError(f"expected a vocabulary of more than {len(SPECIAL) + 1} tokens, found {size}")
    counts: collections.Counter[str] = collections.Counter()
    for start in range(0, len(texts), 4096):
        batch = tf.constant(list(texts[start : start + 4096]))
        words = pretokenize(batch, lowercase=True, strip_accents=True).flat_values.numpy()
        for word, count in zip(*np.unique(words, return_counts=True)):
            counts[word.decode("utf-8")] += int(count)
    characters = [word for word, count in counts.most_common() if _is_cjk(word) and count >= 2]
    characters = characters[: (size - len(SPECIAL)) * 3 // 4]
    words = {word: count for word, count in counts.items() if not _is_cjk(word)}
    vocabulary = [*SPECIAL, *characters]
    if words:
        pieces = learner.learn(
            sorted(words.items()),
            vocab_size=size - len(vocabulary),
            reserved_tokens=[],
            include_joiner_token=True,
            max_unique_chars=max(50, (size - len(vocabulary)) // 4),
        )
        vocabulary += [piece for piece in pieces if piece not in set(vocabulary)]
    return vocabulary[:size]


def _is_cjk(word: str) -> bool:
    """One character of the blocks that BERT splits (BasicTokenizer._is_chinese_char)."""
    if len(word) != 1:
        return False
    code = ord(word)
    return (
        0x4E00 <= code <= 0x9FFF
        or 0x3400 <= code <= 0x4DBF
        or 0x20000 <= code <= 0x2CEAF
        or 0xF900 <= code <= 0xFAFF
        or 0x2F800 <= code <= 0x2FA1F
    )


def learn_byte_pairs(texts: Iterable[str], size: int, special: Sequence[str]) -> tuple[dict[str, int], list[str]]:
    """Learns at most `size` tokens of byte-level byte pairs, as GPT-2 and BART read text: vocabulary and merges.

    The special tokens come first, then the 256 bytes: no text is unknown, in whatever language.

    Raises:
        ValueError: `size` leaves no room for merges.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    least = len(special) + 256
    if size <= least:
        raise ValueError(f"expected a vocabulary of more than {least} tokens, found {size}")
    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    learner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        min_frequency=2,
        special_tokens=list(special),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    learner.train_from_iterator(texts, trainer)
    learnt = json.loads(learner.to_str())["model"]
    merges = [" ".join(pair) if isinstance(pair, list) else pair for pair in learnt["merges"]]
    return learnt["vocab"], merges
