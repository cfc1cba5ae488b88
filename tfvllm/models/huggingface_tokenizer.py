"""keras-nlp's tokenizers as the files that Hugging Face's libraries read."""

import json
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, normalizers, pre_tokenizers, processors

from tfvllm.errors import InputError

# How byte-pair tokenizers cut text into words: GPT-2's way, that of a model type, or of what llama.cpp names so.
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
    r"\s+(?!\S)|\s+"
)
_QWEN = _LLAMA3.replace("{1,3}", "")
_WORDS = {"llama": _LLAMA3, "llama-bpe": _LLAMA3, "qwen2": _QWEN, "qwen3": _QWEN}
_DIGITS_APART = {"smollm"}  # then as GPT-2
_CLASSES = {
    "bert": "BertTokenizer",
    "distilbert": "DistilBertTokenizer",
    "roberta": "RobertaTokenizer",
    "gpt2": "GPT2Tokenizer",
    "qwen2": "Qwen2Tokenizer",
    "qwen3": "Qwen2Tokenizer",
}
_ANY_CLASS = "PreTrainedTokenizerFast"  # does as tokenizer.json says; others take parts of it only
_NORMAL, _CONTROL, _USER_DEFINED, _BPE = 1, 3, 4, 2  # kinds of SentencePiece's pieces, and one of its models


def write_tokenizer(preprocessor: Any, model_type: str, folder: Path) -> None:
    """Writes the tokenizer of a keras-nlp preprocessor: `tokenizer.json` with its settings, and the vocabulary's files.

    Raises:
        InputError: SentencePiece's unigram model, which is none of the families written.
    """
    tokenizer = preprocessor.tokenizer
    if hasattr(tokenizer, "merges"):
        made = _byte_pairs(tokenizer, model_type, folder)
    elif hasattr(tokenizer, "proto"):
        made = _sentence_pieces(tokenizer, folder)
    else:
        made = _word_pieces(tokenizer, folder)
    special = _special_tokens(tokenizer, model_type)
    config: dict[str, Any] = {"tokenizer_class": _CLASSES.get(model_type, _ANY_CLASS)}
    if not _reads_both_ways(model_type):
        starts = bool(getattr(preprocessor, "add_start_token", False)) and "bos_token" in special
        if starts:
            start = special["bos_token"]
            made.post_processor = processors.TemplateProcessing(
                single=f"{start}:0 $A:0",
                pair=f"{start}:0 $A:0 {start}:1 $B:1",
                special_tokens=[(start, tokenizer.start_token_id)],
            )
        config |= {"add_bos_token": starts, "add_eos_token": False}
        config["model_input_names"] = ["input_ids", "attention_mask"]
    else:
        config["model_max_length"] = int(preprocessor.sequence_length)
    if hasattr(tokenizer, "lowercase"):
        config["do_lower_case"] = tokenizer.lowercase
        config["strip_accents"] = tokenizer.strip_accents
        config["tokenize_chinese_chars"] = tokenizer.split_on_cjk
    if (template := getattr(tokenizer, "chat_template", None)) is not None:
        config["chat_template"] = template
    made.save(str(folder / "tokenizer.json"))
    # A class adds the tokens of its own that it is not told, beyond the end of the vocabulary.
    unsaid = dict.fromkeys({"unk_token", "mask_token"} - set(special)) if model_type != "qwen2" else {}
    config |= {**unsaid, **special, "clean_up_tokenization_spaces": False}
    write_json(folder / "tokenizer_config.json", config)
    write_json(folder / "special_tokens_map.json", special)


def write_json(file: Path, content: Any) -> None:
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def special_ids(tokenizer: Any) -> dict[str, Any]:
    """`bos_token_id`, `eos_token_id` (a list where several end a text) and `pad_token_id`; None for what is missing."""
    ends = [getattr(tokenizer, name, None) for name in ("end_token_id", "end_token2_id")]
    ends = [int(index) for index in ends if index is not None]
    start = getattr(tokenizer, "start_token_id", None)
    pad = tokenizer.pad_token_id if getattr(tokenizer, "pad_token", None) is not None else None
    return {
        "bos_token_id": None if start is None else int(start),
        "eos_token_id": ends[0] if len(ends) == 1 else ends or None,
        "pad_token_id": None if pad is None else int(pad),
    }


def _reads_both_ways(model_type: str) -> bool:
    return model_type in ("bert", "distilbert", "roberta")


def _special_tokens(tokenizer: Any, model_type: str) -> dict[str, str]:
    """The special tokens by transformers' names; only those that the vocabulary has."""
    found = {
        "bos_token": getattr(tokenizer, "start_token", None),
        "eos_token": getattr(tokenizer, "end_token", None),
        "pad_token": getattr(tokenizer, "pad_token", None),
        "mask_token": getattr(tokenizer, "mask_token", None),
    }
    if hasattr(tokenizer, "proto"):
        found["unk_token"] = tokenizer.id_to_token(tokenizer._unk_token_id)
    elif not hasattr(tokenizer, "merges"):
        found["unk_token"] = tokenizer.oov_token
        found |= {"cls_token": found.pop("bos_token"), "sep_token": found.pop("eos_token")}
    elif model_type == "roberta":
        found |= {"cls_token": found["bos_token"], "sep_token": found["eos_token"]}
        found["unk_token"] = "<unk>" if "<unk>" in tokenizer.vocabulary else None
    return {name: token for name, token in found.items() if token is not None}


def _added(tokens: Any, special: bool = True) -> list[tokenizers.AddedToken]:
    return [tokenizers.AddedToken(token, special=special, normalized=False) for token in tokens]


