"""How much each part of a model can lose: loss, or a metric, against the removed share, block by block."""

import contextlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from tfvllm import files
from tfvllm.errors import InputError
from tfvllm.families import FFN, Adapter, Block, adapter_for
from tfvllm.families.taps import call_of, first_of, hooked
from tfvllm.pruning.capture import batches
from tfvllm.pruning.importance import loss_of, unit_scores
from tfvllm.pruning.structure import Plan, best, full_plan, head_keep, head_unit, mask_model

UNITS = ("heads", "ffn", "layers")


@dataclass
class Sensitivity:
    """The result of `sensitivity`.

    Attributes:
        metric: what was measured ("loss", "accuracy" or the name of the function given).
        baseline: its value for the whole model.
        rows: dicts with unit, block ("encoder.3"), removed (share really removed), value, change (value - baseline).

    Example:
        >>> row = {"unit": "ffn", "block": "encoder.0", "removed": 0.5, "value": 0.7, "change": 0.1}
        >>> print(tfvllm.pruning.Sensitivity("loss", 0.6, [row]).table().splitlines()[-1])
        | ffn | encoder.0 | 0.7 |
    """

    metric: str
    baseline: float
    rows: list[dict[str, Any]] = field(default_factory=list)

    def table(self) -> str:
        """Markdown table, one line per block and unit, shares as columns."""
        shares = sorted({row["removed"] for row in self.rows})
        lines = [
            f"{self.metric}, whole model {self.baseline:.4g}",
            "",
            "| unit | block | " + " | ".join(f"-{share:.0%}" for share in shares) + " |",
            "|---|---|" + "---|" * len(shares),
        ]
        for unit, block in dict.fromkeys((row["unit"], row["block"]) for row in self.rows):
            values = {r["removed"]: r["value"] for r in self.rows if (r["unit"], r["block"]) == (unit, block)}
            cells = (f"{values[share]:.4g}" if share in values else "" for share in shares)
            lines.append(f"| {unit} | {block} | " + " | ".join(cells) + " |")
        return "\n".join(lines) + "\n"

    def to_dict(self) -> dict[str, Any]:
        return {"metric": self.metric, "baseline": self.baseline, "rows": self.rows}

    def plot(self, path: Any) -> Path:
        """Curves per unit kind, one line a block, as SVG or PNG by the ending of `path`."""
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot

        units = list(dict.fromkeys(row["unit"] for row in self.rows))
        figure, axes = pyplot.subplots(1, len(units), figsize=(5 * len(units), 4), squeeze=False, sharey=True)
        for axis, unit in zip(axes[0], units):
            for block in dict.fromkeys(row["block"] for row in self.rows if row["unit"] == unit):
                points = [(r["removed"], r["value"]) for r in self.rows if (r["unit"], r["block"]) == (unit, block)]
                points = sorted([(0.0, self.baseline), *points])
                axis.plot([p[0] for p in points], [p[1] for p in points], marker="o", markersize=3, label=block)
            axis.set_title(unit)
            axis.set_xlabel("share removed")
            axis.legend(fontsize=7)
        axes[0][0].set_ylabel(self.metric)
        figure.tight_layout()
        path = Path(path)
        with files.new_file(path) as partial:
            figure.savefig(partial, format=path.suffix.lstrip(".") or "svg")
        pyplot.close(figure)
        return path


