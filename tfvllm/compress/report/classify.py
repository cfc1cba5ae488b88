"""The report of a classifier: accuracy, latency, throughput, the simplified graph."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from tfvllm import html
from tfvllm.compress.recipe import Recipe
from tfvllm.compress.report import common, plots
from tfvllm.compress.report.common import Table, points, times
from tfvllm.compress.steps import StepResult

STAGES_IN_PLAIN_TEXT = False


def content(
    recipe: Recipe,
    stages: Sequence[StepResult],
    products: Mapping[str, StepResult],
    measured: StepResult | None,
    report: Mapping[str, Any],
) -> dict[str, Any]:
    """What only this task has, for the `report` as it is up to here."""
    found: dict[str, Any] = {}
    final = list(products)[-1] if products else None
    if final is not None and "graph" in products[final].result:
        found["simplify"] = products[final].result["graph"]
    if measured is not None:
        for key in ("conditions", "accuracy", "latency", "throughput"):
            found[key] = measured.result[key]
    if final is not None and len(products) > 1:
        found["summary"] = _summary({**report, **found}, next(iter(products)), final)
    return found


def data_of(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Of the data step, for the report."""
    return {key: facts[key] for key in ("source", "synthetic", "labels", "train", "dev", "test", "notes")}


def quality(report: Mapping[str, Any], name: str) -> dict[str, Any]:
    """What the manifest of a SavedModel says of it."""
    return {"accuracy": report["accuracy"][name]} if "accuracy" in report else {}


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


def page(report: dict[str, Any], diagrams: Mapping[str, str]) -> list[str]:
    """The sections of the page between its title and the conditions."""
    body = [_headline(report), _data(report), _stages(report)]
    if "latency" in report:
        body += [_accuracy(report), _latency(report), _plots(report)]
    if report["saved_models"]:
        body.append(_sizes(report))
    if "simplify" in report:
        body.append(_simplify(report["simplify"], diagrams))
    return [*body, _training(report)]


def _headline(report: dict[str, Any]) -> str:
    summary = report.get("summary")
    if not summary:
        return "<p>No SavedModel was made: the recipe has no export step.</p>"
    items = [
        (f"{summary['bytes'] / 1e6:.2f} MB", "SavedModel"),
        (times(summary["size_ratio"]), "smaller than the teacher"),
    ]
    for shape, ratio in summary.get("speedup", {}).items():
        items.append((times(ratio), f"faster at {shape}"))
    for split, score in summary.get("accuracy", {}).items():
        lost = summary["points_lost"][split]
        items.append((f"{score:.2%}", f"{split} accuracy ({points(-lost)} points against the teacher)"))
    return html.cards(items) + (
        "<p class='quiet'>Every ratio is against the teacher's own Keras export, in the same run, on the same machine "
        "and the same sentences. (batch, tokens) names a shape.</p>"
    )


def _data(report: dict[str, Any]) -> str:
    data = report["data"]
    told = (
        f"<h2>Data</h2><p>{html.escape(data['source'])}: {data['train']:,} sentences to train on, {data['dev']:,} dev, "
        f"{data['test']:,} test; labels {html.escape(', '.join(data['labels']))}. Weights and epochs are chosen by dev "
        "accuracy, so the test figure is the one to trust where there is one.</p>"
    )
    return told + common.data_notes(report)


_STAGE_HEADERS = ["stage", "weights", "not zero", "dev accuracy", "test accuracy", "took"]


def _stage_rows(report: dict[str, Any]) -> list[list[str]]:
    return common.stage_rows(report, lambda _, stage: [_percent(stage, "dev"), _percent(stage, "test")])


def _stages(report: dict[str, Any]) -> str:
    note = common.masks(report, "simplified graph.")
    return f"<h2>Stages</h2>{html.table(_STAGE_HEADERS, _stage_rows(report))}{note}"


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
                [_shape(point["shape"]), name, f"{timing['median_ms']:.2f}", f"{timing['p95_ms']:.2f}", times(ratio)]
            )
    passes = report["throughput"]
    busy = [
        [name, f"{found['sentences_per_second']:,.0f}",
         times(found["sentences_per_second"] / passes["models"][teacher]["sentences_per_second"])]
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
    shapes = [_shape(point["shape"]) for point in report["latency"]]
    medians = {name: [point["models"][name]["median_ms"] for point in report["latency"]] for name in names}
    size = {name: report["saved_models"][name]["bytes"] for name in names}
    return (
        "<h2>At a glance</h2>"
        + plots.bars(medians, shapes, label="median latency, ms", caption="Median latency by shape")
        + plots.trade(
            {n: plots.Point(medians[n][0], 100 * report["accuracy"][n][split], size[n]) for n in names},
            labels=(f"median latency at {shapes[0]}, ms", f"{split} accuracy, %"),
            caption=f"Latency, {split} accuracy and size (area) of each SavedModel",
        )
        + plots.sizes(size)
    )


def _simplify(graph: dict[str, Any], diagrams: Mapping[str, str]) -> str:
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
    scores = {stage["stage"]: [100 * entry["dev_accuracy"] for entry in stage["history"]] for stage in trained}
    return (
        "<h2>Training</h2>"
        + plots.curves(scores, label="dev accuracy, %", caption="Dev accuracy after each epoch")
        + common.every_epoch(report, "dev_accuracy", "dev accuracy", ".2%")
    )


def _shape(shape: list[int]) -> str:
    return f"({shape[0]}, {shape[1]})"


def tables(report: dict[str, Any]) -> list[Table]:
    """What each stage cost and kept; then, of a measured report, the SavedModels side by side."""
    found: list[Table] = [(f"{report['name']}: stages", _STAGE_HEADERS, _stage_rows(report))]
    if "accuracy" in report:
        found.append(("SavedModels, strings in", *_summary_table(report)))
    return found


def closing(report: dict[str, Any]) -> list[str]:
    """What came of it, in a line."""
    if "accuracy" not in report or "summary" not in report:
        return []
    ratios = ", ".join(f"{times(ratio)} at {shape}" for shape, ratio in report["summary"]["speedup"].items())
    return [f"{report['summary']['final']} against the teacher's Keras export: {ratios}"]


def _summary_table(report: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
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
