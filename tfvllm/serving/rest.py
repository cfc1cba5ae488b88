"""TF Serving's REST API: paths, bodies, status codes, on Starlette."""

import asyncio
import json
import logging
import re
import time
import urllib.parse
import zlib

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from tfvllm.serving import examples, loop, metrics, tensors
from tfvllm.serving.core import Core
from tfvllm.serving.manager import Version
from tfvllm.serving.status import HTTP_STATUS, ServingError, invalid

logger = logging.getLogger("tfvllm.serving")

_PREDICTION = re.compile(
    r"/v1/models/([^/:]+)(?:/versions/(\d+)|/labels/([^/:]+))?:(classify|regress|predict)", re.IGNORECASE
)
_STATUS = re.compile(r"/v1/models(?:/([^/:]+))?(?:/versions/(\d+)|/labels/([^/:]+))?(?:/(metadata))?", re.IGNORECASE)
_CORS = {
    "Access-Control-Allow-Origin": "*",
    "Access-Control-Allow-Methods": "POST, GET",
    "Access-Control-Allow-Headers": "Content-Type, Authorization",
}


class RestApp:
    """An ASGI application. `authorise(header) -> bool` checks the Authorization header; None lets everyone in."""

    def __init__(self, core: Core, *, authorise=None, cors: bool = False):
        self.core = core
        self.authorise = authorise
        self._headers = dict(_CORS) if cors else {}
        self.active = 0

    async def __call__(self, scope, receive, send) -> None:
        if scope["type"] != "http":
            return
        self.active += 1
        request = Request(scope, receive)
        try:
            response = await self._answer(request)
            await response(scope, receive, send)
        except ClientDisconnect:
            logger.debug("a client left before its answer")
        finally:
            self.active -= 1

    async def _answer(self, request: Request) -> Response:
        headers = dict(self._headers)
        try:
            status, body, kind = await self._route(request)
        except ServingError as error:
            status, body, kind = HTTP_STATUS[error.code], tensors.error_body(error.message), "application/json"
            if error.code == "UNAUTHENTICATED":
                headers["WWW-Authenticate"] = 'Bearer realm="tfvllm", Basic realm="tfvllm"'
            elif error.code == "RESOURCE_EXHAUSTED":
                headers["Retry-After"] = "1"
        except _TooLarge as error:
            status, body, kind = 413, tensors.error_body(str(error)), "application/json"
            headers["Connection"] = "close"
        except _TooSlow as error:
            status, body, kind = 408, tensors.error_body(str(error)), "application/json"
            headers["Connection"] = "close"
        except ClientDisconnect:
            raise
        except Exception as error:
            logger.exception("a request failed")
            message = f"{type(error).__name__} in the server; its log says more"
            status, body, kind = 500, tensors.error_body(message), "application/json"
        return Response(body, status, headers, media_type=kind)

    async def _route(self, request: Request) -> tuple[int, bytes, str]:
        path, method = request.scope["path"], request.method
        if path in ("/", "/healthz", "/v1/healthz", "/livez"):  # the first is where KServe's clients look
            return 200, b'{"status":"alive"}', "application/json"
        if path in ("/readyz", "/v1/readyz"):
            if self.core.manager.ready:
                return 200, b'{"status":"ready"}', "application/json"
            raise ServingError("UNAVAILABLE", "not every model has a version that is ready")
        if method == "OPTIONS" and self._headers:
            return 200, b"", "application/json"
        if self.authorise is not None and not self.authorise(request.headers.get("authorization", "")):
            raise ServingError(
                "UNAUTHENTICATED", "expected an Authorization header with this server's token or password"
            )
        if path == metrics.PATH and method == "GET":
            text = self.core.metrics.text()
            if text is None:
                raise ServingError("UNIMPLEMENTED", "metrics need prometheus-client: pip install 'tfvllm[serve]'")
            return 200, text, "text/plain; version=0.0.4"
        # The raw path, so that an escaped slash or colon in a name stays part of the name.
        raw = request.scope.get("raw_path", path.encode()).split(b"?")[0].decode("latin-1")
        if method == "POST" and (found := _PREDICTION.fullmatch(raw)):
            return 200, await self._prediction(request, *found.groups()), "application/json"
        if method == "GET" and (found := _STATUS.fullmatch(raw)):
            return 200, self._status(*found.groups()), "application/json"
        if not path.lower().startswith("/v1/"):
            raise ServingError("NOT_FOUND", f"Not found: {path}. The API is under /v1/models/NAME:predict")
        raise invalid(f"Malformed request: {method} {path}")

    async def _prediction(self, request: Request, name: str, number, label, verb: str) -> bytes:
        start = time.perf_counter()
        name, verb, status = urllib.parse.unquote(name), verb.lower(), "OK"
        known = name in self.core.manager.models
        try:
            body = await self._body(request)
            version = self.core.manager.find(name, _number(number), _label(label))
            return await self._ask(version, verb, body)
        except ServingError as error:
            status = error.code
            raise
        finally:
            # An unknown name must not become a metric of its own: clients could make any number of them.
            model = name if known else "(unknown)"
            self.core.metrics.request(model, verb, "REST", status, time.perf_counter() - start)

    async def _ask(self, version: Version, verb: str, body: bytes) -> bytes:
        core = self.core
        if verb == "predict":
            parsed = tensors.parse_predict(body, lambda wanted: core.signature(version, wanted))
            outputs = await core.predict(version, parsed.signature_name, parsed.inputs)
            return tensors.predict_answer(outputs, parsed.format)
        request = examples.parse_examples(body, verb)
        ask = core.classify if verb == "classify" else core.regress
        return examples.results_answer(await ask(version, request.signature_name, request.examples))

    def _status(self, name, number, label, metadata) -> bytes:
        name = urllib.parse.unquote(name or "")
        if metadata:
            version = self.core.manager.find(name, _number(number), _label(label))
            return metadata_json(version)
        versions = self.core.manager.status(name, _number(number), _label(label))
        return _pretty({"model_version_status": [status_entry(version) for version in versions]})

    async def _body(self, request: Request) -> bytes:
        limits = self.core.limits
        declared = request.headers.get("content-length")
        if declared and declared.isdigit() and int(declared) > limits.max_request_bytes:
            raise _TooLarge(int(declared), limits.max_request_bytes)
        chunks, size = [], 0

        async def read() -> None:
            nonlocal size
            async for chunk in request.stream():
                size += len(chunk)
                if size > limits.max_request_bytes:
                    raise _TooLarge(size, limits.max_request_bytes)
                chunks.append(chunk)

        try:
            await loop.within(limits.read_timeout_s, read())
        except asyncio.TimeoutError:
            raise _TooSlow(f"the request's body did not arrive within {limits.read_timeout_s:g} s") from None
        body = b"".join(chunks)
        encoding = request.headers.get("content-encoding", "identity").lower()
        if encoding == "gzip":
            return _gunzip(body, limits.max_request_bytes)
        if encoding != "identity":
            raise invalid(f"Content-Encoding {encoding!r} is not supported; expected gzip or none")
        return body


