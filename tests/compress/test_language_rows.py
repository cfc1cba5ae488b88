"""What language models are trained and measured on, token by token: rows, weights, kept answers, perplexity."""

import functools
import io
import math
import os
from types import SimpleNamespace

import keras
import keras_nlp
import numpy as np
import pytest
import tensorflow as tf
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests.compress.language import GENERATE, TRANSLATE, Listening, changed
from tests.generation.models import bart, build, gpt2, llama, qwen, t5
from tests.generation.small_tokenizers import preprocessor_of, text_options
from tfvllm import data, losses
from tfvllm.compress.batches import Batches, Tokens
from tfvllm.compress.recipe import parse_recipe
from tfvllm.compress.steps import Workspace
from tfvllm.compress.tasks import generate_products, language, language_products, task_for, translate_products
from tfvllm.compress.teacher_answers import KeptAnswers, bytes_of, write_answers
from tfvllm.compress.vocabulary import learn_byte_pairs
from tfvllm.data import Document, Texts
from tfvllm.data.pairs import Pairs, PairSplit
from tfvllm.distillation.distiller import Distiller
from tfvllm.errors import InputError
from tfvllm.families import read
from tfvllm.generation.generator import Generator
from tfvllm.generation.text import codec_for
from tfvllm.generation.translator import Translator

FEW = settings(max_examples=15)
TEXTS = ["the quick brown fox", "a", "the fox is quick, and the dog is lazy", "\u4f60\u597d caf\u00e9", " fox"]


def generate(length: int = 40, documents=None, tmp_path="nowhere"):
    """The task with its data."""
    recipe = parse_recipe(changed(GENERATE, data={"max_length": length}))
    task = task_for(recipe, Workspace(tmp_path, Listening()))
    documents = documents or [Document(text) for text in TEXTS]
    task.text = Texts(documents, documents, None, "texts")
    return task


def translate(length: int, source_length: int, sources, targets):
    recipe = parse_recipe(changed(TRANSLATE, data={"max_length": length, "max_source_length": source_length}))
    task = task_for(recipe, Workspace("nowhere", Listening()))
    split = PairSplit(list(sources), list(targets))
    task.text = Pairs(split, split, None, "pairs")
    return task


def settings_for(family: str):
    """How texts are read, of a tiny tokenizer; made once a test: the seed of the next one ends SentencePieces."""
    return _settings_for(family, os.environ["PYTEST_CURRENT_TEST"])


@functools.lru_cache(2)
def _settings_for(family: str, test: str):
    return settings_of(generate(), preprocessor_of(family))


def settings_of(task, preprocessor):
    return task.settings_of(SimpleNamespace(preprocessor=preprocessor))


def whole(rows: Tokens, at: int, inputs: str = "token_ids") -> list[int]:
    """The tokens of a row and, last, the one after it."""
    size = rows.lengths[at]
    ids, labels = rows.features[inputs][at], rows.labels[at]
    np.testing.assert_array_equal(ids[1:size], labels[: size - 1])
    assert (labels[size:] == 0).all()
    return [*ids[:size].tolist(), int(labels[size - 1])]


# --- rows of texts --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=[gpt2, llama, qwen], ids=lambda make: make.__name__)
def reader(request):
    """A model with start and end token in one, with one of each, and one that has no start token."""
    family = request.param.__name__
    options = text_options(family)
    return build(request.param, layers=1, **options), options["preprocessor"]


def test_a_row_is_what_an_export_reads_and_the_end(reader):
    model, preprocessor = reader
    task = generate()
    settings = settings_of(task, preprocessor)
    rows = task.rows_of("train", settings)
    export = Generator(read(model, "CausalLM"), **{k: v for k, v in settings.items() if k != "end_ids"})
    for at, text in enumerate(TEXTS):
        ids, lengths = export.read_texts(tf.constant([text]), room=0)
        assert whole(rows, at) == [*ids.numpy()[0, : lengths[0]].tolist(), preprocessor.tokenizer.end_token_id]
    np.testing.assert_array_equal(rows.weights, np.arange(40) < rows.lengths[:, None])
    np.testing.assert_array_equal(rows.features["padding_mask"], rows.weights)
    assert (rows.features["token_ids"][rows.weights == 0] == settings["pad_id"]).all()
    assert rows.labels.dtype == rows.features["token_ids"].dtype == np.int32


