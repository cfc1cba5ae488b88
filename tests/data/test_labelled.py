"""Reading labelled text."""

import csv
import gzip

import pytest

from tfvllm import data
from tfvllm.errors import InputError


def write(path, text, encoding="utf-8"):
    path.write_bytes(text.encode(encoding))
    return path


@pytest.mark.parametrize(
    ("content", "line", "said"),
    [
        ("sentence\tlabel\ngood\t1\nno label here\n", 3, "found no tab: 'no label here'"),
        ("sentence\tlabel\na\tb\tc\n", 2, "found 3 cells: 'a<TAB>b<TAB>c'"),
        ("sentence\tlabel\ngood\t1\nbad\t \n", 3, "an empty label"),
        ("sentence\tlabel\n  \t1\n", 2, "an empty sentence"),
        ("sentence\tlabel\ngood\t1\n\nbad\t0\n", 3, "found no tab: ''"),
        ("good\t1\nbad\t0\n", 1, "expected the header sentence<TAB>label, found 'good<TAB>1'"),
        ("", 1, "expected the header"),
        (
            "source\ttarget\nyes\t是\n",
            1,
            "found the header source<TAB>target of sentence pairs, which the task translate",
        ),
        ('"source"\t"target"\n"yes"\t"是"\n', 1, "of sentence pairs, which the task translate reads; change the task"),
        ("sentence\tlabel\ngood\t1\nb\0\t0\n", 3, "expected UTF-8 text, found a zero byte"),
    ],
)
def test_a_bad_row_is_named_by_file_and_line(tmp_path, content, line, said):
    path = write(tmp_path / "train.tsv", content)
    with pytest.raises(InputError) as caught:
        data.read_tsv(path)
    message = str(caught.value)
    assert message.startswith(f"{path}, line {line}: ")
    assert said in message
    assert "\n" not in message


def test_text_that_is_not_utf8_is_named_by_line(tmp_path):
    path = tmp_path / "train.tsv"
    path.write_bytes(b"sentence\tlabel\ngood\t1\ncaf\xe9\t1\n")
    with pytest.raises(InputError, match=r"line 3: expected UTF-8 text, found the byte 0xe9"):
        data.read_tsv(path)


def test_rows_keep_quotes_odd_line_separators_and_windows_line_ends(tmp_path):
    path = write(tmp_path / "a.tsv", '\ufeffsentence\tlabel\r\nhe said "no\t0\r\na\u0085b\u2028c\t1\r\n很好\t1\r\n')
    assert data.read_tsv(path) == [('he said "no', "0"), ("a\u0085b\u2028c", "1"), ("很好", "1")]


def test_the_columns_stand_in_any_order_and_the_file_may_be_packed(tmp_path):
    path = tmp_path / "a.tsv.gz"
    path.write_bytes(gzip.compress("label\tsentence\n1\t很好\n0\tnot “good”\n".encode()))
    assert data.read_tsv(path) == [("很好", "1"), ("not “good”", "0")]
    path.write_bytes(path.read_bytes()[:-12])
    with pytest.raises(InputError, match=r"a\.tsv\.gz: expected a whole gzip file, found a broken one"):
        data.read_tsv(path)


QUOTED = [('a "b" c', "x"), ("tab\there", "y"), ("line\nbreak", "x"), ("plain", "y"), ('"', "x"), ("很好", "y")]


@pytest.mark.parametrize("quoting", [csv.QUOTE_ALL, csv.QUOTE_NONNUMERIC, csv.QUOTE_MINIMAL])
@pytest.mark.parametrize("rows", [QUOTED, QUOTED[:2], [row for row in QUOTED if "\n" not in row[0]]])
def test_csv_quoting_is_read_and_said(tmp_path, rows, quoting):
    with (tmp_path / "train.tsv").open("w", encoding="utf-8", newline="") as file:
        csv.writer(file, delimiter="\t", quoting=quoting).writerows([("sentence", "label"), *rows])
    data.write_tsv(tmp_path / "dev.tsv", [("fine", "x")])
    assert data.read_tsv(tmp_path / "train.tsv") == rows
    note = "train.tsv has CSV quoting: the double quotes around its cells are not part of the text"
    assert data.load(tmp_path).notes == [note]


def test_sentences_that_all_stand_in_quotes_are_read_without_them(tmp_path):
    path = write(tmp_path / "a.tsv", 'sentence\tlabel\n"good film"\t1\n"he said ""no"""\t0\n')
    assert data.read_tsv(path) == [("good film", "1"), ('he said "no"', "0")]
    path = write(tmp_path / "b.tsv", 'sentence\tlabel\ngood film\t"up"\nbad\t"down"\n')  # or the labels
    assert data.read_tsv(path) == [("good film", "up"), ("bad", "down")]


