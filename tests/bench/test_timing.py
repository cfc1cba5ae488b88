"""Timing that compares: turns, medians, ratios; results with their conditions."""

import json
import subprocess
import sys
import time

import pytest

from tfvllm.bench import results
from tfvllm.errors import InputError
from tfvllm.timing import Timing, compare


def test_candidates_take_turns_and_nobody_always_goes_first():
    calls = []
    timings = compare({name: (lambda n=name: calls.append(n)) for name in "abc"}, repeats=3, warmup=1)
    assert "".join(calls) == "abc" + "abc" + "bca" + "cab"
    assert list(timings) == ["a", "b", "c"]
    assert all(len(timing.samples_ms) == 3 for timing in timings.values())


def test_a_call_that_sleeps_longer_is_measured_longer():
    timings = compare({"short": lambda: time.sleep(0.002), "long": lambda: time.sleep(0.008)}, repeats=5, warmup=0)
    assert timings["long"].min_ms >= 8.0 and timings["short"].min_ms >= 2.0
    assert timings["short"].ratio(timings["long"]) > 1.5


def test_statistics_of_known_samples():
    timing = Timing(tuple(float(value) for value in range(1, 101)))
    assert timing.median_ms == 50.5
    assert timing.p95_ms == pytest.approx(95.05)
    assert timing.to_dict() == {"median_ms": 50.5, "p95_ms": 95.05, "min_ms": 1.0, "repeats": 100}
    assert Timing((2.0,)).ratio(Timing((6.0,))) == 3.0


@pytest.mark.parametrize("call", [lambda: compare({}), lambda: compare({"a": int}, repeats=0)])
def test_nothing_to_time_is_refused(call):
    with pytest.raises(InputError, match="expected something to time"):
        call()


def test_conditions_say_what_a_reader_needs_and_no_path(tmp_path):
    import os

    content = results.write_json(tmp_path / "r.json", "latency", {"a": 1})
    assert json.loads((tmp_path / "r.json").read_text()) == content
    assert content["conditions"]["versions"]["tensorflow"] and content["conditions"]["machine"]["cores"] >= 1
    text = json.dumps(content)
    assert os.getcwd() not in text and str(tmp_path) not in text and os.uname().nodename not in text.split('"')


def test_a_table_lines_up():
    assert results.text_table(["model", "ms"], [["a", 1.5], ["long", 22]]) == (
        "| model |  ms |\n| ----- | --: |\n| a     | 1.5 |\n| long  |  22 |"
    )


def test_peak_memory_is_this_programs_own():
    """Not that of the process it was started from, as `ru_maxrss` is."""
    code = (
        "from tfvllm.bench.results import peak_memory_bytes as p; a = p(); b = bytearray(b'x' * 2**28); print(a, p())"
    )
    start = f"import subprocess, sys; fat = b'x' * 2**30; subprocess.run([sys.executable, '-c', {code!r}], check=True)"
    done = subprocess.run([sys.executable, "-c", start], capture_output=True, text=True, check=True)
    before, after = map(int, done.stdout.split())
    assert before < 2**30
    assert 2**28 <= after - before < 2**30
