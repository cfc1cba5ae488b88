"""Predict, Classify, Regress, MultiInference, status and metadata: what REST and gRPC share."""

import asyncio
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from tfvllm.serving import examples, loop
from tfvllm.serving.batching import AdmissionLimit, Batcher, BatchingOptions
from tfvllm.serving.manager import Manager, ModelConfig, Version
from tfvllm.serving.metrics import Metrics
from tfvllm.serving.servable import CLASSIFY, PREDICT, REGRESS, Signature, numpy_dtype
from tfvllm.serving.status import ServingError, invalid

logger = logging.getLogger("tfvllm.serving")

DEFAULT_SIGNATURE = "serving_default"


@dataclass(frozen=True)
class Limits:
    """What a server takes at most.

    Attributes:
        max_request_bytes: of one request's body (also after decompression).
        max_queued: requests that wait for a run; more get RESOURCE_EXHAUSTED (429).
        request_timeout_s: from a request's arrival to its answer; then DEADLINE_EXCEEDED (504).
        read_timeout_s: how long a client may take to send a request.
    """

    max_request_bytes: int = 64 << 20
    max_queued: int = 1024
    request_timeout_s: float = 60.0
    read_timeout_s: float = 30.0


class Core:
    """Answers requests; knows neither HTTP nor gRPC."""

    def __init__(
        self,
        models: Sequence[ModelConfig],
        executor,
        *,
        batching: BatchingOptions | None = None,
        limits: Limits | None = None,
        metrics: Metrics | None = None,
        check_method_names: bool = False,
    ):
        self.limits = limits or Limits()
        self.metrics = metrics or Metrics()
        self.batching = batching or BatchingOptions()
        self.executor = executor
        self._check_method_names = check_method_names
        self._room = AdmissionLimit(executor.slots, self.limits.max_queued)
        self.manager = Manager(models, executor, self._make_batcher, observe_load=self._observe_load)
        self._warned: set[tuple[str, str]] = set()

    def _make_batcher(self, version: Version, signature: Signature) -> Batcher:
        async def run(inputs: Mapping[str, np.ndarray], outputs: Sequence[str]) -> dict[str, np.ndarray]:
            with version.use():
                start = time.perf_counter()
                try:
                    return await self.executor.run(version.key, signature.name, inputs, outputs)
                finally:
                    self.metrics.run(version.model, "Predict", time.perf_counter() - start)

        def observe(rows: int, requests: int, waited: float) -> None:
            self.metrics.batch(version.model, rows, requests, waited)

        return Batcher(signature, run, self._room, self.batching, observe)

    def _observe_load(self, model: str, version: int, status: str, seconds: float) -> None:
        self.metrics.load(f"{model}/{version}", status)

    # --- the calls ---

    async def predict(
        self,
        version: Version,
        signature_name: str,
        inputs: dict[str, np.ndarray],
        outputs: Sequence[str] = (),
        timeout_s: float | None = None,
    ) -> dict[str, np.ndarray]:
        """Runs a signature on `inputs`, whose shapes the graph judges. `outputs` picks some (default: all)."""
        signature = self.signature(version, signature_name)
        if self._check_method_names and signature.method not in (PREDICT, CLASSIFY, REGRESS):
            raise ServingError(
                "INTERNAL",
                f"Expected prediction signature method_name to be one of {{{PREDICT}, {CLASSIFY}, {REGRESS}}}. "
                f"Was: {signature.method}",
            )
        inputs = check_inputs(signature, inputs)
        names = tuple(outputs) or tuple(signature.outputs)
        for i, name in enumerate(names):
            if name in names[:i]:
                raise invalid(f"duplicate output tensor alias: {name}")
            if name not in signature.outputs:
                raise invalid(
                    f"output tensor alias not found in signature: {name} Outputs expected to be in the set "
                    f"{{{','.join(signature.outputs)}}}."
                )
        return await self._run(version, signature, inputs, names, timeout_s)

    async def classify(
        self, version: Version, signature_name: str, rows: Sequence[bytes], timeout_s: float | None = None
    ) -> list[list[tuple[str, float]]]:
        """Serialised tf.Examples to lists of (label, score)."""
        signature = self.examples_signature(version, signature_name, CLASSIFY)
        names = [name for name in ("classes", "scores") if name in signature.outputs]
        outputs = await self._examples(version, signature, rows, names, timeout_s)
        return examples.classifications(outputs, len(rows))

    async def regress(
        self, version: Version, signature_name: str, rows: Sequence[bytes], timeout_s: float | None = None
    ) -> list[np.floating]:
        """Serialised tf.Examples to numbers."""
        signature = self.examples_signature(version, signature_name, REGRESS)
        outputs = await self._examples(version, signature, rows, ["outputs"], timeout_s)
        return examples.regressions(outputs, len(rows))

    async def _examples(self, version, signature, rows, names, timeout_s) -> dict[str, np.ndarray]:
        if not rows:
            raise invalid("Input is empty.")
        array = np.empty(len(rows), object)
        array[:] = rows
        self.metrics.examples(version.model, len(rows))
        return await self._run(version, signature, {examples.INPUT: array}, names, timeout_s)

    async def _run(self, version: Version, signature: Signature, inputs, names, timeout_s) -> dict[str, np.ndarray]:
        limit = self.limits.request_timeout_s
        timeout = limit if timeout_s is None else min(timeout_s, limit)
        with version.use():
            try:
                return await loop.within(timeout, version.batchers[signature.name].submit(inputs, names))
            except ServingError as error:
                raise explained(error, signature, inputs) from None
            except asyncio.TimeoutError:
                raise ServingError("DEADLINE_EXCEEDED", f"no answer within {timeout:.3g} s") from None

    # --- signatures ---

    def signature(self, version: Version, name: str, code: str = "INVALID_ARGUMENT") -> Signature:
        """A signature by name, "" for serving_default. `code` is that of the error where there is none."""
        wanted = name or DEFAULT_SIGNATURE
        found = version.signatures.get(wanted)
        if found is None:
            known = ", ".join(version.signatures) or "none"
            raise ServingError(
                code, f'Serving signature name: "{wanted}" not found in signature def; the model has: {known}'
            )
        return found

    def examples_signature(self, version: Version, name: str, method: str) -> Signature:
        """The signature that a Classify or Regress request means. Raises ServingError where it does not fit `method`.

        As in TF Serving its form decides, and its method name only where the server was told so: TensorFlow 2 writes
        the predict name into every signature.
        """
        # TF Serving takes serving_default when a request names no signature, and refuses it if that does not fit.
        # Where the model has exactly one signature of the method, it is clear what was meant.
        if not name and not self._fits(version.signatures.get(DEFAULT_SIGNATURE), method):
            fitting = [signature for signature in version.signatures.values() if signature.method == method]
            if len(fitting) == 1:
                if (version.model, method) not in self._warned:
                    self._warned.add((version.model, method))
                    logger.warning(
                        "%s: a %s request names no signature; using %r. TF Serving itself wants "
                        '"signature_name": "%s" in such requests',
                        version.model,
                        method.rpartition("/")[2],
                        fitting[0].name,
                        fitting[0].name,
                    )
                name = fitting[0].name
        signature = version.signatures.get(name or DEFAULT_SIGNATURE)
        if signature is None:
            known = ", ".join(version.signatures) or "none"
            raise invalid(f"No signature was found with the name: {name or DEFAULT_SIGNATURE}; the model has: {known}")
        examples.check_signature(signature, method, by_name=self._check_method_names)
        return signature

    def _fits(self, signature: Signature | None, method: str) -> bool:
        if signature is None:
            return False
        try:
            examples.check_signature(signature, method, by_name=self._check_method_names)
        except ServingError:
            return False
        return True


