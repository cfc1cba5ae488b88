"""Labelled text: reading `sentence<TAB>label` files, and a maker of synthetic reviews.

A data set is a folder with `train.tsv`, `dev.tsv` and perhaps `test.tsv`, or one file that is split. Files are UTF-8,
one `sentence<TAB>label` a line under that header, split on `\\n` and the tab alone. Double quotes are text, unless the
whole file can only be meant as CSV quoting (what pandas and spreadsheets write); a note then says so.
"""

import csv
import io
import os
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from tfvllm.errors import InputError
from tfvllm.files import digest

HEADER = "sentence\tlabel"


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
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InputError(
            f"cannot read {path}: {error.strerror}; expected a file with the header sentence<TAB>label."
        ) from error
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise InputError(
            f"{path}, line {line}: expected UTF-8 text, found the byte 0x{content[error.start]:02x}; "
            "convert the file to UTF-8."
        ) from error
    lines = text.split("\n")
    if lines and not lines[-1]:
        lines.pop()
    header = lines[0].rstrip("\r") if lines else ""
    if '"' in text and (quoted := _csv_rows(text, lines)) is not None:
        return quoted, [f"{path.name} has CSV quoting: the double quotes around its cells are not part of the text"]
    if header != HEADER:
        raise InputError(
            f"{path}, line 1: expected the header sentence<TAB>label, found {_shown(header)}; add the header line."
        )
    rows = []
    for number, row in enumerate(lines[1:], start=2):
        cells = row.rstrip("\r").split("\t")
        if len(cells) != 2 or not cells[0].strip() or not cells[1].strip():
            if len(cells) != 2:
                found = f"{len(cells)} cells"
            else:
                found = f"an empty {'label' if cells[0].strip() else 'sentence'}"
            raise InputError(
                f"{path}, line {number}: expected sentence<TAB>label, found {found}: {_shown(row)}; "
                "mend or remove the line."
            )
        rows.append((cells[0], cells[1].strip()))
    if not rows:
        raise InputError(f"{path}: expected at least one row under the header, found none.")
    wrapped = sum(_wrapped(sentence) for sentence, _ in rows)
    if not wrapped:
        return rows, []
    return rows, [
        f"{wrapped} of {len(rows)} sentences of {path.name} stand in double quotes, which were kept as text: not every "
        "cell with a quote is quoted as in CSV"
    ]


def _wrapped(cell: str) -> bool:
    return len(cell) >= 2 and cell[0] == cell[-1] == '"'


def _csv_rows(text: str, lines: Sequence[str]) -> list[tuple[str, str]] | None:
    """The rows of a file that can only be meant as CSV with tabs; None for any other."""
    try:
        parsed = list(csv.reader(io.StringIO(text, newline=""), delimiter="\t", strict=True))
    except csv.Error:
        return None
    if not parsed or parsed[0] != HEADER.split("\t") or any(len(row) != 2 for row in parsed):
        return None
    if not all(cell.strip() for row in parsed for cell in row) or len(parsed) < 2:
        return None
    if len(parsed) != len(lines):  # line breaks inside of cells: nothing but quoting puts them there
        return [(sentence, label.strip()) for sentence, label in parsed[1:]]
    raw = [line.rstrip("\r").split("\t") for line in lines]
    cells = [cell for row in raw for cell in row if '"' in cell]
    whole_columns = len(raw[0]) == 2 and any(all(_wrapped(row[i]) for row in raw[1:] if len(row) == 2) for i in (0, 1))
    told = '"' in lines[0] or whole_columns or any('""' in cell[1:-1] for cell in cells) or any(len(r) > 2 for r in raw)
    # A reader of CSV passes over quotes inside of a bare cell; who writes CSV quotes every such cell.
    if not told or not all(_wrapped(cell) or len(row) > 2 for row in raw for cell in row if '"' in cell):
        return None
    return [(sentence, label.strip()) for sentence, label in parsed[1:]]


def write_tsv(path: str | os.PathLike, rows: Iterable[tuple[str, str | int]]) -> None:
    """Writes `(sentence, label)` pairs under the header.

    Example:
        >>> from tfvllm import data
        >>> data.write_tsv(folder / "dev.tsv", [("a fine film", 1)])
        >>> (folder / "dev.tsv").read_text().splitlines()
        ['sentence\\tlabel', 'a fine film\\t1']
    """
    body = "".join(f"{sentence}\t{label}\n" for sentence, label in rows)
    Path(path).write_text(f"{HEADER}\n{body}", encoding="utf-8", newline="\n")


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
        parts = _split(rows, dev_share, seed)
        files = {"train": path, "dev": path, "test": path}
        notes.append(f"{path.name} was split: dev and test are {dev_share:.0%} each, chosen by seed {seed}")
    elif path.is_dir():
        files = {"train": path / train, "dev": path / dev}
        if test is not None or (path / "test.tsv").is_file():
            files["test"] = path / (test or "test.tsv")
        for split, file in files.items():
            if not file.is_file():
                here = sorted(found.name for found in path.glob("*.tsv"))
                raise InputError(
                    f"{file} is missing; expected the {split} file in {path}, "
                    f"found {', '.join(here) or 'no .tsv file'}; name it with data.{split} in the recipe."
                )
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
    train_texts = {_plain(text) for text, _ in parts["train"]}
    for split in ("dev", "test"):
        repeated = sum(_plain(text) in train_texts for text, _ in parts.get(split, ()))
        if repeated:
            notes.append(f"{repeated} of {len(parts[split])} {split} sentences also occur in train: the score flatters")
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


def _split(rows: list[tuple[str, str]], share: float, seed: int) -> dict[str, list[tuple[str, str]]]:
    texts = sorted({text for text, _ in rows})
    random.Random(seed).shuffle(texts)
    count = max(1, round(len(texts) * share))
    if len(texts) < 2 * count + 2:
        raise InputError(
            f"expected enough different sentences to split off {share:.0%} twice, found {len(texts)}; "
            "give a folder with train.tsv and dev.tsv instead."
        )
    side = {text: "dev" if i < count else "test" if i < 2 * count else "train" for i, text in enumerate(texts)}
    return {name: [row for row in rows if side[row[0]] == name] for name in ("train", "dev", "test")}


def _numbers_first(label: str) -> tuple:
    return (0, int(label), "") if label.lstrip("-").isdigit() and label.isascii() else (1, 0, label)


def _plain(text: str) -> str:
    return "".join(text.split())


def _shown(line: str) -> str:
    line = line.rstrip("\r").replace("\t", "<TAB>")
    return repr(line if len(line) <= 60 else line[:57] + "...")
