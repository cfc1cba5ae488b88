"""The report of a run: report.json, and report.html for people."""

import json
from pathlib import Path
from typing import Any

from tfvllm import html
from tfvllm.bench import results
from tfvllm.compress.artifacts import MODEL
from tfvllm.compress.recipe import Recipe, unused_keys
from tfvllm.compress.steps import StepResult, Workspace
from tfvllm.files import write_text

MASKS = (
    "Masks alone do not speed up serving: TensorFlow multiplies masked weights as it multiplies any others, and its "
    "sparse kernels are slower than the dense ones even at 99 % zeros. They make the model compress better "
    "on disk, and mark what may go. The speed here comes from fewer layers, from removed structure and "
    "from the simplified graph."
)


def build(
    recipe: Recipe,
    workspace: Workspace,
    stages: list[StepResult],
    products: dict[str, StepResult],
    measured: StepResult | None,
) -> dict:
    """Everything the run knows, as JSON-able data.

    Args:
        stages: the Keras steps, teacher first.
        products: name -> export or simplify step, teacher first, the final one last.
        measured: the benchmark step.
    """
    data = next(done for done in stages if done.name == "data")
    models = [done for done in stages if done.name != "data"]
    report: dict[str, Any] = {
        "name": recipe.name,
        "recipe": _without_folders(recipe.model_dump(mode="json")),
        "again": again(recipe),
        "data": {key: data.result[key] for key in ("source", "synthetic", "labels", "train", "dev", "test", "notes")},
        "unused": unused_keys(recipe),
        "stages": [{"stage": done.name, **done.result} for done in models],
        "saved_models": {
            name: {key: value for key, value in done.result.items() if key != "graph"}
            for name, done in products.items()
        },
    }
    final = next(reversed(products), None)
    if final is not None and "graph" in products[final].result:
        report["simplify"] = products[final].result["graph"]
    if measured is not None:
        for key in ("conditions", "accuracy", "latency", "throughput"):
            report[key] = measured.result[key]
    else:
        report["conditions"] = results.conditions()
    if final is not None and len(products) > 1:
        report["summary"] = _summary(report, next(iter(products)), final)
    return report


def _is_path(name: str) -> bool:
    return Path(name).name != name or Path(name).exists()


def _without_folders(recipe: dict[str, Any]) -> dict[str, Any]:
    """Reports and manifests travel: they name files, not where one machine keeps them."""
    for block, key in (("data", "path"), ("teacher", "preset"), ("teacher", "model"), ("simplify", "profile")):
        if (recipe[block] or {}).get(key):
            recipe[block][key] = Path(recipe[block][key]).name
    return recipe


def _summary(report: dict[str, Any], teacher: str, final: str) -> dict[str, Any]:
    """The final model against the teacher's Keras export: ratios above 1 are in the final model's favour."""
    sizes = report["saved_models"]
    summary: dict[str, Any] = {
        "final": final,
        "against": teacher,
        "size_ratio": sizes[teacher]["bytes"] / sizes[final]["bytes"],
        "bytes": sizes[final]["bytes"],
    }
    if sizes[teacher].get("flops") and sizes[final].get("flops"):
        summary["flops_ratio"] = sizes[teacher]["flops"] / sizes[final]["flops"]
    if "latency" in report:
        summary["speedup"] = {
            _shape(point["shape"]): point["models"][teacher]["median_ms"] / point["models"][final]["median_ms"]
            for point in report["latency"]
        }
        passes = report["throughput"]["models"]
        summary["throughput_ratio"] = passes[final]["sentences_per_second"] / passes[teacher]["sentences_per_second"]
        summary["accuracy"] = report["accuracy"][final]
        summary["points_lost"] = {
            split: 100 * (report["accuracy"][teacher][split] - score)
            for split, score in report["accuracy"][final].items()
        }
    return summary


