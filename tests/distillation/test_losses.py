"""Loss values against NumPy in float64 and constants worked out by hand; invariances; gradients."""

import math

import numpy as np
import pytest
import tensorflow as tf

import tfvllm
from tfvllm.distillation import chunks
from tfvllm.distillation.teacher_logits import DeferredLogits, TopLogits
from tfvllm.errors import InputError
from tfvllm.families.outputs import BlockOutputs

losses = tfvllm.losses


def log_softmax(x):
    x = np.asarray(x, np.float64)
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def kl(log_p, log_q):
    return (np.exp(log_p) * (log_p - log_q)).sum(-1)


def reference(loss, teacher, student):
    t = loss.temperature
    log_p, log_q = log_softmax(np.asarray(teacher) / t), log_softmax(np.asarray(student) / t)
    if isinstance(loss, losses.ForwardKL):
        return t * t * kl(log_p, log_q)
    if isinstance(loss, losses.ReverseKL):
        return t * t * kl(log_q, log_p)
    b = loss.beta
    log_m = np.log(b * np.exp(log_p) + (1 - b) * np.exp(log_q))
    return t * t * (b * kl(log_p, log_m) + (1 - b) * kl(log_q, log_m))


DIVERGENCES = [
    losses.ForwardKL(),
    losses.ForwardKL(temperature=3.0),
    losses.ReverseKL(temperature=2.0),
    losses.JensenShannon(),
    losses.JensenShannon(beta=0.1, temperature=2.0),
]
named = pytest.mark.parametrize("loss", DIVERGENCES, ids=str)


# teacher: p = (1/2, 1/2); student: q = (1/4, 3/4), as logits (0, log 3)
@pytest.mark.parametrize(
    "loss, value",
    [
        (losses.ForwardKL(), 0.5 * math.log(4 / 3)),  # ½ log 2 + ½ log ⅔
        (losses.ReverseKL(), 0.25 * math.log(0.5) + 0.75 * math.log(1.5)),
        # m = (3/8, 5/8)
        (
            losses.JensenShannon(),
            0.5 * (0.5 * math.log(4 / 3) + 0.5 * math.log(4 / 5) + 0.25 * math.log(2 / 3) + 0.75 * math.log(6 / 5)),
        ),
        # temperature 2: q = (1, √3) / (1 + √3)
        (losses.ForwardKL(2.0), 4 * (0.5 * math.log((1 + 3**0.5) / 2) + 0.5 * math.log((1 + 3**0.5) / (2 * 3**0.5)))),
        (losses.Logits(), math.log(3) ** 2 / 2),
    ],
    ids=str,
)
def test_a_value_worked_out_by_hand(loss, value):
    assert loss(tf.constant([[0.0, 0.0]]), tf.constant([[0.0, math.log(3.0)]])).numpy() == pytest.approx(
        [value], rel=5e-6
    )


@named
@pytest.mark.parametrize("shape", [(5, 3), (2, 7, 11), (1, 1, 2)])
def test_values_against_float64(loss, shape):
    rng = np.random.default_rng(1)
    teacher, student = rng.normal(0, 5, (2, *shape)).astype("float32")
    values = loss(tf.constant(teacher), tf.constant(student))
    assert values.dtype == tf.float32 and values.shape == shape[:-1]
    np.testing.assert_allclose(values, reference(loss, teacher, student), rtol=2e-5, atol=2e-6)


@named
def test_zero_at_the_teacher_and_positive_elsewhere(loss):
    rng = np.random.default_rng(2)
    teacher, student = rng.normal(0, 3, (2, 20, 9)).astype("float32")
    np.testing.assert_allclose(loss(teacher, teacher), np.zeros(20), atol=1e-5)
    assert (loss(tf.constant(teacher), tf.constant(student)).numpy() > 1e-3).all()


@named
def test_adding_a_constant_to_the_logits_changes_nothing(loss):
    rng = np.random.default_rng(3)
    teacher, student = rng.normal(0, 3, (2, 4, 9)).astype("float32")
    moved = loss(tf.constant(teacher + 50), tf.constant(student - 30))
    np.testing.assert_allclose(moved, loss(tf.constant(teacher), tf.constant(student)), rtol=1e-4, atol=1e-5)


