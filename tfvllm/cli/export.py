"""`tfvllm export MODEL.keras DST --task …`: a trained Keras task to a SavedModel."""

import json
from pathlib import Path

import click

from tfvllm.cli.tensors import in_runs
from tfvllm.errors import InputError
from tfvllm.export import PRECISIONS, TASKS


@click.command("export", short_help="Turn a trained Keras task into a SavedModel that a stock TF Serving loads.")
@click.argument("model", metavar="MODEL")
@click.argument("destination", metavar="DST", type=click.Path(path_type=Path))
@click.option("--task", required=True, type=click.Choice(list(TASKS)), help="What the model is for.")
@click.option(
    "--labels",
    help="Class names in the order of the outputs: negative,positive; as JSON where they hold commas.",
)
@click.option("--max-length", type=click.IntRange(1), help="Longest text in tokens.  [default: the preprocessor's]")
@click.option(
    "--max-source-length",
    type=click.IntRange(1),
    help="translate: longest source in tokens; --max-length is the target's.  [default: the preprocessor's]",
)
@click.option(
    "--precision",
    default="float32",
    show_default=True,
    type=click.Choice(PRECISIONS),
    help="Of the weights, where the task offers it.",
)
@click.option("--option", "options", multiple=True, metavar="NAME=JSON", help="Any further option of the task.")
@click.option(
    "--check",
    default="fresh",
    show_default=True,
    type=click.Choice(["fresh", "here", "none"]),
    help="Where the SavedModel is compared with the model: in a fresh process without Keras, in this one, nowhere.",
)
@click.option("--warmup/--no-warmup", default=True, show_default=True, help="Write TF Serving's warm-up requests.")
@click.option(
    "--serving-kit",
    is_flag=True,
    help="Also write batching parameters, models.config, Dockerfile, KServe manifest beside the versions.",
)
@click.option("--publish", is_flag=True, help="DST is a folder of versions: write the next one into it.")
@click.option("--overwrite", is_flag=True, help="Replace an existing DST.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object and nothing else.")
def command(model, destination, task, labels, max_length, max_source_length, precision, options, check, warmup,
            serving_kit, publish, overwrite, as_json):  # fmt: skip
    """Writes a saved model as a SavedModel in DST. MODEL is a .keras file, a folder that save_to_preset wrote, a
    Hugging Face folder of a family that keras-nlp reads (its backbone: not for classify), a GGUF file, PACKAGE:PATH
    (one of these inside an installed package), or the name of a keras-nlp preset.

    \b
    tfvllm export sentiment.keras saved_models/sentiment/1 --task classify --labels negative,positive
    tfvllm export sentiment.keras saved_models/sentiment --publish --task classify    # the next version
    """
    from tfvllm.files import check_new, located
    from tfvllm.quietly import import_tensorflow, no_stderr

    given = _options(options)
    if max_source_length is not None:
        given["max_source_length"] = max_source_length
    named = None if labels is None else labels_of(labels)
    if publish:
        destination = _next_version(destination)
    check_new(destination, overwrite=overwrite)
    source = located(model) or model
    import_tensorflow()
    with no_stderr():
        import keras_nlp  # noqa: F401
    from tfvllm.export.exporter import check_call, export
    from tfvllm.models.load import forgotten, load, stated_options
    from tfvllm.savedmodel import manifest
    from tfvllm.serving import kit

    if serving_kit:
        kit.model_name(destination)
    asked = {"labels": named, "max_length": max_length}
    check_call(task, precision=precision, options=[*given, *(name for name in asked if asked[name] is not None)])
    with no_stderr():
        loaded = load(source, task)
    given = {**stated_options(loaded, task), **given}
    for note in forgotten(loaded, Path(source), [*given, *(name for name in asked if asked[name] is not None)]):
        click.echo(f"note: {note}", err=True)
    path = export(
        loaded,
        destination,
        task,
        labels=named,
        max_length=max_length,
        precision=precision,
        overwrite=overwrite,
        check=None if check == "none" else check,
        warmup=warmup,
        **given,
    )
    if serving_kit:
        document = manifest.read(path)
        document["steps"][-1]["again"] += " --serving-kit"
        manifest.write(path, document)
        kit.write(path)
    document = manifest.read(path)
    if as_json:
        click.echo(json.dumps({"path": str(path), "manifest": document}, ensure_ascii=False))
        return
    click.echo(f"wrote {path}")
    for name, signature in document.get("signatures", {}).items():
        click.echo(f"  {name}: {_tensors(signature['inputs'])} -> {_tensors(signature['outputs'])}")
    if document.get("texts") == 1 and task == "classify":
        click.echo("  takes one text a row; a model that was trained on pairs of texts needs --option texts=2")
    for note in document.get("notes", ()):
        click.echo(f"  note: {note}")
    error = document.get("measured_error")
    if error:
        click.echo(f"  largest difference from the model: {error['max_abs_error']:.2g} ({error['process']} process)")


def labels_of(text: str) -> list[str]:
    """The class names that `--labels` gives: separated by commas, or a JSON list."""
    if not text.startswith("["):
        return [label.strip() for label in text.split(",")]
    try:
        labels = json.loads(text)
    except ValueError as error:
        raise InputError(f'--labels takes a,b or a JSON list such as ["a, b", "c"]; got {text!r} ({error}).') from None
    if not labels or not all(isinstance(label, str) for label in labels):
        raise InputError(f"--labels takes a list of texts, one per class; got {text!r}.")
    return labels


# What `--option` may not set: it has a flag of its own, or is an argument.
_FLAGS = {
    "task": "--task", "labels": "--labels", "max_length": "--max-length", "max_source_length": "--max-source-length",
    "precision": "--precision", "check": "--check", "warmup": "--warmup or --no-warmup",
    "serving_kit": "--serving-kit", "overwrite": "--overwrite", "model": "the argument MODEL",
    "path": "the argument DST", "directory": "the argument DST",
}  # fmt: skip


def _options(items: tuple[str, ...]) -> dict[str, object]:
    given: dict[str, object] = {}
    for name, value in map(_option, items):
        if name in _FLAGS:
            raise InputError(f"--option {name}=… is given by {_FLAGS[name]}; expected an option without a flag.")
        if name in given:
            raise InputError(f"--option {name} is given twice, as {given[name]!r} and {value!r}; expected it once.")
        given[name] = value
    return given


def _next_version(base: Path) -> Path:
    from tfvllm.savedmodel import versions

    if (base / "saved_model.pb").exists():
        raise InputError(f"{base} is a SavedModel itself; --publish expects the folder above its versions.")
    return base / str(max([0, *versions.find(base), *versions.retired(base)]) + 1)


def _option(item: str) -> tuple[str, object]:
    name, sign, value = item.partition("=")
    if not sign or not name:
        raise InputError(f"--option takes NAME=JSON, such as pad_to_multiple=8; got {item!r}.")
    try:
        return name.replace("-", "_"), json.loads(value)
    except ValueError:
        return name.replace("-", "_"), value


def _tensors(tensors: dict) -> str:
    def shape(sizes):
        return "..." if sizes is None else ", ".join("?" if size is None else str(size) for size in sizes)

    return ", ".join(f"{name} {spec['dtype']}[{shape(spec['shape'])}]" for name, spec in in_runs(tensors))
