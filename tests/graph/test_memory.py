"""How much memory simplifying and serving take, counted in processes of their own."""

import os
import subprocess
import sys

import pytest

import tfvllm
from tests.graph.conftest import bert_inputs, tiny_bert

MAKE = """
import sys, keras, keras_nlp
backbone = keras_nlp.models.BertBackbone(30522, 6, 12, 768, 3072, max_sequence_length=512)
keras_nlp.models.BertTextClassifier(backbone, num_classes=2, preprocessor=None).export(sys.argv[1], verbose=False)
"""
SIMPLIFY = """
import sys
from tfvllm.bench.results import peak_memory_bytes
from tfvllm.cli import main
try:
    main(["simplify", *sys.argv[1:], "--json"])
finally:
    print(peak_memory_bytes(), file=sys.stderr)
"""


@pytest.mark.slow
@pytest.mark.parametrize("target", ["portable", "onednn"])
def test_peak_is_at_most_four_times_the_weights(tmp_path, target):
    """TensorFlow's own libraries, the original weights, their float64 copies and the new weights are all in it."""
    environment = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3"}
    for code, arguments in ((MAKE, ["a"]), (SIMPLIFY, ["a", "b", "--target", target])):
        done = subprocess.run(
            [sys.executable, "-c", code, *arguments], cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr[-2000:]
    weights = 66_955_778 * 4
    assert (tmp_path / "b" / "variables" / "variables.data-00000-of-00001").stat().st_size < 1.01 * weights
    assert int(done.stderr.split()[-1]) <= 4 * weights


ASK = """
import os, sys, numpy as np, tensorflow as tf
tf.config.threading.set_inter_op_parallelism_threads(1)
answer = tf.saved_model.load(sys.argv[1]).signatures["serving_default"]
rng = np.random.default_rng(0)

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20

def ask(count):
    for _ in range(count):
        lengths = rng.integers(0, 48, rng.integers(1, 9))  # rows that are padding alone among them
        mask = np.arange(rng.integers(max(1, lengths.max()), 49)) < lengths[:, None]
        mask = (mask[:, ::-1] if rng.random() < 0.3 else mask).astype(np.int32)
        ids = rng.integers(0, int(10 ** rng.uniform(0.1, 3)), mask.shape).astype(np.int32)  # now a few words, now all
        answer(token_ids=tf.constant(ids), padding_mask=tf.constant(mask), segment_ids=tf.constant(0 * ids))

ask(10000)
marks = [resident()]
for _ in range(5):
    ask(2000)
    marks.append(resident())
print(*marks)
"""


@pytest.mark.slow
@pytest.mark.parametrize("form", ["packed", "packed, bfloat16", "packed, int8", "dispatched"])
def test_10000_requests_of_changing_shapes_leave_memory_flat(tmp_path, clock, form):
    """Kernels that are prepared for a shape are kept, up to a number; some 8,000 requests reach that number."""
    tiny_bert(width=64, inner=128, vocabulary=1000).export(tmp_path / "a", format="tf_saved_model", verbose=False)
    options = {"signature": "serving_default", "target": "onednn"}
    if form == "dispatched":
        options |= {"profile": [{"batch": 1, "length": 8}, {"lengths": [40, 3, 9, 20, 7, 30, 2, 1], "length": 48}]}
    else:
        options |= {"precision": form.removeprefix("packed").lstrip(", ") or "float32"}
    calibration = [bert_inputs(6, 24, vocabulary=1000, seed=seed) for seed in range(3)]
    report = tfvllm.simplify_saved_model(tmp_path / "a", tmp_path / "b", calibration=calibration, **options)
    assert "PackTokens" in report.rules
    if form == "dispatched":
        assert report.main.dispatch["pays"] and len(report.main.dispatch["ways"]) == 2
    done = subprocess.run([sys.executable, "-c", ASK, str(tmp_path / "b")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    marks = [float(m) for m in done.stdout.split()]
    assert sorted(marks[1:])[2] - marks[0] < 8.0, marks  # MiB; the median: one arena more or less is no growth
