"""Synthetic stories: a generator's small stories, for models that generate."""

STORIES_NOTE = "synthetic stories, written by a generator (tfvllm.data.synthetic_stories); no person wrote them"


def synthetic_stories(count: int, seed: int) -> list[str]:
    """Writes `count` different synthetic stories, the same ones for the same `seed`."""
    raise NotImplementedError
