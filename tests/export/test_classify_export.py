"""Classifiers as SavedModels: the scores are the model's own, whatever the batch, the family, the head."""

import keras
import keras_nlp
import numpy as np
import pytest
import tensorflow as tf

import tfvllm
from tests import tiny_models
from tests.tiny_models import TEXTS, keras_scores
from tfvllm.errors import InputError, VerificationError
from tfvllm.savedmodel import manifest, parity, protos, warmup
from tfvllm.serving.lint import lint
from tfvllm.serving.servable import Servable


@pytest.fixture(scope="module")
def classifier():
    model = tiny_models.bert_classifier(num_classes=3)
    tiny_models.randomise(model, seed=3, scale=0.3)
    return model


@pytest.fixture(scope="module")
def exported(classifier, tmp_path_factory):
    path = tmp_path_factory.mktemp("classify") / "1"
    return tfvllm.export(classifier, path, "classify", labels=["bad", "so-so", "good"])


@pytest.fixture(scope="module")
def servable(exported):
    opened = Servable(exported)
    yield opened
    opened.close()


def strings(texts):
    return np.array([text if isinstance(text, bytes) else text.encode() for text in texts], object)


def test_scores_are_the_models_own(classifier, servable):
    outputs = servable.run("serving_default", {"text": strings(TEXTS)})
    expected = keras_scores(classifier, TEXTS)
    assert outputs["scores"].dtype == np.float32
    np.testing.assert_allclose(outputs["scores"], expected, atol=1e-5)
    np.testing.assert_allclose(outputs["scores"].sum(axis=1), 1, atol=1e-6)
    assert outputs["classes"].tolist() == [[b"bad", b"so-so", b"good"]] * len(TEXTS)
    assert np.ptp(expected, axis=0).max() > 0.1  # otherwise the comparison would say nothing


@pytest.mark.parametrize("text", TEXTS)
def test_a_row_alone_scores_as_in_company(servable, text):
    alone = servable.run("serving_default", {"text": strings([text])})["scores"]
    together = servable.run("serving_default", {"text": strings([*TEXTS, text])})["scores"][-1:]
    np.testing.assert_allclose(alone, together, atol=1e-5)


def test_odd_inputs(servable):
    odd = [b"\xff\xfe not UTF-8", b"\x00", " \n\t ", "[SEP] [PAD] [CLS]", "x" * 5000, "好" * 500, "🙂"]
    outputs = servable.run("serving_default", {"text": strings(odd)})
    assert np.isfinite(outputs["scores"]).all()
    assert outputs["scores"].shape == (len(odd), 3)


def test_empty_batch(servable):
    outputs = servable.run("serving_default", {"text": np.empty(0, object)})
    assert outputs["scores"].shape == (0, 3)
    assert outputs["classes"].shape == (0, 3)


def test_classify_signature_reads_examples(classifier, servable):
    from tfvllm.export.classify import example_of

    outputs = servable.run("classify", {"inputs": strings([example_of(text) for text in TEXTS])})
    np.testing.assert_allclose(outputs["scores"], keras_scores(classifier, TEXTS), atol=1e-5)
    assert servable.signatures["classify"].method == "tensorflow/serving/classify"
    assert servable.signatures["serving_default"].method == "tensorflow/serving/predict"


def test_short_texts_make_short_tensors(classifier):
    from tfvllm.export.text import TextFeatures

    features = TextFeatures(classifier, classifier.preprocessor)
    short = features.dynamic(tf.constant(["not good", "dull"]))
    assert short["token_ids"].shape == (2, 4)  # [CLS] not good [SEP]
    assert features.dynamic(tf.constant(["not good"]), multiple=8)["token_ids"].shape == (1, 8)
    assert features.dynamic(tf.constant(["good " * 100]))["token_ids"].shape == (1, 48)
    assert features.dynamic(tf.constant([""]))["padding_mask"].numpy().tolist() == [[True, True]]
    fixed, own = features.fixed(tf.constant(TEXTS)), features.own(tf.constant(TEXTS))
    for key in own:
        np.testing.assert_array_equal(fixed[key], own[key])


def test_nothing_but_tensorflow_is_needed(exported, classifier):
    outputs = parity.run_fresh(exported, [("serving_default", {"text": strings(TEXTS)})])[0]
    np.testing.assert_allclose(outputs["scores"], keras_scores(classifier, TEXTS), atol=1e-5)


