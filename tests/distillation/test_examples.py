"""The models of public Keras examples, rebuilt small, under a Distiller: its loss is one worked out from the logits.

Each entry names the example of keras-team/keras-io whose kind of model it is; the logits are read by a model of their
own up to the last product, so nothing of what is tested is used for what is expected.
"""

import keras
import numpy as np
import pytest
from keras import layers, ops

import tfvllm
from tests.distillation.test_heads import bernoulli_kl, kl

pytestmark = pytest.mark.thorough
losses = tfvllm.losses
RNG = np.random.default_rng(5)
TEXTS = np.array(["a fine film", "dull and long", "not bad at all", "the plot fails", "moving", "bad bad bad"])


def labels(rows, classes):
    return RNG.integers(0, classes, rows)


def cross_entropy(z, y):
    """Of logits [batch, classes] or [batch, length, classes]: every position counts once."""
    z, y = z.reshape(-1, z.shape[-1]), y.reshape(-1)
    return np.mean(np.log(np.exp(z).sum(-1)) - z[np.arange(len(z)), y])


def binary_cross_entropy(z, y):
    return np.mean(np.log1p(np.exp(z)) - y * z)


class Case:
    """A model by its parts: inputs, the tensor of its logits, and what it makes of them."""

    def __init__(self, inputs, logits, head=lambda z: z):
        self.model = keras.Model(inputs, head(logits))
        self.logits = keras.Model(inputs, logits)


def images(width, head):
    inputs = keras.Input((8, 8, 1))
    x = layers.LeakyReLU()(layers.Conv2D(width, 3, strides=2, padding="same")(inputs))
    x = layers.MaxPooling2D(2, strides=1, padding="same")(x)
    return Case(inputs, layers.Dense(5)(layers.Flatten()(x)), head)


def image_data():
    return RNG.normal(size=(6, 8, 8, 1)).astype("float32"), labels(6, 5)