def check_inputs(signature: Signature, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Checks names and dtypes against the signature; returns the inputs with the defaults of those left out.

    Shapes are for the graph to judge, as in TF Serving. Raises ServingError that says what was expected.
    """
    inputs = {**signature.defaults, **inputs}
    missing = [name for name in signature.inputs if name not in inputs]
    extra = sorted(name for name in inputs if name not in signature.inputs)
    if missing or extra:
        raise invalid(
            f"input size does not match signature {signature.name!r}: {len(inputs)}!={len(signature.inputs)} len({{"
            f"{','.join(signature.inputs)}}}). Sent extra: {{{','.join(extra)}}}. "
            f"Missing but required: {{{','.join(missing)}}}."
        )
    for name, spec in signature.inputs.items():
        array = inputs[name]
        if array.dtype != numpy_dtype(spec.dtype):
            raise invalid(f"input {name!r} has dtype {_dtype(array)}; expected {spec.describe()}")
    return inputs


def _dtype(array: np.ndarray) -> str:
    return "string" if array.dtype == object else str(array.dtype)


def explained(error: ServingError, signature: Signature, inputs: Mapping[str, np.ndarray]) -> ServingError:
    """`error` of the graph, with the shapes that are not as declared: they are the likely reason."""
    if error.code in ("RESOURCE_EXHAUSTED", "UNAVAILABLE"):
        return error  # the graph was not asked
    odd = [
        f"input {name!r} has shape {list(array.shape)}, the signature declares {signature.inputs[name].describe()}"
        for name, array in inputs.items()
        if not signature.inputs[name].accepts(array.shape)
    ]
    return ServingError(error.code, "; ".join([error.message, *odd])) if odd else error
