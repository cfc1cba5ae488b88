"""Random graphs over the operations that the rules know, for property tests.

A program is a list of instructions `(operation, first, second)`, plain integers, so that Hypothesis can shrink it.
Every value is [batch, length, 8]; each operation takes one or two earlier values and gives a new one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache

import numpy as np
import tensorflow as tf

from tfvllm.graph import importer, infer
from tfvllm.graph.guarantee import Approximate
from tfvllm.graph.ir import Graph, Value
from tfvllm.graph.rewriter import Rewriter
from tfvllm.rules import pipeline
from tfvllm.simplifier import verify

WIDTH = 8
Instruction = tuple[int, int, int]
_rng = np.random.default_rng(11)


def _weight(*shape: int) -> tf.Variable:
    return tf.Variable(_rng.normal(0, 0.4, shape).astype(np.float32))


MATRICES = [_weight(WIDTH, WIDTH) for _ in range(3)]
UP, DOWN = _weight(WIDTH, 12), _weight(12, WIDTH)
HEADS_IN = [_weight(WIDTH, 2, 4) for _ in range(3)]
HEADS_OUT = _weight(2, 4, WIDTH)
HEADS_FIRST = _weight(2, WIDTH, 4)
HEAD_BIAS = _weight(2, 4)
VECTORS = [_weight(WIDTH) for _ in range(3)]
KERNEL, DEPTHWISE = _weight(3, 1, WIDTH, WIDTH), _weight(3, 1, WIDTH, 1)
ZERO = tf.constant(0.0)


def _dense(x, w, b=None):
    """As Keras writes a Dense layer on three axes: MatMul, Reshape, BiasAdd."""
    y = tf.reshape(tf.reshape(x, [-1, w.shape[0]]) @ w, [tf.shape(x)[0], tf.shape(x)[1], w.shape[1]])
    return y if b is None else tf.nn.bias_add(y, b)


def _heads(x, w):
    return tf.transpose(tf.einsum("abc,cde->abde", x, w) + HEAD_BIAS, [0, 2, 1, 3])


def _attention(x, y, mask):
    q, k, v = _heads(x, HEADS_IN[0]) * 0.5, _heads(y, HEADS_IN[1]), _heads(y, HEADS_IN[2])
    scores = tf.matmul(q, k, transpose_b=True)
    chances = tf.where(mask, tf.nn.softmax(tf.where(mask, scores, -1e9)), 0.0)
    return tf.einsum("abde,def->abf", tf.transpose(chances @ v, [0, 2, 1, 3]), HEADS_OUT)


def _layer_norm(x, gamma, beta):
    mean = tf.reduce_mean(x, -1, keepdims=True)
    variance = tf.reduce_mean(tf.math.squared_difference(x, tf.stop_gradient(mean)), -1, keepdims=True)
    inv = tf.math.rsqrt(variance + 1e-2) * gamma
    return x * inv + (-mean * inv + beta)


def _rms_norm(x, gamma):
    return x * tf.math.rsqrt(tf.reduce_mean(x**2, -1, keepdims=True) + 1e-2) * gamma


def _softmax(x):
    e = tf.exp(x - tf.reduce_max(x, -1, keepdims=True))
    return e / tf.reduce_sum(e, -1, keepdims=True)


def _conv(x, depthwise=False):
    wide = x[:, :, None, :]
    y = (
        tf.nn.depthwise_conv2d(wide, DEPTHWISE, [1, 1, 1, 1], "SAME")
        if depthwise
        else tf.nn.conv2d(wide, KERNEL, 1, "SAME")
    )
    y = tf.nn.bias_add(y, VECTORS[0]) * VECTORS[1] + VECTORS[2]
    return tf.reshape(tf.nn.relu(y), tf.shape(x))


def _loop(x):
    return tf.while_loop(lambda i, y: i < 2, lambda i, y: (i + 1, tf.tanh(y) - (-tf.tanh(y))), [0, x])[1]


OPERATIONS = [
    lambda x, y, m: x + y,
    lambda x, y, m: x - y,
    lambda x, y, m: x * tf.tanh(y),
    lambda x, y, m: x + (-y),
    lambda x, y, m: tf.nn.relu(x),
    lambda x, y, m: x * tf.sigmoid(x),
    lambda x, y, m: _dense(x, MATRICES[0], VECTORS[0]),
    lambda x, y, m: _dense(x, MATRICES[1]),
    lambda x, y, m: tf.nn.relu(_dense(x, MATRICES[2], VECTORS[2])),
    lambda x, y, m: _dense(_dense(x, UP), DOWN, VECTORS[1]),
    lambda x, y, m: _dense(tf.nn.gelu(_dense(x, UP), approximate=True), DOWN) + y,
    lambda x, y, m: tf.nn.gelu(_dense(x, MATRICES[0], VECTORS[1]), approximate=False),
    lambda x, y, m: tf.einsum("abc,cd->abd", x, MATRICES[1]) * 0.7 + VECTORS[0],
    lambda x, y, m: tf.reshape(tf.einsum("abc,dce->abde", x, HEADS_FIRST), tf.shape(x)),
    lambda x, y, m: _attention(x, x, m),
    lambda x, y, m: _attention(x, y, m) + x,
    lambda x, y, m: _layer_norm(x, VECTORS[0], VECTORS[1]),
    lambda x, y, m: _dense(_layer_norm(x, VECTORS[2], VECTORS[1]), MATRICES[2], VECTORS[0]),
    lambda x, y, m: _rms_norm(x, VECTORS[2]),
    lambda x, y, m: _dense(_rms_norm(x, VECTORS[1]), MATRICES[0]),
    lambda x, y, m: x * 0.3 + y * 0.3,
    lambda x, y, m: x * VECTORS[0] - y * VECTORS[0],
    lambda x, y, m: x * 0.3 * 1.7,
    lambda x, y, m: x + VECTORS[0] + 0.25,
    lambda x, y, m: _softmax(x),
    lambda x, y, m: tf.nn.softmax(x) * 3.0,
    lambda x, y, m: tf.transpose(tf.tanh(tf.transpose(x, [0, 2, 1])), [0, 2, 1]),
    lambda x, y, m: tf.reshape(tf.nn.relu(tf.reshape(x, [-1, 2, 4])), tf.shape(x)) + y,
    lambda x, y, m: tf.cast(tf.cast(x, tf.float64), tf.float32) * 1.0,
    lambda x, y, m: x - tf.reduce_mean(x, 1, keepdims=True),
    lambda x, y, m: tf.concat(tf.split(x, 2, -1)[::-1], -1),
    lambda x, y, m: x + y[:, :1],
    lambda x, y, m: tf.where(m[:, 0, 0, :, None], x, y),
    lambda x, y, m: tf.tanh(x) ** 3.0 + tf.tanh(y) ** 2.0,
    lambda x, y, m: tf.identity(tf.stop_gradient(x)) + tf.broadcast_to(VECTORS[1], tf.shape(x)),
    lambda x, y, m: tf.matmul(tf.transpose(tf.matmul(x, tf.transpose(y, [0, 2, 1])), [0, 2, 1]), x) * 0.05,
    lambda x, y, m: _conv(x),
    lambda x, y, m: _conv(x, depthwise=True),
    lambda x, y, m: _loop(x),
    lambda x, y, m: tf.nn.relu6(_dense(x, MATRICES[1], VECTORS[2])) + y,
]
RESULTS = [
    lambda x: x,
    lambda x: x[:, 0],
    lambda x: tf.reduce_max(x, 1),
    lambda x: tf.reduce_sum(x, -1),
    lambda x: _dense(x, MATRICES[0], VECTORS[0])[:, 0, :],
    lambda x: tf.reshape(x, [-1, WIDTH]) @ MATRICES[1],
]


@dataclass
class Outcome:
    """What came of checking one function: its rules, and the failures on each target."""

    fired: dict[str, int] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)
    nodes: int = 0
    reference: str = ""


def build(programs: Sequence[Sequence[Instruction]], batch: int | None, length: int | None) -> Graph:
    """One graph that computes every program, each over shared inputs and weights.

    It is put together from operations that are traced once: tracing them anew would take most of the time.
    """
    graph = Graph()
    x = graph.add("x", "Placeholder", [], {"dtype": tf.float32}).output
    mask = graph.add("mask", "Placeholder", [], {"dtype": tf.int32}).output
    graph.inputs = {"x": x, "mask": mask}
    variables: dict[int, Value] = {}
    results = []
    for program in programs:
        values = [x]
        for number, first, second in program:
            part = _traced(number % len(OPERATIONS), batch, length)
            y = values[-1 - first % min(len(values), 3)]
            values.append(_add(graph, part, [y, values[second % len(values)], mask], variables))
        last = _traced(-1 - len(program) % len(RESULTS), batch, length)
        results.append(_add(graph, last, [values[-1]], variables))
        if len(values) % 3 == 0:
            results.append(values[len(values) // 2])  # a value that others read as well
    graph.outputs = {f"output_{i}": value for i, value in enumerate(results)}
    infer.infer_graph(graph, {"x": tf.TensorShape([batch, length, WIDTH]), "mask": tf.TensorShape([batch, length])})
    return graph


@cache
def _traced(number: int, batch: int | None, length: int | None) -> Graph:
    """An operation, or a result (-1 and down), as a graph of its own."""
    x, y = (tf.TensorSpec([batch, length, WIDTH], tf.float32, name) for name in "xy")
    if number < 0:
        concrete = tf.function(RESULTS[-1 - number], autograph=False).get_concrete_function(x)
    else:

        def call(x, y, mask):
            return OPERATIONS[number](x, y, tf.cast(mask, tf.bool)[:, None, None, :])

        mask = tf.TensorSpec([batch, length], tf.int32, "mask")
        concrete = tf.function(call, autograph=False).get_concrete_function(x, y, mask)
    return importer.from_concrete(concrete)


def _add(graph: Graph, part: Graph, arguments: list[Value], variables: dict[int, Value]) -> Value:
    """Copies the nodes of `part` into `graph`, with `arguments` for its inputs; returns its result."""
    twin = dict(zip(part.inputs.values(), arguments, strict=True))
    graph.library.update(part.library)
    for node in part.live():
        capture = part.captures.get(node.name)
        if capture is not None and id(capture.tensor) in variables:
            twin[node.output] = variables[id(capture.tensor)]
        elif node.output not in twin:
            copied = graph.add(node.name, node.op, [twin[v] for v in node.inputs], dict(node.attrs))
            twin.update(zip(node.outputs, copied.outputs))
            if capture is not None:
                graph.captures[copied.name] = capture
                copied.output.shape = ()
                variables[id(capture.tensor)] = copied.output
    (result,) = part.outputs.values()
    return twin[result]


def samples(batch: int | None, length: int | None, seed: int = 0) -> list[list[np.ndarray]]:
    """Two inputs, one of a single short row; padded ends, one row without any position left."""
    made = []
    for rows, columns in ((3, 7), (1, 1)) if batch is None else ((batch, 7),):
        rng = np.random.default_rng(seed)
        columns = columns if length is None else length
        mask = np.ones((rows, columns), np.int32)
        for row in range(1, rows):
            mask[row, max(0, columns - 4 * row) :] = 0
        made.append([rng.normal(size=(rows, columns, WIDTH)).astype(np.float32), mask])
    return made


def check(programs, batch, length, targets=("portable", "onednn"), extra=(), seed: int = 0) -> Outcome:
    """Simplifies the programs and compares the results with the originals', within the rules' guarantees."""
    graph = build(programs, batch, length)
    specs = (tf.TensorSpec([batch, length, WIDTH], name="x"), tf.TensorSpec([batch, length], tf.int32, "mask")), {}
    verifier = verify.Verifier(graph, specs, samples(batch, length, seed))
    outcome = Outcome(nodes=len(graph.live()), reference="float64" if verifier.exact is not None else "fixed")
    for target in targets:
        rewriter = Rewriter(graph.copy(), target)
        rewriter.run([*pipeline(), *extra])
        rewriter.graph.check()
        kinds = {a.rule: a.guarantee for a in rewriter.fired if isinstance(a.guarantee, Approximate)}
        comparison = verifier.compare(rewriter.graph, sum(4 * g.max_error for g in kinds.values()))
        outcome.failures += [f"{target}: {f}" for f in comparison.failures]
        for rule, count in rewriter.counts.items():
            outcome.fired[rule] = outcome.fired.get(rule, 0) + count
    return outcome
