"""Runs that are killed at any moment and gone on with come to the very figures of a run that was left alone."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.compress.language import GENERATE, TRANSLATE, changed

ROOT = Path(__file__).resolve().parents[2]
TWICE = {"epochs": 2}
SHRINK = {"ffn": 0.5, "epochs": 2, "batch_size": 16, "calibration": 32}
FEW = {"train": 24, "dev": 6, "test": 4}
STORIES = changed(GENERATE, data={"synthetic": FEW}, teacher=TWICE, distill=TWICE, shrink=SHRINK)
PHRASES = changed(
    TRANSLATE,
    data={"synthetic": {**FEW, "train": 150}},
    teacher={"batch_size": 32},
    distill={**TWICE, "batch_size": 32, "targets": "teacher", "beams": 2, "on_policy": 0.5, "hidden": 0.2},
    shrink={**SHRINK, "batch_size": 32},
)
IN_ROUNDS = changed(GENERATE, data={"synthetic": FEW}, distill={"rounds": 3, "hidden": 0.2})


def go(recipe: Path, out: Path, *until: str):
    """Goes on with a run in a process of its own, until it kills itself or comes to its end."""
    command = [sys.executable, "-m", "tests.compress.language", str(recipe), str(out), *until]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    if until:
        assert ended.returncode == -signal.SIGKILL, ended.stderr[-2000:]
        return None
    assert ended.returncode == 0, ended.stderr[-2000:]
    return json.loads(ended.stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("content", "moments"),
    [
        pytest.param(
            STORIES,
            [("teacher", ".75"), ("teacher's answers", ".5"), ("distil", ".25"), ("distil", ".75"), ("recover", ".3")],
            id="answers kept",
        ),
        pytest.param(
            PHRASES,
            [("teacher", "0.5"), ("teacher's translations", "0.5"), ("distil", "0.75"), ("recover", "0.75")],
            id="on policy, with the teacher's translations",
        ),
        pytest.param(IN_ROUNDS, [("distil", "0.3"), ("distil", "0.6")], id="rounds"),
    ],
)  # fmt: skip
def test_killed_runs_come_to_the_same_figures(content, moments, tmp_path):
    recipe = tmp_path / "recipe.json"
    recipe.write_text(json.dumps(content))
    whole = go(recipe, tmp_path / "whole")
    for moment in moments:
        go(recipe, tmp_path / "killed", *moment)
    last = go(recipe, tmp_path / "killed")
    assert last["figures"] == whole["figures"]
    assert last["kept"] and not list((tmp_path / "killed" / "steps").glob("*.work"))
