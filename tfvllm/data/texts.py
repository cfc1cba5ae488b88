"""Texts to generate: documents, and prompts with their completions."""

import os
from dataclasses import dataclass, field

from tfvllm.files import digest


@dataclass(frozen=True)
class Document:
    """`text` is what is learnt. Where there is a `prompt`, `text` completes it, and only `text` counts for the loss."""

    text: str
    prompt: str = ""


@dataclass(frozen=True)
class Texts:
    """`train`, `dev` and perhaps `test`; `source` is the name of the file or folder."""

    train: list[Document]
    dev: list[Document]
    test: list[Document] | None
    source: str
    notes: list[str] = field(default_factory=list)

    def splits(self) -> dict[str, list[Document]]:
        """The splits there are, by name."""
        return {"train": self.train, "dev": self.dev, **({"test": self.test} if self.test else {})}

    def num_bytes(self) -> dict[str, int]:
        """Of each split, the UTF-8 bytes of what is learnt: what bits per byte are counted over."""
        return {name: sum(len(d.text.encode()) for d in documents) for name, documents in self.splits().items()}

    def digest(self) -> str:
        """A hash of every text and prompt."""
        return digest(*[digest(*[(d.text, d.prompt) for d in documents]) for documents in self.splits().values()])


def load_texts(
    path: str | os.PathLike,
    *,
    train: str | None = None,
    dev: str | None = None,
    test: str | None = None,
    dev_share: float = 0.1,
    seed: int = 0,
) -> Texts:
    """Loads texts to generate: a folder of files, or one file that is split."""
    raise NotImplementedError
