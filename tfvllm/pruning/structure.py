"""Physically smaller models: which units go, and the model without them.

A `Plan` says what stays. `apply_plan` builds the smaller model from it; `mask_model` keeps the sizes and zeroes the
same weights, which is the reference the smaller model is held to.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import keras
import numpy as np

from tfvllm.errors import InputError
from tfvllm.families import (
    EXPERTS,
    FFN,
    HEADS,
    KV_HEADS,
    VOCABULARY,
    WIDTH,
    Adapter,
    Block,
    BlockShape,
    Structure,
    adapter_for,
    find_backbone,
    original_class,
    shrunk_class,
    shrunk_task_class,
)
from tfvllm.families.base import Axes, keep_indices
from tfvllm.families.stored import lora_layers, lora_parts, refuse_quantised

Place = tuple[str, str]  # (unit, place), as in `Axis`


@dataclass
class Plan:
    """What stays of a model.

    Attributes:
        layers: kept block indices by stack, ascending.
        keep: kept units by (unit, place), ascending; what is absent stays whole. Places name the original blocks.
        bias: additions to output biases by weight name (compensation), in the original's width.
        kernels: output kernels fitted anew by weight name (compensation), in the original's shape.
        tokenizer: the tokenizer that goes with a smaller vocabulary.

    Example:
        >>> plan = tfvllm.pruning.plan_shrink(tiny_bert(), ffn=16)
        >>> sorted((unit, len(kept)) for (unit, place), kept in plan.keep.items() if unit == "ffn")
        [('ffn', 16), ('ffn', 16)]
    """

    layers: dict[str, list[int]]
    keep: dict[Place, np.ndarray] = field(default_factory=dict)
    bias: dict[str, np.ndarray] = field(default_factory=dict)
    kernels: dict[str, np.ndarray] = field(default_factory=dict)
    tokenizer: Any = None

    def sizes(self) -> dict[str, int]:
        """Kept counts by "unit place", for reports."""
        return {f"{unit} {place}".strip(): len(kept) for (unit, place), kept in sorted(self.keep.items())}


def full_plan(model: Any) -> Plan:
    """The plan that removes nothing."""
    adapter = adapter_for(model)
    stacks = adapter.stacks(adapter.backbone(model))
    return Plan(layers={kind: list(range(len(layers))) for kind, layers in stacks.items()})


def planned_structure(adapter: Adapter, model: Any, plan: Plan) -> Structure:
    """The block sizes of the model that `plan` leaves."""
    structure = adapter.structure(model)
    blocks = {(block.kind, block.index): block for block in adapter.blocks(model)}

    def left(unit: str, place: str, whole: int) -> int:
        kept = plan.keep.get((unit, place))
        return whole if kept is None else len(kept)

    planned: Structure = {}
    for kind, kept in plan.layers.items():
        planned[kind] = []
        for index in kept:
            shape = structure[kind][index]
            block, cross = blocks[kind, index], blocks[kind, index].cross_attention
            place, inside = block.attention.place, block.feed_forward.place
            experts = None if shape.experts is None else left(EXPERTS, inside, shape.experts)
            heads = plan.keep.get((HEADS, place))
            cross_heads = None if cross is None else left(HEADS, cross.place, cross.heads)
            cross_kv = None if cross is None else left(KV_HEADS, cross.place, cross.kv_heads)
            planned[kind].append(
                BlockShape(
                    heads=left(HEADS, place, shape.heads),
                    kv_heads=left(KV_HEADS, place, shape.kv_heads),
                    head_dim=shape.head_dim,
                    ffn=left(FFN, inside, shape.ffn),
                    cross_heads=cross_heads,
                    cross_kv_heads=None if cross_kv == cross_heads else cross_kv,
                    experts=experts,
                    top=None if experts is None or shape.top is None else min(shape.top, experts),
                    traits=shape.traits if heads is None else adapter.kept_traits(shape, heads),
                )
            )
    return planned


def apply_plan(model: Any, plan: Plan) -> Any:
    """A new model without what `plan` removes, with the weights of what stays. `model` is left as it was.

    Returns the original keras-nlp class where its config can say the new sizes, else its registered shrunk subclass.

    Example:
        >>> model = tiny_bert()
        >>> small = tfvllm.pruning.apply_plan(model, tfvllm.pruning.plan_shrink(model, layers=1))
        >>> len(small.backbone.transformer_layers)
        1
    """
    adapter = adapter_for(model)
    refuse_quantised(model, "shrink")
    old = adapter.backbone(model)
    structure = planned_structure(adapter, model, plan)
    width, vocabulary = (len(plan.keep[unit, ""]) if (unit, "") in plan.keep else None for unit in (WIDTH, VOCABULARY))
    config = adapter.resized_config(adapter.config(old), width, vocabulary)
    native = adapter.config_if_expressible(config, structure)
    if native is not None:
        backbone = original_class(old)(**native)
    else:
        entries = {kind: [shape.to_dict() for shape in shapes] for kind, shapes in structure.items()}
        backbone = shrunk_class(old)(structure=entries, **config)
    new = backbone if model is old else _around(model, old, backbone, plan, native is not None)
    _copy_weights(adapter, model, new, plan)
    if (WIDTH, "") in plan.keep:
        adapter.width_changed(old, backbone)
    if not model.trainable_variables:  # frozen whole, as a Distiller leaves its teacher; the copy is to be trained
        for layer in new._flatten_layers():
            layer.trainable = True
    return new


def _around(model: Any, old: Any, backbone: Any, plan: Plan, native: bool) -> Any:
    from keras_hub.models import Task

    if isinstance(model, Task):
        config = model.get_config()
        config["backbone"] = backbone
        config["preprocessor"] = _with_tokenizer(model.preprocessor, plan.tokenizer)
        if (WIDTH, "") in plan.keep and config.get("hidden_dim", 0) == getattr(old, "hidden_dim", None):
            config["hidden_dim"] = old.hidden_dim  # the head keeps its own inner width
        return shrunk_task_class(model, native)(**config)
    if (WIDTH, "") in plan.keep or (VOCABULARY, "") in plan.keep:
        raise InputError(
            f"width= and vocabulary= change what {type(model).__name__} around the backbone reads. Expected a backbone "
            "or a keras-nlp task; shrink model.backbone and rebuild the head."
        )

    def clone(layer: Any) -> Any:
        return backbone if layer is old else type(layer).from_config(layer.get_config())

    new = keras.models.clone_model(model, clone_function=clone)
    for before, after in zip(model.layers, new.layers):
        if after is not backbone:
            after.set_weights(before.get_weights())
            for (source, _), (copy, _) in zip(lora_layers(before), lora_layers(after), strict=True):
                copy.lora_alpha = source.lora_alpha  # Keras builds a Dense from its config without it
    return new


def _with_tokenizer(preprocessor: Any, tokenizer: Any) -> Any:
    if preprocessor is None or tokenizer is None:
        return preprocessor
    config = preprocessor.get_config()
    for name in ("encoder_sequence_length", "decoder_sequence_length"):  # keras-nlp leaves them out
        if hasattr(preprocessor, name):
            config[name] = getattr(preprocessor, name)
    config["tokenizer"] = tokenizer
    config.pop("config_file", None)
    return type(preprocessor).from_config(config)


def _copy_weights(adapter: Adapter, model: Any, new: Any, plan: Plan) -> None:
    old = (
        {weight.name: weight for weight in adapter.weights(model)}
        if _known(model)
        else {weight.name: weight for weight in adapter.weights(adapter.backbone(model))}
    )
    for weight in adapter.weights(new) if _known(new) else adapter.weights(adapter.backbone(new)):
        source = old[original_name(weight.name, plan)]
        value = _compensated(source.name, source.value(), plan)
        value = taken(value, source.axes, plan.keep)
        if value.shape != tuple(weight.variable.shape):
            raise AssertionError(f"{weight.name}: {value.shape} for {tuple(weight.variable.shape)}")
        weight.variable.assign(value)


def _compensated(name: str, value: np.ndarray, plan: Plan) -> np.ndarray:
    """`value` of the original's weight `name` with what the plan changes in it to make up for removed units."""
    if name in plan.bias:
        return value + plan.bias[name].astype(value.dtype)
    if name in plan.kernels:
        return plan.kernels[name].astype(value.dtype)
    return value


