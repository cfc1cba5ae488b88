"""Drives the rules over a user's graph: tracing, choosing, verifying, quantising, dispatching, reporting."""

__all__ = [
    "api",
    "arguments",
    "calibrate",
    "composites",
    "cost",
    "diagram",
    "dispatch",
    "engine",
    "example_inputs",
    "float64",
    "memory",
    "quantize",
    "report",
    "report_data",
    "report_html",
    "report_lines",
    "state",
    "tracing",
    "trial",
    "verify",
]
