"""What a run does in its own way for a task: one module each. The steps and their order are in `compress/stages.py`."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tfvllm.compress.recipe import Recipe
    from tfvllm.compress.steps import Workspace
    from tfvllm.compress.tasks.base import Task


def task_for(recipe: "Recipe", workspace: "Workspace") -> "Task[Any]":
    """The task of a recipe."""
    if recipe.task == "classify":
        from tfvllm.compress.tasks.classify import Classify

        return Classify(recipe, workspace)
    if recipe.task == "generate":
        from tfvllm.compress.tasks.generate import Generate

        return Generate(recipe, workspace)
    from tfvllm.compress.tasks.translate import Translate

    return Translate(recipe, workspace)
