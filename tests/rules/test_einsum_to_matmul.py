import numpy as np
import pytest
import tensorflow as tf

from tests.rules.checks import check, f32, weight

RULE = "EinsumToMatMul"


@pytest.mark.parametrize(
    "equation, x, w",
    [
        ("abc,cde->abde", (None, None, 8), (8, 2, 3)),  # query, key, value
        ("abcd,cde->abe", (None, None, 2, 4), (2, 4, 5)),  # attention output
        ("ab,bc->ac", (None, 7), (7, 3)),
        ("abc,dc->abd", (None, None, 7), (5, 7)),  # tied embedding
        ("bsd,dnh->bsnh", (None, 5, 8), (8, 2, 3)),
        ("abc,dce->abde", (None, None, 8), (2, 8, 3)),  # Gemma's [heads, width, head_dim]
        ("abc,cbd->ad", (None, 3, 4), (4, 3, 5)),
    ],
)
def test_becomes_one_product(equation, x, w):
    kernel = weight(*w)
    c = check(lambda x: tf.einsum(equation, x, kernel), [f32(*x)], RULE, 1)
    assert not c.ops("Einsum")
    (product,) = c.ops("MatMul")
    assert len(product.inputs[0].shape) == 2


@pytest.mark.parametrize(
    "equation, x, w, reason",
    [
        ("abc,acd->abd", (2, 3, 4), (2, 4, 5), "batch axis"),
        ("abc,bd->acd", (2, 3, 4), (3, 5), "transposed"),
        ("a...c,cd->a...d", (2, 3, 4), (4, 5), "ellipsis"),
        ("aab,bc->ac", (2, 2, 4), (4, 5), "repeated"),
    ],
)
def test_other_einsums_stay(equation, x, w, reason):
    kernel = weight(*w)
    check(lambda x: tf.raw_ops.Einsum(inputs=[x, kernel], equation=equation), [f32(*x)], RULE, 0, reason=reason)


def test_a_computed_operand_is_not_transposed():
    check(
        lambda x, w: tf.raw_ops.Einsum(inputs=[x, w], equation="abc,dce->abde"),
        [f32(2, 3, 4), f32(5, 4, 6, name="w")],
        RULE,
        0,
        reason="not together",
    )


def test_unknown_second_operand_declines():
    check(
        lambda x, w: tf.raw_ops.Einsum(inputs=[x, w], equation="abc,cd->abd"),
        [f32(2, 3, 4), f32(4, None, name="w")],
        RULE,
        0,
        reason="unknown",
        samples=[[np.ones((2, 3, 4)), np.ones((4, 5))]],
        generated=False,
    )
