"""What is known of one simplified signature."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


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
