"""The matrix: in the quick round a cell of each family, in the thorough one the settings of a few."""

import itertools

import pytest

import tfvllm
from tfvllm.errors import InputError

from . import languages, table
from .families import FAMILIES
from .walk import ENTRIES, SETTINGS, TASKS, Cell, Group, answers_of, every_cell

GROUPS = [(family, task) for family in FAMILIES for task in family.task]
VARIANTS = ("gemma2", "t5_untied")  # of a family that has a cell already
MAIN = [
    (family, next(task for task in ("classify", "generate", "translate") if task in family.task))
    for family in FAMILIES
    if family.name not in VARIANTS
]
# Whose every setting continuous integration walks; of the others it walks the quick cell, and all cells are slow.
SAMPLES = ("bert", "llama")
QUICK = Cell("float32", "portable", "python")


def _id(value) -> str:
    return getattr(value, "name", value)


@pytest.fixture(scope="module")
def walked(tmp_path_factory):
    """(group, what went wrong) of each family's main task in its quick cell; one process answers for all."""
    folder = tmp_path_factory.mktemp("matrix")
    groups = {family.name: Group(family, task, folder) for family, task in MAIN}
    written = {name: group.write(QUICK) for name, group in groups.items()}
    asked = [name for name, path in written.items() if not isinstance(path, Exception)]
    written |= zip(asked, answers_of([(written[name], groups[name].reference.request) for name in asked]))
    return {name: (group, group.judge(QUICK, written[name])) for name, group in groups.items()}


@pytest.mark.parametrize("family, task", MAIN, ids=_id)
def test_a_cell_of_each_family(walked, family, task):
    assert walked[family.name][1] == ""


@pytest.mark.parametrize("family", [family for family, _ in MAIN], ids=_id)
def test_what_is_not_meant_to_work_says_why(walked, family, tmp_path):
    model = walked[family.name][0].model
    for task in TASKS:
        if task not in family.task:
            with pytest.raises(InputError, match=family.no[task]):
                tfvllm.export(model, tmp_path / task, task=task)
            assert not (tmp_path / task).exists()


def test_the_page_holds_every_family_and_task():
    page = table.PAGE.read_text()
    for family, task in itertools.product(FAMILIES, TASKS):
        assert f"| {family.name} | {task} |" in page


def sampled(index: int) -> list[Cell]:
    """Over four groups in a row every setting meets every entry point."""
    return [Cell(*setting, ENTRIES[(index + place) % len(ENTRIES)]) for place, setting in enumerate(SETTINGS[1:])]


@pytest.mark.thorough
@pytest.mark.parametrize("index", [GROUPS.index(pair) for pair in MAIN if pair[0].name in SAMPLES])
def test_settings_and_entry_points(index, tmp_path):
    found = Group(*GROUPS[index], tmp_path).walk(sampled(index))
    assert {cell: problem for cell, problem in found.items() if problem} == {}


@pytest.mark.slow
@pytest.mark.parametrize("index", range(len(GROUPS)), ids=lambda index: "-".join(map(_id, GROUPS[index])))
def test_every_cell(index, tmp_path):
    found = Group(*GROUPS[index], tmp_path).walk(every_cell())
    assert {cell: problem for cell, problem in found.items() if problem} == {}


def test_the_page_of_language_models_holds_all_of_keras_nlps():
    shown = languages.PAGE.read_text(encoding="utf-8")
    known = {line.split("|")[1].strip() for line in shown.splitlines() if line.startswith("| ")} - {"model"}
    assert languages.classes() - set(languages.OTHERS) == known
    assert all(name in shown for name in languages.OTHERS)


@pytest.mark.slow
@pytest.mark.parametrize("make", languages.BUILDERS, ids=lambda make: make.__name__)
def test_every_language_model(make):
    """Two of the thorough tests of generation take the same way."""
    assert f"| {' | '.join(languages.row(make))} |" in languages.PAGE.read_text(encoding="utf-8")
