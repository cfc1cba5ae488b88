"""`prune_low_magnitude`, `strip_pruning`: TFMOT's wrapper form on Keras 3."""

from typing import Any

import keras
import numpy as np
import tensorflow as tf

from tfvllm.errors import InputError
from tfvllm.pruning import masks
from tfvllm.pruning.masks import MaskState
from tfvllm.pruning.prunable import PruningPolicy, own_weights, prunable_weights
from tfvllm.pruning.schedules import ConstantSparsity

_NO_CALLBACK = (
    "Prune() wrapper requires the UpdatePruningStep callback to be provided during training. "
    "Please add it as a callback to your model.fit call."
)


@keras.saving.register_keras_serializable(package="tfvllm")
class PruneLowMagnitude(keras.layers.Wrapper):
    """A layer whose weights are masked while training (TFMOT's `PruneLowMagnitude`).

    Any Keras layer with prunable weights, sub-layers included (MultiHeadAttention, TransformerEncoder). Arguments as
    for `prune_low_magnitude`.

    Example:
        >>> layer = tfvllm.pruning.PruneLowMagnitude(keras.layers.Dense(4), tfvllm.ConstantSparsity(0.5, 0))
        >>> layer(np.ones([2, 8], "float32")).shape, layer.name[:19]
        (TensorShape([2, 4]), 'prune_low_magnitude')
    """

    def __init__(
        self,
        layer: Any,
        pruning_schedule: Any = None,
        block_size: Any = (1, 1),
        block_pooling_type: str = "AVG",
        sparsity_m_by_n: Any = None,
        **kwargs: Any,
    ):
        kwargs.setdefault("name", f"prune_low_magnitude_{layer.name}")
        super().__init__(layer, **kwargs)
        self.pruning_schedule = ConstantSparsity(0.5, 0) if pruning_schedule is None else pruning_schedule
        self.block_size = tuple(block_size)
        self.block_pooling_type = block_pooling_type
        self.sparsity_m_by_n = None if sparsity_m_by_n is None else tuple(sparsity_m_by_n)
        self.supports_masking = getattr(layer, "supports_masking", False)
        self.masks: MaskState | None = None
        if layer.built:
            self._make_masks()
            self.built = True

    def build(self, input_shape: Any = None) -> None:
        if not self.layer.built:
            self.layer.build(input_shape)
            self.layer.built = True
        if self.masks is None:
            self._make_masks()
        self.built = True

    def _make_masks(self) -> None:
        targets = list(prunable_weights(self.layer))
        if not targets:
            raise InputError(
                f"layer {self.layer.name} ({type(self.layer).__name__}) has no prunable weights. Expected Dense-like, "
                "convolution, recurrent or Embedding layers, or one with get_prunable_weights()."
            )
        self.masks = MaskState(
            targets,
            self.pruning_schedule,
            block_size=self.block_size,
            block_pooling_type=self.block_pooling_type,
            sparsity_m_by_n=self.sparsity_m_by_n,
        )

    @property
    def pruning_vars(self) -> tuple[Any, ...]:
        """(weight, mask, threshold) tf.Variables; empty before the layer is built."""
        return () if self.masks is None else self.masks.pruning_vars

    @property
    def pruning_step(self) -> Any:
        """The step counter, an int64 variable."""
        return None if self.masks is None else self.masks.step_variable

    def call(self, inputs: Any, *args: Any, training: bool | None = None, **kwargs: Any) -> Any:
        if training and self.masks is not None and not isinstance(inputs, keras.KerasTensor):
            check = tf.debugging.assert_greater_equal(self.masks.step_variable.value, np.int64(1), message=_NO_CALLBACK)
            with tf.control_dependencies([] if check is None else [check]):
                inputs = tf.nest.map_structure(tf.identity, inputs)
        if self.layer._call_has_training_arg:
            kwargs["training"] = training
        return self.layer(inputs, *args, **kwargs)

    def compute_output_spec(self, inputs: Any, *args: Any, training: bool | None = None, **kwargs: Any) -> Any:
        return self.layer.compute_output_spec(inputs, *args, **kwargs)

    def compute_output_shape(self, input_shape: Any) -> Any:
        return self.layer.compute_output_shape(input_shape)

    def compute_mask(self, inputs: Any, previous_mask: Any = None) -> Any:
        return self.layer.compute_mask(inputs, previous_mask)

    def get_config(self) -> dict[str, Any]:
        config = super().get_config()
        config.update(
            pruning_schedule=keras.saving.serialize_keras_object(self.pruning_schedule),
            block_size=list(self.block_size),
            block_pooling_type=self.block_pooling_type,
            sparsity_m_by_n=None if self.sparsity_m_by_n is None else list(self.sparsity_m_by_n),
        )
        return config

    @classmethod
    def from_config(cls, config: dict[str, Any], custom_objects: Any = None) -> "PruneLowMagnitude":
        config = dict(config)
        config["layer"] = keras.saving.deserialize_keras_object(config["layer"], custom_objects=custom_objects)
        config["pruning_schedule"] = keras.saving.deserialize_keras_object(
            config["pruning_schedule"], custom_objects=custom_objects
        )
        return cls(**config)


