"""One way to test a rule: run it alone on a traced function, count, and hold the numbers to what it promises."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import tensorflow as tf

from tfvllm.graph import executable, importer
from tfvllm.graph.guarantee import Approximate, Exact
from tfvllm.graph.ir import Graph, Node
from tfvllm.graph.rewriter import Rewriter, Rule, Step, select
from tfvllm.rules import pipeline
from tfvllm.simplifier import float64, verify

SPECIAL = (0.0, -0.0, np.nan, np.inf, -np.inf, 1e-38, -1e-45, 3.4e38, 1.0, -1.0)
EPSILON = float(np.finfo(np.float32).eps)


@dataclass
class Checked:
    """What came of a run: the rewritten graph, how often each rule fired, the reasons of those that declined."""

    before: Graph
    graph: Graph
    rewriter: Rewriter

    @property
    def reasons(self) -> list[str]:
        return list(self.rewriter.declined.values())

    def ops(self, op: str | None = None) -> list[Node]:
        """The live nodes of one type (all computing nodes if None)."""
        live = self.graph.live()
        if op is None:
            return [n for n in live if n.op not in ("Const", "Placeholder", "ReadVariableOp")]
        return [n for n in live if n.op == op]


def f32(*shape: int | None, name: str = "x") -> tf.TensorSpec:
    return tf.TensorSpec(shape, tf.float32, name)


def weight(*shape: int, seed: int = 0, scale: float = 0.5) -> tf.Variable:
    """A variable of normal numbers."""
    rng = np.random.default_rng([seed, *shape])
    return tf.Variable(rng.normal(0, scale, shape).astype(np.float32))


def check(
    function: Callable[..., Any],
    specs: Sequence[tf.TensorSpec],
    rules: str | Sequence[str] | Rule,
    fires: int | dict[str, int] | None,
    *,
    target: str | None = None,
    reason: str | None = None,
    special: bool = True,
    finite_only: bool = False,
    samples: Sequence[Sequence[Any]] = (),
    generated: bool = True,
) -> Checked:
    """Runs the named rules alone on the traced `function` and asserts what they did.

    Args:
        specs: of its arguments; unknown sizes are given several values, odd ones and 1 among them.
        rules: names of rules in the pipeline, or a `Rule` object.
        fires: how often the rule (the first one named), or each of several rules, must fire; None for any number.
        target: the first target that all rules run on, if None.
        reason: a part of the message with which a rule must decline.
        special: whether ±0, NaN, infinities, subnormal and huge numbers are tried too.
        finite_only: the guarantee speaks of finite results only; where the original gives NaN or infinities nothing
            is compared.
        samples: more inputs to compare on.
        generated: whether inputs are made up beside `samples`.
    """
    steps = [Step("test", (rules,))] if isinstance(rules, Rule) else _unique(rules)
    objects = [r for s in steps for r in s.rules]
    if target is None:
        target = next(t for t in ("portable", "onednn") if all(t in r.targets for r in objects))
    concrete = tf.function(function, autograph=False).get_concrete_function(*specs)
    before = importer.from_concrete(concrete)
    rewriter = Rewriter(before.copy(), target)
    rewriter.run(steps)
    rewriter.graph.check()
    result = Checked(before, rewriter.graph, rewriter)

    wanted = {} if fires is None else fires if isinstance(fires, dict) else {objects[0].name: fires}
    found = {name: rewriter.counts.get(name, 0) for name in wanted}
    assert found == wanted, f"fired {dict(rewriter.counts)}, expected {wanted}; declined: {result.reasons}"
    if reason is not None:
        assert any(reason in r for r in result.reasons), f"no refusal says {reason!r}: {result.reasons}"

    guarantees = [a.guarantee for a in rewriter.fired]
    exact = all(isinstance(g, Exact) for g in guarantees)
    extra_tolerance = sum(
        {a.rule: a.guarantee.max_error for a in rewriter.fired if isinstance(a.guarantee, Approximate)}.values()
    )
    _compare(
        result,
        concrete,
        ([*_samples(specs, special), *samples] if generated else samples),
        exact,
        extra_tolerance,
        finite_only,
    )
    return result


def _unique(rules: str | Sequence[str]) -> list[Step]:
    """The named rules, each once, in the order of the pipeline."""
    seen: dict[str, Rule] = {}
    for step in select(pipeline(), rules):
        for rule in step.rules:
            seen.setdefault(rule.name, rule)
    names = [rules] if isinstance(rules, str) else list(rules)
    assert set(names) == set(seen), f"not one rule each: {names} gave {list(seen)}"
    return [Step("test", tuple(seen[n] for n in names))]


def _samples(specs, special: bool) -> list[list[np.ndarray]]:
    unknown = any(d is None for s in specs for d in s.shape)
    made = []
    for seed, (first, other) in enumerate([(1, 3), (3, 7), (5, 1)] if unknown else [(1, 1)]):
        rng = np.random.default_rng(seed)
        sample = []
        for spec in specs:
            shape = [d if d is not None else first if axis == 0 else other for axis, d in enumerate(spec.shape)]
            if spec.dtype.is_floating:
                sample.append(rng.standard_normal(shape))
            elif spec.dtype == tf.bool:
                sample.append(rng.integers(0, 2, shape).astype(bool))
            else:
                sample.append(rng.integers(0, 3, shape))
        made.append(sample)
        if special and seed <= 1:
            made.append([_sprinkled(rng, a, s) for a, s in zip(sample, specs)])
    return made


def _sprinkled(rng, array, spec):
    if not spec.dtype.is_floating or array.size == 0:
        return array
    array = np.array(array)
    places = rng.permutation(array.size)[: len(SPECIAL)]
    array.flat[places] = np.resize(SPECIAL, len(places))
    return array


def _compare(result: Checked, original, samples, exact: bool, extra_tolerance: float, finite_only: bool) -> None:
    specs = original.structured_input_signature
    new = executable.to_concrete(result.graph, specs, pack=list)
    wide = None
    if not exact:
        wide_graph = float64.to_float64(result.before)
        with contextlib.suppress(ValueError):  # an op without a float64 kernel: the original stands for the exact
            wide = executable.to_concrete(wide_graph, float64.widened(specs), pack=list)
    names = list(result.before.inputs.values())
    for number, sample in enumerate(samples):
        tensors = [tf.convert_to_tensor(np.asarray(a), v.dtype) for a, v in zip(sample, names)]
        old_results = [t.numpy() for t in tf.nest.flatten(original(*tensors))]
        new_results = [t.numpy() for t in new(*tensors)]
        wide_results: Sequence[np.ndarray | None] = [None] * len(old_results)
        if not exact:
            wide_results = old_results  # unless float64 is to be had
        if wide is not None:
            with contextlib.suppress(tf.errors.OpError):
                widened = (tf.cast(t, tf.float64) if t.dtype == tf.float32 else t for t in tensors)
                wide_results = [t.numpy() for t in wide(*widened)]
        for a, b, w in zip(old_results, new_results, wide_results, strict=True):
            _assert_close(a, b, w, extra_tolerance + (1e-6 if w is a else 0.0), finite_only, f"sample {number}")


def _assert_close(old, new, wide, extra_tolerance: float, finite_only: bool, where: str) -> None:
    assert old.shape == new.shape and old.dtype == new.dtype, f"{where}: {new.dtype}{new.shape}"
    if old.dtype.kind != "f":
        np.testing.assert_array_equal(new, old, err_msg=where)
        return
    if wide is None:  # the very same bits; the payload of a NaN is of no account
        np.testing.assert_array_equal(np.isnan(new), np.isnan(old), err_msg=where)
        number = ~np.isnan(old)
        bits = f"u{old.dtype.itemsize}"
        np.testing.assert_array_equal(new[number].view(bits), old[number].view(bits), err_msg=where)
        return
    if not finite_only:
        np.testing.assert_array_equal(np.isnan(new), np.isnan(old), err_msg=f"{where}: NaN")
        infinite = np.isinf(old) | np.isinf(new)
        np.testing.assert_array_equal(new[infinite], old[infinite], err_msg=f"{where}: infinities")
    usable = np.isfinite(old) & np.isfinite(wide) & (np.isfinite(new) if not finite_only else True)
    # Numbers beside huge ones are judged with their like: the tolerance is that of the largest result of the row.
    old64, new64, wide64 = (a[usable].astype(np.float64) for a in (old, new, wide))
    if not old64.size:
        return
    scale = np.max(np.abs(old64))
    own = np.max(np.abs(old64 - wide64))
    tolerance = verify.ROUNDING * own + verify.FLOOR * EPSILON * max(scale, 1e-30) + extra_tolerance * scale
    error = np.max(np.abs(new64 - wide64))
    assert error <= tolerance, f"{where}: off by {error:.3g}, allowed {tolerance:.3g}"
