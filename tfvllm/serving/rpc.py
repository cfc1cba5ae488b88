"""TF Serving's gRPC API: PredictionService, ModelService, and gRPC's own health service.

Needs grpcio and tensorflow-serving-api: the extra [serve].
"""

import asyncio
import math
import time
from pathlib import Path
from typing import Any

import numpy as np

from tfvllm.errors import InputError
from tfvllm.serving.core import DEFAULT_SIGNATURE, Core
from tfvllm.serving.manager import ModelConfig, Version
from tfvllm.serving.servable import CLASSIFY, REGRESS, numpy_dtype
from tfvllm.serving.status import NUMBERS, ServingError, invalid

try:
    import grpc
    from tensorflow_serving.apis import (
        classification_pb2,
        get_model_metadata_pb2,
        get_model_status_pb2,
        inference_pb2,
        model_management_pb2,
        model_service_pb2_grpc,
        predict_pb2,
        prediction_service_pb2_grpc,
        regression_pb2,
    )
except ImportError as error:
    raise InputError(
        f"gRPC needs {error.name or 'tensorflow-serving-api'}, which is not installed. "
        "Run: pip install 'tfvllm[serve]', or serve REST alone (no --grpc-port)."
    ) from None

from tensorflow.core.framework import tensor_pb2, types_pb2

# numpy dtype name -> (TensorProto's field of values, element conversion)
_FIELDS = {
    "float32": "float_val",
    "float64": "double_val",
    "int8": "int_val",
    "int16": "int_val",
    "int32": "int_val",
    "uint8": "int_val",
    "uint16": "int_val",
    "int64": "int64_val",
    "uint32": "uint32_val",
    "uint64": "uint64_val",
    "bool": "bool_val",
    "int4": "int_val",
    "uint4": "int_val",
}


class GrpcServer:
    """A running gRPC server; `port` is the one it listens on, None where that is a Unix socket alone."""

    def __init__(self, server, port: int | None):
        self._server = server
        self.port = port

    async def stop(self, grace_s: float) -> None:
        """Takes no new calls, and waits at most `grace_s` for those under way."""
        await self._server.stop(grace_s)


async def start(core: Core, options, authorise=None) -> GrpcServer:
    """Starts the services on `options.host` and `options.grpc_port`, and on `options.grpc_socket_path`.

    Raises InputError when the port is taken or the socket cannot be made.
    """
    arguments = {
        "grpc.max_receive_message_length": core.limits.max_request_bytes,
        "grpc.max_send_message_length": -1,
        "grpc.so_reuseport": 0,
        **options.grpc_channel_arguments,
    }
    server = grpc.aio.server(
        interceptors=[] if authorise is None else [_Authorisation(authorise)], options=list(arguments.items())
    )
    local = options.grpc_port is None or options.host in ("127.0.0.1", "::1", "localhost")
    prediction_service_pb2_grpc.add_PredictionServiceServicer_to_server(PredictionService(core), server)
    model_service = ModelService(core, remote_reload=local or authorise is not None)
    model_service_pb2_grpc.add_ModelServiceServicer_to_server(model_service, server)
    server.add_generic_rpc_handlers((_health_handler(core),))
    port = None
    if options.grpc_port is not None:
        host = f"[{options.host}]" if ":" in options.host else options.host
        address = f"{host}:{options.grpc_port}"
        port = _listen(server, address, options)
        if not port:
            raise InputError(
                f"cannot listen on {address}: the port is taken. Pass another --grpc-port (0 picks a free one)."
            )
    if options.grpc_socket_path is not None and not _listen(server, f"unix:{options.grpc_socket_path}", options):
        raise InputError(
            f"cannot make the socket {options.grpc_socket_path}; expected a path of at most 107 bytes in a folder that "
            "can be written to. Pass another --grpc-socket-path."
        )
    await server.start()
    return GrpcServer(server, port)


def _listen(server, address: str, options) -> int:
    try:
        if options.certificate is not None:
            return server.add_secure_port(address, _credentials(options))
        return server.add_insecure_port(address)
    except RuntimeError:
        return 0


def _credentials(options):
    pair = (Path(options.key).read_bytes(), Path(options.certificate).read_bytes())
    authority = Path(options.client_ca).read_bytes() if options.client_ca is not None else None
    return grpc.ssl_server_credentials([pair], authority, require_client_auth=authority is not None)