def manifest_step(report: dict[str, Any], name: str) -> dict[str, Any]:
    """What the manifest of the SavedModel `name` says about the run that made it."""
    step = {"step": "compress", "recipe": report["recipe"], "data": report["data"]}
    if "accuracy" in report:
        step["accuracy"] = report["accuracy"][name]
    return {**step, "again": report["again"]}


def again(recipe: Recipe) -> str:
    """How to ask for the same run: the recipe holds every option, but names files without their folders."""
    from tfvllm.savedmodel.manifest import command_line

    files = {"teacher.model": getattr(recipe.teacher, "model", None), "teacher.preset": recipe.teacher.preset}
    files["simplify.profile"] = recipe.simplify.profile if recipe.simplify else None
    flags = {
        "--data": "DATA" if recipe.data.path else None,
        "--set": [f"{key}={key.upper().replace('.', '_')}" for key, path in files.items() if path and _is_path(path)],
    }
    return "save recipe as YAML, then: " + command_line("tfvllm compress RECIPE.yaml", flags)


def write(workspace: Workspace, report: dict[str, Any], simplified: StepResult | None) -> None:
    """Writes report.json and report.html into the output folder."""
    diagrams = {}
    if simplified is not None:
        for which in ("before", "after"):
            file = simplified.directory / f"{which}.mmd"
            if file.is_file():
                diagrams[which] = file.read_text(encoding="utf-8")
    write_text(workspace.out / "report.json", json.dumps(report, indent=1, ensure_ascii=False) + "\n")
    write_text(workspace.out / "report.html", to_html(report, diagrams))


def to_html(report: dict[str, Any], diagrams: dict[str, str]) -> str:
    """The report as one self-contained page."""
    body = [_headline(report), _data(report), _stages(report)]
    if "latency" in report:
        body += [_accuracy(report), _latency(report), _plots(report)]
    if report["saved_models"]:
        body.append(_sizes(report))
    if "simplify" in report:
        body.append(_simplify(report["simplify"], diagrams))
    body += [_training(report), _conditions(report)]
    return html.page(f"{report['name']}: what was compressed, and what it cost", "\n".join(body))


def _headline(report: dict[str, Any]) -> str:
    summary = report.get("summary")
    if not summary:
        return "<p>No SavedModel was made: the recipe has no export step.</p>"
    items = [
        (f"{summary['bytes'] / 1e6:.2f} MB", "SavedModel"),
        (_times(summary["size_ratio"]), "smaller than the teacher"),
    ]
    for shape, ratio in summary.get("speedup", {}).items():
        items.append((_times(ratio), f"faster at {shape}"))
    for split, score in summary.get("accuracy", {}).items():
        lost = summary["points_lost"][split]
        items.append((f"{score:.2%}", f"{split} accuracy ({_points(-lost)} points against the teacher)"))
    return html.cards(items) + (
        "<p class='quiet'>Every ratio is against the teacher's own Keras export, in the same run, on the same machine "
        "and the same sentences. (batch, tokens) names a shape.</p>"
    )


def _data(report: dict[str, Any]) -> str:
    data = report["data"]
    lines = [
        f"<h2>Data</h2><p>{html.escape(data['source'])}: {data['train']:,} sentences to train on, {data['dev']:,} dev, "
        f"{data['test']:,} test; labels {html.escape(', '.join(data['labels']))}. Weights and epochs are chosen by dev "
        "accuracy, so the test figure is the one to trust where there is one.</p>"
    ]
    lines += [f"<p class='note'>{html.escape(note[0].upper() + note[1:])}.</p>" for note in data["notes"]]
    return "".join(lines)


_TITLES = {
    "teacher": "Teacher",
    "student": "Student, before training",
    "distill": "Distilled",
    "shrink": "Shrunk and recovered",
}


_STAGE_HEADERS = ["stage", "weights", "not zero", "dev accuracy", "test accuracy", "took"]


