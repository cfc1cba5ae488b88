"""How good a language model is: which figures say so, which may be compared, and what they come to in a sentence."""

from collections.abc import Mapping
from typing import Any

from tfvllm.compress.report.common import number, times
from tfvllm.compress.tasks.language_products import KERAS

# task -> the figures that SavedModels of it are judged by, the first one foremost
KINDS = {"generate": ("perplexity", "bits_per_byte"), "translate": ("bleu", "chrf")}
_NAMES = {"perplexity": "perplexity", "bits_per_byte": "bits/byte", "bleu": "BLEU", "chrf": "chrF"}
_SHOWN = {"bits_per_byte": ".3f"}
_LARGE = 1e6  # from here on a perplexity is told by its power of ten

OTHER_VOCABULARY = (
    "* of a vocabulary that was cut: its perplexity counts other tokens and does not compare with the others; bits per "
    "byte of text do."
)


def names_of(kind: str) -> str:
    """What people call a figure."""
    return _NAMES[kind]


def splits_of(report: Mapping[str, Any]) -> list[str]:
    """dev, and test where there is one."""
    return [split for split in ("dev", "test") if report["data"][split]]


def figure(entry: Mapping[str, Any], key: str, kind: str) -> str:
    """`entry[key]`, a figure of this kind, as text."""
    value = entry.get(key)
    shown = ".1e" if value is not None and abs(value) >= _LARGE else _SHOWN.get(kind, ".2f")
    return number(dict(entry), key, shown)


def marked(report: Mapping[str, Any], name: str, kind: str, entry: Mapping[str, Any], key: str) -> str:
    """The same, with a star where it is the perplexity of a model (stage or SavedModel) with another vocabulary."""
    text = figure(entry, key, kind)
    return f"{text}*" if kind == "perplexity" and name in report["other_vocabulary"] and entry.get(key) else text


def compared(report: Mapping[str, Any]) -> tuple[str, dict[str, dict[str, dict[str, Any]]]]:
    """Teacher and final model: what was judged, and kind -> split -> `{"teacher": value, "final": value}`.

    SavedModels as served, where they were measured; else the Keras models of the first and last stage.
    """
    kinds, splits = KINDS[report["task"]], splits_of(report)
    if "memory_mb" in report:
        names = list(report["saved_models"])
        ends = {"teacher": names[0], "final": names[-1]}
        return "SavedModels", {
            kind: {split: {end: report[kind][name][split] for end, name in ends.items()} for split in splits}
            for kind in kinds
        }
    stages = {"teacher": report["stages"][0], "final": report["stages"][-1]}
    return "Keras models", {
        kind: {split: {end: stage.get(f"{split}_{kind}") for end, stage in stages.items()} for split in splits}
        for kind in kinds
    }


def verdict(report: Mapping[str, Any]) -> list[str]:
    """Size, speed and quality against the teacher, each a sentence."""
    summary = report.get("summary")
    last = summary["final"] if summary else report["stages"][-1]["stage"]
    told = [] if summary else ["No SavedModel was made: the recipe has no export step."]
    if len(report["stages"]) == 1:
        told.insert(0, "The recipe makes no student: this is the teacher itself.")
    elif summary:
        size = summary["size_ratio"]
        larger = f"{times(size)} smaller" if size >= 1 else f"{times(1 / size)} larger"
        told.append(f"The final model ({last}) is {larger} than the teacher's own export.")
    for other, by_batch in (summary or {}).get("speedup", {}).items():
        known = [f"{times(found)} at batch {batch}" for batch, found in by_batch.items() if found is not None]
        if known and other != last:
            whose = "those of keras-nlp, which runs the teacher" if other == KERAS else "those of the teacher's export"
            told.append(f"Its tokens per second against {whose}: {', '.join(known)}.")
    if len(report["stages"]) > 1:
        told.append(_quality(report, last))
    return told


def _quality(report: Mapping[str, Any], last: str) -> str:
    _, figures = compared(report)
    split = splits_of(report)[-1]
    kind = KINDS[report["task"]][0]
    told = ""
    if kind == "perplexity" and last in report["other_vocabulary"]:
        kind, told = "bits_per_byte", "Its vocabulary was cut, so perplexities do not compare. "
    pair = figures[kind][split]
    first, final = pair["teacher"], pair["final"]
    name = {"bits_per_byte": "bits per byte of text", "bleu": "BLEU"}.get(kind, kind)
    if final is None:
        return f"{told}Its {split} {name} is not a finite number: training went wrong, and the model is of no use."
    against = f"{told}Its {split} {name} is {figure(pair, 'final', kind)}"
    if first is None:
        return f"{against}; the teacher's is not a finite number."
    against += f" against the teacher's {figure(pair, 'teacher', kind)}"
    if kind == "bleu":
        lost = round(first - final, 2)
        if max(first, final) < 1:
            return f"{against}: neither translates."
        if not lost:
            return f"{against}: nothing lost."
        return f"{against}: {abs(lost):.2f} points {'lost' if lost > 0 else 'gained'}."
    change = round(100 * (final / first - 1), 1) if first else 0.0
    if not change:
        return f"{against}: no worse."
    return f"{against}: {abs(change):.1f} % {'worse' if change > 0 else 'better'}."
