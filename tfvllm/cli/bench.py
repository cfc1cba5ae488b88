"""`tfvllm bench`: latency, throughput, generation, serving, measured side by side."""

import importlib
import importlib.util
import json
from pathlib import Path
from typing import Any

import click

# command -> (module with a click command named `command`, what it does)
_ELSEWHERE = {
    "generate": ("tfvllm.bench.generate", "Tokens per second of generating SavedModels."),
    "serve": ("tfvllm.bench.serve", "Requests per second and latency through a server."),
}


class _Group(click.Group):
    """Imports the longer benchmarks only when they are called."""

    def list_commands(self, ctx):
        found = [name for name, (module, _) in _ELSEWHERE.items() if importlib.util.find_spec(module)]
        return sorted([*self.commands, *found])

    def get_command(self, ctx, name):
        if name in self.commands:
            return self.commands[name]
        if name not in self.list_commands(ctx):
            return None
        return importlib.import_module(_ELSEWHERE[name][0]).command

    def format_commands(self, ctx, formatter):
        helps = {name: known.get_short_help_str(200) for name, known in self.commands.items()}
        helps |= {name: text for name, (_, text) in _ELSEWHERE.items()}
        with formatter.section("Commands"):
            formatter.write_dl([(name, helps[name]) for name in self.list_commands(ctx)])


@click.group("bench", cls=_Group)
def command():
    """Measures SavedModels side by side: they take turns in one run, and ratios are what counts."""


class _Shape(click.ParamType):
    name = "BATCHxTOKENS"

    def convert(self, value, param, ctx):
        parts = str(value).lower().split("x")
        if len(parts) != 2 or not all(part.isdigit() and int(part) > 0 for part in parts):
            self.fail(f"expected BATCHxTOKENS such as 8x32, found {value!r}", param, ctx)
        return int(parts[0]), int(parts[1])


_shared = [
    click.argument("model", type=click.Path(path_type=Path), metavar="DIR"),
    click.option(
        "--vs", "others", multiple=True, type=click.Path(path_type=Path), help="Another SavedModel; may repeat."
    ),
    click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout."),
    click.option("--out", type=click.Path(path_type=Path), help="Also write the JSON to this file."),
]


def _with_shared(function):
    for decorate in reversed(_shared):
        function = decorate(function)
    return function


@command.command("latency")
@_with_shared
@click.option("--shape", "shapes", multiple=True, type=_Shape(), help="May repeat.  [default: 1x32, 8x32]")
@click.option(
    "--lengths",
    type=click.Path(path_type=Path),
    help="Requests of real lengths instead: numbers of tokens, one a line, or texts (lines, or a TSV with a label).",
)
@click.option("--batch", type=click.IntRange(1), help="With --lengths: rows of one request.  [default: 1]")
@click.option("--limit", type=click.IntRange(1), help="With --lengths: rows used at most.  [default: 256]")
@click.option("--signature", default="serving_default", show_default=True)
@click.option("--repeats", type=click.IntRange(1), default=50, show_default=True)
@click.option("--warmup", type=click.IntRange(0), default=5, show_default=True)
def latency(model, others, as_json, out, shapes, lengths, batch, limit, signature, repeats, warmup):
    """Milliseconds for one call of DIR, and of the others, at each shape, or over requests of real lengths.

    String inputs get sentences of everyday words, one token each in common vocabularies, or the texts of --lengths.
    """
    if lengths and shapes:
        raise click.UsageError("--shape and --lengths cannot go together; expected one of them.")
    if not lengths and (batch or limit):
        raise click.UsageError("--batch and --limit are for --lengths; with --shape write 8x32.")
    from tfvllm.quietly import import_tensorflow

    import_tensorflow(without_keras=True)
    from tfvllm.bench import models as bench

    loaded = {name: bench.ServedModel(path, signature) for name, path in bench.names_of(model, others).items()}
    if lengths:
        _real_lengths(loaded, lengths, batch or 1, limit or 256, repeats, warmup, as_json, out)
        return
    rows: list[dict[str, Any]] = []
    for batch, length in shapes or ((1, 32), (8, 32)):
        inputs = {name: served.made_up(batch, length) for name, served in loaded.items()}
        timings = bench.latency(loaded, inputs, repeats=repeats, warmup=warmup)
        rows.append({"shape": [batch, length], "models": {name: t.to_dict() for name, t in timings.items()}})
    first = next(iter(loaded))
    table = [
        [f"({row['shape'][0]}, {row['shape'][1]}) {name}", f"{t['median_ms']:.3f}", f"{t['p95_ms']:.3f}",
         f"{t['median_ms'] / row['models'][first]['median_ms']:.2f}"]
        for row in rows for name, t in row["models"].items()
    ]  # fmt: skip
    _print(
        "latency", rows, ["(batch, tokens)", "median ms", "p95 ms", f"times as long as {first}"], table, as_json, out
    )


