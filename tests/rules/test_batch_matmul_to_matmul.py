import pytest
import tensorflow as tf

import tfvllm
from tests.rules.checks import check, f32, weight

RULE = "BatchMatMulToMatMul"
W85, W385 = weight(8, 5), weight(3, 8, 5)


@pytest.mark.parametrize("transposed", [False, True])
def test_one_matrix_for_the_batch(transposed):
    w = weight(9, 24) if transposed else weight(24, 9)
    found = check(lambda x: tf.matmul(x, w, transpose_b=transposed), [f32(None, None, 24)], RULE, 1)
    assert len(found.ops("MatMul")) == 1 and not found.ops("BatchMatMulV2")
    check(lambda x: tf.matmul(x, w, transpose_b=transposed), [f32(None, 2, None, 24)], RULE, 1)
    check(lambda x: tf.raw_ops.BatchMatMulV2(x=x, y=w, adj_y=transposed), [f32(None, 24)], RULE, 1)
    check(lambda x: tf.matmul(x, w, transpose_b=transposed), [f32(0, 5, 24)], RULE, 1, special=False)


def test_a_product_computed_at_run_time():
    check(lambda x, y: tf.matmul(x, y), [f32(None, 3, 8), f32(8, 5, name="y")], RULE, 1)


def test_declines():
    check(lambda x: tf.matmul(x, x, transpose_b=True), [f32(None, 3, 8)], RULE, 0)
    check(lambda x: tf.matmul(x, W385), [f32(3, None, 8)], RULE, 0)
    check(lambda x: tf.matmul(x, W85, transpose_a=True), [f32(None, 8, 3)], RULE, 0, reason="transposed")
    half = tf.Variable(tf.zeros([8, 4], tf.int8))
    check(
        lambda x: tf.matmul(tf.cast(x, tf.int8), half, output_type=tf.int32),
        [f32(None, 3, 8)], RULE, 0, reason="int8 by int8 to int32", special=False,
    )  # fmt: skip


def test_bias_and_activation_are_fused_then():
    w, bias = weight(24, 9), weight(9)
    dense = tf.function(
        lambda x: tf.nn.relu(tf.matmul(x, w) + bias), input_signature=[tf.TensorSpec([None, None, 24], tf.float32)]
    )
    ops = tfvllm.simplify(dense, target="onednn").report.after["ops"]
    assert ops["_FusedMatMul"] == 1 and not {"BatchMatMulV2", "AddV2", "Relu"} & set(ops)
