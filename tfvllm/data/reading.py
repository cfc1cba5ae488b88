"""The one reader of data files: UTF-8 text, its rows of two columns, and the train, dev and test files of a folder."""

import csv
import gzip
import io
import os
import zlib
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path

from tfvllm.errors import InputError

# What the files of a folder may be called, of the split that the key names.
SPLIT_NAMES = {"train": ("train",), "dev": ("dev", "valid", "validation", "val"), "test": ("test",)}
LABELLED_COLUMNS = ("sentence", "label")
PAIR_COLUMNS = ("source", "target")
_OTHER_TASK = {
    LABELLED_COLUMNS: "labelled sentences, which the task classify reads",
    PAIR_COLUMNS: "sentence pairs, which the task translate reads",
}


def read_text(path: Path, expected: str) -> str:
    """The text of a UTF-8 file, plain or packed with gzip (`.gz`), without a byte-order mark; line ends as they are.

    Args:
        path: the file.
        expected: what the file should have been, for the refusal.

    Raises:
        InputError: the file cannot be read, is not UTF-8, or holds zero bytes.
    """
    try:
        content = path.read_bytes()
        if path.suffix == ".gz":
            content = gzip.decompress(content)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise InputError(f"{path}: expected a whole gzip file, found a broken one ({error}); pack it anew.") from error
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}; expected {expected}.") from error
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        found, at = f"the byte 0x{error.object[error.start]:02x}", error.start
    else:
        if "\0" not in text:
            return text
        found, at = "a zero byte", content.index(b"\0")
    line = content[:at].count(b"\n") + 1
    raise InputError(f"{path}, line {line}: expected UTF-8 text, found {found}; convert the file to UTF-8.")


def lines_of(text: str) -> list[str]:
    r"""The lines of `text`, split on `\n` alone (texts hold other separators), without the `\r` of Windows."""
    lines = [line.rstrip("\r") for line in text.split("\n")]
    if not lines[-1]:
        lines.pop()
    return lines


def rows_of(
    path: Path, text: str, columns: tuple[str, str], *, header: bool
) -> tuple[list[tuple[str, str]], list[str]]:
    """The rows of a TSV file, in the order of `columns`, and what its reader should know of them.

    Where every cell with a double quote is quoted as in CSV, and some of them need not have been or have their quotes
    doubled, or the header is quoted, the quotes are taken off; else they are part of the text.

    Args:
        path: the file, for what is said of it.
        text: what it holds.
        columns: the names of the columns.
        header: does the first line have to name them, in any order? Else it may.

    Raises:
        InputError: no header where there must be one, a row without two cells that say something, or no row.
    """
    lines = lines_of(text)
    first = lines[0] if lines else ""
    if '"' in text and (quoted := _csv_rows(text, lines, columns, header)) is not None:
        return quoted, [f"{path.name} has CSV quoting: the double quotes around its cells are not part of the text"]
    named = tuple(first.split("\t"))
    if not _is_header(named, columns):
        _refuse_other_task(path, named, columns)
        if header:
            raise InputError(
                f"{path}, line 1: expected the header {'<TAB>'.join(columns)}, found {shown(first)}; "
                "add the header line."
            )
        named = ()
    rows = []
    for number, row in enumerate(lines[1:] if named else lines, start=2 if named else 1):
        cells = row.split("\t")
        if len(cells) != 2 or not cells[0].strip() or not cells[1].strip():
            if len(cells) != 2:
                found = f"{len(cells)} cells" if len(cells) > 1 else "no tab"
            else:
                found = f"an empty {(named or columns)[1 if cells[0].strip() else 0]}"
            raise InputError(
                f"{path}, line {number}: expected {'<TAB>'.join(named or columns)}, found {found}: {shown(row)}; "
                "mend or remove the line."
            )
        rows.append(_in_order(cells, named, columns))
    if not rows:
        under = " under the header" if named else ""
        raise InputError(f"{path}: expected at least one row{under}, found none.")
    wrapped = {name: sum(_wrapped(row[i]) for row in rows) for i, name in enumerate(columns)}
    return rows, [
        f"{count} of {len(rows)} {name}s of {path.name} stand in double quotes, which were kept as text: not every "
        "cell with a quote is quoted as in CSV"
        for name, count in wrapped.items()
        if count
    ]


def _is_header(row: Sequence[str], columns: tuple[str, str]) -> bool:
    return tuple(row) in (columns, columns[::-1])


def _in_order(cells: Sequence[str], named: Sequence[str], columns: tuple[str, str]) -> tuple[str, str]:
    return (cells[1], cells[0]) if named and named[0] != columns[0] else (cells[0], cells[1])


def _refuse_other_task(path: Path, named: tuple[str, ...], columns: tuple[str, str]) -> None:
    bare = tuple(name.strip('"') for name in named)
    if bare in _OTHER_TASK and bare != columns:
        raise InputError(
            f"{path}, line 1: expected {'<TAB>'.join(columns)}, found the header {'<TAB>'.join(bare)} of "
            f"{_OTHER_TASK[bare]}; change the task or the file."
        )


