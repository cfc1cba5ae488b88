"""Drives the rules over a user's graph: tracing, choosing, verifying, quantising, dispatching, reporting."""
