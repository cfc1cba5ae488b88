"""`tfvllm serve NAME=DIR …`: TF Serving's protocols in front of SavedModels."""

import dataclasses
import logging
import os
import sys
from pathlib import Path

import click

from tfvllm.errors import InputError

_PATH = click.Path(path_type=Path)


@click.command(
    "serve",
    short_help="Serve SavedModels over TF Serving's REST and gRPC protocols.",
    # TF Serving writes its flags with underscores.
    context_settings={"token_normalize_func": lambda name: name.replace("_", "-")},
)
@click.argument("models", metavar="NAME=DIR ...", nargs=-1)
@click.option("--model-name", default="default", help="TF Serving's way to say NAME=DIR, with --model-base-path.")
@click.option("--model-base-path", type=_PATH)
@click.option("--model-config-file", type=_PATH, help="TF Serving's models.config, instead of or beside NAME=DIR.")
@click.option(
    "--model-config-file-poll-wait-seconds",
    "config_poll",
    default=0.0,
    type=click.FloatRange(0),
    help="Poll interval for changes of that file (s).  [default: none]",
)
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option(
    "--rest-port",
    "--rest-api-port",
    default=8501,
    show_default=True,
    type=click.IntRange(0, 65535),
    help="0 picks a free one.",
)
@click.option(
    "--grpc-port", "--port", type=click.IntRange(0, 65535), help="TF Serving's is 8500. Needs the extra [serve]."
)
@click.option("--grpc-socket-path", type=_PATH, help="A Unix socket for gRPC, beside the port or in its place.")
@click.option("--grpc-channel-arguments", default="", help="Such as grpc.max_connection_age_ms=2000, with commas.")
@click.option("--workers", default=0, show_default=True, type=click.IntRange(0), help="Model processes; 0: threads.")
@click.option(
    "--slots", type=click.IntRange(1), help="Max concurrent runs.  [default: half the cores, or 1 per worker]"
)
@click.option(
    "--intra-op-threads",
    "--tensorflow-intra-op-parallelism",
    default=0,
    type=click.IntRange(0),
    help="Threads of one op; 0: all cores.",
)
@click.option("--batching/--no-batching", default=True, show_default=True, help="Run waiting requests together.")
@click.option("--enable-batching", is_flag=True, hidden=True, help="TF Serving's flag; on by itself here.")
@click.option(
    "--enable-signature-method-name-check",
    is_flag=True,
    help="Classify and Regress only by signatures whose method name says so.",
)
@click.option("--batching-parameters-file", type=_PATH, help="TF Serving's batching parameters.")
@click.option("--max-batch-size", type=click.IntRange(1), help="Rows in one run.  [default: 32]")
@click.option("--batch-timeout-ms", type=click.FloatRange(0), help="Max wait to fill a batch.")
@click.option("--max-queued", type=click.IntRange(1), help="Requests that may wait; more get 429.  [default: 1024]")
@click.option("--max-request-bytes", type=click.IntRange(1), help="A larger body gets 413.  [default: 64 MiB]")
@click.option("--request-timeout", type=click.FloatRange(0, min_open=True), help="Seconds; then 504.  [default: 60]")
@click.option(
    "--read-timeout", type=click.FloatRange(0, min_open=True), help="Seconds to send a request.  [default: 30]"
)
@click.option(
    "--poll",
    "--file-system-poll-wait-seconds",
    default=1.0,
    show_default=True,
    type=click.FloatRange(0),
    help="Version poll interval (s).",
)
@click.option("--grace", default=30.0, show_default=True, type=click.FloatRange(0), help="Shutdown grace period (s).")
@click.option("--ssl-cert", type=_PATH, help="PEM certificate (chain) for TLS.")
@click.option("--ssl-key", type=_PATH, help="PEM key for TLS.")
@click.option("--ssl-client-ca", type=_PATH, help="CA bundle (PEM) to verify client certificates (mTLS).")
@click.option("--token-file", type=_PATH, help="File with a bearer token that clients must send.")
@click.option("--basic-auth-file", type=_PATH, help="File with user:password that clients must send.")
@click.option("--cors", "--rest-api-enable-cors-support", is_flag=True, help="Answer browsers' cross-origin requests.")
@click.option("--log-level", default="info", type=click.Choice(["debug", "info", "warning", "error"]))
def command(models, **given):
    """Serves each NAME from DIR: a folder of versions (1/, 2/, …; the highest is served, new ones are picked up while
    running) or one SavedModel.

    \b
    tfvllm serve sentiment=saved_models/sentiment
    curl -d '{"instances": ["not bad at all"]}' http://127.0.0.1:8501/v1/models/sentiment:predict
    """
    from tfvllm.quietly import import_tensorflow
    from tfvllm.serving.server import Server

    options = _options(models, given)
    logging.basicConfig(stream=sys.stderr, format="%(message)s")
    logging.getLogger("tfvllm").setLevel(given["log_level"].upper())
    import_tensorflow(without_keras=True)
    server = Server(options)
    server.run(on_start=lambda: click.echo(_greeting(server), err=True))


