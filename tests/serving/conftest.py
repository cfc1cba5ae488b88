"""One server for the tests of a file: a text classifier and a model with every kind of signature."""

import shutil

import pytest

from tests import tiny_models
from tfvllm.serving.core import Limits
from tfvllm.serving.manager import ModelConfig
from tfvllm.serving.server import Options, Server


@pytest.fixture(scope="session")
def classifier(text_classifier):
    """A tiny BERT text classifier."""
    return text_classifier


@pytest.fixture(scope="session")
def exports(tmp_path_factory, text_export):
    """A folder with `text/1` (an exported classifier) and `many/1`, `many/2` (factor 2 and 3)."""
    base = tmp_path_factory.mktemp("exports")
    shutil.copytree(text_export, base / "text" / "1")
    for number, factor in ((1, 2.0), (2, 3.0)):
        (base / "many" / str(number)).mkdir(parents=True)
        tiny_models.save_many(base / "many" / str(number), factor)
    return base


@pytest.fixture
def base(exports, tmp_path):
    """A copy of `exports` to change."""
    return shutil.copytree(exports, tmp_path / "models")


def models_of(base):
    return [
        ModelConfig("text", base / "text"),
        ModelConfig("many", base / "many", latest=None, labels={"stable": 1, "canary": 2}),
    ]


@pytest.fixture(scope="session")
def server(exports):
    """REST and gRPC on free ports."""
    limits = Limits(max_request_bytes=1 << 20, read_timeout_s=2.0, request_timeout_s=20.0)
    options = Options(models_of(exports), rest_port=0, grpc_port=0, limits=limits, poll_s=0)
    with Server(options).in_thread() as running:
        yield running


@pytest.fixture(scope="session")
def url(server):
    return f"{server.rest_url}/v1/models"
