"""`tfvllm predict DIR`: run a SavedModel from the shell."""

import json
import sys
from pathlib import Path

import click

from tfvllm.errors import InputError


@click.command("predict", short_help="Run a SavedModel from the shell.")
@click.argument("directory", metavar="DIR", type=click.Path(path_type=Path))
@click.option("--text", "texts", multiple=True, help="A text to run on; may be given several times.")
@click.option("--file", type=click.Path(path_type=Path), help="A file with one text per line; - reads standard input.")
@click.option(
    "--input", "inputs", multiple=True, metavar="NAME=JSON", help="Any other input, such as max_new_tokens=40."
)
@click.option("--signature", default="serving_default", show_default=True, help="Which signature to run.")
@click.option("--batch", default=32, show_default=True, type=click.IntRange(1), help="Texts in one run.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object and nothing else.")
def command(directory, texts, file, inputs, signature, batch, as_json):
    """Runs the SavedModel in DIR (or its highest version, where DIR holds 1/, 2/, …) on texts.

    \b
    tfvllm predict saved_models/sentiment --text "not bad at all"
    tfvllm predict saved_models/story --text "One day" --signature generate --input max_new_tokens=40
    tfvllm predict saved_models/translate --text "We ordered two cups of tea and three apples."
    """
    rows = list(texts)
    if file is not None:
        rows += _lines(file)
    given = dict(_parse_input(item) for item in inputs)
    if not rows and not given:
        raise InputError("nothing to run on: pass --text TEXT, --file FILE (one text per line) or --input NAME=JSON.")

    from tfvllm.quietly import import_tensorflow
    from tfvllm.serving.run import predict

    import_tensorflow(without_keras=True)
    outputs = predict(directory, rows, given, signature=signature, batch=batch)
    if as_json:
        click.echo(json.dumps({"outputs": outputs}, ensure_ascii=False))
    elif {"classes", "scores"} <= set(outputs):
        for i, (classes, scores) in enumerate(zip(outputs["classes"], outputs["scores"])):
            best = max(range(len(scores)), key=scores.__getitem__)
            text = rows[i] if i < len(rows) else f"row {i}"
            others = "  ".join(f"{name} {score:.4f}" for name, score in zip(classes, scores))
            click.echo(f"{classes[best]}\t{scores[best]:.4f}\t{text}\t({others})")
    else:
        count = max((len(value) for value in outputs.values() if isinstance(value, list)), default=1)
        for i in range(count):
            parts = [value[i] if isinstance(value, list) else value for value in outputs.values()]
            if len(outputs) == 1:
                click.echo(parts[0] if isinstance(parts[0], str) else json.dumps(parts[0], ensure_ascii=False))
            else:
                click.echo(json.dumps(dict(zip(outputs, parts)), ensure_ascii=False))


def _lines(file: Path) -> list[str]:
    try:
        text = sys.stdin.read() if str(file) == "-" else file.read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(f"cannot read {file}: {error.strerror}; expected a text file, one text per line.") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{file} is not UTF-8 (byte {error.start}); expected UTF-8 text, one text per line.") from None
    rows = text.split("\n")
    return rows[:-1] if rows and not rows[-1] else rows


def _parse_input(item: str) -> tuple[str, object]:
    name, sign, value = item.partition("=")
    if not sign or not name:
        raise InputError(f"--input takes NAME=JSON, such as max_new_tokens=40; got {item!r}.")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value