def _real_lengths(loaded, file, batch, limit, repeats, warmup, as_json, out):
    """Every model answers the same requests; of each request its median over the passes counts."""
    from tfvllm.bench import models as bench

    rows = _texts(file, limit)
    texts = None if all(row.strip().isdigit() for row in rows) else rows
    groups = [rows[i : i + batch] for i in range(0, len(rows), batch)]
    requests = {name: [served.request(group, texts is not None) for group in groups] for name, served in loaded.items()}
    # As many passes as make `repeats` requests at least.
    passes = max(3, -(-repeats // len(groups)))
    found = bench.distribution(loaded, requests, passes=passes, warmup=warmup)
    first = next(iter(loaded))
    content = {
        "requests": len(groups),
        "batch": batch,
        "source": file.name,
        "of": "lengths" if texts is None else "texts",
        "lengths": bench.percentiles([int(row) if texts is None else len(row.split()) for row in rows]),
        "passes": passes,
        "models": {name: bench.percentiles(times) for name, times in found.items()},
    }
    table = [
        [name, *(f"{p[key]:.3f}" for key in ("mean", "p50", "p90", "p95", "p99", "max")),
         f"{p['mean'] / content['models'][first]['mean']:.2f}"]
        for name, p in content["models"].items()
    ]  # fmt: skip
    spread = content["lengths"]
    unit = "tokens" if texts is None else "words"
    headers = [
        f"{len(groups)} requests of {batch} from {file.name}, {unit}: median {spread['p50']:g}, p95 {spread['p95']:g}",
        *("mean ms", "p50 ms", "p90 ms", "p95 ms", "p99 ms", "max ms", f"times as long as {first}"),
    ]
    _print("latency", content, headers, table, as_json, out)


@command.command("throughput")
@_with_shared
@click.option(
    "--file", "file", type=click.Path(path_type=Path), help="Sentences: a TSV with sentence<TAB>label, or lines."
)
@click.option("--batch", type=click.IntRange(1), default=32, show_default=True)
@click.option("--limit", type=click.IntRange(1), default=512, show_default=True, help="Sentences used at most.")
@click.option("--repeats", type=click.IntRange(1), default=5, show_default=True)
def throughput(model, others, as_json, out, file, batch, limit, repeats):
    """Sentences per second of DIR, and of the others, in batches; real sentences with --file, else synthetic ones."""
    from tfvllm.quietly import import_tensorflow

    import_tensorflow(without_keras=True)
    from tfvllm.bench import models as bench

    texts = _texts(file, limit)
    loaded = {name: bench.ServedModel(path) for name, path in bench.names_of(model, others).items()}
    found = bench.throughput(loaded, texts, batch=batch, repeats=repeats)
    source = file.name if file else "synthetic reviews"
    rows = {"sentences": len(texts), "source": source, "batch": batch, "models": found}
    first = found[next(iter(found))]["sentences_per_second"]
    table = [
        [name, f"{entry['sentences_per_second']:,.1f}", f"{entry['sentences_per_second'] / first:.2f}"]
        for name, entry in found.items()
    ]
    headers = ["SavedModel", f"sentences/s ({len(texts)} from {source}, batches of {batch})", "ratio to the first"]
    _print("throughput", rows, headers, table, as_json, out)


def _texts(file: Path | None, limit: int) -> list[str]:
    from tfvllm.data import HEADER, read_tsv, synthetic_reviews
    from tfvllm.errors import InputError

    if file is None:
        return [text for text, _ in synthetic_reviews(limit, seed=1)]
    try:
        content = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{file}: expected a readable UTF-8 file: {error}") from error
    if content.split("\n", 1)[0].rstrip("\r") == HEADER:
        return [text for text, _ in read_tsv(file)][:limit]
    lines = [line.rstrip("\r") for line in content.split("\n") if line.strip()]
    if not lines:
        raise InputError(f"{file}: expected at least one sentence, found none.")
    return lines[:limit]


def _print(what, rows, headers, table, as_json, out):
    from tfvllm.bench import results

    content = {"what": what, "conditions": results.conditions(), "results": rows}
    if out:
        results.write_json(out, what, rows)
    click.echo(json.dumps(content, ensure_ascii=False) if as_json else results.text_table(headers, table))
