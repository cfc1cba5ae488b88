"""What this process can compute of a target, and what is said where it cannot."""

import os
import subprocess
import sys

import pytest

from tfvllm.errors import InputError
from tfvllm.graph import probes


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "int8"])
def test_the_portable_target_runs_anywhere(precision):
    probes.check_runs("portable", precision)


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "int8"])
def test_the_onednn_target_runs_here(precision):
    probes.check_runs("onednn", precision)  # or is skipped, where the CPU's flags say why


def test_bfloat16_goes_by_onednn_where_it_can(monkeypatch):
    assert probes.default_for("float32") == "portable"
    for able, expected in ((True, "onednn"), (False, "portable")):
        monkeypatch.setattr(probes, "computes_fused", lambda dtype, able=able: able)
        assert probes.default_for("bfloat16") == expected


def test_without_onednn_nothing_is_made_that_would_not_run(text_export, tmp_path):
    call = [sys.executable, "-m", "tfvllm", "simplify", str(text_export), str(tmp_path / "1"), "--target", "onednn"]
    environment = os.environ | {"TF_ENABLE_ONEDNN_OPTS": "0"}
    done = subprocess.run(call, env=environment, capture_output=True, text=True)
    assert done.returncode == 2
    assert "TF_ENABLE_ONEDNN_OPTS is 0" in done.stderr
    assert "use target 'portable'" in done.stderr
    assert not (tmp_path / "1").exists()


@pytest.mark.parametrize(
    ("precision", "missing"), [("bfloat16", "computes_fused"), ("int8", "computes_int8"), ("float32", "computes_fused")]
)
def test_a_cpu_that_lacks_it_is_told(monkeypatch, precision, missing):
    import tensorflow as tf

    def lacking(*dtype):
        return precision == "bfloat16" and dtype == (tf.float32,)

    monkeypatch.setattr(probes, missing, lacking)
    if missing == "computes_int8":
        monkeypatch.setattr(probes, "computes_fused", lambda dtype: True)
    with pytest.raises(InputError, match={"float32": "without oneDNN", "int8": "overflow"}.get(precision, "AVX-512")):
        probes.check_runs("onednn", precision)
