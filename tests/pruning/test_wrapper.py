"""The wrapper computes what its layer computes: masks, arguments by name, Keras operations, models inside models."""

import keras
import keras_hub
import numpy as np
import pytest

import tfvllm
from tfvllm.callbacks import UpdatePruningStep
from tfvllm.errors import InputError
from tfvllm.pruning import PruneLowMagnitude
from tfvllm.pruning.masks import find_states
from tfvllm.pruning.prunable import prunable_weights
from tfvllm.schedules import ConstantSparsity

L = keras.layers
RNG = np.random.default_rng(0)
IDS = RNG.integers(1, 20, (4, 6))
IDS[1:, 3:] = 0
VECTORS = RNG.normal(size=(4, 6, 5)).astype("float32")
VECTORS[1:, 3:] = 0
Y = RNG.normal(size=(4, 2)).astype("float32")


def half():
    return ConstantSparsity(0.5, 0, frequency=1)


def sequence(*layers):
    return lambda: (keras.Sequential([keras.Input((6,)), L.Embedding(20, 8, mask_zero=True), *layers, L.Dense(2)]), IDS)


def masked(*layers):
    return lambda: (keras.Sequential([keras.Input((6, 5)), L.Masking(), *layers, L.Dense(2)]), VECTORS)


def functional(build, x=IDS, shape=(6,)):
    def make():
        inputs = keras.Input(shape)
        return keras.Model(inputs, L.Dense(2)(build(inputs))), x

    return make


def _embedded(ids):
    return L.Embedding(20, 8, mask_zero=True)(ids)


def _named_attention(ids):
    x = _embedded(ids)
    return L.GlobalAveragePooling1D()(L.MultiHeadAttention(2, 4)(query=x, value=x))


def _decoder(ids):
    x = _embedded(ids)
    layer = keras_hub.layers.TransformerDecoder(16, 2)
    return L.GlobalAveragePooling1D()(layer(decoder_sequence=x, encoder_sequence=_embedded(ids[:, ::-1])))


def _states(ids):
    x = _embedded(ids)
    _, h, c = L.LSTM(4, return_sequences=True, return_state=True)(x)
    return L.LSTM(4)(x, initial_state=[h, c])


def _operations(x):
    h = L.Dense(8, activation="relu")(x)
    return keras.ops.concatenate([h * 2, h[:, :2], keras.ops.sin(h)], -1)


def _nested(x):
    idle = keras.Sequential([keras.Input((8,)), L.ReLU(), L.Dropout(0.0)])  # no weights at all
    twice = keras.Sequential([keras.Input((8,)), L.Dense(8)])
    return twice(idle(twice(L.Dense(8)(x))))


def _shared_by_two(x):
    shared = L.Dense(8)
    h = shared(L.Dense(8)(x))
    return keras.Sequential([keras.Input((8,)), shared])(h)


MODELS = {
    "lstm": sequence(L.LSTM(4)),
    "gru": sequence(L.GRU(4)),
    "bidirectional": sequence(L.Bidirectional(L.LSTM(4))),
    "masking_lstm": masked(L.LSTM(4, return_sequences=True), L.LSTM(4)),
    "time_distributed": masked(L.TimeDistributed(L.Dense(4)), L.SimpleRNN(4)),
    "attention_by_name": functional(_named_attention),
    "encoder": functional(
        lambda i: L.GlobalAveragePooling1D()(keras_hub.layers.TransformerEncoder(16, 2)(_embedded(i)))
    ),
    "decoder": functional(_decoder),
    "initial_state": functional(_states),
    "operations": functional(_operations, VECTORS[:, 0], (5,)),
    "nested": functional(_nested, VECTORS[:, 0], (5,)),
    "shared_by_two": functional(_shared_by_two, VECTORS[:, 0], (5,)),
}
QUICK = ("masking_lstm", "attention_by_name", "operations", "nested", "shared_by_two")


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in QUICK else pytest.mark.thorough) for n in MODELS])
def test_computes_what_the_model_computes_and_prunes_it(name):
    model, x = MODELS[name]()
    expected = {training: np.asarray(model(x, training=training)) for training in (False, True)}
    count = len(model.trainable_variables)
    pruned = tfvllm.prune_low_magnitude(model, half())
    assert any(isinstance(layer, PruneLowMagnitude) for layer in pruned.layers)
    for state in find_states(pruned):
        state.step_variable.assign(1)  # as in training
    for training, value in expected.items():
        np.testing.assert_array_equal(np.asarray(pruned(x, training=training)), value)
    for state in find_states(pruned):
        state.step_variable.assign(-1)
    pruned.compile("sgd", "mse")
    pruned.fit(x, Y, epochs=2, verbose=0, callbacks=[UpdatePruningStep()])
    after = np.asarray(pruned(x))
    plain = tfvllm.strip_pruning(pruned)
    np.testing.assert_array_equal(np.asarray(plain(x)), after)
    assert not find_states(plain) and len(plain.trainable_variables) == count
    assert not any(isinstance(layer, PruneLowMagnitude) for layer in plain._flatten_layers())
    for target in prunable_weights(plain):
        assert abs(np.mean(np.asarray(target.variable) == 0) - 0.5) < 0.05, target.name


