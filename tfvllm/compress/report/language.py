"""The report of a language model, a generator or a translator: quality, tokens per second, memory, in figures."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from tfvllm.compress.recipe import Recipe
from tfvllm.compress.report import language_page
from tfvllm.compress.report.common import Table, number, ratio
from tfvllm.compress.report.language_quality import (
    KINDS,
    OTHER_VOCABULARY,
    compared,
    marked,
    names_of,
    splits_of,
    verdict,
)
from tfvllm.compress.steps import StepResult
from tfvllm.compress.tasks.language_products import KERAS

STAGES_IN_PLAIN_TEXT = True
page = language_page.page


def content(
    recipe: Recipe,
    stages: Sequence[StepResult],
    products: Mapping[str, StepResult],
    measured: StepResult | None,
    report: Mapping[str, Any],
) -> dict[str, Any]:
    """What only these tasks have, for the `report` as it is up to here."""
    found: dict[str, Any] = {"other_vocabulary": _other_vocabulary(recipe, stages, products)}
    if recipe.task == "translate":
        for kind in ("perplexity", "bits_per_byte"):
            found[kind] = {
                done.name: {
                    split: done.result[f"{split}_{kind}"]
                    for split in ("dev", "test")
                    if f"{split}_{kind}" in done.result
                }
                for done in stages
                if done.name != "data"
            }
    if measured is not None:
        told = measured.result
        served = ("bleu", "chrf", "signatures") if recipe.task == "translate" else ("perplexity", "bits_per_byte")
        found |= {key: told[key] for key in (*served, "memory_mb", "examples")}
        found["tokens_per_second"] = _by_batch(told["speed"], lambda timing: timing["tokens_per_second"])
        if recipe.task == "translate":
            found["sentences_per_second"] = _by_batch(told["speed"], lambda timing: timing["sentences_per_second"])
        else:
            found["first_token_ms"] = _by_batch(
                told["speed"], lambda timing: {key: timing["first_token_ms"][key] for key in ("median_ms", "p95_ms")}
            )
    if products:
        names = list(products)
        found["summary"] = _summary({**report, **found}, names[0], names[-1])
    return found


def _by_batch(speed: Iterable[Mapping[str, Any]], figure: Any) -> list[dict[str, Any]]:
    return [
        {"batch": row["batch"], "models": {name: figure(timing) for name, timing in row["models"].items()}}
        for row in speed
    ]


def _other_vocabulary(recipe: Any, stages: Sequence[StepResult], products: Mapping[str, StepResult]) -> list[str]:
    """The stages and SavedModels whose vocabulary is not the teacher's: it is cut when `shrink` ends."""
    last = stages[-1]
    if recipe.shrink is None or recipe.shrink.vocabulary is None or last.name != "shrink":
        return []
    before = last.result.get("before_recovery", stages[-2].result)
    if last.result["weights"] == before["weights"]:  # there was no token too many
        return []
    return [last.name, *(name for name, done in products.items() if done.result["of"] == last.name)]


def data_of(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Of the data step, for the report."""
    return {key: facts[key] for key in ("source", "synthetic", "units", "train", "dev", "test", "notes")}


def quality(report: Mapping[str, Any], name: str) -> dict[str, Any]:
    """What the manifest of a SavedModel says of it."""
    if "memory_mb" not in report:
        return {}
    found = {kind: report[kind][name] for kind in KINDS[report["task"]]}
    return {**found, "signatures": report["signatures"]} if "signatures" in report else found


def _summary(report: Mapping[str, Any], teacher: str, final: str) -> dict[str, Any]:
    """The final model against the teacher's own export, in speed against the teacher in keras-nlp too.

    Ratios of size, memory and speed above 1 are in the final model's favour; those of perplexity and of bits per byte
    are the final model's over the teacher's, so that 1.05 is 5 % worse. None: there is nothing to compare.
    """
    sizes = {name: report["saved_models"][name]["bytes"] for name in (teacher, final)}
    summary: dict[str, Any] = {
        "final": final,
        "against": teacher,
        "size_ratio": ratio(sizes[teacher], sizes[final]),
        "bytes": sizes[final],
    }
    if "memory_mb" in report:
        summary["memory_ratio"] = ratio(report["memory_mb"][teacher], report["memory_mb"][final])
        summary["speedup"] = {
            other: {
                str(row["batch"]): ratio(row["models"][final], row["models"][other])
                for row in report["tokens_per_second"]
            }
            for other in (teacher, KERAS)
        }
    of, figures = compared(report)
    summary["quality_of"] = of
    for kind in KINDS[report["task"]]:
        by_split = {split: (pair["teacher"], pair["final"]) for split, pair in figures[kind].items()}
        summary[kind] = {split: last for split, (_, last) in by_split.items()}
        if kind in ("bleu", "chrf"):
            summary[f"{kind}_lost"] = {split: first - last for split, (first, last) in by_split.items()}
        else:
            alike = kind != "perplexity" or final not in report["other_vocabulary"]
            summary[f"{kind}_ratio"] = {
                split: ratio(last, first) if alike else None for split, (first, last) in by_split.items()
            }
    return summary


# --- the terminal -------------------------------------------------------------------------------------------------


def tables(report: dict[str, Any]) -> list[Table]:
    """What each stage cost and kept; then the SavedModels side by side."""
    found: list[Table] = [(f"{report['name']}: stages", *language_page.stages_table(report))]
    if report["saved_models"]:
        found.append(("SavedModels, strings in, strings out", *_side_by_side(report)))
    return found


def _side_by_side(report: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Headers, and a row for each SavedModel: MB; where measured also quality, tokens/s, first token; and keras-nlp."""
    headers = ["SavedModel", "MB"]
    rows = [[name, f"{product['bytes'] / 1e6:.2f}"] for name, product in report["saved_models"].items()]
    if "memory_mb" not in report:
        return headers, rows
    kinds, split = KINDS[report["task"]], splits_of(report)[-1]
    speed, first = report["tokens_per_second"], report.get("first_token_ms", [])[:1]
    headers += ["MB in memory", *(f"{split} {names_of(kind)}" for kind in kinds)]
    headers += [f"tokens/s, batch {row['batch']}" for row in speed]
    headers += [f"first token ms, batch {row['batch']}" for row in first]
    for row in [*rows, [KERAS, "–"]]:
        name = row[0]
        row.append(number(report["memory_mb"], name, ".0f"))
        row += [marked(report, name, kind, report[kind].get(name, {}), split) for kind in kinds]
        row += [number(batch["models"], name, ",.0f") for batch in speed]
        row += [number(batch["models"][name], "median_ms") for batch in first]
    return headers, [*rows, row]


def closing(report: dict[str, Any]) -> list[str]:
    """What came of it, in a few lines."""
    return [*([OTHER_VOCABULARY] if report["other_vocabulary"] else []), *verdict(report)]