def _stage_rows(report: dict[str, Any]) -> list[list[str]]:
    rows = []
    for stage in report["stages"]:
        title = _TITLES.get(stage["stage"], stage["stage"])
        if stage["stage"] == "distill" and report["recipe"]["prune"]:
            title += " and pruned (masks)"
        if before := stage.get("before_recovery"):
            rows.append(["Structure removed, before recovery", *_stage_cells(before), "–"])
        rows.append([title, *_stage_cells(stage), f"{stage['seconds']:.0f} s"])
    return rows


def _stages(report: dict[str, Any]) -> str:
    masks = f"<p class='note'>{html.escape(MASKS)}</p>" if report["recipe"]["prune"] else ""
    return f"<h2>Stages</h2>{html.table(_STAGE_HEADERS, _stage_rows(report))}{masks}"


def _stage_cells(stage: dict[str, Any]) -> list[str]:
    return [f"{stage['weights']:,}", f"{stage['nonzero_share']:.0%}", _percent(stage, "dev"), _percent(stage, "test")]


def _percent(stage: dict[str, Any], split: str) -> str:
    return f"{stage[f'{split}_accuracy']:.2%}" if f"{split}_accuracy" in stage else "–"


def _sizes(report: dict[str, Any]) -> str:
    rows = [
        [
            name,
            f"{product['bytes'] / 1e6:.2f} MB",
            f"{product['nodes']:,}" if "nodes" in product else "–",
            f"{product['flops'] / 1e6:,.1f} M" if product.get("flops") else "–",
        ]
        for name, product in report["saved_models"].items()
    ]
    return f"<h2>SavedModels</h2>{html.table(['SavedModel', 'on disk', 'graph nodes', 'FLOPs, 32 tokens'], rows)}"


def _accuracy(report: dict[str, Any]) -> str:
    splits = list(next(iter(report["accuracy"].values())))
    rows = [[name, *[f"{scores[split]:.2%}" for split in splits]] for name, scores in report["accuracy"].items()]
    return (
        "<h2>Accuracy of the SavedModels</h2>"
        "<p class='quiet'>Strings in, highest score out, on the files that are served.</p>"
        f"{html.table(['SavedModel', *[f'{split} accuracy' for split in splits]], rows)}"
    )


def _latency(report: dict[str, Any]) -> str:
    teacher = next(iter(report["accuracy"]))
    rows = []
    for point in report["latency"]:
        for name, timing in point["models"].items():
            ratio = point["models"][teacher]["median_ms"] / timing["median_ms"]
            rows.append(
                [_shape(point["shape"]), name, f"{timing['median_ms']:.2f}", f"{timing['p95_ms']:.2f}", _times(ratio)]
            )
    passes = report["throughput"]
    busy = [
        [name, f"{found['sentences_per_second']:,.0f}",
         _times(found["sentences_per_second"] / passes["models"][teacher]["sentences_per_second"])]
        for name, found in passes["models"].items()
    ]  # fmt: skip
    return (
        "<h2>Latency</h2><p class='quiet'>Milliseconds for one call with strings in, tokenizer included; the models "
        "took turns call by call.</p>"
        f"{html.table(['(batch, tokens)', 'SavedModel', 'median', 'p95', 'against teacher'], rows)}"
        f"<h3>Throughput</h3><p class='quiet'>{passes['sentences']} real dev sentences in file order, batches of "
        f"{passes['batch']}, each batch padded to its longest row.</p>"
        f"{html.table(['SavedModel', 'sentences/s', 'against teacher'], busy)}"
    )


