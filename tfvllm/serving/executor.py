"""Where servables run: threads of this process, or worker processes.

Both offer `load(key, directory) -> signatures`, `run(key, signature, inputs, outputs)`, `unload(key)` and `close()`,
and say in `slots` how many runs make sense at once. A worker process that dies takes no request with it: its runs are
repeated on another worker (a run has no side effects), and a new process takes its place.
"""

import asyncio
import contextlib
import functools
import itertools
import logging
import multiprocessing
import os
import pickle
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from tfvllm.quietly import import_tensorflow
from tfvllm.serving.servable import Servable, Signature
from tfvllm.serving.status import ServingError

logger = logging.getLogger("tfvllm.serving")

_ATTEMPTS = 3  # a request that has seen this many workers die is itself the suspect


class LocalExecutor:
    """Runs servables in `slots` threads of this process."""

    def __init__(self, slots: int = 2, *, intra_op_threads: int = 0, inter_op_threads: int = 0):
        self.slots = slots
        self._servables: dict[str, Servable] = {}
        self._open = functools.partial(Servable, intra_op_threads=intra_op_threads, inter_op_threads=inter_op_threads)
        self._threads = ThreadPoolExecutor(slots, thread_name_prefix="tfvllm-run")
        self._loader = ThreadPoolExecutor(1, thread_name_prefix="tfvllm-load")

    async def start(self) -> None:
        """Nothing to start here."""

    async def load(self, key: str, directory: str | os.PathLike) -> dict[str, Signature]:
        """Loads and warms up the SavedModel in `directory` as `key`; returns its signatures."""
        servable = await asyncio.get_running_loop().run_in_executor(self._loader, load_warm, self._open, directory)
        self._servables[key] = servable
        return servable.signatures

    async def run(
        self, key: str, signature: str, inputs: Mapping[str, np.ndarray], outputs: Sequence[str]
    ) -> dict[str, np.ndarray]:
        """Runs one signature of a loaded servable."""
        run = self._servables[key].run
        return await asyncio.get_running_loop().run_in_executor(self._threads, run, signature, inputs, outputs)

    async def unload(self, key: str) -> None:
        """Drops a servable; its runs must have ended."""
        servable = self._servables.pop(key, None)
        if servable is not None:
            await asyncio.get_running_loop().run_in_executor(self._loader, servable.close)

    async def close(self) -> None:
        """Drops all servables and ends the threads."""
        for key in list(self._servables):
            await self.unload(key)
        self._threads.shutdown(wait=False)
        self._loader.shutdown(wait=False)


def load_warm(open_servable, directory) -> Servable:
    """Opens a servable and replays its warm-up requests, as TF Serving does before a version goes live."""
    from tfvllm.savedmodel import warmup

    servable = open_servable(directory)
    try:
        for name, inputs in warmup.read(directory):
            if name in servable.signatures:
                servable.run(name, inputs)
    except Exception as error:
        servable.close()
        raise ServingError("INTERNAL", f"warm-up of {directory} failed: {error}") from None
    return servable


# --- worker processes -------------------------------------------------------------------------------------------------


class WorkerDied(Exception):
    """The process a call was sent to has ended before it answered."""