def test_weights_are_variables_and_the_graph_is_small(exported, classifier):
    constants = [
        node.attr["value"].tensor.ByteSize()
        for function in protos.read_proto(exported).meta_graphs[0].graph_def.library.function
        for node in function.node_def
        if node.op == "Const" and node.attr["dtype"].type == tf.float32.as_datatype_enum
    ]
    assert max(constants) < 1000
    names = [name for name, _ in tf.train.list_variables(str(exported / "variables" / "variables"))]
    assert len([name for name in names if name.startswith("weights/")]) == len(classifier.variables)


def test_manifest(exported):
    document = manifest.read(exported)
    assert document["task"] == "classify"
    assert document["labels"] == ["bad", "so-so", "good"]
    assert document["padding"]["to"] == "longest"
    assert document["padding"]["error"] < 1e-5
    assert document["measured_error"]["max_abs_error"] < 1e-5
    assert document["versions"]["tensorflow"] == tf.__version__
    assert document["source"]["class"] == "BertTextClassifier"
    assert document["signatures"]["serving_default"]["inputs"] == {"text": {"dtype": "string", "shape": [None]}}
    assert document["warmup"] == {"records": 7, "replayed": 7}


@pytest.mark.thorough
@pytest.mark.parametrize("activation", ["softmax", pytest.param("sigmoid", marks=pytest.mark.slow)])
def test_activation_in_the_model_is_not_applied_twice(tmp_path, activation):
    model = tiny_models.bert_classifier(activation=activation, seed=2)
    path = tfvllm.export(model, tmp_path / "1", "classify", warmup=False)
    outputs = parity.run_here(path, [("serving_default", {"text": strings(TEXTS)})])[0]
    np.testing.assert_allclose(outputs["scores"], keras_scores(model, TEXTS, softmax=False), atol=1e-5)


@pytest.mark.thorough
def test_max_length(tmp_path, classifier):
    path = tfvllm.export(classifier, tmp_path / "1", "classify", max_length=8, pad_to_multiple=4, warmup=False)
    assert classifier.preprocessor.sequence_length == 48  # as before
    outputs = parity.run_here(path, [("serving_default", {"text": strings(TEXTS)})])[0]
    classifier.preprocessor.sequence_length = 8
    expected = keras_scores(classifier, TEXTS)
    classifier.preprocessor.sequence_length = 48
    np.testing.assert_allclose(outputs["scores"], expected, atol=1e-5)


@pytest.mark.thorough
def test_fnet_keeps_its_fixed_length(tmp_path):
    """FNet mixes padding into every position: the export must notice, and stay equal to the model."""
    proto = tmp_path / "unigram.model"
    _sentencepiece(proto)
    tokenizer = keras_nlp.models.FNetTokenizer(str(proto))
    preprocessor = keras_nlp.models.FNetTextClassifierPreprocessor(tokenizer, sequence_length=12)
    backbone = keras_nlp.models.FNetBackbone(
        vocabulary_size=tokenizer.vocabulary_size(),
        num_layers=1,
        hidden_dim=8,
        intermediate_dim=8,
        max_sequence_length=12,
    )
    model = keras_nlp.models.FNetTextClassifier(backbone=backbone, num_classes=2, preprocessor=preprocessor)
    tiny_models.randomise(model)
    path = tfvllm.export(model, tmp_path / "1", "classify")
    document = manifest.read(path)
    assert document["padding"]["to"] == "max_length"
    assert "depend on the padded length" in document["padding"]["reason"]
    outputs = parity.run_here(path, [("serving_default", {"text": strings(TEXTS)})])[0]
    np.testing.assert_allclose(outputs["scores"], keras_scores(model, TEXTS), atol=1e-5)


def _sentencepiece(path):
    sentencepiece = pytest.importorskip("sentencepiece")
    text = path.with_suffix(".txt")
    text.write_text("\n".join(["the film is fine", "not good", "very dull", "bad and good", "moving film"] * 20))
    sentencepiece.SentencePieceTrainer.train(
        input=str(text),
        model_prefix=str(path.with_suffix("")),
        vocab_size=26,
        model_type="unigram",
        pad_id=0,
        unk_id=1,
        bos_id=4,
        eos_id=5,
        pad_piece="<pad>",
        unk_piece="<unk>",
        bos_piece="[CLS]",
        eos_piece="[SEP]",
        user_defined_symbols="[MASK]",
    )