def _known(model: Any) -> bool:
    from keras_hub.models import Backbone, Task

    return isinstance(model, Backbone | Task)


def original_name(name: str, plan: Plan) -> str:
    """The name, in the original, of a weight of the planned model."""
    kind, _, rest = name.partition(".")
    if kind not in plan.layers:
        return name
    index, _, inner = rest.partition(".")
    return f"{kind}.{plan.layers[kind][int(index)]}.{inner}" if index.isdigit() else name


def taken(value: np.ndarray, axes: Axes, keep: Mapping[Place, np.ndarray]) -> np.ndarray:
    """`value` without the units that `keep` leaves out along its axes."""
    for position, axis in enumerate(axes):
        if axis is not None and (axis.unit, axis.place) in keep:
            kept = keep_indices(axis, keep[axis.unit, axis.place], value.shape[position])
            value = np.take(value, kept, axis=position)
    return value


def mask_model(model: Any, plan: Plan) -> None:
    """Zeroes, in place, every head and neuron that `plan` removes: same sizes, same outputs as the shrunk model.

    Compensation goes into the biases and kernels as well, and LoRA is merged into the kernels. Layers, width,
    vocabulary and experts, which a router of zeros still takes, are not masks and are refused.

    Example:
        >>> model = tiny_bert()
        >>> plan = tfvllm.pruning.plan_shrink(model, ffn=16)
        >>> small = tfvllm.pruning.apply_plan(model, plan)
        >>> tfvllm.pruning.mask_model(model, plan)
        >>> bool(np.allclose(model(x), small(x), atol=1e-5))
        True
    """
    adapter = adapter_for(model)
    refuse_quantised(model, "mask_model")
    whole = full_plan(model)
    if plan.layers != whole.layers or {WIDTH, VOCABULARY, EXPERTS} & {unit for unit, _ in plan.keep}:
        raise InputError(
            "only heads and feed-forward neurons can be masked; expected a plan without layers, width, vocabulary, "
            "experts."
        )
    for weight in adapter.weights(adapter.backbone(model)):
        value = np.array(_compensated(weight.name, weight.value(), plan))
        for position, axis in enumerate(weight.axes):
            kept = None if axis is None else plan.keep.get((axis.unit, axis.place))
            if axis is not None and kept is not None:
                size = value.shape[position]
                gone = np.setdiff1d(np.arange(size), keep_indices(axis, kept, size))
                value[(slice(None),) * position + (gone,)] = 0
        weight.variable.assign(value)
        if weight.lora is not None:  # it is in the value now
            layer, _ = weight.lora
            lora_parts(layer)[1].assign(np.zeros(lora_parts(layer)[1].shape))


