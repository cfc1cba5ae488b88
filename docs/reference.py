"""Writes docs/reference.md from the docstrings and docs/recipes.md from the recipes: `python docs/reference.py`.

`--check`: are they up to date?
"""

import functools
import importlib
import inspect
import re
import sys
import typing
from pathlib import Path
from typing import Any

DOCUMENT = Path(__file__).with_name("reference.md")
RECIPES = Path(__file__).with_name("recipes.md")

# Title, the module users import, what of it is public. The order is that of the page.
SECTIONS: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    ("Graph optimisation", "tfvllm", ("simplify", "simplify_saved_model", "inspect_saved_model")),
    ("What simplify returns", "tfvllm.simplifier.api", ("Simplified",)),
    ("The simplifier's report", "tfvllm.simplifier.report", ("Report",)),
    ("Guarantees", "tfvllm.graph.guarantee", ("Exact", "Reordered", "Approximate")),
    ("Rules of your own", "tfvllm.graph.rewriter", ("Rule", "Declined", "Skip")),
    (
        "Pruning",
        "tfvllm",
        ("prune_low_magnitude", "strip_pruning", "shrink", "PruningPolicy", "ConstantSparsity", "PolynomialDecay"),
    ),
    (
        "Pruning callbacks",
        "tfvllm.callbacks",
        ("MagnitudePruning", "MovementPruning", "UpdatePruningStep", "PruningSummaries"),
    ),
    (
        "Pruning, in detail",
        "tfvllm.pruning",
        (
            *(
                "sparsify",
                "sensitivity",
                "Sensitivity",
                "unit_scores",
                "plan_shrink",
                "Plan",
                "apply_plan",
                "mask_model",
            ),
            *("PruneLowMagnitude", "PruneKernels", "PruneForLatencyOnXNNPack"),
            *("PruningReport", "block_flops", "save_sparse", "load_sparse"),
        ),
    ),
    ("Distillation", "tfvllm", ("Distiller",)),
    ("Distillation callbacks", "tfvllm.callbacks", ("DistillationSummaries",)),
    (
        "Distillation losses",
        "tfvllm.losses",
        (
            *("ForwardKL", "ReverseKL", "JensenShannon", "Logits"),
            *("HiddenStates", "AttentionMaps", "Relations", "DistillationLoss"),
        ),
    ),
    (
        "Distillation, in detail",
        "tfvllm.distillation",
        (
            *("student_from", "compare", "iterate", "write_teacher_cache", "TeacherCache"),
            *("OnPolicy", "write_targets", "read_targets", "layer_pairs", "spread"),
        ),
    ),
    ("Writing without an export", "tfvllm.rollouts", ("Rollouts", "Answers")),
    ("Export", "tfvllm.export.exporter", ("export",)),
    ("Checking a SavedModel", "tfvllm.serving.lint", ("lint", "LintReport", "Finding")),
    ("The serving kit", "tfvllm.serving.kit", ("write",)),
    ("Model families", "tfvllm.models", ("families", "adapter_for", "load", "save_huggingface")),
    ("Compress", "tfvllm.compress.result", ("compress", "Result")),
    ("Compress, step by step", "tfvllm.compress", ("run", "open_report")),
    ("Recipes", "tfvllm.compress.recipe", ("read_recipe", "parse_recipe")),
    (
        "Data",
        "tfvllm.data",
        (
            *("load", "load_texts", "load_pairs", "read_tsv", "write_tsv"),
            *("synthetic_reviews", "synthetic_stories", "synthetic_phrases", "write_synthetic"),
        ),
    ),
    ("Timing", "tfvllm.timing", ("compare", "Timing")),
    ("Errors", "tfvllm.errors", ("TfvllmError", "InputError", "VerificationError")),
)
# What the examples take for granted. The page shows it; the tests run it before each example.
PREAMBLE = """\
import pathlib, tempfile
import keras, keras_nlp, numpy as np, tensorflow as tf, tfvllm

folder = pathlib.Path(tempfile.mkdtemp())
rng = np.random.default_rng(0)
points, kinds = rng.normal(size=(16, 4)).astype("float32"), np.arange(16) % 3
ids = rng.integers(1, 50, (16, 6)).astype("int32")
x, y = {"token_ids": ids, "segment_ids": 0 * ids, "padding_mask": 0 * ids + 1}, ids[:, 0] % 2


def tiny_net():
    return keras.Sequential([keras.Input([4]), keras.layers.Dense(8, "relu"), keras.layers.Dense(3)])


def tiny_bert(layers=2):
    backbone = keras_nlp.models.BertBackbone(
        vocabulary_size=50, num_layers=layers, num_heads=2, hidden_dim=8, intermediate_dim=32, max_sequence_length=6
    )
    model = keras_nlp.models.BertTextClassifier(backbone, num_classes=2, preprocessor=None)
    model.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    return model
"""
TASKS = ("classify", "generate", "translate", "embed")


