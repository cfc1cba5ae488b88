"""Fewer tokens: which embedding rows go, and the tokenizer that goes with the rest."""

import itertools
import warnings
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from tfvllm.errors import InputError
from tfvllm.families import VOCABULARY, find_backbone
from tfvllm.models.tokenizer import settle
from tfvllm.pruning.capture import batches
from tfvllm.pruning.structure import Plan, resolve

_TOKEN_INPUTS = ("token_ids", "encoder_token_ids", "decoder_token_ids")


def plan_vocabulary(
    plan: Plan, model: Any, request: Any, scores: np.ndarray | None, data: Any, *, round_to: int = 1
) -> None:
    """Adds kept token ids, and the tokenizer cut to match, to `plan`.

    Args:
        request: a share to remove, a number to keep, "seen" (what `data` uses), or a list of ids or tokens to keep.
            Special tokens and what the tokenizer falls back on (bytes, letters, merge steps) are kept on top.
        scores: worth of each token, for shares and numbers without data.
        data: with data, shares and numbers keep the most frequent tokens.

    Raises:
        InputError: an unknown token, an id outside the vocabulary, data missing, a tokenizer that cannot be cut.
    """
    backbone = find_backbone(model)
    total = int(backbone.token_embedding.input_dim)
    tokenizer = getattr(getattr(model, "preprocessor", None), "tokenizer", None)
    if tokenizer is not None:
        for note in settle(tokenizer, {}).notes:  # cut, it no longer knows the folder it was read from
            warnings.warn(f"shrink: {note}", stacklevel=4)
    forced = _forced(tokenizer, total)
    if isinstance(request, str):
        if request != "seen":
            raise InputError(f"vocabulary={request!r}: expected 'seen', a share, a number or a list of tokens.")
        chosen = set(np.flatnonzero(_frequencies(model, data, total)).tolist())
    elif isinstance(request, Iterable):
        chosen = {_token_id(token, tokenizer, total) for token in request}
        if not chosen:
            raise InputError("vocabulary=[]: expected at least one token to keep.")
    else:
        count = resolve(request, total, "vocabulary", round_to=round_to)
        worth = _frequencies(model, data, total) if data is not None else np.asarray(scores)
        order = np.argsort(-worth, kind="stable")
        chosen = set(list(forced)[:count])
        for token in order:
            if len(chosen) >= count:
                break
            chosen.add(int(token))
    kept = chosen | forced
    if tokenizer is not None:
        tokenizer, kept = cut_tokenizer(tokenizer, kept)
        plan.tokenizer = tokenizer
    plan.keep[VOCABULARY, ""] = np.asarray(sorted(kept), np.int64)


def _frequencies(model: Any, data: Any, total: int) -> np.ndarray:
    counts = np.zeros(total)
    for x, _, _ in batches(model, data):
        for name in _TOKEN_INPUTS:
            if isinstance(x, dict) and name in x:
                ids = np.asarray(x[name]).reshape(-1)
                counts += np.bincount(ids, minlength=total)[:total]
    return counts


def _token_id(token: Any, tokenizer: Any, total: int) -> int:
    if isinstance(token, str):
        if tokenizer is None:
            raise InputError(
                f"vocabulary: token {token!r} needs a tokenizer; this model has no preprocessor. Give ids."
            )
        if token not in tokenizer.get_vocabulary():
            raise InputError(f"vocabulary: {token!r} is not a token of {type(tokenizer).__name__}.")
        return int(tokenizer.token_to_id(token))
    if not 0 <= int(token) < total:
        raise InputError(f"vocabulary: id {token} lies outside 0 to {total - 1}.")
    return int(token)


def _forced(tokenizer: Any, total: int) -> set[int]:
    """Special tokens and the pieces every text can fall back on."""
    if tokenizer is None:
        return {0}  # padding
    ids = {int(i) for i in getattr(tokenizer, "special_token_ids", ()) if i is not None}
    ids |= {int(i) for i in (getattr(tokenizer, name, None) for name in _SPECIAL_IDS) if i is not None}
    return {i for i in ids | _fallback(tokenizer) if 0 <= i < total}


_SPECIAL_IDS = ("pad_token_id", "start_token_id", "end_token_id", "mask_token_id", "cls_token_id", "sep_token_id")


def _fallback(tokenizer: Any) -> set[int]:
    kind = _kind(tokenizer)
    if kind == "word_piece":
        pieces = [chr(c) for c in range(33, 127)]
        vocabulary = {token: i for i, token in enumerate(tokenizer.vocabulary)}
        names = [p for c in pieces for p in (c, f"{tokenizer.suffix_indicator}{c}")] + [tokenizer.oov_token]
        return {vocabulary[name] for name in names if name in vocabulary}
    if kind == "byte_pair":
        return {i for token, i in tokenizer.vocabulary.items() if len(token) == 1}
    return {i for i, (_, text, role) in enumerate(sentence_pieces(_proto(tokenizer))) if role != 1 or len(text) == 1}


def _kind(tokenizer: Any) -> str:
    from keras_hub.tokenizers import BytePairTokenizer, SentencePieceTokenizer, WordPieceTokenizer

    if type(tokenizer).__name__ != "XLMRobertaTokenizer":  # shifts its ids against its pieces
        for cls, kind in (
            (WordPieceTokenizer, "word_piece"),
            (BytePairTokenizer, "byte_pair"),
            (SentencePieceTokenizer, "sentence_piece"),
        ):
            if isinstance(tokenizer, cls):
                return kind
    raise InputError(
        f"vocabulary: {type(tokenizer).__name__} cannot be cut. Expected a WordPiece, byte-pair or SentencePiece "
        "tokenizer; set model.preprocessor = None to cut the embedding alone."
    )


