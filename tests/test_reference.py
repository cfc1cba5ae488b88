"""The public names: each says what it is, and its example does what it shows."""

import doctest
import importlib.util
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
_spec = importlib.util.spec_from_file_location("reference", ROOT / "docs" / "reference.py")
reference = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(reference)
NAMES = [name for _, name, _ in reference.public()]


@pytest.fixture(scope="module")
def taken_for_granted():
    names = {}
    exec(reference.PREAMBLE, names)
    return names


LONG = ("tfvllm.shrink", "tfvllm.pruning.sparsify", "tfvllm.compress.run", "tfvllm.rollouts.Answers")  # for seconds
assert set(LONG) <= set(NAMES)


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.thorough if n in LONG else ()) for n in NAMES])
def test_example(name, taken_for_granted, monkeypatch):
    monkeypatch.chdir(ROOT)
    thing = next(thing for _, other, thing in reference.public() if other == name)
    docstring = thing.__doc__ or ""
    examples = doctest.DocTestParser().get_doctest(docstring, dict(taken_for_granted), name, None, None)
    assert examples.examples, f"{name} has no example"
    output = []
    runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS)
    runner.run(examples, out=output.append)
    assert not runner.failures, "".join(output)


def test_a_wrong_example_is_found():
    runner = doctest.DocTestRunner(verbose=False)
    runner.run(doctest.DocTestParser().get_doctest(">>> 1 + 1\n3\n", {}, "wrong", None, None), out=lambda text: None)
    assert runner.failures == 1


def test_docstrings_become_markdown():
    shown = reference.text(
        "Sum of `a_b` and *c*.\n\n    a + b\n\nArgs:\n    a: first\n        of two.\n\nExample:\n    >>> 1\n    1"
    )
    assert shown == [
        *("Sum of `a_b` and \\*c\\*.", "", "```text", "a + b", "```", "", "**Args**", ""),
        *("- `a`: first", "  of two.", "", "**Example**", "", "```pycon", ">>> 1", "1", "```"),
    ]