def public() -> list[tuple[str, str, Any]]:
    """(section, full name, object) of everything on the page, rules aside."""
    found = []
    for title, module, names in SECTIONS:
        for name in names:
            found.append((title, f"{module}.{name}", getattr(importlib.import_module(module), name)))
    return found


def page() -> str:
    """The text of the whole page."""
    lines = [
        "# API reference",
        "",
        "Made from the docstrings by `python docs/reference.py`. Everything here is public and stays; what is not",
        "named here may change. Examples are run by the tests, after these lines and in a clone of the project:",
        "",
        "```text",
        *PREAMBLE.rstrip().split("\n"),
        "```",
        "",
        *(f"- [{title}](#{anchor(title)})" for title, _, _ in SECTIONS),
        "- [Export tasks](#export-tasks)",
        "- [Rewrite rules](#rewrite-rules)",
        "",
    ]
    section = None
    for title, name, thing in public():
        if title != section:
            lines += [f"## {title}", ""]
            section = title
        lines += entry(name, thing)
    lines += ["## Export tasks", "", "Options of `tfvllm.export(model, path, task=…, **options)`.", ""]
    for task in TASKS:
        module = importlib.import_module(f"tfvllm.export.{task}")
        lines += [f"### task {task}", "", *text(inspect.getdoc(module.export_task) or ""), ""]
    return "\n".join([*lines, *rules()]).rstrip() + "\n"


def anchor(title: str) -> str:
    """The anchor that GitHub gives a heading."""
    return re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")


def entry(name: str, thing: Any) -> list[str]:
    """One public name: signature, docstring, public methods."""
    name = name.replace("tfvllm.export.exporter.", "tfvllm.")  # the package itself is called
    name = name.replace("tfvllm.compress.result.compress", "tfvllm.compress")  # likewise
    lines = [f"### {name}", "", "```text", signature(name, thing), "```", "", *text(inspect.getdoc(thing) or ""), ""]
    if inspect.isclass(thing):
        for method, value in sorted(vars(thing).items()):
            if isinstance(value, functools.cached_property):
                value = property(value.func)
            function = value.fget if isinstance(value, property) else inspect.unwrap(getattr(value, "__func__", value))
            if (method.startswith("_") and method != "__call__") or not callable(function) or not function.__doc__:
                continue
            if inspect.isclass(function):
                continue
            what = "property" if isinstance(value, property) else signature(method, function)
            first, *rest = text(inspect.cleandoc(function.__doc__))
            lines += [f"- `{method}`" if what == "property" else f"- `{what}`", *indented([first, *rest])]
        if lines[-1]:
            lines.append("")
    return lines


def signature(name: str, thing: Any) -> str:
    """`name(parameters)` without annotations of types, wrapped where it is long."""
    try:
        parameters = list(inspect.signature(thing).parameters.values())
    except (TypeError, ValueError):
        return name
    shown, keyword_only = [], False
    for parameter in parameters:
        if parameter.name == "self":
            continue
        if parameter.kind is parameter.KEYWORD_ONLY and not keyword_only:
            shown.append("*")
            keyword_only = True
        star = {parameter.VAR_POSITIONAL: "*", parameter.VAR_KEYWORD: "**"}.get(parameter.kind, "")
        keyword_only |= star == "*"
        default = "" if parameter.default is parameter.empty else f"={default_text(parameter.default)}"
        shown.append(f"{star}{parameter.name}{default}")
    one = f"{name}({', '.join(shown)})"
    return one if len(one) <= 110 or name[:1] == "_" else f"{name}(\n    " + ",\n    ".join(shown) + "\n)"


def default_text(value: Any) -> str:
    """A default as source: no addresses."""
    return "…" if callable(value) or " at 0x" in repr(value) else repr(value)


def text(docstring: str) -> list[str]:
    """A docstring as Markdown lines: sections become lists, formulas set off by four blanks become blocks."""
    lines: list[str] = []
    section, block = None, ""
    for line in docstring.split("\n"):
        bare, depth = line.strip(), len(line) - len(line.lstrip())
        heading = re.fullmatch(r"(Args|Returns|Raises|Attributes|Example|Examples):", bare)
        kind = "python" if bare.startswith(">>>") else "text"
        if block and (not bare or (depth < 4 and not bare.startswith(("...", ">>>")) and section != "Example")):
            lines += ["```", ""]
            block = ""
            if not bare:
                continue
        if heading and depth == 0:
            section = heading[1].rstrip("s") if heading[1].startswith("Example") else heading[1]
            if lines and lines[-1]:
                lines.append("")
            lines += [f"**{heading[1]}**", ""]
        elif not block and (kind == "python" or (section is None and depth >= 4)):
            if lines and lines[-1]:
                lines.append("")
            block = kind
            lines += [f"```{'pycon' if kind == 'python' else 'text'}", line[4:] if depth >= 4 else line]
        elif block:
            lines.append(line[4:] if depth >= 4 else line)
        elif section in ("Args", "Raises", "Attributes") and depth == 4 and re.match(r"[\w*, ]+:", bare):
            name, rest = bare.split(":", 1)
            lines.append(f"- `{name}`:{escaped(rest)}")
        elif section in ("Args", "Raises", "Attributes") and depth > 4:
            lines.append(f"  {escaped(bare)}")
        else:
            if depth == 0 and section and bare:
                section = None
            lines.append(escaped(bare))
    if block:
        lines.append("```")
    return lines


