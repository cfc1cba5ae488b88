"""`tfvllm bench generate` measures what it says it measures."""

import json
import time

import numpy as np
import pytest
from click.testing import CliRunner

import tfvllm
from tfvllm.bench import generate as bench
from tfvllm.errors import InputError

from .models import VOCABULARY, build, gpt2
from .reference import keras_generate


def test_prompts_are_mixed_and_repeatable():
    ids, lengths = bench.prompts(8, 3, 9, 50)
    again, _ = bench.prompts(8, 3, 9, 50)
    np.testing.assert_array_equal(ids, again)
    assert lengths.max() == 9 and lengths.min() >= 3 and len(set(lengths)) > 1
    for row, length in zip(ids, lengths):
        assert (row[:length] > 0).all() and (row[length:] == 0).all() and row.max() < 50


def test_measure_splits_the_first_token_from_the_others():
    def slow(ids, lengths, count):
        time.sleep(0.02 + 0.004 * (count - 1))
        return np.zeros([len(ids), count], np.int32)

    def wrong(ids, lengths, count):
        return np.ones([len(ids), count], np.int32) * (np.arange(len(ids)) > 0)[:, None]

    ids, lengths = bench.prompts(4, 2, 5, 50)
    found = bench.measure({"slow": slow, "wrong": wrong}, ids, lengths, 6, repeats=3)
    slow = found["slow"]
    assert 19 < slow["first_token_ms"]["median"] < 35
    assert 3 < slow["per_token_ms"]["median"] < 8
    assert slow["tokens_per_second"] == pytest.approx(4 * 6 / slow["total_ms"]["median"] * 1e3)
    assert slow["same_tokens"] == 1.0 and found["wrong"]["same_tokens"] == 0.25
    assert "| 4 slow" in bench.table([{"batch": 4, "models": found}])
    with pytest.raises(InputError, match="at least 2 new tokens"):
        bench.measure({"slow": slow}, ids, lengths, 1)


@pytest.mark.thorough
def test_command_and_keras_candidate(tmp_path):
    model = build(gpt2)
    path = tfvllm.export(model, tmp_path / "ids", task="generate", max_length=48, warmup=False, check=None)
    options = [str(path), "--batch", "2", "--prompt", "2", "5", "--new-tokens", "4", "--repeats", "1", "--json"]
    outcome = CliRunner().invoke(bench.command, options)
    assert outcome.exit_code == 0, outcome.output
    content = json.loads(outcome.stdout)
    (row,) = content["results"]
    assert row["batch"] == 2 and row["new_tokens"] == 4
    (entry,) = row["models"].values()
    assert entry["tokens_per_second"] > 0
    assert set(entry["per_token_ms"]) == {"median", "p95", "p99"}

    ids, lengths = bench.prompts(3, 2, 7, VOCABULARY)
    mask = (np.arange(ids.shape[1]) < lengths[:, None]).astype(np.int32)
    own = bench.keras_model(model)(ids, lengths, 5)
    np.testing.assert_array_equal(own, keras_generate(model, ids, mask, 5))
    np.testing.assert_array_equal(bench.saved_model(path)(ids, lengths, 5), own)