def test_values_that_clipped_probabilities_get_wrong():
    """keras.distillation clips at 1e-7: a student that is sure of the wrong class costs far more than that allows."""
    teacher, student = tf.constant([[0.0, 40.0]]), tf.constant([[60.0, 0.0]])
    assert losses.ForwardKL()(teacher, student).numpy() == pytest.approx([60.0], rel=1e-6)
    with tf.GradientTape() as tape:
        tape.watch(student)
        value = losses.ForwardKL()(teacher, student)
    np.testing.assert_allclose(tape.gradient(value, student), [[1.0, -1.0]], atol=1e-6)


def test_gradient_of_forward_kl_is_the_difference_of_probabilities():
    rng = np.random.default_rng(4)
    teacher, student = (tf.constant(x) for x in rng.normal(0, 2, (2, 3, 6)).astype("float32"))
    with tf.GradientTape() as tape:
        tape.watch(student)
        value = losses.ForwardKL(temperature=2.0)(teacher, student)
    expected = 2.0 * (tf.nn.softmax(student / 2.0) - tf.nn.softmax(teacher / 2.0))
    np.testing.assert_allclose(tape.gradient(value, student), expected, atol=1e-6)


@named
def test_gradients_against_finite_differences(loss):
    rng = np.random.default_rng(5)
    teacher, student = rng.normal(0, 2, (2, 1, 5))
    weight = tf.constant(student, tf.float32)
    with tf.GradientTape() as tape:
        tape.watch(weight)
        value = loss(tf.constant(teacher, tf.float32), weight)
    gradient = tape.gradient(value, weight).numpy()[0]
    for i, at in enumerate(np.eye(5) * 1e-5):
        slope = (reference(loss, teacher, student + at) - reference(loss, teacher, student - at)) / 2e-5
        assert gradient[i] == pytest.approx(slope[0], abs=2e-4)


@named
def test_no_gradient_to_the_teacher(loss):
    teacher, student = tf.Variable([[1.0, 2.0, 3.0]]), tf.Variable([[3.0, 2.0, 1.0]])
    with tf.GradientTape() as tape:
        value = loss(tf.convert_to_tensor(teacher), tf.convert_to_tensor(student))
    of_teacher, of_student = tape.gradient(value, [teacher, student])
    assert of_teacher is None and abs(of_student.numpy()).sum() > 0.1


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@named
def test_half_precision_logits_are_compared_in_float32(loss, dtype):
    rng = np.random.default_rng(6)
    teacher, student = (tf.cast(x, dtype) for x in rng.normal(0, 3, (2, 4, 9)))
    values = loss(teacher, tf.cast(student, "float32"))  # unlike policies
    assert values.dtype == tf.float32
    np.testing.assert_allclose(
        values, reference(loss, tf.cast(teacher, tf.float64), tf.cast(student, tf.float64)), rtol=2e-5
    )


@pytest.mark.parametrize(
    "loss, rows, jit",
    [(loss, rows, False) for loss in DIVERGENCES for rows in (1, 7)]
    + [(losses.ForwardKL(), 6, False), (losses.ForwardKL(), 1, True), (losses.JensenShannon(), 7, True)],
    ids=str,
)
def test_chunks_change_neither_value_nor_gradient(loss, rows, jit, monkeypatch):
    rng = np.random.default_rng(7)
    teacher, student = (tf.constant(x) for x in rng.normal(0, 2, (2, rows, 31)).astype("float32"))
    weights = tf.constant(rng.normal(0, 1, rows).astype("float32"))

    def both(teacher, student):
        with tf.GradientTape() as tape:
            tape.watch(student)
            values = loss(teacher, student)
        return values, tape.gradient(values, student, output_gradients=weights)

    whole = both(teacher, student)
    monkeypatch.setattr(chunks.over_rows, "__kwdefaults__", {"chunk": 31 * 3, "small": 1})  # three rows at a time
    for one, other in zip(tf.function(both, jit_compile=jit)(teacher, student), whole):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)


def test_deferred_logits_are_the_logits():
    rng = np.random.default_rng(8)
    hidden, kernel, student = rng.normal(0, 1, (2, 3, 4)), rng.normal(0, 1, (4, 7)), rng.normal(0, 1, (2, 3, 7))
    hidden, kernel, student = (tf.constant(x, tf.float32) for x in (hidden, kernel, student))
    teacher = DeferredLogits(hidden, kernel, soft_cap=1.5)
    dense = 1.5 * tf.tanh(hidden @ kernel / 1.5)
    for loss in (*DIVERGENCES, losses.Logits()):
        np.testing.assert_allclose(loss(teacher, student), loss(dense, student), rtol=1e-5, atol=1e-6)