def escaped(line: str) -> str:
    """Prose as Markdown: what HTML or emphasis would swallow outside of `code`."""
    parts = re.split(r"(`[^`]*`)", line)
    return "".join(p if i % 2 else re.sub(r"([*_<|\[])", r"\\\1", p) for i, p in enumerate(parts))


def indented(lines: list[str]) -> list[str]:
    """The lines below a list entry."""
    return [f"  {line}" if line else "" for line in lines]


def rules() -> list[str]:
    """Every rewrite rule by step: name, equation, guarantee, targets."""
    from tfvllm.rules import between_int8, lowering, pipeline

    lines = [
        "## Rewrite rules",
        "",
        "In the order in which `simplify` tries them; the steps of a lower precision come last. How a guarantee is",
        "checked: [what is promised](graph.md#what-is-promised).",
        "",
        "| step | rule | what it does | guarantee | targets |",
        "|---|---|---|---|---|",
    ]
    for step in [*pipeline(), *lowering("bfloat16"), *lowering("int8"), *between_int8()]:
        for rule in step.rules:
            equation = (type(rule).__doc__ or "").strip().split("\n")[0]
            cells = (step.name, rule.name, equation, type(rule.guarantee).__name__, ", ".join(rule.targets))
            lines.append("| " + " | ".join(escaped(cell) for cell in cells) + " |")
    return lines


def recipe_page() -> str:
    """The keys of the recipes of all tasks."""
    from tfvllm.compress.recipe import RECIPES as of_tasks

    lines = [
        "# Recipes, key by key",
        "",
        "What `tfvllm compress` reads ([how it goes](compress.md)); made from the recipes' own definition by",
        "`python docs/reference.py`. A block that is left out is a step that is not done; `data` and `teacher` have",
        "defaults. `--set block.key=value` overrides one key.",
    ]
    for task, recipe in of_tasks.items():
        lines += ["", f"## task: {task}"]
        alone = [(name, field) for name, field in recipe.model_fields.items() if _block_of(field.annotation) is None]
        lines += ["", *_key_table(alone)]
        for name, field in recipe.model_fields.items():
            if (block := _block_of(field.annotation)) is not None:
                lines += ["", f"### {name}", "", inspect.cleandoc(block.__doc__ or ""), ""]
                lines += _key_table(list(_flat(block)))
    return "\n".join(lines) + "\n"


def _block_of(annotation: Any) -> Any:
    from tfvllm.compress.recipe.errors import blocks

    return next(blocks(annotation), None)


def _flat(block: Any, before: str = "") -> Any:
    """(key with dots, field) of a block and of the blocks in it."""
    for name, field in block.model_fields.items():
        inner = _block_of(field.annotation)
        if inner is None:
            yield before + name, field
        else:
            yield from _flat(inner, f"{before}{name}.")


def _key_table(fields: list) -> list[str]:
    rows = ["| key | default | takes | |", "|---|---|---|---|"]
    for name, field in fields:
        default = field.get_default(call_default_factory=True)
        shown = "–" if default is None else f"`{str(default).lower() if isinstance(default, bool) else default}`"
        rows.append(f"| `{name}` | {shown} | {_takes(field)} | {field.description or ''} |")
    return rows


def _takes(field: Any) -> str:
    """What a key takes, in words."""
    from pydantic import TypeAdapter

    annotated = typing.Annotated[(field.annotation, *field.metadata)] if field.metadata else field.annotation
    schema = TypeAdapter(annotated).json_schema()
    return ", or ".join(dict.fromkeys(_said(option) for option in schema.get("anyOf", [schema]) if _said(option)))


def _said(schema: dict[str, Any]) -> str:
    if "const" in schema or "enum" in schema:
        return " ".join(f"`{option}`" for option in schema.get("enum", [schema.get("const")]))
    limits = [
        f"{sign} {schema[name]:g}"
        for name, sign in (("minimum", "≥"), ("exclusiveMinimum", ">"), ("maximum", "≤"), ("exclusiveMaximum", "<"))
        if name in schema
    ]
    kinds = {"integer": "a whole number", "number": "a number", "string": "text", "boolean": "true or false"}
    kinds |= {"array": "a list", "object": "a block", "null": ""}
    return " ".join([kinds[schema["type"]], ", ".join(limits)]).strip()


def main(*arguments: str) -> None:
    for document, new in ((DOCUMENT, page()), (RECIPES, recipe_page())):
        if "--check" not in arguments:
            document.write_text(new, encoding="utf-8")
        elif not document.exists() or document.read_text(encoding="utf-8") != new:
            sys.exit(f"docs/{document.name} is not what the code says: run python docs/reference.py")


if __name__ == "__main__":
    main(*sys.argv[1:])