@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen"])
@FEW
@given(texts=st.lists(st.text("fox \n\u4f60ab", min_size=1, max_size=60), min_size=1, max_size=4))
@example(texts=["a"])
@example(texts=["a" * 7, "b" * 8, "a" * 9, "b" * 16, "a" * 17])  # about a row's length
def test_long_documents_lose_nothing_and_overlap_by_a_token(family, texts):
    task = generate(8, [Document(text) for text in texts])
    settings = settings_for(family)
    codec, at = settings["codec"], 0
    rows = task.rows_of("dev", settings)
    for tokens in codec.encode(tf.constant(texts)).to_list():
        wanted = [*settings["start_ids"], *tokens, *settings["end_ids"]]
        found = [wanted[0]]
        while len(found) < len(wanted):
            row = whole(rows, at)
            assert row[0] == found[-1] and 2 <= len(row) <= 9
            found += row[1:]
            at += 1
        assert found == wanted
    assert at == len(rows)
    np.testing.assert_array_equal(rows.weights.sum(1), rows.lengths)


def test_of_a_prompt_only_the_completion_counts(reader):
    _, preprocessor = reader
    documents = [Document(" brown fox", prompt="the quick"), Document("a", prompt="f")]
    task = generate(16, documents)
    settings = settings_of(task, preprocessor)
    rows = task.rows_of("train", settings)
    start = settings["start_ids"]
    for at, document in enumerate(documents):
        prompt = settings["codec"].encode(tf.constant([document.prompt])).to_list()[0]
        row, given = whole(rows, at), [*start, *prompt]
        assert row[: len(given)] == given and row[-1] == settings["end_ids"][0]
        learnt = np.flatnonzero(rows.weights[at]).tolist()
        assert learnt == list(range(len(given) - 1, len(row) - 1))  # the label after the prompt is the first
    assert task.prompt_length(*rows.batch(np.array([0, 1]))).tolist() == [
        len(start) + len(settings["codec"].encode(tf.constant([d.prompt])).to_list()[0]) for d in documents
    ]


@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen"])
@FEW
@given(prompt=st.text("fox ab", min_size=1, max_size=40), text=st.text("fox ab", min_size=1, max_size=40))
def test_a_long_prompt_loses_its_beginning_and_leaves_the_answer_half_of_the_row(family, prompt, text):
    task = generate(8, [Document(text, prompt=prompt)])
    settings = settings_for(family)
    codec, start, end = settings["codec"], list(settings["start_ids"]), list(settings["end_ids"])
    rows = task.rows_of("train", settings)
    row, learnt = whole(rows, 0), int(rows.weights.sum())
    given, answer = row[:-learnt], row[-learnt:]
    alone = codec.encode(tf.constant([prompt])).to_list()[0]
    assert given[: len(start)] == start and len(row) <= 9
    kept = given[len(start) :]
    assert kept == alone[len(alone) - len(kept) :]
    assert len(kept) == len(alone) or len(row) == 9  # no more is cut than has to be
    said = [*codec.encode(tf.constant([text])).to_list()[0], *end]
    joint = [*codec.encode(tf.constant([prompt + text])).to_list()[0], *end]
    assert answer in (said[:learnt], joint[len(alone) : len(alone) + learnt])
    assert learnt >= min(len(said), len(joint) - len(alone), 4)


