"""Folders of synthetic data."""

import pytest

from tfvllm import data
from tfvllm.errors import InputError

LOAD = {"reviews": data.load, "stories": data.load_texts, "phrases": data.load_pairs}


@pytest.mark.parametrize("kind", LOAD)
def test_a_folder_says_that_it_is_synthetic_and_no_row_is_in_two_files(tmp_path, kind):
    folder = data.write_synthetic(tmp_path / "made", kind, train=60, dev=20, test=20, seed=3)
    readme = (folder / "README.md").read_text()
    assert readme.startswith(f"These are synthetic {kind}, written by a generator (tfvllm.data.synthetic_{kind})")
    assert "no person wrote them. Seed 3;" in readme
    loaded = LOAD[kind](folder)
    assert [len(split) for split in (loaded.train, loaded.dev, loaded.test)] == [60, 20, 20]
    assert loaded.notes == []
    again = data.write_synthetic(tmp_path / "again", kind, train=60, dev=20, test=20, seed=3)
    assert LOAD[kind](again).digest() == loaded.digest()
    lines = [line for file in folder.glob("t*") for line in file.read_text(encoding="utf-8").split("\n") if line]
    assert len(set(lines)) == len(lines) - (kind != "stories")  # the header


def test_what_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"kind: expected one of reviews, stories, phrases, found 'poems'"):
        data.write_synthetic(tmp_path / "made", "poems", train=6, dev=2, test=2, seed=3)
    assert not (tmp_path / "made").exists()


def test_no_test_file_where_it_would_be_empty(tmp_path):
    folder = data.write_synthetic(tmp_path / "made", "phrases", train=6, dev=2, test=0, seed=3)
    assert data.load_pairs(folder).test is None
