"""SavedModels and functions to graphs and back; what cannot be read is refused in one line."""

import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import tensorflow as tf

import tfvllm
from tests.graph.conftest import bert_inputs, run_saved
from tfvllm.errors import InputError
from tfvllm.graph import executable, loading


def test_round_trip_keeps_numbers_and_signatures(bert_saved, tmp_path):
    saved = loading.load(bert_saved)
    graph = saved.signatures["serving_default"].graph
    graph.check()
    assert list(graph.inputs) == ["padding_mask", "segment_ids", "token_ids"]
    assert not any("PartitionedCall" in n.op for n in graph.live())
    loading.save(saved.signatures, tmp_path / "copy")
    inputs = bert_inputs()
    want, got = run_saved(bert_saved, inputs), run_saved(tmp_path / "copy", inputs)
    np.testing.assert_array_equal(want["output_0"], got["output_0"])


def test_weights_stay_in_variables(bert, bert_saved, tmp_path):
    saved = loading.load(bert_saved, "serving_default")
    loading.save(saved.signatures, tmp_path / "copy")
    constants = sum(n.attr("value").nbytes for n in saved.signatures["serving_default"].graph.live() if n.op == "Const")
    assert constants < 2_000
    assert (tmp_path / "copy" / "saved_model.pb").stat().st_size < 600_000
    names = tf.train.list_variables(str(tmp_path / "copy" / "variables" / "variables"))
    stored = sum(int(np.prod(shape)) for name, shape in names if "VARIABLE_VALUE" in name)
    assert stored == bert.count_params()


def test_symbolic_sizes_are_followed_through_reshapes(bert_saved):
    graph = loading.load(bert_saved, "serving_default").signatures["serving_default"].graph
    products = [n for n in graph.live() if n.op == "MatMul" and "feedforward" in n.name]
    assert len(products) == 4
    for node in products:
        rows, _ = node.inputs[0].shape
        assert len(rows.terms) == 1 and len(rows.terms[0][0]) == 2, "rows are batch times length"


def test_tables_loops_and_several_signatures(tmp_path):
    class Module(tf.Module):
        def __init__(self):
            super().__init__()
            keys = tf.constant(["a", "b"])
            init = tf.lookup.KeyValueTensorInitializer(keys, tf.constant([1, 2], tf.int64))
            self.table = tf.lookup.StaticHashTable(init, -1)
            self.scale = tf.Variable(3.0)

        @tf.function(input_signature=[tf.TensorSpec([None], tf.string, name="words")])
        def look(self, words):
            return {"ids": self.table.lookup(words)}

        @tf.function(input_signature=[tf.TensorSpec([], tf.int32, name="n"), tf.TensorSpec([None], name="x")])
        def loop(self, n, x):
            for _ in tf.range(n):
                x = x * self.scale + 1.0
            return {"y": x}

    module = Module()
    tf.saved_model.save(module, str(tmp_path / "m"), signatures={"look": module.look, "loop": module.loop})
    saved = loading.load(tmp_path / "m")
    assert set(saved.signatures) == {"look", "loop"}
    loading.save(saved.signatures, tmp_path / "copy")
    words = {"words": np.array(["b", "zz", "好", ""], object)}
    np.testing.assert_array_equal(run_saved(tmp_path / "copy", words, "look")["ids"], [2, -1, -1, -1])
    numbers = {"n": np.int32(3), "x": np.array([1.0, -2.0], np.float32)}
    np.testing.assert_allclose(run_saved(tmp_path / "copy", numbers, "loop")["y"], [40.0, -41.0])


def test_assigned_variables_are_not_frozen(tmp_path):
    class Counter(tf.Module):
        def __init__(self):
            super().__init__()
            self.count = tf.Variable(0.0)
            self.weight = tf.Variable([1.0, 2.0])

        @tf.function(input_signature=[tf.TensorSpec([2], name="x")])
        def step(self, x):
            self.count.assign_add(1.0)
            return {"y": x * self.weight + self.count}

    module = Counter()
    tf.saved_model.save(module, str(tmp_path / "m"), signatures={"step": module.step})
    saved = loading.load(tmp_path / "m")
    graph = saved.signatures["step"].graph
    frozen = {tuple(c.owner.shape): c.frozen for c in graph.captures.values()}
    assert frozen == {(): False, (2,): True}
    loading.save(saved.signatures, tmp_path / "copy")
    function = tf.saved_model.load(str(tmp_path / "copy")).signatures["step"]
    x = tf.constant([1.0, 1.0])
    np.testing.assert_allclose(function(x=x)["y"], [2.0, 3.0])
    np.testing.assert_allclose(function(x=x)["y"], [3.0, 4.0])


