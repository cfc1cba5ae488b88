"""`tfvllm versions …`: publish, list, roll back and restore version folders."""

import json
from pathlib import Path

import click

_BASE = click.argument("base", type=click.Path(path_type=Path))


@click.group("versions", short_help="Publish, list, roll back and restore version folders.")
def command():
    """Version folders as TF Serving reads them; each change is whole at once, so that a running server never sees half
    a version."""


@command.command("list")
@_BASE
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object and nothing else.")
def show(base, as_json):
    """The versions under BASE, and the retired ones."""
    from tfvllm.savedmodel import versions

    found, retired = sorted(versions.find(base)), sorted(versions.retired(base))
    if as_json:
        click.echo(json.dumps({"versions": found, "retired": retired}))
    else:
        click.echo(
            f"versions: {', '.join(map(str, found)) or 'none'}   retired: {', '.join(map(str, retired)) or 'none'}"
        )


@command.command("publish")
@click.argument("source", type=click.Path(path_type=Path))
@_BASE
@click.option("--version", type=click.IntRange(1), help="Default: one more than the highest.")
def publish(source, base, version):
    """Copies the SavedModel in SOURCE to the next version folder of BASE."""
    from tfvllm.savedmodel import versions

    click.echo(f"published {versions.publish(source, base, version)}")


@command.command("rollback")
@_BASE
@click.option("--to", type=click.IntRange(0), help="The version to go back to. Default: the one before the highest.")
def rollback(base, to):
    """Takes the highest version(s) of BASE out of service; servers go back to the highest one left."""
    from tfvllm.savedmodel import versions

    taken = versions.rollback(base, to)
    click.echo(f"out of service: {', '.join(map(str, taken)) or 'none'}; serving {max(versions.find(base))}")


@command.command("restore")
@_BASE
@click.argument("version", type=int)
def restore(base, version):
    """Puts a version that was rolled back into service again."""
    from tfvllm.savedmodel import versions

    click.echo(f"in service again: {versions.restore(base, version)}")