class PredictionService(prediction_service_pb2_grpc.PredictionServiceServicer):
    """Predict, Classify, Regress, MultiInference, GetModelMetadata."""

    def __init__(self, core: Core):
        self._core = core

    async def Predict(self, request, context):
        """Runs a signature on tensors."""
        return await self._guard(context, "predict", request.model_spec.name, self._predict(request, context))

    async def Classify(self, request, context):
        """tf.Examples to labels and scores."""
        return await self._guard(context, "classify", request.model_spec.name, self._classify(request, context))

    async def Regress(self, request, context):
        """tf.Examples to numbers."""
        return await self._guard(context, "regress", request.model_spec.name, self._regress(request, context))

    async def MultiInference(self, request, context):
        """Several Classify and Regress signatures of one model on the same tf.Examples."""
        name = request.tasks[0].model_spec.name if request.tasks else ""
        return await self._guard(context, "multi_inference", name, self._multi_inference(request, context))

    async def GetModelMetadata(self, request, context):
        """The signatures of a version."""
        return await self._guard(context, "metadata", request.model_spec.name, self._metadata(request))

    async def _guard(self, context, api: str, model: str, answer):
        start, status = time.perf_counter(), "OK"
        try:
            return await answer
        except ServingError as error:
            status = error.code
            await context.abort(_code(error.code), error.message)
        except asyncio.CancelledError:
            status = "CANCELLED"
            raise
        finally:
            known = model if model in self._core.manager.models else "(unknown)"
            self._core.metrics.request(known, api, "GRPC", status, time.perf_counter() - start)

    async def _predict(self, request, context):
        version = self._find(request.model_spec)
        signature = request.model_spec.signature_name
        self._core.signature(version, signature, "FAILED_PRECONDITION")
        limit = self._core.limits.max_request_bytes
        inputs = {name: from_proto(proto, name, limit) for name, proto in request.inputs.items()}
        outputs = await self._core.predict(version, signature, inputs, list(request.output_filter), _remaining(context))
        response = predict_pb2.PredictResponse()
        _fill_spec(response.model_spec, version, signature)
        for name, array in outputs.items():
            response.outputs[name].CopyFrom(to_proto(array))
        return response

    async def _classify(self, request, context):
        version, rows = self._find(request.model_spec), serialised_examples(request.input)
        answer = await self._core.classify(version, request.model_spec.signature_name, rows, _remaining(context))
        response = classification_pb2.ClassificationResponse()
        _fill_spec(response.model_spec, version, request.model_spec.signature_name)
        _fill_classes(response.result, answer)
        return response

    async def _regress(self, request, context):
        version, rows = self._find(request.model_spec), serialised_examples(request.input)
        answer = await self._core.regress(version, request.model_spec.signature_name, rows, _remaining(context))
        response = regression_pb2.RegressionResponse()
        _fill_spec(response.model_spec, version, request.model_spec.signature_name)
        for value in answer:
            response.result.regressions.add(value=value)
        return response

    async def _multi_inference(self, request, context):
        if not request.tasks:
            raise invalid("Inference request must have at least one task")
        version = self._find(request.tasks[0].model_spec)
        asks, signatures = {CLASSIFY: self._core.classify, REGRESS: self._core.regress}, list[str]()
        for task in request.tasks:
            if not task.model_spec.name:
                raise invalid("Found ModelSpec with an empty model name.")
            if task.model_spec.name != request.tasks[0].model_spec.name:
                raise invalid("All ModelSpecs in a MultiInferenceRequest must access the same model name.")
            signature = task.model_spec.signature_name or DEFAULT_SIGNATURE
            if signature in signatures:
                raise invalid(f"Duplicate evaluation of signature: {signature}")
            if signature not in version.signatures:
                raise invalid(f"Requested signature not found in model graph: {signature}")
            if task.method_name not in asks:
                raise ServingError("UNIMPLEMENTED", f"Unsupported signature method_name: {task.method_name}")
            self._core.examples_signature(version, signature, task.method_name)
            signatures.append(signature)
        rows, timeout = serialised_examples(request.input), _remaining(context)
        calls = [
            asks[task.method_name](version, signature, rows, timeout)
            for task, signature in zip(request.tasks, signatures)
        ]
        response = inference_pb2.MultiInferenceResponse()
        answers: list[Any] = await asyncio.gather(*calls)
        for task, signature, answer in zip(request.tasks, signatures, answers):
            result = response.results.add()
            _fill_spec(result.model_spec, version, signature)
            if task.method_name == CLASSIFY:
                _fill_classes(result.classification_result, answer)
            else:
                for value in answer:
                    result.regression_result.regressions.add(value=value)
        return response

    async def _metadata(self, request):
        from tensorflow.core.protobuf import meta_graph_pb2

        if not request.metadata_field:
            raise invalid("GetModelMetadataRequest must specify at least one metadata_field")
        for name in request.metadata_field:
            if name != "signature_def":
                raise invalid(f"Metadata field {name} is not supported")
        version = self._find(request.model_spec)
        signatures = get_model_metadata_pb2.SignatureDefMap()
        for name, signature in version.signatures.items():
            signatures.signature_def[name].CopyFrom(meta_graph_pb2.SignatureDef.FromString(signature.proto))
        response = get_model_metadata_pb2.GetModelMetadataResponse()
        _fill_spec(response.model_spec, version, None)
        response.metadata["signature_def"].Pack(signatures)
        return response

    def _find(self, spec) -> Version:
        return self._core.manager.find(spec.name, *_version_of(spec))


