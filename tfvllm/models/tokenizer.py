"""What a tokenizer does with text, held against the Hugging Face folder it was read from.

keras-nlp's `from_preset(folder)` reads the vocabulary and one setting of such a folder, and leaves the others at its
own defaults: an uncased BERT then keeps accents, which its vocabulary has not, and every accented word becomes "[UNK]".
`settle` is the one place where the settings are read, set, and where what is left is measured on probe texts.
"""

import json
import unicodedata
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tfvllm.errors import InputError

AS_IS = "as is"
SETTINGS = ("lowercase", "strip_accents", "split_on_cjk")
_HF_NAMES = {
    "lowercase": ("do_lower_case", "lowercase"),
    "strip_accents": ("strip_accents", "strip_accents"),
    "split_on_cjk": ("tokenize_chinese_chars", "handle_chinese_chars"),
}

# A tokenizer that cuts these in another way than the model's own is the wrong one.
PLAIN = {
    "words": "a fine and moving film",
    "capitals": "A Fine Film by John Smith, 1999",
    "accents": "Ünïcödé ñandú café déjà vu",
    "Chinese": "很好的酒店",
}
# Where keras-nlp's tokenizers are known to part from others, character by character.
ODD = {
    "full-width punctuation": "fine，very fine！",
    "full-width letters": "Ｆｉｎｅ ｆｉｌｍ",
    "ligatures": "ﬁne ﬂight",
    "zero-width characters": "fine\u200bfilm co\u00adoperate",
    "no-break and wide spaces": "fine\u00a0film\u3000good",
    "replacement character": "fine\ufffdfilm",
    "symbols": "½ ™ № ①",
    "sharp s": "Straße groß",
    "final sigma": "Σίσυφος",
    "Korean": "한국어 문장",
    "combined emoji": "fine 👩\u200d👧 film",
    "special tokens in a text": "fine [SEP] film </s> good",
    "a long word": "a" * 120,
}


@dataclass
class Settled:
    """What came of `settle`: an entry for a manifest, and what a user has to be told."""

    entry: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def settle(tokenizer: Any, wanted: str | Mapping[str, bool] | None = None, *, untrained: bool = False) -> Settled:
    """Gives `tokenizer` the settings of the folder it was read from, and measures where it still differs.

    Args:
        tokenizer: a keras-nlp tokenizer; its attributes are set in place.
        wanted: settings that count more than the folder's, such as {"strip_accents": False}; "as is" changes nothing.
        untrained: nothing was trained with this tokenizer yet, so that a setting under which its vocabulary cannot be
            used is put right even where no folder is known.

    Raises:
        InputError: an unknown setting, one the tokenizer has not, or a tokenizer that cuts plain text in another way
            than its folder says and cannot be mended.
    """
    given = _checked(tokenizer, wanted)
    folder, explicit = source(tokenizer)
    stated = {} if folder is None or not _is_word_piece(tokenizer) else read_settings(folder)
    settled = Settled()
    if folder is not None:
        settled.entry["folder"] = folder.name
    if wanted != AS_IS:
        aims = {name: value for name, value in stated.items() if name not in explicit} | given
        if untrained:
            aims = _unusable(tokenizer) | aims
        _set(tokenizer, aims, settled)
    if _is_word_piece(tokenizer):
        settled.entry["settings"] = {name: bool(getattr(tokenizer, name)) for name in SETTINGS}
        settled.notes += [_unusable_note(tokenizer, name) for name in _unusable(tokenizer) if name not in given]
    if folder is not None:
        _measure(tokenizer, folder, stated, settled, strict=wanted is None and not explicit)
    return settled