def _plots(report: dict[str, Any]) -> str:
    names = list(report["accuracy"])
    split = "test" if "test" in report["accuracy"][names[0]] else "dev"

    def latency(axes):
        width = 0.8 / len(names)
        for i, name in enumerate(names):
            medians = [point["models"][name]["median_ms"] for point in report["latency"]]
            axes.bar([x + i * width for x in range(len(medians))], medians, width, label=name, color=html.SERIES[i % 6])
        axes.set_xticks(
            [x + 0.4 - width / 2 for x in range(len(report["latency"]))],
            [_shape(point["shape"]) for point in report["latency"]],
        )
        axes.set_ylabel("median latency, ms")
        axes.grid(axis="x", visible=False)
        axes.legend(fontsize=10)

    def trade(axes):
        first = report["latency"][0]
        for i, name in enumerate(names):
            x, y = first["models"][name]["median_ms"], 100 * report["accuracy"][name][split]
            size = report["saved_models"][name]["bytes"]
            axes.scatter([x], [y], s=30 + 300 * (size / max(p["bytes"] for p in report["saved_models"].values())),
                         color=html.SERIES[i % 6], label=f"{name}, {size / 1e6:.1f} MB", alpha=0.8)  # fmt: skip
        axes.set_xlabel(f"median latency at {_shape(first['shape'])}, ms")
        axes.set_ylabel(f"{split} accuracy, %")
        axes.margins(0.2)
        for marker in axes.legend(fontsize=10).legend_handles:
            marker.set_sizes([40])

    def sizes(axes):
        for i, name in enumerate(names):
            axes.barh([name], [report["saved_models"][name]["bytes"] / 1e6], color=html.SERIES[i % 6])
        axes.invert_yaxis()
        axes.set_xlabel("MB on disk")

    return (
        "<h2>At a glance</h2>"
        + html.plot(latency, caption="Median latency by shape")
        + html.plot(trade, caption=f"Latency, {split} accuracy and size (area) of each SavedModel")
        + html.plot(sizes, caption="Size on disk", size=(6.4, 0.6 + 0.45 * len(names)))
    )


def _simplify(graph: dict[str, Any], diagrams: dict[str, str]) -> str:
    parts = ["<h2>The graph, before and after</h2>"]
    before, after = graph.get("before", {}), graph.get("after", {})
    keys = [key for key in before if key in after and isinstance(before[key], int | float)]
    if keys:
        parts.append(
            html.table(["", "before", "after"], [[key, f"{before[key]:,}", f"{after[key]:,}"] for key in keys])
        )
    fired = graph.get("rules")
    if isinstance(fired, dict) and fired:
        rows = [[name, count if isinstance(count, int | float) else json.dumps(count)] for name, count in fired.items()]
        parts.append("<h3>Rules that fired</h3>" + html.table(["rule", "times"], rows))
    elif isinstance(fired, list) and fired:
        rows = [[rule.get("rule", rule.get("name", "")), rule.get("fired", rule.get("count", ""))] for rule in fired
                if isinstance(rule, dict)]  # fmt: skip
        parts.append("<h3>Rules that fired</h3>" + html.table(["rule", "times"], rows))
    for which, source in diagrams.items():
        parts.append(html.diagram(source, f"Graph {which} simplifying", folded=True))
    return "".join(parts)


def _training(report: dict[str, Any]) -> str:
    trained = [stage for stage in report["stages"] if stage.get("history")]
    if not trained:
        return ""

    def curve(axes):
        for i, stage in enumerate(trained):
            scores = [100 * entry["dev_accuracy"] for entry in stage["history"]]
            axes.plot(range(1, len(scores) + 1), scores, marker="o", label=stage["stage"], color=html.SERIES[i % 6])
        axes.set_xlabel("epoch")
        axes.set_ylabel("dev accuracy, %")
        axes.legend(fontsize=10)

    rows = [
        [stage["stage"], i + 1, f"{entry.get('loss', float('nan')):.4f}", f"{entry['dev_accuracy']:.2%}",
         _kept(stage, i + 1)]
        for stage in trained
        for i, entry in enumerate(stage["history"])
    ]  # fmt: skip
    return (
        "<h2>Training</h2>"
        + html.plot(curve, caption="Dev accuracy after each epoch")
        + "<details><summary>Every epoch</summary>"
        + html.table(["step", "epoch", "loss", "dev accuracy", ""], rows)
        + "</details>"
    )


