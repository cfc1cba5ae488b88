"""What was done to a graph: a table for the terminal, JSON, HTML, and Mermaid diagrams collapsed by layer."""

from __future__ import annotations

import json
import os
import re
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from typing import Any

from tfvllm.files import write_text
from tfvllm.graph.ir import Graph, Node
from tfvllm.graph.rewriter import short

_HIDDEN = frozenset({"Const", "Placeholder", "ReadVariableOp", "NoOp"})
_SHAPING = frozenset({"Shape", "Pack", "StridedSlice", "Prod", "ConcatV2", "GatherV2"})
_MAX_GROUPS = 40


@dataclass
class SignatureReport:
    """One signature before and after."""

    name: str
    before: dict[str, Any]
    after: dict[str, Any]
    fired: dict[str, dict[str, Any]] = field(default_factory=dict)  # rule -> count, guarantee, equation
    declined: list[dict[str, str]] = field(default_factory=list)
    rolled_back: list[dict[str, str]] = field(default_factory=list)
    measured: list[dict[str, Any]] = field(default_factory=list)  # --measure: each rule's times, kept or dropped
    removed_dead: int = 0
    verification: dict[str, Any] = field(default_factory=dict)
    lowering: dict[str, Any] = field(default_factory=dict)  # int8: ranges, and each product's precision and error
    dispatch: dict[str, Any] = field(default_factory=dict)  # --profile: what was measured, and what is chosen when
    diagrams: dict[str, str] = field(default_factory=dict)


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
        from tfvllm.simplifier.report_html import page

        write_text(path, page(self))

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
                ways = Table(title=title, title_justify="left")
                for i, column in enumerate(headers):
                    ways.add_column(column, justify="right" if 0 < i < len(headers) - 1 else "left")
                for row in rows:
                    ways.add_row(*row)
                parts.append(ways)
            parts.extend(escape(line) for line in dispatch_lines(signature))
        for name, signature in self.signatures.items():
            prefix = f"{name}: " if len(self.signatures) > 1 else ""
            parts.extend(prefix + escape(line) for line in verification_lines(signature))
        if not self.rules:
            parts.append("Nothing could be merged: the output equals the input.")
        parts.extend(self.notes)
        return Group(*parts)


def verification_lines(signature: SignatureReport) -> list[str]:
    """What the comparison with the original found, and what it could not tell, as sentences."""
    check = signature.verification
    if not check:
        return []
    lines = []
    if check["status"] != "not verified":
        lines.append(
            f"verified on {check['samples']} inputs: largest difference {check['max_abs_error']:.3g} "
            f"(allowed {check['tolerance']:.3g}; yardstick: {check['yardstick']})"
        )
    by_reason: dict[str, list[str]] = defaultdict(list)
    for name, reason in check["not_verified"].items():
        by_reason[reason].append(name)
    lines.extend(f"not verified: {', '.join(names)}: {reason}" for reason, names in by_reason.items())
    if check["random"]:
        lines.append(f"the original is random: {', '.join(check['random'])}; it was compared on the same draws")
    return lines


def lowering_lines(signature: SignatureReport) -> list[str]:
    """What became of each product in a lower precision, as sentences; none where the precision is float32."""
    details = signature.lowering
    if not details:
        return []
    products, ranges = details["products"], details["ranges"]
    lowered = [p for p in products if p["precision"] != "float32"]
    worst = max(lowered, key=lambda p: p["error"])
    lines = [
        f"int8: {len(lowered)} of {len(products)} products and tables, with ranges from "
        f"{ranges['samples']} {ranges['inputs']} inputs; results are off by {details['error']:.2g} of their "
        f"largest magnitude, allowed {details['max_error']:.2g}",
        f"int8: the least exact is the {worst['what']} {worst['where']}: {worst['error']:.2g} of its own result, rms",
    ]
    if details["smoothed"]:
        lines.append(f"int8: large channels were spread into weights or computed apart at {details['smoothed']} places")
    return lines


def dispatch_table(signature: SignatureReport) -> tuple[list[str], list[list[str]]]:
    """The decision table: a row for each kind of request, the milliseconds of each way, the choice."""
    points = signature.dispatch["points"]
    ways = list(points[0]["ms"])
    chooses = [n for n in points[0].get("again", {}) if n not in ways]
    headers = ["batch × length", "tokens", "requests", *ways, *chooses, "choice"]
    rows = []
    for point in points:
        size = f"{point['batch']}" if point["length"] is None else f"{point['batch']} × {point['length']}"
        times = [f"{point['ms'][n]:.2f}" for n in ways] + [f"{point['again'][n]:.2f}" for n in chooses]
        rows.append([size, f"{point['tokens']}", f"{point['count']:g}", *times, point["choice"]])
    return headers, rows


