"""`tfvllm export` from the shell: files and folders of every kind, wrong calls in one line, lengths that fit."""

import json
import shutil
import subprocess
import sys

import keras
import keras_nlp
import numpy as np
import pytest
import tensorflow as tf

from tests import tiny_models
from tests.generation.byte_pairs import learn
from tests.generation.models import build
from tests.generation.reference import keras_translate
from tfvllm import cli
from tfvllm.cli.tensors import in_runs
from tfvllm.errors import InputError
from tfvllm.export import PRECISIONS
from tfvllm.export.exporter import fit_lengths
from tfvllm.models.load import forgotten, load
from tfvllm.savedmodel import manifest

M = keras_nlp.models
TEXTS = ["two dogs run over the hill", "a man and a woman sit there", "the hill is over there"]


@pytest.fixture
def call(capsys):
    """The command line in this process: exit code, stdout, stderr."""

    def run(*arguments):
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.main([str(argument) for argument in arguments])
        told = capsys.readouterr()
        assert "Traceback" not in told.err
        return ended.value.code, told.out, told.err

    return run


def served(folder, signature="serving_default", **inputs):
    function = tf.saved_model.load(str(folder)).signatures[signature]
    return {k: v.numpy() for k, v in function(**{name: tf.constant(v) for name, v in inputs.items()}).items()}


def controls(count):
    """Greedy, `count` new tokens: a loaded SavedModel has no defaults in Python."""
    whole = {"max_new_tokens": count, "top_k": 0, "no_repeat_ngram": 0, "seed": 0}
    real = {"temperature": 0.0, "top_p": 1.0, "repetition_penalty": 1.0}
    return {k: np.int32(v) for k, v in whole.items()} | {k: np.float32(v) for k, v in real.items()}


def byte_tokens(kind, specials):
    return kind(*learn(TEXTS * 3, 20, specials))


def gpt2(positions=24, **options):
    tokens = byte_tokens(M.GPT2Tokenizer, ("<|endoftext|>",))
    backbone = M.GPT2Backbone(tokens.vocabulary_size(), 1, 2, 16, 32, max_sequence_length=positions)
    return build(lambda: M.GPT2CausalLM(backbone, M.GPT2CausalLMPreprocessor(tokens, **options)))


def bart(positions=32):
    tokens = byte_tokens(M.BartTokenizer, ("<s>", "<pad>", "</s>"))
    backbone = M.BartBackbone(tokens.vocabulary_size(), 1, 2, 16, 32, max_sequence_length=positions)
    preprocessor = M.BartSeq2SeqLMPreprocessor(tokens, encoder_sequence_length=16, decoder_sequence_length=14)
    return build(lambda: M.BartSeq2SeqLM(backbone, preprocessor))


@pytest.fixture(scope="module")
def preset(tmp_path_factory):
    """A classifier's preset folder and its own scores."""
    model = tiny_models.bert_classifier()
    folder = tmp_path_factory.mktemp("preset") / "bert"
    model.save_to_preset(str(folder))
    return folder, tiny_models.keras_scores(model, tiny_models.TEXTS)


# --- what is exported -------------------------------------------------------------------------------------------------


def test_models_of_preset_folders_are_those_that_were_saved(preset, tmp_path):
    folder, scores = preset
    found = tiny_models.keras_scores(load(folder, "classify"), tiny_models.TEXTS)
    np.testing.assert_allclose(found, scores, atol=1e-6)
    model = gpt2()
    model.save_to_preset(str(tmp_path / "story"))
    loaded = load(tmp_path / "story", "generate")
    for own, other in zip(model.weights, loaded.weights, strict=True):
        np.testing.assert_array_equal(own, other)
    assert loaded.preprocessor.tokenizer(TEXTS[0]).tolist() == model.preprocessor.tokenizer(TEXTS[0]).tolist()


