"""Sensitivity: the right numbers, and the model as it was."""

import numpy as np
import pytest

import tfvllm
from tests.models import zoo
from tfvllm.errors import InputError
from tfvllm.models import adapter_for
from tfvllm.pruning import mask_model, plan_shrink, sensitivity
from tfvllm.pruning.importance import loss_of


def labelled(name, rows=12):
    found = zoo.inputs(name, rows)
    if name in zoo.CLASSIFIERS:
        return found, np.arange(rows) % 3
    return found, found["token_ids"], found["padding_mask"]


def test_rows_are_losses_of_the_masked_model(tmp_path):
    model = zoo.build("bert")
    x, y = labelled("bert", 8)
    before = [np.array(w.variable) for w in adapter_for(model).weights(model)]
    found = sensitivity(model, (x, y), shares=(0.5,), limit=1)
    for a, b in zip(before, adapter_for(model).weights(model)):
        np.testing.assert_array_equal(a, np.asarray(b.variable))
    np.testing.assert_allclose(found.baseline, float(loss_of(model, x, y, None)), rtol=1e-5)
    assert [(r["unit"], r["block"], r["removed"]) for r in found.rows] == [
        (unit, f"encoder.{i}", share)
        for unit, share in (("heads", 0.5), ("ffn", 0.5), ("layers", 1.0))
        for i in range(3)
    ]
    only_second = plan_shrink(model, ffn=[24, 12, 24], round_to=1)
    mask_model(model, only_second)
    expected = float(loss_of(model, x, y, None))
    row = next(r for r in found.rows if (r["unit"], r["block"]) == ("ffn", "encoder.1"))
    np.testing.assert_allclose(row["value"], expected, rtol=1e-5)
    table = found.table()
    assert "| ffn | encoder.1 |" in table and f"{expected:.4g}" in table
    assert found.plot(tmp_path / "s.svg").read_text().startswith("<?xml")
    assert found.to_dict()["metric"] == "loss"


def test_layers_match_a_model_without_the_layer():
    model = zoo.build("gpt2")
    data = labelled("gpt2", 8)
    found = sensitivity(model, data, units=("layers",), metric="accuracy")
    for row in found.rows:
        index = int(row["block"].split(".")[1])
        small = tfvllm.shrink(model, layers=[i for i in range(3) if i != index])
        again = sensitivity(small, data, units=(), metric="accuracy")
        np.testing.assert_allclose(row["value"], again.baseline, rtol=1e-6)


def test_accuracy_respects_weights_and_own_metrics():
    model = zoo.build("gpt2")
    x, y, weight = labelled("gpt2", 4)
    logits = np.asarray(model(x))
    hits = (logits.argmax(-1) == y) * weight
    found = sensitivity(model, (x, y, weight), units=(), metric="accuracy")
    np.testing.assert_allclose(found.baseline, hits.sum() / weight.sum(), rtol=1e-6)
    mine = sensitivity(model, (x, y, weight), units=("ffn",), shares=(0.5,), metric=lambda m, batches: len(batches))
    assert {row["value"] for row in mine.rows} == {1}


def test_errors():
    model = zoo.build("bert")
    x, y = labelled("bert", 4)
    for options, words in (
        ({"units": ("width",)}, "heads, ffn, layers"),
        ({"shares": (1.0,)}, r"\(0, 1\)"),
        ({"metric": "bleu"}, "'loss', 'accuracy' or a function"),
    ):
        with pytest.raises(InputError, match=words):
            sensitivity(model, (x, y), **options)
    with pytest.raises(InputError, match="needs labels"):
        sensitivity(model, x)
