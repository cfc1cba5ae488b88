"""What was done to a graph: a table for the terminal, JSON, HTML, and Mermaid diagrams collapsed by layer."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from typing import Any

from tfvllm.files import write_text
from tfvllm.simplifier import report_html
from tfvllm.simplifier.diagram import side_by_side
from tfvllm.simplifier.report_data import SignatureReport
from tfvllm.simplifier.report_lines import dispatch_lines, dispatch_table, lowering_lines, verification_lines


@dataclass
class Report:
    """What `simplify` did, signature by signature. `before`, `after`, `rules` and the rest speak of the main one.

    Example:
        >>> double = tf.function(lambda v: tf.exp(v) + tf.exp(v), input_signature=[tf.TensorSpec([None])])
        >>> report = tfvllm.simplify(double).report
        >>> report.before["ops"]["Exp"], report.after["ops"]["Exp"], report.rules["MergeDuplicates"]
        (2, 1, 1)
        >>> report.to_html(folder / "report.html")
    """

    target: str
    precision: str
    signatures: dict[str, SignatureReport]
    seconds: float = 0.0
    source: str = ""
    notes: list[str] = field(default_factory=list)

    @property
    def main(self) -> SignatureReport:
        return self.signatures.get("serving_default") or next(iter(self.signatures.values()))

    @property
    def before(self) -> dict[str, Any]:
        return self.main.before

    @property
    def after(self) -> dict[str, Any]:
        return self.main.after

    @property
    def rules(self) -> dict[str, int]:
        """How often each rule fired."""
        return {name: entry["count"] for name, entry in self.main.fired.items()}

    @property
    def dropped(self) -> list[str]:
        """The rules that were left out because the graph is no faster with them (`measure`)."""
        return [m["rule"] for s in self.signatures.values() for m in s.measured if not m["kept"]]

    @property
    def declined(self) -> list[dict[str, str]]:
        """Near misses: rule, layer, reason."""
        return self.main.declined

    @property
    def verification(self) -> dict[str, Any]:
        return self.main.verification

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain Python values, ready for JSON; diagrams excluded."""
        return {
            "source": self.source,
            "target": self.target,
            "precision": self.precision,
            "seconds": round(self.seconds, 3),
            "before": self.before,
            "after": self.after,
            "rules": self.rules,
            "declined": self.declined,
            "verification": self.verification,
            "notes": self.notes,
            "signatures": {
                name: {
                    "before": s.before,
                    "after": s.after,
                    "fired": s.fired,
                    "declined": s.declined,
                    "rolled_back": s.rolled_back,
                    "measured": s.measured,
                    "removed_dead": s.removed_dead,
                    "verification": s.verification,
                    "lowering": s.lowering,
                    "dispatch": s.dispatch,
                }
                for name, s in self.signatures.items()
            },
        }

    def to_json(self, path: str | os.PathLike) -> None:
        """Writes `to_dict()` to a file."""
        write_text(path, json.dumps(self.to_dict(), indent=2, ensure_ascii=False) + "\n")

    def mermaid(self, which: str = "after", signature: str | None = None) -> str:
        """The Mermaid text of a graph, collapsed by layer. `which`: "before" or "after"."""
        section = self.signatures[signature] if signature else self.main
        return section.diagrams[which]

    def to_mermaid(self, path: str | os.PathLike, signature: str | None = None) -> None:
        """Writes one Mermaid diagram with both graphs, before and after, to a file."""
        write_text(path, side_by_side(self.mermaid("before", signature), self.mermaid("after", signature)))

    def to_html(self, path: str | os.PathLike) -> None:
        """Writes a self-contained page with the table, the rules and the diagrams."""
        page = report_html.page(
            self.main,
            self.signatures,
            target=self.target,
            precision=self.precision,
            source=self.source,
            notes=self.notes,
        )
        write_text(path, page)

    def table(self) -> Any:
        """A `rich` renderable: costs before and after, rules fired, near misses."""
        from rich.console import Group
        from rich.markup import escape
        from rich.table import Table

        costs = Table(title=f"{self.source or 'graph'} → {self.target}, {self.precision}", title_justify="left")
        for column, justify in (("", "left"), ("before", "right"), ("after", "right"), ("ratio", "right")):
            costs.add_column(column, justify=justify)  # type: ignore[arg-type]
        for name, signature in self.signatures.items():
            prefix = f"{name}: " if len(self.signatures) > 1 else ""
            for key, label in (
                ("nodes", "nodes"),
                ("flops", "FLOPs"),
                ("parameters", "parameters"),
                ("bytes", "bytes"),
            ):
                old, new = signature.before[key], signature.after[key]
                ratio = f"{new / old:.2f}" if old else "–"
                costs.add_row(prefix + label, f"{old:,}", f"{new:,}", ratio)
        rules = Table(title="Rules that fired", title_justify="left")
        for column in ("rule", "times", "guarantee", "what it does"):
            rules.add_column(column, justify="right" if column == "times" else "left")
        for name, entry in self.main.fired.items():
            rules.add_row(name, str(entry["count"]), escape(entry["guarantee"]), escape(entry["equation"]))
        parts: list[Any] = [costs, rules]
        if self.declined:
            near = Table(title="Near misses", title_justify="left")
            for column in ("rule", "where", "why it declined"):
                near.add_column(column)
            for entry in self.declined[:20]:
                near.add_row(entry["rule"], escape(entry["where"]), escape(entry["reason"]))
            parts.append(near)
        parts.extend(escape(line) for line in lowering_lines(self.main))
        measured = [m for s in self.signatures.values() for m in s.measured]
        if measured:
            times = Table(title="Measured: the graph with and without each rule, ms", title_justify="left")
            for column in ("rule", "with", "without", "noise", "finding", "verdict"):
                times.add_column(column, justify="right" if column in ("with", "without", "noise") else "left")
            for m in measured:
                numbers = f"{m['with_ms']:.3f}", f"{m['without_ms']:.3f}", f"{m['noise']:.1%}"
                times.add_row(m["rule"], *numbers, m["finding"], "kept" if m["kept"] else "dropped")
            parts.append(times)
        for name, signature in self.signatures.items():
            if signature.dispatch.get("points"):
                title = "Ways to compute it, ms by request" + (f" ({name})" if len(self.signatures) > 1 else "")
                headers, rows = dispatch_table(signature)
                table = Table(title=title, title_justify="left")
                for i, column in enumerate(headers):
                    table.add_column(column, justify="right" if 0 < i < len(headers) - 1 else "left")
                for row in rows:
                    table.add_row(*row)
                parts.append(table)
            parts.extend(escape(line) for line in dispatch_lines(signature))
        for name, signature in self.signatures.items():
            prefix = f"{name}: " if len(self.signatures) > 1 else ""
            parts.extend(prefix + escape(line) for line in verification_lines(signature))
        if not self.rules:
            parts.append("Nothing could be merged: the output equals the input.")
        parts.extend(self.notes)
        return Group(*parts)


# ------------------------------------------------------------------------------------------------------------ diagrams
