"""Every form of TF Serving's gRPC API, asked with the real `tensorflow-serving-api` client."""

import grpc
import numpy as np
import pytest
import tensorflow as tf
from google.protobuf import text_format
from tensorflow_serving.apis import (
    classification_pb2,
    get_model_metadata_pb2,
    get_model_status_pb2,
    inference_pb2,
    model_management_pb2,
    model_service_pb2_grpc,
    predict_pb2,
    prediction_service_pb2_grpc,
    regression_pb2,
)

from tests import tiny_models

CLASSIFY, REGRESS = "tensorflow/serving/classify", "tensorflow/serving/regress"


@pytest.fixture(scope="module")
def channel(server):
    with grpc.insecure_channel(f"127.0.0.1:{server.grpc_port}") as opened:
        yield opened


@pytest.fixture
def stub(channel):
    return prediction_service_pb2_grpc.PredictionServiceStub(channel)


@pytest.fixture
def models(channel):
    return model_service_pb2_grpc.ModelServiceStub(channel)


def predict_request(name="many", signature="", version=None, label=None, **inputs):
    request = predict_pb2.PredictRequest()
    request.model_spec.name = name
    request.model_spec.signature_name = signature
    if version is not None:
        request.model_spec.version.value = version
    if label is not None:
        request.model_spec.version_label = label
    for key, value in inputs.items():
        request.inputs[key].CopyFrom(tf.make_tensor_proto(value))
    return request


def add_examples(request, rows, context=None):
    listed = request.input.example_list if context is None else request.input.example_list_with_context
    if context is not None:
        listed.context.features.feature["x"].float_list.value.extend(context)
    for row in rows:
        example = listed.examples.add()
        if row is not None:
            example.features.feature["x"].float_list.value.extend(row)


TWO = {"a": np.array([[1, 2, 3]], np.float32), "b": np.array([4], np.int32)}


def test_predict(stub):
    response = stub.Predict(predict_request(**TWO), timeout=20)
    assert response.model_spec.name == "many"
    assert response.model_spec.version.value == 2
    assert response.model_spec.signature_name == "serving_default"
    assert list(response.outputs["sum"].float_val) == [18.0]  # typed fields, as TF Serving answers
    assert tf.make_ndarray(response.outputs["twice"]).tolist() == [8]


@pytest.mark.parametrize(
    ("version", "label", "total"), [(1, None, 12.0), (None, "stable", 12.0), (None, "canary", 18.0)]
)
def test_versions_and_labels(stub, version, label, total):
    response = stub.Predict(predict_request(version=version, label=label, **TWO), timeout=20)
    assert tf.make_ndarray(response.outputs["sum"]).tolist() == [total]


def test_output_filter(stub):
    request = predict_request(**TWO)
    request.output_filter.append("twice")
    assert list(stub.Predict(request, timeout=20).outputs) == ["twice"]


def test_strings_bytes_scalars_and_dtypes(stub):
    raw = np.array([b"\x00\xff", b""], object)
    copy = stub.Predict(predict_request(signature="echo", image_bytes=raw), timeout=20)
    assert list(copy.outputs["copy_bytes"].string_val) == [b"\x00\xff", b""]
    repeated = predict_request(signature="repeat", text=np.array([b"ab"], object), times=np.int32(2))
    assert list(stub.Predict(repeated, timeout=20).outputs["out"].string_val) == [b"abab"]
    picky = stub.Predict(predict_request(signature="picky", x=np.array([4.0, 0.0], np.float32)), timeout=20)
    values = {name: tf.make_ndarray(proto).astype(float).tolist() for name, proto in picky.outputs.items()}
    assert values == {"root": [2.0, 0.0], "half": [4.0, 0.0], "flag": [1.0, 0.0], "big": [4.0, 0.0]}


def test_tensor_content_is_understood(stub):
    request = predict_request()
    array = np.array([[1, 2, 3]], np.float32)
    request.inputs["a"].dtype = tf.float32.as_datatype_enum
    request.inputs["a"].tensor_content = array.tobytes()
    for size in array.shape:
        request.inputs["a"].tensor_shape.dim.add(size=size)
    request.inputs["b"].CopyFrom(tf.make_tensor_proto(TWO["b"]))
    assert list(stub.Predict(request, timeout=20).outputs["sum"].float_val) == [18.0]


def test_predict_equals_keras(stub, classifier):
    request = predict_request("text", text=np.array([text.encode() for text in tiny_models.TEXTS], object))
    scores = tf.make_ndarray(stub.Predict(request, timeout=20).outputs["scores"])
    np.testing.assert_allclose(scores, tiny_models.keras_scores(classifier, tiny_models.TEXTS), atol=1e-5)


