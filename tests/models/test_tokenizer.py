"""Tokenizers as their Hugging Face folders state them: every setting is read, what cannot be set is measured."""

import json

import keras_nlp
import pytest

from tests.tiny_models import VOCABULARY
from tfvllm.errors import InputError
from tfvllm.models import tokenizer as tokenizers
from tfvllm.models.tokenizer import settle

ACCENTED = ["à", "é", "ï", "É", "A", "B"]


def bert_folder(path, *, cased=False, tokenizer_json=True, vocabulary=None, **config):
    """A folder as `save_pretrained` writes it, without weights."""
    tokenizers = pytest.importorskip("tokenizers")
    path.mkdir(parents=True, exist_ok=True)
    vocabulary = vocabulary or [*VOCABULARY, *(ACCENTED if cased else ()), "，", "！"]
    (path / "vocab.txt").write_text("\n".join(vocabulary), encoding="utf-8")
    (path / "config.json").write_text(json.dumps({"model_type": "bert", "architectures": ["BertModel"]}))
    config = {"do_lower_case": not cased, "tokenizer_class": "BertTokenizer", **config}
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    if tokenizer_json:
        made = tokenizers.BertWordPieceTokenizer(
            {token: i for i, token in enumerate(vocabulary)},
            lowercase=not cased,
            strip_accents=config.get("strip_accents"),
            handle_chinese_chars=config.get("tokenize_chinese_chars", True),
        )
        made.save(str(path / "tokenizer.json"))
    return path


def read(folder, **options):
    return keras_nlp.models.BertTokenizer.from_preset(str(folder), **options)


def words(tokenizer, text):
    return [tokenizer.id_to_token(int(i)) for i in tokenizer([text])[0]]


def test_an_uncased_folder_strips_accents(tmp_path):
    tokenizer = read(bert_folder(tmp_path / "uncased"))
    assert "[UNK]" in words(tokenizer, "é")  # what keras-nlp leaves
    settled = settle(tokenizer)
    assert words(tokenizer, "Né") == ["n", "##e"]
    assert settled.entry["folder"] == "uncased"
    assert settled.entry["changed"] == {"strip_accents": True}
    assert settled.entry["settings"] == {"lowercase": True, "strip_accents": True, "split_on_cjk": True}
    assert "strip_accents is now True" in settled.notes[0]
    assert settle(tokenizer).notes[1:] == [] and "changed" not in settle(tokenizer).entry  # once is enough


@pytest.mark.parametrize("tokenizer_json", [True, False])
@pytest.mark.parametrize(
    ("folder", "settings"),
    [
        ({"strip_accents": False}, {"lowercase": True, "strip_accents": False, "split_on_cjk": True}),
        ({"cased": True}, {"lowercase": False, "strip_accents": False, "split_on_cjk": True}),
        ({"cased": True, "strip_accents": True}, {"lowercase": False, "strip_accents": True, "split_on_cjk": True}),
        ({"tokenize_chinese_chars": False}, {"lowercase": True, "strip_accents": True, "split_on_cjk": False}),
    ],
)
def test_every_setting_is_the_folders(tmp_path, folder, settings, tokenizer_json):
    tokenizer = read(bert_folder(tmp_path / "f", tokenizer_json=tokenizer_json, **folder))
    settled = settle(tokenizer)
    assert settled.entry["settings"] == settings
    assert not set(tokenizers.PLAIN) & set(settled.entry["differs"])
    kind = "tokenizer.json" if tokenizer_json else "vocab.txt"
    assert settled.entry["compared"].startswith(f"with {kind}")


def test_settings_of_one_file_alone(tmp_path):
    folder = bert_folder(tmp_path / "f", cased=True, strip_accents=True)
    (folder / "tokenizer_config.json").write_text("{}")  # then the normalizer counts
    assert tokenizers.read_settings(folder) == {"lowercase": False, "strip_accents": True, "split_on_cjk": True}
    (folder / "tokenizer.json").unlink()  # then what the folder's own library takes by default
    assert tokenizers.read_settings(folder) == {"lowercase": True, "strip_accents": True, "split_on_cjk": True}
    (folder / "tokenizer_config.json").write_text("no JSON")
    with pytest.raises(InputError, match="is no JSON"):
        tokenizers.read_settings(folder)


def test_what_cannot_be_set_is_measured(tmp_path):
    settled = settle(read(bert_folder(tmp_path / "f")))
    differs = settled.entry["differs"]
    assert differs["full-width punctuation"]["expected"][-1] == "！"
    assert differs["full-width punctuation"]["found"][-1] == "!"
    assert {"ligatures", "zero-width characters", "no-break and wide spaces"} <= set(differs)
    assert "tokens differ" in settled.notes[-1] and "ligatures" in settled.notes[-1]