class ModelService(model_service_pb2_grpc.ModelServiceServicer):
    """GetModelStatus and HandleReloadConfigRequest.

    `remote_reload`: whether a client may name the folders to serve. A SavedModel is a program, so a server that anyone
    can reach refuses.
    """

    def __init__(self, core: Core, remote_reload: bool):
        self._core = core
        self._remote_reload = remote_reload

    async def GetModelStatus(self, request, context):
        """The state of each version of a model."""
        try:
            spec = request.model_spec
            if not spec.name:
                raise invalid("Missing ModelSpec")
            versions = self._core.manager.status(spec.name, *_version_of(spec))
        except ServingError as error:
            await context.abort(_code(error.code), error.message)
        response = get_model_status_pb2.GetModelStatusResponse()
        states = get_model_status_pb2.ModelVersionStatus.State
        for version in versions:
            entry = response.model_version_status.add(version=version.number, state=states.Value(version.state))
            entry.status.error_code = NUMBERS[version.code]
            entry.status.error_message = version.message
        return response

    async def HandleReloadConfigRequest(self, request, context):
        """Serves exactly the models of the request from now on."""
        response = model_management_pb2.ReloadConfigResponse()
        try:
            if not self._remote_reload:
                raise ServingError(
                    "PERMISSION_DENIED",
                    "this server listens beyond loopback without authentication and takes no model config from clients",
                )
            if request.config.WhichOneof("config") != "model_config_list":
                raise invalid(
                    "ServerModelConfig type not supported by HandleReloadConfigRequest. Expected a model_config_list"
                )
            models = [model_config(config) for config in request.config.model_config_list.config]
            await self._core.manager.reconfigure(models)
        except ServingError as error:
            await context.abort(_code(error.code), error.message)
        return response


def model_config(config) -> ModelConfig:
    """TF Serving's ModelConfig message to ours. Raises ServingError for what it cannot mean."""
    if config.model_platform not in ("", "tensorflow"):
        raise invalid(f"model {config.name}: unknown model_platform {config.model_platform!r}; expected tensorflow")
    if not Path(config.base_path).is_dir():
        raise ServingError("FAILED_PRECONDITION", f"model {config.name}: no folder {config.base_path}")
    policy, options = config.model_version_policy, dict[str, Any]()
    kind = policy.WhichOneof("policy_choice")
    if kind == "latest":
        options["latest"] = policy.latest.num_versions or 1
    elif kind == "specific":
        options["specific"] = tuple(policy.specific.versions)
    elif kind == "all":
        options["latest"] = None
    return ModelConfig(config.name, Path(config.base_path), labels=dict(config.version_labels), **options)


class _Authorisation(grpc.aio.ServerInterceptor):
    def __init__(self, authorise):
        self._authorise = authorise

    async def intercept_service(self, continuation, details):
        if details.method.startswith("/grpc.health."):
            return await continuation(details)
        given = dict(details.invocation_metadata or ()).get("authorization", "")
        if self._authorise(given):
            return await continuation(details)
        handler = await continuation(details)
        if handler is None:
            return None

        async def refuse(request, context):
            await context.abort(_code("UNAUTHENTICATED"), "expected authorization metadata with the token or password")

        return grpc.unary_unary_rpc_method_handler(
            refuse, request_deserializer=handler.request_deserializer, response_serializer=handler.response_serializer
        )


def _health_handler(core: Core):
    # HealthCheckResponse has one field, the status: 1 serving, 2 not serving.
    async def check(request: bytes, context) -> bytes:
        return b"\x08\x01" if core.manager.ready else b"\x08\x02"

    return grpc.method_handlers_generic_handler(
        "grpc.health.v1.Health", {"Check": grpc.unary_unary_rpc_method_handler(check)}
    )


