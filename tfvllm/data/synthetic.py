"""Folders of synthetic data that say so."""

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from tfvllm.data.labelled import write_tsv
from tfvllm.data.phrases import PHRASES_NOTE, synthetic_phrases
from tfvllm.data.reading import PAIR_COLUMNS, write_rows
from tfvllm.data.reviews import SYNTHETIC_NOTE, synthetic_reviews
from tfvllm.data.stories import STORIES_NOTE, synthetic_stories
from tfvllm.errors import InputError
from tfvllm.files import new_directory

Kind = Literal["reviews", "stories", "phrases"]
SYNTHETIC_NOTES: dict[str, str] = {"reviews": SYNTHETIC_NOTE, "stories": STORIES_NOTE, "phrases": PHRASES_NOTE}


class _Made(NamedTuple):
    """How a kind is made, written and read."""

    rows: Callable[[int, int], Sequence[Any]]
    ending: str
    write: Callable[[Path, Sequence[Any]], None]
    reads: str


def _write_stories(path: Path, stories: Sequence[str]) -> None:
    body = "".join(json.dumps({"text": story}, ensure_ascii=False) + "\n" for story in stories)
    path.write_text(body, encoding="utf-8", newline="\n")


def _write_phrases(path: Path, rows: Sequence[tuple[str, str]]) -> None:
    write_rows(path, PAIR_COLUMNS, rows)


_MADE = {
    "reviews": _Made(synthetic_reviews, ".tsv", write_tsv, "label 1 positive, 0 negative"),
    "stories": _Made(synthetic_stories, ".jsonl", _write_stories, "a story a line"),
    "phrases": _Made(synthetic_phrases, ".tsv", _write_phrases, "source English, target Chinese"),
}


def write_synthetic(
    directory: str | os.PathLike,
    kind: Kind = "reviews",
    *,
    train: int,
    dev: int,
    test: int,
    seed: int,
    overwrite: bool = False,
) -> Path:
    """Writes train, dev and test files, and a README that says they are synthetic. No row is in two files.

    Args:
        directory: the folder that becomes.
        kind: "reviews" for `load`, "stories" for `load_texts` (`.jsonl`), "phrases" for `load_pairs` (TSV).
        train, dev, test: rows of each file; without any there is none.
        seed: of the generator.
        overwrite: replace a folder that is there.

    Raises:
        InputError: an unknown kind, or `directory` is there already.

    Example:
        >>> from tfvllm import data
        >>> path = data.write_synthetic(folder / "synthetic", train=6, dev=2, test=2, seed=1)
        >>> sorted(file.name for file in path.iterdir())
        ['README.md', 'dev.tsv', 'test.tsv', 'train.tsv']
    """
    if kind not in _MADE:
        raise InputError(f"kind: expected one of {', '.join(_MADE)}, found {kind!r}.")
    made = _MADE[kind]
    with new_directory(directory, overwrite=overwrite) as partial:
        rows = made.rows(train + dev + test, seed)
        parts = {"train": rows[:train], "dev": rows[train : train + dev], "test": rows[train + dev :]}
        for name, part in parts.items():
            if part:
                made.write(partial / f"{name}{made.ending}", part)
        (partial / "README.md").write_text(
            f"These are {SYNTHETIC_NOTES[kind]}. Seed {seed}; {made.reads}.\n", encoding="utf-8"
        )
    return Path(directory)
