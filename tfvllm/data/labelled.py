"""Labelled text: reading and writing `sentence<TAB>label` files.

A data set is a folder with `train.tsv`, `dev.tsv` and perhaps `test.tsv`, or one file that is split. Files are UTF-8,
one `sentence<TAB>label` a line under that header (or both the other way round), split on `\\n` and the tab alone.
Double quotes are text, unless the whole file can only be meant as CSV quoting (what pandas and spreadsheets write); a
note then says so.
"""

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from tfvllm.data.reading import LABELLED_COLUMNS, listing, missing, plain, read_text, rows_of, write_rows
from tfvllm.data.splitting import repeated, said, split_rows
from tfvllm.errors import InputError
from tfvllm.files import digest

HEADER = "\t".join(LABELLED_COLUMNS)


@dataclass(frozen=True)
class Split:
    """Sentences and their label indices (into the data set's `labels`), in file order."""

    texts: list[str]
    labels: list[int]

    def __len__(self) -> int:
        return len(self.texts)


@dataclass(frozen=True)
class TextData:
    """`train`, `dev` and perhaps `test`; `labels[i]` is the name of label index i, `keys[i]` what the files call it."""

    train: Split
    dev: Split
    test: Split | None
    labels: list[str]
    source: str
    notes: list[str] = field(default_factory=list)
    keys: list[str] = field(default_factory=list)

    def digest(self) -> str:
        """A hash of every sentence, label and label name."""
        splits = [self.train, self.dev, *([self.test] if self.test else [])]
        return digest(self.labels, *[digest(*split.texts, split.labels) for split in splits])

    def in_order(self, order: Sequence[str]) -> "TextData":
        """The same data with its labels in `order`, given as shown or as the files write them.

        Raises:
            InputError: `order` does not name every label once.
        """
        shown, written = list(self.labels), list(self.keys or self.labels)
        for names in (shown, written, *([name.casefold() for name in found] for found in (shown, written))):
            asked = list(order) if names is shown or names is written else [name.casefold() for name in order]
            if sorted(asked) == sorted(names) and len(set(names)) == len(names):
                break
        else:
            raise InputError(f"expected every label of the data once ({', '.join(shown)}), found {', '.join(order)}.")
        old = [names.index(name) for name in asked]
        new = {index: i for i, index in enumerate(old)}

        def renumbered(split: Split) -> Split:
            return Split(split.texts, [new[label] for label in split.labels])

        return replace(
            self,
            train=renumbered(self.train),
            dev=renumbered(self.dev),
            test=renumbered(self.test) if self.test else None,
            labels=[shown[index] for index in old],
            keys=[written[index] for index in old],
        )


def read_tsv(path: str | os.PathLike) -> list[tuple[str, str]]:
    """Reads `(sentence, label)` pairs. A bad row raises InputError naming the file, the line and what was expected.

    Where every cell with a double quote is quoted as in CSV, and some of them need not have been or have their quotes
    doubled, or the header is quoted, the quotes are taken off; else they are part of the text.

    Example:
        >>> from tfvllm import data
        >>> data.write_tsv(folder / "train.tsv", [("a fine film", 1), ("dull", 0)])
        >>> data.read_tsv(folder / "train.tsv")
        [('a fine film', '1'), ('dull', '0')]
    """
    return _read(Path(path))[0]


def _read(path: Path) -> tuple[list[tuple[str, str]], list[str]]:
    """The pairs of a file, and what its reader should know of them."""
    text = read_text(path, "a file with the header sentence<TAB>label")
    rows, notes = rows_of(path, text, LABELLED_COLUMNS, header=True)
    return [(sentence, label.strip()) for sentence, label in rows], notes


def write_tsv(path: str | os.PathLike, rows: Iterable[tuple[str, str | int]]) -> None:
    """Writes `(sentence, label)` pairs under the header.

    Example:
        >>> from tfvllm import data
        >>> data.write_tsv(folder / "dev.tsv", [("a fine film", 1)])
        >>> (folder / "dev.tsv").read_text().splitlines()
        ['sentence\\tlabel', 'a fine film\\t1']
    """
    write_rows(path, LABELLED_COLUMNS, rows)


def load(
    path: str | os.PathLike,
    *,
    train: str = "train.tsv",
    dev: str = "dev.tsv",
    test: str | None = None,
    dev_share: float = 0.1,
    seed: int = 0,
    names: dict[str, str] | None = None,
) -> TextData:
    """Loads a folder of TSV files, or one file that is split.

    Args:
        path: a folder, or one TSV file.
        train, dev, test: file names inside the folder. `test=None` takes `test.tsv` where it exists.
        dev_share: of one file, the share that becomes dev and, again, the share that becomes test, in (0, 0.4].
        seed: how one file is split (sentences that occur twice stay on one side).
        names: label in the file -> name to show. Labels without a name keep their own.

    Raises:
        InputError: a missing file, a bad row, a single label, or a dev/test label that train lacks.

    Example:
        >>> from tfvllm import data
        >>> path = data.write_synthetic(folder / "reviews", train=20, dev=4, test=4, seed=1)
        >>> found = data.load(path, names={"0": "negative", "1": "positive"})
        >>> len(found.train.texts), found.labels
        (20, ['negative', 'positive'])
    """
    path = Path(path)
    notes: list[str] = []
    if path.is_file():
        rows, told = _read(path)
        notes += told
        parts = split_rows(
            rows,
            [sentence for sentence, _ in rows],
            dev_share,
            seed,
            what="sentences",
            instead="a folder with train.tsv and dev.tsv",
        )
        files = {"train": path, "dev": path, "test": path}
        notes.append(said(path.name, dev_share, seed))
    elif path.is_dir():
        files = {"train": path / train, "dev": path / dev}
        if test is not None or (path / "test.tsv").is_file():
            files["test"] = path / (test or "test.tsv")
        for split, file in files.items():
            if not file.is_file():
                raise InputError(missing(file, split, listing(path, [".tsv"])))
        parts = {}
        for split, file in files.items():
            parts[split], told = _read(file)
            notes += told
    else:
        raise InputError(f"{path} is missing; expected a folder with {train} and {dev}, or one TSV file.")

    known = sorted({label for _, label in parts["train"]}, key=_numbers_first)
    if len(known) < 2:
        raise InputError(f"{files['train']}: expected at least two different labels, found only {known[0]!r}.")
    index = {label: i for i, label in enumerate(known)}
    for split, rows in parts.items():
        for number, (_, label) in enumerate(rows, start=2):
            if label not in index:
                raise InputError(
                    f"{files[split]}, line {number}: expected a label that occurs in train ({', '.join(known)}), "
                    f"found {label!r}."
                )
    names = names or {}
    unused = sorted(set(names) - set(known))
    if unused:
        notes.append(f"label names without a label in the data: {', '.join(unused)}")
    train_texts, *others = [[plain(text) for text, _ in rows] for rows in parts.values()]
    notes += repeated("sentences", train_texts, dict(zip(list(parts)[1:], others, strict=True)))
    splits = {
        split: Split([text for text, _ in rows], [index[label] for _, label in rows]) for split, rows in parts.items()
    }
    return TextData(
        splits["train"],
        splits["dev"],
        splits.get("test"),
        [names.get(label, label) for label in known],
        source=path.name,
        notes=notes,
        keys=known,
    )


def _numbers_first(label: str) -> tuple:
    return (0, int(label), "") if label.lstrip("-").isdigit() and label.isascii() else (1, 0, label)