def test_bad_inputs_get_one_clear_line(bert_saved, tmp_path):
    with pytest.raises(InputError, match="does not exist"):
        loading.load(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"no saved_model\.pb"):
        loading.load(tmp_path / "empty")
    base = tmp_path / "base"
    (base / "2").mkdir(parents=True)
    with pytest.raises(InputError, match=f"Did you mean {base / '2'}"):
        loading.load(base)
    whole = (bert_saved / "saved_model.pb").read_bytes()
    for name, content in {
        "truncated": whole[: len(whole) // 2],
        "corrupt": b"\xff" * 100,
        "nothing": b"",
    }.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "saved_model.pb").write_bytes(content)
        with pytest.raises(InputError) as caught:
            loading.load(tmp_path / name)
        assert "\n" not in str(caught.value) and "export the model again" in str(caught.value)
    proto = loading.read_proto(bert_saved)
    proto.meta_graphs[0].graph_def.versions.min_consumer = 10**6
    (tmp_path / "future").mkdir()
    (tmp_path / "future" / "saved_model.pb").write_bytes(proto.SerializeToString())
    with pytest.raises(InputError, match="Upgrade TensorFlow"):
        loading.load(tmp_path / "future")
    with pytest.raises(InputError, match="found serve, serving_default"):
        loading.load(bert_saved, "missing")


def test_only_what_the_signatures_need_is_read(bert, bert_saved, tmp_path):
    """A Keras export holds every weight twice; each is read once."""
    saved = loading.load(bert_saved, "serving_default")
    trackables = tf.train.TrackableView(saved.loaded).descendants()
    variables = [v for v in trackables if isinstance(v, tf.Variable)]
    weights = len(bert.trainable_variables)
    assert sum(v.dtype == tf.float32 for v in variables) == 2 * weights
    assert sum(bool(v.is_initialized()) for v in variables) == weights
    data = tmp_path / "short"
    shutil.copytree(bert_saved, data)
    (weights,) = data.glob("variables/*.data*")
    weights.write_bytes(weights.read_bytes()[:5000])
    with pytest.raises(InputError, match="cannot be loaded"):
        loading.load(data)


def test_a_checkpoint_that_holds_more_than_variables_is_read_whole(tmp_path):
    class Module(tf.Module):
        def __init__(self):
            super().__init__()
            self.scale = tf.Variable(2.0)
            self.table = tf.lookup.experimental.MutableHashTable(tf.int64, tf.float32, -1.0)
            self.table.insert(tf.constant([3], tf.int64), tf.constant([0.5]))

        @tf.function(input_signature=[tf.TensorSpec([None], tf.int64, name="keys")])
        def look(self, keys):
            return {"y": self.table.lookup(keys) * self.scale}

    module = Module()
    tf.saved_model.save(module, str(tmp_path / "m"), signatures={"look": module.look})
    saved = loading.load(tmp_path / "m")
    loading.save(saved.signatures, tmp_path / "copy")
    got = run_saved(tmp_path / "copy", {"keys": np.array([3, 4])}, "look")
    np.testing.assert_array_equal(got["y"], [1.0, -2.0])


def test_equal_signatures_have_one_fingerprint(bert_saved):
    first, second = (s.graph for s in loading.load(bert_saved).signatures.values())
    assert executable.fingerprint(first) == executable.fingerprint(second)
    second.outputs["other"] = second.outputs.pop("output_0")
    assert executable.fingerprint(first) != executable.fingerprint(second)


@pytest.mark.thorough
def test_fresh_process_with_plain_tensorflow(bert_saved, tmp_path):
    import tfvllm

    for target in ("portable", "onednn"):
        tfvllm.simplify_saved_model(bert_saved, tmp_path / target, target=target)
    inputs = bert_inputs()
    np.savez(tmp_path / "inputs.npz", **inputs)
    code = (
        "import sys, numpy as np, tensorflow as tf\n"
        "x = dict(np.load('inputs.npz'))\n"
        "for target in ('portable', 'onednn'):\n"
        "    m = tf.saved_model.load(target)\n"
        "    y = m.signatures['serving_default'](**{k: tf.constant(v) for k, v in x.items()})['output_0'].numpy()\n"
        "    np.save(target + '.npy', y)\n"
        "assert not any(n.split('.')[0] in ('tfvllm', 'keras_nlp', 'keras_hub') for n in sys.modules)\n"
    )
    environment = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3"}
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path, env=environment)
    want = run_saved(bert_saved, inputs)["output_0"]
    for target in ("portable", "onednn"):
        np.testing.assert_allclose(np.load(tmp_path / f"{target}.npy"), want, atol=1e-5)


@pytest.mark.parametrize("writes", [False, True])
def test_reference_variables_are_refused(tmp_path, writes):
    """Their values are not stored by TensorFlow 2: the result would load, and fail at the first request."""
    v1 = tf.compat.v1
    with tf.Graph().as_default(), v1.Session() as session:
        x = v1.placeholder(tf.float32, [None, 2], name="x")
        w = v1.get_variable("w", initializer=np.ones((2, 3), np.float32), use_resource=False)
        with tf.control_dependencies([v1.assign_add(w, w)] if writes else []):
            y = tf.matmul(x, w)
        session.run(v1.global_variables_initializer())
        v1.saved_model.simple_save(session, str(tmp_path / "a"), {"x": x}, {"y": y})
    with pytest.raises(InputError, match="'w' is a TensorFlow 1 reference variable"):
        tfvllm.simplify_saved_model(tmp_path / "a", tmp_path / "b")
    assert not (tmp_path / "b").exists()
