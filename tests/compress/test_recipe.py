"""Recipes are checked before any work: one line that names the key, what was expected, the nearest valid name."""

from pathlib import Path

import pytest

from tfvllm.compress.recipe import parse_recipe, read_recipe, unused_keys
from tfvllm.errors import InputError

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"teecher": {}}, "teecher: unknown key; expected one of name, task, .* did you mean teacher\\?"),
        ({"teacher": {"epoch": 3}}, "teacher.epoch: unknown key; .* did you mean epochs\\?"),
        ({"sparsity": 0.5}, "sparsity: unknown key; .* did you mean prune.sparsity\\?"),
        ({"teacher": {"epochs": "three"}}, "teacher.epochs: expected a whole number, found 'three'"),
        ({"teacher": {"epochs": 3.5}}, "teacher.epochs: expected a whole number, found 3.5"),
        ({"teacher": {"epochs": True}}, "teacher.epochs: expected a whole number, found True"),
        ({"teacher": {"learning_rate": -1}}, "teacher.learning_rate: expected more than 0.0, found -1"),
        ({"teacher": {"dropout": 1}}, "teacher.dropout: expected less than 1.0, found 1"),
        ({"teacher": [1]}, "teacher: expected a block of keys, found \\[1\\]"),
        ({"student": {"layers": "x"}}, "student.layers: expected a whole number or a list, found 'x'"),
        ({"student": {"hidden": 64}}, "expected no student.hidden with start: teacher"),
        ({"shrink": {}}, "expected at least one of shrink.heads, shrink.ffn"),
        ({"simplify": {"precision": "int8"}}, "expected simplify.target onednn for precision int8, found portable"),
        (
            {"shrink": {"ffn": 0.5, "importance": "tailor"}},
            "shrink.importance: .* found 'tailor'; did you mean taylor\\?",
        ),
        ({"prune": {}}, "expected a distill step"),
        (
            {"distill": {}, "prune": {"begin": 0.8, "end": 0.2}},
            "expected prune.begin below prune.end, found 0.8 and 0.2",
        ),
        ({"distill": {"logits": 0.0, "task": 0.0}}, "expected a weight above 0"),
        ({"distill": {"hidden_fade": 0.5}}, "expected distill.hidden above 0 with hidden_fade"),
        ({"simplify": {}}, "expected an export step beside simplify"),
        ({"benchmark": {}}, "expected an export step beside benchmark"),
        ({"export": {}, "benchmark": {"shapes": [[1, 2, 3]]}}, "benchmark.shapes.0: expected 2 items"),
        ({"export": {}, "benchmark": {"shapes": [[1, 500]]}}, "within data.max_length \\(64 tokens\\), found 500"),
        ({"data": {"path": "nowhere/at/all"}}, "data.path: expected a folder or a TSV file, found no nowhere/at/all"),
        ({"data": {"path": "x", "synthetic": {}}}, "either data.path or data.synthetic, found both"),
        ({"data": {"labels": {0: 1}}}, "data.labels.0: expected text, found 1"),
        (
            {"teacher": {"model": "nowhere.keras"}},
            "teacher.model: expected a .keras file .*, found no nowhere.ker",
        ),
        ({"teacher": {"preset": "./nowhere"}}, "teacher.preset: no file ./nowhere; expected .* a preset folder"),
        ({"teacher": {"preset": "no_such_package_here:model"}}, "no package no_such_package_here is installed"),
        (
            {"export": {}, "simplify": {"profile": "gone.jsonl"}},
            "simplify.profile: expected data or a JSON-lines file, found no gone.jsonl",
        ),
        ({"name": "a/b"}, "name: expected letters, digits"),
        (
            {"task": "generat"},
            "task: expected one of classify, generate, translate, found 'generat'; did you mean generate\\?",
        ),
    ],
)
def test_what_is_wrong_is_said_in_one_line(content, said):
    with pytest.raises(InputError, match=said) as caught:
        parse_recipe(content)
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 2


def test_steps_that_are_left_out_are_not_done_and_blocks_have_defaults():
    recipe = parse_recipe({"teacher": None, "distill": {}, "prune": None})
    assert (
        recipe.student is recipe.prune is recipe.shrink is recipe.export is recipe.simplify is recipe.benchmark is None
    )
    assert recipe.distill.temperature == 2.0
    assert recipe.data.synthetic.train == 24000  # no source named: synthetic reviews


def test_numbers_that_yaml_takes_for_text_are_read(tmp_path):
    file = tmp_path / "r.yaml"
    file.write_text("teacher: {learning_rate: 5e-5}\ndata: {labels: {0: bad, 1: good}}\n")
    recipe = read_recipe(file)
    assert recipe.teacher.learning_rate == 5e-5
    assert recipe.data.labels == {"0": "bad", "1": "good"}


