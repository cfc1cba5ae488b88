"""The registry: every family has an adapter and a reader, or says why not."""

import pytest

from tfvllm.families.registry import FAMILIES, READERS


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.__name__.rsplit(".", 1)[1])
def test_both_parts_or_why_not(family):
    assert hasattr(family, "ADAPTER") != bool(getattr(family, "NO_ADAPTER", ""))
    assert hasattr(family, "READERS") != bool(getattr(family, "NO_READER", ""))
    if hasattr(family, "ADAPTER"):
        assert family.SHRUNK and all(issubclass(shrunk, native) for native, shrunk in family.SHRUNK.items())
        assert all(issubclass(shrunk, native) for native, shrunk in family.TASKS.items())
        read = [any(base.__name__ in READERS for base in native.__mro__) for native in family.SHRUNK]
        assert all(read) or hasattr(family, "NO_READER")


def test_no_backbone_has_two_readers():
    names = [name for family in FAMILIES for name in getattr(family, "READERS", {})]
    assert len(names) == len(set(names)) == len(READERS)


def test_presets_of_keras_nlp_stay_models_of_keras_nlp():
    """keras-hub looks among all registered classes for the task of a backbone."""
    for family in FAMILIES:
        for native, shrunk in getattr(family, "TASKS", {}).items():
            assert shrunk.backbone_cls is family.SHRUNK[native.backbone_cls]