class _TooLarge(Exception):
    def __init__(self, size: int, limit: int):
        super().__init__(f"the request has {size} bytes or more; the limit of this server is {limit}")


class _TooSlow(Exception):
    pass


def _gunzip(body: bytes, limit: int) -> bytes:
    unzip = zlib.decompressobj(wbits=31)
    try:
        plain = unzip.decompress(body, limit + 1)
    except zlib.error as error:
        raise invalid(f"the body is not gzip, as Content-Encoding says: {error}") from None
    if len(plain) > limit:
        raise _TooLarge(len(plain), limit)
    if not unzip.eof:
        raise invalid("the gzip body ends too early")
    return plain


def _number(text: str | None) -> int | None:
    if text is None:
        return None
    if len(text) > 18:
        raise invalid(f"Failed to convert version: {text[:40]} to numeric.")
    return int(text)


def _label(text: str | None) -> str | None:
    return None if text is None else urllib.parse.unquote(text)


def status_entry(version: Version) -> dict:
    """One entry of a status answer."""
    return {
        "version": str(version.number),
        "state": version.state,
        "status": {"error_code": version.code, "error_message": version.message},
    }


def metadata_json(version: Version) -> bytes:
    """The answer to /metadata."""
    from google.protobuf.json_format import MessageToDict
    from tensorflow.core.protobuf import meta_graph_pb2

    definitions = {
        name: MessageToDict(
            meta_graph_pb2.SignatureDef.FromString(signature.proto),
            preserving_proto_field_name=True,
            always_print_fields_with_no_presence=True,
        )
        for name, signature in version.signatures.items()
    }
    spec = {"name": version.model, "signature_name": "", "version": str(version.number)}
    return _pretty({"model_spec": spec, "metadata": {"signature_def": {"signature_def": definitions}}})


def _pretty(value) -> bytes:
    return (json.dumps(value, indent=1) + "\n").encode()
