"""`tfvllm export MODEL.keras DST --task …`: a trained Keras task to a SavedModel."""

import json
from pathlib import Path

import click

from tfvllm.errors import InputError


@click.command("export", short_help="Turn a trained Keras task into a SavedModel that a stock TF Serving loads.")
@click.argument("model", metavar="MODEL.keras", type=click.Path(path_type=Path))
@click.argument("destination", metavar="DST", type=click.Path(path_type=Path))
@click.option("--task", required=True, help="classify, generate, translate or embed.")
@click.option("--labels", help="Class names in the order of the outputs: negative,positive")
@click.option("--max-length", type=click.IntRange(1), help="Longest text in tokens.  [default: the preprocessor's]")
@click.option("--precision", default="float32", show_default=True, help="Of the weights, where the task offers it.")
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
def command(model, destination, task, labels, max_length, precision, options, check, warmup, serving_kit, publish,
            overwrite, as_json):  # fmt: skip
    """Writes the model saved in MODEL.keras (or a preset folder of keras-nlp) as a SavedModel in DST.

    \b
    tfvllm export sentiment.keras saved_models/sentiment/1 --task classify --labels negative,positive
    tfvllm export sentiment.keras saved_models/sentiment --publish --task classify    # the next version
    """
    from tfvllm.files import check_new
    from tfvllm.quietly import import_tensorflow

    given = dict(_option(item) for item in options)
    if publish:
        destination = _next_version(destination)
    check_new(destination, overwrite=overwrite)
    if not model.exists():
        raise InputError(f"no file {model}; expected a model saved by model.save('NAME.keras') or a preset folder.")
    import_tensorflow()
    from tfvllm import manifest
    from tfvllm.export.exporter import check_call, export

    check_call(task, precision=precision)
    loaded = _load(model)
    path = export(
        loaded,
        destination,
        task,
        labels=None if labels is None else [label.strip() for label in labels.split(",")],
        max_length=max_length,
        precision=precision,
        overwrite=overwrite,
        check=None if check == "none" else check,
        warmup=warmup,
        serving_kit=serving_kit,
        **given,
    )
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


def _load(path: Path):
    from tfvllm.quietly import no_stderr

    with no_stderr():
        import keras
        import keras_nlp

        import tfvllm.models  # noqa: F401  registers the classes of shrunk models

    try:
        if path.is_dir():
            return keras_nlp.models.Task.from_preset(str(path))
        return keras.saving.load_model(str(path), compile=False)
    except Exception as error:
        line = " ".join(str(error).split())[:300]
        raise InputError(f"{path} does not load as a Keras model: {line}") from None


def _next_version(base: Path) -> Path:
    from tfvllm.serving import versions

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

    return ", ".join(f"{name} {spec['dtype']}[{shape(spec['shape'])}]" for name, spec in tensors.items())
