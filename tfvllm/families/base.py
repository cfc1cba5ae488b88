"""What tfvllm knows of a keras-nlp model: its blocks, their projections, and which axis of which weight is which unit.

An `Adapter` describes one family. Everything that cuts, masks, copies or regenerates a model works from that
description, so a family is described once, in one file.
"""

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, NamedTuple

import keras
import numpy as np

from tfvllm.errors import InputError
from tfvllm.families.stored import effective, lora_layers, lora_parts, stored

HEADS = "heads"  # query heads
KV_HEADS = "kv_heads"  # key/value heads: fewer than query heads under grouped-query attention
FFN = "ffn"  # neurons between the two feed-forward products; gate and up share them
EXPERTS = "experts"  # feed-forwards beside each other, of which a router takes some for each token
WIDTH = "width"  # the residual stream, the same channels in the whole model
VOCABULARY = "vocabulary"


class Axis(NamedTuple):
    """One axis of a weight: `unit` says what is counted along it, `place` where ("decoder.3.self", "" for the model).

    `inner` is how many consecutive entries belong to one unit (T5 flattens heads x head_dim into one axis), `repeats`
    how often all units come, one round after the other (gates | ups).
    """

    unit: str
    place: str = ""
    inner: int = 1
    repeats: int = 1

    def sums(self, entries: np.ndarray) -> np.ndarray:
        """The sum over the entries of each unit: [entries] -> [units]."""
        if self.inner == self.repeats == 1:
            return entries
        return entries.reshape(self.repeats, -1, self.inner).sum(axis=(0, 2))


Axes = tuple[Axis | None, ...]


@dataclass(frozen=True)
class Projection:
    """A Dense or EinsumDense inside a block, and how to reach it: `owner.attribute is layer`.

    With `parts` > 1 several projections lie beside each other in every head of one kernel, and this is number `part`.
    """

    name: str
    layer: Any
    owner: Any
    attribute: str
    kernel_axes: Axes
    bias_axes: Axes
    part: int = 0
    parts: int = 1

    @property
    def has_bias(self) -> bool:
        return getattr(self.layer, "bias", None) is not None


@dataclass(frozen=True)
class BareWeight:
    """A variable that a layer holds itself, with no Dense around it: `owner.attribute`."""

    name: str
    owner: Any
    attribute: str
    axes: Axes
    initializer: Any

    @property
    def variable(self) -> Any:
        return getattr(self.owner, self.attribute)


@dataclass(frozen=True)
class Attention:
    """An attention layer. `place` is its name in axes, e.g. "decoder.0.self" or "decoder.0.cross"."""

    layer: Any
    place: str
    heads: int
    kv_heads: int
    head_dim: int
    query: Projection
    key: Projection
    value: Projection
    output: Projection
    scale: float  # what scores are multiplied by before the softmax
    bare: tuple[BareWeight, ...] = ()

    @property
    def projections(self) -> tuple[Projection, ...]:
        return (self.query, self.key, self.value, self.output)


@dataclass(frozen=True)
class FeedForward:
    """`down(activation(up(x)))`, or with a gate `down(activation(gate(x)) * up(x))`."""

    place: str
    width: int
    up: Projection
    down: Projection
    gate: Projection | None = None
    activation: Any = None

    @property
    def projections(self) -> tuple[Projection, ...]:
        return tuple(p for p in (self.gate, self.up, self.down) if p is not None)

    @property
    def bare(self) -> tuple[BareWeight, ...]:
        return ()


@dataclass(frozen=True)
class Experts:
    """Feed-forwards of one size in banks, and a router that sends every token to the `top` best of them.

    A token gets the sum of what these give, each times the router's softmax over all experts, or, `normalized`, over
    those chosen. `others` are Dense layers beside them that every token goes through; they stay whole.
    """

    layer: Any  # reads the residual stream, [batch, length, width]
    place: str
    count: int
    top: int
    width: int  # neurons of each expert
    router: Projection  # kernel [width, experts]
    bare: tuple[BareWeight, ...]  # of all experts: axis 0 counts them. "down" is [experts, neurons, width]
    hidden: Callable[[Any], Any]  # what the neurons give: rows [tokens, width] -> [experts, tokens, neurons]
    normalized: bool
    others: tuple[Projection, ...] = ()
    activation: Any = None

    @property
    def projections(self) -> tuple[Projection, ...]:
        return (self.router, *self.others)

    @property
    def down(self) -> BareWeight:
        return next(weight for weight in self.bare if weight.name == "down")


