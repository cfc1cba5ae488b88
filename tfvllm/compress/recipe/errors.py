"""What is wrong with a recipe, in one line: the key, what was expected, what was found, the nearest name."""

import difflib
import types
import typing
from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import BaseModel, ValidationError


def blocks(annotation: Any) -> Iterator[type[BaseModel]]:
    """The blocks of keys that a field's annotation allows."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    elif isinstance(annotation, types.UnionType) or typing.get_origin(annotation) is typing.Union:
        for option in typing.get_args(annotation):
            yield from blocks(option)


def explain(
    error: ValidationError, content: dict, model: type[BaseModel], task: str, others: Mapping[str, type[BaseModel]]
) -> str:
    """The first problem as one line: key, what was expected, what was found, the nearest name.

    Args:
        model: the recipe of `task`.
        others: the recipes of the other tasks, whose keys somebody may have meant.
    """
    first: Any = error.errors()[0]
    steps = [step for step in first["loc"] if not (isinstance(step, str) and ("[" in step or step in _TYPE_NAMES))]
    key = ".".join(map(str, steps)) or "recipe"
    if first["type"] == "extra_forbidden":
        names = list(_block_at(model, steps[:-1]).model_fields)
        near = difflib.get_close_matches(str(steps[-1]), names, 1)
        elsewhere = [f"{block}.{steps[-1]}" for block, kind in _all_blocks(model) if steps[-1] in kind.model_fields]
        owners = [name for name, other in others.items() if _knows(other, steps)]
        hint = f"did you mean {near[0]}?" if near else f"did you mean {elsewhere[0]}?" if elsewhere else ""
        if owners:
            hint = f"{key} is for task: {' and '.join(owners)}; this recipe's is {task}."
        return f"{key}: unknown key; expected one of {', '.join(names)}. {hint}".rstrip()
    if first["type"] == "value_error":
        return str(first["ctx"]["error"]) + "."
    found: Any = content
    for step in steps:
        try:
            found = found[step] if isinstance(found, list) else {str(key): value for key, value in found.items()}[step]
        except (KeyError, IndexError, TypeError, AttributeError):
            found = None
            break
    alternatives = [
        _expected(item) for item in error.errors() if item["loc"][: len(first["loc"]) - 1] == first["loc"][:-1]
    ]
    expected = " or ".join(dict.fromkeys(alternatives)) if len(first["loc"]) > len(steps) else _expected(first)
    nearest = ""
    if first["type"] == "literal_error" and isinstance(found, str):
        options = [option.strip("' ") for option in first["ctx"]["expected"].replace(" or ", ",").split(",")]
        match = difflib.get_close_matches(found, options, 1)
        nearest = f"; did you mean {match[0]}?" if match else ""
    return f"{key}: expected {expected}, found {kind(found)}{nearest}"


_TYPE_NAMES = {"int", "float", "str", "bool", "constrained-int", "constrained-float", "constrained-str"}
_EXPECTED = {
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "string_type": "text",
    "bool_type": "true or false",
    "list_type": "a list",
    "dict_type": "a block of keys",
    "model_type": "a block of keys",
    "model_attributes_type": "a block of keys",
    "missing": "a value",
}


def _expected(item: Any) -> str:
    context = item.get("ctx", {})
    match item["type"]:
        case "greater_than_equal":
            return f"at least {context['ge']}"
        case "greater_than":
            return f"more than {context['gt']}"
        case "less_than_equal":
            return f"at most {context['le']}"
        case "less_than":
            return f"less than {context['lt']}"
        case "literal_error":
            return "one of " + context["expected"].replace("'", "").replace(" or ", ", ")
        case "string_pattern_mismatch":
            return "letters, digits, dots, dashes and underscores"
        case "too_short" | "too_long":
            return f"{context.get('min_length', context.get('max_length'))} items"
        case kind:
            return _EXPECTED.get(kind, item["msg"])


def kind(value: Any) -> str:
    """What a value of the file is, in a few words."""
    if value is None:
        return "nothing"
    if isinstance(value, dict):
        return "a block of keys"
    return f"{value!r}" if len(repr(value)) <= 60 else f"{type(value).__name__} of {len(value)} items"


def _block_at(model: type[BaseModel], steps: list) -> type[BaseModel]:
    block = model
    for step in steps:
        block = next(blocks(block.model_fields[step].annotation))
    return block


def _knows(model: type[BaseModel], steps: list) -> bool:
    """Whether a recipe has the key at `steps`."""
    try:
        return str(steps[-1]) in _block_at(model, steps[:-1]).model_fields
    except (KeyError, StopIteration):
        return False


def _all_blocks(model: type[BaseModel]) -> Iterator[tuple[str, type[BaseModel]]]:
    for name, field in model.model_fields.items():
        for block in blocks(field.annotation):
            yield name, block
