"""The page of a language model's report: what came of the run first, then data, stages, quality, speed, examples."""

import math
from collections.abc import Mapping
from typing import Any

from tfvllm import html
from tfvllm.compress.report import common, plots
from tfvllm.compress.report.common import megabytes, number, points, ratio, times
from tfvllm.compress.report.language_quality import (
    KINDS,
    OTHER_VOCABULARY,
    compared,
    figure,
    marked,
    names_of,
    splits_of,
    verdict,
)
from tfvllm.compress.tasks.language_products import KERAS

_AT_ONCE = 5  # examples that are not folded away


def page(report: dict[str, Any], diagrams: Mapping[str, str]) -> list[str]:
    """The sections of the page between its title and the step graph."""
    body = [_headline(report), _not_finite(report), _data(report), _stages(report)]
    if "memory_mb" in report:
        body += [_quality(report), _speed(report), _plots(report)]
    if report["saved_models"]:
        body.append(_saved_models(report))
    if report.get("examples"):
        body.append(_examples(report))
    return [*filter(None, body), _training(report)]


def _headline(report: dict[str, Any]) -> str:
    first, *rest = map(html.escape, verdict(report))
    said = f"<p><b>{first}</b> {' '.join(rest)}</p>"
    if report["data"]["synthetic"]:
        said += "<p class='quiet'>The data are synthetic: what the figures are good for stands under Data.</p>"
    summary = report.get("summary")
    if not summary:
        return said
    items = [(megabytes(summary["bytes"]), "SavedModel")]
    own = summary["final"] == summary["against"]
    if not own:
        size = summary["size_ratio"]
        smaller = "smaller" if size >= 1 else "larger"
        items.append((times(max(size, 1 / size)), f"{smaller} than the teacher's own export"))
    for other, by_batch in summary.get("speedup", {}).items():
        whose = "keras-nlp's tokens/s" if other == KERAS else "the tokens/s of the teacher's export"
        if not (own and other != KERAS):
            items += [(times(r), f"{whose}, batch {batch}") for batch, r in by_batch.items() if r is not None]
    items += _quality_cards(report)
    if (memory := summary.get("memory_ratio")) and not own:
        items.append((times(max(memory, 1 / memory)), f"{'less' if memory >= 1 else 'more'} memory than that export"))
    return f"{said}{html.cards(items)}" + (
        "<p class='quiet'>Ratios are against the teacher's own export, and against the teacher as keras-nlp's "
        "<code>generate</code> runs it; all took turns in one run on the same machine.</p>"
    )


def _quality_cards(report: Mapping[str, Any]) -> list[tuple[str, str]]:
    split, items = splits_of(report)[-1], []
    for kind, by_split in compared(report)[1].items():
        pair = by_split[split]
        name, against = f"{split} {names_of(kind)}", figure(pair, "teacher", kind)
        if kind in ("bleu", "chrf"):
            change = points(pair["final"] - pair["teacher"])
            items.append((figure(pair, "final", kind), f"{name} ({change} points against the teacher)"))
        elif kind == "perplexity" and report["other_vocabulary"]:
            label = f"{name} of its cut vocabulary: not to be compared with the teacher's {against}, bits/byte are"
            items.append((figure(pair, "final", kind), label))
        else:
            items.append((figure(pair, "final", kind), f"{name} (the teacher's: {against})"))
    return items


def _not_finite(report: Mapping[str, Any]) -> str:
    lost = report.get("not_finite")
    if not lost:
        return ""
    more = f" and {len(lost) - 6} more" if len(lost) > 6 else ""
    return (
        "<p class='note'>Some figures are not finite numbers, as of a training that diverged; report.json has null "
        f"there: {html.escape(', '.join(lost[:6]))}{more}.</p>"
    )


def _data(report: dict[str, Any]) -> str:
    data = report["data"]
    made = "made by a generator, written by no person; " if data["synthetic"] and not data["notes"] else ""
    judged = "Epochs are chosen by dev perplexity, so the test figure is the one to trust."
    return (
        f"<h2>Data</h2><p>{html.escape(data['source'])}: {made}{data['train']:,} {data['units']} to train on, "
        f"{data['dev']:,} dev, {data['test']:,} test. {judged if data['test'] else ''}</p>" + common.data_notes(report)
    )


# --- stages -------------------------------------------------------------------------------------------------------


