"""The table of how axes pass through ops, against what the ops compute."""

import numpy as np
import pytest
import tensorflow as tf

from tests.rules.checks import f32
from tfvllm.graph import axis_transfer, importer, infer, op_traits, token_axes
from tfvllm.graph.ir import Graph
from tfvllm.graph.token_axes import Tokens

R = tf.raw_ops


def _ints(*values):
    return tf.constant(values, tf.int32)


# op -> (a function, the shapes of its arguments, for each argument which axis of it each axis of the result is)
CASES = {
    "AddV2": (lambda x, y: x + y, [(4, 3), (2, 4, 3)], [[None, 0, 1], [0, 1, 2]]),
    "SelectV2": (lambda x, y: tf.where(x > 0, x, y), [(2, 1, 3), (2, 4, 3)], [[0, 1, 2], [0, 1, 2]]),
    "MatMul": (tf.matmul, [(4, 3), (3, 5)], [[0, None], [None, 1]]),
    "MatMul, transposed": (
        lambda x, y: tf.linalg.matmul(x, y, transpose_a=True, transpose_b=True),
        [(3, 4), (5, 3)],
        [[1, None], [None, 0]],
    ),
    "BatchMatMulV2": (tf.matmul, [(2, 4, 3), (2, 3, 5)], [[0, 1, None], [0, None, 2]]),
    "BatchMatMulV2, adjoint": (
        lambda x, y: R.BatchMatMulV2(x=x, y=y, adj_x=True, adj_y=True),
        [(2, 7, 3, 4), (7, 5, 3)],
        [[0, 1, 3, None], [None, 0, None, 1]],
    ),
    "BatchMatMul": (lambda x, y: R.BatchMatMul(x=x, y=y), [(2, 4, 3), (2, 3, 5)], [[0, 1, None], [0, None, 2]]),
    "BatchMatMulV3": (
        lambda x, y: R.BatchMatMulV3(x=x, y=y, Tout=tf.float32, adj_y=True),
        [(2, 4, 3), (2, 5, 3)],
        [[0, 1, None], [0, None, 1]],
    ),
    "BiasAdd": (tf.nn.bias_add, [(2, 4, 3), (3,)], [[0, 1, None], [None, None, None]]),
    "Softmax": (tf.nn.softmax, [(2, 4, 3)], [[0, 1, None]]),
    "Sum": (lambda x: R.Sum(input=x, axis=_ints(-2), keep_dims=False), [(2, 4, 3)], [[0, 2]]),
    "Mean": (lambda x: R.Mean(input=x, axis=_ints(1), keep_dims=True), [(2, 4, 3)], [[0, None, 2]]),
    "Any": (lambda x: tf.cast(R.Any(input=x > 0, axis=_ints(0)), tf.float32), [(2, 4)], [[1]]),
    "Reshape": (lambda x: tf.reshape(x, [2, 1, 12, 5]), [(2, 4, 3, 5)], [[0, None, None, 3]]),
    "ExpandDims": (lambda x: tf.expand_dims(x, 1), [(2, 4)], [[0, None, 1]]),
    "Squeeze": (lambda x: tf.squeeze(x, 1), [(2, 1, 4)], [[0, 2]]),
    "GatherV2": (lambda x: tf.gather(x, _ints(1, 1, 0), axis=1), [(2, 4, 3)], [[0, None, 2]]),
    "BroadcastTo": (lambda x: tf.broadcast_to(x, [2, 4, 3]), [(4, 1)], [[None, 0, 1]]),
    "StridedSlice": (lambda x: x[:, 1, :2, tf.newaxis], [(2, 4, 3, 5)], [[0, None, None, 3]]),
    "Transpose": (lambda x: tf.transpose(x, [2, 0, 1]), [(2, 4, 3)], [[2, 0, 1]]),
    "Einsum": (lambda x, y: tf.einsum("bsd,bdk->kbs", x, y), [(2, 4, 3), (2, 3, 5)], [[None, 0, 1], [2, 0, None]]),
    "Einsum, diagonal": (lambda x: tf.einsum("bii->bi", x), [(2, 3, 3)], [[0, None]]),
    "Split": (lambda x: tf.split(x, 2, axis=1), [(2, 4, 3)], [[0, None, 2]]),
    "SplitV": (lambda x: tf.split(x, [1, 3], axis=-2), [(2, 4, 3)], [[0, None, 2]]),
    "Unpack": (lambda x: tf.unstack(x, axis=1), [(2, 4, 3)], [[0, 2]]),
    "Pack": (lambda x, y: tf.stack([x, y], axis=1), [(2, 4), (2, 4)], [[0, None, 1]] * 2),
    "ConcatV2": (lambda x, y: tf.concat([x, y], axis=-1), [(2, 4), (2, 3)], [[0, None]] * 2),
}


def _graph(function, *shapes) -> Graph:
    concrete = tf.function(function, autograph=False).get_concrete_function(
        *(f32(*s, name=f"x{i}") for i, s in enumerate(shapes))
    )
    return importer.from_concrete(concrete)


