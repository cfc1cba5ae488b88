"""What oneDNN itself says that it ran."""

import os
import subprocess
import sys


def products(program: str) -> list[str]:
    """The lines of oneDNN's log about matrix products that a Python program ran, in a process of its own.

    If the program prints NOW (and flushes), only what comes after it counts.
    """
    environment = {**os.environ, "ONEDNN_VERBOSE": "1", "TF_ENABLE_ONEDNN_OPTS": "1"}
    run = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    found = [line for line in run.stdout.rsplit("NOW\n", 1)[-1].split("\n") if "exec,cpu,matmul" in line]
    assert found, "oneDNN ran no product"
    return found


def by_reference_code(lines: list[str]) -> list[str]:
    """Those for which oneDNN had no kernel."""
    return [line for line in lines if ",ref" in line]