def _word_pieces(tokenizer: Any, folder: Path) -> tokenizers.Tokenizer:
    words = list(tokenizer.get_vocabulary())
    (folder / "vocab.txt").write_text("".join(f"{word}\n" for word in words), encoding="utf-8")
    options = {"unk_token": tokenizer.oov_token, "wordpieces_prefix": tokenizer.suffix_indicator}
    made = tokenizers.BertWordPieceTokenizer(
        {word: index for index, word in enumerate(words)},
        sep_token=tokenizer.sep_token,
        cls_token=tokenizer.cls_token,
        pad_token=tokenizer.pad_token,
        mask_token=tokenizer.mask_token,
        lowercase=tokenizer.lowercase,
        strip_accents=tokenizer.strip_accents,
        handle_chinese_chars=tokenizer.split_on_cjk,
        **options,
    )
    cls, sep = tokenizer.cls_token, tokenizer.sep_token
    whole: tokenizers.Tokenizer = made._tokenizer
    whole.post_processor = processors.TemplateProcessing(
        single=f"{cls}:0 $A:0 {sep}:0",
        pair=f"{cls}:0 $A:0 {sep}:0 $B:1 {sep}:1",
        special_tokens=[(cls, tokenizer.cls_token_id), (sep, tokenizer.sep_token_id)],
    )
    return whole


def _byte_pairs(tokenizer: Any, model_type: str, folder: Path) -> tokenizers.Tokenizer:
    vocabulary = {str(token): int(index) for token, index in tokenizer.vocabulary.items()}
    merges = [merge for merge in tokenizer.merges if "#version:" not in merge.lstrip()]
    write_json(folder / "vocab.json", vocabulary)
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n", encoding="utf-8")
    pairs = [tuple(merge.split(" ")) for merge in merges]
    made = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=pairs))
    cut = getattr(tokenizer, "cuts_words_as", None) or model_type
    level = pre_tokenizers.ByteLevel(add_prefix_space=tokenizer.add_prefix_space, use_regex=cut not in _WORDS)
    first: Any = []
    if cut in _WORDS:
        first = [pre_tokenizers.Split(tokenizers.Regex(_WORDS[cut]), behavior="isolated")]
    elif cut in _DIGITS_APART:
        first = [pre_tokenizers.Digits(individual_digits=True)]
    made.pre_tokenizer = pre_tokenizers.Sequence([*first, level]) if first else level
    if model_type.startswith("qwen"):
        made.normalizer = normalizers.NFC()
    made.decoder = decoders.ByteLevel()
    special = dict.fromkeys([*tokenizer.special_tokens, *(tokenizer.unsplittable_tokens or [])])
    made.add_special_tokens(_added(sorted(special, key=vocabulary.__getitem__)))
    if model_type == "roberta":
        end, start = (
            (getattr(tokenizer, name), getattr(tokenizer, f"{name}_id")) for name in ("end_token", "start_token")
        )
        made.post_processor = processors.RobertaProcessing(end, start, add_prefix_space=tokenizer.add_prefix_space)
    return made


def _sentence_pieces(tokenizer: Any, folder: Path) -> tokenizers.Tokenizer:
    import sentencepiece.sentencepiece_model_pb2

    protos: Any = sentencepiece.sentencepiece_model_pb2
    proto = protos.ModelProto.FromString(tokenizer.proto)
    if proto.trainer_spec.model_type != _BPE:
        raise InputError(
            f"save_huggingface: expected byte pairs in the SentencePiece model of {type(tokenizer).__name__}, found "
            "another kind. Save the backbone alone (model.backbone), and the tokenizer by hand."
        )
    (folder / "tokenizer.model").write_bytes(tokenizer.proto)
    made = tokenizers.Tokenizer(
        tokenizers.models.BPE(
            vocab={piece.piece: index for index, piece in enumerate(proto.pieces)},
            merges=_merges(proto),
            unk_token=tokenizer.id_to_token(tokenizer._unk_token_id),
            fuse_unk=True,
            byte_fallback=proto.trainer_spec.byte_fallback,
        )
    )
    spec = proto.normalizer_spec
    steps: list[Any] = []
    if spec.precompiled_charsmap:
        steps.append(normalizers.Precompiled(spec.precompiled_charsmap))
    if spec.remove_extra_whitespaces:
        steps += [normalizers.Replace(tokenizers.Regex(" {2,}"), " "), normalizers.Strip()]
    if spec.add_dummy_prefix:
        steps.append(normalizers.Prepend("▁"))
    made.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
    ends: list[Any] = [decoders.Strip(" ", 1, 0)] if spec.add_dummy_prefix else []
    made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *ends])
    for kind, special in ((_CONTROL, True), (_USER_DEFINED, False)):
        tokens = _added((piece.piece for piece in proto.pieces if piece.type == kind), special)
        (made.add_special_tokens if special else made.add_tokens)(tokens)
    return made


def _merges(proto: Any) -> list[tuple[str, str]]:
    """The pairs that SentencePiece joins, first those of the best piece: every cut of it into two pieces."""
    scores = {piece.piece: piece.score for piece in proto.pieces if piece.type == _NORMAL}
    place = {piece: index for index, piece in enumerate(scores)}
    found = []
    for piece, score in scores.items():
        cuts = [(piece[:at], piece[at:]) for at in range(1, len(piece))]
        cuts = [(left, right) for left, right in cuts if left in scores and right in scores]
        found += [(-score, place[piece], place[left], place[right], left, right) for left, right in cuts]
    return [(left, right) for *_, left, right in sorted(found)]
