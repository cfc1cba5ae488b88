"""Softmax and sigmoid heads, wherever they stand in teacher and student: the loss is that of the logits behind them."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers, ops

import tfvllm
from tfvllm.errors import InputError

losses = tfvllm.losses

# Teacher p = 1/2, student q = 1/4, worked out by hand: p log(p/q) + (1-p) log((1-p)/(1-q)), and so on.
HALF, QUARTER = 0.0, -np.log(3.0)
BY_HAND = {losses.ForwardKL: 0.143841, losses.ReverseKL: 0.130812, losses.JensenShannon: 0.033822}

T = np.array([[2.0, -1.0, 0.5], [0.0, 3.0, -2.0], [1.0, 1.0, -1.0], [-4.0, 0.0, 2.0]], "float32")
S = np.array([[0.5, 0.5, -1.0], [1.0, -1.0, 0.0], [-2.0, 2.0, 0.0], [3.0, -1.0, 1.0]], "float32")


def kl(t, s, temperature=1.0):
    """KL(softmax ‖ softmax) of each row in float64."""
    t, s = (np.asarray(z, "float64") / temperature for z in (t, s))
    log_p, log_q = (z - np.log(np.exp(z).sum(-1, keepdims=True)) for z in (t, s))
    return (np.exp(log_p) * (log_p - log_q)).sum(-1)


def bernoulli_kl(t, s, temperature=1.0):
    p, q = (1 / (1 + np.exp(-np.asarray(z, "float64") / temperature)) for z in (t, s))
    return (p * np.log(p / q) + (1 - p) * np.log((1 - p) / (1 - q))).sum(-1)


def table(logits, head=lambda z: z, **options):
    """A functional model that answers row i of `logits` to the example i."""
    ids = keras.Input((1,), dtype="int32")
    ones = keras.ops.cast(keras.ops.equal(ids, np.arange(len(logits))), "float32")
    last = layers.Dense(logits.shape[1], use_bias=False, name="last")
    model = keras.Model(ids, head(last(ones)), **options)
    last.kernel.assign(logits)
    return model


class Table(keras.Model):
    """The same, subclassed, with a layer for its last attribute that is not its head."""

    def __init__(self, logits, head, last="softmax"):
        super().__init__()
        self.head, self.rows = head, layers.Dense(logits.shape[1], use_bias=False)
        self.rows.build((None, len(logits)))
        self.rows.kernel.assign(logits)
        self.aside = layers.Dense(logits.shape[1], activation=last)

    def call(self, ids):
        return self.head(self.rows(ops.cast(ops.equal(ids, np.arange(self.rows.kernel.shape[0])), "float32")))


IDS = np.arange(4, dtype="int32")[:, None]


def loss_of(teacher, student, loss=None, y=None, **options):
    distiller = tfvllm.Distiller(teacher, student, losses={"logits": loss or losses.ForwardKL()}, **options)
    distiller.compile("sgd", loss="sparse_categorical_crossentropy" if y is not None else None)
    logs = distiller.evaluate(IDS, y, batch_size=4, return_dict=True, verbose=0)
    return logs if y is not None else logs["logits_loss"]


HEADS = {
    "none": lambda z: z,
    "Softmax": lambda z: layers.Softmax()(z),
    "operation": ops.softmax,
    "Dropout behind": lambda z: layers.Dropout(0.5)(layers.Softmax()(z)),
    "average": lambda z: layers.Average()([ops.softmax(z), ops.softmax(z)]),
}


@pytest.mark.parametrize("of_teacher", HEADS)
@pytest.mark.parametrize("of_student", ["none", "Softmax", pytest.param("average", marks=pytest.mark.thorough)])
def test_every_softmax_is_seen_on_each_side(of_teacher, of_student):
    found = loss_of(table(T, HEADS[of_teacher]), table(S, HEADS[of_student]), losses.ForwardKL(2.0))
    assert found == pytest.approx(4 * kl(T, S, 2.0).mean(), rel=1e-4)


@pytest.mark.parametrize("head", ["none", "operation"])
def test_subclassed_models_whatever_their_last_attribute(head):
    y = np.array([0, 1, 2, 0])
    found = loss_of(Table(T, HEADS[head]), Table(S, HEADS[head], last=None if head == "operation" else "softmax"), y=y)
    assert found["logits_loss"] == pytest.approx(kl(T, S).mean(), rel=1e-4)
    expected = tf.nn.sparse_softmax_cross_entropy_with_logits(y, S)
    assert found["task_loss"] == pytest.approx(np.mean(expected), rel=1e-4)


def test_nested_models_eagerly():
    inner = table(T, HEADS["Softmax"])
    ids = keras.Input((1,), dtype="int32")
    teacher = keras.Model(ids, layers.Identity()(inner(ids)))
    distiller = tfvllm.Distiller(teacher, table(S), losses={"logits": losses.ForwardKL()}, task_weight=0.0)
    assert float(distiller.compute_loss(IDS)) == pytest.approx(kl(T, S).mean(), rel=1e-4)


@pytest.mark.parametrize("kind", BY_HAND)
def test_a_yes_or_no_by_hand(kind):
    teacher, student = np.array([[HALF], [HALF]], "float32"), np.array([[QUARTER], [QUARTER]], "float32")
    np.testing.assert_allclose(kind()(teacher, student), [BY_HAND[kind]] * 2, atol=1e-6)
    pair = [np.concatenate([z, z], axis=1) for z in (teacher, student)]
    np.testing.assert_allclose(kind(independent=True)(*pair), [2 * BY_HAND[kind]] * 2, atol=1e-6)  # of both labels
    far = kind(independent=True)(np.array([[80.0, -80.0]]), np.array([[-80.0, -80.0]])).numpy()
    assert np.isfinite(far).all() and far > 0.6
    with tf.GradientTape() as tape:
        tape.watch(z := tf.constant([[-90.0, 90.0]]))
        value = kind(independent=True)(tf.constant([[90.0, 90.0]]), z)
    assert np.isfinite(tape.gradient(value, z)).all()
    again = keras.saving.deserialize_keras_object(keras.saving.serialize_keras_object(kind(independent=True)))
    assert again.independent is True


@pytest.mark.parametrize("width", [1, 3])
@pytest.mark.parametrize("of_student", ["sigmoid", "none"])
def test_sigmoid_heads_are_compared_each_by_itself(width, of_student):
    sigmoid, temperature = (lambda z: layers.Activation("sigmoid")(z)), 2.0
    t, s = T[:, :width], S[:, :width]
    student = table(s, sigmoid if of_student == "sigmoid" else HEADS["none"])
    found = loss_of(table(t, sigmoid), student, losses.ForwardKL(temperature))
    assert found == pytest.approx(temperature**2 * bernoulli_kl(t, s, temperature).mean(), rel=1e-4)
    compared = tfvllm.distillation.compare(table(t, sigmoid), student, IDS)
    np.testing.assert_allclose(compared.divergences, bernoulli_kl(t, s), rtol=1e-3, atol=1e-5)
    assert compared.agreement == pytest.approx(((t > 0) == (s > 0)).mean())
    assert compared.worst[0].teacher == (int(t[compared.worst[0].index, 0] > 0) if width == 1 else None)


def test_one_logit_is_a_yes_or_no_where_a_divergence_is_asked_for():
    t, s = T[:, :1], S[:, :1]
    assert loss_of(table(t), table(s)) == pytest.approx(bernoulli_kl(t, s).mean(), rel=1e-5)
    by_default = tfvllm.Distiller(table(t), table(s))
    with pytest.raises(InputError, match=r"one number without an activation.*ForwardKL.*losses.Logits\(\) for a quant"):
        by_default.compute_loss(IDS)
    assert loss_of(table(t), table(s), losses.Logits()) == pytest.approx(np.square(t - s).mean(), rel=1e-5)


def test_a_binary_cross_entropy_by_name_and_the_step_it_takes():
    y = np.array([0, 1, 1, 0])
    z = S[:, :1]
    expected = np.mean(np.log1p(np.exp(-np.where(y[:, None], z, -z))))
    for head in ("none", "sigmoid"):
        student = table(z, HEADS["none"] if head == "none" else lambda z: layers.Activation("sigmoid")(z))
        distiller = tfvllm.Distiller(table(T[:, :1]), student, losses={"logits": losses.ForwardKL()}, task_weight=1.0)
        distiller.compile(keras.optimizers.SGD(0.5), loss="binary_crossentropy")
        logs = distiller.train_on_batch(IDS, y, return_dict=True)
        assert logs["task_loss"] == pytest.approx(expected, rel=1e-5)
        p, q = (1 / (1 + np.exp(-logit)) for logit in (T[:, :1], z))
        both = (q - y[:, None]) + (q - p)  # d loss / d logit of each example
        np.testing.assert_allclose(student.get_layer("last").kernel, z - 0.5 * both / 4, atol=1e-5)


def test_unlike_heads_and_what_cannot_be_told():
    sigmoid = table(S, lambda z: ops.sigmoid(z))
    with pytest.raises(InputError, match=r"teacher gives one distribution over all classes .*student a probability"):
        loss_of(table(T, HEADS["Softmax"]), sigmoid)
    with pytest.raises(InputError, match=r"says independent=False, but a model gives a probability for each"):
        loss_of(sigmoid, table(S), losses.ForwardKL(independent=False))
    even = table(np.full((4, 2), 0.5, "float32"))
    with pytest.raises(InputError, match=r'cannot tell .* Pass from_logits=\{"teacher": True\}'):
        loss_of(even, table(S[:, :2]))
    found = loss_of(even, table(S[:, :2]), from_logits={"teacher": False})
    assert found == pytest.approx(kl(np.zeros((4, 2)), S[:, :2]).mean(), rel=1e-4)
    with pytest.raises(
        InputError, match=r"from_logits names \['teachr'\], but the models are \['student', 'teacher'\]"
    ):
        tfvllm.Distiller(even, table(S[:, :2]), from_logits={"teachr": True})
    with pytest.raises(InputError, match=r"from_logits must be True, False or"):
        tfvllm.Distiller(even, table(S[:, :2]), from_logits="no")


def test_hidden_losses_do_not_ask(tmp_path):
    def mlp():
        inputs = keras.Input((4,))
        inner = layers.Dense(3, name="inner")(inputs)
        return keras.Model(inputs, ops.clip(inner, 0.0, 1.0))

    hidden = losses.HiddenStates(layers=[("inner", "inner")])
    distiller = tfvllm.Distiller(mlp(), mlp(), losses={"h": hidden}, from_logits={"student": False})
    assert np.isfinite(distiller.compute_loss(np.ones((2, 4), "float32")))
    assert tfvllm.Distiller.from_config(distiller.get_config()).from_logits == {"student": False}


@pytest.mark.parametrize("head", ["Softmax", "sigmoid"])
def test_a_cache_of_a_teacher_with_a_head(tmp_path, head):
    make = HEADS["Softmax"] if head == "Softmax" else lambda z: ops.sigmoid(z)
    teacher, student = table(T, make), table(S)
    data = tf.data.Dataset.from_tensor_slices(IDS).batch(4)
    if head == "sigmoid":
        with pytest.raises(InputError, match=r"each of 3 classes by itself.*Pass top_k=None"):
            tfvllm.distillation.write_teacher_cache(teacher, data, tmp_path / "c", top_k=2)
    cache = tfvllm.distillation.write_teacher_cache(teacher, data, tmp_path / "c", top_k=None)
    distiller = tfvllm.Distiller(cache, student, losses={"logits": losses.ForwardKL()}, task_weight=0.0)
    distiller.compile("sgd")
    logs = distiller.evaluate(cache.join(data), return_dict=True, verbose=0)
    expected = kl(T, S) if head == "Softmax" else bernoulli_kl(T, S)
    assert logs["logits_loss"] == pytest.approx(expected.mean(), rel=1e-4)