# --- protos -----------------------------------------------------------------------------------------------------------


def from_proto(proto: tensor_pb2.TensorProto, name: str, limit: int) -> np.ndarray:
    """A TensorProto as an array. Raises ServingError for one that is inconsistent, or that would unpack beyond `limit`
    bytes (one repeated value may stand for any number)."""
    import tensorflow as tf

    if proto.dtype not in types_pb2.DataType.values() or proto.dtype == types_pb2.DT_INVALID:
        raise invalid(f"input {name!r} has an invalid dtype ({proto.dtype})")
    if proto.tensor_shape.unknown_rank or any(dim.size < 0 for dim in proto.tensor_shape.dim):
        raise invalid(f"input {name!r} has no full shape; expected every dimension's size")
    dtype = tf.as_dtype(proto.dtype)
    try:
        item = 8 if dtype == tf.string else numpy_dtype(dtype.name).itemsize
    except ServingError:
        raise invalid(f"input {name!r} has dtype {dtype.name}, which cannot be sent as a TensorProto") from None
    count = math.prod(dim.size for dim in proto.tensor_shape.dim)
    if count * item > limit:
        raise ServingError(
            "RESOURCE_EXHAUSTED", f"input {name!r} would unpack to {count * item} bytes; the limit is {limit}"
        )
    try:
        array = tf.make_ndarray(proto)
    except (ValueError, TypeError, KeyError, IndexError) as error:
        line = " ".join(str(error).split())[:200]
        raise invalid(f"input {name!r} is no valid TensorProto: {line}") from None
    if dtype == tf.string and array.dtype != object:
        array = array.astype(object)
    return array


def to_proto(array: np.ndarray) -> tensor_pb2.TensorProto:
    """An array as a TensorProto with its values in the typed fields, as TF Serving answers by default."""
    import tensorflow as tf

    if array.dtype == object:
        proto = tensor_pb2.TensorProto(dtype=types_pb2.DT_STRING)
        proto.string_val.extend(v if isinstance(v, bytes) else v.encode() for v in array.ravel().tolist())
    else:
        proto = tensor_pb2.TensorProto(dtype=tf.as_dtype(array.dtype).as_datatype_enum)
        field = _FIELDS.get(array.dtype.name)
        if field is not None:
            getattr(proto, field).extend(
                map(int, array.ravel()) if "int4" in array.dtype.name else array.ravel().tolist()
            )
        elif array.dtype.kind == "c":
            values = proto.scomplex_val if array.dtype == np.complex64 else proto.dcomplex_val
            values.extend(np.ascontiguousarray(array).view(array.real.dtype).ravel().tolist())
        elif array.dtype.itemsize == 2:  # float16, bfloat16: their bits
            proto.half_val.extend(np.ascontiguousarray(array).view(np.uint16).ravel().tolist())
        else:
            proto.tensor_content = array.tobytes()
    proto.tensor_shape.SetInParent()  # a scalar's shape is empty, not missing
    for size in array.shape:
        proto.tensor_shape.dim.add(size=size)
    return proto


def serialised_examples(source) -> list[bytes]:
    """The tf.Examples of an Input message, each with the context's features before its own."""
    kind = source.WhichOneof("kind")
    if kind == "example_list":
        return [example.SerializeToString() for example in source.example_list.examples]
    if kind == "example_list_with_context":
        listed = source.example_list_with_context
        context = listed.context.SerializeToString()
        return [context + example.SerializeToString() for example in listed.examples]
    raise invalid("Input is empty.")


def _fill_classes(result, rows) -> None:
    for row in rows:
        classes = result.classifications.add()
        for label, score in row:
            classes.classes.add(label=label, score=score)


def _fill_spec(spec, version: Version, signature: str | None) -> None:
    spec.name = version.model
    spec.version.value = version.number
    if signature is not None:
        spec.signature_name = signature or DEFAULT_SIGNATURE


def _version_of(spec) -> tuple[int | None, str | None]:
    choice = spec.WhichOneof("version_choice")
    return (
        spec.version.value if choice == "version" else None,
        spec.version_label if choice == "version_label" else None,
    )


def _remaining(context) -> float | None:
    left = context.time_remaining()
    return None if left is None else max(left, 0.001)


def _code(name: str) -> "grpc.StatusCode":
    return grpc.StatusCode[name]
