"""Rotary position embedding (RoFormer, https://arxiv.org/abs/2104.09864): fewer passes over queries and keys."""

from itertools import pairwise

from tfvllm.graph import op_traits
from tfvllm.graph.builder import Builder, Declined, Skip
from tfvllm.graph.guarantee import Exact
from tfvllm.graph.ir import Node, Value
from tfvllm.graph.pattern import constant, either, op
from tfvllm.graph.rewriter import NodePass, Rule


class SignsIntoSine(Rule):
    """[-x₂, x₁]·sin -> [x₂, x₁]·[-sin, sin]: the sign is changed once for all heads and layers, in the small table."""

    guarantee = Exact()

    def pattern(self, first, second, sine, sizes):
        negative = op.Neg(second, name="negative")
        joined = op.ConcatV2(negative, first, constant("axis"), name="joined")
        stacked = op.Reshape(op.Pack(negative, first, name="stacked"), sizes, name="joined")
        return op.Mul(either(joined, stacked), sine, name="out")

    def condition(self, graph, m):
        half = m.first.shape[-1] if m.first.shape else None
        if m.first.shape != m.second.shape or not isinstance(half, int) or m.joined.rank != m.first.rank:
            raise Skip("not the two halves of one axis")
        if m.joined.shape[:-1] != m.first.shape[:-1] or m.joined.shape[-1] != 2 * half:
            raise Skip("not the two halves of one axis")
        if m.get("axis") is not None and int(graph.constant(m.axis)) not in (-1, m.first.rank - 1):
            raise Skip("joined along another axis")
        if m.get("stacked") is not None and m.node("stacked").attr("axis") not in (-2, m.first.rank - 1):
            raise Skip("the halves alternate")
        if any(graph.single_use(v) is None for v in (m.negative, m.joined)):
            raise Declined("the turned half is read elsewhere")
        if m.sine.shape is None or m.sine.shape[-1] != 2 * half or m.out.shape != m.joined.shape:
            raise Declined("the factor has another width")
        if m.sine.shape == m.joined.shape and not graph.is_static(m.sine):
            raise Declined("the factor is as large as what it multiplies: nothing would be saved")

    def replacement(self, b, m):
        half = m.first.shape[-1]
        signed = b.Mul(m.sine, b.const([-1.0] * half + [1.0] * half, m.sine.dtype))
        return b.Mul(b.ConcatV2(m.second, m.first, b.const(-1)), signed)


class RotateTogether(NodePass):
    """rotate(q), rotate(k), q and k side by side in one product -> split(rotate([q, k])): one rotation for all."""

    guarantee = Exact()
    ops = frozenset({"Split", "SplitV"})

    def rewrite(self, b, node):
        y, axis = (node.inputs[1], node.inputs[0]) if node.op == "Split" else (node.inputs[0], node.inputs[2])
        if y.shape is None or len(y.shape) != 2 or axis.known_value not in (1, -1):
            return None
        heads = [_heads(b.graph, part) for part in node.outputs]
        turned = [None if h is None else _rotation(b.graph, h) for h in heads]
        unlike = False
        for i, (first, second) in enumerate(pairwise(turned)):
            if first is None or second is None:
                continue
            if first[1:] == second[1:]:
                found = _together(b, node, y, i, [h for h in heads[i : i + 2] if h is not None], first, second)
                if found is not None:
                    return found
                break
            unlike = True
        if unlike:
            raise Declined("query and key are rotated by different angles")
        return None


def _together(b: Builder, node: Node, y: Value, i: int, heads: list[Value], first, second) -> dict[Value, Value] | None:
    """What takes the place of two rotations, of the parts i and i + 1 of `y`, and of its other parts."""
    cosine, sine = first[1:]
    batch, length, _, size = heads[0].shape
    counts = [h.shape[2] for h in heads]
    if any(table.shape is None or (len(table.shape) > 3 and table.shape[-2] != 1) for table in (cosine, sine)):
        raise Declined("every head has angles of its own")
    widths = [part.shape[1] for part in node.outputs]
    if not all(isinstance(n, int) for n in (*counts, *widths, size)) or any(len(t.shape) < 2 for t in first[1:]):
        return None
    b.scope = node.name + "/rotated"
    joined = [*widths[:i], sum(widths[i : i + 2]), *widths[i + 2 :]]
    parts = b.op("SplitV", [y, b.ints(*joined), b.const(1)], num_split=len(joined)) if len(joined) > 1 else [y]
    x = b.reshape(parts[i], (batch, length, sum(counts), size), like=[heads[0], y])
    halves = b.op("Split", [b.const(-1), x], num_split=2)
    turned = b.ConcatV2(halves[1], halves[0], b.const(-1))
    rotated = b.AddV2(b.Mul(x, cosine), b.Mul(turned, sine))
    query, key = b.op("SplitV", [rotated, b.ints(*counts), b.const(2)], num_split=2)
    others = [v for j, v in enumerate(node.outputs) if j not in (i, i + 1)]
    return {first[0]: query, second[0]: key, **dict(zip(others, parts[:i] + parts[i + 1 :]))}


def _heads(graph, part: Value) -> Value | None:
    """`part` as [batch, length, heads, size], if it is read as that only."""
    reshape = graph.single_use(part)
    return reshape.output if reshape is not None and reshape.op == "Reshape" and reshape.output.rank == 4 else None


def _rotation(graph, x: Value) -> tuple[Value, Value, Value] | None:
    """(x·cos + [x₂, x₁]·sin, cos, sin), if that is all that reads x."""
    readers = graph.uses(x)
    split = next((n for n in readers if n.op == "Split"), None)
    scaled = next((n for n in readers if n.op == "Mul"), None)
    if len(readers) != 2 or split is None or scaled is None or graph.is_output(x) or len(split.outputs) != 2:
        return None
    joined = graph.single_use(split.outputs[0])
    if split.inputs[0].known_value not in (-1, 3) or joined is None or joined.op != "ConcatV2":
        return None
    if joined.inputs[:2] != [split.outputs[1], split.outputs[0]] or joined.inputs[2].known_value not in (-1, 3):
        return None
    turned, total = graph.single_use(joined.output), graph.single_use(scaled.output)
    if turned is None or turned.op != "Mul" or total is None or total.op not in op_traits.ADDITIONS:
        return None
    if {*total.inputs} != {scaled.output, turned.output} or graph.single_use(turned.output) is not total:
        return None
    cosine, sine = (n.inputs[1] if n.inputs[0] is v else n.inputs[0] for n, v in ((scaled, x), (turned, joined.output)))
    return (total.output, cosine, sine) if total.output.shape == x.shape else None
