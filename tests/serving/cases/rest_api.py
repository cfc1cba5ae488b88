"""Requests to the REST API, and its answers.

From tensorflow_serving/model_servers/http_rest_api_handler_test.cc, http_rest_api_util_test.cc and
tensorflow_model_server_test.py. `default` is half_plus_two: y = x / 2 + 2, in one version, 123, with the label
`stable`; `ODD` has a name of reserved characters.
"""

HANDLER, UTIL, SERVER = "http_rest_api_handler_test", "http_rest_api_util_test", "tensorflow_model_server_test"
ODD = "modelname!#$%&'()*+,/:;=?@[]"
ODD_LABEL = "latest!#$%&'()*+,/:;=?@[]"
ESCAPED = "%21%23%24%25%26%27%28%29%2A%2B%2C%2F%3A%3B%3D%3F%40%5B%5D"
TOO_LONG = 2**64 - 1
AVAILABLE = {
    "model_version_status": [
        {"version": "123", "state": "AVAILABLE", "status": {"error_code": "OK", "error_message": ""}}
    ]
}


def _tensor(dtype: str, name: str, *sizes: str) -> dict:
    dims = [{"size": size, "name": ""} for size in sizes]
    return {"dtype": dtype, "tensor_shape": {"dim": dims, "unknown_rank": False}, "name": name}


def _signature(method: str, key: str, x: str, out: str, y: str) -> dict:
    given = _tensor("DT_STRING", x, "-1") if x == "tf_example:0" else _tensor("DT_FLOAT", x, "-1", "1")
    return {
        "inputs": {key: given},
        "outputs": {out: _tensor("DT_FLOAT", y, "-1", "1")},
        "method_name": f"tensorflow/serving/{method}",
        "defaults": {},
    }


# As half_plus_two_model_metadata.json, where tf_example, an older one, has no rank.
METADATA = {
    "model_spec": {"name": "default", "signature_name": "", "version": "123"},
    "metadata": {
        "signature_def": {
            "signature_def": {
                "classify_x_to_y": _signature("classify", "inputs", "tf_example:0", "scores", "y:0"),
                "classify_x2_to_y3": _signature("classify", "inputs", "x2:0", "scores", "y3:0"),
                "regress_x_to_y": _signature("regress", "inputs", "tf_example:0", "outputs", "y:0"),
                "regress_x_to_y2": _signature("regress", "inputs", "tf_example:0", "outputs", "y2:0"),
                "regress_x2_to_y3": _signature("regress", "inputs", "x2:0", "outputs", "y3:0"),
                "serving_default": _signature("predict", "x", "x:0", "y", "y:0"),
            }
        }
    },
}
REGRESS = '{"signature_name": "regress_x_to_y", "examples": [{"x": 80.0}]}'

