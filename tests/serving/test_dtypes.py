"""Tensors of every dtype and shape, in and out, by REST and gRPC: scalar and empty strings, bytes, small numbers."""

import grpc
import numpy as np
import pytest
import requests
import tensorflow as tf
from tensorflow.core.framework import tensor_pb2
from tensorflow_serving.apis import predict_pb2, prediction_service_pb2_grpc

from tfvllm.serving import rpc
from tfvllm.serving.manager import ModelConfig
from tfvllm.serving.server import Options, Server

NUMBERS = [
    *("float16", "bfloat16", "float32", "float64", "bool", "complex64", "complex128"),
    *("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"),
]


def save(directory):
    def spec(shape, dtype):
        return tf.TensorSpec(shape, dtype, name="x")

    def upper(x):
        return {"y": tf.strings.upper(x)}

    small = tf.dtypes.experimental
    signatures = {
        "joined": (lambda x: {"y": tf.strings.reduce_join(x), "n": tf.size(x)}, spec([None], tf.string)),
        "joined_bytes": (lambda x: {"y_bytes": tf.strings.reduce_join(x)}, spec([None], tf.string)),
        "scalar": (upper, spec([], tf.string)),
        "upper": (upper, spec([None], tf.string)),
        "none": (lambda x: {"y": x[:0], "z": tf.zeros([0, 3], tf.string)}, spec([None], tf.string)),
        "int4": (
            lambda x: {
                "signed": tf.cast(tf.cast(x, tf.int8), small.int4),
                "unsigned": tf.cast(tf.cast(x, tf.uint8), small.uint4),
            },
            spec([None], tf.float32),
        ),
        "float8": (lambda x: {"y": tf.cast(x, small.float8_e5m2)}, spec([None], tf.float32)),
        "quantized": (lambda x: {"y": tf.quantization.quantize(x, -1.0, 1.0, tf.qint8)[0]}, spec([None], tf.float32)),
        "ragged": (
            lambda x: {"y": tf.RaggedTensor.from_row_lengths(x, [1, 1]), "n": tf.size(x)},
            spec([None], tf.float32),
        ),
        "variant": (
            lambda x: {"y": tf.data.experimental.to_variant(tf.data.Dataset.range(3))},
            spec([None], tf.float32),
        ),
        **{
            f"to_{dtype}": (lambda x, dtype=dtype: {"y": tf.cast(x, dtype)}, spec(None, tf.float32))
            for dtype in NUMBERS
        },
        **{f"from_{dtype}": (lambda x: {"y": tf.cast(x, tf.float64)}, spec([None], dtype)) for dtype in NUMBERS},
    }
    functions = {name: tf.function(call, input_signature=[given]) for name, (call, given) in signatures.items()}
    tf.saved_model.save(tf.Module(), str(directory), signatures=functions)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    base = tmp_path_factory.mktemp("dtypes")
    save(base / "m" / "1")
    with Server(Options([ModelConfig("m", base / "m")], rest_port=0, grpc_port=0, poll_s=0)).in_thread() as running:
        yield running


@pytest.fixture(scope="module")
def stub(server):
    with grpc.insecure_channel(f"127.0.0.1:{server.grpc_port}") as channel:
        yield prediction_service_pb2_grpc.PredictionServiceStub(channel)


def rest(server, signature, form="inputs", **values):
    body = {"signature_name": signature, form: values["x"]}
    return requests.post(f"{server.rest_url}/v1/models/m:predict", json=body, timeout=20)


def ask(stub, signature, x, *outputs):
    request = predict_pb2.PredictRequest(output_filter=outputs)
    request.model_spec.name, request.model_spec.signature_name = "m", signature
    request.inputs["x"].CopyFrom(x if isinstance(x, tensor_pb2.TensorProto) else tf.make_tensor_proto(x))
    return stub.Predict(request, timeout=20).outputs


@pytest.mark.parametrize(("given", "joined"), [(["a", "b"], "ab"), ([], ""), (["你", "好"], "你好")])
def test_scalar_string_out(server, stub, given, joined):
    assert rest(server, "joined", x=given).json() == {"outputs": {"n": len(given), "y": joined}}
    outputs = ask(stub, "joined", np.array([text.encode() for text in given], object))
    assert (outputs["y"].string_val, len(outputs["y"].tensor_shape.dim)) == ([joined.encode()], 0)
    assert outputs["y"].HasField("tensor_shape")
    row = rest(server, "joined", "instances", x=given or ["a"])
    assert (row.status_code, "has no shape information" in row.json()["error"]) == (400, True)