@dataclass(frozen=True)
class Block:
    """One transformer block of a model, read from its layers (never from the config, which may be coarser).

    Blocks may share a layer (ALBERT): each is one of its `calls` in a run of the model, and places in axes are named
    after the first.
    """

    layer: Any
    index: int
    kind: str  # "encoder" or "decoder"
    hidden_width: int
    attention: Attention
    feed_forward: FeedForward | Experts
    cross_attention: Attention | None = None
    norms: Mapping[str, Any] = field(default_factory=dict)
    normalize_first: bool = True
    call: int = 0
    calls: int = 1

    @property
    def heads(self) -> int:
        return self.attention.heads

    @property
    def kv_heads(self) -> int:
        return self.attention.kv_heads

    @property
    def head_dim(self) -> int:
        return self.attention.head_dim

    @property
    def ffn_width(self) -> int:
        return self.feed_forward.width

    @property
    def bare(self) -> tuple[BareWeight, ...]:
        return (*self.attention.bare, *self.feed_forward.bare)

    @property
    def projections(self) -> dict[str, Any]:
        """Layers by name: query, key, value, output, up, down, gate (if any), cross_query, cross_key, …

        Of experts: router, and what lies beside them.
        """
        found = {p.name: p.layer for p in (*self.attention.projections, *self.feed_forward.projections)}
        if self.cross_attention is not None:
            found.update({p.name: p.layer for p in self.cross_attention.projections})
        return found


@dataclass(frozen=True)
class BlockShape:
    """The sizes of one block; a list of them is the structure of a stack. JSON-able through `to_dict`."""

    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    cross_heads: int | None = None
    cross_kv_heads: int | None = None  # None: as many as `cross_heads`
    experts: int | None = None  # None: one feed-forward; else `ffn` counts the neurons of each
    top: int | None = None  # how many experts a token takes
    traits: Mapping[str, Any] = field(default_factory=dict)  # what the family derives from a layer's position

    def to_dict(self) -> dict[str, Any]:
        entry: dict[str, Any] = {
            "heads": self.heads,
            "kv_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "ffn": self.ffn,
        }
        for name in ("cross_heads", "cross_kv_heads", "experts", "top"):
            if getattr(self, name) is not None:
                entry[name] = getattr(self, name)
        if self.traits:
            entry["traits"] = dict(self.traits)
        return entry


Structure = dict[str, list[BlockShape]]


def _grouped(attention: Attention | None) -> int | None:
    """How many heads of keys and values there are, where they are fewer than heads of queries."""
    return attention.kv_heads if attention is not None and attention.kv_heads != attention.heads else None


def structure_from(entries: Mapping[str, Sequence[Any]]) -> Structure:
    """The inverse of `BlockShape.to_dict` for every stack."""
    return {
        kind: [b if isinstance(b, BlockShape) else BlockShape(**b) for b in blocks] for kind, blocks in entries.items()
    }


class Weight(NamedTuple):
    """A variable of a model, its name inside the family ("decoder.3.self.query.kernel") and its axes."""

    name: str
    variable: Any
    axes: Axes
    lora: tuple[Any, str] | None = None  # the layer whose small matrices are added to the variable, and to which

    def value(self) -> np.ndarray:
        """What the model computes with, in the dtype of the variable: with LoRA added where there is any."""
        return np.asarray(self.variable) if self.lora is None else effective(*self.lora)


