"""Small models after the architectures of Keras's public examples (keras.io/examples): the same values, simplified."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers as L
from keras import ops

import tfvllm
from tfvllm.savedmodel import read

TEXTS = np.array(["the cat sat", "", "a dog ran fast and far from the cat", "cat"], object)


def vectorizer(**options):
    layer = L.TextVectorization(max_tokens=30, **options)
    layer.adapt(["the cat sat on a mat", "the dog ran fast and far"])
    return layer


def attention_block(x, heads=2, width=8, inner=16, causal=False):
    y = L.MultiHeadAttention(heads, width // heads)(x, x, use_causal_mask=causal)
    x = L.LayerNormalization(epsilon=1e-6)(x + y)
    y = L.Dense(width)(L.Dense(inner, activation="gelu")(x))
    return L.LayerNormalization(epsilon=1e-6)(x + L.Dropout(0.1)(y))


def text_from_scratch():
    text = keras.Input([], dtype="string")
    x = L.Embedding(30, 8)(vectorizer(output_sequence_length=12)(text))
    x = L.Conv1D(8, 5, strides=2, activation="relu", padding="same")(L.Dropout(0.5)(x))
    return keras.Model(text, L.Dense(1, activation="sigmoid")(L.GlobalMaxPooling1D()(x)))


def positions(ids, width=8, length=10):
    return L.Embedding(30, width)(ids) + L.Embedding(length, width)(ops.arange(length))


def text_transformer():
    ids = keras.Input([10], dtype="int32")
    x = L.GlobalAveragePooling1D()(attention_block(positions(ids)))
    return keras.Model(ids, L.Dense(2, activation="softmax")(L.Dense(8, activation="relu")(x)))


def bidirectional_lstm():
    ids = keras.Input([None], dtype="int32")
    x = L.Bidirectional(L.LSTM(5, return_sequences=True))(L.Embedding(30, 6, mask_zero=True)(ids))
    return keras.Model(ids, L.Dense(1, activation="sigmoid")(L.Bidirectional(L.LSTM(4))(x)))


def sequence_to_sequence():
    source, target = keras.Input([None, 6], name="source"), keras.Input([None, 5], name="target")
    _, h, c = L.LSTM(7, return_state=True)(source)
    decoded = L.LSTM(7, return_sequences=True)(target, initial_state=[h, c])
    return keras.Model([source, target], L.Dense(5, activation="softmax")(decoded))


def tagging_transformer():
    ids = keras.Input([10], dtype="int32")
    return keras.Model(ids, L.Dense(6)(L.Dense(9, activation="relu")(attention_block(positions(ids)))))


def small_gpt():
    ids = keras.Input([10], dtype="int32")
    x = attention_block(positions(ids), causal=True)
    return keras.Model(ids, [L.Dense(30)(x), x])


def digits():
    image = keras.Input([12, 12, 1])
    x = L.MaxPooling2D()(L.Conv2D(4, 3, activation="relu")(image))
    x = L.Flatten()(L.MaxPooling2D()(L.Conv2D(6, 3, activation="relu")(x)))
    return keras.Model(image, L.Dense(10, activation="softmax")(L.Dropout(0.5)(x)))


def xception_like():
    image = keras.Input([16, 16, 3])
    x = L.Activation("relu")(
        L.BatchNormalization()(L.Conv2D(8, 3, strides=2, padding="same")(L.Rescaling(1 / 255)(image)))
    )
    y = L.BatchNormalization()(L.SeparableConv2D(12, 3, padding="same")(L.Activation("relu")(x)))
    y = L.MaxPooling2D(3, strides=2, padding="same")(y)
    x = y + L.Conv2D(12, 1, strides=2, padding="same")(x)
    return keras.Model(image, L.Dense(1)(L.GlobalAveragePooling2D()(x)))


def u_net():
    image = keras.Input([16, 16, 3])
    down = L.Activation("relu")(L.BatchNormalization()(L.Conv2D(6, 3, padding="same")(image)))
    low = L.Conv2D(8, 3, padding="same", activation="relu")(L.MaxPooling2D()(down))
    up = L.UpSampling2D()(L.Conv2DTranspose(6, 3, padding="same")(low))
    return keras.Model(image, L.Conv2D(3, 1, activation="softmax")(L.Concatenate()([up, down])))


def mobile():
    image = keras.Input([16, 16, 3])
    x = L.ReLU(6.0)(L.BatchNormalization()(L.Conv2D(8, 3, strides=2, padding="same", use_bias=False)(image)))
    y = L.ReLU(6.0)(L.BatchNormalization()(L.DepthwiseConv2D(3, padding="same", use_bias=False)(x)))
    y = L.BatchNormalization()(L.Conv2D(8, 1, use_bias=False)(y))
    return keras.Model(image, L.Dense(4)(L.GlobalAveragePooling2D()(x + y)))


def vision_transformer():
    image = keras.Input([8, 8, 3])
    x = ops.reshape(ops.image.extract_patches(image, 4, padding="valid"), [-1, 4, 48])
    x = L.Dense(8)(x) + L.Embedding(4, 8)(ops.arange(4))
    return keras.Model(image, L.Dense(3)(L.Flatten()(attention_block(x))))


def mlp_mixer():
    image = keras.Input([8, 8, 3])
    x = L.Dense(8)(L.Reshape([4, 48])(image))
    y = L.Permute([2, 1])(L.Dense(4)(L.Dense(6, activation="gelu")(L.Permute([2, 1])(L.LayerNormalization()(x)))))
    x = x + y
    x = x + L.Dense(8)(L.Dense(16, activation="gelu")(L.LayerNormalization()(x)))
    return keras.Model(image, L.Dense(3)(L.GlobalAveragePooling1D()(x)))


def conv_mixer():
    image = keras.Input([8, 8, 3])
    x = L.BatchNormalization()(L.Activation("gelu")(L.Conv2D(8, 2, strides=2)(image)))
    y = L.BatchNormalization()(L.Activation("gelu")(L.DepthwiseConv2D(3, padding="same")(x)))
    x = L.BatchNormalization()(L.Activation("gelu")(L.Conv2D(8, 1)(x + y)))
    return keras.Model(image, L.Dense(3)(L.GlobalAveragePooling2D()(x)))


def time_series_convolutions():
    series = keras.Input([None, 2])
    x = series
    for _ in range(2):
        x = L.ReLU()(L.BatchNormalization()(L.Conv1D(6, 3, padding="same")(x)))
    return keras.Model(series, L.Dense(2, activation="softmax")(L.GlobalAveragePooling1D()(x)))


def time_series_transformer():
    series = keras.Input([12, 8])
    x = series + L.MultiHeadAttention(2, 4)(*[L.LayerNormalization(epsilon=1e-6)(series)] * 2)
    x = x + L.Conv1D(8, 1)(L.Conv1D(4, 1, activation="relu")(L.LayerNormalization(epsilon=1e-6)(x)))
    return keras.Model(series, L.Dense(3)(L.GlobalAveragePooling1D(data_format="channels_first")(x)))


def next_frame():
    frames = keras.Input([3, 6, 6, 1])
    x = L.BatchNormalization()(L.ConvLSTM2D(3, 3, padding="same", return_sequences=True)(frames))
    return keras.Model(frames, L.Conv3D(1, 3, padding="same", activation="sigmoid")(x))


def wide_and_deep():
    age, job = keras.Input([1], name="age"), keras.Input([1], name="job", dtype="string")
    scaled = L.Normalization(mean=[40.0], variance=[90.0])(age)
    one_hot = L.StringLookup(vocabulary=["cook", "nurse"], output_mode="one_hot")(job)
    bins = L.CategoryEncoding(4, output_mode="one_hot")(L.Discretization([20.0, 40.0, 60.0])(age))
    wide = L.BatchNormalization()(L.Concatenate()([one_hot, bins]))
    deep = L.Dense(6, activation="relu")(L.BatchNormalization()(L.Dense(6)(L.Concatenate()([scaled, one_hot]))))
    return keras.Model({"age": age, "job": job}, L.Dense(1, activation="sigmoid")(L.Concatenate()([wide, deep])))


def tab_transformer():
    a, b = keras.Input([1], name="a", dtype="int32"), keras.Input([3], name="b")
    columns = [L.Embedding(5, 8)(a) + L.Embedding(2, 8)(ops.full_like(a, n)) for n in range(2)]
    x = L.Flatten()(attention_block(L.Concatenate(axis=1)(columns)))
    return keras.Model({"a": a, "b": b}, L.Dense(1)(L.Concatenate()([x, L.LayerNormalization()(b)])))


def gated_residual():
    x = keras.Input([8])
    y = L.Dense(8)(L.Dense(8, activation="elu")(x))
    y = L.LayerNormalization()(x + L.Dense(8)(y) * L.Dense(8, activation="sigmoid")(y))
    return keras.Model(x, L.Dense(1)(y))


def speaker():
    sound = keras.Input([64])
    real, imaginary = ops.stft(sound, 16, 8, 16)
    x = ops.expand_dims(ops.sqrt(real**2 + imaginary**2 + 1e-6), -1)
    y = L.Conv2D(4, 3, padding="same", activation="relu")(x)
    x = L.Activation("relu")(L.Conv2D(4, 1)(x) + L.Conv2D(4, 3, padding="same")(y))
    return keras.Model(sound, L.Dense(3, activation="softmax")(L.Flatten()(L.AveragePooling2D(3, 3)(x))))


def auto_encoder():
    image = keras.Input([8, 8, 1])
    x = L.Flatten()(L.Conv2D(4, 3, activation="relu", strides=2, padding="same")(image))
    mean, log_variance = L.Dense(2, name="mean")(x), L.Dense(2, name="log_variance")(x)
    x = L.Reshape([4, 4, 3])(L.Dense(48, activation="relu")(mean))
    x = L.Conv2DTranspose(1, 3, activation="sigmoid", strides=2, padding="same")(x)
    return keras.Model(image, {"image": x, "mean": mean, "log_variance": log_variance})


def siamese():
    a, b = keras.Input([8, 8, 1], name="a"), keras.Input([8, 8, 1], name="b")
    image = keras.Input([8, 8, 1])
    x = L.AveragePooling2D(2)(L.Conv2D(4, 3, activation="tanh")(L.BatchNormalization()(image)))
    tower = keras.Model(image, L.Dense(5, activation="tanh")(L.BatchNormalization()(L.Flatten()(x))))
    apart = ops.sqrt(ops.maximum(ops.sum((tower(a) - tower(b)) ** 2, 1, keepdims=True), 1e-7))
    return keras.Model([a, b], L.Dense(1, activation="sigmoid")(L.BatchNormalization()(apart)))


def super_resolution():
    image = keras.Input([None, None, 1])
    x = L.Conv2D(9, 3, padding="same", activation="relu")(L.Conv2D(6, 5, padding="same", activation="relu")(image))
    return keras.Model(image, L.Lambda(lambda t: tf.nn.depth_to_space(t, 3))(x))


IDS, IMAGE = ("int", 10), ("float", 16, 16, 3)
# name -> (the model, the kind and shape of each input)
EXAMPLES = {
    text_from_scratch: "texts",
    text_transformer: IDS,
    bidirectional_lstm: ("int", 7),
    sequence_to_sequence: [("float", 4, 6), ("float", 3, 5)],
    tagging_transformer: IDS,
    small_gpt: IDS,
    digits: ("float", 12, 12, 1),
    xception_like: IMAGE,
    u_net: IMAGE,
    mobile: IMAGE,
    vision_transformer: ("float", 8, 8, 3),
    mlp_mixer: ("float", 8, 8, 3),
    conv_mixer: ("float", 8, 8, 3),
    time_series_convolutions: ("float", 9, 2),
    time_series_transformer: ("float", 12, 8),
    next_frame: ("float", 3, 6, 6, 1),
    wide_and_deep: {"age": ("float", 1), "job": "words"},
    tab_transformer: {"a": ("small", 1), "b": ("float", 3)},
    gated_residual: ("float", 8),
    speaker: ("float", 64),
    auto_encoder: ("float", 8, 8, 1),
    siamese: [("float", 8, 8, 1), ("float", 8, 8, 1)],
    super_resolution: ("float", 6, 5, 1),
}


def made(kind, batch, rng):
    if isinstance(kind, dict):
        return {k: made(v, batch, rng) for k, v in kind.items()}
    if isinstance(kind, list):
        return [made(v, batch, rng) for v in kind]
    if kind == "texts":
        return tf.constant(np.resize(TEXTS, batch))
    if kind == "words":
        return tf.constant(np.resize(np.array([["cook"], [""], ["nurse"], ["pilot"]], object), [batch, 1]))
    name, *shape = kind
    if name == "float":
        return tf.constant(rng.normal(size=[batch, *shape]), tf.float32)
    return tf.constant(rng.integers(0, 5 if name == "small" else 30, [batch, *shape]), tf.int32)


def near(found, want):
    found, want = tf.nest.flatten(found), tf.nest.flatten(want)
    assert len(found) == len(want)
    for new, old in zip(found, want):
        assert new.shape == old.shape
        np.testing.assert_allclose(new, old, rtol=1e-4, atol=1e-4 * max(1e-3, float(np.abs(old).max())))


# One of each kind of data; the others are slow.
THOROUGH = ("text_from_scratch", "conv_mixer", "time_series_convolutions", "wide_and_deep", "speaker", "siamese")


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(make, marks=pytest.mark.thorough if make.__name__ in THOROUGH else pytest.mark.slow)
        for make in EXAMPLES
    ],
    ids=lambda make: make.__name__,
)
def test_example(make, tmp_path):
    keras.utils.set_random_seed(3)
    model, rng = make(), np.random.default_rng(5)
    for variable in model.weights:  # gains of 1, biases and means of 0 would hide mistakes
        if variable.dtype == "float32" and "variance" not in variable.path:
            variable.assign(variable + 0.05 * keras.random.normal(variable.shape))
    model.export(str(tmp_path / "plain"), verbose=False)
    plain = tf.function(lambda x: model(x, training=False), reduce_retracing=True)
    for target in ("portable", "onednn"):
        fast = tfvllm.simplify(model, target=target)
        tfvllm.simplify_saved_model(tmp_path / "plain", tmp_path / target, target=target)
        saved = read.load(tmp_path / target).signatures["serving_default"]
        served = read.load(tmp_path / "plain").signatures["serving_default"]
        for batch in (1, 3, 8):
            x = made(EXAMPLES[make], batch, rng)
            near(fast(x), plain(x))
            # By name, as tf.nest flattens a dict: the signature of a loaded model is in the order of a proto map.
            named = dict(zip(sorted(saved.structured_input_signature[1]), tf.nest.flatten(x)))
            before, after = served(**named), saved(**named)
            near([after[k] for k in before], [before[k] for k in before])
