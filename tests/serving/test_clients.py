"""Other people's clients of TF Serving against `tfvllm serve`: ovmsclient, min-tfs-client and KServe's for protocol V1.

Each is installed from PyPI into a virtual environment of its own: they hold protobuf to versions this one does not
have, and min-tfs-client brings a package named tensorflow.
"""

import json
import os
import subprocess
import venv

import pytest

from tests.serving import upstream_models
from tfvllm.serving.manager import ModelConfig
from tfvllm.serving.server import Options, Server

OVMS = """
import json, sys
import numpy as np
import ovmsclient
rest, grpc = sys.argv[1:]
for client in (ovmsclient.make_grpc_client(grpc), ovmsclient.make_http_client(rest)):
    x = np.array([1.0, 2.0, 5.0], np.float32)
    answers = [client.predict({"x": x}, "default").tolist(), client.predict({"x": x}, "default", 123).tolist()]
    if "Grpc" in type(client).__name__:
        texts = client.predict({"text": [b"a", b"\\xff"]}, "text").tolist()
        answers.append([text.hex() for text in texts])
    status = client.get_model_status("default")
    metadata = client.get_model_metadata("default", 123)
    try:
        client.predict({"x": x}, "none")
        error = ""
    except ovmsclient.ModelNotFoundError as caught:
        error = "not found"
    try:
        client.predict({"y": x}, "default")
    except ovmsclient.InvalidInputError as caught:
        error += ", invalid input"
    print(json.dumps([answers, {str(k): v["state"] for k, v in status.items()}, metadata, error]))
"""
MIN_TFS = """
import json, sys
import numpy as np
from min_tfs_client.requests import TensorServingClient
from min_tfs_client.tensors import tensor_proto_to_ndarray
rest, grpc = sys.argv[1:]
host, port = grpc.split(":")
client = TensorServingClient(host=host, port=int(port))
x = np.array([1.0, 2.0, 5.0], np.float32)
latest = client.predict_request("default", {"x": x})
version = client.predict_request("default", {"x": x[:, None]}, model_version=123)
texts = client.predict_request("text", {"text": np.array(["a", "bc"])})
found = [tensor_proto_to_ndarray(answer.outputs["y"]) for answer in (latest, version, texts)]
print(json.dumps([found[0].tolist(), found[1].tolist(), [str(text) for text in found[2].tolist()]]))
"""
KSERVE = """
import asyncio, json, sys
from kserve import InferenceRESTClient, RESTConfig
rest, grpc = sys.argv[1:]
async def main():
    client = InferenceRESTClient(RESTConfig(protocol="v1"))
    url = f"http://{rest}"
    rows = await client.infer(url, {"instances": [1.0, 2.0, 5.0]}, model_name="default")
    columns = await client.infer(url, {"inputs": {"x": [2.0]}}, model_name="default")
    live = await client.is_server_live(url)
    try:
        await client.infer(url, {"instances": [1.0]}, model_name="none")
        error = None
    except Exception as caught:
        error = caught.response.status_code
    print(json.dumps([rows, columns, live, error]))
asyncio.run(main())
"""


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    import tensorflow as tf

    base = tmp_path_factory.mktemp("clients")
    upstream_models.half_plus_two(base / "default" / "00000123")
    spec = tf.TensorSpec([None], tf.string, name="text")
    copy = tf.function(lambda text: {"y": text}, input_signature=[spec])
    tf.saved_model.save(tf.Module(), str(base / "text" / "1"), signatures={"serving_default": copy})
    models = [ModelConfig(name, base / name) for name in ("default", "text")]
    with Server(Options(models, rest_port=0, grpc_port=0, poll_s=0)).in_thread() as running:
        yield running


def run(server, folder, packages, script):
    """Runs `script` in an environment with `packages`; returns what it printed, line by line."""
    venv.create(folder, with_pip=True)
    python = folder / "bin" / "python"
    installed = subprocess.run(
        [python, "-m", "pip", "install", "-q", "--disable-pip-version-check", *packages],
        capture_output=True,
        text=True,
        timeout=1500,
    )
    if installed.returncode:
        pytest.skip(f"{' '.join(packages)} cannot be installed here: {installed.stderr.strip().splitlines()[-1]}")
    variables = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    addresses = [f"127.0.0.1:{server.rest_port}", f"127.0.0.1:{server.grpc_port}"]
    done = subprocess.run(
        [python, "-c", script, *addresses], capture_output=True, text=True, timeout=120, env=variables, cwd=folder
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[")]


@pytest.mark.thorough
def test_ovmsclient(server, tmp_path):
    by_grpc, by_rest = run(server, tmp_path / "env", ["ovmsclient==2023.1"], OVMS)
    for answers, status, _, error in (by_grpc, by_rest):
        assert answers[:2] == [[2.5, 3.0, 4.5]] * 2
        assert status == {"123": "AVAILABLE"}
        assert error == "not found, invalid input"
    assert by_grpc[0][2] == ["61", "ff"]
    assert by_grpc[2]["inputs"] == {"x": {"shape": [-1, 1], "dtype": "DT_FLOAT"}}
    # By REST it reads OpenVINO's spelling of the keys alone, and hands TF Serving's over as it came.
    assert sorted(by_rest[2]["metadata"]["signature_def"]["signature_def"])[-1] == "serving_default"


@pytest.mark.thorough
def test_min_tfs_client(server, tmp_path):
    # Its messages are of 2020: later releases of protobuf do not read them.
    (found,) = run(server, tmp_path / "env", ["min-tfs-client==1.0.2", "protobuf<3.21"], MIN_TFS)
    assert found == [[2.5, 3.0, 4.5], [[2.5], [3.0], [4.5]], ["a", "bc"]]


@pytest.mark.slow  # its requirements take a minute to install
def test_kserve(server, tmp_path):
    # `is_model_ready` asks for a key that TF Serving's status does not have.
    (found,) = run(server, tmp_path / "env", ["kserve>=0.15"], KSERVE)
    assert found == [{"predictions": [2.5, 3.0, 4.5]}, {"outputs": [3.0]}, True, 404]
