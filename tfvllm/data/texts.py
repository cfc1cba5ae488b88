"""Texts to generate: documents, and prompts with their completions.

A `.txt` file is one document, kept as it is. A `.jsonl` file has one JSON object a line: `{"text": ...}`, a document,
or `{"prompt": ..., "completion": ...}`; other keys are passed over. A name may go on with `.gz`. A data set is a folder
with a train, a dev and perhaps a test file, or a folder of other files, or one file; the latter are split.
"""

import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tfvllm.data.reading import lines_of, listing, plain, read_text, refuse_names, shown, split_files
from tfvllm.data.splitting import check_share, repeated, said, split_rows
from tfvllm.errors import InputError
from tfvllm.files import digest

ENDINGS = (".txt", ".jsonl", ".txt.gz", ".jsonl.gz")
_LONG_PARAGRAPH = 40  # characters; shorter ones (headings, a name, "Yes.") recur in any text


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
        """Of each split, the UTF-8 bytes of what is learnt (no prompts): what bits per byte are counted over."""
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
    r"""Loads texts to generate: a folder of `.txt` and `.jsonl` files, or one such file.

    A folder with a train file (`train.txt`, `train.jsonl`) has a dev file too (`dev`, `valid`, `validation` or `val`)
    and perhaps a test file. Of any other folder all `.txt` and `.jsonl` files are read, in the order of their names,
    and split, as one file is: by whole documents; a single document into its first part (train), the next (dev) and
    its tail (test), cut after a paragraph where one ends nearby, else after a line. Windows line ends become `\n`.

    Args:
        path: a folder, or one file.
        train, dev, test: file names inside the folder. None takes the usual ones.
        dev_share: of what is split, the share that becomes dev and, again, the share that becomes test, in (0, 0.4].
        seed: which documents become dev and test (those that occur twice, or whose prompt does, stay on one side).

    Raises:
        InputError: a missing or empty file, an unknown ending, a bad row, or rows with prompts among rows without.

    Example:
        >>> from tfvllm import data
        >>> path = data.write_synthetic(folder / "stories", "stories", train=20, dev=4, test=4, seed=1)
        >>> found = data.load_texts(path)
        >>> len(found.train), found.train[0].prompt, found.num_bytes()["dev"] > 500
        (20, '', True)
    """
    path, asked = Path(path), {"train": train, "dev": dev, "test": test}
    notes: list[str] = []
    split: dict[str, Path] = {}
    if path.is_file():
        refuse_names(path, asked)
        files = [path]
    elif path.is_dir():
        split = split_files(path, asked, ENDINGS)
        files = list(split.values()) or _all_files(path)
    else:
        raise InputError(f"{path} is missing; expected a folder with train.txt or train.jsonl, or one such file.")

    read = [_read(file, notes) for file in files]
    _refuse_mixture(files, read)
    if split:
        parts = dict(zip(split, read, strict=True))
    else:
        if len(files) > 1:
            notes.append(f"all {len(files)} files of {path.name} were read: {listing(path, ENDINGS)}")
        where = files[0] if len(files) == 1 else path
        parts = _split([document for documents in read for document in documents], where, dev_share, seed, notes)
    notes += _leaks(parts)
    return Texts(parts["train"], parts["dev"], parts.get("test"), source=path.name, notes=notes)


def _all_files(folder: Path) -> list[Path]:
    here = sorted(folder.glob("[!.]*"), key=lambda file: file.name)
    if files := [file for file in here if file.is_file() and file.name.endswith(ENDINGS)]:
        return files
    found = ", ".join(file.name for file in here[:8]) or "an empty folder"
    raise InputError(
        f"{folder}: expected .txt or .jsonl files, found {found}; "
        "labelled sentences take the task classify, sentence pairs the task translate."
    )


def _read(file: Path, notes: list[str]) -> list[Document]:
    """The documents of a file."""
    name = file.name.removesuffix(".gz")
    if not name.endswith((".txt", ".jsonl")):
        hint = {
            ".tsv": "the tasks classify (sentence<TAB>label) and translate (source<TAB>target) read .tsv files",
            ".json": "write one JSON object a line, as .jsonl",
        }.get(Path(name).suffix, "convert the file")
        raise InputError(f"{file}: expected a .txt or .jsonl file, found {Path(name).suffix or 'no ending'}; {hint}.")
    text = read_text(file, "a .txt or .jsonl file")
    if not text.strip():
        raise InputError(f"{file}: expected text, found none; remove the file or fill it.")
    if name.endswith(".jsonl"):
        return [_row(file, number, line) for number, line in enumerate(lines_of(text), start=1)]
    if "\r\n" in text:
        text = text.replace("\r\n", "\n")
        notes.append(f"{file.name} has Windows line ends, which were read as plain ones")
    return [Document(text)]


