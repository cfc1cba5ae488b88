"""The shapes of an op's outputs from those of its inputs, unknown sizes as symbols: one rule an op."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from tfvllm.graph import dims, op_traits, reductions, strided_slice
from tfvllm.graph.ir import Node, Value
from tfvllm.graph.ops import INTEGERS


def _same(node: Node) -> tuple | None:
    return node.inputs[0].shape


def _broadcast(node: Node) -> tuple | None:
    shape = node.inputs[0].shape
    for value in node.inputs[1:]:
        shape = dims.broadcast_shapes(shape, value.shape)
    return shape


def _matmul(node: Node) -> tuple | None:
    a, b = node.inputs[0].shape, node.inputs[1].shape
    if a is None or b is None:
        return None
    m = a[1] if node.attr("transpose_a") else a[0]
    n = b[0] if node.attr("transpose_b") else b[1]
    return (m, n)


def _quantized_matmul(node: Node) -> list | None:
    product = _matmul(node)
    return None if product is None else [product, *[()] * (len(node.outputs) - 1)]


def _quantize(node: Node) -> list:
    range_shape = () if node.attr("axis", -1) == -1 else None
    return [node.inputs[0].shape, range_shape, range_shape]


def _bitcast(node: Node) -> tuple | None:
    return node.inputs[0].shape if node.inputs[0].dtype.size == node.output.dtype.size else None


def _batch_matmul(node: Node) -> tuple | None:
    a, b = node.inputs[0].shape, node.inputs[1].shape
    if a is None or b is None:
        return None
    m = a[-1] if node.attr("adj_x") else a[-2]
    n = b[-2] if node.attr("adj_y") else b[-1]
    batch = dims.broadcast_shapes(a[:-2], b[:-2])
    return None if batch is None else (*batch, m, n)


def _reshape(node: Node) -> tuple | None:
    return reshape_shape(node.inputs[0].shape, node.inputs[1].known_value)


def reshape_shape(shape: tuple | None, target: Any) -> tuple | None:
    """The result of reshaping `shape` to the content `target` (a tuple of sizes; -1 once for the rest)."""
    if not isinstance(target, tuple):
        return None
    if -1 not in target:
        return tuple(target)
    if shape is None:
        return None
    at = target.index(-1)
    rest = dims.product(target[:at] + target[at + 1 :])
    return (*target[:at], dims.divide(dims.product(shape), rest), *target[at + 1 :])


def _transpose(node: Node) -> tuple | None:
    shape, perm = node.inputs[0].shape, node.inputs[1].known_value
    return None if shape is None or perm is None else tuple(shape[i] for i in perm)


def _reduce(node: Node) -> tuple | None:
    before = reductions.axes_before(node)
    return None if before is None else tuple(1 if axis is None else node.inputs[0].shape[axis] for axis in before)


def _arg_reduce(node: Node) -> tuple | None:
    shape, axis = node.inputs[0].shape, node.inputs[1].known_value
    if shape is None or axis is None:
        return None
    return tuple(d for i, d in enumerate(shape) if i != axis % len(shape))


def _concat(node: Node) -> tuple | None:
    shapes = [v.shape for v in node.inputs[:-1]]
    axis = node.inputs[-1].known_value
    if axis is None or any(s is None for s in shapes):
        return None
    axis %= len(shapes[0])
    total: Any = 0
    for shape in shapes:
        total = dims.add(total, shape[axis])
    first = list(shapes[0])
    first[axis] = total
    return tuple(first)


def _pack(node: Node) -> tuple | None:
    shape = node.inputs[0].shape
    if shape is None:
        return None
    axis = node.attr("axis", 0) % (len(shape) + 1)
    return (*shape[:axis], len(node.inputs), *shape[axis:])


def _unpack(node: Node) -> list | None:
    shape = node.inputs[0].shape
    if shape is None:
        return None
    axis = node.attr("axis", 0) % len(shape)
    return [shape[:axis] + shape[axis + 1 :]] * len(node.outputs)


def _split(node: Node) -> list | None:
    axis, shape = node.inputs[0].known_value, node.inputs[1].shape
    if shape is None or axis is None:
        return None
    axis %= len(shape)
    part = dims.divide(shape[axis], len(node.outputs))
    return [(*shape[:axis], part, *shape[axis + 1 :])] * len(node.outputs)


def _split_v(node: Node) -> list | None:
    shape, sizes, axis = node.inputs[0].shape, node.inputs[1].known_value, node.inputs[2].known_value
    if shape is None or axis is None or sizes is None or -1 in sizes:
        return None
    axis %= len(shape)
    return [(*shape[:axis], size, *shape[axis + 1 :]) for size in sizes]


def strided_slice_shape(node: Node) -> tuple | None:
    """The shape of a StridedSlice with constant strides."""
    shape, entries = node.inputs[0].shape, strided_slice.entries(node)
    if shape is None or entries is None:
        return None
    spanned = len(shape) - sum(e.reads_axis for e in entries)  # axes that an ellipsis stands for
    result: list = []
    axis = 0
    for i, entry in enumerate(entries):
        if entry.kind == "ellipsis":
            result.extend(shape[axis : axis + spanned])
            axis += spanned
        elif entry.kind == "new":
            result.append(1)
        else:
            if entry.kind == "range":
                found = _range_size(shape[axis], entry)
                result.append(dims.symbol(f"{node.name}:{i}") if found is None else found)
            axis += 1
    return (*result, *shape[axis:])


def _range_size(size: Any, entry: strided_slice.Entry) -> Any:
    """How many of `size` positions an entry takes; None where that follows from nothing that is known."""
    begin = None if entry.from_start else entry.begin
    end = None if entry.to_end else entry.end
    free_begin = entry.from_start or begin == 0
    if entry.stride == 1 and free_begin and (entry.to_end or end == size):
        return size
    if isinstance(size, int) and (free_begin or isinstance(begin, int)) and (entry.to_end or isinstance(end, int)):
        return len(range(*slice(begin, end, entry.stride).indices(size)))
    if entry.stride == 1 and free_begin and end is not None and not (isinstance(end, int) and end < 0):
        return dims.minimum(end, size) if end != size else size
    return None


def _slice(node: Node) -> tuple | None:
    shape, begin, size = node.inputs[0].shape, node.inputs[1].known_value, node.inputs[2].known_value
    if size is None:
        return None
    result = []
    for i, wanted in enumerate(size):
        if wanted == -1:
            if shape is None or begin is None:
                return None
            wanted = dims.subtract(shape[i], begin[i])
        result.append(wanted)
    return tuple(result)


def _gather(node: Node) -> tuple | None:
    params, indices, axis = node.inputs[0].shape, node.inputs[1].shape, node.inputs[2].known_value
    if params is None or indices is None or axis is None:
        return None
    axis %= len(params)
    batch = node.attr("batch_dims", 0)
    return (*params[:axis], *indices[batch:], *params[axis + 1 :])


def _expand_dims(node: Node) -> tuple | None:
    shape, axis = node.inputs[0].shape, node.inputs[1].known_value
    if shape is None or axis is None:
        return None
    axis = axis[0] if isinstance(axis, tuple) else axis
    axis %= len(shape) + 1
    return (*shape[:axis], 1, *shape[axis:])


def _squeeze(node: Node) -> tuple | None:
    shape, axes = node.inputs[0].shape, node.attr("squeeze_dims", [])
    if shape is None or (not axes and any(not isinstance(d, int) for d in shape)):
        return None
    drop = {a % len(shape) for a in axes} if axes else {i for i, d in enumerate(shape) if d == 1}
    return tuple(d for i, d in enumerate(shape) if i not in drop)


def einsum_shape(equation: str, shapes: Sequence[tuple | None]) -> tuple | None:
    """The shape of an einsum without ellipsis."""
    left, _, right = equation.replace(" ", "").partition("->")
    if "." in equation or any(s is None for s in shapes):
        return None
    sizes: dict[str, Any] = {}
    for labels, shape in zip(left.split(","), shapes):
        for label, size in zip(labels, shape, strict=True):  # type: ignore[arg-type]
            if not isinstance(sizes.get(label), int):
                sizes[label] = size
    return tuple(sizes[label] for label in right)


def _content_as_shape(position: int) -> Callable[[Node], tuple | None]:
    def rule(node: Node) -> tuple | None:
        content = node.inputs[position].known_value
        return tuple(content) if isinstance(content, tuple) and -1 not in content else None

    return rule


def _tile(node: Node) -> tuple | None:
    shape, times = node.inputs[0].shape, node.inputs[1].known_value
    return None if shape is None or times is None else tuple(map(dims.multiply, shape, times))


def _range(node: Node) -> tuple | None:
    start, limit, delta = (_whole_number(v) for v in node.inputs)
    return (dims.subtract(limit, start),) if delta == 1 and start is not None and limit is not None else None


def _whole_number(value: Value) -> Any:
    """The content of an integer scalar, also where a cast made it floating: Keras counts positions in float32."""
    if value.dtype in INTEGERS:
        return value.known_value
    if value.node.op == "Cast":
        return value.node.inputs[0].known_value
    if value.node.op == "Const":
        array = value.node.attr("value")
        return int(array) if array.ndim == 0 and array.dtype.kind == "f" and float(array).is_integer() else None
    return None


def _one_hot(node: Node) -> tuple | None:
    shape, depth = node.inputs[0].shape, node.inputs[1].known_value
    return (*shape, depth) if node.attr("axis", -1) == -1 and shape is not None and depth is not None else None


def _conv(node: Node) -> tuple | None:
    """Conv2D and its kin on [batch, height, width, channels]; pooling where there is no kernel among the inputs."""
    x = node.inputs[0].shape
    if x is None or len(x) != 4 or node.attr("data_format", "NHWC") != "NHWC":
        return None
    if node.op in ("MaxPool", "AvgPool"):
        window, channels = node.attr("ksize")[1:3], x[3]
    else:
        kernel = node.inputs[1].shape
        if kernel is None:
            return None
        window = kernel[:2]
        channels = dims.multiply(kernel[2], kernel[3]) if "Depthwise" in node.op else kernel[3]
    strides, dilations = node.attr("strides"), node.attr("dilations", [1, 1, 1, 1])
    explicit = node.attr("explicit_paddings") or []
    spatial = []
    for axis in (1, 2):
        reach = (window[axis - 1] - 1) * dilations[axis]
        total = explicit[2 * axis] + explicit[2 * axis + 1] if node.attr("padding") == "EXPLICIT" else 0
        if node.attr("padding") == "SAME":
            steps = dims.add(x[axis], strides[axis] - 1)
        else:
            steps = dims.add(x[axis], total - reach + strides[axis] - 1)
        spatial.append(dims.divide(steps, strides[axis]))
    return (x[0], *spatial, channels)


def _pad(node: Node) -> tuple | None:
    shape, pads = node.inputs[0].shape, node.inputs[1].node
    if shape is None or pads.op != "Const":
        return None
    return tuple(dims.add(d, int(before + after)) for d, (before, after) in zip(shape, pads.attr("value")))


def _batch_norm(node: Node) -> list | None:
    x, scale = node.inputs[0].shape, node.inputs[1].shape
    return None if x is None else [x, *[scale] * (len(node.outputs) - 1)]


def _const(node: Node) -> tuple:
    return tuple(np.shape(node.attr("value")))


SHAPES: dict[str, Callable[[Node], Any]] = {
    "Const": _const,
    # Of several operands, element by element, too; but nothing moves through them.
    **dict.fromkeys(
        (
            *("Div", "FloorDiv", "FloorMod", "Mod", "DivNoNan", "MulNoNan", "Xdivy", "Xlogy", "Atan2"),
            *("BitwiseAnd", "BitwiseOr", "BitwiseXor", "LeftShift", "RightShift"),
        ),
        _broadcast,
    ),
    **dict.fromkeys(op_traits.ELEMENTWISE, _broadcast),
    **dict.fromkeys(op_traits.ALONG_LAST | op_traits.IDENTITIES, _same),
    **dict.fromkeys(("Cumsum", "Cumprod", "CheckNumerics", "EnsureShape", "ReverseV2"), _same),
    **dict.fromkeys(op_traits.REDUCTIONS | op_traits.LOGICAL_REDUCTIONS, _reduce),
    **dict.fromkeys(op_traits.MATMULS | {"_MklNativeFusedMatMul"}, _matmul),
    **dict.fromkeys(op_traits.BATCH_MATMULS | {"BatchMatMulV3", "_MklFusedBatchMatMulV2"}, _batch_matmul),
    "_QuantizedMatMul": _quantized_matmul,
    "QuantizeV2": _quantize,
    "Bitcast": _bitcast,
    "Einsum": lambda n: einsum_shape(n.attr("equation"), [v.shape for v in n.inputs]),
    "Reshape": _reshape,
    "Transpose": _transpose,
    "ConcatV2": _concat,
    "Pack": _pack,
    "Unpack": _unpack,
    "Split": _split,
    "SplitV": _split_v,
    "StridedSlice": strided_slice_shape,
    "Slice": _slice,
    "GatherV2": _gather,
    "ExpandDims": _expand_dims,
    "Squeeze": _squeeze,
    "BroadcastTo": _content_as_shape(1),
    "Fill": _content_as_shape(0),
    "Tile": _tile,
    "Range": _range,
    "OneHot": _one_hot,
    "Shape": lambda n: None if n.inputs[0].shape is None else (len(n.inputs[0].shape),),
    "IdentityN": lambda n: [v.shape for v in n.inputs],
    "Conv2D": _conv,
    "_FusedConv2D": _conv,
    "DepthwiseConv2dNative": _conv,
    "_FusedDepthwiseConv2dNative": _conv,
    "MaxPool": _conv,
    "AvgPool": _conv,
    "Pad": _pad,
    "PadV2": _pad,
    "MirrorPad": _pad,
    "FusedBatchNormV3": _batch_norm,
    "ArgMax": _arg_reduce,
    "ArgMin": _arg_reduce,
}