def test_lengths_beyond_the_positions_are_cut_and_said(bart_file):
    model = load(bart_file, "translate")
    options = {"max_source_length": None, "max_length": None}
    notes = fit_lengths(model, "translate", options)
    assert options == {"max_length": 32, "max_source_length": 32}
    assert notes[0].startswith(
        "max_length is 32: the preprocessor says 1024, but the model has positions for 32 tokens"
    )
    assert [note.partition(" is")[0] for note in notes] == ["max_length", "max_source_length"]
    options = {"max_length": 14, "max_source_length": 16}
    assert fit_lengths(model, "translate", options) == [] and options == {"max_length": 14, "max_source_length": 16}
    options = {}
    assert len(fit_lengths(gpt2(), "generate", options)) == 1 and options == {"max_length": 24}
    assert fit_lengths(gpt2(sequence_length=20), "generate", {}) == []  # within: the export takes the preprocessor's
    assert fit_lengths(keras.Sequential([keras.layers.Dense(2)]), "classify", {}) == []


def test_lengths_that_saving_lost_are_said(bart_file, preset):
    model = load(bart_file, "translate")
    said = forgotten(model, bart_file, [])
    assert said[0].endswith("Give those it was trained with: --max-length and --max-source-length")
    assert forgotten(model, bart_file, ["max_length"])[0].endswith("trained with: --max-source-length")
    assert forgotten(model, bart_file, ["max_length", "max_source_length"]) == []
    assert forgotten(load(preset[0], "classify"), preset[0], []) == []


@pytest.mark.thorough
def test_a_preset_folder_of_a_classifier(preset, tmp_path, call):
    folder, scores = preset
    code, told, _ = call("export", folder, tmp_path / "1", "--task", "classify", "--labels", "bad,good",
                         "--check", "here", "--no-warmup", "--json")  # fmt: skip
    assert code == 0
    assert json.loads(told)["manifest"]["labels"] == ["bad", "good"]
    np.testing.assert_allclose(served(tmp_path / "1", text=tiny_models.TEXTS)["scores"], scores, atol=1e-5)


@pytest.mark.thorough
def test_a_preset_folder_of_a_language_model_with_fewer_positions_than_its_preprocessor_says(tmp_path, call):
    model = gpt2()  # 24 positions, and a preprocessor that says 1024
    model.save_to_preset(str(tmp_path / "story"))
    code, told, err = call("export", tmp_path / "story", tmp_path / "1", "--task", "generate", "--check", "here",
                           "--option", "max_new_tokens=5", "--no-warmup")  # fmt: skip
    assert code == 0, err
    assert "max_length is 24: the preprocessor says 1024, but the model has positions for 24 tokens" in told
    assert manifest.read(tmp_path / "1")["max_length"] == 24
    texts = ["two dogs", "a man", "hill"]
    found = served(tmp_path / "1", "generate", prompts=texts, **controls(5), stop_strings=np.array([], object))
    tokenizer = model.preprocessor.tokenizer
    for tokens, length, text in zip(found["token_ids"], found["lengths"], texts):
        ids = [tokenizer.start_token_id, *(int(token) for token in tokenizer(text))]
        start = len(ids)
        for _ in range(5):
            logits = model({"token_ids": np.array([ids]), "padding_mask": np.ones([1, len(ids)])})
            ids.append(int(np.argmax(logits[0, -1])))
        assert length and tokens[:length].tolist() == ids[start : start + length]


@pytest.fixture(scope="module")
def bart_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("bart") / "de_en.keras"
    bart().save(path)
    return path


@pytest.mark.slow
def test_a_translator_from_a_file_has_lengths_that_fit(bart_file, tmp_path, call):
    code, told, err = call("export", bart_file, tmp_path / "1", "--task", "translate", "--check", "here", "--no-warmup")
    assert code == 0, err
    assert "max_length is 32: the preprocessor says 1024" in told and "max_source_length is 32:" in told
    assert "Give those it was trained with: --max-length and --max-source-length" in err
    entries = manifest.read(tmp_path / "1")
    assert (entries["max_length"], entries["max_source_length"]) == (32, 32)


