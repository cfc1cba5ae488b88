"""The server: core, protocols, hot reload; started, watched and stopped in an orderly way."""

import asyncio
import contextlib
import dataclasses
import logging
import os
import signal
import socket
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import uvicorn

from tfvllm.errors import InputError, TfvllmError
from tfvllm.serving import config, loop
from tfvllm.serving.batching import BatchingOptions
from tfvllm.serving.core import Core, Limits
from tfvllm.serving.executor import LocalExecutor, WorkerPool
from tfvllm.serving.manager import ModelConfig
from tfvllm.serving.rest import RestApp

logger = logging.getLogger("tfvllm.serving")


@dataclass(frozen=True)
class Options:
    """Everything a server can be told.

    Attributes:
        models: what to serve.
        host: the address to listen on; loopback unless told otherwise.
        rest_port, grpc_port: 0 picks a free one; None switches the protocol off.
        workers: processes that run the models; 0 runs them in threads of the server's own process.
        slots: runs at once (per worker); default 1 with workers, else half the cores: the protocols need
            some, and fewer runs make larger batches.
        poll_s: how often to look for new versions; 0: never.
        grace_s: how long the requests under way may take at a shutdown.
        certificate, key, client_ca: PEM files for TLS (client_ca: clients need a certificate too).
        token: a bearer token clients must send.
        basic_auth: "user:password" clients may send instead.
        cors: answer browsers' cross-origin requests.
        grpc_socket_path: a Unix socket for gRPC, beside the port or (grpc_port None) in its place.
        grpc_channel_arguments: gRPC's own settings by name, such as {"grpc.max_connection_age_ms": 2000}.
        check_method_names: whether a Classify or Regress request needs a signature whose method name says so (TF
            Serving's enable_signature_method_name_check).
        model_config_file, config_poll_s: a models.config to read again every so many seconds (0: never); what it
            names is served beside `models`.
    """

    models: Sequence[ModelConfig]
    host: str = "127.0.0.1"
    rest_port: int | None = 8501
    grpc_port: int | None = None
    workers: int = 0
    slots: int | None = None
    intra_op_threads: int = 0
    inter_op_threads: int = 0
    batching: BatchingOptions = field(default_factory=BatchingOptions)
    limits: Limits = field(default_factory=Limits)
    poll_s: float = 1.0
    grace_s: float = 30.0
    certificate: Path | None = None
    key: Path | None = None
    client_ca: Path | None = None
    token: str | None = None
    basic_auth: str | None = None
    cors: bool = False
    grpc_socket_path: Path | None = None
    grpc_channel_arguments: Mapping[str, str | int] = field(default_factory=dict)
    check_method_names: bool = False
    model_config_file: Path | None = None
    config_poll_s: float = 0.0


