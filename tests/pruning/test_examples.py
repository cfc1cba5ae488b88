"""The models of public Keras examples (keras.io/examples, small): pruned by callback and by wrapper, stripped, saved.

Of each the values are asked for: every kernel's share of zeros, masks after every step, equal outputs after stripping,
loading and in the SavedModel.
"""

import warnings

import keras
import numpy as np
import pytest
import tensorflow as tf

import tfvllm
from tfvllm.callbacks import MagnitudePruning, UpdatePruningStep
from tfvllm.pruning.masks import find_states
from tfvllm.pruning.prunable import PruneKernels, select
from tfvllm.schedules import ConstantSparsity

L, ops = keras.layers, keras.ops
RNG = np.random.default_rng(0)
ROWS = 8


def numbers(*shape):
    return RNG.normal(size=(ROWS, *shape)).astype("float32")


def tokens(length=10):
    ids = RNG.integers(1, 30, (ROWS, length))
    ids[2:, length // 2 :] = 0
    return ids


def chain(shape, *layers):
    return keras.Sequential([keras.Input(shape), *layers])


class TokensAndPositions(L.Layer):
    def __init__(self, length=10, width=8, **kwargs):
        super().__init__(**kwargs)
        self.length, self.width = length, width
        self.tokens, self.positions = L.Embedding(30, width), L.Embedding(length, width)

    def call(self, ids):
        return self.tokens(ids) + self.positions(ops.arange(self.length))

    def get_config(self):
        return {**super().get_config(), "length": self.length, "width": self.width}


class TransformerBlock(L.Layer):
    def __init__(self, width=8, heads=2, ffn=16, **kwargs):
        super().__init__(**kwargs)
        self.sizes = {"width": width, "heads": heads, "ffn": ffn}
        self.attention = L.MultiHeadAttention(heads, width)
        self.ffn = keras.Sequential([L.Dense(ffn, "relu"), L.Dense(width)])
        self.norms = [L.LayerNormalization(), L.LayerNormalization()]

    def call(self, x):
        x = self.norms[0](x + self.attention(x, x))
        return self.norms[1](x + self.ffn(x))

    def get_config(self):
        return {**super().get_config(), **self.sizes}


class Fourier(L.Layer):
    def call(self, x):
        return ops.fft2((x, ops.zeros_like(x)))[0]


CUSTOM = {"TokensAndPositions": TokensAndPositions, "TransformerBlock": TransformerBlock, "Fourier": Fourier}


def text_from_scratch():
    layers = [L.Embedding(30, 8), L.Dropout(0.5), L.Conv1D(8, 3, strides=2, activation="relu"), L.GlobalMaxPooling1D()]
    return chain((10,), *layers, L.Dense(8, "relu"), L.Dense(1, "sigmoid")), tokens()


def bidirectional_lstm():
    recurrent = [L.Bidirectional(L.LSTM(4, return_sequences=True)), L.Bidirectional(L.LSTM(4))]
    return chain((10,), L.Embedding(30, 8, mask_zero=True), *recurrent, L.Dense(1, "sigmoid")), tokens()


def text_with_transformer():
    inputs = keras.Input((10,), dtype="int32")
    x = TransformerBlock()(TokensAndPositions()(inputs))
    x = L.Dropout(0.1)(L.GlobalAveragePooling1D()(x))
    return keras.Model(inputs, L.Dense(2, "softmax")(L.Dense(8, "relu")(x))), tokens()


def fnet():
    inputs = keras.Input((10,), dtype="int32")
    x = TokensAndPositions()(inputs)
    x = L.LayerNormalization()(x + Fourier()(x))
    x = L.LayerNormalization()(x + L.Dense(8)(L.Dense(16, "gelu")(x)))
    return keras.Model(inputs, L.Dense(1)(L.GlobalAveragePooling1D()(x))), tokens()


def pretrained_embeddings():
    table = L.Embedding(30, 8, trainable=False)
    return chain((10,), table, L.Conv1D(8, 5, activation="relu"), L.MaxPooling1D(2), L.Flatten(), L.Dense(4)), tokens()


def addition_rnn():
    layers = [L.LSTM(8), L.RepeatVector(3), L.LSTM(8, return_sequences=True), L.Dense(5, "softmax")]
    return chain((7, 5), *layers), numbers(7, 5)


def sequence_to_sequence():
    source, target = keras.Input((6, 4)), keras.Input((5, 4))
    _, h, c = L.LSTM(8, return_state=True)(source)
    out, _, _ = L.LSTM(8, return_sequences=True, return_state=True)(target, initial_state=[h, c])
    return keras.Model([source, target], L.Dense(4, "softmax")(out)), [numbers(6, 4), numbers(5, 4)]


def mnist():
    layers = [
        L.Conv2D(8, 3, activation="relu"),
        L.MaxPooling2D(2),
        L.Conv2D(8, 3, activation="relu"),
        L.MaxPooling2D(2),
    ]
    return chain((14, 14, 1), *layers, L.Flatten(), L.Dropout(0.5), L.Dense(10, "softmax")), numbers(14, 14, 1)


def small_xception():
    inputs = keras.Input((12, 12, 3))
    x = L.Activation("relu")(
        L.BatchNormalization()(L.Conv2D(4, 3, strides=2, padding="same")(L.Rescaling(1 / 2)(inputs)))
    )
    before = x
    x = L.BatchNormalization()(L.SeparableConv2D(8, 3, padding="same")(L.Activation("relu")(x)))
    x = L.MaxPooling2D(3, strides=2, padding="same")(x)
    x = L.add([x, L.Conv2D(8, 1, strides=2, padding="same")(before)])
    return keras.Model(inputs, L.Dense(2)(L.GlobalAveragePooling2D()(x))), numbers(12, 12, 3)


def vision_transformer():
    inputs = keras.Input((8, 8, 3))
    patches = L.Reshape((16, 12))(ops.transpose(ops.reshape(inputs, (-1, 4, 2, 4, 2, 3)), (0, 1, 3, 2, 4, 5)))
    x = L.Dense(8)(patches) + L.Embedding(16, 8)(ops.expand_dims(ops.arange(16), 0))
    normed = L.LayerNormalization(epsilon=1e-6)(x)
    x = L.Add()([L.MultiHeadAttention(num_heads=2, key_dim=8)(normed, normed), x])
    x = x + L.Dense(8, keras.activations.gelu)(L.LayerNormalization()(x))
    return keras.Model(inputs, L.Dense(5)(L.Dense(16, "gelu")(L.Flatten()(x)))), numbers(8, 8, 3)


def mlp_mixer():
    inputs = keras.Input((6, 8))
    x = L.LayerNormalization()(inputs)
    x = inputs + ops.transpose(L.Dense(6)(L.Dense(12, "gelu")(ops.transpose(x, (0, 2, 1)))), (0, 2, 1))
    x = x + L.Dense(8)(L.Dense(16, "gelu")(L.LayerNormalization()(x)))
    return keras.Model(inputs, L.Dense(3)(L.GlobalAveragePooling1D()(x))), numbers(6, 8)


def next_frame():
    layers = [L.ConvLSTM2D(3, 3, padding="same", return_sequences=True, activation="relu"), L.BatchNormalization()]
    return chain((3, 6, 6, 1), *layers, L.Conv3D(1, 3, activation="sigmoid", padding="same")), numbers(3, 6, 6, 1)


def conv_mixer():
    inputs = keras.Input((8, 8, 3))
    x = L.BatchNormalization()(L.Activation("gelu")(L.Conv2D(8, 2, strides=2)(inputs)))
    x = L.Add()([L.Activation("gelu")(L.DepthwiseConv2D(3, padding="same")(x)), x])
    return keras.Model(inputs, L.Dense(4)(L.GlobalAvgPool2D()(L.Conv2D(8, 1)(x)))), numbers(8, 8, 3)


def image_autoencoder():
    down = [L.Conv2D(4, 3, activation="relu", padding="same"), L.MaxPooling2D(2, padding="same")]
    up = [L.Conv2DTranspose(4, 3, strides=2, activation="relu", padding="same")]
    return chain((8, 8, 1), *down, *up, L.Conv2D(1, 3, activation="sigmoid", padding="same")), numbers(8, 8, 1)


def super_resolution():
    inputs = keras.Input((6, 6, 1))
    x = L.Conv2D(4, 3, padding="same", activation="tanh", kernel_initializer="orthogonal")(inputs)
    x = ops.reshape(L.Conv2D(4, 3, padding="same")(x), (-1, 6, 6, 2, 2, 1))
    return keras.Model(inputs, ops.reshape(ops.transpose(x, (0, 1, 3, 2, 4, 5)), (-1, 12, 12, 1))), numbers(6, 6, 1)


def siamese():
    tower = chain((8, 8, 1), L.Conv2D(4, 3, activation="tanh"), L.AveragePooling2D(2), L.Flatten(), L.Dense(6, "tanh"))
    one, two = keras.Input((8, 8, 1)), keras.Input((8, 8, 1))
    distance = ops.sqrt(ops.sum(ops.square(tower(one) - tower(two)), axis=1, keepdims=True) + 1e-7)
    out = L.Dense(1, "sigmoid")(L.BatchNormalization()(distance))
    return keras.Model([one, two], out), [numbers(8, 8, 1), numbers(8, 8, 1)]


def series_classification():
    blocks = [layer for _ in range(2) for layer in (L.Conv1D(8, 3, padding="same"), L.BatchNormalization(), L.ReLU())]
    return chain((20, 1), *blocks, L.GlobalAveragePooling1D(), L.Dense(2, "softmax")), numbers(20, 1)


def series_transformer():
    inputs = keras.Input((12, 4))
    x = (
        L.LayerNormalization(epsilon=1e-6)(L.Dropout(0.2)(L.MultiHeadAttention(2, 4, dropout=0.2)(inputs, inputs)))
        + inputs
    )
    y = L.Conv1D(filters=4, kernel_size=1)(L.Dropout(0.2)(L.Conv1D(filters=4, kernel_size=1, activation="relu")(x)))
    x = L.LayerNormalization(epsilon=1e-6)(y) + x
    out = L.Dense(2, "softmax")(L.Dense(8, "relu")(L.GlobalAveragePooling1D(data_format="channels_last")(x)))
    return keras.Model(inputs, out), numbers(12, 4)


def series_autoencoder():
    down = [L.Conv1D(8, 7, padding="same", strides=2, activation="relu"), L.Dropout(0.2)]
    up = [
        L.Conv1DTranspose(8, 7, padding="same", strides=2, activation="relu"),
        L.Conv1DTranspose(1, 7, padding="same"),
    ]
    return chain((16, 1), *down, *up), numbers(16, 1)


def wide_and_deep():
    inputs = {"age": keras.Input((1,)), "hours": keras.Input((1,)), "work": keras.Input((1,), dtype="int32")}
    code = L.Reshape((4,))(L.Embedding(5, 4)(inputs["work"]))
    features = L.concatenate([inputs["age"], inputs["hours"], code])
    deep = L.Dropout(0.1)(L.ReLU()(L.BatchNormalization()(L.Dense(16)(features))))
    cross = features * L.Dense(6)(features) + features
    out = L.Dense(units=2, activation="softmax")(L.concatenate([L.BatchNormalization()(features), deep, cross]))
    x = {"age": numbers(1), "hours": numbers(1), "work": RNG.integers(0, 5, (ROWS, 1))}
    return keras.Model(inputs, out), x


class Recommender(keras.Model):
    """Subclassed: masked in place."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.users, self.items = L.Embedding(30, 6), L.Embedding(30, 6)
        self.first, self.second = L.Dense(8, "relu"), L.Dense(1)

    def call(self, pairs):
        return self.second(self.first(self.users(pairs[:, 0]) * self.items(pairs[:, 1])))


CUSTOM["Recommender"] = Recommender


def collaborative_filtering():
    model, x = Recommender(), tokens(2)
    model(x)
    return model, x


EXAMPLES = [
    text_from_scratch,
    bidirectional_lstm,
    text_with_transformer,
    fnet,
    pretrained_embeddings,
    addition_rnn,
    sequence_to_sequence,
    mnist,
    small_xception,
    vision_transformer,
    mlp_mixer,
    next_frame,
    conv_mixer,
    image_autoencoder,
    super_resolution,
    siamese,
    series_classification,
    series_transformer,
    series_autoencoder,
    wide_and_deep,
    collaborative_filtering,
]


class Watch(keras.callbacks.Callback):
    """After every step what is masked is zero."""

    steps = 0

    def on_train_batch_end(self, batch, logs=None):
        for state in find_states(self.model):
            for weight, mask, _ in state.pruning_vars:
                assert not np.any(np.asarray(weight)[np.asarray(mask) == 0])
        self.steps += 1


def half():
    return ConstantSparsity(0.5, 0, frequency=1)


def has_half(targets):
    for target in targets:
        value = np.asarray(target.variable, "float32")
        kept = max(round(value.size * 0.5 - 1e-6), 1)
        assert abs(int(np.count_nonzero(value)) - kept) <= 1, (target.name, np.mean(value == 0))


def trained(model, x, callback):
    keras.utils.set_random_seed(1)
    out = np.asarray(model(x, training=False))
    model.compile(keras.optimizers.SGD(1e-2, momentum=0.9), "mse")
    watch = Watch()
    model.fit(x, 0.5 * np.ones_like(out), batch_size=4, epochs=2, verbose=0, callbacks=[callback, watch])
    assert watch.steps == 4
    assert np.all(np.isfinite(np.asarray(model(x)))) and not np.array_equal(np.asarray(model(x)), out)


@pytest.mark.slow
@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: example.__name__)
@pytest.mark.filterwarnings("ignore:not pruned, as frozen")
def test_example(example, tmp_path):
    with keras.saving.custom_object_scope(CUSTOM):
        for form in ("callback", "wrapper"):
            keras.utils.set_random_seed(0)
            model, x = example()
            expected, names = np.asarray(model(x)), [v.path for v in model.trainable_variables]
            policy = PruneKernels() if form == "callback" else None
            if form == "callback":
                pruning = MagnitudePruning(model, half())
                trained(model, x, pruning)
                plain = model
                assert pruning.sparsity == pytest.approx(0.5, abs=0.03)
            else:
                pruned = tfvllm.prune_low_magnitude(model, half())
                np.testing.assert_allclose(np.asarray(pruned(x)), expected, rtol=1e-6, atol=1e-6)
                trained(pruned, x, UpdatePruningStep())
                plain = tfvllm.strip_pruning(pruned)
                np.testing.assert_array_equal(np.asarray(plain(x)), np.asarray(pruned(x)))
            assert not find_states(plain)
            assert sorted(v.path.split("/")[-1] for v in plain.trainable_variables) == sorted(
                name.split("/")[-1] for name in names
            )
            found = select(plain, policy)
            has_half(found.targets)
            out = np.asarray(plain(x))
            plain.save(tmp_path / f"{form}.keras")
            again = keras.models.load_model(tmp_path / f"{form}.keras")
            np.testing.assert_allclose(np.asarray(again(x)), out, rtol=1e-6, atol=1e-6)
            has_half(select(again, policy).targets)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            plain.export(tmp_path / "saved", verbose=False)
        module = tf.saved_model.load(str(tmp_path / "saved"))
        np.testing.assert_allclose(np.asarray(module.serve(_as_served(plain, x))), out, rtol=1e-4, atol=1e-5)


def _as_served(model, x):
    """Of the dtypes that Keras exports the model's inputs with."""
    if isinstance(model, Recommender):
        return tf.cast(x, tf.float32)  # a subclassed model does not say what it reads
    given = model.inputs[0] if isinstance(model, keras.Sequential) else model.input
    return tf.nest.map_structure(lambda value, tensor: tf.cast(value, tensor.dtype), x, given)