def test_classify(stub, classifier):
    request = classification_pb2.ClassificationRequest()
    request.model_spec.name, request.model_spec.signature_name = "text", "classify"
    for text in tiny_models.TEXTS:
        example = request.input.example_list.examples.add()
        example.features.feature["text"].bytes_list.value.append(text.encode())
    rows = stub.Classify(request, timeout=20).result.classifications
    assert [[c.label for c in row.classes] for row in rows] == [["negative", "positive"]] * len(tiny_models.TEXTS)
    scores = np.array([[c.score for c in row.classes] for row in rows])
    np.testing.assert_allclose(scores, tiny_models.keras_scores(classifier, tiny_models.TEXTS), atol=1e-5)


def test_regress_with_context(stub):
    request = regression_pb2.RegressionRequest()
    request.model_spec.name, request.model_spec.signature_name = "many", "regress"
    add_examples(request, [None, [2.0, 2.0]], context=[1.0, 1.0])
    assert [r.value for r in stub.Regress(request, timeout=20).result.regressions] == [6.0, 12.0]


def multi_request(*tasks):
    request = inference_pb2.MultiInferenceRequest()
    for name, signature, method in tasks:
        task = request.tasks.add(method_name=method)
        task.model_spec.name, task.model_spec.signature_name = name, signature
    add_examples(request, [[1.0, 2.0]])
    return request


def test_multi_inference(stub):
    request = multi_request(("many", "classify", CLASSIFY), ("many", "regress", REGRESS))
    first, second = stub.MultiInference(request, timeout=20).results
    assert [(c.label, c.score) for c in first.classification_result.classifications[0].classes] == [
        ("no", 3.0),
        ("yes", 6.0),
    ]
    assert second.regression_result.regressions[0].value == 9.0
    assert second.model_spec.signature_name == "regress"


@pytest.mark.parametrize(
    ("tasks", "code", "words"),
    [
        ([], "INVALID_ARGUMENT", "at least one task"),
        ([("many", "regress", REGRESS), ("text", "classify", CLASSIFY)], "INVALID_ARGUMENT", "same model name"),
        ([("many", "regress", REGRESS)] * 2, "INVALID_ARGUMENT", "Duplicate evaluation"),
        ([("many", "regress", "tensorflow/serving/predict")], "UNIMPLEMENTED", "Unsupported signature method_name"),
    ],
)
def test_multi_inference_errors(stub, tasks, code, words):
    assert_refused(lambda: stub.MultiInference(multi_request(*tasks), timeout=20), code, words)


def assert_refused(call, code, words):
    with pytest.raises(grpc.RpcError) as caught:
        call()
    assert words in caught.value.details()
    assert caught.value.code() == grpc.StatusCode[code]


def bad_proto(**changes):
    request = predict_request(**TWO)
    proto = request.inputs["b"]
    for name, value in changes.items():
        if name == "dims":
            del proto.tensor_shape.dim[:]
            for size in value:
                proto.tensor_shape.dim.add(size=size)
        else:
            setattr(proto, name, value)
    return request


def filtered(*names):
    request = predict_request(**TWO)
    request.output_filter.extend(names)
    return request


ERRORS = [
    ("no model", lambda: predict_request(""), "INVALID_ARGUMENT", "Missing ModelSpec"),
    ("unknown model", lambda: predict_request("none"), "NOT_FOUND", "Latest(none)"),
    ("unknown version", lambda: predict_request(version=9), "NOT_FOUND", "Specific(many, 9)"),
    ("unknown label", lambda: predict_request(label="beta"), "INVALID_ARGUMENT", "version label: beta"),
    (
        "unknown signature",
        lambda: predict_request(signature="x", **TWO),
        "FAILED_PRECONDITION",
        "not found in signature def",
    ),
    ("missing input", lambda: predict_request(a=TWO["a"]), "INVALID_ARGUMENT", "Missing but required: {b}"),
    ("extra input", lambda: predict_request(c=TWO["a"], **TWO), "INVALID_ARGUMENT", "Sent extra: {c}"),
    ("wrong dtype", lambda: predict_request(a=TWO["a"], b=np.array([1.0])), "INVALID_ARGUMENT", "expected int32[?]"),
    (
        "a shape the graph refuses",
        lambda: predict_request(a=TWO["a"][0], b=TWO["b"]),
        "INVALID_ARGUMENT",
        "input 'a' has shape [3], the signature declares float32[?, 3]",
    ),
    (
        "an output asked for twice",
        lambda: filtered("twice", "twice"),
        "INVALID_ARGUMENT",
        "duplicate output tensor alias: twice",
    ),
    ("negative size", lambda: bad_proto(dims=[-1]), "INVALID_ARGUMENT", "no full shape"),
    ("no dtype", lambda: bad_proto(dtype=0), "INVALID_ARGUMENT", "invalid dtype"),
    ("resource", lambda: bad_proto(dtype=tf.resource.as_datatype_enum), "INVALID_ARGUMENT", "input 'b'"),
    ("bomb", lambda: bad_proto(dims=[1 << 30]), "RESOURCE_EXHAUSTED", "would unpack to"),
    ("bad content", lambda: bad_proto(tensor_content=b"abc"), "INVALID_ARGUMENT", "no valid TensorProto"),
]


