"""The server as a whole: hot reload without a lost request, dead workers, limits, TLS, authentication, shutdown."""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import grpc
import numpy as np
import pytest
import requests
import tensorflow as tf
from google.protobuf import text_format
from tensorflow_serving.apis import (
    model_management_pb2,
    model_service_pb2_grpc,
    predict_pb2,
    prediction_service_pb2_grpc,
)

from tests import tiny_models
from tfvllm.errors import InputError
from tfvllm.savedmodel import versions
from tfvllm.serving.batching import BatchingOptions
from tfvllm.serving.core import Limits
from tfvllm.serving.manager import ModelConfig
from tfvllm.serving.server import Options, Server

GOOD = {"instances": [{"a": [1, 2, 3], "b": 4}]}


def many(base, **options):
    return Options([ModelConfig("many", base / "many")], rest_port=0, **{"poll_s": 0.05, **options})


def total(server, path="many"):
    answer = requests.post(f"{server.rest_url}/v1/models/{path}:predict", json=GOOD, timeout=20)
    return answer.json()["predictions"][0]["sum"] if answer.ok else answer.status_code


def wait_for(condition, seconds=30.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come about"
        time.sleep(0.02)


class Load:
    """Clients that ask without a pause and keep every answer."""

    def __init__(self, server, clients=2):
        self.server, self.answers, self.errors = server, [], []
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._ask) for _ in range(clients)]

    def _ask(self):
        session = requests.Session()
        while not self._stop.is_set():
            try:
                answer = session.post(f"{self.server.rest_url}/v1/models/many:predict", json=GOOD, timeout=20)
                self.answers.append((answer.status_code, answer.json()["predictions"][0]["sum"]))
            except Exception as error:
                self.errors.append(repr(error))

    def __enter__(self):
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_):
        self._stop.set()
        for thread in self._threads:
            thread.join()


def test_new_version_rollback_and_no_request_lost(base):
    with Server(many(base)).in_thread() as server, Load(server) as load:
        wait_for(lambda: len(load.answers) > 20)
        assert total(server) == 18.0
        tiny_models.save_many(base / "new", 5.0)
        published = versions.publish(base / "new", base / "many")
        assert published.name == "3"
        wait_for(lambda: total(server) == 30.0)
        versions.rollback(base / "many")
        wait_for(lambda: total(server) == 18.0)
        states = requests.get(f"{server.rest_url}/v1/models/many", timeout=20).json()["model_version_status"]
        wait_for(
            lambda: (
                requests.get(f"{server.rest_url}/v1/models/many/versions/3", timeout=20).json()["model_version_status"][
                    0
                ]["state"]
                == "END"
            )
        )
    assert [entry["version"] for entry in states][:2] == ["3", "2"]
    assert not load.errors
    assert {status for status, _ in load.answers} == {200}
    assert {value for _, value in load.answers} == {18.0, 30.0}


def test_broken_version_leaves_the_old_one_serving(base):
    with Server(many(base)).in_thread() as server:
        (base / "many" / "3").mkdir()
        (base / "many" / "3" / "saved_model.pb").write_bytes(b"no such thing")
        url = f"{server.rest_url}/v1/models/many/versions/3"
        wait_for(lambda: requests.get(url, timeout=20).status_code == 200)
        wait_for(lambda: requests.get(url, timeout=20).json()["model_version_status"][0]["state"] == "END")
        entry = requests.get(url, timeout=20).json()["model_version_status"][0]
        assert entry["status"]["error_code"] != "OK"
        assert "does not load" in entry["status"]["error_message"]
        assert total(server) == 18.0
        shutil.rmtree(base / "many" / "3")
        shutil.copytree(base / "many" / "1", base / "many" / "3")  # mended: tried again, as the file has changed
        wait_for(lambda: total(server) == 12.0)


def test_vanished_folder_keeps_the_last_version(base):
    with Server(many(base)).in_thread() as server:
        shutil.rmtree(base / "many")
        time.sleep(0.3)
        assert total(server) == 18.0


def test_reload_over_grpc(base):
    with Server(many(base, grpc_port=0)).in_thread() as server:
        request = model_management_pb2.ReloadConfigRequest()
        text_format.Parse(
            f"""model_config_list {{
                  config {{ name: 'renamed' base_path: '{base}/many' model_platform: 'tensorflow'
                            model_version_policy {{ specific {{ versions: 1 versions: 2 }} }}
                            version_labels {{ key: 'old' value: 1 }} }}
                  config {{ name: 'text' base_path: '{base}/text' }} }}""",
            request.config,
        )
        with grpc.insecure_channel(f"127.0.0.1:{server.grpc_port}") as channel:
            model_service_pb2_grpc.ModelServiceStub(channel).HandleReloadConfigRequest(request, timeout=60)
        assert total(server, "renamed") == 18.0
        assert total(server, "renamed/labels/old") == 12.0
        wait_for(lambda: total(server) == 404)
        text = requests.post(f"{server.rest_url}/v1/models/text:predict", json={"instances": ["good"]}, timeout=20)
        assert text.status_code == 200