def prune_low_magnitude(
    to_prune: Any,
    pruning_schedule: Any = None,
    block_size: Any = (1, 1),
    block_pooling_type: str = "AVG",
    pruning_policy: PruningPolicy | None = None,
    sparsity_m_by_n: Any = None,
    **kwargs: Any,
) -> Any:
    """Makes a Keras 3 layer or model pruned during training: TFMOT's function, its names, arguments and meaning.

    Train the result with the callback `UpdatePruningStep`; `strip_pruning` gives the plain model back.

    A layer, or a list of layers, is wrapped. A Sequential or functional model is cloned with wrapped layers that share
    the original's weights. A keras-nlp backbone or task and a subclassed model keep their class: the masks are attached
    to the model itself, in place, and it is returned.

    Args:
        to_prune: a layer, a list of layers, or a model.
        pruning_schedule: default `ConstantSparsity(0.5, 0)`. For models also a mapping from weight-name patterns to
            schedules; None leaves the weights dense. A TFMOT schedule is as good as ours.
        block_size: (height, width) of the blocks that are zeroed together. Weights of other ranks are seen as
            [inputs, outputs]; TFMOT refuses them.
        block_pooling_type: "AVG" or "MAX": how |weight| is pooled in a block.
        pruning_policy: which layers are pruned.
        sparsity_m_by_n: (m, n): m zeros in every n consecutive inputs; renewed at every turn of the schedule (TFMOT: at
            step 1 only).
        **kwargs: for the wrapper of a single layer.

    Raises:
        InputError: nothing to prune, an M:N that does not divide, blocks that are not two integers.

    Example:
        >>> model = keras.Sequential([keras.Input([8]), keras.layers.Dense(4)])
        >>> pruned = tfvllm.prune_low_magnitude(model, tfvllm.ConstantSparsity(0.5, 0, frequency=1))
        >>> pruned.compile("sgd", "mse")
        >>> data = np.ones([8, 8], "float32"), np.ones([8, 4], "float32")
        >>> history = pruned.fit(*data, verbose=0, callbacks=[tfvllm.callbacks.UpdatePruningStep()])
        >>> float(np.mean(np.asarray(tfvllm.strip_pruning(pruned).layers[0].kernel) == 0))
        0.5
    """
    options = {
        "block_size": block_size,
        "block_pooling_type": block_pooling_type,
        "sparsity_m_by_n": sparsity_m_by_n,
    }
    schedule = ConstantSparsity(0.5, 0) if pruning_schedule is None else pruning_schedule

    if isinstance(to_prune, list | tuple):
        return [prune_low_magnitude(layer, schedule, pruning_policy=pruning_policy, **options) for layer in to_prune]
    if isinstance(to_prune, PruneLowMagnitude | keras.layers.InputLayer):
        return to_prune
    if isinstance(to_prune, keras.Model):
        if pruning_policy is not None:
            pruning_policy.ensure_model_supports_pruning(to_prune)
        if not _is_plain(to_prune) or isinstance(schedule, dict):
            if not to_prune.built:
                raise InputError(f"{to_prune.name} is not built: it has no weights yet. Call it on data once.")
            targets = list(prunable_weights(to_prune, pruning_policy))
            masks.attach(to_prune, MaskState(targets, schedule, **options))
            return to_prune

        def wrap(layer: Any) -> Any:
            if isinstance(layer, keras.Model):
                return prune_low_magnitude(layer, schedule, pruning_policy=pruning_policy, **options)
            if isinstance(layer, PruneLowMagnitude) or not _has_weights_to_prune(layer, pruning_policy):
                return layer
            return PruneLowMagnitude(layer, schedule, **options)

        pruned = _clone(to_prune, wrap)
        if not masks.find_states(pruned) and to_prune.built:
            raise InputError(
                f"{to_prune.name} has nothing to prune; expected Dense-like, convolution or Embedding layers."
            )
        return pruned
    if isinstance(to_prune, keras.layers.Layer):
        if pruning_policy is not None and not pruning_policy.allow_pruning(to_prune):
            return to_prune
        return PruneLowMagnitude(to_prune, schedule, **options, **kwargs)
    raise InputError(
        f"prune_low_magnitude takes a keras layer, a list of layers or a keras model; got {type(to_prune).__name__}."
        + (
            " It is a Keras 2 (tf_keras) object: rebuild it with keras 3."
            if "tf_keras" in type(to_prune).__module__
            else ""
        )
    )


