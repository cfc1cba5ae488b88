"""What a run keeps: its steps' Keras models, and the SavedModels where servers look for them."""

import shutil
from pathlib import Path
from typing import Any

import keras

from tfvllm.compress.steps import Workspace
from tfvllm.files import new_directory

MODEL = "saved_model"  # the SavedModel inside a step's folder


def save_model(model: keras.Model, path: Path) -> None:
    """Saves a model without its optimiser."""
    model.save(path, include_optimizer=False)


def load_model(path: Path) -> keras.Model:
    """Loads a `.keras` model, shrunk ones included, uncompiled."""
    import tfvllm.families
    import tfvllm.models.llama3_tokenizer  # noqa: F401  (both register classes that files name)

    return keras.saving.load_model(path, compile=False)


def publish(workspace: Workspace, source: Path, name: str, step: dict[str, Any], *, kit_for: str | None = None) -> Path:
    """Copies a finished SavedModel to `<out>/<name>/1`, where `tfvllm serve` and TF Serving look for it.

    Its manifest gets `step`: which run made it, and how to make it again. `kit_for` is the name under which it is to be
    served: a serving kit for it is then written beside the version.
    """
    from tfvllm.savedmodel import manifest
    from tfvllm.serving import kit

    target = workspace.out / name / "1"
    with new_directory(target, overwrite=True) as partial:
        shutil.copytree(source, partial, dirs_exist_ok=True)
        manifest.add_step(partial, step)
    folder = target.parent / kit.FOLDER
    if kit_for is not None:
        kit.write(target, name=kit_for)
        workspace.console.line(f"  serving kit: {folder}")
    elif folder.is_dir():
        shutil.rmtree(folder)  # an earlier run's, of another model
    return target
