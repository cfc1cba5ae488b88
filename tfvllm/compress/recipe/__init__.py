"""The recipe of a compress run: what it may say, checked before any work starts (and before TensorFlow loads)."""

import contextlib
import difflib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from tfvllm.compress.recipe import classify, language
from tfvllm.compress.recipe.blocks import Training
from tfvllm.compress.recipe.classify import ClassifyRecipe
from tfvllm.compress.recipe.errors import blocks, explain, kind
from tfvllm.compress.recipe.language import GenerateRecipe, TranslateRecipe
from tfvllm.errors import InputError
from tfvllm.files import located

__all__ = ["RECIPES", "ClassifyRecipe", "GenerateRecipe", "Recipe", "TranslateRecipe", "parse_recipe",
           "read_recipe", "unused_keys"]  # fmt: skip

Recipe = ClassifyRecipe | GenerateRecipe | TranslateRecipe
# task -> its recipe
RECIPES: dict[str, type[ClassifyRecipe] | type[GenerateRecipe] | type[TranslateRecipe]] = {
    "classify": ClassifyRecipe,
    "generate": GenerateRecipe,
    "translate": TranslateRecipe,
}


def read_recipe(
    path: str | os.PathLike, *, data: str | os.PathLike | None = None, overrides: Sequence[str] = ()
) -> Recipe:
    """Reads and checks a recipe file.

    Args:
        path: a YAML file.
        data: takes the place of `data.path` and of `data.synthetic`.
        overrides: `key=value` texts; the key has dots (`teacher.epochs=1`), the value is YAML.

    Raises:
        InputError: one line that names the key, what was expected and the nearest valid name.

    Example:
        >>> from tfvllm.compress.recipe import read_recipe
        >>> read_recipe("examples/sentiment.yaml", overrides=["teacher.epochs=1"]).teacher.epochs
        1
    """
    content = read_content(path)
    for override in overrides:
        _override(content, override)
    return parse_recipe(with_data(content, data), where=str(path))


def read_content(path: str | os.PathLike) -> dict[str, Any]:
    """What a YAML file says, unchecked. Raises InputError where it is none."""
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        near = difflib.get_close_matches(path.name, [file.name for file in path.parent.glob("*.y*ml")], 1)
        hint = f"; is it {path.parent / near[0]}?" if near else "; expected a YAML recipe"
        raise InputError(f"cannot read the recipe {path}: {error.strerror}{hint}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: expected UTF-8 text, found the byte 0x{error.object[error.start]:02x}.") from error
    try:
        content = yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        raise InputError(f"{path}{where}: expected YAML, found {getattr(error, 'problem', 'an error')}.") from error
    content = {} if content is None else content
    if not isinstance(content, dict):
        raise InputError(f"{path}: expected keys such as data: and teacher:, found {kind(content)}.")
    return content


def with_data(content: dict[str, Any], data: str | os.PathLike | None) -> dict[str, Any]:
    """The content with `data` in place of what it says of where the data are."""
    if data is None:
        return content
    block = content.get("data")
    block = dict(block) if isinstance(block, dict) else {}
    block.pop("synthetic", None)
    return {**content, "data": {**block, "path": str(data)}}


