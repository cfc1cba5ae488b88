"""tfvllm simplify SRC DST."""

import contextlib
import json
import re
import sys

import click

from tfvllm.errors import InputError, TfvllmError
from tfvllm.export import PRECISIONS

_M_MMAP_THRESHOLD = -3  # <malloc.h>


@click.command()
@click.argument("source", metavar="SRC")
@click.argument("destination", metavar="DST")
@click.option(
    "--target",
    default="portable",
    show_default=True,
    type=click.Choice(["portable", "onednn"]),
    help="portable: public ops only; onednn: fused CPU ops.",
)
@click.option(
    "--precision",
    default="float32",
    show_default=True,
    type=click.Choice(PRECISIONS),
    help="int8 is for the target onednn only.",
)
@click.option("--signature", help="Rewrite only this signature.")
@click.option("--rules", "rules", multiple=True, metavar="NAME", help="Only this step or rule; -NAME leaves it out.")
@click.option(
    "--calibration",
    metavar="FILE",
    help="Inputs to verify on, and to take int8 ranges from: .npz, or .jsonl with one object of inputs a line.",
)
@click.option("--max-error", type=float, help="int8: largest error of a result over its largest magnitude.  [0.1]")
@click.option("--percentile", type=float, help="int8: clip activations at this percentile of |x|.  [100]")
@click.option(
    "--activations", type=click.Choice(["float32", "bfloat16"]), help="int8: between the products.  [float32]"
)
@click.option("--measure", is_flag=True, help="Keep a rule only if the graph is faster with it on this CPU.")
@click.option(
    "--profile",
    metavar="FILE",
    help="Representative request shapes; variants are benchmarked and dispatched by shape. .jsonl with lines like "
    '{"batch": 8, "length": 37, "count": 120}, {"lengths": [9, 4]} or {"inputs": {…}}.',
)
@click.option(
    "--memory-limit",
    type=float,
    help="With --profile: total weight memory over all variants, as a multiple of the original's.  [2]",
)
@click.option("--report", "html", metavar="R.html", help="Write the report as a page.")
@click.option("--diagram", metavar="G.mmd", help="Write the graph before and after as a Mermaid diagram.")
@click.option("--rtol", type=float, help="Fixed relative tolerance, in place of the comparison with float64.")
@click.option("--atol", type=float, help="Fixed absolute tolerance.")
@click.option("--overwrite", is_flag=True, help="Replace DST if it exists.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object and nothing else.")
def command(source, destination, html, diagram, as_json, calibration, rules, **options):
    """Rewrite the graph of the SavedModel SRC into DST: the same signatures, verified against the original."""
    from tfvllm.quietly import import_tensorflow

    _give_back_freed_memory()
    import_tensorflow(without_keras=True)
    from tfvllm.simplifier.api import simplify_saved_model

    say = (lambda line: None) if as_json else (lambda line: click.echo(line, err=True))
    with in_options():
        report = simplify_saved_model(
            source,
            destination,
            rules=list(rules) or None,
            calibration=None if calibration is None else read_inputs(calibration),
            progress=say,
            **options,
        )
    report.notes = [_options_of(note) for note in report.notes]
    if html:
        report.to_html(html)
    if diagram:
        report.to_mermaid(diagram)
    if as_json:
        json.dump(report.to_dict(), sys.stdout, indent=2)
        click.echo()
    else:
        from rich.console import Console

        Console().print(report.table())


@contextlib.contextmanager
def in_options():
    """Lets errors name the options of the command line, where they name the arguments of the Python call."""
    try:
        yield
    except TfvllmError as error:
        raise type(error)(_options_of(str(error))) from error


def _options_of(message: str) -> str:
    from tfvllm.simplifier.arguments import REAL_INPUTS

    message = message.replace(REAL_INPUTS, "--calibration FILE").replace('rules="-NAME"', "--rules -NAME")
    for argument, option in (("signature=", "--signature"), ("max_error=", "--max-error"), ("rtol=", "--rtol")):
        message = re.sub(rf"\b{argument}(?![\w…])", option, message)
    return message


def _give_back_freed_memory() -> None:
    """Lets the C library return every large buffer when it is freed, where it would keep some for later.

    Weights and their float64 copies come and go; kept, they would add up to a fifth of the model at the peak.
    """
    import ctypes

    with contextlib.suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, 1 << 18)


def read_inputs(path: str) -> list[dict]:
    """Rows of named inputs from an .npz (first axis: rows of one sample) or a .jsonl file."""
    import numpy as np

    try:
        if path.endswith(".npz"):
            with np.load(path) as archive:
                return [dict(archive)]
        with open(path, encoding="utf-8") as file:
            rows = [json.loads(line) for line in file if line.strip()]
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: expected an .npz or .jsonl file of inputs, found {error}.") from None
    if not rows or not all(isinstance(row, dict) for row in rows):
        raise InputError(f"{path}: expected one JSON object of inputs a line, found none or something else.")
    return rows
