"""Encoders as SavedModels, family by family: what is served is what keras-nlp answers, however texts are batched."""

import keras
import keras_nlp
import numpy as np
import pytest
import tensorflow as tf

import tfvllm
from tests import encoders
from tests.encoders import TEXTS
from tfvllm.errors import InputError
from tfvllm.export.text import as_bytes
from tfvllm.savedmodel import manifest, parity

PAIR = [*TEXTS[3:], *TEXTS[:3]]


def asked(*texts):
    """Requests for all rows at once, then each alone, then for no row."""
    names = ("text", "text_pair")[: len(texts)]
    rows = [as_bytes(each) for each in texts]
    picked = [slice(None), *(slice(i, i + 1) for i in range(len(rows[0]))), slice(0)]
    return [("serving_default", dict(zip(names, [each[chosen] for each in rows], strict=True))) for chosen in picked]


def agree(answers, expected, key, atol=1e-5):
    """Holds the answers to `asked` against `expected`."""
    together, *alone, none = (answer[key] for answer in answers)
    assert np.ptp(expected, axis=0).max() > 0.05  # otherwise the comparison would say nothing
    np.testing.assert_allclose(together, expected, atol=atol)
    np.testing.assert_allclose(np.concatenate(alone), expected, atol=atol)
    assert none.shape == (0, expected.shape[1])


def served(path, *texts):
    return parity.run_here(path, asked(*texts))


@pytest.mark.slow  # minutes; tests/matrix has a cell of each family
def test_every_family_in_a_process_that_knows_only_tensorflow(tmp_path):
    jobs, expected = [], []
    for family in encoders.FAMILIES:
        if family in encoders.CLASSIFIERS:
            model = encoders.classifier(family)
            jobs.append(tfvllm.export(model, tmp_path / family / "classify", "classify", check=None, warmup=False))
            expected.append(("scores", encoders.scores(model, TEXTS)))
        model, made = encoders.backbone(family), encoders.preprocessor(family)
        jobs.append(
            tfvllm.export(model, tmp_path / family / "embed", "embed", preprocessor=made, check=None, warmup=False)
        )
        expected.append(("embeddings", encoders.embeddings(model, made, TEXTS)))
    answers = parity.run_fresh_each([(path, asked(TEXTS)) for path in jobs])
    for path, answer, (key, value) in zip(jobs, answers, expected, strict=True):
        agree(answer, value, key)
        padding = manifest.read(path)["padding"]
        assert padding["to"] == ("max_length" if path.parent.name in encoders.FIXED_LENGTH else "longest"), path


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", encoders.FAMILIES)
def test_every_family_simplified(tmp_path, family, precision):
    model, made = encoders.backbone(family), encoders.preprocessor(family)
    path = tfvllm.export(model, tmp_path / "1", "embed", preprocessor=made, check=None, warmup=False)
    tfvllm.simplify_saved_model(path, tmp_path / "2", target="onednn", precision=precision)
    atol = 1e-4 if precision == "float32" else 0.1
    agree(served(tmp_path / "2", TEXTS), encoders.embeddings(model, made, TEXTS), "embeddings", atol)


# --- DeBERTa's relative positions -------------------------------------------------------------------------------------


def far_apart(model):
    """Two rows as long as `model` takes."""
    length = model.max_sequence_length
    ids = np.arange(2 * length, dtype=np.int32).reshape(2, length) % 37 + 1
    return {"token_ids": ids, "padding_mask": np.ones_like(ids)}


def traced(model, length=None):
    spec = tf.TensorSpec([None, length], tf.int32)
    call = tf.function(lambda token_ids, padding_mask: model({"token_ids": token_ids, "padding_mask": padding_mask}))
    return call.get_concrete_function(spec, spec)


@pytest.mark.thorough
def test_the_ends_of_the_longest_text_are_as_far_apart_as_in_keras(tmp_path):
    model = encoders.backbone("deberta_v3")
    inputs = far_apart(model)
    own = np.asarray(model(inputs))
    found = traced(model)(*map(tf.constant, inputs.values())).numpy()
    if np.abs(found - own).max() < 1e-4:
        pytest.skip("this CPU's logarithms round alike inside of a graph")
    embedded = tfvllm.export(model, tmp_path / "1", "embed", pooling="first", normalize=False, warmup=False)
    answers = parity.run_here(embedded, [("serving_default", inputs)])[0]["embeddings"]
    np.testing.assert_allclose(answers, own[:, 0], atol=1e-4)
    assert np.abs(found - own)[:, 0].max() > 1e-3
    assert "notes" not in manifest.read(embedded)


def test_positions_of_texts_longer_than_the_table():
    from tfvllm.families.relative_positions import exact_positions

    model = encoders.backbone("deberta_v3", length=24)
    layer = model.get_layer("disentangled_attention_encoder_layer_0")._self_attention_layer
    with exact_positions(model):
        found = tf.function(lambda n: layer._get_rel_pos(n)).get_concrete_function(tf.TensorSpec([], tf.int32))
    for length in (1, 7, 24, 60):
        np.testing.assert_array_equal(found(tf.constant(length)), layer._get_rel_pos(length))
    assert "_get_rel_pos" not in vars(layer)  # as before


@pytest.mark.slow
def test_deberta_pads_to_the_longest(tmp_path):
    model = encoders.classifier("deberta_v3")
    path = tfvllm.export(model, tmp_path / "1", "classify", warmup=False)
    assert manifest.read(path)["padding"]["to"] == "longest"
    agree(served(path, TEXTS), encoders.scores(model, TEXTS), "scores")