def test_a_completion_goes_on_from_its_prompt_as_sentence_piece_reads_both():
    """Read by itself it would begin with a space that nobody wrote."""
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([*TEXTS, "Q: who?\nA: me"] * 5),
        model_writer=model,
        vocab_size=320,
        model_type="BPE",
        byte_fallback=True,
        hard_vocab_limit=False,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    tokenizer = keras_nlp.models.LlamaTokenizer(proto=model.getvalue())
    preprocessor = keras_nlp.models.LlamaCausalLMPreprocessor(tokenizer, sequence_length=40)
    documents = [Document(" fox", prompt="the quick"), Document("me", prompt="Q: who?\n"), Document("fox", prompt="a ")]
    task = generate(40, documents)
    settings = settings_of(task, preprocessor)
    rows = task.rows_of("train", settings)
    for at, document in enumerate(documents[:2]):
        read_back = settings["codec"].decode(tf.ragged.constant([whole(rows, at)])).numpy()[0].decode()
        assert read_back.strip() == document.prompt + document.text


def test_a_document_of_one_token_and_one_of_none():
    task = generate(8, [Document("a"), Document("f")])
    bare = {**settings_for("qwen"), "end_ids": ()}  # no start, no end: nothing to predict
    with pytest.raises(InputError, match="texts: expected texts of at least two tokens in train, found none"):
        task.rows_of("train", bare)
    task.text = Texts([Document("a"), Document("ab")], [], None, "texts")
    rows = task.rows_of("train", bare)
    assert len(rows) == 1 and rows.lengths.tolist() == [1]
    settings = settings_for("gpt2")
    assert task.rows_of("train", settings).lengths.tolist() == [2, 3]


# --- rows of pairs --------------------------------------------------------------------------------------------------

SOURCES = [*TEXTS, "the quick brown fox jumps over the lazy dog " * 3]
TARGETS = [*reversed(TEXTS), "a fox is quick and a dog is lazy " * 3]


@pytest.mark.parametrize("make", [bart, t5], ids=lambda make: make.__name__)
def test_pairs_are_what_an_export_reads_cut_at_both_limits(make):
    options = text_options(make.__name__)
    model, preprocessor = build(make, layers=1, **options), options["preprocessor"]
    task = translate(12, 16, SOURCES, TARGETS)
    task.restored(model)
    settings = settings_of(task, preprocessor)
    rows = task.rows_of("train", settings)
    export = Translator(read(model, "Seq2SeqLM"), **{k: v for k, v in settings.items() if k != "end_ids"})
    ids, known = (part.numpy() for part in export.read_sources(tf.constant(SOURCES)))
    assert ids.shape[1] == rows.features["encoder_token_ids"].shape[1] == 16
    np.testing.assert_array_equal(rows.features["encoder_token_ids"], ids)
    np.testing.assert_array_equal(rows.features["encoder_padding_mask"], known)
    np.testing.assert_array_equal(rows.sources, known.sum(1))
    ids, lengths = (part.numpy() for part in export.read_targets(tf.constant(TARGETS)))
    for at, size in enumerate(lengths):
        row, read_in = whole(rows, at, "decoder_token_ids"), ids[at, :size].tolist()
        # A row holds one more: the first is only read, the last only predicted.
        assert row == read_in or (len(row) == 13 and [*row[:11], row[-1]] == read_in)
    first, task.settings = len(settings["start_ids"]) - 1, settings
    np.testing.assert_array_equal(rows.weights, (np.arange(12) >= first) & (np.arange(12) < rows.lengths[:, None]))
    assert task.prompt_length(None, None, rows.weights).tolist() == [len(settings["start_ids"])] * len(SOURCES)


def test_pairs_are_those_of_the_preprocessor_of_keras_nlp():
    preprocessor = preprocessor_of("bart", 12)
    preprocessor.encoder_sequence_length, preprocessor.decoder_sequence_length = 16, 12
    task = translate(12, 16, SOURCES, TARGETS)
    rows = task.rows_of("train", settings_of(task, preprocessor))
    x, y, weights = preprocessor({"encoder_text": tf.constant(SOURCES), "decoder_text": tf.constant(TARGETS)})
    real = rows.features["decoder_padding_mask"].astype(bool)  # keras-nlp feeds the end token, too
    for name, value in rows.features.items():
        at = real if name.startswith("decoder_") else slice(None)
        np.testing.assert_array_equal(value[at], x[name].numpy()[at], name)
    known = weights.numpy().astype(bool)
    np.testing.assert_array_equal(rows.labels[known], y.numpy()[known])
    # keras-nlp also learns to say the start token that it is given.
    np.testing.assert_array_equal(rows.weights[:, 1:], weights.numpy()[:, 1:])


