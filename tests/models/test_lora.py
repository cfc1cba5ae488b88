"""Models with LoRA on their way: exported, shrunk and distilled into, they are what their LoRA makes of them."""

import keras
import numpy as np
import pytest

import tfvllm
from tests import encoders
from tests.distillation.pairs import batch, causal_lm, classifier, lm_batch, seq2seq, seq2seq_batch
from tests.export.test_encoders import asked
from tests.generation import models as causal
from tests.generation.reference import keras_generate, keras_translate
from tests.models import zoo
from tests.pruning.test_lora import merged, with_lora
from tfvllm.families import registry
from tfvllm.families.stored import lora_layers, lora_parts
from tfvllm.savedmodel import parity
from tfvllm.savedmodel.protos import read_proto

losses = tfvllm.losses


def switched_on(model, scale: float = 0.3):
    """keras-nlp's own LoRA, which freezes the rest, with matrices that matter."""
    model.backbone.enable_lora(2)
    random = np.random.default_rng(0)
    for layer, _ in lora_layers(model):
        for part in lora_parts(layer):
            part.assign(random.normal(0, scale, part.shape))
    assert list(lora_layers(model))
    return model


# --- exported ---------------------------------------------------------------------------------------------------------

IDS, MASK = causal.prompts([5, 2, 9])
NEW = {"token_ids": IDS, "padding_mask": MASK, "max_new_tokens": np.int32(6)}


def classify(folder):
    model = encoders.classifier("bert")
    plain = encoders.scores(model, encoders.TEXTS)
    with_lora(model)  # the head's too
    expected = encoders.scores(model, encoders.TEXTS)
    assert np.abs(plain - expected).max() > 0.2
    path = tfvllm.export(model, folder, "classify", warmup=False, check=None)
    return path, asked(encoders.TEXTS)[0], ("scores", expected)


def embed(folder):
    model = switched_on(encoders.classifier("roberta"))
    expected = encoders.embeddings(model.backbone, model.preprocessor, encoders.TEXTS)
    path = tfvllm.export(model, folder, "embed", warmup=False, check=None)
    return path, asked(encoders.TEXTS)[0], ("embeddings", expected)


def generate(folder):
    model = causal.build(causal.llama3)
    plain = keras_generate(model, IDS, MASK, 6)
    expected = keras_generate(switched_on(model), IDS, MASK, 6)
    assert (plain != expected).any() and len(np.unique(expected)) > 3
    path = tfvllm.export(model, folder, "generate", max_length=32, warmup=False, check=None)
    return path, ("serving_default", NEW), ("token_ids", expected)


def translate(folder):
    model = causal.build(causal.bart)
    plain = keras_translate(model, IDS, MASK, [2, 5], 6)
    expected = keras_translate(switched_on(model), IDS, MASK, [2, 5], 6)
    assert (plain != expected).any() and len(np.unique(expected)) > 3
    path = tfvllm.export(model, folder, "translate", max_length=20, start_token_ids=[2, 5], warmup=False, check=None)
    return path, ("serving_default", NEW), ("token_ids", expected)


def by_the_general_path(task):
    """`task` where no reader knows the model: keras-nlp's own step, LoRA and all, inside the loop."""

    def export(folder):
        with pytest.MonkeyPatch.context() as patch, pytest.warns(UserWarning, match="general path"):
            patch.setattr(registry, "READERS", {})
            return task(folder)

    return export


TASKS = [classify, embed, generate, translate, by_the_general_path(generate), by_the_general_path(translate)]


@pytest.mark.parametrize(
    "tasks", [pytest.param([classify], id="classify"), pytest.param(TASKS, id="all", marks=pytest.mark.thorough)]
)
def test_exports_answer_as_the_model_with_its_lora(tasks, tmp_path):
    jobs = [task(tmp_path / str(index)) for index, task in enumerate(tasks)]
    answers = parity.run_fresh_each([(path, [request]) for path, request, _ in jobs])
    for [answer], (_, _, (key, expected)) in zip(answers, jobs, strict=True):
        if expected.dtype.kind == "i":
            np.testing.assert_array_equal(answer[key], expected)
        else:
            np.testing.assert_allclose(answer[key], expected, atol=1e-5)


@pytest.mark.thorough
def test_simplifying_leaves_no_product_of_lora(tmp_path):
    def products(path):
        nodes = [node for f in read_proto(path).meta_graphs[0].graph_def.library.function for node in f.node_def]
        return sum(node.op in ("MatMul", "BatchMatMulV2", "Einsum", "_FusedMatMul") for node in nodes)

    model = encoders.classifier("bert")
    plain = tfvllm.export(model, tmp_path / "plain", "classify", warmup=False, check=None)
    path, request, (key, expected) = classify(tmp_path / "lora")
    assert products(path) > products(plain)
    for name, exported in (("plain", plain), ("lora", path)):
        tfvllm.simplify_saved_model(exported, tmp_path / f"{name}_simplified")
    assert products(tmp_path / "lora_simplified") == products(tmp_path / "plain_simplified")
    [answer] = parity.run_here(tmp_path / "lora_simplified", [request])
    np.testing.assert_allclose(answer[key], expected, atol=1e-5)


