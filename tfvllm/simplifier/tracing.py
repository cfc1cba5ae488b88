"""A user's model or function as a traced function, with what owns its weights and what its arguments are."""

from __future__ import annotations

import contextlib
import inspect
import weakref
from collections.abc import Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from tfvllm.errors import InputError
from tfvllm.graph import importer, loading
from tfvllm.graph.ir import Graph
from tfvllm.simplifier.arguments import spec_of, spec_of_input


def traced(model: Any, inputs: Any) -> Any:
    """The ConcreteFunction of whatever was given."""
    if hasattr(model, "structured_input_signature") and hasattr(model, "graph"):
        return model
    if hasattr(model, "get_concrete_function"):
        if getattr(model, "input_signature", None) is None and inputs is None:
            raise InputError(
                "the tf.function has no input signature; give it one (input_signature=[tf.TensorSpec(…)]), pass a "
                "ConcreteFunction, or pass inputs=(…)."
            )
        return model.get_concrete_function(*(() if inputs is None else _arguments(inputs)))
    structure = symbolic_inputs(model)
    if callable(model) and (structure is not None or inputs is not None):
        specs = None if structure is None else tf.nest.map_structure(spec_of_input, structure)
        if inputs is not None:
            specs = _with_open_sizes(specs, inputs)
        call = tf.function(lambda batch: model(batch, training=False), autograph=False)
        return call.get_concrete_function(specs)
    if callable(model) and getattr(model, "built", False):
        raise InputError(
            f"{type(model).__name__} is built, but a subclassed model does not say what it reads. Pass inputs=…: "
            "arrays, or tf.TensorSpec with None where a size may differ."
        )
    raise InputError(
        f"expected a built Keras model, a tf.function or a ConcreteFunction, found {type(model).__name__}"
        + ("; build the model, or pass inputs=…" if callable(model) else ".")
    )


def _with_open_sizes(known: Any, inputs: Any) -> Any:
    """The specs of `inputs`, with the sizes open that the model (where its specs are `known`) leaves open."""
    if (
        isinstance(inputs, (list, tuple))
        and len(inputs) == 1
        and not (isinstance(known, (list, tuple)) and len(known) == 1)
    ):
        inputs = inputs[0]  # one positional argument
    specs = tf.nest.map_structure(spec_of, inputs)
    if known is None:
        return specs
    if isinstance(specs, dict):  # by name, whether or not the model was made with a dict
        names = known if isinstance(known, dict) else {spec.name: spec for spec in tf.nest.flatten(known)}
        if set(names) != set(specs):
            raise InputError(f"inputs=…: the model reads {sorted(names)}, found {sorted(specs)}.")
        return {name: _opened(names[name], spec) for name, spec in specs.items()}
    if len(tf.nest.flatten(known)) != len(tf.nest.flatten(specs)):
        raise InputError(
            f"inputs=…: the model reads {len(tf.nest.flatten(known))} tensors, found {len(tf.nest.flatten(specs))}."
        )
    if isinstance(known, dict):
        return specs  # in an order that only Keras knows
    return tf.nest.pack_sequence_as(known, list(map(_opened, tf.nest.flatten(known), tf.nest.flatten(specs))))


def _opened(known: Any, given: Any) -> Any:
    """`given` with the open sizes of `known`."""
    if not (isinstance(known, tf.TensorSpec) and isinstance(given, tf.TensorSpec)):
        return given
    if known.shape.rank is None or known.shape.rank != given.shape.rank:
        return given
    sizes = [None if open_ is None else size for open_, size in zip(known.shape, given.shape)]
    return tf.TensorSpec(sizes, given.dtype, name=known.name)


def symbolic_inputs(model: Any) -> Any:
    """The inputs of a built Keras model, nested as it takes them; None of anything else."""
    structure = getattr(model, "_inputs_struct", None)
    if structure is None and not hasattr(model, "graph"):
        structure = getattr(model, "inputs", None)
        if isinstance(structure, (list, tuple)) and len(structure) == 1:
            structure = structure[0]
    return structure


def share_weights(graph: Graph, precision: str) -> None:
    """Lets no rule rely on what a variable holds."""
    if precision != "float32":
        raise InputError(
            f"live: expected precision float32, found {precision}, which makes new weights of the model's."
        )
    for capture in graph.captures.values():
        capture.frozen = capture.frozen and capture.made


def _arguments(inputs: Any) -> tuple:
    return inputs if isinstance(inputs, tuple) else (inputs,)


def owners_in(model: Any) -> dict[int, Any]:
    """Tables and tokenizers that a model holds, or a function refers to, so that they can be copied and saved."""
    roots = [model]
    python_function = getattr(model, "python_function", None)
    for function in () if python_function is None else (python_function, inspect.unwrap(python_function)):
        with contextlib.suppress(TypeError, ValueError):
            names = inspect.getclosurevars(function)
            found = [*names.nonlocals.values(), *names.globals.values()]
            roots.extend(item() if isinstance(item, weakref.ref) else item for item in found)  # a method's own object
    owners: dict[int, Any] = {}
    for root in roots:
        with contextlib.suppress(ValueError, TypeError, AttributeError):  # it tracks nothing
            owners |= importer.owners_of(tf.train.TrackableView(root).descendants())
    return owners


def pack(structure: Any, flat: list) -> Any:
    leaves = tf.nest.flatten(structure, expand_composites=True)
    tensors = iter(flat)
    return tf.nest.pack_sequence_as(
        structure, [next(tensors) if leaf is not None else None for leaf in leaves], expand_composites=True
    )


def calibration_rows(calibration: Sequence[dict[str, Any]] | None, entry: loading.Signature) -> list[list[Any]] | None:
    if calibration is None:
        return None
    wanted = set(entry.specs)
    samples = []
    for row in calibration:
        if set(row) != wanted:
            continue  # meant for another signature
        samples.append([np.asarray(row[k]) for k in sorted(wanted)])
    if not samples:
        found = ", ".join(sorted(calibration[0])) if calibration else "nothing"
        raise InputError(f"calibration: expected the inputs {', '.join(sorted(wanted))}, found {found}.")
    return samples


def name_of(model: Any) -> str:
    name = getattr(model, "name", None)
    if isinstance(name, bytes):
        name = name.decode()
    return name if isinstance(name, str) else getattr(model, "__name__", type(model).__name__)


def described(spec: tf.TensorSpec) -> dict[str, Any]:
    return {"dtype": spec.dtype.name, "shape": shape_of(None if spec.shape.rank is None else spec.shape.as_list())}


def shape_of(shape: Any) -> list | None:
    return None if shape is None else [d if isinstance(d, int) else None for d in shape]