def strip_pruning(model: Any) -> Any:
    """The model without wrappers and masks; its weights are sparse. The inverse of `prune_low_magnitude`.

    Raises:
        InputError: not a Keras model.

    Example:
        >>> model = keras.Sequential([keras.Input([8]), keras.layers.Dense(4)])
        >>> plain = tfvllm.strip_pruning(tfvllm.prune_low_magnitude(model))
        >>> type(plain.layers[0]).__name__
        'Dense'
    """
    if not isinstance(model, keras.Model):
        raise InputError(f"strip_pruning takes a keras.Model, got {type(model).__name__}.")
    for layer in model._flatten_layers():
        if masks.find_own(layer) is not None:
            masks.detach(layer)
    if not any(isinstance(layer, PruneLowMagnitude) for layer in model._flatten_layers()):
        return model

    def unwrap(layer: Any) -> Any:
        if isinstance(layer, keras.Model):
            return strip_pruning(layer)
        if isinstance(layer, PruneLowMagnitude):
            if layer.masks is not None:
                layer.masks.release()
            return layer.layer
        return layer

    if not _is_plain(model):  # a subclassed model that was written with wrapped layers
        for layer in model._flatten_layers():
            if isinstance(layer, PruneLowMagnitude) and layer.masks is not None:
                layer.masks.release()
        raise InputError(
            f"{type(model).__name__} is a subclassed model with wrapped layers: its code names them. Its weights are "
            "masked now; take layer.layer out of each wrapper."
        )
    return _clone(model, unwrap)


def _is_plain(model: Any) -> bool:
    """Sequential or functional, not a class of its own."""
    return type(model).__module__.startswith("keras.src.models") and isinstance(
        model, keras.Sequential | keras.src.models.functional.Functional
    )


def _has_weights_to_prune(layer: Any, policy: PruningPolicy | None) -> bool:
    if isinstance(layer, keras.layers.InputLayer):
        return False
    if layer.built:
        return any(True for _ in prunable_weights(layer, policy))
    allowed = policy is None or policy.allow_pruning(layer)
    return allowed and (bool(own_weights(layer)) or hasattr(layer, "get_prunable_weights"))


def _clone(model: Any, change: Any) -> Any:
    cache: dict[int, Any] = {}

    def once(layer: Any) -> Any:
        if id(layer) not in cache:
            cache[id(layer)] = change(layer)
        return cache[id(layer)]

    if isinstance(model, keras.Sequential) and not model.built:
        return keras.Sequential([once(layer) for layer in model.layers], name=model.name)
    return keras.models.clone_model(model, clone_function=once)