def _node(graph, case):
    (node,) = (n for n in graph.live() if n.op == case.split(",")[0])
    return node


def _arguments(graph, node):
    """Which operand of the node each argument of the graph goes into, as it is or compared with 0."""
    behind = {i: {v, *v.node.inputs} for i, v in enumerate(node.inputs)}
    return [max(i for i, values in behind.items() if x in values) for x in graph.inputs.values()]


@pytest.mark.parametrize("case", CASES)
def test_the_table(case):
    function, shapes, expected = CASES[case]
    graph = _graph(function, *shapes)
    node = _node(graph, case)
    for operand, axes in zip(_arguments(graph, node), expected):
        assert [axis_transfer.operand_axes(node, axis)[operand] for axis in range(len(axes))] == axes
        for axis in range(len(node.inputs[operand].shape)):
            there = axes.index(axis) if axis in axes else None
            assert axis_transfer.result_axis(node, operand, axis) == there


@pytest.mark.parametrize("case", CASES)
def test_a_position_is_computed_from_the_same_position(case):
    function, shapes, expected = CASES[case]
    rng = np.random.default_rng(0)
    arrays = [rng.normal(size=shape).astype(np.float32) for shape in shapes]
    results = [np.asarray(v) for v in tf.nest.flatten(function(*arrays))]
    for i, axes in enumerate(expected):
        for at, axis in enumerate(axes):
            if axis is None or shapes[i][axis] == 1:
                continue
            changed = [a.copy() for a in arrays]
            np.moveaxis(changed[i], axis, 0)[1] = rng.normal(size=np.moveaxis(changed[i], axis, 0)[1].shape)
            for old, new in zip(results, tf.nest.flatten(function(*changed))):
                old, new = np.moveaxis(old, at, 0), np.moveaxis(np.asarray(new), at, 0)
                others = np.arange(len(old)) != 1
                np.testing.assert_array_equal(new[others], old[others])
                assert case == "Any" or np.all(np.any(new[1] != old[1]))


def test_every_op_of_the_table_is_tried():
    tried = {case.split(",")[0] for case in CASES}
    alike = [
        *(op_traits.ELEMENTWISE, op_traits.ALONG_LAST, op_traits.REDUCTIONS, op_traits.LOGICAL_REDUCTIONS),
        *(op_traits.MATMULS, op_traits.LOOKUPS),
    ]
    for ops in alike:
        assert tried & ops
        tried |= ops
    assert tried == set(axis_transfer.TABLE)


def test_a_fused_product_has_its_residual_row_by_row():
    graph = Graph()
    shapes = {"x": (4, 3), "y": (3, 5), "bias": (5,), "residual": (4, 5)}
    for name in shapes:
        graph.inputs[name] = graph.add(name, "Placeholder", [], {"dtype": tf.float32}).output
    node = graph.add(
        "product",
        "_FusedMatMul",
        list(graph.inputs.values()),
        {"T": tf.float32, "num_args": 2, "fused_ops": ["BiasAdd", "Add"]},
    )
    graph.outputs = {"y": node.output}
    infer.infer_graph(graph, {name: tf.TensorShape(shape) for name, shape in shapes.items()})
    assert [axis_transfer.operand_axes(node, axis) for axis in (0, 1)] == [[0, None, None, 0], [None, 1, 0, 1]]


def test_ids_stand_where_the_table_s_axis_was():
    def f(x):
        return tf.gather(x, tf.cast(x[:, :, 0] > 0, tf.int32), axis=1)  # [2, 4, 3] -> [2, 2, 4, 3]

    node = _node(_graph(f, (2, 4, 3)), "GatherV2")
    assert [axis_transfer.operand_axes(node, axis)[:2] for axis in range(4)] == [
        [0, None],
        [None, 0],
        [None, 1],
        [2, None],
    ]


def test_what_is_not_known_has_no_axes():
    graph = _graph(lambda x: tf.cumsum(tf.gather(x, _ints(0, 1), batch_dims=0, axis=1), axis=1), (2, 4))
    node = _node(graph, "Cumsum")
    assert axis_transfer.operand_axes(node, 0) == [None, None]
    assert axis_transfer.result_axis(node, 0, 0) is None


@pytest.mark.parametrize(
    "function, tokens, expected",
    [
        (lambda x: x[:, tf.newaxis], (0, 2), (0, 1)),  # a new axis before the positions
        (lambda x: x[:, :, tf.newaxis], (0, 2), None),  # nobody's tokens
        (lambda x: x[:, 0], (0, 1), (0, 2)),  # of [sequences, _, tokens, width]
    ],
)
def test_tokens_behind_a_slice(function, tokens, expected):
    node = _node(_graph(function, (None, None, None, 3)), "StridedSlice")
    size = node.output.shape
    (found, *_) = token_axes.through(node, Tokens(*tokens, tuple(size[a] for a in tokens)))
    assert (None if found is None else found.axes) == expected
