"""What a layer stores, where it is not what the layer multiplies by: under LoRA and under Keras quantisation.

`layer.kernel` is then no variable but a tensor computed anew at every reading.
"""

from collections.abc import Iterator
from typing import Any

import keras
import numpy as np

from tfvllm.errors import InputError


def stored(layer: Any, name: str) -> Any:
    """The variable behind `layer.<name>`: of a LoRA layer the one that its small matrices are added to."""
    return getattr(layer, f"_{name}", None) if _own_lora(layer) == name else getattr(layer, name)


def effective(layer: Any, name: str) -> np.ndarray:
    """What `layer.<name>` comes to, in the precision and dtype of the stored variable."""
    variable = stored(layer, name)
    if _own_lora(layer) != name:
        return np.asarray(variable)
    a, b = (np.asarray(part, np.float32) for part in lora_parts(layer))
    delta = np.float32(layer.lora_alpha / layer.lora_rank) * (a @ b)
    return (np.asarray(variable, np.float32) + delta).astype(variable.dtype)


def lora_layers(model: Any) -> Iterator[tuple[Any, str]]:
    """(layer, "kernel" or "embeddings") wherever LoRA adds to it in `model`."""
    return ((layer, name) for layer in model._flatten_layers() if (name := _own_lora(layer)))


def lora_parts(layer: Any) -> list[Any]:
    """The two small matrices of a LoRA layer, [..., rank] and [rank, outputs]; none of another."""
    name = _own_lora(layer)
    return [getattr(layer, f"lora_{name}_{part}") for part in "ab"] if name else []


def _own_lora(layer: Any) -> str | None:
    if not getattr(layer, "lora_enabled", False):
        return None
    return "embeddings" if hasattr(layer, "lora_embeddings_a") else "kernel"


def merge_lora(model: Any) -> int:
    """Adds LoRA's matrices to the kernels and embeddings they belong to, in place, and takes them off the layers.

    The model computes what it computed; these weights are ordinary, trainable ones again (what `backbone.enable_lora`
    froze beside them stays frozen). Compile it anew before it is trained further: an optimizer that has already run
    knows the old weights.

    Args:
        model: a built Keras layer or model.

    Returns:
        How many layers had LoRA.

    Raises:
        InputError: a layer is quantised: its kernel cannot take the sum without rounding.

    Example:
        >>> model = keras.Sequential([keras.Input([4]), keras.layers.Dense(3)])
        >>> model.layers[0].enable_lora(2)
        >>> tfvllm.pruning.merge_lora(model), len(model.weights)
        (1, 2)
    """
    refuse_quantised(model, "merge_lora")
    layers = list(lora_layers(model))
    for layer, name in layers:
        variable = stored(layer, name)
        variable.assign(effective(layer, name))
        layer._tracker.unlock()
        for part in "ab":
            delattr(layer, f"lora_{name}_{part}")
        layer.lora_enabled, layer.lora_rank, layer.lora_alpha = False, None, None
        variable.trainable = True
        layer._tracker.lock()
    if layers and isinstance(model, keras.Model):
        model.train_function = model.test_function = model.predict_function = None
    return len(layers)


def quantised(model: Any) -> list[Any]:
    """The layers of `model` that Keras has quantised."""
    return [layer for layer in model._flatten_layers() if isinstance(getattr(layer, "quantization_mode", None), str)]


def refuse_quantised(model: Any, what: str) -> None:
    """Raises `InputError`, naming the quantisation, where `model` is quantised. `what` cannot be done then."""
    found = quantised(model)
    if found:
        modes = "/".join(sorted({layer.quantization_mode for layer in found}))
        raise InputError(
            f"{what}: expected float weights, found a model quantised to {modes} ({len(found)} layers, first "
            f"{found[0].name}). Use the model as it was before quantize({found[0].quantization_mode!r}), and quantise "
            "the result."
        )