@pytest.mark.thorough
@pytest.mark.parametrize(
    "letters", ["all bytes", pytest.param("abcdefghijklmnopqrstuvwxyzĠ", marks=pytest.mark.slow, id="some")]
)
def test_byte_pair_tokens_come_from_static_tables(tmp_path, letters):
    """RoBERTa: keras-nlp's tokenizer keeps every word it meets in a mutable table; the export's must keep nothing."""
    from keras_hub.src.tokenizers.byte_pair_tokenizer import bytes_to_unicode

    letters = bytes_to_unicode()[1] if letters == "all bytes" else list(letters)
    merges = ["g o", "o d", "go od", "Ġ good", "n o", "no t", "Ġ not"]
    pieces = ["<s>", "<pad>", "</s>", "<unk>", "<mask>", *letters, *(merge.replace(" ", "") for merge in merges)]
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    tokenizer = keras_nlp.models.RobertaTokenizer(vocabulary=vocabulary, merges=merges)
    preprocessor = keras_nlp.models.RobertaTextClassifierPreprocessor(tokenizer, sequence_length=16)
    backbone = keras_nlp.models.RobertaBackbone(
        vocabulary_size=len(vocabulary),
        num_layers=1,
        num_heads=2,
        hidden_dim=8,
        intermediate_dim=8,
        max_sequence_length=16,
    )
    model = keras_nlp.models.RobertaTextClassifier(backbone=backbone, num_classes=2, preprocessor=preprocessor)
    tiny_models.randomise(model)
    path = tfvllm.export(model, tmp_path / "1", "classify")
    texts = ["good not good", "not", "abc xyz", "", "</s> good", "très 好"]
    expected = tf.nn.softmax(model(preprocessor(texts), training=False)).numpy()  # in plain Python, by another library
    assert np.ptp(expected[:, 0]) > 0.01
    servable = Servable(path)
    for _ in range(2):
        outputs = servable.run("serving_default", {"text": strings(texts)})
        np.testing.assert_allclose(outputs["scores"], expected, atol=1e-5)
    servable.close()
    assert manifest.read(path)["padding"]["to"] == "longest"
    graph = protos.read_proto(path).meta_graphs[0].graph_def
    used = {node.op for nodes in (graph.node, *(f.node_def for f in graph.library.function)) for node in nodes}
    assert "HashTableV2" in used and not any("MutableHashTable" in op or "TableInsert" in op for op in used)
    assert lint(path, run=False).findings == []


# --- models without a preprocessor -----------------------------------------------------------------------------------


def test_plain_model_exports_with_its_own_inputs(tmp_path):
    image = keras.Input((4, 4, 1), name="image")
    size = keras.Input((1,), dtype="int32", name="size")
    hidden = keras.layers.Flatten()(keras.layers.Conv2D(2, 2)(image))
    joined = keras.layers.Concatenate()([hidden, keras.ops.cast(size, "float32")])
    model = keras.Model({"image": image, "size": size}, keras.layers.Dense(3)(joined))
    path = tfvllm.export(model, tmp_path / "1", "classify", labels=["a", "b", "c"])
    inputs = {"image": np.random.rand(2, 4, 4, 1).astype(np.float32), "size": np.array([[1], [7]], np.int32)}
    outputs = parity.run_here(path, [("serving_default", inputs)])[0]
    np.testing.assert_allclose(outputs["scores"], tf.nn.softmax(model(inputs)), atol=1e-5)
    example = tf.train.Example()
    example.features.feature["image"].float_list.value.extend(inputs["image"][1].ravel())
    example.features.feature["size"].int64_list.value.append(7)
    classified = parity.run_here(path, [("classify", {"inputs": strings([example.SerializeToString()])})])[0]
    np.testing.assert_allclose(classified["scores"], outputs["scores"][1:], atol=1e-6)


def test_one_column_becomes_two_classes(tmp_path):
    for activation, to_probability in ((None, tf.sigmoid), ("sigmoid", tf.identity)):
        model = keras.Sequential([keras.Input((4,), name="x"), keras.layers.Dense(1, activation=activation)])
        path = tfvllm.export(model, tmp_path / str(activation), "classify", labels=["no", "yes"])
        x = np.random.rand(3, 4).astype(np.float32)
        outputs = parity.run_here(path, [("serving_default", {"x": x})])[0]
        yes = to_probability(model(x)).numpy()
        np.testing.assert_allclose(outputs["scores"], np.concatenate([1 - yes, yes], axis=1), atol=1e-6)


