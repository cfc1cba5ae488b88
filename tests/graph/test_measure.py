"""Measured gating: a rule is kept only if the graph is faster with it."""

import numpy as np
import pytest
import tensorflow as tf

import tfvllm
from tests.rules.checks import f32, weight
from tfvllm import timing
from tfvllm.graph.builder import Skip
from tfvllm.graph.guarantee import Exact
from tfvllm.graph.pattern import op
from tfvllm.graph.rewriter import Rule


class SlowRelu(Rule):
    """relu(x) -> max of 300 copies of relu(x).   Right, and of no use."""

    guarantee = Exact()

    def pattern(self, x):
        return op.Relu(x, name="out")

    def condition(self, graph, m):
        if any(r.op == "Tile" for r in graph.uses(m.out)):
            raise Skip("done")

    def replacement(self, b, m):
        copies = b.Tile(b.Relu(m.x), b.ints(300, 1))
        wide = b.Reshape(copies, b.op("ConcatV2", [b.ints(300), b.Shape(m.x, out_type=tf.int32), b.const(0)])[0])
        return b.Max(wide, b.const(0))


def _function():
    w, u = weight(16, 16), weight(16, 16, seed=1)

    @tf.function(input_signature=[f32(None, 16)])
    def call(x):
        return tf.nn.relu(x @ w) - (-tf.tanh(x @ u))

    return call


X = np.random.default_rng(0).normal(size=(32, 16)).astype(np.float32)


def test_a_rule_that_costs_time_is_dropped_and_said_so(tmp_path):
    call = _function()
    fast = tfvllm.simplify(call, rules=[*_rules(), SlowRelu()], measure=True, inputs=(X,))
    (found,) = [m for m in fast.report.main.measured if m["rule"] == "SlowRelu"]
    assert not found["kept"] and found["finding"] == "faster without it"
    assert found["with_ms"] > found["without_ms"] > 0
    assert "SlowRelu" in fast.report.dropped and "SlowRelu" not in fast.report.rules
    assert "Tile" not in fast.report.after["ops"]
    np.testing.assert_allclose(fast(X), call(X), atol=1e-6)
    fast.report.to_html(tmp_path / "r.html")
    assert "faster without it: dropped" in (tmp_path / "r.html").read_text()


def test_without_measure_nothing_is_timed(monkeypatch):
    monkeypatch.setattr(timing, "duel", lambda *a, **k: pytest.fail("timed"))
    report = tfvllm.simplify(_function(), rules=[*_rules(), SlowRelu()]).report
    assert report.rules["SlowRelu"] == 1 and not report.main.measured


def _rules():
    return ["clean", "Signs", "MergeParallelMatMuls", "weights"]


@pytest.mark.parametrize(
    "ratio, dropped",
    [(1.5, []), (1.001, []), (0.999, []), (0.5, ["Signs", "MergeParallelMatMuls"])],
)
def test_what_the_times_decide(monkeypatch, ratio, dropped):
    """Within the noise the counted cost decides: neither rule adds nodes. Clean-ups are never judged."""
    monkeypatch.setattr(timing, "duel", lambda first, second: timing.Duel(1.0, ratio, ratio, 0.01))
    fast = tfvllm.simplify(_function(), rules=_rules(), measure=True)
    assert {m["rule"] for m in fast.report.main.measured} == {"Signs", "MergeParallelMatMuls"}
    assert sorted(fast.report.dropped) == sorted(dropped)
    assert ("Neg" in fast.report.after["ops"]) == bool(dropped)
    assert fast.report.after["ops"]["MatMul"] == (2 if dropped else 1)


def test_within_the_noise_a_rule_that_adds_nodes_for_nothing_goes(monkeypatch):
    monkeypatch.setattr(timing, "duel", lambda first, second: timing.Duel(1.0, 1.001, 1.001, 0.01))
    report = tfvllm.simplify(_function(), rules=[*_rules(), SlowRelu()], measure=True).report
    assert report.dropped == ["SlowRelu"]


def test_a_rule_is_judged_once_for_all_signatures(monkeypatch, tmp_path):
    asked = []

    def duel(first, second):
        asked.append(len(first))
        return timing.Duel(2.0, 1.0, 0.5, 0.01)

    monkeypatch.setattr(timing, "duel", duel)
    module = tf.Module()
    module.w = weight(8, 8)

    @tf.function(input_signature=[f32(None, 8)])
    def one(x):
        return {"y": x - (-(x @ module.w))}

    @tf.function(input_signature=[f32(None, 8)])
    def two(x):
        return {"y": tf.tanh(x) - (-(x @ module.w))}

    tf.saved_model.save(module, str(tmp_path / "a"), signatures={"serving_default": one, "two": two})
    rules = ["clean", "Signs"]
    report = tfvllm.simplify_saved_model(tmp_path / "a", tmp_path / "b", rules=rules, measure=True)
    assert report.dropped == ["Signs"] and len(asked) == 1
    assert all("Neg" in s.after["ops"] for s in report.signatures.values())
    manifest = (tmp_path / "b" / "assets.extra" / "tfvllm.json").read_text()
    assert "--rules -Signs" in manifest


def test_duel_takes_turns():
    order = []
    result = timing.duel([lambda: order.append("a")], [lambda: order.append("b")], seconds=0.0)
    assert order[:8] == list("baabbaab") and order.count("a") == order.count("b") == 9
    assert result.noise >= 0.01 and result.first_ms > 0
    assert timing.Duel(1, 2, 2.0, 0.1).winner == "first" and timing.Duel(2, 1, 0.5, 0.1).winner == "second"
    assert timing.Duel(1, 1, 1.05, 0.1).winner is None