class WorkerPool:
    """Runs servables in `workers` processes, each with all models loaded; a dead one is replaced."""

    def __init__(self, workers: int, *, intra_op_threads: int = 0, inter_op_threads: int = 0, runs_per_worker: int = 1):
        self.slots = workers * runs_per_worker
        self._options = (intra_op_threads, inter_op_threads, runs_per_worker)
        self._workers = [_Worker(i, self._options) for i in range(workers)]
        self._models: dict[str, tuple[str, dict[str, Signature]]] = {}
        self._turn = itertools.count()
        self._closing = False
        self._reviving: set[asyncio.Task] = set()
        self._changed = asyncio.Event()

    @property
    def pids(self) -> list[int]:
        """Process ids of the live workers."""
        processes = (worker.process for worker in self._workers if worker.ready)
        return [process.pid for process in processes if process is not None and process.pid]

    async def start(self) -> None:
        """Starts the processes."""
        for worker in self._workers:
            worker.start(asyncio.get_running_loop(), self._on_death)
            worker.ready = True

    async def load(self, key: str, directory: str | os.PathLike) -> dict[str, Signature]:
        """Loads a SavedModel in every worker; returns its signatures. On an error it is loaded in none."""
        self._models[key] = (str(directory), {})
        try:
            answers = await asyncio.gather(*(self._load_in(worker, key) for worker in self._workers if worker.ready))
        except BaseException:
            await self.unload(key)
            raise
        signatures = next((answer for answer in answers if answer), None)
        if signatures is None:
            raise ServingError("UNAVAILABLE", "every worker died while loading the model")
        self._models[key] = (str(directory), signatures)
        return signatures

    async def _load_in(self, worker: "_Worker", key: str) -> dict[str, Signature] | None:
        try:
            return await worker.call("load", key, self._models[key][0])
        except WorkerDied:
            return None  # its successor loads all models before it takes requests

    async def run(
        self, key: str, signature: str, inputs: Mapping[str, np.ndarray], outputs: Sequence[str]
    ) -> dict[str, np.ndarray]:
        """Runs one signature on the least busy worker; on another one when that dies."""
        for _ in range(_ATTEMPTS):
            worker = await self._least_busy()
            try:
                return await worker.call("run", key, signature, dict(inputs), tuple(outputs))
            except WorkerDied:
                continue
        raise ServingError("INTERNAL", f"the request ended {_ATTEMPTS} worker processes; it is not tried again")

    async def _least_busy(self) -> "_Worker":
        while True:
            ready = [worker for worker in self._workers if worker.ready]
            if ready:
                turn = next(self._turn)
                return min(ready, key=lambda worker: (len(worker.pending), (worker.index - turn) % len(self._workers)))
            if self._closing:
                raise ServingError("UNAVAILABLE", "the server is shutting down")
            self._changed.clear()
            await self._changed.wait()

    async def unload(self, key: str) -> None:
        """Drops a model in every worker."""
        self._models.pop(key, None)
        calls = (worker.call("unload", key) for worker in self._workers if worker.process and worker.process.is_alive())
        await asyncio.gather(*calls, return_exceptions=True)

    async def close(self) -> None:
        """Ends the processes."""
        self._closing = True
        self._changed.set()
        for task in list(self._reviving):
            task.cancel()
        for worker in self._workers:
            worker.stop()
        await asyncio.gather(*(asyncio.to_thread(worker.join) for worker in self._workers))

    def _on_death(self, worker: "_Worker") -> None:
        if self._closing:
            return
        pid = worker.process.pid if worker.process is not None else None
        logger.warning("worker %d (process %s) ended; starting another", worker.index, pid)
        task = asyncio.ensure_future(self._revive(worker))
        self._reviving.add(task)
        task.add_done_callback(self._reviving.discard)

    async def _revive(self, worker: "_Worker") -> None:
        for attempt in itertools.count():
            await asyncio.sleep(min(0.1 * 2**attempt, 10) if attempt else 0)
            worker.start(asyncio.get_running_loop(), None)
            try:
                # Versions may come and go meanwhile: go on until nothing is missing.
                loaded: set[str] = set()
                while missing := [key for key in self._models if key not in loaded]:
                    for key in missing:
                        if key in self._models:
                            await worker.call("load", key, self._models[key][0])
                        loaded.add(key)
            except WorkerDied:
                continue
            except ServingError as error:
                logger.error("worker %d could not load a model again: %s", worker.index, error.message)
            worker.on_death = self._on_death
            worker.ready = True
            self._changed.set()
            return


