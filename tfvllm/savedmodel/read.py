"""SavedModels read as TF Serving reads them: without the optimizer of a compiled model.

This file imports nothing of tfvllm, so that a fresh process may load it by its path.
"""

import os
from pathlib import Path
from typing import Any

_PLAIN = "_generic_user_object"


def load(directory: str | os.PathLike, options: Any = None) -> Any:
    """`tf.saved_model.load`, also where no Keras is there to make the optimizer of a model that Keras 2 compiled.

    TensorFlow makes slot variables (momenta) by the optimizer's class, which it imports Keras for. They serve training
    alone: here an optimizer is a plain object that holds its variables.

    Args:
        directory: the folder that holds saved_model.pb.
        options: `tf.saved_model.LoadOptions`.

    Raises what `tf.saved_model.load` raises.
    """
    import tensorflow as tf
    from tensorflow.core.protobuf import saved_model_pb2

    file = Path(directory) / "saved_model.pb"
    proto = saved_model_pb2.SavedModel()
    if file.is_file():
        proto.ParseFromString(file.read_bytes())
    if len(proto.meta_graphs) != 1 or not _without_optimizers(proto.meta_graphs[0].object_graph_def):
        return tf.saved_model.load(str(directory), options=options)

    options = options or tf.saved_model.LoadOptions()
    objects = proto.meta_graphs[0].object_graph_def
    with tf.init_scope():
        return _loader()(objects, proto, str(directory), tf.train.CheckpointOptions(), options, None).get(0)


def _loader() -> type:
    import tensorflow as tf
    from tensorflow.python.saved_model.load import Loader

    class WithoutSlots(Loader):
        """Does not warn of momenta in the checkpoint that nothing was made for."""

        def _restore_checkpoint(self) -> None:
            status = tf.train.Checkpoint(root=self.get(0)).read(str(Path(self._export_dir) / "variables" / "variables"))
            status.assert_existing_objects_matched()
            status.expect_partial()

    return WithoutSlots


def _without_optimizers(objects: Any) -> bool:
    """Makes the optimizers of a SavedObjectGraph plain objects; returns whether there were any."""
    found = False
    for node in objects.nodes:
        if node.slot_variables or node.user_object.identifier == "optimizer":
            found = True
            del node.slot_variables[:]
            node.user_object.identifier = _PLAIN
    return found
