"""Sparse files: lossless, small, whole."""

import gzip

import keras
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from tests.models import zoo
from tfvllm.errors import InputError
from tfvllm.pruning import PruningReport, block_flops, load_sparse, save_sparse, sparsify
from tfvllm.pruning.files import read_sparse, sparse_size, write_sparse


@given(
    hnp.arrays(
        st.sampled_from([np.float32, np.float16, np.int64]),
        hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=9),
        elements=st.sampled_from([0, 0, 0, 1, -3]),
    )
)
@settings(max_examples=60, deadline=None)
def test_round_trip(tmp_path_factory, value):
    path = tmp_path_factory.mktemp("sparse") / "w.tfvs"
    written = write_sparse([("w", value), ("again", value)], path)
    back = read_sparse(path)
    assert written == path.stat().st_size
    for name in ("w", "again"):
        assert back[name].dtype == value.dtype and back[name].shape == value.shape
        np.testing.assert_array_equal(back[name], value)


def test_signs_of_zero_nan_and_bfloat16_survive(tmp_path):
    value = np.zeros(100, np.float32)
    value[[3, 50, 99]] = [-0.0, np.nan, np.inf]
    half = np.zeros((9, 9), ml_dtypes.bfloat16)
    half[2, 2] = 1.5
    write_sparse([("v", value), ("half", half)], tmp_path / "w")
    back = read_sparse(tmp_path / "w")
    assert back["v"].tobytes() == value.tobytes()
    assert back["half"].dtype == half.dtype and back["half"].tobytes() == half.tobytes()


def test_size_is_bits_plus_values():
    value = np.zeros((100, 100), np.float32)
    value.reshape(-1)[:1000] = 1.0
    assert sparse_size(value) == 10000 // 8 + 1000 * 4
    assert sparse_size(np.ones((10, 10), np.float32)) == 400  # never larger than dense


def test_model_round_trip_and_wrong_models(tmp_path):
    model = zoo.build("gpt2")
    sparsify(model, 0.9, method="magnitude")
    size = save_sparse(model, tmp_path / "gpt2.tfvs")
    assert size == (tmp_path / "gpt2.tfvs").stat().st_size
    values = [np.asarray(v) for v in model.weights if "seed_generator" not in v.path]
    data = sum(map(sparse_size, values))
    assert data < 0.7 * sum(v.nbytes for v in values) and data < size < data + 250 * len(values)
    other = zoo.BUILDERS["gpt2"]()
    load_sparse(other, tmp_path / "gpt2.tfvs")
    found = zoo.inputs("gpt2")
    np.testing.assert_array_equal(np.asarray(other(found)), np.asarray(model(found)))
    with pytest.raises(InputError, match="weights, the model has"):
        load_sparse(zoo.build("bert"), tmp_path / "gpt2.tfvs")
    (tmp_path / "text").write_text("hello, this is no such file")
    with pytest.raises(InputError, match="does not begin with TFVSPRS1"):
        read_sparse(tmp_path / "text")
    data = (tmp_path / "gpt2.tfvs").read_bytes()
    (tmp_path / "cut").write_bytes(data[:-5])
    with pytest.raises(InputError, match="damaged"):
        read_sparse(tmp_path / "cut")
    with pytest.raises(InputError, match="cannot read"):
        read_sparse(tmp_path / "absent")


def test_ninety_percent_sparse_is_small():
    value = np.random.default_rng(0).normal(size=(512, 512)).astype(np.float32)
    value[np.abs(value) < 1.645] = 0.0
    small = sparse_size(value)
    assert small < 0.14 * value.nbytes
    assert small < len(gzip.compress(value.tobytes(), 6))


def test_report_counts_and_says_it_plainly():
    model = zoo.build("bert")
    report = PruningReport()
    found = zoo.inputs("bert")
    report.add("dense", model, run=lambda: np.asarray(model(found)))
    sparsify(model, 0.5, method="magnitude")
    report.add("masked", model)
    dense, masked = report.to_dict()["stages"]
    assert dense["parameters"] == masked["parameters"] == model.count_params()
    assert dense["flops"] == masked["flops"] == block_flops(model, 8, 128)  # zeros are multiplied too
    assert masked["zeros"] > 2000 and masked["bytes"] == dense["bytes"]
    assert masked["bytes_bitmask"] < dense["bytes_bitmask"] and masked["bytes_gzip"] < dense["bytes_gzip"]
    report.time_stages(repeats=2, warmup=1)
    assert report.rows[0]["latency_ms"] > 0
    text = report.table()
    assert "Masks alone do not speed up TensorFlow or TF Serving" in text and "not measured" in text


def test_flops_by_hand():
    model = zoo.build("bert")
    per_token = 4 * 16 * 16 + 2 * 16 * 24 + 2 * 10 * 16
    assert block_flops(model, 2, 10) == 3 * 2 * 2 * 10 * per_token
    report = PruningReport()
    report.add("other", keras.Sequential([keras.Input((4,)), keras.layers.Dense(2)]))
    assert report.rows[0]["flops"] is None
    with pytest.raises(InputError, match="no stage has a run"):
        report.time_stages()
