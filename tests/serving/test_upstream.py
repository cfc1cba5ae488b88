"""TF Serving's own tests, asked of tfvllm: each case passes, or stands in the table of deliberate differences."""

import json

import grpc
import numpy as np
import pytest
import requests
from google.protobuf import text_format
from tensorflow_serving.apis import (
    classification_pb2,
    get_model_metadata_pb2,
    get_model_status_pb2,
    inference_pb2,
    model_service_pb2_grpc,
    predict_pb2,
    prediction_service_pb2_grpc,
    regression_pb2,
)

from tests.serving import upstream_models
from tests.serving.cases import differences, grpc_api, json_answers, json_requests, protos, rest_api
from tfvllm.serving import examples, tensors
from tfvllm.serving.manager import ModelConfig
from tfvllm.serving.servable import Signature, Spec
from tfvllm.serving.server import Options, Server
from tfvllm.serving.status import ServingError

REQUESTS = {
    "Predict": predict_pb2.PredictRequest,
    "Classify": classification_pb2.ClassificationRequest,
    "Regress": regression_pb2.RegressionRequest,
    "MultiInference": inference_pb2.MultiInferenceRequest,
    "GetModelMetadata": get_model_metadata_pb2.GetModelMetadataRequest,
    "GetModelStatus": get_model_status_pb2.GetModelStatusRequest,
}


def cases(rows, file=""):
    """`rows` as parameters, each with its name as TF Serving has it; `file` is that of all of them."""
    rows = [(f"{file}::{name}" if file else name, *rest) for name, *rest in rows]
    return pytest.mark.parametrize("case", rows, ids=[row[0] for row in rows])


def check(name: str, answer: str, wanted: str, passed: bool) -> None:
    """Holds `answer` to what TF Serving says (it has `passed` then), or to the table of differences."""
    if name in differences.DIFFERENT:
        assert not passed, f"{name} is answered as TF Serving answers it: take it out of the table of differences"
        wanted, _ = differences.DIFFERENT[name]
        assert wanted in answer
    else:
        assert passed, f"expected {wanted}\ngot {answer}"


# --- JSON -------------------------------------------------------------------------------------------------------------


def signature(inputs):
    return Signature(
        "serving_default", "", {name: Spec(f"{name}:0", dtype, None) for name, dtype in inputs.items()}, {}
    )


def array(dtype, values):
    if isinstance(values, tuple):
        return np.zeros(values, object if dtype == "string" else dtype)
    return np.array(values, object if dtype == "string" else dtype)


@cases(json_requests.READ, "json_tensor_test")
def test_json_is_read(case):
    name, inputs, body, signature_name, form, values = case
    try:
        parsed = tensors.parse_predict(body.encode(), lambda _: signature(inputs))
    except ServingError as error:
        check(name, error.message, "no error", False)
        return
    assert (parsed.format, parsed.signature_name, set(parsed.inputs)) == (form, signature_name, set(inputs))
    for key, dtype in inputs.items():
        wanted = array(dtype, values[key])
        assert parsed.inputs[key].dtype == wanted.dtype
        np.testing.assert_array_equal(parsed.inputs[key], wanted, strict=True)
        if wanted.dtype != object:
            np.testing.assert_array_equal(np.signbit(parsed.inputs[key]), np.signbit(wanted))
    check(name, "the tensors", "", True)


@cases(json_requests.REFUSED, "json_tensor_test")
def test_json_is_refused(case):
    name, inputs, body, words = case
    with pytest.raises(ServingError) as caught:
        tensors.parse_predict(body.encode(), lambda _: signature(inputs))
    assert caught.value.code == "INVALID_ARGUMENT"
    check(name, caught.value.message, words, words in caught.value.message)


@pytest.mark.parametrize("verb", ["classify", "regress"])
@cases(json_requests.EXAMPLES, "json_tensor_test")
def test_examples_are_read(case, verb):
    from tensorflow.core.example import example_pb2

    _, body, signature_name, rows = case
    parsed = examples.parse_examples(body.encode(), verb)
    assert parsed.signature_name == signature_name
    found = []
    for serialised in parsed.examples:
        features = example_pb2.Example.FromString(serialised).features.feature
        found.append({key: list(getattr(kind, kind.WhichOneof("kind")).value) for key, kind in features.items()})
    np.testing.assert_equal(found, rows)  # in which NaN equals NaN


@pytest.mark.parametrize("verb", ["classify", "regress"])
@cases(json_requests.EXAMPLES_REFUSED, "json_tensor_test")
def test_examples_are_refused(case, verb):
    name, body, words = case
    with pytest.raises(ServingError) as caught:
        examples.parse_examples(body.encode(), verb)
    assert caught.value.code == "INVALID_ARGUMENT"
    check(name, caught.value.message, words, words in caught.value.message)


def same_json(text: bytes, wanted) -> bool:
    """Whether `text` is `wanted`, whose numbers may be text: then digit for digit."""
    as_text = {"parse_float": str, "parse_int": str, "parse_constant": str}
    return wanted in (json.loads(text), json.loads(text, **as_text))


@cases(json_answers.WRITTEN, "json_tensor_test")
def test_json_is_written(case):
    name, outputs, form, wanted = case
    answer = tensors.predict_answer({key: array(*value) for key, value in outputs.items()}, form)
    check(name, answer.decode(), str(wanted), same_json(answer, wanted))


