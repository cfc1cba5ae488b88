"""A teacher's outputs on disk: equal to online, resumable, refused when stale."""

import json

import keras
import numpy as np
import pytest
import tensorflow as tf

import tfvllm
from tests.distillation.pairs import batch, causal_lm, classifier, lm_batch
from tfvllm.distillation import TeacherCache, write_teacher_cache
from tfvllm.errors import InputError

losses = tfvllm.losses


def dataset(parts, size=4):
    return tf.data.Dataset.from_tensor_slices(parts).batch(size)


def loss_of(teacher, student, data, which):
    distiller = tfvllm.Distiller(teacher, student, losses=which)
    distiller.compile(run_eagerly=True)  # tracing takes longer than three batches
    return distiller.evaluate(data, return_dict=True, verbose=0)


def test_all_logits_of_a_classifier_equal_online(tmp_path, duo):
    teacher, student = duo
    data = dataset(batch(10))
    cache = write_teacher_cache(teacher, data, tmp_path / "cache", top_k=None, shard_size=4)
    assert cache.examples == 10 and len(cache.shards) == 3 and cache.top_k == 3
    which = {"a": losses.ForwardKL(3.0), "b": losses.ReverseKL(), "c": losses.JensenShannon(), "d": losses.Logits()}
    online = loss_of(teacher, student, data, which)
    assert loss_of(cache, student, cache.join(data), which) == pytest.approx(online, rel=1e-5)
    again = cache.join(data, shuffle=10, seed=1, batch_size=5)
    assert loss_of(cache, student, again, which) == pytest.approx(online, rel=1e-5)
    cache.check_teacher(teacher)


@pytest.mark.slow
def test_the_largest_logits_of_a_language_model(tmp_path):
    teacher, student = causal_lm(2), causal_lm(1)
    data = dataset(lm_batch(6))
    which = {"kl": losses.ForwardKL(2.0)}
    online = loss_of(teacher, student, data, which)["kl_loss"]
    found = []
    for k in (2, 39, None):
        cache = write_teacher_cache(teacher, data, tmp_path / str(k), top_k=k, temperatures=[2.0])
        found.append(loss_of(cache, student, cache.join(data), which)["kl_loss"])
    assert found[0] < online  # merging classes never raises a KL
    assert found[1:] == pytest.approx([online, online], rel=1e-5)  # one class alone in "all others" loses nothing
    with pytest.raises(InputError, match=r"temperatures \[2.0\].*asks for 1.0"):
        cache = TeacherCache(tmp_path / "2")
        loss_of(cache, student, cache.join(data), {"kl": losses.ForwardKL()})


@pytest.mark.slow
def test_training_from_the_cache_is_training_online(tmp_path, duo):
    teacher, student = duo
    data = dataset(batch(8))
    cache = write_teacher_cache(teacher, data, tmp_path / "cache", top_k=None)
    start, results = student.get_weights(), []
    for of, told in ((teacher, data), (cache, cache.join(data))):
        student.set_weights(start)
        distiller = tfvllm.Distiller(of, student, losses={"logits": losses.ForwardKL(2.0)})
        distiller.compile(keras.optimizers.SGD(0.1))
        distiller.fit(told, epochs=2, verbose=0)
        results.append(student.get_weights())
    assert any(np.abs(a - b).max() > 1e-4 for a, b in zip(start, results[0]))
    for one, two in zip(*results):
        np.testing.assert_allclose(one, two, atol=1e-6)


def test_interrupted_work_goes_on(tmp_path, duo, monkeypatch):
    teacher, data, path = duo[0], dataset(batch(10)), tmp_path / "cache"
    with monkeypatch.context() as patch:
        patch.setattr("tfvllm.distillation.cache._shard", lambda i: f"shard-{i:05d}.tfrecord" if i < 2 else 1 / 0)
        with pytest.raises(ZeroDivisionError):
            write_teacher_cache(teacher, data, path, shard_size=4)
    with pytest.raises(InputError, match="is not finished"):
        TeacherCache(path)
    before = {p: p.stat().st_mtime_ns for p in path.glob("*.tfrecord")}
    assert len(before) == 2
    assert write_teacher_cache(teacher, data, path, shard_size=4).examples == 10
    assert all(p.stat().st_mtime_ns == time for p, time in before.items())  # not written again
    assert not list(path.glob(".*partial"))


