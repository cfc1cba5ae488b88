"""Parts of a report as lines of text and rows of a table."""

from __future__ import annotations

from collections import defaultdict

from tfvllm.simplifier.report_data import SignatureReport


def verification_lines(signature: SignatureReport) -> list[str]:
    """What the comparison with the original found, and what it could not tell, as sentences."""
    check = signature.verification
    if not check:
        return []
    lines = []
    if check["status"] != "not verified":
        lines.append(
            f"verified on {check['samples']} inputs: largest difference {check['max_abs_error']:.3g} "
            f"(allowed {check['tolerance']:.3g}; reference: {check['reference']})"
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
    """The decision table: a row for each kind of request, the milliseconds of each variant, the choice."""
    points = signature.dispatch["points"]
    variants = list(points[0]["ms"])
    chooses = [n for n in points[0].get("again", {}) if n not in variants]
    headers = ["batch × length", "tokens", "requests", *variants, *chooses, "choice"]
    rows = []
    for point in points:
        size = f"{point['batch']}" if point["length"] is None else f"{point['batch']} × {point['length']}"
        times = [f"{point['ms'][n]:.2f}" for n in variants] + [f"{point['again'][n]:.2f}" for n in chooses]
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