def _wrapped(cell: str) -> bool:
    return len(cell) >= 2 and cell[0] == cell[-1] == '"'


def _csv_rows(text: str, lines: Sequence[str], columns: tuple[str, str], header: bool) -> list[tuple[str, str]] | None:
    """The rows of a file that can only be meant as CSV with tabs; None for any other."""
    try:
        parsed = list(csv.reader(io.StringIO(text, newline=""), delimiter="\t", strict=True))
    except csv.Error:
        return None
    if not parsed or any(len(row) != 2 for row in parsed) or not all(cell.strip() for row in parsed for cell in row):
        return None
    named = parsed[0] if _is_header(parsed[0], columns) else ()
    if (header and not named) or tuple(parsed[0]) in set(_OTHER_TASK) - {columns}:
        return None
    body = [_in_order(row, named, columns) for row in (parsed[1:] if named else parsed)]
    if not body:
        return None
    if len(parsed) != len(lines):  # line breaks inside of cells: nothing but quoting puts them there
        return body
    raw = [line.split("\t") for line in lines]
    cells = [cell for row in raw for cell in row if '"' in cell]
    under = raw[1:] if named else raw
    whole_columns = len(raw[0]) == 2 and any(all(_wrapped(row[i]) for row in under if len(row) == 2) for i in (0, 1))
    told = (
        (bool(named) and '"' in lines[0])
        or whole_columns
        or any('""' in cell[1:-1] for cell in cells)
        or any(len(row) > 2 for row in raw)
    )
    # A reader of CSV passes over quotes inside of a bare cell; who writes CSV quotes every such cell.
    if not told or not all(_wrapped(cell) or len(row) > 2 for row in raw for cell in row if '"' in cell):
        return None
    return body


def write_rows(path: str | os.PathLike, columns: tuple[str, str], rows: Iterable[tuple[str, str | int]]) -> None:
    """Writes a TSV file with its header."""
    body = "".join(f"{first}\t{second}\n" for first, second in [columns, *rows])
    Path(path).write_text(body, encoding="utf-8", newline="\n")


def split_files(folder: Path, asked: Mapping[str, str | None], endings: Collection[str]) -> dict[str, Path]:
    """The train, dev and test files that a folder has: those `asked` for by name, else by the usual names.

    Raises:
        InputError: a file that was asked for is missing, a name is there twice, or there is a dev or test file but no
            train file, or a train file but no dev file.
    """
    found = {}
    for split, names in SPLIT_NAMES.items():
        if (name := asked[split]) is not None:
            file = folder / name
            if not file.is_file():
                raise InputError(missing(file, split, listing(folder, endings)))
            found[split] = file
            continue
        files = [file for name in names for ending in endings if (file := folder / f"{name}{ending}").is_file()]
        if len(files) > 1:
            raise InputError(
                f"{folder}: expected one {split} file, found {' and '.join(file.name for file in files)}; "
                f"name one with data.{split} in the recipe."
            )
        if files:
            found[split] = files[0]
    for split in ("train", "dev"):
        if found and split not in found:
            usual = [f"{name}{ending}" for name in SPLIT_NAMES[split] for ending in endings if ".gz" not in ending]
            raise InputError(
                f"{folder}: expected a {split} file ({', '.join(usual)}), found {listing(folder, endings)}; "
                f"name it with data.{split} in the recipe."
            )
    return found


def refuse_names(path: Path, asked: Mapping[str, str | None]) -> None:
    """Refuses the names of train, dev and test files where `path` is one file."""
    for split, name in asked.items():
        if name is not None:
            raise InputError(
                f"data.{split}: expected no file for {split}, since {path} is one file, which is split, found {name}; "
                "give the folder."
            )


def missing(file: Path, split: str, here: str) -> str:
    """What is said of the file of a split that is not there."""
    return (
        f"{file} is missing; expected the {split} file in {file.parent}, found {here}; "
        f"name it with data.{split} in the recipe."
    )


def listing(folder: Path, endings: Collection[str]) -> str:
    """The files of a folder that have one of the endings, for a refusal; at most eight."""
    names = sorted(file.name for file in folder.glob("[!.]*") if file.name.endswith(tuple(endings)))
    more = f" and {len(names) - 8} more" if len(names) > 8 else ""
    return ", ".join(names[:8]) + more if names else f"no {' or '.join(e for e in endings if '.gz' not in e)} file"


def plain(text: str) -> str:
    """`text` without blanks: two texts that differ in nothing else are the same to a model."""
    return "".join(text.split())


def shown(line: str) -> str:
    """A line as refusals quote it."""
    line = line.rstrip("\r").replace("\t", "<TAB>")
    return repr(line if len(line) <= 60 else line[:57] + "...")