def test_overrides_and_data(tmp_path):
    file = tmp_path / "r.yaml"
    file.write_text("data: {synthetic: {train: 10}}\nprune: {}\ndistill: {}\n")
    recipe = read_recipe(file, data=tmp_path, overrides=["teacher.epochs=7", "prune=null", "student.layers=[0, 2]"])
    assert recipe.data.path == str(tmp_path) and recipe.data.synthetic is None
    assert recipe.teacher.epochs == 7 and recipe.prune is None and recipe.student.layers == [0, 2]
    for override, said in (
        ("epochs", "expected key=value"),
        ("teacher.epoch=1", "did you mean epochs"),
        ("name.x=1", "name: expected a block of keys|unknown key|expected text"),
    ):
        with pytest.raises(InputError, match=said):
            read_recipe(file, overrides=[override])


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("teacher: [1", "line 1: expected YAML|line 2: expected YAML"),
        ("- a\n- b\n", "expected keys such as data: and teacher:"),
        ("teacher: {epochs: 1}\n\tstudent: {}\n", "line 2: expected YAML"),
    ],
)
def test_files_that_are_no_recipe(tmp_path, text, said):
    file = tmp_path / "r.yaml"
    file.write_text(text)
    with pytest.raises(InputError, match=said):
        read_recipe(file)


def test_a_missing_recipe_names_the_nearest_file(tmp_path):
    (tmp_path / "sentiment.yaml").write_text("")
    with pytest.raises(InputError, match=r"cannot read the recipe .*sentimnt.yaml: .*is it .*sentiment.yaml\?"):
        read_recipe(tmp_path / "sentimnt.yaml")


def test_an_empty_recipe_is_all_defaults(tmp_path):
    (tmp_path / "r.yaml").write_text("")
    assert read_recipe(tmp_path / "r.yaml").teacher.layers == 4


@pytest.mark.parametrize("file", sorted(EXAMPLES.glob("*.yaml")), ids=lambda file: file.name)
def test_the_shipped_recipes_are_valid(file, tmp_path):
    recipe = read_recipe(file, data=tmp_path, overrides=["teacher.preset=null"])
    assert recipe.export and recipe.benchmark and recipe.distill
    assert (recipe.simplify is not None) == (recipe.task == "classify")


def test_a_preset_inside_an_installed_package():
    assert parse_recipe({"teacher": {"preset": "tfvllm:assets"}}).teacher.preset == "tfvllm:assets"
    with pytest.raises(InputError, match=r"teacher\.preset: tfvllm:nowhere: expected one file or folder in tfvllm"):
        parse_recipe({"teacher": {"preset": "tfvllm:nowhere"}})
    parse_recipe({"teacher": {"preset": "bert_tiny_en_uncased"}})  # a keras-nlp name is left to keras-nlp


def test_what_this_run_does_not_read_is_said(tmp_path):
    (tmp_path / "t.keras").touch()
    (tmp_path / "d.tsv").touch()
    model = {"model": str(tmp_path / "t.keras"), "epochs": 3, "layers": 2}
    assert unused_keys(parse_recipe({"teacher": model})) == [
        "not used: teacher.epochs, teacher.layers (teacher.model is taken as it is)"
    ]
    assert unused_keys(parse_recipe({"teacher": {"preset": "bert_tiny_en_uncased", "hidden": 8, "epochs": 2}})) == [
        "not used: teacher.hidden (teacher.preset has its own)"
    ]
    content = {
        "data": {"path": str(tmp_path / "d.tsv"), "dev": "d.tsv", "dev_share": 0.2},
        "distill": {"epochs": 0, "batch_size": 8, "temperature": 3.0},
        "shrink": {"vocabulary": "seen", "ffn": None, "epochs": 2},
    }
    assert [line.partition(" (")[0] for line in unused_keys(parse_recipe(content))] == [
        "not used: distill.batch_size",
        "not used: data.dev",
        "not used: shrink.epochs",
    ]
    for source, unused in (
        ({"synthetic": {}}, "data.test, data.dev_share (the data are synthetic)"),
        ({"path": str(tmp_path)}, "data.dev_share (data.path is a folder, whose files are taken as they are)"),
    ):
        recipe = parse_recipe({"data": {**source, "dev_share": 0.2, "test": "t.tsv"}})
        assert unused_keys(recipe) == [f"not used: {unused}"]
    assert unused_keys(parse_recipe({})) == []
