"""Which teacher layer each student layer follows."""

from collections.abc import Sequence

from tfvllm.errors import InputError

Pairs = list[tuple[int, int]]


def spread(chosen: int, total: int) -> list[int]:
    """`chosen` of `total` layers, evenly spaced, the last always among them: spread(3, 6) == [1, 3, 5]."""
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
    """
    if isinstance(layers, str):
        if layers not in ("uniform", "last", "skip"):
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
