"""TF Serving's model-server tests that start a server of their own: config files, sockets, gRPC's settings, Keras 2."""

import logging
import time

import click
import grpc
import numpy as np
import pytest
import requests
from google.protobuf import text_format
from tensorflow_serving.apis import predict_pb2, prediction_service_pb2_grpc

from tests.serving import upstream_models
from tests.serving.cases import protos
from tfvllm.cli import serve as cli
from tfvllm.errors import InputError
from tfvllm.serving.manager import ModelConfig
from tfvllm.serving.server import Options, Server


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("upstream")
    for name in ("default", "half_plus_three"):
        upstream_models.MODELS[name](folder / name / "00000123")
    return folder


def write(file, *configs):
    """A models.config of (name, folder[, more])."""
    texts = (
        f"config {{ name: '{name}' base_path: '{path}' model_platform: 'tensorflow' {' '.join(more)} }}"
        for name, path, *more in configs
    )
    file.write_text(f"model_config_list {{ {' '.join(texts)} }}")


def predict(server, model="default"):
    answer = requests.post(f"{server.rest_url}/v1/models/{model}:predict", json={"inputs": [2.0]}, timeout=20)
    return answer.json()["outputs"][0] if answer.ok else answer.status_code


def wait_for(condition, seconds=30.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come about"
        time.sleep(0.02)


def test_model_config_is_read_again(base, tmp_path, caplog):
    """testModelConfigReload; and a file that is broken, or names what is not there, changes nothing."""
    file = tmp_path / "models.config"
    write(file, ("half_plus_two", base / "default"))
    options = Options((), rest_port=0, poll_s=0, model_config_file=file, config_poll_s=0.05)
    with caplog.at_level(logging.INFO, "tfvllm.serving"), Server(options).in_thread() as server:
        assert predict(server, "half_plus_two") == 3.0
        file.write_text("model_config_list { config { nme: 'x' } }")
        wait_for(lambda: "is not served" in caplog.text)
        assert predict(server, "half_plus_two") == 3.0
        write(file, ("half_plus_three", base / "half_plus_three"))
        wait_for(lambda: predict(server, "half_plus_three") == 4.0)
        wait_for(lambda: predict(server, "half_plus_two") == 404)
        caplog.clear()
        labelled = "version_labels { key: 'canary' value: 7 }"
        write(file, ("half_plus_three", base / "half_plus_three", labelled))
        wait_for(lambda: "not currently available" in caplog.text)
        time.sleep(0.3)
        assert caplog.text.count("not currently available") == 1  # told once, though asked again and again
        assert predict(server, "half_plus_three") == 4.0
        write(file, ("a/b:c", base / "default"))
        wait_for(lambda: predict(server, "a%2Fb%3Ac") == 3.0)


def test_without_polling_the_config_stays(base, tmp_path):
    """testModelConfigReloadWithZeroPollPeriod."""
    file = tmp_path / "models.config"
    write(file, ("half_plus_two", base / "default"))
    with Server(Options((), rest_port=0, poll_s=0.05, model_config_file=file)).in_thread() as server:
        write(file, ("half_plus_three", base / "half_plus_three"))
        time.sleep(0.4)
        assert (predict(server, "half_plus_two"), predict(server, "half_plus_three")) == (3.0, 404)


def test_good_model_config(base, tmp_path):
    """testGoodModelConfig, beside a model of the command line."""
    file = tmp_path / "models.config"
    write(file, ("half_plus_two", base / "default"), ("half_plus_three", base / "half_plus_three"))
    options = Options([ModelConfig("mine", base / "default")], rest_port=0, poll_s=0, model_config_file=file)
    with Server(options).in_thread() as server:
        assert [predict(server, name) for name in ("mine", "half_plus_two", "half_plus_three")] == [3.0, 3.0, 4.0]


def ask(address, size=1):
    request = text_format.Parse(protos.spec("default", "", None), predict_pb2.PredictRequest())
    request.inputs["x"].dtype = 1
    request.inputs["x"].tensor_shape.dim.add(size=size)
    request.inputs["x"].float_val.extend([2.0] * size)
    with grpc.insecure_channel(address) as channel:
        return list(
            prediction_service_pb2_grpc.PredictionServiceStub(channel)
            .Predict(request, timeout=20)
            .outputs["y"]
            .float_val
        )


def test_unix_socket(base, tmp_path):
    """testPredictUDS: beside a port, and in its place."""
    path = tmp_path / "tf-serving.sock"
    models = [ModelConfig("default", base / "default")]
    for port in (0, None):
        options = Options(models, rest_port=0, grpc_port=port, poll_s=0, grpc_socket_path=path)
        with Server(options).in_thread() as server:
            assert ask(f"unix:{path}") == [3.0]
            assert (server.grpc_port is None) == (port is None)
            if port is not None:
                assert ask(f"127.0.0.1:{server.grpc_port}") == [3.0]
    too_long = tmp_path / ("x" * 120)
    with (
        pytest.raises(InputError, match="cannot make the socket"),
        Server(Options(models, rest_port=0, grpc_socket_path=too_long)).in_thread(),
    ):
        pass


def test_grpc_channel_arguments(base):
    """testGoodGrpcChannelArgs, and one whose effect shows."""
    models = [ModelConfig("default", base / "default")]
    arguments = cli._channel_arguments("grpc.max_connection_age_ms=2000,grpc.lb_policy_name=grpclb")
    assert arguments == {"grpc.max_connection_age_ms": 2000, "grpc.lb_policy_name": "grpclb"}
    with Server(
        Options(models, rest_port=0, grpc_port=0, poll_s=0, grpc_channel_arguments=arguments)
    ).in_thread() as it:
        assert ask(f"127.0.0.1:{it.grpc_port}") == [3.0]
    small = {"grpc.max_receive_message_length": 200}
    with Server(Options(models, rest_port=0, grpc_port=0, poll_s=0, grpc_channel_arguments=small)).in_thread() as it:
        assert ask(f"127.0.0.1:{it.grpc_port}") == [3.0]
        with pytest.raises(grpc.RpcError) as caught:
            ask(f"127.0.0.1:{it.grpc_port}", 100)
        assert caught.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED


def options_of(*arguments):
    context = cli.command.make_context("serve", list(arguments))
    return cli._options(context.params.pop("models"), context.params)


def test_tf_servings_own_flags_are_understood(base, tmp_path):
    file = tmp_path / "models.config"
    write(file, ("half_plus_two", base / "default"))
    options = options_of(
        "--port=8500",
        "--rest_api_port=8501",
        "--model_name=default",
        f"--model_base_path={base / 'default'}",
        f"--model_config_file={file}",
        "--model_config_file_poll_wait_seconds=60",
        "--file_system_poll_wait_seconds=5",
        "--grpc_socket_path=/tmp/a.sock",
        "--grpc_channel_arguments=grpc.max_connection_age_ms=2000",
        "--tensorflow_intra_op_parallelism=2",
        "--enable_batching",
        "--enable_signature_method_name_check",
        "--rest_api_enable_cors_support",
    )
    assert [model.name for model in options.models] == ["default"]
    assert (options.grpc_port, options.rest_port, options.poll_s, options.config_poll_s) == (8500, 8501, 5.0, 60.0)
    assert (options.model_config_file, str(options.grpc_socket_path)) == (file, "/tmp/a.sock")
    assert options.grpc_channel_arguments == {"grpc.max_connection_age_ms": 2000}
    assert (options.intra_op_threads, options.check_method_names, options.cors) == (2, True, True)
    plain = options_of(f"m={base / 'default'}", "--rest-port", "0")
    assert (plain.rest_port, plain.grpc_port, plain.check_method_names, plain.config_poll_s) == (0, None, False, 0.0)
    assert not plain.grpc_channel_arguments


def test_flags_that_are_wrong(base, tmp_path):
    """testBadModelConfig, and its like: one line, before anything is loaded."""
    file = tmp_path / "bad.config"
    file.write_text("improperly formatted file")
    for arguments, words in (
        ([f"--model_config_file={file}"], "bad.config:1"),
        ([f"--model_config_file={tmp_path / 'none'}"], "cannot read"),
        ([f"m={base / 'default'}", "--grpc_channel_arguments=grpc.x"], "expects NAME=VALUE"),
        ([], "nothing to serve"),
    ):
        with pytest.raises(InputError, match=words):
            options_of(*arguments)
    with pytest.raises(click.UsageError, match="No such option"):
        options_of("--prefer_tflite_model")


@pytest.mark.thorough
def test_keras_2_model_with_an_optimizer(tmp_path):
    """test_sequential_keras_saved_model_save, of a compiled and trained model: its slot variables are in the way of
    nobody who loads the graph alone."""
    upstream_models.keras_2(tmp_path / "default" / "00000123")
    models = [ModelConfig("default", tmp_path / "default")]
    with Server(Options(models, rest_port=0, grpc_port=0, poll_s=0)).in_thread() as server:
        answer = requests.post(
            f"{server.rest_url}/v1/models/default:predict", json={"instances": [[2.0], [-1.5]]}, timeout=20
        )
        assert answer.json() == {"predictions": [[2.0], [-1.5]]}
        request = predict_pb2.PredictRequest()
        text_format.Parse(protos.spec() + protos.floats("x", 2.0, 1, 1), request)
        with grpc.insecure_channel(f"127.0.0.1:{server.grpc_port}") as channel:
            found = prediction_service_pb2_grpc.PredictionServiceStub(channel).Predict(request, timeout=20)
        np.testing.assert_array_equal(found.outputs["y"].float_val, [2.0])


def test_predict_of_the_command_line_takes_any_shape_too(base, exports):
    from tfvllm.serving.run import predict as run

    assert run(base / "default", [], {"x": [1.0, 2.0, 5.0]}) == {"y": [2.5, 3.0, 4.5]}
    assert run(base / "half_plus_three", [], {"x": 1.0}) == {"y": 3.5}
    with pytest.raises(InputError, match=r"input 'a' has shape \[3\], the signature declares float32\[\?, 3\]"):
        run(exports / "many", [], {"a": [1, 2, 3], "b": [1]})