def stages_table(report: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Headers and rows: what each stage cost and kept."""
    splits = splits_of(report)
    shown = [("perplexity", split) for split in splits] + [("bits_per_byte", splits[-1])]
    if report["task"] == "translate":
        shown += [("bleu", split) for split in splits]

    def cells(name: str, stage: dict[str, Any]) -> list[str]:
        return [marked(report, name, kind, _of(stage, kind), split) for kind, split in shown]

    headers = [f"{split} {names_of(kind)}" for kind, split in shown]
    return ["stage", "weights", "not zero", *headers, "took"], common.stage_rows(report, cells)


def _of(stage: Mapping[str, Any], kind: str) -> dict[str, Any]:
    return {split: stage[f"{split}_{kind}"] for split in ("dev", "test") if f"{split}_{kind}" in stage}


def _stages(report: dict[str, Any]) -> str:
    note = common.masks(report, "decoding loop of the export.")
    what = "<p class='quiet'>Keras models, on the tokens that a model is trained to predict.</p>"
    return f"<h2>Stages</h2>{what}{html.table(*stages_table(report))}{_star(report)}{note}"


def _star(report: Mapping[str, Any]) -> str:
    return f"<p class='note'>{html.escape(OTHER_VOCABULARY)}</p>" if report["other_vocabulary"] else ""


# --- SavedModels as measured --------------------------------------------------------------------------------------


def _quality(report: Mapping[str, Any]) -> str:
    kinds, splits = KINDS[report["task"]], splits_of(report)
    rows = [
        [name, *(marked(report, name, kind, report[kind][name], split) for kind in kinds for split in splits)]
        for name in report["saved_models"]
    ]
    headers = ["SavedModel", *(f"{split} {names_of(kind)}" for kind in kinds for split in splits)]
    if report["task"] == "translate":
        signed = "; ".join(f"{names_of(kind)} {text}" for kind, text in report["signatures"].items())
        how = f"Of whole translations as served, by sacrebleu ({signed}). Higher is better."
        star = ""
    else:
        how = "Of whole texts, by the score signature of the files that are served. Lower is better."
        star = _star(report)
    return f"<h2>Quality as served</h2><p class='quiet'>{html.escape(how)}</p>{html.table(headers, rows)}{star}"


def _speed(report: Mapping[str, Any]) -> str:
    teacher = next(iter(report["saved_models"]))
    others = [("the export", teacher), ("keras-nlp", KERAS)]
    per_batch = report.get("first_token_ms") or report["sentences_per_second"]
    headers = ["batch", "model", "tokens/s", *(f"against {name}" for name, _ in others)]
    headers += ["first token, ms", "p95, ms"] if "first_token_ms" in report else ["sentences/s"]
    rows, silent = [], []
    for row, more in zip(report["tokens_per_second"], per_batch, strict=True):
        for name, rate in row["models"].items():
            ratios = [ratio(rate, row["models"][other]) for _, other in others]
            told = [str(row["batch"]), name, number(row["models"], name, ",.0f")]
            told += ["–" if found is None else times(found) for found in ratios]
            if "first_token_ms" in report:
                told += [number(more["models"][name], key) for key in ("median_ms", "p95_ms")]
            else:
                told.append(number(more["models"], name, ",.1f"))
            rows.append(told)
            if rate == 0:
                silent.append(f"{name} answered with no token at batch {row['batch']}: there is no ratio to it.")
    block = report["recipe"]["benchmark"]
    how = "Tokens of the answers that each model gives, greedily unless it was exported with beams, by the median of "
    how += f"{block['repeats']} calls; the models took turns call by call. Strings in, strings out, tokenizer included."
    if "first_token_ms" in report:
        how += f" Prompts of {block['prompt_tokens']} words of dev texts, at most {block['new_tokens']} new tokens."
    notes = "".join(f"<p class='note'>{html.escape(line)}</p>" for line in silent)
    return f"<h2>Speed</h2><p class='quiet'>{html.escape(how)}</p>{html.table(headers, rows)}{notes}"


def _plots(report: Mapping[str, Any]) -> str:
    rows, split = report["tokens_per_second"], splits_of(report)[-1]
    names = list(rows[0]["models"])
    rates = {name: [row["models"][name] or 0.0 for row in rows] for name in names}
    parts = [
        plots.bars(
            rates,
            [f"batch {row['batch']}" for row in rows],
            label="tokens per second",
            caption="Tokens per second by batch",
        )
    ]
    kind = KINDS[report["task"]][0]
    if kind == "perplexity" and report["other_vocabulary"]:
        kind = "bits_per_byte"  # which compares
    products = report["saved_models"]
    quality = {name: report[kind][name].get(split) for name in products}
    placed = {
        name: plots.Point(rates[name][0], quality[name], products[name]["bytes"])
        for name in products
        if quality[name] is not None and rates[name][0]
    }
    if placed:
        labels = (f"tokens per second at batch {rows[0]['batch']}", f"{split} {names_of(kind)}")
        caption = f"Tokens per second, {split} {names_of(kind)} and size (area) of each SavedModel"
        parts.append(plots.trade(placed, labels=labels, caption=caption))
    parts.append(plots.sizes({name: product["bytes"] for name, product in products.items()}))
    return f"<h2>At a glance</h2>{''.join(parts)}"


def _saved_models(report: Mapping[str, Any]) -> str:
    memory = report.get("memory_mb", {})
    rows = [
        [
            name,
            megabytes(product["bytes"]),
            f"{memory[name]:,.0f} MB" if memory.get(name) is not None else "–",
            f"{product['parameters']:,}" if product.get("parameters") else "–",
            product["precision"],
            product["target"],
        ]
        for name, product in report["saved_models"].items()
    ]
    headers = ["SavedModel", "on disk", "in memory", "parameters", "precision", "target"]
    how = "In memory: what a process with TensorFlow alone grows by when it loads the model and answers once."
    return f"<h2>SavedModels</h2>{html.table(headers, rows)}<p class='quiet'>{how if memory else ''}</p>"


# --- examples -----------------------------------------------------------------------------------------------------


def _examples(report: Mapping[str, Any]) -> str:
    names = list(report["saved_models"])
    blocks = []
    for example in report["examples"]:
        parts = [("input", example["input"]), ("reference", example["reference"])]
        parts.append(("teacher", example["teacher"]))
        if len(names) > 1:
            parts.append((f"student ({names[-1]})", example["student"]))
        blocks.append(html.side_by_side(parts, _how_bad(example)))
    if report["task"] == "translate":
        how = "The dev translations of the student with the lowest chrF, the lowest first."
    else:
        how = (
            "The dev texts that the student finds harder than the teacher does, by nats per token, the hardest first: "
            "how they begin, how they go on, and how teacher and student go on."
        )
    more = "".join(blocks[_AT_ONCE:])
    if more:
        more = f"<details><summary>{len(blocks) - _AT_ONCE} more</summary>{more}</details>"
    return f"<h2>Examples, worst first</h2><p class='quiet'>{how}</p>{''.join(blocks[:_AT_ONCE])}{more}"


def _how_bad(example: Mapping[str, Any]) -> str:
    if "chrf" in example:
        return f"chrF {number(dict(example), 'chrf', '.1f')}"
    worse = example.get("worse_by")
    if worse is None:
        return "not finite"
    return f"{abs(worse):.3f} nats per token {'harder' if worse > 0 else 'easier'} than for the teacher"


# --- training -----------------------------------------------------------------------------------------------------


def _training(report: dict[str, Any]) -> str:
    trained = [stage for stage in report["stages"] if stage.get("history")]
    parts = []
    if trained:
        scores = {
            stage["stage"]: [_or_gap(entry.get("dev_perplexity")) for entry in stage["history"]] for stage in trained
        }
        if any(math.isfinite(score) for curve in scores.values() for score in curve):
            parts.append(
                plots.curves(scores, label="dev perplexity", caption="Dev perplexity after each epoch", wide=True)
            )
        parts.append(common.every_epoch(report, "dev_perplexity", "dev perplexity", ".2f"))
    rows = [
        [stage["stage"], entry["round"], number(entry, "dev_divergence", ".4f"),
         "kept" if entry["round"] == stage["best_round"] else ""]
        for stage in report["stages"]
        for entry in stage.get("rounds", ())
    ]  # fmt: skip
    if rows:
        parts.append("<h3>Rounds</h3>" + html.table(["step", "round", "dev divergence", ""], rows))
    return f"<h2>Training</h2>{''.join(parts)}" if parts else ""


def _or_gap(value: float | None) -> float:
    return math.nan if value is None else value
