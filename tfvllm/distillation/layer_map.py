"""Which teacher layer each student layer follows."""

from collections.abc import Mapping, Sequence
from typing import Any

from tfvllm.errors import InputError

Pairs = list[tuple[int, int]]
LayerMap = str | Sequence[tuple[Any, Any]] | Mapping[str, Any]

NAMES = ("uniform", "last", "skip")


def check_layers(layers: LayerMap, whose: str, *, names: bool = True) -> Any:
    """Returns `layers` in a JSON-able form (pairs as lists). Raises `InputError` where it is no map of layers.

    Args:
        layers: a name, pairs, or `{"encoder": …, "decoder": …}` of these.
        names: whether pairs of layer names will do.
    """
    if isinstance(layers, Mapping):
        unknown = sorted(set(layers) - {"encoder", "decoder"})
        if unknown or not layers:
            raise InputError(f'{whose}: layers by kind are named "encoder" and "decoder", found {sorted(layers)}.')
        return {kind: check_layers(part, whose, names=False) for kind, part in layers.items()}
    if isinstance(layers, str):
        if layers not in NAMES:
            raise InputError(f'{whose}: layers must be "uniform", "last", "skip" or pairs of layers, found {layers!r}.')
        return layers
    pairs = [list(pair) if isinstance(pair, (list, tuple)) else [pair] for pair in layers]
    kinds = (int, str) if names else (int,)
    if not pairs or any(len(p) != 2 or type(p[0]) is not type(p[1]) or not isinstance(p[0], kinds) for p in pairs):
        what = "two numbers or two names of layers" if names else "two numbers of layers"
        raise InputError(f"{whose}: every pair of layers is (teacher's, student's), {what}; found {layers!r}.")
    return pairs


def spread(chosen: int, total: int) -> list[int]:
    """`chosen` of `total` layers, evenly spaced, the last always among them: spread(3, 6) == [1, 3, 5].

    Example:
        >>> tfvllm.distillation.spread(3, 6)
        [1, 3, 5]
    """
    if not 1 <= chosen <= total:
        raise InputError(f"cannot choose {chosen} of {total} layers; expected 1 to {total}.")
    return [-(-(i + 1) * total // chosen) - 1 for i in range(chosen)]


def layer_pairs(layers: str | Sequence[tuple[int, int]], teacher: int, student: int) -> Pairs:
    """Pairs (teacher layer, student layer), numbered from 0, for models of `teacher` and `student` layers.

    Args:
        layers: "uniform": every student layer, with teacher layers evenly spaced up to the last;
            "last": every student layer, with the teacher's last layers (PKD-Last, Sun et al. 2019);
            "skip": every student layer but the last, with each k-th teacher layer, k = teacher // student
            (PKD-Skip, same source: the last layer is left to the logits);
            or pairs (teacher layer, student layer); negative numbers count from the end.
    Raises:
        InputError: for an unknown name, or a layer that does not exist.

    Example:
        >>> tfvllm.distillation.layer_pairs("uniform", teacher=6, student=3)
        [(1, 0), (3, 1), (5, 2)]
    """
    if isinstance(layers, str):
        if layers not in NAMES:
            raise InputError(f'layers must be "uniform", "last", "skip" or pairs of layers, found {layers!r}.')
        if student > teacher:
            raise InputError(
                f'layers="{layers}" needs a teacher at least as deep as the student, found {teacher} and {student} '
                "layers. Give pairs (teacher layer, student layer) instead."
            )
        if layers == "uniform":
            return list(zip(spread(student, teacher), range(student)))
        if layers == "last":
            return [(teacher - student + i, i) for i in range(student)]
        if student == 1:
            raise InputError('layers="skip" leaves out the last layer, and the student has one. Use "uniform".')
        return [((i + 1) * (teacher // student) - 1, i) for i in range(student - 1)]
    return [(_index(t, teacher, "teacher"), _index(s, student, "student")) for t, s in layers]


def _index(index: int, count: int, whose: str) -> int:
    if not isinstance(index, int) or isinstance(index, bool) or not -count <= index < count:
        raise InputError(f"the {whose} has no layer {index!r}; valid are 0 to {count - 1} (or -{count} to -1).")
    return index % count
