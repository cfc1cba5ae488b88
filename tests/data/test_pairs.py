"""Reading sentence pairs to translate."""

import csv
import gzip

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tfvllm import data
from tfvllm.data import PairSplit
from tfvllm.errors import InputError


def write(path, text):
    path.write_bytes(text.encode())
    return path


def tsv(path, rows, header=True):
    return write(path, "".join(f"{s}\t{t}\n" for s, t in [("source", "target"), *rows][0 if header else 1 :]))


def refused(path, **options):
    with pytest.raises(InputError) as caught:
        data.load_pairs(path, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


ROWS = [("Good morning.", "早上好。"), ("Two cups of tea.", "两杯茶。"), ("May 3, 2024", "2024年5月3日")]


@pytest.mark.parametrize("header", [True, False])
def test_a_folder_of_tsv_files(tmp_path, header):
    tsv(tmp_path / "train.tsv", ROWS, header)
    tsv(tmp_path / "dev.tsv", [("good  morning.", "早。"), ("Two cups of  tea.", "茶两杯。")], header)
    found = data.load_pairs(tmp_path)
    assert found.train == PairSplit([s for s, _ in ROWS], [t for _, t in ROWS])
    assert found.test is None
    assert (len(found.dev), found.source) == (2, tmp_path.name)
    assert found.notes == ["1 of 2 dev sources also occur in train: the score flatters"]


def test_a_header_gives_the_direction(tmp_path):
    write(tmp_path / "train.tsv", "target\tsource\n你好。\tHello.\n")
    write(tmp_path / "dev.tsv", "Bye.\t再见。\r\n")
    found = data.load_pairs(tmp_path)
    assert (found.train.sources, found.dev.sources, found.dev.targets) == (["Hello."], ["Bye."], ["再见。"])
    for name in ("train", "dev"):
        write(tmp_path / f"{name}.tsv", f"en\tzh\n{name}\t一\n")
    assert data.load_pairs(tmp_path, source="zh", target="en").train == PairSplit(["一"], ["train"])
    assert "line 1: expected the header en<TAB>de, found 'en<TAB>zh'" in refused(tmp_path, source="en", target="de")


def test_parallel_files(tmp_path):
    for name, count in (("train", 3), ("val", 2), ("test_2016", 1)):
        for language in ("de", "en"):
            write(tmp_path / f"{name}.{language}", "".join(f'{language} "{i}"\tä\u2028\r\n' for i in range(count)))
    found = data.load_pairs(tmp_path, source="de", target="en", test="test_2016")
    assert found.train.sources[2] == 'de "2"\tä\u2028' and found.train.targets[2] == 'en "2"\tä\u2028'
    assert {name: len(split) for name, split in found.splits().items()} == {"train": 3, "dev": 2, "test": 1}
    back = data.load_pairs(tmp_path, source="en", target="de")
    assert (back.train.sources, back.test) == (found.train.targets, None)
    assert back.digest() != found.digest()
    assert "Set data.source and data.target to de and en" in refused(tmp_path)
    assert "test.de is missing; expected the test files" in refused(tmp_path, source="de", target="en", test="test")
    assert "expected train.fr and train.es, or train.tsv" in refused(tmp_path, source="fr", target="es")
    assert "train.fr is missing; expected it beside train.de" in refused(tmp_path, source="de", target="fr")
    assert "expected two different languages" in refused(tmp_path, source="de")
    assert "expected two different languages" in refused(tmp_path, source="de", target="de")
    write(tmp_path / "dev.de", "x\n"), write(tmp_path / "dev.en", "x\n")
    assert "found those of dev and val; name one with data.dev" in refused(tmp_path, source="de", target="en")
    for name in ("dev", "val"):
        (tmp_path / f"{name}.de").unlink(), (tmp_path / f"{name}.en").unlink()
    assert "expected dev files (dev.de or valid.de or" in refused(tmp_path, source="de", target="en")


def test_parallel_files_that_do_not_match(tmp_path):
    for name in ("train", "dev"):
        write(tmp_path / f"{name}.de", "eins\nzwei\n")
        write(tmp_path / f"{name}.en", "one\ntwo\n")
    languages = {"source": "de", "target": "en"}
    write(tmp_path / "dev.en", "one\ntwo\nthree\n")
    assert refused(tmp_path, **languages).startswith(
        f"{tmp_path / 'dev.en'}, line 3: expected as many lines as dev.de, which has 2, found 3, the first of them "
        "without a counterpart 'three'"
    )
    write(tmp_path / "dev.en", "one\n \n")
    assert f"{tmp_path / 'dev.en'}, line 2: expected a sentence, found an empty line; mend it, or remove the line here "
    assert "and in dev.de" in refused(tmp_path, **languages)
    write(tmp_path / "dev.en", "")
    assert "dev.en: expected a target sentence a line, found none" in refused(tmp_path, **languages)
    (tmp_path / "dev.en").write_bytes(b"one\nna\xefve\n")
    assert "dev.en, line 2: expected UTF-8 text, found the byte 0xef" in refused(tmp_path, **languages)


@given(st.lists(st.tuples(st.integers(0, 30), st.integers(0, 200)), min_size=20, max_size=80), st.integers(0, 5))
def test_one_file_is_split_without_a_sentence_on_two_sides(tmp_path_factory, numbers, seed):
    rows = [(f"source {s}", f"目标{t}") for s, t in numbers]
    path = tsv(tmp_path_factory.mktemp("pairs") / "all.tsv", rows, header=False)
    try:
        found = data.load_pairs(path, seed=seed)
    except InputError as error:
        few = "expected enough different sentences to split off 10% twice"
        assert few in str(error) or "in the second column. Labelled" in str(error)  # a few targets look like labels
        return
    splits = list(found.splits().values())
    assert sorted(row for split in splits for row in zip(split.sources, split.targets, strict=True)) == sorted(rows)
    for side in ("sources", "targets"):
        assert sum(len(set(getattr(split, side))) for split in splits) == len({row[side == "targets"] for row in rows})
    assert found.notes == [f"all.tsv was split: dev and test are 10% each, chosen by seed {seed}"]
    assert found.digest() == data.load_pairs(path, seed=seed).digest()


@pytest.mark.parametrize("header", [True, False])
@pytest.mark.parametrize("quoting", [csv.QUOTE_ALL, csv.QUOTE_MINIMAL])
def test_csv_quoting_is_read_and_said(tmp_path, header, quoting):
    rows = [('He said "no".', "他说“不”。"), ("a\ttab", "制表符"), ("plain", "纯文本")]
    with (tmp_path / "train.tsv").open("w", encoding="utf-8", newline="") as file:
        csv.writer(file, delimiter="\t", quoting=quoting).writerows([*[("source", "target")] * header, *rows])
    tsv(tmp_path / "dev.tsv", [("dev", "开发")])
    found = data.load_pairs(tmp_path)
    assert list(zip(found.train.sources, found.train.targets, strict=True)) == rows
    assert found.notes == ["train.tsv has CSV quoting: the double quotes around its cells are not part of the text"]


def test_other_quotes_are_text_and_said(tmp_path):
    tsv(tmp_path / "train.tsv", [('"No," he said.', "他说"), ('"Yes."', '"是"'), ("so", '"so"')], header=False)
    tsv(tmp_path / "dev.tsv", [("dev", "开发")])
    found = data.load_pairs(tmp_path)
    assert found.train.sources == ['"No," he said.', '"Yes."', "so"]
    assert [note.partition(" stand")[0] for note in found.notes] == [
        "1 of 3 sources of train.tsv",
        "2 of 3 targets of train.tsv",
    ]


@pytest.mark.parametrize(
    ("content", "line", "said"),
    [
        ("a\tb\nno tab\n", 2, "expected source<TAB>target, found no tab: 'no tab'; mend or remove the line."),
        ("source\ttarget\na\tb\tc\n", 2, "found 3 cells: 'a<TAB>b<TAB>c'"),
        ("target\tsource\na\t \n", 2, "expected target<TAB>source, found an empty source"),
        ("a\t\n", 1, "found an empty target"),
        (" \tb\n", 1, "found an empty source"),
        ("a\tb\n\nc\td\n", 2, "found no tab: ''"),
        ("sentence\tlabel\ngood\t1\n", 1, "found the header sentence<TAB>label of labelled sentences"),
        ('"sentence"\t"label"\n"good"\t"1"\n', 1, "sentences, which the task classify reads; change the task"),
    ],
)  # fmt: skip
def test_a_bad_row_is_named_by_file_and_line(tmp_path, content, line, said):
    path = write(tmp_path / "a.tsv", content)
    message = refused(path)
    assert message.startswith(f"{path}, line {line}: ")
    assert said in message


def test_other_files_are_refused(tmp_path):
    assert "is missing; expected a folder with train.tsv and dev.tsv" in refused(tmp_path / "nowhere")
    assert "expected train.tsv and dev.tsv, found an empty folder" in refused(tmp_path)
    jsonl = write(tmp_path / "a.jsonl", "{}\n")
    assert "found a.jsonl; give one TSV file to have it split. .jsonl files hold texts, which the task" in refused(
        tmp_path
    )
    assert "found .jsonl; .jsonl files hold texts, which the task generate reads" in refused(jsonl)
    path = write(tmp_path / "a.tsv", "")
    assert refused(path) == f"{path}: expected at least one row, found none."
    write(path, "source\ttarget\n")
    assert refused(path) == f"{path}: expected at least one row under the header, found none."
    tsv(tmp_path / "train.tsv", ROWS)
    assert "expected a dev file (dev.tsv, dev.txt, valid.tsv, " in refused(tmp_path)
    assert "b.tsv is missing; expected the dev file" in refused(tmp_path, dev="b.tsv")
    assert "one file, which is split, found b.tsv" in refused(tmp_path / "train.tsv", dev="b.tsv")


def test_attributions_are_left_out(tmp_path):
    credit = "CC-BY 2.0 (France) Attribution: tatoeba.org #1"
    rows = [(f"Number {i}.", f"第{i}。") for i in range(10)]
    path = write(tmp_path / "a.txt", "".join(f"{s}\t{t}\t{credit}\n" for s, t in rows))
    found = data.load_pairs(path)
    assert sum(map(len, found.splits().values())) == 10
    assert found.notes[0] == "a.txt has a third column, the attribution of each pair, which was left out"
    write(path, "".join(f"{s}\t{t}\t{credit if t else 'x'}\n" for s, t in [*rows, ("x", "")]))
    assert "line 1: expected source<TAB>target, found 3 cells" in refused(path)


@pytest.mark.data
def test_real_pairs(data_dir):
    captions = data.load_pairs(data_dir / "multi30k", source="en", target="de", test="test_2016_flickr")
    assert {name: len(split) for name, split in captions.splits().items()} == {
        "train": 29000,
        "dev": 1014,
        "test": 1000,
    }
    with gzip.open(data_dir / "multi30k" / "train.de.gz", "rt", encoding="utf-8", newline="\n") as file:
        assert captions.train.targets == file.read().split("\n")[:-1]
    sentences = data.load_pairs(data_dir / "tatoeba_zh_en" / "cmn.txt.gz")
    splits = sentences.splits()
    assert sum(map(len, splits.values())) == 29155
    assert all(2600 < len(splits[name]) < 3200 for name in ("dev", "test"))
    assert not set(splits["train"].targets) & {*splits["dev"].targets, *splits["test"].targets}
