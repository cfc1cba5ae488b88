"""Every documented form of TF Serving's REST API and its error answers, asked with plain `requests`."""

import base64
import gzip
import json

import numpy as np
import pytest
import requests

from tests import tiny_models

B64 = {"b64": base64.b64encode(b"\x00\xffraw").decode()}

# (what, model path, body, the whole answer)
ANSWERS = [
    (
        "row format, objects",
        "many",
        {"instances": [{"a": [1, 2, 3], "b": 4}, {"a": [0.5, 0, 0], "b": -1}]},
        {"predictions": [{"sum": 18.0, "twice": 8}, {"sum": 1.5, "twice": -2}]},
    ),
    ("column format", "many", {"inputs": {"a": [[1, 2, 3]], "b": [4]}}, {"outputs": {"sum": [18.0], "twice": [8]}}),
    (
        "a version",
        "many/versions/1",
        {"inputs": {"a": [[1, 2, 3]], "b": [4]}},
        {"outputs": {"sum": [12.0], "twice": [8]}},
    ),
    (
        "a label",
        "many/labels/stable",
        {"inputs": {"a": [[1, 2, 3]], "b": [4]}},
        {"outputs": {"sum": [12.0], "twice": [8]}},
    ),
    (
        "a label of the newest",
        "many/labels/canary",
        {"inputs": {"a": [[1, 0, 0]], "b": [0]}},
        {"outputs": {"sum": [3.0], "twice": [0]}},
    ),
    (
        "bytes in and out, row format",
        "many",
        {"signature_name": "echo", "instances": [{"image_bytes": B64}]},
        {"predictions": [{"copy_bytes": B64, "length": 5}]},
    ),
    (
        "one input, plain values",
        "many",
        {"signature_name": "echo", "instances": [B64, "text"]},
        {
            "predictions": [
                {"copy_bytes": B64, "length": 5},
                {"copy_bytes": {"b64": base64.b64encode(b"text").decode()}, "length": 4},
            ]
        },
    ),
    (
        "one input, column format, a plain list",
        "many",
        {"signature_name": "ragged", "inputs": [[1, 2, 3], [4, 5, 6]]},
        {"outputs": {"total": [6, 15], "width": [3, 3]}},
    ),
    (
        "an empty row",
        "many",
        {"signature_name": "ragged", "inputs": [[], []]},
        {"outputs": {"total": [0, 0], "width": [0, 0]}},
    ),
    (
        "a scalar input, column format",
        "many",
        {"signature_name": "repeat", "inputs": {"text": ["ab", "c"], "times": 3}},
        {"outputs": {"out": ["ababab", "ccc"], "rows": [2]}},
    ),
    (
        "bool, bfloat16, float64",
        "many",
        {"signature_name": "picky", "instances": [4, 0.25]},
        {
            "predictions": [
                {"root": 2.0, "half": 4.0, "flag": True, "big": 4.0},
                {"root": 0.5, "half": 0.25, "flag": False, "big": 0.25},
            ]
        },
    ),
    (
        "an input with a default left out, row format",
        "many",
        {"signature_name": "cut", "instances": ["a.b", "c"]},
        {"predictions": ["a.b", "c"]},
    ),
    (
        "an input with a default, column format",
        "many",
        {"signature_name": "cut", "inputs": {"text": ["a-b", "cd"], "ends": ["-", "d"]}},
        {"outputs": ["a", "c"]},
    ),
    (
        "an input with a default left out, column format",
        "many",
        {"signature_name": "cut", "inputs": {"text": ["a-b"]}},
        {"outputs": ["a-b"]},
    ),
    (
        "inputs of unequal length run alone",
        "many",
        {"inputs": {"a": [[1, 2, 3]], "b": [1, 2]}},
        {"outputs": {"sum": [18.0], "twice": [2, 4]}},
    ),
    (
        "integers where floats are wanted",
        "many",
        {"inputs": {"a": [[1, 2, 3]], "b": [2147483647]}},
        {"outputs": {"sum": [18.0], "twice": [-2]}},
    ),
    (
        "another shape than declared: the graph judges",
        "many",
        {"inputs": {"a": [[1, 2, 3, 4]], "b": [[1, 2]]}},
        {"outputs": {"sum": [30.0], "twice": [[2, 4]]}},
    ),
    (
        "floats beyond float32's range",
        "many",
        {"instances": [{"a": [1e39, 2, 3], "b": 1}, {"a": [-1e300, 2, 3], "b": 1}]},
        {"predictions": [{"sum": float("inf"), "twice": 2}, {"sum": -float("inf"), "twice": 2}]},
    ),
]