# (case, method, path after /v1, body, the whole answer)
ANSWERED = [
    (
        f"{HANDLER}::Predict 1",
        "POST",
        "/models/default:predict",
        '{"instances": [[1.0, 2.0], [3.0, 4.0]]}',
        {"predictions": [[2.5, 3.0], [3.5, 4.0]]},
    ),
    (
        f"{HANDLER}::Predict 2",
        "POST",
        "/models/default/versions/123:predict",
        '{"instances": [1.0, 2.0]}',
        {"predictions": [2.5, 3.0]},
    ),
    (
        f"{HANDLER}::Predict 3",
        "POST",
        "/models/default/labels/stable:predict",
        '{"instances": [1.0, 2.0]}',
        {"predictions": [2.5, 3.0]},
    ),
    (
        f"{HANDLER}::Predict 4",
        "POST",
        "/models/default/versions/123:predict",
        '{"signature_name": "serving_default", "instances": [3.0, 4.0]}',
        {"predictions": [3.5, 4.0]},
    ),
    (
        f"{HANDLER}::Predict 5",
        "POST",
        "/models/default/versions/123:predict",
        '{"signature_name": "serving_default", "inputs": [3.0, 4.0]}',
        {"outputs": [3.5, 4.0]},
    ),
    (f"{HANDLER}::Regress 1", "POST", "/models/default:regress", REGRESS, {"results": [42]}),
    (f"{HANDLER}::Regress 2", "POST", "/models/default/versions/123:regress", REGRESS, {"results": [42]}),
    (f"{HANDLER}::Regress 3", "POST", "/models/default/labels/stable:regress", REGRESS, {"results": [42]}),
    (
        f"{HANDLER}::Classify 1",
        "POST",
        "/models/default:classify",
        '{"signature_name": "classify_x_to_y", "examples": [{"x": 20.0}]}',
        {"results": [[["", 12]]]},
    ),
    (
        f"{HANDLER}::Classify 2",
        "POST",
        "/models/default/labels/stable:classify",
        '{"signature_name": "classify_x_to_y", "examples": [{"x": 10.0}]}',
        {"results": [[["", 7]]]},
    ),
    (f"{HANDLER}::GetStatus 1", "GET", "/models/default", None, AVAILABLE),
    (f"{HANDLER}::GetStatus 2", "GET", "/models/default/versions/123", None, AVAILABLE),
    (f"{HANDLER}::GetStatus 3", "GET", "/models/default/labels/stable", None, AVAILABLE),
    (f"{HANDLER}::GetModelMetadata", "GET", "/models/default/metadata", None, METADATA),
    (
        f"{SERVER}::testClassifyREST",
        "POST",
        "/models/default:classify",
        '{"signature_name": "classify_x_to_y", "examples": [{"x": 2.0}]}',
        {"results": [[["", 3.0]]]},
    ),
    (
        f"{SERVER}::testRegressREST",
        "POST",
        "/models/default:regress",
        '{"signature_name": "regress_x_to_y", "examples": [{"x": 2.0}]}',
        {"results": [3.0]},
    ),
    (
        f"{SERVER}::testPredictREST",
        "POST",
        "/models/default:predict",
        '{"instances": [2.0, 3.0, 4.0]}',
        {"predictions": [3.0, 3.5, 4.0]},
    ),
    (
        f"{SERVER}::testPredictColumnarREST",
        "POST",
        "/models/default:predict",
        '{"inputs": [2.0, 3.0, 4.0]}',
        {"outputs": [3.0, 3.5, 4.0]},
    ),
    (f"{SERVER}::testGetStatusREST", "GET", "/models/default", None, AVAILABLE),
    (f"{SERVER}::testGetModelMetadataREST", "GET", "/models/default/metadata", None, METADATA),
    (f"{UTIL}::TestParseModelInfoForGet 1", "GET", f"/models/modelname{ESCAPED}", None, AVAILABLE),
    (f"{UTIL}::TestParseModelInfoForGet 2", "GET", "/models/default/versions/123", None, AVAILABLE),
    (f"{UTIL}::TestParseModelInfoForGet 3", "GET", "/models/default/labels/stable", None, AVAILABLE),
    (
        f"{UTIL}::TestParseModelInfoForGet 4",
        "GET",
        f"/models/modelname{ESCAPED}/labels/latest{ESCAPED}",
        None,
        AVAILABLE,
    ),
    (f"{UTIL}::TestParseModelInfoForGet 5", "GET", "/models/default/labels/stable/metadata", None, METADATA),
    (
        f"{UTIL}::TestParseModelInfoForGet 6",
        "GET",
        f"/models/modelname{ESCAPED}/labels/latest{ESCAPED}/metadata",
        None,
        {**METADATA, "model_spec": {"name": ODD, "signature_name": "", "version": "123"}},
    ),
    (
        f"{UTIL}::TestParseModelInfoForPost 1",
        "POST",
        f"/models/modelname{ESCAPED}:predict",
        '{"inputs": [2.0]}',
        {"outputs": [3.0]},
    ),
    (
        f"{UTIL}::TestParseModelInfoForPost 2",
        "POST",
        "/models/default/versions/123:predict",
        '{"inputs": [2.0]}',
        {"outputs": [3.0]},
    ),
    (
        f"{UTIL}::TestParseModelInfoForPost 3",
        "POST",
        "/models/default/labels/stable:predict",
        '{"inputs": [2.0]}',
        {"outputs": [3.0]},
    ),
    (
        f"{UTIL}::TestParseModelInfoForPost 4",
        "POST",
        f"/models/modelname{ESCAPED}/labels/latest{ESCAPED}:predict",
        '{"inputs": [2.0]}',
        {"outputs": [3.0]},
    ),
]

