"""A small model trained on real text: what bfloat16 costs, and that sense comes out."""

import json

import keras
import keras_nlp
import numpy as np
import pytest
import tensorflow as tf

import tfvllm

LENGTH = 64


@pytest.mark.slow
@pytest.mark.data
def test_bfloat16_keeps_perplexity_on_tiny_shakespeare(data_dir, tmp_path):
    text = np.frombuffer((data_dir / "tinyshakespeare" / "input.txt").read_bytes(), np.uint8).astype(np.int32)
    train, held_out = text[: len(text) * 9 // 10], text[len(text) * 9 // 10 :]
    backbone = keras_nlp.models.GPT2Backbone(128, 2, 4, 96, 384, dropout=0.0, max_sequence_length=LENGTH + 32)
    model = keras_nlp.models.GPT2CausalLM(backbone)
    model.compile(optimizer=keras.optimizers.Adam(3e-3), loss=keras.losses.SparseCategoricalCrossentropy(True))
    rows = train[: len(train) // (LENGTH + 1) * (LENGTH + 1)].reshape(-1, LENGTH + 1)[:6400]
    ids = {"token_ids": rows[:, :-1], "padding_mask": np.ones_like(rows[:, :-1])}
    history = model.fit(ids, rows[:, 1:], batch_size=32, epochs=1, verbose=0)
    assert history.history["loss"][0] < 3.0

    test = held_out[: 64 * LENGTH].reshape(64, LENGTH)
    perplexity = {}
    for precision in ("float32", "bfloat16"):
        path = tfvllm.export(model, tmp_path / precision, task="generate", precision=precision, warmup=False)
        signatures = tf.saved_model.load(str(path)).signatures
        scores = signatures["score"](token_ids=tf.constant(test), padding_mask=tf.ones_like(test))
        perplexity[precision] = float(np.exp(-scores["total"].numpy().sum() / (64 * (LENGTH - 1))))
        assert json.loads((path / "assets.extra" / "tfvllm.json").read_text())["precision"] == precision
    assert perplexity["float32"] < 15.0  # bytes of English; an untrained model has 128
    assert abs(perplexity["bfloat16"] / perplexity["float32"] - 1.0) < 0.005

    prompt = np.frombuffer(b"KING RICHARD:\nWhat ", np.uint8).astype(np.int32)[None]
    found = signatures["serving_default"](
        token_ids=tf.constant(prompt), padding_mask=tf.ones_like(prompt), max_new_tokens=tf.constant(40)
    )
    answer = bytes(found["token_ids"].numpy()[0].astype(np.uint8)).decode("ascii")
    assert sum(character.isalpha() or character in " \n,.'" for character in answer) > 36
