"""tfvllm inspect DIR."""

import json
import sys

import click

from tfvllm.cli.tensors import in_runs


@click.command()
@click.argument("source", metavar="DIR")
@click.option(
    "--target",
    default="onednn",
    show_default=True,
    type=click.Choice(["portable", "onednn"]),
    help="The target whose rules are tried.",
)
@click.option("--signature", help="Only this signature.")
@click.option("--diagram", metavar="G.mmd", help="Write the graph, as it is and as it would be, as a Mermaid diagram.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object and nothing else.")
def command(source, target, signature, diagram, as_json):
    """Show the signatures, ops, parameters, FLOPs and bytes of a SavedModel, and what would be merged or why not."""
    from tfvllm.quietly import import_tensorflow

    import_tensorflow()
    from tfvllm.cli.simplify import in_options
    from tfvllm.files import write_text
    from tfvllm.savedmodel import manifest
    from tfvllm.simplifier.api import inspect_saved_model
    from tfvllm.simplifier.diagram import side_by_side

    with in_options():
        found = inspect_saved_model(source, target=target, signature=signature)
    notes = manifest.read(source).get("notes", [])
    diagrams = {name: entry.pop("diagrams") for name, entry in found["signatures"].items()}
    if diagram:
        main = diagrams.get("serving_default") or next(iter(diagrams.values()))
        write_text(diagram, side_by_side(main["before"], main["after"]))
    if as_json:
        found["notes"] = notes
        json.dump(found, sys.stdout, indent=2)
        click.echo()
        return
    from rich.console import Console

    console = Console()
    for name, entry in found["signatures"].items():
        for table in _tables(name, entry):
            console.print(table)
    for note in notes:
        console.print(f"note: {note}", markup=False)


def _tables(name, entry):
    from rich.markup import escape
    from rich.table import Table

    ends = Table(title=f"signature {name}  ({entry['method_name']})", title_justify="left")
    for column in ("", "name", "dtype", "shape"):
        ends.add_column(column)
    for kind in ("inputs", "outputs"):
        for key, spec in in_runs(entry[kind]):
            ends.add_row(kind[:-1], key, spec["dtype"], escape(str(spec["shape"])))
    yield ends
    costs = Table(title=f"as it is, and as the rules would make it ({len(entry['would_merge'])} rules fire)")
    costs.title_justify = "left"
    for column in ("", "as it is", "simplified"):
        costs.add_column(column, justify="left" if not column else "right")
    for key in ("nodes", "flops", "parameters", "bytes"):
        costs.add_row(key, f"{entry[key]:,}", f"{entry['after'][key]:,}")
    yield costs
    ops = Table(title="ops", title_justify="left")
    for column in ("op", "as it is", "simplified"):
        ops.add_column(column, justify="left" if column == "op" else "right")
    for op in sorted({*entry["ops"], *entry["after"]["ops"]}, key=lambda o: -entry["ops"].get(o, 0)):
        ops.add_row(op, str(entry["ops"].get(op, 0)), str(entry["after"]["ops"].get(op, 0)))
    yield ops
    if entry["declined"]:
        near = Table(title="near misses", title_justify="left")
        for column in ("rule", "where", "why it declines"):
            near.add_column(column)
        for miss in entry["declined"]:
            near.add_row(miss["rule"], escape(miss["where"]), escape(miss["reason"]))
        yield near
