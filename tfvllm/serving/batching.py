"""Dynamic batching: requests that wait together run together.

A run starts as soon as there is room for it and takes what is waiting then, so that a lone request waits for nobody
and a busy server forms batches by itself. With `batch_timeout_ms` a run also waits that long for company, as TF
Serving's batching does.
Scalars and inputs with a default (a generate request's `max_new_tokens`, its stop strings) are no rows: they must be
equal in a batch. A signature with a `seed` is not batched at all, as its answers depend on the place in the batch.
A request whose shapes are not as the signature declares them runs alone: nothing says where its rows are.
"""

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from tfvllm.serving.servable import Signature
from tfvllm.serving.status import ServingError

Run = Callable[[Mapping[str, np.ndarray], Sequence[str]], Awaitable[dict[str, np.ndarray]]]


@dataclass(frozen=True)
class BatchingOptions:
    """How requests are batched.

    Attributes:
        enabled: whether they are.
        max_batch_size: rows in one run; a larger request is split.
        batch_timeout_ms: how long the first request of a batch may wait for company while there is room to run.
        allowed_batch_sizes: a batch is padded up to the next of these with copies of its first row (fewer distinct
            shapes, fewer kernels to prepare); empty: no padding.
        pad_variable_length_inputs: whether inputs that differ in other dimensions than the first are padded with
            zeros ("" for strings) to the longest.
    """

    enabled: bool = True
    max_batch_size: int = 32
    batch_timeout_ms: float = 0.0
    allowed_batch_sizes: tuple[int, ...] = ()
    pad_variable_length_inputs: bool = False

    def padded(self, rows: int) -> int:
        """`rows` rounded up to an allowed batch size."""
        return next((size for size in sorted(self.allowed_batch_sizes) if size >= rows), rows)


class AdmissionLimit:
    """How many runs may be under way, and how many requests may wait for one (then RESOURCE_EXHAUSTED)."""

    def __init__(self, slots: int, max_queued: int):
        self.slots = asyncio.Semaphore(slots)
        self.max_queued = max_queued
        self.queued = 0

    def enter(self) -> None:
        """Counts a waiting request in. Raises ServingError when there are too many."""
        if self.queued >= self.max_queued:
            raise ServingError(
                "RESOURCE_EXHAUSTED", f"{self.queued} requests are waiting, the limit of this server; try again later"
            )
        self.queued += 1

    def leave(self) -> None:
        """Counts a request out."""
        self.queued -= 1


@dataclass
class _Task:
    inputs: dict[str, np.ndarray]
    outputs: tuple[str, ...]
    rows: int
    key: tuple
    future: asyncio.Future
    arrived: float


class Batcher:
    """The queue of one signature of one loaded version.

    `run(inputs, outputs)` runs one batch. `observe(rows, requests, waited_s)` is told of each.
    """

    def __init__(self, signature: Signature, run: Run, room: AdmissionLimit, options: BatchingOptions, observe=None):
        self.signature = signature
        self.options = options
        self._run = run
        self._room = room
        self._observe = observe or (lambda rows, requests, waited: None)
        self._queue: deque[_Task] = deque()
        self._arrival = asyncio.Event()
        self._draining: asyncio.Task | None = None
        self._running: set[asyncio.Task] = set()
        self.batchable = options.enabled and is_batchable(signature)

    async def submit(self, inputs: dict[str, np.ndarray], outputs: Sequence[str]) -> dict[str, np.ndarray]:
        """Runs one request, alone or with others. Its answer is what it would get alone."""
        rows = row_count(self.signature, inputs) if self.batchable else None
        if not rows:
            return await self._alone(inputs, outputs)
        limit = self.options.max_batch_size
        if rows > limit:
            parts = [_slice(self.signature, inputs, start, start + limit) for start in range(0, rows, limit)]
            answers = await asyncio.gather(*(self.submit(part, outputs) for part in parts))
            return {name: np.concatenate([answer[name] for answer in answers]) for name in outputs}
        self._room.enter()
        key = _key(self.signature, inputs, outputs, self.options.pad_variable_length_inputs)
        task = _Task(inputs, tuple(outputs), rows, key, asyncio.get_running_loop().create_future(), time.monotonic())
        self._queue.append(task)
        self._arrival.set()
        if self._draining is None or self._draining.done():
            self._draining = asyncio.ensure_future(self._drain())
        return await task.future

    async def _alone(self, inputs, outputs) -> dict[str, np.ndarray]:
        self._room.enter()
        try:
            await self._room.slots.acquire()
        finally:
            self._room.leave()
        try:
            return await self._run(inputs, outputs)
        finally:
            self._room.slots.release()

    async def _drain(self) -> None:
        while self._queue:
            await self._room.slots.acquire()
            try:
                await self._company()
                batch = self._take()
            except BaseException:
                self._room.slots.release()
                raise
            if not batch:
                self._room.slots.release()
                continue
            running = asyncio.ensure_future(self._run_batch(batch))
            self._running.add(running)
            running.add_done_callback(self._running.discard)

    async def _company(self) -> None:
        """Waits for more requests, at most until the first one has waited batch_timeout_ms."""
        timeout = self.options.batch_timeout_ms / 1000
        while timeout and self._queue and sum(task.rows for task in self._queue) < self.options.max_batch_size:
            left = self._queue[0].arrived + timeout - time.monotonic()
            if left <= 0:
                return
            self._arrival.clear()
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._arrival.wait(), left)

    def _take(self) -> list[_Task]:
        """The first request and those behind it that may run with it; the others keep their places."""
        batch: list[_Task] = []
        kept: deque[_Task] = deque()
        rows = 0
        while self._queue:
            task = self._queue.popleft()
            if task.future.done():  # its client has gone or has run out of time
                self._room.leave()
            elif not batch or (task.key == batch[0].key and rows + task.rows <= self.options.max_batch_size):
                batch.append(task)
                rows += task.rows
                self._room.leave()
            else:
                kept.append(task)
            if rows >= self.options.max_batch_size:
                break
        kept.extend(self._queue)
        self._queue = kept
        return batch

    async def _run_batch(self, batch: list[_Task]) -> None:
        try:
            now = time.monotonic()
            rows = sum(task.rows for task in batch)
            self._observe(rows, len(batch), now - batch[0].arrived)
            try:
                inputs = _join(self.signature, [task.inputs for task in batch], self.options.padded(rows))
                answer = await self._run(inputs, batch[0].outputs)
                total = self.options.padded(rows)
                if any(array.ndim == 0 or array.shape[0] != total for array in answer.values()):
                    self.batchable = False  # its outputs do not follow its rows after all
                    await self._one_by_one(batch)
                    return
            except ServingError as error:
                if len(batch) > 1:  # one bad row must not fail its neighbours
                    await self._one_by_one(batch)
                else:
                    _fail(batch[0], error)
                return
            start = 0
            for task in batch:
                if not task.future.done():
                    part = {name: array[start : start + task.rows] for name, array in answer.items()}
                    task.future.set_result(part)
                start += task.rows
        except BaseException as error:
            for task in batch:
                _fail(task, ServingError("INTERNAL", f"{type(error).__name__}: {error}"[:500]))
            if not isinstance(error, Exception):
                raise
        finally:
            self._room.slots.release()

    async def _one_by_one(self, batch: list[_Task]) -> None:
        for task in batch:
            try:
                answer = await self._run(task.inputs, task.outputs)
            except ServingError as error:
                _fail(task, error)
            else:
                if not task.future.done():
                    task.future.set_result(answer)


