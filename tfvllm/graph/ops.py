"""What TensorFlow says of its own operations: attributes, output types, state, kernels."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import tensorflow as tf
from tensorflow.core.framework import attr_value_pb2, op_def_pb2
from tensorflow.python.framework import kernels, op_def_registry

AttrValue = attr_value_pb2.AttrValue

COMMUTATIVE = frozenset(
    {"Add", "AddV2", "Mul", "Maximum", "Minimum", "LogicalAnd", "LogicalOr", "Equal", "NotEqual", "SquaredDifference"}
)

# Stateful in TensorFlow's registry (they read a resource), yet they change nothing and may be moved, merged or dropped
# where the resource is not written.
_READ_ONLY = frozenset(
    {
        "ReadVariableOp",
        "VarHandleOp",
        "VarIsInitializedOp",
        "VariableShape",
        "ResourceGather",
        "ResourceGatherNd",
        "LookupTableFind",
        "LookupTableFindV2",
        "LookupTableSize",
        "LookupTableSizeV2",
        "HashTableV2",
        "Placeholder",
        "PlaceholderWithDefault",
    }
)


@cache
def definition(op: str) -> op_def_pb2.OpDef | None:
    """The OpDef of a registered op, or None."""
    return op_def_registry.get(op)


@cache
def is_stateful(op: str) -> bool:
    found = definition(op)
    return found is None or found.is_stateful


@cache
def is_random(op: str) -> bool:
    """Stateful random ops: two of them never give the same, yet one that nobody reads may go."""
    return is_stateful(op) and (op.startswith(("Random", "TruncatedNormal", "Multinomial", "ParameterizedTruncated")))


def has_effect(op: str) -> bool:
    """Whether the op must run even if nobody reads its outputs."""
    return is_stateful(op) and op not in _READ_ONLY and not is_random(op)


def is_pure(op: str) -> bool:
    """Whether equal inputs give equal outputs, always (reads of resources excluded)."""
    return not is_stateful(op)


def reads_state(op: str) -> bool:
    return op in _READ_ONLY and op not in ("Placeholder", "PlaceholderWithDefault", "VarHandleOp")


@cache
def has_kernel(op: str, dtype: tf.DType | None = None) -> bool:
    """Whether the running TensorFlow has a CPU kernel for the op (for `dtype` in its attribute T, if given)."""
    if definition(op) is None:
        return False
    for kernel in kernels.get_registered_kernels_for_op(op).kernel:
        if kernel.device_type != "CPU":
            continue
        types = [c.allowed_values.list.type for c in kernel.constraint if c.name == "T"]
        if dtype is None or not types or any(dtype.as_datatype_enum in t for t in types):
            return True
    return False


# ------------------------------------------------------------------------------------------------------- attributes


def attr_to_python(proto: AttrValue) -> Any:
    kind = proto.WhichOneof("value")
    if kind == "s":
        return proto.s.decode("utf-8", "surrogateescape")
    if kind == "type":
        return tf.as_dtype(proto.type)
    if kind == "shape":
        return None if proto.shape.unknown_rank else [d.size for d in proto.shape.dim]
    if kind == "tensor":
        return tf.make_ndarray(proto.tensor)
    if kind == "func":
        return proto.func.name
    if kind == "list":
        items = proto.list
        if items.type:
            return [tf.as_dtype(t) for t in items.type]
        if items.s:
            return [s.decode("utf-8", "surrogateescape") for s in items.s]
        if items.func:
            return [f.name for f in items.func]
        for name in ("i", "f", "b"):
            if getattr(items, name):
                return list(getattr(items, name))
        return []
    return None if kind is None else getattr(proto, kind)


def python_to_attr(value: Any, kind: str) -> AttrValue:
    """`kind` as in an OpDef: int, float, bool, string, type, shape, tensor, or list(...) of one."""
    if isinstance(value, AttrValue):
        return value
    proto = AttrValue()
    if kind.startswith("list("):
        inner = kind[5:-1]
        proto.list.SetInParent()
        for item in value:
            if inner == "int":
                proto.list.i.append(int(item))
            elif inner == "float":
                proto.list.f.append(float(item))
            elif inner == "bool":
                proto.list.b.append(bool(item))
            elif inner == "string":
                proto.list.s.append(item if isinstance(item, bytes) else str(item).encode())
            elif inner == "type":
                proto.list.type.append(tf.as_dtype(item).as_datatype_enum)
            else:
                raise TypeError(f"attributes of kind {kind} are not written here")
    elif kind == "int":
        proto.i = int(value)
    elif kind == "float":
        proto.f = float(value)
    elif kind == "bool":
        proto.b = bool(value)
    elif kind == "string":
        proto.s = value if isinstance(value, bytes) else str(value).encode()
    elif kind == "type":
        proto.type = tf.as_dtype(value).as_datatype_enum
    elif kind == "shape":
        proto.shape.CopyFrom(tf.TensorShape(value).as_proto())
    elif kind == "tensor":
        proto.tensor.CopyFrom(value if hasattr(value, "tensor_shape") else tf.make_tensor_proto(np.asarray(value)))
    else:
        raise TypeError(f"attributes of kind {kind} are not written here")
    return proto


def complete_attrs(op: str, dtypes: list[tf.DType], given: dict[str, Any]) -> dict[str, AttrValue]:
    """All attributes of a node: `given`, those that follow from the input types, then the defaults."""
    found = definition(op)
    if found is None:
        return {k: v if isinstance(v, AttrValue) else _guess_attr(v) for k, v in given.items()}
    kinds = {a.name: a.type for a in found.attr}
    unknown = [k for k in given if k not in kinds and not k.startswith("_")]
    if unknown:
        raise ValueError(f"op {op} has no attribute {unknown[0]!r}; it has {', '.join(sorted(kinds))}")
    attrs = {k: python_to_attr(v, kinds[k]) if k in kinds else _guess_attr(v) for k, v in given.items()}
    position = 0
    for i, arg in enumerate(found.input_arg):
        rest = len(found.input_arg) - i - 1  # every later argument takes at least its own count
        if arg.number_attr:
            if arg.number_attr not in attrs:
                attrs[arg.number_attr] = python_to_attr(len(dtypes) - position - rest, "int")
            count = attrs[arg.number_attr].i
            if arg.type_attr and arg.type_attr not in attrs and count:
                attrs[arg.type_attr] = python_to_attr(dtypes[position], "type")
            position += count
        elif arg.type_list_attr:
            if arg.type_list_attr not in attrs:
                attrs[arg.type_list_attr] = python_to_attr(dtypes[position : len(dtypes) - rest], "list(type)")
            position += len(attrs[arg.type_list_attr].list.type)
        else:
            if arg.type_attr and arg.type_attr not in attrs:
                attrs[arg.type_attr] = python_to_attr(dtypes[position], "type")
            position += 1
    for attr in found.attr:
        if attr.name not in attrs and attr.HasField("default_value"):
            attrs[attr.name] = attr.default_value
    return attrs


def _guess_attr(value: Any) -> AttrValue:
    if isinstance(value, AttrValue):
        return value
    for python, kind in ((bool, "bool"), (int, "int"), (float, "float"), (str, "string"), (bytes, "string")):
        if isinstance(value, python):
            return python_to_attr(value, kind)
    return python_to_attr(value, "type")


def output_dtypes(op: str, attrs: dict[str, AttrValue], library=None) -> list[tf.DType]:
    found = definition(op)
    if found is None:
        if library and op in library:
            return [tf.as_dtype(a.type) for a in library[op].signature.output_arg]
        raise KeyError(op)
    dtypes: list[tf.DType] = []
    for arg in found.output_arg:
        dtypes.extend(_arg_dtypes(arg, attrs))
    return dtypes


def _arg_dtypes(arg, attrs) -> list[tf.DType]:
    if arg.type_list_attr:
        return [tf.as_dtype(t) for t in attrs[arg.type_list_attr].list.type]
    dtype = tf.as_dtype(arg.type or attrs[arg.type_attr].type)
    return [dtype] * (attrs[arg.number_attr].i if arg.number_attr else 1)


def output_ranges(op: str, attrs: dict[str, AttrValue]) -> dict[str, int]:
    """Output argument name -> flat index of its first tensor, as FunctionDefs name tensors."""
    ranges, start = {}, 0
    for arg in definition(op).output_arg:  # type: ignore[union-attr]
        ranges[arg.name] = start
        start += len(_arg_dtypes(arg, attrs))
    return ranges
