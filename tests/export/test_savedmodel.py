"""What `tfvllm.savedmodel.write.save` leaves out."""

import numpy as np
import tensorflow as tf

from tfvllm.savedmodel import protos, write


def test_repeats_are_merged_and_answers_stay(tmp_path):
    module = tf.Module()
    module.weight = tf.Variable(np.arange(6, dtype="float32").reshape(2, 3))

    @tf.function(input_signature=[tf.TensorSpec([None, 2], tf.float32, name="x")], autograph=False)
    def call(x):
        for _ in range(4):  # each round makes the same constants and looks at the same shape
            x = tf.reshape(x * 2.0, [tf.shape(x)[0], 2])
        tf.shape(x)  # nobody reads this
        with tf.control_dependencies([tf.debugging.assert_less(tf.shape(x)[0], 100)]):
            kept = tf.constant(2.0)
        return {"y": tf.matmul(x, module.weight) * kept, "rows": tf.shape(x)[0], "again": tf.shape(x)[0]}

    x = np.array([[1.0, -2.0], [0.5, 3.0], [0.0, np.nan]], "float32")
    expected = call(tf.constant(x))
    write.save(module, {"serving_default": call}, tmp_path / "1", {"serving_default": write.CLASSIFY})

    graph = protos.read_proto(tmp_path / "1").meta_graphs[0]
    assert graph.signature_def["serving_default"].method_name == write.CLASSIFY
    (function,) = (f for f in graph.graph_def.library.function if f.signature.name.startswith("__inference_call_"))
    before = call.get_concrete_function().function_def.node_def
    ops, ops_before = ([n.op for n in nodes] for nodes in (function.node_def, before))
    for op in ("MatMul", "Mul", "Reshape", "Assert"):
        assert ops.count(op) == ops_before.count(op) > 0
    read = {tensor.removeprefix("^").split(":")[0] for node in function.node_def for tensor in node.input}
    read |= {tensor.split(":")[0] for tensor in function.ret.values()}
    names = {node.name for node in function.node_def}
    assert read <= names | {arg.name for arg in function.signature.input_arg}
    assert all(node.name in read for node in function.node_def if node.op in ("Const", "Shape", "StridedSlice", "Pack"))
    values = [
        node.attr["value"].tensor.SerializeToString(deterministic=True)
        for node in function.node_def
        if node.op == "Const" and not any(tensor.startswith("^") for tensor in node.input)
    ]
    assert len(values) == len(set(values)) < ops_before.count("Const") / 2
    assert ops.count("Pack") == ops_before.count("Pack") == 4  # of another x each

    found = tf.saved_model.load(str(tmp_path / "1")).signatures["serving_default"](x=tf.constant(x))
    for name, value in expected.items():
        np.testing.assert_array_equal(found[name], value)
