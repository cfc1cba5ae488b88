"""Measuring SavedModels: inputs of a shape, versions, throughput, the bench command."""

import json

import numpy as np
import pytest
import tensorflow as tf

from tfvllm import cli
from tfvllm.bench import models
from tfvllm.errors import InputError


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Two versions of a string model (the number of words), and a model on ids and a mask."""
    folder = tmp_path_factory.mktemp("models")

    class Words(tf.Module):
        def __init__(self, factor):
            super().__init__()
            self.factor = tf.Variable(float(factor))

        @tf.function(input_signature=[tf.TensorSpec([None], tf.string, name="text")])
        def count(self, text):
            return {"scores": self.factor * tf.cast(tf.strings.split(text).row_lengths(), tf.float32)[:, None]}

    class Ids(tf.Module):
        @tf.function(
            input_signature=[
                tf.TensorSpec([None, None], tf.int32, name="token_ids"),
                tf.TensorSpec([None, None], tf.bool, name="padding_mask"),
            ]
        )
        def total(self, token_ids, padding_mask):
            return {"sum": tf.reduce_sum(tf.where(padding_mask, token_ids, 0), axis=1)}

    for version in (2, 10):
        words = Words(version)
        tf.saved_model.save(words, str(folder / "words" / str(version)), signatures=words.count)
    ids = Ids()
    tf.saved_model.save(ids, str(folder / "ids"), signatures=ids.total)
    return folder


def test_the_highest_version_is_taken(saved):
    served = models.ServedModel(saved / "words")
    assert served.directory.name == "10"  # 10 is above 2: by number, not by letter
    assert served({"text": ["a b", ""]})["scores"].tolist() == [[20.0], [0.0]]
    assert models.ServedModel(saved / "words" / "2")({"text": ["a b"]})["scores"].tolist() == [[4.0]]


def test_inputs_are_made_up_in_the_shape_asked_for(saved):
    served = models.ServedModel(saved / "words")
    assert served(served.made_up(3, 7))["scores"].tolist() == [[70.0]] * 3
    ids = models.ServedModel(saved / "ids")
    made = ids.made_up(2, 5)
    assert made["token_ids"].shape == made["padding_mask"].shape == (2, 5)
    assert made["padding_mask"].numpy().all()
    np.testing.assert_array_equal(ids(made)["sum"], made["token_ids"].numpy().sum(1))
    with pytest.raises(InputError, match="expected one string input, found padding_mask, token_ids"):
        ids.texts(["a"])


def test_what_is_no_saved_model_is_refused(saved, tmp_path):
    with pytest.raises(InputError, match="expected a SavedModel"):
        models.ServedModel(tmp_path)
    (tmp_path / "saved_model.pb").write_bytes(b"not a model")
    with pytest.raises(InputError, match="expected a SavedModel that loads"):
        models.ServedModel(tmp_path)
    with pytest.raises(InputError, match="expected the signature classify, found serving_default"):
        models.ServedModel(saved / "words", "classify")


def test_throughput_runs_every_sentence_in_each_pass(saved):
    served = models.ServedModel(saved / "words")
    seen = []

    class Spy:
        texts = staticmethod(served.texts)

        def __call__(self, inputs):
            seen.append(len(inputs["text"]))
            return served(inputs)

    found = models.throughput({"a": Spy()}, ["x y"] * 10, batch=4, repeats=2, warmup=1)
    assert seen == [4, 4, 2] * 3
    rate = 10 / found["a"]["pass"]["median_ms"] * 1e3
    assert found["a"]["sentences_per_second"] == pytest.approx(rate, rel=0.02)


def run(capsys, *arguments):
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        cli.main([str(argument) for argument in arguments])
    told = capsys.readouterr()
    return ended.value.code, told.out, told.err


def test_bench_latency_prints_one_json_object(saved, capsys, tmp_path):
    words = saved / "words"
    code, told, _ = run(
        capsys, "bench", "latency", words / "2", "--vs", words / "10", "--shape", "1x4", "--shape", "2x3",
        "--repeats", 2, "--json", "--out", tmp_path / "r.json",
    )  # fmt: skip
    content = json.loads(told)
    assert code == 0 and content["what"] == "latency"
    assert [row["shape"] for row in content["results"]] == [[1, 4], [2, 3]]
    assert list(content["results"][0]["models"]) == ["2", "10"]
    assert json.loads((tmp_path / "r.json").read_text())["results"] == content["results"]


def test_requests_of_real_lengths(saved, capsys, tmp_path):
    """Lengths become masks and words; each request counts once, by its median."""
    words, ids = models.ServedModel(saved / "words"), models.ServedModel(saved / "ids")
    scores = words(words.request(["3", "1", "2"], False))["scores"]
    assert scores[:, 0].tolist() == [30.0, 10.0, 20.0]
    request = ids.request(["3", "1"], False)
    assert request["padding_mask"].numpy().tolist() == [[True] * 3, [True, False, False]]
    assert request["token_ids"].numpy()[1, 1:].tolist() == [0, 0]
    assert words(words.request(["a b", "c"], True))["scores"][:, 0].tolist() == [20.0, 10.0]
    file = tmp_path / "lengths.txt"
    file.write_text("3\n17\n\n5\n9\n2\n")
    call = ["bench", "latency", saved / "ids", "--lengths", file, "--repeats", 2, "--json"]
    code, told, _ = run(capsys, *call, "--vs", saved / "words", "--batch", 2)
    results = json.loads(told)["results"]
    assert code == 0 and (results["requests"], results["batch"], results["of"]) == (3, 2, "lengths")
    assert results["lengths"] == {"mean": 7.2, "p50": 5.0, "p90": 13.8, "p95": 15.4, "p99": 16.68, "max": 17.0}
    assert [p["p50"] <= p["p95"] <= p["max"] for p in results["models"].values()] == [True, True]
    file.write_text("a b\nc d e\n")
    code, told, _ = run(capsys, "bench", "latency", saved / "words", "--lengths", file, "--limit", 1, "--repeats", 1)
    assert code == 0 and "1 requests of 1 from lengths.txt, words: median 2, p95 2" in told
    code, _, log = run(capsys, *call[:3], "--lengths", file)
    assert code == 2 and "expected one string input" in log
    file.write_text("0\n")
    code, _, log = run(capsys, *call)
    assert code == 2 and "expected whole numbers from 1" in log
    assert run(capsys, *call, "--shape", "1x2")[0] == run(capsys, *call[:3], "--batch", 2)[0] == 2


def test_the_same_model_twice_shows_the_noise(saved, capsys):
    code, told, _ = run(capsys, "bench", "latency", saved / "words", "--vs", saved / "words", "--repeats", 2)
    assert code == 0 and "words #1" in told and "words #2" in told


def test_bench_throughput_reads_sentences(saved, capsys, tmp_path):
    file = tmp_path / "s.tsv"
    file.write_text("sentence\tlabel\na b\t1\nc\t0\n")
    code, told, _ = run(capsys, "bench", "throughput", saved / "words", "--file", file, "--repeats", 1, "--json")
    assert code == 0 and json.loads(told)["results"]["sentences"] == 2
    file.write_text("one line\n\nanother\n")
    code, told, _ = run(capsys, "bench", "throughput", saved / "words", "--file", file, "--repeats", 1)
    assert code == 0 and "2 from s.tsv" in told
    code, told, log = run(capsys, "bench", "throughput", saved / "words", "--file", tmp_path / "none")
    assert code == 2 and told == "" and "expected a readable UTF-8 file" in log


@pytest.mark.parametrize("shape", ["4", "0x3", "axb", "1x2x3"])
def test_a_wrong_shape_is_refused(saved, capsys, shape):
    code, told, log = run(capsys, "bench", "latency", saved / "words", "--shape", shape)
    assert code == 2 and told == "" and "expected BATCHxTOKENS such as 8x32" in log


def test_bench_lists_what_there_is(capsys):
    code, told, _ = run(capsys, "bench", "--help")
    assert code == 0 and "latency" in told and "throughput" in told