class Adapter:
    """What is known of one family. Stateless: every method takes the model.

    Subclasses describe a block (`describe`) and say how sizes are written back (`set_attention`, `set_block`,
    `skeleton_config`, `native`); the rest is common.
    """

    family: ClassVar[str]
    tied_heads: ClassVar[bool] = False  # True where all layers of a stack must lose the same self-attention heads

    # ------------------------------------------------------------------ described by the family
    def describe(self, layer: Any, kind: str, index: int, hidden: int) -> Block:
        raise NotImplementedError

    def set_attention(self, attention: Any, heads: int, kv_heads: int, head_dim: int) -> None:
        """Writes new sizes into an attention layer whose projections were replaced."""
        raise NotImplementedError

    def set_block(self, layer: Any, shape: BlockShape) -> None:
        """Writes new sizes into a block layer."""
        raise NotImplementedError

    def skeleton_config(self, config: dict[str, Any], structure: Structure) -> dict[str, Any]:
        """The constructor arguments of the original class that build a small model of the right frame."""
        raise NotImplementedError

    def config_if_expressible(self, config: dict[str, Any], structure: Structure) -> dict[str, Any] | None:
        """The constructor arguments with which the original class has exactly `structure`, or None."""
        raise NotImplementedError

    def traits(self, layer: Any) -> dict[str, Any]:
        """What the family derives from a layer's position and must survive when layers before it are removed."""
        return {}

    def set_traits(self, layer: Any, traits: Mapping[str, Any]) -> None:
        """Writes `traits` back."""

    def kept_traits(self, shape: BlockShape, heads: np.ndarray) -> Mapping[str, Any]:
        """`shape.traits` of a block that keeps only the query heads `heads` (indices, ascending)."""
        return shape.traits

    def kept_layers(self, backbone: Any, kind: str, kept: Sequence[int]) -> list[int]:
        """The blocks of a stack that stand for `kept`, in the same order: where blocks share a layer, its first ones.

        Raises:
            InputError: no model of the family is made of these.
        """
        return list(kept)

    def summary(self, backbone: Any, structure: Structure) -> dict[str, Any]:
        """Attributes of the backbone that speak of its blocks; the largest block decides."""
        raise NotImplementedError

    def backbone_weights(self, backbone: Any) -> Iterator[tuple[str, Any, Axes]]:
        """Weights outside the blocks: (name, variable, axes)."""
        raise NotImplementedError

    def embedding_axis(self, backbone: Any) -> Axis | None:
        """What is counted along the last axis of the embeddings; None where they have a width of their own."""
        return Axis(WIDTH)

    def resized_config(self, config: dict[str, Any], width: int | None, vocabulary: int | None) -> dict[str, Any]:
        """`config` with another width of the residual stream and another number of tokens; None leaves it."""
        tokens = "vocab_size" if "vocab_size" in config else "vocabulary_size"
        wanted = {"hidden_dim": width, tokens: vocabulary}
        return {**config, **{name: size for name, size in wanted.items() if size is not None}}

    def width_changed(self, old: Any, new: Any) -> None:
        """Mends what a family scales by its width (Gemma's and T5's square roots), after the weights are copied."""

    # ------------------------------------------------------------------ common
    def backbone(self, model: Any) -> Any:
        return find_backbone(model)

    def stacks(self, backbone: Any) -> dict[str, list[Any]]:
        """The block layers of each stack, in order."""
        if hasattr(backbone, "encoder_transformer_layers"):
            return {
                "encoder": list(backbone.encoder_transformer_layers),
                "decoder": list(backbone.decoder_transformer_layers),
            }
        return {self.only_stack: list(backbone.transformer_layers)}

    only_stack: ClassVar[str] = "decoder"

    def width_of(self, backbone: Any, kind: str) -> int:
        """The width of the residual stream of stack `kind`."""
        return int(backbone.hidden_dim)

    def blocks(self, model: Any) -> list[Block]:
        """All blocks, encoder first."""
        backbone = self.backbone(model)
        found = []
        for kind, layers in self.stacks(backbone).items():
            width = self.width_of(backbone, kind)
            calls: dict[int, list[int]] = {}
            for index, layer in enumerate(layers):
                calls.setdefault(id(layer), []).append(index)
            for index, layer in enumerate(layers):
                same = calls[id(layer)]
                block = self.describe(layer, kind, same[0], width)
                found.append(replace(block, index=index, call=same.index(index), calls=len(same)))
        return found

    def structure(self, model: Any) -> Structure:
        """The sizes of every block, by stack."""
        found: Structure = {}
        for block in self.blocks(model):
            experts = block.feed_forward if isinstance(block.feed_forward, Experts) else None
            found.setdefault(block.kind, []).append(
                BlockShape(
                    heads=block.heads,
                    kv_heads=block.kv_heads,
                    head_dim=block.head_dim,
                    ffn=block.ffn_width,
                    cross_heads=block.cross_attention.heads if block.cross_attention else None,
                    cross_kv_heads=_grouped(block.cross_attention),
                    experts=experts.count if experts else None,
                    top=experts.top if experts else None,
                    traits=self.traits(block.layer),
                )
            )
        return found

    def complete_config(self, config: dict[str, Any], backbone: Any) -> dict[str, Any]:
        """`config` with what the original class forgets to write into it."""
        return config

    def config(self, backbone: Any) -> dict[str, Any]:
        """Constructor arguments of the original class of `backbone`."""
        config = self.complete_config(dict(backbone.get_config()), backbone)
        config.pop("structure", None)
        return config

    def weights(self, model: Any) -> list[Weight]:
        """Every weight of `model`, named and with its axes. Names agree between a model and its shrunk copy."""
        backbone = self.backbone(model)
        found: list[Weight] = []
        for block in self.blocks(backbone):
            if not block.call:
                found += self._block_weights(block)
        found += [Weight(f"backbone.{name}", v, axes) for name, v, axes in self.backbone_weights(backbone)]
        known = {id(w.variable) for w in found}
        if model is not backbone:
            found += [
                Weight(f"task.{name}", v, axes)
                for name, v, axes in self.task_weights(model, backbone)
                if id(v) not in known
            ]
        known = {id(w.variable) for w in found}
        known |= {id(part) for layer, _ in lora_layers(model) for part in lora_parts(layer)}
        missed = [v.path for v in model.variables if id(v) not in known and not _is_seed(v) and not _is_mask(v)]
        if missed:
            raise InputError(
                f"{type(model).__name__} has weights the {self.family} adapter does not know: {', '.join(missed[:5])}. "
                "Expected a model as keras-nlp builds it; pass the backbone or the plain task."
            )
        lora = {id(stored(*place)): place for place in lora_layers(model)}
        return [weight._replace(lora=lora.get(id(weight.variable))) for weight in found]

    def task_weights(self, task: Any, backbone: Any) -> Iterator[tuple[str, Any, Axes]]:
        """Weights of a task around its backbone. The first Dense reads the residual stream."""
        first = True
        inside = {id(layer) for layer in backbone._flatten_layers()}
        for layer in task.layers:
            if id(layer) in inside or not layer.weights:
                continue
            if isinstance(layer, keras.layers.Dense):
                yield f"{layer.name}.kernel", stored(layer, "kernel"), (Axis(WIDTH) if first else None, None)
                if layer.bias is not None:
                    yield f"{layer.name}.bias", layer.bias, (None,)
                first = False
            elif type(layer).__name__ == "MaskedLMHead":
                for name, variable in walk(layer):
                    if "token_embedding" in name:
                        continue
                    last = Axis(VOCABULARY) if name.endswith("_bias") else self.embedding_axis(backbone)
                    yield f"{layer.name}.{name}", variable, (*[Axis(WIDTH)] * (len(variable.shape) - 1), last)
            else:
                for name, variable in walk(layer):
                    yield f"{layer.name}.{name}", variable, (None,) * len(variable.shape)

    def _block_weights(self, block: Block) -> list[Weight]:
        axes: dict[int, Axes] = {}
        projections = [*block.attention.projections, *block.feed_forward.projections]
        if block.cross_attention is not None:
            projections += block.cross_attention.projections
        for projection in projections:
            axes[id(stored(projection.layer, "kernel"))] = projection.kernel_axes
            if projection.has_bias:
                axes[id(projection.layer.bias)] = projection.bias_axes
        for norm in block.norms.values():
            for variable in norm.weights:
                axes[id(variable)] = (Axis(WIDTH),)
        axes.update({id(weight.variable): weight.axes for weight in block.bare})
        axes.update(self.extra_block_axes(block))
        prefix = f"{block.kind}.{block.index}"
        return [
            Weight(f"{prefix}.{name}", variable, axes.get(id(variable), (None,) * len(variable.shape)))
            for name, variable in walk(block.layer)
        ]

    def extra_block_axes(self, block: Block) -> dict[int, Axes]:
        """Axes of block weights that are neither projections nor norms (T5's relative bias), by id of the variable."""
        return {}

    def resize(self, block: Block, shape: BlockShape) -> None:
        """Gives a block new sizes, in place. Its new weights are freshly initialised."""
        sizes = {
            (FFN, block.feed_forward.place): shape.ffn,
            (HEADS, block.attention.place): shape.heads,
            (KV_HEADS, block.attention.place): shape.kv_heads,
        }
        if block.cross_attention is not None:
            cross = shape.cross_heads or shape.heads
            sizes[HEADS, block.cross_attention.place] = cross
            sizes[KV_HEADS, block.cross_attention.place] = shape.cross_kv_heads or cross
        attentions = [a for a in (block.attention, block.cross_attention) if a is not None]
        for attention in attentions:
            for projection in attention.projections:
                self._resize_projection(block, projection, sizes, shape.head_dim)
            heads = sizes[HEADS, attention.place]
            self.set_attention(attention.layer, heads, sizes[KV_HEADS, attention.place], shape.head_dim)
        feed_forward = block.feed_forward
        if isinstance(feed_forward, Experts):
            if shape.experts is None or shape.top is None:
                raise AssertionError(f"{feed_forward.place} has experts, its shape has none")
            sizes[EXPERTS, feed_forward.place] = shape.experts
            self._resize_projection(block, feed_forward.router, sizes, shape.head_dim)
        else:
            for projection in feed_forward.projections:
                self._resize_projection(block, projection, sizes, shape.head_dim)
        for weight in block.bare:
            resize_weight(weight, sizes)
        self.set_block(block.layer, shape)
        self.set_traits(block.layer, shape.traits)

    def _resize_projection(
        self, block: Block, projection: Projection, sizes: Mapping[tuple[str, str], int], head_dim: int
    ) -> None:
        if projection.part:  # the first part has taken the others along
            return
        shape = []
        for axis, size in zip(projection.kernel_axes, projection.layer.kernel.shape):
            if axis is None:  # the head_dim axis: the only one inside a block without a unit of its own
                shape.append(head_dim * projection.parts)
            elif axis.unit == WIDTH:
                shape.append(size)
            else:
                shape.append(sizes[axis.unit, axis.place] * (head_dim if axis.inner > 1 else 1))
        if tuple(shape) == tuple(projection.layer.kernel.shape):
            return
        scopes = [block.layer.name]
        if projection.owner is not block.layer:
            scopes.append(projection.owner.name)
        replace_layer(projection.owner, projection.attribute, resized(projection.layer, tuple(shape), scopes))