def test_scalar_bytes_out(server, stub):
    assert rest(server, "joined_bytes", x=[{"b64": "/wA="}, "a"]).json() == {"outputs": {"b64": "/wBh"}}
    assert ask(stub, "joined_bytes", np.array([b"\xff\x00", b"a"], object))["y_bytes"].string_val == [b"\xff\x00a"]
    assert rest(server, "joined", x=[{"b64": "/w=="}]).json() == {"outputs": {"n": 1, "y": "\ufffd"}}


def test_scalar_string_in(server, stub):
    assert rest(server, "scalar", x="abc").json() == {"outputs": "ABC"}
    assert rest(server, "scalar", x="").json() == {"outputs": ""}
    assert rest(server, "scalar", x={"b64": "YWJj"}).json() == {"outputs": "ABC"}
    assert ask(stub, "scalar", np.array(b"abc", object))["y"].string_val == [b"ABC"]
    assert rest(server, "scalar", x=["a", "b"]).json() == {"outputs": ["A", "B"]}  # the graph takes any shape
    assert rest(server, "upper", x="abc").json() == {"outputs": "ABC"}


def test_empty_strings_and_no_strings(server, stub):
    assert rest(server, "upper", x=[]).json() == {"outputs": []}
    assert rest(server, "upper", x=["", "a"]).json() == {"outputs": ["", "A"]}
    assert rest(server, "none", x=["a"]).json() == {"outputs": {"y": [], "z": []}}
    assert rest(server, "none", "instances", x=["a"]).json() == {"predictions": []}
    outputs = ask(stub, "none", np.array([b"a"], object))
    assert [dim.size for dim in outputs["z"].tensor_shape.dim] == [0, 3]
    assert (outputs["z"].dtype, list(outputs["z"].string_val)) == (tf.string.as_datatype_enum, [])
    assert list(ask(stub, "upper", np.array([], object))["y"].string_val) == []


@pytest.mark.parametrize("dtype", NUMBERS)
def test_numbers_out(server, stub, dtype):
    answer = rest(server, f"to_{dtype}", x=[1.0, 0.0])
    if dtype.startswith("complex"):
        assert answer.status_code == 400
        assert f"Failed to write JSON value for tensor type: {dtype}" in answer.json()["error"]
    else:
        assert answer.json() == {"outputs": [True, False] if dtype == "bool" else [1, 0]}
    for given in ([1.0, 0.0], [], 1.0, [[1.0], [0.0]]):
        found = tf.make_ndarray(ask(stub, f"to_{dtype}", np.array(given, np.float32))["y"])
        np.testing.assert_array_equal(found, tf.cast(np.array(given, np.float32), dtype).numpy(), strict=True)


@pytest.mark.parametrize("dtype", NUMBERS)
def test_numbers_in(server, stub, dtype):
    given = [True, False] if dtype == "bool" else [1, 0]
    answer = rest(server, f"from_{dtype}", x=given)
    if dtype.startswith("complex"):
        assert answer.status_code == 400
        assert f"type {dtype}" in answer.json()["error"]
    else:
        assert answer.json() == {"outputs": [1.0, 0.0]}
    sent = tf.constant([1, 0]) if dtype != "bool" else tf.constant([True, False])
    proto = rpc.to_proto(tf.cast(sent, dtype).numpy())
    assert list(ask(stub, f"from_{dtype}", proto)["y"].double_val) == [1.0, 0.0]
    assert not proto.tensor_content  # typed fields, as TF Serving answers


def test_four_and_eight_bits(server, stub):
    assert rest(server, "int4", x=[7.0, 0.0]).json() == {"outputs": {"signed": [7, 0], "unsigned": [7, 0]}}
    assert rest(server, "float8", x=[1.5, -2.0]).json() == {"outputs": [1.5, -2.0]}
    outputs = ask(stub, "int4", np.array([-3.0, 5.0], np.float32), "signed")
    assert list(outputs["signed"].int_val) == [-3, 5]
    assert tf.make_ndarray(ask(stub, "float8", np.array([1.5], np.float32))["y"]).astype(float).tolist() == [1.5]


@pytest.mark.parametrize("signature", ["ragged", "variant", "quantized"])
def test_what_cannot_be_answered_is_told(server, stub, signature):
    answer = rest(server, signature, x=[1.0, 2.0])
    assert answer.status_code == 501
    assert "cannot be sent or answered" in answer.json()["error"]
    with pytest.raises(grpc.RpcError) as caught:
        ask(stub, signature, np.ones(2, np.float32))
    assert caught.value.code() == grpc.StatusCode.UNIMPLEMENTED
    assert ask(stub, "ragged", np.ones(2, np.float32), "n")["n"].int_val == [2]  # its other outputs can
