"""How commands name the tensors of a signature."""

import re
from collections.abc import Mapping
from typing import Any


def in_runs(tensors: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, Mapping[str, Any]]]:
    """(name, what it is), in the order given; numbered ones that are alike are told as one, "key_0 … key_29"."""
    groups: dict[Any, list[tuple[int, str]]] = {}
    for name, what in tensors.items():
        stem, number = re.fullmatch(r"(.*?)(\d*)", name, re.DOTALL).groups()  # type: ignore[union-attr]
        kind = (stem if number else name, bool(number), repr(what))
        groups.setdefault(kind, []).append((int(number or 0), name))
    return [(_told(sorted(members)), tensors[members[0][1]]) for members in groups.values()]


def _told(members: list[tuple[int, str]]) -> str:
    runs: list[list[tuple[int, str]]] = []
    for member in members:
        if runs and member[0] == runs[-1][-1][0] + 1:
            runs[-1].append(member)
        else:
            runs.append([member])
    return ", ".join(run[0][1] if len(run) == 1 else f"{run[0][1]} … {run[-1][1]}" for run in runs)
