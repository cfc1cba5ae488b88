"""The public doors: models and functions in, callables out; verification, bisection, reports."""

import json

import numpy as np
import pytest
import tensorflow as tf

import tfvllm
from tests.graph.conftest import bert_inputs, run_saved
from tfvllm.errors import InputError, VerificationError
from tfvllm.graph.guarantee import Exact
from tfvllm.graph.pattern import op
from tfvllm.graph.rewriter import Pass, Rule


class WrongTanh(Rule):
    """tanh(x) -> sigmoid(x).   Deliberately wrong."""

    guarantee = Exact()

    def pattern(self, x):
        return op.Tanh(x)

    def replacement(self, b, m):
        return b.Sigmoid(m.x)


class WrongOutput(Pass):
    """y -> y + 1 for every result, again after each rollback.   Deliberately wrong in a way no rollback mends."""

    guarantee = Exact()

    def run(self, rewriter):
        graph = rewriter.graph
        for key, value in graph.outputs.items():
            if not value.node.name.startswith("wrong"):
                one = graph.add("one", "Const", [], {"dtype": value.dtype, "value": np.float32(1)})
                graph.outputs[key] = graph.add("wrong", "AddV2", [value, one.output]).output
        return False


@pytest.mark.parametrize("target", ["portable", "onednn"])
def test_keras_model(bert, target):
    fast = tfvllm.simplify(bert, target=target)
    for batch, length in ((1, 16), (3, 7), (2, 1), (5, 33)):
        inputs = bert_inputs(batch, length)
        want = bert(inputs, training=False).numpy()
        np.testing.assert_allclose(fast(inputs).numpy(), want, atol=2e-6)
    report = tfvllm.simplify(
        bert, target=target, rules=["-PackTokens", "-TrimPadding", "-AbsorbKeyValueProjections"]
    ).report  # which save work with more nodes
    assert report.after["nodes"] < (0.6 if target == "onednn" else 0.8) * report.before["nodes"]
    assert report.after["parameters"] == report.before["parameters"] == bert.count_params()
    assert report.verification["ok"] and report.verification["reference"] == "float64"
    internal = [o for o in report.after["ops"] if o.startswith("_")]
    assert bool(internal) == (target == "onednn")


@pytest.mark.parametrize("target", ["portable", "onednn"])
def test_bfloat16(bert, target):
    fast = tfvllm.simplify(bert, target=target, precision="bfloat16")
    inputs = bert_inputs(5, 11)
    want, got = bert(inputs, training=False).numpy(), fast(inputs).numpy()
    assert got.dtype == np.float32
    error = np.abs(got - want).max() / np.abs(want).max()
    assert 1e-5 < error < 0.03, "rounded to 8 bits, no more and no less"
    assert fast.report.verification["max_rel_error"] < 0.05
    assert fast.report.after["bytes"] < 0.65 * fast.report.before["bytes"]  # all but the embeddings halve
    assert fast.report.after["ops"]["Cast"] < (20 if target == "onednn" else 40)


def test_counts_for_one_bert_layer_are_what_they_should_be(bert):
    report = tfvllm.simplify(bert, target="onednn", rules=["-PackTokens", "-AttentionWithoutOneDnn"]).report
    # 2 layers: Q/K/V merged in the first; in the last, Q alone (for position 0 only), and K and V after it, by heads;
    # output, 2 feed-forward products each; pooler and head.
    assert report.after["ops"]["_FusedMatMul"] == 4 + 4 + 2
    assert report.after["ops"]["_MklLayerNorm"] == 5
    assert report.after["ops"]["BatchMatMulV2"] == 4
    for gone in ("Einsum", "BiasAdd", "MatMul", "Mean", "Rsqrt", "Pow", "StopGradient", "Identity", "BroadcastTo"):
        assert gone not in report.after["ops"], gone
    assert report.after["flops"] < 0.6 * report.before["flops"], "the last layer works on position 0 only"
    assert [report.rules[name] for name in ("MergeParallelMatMuls", "HoistSlices", "AbsorbKeyValueProjections")] == [
        1,
        1,
        1,
    ]


def test_fully_masked_rows_and_edge_ids(bert):
    fast = tfvllm.simplify(bert, target="onednn")
    inputs = bert_inputs(2, 5)
    inputs["padding_mask"][1] = 0
    inputs["token_ids"][0] = [0, 49, 0, 49, 0]
    np.testing.assert_allclose(fast(inputs).numpy(), bert(inputs, training=False).numpy(), atol=2e-6)


def test_functions_and_structures():
    weight = tf.Variable(np.arange(12, dtype=np.float32).reshape(3, 4))

    @tf.function(input_signature=[{"a": tf.TensorSpec([None, 3])}, tf.TensorSpec([])])
    def call(inputs, scale):
        y = tf.matmul(inputs["a"], weight)
        return {"y": (y * scale, tf.identity(y)), "n": tf.shape(y)[0]}

    fast = tfvllm.simplify(call)
    x = np.ones((2, 3), np.float32)
    got = fast({"a": x}, 2.0)
    np.testing.assert_array_equal(got["y"][0], 2 * x @ weight.numpy())
    np.testing.assert_array_equal(got["y"][1], x @ weight.numpy())
    assert int(got["n"]) == 2
    again = tfvllm.simplify(call.get_concrete_function())
    np.testing.assert_array_equal(again({"a": x}, 2.0)["y"][0], got["y"][0])
    with pytest.raises(InputError, match="scale is missing; the arguments are inputs"):
        fast(x)
    with pytest.raises(InputError, match="no input signature"):
        tfvllm.simplify(tf.function(lambda x: x))
    with pytest.raises(InputError, match="expected a built Keras model"):
        tfvllm.simplify(3)