class _Worker:
    """The parent's end of one worker process: calls go out numbered, a thread brings the answers back."""

    def __init__(self, index: int, options: tuple):
        self.index = index
        self.options = options
        self.process: multiprocessing.process.BaseProcess | None = None
        self.ready = False
        self.pending: dict[int, asyncio.Future] = {}
        self.on_death: Callable[[_Worker], None] | None = None
        self._numbers = itertools.count()
        self._send_lock = threading.Lock()

    def start(self, loop: asyncio.AbstractEventLoop, on_death) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, child = context.Pipe()
        self.process = context.Process(
            target=worker_main, args=(child, *self.options), daemon=True, name=f"tfvllm-worker-{self.index}"
        )
        self.process.start()
        child.close()
        self._loop = loop
        self.on_death = on_death
        self.pending = {}
        reader = threading.Thread(
            target=self._read, args=(self._connection, self.pending), daemon=True, name=f"tfvllm-answers-{self.index}"
        )
        reader.start()

    async def call(self, *message):
        number = next(self._numbers)
        future = self._loop.create_future()
        pending = self.pending
        pending[number] = future
        payload = pickle.dumps((number, *message), protocol=5)
        try:
            if len(payload) > 1 << 16:
                await asyncio.to_thread(self._send, payload)
            else:
                self._send(payload)
        except (OSError, ValueError):
            pending.pop(number, None)
            raise WorkerDied from None
        try:
            return await future
        finally:
            pending.pop(number, None)

    def _send(self, payload: bytes) -> None:
        with self._send_lock:
            self._connection.send_bytes(payload)

    def _read(self, connection, pending: dict) -> None:
        while True:
            try:
                answer = pickle.loads(connection.recv_bytes())
            except (EOFError, OSError):
                break
            self._post(self._resolve, pending, *answer)
        self._post(self._died, pending)

    def _post(self, function, *arguments) -> None:
        with contextlib.suppress(RuntimeError):  # the loop has ended, and with it everyone who waited
            self._loop.call_soon_threadsafe(function, *arguments)

    @staticmethod
    def _resolve(pending: dict, number: int, ok: bool, value) -> None:
        future = pending.get(number)
        if future is None or future.done():
            return
        if ok:
            future.set_result(value)
        else:
            future.set_exception(value)

    def _died(self, pending: dict) -> None:
        if pending is self.pending:
            self.ready = False
        for future in list(pending.values()):
            if not future.done():
                future.set_exception(WorkerDied())
        pending.clear()
        if self.on_death is not None:
            on_death, self.on_death = self.on_death, None
            on_death(self)

    def stop(self) -> None:
        self.on_death = None
        self.ready = False
        with contextlib.suppress(OSError, ValueError):
            self._send(pickle.dumps((-1, "stop")))

    def join(self) -> None:
        if self.process is None:
            return
        self.process.join(5)
        if self.process.is_alive():
            self.process.kill()
            self.process.join(5)
        with contextlib.suppress(OSError):
            self._connection.close()


def worker_main(connection, intra_op_threads: int, inter_op_threads: int, runs: int) -> None:
    """The life of a worker process: answers load, run and unload until its parent is gone."""
    import signal

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's business
    import_tensorflow(without_keras=True)
    open_servable = functools.partial(Servable, intra_op_threads=intra_op_threads, inter_op_threads=inter_op_threads)
    servables: dict[str, Servable] = {}
    lock = threading.Lock()

    def answer(number: int, ok: bool, value) -> None:
        payload = pickle.dumps((number, ok, value), protocol=5)
        with lock, contextlib.suppress(OSError):
            connection.send_bytes(payload)

    def handle(number: int, kind: str, *arguments) -> None:
        value: object = None
        try:
            if kind == "run":
                key, *rest = arguments
                value = servables[key].run(*rest)
            elif kind == "load":
                key, directory = arguments
                servables[key] = load_warm(open_servable, directory)
                value = servables[key].signatures
            else:
                servable = servables.pop(arguments[0], None)
                if servable is not None:
                    servable.close()
            answer(number, True, value)
        except ServingError as error:
            answer(number, False, error)
        except Exception as error:
            answer(number, False, ServingError("INTERNAL", f"{type(error).__name__}: {error}"[:500]))

    with ThreadPoolExecutor(runs) as running, ThreadPoolExecutor(1) as loading:
        while True:
            try:
                number, kind, *arguments = pickle.loads(connection.recv_bytes())
            except (EOFError, OSError):
                break
            if kind == "stop":
                break
            (running if kind == "run" else loading).submit(handle, number, kind, *arguments)