@pytest.mark.parametrize(("path", "body", "answer"), [row[1:] for row in ANSWERS], ids=[row[0] for row in ANSWERS])
def test_predict(url, path, body, answer):
    response = requests.post(f"{url}/{path}:predict", json=body, timeout=20)
    assert response.headers["content-type"] == "application/json"
    assert (response.status_code, response.json()) == (200, answer)


GOOD = {"instances": [{"a": [1, 2, 3], "b": 4}]}

# (what, method, path after /v1/models, body, status, words of the message)
ERRORS = [
    ("empty body", "POST", "/many:predict", b"", 400, "The document is empty"),
    ("not JSON", "POST", "/many:predict", b"{nope", 400, "JSON Parse error"),
    ("not UTF-8", "POST", "/many:predict", b'{"instances": ["\xff\xfe"]}', 400, "UTF-8"),
    ("cut off", "POST", "/many:predict", b'{"instances": [1, 2', 400, "JSON Parse error"),
    ("not an object", "POST", "/many:predict", b"[1, 2]", 400, "Is not object"),
    ("too deep", "POST", "/many:predict", b'{"instances": ' + b"[" * 50_000, 400, "nested too deeply"),
    (
        "deep",
        "POST",
        "/many:predict",
        {"inputs": {"a": json.loads("[" * 40 + "]" * 40), "b": 1}},
        400,
        "nested too deeply",
    ),
    ("huge integer", "POST", "/many:predict", b'{"inputs": ' + b"9" * 5000 + b"}", 400, "JSON Parse error"),
    ("no key", "POST", "/many:predict", {"signature_name": "echo"}, 400, "Missing 'inputs' or 'instances' key"),
    ("both keys", "POST", "/many:predict", {"inputs": 1, "instances": [1]}, 400, "expecting only one of"),
    ("instances no list", "POST", "/many:predict", {"instances": {"a": 1}}, 400, "to be an list/array"),
    ("no instances", "POST", "/many:predict", {"instances": []}, 400, "No values in 'instances'"),
    ("plain list, two inputs", "POST", "/many:predict", {"instances": [1, 2]}, 400, "multiple input tensors"),
    ("plain inputs, two inputs", "POST", "/many:predict", {"inputs": [1]}, 400, "multiple input tensors"),
    ("a key missing", "POST", "/many:predict", {"instances": [{"a": [1, 2, 3]}]}, 400, "keys must be equal to: a,b"),
    ("a key too many", "POST", "/many:predict", {"instances": [{"a": [1, 2, 3], "b": 1, "c": 2}]}, 400, "keys must be"),
    ("objects and values mixed", "POST", "/many:predict", {"instances": [*GOOD["instances"], 3]}, 400, "at item 1"),
    ("column missing", "POST", "/many:predict", {"inputs": {"a": [[1, 2, 3]]}}, 400, "Missing named input: b"),
    ("column unknown", "POST", "/many:predict", {"inputs": {"a": [[1, 2, 3]], "b": [1], "c": 1}}, 400, "Unknown named"),
    (
        "string for float",
        "POST",
        "/many:predict",
        {"inputs": {"a": [["1", 2, 3]], "b": [1]}},
        400,
        "expected type: float32",
    ),
    ("float for int", "POST", "/many:predict", {"inputs": {"a": [[1, 2, 3]], "b": [1.5]}}, 400, "expected type: int32"),
    ("bool for int", "POST", "/many:predict", {"inputs": {"a": [[1, 2, 3]], "b": [True]}}, 400, "expected type: int32"),
    ("null", "POST", "/many:predict", {"inputs": {"a": [[None, 2, 3]], "b": [1]}}, 400, "Type: Null"),
    (
        "int too large",
        "POST",
        "/many:predict",
        {"inputs": {"a": [[1, 2, 3]], "b": [2**31]}},
        400,
        "does not fit in int32",
    ),
    (
        "ragged rows",
        "POST",
        "/many:predict",
        {"instances": [{"a": [1, 2, 3], "b": 1}, {"a": [1], "b": 2}]},
        400,
        "Expecting tensor size: 3 but got: 1",
    ),
    (
        "a ragged column",
        "POST",
        "/many:predict",
        {"inputs": {"a": [[1, 2, 3], [1]], "b": [1, 2]}},
        400,
        "Encountered list at unexpected size: 1 at level: 1 expected size: 3",
    ),
    (
        "mixed levels",
        "POST",
        "/many:predict",
        {"inputs": {"a": [[1, 2, 3], 4], "b": [1, 2]}},
        400,
        "found at incorrect level: 2",
    ),
    (
        "a shape the graph refuses",
        "POST",
        "/many:predict",
        {"inputs": {"a": [1, 2, 3], "b": [1]}},
        400,
        "input 'a' has shape [3], the signature declares float32[?, 3]",
    ),
    (
        "row answer without rows",
        "POST",
        "/many:predict",
        {"signature_name": "repeat", "instances": [{"text": "a", "times": 1}]},
        400,
        "the signature declares int32[]",
    ),
    ("bad base64", "POST", "/many:predict", {"signature_name": "echo", "instances": [{"b64": "*"}]}, 400, "base64"),
    (
        "surrogate",
        "POST",
        "/many:predict",
        b'{"signature_name": "echo", "instances": ["\\ud800"]}',
        400,
        "surrogate",
    ),
    ("signature no string", "POST", "/many:predict", {**GOOD, "signature_name": 3}, 400, "must be a string value"),
    ("unknown signature", "POST", "/many:predict", {**GOOD, "signature_name": "x"}, 400, "not found in signature def"),
    (
        "the graph refuses",
        "POST",
        "/many:predict",
        {"signature_name": "picky", "instances": [-1]},
        400,
        "must not be negative",
    ),
    ("unknown model", "POST", "/none:predict", GOOD, 404, "Latest(none)"),
    ("unknown version", "POST", "/many/versions/9:predict", GOOD, 404, "Specific(many, 9)"),
    ("version too long", "POST", "/many/versions/99999999999999999999:predict", GOOD, 400, "to numeric"),
    ("unknown label", "POST", "/many/labels/beta:predict", GOOD, 400, "Unrecognized servable version label: beta"),
    ("unknown verb", "POST", "/many:guess", GOOD, 400, "Malformed request: POST"),
    ("no verb", "POST", "/many", GOOD, 400, "Malformed request: POST"),
    ("wrong method", "GET", "/many:predict", None, 400, "Malformed request: GET"),
    ("method", "DELETE", "/many", None, 400, "Malformed request: DELETE"),
    ("no model", "GET", "", None, 400, "Missing model name"),
    ("status of none", "GET", "/none", None, 404, "Could not find any versions of model none"),
    ("status of no version", "GET", "/many/versions/7", None, 404, "Could not find version 7 of model many"),
    ("metadata of none", "GET", "/none/metadata", None, 404, "Latest(none)"),
    ("classify, no examples", "POST", "/many:classify", {"signature_name": "classify"}, 400, "key 'examples'"),
    ("classify, empty", "POST", "/many:classify", {"examples": []}, 400, "empty array"),
    ("classify, no list", "POST", "/many:classify", {"examples": {"x": 1}}, 400, "list/array"),
    ("classify, no object", "POST", "/many:classify", {"examples": [3]}, 400, "must be JSON object"),
    ("classify, null", "POST", "/many:classify", {"examples": [{"x": None}]}, 400, "unexpected JSON type: Null"),
    ("classify, mixed", "POST", "/many:classify", {"examples": [{"x": [1, "a"]}]}, 400, "expecting type: int64"),
    ("classify, nested", "POST", "/many:classify", {"examples": [{"x": [[1]]}]}, 400, "unexpected JSON type: Array"),
    (
        "classify by a predict signature",
        "POST",
        "/many:classify",
        {"signature_name": "echo", "examples": [{"x": 1}]},
        400,
        "No classification inputs found in SignatureDef",
    ),
    (
        "regress by a classify signature",
        "POST",
        "/many:regress",
        {"signature_name": "classify", "examples": [{"x": 1}]},
        400,
        "Expected one output Tensor",
    ),
    (
        "classify, the feature missing",
        "POST",
        "/many:classify",
        {"signature_name": "classify", "examples": [{"y": [1.0, 2.0]}]},
        400,
        "x",
    ),
]


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "words"), [row[1:] for row in ERRORS], ids=[row[0] for row in ERRORS]
)
def test_error(url, method, path, body, status, words):
    data = body if isinstance(body, bytes | None) else json.dumps(body).encode()
    response = requests.request(method, url + path, data=data, timeout=20)
    assert list(response.json()) == ["error"]
    assert words in response.json()["error"]
    assert response.status_code == status
    assert requests.get(f"{url}/many", timeout=20).status_code == 200  # and the server lives


