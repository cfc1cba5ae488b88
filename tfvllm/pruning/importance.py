"""How much each unit of a model matters: scores of heads, neurons, experts, channels, tokens and layers.

Every function returns {(unit, place): float64 scores, one per unit}; larger is worth more. Layers are
("layers", "encoder" or "decoder").
"""

import math
from collections.abc import Callable, Collection, Mapping
from typing import Any

import numpy as np
import tensorflow as tf

from tfvllm.errors import InputError
from tfvllm.families import EXPERTS, FFN, HEADS, KV_HEADS, VOCABULARY, WIDTH, Adapter, Experts, adapter_for
from tfvllm.families.matmuls import einsum_as_matmul
from tfvllm.families.stored import effective
from tfvllm.pruning.capture import batches, listener, padding_mask, token_rows, traced

Scores = dict[tuple[str, str], np.ndarray]
METHODS = ("magnitude", "taylor", "activation")


UNITS = (HEADS, KV_HEADS, FFN, EXPERTS, WIDTH, VOCABULARY)


def unit_scores(
    model: Any,
    importance: Any,
    data: Any = None,
    *,
    fluctuation: bool = False,
    limit: int = 64,
    units: Collection[str] = UNITS,
) -> Scores:
    """Scores of every unit of `model`.

    Args:
        importance: "magnitude" (or "l2"): norm of the unit's weights. "taylor": (sum of gradient x weight) squared,
            summed over batches (Molchanov et al. 2019, arXiv:1906.10771, eq. 8; for heads as Michel et al. 2019,
            arXiv:1905.10650). "activation": norm of what the unit adds to the residual stream, RMS(h_j) x ||W_j||
            (structured Wanda, Sun et al. 2023, arXiv:2306.11695); with `fluctuation` the standard deviation of h_j
            instead of its RMS (FLAP, An et al. 2023, arXiv:2312.11983), for use with compensation; of an expert: its
            share of what the router gives out, averaged over tokens (its neurons' h_j are times it). Or a mapping as
            returned here, or a function (model, data) -> mapping; what it lacks is filled by magnitude.
        data: calibration batches, for "taylor" with labels.
        limit: use at most that many batches.
        units: what "taylor" is to look at: gradients of large embeddings cost time.

    Raises:
        InputError: an unknown name, or data missing.

    Example:
        >>> scores = tfvllm.pruning.unit_scores(tiny_bert(), "magnitude")
        >>> scores["ffn", "encoder.0"].shape, scores["heads", "encoder.0.self"].shape
        ((32,), (2,))
    """
    adapter = adapter_for(model)
    scores = magnitude(adapter, model)
    if isinstance(importance, Mapping):
        return {**scores, **{k: np.asarray(v, np.float64) for k, v in importance.items()}}
    if callable(importance):
        return {**scores, **importance(model, data)}
    if importance in ("magnitude", "l2"):
        return scores
    if importance not in METHODS:
        raise InputError(f"importance={importance!r}: expected one of {', '.join(METHODS)}, a mapping or a function.")
    if data is None:
        raise InputError(
            f"importance={importance!r} needs calibration data. Pass data=, a few hundred rows are enough."
        )
    if importance == "taylor":
        scores.update(taylor(adapter, model, data, limit, units))
        influence = activation(adapter, model, data, limit, fluctuation=False)
        scores.update({k: v for k, v in influence.items() if k[0] == "layers"})
    else:
        scores.update(activation(adapter, model, data, limit, fluctuation=fluctuation))
    return scores


def magnitude(adapter: Adapter, model: Any) -> Scores:
    """L2 norm of all weights that belong to a unit. Layers: evenly spaced, both ends first (as DistilBERT)."""
    squares = _per_unit(adapter, model, lambda value: np.square(value, dtype=np.float64))
    scores = {place: np.sqrt(total) for place, total in squares.items()}
    for kind, layers in adapter.stacks(adapter.backbone(model)).items():
        scores["layers", kind] = spread_order(len(layers))
    return scores