@pytest.mark.slow
def test_fnet_embeds_at_its_one_length(tmp_path):
    model, made = encoders.backbone("f_net"), encoders.preprocessor("f_net")
    path = tfvllm.export(model, tmp_path / "1", "embed", preprocessor=made, warmup=False)
    assert manifest.read(path)["padding"]["to"] == "max_length"
    agree(served(path, TEXTS), encoders.embeddings(model, made, TEXTS), "embeddings")


# --- types in which a model computes ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "dtype",
    [
        pytest.param("mixed_bfloat16", marks=pytest.mark.thorough),
        *(pytest.param(dtype, marks=pytest.mark.slow) for dtype in ("mixed_float16", "bfloat16")),
    ],
)
def test_coarser_types_are_not_refused_nor_padded_to_full_length(tmp_path, dtype):
    model = encoders.classifier("bert", dtype=dtype)
    path = tfvllm.export(model, tmp_path / "1", "classify", warmup=False)
    document = manifest.read(path)
    step = 2.0**-10 if "float16" in dtype.replace("bfloat16", "") else 2.0**-7
    assert document["padding"]["to"] == "longest"
    assert document["measured_error"]["atol"] == 4 * step
    agree(served(path, TEXTS), encoders.scores(model, TEXTS), "scores", 4 * step)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["mixed_bfloat16", "mixed_float16", "bfloat16"])
def test_coarser_embedders(tmp_path, dtype):
    model, made = encoders.backbone("bert", dtype=dtype), encoders.preprocessor("bert")
    path = tfvllm.export(model, tmp_path / "1", "embed", preprocessor=made, warmup=False)
    assert manifest.read(path)["padding"]["to"] == "longest"
    agree(served(path, TEXTS), encoders.embeddings(model, made, TEXTS), "embeddings", 2.0**-5)


# --- pairs of texts ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "truncate"),
    [
        pytest.param("bert", "round_robin", marks=pytest.mark.thorough),
        pytest.param("roberta", "waterfall", marks=pytest.mark.slow),
        pytest.param("deberta_v3", "waterfall", marks=pytest.mark.slow),
        pytest.param("roformer_v2", "round_robin", marks=pytest.mark.slow),
    ],
)
def test_pairs_are_packed_as_the_preprocessor_packs_them(tmp_path, family, truncate):
    from tfvllm.export.classify import example_of

    model = encoders.classifier(family)
    model.preprocessor.truncate = truncate
    model.preprocessor.build(None)
    path = tfvllm.export(model, tmp_path / "1", "classify", texts=2)
    document = manifest.read(path)
    assert document["texts"] == 2
    assert sorted(document["signatures"]["serving_default"]["inputs"]) == ["text", "text_pair"]
    expected = encoders.scores(model, TEXTS, PAIR)
    agree(served(path, TEXTS, PAIR), expected, "scores")
    assert np.abs(expected - encoders.scores(model, TEXTS)).max() > 0.05  # the second text counts
    examples = np.array([example_of(*both) for both in zip(TEXTS, PAIR, strict=True)], object)
    found = parity.run_here(path, [("classify", {"inputs": examples})])[0]["scores"]
    np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("texts", [0, 3, True, "2"])
def test_other_numbers_of_texts_are_refused(tmp_path, texts):
    with pytest.raises(InputError, match="texts must be 1, or 2"):
        tfvllm.export(encoders.classifier("bert"), tmp_path / "1", "classify", texts=texts)


# --- models of one's own ----------------------------------------------------------------------------------------------


class Mine(keras.Model):
    """A subclassed classifier: Keras knows neither its inputs nor its outputs."""

    def __init__(self, activation=None):
        super().__init__()
        self.dense = keras.layers.Dense(3, activation=activation)

    def call(self, x):
        return self.dense(x)


def test_a_subclassed_model_can_be_wrapped_as_the_message_says(tmp_path):
    for called in (False, True):
        mine = Mine()
        if called:
            mine(np.zeros((1, 4), np.float32))
        with pytest.raises(InputError, match=r"Mine has no known outputs.*x = keras.Input\(shape, dtype=...\)"):
            tfvllm.export(mine, tmp_path / "1", "classify")
    x = keras.Input((4,))
    for wrapped in (keras.Model(x, Mine()(x)), keras.Sequential([x, Mine()])):
        points = np.random.default_rng(0).normal(size=(3, 4)).astype(np.float32)
        path = tfvllm.export(wrapped, tmp_path / "1", "classify", from_logits=True, overwrite=True)
        name = next(iter(manifest.read(path)["signatures"]["serving_default"]["inputs"]))
        found = parity.run_here(path, [("serving_default", {name: points})])[0]["scores"]
        np.testing.assert_allclose(found, tf.nn.softmax(wrapped(points)), atol=1e-6)


# --- embeddings as their maker pools ----------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["cls", "max"])
def test_a_text_embedder_answers_as_in_keras(tmp_path, mode):
    made = keras_nlp.models.BertTextEmbedderPreprocessor(encoders.tokenizer("bert"), sequence_length=encoders.LENGTH)
    model = keras_nlp.models.BertTextEmbedder(encoders.backbone("bert"), made, pooling_mode=mode, normalize=False)
    path = tfvllm.export(model, tmp_path / "1", "embed", warmup=False)
    assert (manifest.read(path)["pooling"], manifest.read(path)["normalized"]) == (mode, False)
    agree(served(path, TEXTS), np.asarray(model(encoders.features(made, TEXTS))), "embeddings", 1e-4)