def test_padding_changes_nothing_while_training():
    """The padded positions hold noise: what is masked may not be read."""
    model, x = MODELS["masking_lstm"]()
    pruned = tfvllm.prune_low_magnitude(model, half())
    mask = np.any(x != 0, axis=-1)
    layer = pruned.layers[1]
    layer.masks.step_variable.assign(1)
    noisy = np.where(mask[..., None], x, 7.0).astype("float32")
    clean, noise = (np.asarray(layer(value, mask=mask, training=True)) for value in (x, noisy))
    np.testing.assert_array_equal(clean[:, -1], noise[:, -1])


def test_layers_of_several_arguments_are_built_by_their_first_call():
    x, memory = RNG.normal(size=(2, 3, 8)).astype("float32"), RNG.normal(size=(2, 5, 6)).astype("float32")
    layer = L.MultiHeadAttention(2, 4)
    wrapped = PruneLowMagnitude(layer, half())
    found = np.asarray(wrapped(x, memory))
    np.testing.assert_array_equal(found, np.asarray(layer(x, memory)))
    assert len(wrapped.pruning_vars) == 4
    found, weights = wrapped(query=x, value=memory, return_attention_scores=True)
    assert weights.shape == (2, 2, 3, 5)


@pytest.mark.parametrize("dtype", ["float64", "mixed_bfloat16", "float16"])
def test_keeps_the_dtype_of_its_layer(dtype):
    layer = L.Dense(3, dtype=dtype)
    x = RNG.normal(size=(4, 5))
    expected = layer(x)
    found = PruneLowMagnitude(layer, half())(x)
    assert found.dtype == expected.dtype
    np.testing.assert_array_equal(np.asarray(found, "float64"), np.asarray(expected, "float64"))


@pytest.mark.parametrize("name", ["attention_by_name", "operations"])
def test_saves_and_loads(name, tmp_path):
    model, x = MODELS[name]()
    pruned = tfvllm.prune_low_magnitude(model, half())
    pruned.compile("sgd", "mse")
    pruned.fit(x, Y, verbose=0, callbacks=[UpdatePruningStep()])
    pruned.save(tmp_path / "pruned.keras")
    again = keras.models.load_model(tmp_path / "pruned.keras")
    np.testing.assert_array_equal(np.asarray(again(x)), np.asarray(pruned(x)))
    assert {s.pruning_step for s in find_states(again)} == {1}
    plain = tfvllm.strip_pruning(again)
    plain.save(tmp_path / "plain.keras")
    np.testing.assert_array_equal(
        np.asarray(keras.models.load_model(tmp_path / "plain.keras")(x)), np.asarray(plain(x))
    )


class Own(keras.layers.Layer):
    """A product of one's own that nobody has told of."""

    def build(self, shape):
        self.matrix = self.add_weight(shape=(shape[-1], 8), name="matrix")

    def call(self, x):
        return x @ self.matrix


class Told(Own):
    def get_prunable_weights(self):
        return [self.matrix]


class Scale(keras.layers.Layer):
    def build(self, shape):
        self.factor = self.add_weight(shape=(1, shape[-1]), initializer="ones", name="factor")

    def call(self, x):
        return x * self.factor


def around(layer):
    return keras.Sequential([keras.Input((5,)), L.Dense(8), layer, L.Dense(2)])


