"""The simplifier's report as one self-contained page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from tfvllm import html
from tfvllm.simplifier.report_data import SignatureReport
from tfvllm.simplifier.report_lines import dispatch_lines, dispatch_table, lowering_lines, verification_lines


def page(
    main: SignatureReport,
    signatures: Mapping[str, SignatureReport],
    *,
    target: str,
    precision: str,
    source: str = "",
    notes: Sequence[str] = (),
) -> str:
    """The HTML of a report: costs, rules, near misses, verification, and both graphs as diagrams."""
    before, after = main.before, main.after
    items = [
        (f"{before['nodes']:,} → {after['nodes']:,}", "nodes"),
        (_ratio(before["flops"], after["flops"]), "FLOPs, after / before"),
        (_ratio(before["bytes"], after["bytes"]), "bytes of weights, after / before"),
        (_difference(main.verification), "largest difference found"),
    ]
    body = [
        f"<p>Target <b>{html.escape(target)}</b>, precision <b>{html.escape(precision)}</b>. "
        "Nodes do not count constants, arguments and reads of weights. FLOPs are counted at batch 1, length 128.</p>",
        html.cards(items),
    ]
    for name, signature in signatures.items():
        body.append(f"<h2>Signature {html.escape(name)}</h2>")
        body.extend(_section(signature))
    body.extend(f"<p>{html.escape(note)}</p>" for note in notes)
    return html.page(f"Simplified: {source or 'graph'}", "\n".join(body))


def _section(signature: SignatureReport) -> list[str]:
    rows = [
        (
            label,
            f"{signature.before[key]:,}",
            f"{signature.after[key]:,}",
            _ratio(signature.before[key], signature.after[key]),
        )
        for key, label in (("nodes", "nodes"), ("flops", "FLOPs"), ("parameters", "parameters"), ("bytes", "bytes"))
    ]
    parts = [html.table(("", "before", "after", "ratio"), rows)]
    if signature.fired:
        parts.append("<h3>Rules that fired</h3>")
        fired = [(n, str(e["count"]), e["guarantee"], e["equation"]) for n, e in signature.fired.items()]
        parts.append(html.table(("rule", "times", "guarantee", "what it does"), fired))
    else:
        parts.append("<p>Nothing could be merged: the output equals the input.</p>")
    for title, entries in (("Near misses", signature.declined), ("Rolled back", signature.rolled_back)):
        if entries:
            parts.append(f"<h3>{title}</h3>")
            parts.append(html.table(("rule", "where", "why"), [(e["rule"], e["where"], e["reason"]) for e in entries]))
    if signature.measured:
        parts.append("<h3>Measured with and without each rule</h3>")
        times = [
            (
                m["rule"],
                f"{m['with_ms']:.3f}",
                f"{m['without_ms']:.3f}",
                f"{m['noise']:.1%}",
                m["finding"] + (": kept" if m["kept"] else ": dropped"),
            )
            for m in signature.measured
        ]
        parts.append(html.table(("rule", "ms with", "ms without", "noise", "finding"), times))
    if signature.dispatch:
        parts.append("<h3>Chosen at run time</h3>")
        if signature.dispatch["points"]:
            headers, requests = dispatch_table(signature)
            parts.append("<p>Median milliseconds of each way to compute the graph, by kind of request.</p>")
            parts.append(html.table(headers, requests))
        parts.extend(f"<p>{html.escape(line)}.</p>" for line in dispatch_lines(signature))
    parts.extend(f"<p>{html.escape(line)}.</p>" for line in lowering_lines(signature))
    if signature.lowering:
        parts.append("<h3>Products and tables</h3>")
        forms = [
            (e["where"], e["what"], e["precision"], _range(e["range"]), f"{e['error']:.2g}")
            for e in signature.lowering["products"]
        ]
        parts.append(html.table(("where", "what", "precision", "range of the input", "relative error"), forms))
    parts.extend(f"<p>{html.escape(line[0].upper() + line[1:])}.</p>" for line in verification_lines(signature))
    for which in ("before", "after"):
        parts.append(html.diagram(signature.diagrams[which], f"The graph {which}, one box for each layer", folded=True))
    return parts


def _difference(check: dict) -> str:
    if check.get("status") == "not verified":
        return "not verified"
    return f"{check.get('max_abs_error', 0):.2g}"


def _range(ends: list[float] | None) -> str:
    return "–" if ends is None else f"{ends[0]:.4g} … {ends[1]:.4g}"


def _ratio(before: int, after: int) -> str:
    return f"{after / before:.2f}" if before else "–"