@cases(json_answers.UNWRITABLE, "json_tensor_test")
def test_json_cannot_be_written(case):
    name, outputs, form, words = case
    with pytest.raises(ServingError) as caught:
        tensors.predict_answer({key: array(*value) for key, value in outputs.items()}, form)
    assert caught.value.code == "INVALID_ARGUMENT"
    check(name, caught.value.message, words, words in caught.value.message)


@cases(json_answers.RESULTS, "json_tensor_test")
def test_results_are_written(case):
    name, results, wanted = case
    results = [
        [(label, np.float32(score)) for label, score in row] if isinstance(row, list) else np.float32(row)
        for row in results
    ]
    answer = examples.results_answer(results)
    check(name, answer.decode(), str(wanted), same_json(answer, wanted))


@cases(json_answers.ERRORS, "json_tensor_test")
def test_errors_are_written(case):
    _, message, wanted = case
    assert json.loads(tensors.error_body(message)) == wanted


# --- a server ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("upstream")
    upstream_models.write_all(folder)
    return folder


def serve(base, **options):
    models = [ModelConfig(name, base / name, labels={"stable": 123}) for name in upstream_models.MODELS]
    models.append(ModelConfig(rest_api.ODD, base / "default", labels={rest_api.ODD_LABEL: 123}))
    return Server(Options(models, rest_port=0, grpc_port=0, poll_s=0, **options)).in_thread()


@pytest.fixture(scope="module")
def server(base):
    with serve(base) as running:
        yield running


@pytest.fixture(scope="module")
def channel(server):
    with grpc.insecure_channel(f"127.0.0.1:{server.grpc_port}") as opened:
        yield opened


@pytest.fixture(scope="module")
def checked(base):
    """A channel to a server that checks method names."""
    with (
        serve(base, check_method_names=True) as running,
        grpc.insecure_channel(f"127.0.0.1:{running.grpc_port}") as opened,
    ):
        yield opened


def rest(server, method, path, body):
    return requests.request(method, f"{server.rest_url}/v1{path}", data=body, timeout=30)


@cases(rest_api.ANSWERED)
def test_rest(server, case):
    name, method, path, body, wanted = case
    response = rest(server, method, path, body)
    assert response.headers["content-type"] == "application/json"
    passed = response.status_code == 200 and response.json() == wanted
    check(name, response.text, json.dumps(wanted), passed)


@cases(rest_api.REFUSED)
def test_rest_refuses(server, case):
    name, method, path, body, status, words = case
    response = rest(server, method, path, body)
    assert response.status_code == status
    message = response.json()["error"]
    check(name, message, words, words in message)


def call(channel, method, request):
    service = model_service_pb2_grpc.ModelServiceStub if method == "GetModelStatus" else None
    stub = (service or prediction_service_pb2_grpc.PredictionServiceStub)(channel)
    return getattr(stub, method)(text_format.Parse(request, REQUESTS[method]()), timeout=30)


@cases(grpc_api.ANSWERED)
def test_grpc(request, case):
    name, method, asked, wanted = case
    channel = request.getfixturevalue("checked" if "'checked " in asked else "channel")
    answer = call(channel, method, asked.replace("'checked ", "'"))
    assert answer == text_format.Parse(wanted, type(answer)()), name


@cases(grpc_api.SEQUENCES)
def test_grpc_one_after_another(channel, case):
    call(channel, "Predict", protos.spec("counter", "reset_counter"))
    for method, asked, wanted in case[1]:
        answer = call(channel, method, asked)
        assert answer == text_format.Parse(wanted, type(answer)())


@cases(grpc_api.REFUSED)
def test_grpc_refuses(request, case):
    name, method, asked, code, words = case
    channel = request.getfixturevalue("checked" if "'checked " in asked else "channel")
    with pytest.raises(grpc.RpcError) as caught:
        call(channel, method, asked.replace("'checked ", "'"))
    assert caught.value.code() == grpc.StatusCode[code]
    check(name, caught.value.details(), words, words in caught.value.details())


def test_metadata_by_grpc_is_the_models_own(channel, base):
    """get_model_metadata_impl_test::ReturnsSignaturesForValidModel,
    tensorflow_model_server_test::testGetModelMetadata."""
    from tensorflow.core.protobuf import saved_model_pb2

    answer = call(channel, "GetModelMetadata", protos.spec() + "metadata_field: 'signature_def'")
    assert answer.model_spec == text_format.Parse(protos.spec(), predict_pb2.PredictRequest()).model_spec
    assert list(answer.metadata) == ["signature_def"]
    found = get_model_metadata_pb2.SignatureDefMap()
    assert answer.metadata["signature_def"].Unpack(found)
    written = saved_model_pb2.SavedModel.FromString((base / "default/00000123/saved_model.pb").read_bytes())
    assert dict(found.signature_def) == dict(written.meta_graphs[0].signature_def)


def case_names() -> list[str]:
    """Every case that is asked, by TF Serving's name of it."""
    found = {
        name
        for rows in (
            rest_api.ANSWERED,
            rest_api.REFUSED,
            grpc_api.ANSWERED,
            grpc_api.SEQUENCES,
            grpc_api.REFUSED,
        )
        for name, *_ in rows
    }
    for module, lists in (
        (json_requests, ("READ", "REFUSED", "EXAMPLES", "EXAMPLES_REFUSED")),
        (json_answers, ("WRITTEN", "UNWRITABLE", "RESULTS", "ERRORS")),
    ):
        found |= {f"json_tensor_test::{name}" for rows in lists for name, *_ in getattr(module, rows)}
    return sorted(found)


def test_the_tables_name_cases_that_exist():
    assert set(differences.DIFFERENT) <= set(case_names())
    assert not set(differences.NOT_ASKED) & set(case_names())
