"""The general path of `generate` and `translate`: models that no reader knows, by their own decode step."""

from __future__ import annotations

from typing import Any, TypeVar

from tfvllm.errors import InputError
from tfvllm.export import float32
from tfvllm.generation.model_generator import ModelGenerator, ModelTranslator
from tfvllm.graph.targets import PORTABLE

# How far log-probabilities may lie from the Keras model's. bfloat16 keeps 8 bits of each number.
TOLERANCE = {"float32": 2e-3, "bfloat16": 0.5}

OwnStep = TypeVar("OwnStep", ModelGenerator, ModelTranslator)


def precision_of(model, precision: str, target: str, why: str) -> str:
    """The precision of a model that runs as it is, and `why` so.

    Raises:
        InputError: another precision, or fused kernels, are asked for.
    """
    own = model.backbone.compute_dtype
    next_step = "Leave the option out; a reader that takes it would offer it."
    if precision not in ("float32", own):
        raise InputError(f"precision={precision!r}: {why}, so that it runs as it is, in {own}. {next_step}")
    if target != PORTABLE:
        raise InputError(f"target={target!r}: {why}, so that its public ops stay. {next_step}")
    return own


def by_own_step(kind: type[OwnStep], model, options: dict[str, Any]) -> OwnStep:
    """The model by its own step, of any length where that computes what the model does, else of a fixed length.

    Where neither does, by a forward pass for each token.

    Raises:
        InputError: the model cannot be put into a graph, or computes something else there.
    """
    allowed = max(TOLERANCE["float32"], float32.tolerance(model, steps=8.0)["atol"])
    found = ""
    for cached in (True, False):
        for fixed in (False, True):
            generator = kind(model, fixed=fixed, cached=cached, **options)
            if fixed and generator.max_length is None:
                continue
            try:
                error = generator.step_error()
            except Exception as failure:  # whatever a model does in a graph, or with a length that it does not know
                found = found or f"{type(failure).__name__}: {' '.join(str(failure).split())[:200]}."
                continue
            if error <= allowed:
                return generator
            found = f"log-probabilities of its cached step lie up to {error:.2g} from those of its forward pass."
    advice = "" if generator.max_length is not None else " Give max_length: rows of one length may work."
    raise InputError(f"cannot generate with {type(model).__name__} by its own decode step: {found}{advice}")


def entries(model, generator: ModelGenerator | ModelTranslator, why: str, offered: str) -> dict[str, Any]:
    """What the manifest says of such a model, and a note for whoever exports it; `offered`: only by readers."""
    lengths = f"every request computes {generator.max_length} positions" if generator.fixed else "any length"
    how = f"keras-nlp's own decode step runs in the loop, as fast as there ({lengths})"
    if not generator.cached:
        how = (
            f"each token takes a forward pass over its whole row ({lengths}): the cached step that keras-nlp's "
            "generate takes computes something else than the model"
        )
    return {
        "family": type(model.backbone).__name__,
        "path": "general",
        "parameters": model.count_params(),
        "cache_bytes_per_token": 0,
        "notes": [
            f"general path: {why}, so that {how}. A reader would bring a faster step, bfloat16, onednn, and {offered}."
        ],
    }