def test_a_layer_that_is_not_known_is_named():
    with pytest.raises(InputError, match=r"\(Own\) is not known.*get_prunable_weights"):
        tfvllm.prune_low_magnitude(around(Own()))
    with pytest.raises(InputError, match=r"\(Own\) is not known"):
        tfvllm.prune_low_magnitude(Own())
    assert len(find_states(tfvllm.prune_low_magnitude(around(Scale())))) == 2  # no product
    assert len(find_states(tfvllm.prune_low_magnitude(around(Told())))) == 3
    with pytest.warns(UserWarning, match="not known.*own"):
        pruning = tfvllm.callbacks.MagnitudePruning(around(Own()), half())
    assert len(pruning.state.targets) == 2 and len(pruning.dense) == 1


def test_subclassed_models_are_masked_in_place_even_when_only_their_layers_were_called():
    class Net(keras.Model):
        def __init__(self):
            super().__init__()
            self.first, self.second, self.spare = L.Dense(8), L.Dense(2), L.Dense(3)

        def call(self, x):
            return self.second(self.first(x))

    for call in (lambda net: net(VECTORS[:, 0]), lambda net: net.call(VECTORS[:, 0])):
        net = Net()
        with pytest.raises(InputError, match="not built"):
            tfvllm.callbacks.MagnitudePruning(net, half())
        call(net)
        pruning = tfvllm.callbacks.MagnitudePruning(net, half())
        assert len(pruning.state.targets) == 2  # the spare layer was never called
        net.compile("sgd", "mse")
        net.fit(VECTORS[:, 0], Y, verbose=0, callbacks=[pruning])
        assert pruning.sparsity == 0.5
        assert tfvllm.prune_low_magnitude(net, half()) is net
        assert tfvllm.strip_pruning(net) is net and not find_states(net)


def test_frozen_layers_stay_dense_and_are_named():
    frozen = RNG.normal(size=(5, 8)).astype("float32")

    def build():
        model = around(L.ReLU())
        model.layers[0].trainable = False
        model.layers[0].kernel.assign(frozen)
        return model

    model = build()
    with pytest.warns(UserWarning, match=r"frozen.*dense.*kernel"):
        pruning = tfvllm.callbacks.MagnitudePruning(model, half())
    with pytest.warns(UserWarning, match="frozen"):
        pruned = tfvllm.prune_low_magnitude(build(), half())
    for each, callback in ((model, pruning), (pruned, UpdatePruningStep())):
        each.compile("sgd", "mse")
        each.fit(VECTORS[:, 0], Y, verbose=0, callbacks=[callback])
        np.testing.assert_array_equal(np.asarray(each.layers[0].kernel), frozen)
        assert [np.mean(np.asarray(s.targets[0].variable) == 0) for s in callback.states] == [0.5]
    assert pruning.sparsity == 0.5
    assert [name.split("/")[-1] for name in pruning.dense] == ["kernel"]
    model.layers[0].trainable = True  # thawed for the second phase
    model.compile("sgd", "mse")
    model.fit(VECTORS[:, 0], Y, verbose=0, callbacks=[pruning])
    assert pruning.dense == [] and np.mean(np.asarray(model.layers[0].kernel) == 0) == 0.5
    model.trainable = False
    with pytest.raises(InputError, match="all 2 kernels are frozen"):
        tfvllm.callbacks.MagnitudePruning(model, half())
    with pytest.raises(InputError, match="all its kernels are frozen"):
        tfvllm.prune_low_magnitude(model)


@pytest.mark.thorough
def test_convolutional_lstm_cells_are_pruned():
    model = keras.Sequential([keras.Input((3, 6, 6, 2)), L.ConvLSTM2D(4, 3), L.Flatten(), L.Dense(2)])
    x = RNG.normal(size=(4, 3, 6, 6, 2)).astype("float32")
    model.compile("sgd", "mse")
    pruning = tfvllm.callbacks.MagnitudePruning(model, half())
    model.fit(x, Y, verbose=0, callbacks=[pruning])
    cell = model.layers[0].cell
    for kernel in (cell.kernel, cell.recurrent_kernel, model.layers[-1].kernel):
        assert np.mean(np.asarray(kernel) == 0) == 0.5
    every = [v for v in model.trainable_variables if len(v.shape) > 1]
    assert len(every) == 3 and pruning.sparsity == 0.5