def spread_order(count: int) -> np.ndarray:
    """Scores under which the best k of `count` layers are, for every k, about evenly spaced with both ends kept."""
    order: list[int] = []
    while len(order) < count:
        rest = [i for i in range(count) if i not in order]
        far = [min((abs(i - j) for j in order), default=count if i == 0 else 0) for i in rest]
        order.append(rest[int(np.argmax(far))])
    scores = np.zeros(count)
    scores[order] = np.arange(count, 0, -1)
    return scores


def _per_unit(adapter: Adapter, model: Any, measure: Callable[[np.ndarray], np.ndarray]) -> Scores:
    """Sums `measure(weight)` over all weights of each unit, whichever axis of whichever weight it owns."""
    totals: Scores = {}
    heads: dict[str, tuple[int, int]] = {}
    for block in adapter.blocks(model):
        for attention in (block.attention, block.cross_attention):
            if attention is not None:
                heads[attention.place] = (attention.heads, attention.kv_heads)
    for weight in adapter.weights(_describable(adapter, model)):
        if all(axis is None for axis in weight.axes):
            continue
        value = measure(weight.value().astype(np.float32))
        for position, axis in enumerate(weight.axes):
            if axis is None:
                continue
            other = tuple(i for i in range(value.ndim) if i != position)
            total = axis.sums(value.sum(axis=other))
            totals[axis.unit, axis.place] = totals.get((axis.unit, axis.place), 0.0) + total
    for place, (queries, groups) in heads.items():  # a group owns its query heads too, and what one kernel holds of all
        own = totals[HEADS, place].reshape(groups, queries // groups).sum(axis=1)
        totals[KV_HEADS, place] = totals.get((KV_HEADS, place), 0.0) + own
    return totals


def _describable(adapter: Adapter, model: Any) -> Any:
    from keras_hub.models import Task

    return model if isinstance(model, Task) else adapter.backbone(model)


def loss_of(model: Any, x: Any, y: Any, weight: Any, training: bool = False) -> Any:
    """The compiled loss of `model` on one batch."""
    if not getattr(model, "compiled", False) or model._compile_loss is None:
        raise InputError(f"{type(model).__name__} has no loss and taylor needs one: call model.compile(loss=...).")
    return model.compute_loss(x=x, y=y, y_pred=model(x, training=training), sample_weight=weight, training=training)


def taylor(adapter: Adapter, model: Any, data: Any, limit: int = 64, units: Collection[str] = UNITS) -> Scores:
    """(sum of gradient x weight over the unit's output weights) squared, summed over batches.

    For neuron j, head h and expert e the sum over the output projection's rows equals the gradient of a gate on the
    unit, so this is the first-order change of the loss when the unit is switched off. Width, vocabulary: over all
    weights.
    """
    tracked = []
    values: dict[int, Callable[[], np.ndarray]] = {}  # LoRA is a sum: the stored kernel has the whole one's gradient
    for weight in adapter.weights(_describable(adapter, model)):
        for position, axis in enumerate(weight.axes):
            if axis is None or axis.unit not in units:
                continue
            reads = axis.unit in (WIDTH, VOCABULARY) or (
                axis.unit in (HEADS, FFN, EXPERTS)
                and weight.axes[-1] is not None
                and weight.axes[-1].unit == WIDTH
                and position < len(weight.axes) - 1
            )
            if reads:
                tracked.append((weight.variable, position, axis))
                values[id(weight.variable)] = weight.value
    variables = list({id(v): v for v, _, _ in tracked}.values())

    def gradients(x: Any, y: Any, sample_weight: Any) -> Any:
        with einsum_as_matmul(model), tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch([v.value for v in variables])
            loss = loss_of(model, x, y, sample_weight)
        return tape.gradient(loss, [v.value for v in variables])

    function = traced(model, gradients)
    totals: Scores = {}
    for x, y, sample_weight in batches(model, data, limit=limit):
        product = {}
        for variable, gradient in zip(variables, function(x, y, sample_weight)):
            if gradient is not None:
                dense = tf.convert_to_tensor(gradient)
                weights = values[id(variable)]().astype(np.float32)
                product[id(variable)] = np.asarray(tf.cast(dense, tf.float32)) * weights
        sums: Scores = {}
        for variable, position, axis in tracked:
            if id(variable) not in product:
                continue
            value = product[id(variable)]
            total = value.sum(axis=tuple(i for i in range(value.ndim) if i != position), dtype=np.float64)
            total = axis.sums(total)
            sums[axis.unit, axis.place] = sums.get((axis.unit, axis.place), 0.0) + total
        for place, total in sums.items():
            totals[place] = totals.get(place, 0.0) + np.square(total)
            if place[0] == HEADS:
                for block in adapter.blocks(model):
                    if block.call:
                        continue
                    for attention in (block.attention, block.cross_attention):
                        if attention is not None and attention.place == place[1]:
                            group = total.reshape(attention.kv_heads, -1).sum(axis=1)
                            key = (KV_HEADS, place[1])
                            totals[key] = totals.get(key, 0.0) + np.square(group)
    return totals


class UnitStatistics:
    """Running mean and second moment of every neuron's and head's activation, over real tokens.

    Of experts: `routed`, the sum of what the router gives each, and the second moment of their neurons' activations
    times that, [experts, neurons].

    With `joint`, also the sums of the products of any two activations at one place: `products`, [inputs, inputs].
    """

    def __init__(self, adapter: Adapter, model: Any, joint: bool = False):
        self.adapter = adapter
        self.joint = joint
        self.products: dict[Any, np.ndarray] = {}
        self.count: dict[Any, float] = {}
        self.sum: dict[Any, np.ndarray] = {}
        self.square: dict[Any, np.ndarray] = {}
        self.routed: dict[Any, np.ndarray] = {}
        self.influence: dict[tuple[str, int], float] = {}
        self.channels: dict[str, np.ndarray] = {}
        blocks = adapter.blocks(model)
        self.kinds = {block.kind for block in blocks}
        self.layers: dict[Any, Any] = {}
        self.experts: dict[str, Experts] = {}
        for block in blocks:
            inside = block.feed_forward
            if isinstance(inside, Experts):
                self.experts[inside.place] = inside
                self.layers[EXPERTS, inside.place, block.kind] = inside.layer
            else:
                self.layers[FFN, inside.place, block.kind] = inside.down.layer
            self.layers[HEADS, block.attention.place, block.kind] = block.attention.output.layer
            if block.cross_attention is not None:
                self.layers[HEADS, block.cross_attention.place, block.kind] = block.cross_attention.output.layer
            self.layers["block", block.index, block.kind] = block.layer

    def run(self, model: Any, data: Any, limit: int) -> "UnitStatistics":
        """Feeds batches through `model` in inference mode."""
        listen = listener(model, self.layers, self._measure)
        totals: dict[str, dict[Any, Any]] = {
            "count": self.count,
            "sum": self.sum,
            "square": self.square,
            "routed": self.routed,
            "products": self.products,
        }
        for x, _, _ in batches(model, data, limit=limit):
            for (unit, place, kind), found in listen(x).items():
                told = {name: np.asarray(value, np.float64) for name, value in found.items()}
                if unit == "block":
                    self.influence[kind, place] = self.influence.get((kind, place), 0.0) + float(told["influence"])
                    self.channels[kind] = self.channels.get(kind, np.zeros(1)) + told["channels"]
                    continue
                for name, value in told.items():
                    totals[name][unit, place] = totals[name].get((unit, place), 0.0) + value
        return self

    def _measure(self, key: Any, inputs: Any, outputs: Any, x: Any) -> dict[str, Any]:
        unit, place, kind = key
        mask = padding_mask(x, kind)
        if unit == "block":
            outputs = outputs[0] if isinstance(outputs, tuple | list) else outputs
            before, after = token_rows(inputs, mask), token_rows(outputs, mask)
            cosine = tf.reduce_sum(before * after, -1) / (tf.norm(before, axis=-1) * tf.norm(after, axis=-1) + 1e-12)
            return {"influence": tf.reduce_sum(1.0 - cosine), "channels": tf.reduce_sum(tf.abs(after), 0)}
        tokens = token_rows(inputs, mask)
        if unit == EXPERTS:
            return _of_experts(self.experts[place], tokens)
        rows = tf.cast(tokens, tf.float64)  # the variance is a difference of these sums
        found = {
            "count": tf.shape(tokens)[0],
            "sum": tf.reduce_sum(rows, 0),
            "square": tf.reduce_sum(tf.square(rows), 0),
        }
        if self.joint:
            flat = tf.reshape(tokens, [tf.shape(tokens)[0], math.prod(tokens.shape[1:])])
            found["products"] = tf.matmul(flat, flat, transpose_a=True)
        return found

    def mean(self, unit: str, place: str) -> np.ndarray:
        """Mean activation, shape of the output projection's input without batch and length."""
        return self.sum[unit, place] / max(self.count[unit, place], 1.0)

    def variance(self, unit: str, place: str) -> np.ndarray:
        second = self.square[unit, place] / max(self.count[unit, place], 1.0)
        return np.maximum(second - np.square(self.mean(unit, place)), 0.0)


def _of_experts(experts: Experts, tokens: Any) -> dict[str, Any]:
    probabilities = tf.nn.softmax(tf.cast(experts.router.layer(tokens), tf.float32))
    weights, chosen = tf.math.top_k(probabilities, experts.top)
    if experts.normalized:
        weights /= tf.reduce_sum(weights, axis=-1, keepdims=True)
    routed = tf.reduce_sum(tf.one_hot(chosen, experts.count) * weights[..., None], axis=1)  # [tokens, experts]
    given = tf.cast(experts.hidden(tokens), tf.float32) * tf.transpose(routed)[..., None]
    return {
        "count": tf.shape(tokens)[0],
        "square": tf.reduce_sum(tf.square(tf.cast(given, tf.float64)), 1),
        "routed": tf.reduce_sum(tf.cast(routed, tf.float64), 0),
    }


def activation(
    adapter: Adapter,
    model: Any,
    data: Any,
    limit: int = 64,
    *,
    fluctuation: bool = False,
    statistics: UnitStatistics | None = None,
) -> Scores:
    """Norm of what each unit adds to the residual stream on `data`.

    Layers: block influence 1 - cos(input, output), averaged over tokens (ShortGPT, Men et al. 2024, arXiv:2403.03853).
    Experts: mean of what the router gives them.
    Width: mean |activation| of the channel at block outputs (Minitron, Muralidharan et al. 2024, arXiv:2407.14679).
    """
    seen = statistics or UnitStatistics(adapter, model).run(model, data, limit)
    scores: Scores = {}
    if len({np.shape(channels) for channels in seen.channels.values()}) == 1:  # else there is no one width
        scores[WIDTH, ""] = np.sum([*seen.channels.values()], axis=0)
    for block in adapter.blocks(model):
        for attention in (block.attention, block.cross_attention):
            if attention is None:
                continue
            power = _power(seen, HEADS, attention.place, fluctuation).reshape(attention.heads, attention.head_dim)
            kernel = (
                effective(attention.output.layer, "kernel")
                .astype(np.float64)
                .reshape(attention.heads, attention.head_dim, -1)
            )
            contribution = (power * np.square(kernel).sum(axis=-1)).sum(axis=1)
            scores[HEADS, attention.place] = np.sqrt(contribution)
            scores[KV_HEADS, attention.place] = np.sqrt(contribution.reshape(attention.kv_heads, -1).sum(axis=1))
        inside, place = block.feed_forward, block.feed_forward.place
        if isinstance(inside, Experts):
            kernel = np.asarray(inside.down.variable, np.float64)
            power = _power(seen, EXPERTS, place, fluctuation=False)  # nothing makes up for their neurons' means
            scores[FFN, place] = np.sqrt((power * np.square(kernel).sum(axis=-1)).sum(axis=0))
            scores[EXPERTS, place] = seen.routed[EXPERTS, place] / max(seen.count[EXPERTS, place], 1.0)
            continue
        kernel = effective(inside.down.layer, "kernel").astype(np.float64)
        scores[FFN, place] = np.sqrt(_power(seen, FFN, place, fluctuation) * np.square(kernel).sum(axis=-1))
    for kind in seen.kinds:
        indices = sorted(index for k, index in seen.influence if k == kind)
        scores["layers", kind] = np.asarray([seen.influence[kind, index] for index in indices])
    return scores


def _power(seen: UnitStatistics, unit: str, place: str, fluctuation: bool) -> np.ndarray:
    if fluctuation:
        return seen.variance(unit, place)
    return seen.square[unit, place] / max(seen.count[unit, place], 1.0)
