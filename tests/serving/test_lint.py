"""Lint: each problem is found, named, and fixed where that is safe; a good model has none."""

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
import tensorflow as tf

from tfvllm.errors import InputError
from tfvllm.savedmodel import protos, warmup, write
from tfvllm.serving import served_ops
from tfvllm.serving.lint import lint


@pytest.fixture
def good(text_export):
    return text_export


@pytest.fixture
def copy(good, tmp_path):
    return shutil.copytree(good, tmp_path / "1")


def save(path, function, *specs, **options):
    module = tf.Module()
    path.mkdir(parents=True)
    write.save(module, {"serving_default": tf.function(function, **options).get_concrete_function(*specs)}, path)
    return path


FLOATS = tf.TensorSpec([None, 2], tf.float32, name="x")


def test_a_good_export_has_no_finding(good):
    report = lint(good)
    assert report.findings == []
    assert report.ok
    assert report.target == "portable"
    assert lint(good.parent).findings == []  # by its base folder too


def edit(path, change):
    proto = protos.read_proto(path)
    change(proto.meta_graphs[0])
    protos.write_proto(path, proto)


def test_custom_op_is_named_with_its_place(copy):
    changed = []

    def change(graph):
        functions = graph.graph_def.library.function
        changed.extend((f.signature.name, node) for f in functions for node in f.node_def if node.op == "Softmax")
        changed[0][1].op = "MySpecialOp"

    edit(copy, change)
    finding = lint(copy).findings[0]
    assert (finding.code, finding.severity) == ("custom-op", "error")
    assert "MySpecialOp (1x)" in finding.what
    assert f"Softmax in {changed[0][0]}" in finding.where


def test_newer_op(tmp_path):
    path = save(tmp_path / "1", lambda x: {"y": x}, FLOATS)

    def change(graph):
        node = graph.graph_def.node.add(name="decode", op="DecodeWebP")
        node.attr["dtype"].type = tf.uint8.as_datatype_enum

    edit(path, change)
    assert "newer-op" not in lint(path, run=False, serving_version="2.20").codes()
    report = lint(path, run=False, serving_version="2.19.1")
    assert report.serving_version == "2.19"
    assert report.codes()[0] == "newer-op"
    assert "came with TensorFlow 2.20" in report.findings[0].what


@pytest.mark.parametrize("internal", ["_FusedMatMul", "_QuantizedMatMul"])
def test_internal_ops_mean_target_onednn(tmp_path, internal):
    path = save(tmp_path / "1", lambda x: {"y": tf.matmul(x, [[1.0], [2.0]])}, FLOATS)

    def change(graph):
        function = next(f for f in graph.graph_def.library.function if any(n.op == "MatMul" for n in f.node_def))
        next(node for node in function.node_def if node.op == "MatMul").op = internal

    edit(path, change)
    report = lint(path, run=False)
    assert report.target == "onednn"
    assert "onednn-ops" in report.codes()
    assert ("int8-products" in report.codes()) == (internal == "_QuantizedMatMul")
    assert report.ok  # warnings: it depends on the server's build and CPU


def test_python_op(tmp_path):
    def function(x):
        return {"y": tf.numpy_function(lambda a: a + 1, [x], tf.float32)}

    report = lint(save(tmp_path / "1", function, FLOATS), run=False)
    assert report.codes()[0] == "python-op"
    assert not report.ok


def test_xla_is_found_and_fixed(tmp_path):
    @tf.function(jit_compile=True)
    def compiled(x):
        return x * 2.0

    path = save(tmp_path / "1", lambda x: {"y": compiled(x)}, FLOATS)
    report = lint(path, run=False)
    assert report.codes()[0] == "xla"
    assert not report.ok
    fixed = lint(path, fix=True)
    assert any(line.startswith("xla") for line in fixed.fixed)
    assert "xla" not in fixed.codes()
    model = tf.saved_model.load(str(path))
    np.testing.assert_array_equal(model.signatures["serving_default"](x=tf.ones([1, 2]))["y"], [[2.0, 2.0]])


def test_method_name_is_found_and_fixed(copy):
    edit(copy, lambda graph: setattr(graph.signature_def["classify"], "method_name", "tensorflow/serving/predict"))
    finding = lint(copy, run=False).findings[0]
    assert (finding.code, finding.where, finding.fixable) == ("method-name", "signature classify", True)
    assert lint(copy, fix=True).fixed == ["method-name: signature classify is tensorflow/serving/classify now"]
    assert lint(copy).findings == []


def test_method_that_does_not_fit(copy):
    edit(
        copy,
        lambda graph: setattr(graph.signature_def["serving_default"], "method_name", "tensorflow/serving/classify"),
    )
    assert lint(copy, run=False).codes() == ["method-shape"]


