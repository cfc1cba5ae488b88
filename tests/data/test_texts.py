"""Reading texts to generate."""

import gzip
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tfvllm import data
from tfvllm.data import Document
from tfvllm.errors import InputError


def write(path, text):
    path.write_bytes(text.encode())
    return path


def jsonl(path, rows):
    return write(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def refused(path, **options):
    with pytest.raises(InputError) as caught:
        data.load_texts(path, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_folder_of_txt_files_is_kept_as_it_is(tmp_path):
    write(tmp_path / "train.txt", "\ufeffOne.\n\n Two,  three.\u2028\n")
    write(tmp_path / "valid.txt", "四。\r\n五。\r\n")
    found = data.load_texts(tmp_path)
    assert found.train == [Document("One.\n\n Two,  three.\u2028\n")]
    assert found.dev == [Document("四。\n五。\n")]
    assert found.test is None
    assert found.notes == ["valid.txt has Windows line ends, which were read as plain ones"]
    assert found.num_bytes() == {"train": 23, "dev": 14}
    assert found.source == tmp_path.name
    assert list(found.splits()) == ["train", "dev"]


def test_rows_with_prompts(tmp_path):
    rows = [{"prompt": f"{i} + 1 =", "completion": f" {i + 1}", "id": i} for i in range(5)]
    jsonl(tmp_path / "train.jsonl", rows[:3])
    jsonl(tmp_path / "dev.jsonl", [rows[2], rows[3]])
    jsonl(tmp_path / "test.jsonl", rows[4:])
    found = data.load_texts(tmp_path)
    assert found.train[1] == Document(" 2", prompt="1 + 1 =")
    assert found.notes == ["1 of 2 dev prompts also occur in train: the score flatters"]
    assert found.num_bytes() == {"train": 6, "dev": 4, "test": 2}  # prompts are not learnt


@given(st.text(st.sampled_from("ab \n"), max_size=300), st.floats(0.05, 0.4))
def test_one_text_is_cut_into_train_dev_and_test(tmp_path_factory, text, share):
    path = tmp_path_factory.mktemp("texts") / "a.txt"
    write(path, text)
    try:
        found = data.load_texts(path, dev_share=share)
    except InputError as error:
        assert "expected text, found none" in str(error) or "expected enough text" in str(error)
        return
    parts = [documents[0].text for documents in (found.train, found.dev, found.test)]
    assert "".join(parts) == text and all(part.strip() for part in parts)
    for part in parts[1:]:
        assert abs(len(part) - share * len(text)) <= share * len(text) + 4  # both ends move by half of it


def test_cuts_are_where_a_paragraph_ends_else_a_line(tmp_path):
    paragraphs = [f"Line {i}.\nAnd {i}.\n\n" for i in range(100)]
    found = data.load_texts(write(tmp_path / "a.txt", "".join(paragraphs)))
    assert found.dev[0].text == "".join(paragraphs[80:90])
    assert found.test[0].text == "".join(paragraphs[90:])
    assert found.notes == ["a.txt was cut: dev is the 10% before the last 10%, which are test"]
    found = data.load_texts(write(tmp_path / "a.txt", "".join(f"{i:03}\n" for i in range(100))))
    assert found.test[0].text.startswith("090\n")
    found = data.load_texts(write(tmp_path / "a.txt", "字" * 100))
    assert found.num_bytes() == {"train": 240, "dev": 30, "test": 30}


def test_whole_documents_are_split_by_seed(tmp_path):
    rows = [{"text": f"story {i % 50}"} for i in range(60)]
    path = jsonl(tmp_path / "all.jsonl", rows)
    found, other = data.load_texts(path, seed=1), data.load_texts(path, seed=2)
    sides = [{d.text for d in documents} for documents in found.splits().values()]
    assert [len(side) for side in sides] == [40, 5, 5]
    assert len(set.union(*sides)) == 50
    assert sum(map(len, found.splits().values())) == 60
    assert found.notes == ["all.jsonl was split: dev and test are 10% each, chosen by seed 1"]
    assert found.digest() == data.load_texts(path, seed=1).digest() != other.digest()


def test_all_files_of_a_folder_without_a_train_file_are_read(tmp_path):
    for i in range(20):
        write(tmp_path / f"{i:02}.txt", f"book {i}")
    jsonl(tmp_path / "20.jsonl", [{"text": "more"}, {"text": "yet more"}])
    write(tmp_path / "notes.md", "none")
    write(tmp_path / ".hidden.txt", "none")
    found = data.load_texts(tmp_path)
    assert sum(map(len, found.splits().values())) == 22
    kept = [d.text for d in found.train]
    assert kept == sorted(kept, key=[*(f"book {i}" for i in range(20)), "more", "yet more"].index)
    assert found.notes[0].startswith(f"all 21 files of {tmp_path.name} were read: 00.txt, ")


def test_names_may_be_given(tmp_path):
    for name in ("a", "b", "c"):
        write(tmp_path / f"{name}.txt", name * 9)
    found = data.load_texts(tmp_path, train="b.txt", dev="a.txt", test="c.txt")
    assert [documents[0].text[0] for documents in found.splits().values()] == ["b", "a", "c"]
    assert "d.txt is missing; expected the dev file" in refused(tmp_path, train="a.txt", dev="d.txt")
    assert "one file, which is split, found x.txt; give the folder" in refused(tmp_path / "a.txt", dev="x.txt")


def test_paragraphs_that_dev_shares_with_train_are_said(tmp_path):
    long = "The same paragraph of a fair length stands in both."
    write(tmp_path / "train.txt", f"One.\n\n{long}\n\nEnd.\n")
    write(tmp_path / "dev.txt", f"One.\n\n{long}\n\nAnother paragraph, which only dev has of the two files.\n")
    assert data.load_texts(tmp_path).notes == [
        "1 of 2 dev paragraphs of 40 characters or more also occur in train: the score flatters"
    ]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"text": "a"', "expected one JSON object, "),
        ("", "found ''"),
        ("[" * 100_000, "expected one JSON object"),
        ('"text"', 'expected {"text": ...} or {"prompt": ..., "completion": ...}, found \'"text"\'; rename its keys'),
        ('{"content": "a", "id": 3}', "found an object with 'content', 'id'; rename its keys"),
        ("{}", "found an object with no keys"),
        ('{"prompt": "a"}', "found an object with 'prompt'"),
        ('{"text": "a", "prompt": "b"}', "found an object with 'text', 'prompt'"),
        ('{"text": 3}', "expected text as text, found '3'"),
        ('{"text": " "}', "expected text as text, found none"),
        ('{"prompt": "a", "completion": ""}', "expected text as completion, found none"),
        ('{"text": "\\ud800"}', "found half of a surrogate pair"),
    ],
)
def test_a_bad_row_is_named_by_file_and_line(tmp_path, line, said):
    path = write(tmp_path / "a.jsonl", f'{{"text": "一"}}\n{line}\n')
    message = refused(path)
    assert message.startswith(f"{path}, line 2: ")
    assert said in message
    assert len(message) < len(str(path)) + 250