def resolve(request: Any, total: int, what: str, *, round_to: int = 1, minimum: int = 1) -> int:
    """How many of `total` stay. A float is the share removed, an int the number kept.

    Raises:
        InputError: a share outside [0, 1), a count outside [1, total], nothing left.
    """
    if isinstance(request, bool) or not isinstance(request, int | float | np.integer | np.floating):
        raise InputError(f"{what}={request!r}: expected a share to remove in [0, 1), or an int, the number to keep.")
    if isinstance(request, int | np.integer):
        if not minimum <= request <= total:
            raise InputError(f"{what}={request}: expected {minimum} to {total} to keep (an int is the number kept).")
        return int(request)
    if not 0.0 <= request < 1.0:
        raise InputError(f"{what}={request}: expected a share to remove in [0, 1); 1.0 would leave nothing.")
    left = total * (1.0 - float(request))
    if request == 0.0:
        return total
    if round_to > 1:
        rounded = round(left / round_to) * round_to
        left = min(max(rounded, round_to), total)
    left = round(left)
    if left < minimum:
        raise InputError(
            f"{what}={request}: leaves {left} of {total}, expected at least {minimum}. Ask for a smaller share."
        )
    return left


def per_layer(request: Any, count: int, what: str) -> list[Any]:
    """`request` for each of `count` blocks: one value for all, or a list of that length."""
    if isinstance(request, Sequence) and not isinstance(request, str):
        if len(request) != count:
            raise InputError(f"{what} has {len(request)} entries, expected {count}, one per block that stays.")
        return list(request)
    return [request] * count


def best(scores: np.ndarray, count: int) -> np.ndarray:
    """The indices of the `count` largest scores, ascending; of equals, the first stay."""
    return np.sort(np.argsort(-scores, kind="stable")[:count])


def head_unit(block: Block, cross: bool = False) -> str:
    """What is removed from an attention: key/value groups, or single query heads where one group serves them all."""
    attention = block.cross_attention if cross else block.attention
    assert attention is not None
    return HEADS if attention.kv_heads == 1 and attention.heads > 1 else KV_HEADS


def head_keep(attention: Any, unit: str, kept: np.ndarray) -> dict[Place, np.ndarray]:
    """Kept query and key/value heads for kept units of `attention`."""
    if unit == HEADS:
        return {(HEADS, attention.place): kept}
    group = attention.heads // attention.kv_heads
    queries = (kept[:, None] * group + np.arange(group)).reshape(-1)
    return {(KV_HEADS, attention.place): kept, (HEADS, attention.place): queries}


__all__ = [
    "Plan",
    "apply_plan",
    "best",
    "find_backbone",
    "full_plan",
    "mask_model",
    "planned_structure",
    "resolve",
]