@pytest.mark.thorough
def test_a_translator_with_the_lengths_it_was_trained_with(bart_file, tmp_path, call):
    lengths = ("--max-length", 14, "--max-source-length", 16)
    code, told, err = call("export", bart_file, tmp_path / "1", "--task", "translate", *lengths, "--check", "here",
                           "--no-warmup")  # fmt: skip
    assert code == 0 and "note" not in told + err
    model = bart()
    sources = model.preprocessor.generate_preprocess(TEXTS)
    ids, mask = (np.asarray(sources[f"encoder_{name}"]).astype(np.int32) for name in ("token_ids", "padding_mask"))
    assert ids.shape == (3, 16)
    found = served(tmp_path / "1", "generate", texts=TEXTS, **controls(12))
    expected = keras_translate(model, ids, mask, (2, 0), 12)
    for tokens, length, row in zip(found["token_ids"], found["lengths"], expected):
        assert length and tokens[:length].tolist() == row[:length].tolist()


@pytest.mark.thorough
def test_an_encoder_with_a_preprocessor_beyond_its_positions(tmp_path, call):
    tokenizer = M.BertTokenizer(vocabulary=tiny_models.VOCABULARY, lowercase=True)
    backbone = M.BertBackbone(len(tiny_models.VOCABULARY), 1, 2, 16, 24, max_sequence_length=20)
    model = M.BertTextClassifier(backbone, 2, preprocessor=M.BertTextClassifierPreprocessor(tokenizer))  # says 512
    model.save(tmp_path / "m.keras")
    model.save_to_preset(str(tmp_path / "m"))
    for task, source in (("classify", "m.keras"), ("embed", "m.keras"), ("embed", "m")):
        code, told, err = call("export", tmp_path / source, tmp_path / f"{task}-{source}", "--task", task,
                               "--check", "here", "--no-warmup")  # fmt: skip
        assert code == 0, err
        assert "max_length is 20: the preprocessor says " in told


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--option", "max_length=20"], "--option max_length=… is given by --max-length"),
        (["--option", "max-length=20"], "--option max_length=… is given by --max-length"),
        (["--option", 'labels=["a","b"]'], "is given by --labels"),
        (["--option", "precision=int8"], "is given by --precision"),
        (["--option", "check=null"], "is given by --check"),
        (["--option", "warmup=false"], "is given by --warmup or --no-warmup"),
        (["--option", "serving_kit=true"], "is given by --serving-kit"),
        (["--option", "overwrite=true"], "is given by --overwrite"),
        (["--option", "task=embed"], "is given by --task"),
        (["--option", "max_source_length=3"], "is given by --max-source-length"),
        (["--option", "model=x"], "is given by the argument MODEL"),
        (["--option", "path=x"], "is given by the argument DST"),
        (["--option", "pad_to_multiple"], "--option takes NAME=JSON"),
        (["--option", "a=1", "--option", "a=2"], "--option a is given twice"),
        (["--labels", '["a", 1]'], "--labels takes a list of texts"),
        (["--labels", '["a"'], "--labels takes a,b or a JSON list"),
        (["--option", "pad_to_multipel=8"], "Did you mean 'pad_to_multiple'?"),
        (["--max-source-length", "8"], "has no option 'max_source_length'"),
        (["--max-length", "0"], "0 is not in the range x>=1"),
        (["--precision", "flaot32"], "'flaot32' is not one of"),
        (["--check", "thrice"], "'thrice' is not one of"),
        (["--task", "clasify"], "'clasify' is not one of"),
        (["--lables", "a,b"], "No such option '--lables'. Did you mean '--labels'?"),
    ],
)
def test_wrong_calls_end_with_one_line_and_code_2(preset, tmp_path, call, arguments, said):
    code, told, err = call("export", preset[0], tmp_path / "1", "--task", "classify", *arguments)
    assert (code, told) == (2, ""), err
    assert said in err
    assert not (tmp_path / "1").exists()


class Mine(keras.layers.Dense):
    pass


