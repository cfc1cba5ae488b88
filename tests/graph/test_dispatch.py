"""Dispatch by shape. What is decided from times is tested with made-up times: the same on every machine."""

import io
import json
import math

import numpy as np
import pytest
import tensorflow as tf

import tfvllm
from tests.rules.checks import weight
from tests.rules.test_pack_tokens import SPECS, batch, first
from tests.tiny_models import TEXTS, keras_scores
from tfvllm import timing
from tfvllm.cli import main
from tfvllm.errors import InputError
from tfvllm.graph import executable, importer
from tfvllm.simplifier.dispatch import branch, decision_tree, driver, requests, variants
from tfvllm.simplifier.dispatch.decision_tree import Leaf, Split
from tfvllm.simplifier.dispatch.measure import Point
from tfvllm.simplifier.dispatch.requests import RequestShape
from tfvllm.simplifier.dispatch.variants import Variant

# ------------------------------------------------------------------------------------------------------------- reading


def test_every_form_of_a_line(tmp_path):
    path = tmp_path / "requests.jsonl"
    path.write_text(
        '{"batch": 8, "length": 37, "count": 120}\n\n{"lengths": [12, 37, 9]}\n{"lengths": [3, 4], "length": 8}\n'
        '{"batch": 4}\n{"inputs": {"text": ["a", "b"]}, "count": 2}\n{"text": ["a"]}\n'
    )
    assert requests.read(path) == [
        RequestShape(8, 37, None, 120.0),
        RequestShape(3, 37, (12, 37, 9)),
        RequestShape(2, 8, (3, 4)),
        RequestShape(4),
        RequestShape(2, count=2.0, inputs={"text": ["a", "b"]}),
        RequestShape(1, inputs={"text": ["a"]}),
    ]
    assert requests.read([{"batch": 1, "length": 2}]) == [RequestShape(1, 2)]


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "found none"),
        ("{", "line 1: expected one JSON object"),
        ("[1]", "line 1: expected one JSON object"),
        ('{"batch": 1}\n{"batch": 0}', "line 2: batch and length: expected whole numbers above 0, found 0"),
        ('{"batch": 1, "length": true}', "found 1 and True"),
        ('{"batch": 1, "size": 3}', "found 'size'"),
        ('{"batch": 1, "count": -1}', "count: expected a number above 0"),
        ('{"batch": 1, "count": NaN}', "count: expected a number above 0"),
        ('{"length": 5}', "expected batch"),
        ('{"lengths": []}', "lengths: expected a list of whole numbers"),
        ('{"lengths": [3], "batch": 2}', "expected batch 1"),
        ('{"lengths": [3, 9], "length": 8}', "a length of 9 or more"),
        ('{"batch": 4194304, "length": 2}', "expected at most 4194304 tokens"),
    ],
)
def test_a_line_that_is_none_of_them(tmp_path, text, message):
    path = tmp_path / "requests.jsonl"
    path.write_text(text)
    with pytest.raises(InputError, match=r"requests\.jsonl") as caught:
        requests.read(path)
    assert message in str(caught.value)


def test_a_long_profile_is_summed_up():
    rng = np.random.default_rng(0)
    many = [RequestShape(int(2 ** rng.integers(0, 6)), int(n)) for n in rng.integers(3, 500, 3000)]
    few = requests.cluster(many)
    assert 4 <= len(few) <= requests.MAX_KINDS
    assert sum(k.count for k in few) == 3000
    assert {k.batch for k in few} & {1, 2} and {k.batch for k in few} & {16, 32}
    two = requests.cluster(
        [RequestShape(1, 5), RequestShape(1, 5, count=3), RequestShape(4, 8, (8, 1, 1, 1)), RequestShape(4, 8)]
    )
    assert [(k.batch, k.length, k.lengths, k.count) for k in two] == [
        *[(1, 5, None, 4.0), (4, 8, (8, 1, 1, 1), 1.0), (4, 8, None, 1.0)]
    ]


# ------------------------------------------------------------------------------------------------------------ deciding


