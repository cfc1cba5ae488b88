"""tfvllm: smaller, faster SavedModels from Keras 3 language models, with proof that they do the same job.

The public names live here and are imported on first use, so that `import tfvllm` costs nothing, prints
nothing and leaves `keras` and `tf.keras` as they were.
"""

import importlib
from typing import TYPE_CHECKING, Any

from tfvllm._version import __version__

# name -> (module, attribute); an attribute of None means the module itself.
_PUBLIC: dict[str, tuple[str, str | None]] = {
    "Distiller": ("tfvllm.distillation.distiller", "Distiller"),
    "losses": ("tfvllm.losses", None),
    "distillation": ("tfvllm.distillation", None),
    "callbacks": ("tfvllm.callbacks", None),
    "schedules": ("tfvllm.schedules", None),
    "pruning": ("tfvllm.pruning", None),
    "prune_low_magnitude": ("tfvllm.pruning", "prune_low_magnitude"),
    "strip_pruning": ("tfvllm.pruning", "strip_pruning"),
    "PruningPolicy": ("tfvllm.pruning", "PruningPolicy"),
    "ConstantSparsity": ("tfvllm.pruning", "ConstantSparsity"),
    "PolynomialDecay": ("tfvllm.pruning", "PolynomialDecay"),
    "shrink": ("tfvllm.pruning", "shrink"),
    "simplify": ("tfvllm.simplifier.api", "simplify"),
    "simplify_saved_model": ("tfvllm.simplifier.api", "simplify_saved_model"),
    "inspect_saved_model": ("tfvllm.simplifier.api", "inspect_saved_model"),
    "graph": ("tfvllm.graph", None),
    "rules": ("tfvllm.rules", None),
    "models": ("tfvllm.models", None),
    "export": ("tfvllm.export", None),  # a package that can be called: tfvllm.export(model, path, task=...)
    "generation": ("tfvllm.generation", None),
    "rollouts": ("tfvllm.rollouts", None),
    "compress": ("tfvllm.compress", None),  # a package that can be called: tfvllm.compress("recipe.yaml")
    "errors": ("tfvllm.errors", None),
}

__all__ = ["__version__", *_PUBLIC]

if TYPE_CHECKING:  # the same names, spelled out for editors and type checkers
    from tfvllm import (
        callbacks,
        compress,
        distillation,
        errors,
        export,
        generation,
        graph,
        losses,
        models,
        pruning,
        rollouts,
        rules,
        schedules,
    )
    from tfvllm.distillation.distiller import Distiller
    from tfvllm.pruning import (
        ConstantSparsity,
        PolynomialDecay,
        PruningPolicy,
        prune_low_magnitude,
        shrink,
        strip_pruning,
    )
    from tfvllm.simplifier.api import inspect_saved_model, simplify, simplify_saved_model


def __getattr__(name: str) -> Any:
    try:
        module, attribute = _PUBLIC[name]
    except KeyError:
        raise AttributeError(f"module 'tfvllm' has no attribute {name!r}") from None
    loaded = importlib.import_module(module)
    value = loaded if attribute is None else getattr(loaded, attribute)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
