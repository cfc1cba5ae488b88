"""What a Distiller can be fed: pairs, dicts and tuples of strings, models that read strings themselves, datasets."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

import tfvllm
from tests.distillation.pairs import classifier
from tfvllm.distillation import compare, inputs
from tfvllm.errors import InputError

losses = tfvllm.losses
FIRST = ["the film was good", "a very BAD film", "很好", "not dull"]
SECOND = ["good", "bad", "bright film", "dull"]
Y = np.array([0, 1, 2, 0])


def kl(t, s):
    log_p, log_q = (tf.nn.log_softmax(z).numpy().astype("float64") for z in (t, s))
    return (np.exp(log_p) * (log_p - log_q)).sum(-1)


def distiller_of(teacher, student, **options):
    made = tfvllm.Distiller(teacher, student, losses={"logits": losses.ForwardKL()}, **options)
    made.compile("sgd", loss="sparse_categorical_crossentropy")
    made.run_eagerly = True  # tracing takes longer than all steps
    return made


def every_way(distiller, x, y, expected, predicted):
    """`evaluate`, `predict`, `fit` and the single batches take `x`, as it is and as a dataset."""
    teacher, student = distiller.teacher, distiller.student
    rows = tf.data.Dataset.from_tensor_slices((inputs.as_arrays(x), y)).batch(4)
    only_x = tf.data.Dataset.from_tensor_slices((inputs.as_arrays(x),)).batch(4)
    for told in ({"x": x, "y": y}, {"x": rows}, {"x": only_x}):
        logs = distiller.evaluate(**told, verbose=0, return_dict=True)
        assert logs["logits_loss"] == pytest.approx(expected.mean(), rel=1e-4)
    for told in (x, only_x):
        np.testing.assert_allclose(distiller.predict(told, verbose=0), predicted, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(distiller.predict_on_batch(x), predicted, rtol=1e-4, atol=1e-5)
    assert distiller.test_on_batch(x, y, return_dict=True)["logits_loss"] == pytest.approx(expected.mean(), rel=1e-4)
    found = compare(teacher, student, x, y, batch_size=3)
    np.testing.assert_allclose(found.divergences, expected, rtol=1e-3, atol=1e-6)
    before = student.get_weights()
    for told in ({"x": x, "y": y}, {"x": rows}, {"x": x}, {"x": x, "y": y, "validation_split": 0.25}):
        history = distiller.fit(**told, verbose=0).history
        assert np.isfinite(history["loss"]).all()
    assert np.isfinite(distiller.train_on_batch(x, y, return_dict=True)["loss"])
    assert any(np.abs(one - two).max() > 0 for one, two in zip(before, student.get_weights()))
    return found


@pytest.mark.thorough
@pytest.mark.parametrize("arrays", ["lists", pytest.param("arrays", marks=pytest.mark.slow)])
def test_sentence_pairs(duo, arrays):
    teacher, student = duo
    pair = (FIRST, SECOND) if arrays == "lists" else (np.array(FIRST), np.array(SECOND))
    rows = tf.data.Dataset.from_tensor_slices(((FIRST, SECOND),)).batch(4)
    x = next(
        iter(rows.map(lambda texts: student.preprocessor(texts, y=None)))
    )  # without y keras-hub takes two for (x, y)
    assert np.asarray(x["segment_ids"]).max() == 1  # both sentences are there
    found = every_way(distiller_of(*duo), pair, Y, kl(teacher(x), student(x)), student(x))
    assert found.worst[0].text == f"{FIRST[found.worst[0].index]} ||| {SECOND[found.worst[0].index]}"


@pytest.mark.thorough
def test_a_preprocessor_is_traced_once_until_it_changes(duo):
    student = duo[1]
    reader = inputs.Reader()
    read = [inputs.preprocess_batch(np.array(FIRST[:rows]), None, None, reader.of(student)) for rows in (1, 2, 3, 4)]
    assert reader.of(student) is reader.of(student)
    assert reader.of(student).experimental_get_tracing_count() <= 2  # one row count, then any
    for rows, (x, _, _) in enumerate(read, 1):
        np.testing.assert_array_equal(x["token_ids"], read[-1][0]["token_ids"][:rows])
    length = student.preprocessor.sequence_length
    student.preprocessor.sequence_length = 5
    shorter, _, _ = inputs.preprocess_batch(np.array(FIRST), None, None, reader.of(student))
    assert shorter["token_ids"].shape == (4, 5) and read[-1][0]["token_ids"].shape == (4, length)
    student.preprocessor = None
    with pytest.raises(InputError, match="has no preprocessor"):
        reader.of(student)


def reads_strings(seed, inputs=1):
    vectorize = layers.TextVectorization(vocabulary=["film", "good", "bad", "dull"], output_mode="multi_hot")
    read = [keras.Input((), dtype="string", name=f"text{i}") for i in range(inputs)]
    hidden = [vectorize(text) for text in read]
    hidden = layers.Concatenate()(hidden) if inputs > 1 else hidden[0]
    head = layers.Dense(3, kernel_initializer=keras.initializers.RandomNormal(stddev=1.0, seed=seed))
    return keras.Model(read if inputs > 1 else read[0], head(hidden))


class Subclassed(keras.Model):
    def __init__(self, seed):
        super().__init__()
        self.lookup = layers.StringLookup(vocabulary=FIRST, output_mode="one_hot")
        self.head = layers.Dense(3, kernel_initializer=keras.initializers.RandomNormal(stddev=1.0, seed=seed))

    def call(self, texts):
        return self.head(self.lookup(texts))


def test_models_that_read_strings_themselves():
    teacher, student = reads_strings(0), reads_strings(1)
    texts = tf.constant(FIRST)
    found = every_way(distiller_of(teacher, student), FIRST, Y, kl(teacher(texts), student(texts)), student(texts))
    assert found.worst[0].text in FIRST


@pytest.mark.thorough
def test_two_strings_as_a_tuple_a_dict_or_a_list():
    teacher, student = reads_strings(0, inputs=2), reads_strings(1, inputs=2)
    texts = [tf.constant(FIRST), tf.constant(SECOND)]
    expected, predicted = kl(teacher(texts), student(texts)), student(texts).numpy()
    for x in ((FIRST, SECOND), {"text0": FIRST, "text1": SECOND}, [np.array(FIRST), np.array(SECOND)]):
        distiller = distiller_of(teacher, student)
        distiller.optimizer.learning_rate = 0.0
        logs = distiller.evaluate(x, Y, verbose=0, return_dict=True)
        assert logs["logits_loss"] == pytest.approx(expected.mean(), rel=1e-4)
        np.testing.assert_allclose(distiller.predict(x, verbose=0), predicted, rtol=1e-5)
        np.testing.assert_allclose(compare(teacher, student, x).divergences, expected, rtol=1e-3, atol=1e-6)
        distiller.fit(x, Y, verbose=0)


def test_an_unbuilt_student_that_reads_strings():
    teacher, student = Subclassed(0), Subclassed(1)
    teacher(tf.constant(FIRST))
    assert not student.built
    distiller = distiller_of(teacher, student)
    history = distiller.fit(FIRST, Y, verbose=0).history  # not "frozen": it has no variables yet
    assert np.isfinite(history["loss"]).all() and len(student.trainable_variables) == 2
    texts = tf.constant(FIRST)
    logs = distiller.evaluate(FIRST, Y, verbose=0, return_dict=True)
    assert logs["logits_loss"] == pytest.approx(kl(teacher(texts), student(texts)).mean(), rel=1e-4)
    student.trainable = False
    with pytest.raises(InputError, match=r"is frozen"):
        distiller.fit(FIRST, Y, verbose=0)


def test_a_tuple_of_numbers_is_two_inputs():
    def model(seed):
        one, two = keras.Input((2,)), keras.Input((3,))
        head = layers.Dense(3, kernel_initializer=keras.initializers.RandomNormal(stddev=1.0, seed=seed))
        return keras.Model([one, two], head(layers.Concatenate()([one, two])))

    teacher, student = model(0), model(1)
    rng = np.random.default_rng(0)
    x = rng.normal(size=(4, 2)).astype("float32"), rng.normal(size=(4, 3)).astype("float32")
    expected = kl(teacher(list(x)), student(list(x)))
    np.testing.assert_allclose(compare(teacher, student, x, Y).divergences, expected, rtol=1e-3, atol=1e-6)
    logs = distiller_of(teacher, student).evaluate(x, Y, verbose=0, return_dict=True)
    assert logs["logits_loss"] == pytest.approx(expected.mean(), rel=1e-4)


@pytest.mark.slow
def test_rounds_on_pairs(duo):
    distiller = distiller_of(*duo)
    rounds = tfvllm.distillation.iterate(distiller, ((FIRST, SECOND), Y), ((FIRST, SECOND), Y), rounds=2, verbose=0)
    assert len(rounds.rounds) >= 2 and len(rounds.rounds[0].dev.divergences) == 4


def test_a_cache_of_a_teacher_that_reads_strings(tmp_path):
    teacher, student = reads_strings(0), reads_strings(1)
    data = tf.data.Dataset.from_tensor_slices((FIRST, Y)).batch(2)
    cache = tfvllm.distillation.write_teacher_cache(teacher, data, tmp_path / "cache", top_k=None)
    distiller = distiller_of(cache, student)
    logs = distiller.evaluate(cache.join(data), verbose=0, return_dict=True)
    texts = tf.constant(FIRST)
    assert logs["logits_loss"] == pytest.approx(kl(teacher(texts), student(texts)).mean(), rel=1e-4)


def test_what_is_refused(duo):
    bare = classifier(1, width=8, preprocessor=False)
    with pytest.raises(InputError, match=r"has no preprocessor and reads numbers"):
        compare(bare, bare, FIRST)
    distiller = tfvllm.Distiller(duo[0], reads_strings(0))
    distiller.compile()
    with pytest.raises(
        InputError, match=r"reads raw strings itself, but the teacher .* reads what a preprocessor makes"
    ):
        distiller.fit(FIRST, Y, verbose=0)


@pytest.mark.parametrize(
    ("x", "strings", "count"),
    [
        (["a", "b", "c"], True, 3),
        (("a", "b", "c"), True, 3),
        ((["a", "b", "c"], ["d", "e", "f"]), True, 3),
        ({"one": ["a", "b"], "two": np.array([1, 2])}, True, 2),
        ((np.array([1, 2]), np.array(["a", "b"])), True, 2),
        ([np.array(["a", "b"]), np.array(["c", "d"])], True, 2),
        ([["a", "b"], ["c", "d"], ["e", "f"]], True, 3),
        ([[1, 2], [3, 4], [5, 6]], False, 3),
        ([np.zeros([4, 2]), np.zeros([4, 3])], False, 4),
        (np.zeros([5, 2]), False, 5),
    ],
)
def test_examples_and_structure(x, strings, count):
    assert inputs.has_strings(x) is strings
    assert inputs.rows_of(x) == count


@pytest.mark.parametrize(
    ("name", "instead"),
    [
        ("student_loss_fn", r"compile\(loss=...\)"),
        ("distillation_loss_fn", r"losses=\{'logits': tfvllm.losses.ForwardKL\(temperature=...\)\}"),
        ("alpha", r"task_weight=alpha, loss_weights=\{'logits': 1 - alpha\}"),
        ("temperature", "ForwardKL"),
    ],
)
def test_the_arguments_of_other_distillers(name, instead):
    distiller = tfvllm.Distiller(reads_strings(0), reads_strings(1))
    with pytest.raises(InputError, match=f"compile has no argument {name}: .*{instead}"):
        distiller.compile("adam", **{name: 0.1})
    with pytest.raises(InputError, match=f"Distiller has no argument {name}"):
        tfvllm.Distiller(reads_strings(0), reads_strings(1), **{name: 0.1})