def test_nothing_to_merge_is_said():
    @tf.function(input_signature=[tf.TensorSpec([None, 3])])
    def call(x):
        return tf.nn.relu(x)

    report = tfvllm.simplify(call).report
    assert report.rules == {"DropIdentities": report.rules["DropIdentities"]} if report.rules else True
    assert report.after["ops"] == {"Relu": 1}


def test_a_wrong_rule_is_found_rolled_back_and_named(bert):
    fast = tfvllm.simplify(bert, rules=["clean", WrongTanh()])
    rolled = fast.report.main.rolled_back
    assert {r["rule"] for r in rolled} == {"WrongTanh"} and len(rolled) == 3
    inputs = bert_inputs()
    np.testing.assert_allclose(fast(inputs).numpy(), bert(inputs, training=False).numpy(), atol=2e-6)


def test_what_cannot_be_rolled_back_writes_nothing(bert_saved, tmp_path):
    with pytest.raises(VerificationError, match="Nothing was written") as caught:
        tfvllm.simplify_saved_model(bert_saved, tmp_path / "out", rules=["clean", WrongOutput()])
    assert caught.value.exit_code == 3
    assert not (tmp_path / "out").exists() and not list(tmp_path.iterdir())


@pytest.mark.thorough
def test_rules_can_be_chosen_and_left_out(bert):
    report = tfvllm.simplify(bert, target="onednn", rules=["-HoistSlices", "-fuse"]).report
    assert "HoistSlices" not in report.rules and "_FusedMatMul" not in report.after["ops"]
    assert "_MklLayerNorm" in report.after["ops"]
    with pytest.raises(InputError, match="Did you mean 'HoistSlices'"):
        tfvllm.simplify(bert, rules=["HoistSlice"])
    for option in ({"target": "gpu"}, {"precision": "float16"}):
        with pytest.raises(InputError, match="expected one of"):
            tfvllm.simplify(bert, **option)


def test_saved_model_to_saved_model(bert_saved, tmp_path):
    report = tfvllm.simplify_saved_model(bert_saved, tmp_path / "fast", target="onednn")
    assert set(report.signatures) == {"serve", "serving_default"}
    inputs = bert_inputs()
    want, got = run_saved(bert_saved, inputs), run_saved(tmp_path / "fast", inputs)
    np.testing.assert_allclose(got["output_0"], want["output_0"], atol=2e-6)
    with pytest.raises(InputError, match="already exists"):
        tfvllm.simplify_saved_model(bert_saved, tmp_path / "fast")
    manifest = json.loads((tmp_path / "fast" / "assets.extra" / "tfvllm.json").read_text())
    assert manifest["steps"][-1]["step"] == "simplify" and manifest["target"] == "onednn"
    stored = tf.train.list_variables(str(tmp_path / "fast" / "variables" / "variables"))
    total = sum(int(np.prod(shape)) for name, shape in stored if "VARIABLE_VALUE" in name)
    assert total == report.after["parameters"], "two signatures share one copy of every weight"


@pytest.mark.thorough
def test_calibration_inputs_are_used(bert_saved, tmp_path):
    rows = [bert_inputs(2, 4), bert_inputs(1, 8)]
    report = tfvllm.simplify_saved_model(bert_saved, tmp_path / "fast", calibration=rows)
    assert report.verification["samples"] == 2
    with pytest.raises(InputError, match="expected the inputs padding_mask, segment_ids, token_ids"):
        tfvllm.simplify_saved_model(bert_saved, tmp_path / "other", calibration=[{"x": [1]}])


def test_reports(bert, tmp_path):
    report = tfvllm.simplify(bert, target="onednn").report
    report.to_mermaid(tmp_path / "g.mmd")
    report.to_html(tmp_path / "r.html")
    report.to_json(tmp_path / "r.json")
    diagram = (tmp_path / "g.mmd").read_text()
    assert diagram.startswith("flowchart LR") and "subgraph before" in diagram and "subgraph after" in diagram
    assert "transformer_layer_0" in diagram
    page = (tmp_path / "r.html").read_text()
    assert "FuseLayerNorm" in page and "http://" not in page.split("<main>")[1].split("</main>")[0]
    parsed = json.loads((tmp_path / "r.json").read_text())
    assert parsed["rules"]["FuseLayerNorm"] == 5 and parsed["verification"]["ok"]


def test_inspect_names_near_misses(bert_saved):
    found = tfvllm.inspect_saved_model(bert_saved)["signatures"]["serving_default"]
    assert found["inputs"]["token_ids"] == {"dtype": "int32", "shape": [None, None]}
    assert found["would_merge"]["MergeParallelMatMuls"] == 1
    assert found["parameters"] == found["after"]["parameters"]
    assert all(d["reason"] and d["where"] for d in found["declined"])
