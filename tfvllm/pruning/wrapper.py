"""`prune_low_magnitude`, `strip_pruning`: TFMOT's wrapper form on Keras 3."""

import functools
import inspect
import warnings
from collections.abc import Mapping
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from tfvllm.errors import InputError
from tfvllm.pruning import masks
from tfvllm.pruning.masks import MaskState, check_options, with_groups
from tfvllm.pruning.prunable import PruningPolicy, own_weights, refuse_unknown, say_what_stays_dense, select
from tfvllm.pruning.schedules import ConstantSparsity

_NO_CALLBACK = (
    "Prune() wrapper requires the UpdatePruningStep callback to be provided during training. "
    "Please add it as a callback to your model.fit call."
)


@keras.saving.register_keras_serializable(package="tfvllm")
class PruneLowMagnitude(keras.layers.Wrapper):
    """A layer whose weights are masked while training (TFMOT's `PruneLowMagnitude`).

    It is called as its layer is, with the same arguments, masks included. Any Keras layer, sub-layers included
    (MultiHeadAttention, TransformerEncoder); one without weights to prune is passed through. Arguments as for
    `prune_low_magnitude`.

    Raises:
        InputError: a layer of one's own without `get_prunable_weights()`, LoRA, a quantised layer, a pooling type,
            block size or M:N that is none.

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
        if not isinstance(layer, keras.layers.Layer):
            raise InputError(f"PruneLowMagnitude takes a keras layer, got {type(layer).__name__}.")
        refuse_unknown(layer._flatten_layers())
        kwargs.setdefault("name", f"prune_low_magnitude_{layer.name}")
        if getattr(layer, "quantization_mode", None) is None:
            kwargs.setdefault("dtype", layer.dtype_policy)
        super().__init__(layer, **kwargs)
        self.pruning_schedule = ConstantSparsity(0.5, 0) if pruning_schedule is None else pruning_schedule
        self.block_size, self.sparsity_m_by_n = check_options(block_size, block_pooling_type, sparsity_m_by_n)
        self.block_pooling_type = block_pooling_type
        self._stand_in_for(layer)
        self._first_call: Any = None
        self.masks: MaskState | None = None
        if layer.built:
            self._make_masks()
            self.built = True

    def _stand_in_for(self, layer: Any) -> None:
        """Lets Keras treat this layer as the wrapped one: its signature says which masks and arguments come in."""
        signature = layer._call_signature
        parameters = list(signature.parameters.values())
        if "training" not in signature.parameters:
            extra = inspect.Parameter("training", inspect.Parameter.KEYWORD_ONLY, default=None)
            end = len(parameters) - sum(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters)
            parameters.insert(end, extra)
        self._call_signature = signature.replace(parameters=parameters)
        self.call_signature_parameters = [parameter.name for parameter in parameters]
        self._call_context_args = {*layer._call_context_args}
        self._call_has_context_arg = {**layer._call_has_context_arg, "training": True}
        self._call_has_training_arg = True
        self._call_has_mask_arg = layer._call_has_mask_arg
        self._convert_input_args = layer._convert_input_args
        self._allow_non_tensor_positional_args = layer._allow_non_tensor_positional_args
        self.autocast = layer.autocast
        self.supports_masking = layer.supports_masking
        if not hasattr(self, "_input_shape_arg") and hasattr(layer, "_input_shape_arg"):
            self._input_shape_arg = layer._input_shape_arg  # a Sequential begins with it

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not self.built:
            self._first_call = (args, kwargs)
        try:
            return super().__call__(*args, **kwargs)
        finally:
            self._first_call = None

    def build(self, input_shape: Any = None) -> None:
        if not self.layer.built:
            if self._first_call is None:
                self.layer.build(input_shape)
            else:  # some layers are built for the shapes of several arguments
                args, kwargs = keras.tree.map_structure(_symbol, self._first_call)
                self.layer(*args, **kwargs)
            self.layer.built = True
        if self.masks is None:
            self._make_masks()
        self.built = True

    def _make_masks(self) -> None:
        found = select(self.layer)
        say_what_stays_dense(found)
        targets = with_groups(found.targets, self.sparsity_m_by_n)
        if targets:
            self.masks = MaskState(
                targets,
                self.pruning_schedule,
                block_size=self.block_size,
                block_pooling_type=self.block_pooling_type,
                sparsity_m_by_n=self.sparsity_m_by_n,
            )

    @property
    def pruning_vars(self) -> tuple[Any, ...]:
        """(weight, mask, threshold) tf.Variables; empty before the layer is built, or where nothing is pruned."""
        return () if self.masks is None else self.masks.pruning_vars

    @property
    def pruning_step(self) -> Any:
        """The step counter, an int64 variable."""
        return None if self.masks is None else self.masks.step_variable

    def call(self, *args: Any, **kwargs: Any) -> Any:
        training = kwargs.get("training")
        if not self.layer._call_has_training_arg:
            kwargs.pop("training", None)
        if training and self.masks is not None:
            tf.debugging.assert_greater_equal(self.masks.step_variable.value, np.int64(1), message=_NO_CALLBACK)
        return self.layer(*args, **kwargs)

    def compute_output_spec(self, *args: Any, **kwargs: Any) -> Any:
        if not self.layer._call_has_training_arg:
            kwargs.pop("training", None)
        return self.layer.compute_output_spec(*args, **kwargs)

    def compute_output_shape(self, *args: Any, **kwargs: Any) -> Any:
        return self.layer.compute_output_shape(*args, **kwargs)

    def compute_mask(self, inputs: Any, previous_mask: Any = None) -> Any:
        return self.layer.compute_mask(inputs, previous_mask)

    def get_weights(self) -> list[np.ndarray]:
        """The wrapped layer's, without masks, as TFMOT's."""
        return self.layer.get_weights()

    def set_weights(self, weights: list[np.ndarray]) -> None:
        """The wrapped layer's, without masks, as TFMOT's."""
        self.layer.set_weights(weights)

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


def _symbol(value: Any) -> Any:
    if not hasattr(value, "shape"):
        return value
    return keras.KerasTensor(value.shape, dtype=keras.backend.standardize_dtype(value.dtype))


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
    the original's weights, not yet compiled; layers without weights to prune, and frozen ones, stay as they are. A
    keras-nlp backbone or task and a subclassed model keep their class: the masks are attached to the model itself, in
    place, and it is returned.

    Args:
        to_prune: a layer, a list of layers, or a model.
        pruning_schedule: default `ConstantSparsity(0.5, 0)`. For models also a mapping from weight-name patterns to
            schedules; None leaves the weights dense. A TFMOT schedule is as good as ours.
        block_size: (height, width) of the blocks that are zeroed together. Weights of other ranks are seen as
            [inputs, outputs]; TFMOT refuses them.
        block_pooling_type: "AVG" or "MAX": how |weight| is pooled in a block.
        pruning_policy: which layers are pruned.
        sparsity_m_by_n: (m, n): m zeros in every n consecutive inputs (of convolutions: input channels), the last n
            filled up with zeros; renewed at every turn of the schedule (TFMOT: at step 1 only).
        **kwargs: for the wrapper of a single layer.

    Raises:
        InputError: nothing to prune, a layer of one's own without `get_prunable_weights()`, a layer with LoRA (merge it
            first) or one that is quantised, blocks that are not two integers.

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
        check_options(block_size, block_pooling_type, sparsity_m_by_n)
        if pruning_policy is not None:
            pruning_policy.ensure_model_supports_pruning(to_prune)
        refuse_unknown(layer for layer in to_prune._flatten_layers() if _is_allowed(layer, pruning_policy))
        if isinstance(schedule, Mapping):
            return _masked_in_place(to_prune, schedule, pruning_policy, options)
        return _wrapped(to_prune, schedule, pruning_policy, options)
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


def _masked_in_place(model: Any, schedule: Any, policy: PruningPolicy | None, options: dict[str, Any]) -> Any:
    found = select(model, policy)
    say_what_stays_dense(found)
    masks.attach(model, MaskState(found.targets, schedule, **options))
    return model


def _wrapped(model: Any, schedule: Any, policy: PruningPolicy | None, options: dict[str, Any]) -> Any:
    """`model` with its layers wrapped, or, where it has a class of its own, with masks attached."""
    found = select(model, policy) if model.variables else None
    if found is not None and not found.targets and not masks.find_states(model) and policy is None:
        raise InputError(
            f"{model.name} has nothing to prune"
            + (": all its kernels are frozen." if found.frozen else "; expected Dense-like, convolution or Embedding")
            + (" Set trainable = True first." if found.frozen else " layers.")
        )
    if not _is_plain(model):
        return _masked_in_place(model, schedule, policy, options)
    if found is not None:
        say_what_stays_dense(found)
        if not found.targets and not masks.find_states(model):
            warnings.warn(f"{model.name}: the policy leaves nothing to prune in it", stacklevel=3)

    def wrap(layer: Any) -> Any:
        if isinstance(layer, PruneLowMagnitude) or not _has_weights_to_prune(layer, policy):
            return layer
        if isinstance(layer, keras.Model):
            if _is_plain(layer):
                return _clone(layer, once)
            found = select(layer, policy)
            masks.attach(layer, MaskState(found.targets, schedule, **options))
            return layer
        return PruneLowMagnitude(layer, schedule, **options)

    once = functools.cache(wrap)  # a layer that two models share is wrapped once
    wrapped = _clone(model, once)
    # Keras compiles a copy of a compiled model, with an optimizer that has not begun; TFMOT asks for `compile`.
    wrapped.compiled, wrapped.optimizer = False, None
    return wrapped


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
    if not _has_wrappers(model):
        return model

    def unwrap(layer: Any) -> Any:
        if isinstance(layer, PruneLowMagnitude):
            if layer.masks is not None:
                layer.masks.release()
            return layer.layer
        return _clone(layer, once) if isinstance(layer, keras.Model) and _has_wrappers(layer) else layer

    own = [inner for inner in model._flatten_layers() if isinstance(inner, keras.Model) and not _is_plain(inner)]
    written = next((inner for inner in own if _has_wrappers(inner)), None)
    if written is not None:
        for layer in model._flatten_layers():
            if isinstance(layer, PruneLowMagnitude) and layer.masks is not None:
                layer.masks.release()
        raise InputError(
            f"{type(written).__name__} is a subclassed model with wrapped layers: its code names them. Its weights are "
            "masked now; take layer.layer out of each wrapper."
        )
    once = functools.cache(unwrap)
    return _clone(model, once)


def _has_wrappers(model: Any) -> bool:
    return any(isinstance(layer, PruneLowMagnitude) for layer in model._flatten_layers())


def _is_plain(model: Any) -> bool:
    """Sequential or functional, not a class of its own."""
    return type(model).__module__.startswith("keras.src.models") and isinstance(
        model, keras.Sequential | keras.src.models.functional.Functional
    )


def _is_allowed(layer: Any, policy: PruningPolicy | None) -> bool:
    return policy is None or policy.allow_pruning(layer)


def _has_weights_to_prune(layer: Any, policy: PruningPolicy | None) -> bool:
    if not isinstance(layer, keras.layers.Layer) or isinstance(layer, keras.layers.InputLayer):
        return False  # keras.ops and slices are operations of the graph
    if layer.variables or layer.built:
        return bool(select(layer, policy).targets)
    inner = layer._flatten_layers()
    return any(own_weights(l) or hasattr(l, "get_prunable_weights") for l in inner if _is_allowed(l, policy))


def _clone(model: Any, change: Any) -> Any:
    if isinstance(model, keras.Sequential) and not model.built:
        return keras.Sequential([change(layer) for layer in model.layers], name=model.name)
    return keras.models.clone_model(model, clone_function=change)
