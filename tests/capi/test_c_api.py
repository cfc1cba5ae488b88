"""Exported models answer through TensorFlow's C API as Keras does; tests/serving/test_parity.py has all ways to ask."""

import numpy as np
import pytest

import tfvllm
from tests import tiny_models
from tests.capi.loader import run
from tfvllm.serving.lint import lint


def strings(texts):
    return np.array([text.encode() for text in texts], object)


@pytest.mark.thorough
def test_classify_signature_reads_examples(text_export, text_classifier):
    from tfvllm.export.classify import example_of

    expected = tiny_models.keras_scores(text_classifier, tiny_models.TEXTS)
    examples = np.array([example_of(text) for text in tiny_models.TEXTS], object)
    answer = run(text_export, "classify", {"inputs": examples})
    np.testing.assert_allclose(answer["scores"], expected, atol=1e-5)
    assert answer["classes"].tolist() == [[b"negative", b"positive"]] * len(tiny_models.TEXTS)


def test_every_kind_of_tensor(tmp_path):
    (tmp_path / "1").mkdir()
    tiny_models.save_many(tmp_path / "1")
    two = run(tmp_path / "1", "serving_default", {"a": np.array([[1, 2, 3]]), "b": np.array([4])})
    assert (two["sum"].tolist(), two["twice"].tolist()) == ([12.0], [8])
    repeated = run(tmp_path / "1", "repeat", {"text": strings(["ab", ""]), "times": np.array(2)})
    assert repeated["out"].tolist() == [b"abab", b""]
    picky = run(tmp_path / "1", "picky", {"x": np.array([4.0])})
    assert {name: array.astype(float).tolist() for name, array in picky.items()} == {
        "root": [2.0],
        "half": [4.0],
        "flag": [1.0],
        "big": [4.0],
    }
    with pytest.raises(AssertionError, match="x must not be negative"):
        run(tmp_path / "1", "picky", {"x": np.array([-1.0])})


@pytest.mark.thorough
@pytest.mark.parametrize("target", ["portable", pytest.param("onednn", marks=pytest.mark.thorough)])
def test_both_targets_of_the_simplifier(text_export, text_classifier, tmp_path, target):
    tfvllm.simplify_saved_model(text_export, tmp_path / "1", target=target)
    answer = run(tmp_path / "1", "serving_default", {"text": strings(tiny_models.TEXTS)})
    np.testing.assert_allclose(
        answer["scores"], tiny_models.keras_scores(text_classifier, tiny_models.TEXTS), atol=1e-5
    )
    report = lint(tmp_path / "1", run=False)
    assert report.target == target
    # Where oneDNN is off, the portable model still answers. The other does as lint says: it loads, and its runs fail.
    try:
        off = run(tmp_path / "1", "serving_default", {"text": strings(["good"])}, TF_ENABLE_ONEDNN_OPTS="0")
    except AssertionError as error:
        assert target == "onednn"
        assert "run_saved_model: run:" in str(error)
    else:
        np.testing.assert_allclose(off["scores"], tiny_models.keras_scores(text_classifier, ["good"]), atol=1e-5)