def test_documents_and_prompts_are_not_mixed(tmp_path):
    both = [{"text": "a"}, {"prompt": "b", "completion": "c"}]
    path = jsonl(tmp_path / "train.jsonl", both)
    said = "line 2: expected text as in the first row of train.jsonl, found prompt and completion"
    assert f"{path}, {said}; give either" in refused(path)
    jsonl(path, both[1:])
    write(tmp_path / "dev.txt", "text")
    assert "dev.txt: expected prompt and completion as in the first row of train.jsonl, found text" in refused(tmp_path)


def test_other_files_are_refused(tmp_path):
    assert "is missing; expected a folder with train.txt" in refused(tmp_path / "nowhere")
    assert "expected .txt or .jsonl files, found an empty folder" in refused(tmp_path)
    tsv = write(tmp_path / "train.tsv", "sentence\tlabel\n")
    assert "found train.tsv; labelled sentences take the task classify" in refused(tmp_path)
    assert "train.tsv: expected a .txt or .jsonl file, found .tsv; the tasks classify" in refused(tsv)
    assert "found .json; write one JSON object a line" in refused(write(tmp_path / "a.json", "[]"))
    assert "a.txt: expected text, found none" in refused(write(tmp_path / "a.txt", "\n \n"))
    (tmp_path / "a.txt").write_bytes("一\n二".encode("utf-16"))
    assert "a.txt, line 1: expected UTF-8 text, found the byte 0xff" in refused(tmp_path / "a.txt")
    (tmp_path / "a.txt").write_bytes("a\nb".encode("utf-16-le"))
    assert "a.txt, line 1: expected UTF-8 text, found a zero byte" in refused(tmp_path / "a.txt")
    assert "expected enough different documents to split off 10% twice, found 2" in refused(
        jsonl(tmp_path / "two.jsonl", [{"text": "a"}, {"text": "b"}])
    )
    assert "expected enough text to split off 10% twice, found 2 characters" in refused(write(tmp_path / "b.txt", "ab"))


def test_a_folder_needs_one_train_and_one_dev_file(tmp_path):
    write(tmp_path / "train.txt", "a")
    assert "expected a dev file (dev.txt, dev.jsonl, valid.txt, " in refused(tmp_path)
    write(tmp_path / "dev.txt", "b")
    write(tmp_path / "validation.txt", "b")
    assert "expected one dev file, found dev.txt and validation.txt; name one with data.dev" in refused(tmp_path)
    (tmp_path / "train.txt").unlink()
    assert "expected a train file (train.txt, train.jsonl), found dev.txt, validation.txt" in refused(
        tmp_path, dev="dev.txt"
    )


def test_files_may_be_packed(tmp_path):
    for name, text in (("train", "一二三"), ("val", "四五六")):
        (tmp_path / f"{name}.txt.gz").write_bytes(gzip.compress(text.encode()))
    found = data.load_texts(tmp_path)
    assert (found.train, found.dev) == ([Document("一二三")], [Document("四五六")])


@pytest.mark.data
def test_real_texts(data_dir):
    wiki = data.load_texts(data_dir / "wikitext2")
    assert wiki.notes == []
    assert wiki.num_bytes()["train"] == 10_797_148
    words = {name: len(documents[0].text.split()) for name, documents in wiki.splits().items()}
    assert words == {"train": 2_051_910, "dev": 213_886, "test": 241_211}
    plays = data.load_texts(data_dir / "tinyshakespeare" / "input.txt")
    assert sum(plays.num_bytes().values()) == 1_115_394
    assert plays.test[0].text.startswith("GREMIO:\nGood morrow, neighbour Baptista.\n")