def source(tokenizer: Any) -> tuple[Path | None, set[str]]:
    """The Hugging Face folder that `tokenizer`'s vocabulary was read from (None: unknown, or of another kind), and the
    settings that whoever made the tokenizer passed explicitly."""
    config = getattr(getattr(tokenizer, "_auto_config", None), "config", None) or {}
    explicit = {name for name in SETTINGS if name in config and name != "lowercase"}  # from_preset passes that one
    for name in ("vocabulary", "proto"):
        file = config.get(name)
        if isinstance(file, str) and len(file) < 4096 and Path(file).is_file():
            folder = Path(file).parent
            if any((folder / name).is_file() for name in ("tokenizer_config.json", "tokenizer.json")):
                return folder, explicit
    return None, explicit


def read_settings(folder: Path) -> dict[str, bool]:
    """`lowercase`, `strip_accents` and `split_on_cjk` of a BERT-like folder, as its own library would read them.

    `tokenizer_config.json` counts more than the normalizer of `tokenizer.json`; `strip_accents: null` follows
    `lowercase`.
    """
    config, normalizer = _json(folder / "tokenizer_config.json"), _normalizer(_json(folder / "tokenizer.json"))

    def read(name: str) -> bool | None:
        first, second = _HF_NAMES[name]
        return config[first] if config.get(first) is not None else normalizer.get(second)

    lowercase, strip, split = (read(name) for name in SETTINGS)
    lowercase = True if lowercase is None else bool(lowercase)
    return {
        "lowercase": lowercase,
        "strip_accents": lowercase if strip is None else bool(strip),
        "split_on_cjk": True if split is None else bool(split),
    }


def _checked(tokenizer: Any, wanted: str | Mapping[str, bool] | None) -> dict[str, bool]:
    if wanted is None or wanted == AS_IS:
        return {}
    if not isinstance(wanted, Mapping) or not all(isinstance(value, bool) for value in wanted.values()):
        raise InputError(
            f'tokenizer: expected "{AS_IS}" or settings such as {{"strip_accents": true}}, found {wanted!r}.'
        )
    for name in wanted:
        if name not in SETTINGS or not hasattr(tokenizer, name):
            known = ", ".join(name for name in SETTINGS if hasattr(tokenizer, name)) or "none of this kind"
            raise InputError(f"tokenizer: {type(tokenizer).__name__} has no setting {name!r}; it has {known}.")
    return dict(wanted)


def _set(tokenizer: Any, aims: Mapping[str, bool], settled: Settled) -> None:
    changed = {name: value for name, value in aims.items() if bool(getattr(tokenizer, name)) != value}
    for name, value in changed.items():
        setattr(tokenizer, name, value)
    if changed:
        settled.entry["changed"] = changed
        where = f"the folder {settled.entry['folder']}" if "folder" in settled.entry else "its vocabulary"
        told = ", ".join(f"{name} is now {value}" for name, value in changed.items())
        settled.notes.append(
            f"{type(tokenizer).__name__} did not do as {where} says: {told}. "
            f'Where the model was trained as it was, pass tokenizer="{AS_IS}".'
        )


# --- a vocabulary that cannot be used as it is set --------------------------------------------------------------------


def _is_word_piece(tokenizer: Any) -> bool:
    from keras_hub.tokenizers import WordPieceTokenizer

    return isinstance(tokenizer, WordPieceTokenizer)


def _unusable(tokenizer: Any) -> dict[str, bool]:
    """Settings under which whole classes of words can only become unknown: the vocabulary has no accent, or no
    capital, and yet they are kept."""
    if not _is_word_piece(tokenizer) or not tokenizer.vocabulary:
        return {}
    special = {*tokenizer.special_tokens, tokenizer.oov_token}
    words = [token for token in tokenizer.vocabulary if token not in special and not token.startswith("[")]
    if not any(word.isascii() and word.isalpha() for word in words):
        return {}  # not a vocabulary of a language with capitals and accents
    found = {}
    if not tokenizer.lowercase and not any(character.isupper() for word in words for character in word):
        found["lowercase"] = True
    if not tokenizer.strip_accents and not any(map(_has_accent, words)):
        found["strip_accents"] = True
    return found


def _has_accent(word: str) -> bool:
    return not word.isascii() and any(unicodedata.category(c) == "Mn" for c in unicodedata.normalize("NFD", word))


