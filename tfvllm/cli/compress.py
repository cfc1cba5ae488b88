"""`tfvllm compress`: the main job."""

import json
from pathlib import Path

import click


@click.command("compress", short_help="Make a teacher into a small, fast SavedModel with a measured report.")
@click.argument("recipe", type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), help="Output folder; default runs/<name of the recipe>.")
@click.option("--data", type=click.Path(path_type=Path), help="A folder of train and dev files, or one file to split.")
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override a key: --set teacher.epochs=1.")
@click.option("--resume", is_flag=True, help="Resume; re-run changed steps and their dependents.")
@click.option("--overwrite", is_flag=True, help="Start afresh in an earlier run's folder.")
@click.option("--json", "as_json", is_flag=True, help="Print the report as one JSON object on stdout.")
def command(recipe, out, data, overrides, resume, overwrite, as_json):
    """Takes RECIPE.yaml from data to a small, fast SavedModel, with a report of what each step gave and cost.

    Three tasks: classify (sentence<TAB>label), generate (.txt or .jsonl), translate (source<TAB>target, or two files).
    Data, teacher, student, distillation, pruning, shrinking, export, simplifying, benchmark: a step that the recipe
    leaves out is not done. Ctrl-C is safe: finished steps and epochs are kept, --resume goes on.
    """
    from tfvllm.compress.recipe import read_recipe
    from tfvllm.errors import InputError

    if resume and overwrite:
        raise InputError("expected --resume (go on) or --overwrite (start afresh), found both.")
    checked = read_recipe(recipe, data=data, overrides=overrides)
    out = out or Path("runs") / checked.name

    from tfvllm.quietly import import_tensorflow, no_stderr

    import_tensorflow()
    with no_stderr():
        import keras_nlp  # noqa: F401
    from tfvllm import compress
    from tfvllm.compress.console import Console

    content = compress.run(checked, out, resume=resume, overwrite=overwrite, console=Console())
    if as_json:
        click.echo(json.dumps(content, ensure_ascii=False))
        return
    from tfvllm.compress.report import summary_lines

    click.echo("\n".join(summary_lines(content, out)))