@pytest.mark.thorough
def test_files_hold_the_sum(tmp_path):
    model = with_lora(encoders.classifier("bert"))
    features = encoders.features(model.preprocessor, encoders.TEXTS)
    expected = np.asarray(model(features))
    model.save(tmp_path / "model.keras")
    model.save_to_preset(str(tmp_path / "preset"))
    for name in ("model.keras", "preset"):
        loaded = tfvllm.models.load(tmp_path / name, "classify")
        assert not list(lora_layers(loaded))
        np.testing.assert_allclose(np.asarray(loaded(features)), expected, rtol=1e-5, atol=1e-5)


# --- shrunk -----------------------------------------------------------------------------------------------------------


def test_shrunk_it_is_an_ordinary_model_again():
    model, x = switched_on(zoo.build("llama")), zoo.inputs("llama")
    small = tfvllm.shrink(model, ffn=0.0)
    np.testing.assert_allclose(np.asarray(small(x)), np.asarray(model(x)), rtol=1e-5, atol=1e-5)
    assert not list(lora_layers(small)) and len(small.trainable_variables) == len(small.weights)
    assert len(model.trainable_variables) < len(model.weights)  # and the one with LoRA stays as it was


@pytest.mark.thorough
@pytest.mark.parametrize("name", ["llama_tied", "qwen3", "gemma3", "bart", "t5"])
def test_smaller_models_are_those_of_the_merged_model(name):
    model, x = with_lora(zoo.build(name)), zoo.inputs(name)
    copy = merged(model)
    np.testing.assert_allclose(np.asarray(copy(x)), np.asarray(model(x)), rtol=1e-4, atol=1e-4)
    for sizes in ({"heads": 2, "ffn": 8}, {"layers": 2}, {"width": 8}):
        ours, theirs = (np.asarray(tfvllm.shrink(each, **sizes)(x)) for each in (model, copy))
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4)


# --- distilled into ---------------------------------------------------------------------------------------------------

PAIRS = {
    "classifier": (lambda: (classifier(2), classifier(1, heads=4, width=8)), batch),
    "causal_lm": (lambda: (causal_lm(2), causal_lm(1, heads=4, width=8)), lm_batch),
    "seq2seq": (lambda: (seq2seq(2), seq2seq(1, heads=4, width=8)), seq2seq_batch),
}


@pytest.mark.parametrize(
    "name", ["classifier", *(pytest.param(n, marks=pytest.mark.thorough) for n in ("causal_lm", "seq2seq"))]
)
def test_a_student_with_lora_trains_what_is_not_frozen(name, tmp_path):
    models, data = PAIRS[name]
    teacher, student = models()
    switched_on(student, 0.1)
    small = [part for layer, _ in lora_layers(student) for part in lora_parts(layer)]
    trained = {id(variable) for variable in student.trainable_variables}
    assert {id(part) for part in small} <= trained
    # Beside the small matrices: the biases of the same layers, which Keras leaves free, and a classifier's head.
    rest = [v for v in student.trainable_variables if not any(v is part for part in small)]
    assert all("bias" in variable.path or "logits" in variable.path for variable in rest)
    before = {variable.path: np.asarray(variable) for variable in student.variables}
    distiller = tfvllm.Distiller(
        teacher, student, losses={"logits": losses.ForwardKL(temperature=2.0), "hidden": losses.HiddenStates()}
    )
    distiller.compile(keras.optimizers.Adam(0.01))
    x, y, *weight = data(rows=8)
    history = distiller.fit(x, y, sample_weight=weight[0] if weight else None, epochs=4, batch_size=4, verbose=0)
    assert history.history["loss"][-1] < history.history["loss"][0]
    for variable in student.variables:
        moved = not np.array_equal(before[variable.path], np.asarray(variable))
        assert moved == (id(variable) in trained), variable.path
    expected = np.asarray(student(x))
    for model, file in ((distiller, "distiller.keras"), (student, "student.keras")):
        model.save(tmp_path / file)
        loaded = keras.saving.load_model(tmp_path / file, compile=False)
        np.testing.assert_allclose(np.asarray(loaded(x)), expected, rtol=1e-5, atol=1e-5)
    assert tfvllm.pruning.merge_lora(student) == len(small) // 2
    np.testing.assert_allclose(np.asarray(student(x)), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.thorough
def test_a_teacher_with_lora_teaches_what_it_says():
    teacher, student = PAIRS["classifier"][0]()
    switched_on(teacher)
    x, y = batch(8)
    answers = []
    for _ in range(2):
        distiller = tfvllm.Distiller(teacher, student, losses={"logits": losses.ForwardKL()}, task_weight=0.0)
        distiller.compile("sgd")
        answers.append(distiller.evaluate(x, y, return_dict=True, verbose=0)["loss"])
        tfvllm.pruning.merge_lora(teacher)
    assert answers[0] == pytest.approx(answers[1], rel=1e-4)