@pytest.mark.thorough
def test_workers_write_one_cache(tmp_path, duo):
    teacher, data = duo[0], dataset(batch(10))
    options = {"shard_size": 3, "top_k": None}
    whole = write_teacher_cache(teacher, data, tmp_path / "one", **options)
    assert write_teacher_cache(teacher, data, tmp_path / "two", worker=(1, 2), **options) is None
    shared = write_teacher_cache(teacher, data, tmp_path / "two", worker=(0, 2), **options)
    for one, two in zip(whole.shards, shared.shards):
        assert one.read_bytes() == two.read_bytes()
    assert shared.data == whole.data


@pytest.mark.thorough
def test_stale_caches_are_refused_with_the_reason(tmp_path, duo):
    teacher, _ = duo
    x, y = batch(10)
    data, path = dataset((x, y)), tmp_path / "cache"
    cache = write_teacher_cache(teacher, data, path, shard_size=4, top_k=2)

    other = classifier(2, width=8)
    other.output_dense.bias.assign([1.0, 0.0, 0.0])
    with pytest.raises(InputError, match=r"stale teacher cache.*digest"):
        cache.check_teacher(other)
    with pytest.raises(InputError, match=r"teacher was .*, now"):
        write_teacher_cache(other, data, path, shard_size=4, top_k=2)
    with pytest.raises(InputError, match="top_k was 2, now 3"):
        write_teacher_cache(teacher, data, path, shard_size=4, top_k=3)

    changed = {**x, "token_ids": x["token_ids"].copy()}
    changed["token_ids"][9, 0] += 1
    with pytest.raises(InputError, match=r"example 9 of the data differs.*not in the cache"):
        cache.join(dataset((changed, y)))
    with pytest.raises(InputError, match=r"shard 2 .* other data"):
        write_teacher_cache(teacher, dataset((changed, y)), path, shard_size=4, top_k=2)
    turned = {k: v[::-1] for k, v in x.items()}
    with pytest.raises(InputError, match=r"example 0 .*another place"):
        cache.join(dataset((turned, y)))


def test_what_differs_later_is_found_while_reading(tmp_path, duo, monkeypatch):
    teacher, _ = duo
    x, y = batch(10)
    monkeypatch.setattr("tfvllm.distillation.cache._CHECKED", 4)
    cache = write_teacher_cache(teacher, dataset((x, y)), tmp_path / "cache")
    changed = {**x, "token_ids": x["token_ids"].copy()}
    changed["token_ids"][9, 0] += 1
    longer = {k: np.concatenate([v, v]) for k, v in x.items()}
    for data in (dataset((changed, y)), dataset((longer, np.concatenate([y, y])))):
        with pytest.raises(tf.errors.InvalidArgumentError, match="stale teacher cache"):
            list(cache.join(data))
    assert sum(1 for _ in cache.join(dataset((x, y))).unbatch()) == 10


def test_errors_say_what_to_do(tmp_path, duo):
    teacher, student = duo
    data = dataset(batch(6))
    with pytest.raises(InputError, match=r"is no teacher cache.*write_teacher_cache"):
        TeacherCache(tmp_path)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").touch()
    with pytest.raises(InputError, match="is there and is no teacher cache"):
        write_teacher_cache(teacher, data, tmp_path / "other")
    with pytest.raises(InputError, match="raw strings"):
        write_teacher_cache(teacher, tf.data.Dataset.from_tensors(["a film"]), tmp_path / "strings")
    cache = write_teacher_cache(teacher, data, tmp_path / "cache")
    with pytest.raises(InputError, match=r"no entries of it. Pass cache.join\(data\)"):
        loss_of(cache, student, data, {"logits": losses.ForwardKL()})
    with pytest.raises(InputError, match="reads the teacher's hidden_states"):
        tfvllm.Distiller(cache, student, losses={"h": losses.HiddenStates()})
    with pytest.raises(InputError, match="teacher has 3 and the student 5"):
        tfvllm.Distiller(cache, classifier(1, classes=5))
    assert json.loads((tmp_path / "cache" / "cache.json").read_text())["examples"] == 6


def test_models_of_one_tensor(tmp_path):
    def mlp(width):
        return keras.Sequential([keras.Input((5,)), keras.layers.Dense(width, "relu"), keras.layers.Dense(4)])

    x = np.random.default_rng(0).normal(size=(9, 5)).astype("float32")
    teacher, student, data = mlp(8), mlp(3), dataset((x, np.zeros(9, "int32")))
    cache = write_teacher_cache(teacher, data, tmp_path / "cache", top_k=None)
    which = {"logits": losses.ForwardKL()}
    assert loss_of(cache, student, cache.join(data), which) == pytest.approx(
        loss_of(teacher, student, data, which), rel=1e-5
    )