def top_of(logits, k, temperatures):
    values, ids = tf.math.top_k(logits, k)
    inside = tf.reduce_sum(tf.one_hot(ids, logits.shape[-1]), axis=-2) > 0
    tails = [tf.reduce_logsumexp(tf.where(inside, -1e30, logits / t), -1) for t in temperatures]
    return TopLogits(ids, values, tf.stack(tails, -1), tuple(temperatures), logits.shape[-1])


@named
def test_all_k_logits_equal_online(loss):
    rng = np.random.default_rng(9)
    teacher, student = (tf.constant(x) for x in rng.normal(0, 3, (2, 2, 4, 9)).astype("float32"))
    kept = top_of(teacher, 9, [1.0])
    np.testing.assert_allclose(loss(kept, student), loss(teacher, student), rtol=1e-5, atol=1e-6)


def test_top_k_by_hand_and_its_minimum_at_the_teacher():
    teacher = tf.math.log(tf.constant([[0.5, 0.2, 0.2, 0.1]]))
    student = tf.math.log(tf.constant([[0.25, 0.25, 0.25, 0.25]]))
    value = losses.ForwardKL()(top_of(teacher, 1, [1.0]), student)
    assert value.numpy() == pytest.approx([0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75)], rel=1e-6)
    with tf.GradientTape() as tape:
        tape.watch(teacher)
        at_teacher = losses.ForwardKL(2.0)(top_of(tf.stop_gradient(teacher), 2, [2.0]), teacher)
    assert abs(at_teacher.numpy()[0]) < 1e-6
    np.testing.assert_allclose(tape.gradient(at_teacher, teacher), np.zeros((1, 4)), atol=1e-6)


def test_top_k_at_another_temperature_is_refused():
    teacher = top_of(tf.constant([[3.0, 2.0, 1.0]]), 2, [1.0, 2.0])
    with pytest.raises(InputError, match=r"\[1.0, 2.0\].*asks for 4.0"):
        losses.ForwardKL(4.0)(teacher, tf.zeros((1, 3)))
    with pytest.raises(InputError, match="top_k=None"):
        losses.Logits()(teacher, tf.zeros((1, 3)))


# ---------------------------------------------------------------- inside the models


def test_hidden_states_by_hand():
    teacher, student = tf.constant([[[1.0, 0.0], [0.0, 2.0]]]), tf.constant([[[1.0, 1.0], [0.0, 5.0]]])
    np.testing.assert_allclose(losses.HiddenStates()([teacher], [student]), [[0.5, 4.5]])
    np.testing.assert_allclose(
        losses.HiddenStates(distance="cosine")([teacher], [student]), [[1 - 0.5**0.5, 0.0]], atol=1e-6
    )
    np.testing.assert_allclose(losses.HiddenStates()([teacher, teacher], [student, teacher]), [[0.25, 2.25]])


def test_attention_maps_by_hand():
    teacher = tf.constant([[[[0.5, 0.5, 0.0]], [[1.0, 0.0, 0.0]]]])  # two heads, one query, three keys
    student = tf.constant([[[[0.25, 0.75, 0.0]], [[0.5, 0.5, 0.0]]]])
    expected = (0.5 * math.log(4 / 3) + math.log(2)) / 2
    np.testing.assert_allclose(losses.AttentionMaps()([teacher], [student]), [[expected]], rtol=1e-6)
    np.testing.assert_allclose(losses.AttentionMaps(distance="mse")([teacher], [student]), [[(0.125 + 0.5) / 2]])
    one_head = tf.constant([[[[0.5, 0.5, 0.0]]]])  # unlike heads: averages, (3/4, 1/4, 0) against (1/2, 1/2, 0)
    expected = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    np.testing.assert_allclose(losses.AttentionMaps()([teacher], [one_head]), [[expected]], rtol=1e-6)


def relations_reference(t, s, heads, mask):
    """MiniLMv2 equations 6 to 8 in float64, with loops, on one example's [length, width] arrays."""

    def relation(a):
        depth = a.shape[1] // heads
        rows = []
        for h in range(heads):
            part = a[mask][:, h * depth : (h + 1) * depth]
            rows.append(log_softmax(part @ part.T / math.sqrt(depth)))
        return np.stack(rows)

    return kl(relation(t), relation(s)).mean(0)


