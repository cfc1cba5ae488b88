"""Folders of synthetic data that say so."""

import os
from pathlib import Path
from typing import Literal

from tfvllm.data.labelled import write_tsv
from tfvllm.data.phrases import PHRASES_NOTE
from tfvllm.data.reviews import SYNTHETIC_NOTE, synthetic_reviews
from tfvllm.data.stories import STORIES_NOTE
from tfvllm.files import new_directory

Kind = Literal["reviews", "stories", "phrases"]
SYNTHETIC_NOTES: dict[str, str] = {"reviews": SYNTHETIC_NOTE, "stories": STORIES_NOTE, "phrases": PHRASES_NOTE}


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
    """Writes train.tsv, dev.tsv, test.tsv and a README that says they are synthetic. No sentence is in two files.

    Example:
        >>> from tfvllm import data
        >>> path = data.write_synthetic(folder / "synthetic", train=6, dev=2, test=2, seed=1)
        >>> sorted(file.name for file in path.iterdir())
        ['README.md', 'dev.tsv', 'test.tsv', 'train.tsv']
    """
    with new_directory(directory, overwrite=overwrite) as partial:
        rows = synthetic_reviews(train + dev + test, seed)
        write_tsv(partial / "train.tsv", rows[:train])
        write_tsv(partial / "dev.tsv", rows[train : train + dev])
        write_tsv(partial / "test.tsv", rows[train + dev :])
        (partial / "README.md").write_text(
            f"These are {SYNTHETIC_NOTE}. Seed {seed}; label 1 positive, 0 negative.\n", encoding="utf-8"
        )
    return Path(directory)
