"""Where the heads and neurons of a block are, read off the ranks of its kernels: what the adapters share."""

from collections.abc import Sequence
from typing import Any

from tfvllm.families.base import FFN, HEADS, KV_HEADS, WIDTH, Attention, Axes, Axis, FeedForward, Projection, mha_scale

WIDE = Axis(WIDTH)


def attention(
    layer: Any,
    place: str,
    names: Sequence[str] = ("_query_dense", "_key_dense", "_value_dense", "_output_dense"),
    *,
    head_dim: int | None = None,
    scale: float | None = None,
    prefix: str = "",
) -> Attention:
    """Describes an attention layer with four projections of its own.

    Args:
        layer: holds the projections under `names`: query, key and value as [width, heads, head_dim] or [width, heads x
            head_dim], the output as [heads, head_dim, width] or [heads x head_dim, width].
        place: its name in axes, e.g. "decoder.0.self".
        head_dim: needed where the query's kernel is flat.
        scale: what scores are multiplied by; default 1 / sqrt(head_dim).
        prefix: goes before the names of the projections ("cross_").
    """
    query, key, _, output = (getattr(layer, name).kernel for name in names)
    head_dim = int(query.shape[2]) if head_dim is None else head_dim

    def along(unit: str, kernel: Any) -> Axes:
        return (Axis(unit, place), None) if len(kernel.shape) == 3 else (Axis(unit, place, head_dim),)

    def projection(which: int, name: str, kernel: Axes, bias: Axes) -> Projection:
        return Projection(prefix + name, getattr(layer, names[which]), layer, names[which], kernel, bias)

    queries, keys = along(HEADS, query), along(KV_HEADS, key)
    return Attention(
        layer=layer,
        place=place,
        heads=_count(query, head_dim),
        kv_heads=_count(key, head_dim),
        head_dim=head_dim,
        query=projection(0, "query", (WIDE, *queries), queries),
        key=projection(1, "key", (WIDE, *keys), keys),
        value=projection(2, "value", (WIDE, *keys), keys),
        output=projection(3, "output", (*along(HEADS, output), WIDE), (WIDE,)),
        scale=mha_scale(head_dim) if scale is None else scale,
    )


def _count(kernel: Any, head_dim: int) -> int:
    return int(kernel.shape[1]) // (1 if len(kernel.shape) == 3 else head_dim)


def feed_forward(
    layer: Any, place: str, up: str, down: str, gate: str | None = None, activation: Any = None, prefix: str = ""
) -> FeedForward:
    """Describes a feed-forward of Dense layers, held by `layer` under the names `up`, `down` and `gate`.

    Args:
        prefix: goes before the names of the projections.
    """
    neurons = Axis(FFN, place)

    def projection(name: str, attribute: str) -> Projection:
        kernel = (neurons, WIDE) if name == "down" else (WIDE, neurons)
        return Projection(prefix + name, getattr(layer, attribute), layer, attribute, kernel, kernel[1:])

    return FeedForward(
        place=place,
        width=int(getattr(layer, up).kernel.shape[1]),
        up=projection("up", up),
        down=projection("down", down),
        gate=None if gate is None else projection("gate", gate),
        activation=activation,
    )
