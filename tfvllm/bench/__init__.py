"""Measuring: ratios in one run, on the same weights and inputs, with the conditions written down."""

__all__ = ["generate", "models", "results", "serve"]