def _unusable_note(tokenizer: Any, name: str) -> str:
    kind = "accents" if name == "strip_accents" else "capital letters"
    return (
        f"{type(tokenizer).__name__} keeps {kind}, but its vocabulary has none: such words become "
        f'{tokenizer.oov_token}. If the model was not trained so, pass tokenizer={{"{name}": True}}.'
    )


# --- held against the folder's own tokenizer --------------------------------------------------------------------------


def _measure(tokenizer: Any, folder: Path, stated: Mapping[str, bool], settled: Settled, *, strict: bool) -> None:
    try:
        encode, kind = _reference(folder, stated)
    except Exception as error:
        line = " ".join(str(error).split())[:200]
        settled.entry["compared"] = f"not with the folder's own tokenizer: {type(error).__name__}: {line}"
        settled.notes.append(f"the tokens could not be compared with those of the folder {folder.name}: {line}")
        return
    probes = PLAIN | ODD
    rows = [[int(i) for i in row] for row in tokenizer(list(probes.values()))]
    differs = {}
    for (name, text), found in zip(probes.items(), rows, strict=True):
        expected = encode(text)
        if expected != found:
            differs[name] = {"text": text, "expected": _words(tokenizer, expected), "found": _words(tokenizer, found)}
    settled.entry["compared"] = f"with {kind} on {len(probes)} texts"
    settled.entry["differs"] = differs
    plain = [name for name in PLAIN if name in differs]
    if plain and strict:
        one = differs[plain[0]]
        raise InputError(
            f"{type(tokenizer).__name__} cuts plain text in another way than the folder {folder.name} says "
            f"({', '.join(plain)}): of {one['text']!r} expected {one['expected']}, found {one['found']}. "
            f'Where the model was trained so, pass tokenizer="{AS_IS}".'
        )
    if differs:
        settled.notes.append(
            f"tokens differ from those of the folder {folder.name} for {', '.join(differs)} "
            f"({len(differs)} of {len(probes)} kinds of text tried; the manifest has each)"
        )


def _reference(folder: Path, stated: Mapping[str, bool]):
    """A function from text to token ids as the folder means it, and what it is."""
    import tokenizers

    options: dict[str, Any] = {
        "lowercase": stated.get("lowercase", True),
        "strip_accents": stated.get("strip_accents"),
        "handle_chinese_chars": stated.get("split_on_cjk", True),
    }
    reference: Any
    file = folder / "tokenizer.json"
    if file.is_file():
        reference = tokenizers.Tokenizer.from_file(str(file))
        reference.no_truncation()
        reference.no_padding()
        normalizer = _normalizer(_json(file))
        if stated and normalizer:
            clean = normalizer.get("clean_text", True)
            reference.normalizer = tokenizers.normalizers.BertNormalizer(clean_text=clean, **options)
        kind = "tokenizer.json"
    elif (folder / "vocab.txt").is_file() and stated:
        from tokenizers.implementations import BertWordPieceTokenizer

        reference, kind = BertWordPieceTokenizer(str(folder / "vocab.txt"), **options), "vocab.txt"
    else:
        raise FileNotFoundError("it has no tokenizer.json")
    return lambda text: list(reference.encode(text, add_special_tokens=False).ids), kind


def _words(tokenizer: Any, ids: Iterable[int]) -> list[str]:
    return [str(tokenizer.id_to_token(i)) if 0 <= i < tokenizer.vocabulary_size() else f"id {i}" for i in ids][:24]


def _normalizer(document: Mapping[str, Any]) -> dict[str, Any]:
    """BERT's normalizer in a `tokenizer.json`; {} where it has none."""
    waiting = [document.get("normalizer") or {}]
    while waiting:
        found = waiting.pop()
        if found.get("type") == "BertNormalizer":
            return dict(found)
        waiting.extend(found.get("normalizers") or ())
    return {}


def _json(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        document = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{file} is no JSON ({error}); expected the settings of a tokenizer.") from None
    return document if isinstance(document, dict) else {}
