"""`tfvllm bench serve`: requests per second and latency percentiles of a TF Serving-compatible address here.

The clients are coroutines that speak just enough HTTP/1.1 (or gRPC's own client), in a process of their own, so that
they take little from the server they measure. Arrivals are closed (each of N clients asks again when it has its
answer), constant, or Poisson; with an open arrival rate a latency counts from when the request was due, not from when
it could be sent, so that a server that stalls cannot hide it.
"""

import asyncio
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
import urllib.parse
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import click
import numpy as np

from tfvllm.errors import InputError, TfvllmError
from tfvllm.quietly import import_tensorflow
from tfvllm.serving import loop

Ask = Callable[[int], Awaitable[str]]  # number of the request -> "" or what went wrong

SENTENCES = (
    "a fine and moving film",
    "not bad at all",
    "the plot fails and nobody seems to have cared",
    "it is slow, it is long, and I would not have missed a minute of it",
    "dull",
)


@dataclass
class LoadResult:
    """What a load run measured. Latencies are in ms; `rate` is the arrival rate asked for (None: closed clients)."""

    label: str
    arrivals: str
    clients: int
    rate: float | None
    seconds: float
    requests: int
    failed: int
    per_second: float
    p50_ms: float
    p95_ms: float
    p99_ms: float
    max_ms: float
    errors: dict[str, int] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return asdict(self)