def test_shapes_that_defeat_batching(tmp_path):
    specs = (tf.TensorSpec([4], tf.float32, name="fixed"), tf.TensorSpec([], tf.float32, name="scalar"))
    report = lint(save(tmp_path / "1", lambda fixed, scalar: {"y": fixed * scalar}, *specs), run=False)
    assert [(f.code, f.where) for f in report.findings if f.code in ("fixed-batch", "scalar")] == [
        ("fixed-batch", "signature serving_default, input fixed"),
        ("fixed-batch", "signature serving_default, output y"),
        ("scalar", "signature serving_default, input scalar"),
    ]


def test_float64(tmp_path):
    path = save(tmp_path / "1", lambda x: {"y": tf.cast(x, tf.float64) * 2.0 + 1.0}, FLOATS)
    finding = next(f for f in lint(path, run=False).findings if f.code == "float64")
    assert finding.what.startswith("2 op(s) compute in float64")


@pytest.mark.thorough
def test_large_constants(tmp_path):
    weights = np.random.rand(2, 10_000_000).astype(np.float32)
    report = lint(save(tmp_path / "1", lambda x: {"y": tf.matmul(x, weights)}, FLOATS), run=False)
    assert "constants" in report.codes()


def test_missing_warmup_is_fixed_and_broken_warmup_found(copy):
    warmup.path(copy).unlink()
    assert lint(copy).codes() == ["no-warmup"]
    report = lint(copy, fix=True)
    assert report.fixed == ["no-warmup: 2 requests written and replayed"]
    assert report.findings == []
    bad = {"signature_name": "nope", "inputs": {"x": np.ones(1, np.float32)}}
    warmup.write(copy, [bad], replay_them=False)
    report = lint(copy)
    assert report.codes() == ["broken-warmup"]
    assert not report.ok
    assert lint(copy, run=False).ok  # not seen without running it


def test_missing_files(copy):
    (copy / "variables" / "variables.index").unlink()
    report = lint(copy)
    assert report.codes() == ["no-variables"]
    assert not report.ok


def test_version_folder(good, tmp_path):
    path = shutil.copytree(good, tmp_path / "latest")
    assert lint(path, run=False).codes() == ["version-folder"]


def test_no_signature_and_no_tag(copy):
    def change(graph):
        for name in list(graph.signature_def):
            del graph.signature_def[name]
        del graph.meta_info_def.tags[:]

    edit(copy, change)
    report = lint(copy, run=False)
    assert sorted(report.codes()) == ["no-serve-tag", "no-signature"]


def test_wrong_calls(tmp_path, good):
    with pytest.raises(InputError, match="no folder"):
        lint(tmp_path / "no")
    with pytest.raises(InputError, match="no version folder"):
        lint(tmp_path)
    with pytest.raises(InputError, match=r"no op list for TF Serving 1\.15; known are 2\.18, 2\.19, 2\.20, 2\.21"):
        lint(good, serving_version="1.15")
    (tmp_path / "saved_model.pb").write_bytes(b"no proto")
    with pytest.raises(InputError, match="is no SavedModel"):
        lint(tmp_path)


@pytest.mark.thorough
def test_allow_list_is_what_this_tensorflow_registers():
    """The shipped list of the installed version against the libraries themselves, in a process of its own."""
    script = "import json, tfvllm.serving.served_ops as ops; print(json.dumps(ops.registered()))"
    output = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    found = json.loads(output.splitlines()[-1])
    version = ".".join(found["version"].split(".")[:2])
    if version not in served_ops.versions():
        pytest.skip(f"no list for TensorFlow {version}")
    served = served_ops.served(version)
    assert set(found["core"]) - served == set()
    assert set(found["text"]) - served == set()
    assert "MatMul" in served
    assert "DecodeJxl" in served_ops.served("2.21")
    assert "DecodeJxl" not in served_ops.served("2.20")
    assert "SimpleMLInferenceOpWithHandle" in served


def test_command_line(copy):
    from click.testing import CliRunner

    from tfvllm.cli.lint import command

    def change(graph):
        graph.graph_def.node.add(name="odd", op="NoSuchOp")

    edit(copy, change)
    result = CliRunner().invoke(command, [str(copy), "--static", "--json"], standalone_mode=False)
    assert result.return_value == 1
    document = json.loads(result.stdout)
    assert document["ok"] is False
    assert document["findings"][0]["code"] == "custom-op"
    result = CliRunner().invoke(command, [str(copy), "--static"], standalone_mode=False)
    assert "would NOT serve this; target portable, 1 error, 0 warnings, 0 notes" in result.stdout
