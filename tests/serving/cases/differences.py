"""Where tfvllm answers otherwise than TF Serving's tests expect, and why; and which of those tests ask nothing here.

The table in docs/serving_conformance.md is made of this, and `test_upstream` holds tfvllm to it: a case that stands
here must be answered as it says, and not as TF Serving answers it.
"""

JSON, REST, GRPC = "json_tensor_test", "http_rest_api_handler_test", "predict_util_test"

# case: (what tfvllm's answer is or holds, the reason)
DIFFERENT: dict[str, tuple[str, str]] = {
    f"{JSON}::DeeplyNestedWellFormed": (
        "nested too deeply",
        "500,000 lists within one another, in a key nobody reads: refused before they cost memory",
    ),
    f"{JSON}::DeeplyNestedMalformed": ("nested too deeply", "the same; INVALID_ARGUMENT in both, in other words"),
    f"{JSON}::FromJsonSingleFloatTensorSixDigitPrecision": (
        '{"predictions":[[9000000.0,999999.0,0.5],[0.0003,3e-05,555557.5]]}',
        "the same number: 9000000.0 for 9e+06, the shortest digits that give it back",
    ),
    f"{REST}::PredictRequestErrors 2": ("JSON Parse error: Expecting value", "another parser's words"),
    f"{GRPC}::PredictionInvalidTensor": (
        "input 'x' has dtype bool; expected float32[?, 1]",
        "the message names the input and what it declares; TensorFlow's own names an argument by its number",
    ),
    f"{GRPC}::InputTensorsHaveWrongType": ("input 'x' has dtype string; expected float32[?, 1]", "the same"),
}

# test: why it has no counterpart here
NOT_ASKED: dict[str, str] = {
    f"{JSON}::JsonFromResultErrors": "an empty result cannot come about: a request without examples is refused before",
    f"{JSON}::StatusOK": "an answer that is no error has no error body",
    f"{REST}::kPathRegex": "the expression itself; paths outside /v1/ get 404 (`test_rest_conformance::test_health`)",
    "predict_util_test::ThreadPoolOptions": "TensorFlow's thread pools, no form of the API",
    "predict_impl_test::ThreadPoolFactory": "the same",
    "multi_inference_test::ThreadPoolOptions": "the same",
    "predict_impl_test::ModelSpecOverride": "a C++ function's argument, no form of the API",
    "get_model_metadata_impl_test::ModelSpecOverride": "the same",
    "get_model_status_impl_test::ModelSpecOverride": "the same",
    "classifier_test::RunsFails": "a fake session; what a graph refuses is `test_rest_conformance::test_error`",
    "regressor_test::RunsFails": "the same",
    "tensorflow_model_server_test::testPredictOnTfLite": "`--prefer_tflite_model` is experimental and not offered: "
    "tfvllm serves SavedModels",
    "tensorflow_model_server_test::testPredictWithSignatureDefOnTfLite": "the same",
    "tensorflow_model_server_test::test_profiler_service_with_valid_trace_request": "TensorFlow's profiler service is "
    "not offered: it lets any client trace the process",
    "tensorflow_model_server_test::test_distrat_sequential_keras_saved_model_save": "what is saved under a "
    "MirroredStrategy is the graph of test_sequential_keras_saved_model_save",
    "tensorflow_model_server_test::_TestBadModel": "helpers no test calls; a model that does not load is "
    "`test_server::test_broken_version_leaves_the_old_one_serving`",
}

# what the tests do not ask, and what differs by intent: (of what, TF Serving, tfvllm, the reason)
BEYOND: list[tuple[str, str, str, str]] = [
    (
        "a JSON body that is not UTF-8",
        "its bytes go into the tensor as they are",
        "400",
        "JSON is UTF-8; bytes have `b64`",
    ),
    (
        "a key that stands twice in a JSON object",
        "the first counts",
        "the last counts",
        "the parser of Python's standard library",
    ),
    ("text after the JSON document", "ignored", "400", "half of a request must not pass for a whole one"),
    ("`Inf` as a number", "taken", "400; `Infinity` is taken", "the parser of Python's standard library"),
    ("an integer beyond an int8, int16 or uint8 input", "wraps around", "400", "a wrong value, silently"),
    (
        "float16, bfloat16, uint16 and int4 in JSON",
        "not supported",
        "read and written (int4 written)",
        "a bfloat16 export can be asked by REST",
    ),
    (
        "bytes that are no UTF-8 in a string output whose name does not end in `_bytes`",
        "written raw: no valid JSON",
        "U+FFFD in their place",
        "a client's JSON parser must be able to read the answer",
    ),
    (
        "an input with a default left out of `instances` or `inputs`",
        "400 by REST (gRPC takes it)",
        "the default by both",
        "generate requests are short",
    ),
    ("an unknown name in an `inputs` object", "ignored", "400", "a misspelt option would be lost silently"),
    (
        "an empty list where the signature knows the other dimensions",
        "[0]",
        "[0, 3] for `[?, 3]`",
        "an empty batch can be answered",
    ),
    (
        "a verb or path in other case",
        "paths in any case, verbs in lower case",
        "both in any case",
        "nothing is lost by it",
    ),
    (
        "a `:classify` or `:regress` without `signature_name`, and `serving_default` does not fit",
        "400",
        "the only signature with that method name, and a warning in the log",
        "it is clear what is meant",
    ),
    ("a status asked by label", "all versions", "that version", "it is what was asked for"),
    (
        "batching: inputs of unequal length, scalars, shapes other than declared",
        "an error while `--enable_batching` is on",
        "run alone",
        "a request's answer does not depend on whether it was batched",
    ),
    (
        "`__saved_model_init_op` in the metadata of TensorFlow 2 models",
        "listed",
        "left out",
        "no request can be sent to it",
    ),
    (
        "a message above a limit",
        "2 GiB by gRPC, none by REST",
        "64 MiB (`--max-request-bytes`)",
        "one client must not take a server's memory",
    ),
    (
        "version 0 of a model that has none",
        "NOT_FOUND",
        "the newest",
        "`ovmsclient` asks for version 0 where none is given",
    ),
    ("`--rest_api_port=0`", "no REST", "a free port", "as servers of tests need"),
]
