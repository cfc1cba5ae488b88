"""Text to tokens and back inside the graph, with TensorFlow and TensorFlow Text ops only.

keras-nlp's own byte-pair tokenizer keeps every word it has seen in a mutable table: in a server that table would grow
with every request. `BytePair` here computes the same tokens and keeps nothing.
"""

from __future__ import annotations

import re

import numpy as np
import tensorflow as tf
import tensorflow_text as tf_text

from tfvllm.errors import InputError
from tfvllm.generation import ragged
from tfvllm.generation.shared import SharedFunctions

# What a table of special tokens says of a word that is none, and of one that the vocabulary has not.
_WORD, _NO_TOKEN = -1, -2


class GraphTokenizer(tf.Module):
    """A tokenizer in the graph.

    pieces: string[vocabulary], the bytes each token adds to a text; special tokens add none.
    """

    def __init__(self, name: str):
        super().__init__(name=name)
        self._shared = SharedFunctions()

    def encode(self, texts: tf.Tensor) -> tf.RaggedTensor:
        """string[batch] -> int32[batch, (tokens)], nothing added at either end.

        Out of line: traced, stored and prepared once, however many signatures read text.
        """
        return self._shared(self._encode, texts, inline=False)

    def _encode(self, texts: tf.Tensor) -> tf.RaggedTensor:
        raise NotImplementedError

    def decode(self, tokens: tf.Tensor | tf.RaggedTensor) -> tf.Tensor:
        """int32[batch, (tokens)], or int32[batch, width] -> string[batch], special tokens and ids below 0 left out."""
        return self.joined(tokens)

    def joined(self, tokens: tf.Tensor | tf.RaggedTensor) -> tf.Tensor:
        """The bytes of each row's tokens one after the other; as `decode`, for what goes behind a text."""
        return tf.strings.reduce_join(self._pieces_of(_as_padded(tokens)), axis=-1)

    def bytes_of(self, tokens: tf.Tensor) -> tf.Tensor:
        """The bytes of each token, of the same shape; ids beyond the vocabulary add none."""
        pieces = self.pieces
        return tf.gather(pieces, tf.minimum(tokens, tf.size(pieces) - 1))

    def _pieces_of(self, ids: tf.Tensor) -> tf.Tensor:
        return tf.where(ids < 0, "", self.bytes_of(tf.maximum(ids, 0)))

    def _hold(self, pieces: list[bytes]) -> None:
        # A variable, so that the vocabulary is stored once however many signatures use it.
        self._pieces = tf.Variable(np.array([*pieces, b""], object), trainable=False, dtype=tf.string, name="pieces")

    @property
    def pieces(self) -> tf.Tensor:
        return self._pieces.read_value()


def codec_for(tokenizer) -> GraphTokenizer:
    """The codec of a keras-nlp tokenizer.

    Raises:
        InputError: this kind of tokenizer cannot be put into the graph.
    """
    import keras_hub

    kinds = keras_hub.tokenizers
    if isinstance(tokenizer, kinds.SentencePieceTokenizer):
        return SentencePiece(tokenizer)
    codec = byte_pair_codec(tokenizer)
    if codec is not None:
        return codec
    if type(tokenizer).__name__ == "MistralTekkenTokenizer":
        raise InputError(
            "MistralTekkenTokenizer has no TensorFlow form; expected a SentencePiece or GPT-2 style tokenizer"
        )
    if isinstance(tokenizer, kinds.ByteTokenizer):
        return Bytes(tokenizer)
    raise InputError(
        f"{type(tokenizer).__name__} cannot be exported with `generate`; expected a BytePairTokenizer, a "
        "SentencePieceTokenizer or a ByteTokenizer. Or export the model on ids: set its preprocessor to None."
    )


def byte_pair_codec(tokenizer) -> BytePair | None:
    """The codec of a keras-nlp byte-pair tokenizer; None for tokenizers of another kind."""
    import keras_hub

    pairs = isinstance(tokenizer, keras_hub.tokenizers.BytePairTokenizer)
    return BytePair(tokenizer) if pairs and type(tokenizer).__name__ != "MistralTekkenTokenizer" else None


