"""What pruning really saved: parameters, zeros, bytes on disk, FLOPs, and time, stage by stage."""

import gzip
import io
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from tfvllm.errors import InputError
from tfvllm.families import adapter_for
from tfvllm.pruning.files import sparse_size, stored_variables

MASKS_DO_NOT_SPEED_UP = (
    "Masks alone do not speed up TensorFlow or TF Serving: zeros are multiplied like any other number. They save "
    "bytes on disk with gzip or the bitmask format. Speed comes from removed structure (tfvllm.shrink)."
)


@dataclass
class PruningReport:
    """Stages of a model's diet, in order. `add` each stage, then `table` or `to_dict`.

    Example:
        >>> report = tfvllm.pruning.PruningReport()
        >>> report.add("dense", tiny_bert(), shape=(1, 6))
        >>> report.to_dict()["stages"][0]["parameters"] == tiny_bert().count_params()
        True
    """

    rows: list[dict[str, Any]] = field(default_factory=list)

    def add(
        self, stage: str, model: Any, *, run: Callable[[], Any] | None = None, shape: tuple[int, int] = (8, 128)
    ) -> None:
        """Measures `model` as it is now.

        Args:
            stage: its name in the table.
            run: a call to time; see `time_stages`, which times all stages in one interleaved run. None leaves time out.
            shape: (batch, length) of the FLOPs.
        """
        values = [np.asarray(v) for v in stored_variables(model)]
        raw = b"".join(value.tobytes() for value in values)
        compressed = io.BytesIO()
        with gzip.GzipFile(fileobj=compressed, mode="wb", compresslevel=6, mtime=0) as file:
            file.write(raw)
        self.rows.append(
            {
                "stage": stage,
                "parameters": sum(v.size for v in values),
                "zeros": sum(int(np.count_nonzero(v == 0)) for v in values),
                "bytes": len(raw),
                "bytes_gzip": compressed.tell(),
                "bytes_bitmask": sum(sparse_size(v) for v in values),
                "flops": _flops(model, shape),
                "latency_ms": None,
                "run": run,
            }
        )

    def time_stages(self, repeats: int = 20, warmup: int = 3) -> None:
        """Times every stage that has a `run`, interleaved; medians in ms."""
        from tfvllm.timing import compare

        runs = {row["stage"]: row["run"] for row in self.rows if row["run"] is not None}
        if not runs:
            raise InputError("no stage has a run to time: pass run= to add.")
        timings = compare(runs, repeats=repeats, warmup=warmup)
        for row in self.rows:
            if row["stage"] in timings:
                row["latency_ms"] = float(timings[row["stage"]].median_ms)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able; with the plain words about masks."""
        rows = [{k: v for k, v in row.items() if k != "run"} for row in self.rows]
        return {"stages": rows, "note": MASKS_DO_NOT_SPEED_UP}

    def table(self) -> str:
        """Markdown table and the plain words about masks."""
        lines = [
            "| stage | parameters | zeros | plain MB | gzip MB | bitmask MB | GFLOPs | median ms |",
            "|---|---|---|---|---|---|---|---|",
        ]
        for row in self.rows:
            megabytes = " | ".join(f"{row[key] / 1e6:.2f}" for key in ("bytes", "bytes_gzip", "bytes_bitmask"))
            flops = "" if row["flops"] is None else f"{row['flops'] / 1e9:.3f}"
            latency = "not measured" if row["latency_ms"] is None else f"{row['latency_ms']:.1f}"
            share = row["zeros"] / max(row["parameters"], 1)
            lines.append(
                f"| {row['stage']} | {row['parameters']:,} | {share:.1%} | {megabytes} | {flops} | {latency} |"
            )
        return "\n".join(lines) + f"\n\n{MASKS_DO_NOT_SPEED_UP}\n"


def block_flops(model: Any, batch: int, length: int) -> int:
    """Multiply-adds x 2 of the blocks of a keras-nlp model at (batch, length): products and attention, norms left out.

    Zeros count: they are multiplied too, and every expert: keras-nlp computes all of them for all tokens.
    DeBERTa's attention to relative positions is left out.

    Example:
        >>> tfvllm.pruning.block_flops(tiny_bert(layers=1), batch=1, length=6)
        10368
    """
    total = 0
    for block in adapter_for(model).blocks(model):
        inside = block.feed_forward
        per_token = sum(int(np.prod(p.layer.kernel.shape)) for p in inside.projections)
        per_token += sum(int(np.prod(w.variable.shape)) for w in inside.bare if len(w.variable.shape) == 3)
        for attention in (block.attention, block.cross_attention):
            if attention is not None:
                per_token += sum(int(np.prod(p.layer.kernel.shape)) // p.parts for p in attention.projections)
                per_token += 2 * length * attention.heads * attention.head_dim
        total += 2 * batch * length * per_token
    return total


def _flops(model: Any, shape: tuple[int, int]) -> int | None:
    try:
        return block_flops(model, *shape)
    except InputError:
        return None