@pytest.mark.slow
def test_a_dead_worker_loses_nothing(base):
    with Server(many(base, workers=2)).in_thread() as server, Load(server, clients=3) as load:
        pool = server.core.executor
        wait_for(lambda: len(load.answers) > 50)
        before = set(pool.pids)
        assert len(before) == 2
        os.kill(min(before), signal.SIGKILL)
        wait_for(lambda: len(pool.pids) == 2 and set(pool.pids) != before, 60)
        count = len(load.answers)
        wait_for(lambda: len(load.answers) > count + 50)
        tiny_models.save_many(base / "new", 5.0)
        versions.publish(base / "new", base / "many")  # the new worker takes part in a reload as well
        wait_for(lambda: total(server) == 30.0, 60)
        assert {total(server) for _ in range(20)} == {30.0}
    assert not load.errors
    assert {status for status, _ in load.answers} == {200}


@pytest.mark.slow
def test_all_workers_dead_at_once(base):
    with Server(many(base, workers=1)).in_thread() as server:
        assert total(server) == 18.0
        os.kill(server.core.executor.pids[0], signal.SIGKILL)
        assert total(server) == 18.0  # waits for the next worker


def test_queue_limit_is_429(base):
    limits = Limits(max_queued=2)
    batching = BatchingOptions(max_batch_size=1)
    with Server(many(base, limits=limits, slots=1, batching=batching, poll_s=0)).in_thread() as server:
        run, codes = server.core.executor.run, []

        async def slow(*arguments):
            import asyncio

            await asyncio.sleep(0.3)
            return await run(*arguments)

        server.core.executor.run = slow
        threads = [threading.Thread(target=lambda: codes.append(total(server))) for _ in range(10)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        server.core.executor.run = run
        assert sorted(set(codes)) == [18.0, 429]
        assert codes.count(18.0) >= 3
        assert total(server) == 18.0


def test_slow_run_is_504(base):
    with Server(many(base, limits=Limits(request_timeout_s=0.2), poll_s=0)).in_thread() as server:
        run = server.core.executor.run

        async def slow(*arguments):
            import asyncio

            await asyncio.sleep(1.0)
            return await run(*arguments)

        server.core.executor.run = slow
        assert total(server) == 504
        server.core.executor.run = run
        wait_for(lambda: total(server) == 18.0)


def raw(server, data: bytes, wait: float = 5.0) -> bytes:
    with socket.create_connection(("127.0.0.1", server.rest_port), timeout=wait) as connection:
        connection.sendall(data)
        with contextlib.suppress(TimeoutError):
            return connection.recv(65536)
    return b""


def test_slow_and_vanishing_clients(base):
    with Server(
        many(base, limits=Limits(read_timeout_s=0.5, max_request_bytes=10_000), poll_s=0)
    ).in_thread() as server:
        path = b"POST /v1/models/many:predict HTTP/1.1\r\nHost: x\r\n"
        assert b" 408 " in raw(server, path + b"Content-Length: 100\r\n\r\n{")  # a body that never comes
        assert raw(server, path) == b""  # headers that never end: closed
        assert b" 413 " in raw(server, path + b"Content-Length: 99999\r\n\r\n")
        assert b" 413 " in raw(
            server, path + b"Transfer-Encoding: chunked\r\n\r\n" + b"3000\r\n" + b"x" * 0x3000 + b"\r\n"
        )
        assert b" 400 " in raw(server, b"nonsense\r\n\r\n")
        for _ in range(20):  # connections dropped in the middle of a body, and before the answer
            with socket.create_connection(("127.0.0.1", server.rest_port)) as connection:
                connection.sendall(path + b"Content-Length: 100\r\n\r\n{")
            body = json.dumps(GOOD).encode()
            with socket.create_connection(("127.0.0.1", server.rest_port)) as connection:
                connection.sendall(path + b"Content-Length: %d\r\n\r\n%s" % (len(body), body))
        assert total(server) == 18.0


def test_token_and_basic_auth(base):
    options = many(base, grpc_port=0, token="s3cret-tökén", basic_auth="ann:pässword", poll_s=0)
    with Server(options).in_thread() as server:
        url = f"{server.rest_url}/v1/models/many"
        refused = requests.get(url, timeout=20)
        assert refused.status_code == 401
        assert "Bearer" in refused.headers["WWW-Authenticate"]
        bearer = {"Authorization": "Bearer s3cret-tökén".encode()}
        assert requests.get(url, headers=bearer, timeout=20).status_code == 200
        assert requests.get(url, headers={"Authorization": "Bearer wrong"}, timeout=20).status_code == 401
        assert requests.get(url, auth=(b"ann", "pässword".encode()), timeout=20).status_code == 200
        assert requests.get(url, auth=("ann", "wrong"), timeout=20).status_code == 401
        assert requests.get(url, headers={"Authorization": "Basic ???"}, timeout=20).status_code == 401
        assert requests.get(f"{server.rest_url}/readyz", timeout=20).status_code == 200
        assert requests.get(f"{server.rest_url}/monitoring/prometheus/metrics", timeout=20).status_code == 401
        request = predict_pb2.PredictRequest()
        request.model_spec.name = "many"
        request.inputs["a"].CopyFrom(tf.make_tensor_proto(np.ones((1, 3), np.float32)))
        request.inputs["b"].CopyFrom(tf.make_tensor_proto(np.ones(1, np.int32)))
        with grpc.insecure_channel(f"127.0.0.1:{server.grpc_port}") as channel:
            stub = prediction_service_pb2_grpc.PredictionServiceStub(channel)
            with pytest.raises(grpc.RpcError) as caught:
                stub.Predict(request, timeout=20)
            assert caught.value.code() == grpc.StatusCode.UNAUTHENTICATED
            basic = requests.auth._basic_auth_str(b"ann", "pässword".encode())
            answer = stub.Predict(request, timeout=20, metadata=[("authorization", basic)])
            assert list(answer.outputs["sum"].float_val) == [9.0]


@pytest.fixture(scope="module")
def certificate(tmp_path_factory):
    """A self-signed certificate for 127.0.0.1, made by openssl."""
    folder = tmp_path_factory.mktemp("tls")
    if shutil.which("openssl") is None:
        pytest.skip("openssl is not installed")
    command = "openssl req -x509 -newkey rsa:2048 -nodes -keyout key.pem -out cert.pem -days 2 -subj /CN=localhost"
    extension = ["-addext", "subjectAltName=IP:127.0.0.1,DNS:localhost"]
    subprocess.run([*command.split(), *extension], cwd=folder, check=True, capture_output=True)
    return folder


def test_tls(base, certificate):
    cert, key = certificate / "cert.pem", certificate / "key.pem"
    with Server(many(base, grpc_port=0, certificate=cert, key=key, poll_s=0)).in_thread() as server:
        assert server.rest_url.startswith("https://")
        url = f"{server.rest_url}/v1/models/many:predict"
        assert requests.post(url, json=GOOD, verify=str(cert), timeout=20).json()["predictions"][0]["sum"] == 18.0
        with pytest.raises(requests.exceptions.SSLError):
            requests.post(url, json=GOOD, timeout=20)
        with pytest.raises(requests.exceptions.ConnectionError):
            requests.post(url.replace("https", "http"), json=GOOD, timeout=20)
        credentials = grpc.ssl_channel_credentials(cert.read_bytes())
        with grpc.secure_channel(f"localhost:{server.grpc_port}", credentials) as channel:
            assert channel.unary_unary("/grpc.health.v1.Health/Check")(b"", timeout=20) == b"\x08\x01"


def test_mutual_tls(base, certificate):
    cert, key = certificate / "cert.pem", certificate / "key.pem"
    with Server(many(base, certificate=cert, key=key, client_ca=cert, poll_s=0)).in_thread() as server:
        url = f"{server.rest_url}/v1/models/many:predict"
        pair = (str(cert), str(key))
        assert requests.post(url, json=GOOD, verify=str(cert), cert=pair, timeout=20).status_code == 200
        with pytest.raises(requests.exceptions.ConnectionError):
            requests.post(url, json=GOOD, verify=str(cert), timeout=20)


def test_shutdown_answers_what_is_under_way(base):
    options = many(base, poll_s=0)
    codes = []
    with Server(options).in_thread() as server:
        run = server.core.executor.run

        async def slow(*arguments):
            import asyncio

            await asyncio.sleep(0.5)
            return await run(*arguments)

        server.core.executor.run = slow
        threads = [threading.Thread(target=lambda: codes.append(total(server))) for _ in range(4)]
        for thread in threads:
            thread.start()
        time.sleep(0.25)
    for thread in threads:
        thread.join()
    assert codes == [18.0] * 4
    with pytest.raises(requests.exceptions.ConnectionError):
        requests.get(f"{server.rest_url}/healthz", timeout=5)


def test_replicas_hold_no_state(base):
    """Two servers on one folder answer alike; when one stops, a client that tries the next loses nothing."""
    with Server(many(base)).in_thread() as first:
        urls, answers = [first.rest_url], []

        def ask():
            for url in list(urls):
                with contextlib.suppress(requests.exceptions.ConnectionError):
                    return requests.post(f"{url}/v1/models/many:predict", json=GOOD, timeout=20).json()
            raise AssertionError("no replica answered")

        with Server(many(base)).in_thread() as second:
            urls.insert(0, second.rest_url)
            answers += [ask() for _ in range(5)]
            urls.reverse()
            answers += [ask() for _ in range(5)]
            urls.reverse()
        answers += [ask() for _ in range(5)]  # the second is gone, and is asked first
        assert answers == [{"predictions": [{"sum": 18.0, "twice": 8}]}] * 15


def test_startup_errors_are_told(base, tmp_path):
    for models, words in (
        ([ModelConfig("many", tmp_path)], "no version folder"),
        ([ModelConfig("", base / "many")], "name is empty"),
        ([ModelConfig("m", base / "many"), ModelConfig("m", base / "text")], "two models are named"),
    ):
        with pytest.raises(InputError, match=words), Server(Options(models, rest_port=0)).in_thread():
            pass
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        for options in (replace(many(base), rest_port=port), replace(many(base), grpc_port=port)):
            with pytest.raises(InputError, match=f"cannot listen on 127.0.0.1:{port}"), Server(options).in_thread():
                pass


@pytest.mark.slow
def test_command_line(base, tmp_path):
    """The real command: it greets, answers, and SIGTERM stops it cleanly; no TensorFlow noise."""
    config = tmp_path / "models.config"
    config.write_text(
        f"model_config_list {{ config {{ name: 'old' base_path: '{base}/many' "
        "model_version_policy { specific { versions: 1 } } } }"
    )
    parameters = tmp_path / "batching.txt"
    parameters.write_text(
        "max_batch_size { value: 8 } batch_timeout_micros { value: 500 } num_batch_threads { value: 1 }"
    )
    command = [sys.executable, "-m", "tfvllm", "serve", f"many={base / 'many'}", "--rest-port", "0"]
    command += ["--model-config-file", str(config), "--batching-parameters-file", str(parameters)]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("TF_CPP")}
    root = Path(__file__).parents[2]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=root, env=environment)
    try:
        lines = []
        for line in process.stderr:
            lines.append(line)
            if line.startswith("Serving many, old at "):
                break
        url = lines[-1].split(" at ")[1].split()[0].rstrip(".")
        assert requests.post(f"{url}/many:predict", json=GOOD, timeout=20).json()["predictions"][0]["sum"] == 18.0
        assert requests.post(f"{url}/old:predict", json=GOOD, timeout=20).json()["predictions"][0]["sum"] == 12.0
    finally:
        process.send_signal(signal.SIGTERM)
        rest = process.stderr.read()
        assert process.wait(30) == 0
    text = "".join(lines) + rest
    assert "stopping" in text
    assert not [line for line in text.splitlines() if "absl" in line or "cuda" in line.lower() or "WARNING" in line]