def special_ids(tokenizer) -> set[int]:
    """Ids that stand for no text: start, end, padding and the like."""
    ids = set(getattr(tokenizer, "special_token_ids", None) or [])
    for name in ("start_token_id", "end_token_id", "end_token2_id", "pad_token_id"):
        value = getattr(tokenizer, name, None)
        if value is not None and (name != "pad_token_id" or value in ids):
            ids.add(int(value))
    return ids


def valid_utf8(texts: tf.Tensor) -> tf.Tensor:
    """Replaces what is no UTF-8 by U+FFFD; leaves all else byte for byte."""
    return tf.strings.unicode_transcode(texts, "UTF-8", "UTF-8", errors="replace")


class BytePair(GraphTokenizer):
    """Byte-level byte-pair encoding (Sennrich et al. 2016; GPT-2's bytes), the same tokens as keras-nlp's tokenizer.

    Works on whole numbers: each distinct word is a row of symbols, and each round merges in every row the leftmost pair
    of lowest rank. Bytes the vocabulary does not hold give no token.
    """

    def __init__(self, tokenizer):
        super().__init__(name="byte_pair")
        from keras_hub.src.tokenizers.byte_pair_tokenizer import bytes_to_unicode

        self._prefix_space = bool(tokenizer.add_prefix_space)
        self._unsplittable = list(tokenizer.unsplittable_tokens or [])
        vocabulary = dict(tokenizer.vocabulary)
        byte_list, characters = bytes_to_unicode()
        to_byte = dict(zip(characters, byte_list))

        symbols: dict[str, int] = {}

        def symbol(text: str) -> int:
            return symbols.setdefault(text, len(symbols))

        first = [0] * 256
        for byte, character in zip(byte_list, characters):
            first[byte[0]] = symbol(character)
        pairs: dict[tuple[int, int], tuple[int, int]] = {}
        for rank, merge in enumerate(tokenizer.merges):
            parts = merge.split(" ")
            if len(parts) == 2 and not merge.lstrip().startswith("#version:"):
                key = symbol(parts[0]), symbol(parts[1])
                pairs.setdefault(key, (rank, symbol(parts[0] + parts[1])))
        self._stride = len(symbols)
        self._no_rank = len(tokenizer.merges) + 1
        keys = [left * self._stride + right for left, right in pairs] or [-1]
        ranks = [rank for rank, _ in pairs.values()] or [self._no_rank]
        merged = [result for _, result in pairs.values()] or [0]
        self._ranks = _table(np.array(keys, np.int64), np.array(ranks, np.int64), self._no_rank)
        self._merged = _table(np.array(keys, np.int64), np.array(merged, np.int64), 0)
        self._first = tf.constant(first, tf.int64)
        self._token_ids = tf.Variable([vocabulary.get(text, -1) for text in symbols], trainable=False, name="token_ids")
        special = {token: vocabulary.get(token, _NO_TOKEN) for token in self._unsplittable}
        ids = np.array(list(special.values()), np.int64)
        self._special = _table(np.array(list(special), object), ids, _WORD) if special else None
        silent = special_ids(tokenizer) | set(special.values()) - {_NO_TOKEN}
        pieces = [b""] * (max(vocabulary.values()) + 1)
        for text, index in vocabulary.items():
            if index not in silent:
                pieces[index] = b"".join(to_byte.get(character, b"") for character in text)
        self._hold(pieces)

    def _encode(self, texts):
        texts = valid_utf8(texts)
        if self._prefix_space:
            texts = tf.strings.join([" ", texts])
        words = self._split(texts)
        distinct, which = tf.unique(words.flat_values)
        encoded = tf.cond(tf.size(distinct) > 0, lambda: self._words(distinct), lambda: tf.zeros([0, 1], tf.int32))
        # Rows of tokens, -1 where there is none; put each word's back in its place.
        table = tf.gather(encoded, which)
        kept = ragged.of_padded(table, table >= 0)
        return ragged.rows(kept.flat_values, tf.gather(kept.row_splits, words.row_splits))

    def _split(self, texts: tf.Tensor) -> tf.RaggedTensor:
        """string[n] -> its words and special tokens, string[n, (words)], as keras-nlp cuts text in a TensorFlow graph.

        keras-nlp puts "ĴA", "ĴB", .. in the place of special tokens until all else is cut: from the eleventh on
        ("ĴBA") the second is read within it, and texts that have these letters are changed. Here a piece is known to
        be a special token by its place.
        """
        texts = _with_borders(texts)
        if self._special is None:
            return _without_borders(_cut(texts))
        # RE2 takes the first that matches: of two that begin alike, the longer one.
        either = "|".join(re.escape(token) for token in sorted(self._unsplittable, key=len, reverse=True))
        pieces = ragged.split(texts, either)
        special = self._special.lookup(pieces.flat_values) != _WORD
        words = _cut(tf.where(special, "-", pieces.flat_values))  # one word in the place of each special token
        found = tf.where(special)
        places = tf.gather(words.row_splits, found)
        flat = tf.tensor_scatter_nd_update(words.flat_values, places, tf.gather_nd(pieces.flat_values, found))
        return _without_borders(ragged.rows(flat, tf.gather(words.row_splits, pieces.row_splits)))

    def _words(self, words: tf.Tensor) -> tf.Tensor:
        """string[n] -> int32[n, longest], -1 beyond a word's tokens."""
        raw = tf.io.decode_raw(words, tf.uint8, fixed_length=tf.reduce_max(tf.strings.length(words)))
        lengths = tf.strings.length(words)
        width = tf.shape(raw)[1]
        symbols = tf.where(tf.sequence_mask(lengths, width), tf.gather(self._first, tf.cast(raw, tf.int32)), -1)
        places = tf.range(width)

        def ranks_of(symbols):
            left, right = symbols[:, :-1], symbols[:, 1:]
            keys = tf.where((left >= 0) & (right >= 0), left * self._stride + right, -1)
            return keys, tf.where(keys >= 0, self._ranks.lookup(keys), self._no_rank)

        def merge(symbols, keys, ranks):
            best = tf.reduce_min(ranks, axis=1)
            at = tf.argmin(ranks, axis=1, output_type=tf.int32)
            key = tf.gather(keys, at, batch_dims=1)
            changes = best < self._no_rank
            moved = tf.pad(symbols[:, 1:], [[0, 0], [0, 1]], constant_values=-1)
            column = at[:, tf.newaxis]
            result = tf.where(places < column, symbols, moved)
            result = tf.where(places == column, self._merged.lookup(key)[:, tf.newaxis], result)
            symbols = tf.where(changes[:, tf.newaxis], result, symbols)
            return symbols, *ranks_of(symbols)

        symbols, _, _ = tf.while_loop(
            lambda symbols, keys, ranks: tf.reduce_any(ranks < self._no_rank),
            merge,
            [symbols, *ranks_of(symbols)],
            shape_invariants=[tf.TensorShape([None, None])] * 3,
        )
        ids = tf.where(symbols >= 0, tf.gather(self._token_ids, tf.maximum(symbols, 0)), -1)
        ids = tf.cast(ids, tf.int32)
        if self._special is not None:
            special = tf.cast(self._special.lookup(words), tf.int32)
            only = tf.concat([special[:, tf.newaxis], tf.fill([tf.shape(ids)[0], width - 1], -1)], axis=1)
            ids = tf.where(special[:, tf.newaxis] >= 0, only, ids)
        return ids