def test_predict_equals_keras(url, classifier):
    answer = requests.post(f"{url}/text:predict", json={"instances": tiny_models.TEXTS}, timeout=20).json()[
        "predictions"
    ]
    scores = np.array([row["scores"] for row in answer])
    assert [row["classes"] for row in answer] == [["negative", "positive"]] * len(tiny_models.TEXTS)
    np.testing.assert_allclose(scores, tiny_models.keras_scores(classifier, tiny_models.TEXTS), atol=1e-5)
    assert np.ptp(scores[:, 0]) > 0.1  # the texts do not all get the same answer


def test_classify(url, classifier):
    body = {"signature_name": "classify", "examples": [{"text": text} for text in tiny_models.TEXTS]}
    results = requests.post(f"{url}/text:classify", json=body, timeout=20).json()["results"]
    scores = np.array([[score for _, score in row] for row in results])
    assert [[label for label, _ in row] for row in results] == [["negative", "positive"]] * len(tiny_models.TEXTS)
    np.testing.assert_allclose(scores, tiny_models.keras_scores(classifier, tiny_models.TEXTS), atol=1e-5)


def test_classify_without_signature_finds_the_only_one(url, caplog):
    with caplog.at_level("WARNING", logger="tfvllm.serving"):
        answer = requests.post(f"{url}/many:classify", json={"examples": [{"x": [1.0, 2.0]}]}, timeout=20)
    assert answer.json() == {"results": [[["no", 3.0], ["yes", 6.0]]]}