def resized(layer: Any, kernel_shape: tuple[int, ...], scopes: Sequence[str] = ()) -> Any:
    """A new Dense or EinsumDense like `layer` with another kernel shape, built, freshly initialised."""
    config = layer.get_config()
    if isinstance(layer, keras.layers.EinsumDense):
        source, target = layer.equation.split("->")
        inputs, kernel = source.split(",")
        size = dict(zip(kernel, kernel_shape))
        config["output_shape"] = tuple(size.get(letter) for letter in target)[1:]
        input_shape = tuple(size.get(letter) for letter in inputs)
    else:
        config["units"] = kernel_shape[1]
        input_shape = (None, kernel_shape[0])
    new = type(layer).from_config(config)
    scope = [keras.name_scope(name) for name in scopes]
    for entered in scope:
        entered.__enter__()
    try:
        new.build(input_shape)
    finally:
        for entered in reversed(scope):
            entered.__exit__(None, None, None)
    return new


def replace_layer(owner: Any, attribute: str, new: Any) -> None:
    """`owner.attribute = new` for a layer that is built and therefore locked; keeps the place in the layer order."""
    old = getattr(owner, attribute)
    locked = owner._tracker.locked
    owner._tracker.unlock()
    try:
        owner._tracker.replace_tracked_value("layers", old, new)
        setattr(owner, attribute, new)
    finally:
        if locked:
            owner._tracker.lock()