def _options(models, given):
    from tfvllm.serving import config
    from tfvllm.serving.batching import BatchingOptions
    from tfvllm.serving.core import Limits
    from tfvllm.serving.server import Options

    configs = [_model(item) for item in models]
    if given["model_base_path"] is not None:
        configs.append(_model(f"{given['model_name']}={given['model_base_path']}"))
    if given["model_config_file"] is not None:
        config.read_models(given["model_config_file"])  # what is wrong with it is told before anything is loaded
    elif not configs:
        raise InputError("nothing to serve: expected NAME=DIR, such as sentiment=saved_models/sentiment.")
    batching, slots, limits = BatchingOptions(), given["slots"], Limits()
    if given["batching_parameters_file"] is not None:
        file = config.read_batching(given["batching_parameters_file"])
        batching, slots = file.options, slots or file.slots
        if file.max_queued:
            limits = dataclasses.replace(limits, max_queued=file.max_queued)
    batching = _replace(
        batching,
        enabled=given["batching"],
        max_batch_size=given["max_batch_size"],
        batch_timeout_ms=given["batch_timeout_ms"],
    )
    limits = _replace(
        limits,
        max_queued=given["max_queued"],
        max_request_bytes=given["max_request_bytes"],
        request_timeout_s=given["request_timeout"],
        read_timeout_s=given["read_timeout"],
    )
    if (given["ssl_cert"] is None) != (given["ssl_key"] is None):
        raise InputError("TLS needs both --ssl-cert and --ssl-key; got one of them.")
    if given["ssl_client_ca"] is not None and given["ssl_cert"] is None:
        raise InputError("--ssl-client-ca needs --ssl-cert and --ssl-key.")
    for name in ("ssl_cert", "ssl_key", "ssl_client_ca"):
        if given[name] is not None and not given[name].is_file():
            raise InputError(f"no file {given[name]}; --{name.replace('_', '-')} expects a PEM file.")
    basic = _secret(given["basic_auth_file"], "--basic-auth-file")
    if basic is not None and ":" not in basic:
        raise InputError("--basic-auth-file expects a file with user:password; found no colon in it.")
    return Options(
        configs,
        host=given["host"],
        rest_port=given["rest_port"],
        grpc_port=given["grpc_port"],
        workers=given["workers"],
        slots=slots,
        intra_op_threads=given["intra_op_threads"],
        batching=batching,
        limits=limits,
        poll_s=given["poll"],
        grace_s=given["grace"],
        certificate=given["ssl_cert"],
        key=given["ssl_key"],
        client_ca=given["ssl_client_ca"],
        token=_secret(given["token_file"], "--token-file"),
        basic_auth=basic,
        cors=given["cors"],
        grpc_socket_path=given["grpc_socket_path"],
        grpc_channel_arguments=_channel_arguments(given["grpc_channel_arguments"]),
        check_method_names=given["enable_signature_method_name_check"],
        model_config_file=given["model_config_file"],
        config_poll_s=given["config_poll"],
    )


def _greeting(server) -> str:
    names = ", ".join(server.core.manager.models)
    socket = server.options.grpc_socket_path
    places = [f"port {server.grpc_port}"] if server.grpc_port else []
    places += [f"socket {socket}"] if socket is not None else []
    grpc = f", gRPC on {' and '.join(places)}" if places else ""
    return f"Serving {names} at {server.rest_url}/v1/models{grpc}. Ctrl-C stops."


def _channel_arguments(text: str) -> dict[str, str | int]:
    arguments: dict[str, str | int] = {}
    for item in filter(None, text.split(",")):
        key, sign, value = item.partition("=")
        if not key or not sign:
            raise InputError(
                f"--grpc-channel-arguments expects NAME=VALUE with commas between, such as "
                f"grpc.max_connection_age_ms=2000; got {item!r}."
            )
        arguments[key] = int(value) if value.lstrip("-").isdecimal() else value
    return arguments


def _replace(options, **changes):
    return dataclasses.replace(options, **{name: value for name, value in changes.items() if value is not None})


def _model(item: str):
    from tfvllm.serving.manager import ModelConfig

    name, sign, directory = item.partition("=")
    if not sign or not name or not directory:
        raise InputError(f"expected NAME=DIR, such as sentiment=saved_models/sentiment; got {item!r}.")
    if not os.path.isdir(directory):
        raise InputError(f"no folder {directory} for model {name!r}; expected a SavedModel or its versions 1/, 2/, …")
    return ModelConfig(name, Path(directory))


def _secret(file: Path | None, option: str) -> str | None:
    if file is None:
        return None
    try:
        secret = file.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read {file}: {error}; {option} expects a text file.") from None
    if not secret:
        raise InputError(f"{file} is empty; {option} expects a secret in it.")
    return secret
