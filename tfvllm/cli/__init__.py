"""The command line: one short module per command; each parses, calls the API and prints."""

import gc
import importlib
import importlib.util
import os
import sys

import click

from tfvllm._version import __version__
from tfvllm.errors import TfvllmError

__all__ = ["COMMANDS", "cli", "main", "quiet"]

# command -> what it does. The module is tfvllm.cli.<command>, its click command is named `command`.
COMMANDS = {
    "compress": "Make a teacher into a small, fast SavedModel with a measured report (the main job).",
    "simplify": "Rewrite a SavedModel's graph: the same signatures, verified, faster.",
    "export": "Turn a trained Keras task into a SavedModel that a stock TF Serving loads.",
    "inspect": "Show signatures, ops, parameters, FLOPs, and what would be merged or why not.",
    "lint": "Would a stock TF Serving load and serve this? Each problem and its fix.",
    "predict": "Run a SavedModel from the shell.",
    "serve": "Serve SavedModels over TF Serving's REST and gRPC protocols.",
    "versions": "Publish, list, roll back and restore the versions of a served model.",
    "bench": "Measure latency, throughput, generation or serving side by side.",
    "report": "Show the report of a compress run.",
}


class _Commands(click.Group):
    """Imports a command's module only when it is called, so that --help is instant."""

    def list_commands(self, ctx):
        return [name for name in COMMANDS if importlib.util.find_spec(f"tfvllm.cli.{name}")]

    def get_command(self, ctx, name):
        if name not in COMMANDS:
            return None
        return importlib.import_module(f"tfvllm.cli.{name}").command

    def format_commands(self, ctx, formatter):
        rows = [(name, COMMANDS[name]) for name in self.list_commands(ctx)]
        if rows:
            with formatter.section("Commands"):
                formatter.write_dl(rows)


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="tfvllm")
def cli():
    """Smaller, faster SavedModels from Keras 3 language models, with proof that they do the same job."""


def quiet() -> None:
    """Keeps TensorFlow's start-up noise from the user; to be called before TensorFlow is imported."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
    os.environ.setdefault("KERAS_BACKEND", "tensorflow")
    import logging
    import warnings

    logging.getLogger("tensorflow").setLevel(logging.ERROR)
    logging.getLogger("absl").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")


def main(arguments: list[str] | None = None) -> None:
    """Runs the command line and exits: 0 done, 1 the work failed, 2 wrong call or input, 3 verification failed."""
    quiet()
    # Looking for garbage after every 700 objects took a tenth of a command's time, much of it while TensorFlow and
    # Keras were imported, and would stop a server now and then for a tenth of a second.
    gc.set_threshold(50_000, 5, 5)
    try:
        code = cli.main(args=arguments, prog_name="tfvllm", standalone_mode=False)
    except click.exceptions.Abort:
        code = _say("interrupted", 1)
    except click.ClickException as error:
        error.show()
        code = 2
    except TfvllmError as error:
        code = _say(str(error), error.exit_code)
    except KeyboardInterrupt:
        code = _say("interrupted", 1)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 1
    except Exception as error:
        if os.environ.get("TFVLLM_TRACEBACK"):
            raise
        line = " ".join(f"{type(error).__name__}: {error}".split())
        code = _say(f"{line[:400]} (TFVLLM_TRACEBACK=1 shows where)", 1)
    sys.exit(code if isinstance(code, int) else 0)


def _say(message: str, code: int) -> int:
    click.echo(f"tfvllm: {message}", err=True)
    return code