def resize_weight(weight: BareWeight, sizes: Mapping[tuple[str, str], int]) -> None:
    """Gives `weight` the `sizes` of its units, freshly initialised; keeps its place in the order of weights."""
    old, owner = weight.variable, weight.owner
    shape = tuple(
        size if axis is None or axis.unit == WIDTH else sizes[axis.unit, axis.place] * axis.inner * axis.repeats
        for axis, size in zip(weight.axes, old.shape)
    )
    if shape == tuple(old.shape):
        return
    with contextlib.ExitStack() as scopes:
        for name in old.path.split("/")[:-1]:
            scopes.enter_context(keras.name_scope(name))
        new = keras.Variable(weight.initializer, shape, old.dtype, trainable=old.trainable, name=old.name)
    kept = owner._trainable_variables if old.trainable else owner._non_trainable_variables
    place = next(place for place, variable in enumerate(kept) if variable is old)
    locked = owner._tracker.locked
    owner._tracker.unlock()
    try:
        owner._untrack_variable(old)
        setattr(owner, weight.attribute, new)
        kept.insert(place, kept.pop())
    finally:
        if locked:
            owner._tracker.lock()


def walk(layer: Any, prefix: str = "", seen: set[int] | None = None) -> Iterator[tuple[str, Any]]:
    """(name, variable) of every weight of `layer`, each once, named by attributes; no seeds, no LoRA matrices."""
    seen = set() if seen is None else seen
    own = [*getattr(layer, "_trainable_variables", ()), *getattr(layer, "_non_trainable_variables", ())]
    seen |= {id(part) for part in lora_parts(layer)}
    for variable in own:
        if id(variable) not in seen and not _is_seed(variable) and not _is_mask(variable):
            seen.add(id(variable))
            yield f"{prefix}{variable.name}", variable
    for name in sorted(vars(layer)):
        value = vars(layer)[name]
        if isinstance(value, keras.layers.Layer) and id(value) not in seen:
            seen.add(id(value))
            yield from walk(value, f"{prefix}{name.lstrip('_')}.", seen)