def test_what_the_caller_says_counts_more(tmp_path):
    folder = bert_folder(tmp_path / "f")
    tokenizer = read(folder)
    settled = settle(tokenizer, "as is")
    assert tokenizer.strip_accents is False and "accents" in settled.entry["differs"]
    assert any("keeps accents, but its vocabulary has none" in note for note in settled.notes)
    settle(tokenizer, {"strip_accents": True})
    assert tokenizer.strip_accents is True
    settled = settle(tokenizer, {"strip_accents": False})
    assert tokenizer.strip_accents is False and settled.entry["changed"] == {"strip_accents": False}
    explicit = read(folder, strip_accents=False)
    assert settle(explicit).entry["settings"]["strip_accents"] is False
    for wanted in ({"strip_accent": True}, {"strip_accents": "yes"}, "asis"):
        with pytest.raises(InputError, match="tokenizer"):
            settle(tokenizer, wanted)


def test_plain_text_cut_in_another_way_is_refused(tmp_path):
    folder = bert_folder(tmp_path / "f")
    other = [*VOCABULARY, "，", "！"]
    other[VOCABULARY.index("film")], other[VOCABULARY.index("fine")] = "fine", "film"
    bert_folder(tmp_path / "other", vocabulary=other)
    (folder / "tokenizer.json").write_bytes((tmp_path / "other" / "tokenizer.json").read_bytes())
    with pytest.raises(InputError, match=r"cuts plain text in another way than the folder f says \(words"):
        settle(read(folder))
    assert "words" in settle(read(folder), "as is").entry["differs"]


def test_a_lower_casing_sentence_piece_folder_is_refused(tmp_path):
    """ALBERT: keras-nlp has no setting to lower-case with, and every capital would be unknown."""
    tokenizers = pytest.importorskip("tokenizers")
    from sentencepiece import SentencePieceProcessor

    from tests.encoders import sentence_pieces

    (tmp_path / "spiece.model").write_bytes(sentence_pieces("albert"))
    model = SentencePieceProcessor(model_proto=sentence_pieces("albert"))
    pieces = [(model.id_to_piece(i), model.get_score(i)) for i in range(model.get_piece_size())]

    def write(*normalizers):
        made = tokenizers.Tokenizer(tokenizers.models.Unigram(pieces, unk_id=model.unk_id(), byte_fallback=False))
        made.normalizer = tokenizers.normalizers.Sequence([tokenizers.normalizers.NFKC(), *normalizers])
        made.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
        made.save(str(tmp_path / "tokenizer.json"))

    tokenizer = keras_nlp.models.AlbertTokenizer(proto=str(tmp_path / "spiece.model"))
    write(tokenizers.normalizers.Lowercase())
    with pytest.raises(InputError, match=r"AlbertTokenizer cuts plain text in another way .*capitals"):
        settle(tokenizer)
    write()
    assert "words" not in settle(tokenizer, "as is").entry["differs"]


def test_a_vocabulary_that_cannot_be_used_as_set():
    tokenizer = keras_nlp.models.BertTokenizer(VOCABULARY)
    notes = settle(tokenizer).notes
    assert [kind in note for kind, note in zip(("capital letters", "accents"), notes, strict=True)] == [True, True]
    assert (tokenizer.lowercase, tokenizer.strip_accents) == (False, False)  # it may have been trained so
    settle(tokenizer, untrained=True)
    assert (tokenizer.lowercase, tokenizer.strip_accents) == (True, True)
    cased = keras_nlp.models.BertTokenizer([*VOCABULARY, *ACCENTED])
    assert settle(cased, untrained=True).notes == [] and not cased.lowercase


def test_shrinking_a_vocabulary_keeps_the_settings(tmp_path):
    from tfvllm.pruning.vocabulary import cut_tokenizer

    tokenizer = read(bert_folder(tmp_path / "f", tokenize_chinese_chars=False))
    settle(tokenizer)
    cut, _ = cut_tokenizer(tokenizer, range(len(VOCABULARY) - 3))
    assert (cut.lowercase, cut.strip_accents, cut.split_on_cjk) == (True, True, False)


def test_the_real_minilm_folder(minilm_dir):
    tokenizer = read(minilm_dir)
    settled = settle(tokenizer)
    assert words(tokenizer, "Ünïcödé ñandú") == ["unicode", "nan", "##du"]
    assert "accents" not in settled.entry["differs"] and "ligatures" in settled.entry["differs"]