async def load(
    make_ask: Callable[[], Awaitable[tuple[Ask, Callable[[], Awaitable[None]]]]],
    *,
    label: str = "",
    arrivals: str = "closed",
    clients: int = 16,
    rate: float | None = None,
    seconds: float = 10.0,
    max_requests: int = 1_000_000,
    warmup_s: float = 1.0,
    seed: int = 0,
) -> LoadResult:
    """Asks for `seconds` after a warm-up and measures.

    Args:
        make_ask: opens one client's connection; returns (ask, close).
        arrivals: "closed", "constant" or "poisson"; the last two need `rate` (requests/s) and use up to `clients`
            connections.
        max_requests: an upper bound whatever the time.
    """
    if arrivals not in ("closed", "constant", "poisson"):
        raise InputError(f"arrivals must be closed, constant or poisson; got {arrivals!r}.")
    if (arrivals == "closed") != (rate is None):
        raise InputError("constant and poisson arrivals need --rate; closed ones take none.")
    opened = await asyncio.gather(*(make_ask() for _ in range(clients)))
    latencies: list[float] = []
    errors: Counter[str] = Counter()
    try:
        end = time.perf_counter() + warmup_s
        await asyncio.gather(*(_closed(ask, end, max_requests, None, errors, i) for i, (ask, _) in enumerate(opened)))
        errors.clear()
        start = time.perf_counter()
        end = start + seconds
        if rate is None:
            share = max(1, max_requests // clients)
            asks = (_closed(ask, end, share, latencies, errors, i) for i, (ask, _) in enumerate(opened))
            await asyncio.gather(*asks)
        else:
            gaps = _gaps(arrivals, rate, random.Random(seed))
            await _open([ask for ask, _ in opened], start, end, gaps, max_requests, latencies, errors)
        took = time.perf_counter() - start
    finally:
        await asyncio.gather(*(close() for _, close in opened), return_exceptions=True)
    failed = sum(errors.values())
    times = np.array(latencies) * 1000 if latencies else np.array([float("nan")])
    p50, p95, p99 = (float(value) for value in np.percentile(times, [50, 95, 99]))
    return LoadResult(
        label,
        arrivals,
        clients,
        rate,
        took,
        len(latencies) + failed,
        failed,
        len(latencies) / took,
        p50,
        p95,
        p99,
        float(times.max()),
        dict(errors),
    )


async def _closed(
    ask: Ask, end: float, count: int, latencies: list[float] | None, errors: Counter, number: int
) -> None:
    while count > 0 and (start := time.perf_counter()) < end:
        problem = await ask(number)
        if problem:
            errors[problem] += 1
            await asyncio.sleep(0.01)
        elif latencies is not None:
            latencies.append(time.perf_counter() - start)
        number, count = number + 1, count - 1


async def _open(
    asks: Sequence[Ask], start: float, end: float, gaps, count: int, latencies: list, errors: Counter
) -> None:
    due: asyncio.Queue[tuple[int, float] | None] = asyncio.Queue()

    async def arrive() -> None:
        at, number = start, 0
        while (at := at + next(gaps)) < end and number < count:
            if (left := at - time.perf_counter()) > 0:
                await asyncio.sleep(left)
            due.put_nowait((number, at))
            number += 1
        for _ in asks:
            due.put_nowait(None)

    async def serve(ask: Ask) -> None:
        while (item := await due.get()) is not None:
            problem = await ask(item[0])
            if problem:
                errors[problem] += 1
            else:
                latencies.append(time.perf_counter() - item[1])

    await asyncio.gather(arrive(), *(serve(ask) for ask in asks))


def _gaps(arrivals: str, rate: float, generator: random.Random):
    while True:
        yield 1 / rate if arrivals == "constant" else generator.expovariate(rate)


# --- clients ----------------------------------------------------------------------------------------------------------


def check_local(host: str) -> str:
    """Refuses to load any machine but this one."""
    if host not in ("127.0.0.1", "::1", "localhost"):
        raise InputError(f"bench serve loads this machine only (127.0.0.1); got {host}.")
    return host


def rest_client(url: str, bodies: Sequence[bytes], timeout_s: float = 30.0, headers: Sequence[str] = ()):
    """Opens keep-alive connections that POST `bodies` in turn to `url`, such as
    http://127.0.0.1:8501/v1/models/NAME:predict."""
    parts = urllib.parse.urlsplit(url)
    host, port = check_local(parts.hostname or ""), parts.port or 80
    if parts.scheme != "http":
        raise InputError(f"bench serve speaks plain http; got {url}.")
    head = f"POST {parts.path} HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
    head += "".join(f"{line}\r\n" for line in headers)
    requests = [f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body for body in bodies]

    async def make():
        connection: list = []

        async def ask(number: int) -> str:
            try:
                if not connection:
                    connection.extend(await asyncio.wait_for(asyncio.open_connection(host, port), timeout_s))
                reader, writer = connection
                writer.write(requests[number % len(requests)])
                status, _ = await asyncio.wait_for(_answer(reader), timeout_s)
                return "" if status == 200 else f"HTTP {status}"
            except (OSError, asyncio.IncompleteReadError, asyncio.TimeoutError, ValueError) as error:
                await close()
                return type(error).__name__

        async def close() -> None:
            if connection:
                connection[1].close()
                connection.clear()

        return ask, close

    return make


async def _answer(reader: asyncio.StreamReader) -> tuple[int, bytes]:
    head = await reader.readuntil(b"\r\n\r\n")
    lines = head.split(b"\r\n")
    status = int(lines[0].split(b" ")[1])
    for line in lines[1:]:
        name, _, value = line.partition(b":")
        if name.lower() == b"content-length":
            return status, await reader.readexactly(int(value))
        if name.lower() == b"transfer-encoding":
            return status, await _chunks(reader)
    return status, b""


async def _chunks(reader: asyncio.StreamReader) -> bytes:
    body = b""
    while size := int((await reader.readline()).split(b";")[0], 16):
        body += await reader.readexactly(size)
        await reader.readexactly(2)
    await reader.readline()
    return body


def grpc_client(address: str, model: str, batches: Sequence[dict[str, np.ndarray]], signature: str = ""):
    """Opens channels that send Predict requests with `batches` in turn."""
    check_local(address.rpartition(":")[0].strip("[]"))
    tf = import_tensorflow(without_keras=True)
    try:
        import grpc
        from tensorflow_serving.apis import predict_pb2, prediction_service_pb2_grpc
    except ImportError as error:
        raise InputError(f"gRPC needs {error.name}, which is not installed: pip install 'tfvllm[serve]'.") from None

    requests = []
    for batch in batches:
        request = predict_pb2.PredictRequest()
        request.model_spec.name, request.model_spec.signature_name = model, signature
        for name, value in batch.items():
            request.inputs[name].CopyFrom(tf.make_tensor_proto(value))
        requests.append(request)

    async def make():
        channel = grpc.aio.insecure_channel(address)
        stub = prediction_service_pb2_grpc.PredictionServiceStub(channel)

        async def ask(number: int) -> str:
            try:
                await stub.Predict(requests[number % len(requests)], timeout=30)
                return ""
            except grpc.RpcError as error:
                return f"gRPC {error.code().name}"

        return ask, channel.close

    return make


# --- a server of our own ----------------------------------------------------------------------------------------------


@contextlib.contextmanager
def serving(directory: str | os.PathLike, options: Sequence[str] = (), timeout_s: float = 180.0):
    """Runs `tfvllm serve model=DIR` on free ports of 127.0.0.1; yields the addresses of the model, REST's and gRPC's
    (grpc://127.0.0.1:PORT/model; None where gRPC is not installed or not asked for by `--grpc-port`)."""
    command = [sys.executable, "-m", "tfvllm", "serve", f"model={directory}", "--rest-port", "0", *options]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    try:
        said, url, grpc_url = [], None, None
        deadline = time.monotonic() + timeout_s
        for line in process.stderr:
            said.append(line.strip())
            if line.startswith("Serving ") and " at http" in line:
                url = line.split(" at ")[1].split()[0].rstrip(",.")
                _, _, port = line.partition("gRPC on port ")
                grpc_url = f"grpc://127.0.0.1:{port.split('.')[0]}/model" if port else None
                break
            if time.monotonic() > deadline:
                break
        if url is None:
            raise TfvllmError(f"the server for {directory} did not start: {said[-1] if said else 'it said nothing'}")
        yield f"{url}/model", grpc_url
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        process.stderr.close()


def batches_for(texts: Sequence[str], rows: int, name: str = "text") -> list[dict[str, np.ndarray]]:
    """Inputs for gRPC of `rows` texts each, taken in turn."""
    encoded = [text.encode() for text in texts]
    picked = ([encoded[(i * rows + j) % len(texts)] for j in range(rows)] for i in range(len(texts)))
    return [{name: np.array(batch, object)} for batch in picked]


def bodies_for(texts: Sequence[str], rows: int, signature: str = "", name: str | None = None) -> list[bytes]:
    """:predict bodies of `rows` texts each, taken in turn."""
    bodies = []
    for i in range(max(1, len(texts))):
        batch = [texts[(i * rows + j) % len(texts)] for j in range(rows)]
        body: dict[str, Any] = {"instances": [{name: text} for text in batch] if name else batch}
        if signature:
            body["signature_name"] = signature
        bodies.append(json.dumps(body, ensure_ascii=False).encode())
    return bodies


@click.command("serve", short_help="Requests/s and latency percentiles of a server on this machine.")
@click.argument("targets", metavar="DIR_OR_URL...", nargs=-1, required=True)
@click.option("--vs", "versus", multiple=True, metavar="DIR_OR_URL", help="Also measure these; or: unbatched.")
@click.option("--text", "texts", multiple=True, help="Texts to send.  [default: some sentences]")
@click.option("--file", type=click.Path(path_type=Path), help="A file with one text per line.")
@click.option("--body", type=click.Path(path_type=Path), help="A file with the JSON body to send, for other inputs.")
@click.option("--signature", default="", help="Which signature to ask.")
@click.option("--protocol", default="rest", show_default=True, type=click.Choice(["rest", "grpc"]), help="For folders.")
@click.option("--rows", default=1, show_default=True, type=click.IntRange(1, 10_000), help="Texts in one request.")
@click.option("--clients", default=16, show_default=True, type=click.IntRange(1, 1000), help="Connections.")
@click.option("--arrivals", default="closed", show_default=True, type=click.Choice(["closed", "constant", "poisson"]))
@click.option("--rate", type=click.FloatRange(0, 1e6, min_open=True), help="Requests/s for constant and poisson.")
@click.option("--seconds", default=10.0, show_default=True, type=click.FloatRange(0.1, 600), help="Of each round.")
@click.option("--rounds", default=2, show_default=True, type=click.IntRange(1, 20), help="Targets take turns.")
@click.option("--server-option", "server_options", multiple=True, help="For the servers started here: --workers=2")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object and nothing else.")
def command(targets, versus, texts, file, body, signature, protocol, rows, clients, arrivals, rate, seconds, rounds,
            server_options, as_json):  # fmt: skip
    """Measures each target in turn, `rounds` times (A B A B), one running at a time.

    A target is a SavedModel folder (a server is started for it), or the address of a model on a running one:
    http://127.0.0.1:8501/v1/models/NAME, or grpc://127.0.0.1:8500/NAME. `--vs unbatched` measures the first folder
    without batching.

    \b
    tfvllm bench serve saved_models/sentiment --vs unbatched --clients 16
    tfvllm bench serve http://127.0.0.1:8501/v1/models/sentiment --arrivals poisson --rate 200
    """
    bodies: list[bytes] | None = None
    lines: list[str] = []
    if body is not None:
        try:
            bodies = [json.dumps(json.loads(body.read_text(encoding="utf-8"))).encode()]
        except (OSError, ValueError) as error:
            raise InputError(f"{body} is no JSON file: {error}. Expected the body of a :predict request.") from None
    else:
        lines = list(texts) + ([line for line in file.read_text("utf-8").split("\n") if line] if file else [])
        lines = lines or list(SENTENCES)
    named = [(target, target, tuple(server_options)) for target in targets]
    for target in versus:
        if target == "unbatched":
            named.append((f"{targets[0]} unbatched", targets[0], (*server_options, "--no-batching")))
        else:
            named.append((target, target, tuple(server_options)))
    results: dict[str, list[LoadResult]] = {label: [] for label, _, _ in named}
    for _, target, _ in named:
        _check_target(target)
    for i in range(rounds):
        for label, target, options in named:
            with _address(target, options, protocol) as url:
                measuring = load(
                    client_for(url, bodies, lines, rows, signature),
                    label=label,
                    arrivals=arrivals,
                    clients=clients,
                    rate=rate,
                    seconds=seconds,
                    seed=i,
                )
                results[label].append(loop.run(measuring))
            if not as_json:
                click.echo(_line(results[label][-1]), err=True)
    merged = {label: _merge(rounds_of) for label, rounds_of in results.items()}
    first = next(iter(merged.values()))
    if as_json:
        shown = {
            label: {**result.to_dict(), "rows_per_second": result.per_second * rows} for label, result in merged.items()
        }
        click.echo(json.dumps({"rows": rows, "rounds": rounds, "results": shown}))
        return 0
    for result in merged.values():
        ratio = (
            ""
            if result is first or not result.per_second
            else f"   first is {first.per_second / result.per_second:.2f}x"
        )
        click.echo(_line(result) + ratio)
    return 0 if any(result.per_second for result in merged.values()) else 1


@contextlib.contextmanager
def _address(target: str, options: Sequence[str], protocol: str):
    if "://" in target:
        yield target.rstrip("/")
        return
    ports = ("--grpc-port", "0") if protocol == "grpc" else ()
    with serving(target, (*options, *ports)) as (rest_url, grpc_url):
        yield grpc_url if protocol == "grpc" else rest_url


def client_for(
    url: str,
    bodies: Sequence[bytes] | None = None,
    lines: Sequence[str] = SENTENCES,
    rows: int = 1,
    signature: str = "",
):
    """Clients for an address: of REST, or grpc://127.0.0.1:PORT/NAME. They send `bodies`, else `lines` as texts."""
    if not url.startswith("grpc://"):
        bodies = bodies_for(lines, rows, signature) if bodies is None else bodies
        return rest_client(f"{url.removesuffix(':predict')}:predict", bodies)
    if bodies is not None:
        raise InputError("--body is the JSON of a REST request; gRPC takes --text or --file.")
    address, _, model = url.removeprefix("grpc://").partition("/")
    if not model:
        raise InputError(f"expected grpc://127.0.0.1:PORT/NAME; got {url}.")
    return grpc_client(address, model, batches_for(lines, rows), signature)


def _check_target(target: str) -> None:
    if "://" in target:
        check_local(urllib.parse.urlsplit(target).hostname or "")
    elif not os.path.isdir(target):
        raise InputError(f"no folder {target}; expected a SavedModel folder or http://127.0.0.1:PORT/v1/models/NAME.")


def _merge(rounds: Sequence[LoadResult]) -> LoadResult:
    """The median round by requests per second (of two the lower); failures and errors of all rounds."""
    middle = sorted(rounds, key=lambda result: result.per_second)[(len(rounds) - 1) // 2]
    errors: Counter[str] = Counter()
    for result in rounds:
        errors.update(result.errors)
    return LoadResult(**{**asdict(middle), "failed": sum(errors.values()), "errors": dict(errors)})


def _line(result: LoadResult) -> str:
    arrivals = result.arrivals if result.rate is None else f"{result.arrivals} {result.rate:g}/s"
    text = (
        f"{result.label}: {result.per_second:.1f} requests/s  p50 {result.p50_ms:.1f}  p95 {result.p95_ms:.1f}  "
        f"p99 {result.p99_ms:.1f}  max {result.max_ms:.1f} ms  ({result.clients} clients, {arrivals})"
    )
    if result.failed:
        text += f"  FAILED {result.failed}: " + ", ".join(f"{name} {count}" for name, count in result.errors.items())
    return text
