"""What running a graph may change, kept and put back: variables (those of generators too) and tables."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import tensorflow as tf

from tfvllm.graph import effects
from tfvllm.graph.ir import Capture, Graph


@dataclass
class _Variable:
    """A variable by its handle: whoever made it, its bits can be read and set."""

    name: str
    handle: Any
    dtype: tf.DType

    def read(self) -> Any:
        return tf.raw_ops.ReadVariableOp(resource=self.handle, dtype=self.dtype)

    def write(self, content: Any) -> None:
        tf.raw_ops.AssignVariableOp(resource=self.handle, value=content)

    def arrays(self) -> dict[str, np.ndarray]:
        return {self.name: self.read().numpy()}


@dataclass
class _Table:
    """A mutable lookup table by its handle."""

    name: str
    handle: Any
    keys: tf.DType
    values: tf.DType

    def read(self) -> Any:
        found = tf.raw_ops.LookupTableExportV2(table_handle=self.handle, Tkeys=self.keys, Tvalues=self.values)
        return [tf.constant(np.array(t.numpy()), t.dtype) for t in found]  # a dense table gives its own buckets away

    def write(self, content: Any) -> None:
        keys, values = content
        tf.raw_ops.LookupTableImportV2(table_handle=self.handle, keys=keys, values=values)

    def arrays(self) -> dict[str, np.ndarray]:
        """The contents in the order of the keys: that of the table itself means nothing."""
        keys, values = (t.numpy() for t in self.read())
        columns = keys.reshape(len(keys), -1).T
        order = np.argsort(columns[0], kind="stable") if len(columns) == 1 else np.lexsort(columns)
        return {f"{self.name}, keys": keys[order], f"{self.name}, values": values[order]}


@dataclass
class State:
    """All that one graph writes.

    Attributes:
        parts: what can be put back.
        outside: "op (node)" of all that cannot. A graph that has any must not be run for a trial.
        draws: its random ops that keep a state of their own.
        generators: its random ops that keep it in a variable.
    """

    parts: list[_Variable | _Table] = field(default_factory=list)
    outside: list[str] = field(default_factory=list)
    draws: list[effects.Draw] = field(default_factory=list)
    generators: list[effects.Draw] = field(default_factory=list)

    @classmethod
    def of(cls, graph: Graph) -> State:
        """What a graph that was made of a whole function writes, anywhere in it."""
        found = effects.find(graph)
        state = cls(outside=list(found.outside), draws=list(found.draws), generators=list(found.generators))
        for name, writings in found.written.items():
            capture = graph.captures.get(name)
            if capture is None:  # an argument: whoever calls keeps it
                state.outside.extend(f"{w.op} ({w.node})" for w in writings)
                continue
            first = writings[0]
            if first.op in effects.TABLE_WRITES:
                state.parts.append(_Table(name, capture.tensor, *_table_types(capture, first)))
                continue
            variable = _Variable(name, capture.tensor, _variable_type(capture, first))
            if bool(tf.raw_ops.VarIsInitializedOp(resource=capture.tensor)):
                state.parts.append(variable)
            else:
                state.outside.append(f"{first.op} ({first.node}) to a variable that is not initialised")
        state.outside = list(dict.fromkeys(state.outside))
        return state

    @contextlib.contextmanager
    def kept(self) -> Iterator[None]:
        """Whatever happens inside, all is as it was afterwards."""
        before = [part.read() for part in self.parts]
        try:
            yield
        finally:
            for part, content in zip(self.parts, before):
                part.write(content)

    def arrays(self) -> dict[str, np.ndarray]:
        """All contents, by name."""
        return {name: array for part in self.parts for name, array in part.arrays().items()}


def _variable_type(capture: Capture, writing: effects.Writing) -> tf.DType:
    if isinstance(capture.owner, tf.Variable):
        return capture.owner.dtype
    for key in ("dtype", "T"):
        if key in writing.attrs and writing.op.startswith(("Assign", "Resource")):
            return tf.as_dtype(writing.attrs[key].type)
    return tf.int64  # generators keep their state in this


def _table_types(capture: Capture, writing: effects.Writing) -> tuple[tf.DType, tf.DType]:
    for keys, values in (("Tin", "Tout"), ("Tkeys", "Tvalues")):
        if keys in writing.attrs and values in writing.attrs:
            return tf.as_dtype(writing.attrs[keys].type), tf.as_dtype(writing.attrs[values].type)
    return capture.owner.key_dtype, capture.owner.value_dtype  # of a removal: its attributes name the keys alone


# ------------------------------------------------------------------------------------------------------------- copying


def detach(graph: Graph) -> list[str]:
    """Lets a graph have variables and tables of its own, that hold what those of the model hold now.

    A copy of a variable takes memory only from the moment on at which the model changes its own: until then the two
    share it.

    Returns:
        the names of the resources that the graph writes and that cannot be copied: these are shared still.
    """
    copies: dict[int, Any] = {}
    own = set()
    for name, capture in graph.captures.items():
        if capture.made:
            own.add(name)
            continue
        key = id(capture.tensor)
        if key not in copies:
            copies[key] = _copy(capture.owner)
        twin = copies[key]
        if twin is not None:
            handle = twin.handle if isinstance(twin, tf.Variable) else twin.resource_handle
            graph.captures[name] = replace(capture, tensor=handle, owner=twin)
            own.add(name)
    written = effects.find(graph).written
    return [name for name in graph.captures if name in written and name not in own]


def _copy(owner: Any) -> Any:
    """An independent variable or table with the same content, or None."""
    if isinstance(owner, tf.Variable):
        if not bool(tf.raw_ops.VarIsInitializedOp(resource=owner.handle)):
            return None
        content = tf.raw_ops.ReadVariableOp(resource=owner.handle, dtype=owner.dtype)
        return tf.Variable(content, trainable=False, shape=owner.shape, dtype=owner.dtype, name=_plain(owner.name))
    if isinstance(owner, (tf.lookup.experimental.MutableHashTable, tf.lookup.experimental.DenseHashTable)):
        return _copy_table(owner)
    return None


def _copy_table(table: Any) -> Any:
    types = {"key_dtype": table.key_dtype, "value_dtype": table.value_dtype, "default_value": table._default_value}
    if isinstance(table, tf.lookup.experimental.DenseHashTable):
        types |= {"empty_key": table._empty_key, "deleted_key": table._deleted_key}
    twin = type(table)(**types)
    content = _Table("", table.resource_handle, table.key_dtype, table.value_dtype).read()
    _Table("", twin.resource_handle, table.key_dtype, table.value_dtype).write(content)
    return twin


def _plain(name: str) -> str:
    return name.split(":")[0].rsplit("/", 1)[-1] or "copy"
