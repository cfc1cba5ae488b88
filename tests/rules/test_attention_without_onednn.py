import numpy as np
import pytest
import tensorflow as tf

from tests.rules.checks import check, f32
from tfvllm.graph import executable, functions
from tfvllm.graph.onednn_costs import ATTENTION_SCORES
from tfvllm.simplifier import cost

RULE = "AttentionWithoutOneDnn"
HEADS, SIZE = 2, 8
QKV = [f32(None, HEADS, None, SIZE, name=n) for n in "qkv"]


def attention(q, k, v, mask=None):
    scores = tf.matmul(q, k, transpose_b=True) * 0.3
    if mask is not None:
        scores = tf.where(mask[:, tf.newaxis, tf.newaxis, :], scores, -1e9)
    return tf.matmul(tf.nn.softmax(scores), v)


def sample(batch, length, seed=0, large=1.0):
    rng = np.random.default_rng([seed, batch, length])
    return [(large * rng.normal(size=(batch, HEADS, length, SIZE))).astype(np.float32) for _ in range(3)]


def inner_ops(graph, node, key):
    (name,) = functions.names_in(node, key)
    return [n.op for n in functions.from_definition(graph, name, functions.argument_shapes(node)).live()]


def test_unknown_lengths_choose_when_the_graph_runs():
    def f(q, k, v):
        return attention(q, k, v) + attention(2.0 * q, k, v)

    edge = int((ATTENTION_SCORES / HEADS) ** 0.5)
    samples = [sample(1, n) for n in (1, edge, edge + 1)] + [sample(9, 40), sample(2, 7, large=30.0)]
    c = check(f, QKV, RULE, 2, special=False, samples=samples)
    first, second = c.ops("StatelessIf")
    assert not c.ops("Softmax") and not c.ops("BatchMatMulV2") and len(c.ops("Less")) == 1
    assert first.attr("then_branch") == second.attr("then_branch")
    few, many = (inner_ops(c.graph, first, key) for key in ("then_branch", "else_branch"))
    assert few.count("BatchMatMulV3") == 2 and "LogSoftmax" in few and "Softmax" not in few
    assert many.count("BatchMatMulV2") == 2 and "Softmax" in many and "LogSoftmax" not in many


@pytest.mark.parametrize("batch, length", [(1, 1), (1, 63), (1, 64), (1, 100), (4, 31), (4, 32)])
def test_which_way_is_taken(batch, length):
    c = check(lambda q, k, v: attention(q, k, v), QKV, RULE, 1, special=False, generated=False)
    (choice,) = c.ops("StatelessIf")
    given = dict(zip(c.graph.inputs.values(), sample(batch, length)))
    (few,) = executable.evaluate(c.graph, [choice.inputs[0]], given)
    assert bool(few) == (batch * HEADS * length * length < ATTENTION_SCORES)


@pytest.mark.parametrize("length, small", [(40, True), (80, False)])
def test_known_lengths_are_decided_now(length, small):
    specs = [f32(1, HEADS, length, SIZE, name=n) for n in "qkv"]
    c = check(attention, specs, RULE, 1 if small else 0, special=False)
    assert not c.ops("StatelessIf")
    assert len(c.ops("BatchMatMulV3")) == (2 if small else 0)


def test_masks_are_told_to_both_ways():
    specs = [*QKV, tf.TensorSpec([None, None], tf.bool, "mask")]
    samples = []
    for batch, length in ((2, 5), (5, 70)):
        real = np.arange(length)[None, :] < np.arange(1, batch + 1)[:, None]
        samples.append([*sample(batch, length), real])
    c = check(attention, specs, RULE, 1, special=False, samples=samples, generated=False)
    assert c.ops("StatelessIf")


def test_flops_are_those_of_the_attention():
    c = check(lambda q, k, v: attention(q, k, v), QKV, RULE, 1, special=False)
    sizes = {s: 3 if v.shape.index(d) == 0 else 10 for v in c.graph.inputs.values() for d in v.shape
             if not isinstance(d, int) for s in d.symbols()}  # fmt: skip
    before, after = cost.count(c.before, sizes), cost.count(c.graph, sizes)
    scores = 3 * HEADS * 10 * 10
    assert after["ops"]["attention"] == 1 and "StatelessIf" not in after["ops"]
    assert before["flops"] == scores * (4 * SIZE + 5 + 1)  # two products, softmax, scale
    assert after["flops"] == scores * (4 * SIZE + 5)


def test_left_alone():
    def read_elsewhere(q, k, v):
        p = tf.nn.softmax(tf.matmul(q, k, transpose_b=True))
        return tf.matmul(p, v), p

    check(read_elsewhere, QKV, RULE, 0, special=False)
    check(
        lambda q, k, v: tf.nn.softmax(tf.matmul(q, k, transpose_b=True)) + v[:, :, :1, :1], QKV, RULE, 0, special=False
    )
    halves = [tf.TensorSpec(s.shape, tf.bfloat16, s.name) for s in QKV]
    c = check(attention, halves, RULE, 0, special=False, generated=False)
    assert len(c.ops("BatchMatMulV2")) == 2
