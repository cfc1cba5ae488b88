"""How much memory simplifying takes, counted in processes of their own."""

import os
import subprocess
import sys

import pytest

MAKE = """
import sys, keras, keras_nlp
backbone = keras_nlp.models.BertBackbone(30522, 6, 12, 768, 3072, max_sequence_length=512)
keras_nlp.models.BertTextClassifier(backbone, num_classes=2, preprocessor=None).export(sys.argv[1], verbose=False)
"""
SIMPLIFY = """
import resource, sys
from tfvllm.cli import main
try:
    main(["simplify", *sys.argv[1:], "--json"])
finally:
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, file=sys.stderr)
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
