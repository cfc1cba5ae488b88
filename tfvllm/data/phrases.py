"""Synthetic phrases: a generator's English phrases with their Chinese translations, for models that translate."""

PHRASES_NOTE = "synthetic phrases, written by a generator (tfvllm.data.synthetic_phrases); no person wrote them"


def synthetic_phrases(count: int, seed: int) -> list[tuple[str, str]]:
    """Writes `count` different synthetic `(English, Chinese)` pairs, the same ones for the same `seed`."""
    raise NotImplementedError