@pytest.mark.parametrize(
    "rows",
    [
        ['"wow"', "plain"],  # nothing that needs quotes
        ['"good"', '"bad" and "worse"'],  # quotes inside that are not doubled
        ['"so ""fine"""', 'an 8" screen'],  # a bare cell with a quote
        ['"never closed', '"wow"'],
        ['"', '"wow"'],
    ],
)
def test_other_quotes_are_text_and_said(tmp_path, rows):
    for name in ("train", "dev"):
        path = write(tmp_path / f"{name}.tsv", "sentence\tlabel\n" + "".join(f"{s}\t{i}\n" for i, s in enumerate(rows)))
    assert [sentence for sentence, _ in data.read_tsv(path)] == rows
    wrapped = sum(len(s) > 1 and s[0] == s[-1] == '"' for s in rows)
    notes = [note for note in data.load(tmp_path).notes if "double quotes" in note]
    assert [note.partition(" stand")[0] for note in notes] == [
        f"{wrapped} of 2 sentences of {name}.tsv" for name in ("train", "dev")
    ]


def test_a_folder_is_loaded_with_label_names(tmp_path):
    write(tmp_path / "train.tsv", "sentence\tlabel\nfine\t10\nbad\t9\nok\t10\n")
    write(tmp_path / "dev.tsv", "sentence\tlabel\nworse\t9\n")
    loaded = data.load(tmp_path, names={"9": "negative"})
    assert loaded.labels == ["negative", "10"]  # 9 before 10: by number, not by letter
    assert loaded.train.labels == [1, 0, 1]
    assert loaded.dev.texts == ["worse"]
    assert loaded.test is None
    assert loaded.notes == []


def test_leaks_from_train_are_said(tmp_path):
    write(tmp_path / "train.tsv", "sentence\tlabel\nso fine\t1\nbad\t0\n")
    write(tmp_path / "dev.tsv", "sentence\tlabel\nsofine\t1\nnew\t0\n")
    assert data.load(tmp_path).notes == ["1 of 2 dev sentences also occur in train: the score flatters"]


def test_a_label_that_train_lacks_is_refused(tmp_path):
    write(tmp_path / "train.tsv", "sentence\tlabel\nfine\t1\nbad\t0\n")
    dev = write(tmp_path / "dev.tsv", "sentence\tlabel\nfine\t1\nbad\tx\n")
    with pytest.raises(InputError, match=r"dev.tsv, line 3: expected a label that occurs in train \(0, 1\), found 'x'"):
        data.load(tmp_path)
    dev.unlink()
    with pytest.raises(InputError, match=r"dev.tsv is missing; .* found train.tsv; name it with data.dev"):
        data.load(tmp_path)
    with pytest.raises(InputError, match=r"is missing; expected a folder with train\.tsv"):
        data.load(tmp_path / "nowhere")


def test_one_label_is_refused(tmp_path):
    path = write(tmp_path / "all.tsv", "sentence\tlabel\n" + "".join(f"s{i}\t1\n" for i in range(30)))
    with pytest.raises(InputError, match="at least two different labels, found only '1'"):
        data.load(path)


def test_one_file_is_split_without_a_sentence_on_two_sides(tmp_path):
    rows = [(f"sentence {i % 40}", i % 2) for i in range(80)]
    path = tmp_path / "all.tsv"
    data.write_tsv(path, rows)
    first, again, other = data.load(path, seed=3), data.load(path, seed=3), data.load(path, seed=4)
    sides = [set(split.texts) for split in (first.train, first.dev, first.test)]
    assert sum(map(len, sides)) == 40
    assert not (sides[0] & sides[1] or sides[0] & sides[2] or sides[1] & sides[2])
    assert len(first.train) + len(first.dev) + len(first.test) == 80
    assert [len(side) for side in sides] == [32, 4, 4]
    assert first.digest() == again.digest() != other.digest()
    data.write_tsv(path, rows[:4])
    with pytest.raises(InputError, match="expected enough different sentences"):
        data.load(path, dev_share=0.4)
    with pytest.raises(InputError, match=r"dev_share: expected a share above 0 and at most 0\.4, found 0\.5"):
        data.load(path, dev_share=0.5)


def test_the_digest_sees_texts_labels_and_names(tmp_path):
    digests = set()
    for sentence, label, names in (("a", 1, {}), ("b", 1, {}), ("a", 0, {}), ("a", 1, {"1": "up"})):
        data.write_tsv(tmp_path / "train.tsv", [("x", 0), ("y", 1)])
        data.write_tsv(tmp_path / "dev.tsv", [(sentence, label)])
        digests.add(data.load(tmp_path, names=names).digest())
    assert len(digests) == 4