def way(name, bytes_of_weights=0):
    x = tf.Variable(tf.zeros([bytes_of_weights // 4]))
    call = tf.function(lambda v: v + tf.reduce_sum(x), input_signature=[tf.TensorSpec([None])])
    return Variant(name, importer.from_concrete(call.get_concrete_function()))


def point(batch, length, count=1.0, **ms):
    found = Point(RequestShape(batch, length, count=count), batch, length, batch * length, [])
    found.rounds = {name: times if isinstance(times, list) else [times] * 9 for name, times in ms.items()}
    return found


def test_a_way_that_is_best_everywhere_is_taken_alone():
    points = [point(1, 16, a=1.0, b=2.0), point(8, 128, a=50.0, b=60.0)]
    assert decision_tree.decide([way("a"), way("b")], points, math.inf) == Leaf("a")


def test_the_threshold_lies_between_the_shapes_that_differ():
    points = [point(1, 16, a=1.0, b=2.0), point(2, 16, a=2.0, b=3.0), point(8, 128, a=90.0, b=60.0)]
    tree = decision_tree.decide([way("a"), way("b")], points, math.inf)
    assert isinstance(tree, Split) and 32 < tree.threshold <= 1024
    assert [decision_tree.chosen(tree, p) for p in points] == ["a", "a", "b"]
    assert decision_tree.lines(tree) == ["batch × length < 181: a", "batch × length ≥ 181: b"]


def test_batch_and_length_count_apart_where_their_product_does_not_tell():
    points = [point(1, 64, a=1.0, b=2.0), point(64, 1, a=2.0, b=1.0), point(8, 8, a=1.0, b=2.0)]
    tree = decision_tree.decide([way("a"), way("b")], points, math.inf)
    assert [decision_tree.chosen(tree, p) for p in points] == ["a", "b", "a"]


def test_what_lies_within_the_noise_makes_no_branch():
    noisy = [1.0, 0.5, 1.6, 0.7, 1.4, 0.9, 1.2]
    points = [point(1, 16, a=[1.0] * 7, b=noisy), point(8, 128, a=[9.0] * 7, b=[9.05] * 7)]
    ratio, noise = points[0].ratio("b", "a")
    assert (ratio, points[0].relative("b", "a")) == (1.0, 1.0) and noise > 0.3
    points = [point(1, 16, a=1.0, b=0.98), point(8, 128, a=9.0, b=9.5)]  # certain, and too little to pay
    assert decision_tree.decide([way("a"), way("b")], points, math.inf) == Leaf("a")


def test_weights_of_its_own_must_pay_and_fit():
    a, b = way("a", 4000), way("b", 2000)
    points = [point(1, 16, a=1.0, b=0.95), point(8, 128, a=50.0, b=60.0)]
    assert decision_tree.decide([a, b], points, math.inf) == Leaf("a")  # 5 % is worth a branch, not another copy
    points = [point(1, 16, a=1.0, b=0.8), point(8, 128, a=50.0, b=70.0)]
    assert isinstance(decision_tree.decide([a, b], points, 6000), Split)
    assert decision_tree.decide([a, b], points, 5999) == Leaf("a")
    assert variants.bytes_of([a, b, a]) == 6000


def test_taking_turns_measures_everyone_as_often():
    calls = {"a": 0, "b": 0, "c": 0}

    def call(name):
        calls[name] += 1

    times = timing.take_turns({n: lambda n=n: call(n) for n in calls}, 50, 0.0, warm=2)
    assert calls == {"a": 9, "b": 9, "c": 9} and {len(t) for t in times.values()} == {7}


# ------------------------------------------------------------------------------------------------------------ building

PROFILE = [{"batch": 1, "length": 4, "count": 3}, {"batch": 4, "length": 8}, {"lengths": [9, 2, 3, 5, 1, 1, 7, 8]}]
TREE = Split("batch × length", 20, Leaf("padded, public ops"), Leaf("packed, public ops"))


def test_the_branch_is_chosen_by_shape():
    """Ways that do not compute the same show which of them ran."""
    x = tf.Variable(3.0)

    def graph(f):
        call = tf.function(lambda v: f(tf.sqrt(v) * x), input_signature=[tf.TensorSpec([None, None], name="v")])
        return importer.from_concrete(call.get_concrete_function())

    original = graph(lambda v: v + 1.0)
    ways = []
    for number, op in enumerate(["Neg", "Exp", "Square"]):
        way_graph = original.copy()
        last = next(n for n in way_graph.live() if n.op == "AddV2")
        new = way_graph.add(f"way{number}", op, [last.inputs[0]])
        new.output.shape = last.output.shape
        way_graph.replace(last.output, new.output)
        ways.append(Variant(op, way_graph))
    merged = branch.VariantMerger([*ways, Variant("the original", original)])
    tree = Split(
        "batch",
        3,
        Split("length", 5, Leaf("Neg"), Leaf("Exp")),
        Split("batch × length", 40, Leaf("Square"), Leaf("Neg")),
    )
    built = merged.build(tree)
    built.check()
    assert [n.op for n in built.live()].count("Sqrt") == 1  # what all compute alike stands before the branch
    run = executable.to_concrete(built, ((tf.TensorSpec([None, None], tf.float32),), {}), pack=list)
    for (b, n), f in {
        (2, 4): np.negative,
        (2, 5): np.exp,
        (3, 13): np.square,
        (3, 14): np.negative,
        (0, 4): np.negative,
    }.items():
        v = np.random.default_rng(0).uniform(0, 1, (b, n)).astype(np.float32)
        np.testing.assert_allclose(run(tf.constant(v))[0], f(np.sqrt(v) * 3.0), rtol=1e-5)
    x.assign(2.0)  # the branches read the variable itself
    np.testing.assert_allclose(run(tf.ones([1, 1]))[0], [[-2.0]])


@pytest.fixture(scope="module")
def encoder():
    return tf.function(lambda ids, mask: first(ids, mask), input_signature=SPECS)


def test_packed_or_padded(encoder, clock, tmp_path):
    fast = tfvllm.simplify(encoder, profile=PROFILE)
    found = fast.report.main.dispatch
    assert found["pays"] and found["empty_batch"] == "checked" and fast.report.verification["ok"]
    assert {tuple(p) for p in found["checked"]} >= {(1, 4), (0, 4)}
    names = {p["choice"] for p in found["points"]}
    assert names == {"padded, public ops", "packed, public ops"}
    assert found["bytes"] == fast.report.after["bytes"] <= found["limit"] == 2 * fast.report.before["bytes"]
    assert [n.op for n in fast.graph.live()].count("StatelessCase") == 1
    for lengths, n in (([4], 4), ([3, 1], 5), ([8, 2, 1, 0, 5], 8), ([2] * 9, 2), ([9], 9), ([], 3)):
        for left in (False, True):
            ids, mask = batch(lengths, n, left=left)
            ids, mask = tf.constant(ids, tf.int32), tf.constant(mask)
            np.testing.assert_allclose(fast(ids, mask), first(ids, mask), rtol=1e-5, atol=1e-5)
    assert "batch \\u00d7 length" in json.dumps(fast.report.to_dict())
    fast.report.to_html(tmp_path / "report.html")
    assert "Chosen at run time" in (tmp_path / "report.html").read_text()
    from rich.console import Console

    console = Console(file=io.StringIO(), width=200)
    console.print(fast.report.table())
    printed = console.file.getvalue()
    assert "Ways to compute it" in printed and "dispatch: batch × length <" in printed


def test_no_branch_where_it_does_not_pay(encoder, clock):
    fast = tfvllm.simplify(encoder, profile=[{"batch": 1, "length": 4}, {"batch": 2, "length": 4}])
    assert not fast.report.main.dispatch["pays"]
    assert fast.report.main.dispatch["default"] == "padded, public ops"
    assert "Case" not in str([n.op for n in fast.graph.live()])
    assert "dispatch: no branch, padded, public ops always" in "\n".join(
        str(part) for part in fast.report.table().renderables
    )
    ids, mask = (tf.constant(a) for a in batch([3, 1], 5))
    np.testing.assert_allclose(fast(tf.cast(ids, tf.int32), mask), first(ids, mask), rtol=1e-5, atol=1e-5)


def test_one_shape_for_all_requests(clock):
    w = weight(4, 4)
    call = tf.function(lambda x: x @ w, input_signature=[tf.TensorSpec([2, 4])])
    found = tfvllm.simplify(call, profile=[{"batch": 2}]).report.main.dispatch
    assert (found["pays"], found["points"]) == (False, []) and "every request has one shape" in found["reason"]


def test_a_way_with_an_effect_is_no_branch():
    x = tf.Variable(1.0)

    @tf.function(input_signature=[tf.TensorSpec([None])])
    def call(v):
        x.assign_add(1.0)
        return v * x

    original = importer.from_concrete(call.get_concrete_function())
    other = original.copy()
    other.effects[0].name = "renamed"  # effects are the same only if they are the same node
    other.nodes = {n.name: n for n in other.nodes.values()}
    merged = branch.VariantMerger([Variant("other", other), Variant("the original", original)])
    assert "effect of its own" in merged.declined["other"]


@pytest.mark.thorough
@pytest.mark.parametrize("target", ["portable", pytest.param("onednn", marks=pytest.mark.slow)])
def test_text_to_scores(text_export, text_classifier, tmp_path, clock, target):
    """The tokens are counted inside the graph; a process without Python loads it and answers alike."""
    from tests.capi.loader import run

    rows = [{"batch": 1, "length": 5}, {"inputs": {"text": ["good", "a b c d e f g h", "x", "y", "z"]}}, PROFILE[2]]
    report = tfvllm.simplify_saved_model(
        text_export, tmp_path / "1", target=target, signature="serving_default", profile=rows
    )
    found = report.main.dispatch
    assert found["pays"] and found["points"][0]["length"] == 5 and report.verification["ok"]
    manifest = json.loads((tmp_path / "1" / "assets.extra" / "tfvllm.json").read_text())
    assert manifest["steps"][-1]["dispatch"]["decision"] == found["decision"]
    saved = tf.saved_model.load(str(tmp_path / "1")).signatures["serving_default"]
    for texts in (TEXTS, TEXTS[:1], ["good"], ["good"] * 12, [""]):
        wanted = keras_scores(text_classifier, texts)
        np.testing.assert_allclose(saved(tf.constant(texts))["scores"], wanted, atol=1e-5)
    answer = run(tmp_path / "1", "serving_default", {"text": np.array([t.encode() for t in TEXTS], object)})
    np.testing.assert_allclose(answer["scores"], keras_scores(text_classifier, TEXTS), atol=1e-5)
    from tfvllm.serving.lint import lint

    assert lint(tmp_path / "1", run=False).target == target


def test_a_float32_copy_beside_bfloat16(clock, monkeypatch):
    w = weight(64, 64, scale=0.1)
    call = tf.function(lambda x: tf.tanh(x @ w) @ w, input_signature=[tf.TensorSpec([None, 64])])
    tree = Split("batch", 3, Leaf("float32, fused"), Leaf("bfloat16"))
    monkeypatch.setattr(driver, "decide", lambda ways, points, limit: tree)
    monkeypatch.setattr(driver, "best_single", lambda ways, points, limit: "the original")
    fast = tfvllm.simplify(call, target="onednn", precision="bfloat16", profile=[{"batch": 1}, {"batch": 8}])
    assert fast.report.after["bytes"] == 1.5 * fast.report.before["bytes"]
    for rows, exact in ((2, True), (3, False)):
        x = np.random.default_rng(0).normal(size=(rows, 64)).astype(np.float32)
        error = np.abs(fast(x) - call(x)).max()
        assert error < 1e-6 if exact else 1e-5 < error < 0.05


def test_the_command(text_export, tmp_path, capsys):
    def exit_code(arguments):
        with pytest.raises(SystemExit) as caught:
            main(arguments)
        return caught.value.code

    call = ["simplify", str(text_export), str(tmp_path / "1"), "--signature", "serving_default"]
    assert exit_code([*call, "--memory-limit", "2"]) == 2
    assert exit_code([*call, "--profile", str(tmp_path / "none.jsonl")]) == 2
    assert "expected a JSON-lines file of requests" in capsys.readouterr().err
    assert not (tmp_path / "1").exists()
