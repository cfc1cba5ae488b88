"""One file that becomes train, dev and test."""

import random
from collections.abc import Iterable, Mapping, Sequence
from typing import TypeVar

from tfvllm.errors import InputError

Row = TypeVar("Row")


def split_rows(
    rows: Sequence[Row], keys: Sequence[str], share: float, seed: int, *, what: str, instead: str
) -> dict[str, list[Row]]:
    """The rows of train, dev and test: rows with the same key stay on one side.

    Args:
        rows: in file order, which they keep.
        keys: of each row.
        share: of the different keys, what becomes dev and, again, what becomes test, in (0, 0.4].
        seed: chooses the keys.
        what: the keys in the plural, for the refusal.
        instead: what to give instead of one file, for the refusal.

    Raises:
        InputError: a share out of its range, or too few different keys.
    """
    check_share(share)
    groups = sorted(set(keys))
    random.Random(seed).shuffle(groups)
    count = max(1, round(len(groups) * share))
    if len(groups) < 2 * count + 2:
        raise InputError(
            f"expected enough different {what} to split off {share:.0%} twice, found {len(groups)}; give {instead} "
            "instead."
        )
    side = {key: "dev" if i < count else "test" if i < 2 * count else "train" for i, key in enumerate(groups)}
    return {
        name: [row for row, key in zip(rows, keys, strict=True) if side[key] == name]
        for name in ("train", "dev", "test")
    }


def check_share(share: float) -> None:
    """Refuses a share of which train would have next to nothing."""
    if not 0 < share <= 0.4:
        raise InputError(f"dev_share: expected a share above 0 and at most 0.4, found {share}.")


def said(name: str, share: float, seed: int) -> str:
    """The note on a file that was split by `split_rows`."""
    return f"{name} was split: dev and test are {share:.0%} each, chosen by seed {seed}"


def repeated(what: str, train: Iterable[str], others: Mapping[str, Sequence[str]]) -> list[str]:
    """A note for each split of `others` of whose keys some occur in train."""
    known, notes = set(train), []
    for split, keys in others.items():
        if count := sum(key in known for key in keys):
            notes.append(f"{count} of {len(keys)} {split} {what} also occur in train: the score flatters")
    return notes
