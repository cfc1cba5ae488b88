"""One replica and two take the same step, in a process with two logical CPUs."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest


@pytest.mark.slow
def test_one_and_two_replicas_take_the_same_step(tmp_path):
    here = Path(__file__).parent
    subprocess.run(
        [sys.executable, str(here / "replicas.py"), str(tmp_path / "found.npz")],
        check=True,
        env={**os.environ, "PYTHONPATH": str(here.parents[1])},
        timeout=600,
    )
    found = np.load(tmp_path / "found.npz")
    names = [name.split("/", 2) for name in found.files]
    assert len(names) > 60
    for family, count, name in names:
        if count == "1":
            one, two = found[f"{family}/1/{name}"], found[f"{family}/2/{name}"]
            np.testing.assert_allclose(one, two, rtol=1e-3, atol=2e-6, err_msg=f"{family} {name}")
    assert max(np.abs(found[name]).max() for name in found.files if name.split("/")[-1].isdigit()) > 1e-3
