"""What small integer tensors hold, where it follows from shapes and constants: one rule an op."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tfvllm.graph import dims, op_traits, strided_slice
from tfvllm.graph.ir import Node

_MAX_CONTENT = 64  # longer vectors are data, not shapes


def content_of(node: Node) -> Any:
    rule = _CONTENTS.get(node.op)
    if rule is None:
        return None
    try:
        return rule(node)
    except (IndexError, ValueError, TypeError, KeyError):
        return None


def _content_const(node: Node) -> Any:
    array = node.attr("value")
    if array.ndim == 0:
        return int(array)
    if array.ndim == 1 and array.size <= _MAX_CONTENT:
        return tuple(int(x) for x in array)
    return None


def _need(content: Any) -> Any:
    if content is None:
        raise ValueError("content is unknown")
    return content


def _elementwise(function: Callable) -> Callable[[Node], Any]:
    def rule(node: Node) -> Any:
        a, b = _need(node.inputs[0].known_value), _need(node.inputs[1].known_value)
        if not isinstance(a, tuple) and not isinstance(b, tuple):
            return function(a, b)
        n = max(len(x) for x in (a, b) if isinstance(x, tuple))
        a = a * n if isinstance(a, tuple) and len(a) == 1 else a if isinstance(a, tuple) else (a,) * n
        b = b * n if isinstance(b, tuple) and len(b) == 1 else b if isinstance(b, tuple) else (b,) * n
        return tuple(function(x, y) for x, y in zip(a, b, strict=True))

    return rule


def _content_shape(node: Node) -> Any:
    shape = node.inputs[0].shape
    return None if shape is None else tuple(shape)


def _content_strided_slice(node: Node) -> Any:
    content = _need(node.inputs[0].known_value)
    entries = _need(strided_slice.entries(node))
    entry = entries[0]
    if any(not e.reads_axis for e in entries):
        return None
    if not all(isinstance(x, int) for x in (entry.begin, entry.end, entry.stride)):
        return None
    if entry.kind == "index":
        return content[entry.begin]
    return content[slice(None if entry.from_start else entry.begin, None if entry.to_end else entry.end, entry.stride)]


def _content_gather(node: Node) -> Any:
    content, index = _need(node.inputs[0].known_value), _need(node.inputs[1].known_value)
    return tuple(content[i] for i in index) if isinstance(index, tuple) else content[index]


def _content_concat(node: Node) -> Any:
    return tuple(x for v in node.inputs[:-1] for x in _need(v.known_value))


def _content_pack(node: Node) -> Any:
    parts = [_need(v.known_value) for v in node.inputs]
    return None if any(isinstance(p, tuple) for p in parts) else tuple(parts)


def _content_prod(node: Node) -> Any:
    content = _need(node.inputs[0].known_value)
    axes = _need(node.inputs[1].known_value)
    if axes in (0, (0,), -1, (-1,)) and not node.attr("keep_dims", False):
        return dims.product(content)
    return content if axes == () else None


def _content_slice(node: Node) -> Any:
    content, begin, size = (_need(v.known_value) for v in node.inputs[:3])
    n = len(content) - begin[0] if size[0] == -1 else size[0]
    return content[begin[0] : begin[0] + n]


def _content_reshape(node: Node) -> Any:
    content, shape = _need(node.inputs[0].known_value), _need(node.inputs[1].known_value)
    if shape == ():
        return content[0] if isinstance(content, tuple) else content
    if len(shape) == 1:
        return content if isinstance(content, tuple) else (content,)
    return None


def _content_expand(node: Node) -> Any:
    content = _need(node.inputs[0].known_value)
    return None if isinstance(content, tuple) else (content,)


def _content_squeeze(node: Node) -> Any:
    content = _need(node.inputs[0].known_value)
    return content[0] if isinstance(content, tuple) and len(content) == 1 else None


_CONTENTS: dict[str, Callable[[Node], Any]] = {
    "Const": _content_const,
    "Shape": _content_shape,
    "Size": lambda n: dims.product(n.inputs[0].shape),
    "Rank": lambda n: len(n.inputs[0].shape),
    "StridedSlice": _content_strided_slice,
    "GatherV2": _content_gather,
    "ConcatV2": _content_concat,
    "Pack": _content_pack,
    "Prod": _content_prod,
    "Slice": _content_slice,
    "Reshape": _content_reshape,
    "ExpandDims": _content_expand,
    "Squeeze": _content_squeeze,
    "AddV2": _elementwise(dims.add),
    "Add": _elementwise(dims.add),
    "Sub": _elementwise(dims.subtract),
    "Mul": _elementwise(dims.multiply),
    "FloorDiv": _elementwise(dims.divide),
    "Maximum": _elementwise(dims.maximum),
    "Minimum": _elementwise(dims.minimum),
    **dict.fromkeys(op_traits.IDENTITIES | {"Cast"}, lambda n: n.inputs[0].known_value),
}