def dispatch_lines(signature: SignatureReport) -> list[str]:
    """What is chosen when, and why, as sentences; none where no profile was given."""
    found = signature.dispatch
    if not found:
        return []
    if not found["pays"]:
        return [f"dispatch: no branch, {found['default']} always: {found['reason']}"]
    around = f"{len(found['checked'])} requests on both sides of every threshold, of one row and of none"
    empty = "" if found["empty_batch"] == "checked" else f" (empty batch: {found['empty_batch']})"
    return [
        *(f"dispatch: {line}" for line in found["decision"]),
        f"dispatch: a request takes {1 - found['saved']:.2f} times as long as with {found['default']} alone; "
        f"all weights {found['bytes'] / 2**20:.1f} MiB, allowed {found['limit'] / 2**20:.1f}; "
        f"verified on {around}{empty}",
    ]


# ------------------------------------------------------------------------------------------------------------ diagrams


def diagram(graph: Graph) -> str:
    """The graph as a Mermaid flowchart: one box for each layer, with the ops it runs; constants and weights hidden."""
    live = [n for n in graph.live() if n.op not in _HIDDEN]
    key = _grouping(live)
    groups: dict[str, list[Node]] = defaultdict(list)
    for node in live:
        groups[key(node)].append(node)
    ids = {name: f"g{i}" for i, name in enumerate(groups)}
    lines = ["flowchart TD"]
    for i, name in enumerate(graph.inputs):
        lines.append(f'  in{i}(["{_escape(name)}"])')
    for name, nodes in groups.items():
        lines.append(f'  {ids[name]}["<b>{_escape(short(name, 2))}</b><br/>{_escape(_summary(nodes))}"]')
    edges: dict[tuple[str, str], None] = {}
    inputs = {v.node: f"in{i}" for i, v in enumerate(graph.inputs.values())}
    for node in live:
        for value in node.inputs:
            source = inputs.get(value.node) or (ids.get(key(value.node)) if value.node.op not in _HIDDEN else None)
            if source is not None and source != ids[key(node)]:
                edges[(source, ids[key(node)])] = None
    for i, (name, value) in enumerate(graph.outputs.items()):
        lines.append(f'  out{i}(["{_escape(name)}"])')
        source = inputs.get(value.node) or ids.get(key(value.node) if value.node.op not in _HIDDEN else "")
        if source is not None:
            edges[(source, f"out{i}")] = None
    lines.extend(f"  {a} --> {b}" for a, b in edges)
    return "\n".join(lines) + "\n"


def side_by_side(before: str, after: str) -> str:
    """Two flowcharts as the two subgraphs of one."""
    lines = ["flowchart LR"]
    for title, text, prefix in (("before", before, "b_"), ("after", after, "a_")):
        lines.append(f"  subgraph {title}")
        lines.append("    direction TB")
        lines.extend("  " + _prefixed(line, prefix) for line in text.splitlines()[1:])
        lines.append("  end")
    return "\n".join(lines) + "\n"


def _prefixed(line: str, prefix: str) -> str:
    if "-->" in line:
        return re.sub(r"\b(g|in|out)(\d+)\b", rf"{prefix}\1\2", line)
    return re.sub(r"^(\s*)(g|in|out)(\d+)", rf"\1{prefix}\2\3", line)


def _grouping(nodes: list[Node]):
    """Names cut to the depth at which there are at most 40 groups."""
    paths = {n.name: n.name.split("/")[:-1] for n in nodes}
    deepest = max((len(p) for p in paths.values()), default=0)
    for depth in range(deepest, 0, -1):
        if len({tuple(p[:depth]) for p in paths.values()}) <= _MAX_GROUPS:
            break
    else:
        depth = 1
    return lambda node: "/".join(node.name.split("/")[:-1][:depth]) or node.op


def _summary(nodes: list[Node], most: int = 6) -> str:
    counts = Counter(n.op for n in nodes if n.op not in _SHAPING)
    shaping = sum(n.op in _SHAPING for n in nodes)
    parts = [op if n == 1 else f"{n} {op}" for op, n in counts.most_common(most)]
    rest = sum(counts.values()) - sum(n for _, n in counts.most_common(most))
    if rest:
        parts.append(f"{rest} more")
    if shaping:
        parts.append(f"{shaping} for shapes")
    return ", ".join(parts)


def _escape(text: str) -> str:
    return text.replace('"', "'").replace("_Fused", "Fused").replace("_Mkl", "Mkl").replace("#", "＃")