def test_regress(url):
    body = {"signature_name": "regress", "examples": [{"x": [1.0, 2.0]}, {"x": [0.5, 0.0]}]}
    assert requests.post(f"{url}/many:regress", json=body, timeout=20).json() == {"results": [9.0, 1.5]}
    versioned = requests.post(f"{url}/many/versions/1:regress", json=body, timeout=20).json()
    assert versioned == {"results": [6.0, 1.0]}


def test_context_is_shared_by_the_examples(url):
    body = {"signature_name": "regress", "context": {"x": [1.0, 1.0]}, "examples": [{}, {"x": [2.0, 2.0]}]}
    assert requests.post(f"{url}/many:regress", json=body, timeout=20).json() == {"results": [6.0, 12.0]}


def test_status(url):
    entry = {"state": "AVAILABLE", "status": {"error_code": "OK", "error_message": ""}}
    assert requests.get(f"{url}/many", timeout=20).json() == {
        "model_version_status": [{"version": "2", **entry}, {"version": "1", **entry}]
    }
    one = {"model_version_status": [{"version": "1", **entry}]}
    assert requests.get(f"{url}/many/versions/1", timeout=20).json() == one
    assert requests.get(f"{url}/many/labels/stable", timeout=20).json() == one


def test_metadata(url):
    document = requests.get(f"{url}/text/metadata", timeout=20).json()
    assert document["model_spec"] == {"name": "text", "signature_name": "", "version": "1"}
    definitions = document["metadata"]["signature_def"]["signature_def"]
    assert sorted(definitions) == ["classify", "serving_default"]
    text = definitions["serving_default"]["inputs"]["text"]
    assert text["dtype"] == "DT_STRING"
    assert text["tensor_shape"] == {"dim": [{"size": "-1", "name": ""}], "unknown_rank": False}
    assert definitions["classify"]["method_name"] == "tensorflow/serving/classify"
    older = requests.get(f"{url}/many/versions/1/metadata", timeout=20).json()
    assert older["model_spec"]["version"] == "1"