def test_text_vectorization_keeps_its_table(tmp_path):
    layer = keras.layers.TextVectorization(vocabulary=["good", "bad", "film"], output_mode="multi_hot")
    model = keras.Sequential([keras.Input((), dtype="string", name="text"), layer, keras.layers.Dense(2)])
    path = tfvllm.export(model, tmp_path / "1", "classify", labels=["n", "p"])
    texts = ["good film", "bad bad", ""]
    outputs = parity.run_here(path, [("serving_default", {"text": strings(texts)})])[0]
    np.testing.assert_allclose(outputs["scores"], tf.nn.softmax(model(tf.constant(texts))), atol=1e-5)


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"labels": ["a"]}, "has 3 classes, but labels has 1"),
        ({"labels": "abc"}, "must be a list of strings"),
        ({"max_length": 0}, "at least 1"),
        ({"max_length": 49}, "has positions for 48 tokens"),
        ({"max_length": 2}, "2 tokens of it are special"),
        ({"precision": "bfloat16"}, "tfvllm simplify SRC DST --precision bfloat16"),
        ({"precision": "float64"}, "precision must be one of"),
        ({"pad_to_multipel": 8}, "Did you mean 'pad_to_multiple'"),
        ({"check": "maybe"}, "check must be"),
    ],
)
def test_wrong_calls(tmp_path, classifier, options, words):
    with pytest.raises(InputError, match=words):
        tfvllm.export(classifier, tmp_path / "1", "classify", **options)
    assert not list(tmp_path.iterdir())  # nothing was left behind


def test_wrong_models(tmp_path):
    two = keras.Input((2,))
    with pytest.raises(InputError, match="needs a model with one output"):
        tfvllm.export(keras.Model(two, [two, two]), tmp_path / "1", "classify")
    with pytest.raises(InputError, match="task must be one of"):
        tfvllm.export(keras.Model(two, two), tmp_path / "1", "clasify")
    with pytest.raises(InputError, match="needs a model with a preprocessor"):
        tfvllm.export(keras.Model(two, two), tmp_path / "1", "classify", max_length=4)


def test_existing_path_is_refused_and_kept(tmp_path, classifier):
    (tmp_path / "1").mkdir()
    (tmp_path / "1" / "mine").write_text("keep")
    with pytest.raises(InputError, match="already exists"):
        tfvllm.export(classifier, tmp_path / "1", "classify")
    assert (tmp_path / "1" / "mine").read_text() == "keep"


def test_parity_check_catches_a_wrong_export(exported):
    run, inputs = parity.loaded_here(exported), {"text": strings(TEXTS[:2])}
    check = {"signature": "serving_default", "inputs": inputs, "run": run}
    right = run([("serving_default", inputs)])[0]
    assert parity.check(exported, **check, expected={"scores": right["scores"]})["max_abs_error"] == 0
    wrong = right["scores"] + 1e-3
    with pytest.raises(VerificationError, match=r"differs from the model by 0\.001"):
        parity.check(exported, **check, expected={"scores": wrong})
    with pytest.raises(VerificationError, match="has shape"):
        parity.check(exported, **check, expected={"scores": wrong[:1]})
    with pytest.raises(VerificationError, match="gives no 'logits'"):
        parity.check(exported, **check, expected={"logits": wrong})
    with pytest.raises(VerificationError, match="differs from the model's own answer"):
        parity.check(exported, **check, expected={"classes": right["classes"][:, ::-1]})


# --- warm-up ---------------------------------------------------------------------------------------------------------


def test_warmup_requests_are_real_prediction_logs(exported, classifier):
    prediction_log_pb2 = pytest.importorskip("tensorflow_serving.apis.prediction_log_pb2")
    records = [
        prediction_log_pb2.PredictionLog.FromString(record.numpy())
        for record in tf.data.TFRecordDataset(str(warmup.path(exported)))
    ]
    kinds = [record.WhichOneof("log_type") for record in records]
    assert kinds == ["predict_log"] * 5 + ["classify_log"] * 2
    request = records[3].predict_log.request
    assert request.model_spec.signature_name == "serving_default"
    assert tf.make_ndarray(request.inputs["text"]).shape == (4,)
    examples = records[6].classify_log.request.input.example_list.examples
    assert len(examples) == 4
    assert examples[0].features.feature["text"].bytes_list.value[0] == b"a fine and moving film"
    assert [name for name, _ in warmup.read(exported)] == ["serving_default"] * 5 + ["classify"] * 2


def test_warmup_that_does_not_run_is_told(tmp_path):
    from tfvllm.errors import TfvllmError

    (tmp_path / "1").mkdir()
    tiny_models.save_many(tmp_path / "1")
    with pytest.raises(TfvllmError, match="a warm-up request does not run"):
        warmup.write(tmp_path / "1", [{"signature_name": "picky", "inputs": {"x": np.array([-1], np.float32)}}])
    warmup.path(tmp_path / "1").write_bytes(b"no TFRecord at all")
    with pytest.raises(TfvllmError, match="is no TFRecord of PredictionLog"):
        warmup.read(tmp_path / "1")
