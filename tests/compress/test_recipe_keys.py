"""Every key of a recipe is used: none is only read from the file and hashed."""

import json
import typing

import pytest
import yaml

from tests.compress.conftest import write_data
from tfvllm import compress, data
from tfvllm.compress.recipe import parse_recipe
from tfvllm.compress.recipe.blocks import Block
from tfvllm.compress.recipe.classify import ClassifyRecipe, Synthetic
from tfvllm.serving import kit


def keys(block=ClassifyRecipe) -> set[tuple[str, str]]:
    """(block's class, key) of the whole schema, but keys that have one value only: checking them is all there is."""
    found = set()
    for name, field in block.model_fields.items():
        if len(typing.get_args(field.annotation)) != 1 or typing.get_origin(field.annotation) is not typing.Literal:
            found.add((block.__name__, name))
        for part in (field.annotation, *getattr(field.annotation, "__args__", ())):
            if isinstance(part, type) and issubclass(part, Block):
                found |= keys(part)
    return found


@pytest.fixture
def used(monkeypatch):
    """Collects the keys that code reads from a checked recipe; what is dumped as a whole does not count."""
    read = set()

    def spy(self, name):
        if name in type(self).model_fields:
            read.add((type(self).__name__, name))
        return object.__getattribute__(self, name)

    monkeypatch.setattr(Block, "__getattribute__", spy, raising=False)
    return read


def test_the_spy_sees_reads_and_not_dumps(used):
    recipe = parse_recipe({"export": {"serving_kit": True}})
    used.clear()
    recipe.model_dump()
    assert used == set()
    assert recipe.export.serving_kit
    assert used == {("ClassifyRecipe", "export"), ("Export", "serving_kit")}
    assert {
        ("Export", "serving_kit"),
        ("Teacher", "labels"),
        ("Benchmark", "shapes"),
        ("ClassifyRecipe", "seed"),
    } <= keys()


def test_synthetic_keys_are_the_makers_own(tmp_path):
    """They are handed on as a whole."""
    asked = {"train": 12, "dev": 6, "test": 4, "seed": 3}
    assert set(Synthetic.model_fields) == set(asked)
    text = data.load(data.write_synthetic(tmp_path / "a", **asked))
    assert [len(split) for split in (text.train, text.dev, text.test)] == [12, 6, 4]
    assert data.load(data.write_synthetic(tmp_path / "b", **{**asked, "seed": 4})).digest() != text.digest()


@pytest.mark.slow
def test_every_key_is_used(used, tmp_path, monkeypatch):
    monkeypatch.setattr(kit, "measure", lambda directory, seconds=0: None)
    folder = write_data(tmp_path / "data")
    once = {"epochs": 1, "batch_size": 64}
    teacher = {"layers": 2, "hidden": 16, "heads": 2, "ffn": 16, "vocabulary": 120, **once}
    whole = {
        "name": "walked",
        "data": {"path": str(folder), "labels": {"0": "no", "1": "yes"}, "max_length": 16},
        "teacher": {**teacher, "labels": ["yes", "no"]},
        "student": {"layers": 1},
        "distill": {**once, "hidden": 0.1, "hidden_fade": 0.5, "augment": 0.1},
        "prune": {},
        "shrink": {**once, "ffn": 0.5, "vocabulary": "seen", "calibration": 64},
        "export": {"serving_kit": True},
        "simplify": {"profile": "data"},
        "benchmark": {"shapes": [[1, 8]], "repeats": 3},
    }
    compress.run(parse_recipe(whole), tmp_path / "whole")
    scratch = {
        "data": {"path": str(folder), "max_length": 16},
        "teacher": {**teacher, "epochs": 0},
        "student": {"start": "scratch", "layers": 1, "heads": 1, "hidden": 8, "ffn": 8},
    }
    compress.run(parse_recipe(scratch), tmp_path / "scratch")
    assert keys() - used - {("Synthetic", key) for key in Synthetic.model_fields} == set()

    served = tmp_path / "whole" / "saved_model"
    assert 'name: "walked"' in (served / kit.FOLDER / "models.config").read_text()
    service = yaml.safe_load((served / kit.FOLDER / "inference-service.yaml").read_text())
    assert service["metadata"]["name"] == "walked"
    assert not (tmp_path / "whole" / "teacher" / kit.FOLDER).exists()
    document = json.loads((served / "1" / "assets.extra" / "tfvllm.json").read_text())
    assert document["labels"] == ["yes", "no"]
    assert document["steps"][-1]["again"].endswith("tfvllm compress RECIPE.yaml --data DATA")


def test_a_kit_goes_with_the_model_it_was_written_for(tmp_path, text_export, monkeypatch):
    from tfvllm.compress import artifacts
    from tfvllm.compress.console import Console
    from tfvllm.compress.steps import Workspace

    monkeypatch.setattr(kit, "measure", lambda directory, seconds=0: None)
    workspace = Workspace(tmp_path, Console(quiet=True))
    step = {"step": "compress"}
    artifacts.publish(workspace, text_export, "saved_model", step, kit_for="mine")
    assert 'name: "mine"' in (tmp_path / "saved_model" / kit.FOLDER / "models.config").read_text()
    artifacts.publish(workspace, text_export, "saved_model", step)  # the same folder, without a kit this time
    assert not (tmp_path / "saved_model" / kit.FOLDER).exists()
    assert (tmp_path / "saved_model" / "1" / "saved_model.pb").is_file()