@pytest.mark.parametrize(("make", "code", "words"), [row[1:] for row in ERRORS], ids=[row[0] for row in ERRORS])
def test_error(stub, make, code, words):
    assert_refused(lambda: stub.Predict(make(), timeout=20), code, words)
    assert stub.Predict(predict_request(**TWO), timeout=20).outputs


def test_unknown_output_filter(stub):
    request = predict_request(**TWO)
    request.output_filter.append("nope")
    assert_refused(lambda: stub.Predict(request, timeout=20), "INVALID_ARGUMENT", "output tensor alias not found")


def test_empty_input(stub):
    request = classification_pb2.ClassificationRequest()
    request.model_spec.name = "many"
    assert_refused(lambda: stub.Classify(request, timeout=20), "INVALID_ARGUMENT", "Input is empty")


def test_classify_by_a_predict_signature(stub):
    request = classification_pb2.ClassificationRequest()
    request.model_spec.name, request.model_spec.signature_name = "many", "echo"
    add_examples(request, [[1.0, 2.0]])
    assert_refused(
        lambda: stub.Classify(request, timeout=20), "INVALID_ARGUMENT", "No classification inputs found in SignatureDef"
    )


def test_message_too_large(stub):
    request = predict_request(signature="echo", image_bytes=np.array([b"x" * (2 << 20)], object))
    assert_refused(lambda: stub.Predict(request, timeout=20), "RESOURCE_EXHAUSTED", "larger than max")


def test_deadline(stub):
    request = predict_request(signature="echo", image_bytes=np.array([b"x" * 100] * 5000, object))
    assert_refused(lambda: stub.Predict(request, timeout=1e-4), "DEADLINE_EXCEEDED", "")


def test_metadata(stub):
    request = get_model_metadata_pb2.GetModelMetadataRequest(metadata_field=["signature_def"])
    request.model_spec.name = "text"
    response = stub.GetModelMetadata(request, timeout=20)
    signatures = get_model_metadata_pb2.SignatureDefMap()
    assert response.metadata["signature_def"].Unpack(signatures)
    assert sorted(signatures.signature_def) == ["classify", "serving_default"]
    assert signatures.signature_def["classify"].method_name == CLASSIFY
    for fields, words in (([], "at least one metadata_field"), (["other"], "other is not supported")):
        bad = get_model_metadata_pb2.GetModelMetadataRequest(metadata_field=fields)
        bad.model_spec.name = "text"
        assert_refused(lambda bad=bad: stub.GetModelMetadata(bad, timeout=20), "INVALID_ARGUMENT", words)


def test_status(models):
    request = get_model_status_pb2.GetModelStatusRequest()
    request.model_spec.name = "many"
    entries = models.GetModelStatus(request, timeout=20).model_version_status
    available = get_model_status_pb2.ModelVersionStatus.AVAILABLE
    assert [(entry.version, entry.state, entry.status.error_code) for entry in entries] == [
        (2, available, 0),
        (1, available, 0),
    ]
    request.model_spec.version.value = 7
    assert_refused(lambda: models.GetModelStatus(request, timeout=20), "NOT_FOUND", "version 7 of model many")


def test_health(channel):
    check = channel.unary_unary("/grpc.health.v1.Health/Check")
    assert check(b"", timeout=20) == b"\x08\x01"


def reload_request(text):
    request = model_management_pb2.ReloadConfigRequest()
    text_format.Parse(text, request.config)
    return request


def test_reload_errors_change_nothing(models, stub, tmp_path):
    for text, code, words in (
        ("", "INVALID_ARGUMENT", "model_config_list"),
        (
            f"model_config_list {{ config {{ name: 'x' base_path: '{tmp_path}/no' }} }}",
            "FAILED_PRECONDITION",
            "no folder",
        ),
        (
            f"model_config_list {{ config {{ base_path: '{tmp_path}' }} }}",
            "INVALID_ARGUMENT",
            "name is empty",
        ),
        (
            f"model_config_list {{ config {{ name: 'x' base_path: '{tmp_path}' model_platform: 'other' }} }}",
            "INVALID_ARGUMENT",
            "model_platform",
        ),
    ):
        request = reload_request(text)
        assert_refused(lambda r=request: models.HandleReloadConfigRequest(r, timeout=20), code, words)
    assert list(stub.Predict(predict_request(**TWO), timeout=20).outputs["sum"].float_val) == [18.0]
