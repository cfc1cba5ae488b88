"""One SavedModel with several variants of a graph: measured by the shape of requests, chosen by it at run time."""

__all__ = ["branch", "decision_tree", "driver", "measure", "requests", "variants"]