# (case, method, path after /v1, body, status, words of the error)
REFUSED = [
    (f"{HANDLER}::UnsupportedApiCalls 1", "GET", "/foo", None, 400, "Malformed request"),
    (f"{HANDLER}::UnsupportedApiCalls 2", "POST", "/foo", "", 400, "Malformed request"),
    (f"{HANDLER}::UnsupportedApiCalls 3", "GET", "/models", None, 400, "Missing model name"),
    (f"{HANDLER}::UnsupportedApiCalls 4", "GET", "/models/debug/model_name", None, 400, "Malformed request"),
    (f"{HANDLER}::UnsupportedApiCalls 5", "POST", "/models", "", 400, "Malformed request"),
    (f"{HANDLER}::UnsupportedApiCalls 6", "GET", "/models/foo:predict", None, 400, "Malformed request"),
    (f"{HANDLER}::UnsupportedApiCalls 7", "GET", "/models/foo/version/50:predict", None, 400, "Malformed request"),
    (f"{HANDLER}::UnsupportedApiCalls 8", "POST", "/models/foo/version/50:regress", "", 400, "Malformed request"),
    (f"{HANDLER}::UnsupportedApiCalls 9", "POST", "/models/foo/versions/HELLO:regress", "", 400, "Malformed request"),
    (
        f"{HANDLER}::UnsupportedApiCalls 10",
        "POST",
        f"/models/foo/versions/{TOO_LONG}:regress",
        "",
        400,
        "Failed to convert version",
    ),
    (f"{HANDLER}::UnsupportedApiCalls 11", "POST", "/models/foo/metadata", "", 400, "Malformed request"),
    (
        f"{HANDLER}::UnsupportedApiCalls 12",
        "POST",
        "/models/foo/label/some_label:regress",
        "",
        400,
        "Malformed request",
    ),
    (
        f"{HANDLER}::UnsupportedApiCalls 13",
        "POST",
        "/models/foo/versions/50/labels/some_label:regress",
        "",
        400,
        "Malformed request",
    ),
    (
        f"{HANDLER}::UnsupportedApiCalls 14",
        "POST",
        "/models/foo/versions/some_label:regress",
        "",
        400,
        "Malformed request",
    ),
    (f"{HANDLER}::PredictModelNameVersionErrors 1", "POST", "/models/foo:predict", '{"instances": [1]}', 404, "foo"),
    (
        f"{HANDLER}::PredictModelNameVersionErrors 2",
        "POST",
        "/models/foo/versions/50:predict",
        '{"instances": [1]}',
        404,
        "foo",
    ),
    (
        f"{HANDLER}::PredictModelNameVersionErrors 3",
        "POST",
        "/models/default99:predict",
        '{"instances": [1]}',
        404,
        "default99",
    ),
    (f"{HANDLER}::PredictRequestErrors 1", "POST", "/models/default:predict", "", 400, "The document is empty"),
    (
        f"{HANDLER}::PredictRequestErrors 2",
        "POST",
        "/models/default:predict",
        "instances = [1, 2]",
        400,
        "JSON Parse error: Invalid value",
    ),
    (
        f"{HANDLER}::PredictRequestErrors 3",
        "POST",
        "/models/default:predict",
        '{"instances": ["x", "y"]}',
        400,
        "not of expected type: float",
    ),
    (
        f"{HANDLER}::PredictRequestErrors 4",
        "POST",
        "/models/default/labels/none:predict",
        '{"instances": ["x", "y"]}',
        400,
        "Unrecognized servable version label",
    ),
    (
        f"{HANDLER}::PredictRequestErrors 5",
        "POST",
        "/models/default:predict",
        '{"signature_name": 100}',
        400,
        "'signature_name' key must be a string value.",
    ),
    (f"{UTIL}::TestParseModelInfoForGet 7", "GET", "/foo", None, 400, "Malformed request"),
    (f"{UTIL}::TestParseModelInfoForGet 8", "GET", "/models/foo:predict", None, 400, "Malformed request"),
    (f"{UTIL}::TestParseModelInfoForGet 9", "GET", "/models/foo/version/50:predict", None, 400, "Malformed request"),
    (f"{UTIL}::TestParseModelInfoForPost 5", "POST", "/foo", "", 400, "Malformed request"),
    (f"{UTIL}::TestParseModelInfoForPost 6", "POST", "/models", "", 400, "Malformed request"),
    (f"{UTIL}::TestParseModelInfoForPost 7", "POST", "/models/foo/version/50:predict", "", 400, "Malformed request"),
    (
        f"{UTIL}::TestParseModelInfoForPost 8",
        "POST",
        "/models/foo/versions/string:predict",
        "",
        400,
        "Malformed request",
    ),
    (
        f"{UTIL}::TestParseModelInfoForPost 9",
        "POST",
        f"/models/foo/versions/{TOO_LONG}:predict",
        "",
        400,
        "Failed to convert version",
    ),
    (f"{UTIL}::TestParseModelInfoForPost 10", "POST", "/models/foo/metadata", "", 400, "Malformed request"),
    (
        f"{UTIL}::TestParseModelInfoForPost 11",
        "POST",
        "/models/foo/versions/50/labels/some_label:regress",
        "",
        400,
        "Malformed request",
    ),
]