def sources(folder):
    """name -> (what is exported, the task, what is said)"""
    (folder / "text.keras").write_text("no model")
    (folder / "empty").mkdir()
    (folder / "broken").mkdir()
    (folder / "broken" / "config.json").write_text("{")
    (folder / "odd").mkdir()
    (folder / "odd" / "config.json").write_text('{"model_type": "no_such_family"}')
    (folder / "roberta").mkdir()
    (folder / "roberta" / "config.json").write_text('{"model_type": "roberta", "architectures": ["X"]}')
    (folder / "served").mkdir()
    (folder / "served" / "saved_model.pb").touch()
    keras.Sequential([keras.Input([2]), Mine(2)]).save(folder / "mine.keras")
    keras.Sequential([keras.Input([2]), keras.layers.Lambda(lambda x: x + 1)]).save(folder / "lambda.keras")
    return {
        "text.keras": ("classify", "text.keras does not load as a Keras model"),
        "gone.keras": ("classify", "no file"),
        "empty": ("generate", "has no readable config.json (found: nothing)"),
        "broken": ("embed", "has no readable config.json (found: config.json)"),
        "odd": ("generate", "no_such_family"),
        "roberta": ("classify", "is a Hugging Face folder, of which keras-nlp reads no classifier's head"),
        "served": ("classify", "is a SavedModel already"),
        "mine.keras": ("classify", "holds a class of your own, Mine"),
        "lambda.keras": ("classify", "holds Python code (a Lambda layer)"),
    }


def test_what_does_not_load_is_refused_in_one_line(tmp_path):
    for name, (task, said) in sources(tmp_path).items():
        with pytest.raises(InputError) as caught:
            load(tmp_path / name, task)
        assert said in str(caught.value) and "\n" not in str(caught.value), name


def test_a_folder_for_another_task(preset, tmp_path):
    folder, _ = preset
    for task in ("generate", "translate"):
        with pytest.raises(InputError, match=f"which task '{task}' takes: Unable to find a subclass"):
            load(folder, task)
    headless = shutil.copytree(folder, tmp_path / "headless")
    (headless / "task.weights.h5").unlink()
    with pytest.raises(InputError, match="no trained classifier"):
        load(headless, "classify")
    (headless / "task.json").unlink()
    with pytest.raises(InputError, match="holds a backbone, no trained classifier"):
        load(headless, "classify")
    assert load(headless, "embed").backbone.count_params() > 0


def test_typos_are_answered_before_tensorflow_is_loaded(tmp_path):
    calls = [
        ["export", "x.keras", "y", "--task", "clasify"],
        ["export", "x.keras", "y", "--task", "classify", "--precision", "float"],
        ["export", "x.keras", "y", "--task", "classify", "--option", "labels=1"],
        ["export", "x.keras", "y", "--task", "classify"],
        ["simplify", "x", "y", "--target", "onednnn"],
        ["simplify", "x", "y", "--precision", "fp16"],
        ["simplify", "x", "y", "--activations", "int8"],
        ["inspect", "x", "--target", "gpu"],
        ["bench", "generate", "x", "--no-such-option"],
    ]
    program = (
        "import json, sys\nfrom tfvllm import cli\ncodes = []\n"
        f"for call in json.loads({json.dumps(json.dumps(calls))}):\n"
        "    try:\n        cli.main(call)\n    except SystemExit as ended:\n        codes.append(ended.code)\n"
        "print(codes, sorted({'tensorflow', 'keras'} & set(sys.modules)))\n"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=tmp_path)
    assert result.stdout.strip() == f"{[2] * len(calls)} []", result.stderr


def test_choices_are_those_of_the_code():
    from tfvllm.cli import inspect, simplify
    from tfvllm.graph.targets import TARGETS
    from tfvllm.simplifier.engine import PRECISIONS as SIMPLIFIED

    choices = {
        (module.__name__, parameter.name): tuple(parameter.type.choices)
        for module in (inspect, simplify)
        for parameter in module.command.params
        if hasattr(parameter.type, "choices")
    }
    assert choices["tfvllm.cli.simplify", "precision"] == SIMPLIFIED == PRECISIONS
    assert choices["tfvllm.cli.simplify", "target"] == choices["tfvllm.cli.inspect", "target"] == tuple(TARGETS)


def test_numbered_tensors_are_told_as_one():
    of = {"dtype": "float32", "shape": [None]}
    keys = {f"key_{index}": of for index in (0, 1, 10, 2, 4)}
    found = in_runs({**keys, "logits": of, "key_3": {"dtype": "int32", "shape": []}})
    assert [name for name, _ in found] == ["key_0 \u2026 key_2, key_4, key_10", "logits", "key_3"]