def cut_tokenizer(tokenizer: Any, kept: Iterable[int]) -> tuple[Any, set[int]]:
    """A tokenizer of the same class with the kept tokens only, in their old order, and the ids it really keeps.

    Byte-pair tokenizers also keep the steps by which kept tokens are merged.
    """
    kind = _kind(tokenizer)
    kept = set(kept)
    config = tokenizer.get_config()
    config.pop("config_file", None)
    if kind == "word_piece":
        size = len(tokenizer.vocabulary)
        ids = [i for i in sorted(kept) if i < size]
        config["vocabulary"] = [tokenizer.vocabulary[i] for i in ids]
        cut = type(tokenizer).from_config(config)
        cut.split_on_cjk = tokenizer.split_on_cjk  # keras-nlp leaves it out of the config
        return cut, set(ids)
    if kind == "byte_pair":
        vocabulary = dict(tokenizer.vocabulary)
        merges = [tuple(merge.split(" ")) for merge in tokenizer.merges]
        tokens = {token for token, i in vocabulary.items() if i in kept}
        whole = set(getattr(tokenizer, "special_tokens", ()))  # never made by merging
        tokens |= _merge_steps(tokens - whole, merges) & set(vocabulary)
        ids = sorted(vocabulary[token] for token in tokens)
        new_id = {old: new for new, old in enumerate(ids)}
        config["vocabulary"] = {token: new_id[vocabulary[token]] for token in tokens}
        config["merges"] = [f"{a} {b}" for a, b in merges if a in tokens and b in tokens and a + b in tokens]
        return type(tokenizer).from_config(config), set(ids)
    pieces = list(sentence_pieces(_proto(tokenizer)))
    ids = [i for i in sorted(kept) if i < len(pieces)]
    config["proto"] = _cut_proto(_proto(tokenizer), set(ids))
    return type(tokenizer).from_config(config), set(ids)


def _merge_steps(tokens: set[str], merges: list[tuple[str, str]]) -> set[str]:
    rank = {pair: i for i, pair in enumerate(merges)}
    steps: set[str] = set()
    for token in tokens:
        parts = list(token)
        while len(parts) > 1:
            pairs = [(rank.get(pair, len(rank)), i) for i, pair in enumerate(itertools.pairwise(parts))]
            best, i = min(pairs)
            if best == len(rank):
                break
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
            steps.add(parts[i])
    return steps


def _proto(tokenizer: Any) -> bytes:
    import base64

    proto = tokenizer.proto
    return base64.b64decode(proto) if isinstance(proto, str) else proto


def _fields(message: bytes) -> Iterator[tuple[int, int, int, int, int]]:
    """(field number, wire type, start of the field, start of its value, end) of a protocol buffer message."""
    position = 0
    while position < len(message):
        start = position
        key, position = _varint(message, position)
        wire = key & 7
        if wire == 0:
            _, end = _varint(message, position)
            value = position
        elif wire == 2:
            size, value = _varint(message, position)
            end = value + size
        else:
            value, end = position, position + (8 if wire == 1 else 4)
        yield key >> 3, wire, start, value, end
        position = end


def _varint(message: bytes, position: int) -> tuple[int, int]:
    result = shift = 0
    while True:
        byte = message[position]
        result |= (byte & 127) << shift
        position += 1
        if byte < 128:
            return result, position
        shift += 7


def sentence_pieces(proto: bytes) -> Iterator[tuple[tuple[int, int], str, int]]:
    """((start, end), text, role) of each piece of a SentencePiece ModelProto; role 1 is an ordinary piece."""
    for number, _, start, value, end in _fields(proto):
        if number != 1:  # ModelProto.pieces
            continue
        text, role = "", 1
        for inner, _, _, inner_value, inner_end in _fields(proto[value:end]):
            if inner == 1:
                text = proto[value + inner_value : value + inner_end].decode("utf-8", "replace")
            elif inner == 3:
                role = proto[value + inner_value]
        yield (start, end), text, role


def _cut_proto(proto: bytes, kept: set[int]) -> bytes:
    """The proto without the other pieces, and with TrainerSpec's special ids and size moved along."""
    pieces = list(sentence_pieces(proto))
    new_id = {old: new for new, old in enumerate(sorted(kept))}
    spans = {span[0]: i for i, (span, _, _) in enumerate(pieces)}
    out = bytearray()
    for number, _, start, value, end in _fields(proto):
        if number == 1:
            if spans[start] in kept:
                out += proto[start:end]
        elif number == 2:  # TrainerSpec: vocab_size = 4, unk/bos/eos/pad ids = 40 to 43
            spec = bytearray()
            for inner, wire, s, v, e in _fields(proto[value:end]):
                message = proto[value:end]
                if inner == 4 and wire == 0:
                    spec += _key(inner, 0) + _as_varint(len(kept))
                elif inner in (40, 41, 42, 43) and wire == 0:
                    old = _varint(message, v)[0]
                    spec += _key(inner, 0) + _as_varint(new_id.get(old, old))
                else:
                    spec += message[s:e]
            out += _key(2, 2) + _as_varint(len(spec)) + spec
        else:
            out += proto[start:end]
    return bytes(out)


def _key(number: int, wire: int) -> bytes:
    return _as_varint(number << 3 | wire)


def _as_varint(value: int) -> bytes:
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    out.append(value)
    return bytes(out)
