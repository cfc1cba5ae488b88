"""Recipes of language models that are refused: one line each, before hours of work where it can be known."""

import keras
import keras_nlp
import pytest

import tfvllm
from tests import tiny_models
from tests.compress.language import GENERATE, TRANSLATE, Run, changed
from tests.generation.models import bart, build, gpt2
from tests.generation.small_tokenizers import text_options
from tfvllm.compress.recipe import parse_recipe, unused_keys
from tfvllm.errors import InputError


@pytest.mark.parametrize(
    ("task", "content", "said"),
    [
        ("generate", {"teacher": {"epoch": 3}}, "teacher.epoch: unknown key; .* did you mean epochs\\?"),
        ("generate", {"teacher": {"model": "x"}}, "teacher.model is for task: classify; this recipe's is generate"),
        ("generate", {"simplify": {}}, "simplify is for task: classify; this recipe's is generate"),
        ("translate", {"data": {"labels": {}}}, "data.labels is for task: classify; this recipe's is translate"),
        ("generate", {"data": {"source": "de"}}, "data.source is for task: translate; this recipe's is generate"),
        ("generate", {"distill": {"targets": "teacher"}}, "distill.targets is for task: translate"),
        ("generate", {"export": {"beams": 2}}, "export.beams is for task: translate; this recipe's is generate"),
        ("translate", {"export": {"max_new_tokens": 2}}, "export.max_new_tokens is for task: generate"),
        ("translate", {"distill": {"augment": 0.1}}, "distill.augment is for task: classify"),
        ("generate", {"student": {"start": "scratch"}}, "student.start is for task: classify"),
        ("translate", {"export": {"max_length": 9}}, "export.max_length is for task: generate"),
        ("translate", {"data": {"source": "de"}}, "expected data.source and data.target together, found one of them"),
        ("generate", {"data": {"path": "x", "synthetic": {}}}, "either data.path or data.synthetic, found both"),
        (
            "generate",
            {"data": {"path": "no/where"}},
            "data.path: expected a folder or a .txt or .jsonl file, found no no",
        ),
        ("translate", {"data": {"path": "no/where"}}, "data.path: expected a folder or a TSV file, found no no/where"),
        ("generate", {"distill": {"rounds": 2, "on_policy": 0.5}}, "distill.rounds or distill.on_policy, found both"),
        ("generate", {"distill": {"logits": 0.0, "on_policy": 0.5}}, "distill.logits above 0 with on_policy"),
        ("generate", {"distill": {"logits": 0.0, "task": 0.0}}, "expected a weight above 0 for logits, task or hidden"),
        ("generate", {"distill": {"hidden_fade": 0.5}}, "expected distill.hidden above 0 with hidden_fade, found 0"),
        ("generate", {"distill": {"divergence": "kl"}}, "distill.divergence: expected one of forward, reverse, jensen"),
        ("generate", {"distill": {"top_k": 0}}, "distill.top_k: expected at least 1, found 0"),
        ("generate", {"distill": {"on_policy": 1.5}}, "distill.on_policy: expected at most 1.0, found 1.5"),
        (
            "generate",
            {"shrink": {}},
            "expected at least one of shrink.heads, shrink.ffn, .* shrink.vocabulary, found none",
        ),
        ("generate", {"prune": {}, "distill": {"epochs": 0}}, "expected a distill step \\(with epochs\\) beside prune"),
        ("generate", {"benchmark": {}}, "expected an export step beside benchmark, found none"),
        (
            "generate",
            {"data": {"max_length": 64}, "export": {}, "benchmark": {"prompt_tokens": 40, "new_tokens": 40}},
            "benchmark.prompt_tokens and new_tokens within export.max_length or data.max_length \\(64 tokens\\)",
        ),
        ("generate", {"data": {"max_length": 4}}, "data.max_length: expected at least 8, found 4"),
        ("generate", {"teacher": {"vocabulary": 200}}, "teacher.vocabulary: expected at least 300, found 200"),
        (
            "generate",
            {"teacher": {"hidden": 30, "heads": 4}},
            "teacher.hidden as a multiple of teacher.heads, found .*30",
        ),
        ("generate", {"teacher": {"preset": "./nowhere"}}, "teacher.preset: .*nowhere"),
        ("generate", {"teacher": {"preset": "no_such_package_here:model"}}, "teacher.preset: .*no_such_package_here"),
        ("generate", {"export": {"precision": "int8"}}, "export.precision: expected one of float32, bfloat16"),
        ("generate", {"student": {"layers": {"encoder": 1, "top": 2}}}, "student.layers.*(encoder|whole number)"),
        ("generate", {"student": {"layers": {"encoder": 1, "decoder": 1}}}, "student.layers of a decoder alone"),
        ("generate", {"seed": -1}, "seed: expected at least 0, found -1"),
        ("generatte", {}, "task: expected one of classify, generate, translate, found 'generatte'; .* generate\\?"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(task, content, said):
    with pytest.raises(InputError, match=said) as caught:
        parse_recipe({"task": task, **content})
    assert "\n" not in str(caught.value) and caught.value.exit_code == 2


def test_what_a_run_does_not_read_is_told():
    recipe = parse_recipe(
        {
            "task": "translate",
            "teacher": {"preset": "bart_base_en", "hidden": 64, "learning_rate": 1e-4},
            "distill": {"on_policy": 0.5, "top_k": 8, "beams": 3, "beta": 0.3},
            "export": {"length_penalty": 0.5},
        }
    )
    assert unused_keys(recipe) == [
        "not used: teacher.hidden (teacher.preset has its own)",
        "not used: teacher.learning_rate (teacher.epochs is 0)",
        "not used: distill.top_k (the teacher judges what the student writes)",
        "not used: distill.beta (distill.divergence is forward)",
        "not used: distill.beams (distill.targets is references)",
        "not used: export.length_penalty (export.beams is 1)",
    ]


# --- what only the models and the data can tell -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def presets(tmp_path_factory):
    """Files of models that are for one task or another, or lack something."""
    folder = tmp_path_factory.mktemp("presets")
    causal, pairs = build(gpt2, layers=1, **text_options("gpt2")), build(bart, layers=1, **text_options("bart"))
    models = {
        "gpt2": causal,
        "bart": pairs,
        "bert": tiny_models.bert_classifier(),
        "silent": build(gpt2, layers=1),
        "layers": keras.Sequential([keras.Input([4]), keras.layers.Dense(2)]),
    }
    for name, model in models.items():
        model.save(folder / f"{name}.keras", include_optimizer=False)
    causal.save_to_preset(str(folder / "preset"))
    return folder


def refused(content, out, **options) -> str:
    with pytest.raises(InputError) as caught:
        Run(content, out, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("task", "preset", "said"),
    [
        ("generate", "bert.keras", "teacher.preset: .*CausalLM"),
        ("generate", "bart.keras", "teacher.preset: BartSeq2SeqLM is sequence to sequence; expected a causal LM"),
        ("translate", "gpt2.keras", "teacher.preset: .*Seq2SeqLM"),
        ("translate", "preset", "teacher.preset: .*Seq2SeqLM"),
        ("generate", "layers.keras", "teacher.preset: .*CausalLM"),
        (
            "generate",
            "silent.keras",
            "teacher.preset: expected a model with its tokenizer, found a GPT2CausalLM without",
        ),
        ("generate", "gone.keras", "teacher.preset: .*gone.keras"),
        (
            "generate",
            "no_preset_of_this_name",
            "teacher.preset: no file no_preset_of_this_name, nor a keras-nlp preset",
        ),
    ],
)
def test_presets_of_another_kind(presets, tmp_path, task, preset, said):
    import re

    where = preset if preset.startswith("no_") else str(presets / preset)
    content = {"task": task, "data": {"synthetic": {"train": 8, "dev": 4, "test": 4}}, "teacher": {"preset": where}}
    assert re.search(said, refused(content, tmp_path / "run"))


def test_a_teacher_with_fewer_positions_than_rows_have(presets, tmp_path):
    few = {"synthetic": {"train": 8, "dev": 4, "test": 4}}
    asked = {"task": "generate", "data": {**few, "max_length": 65}, "teacher": {"preset": str(presets / "gpt2.keras")}}
    found = refused(asked, tmp_path / "a")
    assert found == "data.max_length: expected at most 64 tokens, as the teacher has positions for, found 65."
    found = refused({**asked, "data": {**few, "max_length": 32}, "export": {"max_length": 100}}, tmp_path / "b")
    assert found == "export.max_length: expected at most 64 tokens, as the teacher has positions for, found 100."
    pairs = {**asked, "task": "translate", "teacher": {"preset": str(presets / "bart.keras")}}
    found = refused({**pairs, "data": {**few, "max_length": 32, "max_source_length": 70}}, tmp_path / "c")
    assert "expected at most 64 tokens" in found and "70" in found and found.startswith("data.max_source_length")


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("task", "layers", "said"),
    [
        ("generate", 3, "3"),
        ("generate", [0, 5], "5"),
        ("translate", {"encoder": 1, "decoder": 4}, "4"),
    ],
)
def test_a_student_of_layers_that_its_teacher_has_not(task, layers, said, tmp_path):
    content = changed(
        {"generate": GENERATE, "translate": TRANSLATE}[task],
        data={"synthetic": {"train": 8, "dev": 4, "test": 4}},
        teacher={"epochs": 0},
        student={"layers": layers},
        distill=None,
    )
    found = refused(content, tmp_path / "run")
    assert said in found and found.startswith("student.layers: ")


@pytest.mark.thorough
def test_a_student_with_fewer_layers_on_one_side(tmp_path):
    content = changed(
        TRANSLATE,
        data={"synthetic": {"train": 8, "dev": 4, "test": 4}},
        teacher={"epochs": 0, "layers": 3},
        student={"layers": {"encoder": 1, "decoder": 2}},
        distill=None,
    )
    run = Run(content, tmp_path / "run")
    model = keras.saving.load_model(run.folders["student"] / "model.keras", compile=False)
    structure = tfvllm.models.adapter_for(model).structure(model)
    assert {kind: len(blocks) for kind, blocks in structure.items()} == {"encoder": 1, "decoder": 2}
    assert isinstance(model, keras_nlp.models.BartSeq2SeqLM)


def test_labelled_sentences_are_no_pairs(tmp_path):
    file = tmp_path / "reviews.tsv"
    file.write_text("".join(f"the film was {word}\t{at % 2}\n" for at, word in enumerate(["good", "bad"] * 20)))
    content = changed(TRANSLATE, data={"synthetic": None, "path": str(file)})
    found = refused(content, tmp_path / "run")
    assert "reviews.tsv: expected source<TAB>translation, found 40 rows with nothing but 0, 1 in the second" in found