@pytest.mark.slow
def test_versions_that_come_and_go_give_their_memory_back(base):
    """Two models, twelve new versions of one: each answers as it should, and what is unloaded takes no memory."""
    models = [
        ModelConfig("many", base / "many", latest=2, labels={"stable": 2}),
        ModelConfig("text", base / "text"),
    ]
    sizes = []
    with Server(Options(models, rest_port=0, poll_s=0.05)).in_thread() as server:
        for number in range(3, 15):
            tiny_models.save_many(base / f"new{number}", float(number))
            versions.publish(base / f"new{number}", base / "many")
            wait_for(lambda wanted=6.0 * number: total(server) == wanted)
            previous = 6.0 * (number - 1) if number > 3 else 18.0
            assert total(server, f"many/versions/{number - 1}") == previous
            wait_for(lambda gone=number - 2: total(server, f"many/versions/{gone}") == 404)
            text = requests.post(f"{server.rest_url}/v1/models/text:predict", json={"instances": ["good"]}, timeout=20)
            assert text.status_code == 200
            sizes.append(int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20)
        assert total(server, "many/labels/stable") == 404  # its version has gone
        assert versions.rollback(base / "many") == [14]
        wait_for(lambda: total(server) == 6.0 * 13)
        assert total(server, "many/versions/12") == 6.0 * 12  # the last two of what is left
    print(f"{sizes[3]:.0f} -> {sizes[-1]:.0f} MiB over eight versions")
    assert sizes[-1] < sizes[3] + 40