# How keras-nlp's `split_strings_for_bpe` does without looking ahead: a border before a space that begins a word, so
# that the spaces before it are words of their own. Its border is U+096C, a digit of texts; ours is none of a text.
_BORDER = "\U0010ffff"


def _with_borders(texts: tf.Tensor) -> tf.Tensor:
    from keras_hub.src.tokenizers.byte_pair_tokenizer import SPECIAL_WHITESPACES

    texts = tf.strings.regex_replace(texts, rf"( )([^\s{SPECIAL_WHITESPACES}])", rf"{_BORDER}\1\2")
    return tf.strings.regex_replace(texts, rf"(\s{SPECIAL_WHITESPACES})$", rf"\1{_BORDER}")


def _cut(texts: tf.Tensor) -> tf.RaggedTensor:
    """string[n] -> string[n, (words)], borders among them."""
    from keras_hub.src.tokenizers import byte_pair_tokenizer as keras_hub_pairs

    first, second = (
        pattern.replace("६", _BORDER) for pattern in (keras_hub_pairs.SPLIT_PATTERN_1, keras_hub_pairs.SPLIT_PATTERN_2)
    )
    pieces = ragged.split(texts, first)
    words = ragged.split(pieces.flat_values, second)
    return ragged.rows(words.flat_values, tf.gather(words.row_splits, pieces.row_splits))