class Server:
    """A server for `options`. `await serve()` runs it until `stop()`; `in_thread()` runs it beside other code."""

    def __init__(self, options: Options):
        self.options = options
        self.rest_port: int | None = None
        self.grpc_port: int | None = None
        self.core: Core | None = None
        self.started = threading.Event()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stop: asyncio.Event | None = None

    @property
    def rest_url(self) -> str:
        """Such as http://127.0.0.1:8501."""
        scheme = "https" if self.options.certificate else "http"
        return f"{scheme}://{self.options.host}:{self.rest_port}"

    async def serve(self, on_start=None) -> None:
        """Loads the models, listens, and returns after `stop()` once the requests under way are answered.

        Raises InputError when a model does not load or a port is taken.
        """
        options = self.options
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        executor = self._executor()
        self.core = Core(
            self._models(),
            executor,
            batching=options.batching,
            limits=options.limits,
            check_method_names=options.check_method_names,
        )
        async with contextlib.AsyncExitStack() as stack:
            # Bind first: a taken port must be told before a large model is loaded.
            sock = None
            if options.rest_port is not None:
                sock = _listen(options.host, options.rest_port)
                stack.callback(sock.close)
                self.rest_port = sock.getsockname()[1]
            await executor.start()
            stack.push_async_callback(executor.close)
            await self.core.manager.refresh()
            self._check_loaded()
            stack.push_async_callback(self.core.manager.close)
            if options.grpc_port is not None or options.grpc_socket_path is not None:
                from tfvllm.serving import rpc

                grpc = await rpc.start(self.core, options, self._authoriser())
                self.grpc_port = grpc.port
                stack.push_async_callback(grpc.stop, options.grace_s)
            if sock is not None:
                app = RestApp(self.core, authorise=self._authoriser(), cors=options.cors)
                web = _Uvicorn(self._uvicorn_config(app))
                serving = asyncio.ensure_future(web.serve(sockets=[sock]))
                stack.push_async_callback(_stop_web, web, serving)
                while not web.started and not serving.done():
                    await asyncio.sleep(0.01)
            if options.poll_s > 0:
                stack.push_async_callback(_cancel, asyncio.ensure_future(self.core.manager.watch(options.poll_s)))
            if options.config_poll_s > 0 and options.model_config_file is not None:
                watching = self.core.manager.follow(self._models, options.config_poll_s)
                stack.push_async_callback(_cancel, asyncio.ensure_future(watching))
            self.started.set()
            if on_start is not None:
                on_start()
            await self._stop.wait()
            self.core.manager.closing = True  # /readyz says no from now on
            logger.info("stopping: no new connections, %g s for the requests under way", options.grace_s)

    def stop(self) -> None:
        """Asks the server to stop; may be called from any thread or a signal handler."""
        if self._loop is not None and self._stop is not None:
            with contextlib.suppress(RuntimeError):
                self._loop.call_soon_threadsafe(self._stop.set)

    def run(self, on_start=None) -> None:
        """Serves until Ctrl-C or SIGTERM; a second Ctrl-C ends it at once. Calls `on_start` once it is listening."""

        async def main() -> None:
            running = asyncio.get_running_loop()
            for number in (signal.SIGINT, signal.SIGTERM):
                running.add_signal_handler(number, self._on_signal)
            await self.serve(on_start)

        loop.run(main())

    def _on_signal(self) -> None:
        if self._stop is not None and self._stop.is_set():
            os._exit(1)
        self.stop()

    @contextlib.contextmanager
    def in_thread(self, timeout_s: float = 120.0) -> Iterator["Server"]:
        """Runs the server in a thread: `with Server(options).in_thread() as server: … server.rest_url …`."""
        failure: list[BaseException] = []

        def main() -> None:
            try:
                loop.run(self.serve())
            except BaseException as error:
                failure.append(error)
            finally:
                self.started.set()

        thread = threading.Thread(target=main, name="tfvllm-server", daemon=True)
        thread.start()
        if not self.started.wait(timeout_s):
            raise TfvllmError(f"the server was not ready within {timeout_s:g} s")
        if failure:
            raise failure[0]
        try:
            yield self
        finally:
            self.stop()
            thread.join(self.options.grace_s + 30)

    # --- parts ---

    def _models(self) -> list[ModelConfig]:
        file = self.options.model_config_file
        return [*self.options.models, *(config.read_models(file) if file is not None else ())]

    def _executor(self):
        options = self.options
        threads = {"intra_op_threads": options.intra_op_threads, "inter_op_threads": options.inter_op_threads}
        if options.workers:
            return WorkerPool(options.workers, runs_per_worker=options.slots or 1, **threads)
        return LocalExecutor(options.slots or max(1, (os.cpu_count() or 1) // 2), **threads)

    def _check_loaded(self) -> None:
        assert self.core is not None
        manager = self.core.manager
        for name, model in manager.models.items():
            try:
                manager.find(name)
            except Exception:
                try:
                    messages = [version.message for version in manager.status(name) if version.message]
                except Exception:
                    messages = []
                reason = messages[0] if messages else "no version folder (1/, 2/, …) with a saved_model.pb"
                raise InputError(f"model {name!r} at {model.base_path} does not load: {reason}") from None

    def _uvicorn_config(self, app) -> uvicorn.Config:
        options = self.options
        secure: dict[str, Any] = {}
        if options.certificate is not None:
            import ssl

            secure = {"ssl_certfile": str(options.certificate), "ssl_keyfile": str(options.key)}
            if options.client_ca is not None:
                secure |= {"ssl_ca_certs": str(options.client_ca), "ssl_cert_reqs": ssl.CERT_REQUIRED}
        return uvicorn.Config(
            app,
            lifespan="off",
            http=_timed_protocol(options.limits.read_timeout_s),
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            timeout_graceful_shutdown=int(options.grace_s) or 1,
            timeout_keep_alive=75,
            **secure,
        )

    def _authoriser(self):
        if self.options.token is None and self.options.basic_auth is None:
            return None
        from tfvllm.serving.security import Authoriser

        return Authoriser(token=self.options.token, basic_auth=self.options.basic_auth)


def _timed_protocol(seconds: float):
    """uvicorn's HTTP protocol, but a connection whose request does not arrive in `seconds` is closed."""
    from uvicorn.protocols.http.auto import AutoHTTPProtocol

    class TimedProtocol(AutoHTTPProtocol):  # type: ignore[valid-type, misc]
        _waiting = None

        def connection_made(self, transport):
            super().connection_made(transport)
            self._start_waiting()

        def data_received(self, data):
            super().data_received(data)
            if self.cycle is not None and not self.cycle.response_complete:
                self._stop_waiting()
            elif self._waiting is None:
                self._start_waiting()

        def connection_lost(self, exc):
            self._stop_waiting()
            super().connection_lost(exc)

        def _start_waiting(self):
            self._waiting = self.loop.call_later(seconds, self._too_slow)

        def _stop_waiting(self):
            if self._waiting is not None:
                self._waiting.cancel()
                self._waiting = None

        def _too_slow(self):
            self._waiting = None
            if self.cycle is None or self.cycle.response_complete:
                self.transport.close()

    return TimedProtocol


class _Uvicorn(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self):
        yield  # signals belong to Server.run


async def _stop_web(web: uvicorn.Server, serving: asyncio.Future) -> None:
    web.should_exit = True
    with contextlib.suppress(asyncio.CancelledError, SystemExit):
        await serving


async def _cancel(task: asyncio.Future) -> None:
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # Spelt out, as asyncio switches Nagle's algorithm off (TCP_NODELAY) only for sockets that say they are TCP: with it
    # an answer, which is sent as head and body, waits some 40 ms for the client's acknowledgement of the head.
    sock = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind((host, port))
        sock.listen(1024)
    except OSError as error:
        sock.close()
        raise InputError(
            f"cannot listen on {host}:{port}: {error.strerror}. Pass another --rest-port (0 picks a free one)."
        ) from None
    return sock


def with_models(options: Options, models: Sequence[ModelConfig]) -> Options:
    """`options` for other models."""
    return dataclasses.replace(options, models=models)