def test_gzip_body(url):
    body = gzip.compress(json.dumps(GOOD).encode())
    response = requests.post(f"{url}/many:predict", data=body, headers={"Content-Encoding": "gzip"}, timeout=20)
    assert response.json() == {"predictions": [{"sum": 18.0, "twice": 8}]}
    broken = requests.post(f"{url}/many:predict", data=body[:-9], headers={"Content-Encoding": "gzip"}, timeout=20)
    assert broken.status_code == 400


def test_gzip_bomb_is_refused(url):
    bomb = gzip.compress(b" " * (8 << 20))
    response = requests.post(f"{url}/many:predict", data=bomb, headers={"Content-Encoding": "gzip"}, timeout=20)
    assert response.status_code == 413


def test_non_finite_numbers(url):
    body = '{"inputs": {"a": [[NaN, 0, 0], [Infinity, 0, 0], [-Infinity, 0, 0]], "b": [0, 0, 0]}}'
    answer = requests.post(f"{url}/many:predict", data=body, timeout=20)
    assert '"sum":[NaN,Infinity,-Infinity]' in answer.text


def test_names_may_be_escaped_and_case_does_not_matter(url, server):
    assert requests.get(f"{server.rest_url}/V1/Models/%6Dany", timeout=20).status_code == 200


def test_health(server):
    assert requests.get(f"{server.rest_url}/healthz", timeout=20).json() == {"status": "alive"}
    assert requests.get(f"{server.rest_url}/readyz", timeout=20).json() == {"status": "ready"}
    assert requests.get(f"{server.rest_url}/elsewhere", timeout=20).status_code == 404


def test_metrics_have_tf_servings_names(server, url):
    before = _metric(server, ':tensorflow:serving:request_count{model_name="many",status="OK"}')
    requests.post(f"{url}/many:predict", json=GOOD, timeout=20)
    requests.post(f"{url}/no-such-model:predict", json=GOOD, timeout=20)
    assert _metric(server, ':tensorflow:serving:request_count{model_name="many",status="OK"}') == before + 1
    assert _metric(server, ':tensorflow:serving:request_count{model_name="(unknown)",status="NOT_FOUND"}') >= 1
    text = _metrics(server)
    assert "no-such-model" not in text
    assert "# TYPE :tensorflow:serving:request_count counter" in text
    assert (
        ':tensorflow:serving:request_latency_bucket{API="predict",entrypoint="REST",le="10.0",model_name="many"}'
        in text
    )


def _metrics(server) -> str:
    return requests.get(f"{server.rest_url}/monitoring/prometheus/metrics", timeout=20).text


def _metric(server, name: str) -> float:
    lines = [line for line in _metrics(server).splitlines() if line.startswith(name)]
    return float(lines[0].split()[-1]) if lines else 0.0


def test_the_conformance_document_is_made_from_these_tests():
    from tests.serving import conformance

    assert conformance.DOCUMENT.read_text(encoding="utf-8") == conformance.render()