def _without_borders(words: tf.RaggedTensor) -> tf.RaggedTensor:
    return ragged.those(words, words.flat_values != _BORDER)


class SentencePiece(GraphTokenizer):
    """A SentencePiece model. Text comes back as SentencePiece itself writes it."""

    def __init__(self, tokenizer):
        super().__init__(name="sentence_piece")
        self._model = tf_text.SentencepieceTokenizer(model=tokenizer.proto, out_type=tf.int32)
        self._silent = sorted(special_ids(tokenizer))
        vocabulary = tokenizer.get_vocabulary()
        unknown = tokenizer._unk_token_id
        control = tokenizer._sentence_piece_spm.IsControl  # pieces such as <pad>, which SentencePiece writes as nothing
        self._hold(
            [
                b"" if i in self._silent or control(i) else _piece(piece, i == unknown)
                for i, piece in enumerate(vocabulary)
            ]
        )
        self._unknown = unknown
        # Most models put a space before every text; it is taken off again. Those that leave out repeated spaces take
        # off all that a text begins with.
        probe = "".join(tokenizer._sentence_piece_spm.EncodeAsPieces("a  b"))
        self._prefixes, self._collapses = probe.startswith("\u2581"), "\u2581\u2581" not in probe

    def _encode(self, texts):
        return self._model.tokenize(valid_utf8(texts))

    def decode(self, tokens):
        # One column more, so that there is a first piece after the spaces of any row.
        ids = tf.pad(_as_padded(tokens), [[0, 0], [0, 1]], constant_values=-1)
        pieces = self._pieces_of(ids)
        texts = tf.strings.reduce_join(pieces, axis=-1)
        if not (self._prefixes or self._collapses):
            return texts
        leading = tf.math.cumprod(tf.cast((pieces == b"") | (pieces == b" "), tf.int32), axis=1)
        spaces = tf.reduce_sum(leading * tf.cast(pieces == b" ", tf.int32), axis=1)
        at = tf.minimum(tf.reduce_sum(leading, axis=1), tf.shape(ids)[1] - 1)
        first, piece = tf.gather(ids, at, batch_dims=1), tf.gather(pieces, at, batch_dims=1)
        # What stands for an unknown token begins with a space of its own.
        joined = tf.cast((first != self._unknown) & (tf.strings.substr(piece, 0, 1) == b" "), tf.int32)
        off = spaces + joined if self._collapses else tf.minimum(spaces + joined, 1)
        return tf.strings.substr(texts, off, tf.strings.length(texts))


class Bytes(GraphTokenizer):
    """One token for each byte (keras-nlp's ByteTokenizer)."""

    def __init__(self, tokenizer):
        super().__init__(name="bytes")
        self._lowercase = bool(getattr(tokenizer, "lowercase", False))
        self._normalization = getattr(tokenizer, "normalization_form", None)
        self._hold([bytes([value]) for value in range(256)])

    def _encode(self, texts):
        if self._lowercase:
            texts = tf_text.case_fold_utf8(texts)
        if self._normalization:
            texts = tf_text.normalize_utf8(texts, self._normalization)
        split = tf.strings.bytes_split(texts)
        values = tf.io.decode_raw(split.flat_values, tf.uint8, fixed_length=1)
        return split.with_flat_values(tf.cast(tf.reshape(values, [-1]), tf.int32))


def _as_padded(tokens: tf.Tensor | tf.RaggedTensor) -> tf.Tensor:
    return ragged.padded(tokens, -1)[0] if isinstance(tokens, tf.RaggedTensor) else tokens


def _piece(piece: str, unknown: bool) -> bytes:
    if unknown:
        return " \u2047 ".encode()  # what SentencePiece writes for an unknown token
    if len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
        return bytes([int(piece[3:5], 16)])  # byte fallback
    return piece.replace("\u2581", " ").encode()


def _table(keys: np.ndarray, values: np.ndarray, default: int) -> tf.lookup.StaticHashTable:
    keys = tf.constant(keys, tf.string) if keys.dtype == object else tf.constant(keys)
    return tf.lookup.StaticHashTable(tf.lookup.KeyValueTensorInitializer(keys, tf.constant(values)), default)