def find_backbone(model: Any) -> Any:
    """The backbone of a keras-nlp task, the model itself if it is one, or the one backbone inside a Keras model."""
    from keras_hub.models import Backbone

    if isinstance(model, Backbone):
        return model
    inner = getattr(model, "backbone", None)
    if isinstance(inner, Backbone):
        return inner
    if isinstance(model, keras.Model):
        inside = [layer for layer in model.layers if isinstance(layer, Backbone)]
        if len(inside) == 1:
            return inside[0]
    return None


def keep_indices(axis: Axis, keep: np.ndarray, size: int) -> np.ndarray:
    """Positions along `axis`, which has `size` of them, of the units `keep`."""
    once = (np.asarray(keep)[:, None] * axis.inner + np.arange(axis.inner)).reshape(-1)
    return (np.arange(axis.repeats)[:, None] * (size // axis.repeats) + once).reshape(-1)


def mha_scale(head_dim: int) -> float:
    return 1.0 / math.sqrt(head_dim)


def _is_seed(variable: Any) -> bool:
    return "seed_generator" in variable.path or variable.name == "seed_generator_state"


def _is_mask(variable: Any) -> bool:
    return bool(getattr(variable, "tfvllm_pruning_state", False))


def width_axes(variable: Any) -> Axes:
    """Axes of a weight whose last axis is the residual stream (position embeddings, norms)."""
    return (*[None] * (len(variable.shape) - 1), Axis(WIDTH))


def embedding_axes(name: str) -> Axes:
    return (Axis(WIDTH), Axis(VOCABULARY)) if "reverse" in name else (Axis(VOCABULARY), Axis(WIDTH))
