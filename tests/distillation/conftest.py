"""Fixtures of the distillation tests."""

import pytest

from tests.distillation.pairs import classifier


@pytest.fixture
def pair():
    """A teacher of four layers and a student of two, with the teacher's words."""
    return classifier(4), classifier(2, heads=4, width=8)


@pytest.fixture
def duo():
    """The smallest teacher and student: for tests whose time is tracing."""
    return classifier(2, width=8), classifier(1, width=8)