def _row(file: Path, number: int, line: str) -> Document:
    """The document of one line of JSON."""
    where = f"{file}, line {number}"
    forms = '{"text": ...} or {"prompt": ..., "completion": ...}'
    try:
        row: Any = json.loads(line)
    except (ValueError, RecursionError) as error:
        why = f" ({error.msg} at column {error.colno})" if isinstance(error, json.JSONDecodeError) else ""
        raise InputError(
            f"{where}: expected one JSON object, {forms}, found {shown(line)}{why}; mend or remove the line."
        ) from None
    keys = [key for key in ("text", "prompt", "completion") if isinstance(row, dict) and key in row]
    if keys not in (["text"], ["prompt", "completion"]):
        found = f"an object with {', '.join(map(repr, row)) or 'no keys'}" if isinstance(row, dict) else shown(line)
        raise InputError(f"{where}: expected {forms}, found {found}; rename its keys.")
    for key in keys:
        value = row[key]
        if not isinstance(value, str):
            raise InputError(f"{where}: expected text as {key}, found {shown(json.dumps(value))}; mend the line.")
        if not value.strip():
            raise InputError(f"{where}: expected text as {key}, found none; mend or remove the line.")
        try:
            value.encode()
        except UnicodeEncodeError:
            raise InputError(
                f"{where}: expected text as {key}, found half of a surrogate pair; mend or remove the line."
            ) from None
    return Document(row["text"]) if keys == ["text"] else Document(row["completion"], prompt=row["prompt"])


def _refuse_mixture(files: Sequence[Path], read: Sequence[Sequence[Document]]) -> None:
    first = bool(read[0][0].prompt)
    for file, documents in zip(files, read, strict=True):
        for number, document in enumerate(documents, start=1):
            if bool(document.prompt) != first:
                forms = ("text", "prompt and completion")
                line = "" if file.name.removesuffix(".gz").endswith(".txt") else f", line {number}"
                raise InputError(
                    f"{file}{line}: expected {forms[first]} as in the first row of {files[0].name}, found "
                    f"{forms[not first]}; give either documents or prompts with their completions."
                )


def _split(
    documents: list[Document], path: Path, share: float, seed: int, notes: list[str]
) -> dict[str, list[Document]]:
    """Train, dev and test: whole documents, or the parts of a single one."""
    instead = "a folder with a train and a dev file"
    if len(documents) > 1 or documents[0].prompt:
        notes.append(said(path.name, share, seed))
        what = "prompts" if documents[0].prompt else "documents"
        return split_rows(documents, _keys(documents), share, seed, what=what, instead=instead)
    check_share(share)
    text = documents[0].text
    reach = int(len(text) * share / 2)
    cuts = [_end_nearby(text, round(len(text) * (1 - part * share)), reach) for part in (2, 1)]
    parts = {"train": text[: cuts[0]], "dev": text[cuts[0] : cuts[1]], "test": text[cuts[1] :]}
    if not all(part.strip() for part in parts.values()):
        raise InputError(
            f"{path}: expected enough text to split off {share:.0%} twice, found {len(text)} characters; "
            f"give {instead} instead."
        )
    notes.append(f"{path.name} was cut: dev is the {share:.0%} before the last {share:.0%}, which are test")
    return {name: [Document(part)] for name, part in parts.items()}


def _end_nearby(text: str, at: int, reach: int) -> int:
    """Where a paragraph, else a line, ends nearest to `at`, not farther than `reach`; else `at`."""
    for mark in ("\n\n", "\n"):
        starts = (text.rfind(mark, max(at - reach, 0), at), text.find(mark, at, at + reach))
        if ends := [start + len(mark) for start in starts if start >= 0]:
            return min(ends, key=lambda end: abs(end - at))
    return at


def _keys(documents: Iterable[Document]) -> list[str]:
    return [plain(document.prompt or document.text) for document in documents]


def _leaks(parts: dict[str, list[Document]]) -> list[str]:
    """Notes on what dev and test share with train: documents, or paragraphs where a side is a single document."""

    def keys(documents: Sequence[Document]) -> list[str]:
        if not paragraphs:
            return _keys(documents)
        found = [plain(paragraph) for document in documents for paragraph in document.text.split("\n\n")]
        return [paragraph for paragraph in found if len(paragraph) >= _LONG_PARAGRAPH]

    prompts = bool(parts["train"][0].prompt)
    paragraphs = not prompts and any(len(documents) == 1 for documents in parts.values())
    what = (
        "prompts" if prompts else f"paragraphs of {_LONG_PARAGRAPH} characters or more" if paragraphs else "documents"
    )
    others = {name: keys(documents) for name, documents in parts.items() if name != "train"}
    return repeated(what, keys(parts["train"]), others)