def test_relations_against_the_papers_equations():
    rng = np.random.default_rng(10)
    teacher = {k: rng.normal(0, 1, (2, 5, 12)) for k in ("queries", "keys", "values")}
    student = {k: rng.normal(0, 1, (2, 5, 8)) for k in ("queries", "keys", "values")}
    mask = np.array([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]], bool)
    values = losses.Relations(relation_heads=4)(
        [BlockOutputs(**{k: tf.constant(v, tf.float32) for k, v in teacher.items()})],
        [BlockOutputs(**{k: tf.constant(v, tf.float32) for k, v in student.items()})],
        mask=tf.constant(mask),
    )
    assert values.shape == (2, 5)
    for row in range(2):
        expected = sum(relations_reference(teacher[k][row], student[k][row], 4, mask[row]) for k in teacher)
        np.testing.assert_allclose(values[row][mask[row]], expected, rtol=1e-4, atol=1e-6)


def test_relation_heads_that_do_not_divide_are_refused():
    both = [BlockOutputs(queries=tf.zeros((1, 2, 12)))], [BlockOutputs(queries=tf.zeros((1, 2, 8)))]
    with pytest.raises(InputError, match=r"valid are \[1, 2, 4\]"):
        losses.Relations(relation_heads=3, kinds=["queries"])(*both)
    assert losses.Relations(kinds=["queries"])(*both).shape == (1, 2)


@pytest.mark.parametrize(
    "make, told",
    [
        (lambda: losses.ForwardKL(temperature=0.0), "above zero"),
        (lambda: losses.ForwardKL(temperature="2"), "number or a schedule"),
        (lambda: losses.JensenShannon(beta=1.0), "ReverseKL"),
        (lambda: losses.HiddenStates(layers="middle"), '"uniform", "last", "skip"'),
        (lambda: losses.HiddenStates(layers=[(0, "a")]), "two numbers or two names"),
        (lambda: losses.HiddenStates(distance="l1"), '"mse" or "cosine"'),
        (lambda: losses.AttentionMaps(distance="l1"), '"kl" or "mse"'),
        (lambda: losses.AttentionMaps(layers=[("a", "b")]), "two numbers"),
        (lambda: losses.Relations(kinds=["query"]), "queries"),
        (lambda: losses.ForwardKL()(tf.zeros((1, 3)), tf.zeros((1, 4))), "teacher has 3 and the student 4"),
        (lambda: losses.ForwardKL(independent=False)(tf.zeros((4, 1)), tf.zeros((4, 1))), "always 1"),
        (lambda: losses.ReverseKL(independent="yes"), "independent as True, False or None"),
    ],
)
def test_errors_say_what_is_valid(make, told):
    with pytest.raises(InputError, match=told):
        make()


@pytest.mark.parametrize(
    "loss",
    [
        *DIVERGENCES,
        losses.Logits(),
        losses.HiddenStates("last", "cosine", True),
        losses.AttentionMaps([(0, 0)], "mse"),
        losses.Relations("last", 2, ["keys"]),
    ],
    ids=str,
)
def test_config_round_trip(loss):
    import json

    import keras

    stored = json.loads(json.dumps(keras.saving.serialize_keras_object(loss)))
    again = keras.saving.deserialize_keras_object(stored)
    assert type(again) is type(loss) and again.get_config() == loss.get_config()


# ---------------------------------------------------------------- the tests, tested


def _matches(loss, name):
    """Whether a loss passes the checks above for `name`."""
    rng = np.random.default_rng(11)
    teacher, student = rng.normal(0, 3, (2, 6, 5)).astype("float32")
    values = loss(tf.constant(teacher), tf.constant(student))
    return np.allclose(values, reference(name, teacher, student), rtol=2e-5, atol=2e-6)


class Swapped(losses.ForwardKL):
    def between(self, log_p, log_q):
        return super().between(log_q, log_p)


class Halved(losses.ForwardKL):
    def between(self, log_p, log_q):
        return 0.5 * super().between(log_p, log_q)


class Clipped(losses.ForwardKL):
    def between(self, log_p, log_q):
        return super().between(log_p, tf.maximum(log_q, -3.0))


@pytest.mark.parametrize("wrong", [Swapped(2.0), Halved(2.0), Clipped(2.0)], ids=str)
def test_a_wrong_loss_is_caught(wrong):
    assert _matches(losses.ForwardKL(2.0), losses.ForwardKL(2.0))
    assert not _matches(wrong, losses.ForwardKL(2.0))