def vit(width, head):
    inputs = keras.Input((8, 8, 1))
    patches = layers.Reshape((16, 4))(layers.Conv2D(4, 2, strides=2)(inputs))
    x = layers.Dense(width)(patches)
    x = x + layers.MultiHeadAttention(2, width // 2)(layers.LayerNormalization()(x), layers.LayerNormalization()(x))
    return Case(inputs, layers.Dense(5)(layers.GlobalAveragePooling1D()(x)), head)


def words(width, head):
    vectorize = layers.TextVectorization(vocabulary=["film", "bad", "not", "plot"], output_sequence_length=4)
    inputs = keras.Input((), dtype="string")
    x = layers.Embedding(6, width)(vectorize(inputs))
    return Case(inputs, layers.Dense(1)(layers.GlobalMaxPooling1D()(layers.Conv1D(width, 3)(x))), head)


def bags(width, head):
    vectorize = layers.TextVectorization(vocabulary=["film", "bad", "not", "plot"], output_mode="multi_hot")
    inputs = keras.Input((), dtype="string")
    x = layers.Dropout(0.5)(layers.Dense(width, "relu")(vectorize(inputs)))
    return Case(inputs, layers.Dense(4)(x), head)


def reviews(width, head):
    inputs = keras.Input((None,), dtype="int32")
    x = layers.Bidirectional(layers.LSTM(width))(layers.Embedding(20, width)(inputs))
    return Case(inputs, layers.Dense(1)(x), head)


def transformer(width, head):
    inputs = keras.Input((7,), dtype="int32")
    x = layers.Embedding(20, width)(inputs)
    x = layers.LayerNormalization()(x + layers.MultiHeadAttention(2, width)(x, x))
    return Case(inputs, layers.Dense(2)(layers.Dropout(0.1)(layers.GlobalAveragePooling1D()(x))), head)


def rows(width, head):
    number, kind = keras.Input((3,), name="number"), keras.Input((1,), dtype="string", name="kind")
    encoded = layers.StringLookup(vocabulary=["a", "b"], output_mode="one_hot")(kind)
    x = layers.Dense(width, "relu")(layers.Concatenate()([layers.BatchNormalization()(number), encoded]))
    return Case({"number": number, "kind": kind}, layers.Dense(1)(x), head)


def row_data():
    number = RNG.normal(size=(6, 3)).astype("float32")
    return {"number": number, "kind": np.array([["a"], ["b"], ["c"]] * 2)}, labels(6, 2)


def series(width, head):
    inputs = keras.Input((12, 1))
    x = inputs
    for _ in range(2):
        x = layers.ReLU()(layers.BatchNormalization()(layers.Conv1D(width, 3, padding="same")(x)))
    return Case(inputs, layers.Dense(3)(layers.GlobalAveragePooling1D()(x)), head)


def series_transformer(width, head):
    inputs = keras.Input((12, 4))
    x = layers.LayerNormalization(epsilon=1e-6)(layers.MultiHeadAttention(2, width, dropout=0.2)(inputs, inputs))
    x = x + inputs
    y = layers.Conv1D(4, 1)(layers.Dropout(0.2)(layers.Conv1D(width, 1, activation="relu")(x)))
    x = layers.LayerNormalization(epsilon=1e-6)(y) + x
    pooled = layers.GlobalAveragePooling1D(data_format="channels_last")(x)
    return Case(inputs, layers.Dense(2)(layers.Dense(width, "relu")(pooled)), head)


def speaker(width, head):
    inputs = keras.Input((16, 1))
    short = layers.Conv1D(width, 1, padding="same")(inputs)
    x = layers.Conv1D(width, 3, padding="same", activation="relu")(inputs)
    x = layers.Activation("relu")(layers.Add()([layers.Conv1D(width, 3, padding="same")(x), short]))
    x = layers.Flatten()(layers.AveragePooling1D(3, strides=3)(layers.MaxPool1D(2, strides=2)(x)))
    return Case(inputs, layers.Dense(4)(layers.Dense(width, "relu")(x)), head)


def wide_and_deep(width, head):
    age, work = keras.Input((2,), name="age"), keras.Input((1,), dtype="int32", name="work")
    features = layers.concatenate([age, layers.Reshape((4,))(layers.Embedding(5, 4)(work))])
    deep = layers.Dropout(0.1)(layers.ReLU()(layers.BatchNormalization()(layers.Dense(width)(features))))
    cross = features * layers.Dense(6)(features) + features
    merged = layers.concatenate([layers.BatchNormalization()(features), deep, cross])
    return Case({"age": age, "work": work}, layers.Dense(3)(merged), head)


def wide_data():
    return {"age": RNG.normal(size=(6, 2)).astype("float32"), "work": RNG.integers(0, 5, (6, 1))}, labels(6, 3)


def imbalanced(width, head):
    inputs = keras.Input((5,))
    x = layers.Dropout(0.3)(layers.Dense(width, "relu")(layers.Dense(width, "relu")(inputs)))
    return Case(inputs, layers.Dense(1)(x), head)


def addition(width, head):
    inputs = keras.Input((7, 5))
    x = layers.LSTM(width, return_sequences=True)(layers.RepeatVector(3)(layers.LSTM(width)(inputs)))
    return Case(inputs, layers.Dense(5)(x), head)


def translator(width, head):
    source, target = keras.Input((6, 4), name="source"), keras.Input((5, 4), name="target")
    _, h, c = layers.LSTM(width, return_state=True)(source)
    out, _, _ = layers.LSTM(width, return_sequences=True, return_state=True)(target, initial_state=[h, c])
    return Case({"source": source, "target": target}, layers.Dense(4)(out), head)


def translator_data():
    x = {"source": RNG.normal(size=(6, 6, 4)), "target": RNG.normal(size=(6, 5, 4))}
    return {name: value.astype("float32") for name, value in x.items()}, RNG.integers(0, 4, (6, 5))


def mixer(width, head):
    inputs = keras.Input((6, 8))
    x = layers.LayerNormalization()(inputs)
    x = inputs + layers.Permute((2, 1))(layers.Dense(6)(layers.Dense(width, "gelu")(layers.Permute((2, 1))(x))))
    x = x + layers.Dense(8)(layers.Dense(width, "gelu")(layers.LayerNormalization()(x)))
    return Case(inputs, layers.Dense(3)(layers.GlobalAveragePooling1D()(x)), head)


def numbers(*shape, classes):
    return lambda: (RNG.normal(size=(6, *shape)).astype("float32"), labels(6, classes))


def ensemble(width, head):
    inputs = keras.Input((4,))
    members = [layers.Softmax()(layers.Dense(3)(layers.Dense(width, "relu")(inputs))) for _ in range(2)]
    mean = layers.Average()(members)
    case = Case(inputs, mean)
    case.logits = keras.Model(inputs, ops.log(mean))
    return case


def small(width, head):
    inputs = keras.Input((4,))
    return Case(inputs, layers.Dense(3)(layers.Dense(width, "relu")(inputs)), head)


def softmax(z):
    return layers.Softmax()(z)


def sigmoid(z):
    return layers.Activation("sigmoid")(z)


def plain(z):
    return z


CATEGORICAL, BINARY = "sparse_categorical_crossentropy", "binary_crossentropy"

# example: (model, the teacher's head, the student's head, data, loss by name)
EXAMPLES = {
    "vision/knowledge_distillation": (images, plain, plain, image_data, CATEGORICAL),
    "vision/mnist_convnet": (images, softmax, softmax, image_data, CATEGORICAL),
    "vision/deit (one token)": (vit, softmax, plain, image_data, CATEGORICAL),
    "nlp/text_classification_from_scratch": (words, sigmoid, sigmoid, lambda: (TEXTS, labels(6, 2)), BINARY),
    "nlp/multi_label_classification": (
        bags, sigmoid, sigmoid, lambda: (TEXTS, RNG.integers(0, 2, (6, 4)).astype("float32")), BINARY,
    ),
    "nlp/bidirectional_lstm_imdb": (
        reviews, sigmoid, plain, lambda: (RNG.integers(0, 20, (6, 9)), labels(6, 2)), BINARY,
    ),
    "nlp/text_classification_with_transformer": (
        transformer, softmax, plain, lambda: (RNG.integers(0, 20, (6, 7)), labels(6, 2)), CATEGORICAL,
    ),
    "structured_data/structured_data_classification_from_scratch": (rows, sigmoid, sigmoid, row_data, BINARY),
    "structured_data/wide_deep_cross_networks": (wide_and_deep, softmax, softmax, wide_data, CATEGORICAL),
    "structured_data/imbalanced_classification": (imbalanced, sigmoid, plain, numbers(5, classes=2), BINARY),
    "timeseries/timeseries_classification_from_scratch": (
        series, softmax, softmax, numbers(12, 1, classes=3), CATEGORICAL,
    ),
    "timeseries/timeseries_classification_transformer": (
        series_transformer, softmax, plain, numbers(12, 4, classes=2), CATEGORICAL,
    ),
    "audio/speaker_recognition_using_cnn": (speaker, softmax, softmax, numbers(16, 1, classes=4), CATEGORICAL),
    "nlp/addition_rnn": (
        addition, softmax, softmax, lambda: (numbers(7, 5, classes=2)()[0], RNG.integers(0, 5, (6, 3))), CATEGORICAL,
    ),
    "nlp/lstm_seq2seq": (translator, softmax, plain, translator_data, CATEGORICAL),
    "vision/mlp_image_classification": (mixer, plain, softmax, numbers(6, 8, classes=3), CATEGORICAL),
}  # fmt: skip


def check(teacher, student, x, y, loss, temperature=3.0, task_weight=0.1):
    """One evaluation against the hand-made loss, one epoch of training that leaves the teacher alone."""
    made = {"logits": losses.ForwardKL(temperature=temperature)}
    weights = {"logits": 1.0 - task_weight}
    every_position_is_real = {"mask": None} if np.ndim(y) > 1 else {}
    distiller = tfvllm.Distiller(teacher.model, student.model, made, weights, task_weight, **every_position_is_real)
    distiller.compile("adam", loss=loss, metrics=["accuracy"])
    logs = distiller.evaluate(x, y, batch_size=len(y), return_dict=True, verbose=0)
    as_read = {k: ops.convert_to_tensor(v) for k, v in x.items()} if isinstance(x, dict) else ops.convert_to_tensor(x)
    t, s = (np.asarray(case.logits(as_read), "float64") for case in (teacher, student))
    if loss == BINARY:
        divergence, task = bernoulli_kl(t, s, temperature), binary_cross_entropy(s, y.reshape(s.shape))
    else:
        divergence, task = kl(t, s, temperature), cross_entropy(s, y)
    expected = temperature**2 * divergence.mean()
    assert logs["logits_loss"] == pytest.approx(expected, rel=2e-3, abs=1e-6)
    assert logs["task_loss"] == pytest.approx(task, rel=1e-3)
    assert logs["loss"] == pytest.approx(task_weight * task + (1 - task_weight) * expected, rel=2e-3)
    frozen = teacher.model.get_weights()
    history = distiller.fit(x, y, batch_size=3, verbose=0).history
    assert np.isfinite(history["loss"]).all()
    assert all(np.array_equal(one, two) for one, two in zip(frozen, teacher.model.get_weights()))
    return distiller


def louder(case):
    """Weights large enough that a softmax of probabilities would show."""
    for weight in case.model.trainable_weights:
        if len(weight.shape) > 1:
            weight.assign(np.asarray(weight) * 2.0)
    return case


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_loss_of_an_example(name):
    build, of_teacher, of_student, data, loss = EXAMPLES[name]
    check(louder(build(8, of_teacher)), louder(build(4, of_student)), *data(), loss)


def test_an_ensemble_teaches_one():
    """nlp and vision examples that average several models (and born-again ensembles)."""
    x = RNG.normal(size=(6, 4)).astype("float32")
    check(louder(ensemble(8, None)), louder(small(4, plain)), x, labels(6, 3), CATEGORICAL)


def test_consistency_training():
    """vision/consistency_training: the teacher sees the clean image, the student a noisy one; no labels."""

    def seer(name, width):
        inputs = keras.Input((4,), name=name)
        logits = layers.Dense(3)(layers.Dense(width, "relu")(inputs))
        return keras.Model({name: inputs}, logits)

    teacher, student = seer("clean", 8), seer("noisy", 4)
    clean = RNG.normal(size=(6, 4)).astype("float32")
    x = {"clean": clean, "noisy": clean + RNG.normal(0, 0.1, clean.shape).astype("float32")}
    distiller = tfvllm.Distiller(teacher, student, {"logits": losses.ForwardKL(temperature=10.0)}, task_weight=0.0)
    distiller.compile("adam")
    logs = distiller.evaluate(x, batch_size=6, return_dict=True, verbose=0)
    t, s = teacher({"clean": x["clean"]}), student({"noisy": x["noisy"]})
    assert logs["loss"] == pytest.approx(100 * kl(t, s, 10.0).mean(), rel=1e-3)
    assert np.isfinite(distiller.fit(x, verbose=0).history["loss"]).all()


def test_features_and_logits():
    """KerasHub guides (MobileBERT, DistilBERT): hidden states beside the logits, through a projection."""
    teacher, student = louder(small(8, softmax)), louder(small(4, softmax))
    names = teacher.model.layers[1].name, student.model.layers[1].name
    made = {"logits": losses.ForwardKL(2.0), "hidden": losses.HiddenStates(layers=[names])}
    distiller = tfvllm.Distiller(teacher.model, student.model, made, {"hidden": 0.5}, task_weight=1.0)
    distiller.compile("adam", loss=CATEGORICAL)
    x, y = RNG.normal(size=(6, 4)).astype("float32"), labels(6, 3)
    logs = distiller.evaluate(x, y, batch_size=6, return_dict=True, verbose=0)
    t, s = (np.asarray(case.logits(x), "float64") for case in (teacher, student))
    states = [np.asarray(case.model.layers[1](x)) for case in (teacher, student)]
    projected = states[1] @ np.asarray(distiller.projections["hidden_teacher"][0].kernel)
    hidden = np.square(states[0] - projected).mean()
    assert logs["hidden_loss"] == pytest.approx(hidden, rel=1e-4)
    expected = cross_entropy(s, y) + 4 * kl(t, s, 2.0).mean() + 0.5 * hidden
    assert logs["loss"] == pytest.approx(expected, rel=1e-3)


def test_a_language_model_with_padding():
    """generative/text_generation_gpt: every real position counts once."""

    def model(width):
        ids, real = (
            keras.Input((None,), dtype="int32", name="ids"),
            keras.Input((None,), dtype="bool", name="padding_mask"),
        )
        x = layers.GRU(width, return_sequences=True)(layers.Embedding(12, width)(ids))
        return keras.Model({"ids": ids, "padding_mask": real}, layers.Dense(12)(x))

    teacher, student = model(8), model(4)
    ids = RNG.integers(1, 12, (3, 6))
    real = np.arange(6) < np.array([[6], [4], [1]])
    distiller = tfvllm.Distiller(teacher, student, {"logits": losses.ForwardKL()}, task_weight=0.0)
    distiller.compile("adam")
    logs = distiller.evaluate({"ids": ids, "padding_mask": real}, batch_size=3, return_dict=True, verbose=0)
    t, s = (one({"ids": ids, "padding_mask": real}) for one in (teacher, student))
    assert logs["loss"] == pytest.approx(kl(t, s)[real].mean(), rel=1e-3)
