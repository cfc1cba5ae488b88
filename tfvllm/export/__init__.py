"""Tasks to SavedModels. The package itself can be called: `tfvllm.export(model, path, task="classify")`."""

import importlib
import sys
import types

__all__ = ["PRECISIONS", "TASKS"]

# task -> the module that writes its SavedModel; a new task is one new module and one line here.
TASKS = {
    "classify": "tfvllm.export.classify",
    "generate": "tfvllm.export.generate",
    "translate": "tfvllm.export.translate",
    "embed": "tfvllm.export.embed",
}
PRECISIONS = ("float32", "bfloat16", "int8")


class _CallablePackage(types.ModuleType):
    # `tfvllm.export` has to be both a package and the public function, whichever is imported first.
    def __call__(self, model, path, task, **options):
        return importlib.import_module("tfvllm.export.exporter").export(model, path, task, **options)


sys.modules[__name__].__class__ = _CallablePackage