def sensitivity(
    model: Any,
    data: Any,
    *,
    units: Sequence[str] = UNITS,
    shares: Sequence[float] = (0.25, 0.5, 0.75),
    importance: Any = "magnitude",
    metric: str | Callable[[Any, Any], float] = "loss",
    limit: int = 16,
) -> Sensitivity:
    """Removes a share of one unit kind in one block, measures, puts it back; every block, kind and share in turn.

    `model` is changed while this runs and is as before when it returns.

    Args:
        model: a keras-nlp task, compiled with a loss (for metric="loss").
        data: labelled batches as for `fit`; also the calibration data of `importance`.
        units: of "heads", "ffn", "layers". A layer is left out whole.
        shares: shares removed, in (0, 1).
        importance: which units go first, as for `shrink`.
        metric: "loss", "accuracy" (integer labels against the largest logit, sample weights respected), or a function
            (model, batches) -> float.
        limit: batches used at most.

    Raises:
        InputError: an unknown unit or metric, a share outside (0, 1), no labels.

    Example:
        >>> found = tfvllm.pruning.sensitivity(tiny_bert(), (x, y), units=["ffn"], shares=[0.5])
        >>> [(row["block"], row["removed"]) for row in found.rows]
        [('encoder.0', 0.5), ('encoder.1', 0.5)]
    """
    adapter = adapter_for(model)
    if unknown := [unit for unit in units if unit not in UNITS]:
        raise InputError(f"units={unknown}: expected of {', '.join(UNITS)}.")
    if wrong := [share for share in shares if not 0.0 < share < 1.0]:
        raise InputError(f"shares={wrong}: expected shares in (0, 1).")
    held = list(batches(model, data, limit=limit))
    if metric in ("loss", "accuracy") and any(y is None for _, y, _ in held):
        raise InputError(f"metric={metric!r} needs labels: expected data of (x, y).")
    measure = _measure(metric)
    result = Sensitivity(metric if isinstance(metric, str) else metric.__name__, measure(model, held))
    scores = unit_scores(model, importance, data, limit=limit) if {"heads", "ffn"} & set(units) else {}

    def note(unit: str, block: Block, removed: float) -> None:
        value = measure(model, held)
        result.rows.append(
            {
                "unit": unit,
                "block": f"{block.kind}.{block.index}",
                "removed": removed,
                "value": value,
                "change": value - result.baseline,
            }
        )

    for unit in units:
        for block in adapter.blocks(model):
            if unit == "layers":
                with _left_out(block):
                    note(unit, block, 1.0)
                continue
            if block.call:  # the same heads and neurons as an earlier block's
                continue
            for share in shares:
                plan, removed = _plan(adapter, model, block, unit, share, scores)
                if removed == 0.0:
                    continue
                saved = [(variable, np.asarray(variable)) for variable in adapter.backbone(model).variables]
                try:
                    mask_model(model, plan)
                    note(unit, block, removed)
                finally:
                    for variable, value in saved:
                        variable.assign(value)
    return result


def _plan(adapter: Adapter, model: Any, block: Block, unit: str, share: float, scores: Any) -> tuple[Plan, float]:
    plan = full_plan(model)
    if unit == "ffn":
        total = block.ffn_width
        keep = max(round(total * (1 - share)), 1)
        plan.keep[FFN, block.feed_forward.place] = best(scores[FFN, block.feed_forward.place], keep)
        return plan, (total - keep) / total
    removed = 0.0
    for cross in (False, True):
        attention = block.cross_attention if cross else block.attention
        if attention is None:
            continue
        kind = head_unit(block, cross)
        score = scores[kind, attention.place]
        keep = max(round(len(score) * (1 - share)), 1)
        plan.keep.update(head_keep(attention, kind, best(score, keep)))
        removed = max(removed, (len(score) - keep) / len(score))
    return plan, removed


@contextlib.contextmanager
def _left_out(block: Block) -> Iterator[None]:
    """While open, a block hands its input on. T5's also hands on the position bias, which it may own."""
    calls = itertools.count()

    def hook(method: Any, *args: Any, **kwargs: Any) -> Any:
        outputs = method(*args, **kwargs)
        if next(calls) % block.calls != block.call:
            return outputs
        first = first_of(args, kwargs)
        return (first, *outputs[1:]) if isinstance(outputs, tuple) else first

    with hooked(block.layer, call_of(block.layer), hook):
        yield


def _measure(metric: Any) -> Callable[[Any, list[Any]], float]:
    if callable(metric):
        return metric
    if metric == "loss":
        return _loss
    if metric == "accuracy":
        return _accuracy
    raise InputError(f"metric={metric!r}: expected 'loss', 'accuracy' or a function (model, batches) -> float.")


def _rows(y: Any, weight: Any) -> float:
    return float(np.sum(weight)) if weight is not None else float(np.size(y))


def _loss(model: Any, held: list[Any]) -> float:
    total = count = 0.0
    for x, y, weight in held:
        rows = len(np.asarray(y))
        total += float(loss_of(model, x, y, weight)) * rows
        count += rows
    return total / count


def _accuracy(model: Any, held: list[Any]) -> float:
    right = count = 0.0
    for x, y, weight in held:
        hits = np.argmax(np.asarray(model(x, training=False)), axis=-1) == np.asarray(y)
        right += float(np.sum(hits if weight is None else hits * np.asarray(weight)))
        count += _rows(y, weight)
    return right / max(count, 1e-30)