def parse_recipe(content: dict, *, where: str = "recipe") -> Recipe:
    """Checks a recipe given as nested dicts; raises InputError as `read_recipe` does.

    Example:
        >>> from tfvllm.compress.recipe import parse_recipe
        >>> try:
        ...     parse_recipe({"teacher": {"layer": 2}})
        ... except tfvllm.errors.InputError as error:
        ...     print("layers" in str(error))
        True
    """
    task = content.get("task", "classify")
    if not isinstance(task, str) or task not in RECIPES:
        near = difflib.get_close_matches(str(task), RECIPES, 1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise InputError(f"{where}: task: expected one of {', '.join(RECIPES)}, found {kind(task)}{hint}")
    schema = RECIPES[task]
    others = {name: other for name, other in RECIPES.items() if name != task}
    try:
        recipe = schema.model_validate(_floats(content, schema))
    except ValidationError as error:
        raise InputError(f"{where}: {explain(error, content, schema, task, others)}") from None
    if recipe.data.path is None and recipe.data.synthetic is None:
        made = (classify if task == "classify" else language).Synthetic()
        recipe = recipe.model_copy(update={"data": recipe.data.model_copy(update={"synthetic": made})})
    if recipe.data.path is not None and not Path(recipe.data.path).exists():
        raise InputError(f"{where}: data.path: expected a folder or {_FILE[task]}, found no {recipe.data.path}.")
    if isinstance(recipe, ClassifyRecipe):
        _check_files(recipe, where)
    if recipe.teacher.preset is not None:
        try:
            located(recipe.teacher.preset)
        except InputError as error:
            raise InputError(f"{where}: teacher.preset: {error}") from None
    return recipe


_FILE = {"classify": "a TSV file", "generate": "a .txt or .jsonl file", "translate": "a TSV file"}


def _check_files(recipe: ClassifyRecipe, where: str) -> None:
    if recipe.teacher.model is not None and not Path(recipe.teacher.model).exists():
        raise InputError(
            f"{where}: teacher.model: expected a .keras file or a preset folder, found no {recipe.teacher.model}."
        )
    profile = recipe.simplify.profile if recipe.simplify else None
    if profile not in (None, "data") and not Path(profile).is_file():
        raise InputError(f"{where}: simplify.profile: expected data or a JSON-lines file, found no {profile}.")


def unused_keys(recipe: Recipe) -> list[str]:
    """What the recipe says and this run does not read, each with the reason, such as a trained teacher's `epochs`."""
    found = []

    def passed_over(block: str, keys: Sequence[str], reason: str) -> None:
        given = [key for key in keys if key in getattr(recipe, block).model_fields_set]
        if given:
            found.append(f"not used: {', '.join(f'{block}.{key}' for key in given)} ({reason})")

    own = classify if isinstance(recipe, ClassifyRecipe) else language
    for block, keys, reason in own.unused_keys(recipe):
        passed_over(block, keys, reason)
    for block in ("distill", "shrink"):
        if (part := getattr(recipe, block)) and not part.epochs:
            passed_over(block, list(Training.model_fields)[1:], f"{block}.epochs is 0")
    if recipe.data.path is None:
        passed_over("data", ("train", "dev", "test", "dev_share"), "the data are synthetic")
    elif Path(recipe.data.path).is_file():
        passed_over("data", ("train", "dev", "test"), "data.path is one file, which is split")
    elif isinstance(recipe, ClassifyRecipe):
        passed_over("data", ("dev_share",), "data.path is a folder, whose files are taken as they are")
    units = ("heads", "ffn", "width", "experts")
    if recipe.shrink and all(getattr(recipe.shrink, unit, None) is None for unit in units):
        keys = [*Training.model_fields, "importance", "adaptive", "compensate", "calibration"]
        passed_over("shrink", keys, "without structure to remove only the vocabulary is cut")
    return found


def _override(content: dict, override: str) -> None:
    key, equals, value = override.partition("=")
    if not equals or not key.strip():
        raise InputError(f"--set: expected key=value such as teacher.epochs=1, found {override!r}.")
    *parents, last = key.strip().split(".")
    block = content
    for parent in parents:
        if block.get(parent) is None:
            block[parent] = {}
        block = block[parent]
        if not isinstance(block, dict):
            raise InputError(f"--set {override}: expected {parent} to be a block of keys, found {kind(block)}.")
    try:
        block[last] = yaml.safe_load(value)
    except yaml.YAMLError:
        raise InputError(f"--set {override}: expected a YAML value, found {value!r}.") from None


def _floats(content: Any, model: type[BaseModel]) -> Any:
    """Reads `5e-4`, which YAML 1.1 takes for text, as the number it is where a number is expected; `{}` for `step:`."""
    if not isinstance(content, dict):
        return content
    read = {}
    for key, value in content.items():
        field = model.model_fields.get(key)
        if field is not None:
            block = next(blocks(field.annotation), None)
            if value is None and not field.is_required() and field.annotation is block:
                value = {}
            elif block is not None:
                value = _floats(value, block)
            elif isinstance(value, str) and field.annotation is float:
                with contextlib.suppress(ValueError):
                    value = float(value)
        read[key] = value
    return read
