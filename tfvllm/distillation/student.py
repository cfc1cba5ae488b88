"""Students made from their teachers."""

from collections.abc import Sequence

import keras

from tfvllm.distillation.layer_map import layer_pairs, spread
from tfvllm.errors import InputError

# The lists of blocks of keras-nlp backbones, and the config entry that says how many there are.
_STACKS = ("transformer_layers", "encoder_transformer_layers", "decoder_transformer_layers")
_DEPTH = "num_layers"


def student_from(teacher: keras.Model, layers: int | Sequence[int] = 2, *, name: str | None = None) -> keras.Model:
    """A shallower model of the teacher's class, with the teacher's own weights in all that it keeps.

    Embeddings, norms, pooler and head are copied too, so the student starts near its teacher (DistilBERT, Sanh et
    al. 2019, section 2). Encoder and decoder of a seq2seq model keep the same layers.

    Args:
        teacher: a keras-nlp task or backbone with one or two stacks of transformer blocks.
        layers: how many of the teacher's blocks to keep, evenly spaced up to the last; or which (numbered from 0,
            negative from the end), in the student's order.
        name: the student's name; the default is the teacher's with "_student" after it.
    Returns:
        A new model that shares no variable with the teacher; the preprocessor (which has none) is shared.
    Raises:
        InputError: where the teacher has no stack of blocks, or not the layers asked for.
    """
    backbone = getattr(teacher, "backbone", None) or teacher
    stacks = [stack for stack in _STACKS if getattr(backbone, stack, None)]
    if not stacks or _DEPTH not in backbone.get_config():
        raise InputError(
            f"student_from expects a keras-nlp model with transformer blocks, found {type(teacher).__name__}. "
            "Build the student yourself and pass it to tfvllm.Distiller."
        )
    depth = len(getattr(backbone, stacks[0]))
    if isinstance(layers, int):
        chosen = spread(layers, depth)
    else:
        chosen = [index for index, _ in layer_pairs([(layer, 0) for layer in layers], depth, 1)]
    if not chosen:
        raise InputError(f"layers names no layer; expected 1 to {depth} of the teacher's.")

    name = name or f"{teacher.name}_student"
    config = {**backbone.get_config(), _DEPTH: len(chosen)}
    small = type(backbone).from_config({**config, "name": name if backbone is teacher else backbone.name})
    blocks = {}
    for stack in stacks:
        of_teacher = getattr(backbone, stack)
        for block, index in zip(getattr(small, stack), chosen):
            blocks[id(block)] = of_teacher[index]
    _copy_weights(backbone, small, blocks)
    if backbone is teacher:
        return small

    config = {**teacher.get_config(), "backbone": small, "preprocessor": teacher.preprocessor, "name": name}
    student = type(teacher).from_config(config)
    _copy_weights(teacher, student, {id(small): None})
    return student


def _copy_weights(source: keras.Model, target: keras.Model, known: dict[int, keras.Layer | None]) -> None:
    """Copies weights layer by layer: from the layer in `known` (None: leave), else from the one of the same name."""
    by_name = {layer.name: layer for layer in source.layers}
    for layer in target.layers:
        origin = known.get(id(layer), by_name.get(layer.name))
        if origin is not None and layer.weights:
            layer.set_weights(origin.get_weights())
