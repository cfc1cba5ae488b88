"""The load generator measures what it says: rates, percentiles, failures; and it loads this machine only."""

import asyncio
import json

import pytest
from click.testing import CliRunner

from tfvllm.bench import serve as bench
from tfvllm.errors import InputError


def client(seconds=0.0, problem="", slow_every=None):
    """A client whose answers take `seconds` (every `slow_every`th: ten times that)."""
    asked = []

    async def make():
        async def ask(number):
            asked.append(number)
            await asyncio.sleep(seconds * (10 if slow_every and len(asked) % slow_every == 0 else 1))
            return problem

        async def close():
            asked.append("closed")

        return ask, close

    return make, asked


def run(make, **options):
    return asyncio.run(bench.load(make, seconds=1.0, warmup_s=0.0, **options))


def test_closed_clients():
    make, asked = client(0.02)
    result = run(make, clients=4)
    assert 19 <= result.p50_ms <= 60
    assert result.per_second == pytest.approx(result.requests / result.seconds, rel=1e-6)
    assert result.per_second <= 4 / 0.02
    assert asked.count("closed") == 4


def test_constant_arrivals_keep_their_rate():
    make, _ = client(0.001)
    result = run(make, clients=8, arrivals="constant", rate=50)
    assert 40 <= result.requests <= 50


def test_poisson_arrivals_vary_and_repeat_with_the_seed():
    import itertools
    import random

    gaps = [list(itertools.islice(bench._gaps("poisson", 100, random.Random(3)), 4000)) for _ in range(2)]
    assert gaps[0] == gaps[1]
    mean = sum(gaps[0]) / len(gaps[0])
    assert mean == pytest.approx(0.01, rel=0.05)
    spread = (sum((gap - mean) ** 2 for gap in gaps[0]) / len(gaps[0])) ** 0.5
    assert spread == pytest.approx(mean, rel=0.1)  # an exponential's spread is its mean


def test_a_stall_cannot_hide():
    """One connection, 50 requests/s, each taking 50 ms: those due while others are served wait, and that counts."""
    make, _ = client(0.05)
    result = run(make, clients=1, arrivals="constant", rate=50)
    assert result.max_ms > 500


def test_failures_are_counted_apart():
    make, _ = client(0.001, problem="HTTP 503")
    result = run(make, clients=2)
    assert result.failed == result.requests > 0
    assert result.per_second == 0
    assert result.errors == {"HTTP 503": result.failed}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"arrivals": "constant"}, "need --rate"),
        ({"rate": 5}, "need --rate"),
        ({"arrivals": "bursty"}, "arrivals must be"),
    ],
)
def test_wrong_options(options, words):
    with pytest.raises(InputError, match=words):
        run(client()[0], **options)


def test_other_machines_are_refused(tmp_path):
    for target in ("http://192.0.2.1:8501/v1/models/x", "http://example.org/v1/models/x"):
        result = CliRunner().invoke(bench.command, [target])
        assert isinstance(result.exception, InputError)
        assert "this machine only" in str(result.exception)
    result = CliRunner().invoke(bench.command, [str(tmp_path / "no")])
    assert "no folder" in str(result.exception)


def test_command_against_a_running_server(url):
    arguments = [f"{url}/text", "--clients", "2", "--seconds", "0.5", "--rounds", "1", "--rows", "3", "--json"]
    result = CliRunner().invoke(bench.command, arguments, standalone_mode=False)
    document = json.loads(result.stdout)
    measured = document["results"][f"{url}/text"]
    assert measured["failed"] == 0
    assert measured["requests"] > 0
    assert measured["rows_per_second"] == pytest.approx(3 * measured["per_second"])
    assert 0 < measured["p50_ms"] <= measured["p95_ms"] <= measured["p99_ms"] <= measured["max_ms"]


def test_wrong_requests_are_reported(url):
    arguments = [
        f"{url}/many",
        "--clients",
        "1",
        "--seconds",
        "0.3",
        "--rounds",
        "1",
    ]  # texts, to a model that wants none
    result = CliRunner().invoke(bench.command, arguments, standalone_mode=False)
    assert "HTTP 400" in result.stdout
    assert result.return_value == 1


def test_grpc_client(server):
    import numpy as np

    batch = {"text": np.array([b"good", b"not good"], object)}
    make = bench.grpc_client(f"127.0.0.1:{server.grpc_port}", "text", [batch])
    result = asyncio.run(bench.load(make, clients=2, seconds=0.5, warmup_s=0.2))
    assert result.failed == 0
    assert result.requests > 0
    with pytest.raises(InputError, match="this machine only"):
        bench.grpc_client("192.0.2.1:8500", "text", [batch])