def _kept(stage: dict[str, Any], epoch: int) -> str:
    if stage.get("averaged", 1) > 1:
        return "kept in the mean" if epoch > len(stage["history"]) - stage["averaged"] else ""
    return "kept" if epoch == stage["best_epoch"] else ""


def _conditions(report: dict[str, Any]) -> str:
    conditions = report["conditions"]
    machine = conditions["machine"]
    rows = [
        ["processor", f"{machine['cpu']}, {machine['cores']} cores, {', '.join(machine['instructions'])}"],
        ["memory", f"{machine['memory_gb']} GB"],
        ["load before measuring", str(machine["load_before"])],
        ["date", conditions["date"]],
        ["commit", conditions["commit"] or "not a checkout"],
        ["versions", ", ".join(f"{name} {version}" for name, version in conditions["versions"].items())],
    ]
    recipe = html.escape(json.dumps(report["recipe"], indent=1, ensure_ascii=False))
    return (
        f"<h2>Conditions</h2>{html.table(['', ''], rows)}<details><summary>The recipe, defaults filled in</summary>"
        f"<pre>{recipe}</pre></details>"
    )


def _shape(shape: list[int]) -> str:
    return f"({shape[0]}, {shape[1]})"


def _times(ratio: float) -> str:
    return f"{ratio:.1f}×" if ratio < 100 else f"{ratio:.0f}×"


def _points(gained: float) -> str:
    return f"{round(gained, 2) + 0.0:+.2f}"  # + 0.0: no minus before zero


def summary_table(report: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Headers, and a row for each SavedModel: size, accuracy, median latency at each shape. Needs a measured report."""
    names = list(report["accuracy"])
    splits = list(report["accuracy"][names[0]])
    rows = [
        [
            name,
            f"{report['saved_models'][name]['bytes'] / 1e6:.2f}",
            *[f"{100 * report['accuracy'][name][split]:.2f}" for split in splits],
            *[f"{point['models'][name]['median_ms']:.2f}" for point in report["latency"]],
        ]
        for name in names
    ]
    shapes = [_shape(point["shape"]) for point in report["latency"]]
    return ["SavedModel", "MB", *[f"{split} %" for split in splits], *[f"{shape} ms" for shape in shapes]], rows


def summary_lines(report: dict[str, Any], out: Path) -> list[str]:
    """The run in a few lines of plain text."""
    table = [results.text_table(*summary_table(report))] if "accuracy" in report else []
    return [*table, *_closing_lines(report, out)]


def _closing_lines(report: dict[str, Any], out: Path) -> list[str]:
    lines = []
    if "accuracy" in report:
        ratios = ", ".join(f"{_times(ratio)} at {shape}" for shape, ratio in report["summary"]["speedup"].items())
        lines.append(f"{report['summary']['final']} against the teacher's Keras export: {ratios}")
    if report["saved_models"]:
        lines.append(f"SavedModel: {out / MODEL}   (tfvllm serve {report['name']}={out / MODEL})")
    lines.append(f"report: {out / 'report.html'}")
    return lines


def terminal_summary(report: dict[str, Any], out: Path) -> Any:
    """The run as a `rich` renderable: what each stage cost and kept, then the SavedModels side by side."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    def table(title: str, headers: list[str], rows: list[list[str]]) -> Table:
        made = Table(title=title, title_justify="left", title_style="bold", header_style="bold")
        for i, header in enumerate(headers):
            made.add_column(header, justify="right" if i else "left", overflow="fold")
        for row in rows:
            made.add_row(*map(Text, row))
        return made

    parts: list[Any] = [table(f"{report['name']}: stages", _STAGE_HEADERS, _stage_rows(report))]
    if "accuracy" in report:
        parts.append(table("SavedModels, strings in", *summary_table(report)))
    return Group(*parts, *(Text(line, overflow="fold") for line in _closing_lines(report, out)))
