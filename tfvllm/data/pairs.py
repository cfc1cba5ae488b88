"""Sentence pairs to translate.

A TSV file has one `source<TAB>target` a line; a first line that says so, in any order, is its header. Double quotes are
text, unless the whole file can only be meant as CSV quoting. Or line n of one file is translated by line n of
another, and the two are named by their languages: `train.de`, `train.en`. A name may go on with `.gz`.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tfvllm.data.reading import (
    PAIR_COLUMNS,
    SPLIT_NAMES,
    lines_of,
    listing,
    plain,
    read_text,
    refuse_names,
    rows_of,
    shown,
    split_files,
)
from tfvllm.data.splitting import repeated, said, split_rows
from tfvllm.errors import InputError
from tfvllm.files import digest

ENDINGS = (".tsv", ".txt", ".tsv.gz", ".txt.gz")
# The third column of what manythings.org gives out of Tatoeba's sentences.
_ATTRIBUTION = "CC-BY"


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
    """Loads sentence pairs: a folder of TSV files or of parallel files, or one TSV file that is split.

    Args:
        path: a folder, or one TSV file (`.tsv`; `.txt` will do).
        train, dev, test: file names inside the folder, of parallel files without the language (`train` for `train.de`
            and `train.en`). None takes the usual names: train; dev, valid, validation or val; test.
        source, target: languages as parallel files end in them. With TSV files, the names of the columns in their
            header, which they then need.
        dev_share: of one file, the share that becomes dev and, again, the share that becomes test, in (0, 0.4].
        seed: how one file is split (pairs that share a source or a target stay on one side).

    Raises:
        InputError: a missing or empty file, an unknown ending, a bad row, or parallel files that differ in length.

    Example:
        >>> from tfvllm import data
        >>> path = data.write_synthetic(folder / "phrases", "phrases", train=20, dev=4, test=4, seed=1)
        >>> found = data.load_pairs(path)
        >>> len(found.train), len(found.train.targets)
        (20, 20)
    """
    path, asked = Path(path), {"train": train, "dev": dev, "test": test}
    if (source is None) != (target is None) or (source is not None and source == target):
        raise InputError(
            f"expected two different languages as data.source and data.target, or neither, found {source} and {target}."
        )
    languages = (source, target) if source is not None and target is not None else None
    notes: list[str] = []
    if path.is_file():
        refuse_names(path, asked)
        rows = _read(path, languages, notes)
        parts = split_rows(
            rows, _groups(rows), dev_share, seed, what="sentences", instead="a folder with train.tsv and dev.tsv"
        )
        notes.append(said(path.name, dev_share, seed))
    elif path.is_dir():
        parallel = _parallel_files(path, asked, languages) if languages else {}
        if parallel:
            parts = {split: _read_parallel(*files) for split, files in parallel.items()}
        else:
            files = split_files(path, asked, ENDINGS)
            if not files:
                raise InputError(_nothing(path, languages))
            parts = {split: _read(file, languages, notes) for split, file in files.items()}
    else:
        raise InputError(f"{path} is missing; expected a folder with train.tsv and dev.tsv, or one TSV file.")
    sources = {split: [plain(row[0]) for row in rows] for split, rows in parts.items()}
    notes += repeated("sources", sources.pop("train"), sources)
    splits = {split: PairSplit([s for s, _ in rows], [t for _, t in rows]) for split, rows in parts.items()}
    return Pairs(splits["train"], splits["dev"], splits.get("test"), source=path.name, notes=notes)


def _read(file: Path, languages: tuple[str, str] | None, notes: list[str]) -> list[tuple[str, str]]:
    """The pairs of a TSV file."""
    if not file.name.endswith(ENDINGS):
        ending = Path(file.name.removesuffix(".gz")).suffix
        hint = "; .jsonl files hold texts, which the task generate reads" if ending == ".jsonl" else ""
        raise InputError(
            f"{file}: expected a .tsv file with source<TAB>target, or a folder of parallel files with data.source and "
            f"data.target, found {ending or 'no ending'}{hint}."
        )
    text = read_text(file, "a file of source<TAB>target")
    lines = lines_of(text)
    cells = [line.split("\t") for line in lines]
    if cells and all(len(row) == 3 and row[2].startswith(_ATTRIBUTION) for row in cells):
        text = "".join(f"{source}\t{target}\n" for source, target, _ in cells)
        notes.append(f"{file.name} has a third column, the attribution of each pair, which was left out")
    rows, told = rows_of(file, text, languages or PAIR_COLUMNS, header=languages is not None)
    notes += told
    labels = sorted({target for _, target in rows})
    if len(rows) >= 20 and len(labels) <= 5 and not any(" " in label for label in labels):
        raise InputError(
            f"{file}: expected source<TAB>translation, found {len(rows)} rows with nothing but {', '.join(labels)} in "
            "the second column. Labelled sentences are for task: classify."
        )
    return rows


def _parallel_files(
    folder: Path, asked: dict[str, str | None], languages: tuple[str, str]
) -> dict[str, tuple[Path, Path]]:
    """The two files of each split; nothing where there are none at all."""
    found = {}
    for split, usual in SPLIT_NAMES.items():
        name = asked[split]
        there = {}
        for stem in usual if name is None else (name,):
            sides = [_either(folder / f"{stem}.{language}") for language in languages]
            if any(sides):
                there[stem] = sides
        if len(there) > 1:
            raise InputError(
                f"{folder}: expected one pair of {split} files, found those of {' and '.join(there)}; "
                f"name one with data.{split} in the recipe."
            )
        for stem, (first, second) in there.items():
            if first is None or second is None:
                lacks, has = languages if first is None else languages[::-1]
                raise InputError(
                    f"{folder / stem}.{lacks} is missing; expected it beside {stem}.{has}, line by line; add it."
                )
            found[split] = (first, second)
        if not there and name is not None and found:
            raise InputError(
                f"{folder / name}.{languages[0]} is missing; expected the {split} files in {folder}, found "
                f"{_endings_found(folder, languages)}; name them with data.{split} in the recipe."
            )
    for split in ("train", "dev"):
        if found and split not in found:
            wanted = " or ".join(f"{stem}.{languages[0]}" for stem in SPLIT_NAMES[split])
            raise InputError(
                f"{folder}: expected {split} files ({wanted}), found {_endings_found(folder, languages)}; "
                f"name them with data.{split} in the recipe, without the language."
            )
    return found


def _either(file: Path) -> Path | None:
    """The file, or the one packed with gzip."""
    return next((found for found in (file, file.with_name(f"{file.name}.gz")) if found.is_file()), None)


def _endings_found(folder: Path, languages: Sequence[str]) -> str:
    return listing(folder, [f".{language}{packed}" for language in languages for packed in ("", ".gz")])


def _read_parallel(source: Path, target: Path) -> list[tuple[str, str]]:
    """The pairs of two files, line by line."""
    sides = [lines_of(read_text(file, "a sentence a line")) for file in (source, target)]
    for file, side, lines in ((source, "source", sides[0]), (target, "target", sides[1])):
        if not lines:
            raise InputError(f"{file}: expected a {side} sentence a line, found none.")
    if len(sides[0]) != len(sides[1]):
        longer, shorter = (source, target) if len(sides[0]) > len(sides[1]) else (target, source)
        most, least = sorted(map(len, sides), reverse=True)
        extra = shown(max(sides, key=len)[least])
        raise InputError(
            f"{longer}, line {least + 1}: expected as many lines as {shorter.name}, which has {least}, found {most}, "
            f"the first of them without a counterpart {extra}; one line has to translate one line."
        )
    for number, pair in enumerate(zip(*sides, strict=True), start=1):
        for file, other, sentence in ((source, target, pair[0]), (target, source, pair[1])):
            if not sentence.strip():
                raise InputError(
                    f"{file}, line {number}: expected a sentence, found an empty line; "
                    f"mend it, or remove the line here and in {other.name}."
                )
    return list(zip(*sides, strict=True))


def _nothing(folder: Path, languages: tuple[str, str] | None) -> str:
    """What is said of a folder without a pair to read."""
    found = sorted(file.name for file in folder.glob("[!.]*"))
    parallel = sorted({Path(name.removesuffix(".gz")).suffix[1:] for name in found if name.startswith("train.")})
    hint = ""
    if languages is None and len(parallel) == 2 and not {"txt", "jsonl", "json"} & set(parallel):
        hint = f" Set data.source and data.target to {parallel[0]} and {parallel[1]}, or the other way round."
    elif languages is None and any(name.endswith((".jsonl", ".jsonl.gz")) for name in found):
        hint = " .jsonl files hold texts, which the task generate reads."
    expected = "train.tsv and dev.tsv"
    if languages is not None:
        expected = f"train.{languages[0]} and train.{languages[1]}, or {expected}"
    here = ", ".join(found[:8]) or "an empty folder"
    return f"{folder}: expected {expected}, found {here}; give one TSV file to have it split.{hint}"


def _groups(rows: Sequence[tuple[str, str]]) -> list[str]:
    """A key for each pair: pairs that share a source or a target, directly or through others, have the same one."""
    leader: dict[str, str] = {}

    def lead(key: str) -> str:
        while (above := leader.setdefault(key, key)) != key:
            leader[key] = leader[above]
            key = above
        return key

    for source, target in rows:
        first, second = lead(f"s{plain(source)}"), lead(f"t{plain(target)}")
        leader[max(first, second)] = min(first, second)
    return [lead(f"s{plain(source)}") for source, _ in rows]
