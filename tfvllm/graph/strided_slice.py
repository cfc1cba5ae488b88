"""What a StridedSlice takes of its operand, entry by entry: its masks are read here alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from tfvllm.graph.ir import Node


@dataclass(frozen=True)
class Entry:
    """One entry of `x[begin:end:stride, i, newaxis, ...]`. Of begin and end None where they are not known.

    `kind`: "range"; "index", of which begin is the position, and whose axis goes; "new", a new axis of one element;
    "ellipsis", which stands for all axes that no other entry speaks of.
    """

    kind: Literal["range", "index", "new", "ellipsis"]
    begin: Any  # int or Dim
    end: Any
    stride: Any
    from_start: bool  # begin is of no account: the first element on the side that the stride comes from
    to_end: bool  # end is of no account

    @property
    def whole(self) -> bool:
        """Whether it takes all of its axis, in order."""
        return self.kind == "range" and self.from_start and self.to_end and self.stride == 1

    @property
    def reads_axis(self) -> bool:
        """Whether it speaks of one axis of the operand."""
        return self.kind in ("range", "index")


def entries(node: Node) -> list[Entry] | None:
    """The entries of a StridedSlice; None where its strides are not known."""
    begins, ends, strides = (v.known_value for v in node.inputs[1:4])
    if strides is None:
        return None
    unknown = (None,) * len(strides)
    masks = {m: node.attr(f"{m}_mask", 0) for m in ("ellipsis", "new_axis", "shrink_axis", "begin", "end")}
    found = []
    for i, (begin, end, stride) in enumerate(zip(begins or unknown, ends or unknown, strides)):
        given = {m for m, mask in masks.items() if mask & 1 << i}
        kind: Literal["range", "index", "new", "ellipsis"] = "range"
        if "ellipsis" in given:
            kind = "ellipsis"
        elif "new_axis" in given:
            kind = "new"
        elif "shrink_axis" in given:
            kind = "index"
        found.append(Entry(kind, begin, end, stride, "begin" in given, "end" in given))
    return found
