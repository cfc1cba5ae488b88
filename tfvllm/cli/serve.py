"""`tfvllm serve NAME=DIR …`: TF Serving's protocols in front of SavedModels."""

import logging
import os
import sys
from pathlib import Path

import click

from tfvllm.errors import InputError


@click.command("serve", short_help="Serve SavedModels over TF Serving's REST and gRPC protocols.")
@click.argument("models", metavar="NAME=DIR ...", nargs=-1)
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option("--rest-port", default=8501, show_default=True, type=click.IntRange(0, 65535), help="0 picks a free one.")
@click.option("--grpc-port", type=click.IntRange(0, 65535), help="TF Serving's is 8500. Needs the extra [serve].")
@click.option("--log-level", default="info", type=click.Choice(["debug", "info", "warning", "error"]))
def command(models, host, rest_port, grpc_port, log_level):
    """Serves each NAME from DIR: a folder of versions (1/, 2/, …; the highest is served, new ones are picked up while
    running) or one SavedModel.

    \b
    tfvllm serve sentiment=saved_models/sentiment
    curl -d '{"instances": ["not bad at all"]}' http://127.0.0.1:8501/v1/models/sentiment:predict
    """
    from tfvllm.quietly import import_tensorflow
    from tfvllm.serving.manager import ModelConfig
    from tfvllm.serving.server import Options, Server

    configs = [_model(item, ModelConfig) for item in models]
    if not configs:
        raise InputError("nothing to serve: expected NAME=DIR, such as sentiment=saved_models/sentiment.")
    logging.basicConfig(stream=sys.stderr, format="%(message)s")
    logging.getLogger("tfvllm").setLevel(log_level.upper())
    import_tensorflow(without_keras=True)
    server = Server(Options(configs, host=host, rest_port=rest_port, grpc_port=grpc_port))
    server.run()


def _model(item: str, config):
    name, sign, directory = item.partition("=")
    if not sign or not name or not directory:
        raise InputError(f"expected NAME=DIR, such as sentiment=saved_models/sentiment; got {item!r}.")
    if not os.path.isdir(directory):
        raise InputError(f"no folder {directory} for model {name!r}; expected a SavedModel or its versions 1/, 2/, …")
    return config(name, Path(directory))