def _fail(task: _Task, error: ServingError) -> None:
    if not task.future.done():
        task.future.set_exception(error)


def is_batchable(signature: Signature) -> bool:
    """Whether rows of different requests may share a run: each output has one row per row of the inputs."""
    with_rows = [signature.inputs[name] for name in _row_inputs(signature)]
    return (
        bool(with_rows)
        and "seed" not in signature.inputs
        and all(spec.shape is not None and spec.shape[0] == -1 for spec in with_rows)
        and all(spec.shape is not None and spec.shape and spec.shape[0] == -1 for spec in signature.outputs.values())
    )


def _row_inputs(signature: Signature) -> list[str]:
    """The inputs that have a row per answer: neither scalars nor inputs with a default."""
    return [
        name
        for name, spec in signature.inputs.items()
        if name not in signature.defaults and (spec.shape is None or len(spec.shape))
    ]


def row_count(signature: Signature, inputs: Mapping[str, np.ndarray]) -> int | None:
    """How many rows a request has; None where its inputs disagree, or are not as the signature declares them."""
    if not all(signature.inputs[name].accepts(array.shape) for name, array in inputs.items()):
        return None
    sizes = {inputs[name].shape[0] for name in _row_inputs(signature) if name in inputs and inputs[name].ndim}
    return sizes.pop() if len(sizes) == 1 else None


def _key(signature: Signature, inputs, outputs, pad: bool) -> tuple:
    parts: list = [tuple(outputs)]
    for name in sorted(inputs):
        array = inputs[name]
        if not array.ndim or name in signature.defaults:
            parts.append((name, array.shape, tuple(array.ravel().tolist())))
        elif pad:
            parts.append((name, array.ndim))
        else:
            parts.append((name, array.shape[1:]))
    return tuple(parts)


def _join(signature: Signature, requests: list[dict[str, np.ndarray]], total: int) -> dict[str, np.ndarray]:
    if len(requests) == 1 and total == row_count(signature, requests[0]):
        return requests[0]
    joined = {}
    for name, first in requests[0].items():
        if not first.ndim or name in signature.defaults:
            joined[name] = first
            continue
        arrays = [request[name] for request in requests]
        shape = tuple(max(sizes) for sizes in zip(*(array.shape[1:] for array in arrays)))
        arrays = [_pad_to(array, shape) for array in arrays]
        rows = sum(len(array) for array in arrays)
        arrays += [arrays[0][:1]] * (total - rows)
        joined[name] = np.concatenate(arrays)
    return joined


def _pad_to(array: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    if array.shape[1:] == shape:
        return array
    padded = np.full((len(array), *shape), b"" if array.dtype == object else 0, array.dtype)
    padded[tuple(slice(size) for size in array.shape)] = array
    return padded


def _slice(signature: Signature, inputs, start: int, stop: int) -> dict[str, np.ndarray]:
    rows = set(_row_inputs(signature))
    return {name: array[start:stop] if name in rows else array for name, array in inputs.items()}
