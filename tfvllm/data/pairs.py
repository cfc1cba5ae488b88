"""Sentence pairs to translate."""

import os
from dataclasses import dataclass, field

from tfvllm.files import digest


@dataclass(frozen=True)
class PairSplit:
    """Sentences and their translations, in file order."""

    sources: list[str]
    targets: list[str]

    def __len__(self) -> int:
        return len(self.sources)


@dataclass(frozen=True)
class Pairs:
    """`train`, `dev` and perhaps `test`; `source` is the name of the file or folder."""

    train: PairSplit
    dev: PairSplit
    test: PairSplit | None
    source: str
    notes: list[str] = field(default_factory=list)

    def splits(self) -> dict[str, PairSplit]:
        """The splits there are, by name."""
        return {"train": self.train, "dev": self.dev, **({"test": self.test} if self.test else {})}

    def digest(self) -> str:
        """A hash of every pair."""
        return digest(*[digest(split.sources, split.targets) for split in self.splits().values()])


def load_pairs(
    path: str | os.PathLike,
    *,
    train: str | None = None,
    dev: str | None = None,
    test: str | None = None,
    source: str | None = None,
    target: str | None = None,
    dev_share: float = 0.1,
    seed: int = 0,
) -> Pairs:
    """Loads sentence pairs: a folder of TSV files or of parallel files, or one TSV file that is split."""
    raise NotImplementedError