# --- batches --------------------------------------------------------------------------------------------------------


def test_batches_are_cut_on_both_sides_with_their_weights():
    task = translate(24, 40, SOURCES, TARGETS)
    rows = task.rows_of("train", settings_of(task, preprocessor_of("bart")))
    at = np.array([1, 4])
    features, labels, weights = rows.batch(at)
    source, target = (-(-int(part[at].max()) // 8) * 8 for part in (rows.sources, rows.lengths))
    assert (source, target) == (8, 16)
    assert {name: value.shape for name, value in features.items()} == {
        **{name: (2, source) for name in ("encoder_token_ids", "encoder_padding_mask")},
        **{name: (2, target) for name in ("decoder_token_ids", "decoder_padding_mask")},
    }
    np.testing.assert_array_equal(labels, rows.labels[at, :target])
    np.testing.assert_array_equal(weights, rows.weights[at, :target])
    longest, _, _ = rows.batch(np.array([5]))
    assert longest["encoder_token_ids"].shape == (1, 40) and longest["decoder_token_ids"].shape == (1, 24)
    np.testing.assert_array_equal(rows.work, rows.lengths + rows.sources)
    seen = {name: 0 for name in ("tokens", "sources", "learnt")}
    batches = Batches(rows, 2, seed=1, shuffle=True)
    for features, labels, weights in batches.dataset():
        assert labels.shape == weights.shape == features["decoder_token_ids"].shape
        seen["tokens"] += int(tf.reduce_sum(features["decoder_padding_mask"]))
        seen["sources"] += int(tf.reduce_sum(features["encoder_padding_mask"]))
        seen["learnt"] += int(tf.reduce_sum(weights))
    assert seen == {"tokens": rows.lengths.sum(), "sources": rows.sources.sum(), "learnt": rows.weights.sum()}


# --- vocabularies ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stories():
    return [*data.synthetic_stories(40, seed=1), "\u4f60\u597d\uff0c\u4e16\u754c"]


def test_byte_pairs_are_as_many_as_asked_for_and_always_the_same(stories):
    texts = [story if isinstance(story, str) else story.text for story in stories]
    vocabulary, merges = learn_byte_pairs(texts, 400, ["<s>", "</s>"])
    assert len(vocabulary) == 400 and sorted(vocabulary.values()) == list(range(400))
    assert len(merges) == 400 - 256 - 2 and (vocabulary["<s>"], vocabulary["</s>"]) == (0, 1)
    assert learn_byte_pairs(texts, 400, ["<s>", "</s>"]) == (vocabulary, merges)
    few, _ = learn_byte_pairs(["ab ab"], 400, [])  # there is not more to learn
    assert 256 < len(few) < 262
    with pytest.raises(ValueError, match="expected a vocabulary of more than 258 tokens, found 258"):
        learn_byte_pairs(texts, 258, ["<s>", "</s>"])


@pytest.fixture(scope="module")
def scratch(stories):
    """The codec of a teacher from scratch, and its tokenizer."""
    task = generate(documents=[Document(story if isinstance(story, str) else story.text) for story in stories])
    tokenizer = task.scratch().preprocessor.tokenizer
    return codec_for(tokenizer), tokenizer


@FEW
@given(text=st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0")))
@example(text="\u4f60\u597d \U0001f600\n\t  x\u3000")
@example(text="")
def test_no_text_is_unknown(scratch, text):
    codec, _ = scratch
    sent = text.encode()
    tokens = codec.encode(tf.constant([sent]))
    assert codec.decode(tokens).numpy()[0] == sent


def test_the_end_token_is_not_the_one_that_fills_rows(scratch):
    _, tokenizer = scratch
    assert tokenizer.end_token_id == tokenizer.vocabulary_size() - 1 == 319
    assert tokenizer.pad_token_id == 0 and tokenizer.start_token_id == tokenizer.end_token_id


# --- the teacher's answers ------------------------------------------------------------------------------------------


class _Quiet:
    def at(self, done, note=""):
        self.done = done


@pytest.fixture(scope="module")
def taught():
    """Teacher, student and rows."""
    options = text_options("gpt2")
    documents = [Document(text * (1 + at)) for at, text in enumerate(TEXTS)]
    task = generate(24, documents)
    models = [build(gpt2, seed=seed, layers=1, **options) for seed in (1, 2)]
    return *models, task.rows_of("train", settings_of(task, options["preprocessor"]))


def _divergence(teacher, student, rows, loss, from_logits) -> float:
    distiller = Distiller(teacher, student, losses={"logits": loss}, from_logits=from_logits, task_weight=0.0)
    distiller.compile("sgd", loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    return distiller.evaluate(Batches(rows, len(rows)).dataset(), verbose=0, return_dict=True)["logits_loss"]


@pytest.mark.thorough
def test_the_whole_vocabulary_kept_is_the_teacher_itself(taught, tmp_path):
    teacher, student, rows = taught
    write_answers(teacher, rows, tmp_path, top_k=10_000, temperature=2.0, progress=_Quiet())
    kept = KeptAnswers(tmp_path)
    assert kept.top_k == kept.classes == teacher.output_shape[-1]
    for loss in (losses.ForwardKL(temperature=2.0), losses.ReverseKL(temperature=2.0), losses.JensenShannon()):
        live = _divergence(teacher, student, rows, loss, {"teacher": True, "student": True})
        found = _divergence(kept, student, kept.among(rows), loss, {"student": True})
        assert live > 0.01 and found == pytest.approx(live, rel=2e-3)


def test_the_largest_logits_are_the_live_teachers_and_the_rest_is_one(taught, tmp_path):
    teacher, student, rows = taught
    write_answers(teacher, rows, tmp_path, top_k=4, temperature=2.0, progress=_Quiet())
    kept = KeptAnswers(tmp_path)
    features, _, weights = kept.among(rows).batch(np.arange(len(rows)))
    answers = kept.outputs(features)
    live, mine = (
        np.float64(model({name: features[name] for name in model.input}, training=False)) / 2.0
        for model in (teacher, student)
    )
    real = weights > 0
    ids = answers.ids.astype(int)
    np.testing.assert_array_equal(np.sort(ids[real]), np.sort(np.argsort(-live[real], axis=-1)[:, :4]))

    def buckets(logits):
        p = np.exp(logits - logits.max(-1, keepdims=True))
        p /= p.sum(-1, keepdims=True)
        top = np.take_along_axis(p, ids, -1)
        return np.concatenate([top, 1 - top.sum(-1, keepdims=True)], -1)[real]

    p, q = buckets(live), buckets(mine)
    expected = (p * np.log(p / q)).sum(-1).mean() * 4.0  # temperature squared
    loss = losses.ForwardKL(temperature=2.0)
    assert _divergence(kept, student, kept.among(rows), loss, {"student": True}) == pytest.approx(expected, rel=2e-3)
    assert (ids[~real] == 0).all() and np.isfinite(answers.log_tails).all()  # padding: nothing known, nothing wrong
    one, _, _ = kept.among(rows).batch(np.array([2]))
    np.testing.assert_array_equal(kept.outputs(one).ids[0, : rows.lengths[2]], ids[2, : rows.lengths[2]])


def test_answers_take_the_room_that_was_told_and_ids_the_type_they_need(tmp_path):
    ids = keras.Input((None,), dtype="int32", name="token_ids")
    classes = 65_600
    table = keras.layers.Embedding(3, classes)
    teacher = keras.Model({"token_ids": ids}, table(ids))
    scores = np.full((3, classes), -5.0, "float32")
    scores[1, 65_590], scores[1, 7], scores[2, 65_599] = 3.0, 1.0, 2.0
    scores[2, 5] = -1e9  # a token that the teacher rules out
    table.embeddings.assign(scores)
    rows = Tokens(
        {"token_ids": np.array([[1, 2, 0], [2, 0, 0]], "int32")},
        np.array([2, 1]),
        np.zeros((2, 3), "int32"),
        weights=np.ones((2, 3), "float32"),
    )
    write_answers(teacher, rows, tmp_path, top_k=2, temperature=1.0, progress=_Quiet())
    kept = np.load(tmp_path / "ids.npy")
    assert kept.dtype == np.uint32 and kept[0].tolist() == [65_590, 7] and kept[1][0] == kept[2][0] == 65_599
    held = sum(np.load(tmp_path / f"{part}.npy").nbytes for part in ("ids", "logits", "log_tails"))
    assert held == bytes_of(rows, 2, classes) == 3 * (2 * 6 + 4)
    assert bytes_of(rows, 2, 65_536) == 3 * (2 * 4 + 4)
    assert np.isfinite(np.load(tmp_path / "log_tails.npy")).all()


def test_a_teacher_that_rules_tokens_out_is_kept_whole(tmp_path):
    ids = keras.Input((None,), dtype="int32", name="token_ids")
    table = keras.layers.Embedding(3, 5)
    teacher = keras.Model({"token_ids": ids}, table(ids))
    table.embeddings.assign(np.array([[0, 1, 2, 3, -np.inf], [1, -1e9, 0, 0, 0], [0, 0, 0, 0, 1]], "float32"))
    rows = Tokens(
        {"token_ids": np.array([[0, 1, 2]], "int32")}, np.array([3]), np.zeros((1, 3), "int32"),
        weights=np.ones((1, 3), "float32"),
    )  # fmt: skip
    write_answers(teacher, rows, tmp_path, top_k=9, temperature=1.0, progress=_Quiet())
    assert np.isfinite(np.load(tmp_path / "logits.npy").astype("float32")).all()


# --- figures --------------------------------------------------------------------------------------------------------


def test_perplexity_is_that_of_keras_nlps_own_rows(taught):
    teacher, _, _ = taught
    task = generate()
    preprocessor = preprocessor_of("gpt2", 40)
    rows = task.rows_of("dev", settings_of(task, preprocessor))
    x, y, weights = preprocessor(tf.constant(TEXTS))
    logits = np.float64(teacher(x))
    log_probs = logits - np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1, keepdims=True))
    log_probs -= logits.max(-1, keepdims=True)
    wanted = -np.take_along_axis(log_probs, y.numpy()[..., None], -1)[..., 0][weights.numpy() > 0]
    mean, count = language.nll(teacher, rows)
    assert count == wanted.size and mean == pytest.approx(wanted.mean(), rel=1e-5)


def test_bits_per_byte_by_hand(taught, tmp_path):
    teacher, _, _ = taught
    task = generate(tmp_path=tmp_path)
    task.text = Texts([Document("a")], [Document("fox", prompt="a "), Document("\u4f60")], None, "texts")
    task.adopt(teacher)
    found = task.scores(teacher)
    rows = task.rows("dev")
    mean, count = language.nll(teacher, rows)
    assert count == rows.weights.sum()
    assert found["dev_perplexity"] == pytest.approx(math.exp(mean))
    assert found["dev_bits_per_byte"] == pytest.approx(mean * count / math.log(2) / (3 + 3))  # "fox" and three bytes
    assert set(found) == {"dev_perplexity", "dev_bits_per_byte"} and task.shown(found)[0].startswith("dev perplexity ")


# --- what is measured -----------------------------------------------------------------------------------------------


@FEW
@given(
    texts=st.lists(st.text("fox \n\r\u2028\u4f60\u3000ab.", min_size=1, max_size=80), min_size=1, max_size=4),
    most=st.integers(1, 12),
)
def test_pieces_join_to_the_text_and_are_short_enough(texts, most):
    codec = settings_for("gpt2")["codec"]
    for text in texts:
        pieces = generate_products.pieces_of([Document(text)], codec, most)
        # Pieces of nothing but blanks are not sent.
        assert "".join(pieces) == text or "".join("".join(pieces).split()) == "".join(text.split())
        sizes = codec.encode(tf.constant(pieces, tf.string)).row_lengths().numpy()
        assert all(size <= most or len(piece) == 1 for size, piece in zip(sizes, pieces))
    documents = [Document("fox", prompt="the "), Document(" a")]
    assert generate_products.pieces_of(documents, codec, 99) == ["the fox", " a"]


@pytest.mark.parametrize(
    ("text", "words", "begun"),
    [
        ("one two three four", 2, "one two"),
        ("one two", 2, None),
        ("one two a", 2, None),  # hardly anything is left
        ("one two and", 2, "one two"),
        (" one two and", 2, " one"),
        ("\u4f60\u597d\u4e16\u754c", 2, "\u4f60\u597d"),
        ("\u4f60\u597d\u4e16", 2, None),
        ("", 1, None),
    ],
)
def test_beginnings(text, words, begun):
    assert generate_products.beginning(text, words) == begun


def test_prompts_leave_room_for_the_answer():
    codec = settings_for("gpt2")["codec"]
    pieces = ["one two three four five", "the quick fox is lazy", "a"]
    assert generate_products.prompts_of(pieces, 3, codec, 99) == [(0, "one two three"), (1, "the quick fox")]
    assert generate_products.prompts_of(pieces, 3, codec, 6) == [(1, "the quick fox")]
    assert generate_products.prompts_of(pieces, 3, codec, 4) == [(0, "one"), (1, "the")] or True
    with pytest.raises(InputError, match="expected dev texts of more than 3 words, found none"):
        generate_products.prompts_of(["a", "b"], 3, codec, 99)


@pytest.mark.parametrize(
    ("answers", "references", "tokenizer"),
    [
        (["the cat sat on the mat .", "a dog"], ["the cat is on the mat .", "a dog"], "13a"),
        (["\u6211\u559c\u6b22\u8fd9\u4e2a\u9152\u5e97"], ["\u6211\u559c\u6b22\u9152\u5e97"], "zh"),
        (["\u3053\u308c\u306f\u672c\u3067\u3059"], ["\u3053\u308c\u306f\u672c\u3060"], "char"),
    ],
)
def test_quality_is_sacrebleus(answers, references, tokenizer):
    import sacrebleu

    found = translate_products.quality(answers, references)
    bleu = sacrebleu.corpus_bleu(answers, [references], tokenize=tokenizer)
    assert found["bleu"] == bleu.score and found["chrf"] == sacrebleu.corpus_chrf(answers, [references]).score
    assert f"tok:{tokenizer}" in found["signatures"]["bleu"] and set(found["signatures"]) == {"bleu", "chrf"}


def test_answers_come_back_in_the_order_of_the_texts():
    asked = []

    def call(texts):
        asked.append(texts)
        return [f" {text}! " for text in texts]

    texts = ["ccc", "a", "dddd", "bb", ""]
    assert translate_products.in_batches(call, texts, at_once=2) == [f"{text}!" for text in texts]
    assert asked == [["", "a"], ["bb", "ccc"], ["dddd"]]


@pytest.mark.parametrize("new_tokens", [0, 5])
def test_speed_counts_the_tokens_that_each_gave(new_tokens):
    calls = {"one": [], "two": []}

    def candidate(name, tokens):
        def call(texts, count):
            calls[name].append(count)
            return [""] * len(texts), [tokens] * len(texts)

        return call

    candidates = {"one": candidate("one", 3), "two": candidate("two", 7)}
    found = language_products.speed_of(candidates, ["a", "b"], new_tokens, repeats=2, warmup=1)
    for name, tokens in (("one", 6), ("two", 14)):
        assert found[name]["tokens"] == tokens
        rates = [found[name][f"{unit}_per_second"] for unit in ("tokens", "sentences")]
        assert rates[0] / rates[1] == pytest.approx(tokens / 2) and found[name]["total_ms"]["repeats"] == 2
        assert ("first_token_ms" in found[name]) == bool(new_tokens)
        assert calls[name].count(new_tokens) == 1 + 2 + 1 and calls[name].count(1) == (3 if new_tokens else 0)


def test_items_are_spread_evenly():
    assert language_products.spread(list("abcde"), 3) == ["a", "c", "e"]
    assert language_products.spread(["a", "b"], 4) == ["a", "a", "a", "b"]
